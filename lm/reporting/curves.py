"""Training curves of a report, as SVG."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from lm.base.store import MissingArtifact, policy_folder
from lm.objectives import METHODS
from lm.reporting.page import Record

# ---------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curve:
    """One panel."""

    title: str
    picture: Markup


Line = tuple[str, dict[str, Any], Sequence[float], Sequence[float]]
"""Label, look, steps, values."""

_PROBED = {
    "chosen_logps": "Winners: log π, nats",
    "rejected_logps": "Losers: log π, nats",
    "forward_kl_reference": "KL(π_ref ‖ π) by samples of π_ref, nats",
    "forward_kl_preferences": "−log π/π_ref on the pairs, nats",
}
"""What a probe tells of every method, see `lm.trainer.PolicyTrainer.evaluate`."""


def _losses(run: Path, row: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """Steps and training losses of the policy that a row of results.json names."""
    path = policy_folder(run, row["policy"]) / "artifact.json"
    if not path.is_file():
        raise MissingArtifact(f"there is no {path}, whose training is to be shown; was the policy deleted?")
    history = json.loads(path.read_text(encoding="utf-8"))["metrics"]["history"]
    logged = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    return [step for step, _ in logged], [loss for _, loss in logged]


def _curves(results: Record, losses: Mapping[str, tuple[list[int], list[float]]]) -> Iterator[Curve]:
    """Probes of all methods in one panel a quantity; then members and losses, which have a panel a method."""
    from figures.grid import LOOKS, series

    probed = {name: row["probe"] for name, row in results["methods"].items() if row["probe"]}
    if probed:
        for key, title in _PROBED.items():
            lines = [
                (LOOKS[name].title, LOOKS[name].line | {"markersize": 3}, *_series(probe, key))
                for name, probe in probed.items()
            ]
            yield _panel(f"probe-{key}", title, lines)
    for name, probe in probed.items():
        if "members" in METHODS[name].needs:
            shares = np.array([entry["member_shares"] for entry in probe]).T
            members = list(results["reward_models"])[1 : 1 + len(shares)]  # the first is that of all pairs
            steps, looks = [entry["step"] for entry in probe], cycle(series("members", members[:7]))
            lines = [
                (member, look | {"markersize": 3}, steps, share.tolist())
                for member, look, share in zip(members, looks, shares, strict=False)
            ]
            yield _panel(f"members-{name}", f"{LOOKS[name].title}: share of pairs a member fits best", lines)
    for name, (steps, values) in losses.items():
        line = (LOOKS[name].title, LOOKS[name].line | {"markersize": 3}, steps, values)
        yield _panel(f"loss-{name}", f"{LOOKS[name].title}: training loss", [line], legend=False)


def _series(probe: Iterable[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    kept = [(entry["step"], entry[key]) for entry in probe]
    return [step for step, _ in kept], [value for _, value in kept]


def _panel(name: str, title: str, lines: Iterable[Line], *, legend: bool = True) -> Curve:
    figure = Figure(figsize=(3.5, 2.8 if legend else 2.1), layout="constrained")
    axis = figure.subplots()
    for label, look, steps, values in lines:
        axis.plot(steps, values, label=label, **look)
    axis.set_xlabel("step")
    if legend:
        figure.legend(loc="outside lower center", ncols=3, fontsize=7, handlelength=3)
    return Curve(title, svg(figure, name, title))


def svg(figure: Figure, name: str, label: str) -> Markup:
    """A figure to stand inside a page: transparent, black and white as the page has them, ids of its own."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):  # the same file every time
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = re.sub(
        r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL
    )
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace("#000000", "currentColor").replace("#ffffff", "var(--paper)")
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))
