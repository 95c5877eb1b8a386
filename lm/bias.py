"""Length-biased subsets of a preference set, exact in the share of pairs whose longer completion is preferred.

`python -m lm.bias pairs.jsonl --rho 0.2 --out biased.jsonl` makes one of any set, `lm.bias pairs.jsonl --help` tells
the options. With the options of `lm.train` instead, it makes D_rho and the ensemble's subsets of a run.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm.base import progress
from lm.base.command import add_data, add_force, argument_parser, as_command, check_free, path, place
from lm.config import BiasConfig, check_seed
from lm.stages.run import Run, command


def table(report: dict[str, Any], title: str) -> Any:
    """The report of `bias_file` as a rich table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    view = Table("", "before", "after", title=Text(title), box=box.SIMPLE)  # a file's name is no markup
    for column in view.columns[1:]:
        column.justify = "right"

    def row(name: str, *cells: str) -> None:
        view.add_row(name, *cells)

    both = report["before"], report["after"]
    compared = [each["longer_preferred"] + each["shorter_preferred"] for each in both]
    row("pairs", *(f"{each['pairs']:,}" for each in both))
    row("longer completion preferred", *(f"{each['longer_preferred']:,}" for each in both))
    row("shorter completion preferred", *(f"{each['shorter_preferred']:,}" for each in both))
    row("neither is longer", *(f"{each['pairs'] - count:,}" for each, count in zip(both, compared, strict=True)))
    shares = zip(both, compared, strict=True)
    row("share preferring the longer", *(f"{each['longer_preferred'] / n:.4f}" if n else "" for each, n in shares))
    for side in ("chosen", "rejected"):
        row(f"mean {side} length ({report['unit']})", *(f"{each[f'mean_{side}_length']:.2f}" for each in both))
    return view


@as_command
def main(arguments: Sequence[str]) -> None:
    """The command for any preference set."""
    parser = argument_parser(
        "lm.bias",
        "A subset of a preference set, exact in the share of pairs whose longer completion is preferred. "
        "Pairs without a longer side are left out. Rows are written as they are.",
        "pairs.jsonl --rho 0.2 --out biased.jsonl",
        "pairs.jsonl --rho 0.2 --size 30000 --tokenizer Qwen/Qwen2.5-0.5B --out biased.jsonl",
    )
    add_data(parser, "data", metavar="DATA")
    parser.add_argument("--rho", type=float, required=True, help="share of the pairs that prefer the longer completion")
    parser.add_argument("--size", type=int, help="pairs; the largest feasible number by default")
    parser.add_argument(
        "--length-ratio",
        type=float,
        default=BiasConfig.length_ratio,
        help="a completion is longer if it is at least this many times the other's length (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument(
        "--tokenizer",
        type=place,
        metavar="NAME",
        help="hub name or folder; lengths are in characters without, in tokens with it",
    )
    parser.add_argument(
        "--out", type=path, required=True, metavar="FILE", help="file to write: .jsonl, .jsonl.gz or .parquet"
    )
    add_force(parser)
    options = parser.parse_args(arguments)
    check_seed(options.seed, "--seed")
    check_free("--out", options.out, force=options.force or options.out.resolve() == Path(options.data).resolve())
    config = BiasConfig(rho=options.rho, size=options.size, length_ratio=options.length_ratio)
    from rich.console import Console

    from lm.data.lengths import bias_file
    from lm.data.places import check
    from lm.data.rows import left_out
    from lm.models.loading import SCRATCH, load_tokenizer

    check(options.data)

    if options.tokenizer in SCRATCH:
        raise ValueError(f"--tokenizer must be a hub name or a folder, got {options.tokenizer!r}")
    tokenizer = load_tokenizer(options.tokenizer, (), False) if options.tokenizer else None
    report = bias_file(options.data, options.out, config, seed=options.seed, tokenizer=tokenizer, prompt=options.prompt)
    for line in (*left_out(report["left_out"], report.get("first", {})), *report.get("notes", ())):
        print(line)
    Console().print(table(report, f"{options.data} at rho {options.rho:g}, seed {options.seed}"))
    progress.say(f"written: {options.out}")


def is_for_any_set(arguments: Sequence[str]) -> bool:
    """Which of the two commands it is: only this one has a first argument without dashes, or an --out."""
    names_data = bool(arguments) and not arguments[0].startswith("-")
    return names_data or any(argument.split("=")[0] == "--out" for argument in arguments)


def work(run: Run) -> None:
    """Makes D_rho and the members' subsets."""
    from lm.stages.subsets import bias

    bias(run)


if __name__ == "__main__":
    if is_for_any_set(sys.argv[1:]):
        sys.exit(main())
    if {"-h", "--help"} & set(sys.argv[1:]):
        with contextlib.suppress(SystemExit):  # argparse's, after its help
            main(["--help"])
        print("\nWithout DATA, the subsets of a run:\n")

    sys.exit(command("lm.bias", work))
