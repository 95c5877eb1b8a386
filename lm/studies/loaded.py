"""Whether a machine has anything else to do, which every measured speed suffers from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from lm.base import progress

STAT = Path("/proc/stat")
BUSY = 0.25
"""Processes that want to run, a core, from which on a machine counts as loaded."""
STOLEN = 0.05
"""Share of the time that the host gave to other guests, likewise."""


class Ticks(NamedTuple):
    """Of all cores since the machine started."""

    total: int
    steal: int


def ticks() -> Ticks | None:
    """None where the system does not tell."""
    try:
        fields = [int(field) for field in STAT.read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return None
    return Ticks(sum(fields[:8]), fields[7]) if len(fields) > 7 else None  # guests' time is in user's already


def stolen(before: Ticks | None, after: Ticks | None) -> float | None:
    """Share of the time between two looks that went to other guests of the host; None where that is not known."""
    if before is None or after is None or after.total <= before.total:
        return None
    return (after.steal - before.steal) / (after.total - before.total)


def queue() -> float | None:
    """Processes that ran or wanted to, mean of the last minute, a core; None where the system does not tell."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return None


def warn_of_queue() -> None:
    """Before a measurement: says so where others run."""
    waiting = queue()
    if waiting is not None and waiting >= BUSY:
        progress.say(
            f"warning: the machine is loaded: {waiting:.1f} processes a core wanted to run in the last minute; ratios "
            "suffer less than rates, and the spread beside them says how much"
        )


def warn_of_steal(share: float | None) -> None:
    """After it: says so where the host took much of the time."""
    if share is not None and share >= STOLEN:
        progress.say(f"warning: the host gave {share:.0%} of the time to others while this was measured")
