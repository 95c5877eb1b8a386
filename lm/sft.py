"""Trains pi_ref on the reference completions."""

import sys

from lm.stages.run import Run, command


def work(run: Run) -> None:
    """Trains it."""
    from lm.stages.trainings import sft

    sft(run)


if __name__ == "__main__":
    sys.exit(command("lm.sft", work))
