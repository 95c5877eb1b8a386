"""Runs everything that is missing: upstream stages, a policy a method, evaluation; ends in a table."""

import sys

from lm.stages.run import Run, command


def work(run: Run) -> None:
    """Evaluates every method and writes the report."""
    from lm.reporting.results import report

    report(run)


if __name__ == "__main__":
    sys.exit(command("lm.train", work))
