"""results.json of a run as one typed record: what is in it, in which units, and the one reader that there is.

Who writes it makes a `Results`; who reads it calls `read`. A field is added here and nowhere else; where an older
reader would misread the new file, or a new one the older file, `VERSION` goes up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

VERSION = 1
SFT, MAIN = "sft", "rho"
"""The reference policy among opponents, and the reward model of all training pairs."""
T = TypeVar("T")

# ---------------------------------------------------------------- policies


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A policy on held-out prompts, one sample each, and on held-out pairs."""

    n: int
    """Prompts."""
    oracle_reward: float
    """Mean over the samples."""
    length: float
    """Mean tokens of a sample, end-of-text included."""
    finished: float
    """Share of the samples that reached end-of-text."""
    kl: float
    """KL(pi || pi_ref), nats, by the samples."""
    chosen_logratio: float
    """Mean log pi - log pi_ref of the pairs' winners, nats a completion."""
    rejected_logratio: float
    """Likewise of the losers."""
    accuracy: float
    """Share of pairs whose winner has the greater log-ratio."""
    accuracies: Accuracies | None = None
    """The same by which completion is preferred; None in records that do not have it."""
    utility: float | None = None
    """Mean true utility of the samples; None where the truth is not known."""
    reading: dict[str, int] | None = None
    """Of an oracle with another tokenizer: samples as texts, and of how many it reads less than they say."""


@dataclass(frozen=True, kw_only=True)
class PolicyResult(Measured):
    """Likewise, and where it is. SFT, which is pi_ref, is one."""

    policy: str
    """Folder of the model, as the run that wrote this had it."""
    samples: str
    """samples.jsonl, from the run's folder."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A setting and a step, on validation prompts."""

    setting: dict[str, Any]
    step: int
    advantage: float
    ci: tuple[float, float]
    kl: float | None = None
    """KL(pi || pi_ref) by the same samples, nats; None in records of versions that did not measure it."""
    finished: float | None = None
    """Share of the samples that reached end-of-text, likewise."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Held-out pairs at a step of training: means over them, log-probs and KL in nats a completion."""

    step: int
    chosen_logps: float
    rejected_logps: float
    chosen_logratio: float
    rejected_logratio: float
    accuracy: float
    forward_kl_reference: float
    """KL(pi_ref || pi), by samples of pi_ref."""
    forward_kl_preferences: float
    """The same of the pairs' own completions: no divergence."""
    member_shares: list[float] | None = None
    """[K], of the ensemble's members: share of the pairs whose reward margin each is nearest to; None for methods that
    distil none."""
    train_chosen_logps: float | None = None
    """Likewise of training pairs; None where none were looked at."""
    train_rejected_logps: float | None = None
    train_chosen_logratio: float | None = None
    train_rejected_logratio: float | None = None
    train_accuracy: float | None = None
    train_forward_kl_reference: float | None = None
    train_forward_kl_preferences: float | None = None


@dataclass(frozen=True, kw_only=True)
class MethodResult(PolicyResult):
    """The policy that validation chose for a method."""

    advantage: float
    """Mean oracle reward less that of pi_ref on the same prompts."""
    ci: tuple[float, float]
    """Its bootstrap interval over prompts."""
    utility_ci: tuple[float, float] | None = None
    """Bootstrap interval of mean utility less that of pi_ref; None where the truth is not known, or in earlier
    records."""
    setting: dict[str, Any]
    """The method's hyper-parameters."""
    step: int
    """Of training, after which it was taken."""
    pairs_seen: int | None = None
    """By then, repeats counted: steps by the mini-batch's size. None in earlier records."""
    validation: list[Tried]
    """What it was chosen from; empty where there was no choice."""
    probe: list[Probe]
    """By step; empty where none was asked for."""


# ---------------------------------------------------------------- what they are compared by, and made from


@dataclass(frozen=True, kw_only=True)
class Wald:
    """A two-sided Wald test of no difference in mean oracle reward, paired by prompt."""

    difference: float
    z: float | None
    """None without variance."""
    p: float | None


@dataclass(frozen=True, kw_only=True)
class Wins:
    """Shares of n prompts by oracle reward."""

    win: float
    tie: float
    loss: float
    n: int


@dataclass(frozen=True, kw_only=True)
class BestOf:
    """The best of n samples of pi_ref by the oracle, what a policy could be without any training."""

    n: int
    kl: float
    """Nats, at most: log n - (n - 1) / n."""
    advantage: float
    """Mean oracle reward of the best less that of all, on the same prompts."""
    ci: tuple[float, float]
    prompts: int
    """Held out, of the probe."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Of a reward model on held-out pairs."""

    accuracy: float | None
    """Share ordered as labelled; None of no pairs."""
    pairs: int


@dataclass(frozen=True, kw_only=True)
class Accuracies:
    """The same by which completion is preferred."""

    all: Accuracy
    longer: Accuracy
    shorter: Accuracy
    neither: Accuracy


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Of a reward model's probabilities on held-out pairs, as `lm.training.heads.calibration` has it."""

    loss: float
    """Mean Bradley-Terry loss, nats."""
    calibration_error: float
    """Expected: the mean distance between a probability and the share of pairs that are ordered right."""


