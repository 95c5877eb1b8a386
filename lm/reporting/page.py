"""report.html of a finished run: objectives, results, training, samples and data in one file."""

from __future__ import annotations

import shlex
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from figures import methods as overview
from figures.record import PolicyResult, Results, read
from figures.style import style
from lm.base.files import inside
from lm.base.store import MissingArtifact
from lm.config import SFT
from lm.judging.matches import read_samples
from lm.reporting.curves import curves, losses_of, svg
from lm.reporting.formulas import objective
from theory.records import write_text

PROMPTS = 5
"""Test prompts whose samples are shown."""


def write_report(run: Path) -> Path:
    """Writes `report.html` into a finished run's folder, whole or not at all; see `page` for what it raises."""
    path = run / "report.html"
    write_text(path, page(run))
    return path


def page(run: Path) -> str:
    """The report of a finished run: HTML that reads no other file, from the network or elsewhere, and runs no script.

    A function of the folder: results.json, the policies' artifacts for the losses, the samples, and config.yaml.

    Raises:
        FileNotFoundError, ValueError: results.json is not there, or not as `figures.record.read` needs it.
        ValueError: a method or setting that this version has not, or samples that are not whole.
        MissingArtifact: a policy or samples that results.json names are gone.
    """
    results = read(run / "results.json")
    config = run / "config.yaml"
    objectives = {name: objective(name, row.setting) for name, row in results.methods.items()}
    with style():
        picture = svg(overview.draw(results), "overview", "advantage, length and KL of every method")
        panels = list(curves(results, {name: losses_of(run, row.policy) for name, row in results.methods.items()}))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "p": p_value, "flat": flat, "shell": shlex.join}
    return environment.get_template("report.html.jinja").render(
        results=results,
        methods=results.methods,
        objectives=objectives,
        picture=picture,
        curves=panels,
        samples=_samples(run, results),
        config=config.read_text(encoding="utf-8") if config.is_file() else None,
    )


# ---------------------------------------------------------------- text


def visible(value: Any) -> Any:
    """Text in which no character acts unseen: controls, bidirectional overrides and the like become <U+202E>.

    Line feeds and tabs stay, and the joiners that some scripts are written with. What is no text is returned as it is.
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    kept = "\n\t\u200c\u200d"
    return "".join(
        f"<U+{ord(c):04X}>" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in kept else c
        for c in value
    )


def number(value: float | None, shape: str = ",") -> Markup:
    """A rounded number, as `format` takes its shape, that carries the exact one; a dash for None."""
    if value is None:
        return Markup("–")
    return Markup('<data value="{}">{}</data>').format(repr(value), format(value, shape))


def p_value(value: float | None) -> Markup:
    """Likewise, to three digits; a dash where there is no variance to test by."""
    if value is None or value >= 0.001:
        return number(value, ".3f")
    return Markup('<data value="{}">&lt;.001</data>').format(repr(value))


def flat(options: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested options as dotted names and values."""
    rows: list[tuple[str, Any]] = []
    for name, value in options.items():
        rows += flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return rows


# ---------------------------------------------------------------- samples


@dataclass(frozen=True)
class Sampled:
    """A test prompt and what each policy wrote, rows of samples.jsonl by name."""

    prompt: str
    rows: dict[str, dict[str, Any]]


def _samples(run: Path, results: Results) -> list[Sampled]:
    """Evenly spaced test prompts, so that nobody has picked them."""
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
    rows = sorted({round(i) for i in np.linspace(0, len(prompts) - 1, PROMPTS)})
    return [Sampled(prompts[i], {name: own[prompts[i]] for name, own in found.items()}) for i in rows]
