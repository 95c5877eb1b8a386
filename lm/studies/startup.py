"""How long a command takes to begin: CPU seconds of its --help, next to those of importing NumPy and a YAML parser."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from theory.records import table
from theory.shell import require_libraries

YARDSTICK = ("-c", "import numpy, yaml")
COMMANDS = ("lm", "lm.train", "lm.report", "lm.card", "lm.judge", "lm.score", "lm.diagnose", "lm.exact", "lm.bench")
OTHERS = ("theory", "bandits.transitive", "figures")
ROOT = Path(__file__).parents[2]


def measure(rounds: int) -> list[dict[str, Any]]:
    """For each command its CPU seconds, user and system, and their ratio to the yardstick's; medians over rounds, in
    each of which all take their turn. The first round, which reads files that the next ones find in memory, is dropped.
    """
    require_libraries("numpy", "yaml", "jsonargparse")  # the yardstick's, and those that an lm command's --help takes
    turns: dict[str, list[float]] = {name: [] for name in (*COMMANDS, *OTHERS)}
    ratios: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        yardstick = _seconds(*YARDSTICK)
        for name in turns:
            seconds = _seconds("-m", name, "--help")
            if number:
                turns[name].append(seconds)
                ratios[name].append(seconds / yardstick)
    return [
        {"command": name, "cpu_seconds": statistics.median(own), "ratio": statistics.median(ratios[name])}
        for name, own in turns.items()
    ]


def _seconds(*arguments: str) -> float:
    before = os.times()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=ROOT)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def render(rows: list[dict[str, Any]]) -> str:
    """The table, as Markdown."""
    cells = [(row["command"], f"{row['cpu_seconds']:.2f}", f"{row['ratio']:.1f}") for row in rows]
    return table(("--help of", "CPU s", 'x "import numpy, yaml"'), cells)
