"""Degeneration gallery: where the mass goes under gradient descent on DPO, p-DPO, d-DPO and IPO.

    python -m bandits.degeneration --out runs/degeneration

The responses are the strings of two tokens over {a, b}; the only pair prefers ab to bb, so aa and ba are unseen. From
the same start (pi_ref, uniform) every objective is descended twice: with a free logit a response, and with a logit a
token, added up over the string, as a language model shares parameters. With shared ones, DPO's gradient points along
the difference of the two strings' counts ([F] Prop 2): it raises every a, so that the unseen aa takes all mass and the
winner's own probability falls to zero.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bandits.objectives import DPO, IPO, Distillation, Floats, PairLoss, positive
from bandits.policy import uniform
from bandits.report import check_free, folder, provenance, write_figure
from bandits.solve import Optimum, solve
from theory.preferences import PreferenceGraph
from theory.shell import add_force, argument_parser, as_command, whole_number

STRINGS = ("aa", "ab", "ba", "bb")
FEATURES = {
    "free": np.eye(4),
    "shared": np.array([[string.count(token) for token in "ab"] for string in STRINGS], dtype=np.float64),
}
"""Logits are features @ parameters; [4, parameters]."""

_PAIR = PreferenceGraph(4, [(STRINGS.index("ab"), STRINGS.index("bb"))])
_RECORDED = 80


def objectives(beta: float, tau: float, alpha: float, reward_margin: float) -> dict[str, tuple[Any, float | None]]:
    """Name -> (objective, KL weight)."""
    return {
        "dpo": (DPO(beta=beta), None),
        "p-dpo": (DPO(beta=beta), alpha),
        "d-dpo": (Distillation(beta=beta, reward_margins=[reward_margin]), None),
        "ipo": (IPO(tau=tau), None),
    }


def descend(loss: PairLoss, alpha: float, features: Floats, *, rate: float, steps: int) -> tuple[list[int], Floats]:
    """Gradient descent on loss + alpha KL(pi_ref || pi) from zero parameters, pi_ref uniform.

    Returns:
        The recorded steps, closer together at first, and log pi there, [records, n].
    """
    n = len(features)
    record = np.unique(np.concatenate([[0], np.round(np.geomspace(1, steps, _RECORDED)).astype(int)]))
    parameters, ref = np.zeros(features.shape[1]), uniform(n)
    path, recorded = [], set(record.tolist())
    for step in range(steps + 1):
        logits = features @ parameters
        log_probs = logits - np.logaddexp.reduce(logits)
        if step in recorded:
            path.append(log_probs)
        slopes = loss.derivatives(_PAIR.margins(log_probs - np.log(ref))).slope
        by_logit = _PAIR.by_response(slopes) + alpha * (np.exp(log_probs) - ref)
        parameters -= rate * (features.T @ by_logit)
    return record.tolist(), np.array(path)


def compute(beta: float, tau: float, alpha: float, reward_margin: float, rate: float, steps: int) -> dict[str, Any]:
    """Paths of every objective under both parametrisations, with the exact tabular optimum where there is one.

    Raises:
        ValueError: a parameter out of range, or a rate with which gradient descent diverges.
    """
    positive("rate", rate)
    results: dict[str, Any] = {"strings": list(STRINGS), "winner": "ab", "loser": "bb", "paths": {}, "optima": {}}
    for name, (objective, weight) in objectives(beta, tau, alpha, reward_margin).items():
        optimum = solve(objective, _PAIR, uniform(4), alpha=weight)
        results["optima"][name] = optimum.probs.tolist() if isinstance(optimum, Optimum) else None
        results["paths"][name] = {}
        for kind, features in FEATURES.items():
            with np.errstate(over="ignore", invalid="ignore"):  # a path that leaves the floats is refused below
                recorded, path = descend(objective.pair_loss(), weight or 0.0, features, rate=rate, steps=steps)
            if not np.isfinite(path).all():
                raise ValueError(f"rate must be smaller: {name} diverges with {rate:g}")
            results["steps"] = recorded
            results["paths"][name][kind] = np.round(path, 5).tolist()
    return results


@as_command
def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    parser = argument_parser(
        "bandits.degeneration",
        "Where the mass goes under gradient descent.",
        "",
        "--beta 0.5 --steps 5000 --out runs/degeneration-0.5",
    )
    parser.add_argument("--out", type=folder, default=Path("runs/degeneration"), help="output folder (%(default)s)")
    for name, default, meaning in (
        ("beta", 1.0, "inverse scale of the implicit reward"),
        ("tau", 0.1, "IPO's regularisation"),
        ("alpha", 0.1, "KL weight of p-DPO"),
        ("reward-margin", 2.0, "delta of the pair, for d-DPO"),
        ("rate", 0.1, "step size"),
    ):
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{meaning} (%(default)s)")
    parser.add_argument("--steps", type=whole_number, default=20_000, help="gradient steps (%(default)s)")
    add_force(parser)
    options = parser.parse_args(arguments)
    check_free(options.out, "degeneration.json", force=options.force)
    config = {name: value for name, value in vars(options).items() if name not in ("out", "force", "debug")}
    results = compute(**config)
    winner = STRINGS.index("ab")
    for name, paths in results["paths"].items():
        ends = ", ".join(f"{kind} {np.exp(path[-1][winner]):.4f}" for kind, path in paths.items())
        print(f"{name:<6} probability of the winner after {options.steps} steps from 0.25: {ends}")
    document = {"provenance": provenance(config, seed=None), "results": results}
    print("wrote", *write_figure("degeneration", document, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
