"""Tokenising in parts: a run that broke goes on, and a text that stands twice has the same ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lm.data import tokens
from lm.data.control_tokens import LAST, MARK
from lm.data.tokens import ids_of_chosen, with_ids
from lm.models.loading import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("scratch:tiny", ["Why? good bad " * 20], False)


def pairs(count: int) -> Dataset:
    """Every prompt stands twice."""
    return Dataset.from_list(
        [
            {"id": str(i), "prompt": f"{i // 2}?", "chosen": f" good {i}", "rejected": f" bad {i}", "split": "train"}
            for i in range(count)
        ]
    )


def test_a_run_that_broke_goes_on_where_it_was(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, read = pairs(10), list[str]()
    expected = list(with_ids(rows, tokenizer, tmp_path / "whole"))
    whole = tokens.prompt_ids

    def counting(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
        if len(read) >= limit:
            raise MemoryError
        read.extend(texts)
        return whole(tokenizer, texts)

    monkeypatch.setattr(tokens, "PART", 4)
    monkeypatch.setattr(tokens, "prompt_ids", counting)
    limit = 4
    with pytest.raises(MemoryError):
        with_ids(rows, tokenizer, tmp_path / "parts")
    assert read == ["0?", "1?", "2?", "3?"], "a prompt once in a batch"
    assert len(list((tmp_path / "parts").iterdir())) == 2, "no half of a file"
    limit = 9
    assert list(with_ids(rows, tokenizer, tmp_path / "parts")) == expected
    assert read[4:] == ["4?"], "the first two parts are taken as they are"
    other = load_tokenizer("scratch:tiny", ["another text"], False)
    limit = 99
    assert list(with_ids(rows, other, tmp_path / "parts")) != expected, "control: parts by another tokenizer are not"


def test_chosen_sides_as_references_have_the_ids_of_their_own_texts(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = pairs(6)
    marked = rows.map(lambda row: {"chosen": "".join(MARK + c for c in "<|endoftext|>") + LAST}, keep_in_memory=True)
    for given in (rows, marked):
        made = with_ids(given, tokenizer, tmp_path / str(given is rows))
        references = given.select([4, 1]).remove_columns("rejected").rename_column("chosen", "completion")
        expected = with_ids(references, tokenizer, tmp_path / f"references-{given is rows}")
        found = ids_of_chosen(references, made)
        assert found.select_columns(expected.column_names).to_list() == expected.to_list()
        assert set(found.column_names) == set(expected.column_names)
