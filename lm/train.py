"""Runs everything that is missing: upstream stages, a policy a method, evaluation; ends in a table."""

import sys

from lm.cli import run
from lm.evaluate import report

if __name__ == "__main__":
    sys.exit(run("lm.train", report))
