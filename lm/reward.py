"""Trains the reward model of D_rho and the ensemble."""

import sys

from lm.cli import run
from lm.pipeline import MAIN

if __name__ == "__main__":
    sys.exit(run("lm.reward", lambda pipeline: [pipeline.reward(name) for name in (MAIN, *pipeline.members)]))
