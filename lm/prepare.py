"""Reads, splits and tokenises the data, and prints what was kept and what was not."""

import sys

from lm.stages.run import Run, command


def work(run: Run) -> None:
    """Prints the rows of each split, and those that were left out by reason."""
    from lm.base import ranks
    from lm.stages.data import data

    report = data(run).metrics
    if not ranks.is_first():
        return
    for name in ("preferences", "references"):
        kept = ", ".join(f"{report[name]['kept'].get(split, 0):,} {split}" for split in ("train", "valid", "test"))
        print(f"{name}: {kept}")
        for reason, count in report[name]["dropped"].items():
            print(f"  left out: {count:,} rows, {reason}")
        for line in report.get("labels", []) if name == "preferences" else []:
            print(f"  {line}")


if __name__ == "__main__":
    sys.exit(command("lm.prepare", work))
