"""However a mini-batch is cut up, or training interrupted, the parameters come out the same; losses are theory's."""

from __future__ import annotations

import gc
import shutil
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from lm.config import TrainingConfig
from lm.logprobs import kernels
from lm.logprobs.completions import CompletionModel, collate
from lm.objectives import (
    DPO,
    DRDO,
    IPO,
    METHODS,
    DistilledDPO,
    EnsembleDPO,
    HullDPO,
    Method,
    PairBatch,
    Pessimism,
    PessimisticDPO,
)
from lm.objectives_test import EXPECTED, NO_REFERENCE
from lm.training.batches import cut, pair_collator, sft_collator
from lm.training.loop import Snapshots, fit, training_arguments
from lm.training.policy import PolicyTrainer
from lm.training.trainer import CompletionTrainer, RewardTrainer, SFTTrainer
from tests.interrupted import Kill
from tests.tiny import causal_lm, close, each_method, pairs, reward_model, training
from theory import losses

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """What a training run left behind."""

    parameters: Parameters
    history: list[dict[str, float]]


def policy_model(method: Method, **config: Any) -> CompletionModel:
    torch.manual_seed(0)
    return CompletionModel(causal_lm(**config), reward_head=method.needs_reward_head).double()


def run_policy(
    folder: Path, method: Method, data: Dataset, *, callbacks: Any = (), model_config: Any = None, **options: Any
) -> Run:
    model = policy_model(method, **(model_config or {}))
    collator = pair_collator(sample=method.needs_samples)
    return _run(PolicyTrainer, model, data, collator, folder, options, method=method, callbacks=list(callbacks))


def _run(
    trainer: type[CompletionTrainer],
    model: CompletionModel,
    data: Dataset,
    collator: Any,
    folder: Path,
    options: dict[str, Any],
    **extra: Any,
) -> Run:
    arguments = training_arguments(training(**options), folder, seed=3, device="cpu")
    history = fit(trainer, model, data, collator, arguments, **extra)
    return Run({name: p.detach().clone() for name, p in model.named_parameters()}, history)


def distance(one: Parameters, other: Parameters) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def start_of(method: Method) -> Parameters:
    return {name: p.detach().clone() for name, p in policy_model(method).named_parameters()}


# ---------------------------------------------------------------- the cut of the mini-batch

CUTS = {"8x1": 8, "4x2": 4, "1x8": 1}
"""Micro-batch x accumulation steps, and the micro-batch."""


@pytest.mark.parametrize("name", each_method())
def test_a_step_does_not_depend_on_the_micro_batches(name: str, tmp_path: Path) -> None:
    method, data = METHODS[name](), pairs(8)
    whole = run_policy(tmp_path / "8x1", method, data)
    assert distance(whole.parameters, start_of(method)) > 1e-3
    for how in ("4x2", "1x8"):
        part = run_policy(tmp_path / how, method, data, micro_batch_size=CUTS[how])
        assert distance(whole.parameters, part.parameters) <= 1e-10, how
        for key in ("loss", "chosen_logps", "accuracy"):
            assert part.history[0][key] == pytest.approx(whole.history[0][key], rel=1e-5), (how, key)


@pytest.mark.parametrize("name", ["dpo", "e-dpo", "hull-dpo"])
def test_a_ragged_last_mini_batch_weighs_its_pairs_equally(name: str, tmp_path: Path) -> None:
    """Eleven pairs, eight at a time: a second step of three pairs, in micro-batches of 3, 2 + 1 or 1 + 1 + 1."""
    method, data = METHODS[name](), pairs(11)
    runs = [
        run_policy(tmp_path / str(micro), method, data, micro_batch_size=micro, epochs=1, max_steps=None).parameters
        for micro in (8, 2, 1)
    ]
    one_step = run_policy(tmp_path / "first", method, data).parameters
    assert distance(runs[0], one_step) > 1e-3, "there was a second step"
    assert max(distance(runs[0], other) for other in runs[1:]) <= 1e-10


