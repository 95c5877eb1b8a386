"""The step that is kept of a reward model: by whose loss, the same however it is run, and whole after a crash."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from lm.base.store import CorruptArtifact
from lm.config import LogprobsConfig, LoraConfig, TrainingConfig
from lm.data import votes
from lm.logprobs.completions import CompletionModel
from lm.logprobs.scoring import score_pairs
from lm.models.lora import add_adapter
from lm.objectives import JointOracle
from lm.training.batches import pair_collator
from lm.training.best import KeepBest, Patience, best_step, spread, verdict
from lm.training.loop import fit, training_arguments
from lm.training.trainer import JointOracleTrainer, RewardTrainer
from tests.interrupted import Kill
from tests.tiny import causal_lm, close, pairs, reward_model, training
from theory.losses import bradley_terry

STEPS = 8
VALID = pairs(5, seed=12)
TRAINED = pairs(10)


@dataclass
class Kept:
    """What a training left."""

    last: dict[str, Tensor]
    best: dict[str, Tensor]
    history: list[dict[str, float]]

    @property
    def losses(self) -> dict[int, float]:
        return {int(row["step"]): row["eval_loss"] for row in self.history if "eval_loss" in row}


def run(
    folder: Path,
    *,
    evaluations: int = STEPS,
    patience: int | None = None,
    lora: bool = False,
    data: Dataset = TRAINED,
    valid: Dataset = VALID,
    callbacks: Any = (),
    **options: Any,
) -> Kept:
    """A training that overfits: so large a learning rate on ten pairs does."""
    torch.manual_seed(0)
    base = reward_model()
    if lora:
        add_adapter(base, LoraConfig(rank=2), base="")
    model = CompletionModel(base, options=LogprobsConfig(allocator=False))
    chosen = {"max_steps": STEPS, "batch_size": 4, "learning_rate": 0.02, "schedule": "cosine", **options}
    arguments = training_arguments(training(**chosen), folder, seed=3, device="cpu", evaluations=evaluations)

    def save(half: Path) -> None:
        half.mkdir(parents=True)
        torch.save({name: p.detach().clone() for name, p in model.named_parameters()}, half / "all.pt")

    keep = KeepBest(folder, save)
    waiting = [Patience(patience)] if patience is not None else []
    history = fit(
        *(RewardTrainer, model, data, pair_collator(), arguments),
        eval_dataset=valid,
        callbacks=[keep, *waiting, *callbacks],
    )
    last = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Kept(last, torch.load(keep.folder(verdict(history)["step"]) / "all.pt"), history)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return run(tmp_path_factory.mktemp("whole"))


# ---------------------------------------------------------------- what is kept


def test_the_best_step_is_neither_the_first_nor_the_last_here(whole: Kept) -> None:
    told = verdict(whole.history)
    assert list(whole.losses) == list(range(1, STEPS + 1))
    assert 1 < told["step"] < told["last_step"] == STEPS
    assert told["validation_loss"] == min(whole.losses.values()) < told["last_validation_loss"] == whole.losses[STEPS]


@pytest.mark.parametrize("lora", [False, True])
def test_the_model_that_is_kept_has_the_loss_that_was_told(lora: bool, tmp_path: Path) -> None:
    """Scored by another way, from the weights that were saved."""
    found = run(tmp_path, lora=lora, learning_rate=0.05)
    base = reward_model()
    if lora:
        add_adapter(base, LoraConfig(rank=2), base="")
    model = CompletionModel(base, options=LogprobsConfig(allocator=False))
    for weights, at in ((found.best, "validation_loss"), (found.last, "last_validation_loss")):
        model.load_state_dict(weights, strict=False)
        chosen, rejected = score_pairs(model, VALID, "by hand")
        assert float(bradley_terry(chosen - rejected).mean()) == pytest.approx(verdict(found.history)[at], rel=1e-9)
    assert not same(found.best, found.last)


def test_looking_changes_nothing_of_the_training(whole: Kept, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CompletionModel(reward_model(), options=LogprobsConfig(allocator=False))
    options = training(max_steps=STEPS, batch_size=4, learning_rate=0.02, schedule="cosine")
    arguments = training_arguments(options, tmp_path, seed=3, device="cpu")
    fit(RewardTrainer, model, TRAINED, pair_collator(), arguments)
    assert same(whole.last, dict(model.named_parameters()))


@pytest.mark.parametrize("how", [{"micro_batch_size": 1}, {"micro_batch_tokens": 60}])
def test_the_cut_of_the_mini_batches_changes_no_choice(how: dict[str, Any], whole: Kept, tmp_path: Path) -> None:
    found = run(tmp_path, **how)
    assert verdict(found.history)["step"] == verdict(whole.history)["step"]
    for step, loss in whole.losses.items():
        assert found.losses[step] == pytest.approx(loss, rel=1e-8)
    for name, value in whole.best.items():
        close(found.best[name], value, tolerance=1e-8, what=name)


def test_soft_labels_and_weights_count_in_the_held_out_loss(tmp_path: Path) -> None:
    found = run(tmp_path, data=pairs(10, soft=True), valid=(soft := pairs(5, seed=12, soft=True)))
    model = CompletionModel(reward_model(), options=LogprobsConfig(allocator=False))
    model.load_state_dict(found.last, strict=False)
    chosen, rejected = score_pairs(model, soft, "by hand")
    likely, weight = (torch.tensor(soft[name]) for name in votes.COLUMNS)
    margin = chosen - rejected
    each = likely * bradley_terry(margin) + (1 - likely) * bradley_terry(-margin)
    assert found.losses[STEPS] == pytest.approx(float((weight * each).sum() / weight.sum()), rel=1e-6)
    assert found.losses[STEPS] != pytest.approx(float(each.mean()), rel=1e-3)


def test_a_joint_oracle_is_kept_by_its_own_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    oracle = JointOracle(alpha=0.5)
    model = CompletionModel(causal_lm(), reward_head=True, options=LogprobsConfig(allocator=False)).double()
    arguments = training_arguments(training(max_steps=3), tmp_path, seed=3, device="cpu", evaluations=1)
    history = fit(*(JointOracleTrainer, model, TRAINED, pair_collator(), arguments), oracle=oracle, eval_dataset=VALID)
    chosen, rejected = score_pairs(model, VALID, "by hand", rewards=True)
    logps, _ = score_pairs(model, VALID, "by hand", rewards=False)
    expected = float(oracle(chosen - rejected, logps).mean())
    assert [row["eval_loss"] for row in history if "eval_loss" in row] == [pytest.approx(expected, rel=1e-9)]


# ---------------------------------------------------------------- when it ends


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_ends_it_after_so_many_looks_without_a_lesser_loss(patience: int, whole: Kept, tmp_path: Path) -> None:
    found = run(tmp_path, patience=patience)
    best, waited, expected = float("inf"), 0, STEPS
    for step, loss in whole.losses.items():
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited == patience:
            expected = step
            break
    assert verdict(found.history)["last_step"] == expected < STEPS
    assert found.losses == {step: loss for step, loss in whole.losses.items() if step <= expected}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed", "save_steps", "patience"),
    [(3, 2, None), (5, 2, None), (7, 1, None), (5, 1, 2), pytest.param(3, 1, 2, marks=pytest.mark.thorough)],
)
def test_a_resumed_training_keeps_the_same_bits(
    killed: int, save_steps: int, patience: int | None, whole: Kept, tmp_path: Path
) -> None:
    """Wherever it is killed, before the best step or after it, and its folder moved in between."""
    uninterrupted = whole if patience is None else run(tmp_path / "whole", patience=patience)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", patience=patience, save_steps=save_steps, callbacks=[Kill(killed)])
    shutil.move(tmp_path / "killed", tmp_path / "moved")
    resumed = run(tmp_path / "moved", patience=patience, save_steps=save_steps)
    assert same(resumed.last, uninterrupted.last)
    assert same(resumed.best, uninterrupted.best)
    assert resumed.losses == uninterrupted.losses


def test_what_had_ended_takes_no_step_more(tmp_path: Path) -> None:
    """Killed between the last checkpoint and the end of the stage."""
    ended = run(tmp_path, patience=1, save_steps=1)
    again = run(tmp_path, patience=1, save_steps=1, callbacks=[Kill(int(ended.history[-1]["step"]))])
    assert again.losses == ended.losses
    assert same(again.best, ended.best)


def test_a_best_model_that_is_gone_is_no_reason_to_keep_another(tmp_path: Path) -> None:
    run(tmp_path, save_steps=1)
    shutil.rmtree(tmp_path / "best")
    with pytest.raises(CorruptArtifact, match=r"best/step-\d+, the best model so far, is missing; delete .* to train"):
        run(tmp_path, save_steps=1)


def test_no_more_models_are_kept_than_may_be_asked_for(tmp_path: Path) -> None:
    found = run(tmp_path)
    assert [path.name for path in (tmp_path / "best").iterdir()] == [f"step-{verdict(found.history)['step']}"]


def test_what_a_checkpoint_goes_on_from_stays(tmp_path: Path) -> None:
    """Also the older one's, which is gone on from where the newer is damaged."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, save_steps=1, callbacks=[Kill(4)])
    states = [json.loads(path.read_text()) for path in tmp_path.glob("checkpoint-*/trainer_state.json")]
    needed = {f"step-{best_step(state['log_history'])}" for state in states}
    assert len(needed) == 2
    assert needed <= {path.name for path in (tmp_path / "best").iterdir()}


