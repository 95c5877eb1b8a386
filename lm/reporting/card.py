"""Writes the model card of a trained policy from its run's folder: method, data, reward models, training, results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData

from figures.record import MethodResult, PolicyResult, Results, read
from lm.base.documents import flat
from lm.base.store import MissingArtifact, policy_folder, verify
from lm.config import TrainingConfig
from lm.models.gguf import quantised
from lm.objectives import MAIN, Method
from lm.reporting.settings import method_of
from lm.reporting.use import loading
from theory import records

Record = dict[str, Any]
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
DIGEST = re.compile(r"[0-9a-f]{64}")
table = partial(records.table, numbers=False, padded=False)
PAPERS = {"F": ("Fisch et al. 2024", "2405.19316"), "N": ("Nath et al. 2024", "2410.08458")}


class Teacher(NamedTuple):
    """A reward model that a policy distils."""

    name: str
    trained_on: str
    """The set of pairs, as the bias artifact has it."""
    record: Record


@dataclass(frozen=True)
class Made:
    """A policy and what it was made from, as the artifacts record it."""

    policy: Record
    scores: Record
    bias: Record
    labels: Record
    data: Record
    teachers: list[Teacher]
    """The reward models that it distils; none where the rewards came with the data, or from the oracle."""
    unlabelled: Record | None
    """The scores of the pairs without labels that it learnt from; None where there were none."""


def card(run: Path, method: str, name: str = "FOLDER_OR_NAME") -> str:
    """The card of one policy of a finished run, as Markdown with the hub's metadata.

    A function of the folder alone: results.json names the policy, whose artifact leads to all others by their keys. It
    can leave this machine: of local files and folders it says what they are called, and not where they are.

    Args:
        run: the finished run's folder.
        method: whose policy.
        name: what it is loaded by.

    Raises:
        FileNotFoundError, ValueError: results.json is not there, or not as `figures.record.read` needs it.
        ValueError: the run has no such method.
        MissingArtifact, CorruptArtifact: an artifact that the policy was made from is gone, or the policy has changed.
    """
    results, row = _results_of(run, method)
    distilling = method_of(method, row.setting)
    made = trace(run, verify(policy_folder(run, row.policy)), distilling)
    data, local = _without_folders(made.data["inputs"])
    where = data["path"] or {"world": "the embedded world"}.get(data["kind"], data["kind"])
    base = made.policy["inputs"]["base"]
    head = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["reward-distillation", "preference-optimisation", method],
        base_model=_hub(base),
        datasets=None if "path" in local else _hub(data["path"]),
    )
    return "\n\n".join(
        [
            f"---\n{head.to_yaml()}\n---",
            f"# {method} on {where}",
            *_method(distilling, made.policy),
            *_data(made, data, local),
            *_reward_models(distilling, made),
            "## Training",
            table(
                ("option", "value"),
                [
                    ("base model", f"a local one, {base[:12]} by content" if DIGEST.fullmatch(base) else base),
                    *_quantised(policy_folder(run, row.policy)),
                    ("step", row.step),
                    *_set(made.policy, "training"),
                    *flat(made.policy["inputs"].get("lora", {}), "lora."),
                ],
            ),
            *_results(method, results),
            *_use(made, name),
            *_provenance(made.policy["provenance"]),
        ]
    )


def chosen(run: Path, method: str) -> Path:
    """The folder of a method's policy in a finished run: its artifact's, or that of a snapshot in it. Raises as
    `card` where the run is not finished."""
    model = Path(_results_of(run, method)[1].policy)
    artifact = policy_folder(run, str(model))
    return artifact if model.name == artifact.name else artifact / model.name


def _results_of(run: Path, method: str) -> tuple[Results, MethodResult]:
    path = run / "results.json"
    results = read(path)
    if method not in results.methods:
        raise ValueError(f"method must be one of {', '.join(results.methods)}, as {path} has them; got {method!r}")
    return results, results.methods[method]


def trace(run: Path, policy: Record, method: Method) -> Made:
    """Everything that a policy was made from, found by key: the scores name the reward models of all methods, of which
    those are looked for that this one distils."""

    def of(record: Record, name: str) -> Record:
        return _record(run, record["inputs"][name]["artifact"], name)

    scores = of(policy, "scores")
    bias = of(scores, "bias")
    labels = of(bias, "labels")
    names, keys = scores["metrics"]["reward_models"], [model["artifact"] for model in scores["inputs"]["rewards"]]
    one, ensemble = method.teacher, "members" in method.needs
    teachers = [
        Teacher(name, name, _record(run, key, f"reward model {name}"))
        for name, key in zip(names, keys, strict=False)  # no keys where none is trained
        if name == one or (ensemble and name != MAIN)
    ]
    if method.own_oracle is not None:
        teachers.append(Teacher("its own oracle", MAIN, of(of(policy, "oracle"), "oracle")))
    unlabelled = of(policy, "unlabelled") if "unlabelled" in policy["inputs"] else None
    return Made(policy, scores, bias, labels, of(labels, "data"), teachers, unlabelled)


def _record(run: Path, key: str, what: str) -> Record:
    found = sorted(run.glob(f"*/*-{key}/artifact.json"))
    if not found:
        raise MissingArtifact(f"{run} has no artifact {key} ({what}), which the policy was made from; it was deleted")
    record: Record = json.loads(found[0].read_text(encoding="utf-8"))
    return record


# ---------------------------------------------------------------- sections


def _method(method: Method, policy: Record) -> Iterable[str]:
    says, options, kl, term = method.says(), policy["inputs"]["method"], method.pessimism, method.pessimism_option
    cited = [
        f"[{key}]: {name}, [arXiv {number}](https://arxiv.org/abs/{number})"
        for key, (name, number) in PAPERS.items()
        if f"[{key}]" in says
    ]
    yield f"## Method\n\n{says}"
    rows = flat(options)
    if kl is not None and kl.target is not None:  # there is no schedule of alpha
        last = next(line["alpha"] for line in reversed(policy["metrics"]["history"]) if "alpha" in line)
        scheduled = {f"{term}.alpha_start", f"{term}.alpha_end"}
        rows = [row for row in rows if row[0] not in scheduled]
        rows.append((f"{term}.alpha", f"by dual ascent; {last:.4g} at the last logged step"))
    yield table(("hyper-parameter", "value"), rows)
    yield from cited


def _without_folders(inputs: Mapping[str, Any]) -> tuple[Record, dict[str, str]]:
    """The data's options with local paths cut to their last name, and by option the digest of what is there.

    Local is what the artifact has a digest of; a name on the hub stands for itself there.
    """
    data = inputs["data"]
    contents = zip(("path", "sft_path"), inputs["content"], strict=True)
    local = {option: content for option, content in contents if content != data[option]}
    return {**data, **{option: Path(data[option]).name.strip(".") or "a folder" for option in local}}, local


def _data(made: Made, data: Record, local: Mapping[str, str]) -> Iterable[str]:
    bias, own = made.bias["inputs"]["bias"], made.bias["metrics"][MAIN]
    rho = "no share was imposed" if bias["rho"] is None else f"a share of {bias['rho']:g} was imposed (rho)"
    scored, agreement = made.scores["metrics"], made.labels["metrics"].get("agreement")
    labels = (
        "They have the labels that they came with."
        if agreement is None
        else f"The judge relabelled every pair, agreeing with {agreement:.1%} of the labels given."
    )
    yield "## Data"
    yield (
        f"{scored['pairs']:,} preference pairs on {scored['prompts']:,} prompts. {labels} The longer completion (by "
        f"{bias['length_ratio']:g}x) is preferred in {own['longer_preferred']:,} pairs, the shorter in "
        f"{own['shorter_preferred']:,}: {rho}.{_sampled(made)}"
    )
    yield table(("option", "value"), [row for row in flat(data) if row[1] is not None])
    if local:
        contents = ", ".join(f"{option} {content[:12]}" for option, content in local.items())
        yield f"Local files are named without their folders; SHA-256 of their contents begins: {contents}."


def _sampled(made: Made) -> str:
    """Of pairs that are none of the set's own; empty where there are none."""
    said = ""
    if on_policy := made.labels["inputs"].get("on_policy"):
        where = {"beside": "Beside the set's own there are", "instead": "In place of the set's own they are"}
        said = f" {where[on_policy['pairs']]} pairs of {on_policy['completions']} samples of pi_ref a training prompt."
    if made.unlabelled is not None:
        of = made.unlabelled["metrics"]
        said += f" It also learnt from {of['pairs']:,} pairs without labels on {of['prompts']:,} prompts, by rewards."
    return said