class MeanOfMeans(PolicyTrainer):
    """Control: averages each micro-batch, then the micro-batches (of which there are four here, or two at the end)."""

    def losses(self, model: Any, batch: Any, known: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        loss, logged = super().losses(model, batch, known)
        parts, units = (4, 8) if self.state.global_step == 0 else (2, 3)
        return loss * (units / (parts * len(loss))), logged


def test_a_mean_of_micro_batch_means_is_noticed(tmp_path: Path) -> None:
    method, data = DPO(), pairs(11)
    options = {"micro_batch_size": 2, "epochs": 1, "max_steps": None}
    right = run_policy(tmp_path / "right", method, data, **options).parameters
    model = policy_model(method)
    wrong = _run(MeanOfMeans, model, data, pair_collator(), tmp_path / "wrong", options, method=method).parameters
    assert distance(right, wrong) > 1e-6


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_sft_and_reward_steps_do_not_depend_on_the_micro_batches(kind: str, tmp_path: Path) -> None:
    data = pairs(8)
    results = []
    for how, micro in CUTS.items():
        torch.manual_seed(0)
        if kind == "sft":
            rows = data.rename_column("chosen_ids", "completion_ids")
            model, trainer, collator = CompletionModel(causal_lm()), SFTTrainer, sft_collator()
        else:
            rows, model, trainer, collator = data, CompletionModel(reward_model()), RewardTrainer, pair_collator()
        results.append(_run(trainer, model, rows, collator, tmp_path / how, {"micro_batch_size": micro}).parameters)
    assert max(distance(results[0], other) for other in results[1:]) <= 1e-10


class PerMicroBatchChoice(PolicyTrainer):
    """Control: lets every micro-batch choose its own member or mixture."""

    def before_step(self, *_: Any) -> None:
        return None


@pytest.mark.parametrize("name", ["e-dpo", "hull-dpo"])
def test_an_ensembles_choice_is_made_on_the_global_mini_batch(name: str, tmp_path: Path) -> None:
    method, data = METHODS[name](), pairs(8)
    whole = run_policy(tmp_path / "whole", method, data).parameters
    wrong = _run(
        PerMicroBatchChoice,
        policy_model(method),
        data,
        pair_collator(sample=True),
        tmp_path / "wrong",
        {"micro_batch_size": 2},
        method=method,
    ).parameters
    assert distance(whole, wrong) > 1e-4


@dataclass(frozen=True)
class Limits:
    """What `cut` reads of the arguments."""

    micro_batch_size: int | None
    micro_batch_tokens: int | None
    world_size: int


@given(
    st.lists(st.lists(st.integers(1, 30), min_size=2, max_size=4), min_size=1, max_size=20),
    st.builds(Limits, st.none() | st.integers(1, 6), st.none() | st.integers(1, 90), st.integers(1, 4)),
)
def test_a_cut_has_every_example_once_and_keeps_the_limits(lengths: list[list[int]], limits: Limits) -> None:
    """Same number of parts for every rank; what fills up has no weight; a part over the limit is a single example."""
    tokens = torch.arange(sum(map(sum, lengths)))
    scores = {"reward_margin": torch.arange(len(lengths))}
    batch: dict[str, Any] = {
        "ids": [str(i) for i in range(len(lengths))],
        "input_ids": tokens,
        "lengths": lengths,
        "scores": scores,
    }
    parts = cut(batch, limits)  # type: ignore[arg-type]
    assert len(parts) % limits.world_size == 0
    assert {weight for _, weight in parts} <= {0.0, 1.0}
    kept = [part for part, weight in parts if weight]
    assert sorted(i for part in kept for i in part["ids"]) == sorted(batch["ids"])
    starts = np.cumsum([0, *map(sum, lengths)])
    for part, _ in parts:
        rows = [int(i) for i in part["ids"]]
        assert part["lengths"] == [lengths[i] for i in rows]
        assert part["input_ids"].tolist() == [t for i in rows for t in range(starts[i], starts[i + 1])]
        assert part["scores"]["reward_margin"].tolist() == rows
        if len(rows) > 1:
            assert limits.micro_batch_size is None or len(rows) <= limits.micro_batch_size
            assert limits.micro_batch_tokens is None or len(part["input_ids"]) <= limits.micro_batch_tokens
    # No part is left empty-handed while another could share: fewer parts would break a limit, or there is one a rank.
    if len(parts) > limits.world_size:
        assert limits.micro_batch_size or limits.micro_batch_tokens


# ---------------------------------------------------------------- losses by hand


def plain_logp(model: CompletionModel, prompt: list[int], tokens: list[int]) -> Tensor:
    """Summed log-prob of one unpadded sequence."""
    logprobs = model.model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
    terms = [logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(tokens)]
    return torch.stack(terms).sum()


def by_hand(name: str, model: CompletionModel, data: Dataset) -> Tensor:
    """Mean loss of the mini-batch after half of the training, from theory.losses on log-probs of plain forwards."""

    def score(column: str) -> Tensor:
        return torch.tensor(data[column], dtype=torch.float64)

    def lengths(column: str) -> Tensor:
        return torch.tensor([len(ids) for ids in data[column]], dtype=torch.float64)

    def estimate(column: str) -> Tensor:
        assert model.reward_head is not None
        rows = zip(data["prompt_ids"], data[column], strict=True)
        ends = [model.model.base_model(torch.tensor([[*p, *c]])).last_hidden_state[0, -1] for p, c in rows]
        values: Tensor = model.reward_head(torch.stack(ends))[:, 0]
        return values

    chosen, rejected = (
        torch.stack([plain_logp(model, p, c) for p, c in zip(data["prompt_ids"], data[column], strict=True)])
        for column in ("chosen_ids", "rejected_ids")
    )
    sample = torch.stack(
        [
            torch.stack([plain_logp(model, prompt, tokens) for tokens in samples])
            for prompt, samples in zip(data["prompt_ids"], data["sample_ids"], strict=True)
        ]
    )
    pairs = PairBatch(
        policy_chosen_logps=chosen,
        policy_rejected_logps=rejected,
        ref_chosen_logps=score("ref_chosen_logps"),
        ref_rejected_logps=score("ref_rejected_logps"),
        chosen_lengths=lengths("chosen_ids"),
        rejected_lengths=lengths("rejected_ids"),
        reward_margin=score("reward_margin"),
        member_margins=score("member_margins").T,
        sample_logratios=(sample - score("ref_sample_logps")).mean(1),
        estimated_reward_margin=None
        if model.reward_head is None
        else estimate("chosen_ids") - estimate("rejected_ids"),
    )
    loss: Tensor = EXPECTED[name](pairs)
    return loss.mean()


def one_batch(trainer: PolicyTrainer, rows: Dataset, method: Method) -> Tensor:
    """The trainer's own loss of these rows as one micro-batch."""
    return trainer.losses(trainer.model, pair_collator(sample=method.needs_samples)(list(rows)))[0]


def make_trainer(method: Method, data: Dataset, folder: Path) -> PolicyTrainer:
    arguments = training_arguments(training(), folder, seed=3, device="cpu")
    model = policy_model(method)
    return PolicyTrainer(model=model, args=arguments, train_dataset=data, method=method)


@pytest.mark.parametrize("name", METHODS)
def test_each_methods_loss_and_gradient_are_theorys_on_plain_forwards(name: str, tmp_path: Path) -> None:
    method, data = METHODS[name](), pairs(6)
    trainer = make_trainer(method, data, tmp_path)
    trainer.state.max_steps, trainer.state.global_step = 5, 2  # half of training is done
    ours = one_batch(trainer, data, method).mean()
    with trainer.model.stock():
        expected = by_hand(name, trainer.model, data)
    close(ours, expected)
    parameters = list(trainer.model.parameters())
    for one, other in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        close(one, other)
    # Control: the loss notices a change of any score that the method says it reads.
    reads = {"ref_chosen_logps"} if name not in NO_REFERENCE else set()
    reads |= {"reward_margin"} if "rewards" in method.needs else set()
    reads |= {"member_margins"} if "members" in method.needs else set()
    reads |= {"ref_sample_logps"} if method.needs_samples else set()
    for column in ("ref_chosen_logps", "reward_margin", "member_margins", "ref_sample_logps"):
        changed = data.map(lambda row, c=column: {c: (np.array(row[c]) + 1.0).tolist()})
        moved = not torch.isclose(one_batch(trainer, changed, method).mean(), ours, rtol=1e-9)
        assert moved == (column in reads), column


def test_sft_weighs_every_token_the_same(tmp_path: Path) -> None:
    """The logged loss is the mean over tokens of the plain forward, which is not the mean over rows of row means."""
    data = pairs(8).rename_column("chosen_ids", "completion_ids")
    model = CompletionModel(causal_lm())
    logps = [plain_logp(model, r["prompt_ids"], r["completion_ids"]).item() for r in data]
    tokens = [len(row["completion_ids"]) for row in data]
    run = _run(SFTTrainer, model, data, sft_collator(), tmp_path, {"micro_batch_size": 2})
    per_token = -sum(logps) / sum(tokens)
    assert run.history[0]["loss"] == pytest.approx(per_token, rel=1e-4)
    per_row = -np.mean([logp / count for logp, count in zip(logps, tokens, strict=True)])
    assert abs(per_token - per_row) > 1e-3 * per_token


def test_reward_training_minimises_bradley_terry(tmp_path: Path) -> None:
    data, model = pairs(8), CompletionModel(reward_model())
    with torch.no_grad():
        chosen, rejected = (
            model(**collate(data["prompt_ids"], [[c] for c in data[column]])).rewards
            for column in ("chosen_ids", "rejected_ids")
        )
    run = _run(RewardTrainer, model, data, pair_collator(), tmp_path, {"micro_batch_size": 2})
    assert run.history[0]["loss"] == pytest.approx(float(losses.bradley_terry(chosen - rejected).mean()), rel=1e-4)
    assert run.history[0]["accuracy"] == pytest.approx(float((chosen > rejected).double().mean()))
    assert run.history[0]["margin"] == pytest.approx(float((chosen - rejected).mean()), rel=1e-4)


# ---------------------------------------------------------------- schedules, heads


class Alphas(PessimisticDPO):
    """Records the KL weight at every step."""

    def __call__(self, batch: PairBatch) -> Tensor:
        SEEN.append(self.kl.alpha(batch.progress))
        return super().__call__(batch)


SEEN: list[float] = []


def test_alpha_runs_from_its_start_at_the_first_step_to_its_end_at_the_last(tmp_path: Path) -> None:
    SEEN.clear()
    run_policy(tmp_path, Alphas(kl=Pessimism(alpha_start=0.5, alpha_end=0.1)), pairs(8), max_steps=5)
    assert pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1]) == SEEN


