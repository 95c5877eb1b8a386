"""`python -m lm`: lists the commands of this package."""

from __future__ import annotations

import argparse
import ast
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from theory.shell import print_anywhere

GUARD = 'if __name__ == "__main__":'


def commands() -> dict[str, str]:
    """Module -> the first line of its docstring, of every module here that can be run; nothing is imported."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if f"\n{GUARD}" in source and path.stem != "__main__" and not path.stem.endswith("_test"):
            found[f"lm.{path.stem}"] = (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the list; returns the exit status."""
    print_anywhere()
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
