"""Trains pi_ref on the reference completions."""

import sys

from lm.cli import run

if __name__ == "__main__":
    sys.exit(run("lm.sft", lambda pipeline: pipeline.sft))
