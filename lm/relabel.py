"""Relabels every pair by the oracle."""

import sys

from lm.stages.run import Run, command


def work(run: Run) -> None:
    """Relabels."""
    from lm.stages.labels import labels

    labels(run)


if __name__ == "__main__":
    sys.exit(command("lm.relabel", work))
