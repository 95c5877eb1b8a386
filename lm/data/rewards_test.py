"""One vocabulary of reward columns: what is read as what, what is refused, and that it is spelt in one module."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from lm.config import DataConfig
from lm.data import rewards
from lm.data.rewards import EVERY, MEMBERS, ONE, ORACLE, Reader, checked, given, of_model, stored
from lm.data.tokens import load

ROOT = Path(__file__).parents[2]
LISTS = {"chosen_member_rewards": [1.0, 3.0], "rejected_member_rewards": [0.5, 0.0]}
OLDER = {"chosen_rewards": [1.0, 3.0], "rejected_rewards": [0.5, 0.0]}


def write_jsonl(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    ("row", "one", "members"),
    [
        ({"chosen_reward": 2, "rejected_reward": 0.5}, (2.0, 0.5), ([], [])),
        ({"score_chosen": 2, "score_rejected": 0.5}, (2.0, 0.5), ([], [])),
        ({"reward_margin": -1.5}, (-1.5, 0.0), ([], [])),
        ({"margin": -1.5}, (-1.5, 0.0), ([], [])),
        ({"margin": -1.5, "score_chosen": 1.0, "score_rejected": 2.5}, (1.0, 2.5), ([], [])),
        ({"reward_margin": -1.5, "chosen_reward": 1.0, "rejected_reward": 2.5, "margin": -1.5}, (1.0, 2.5), ([], [])),
        (LISTS, (2.0, 0.25), ([1.0, 3.0], [0.5, 0.0])),
        (OLDER, (2.0, 0.25), ([1.0, 3.0], [0.5, 0.0])),
        ({**LISTS, **OLDER, "member_margins": [0.5, 3.0]}, (2.0, 0.25), ([1.0, 3.0], [0.5, 0.0])),
        ({"member_margins": [1.0, 3.0]}, (2.0, 0.0), ([1.0, 3.0], [0.0, 0.0])),
        ({**OLDER, "score_chosen": 9.0, "score_rejected": 8.0}, (9.0, 8.0), ([1.0, 3.0], [0.5, 0.0])),
        ({**LISTS, "chosen_reward": 9.0, "rejected_reward": 8.0}, (9.0, 8.0), ([1.0, 3.0], [0.5, 0.0])),
        ({**OLDER, "margin": None}, (2.0, 0.25), ([1.0, 3.0], [0.5, 0.0])),
        ({"chosen_rewards": [4.0], "rejected_rewards": [1.0]}, (4.0, 1.0), ([], [])),
        ({"oracle_chosen_reward": 5.0, "oracle_rejected_reward": 1.0, "margin": 2.0}, (2.0, 0.0), ([], [])),
    ],
)
def test_given_rewards_are_the_one_and_the_members(
    row: dict[str, Any], one: tuple[float, float], members: tuple[list[float], list[float]]
) -> None:
    read = given(row, "here")
    assert read == dict(zip((*ONE, *MEMBERS), (*one, *members), strict=True))
    assert Reader()(row, "here") == read
    assert given(read if members[0] else {name: read[name] for name in ONE}, "again") == read, "what is written"
    margin, each = rewards.margins(read)
    assert (margin, each) == (one[0] - one[1], [c - r for c, r in zip(*members, strict=True)])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a"},
            "data.rewards is 'given', but the row has none: no chosen_reward and rejected_reward or reward_margin, and "
            r"no chosen_member_rewards and rejected_member_rewards or member_margins; there are \['prompt'\]",
        ),
        ({"oracle_chosen_reward": 5.0, "oracle_rejected_reward": 1.0}, "data.rewards is 'given', but the row has none"),
        ({"chosen_rewards": [], "rejected_rewards": []}, "data.rewards is 'given', but the row has none"),
        ({"score_chosen": 1.0}, "'score_rejected' must be a finite number, got None"),
        ({"score_chosen": 1.0, "score_rejected": float("nan")}, "'score_rejected' must be a finite number, got nan"),
        ({"chosen_reward": "1", "rejected_reward": 0.0}, "'chosen_reward' must be a finite number, got '1'"),
        ({"chosen_reward": [1.0], "rejected_reward": [0.0]}, r"'chosen_reward' must be a finite number, got \[1.0\]"),
        ({"margin": float("inf")}, "'margin' must be a finite number, got inf"),
        ({"chosen_rewards": [1.0, 2.0]}, "column 'rejected_rewards' is missing"),
        ({"chosen_member_rewards": [1.0, 2.0]}, "column 'rejected_member_rewards' is missing"),
        ({**OLDER, "rejected_rewards": 1.0}, "'rejected_rewards' must be of type list, got float"),
        ({**OLDER, "rejected_rewards": [1.0, None]}, "'rejected_rewards' must be a finite number, got None"),
        (
            {**OLDER, "rejected_rewards": [1.0]},
            "chosen_rewards and rejected_rewards must be of one length, got 2 and 1",
        ),
        (
            {"margin": 1.0, "score_chosen": 1.0, "score_rejected": 2.5},
            "the reward margins contradict each other: {'score_chosen - score_rejected': -1.5, 'margin': 1.0}; leave",
        ),
        (
            {"reward_margin": 1.0, "chosen_reward": 1.0, "rejected_reward": 2.5},
            "the reward margins contradict each other: {'chosen_reward - rejected_reward': -1.5, 'reward_margin': 1.0}",
        ),
        (
            {**LISTS, "member_margins": [0.5, 2.0]},
            "the reward margins contradict each other: {'chosen_member_rewards - rejected_member_rewards': "
            r"\[0.5, 3.0\], 'member_margins': \[0.5, 2.0\]}",
        ),
        (
            {"reward_margin": 5.0, "chosen_rewards": [1.0], "rejected_rewards": [9.0]},
            "the reward margins contradict each other: {'reward_margin': 5.0, 'chosen_rewards - rejected_rewards': -8.",
        ),
        ({**LISTS, **OLDER, "chosen_rewards": [1.0] * 3, "rejected_rewards": [0.5] * 3}, "the reward margins contradi"),
        (
            {"chosen_reward": 1e308, "rejected_reward": -1e308},
            "the difference of the rewards must be a finite number, got {'chosen_reward - rejected_reward': inf}",
        ),
        (
            {"chosen_rewards": [1e308, 1e308], "rejected_rewards": [1e308, 1e308]},
            "'the mean of chosen_rewards' must be a finite number, got inf",
        ),
    ],
)
def test_a_missing_or_contradictory_reward_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^here: {message}"):
        given(row, "here")


def test_differences_of_large_rewards_agree_as_far_as_these_are_written() -> None:
    row = {"chosen_reward": 1000.1, "rejected_reward": 999.9}
    assert given({**row, "margin": 0.199951171875}, "here") == given(row, "here"), "in float32"
    with pytest.raises(ValueError, match="contradict"):
        given({**row, "margin": 0.21}, "here")


def test_every_row_has_as_many_rewards_as_the_first(tmp_path: Path) -> None:
    text = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."}
    rows = [{**text, **LISTS}, {**text, "margin": 1.0}]
    config = DataConfig(kind="preferences", path=write_jsonl(tmp_path / "p.jsonl", rows), rewards="given")
    for name in ("given", "models"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"p.jsonl, line 2: 0 rewards in an ensemble's lists, 2 in the rows before"):
        load(config, 0, tmp_path / "given")
    loaded = load(replace(config, rewards="models"), 0, tmp_path / "models")
    assert len(loaded.preferences) == 2, "rewards that are not asked for are not read"
    assert not set(EVERY) & set(loaded.preferences.column_names)


@pytest.mark.parametrize("mean_first", [True, False])
def test_the_members_mean_takes_the_place_of_the_one_reward_in_all_rows_or_in_none(mean_first: bool) -> None:
    """A null among the one rewards would else be the mean, on another scale."""
    both: list[dict[str, Any]] = [{**LISTS, "chosen_reward": None, "rejected_reward": None}, {**LISTS, "margin": 70.0}]
    first, second = both if mean_first else both[::-1]
    read = Reader()
    read(first, "line 1")
    said = "one here, none in the rows before" if mean_first else "none here, one in the rows before"
    with pytest.raises(ValueError, match=f"^line 2: chosen_reward and rejected_reward or .* is the one reward: {said}"):
        read(second, "line 2")


def test_rows_of_one_set_may_use_older_names_and_newer_ones() -> None:
    read = Reader()
    rows = [{**LISTS, "margin": 1.0}, {**OLDER, "chosen_reward": 2.0, "rejected_reward": 1.0}]
    assert [rewards.margins(read(row, "here")) for row in rows] == [(1.0, [0.5, 3.0])] * 2


# ---------------------------------------------------------------- artifacts


def test_artifacts_of_today_and_of_earlier_runs_hold_the_same() -> None:
    today = {"chosen_reward": [5.0, 6.0], "rejected_reward": [1.0, 2.0]}
    members = {"chosen_member_rewards": [[1.0, 2.0], [3.0, 4.0]], "rejected_member_rewards": [[0.0, 1.0], [2.0, 3.0]]}
    older = {
        "chosen_rewards": [[5.0, 1.0, 2.0], [6.0, 3.0, 4.0]],
        "rejected_rewards": [[1.0, 0.0, 1.0], [2.0, 2.0, 3.0]],
    }
    now, then = stored(Dataset.from_dict({**today, **members})), stored(Dataset.from_dict(older))
    assert now is not None
    assert then is not None
    for one, other in zip((*now[0], *now[1]), (*then[0], *then[1]), strict=True):
        assert one.dtype == other.dtype == np.float64
        np.testing.assert_array_equal(one, other)
    alone = stored(Dataset.from_dict(today))
    assert alone is not None
    assert [side.shape for side in alone[1]] == [(2, 0), (2, 0)]
    assert stored(Dataset.from_dict({"id": ["a"]})) is None


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_a_column_that_lacks_a_number_is_refused_with_its_row(bad: float | None) -> None:
    assert checked([[1.0, 2.0], [3.0, 4.0]], "x", ["a", "b"]).shape == (2, 2)
    with pytest.raises(ValueError, match=f"^row b: x is {bad}; every value must be there and finite"):
        checked([1.0, bad], "x", ["a", "b"])
    with pytest.raises(ValueError, match=r"^row b: x has 1 values, row a has 2$"):
        checked([[1.0, 2.0], [3.0]], "x", ["a", "b"])


# ---------------------------------------------------------------- spelt once

WATCHED = {*EVERY, *ORACLE, *(f"_{name}" for name in ("reward", "rewards"))} - {rewards.OLDER_MARGIN}
"""The columns' names, and the ends that they would be put together from; "margin" is a word with other uses."""
SPELT_IN = {"lm/data/rewards.py"}
OF_A_BATCH = {"known"}
"""Functions that are asked for a tensor of a `PairBatch`, not for a column."""


