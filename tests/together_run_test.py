"""Settings of a sweep that a run trains together leave the artifacts that each leaves when it is trained alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm.base.store import WORK, Artifact
from lm.config import BiasConfig, Config, DataConfig, EvaluationConfig, ProbeConfig, TrainingConfig, WorldConfig
from lm.models.loading import SCRATCH
from lm.stages import policies
from lm.stages.run import Run
from lm.stages.scores import scores
from lm.training import together
from tests.interrupted import Kill

SETTINGS: list[dict[str, Any]] = [{"beta": 0.1}, {"beta": 1.0}, {"beta": 10.0}]


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Iterable[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCRATCH, "scratch:tiny", {**SCRATCH["scratch:tiny"], "hidden_size": 32, "vocab_size": 400})
        yield


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of a run that is finished up to the policies."""
    training = TrainingConfig(max_steps=3, batch_size=8, learning_rate=1e-3)
    config = Config(
        output_dir=str(tmp_path_factory.mktemp("swept")),
        model="scratch:tiny",
        device="cpu",
        dtype="float64",
        data=DataConfig(
            prompt_template="{post}\n\nTL;DR:",
            max_prompt_length=120,
            max_completion_length=60,
            valid_fraction=0.1,
            test_fraction=0.15,
            world=WorldConfig(posts=80),
        ),
        bias=BiasConfig(rho=0.4, member_fractions=[0.4, 0.6]),
        sft=training,
        oracle=training,
        policy=replace(training, max_steps=4, max_grad_norm=0.1, save_steps=1),
        evaluation=EvaluationConfig(resamples=100),
        probe=ProbeConfig(pairs=5, times=2),
        methods=["dpo"],
        sweep={"dpo": SETTINGS},
        snapshots=2,
    )
    scores(Run(config))
    return config


def another(swept: Config, folder: Path, **options: Any) -> Config:
    """The same up to the policies, in a folder of its own."""
    shutil.copytree(swept.output_dir, folder, dirs_exist_ok=True)
    return replace(swept, output_dir=str(folder), **options)


def record_of(artifact: Artifact) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((artifact.path / "artifact.json").read_text())
    return record


def assert_the_same(mine: Artifact, lone: Artifact) -> None:
    """Key, files, parameters of the end and of the snapshot, inputs, log history."""
    assert (mine.key, mine.path.name) == (lone.key, lone.path.name)
    ours, theirs = record_of(mine), record_of(lone)
    assert ours["inputs"] == theirs["inputs"]
    assert ours["files"].keys() == theirs["files"].keys()
    for weights in ("model.safetensors", "step-2/model.safetensors"):
        got, expected = load_file(mine.path / weights), load_file(lone.path / weights)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10)
    for line, expected_line in zip(ours["metrics"]["history"], theirs["metrics"]["history"], strict=True):
        shown = {name: value for name, value in expected_line.items() if not name.startswith("train_")}
        assert {name: line[name] for name in shown} == pytest.approx(shown, rel=1e-5)
        assert line.keys() == expected_line.keys()


def test_artifacts_are_those_of_settings_trained_alone(
    swept: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the batch's cost is shared out, nothing of it is left behind, and a second run finds all."""
    run = Run(another(swept, tmp_path / "together"))
    made = policies.policies(run, "dpo")
    assert "[policy] dpo: 3 settings together" in capsys.readouterr().err
    lone = policies.policies(Run(another(swept, tmp_path / "alone", train_together="off")), "dpo")
    assert "together" not in capsys.readouterr().err
    for mine, expected in zip(made, lone, strict=True):
        assert_the_same(mine, expected)
    ends = [load_file(one.path / "model.safetensors") for one in made]
    assert any((ends[0][name] - ends[1][name]).abs().max() > 1e-6 for name in ends[0]), "settings differ"
    costs = [record_of(one)["cost"] for one in made]
    assert not any(cost["resumed"] for cost in costs)
    assert min(cost["cpu_seconds"] for cost in costs) > 0.2 * sum(cost["cpu_seconds"] for cost in costs)
    assert left_behind(run.config) == []
    capsys.readouterr()
    assert [one.key for one in policies.policies(Run(run.config), "dpo")] == [one.key for one in made]
    assert "[policy]" not in capsys.readouterr().err


def test_a_setting_that_is_there_is_left_out(swept: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = another(swept, tmp_path / "run")
    second = policies.policy(Run(config), "dpo", config.settings("dpo")[1])
    made = policies.policies(Run(config), "dpo")
    assert "[policy] dpo: 2 settings together" in capsys.readouterr().err
    assert made[1] == second


@pytest.fixture
def killed(swept: Config, tmp_path: Path) -> Config:
    """Of a run whose settings were being trained together."""
    config, fit = another(swept, tmp_path / "killed"), policies.fit_together

    def cut_short(*args: Any, callbacks: Any, **kwargs: Any) -> Any:
        return fit(*args, callbacks=lambda stack: [*callbacks(stack), Kill(3, "save")], **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policies, "fit_together", cut_short)
        with pytest.raises(KeyboardInterrupt):
            policies.policies(Run(config), "dpo")
    return config


def left_behind(config: Config) -> list[str]:
    return [path.name for path in (Path(config.output_dir) / WORK).iterdir()]


def test_a_batch_that_was_killed_goes_on(
    swept: Config, killed: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snapshot of step 2 is of the process that was killed, which each one's cost says was there. Control: without
    the checkpoint it is made anew."""
    snapshots, taken = policies.Snapshots, list[int]()
    whole = policies.policies(Run(another(swept, tmp_path / "whole")), "dpo")
    monkeypatch.setattr(
        policies, "Snapshots", lambda count, save: snapshots(count, lambda step: (taken.append(step), save(step))[1])
    )
    for mine, expected in zip(policies.policies(Run(killed), "dpo"), whole, strict=True):
        assert_the_same(mine, expected)
        assert record_of(mine)["cost"]["resumed"]
    assert taken == [], "step 2 is not taken twice"
    assert left_behind(killed) == []


def test_a_batch_that_was_killed_is_not_left_behind_by_training_alone(killed: Config) -> None:
    assert left_behind(killed)
    policies.policies(Run(replace(killed, train_together="off")), "dpo")
    assert left_behind(killed) == []


def test_settings_that_read_other_things_are_trained_apart(
    swept: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Samples of pi_ref, or the pairs' own completions."""
    kinds = [{"kl": {"samples": "preferences"}}, {}, {"beta": 0.5}]
    config = another(swept, tmp_path / "run", methods=["p-dpo"], sweep={"p-dpo": kinds})
    assert len(policies.policies(Run(config), "p-dpo")) == 3
    assert "[policy] p-dpo: 2 settings together" in capsys.readouterr().err


def test_it_is_said_why_settings_are_trained_one_by_one(
    swept: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(another(swept, tmp_path))
    monkeypatch.setattr(together, "MOST_PARAMETERS", 10)
    monkeypatch.delattr(policies, "_start")  # nothing is opened for it
    policies._train_together(run, "dpo", run.config.settings("dpo"))
    assert "[policy] dpo: 3 settings one by one: a model of " in capsys.readouterr().err
    policies._train_together(run, "dpo", run.config.settings("dpo")[:1])
    assert "[policy]" not in capsys.readouterr().err, "there is nothing to say of one"
