"""Where a training's log lines go beside its artifact: trackers, by transformers' own callbacks.

`report_to` names them as transformers' TrainingArguments does. They are told about each training as a run of its own,
called `<stage>-<name>-<key>` as its artifact is. TensorBoard writes to `<output_dir>/logs/<that name>`; the others read
their environment variables (WANDB_PROJECT, MLFLOW_TRACKING_URI, ..), as they do with any Trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    WandbCallback,
    get_available_reporting_integrations,
)

from lm.base import ranks


def check(names: Sequence[str]) -> None:
    """ValueError for a tracker that transformers does not know, that is not installed, or that is named twice."""
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"Config.report_to must list trackers out of {known}; got {name!r}")
        if name not in installed:
            raise ValueError(
                f"Config.report_to: {name!r} is not installed, so `pip install {name.replace('_', '-')}` or leave it "
                f"out; installed here: {', '.join(installed) or 'none'}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"Config.report_to names a tracker twice: {list(names)}")


def callbacks(names: Sequence[str], logs: Path) -> list[TrainerCallback]:
    """One for each tracker; none on other ranks than the first.

    Args:
        names: as of `check`.
        logs: TensorBoard's folder of this training.
    """
    own = {"tensorboard": lambda: _TensorBoard(logs), "wandb": _Wandb}
    return [own.get(name, INTEGRATION_TO_CALLBACK[name])() for name in names] if ranks.is_first() else []


class _TensorBoard(TensorBoardCallback):  # type: ignore[misc]
    """A resumed training takes the place of what was written after the step that it goes on from."""

    def __init__(self, logs: Path) -> None:
        super().__init__()
        self.logs = logs

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the event file."""
        purged = state.global_step + 1 if state.global_step else 0
        self.tb_writer = self._SummaryWriter(str(self.logs), purge_step=purged)
        super().on_train_begin(args, state, control, **kwargs)


class _Wandb(WandbCallback):  # type: ignore[misc]
    """transformers' leaves its run open, and the next training of the process would go on in it."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Opens a run, unless the caller has one open."""
        self._mine = self._wandb.run is None
        super().on_train_begin(*args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Closes it."""
        super().on_train_end(*args, **kwargs)
        if self._mine:
            self._wandb.finish()
