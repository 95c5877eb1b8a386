"""Runs whose reward models are heads on a frozen body, and whose pi_ref is the model as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lm.base.options import parse
from lm.base.store import Artifact
from lm.config import Config, LoraConfig, TrainingConfig
from lm.logprobs.scoring import score_pairs
from lm.models.loading import SCRATCH
from lm.models.opening import open_reward_model
from lm.objectives import DRDO
from lm.reporting.results import results
from lm.stages import heads
from lm.stages.heads import features, head_rewards, states_of
from lm.stages.labels import labelled_pairs, oracle
from lm.stages.rewards import asked, reward
from lm.stages.run import Run
from lm.stages.scores import margin, scores
from lm.stages.subsets import subset
from lm.stages.trainings import sft
from tests.pipeline_test import WORLD, config, steps

HEAD = TrainingConfig(train="head")
OWN = {"drdo": DRDO(oracle_alpha=0.5)}
"""It trains an oracle of its own."""


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCRATCH, "scratch:tiny", {**SCRATCH["scratch:tiny"], "hidden_size": 32, "vocab_size": 400})
        yield


def with_heads(folder: Path, **options: Any) -> Config:
    asked_for = {"oracle": HEAD, "reward": HEAD, "methods": ["dpo", "d-dpo", "e-dpo"], "dtype": "float64"}
    return config(folder, WORLD, **{**asked_for, **options})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = Run(with_heads(tmp_path_factory.mktemp("heads")))
    results(made)
    return made


def test_a_saved_head_is_an_ordinary_reward_model_that_gives_the_rewards_of_the_states(run: Run) -> None:
    pairs = labelled_pairs(run, "valid")
    for model in (oracle(run), reward(run, "rho"), reward(run, "b0.4")):
        by_forward = score_pairs(open_reward_model(model.path, run.config), pairs, "rewards")
        by_states = head_rewards(run, model, pairs)
        for one, other in zip(by_forward, by_states, strict=True):
            assert torch.allclose(one, other, atol=1e-5)
            assert one.std() > 1e-3
    _, found = AutoModelForSequenceClassification.from_pretrained(reward(run, "rho").path, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]


def test_members_differ_and_share_the_bodys_file(run: Run) -> None:
    assert set(asked(run)) == {"rho", "b0.4", "b0.5", "b0.6"}
    assert not np.allclose(margin(run, "b0.4"), margin(run, "b0.6"))
    bodies = {(reward(run, name).path / heads.SHARED).stat().st_ino for name in asked(run)}
    assert len(bodies) == 1


def test_states_follow_the_labels(run: Run) -> None:
    """The oracle turned some pairs round since their states were computed."""
    pairs = labelled_pairs(run, "train").select(range(20))
    turned = pairs.rename_columns(
        {"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids", "chosen": "rejected", "rejected": "chosen"}
    )
    assert np.array_equal(states_of(run, pairs), states_of(run, turned)[:, ::-1])
    other = pairs.map(lambda row: {"chosen_ids": [*row["chosen_ids"], 5]})
    with pytest.raises(ValueError, match="has other completions than when its states were computed"):
        states_of(run, other)
    unknown = pairs.map(lambda row: {"id": "x" + row["id"]})
    with pytest.raises(ValueError, match="is none of the run's data"):
        states_of(run, unknown)


def test_a_head_learns(run: Run) -> None:
    found = reward(run, "rho").metrics
    at_zero = np.log(2)
    assert min(one["validation_loss"] for one in found["head"]["path"]) < at_zero
    assert found["calibration"]["loss"] == pytest.approx(
        min(one["validation_loss"] for one in found["head"]["path"]), abs=1e-6
    )
    assert found["accuracy"]["all"]["pairs"] == len(labelled_pairs(run, "valid"))


def test_states_are_computed_once_and_again_only_from_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "CHUNK", 100)
    calls: list[int] = []
    true = heads.score_states

    def counted(model: Any, rows: Any, what: str) -> Any:
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return true(model, rows, what)

    monkeypatch.setattr(heads, "score_states", counted)
    with pytest.raises(KeyboardInterrupt):
        features(Run(with_heads(tmp_path)))
    again = features(Run(with_heads(tmp_path)))
    total = again.metrics["pairs"]
    assert sum(calls) == total + calls[2], "only the chunk that was under way is computed twice"
    monkeypatch.setattr(heads, "CHUNK", 10_000)
    whole = features(Run(with_heads(tmp_path / "whole")))
    one, other = (np.load(made.path / "states.npy") for made in (again, whole))
    assert np.allclose(one, other, atol=1e-5)


def test_heads_of_another_body_are_other_models(run: Run, tmp_path: Path) -> None:
    body = tmp_path / "body"
    sft_folder = sft(run).path
    body.symlink_to(sft_folder)
    other = Run(replace(run.config, reward_base=str(body)))
    assert reward(other, "rho").key != reward(run, "rho").key
    assert np.allclose(margin(other, "rho"), margin(run, "rho"), atol=1e-4), "it is the same body by another name"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"reward": TrainingConfig(train="head", epochs=1)},
            r"reward.train \"head\" .* takes no steps.* got 1 and None",
        ),
        ({"oracle": TrainingConfig(train="head", max_steps=1)}, r"oracle.train \"head\""),
        ({"reward": TrainingConfig(train="lora", epochs=1)}, r'reward.train "lora" needs lora.rank'),
        (
            {"reward": HEAD, "lora": LoraConfig(rank=2, stages=["reward"])},
            r'reward.train is "head", and lora.stages has reward',
        ),
        ({"policy": TrainingConfig(train="head", max_steps=1)}, "policy.train must be null, got 'head'"),
        ({"methods": ["drdo"], "options": OWN}, "got None and None for reward: drdo trains an oracle of its own"),
        (
            {"sft": TrainingConfig(train="nothing")},
            "Config.sft must say how pi_ref is trained, as scratch:tiny is random",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        with_heads(tmp_path, **options)


@pytest.mark.thorough
def test_drdo_takes_steps_beside_heads(tmp_path: Path) -> None:
    both = with_heads(tmp_path, methods=["drdo", "d-dpo"], options=OWN, reward=replace(steps(2), train="head"))
    found = results(Run(both))
    assert set(found.methods) == {"drdo", "d-dpo"}


def test_pi_ref_as_it_is(run: Run, tmp_path: Path) -> None:
    """A model folder with sft null: the policies start from it, and its log-probs are the reference's."""
    base = str(sft(run).path)
    plain = Run(with_heads(tmp_path, model=base, sft=TrainingConfig(train="nothing"), methods=["dpo"]))
    made: Artifact = sft(plain)
    assert made.metrics["history"] == []
    ours = AutoModelForSequenceClassification  # the folder is an ordinary one
    assert ours.from_pretrained(made.path, num_labels=1) is not None
    pairs = subset(plain, "rho")
    assert len(pairs)
    found = results(plain)
    assert found.methods["dpo"].n > 0
    assert scores(plain).metrics["pairs"] == len(pairs)


@pytest.mark.parametrize("arguments", [["--sft", "null"], ["--sft=null"], ["--config", "FILE"]])
def test_sft_null_is_said_in_a_file_and_on_the_command_line(arguments: list[str], tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(
        "sft: null\nmodel: some/model\noutput_dir: o\n"
        "policy: {max_steps: 1}\noracle: {epochs: 1}\nreward: {epochs: 1}\n"
    )
    given = [str(file) if argument == "FILE" else argument for argument in arguments]
    found, _ = parse("lm.test", "", [*given, "--model", "some/model"])
    assert found.sft.train == "nothing"
    assert not found.sft.has_steps