@dataclass(frozen=True, kw_only=True)
class RewardModel(Accuracies):
    """A reward model on held-out pairs."""

    calibration: Calibration | None = None
    """None of earlier records."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Who judges and labels, see `lm.config.JudgeConfig`."""

    kind: str
    """"model", a reward model, or "exact", the known taste of the embedded world's annotators."""
    utility: float | None = None
    """What a unit of true utility is worth to the exact one."""
    length_preference: float | None = None
    """What one more word is worth to it."""
    sharpness: float | None = None
    """Of its noisy labels; None where they have no noise, or it gives none."""
    unfinished: float | None = None
    """Reward of an unfinished sample; None where it is judged as though it had ended there."""

    @property
    def says(self) -> str:
        """In a sentence."""
        who = "a reward model"
        if self.kind == "exact":
            who = f"exact: {self.utility:g} a unit of true utility, {self.length_preference:g} a word"
        noise = "" if self.sharpness is None else f"; its labels are drawn with sharpness {self.sharpness:g}"
        unfinished = "as though it had ended there" if self.unfinished is None else f"with {self.unfinished:g}"
        return f"The judge is {who}{noise}; an unfinished sample is judged {unfinished}."


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Of all pairs."""

    longer_preferred: float
    """Share of the pairs with a longer completion in which it is preferred."""
    agreement: float | None = None
    """Share of the given labels that the oracle agrees with; None where the given ones were kept."""
    ties_dropped: int | None = None
    against_judge: float | None = None
    """Of labels drawn by the oracle's rewards: the share that prefers the completion of less reward."""
    reading: dict[str, int] | None = None
    """Likewise of the pairs' texts."""


@dataclass(frozen=True, kw_only=True)
class LengthBias:
    """A set of training pairs."""

    pairs: int
    longer_preferred: int
    shorter_preferred: int
    mean_chosen_length: float | None
    """Tokens; None of no pairs."""
    mean_rejected_length: float | None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Counts of a set's rows."""

    kept: dict[str, int]
    """By split."""
    dropped: dict[str, int]
    """By reason."""
    without_confidence: int | None = None


@dataclass(frozen=True, kw_only=True)
class Data:
    """What was read."""

    preferences: Rows
    references: Rows
    vocabulary: int
    members: int | None = None
    """Of an ensemble whose rewards came with the data."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What making one of a run's artifacts took; None where it was not measured, as by earlier versions."""

    stage: str
    name: str
    artifact: str | None = None
    """Its key; None in earlier records."""
    finished: str | None = None
    """ISO 8601."""
    wall_seconds: float | None = None
    cpu_seconds: float | None = None
    """Of all threads and ranks."""
    peak_bytes: int | None = None
    """Of resident memory, of one rank."""
    cuda_peak_bytes: int | None = None
    """Of an accelerator's, likewise."""
    resumed: bool | None = None
    """Whether a process before the last worked on it too, whose share is not in these numbers."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a method is drawn: colour, dashes and marker each tell it apart."""

    title: str
    colour: str
    """A name of `figures.style.COLOURS`."""
    dashes: list[float]
    """Points drawn and left out, in turn; none: a solid line."""
    marker: str
    """As matplotlib has them."""
    hollow: bool
    """It learns from labels, not from rewards."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Of the process that wrote the record."""

    versions: dict[str, str]
    commit: str | None
    machine: dict[str, Any]
    ranks: int
    date: str
    """ISO 8601."""
    seed: int
    command: list[str]


# ---------------------------------------------------------------- the record


@dataclass(frozen=True, kw_only=True)
class Results:
    """A finished run."""

    version: int = VERSION
    methods: dict[str, MethodResult]
    """In the order in which they were asked for; every one has a look, its wins against SFT, and its tests."""
    sft: PolicyResult
    wald: dict[str, Wald]
    """Of "one - other", for every two methods in their order."""
    wins: dict[str, dict[str, Wins]]
    """By method and opponent."""
    best_of_n: list[BestOf] | None = None
    """By n; None where pi_ref has one sample a prompt, or none on held-out prompts, and in earlier records."""
    reward_models: dict[str, RewardModel]
    """By the names of the rewards that some method distils: "rho" of all training pairs, the ensemble's members, and a
    method's for an oracle of its own."""
    oracle: RewardModel | None
    """None of a given one, and of an exact one."""
    judge: Judge | None = None
    """None in earlier records."""
    labels: Labels
    bias: dict[str, LengthBias]
    """By set: "rho", all training pairs, and each member's subset of them."""
    selection: dict[str, Any] | None = None
    """What the annotators' confidence left out, where it was asked."""
    data: Data
    rho: float | None
    """Share of training pairs in which the longer completion is preferred, as imposed; None where none was."""
    confidence: float
    """Level of all intervals."""
    looks: dict[str, Look]
    """By method."""
    stages: list[Spent] | None = None
    """Of every artifact that the run stands on, in the order in which they were finished; None in earlier records."""
    provenance: Provenance

    def __post_init__(self) -> None:
        names = list(self.methods)
        absent = [f"looks.{name}" for name in names if name not in self.looks]
        absent += [f"wins.{name}.{SFT}" for name in names if SFT not in self.wins.get(name, {})]
        tests = (f"{one} - {other}" for one, other in combinations(names, 2))
        absent += [f"wald.{test}" for test in tests if test not in self.wald]
        if absent:
            raise ValueError(lacks(absent))

    def as_json(self) -> dict[str, Any]:
        """JSON values, which `of` makes the same record of; what may be absent is left out where there is none."""
        values: dict[str, Any] = _plain(self)
        return values

    @property
    def members(self) -> list[str]:
        """Names of the ensemble's members, in the order of every length-K list; none where no method distils any."""
        return [name for name in self.reward_models if name != MAIN and name not in self.methods]


