"""What the studies save that frontier and real_text are drawn from: the schemas of both files, and their readers.

Names are those of runs (`figures.record`, `lm.training.policy`), so that a study collects and renames nothing; names
that are not here are passed over. Both files have the same skeleton:

    {"version": 1, "confidence": 0.95, "looks": {method: Look}, "provenance": {...},
     "presets": {preset: {"seeds": {seed: {"methods": {method: ...}}}}}}

A preset is what a panel is drawn of: a data set with its options, or a cell of a grid. All seeds of one have the same
methods.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures.record import Look, Probe, values_of, whole

VERSION = 1
CURE = "write it anew with the study that makes it"


@dataclass(frozen=True, kw_only=True)
class Study:
    """What both have."""

    version: int
    confidence: float
    """Level of the intervals over seeds, between 0 and 1."""
    looks: dict[str, Look]
    """By method, as `lm.objectives.looks` gives them."""
    provenance: dict[str, Any]
    """As other results have it: `lm.base.store.provenance`."""

    def check(self, presets: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
        """ValueError where there is nothing to draw, seeds of a preset differ in methods, or one has no look.

        Args:
            presets: the methods of each seed of each.
        """
        if self.version != VERSION:
            raise ValueError(f"is of version {self.version}, and version {VERSION} is read here")
        if not 0 < self.confidence < 1:
            raise ValueError(f"has confidence {self.confidence:g}, where a number between 0 and 1 is needed")
        if not presets:
            raise ValueError("has no presets")
        for preset, seeds in presets.items():
            methods = [list(seed) for seed in seeds]
            if not methods or not methods[0]:
                raise ValueError(f"has no methods in presets.{preset}")
            if any(set(other) != set(methods[0]) for other in methods):
                every = "; ".join(", ".join(names) for names in methods)
                raise ValueError(f"has seeds of presets.{preset} with different methods: {every}")
            without = [name for name in methods[0] if name not in self.looks]
            if without:
                raise ValueError(f"lacks looks.{without[0]}")


# ---------------------------------------------------------------- the frontier


@dataclass(frozen=True, kw_only=True)
class Point:
    """A policy: a setting of a method after so many steps, on the prompts of the study."""

    setting: dict[str, Any]
    """The method's hyper-parameters."""
    step: int
    advantage: float
    """Mean score by the judge less that of pi_ref on the same prompts."""
    kl: float
    """KL(pi || pi_ref), nats, by the policy's samples."""


@dataclass(frozen=True, kw_only=True)
class BestOf:
    """The best of n samples of pi_ref by the judge."""

    n: int
    advantage: float


@dataclass(frozen=True, kw_only=True)
class FrontierSeed:
    """A seed of a preset."""

    methods: dict[str, list[Point]]
    """All settings and snapshots."""
    best_of: list[BestOf]
    """n = 1, 2, 4, ..., ascending; the same for every seed."""


@dataclass(frozen=True, kw_only=True)
class FrontierPreset:
    """A panel."""

    seeds: dict[str, FrontierSeed]


@dataclass(frozen=True, kw_only=True)
class Frontier(Study):
    """The part of study.json that the frontier is drawn of."""

    judge: str
    """What scores, in words: "oracle", "exact judge", a model's name."""
    n: int
    """Prompts of each seed."""
    presets: dict[str, FrontierPreset]

    def __post_init__(self) -> None:
        self.check({name: [seed.methods for seed in preset.seeds.values()] for name, preset in self.presets.items()})
        for name, preset in self.presets.items():
            of_n = [[best.n for best in seed.best_of] for seed in preset.seeds.values()]
            if any(other != of_n[0] for other in of_n) or of_n[0] != sorted({n for n in of_n[0] if n >= 1}):
                raise ValueError(
                    f"has best_of in presets.{name} with n {of_n}, where the same, ascending from 1, is needed"
                )
            empty = [method for seed in preset.seeds.values() for method, points in seed.methods.items() if not points]
            if empty:
                raise ValueError(f"has no points of {empty[0]} in presets.{name}")


def kl_of_best_of(n: int) -> float:
    """KL of the best of n samples from the distribution that they are drawn from, nats: log n - (n - 1) / n, which is
    met where no two samples score alike, and an upper bound where some may (Beirami et al. 2024, arXiv
    2401.01879)."""
    return math.log(n) - (n - 1) / n