def test_drdos_reward_head_learns_the_reward_margin(tmp_path: Path) -> None:
    method, data = DRDO(), pairs(8)
    run = run_policy(tmp_path, method, data, max_steps=60)
    start = start_of(method)["reward_head.weight"]
    assert not torch.equal(run.parameters["reward_head.weight"], start)
    assert run.history[-2]["loss"] < 0.2 * run.history[0]["loss"]


# ---------------------------------------------------------------- faults


def test_a_loss_that_is_not_finite_names_the_rows_and_stops_training(tmp_path: Path) -> None:
    data = pairs(8).map(
        lambda row: {"ref_chosen_logps": float("nan") if row["id"] == "row5" else row["ref_chosen_logps"]}
    )
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 0, rows (row\d, )*row5"):
        run_policy(tmp_path, DPO(), data, micro_batch_size=2)


def test_a_missing_score_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="member_margins is needed by this method"):
        run_policy(tmp_path, EnsembleDPO(), pairs(8).remove_columns("member_margins"))


@dataclass(frozen=True, kw_only=True)
class Mean(Method):
    """Distils the members' mean, and weighs none by how near it is."""

    needs = frozenset({"members"})

    def __call__(self, pairs: PairBatch) -> Tensor:
        loss: Tensor = losses.distillation(pairs.logratio_margin, pairs.known("member_margins").mean(0), beta=1.0)
        return loss


