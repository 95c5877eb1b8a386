"""Reads, splits and tokenises the data, and prints what was kept and what was not."""

import sys

from lm import ranks
from lm.cli import run
from lm.pipeline import Pipeline


def prepare(pipeline: Pipeline) -> None:
    """Prints the rows of each split, and those that were left out by reason."""
    report = pipeline.data.metrics
    if not ranks.is_first():
        return
    for name in ("preferences", "references"):
        kept = ", ".join(f"{report[name]['kept'].get(split, 0):,} {split}" for split in ("train", "valid", "test"))
        print(f"{name}: {kept}")
        for reason, count in report[name]["dropped"].items():
            print(f"  left out: {count:,} rows, {reason}")


if __name__ == "__main__":
    sys.exit(run("lm.prepare", prepare))