def _reward_models(method: Method, made: Made) -> Iterable[str]:
    yield "## Reward models"
    if not method.needs:
        yield "None enters the loss."
        return
    if not made.teachers:
        oracles = made.bias["inputs"].get("rewards") == "oracle"
        noise = made.bias["inputs"].get("reward_noise", 0.0)
        added = f", with normal noise of standard deviation {noise:g}" if noise else ""
        yield f"The rewards are those that the {'oracle gives' if oracles else 'data came with'}{added}."
        return
    rows = []
    for name, trained_on, record in made.teachers:
        pairs, accuracy = made.bias["metrics"][trained_on], record["metrics"]["accuracy"]["all"]["accuracy"]
        share = pairs["longer_preferred"] / max(pairs["longer_preferred"] + pairs["shorter_preferred"], 1)
        rows.append((name, f"{pairs['pairs']:,}", f"{share:.0%}", f"{accuracy:.1%}"))
    yield table(("model", "training pairs", "longer preferred", "accuracy on validation pairs"), rows)


def _quantised(policy: Path) -> Iterable[tuple[str, str]]:
    origin = quantised(json.loads((policy / "config.json").read_text(encoding="utf-8")))
    return [("its weights", origin)] if origin else []


def _results(method: str, results: Results) -> Iterable[str]:
    row, sft = results.methods[method], results.sft
    judge = "" if results.judge is None else f" {results.judge.says}"
    yield (
        f"## Results\n\nOn {sft.n} held-out prompts, one sample each, judged by the oracle.{judge} The advantage is "
        f"the mean oracle reward over that of pi_ref, with a {results.confidence:.0%} bootstrap interval over prompts; "
        "log-ratios are of the test pairs' completions, in nats."
    )

    def means(of: PolicyResult) -> tuple[str, ...]:
        ratios = f"{of.chosen_logratio:.2f}", f"{of.rejected_logratio:.2f}"
        return f"{of.length:.1f}", f"{of.finished:.1%}", f"{of.kl:.2f}", *ratios

    before = ("policy", "advantage", "interval", "length", "finished")
    headings = (*before, "KL to pi_ref", "log-ratio winners", "log-ratio losers")
    gain = f"{row.advantage:+.3f}", "{:+.3f} to {:+.3f}".format(*row.ci)
    yield table(headings, [(method, *gain, *means(row)), ("pi_ref", "", "", *means(sft))])


def _use(made: Made, name: str) -> Iterable[str]:
    yield "## Use"
    yield f"```python\n{loading(name)}\n```"
    if "reward_head.safetensors" in made.policy["files"]:
        yield "`reward_head.safetensors` is the linear reward head of training; generation does not need it."


def _provenance(record: Mapping[str, Any]) -> Iterable[str]:
    rows = [("commit", record["commit"]), ("seed", record["seed"]), ("date", record["date"])]
    yield "## Provenance"
    yield table(("of", "is"), [*rows, *record["versions"].items()])


# ---------------------------------------------------------------- Markdown


def _set(record: Record, name: str) -> list[tuple[str, Any]]:
    """Options that are set; a key does not tell those by which no model changes."""
    told = flat(record["inputs"][name])
    return [(option, value) for option, value in told if value is not None and option not in TrainingConfig.INDIFFERENT]


def _hub(name: str | None) -> str | None:
    """The name if it can be one on the hub."""
    return name if name and HUB_NAME.fullmatch(name) else None
