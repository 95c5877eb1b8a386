"""Writes the tables of docs/results.md and docs/choosing.md from the grid's summary, those of docs/real-text.md from
that of the studies on real text, and what stages took and benchmarks measured (docs/performance.md), so that no number
in them is typed.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; everything else in the page is prose and stays. With
stages:PLACE for a name, a file or a folder from this repository's on, it is what the stages of the runs or records
there took; with rewards:PLACE, how good the reward models of the records there are; with bench:PLACE or scale:PLACE, a
file, what `lm.bench` or `lm.bench --scale` measured; with effects:PLACE what `lm.workflow.regimes` wrote there of each
corner.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from figures.seeds import interval
from lm.base.command import argument_parser, as_command, path
from lm.objectives import MAIN, METHODS
from lm.workflow import bench_tables, real_tables, regimes, reward_tables, stage_tables
from lm.workflow.record import rho_name
from theory import records
from theory.records import write_text

Grid = dict[str, Any]
"""What `lm.workflow.summary` writes."""

ROOT = Path(__file__).parents[2]
GRID = ROOT / "figures" / "results" / "grid.json"
OF_PLACES: dict[str, Callable[[Path], str]] = {
    "stages": stage_tables.table,
    "rewards": reward_tables.table,
    "bench": bench_tables.table,
    "scale": bench_tables.scale,
    "effects": regimes.table,
}
"""Kinds of tables that are of a file or a folder."""
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
table = partial(records.table, padded=False)


def fill(page: str, grid: Grid) -> str:
    """The page with every table made anew; ValueError where it asks for one that there is not."""

    def filled(found: re.Match[str]) -> str:
        start, name, end = found.groups()
        kind, _, place = name.partition(":")
        if place and kind in OF_PLACES:
            return f"{start}{OF_PLACES[kind](ROOT / place)}\n{end}"
        if name not in TABLES:
            places = ", ".join(f"{kind}:PLACE" for kind in OF_PLACES)
            raise ValueError(f"there is no table {name!r}; there are {', '.join(TABLES)}, {places}")
        return f"{start}{TABLES[name](grid)}\n{end}"

    return BLOCK.sub(filled, page)


def _mean(by_seed: Sequence[float], confidence: float) -> str:
    """A mean over seeds, each with prompts of its own, and Student's interval where there are two or more."""
    ends = interval(by_seed, confidence)
    return records.estimate(float(np.mean(by_seed)), None if ends is None else [float(end) for end in ends])


def _rhos(grid: Grid) -> list[str]:
    return [rho_name(rho) for rho in grid["rhos"]]


def reward_models(grid: Grid) -> str:
    """Held-out accuracy of the reward models by which completion the oracle prefers, means over seeds."""

    def row(name: str, rho: float) -> list[str]:
        models = [m for m in grid["reward_models"] if m["name"] == name and m["rho"] == rho]
        shares = [
            np.mean([m["accuracy"][kind]["accuracy"] for m in models])
            for kind in ("all", "longer", "shorter", "neither")
        ]
        return [
            rho_name(rho),
            "all of D_rho" if name == MAIN else name,
            f"{np.mean([m['pairs'] for m in models]):,.0f}",
            *(f"{share:.3f}" for share in shares),
        ]

    headings = ["rho", "trained on", "pairs", "accuracy", "longer preferred", "shorter preferred", "neither longer"]
    mains = [row(MAIN, rho) for rho in grid["rhos"]]
    return table(headings, [*mains, *(row(name, grid["rhos"][0]) for name in grid["members"])])


def advantages(grid: Grid) -> str:
    """Oracle advantage with its interval over seeds, a column a rho."""

    def cell(rho: str, name: str) -> str:
        return _mean(grid["advantages"][rho][name]["by_seed"], grid["confidence"])

    rows = [[name, *(cell(rho, name) for rho in _rhos(grid))] for name in grid["methods"]]
    return table(["method", *(f"rho {rho}" for rho in _rhos(grid))], rows)


def _difference(grid: Grid, rho: str, one: str, other: str) -> str:
    """Of two methods' advantages, seed by seed, with its interval."""
    ours, theirs = (grid["advantages"][rho][name]["by_seed"] for name in (one, other))
    return _mean(np.subtract(ours, theirs).tolist(), grid["confidence"])


