"""Length-biased subsets of a preference set, exact in the share of pairs whose longer completion is preferred."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Literal

import numpy as np

LengthClass = Literal["longer", "shorter", "neither"]


def length_class(chosen_length: int, rejected_length: int, ratio: float) -> LengthClass:
    """Which completion is preferred: the longer (at least `ratio` times the other's tokens), the shorter, neither."""
    exact = _decimal(ratio)
    if chosen_length >= exact * rejected_length:
        return "longer"
    return "shorter" if rejected_length >= exact * chosen_length else "neither"


def counts(share: float, size: int) -> tuple[int, int]:
    """(longer preferred, shorter preferred) of a subset of this size: the share to the nearest pair, halves up."""
    longer = math.floor(_decimal(share) * size + Fraction(1, 2))
    return longer, size - longer


@cache
def _decimal(value: float) -> Fraction:
    """The number as it was written: 1.1 times 50 tokens is 55, but above it in binary."""
    return Fraction(str(value))


def largest_feasible(classes: Sequence[LengthClass], share: float) -> int:
    """The most pairs that a subset with this share can have."""
    longer, shorter = classes.count("longer"), classes.count("shorter")

    def too_many(size: int) -> bool:
        need_longer, need_shorter = counts(share, size)
        return need_longer > longer or need_shorter > shorter

    # Neither count falls as the size grows, so the sizes that fit come first.
    return bisect_left(range(1, longer + shorter + 1), True, key=too_many)


def biased_subset(classes: Sequence[LengthClass], share: float, size: int | None, *, seed: int, what: str) -> list[int]:
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
    if size > most or size == 0:
        raise ValueError(
            f"{what}: {size} pairs of which {share:.0%} prefer the longer completion are not to be had from "
            f"{classes.count('longer')} pairs that prefer the longer and {classes.count('shorter')} that prefer the "
            f"shorter; the largest feasible size is {most}"
        )
    rng = np.random.default_rng(seed)
    chosen = [
        rng.choice([i for i, c in enumerate(classes) if c == name], count, replace=False)
        for name, count in zip(("longer", "shorter"), counts(share, size), strict=True)
        if count
    ]
    return sorted(int(i) for i in np.concatenate(chosen))


if __name__ == "__main__":
    import sys

    from lm.cli import run

    sys.exit(run("lm.bias", lambda pipeline: pipeline.bias))
