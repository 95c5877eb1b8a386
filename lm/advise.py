"""Says which method is worth its cost on a preference set, as far as the study knows: fits a reward head and a DPO."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lm.base.command import add_force, as_command, check_free, own_options
from lm.base.files import expanded
from lm.stages.run import Run, command
from theory.shell import Parser

SET = {"--data.kind": "preferences", "--methods": "[dpo]", "--output_dir": "runs/advise"}
"""Options that are these where they are not given."""


def work(run: Run, data: str, study: Path | None, out: Path | None) -> None:
    """Measures the set, prints the report, and writes it as JSON where that is asked for."""
    from dataclasses import asdict

    from rich.console import Console

    from lm.base import ranks
    from lm.studies.advice import show
    from lm.studies.fitting import STUDY, advice, study_of
    from theory.records import write_json

    found = study_of(study)  # before anything is fitted
    if run.config.methods != ["dpo"]:
        raise ValueError(f"methods must be [dpo], which is what is fitted here, got {run.config.methods}")
    told = advice(run, data, found, None if found is None else str(study or STUDY))
    if not ranks.is_first():
        return
    if out is not None:
        write_json(out, asdict(told))
    show(told, Console())


def _check(own: argparse.Namespace) -> None:
    if own.data is None:
        raise ValueError("DATA is needed: hub name, file or folder of preferences")
    own.study, own.json = (None if name is None else Path(expanded(name)) for name in (own.study, own.json))
    if own.json is not None:
        check_free("--json", own.json, force=own.force)
    elif own.force:
        raise ValueError("--force goes with --json")


@as_command
def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    parser = Parser(prog="python -m lm.advise", usage="%(prog)s DATA [OPTION OF lm.train ...]", add_help=False)
    parser.add_argument("data", nargs="?", metavar="DATA", help="hub name, file or folder, as --data.path of a run")
    parser.add_argument("--study", metavar="FILE", help="of lm.workflow.regimes; default: the one that comes with it")
    parser.add_argument("--json", metavar="FILE", help="also write the report as JSON")
    add_force(parser)
    own, rest = own_options(parser, arguments, _check)
    given = {word.split("=")[0] for word in rest}
    unsaid = [f"{name}={value}" for name, value in SET.items() if name not in given]
    rest = [*([] if own.data is None else [f"--data.path={own.data}"]), *unsaid, *rest]
    examples = ("pairs.jsonl", "pairs.jsonl --model NAME --policy.epochs 0.5 --json advice.json")
    action = lambda run: work(run, own.data, own.study, own.json)  # noqa: E731
    return command("lm.advise", action, examples=examples, arguments=rest)


if __name__ == "__main__":
    sys.exit(main())