def differences(grid: Grid, pairs: Sequence[tuple[str, str]]) -> str:
    """Differences of advantages and their intervals over seeds, a column a rho."""
    rows = [[f"{one} − {other}", *(_difference(grid, rho, one, other) for rho in _rhos(grid))] for one, other in pairs]
    return table(["difference", *(f"rho {rho}" for rho in _rhos(grid))], rows)


def distilling(grid: Grid) -> str:
    """Every distilling method against DPO and IPO."""
    names = [name for name in grid["methods"] if METHODS[name].needs]
    return differences(grid, [(name, other) for other in ("dpo", "ipo") for name in names if other in grid["methods"]])


def pessimism(grid: Grid) -> str:
    """What the KL term, the ensemble and the hull add."""
    beside = [(name, METHODS[name].compared_with) for name in grid["methods"]]
    return differences(
        grid, [(name, other) for name, other in beside if other is not None and other in grid["methods"]]
    )


def best(grid: Grid) -> str:
    """The best method at each rho, the second, and whether they differ."""
    rows = []
    for rho in _rhos(grid):
        order = sorted(grid["methods"], key=lambda name: -grid["advantages"][rho][name]["advantage"])
        rows.append([rho, *order[:3], _difference(grid, rho, order[0], order[1])])
    return table(["rho", "best", "second", "third", "best − second"], rows)


def settings(grid: Grid) -> str:
    """The settings that validation chose, one a seed."""

    def cell(rho: float, name: str) -> str:
        cells = [c for c in grid["cells"] if c["rho"] == rho and c["method"] == name]
        swept = next(iter(grid["config"]["sweep"][name][0]))
        return " ".join(f"{c['chosen']['setting'][swept]:g}" for c in cells)

    names = [name for name in grid["methods"] if name in grid["config"]["sweep"]]
    rows = [
        [f"{name} ({next(iter(grid['config']['sweep'][name][0]))})", *(cell(rho, name) for rho in grid["rhos"])]
        for name in names
    ]
    return table(["method", *(f"rho {rho}" for rho in _rhos(grid))], rows)


def members(grid: Grid) -> str:
    """Share of probe pairs whose nearest member to e-DPO's implicit rewards is b, at the end of training."""

    def cell(rho: float, k: int) -> str:
        return f"{np.mean([s[k] for s in _last(grid, rho, 'e-dpo', 'member_shares')]):.2f}"

    def mean(rho: float) -> str:
        values = [float(name.removeprefix("b")) for name in grid["members"]]
        return f"{np.mean([np.dot(s, values) for s in _last(grid, rho, 'e-dpo', 'member_shares')]):.3f}"

    rows = [[rho_name(rho), *(cell(rho, k) for k in range(len(grid["members"]))), mean(rho)] for rho in grid["rhos"]]
    return table(["rho", *grid["members"], "mean b"], rows)


def _last(grid: Grid, rho: float, name: str, key: str) -> list[Any]:
    """A value of the last probe of each seed."""
    return [c["probe"][-1][key] for c in grid["cells"] if c["rho"] == rho and c["method"] == name]


def diagnostics(grid: Grid) -> str:
    """What became of winners, losers and the reference, over all rhos and seeds."""

    def mean(name: str, value: Callable[[dict[str, Any]], float]) -> str:
        return f"{np.mean([value(c) for c in grid['cells'] if c['method'] == name]):+.2f}"

    rows = [
        [
            name,
            mean(name, lambda c: c["test"]["chosen_logratio"]),
            mean(name, lambda c: c["test"]["rejected_logratio"]),
            mean(name, lambda c: c["probe"][-1]["forward_kl_reference"]),
            mean(name, lambda c: c["test"]["kl"]),
            mean(name, lambda c: c["test"]["length"] - grid["sft"][str(c["seed"])]["length"]),
            mean(name, lambda c: c["test"]["utility"] - grid["sft"][str(c["seed"])]["utility"]),
            f"{np.mean([c['test']['finished'] for c in grid['cells'] if c['method'] == name]):.1%}",
        ]
        for name in grid["methods"]
    ]
    headings = ["winners, nats", "losers, nats", "KL(ref, pi)", "KL(pi, ref)", "length", "true utility", "finished"]
    return table(["method", *headings], rows)