@pytest.mark.parametrize(("evaluations", "expected"), [(1, [8]), (2, [4, 8]), (3, [3, 6, 8]), (100, list(range(1, 9)))])
def test_looks_are_evenly_spaced_and_the_last_step_is_one(
    evaluations: int, expected: list[int], tmp_path: Path
) -> None:
    assert list(run(tmp_path, evaluations=evaluations).losses) == expected


def test_a_loss_that_is_not_finite_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RewardTrainer, "held_out", lambda *_: {"loss": torch.tensor([float("nan")])})
    with pytest.raises(FloatingPointError, match="eval_loss of held-out rows is nan after step 1"):
        run(tmp_path)


# ---------------------------------------------------------------- small things


def test_of_equal_losses_the_first_is_kept() -> None:
    history = [{"step": step, "eval_loss": loss} for step, loss in ((1, 0.7), (2, 0.5), (3, 0.5), (4, 0.6))]
    assert best_step([{"step": 1, "loss": 0.1}, *history]) == 2
    assert verdict([*history, {"step": 4}]) == {
        "step": 2,
        "validation_loss": 0.5,
        "last_step": 4,
        "last_validation_loss": 0.6,
    }
    nothing = verdict([{"step": 4, "train_runtime": 1.0}])
    assert nothing == {"step": 4, "validation_loss": None, "last_step": 4, "last_validation_loss": None}


def test_rows_are_spread() -> None:
    rows = pairs(10)
    assert spread(rows, 4)["id"][:] == ["row0", "row2", "row5", "row7"]
    assert len(spread(rows, None)) == len(spread(rows, 11)) == 10


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"evaluations": -1}, "TrainingConfig.evaluations must be >= 0 or null, got -1"),
        ({"evaluation_pairs": 0}, "TrainingConfig.evaluation_pairs must be > 0, got 0"),
        ({"patience": 0}, "TrainingConfig.patience must be > 0, got 0"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TrainingConfig(**options)
