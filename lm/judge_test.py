"""The judge: verdicts, orders, the log, and every way in which an endpoint fails."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.judge import win_rates


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=30))
def test_win_rates_count_each_prompt_once_and_mirror(rows: list[tuple[int, int]]) -> None:
    rewards, against = np.array(rows, dtype=float).T
    rates = win_rates(rewards, against)
    assert rates["n"] == len(rows)
    assert rates["win"] + rates["tie"] + rates["loss"] == pytest.approx(1)
    assert rates["win"] == pytest.approx(sum(a > b for a, b in rows) / len(rows))
    assert rates["tie"] == pytest.approx(sum(a == b for a, b in rows) / len(rows))
    mirrored = win_rates(against, rewards)
    assert (mirrored["win"], mirrored["tie"], mirrored["loss"]) == (rates["loss"], rates["tie"], rates["win"])


@pytest.mark.parametrize(
    ("rewards", "against", "message"),
    [
        ([1.0], [1.0, 2.0], r"one shape \[N\], N > 0; got \(1,\), \(2,\)"),
        ([], [], r"N > 0; got \(0,\), \(0,\)"),
        ([0.0, float("nan")], [0.0, 0.0], r"rewards\[1\] is nan; every reward must be finite"),
        ([0.0], [float("inf")], r"against\[0\] is inf"),
    ],
)
def test_win_rates_of_nothing_to_compare(rewards: list[float], against: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        win_rates(np.array(rewards), np.array(against))
