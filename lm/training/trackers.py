"""Where a training's log lines go beside its artifact: trackers, by transformers' own callbacks.

`report_to` names them as transformers' TrainingArguments does. They are told about each training as a run of its own,
called `<stage>-<name>-<key>` as its artifact is, with a config: the options of the training, and what it is about
(stage, method and its options, data, commit, and the group: W&B and trackio put together what one run trains). A
finished run tells its table, picture and samples besides, as `results`. TensorBoard writes to `<output_dir>/logs/<that
name>`; the others read their environment variables (WANDB_PROJECT, MLFLOW_TRACKING_URI, ..), as they do with any
Trainer.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    get_available_reporting_integrations,
)

from lm.base import progress, ranks

GROUP = "group"
"""In a training's config: what the trainings of one run have in common, the run's folder as it was named."""
RESULTS = "results"
"""What a finished run tells is called."""


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


def callbacks(names: Sequence[str], logs: Path, described: Mapping[str, Any] | None = None) -> list[TrainerCallback]:
    """One for each tracker; none on other ranks than the first.

    Args:
        names: as of `check`.
        logs: TensorBoard's folder of this training.
        described: what the training's config says beside its options (`CompletionArguments.described`); GROUP in it is
            what the run's trainings are called together.
    """
    about = dict(described or {})
    own: dict[str, Callable[[], TrainerCallback]] = {
        "tensorboard": lambda: _TensorBoard(logs, about),
        "wandb": lambda: _Wandb(about),
        "trackio": lambda: _Trackio(about),
    }
    return [own.get(name, INTEGRATION_TO_CALLBACK[name])() for name in names] if ranks.is_first() else []


class _TensorBoard(TensorBoardCallback):  # type: ignore[misc]
    """A resumed training takes the place of what was written after the step that it goes on from."""

    def __init__(self, logs: Path, described: Mapping[str, Any]) -> None:
        super().__init__()
        self.logs, self.described = logs, described

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the event file."""
        purged = state.global_step + 1 if state.global_step else 0
        self.tb_writer = self._SummaryWriter(str(self.logs), purge_step=purged)
        if self.described:
            self.tb_writer.add_text("config", markdown(Rows(("option", "value"), list(self.described.items()))))
        super().on_train_begin(args, state, control, **kwargs)


class _Wandb(WandbCallback):  # type: ignore[misc]
    """transformers' leaves its run open, and the next training of the process would go on in it."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        super().__init__()
        import wandb

        self._wandb: Any = _Opening(wandb, **_wandbs(described.get(GROUP), described.get("stage")))

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Opens a run, unless the caller has one open."""
        self._mine = self._wandb.run is None
        super().on_train_begin(*args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Closes it."""
        super().on_train_end(*args, **kwargs)
        if self._mine:
            self._wandb.finish()


class _Trackio(TrackioCallback):  # type: ignore[misc]
    """transformers' names no group."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        super().__init__()
        if described.get(GROUP):
            import trackio

            self._trackio: Any = _Opening(trackio, group=described[GROUP])


class _Opening:
    """A tracker's module, which opens runs with more options than transformers names."""

    def __init__(self, module: Any, **options: str) -> None:
        self._module, self._options = module, options

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def init(self, **options: Any) -> Any:
        """As the module's."""
        return self._module.init(**self._options, **options)


def _wandbs(group: str | None, job_type: str | None) -> dict[str, str]:
    """What W&B calls a run's group and kind, unless the environment does. (It reads the environment once a process.)"""
    named = {"group": (group, "WANDB_RUN_GROUP"), "job_type": (job_type, "WANDB_JOB_TYPE")}
    return {option: value for option, (value, variable) in named.items() if value and variable not in os.environ}


# ---------------------------------------------------------------- what a run ends with


class Rows(NamedTuple):
    """A table."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Ending:
    """What a finished run tells its trackers, in a run of its own called RESULTS.

    Args:
        described: its config, with GROUP.
        numbers: name -> value, under "results/".
        tables: name -> table, likewise.
        pictures: name -> a .png file, likewise.
    """

    described: Mapping[str, Any]
    numbers: Mapping[str, float]
    tables: Mapping[str, Rows]
    pictures: Mapping[str, Path]

    def named(self, kind: str) -> Iterator[tuple[str, Any]]:
        """Of a field: (name as trackers have it, value)."""
        return ((f"{RESULTS}/{name}", value) for name, value in getattr(self, kind).items())


def end(names: Sequence[str], logs: Path, ending: Ending) -> None:
    """Tells the trackers; those that take no tables and pictures here are named. On the first rank.

    Args:
        names: as of `check`.
        logs: TensorBoard's folder of it, whose earlier events give way.
        ending: what is told.
    """
    told = {"tensorboard": lambda: _end_in_tensorboard(logs, ending), "wandb": lambda: _end_in_wandb(ending)}
    told["trackio"] = lambda: _end_in_trackio(ending)
    for name in names:
        if name in told:
            told[name]()
        else:
            progress.say(f"[{RESULTS}] {name} is not told tables and pictures, as {', '.join(told)} are")


def markdown(table: Rows) -> str:
    """A table as TensorBoard shows it; line breaks and bars of a cell are written out."""

    def line(cells: Iterable[Any]) -> str:
        texts = ("<br>".join(str(cell).replace("|", "\\|").splitlines()) for cell in cells)
        return f"| {' | '.join(texts)} |"

    return "\n".join([line(table.columns), line("---" for _ in table.columns), *map(line, table.rows)])


def _end_in_tensorboard(logs: Path, ending: Ending) -> None:
    from matplotlib import image
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(logs, ignore_errors=True)
    with SummaryWriter(str(logs)) as writer:
        writer.add_text("config", markdown(Rows(("option", "value"), list(ending.described.items()))))
        for name, number in ending.named("numbers"):
            writer.add_scalar(name, number)
        for name, table in ending.named("tables"):
            writer.add_text(name, markdown(table))
        for name, path in ending.named("pictures"):
            pixels = np.rint(255 * image.imread(path)[..., :3]).astype(np.uint8)
            writer.add_image(name, pixels, dataformats="HWC")


def _end_in_wandb(ending: Ending) -> None:
    import wandb

    mine = wandb.run is None
    if mine:
        wandb.init(
            project=os.getenv("WANDB_PROJECT", TrainingArguments.project),
            name=RESULTS,
            config=dict(ending.described),
            **_wandbs(ending.described.get(GROUP), RESULTS),
        )
    wandb.log(
        {
            **dict(ending.named("numbers")),
            **{n: wandb.Table(columns=list(t.columns), data=_cells(t)) for n, t in ending.named("tables")},
            **{name: wandb.Image(str(path)) for name, path in ending.named("pictures")},
        }
    )
    if mine:
        wandb.finish()


def _end_in_trackio(ending: Ending) -> None:
    import trackio

    trackio.init(
        project=TrainingArguments.project,
        name=f"{RESULTS} of {ending.described.get(GROUP)}",  # all runs are in one project, told apart by names
        group=ending.described.get(GROUP),
        config=dict(ending.described),
        resume="allow",
    )
    trackio.log(
        {
            **dict(ending.named("numbers")),
            **{n: trackio.Table(columns=list(t.columns), data=_cells(t)) for n, t in ending.named("tables")},
            **{name: trackio.Image(str(path)) for name, path in ending.named("pictures")},
        }
    )
    trackio.finish()


def _cells(table: Rows) -> list[list[Any]]:
    return [list(row) for row in table.rows]
