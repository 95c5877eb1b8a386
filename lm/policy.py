"""Trains the policies of the configured methods, without evaluating them."""

import sys

from lm.stages.run import Run, command


def work(run: Run) -> None:
    """Trains each method in each of its settings."""
    from lm.stages.policies import policies

    for name in run.config.methods:
        policies(run, name)


if __name__ == "__main__":
    sys.exit(command("lm.policy", work))
