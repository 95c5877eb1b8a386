"""transformers' `Trainer` with our losses: every pair (or token) of the *global* mini-batch weighs the same, or as its
row says.

A mini-batch is what one optimiser step sees. Every rank loads all of it (token ids are small), takes its share, and
cuts that into micro-batches by number or tokens; so how it is cut is known everywhere and changes nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lm.base import ranks
from lm.base.memory import give_back_freed_memory
from lm.base.store import seal
from lm.logprobs.kernels import widest
from lm.models.lora import is_adapted
from lm.objectives import JointOracle, in_both_directions
from lm.training.batches import LINES, Batch, CompletionArguments, agreement, cut, probability_of, weight_of
from theory import losses
from theory.records import write_json

Logged = dict[str, Tensor]
"""Of each unit of a micro-batch, [N]; log lines have the means over the units of all steps since the last."""
SPEED = "tokens_per_second"
"""Of all ranks, prompts counted once; the time of probes left out."""


class Paced(TrainerCallback):  # type: ignore[misc]
    """Logs often enough for LINES lines, or at every step where there are fewer: a curve of two points is none."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Once the number of steps is known."""
        state.logging_steps = max(1, min(args.logging_steps, state.max_steps // LINES))


class CompletionTrainer(Trainer):  # type: ignore[misc]
    """Trains a `CompletionModel` on the sum of `losses` over the global mini-batch, divided by its units.

    A unit is a pair, or a completion token for SFT. Dividing by the number of units over all micro-batches and ranks
    makes the result independent of how the mini-batch was cut up. Pairs that have weights count as that many units:
    the mean is the weighted one, of the loss and of what is logged.
    """

    args: CompletionArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.paced:
            self.add_callback(Paced())
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._units_seen: float = 0
        self._tokens_seen = 0
        self._since = 0.0
        self._held_out: dict[str, tuple[list[tuple[Batch, float]], float]] = {}
        self._rows: list[str] = []  # of the step under way, for an error in a method of the Trainer's that has no batch

    def create_accelerator_and_postprocess(self) -> None:
        """On CPUs, accelerate would pass over FSDP without a word, though torch has it there."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if state.distributed_type == DistributedType.MULTI_CPU and ranks.sharding():
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
            self.is_fsdp_enabled = True

    def _prepare_input(self, data: Any) -> Any:
        """On the device; scores, float64, as wide as it has them. Lists, of ids and lengths, are not looked through for
        tensors."""
        if isinstance(data, list):
            return data
        if isinstance(data, Tensor) and data.dtype == torch.float64:
            data = data.to(widest(self.args.device))
        return super()._prepare_input(data)

    def release(self) -> None:
        """Lets go of the model and of what AdamW knows of it, for good: a finished Trainer, in circles of callbacks and
        closures, would keep them until a garbage collection, beside the models of the stages that follow."""
        if self.optimizer is not None:
            self.optimizer.state.clear()
            self.optimizer.param_groups.clear()
        for held in ("_models", "_optimizers", "_schedulers", "_dataloaders"):
            getattr(self.accelerator, held).clear()
        self.callback_handler.__dict__.clear()
        self.__dict__.clear()

    def units(self, batch: Batch) -> float:
        """How many equally weighted losses a batch has: its pairs, or the sum of their weights."""
        weights = weight_of(batch)
        return len(batch["ids"]) if weights is None else float(weights.sum())

    def losses(self, model: torch.nn.Module, batch: Batch, known: Any = None) -> tuple[Tensor, Logged]:
        """One loss a pair of a micro-batch, or anything that sums to the sum over units; and what is logged of it.

        Args:
            model: may be wrapped, by DDP or FSDP.
            batch: the micro-batch.
            known: what `before_step` returned; None for what is computed from this batch alone.
        """
        raise NotImplementedError

    def before_step(self, model: torch.nn.Module, parts: Sequence[tuple[Batch, float]], units: float) -> Any:
        """What has to be known of the whole mini-batch (`units` units) before its parts, this rank's micro-batches
        with their weights, are differentiated."""
        return None

    def after_step(self, told: Sequence[tuple[Logged, float]], units: float) -> None:
        """What is to be learnt from the whole mini-batch (`units` units) once its parts, this rank's micro-batches with
        their weights, are differentiated: what is logged of each."""

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
        if not model.training:  # a walk through all modules
            model.train()
        batch = self._prepare_inputs(inputs)
        units, self._rows = self.units(batch), batch["ids"]
        if not self._tokens_seen:
            self._since = time.perf_counter()
        mine = cut(batch, self.args)[self.args.process_index :: self.args.world_size]
        known = self.before_step(model, mine, units)
        share = torch.zeros((), device=self.args.device)
        told = []
        for index, (part, weight) in enumerate(mine):
            with nullcontext() if index == len(mine) - 1 else self.accelerator.no_sync(model):
                each, logged = self.losses(model, part, known)
                total = _weighted(each, part).sum() * weight
                if not torch.isfinite(total):
                    raise FloatingPointError(
                        f"loss is {total.item()} at step {self.state.global_step}, rows {', '.join(part['ids'])}"
                    )
                # DDP and FSDP average gradients over ranks; the mean over units has to be a sum over ranks.
                loss = total * (self.args.world_size / units)
                self.accelerator.backward(loss)
            share = share + loss.detach()
            logged = {name: _weighted(values.detach(), part) for name, values in logged.items()}
            for name, values in logged.items():
                self._sums[name] = self._sums[name] + weight * values.sum().float()
            told.append((logged, weight))
        self.after_step(told, units)
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

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Logs and returns means over held-out rows, `eval_dataset`, each called eval_<what>, see `held_out`. All ranks
        have the same numbers to the bit, as what is decided by them has to be decided alike.

        Raises:
            FloatingPointError: one of them is not finite.
        """
        began = time.perf_counter()
        give_back_freed_memory()  # batches of every length leave it in pieces, which grow in number from step to step
        metrics: dict[str, float] = {}
        for prefix, rows in self.held_out_sets().items():
            metrics |= self._means(rows, prefix)
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} of held-out rows is {value} after step {self.state.global_step}")
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._since += time.perf_counter() - began
        return metrics

    def _means(self, rows: Dataset, prefix: str) -> dict[str, float]:
        """Of `held_out`, over these rows, by name."""
        if prefix not in self._held_out:
            batch = self._prepare_inputs(self.held_out_collator()(list(rows)))
            parts = cut(batch, self.args, tokens=self.model.options.scoring_tokens)
            # A rank that nothing is left for has the names of the sums from a part that counts nothing.
            mine = parts[self.args.process_index :: self.args.world_size] or [(parts[0][0], 0.0)]
            self._held_out[prefix] = mine, self.held_out_units(batch)
        mine, units = self._held_out[prefix]
        width = widest(self.args.device)
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=width, device=self.args.device))
        with torch.no_grad():
            for part, weight in mine:
                for name, values in self.held_out(part).items():
                    sums[prefix + name] = sums[prefix + name] + weight * values.to(width).sum()
        totals = self.accelerator.gather(torch.stack(list(sums.values()))).view(-1, len(sums)).sum(0) / units
        return dict(zip(sums, totals.tolist(), strict=True))

    def held_out_sets(self) -> dict[str, Dataset]:
        """The rows that `evaluate` tells of, by what its names begin with."""
        assert isinstance(self.eval_dataset, Dataset)
        return {"eval_": self.eval_dataset}

    def held_out_collator(self) -> Callable[[list[dict[str, Any]]], Batch]:
        """How held-out rows become a batch."""
        collator: Callable[[list[dict[str, Any]]], Batch] = self.data_collator
        return collator

    def held_out_units(self, batch: Batch) -> float:
        """What the sums of `held_out` are divided by."""
        return self.units(batch)

    def held_out(self, batch: Batch) -> dict[str, Tensor]:
        """What is told of each held-out row, [N]: its loss as it is trained on, and what is logged beside it, times
        what it weighs."""
        loss, logged = self.losses(self.model, batch)
        return {name: _weighted(values, batch) for name, values in {"loss": loss, **logged}.items()}

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
        """Trains unless all steps are done, or it had ended when it was resumed: the Trainer's own loop, resumed then,
        takes one step more."""
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Sealed when all ranks have written their part: what has no seal is never resumed from."""
        self.state.best_global_step = None  # `lm.training.best` keeps that model; no checkpoint is held back for it
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


def _weighted(values: Tensor, batch: Batch) -> Tensor:
    """Values of each pair, [N], times what it weighs."""
    weights = weight_of(batch)
    return values if weights is None else values * weights.to(values.dtype)


class SFTTrainer(CompletionTrainer):
    """Mean negative log-likelihood of the completions' tokens."""

    def units(self, batch: Batch) -> int:
        """Completion tokens."""
        return sum(sum(completions) for _, *completions in batch["lengths"])

    def losses(self, model: torch.nn.Module, batch: Batch, known: Any = None) -> tuple[Tensor, Logged]:
        """Summed over each row's tokens, [R]."""
        logps: Tensor = model(batch["input_ids"], batch["lengths"]).logps
        return -logps, {}


