"""What the commands of theory and bandits share: help with examples, one-line errors, exit statuses (also of lm)."""

from __future__ import annotations

import argparse
import codecs
import functools
import importlib.util
import io
import itertools
import os
import re
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from theory.records import check_replaceable

DONE, FAILED, MISTAKEN, INTERRUPTED = 0, 1, 2, 128 + signal.SIGINT
"""Exit statuses; `lm.base.command` has them too."""
STATUSES: dict[type[BaseException], int] = {
    ValueError: MISTAKEN,
    FileNotFoundError: MISTAKEN,
    IsADirectoryError: MISTAKEN,
    NotADirectoryError: MISTAKEN,
    OSError: FAILED,
    ArithmeticError: FAILED,
}
"""What an error says by the first of its classes that is here; any other is a fault of ours and keeps its traceback."""


class Parser(argparse.ArgumentParser):
    """Takes whole names only, and an option of one value once, where argparse would take the last of two."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; leaves with status 2 for an option that stands twice."""
        words = list(sys.argv[1:] if args is None else args)
        if twice := said_twice(self._actions, words):
            self.error(twice)
        return super().parse_known_args(words, namespace)


def said_twice(actions: Iterable[argparse.Action], words: Sequence[str]) -> str | None:
    """What is wrong where a command line has an option of one value twice, in a line; None where none stands twice.

    Switches, and options that add to what they were given before, may.
    """
    named = [word.partition("=")[0] for word in itertools.takewhile(lambda word: word != "--", words)]
    for action in actions:
        at = [i for i, name in enumerate(named) if name in action.option_strings and not name.endswith("+")]
        if len(at) > 1 and action.nargs != 0 and not isinstance(action, argparse._AppendAction):
            values = (words[i].partition("=")[2] if "=" in words[i] else "".join(words[i + 1 : i + 2]) for i in at[:2])
            first, second = (value or "nothing" for value in values)
            return f"{words[at[0]].partition('=')[0]} stands twice, as {first} and as {second}; leave one"
    return None


