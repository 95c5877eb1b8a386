"""The study's hypotheses, each with the comparison, the cells and the threshold that decide it, and their verdicts.

They were written before the study ran; docs/study.md says why they are these. A *world* is a seed at a corner of the
design: data, pi_ref, labels, reward models, policies and test prompts of its own. Each hypothesis gives one number a
world, a mean over its cells there, and its interval is Student's over worlds. As every world has other prompts, it is
an interval over seeds and prompts at once.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

from figures.paths import RESULTS
from lm.base.command import argument_parser, as_command, path
from lm.objectives import MAIN, METHODS
from lm.workflow.rules import MARGIN, at_edge, still_learning
from theory import records
from theory.records import write_text

Grids = Mapping[str, Mapping[str, Any]]
"""Corner -> what `lm.workflow.summary` writes of it."""
Values = dict[tuple[str, int], float]
"""A number a world, by corner and seed."""
LEVEL = 0.05
"""Of the family: Holm over all hypotheses of the list, those that were not run among them."""
REFERENCE = "n3000-s1"
CORNERS = RESULTS / "corners"
"""Summaries of the committed study's other corners; the reference's is grid.json, of which figures are drawn."""
NOISY, CLEAN = ("n3000-s1", "n1000-s1", "n10000-s1"), ("n3000-none", "n1000-none", "n10000-none")
LOW, ALL, HIGH = (0.2,), (0.2, 0.5, 0.8), (0.5, 0.8)
BLOCK = re.compile(r"(<!-- (hypotheses|checks) -->\n).*?(<!-- end -->)", re.DOTALL)
table = partial(records.table, padded=False)


class NotRun(Exception):
    """Cells that a hypothesis needs are not there."""


@dataclass(frozen=True)
class Contrast:
    """What is to be greater than 0, or the same as 0: a number a world, or the difference of two groups of worlds."""

    name: str
    values: Values
    less: Values | None = None
    """Of other worlds, whose mean is taken off."""

    @property
    def estimate(self) -> float:
        """The mean, or the difference of means."""
        return self._mean(self.values) - (0.0 if self.less is None else self._mean(self.less))

    @property
    def worlds(self) -> int:
        """How many there are."""
        return len(self.values) + len(self.less or {})

    def spread(self) -> tuple[float, float]:
        """Standard error and degrees of freedom, by Welch where there are two groups. NotRun where a group has fewer
        than two worlds."""
        groups = [np.array(list(group.values())) for group in (self.values, self.less) if group is not None]
        if any(len(group) < 2 for group in groups):
            raise NotRun("fewer than two worlds")
        errors = [float(group.var(ddof=1)) / len(group) for group in groups]
        if not any(errors):
            return 0.0, 1.0
        terms = (each**2 / (len(group) - 1) for each, group in zip(errors, groups, strict=True))
        return math.sqrt(sum(errors)), sum(errors) ** 2 / sum(terms)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Two-sided, Student's."""
        error, freedom = self.spread()
        half = error * float(stats.t.ppf((1 + confidence) / 2, freedom)) if error else 0.0
        return self.estimate - half, self.estimate + half

    def p_above(self, bound: float) -> float:
        """One-sided p of a mean that is not above the bound."""
        error, freedom = self.spread()
        if not error:
            return 0.0 if self.estimate > bound else 1.0
        return float(stats.t.sf((self.estimate - bound) / error, freedom))

    def p_below(self, bound: float) -> float:
        """One-sided p of a mean that is not below the bound."""
        return Contrast(self.name, {k: -v for k, v in self.values.items()}, self._minus()).p_above(-bound)

    def _minus(self) -> Values | None:
        return None if self.less is None else {k: -v for k, v in self.less.items()}

    @staticmethod
    def _mean(values: Values) -> float:
        if not values:
            raise NotRun("no world")
        return float(np.mean(list(values.values())))


Kind = Literal["greater", "same"]


@dataclass(frozen=True)
class Hypothesis:
    """A claim, with all that decides it."""

    name: str
    claim: str
    decided_by: str
    """The number a world, in words."""
    cells: str
    contrasts: Callable[[Grids], Sequence[Contrast]]
    kind: Kind = "greater"
    """"greater": all contrasts are above 0; "same": all are within the margin of 0."""
    margin: float = MARGIN


