from __future__ import annotations

import itertools
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import theory.resistance
from theory.preferences import Floats, PreferenceGraph
from theory.resistance import effective_resistance, infinite_probability
from theory.strategies import preference_graphs


def forests(graph: PreferenceGraph, conductances: list[Fraction], roots: tuple[int, ...]) -> Fraction:
    """Sum over spanning forests with one root in each tree of the product of their conductances; brute force."""
    total = Fraction(0)
    for chosen in itertools.combinations(range(len(graph)), graph.n - len(roots)):
        label = list(range(graph.n))
        for edge in chosen:
            i, j = graph.edges[edge].tolist()
            label = [label[j] if at == label[i] else at for at in label]
        if len(set(label)) == len({label[root] for root in roots}) == len(roots):
            product = Fraction(1)
            for edge in chosen:
                product *= conductances[edge]
            total += product
    return total


def by_kirchhoff(graph: PreferenceGraph, conductances: list[Fraction], i: int, j: int) -> Fraction:
    """Forests that part i from j, over spanning trees: Kirchhoff 1847."""
    return forests(graph, conductances, (i, j)) / forests(graph, conductances, (i,))


def test_against_spanning_trees_in_exact_arithmetic() -> None:
    edges = list(itertools.combinations(range(4), 2))
    labels, wins = [1, 2, 3, 1, 4, 2], [Fraction(1, 2), Fraction(1, 3), Fraction(3, 4), Fraction(9, 10)]
    checked = 0
    for size in (3, 4, 5, 6):
        for chosen in itertools.combinations(range(6), size):
            graph = PreferenceGraph(4, [edges[e] for e in chosen], [labels[e] for e in chosen])
            if not graph.is_connected:
                continue
            p = [wins[e % 4] for e in chosen]
            conductances = [labels[e] * q * (1 - q) for e, q in zip(chosen, p, strict=True)]
            found = effective_resistance(graph, np.array(p, dtype=np.float64), pairs=edges)
            exact = [float(by_kirchhoff(graph, conductances, i, j)) for i, j in edges]
            np.testing.assert_allclose(found, exact, rtol=1e-12)
            checked += 1
    assert checked == 16 + 15 + 6 + 1


def by_pseudo_inverse(graph: PreferenceGraph, p: Floats | float, pairs: np.ndarray) -> Floats:
    """The definition, dense."""
    inverse = np.linalg.pinv(graph.with_weights(graph.weights * p * (1 - np.asarray(p))).laplacian().toarray())
    i, j = pairs.T
    found: Floats = inverse[i, i] + inverse[j, j] - 2 * inverse[i, j]
    return np.where(graph.components[i] == graph.components[j], found, np.inf)


