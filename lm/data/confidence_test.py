"""Subsets by confidence and edit distance: what is inside, what is not, and what cannot be asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.config import Pairs
from lm.data.confidence import certainty, edit_distance, subset

TOKENS = st.lists(st.integers(2, 6), max_size=8)
ROWS = st.lists(st.tuples(st.none() | st.integers(1, 9), TOKENS, TOKENS), min_size=1, max_size=40)


def recursive_distance(one: Sequence[int], other: Sequence[int]) -> int:
    """The definition."""
    if not one or not other:
        return len(one) + len(other)
    return min(
        recursive_distance(one[1:], other[1:]) + (one[0] != other[0]),
        recursive_distance(one[1:], other) + 1,
        recursive_distance(one, other[1:]) + 1,
    )


@given(st.lists(st.integers(2, 4), max_size=5), st.lists(st.integers(2, 4), max_size=5))
def test_the_distance_is_the_least_number_of_edits_whatever_both_end_with(one: list[int], other: list[int]) -> None:
    assert edit_distance(one, other) == recursive_distance(one, other)
    assert edit_distance([*one, 1], [*other, 1]) == edit_distance(one, other), "end-of-text"


def test_certainty_is_the_distance_from_undecided_on_either_side() -> None:
    assert [certainty(c) for c in range(1, 10)] == [4, 3, 2, 1, 0, 1, 2, 3, 4]
    for off in (0, 10, -3, float("nan")):
        with pytest.raises(ValueError, match=f"confidence must be between 1 and 9, got {off}"):
            certainty(off)


@given(ROWS)
def test_both_subsets_are_on_their_side_of_both_medians(rows: list[tuple[int | None, list[int], list[int]]]) -> None:
    confidences, chosen, rejected = (list(column) for column in zip(*rows, strict=True))
    asked: Any = (confidences, chosen, rejected)
    known = [(abs(c - 5), table(a, b)) for c, a, b in rows if c is not None]
    found: dict[str, Any] = {}
    of_side: tuple[tuple[Pairs, int], ...] = (("hc_he", 1), ("lc_le", -1))
    for name, sign in of_side:
        medians = np.median(np.array(known), 0) if known else None
        inside = [
            i
            for i, (c, a, b) in enumerate(rows)
            if c is not None and medians is not None and all(sign * (np.array([abs(c - 5), table(a, b)]) - medians) > 0)
        ]
        if not inside:
            with pytest.raises(ValueError, match=r"none of the|no pair is (above|below) the median"):
                subset(name, *asked)
            continue
        found[name], report = subset(name, *asked)
        assert found[name].tolist() == inside
        assert report["pairs"] == len(inside)
        assert report["of"] == len(rows)
        assert report["without_confidence"] == len(rows) - len(known)
    assert not set(found.get("hc_he", [])) & set(found.get("lc_le", []))
    every, report = subset("all", *asked)
    assert (every.tolist(), report) == (list(range(len(rows))), {})


def table(one: list[int], other: list[int]) -> int:
    """Levenshtein by the usual table, written apart from the library."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def test_what_cannot_be_selected_is_said() -> None:
    ids = [[2, 3], [2], [4, 5, 6]]
    with pytest.raises(ValueError, match=r'bias.pairs "hc_he" selects by .* none of the 3 pairs has one'):
        subset("hc_he", [None] * 3, ids, ids)
    with pytest.raises(ValueError, match=r"no pair is above the median certainty 4 .* median edit distance 1;"):
        subset("hc_he", [9, 1, 9], ids, [[2], [3], [4]])
    with pytest.raises(ValueError, match="confidence must be between 1 and 9, got 12"):
        subset("lc_le", [12, 1, 9], ids, ids)
    with pytest.raises(ValueError, match="pairs must be one of all, hc_he, lc_le, got 'high'"):
        subset("high", [9, 1, 9], ids, ids)  # type: ignore[arg-type]