@dataclass(frozen=True)
class Finding:
    """What the cells say of a hypothesis; None where they were not run."""

    contrast: Contrast | None
    """The one that says least for the claim, as the claim is of all of them."""
    p: float | None


# ---------------------------------------------------------------- numbers of the grids


def cells(grids: Grids, corner: str) -> Iterator[Mapping[str, Any]]:
    """Of a corner. NotRun where it is not there."""
    if corner not in grids:
        raise NotRun(corner)
    yield from grids[corner]["cells"]


def of_cells(
    grids: Grids,
    corners: Iterable[str],
    rhos: Sequence[float],
    method: str,
    value: Callable[[Mapping[str, Any]], float] = lambda cell: float(cell["test"]["advantage"]),
) -> Values:
    """Of a method's cells in each world, the mean over these rhos; corners that were not run are passed over. NotRun
    where none of them has the method at each rho."""
    found: Values = {}
    for corner in corners:
        if corner not in grids:
            continue
        by_world: dict[int, dict[float, float]] = {}
        for cell in cells(grids, corner):
            if cell["method"] == method and cell["rho"] in rhos:
                by_world.setdefault(cell["seed"], {})[cell["rho"]] = value(cell)
        whole = {seed: of for seed, of in by_world.items() if len(of) == len(rhos)}
        found |= {(corner, seed): float(np.mean(list(of.values()))) for seed, of in whole.items()}
    if not found:
        raise NotRun(f"{method} at {', '.join(corners)}")
    return found


def minus(one: Values, other: Values) -> Values:
    """World by world. NotRun where they have none in common."""
    both = {world: one[world] - other[world] for world in one if world in other}
    if not both:
        raise NotRun("no world has both")
    return both


def across(one: Values, other: Values) -> Values:
    """Of two corners on the same worlds, seed by seed."""
    by_seed = {seed: value for (_, seed), value in other.items()}
    return minus(one, {world: by_seed[world[1]] for world in one if world[1] in by_seed})


def ahead(
    grids: Grids, ours: Sequence[str], theirs: Sequence[str], corners: Sequence[str], rhos: Sequence[float]
) -> list[Contrast]:
    """Each of our methods less each of theirs."""
    values = {name: of_cells(grids, corners, rhos, name) for name in (*ours, *theirs)}
    return [Contrast(f"{a} − {b}", minus(values[a], values[b])) for a in ours for b in theirs if a != b]


def slope(grids: Grids, corners: Sequence[str], method: str, value: Callable[[Mapping[str, Any]], float]) -> Values:
    """Of a number of the method's cells on rho, in each world that has all of ALL."""
    each = {rho: of_cells(grids, corners, (rho,), method, value) for rho in ALL}
    worlds = [world for world in each[ALL[0]] if all(world in of for of in each.values())]
    if not worlds:
        raise NotRun(f"{method} at all rhos")
    return {world: float(np.polyfit(ALL, [each[rho][world] for rho in ALL], 1)[0]) for world in worlds}


def scale(cell: Mapping[str, Any]) -> float:
    """log of the chosen beta."""
    return math.log(cell["chosen"]["setting"]["beta"])


def matched(cell: Mapping[str, Any], probe: int) -> float:
    """Mean b of the members that the implicit rewards of the probe's pairs are nearest to."""
    bs = (0.2, 0.4, 0.5, 0.6, 0.8)
    return float(np.dot(bs, cell["probe"][probe]["member_shares"]))


def student(cell: Mapping[str, Any]) -> float:
    """Accuracy of the implicit reward on test pairs."""
    return float(cell["test"]["accuracies"]["all"]["accuracy"])


def teacher(grids: Grids, corner: str, rho: float, name: str = MAIN) -> Values:
    """Accuracy of a reward model on test pairs, in each world."""
    if corner not in grids:
        raise NotRun(corner)
    found = {
        (corner, model["seed"]): float(model["test_accuracy"]["all"]["accuracy"])
        for model in grids[corner]["reward_models"]
        if (model["name"], model["rho"]) == (name, rho)
    }
    if not found:
        raise NotRun(f"{name} at {corner}")
    return found


