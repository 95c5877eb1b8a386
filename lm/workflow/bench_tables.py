"""What `lm.bench` measured: run by run as one table, for models that are measured one at a time, hours apart; and the
data side by stage and size of the set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from theory import records

RATIOS = ("trl_tuned", "generate_tuned", "unshared", "trl", "generate")
"""Of a row that has several, the first is told: that to the fairest peer."""
NAMES = {"trl": "TRL", "generate": "`generate`", "unshared": "unshared"}


def table(path: Path) -> str:
    """Of a JSON file whose "runs" are what `lm.bench --json` writes; ValueError where it has none."""
    runs = json.loads(path.read_text(encoding="utf-8")).get("runs")
    if not runs:
        raise ValueError(f'{path} has no "runs", each of which is what lm.bench --json writes')
    headings = [
        "model",
        "variant",
        "pairs a step",
        "rounds x steps",
        "pairs/s",
        "peak MB",
        "ratio",
        "of sustained",
        "commit",
    ]
    return records.table(headings, [_cells(run, row) for run in runs for row in run["rows"]], padded=False)


def scale(path: Path) -> str:
    """Of what `lm.bench --scale --json` wrote: a row for each stage and each of the three largest sizes, with what it
    took in multiples of what the size before took. ValueError for another file."""
    rows = json.loads(path.read_text(encoding="utf-8")).get("rows")
    if not rows or "stage" not in rows[0]:
        raise ValueError(f'{path} has no "rows" by stage, as lm.bench --scale --json writes')
    headings = [
        "stage",
        "pairs",
        "CPU s",
        "x the row above",
        "pairs a CPU second",
        "anonymous MB",
        "peak MB",
        "files, MB",
    ]
    shown = sorted({row["pairs"] for row in rows})[-3:]
    cells = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        before: dict[str, Any] | None = None
        for row in sorted((row for row in rows if row["stage"] == stage), key=lambda row: row["pairs"]):
            if row["pairs"] in shown:
                more = "–" if before is None else f"{row['cpu_seconds'] / before['cpu_seconds']:.1f}"
                numbers = (f"{row[key]:,.0f}" for key in ("pairs_per_cpu_s", "anonymous_mb", "peak_mb", "file_mb"))
                cells.append([stage, f"{row['pairs']:,}", f"{row['cpu_seconds']:,.1f}", more, *numbers])
                before = row
    return records.table(headings, cells, padded=False)


def _cells(run: dict[str, Any], row: dict[str, Any]) -> list[str]:
    name = next((name for name in RATIOS if row.get(f"ratio_{name}") is not None), None)
    sustained = row.get("of_sustained")
    return [
        row["config"],
        f"`{row['variant']}`",
        f"{run['pairs']}",
        f"{run['rounds']} x {run['steps']}",
        f"{row['pairs_per_s']:.2f}",
        "–" if row["peak_mb"] is None else f"{row['peak_mb']:,.0f}",
        "–" if name is None else _ratio(row, name),
        "–" if sustained is None else f"{sustained:.0%}",
        _commit(run["provenance"]["commit"]),
    ]


def _commit(commit: str) -> str:
    whole, _, dirty = commit.partition("-")
    return f"{whole[:7]} with changes" if dirty else whole[:7]


def _ratio(row: dict[str, Any], name: str) -> str:
    """With the smallest and the largest round, where there were several, and what it is to."""
    low, high = row.get("spread", {}).get(f"ratio_{name}") or (None, None)
    between = "" if low is None or low == high else f" [{low:.2f}, {high:.2f}]"
    to, _, tuned = name.partition("_")
    return f"{row[f'ratio_{name}']:.2f}{between} x {NAMES[to]}{' tuned' if tuned else ''}"
