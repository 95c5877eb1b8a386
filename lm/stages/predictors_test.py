"""What predicts, by hand."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from lm.stages.predictors import repeated_disagreement


def pairs(*rows: tuple[str, str, str], **columns: list[Any]) -> Dataset:
    names = ("prompt", "chosen", "rejected")
    return Dataset.from_dict({**dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)), **columns})


def test_labels_of_a_pair_differ_as_often_as_two_rows_of_it_do() -> None:
    rows = (("p", "a", "b"), ("p", "b", "a"), ("p", "a", "b"), ("q", "a", "b"), ("r", "c", "d"), ("r", "c", "d"))
    assert repeated_disagreement(pairs(*rows)) == pytest.approx(2 / 4), "p: 2 of 3 differ; r: 0 of 1; q stands once"
    assert repeated_disagreement(pairs(*rows[:1], *rows[3:5])) is None, "no pair stands there twice"
    assert repeated_disagreement(pairs(*rows[4:])) == 0


def test_a_soft_label_differs_from_another_by_its_probability() -> None:
    rows = (("p", "a", "b"), ("p", "b", "a"))
    assert repeated_disagreement(pairs(*rows, chosen_probability=[0.7, 0.6])) == pytest.approx(0.7 * 0.6 + 0.3 * 0.4)
    assert repeated_disagreement(pairs(*rows, chosen_probability=[1.0, 1.0])) == 1
