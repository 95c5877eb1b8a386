"""A biased subset has exactly the asked share and size, or the refusal names the largest size that can be had."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import get_args

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lm.bias import LengthClass, biased_subset, counts, largest_feasible, length_class

classes_of = st.lists(st.sampled_from(["longer", "shorter", "neither"]), max_size=60)
shares = st.one_of(
    st.sampled_from([0.0, 0.2, 0.3, 0.5, 0.7, 0.8, 1.0]),
    st.integers(0, 1000).map(lambda n: n / 1000),
    st.integers(1, 9).map(lambda n: n / 100),  # a small share: many sizes round to the same few pairs
)


def feasible(classes: list[LengthClass], share: float, size: int) -> bool:
    """Referee in exact decimal arithmetic: round half up, then count."""
    longer = math.floor(Fraction(str(share)) * size + Fraction(1, 2))
    return longer <= classes.count("longer") and size - longer <= classes.count("shorter")


@given(shares, st.integers(0, 10_000))
def test_counts_are_the_share_to_the_nearest_pair(share: float, size: int) -> None:
    longer, shorter = counts(share, size)
    assert longer + shorter == size
    assert longer == math.floor(Fraction(str(share)) * size + Fraction(1, 2))


def test_half_a_pair_is_rounded_up_in_decimal_not_in_binary() -> None:
    assert 0.29 * 50 < 14.5, "the binary product is below the half that the decimal one is"
    assert counts(0.29, 50) == (15, 35)


@given(classes_of, shares)
@example(["shorter"] * 10, 0.01)
@example(["longer"] + ["shorter"] * 40, 0.04)
def test_the_largest_feasible_size_is_feasible_and_one_more_is_not(classes: list[LengthClass], share: float) -> None:
    most = largest_feasible(classes, share)
    assert feasible(classes, share, most)
    assert not any(feasible(classes, share, size) for size in range(most + 1, len(classes) + 2))


@given(classes_of, shares, st.data())
def test_a_subset_has_exact_counts_and_no_duplicates(
    classes: list[LengthClass], share: float, data: st.DataObject
) -> None:
    most = largest_feasible(classes, share)
    assume(most > 0)
    size = data.draw(st.integers(1, most), "size")
    seed = data.draw(st.integers(0, 5), "seed")
    rows = biased_subset(classes, share, size, seed=seed, what="bias.size")
    assert rows == sorted(set(rows))
    drawn = [classes[i] for i in rows]
    assert (drawn.count("longer"), drawn.count("shorter")) == counts(share, size)
    assert len(drawn) == size
    assert rows == biased_subset(classes, share, size, seed=seed, what="bias.size")


@given(classes_of, shares, st.integers(1, 5))
def test_more_than_feasible_is_refused_with_the_largest_size(
    classes: list[LengthClass], share: float, more: int
) -> None:
    most = largest_feasible(classes, share)
    with pytest.raises(ValueError, match=rf"bias\.size: {most + more} pairs .* the largest feasible size is {most}$"):
        biased_subset(classes, share, most + more, seed=0, what="bias.size")


def test_without_a_size_the_largest_is_taken_and_nothing_is_refused() -> None:
    longer, shorter, neither = (list[LengthClass]([name]) for name in get_args(LengthClass))
    classes = longer * 10 + shorter * 8 + neither * 5
    assert len(biased_subset(classes, 0.2, None, seed=0, what="bias.size")) == 10
    with pytest.raises(ValueError, match="the largest feasible size is 0"):
        biased_subset(neither * 3, 0.5, None, seed=0, what="bias.size")


def test_other_seeds_draw_other_rows() -> None:
    both: list[LengthClass] = ["longer", "shorter"]
    classes = both * 50
    assert len({tuple(biased_subset(classes, 0.5, 20, seed=seed, what="bias.size")) for seed in range(5)}) == 5


@given(st.integers(1, 500), st.integers(1, 500), st.sampled_from([1.1, 1.2, 1.25, 1.5, 2.0]))
def test_length_classes_are_exact_and_antisymmetric(chosen: int, rejected: int, ratio: float) -> None:
    ours = length_class(chosen, rejected, ratio)
    exact = Fraction(str(ratio))
    assert (ours == "longer") == (chosen >= exact * rejected)
    assert (ours == "shorter") == (rejected >= exact * chosen)
    swapped = length_class(rejected, chosen, ratio)
    assert swapped == {"longer": "shorter", "shorter": "longer", "neither": "neither"}[ours]


def test_exactly_ten_per_cent_more_is_longer() -> None:
    assert 55 < 1.1 * 50, "the binary product is above the decimal one"
    assert length_class(55, 50, 1.1) == "longer"
    assert length_class(50, 55, 1.1) == "shorter"
    assert length_class(109, 100, 1.1) == "neither"
