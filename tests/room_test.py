"""What a run is said to take on the disk is what it took, and a run without room for it begins nothing."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lm.base.store import Refused
from lm.config import Config, LoraConfig, TrainingConfig
from lm.models.loading import SCRATCH
from lm.objectives import DRDO
from lm.reporting.results import results
from lm.stages.room import Need, check_room, missing, needs
from lm.stages.run import Run
from tests.pipeline_test import WORLD, config, steps

USAGE = namedtuple("USAGE", "total used free")


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCRATCH, "scratch:tiny", {**SCRATCH["scratch:tiny"], "hidden_size": 128, "vocab_size": 1000})
        yield


def small(folder: Path, **options: Any) -> Config:
    asked_for = {
        "methods": ["dpo", "e-dpo", "drdo"],
        "options": {"drdo": DRDO(oracle_alpha=0.01)},
        "sft": steps(1),
        "oracle": steps(1),
        "reward": steps(1),
        "policy": steps(2),
        "snapshots": 2,
    }
    return config(folder, WORLD, **{**asked_for, **options})


def taken(root: Path) -> dict[str, int]:
    """Bytes of each stage's files, those of two names once."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    for stage in sorted(root.iterdir(), key=lambda path: path.name != "features"):  # which heads share the body of
        files = {(one := path.stat()).st_ino: one.st_size for path in stage.rglob("*") if path.is_file()}
        found[stage.name] = sum(size for file, size in files.items() if file not in seen)
        seen |= files.keys()
    return {stage: size for stage, size in found.items() if stage not in ("data", ".work")}


CASES: dict[str, dict[str, Any]] = {
    "all parameters": {},
    "heads": {
        "oracle": TrainingConfig(train="head"),
        "reward": TrainingConfig(train="head"),
        "methods": ["dpo", "e-dpo"],
        "options": {},
    },
    "adapters": {"lora": LoraConfig(rank=4, stages=["reward", "policy"]), "dtype": "float64"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_within_a_factor_of_what_a_run_took(case: str, tmp_path: Path) -> None:
    run = Run(small(tmp_path, **CASES[case]))
    before = {need.stage: need for need in needs(run)}
    results(run)
    after = taken(tmp_path)
    assert before.keys() == after.keys(), "every stage is in it"
    for stage, size in after.items():
        if size > 200_000:
            assert 0.7 < before[stage].kept / size < 2, (stage, before[stage], size)
    total = sum(after.values())
    assert 0.8 < sum(need.kept for need in before.values()) / total < 1.5
    assert needs(Run(run.config)) == list(before.values())
    assert sum(need.kept for need in missing(needs(run), tmp_path)) < total / 3, "what is there is not asked for again"


def test_a_run_without_room_begins_nothing_and_says_how_much_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(small(tmp_path))
    needed = sum(need.kept for need in needs(run)) + max(need.passing for need in needs(run))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(10**12, 0, needed - 1))
    with pytest.raises(Refused) as told:
        results(run)
    text = str(told.value)
    assert re.match(r"about [\d.]+ MB are still to be written to .* \(policy [\d.]+ MB, reward [\d.]+ MB", text)
    assert re.search(r", where [\d.]+ MB are free; make room, name another output_dir, or ask for less", text)
    assert not text.count("\n")
    assert {path.name for path in tmp_path.iterdir()} <= {"data", ".work"}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(10**12, 0, needed))
    check_room(run)


def test_checkpoints_and_more_policies_count(tmp_path: Path) -> None:
    def of(stage: str, **options: Any) -> Need:
        return next(need for need in needs(Run(small(tmp_path, **options))) if need.stage == stage)

    plain = of("policy")
    assert plain.passing == 0
    assert of("policy", snapshots=1).kept == plain.kept / 2
    assert of("policy", sweep={"dpo": [{"beta": 0.1}, {"beta": 1.0}]}).kept == plain.kept * 4 / 3
    model = of("sft").kept
    saving = of("policy", policy=replace(steps(2), save_steps=1))
    assert saving.kept == plain.kept
    assert 8 * model < saving.passing < 9 * model
    last = of("reward", reward=replace(steps(1), evaluations=0))
    assert last.passing == 0
    assert of("reward").passing == model, "the best so far, while a better one is written"


def test_what_was_written_is_not_asked_for_again(tmp_path: Path) -> None:
    (tmp_path / "sft" / "policy-0").mkdir(parents=True)
    (tmp_path / "sft" / "policy-0" / "model").write_bytes(bytes(70))
    assert missing([Need("sft", 100, 5), Need("reward", 30)], tmp_path) == [Need("sft", 30, 5), Need("reward", 30)]
    assert missing([Need("sft", 70, 5)], tmp_path) == []
