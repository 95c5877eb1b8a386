"""Says, before anything is trained, what DPO will do on a preference set, and what is odd about the set."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lm.base import progress
from lm.base.command import argument_parser, as_command
from lm.config import KINDS, DataConfig

# ---------------------------------------------------------------- the command


@as_command
def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argument_parser(
        "lm.diagnose", __doc__, "pairs.jsonl.gz", "pairs.jsonl.gz --json report.json --tokenizer gpt2"
    )
    parser.add_argument("data", metavar="DATA", help="hub name (owner/name), .jsonl, .jsonl.gz, .parquet, or a folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report as JSON")
    parser.add_argument("--kind", choices=["auto", *KINDS], default="auto", help="schema; default: by the columns")
    parser.add_argument("--subset", metavar="NAME", help="folder of a hub dataset")
    parser.add_argument("--tokenizer", metavar="MODEL", help="measure lengths in this model's tokens, and check limits")
    for what in ("prompt", "completion"):
        default = getattr(DataConfig, f"max_{what}_length")
        parser.add_argument(
            f"--max-{what}-length", type=_positive, metavar="N", help=f"limit in tokens, default {default}"
        )
    options = parser.parse_args(arguments)
    limits = {name: getattr(options, name) for name in ("max_prompt_length", "max_completion_length")}
    if options.tokenizer is None and any(limits.values()):
        parser.error("--max-prompt-length and --max-completion-length are in tokens: name a --tokenizer")
    from rich.console import Console

    from lm.studies.diagnosis import measure, read, show
    from theory.records import write_json

    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing forks here
    with Console(stderr=True, quiet=progress.is_quiet()).status(f"reading {options.data}"):
        comparisons = read(options.data, kind=options.kind, subset=options.subset)
        report = measure(
            comparisons,
            options.data,
            tokenizer=options.tokenizer,
            **{name: value or getattr(DataConfig, name) for name, value in limits.items()},
        )
    if options.json:
        write_json(options.json, asdict(report))
    show(report, Console())


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a number of tokens above 0 is needed, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
