"""Says, before anything is trained, what DPO will do on a preference set, and what is odd about the set."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy.stats import binomtest

from lm.base import progress
from lm.config import ControlTokens, DataConfig
from lm.data import rewards, votes
from lm.data.columns import DIGEST, digest, numbered
from lm.data.control_tokens import Names, unmarked
from lm.data.prompts import AUTO, Layout
from lm.data.rewards import Source
from lm.data.rows import BATCH, Row, Tally, places, read_rows, shown
from lm.data.schemas import Drop, any_pair, hh_pair, preference_pair, tldr_pair
from lm.data.sets import Survey, comparisons, survey
from lm.data.templates import Renderer, chat_renderer, plain_chat
from lm.studies.agreement import Agreement, agreement
from theory import budget
from theory.preferences import PreferenceGraph
from theory.resistance import effective_resistance, infinite_probability

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = npt.NDArray[np.intp]
Floats = npt.NDArray[np.float64]
Digests = npt.NDArray[np.bytes_]

TEXTS = ("prompt", "chosen", "rejected")

RATIOS = (1.0, 1.1, 1.25, 1.5, 2.0)
"""How many times the other's length makes a completion the longer one; for 1, longer at all."""
QUANTILES = (0.1, 0.5, 0.9)

MOST_LABELS = 5
"""Labels a pair from which on the counts are told together."""
MODEL_PAIRS = 500
"""Pairs on which a model is measured, by default."""

SOURCES = (*rewards.OF_ONE, *rewards.OF_MEMBERS, rewards.ORACLE)
"""Columns that give reward margins: those of `lm.data.rewards`, and what a run's judge gave."""


# ---------------------------------------------------------------- what is reported


@dataclass(frozen=True, kw_only=True)
class LengthBias:
    """Of the comparisons with a longer side, how many prefer it; a soft label the likelier side, and a tie neither."""

    ratio: float
    comparisons: int
    longer_preferred: float | None
    """Share; None without comparisons."""
    interval: tuple[float, float] | None
    """95% Wilson interval of the share."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Lengths in tokens, end-of-text included, and what limits would leave out."""

    tokenizer: str
    longest_prompt: int
    longest_completion: int
    max_prompt_length: int
    max_completion_length: int
    too_long: int
    """Comparisons with a prompt or completion over its limit; `python -m lm.prepare` drops them."""
    left_out: dict[str, int]
    """Of them, by the reasons that it gives."""
    first: dict[str, list[str]]
    """Reason -> where the first such rows stand."""
    tokens_cut: int
    """Tokens beyond the limits in them, which a trainer that truncates would cut."""


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """One source of reward margins against the labels. Shares are of the comparisons that have the reward, and whose
    label prefers a side."""

    columns: str
    whose: str
    """Of "the one reward", "the oracle" (a run's judge) and "member" (of an ensemble)."""
    member: int | None
    """Which one of the ensemble, from 0; None for what is no member's."""
    missing: int
    """Comparisons without one: null, or no such column in the row."""
    agree: float | None
    ties: float | None
    disagree: float | None
    margin_quantiles: tuple[float, ...] | None
    """Of the absolute margin, at QUANTILES."""

    @property
    def name(self) -> str:
        """What it is called in the report."""
        return self.whose if self.member is None else f"{self.whose} {self.member}"


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """How far several reward models differ, on the comparisons that all of them score."""

    columns: str
    members: int
    comparisons: int
    sign_disagreement: float | None
    """Share on which some member prefers the one completion and some the other."""
    spread: float | None
    """Mean over comparisons of the standard deviation between the members' margins, in reward units."""


@dataclass(frozen=True, kw_only=True)
class LabelCount:
    """The comparisons of pairs that have this many labels, whichever way round; votes count, as many as they are, and
    soft labels that nobody counted do not."""

    labels: int
    or_more: bool
    share: float
    """Of the comparisons."""
    no_finite_dpo_optimum: float
    """Share of them, in this set."""
    all_agree_at_least: float
    """How likely the labels of such a pair all agree, so that on a pair of its own DPO has no finite optimum: the least
    that this can be, at even odds. Mean over the comparisons."""


