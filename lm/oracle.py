"""Trains the oracle reward model on the full training split."""

import sys

from lm.stages.run import Run, command


def work(run: Run) -> None:
    """Trains it."""
    from lm.stages.labels import oracle

    oracle(run)


if __name__ == "__main__":
    sys.exit(command("lm.oracle", work))
