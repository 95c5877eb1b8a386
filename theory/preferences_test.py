from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from theory.preferences import PreferenceGraph
from theory.strategies import preference_graphs, vectors


def reachable(graph: PreferenceGraph) -> np.ndarray:
    """Warshall's algorithm, entry by entry: the referee for everything below."""
    reaches = np.zeros((graph.n, graph.n), dtype=bool)
    reaches[graph.winners, graph.losers] = True
    for via, i, j in itertools.product(range(graph.n), repeat=3):
        reaches[i, j] |= reaches[i, via] and reaches[via, j]
    return reaches


@given(preference_graphs())
def test_components_against_reachability(graph: PreferenceGraph) -> None:
    reaches = reachable(graph) | np.eye(graph.n, dtype=bool)
    mutual = reaches & reaches.T
    same = graph.strong_components[:, None] == graph.strong_components
    assert (same == mutual).all()
    assert (graph.crossing == ~mutual[graph.winners, graph.losers]).all()
    either = PreferenceGraph(graph.n, np.vstack([graph.edges, graph.edges[:, ::-1]]))
    linked = reachable(either) | np.eye(graph.n, dtype=bool)
    assert ((graph.components[:, None] == graph.components) == linked).all()
    assert graph.is_connected == linked.all()


@given(preference_graphs())
def test_closure_against_reachability(graph: PreferenceGraph) -> None:
    reaches = reachable(graph) & ~np.eye(graph.n, dtype=bool)
    assert graph.transitive_closure().edges.tolist() == np.argwhere(reaches).tolist()


@given(preference_graphs())
def test_ranks_rise_exactly_across_components(graph: PreferenceGraph) -> None:
    margins = graph.margins(graph.ranks)
    assert (margins >= 0).all()
    assert ((margins > 0) == graph.crossing).all()


@given(preference_graphs())
def test_cycle_is_closed_and_exists_iff_some_edge_does_not_cross(graph: PreferenceGraph) -> None:
    cycle = graph.cycle()
    assert (cycle is None) == graph.crossing.all()
    if cycle is not None:
        path = graph.edges[cycle]
        assert (path[:, 1] == np.roll(path[:, 0], -1)).all()
        assert len(set(path[:, 0].tolist())) == len(path)


@given(st.data())
def test_laplacian_is_the_quadratic_form_of_the_margins(data: st.DataObject) -> None:
    graph = data.draw(preference_graphs())
    values = data.draw(vectors(graph.n))
    form = (graph.weights * graph.margins(values) ** 2).sum()
    np.testing.assert_allclose(values @ (graph.laplacian() @ values), form, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(graph.laplacian() @ np.ones(graph.n), 0, atol=1e-12)
    np.testing.assert_allclose(graph.incidence @ values, graph.margins(values), rtol=0, atol=1e-15)
    slopes = graph.margins(values)
    np.testing.assert_allclose(graph.by_response(slopes), graph.incidence.T @ slopes, rtol=0, atol=1e-13)


def test_margins_of_torch_tensors() -> None:
    import torch

    values = torch.arange(6.0, requires_grad=True)
    graph = PreferenceGraph(3, [(0, 1), (2, 0)])
    assert graph.winners.flags.writeable, "torch warns, once a process, of indices that are not"
    assert graph.losers.flags.writeable
    margins = graph.margins(values.reshape(2, 3))
    assert margins.tolist() == [[-1, 2], [-1, 2]]
    assert torch.autograd.grad(margins.sum(), values)[0].tolist() == [0, -1, 1, 0, -1, 1]


def test_repeated_edges_add_up() -> None:
    twice = PreferenceGraph(2, [(0, 1), (0, 1)], [1.0, 2.0])
    once = PreferenceGraph(2, [(0, 1)], [3.0])
    assert (twice.laplacian().toarray() == once.laplacian().toarray()).all()
    assert not (twice.laplacian().toarray() == once.with_weights([2.0]).laplacian().toarray()).all()


def test_chain_and_its_closure() -> None:
    chain = PreferenceGraph.chain(4)
    assert chain.edges.tolist() == [[0, 1], [1, 2], [2, 3]]
    assert chain.ranks.tolist() == [3, 2, 1, 0]
    assert len(chain.transitive_closure()) == 6
    assert PreferenceGraph.chain(1).is_connected


def test_no_edges() -> None:
    graph = PreferenceGraph(3, [])
    assert not graph.is_connected
    assert graph.cycle() is None
    assert graph.laplacian().toarray().tolist() == np.zeros((3, 3)).tolist()
    assert graph.ranks.tolist() == [0, 0, 0]


def test_large_sparse_graph() -> None:
    edges = np.sort(np.random.default_rng(0).integers(0, 10_000, (50_000, 2)), axis=1)
    graph = PreferenceGraph(10_000, edges[edges[:, 0] != edges[:, 1]])
    assert graph.crossing.all()
    assert (graph.margins(graph.ranks) > 0).all()
    assert graph.laplacian().nnz < 110_000


def test_frozen() -> None:
    graph = PreferenceGraph.chain(3)
    with pytest.raises(ValueError, match="read-only"):
        graph.weights[0] = 2
    with pytest.raises(AttributeError):
        graph.n = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("n", "edges", "weights", "message"),
    [
        (0, [], None, "n must be a number of responses, at least 1, got 0"),
        (2.0, [(0, 1)], None, "n must be a number of responses, at least 1, got 2.0"),
        (3, [(0, 1), (1, 3)], None, r"edge 1, \(1, 3\) of weight 1: responses must be in 0 ... 2"),
        (3, [(-1, 1)], None, r"edge 0, \(-1, 1\) of weight 1: responses must be in 0 ... 2"),
        (3, [(0, 1), (2, 2)], None, r"edge 1, \(2, 2\) of weight 1: a response cannot be preferred to itself"),
        (3, [(0, 1)], [0.0], r"edge 0, \(0, 1\) of weight 0: the weight must be finite and > 0"),
        (3, [(0, 1)], [-2.0], r"edge 0, \(0, 1\) of weight -2: the weight must be finite and > 0"),
        (3, [(0, 1)], [np.nan], r"edge 0, \(0, 1\) of weight nan: the weight must be finite and > 0"),
        (3, [(0, 1)], [1.0, 1.0], r"weights must have shape \(1,\), one an edge, got \(2,\)"),
        (
            3,
            [(0, 1, 2)],
            None,
            r"edges must be \(winner, loser\) pairs of integers, shape \[m, 2\], got shape \(1, 3\)",
        ),
        (3, [(0.0, 1.0)], None, "and dtype float64"),
    ],
)
def test_bad_input(n: int, edges: list[tuple[int, int]], weights: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceGraph(n, edges, weights)