# ---------------------------------------------------------------- real_text.json


@dataclass(frozen=True, kw_only=True)
class Training:
    """Of the setting that was chosen."""

    setting: dict[str, Any]
    probe: list[Probe]
    """`lm.stages.evaluations.probe_history`: held-out pairs, and training pairs (`probe.train_pairs`)."""


@dataclass(frozen=True, kw_only=True)
class RealTextSeed:
    """A seed of a preset."""

    methods: dict[str, Training]


@dataclass(frozen=True, kw_only=True)
class RealTextPreset:
    """A row of panels."""

    seeds: dict[str, RealTextSeed]


@dataclass(frozen=True, kw_only=True)
class RealText(Study):
    """real_text.json."""

    presets: dict[str, RealTextPreset]

    def __post_init__(self) -> None:
        self.check({name: [seed.methods for seed in preset.seeds.values()] for name, preset in self.presets.items()})
        for name, preset in self.presets.items():
            for seed, found in preset.seeds.items():
                for method, one in found.methods.items():
                    if any(probe.train_chosen_logratio is None for probe in one.probe):
                        where = f"presets.{name}.seeds.{seed}.methods.{method}.probe"
                        raise ValueError(f"lacks {where}.train_chosen_logratio, of probe.train_pairs > 0")


# ---------------------------------------------------------------- readers


def read_frontier(path: Path) -> Frontier:
    """The frontier of study.json; ValueError, which names the file and what is wrong, where it is not as above."""
    return whole(Frontier, values_of(path, CURE), path, CURE)


def read_real_text(path: Path) -> RealText:
    """real_text.json; ValueError, which names the file and what is wrong, where it is not as above."""
    return whole(RealText, values_of(path, CURE), path, CURE)


# ---------------------------------------------------------------- study.json

EFFECTS: dict[str, tuple[str, str, str]] = {
    "distillation": ("d-dpo", "dpo", "d-DPO less DPO"),
    "pessimism": ("p-dpo", "dpo", "p-DPO less DPO"),
    "ensemble": ("e-dpo", "member-dpo", "e-DPO less its balanced member"),
}
"""What the regime map is of: a method, what it is compared with, both in words."""
SAYS = ("helps", "nothing", "undecided", "hurts")
"""What a regime says."""


@dataclass(frozen=True, kw_only=True)
class Regime:
    """An effect in a cell of the map: corner and rho."""

    corner: str
    rho: float
    effect: str
    """Of EFFECTS."""
    estimate: float
    """Difference in advantage, a mean over worlds."""
    low: float | None
    """Student's interval over worlds; None of one world."""
    high: float | None
    worlds: int
    says: str
    """Of SAYS."""


@dataclass(frozen=True, kw_only=True)
class StudiedSet:
    """A world at a corner and rho: what is known of its set without a judge, and what the judge says of the effects."""

    corner: str
    seed: int
    """The world: corners that share it have the same posts, pi_ref and labels."""
    rho: float
    predictors: dict[str, float]
    """`lm.studies.advice.predictors`; without those that are not known."""
    effects: dict[str, float]
    """Difference in advantage, by EFFECTS; without those of which a method was not run."""


@dataclass(frozen=True, kw_only=True)
class StudyResults(Frontier):
    """study.json: the frontier, a preset a corner and rho, the regime map, and what rules are learnt from."""

    margin: float
    """The least difference in advantage that matters."""
    regimes: list[Regime]
    sets: list[StudiedSet]

    def __post_init__(self) -> None:
        super().__post_init__()
        for at, one in enumerate(self.regimes):
            if one.effect not in EFFECTS or one.says not in SAYS:
                raise ValueError(
                    f"has regimes[{at}] {one.effect}: {one.says}, where one of {', '.join(EFFECTS)} and one of "
                    f"{', '.join(SAYS)} are needed"
                )


def read_study(path: Path) -> StudyResults:
    """study.json; ValueError, which names the file and what is wrong, where it is not as above."""
    cure = "write it anew with `python -m lm.workflow.regimes runs/study --out FILE`"
    return whole(StudyResults, values_of(path, cure), path, cure)
