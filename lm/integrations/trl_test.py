"""TRL's trainer with our methods computes what our own trainer computes, and refuses what it would ignore."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainingArguments
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils as trl_utils

from lm.data import rewards
from lm.data.rewards import Source
from lm.integrations import trl
from lm.integrations.trl import RewardDistillationTrainer, collate, refuse_ignored, resolve, with_margins
from lm.logprobs.completions import CompletionModel
from lm.objectives import (
    DPO,
    DRDO,
    IPO,
    METHODS,
    DistilledDPO,
    EnsembleDPO,
    Method,
    Need,
    PairBatch,
    Pessimism,
)
from lm.training.batches import pair_collator
from lm.training.loop import training_arguments
from lm.training.policy import PolicyTrainer
from tests.tiny import END, VOCABULARY, ExactHead, causal_lm, close, pairs, training
from theory import losses

# TRL and PEFT still say "gradient" where transformers now says "activation".
pytestmark = pytest.mark.filterwarnings(r"ignore:`\w*gradient_checkpointing\w*` is deprecated:FutureWarning")

REFERENCES = ["ref_chosen_logps", "ref_rejected_logps", "ref_sample_logps"]
CARRIED = {
    **{name: METHODS[name]() for name in METHODS if name != "drdo"},
    "drdo-implicit": DRDO(reward_estimate="implicit", beta=0.7),
    "ipo-normalised": IPO(length_normalised=True),
    "e-dpo-on-pairs": EnsembleDPO(kl=Pessimism(samples="preferences")),
}
"""Every method that TRL's model can carry."""


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL reports a trainer's construction to its makers, but not from CI."""
    monkeypatch.setenv("CI", "1")


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", ExactHead)


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w2 ... w49, before them padding and end-of-text."""
    vocabulary = ["<pad>", "<end>", *(f"w{i}" for i in range(2, VOCABULARY))]
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="w49"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=vocabulary[END], pad_token=vocabulary[0])


def scale_of(method: Method) -> float:
    scale = getattr(method, "tau" if isinstance(method, IPO) else "beta")
    assert isinstance(scale, float)
    return scale


def options(folder: Path, **changes: Any) -> DPOConfig:
    """The options of `tests.tiny.training`, in TRL's terms."""
    ours = training_arguments(training(), folder, seed=3, device="cpu")
    same = ("lr_scheduler_type", "max_grad_norm", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "seed")
    return DPOConfig(
        **{
            "output_dir": str(folder),
            "learning_rate": 1e-2,
            "max_steps": 1,
            "logging_steps": 1,
            "per_device_train_batch_size": 8,
            "activation_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **{name: getattr(ours, name) for name in same},
            **changes,
        }
    )


def in_trl(
    folder: Path,
    method: Method,
    data: Dataset,
    *,
    trainer_class: type[RewardDistillationTrainer] = RewardDistillationTrainer,
    **changes: Any,
) -> RewardDistillationTrainer:
    """On the data's own reference log-probs unless a ref_model is given."""
    ref_model = changes.pop("ref_model", None)
    extra = {name: changes.pop(name) for name in ("eval_dataset", "peft_config") if name in changes}
    if ref_model is not None:
        data = data.remove_columns([name for name in REFERENCES if name in data.column_names])
    scale = {} if "beta" in changes else {"beta": scale_of(method)}
    changes = {**scale, "precompute_ref_log_probs": ref_model is None, **changes}
    return trainer_class(
        causal_lm(),
        method=method,
        train_dataset=data,
        args=options(folder, **changes),
        processing_class=tokenizer(),
        ref_model=ref_model,
        **extra,
    )


def ours(folder: Path, method: Method, data: Dataset, **changes: Any) -> PolicyTrainer:
    arguments = training_arguments(training(**changes), folder, seed=3, device="cpu")
    collator = pair_collator(sample=method.needs_samples)
    model = CompletionModel(causal_lm())
    return PolicyTrainer(model=model, args=arguments, train_dataset=data, data_collator=collator, method=method)


