"""Reward columns: one vocabulary for files, runs, trainers and diagnosis, and the older names that are still read.

The *one reward* is that of the reward model of all pairs (of D_rho in a run), `chosen_reward` and `rejected_reward`;
the ensemble's *members* have lists, `chosen_member_rewards` and `rejected_member_rewards`, one entry a member.
Differences, chosen less rejected, are `reward_margin` and `member_margins`. Rewards are on the scale of whoever gave
them. No other module spells one of these names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lm.data.rows import column, number, shown

if TYPE_CHECKING:
    from datasets import Dataset

Floats = npt.NDArray[np.float64]
Sides = tuple[list[float], list[float]]
"""Rewards of the chosen and of the rejected side, [K] each."""
Source = tuple[str, ...]
"""Columns that together give a reward margin: of the chosen and of the rejected side, or the margin alone."""

ONE = ("chosen_reward", "rejected_reward")
MEMBERS = ("chosen_member_rewards", "rejected_member_rewards")
MARGIN, MEMBER_MARGINS = "reward_margin", "member_margins"

ORACLE = ("oracle_chosen_reward", "oracle_rejected_reward")
"""What a run's judge gave when it labelled the pairs. Not among a set's own rewards: nothing distils them from here."""

OLDER_ONE = ("score_chosen", "score_rejected")
"""What some sets of the hub, and earlier exports, call the one reward."""
OLDER_MEMBERS = ("chosen_rewards", "rejected_rewards")
"""What earlier files call the members' rewards. In artifacts of earlier runs the one reward is the first of them."""
OLDER_MARGIN = "margin"

OF_ONE: tuple[Source, ...] = (ONE, OLDER_ONE, (MARGIN,), (OLDER_MARGIN,))
OF_MEMBERS: tuple[Source, ...] = (MEMBERS, OLDER_MEMBERS, (MEMBER_MARGINS,))
"""Where the rewards of a set may stand; of several that are there, the first is read, and the others have to agree."""
EVERY = tuple(name for source in (*OF_ONE, *OF_MEMBERS) for name in source)
"""Every column that `given` reads."""


def of_model(name: str) -> Source:
    """The columns of one model's own rewards, beside those that are distilled."""
    return tuple(f"{side}_{name}" for side in ONE)


def named(source: Source) -> str:
    """A source in words: "chosen_reward - rejected_reward", "reward_margin"."""
    return " - ".join(source)


def either(sources: Iterable[Source]) -> str:
    """Sources to choose from, in words: "chosen_reward and rejected_reward or reward_margin"."""
    return " or ".join(" and ".join(source) for source in sources)


# ---------------------------------------------------------------- a set's own rewards


def given(row: Mapping[str, Any], where: str, why: str = "data.rewards is 'given'") -> dict[str, Any]:
    """A row's own rewards as ONE and MEMBERS have them; the lists are empty where there is no ensemble.

    The members are lists of two or more (a list of one entry is the one reward), or `member_margins`, as rewards of
    chosen against zero. The one reward is in the columns of OF_ONE, a margin likewise, or else the members' mean.

    Args:
        row: columns and values; None counts as not there.
        where: the row stands, for messages.
        why: rewards are wanted, likewise.

    Raises:
        ValueError: there is no reward, one is missing or not finite, or two columns contradict each other.
    """
    return _read(row, where, why)[0]


