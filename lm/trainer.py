"""transformers' `Trainer` with our losses: every pair (or token) of the *global* mini-batch weighs the same.

A mini-batch is what one optimiser step sees. Every rank loads all of it (token ids are small), takes its share, and
cuts that into micro-batches by number or tokens; so how it is cut is known everywhere and changes nothing.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import safetensors.torch
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lm import progress, ranks, trackers
from lm.artifacts import last_checkpoint, seal
from lm.config import TrainingConfig
from lm.io import write_json
from lm.logprobs import CompletionModel, collate
from lm.lora import is_adapted
from lm.objectives import EnsembleDPO, Method, PairBatch, Pessimism
from theory import losses

Batch = dict[str, Any]
"""ids [N]; input_ids and lengths as of `lm.logprobs.collate`; scores: tensors [N, ...] of SCORES."""


@dataclass
class CompletionArguments(TrainingArguments):  # type: ignore[misc]
    """transformers' options, the limits of a micro-batch, see `lm.config.TrainingConfig`, and `lm.trackers`."""

    micro_batch_size: int | None = field(default=None)
    micro_batch_tokens: int | None = field(default=None)
    trackers: list[str] = field(default_factory=list)
    logs: str | None = field(default=None)


SPEED = "tokens_per_second"
"""Of all ranks, prompts counted once; the time of probes left out."""


