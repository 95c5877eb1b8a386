"""What the commands share: options from YAML and the command line, and errors without tracebacks."""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lm import ranks
from lm.artifacts import CorruptArtifact, MissingArtifact
from lm.config import Config
from lm.io import write_text
from lm.pipeline import Pipeline
from lm.score import device_of

CONFIGS = Path(__file__).parent / "configs"
USER_ERRORS = (ValueError, TypeError, FileNotFoundError, FloatingPointError, CorruptArtifact, MissingArtifact)


def parser_of(command: str, description: str, preset: str = "demo.yaml") -> ArgumentParser:
    """All fields of :class:`lm.config.Config` as dotted options, plus --config, --print_config and --debug."""
    parser = ArgumentParser(
        prog=f"python -m {command}",
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",  # the generated one hides an error under 90 lines
        description=f"{description} Without --config, the preset {preset} (the embedded world) is used; other presets "
        f"are in {CONFIGS}.",
    )
    parser.add_argument("--config", action="config", help="YAML file with options; later ones and options win.")
    parser.add_argument("--debug", action="store_true", help="Show tracebacks of errors.")
    parser.add_class_arguments(Config, fail_untyped=True)
    return parser


def parse(command: str, description: str, arguments: Sequence[str], preset: str = "demo.yaml") -> tuple[Config, str]:
    """(config, resolved YAML). Leaves with status 2 and a message where an option is unknown or of the wrong type;
    raises ValueError where its value is out of range."""
    parser = parser_of(command, description, preset)
    if not any(argument == "--config" or argument.startswith("--config=") for argument in arguments):
        arguments = ["--config", str(CONFIGS / preset), *arguments]
    options = parser.parse_args(list(arguments))
    resolved = parser.dump(options, skip_unset=False)
    fields = vars(parser.instantiate(options))
    del fields["debug"], fields["config"]
    return Config(**fields), resolved


def run(
    command: str,
    action: Callable[[Pipeline], Any],
    *,
    read_only: frozenset[str] = frozenset(),
    shared: bool = False,
    preset: str = "demo.yaml",
    arguments: Sequence[str] | None = None,
) -> int:
    """Runs a command's action on the pipeline of its options; returns the exit status.

    Several ranks all run it. An error on any of them ends all, and is told once.

    Args:
        command: module name; its docstring's first line is the help text.
        action: what to do; writing outside the pipeline's store is for the first rank.
        read_only: stages that the command never computes.
        shared: other commands may work in the same folder, on other artifacts, and it is theirs to say who makes what.
        preset: the config that is used without --config.
        arguments: the command line without the program; sys.argv's by default.
    """
    description = (sys.modules["__main__"].__doc__ or "").strip().split("\n")[0]
    quieten()
    if arguments is None:
        arguments = sys.argv[1:]
    try:
        config, resolved = _parsed_once(command, description, arguments, preset)
        folder = Path(config.output_dir)
        with ranks.together(device_of(config)), only_run_in(folder, shared=shared):
            if ranks.is_first() and not shared:  # several configs, one folder
                write_text(folder / "config.yaml", resolved)
            action(Pipeline(config, read_only=read_only))
    except USER_ERRORS as error:
        ranks.last_words(f"{traceback.format_exc() if '--debug' in arguments else ''}error: {error}")
        return 2
    except Exception:
        if ranks.launched() == 1:
            raise
        ranks.last_words(traceback.format_exc())
        return 1
    return 0


def _parsed_once(*arguments: Any) -> tuple[Config, str]:
    """:func:`parse`, of whose messages several ranks give one."""
    if ranks.launched() == 1:
        return parse(*arguments)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return parse(*arguments)
    except SystemExit:
        ranks.last_words(said.getvalue())
        raise


@contextlib.contextmanager
def only_run_in(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Holds the folder's lock, which the system frees when the process ends however it ends.

    Raises ValueError where another process holds it, unless both share it. Ranks that work together share the first
    one's.
    """
    if not ranks.is_first():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"output_dir {folder} is in use by another run; wait for it, or name another") from None
        yield


def quieten() -> None:
    """Progress bars and log lines of the libraries only on a terminal, and their news not at all."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