class Reader:
    """`given` of one row after another of a set, which must be alike: as many members each, and the one reward in all
    of them or in none, where the members' mean takes its place.

    Args:
        why: as of `given`.

    Raises:
        ValueError: as of `given`, or a row is unlike the first.
    """

    def __init__(self, why: str = "data.rewards is 'given'") -> None:
        self.why = why
        self._first: tuple[int, bool] | None = None

    def __call__(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        rewards, is_mean = _read(row, where, self.why)
        count = len(rewards[MEMBERS[0]])
        if self._first is None:
            self._first = count, is_mean
        members, was_mean = self._first
        if count != members:
            raise ValueError(f"{where}: {count} rewards in an ensemble's lists, {members} in the rows before")
        if is_mean != was_mean:
            one, other = ("none", "one") if is_mean else ("one", "none")
            raise ValueError(
                f"{where}: {either(OF_ONE)} is the one reward: {one} here, {other} in the rows before, where the "
                "mean of the members would take its place; give it in all rows, or in none"
            )
        return rewards


def margins(rewards: Mapping[str, Any]) -> tuple[float, list[float]]:
    """The one margin and the members' of what `given` returns."""
    one, members = ([rewards[name] for name in names] for names in (ONE, MEMBERS))
    return one[0] - one[1], [chosen - rejected for chosen, rejected in zip(*members, strict=True)]


def _read(row: Mapping[str, Any], where: str, why: str) -> tuple[dict[str, Any], bool]:
    """The rewards, and whether the one is the mean of several."""
    (of_one, ones), (of_members, listed) = (
        _sides(row, where, sources, lists=sources is OF_MEMBERS) for sources in (OF_ONE, OF_MEMBERS)
    )
    if not ones[0] and not listed[0]:
        raise ValueError(
            f"{where}: {why}, but the row has none: no {either((ONE, (MARGIN,)))}, and no "
            f"{either((MEMBERS, (MEMBER_MARGINS,)))}; there are {shown(sorted(row))}"
        )
    if ones[0] and len(listed[0]) == 1:
        told = {named(of_one): ones[0][0] - ones[1][0], named(of_members): listed[0][0] - listed[1][0]}
        if not _agree(ones, listed):
            raise ValueError(
                f"{where}: the reward margins contradict each other: {told}; a list of one entry is the one reward "
                "too: leave one of them"
            )
    source, sides = (of_one, ones) if ones[0] else (of_members, listed)
    main = [
        number(sum(side) / len(side), f"the mean of {name}", where)
        for name, side in zip((source[0], source[-1]), sides, strict=True)
    ]
    members = listed if len(listed[0]) > 1 else ([], [])
    return dict(zip((*ONE, *MEMBERS), (*main, *members), strict=True)), len(sides[0]) > 1


def _sides(row: Mapping[str, Any], where: str, sources: Iterable[Source], *, lists: bool) -> tuple[Source, Sides]:
    """The first source that is there, and its rewards of the chosen and of the rejected side, [K] each, K = 1 without
    lists; all empty where there is none. ValueError where a value is missing or not finite, or sources contradict each
    other."""
    found: dict[Source, Sides] = {}
    for source in sources:
        if all(row.get(name) is None for name in source):
            continue
        sides = [
            [number(value, name, where) for value in (column(row, name, list, where) if lists else [row.get(name)])]
            for name in source
        ]
        chosen, rejected = sides if len(sides) == 2 else (sides[0], [0.0] * len(sides[0]))
        if len(chosen) != len(rejected):
            raise ValueError(
                f"{where}: {source[0]} and {source[1]} must be of one length, got {len(chosen)} and {len(rejected)}"
            )
        found[source] = chosen, rejected
    margins = {named(source): [c - r for c, r in zip(*sides, strict=True)] for source, sides in found.items()}
    told = margins if lists else {name: margin for name, (margin,) in margins.items()}
    if not all(math.isfinite(margin) for each in margins.values() for margin in each):
        raise ValueError(f"{where}: the difference of the rewards must be a finite number, got {told}")
    first = next(iter(found.values()), ([], []))
    if not all(_agree(first, each) for each in found.values()):
        raise ValueError(f"{where}: the reward margins contradict each other: {told}; leave one of them")
    return next(iter(found.items()), ((), ([], [])))


def _agree(one: Sides, other: Sides) -> bool:
    """Whether the margins are the same to a millionth of the largest reward that they are the differences of."""
    if len(one[0]) != len(other[0]):
        return False
    return all(
        abs((a - b) - (c - d)) <= 1e-6 * max(1, abs(a), abs(b), abs(c), abs(d))
        for a, b, c, d in zip(*one, *other, strict=True)
    )


# ---------------------------------------------------------------- rewards in an artifact


def stored(pairs: Dataset) -> tuple[list[Floats], list[Floats]] | None:
    """What a run's artifact holds of rewards, or None: the one reward, [N], and the members', [N, K] (K may be 0), of
    the chosen and of the rejected completions each. In an earlier version's the one reward is the first of a list."""
    from lm.data.columns import matrix, numbers  # datasets comes with it

    names = set(pairs.column_names)
    if set(ONE) <= names:
        members = [matrix(pairs, name) if name in names else np.empty((len(pairs), 0)) for name in MEMBERS]
        return [numbers(pairs, name) for name in ONE], members
    if set(OLDER_MEMBERS) <= names:
        both = [matrix(pairs, name) for name in OLDER_MEMBERS]
        return [side[:, 0] for side in both], [side[:, 1:] for side in both]
    return None


def checked_column(pairs: Dataset, name: str) -> Floats:
    """`checked` of a column, [N] or [N, K], which is looked at row by row only where something is wrong with it."""
    from lm.data.columns import is_listed, matrix, numbers

    try:
        values = matrix(pairs, name) if is_listed(pairs, name) else numbers(pairs, name)
    except ValueError:  # rows differ in length
        values = np.full(1, np.nan)
    return values if np.isfinite(values).all() else checked(pairs[name][:], name, pairs["id"][:])


def checked(values: Floats | Sequence[Any], name: str, ids: Sequence[str]) -> Floats:
    """Numbers of a column, [N] or [N, K]; ValueError, with the row's id, where one is missing or not finite, or rows
    differ in how many they have."""
    if isinstance(values, np.ndarray) and np.isfinite(values).all():
        return values
    first = values[0] if len(values) and isinstance(values[0], list) else [0]
    for row, value in zip(ids, values, strict=True):
        listed = value if isinstance(value, list) else [value]
        if any(v is None or not abs(v) < float("inf") for v in listed):
            raise ValueError(f"row {row}: {name} is {value}; every value must be there and finite")
        if len(listed) != len(first):
            raise ValueError(f"row {row}: {name} has {len(listed)} values, row {ids[0]} has {len(first)}")
    return np.array(values, dtype=np.float64)
