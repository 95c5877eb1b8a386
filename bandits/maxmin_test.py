"""The max-min policy against the cone solver, and [F]'s Theorem 2 for finite sets as it fails."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bandits.maxmin import closest_member, max_min
from bandits.objectives import Floats
from theory.strategies import log_policies, matrices


def cone_solver_value(rewards: Floats, ref: Floats, beta: float) -> float:
    """max over pi of min over members of E[r(pi) - r(ref)] - beta KL(pi || ref)."""
    pi, worst = cp.Variable(len(ref), nonneg=True), cp.Variable()
    divergence = cp.sum(cp.kl_div(pi, ref))
    problem = cp.Problem(cp.Maximize(worst - beta * divergence), [rewards @ (pi - ref) >= worst, cp.sum(pi) == 1])
    problem.solve(solver=cp.CLARABEL)
    return float(problem.value)


@pytest.mark.parametrize("seed", range(6))
def test_value_is_the_cone_solver_s(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rewards, ref, beta = rng.normal(size=(3, 4)), rng.dirichlet(np.ones(4)), float(10 ** rng.uniform(-1, 1))
    ours = max_min(rewards, ref, beta=beta)
    assert ours.value == pytest.approx(cone_solver_value(rewards, ref, beta), abs=1e-6)
    assert ours.certificate.accepts(1e-9)


@given(rewards=matrices(3, 4), log_ref=log_policies(4), beta=st.floats(0.1, 5))
def test_the_hull_is_closer_and_safer_than_any_member(rewards: Floats, log_ref: Floats, beta: float) -> None:
    ref = np.exp(log_ref)
    hull, member = max_min(rewards, ref, beta=beta), closest_member(rewards, ref, beta=beta)
    assert hull.forward_kl <= member.forward_kl + 1e-9
    assert hull.value >= member.value - 1e-9
    assert hull.certificate.residuals["adversary_gap"] <= 1e-8


def test_the_closest_member_is_no_saddle_point() -> None:
    rewards, ref = np.array([[1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]), np.full(3, 1 / 3)
    member = closest_member(rewards, ref, beta=0.5)
    assert member.certificate.residuals["adversary_gap"] > 0.1
    assert member.value < max_min(rewards, ref, beta=0.5).value - 0.1


def test_kinds_and_narrow_references() -> None:
    narrow = np.array([0.7, 0.2, 0.1], dtype=np.float32)
    assert max_min([[0.0, 1.0, 2.0]], narrow, beta=1.0).certificate.accepts(1e-9)
    with pytest.raises(TypeError, match="rewards must hold real numbers, got str: 'high'"):
        max_min("high", [0.5, 0.5], beta=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [1.0, 2.0]}, r"rewards must have shape \[K, n\] and ref \[n\], got \(2,\) and \(2,\)"),
        ({"rewards": [[1.0, np.nan]]}, "reward of member 0 for arm 1 must be finite, got nan"),
        ({"ref": [1.0, 0.0]}, "ref of arm 1 must be a probability > 0, got 0"),
        ({"ref": [0.5, 0.6]}, "ref must sum to 1, its entries sum to 1.1"),
        ({"beta": 0}, "beta must be a finite number > 0, got 0"),
        ({"beta": [1.0, 2.0]}, r"beta must be one number, got shape \(2,\)"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"rewards": [[0.0, 1.0]], "ref": [0.5, 0.5], "beta": 1.0} | change
    with pytest.raises(ValueError, match=message):
        max_min(**arguments)
