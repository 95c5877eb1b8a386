"""The made sets, every stage on a small one, and the arithmetic of the report. No speed is asserted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset

from lm import bench as door
from lm.stages import scores
from lm.stages.data import opened
from lm.studies import scale, scale_workers
from lm.studies.scale import growth, make_text, over_trl, rates, render
from lm.studies.scale_plan import STAGES, Job, Measured

PAIRS = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made set, and its model."""
    here = tmp_path_factory.mktemp("scale")
    make_text(here / "pairs.jsonl", PAIRS)
    scale_workers.make_model(here)
    return here


def test_made_text_is_shaped_like_tldr_and_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    words = sorted(len(row["prompt"].split()) for row in rows)
    assert len({row["prompt"] for row in rows}) == PAIRS
    assert words[PAIRS // 2] == pytest.approx(340, rel=0.1)
    assert words[-1] <= 510
    assert min(len(row["chosen"].split()) for row in rows) >= 10
    assert {row["confidence"] for row in rows} == set(range(1, 10))
    make_text(tmp_path / "again.jsonl", PAIRS)
    assert (tmp_path / "again.jsonl").read_text().splitlines() == lines
    make_text(tmp_path / "other.jsonl", PAIRS, seed=1)
    assert (tmp_path / "other.jsonl").read_text().splitlines() != lines, "control"


def test_every_stage_does_its_work(folder: Path) -> None:
    """All but TRL's, in this process."""
    sizes = {}
    for stage in STAGES[:-1]:
        written = scale_workers.DO[stage](folder)
        sizes[stage] = sum(file.stat().st_size for path in written for file in scale_workers._files(path))
    assert {stage for stage, size in sizes.items() if not size} == {"diagnose", "load"}
    scored = opened(next((folder / "run/score").glob("pairs-*")) / "pairs")
    for row in scored.select(range(5)):
        assert row["ref_chosen_logps"] == -len(row["chosen_ids"]), "the stand-in's, in the order of the rows"
        assert row["ref_rejected_logps"] == -len(row["rejected_ids"])
        assert row["ref_sample_logps"] == [-len(ids) for ids in row["sample_ids"]]
    assert len({tuple(row["sample_ids"][0]) for row in scored}) == len(scored), "each prompt has its own"


def test_a_stand_in_gives_each_completion_its_own_score() -> None:
    found = scale_workers.StandIn()(torch.zeros(9), [[3, 1, 2], [2, 1]]).logps
    assert found.tolist() == [-1, -2, -1]


def scored(folder: Path) -> Dataset:
    """Anew by the stand-in, two samples a prompt."""
    shutil.rmtree(folder / "run/score", ignore_errors=True)
    run = scale_workers.run_of(folder, "--sampling.reference_samples=2")
    with patch.object(scores, "open_policy", lambda *_: scale_workers.StandIn()):
        return opened(scores.scores(run).path / "pairs")


def test_samples_come_in_parts_which_a_run_that_broke_keeps(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every prompt has its own, whatever pair it stands in; what is drawn again is what the broken part lacked."""
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    again = [{**json.loads(line), "chosen": f" {i}."} for i, line in enumerate(lines[:50])]  # prompts that stand twice
    (tmp_path / "model").symlink_to(folder / "model")
    (tmp_path / "pairs.jsonl").write_text("\n".join([*lines, *map(json.dumps, again)]))
    asked: list[list[Any]] = []
    most = [99]

    def drawn(model: Any, prompts: Any, *rest: Any, **options: Any) -> list[list[int]]:
        if len(asked) == most[0]:
            raise KeyboardInterrupt
        asked.append([tuple(ids) for ids in prompts])
        return scale_workers.drawn(model, prompts, *rest, **options)

    monkeypatch.setattr(scores, "sample_completions", drawn)
    rows = scored(tmp_path)[:]
    (every,) = asked
    end, seed = rows["sample_ids"][0][0][-1], scale_workers.run_of(tmp_path).seed("score")
    samples = scale_workers.drawn(None, every, SimpleNamespace(eos_token_id=end), None, seed=seed, what="")
    of = {prompt: samples[2 * i : 2 * i + 2] for i, prompt in enumerate(every[::2])}
    assert every[::2] == every[1::2] == list(of)
    assert len(of) < len(rows["id"])
    assert rows["sample_ids"] == [of[tuple(ids)] for ids in rows["prompt_ids"]]
    assert rows["ref_sample_logps"] == [[-len(ids) for ids in both] for both in rows["sample_ids"]]

    monkeypatch.setattr(scores, "SAMPLES", 101)  # of 50 prompts, then
    asked.clear()
    in_parts = list(scored(tmp_path))
    most[0], parts = 2, list(asked)
    assert [len(part) for part in parts[:-1]] == [100] * (len(parts) - 1)
    assert [ids for part in parts for ids in part] == every
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        scored(tmp_path)
    most[0] = 99
    assert list(scored(tmp_path)) == in_parts
    assert asked == parts


def row(stage: str, pairs: int, cpu_seconds: float) -> dict[str, Any]:
    found = Measured(2 * cpu_seconds, cpu_seconds, 500.0, 400.0, 300.0, 7.0)
    return {"stage": stage, "pairs": pairs, **rates(pairs, found), **vars(found)}


def test_the_report_holds_prepare_against_trl_and_seconds_against_pairs() -> None:
    rows = [
        *(row("prepare", 10**n, 10 ** (n - 3)) for n in (3, 4, 5)),
        *(row("trl", 10**n, 3 * 10 ** (n - 3)) for n in (3, 4)),
        row("bias", 1000, 1.0),
    ]
    assert over_trl(rows) == pytest.approx({1000: 3, 10_000: 3})
    assert growth(rows, "prepare") == pytest.approx(1)
    squared = [row("bias", n, n**2) for n in (10, 100)]
    assert growth(squared, "bias") == pytest.approx(2), "control"
    assert growth(rows, "bias") is None
    text = render({"rows": rows})
    assert "10,000 pairs: prepare is 3.00 times as fast as TRL's preparation" in text
    assert "prepare 1.00, trl 1.00." in text


def test_the_command_writes_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[int]] = []

    def measure(sizes: list[int]) -> list[dict[str, Any]]:
        asked.append(sizes)
        return [row("prepare", n, 1.0) for n in sizes]

    monkeypatch.setattr(scale, "measure", measure)
    out = tmp_path / "scale.json"
    assert door.main(["--scale", "200", "100", "100", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert [r["pairs"] for r in document["rows"]] == [100, 200]
    assert {"machine", "provenance"} <= set(document)
    assert "| 100 " in capsys.readouterr().out
    assert door.main(["--scale"]) == 0
    assert asked == [[100, 200], [10_000, 100_000]]


def test_what_was_measured_before_a_break_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(sizes: list[int]) -> Iterator[dict[str, Any]]:
        yield row("prepare", sizes[0], 1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(scale, "measure", measure)
    out = tmp_path / "scale.json"
    assert door.main(["--scale", "100", "200", "--json", str(out)]) == 130
    assert [r["pairs"] for r in json.loads(out.read_text())["rows"]] == [100]


def test_a_stage_that_fails_is_named_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)prepare failed:\nTraceback .*pairs.jsonl"):
        scale.measured(Job("prepare", tmp_path))
