"""Table 1: wins, ties and losses of each method against pi_ref and against DPO; as a picture, as LaTeX and as CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.captions import latex
from figures.grid import DATA, methods_of, need, rhos_of, seeds_of
from figures.style import figure, points

RESULTS = "grid.json"
OPPONENTS = {"sft": "against SFT", "dpo": "against DPO"}
SHARES = ("win", "tie", "loss")
PAPER = {
    "sft": {"e-DPO": (65.8, 1.3, 32.9), "d-DPO": (65.6, 1.0, 33.3), "DPO": (64.2, 1.0, 34.8)},
    "dpo": {"e-DPO": (49.7, 3.4, 46.9), "d-DPO": (48.2, 3.6, 48.2)},
}
"""Percent win, tie, loss by an LLM judge on the Helpfulness data: Fisch et al. 2024, Table 1."""

_RHO, _METHOD, _BLOCKS, _STEP = 0.0, 0.12, {"sft": 0.42, "dpo": 0.75}, 0.1
"""Where columns of the picture stand, in shares of the width; numbers end there."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A method against an opponent at a rho."""

    shares: tuple[float, ...]
    """By SHARES."""
    n: int
    """Prompts of all seeds."""
    most: bool
    """No method wins more often against that opponent at that rho."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A rho and a method."""

    rho: float
    method: str
    title: str
    cells: dict[str, Cell | None]
    """By opponent; None of a method against itself."""


def rows_of(results: Any) -> list[Row]:
    """A row a rho and method, pooled over seeds. ValueError where a number is missing."""
    methods, rows = methods_of(results), []
    for rho in rhos_of(results):
        wins = need(results, "wins", f"{rho:g}")
        cells: dict[str, dict[str, Cell | None]] = {name: {} for name in methods}
        for other in [name for name in OPPONENTS if name in ("sft", *methods)]:
            found = {name: need(wins, name, other) for name in methods if name != other}
            most = max((need(row, "win") for row in found.values()), default=None)
            for name in methods:
                cells[name][other] = (
                    None
                    if name == other
                    else Cell(
                        shares=tuple(need(found[name], share) for share in SHARES),
                        n=need(found[name], "n"),
                        most=need(found[name], "win") == most,
                    )
                )
        rows += [Row(rho=rho, method=name, title=methods[name].title, cells=cells[name]) for name in methods]
    return rows


def draw(results: dict[str, Any]) -> Figure:
    """In percent; bold: most wins against that opponent at that rho."""
    rows = rows_of(results)
    height = len(rows) + 2
    shown = figure(0.165 * height + 0.1, tall=True)
    axis = shown.subplots()
    axis.set(xlim=(0, 1), ylim=(height, 0))
    axis.set_axis_off()
    _head(axis)
    for line, row in enumerate(rows, 2):
        if line == 2 or rows[line - 3].rho != row.rho:
            axis.axhline(line, color="black", linewidth=points(0.8 if line == 2 else 0.4))
            axis.text(_RHO, line + 0.5, rf"$\rho$ = {row.rho:g}", va="center")
        axis.text(_METHOD, line + 0.5, row.title, va="center")
        for other, cell in row.cells.items():
            for column, text in enumerate(_percent(cell)):
                weight = "bold" if cell is not None and cell.most and column == 0 else "normal"
                place = _BLOCKS[other] + column * _STEP
                axis.text(place, line + 0.5, text, va="center", ha="right", weight=weight)
    axis.axhline(height, color="black", linewidth=points(0.8))
    return shown


def texts(results: dict[str, Any]) -> dict[str, str]:
    """Further files by their suffix."""
    rows = rows_of(results)
    return {"tex": as_latex(rows), "csv": as_csv(rows)}


def as_latex(rows: list[Row]) -> str:
    r"""A tabular of booktabs, in percent, to be read by `\input` inside a table of one's own."""
    others = list(rows[0].cells)
    heads = [rf"\multicolumn{{{len(SHARES)}}}{{c}}{{{latex(OPPONENTS[other] + ', %')}}}" for other in others]
    firsts = [3 + len(SHARES) * place for place in range(len(others))]
    lines = [
        r"% needs \usepackage{booktabs}",
        rf"\begin{{tabular}}{{ll{'r' * len(SHARES) * len(others)}}}",
        r"\toprule",
        " & ".join(["", "", *heads]) + r" \\",
        " ".join(rf"\cmidrule(lr){{{first}-{first + len(SHARES) - 1}}}" for first in firsts),
        " & ".join([r"$\rho$", "method", *SHARES * len(others)]) + r" \\",
    ]
    for line, row in enumerate(rows):
        first = line == 0 or rows[line - 1].rho != row.rho
        lines += [r"\midrule"] if first else []
        values = []
        for cell in row.cells.values():
            texts = _percent(cell)
            values += [rf"\textbf{{{texts[0]}}}" if cell is not None and cell.most else texts[0], *texts[1:]]
        lines.append(" & ".join([f"{row.rho:g}" if first else "", latex(row.title), *values]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def as_csv(rows: list[Row]) -> str:
    """A line a rho, method and opponent, with the shares as the results have them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rho", "method", "title", "against", *SHARES, "n"])
    for row in rows:
        for other, cell in row.cells.items():
            if cell is not None:
                writer.writerow([row.rho, row.method, row.title, other, *cell.shares, cell.n])
    return text.getvalue()


def caption(results: dict[str, Any]) -> str:
    """What is shown."""
    prompts = sorted({cell.n for row in rows_of(results) for cell in row.cells.values() if cell is not None})
    counts = f"{prompts[0]}" if len(prompts) == 1 else f"{prompts[0]} to {prompts[-1]}"
    paper = "; ".join(
        f"{OPPONENTS[other]} " + ", ".join(f"{title} {'/'.join(map(str, row))}" for title, row in rows.items())
        for other, rows in PAPER.items()
    )
    return (
        f"{DATA}; judged by the oracle on {counts} test prompts ({seeds_of(results)} together), a tie is an equal "
        "reward; all policies draw with the same random numbers, so those that are alike tie often. Every method, DPO "
        "too, as validation chose it; bold: most wins. The paper's table is for Helpfulness data, far larger policies, "
        f"and an LLM as the judge; its win/tie/loss: {paper}."
    )


def _percent(cell: Cell | None) -> list[str]:
    return ["-"] * len(SHARES) if cell is None else [f"{100 * share:.1f}" for share in cell.shares]


def _head(axis: Axes) -> None:
    axis.axhline(0, color="black", linewidth=points(0.8))
    for other, start in _BLOCKS.items():
        axis.text(start + _STEP, 0.5, f"{OPPONENTS[other]}, %", va="center", ha="right")
        for column, share in enumerate(SHARES):
            axis.text(start + column * _STEP, 1.5, share, va="center", ha="right")