def argument_parser(command: str, description: str, *examples: str) -> argparse.ArgumentParser:
    """A parser with --debug, for a function that is made a command by `as_command`.

    Args:
        command: its module.
        description: the first part of the help text.
        examples: what may follow the command.
    """
    lines = "\n".join(f"  python -m {command} {example}".rstrip() for example in examples)
    parser = Parser(
        prog=f"python -m {command}",
        description=description,
        epilog=f"examples:\n{lines}\n\nexit status: {DONE} done; {FAILED} failed; {MISTAKEN} a mistake in the options, "
        f"or in what they name;\n{INTERRUPTED} interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def as_command(
    main: Callable[..., int | None],
    *,
    statuses: Mapping[type[BaseException], int] = STATUSES,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    around: Callable[[Sequence[str]], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> Callable[..., int]:
    """Makes a command of a function of its arguments, by default sys.argv's, that returns its exit status, or None.

    An error becomes one message and a status; --debug shows where it came from. A traceback without --debug is a fault
    of this program.

    Args:
        main: the function.
        statuses: exit status of an error, by the first of its classes that is here.
        say: how a message is said.
        around: entered with the arguments while the function runs.
    """

    @functools.wraps(main)
    def guarded(arguments: Sequence[str] | None = None, **more: Any) -> int:
        given = list(sys.argv[1:] if arguments is None else arguments)
        print_anywhere()

        def ended(text: str, status: int) -> int:
            say(f"{traceback.format_exc() if '--debug' in given else ''}{text}")
            return status

        try:
            try:
                with around(given):
                    status = main(given, **more) or DONE
            except SystemExit as end:  # argparse's, after a help text that may still be on its way, or rich's
                if isinstance(end.__context__, BrokenPipeError):
                    return closed_pipe()
                sys.stdout.flush()
                raise
            sys.stdout.flush()
            return status
        except BrokenPipeError:  # as `| head` ends: whoever read has had enough
            return closed_pipe()
        except KeyboardInterrupt:
            return ended("interrupted", INTERRUPTED)
        except ModuleNotFoundError as error:
            if (line := missing_library(error)) is None:
                raise
            return ended(f"error: {line}", FAILED)
        except tuple(statuses) as error:
            kind = next(kind for kind in type(error).__mro__ if kind in statuses)
            return ended(f"error: {error}", statuses[kind])

    return guarded


PLAIN = {"Δ": "D", "δ": "d", "α": "a", "β": "b", "π": "p", "ρ": "r", "−": "-", "–": "-", "—": "-", "→": ">", "…": "."}
"""What stands for a character where a terminal has no such one, as wide as it is; an escape stands for the others."""


def print_anywhere() -> None:
    """Whatever is printed can be, on a terminal of any encoding: also names of files that are no text."""

    def plain(error: UnicodeError) -> tuple[str | bytes, int]:
        if isinstance(error, UnicodeEncodeError) and error.object[error.start] in PLAIN:
            return PLAIN[error.object[error.start]], error.start + 1
        return codecs.backslashreplace_errors(error)

    codecs.register_error("plain", plain)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, as by >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # for as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


# ---------------------------------------------------------------- libraries of extras

PROJECT = "reward-distillation"
BROUGHT_BY = {
    "cvxpy": "cvxpy-base",
    "huggingface_hub": "transformers",
    "markupsafe": "jinja2",
    "pyarrow": "datasets",
    "yaml": "transformers",
}
"""Import name -> the requirement of ours that brings it, where the two differ."""


def require_libraries(*libraries: str) -> None:
    """Raises ModuleNotFoundError for the first library that is not installed, importing none.

    For a command that would import them late, after work that would be lost. `as_command` makes a line of the error.
    """
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)


def missing_library(error: ModuleNotFoundError) -> str | None:
    """What to install so that an import succeeds, in a line; None where nothing that we ask for has the library."""
    from importlib.metadata import PackageNotFoundError, requires

    library = (error.name or "").partition(".")[0]
    try:
        extra = extra_of(library, requires(PROJECT) or [])
    except PackageNotFoundError:
        return None
    if extra is None:
        return None
    wanted, target = (f"the extra `{extra}`", f".[{extra}]") if extra else ("this package", ".")
    return f"{library} is not installed: it comes with {wanted}, pip install -e '{target}'"


def extra_of(library: str, requirements: Iterable[str]) -> str | None:
    """The smallest extra that has a library; "" where no extra is needed for it, None where nothing brings it.

    Args:
        library: by the name that it is imported by.
        requirements: as in a package's metadata, such as 'torch>=2; extra == "lm"'.
    """
    distribution = BROUGHT_BY.get(library, library).replace("_", "-").lower()
    sizes, found = Counter[str](), set()
    for requirement in requirements:
        named = re.search(r"""\bextra == ["'](.+?)["']""", requirement)
        extra = named[1] if named else ""
        sizes[extra] += 1
        if re.split(r"[^\w.-]", requirement, maxsplit=1)[0].replace("_", "-").lower() == distribution:
            found.add(extra)
    return min(found, key=lambda extra: (extra != "", sizes[extra], extra), default=None)


# ---------------------------------------------------------------- options, and how commands end


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def closed_pipe() -> int:
    """The exit status where nobody reads stdout any more; what is still to be flushed goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def output_file(name: str) -> Path:
    """An option that names a file to write, refused before anything is computed if that cannot be."""
    path = Path(name)
    try:
        check_replaceable(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{name}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{name}: the folder {path.parent} may not be written to")
    return path


def add_force(parser: argparse.ArgumentParser) -> None:
    """The option that `check_free` reads."""
    parser.add_argument("--force", action="store_true", help="overwrite the file to write where it is there")


def check_free(option: str, file: Path, *, force: bool) -> None:
    """ValueError where a file that is to be written is there, or is a folder, a device or a pipe: before anything is
    computed."""
    try:
        check_replaceable(file)
    except ValueError as error:
        raise ValueError(f"{option} {error}") from None
    if not force and os.path.lexists(file):
        raise ValueError(f"{option} {file} exists; name another file, or remove it, or overwrite it by --force")


def check_free_or_marked(option: str, file: Path, *, start: str, force: bool) -> None:
    """As `check_free`, of a file of which only what stands behind a mark is written anew, where it has one.

    Args:
        option: that names the file.
        file: to write.
        start: the mark.
        force: whether a file without one is overwritten.
    """
    if not (file.is_file() and start in file.read_text(encoding="utf-8")):
        check_free(option, file, force=force)


def whole_number(text: str) -> int:
    """An option that is a number of things."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)
