"""Hypothesis strategies shared by the property tests: preference graphs, policies, rewards.

Strategies are made once for each set of arguments: inside a composite strategy, making and checking them anew for
every example would take longer than drawing from them.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from hypothesis import strategies as st

from theory.preferences import Floats, PreferenceGraph


@cache
def reals(bound: float = 3.0) -> st.SearchStrategy[float]:
    """Finite floats in [-bound, bound], none so small that it underflows in a product."""
    return st.floats(-bound, bound, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-12 else x)


@cache
def positive(low: float = 0.05, high: float = 20.0) -> st.SearchStrategy[float]:
    """Hyper-parameters such as beta, tau, alpha: log-uniform in spirit, so that both ends are met."""
    return st.floats(np.log(low), np.log(high)).map(lambda x: float(np.exp(x)))


@cache
def vectors(size: int, bound: float = 3.0) -> st.SearchStrategy[Floats]:
    """float64 [size], entries in [-bound, bound]: rewards, log-ratios."""
    return st.lists(reals(bound), min_size=size, max_size=size).map(np.array)


@cache
def matrices(rows: int, columns: int, bound: float = 3.0) -> st.SearchStrategy[Floats]:
    """float64 [rows, columns]: an ensemble of rewards."""
    return vectors(rows * columns, bound).map(lambda flat: flat.reshape(rows, columns))


@cache
def log_policies(size: int, spread: float = 4.0) -> st.SearchStrategy[Floats]:
    """Normalised log-probabilities, float64 [size], ratios up to e^(2 spread), all finite."""
    return vectors(size, spread).map(lambda logits: logits - np.logaddexp.reduce(logits))


@cache
def simplex(size: int) -> st.SearchStrategy[Floats]:
    """Probability vectors, float64 [size]; entries may be zero."""
    return (
        st.lists(st.integers(0, 8), min_size=size, max_size=size)
        .filter(any)
        .map(lambda counts: np.array(counts, dtype=np.float64) / sum(counts))
    )


@st.composite
def preference_graphs(
    draw: st.DrawFn,
    *,
    min_responses: int = 2,
    max_responses: int = 6,
    connected: bool = False,
    acyclic: bool = False,
    weighted: bool = True,
) -> PreferenceGraph:
    """Graphs with at least one edge and no repeated one.

    Args:
        draw: given by Hypothesis.
        min_responses: at least 2.
        max_responses: at least `min_responses`.
        connected: directions ignored; a random spanning tree is drawn first.
        acyclic: every edge points from the lower to the higher index of a random order.
        weighted: weights in [0.1, 5], otherwise all one.
    """
    n = draw(_integers(min_responses, max_responses))
    order = draw(_orders(n))
    links = [(draw(_integers(0, i - 1)), i) for i in range(1, n)] if connected else []
    links += draw(_links(n, not links))
    flips = draw(_booleans(len(links)))
    edges = {
        (order[j], order[i]) if flip and not acyclic else (order[i], order[j])
        for (i, j), flip in zip(links, flips, strict=True)
    }
    return PreferenceGraph(n, sorted(edges), draw(_weights(len(edges))) if weighted else None)


@st.composite
def disjoint_pairs(draw: st.DrawFn, *, max_pairs: int = 3, max_unseen: int = 3) -> PreferenceGraph:
    """Pairs (0 > 1), (2 > 3), ... that share no response, followed by responses that no pair mentions."""
    pairs, unseen = draw(_integers(1, max_pairs)), draw(_integers(0, max_unseen))
    edges = [(2 * i, 2 * i + 1) for i in range(pairs)]
    return PreferenceGraph(2 * pairs + unseen, edges, draw(_weights(pairs)))


_integers = cache(st.integers)


@cache
def _orders(n: int) -> st.SearchStrategy[list[int]]:
    return st.permutations(range(n))


@cache
def _links(n: int, needed: bool) -> st.SearchStrategy[list[tuple[int, int]]]:
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    return st.lists(st.sampled_from(pairs), min_size=needed, max_size=2 * n)


@cache
def _booleans(size: int) -> st.SearchStrategy[list[bool]]:
    return st.lists(st.booleans(), min_size=size, max_size=size)


@cache
def _weights(size: int) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(0.1, 5.0), min_size=size, max_size=size)
