"""`python -m theory.fates`: which losses share the fate of DPO, a table whose cells are checked as it is written.

The cells come from `theory.propositions.loss_fates.table`, which runs a proof or a counterexample for each.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from theory.propositions.loss_fates import EVIDENCE, FATES, Cell, Evidence, subjects, table
from theory.records import table as markdown_table
from theory.records import write_text
from theory.shell import DONE, add_force, argument_parser, as_command, check_free_or_marked, output_file

START, END = "<!-- fates: python -m theory.fates --markdown docs/losses.md -->", "<!-- end of fates -->"
SOURCE = "../theory/propositions/loss_fates.py"
"""From the page that shows the table."""


@as_command
def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    parser = argument_parser("theory.fates", __doc__ or "", "", "--markdown docs/losses.md")
    parser.add_argument(
        "--markdown", type=output_file, metavar="FILE", help="write it between the markers of this file, or as it"
    )
    add_force(parser)
    options = parser.parse_args(arguments)
    file = options.markdown
    if file is not None:
        check_free_or_marked("--markdown", file, start=START, force=options.force)
    elif options.force:
        parser.error("--force goes with --markdown")
    shown = markdown(table())
    if file is None:
        print(shown, end="")
        return DONE
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    around = re.fullmatch(f"(.*{START}\n).*({END}.*)", before, flags=re.DOTALL)
    write_text(file, around[1] + shown + around[2] if around else shown)
    return DONE


def markdown(cells: Sequence[Cell]) -> str:
    """The table, each cell a link to what shows it; then a paragraph for each proof and counterexample."""
    sources = {subject.name: subject.source for subject in subjects()}
    rows = []
    for loss, source in sources.items():
        of_loss = [cell for cell in cells if cell.loss == loss]
        shown = [f"[{cell.answer}](#{cell.evidence.name})" + f" {cell.found}".rstrip() for cell in of_loss]
        rows.append([f"**{loss}**, {source}", *shown])
    lines = [markdown_table(["loss", *FATES.values()], rows, numbers=False, padded=False)]
    for fate, question in FATES.items():
        lines += ["", f"### {question[0].upper()}{question[1:]}"]
        for shown_by in EVIDENCE:
            of = [cell.loss for cell in cells if cell.evidence == shown_by]
            if shown_by.fate == fate and of:
                lines += paragraph(shown_by, of)
    return "\n".join(lines) + "\n"


def paragraph(shown_by: Evidence, of: Sequence[str]) -> list[str]:
    """What a check shows, of which losses, and where it is."""
    name = shown_by.check.__name__
    where = f"`{name}` in [theory/propositions/loss_fates.py]({SOURCE})"
    return ["", f"#### {shown_by.name}", "", f"*{shown_by.kind}* for {', '.join(of)}: {where}", "", shown_by.words]


if __name__ == "__main__":
    sys.exit(main())
