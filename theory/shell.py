"""What the commands of theory and bandits share: help with examples, one-line errors, exit statuses (also of lm)."""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DONE, FAILED, MISTAKEN, INTERRUPTED = 0, 1, 2, 128 + signal.SIGINT
"""Exit statuses, those of `lm.cli` too."""
STATUSES: dict[type[BaseException], int] = {
    ValueError: MISTAKEN,
    FileNotFoundError: MISTAKEN,
    IsADirectoryError: MISTAKEN,
    NotADirectoryError: MISTAKEN,
    OSError: FAILED,
    ArithmeticError: FAILED,
    KeyboardInterrupt: INTERRUPTED,
}
"""What an error says by the first of its classes that is here; any other is a fault of ours and keeps its traceback."""


def argument_parser(command: str, description: str, *examples: str) -> argparse.ArgumentParser:
    """A parser with --debug, for a function that is made a command by `as_command`.

    Args:
        command: its module.
        description: the first part of the help text.
        examples: what may follow the command.
    """
    lines = "\n".join(f"  python -m {command} {example}".rstrip() for example in examples)
    parser = argparse.ArgumentParser(
        prog=f"python -m {command}",
        description=description,
        epilog=f"examples:\n{lines}\n\nexit status: {DONE} done; {FAILED} failed; {MISTAKEN} a mistake in the options, "
        f"or in what they name;\n{INTERRUPTED} interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def as_command(main: Callable[..., int]) -> Callable[..., int]:
    """Makes a command of a function of its arguments, by default sys.argv's, that returns its exit status.

    An error of STATUSES becomes one line and a status; --debug shows where it came from.
    """

    @functools.wraps(main)
    def guarded(arguments: Sequence[str] | None = None, **more: Any) -> int:
        given = list(sys.argv[1:] if arguments is None else arguments)
        try:
            status = main(given, **more)
            sys.stdout.flush()
            return status
        except BrokenPipeError:  # as `| head` ends: whoever read has had enough
            return closed_pipe()
        except tuple(STATUSES) as error:
            if "--debug" in given:
                traceback.print_exc()
            print("interrupted" if isinstance(error, KeyboardInterrupt) else f"error: {error}", file=sys.stderr)
            return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)

    return guarded


def closed_pipe() -> int:
    """The exit status where nobody reads stdout any more; what is still to be flushed goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def output_file(name: str) -> Path:
    """An option that names a file to write, refused before anything is computed if that cannot be."""
    path = Path(name)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{name} is a folder; a file is needed")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{name}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{name}: the folder {path.parent} may not be written to")
    return path


def whole_number(text: str) -> int:
    """An option that is a number of things."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)