class RewardTrainer(CompletionTrainer):
    """Bradley-Terry reward model, [F] eq 2; of soft labels in both directions. An example has its chosen and its
    rejected completion."""

    def losses(self, model: torch.nn.Module, batch: Batch, known: Any = None) -> tuple[Tensor, Logged]:
        """[N] pairs."""
        chosen, rejected = model(batch["input_ids"], batch["lengths"]).rewards.view(-1, 2).unbind(1)
        margin, probability = chosen - rejected, _probability(batch, chosen)
        loss = in_both_directions(
            probability,
            losses.bradley_terry(margin),
            lambda: losses.bradley_terry(-margin),
        )
        return loss, {"accuracy": agreement(chosen, rejected, probability).float(), "margin": margin}


class JointOracleTrainer(CompletionTrainer):
    """A reward model of a method's own: a policy with a reward head, both heads trained jointly, [N] eq 5."""

    def __init__(self, *args: Any, oracle: JointOracle, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.oracle = oracle

    def losses(self, model: torch.nn.Module, batch: Batch, known: Any = None) -> tuple[Tensor, Logged]:
        """[N] pairs."""
        output = model(batch["input_ids"], batch["lengths"])
        chosen, rejected = output.rewards.view(-1, 2).unbind(1)
        chosen_logps, rejected_logps = output.logps.view(-1, 2).unbind(1)
        margin, probability = chosen - rejected, _probability(batch, chosen)
        loss = in_both_directions(
            probability, self.oracle(margin, chosen_logps), lambda: self.oracle(-margin, rejected_logps)
        )
        accuracy = agreement(chosen, rejected, probability).float()
        return loss, {"accuracy": accuracy, "margin": margin, "chosen_logps": chosen_logps}


def _probability(batch: Batch, like: Tensor) -> Tensor | None:
    probability = probability_of(batch)
    return None if probability is None else probability.to(like.dtype)
