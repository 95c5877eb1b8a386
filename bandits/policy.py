"""Reference policies over arms, checked once."""

from __future__ import annotations

from typing import Any

import numpy as np

from bandits.objectives import Floats
from theory.preferences import PreferenceGraph

_NORMALISATION = 1e-9


def uniform(n: int) -> Floats:
    """The indifferent policy over n arms, [n]."""
    return np.full(n, 1 / n)


def reference(ref: Any, graph: PreferenceGraph) -> Floats:
    """pi_ref as float64 [n], a distribution with support on every arm that a pair mentions.

    Raises:
        ValueError: wrong length, a negative or non-finite entry, a sum other than 1 (to 1e-9), or a zero where a
            log-ratio is needed; the message names the arm.
    """
    array = np.array(ref, dtype=np.float64)
    if array.shape != (graph.n,):
        raise ValueError(f"ref must have shape ({graph.n},), a probability an arm, got {array.shape}")
    bad = ~(np.isfinite(array) & (array >= 0))
    if bad.any():
        arm = int(np.argmax(bad))
        raise ValueError(f"ref of arm {arm} must be a probability, got {array[arm]:g}")
    if abs(array.sum() - 1) > _NORMALISATION:
        raise ValueError(f"ref must sum to 1, its {graph.n} entries sum to {array.sum():.12g}")
    unsupported = np.flatnonzero((array[graph.winners] == 0) | (array[graph.losers] == 0))
    if len(unsupported):
        pair = int(unsupported[0])
        arm = next(arm for arm in graph.edges[pair].tolist() if array[arm] == 0)
        raise ValueError(
            f"ref of arm {arm} is 0, but pair {pair}, {tuple(graph.edges[pair].tolist())}, needs its log-ratio: "
            "give the arm a positive probability or leave the pair out"
        )
    return array