def spelt(code: str) -> list[str]:
    """Names of reward columns in string literals that are no docstrings."""
    tree = ast.parse(code)
    exempt = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in OF_A_BATCH:
            exempt |= {id(argument) for argument in node.args}
    return [
        word
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in exempt
        for word in re.findall(r"\w+", node.value)
        if word in WATCHED
    ]


def test_no_other_module_spells_a_reward_column() -> None:
    files = [path for path in (ROOT / "lm").rglob("*.py") if not path.stem.endswith("_test")]
    found = {path.relative_to(ROOT).as_posix(): spelt(path.read_text(encoding="utf-8")) for path in files}
    assert len(found) > 40
    assert {path: names for path, names in found.items() if names and path not in SPELT_IN} == {}
    assert set(found["lm/data/rewards.py"]) >= WATCHED - {"_reward", "_rewards"}


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ('row["chosen_reward"]', ["chosen_reward"]),
        ('f"either {x} or member_margins"', ["member_margins"]),
        ('f"{side}_rewards"', ["_rewards"]),
        ('f"{side}_reward_{name}"', []),  # of_model makes these
        ('"""Says reward_margin."""', []),
        ('pairs.known("reward_margin")', []),
        ('scores.get("reward_margin")', ["reward_margin"]),
        ("batch(reward_margin=1)", []),
        ('record["oracle_reward"], row["margin"]', []),
    ],
)
def test_the_rule_itself(code: str, names: list[str]) -> None:
    assert spelt(code) == names


def test_a_models_own_columns_are_called_after_it() -> None:
    assert of_model("A") == ("chosen_reward_A", "rejected_reward_A")
    assert not set(of_model("A")) & set(EVERY)
