"""Writes the model card of a trained policy from its run's folder: method, data, reward models, training, results."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lm.base.command import add_force, argument_parser, as_command, check_free, path
from lm.objectives import METHODS
from theory.records import write_text

# ---------------------------------------------------------------- the command


@as_command
def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argument_parser("lm.card", __doc__, "runs/demo e-dpo", "runs/demo e-dpo --output CARD.md")
    parser.add_argument("run", metavar="RUN", type=path, help="output_dir of a finished run")
    parser.add_argument("method", metavar="METHOD", help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--output", type=path, metavar="FILE", help="write it there instead of printing it")
    add_force(parser)
    options = parser.parse_args(arguments)
    if options.output:
        check_free("--output", options.output, force=options.force)
    elif options.force:
        parser.error("--force goes with --output")
    from lm.reporting.card import card

    text = card(options.run, options.method)
    if options.output:
        write_text(options.output, text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    sys.exit(main())
