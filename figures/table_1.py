"""Table 1: wins, ties and losses of each method against pi_ref and against DPO."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.grid import DATA, methods_of, need, rhos_of, seeds_of
from figures.style import caption

RESULTS = "grid.json"
OPPONENTS = {"sft": "against SFT", "dpo": "against DPO"}
SHARES = ("win", "tie", "loss")
PAPER = {
    "sft": {"e-DPO": (65.8, 1.3, 32.9), "d-DPO": (65.6, 1.0, 33.3), "DPO": (64.2, 1.0, 34.8)},
    "dpo": {"e-DPO": (49.7, 3.4, 46.9), "d-DPO": (48.2, 3.6, 48.2)},
}
"""Percent win, tie, loss by an LLM judge on the Helpfulness data: Fisch et al. 2024, Table 1."""

_RHO, _METHOD, _BLOCKS, _STEP = 0.0, 0.12, {"sft": 0.42, "dpo": 0.75}, 0.1
"""Where columns stand, in shares of the width; numbers end there."""


def draw(results: dict[str, Any]) -> Figure:
    """A row a rho and method, in percent, pooled over seeds; bold: most wins against that opponent at that rho."""
    methods, rhos = methods_of(results), rhos_of(results)
    height = len(rhos) * len(methods) + 2
    figure = Figure(figsize=(6.2, 0.16 * height + 0.9))
    axis = figure.subplots()
    axis.set(xlim=(0, 1), ylim=(height, 0))
    axis.set_axis_off()
    _head(axis)
    prompts = set()
    for block, rho in enumerate(rhos):
        wins = need(results, "wins", f"{rho:g}")
        top = 2 + block * len(methods)
        axis.axhline(top, color="black", linewidth=0.8 if block == 0 else 0.4)
        axis.text(_RHO, top + 0.5, rf"$\rho$ = {rho:g}", va="center")
        for line, look in enumerate(methods.values()):
            axis.text(_METHOD, top + line + 0.5, look.title, va="center")
        for other in [name for name in OPPONENTS if name in ("sft", *methods)]:
            rows = {name: need(wins, name, other) for name in methods if name != other}
            most = max((need(row, "win") for row in rows.values()), default=None)
            prompts |= {need(row, "n") for row in rows.values()}
            for line, name in enumerate(methods):
                for column, share in enumerate(SHARES):
                    axis.text(
                        _BLOCKS[other] + column * _STEP,
                        top + line + 0.5,
                        f"{100 * need(rows, name, share):.1f}" if name in rows else "-",
                        va="center",
                        ha="right",
                        weight="bold" if share == "win" and name in rows and rows[name]["win"] == most else "normal",
                    )
    axis.axhline(height, color="black", linewidth=0.8)
    caption(figure, _caption(results, sorted(prompts)))
    return figure


def _head(axis: Axes) -> None:
    axis.axhline(0, color="black", linewidth=0.8)
    for other, start in _BLOCKS.items():
        axis.text(start + _STEP, 0.5, f"{OPPONENTS[other]}, %", va="center", ha="right")
        for column, share in enumerate(SHARES):
            axis.text(start + column * _STEP, 1.5, share, va="center", ha="right")


def _caption(results: dict[str, Any], prompts: list[int]) -> str:
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
