"""What a study's worlds say of a set: its predictors, the rule of an effect, and the nearest cell of the regime map.

A rule is a straight line in one predictor. It is one only where it predicts on worlds left out of its fitting, better
than the mean of the others does; else there is no rule, and that is what is said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from scipy import stats

from figures.studies import EFFECTS, Regime, StudiedSet

Floats = npt.NDArray[np.float64]
PREDICTORS: dict[str, str] = {
    "teacher_less_student": "teacher's held-out accuracy less the student's",
    "length_coefficient": "length coefficient of the teacher",
    "disagreement": "chance that two labels of a pair differ",
    "pairs_a_prompt": "pairs a prompt",
    "passes": "passes over the pairs",
    "longer_preferred": "share in which the longer is preferred",
}
"""What may predict, in words."""
IN_LOGS = ("pairs_a_prompt", "passes")
"""Of which a factor counts, wherever it begins."""
LEAST_WORLDS = 5
"""With fewer, no rule is looked for. [set]"""
LEVEL = 0.05
"""Of a rule, by Bonferroni over the predictors that were tried."""


def predictors(
    of_set: Mapping[str, Any], teacher: Mapping[str, Any] | None, student: Mapping[str, Any] | None, longer: float
) -> dict[str, float]:
    """Those of PREDICTORS that are known of a set.

    Args:
        of_set: as of `lm.stages.predictors.described`.
        teacher: as of `lm.stages.predictors.teacher`.
        student: likewise of DPO's implicit reward, see `lm.stages.predictors.students`.
        longer: share of the training pairs with a longer completion in which it is preferred.
    """
    found: dict[str, float | None] = {
        "disagreement": of_set["disagreement"],
        "pairs_a_prompt": of_set["pairs"] / of_set["prompts"],
        "passes": of_set["passes"],
        "longer_preferred": longer,
    }
    if teacher is not None:
        found["length_coefficient"] = teacher["length_coefficient"]
        if student is not None:
            ours, theirs = (in_distribution(one["accuracy"], longer) for one in (teacher, student))
            found["teacher_less_student"] = None if ours is None or theirs is None else ours - theirs
    return {name: float(value) for name in PREDICTORS if (value := found.get(name)) is not None}


def in_distribution(accuracies: Mapping[str, Any], longer: float) -> float | None:
    """Accuracy on pairs with a longer completion, if it is preferred in this share of them, as in the training pairs;
    None where a class that is needed has no pairs."""
    of_class = [(longer, accuracies["longer"]["accuracy"]), (1 - longer, accuracies["shorter"]["accuracy"])]
    known = [share * accuracy for share, accuracy in of_class if share and accuracy is not None]
    return sum(known) if len(known) == sum(share > 0 for share, _ in of_class) else None


# ---------------------------------------------------------------- rules


@dataclass(frozen=True, kw_only=True)
class Line:
    """An effect by one predictor, and how well it predicts on worlds that were left out."""

    effect: str
    predictor: str
    intercept: float
    slope: float
    """A unit of `feature`."""
    least: float
    greatest: float
    """Of the predictor, in the study."""
    cells: int
    worlds: int
    skill: float
    """1 - (squared error on left-out worlds) / (that of the mean of the other worlds); at most 1."""
    error: float
    """Root of its mean squared error there."""
    p: float
    """Wilcoxon's, one-sided, over worlds: its squared error is not the lesser one; times the predictors tried."""

    @property
    def is_rule(self) -> bool:
        """Whether it predicts."""
        return self.skill > 0 and self.p < LEVEL

    def at(self, value: float) -> float:
        """The effect that it predicts."""
        return self.intercept + self.slope * feature(self.predictor, value)


def feature(predictor: str, value: float) -> float:
    """What a line is straight in."""
    return math.log(value) if predictor in IN_LOGS else value