def parameters_of(model: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.usefixtures("exact")
def test_loss_and_gradient_are_those_of_our_trainer(name: str, tmp_path: Path) -> None:
    method, data = CARRIED[name], pairs(6)
    mine, theirs = ours(tmp_path / "ours", method, data), in_trl(tmp_path / "trl", method, data)
    for trainer in (mine, theirs):
        trainer.state.max_steps, trainer.state.global_step = 5, 2  # half of training is done
    theirs.model.train()
    expected = mine.losses(mine.model, pair_collator(sample=method.needs_samples)(list(data)))[0].mean()
    loss = theirs.compute_loss(theirs.model, collate(list(theirs.train_dataset)))
    close(loss, expected, what=name)
    pairwise = zip(
        torch.autograd.grad(loss, list(theirs.model.parameters())),
        torch.autograd.grad(expected, list(mine.model.parameters())),
        strict=True,
    )
    for gradient, expected_gradient in pairwise:
        close(gradient, expected_gradient, what=name)


def test_what_trls_own_head_rounds(tmp_path: Path) -> None:
    """TRL computes log-probs in float32 even of a float64 model: the parity above is to the last digit without it."""
    method, data = DistilledDPO(), pairs(6)
    mine, theirs = ours(tmp_path / "ours", method, data), in_trl(tmp_path / "trl", method, data)
    expected = mine.losses(mine.model, pair_collator()(list(data)))[0].mean()
    loss = theirs.compute_loss(theirs.model, collate(list(theirs.train_dataset)))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss.item() != pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("name", ["dpo", "p-dpo", "e-dpo", "hull-dpo"])
@pytest.mark.usefixtures("exact")
def test_training_ends_where_our_trainer_does_however_the_mini_batch_is_cut(name: str, tmp_path: Path) -> None:
    method, data = CARRIED[name], pairs(8)
    mine = ours(tmp_path / "ours", method, data, max_steps=3)
    start = parameters_of(mine.model)
    mine.train()
    assert distance(start, parameters_of(mine.model)) > 1e-2
    for micro in (8, 2):
        cut: dict[str, Any] = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 8 // micro}
        theirs = in_trl(tmp_path / str(micro), method, data, max_steps=3, **cut)
        theirs.train()
        assert distance(parameters_of(mine.model), parameters_of(theirs.model)) <= 1e-9, micro
        for entry, other in zip(mine.state.log_history[:3], theirs.state.log_history[:3], strict=True):
            assert other["loss"] == pytest.approx(entry["loss"], rel=1e-4)
            assert other["logps/chosen"] == pytest.approx(entry["chosen_logps"], rel=1e-4)


@pytest.mark.parametrize("name", ["dpo", "hull-dpo"])
@pytest.mark.usefixtures("exact")
def test_soft_labels_and_weights_are_those_of_our_trainer(name: str, tmp_path: Path) -> None:
    method, data = CARRIED[name], pairs(8, soft=True)
    mine = ours(tmp_path / "ours", method, data, max_steps=2)
    mine.train()
    for micro in (8, 2):
        cut: dict[str, Any] = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 8 // micro}
        theirs = in_trl(tmp_path / str(micro), method, data, max_steps=2, **cut)
        theirs.train()
        assert distance(parameters_of(mine.model), parameters_of(theirs.model)) <= 1e-9, micro
    plain = in_trl(tmp_path / "plain", method, pairs(8), max_steps=2, per_device_train_batch_size=8)
    plain.train()
    assert distance(parameters_of(mine.model), parameters_of(plain.model)) > 1e-6, "they are noticed"


class MeanOfMeans(RewardDistillationTrainer):
    """Control: averages each micro-batch, then the micro-batches, as TRL does."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        return super().compute_loss(model, inputs)


@pytest.mark.usefixtures("exact")
def test_a_ragged_last_mini_batch_weighs_its_pairs_equally(tmp_path: Path) -> None:
    """Eleven pairs, eight at a time, in micro-batches of 8 or 2: the last step has three pairs, cut as 3 or 2 + 1."""
    ends = []
    for micro, trainer_class in ((8, RewardDistillationTrainer), (2, RewardDistillationTrainer), (2, MeanOfMeans)):
        cut: dict[str, Any] = {
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": 8 // micro,
            "max_steps": 2,
        }
        trainer = in_trl(
            tmp_path / f"{micro}{trainer_class.__name__}", DPO(), pairs(11), trainer_class=trainer_class, **cut
        )
        trainer.train()
        ends.append(parameters_of(trainer.model))
    assert distance(ends[0], ends[1]) <= 1e-9
    assert distance(ends[0], ends[2]) > 1e-6


class PerMicroBatchChoice(RewardDistillationTrainer):
    """Control: lets every micro-batch choose its own member."""

    def _global_gram(self, batches: Any, count: Any) -> Any:
        return None


@pytest.mark.usefixtures("exact")
def test_the_member_is_chosen_on_the_global_mini_batch(tmp_path: Path) -> None:
    cut: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    right = in_trl(tmp_path / "right", CARRIED["e-dpo"], pairs(8), **cut)
    wrong = in_trl(tmp_path / "wrong", CARRIED["e-dpo"], pairs(8), trainer_class=PerMicroBatchChoice, **cut)
    for trainer in (right, wrong):
        trainer.train()
    assert distance(parameters_of(right.model), parameters_of(wrong.model)) > 1e-4


def run_on_ranks(folder: Path) -> None:
    """What each process of the test below does."""
    trl_utils._ChunkedLogProbFunction = ExactHead
    cut: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = in_trl(folder, CARRIED["e-dpo"], pairs(8), max_steps=2, **cut)
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(parameters_of(trainer.accelerator.unwrap_model(trainer.model)), folder / "parameters.pt")
    trainer.accelerator.end_training()  # leaves the group: gloo's threads of the rank that is done first would abort


@pytest.mark.thorough
@pytest.mark.usefixtures("exact")
def test_two_ranks_end_where_one_does(tmp_path: Path) -> None:
    one = in_trl(tmp_path / "one", CARRIED["e-dpo"], pairs(8), max_steps=2)
    one.train()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    environment = {**os.environ, **address, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "lm.integrations.trl_test", str(tmp_path)],
            env={**environment, "RANK": rank, "LOCAL_RANK": rank},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert distance(parameters_of(one.model), torch.load(tmp_path / "parameters.pt")) <= 1e-9


# ---------------------------------------------------------------- the reference


def reference_columns(data: Dataset, reference: CompletionModel) -> Dataset:
    """The data with the reference's own log-probs, by our core."""
    batch = pair_collator(sample=True)(list(data))
    with torch.no_grad():
        logps = reference(batch["input_ids"], batch["lengths"]).logps.view(len(data), -1).tolist()
    columns = {"ref_chosen_logps": 0, "ref_rejected_logps": 1, "ref_sample_logps": slice(2, None)}
    return data.remove_columns(list(columns)).map(
        lambda row, i: {name: logps[i][at] for name, at in columns.items()}, with_indices=True
    )


@pytest.mark.parametrize("name", ["d-dpo", "e-dpo"])
@pytest.mark.usefixtures("exact")
def test_references_by_trl_are_the_columns_that_our_core_computes(name: str, tmp_path: Path) -> None:
    method, data = CARRIED[name], pairs(6)
    given = in_trl(tmp_path / "given", method, reference_columns(data, CompletionModel(causal_lm(seed=1))))
    computed = in_trl(tmp_path / "computed", method, data, ref_model=causal_lm(seed=1))
    arbitrary = in_trl(tmp_path / "arbitrary", method, data)
    loss, same, other = (
        trainer.compute_loss(trainer.model, collate(list(trainer.train_dataset)))
        for trainer in (given, computed, arbitrary)
    )
    close(same, loss)
    assert (other - loss).detach().abs() > 1e-3


@pytest.mark.usefixtures("exact")
def test_trl_precomputes_references_of_pairs(tmp_path: Path) -> None:
    data = pairs(6)
    stream = {"ref_model": causal_lm(seed=1)}
    computed = in_trl(tmp_path / "stream", DistilledDPO(), data, **stream)
    ahead = in_trl(tmp_path / "ahead", DistilledDPO(), data, **stream, precompute_ref_log_probs=True)
    assert set(REFERENCES[:2]) <= set(ahead.train_dataset.column_names)
    one, other = (t.compute_loss(t.model, collate(list(t.train_dataset))) for t in (computed, ahead))
    close(one, other)


def test_the_reference_of_an_adapter_is_the_model_without_it(tmp_path: Path) -> None:
    data = pairs(6).remove_columns(REFERENCES)
    trainer = in_trl(
        tmp_path,
        DistilledDPO(),
        data,
        precompute_ref_log_probs=False,
        peft_config=LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    pairs_seen = trainer._pairs(trainer.model, collate(list(trainer.train_dataset)))
    base = CompletionModel(causal_lm())
    batch = pair_collator()(list(data))
    expected = base(batch["input_ids"], batch["lengths"]).logps.view(6, 2)
    close(pairs_seen.ref_chosen_logps, expected[:, 0].float(), tolerance=1e-5)
    assert (pairs_seen.policy_chosen_logps - pairs_seen.ref_chosen_logps).abs().max() > 1e-3


# ---------------------------------------------------------------- text, names, evaluation, the card


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def as_text(data: Dataset) -> Dataset:
    """Prompt, chosen and rejected as text, rewards as TRL users have them, without end-of-text."""
    return Dataset.from_list(
        [
            {
                "prompt": words(row["prompt_ids"]),
                "chosen": " " + words(row["chosen_ids"][:-1]),
                "rejected": " " + words(row["rejected_ids"][:-1]),
                "chosen_reward": row["reward_margin"] + 3.0,
                "rejected_reward": 3.0,
            }
            for row in data
        ]
    )


@pytest.mark.usefixtures("exact")
def test_text_and_rewards_give_the_batch_of_token_ids_and_margins(tmp_path: Path) -> None:
    data, reference = pairs(6), causal_lm(seed=1)
    text = in_trl(tmp_path / "text", DistilledDPO(), as_text(data), ref_model=reference)
    ids = in_trl(tmp_path / "ids", DistilledDPO(), data, ref_model=reference)
    one, other = (collate(list(trainer.train_dataset)) for trainer in (text, ids))
    assert one.keys() == other.keys()
    assert "member_margins" in data.column_names, "which d-DPO does not read"
    assert "member_margins" not in other
    for name in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(one[name], other[name]), name
    close(one["reward_margin"], other["reward_margin"])


def test_of_messages_with_token_ids_the_ids_are_read(tmp_path: Path) -> None:
    """As `lm.export` writes a set of messages: the log-probs beside them are of these tokens."""
    data = pairs(6)

    def said(role: str, count: int) -> list[list[dict[str, str]]]:
        return [[{"role": role, "content": f"{role} {i}"}] for i in range(count)]

    with_messages = data
    for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
        with_messages = with_messages.add_column(name, said(role, 6))
    one, other = (
        collate(list(in_trl(tmp_path / name, DistilledDPO(), rows).train_dataset))
        for name, rows in (("messages", with_messages), ("ids", data))
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "drdo"])
def test_a_name_takes_its_scale_from_trls_beta(name: str) -> None:
    method = resolve(name, 0.3)
    assert type(method) is METHODS[name]
    assert scale_of(method) == 0.3


def test_evaluation_is_the_mean_over_its_pairs(tmp_path: Path) -> None:
    data = pairs(6)
    trainer = in_trl(tmp_path, DistilledDPO(), data, eval_dataset=data, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    loss = trainer.compute_loss(trainer.model, collate(list(trainer.train_dataset)))
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert 0 <= metrics["eval_rewards/accuracies"] <= 1


def test_the_model_card_names_the_paper_of_the_method(tmp_path: Path) -> None:
    in_trl(tmp_path, DPO(), pairs(6)).create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "2405.19316" in card
    assert "Rafailov" not in card


# ---------------------------------------------------------------- the documentation


def trls_loss(
    folder: Path, loss_type: str | list[str], count: int = 6, **changes: Any
) -> tuple[DPOTrainer, dict[str, Tensor], Tensor]:
    """TRL's own trainer on text, its batch, and its loss with beta 0.3."""
    trainer = DPOTrainer(
        causal_lm(),
        ref_model=causal_lm(seed=1),
        args=options(folder, loss_type=loss_type, **{"beta": 0.3, **changes}),
        train_dataset=as_text(pairs(count)),
        processing_class=tokenizer(),
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    return trainer, batch, trainer.compute_loss(trainer.model, batch)


def test_our_losses_on_trls_log_probs_are_trls_losses(tmp_path: Path) -> None:
    """DPO is; TRL's "ipo" is our length-normalised one, and not the paper's."""
    trainer, batch, sigmoid = trls_loss(tmp_path / "dpo", "sigmoid")
    policy, reference = (trainer.compute_ref_log_probs(m, batch) for m in (trainer.model, trainer.ref_model))
    margin = losses.logratio_margin(*policy, *reference)
    close(losses.dpo(margin, beta=0.3).mean(), sigmoid.detach(), tolerance=1e-6)
    ipo = trls_loss(tmp_path / "ipo", "ipo")[2].detach()
    lengths = batch["completion_mask"].sum(1).float().chunk(2)
    logratios = [p - r for p, r in zip(policy, reference, strict=True)]
    close(losses.ipo(losses.normalised_logratio_margin(*logratios, *lengths), tau=0.3).mean(), ipo, tolerance=1e-6)
    assert (losses.ipo(margin, tau=0.3).mean() - ipo).abs() > 1e-2


@pytest.mark.parametrize(
    ("name", "loss_type", "count", "changes"),
    [
        ("dpo", "sigmoid", 6, {}),
        ("robust-dpo", "robust", 6, {"label_smoothing": 0.1}),
        ("hinge", "hinge", 6, {}),
        ("nca", "nca_pair", 6, {}),
        ("sppo", "sppo_hard", 6, {}),
        ("dpo-nll", ["sigmoid", "sft"], 1, {"loss_weights": [1.0, 1.0]}),  # of several pairs TRL averages the tokens
    ],
)
def test_a_method_that_trl_has_too_has_trls_loss_on_trls_batch(
    name: str, loss_type: str | list[str], count: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Both trainers end to end, from text; hyper-parameters but beta at our defaults."""
    expected = trls_loss(tmp_path / "trl", loss_type, count, **changes)[2].detach()
    trainer = in_trl(tmp_path / "ours", resolve(name, 0.3), as_text(pairs(count)), ref_model=causal_lm(seed=1))
    loss = trainer.compute_loss(trainer.model, collate(list(trainer.train_dataset))).detach()
    close(loss, expected, tolerance=1e-5)
    other = in_trl(tmp_path / "other", resolve(name, 0.6), as_text(pairs(count)), ref_model=causal_lm(seed=1))
    assert (other.compute_loss(other.model, collate(list(other.train_dataset))) - expected).abs() > 1e-3


def test_the_documented_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    on_cpu = partial(DPOConfig, use_cpu=True, bf16=False)  # the page is written for a GPU
    monkeypatch.setattr("trl.DPOConfig", on_cpu)
    causal_lm().float().save_pretrained("model")
    tokenizer().save_pretrained("model")
    members = {"chosen_member_rewards": [1.0, 2.0], "rejected_member_rewards": [0.0, 3.0]}
    as_text(pairs(6)).map(lambda row: members).to_json("scored.jsonl")
    page = (Path(__file__).parents[2] / "docs" / "trl.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    seen: dict[str, Any] = {}
    trainers = []
    for block in blocks:
        exec(block, seen)
        trainers.append(seen["trainer"])
    assert [type(trainer).__name__ for trainer in trainers] == [*["RewardDistillationTrainer"] * 2, "DPOTrainer"]
    for trainer in trainers[:2]:
        assert trainer.state.global_step == 3  # epochs, of one mini-batch
    assert seen["dpo"].item() == pytest.approx(float(np.log(2)))  # the policy is the reference still
    assert seen["distilled"].item() == pytest.approx(float(np.mean(np.square(pairs(6)["reward_margin"]))), rel=1e-5)


# ---------------------------------------------------------------- refusals


ADDED = {field.name for field in dataclasses.fields(DPOConfig)} - {
    f.name for f in dataclasses.fields(TrainingArguments)
}
REFUSED: dict[str, Any] = {
    "loss_type": "hinge",
    "loss_weights": [2.0],
    "ld_alpha": 0.5,
    "f_divergence_type": "forward_kl",
    "f_alpha_divergence_coef": 0.4,
    "label_smoothing": 0.1,
    "use_weighting": True,
    "discopop_tau": 0.1,
    "padding_free": True,
    "sync_ref_model": True,
    "ref_model_mixup_alpha": 0.5,
    "ref_model_sync_steps": 64,
    "truncation_mode": "keep_end",
}


def test_every_option_that_trl_adds_is_honoured_or_refused() -> None:
    own = {"learning_rate", "bf16", "logging_steps"}  # redeclared by TRL with other defaults
    assert ADDED | own >= trl.HONOURED | set(REFUSED)
    assert trl.HONOURED | set(REFUSED) >= ADDED
    assert not trl.HONOURED & set(REFUSED)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize("name", [*REFUSED, "label_smoothing_factor", "average_tokens_across_devices"])
def test_an_option_that_would_be_ignored_is_refused(name: str, tmp_path: Path) -> None:
    value = {**REFUSED, "label_smoothing_factor": 0.1, "average_tokens_across_devices": False}[name]
    refuse_ignored(options(tmp_path))
    with pytest.raises(ValueError, match=rf"DPOConfig\.{name} is .* ignore.* leave it at"):
        in_trl(tmp_path, DPO(), pairs(2), **{name: value})


@pytest.mark.parametrize(
    ("method", "beta", "error", "message"),
    [
        ("edpo", 1.0, ValueError, "method must be one of dpo, ipo, .* got 'edpo'"),
        (DPO, 1.0, TypeError, "method must be a name or an lm.objectives.Method, got type"),
        ("drdo", 1.0, ValueError, "needs a reward head, which TRL's model does not have"),
        (DRDO(), 1.0, ValueError, "needs a reward head"),
        (
            EnsembleDPO(kl=Pessimism(target=1.0)),
            1.0,
            ValueError,
            r"EnsembleDPO.kl.target is held by .*lm.policy. alone",
        ),
        (
            DRDO(reward_estimate="implicit", beta=1.0, oracle_alpha=0.01),
            1.0,
            ValueError,
            "distils an oracle of its own, which is not trained here",
        ),
        (DPO(beta=0.2), 0.1, ValueError, r"DPO.beta is 0.2, but DPOConfig.beta is 0.1; give both the same"),
        (IPO(tau=0.2), 0.1, ValueError, r"IPO.tau is 0.2, but DPOConfig.beta is 0.1"),
        ("dpo", -1.0, ValueError, "DPO.beta must be a finite number > 0, got -1.0"),
    ],
)
def test_a_method_that_does_not_fit_is_refused(method: Any, beta: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve(method, beta)


def without(*columns: str) -> Dataset:
    return pairs(4).remove_columns(list(columns))


def with_value(column: str, value: Any) -> Dataset:
    data = pairs(4)
    values = list(data[column])
    values[2] = value
    return data.remove_columns(column).add_column(column, values)


@pytest.mark.parametrize(
    ("name", "data", "changes", "message"),
    [
        (
            "d-dpo",
            without("reward_margin", "member_margins"),
            {},
            "train: DistilledDPO needs rewards, in chosen_reward and rejected_reward or reward_margin or "
            "chosen_member_rewards and rejected_member_rewards or member_margins; there are .*lm.score.*lm.export",
        ),
        (
            "e-dpo",
            without("member_margins"),
            {},
            "train: EnsembleDPO needs members, in chosen_member_rewards and rejected_member_rewards or member_margins; "
            "there are .*lm.score",
        ),
        (
            "e-dpo",
            pairs(4, members=1).remove_columns("reward_margin"),
            {},
            "train: EnsembleDPO needs members, in chosen_member_rewards and",
        ),
        ("e-dpo", without("sample_ids"), {}, r"needs sample_ids; .*Pessimism\(samples=\"preferences\"\)"),
        (
            "d-dpo",
            with_value("reward_margin", float("nan")),
            {},
            "train, row 2: 'reward_margin' must be a finite number, got nan",
        ),
        (
            "d-dpo",
            with_value("reward_margin", None),
            {},
            "train, row 2: chosen_reward and .* is the one reward: none here, one in the rows before",
        ),
        (
            "d-dpo",
            with_value("reward_margin", None).remove_columns("member_margins"),
            {},
            "train, row 2: DistilledDPO needs rewards, but the row has none",
        ),
        (
            "e-dpo",
            with_value("member_margins", [1.0, 2.0]),
            {},
            "train, row 2: 2 rewards in an ensemble's lists, 3 in the rows before",
        ),
        (
            "e-dpo",
            with_value("member_margins", [1.0]),
            {},
            "train, row 2: .* a list of one entry is the one reward too",
        ),
        (
            "d-dpo",
            with_value("ref_chosen_logps", float("nan")),
            {},
            "train, row 2: ref_chosen_logps must be finite numbers, got nan",
        ),
        ("dpo", with_value("chosen_ids", []), {}, "train, row 2: prompt and completions need at least one token"),
        ("e-dpo", with_value("sample_ids", [[5, 1]]), {}, "train, row 2: sample_ids must be 2 lists of tokens"),
        ("dpo", pairs(4), {"max_length": 6}, "the longest .* has .* tokens, which max_length=6 would cut"),
        ("dpo", pairs(4), {"precompute_ref_log_probs": False}, "which precompute_ref_log_probs=False would ignore"),
        ("e-dpo", without("ref_sample_logps"), {}, "has ref_chosen_logps, ref_rejected_logps of .*ref_sample_logps"),
        ("e-dpo", without(*REFERENCES), {}, "TRL precomputes log-probs of pairs, not of samples"),
        ("e-dpo", pairs(4), {"eval_dataset": pairs(4)}, "EnsembleDPO chooses on a training mini-batch"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    name: str, data: Dataset, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        in_trl(tmp_path, CARRIED[name], data, **changes)


def as_rewards(data: Dataset, one: Source, members: Source) -> Dataset:
    """The margins of the data under other columns, as rewards of both sides where there are two."""
    bare = data.remove_columns(["reward_margin", "member_margins"])

    def columns(row: dict[str, Any]) -> dict[str, Any]:
        margin, listed = row["reward_margin"], row["member_margins"]
        both = (margin + 3.0, 3.0), ([m + 3.0 for m in listed], [3.0] * len(listed))
        ones, lists = (margin,) if len(one) == 1 else both[0], (listed,) if len(members) == 1 else both[1]
        return {**dict(zip(one, ones, strict=True)), **dict(zip(members, lists, strict=True))}

    return Dataset.from_list([{**row, **columns(full)} for row, full in zip(bare, data, strict=True)])


@pytest.mark.parametrize("members", rewards.OF_MEMBERS, ids=rewards.named)
@pytest.mark.parametrize("one", rewards.OF_ONE, ids=rewards.named)
def test_every_name_of_a_reward_gives_the_same_margins(one: Source, members: Source) -> None:
    data = pairs(6)
    given = as_rewards(data, one, members)
    for name in ("d-dpo", "e-dpo", "dpo"):
        method = METHODS[name]()
        made, expected = (with_margins(each, method, "train") for each in (given, data))
        own = {"rewards": "reward_margin", "members": "member_margins"}
        assert set(made.column_names) & set(rewards.EVERY) == {own[need] for need in method.needs}, "and no other"
        assert sorted(made.column_names) == sorted(expected.column_names)
        for need in method.needs:
            np.testing.assert_allclose(made[own[need]], expected[own[need]], rtol=1e-12, atol=1e-12)


def test_without_a_one_reward_it_is_the_members_mean() -> None:
    """As `data.rewards given` has it of the same file."""
    data = pairs(4).remove_columns("reward_margin")
    made = with_margins(data, DistilledDPO(), "train")
    assert made["reward_margin"] == pytest.approx([sum(margins) / 3 for margins in data["member_margins"]])


def test_several_columns_of_one_reward_have_to_agree() -> None:
    """`lm.export` writes both sides and their difference."""
    data = pairs(4)
    chosen, rejected = [margin + 3.0 for margin in data["reward_margin"]], [3.0] * 4
    both = data.add_column("chosen_reward", chosen).add_column("rejected_reward", rejected)
    assert with_margins(both, DistilledDPO(), "train")["reward_margin"] == pytest.approx(data["reward_margin"])
    listed = [[margin + 1.0 for margin in margins] for margins in data["member_margins"]]
    contradictory = data.add_column("chosen_rewards", listed).add_column("rejected_rewards", [[0.0] * 3] * 4)
    for method in (DistilledDPO(), EnsembleDPO()):
        with pytest.raises(ValueError, match=r"^train, row 0: the reward margins contradict each other: "):
            with_margins(contradictory, method, "train")
    assert set(with_margins(contradictory, DPO(), "train").column_names) == set(data.column_names) - {
        "reward_margin",
        "member_margins",
    }


def test_lengths_are_of_the_log_probs_type(tmp_path: Path) -> None:
    """A mean a token of a float64 model would else be rounded, or refused, depending on the backend."""
    trainer = in_trl(tmp_path, DPO(), pairs(4))
    seen = trainer._pairs(trainer.model, collate(list(trainer.train_dataset)))
    assert seen.chosen_lengths.dtype == seen.rejected_lengths.dtype == seen.policy_chosen_logps.dtype
    assert seen.chosen_lengths.tolist() == [len(row["chosen_ids"]) for row in pairs(4)]
    assert seen.rejected_lengths.tolist() == [len(row["rejected_ids"]) for row in pairs(4)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledSquares(Method):
    """A method of the user's own, whose scale is no implicit reward's."""

    needs: ClassVar[frozenset[Need]] = frozenset({"rewards"})
    beta: float = 2.0

    def __call__(self, pairs: PairBatch) -> Tensor:
        return (self.beta * pairs.logratio_margin / pairs.chosen_lengths - pairs.known("reward_margin")) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unscaled(Method):
    """One without a scale."""

    def __call__(self, pairs: PairBatch) -> Tensor:
        return pairs.logratio_margin**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Headed(Method):
    """One that always has a reward head, and a scale of another name."""

    scale_option: ClassVar[str] = "zeta"
    zeta: float = 1.0
    head: bool = True

    @property
    def needs_reward_head(self) -> bool:
        return self.head


def test_what_a_method_says_of_itself_is_what_is_advised_and_set() -> None:
    with pytest.raises(
        ValueError, match=r"needs a reward head.*, or give DRDO\(reward_estimate=\"implicit\", beta=...\)"
    ):
        resolve(DRDO(), 1.0)
    with pytest.raises(ValueError, match=r"needs a reward head.*`python -m lm.policy`$"):
        resolve(Headed(), 1.0)
    assert resolve(Headed(head=False), 1.0) == Headed(head=False)
    with pytest.raises(ValueError, match=r"Headed.zeta is 1.0, but DPOConfig.beta is 0.3"):
        resolve(Headed(head=False), 0.3)


@pytest.mark.usefixtures("exact")
def test_a_made_up_method_trains_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "squares", ScaledSquares)
    monkeypatch.setitem(METHODS, "unscaled", Unscaled)
    assert resolve("squares", 0.3) == ScaledSquares(beta=0.3)
    assert resolve("unscaled", 0.3) == Unscaled()
    with pytest.raises(ValueError, match=r"ScaledSquares.beta is 2.0, but DPOConfig.beta is 0.3"):
        resolve(ScaledSquares(), 0.3)
    method, data = ScaledSquares(), pairs(6)
    mine, theirs = ours(tmp_path / "ours", method, data), in_trl(tmp_path / "trl", method, data, beta=2.0)
    expected = mine.losses(mine.model, pair_collator()(list(data)))[0].mean()
    close(theirs.compute_loss(theirs.model, collate(list(theirs.train_dataset))), expected)


def test_half_a_pair_of_columns_and_a_reference_beside_its_log_probs_are_refused(tmp_path: Path) -> None:
    half = pairs(4).remove_columns("reward_margin").add_column("chosen_reward", [0.0] * 4)
    with pytest.raises(ValueError, match="train, row 0: 'rejected_reward' must be a finite number, got None"):
        in_trl(tmp_path, DistilledDPO(), half)
    contradictory = pairs(4).add_column("chosen_reward", [0.0] * 4).add_column("rejected_reward", [0.0] * 4)
    with pytest.raises(ValueError, match="train, row 0: the reward margins contradict each other: "):
        in_trl(tmp_path, DistilledDPO(), contradictory)
    given = {"args": options(tmp_path, precompute_ref_log_probs=True), "processing_class": tokenizer()}
    with pytest.raises(ValueError, match="ref_chosen_logps, ref_rejected_logps, so ref_model would be ignored"):
        RewardDistillationTrainer(
            causal_lm(), method="dpo", train_dataset=pairs(4), ref_model=causal_lm(seed=1), **given
        )


@pytest.mark.parametrize("name", ["data_collator", "compute_metrics"])
def test_a_hook_that_would_be_ignored_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot be honoured"):
        RewardDistillationTrainer(
            causal_lm(), method="dpo", train_dataset=pairs(2), args=options(tmp_path), **{name: lambda x: x}
        )


def test_a_stream_is_refused(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(pairs(2)))
    with pytest.raises(
        TypeError, match=r"train: scores can be checked of a datasets.Dataset only, got IterableDataset"
    ):
        in_trl(tmp_path, DPO(), stream)


def test_logits_and_an_ensembles_evaluation_are_refused(tmp_path: Path) -> None:
    trainer = in_trl(tmp_path, CARRIED["e-dpo"], pairs(4))
    with pytest.raises(ValueError, match="return_outputs cannot be honoured"):
        trainer.compute_loss(trainer.model, collate(list(trainer.train_dataset)), return_outputs=True)
    with pytest.raises(ValueError, match="chooses on a training mini-batch"):
        trainer.evaluate(pairs(4))


def test_a_loss_that_is_not_finite_stops_training(tmp_path: Path) -> None:
    trainer = in_trl(tmp_path, DistilledDPO(), pairs(8))
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(FloatingPointError, match="a loss at step 0 is not finite"):
        trainer.train()


def test_without_trl_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("another_copy", trl.__file__)
    assert spec is not None
    assert spec.loader is not None
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"needs TRL: pip install 'reward-distillation\[trl\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if __name__ == "__main__":
    run_on_ranks(Path(sys.argv[1]))


def test_the_examples_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "docs" / "trl.md"
    examples = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    causal_lm().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        {
            "prompt": f"w{i + 2} w{i + 3}",
            "chosen": f" w{i + 4}",
            "rejected": f" w{i + 5} w{i + 6}",
            "chosen_reward": 0.1 * i,
            "rejected_reward": 0.3,
            "chosen_member_rewards": [0.1 * i, 0.2],
            "rejected_member_rewards": [0.3, -0.1],
        }
        for i in range(8)
    ]
    Dataset.from_list(rows).to_json(tmp_path / "scored.jsonl")
    monkeypatch.chdir(tmp_path)
    small = {"use_cpu": True, "bf16": False, "max_steps": 1, "report_to": "none", "disable_tqdm": True}
    monkeypatch.setattr("trl.DPOConfig", partial(DPOConfig, **small))
    names: dict[str, Any] = {}
    for example in examples:
        exec(example, names)  # the repository's own text
    assert len(examples) == 3
    margin = names["margin"]
    assert torch.equal(names["distilled"], ((names["rewards"] - margin) ** 2).mean())
    assert torch.equal(names["dpo"], losses.dpo(margin, beta=0.1).mean())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"Prompt": "Why?", "chosen": "a b", "rejected": "a c"}],
            "train, row 0: there is no 'prompt', but column 'Prompt'",
        ),
        (
            [{"prompt": "Why?", "chosen": "Why? b", "rejected": "Why? c"}] * 2,
            "train: in 2 of 2 rows both sides begin with",
        ),
        (
            [{"prompt": "Why?", "chosen": "b", "rejected": "c"}, {"prompt": None, "chosen": "a b", "rejected": "a c"}],
            "train, row 1: 'prompt' is empty, and other rows have one",
        ),
    ],
)
def test_prompts_that_trl_would_misread_are_refused(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        trl.check_prompts(Dataset.from_list(rows), "train")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "chosen": "b", "rejected": "c", "topic": "x"},
        {"chosen": "a b", "rejected": "a c"},
        {
            "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}],
            "topic": "x",
        },
    ],
)
def test_prompts_that_trl_reads_as_they_are_meant_pass(row: dict[str, Any]) -> None:
    trl.check_prompts(Dataset.from_list([row]), "train")


def test_log_probs_of_text_are_refused_where_trl_makes_other_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a space between prompt and completion, TRL's one text has another word where they meet."""
    known = {name: [-3.0] * 4 for name in REFERENCES[:2]}
    text = as_text(pairs(4)).to_dict() | known
    apart = in_trl(tmp_path / "apart", DistilledDPO(), Dataset.from_dict(text))
    assert set(REFERENCES[:2]) <= set(apart.train_dataset.column_names)
    joined = {**text, "chosen": [*text["chosen"][:2], text["chosen"][2].lstrip(), text["chosen"][3]]}
    with pytest.raises(ValueError, match=r"^train, row 2: ref_chosen_logps, ref_rejected_logps are of tokens.*--ids"):
        in_trl(tmp_path / "joined", DistilledDPO(), Dataset.from_dict(joined))
    without = Dataset.from_dict({name: column for name, column in joined.items() if name not in known})
    in_trl(tmp_path / "without", DistilledDPO(), without, ref_model=causal_lm(seed=1))
    told = {
        name: [[{"role": "user", "content": one}] for one in text[name]] for name in ("prompt", "chosen", "rejected")
    }
    trl.check_tokens(Dataset.from_dict(text | told), apart.train_dataset, tokenizer(), "train")
    assert "are taken to be of the tokens that TRL makes of the rows; prompt_ids" in caplog.text
