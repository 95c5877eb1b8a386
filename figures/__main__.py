"""python -m figures [NAME ...] [--out DIR]: redraws figures from the committed results."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from figures.registry import modules, redraw

DONE, FAILED, MISTAKEN, INTERRUPTED = 0, 1, 2, 128 + signal.SIGINT
"""Exit statuses, as those of the other packages, none of which is imported here."""
HELP = f"""examples:
  python -m figures
  python -m figures figure_1 figure_b2 --out figures-of-mine

exit status: {DONE} done; {FAILED} failed: results are missing or broken, the other figures are drawn all the same;
{MISTAKEN} a mistake in the options; {INTERRUPTED} interrupted"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status. Errors are a line each; --debug shows where they came from."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m figures",
        description="Redraw figures from saved results.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(modules())} (default: all)")
    parser.add_argument("--out", type=Path, action="append", help="folder for PNG and PDF (default: runs/figures)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    options = parser.parse_args(arguments)
    if len(folders := options.out or [Path("runs/figures")]) > 1:
        parser.error(f"--out stands twice, as {folders[0]} and as {folders[1]}; leave one")
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what a terminal's encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    status, unknown = DONE, [name for name in options.names if name not in modules()]
    try:
        if unknown:
            raise ValueError(f"no figure named {', '.join(unknown)}; there are {', '.join(modules())}")
        for name in options.names or modules():
            try:
                print(*redraw(name, folders[0]), flush=True)
            except (FileNotFoundError, ValueError) as error:
                _say(f"error: {error}", options.debug)
                status = FAILED
        return status
    except BrokenPipeError:  # as `| head` ends: whoever read has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, FileExistsError, NotADirectoryError) as error:
        _say(f"error: {error}", options.debug)
        return MISTAKEN
    except OSError as error:
        _say(f"error: {error}", options.debug)
        return FAILED
    except KeyboardInterrupt:
        _say("interrupted", options.debug)
        return INTERRUPTED


def _say(text: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
