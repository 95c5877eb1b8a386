"""Figure B.2: does adding the pairs that follow by transitivity change the policy? IPO against p-DPO.

    python -m bandits.transitive --out runs/transitive

Arms 1 > 2 > ... > n, an indifferent reference, and either the chain of adjacent pairs or its transitive closure.
IPO draws every observed margin to 1 / (2 tau), so its optimum depends on which pairs are observed ([F] Prop 7);
[F] calls the change of p-DPO imperceptible. The printed table says how large it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from bandits.objectives import DPO, IPO, Floats
from bandits.policy import uniform
from bandits.report import check_free, folder, provenance, write_figure, write_json
from bandits.solve import Optimum, Reduction, solve
from theory.preferences import PreferenceGraph
from theory.shell import add_force, argument_parser, as_command

BETAS, ALPHAS, TAUS = (0.1, 1.0, 10.0), (0.01, 0.1, 1.0, 10.0), (0.1, 0.5, 1.0, 10.0)
"""Default grid [set]: [F] gives no numbers that our copy still shows."""

_VISIBLE = 0.01  # of total variation: a hundredth of a bar's full height


def records(
    arms: int, betas: list[float], alphas: list[float], taus: list[float], reduction: Reduction
) -> list[dict[str, Any]]:
    """Every optimum of the grid, on the chain and on its closure, as plain JSON values.

    `weights` are the arms' probabilities, `spread` is log pi of the first arm minus that of the last, nats.

    Raises:
        ValueError: fewer than 2 arms, or a hyper-parameter that is not > 0 or given twice.
    """
    if arms < 2:
        raise ValueError(f"arms must be at least 2, got {arms}")
    for name, values in (("beta", betas), ("alpha", alphas), ("tau", taus)):
        if len(set(values)) < len(values):
            raise ValueError(f"{name} must hold each value once, got {values}")
    chain = PreferenceGraph.chain(arms)
    rows = []
    for data, graph in (("chain", chain), ("closure", chain.transitive_closure())):
        settings: list[tuple[str, Any, float | None, dict[str, float | None]]] = [
            ("ipo", IPO(tau=tau), None, {"beta": None, "alpha": None, "tau": tau}) for tau in taus
        ]
        settings += [
            ("p-dpo", DPO(beta=beta), alpha, {"beta": beta, "alpha": alpha, "tau": None})
            for beta in betas
            for alpha in alphas
        ]
        for name, objective, alpha, parameters in settings:
            optimum = solve(objective, graph, uniform(arms), alpha=alpha, reduction=reduction)
            assert isinstance(optimum, Optimum)
            rows.append(
                {
                    "objective": name,
                    "data": data,
                    **parameters,
                    "log_probs": optimum.log_probs.tolist(),
                    "weights": optimum.probs.tolist(),
                    "spread": float(optimum.log_probs[0] - optimum.log_probs[-1]),
                    "certificate": dict(optimum.certificate.residuals),
                }
            )
    return rows


def changes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chain against closure for every setting: both spreads, and the total variation between the policies."""
    keys = ("objective", "beta", "alpha", "tau")
    closures = {tuple(row[key] for key in keys): row for row in rows if row["data"] == "closure"}
    compared = []
    for chain in (row for row in rows if row["data"] == "chain"):
        closure = closures[tuple(chain[key] for key in keys)]
        compared.append(
            {
                **{key: chain[key] for key in keys},
                "total_variation": total_variation(np.array(chain["weights"]), np.array(closure["weights"])),
                "spread_chain": chain["spread"],
                "spread_closure": closure["spread"],
            }
        )
    return compared


def total_variation(left: Floats, right: Floats) -> float:
    """Half the l1 distance of two distributions."""
    return float(np.abs(left - right).sum() / 2)


def table(compared: list[dict[str, Any]]) -> str:
    """The comparison as text, a line a setting, with what it says about [F]'s claim below."""
    lines = [
        f"{'objective':<10}{'beta':>7}{'alpha':>7}{'tau':>7}{'spread chain':>14}{'closure':>10}{'ratio':>8}{'TV':>9}"
    ]
    for row in compared:
        cells = "".join(f"{'' if row[key] is None else format(row[key], 'g'):>7}" for key in ("beta", "alpha", "tau"))
        ratio = row["spread_closure"] / row["spread_chain"]
        lines.append(
            f"{row['objective']:<10}{cells}{row['spread_chain']:>14.4f}{row['spread_closure']:>10.4f}{ratio:>8.3f}"
            f"{row['total_variation']:>9.4f}"
        )
    ipo = [row["total_variation"] for row in compared if row["objective"] == "ipo"]
    pdpo = [row for row in compared if row["objective"] == "p-dpo"]
    small = [row for row in pdpo if row["total_variation"] < _VISIBLE]
    lines.append("")
    lines.append(
        f"Total variation between chain and closure: IPO {min(ipo):.4f} to {max(ipo):.4f}, p-DPO "
        f"{min(row['total_variation'] for row in pdpo):.4f} to {max(row['total_variation'] for row in pdpo):.4f}."
    )
    where = "; ".join(f"beta {row['beta']:g}, alpha {row['alpha']:g}" for row in small) or "none of these settings"
    ratios = [row["spread_closure"] / row["spread_chain"] for row in pdpo]
    lines.append(f"Spread on the closure over that on the chain: p-DPO {min(ratios):.3f} to {max(ratios):.3f}.")
    lines.append(f"p-DPO changes by less than {_VISIBLE:g} in {len(small)} of {len(pdpo)} settings: {where}.")
    return "\n".join(lines)


@as_command
def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    parser = argument_parser(
        "bandits.transitive",
        "Figure B.2: preference chain against its transitive closure.",
        "",
        "--arms 5 --beta 0.3 1 --alpha 0.1 --out runs/transitive-5",
    )
    parser.add_argument("--arms", type=int, default=3, help="number of arms (%(default)s)")
    parser.add_argument("--out", type=folder, default=Path("runs/transitive"), help="output folder (%(default)s)")
    parser.add_argument("--beta", type=float, nargs="+", default=list(BETAS), help="p-DPO's beta (%(default)s)")
    parser.add_argument("--alpha", type=float, nargs="+", default=list(ALPHAS), help="p-DPO's KL weight (%(default)s)")
    parser.add_argument("--tau", type=float, nargs="+", default=list(TAUS), help="IPO's tau (%(default)s)")
    parser.add_argument(
        "--reduction",
        choices=get_args(Reduction),
        default="mean",
        help="mean: the loss is an expectation over the pairs, as in the papers; sum: it adds up (%(default)s)",
    )
    add_force(parser)
    options = parser.parse_args(arguments)
    check_free(options.out, "transitive.json", "figure_b2.json", force=options.force)
    rows = records(options.arms, options.beta, options.alpha, options.tau, options.reduction)
    config = {name: value for name, value in vars(options).items() if name not in ("out", "force", "debug")}
    compared = changes(rows)
    print(table(compared))
    document = {"provenance": provenance(config, seed=None), "results": rows, "changes": compared}
    written = [write_json(options.out / "transitive.json", rows), *write_figure("figure_b2", document, options.out)]
    print("wrote", *written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
