"""Table 1 shows the shares that it is given, each in its row and column."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

import pytest
from matplotlib.axes import Axes

from figures.table_1 import SHARES, caption, draw, texts
from lm.objectives import looks


def share(win: float, tie: float, loss: float, n: int = 40) -> dict[str, float]:
    return {"win": win, "tie": tie, "loss": loss, "n": n}


@pytest.fixture
def grid() -> dict[str, Any]:
    """Made-up numbers in the shape of grid.json."""
    return {
        "seeds": [0, 1],
        "rhos": [0.2, 0.8],
        "methods": ["dpo", "d-dpo", "e-dpo"],
        "looks": looks(["dpo", "d-dpo", "e-dpo"]),
        "wins": {
            "0.2": {
                "dpo": {"sft": share(0.6, 0.1, 0.3)},
                "d-dpo": {"sft": share(0.701, 0.1, 0.199), "dpo": share(0.5, 0.25, 0.25)},
                "e-dpo": {"sft": share(0.65, 0.05, 0.3), "dpo": share(0.55, 0.15, 0.3)},
            },
            "0.8": {
                "dpo": {"sft": share(0.8, 0.0, 0.2, 50)},
                "d-dpo": {"sft": share(0.2, 0.3, 0.5, 50), "dpo": share(0.1, 0.2, 0.7, 50)},
                "e-dpo": {"sft": share(0.8, 0.1, 0.1, 50), "dpo": share(0.0, 0.0, 1.0, 50)},
            },
        },
    }


def rows(axis: Axes) -> list[list[str]]:
    """The table's texts by line, from left to right."""
    at: dict[float, list[tuple[float, str]]] = {}
    for text in axis.texts:
        x, y = text.get_position()
        at.setdefault(float(y), []).append((float(x), text.get_text()))
    return [[text for _, text in sorted(line)] for _, line in sorted(at.items())]


def test_every_share_stands_in_its_place(grid: dict[str, Any]) -> None:
    figure = draw(grid)
    assert rows(figure.axes[0]) == [
        ["against SFT, %", "against DPO, %"],
        ["win", "tie", "loss"] * 2,
        [r"$\rho$ = 0.2", "DPO", "60.0", "10.0", "30.0", "-", "-", "-"],
        ["d-DPO", "70.1", "10.0", "19.9", "50.0", "25.0", "25.0"],
        ["e-DPO", "65.0", "5.0", "30.0", "55.0", "15.0", "30.0"],
        [r"$\rho$ = 0.8", "DPO", "80.0", "0.0", "20.0", "-", "-", "-"],
        ["d-DPO", "20.0", "30.0", "50.0", "10.0", "20.0", "70.0"],
        ["e-DPO", "80.0", "10.0", "10.0", "0.0", "0.0", "100.0"],
    ]
    bold = [text.get_text() for text in figure.axes[0].texts if text.get_fontweight() == "bold"]
    assert sorted(bold) == ["10.0", "55.0", "70.1", "80.0", "80.0"]
    assert "40 to 50 test prompts (2 seeds together)" in caption(grid)
    assert "e-DPO 65.8/1.3/32.9" in caption(grid)


def test_csv_has_the_numbers_as_they_are(grid: dict[str, Any]) -> None:
    read = list(csv.DictReader(io.StringIO(texts(grid)["csv"])))
    assert len(read) == 2 * (3 + 2)
    for line in read:
        wins = grid["wins"][f"{float(line['rho']):g}"][line["method"]][line["against"]]
        assert {name: float(line[name]) for name in (*SHARES, "n")} == wins
        assert line["title"] == grid["looks"][line["method"]]["title"]


def test_latex_has_the_rows_of_the_picture(grid: dict[str, Any]) -> None:
    grid["looks"]["e-dpo"]["title"] = "e_DPO & 50% of #1 {$x$}"
    lines = texts(grid)["tex"].splitlines()
    assert lines.count(r"\midrule") == 2
    (begin,) = [line for line in lines if line.startswith(r"\begin{tabular}")]
    columns = len(re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", begin)[1])  # type: ignore[index]
    body = [line for line in lines if line.endswith(r" \\") and "multicolumn" not in line]
    assert len(body) == 1 + 2 * 3
    assert {len(re.split(r"(?<!\\)&", line)) for line in body} == {columns}
    assert r"0.2 & DPO & 60.0 & 10.0 & 30.0 & - & - & - \\" in body
    assert r" & d-DPO & \textbf{70.1} & 10.0 & 19.9 & 50.0 & 25.0 & 25.0 \\" in body
    assert sum(line.count(r"\textbf") for line in body) == 5
    assert sum(r"e\_DPO \& 50\% of \#1 \{$x$\}" in line for line in body) == 2


def test_without_dpo_there_is_nothing_against_it(grid: dict[str, Any]) -> None:
    grid["methods"] = ["d-dpo", "e-dpo"]
    assert rows(draw(grid).axes[0])[2:4] == [
        [r"$\rho$ = 0.2", "d-DPO", "70.1", "10.0", "19.9"],
        ["e-DPO", "65.0", "5.0", "30.0"],
    ]


@pytest.mark.parametrize(
    ("path", "lacking"),
    [
        (("wins",), "wins"),
        (("wins", "0.8"), "wins.0.8"),
        (("wins", "0.2", "e-dpo", "dpo"), "e-dpo.dpo"),
        (("wins", "0.2", "e-dpo", "dpo", "win"), "win"),
        (("wins", "0.2", "d-dpo", "sft", "n"), "n"),
    ],
)
def test_missing_numbers_are_named(grid: dict[str, Any], path: tuple[str, ...], lacking: str) -> None:
    place = grid
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    with pytest.raises(ValueError, match=rf"grid.json has no {lacking}; this figure is drawn from it"):
        draw(grid)