@given(preference_graphs(max_responses=7), st.data(), st.sampled_from([1, 128]))
def test_against_the_pseudo_inverse(graph: PreferenceGraph, data: st.DataObject, dense: int) -> None:
    p = np.array(data.draw(st.lists(st.floats(0.02, 0.98), min_size=len(graph), max_size=len(graph))))
    pairs = np.array(list(itertools.combinations(range(graph.n), 2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theory.resistance, "LARGEST_DENSE", dense)
        found = effective_resistance(graph, p, pairs=pairs)
        np.testing.assert_allclose(effective_resistance(graph, p, pairs=pairs[:, ::-1]), found, rtol=1e-12)
    np.testing.assert_allclose(found, by_pseudo_inverse(graph, p, pairs), rtol=1e-8)


@given(preference_graphs(max_responses=6), st.data())
def test_one_half_is_a_lower_bound_and_an_own_comparison_an_upper_one(
    graph: PreferenceGraph, data: st.DataObject
) -> None:
    p = np.array(data.draw(st.lists(st.floats(0.02, 0.98), min_size=len(graph), max_size=len(graph))))
    found = effective_resistance(graph, p)
    assert (found >= effective_resistance(graph) * (1 - 1e-9)).all()
    assert (found <= 1 / (graph.weights * p * (1 - p)) * (1 + 1e-9)).all()


def test_series_parallel_and_reversed_labels() -> None:
    assert effective_resistance(PreferenceGraph(2, [(0, 1)], [5]))[0] == pytest.approx(4 / 5)
    assert effective_resistance(PreferenceGraph.chain(4), pairs=[(0, 3)])[0] == pytest.approx(12)
    counted = effective_resistance(PreferenceGraph(2, [(0, 1)], [4]), 0.8)
    label_by_label = PreferenceGraph(2, [(0, 1), (0, 1), (0, 1), (1, 0)])
    np.testing.assert_allclose(effective_resistance(label_by_label, [0.8, 0.8, 0.8, 0.2]), counted[0])


def test_what_labels_do_not_link() -> None:
    graph = PreferenceGraph(5, [(0, 1), (2, 3)])
    found = effective_resistance(graph, [0.5, 1.0], pairs=[(0, 1), (0, 2), (2, 3), (4, 4), (4, 0)])
    assert found.tolist() == [4, np.inf, np.inf, 0, np.inf]
    assert effective_resistance(PreferenceGraph(3, [])).shape == (0,)
    assert effective_resistance(PreferenceGraph(3, []), pairs=[]).shape == (0,)


def test_100_000_comparisons_in_small_components() -> None:
    """50,000 prompts of two responses and 10,000 of up to five; and what a large component gives is the same."""
    rng = np.random.default_rng(0)
    edges = [np.arange(100_000).reshape(-1, 2)]
    for prompt in range(10_000):
        edges.append(100_000 + 5 * prompt + np.array([(0, 1), (1, 2), (2, 0), (2, 3), (3, 4)]))
    stacked = np.concatenate(edges)
    graph = PreferenceGraph(150_000, stacked, rng.integers(1, 6, len(stacked)))
    p = rng.uniform(0.05, 0.95, len(stacked))
    began = time.process_time()
    found = effective_resistance(graph, p)
    assert time.process_time() - began < 10
    assert found.shape == (100_000,)
    own = slice(0, 50_000)
    np.testing.assert_allclose(found[own], (1 / (graph.weights * p * (1 - p)))[own])
    few = slice(50_000, 50_020)
    part = PreferenceGraph(20, stacked[few] - 100_000, graph.weights[few])
    np.testing.assert_allclose(found[few], by_pseudo_inverse(part, p[few], part.edges), rtol=1e-9)


def test_a_large_component() -> None:
    rng = np.random.default_rng(1)
    links = np.stack([np.arange(1, 400), [rng.integers(0, i) for i in range(1, 400)]], axis=1)
    more = rng.integers(0, 400, (600, 2))
    edges = np.concatenate([links, more[more[:, 0] != more[:, 1]]])
    graph = PreferenceGraph(400, edges, rng.integers(1, 4, len(edges)))
    np.testing.assert_allclose(effective_resistance(graph, 0.3), by_pseudo_inverse(graph, 0.3, graph.edges), rtol=1e-9)
    # Foster 1949: conductance times resistance, summed over the edges, is the number of responses less one.
    assert (graph.weights * 0.21) @ effective_resistance(graph, 0.3) == pytest.approx(399)


def test_infinite_probability_against_all_outcomes() -> None:
    for k in range(1, 6):
        for p in (0.0, 0.3, 0.5, 1.0):
            exact = sum(
                np.prod([p if won else 1 - p for won in wins])
                for wins in itertools.product([True, False], repeat=k)
                if len(set(wins)) == 1
            )
            assert infinite_probability(p, k) == pytest.approx(exact)
    assert infinite_probability([[0.5], [1.0]], [1, 2, 3]).tolist() == [[1, 0.5, 0.25], [1, 1, 1]]


@pytest.mark.parametrize(
    ("p", "pairs", "message"),
    [
        ([0.5], None, r"win_probabilities must be a number or have shape \(2,\), one an edge, got \(1,\)"),
        (1.5, None, r"win_probabilities must be in \[0, 1\], got 1.5"),
        ([0.5, np.nan], None, r"win_probabilities must be in \[0, 1\], got nan"),
        (0.5, [(0, 3)], r"pair \(0, 3\): responses must be in 0 ... 2"),
        (0.5, [0, 1], r"pairs must be integers of shape \[q, 2\], got shape \(2,\) and dtype int64"),
        (0.5, [(0.0, 1.0)], "and dtype float64"),
    ],
)
def test_bad_input(p: object, pairs: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        effective_resistance(PreferenceGraph.chain(3), p, pairs=pairs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("p", "k", "message"),
    [
        (-0.1, 1, r"win_probabilities must be in \[0, 1\], got -0.1"),
        (0.5, [1, 0], "labels must be at least 1, got 0"),
    ],
)
def test_bad_labels(p: object, k: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infinite_probability(p, k)  # type: ignore[arg-type]
