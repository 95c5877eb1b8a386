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

from figures.record import Results
from figures.style import Look, series
from lm.base.store import MissingArtifact, policy_folder
from lm.objectives import METHODS


@dataclass(frozen=True)
class Curve:
    """One panel."""

    title: str
    picture: Markup


Line = tuple[str, dict[str, Any], Sequence[float], Sequence[float]]
"""Label, arguments of `plot`, steps, values."""
Losses = tuple[list[int], list[float]]
"""Steps, and training losses."""

_PROBED = {
    "chosen_logps": "Winners: log π, nats",
    "rejected_logps": "Losers: log π, nats",
    "forward_kl_reference": "KL(π_ref ‖ π) by samples of π_ref, nats",
    "forward_kl_preferences": "−log π/π_ref on the pairs, nats",
}
"""What a probe tells of every method, see `figures.record.Probe`."""


def losses_of(run: Path, policy: str) -> Losses:
    """Of the policy whose model results name. MissingArtifact where its artifact is gone."""
    path = policy_folder(run, policy) / "artifact.json"
    if not path.is_file():
        raise MissingArtifact(f"there is no {path}, whose training is to be shown; was the policy deleted?")
    history = json.loads(path.read_text(encoding="utf-8"))["metrics"]["history"]
    logged = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    return [step for step, _ in logged], [loss for _, loss in logged]


def curves(results: Results, losses: Mapping[str, Losses]) -> Iterator[Curve]:
    """Probes of all methods in one panel a quantity; then members and losses, which have a panel a method.

    ValueError where a method's look cannot be drawn.
    """
    looks = {name: Look(look) for name, look in results.looks.items() if name in results.methods}
    probed = {name: results.methods[name].probe for name in looks if results.methods[name].probe}
    if probed:
        for key, title in _PROBED.items():
            lines: list[Line] = [
                (looks[name].title, _small(looks[name].line), [p.step for p in probe], [getattr(p, key) for p in probe])
                for name, probe in probed.items()
            ]
            yield _panel(f"probe-{key}", title, lines)
    for name, probe in probed.items():
        entries = [(entry.step, entry.member_shares) for entry in probe if entry.member_shares is not None]
        if "members" not in METHODS[name].needs or not entries:  # of earlier versions' trainings others have them too
            continue
        shares = np.array([values for _, values in entries]).T
        members = results.members
        drawn = series("members", members[:7], "results.json")
        lines = [
            (member, _small(look), [step for step, _ in entries], share.tolist())
            for member, look, share in zip(members, cycle(drawn), shares, strict=False)
        ]
        yield _panel(f"members-{name}", f"{looks[name].title}: share of pairs a member fits best", lines)
    for name, (steps, values) in losses.items():
        line: Line = (looks[name].title, _small(looks[name].line), steps, values)
        yield _panel(f"loss-{name}", f"{looks[name].title}: training loss", [line], legend=False)


def _small(look: Mapping[str, Any]) -> dict[str, Any]:
    return {**look, "markersize": 3}


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
