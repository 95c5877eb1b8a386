"""Trains the oracle reward model on the full training split."""

import sys

from lm.cli import run

if __name__ == "__main__":
    sys.exit(run("lm.oracle", lambda pipeline: pipeline.oracle))
