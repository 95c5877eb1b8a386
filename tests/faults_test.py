"""What breaks a run is noticed and named, and loses no finished work: kills, damage, full disks, signals, bad numbers.

Whole runs are killed by `tests/kill.py`, whose comparison is tested here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from lm.artifacts import SEAL, Store, damage, last_checkpoint, seal
from lm.io import write_json
from lm.logprobs import CompletionModel
from lm.objectives import DPO, Method
from lm.testing import causal_lm, pairs, training
from lm.trainer import PolicyTrainer, fit, pair_collator, training_arguments
from tests.kill import differences

Run = tuple[dict[str, Tensor], list[dict[str, Any]]]
"""Parameters after training, and the log."""


def train(folder: Path, *callbacks: TrainerCallback, method: Method | None = None, **options: Any) -> Run:
    """Seven steps on ten pairs, four at a time: a checkpoint every two steps, a log line every three, three probes."""
    method = DPO() if method is None else method
    torch.manual_seed(0)
    model = CompletionModel(causal_lm(), reward_head=method.needs_reward_head)
    config = training(**{"max_steps": 7, "batch_size": 4, "save_steps": 2, "logging_steps": 3, **options})
    arguments = training_arguments(config, folder, seed=3, device="cpu", probes=2)
    extra: dict[str, Any] = {"method": method, "eval_dataset": pairs(5, seed=9), "callbacks": list(callbacks)}
    history = fit(PolicyTrainer, model, pairs(10), pair_collator(sample=method.needs_samples), arguments, **extra)
    timeless = [{k: v for k, v in entry.items() if not k.startswith("train_")} for entry in history]
    return {name: p.detach().clone() for name, p in model.named_parameters()}, timeless


def same(one: Run, other: Run) -> bool:
    """Whether two runs are the same to the last bit, log included."""
    return one[1] == other[1] and all(torch.equal(one[0][name], other[0][name]) for name in one[0])


class Crash(TrainerCallback):  # type: ignore[misc]
    """Ends a run after so many steps, and what is saved at that step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("whole"))


def crashed(folder: Path, step: int = 5) -> Path:
    """The folder of a run that ended after so many steps."""
    with pytest.raises(KeyboardInterrupt):
        train(folder, Crash(step))
    return folder


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


# ---------------------------------------------------------------- kills


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_a_run_that_is_gone_on_with_has_the_same_log_and_parameters(step: int, whole: Run, tmp_path: Path) -> None:
    assert same(train(crashed(tmp_path, step)), whole)


def test_a_run_that_ended_after_its_last_step_takes_no_step_more(whole: Run, tmp_path: Path) -> None:
    """A kill after training and before the artifact is finished: the last step is in the middle of an epoch."""
    train(tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-6", "checkpoint-7"]
    assert same(train(tmp_path), whole)


def test_another_step_is_noticed(whole: Run, tmp_path: Path) -> None:
    assert not same(train(tmp_path, max_steps=8), whole)


def test_an_artifact_that_was_finished_leaves_no_work(tmp_path: Path) -> None:
    store = Store(tmp_path, seed=0)
    artifact = store.get("policy", "dpo", {}, lambda folder, scratch: {})
    left = tmp_path / ".work" / f"policy-dpo-{artifact.key}" / "scratch"
    left.mkdir(parents=True)
    assert store.get("policy", "dpo", {}, lambda folder, scratch: {}) == artifact
    assert not left.parent.exists()


def a_run(folder: Path) -> Path:
    """Files of the kinds that a run leaves."""
    artifact = folder / "policy" / "dpo-0123"
    history = [{"loss": 0.5, "step": 1}, {"train_runtime": 1.0, "step": 1}]
    record = {"metrics": {"history": history}, "provenance": {"date": "today", "commit": "a", "seed": 0}}
    (artifact / "pairs").mkdir(parents=True)
    write_json(artifact / "artifact.json", {**record, "files": {"pairs/state.json": "12", "weights": "34"}})
    write_json(artifact / "pairs" / "state.json", {"_fingerprint": "ab", "_data_files": []})
    (artifact / "weights").write_bytes(bytes(100))
    write_json(folder / "results.json", {"methods": {"dpo": 0.5}, "provenance": record["provenance"]})
    (folder / "report.html").write_text("today, commit a")
    (folder / ".lock").touch()
    return folder


def edited(path: Path, *keys: Any, value: Any) -> None:
    document = json.loads(path.read_text())
    place = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(document))


