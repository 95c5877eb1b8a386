"""One training from its options to its log: arguments, snapshots, the bar, resuming, SIGTERM."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lm.base import progress, ranks
from lm.base.store import last_checkpoint
from lm.config import TrainingConfig
from lm.data.columns import longest_inside, sizes, sizes_inside
from lm.logprobs.completions import CompletionModel, longest_row
from lm.models import checks
from lm.models.noise import turn_off_dropout
from lm.training import trackers
from lm.training.batches import MOST_STEPS, Batch, CompletionArguments
from lm.training.trainer import SPEED, CompletionTrainer
from lm.training.unreached import freeze_unreached

log = logging.getLogger(__name__)

# ---------------------------------------------------------------- running


def training_arguments(
    config: TrainingConfig,
    folder: Path,
    *,
    seed: int,
    device: str,
    probes: int = 0,
    evaluations: int = 0,
    report_to: Sequence[str] = (),
    logs: Path | None = None,
    described: Mapping[str, Any] | None = None,
) -> CompletionArguments:
    """Our options in transformers' terms.

    Args:
        config: the options.
        folder: where checkpoints go.
        seed: of everything that training draws.
        device: "cpu" or "auto".
        probes: so many probes of the policy, and one before it.
        evaluations: so many times the loss of held-out rows, by which `lm.training.best` keeps a step; without probes.
        report_to: trackers, which call the training what the last part of `logs` is; see `lm.training.trackers`.
        logs: TensorBoard's folder.
        described: what trackers are told of the training besides its options.

    Raises:
        ValueError: the options say neither epochs nor max_steps, or the ranks do not divide the mini-batch.
    """
    if not config.is_given:
        raise ValueError(f"{config.ONE_LENGTH}; got None and None")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size % ranks:
        raise ValueError(f"batch_size {config.batch_size} must be a multiple of the number of ranks, {ranks}")
    looks = probes or evaluations
    arguments = CompletionArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size // ranks,
        micro_batch_size=config.micro_batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        activation_checkpointing=config.activation_checkpointing,
        num_train_epochs=1 if config.epochs is None else config.epochs,  # which max_steps overrules
        max_steps=-1 if config.max_steps is None else config.max_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_fraction if config.warmup_fraction < 1 else 0.999,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.logging_steps or MOST_STEPS,
        paced=config.logging_steps is None,
        eval_strategy="steps" if looks else "no",
        eval_steps=(1 / looks if looks > 1 else 0.999) if looks else None,  # a share of the steps, rounded up
        eval_on_start=probes > 0,
        metric_for_best_model="loss" if evaluations else None,
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
        described=dict(described or {}),
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

    Raises ValueError where the model is another one in training than in evaluation; freezes what gets no gradient.
    SIGTERM ends it after a checkpoint of the step under way, also where no others are kept.
    """
    shortest = settled(model, dataset, collator, arguments, extra.get("eval_dataset"))
    reporting = trackers.callbacks(
        arguments.trackers, Path(arguments.logs or str(arguments.output_dir)), arguments.described
    )
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[*callbacks, *reporting],
        **extra,
    )
    looked_through(model, shortest)  # after the Trainer has put it where it trains, and before there is an optimiser
    return run_through(trainer)


def settled(
    model: CompletionModel,
    dataset: Dataset,
    collator: Callable[[list[dict[str, Any]]], Batch],
    arguments: CompletionArguments,
    held_out: Dataset | None,
) -> Batch:
    """Settles the model for the rows that it will be trained on; returns the batch of the shortest."""
    if on := turn_off_dropout(model):  # of a model that `load_policy` has not opened
        log.warning("the dropout of %d layers is turned off: losses compare passes of models", on)
    sets = [rows for rows in (dataset, held_out) if rows]
    longest, shortest = extremes(sets, dataset, collator)
    model.settle(longest["input_ids"], longest["lengths"], arguments.device)
    return shortest


def looked_through(model: CompletionModel, shortest: Batch) -> None:
    """ValueError where the model is another one in training than in evaluation; freezes what gets no gradient."""
    example = shortest["input_ids"], shortest["lengths"]
    name = model.model.config.name_or_path
    checks.require(f"model {name!r}" if name else "the model", checks.train_equals_eval(model, *example))
    freeze_unreached(model, *example)


def run_through(trainer: CompletionTrainer) -> list[dict[str, float]]:
    """Trains, from the last whole checkpoint where there is one, as `fit` says."""
    folder = Path(str(trainer.args.output_dir))
    checkpoint = ranks.from_first(lambda: last_checkpoint(folder))
    if checkpoint is not None:
        trainer.args.eval_on_start = False  # the probe before the first step is in its log
    trainer.remove_callback(PrinterCallback)
    try:
        with closing(Bar()) as bar, StopBetweenSteps() as stop:
            trainer.add_callback(bar)
            trainer.add_callback(stop)
            trainer.train(resume_from_checkpoint=checkpoint)
        return list(trainer.state.log_history)
    finally:
        trainer.release()


COMPLETIONS = ("completion_ids", "chosen_ids", "rejected_ids")


def extremes(
    sets: Iterable[Dataset], dataset: Dataset, collator: Callable[[list[dict[str, Any]]], Batch]
) -> tuple[Batch, Batch]:
    """The batch of the longest row of all sets, and of the shortest of one: what a training tries before its steps."""
    return _longest(sets, collator), collator([_shortest(dataset)])


def _longest(sets: Iterable[Dataset], collator: Callable[[list[dict[str, Any]]], Batch]) -> Batch:
    """The batch of the row with the longest prompt and completion; samples count if the collator reads them."""
    found = []
    for rows in sets:
        prompts = sizes(rows, "prompt_ids")
        given = np.max([sizes(rows, name) for name in COMPLETIONS if name in rows.column_names], axis=0)
        sampled = longest_inside(rows, "sample_ids") if "sample_ids" in rows.column_names else given
        found += [collator([rows[int((prompts + own).argmax())]]) for own in (given, np.maximum(given, sampled))]
    return max(found, key=lambda batch: longest_row(batch["lengths"]))


def _shortest(rows: Dataset) -> dict[str, Any]:
    """The row with the fewest tokens of prompt and completions: what a collator makes of it is at most that long."""
    tokens = sum(sizes(rows, name) for name in ("prompt_ids", *COMPLETIONS) if name in rows.column_names)
    if "sample_ids" in rows.column_names:
        tokens = tokens + sizes_inside(rows, "sample_ids")
    shortest: dict[str, Any] = rows[int(np.argmin(tokens))]
    return shortest