def lines(sets: Sequence[StudiedSet], effect: str) -> list[Line]:
    """Of every predictor that can be tried, the best first; none where the study has too few worlds."""
    made = []
    for predictor in PREDICTORS:
        own = [one for one in sets if effect in one.effects and predictor in one.predictors]
        x = np.array([feature(predictor, one.predictors[predictor]) for one in own])
        worlds = np.array([one.seed for one in own])
        if len(set(worlds.tolist())) >= LEAST_WORLDS and np.ptp(x) > 1e-9:
            made.append((predictor, x, np.array([one.effects[effect] for one in own]), worlds))
    found = [_line(effect, *one, tried=len(made)) for one in made]
    return sorted(found, key=lambda line: -line.skill)


def _line(effect: str, predictor: str, x: Floats, y: Floats, worlds: npt.NDArray[Any], *, tried: int) -> Line:
    squares = np.zeros((2, len(y)))
    names = sorted(set(worlds.tolist()))
    for world in names:
        out = worlds == world
        intercept, slope = _fit(x[~out], y[~out])
        squares[0, out] = (intercept + slope * x[out] - y[out]) ** 2
        squares[1, out] = (y[~out].mean() - y[out]) ** 2
    gains = np.array([(squares[1] - squares[0])[worlds == world].mean() for world in names])
    chance = float(stats.wilcoxon(gains, alternative="greater").pvalue) if gains.any() else 1.0
    intercept, slope = _fit(x, y)
    ends = [math.exp(end) if predictor in IN_LOGS else float(end) for end in (x.min(), x.max())]
    base = float(squares[1].sum())
    return Line(
        effect=effect,
        predictor=predictor,
        intercept=intercept,
        slope=slope,
        least=ends[0],
        greatest=ends[1],
        cells=len(y),
        worlds=len(names),
        skill=1 - float(squares[0].sum()) / base if base else 0.0,
        error=float(np.sqrt(squares[0].mean())),
        p=min(1.0, chance * tried),
    )


def _fit(x: Floats, y: Floats) -> tuple[float, float]:
    """Intercept and slope by least squares; the mean, where there is nothing to tell by."""
    if np.ptp(x) < 1e-9:
        return float(y.mean()), 0.0
    found = stats.linregress(x, y)
    return float(found.intercept), float(found.slope)


