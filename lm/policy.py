"""Trains the policies of the configured methods, without evaluating them."""

import sys

from lm.cli import run

if __name__ == "__main__":
    sys.exit(run("lm.policy", lambda pipeline: [pipeline.policies(name) for name in pipeline.config.methods]))
