"""Limits that are taken from the data: what 99% of the rows keep to, and what is left out by them is counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm.base.files import write_jsonl
from lm.base.options import parse
from lm.config import DataConfig
from lm.stages.data import data, opened, sized
from lm.stages.run import Run


def prepared(folder: Path, lengths: list[int], *options: str) -> Run:
    """A run whose data stage is done, on pairs of which the longer completion has so many words."""
    rows = [
        {"prompt": f"{i} ?", "chosen": " a" * (1 if i % 2 else n), "rejected": " b" * (n if i % 2 else 1)}
        for i, n in enumerate(lengths)
    ]
    write_jsonl(folder / "pairs.jsonl", rows)
    own = [
        "--data.kind",
        "preferences",
        "--data.path",
        str(folder / "pairs.jsonl"),
        "--output_dir",
        str(folder / "run"),
    ]
    run = Run(parse("lm.test", "", [*own, "--data.valid_fraction", "0.3", *options])[0])
    data(run)
    return run


def test_one_row_in_a_hundred_may_be_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = prepared(tmp_path, [3] * 198 + [50, 60])
    limits = data(run).metrics["limits"]
    assert limits["max_completion_length"] == 3 + 1, "end-of-text is counted"
    report = data(run).metrics["preferences"]
    assert report["dropped"] == {"completion longer than 4 tokens": 2}
    assert sum(report["kept"].values()) == 198
    assert sized(run).data.limits == (limits["max_prompt_length"], 4)
    assert run.config.data.max_completion_length is None, "the key is that of limits from the data"
    said = capsys.readouterr().err
    assert "completions of at most 4, to which 99% of the rows keep" in said
    assert f"warning: the valid split has n = {report['kept']['valid']} pairs" in said


def test_of_few_rows_the_longest_counts_and_a_limit_that_is_named_is_one(tmp_path: Path) -> None:
    run = prepared(tmp_path, [*range(1, 31), 40], "--data.max_prompt_length", "9")
    assert sized(run).data.limits == (9, 41)
    assert max(map(len, opened(data(run).path / "preferences")["chosen_ids"][:])) <= 41
    assert data(run).metrics["preferences"]["dropped"] == {}


def test_limits_that_are_named_are_asked_of_no_row(tmp_path: Path) -> None:
    run = prepared(tmp_path, [3] * 30, "--data.max_prompt_length", "9", "--data.max_completion_length", "9")
    assert "limits" not in data(run).metrics
    assert sized(run) is run.config


@pytest.mark.parametrize("prompts", [1, 2])
def test_a_set_of_too_few_prompts_says_so(prompts: int, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i % prompts}?", "chosen": f" {i}", "rejected": " b"} for i in range(8)]
    write_jsonl(tmp_path / "few.jsonl", rows)
    own = ["--data.kind", "preferences", "--data.path", str(tmp_path / "few.jsonl")]
    run = Run(parse("lm.test", "", [*own, "--output_dir", str(tmp_path / "run")])[0])
    with pytest.raises(ValueError, match=rf"all 8 pairs are of {prompts} prompts?, and a prompt is in one split"):
        data(run)


def test_what_reads_no_data_asks_for_numbers() -> None:
    config = DataConfig(kind="hh", path="x", max_prompt_length=None)
    with pytest.raises(ValueError, match=r"must be numbers here, where no data is read; got None and 128"):
        assert config.limits
