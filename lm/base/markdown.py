"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: bool = True, padded: bool = True) -> str:
    """A table, of which a cell is text of one line whatever it holds.

    Args:
        header: of each column.
        rows: a cell a column.
        numbers: whether all columns but the first stand to the right, as numbers do.
        padded: whether cells are as wide as their column, to be read as text too.
    """
    lines = [[_cell(cell) for cell in line] for line in (header, *rows)]
    right = [numbers and i > 0 for i in range(len(header))]
    widths = [max(len(line[i]) for line in lines) if padded else 0 for i in range(len(header))]

    def text(line: list[str]) -> str:
        cells = zip(line, widths, right, strict=True)
        return f"| {' | '.join(cell.rjust(width) if to else cell.ljust(width) for cell, width, to in cells)} |"

    if padded:
        rule = "|".join("-" * (width + 1) + (":" if to else "-") for width, to in zip(widths, right, strict=True))
    else:
        rule = "|".join(" --: " if to else " --- " for to in right)
    return "\n".join([text(lines[0]), f"|{rule}|", *map(text, lines[1:])])


def _cell(value: object) -> str:
    return str(value).replace("|", r"\|").replace("\n", r"\n")