def test_a_method_may_distil_members_without_weighing_them(tmp_path: Path) -> None:
    whole = run_policy(tmp_path / "whole", Mean(), pairs(8), max_steps=1)
    parts = run_policy(tmp_path / "parts", Mean(), pairs(8), max_steps=1, micro_batch_size=3)
    assert distance(whole.parameters, parts.parameters) <= 1e-9
    assert not [name for row in whole.history for name in row if name.startswith("member_weight")]


def test_a_training_without_a_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"exactly one of epochs and max_steps.*got None and None"):
        training_arguments(TrainingConfig(), tmp_path, seed=0, device="cpu")


@pytest.mark.parametrize("ranks", ["3", "16"])
def test_ranks_that_do_not_divide_the_mini_batch_are_refused(
    ranks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", ranks)
    with pytest.raises(ValueError, match=f"batch_size 8 must be a multiple of the number of ranks, {ranks}"):
        training_arguments(training(), tmp_path, seed=0, device="cpu")


class Dropout(TrainerCallback):  # type: ignore[misc]
    """Turned on after `fit` has looked, so that there is something for the saved generators to be right about."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, module in kwargs["model"].named_modules():
            if name.endswith("resid_dropout"):
                module.p = 0.5


RESUMED: dict[str, tuple[Method, dict[str, Any]]] = {
    "dpo": (DPO(), {}),
    "tied embeddings": (IPO(), {"tie_word_embeddings": True}),
    "dropout": (DistilledDPO(), {"architecture": "gpt2"}),
    "reward head": (DRDO(), {}),
    "annealed alpha, ensemble": (HullDPO(kl=Pessimism(alpha_start=0.0, alpha_end=1.0)), {}),
    "KL target": (PessimisticDPO(kl=Pessimism(target=150.0, rate=0.5)), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(case: str, tmp_path: Path) -> None:
    """Ten pairs, four at a time, so that the checkpoint lies inside an epoch and a last mini-batch is ragged."""
    method, model_config = RESUMED[case]
    options = {
        "max_steps": 7,
        "batch_size": 4,
        "micro_batch_size": 2,
        "schedule": "cosine",
        "warmup_fraction": 0.3,
        "model_config": model_config,
    }
    data, noise = pairs(10), [Dropout()] if case == "dropout" else []
    whole = run_policy(tmp_path / "whole", method, data, callbacks=noise, **options)
    with pytest.raises(KeyboardInterrupt):
        run_policy(tmp_path / "killed", method, data, save_steps=2, callbacks=[*noise, Kill(5)], **options)
    checkpoint = get_last_checkpoint(str(tmp_path / "killed"))
    assert checkpoint is not None
    assert checkpoint.endswith("checkpoint-4")
    resumed = run_policy(tmp_path / "killed", method, data, save_steps=2, callbacks=noise, **options)
    assert resumed.parameters.keys() == whole.parameters.keys()
    for name, value in whole.parameters.items():
        assert torch.equal(resumed.parameters[name], value), name
    for key in ("loss", "alpha"):
        assert [row.get(key) for row in resumed.history[:7]] == [row.get(key) for row in whole.history[:7]]


# ---------------------------------------------------------------- the probe


def probed(
    method: Method,
    folder: Path,
    data: Dataset,
    *,
    scoring_tokens: int = 8192,
    held_out: Dataset | None = None,
    learnt: Dataset | None = None,
    **options: Any,
) -> Run:
    """A run of three steps, probed before, at the second and at the last."""
    model = policy_model(method)
    model.options = replace(model.options, scoring_tokens=scoring_tokens)
    arguments = training_arguments(training(max_steps=3, **options), folder, seed=3, device="cpu", probes=2)
    collator = pair_collator(sample=method.needs_samples)
    probe = pairs(5, seed=9) if held_out is None else held_out
    history = fit(
        PolicyTrainer, model, data, collator, arguments, method=method, eval_dataset=probe, train_probe=learnt
    )
    return Run({name: p.detach().clone() for name, p in model.named_parameters()}, history)


def probes_of(run: Run) -> dict[int, dict[str, float]]:
    return {int(entry["step"]): entry for entry in run.history if "eval_chosen_logps" in entry}


@pytest.mark.slow
@pytest.mark.parametrize("name", each_method())
def test_the_probe_tells_what_plain_forwards_do_and_changes_nothing(name: str, tmp_path: Path) -> None:
    method, data, held_out = METHODS[name](), pairs(8), pairs(5, seed=9)
    run = probed(method, tmp_path / "probed", data)
    assert list(probes_of(run)) == [0, 2, 3]
    assert distance(run.parameters, run_policy(tmp_path / "not", method, data, max_steps=3).parameters) == 0
    model = policy_model(method)

    def logps(column: str) -> Tensor:
        rows = zip(held_out["prompt_ids"], held_out[column], strict=True)
        return torch.stack([torch.stack([plain_logp(model, p, c) for c in _listed(own)]) for p, own in rows])

    with model.stock(), torch.no_grad():
        chosen, rejected, samples = (logps(column) for column in ("chosen_ids", "rejected_ids", "sample_ids"))
    chosen, rejected = chosen[:, 0], rejected[:, 0]
    up, down = (
        chosen - _float(held_out["ref_chosen_logps"]),
        rejected - _float(held_out["ref_rejected_logps"]),
    )
    entry = probes_of(run)[0]
    expected = {
        "chosen_logps": chosen.mean(),
        "rejected_logps": rejected.mean(),
        "chosen_logratio": up.mean(),
        "rejected_logratio": down.mean(),
        "accuracy": (up > down).double().mean(),
        "forward_kl_reference": (_float(held_out["ref_sample_logps"]) - samples).mean(),
        "forward_kl_preferences": -torch.cat([up, down]).mean(),
    }
    if method.implicit_scale is not None:
        gaps = _float(held_out["member_margins"]) - method.implicit_scale * (up - down)[:, None]
        expected |= {f"member_{k}": (gaps.abs().argmin(1) == k).double().mean() for k in range(3)}
    assert {key for key in entry if key.startswith("eval_") and "/" not in key} == {f"eval_{key}" for key in expected}
    for key, value in expected.items():
        assert entry[f"eval_{key}"] == pytest.approx(float(value), rel=1e-9), key
    assert probes_of(run)[3]["eval_chosen_logps"] != entry["eval_chosen_logps"], "training moved it"


@pytest.mark.slow
def test_of_training_pairs_the_probe_tells_what_it_would_of_held_out_ones(tmp_path: Path) -> None:
    method, data = EnsembleDPO(), pairs(8)
    both = probed(method, tmp_path / "both", data, learnt=pairs(6, seed=11))
    alone = probed(method, tmp_path / "alone", data, held_out=pairs(6, seed=11))
    assert distance(both.parameters, alone.parameters) == 0, "it changes nothing"
    for step, entry in probes_of(alone).items():
        found = {key: value for key, value in probes_of(both)[step].items() if key.startswith("eval_train_")}
        assert {f"eval_{key.removeprefix('eval_train_')}" for key in found} == {
            key for key in entry if key.startswith("eval_")
        }
        for key, value in found.items():
            assert value == pytest.approx(entry[f"eval_{key.removeprefix('eval_train_')}"], rel=1e-9), (step, key)
            if "logps" in key:
                assert value != probes_of(both)[step][f"eval_{key.removeprefix('eval_train_')}"], "other pairs"


def _float(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _listed(own: Any) -> list[list[int]]:
    return own if isinstance(own[0], list) else [own]


@pytest.mark.slow
def test_a_probe_does_not_depend_on_how_it_is_cut_and_is_made_once_where_a_run_resumes(tmp_path: Path) -> None:
    method, data = EnsembleDPO(), pairs(8)
    whole = probed(method, tmp_path / "whole", data)
    for step, entry in probes_of(probed(method, tmp_path / "cut", data, scoring_tokens=30)).items():
        for key, value in entry.items():
            assert value == pytest.approx(probes_of(whole)[step][key], rel=1e-9, abs=1e-12), (step, key)
    probed(method, tmp_path / "saved", data, save_steps=2)
    for folder in (tmp_path / "saved").glob("checkpoint-3"):
        shutil.rmtree(folder)
    resumed = probed(method, tmp_path / "saved", data, save_steps=2)
    assert [entry["step"] for entry in resumed.history if "eval_chosen_logps" in entry] == [0, 2, 3]
    assert probes_of(resumed)[3] == {**probes_of(whole)[3]}


@pytest.mark.slow
def test_snapshots_are_evenly_spaced_and_leave_the_last_step_to_the_caller(tmp_path: Path) -> None:
    for count, steps in {1: [], 2: [3], 3: [2, 4], 7: [1, 2, 3, 4, 5, 6]}.items():
        seen: list[int] = []
        run_policy(tmp_path / str(count), DPO(), pairs(8), max_steps=7, callbacks=[Snapshots(count, seen.append)])
        assert seen == steps


def test_a_run_is_a_function_of_its_seed(tmp_path: Path) -> None:
    data = pairs(16)
    one, again = (run_policy(tmp_path / name, DPO(), data).parameters for name in "ab")
    assert distance(one, again) == 0
    arguments = training_arguments(training(), tmp_path / "c", seed=4, device="cpu")
    model = policy_model(DPO())
    fit(PolicyTrainer, model, data, pair_collator(), arguments, method=DPO())
    other = {name: p.detach() for name, p in model.named_parameters()}
    assert distance(one, other) > 1e-4, "another seed draws other mini-batches"


def test_the_route_is_tried_on_the_row_that_is_longest_by_all_its_completions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejected completions and samples count: a window shows only in rows longer than it."""
    rows = pairs(4).to_list()
    rows[0]["chosen_ids"] = [2] * 12
    rows[1]["rejected_ids"] = [2] * 30
    rows[2]["sample_ids"] = [[2] * 40, [2]]
    tried: list[list[list[int]]] = []
    settle = CompletionModel.settle

    def noted(model: CompletionModel, input_ids: Any, lengths: Any, device: Any = None) -> Any:
        tried.append([list(example) for example in lengths])
        return settle(model, input_ids, lengths, device)

    monkeypatch.setattr(CompletionModel, "settle", noted)
    method = PessimisticDPO()
    run_policy(tmp_path / "samples", method, Dataset.from_list(rows))
    assert max(tried[0][0]) == 40
    tried.clear()
    run_policy(tmp_path / "without", method, Dataset.from_list([rows[0], rows[1], rows[3]]))
    assert max(tried[0][0]) == 30


# ---------------------------------------------------------------- what fit looks at, and leaves behind


@pytest.mark.parametrize(
    ("architecture", "noise"), [("opt", {"layerdrop": 0.7}), ("falcon-alibi", {"hidden_dropout": 0.5})]
)
def test_a_model_that_is_another_one_in_training_is_refused(
    architecture: str, noise: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"not the same in training and in evaluation: .* differ by .*, relatively"):
        run_policy(tmp_path, DPO(), pairs(8), model_config={"architecture": architecture, **noise})
    assert not any(tmp_path.rglob("*.safetensors"))


def test_dropout_layers_of_a_model_that_was_made_by_hand_are_turned_off_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quiet = run_policy(tmp_path / "quiet", DPO(), pairs(8), model_config={"architecture": "gpt2"})
    loud = run_policy(tmp_path / "loud", DPO(), pairs(8), model_config={"architecture": "gpt2", "resid_pdrop": 0.5})
    assert "the dropout of 4 layers is turned off" in caplog.text
    assert distance(quiet.parameters, loud.parameters) == 0


@pytest.mark.parametrize("fails", [False, True])
def test_a_finished_or_failed_training_keeps_no_model(fails: bool, tmp_path: Path) -> None:
    """Without a garbage collection: the next stage's model would stand beside it, with two of AdamW's."""

    def train() -> tuple[weakref.ref[Any], weakref.ref[Any]]:
        model = policy_model(DPO())
        arguments = training_arguments(training(max_steps=2), tmp_path, seed=3, device="cpu")
        kill = [Kill(1)] if fails else []
        try:
            fit(PolicyTrainer, model, pairs(8), pair_collator(), arguments, method=DPO(), callbacks=kill)
        except KeyboardInterrupt as error:
            error.__traceback__ = None
        return weakref.ref(model), weakref.ref(next(model.parameters()))

    gc.collect()
    gc.disable()
    try:
        assert [kept() for kept in train()] == [None, None]
    finally:
        gc.enable()


def test_scores_are_as_wide_as_the_device_has_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS has no float64, not even to move one there; the CPU's stay as they are."""
    arguments = training_arguments(training(), tmp_path, seed=0, device="cpu")
    trainer = PolicyTrainer(policy_model(DPO()), arguments, method=DPO())
    batch = pair_collator()(list(pairs(2)))
    assert trainer._prepare_inputs(batch)["scores"]["ref_chosen_logps"].dtype == torch.float64
    monkeypatch.setattr(kernels, "WITHOUT_FLOAT64", {"cpu"})
    prepared = trainer._prepare_inputs(batch)
    assert {value.dtype for value in prepared["scores"].values()} == {torch.float32}
    assert prepared["input_ids"].dtype == torch.long
