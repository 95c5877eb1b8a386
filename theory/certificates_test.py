"""Every certificate accepts a known optimum and rejects that optimum perturbed, in every residual it reports."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logsumexp

from theory.certificates import Certificate, farkas, policy_kkt, reaches, saddle_point, simplex_kkt, stationarity
from theory.preferences import PreferenceGraph
from theory.strategies import log_policies, positive, preference_graphs, simplex, vectors


def test_certificate_reports_its_worst_residual_and_never_accepts_nan() -> None:
    assert Certificate({"a": 0.0, "b": 0.5}).worst == 0.5
    assert Certificate({"a": 0.0, "b": 0.5}).accepts(0.5)
    assert not Certificate({"a": 0.0, "b": 0.5}).accepts(0.4)
    assert not Certificate({"a": np.nan, "b": 0.0}).accepts(np.inf)
    assert not stationarity(np.array([0.0, np.nan])).accepts(1.0)


def test_stationarity_of_a_quadratic() -> None:
    minimum = np.array([1.0, -2.0])
    assert stationarity(2 * (minimum - minimum)).accepts(0)
    assert not stationarity(2 * (np.array([1.0, -1.999]) - minimum)).accepts(1e-3)


@given(st.integers(2, 6).flatmap(vectors))
def test_simplex_kkt_of_a_projection(point: np.ndarray) -> None:
    """The nearest point of the simplex has a closed form (sort and threshold)."""
    n = len(point)
    ordered = np.sort(point)[::-1]
    thresholds = (np.cumsum(ordered) - 1) / np.arange(1, n + 1)
    nearest = np.maximum(point - thresholds[ordered > thresholds][-1], 0)
    assert simplex_kkt(nearest, nearest - point).accepts(1e-12)
    toward = (nearest + np.eye(n)) / 2
    moved = toward[np.argmax(np.linalg.norm(toward - nearest, axis=1))]
    assert not simplex_kkt(moved, moved - point).accepts(1e-3)


def test_simplex_kkt_tells_its_residuals_apart() -> None:
    def residuals(weights: list[float], gradient: list[float]) -> dict[str, float]:
        return dict(simplex_kkt(np.array(weights), np.array(gradient)).residuals)

    assert residuals([1.0, 0.0], [0.0, 1.0]) == {"feasibility": 0, "dual_feasibility": 0, "complementarity": 0}
    assert residuals([1.0, 0.0], [0.0, -1.0])["dual_feasibility"] == 1
    assert residuals([0.5, 0.5], [0.0, 1.0])["complementarity"] == 0.25
    assert residuals([1.5, -0.5], [0.0, 0.0])["feasibility"] == 0.5
    assert residuals([0.5, 0.0], [0.0, 0.0])["feasibility"] == 0.5


@given(st.data())
def test_policy_kkt_of_the_cross_entropy(data: st.DataObject) -> None:
    """-sum_y q(y) log pi(y) is least at pi = q; also in a batch, of which the worst counts."""
    target = data.draw(log_policies(4))
    gradient = -np.exp(target)
    assert policy_kkt(target, gradient).accepts(1e-12)
    moved = np.log(0.9 * np.exp(target) + [0.1, 0, 0, 0])
    expected = np.abs(np.exp(moved) - np.exp(target)).max()
    assert policy_kkt(moved, gradient).worst == pytest.approx(expected, abs=1e-12)
    batch = policy_kkt(np.stack([target, moved]), np.stack([gradient, gradient]))
    assert batch.worst == pytest.approx(expected, abs=1e-12)
    assert policy_kkt(target + 0.1, gradient).residuals["feasibility"] == pytest.approx(np.expm1(0.1))


@given(st.data())
def test_saddle_point_of_one_reward_is_the_tilted_reference(data: st.DataObject) -> None:
    ref, reward, beta = data.draw(log_policies(4)), data.draw(vectors(4)), data.draw(positive())
    tilted = ref + reward / beta
    optimum = tilted - logsumexp(tilted)
    one = np.ones(1)
    assert saddle_point(optimum, ref, reward[None], one, beta=beta).accepts(1e-10)
    # The policy gap is beta KL(pi || optimum), exactly.
    gap = saddle_point(ref, ref, reward[None], one, beta=beta).residuals["policy_gap"]
    assert gap == pytest.approx(beta * np.exp(ref) @ (ref - optimum), abs=1e-10)


def test_saddle_point_of_two_opposed_rewards() -> None:
    """r and -r: the adversary mixes them evenly, and the policy stays at the reference."""
    ref, rewards = np.log([0.5, 0.5]), np.array([[1.0, -1.0], [-1.0, 1.0]])
    even = np.array([0.5, 0.5])
    assert saddle_point(ref, ref, rewards, even, beta=0.5).accepts(1e-15)
    assert saddle_point(ref, ref, rewards, np.array([0.6, 0.4]), beta=0.5).residuals["policy_gap"] > 1e-2
    assert saddle_point(np.log([0.6, 0.4]), ref, rewards, even, beta=0.5).residuals["adversary_gap"] > 1e-2
    assert saddle_point(ref + 0.1, ref, rewards, even, beta=0.5).residuals["feasibility"] > 1e-2
    assert saddle_point(ref, ref, rewards, np.array([1.5, -0.5]), beta=0.5).residuals["feasibility"] == 0.5
    with pytest.raises(ValueError, match="beta must be > 0, got 0"):
        saddle_point(ref, ref, rewards, even, beta=0)


@given(preference_graphs())
def test_farkas_accepts_cycles_only(graph: PreferenceGraph) -> None:
    cycle = graph.cycle()
    if cycle is not None:
        flow = np.zeros(len(graph))
        flow[cycle] = 1 / len(cycle)
        assert farkas(graph, flow).accepts(1e-12)
        flow[cycle[0]] += 1e-3
        assert not farkas(graph, flow).accepts(1e-4)
    # An acyclic edge set has a reward with every margin >= 1; pairing it with any weights >= 0 leaves no balance.
    crossing = graph.crossing / max(graph.crossing.sum(), 1)
    if graph.crossing.any():
        assert not farkas(graph, crossing).accepts(1e-9)


def test_farkas_tells_its_residuals_apart() -> None:
    triangle = PreferenceGraph(3, [(0, 1), (1, 2), (2, 0)])
    third = np.full(3, 1 / 3)
    assert farkas(triangle, third).accepts(1e-15)
    assert farkas(triangle, -third).residuals["sign"] == pytest.approx(1 / 3)
    assert farkas(triangle, 0 * third).residuals["normalisation"] == 1
    assert farkas(triangle, np.array([1.0, 0.0, 0.0])).residuals["balance"] == 1
    with pytest.raises(ValueError, match=r"multipliers must have shape \(3,\), one an edge, got \(2,\)"):
        farkas(triangle, np.ones(2))


def test_what_features_reach() -> None:
    free, opposed = [[1, 0], [0, 1]], [[1], [-1], [-1], [1]]
    assert reaches(free, [[3], [5]])
    assert reaches(opposed, [[3], [1], [1], [3]])  # (1, -1, -1, 1) and a constant
    assert not reaches(opposed, [[1], [-1], [1], [-1]])
    assert not reaches(opposed, [[3, 1], [1, 0], [1, 0], [3, 0]])


def test_shapes() -> None:
    with pytest.raises(ValueError, match=r"weights has \(2,\), gradient has \(3,\)"):
        simplex_kkt(np.ones(2), np.ones(3))


@given(st.data())
def test_bradley_terry_optimum_of_a_two_way_pair(data: st.DataObject) -> None:
    """Counts a : b of one pair: the maximum-likelihood margin is log(a / b)."""
    a, b = data.draw(positive(0.1, 10)), data.draw(positive(0.1, 10))
    margin = np.log(a / b)
    slope = -a * expit(-margin) + b * expit(margin)
    assert stationarity(np.array([slope])).accepts(1e-12)
    margin += 0.1
    assert not stationarity(np.array([-a * expit(-margin) + b * expit(margin)])).accepts(1e-4)


@given(simplex(4))
def test_any_mixture_is_feasible(weights: np.ndarray) -> None:
    assert simplex_kkt(weights, np.zeros(4)).accepts(1e-15)
