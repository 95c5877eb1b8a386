"""What the commands share: options from YAML and the command line, help, errors without tracebacks, exit statuses."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import io
import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, get_loader, set_loader

from lm import progress, ranks
from lm.artifacts import CorruptArtifact, MissingArtifact
from lm.config import Config
from lm.io import write_text
from lm.pipeline import Pipeline
from lm.score import device_of
from theory.shell import DONE, FAILED, INTERRUPTED, MISTAKEN, closed_pipe

T = TypeVar("T")
CONFIGS = Path(__file__).parent / "configs"

TERMINATED = 128 + signal.SIGTERM
"""An exit status beside those of `theory.shell`."""
MISTAKES = (ValueError, TypeError, FileNotFoundError, IsADirectoryError, NotADirectoryError, MissingArtifact)
"""In options, or in the files and the data that they name."""
FAILURES = (FloatingPointError, CorruptArtifact, OSError)
"""What may go wrong with options that are right."""
STATUSES = (
    f"exit status: {DONE} done; {FAILED} failed; {MISTAKEN} a mistake in the options, or in what they name; "
    f"{INTERRUPTED} interrupted; {TERMINATED} terminated. The same command goes on from what is finished."
)


# ---------------------------------------------------------------- help


class Help(argparse.HelpFormatter):
    """Paragraphs are wrapped, lines that are indented stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        groups = groupby(text.splitlines(), key=lambda line: bool(line) and not line[0].isspace())
        blocks = (("\n".join(lines), wrapped) for wrapped, lines in groups)
        return "\n".join(fill(block, width, indent) if wrapped else block for block, wrapped in blocks)


class ConfigHelp(Help, DefaultHelpFormatter):
    """The same, of a parser with a config."""


def epilog(command: str, examples: Sequence[str]) -> str:
    """The end of a help text: command lines, each the arguments that it is given, and what the exit statuses say."""
    lines = "\n".join(f"  python -m {command} {example}".rstrip() for example in examples)
    return f"examples:\n{lines}\n\n{STATUSES}"


def argument_parser(command: str, description: str | None, *examples: str, **options: Any) -> argparse.ArgumentParser:
    """A parser for a command with options of its own, --debug and --quiet among them.

    Args:
        command: its module.
        description: the first part of the help text; indented lines are not wrapped.
        examples: what may follow the command.
        options: argparse's.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {command}",
        description=description,
        epilog=epilog(command, examples),
        formatter_class=Help,
        **options,
    )
    add_common(parser)
    return parser


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options that `as_command` reads."""
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no information on stderr")


def parser_of(
    command: str, description: str, preset: str = "demo.yaml", examples: Sequence[str] | None = None
) -> ArgumentParser:
    """All fields of `lm.config.Config` as dotted options, plus --config, --print_config, --debug and --quiet."""
    if examples is None:
        examples = ("", "--config lm/configs/helpfulness.yaml --output_dir runs/helpfulness", "--print_config")
    parser = ArgumentParser(
        prog=f"python -m {command}",
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",  # the generated one hides an error under 90 lines
        description=f"{description} Without --config, the preset {preset} (the embedded world) is used; other presets "
        f"are in {CONFIGS}.",
        epilog=epilog(command, examples),
        formatter_class=ConfigHelp,
    )
    parser.add_argument("--config", action="config", help="YAML file with options; later ones and options win.")
    add_common(parser)
    parser.add_class_arguments(Config, fail_untyped=True)
    return parser


# ---------------------------------------------------------------- options

DEEPEST = 20
"""Levels of lists and mappings in options."""
_jsonargparse_load = get_loader("yaml")


