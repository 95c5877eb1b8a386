"""Heads on frozen states: the solver's solution by its optimality condition and by an independent solver."""

from __future__ import annotations

import cvxpy
import numpy as np
import pytest
from scipy.special import expit

from lm.training.heads import Floats, Pairs, calibration, fit_head, solve


def pairs(count: int, seed: int, width: int = 6) -> tuple[Floats, Floats]:
    """Differences of states, and a true head, by which one is the chosen with Bradley-Terry noise."""
    rng = np.random.default_rng(seed)
    truth = np.random.default_rng(0).normal(size=width)
    rows = rng.normal(size=(count, width))
    wins = rng.random(count) < expit(rows @ truth)
    return np.where(wins[:, None], rows, -rows), truth


@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
def test_the_solution_is_another_solvers(strength: float) -> None:
    rows, _ = pairs(80, 1)
    ours = solve(Pairs(rows), strength)
    weight = cvxpy.Variable(rows.shape[1])
    loss = cvxpy.sum(cvxpy.logistic(-rows @ weight)) / len(rows) + strength / 2 * cvxpy.sum_squares(weight)
    cvxpy.Problem(cvxpy.Minimize(loss)).solve(solver="CLARABEL")
    assert np.allclose(ours, weight.value, atol=1e-5)
    gradient = strength * ours - (rows * expit(-rows @ ours)[:, None]).mean(0)
    assert np.abs(gradient).max() < 1e-6


def test_the_start_does_not_matter() -> None:
    rows, _ = pairs(60, 2)
    far = np.full(rows.shape[1], 30.0)
    assert np.allclose(solve(Pairs(rows), 0.05), solve(Pairs(rows), 0.05, far), atol=1e-5)


def test_many_pairs_give_the_true_head_back() -> None:
    rows, truth = pairs(40_000, 3)
    found = fit_head(Pairs(rows), Pairs(pairs(5_000, 4)[0]))
    assert np.allclose(found.weight, truth, atol=0.1)
    assert not np.allclose(found.weight, -truth, atol=1.0), "and not the rejected one's"


def test_validation_chooses_the_strength() -> None:
    """Few pairs in many dimensions: without a penalty every training pair is right and held-out ones are at chance."""
    rows, held_out = pairs(40, 5, width=60)[0], pairs(4_000, 6, width=60)[0]
    found = fit_head(Pairs(rows), Pairs(held_out))
    by_strength = {one["strength"]: one["validation_loss"] for one in found.path}
    assert found.strength == min(by_strength, key=by_strength.__getitem__)
    assert min(by_strength) < found.strength
    assert by_strength[found.strength] < by_strength[min(by_strength)] - 0.05
    shown = float(np.logaddexp(0, -held_out @ found.weight).mean())
    assert shown == pytest.approx(by_strength[found.strength], rel=1e-9), "the weight is on the states as they are"


def test_the_units_of_the_states_change_nothing() -> None:
    rows, held_out = pairs(200, 7)[0], pairs(300, 8)[0]
    one, other = fit_head(Pairs(rows), Pairs(held_out)), fit_head(Pairs(1000 * rows), Pairs(1000 * held_out))
    assert one.strength == other.strength
    assert np.allclose(one.weight, 1000 * other.weight, atol=1e-6)


def test_no_pairs_are_refused() -> None:
    rows = np.ones((3, 2))
    with pytest.raises(ValueError, match="a head needs training and validation pairs, got 3 and 0"):
        fit_head(Pairs(rows), Pairs(rows[:0]))


def test_calibration_is_near_zero_for_the_truth_and_not_for_one_that_is_too_sure() -> None:
    rows, truth = pairs(40_000, 9)
    honest, sure = calibration(rows @ truth), calibration(5 * rows @ truth)
    assert honest["calibration_error"] < 0.02
    assert sure["calibration_error"] > 0.08
    assert sure["loss"] > honest["loss"]
    assert calibration(np.zeros(10)) == pytest.approx({"loss": np.log(2), "calibration_error": 0.0})


def test_a_soft_label_and_a_weight_are_rows_in_both_directions() -> None:
    """As `lm.data.votes` has it: p and w stand for p w rows one way and (1 - p) w rows the other."""
    rows, _ = pairs(50, 10)
    votes_for, votes_against = np.random.default_rng(11).integers(1, 6, size=(2, len(rows)))
    counts = votes_for + votes_against
    soft = Pairs(rows, votes_for / counts, counts.astype(float))
    written_out = Pairs(np.concatenate([np.repeat(rows, votes_for, 0), np.repeat(-rows, votes_against, 0)]))
    assert np.allclose(solve(soft, 0.02), solve(written_out, 0.02), atol=1e-5)
    assert not np.allclose(solve(soft, 0.02), solve(Pairs(rows, votes_for / counts), 0.02), atol=1e-2)
    margins = np.array([2.0, -1.0, 0.0])
    assert calibration(margins, np.full(3, 0.5))["loss"] == pytest.approx(
        (calibration(margins)["loss"] + calibration(-margins)["loss"]) / 2
    )
