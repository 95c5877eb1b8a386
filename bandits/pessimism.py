"""Figure 1: which policy does pessimism choose among those that an ensemble of rewards asks for?

    python -m bandits.pessimism --out runs/pessimism

On three arms: pi_ref, the policy pi_r of every reward of an ensemble, the policies of all mixtures (the hull), the
member closest to pi_ref in forward KL (the choice that [F]'s Theorem 2 describes for a finite set), and the max-min
policy, which is the closest one over the *hull*. Beside them, the exact optima of e-DPO and of hull-DPO on all pairs,
from little to much KL weight.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial import ConvexHull

from bandits.maxmin import MaxMin, closest_member, max_min, target_policy
from bandits.objectives import EnsembleHull, EnsembleMin, Floats, positive
from bandits.report import check_free, folder, provenance, write_figure
from bandits.solve import Optimum, solve
from theory.preferences import PreferenceGraph
from theory.shell import add_force, argument_parser, as_command

REF = (0.3, 0.4, 0.3)
REWARDS = ((1.0, -0.3, -0.5), (-0.2, 1.0, -0.6), (1.2, 0.5, -0.7), (0.1, 0.5, -1.0))
"""[set] four rewards that agree that arm 3 is the worst and disagree about the other two."""

_ALPHAS = np.geomspace(1e-3, 1e2, 41)
_PER_EDGE = 24


def compute(rewards: Any, ref: Any, beta: float) -> dict[str, Any]:
    """All that Figure 1 shows, as plain JSON values; policies are lists of three probabilities."""
    rewards, ref = np.asarray(rewards, dtype=np.float64), np.asarray(ref, dtype=np.float64)
    if rewards.ndim != 2 or rewards.shape[1] != 3:
        raise ValueError(f"Figure 1 lives on the simplex of three arms, got rewards of shape {rewards.shape}")
    positive("beta", beta)
    graph = PreferenceGraph(3, [(0, 1), (1, 2), (0, 2)])
    margins = graph.margins(rewards)
    paths: dict[str, list[list[float]]] = {"e-dpo": [], "hull-dpo": []}
    for alpha in _ALPHAS:
        for name, objective in (("e-dpo", EnsembleMin), ("hull-dpo", EnsembleHull)):
            optimum = solve(objective(beta=beta, reward_margins=margins), graph, ref, alpha=float(alpha))
            assert isinstance(optimum, Optimum)
            paths[name].append(optimum.probs.tolist())
    return {
        "ref": ref.tolist(),
        "members": np.exp(target_policy(rewards, ref, beta=beta)).tolist(),
        "hull": np.exp(target_policy(_outline(rewards), ref, beta=beta)).tolist(),
        "closest_member": _choice(closest_member(rewards, ref, beta=beta)),
        "max_min": _choice(max_min(rewards, ref, beta=beta)),
        "alphas": _ALPHAS.tolist(),
        "paths": paths,
    }


def _outline(rewards: Floats) -> Floats:
    """Points along the boundary of the rewards' convex hull, up to constants (which no policy sees). [k, 3]."""
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    corners = rewards[ConvexHull(centred[:, :2]).vertices]
    along = np.linspace(0, 1, _PER_EDGE, endpoint=False)[:, None]
    edges = zip(corners, np.roll(corners, -1, axis=0), strict=True)
    return np.concatenate([(1 - along) * start + along * end for start, end in edges])


def _choice(choice: MaxMin) -> dict[str, Any]:
    return {
        "policy": np.exp(choice.log_probs).tolist(),
        "weights": choice.weights.tolist(),
        "worst_case": choice.value,
        "forward_kl": choice.forward_kl,
        "certificate": dict(choice.certificate.residuals),
    }


@as_command
def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    parser = argument_parser(
        "bandits.pessimism", "Figure 1: the pessimistic policy.", "", "--beta 0.3 --out runs/pessimism-0.3"
    )
    parser.add_argument("--out", type=folder, default=Path("runs/pessimism"), help="output folder (%(default)s)")
    parser.add_argument("--beta", type=float, default=0.6, help="inverse scale of the implicit reward (%(default)s)")
    add_force(parser)
    options = parser.parse_args(arguments)
    check_free(options.out, "figure_1.json", force=options.force)
    results = compute(REWARDS, REF, options.beta)
    config = {"beta": options.beta, "ref": REF, "rewards": REWARDS}
    for name in ("closest_member", "max_min"):
        choice = results[name]
        print(
            f"{name:<15} worst-case value {choice['worst_case']:+.4f}  KL(ref || pi) {choice['forward_kl']:.4f} nats  "
            f"weights {np.round(choice['weights'], 3).tolist()}  "
            f"adversary gap {choice['certificate']['adversary_gap']:.1e}"
        )
    document = {"provenance": provenance(config, seed=None), "results": results}
    print("wrote", *write_figure("figure_1", document, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
