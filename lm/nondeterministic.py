"""Non-deterministic preferences: methods trained on sure and on unsure pairs, at several sampling temperatures.

See `lm.studies.nondeterministic`.
"""

import sys

from lm.stages.run import Run, command


def work(run: Run) -> None:
    """Runs the study and writes its results and figures."""
    from lm.studies.nondeterministic import report

    report(run)


if __name__ == "__main__":
    examples = ("", "--config nondeterministic --output_dir runs/nondeterministic")
    sys.exit(command("lm.nondeterministic", work, preset="nondeterministic_world.yaml", examples=examples))
