"""The tables of a run say what its record does, in 80 columns."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from figures.record import Results, of
from lm.objectives import METHODS, PAPERS, HullDPO
from lm.reporting.results import comparisons, table
from tests.recorded import recorded


def shown(view: Table) -> str:
    """In 80 columns."""
    console = Console(width=80, file=io.StringIO())
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("truth", [True, False])
def test_the_table_has_a_line_for_each_method_and_utility_only_where_it_is_known(truth: bool) -> None:
    values = recorded({"dpo": METHODS["dpo"](), "hull-dpo": HullDPO()})
    row: dict[str, Any] = {"length": 9.0, "kl": 0.5, "chosen_logratio": 1.0, "rejected_logratio": -1.0, "n": 20}
    row |= {"utility": 1.2} if truth else {}
    values["sft"] |= row
    for method in values["methods"].values():
        method |= {**row, "advantage": 0.1, "ci": [0.05, 0.15]}
    view = table(of(Results, {**values, "confidence": 0.9}))
    assert list(view.columns[0].cells) == ["sft", "dpo", "hull-dpo"]
    assert list(view.columns[1].cells) == ["", "+0.100", "+0.100"]
    text = shown(view)
    assert text.count("[+0.050, +0.150]") == 2, "nothing is cut off at 80 columns"
    assert "90%" in text
    assert ("utility" in text) == truth


def test_win_rates_and_p_values_fit_80_columns() -> None:
    values = recorded({name: METHODS[name]() for name in PAPERS})
    for pair, test in values["wald"].items():
        test["p"] = {"dpo - ipo": None, "e-dpo - drdo": 1e-9}.get(pair, 0.0312)
    for wins in values["wins"].values():
        wins["sft"] = {"win": 0.515, "tie": 0.25, "loss": 0.235, "n": 400}
    text = shown(comparisons(of(Results, values)))
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert lines["dpo"] == ["52", "25", "24"]
    assert lines["ipo"] == ["52", "25", "24", "-"]
    assert lines["drdo"] == ["52", "25", "24", *["0.031"] * 5, "<.001", "0.031"], "a test for each method before it"
