"""transformers' `Trainer` with our losses: every pair (or token) of the *global* mini-batch weighs the same."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from lm.config import TrainingConfig
from lm.logprobs import CompletionModel, collate
from lm.objectives import Method, PairBatch
from theory import losses

Batch = dict[str, Any]


class CompletionTrainer(Trainer):  # type: ignore[misc]
    """Trains a :class:`CompletionModel` on the sum of :meth:`losses` over the global mini-batch, divided by its units.

    A unit is a pair, or a completion token for SFT. Dividing by the number of units over all micro-batches and ranks
    makes the result independent of how the mini-batch was cut up.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._units_seen = 0

    def units(self, batch: Batch) -> int:
        """How many equally weighted losses this micro-batch has."""
        return len(batch["ids"])

    def losses(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """One loss a unit, or anything that sums to their sum."""
        raise NotImplementedError

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        count = torch.tensor(sum(self.units(batch) for batch in batch_samples), device=device)
        total: Tensor = self.accelerator.reduce(count, "sum")
        return total

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Share of this micro-batch in the global mini-batch's mean loss; FloatingPointError where it is not finite."""
        assert num_items_in_batch is not None
        assert not return_outputs
        total = self.losses(model, inputs).sum()
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"loss is {total.item()} at step {self.state.global_step}, rows {', '.join(inputs['ids'])}"
            )
        self._units_seen += self.units(inputs)
        # DDP and FSDP average gradients over ranks; the mean over units has to be a sum over ranks.
        share: Tensor = total * (self.accelerator.num_processes / num_items_in_batch)
        return share

    def record(self, **sums: Tensor) -> None:
        """Adds to the sums whose means over units go into the next log line."""
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value.detach().sum().float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the recorded means."""
        if self._units_seen and "loss" in logs:
            logs |= {name: (value / self._units_seen).item() for name, value in self._sums.items()}
            self._sums.clear()
            self._units_seen = 0
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A resumable checkpoint's weights. `save_model` knows tied tensors; the finished model is saved elsewhere."""
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_model(self.accelerator.unwrap_model(self.model), str(folder / "model.safetensors"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """The counterpart: of tied tensors a checkpoint has one, which the Trainer's own loader takes for a fault."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            weights = str(Path(resume_from_checkpoint) / "model.safetensors")
            safetensors.torch.load_model(self.model if model is None else model, weights)


class SFTTrainer(CompletionTrainer):
    """Mean negative log-likelihood of the completions' tokens."""

    def units(self, batch: Batch) -> int:
        """Completion tokens."""
        return int(batch["rows"]["completion_mask"].sum())

    def losses(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """Summed over each row's tokens, [R]."""
        logps: Tensor = model(**batch["rows"]).logps
        return -logps


class RewardTrainer(CompletionTrainer):
    """Bradley-Terry reward model, [F] eq 2. Rows alternate chosen and rejected."""

    def losses(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """[N] pairs."""
        chosen, rejected = model(**batch["rows"]).rewards.view(-1, 2).unbind(1)
        self.record(accuracy=(chosen > rejected).float(), margin=chosen - rejected)
        loss: Tensor = losses.bradley_terry(chosen - rejected)
        return loss


class PolicyTrainer(CompletionTrainer):
    """Any :class:`Method` on scored pairs. A pair has rows chosen, rejected and, where needed, a sample."""

    def __init__(self, *args: Any, method: Method, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.method = method
        self._gram: Tensor | None = None

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        """The micro-batches of one step. For an ensemble, a pass without gradient comes first where there are several:
        the member, or the mixture, is chosen on the global mini-batch and not on a part of it."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._gram = None
        if "members" in self.method.needs and batches and (len(batches) > 1 or self.accelerator.num_processes > 1):
            self._gram = self._global_gram(batches)
        return batches, count

    def _global_gram(self, batches: Sequence[Batch]) -> Tensor:
        was_training = self.model_wrapped.training
        self.model_wrapped.eval()
        total, pairs_seen = None, 0
        with torch.no_grad():
            for batch in batches:
                pairs = self._pairs(self.model_wrapped, batch)
                gram = losses.ensemble_gram(
                    pairs.logratio_margin,
                    pairs.known("member_margins"),
                    beta=getattr(self.method, "beta"),  # noqa: B009
                )
                total = gram * self.units(batch) + (0 if total is None else total)
                pairs_seen += self.units(batch)
        self.model_wrapped.train(was_training)
        assert total is not None
        count = torch.tensor(pairs_seen, device=total.device)
        mean: Tensor = self.accelerator.reduce(total, "sum") / self.accelerator.reduce(count, "sum")
        return mean

    def _pairs(self, model: torch.nn.Module, batch: Batch) -> PairBatch:
        count = self.units(batch)
        output = model(**batch["rows"])
        logps, lengths = output.logps.view(count, -1), output.lengths.view(count, -1)
        scores = {name: value.to(logps.dtype) for name, value in batch["scores"].items()}
        rewards = None if output.rewards is None else output.rewards.view(count, -1)
        last_step = max(self.state.max_steps - 1, 1)
        return PairBatch(
            policy_chosen_logps=logps[:, 0],
            policy_rejected_logps=logps[:, 1],
            ref_chosen_logps=scores["ref_chosen_logps"],
            ref_rejected_logps=scores["ref_rejected_logps"],
            chosen_lengths=lengths[:, 0],
            rejected_lengths=lengths[:, 1],
            reward_margin=scores.get("reward_margin"),
            member_margins=scores["member_margins"].T if "member_margins" in scores else None,
            sample_logratios=logps[:, 2] - scores["ref_sample_logps"] if self.method.needs_samples else None,
            estimated_reward_margin=None if rewards is None else rewards[:, 0] - rewards[:, 1],
            gram=self._gram,
            progress=self.state.global_step / last_step,
        )

    def losses(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """[N] pairs."""
        pairs = self._pairs(model, batch)
        chosen, rejected = (
            pairs.policy_chosen_logps - pairs.ref_chosen_logps,
            pairs.policy_rejected_logps - pairs.ref_rejected_logps,
        )
        self.record(
            chosen_logps=pairs.policy_chosen_logps,
            rejected_logps=pairs.policy_rejected_logps,
            chosen_logratio=chosen,
            rejected_logratio=rejected,
            accuracy=(chosen > rejected).float(),
        )
        if pairs.sample_logratios is not None:
            self.record(forward_kl=-pairs.sample_logratios)
        return self.method(pairs)


# ---------------------------------------------------------------- collators: dataset rows -> batch

SCORES = ("ref_chosen_logps", "ref_rejected_logps", "ref_sample_logps", "reward_margin", "member_margins")
"""Columns of a scored pair that a batch carries; [N], member_margins [N, K]."""


def sft_collator(pad_id: int) -> Callable[[list[dict[str, Any]]], Batch]:
    """Rows with id, prompt_ids, completion_ids."""

    def call(rows: list[dict[str, Any]]) -> Batch:
        packed = collate([r["prompt_ids"] for r in rows], [r["completion_ids"] for r in rows], pad_id)
        return {"ids": [r["id"] for r in rows], "rows": packed}

    return call


def pair_collator(pad_id: int, *, sample: bool = False) -> Callable[[list[dict[str, Any]]], Batch]:
    """Pairs with id, prompt_ids, chosen_ids, rejected_ids (and sample_ids), and those of SCORES that are there."""
    names = ["chosen_ids", "rejected_ids", *(["sample_ids"] if sample else [])]

    def call(rows: list[dict[str, Any]]) -> Batch:
        packed = collate([r["prompt_ids"] for r in rows for _ in names], [r[n] for r in rows for n in names], pad_id)
        scores = {
            name: torch.tensor([r[name] for r in rows], dtype=torch.float64) for name in SCORES if name in rows[0]
        }
        return {"ids": [r["id"] for r in rows], "rows": packed, "scores": scores}

    return call


# ---------------------------------------------------------------- running


def training_arguments(config: TrainingConfig, folder: Path, *, seed: int, device: str) -> TrainingArguments:
    """Our options in transformers' terms. ValueError where ranks and micro-batches do not divide the mini-batch."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    micro = config.micro_batch_size or config.batch_size // ranks
    if micro == 0 or config.batch_size % (micro * ranks):
        raise ValueError(
            f"batch_size {config.batch_size} must be a multiple of micro_batch_size x ranks = {micro} x {ranks}"
        )
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=config.batch_size // (micro * ranks),
        num_train_epochs=config.epochs or 1,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_fraction if config.warmup_fraction < 1 else 0.999,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.logging_steps,
        save_strategy="no" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        seed=seed,
        data_seed=seed,
        use_cpu=device == "cpu",
        remove_unused_columns=False,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available() and device != "cpu",
        ddp_find_unused_parameters=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one device: several devices are torchrun's job
    return arguments


def fit(
    trainer_class: type[CompletionTrainer],
    model: CompletionModel,
    dataset: Dataset,
    collator: Callable[[list[dict[str, Any]]], Batch],
    arguments: TrainingArguments,
    **extra: Any,
) -> list[dict[str, float]]:
    """Trains, resuming from the last checkpoint in the arguments' folder if there is one; returns the log history."""
    assert arguments.output_dir is not None
    trainer = trainer_class(model=model, args=arguments, train_dataset=dataset, data_collator=collator, **extra)
    checkpoint = get_last_checkpoint(arguments.output_dir) if os.path.isdir(arguments.output_dir) else None
    trainer.train(resume_from_checkpoint=checkpoint)
    return list(trainer.state.log_history)
