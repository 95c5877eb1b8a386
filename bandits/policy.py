"""Reference policies over arms, checked once."""

from __future__ import annotations

from typing import Any

import numpy as np

from bandits.objectives import Floats, described, numbers
from theory.preferences import PreferenceGraph

_NORMALISATION = 1e-9
_ROUNDED = 1e-2


def uniform(n: int) -> Floats:
    """The indifferent policy over n arms, [n]."""
    return np.full(n, 1 / n)


def probabilities(ref: Any) -> Floats:
    """pi_ref as a fresh float64 array. What comes in float32 or narrower is divided by its sums over the last axis
    where these are 1 to that type's rounding (a unit an entry); float64 stays as it is.

    Raises:
        TypeError, ValueError: it holds something else than numbers.
    """
    array, given = numbers("ref", ref), np.asarray(ref).dtype
    if array.ndim and given.kind == "f" and given.itemsize < array.itemsize:
        total = array.sum(axis=-1, keepdims=True)
        rounded = np.abs(total - 1) <= array.shape[-1] * np.finfo(given).eps
        array = np.where(rounded, array / np.where(rounded, total, 1.0), array)
    return array


def sum_error(total: float) -> str:
    """What is wrong with the sum of a reference, or with one that was rounded before it became float64."""
    cure = "; if that is rounding, divide it by its sum" if abs(total - 1) < _ROUNDED else ""
    return f"sum to {total:.12g}{cure}"


def check_graph(graph: Any) -> None:
    """Raises TypeError, with what would be right, where it is no PreferenceGraph."""
    if not isinstance(graph, PreferenceGraph):
        raise TypeError(f"graph must be a PreferenceGraph, as PreferenceGraph(n, edges) is, got {described(graph)}")


def reference(ref: Any, graph: PreferenceGraph) -> Floats:
    """pi_ref as float64 [n], a distribution with support on every arm that a pair mentions.

    Raises:
        TypeError: ref does not hold numbers.
        ValueError: wrong length, a negative or non-finite entry, a sum other than 1 (to 1e-9; in float32 to its own
            rounding, which is then normalised away), or a zero where a log-ratio is needed; the message names the arm.
    """
    array = probabilities(ref)
    if array.shape != (graph.n,):
        raise ValueError(f"ref must have shape ({graph.n},), a probability an arm, got {array.shape}")
    bad = ~(np.isfinite(array) & (array >= 0))
    if bad.any():
        arm = int(np.argmax(bad))
        raise ValueError(f"ref of arm {arm} must be a probability, got {array[arm]:g}")
    if abs(array.sum() - 1) > _NORMALISATION:
        raise ValueError(f"ref must sum to 1, its {graph.n} entries {sum_error(float(array.sum()))}")
    unsupported = np.flatnonzero((array[graph.winners] == 0) | (array[graph.losers] == 0))
    if len(unsupported):
        pair = int(unsupported[0])
        arm = next(arm for arm in graph.edges[pair].tolist() if array[arm] == 0)
        raise ValueError(
            f"ref of arm {arm} is 0, but pair {pair}, {tuple(graph.edges[pair].tolist())}, needs its log-ratio: "
            "give the arm a positive probability or leave the pair out"
        )
    return array
