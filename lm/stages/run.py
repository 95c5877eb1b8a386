"""A run: its options, its store, its seeds; and how a command works on one.

Nothing here imports torch until a run begins: `--help`, and mistakes in options, are there at once.
"""

from __future__ import annotations

import functools
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from lm.base import ranks
from lm.base.command import as_command, only_run_in, said_once
from lm.base.store import Store
from lm.config import Config
from theory.records import write_text

P = ParamSpec("P")
T = TypeVar("T")


class Run:
    """What every stage is a function of: a config, and the store in its output folder.

    Args:
        config: every option.
        read_only: stages that have to be finished already (see `lm.base.store.Store`).

    Raises:
        ValueError: a model or data path that cannot work, before anything is computed.
    """

    def __init__(self, config: Config, *, read_only: frozenset[str] = frozenset()) -> None:
        from lm.models.gguf import as_folder
        from lm.models.loading import check_lora, check_model, check_reward_model
        from lm.training import trackers

        trackers.check(config.report_to)
        self.store = Store(Path(config.output_dir), seed=config.seed, read_only=read_only)
        kept = self.store.root / "models"
        folders: dict[str, Any] = {
            name: ranks.from_first(partial(as_folder, spec, kept))
            for name in ("model", "oracle_model", "reward_base")
            if (spec := getattr(config, name)) is not None
        }
        config = replace(config, **folders)
        check_model(config.model, config.trust_remote_code)
        if config.reward_base is not None:
            if config.reward_base.startswith("scratch:"):
                raise ValueError(f"reward_base {config.reward_base!r} is random; null is pi_ref")
            check_model(config.reward_base, config.trust_remote_code)
        check_lora(config.model, config.lora, config.trust_remote_code)
        if config.oracle_model is not None:
            check_reward_model(config.oracle_model, config.trust_remote_code)
        self.config = config
        self.kept: dict[Any, Any] = {}
        """What `once` has seen."""

    def seed(self, *what: str) -> int:
        """A seed of its own for everything that draws, from the run's seed and the drawer's name."""
        return (self.config.seed * 1_000_003 + zlib.crc32("/".join(what).encode())) % 2**31

    def like(self, config: Config) -> Run:
        """A run of other options that makes no more than this one."""
        return Run(config, read_only=self.store.read_only)


def once(stage: Callable[Concatenate[Run, P], T]) -> Callable[Concatenate[Run, P], T]:
    """Of a function of a run: what it returned for these arguments is returned again. Opening an artifact reads all of
    it, and stages ask for those above them many times."""

    @functools.wraps(stage)
    def asked(run: Run, /, *args: P.args, **kwargs: P.kwargs) -> T:
        key = (stage.__module__, stage.__qualname__, args, tuple(sorted(kwargs.items())))
        if key not in run.kept:
            run.kept[key] = stage(run, *args, **kwargs)
        return cast(T, run.kept[key])

    return asked


def command(
    name: str,
    action: Callable[[Run], Any],
    *,
    read_only: frozenset[str] = frozenset(),
    shared: bool = False,
    preset: str = "demo.yaml",
    examples: Sequence[str] | None = None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Runs a command's action on the run of its options; returns the exit status.

    Several ranks all run it. An error on any of them ends all, and is told once.

    Args:
        name: of the module; its docstring's first line is the help text.
        action: what to do; writing outside the run's store is for the first rank.
        read_only: stages that the command never computes.
        shared: other commands may work in the same folder, on other artifacts, and it is theirs to say who makes what.
        preset: the config that is used without --config.
        examples: for the help text, see `lm.base.command.epilog`.
        arguments: the command line without the program; sys.argv's by default.
    """
    description = (sys.modules["__main__"].__doc__ or "").strip().split("\n")[0]

    def main(given: Sequence[str]) -> None:
        from lm.base.options import parse

        config, resolved = said_once(lambda: parse(name, description, given, preset, examples))
        folder = Path(config.output_dir)
        with ranks.together(config.device), only_run_in(folder, shared=shared):
            if ranks.is_first() and not shared:  # several configs, one folder
                write_text(folder / "config.yaml", resolved)
            action(Run(config, read_only=read_only))

    return as_command(main)(arguments)
