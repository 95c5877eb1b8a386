"""Trains every method in a language small enough to list, and measures how far each ends from the optimum of theory.

    python -m lm.exact

A completion is a string of at most three of four tokens; a shorter one ends with end-of-text, one of full length ends
by itself. So there are 85, their probabilities sum to one for every network, and the optimum of a method over *all*
policies can be computed without training (`bandits.solve`). Data, scoring, packing and Trainer are those of `lm.train`.

Arrays: P prompts, n completions (the same for every prompt), K ensemble members. A preference graph a prompt.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lm.base import progress
from lm.base.command import as_command, epilog, only_run_in
from lm.base.store import provenance
from lm.config import ExactConfig
from theory.records import write_json, write_text


def parse(arguments: Sequence[str]) -> tuple[ExactConfig, str]:
    """(config, resolved YAML); leaves with status 2 on an unknown option, ValueError for one out of range."""
    from lm.base.options import CONFIGS, ConfigHelp, Parser, add_config, resolve

    parser = Parser(
        prog="python -m lm.exact",
        usage="%(prog)s [--config NAME] [--OPTION VALUE ...]",
        description=(__doc__ or "").split("\n")[0],
        epilog=epilog("lm.exact", ("", "--output_dir runs/exact-7 --seed 7 --tokens 5", "--print_config")),
        formatter_class=ConfigHelp,
    )
    add_config(parser, ExactConfig)
    fields, resolved = resolve(parser, ["--config", str(CONFIGS / "exact.yaml"), *arguments])
    return ExactConfig(**fields), resolved


@as_command
def main(arguments: Sequence[str]) -> int:
    """The command; returns 1 where a trained policy misses its optimum."""
    config, resolved = parse(arguments)
    from rich.console import Console

    from figures.registry import redraw
    from lm.studies import exact_budget
    from lm.studies.exact import experiment, failures, remarks, table

    folder = Path(config.output_dir)
    with only_run_in(folder), tempfile.TemporaryDirectory() as scratch:
        write_text(folder / "config.yaml", resolved)
        report = experiment(config, Path(scratch))
        budgets = exact_budget.experiment(config, Path(scratch) / "closed")
        report["budget"] = budgets
        report["provenance"] = provenance(config.seed)
        write_json(folder / "exact.json", report)
        written = [folder / "exact.json", *redraw("exact", folder, report)]
    Console().print(table(report))
    print(*remarks(report), *(exact_budget.remark(*run) for run in budgets.items()), sep="\n")
    progress.say(f"written: {', '.join(map(str, written))}")
    missed = [*failures(report), *exact_budget.failures(budgets)]
    print(*(f"missed: {line}" for line in missed), sep="\n", end="\n" if missed else "", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
