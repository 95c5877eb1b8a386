"""Weighted preference graphs: which response was preferred to which, and how often.

An edge (w, l) says that response w was preferred to response l. What a pairwise loss can and cannot determine is a
property of this graph: its components fix what is identified, its strongly connected components what is finite.
Everything is sparse and vectorised; 10,000 responses with 50,000 edges take milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sparse
from scipy.sparse import csgraph

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class PreferenceGraph:
    """A directed multigraph over responses 0 ... n - 1.

    Args:
        n: number of responses, at least 1.
        edges: (winner, loser) pairs, [m, 2]; may be empty, and may repeat a pair (weights then add up).
        weights: [m], finite and > 0, e.g. counts or frequencies; all one where not given.

    Raises:
        ValueError: a response out of range, a self-preference, a bad weight, or a wrong shape; names the pair.
    """

    n: int
    edges: Any
    weights: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, (int, np.integer)) or self.n < 1:
            raise ValueError(f"n must be a number of responses, at least 1, got {self.n!r}")
        edges = np.asarray(self.edges)
        if edges.size == 0:
            edges = np.empty((0, 2), dtype=np.intp)
        if edges.ndim != 2 or edges.shape[1] != 2 or edges.dtype.kind not in "iu":
            raise ValueError(
                f"edges must be (winner, loser) pairs of integers, shape [m, 2], got shape {edges.shape} "
                f"and dtype {edges.dtype}"
            )
        weights = np.ones(len(edges)) if self.weights is None else np.array(self.weights, dtype=np.float64)
        if weights.shape != (len(edges),):
            raise ValueError(f"weights must have shape ({len(edges)},), one an edge, got {weights.shape}")
        for bad, what in [
            (((edges < 0) | (edges >= self.n)).any(axis=1), f"responses must be in 0 ... {self.n - 1}"),
            (edges[:, 0] == edges[:, 1], "a response cannot be preferred to itself"),
            (~(np.isfinite(weights) & (weights > 0)), "the weight must be finite and > 0"),
        ]:
            if bad.any():
                at = int(np.argmax(bad))
                winner, loser = edges[at].tolist()
                raise ValueError(f"edge {at}, ({winner}, {loser}) of weight {weights[at]:g}: {what}")
        frozen_edges = np.array(edges, dtype=np.intp)
        for array in (frozen_edges, weights):
            array.flags.writeable = False
        for name, value in (("n", int(self.n)), ("edges", frozen_edges), ("weights", weights)):
            object.__setattr__(self, name, value)

    @classmethod
    def chain(cls, n: int) -> PreferenceGraph:
        """0 > 1 > ... > n - 1, adjacent pairs only, weight one each."""
        return cls(n, [(i, i + 1) for i in range(n - 1)])

    def __len__(self) -> int:
        """Number of edges m."""
        return len(self.edges)

    @property
    def winners(self) -> Ints:
        """[m], a fresh copy: torch refuses to index with read-only arrays."""
        winners: Ints = self.edges[:, 0].copy()
        return winners

    @property
    def losers(self) -> Ints:
        """[m], likewise."""
        losers: Ints = self.edges[:, 1].copy()
        return losers

    def margins(self, values: Any) -> Any:
        """values[..., w] - values[..., l] of every edge. NumPy array or torch tensor [..., n] -> [..., m]."""
        return values[..., self.winners] - values[..., self.losers]

    def by_response(self, slopes: Floats) -> Floats:
        """B' slopes of a vector [m], that is `incidence.T @ slopes`, [n], without a sparse matrix's overhead."""
        winners, losers = self.edges.T
        summed = np.bincount(winners, slopes, self.n) - np.bincount(losers, slopes, self.n)
        return np.asarray(summed, dtype=np.float64)

    @cached_property
    def incidence(self) -> sparse.csr_array:
        """B, sparse [m, n]: `incidence @ values` are the margins, `incidence.T @ slopes` adds slopes up by response."""
        rows = np.repeat(np.arange(len(self)), 2)
        signs = np.tile([1.0, -1.0], len(self))
        return sparse.csr_array((signs, (rows, self.edges.reshape(-1))), shape=(len(self), self.n))

    def laplacian(self) -> sparse.csr_array:
        """B' diag(weights) B, sparse [n, n]; the direction of an edge does not enter."""
        b = self.incidence
        return sparse.csr_array(b.T @ (sparse.diags_array(self.weights) @ b))

    @cached_property
    def _adjacency(self) -> sparse.csr_array:
        return sparse.csr_array((np.ones(len(self)), (self.winners, self.losers)), shape=(self.n, self.n))

    @cached_property
    def components(self) -> Ints:
        """[n], label of each response's component, directions ignored. Rewards are comparable only within one."""
        return np.asarray(csgraph.connected_components(self._adjacency, directed=False)[1], dtype=np.intp)

    @property
    def is_connected(self) -> bool:
        """Whether every two responses are linked by comparisons, directions ignored."""
        return int(self.components.max()) == 0

    @cached_property
    def strong_components(self) -> Ints:
        """[n], label of each response's strongly connected component: two share it iff each beats the other
        through some chain of preferences."""
        labels = csgraph.connected_components(self._adjacency, directed=True, connection="strong")[1]
        return np.asarray(labels, dtype=np.intp)

    @property
    def crossing(self) -> npt.NDArray[np.bool_]:
        """[m], whether the edge's ends lie in different strongly connected components, i.e. it is on no cycle."""
        strong = self.strong_components
        return np.asarray(strong[self.winners] != strong[self.losers])

    @cached_property
    def ranks(self) -> Ints:
        """[n], non-negative integers: equal within a strong component, higher at the winner of every crossing edge.

        So `margins(ranks)` is >= 0, and > 0 exactly on the crossing edges: a direction along which the
        likelihood of the preferences never falls (the recession direction of the Bradley-Terry fit).
        """
        strong, crossing = self.strong_components, self.crossing
        pairs = np.stack([strong[self.winners[crossing]], strong[self.losers[crossing]]], axis=1)
        beaten_by: dict[int, list[int]] = {}
        pending = np.bincount(pairs[:, 0], minlength=int(strong.max()) + 1)  # losers of each not ranked yet
        for winner, loser in pairs.tolist():
            beaten_by.setdefault(loser, []).append(winner)
        ranks = np.zeros(len(pending), dtype=np.intp)
        ready = np.flatnonzero(pending == 0).tolist()
        while ready:
            loser = ready.pop()
            for winner in beaten_by.get(loser, []):
                ranks[winner] = max(ranks[winner], ranks[loser] + 1)
                pending[winner] -= 1
                if pending[winner] == 0:
                    ready.append(winner)
        return ranks[strong]

    def cycle(self) -> list[int] | None:
        """Indices of the edges of one shortest preference cycle through the first edge that lies on any, in order.

        None where the preferences are acyclic.
        """
        inside = np.flatnonzero(~self.crossing)
        if not len(inside):
            return None
        first = int(inside[0])
        winner, loser = self.edges[first].tolist()
        previous = csgraph.breadth_first_order(self._adjacency, loser, return_predecessors=True)[1]
        index = {(w, el): at for at, (w, el) in reversed(list(enumerate(self.edges.tolist())))}
        path, node = [], winner
        while node != loser:
            path.append(index[(int(previous[node]), node)])
            node = int(previous[node])
        return [first, *reversed(path)]

    def transitive_closure(self) -> PreferenceGraph:
        """Every (i, j), i != j, such that a chain of preferences leads from i down to j; weights one. Dense, [n, n]."""
        reaches = self._adjacency.toarray() > 0
        while True:
            longer = reaches | (reaches.astype(np.float64) @ reaches > 0)
            if (longer == reaches).all():
                break
            reaches = longer
        np.fill_diagonal(reaches, False)
        return PreferenceGraph(self.n, np.argwhere(reaches))

    def with_weights(self, weights: Sequence[float] | Floats) -> PreferenceGraph:
        """The same edges, weighted anew."""
        return PreferenceGraph(self.n, self.edges, weights)