@dataclass(frozen=True, kw_only=True)
class RewardError:
    """A reward model's error of margins, against that of the labels."""

    bias: float
    """Log-odds."""
    variance: float
    """Log-odds squared."""
    better: float
    """Share of the comparisons on which bias^2 + variance is below the least error of the labels: there it teaches the
    margin better, whatever the labels' odds are."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """How well the labels determine margins (`theory.resistance`); labels of a pair add up, also opposite ones."""

    resistance_quantiles: tuple[float, ...]
    """Effective resistance of the comparisons at QUANTILES, log-odds squared: the error (asymptotic variance) of a
    margin under tabular DPO, or a Bradley-Terry fit. At even odds of each label, which is the least that it can be."""
    by_count: list[LabelCount]
    reward_error: RewardError | None
    """None where none was given."""


@dataclass(frozen=True, kw_only=True)
class FirstToFall:
    """What a first step of DPO on a pair alone does at a model (`theory.first_to_fall`), as far as its head goes."""

    model: str
    pairs: int
    """Drawn from the comparisons whose label prefers a side, and within the limits."""
    too_long: int
    """Drawn, and over a limit."""
    winner_falls: float
    """Share."""
    interval: tuple[float, float]
    """95% Wilson interval of it."""
    loser_rises: float
    """Share."""
    tied: bool
    """Whether the head is tied to the input embeddings."""
    capped: bool
    """Whether logits are squashed after the head, so that nothing is exact."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a KL weight alpha allows (`theory.budget`): an optimum's KL(pi || pi_ref) + KL(pi_ref || pi) is at most
    constant / alpha nats."""

    method: str
    columns: str | None
    """The rewards that it distils; None where it has none."""
    constant: float


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What follows, and the statements of the ledger (theory/README.md) that say so."""

    text: str
    statements: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that `python -m lm.diagnose` finds. Counts are of rows or comparisons, shares are of comparisons."""

    data: str
    kind: str
    pairs: int
    """Rows that were read."""
    comparisons: int
    """Those with a prompt and two different completions; all that follows is about them."""
    prompts: int
    responses: int
    """Different completions, prompt by prompt."""
    empty: int
    """Rows with an empty prompt or completion."""
    identical: int
    """Rows whose completions are the same."""
    left_out: dict[str, int]
    """Every row that is no comparison, by reason."""
    first: dict[str, list[str]]
    """Reason -> where the first such rows stand."""
    notes: list[str]
    """What is said of how the set was read."""
    duplicates: int
    """Comparisons that repeat an earlier one, in the same direction."""
    no_finite_dpo_optimum: float
    """Share whose two completions are not in one strongly connected component of their prompt's preference graph. A
    soft label, or a tie, is an edge each way."""
    isolated: float
    """Share whose completions are in no other comparison, nor in this one the other way round, and whose label is not
    soft."""
    contradicted: int
    """Comparisons that are also there the other way round."""
    on_longer_cycles: int
    """Comparisons on a cycle of three or more completions, none of them contradicted or of a soft label."""
    unconnected_prompts: int
    """Prompts whose completions fall into groups that are never compared."""
    labels: Labels
    agreement: Agreement
    first_to_fall: FirstToFall | None
    """None where no model is named."""
    budgets: list[Budget]
    length_unit: str
    longer_preferred: float | None
    """Share that prefers the longer completion, of those with unequal lengths."""
    length_bias: list[LengthBias]
    tokens: Tokens | None
    """None where no tokenizer is named."""
    rewards: list[Rewards]
    ensembles: list[Ensemble]
    advice: list[Advice]


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Comparisons:
    """The usable rows of a set, N, and how many were not. Texts are not held, they are read again where they are
    needed: those of a million rows take gigabytes."""

    kind: str
    rows: int
    again: Callable[[], Iterator[tuple[str, Row]]]
    """Reads the set once more: where each comparison stands, and its prompt, chosen and rejected."""
    prompts: Digests
    """[N], as of `lm.data.columns.digest`."""
    completions: Digests
    """[2, N], chosen and rejected, equal where the texts and their prompts are."""
    characters: Ints
    """[2, N], likewise."""
    margins: dict[Source, Floats]
    """Columns -> margins, [N] of one reward model or [N, K] of an ensemble, K > 1; NaN where there is none."""
    left_out: Tally
    probabilities: Floats
    """[N], that the chosen side is preferred, 1/2 for a tie; see `lm.data.votes`."""
    votes: Floats
    """[N], how many labels a row stands for: one, or its counts of votes; 0 for a soft label that nobody counted."""
    notes: list[str]
    """What is said of how the set was read, and of its labels."""


def read(
    path: str,
    *,
    kind: str = "auto",
    subset: str | None = None,
    render: Renderer = plain_chat,
    prompt: str = AUTO,
    names: Names | None = None,
) -> Comparisons:
    """Reads a hub dataset, a file or a folder, as every command does.

    Args:
        path: as of `lm.data.rows.read_rows`.
        kind: "tldr", "hh" and "preferences" as in `lm.config.DataConfig`; "auto" goes by the columns of each row.
        subset: as of `lm.data.rows.read_rows`.
        render: how messages become text.
        prompt: as of `lm.config.DataConfig`.
        names: of control tokens, which texts are then marked for; of the tokenizer that reads them, if there is one.

    Raises:
        ValueError: unknown columns, a malformed row, or no row that is a comparison.
        FileNotFoundError: no such data.
    """
    of_set = survey(votes.Reader()(read_rows(path, subset)), path, prompt, kind)
    convert = CONVERTERS[kind]
    values = {source: _Margins() for source in _reward_sources(of_set)}
    left_out, labels = Tally(), votes.Reader()
    digests, lengths = [bytearray() for _ in TEXTS], [array("q") for _ in TEXTS]
    probabilities, weights = array("d"), array("d")

    def as_text(row: Row, where: str, render: Renderer = render) -> Row | Drop:
        return convert(row, where, render, of_set.layout)

    reading = as_text if names is None else names.reading(as_text, render)
    for _, where, row, pair in comparisons(labels(read_rows(path, subset)), reading, left_out):
        prompt_digest = digest(pair["prompt"])
        for name, own, sizes in zip(TEXTS, digests, lengths, strict=True):
            own += prompt_digest if name == "prompt" else digest(f"{prompt_digest.decode()}\0{pair[name]}")
            sizes.append(len(pair[name]))
        label = votes.label_of(row, where)
        probabilities.append(label[votes.PROBABILITY])
        weights.append(label[votes.WEIGHT])
        for source, column in values.items():
            column.add(_margin(row, source, where))
    if names is not None:
        names.settle(path)
    left_out.take(labels.left_out)
    rows = len(probabilities) + left_out.total()
    if not probabilities:
        raise ValueError(f"{path}: none of {rows} rows is a comparison, left out were {dict(left_out)}")

    def again() -> Iterator[tuple[str, Row]]:
        count = 0
        for _, where, _, pair in comparisons(votes.Reader()(read_rows(path, subset)), reading):
            if (count := count + 1) > len(probabilities):
                break
            yield where, pair
        if count != len(probabilities):
            raise ValueError(
                f"{path} changed while it was read: of {len(probabilities):,} comparisons there are {count:,}"
            )

    prompts, *completions = (np.frombuffer(own, DIGEST) for own in digests)
    margins = {source: column.stacked(source, path) for source, column in values.items()}
    likely = np.array(probabilities)
    return Comparisons(
        of_set.kind if kind == "auto" else kind,
        rows,
        again,
        prompts,
        np.stack(completions),
        np.array(lengths[1:], dtype=np.intp),
        _different(margins),
        left_out,
        likely,
        np.array(weights) if labels.counts["voted"] else (likely == 1).astype(np.float64),
        [*of_set.notes, *labels.says(), *(names.notes() if names is not None else [])],
    )


def renderer_of(model: str | None, tokenizer: str | None) -> Renderer:
    """How messages become text: as for training where a model or a tokenizer is named, else plainly."""
    if model is not None:
        from lm.studies.first_moves import check

        check(model)
    if (named := tokenizer or model) is None:
        return plain_chat
    from lm.models.loading import SCRATCH, load_tokenizer

    return chat_renderer(None if named in SCRATCH else load_tokenizer(named, (), trust_remote_code=False), named)


def names_of(model: str | None, tokenizer: str | None, how: ControlTokens = "auto") -> Names | None:
    """The control tokens of the tokenizer that counts, as `lm.stages.data` knows them; None where none is named."""
    if (named := tokenizer or model) is None:
        return None
    from lm.models.loading import END, PAD, SCRATCH, load_tokenizer

    if named in SCRATCH:
        return Names((END, PAD), how, end=END)
    return Names.by(load_tokenizer(named, (), trust_remote_code=False), how)


CONVERTERS: dict[str, Callable[[Row, str, Renderer, Layout], Row | Drop]] = {
    "auto": any_pair,
    "preferences": preference_pair,
    "hh": lambda row, where, *_: hh_pair(row, where),
    "tldr": lambda row, where, *_: tldr_pair(row, where, DataConfig.prompt_template),
}


def _reward_sources(of_set: Survey) -> list[Source]:
    """Those of SOURCES that the columns allow for, whichever rows have them."""
    sources = []
    for source in SOURCES:
        there, missing = ([name for name in source if (name in of_set.columns) == there] for there in (True, False))
        if there and missing:
            raise ValueError(f"{of_set.columns[there[0]]}: column {there[0]!r} needs {missing[0]!r} beside it")
        if there:
            sources.append(source)
    return sources


def _margin(row: Row, source: Source, where: str) -> Any:
    """A number, a list of them for an ensemble, or None where the row lacks it."""
    listed = source in rewards.OF_MEMBERS
    terms = [_reward(row.get(name), where, name, listed) for name in source]
    if any(term is None for term in terms):
        return None
    if len(terms) == 1:
        return terms[0]
    chosen, rejected = terms
    if listed and len(chosen) != len(rejected):
        raise ValueError(
            f"{where}: {source[0]} and {source[1]} must be of one length, got {shown(chosen)} and {shown(rejected)}"
        )
    margin = [c - r for c, r in zip(chosen, rejected, strict=True)] if listed else chosen - rejected
    if not all(map(math.isfinite, margin if listed else [margin])):
        raise ValueError(f"{where}: {rewards.named(source)} must be finite, got {shown(margin)}")
    return margin


def _reward(value: Any, where: str, name: str, listed: bool) -> Any:
    if value is None or (type(value) is float and not listed and math.isfinite(value)):
        return value
    values = value if listed and isinstance(value, list) else [value]
    if (
        isinstance(value, list) != listed
        or not values
        or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values)
    ):
        what = "a list of numbers, one a member" if listed else "a number"
        raise ValueError(f"{where}: {name!r} must be {what}, got {shown(value)}")
    try:
        numbers = [float(v) for v in values]
    except OverflowError:
        raise ValueError(f"{where}: {name!r} must be a number that a float can hold, got {shown(value)}") from None
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{where}: {name!r} must be finite, or null where there is none, got {shown(value)}")
    return numbers if listed else numbers[0]


@dataclass
class _Margins:
    """Those of one source, a row after the other, each as of `_margin`."""

    values: array[float] = field(default_factory=lambda: array("d"))
    counts: array[int] = field(default_factory=lambda: array("q"))
    """How many each row has."""

    def add(self, margin: Any) -> None:
        """Of the next row."""
        own = [] if margin is None else margin if isinstance(margin, list) else [margin]
        self.values.extend(own)
        self.counts.append(len(own))

    def stacked(self, source: Source, path: str) -> Floats:
        """As of `Comparisons.margins`."""
        counts = np.array(self.counts)
        sizes = np.unique(counts[counts > 0]).tolist()
        if len(sizes) > 1:
            raise ValueError(f"{path}: {rewards.named(source)} must have as many members in every row, got {sizes}")
        margins = np.full((len(counts), *(sizes or [1])), np.nan)
        margins[counts > 0] = np.array(self.values).reshape(-1, margins.shape[1])
        return margins[:, 0] if margins.shape[1] == 1 else margins


def _whose(source: Source, margins: Floats) -> str:
    """As of `Rewards.whose`; a list of one entry is the one reward."""
    if margins.ndim == 2:
        return "member"
    return "the oracle" if source == rewards.ORACLE else "the one reward"


def _different(margins: dict[Source, Floats]) -> dict[Source, Floats]:
    """Without the columns that say again what others before them say of the one reward, or of the members."""
    kept: dict[Source, Floats] = {}
    for source, values in margins.items():
        same = [
            m for other, m in kept.items() if _whose(other, m) == _whose(source, values) and m.shape == values.shape
        ]
        with np.errstate(over="ignore"):  # large margins differ by more than a float holds
            if not any(np.allclose(values, m, rtol=1e-6, atol=1e-6, equal_nan=True) for m in same):
                kept[source] = values
    return kept


# ---------------------------------------------------------------- measuring


def measure(
    data: Comparisons,
    name: str,
    *,
    tokenizer: str | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    reward_error: tuple[float, float] | None = None,
    model: str | None = None,
    model_pairs: int = MODEL_PAIRS,
) -> Report:
    """The report on a set that has been read.

    Args:
        data: the set.
        name: what the report calls it.
        tokenizer: lengths are in its tokens, in characters where none is named; the model's own where there is one.
        max_prompt_length: tokens; None for the limit that a run takes from the data, see `lm.data.limits`.
        max_completion_length: tokens, end-of-text included; likewise.
        reward_error: bias and variance of a reward model's margins, log-odds and log-odds squared.
        model: causal LM, hub name or folder, that is to be pi_ref; it is loaded.
        model_pairs: on how many pairs at most it is measured.
    """
    tokenizer = tokenizer or model
    prompt, first = numbered(data.prompts)
    prompts, both = len(first), np.concatenate([prompt, prompt])
    response, first = numbered(data.completions.reshape(-1))
    responses, (chosen, rejected) = len(first), response.reshape(2, -1)
    # One graph for all prompts: a completion belongs to one, so no path leads from prompt to prompt.
    one_sided, count = data.probabilities == 1, len(chosen)
    edges = np.stack([chosen, rejected], axis=1)
    graph = PreferenceGraph(responses, np.concatenate([edges, edges[~one_sided, ::-1]]))
    crossing = graph.crossing[:count]

    code, opposite = chosen * responses + rejected, rejected * responses + chosen
    contradicted = np.isin(code, opposite)
    one_way = PreferenceGraph(responses, edges[~contradicted & one_sided])
    distinct, which = np.unique(np.minimum(code, opposite), return_inverse=True)
    times = np.bincount(which, np.maximum(data.votes, 1))
    compared = np.bincount(np.concatenate(np.divmod(distinct, responses)), minlength=responses)
    isolated = (compared[chosen] == 1) & (compared[rejected] == 1) & ~contradicted & one_sided
    for_first = data.votes * np.where(code < opposite, data.probabilities, 1 - data.probabilities)
    prompt_of = np.empty(responses, dtype=np.intp)
    prompt_of[response] = both
    first_of_group = np.unique(graph.components, return_index=True)[1]

    lengths, tokens, unit = data.characters, None, "characters"
    if tokenizer is not None:
        lengths, tokens = _tokens(data, tokenizer, max_prompt_length, max_completion_length)
        unit = "tokens"
    decided = data.probabilities != 0.5
    bias = [_length_bias(ratio, *(side[decided] for side in lengths)) for ratio in RATIOS]
    report = Report(
        data=name,
        kind=data.kind,
        pairs=data.rows,
        comparisons=count,
        prompts=prompts,
        responses=responses,
        empty=data.left_out["empty prompt"] + data.left_out["empty completion"],
        identical=data.left_out["identical completions"],
        left_out=dict(data.left_out),
        first=data.left_out.first,
        notes=data.notes,
        duplicates=count - len(np.unique(code)),
        no_finite_dpo_optimum=float(crossing.mean()),
        isolated=float(isolated.mean()),
        contradicted=int(contradicted.sum()),
        on_longer_cycles=int((~one_way.crossing).sum()),
        unconnected_prompts=int((np.bincount(prompt_of[first_of_group]) > 1).sum()),
        labels=_labels(
            PreferenceGraph(responses, np.stack(np.divmod(distinct, responses), axis=1), times),
            which,
            crossing,
            data.votes > 0,
            reward_error,
        ),
        agreement=agreement(which, for_first, data.votes, data.probabilities),
        first_to_fall=None if model is None else _first_to_fall(data, model, tokens, model_pairs),
        budgets=_budgets(data.margins),
        length_unit=unit,
        longer_preferred=bias[0].longer_preferred,
        length_bias=bias,
        tokens=tokens,
        rewards=[
            _rewards(margins, decided, source, k)
            for source, every in data.margins.items()
            for k, margins in (enumerate(every.T) if every.ndim == 2 else [(None, every)])
        ],
        ensembles=[_ensemble(every, source) for source, every in data.margins.items() if every.ndim == 2],
        advice=[],
    )
    report.advice.extend(advise(report))
    return report


def _labels(
    pairs: PreferenceGraph, which: Ints, crossing: Any, counted: Any, reward_error: tuple[float, float] | None
) -> Labels:
    """Of pairs weighted by their labels; `which` of them is each comparison's, [N], as are `crossing`, and `counted`:
    whether it is known how many labels it stands for (one is taken where not)."""
    resistances = effective_resistance(pairs)[which]
    counts = pairs.weights[which]
    agree = infinite_probability(0.5, counts)
    groups = []
    for labels in range(1, MOST_LABELS + 1):
        rows = counted & (counts >= labels if labels == MOST_LABELS else counts == labels)
        if rows.any():
            groups.append(
                LabelCount(
                    labels=labels,
                    or_more=labels == MOST_LABELS,
                    share=float(rows.mean()),
                    no_finite_dpo_optimum=float(crossing[rows].mean()),
                    all_agree_at_least=float(agree[rows].mean()),
                )
            )
    error = None
    if reward_error is not None:
        bias, variance = reward_error
        better = float((bias**2 + variance < resistances).mean())
        error = RewardError(bias=bias, variance=variance, better=better)
    quantiles = tuple(np.quantile(resistances, QUANTILES).tolist())
    return Labels(resistance_quantiles=quantiles, by_count=groups, reward_error=error)


def _first_to_fall(data: Comparisons, model: str, tokens: Tokens | None, most: int) -> FirstToFall:
    assert tokens is not None, "a model has a tokenizer"
    from lm.models.loading import load_tokenizer
    from lm.studies import first_moves

    decided = np.flatnonzero(data.probabilities != 0.5)
    drawn = set(decided[first_moves.drawn(len(decided), most)].tolist())
    found = first_moves.measure(
        model,
        load_tokenizer(tokens.tokenizer, (), trust_remote_code=False),
        [tuple(pair[name] for name in TEXTS) for i, (_, pair) in enumerate(data.again()) if i in drawn],
        max_prompt_length=tokens.max_prompt_length,
        max_completion_length=tokens.max_completion_length,
    )
    falls = found.moves.winner_falls
    bounds = binomtest(int(falls.sum()), len(falls)).proportion_ci(method="wilson")
    return FirstToFall(
        model=model,
        pairs=len(falls),
        too_long=found.too_long,
        winner_falls=float(falls.mean()),
        interval=(float(bounds.low), float(bounds.high)),
        loser_rises=float(found.moves.loser_rises.mean()),
        tied=found.tied,
        capped=found.capped,
    )


def _budgets(margins: dict[Source, Floats]) -> list[Budget]:
    """p-DPO's, and of the rewards that a set brings those of their distillation; the oracle's are not for training."""
    found = [Budget(method="p-dpo", columns=None, constant=budget.DPO)]
    for source, every in margins.items():
        if source == rewards.ORACLE:
            continue
        known = every[np.isfinite(every).reshape(len(every), -1).all(axis=1)]
        if not 1e-150 < abs(known).max(initial=0) < 1e150:  # none, or no floats when squared
            continue
        constant = max(map(budget.distillation_constant, known.reshape(len(known), -1).T))
        method = "dp-dpo" if every.ndim == 1 else "e-dpo and hull-dpo"
        found.append(Budget(method=method, columns=rewards.named(source), constant=constant))
    return found


def _length_bias(ratio: float, chosen: Ints, rejected: Ints) -> LengthBias:
    exact = Fraction(str(ratio))  # 1.1 times 50 tokens is 55, but above it in binary
    times, over = exact.numerator, exact.denominator
    longer = (chosen * over >= rejected * times) & (chosen > rejected)
    shorter = (rejected * over >= chosen * times) & (rejected > chosen)
    preferred, total = int(longer.sum()), int(longer.sum() + shorter.sum())
    share, interval = None, None
    if total:
        bounds = binomtest(preferred, total).proportion_ci(method="wilson")
        share, interval = preferred / total, (float(bounds.low), float(bounds.high))
    return LengthBias(ratio=ratio, comparisons=total, longer_preferred=share, interval=interval)


def _tokens(data: Comparisons, name: str, max_prompt: int | None, max_completion: int | None) -> tuple[Ints, Tokens]:
    """Lengths of chosen and rejected as they are tokenised for training, [2, N], and the report."""
    from lm.data.limits import least
    from lm.data.tokens import EARLY, completion_ids, ends_early, prompt_ids, too_long
    from lm.models.loading import load_tokenizer  # torch comes with it

    texts = (unmarked(pair[column]) for column in TEXTS for _, pair in data.again())
    tokenizer = load_tokenizer(name, texts, trust_remote_code=False)

    def measured(texts: list[str], ids: Callable[[PreTrainedTokenizerBase, list[str]], list[list[int]]]) -> Ints:
        """Tokens of each, and whether end-of-text is among them before the end, [2, N]."""
        different = list(dict.fromkeys(texts))
        found = {
            text: (len(each), ends_early(each, tokenizer))
            for text, each in zip(different, ids(tokenizer, different), strict=True)
        }
        return np.array([found[text] for text in texts], dtype=np.intp).T

    count = len(data.prompts)
    lengths, early = np.empty((3, count), dtype=np.intp), np.empty((3, count), dtype=bool)
    rows, at = (pair for _, pair in data.again()), 0
    with progress.bar("tokenising", total=count) as bar:
        while batch := list(islice(rows, BATCH)):
            here = slice(at, at := at + len(batch))
            for column, own, ends in zip(TEXTS, lengths, early, strict=True):
                how = prompt_ids if column == "prompt" else completion_ids
                own[here], ends[here] = measured([pair[column] for pair in batch], how)
            bar.update(len(batch))
    prompts, sides = lengths[0], lengths[1:]
    longer, ended = sides.max(axis=0), early[1] | early[2]
    max_prompt = max_prompt or least(prompts)
    max_completion = max_completion or least(longer)
    over = np.maximum(lengths - np.array([[max_prompt], [max_completion], [max_completion]]), 0)
    limits = DataConfig(max_prompt_length=max_prompt, max_completion_length=max_completion)
    reasons: dict[int, str] = {}
    for row in np.flatnonzero(ended | (over.max(axis=0) > 0)).tolist():
        reason = EARLY if ended[row] else too_long(int(prompts[row]), int(longer[row]), limits)
        assert reason is not None
        reasons[row] = reason
    left_out = _placed(data, reasons)
    return sides, Tokens(
        tokenizer=name,
        longest_prompt=int(prompts.max()),
        longest_completion=int(longer.max()),
        max_prompt_length=max_prompt,
        max_completion_length=max_completion,
        too_long=left_out.total(),
        left_out=dict(left_out),
        first=left_out.first,
        tokens_cut=int(over.sum()),
    )


def _placed(data: Comparisons, reasons: Mapping[int, str]) -> Tally:
    """Comparisons, by their number, and why they are left out, counted."""
    told, first = Counter[str](), dict.fromkeys(reasons, "")
    for row, reason in reasons.items():
        told[reason] += 1
        if told[reason] > Tally.FIRST:
            del first[row]
    for row, (where, _) in zip(range(max(first, default=-1) + 1), data.again(), strict=False):
        if row in first:
            first[row] = where
    left_out = Tally()
    for row, reason in reasons.items():
        left_out.add(reason, first.get(row, ""))
    return left_out


def _rewards(margins: Floats, decided: Any, source: Source, member: int | None) -> Rewards:
    there = np.isfinite(margins)
    known = margins[there & decided]
    shares = [float(np.mean(part)) for part in (known > 0, known == 0, known < 0)] if len(known) else [None] * 3
    return Rewards(
        columns=rewards.named(source),
        whose="member" if member is not None else _whose(source, margins),
        member=member,
        missing=int((~there).sum()),
        agree=shares[0],
        ties=shares[1],
        disagree=shares[2],
        margin_quantiles=tuple(np.quantile(abs(known), QUANTILES).tolist()) if len(known) else None,
    )


def _ensemble(margins: Floats, source: Source) -> Ensemble:
    known = margins[np.isfinite(margins).all(axis=1)]
    differ = (known > 0).any(axis=1) & (known < 0).any(axis=1)
    exponent = np.frexp(abs(known).max(initial=0))[1]  # squares of large margins are beyond a float
    return Ensemble(
        columns=rewards.named(source),
        members=margins.shape[1],
        comparisons=len(known),
        sign_disagreement=float(differ.mean()) if len(known) else None,
        spread=float(np.ldexp(np.ldexp(known, -exponent).std(axis=1).mean(), exponent)) if len(known) else None,
    )


# ---------------------------------------------------------------- advising


def advise(report: Report) -> list[Advice]:
    """What the numbers mean for training, most important first."""
    advice: list[Advice] = []

    def add(text: str, *statements: str) -> None:
        advice.append(Advice(text=text, statements=statements))

    if report.no_finite_dpo_optimum:
        add(
            f"On {report.no_finite_dpo_optimum:.1%} of the comparisons no preferences lead back from the rejected "
            "to the chosen completion: DPO's loss falls for as long as their margins grow, whatever beta. Only the "
            "end of training stops it.",
            "prop1-scc",
            "drdo-lemma1c",
        )
        if report.isolated:
            add(
                f"{report.isolated:.1%} are pairs of their own. There the limit only asks that the rejected completion "
                "loses all its probability; the chosen one may lose it too, to completions that nobody compared.",
                "prop1",
                "cor1",
            )
        add(
            "Distillation of rewards (d-DPO, e-DPO) has finite margins, reward margin over beta; without rewards, "
            "p-DPO's KL term keeps them finite.",
            "thm1",
            "prop6",
            "prop5",
        )
    else:
        add("Every comparison lies on a preference cycle: DPO's margins have a finite optimum.", "prop1-scc")
    labels = report.agreement
    differ = ""
    if labels.disagreement is not None and labels.flip_rate:
        differ = (
            f"Two labels of one pair differ in {labels.disagreement:.1%} of the draws, on {labels.labelled_twice:,} "
            f"pairs with two labels or more: as if {labels.flip_rate:.1%} of all labels were flipped"
            + (", the --cdpo.label_smoothing of pairs with one label." if labels.flip_rate < 0.5 else ", as by a coin.")
        )
    if report.contradicted:
        add(
            f"{report.contradicted:,} comparisons are there both ways round. DPO's margin follows the log-odds of the "
            f"labels: few labels, coarse odds. {differ}".rstrip(),
            "drdo-prop",
        )
    if labels.soft or labels.ties:
        add(
            f"{labels.soft / report.comparisons:.1%} of the comparisons have soft labels and "
            f"{labels.ties / report.comparisons:.1%} are ties: each is trained on in both directions. DPO's margin on "
            "such a pair of its own is the log-odds of its label over beta, 0 for a tie. Methods that distil rewards "
            f"do not read labels. {'' if report.contradicted else differ}".rstrip(),
            "drdo-prop",
        )
    if report.on_longer_cycles:
        add(
            f"{report.on_longer_cycles:,} comparisons are on cycles of three or more completions, which no reward "
            "orders; what is fitted depends on which pairs were sampled.",
            "drdo-sampling",
        )
    if report.unconnected_prompts:
        add(
            f"In {report.unconnected_prompts:,} prompts the completions fall into groups that are never compared: even "
            "with rewards, distillation leaves the split of probability between the groups open.",
            "thm1-connected",
        )
    typical = report.labels.resistance_quantiles[QUANTILES.index(0.5)]
    error = report.labels.reward_error
    add(
        f"The labels leave a reward margin a variance of at least {typical:.3g} (median; log-odds squared). "
        + (
            "A reward model whose squared bias and variance of margins are together below that teaches the margin "
            "better than DPO's labels do; with its calibration on held-out labels, --reward-error tells the share."
            if error is None
            else f"A reward model with margins of bias {error.bias:g} and variance {error.variance:g} is the better "
            f"teacher on {error.better:.1%} of the comparisons, or more where labels are more certain than even odds."
        ),
        "labels-or-reward",
    )
    first = report.first_to_fall
    if first is not None:
        add(
            f"A first step of DPO on its own pair lowers the winner in {first.winner_falls:.1%} of {first.pairs:,} "
            f"pairs ({first.interval[0]:.1%} to {first.interval[1]:.1%}) and raises the loser in "
            f"{first.loser_rises:.1%}. "
            + (
                "The model caps its logits, so this is a diagnostic of the head's gradient only. "
                if first.capped
                else "Exact if the output head alone is trained, by one small step of plain gradient descent; a "
                "diagnostic of the head's gradient where more is trained"
                + (" (this head is tied to the input embeddings). " if first.tied else ". ")
            )
            + "Neither beta nor a forward-KL term changes which falls first.",
            "first-to-fall",
        )
    add(
        "To keep KL(pi || pi_ref) + KL(pi_ref || pi) of the optimum below B nats take alpha of at least "
        + ", ".join(
            f"{one.constant:.3g} / B ({one.method}{'' if one.columns is None else f' with {one.columns}'})"
            for one in report.budgets
        )
        + ". A large network is not bound by it: start there and watch its KL.",
        "alpha-budget",
    )
    bias = report.length_bias[0]
    if (
        bias.interval is not None
        and bias.longer_preferred is not None
        and not bias.interval[0] <= 0.5 <= bias.interval[1]
    ):
        add(
            f"The longer completion is preferred in {bias.longer_preferred:.1%} of the pairs of unequal length. A "
            "policy or a reward model can learn length from it; an ensemble of reward models with other length biases "
            "(`python -m lm.bias`) and e-DPO hedge against that.",
            "prop4",
            "thm2-hull",
        )
    for one in report.rewards:
        if one.member is None and one.disagree and one.margin_quantiles:
            add(
                f"Labels disagree with {one.name} ({one.columns}) on {one.disagree:.1%}: DPO follows the label there, "
                "d-DPO the reward. At beta = 1, d-DPO asks for a log-ratio margin of "
                f"{one.margin_quantiles[QUANTILES.index(0.5)]:.3g} nats at the median.",
                "thm1",
                "prop6",
            )
    for ensemble in report.ensembles:
        if ensemble.sign_disagreement:
            add(
                f"The {ensemble.members} members of {ensemble.columns} contradict each other on "
                f"{ensemble.sign_disagreement:.1%}. e-DPO distils the member nearest to the policy; hull-DPO the best "
                "mixture, which is what the max-min guarantee needs.",
                "thm2",
                "thm2-hull",
            )
    if report.duplicates:
        add(
            f"{report.duplicates:,} comparisons repeat an earlier one. They weigh as often as they are there, but "
            "make no margin finite that is not.",
            "prop1-scc",
        )
    useless = [
        f"{count:,} row{'s' * (count > 1)} with {what}"
        for count, what in ((report.identical, "identical completions"), (report.empty, "an empty side"))
        if count
    ]
    if useless:
        add(f"Remove {' and '.join(useless)}.")
    if report.tokens and report.tokens.too_long:
        add(
            f"{report.tokens.too_long:,} comparisons exceed the limits. A trainer that cuts them compares other texts "
            "than were judged, or rewarded; raise the limits or drop them."
        )
    return advice


# ---------------------------------------------------------------- showing


def _left_out(counts: Mapping[str, int], first: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Rows of the table, with where the first of each reason stand: the file is in its title."""
    return [
        (
            f"  left out: {reason} ({places([where.rpartition('/')[2] for where in first[reason]], count)})",
            f"{count:,}",
        )
        for reason, count in counts.items()
    ]


