"""Intervals cover, the Wald test is the textbook's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from figures.studies import kl_of_best_of
from lm.judging.statistics import best_of, bootstrap_interval, wald


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    """300 skewed samples of 60; an 80% interval should miss about 60 times, one of 95% far less often."""
    rng = np.random.default_rng(0)
    samples = rng.exponential(2.0, size=(300, 60))
    covered = {}
    for confidence in (0.8, 0.95):
        intervals = np.array([bootstrap_interval(row, confidence, 400, seed=1) for row in samples])
        covered[confidence] = np.mean((intervals[:, 0] < 2.0) & (intervals[:, 1] > 2.0))
    assert 0.72 < covered[0.8] < 0.86
    assert 0.89 < covered[0.95] < 0.99


def test_the_interval_is_about_the_normal_one_for_many_prompts_and_a_function_of_its_seed() -> None:
    values = np.random.default_rng(1).normal(0.3, 1.0, 2000)
    low, high = bootstrap_interval(values, 0.95, 2000, seed=0)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert bootstrap_interval(values, 0.95, 2000, seed=0) == [low, high]
    assert bootstrap_interval(values, 0.95, 2000, seed=1) != [low, high]


def test_equal_differences_have_a_point_for_an_interval() -> None:
    assert bootstrap_interval(np.zeros(5), 0.95, 100, seed=0) == [0.0, 0.0]
    assert bootstrap_interval(np.array([0.25]), 0.95, 100, seed=0) == [0.25, 0.25]


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=40).filter(lambda values: np.std(values) > 1e-3))
def test_wald_is_the_mean_over_its_standard_error_under_the_normal(values: list[float]) -> None:
    ours = wald(np.array(values))
    # The t statistic is the same quotient; only its reference distribution is another.
    expected = stats.ttest_1samp(values, 0.0).statistic
    assert ours["difference"] == pytest.approx(np.mean(values))
    assert ours["z"] == pytest.approx(expected)
    assert ours["p"] == pytest.approx(2 * (1 - stats.norm.cdf(abs(expected))), abs=1e-12)
    assert wald(-np.array(values))["z"] == pytest.approx(-expected)


def test_wald_rejects_a_true_null_at_its_level() -> None:
    rng = np.random.default_rng(2)
    p = [wald(rng.normal(size=200))["p"] for _ in range(1000)]
    assert 0.03 < np.mean([value is not None and value < 0.05 for value in p]) < 0.07


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [0.5, 0.5], [1.5]])
def test_without_variance_there_is_no_test(values: list[float]) -> None:
    assert wald(np.array(values)) == {"difference": values[0], "z": None, "p": None}


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_best_of_n_is_the_mean_over_all_choices_of_n(n: int) -> None:
    rewards = np.random.default_rng(3).normal(size=(4, 5)).round(1)  # ties among them
    expected = [np.mean([max(choice) for choice in itertools.combinations(row, n)]) for row in rewards]
    assert best_of(rewards, n) == pytest.approx(expected)


def test_the_best_of_more_than_there_are_is_refused() -> None:
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"n must be from 1 to the 3 samples that there are of a prompt, got {n}"):
            best_of(np.zeros((2, 3)), n)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_kl_of_the_best_of_n_is_that_of_its_density_and_less_with_ties(n: int) -> None:
    """Of ranks u, uniform, the best has density n u^(n-1); of a coin the heads have 1 - 2^-n."""
    u = (np.arange(200_000) + 0.5) / 200_000
    density = n * u ** (n - 1)
    assert kl_of_best_of(n) == pytest.approx(np.mean(density * np.log(density)), abs=1e-4)
    heads = 1 - 0.5**n
    coin = heads * np.log(heads / 0.5) + (1 - heads) * np.log((1 - heads) / 0.5)
    assert coin <= kl_of_best_of(n) + 1e-12
