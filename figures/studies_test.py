"""The frontier and Figure B.1 on real text, from small made-up studies: what they show, and what they refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from figures import frontier, real_text
from figures.registry import redraw
from figures.seeds import interval
from figures.studies import Frontier, RealText, bound, read_frontier, read_real_text
from lm.objectives import looks

METHODS = ("dpo", "d-dpo", "dp-dpo", "e-dpo")
PROBED = ("chosen_logps", "rejected_logps", "chosen_logratio", "rejected_logratio", "accuracy")
PROBED += ("forward_kl_reference", "forward_kl_preferences")


def skeleton(presets: dict[str, Any], methods: tuple[str, ...]) -> dict[str, Any]:
    return {
        "version": 1,
        "confidence": 0.9,
        "looks": looks(methods),
        "provenance": {"seed": [0, 1], "commit": None},
        "presets": presets,
    }


def frontier_values(
    seeds: int = 3, methods: tuple[str, ...] = METHODS, presets: tuple[str, ...] = ("rho 0.2", "rho 0.8")
) -> dict[str, Any]:
    """Made-up numbers in the shape of frontier.json: a test's, never a result's."""
    rng = np.random.default_rng(0)

    def points(height: float) -> list[dict[str, Any]]:
        made = []
        for beta in (0.1, 0.3, 1.0, 3.0):
            for step in (100, 200, 300):
                kl = step / 100 / beta**0.7 * rng.uniform(0.8, 1.2)
                advantage = height * (math.sqrt(kl) - 0.08 * kl) + rng.normal(0, 0.08)
                made.append({"setting": {"beta": beta}, "step": step, "advantage": advantage, "kl": kl, "other": 1})
        return made

    def seed() -> dict[str, Any]:
        heights = zip(methods, (0.8, 0.9, 0.89, 0.6), strict=False)
        best = [{"n": n, "advantage": 0.9 * math.sqrt(bound(n)) + rng.normal(0, 0.02)} for n in (1, 2, 4, 8, 16, 32)]
        return {"methods": {name: points(height) for name, height in heights}, "best_of": best}

    made = {name: {"seeds": {str(number): seed() for number in range(seeds)}} for name in presets}
    return {**skeleton(made, methods), "judge": "exact judge", "n": 500}


def real_text_values(
    seeds: int = 2, methods: tuple[str, ...] = METHODS, presets: tuple[str, ...] = ("tldr-small", "helpfulness-small")
) -> dict[str, Any]:
    """Made-up numbers in the shape of real_text.json: a test's, never a result's."""
    rng = np.random.default_rng(0)

    def training(pull: float) -> dict[str, Any]:
        def at(step: int, gap: float) -> dict[str, Any]:
            fall = pull * 20 * math.log1p(step / 50) * rng.uniform(0.9, 1.1)
            return {"step": step, "chosen_logps": -90 - fall, "rejected_logps": -95 - (2 + gap) * fall}

        def probed(step: int) -> dict[str, Any]:
            line = at(step, 0)
            fall = -90 - line["chosen_logps"]
            more = {
                "chosen_logratio": -fall,
                "rejected_logratio": -2 * fall,
                "accuracy": 0.5 + 0.2 * math.tanh(fall / 20) + 0.02 * rng.random(),
            }
            return {**line, **more, "forward_kl_reference": 0.5 * fall, "forward_kl_preferences": 1.5 * fall}

        return {
            "setting": {"beta": 0.1},
            "training": [{**at(step, 1), "loss": 0.5} for step in range(20, 401, 20)],
            "probe": [probed(step) for step in range(0, 401, 50)],
            "final": {"advantage": 1.0},
        }

    def seed() -> dict[str, Any]:
        pulls = zip(methods, (1.0, 0.8, 0.8, 0.5), strict=False)
        return {"methods": {name: training(pull) for name, pull in pulls}}

    made = {name: {"seeds": {str(number): seed() for number in range(seeds)}} for name in presets}
    return skeleton(made, methods)


def read(kind: str, values: dict[str, Any], folder: Path) -> Any:
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(values))
    return (read_frontier if kind == "frontier" else read_real_text)(path)
