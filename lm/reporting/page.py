"""report.html of a finished run: objectives, results, training, samples and data in one file."""

from __future__ import annotations

import shlex
import unicodedata
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from figures import methods as overview
from figures.record import PolicyResult, read
from figures.style import style
from lm.base.documents import flat
from lm.config import SFT
from lm.reporting import samples
from lm.reporting.cautions import cautions
from lm.reporting.curves import curves, losses_of, svg
from lm.reporting.formulas import objective
from lm.reporting.pictures import QUANTILES, SPREAD, distinct, frontier, quantiles, spreads
from lm.reporting.spent import duration, size, spent
from lm.reporting.use import loading, sampling
from theory.records import write_text


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
    policies: dict[str, PolicyResult] = {SFT: results.sft, **results.methods}
    objectives = {name: objective(name, row.setting) for name, row in results.methods.items()}
    written = samples.read(run, results)
    seen = samples.shown(written)
    example = sampling(
        min((one.prompt for one in seen), key=len),
        max(row["length"] for rows in written.values() for row in rows.values()),
    )
    with style():
        picture = svg(overview.draw(results), "overview", "advantage, length and KL of every method")
        panels = list(curves(results, {name: losses_of(run, row.policy) for name, row in results.methods.items()}))
        front, spread = frontier(results), spreads(results, written)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "p": p_value, "flat": flat, "shell": shlex.join}
    environment.filters |= {"duration": duration, "size": size}
    return environment.get_template("report.html.jinja").render(
        results=results,
        methods=results.methods,
        objectives=objectives,
        cautions=cautions(results),
        policies=policies,
        picture=picture,
        frontier=front,
        curves=panels,
        spreads=spread,
        spread={column: {name: quantiles(rows, column) for name, rows in written.items()} for column in SPREAD},
        columns=SPREAD,
        quantiles=QUANTILES,
        distinct={name: distinct(rows) for name, rows in written.items()},
        samples=seen,
        unfolded=samples.OPEN,
        filters=samples.filters(seen, results.methods),
        loading={name: f"{loading(row.policy)}\n{example}" for name, row in policies.items()},
        spent=spent(run),
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
