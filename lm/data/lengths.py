"""Length classes of pairs, and subsets exact in the share that prefers the longer completion."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from lm.base import progress
from lm.config import BiasConfig
from lm.data import votes
from lm.data.columns import Floats, Ints
from lm.data.control_tokens import Names
from lm.data.prompts import AUTO
from lm.data.rows import Row, Tally, check_suffix, read_rows, write_rows
from lm.data.schemas import Drop, any_pair
from lm.data.sets import comparisons, survey
from lm.data.templates import Renderer, chat_renderer, plain_chat
from lm.data.tokens import completion_ids

LengthClass = Literal["longer", "shorter", "neither"]
Classes = npt.NDArray[np.str_]
"""[N], of LengthClass."""


def length_class(chosen_length: int, rejected_length: int, ratio: float, probability: float = 1.0) -> LengthClass:
    """Which completion is preferred: the longer (at least `ratio` times the other's tokens), the shorter, neither.

    A soft label counts for the likelier side, which `lm.data.votes` calls chosen, whole; a tie, of probability 1/2,
    prefers neither.
    """
    pair = np.array([chosen_length]), np.array([rejected_length])
    found: LengthClass = length_classes(*pair, ratio, np.array([probability])).tolist()[0]
    return found


def length_classes(chosen: Ints, rejected: Ints, ratio: float, probabilities: Floats) -> Classes:
    """`length_class` of each pair, [N]."""
    exact = _decimal(ratio)
    times, over = exact.numerator, exact.denominator
    if max(times, over) * int(max(chosen.max(initial=0), rejected.max(initial=0))) >= 2**63:  # a ratio of many digits
        chosen, rejected = chosen.astype(object), rejected.astype(object)
    longer, shorter = chosen * over >= rejected * times, rejected * over >= chosen * times
    return np.select([probabilities == 0.5, longer, shorter], ["neither", "longer", "shorter"], "neither")


def slope_on_length(margins: npt.NDArray[np.floating[Any]], longer: Ints) -> float | None:
    """Slope of reward margins on differences in length, by least squares through the origin and in units of their root
    mean squares: how far a reward goes with length, from -1 to 1. Which side is called chosen does not matter: it turns
    both.

    Args:
        margins: reward of the chosen completion less that of the rejected, [N].
        longer: tokens of the chosen completion less those of the rejected, [N].

    Returns None where all of either are 0.
    """
    scale = float(np.sqrt(np.mean(margins**2) * np.mean(longer.astype(np.float64) ** 2))) if len(margins) else 0.0
    return float(np.mean(margins * longer)) / scale if scale else None


def counts(share: float, size: int) -> tuple[int, int]:
    """(longer preferred, shorter preferred) of a subset of this size: the share to the nearest pair, halves up."""
    longer = math.floor(_decimal(share) * size + Fraction(1, 2))
    return longer, size - longer


@cache
def _decimal(value: float) -> Fraction:
    """The number as it was written: 1.1 times 50 tokens is 55, but above it in binary."""
    return Fraction(str(value))


def largest_feasible(classes: Classes | Sequence[LengthClass], share: float) -> int:
    """The most pairs that a subset with this share can have."""
    longer, shorter = (int((np.asarray(classes) == side).sum()) for side in ("longer", "shorter"))

    def too_many(size: int) -> bool:
        need_longer, need_shorter = counts(share, size)
        return need_longer > longer or need_shorter > shorter

    # Neither count falls as the size grows, so the sizes that fit come first.
    return bisect_left(range(1, longer + shorter + 1), True, key=too_many)


def biased_subset(
    classes: Classes | Sequence[LengthClass], share: float, size: int | None, *, seed: int, what: str
) -> list[int]:
    """Indices of a subset in which the longer completion is preferred in this share of the pairs, in increasing order.

    Args:
        classes: length class of each pair; pairs with no longer side are left out.
        share: share with the longer preferred.
        size: pairs; None for the largest feasible.
        seed: of the draw.
        what: the option behind it, for the error message.

    Raises:
        ValueError: the size is infeasible; the message names the largest feasible.
    """
    most = largest_feasible(classes, share)
    if size is None:
        size = most
    every = np.asarray(classes, dtype="<U7")
    if size > most or size == 0:
        rest = int((every == "neither").sum())
        neither = f" ({rest} prefer neither: ties, or of one length by bias.length_ratio)" if rest else ""
        raise ValueError(
            f"{what}: {size} pairs of which {share:.0%} prefer the longer completion are not to be had from "
            f"{(every == 'longer').sum()} pairs that prefer the longer and {(every == 'shorter').sum()} that prefer "
            f"the shorter{neither}; the largest feasible size is {most}"
        )
    rng = np.random.default_rng(seed)
    chosen = [
        rng.choice(np.flatnonzero(every == name), count, replace=False)
        for name, count in zip(("longer", "shorter"), counts(share, size), strict=True)
        if count
    ]
    rows: list[int] = np.sort(np.concatenate(chosen)).tolist()
    return rows


def length_report(
    classes: Classes | Sequence[LengthClass],
    chosen_lengths: Ints | Sequence[int],
    rejected_lengths: Ints | Sequence[int],
    rows: Ints | Sequence[int],
) -> dict[str, Any]:
    """Length statistics of these rows of a set: pairs by length class, mean lengths (None without rows)."""
    rows = np.asarray(rows, dtype=np.int64)
    own = np.asarray(classes, dtype="<U7")[rows]

    def mean(lengths: Ints | Sequence[int]) -> float | None:
        return int(np.asarray(lengths)[rows].sum()) / len(rows) if len(rows) else None

    return {
        "pairs": len(rows),
        "longer_preferred": int((own == "longer").sum()),
        "shorter_preferred": int((own == "shorter").sum()),
        "mean_chosen_length": mean(chosen_lengths),
        "mean_rejected_length": mean(rejected_lengths),
    }


# ---------------------------------------------------------------- any preference set


@dataclass
class Lengths:
    """Lengths of a set's pairs, and which rows they are."""

    rows: array[int] = field(default_factory=partial(array, "q"))
    chosen: array[int] = field(default_factory=partial(array, "q"))
    rejected: array[int] = field(default_factory=partial(array, "q"))
    left_out: Tally = field(default_factory=Tally)
    """Rows that are no comparison, by reason."""
    probabilities: array[float] = field(default_factory=lambda: array("d"))
    """That the chosen side is preferred, 1/2 for a tie."""
    notes: list[str] = field(default_factory=list)
    """What is said of how the set was read, and of its labels."""

    def classes(self, ratio: float) -> Classes:
        """Length class of each pair."""
        chosen, rejected, probabilities = map(np.asarray, (self.chosen, self.rejected, self.probabilities))
        return length_classes(chosen, rejected, ratio, probabilities)


def read_lengths(path: str, tokenizer: PreTrainedTokenizerBase | None = None, prompt: str = AUTO) -> Lengths:
    """Lengths of every pair of a set in any schema: tokens as for training, end-of-text included, or else characters.

    Raises ValueError or FileNotFoundError as `lm.data.rows.read_rows`, `lm.data.sets.survey` and
    `lm.data.schemas.any_pair` do.
    """
    of_set, labels = survey(votes.Reader()(read_rows(path)), path, prompt), votes.Reader()
    lengths = Lengths()
    has_template = tokenizer is not None and tokenizer.chat_template is not None
    render = chat_renderer(tokenizer, "--tokenizer") if has_template else plain_chat
    names = None if tokenizer is None else Names.by(tokenizer, "text")

    def convert(row: Row, where: str, render: Renderer = render) -> Row | Drop:
        return any_pair(row, where, render, of_set.layout)

    read = convert if names is None else names.reading(convert, render)
    for number, where, row, pair in comparisons(labels(read_rows(path)), read, lengths.left_out):
        sides: list[Any] = [pair["chosen"].strip(), pair["rejected"].strip()]
        if tokenizer is not None:
            sides = completion_ids(tokenizer, [pair["chosen"], pair["rejected"]])
        lengths.rows.append(number)
        lengths.chosen.append(len(sides[0]))
        lengths.rejected.append(len(sides[1]))
        lengths.probabilities.append(votes.label_of(row, where)[votes.PROBABILITY])
    lengths.left_out.take(labels.left_out)
    lengths.notes = [*of_set.notes, *labels.says(), *(names.notes() if names is not None else [])]
    return lengths


def bias_file(
    path: str,
    out: Path,
    config: BiasConfig,
    *,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompt: str = AUTO,
) -> dict[str, Any]:
    """Writes a length-biased subset of a set: its rows as they are, in their order; those with labels of
    `lm.data.votes` as its `Reader` gives them, ties left out.

    Args:
        path: a set in any schema, as `lm.data.rows.read_rows` takes it. It is read three times and never held.
        out: the file to write, .jsonl, .jsonl.gz or .parquet.
        config: rho, size and length_ratio; the rest is about ensembles and not read.
        seed: of the draw.
        tokenizer: to measure lengths in tokens; None for characters.
        prompt: as of `lm.config.DataConfig.prompt`.

    Returns:
        "before" and "after", as `length_report`; "left_out", rows that are no comparison, by reason; "unit". Where
        there are any: "first", where the first rows of each reason stand, and "notes" on how the set was read and on
        its labels.

    Raises:
        ValueError: a malformed row, an infeasible size (the message names the largest feasible), or an unfit `out`.
        FileNotFoundError: no such data.
    """
    check_suffix(out)
    if out.exists() and Path(path).exists() and out.samefile(path):
        raise ValueError(f"--out {out} is the data itself; name another file")
    assert config.rho is not None
    lengths = read_lengths(path, tokenizer, prompt)
    classes = lengths.classes(config.length_ratio)
    drawn = biased_subset(
        classes, config.rho, config.size, seed=seed, what="--rho" if config.size is None else "--size"
    )
    kept = np.zeros(max(lengths.rows) + 1, dtype=bool)
    kept[np.asarray(lengths.rows)[drawn]] = True
    rows = (row for kept_, (_, row) in zip(kept.tolist(), votes.Reader()(read_rows(path)), strict=False) if kept_)
    write_rows(out, progress.bar("writing", rows, total=len(drawn)))
    reports = [
        length_report(classes, lengths.chosen, lengths.rejected, rows) for rows in (np.arange(len(classes)), drawn)
    ]
    return {
        **dict(zip(("before", "after"), reports, strict=True)),
        "left_out": dict(lengths.left_out),
        "unit": "characters" if tokenizer is None else "tokens",
        **({"first": lengths.left_out.first} if lengths.left_out.first else {}),
        **({"notes": lengths.notes} if lengths.notes else {}),
    }
