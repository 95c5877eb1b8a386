"""What each stage of runs took, as a table: from results.json of a run, or the records of a study's jobs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lm.objectives import MAIN
from theory import records

ALONE = ("pairs", MAIN)
"""Names of artifacts that have a row of their own: log-probs and samples of pi_ref, the reward model of D_rho."""


def told(documents: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every artifact that these runs or jobs asked for and measured (`lm.base.store.Store.costs`), once, in the order
    in which they were finished."""
    every = (one for document in documents for one in document.get("stages") or () if "cpu_seconds" in one)
    # Settings that are trained together end in one second; earlier records have no keys, but no two costs are alike.
    found = {one.get("artifact") or json.dumps(one, sort_keys=True): one for one in every}
    return sorted(found.values(), key=lambda one: (one["finished"], one["stage"], one["name"]))


def table(place: Path) -> str:
    """Of a JSON file, or of all below a folder: seconds, the share of CPU seconds, and the largest peak of resident
    memory of each stage. ValueError where none tells of stages."""
    rows: dict[str, list[dict[str, Any]]] = {}
    files = [place] if place.is_file() else sorted(place.rglob("*.json"))
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    for one in told(document for document in documents if isinstance(document, dict)):
        name = f"`{one['stage']}`{' ' + one['name'] if one['name'] in ALONE else ''}"
        rows.setdefault(name, []).append(one)
    if not rows:
        raise ValueError(f"no JSON file at or below {place} tells what stages took")
    every = [one for own in rows.values() for one in own]

    def cells(name: str, own: list[dict[str, Any]]) -> list[str]:
        cpu, wall = (sum(one[key] for one in own) for key in ("cpu_seconds", "wall_seconds"))
        share = cpu / (sum(one["cpu_seconds"] for one in every) or 1.0)
        peak = max(one["peak_bytes"] or 0 for one in own) / 1e6
        return [name, f"{len(own)}", f"{cpu:,.1f}", f"{share:.0%}", f"{wall:,.1f}", f"{peak:,.0f}"]

    headings = ["stage", "artifacts", "CPU s", "share", "wall s", "peak MB"]
    return records.table(headings, [*(cells(*row) for row in rows.items()), cells("all", every)], padded=False)