def load_yaml(text: str) -> Any:
    """jsonargparse's loader, kept from what it hangs on or falls over. Raises yaml.YAMLError.

    An alias to what it stands in sends it round for ever, others can stand for billions of values: none is read.
    """
    depth = 0
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if isinstance(event, yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not read; write out what they stand for")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise yaml.YAMLError(f"it is nested more than {DEEPEST} deep")
        return _jsonargparse_load(text)
    except (ValueError, TypeError) as error:  # numbers of thousands of digits, lists as names
        raise yaml.YAMLError(f"not YAML that can be read ({error})") from None


set_loader("yaml", load_yaml, (yaml.YAMLError,))


def parse(
    command: str,
    description: str,
    arguments: Sequence[str],
    preset: str = "demo.yaml",
    examples: Sequence[str] | None = None,
) -> tuple[Config, str]:
    """(config, resolved YAML). Leaves with status 2 and a message where an option is unknown or of the wrong type;
    raises ValueError where its value is out of range."""
    parser = parser_of(command, description, preset, examples)
    if not any(argument == "--config" or argument.startswith("--config=") for argument in arguments):
        arguments = ["--config", str(CONFIGS / preset), *arguments]
    fields, resolved = resolve(parser, arguments)
    return Config(**fields), resolved


def resolve(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[dict[str, Any], str]:
    """(fields of the config, YAML of them), without the options that are about the command and not the run."""
    try:
        options = parser.parse_args(list(arguments))
    except UnicodeDecodeError as error:
        raise ValueError(f"--config: the file is not text in UTF-8 ({error})") from None
    _check_kinds(parser, options)
    fields = vars(parser.instantiate(options))
    for own in ("debug", "quiet"):
        del fields[own], options[own]
    resolved = parser.dump(options, skip_unset=False, skip_validation=True)
    del fields["config"]
    return fields, resolved


def _check_kinds(parser: ArgumentParser, options: Namespace) -> None:
    """ValueError where one value stands for a group of options, or null for what cannot be null: jsonargparse lets
    both through."""
    for group in parser.groups or ():
        value = options.get(group, {})
        if not isinstance(value, Namespace | dict):
            raise ValueError(f"--{group} must be a mapping of its options, got {json.dumps(value, default=str)}")
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if hint is not None and options.get(action.dest, ...) is None and type(None) not in get_args(hint):
            raise ValueError(f"--{action.dest} must not be null")


# ---------------------------------------------------------------- running


def as_command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Makes a command of a function of its arguments, by default sys.argv's, that returns its exit status, or None.

    An error becomes one message and a status of STATUSES; --debug shows where it came from, --quiet leaves out bars and
    information. A traceback without --debug is a fault of this program.
    """

    @functools.wraps(main)
    def guarded(arguments: Sequence[str] | None = None, **more: Any) -> int:
        given = list(sys.argv[1:] if arguments is None else arguments)

        def say(text: str) -> None:
            ranks.last_words(f"{traceback.format_exc() if '--debug' in given else ''}{text}")

        progress.be_quiet("--quiet" in given)
        quieten()
        try:
            with _terminable():
                status = main(given, **more) or DONE
            sys.stdout.flush()
            return status
        except BrokenPipeError:  # as `| head` ends: whoever read has had enough
            return closed_pipe()
        except MISTAKES as error:
            say(f"error: {error}")
            return MISTAKEN
        except FAILURES as error:
            say(f"error: {error}")
            return FAILED
        except KeyboardInterrupt:
            say("interrupted")
            return INTERRUPTED
        except Exception:
            if ranks.launched() == 1:
                raise
            ranks.last_words(traceback.format_exc())
            return FAILED

    return guarded


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds the stack as an interrupt does, and ends with a status of its own. Launched ranks are left to
    their launcher, as one that waits for others hears no signal."""
    if ranks.launched() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        print("terminated", file=sys.stderr, flush=True)
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(
    command: str,
    action: Callable[[Pipeline], Any],
    *,
    read_only: frozenset[str] = frozenset(),
    shared: bool = False,
    preset: str = "demo.yaml",
    examples: Sequence[str] | None = None,
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
        examples: for the help text, see `epilog`.
        arguments: the command line without the program; sys.argv's by default.
    """
    description = (sys.modules["__main__"].__doc__ or "").strip().split("\n")[0]

    def main(given: Sequence[str]) -> None:
        config, resolved = said_once(lambda: parse(command, description, given, preset, examples))
        folder = Path(config.output_dir)
        with ranks.together(device_of(config)), only_run_in(folder, shared=shared):
            if ranks.is_first() and not shared:  # several configs, one folder
                write_text(folder / "config.yaml", resolved)
            action(Pipeline(config, read_only=read_only))

    return as_command(main)(arguments)


def said_once(parse: Callable[[], T]) -> T:
    """What parsing returns; where it leaves with a message, several ranks give one."""
    if ranks.launched() == 1:
        return parse()
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return parse()
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
    """Progress bars of the libraries only on a terminal that wants them, and their news not at all."""
    import datasets
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if progress.is_quiet() or not sys.stderr.isatty():
        datasets.disable_progress_bars()
        disable_progress_bars()
        transformers.logging.disable_progress_bar()
