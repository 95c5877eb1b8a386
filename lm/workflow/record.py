"""The records of the grid's jobs: what is in them, and the one reader that there is.

The first records had no version; they are of the same form, and are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import record
from figures.record import Accuracies, Data, Labels, LengthBias, Measured, Tried
from lm.config import SFT
from lm.objectives import METHODS

VERSION = 1
Record = dict[str, Any]
"""JSON values of one of JOBS."""
ALPHAS = ("alpha_start", "alpha_end")
"""The weights of a `lm.objectives.Pessimism`."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Those of its options that the summary's intervals are made by."""

    confidence: float
    resamples: int


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of the run, as `lm.config.Config.as_dict` gives them; the others may be of an earlier version."""

    evaluation: Evaluation
    bias: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the job ran."""

    processor: str
    cores: int


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What the summary keeps of a job's."""

    commit: str | None
    date: str
    machine: Machine


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every record has."""

    seed: int
    config: Options
    provenance: Provenance
    stages: list[record.Spent] | None = None
    """What making each artifact took that the job asked for; None in records that do not have it."""


@dataclass(frozen=True, kw_only=True)
class Base(Job):
    """Of `lm.workflow.job.base`."""

    sft: Measured
    oracle: record.RewardModel | None
    labels: Labels
    data: Data
    best_of_n: list[record.BestOf] | None = None
    """Of pi_ref; None where `evaluation.best_of` asked for none, and in earlier records."""


@dataclass(frozen=True, kw_only=True)
class RewardModel(LengthBias):
    """A reward model and the pairs that it was trained on."""

    accuracy: record.RewardModel
    """On validation pairs."""
    test_accuracy: record.RewardModel | None = None
    """On test pairs; None in records that do not have it."""
    length_coefficient: float | None = None
    """Of its rewards of them, see `lm.data.lengths.slope_on_length`; likewise."""


@dataclass(frozen=True, kw_only=True)
class Set:
    """D_rho, as `lm.stages.predictors.described` has it."""

    pairs: int
    prompts: int
    passes: float
    disagreement: float | None


@dataclass(frozen=True, kw_only=True)
class Rewarded:
    """Rewards of validation pairs, by a reward model or implicit ones of a policy."""

    accuracy: Accuracies
    length_coefficient: float | None


@dataclass(frozen=True, kw_only=True)
class Student(Rewarded):
    """Of a policy's implicit rewards after its last step."""

    setting: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rewards(Job):
    """Of `lm.workflow.job.rewards`."""

    rho: float | None
    """None where no bias is drawn."""
    reward_models: dict[str, RewardModel]


@dataclass(frozen=True, kw_only=True)
class Scores(Rewards):
    """Of `lm.workflow.job.scores`."""

    set: Set | None = None
    """None in earlier records."""
    teacher: Rewarded | None = None
    """A frozen reward head, see `lm.stages.predictors.teacher`; likewise, and where there is none."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """By validation."""

    setting: dict[str, Any]
    step: int


@dataclass(frozen=True, kw_only=True)
class Tested(Measured):
    """The chosen policy on test prompts."""

    advantage: float
    ci: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What a cell added where it chose an end of its sweep, or still learnt."""

    settings: list[dict[str, Any]]
    longer: bool
    """Twice the steps."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """A policy on each test pair, in one order."""

    digest: str
    """Of the pairs' ids in this order."""
    prompt: list[int]
    """Which prompt a pair is of, numbered from 0 as they come: pairs of one are not independent."""
    chosen_logratio: list[float]
    """log pi - log pi_ref, nats."""
    rejected_logratio: list[float]
    accuracy: list[float]
    """1 where it is ordered as labelled; a tie is a half, and of a soft label the probability."""

    def __post_init__(self) -> None:
        count = {of: len(getattr(self, of)) for of in ("prompt", "chosen_logratio", "rejected_logratio", "accuracy")}
        if len(set(count.values())) > 1 or not self.prompt:
            found = ", ".join(f"{many} pairs.{of}" for of, many in count.items())
            raise ValueError(f"has {found}, where as many of each are needed, at least one")


@dataclass(frozen=True, kw_only=True)
class Cell(Job):
    """Of `lm.workflow.job.one_cell`, or of `settled`."""

    rho: float | None
    method: str
    chosen: Chosen
    test: Tested
    validation: list[Tried]
    probe: list[record.Probe]
    rewards: dict[str, list[float]]
    """The oracle's of each test prompt, of the method's policy and of pi_ref."""
    pairs: Pairs | None = None
    """None in earlier records."""
    students: list[Student] | None = None
    """Of a DPO's settings; None of other methods, and in earlier records."""
    settled: Settled | None = None
    """None where that was not asked for."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"has method {self.method!r}, where one of {', '.join(METHODS)} is needed")
        absent = [f"rewards.{name}" for name in (self.method, SFT) if name not in self.rewards]
        if option := METHODS[self.method]().pessimism_option:
            term = self.chosen.setting.get(option)
            weights = term if isinstance(term, Mapping) else {}
            absent += [f"chosen.setting.{option}.{name}" for name in ALPHAS if name not in weights]
        if absent:
            raise ValueError(record.lacks(absent))
        own, base = (len(self.rewards[name]) for name in (self.method, SFT))
        if own != base or not own:
            raise ValueError(
                f"has {own} rewards.{self.method} and {base} rewards.{SFT}, where as many are needed, at least one"
            )


@dataclass(frozen=True, kw_only=True)
class Alpha(Cell):
    """Of `lm.workflow.job.constant_alpha`."""

    alpha: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if METHODS[self.method]().pessimism_option is None:
            raise ValueError(f"has method {self.method!r}, where one with a KL term is needed")


JOBS: dict[str, type[Job]] = {"base": Base, "rewards": Rewards, "scores": Scores, "cell": Cell, "alpha": Alpha}


def rho_name(rho: float | None) -> str:
    """A rho in the names of files, and as the key of what is told by rho."""
    return "null" if rho is None else f"{rho:g}"


def read(path: Path) -> Record:
    """A job's record, whole: its values as JSON has them.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, is no job's, is of another version, or lacks something, or has it of the wrong type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; run the workflow to its end")
    cure = "name records that `python -m lm.workflow.job` wrote; a broken one is deleted, and made anew by the workflow"
    values = record.values_of(path, cure)
    job = values.get("job") if isinstance(values, dict) else None
    if not isinstance(job, str) or job not in JOBS:
        found = "has no job" if job is None else f"has job {job!r}"
        raise ValueError(f"{path} {found}, where one of {', '.join(JOBS)} is needed: it is no record of a job; {cure}")
    if (version := values.get("version", VERSION)) != VERSION:
        raise ValueError(f"{path} is of version {version!r}, and version {VERSION} is read here; {cure}")
    record.whole(JOBS[job], values, path, cure)
    kept: Record = values
    return kept