def show(report: Report, console: Console) -> None:
    """The report as a table and a list of advice."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    table = Table(title=Text(f"{report.data} ({report.kind})"), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows: list[tuple[str, str] | None] = [
        ("pairs", f"{report.pairs:,}"),
        *_left_out(report.left_out, report.first),
        ("comparisons", f"{report.comparisons:,}"),
        ("prompts", f"{report.prompts:,}"),
        ("different completions", f"{report.responses:,}"),
        ("repeated comparisons", f"{report.duplicates:,}"),
        None,
        ("no finite DPO optimum", share(report.no_finite_dpo_optimum)),
        ("pairs of their own", share(report.isolated)),
        ("also the other way round", f"{report.contradicted:,}"),
        ("on longer cycles", f"{report.on_longer_cycles:,}"),
        ("prompts with groups never compared", f"{report.unconnected_prompts:,}"),
        None,
        (
            "variance of a margin by its labels, at least; 10%, 50%, 90%",
            ", ".join(f"{q:.3g}" for q in report.labels.resistance_quantiles),
        ),
    ]
    labels = report.agreement
    rows += [("soft labels", f"{labels.soft:,}"), ("ties", f"{labels.ties:,}")]
    rows += [("pairs with two labels or more", f"{labels.labelled_twice:,}")]
    if labels.disagreement is not None:
        rows += [
            ("  two labels of one differ", share(labels.disagreement)),
            ("  as if so many labels were flipped", share(labels.flip_rate)),
        ]
    for group in report.labels.by_count:
        name = f"{group.labels}{' or more' * group.or_more} label{'s' * (group.labels > 1)}"
        rows += [
            (f"  pairs with {name}", share(group.share)),
            ("    no finite DPO optimum", share(group.no_finite_dpo_optimum)),
            ("    chance of it for a pair of its own, at least", share(group.all_agree_at_least)),
        ]
    if report.labels.reward_error:
        error = report.labels.reward_error
        rows.append((f"reward of bias {error.bias:g}, variance {error.variance:g} is better", share(error.better)))
    if report.first_to_fall:
        first = report.first_to_fall
        rows += [
            None,
            (f"first step of the head, of {first.pairs:,} pairs: winner falls", share(first.winner_falls)),
            ("  loser rises", share(first.loser_rises)),
            ("  pairs over a limit, left out", f"{first.too_long:,}"),
        ]
    rows.append(None)
    for bias in report.length_bias:
        how = "" if bias.ratio == 1 else f" by {bias.ratio:g}x"
        rows.append(
            (f"longer{how} preferred ({report.length_unit}, of {bias.comparisons:,})", share(bias.longer_preferred))
        )
    if report.tokens:
        tokens = report.tokens
        rows += [
            None,
            (f"longest prompt, limit {tokens.max_prompt_length:,} tokens", f"{tokens.longest_prompt:,}"),
            (f"longest completion, limit {tokens.max_completion_length:,} tokens", f"{tokens.longest_completion:,}"),
            ("comparisons over a limit", f"{tokens.too_long:,}"),
            *_left_out(tokens.left_out, tokens.first),
        ]
    for i, one in enumerate(report.rewards):
        if i == 0 or one.columns != report.rewards[i - 1].columns:
            rows += [None, (one.columns, "")]
        rows += [
            (f"  {one.name}: agrees with the label", share(one.agree)),
            ("    ties", share(one.ties)),
            ("    comparisons without", f"{one.missing:,}"),
        ]
        if one.margin_quantiles:
            rows.append(("    |margin|, 10%, 50%, 90%", ", ".join(f"{q:.3g}" for q in one.margin_quantiles)))
    for ensemble in report.ensembles:
        rows += [
            None,
            (ensemble.columns, ""),
            (f"  the {ensemble.members} members contradict each other", share(ensemble.sign_disagreement)),
            ("  spread between members", "-" if ensemble.spread is None else f"{ensemble.spread:.3g}"),
        ]
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    console.print(table)
    for note in report.notes:
        console.print(f"- {note}", markup=False, highlight=False)
    for advice in report.advice:
        cited = f" [{', '.join(advice.statements)}]" if advice.statements else ""
        console.print(f"- {advice.text}{cited}", markup=False, highlight=False)
    console.print(
        "Statements in brackets are in theory/README.md. They are about one free log-prob a completion; a network "
        "shares them and stops early: read where DPO pushes, not where it ends.",
        style="dim",
    )
