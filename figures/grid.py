"""What the figures of the grid share: looks, and the parts of `grid.json`, of which none may be missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from figures.style import Look, looks_of

RESULTS = "grid.json"
DATA = "Embedded world (synthetic, ours), small policies from random weights"


def need(results: Any, *path: Any) -> Any:
    """results[path[0]][path[1]]...; ValueError that names the path, and the cell, where something is missing."""
    value = results
    for depth, key in enumerate(path):
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            value = None
        if value is None:
            cell = _named({key: results[key] for key in ("seed", "rho", "method") if key in results})
            lacking = ".".join(str(part) for part in path[: depth + 1]) + (f" for {cell}" if cell else "")
            raise ValueError(f"{RESULTS} has no {lacking}; this figure is drawn from it, run the grid that fills it")
    return value


def rhos_of(results: Any) -> list[float]:
    """The grid's, ascending."""
    return sorted(need(results, "rhos"))


def methods_of(results: Any) -> dict[str, Look]:
    """The looks of the grid's methods, in the order of all figures; ValueError for one that has none."""
    return looks_of(results, need(results, "methods"), RESULTS)


def cells(results: Any, rho: float, method: str) -> list[dict[str, Any]]:
    """One cell a seed, in the order of the grid's seeds; ValueError where one is missing or there twice."""
    found = []
    for seed in need(results, "seeds"):
        wanted = {"seed": seed, "rho": rho, "method": method}
        matching = [c for c in need(results, "cells") if all(c.get(key) == value for key, value in wanted.items())]
        if len(matching) != 1:
            raise ValueError(f"{RESULTS} must have one cell for {_named(wanted)}, it has {len(matching)}")
        found.append(matching[0])
    return found


def probes(chosen: Sequence[dict[str, Any]], name: str) -> tuple[list[int], npt.NDArray[np.float64]]:
    """What was logged on the probe pairs over training: the steps that all seeds logged, [T], and values, [S, T, ...].

    Seeds choose their own settings and may stop at different steps; nothing is filled in where one has none.
    """
    paths = [{entry["step"]: entry for entry in need(cell, "probe")} for cell in chosen]
    steps = sorted(set.intersection(*(set(path) for path in paths)))
    if not steps:
        where = {key: chosen[0][key] for key in ("rho", "method")}
        raise ValueError(f"{RESULTS}: the seeds' probes share no step for {_named(where)}")
    return steps, np.array([[need(path[step], name) for step in steps] for path in paths], dtype=np.float64)


def band(axis: Any, x: Sequence[float], values: npt.NDArray[np.float64], look: Mapping[str, Any], **label: Any) -> None:
    """The mean over seeds, [S, T] -> [T], as a line, and their range as a band."""
    axis.plot(x, values.mean(0), **look, **label)
    axis.fill_between(x, values.min(0), values.max(0), color=look["color"], alpha=0.15, linewidth=0)


def seeds_of(results: Any) -> str:
    """For captions."""
    count = len(need(results, "seeds"))
    return f"{count} seed{'s' if count > 1 else ''}"


def prompts_of(found: Iterable[dict[str, Any]]) -> str:
    """Test prompts a seed, for captions."""
    counts = sorted({need(cell, "test", "n") for cell in found})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _named(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
