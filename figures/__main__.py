"""python -m figures [NAME ...] [--out DIR] [--style paper|slides]: redraws figures from the committed results."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from figures import captions, style
from figures.registry import PICTURES, check, modules, redraw, results_of

DONE, FAILED, MISTAKEN, INTERRUPTED = 0, 1, 2, 128 + signal.SIGINT
"""Exit statuses, as those of the other packages, none of which is imported here."""


def _size(name: str) -> str:
    this = style.STYLES[name]
    return f"{name}, {this.single:g} or {this.double:g} inches wide, text of {this.small:g} to {this.font:g} points"


HELP = f"""examples:
  python -m figures
  python -m figures figure_1 figure_b2 --out figures-of-mine
  python -m figures figure_2 --style slides --captions none
  python -m figures table_1 --captions tex

styles: {"; ".join(_size(name) for name in style.STYLES)}
captions: md and tex write NAME.caption.md or NAME.caption.tex beside the figure, for Markdown with mathematics between
dollars or for \\caption{{\\input{{...}}}}; inside writes below the panels, into the picture; none leaves them out
table_1 is written as .tex (booktabs) and .csv besides

exit status: {DONE} done; {FAILED} failed: results are missing or broken, the other figures are drawn all the same;
{MISTAKEN} a mistake in the options; {INTERRUPTED} interrupted"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status. Errors are a line each; --debug shows where they came from."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        try:
            status = _main(given)
        except SystemExit:  # argparse's, after a help text that may still be on its way
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # as `| head` ends: whoever read has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, FileExistsError, NotADirectoryError) as error:
        _say(f"error: {error}", debug)
        return MISTAKEN
    except OSError as error:
        _say(f"error: {error}", debug)
        return FAILED
    except KeyboardInterrupt:
        _say("interrupted", debug)
        return INTERRUPTED


def _main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m figures",
        description="Redraw figures from saved results.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"any of: {', '.join(modules())} (default: all that there are results of)",
    )
    formats = ", ".join(PICTURES).upper()
    parser.add_argument("--out", type=Path, action="append", help=f"folder for {formats} (default: runs/figures)")
    parser.add_argument(
        "--style",
        metavar="|".join(style.STYLES),
        default=style.DEFAULT,
        help="where figures are to stand (%(default)s)",
    )
    parser.add_argument(
        "--captions", metavar="|".join(captions.WHERE), default=captions.DEFAULT, help="where captions go (%(default)s)"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    options = parser.parse_args(arguments)
    if len(folders := options.out or [Path("runs/figures")]) > 1:
        parser.error(f"--out stands twice, as {folders[0]} and as {folders[1]}; leave one")
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what a terminal's encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    status, unknown = DONE, [name for name in options.names if name not in modules()]
    if unknown:
        raise ValueError(f"no figure named {', '.join(unknown)}; there are {', '.join(modules())}")
    check(options.style, options.captions)
    names, later = (options.names, []) if options.names else _by_results()
    for name in names:
        try:
            print(*redraw(name, folders[0], style=options.style, captions=options.captions), flush=True)
        except (FileNotFoundError, ValueError) as error:
            _say(f"error: {error}", options.debug)
            status = FAILED
    for name in later:
        print(f"{name} is not drawn: there is no {results_of(name)} yet", file=sys.stderr)
    return status


def _by_results() -> tuple[list[str], list[str]]:
    """The figures that there are results of, and the others. FileNotFoundError where there are none at all."""
    there = {name: results_of(name).exists() for name in modules()}
    if not any(there.values()):
        raise FileNotFoundError(f"there are no results in {results_of(next(iter(there))).parent}")
    return [name for name, found in there.items() if found], [name for name, found in there.items() if not found]


def _say(text: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