def test_runs_of_other_times_are_not_told_apart(tmp_path: Path) -> None:
    one, other = a_run(tmp_path / "one"), a_run(tmp_path / "other")
    for path in (other / "results.json", other / "policy" / "dpo-0123" / "artifact.json"):
        edited(path, "provenance", "date", value="tomorrow")
    edited(other / "policy" / "dpo-0123" / "artifact.json", "metrics", "history", 1, "train_runtime", value=2.0)
    edited(other / "policy" / "dpo-0123" / "artifact.json", "files", "pairs/state.json", value="56")
    edited(other / "policy" / "dpo-0123" / "pairs" / "state.json", "_fingerprint", value="cd")
    (other / "report.html").write_text("tomorrow, commit a")
    assert differences(one, other) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            lambda run: (run / "policy/dpo-0123/weights").write_bytes(bytes(99) + b"\1"),
            "policy/dpo-0123/weights: bytes",
        ),
        (lambda run: (run / "policy/dpo-0123/weights").unlink(), "policy/dpo-0123/weights: only in "),
        (lambda run: (run / "policy/dpo-0123/more").touch(), "policy/dpo-0123/more: only in "),
        (
            lambda run: edited(run / "results.json", "methods", "dpo", value=0.25),
            "results.json: methods.dpo 0.5 | 0.25",
        ),
        (
            lambda run: edited(run / "results.json", "provenance", "seed", value=1),
            "results.json: provenance.seed 0 | 1",
        ),
        (
            lambda run: edited(run / "policy/dpo-0123/artifact.json", "metrics", "history", 0, "loss", value=0.25),
            "policy/dpo-0123/artifact.json: metrics.history[0].loss 0.5 | 0.25",
        ),
        (
            lambda run: edited(run / "policy/dpo-0123/artifact.json", "files", "weights", value="0"),
            "policy/dpo-0123/artifact.json: files.weights 34 | 0",
        ),
        (lambda run: (run / "report.html").write_text("today, commit a!"), "report.html: bytes"),
        (lambda run: (run / ".work" / "policy-dpo").mkdir(parents=True), "left over"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_byte_that_differs_between_two_runs_is_found(change: Any, found: str, tmp_path: Path) -> None:
    one, other = a_run(tmp_path / "one"), a_run(tmp_path / "other")
    change(other)
    (difference,) = differences(one, other)
    assert found in difference


# ---------------------------------------------------------------- damaged files

DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit of the weights": lambda path: flip(path / "model.safetensors"),
    "a bit of the optimizer": lambda path: flip(path / "optimizer.pt"),
    "a file cut short": lambda path: (path / "trainer_state.json").write_text("{"),
    "a missing file": lambda path: (path / "scheduler.pt").unlink(),
    "the checksums": lambda path: (path / SEAL).write_text("{"),
    "checksums of no files": lambda path: (path / SEAL).write_text("[]"),
}


def flip(path: Path) -> None:
    """Changes one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = crashed(tmp_path_factory.mktemp("broken"), 5)
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-4"]
    return folder


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    what: str, broken_off: Path, whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(broken_off, folder)
    DAMAGE[what](folder / "checkpoint-4")
    assert same(train(folder), whole)
    name = {"the weights": "model.safetensors", "the optimizer": "optimizer.pt", "short": "trainer_state.json"}
    name |= {"missing file": "scheduler.pt", "checksums": SEAL, "no files": SEAL}
    (file,) = {file for key, file in name.items() if what.endswith(key)}
    state = "is missing" if what == "a missing file" else "has changed"
    said = f"warning: {folder}/checkpoint-4/{file} {state} since it was written; this checkpoint is not used\n"
    assert said in capsys.readouterr().err


def test_a_run_without_a_whole_checkpoint_starts_anew(broken_off: Path, whole: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(broken_off, folder)
    for name in checkpoints(folder):
        flip(folder / name / "model.safetensors")
    assert same(train(folder), whole)


def test_a_checkpoint_that_was_cut_short_is_no_checkpoint(
    broken_off: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(broken_off, folder)
    (folder / "checkpoint-4" / SEAL).unlink()
    (folder / "checkpoint-6").mkdir()
    assert last_checkpoint(folder) == str(folder / "checkpoint-2")
    assert checkpoints(folder) == ["checkpoint-2"]
    assert capsys.readouterr().err == "", "nothing is wrong with it: a kill has ended its writing"
    assert last_checkpoint(tmp_path / "nothing") is None


def test_a_seal_holds_for_every_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("1")
    assert damage(tmp_path) == f"{tmp_path / SEAL} is missing"
    seal(tmp_path)
    assert damage(tmp_path) is None
    seal(tmp_path)
    assert damage(tmp_path) is None, "its own checksum is not among them"
    (tmp_path / "a" / "b").write_text("2")
    assert damage(tmp_path) == f"{tmp_path}/a/b has changed"