class CompletionTrainer(Trainer):  # type: ignore[misc]
    """Trains a `CompletionModel` on the sum of `losses` over the global mini-batch, divided by its units.

    A unit is a pair, or a completion token for SFT. Dividing by the number of units over all micro-batches and ranks
    makes the result independent of how the mini-batch was cut up.
    """

    args: CompletionArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._units_seen = 0
        self._tokens_seen = 0
        self._since = 0.0
        self._weight = 1.0
        self._rows: list[str] = []

    def create_accelerator_and_postprocess(self) -> None:
        """On CPUs, accelerate would pass over FSDP without a word, though torch has it there."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if state.distributed_type == DistributedType.MULTI_CPU and ranks.sharding():
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
            self.is_fsdp_enabled = True

    def units(self, batch: Batch) -> int:
        """How many equally weighted losses a batch has."""
        return len(batch["ids"])

    def losses(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """One loss a unit, or anything that sums to their sum."""
        raise NotImplementedError

    def before_step(self, model: torch.nn.Module, parts: Sequence[tuple[Batch, float]], units: int) -> None:
        """What has to be known of the whole mini-batch (`units` units) before its parts, this rank's micro-batches
        with their weights, are differentiated."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Global mini-batches, the same on every rank, in an order that only the seed decides."""
        size = self.args.per_device_train_batch_size * self.args.world_size
        loader = DataLoader(self.train_dataset, batch_size=size, shuffle=True, collate_fn=self.data_collator)
        prepared: DataLoader[Any] = prepare_data_loader(
            loader, num_processes=1, process_index=0, use_seedable_sampler=True, data_seed=self.args.data_seed
        )
        return prepared

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Gradients of the mini-batch's mean loss; returns this rank's share of it, times the number of ranks.

        Raises:
            FloatingPointError: a loss is not finite; it names the step and the rows.
        """
        model.train()
        batch = self._prepare_inputs(inputs)
        units, self._rows = self.units(batch), batch["ids"]
        if not self._tokens_seen:
            self._since = time.perf_counter()
        mine = cut(batch, self.args)[self.args.process_index :: self.args.world_size]
        self.before_step(model, mine, units)
        share = torch.zeros((), device=self.args.device)
        for index, (part, weight) in enumerate(mine):
            last, self._weight = index == len(mine) - 1, weight
            with nullcontext() if last else self.accelerator.no_sync(model):
                total = self.losses(model, part).sum() * weight
                if not torch.isfinite(total):
                    raise FloatingPointError(
                        f"loss is {total.item()} at step {self.state.global_step}, rows {', '.join(part['ids'])}"
                    )
                # DDP and FSDP average gradients over ranks; the mean over units has to be a sum over ranks.
                loss = total * (self.args.world_size / units)
                self.accelerator.backward(loss)
            share = share + loss.detach()
        self._units_seen += units
        self._tokens_seen += sum(map(sum, batch["lengths"]))
        return share

    def _clip_grad_norm(self, model: torch.nn.Module) -> Tensor:
        """Before the step is taken. Raises FloatingPointError where the gradient is not finite: one step with it would
        leave no parameter that is."""
        norm: Tensor = super()._clip_grad_norm(model)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"gradient norm is {float(norm)} at step {self.state.global_step}, mini-batch of rows "
                f"{', '.join(self._rows)}"
            )
        return norm

    def record(self, **sums: Tensor) -> None:
        """Adds to the sums whose means over units go into the next log line."""
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + self._weight * value.detach().sum().float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the recorded means, and for whoever watches the speed, of which nothing is kept: it is no result."""
        if self._units_seen and "loss" in logs:
            if self._sums:
                totals = self.accelerator.reduce(torch.stack(list(self._sums.values())), "sum") / self._units_seen
                logs |= dict(zip(self._sums, totals.tolist(), strict=True))
            logs[SPEED] = self._tokens_seen / (time.perf_counter() - self._since)
            self._sums.clear()
            self._units_seen = self._tokens_seen = 0
        logs.pop("train_loss", None)  # of the steps since the last start only, and divided by those
        super().log(logs, start_time)
        self.state.log_history[-1].pop(SPEED, None)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trains unless all steps are done: the Trainer's own loop, resumed after the last step, takes one more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Sealed when all ranks have written their part: what has no seal is never resumed from."""
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def _save_rng_state(self, output_dir: str) -> None:
        """With this rank's part of the next log line, as a run may be resumed between two of them."""
        super()._save_rng_state(output_dir)
        part = {
            "loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "sums": {name: value.item() for name, value in self._sums.items()},
            "units": self._units_seen,
        }
        write_json(Path(output_dir) / f"log_line_{self.args.process_index}.json", part)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        parts = sorted(Path(checkpoint).glob("log_line_*.json")) if checkpoint is not None else []
        if len(parts) != self.args.world_size:  # other ranks than before: the next line is of the steps from here on
            return
        part = json.loads((parts[0].parent / f"log_line_{self.args.process_index}.json").read_text())
        self._tr_loss.fill_(part["loss"])
        self._globalstep_last_logged, self._units_seen = part["last_logged"], part["units"]
        self._sums |= {name: torch.tensor(value, device=self.args.device) for name, value in part["sums"].items()}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A resumable checkpoint's weights, of adapters those alone; the finished model is saved elsewhere."""
        if self.is_fsdp_enabled:
            return  # accelerate writes the ranks' shards beside this, and reads them again
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        model, file = self.accelerator.unwrap_model(self.model), str(folder / "model.safetensors")
        if is_adapted(model):
            safetensors.torch.save_file({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, file)
        else:
            safetensors.torch.save_model(model, file)  # knows tied tensors

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """The counterpart: of tied tensors a checkpoint has one, which the Trainer's own loader takes for a fault."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        model, file = self.model if model is None else model, str(Path(resume_from_checkpoint) / "model.safetensors")
        if is_adapted(model):
            absent, unknown = model.load_state_dict(safetensors.torch.load_file(file), strict=False)
            trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            if unknown or trained & set(absent):
                raise ValueError(f"{file} holds other adapters than lora says: remove its folder to train anew")
        else:
            safetensors.torch.load_model(model, file)


def cut(batch: Batch, limits: CompletionArguments, tokens: int | None = None) -> list[tuple[Batch, float]]:
    """A mini-batch cut into micro-batches with weights, ranks x n of them for the least n that keeps the limits, or
    the number of `tokens`, where no gradient is taken.

    Examples of similar length go together, and all parts have about the same number of tokens. Every rank gets n
    parts, as collective operations need; where the examples do not suffice, the first is repeated with weight 0.
    """
    sizes = [sum(example) for example in batch["lengths"]]
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    most, budget = limits.micro_batch_size or len(sizes), limits.micro_batch_tokens or sum(sizes)
    if tokens is not None:
        most, budget = len(sizes), tokens
    for a_rank in range(1, len(sizes) + 1):
        groups = _even(order, sizes, a_rank * limits.world_size)
        if all(len(g) <= 1 or (len(g) <= most and sum(sizes[i] for i in g) <= budget) for g in groups):
            break
    if len(groups) == 1:
        return [(batch, 1.0)]
    examples = batch["input_ids"].split(sizes)
    return [(_part(batch, examples, group), 1.0) if group else (_part(batch, examples, [0]), 0.0) for group in groups]


def _even(order: Sequence[int], tokens: Sequence[int], parts: int) -> list[list[int]]:
    """Consecutive runs of `order`, with about the same tokens each; as few empty ones as can be."""
    groups: list[list[int]] = [[] for _ in range(parts)]
    left, index = sum(tokens), 0
    for part, group in enumerate(groups):
        goal, size = left / (parts - part), 0
        while index < len(order):
            enough = len(order) - index <= parts - part - 1  # one each for the parts to come
            if group and (enough or size + tokens[order[index]] / 2 > goal):
                break
            group.append(order[index])
            size += tokens[order[index]]
            index += 1
        left -= size
    groups[-1].extend(order[index:])
    return groups


def _part(batch: Batch, examples: Sequence[Tensor], group: Sequence[int]) -> Batch:
    return {
        "ids": [batch["ids"][i] for i in group],
        "input_ids": torch.cat([examples[i] for i in group]),
        "lengths": [batch["lengths"][i] for i in group],
        "scores": {name: values[list(group)] for name, values in batch["scores"].items()},
    }


class SFTTrainer(CompletionTrainer):
    """Mean negative log-likelihood of the completions' tokens."""

    def units(self, batch: Batch) -> int:
        """Completion tokens."""
        return sum(sum(completions) for _, *completions in batch["lengths"])

    def losses(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """Summed over each row's tokens, [R]."""
        logps: Tensor = model(batch["input_ids"], batch["lengths"]).logps
        return -logps


class RewardTrainer(CompletionTrainer):
    """Bradley-Terry reward model, [F] eq 2. An example has its chosen and its rejected completion."""

    def losses(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """[N] pairs."""
        chosen, rejected = model(batch["input_ids"], batch["lengths"]).rewards.view(-1, 2).unbind(1)
        self.record(accuracy=(chosen > rejected).float(), margin=chosen - rejected)
        loss: Tensor = losses.bradley_terry(chosen - rejected)
        return loss


class DRDOOracleTrainer(CompletionTrainer):
    """DRDO's own oracle: a policy with a reward head, both heads trained jointly, [N] eq 5."""

    def __init__(self, *args: Any, alpha: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alpha = alpha

    def losses(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """[N] pairs."""
        output = model(batch["input_ids"], batch["lengths"])
        chosen, rejected = output.rewards.view(-1, 2).unbind(1)
        chosen_logps = output.logps.view(-1, 2)[:, 0]
        self.record(accuracy=(chosen > rejected).float(), margin=chosen - rejected, chosen_logps=chosen_logps)
        loss: Tensor = losses.drdo_oracle(chosen - rejected, chosen_logps, alpha=self.alpha)
        return loss


class PolicyTrainer(CompletionTrainer):
    """Any `Method` on scored pairs. An example has its chosen, its rejected and, where needed, S >= 1 sampled
    completions."""

    def __init__(self, *args: Any, method: Method, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.method = method
        self._gram: Tensor | None = None
        self._progress = 0.0

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Probes the policy on held-out pairs, `eval_dataset`; logs and returns means over the pairs, of nats.

        eval_chosen_logps and eval_rejected_logps: log pi of winners and losers; eval_chosen_logratio,
        eval_rejected_logratio: less log pi_ref; eval_accuracy: share with the greater log-ratio of the winner;
        eval_forward_kl_reference and eval_forward_kl_preferences: KL(pi_ref || pi) by samples of pi_ref and by the
        pairs' own completions ([F] Figure B.1); eval_member_<k>: share of pairs whose reward margin by member k is
        nearest to the implicit one, beta times the log-ratio margin, for methods with a beta ([F] Figure B.3).
        """
        assert isinstance(self.eval_dataset, Dataset)
        began = time.perf_counter()
        batch = self._prepare_inputs(pair_collator(sample=True)(list(self.eval_dataset)))
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        with torch.no_grad():
            parts = cut(batch, self.args, tokens=self.model.options.scoring_tokens)
            for part, weight in parts[self.args.process_index :: self.args.world_size]:
                for name, values in self._probed(part).items():
                    sums[f"eval_{name}"] = sums[f"eval_{name}"] + weight * values.sum()
        totals = self.accelerator.reduce(torch.stack(list(sums.values())), "sum") / self.units(batch)
        metrics: dict[str, float] = dict(zip(sums, totals.tolist(), strict=True))
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._since += time.perf_counter() - began
        return metrics

    def _probed(self, batch: Batch) -> dict[str, Tensor]:
        """What the probe tells of each pair, [N]."""
        scores = batch["scores"]
        logps = self.model(batch["input_ids"], batch["lengths"]).logps.double().view(self.units(batch), -1)
        chosen, rejected = logps[:, 0] - scores["ref_chosen_logps"], logps[:, 1] - scores["ref_rejected_logps"]
        result = {
            "chosen_logps": logps[:, 0],
            "rejected_logps": logps[:, 1],
            "chosen_logratio": chosen,
            "rejected_logratio": rejected,
            "accuracy": (chosen > rejected).double(),
            "forward_kl_reference": losses.forward_kl(_over_samples(logps[:, 2:], scores)),
            "forward_kl_preferences": (losses.forward_kl(chosen) + losses.forward_kl(rejected)) / 2,
        }
        beta = getattr(self.method, "beta", None)
        if beta is not None and "member_margins" in scores:
            members = scores["member_margins"]
            nearest = (members - beta * (chosen - rejected)[:, None]).abs().argmin(1)
            for k in range(members.shape[1]):
                result[f"member_{k}"] = (nearest == k).double()
        return result

    def before_step(self, model: torch.nn.Module, parts: Sequence[tuple[Batch, float]], units: int) -> None:
        """For an ensemble, a pass without gradient where there are several parts: the member, or the mixture, is chosen
        on the global mini-batch and not on a part of it."""
        self._gram = None
        if "members" not in self.method.needs or (len(parts) == 1 and self.args.world_size == 1):
            return
        total: Tensor | None = None
        with torch.no_grad():
            for part, weight in parts:
                pairs = self._pairs(model, part)
                gram = losses.ensemble_gram(
                    pairs.logratio_margin,
                    pairs.known("member_margins"),
                    beta=getattr(self.method, "beta"),  # noqa: B009
                )
                gram = gram * (weight * self.units(part))  # a mean over the part's pairs
                total = gram if total is None else total + gram
        assert total is not None
        self._gram = self.accelerator.reduce(total, "sum") / units

    def _pairs(self, model: torch.nn.Module, batch: Batch) -> PairBatch:
        count = self.units(batch)
        output = model(batch["input_ids"], batch["lengths"])
        logps, lengths = output.logps.view(count, -1), output.lengths.view(count, -1)
        scores = {name: value.to(logps.dtype) for name, value in batch["scores"].items()}
        rewards = None if output.rewards is None else output.rewards.view(count, -1)
        self._progress = self.state.global_step / max(self.state.max_steps - 1, 1)
        return PairBatch(
            policy_chosen_logps=logps[:, 0],
            policy_rejected_logps=logps[:, 1],
            ref_chosen_logps=scores["ref_chosen_logps"],
            ref_rejected_logps=scores["ref_rejected_logps"],
            chosen_lengths=lengths[:, 0],
            rejected_lengths=lengths[:, 1],
            reward_margin=scores.get("reward_margin"),
            member_margins=scores["member_margins"].T if "member_margins" in scores else None,
            sample_logratios=_over_samples(logps[:, 2:], scores) if self.method.needs_samples else None,
            estimated_reward_margin=None if rewards is None else rewards[:, 0] - rewards[:, 1],
            gram=self._gram,
            progress=self._progress,
        )

    def losses(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """[N] pairs. Logged are means over pairs and steps, in nats: log pi of winners and losers, the same less
        log pi_ref, whose difference is the margin; the share of winners with the greater log-ratio; the forward KL by
        both estimates, as in `evaluate`; beta times the margin; DRDO's estimate of the reward margin; and each
        member's weight in the reward that an ensemble method distils."""
        pairs = self._pairs(model, batch)
        chosen, rejected = (
            pairs.policy_chosen_logps - pairs.ref_chosen_logps,
            pairs.policy_rejected_logps - pairs.ref_rejected_logps,
        )
        margin, beta = pairs.logratio_margin, getattr(self.method, "beta", None)
        self.record(
            chosen_logps=pairs.policy_chosen_logps,
            rejected_logps=pairs.policy_rejected_logps,
            chosen_logratio=chosen,
            rejected_logratio=rejected,
            margin=margin,
            accuracy=(chosen > rejected).float(),
            forward_kl_preferences=(losses.forward_kl(chosen) + losses.forward_kl(rejected)) / 2,
        )
        if pairs.sample_logratios is not None:
            self.record(forward_kl=losses.forward_kl(pairs.sample_logratios))
        if beta is not None:
            self.record(implicit_reward_margin=beta * margin)
        if pairs.estimated_reward_margin is not None:
            self.record(estimated_reward_margin=pairs.estimated_reward_margin)
        if isinstance(self.method, EnsembleDPO):
            if pairs.gram is None:
                own = losses.ensemble_gram(margin, pairs.known("member_margins"), beta=self.method.beta)
                pairs = replace(pairs, gram=own)
            weights = self.method.weights(pairs.known("gram"))
            self.record(**{f"member_weight_{k}": weight.expand(len(margin)) for k, weight in enumerate(weights)})
        return self.method(pairs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds alpha, the weight of the forward KL at the last step, to the log lines of methods that have it."""
        kl = getattr(self.method, "kl", None)
        if isinstance(kl, Pessimism) and "loss" in logs:
            logs["alpha"] = kl.alpha(self._progress)
        super().log(logs, start_time)


def _over_samples(logps: Tensor, scores: dict[str, Tensor]) -> Tensor:
    """Weighted mean of log pi - log pi_ref over each pair's samples, [N, S] -> [N]; weights 1 / S if none are given."""
    logratios = logps - scores["ref_sample_logps"]
    weights = scores.get("sample_weights")
    return logratios.mean(1) if weights is None else (weights * logratios).sum(1)


# ---------------------------------------------------------------- collators: dataset rows -> batch

SCORES = (
    "ref_chosen_logps",
    "ref_rejected_logps",
    "reward_margin",
    "member_margins",
    "ref_sample_logps",
    "sample_weights",
)
"""Columns of a scored pair that a batch carries; [N], member_margins [N, K], the last two [N, S]."""


def sft_collator() -> Callable[[list[dict[str, Any]]], Batch]:
    """Rows with id, prompt_ids, completion_ids."""

    def call(rows: list[dict[str, Any]]) -> Batch:
        packed = collate([r["prompt_ids"] for r in rows], [[r["completion_ids"]] for r in rows])
        return {"ids": [r["id"] for r in rows], "scores": {}, **packed}

    return call


def pair_collator(*, sample: bool = False) -> Callable[[list[dict[str, Any]]], Batch]:
    """Pairs with id, prompt_ids, chosen_ids, rejected_ids (and sample_ids, a list of completions), and those of SCORES
    that are there."""

    def call(rows: list[dict[str, Any]]) -> Batch:
        completions = [[r["chosen_ids"], r["rejected_ids"], *(r["sample_ids"] if sample else [])] for r in rows]
        packed = collate([r["prompt_ids"] for r in rows], completions)
        scores = {
            name: torch.tensor([r[name] for r in rows], dtype=torch.float64) for name in SCORES if name in rows[0]
        }
        return {"ids": [r["id"] for r in rows], "scores": scores, **packed}

    return call


# ---------------------------------------------------------------- running


def training_arguments(
    config: TrainingConfig,
    folder: Path,
    *,
    seed: int,
    device: str,
    probes: int = 0,
    report_to: Sequence[str] = (),
    logs: Path | None = None,
) -> CompletionArguments:
    """Our options in transformers' terms.

    Args:
        config: the options.
        folder: where checkpoints go.
        seed: of everything that training draws.
        device: "cpu" or "auto".
        probes: so many probes of the policy.
        report_to: trackers, which call the training what the last part of `logs` is; see `lm.trackers`.
        logs: TensorBoard's folder.

    Raises:
        ValueError: the ranks do not divide the mini-batch.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size % ranks:
        raise ValueError(f"batch_size {config.batch_size} must be a multiple of the number of ranks, {ranks}")
    arguments = CompletionArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size // ranks,
        micro_batch_size=config.micro_batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        activation_checkpointing=config.activation_checkpointing,
        num_train_epochs=config.epochs or 1,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_fraction if config.warmup_fraction < 1 else 0.999,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.logging_steps,
        eval_strategy="steps" if probes else "no",
        eval_steps=(1 / probes if probes > 1 else 0.999) if probes else None,  # a share of the steps, rounded up
        eval_on_start=probes > 0,
        save_strategy="no" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        seed=seed,
        data_seed=seed,
        use_cpu=device == "cpu" or not torch.accelerator.is_available(),  # ranks without accelerators are asked for so
        remove_unused_columns=False,
        run_name=logs.name if logs else None,
        disable_tqdm=True,  # `fit` adds the bar, and the trackers
        report_to="none",
        trackers=list(report_to),
        logs=str(logs) if logs else None,
        dataloader_pin_memory=torch.cuda.is_available() and device != "cpu",
        ddp_find_unused_parameters=False,
    )
    assert arguments.world_size == ranks
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one device: several devices are torchrun's job
    return arguments


class Snapshots(TrainerCallback):  # type: ignore[misc]
    """Calls `save(step)` after evenly spaced steps, `count` of them counting the last, which is left to the caller."""

    def __init__(self, count: int, save: Callable[[int], None]) -> None:
        self.count, self.save = count, save

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves where it is time; on every rank, as a sharded model takes all of them."""
        if state.global_step in (state.max_steps * i // self.count for i in range(1, self.count)):
            self.save(state.global_step)


class StopBetweenSteps(TrainerCallback):  # type: ignore[misc]
    """A context in which SIGTERM waits for the step under way and for a checkpoint of it, and then takes its course."""

    def __init__(self) -> None:
        self.asked = False
        self._listens = threading.current_thread() is threading.main_thread()
        self._before: Any = None

    def __enter__(self) -> Self:
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Of several ranks all stop, if one was asked to."""
        self.asked = any(ranks.from_all(self.asked))
        if self.asked:
            control.should_save = control.should_training_stop = True

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)
        if self.asked and kind is None:
            signal.raise_signal(signal.SIGTERM)


class Bar(TrainerCallback):  # type: ignore[misc]
    """Steps done, the time left, the last loss and the speed."""

    def __init__(self) -> None:
        self._bar = tqdm(disable=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens it, on the first rank."""
        if state.is_world_process_zero:
            what = f"training {args.run_name}" if args.run_name else "training"
            self._bar = progress.bar(what, total=state.max_steps, unit="step", initial=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves it."""
        self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows what a training step logged."""
        if logs and SPEED in logs:
            now = sys.stderr.isatty()  # a file gets its line a minute
            self._bar.set_postfix_str(f"loss {logs['loss']:.4g}, {logs[SPEED]:,.0f} tokens/s", refresh=now)

    def close(self) -> None:
        """Clears it."""
        self._bar.close()


def fit(
    trainer_class: type[CompletionTrainer],
    model: CompletionModel,
    dataset: Dataset,
    collator: Callable[[list[dict[str, Any]]], Batch],
    arguments: CompletionArguments,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    **extra: Any,
) -> list[dict[str, float]]:
    """Trains, from the last whole checkpoint in the arguments' folder where there is one; returns the log history.

    SIGTERM ends it after a checkpoint of the step under way, also where no others are kept.
    """
    assert arguments.output_dir is not None
    longest = collator([max(dataset, key=_tokens)])
    model.settle(longest["input_ids"], longest["lengths"], arguments.device)
    reporting = trackers.callbacks(arguments.trackers, Path(arguments.logs or arguments.output_dir))
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[*callbacks, *reporting],
        **extra,
    )
    folder = Path(arguments.output_dir)
    checkpoint = ranks.from_first(lambda: last_checkpoint(folder))
    if checkpoint is not None:
        arguments.eval_on_start = False  # the probe before the first step is in its log
    trainer.remove_callback(PrinterCallback)
    with closing(Bar()) as bar, StopBetweenSteps() as stop:
        trainer.add_callback(bar)
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=checkpoint)
    return list(trainer.state.log_history)


def _tokens(row: dict[str, Any]) -> int:
    """Prompt and completions of a dataset row."""
    return sum(len(value) for name, value in row.items() if name in ("prompt_ids", "completion_ids", "chosen_ids"))