def read(path: Path) -> Results:
    """The record of a run.

    Args:
        path: results.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, is of another version, or lacks something, or has it of the wrong type.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}; finish the run with `python -m lm.train` or `python -m lm.evaluate`"
        )
    cure = f"write it anew with `python -m lm.evaluate --config {path.parent / 'config.yaml'}`"
    values = values_of(path, cure)
    version = values.get("version") if isinstance(values, dict) else None
    if version != VERSION:
        found = "has no version" if version is None else f"is of version {version!r}"
        raise ValueError(f"{path} {found}, and version {VERSION} is read here; {cure}")
    return whole(Results, values, path, cure)


def values_of(path: Path, cure: str) -> Any:
    """What a JSON file has. ValueError, which names it and ends with the cure, where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {cure}") from None


def whole(kind: type[T], values: Any, path: Path, cure: str) -> T:
    """As `of`, of a file's values. ValueError, which names it and ends with the cure, where `of` raises one."""
    try:
        return of(kind, values)
    except ValueError as error:
        raise ValueError(f"{path} {error}: it is not whole; {cure}") from None


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number in it")


# ---------------------------------------------------------------- JSON -> dataclass


def of(kind: type[T], value: Any) -> T:
    """JSON values as what the annotations of a dataclass say; names that it does not have are passed over.

    Raises:
        ValueError: what it "lacks", or "has" of another type than is needed.
    """
    reader = _Reader()
    made = reader.read(kind, value, "")
    if reader.lacking:
        raise ValueError(lacks(reader.lacking))
    if reader.wrong:
        raise ValueError(f"has {reader.wrong[0]}")
    kept: T = made
    return kept


def lacks(names: list[str]) -> str:
    """What an error says of names that are not there."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"lacks {', '.join(names[:4])}{more}"


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        named = ((one, getattr(value, one.name)) for one in fields(value))
        return {one.name: _plain(inner) for one, inner in named if inner is not None or one.default is MISSING}
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


class _Reader:
    """Reads values as annotations say, and collects what is not there, and what is no such value."""

    def __init__(self) -> None:
        self.lacking: list[str] = []
        self.wrong: list[str] = []

    def read(self, kind: Any, value: Any, where: str) -> Any:
        """The value; None where there is something to collect."""
        if kind is Any:
            return value
        origin, inside = get_origin(kind), get_args(kind)
        if origin is UnionType:  # X | None
            return None if value is None else self.read(inside[0], value, where)
        if is_dataclass(kind) and isinstance(value, Mapping):
            return self._record(kind, value, where)
        if origin is dict and isinstance(value, Mapping):
            return {name: self.read(inside[1], item, _within(where, name)) for name, item in value.items()}
        if origin is list and isinstance(value, list | tuple):
            return [self.read(inside[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
        if origin is tuple and isinstance(value, list | tuple) and len(value) == len(inside):
            return tuple(self.read(each, item, where) for each, item in zip(inside, value, strict=True))
        if kind is float and type(value) in (int, float):
            return float(value)
        if kind in (int, str, bool) and type(value) is kind:
            return value
        self.wrong.append(f"{where or 'it'} {json.dumps(value)[:40]}, where {_named(kind)} is needed")
        return None

    def _record(self, kind: Any, values: Mapping[str, Any], where: str) -> Any:
        hints = _annotations(kind)
        absent = [one.name for one in fields(kind) if one.default is MISSING and one.name not in values]
        self.lacking += [_within(where, name) for name in absent]
        found = {
            one.name: self.read(hints[one.name], values[one.name], _within(where, one.name))
            for one in fields(kind)
            if one.name in values
        }
        return None if self.lacking or self.wrong else kind(**found)


@cache
def _annotations(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _within(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _named(kind: Any) -> str:
    """A type, in words."""
    origin = get_origin(kind)
    if origin is tuple:
        return f"a list of {len(get_args(kind))}"
    words = {list: "a list", float: "a number", int: "a whole number", str: "text", bool: "true or false"}
    return words.get(origin or kind, "an object")
