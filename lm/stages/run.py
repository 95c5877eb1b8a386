"""A run: its options, its store, its seeds; and how a command works on one.

Nothing here imports torch until a run begins: `--help`, and mistakes in options, are there at once.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from lm.base import hub, progress, ranks
from lm.base.command import as_command, only_run_in, said_once
from lm.base.store import Store
from lm.config import Config
from theory.records import write_text

COMMITS = "commits.json"
"""In a run's folder: what the hub names in its options stood for."""
P = ParamSpec("P")
T = TypeVar("T")


class Run:
    """What every stage is a function of: a config, and the store in its output folder.

    Args:
        config: every option.
        read_only: stages that have to be finished already (see `lm.base.store.Store`).
        command: whose run it is, for options that one command alone reads.

    Raises:
        ValueError: a model or data path that cannot work, before anything is computed.
    """

    def __init__(self, config: Config, *, read_only: frozenset[str] = frozenset(), command: str = "") -> None:
        from lm.models import gguf
        from lm.training import trackers

        trackers.check(config.report_to)
        self.store = Store(Path(config.output_dir), seed=config.seed, read_only=read_only)
        kept = self.store.root / gguf.KEPT
        named = ("model", "oracle_model", "oracle_base", "reward_base")
        specs: dict[str, str] = {name: spec for name in named if (spec := getattr(config, name)) is not None}
        for spec in specs.values():  # all of them, before one is read in
            ranks.from_first(partial(gguf.check, spec, kept))
        folders: dict[str, Any] = {
            name: ranks.from_first(partial(gguf.as_folder, spec, kept)) for name, spec in specs.items()
        }
        config = replace(config, **folders)
        self.config, self.command = config, command
        take_threads(config, specs.values())
        self.kept: dict[Any, Any] = {}
        """What `once` has seen."""
        self.commits: dict[str, str | None] = {}
        """What hub names stand for."""
        try:
            self._check_models()
        except ValueError as error:
            self.check_places(error)

    def _check_models(self) -> None:
        from lm.models.loading import check_contexts, check_lora, check_model, check_reward_base, check_reward_model

        config = self.config
        check_model(config.model, config.trust_remote_code)
        for option in BASES:
            if (spec := getattr(config, option)) is not None:
                if spec.startswith("scratch:"):
                    raise ValueError(f"{option} {spec!r} is random; null is {BASES[option]}")
                check_model(spec, config.trust_remote_code, option=option)
        adapted = {("model", config.model) for stage in ("sft", "policy") if config.adapts(stage)}
        adapted |= {base_of(config, stage) for stage in ("oracle", "reward") if config.adapts(stage)}
        for option, spec in adapted:
            check_lora(spec, config.lora, config.trust_remote_code, option)
        for option, base in reward_bases(config).items():
            if Path(base).exists():  # else the hub's answer comes before SFT
                check_reward_base(base, config.trust_remote_code, option)
        if None not in (config.data.max_prompt_length, config.data.max_completion_length):
            check_contexts(config, config.data, ["model"], ask_hub=False)  # of the rest once tokens are known
        if config.oracle_model is not None:
            check_reward_model(config.oracle_model, config.trust_remote_code)

    def check_places(self, *known: Exception) -> None:
        """Raises ValueError or FileNotFoundError for all that the options name and that is nowhere: a set that a preset
        names, say, does not hide a mistyped model.

        Args:
            known: what is wrong beside, told first.
        """
        from lm.base.effects import STUDY

        config, wrong = self.config, list(known)
        models = ("model", "oracle_base", "reward_base", "oracle_model")
        places: list[tuple[str, str | None, hub.Kind]] = [(name, getattr(config, name), "model") for name in models]
        places += [("data path", path, "dataset") for path in (config.data.path, config.data.sft_path)]
        places.append(("data.unlabelled.path", config.data.unlabelled.path, "dataset"))
        if self.command == STUDY:
            places.append(("evaluation.out_of_domain.path", config.evaluation.out_of_domain.path, "dataset"))
        for option, path, kind in places:
            try:
                if path is not None and not any(repr(path) in str(error) for error in known):
                    self.place(path, kind, option)
            except (ValueError, FileNotFoundError) as error:
                wrong.append(error)
        if len(wrong) == 1:
            raise wrong[0]
        if wrong:
            raise ValueError("; ".join(map(str, wrong)))

    def seed(self, *what: str) -> int:
        """A seed of its own for everything that draws, from the run's seed and the drawer's name."""
        return (self.config.seed * 1_000_003 + zlib.crc32("/".join(what).encode())) % 2**31

    def content(self, path: str | None, kind: hub.Kind = "model") -> str | None:
        """What a model or set counts as in a key: its content, however it is spelled, see `content_of`.

        A hub name counts by its commit, which is kept in the run's folder: where neither the hub nor its cache can
        tell, it is the one that the folder had before, or else the name, and that is said.

        Raises FileNotFoundError or ValueError, within seconds, for what is neither here nor on the hub.
        """
        from lm.models.loading import SCRATCH, content_of

        if path is None or path in SCRATCH or Path(path).exists():
            if ("content", path) not in self.kept:  # a large model takes a while to read, and many keys count it
                self.kept["content", path] = content_of(path)
            return cast(str | None, self.kept["content", path])
        return content_of(path, self._commit(path, kind, "model" if kind == "model" else "data path"))

    def place(self, path: str, kind: hub.Kind, option: str) -> None:
        """Raises as `content` does, naming the option; what is here is not read."""
        from lm.models.loading import SCRATCH

        if path not in SCRATCH and not Path(path).exists():
            self._commit(path, kind, option)

    def _commit(self, path: str, kind: hub.Kind, option: str) -> str | None:
        """Of a hub name, looked up once."""
        if (name := f"{kind} {path}") not in self.commits:
            self.commits[name] = ranks.from_first(lambda: self._looked_up(name, path, kind, option))
        return self.commits[name]

    def _looked_up(self, name: str, path: str, kind: hub.Kind, option: str) -> str | None:
        from lm.data import places
        from lm.models.weights import missing

        commit = hub.commit_of(path, kind) if kind == "model" else places.commit_of(path)
        file = self.store.root / COMMITS
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if commit is None:
            if name not in known:  # so that a mistyped path is told at once, and nothing else
                if kind == "dataset":
                    places.check(path, option=option)
                elif why := missing(path):
                    raise ValueError(f"{option} {path!r}: {why}")
            stands = f"the one that it had, {known[name]}," if name in known else "the name"
            progress.say(f"{name}: neither the hub nor its cache tells the commit; {stands} stands for it in keys")
            return known.get(name)
        if known.get(name) != commit:
            write_text(file, json.dumps({**known, name: commit}, indent=2) + "\n")
        return commit

    def like(self, config: Config) -> Run:
        """A run of other options that makes no more than this one; what it makes in the same folder, this one counts
        among its costs."""
        other = Run(config, read_only=self.store.read_only, command=self.command)
        if (other.store.root, other.store.seed) == (self.store.root, self.store.seed):
            other.store = self.store
        return other


