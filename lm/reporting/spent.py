"""What the stages of a run took: time and memory, as far as their artifacts say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Spent:
    """One artifact of the run's folder; None where it was not recorded."""

    stage: str
    name: str
    finished: str | None
    """ISO 8601."""
    training: float | None
    """Seconds in the training loop, probes among them; after the last resume only."""
    wall: float | None
    """Seconds of the whole stage, likewise."""
    cpu: float | None
    """Seconds on all cores."""
    memory: float | None
    """Peak resident bytes of a process."""
    cuda: float | None
    """Peak bytes of an accelerator."""
    resumed: bool
    """Whether an earlier process worked on it too, whose share is not in these numbers."""


def spent(run: Path) -> list[Spent]:
    """Of every finished artifact in the folder, those of earlier commands too, in the order in which they ended."""
    found = [_of(path) for path in run.glob("*/*/artifact.json")]
    return sorted(found, key=lambda one: (one.finished or "", one.stage, one.name))


def _of(path: Path) -> Spent:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    metrics, cost = record.get("metrics", {}), record.get("cost", {})
    history = metrics.get("history") or []
    runtimes = [line["train_runtime"] for line in history if "train_runtime" in line]
    name, _, _ = path.parent.name.rpartition("-")
    return Spent(
        stage=record.get("stage", path.parent.parent.name),
        name=record.get("name", name),
        finished=record.get("provenance", {}).get("date"),
        training=runtimes[-1] if runtimes else None,
        wall=cost.get("wall_seconds"),
        cpu=cost.get("cpu_seconds"),
        memory=cost.get("peak_bytes"),
        cuda=cost.get("cuda_peak_bytes"),
        resumed=bool(cost.get("resumed")),
    )


def duration(seconds: float | None) -> str:
    """In words; "not recorded" for None."""
    if seconds is None:
        return "not recorded"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(count: float | None) -> str:
    """Bytes in words; "not recorded" for None."""
    return "not recorded" if count is None else f"{count / 2**30:.2f} GiB"
