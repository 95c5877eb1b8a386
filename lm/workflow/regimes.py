"""The study as one small file, figures/results/study.json: frontier, regime map, and what rules are learnt from."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from figures.record import Judge
from figures.studies import EFFECTS, VERSION, Regime, read_study
from lm.base.command import argument_parser, as_command, path
from lm.base.store import provenance
from lm.objectives import METHODS, looks
from lm.studies.advice import predictors
from lm.workflow.rules import MARGIN
from lm.workflow.summary import as_text, rounded
from lm.workflow.verdicts import REFERENCE, Contrast, Grids, NotRun, Values, across, grids_of, minus, of_cells
from theory import records
from theory.records import write_text

CONFIDENCE = 0.95
BASELINE = "dpo"
"""Of a single factor that does not concern it, the reference's cells are its own."""
STUDENT_BETA = 0.1
"""Of the DPO whose accuracy is a predictor: the default of a run. [set]"""


def document(grids: Grids) -> dict[str, Any]:
    """As `figures.studies.StudyResults` has it; corners that were not run are not in it.

    Args:
        grids: summaries by corner.

    Raises:
        ValueError: there are none, or their jobs drew no best-of-n.
    """
    if not grids:
        raise ValueError("a study needs the summary of a corner at least, got none")
    first = next(iter(grids.values()))
    methods = [name for name in METHODS if any(name in grid["methods"] for grid in grids.values())]
    seeds = sorted({seed for grid in grids.values() for seed in grid["seeds"]})
    made = {
        "version": VERSION,
        "confidence": CONFIDENCE,
        "margin": MARGIN,
        "looks": looks(methods),
        "judge": _judge(first),
        "n": first["config"]["evaluation"]["valid_prompts"],
        "presets": {title: preset for corner, grid in grids.items() for title, preset in _panels(corner, grid)},
        "regimes": list(_regimes(grids)),
        "sets": list(_sets(grids)),
        "provenance": {
            **provenance(seeds[0]),
            "seed": seeds,
            "corners": {corner: grid["provenance"]["jobs"] for corner, grid in grids.items()},
        },
    }
    whole: dict[str, Any] = rounded(made)
    return whole


def _judge(grid: Mapping[str, Any]) -> str:
    """In words."""
    judge = grid["config"]["judge"]
    return "the embedded world's exact judge" if judge["kind"] == "exact" else Judge(kind=judge["kind"]).kind


