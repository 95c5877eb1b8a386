"""How far the labels of a set agree with each other: soft labels, ties, counts of votes, and pairs labelled twice."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.intp]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Labels that are not those of plain pairs, and how often two labels of one pair differ."""

    soft: int
    """Comparisons whose label is a probability between 1/2 and 1."""
    ties: int
    """Comparisons whose label is 1/2: neither side is preferred."""
    labelled_twice: int
    """Different pairs with two labels or more: rows of several annotators, whichever way round, or votes."""
    disagreement: float | None
    """How likely two labels of such a pair differ, drawn from its own; mean over those pairs. None without any."""
    flip_rate: float | None
    """e of which 2 e (1 - e) is the disagreement: the share of flipped labels if each is flipped by itself with this
    chance, whatever the pair. At most 1/2."""


def agreement(which: Ints, first: Floats, labels: Floats, probabilities: Floats) -> Agreement:
    """Counts of a set.

    Args:
        which: the pair of each of N comparisons, whichever way round, 0 to M - 1.
        first: labels of each comparison that prefer the one side of its pair, the same in all of its comparisons, [N].
        labels: labels of each comparison, [N]; a probability that nobody counted is no label here, 0.
        probabilities: that the chosen side is preferred, [N].
    """
    for_one, all_labels = np.bincount(which, first), np.bincount(which, labels)
    twice = all_labels >= 2
    share = None
    if twice.any():
        one, every = for_one[twice], all_labels[twice]
        share = float(np.mean(2 * one * (every - one) / (every * (every - 1))))
    return Agreement(
        soft=int(((probabilities > 0.5) & (probabilities < 1)).sum()),
        ties=int((probabilities == 0.5).sum()),
        labelled_twice=int(twice.sum()),
        disagreement=share,
        flip_rate=None if share is None else (1 - sqrt(max(1 - 2 * share, 0))) / 2,
    )