def alphas(grid: Grid) -> str:
    """Advantage under constant weights of the KL term and the annealed one, means over seeds."""
    entries = grid["alpha"]
    kinds = sorted({(e["alpha"]["alpha_start"], e["alpha"]["alpha_end"]) for e in entries})
    rows = []
    for name in dict.fromkeys(e["method"] for e in entries):
        for rho in sorted({e["rho"] for e in entries}):
            own = [
                [
                    e["test"]["advantage"]
                    for e in entries
                    if (e["method"], e["rho"]) == (name, rho)
                    and (e["alpha"]["alpha_start"], e["alpha"]["alpha_end"]) == kind
                ]
                for kind in kinds
            ]
            rows.append([name, rho_name(rho), *(f"{np.mean(values):+.3f}" if values else "-" for values in own)])
    named = [f"{start:g}" if start == end else f"{start:g} → {end:g}" for start, end in kinds]
    return table(["method", "rho", *named], rows)


def validation(grid: Grid) -> str:
    """Advantage on validation prompts of each setting after its last step, means over seeds; the better one is bold."""

    def advantage(name: str, rho: float, setting: dict[str, float]) -> float:
        tried = [
            one
            for c in grid["cells"]
            if (c["method"], c["rho"]) == (name, rho)
            for one in c["validation"]
            if one["step"] == c["probe"][-1]["step"] and setting.items() <= one["setting"].items()
        ]
        return float(np.mean([one["advantage"] for one in tried]))

    rows = []
    for name, settings in grid["config"]["sweep"].items():
        columns = [[advantage(name, rho, setting) for setting in settings] for rho in grid["rhos"]]
        for i, setting in enumerate(settings):
            cells = [f"**{c[i]:+.2f}**" if c[i] == max(c) else f"{c[i]:+.2f}" for c in columns]
            rows.append([f"{name}, {' '.join(f'{option} {value:g}' for option, value in setting.items())}", *cells])
    return table(["setting", *(f"rho {rho}" for rho in _rhos(grid))], rows)


def alpha_levels(grid: Grid) -> str:
    """What weights of the KL term do beside the advantage, means over seeds; utility is the difference to pi_ref's."""
    groups: dict[tuple[str, float, float, float], list[dict[str, Any]]] = {}
    for e in grid["alpha"]:
        key = (e["method"], e["rho"], e["alpha"]["alpha_start"], e["alpha"]["alpha_end"])
        utility = e["test"]["utility"] - grid["sft"][str(e["seed"])]["utility"]
        groups.setdefault(key, []).append({**e["test"], "utility": utility})
    rows = []
    for (name, rho, start, end), tests in groups.items():
        means = [np.mean([test[what] for test in tests]) for what in ("advantage", "kl", "utility")]
        alpha = f"{start:g}" if start == end else f"{start:g} → {end:g}"
        rows.append([name, rho_name(rho), alpha, *(f"{mean:+.2f}" for mean in means)])
    return table(["method", "rho", "alpha", "advantage", "KL(pi, ref)", "true utility"], rows)


TABLES: dict[str, Callable[[Grid], str]] = {
    "reward-models": reward_models,
    "advantages": advantages,
    "distilling": distilling,
    "pessimism": pessimism,
    "best": best,
    "settings": settings,
    "members": members,
    "diagnostics": diagnostics,
    "alphas": alphas,
    "validation": validation,
    "alpha-levels": alpha_levels,
    **real_tables.TABLES,
}


@as_command
def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argument_parser(
        "lm.workflow.tables",
        __doc__,
        "docs/results.md",
        "docs/performance.md",
        "docs/real-text.md --grid figures/results/real_text.json",
    )
    parser.add_argument("page", type=path, help="Markdown file, rewritten in place, e.g. docs/results.md")
    parser.add_argument("--grid", type=path, default=GRID, help="the summary (%(default)s)")
    options = parser.parse_args(arguments)
    grid = json.loads(options.grid.read_text(encoding="utf-8"))
    page = options.page.read_text(encoding="utf-8")
    if not BLOCK.search(page):
        raise ValueError(f"{options.page} has no table to write, between <!-- table: NAME --> and <!-- end -->")
    write_text(options.page, fill(page, grid))


if __name__ == "__main__":
    sys.exit(main())
