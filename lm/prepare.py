"""Reads, splits and tokenises the data, and prints what was kept and what was not."""

import sys

from lm.stages.run import Run, command


def work(run: Run) -> None:
    """Prints the rows of each split, and those that were left out by reason."""
    from lm.base import ranks
    from lm.stages.data import data, lines, told_of

    report = data(run).metrics
    if not ranks.is_first():
        return
    for name in told_of(run):
        kept = ", ".join(f"{report[name]['kept'].get(split, 0):,} {split}" for split in ("train", "valid", "test"))
        print(f"{name}: {kept}")
        for line in lines(report[name]):
            print(f"  {line}")


if __name__ == "__main__":
    sys.exit(command("lm.prepare", work))
