"""Writes report.html of a finished run: objectives, results, training, samples and data in one file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lm.base.command import argument_parser, as_command, path

# ---------------------------------------------------------------- the command


@as_command
def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argument_parser("lm.report", __doc__, "runs/demo")
    parser.add_argument("run", metavar="RUN", type=path, help="output_dir of a finished run")
    options = parser.parse_args(arguments)
    from lm.reporting.page import write_report

    print(write_report(options.run))


if __name__ == "__main__":
    sys.exit(main())
