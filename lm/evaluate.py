"""Evaluates trained policies on held-out prompts: oracle advantage over pi_ref, intervals, lengths, divergences."""

import sys

from lm.stages.run import Run, command

UPSTREAM = frozenset({"data", "sft", "oracle", "labels", "bias", "reward", "score", "unlabelled", "policy"})


def work(run: Run) -> None:
    """Evaluates every method and writes the report; trains nothing."""
    from lm.reporting.results import report

    report(run)


if __name__ == "__main__":
    sys.exit(command("lm.evaluate", work, read_only=UPSTREAM))
