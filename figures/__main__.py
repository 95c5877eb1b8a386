"""python -m figures [NAME ...] [--out DIR]: redraws figures from the committed results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from figures.registry import modules, redraw


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 2 where a name is unknown, 1 where results are missing or incomplete."""
    parser = argparse.ArgumentParser(prog="python -m figures", description="Redraw figures from saved results.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(modules())} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/figures"), help="folder for PNG and PDF (%(default)s)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in modules()]
    if unknown:
        parser.error(f"no figure named {', '.join(unknown)}; there are {', '.join(modules())}")
    status = 0
    for name in options.names or modules():
        try:
            print(*redraw(name, options.out))
        except (FileNotFoundError, ValueError) as error:
            print(error, file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
