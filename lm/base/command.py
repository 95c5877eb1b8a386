"""What the commands share: help, errors without tracebacks, exit statuses, the lock on a run's folder."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
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
from typing import Any, TypeVar

from lm.base import progress, ranks
from lm.base.files import expanded
from lm.base.store import CorruptArtifact, MissingArtifact
from theory import shell
from theory.shell import DONE, FAILED, INTERRUPTED, MISTAKEN
from theory.shell import add_force as add_force
from theory.shell import check_free as check_free

T = TypeVar("T")

TERMINATED = 128 + signal.SIGTERM
"""An exit status beside those of `theory.shell`."""
ENDS: dict[type[BaseException], int] = {
    **dict.fromkeys((ValueError, TypeError, FileNotFoundError, IsADirectoryError, NotADirectoryError), MISTAKEN),
    MissingArtifact: MISTAKEN,
    **dict.fromkeys((FloatingPointError, CorruptArtifact, OSError), FAILED),
}
"""Exit statuses: a mistake in options, or in the files and data that they name; what may go wrong with right ones."""
_TOLD: tuple[type[BaseException], ...] = (*ENDS, ImportError, BrokenPipeError)
STATUSES = (
    f"exit status: {DONE} done; {FAILED} failed; {MISTAKEN} a mistake in the options, or in what they name; "
    f"{INTERRUPTED} interrupted; {TERMINATED} terminated. The same command goes on from what is finished."
)


# ---------------------------------------------------------------- options of a command beside those of a run


def own_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str], check: Callable[[argparse.Namespace], None]
) -> tuple[argparse.Namespace, list[str]]:
    """A command's own options, and the rest of its command line, a run's.

    Where help is asked for, the own options' is printed, the run's follows, and nothing is checked.

    Args:
        parser: of the own options, without help.
        arguments: the command line without the program.
        check: raises ValueError where they are wrong, as this does then.
    """
    own, rest = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(rest):
        parser.print_help()
        print("\nThe run's options:\n")
    else:
        check(own)
    return own, rest


# ---------------------------------------------------------------- help


class Help(argparse.HelpFormatter):
    """Paragraphs are wrapped, lines that are indented stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        groups = groupby(text.splitlines(), key=lambda line: bool(line) and not line[0].isspace())
        blocks = (("\n".join(lines), wrapped) for wrapped, lines in groups)
        return "\n".join(fill(block, width, indent) if wrapped else block for block, wrapped in blocks)


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
    parser = shell.Parser(
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


def path(text: str) -> Path:
    """The type of an option that names a file or folder: with ~ and $VARIABLES filled in."""
    return Path(place(text))


def place(text: str) -> str:
    """As `path`, of an option that may also be a hub name."""
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_data(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """The argument that names a preference set, and the one that says where its prompts stand."""
    kinds = ".jsonl, .json, .csv or .tsv (each also .gz) or .parquet file, or folder of them"
    parser.add_argument(name, type=place, help=f"hub name (owner/name), {kinds}", **options)
    parser.add_argument(
        "--prompt",
        default="auto",
        metavar="COLUMN",
        help="the column of the prompts; 'inferred': what both sides begin with; default: as data.prompt of a run",
    )


# ---------------------------------------------------------------- running


def as_command(main: Callable[..., int | None]) -> Callable[..., int]:
    """`theory.shell.as_command` of a command that may be run by several ranks, which --quiet keeps from bars and
    information, and which SIGTERM ends as an interrupt does."""
    return shell.as_command(main, statuses=ENDS, say=ranks.last_words, around=_working)


@contextlib.contextmanager
def _working(given: Sequence[str]) -> Iterator[None]:
    before = progress.is_quiet()
    progress.be_quiet("--quiet" in given)
    quieten()
    try:
        with _terminable():
            yield
    except _TOLD:
        raise
    except Exception:
        if ranks.launched() == 1:
            raise
        ranks.last_words(traceback.format_exc())  # once, and not by each rank
        raise SystemExit(FAILED) from None
    finally:
        progress.be_quiet(before)


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

    What ends before anything is written leaves nothing behind: a folder that was made for it is removed, from one that
    was there the lock.

    Raises ValueError where another process holds it, unless both share it, and where it is a file, or in one. Ranks
    that work together share the first one's.
    """
    if not ranks.is_first():
        yield
        return
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    if (there := new[-1].parent if new else folder).is_file():
        raise ValueError(f"output_dir {folder}: {there} is a file; a folder is needed")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ".lock"
    ours = not file.exists()
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"output_dir {folder} is in use by another run; wait for it, or name another") from None
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):  # where others share it, or something is in it
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if ours and (not new or [path.name for path in folder.iterdir()] == [file.name]):
                    file.unlink()
                    for path in new:
                        path.rmdir()
            raise


_QUIET = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
_WITHOUT_BARS = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def quieten() -> None:
    """Progress bars of the libraries only on a terminal that wants them, and their news not at all.

    By their environment variables, which they read when they are imported: a command that needs none imports none.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.set_verbosity_error()
    if not progress.is_quiet() and sys.stderr.isatty():
        return
    os.environ |= _WITHOUT_BARS
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    if "huggingface_hub" in sys.modules:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.disable_progress_bar()


@contextlib.contextmanager
def quietened() -> Iterator[None]:
    """`quieten` for as long as the context lasts, in a process that is not ours: all is as it was afterwards."""
    import datasets
    import transformers
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars

    bars: list[tuple[bool, Callable[[], None]]] = [
        (not datasets.are_progress_bars_disabled(), datasets.enable_progress_bars),
        (not are_progress_bars_disabled(), enable_progress_bars),
        (transformers.utils.logging.is_progress_bar_enabled(), transformers.logging.enable_progress_bar),
    ]
    environment, verbosity = dict(os.environ), transformers.logging.get_verbosity()
    accelerate = logging.getLogger("accelerate")
    level = accelerate.level
    try:
        with warnings.catch_warnings():
            quieten()
            yield
    finally:
        for name in (*_QUIET, *_WITHOUT_BARS):
            os.environ.pop(name, None)
            if name in environment:
                os.environ[name] = environment[name]
        transformers.logging.set_verbosity(verbosity)
        accelerate.setLevel(level)
        for shown, enable in bars:
            if shown:
                enable()