SMALL = 2**22
"""Bytes of weights of a model in which several threads wait for each other longer than they compute."""


@functools.cache
def _usual_threads() -> int:
    """Torch's own number, as long as nobody has set another."""
    import torch

    return torch.get_num_threads()


def take_threads(config: Config, models: Iterable[str]) -> int:
    """Has torch compute with as many threads as `lm.config.Config.threads` says; returns how many.

    Args:
        config: the options.
        models: all that the run names.
    """
    import torch

    usual = _usual_threads()
    small = "OMP_NUM_THREADS" not in os.environ and all(map(_is_small, models))
    torch.set_num_threads(config.threads or (1 if small else usual))
    return torch.get_num_threads()


def _is_small(model: str) -> bool:
    from lm.models.loading import SCRATCH

    files = [file.stat().st_size for file in Path(model).glob("*.safetensors")]
    return model in SCRATCH or (bool(files) and sum(files) <= SMALL)


BASES = {"oracle_base": "reward_base, and else pi_ref", "reward_base": "pi_ref"}
"""Options that name what reward models start from -> what null stands for."""


def base_of(config: Config, stage: str) -> tuple[str, str]:
    """What the models of a stage, "oracle" or "reward", start from by the options: (option, its value); `model` stands
    for pi_ref."""
    options = {"oracle": ("oracle_base", "reward_base"), "reward": ("reward_base",)}[stage]
    option = next((name for name in options if getattr(config, name) is not None), "model")
    return option, getattr(config, option)


def reward_bases(config: Config) -> dict[str, str]:
    """Of all that the options ask for: option -> what a reward model starts from."""
    distilled = config.data.rewards == "models" and any(config.method(name).needs for name in config.methods)
    trained = {"oracle": config.trains_oracle and config.oracle.is_given, "reward": distilled}
    return dict(base_of(config, stage) for stage, asked in trained.items() if asked)


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
        from lm.base.effects import in_force
        from lm.base.options import parse

        config, resolved = said_once(lambda: parse(name, description, given, preset, examples, shared=shared))
        folder = Path(config.output_dir)
        with ranks.together(config.device, config.host_timeout), only_run_in(folder, shared=shared):
            run = Run(config, read_only=read_only, command=name)
            before = None
            if ranks.is_first() and not shared:  # several configs, one folder
                before = file.read_text(encoding="utf-8") if (file := folder / "config.yaml").is_file() else None
                write_text(file, resolved)
            try:
                if config.data.kind != "world" and not shared:
                    progress.say(in_force(config))
                action(run)
            except BaseException:
                if ranks.is_first() and not shared and not run.store.begun:  # the folder is what it was
                    file.unlink() if before is None else write_text(file, before)
                raise

    return as_command(main)(arguments)
