"""`python -m lm` lists the commands of this package; the command `lm` lists and runs them, and those beside it."""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import runpy
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from theory.shell import MISTAKEN, as_command

GUARD = 'if __name__ == "__main__":'
BESIDE = ("theory", "bandits", "figures")


def commands(package: str = "lm") -> dict[str, str]:
    """Module -> the first line of its docstring, of every module of a package that can be run; nothing is imported.

    A package that can be run itself is among them, but for this one.
    """
    found = {}
    for path in sorted((Path(__file__).parents[1] / package).glob("*.py")):
        source = path.read_text(encoding="utf-8")
        name = package if path.stem == "__main__" else f"{package}.{path.stem}"
        if f"\n{GUARD}" in source and name != "lm" and not path.stem.endswith("_test"):
            found[name] = (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
    return found


@partial(as_command, statuses={})  # a command that is run tells its own errors
def script(arguments: Sequence[str]) -> int:
    """`lm COMMAND`: runs lm.COMMAND, or a command of theory, bandits or figures by its whole name; without one, lists.

    Unlike `python -m` it imports nothing from the folder that it runs in, where a folder of the user's may be called as
    one of these packages; nor do processes that it starts. Returns the exit status.
    """
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    name, *rest = arguments or ["--help"]
    ours, beside = commands(), {one: text for package in BESIDE for one, text in commands(package).items()}
    known = {one.removeprefix("lm."): one for one in ours} | {one: one for one in (*ours, *beside)}
    if name in ("-h", "--help"):
        shown = {one.removeprefix("lm."): text for one, text in ours.items()} | beside
        width = max(map(len, shown))
        print("usage: lm COMMAND [--help] [OPTION ...]\n\ncommands:")
        print("\n".join(f"  {one:<{width}}  {text}" for one, text in shown.items()))
        print("\nEach explains its options with --help; train runs everything. `lm train` is `python -m lm.train`.")
        return 0
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        hint = f"did you mean lm {close[0]}?" if close else "`lm` lists them"
        print(f"error: there is no command {name!r}; {hint}", file=sys.stderr)
        return MISTAKEN
    sys.argv = [name, *rest]
    runpy.run_module(known[name], run_name="__main__", alter_sys=True)
    return 0


@as_command
def main(arguments: Sequence[str]) -> int:
    """Prints the list; returns the exit status."""
    width = max(map(len, commands()))
    listing = "\n".join(f"  python -m {name:<{width}}  {text}" for name, text in commands().items())
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m lm",
        usage="python -m lm.COMMAND [--help] [OPTION ...]",
        description=f"Commands:\n{listing}\n\nEach explains its options with --help; lm.train runs everything.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help=argparse.SUPPRESS)
    _, unknown = parser.parse_known_args(arguments)
    if unknown:
        close = difflib.get_close_matches(f"lm.{unknown[0].removeprefix('lm.')}", commands(), n=1, cutoff=0.7)
        hint = f"; did you mean python -m {close[0]}?" if close else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