def frontier(cell: Mapping[str, Any], budgets: Sequence[float] = (1.0, 2.0, 4.0)) -> float:
    """Advantage on validation prompts of the best setting and step within a KL to pi_ref, the mean over budgets, nats;
    pi_ref itself, with 0, is within any."""
    best = [max([0.0, *(t["advantage"] for t in cell["validation"] if t["kl"] <= most)]) for most in budgets]
    return float(np.mean(best))


def constants(grids: Grids, method: str) -> list[Contrast]:
    """Each constant alpha less the schedule's, at the reference."""
    if REFERENCE not in grids:
        raise NotRun(REFERENCE)
    entries = [e for e in grids[REFERENCE]["alpha"] if e["method"] == method]
    of: dict[tuple[float, float], Values] = {}
    for e in entries:
        weights = e["alpha"]["alpha_start"], e["alpha"]["alpha_end"]
        of.setdefault(weights, {})[REFERENCE, e["seed"]] = float(e["test"]["advantage"])
    schedules = [values for (start, end), values in of.items() if start != end]
    if not schedules:
        raise NotRun("constant alphas")
    return [
        Contrast(f"{method}, alpha {start:g} − schedule", minus(values, schedules[0]))
        for (start, end), values in of.items()
        if start == end
    ]


# ---------------------------------------------------------------- the hypotheses


def _teachers(grids: Grids) -> list[Contrast]:
    levels = ("0", "0.5", "1", "2")
    values = [of_cells(grids, (f"teacher-{level}",), LOW, "d-dpo") for level in levels]
    steps = pairwise(zip(levels, values, strict=True))
    return [Contrast(f"noise {a} − noise {b}", across(one, other)) for (a, one), (b, other) in steps]


def _gap(grids: Grids, corner: str) -> Values:
    teachers = {seed: value for (_, seed), value in teacher(grids, REFERENCE, 0.2).items()}
    students = of_cells(grids, (corner,), LOW, "d-dpo", student)
    return {world: teachers[world[1]] - value for world, value in students.items() if world[1] in teachers}


def _less(grids: Grids, one: Sequence[str], other: Sequence[str], rhos: Sequence[float]) -> list[Contrast]:
    def gain(corners: Sequence[str]) -> Values:
        return minus(of_cells(grids, corners, rhos, "d-dpo"), of_cells(grids, corners, rhos, "dpo"))

    return [Contrast("d-dpo − dpo, there less here", gain(one), gain(other))]


def _drdo(grids: Grids) -> list[Contrast]:
    def lead(corner: str) -> Values:
        return minus(of_cells(grids, (corner,), ALL, "drdo"), of_cells(grids, (corner,), ALL, "dpo"))

    return [Contrast("drdo − dpo, noisy less clean", lead("n3000-s1"), lead("n3000-none"))]


