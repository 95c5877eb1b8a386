"""Runs whose reward models are kept at the step of the least loss of validation pairs: what is in the artifact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm.base.effects import idle
from lm.config import Config, LoraConfig, TrainingConfig
from lm.logprobs.scoring import score_pairs
from lm.models.loading import SCRATCH
from lm.models.opening import open_reward_model
from lm.objectives import DRDO
from lm.stages.labels import labelled_pairs, oracle
from lm.stages.rewards import asked, reward, reward_artifact
from lm.stages.run import Run
from lm.training.best import spread
from tests.pipeline_test import WORLD, config
from theory.losses import bradley_terry

FAST = TrainingConfig(
    max_steps=10,
    batch_size=4,
    learning_rate=2e-2,
    schedule="constant_with_warmup",
    warmup_fraction=0.0,
    evaluations=10,
    evaluation_pairs=20,
    patience=None,
)
"""It overfits, and its steps do not depend on how many there are."""


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCRATCH, "scratch:tiny", {**SCRATCH["scratch:tiny"], "hidden_size": 32, "vocab_size": 400})
        yield


def fast(folder: Path, **options: Any) -> Config:
    asked_for = {"reward": FAST, "oracle": FAST, "methods": ["e-dpo"], "dtype": "float64"}
    return config(folder, replace(WORLD, labels="given"), **{**asked_for, **options})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(fast(tmp_path_factory.mktemp("best")))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def test_each_member_is_the_model_after_its_own_best_step(run: Run) -> None:
    """A training that ends there, and keeps its last step, makes the same bits."""
    steps = {}
    for name in asked(run):
        kept = reward(run, name).metrics["kept"]
        assert kept["last_step"] == 10
        assert kept["validation_loss"] <= kept["last_validation_loss"]
        steps[name] = kept["step"]
    assert len(set(steps.values())) > 1
    for name in asked(run)[:2]:
        short = replace(FAST, max_steps=steps[name], evaluations=0)
        plain = reward(Run(replace(run.config, reward=short)), name)
        assert plain.metrics["kept"]["step"] == steps[name]
        assert plain.metrics["kept"]["validation_loss"] is None
        one, other = weights(reward(run, name).path), weights(plain.path)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert plain.metrics["accuracy"] == reward(run, name).metrics["accuracy"]


def test_the_loss_that_is_told_is_that_of_the_saved_model(run: Run) -> None:
    for model in (oracle(run), reward(run, asked(run)[0])):
        few = spread(labelled_pairs(run, "valid"), FAST.evaluation_pairs)
        chosen, rejected = score_pairs(open_reward_model(model.path, run.config), few, "by hand")
        by_hand = float(bradley_terry(chosen - rejected).mean())
        assert model.metrics["kept"]["validation_loss"] == pytest.approx(by_hand, rel=1e-6)


def test_without_looks_it_is_another_artifact(run: Run) -> None:
    """The one that was made before there were looks, see `tests/artifact_keys_test.py`."""
    name = asked(run)[0]
    keys = {
        reward(Run(replace(run.config, reward=replace(FAST, **options))), name).key
        for options in ({}, {"evaluations": 0}, {"evaluation_pairs": 10}, {"patience": 8})
    }
    assert len(keys) == 4


@pytest.mark.slow
def test_adapters_and_an_oracle_of_a_methods_own_are_kept_likewise(tmp_path: Path) -> None:
    adapters = LoraConfig(rank=2, stages=["reward"])
    own = Run(fast(tmp_path, methods=["drdo", "d-dpo"], lora=adapters, options={"drdo": DRDO(oracle_alpha=0.01)}))
    for name in asked(own):
        model = reward_artifact(own, name)
        kept = model.metrics["kept"]
        short = replace(own.config, reward=replace(FAST, max_steps=kept["step"], evaluations=0))
        plain = reward_artifact(Run(short), name)
        one, other = weights(model.path), weights(plain.path)
        assert all(torch.equal(one[key], other[key]) for key in one), name
        adapter = "adapter/adapter_model.safetensors"
        of_one, of_other = load_file(model.path / adapter), load_file(plain.path / adapter)
        assert all(torch.equal(of_one[key], of_other[key]) for key in of_one), name


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sft": replace(FAST, evaluations=2)}, "Config.sft.evaluations is of reward models and .* got 2"),
        ({"policy": replace(FAST, evaluations=None, patience=7)}, "Config.policy.evaluation_pairs is of reward models"),
        (
            {"reward": TrainingConfig(train="head", evaluations=2)},
            'Config.reward.train "head" solves for the head, and there is no step to keep: .* got 2',
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        fast(tmp_path, **options)


@pytest.mark.parametrize("training", [replace(FAST, evaluations=0), TrainingConfig(train="head")])
def test_what_has_no_effect_is_named(training: TrainingConfig, tmp_path: Path) -> None:
    found = dict(idle(fast(tmp_path, reward=training), "lm.train"))
    assert {"reward.evaluation_pairs", "reward.patience"} <= found.keys()
    assert "oracle.patience" not in found
