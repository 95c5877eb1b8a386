"""Writes report.html of a finished run: objectives, results, training, samples and data in one file."""

from __future__ import annotations

import io
import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import cycle
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
import sympy
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from sympy.printing.mathml import mathml

from lm.artifacts import MissingArtifact, policy_folder
from lm.cli import argument_parser, as_command
from lm.io import inside, read_jsonl, write_text
from lm.objectives import DRDO, IPO, METHODS, EnsembleDPO, HullDPO, Method, PairBatch, Pessimism

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


# ---------------------------------------------------------------- objectives


@dataclass(frozen=True)
class Objective:
    """What a policy was trained on."""

    title: str
    says: str
    """First sentences of the method's own docstring, with the source."""
    formula: Markup
    where: list[str]
    """What the formula's letters stand for."""


@dataclass(frozen=True, kw_only=True)
class _Symbols(PairBatch):
    """A pair whose quantities are symbols."""

    margin: Any

    @property
    def logratio_margin(self) -> Any:
        return self.margin


def objective(name: str, setting: Mapping[str, Any], results: Mapping[str, Any]) -> Objective:
    """The objective of a method in a setting of results.json; ValueError where it is none of the method's."""
    options = {key: Pessimism(**value) if key == "kl" else value for key, value in setting.items()}
    try:
        method = METHODS[name](**options)
    except TypeError:
        raise ValueError(f"methods.{name}.setting does not fit this version's {name}: {dict(setting)}") from None
    says = " ".join((type(method).__doc__ or "").split("Args:")[0].split())
    from figures.grid import LOOKS

    return Objective(LOOKS[name].title, says, formula(method), list(_where(method, "drdo" in results["reward_models"])))


def formula(method: Method) -> Markup:
    """One pair's loss as MathML: not written down here, but what the method returns when called on symbols."""
    options: dict[str, Any] = {field.name: getattr(method, field.name) for field in fields(method)}
    for name in ("alpha", "beta", "gamma", "tau"):
        if options.get(name) is not None:
            options[name] = sympy.Symbol(name, positive=True)
    if "kl" in options:
        alpha: Any = sympy.Symbol("alpha", positive=True)
        options["kl"] = Pessimism(alpha_start=alpha, alpha_end=alpha)
    if isinstance(method, IPO):
        options["length_normalised"] = False  # _where says what Delta is

    def one(value: Any) -> Any:
        return np.array([value], dtype=object)

    # An ensemble of one stands for the member, or the mixture, that the mini-batch chooses.
    member = sympy.Symbol("δ̄" if isinstance(method, HullDPO) else "delta_k", real=True)
    pair = _Symbols(
        policy_chosen_logps=one(sympy.log(sympy.Symbol("pi_w", positive=True))),
        policy_rejected_logps=one(sympy.log(sympy.Symbol("pi_l", positive=True))),
        ref_chosen_logps=one(sympy.nan),
        ref_rejected_logps=one(sympy.nan),
        chosen_lengths=one(sympy.nan),
        rejected_lengths=one(sympy.nan),
        reward_margin=one(sympy.Symbol("delta", real=True)),
        member_margins=one(member)[None],
        sample_logratios=one(-sympy.Function("KL", real=True)(sympy.Symbol("y"))),
        estimated_reward_margin=one(sympy.Symbol("δ̂", real=True)),
        margin=one(sympy.Symbol("Delta", real=True)),
    )
    (loss,) = type(method)(**options)(pair)
    presented = mathml(loss.rewrite(sympy.Pow), printer="presentation")
    # As papers set them; SymPy writes names of functions small.
    for ours, theirs in (("<mi>e</mi>", "<mi>&ExponentialE;</mi>"), ("<mo>−</mo>", "<mo>-</mo>"), (">KL<", ">kl<")):
        presented = presented.replace(theirs, ours)
    return Markup(f'<math display="block"><mi>ℓ</mi><mo>=</mo>{presented}</math>')


def _where(method: Method, own_oracle: bool) -> Iterator[str]:
    if isinstance(method, IPO) and method.length_normalised:
        yield "Δ = u_w / |y_w| − u_l / |y_l| with u_y = log π(y) − log π_ref(y), nats a token: not the paper's."
    elif not method.needs_reward_head:
        yield "Δ = u_w − u_l with u_y = log π(y) − log π_ref(y), nats, summed over tokens."
    yield "w: the preferred completion; l: the other."
    if "rewards" in method.needs:
        whose = (
            "DRDO's own oracle" if own_oracle and isinstance(method, DRDO) else "the reward model of the training pairs"
        )
        yield f"δ: difference of the rewards of w and l by {whose}."
    if isinstance(method, HullDPO):
        yield "δ̄: that of the mixture of the ensemble that has the least mean square over the mini-batch."
    elif isinstance(method, EnsembleDPO):
        yield "δ_k: that of the ensemble member k that has the least mean square over the mini-batch."
    if isinstance(method, DRDO):
        yield "π_w, π_l: probabilities of the completions; (1 + π_w / π_l)^−γ = (1 − p_w)^γ is the focal weight."
        if method.needs_reward_head:
            yield "δ̂: difference of the policy's own reward estimates, by a linear head."
    kl = getattr(method, "kl", None)
    if isinstance(kl, Pessimism):
        if kl.samples == "reference":
            yield "KL(y): −u_y of a completion y that π_ref sampled; its mean is KL(π_ref ‖ π)."
        else:
            yield "KL(y): −(u_w + u_l) / 2, over the pair's own completions."
        if kl.alpha_start == kl.alpha_end:
            yield f"α = {kl.alpha_end:g} throughout."
        else:
            yield f"α: from {kl.alpha_start:g} at the first step, linearly, to {kl.alpha_end:g} at the last."


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


# ---------------------------------------------------------------- the command


@as_command
def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argument_parser("lm.report", __doc__, "runs/demo")
    parser.add_argument("run", metavar="RUN", type=Path, help="output_dir of a finished run")
    print(write_report(parser.parse_args(arguments).run))


if __name__ == "__main__":
    sys.exit(main())
