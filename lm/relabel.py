"""Relabels every pair by the oracle."""

import sys

from lm.cli import run

if __name__ == "__main__":
    sys.exit(run("lm.relabel", lambda pipeline: pipeline.labels))
