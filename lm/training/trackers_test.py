"""Trackers are told what is logged and change nothing; TensorBoard's event files are read back."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import integration_utils

from lm.base import ranks
from lm.base.options import CONFIGS
from lm.logprobs.completions import CompletionModel
from lm.objectives import METHODS, EnsembleDPO, HullDPO, Method, Pessimism
from lm.stages.run import Run, command
from lm.stages.trainings import sft
from lm.training import trackers
from lm.training.batches import pair_collator
from lm.training.loop import fit, training_arguments
from lm.training.metrics import scale_of
from lm.training.policy import PolicyTrainer
from lm.training.trainer import Paced
from tests.tiny import causal_lm, each_method, pairs, training

STEPS = 4
PROBE = 3
EVERY_METHOD = {
    "loss",
    "chosen_logps",
    "rejected_logps",
    "chosen_logratio",
    "rejected_logratio",
    "margin",
    "accuracy",
    "forward_kl_preferences",
    "learning_rate",
    "grad_norm",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
}
"""But of a method without a scale, which has no rewards/*."""


def train(
    folder: Path, method: Method, *, report_to: tuple[str, ...] = (), callbacks: Any = (), **options: Any
) -> tuple[CompletionModel, list[dict[str, float]]]:
    """(model, log history) of a few steps with a probe."""
    torch.manual_seed(0)
    model = CompletionModel(causal_lm(), reward_head=method.needs_reward_head).double()
    arguments = training_arguments(
        training(max_steps=STEPS, **options),
        folder / "scratch",
        seed=0,
        device="cpu",
        probes=1,
        report_to=report_to,
        logs=folder / "logs" / "policy-tried-0a1b2c",
        described={"stage": "policy", "group": "runs/a"},
    )
    history = fit(
        PolicyTrainer,
        model,
        pairs(8 * STEPS),
        pair_collator(sample=method.needs_samples),
        arguments,
        callbacks=callbacks,
        method=method,
        eval_dataset=pairs(PROBE, seed=9),
    )
    return model, history


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value)s of each tag in a folder of event files."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("name", each_method())
def test_event_files_have_every_log_line_of_the_history(name: str, tmp_path: Path) -> None:
    method = METHODS[name]()
    _, history = train(tmp_path, method, report_to=("tensorboard",))
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["policy-tried-0a1b2c"]
    found = scalars(tmp_path / "logs" / "policy-tried-0a1b2c")
    expected: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for entry in history:
        for key, value in entry.items():
            tag = f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
            expected[tag].append((int(entry["step"]), pytest.approx(value, rel=1e-6)))
    del expected["train/step"]
    speed = found.pop("train/tokens_per_second")
    assert [step for step, _ in speed] == list(range(1, STEPS + 1))
    assert all(value > 0 for _, value in speed)
    assert found == expected

    own = {"alpha"} if hasattr(method, "kl") else set()
    own |= {"forward_kl"} if method.needs_samples else set()
    own |= {"implicit_reward_margin"} if method.implicit_scale is not None else set()
    own |= {"estimated_reward_margin"} if method.needs_reward_head else set()
    own |= {f"member_weight_{k}" for k in range(3)} if isinstance(method, EnsembleDPO) else set()
    logged = {tag.removeprefix("train/") for tag in found if tag.startswith("train/")}
    assert logged - {"epoch", "train_loss", "train_runtime", "total_flos"} == (
        {name for name in EVERY_METHOD if scale_of(method) is not None or not name.startswith("rewards/")}
        | own
        | {"train_samples_per_second", "train_steps_per_second"}
    )


def test_the_log_lines_are_consistent(tmp_path: Path) -> None:
    method = HullDPO(beta=0.25, kl=Pessimism(alpha_start=0.1, alpha_end=0.4))
    _, history = train(tmp_path, method)
    lines = [entry for entry in history if "loss" in entry]
    assert [line["alpha"] for line in lines] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    for line in lines:
        assert line["margin"] == pytest.approx(line["chosen_logratio"] - line["rejected_logratio"], rel=1e-5)
        assert line["implicit_reward_margin"] == pytest.approx(0.25 * line["margin"], rel=1e-5)
        both = line["chosen_logratio"] + line["rejected_logratio"]
        assert line["forward_kl_preferences"] == pytest.approx(-both / 2, rel=1e-5)
        weights = [line[f"member_weight_{k}"] for k in range(3)]
        assert sum(weights) == pytest.approx(1)
        assert all(weight >= 0 for weight in weights)
    assert any(0.01 < line["member_weight_0"] < 0.99 for line in lines), "a mixture, not a choice"


def test_of_e_dpo_a_steps_weights_choose_one_member_however_it_is_cut(tmp_path: Path) -> None:
    whole, parts = (
        [entry for entry in train(tmp_path / str(size), EnsembleDPO(), micro_batch_size=size)[1] if "loss" in entry]
        for size in (None, 3)
    )
    names = [f"member_weight_{k}" for k in range(3)]
    for line in whole:
        assert sorted(line[name] for name in names) == [0, 0, 1]
    assert [[line[name] for name in names] for line in parts] == [[line[name] for name in names] for line in whole]


def test_a_tracker_changes_nothing_and_its_speed_is_not_kept(tmp_path: Path) -> None:
    timed = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    (one, with_it), (other, without) = (
        train(tmp_path / str(len(report_to)), EnsembleDPO(), report_to=report_to)
        for report_to in (("tensorboard",), ())
    )
    kept = [
        [{key: value for key, value in entry.items() if key not in timed} for entry in history]
        for history in (with_it, without)
    ]
    assert kept[0] == kept[1]
    assert not any("tokens_per_second" in entry for entry in with_it)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not (tmp_path / "0" / "logs").exists(), "off by default"


class Fail(TrainerCallback):  # type: ignore[misc]
    """Ends training as a crash would."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STEPS - 1:
            raise KeyboardInterrupt


def test_a_resumed_training_replaces_what_was_written_after_its_checkpoint(tmp_path: Path) -> None:
    options: dict[str, Any] = {"report_to": ("tensorboard",), "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, EnsembleDPO(), callbacks=[Fail()], **options)
    logs = tmp_path / "logs" / "policy-tried-0a1b2c"
    assert [step for step, _ in scalars(logs)["train/loss"]] == [1, 2, 3]
    time.sleep(1)  # event files are read in the order of their names: the second, the process, a count as text (9 > 10)
    train(tmp_path, EnsembleDPO(), **options)
    assert [step for step, _ in scalars(logs)["train/loss"]] == [1, 2, 3, 4], "step 3 is there once"
    assert scalars(logs)["eval/chosen_logps"][0][0] == 0
    train(tmp_path / "elsewhere", EnsembleDPO(), **options)
    assert scalars(tmp_path / "elsewhere" / "logs" / logs.name)["train/loss"] == scalars(logs)["train/loss"]


def test_only_the_first_rank_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(trackers.callbacks(["tensorboard"], tmp_path)) == 1
    monkeypatch.setattr(ranks, "index", lambda: 1)
    assert trackers.callbacks(["tensorboard"], tmp_path) == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tensorbord"], r"Config.report_to must list trackers out of .*tensorboard, trackio, wandb; got 'tensorbord'"),
        (["all"], r"got 'all'"),
        (["clearml"], r"Config.report_to: 'clearml' is not installed, so `pip install clearml` or .*tensorboard"),
        (["tensorboard", "tensorboard"], r"Config.report_to names a tracker twice"),
    ],
)
def test_what_cannot_report_is_refused(names: list[str], message: str) -> None:
    trackers.check(["tensorboard"])
    with pytest.raises(ValueError, match=message):
        trackers.check(names)


def test_a_run_refuses_before_it_computes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started: list[Run] = []
    options = ["--output_dir", str(tmp_path), "--report_to", "[wand]"]
    assert command("lm.test", started.append, arguments=options) == 2
    assert "got 'wand'" in capsys.readouterr().err
    assert not started


def test_a_training_is_called_what_its_artifact_is_and_the_key_does_not_know(tmp_path: Path) -> None:
    preset = ["--config", str(CONFIGS / "demo.yaml"), "--data.world.posts", "30", "--sft.max_steps", "2"]
    preset += ["--sft.epochs", "null", "--sft.logging_steps", "1", "--device", "cpu", "--output_dir"]
    names = []
    for folder, more in ((tmp_path / "a", ["--report_to", "[tensorboard]"]), (tmp_path / "b", [])):
        status = command(
            "lm.test", lambda run: names.append(sft(run).path.name), arguments=[*preset, str(folder), *more]
        )
        assert status == 0
    assert names[0] == names[1]
    found = scalars(tmp_path / "a" / "logs" / f"sft-{names[0]}")
    assert [step for step, _ in found["train/loss"]] == [1, 2]
    assert not (tmp_path / "b" / "logs").exists()


# ---------------------------------------------------------------- W&B, by a stand-in for its module


class FakeWandb(ModuleType):
    """What transformers' callback calls, kept by run."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.run: Any = None
        self.config = self
        self.runs: list[dict[str, Any]] = []

    def init(self, **options: Any) -> None:
        self.run = self
        self.runs.append({**options, "logged": []})

    def log(self, values: dict[str, float]) -> None:
        self.runs[-1]["logged"].append(values)

    def finish(self) -> None:
        self.run = None

    def update(self, *_: Any, **__: Any) -> None:
        """As wandb.config."""

    def __setitem__(self, *_: Any) -> None:
        """As wandb.config."""

    def _label(self, **_: Any) -> None:
        """As wandb.run."""

    @property
    def summary(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    fake, errors = FakeWandb(), ModuleType("wandb.sdk.lib.config_util")
    errors.ConfigError = RuntimeError  # type: ignore[attr-defined]
    for name in ("wandb.sdk", "wandb.sdk.lib"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setitem(sys.modules, errors.__name__, errors)
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    return fake


def test_each_training_is_a_run_of_its_own_in_wandb(wandb: FakeWandb, tmp_path: Path) -> None:
    trackers.check(["wandb"])
    for folder in ("a", "b"):
        train(tmp_path / folder, METHODS["dpo"](), report_to=("wandb",))
    assert [each["name"] for each in wandb.runs] == ["policy-tried-0a1b2c"] * 2
    assert [(each["group"], each["job_type"]) for each in wandb.runs] == [("runs/a", "policy")] * 2
    for each in wandb.runs:
        losses = [line["train/loss"] for line in each["logged"] if "train/loss" in line]
        assert len(losses) == STEPS
    assert wandb.run is None


def test_a_callers_own_wandb_run_stays_open(wandb: FakeWandb, tmp_path: Path) -> None:
    wandb.init(name="theirs")
    train(tmp_path, METHODS["dpo"](), report_to=("wandb",))
    assert [each["name"] for each in wandb.runs] == ["theirs"]
    assert wandb.run is wandb


# ---------------------------------------------------------------- how often it logs


@pytest.mark.parametrize(
    ("steps", "given", "expected"),
    [
        (4, None, [1, 2, 3, 4]),
        (23, None, list(range(2, 23, 2))),
        (12, 5, [5, 10]),
    ],
)
def test_a_training_logs_ten_lines_or_as_it_is_told(
    steps: int, given: int | None, expected: list[int], tmp_path: Path
) -> None:
    arguments = training_arguments(
        training(max_steps=steps, batch_size=2, logging_steps=given), tmp_path, seed=0, device="cpu"
    )
    model = CompletionModel(causal_lm()).double()
    history = fit(PolicyTrainer, model, pairs(8), pair_collator(), arguments, method=METHODS["dpo"]())
    assert [line["step"] for line in history if "loss" in line] == expected


def test_a_long_training_logs_every_25_steps() -> None:
    arguments = training_arguments(training(max_steps=1000, logging_steps=None), Path("x"), seed=0, device="cpu")
    for steps, every in ((1000, 25), (251, 25), (249, 24), (9, 1)):
        state = TrainerState(max_steps=steps)
        Paced().on_train_begin(arguments, state, TrainerControl())
        assert state.logging_steps == every


def test_what_is_described_stands_in_a_trainings_config_of_every_tracker(tmp_path: Path) -> None:
    arguments = training_arguments(
        training(), tmp_path, seed=0, device="cpu", described={"method": "ipo", "tau": 0.5, "group": "runs/a"}
    )
    for config in (arguments.to_dict(), arguments.to_sanitized_dict(), json.loads(arguments.to_json_string())):
        assert (config["method"], config["tau"], config["group"]) == ("ipo", 0.5, "runs/a")
        assert "described" not in config


def test_a_tracker_without_tables_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trackers.end(["mlflow"], tmp_path, trackers.Ending({}, {}, {}, {}))
    assert (
        "[results] mlflow is not told tables and pictures, as tensorboard, wandb, trackio are"
        in capsys.readouterr().err
    )


def test_a_cell_with_bars_and_line_breaks_stays_one_cell() -> None:
    table = trackers.markdown(trackers.Rows(("a|b", "c"), [["x\ny\r\x0bz", None]]))
    assert table == "| a\\|b | c |\n| --- | --- |\n| x<br>y<br><br>z | None |"
