"""Reads, splits and tokenises the data."""

import sys

from lm.cli import run

if __name__ == "__main__":
    sys.exit(run("lm.prepare", lambda pipeline: pipeline.data))
