"""report.html of a finished run: objectives, results, training, samples and data in one file."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from lm.base.files import inside, read_jsonl, write_text
from lm.base.store import MissingArtifact
from lm.objectives import METHODS
from lm.reporting.curves import _curves, _losses, svg
from lm.reporting.formulas import objective

Record = dict[str, Any]
PROMPTS = 5
"""Test prompts whose samples are shown."""

_RUN = ("methods", "sft", "wald", "wins", "reward_models", "oracle", "labels", "bias", "data", "rho", "confidence")
_POLICY = ("n", "oracle_reward", "length", "kl", "chosen_logratio", "rejected_logratio", "accuracy", "samples")
_METHOD = (*_POLICY, "advantage", "ci", "policy", "setting", "step", "validation", "probe")


def write_report(run: Path) -> Path:
    """Writes `report.html` into a finished run's folder, whole or not at all; see `page` for what it raises."""
    path = run / "report.html"
    write_text(path, page(run))
    return path


def page(run: Path) -> str:
    """The report of a finished run: HTML that reads no other file, from the network or elsewhere, and runs no script.

    A function of the folder: results.json, the policies' artifacts for the losses, the samples, and config.yaml.

    Raises:
        FileNotFoundError: the folder has no results.json.
        ValueError: results.json is not JSON, or lacks what is shown; it names what.
        MissingArtifact: a policy or samples that results.json names are gone.
    """
    results = _results(run)
    methods = results["methods"]
    config = run / "config.yaml"
    from figures import methods as overview
    from figures.style import style

    with style():
        picture = svg(overview.draw(results), "overview", "advantage, length and KL of every method")
        curves = list(_curves(results, {name: _losses(run, row) for name, row in methods.items()}))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "p": p_value, "flat": flat}
    try:
        return environment.get_template("report.html.jinja").render(
            results=results,
            methods=methods,
            objectives={name: objective(name, row["setting"], results) for name, row in methods.items()},
            picture=picture,
            curves=curves,
            samples=_samples(run, results),
            config=config.read_text(encoding="utf-8") if config.is_file() else None,
        )
    except jinja2.UndefinedError as error:
        raise ValueError(f"{run / 'results.json'} is of an earlier version or not whole: {error}") from None


def _results(run: Path) -> Record:
    path = run / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; finish the run with `python -m lm.train`")
    try:
        results: Record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    lacking = [name for name in (*_RUN, "provenance") if name not in results]
    lacking += [f"sft.{name}" for name in _POLICY if name not in results.get("sft", _POLICY)]
    for method, row in results.get("methods", {}).items():
        lacking += [f"methods.{method}.{name}" for name in _METHOD if name not in row]
    if lacking:
        more = f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""
        raise ValueError(
            f"{path} lacks {', '.join(lacking[:4])}{more}: it is of an earlier version or not whole; write it anew "
            f"with `python -m lm.evaluate --config {run / 'config.yaml'}`"
        )
    unknown = [name for name in results["methods"] if name not in METHODS]
    if unknown:
        raise ValueError(f"{path}: methods must be among {', '.join(METHODS)}; it has {', '.join(unknown)}")
    return results


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
    return Markup('<data value="{}">{}</data>').format(
        repr(value), format(+value, shape)
    )  # + fails where it is undefined


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
    rows: dict[str, Record]


def _samples(run: Path, results: Record) -> list[Sampled]:
    """Evenly spaced test prompts, so that nobody has picked them."""
    read = {}
    for name, row in {"sft": results["sft"], **results["methods"]}.items():
        path = inside(run, row["samples"])
        if not path.is_file():
            raise MissingArtifact(f"there is no {path}, whose samples are to be shown; was the evaluation deleted?")
        read[name] = [sample for _, sample in read_jsonl(path)]
    prompts = [sample["prompt"] for sample in read["sft"]]
    other = [name for name, rows in read.items() if [sample["prompt"] for sample in rows] != prompts]
    if other:
        raise ValueError(f"the samples of {', '.join(other)} in {run} are of other prompts than those of sft")
    rows = sorted({round(i) for i in np.linspace(0, len(prompts) - 1, PROMPTS)})
    return [Sampled(prompts[i], {name: samples[i] for name, samples in read.items()}) for i in rows]