EVERY = (*NOISY, *CLEAN)
DISTIL = ("d-dpo", "dp-dpo", "e-dpo")
OTHERS = ("dpo", "ipo", "d-dpo", "p-dpo", "dp-dpo", "hull-dpo", "member-dpo")
HYPOTHESES: tuple[Hypothesis, ...] = (
    Hypothesis(
        "F1",
        "[F]: below rho 0.5 every distilling method beats DPO and IPO",
        "d-DPO, dp-DPO, e-DPO each less DPO, IPO each",
        "all N x sharpness, rho 0.2",
        lambda g: ahead(g, DISTIL, ("dpo", "ipo"), EVERY, LOW),
    ),
    Hypothesis(
        "F2",
        "[F]: below rho 0.5 e-DPO is best",
        "e-DPO less each other method",
        "all N x sharpness, rho 0.2",
        lambda g: ahead(g, ("e-dpo",), OTHERS, EVERY, LOW),
    ),
    Hypothesis(
        "F3",
        "[F]: from rho 0.5 on d-DPO is best",
        "d-DPO less each other method but those that contain it (dp-DPO, hull-DPO, one member)",
        "all N x sharpness, rho 0.5 and 0.8",
        lambda g: ahead(g, ("d-dpo",), ("dpo", "ipo", "p-dpo", "e-dpo"), EVERY, HIGH),
    ),
    Hypothesis(
        "F4",
        "[F]: pessimism alone gains little",
        "p-DPO less DPO",
        "all N x sharpness and rho",
        lambda g: ahead(g, ("p-dpo",), ("dpo",), EVERY, ALL),
        kind="same",
    ),
    Hypothesis(
        "F5",
        "[F]: the best beta falls as rho rises",
        "minus the slope of log beta, as validation chose it, on rho: of DPO, of d-DPO",
        "all N x sharpness",
        lambda g: [
            Contrast(f"{name}", {w: -v for w, v in slope(g, EVERY, name, scale).items()}) for name in ("dpo", "d-dpo")
        ],
        margin=math.log(3) / 0.6,
    ),
    Hypothesis(
        "F6",
        "[F]: e-DPO's matched b runs against rho, by training and not from the start",
        "slope of the matched b on rho before training less that at the end",
        "all N x sharpness",
        lambda g: [
            Contrast(
                "start − end",
                minus(
                    slope(g, EVERY, "e-dpo", lambda cell: matched(cell, 0)),
                    slope(g, EVERY, "e-dpo", lambda cell: matched(cell, -1)),
                ),
            )
        ],
        margin=0.1,
    ),
    Hypothesis(
        "B1",
        "The minimum norm explains Figure B.3: before any training the nearest member, that of the smallest margin, "
        "has a b that falls as rho rises",
        "minus the slope on rho of the b matched before training",
        "all N x sharpness",
        lambda g: [
            Contrast("start", {w: -v for w, v in slope(g, EVERY, "e-dpo", lambda cell: matched(cell, 0)).items()})
        ],
        margin=0.1,
    ),
    Hypothesis(
        "F7",
        "[F]: alpha's schedule hardly matters",
        "p-DPO and e-DPO with alpha 0.01, 0.03, 0.1 throughout, each less the schedule",
        "n3000-s1, rho 0.2",
        lambda g: [*constants(g, "p-dpo"), *constants(g, "e-dpo")],
        kind="same",
    ),
    Hypothesis(
        "N1",
        "[N]: DRDO beats DPO and e-DPO",
        "DRDO less DPO, less e-DPO",
        "n3000-s1 and n3000-none, all rhos",
        lambda g: ahead(g, ("drdo",), ("dpo", "e-dpo"), ("n3000-s1", "n3000-none"), ALL),
    ),
    Hypothesis(
        "N2",
        "[N]: DRDO gains most where preferences are not deterministic",
        "DRDO less DPO, with labels of sharpness 1 less without noise",
        "n3000-s1, n3000-none, all rhos",
        _drdo,
    ),
    Hypothesis(
        "S1",
        "The student is the bottleneck: d-DPO's implicit reward orders pairs worse than its teacher",
        "test accuracy of the reward model less that of d-DPO's implicit reward",
        "n3000-s1, rho 0.2",
        lambda g: [Contrast("teacher − student", _gap(g, REFERENCE))],
    ),
    Hypothesis(
        "S2",
        "More passes close the gap",
        "the same gap after 6 passes less that after 26",
        "n3000-s1, passes-26, rho 0.2",
        lambda g: [Contrast("6 − 26 passes", across(_gap(g, REFERENCE), _gap(g, "passes-26")))],
        margin=0.02,
    ),
    Hypothesis(
        "U",
        "Unlabelled pairs make distillation better",
        "d-DPO with unlabelled pairs less without",
        "unlabelled, n3000-s1, rho 0.2",
        lambda g: [
            Contrast(
                "with − without",
                across(of_cells(g, ("unlabelled",), LOW, "d-dpo"), of_cells(g, (REFERENCE,), LOW, "d-dpo")),
            )
        ],
    ),
    Hypothesis(
        "P1",
        "With few pairs and many passes distillation beats DPO",
        "d-DPO less DPO",
        "n1000-s1, all rhos",
        lambda g: ahead(g, ("d-dpo",), ("dpo",), ("n1000-s1",), ALL),
    ),
    Hypothesis(
        "P2",
        "It gains more from fewer pairs",
        "d-DPO less DPO, at N = 1,000 less at N = 10,000",
        "n1000 and n10000, both sharpnesses, all rhos",
        lambda g: _less(g, ("n1000-s1", "n1000-none"), ("n10000-s1", "n10000-none"), ALL),
    ),
    Hypothesis(
        "Z",
        "It gains more from noisier labels",
        "d-DPO less DPO, with labels of sharpness 1 less without noise",
        "all N, all rhos",
        lambda g: _less(g, NOISY, CLEAN, ALL),
    ),
    Hypothesis(
        "K",
        "At a KL budget pessimism is ahead",
        "frontier of p-DPO held at 0.25 to 8 nats less that of DPO: best validation advantage within 1, 2, 4 nats",
        "budget-p, n3000-s1, rho 0.2",
        lambda g: [
            Contrast(
                "p-dpo − dpo",
                across(
                    of_cells(g, ("budget-p",), LOW, "p-dpo", frontier), of_cells(g, (REFERENCE,), LOW, "dpo", frontier)
                ),
            )
        ],
    ),
    Hypothesis(
        "M",
        "The hull is ahead of the minimum",
        "hull-DPO less e-DPO",
        "all N x sharpness and rho",
        lambda g: ahead(g, ("hull-dpo",), ("e-dpo",), EVERY, ALL),
    ),
    Hypothesis(
        "E",
        "The ensemble brings more than its balanced member alone",
        "e-DPO less d-DPO of b0.5",
        "all N x sharpness and rho",
        lambda g: ahead(g, ("e-dpo",), ("member-dpo",), EVERY, ALL),
    ),
    Hypothesis(
        "T",
        "A better teacher makes a better student",
        "d-DPO of the exact reward with noise 0, 0.5, 1, 2: each less the next",
        "teacher-0, -0.5, -1, -2, rho 0.2",
        _teachers,
    ),
    Hypothesis(
        "O",
        "On-policy pairs are worth more than given ones",
        "DPO, d-DPO on pairs of pi_ref less on as many given ones",
        "on-policy, n3000-s1, rho 0.2",
        lambda g: [
            Contrast(name, across(of_cells(g, ("on-policy",), LOW, name), of_cells(g, (REFERENCE,), LOW, name)))
            for name in ("dpo", "d-dpo")
        ],
    ),
)


