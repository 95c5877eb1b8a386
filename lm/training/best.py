"""The step that is kept of a training by the loss of held-out rows, and when to end it: early stopping.

transformers decides when to evaluate, remembers the least loss, and ends the training (`EarlyStoppingCallback`). The
model of the best step is kept here, as an ordinary model and not as a checkpoint, as transformers would: that has the
optimiser's state too, three times as much to write at every better step, and is found by a path that does not outlive a
move of the run's folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lm.base import ranks
from lm.base.store import CorruptArtifact

LOSS = "eval_loss"
"""Of held-out rows, in a log history."""


def best_step(history: Sequence[Mapping[str, float]]) -> int | None:
    """The step of the least loss of held-out rows in a log history, of equal ones the first; None of none."""
    losses = [(row[LOSS], int(row["step"])) for row in history if LOSS in row]
    return min(losses)[1] if losses else None


def verdict(history: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What a model's metrics say of the step that was kept of it: `step` and its `validation_loss`, nats a pair; the
    last one that was taken and its. Losses are None where the last was kept without a look at any."""
    losses = {int(row["step"]): row[LOSS] for row in history if LOSS in row}
    last = int(history[-1]["step"])
    best = best_step(history)
    kept = last if best is None else best
    return {
        "step": kept,
        "validation_loss": losses.get(kept),
        "last_step": last,
        "last_validation_loss": losses.get(last),
    }


def spread(rows: Dataset, most: int | None) -> Dataset:
    """At most so many rows, evenly spaced; all for None."""
    count = len(rows)
    return rows if most is None or most >= count else rows.select([i * count // most for i in range(most)])


class KeepBest(TrainerCallback):  # type: ignore[misc]
    """Keeps the model of the best step so far, below a folder that outlives a crash, beside those that the checkpoints
    there would go on from.

    Args:
        checkpoints: the folder of the checkpoints.
        save: writes the model as it is now into a folder, of which the first rank's counts; all ranks call it.
    """

    def __init__(self, checkpoints: Path, save: Callable[[Path], None]) -> None:
        self.checkpoints, self.save = checkpoints, save

    def folder(self, step: int) -> Path:
        """The model of a step that was the best."""
        return self.checkpoints / "best" / f"step-{step}"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """CorruptArtifact where a training is resumed whose best model is gone."""
        step = best_step(state.log_history)
        if not ranks.from_first(lambda: step is None or self.folder(step).is_dir()):
            raise CorruptArtifact(
                f"{self.folder(step or 0)}, the best model so far, is missing; delete {self.checkpoints} to train anew"
            )

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves, where the step is the best; on every rank, as a sharded model takes all of them."""
        if best_step(state.log_history) != state.global_step:
            return
        final, half = self.folder(state.global_step), self.folder(state.global_step).parent / ".half"
        if ranks.is_first():
            shutil.rmtree(half, ignore_errors=True)
        self.save(half)
        if ranks.is_first():
            shutil.rmtree(final, ignore_errors=True)
            half.rename(final)
            needed = {final, *map(self.folder, self._of_checkpoints())}
            for older in final.parent.glob("step-*"):
                if older not in needed:
                    shutil.rmtree(older)

    def _of_checkpoints(self) -> set[int]:
        histories = (json.loads(path.read_text()) for path in self.checkpoints.glob("checkpoint-*/trainer_state.json"))
        return {step for one in histories if (step := best_step(one["log_history"])) is not None}


class Patience(EarlyStoppingCallback):  # type: ignore[misc]
    """transformers' early stopping, which counts on from the log history where a training is resumed."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends at once what had ended when its checkpoint was written."""
        best = best_step(state.log_history)
        after = [row for row in state.log_history if LOSS in row and best is not None and row["step"] > best]
        self.early_stopping_patience_counter = len(after)
        control.should_training_stop = len(after) >= self.early_stopping_patience