def _panels(corner: str, grid: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Panels of the frontier: a corner of two methods or more, at each rho."""
    if len(grid["methods"]) > 1:
        for rho in grid["rhos"]:
            yield f"{corner}, rho {rho:g}", _panel(corner, grid, rho)


def _panel(corner: str, grid: Mapping[str, Any], rho: float) -> dict[str, Any]:
    seeds = {}
    for seed in grid["seeds"]:
        own = {c["method"]: c["validation"] for c in grid["cells"] if (c["seed"], c["rho"]) == (seed, rho)}
        best = grid["base"][str(seed)].get("best_of_n")
        if best is None:
            raise ValueError(f"{corner} has no best_of_n of seed {seed}: evaluation.best_of asks for it")
        points = {name: [_kept(one, ("setting", "step", "advantage", "kl")) for one in of] for name, of in own.items()}
        seeds[str(seed)] = {"methods": points, "best_of": [_kept(one, ("n", "advantage")) for one in best]}
    return {"seeds": seeds}


def _kept(row: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: row[name] for name in names}


def effect(grids: Grids, corner: str, rho: float, name: str) -> Values:
    """A number a world. NotRun where a method is not there, nor, of a single factor, at the reference."""
    ours, theirs, _ = EFFECTS[name]
    one = of_cells(grids, (corner,), (rho,), ours)
    try:
        return minus(one, of_cells(grids, (corner,), (rho,), theirs))
    except NotRun:
        if theirs != BASELINE or not _is_single_factor(grids, corner):
            raise
        return across(one, of_cells(grids, (REFERENCE,), (rho,), theirs))


def _is_single_factor(grids: Grids, corner: str) -> bool:
    return REFERENCE in grids and corner != REFERENCE and grids[corner]["seeds"] == grids[REFERENCE]["seeds"]


def _regimes(grids: Grids) -> Iterator[dict[str, Any]]:
    for corner, grid in grids.items():
        for rho in grid["rhos"]:
            for name in EFFECTS:
                try:
                    contrast = Contrast(name, effect(grids, corner, rho, name))
                except NotRun:
                    continue
                low, high = contrast.interval(CONFIDENCE) if contrast.worlds > 1 else (None, None)
                yield {
                    "corner": corner,
                    "rho": rho,
                    "effect": name,
                    "estimate": contrast.estimate,
                    "low": low,
                    "high": high,
                    "worlds": contrast.worlds,
                    "says": says(contrast.estimate, low, high),
                }


def says(estimate: float, low: float | None, high: float | None) -> str:
    """What an effect does, by its interval: helps or hurts where that excludes 0 and the estimate matters, nothing
    where it excludes whatever matters; else undecided."""
    if low is None or high is None:
        return "undecided"
    if low > 0 and estimate >= MARGIN:
        return "helps"
    if high < 0 and estimate <= -MARGIN:
        return "hurts"
    return "nothing" if low > -MARGIN and high < MARGIN else "undecided"


def _sets(grids: Grids) -> Iterator[dict[str, Any]]:
    """Of every world at a corner and rho of which the records tell predictors."""
    for corner, grid in grids.items():
        found = {(rho, name): _known(grids, corner, rho, name) for rho in grid["rhos"] for name in EFFECTS}
        for one in grid.get("sets", []):
            seed, rho = one["seed"], one["rho"]
            yield {
                "corner": corner,
                "seed": seed,
                "rho": rho,
                "predictors": predictors(one, one["teacher"], _student(grids, corner, seed, rho), rho),
                "effects": {n: found[rho, n][corner, seed] for n in EFFECTS if (corner, seed) in found[rho, n]},
            }


def _known(grids: Grids, corner: str, rho: float, name: str) -> Values:
    try:
        return effect(grids, corner, rho, name)
    except NotRun:
        return {}


def _student(grids: Grids, corner: str, seed: int, rho: float) -> Mapping[str, Any] | None:
    """DPO's at STUDENT_BETA, of the corner or, of a single factor that has none, of the reference."""
    for name in (corner, *([REFERENCE] if _is_single_factor(grids, corner) else [])):
        for cell in grids[name]["cells"]:
            if (cell["seed"], cell["rho"], cell["method"]) == (seed, rho, BASELINE):
                of_beta = [one for one in cell.get("students", []) if one["setting"]["beta"] == STUDENT_BETA]
                return of_beta[0] if of_beta else None
    return None


def table(path: Path) -> str:
    """The regimes of a study.json as Markdown: a row a corner and rho, a column an effect.

    Raises:
        ValueError: the file is no such one, or is not there.
    """
    found = read_study(path)
    cells = {(one.corner, one.rho, one.effect): one for one in found.regimes}

    def cell(one: Regime | None) -> str:
        if one is None:
            return "–"
        ends = None if one.low is None or one.high is None else (one.low, one.high)
        return f"{records.estimate(one.estimate, ends)} {one.says}"

    rows = [
        [f"`{corner}`", f"{rho:g}", *(cell(cells.get((corner, rho, name))) for name in EFFECTS)]
        for corner, rho in dict.fromkeys((one.corner, one.rho) for one in found.regimes)
    ]
    headings = [words for _, _, words in EFFECTS.values()]
    return records.table(["corner", "rho", *headings], rows, numbers=False, padded=False)


@as_command
def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argument_parser("lm.workflow.regimes", __doc__, "--runs runs/study --out figures/results/study.json")
    parser.add_argument("--runs", type=path, metavar="FOLDER", help="of a study (the committed one's results)")
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="rewritten in place")
    options = parser.parse_args(arguments)
    write_text(options.out, as_text(document(grids_of(options.runs))))


if __name__ == "__main__":
    sys.exit(main())