# ---------------------------------------------------------------- verdicts


def found(hypothesis: Hypothesis, grids: Grids) -> Finding:
    """By the cells that there are."""
    try:
        contrasts = hypothesis.contrasts(grids)
        chances = [_chance(hypothesis, contrast) for contrast in contrasts]
    except NotRun:
        return Finding(None, None)
    if not contrasts:
        return Finding(None, None)
    worst = max(range(len(contrasts)), key=lambda i: chances[i])
    return Finding(contrasts[worst], chances[worst])


def _chance(hypothesis: Hypothesis, contrast: Contrast) -> float:
    if hypothesis.kind == "greater":
        return contrast.p_above(0.0)
    return max(contrast.p_above(-hypothesis.margin), contrast.p_below(hypothesis.margin))


def holm(chances: Sequence[float | None]) -> list[float | None]:
    """Adjusted, of a family of as many tests as the list is long: what was not run counts as 1."""
    order = sorted((i for i, p in enumerate(chances) if p is not None), key=lambda i: chances[i] or 0.0)
    adjusted: list[float | None] = [None] * len(chances)
    least = 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(chances) - rank) * (chances[i] or 0.0)))
        adjusted[i] = least
    return adjusted


def verdict(hypothesis: Hypothesis, finding: Finding, adjusted: float | None, refuting: Sequence[Contrast]) -> str:
    """supported, refuted, undecided, or not run; as docs/study.md says it."""
    if finding.contrast is None or adjusted is None:
        return "not run"
    margin = hypothesis.margin
    if hypothesis.kind == "greater":
        if any(contrast.interval()[1] < margin for contrast in refuting):
            return "refuted"
        return "supported" if adjusted < LEVEL and finding.contrast.estimate >= margin else "undecided"
    if any(low > margin or high < -margin for low, high in (contrast.interval() for contrast in refuting)):
        return "refuted"
    return "supported" if adjusted < LEVEL else "undecided"


