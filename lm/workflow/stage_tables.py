"""What each stage of runs took, and how good reward models are that were trained in several ways, as tables: from
results.json of a run, or the records of a study's jobs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import reduce
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


def rewards(place: Path) -> str:
    """Of the records of `lm.workflow.job rewards` or `scores` at or below a place: each reward model on test pairs, by
    how it was trained, and what its training took. ValueError where there are none.

    Columns: what was trained (`reward.train`) and on which set; accuracy by which completion is preferred;
    Bradley-Terry loss, nats, and expected calibration error; CPU minutes of the training, and of the states of the
    frozen body that all heads of a record share.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in [place] if place.is_file() else sorted(place.rglob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("job") not in ("rewards", "scores"):
            continue
        for name, model in record["reward_models"].items():
            if "calibration" in model.get("test_accuracy", {}):
                own = {**model["test_accuracy"], "minutes": _minutes(record, "reward", name)}
                own["shared"] = _minutes(record, "features")
                found.setdefault((record["config"]["reward"]["train"], name), []).append(own)
    if not found:
        raise ValueError(f"no record of rewards at or below {place} has its reward models' calibration")

    def mean(models: list[dict[str, Any]], form: str, *keys: str) -> str:
        values: list[Any] = [reduce(lambda inner, key: inner[key], keys, model) for model in models]
        known = [value for value in values if value is not None]
        return format(sum(known) / len(known), form) if known else "–"

    rows = [
        [
            f"`{train}`",
            name,
            *(mean(models, ".3f", of, "accuracy") for of in ("all", "longer", "shorter")),
            *(mean(models, ".3f", "calibration", of) for of in ("loss", "calibration_error")),
            mean(models, ".2f", "minutes"),
            mean(models, ".1f", "shared") if train == "head" else "–",
        ]
        for (train, name), models in found.items()
    ]
    headings = ["trained", "on", "accuracy", "longer preferred", "shorter preferred", "loss", "calibration error"]
    return records.table([*headings, "CPU minutes", "shared by all"], rows, padded=False)


def _minutes(record: dict[str, Any], stage: str, name: str | None = None) -> float | None:
    """CPU minutes of a stage's artifacts, of this name alone where there is one; None where none was measured."""
    every = [one for one in told([record]) if one["stage"] == stage and name in (None, one["name"])]
    return sum(one["cpu_seconds"] for one in every) / 60 if every else None
