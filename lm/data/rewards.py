"""Reward columns: one vocabulary for files, runs, trainers and diagnosis, and the older names that are still read.

The *one reward* is that of the reward model of all pairs (of D_rho in a run), `chosen_reward` and `rejected_reward`;
the ensemble's *members* have lists, `chosen_member_rewards` and `rejected_member_rewards`, one entry a member.
Differences, chosen less rejected, are `reward_margin` and `member_margins`. Rewards are on the scale of whoever gave
them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lm.data.rows import column, number, shown

if TYPE_CHECKING:
    from datasets import Dataset

Floats = npt.NDArray[np.float64]

ONE = ("chosen_reward", "rejected_reward")
MEMBERS = ("chosen_member_rewards", "rejected_member_rewards")
MARGIN, MEMBER_MARGINS = "reward_margin", "member_margins"

OLDER_ONE = ("score_chosen", "score_rejected")
"""What some sets of the hub, and earlier exports, call the one reward."""
OLDER_MEMBERS = ("chosen_rewards", "rejected_rewards")
"""What earlier files call the members' rewards. In artifacts of earlier runs the one reward is the first of them."""
OLDER_MARGIN = "margin"

ONES = (ONE, OLDER_ONE)
LISTS = (MEMBERS, OLDER_MEMBERS)
MARGINS = (MARGIN, OLDER_MARGIN)
EVERY = (*(name for names in (*ONES, *LISTS) for name in names), *MARGINS, MEMBER_MARGINS)
"""Every column that `given` reads."""


def given(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row's own rewards as ONE and MEMBERS have them; the lists are empty where there is no ensemble.

    The members are lists of two or more (a list of one entry is the one reward), or `member_margins`, as rewards of
    chosen against zero. The one reward is in the columns of ONES, or a margin, likewise, or else the members' mean.

    Raises ValueError where there is no reward, one is missing or not finite, or two columns contradict each other.
    """
    listed: list[list[float]] = [[], []]
    kinds = [names for names in LISTS if any(row.get(name) is not None for name in names)]
    if row.get(MEMBER_MARGINS) is not None:
        kinds.append((MEMBER_MARGINS,))
    if len(kinds) > 1:
        raise ValueError(
            f"{where}: the members' rewards are there twice, as {' and as '.join(', '.join(k) for k in kinds)}; leave "
            "one of them"
        )
    for names in kinds:
        listed = [[number(v, name, where) for v in column(row, name, list, where)] for name in names]
        if len(names) == 1:
            listed.append([0.0] * len(listed[0]))
        if len(listed[0]) != len(listed[1]):
            raise ValueError(
                f"{where}: {names[0]} and {names[1]} must be of one length, got {len(listed[0])} and {len(listed[1])}"
            )
    ones: dict[str, tuple[float, float]] = {}
    for names in ONES:
        if any(row.get(name) is not None for name in names):
            one, other = (number(row.get(name), name, where) for name in names)
            ones[" - ".join(names)] = one, other
    for name in MARGINS:
        if row.get(name) is not None:
            ones[name] = number(row[name], name, where), 0.0
    margins = {name: one - other for name, (one, other) in ones.items()}
    if any(not math.isfinite(margin) for margin in margins.values()):
        raise ValueError(f"{where}: the difference of the rewards must be a finite number, got {margins}")
    if any(not math.isclose(m, next(iter(margins.values())), rel_tol=1e-6, abs_tol=1e-6) for m in margins.values()):
        raise ValueError(f"{where}: the reward margins contradict each other: {margins}; leave one of them")
    if ones:
        main = next(iter(ones.values()))
    elif listed[0]:
        main = _mean(listed[0], kinds[0][0], where), _mean(listed[1], kinds[0][-1], where)
    else:
        raise ValueError(
            f"{where}: data.rewards is 'given', but the row has none: no {ONE[0]} and {ONE[1]}, {MEMBERS[0]} and "
            f"{MEMBERS[1]}, or {MARGIN}; there are {shown(sorted(row))}"
        )
    members = listed if len(listed[0]) > 1 else [[], []]
    return dict(zip((*ONE, *MEMBERS), (*main, *members), strict=True))


def _mean(values: list[float], name: str, where: str) -> float:
    return number(sum(values) / len(values), f"the mean of {name}", where)


def stored(pairs: Dataset) -> tuple[list[Floats], list[Floats]] | None:
    """What a run's artifact holds of rewards, or None: the one reward, [N], and the members', [N, K] (K may be 0), of
    the chosen and of the rejected completions each. In an earlier version's the one reward is the first of a list."""
    names = set(pairs.column_names)
    if set(ONE) <= names:
        members = [
            np.array(pairs[name][:], dtype=np.float64).reshape(len(pairs), -1)
            if name in names
            else np.empty((len(pairs), 0))
            for name in MEMBERS
        ]
        return [np.array(pairs[name][:], dtype=np.float64) for name in ONE], members
    if set(OLDER_MEMBERS) <= names:
        both = [np.array(pairs[name][:], dtype=np.float64).reshape(len(pairs), -1) for name in OLDER_MEMBERS]
        return [side[:, 0] for side in both], [side[:, 1:] for side in both]
    return None


def checked(values: Sequence[Any], name: str, ids: Sequence[str]) -> Floats:
    """Numbers of a column, [N] or [N, K]; ValueError, with the row's id, where one is missing or not finite, or rows
    differ in how many they have."""
    lengths = {len(value) if isinstance(value, list) else None for value in values}
    for row, value in zip(ids, values, strict=True):
        listed = value if isinstance(value, list) else [value]
        if any(v is None or not abs(v) < float("inf") for v in listed):
            raise ValueError(f"row {row}: {name} is {value}; every value must be there and finite")
        if len(lengths) > 1 and len(listed) != len(values[0] if isinstance(values[0], list) else [0]):
            raise ValueError(f"row {row}: {name} has {len(listed)} values, the rows before have another number")
    return np.array(values, dtype=np.float64)
