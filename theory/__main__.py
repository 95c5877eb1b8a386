"""`python -m theory`: runs every check of every statement and prints the ledger of what holds."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from theory.claim import Claim, Row, all_claims, run
from theory.shell import DONE, FAILED, argument_parser, as_command, output_file, whole_number
from theory.testing import EXAMPLES, load_profile

FIELDS = ("id", "source", "assumptions", "symbolic", "enumerated", "examples", "verdict", "counterexample", "seconds")
START, END = "<!-- ledger: python -m theory --markdown theory/README.md -->", "<!-- end of ledger -->"


@as_command
def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status, 1 if a check failed."""
    parser = argument_parser(
        "theory",
        "Runs every check of every statement and prints the ledger of what holds. A check that fails is a failure.",
        "",
        "--only thm2 --only thm2-hull --examples 1000",
        "--thorough --json ledger.json",
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="a statement's id; repeatable")
    parser.add_argument(
        "--thorough", action="store_true", help=f"larger enumerations, {EXAMPLES['thorough']:,} examples a property"
    )
    parser.add_argument(
        "--examples", type=whole_number, metavar="N", help="examples a property, instead of the profile's"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the ledger as a JSON list")
    parser.add_argument(
        "--markdown",
        type=output_file,
        metavar="FILE",
        help="write it as Markdown; in a file with ledger markers, only between them",
    )
    options = parser.parse_args(arguments)
    if options.only and options.markdown and START in _text(options.markdown):
        raise ValueError(f"--only would leave statements out of the ledger in {options.markdown}: write another file")

    load_profile("thorough" if options.thorough else "default", examples=options.examples)  # before any property exists
    claims = {claim.id: claim for claim in sorted(all_claims(), key=paper_order)}
    for name in options.only or []:
        if name not in claims:
            raise ValueError(f"--only {name}: no such statement; there are {', '.join(claims)}")
    claims = {name: claim for name, claim in claims.items() if not options.only or name in options.only}

    rows: list[Row] = []
    progress = Console(stderr=True)
    for name, claim in claims.items():
        with progress.status(f"{name} ({len(rows) + 1} of {len(claims)})"):
            rows.append(run(claim, thorough=options.thorough))
    Console(width=None if sys.stdout.isatty() else 200).print(table(rows))
    for row in rows:
        for error in row.errors:
            progress.print(f"{row.id}: {error}", markup=False, style="red")
    if options.json:
        write(options.json, json.dumps([as_json(row) for row in rows], indent=1, ensure_ascii=False) + "\n")
    if options.markdown:
        ledger = markdown(list(claims.values()), rows)
        around = re.fullmatch(f"(.*{START}\n).*({END}.*)", _text(options.markdown), flags=re.DOTALL)
        write(options.markdown, around[1] + ledger + around[2] if around else ledger)
    return FAILED if any(row.errors for row in rows) else DONE


def paper_order(claim: Claim) -> tuple[bool, int, str]:
    """[F] by section of its appendix, each sharpening after its statement; then what neither paper has; then [N]."""
    place = re.search(r"\[([FN])\](?: A\.(\d+))?", claim.source)
    return (False, 99, claim.id) if place is None else (place[1] == "N", int(place[2] or 0), claim.id)


# ---------------------------------------------------------------- the ledger in three forms


def table(rows: Sequence[Row]) -> Table:
    """For the terminal."""
    columns = ("statement", "source", "assumptions", "symbolic", "enumerated", "examples", "verdict", "seconds")
    shown = Table(*columns, show_lines=True)
    for row in rows:
        verdict = f"[bold red]{len(row.errors)} checks failed[/]" if row.verdict is None else row.verdict
        if row.counterexample:
            verdict += f": {row.counterexample}"
        shown.add_row(
            row.id,
            row.source.replace("[", r"\["),
            ", ".join(row.assumptions),
            "yes" if row.symbolic else "no",
            row.enumerated or "",
            f"{row.examples:,}",
            verdict,
            f"{row.seconds:.1f}",
        )
    return shown


def as_json(row: Row) -> dict[str, Any]:
    """A row of the JSON list. `verdict` is null where a check failed."""
    return {field: getattr(row, field) for field in FIELDS}


def markdown(claims: Sequence[Claim], rows: Sequence[Row]) -> str:
    """A table of verdicts, then each statement with its formula and assumptions."""
    lines = [
        "| statement | source | symbolic | enumerated | examples | verdict | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        verdict = row.verdict or "**a check failed**"
        cells = [
            f"[{row.id}](#{row.id})",
            row.source,
            "yes" if row.symbolic else "no",
            row.enumerated or "",
            f"{row.examples:,}",
            f"{verdict}: {row.counterexample}" if row.counterexample else verdict,
            f"{row.seconds:.1f}",
        ]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    for claim in claims:
        assumptions = "; ".join(f"*{name}*: {meaning}" for name, meaning in claim.assumptions.items())
        lines += ["", f"#### {claim.id}", "", claim.statement, "", f"$${claim.formula}$$", "", f"Needs {assumptions}."]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- files


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as f:
        try:
            f.write(text)
            f.flush()
            os.chmod(f.name, 0o644)  # temporary files are private
            os.replace(f.name, path)
        except BaseException:
            os.unlink(f.name)
            raise


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
