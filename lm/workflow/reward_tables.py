"""How good reward models are that were trained in several ways, and what it took, as a table."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any

from lm.workflow.record import read
from lm.workflow.stage_tables import told
from lm.workflow.summary import check_options
from theory import records


def table(place: Path) -> str:
    """Of the records of `lm.workflow.job rewards` or `scores` at or below a place, which differ in seeds and in how
    reward models were trained alone: each model on test pairs, by `reward.train`, and what its training took.

    Columns: seeds; the set that it was trained on; accuracy by which completion is preferred; Bradley-Terry loss, nats,
    and expected calibration error; CPU seconds of the training, and of the states of the frozen body that all heads of
    a record share (where labels are the oracle's, those of the judge's heads too).

    Raises:
        ValueError: there are no such records that have a calibration, two are of one seed and training, or one was made
            with other options.
    """
    every = []
    for path in [place] if place.is_file() else sorted(place.rglob("*.json")):
        record = read(path)
        if record["job"] in ("rewards", "scores"):
            every.append(record)
    every = [one for one in every if all(_calibrated(model) for model in one["reward_models"].values())]
    if not every:
        raise ValueError(f"no record of rewards at or below {place} has its reward models' calibration")
    check_options([_but_for_training(record) for record in every])
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for record in every:
        train = record["config"]["reward"]["train"]
        for name, model in record["reward_models"].items():
            own = found.setdefault((train, name), {})
            if record["seed"] in own:
                raise ValueError(
                    f"there are two records of {name} of seed {record['seed']}, trained {train}, in {place}"
                )
            seconds = {"own": _seconds(record, "reward", name), "shared": _seconds(record, "features")}
            own[record["seed"]] = {**model["test_accuracy"], **seconds}

    def mean(models: Iterable[dict[str, Any]], form: str, *keys: str) -> str:
        values: list[Any] = [reduce(lambda inner, key: inner[key], keys, model) for model in models]
        known = [value for value in values if value is not None]
        return format(sum(known) / len(known), form) if known else "–"

    rows = [
        [
            f"`{train}`",
            f"{len(models)}",
            name,
            *(mean(models.values(), ".3f", of, "accuracy") for of in ("all", "longer", "shorter")),
            *(mean(models.values(), ".3f", "calibration", of) for of in ("loss", "calibration_error")),
            mean(models.values(), ",.1f", "own"),
            mean(models.values(), ",.1f", "shared") if train == "head" else "–",
        ]
        for (train, name), models in found.items()
    ]
    headings = ["trained", "seeds", "on", "accuracy", "longer preferred", "shorter preferred", "loss"]
    return records.table([*headings, "calibration error", "CPU s", "CPU s, shared"], rows, padded=False)


def _calibrated(model: dict[str, Any]) -> bool:
    return "calibration" in (model.get("test_accuracy") or {})


def _but_for_training(record: dict[str, Any]) -> dict[str, Any]:
    """Without the options that tell how reward models are trained."""
    options = {name: value for name, value in record["config"].items() if name not in ("reward", "lora")}
    return {**record, "job": "scores", "config": options}


def _seconds(record: dict[str, Any], stage: str, name: str | None = None) -> float | None:
    """CPU seconds of a stage's artifacts, of this name alone where there is one; None where none was measured."""
    every = [one for one in told([record]) if one["stage"] == stage and name in (None, one["name"])]
    return sum(one["cpu_seconds"] for one in every) if every else None
