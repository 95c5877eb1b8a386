"""How well preference labels determine a margin: effective resistances of the comparisons.

With k labels on a comparison whose winner wins with probability p (Bradley-Terry), the comparison is a resistor of
conductance k p (1 - p), its Fisher information. The effective resistance between two responses, R_eff, is then the
asymptotic variance of their implicit reward margin under tabular DPO, or of a Bradley-Terry fit, in squared nats of
reward (log-odds). A reward model whose margin there has bias b and variance v is the better teacher iff
b^2 + v < R_eff. Statement, proof and what it does not cover: `theory.propositions.labels_or_reward`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import splu

from theory.preferences import Floats, Ints, PreferenceGraph

LARGEST_DENSE = 128
"""Responses in a component up to which its conductances are inverted as a dense matrix."""
CHUNK = 2**22
"""Numbers that are held at a time: 32 MiB."""


def effective_resistance(
    graph: PreferenceGraph, win_probabilities: npt.ArrayLike = 0.5, *, pairs: npt.ArrayLike | None = None
) -> Floats:
    """R_eff of pairs of responses, given how often each comparison was labelled.

    Components are solved apart: those of at most LARGEST_DENSE responses in stacks of dense matrices, a larger one by
    one sparse factorisation and a solve for each of its pairs. 100,000 comparisons of as many prompts take less than
    a second. Rounding is relative to the largest resistance in the component.

    Args:
        graph: its weights are the labels of each edge, both outcomes counted; repeated and reversed edges add up, so
            that one edge a label will do as well. Several prompts are several components of one graph.
        win_probabilities: P(winner of the edge > its loser) in [0, 1], [m] or one for all; an edge and its reverse
            with 1 - p say the same. Where they are not known, the default 1/2 gives a lower bound on R_eff whatever
            they are. At 0 or 1 a label tells nothing about the margin.
        pairs: (i, j) whose resistances are wanted, [q, 2]; by default the graph's edges.

    Returns:
        [q], log-odds squared; 0 where i = j, infinite where no informative comparisons link i and j.

    Raises:
        ValueError: a probability or a response out of range, or a wrong shape; names it.
    """
    p = np.asarray(win_probabilities, dtype=np.float64)
    if p.shape not in ((), (len(graph),)):
        raise ValueError(
            f"win_probabilities must be a number or have shape ({len(graph)},), one an edge, got {p.shape}"
        )
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"win_probabilities must be in [0, 1], got {p[~((p >= 0) & (p <= 1))].flat[0]}")
    asked = graph.edges if pairs is None else _checked_pairs(pairs, graph.n)
    conductances = graph.weights * (p * (1 - p))
    informative = conductances > 0
    edges, conductances = graph.edges[informative], conductances[informative]
    links = sparse.csr_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(graph.n, graph.n))
    components = csgraph.connected_components(links, directed=False)[1]
    sizes = np.bincount(components)

    order = np.argsort(components, kind="stable")
    place = np.empty(graph.n, dtype=np.intp)  # of each response in its component
    place[order] = np.arange(graph.n) - np.repeat(np.cumsum(sizes) - sizes, sizes)

    first, second = asked[:, 0], asked[:, 1]
    resistances = np.where(first == second, 0.0, np.inf)
    linked = np.flatnonzero((components[first] == components[second]) & (first != second))
    for size in np.unique(sizes[components[first[linked]]]):
        of_size = np.flatnonzero(sizes == size)
        stacked = max(1, CHUNK // int(size) ** 2) if size <= LARGEST_DENSE else 1
        for start in range(0, len(of_size), stacked):
            stack = of_size[start : start + stacked]
            position = np.full(len(sizes), -1)
            position[stack] = np.arange(len(stack))
            chosen = linked[position[components[first[linked]]] >= 0]
            if not len(chosen):
                continue
            inside = position[components[edges[:, 0]]] >= 0
            solve = _stacked if size <= LARGEST_DENSE else _factorised
            resistances[chosen] = solve(
                (len(stack), int(size)),
                position[components[edges[inside, 0]]],
                place[edges[inside]],
                conductances[inside],
                position[components[first[chosen]]],
                place[asked[chosen]],
            )
    return resistances


def infinite_probability(win_probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> Floats:
    """p^k + (1 - p)^k: how likely k labels of one comparison all agree.

    Then tabular DPO has no finite optimum for a comparison that no others bypass; for any other it is an upper bound.
    Both arguments are broadcast; probabilities in [0, 1], labels at least 1.
    """
    p, k = _checked_probabilities(win_probabilities), np.asarray(labels, dtype=np.float64)
    if not (k >= 1).all():
        raise ValueError(f"labels must be at least 1, got {k[~(k >= 1)].flat[0]:g}")
    return np.asarray(p**k + (1 - p) ** k)


def _checked_probabilities(win_probabilities: npt.ArrayLike) -> Floats:
    p = np.asarray(win_probabilities, dtype=np.float64)
    if (bad := ~((p >= 0) & (p <= 1))).any():  # a NaN is neither
        raise ValueError(f"win_probabilities must be in [0, 1], got {p[bad].flat[0]}")
    return p


def _checked_pairs(pairs: npt.ArrayLike, n: int) -> Ints:
    asked: Any = np.asarray(pairs)
    if asked.size == 0:
        return np.empty((0, 2), dtype=np.intp)
    if asked.ndim != 2 or asked.shape[1] != 2 or asked.dtype.kind not in "iu":
        raise ValueError(f"pairs must be integers of shape [q, 2], got shape {asked.shape} and dtype {asked.dtype}")
    if (bad := ((asked < 0) | (asked >= n)).any(axis=1)).any():
        raise ValueError(f"pair {tuple(asked[np.argmax(bad)].tolist())}: responses must be in 0 ... {n - 1}")
    return np.asarray(asked, dtype=np.intp)


# Both solvers ground the last response of each component: without its row and column the Laplacian is positive
# definite, and with M its inverse (0 in the missing row and column) R_eff(i, j) = M_ii + M_jj - 2 M_ij.


def _stacked(
    shape: tuple[int, int], at: Ints, ends: Ints, conductances: Floats, pair_at: Ints, pair_ends: Ints
) -> Floats:
    """Of `shape[0]` components of `shape[1]` responses each; `at` is an edge's component, `ends` its ends there."""
    count, size = shape
    laplacians = np.zeros((count, size, size))
    i, j = ends[:, 0], ends[:, 1]
    for rows, columns, sign in ((i, i, 1.0), (j, j, 1.0), (i, j, -1.0), (j, i, -1.0)):
        np.add.at(laplacians, (at, rows, columns), sign * conductances)
    inverses = np.zeros_like(laplacians)
    inverses[:, :-1, :-1] = np.linalg.inv(laplacians[:, :-1, :-1])
    a, b = pair_ends[:, 0], pair_ends[:, 1]
    found: Floats = inverses[pair_at, a, a] + inverses[pair_at, b, b] - 2 * inverses[pair_at, a, b]
    return found


def _factorised(
    shape: tuple[int, int], at: Ints, ends: Ints, conductances: Floats, pair_at: Ints, pair_ends: Ints
) -> Floats:
    """Of one large component, by a sparse factorisation. Arguments as above; `at` and `pair_at` are 0."""
    size = shape[1]
    laplacian = PreferenceGraph(size, ends, conductances).laplacian()
    factors = splu(sparse.csc_array(laplacian[:-1, :-1]))
    unique, inverse = np.unique(np.sort(pair_ends, axis=1), axis=0, return_inverse=True)
    found = np.empty(len(unique))
    step = max(1, CHUNK // size)
    for start in range(0, len(unique), step):
        block = unique[start : start + step]
        columns = np.arange(len(block))
        currents = np.zeros((size, len(block)))
        currents[block[:, 0], columns], currents[block[:, 1], columns] = 1.0, -1.0
        potentials = np.zeros_like(currents)
        potentials[:-1] = factors.solve(currents[:-1])
        found[start : start + step] = potentials[block[:, 0], columns] - potentials[block[:, 1], columns]
    return found[inverse.reshape(-1)]