# ---------------------------------------------------------------- advice


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What the study says of one effect on a set."""

    effect: str
    compares: str
    nearest: Regime | None
    """The cell of the regime map whose sets are nearest; None where it has none."""
    rule: Line | None
    """None where none is known, or where the set lacks its predictor."""
    predicted: float | None
    """By the rule."""
    interval: tuple[float, float] | None
    """Twice its error on worlds that were left out, either way."""
    outside: bool
    """Whether the set's predictor lies outside what the study had: then the rule is a guess."""
    tried: list[Line]
    """Every predictor that was tried, the best first."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """All that is reported of a set."""

    data: str
    model: str
    pairs: int
    prompts: int
    predictors: dict[str, float]
    teacher: dict[str, Any] | None
    student: dict[str, Any]
    study: str | None
    """The file; None where there was no study."""
    effects: list[Effect]


def advised(found: Mapping[str, float], sets: Sequence[StudiedSet], regimes: Sequence[Regime]) -> list[Effect]:
    """Of each of EFFECTS, by the predictors of a set and the worlds of a study."""
    made = []
    for effect, (_, _, compares) in EFFECTS.items():
        tried = lines(sets, effect)
        rule = next((line for line in tried if line.is_rule and line.predictor in found), None)
        value = None if rule is None else found[rule.predictor]
        predicted = None if rule is None or value is None else rule.at(value)
        wide = 0.0 if rule is None else 2 * rule.error
        made.append(
            Effect(
                effect=effect,
                compares=compares,
                nearest=nearest(found, sets, [one for one in regimes if one.effect == effect]),
                rule=rule,
                predicted=predicted,
                interval=None if predicted is None else (predicted - wide, predicted + wide),
                outside=rule is not None and value is not None and not rule.least <= value <= rule.greatest,
                tried=tried,
            )
        )
    return made


def nearest(found: Mapping[str, float], sets: Sequence[StudiedSet], regimes: Sequence[Regime]) -> Regime | None:
    """The regime whose sets' mean predictors are nearest to these: the root mean square of the differences, each in
    units of its spread over the study, of those predictors that both have."""
    spread = {
        name: float(np.std([feature(name, one.predictors[name]) for one in sets if name in one.predictors]))
        for name in found
        if any(name in one.predictors for one in sets)
    }
    best: tuple[float, Regime] | None = None
    for regime in regimes:
        own = [one for one in sets if (one.corner, one.rho) == (regime.corner, regime.rho)]
        apart = []
        for name, scale in spread.items():
            values = [feature(name, one.predictors[name]) for one in own if name in one.predictors]
            if values and scale > 1e-9:
                apart.append((float(np.mean(values)) - feature(name, found[name])) / scale)
        if apart and (best is None or float(np.mean(np.square(apart))) < best[0]):
            best = float(np.mean(np.square(apart))), regime
    return None if best is None else best[1]


# ---------------------------------------------------------------- shown


def show(advice: Advice, console: Console) -> None:
    """The report, for people."""
    view = Table(title=f"{advice.data}: {advice.pairs:,} training pairs of {advice.prompts:,} prompts; {advice.model}")
    for heading, side in (("predictor", "left"), ("value", "right")):
        view.add_column(heading, justify=side)  # type: ignore[arg-type]
    for name, words in PREDICTORS.items():
        known = advice.predictors.get(name)
        view.add_row(words, _ABSENT.get(name, "not known") if known is None else f"{known:.3g}")
    console.print(view, markup=False)
    for line in said(advice):
        console.print(f"- {line}", markup=False, highlight=False)


_ABSENT = {"disagreement": "no pair is labelled twice"}


def said(advice: Advice) -> list[str]:
    """What follows, in sentences."""
    told = [
        f"on held-out pairs {who} orders {one['accuracy']['all']['accuracy']:.1%} of "
        f"{one['accuracy']['all']['pairs']:,} as they are labelled"
        for who, one in (("a frozen reward head", advice.teacher), ("the implicit reward of DPO", advice.student))
        if one is not None
    ]
    if advice.study is None:
        return [*told, "no rule is known: there are no results of the study yet, which --study FILE names"]
    for one in advice.effects:
        if (near := one.nearest) is not None:
            ends = "" if near.low is None or near.high is None else f", {near.low:+.2f} to {near.high:+.2f}"
            told.append(
                f"{one.compares}: on the nearest worlds of the study ({near.corner}, rho {near.rho:g}) it "
                f"{WORDS[near.says]} ({near.estimate:+.2f}{ends}, {near.worlds} worlds of a small embedded language)"
            )
        if one.rule is None or one.predicted is None or one.interval is None:
            best = ""
            if one.tried:
                line = one.tried[0]
                best = f"; the best of {len(one.tried)} predictors, {PREDICTORS[line.predictor]}, has skill "
                best += f"{line.skill:+.2f} on worlds left out (p {line.p:.2g}, {line.worlds} worlds)"
            told.append(f"{one.compares}: no rule is known{best}")
            continue
        beyond = "; outside what the study had, so this is a guess" if one.outside else ""
        told.append(
            f"{one.compares}: {one.predicted:+.2f}, {one.interval[0]:+.2f} to {one.interval[1]:+.2f}, by the "
            f"{PREDICTORS[one.rule.predictor]} (skill {one.rule.skill:.2f} on worlds left out, p {one.rule.p:.2g}, "
            f"{one.rule.worlds} worlds){beyond}"
        )
    return told


WORDS = {"helps": "helps", "hurts": "hurts", "nothing": "does nothing that matters", "undecided": "is undecided"}
"""What a regime says, as a verb."""
