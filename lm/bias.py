"""Length-biased subsets of a preference set, exact in the share of pairs whose longer completion is preferred."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

LengthClass = Literal["longer", "shorter", "neither"]


def length_class(chosen_length: int, rejected_length: int, ratio: float) -> LengthClass:
    """Which completion is preferred: the longer (at least `ratio` times the other's tokens), the shorter, neither."""
    if chosen_length >= ratio * rejected_length:
        return "longer"
    return "shorter" if rejected_length >= ratio * chosen_length else "neither"


def counts(share: float, size: int) -> tuple[int, int]:
    """(longer preferred, shorter preferred) of a subset of this size: the share to the nearest pair, halves up."""
    longer = int(np.floor(share * size + 0.5))
    return longer, size - longer


def largest_feasible(classes: Sequence[LengthClass], share: float) -> int:
    """The most pairs that a subset with this share can have."""
    longer, shorter = classes.count("longer"), classes.count("shorter")
    bound = min(longer / share if share > 0 else np.inf, shorter / (1 - share) if share < 1 else np.inf)
    # Rounding to whole pairs can give a little more or less than the quotient.
    for size in range(int(bound) + 2, 0, -1):
        need_longer, need_shorter = counts(share, size)
        if need_longer <= longer and need_shorter <= shorter:
            return size
    return 0


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
