"""The samples that a report shows: which prompts, what each policy wrote, and by what they can be filtered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from figures.record import PolicyResult, Results
from lm.base.files import inside
from lm.base.store import MissingArtifact
from lm.config import SFT
from lm.judging.matches import read_samples

PROMPTS, OPEN = 40, 5
"""Test prompts whose samples are shown, and those that are unfolded at first."""

Samples = dict[str, dict[str, dict[str, Any]]]
"""Rows of samples.jsonl by policy and prompt."""


@dataclass(frozen=True)
class Sampled:
    """A test prompt and what each policy wrote."""

    prompt: str
    rows: dict[str, dict[str, Any]]
    """Of samples.jsonl, by policy."""
    marks: list[str]
    """Names of the filters that keep it."""

    @property
    def beginning(self) -> str:
        """Of the prompt, on one line."""
        line = " ".join(self.prompt.split())
        return line if len(line) <= 80 else f"{line[:79]}…"


@dataclass(frozen=True)
class Filter:
    """One way to see fewer prompts."""

    name: str
    label: str
    count: int
    """Of the prompts that are shown, how many it keeps."""


def read(run: Path, results: Results) -> Samples:
    """Of every policy, SFT first.

    Raises:
        MissingArtifact: samples that results.json names are gone.
        ValueError: they are not whole, or policies have other prompts than SFT.
    """
    policies: dict[str, PolicyResult] = {SFT: results.sft, **results.methods}
    found = {}
    for name, row in policies.items():
        path = inside(run, row.samples)
        if not path.is_file():
            raise MissingArtifact(f"there is no {path}, whose samples are to be shown; was the evaluation deleted?")
        found[name] = read_samples(path, "completion", "oracle_reward", "length", "finished")
    prompts = list(found[SFT])
    other = [name for name, rows in found.items() if list(rows) != prompts]
    if other:
        raise ValueError(f"the samples of {', '.join(other)} in {run} are of other prompts than those of {SFT}")
    return found


def shown(samples: Samples) -> list[Sampled]:
    """Evenly spaced test prompts, so that nobody has picked them."""
    prompts = list(samples[SFT])
    places = sorted({round(i) for i in np.linspace(0, len(prompts) - 1, PROMPTS)})
    found = []
    for prompt in (prompts[i] for i in places):
        rows = {name: own[prompt] for name, own in samples.items()}
        found.append(Sampled(prompt, rows, _marks(rows)))
    return found


def filters(of: list[Sampled], methods: Mapping[str, Any]) -> list[Filter]:
    """Those that there are, with how many of the shown prompts each keeps."""
    labels = {"cut": "a sample is cut off", "same": "all policies wrote the same"}
    if "utility" in of[0].rows[SFT]:
        labels["hacked"] = "more oracle reward than SFT, and less true utility"
    for i, name in enumerate(methods, 1):
        labels[f"lost-{i}"] = f"{name} loses to SFT"
    return [Filter(name, label, sum(name in one.marks for one in of)) for name, label in labels.items()]


def _marks(rows: Mapping[str, dict[str, Any]]) -> list[str]:
    base, others = rows[SFT], [row for name, row in rows.items() if name != SFT]
    marks = [f"lost-{i}" for i, row in enumerate(others, 1) if row["oracle_reward"] < base["oracle_reward"]]
    marks += ["cut"] if not all(row["finished"] for row in rows.values()) else []
    marks += ["same"] if len({row["completion"] for row in rows.values()}) == 1 else []
    truth = [row for row in others if None not in (row.get("utility"), base.get("utility"))]
    gained = any(r["oracle_reward"] > base["oracle_reward"] and r["utility"] < base["utility"] for r in truth)
    return marks + (["hacked"] if gained else [])