def hypotheses(grids: Grids) -> str:
    """The table: each hypothesis, what decides it, and, of what was run, its verdict."""
    findings = [found(one, grids) for one in HYPOTHESES]
    adjusted = holm([finding.p for finding in findings])
    rows = []
    for one, finding, p in zip(HYPOTHESES, findings, adjusted, strict=True):
        told = ["–"] * 4
        if finding.contrast is not None and p is not None:
            low, high = finding.contrast.interval()
            estimate = f"{finding.contrast.estimate:+.3f} ({finding.contrast.name})"
            told = [estimate, f"{low:+.3f} to {high:+.3f}", f"{finding.contrast.worlds}", f"{p:.3f}"]
        every = one.contrasts(grids) if finding.contrast is not None else []
        threshold = f"{'> 0, at least ' if one.kind == 'greater' else '0 ± '}{one.margin:.2f}"
        rows.append([one.name, one.claim, one.decided_by, one.cells, threshold, *told, verdict(one, finding, p, every)])
    headings = ["", "claim", "number a world", "cells", "threshold", "estimate", "95% interval", "worlds", "p, Holm"]
    return records.table([*headings, "verdict"], rows, numbers=False, padded=False)


def checks(grids: Grids) -> str:
    """Of each method, over all cells: how many were gone on with, chose at an edge even so, were still learning, and
    finished samples."""
    every = [cell for grid in grids.values() for cell in grid["cells"]]
    rows = []
    for name in METHODS:
        own = [cell for cell in every if cell["method"] == name]
        if own:
            shares = [np.mean([test(cell) for cell in own]) for test in (at_edge, still_learning)]
            ended = np.mean([cell["test"]["finished"] for cell in own])
            gone_on = sum(_went_on(cell) for cell in own)
            rows.append([name, f"{len(own)}", f"{gone_on}", *(f"{share:.0%}" for share in shares), f"{ended:.1%}"])
    headings = ["method", "cells", "gone on with", "chosen at an edge", "still learning", "finished samples"]
    return table(headings, rows or [["–"] * len(headings)])


def _went_on(cell: Mapping[str, Any]) -> bool:
    """Whether `lm.workflow.job.settled` added to it."""
    return "settled" in cell and bool(cell["settled"]["settings"] or cell["settled"]["longer"])


def fill(page: str, grids: Grids) -> str:
    """The page with its tables made anew."""
    made = {"hypotheses": hypotheses, "checks": checks}
    return BLOCK.sub(lambda hit: f"{hit[1]}{made[hit[2]](grids)}\n{hit[3]}", page)


def grids_of(runs: Path | None = None) -> dict[str, Any]:
    """Of every corner that was run: in this folder of a study, or of the committed study.

    Raises:
        FileNotFoundError: there is none.
    """
    if runs is None:
        files = {
            REFERENCE: RESULTS / "grid.json",
            **{path.stem: path for path in sorted(CORNERS.glob("*.json"), key=lambda path: path.stem)},
        }
        if len(files) == 1:
            raise FileNotFoundError(
                f"there is no corner of the study in {CORNERS}; name the folder of a run with --runs"
            )
    else:
        files = {path.parent.name: path for path in sorted(runs.glob("*/grid.json"))}
        if not files:
            raise FileNotFoundError(f"there is no corner's grid.json in {runs}; run `make study`")
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items()}


@as_command
def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argument_parser("lm.workflow.verdicts", __doc__, "docs/study.md", "docs/study.md --runs runs/study")
    parser.add_argument("page", type=path, help="Markdown file, rewritten in place: docs/study.md")
    parser.add_argument("--runs", type=path, metavar="FOLDER", help="of a study (the committed one's results)")
    options = parser.parse_args(arguments)
    write_text(options.page, fill(options.page.read_text(encoding="utf-8"), grids_of(options.runs)))


if __name__ == "__main__":
    sys.exit(main())
