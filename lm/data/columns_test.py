"""Columns as Arrow and NumPy have them against the same as Python's lists, also of rows that were selected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st

from lm.data import columns
from lm.data.columns import Rows, counted, numbered, places_of, rows_where, sizes

ROWS: list[dict[str, Any]] = [
    {"id": "a", "ids": [1, 2, 3], "samples": [[1], [2, 3]], "number": 1.5, "pair": [0.5, 1.0]},
    {"id": "b", "ids": [], "samples": [], "number": None, "pair": [1.5, 2.0]},
    {"id": "c", "ids": [4], "samples": None, "number": 2.0, "pair": [2.5, 3.0]},
    {"id": "a", "ids": [5, 6], "samples": [[7, 8, 9]], "number": -1.0, "pair": [3.5, 4.0]},
]
SELECTED = [3, 0, 2]


@pytest.fixture(params=["whole", "selected", "in pieces"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Dataset, list[dict[str, Any]]]:
    """A dataset, and what is in it."""
    monkeypatch.setattr(columns, "BLOCK", 2)
    monkeypatch.setattr(columns.tables, "__defaults__", (None, 2))
    whole = Dataset.from_list(ROWS)
    if request.param == "whole":
        return whole, ROWS
    if request.param == "selected":
        return whole.select(SELECTED), [ROWS[i] for i in SELECTED]
    return concatenate_datasets([whole.select([1, 3]), whole]), [ROWS[1], ROWS[3], *ROWS]


def test_sizes_numbers_and_lists(rows: tuple[Dataset, list[dict[str, Any]]]) -> None:
    dataset, expected = rows
    assert sizes(dataset, "ids").tolist() == [len(row["ids"]) for row in expected]
    samples = [list(map(len, row["samples"] or ())) for row in expected]
    assert columns.longest_inside(dataset, "samples").tolist() == [max(one, default=0) for one in samples]
    assert columns.sizes_inside(dataset, "samples").tolist() == list(map(sum, samples))
    found = columns.numbers(dataset, "number")
    np.testing.assert_array_equal(found, [np.nan if row["number"] is None else row["number"] for row in expected])
    assert columns.matrix(dataset, "pair").tolist() == [row["pair"] for row in expected]
    assert columns.listed(columns.matrix(dataset, "pair")).to_pylist() == [row["pair"] for row in expected]
    with pytest.raises(ValueError, match=r"ids has lists of .* values; all rows must have as many"):
        columns.matrix(dataset, "ids")
    assert (columns.is_listed(dataset, "ids"), columns.is_listed(dataset, "number")) == (True, False)


def test_rows_by_value_and_their_count(rows: tuple[Dataset, list[dict[str, Any]]]) -> None:
    dataset, expected = rows
    ids = [row["id"] for row in expected]
    assert rows_where(dataset, "id", ["a", "z"]).tolist() == [i for i, one in enumerate(ids) if one == "a"]
    assert counted(dataset, "id") == {one: ids.count(one) for one in ids}
    assert counted(dataset, "nothing") == {}
    assert places_of(["c", "z", "a"], columns.column(dataset, "id")).tolist() == [ids.index("c"), -1, ids.index("a")]


def test_token_ids_laid_end_to_end(rows: tuple[Dataset, list[dict[str, Any]]]) -> None:
    dataset, expected = rows
    found = Rows.of(dataset, "ids")
    assert [row.tolist() for row in found] == [row["ids"] for row in expected]
    assert found.arrow().to_pylist() == [row["ids"] for row in expected]
    assert found.flat.dtype == np.int32
    twice = Rows.of(dataset, "ids", "ids")
    assert [row.tolist() for row in twice] == [row["ids"] for row in expected] * 2
    assert [row.tolist() for row in twice[1:3]] == [row.tolist() for row in list(twice)[1:3]]
    assert found[-1].tolist() == expected[-1]["ids"]
    assert [row.tolist() for row in found.taken([2, 0, 2])] == [expected[i]["ids"] for i in (2, 0, 2)]
    assert Rows.joined([]).arrow().to_pylist() == []
    with pytest.raises(IndexError, match=f"row {len(expected)} of {len(expected)}"):
        found[len(expected)]


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=6))
def test_lists_and_back(lists: list[list[int]]) -> None:
    assert [row.tolist() for row in Rows.from_lists(lists)] == lists


@given(st.lists(st.text("ab", min_size=1, max_size=2), max_size=20))
def test_numbers_in_order_of_appearance(texts: list[str]) -> None:
    which, first = numbered(columns.digests(texts))
    different = list(dict.fromkeys(texts))
    assert which.tolist() == [different.index(text) for text in texts]
    assert first.tolist() == [texts.index(text) for text in different]


def test_what_is_written_is_opened_from_its_file(tmp_path: Path) -> None:
    dataset = Dataset.from_list(ROWS)
    made = columns.written(columns.tables(dataset, rows=3), dataset.features, tmp_path / "rows.arrow")
    assert list(made) == ROWS
    assert [Path(file["filename"]) for file in made.cache_files] == [tmp_path / "rows.arrow"]
    assert len(columns.column(made.select([]), "id")) == 0
