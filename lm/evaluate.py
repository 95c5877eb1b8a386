"""Evaluates trained policies on held-out prompts: oracle advantage over pi_ref, intervals, lengths, divergences."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import stats

from lm import progress, ranks, world
from lm.artifacts import Artifact, provenance
from lm.cli import run
from lm.io import read_jsonl, write_json, write_jsonl
from lm.logprobs import CompletionModel
from lm.objectives import Method
from lm.pipeline import Pipeline
from lm.score import open_policy, sample_completions, score_pairs, score_rows

SFT = "sft"
SIGNS = {"win": 1, "tie": 0, "loss": -1}


def evaluation(pipeline: Pipeline, name: str) -> Artifact:
    """Samples of one policy ("sft" for pi_ref; else the method's, as validation chose it) on the test prompts, judged
    by the oracle.

    The artifact has samples.jsonl: prompt, completion, oracle_reward, length (tokens, end-of-text included), finished
    (whether end-of-text was reached), log_ratio (log pi - log pi_ref of the sample, nats), and for the embedded world
    the true utility.
    """
    config = pipeline.config
    trained, model = trained_policy(pipeline, name)

    def make(folder: Path, _: Path) -> dict[str, Any]:
        pairs = pipeline.labelled_pairs("test")
        prompts = prompts_of(pairs, config.evaluation.prompts, pipeline.seed("prompts"))
        policy = open_policy(model, pipeline.tokenizer, config)
        ids = list(prompts.values())
        samples, rewards = judged_samples(pipeline, policy, ids, name)
        end = pipeline.tokenizer.eos_token_id
        logps = score_rows(policy, ids, samples, f"{name} log-probs")
        reference = open_policy(pipeline.sft.path, pipeline.tokenizer, config)
        ratios = (logps - score_rows(reference, ids, samples, "reference log-probs")).tolist()
        rows = [
            {
                "prompt": prompt,
                "completion": pipeline.tokenizer.decode(sample, skip_special_tokens=True),
                "oracle_reward": reward,
                "length": len(sample),
                "finished": sample[-1] == end,
                "log_ratio": ratio,
                **truth(pipeline, prompt, sample),
            }
            for prompt, sample, reward, ratio in zip(prompts, samples, rewards, ratios, strict=True)
        ]
        write_jsonl(folder / "samples.jsonl", rows)
        chosen, rejected = score_pairs(policy, pairs, f"{name} on test pairs")
        ref_chosen, ref_rejected = score_pairs(reference, pairs, "reference on test pairs")
        return {
            "n": len(rows),
            "oracle_reward": float(np.mean(rewards)),
            "length": float(np.mean([row["length"] for row in rows])),
            "finished": float(np.mean([row["finished"] for row in rows])),
            "kl": float(np.mean(ratios)),
            "chosen_logratio": float((chosen - ref_chosen).mean()),
            "rejected_logratio": float((rejected - ref_rejected).mean()),
            "accuracy": float(((chosen - ref_chosen) > (rejected - ref_rejected)).float().mean()),
            **({"utility": float(np.mean([row["utility"] for row in rows]))} if "utility" in rows[0] else {}),
        }

    inputs = {
        "policy": trained,
        "step": model.name if model != trained.path else None,
        "reference": pipeline.sft,
        "labels": pipeline.labels,
        **_judge(pipeline),
        "sampling": config.sampling,
        "prompts": config.evaluation.prompts,
        "seed": pipeline.seed("evaluate"),
    }
    return pipeline.store.get("evaluate", name, inputs, make)


def _judge(pipeline: Pipeline) -> dict[str, Any]:
    """What the oracle adds to an evaluation's key: nothing where the labels are its own, as they are in it."""
    return {} if pipeline.config.data.labels == "oracle" else {"oracle": pipeline.oracle_input}


def trained_policy(pipeline: Pipeline, name: str) -> tuple[Artifact, Path]:
    """The artifact of a policy and the folder of its model."""
    if name == SFT:
        return pipeline.sft, pipeline.sft.path
    chosen = choose(pipeline, name)
    return chosen.policy, chosen.model


def judged_samples(
    pipeline: Pipeline, policy: CompletionModel, prompts: list[list[int]], name: str, temperature: float | None = None
) -> tuple[list[list[int]], list[float]]:
    """A completion of each prompt and its oracle reward, at another temperature than the configured where given."""
    config = pipeline.config
    if temperature is not None:
        config = replace(config, sampling=replace(config.sampling, temperature=temperature))
    samples = sample_completions(
        policy,
        prompts,
        pipeline.tokenizer,
        config,
        seed=pipeline.seed("evaluate"),  # one for all policies: where two agree, they draw the same
        what=f"{name} samples",
    )
    end = pipeline.tokenizer.eos_token_id
    # The oracle reads the state at end-of-text, so a completion cut off at the maximum gets one to be read at.
    judged = [sample if sample[-1] == end else [*sample, end] for sample in samples]
    return samples, score_rows(pipeline.open_oracle(), prompts, judged, "oracle rewards").tolist()


# ---------------------------------------------------------------- validation


@dataclass(frozen=True)
class Chosen:
    """The policy that validation chose for a method."""

    method: Method
    policy: Artifact
    step: int
    model: Path
    """Folder of the model."""
    tried: list[dict[str, Any]]
    """setting, step, advantage over pi_ref on validation prompts with its interval; empty where there was no choice."""


def choose(pipeline: Pipeline, name: str) -> Chosen:
    """The setting and the step of a method with the greatest oracle advantage on validation prompts.

    The first of equals. Where there is one policy only, nothing is sampled.
    """
    methods, policies = pipeline.config.settings(name), pipeline.policies(name)
    candidates = [
        (method, policy, step, model)
        for method, policy in zip(methods, policies, strict=True)
        for step, model in _snapshots(policy).items()
    ]
    if len(candidates) == 1:
        return Chosen(*candidates[0], tried=[])
    tried = [
        {"setting": asdict(method), "step": step, **validation(pipeline, name, policy).metrics[str(step)]}
        for method, policy, step, _ in candidates
    ]
    best = max(range(len(tried)), key=lambda i: tried[i]["advantage"])
    return Chosen(*candidates[best], tried=tried)


def _snapshots(policy: Artifact) -> dict[int, Path]:
    """The models of a policy's artifact by step, the last included."""
    earlier = {int(path.name.removeprefix("step-")): path for path in policy.path.glob("step-*")}
    return dict(sorted({**earlier, policy.metrics["steps"]: policy.path}.items()))


def validation(pipeline: Pipeline, name: str, policy: Artifact) -> Artifact:
    """Oracle advantage over pi_ref of a policy's snapshots on validation prompts, by step; for "sft", its rewards."""
    config = pipeline.config.evaluation
    base = None if name == SFT else validation(pipeline, SFT, pipeline.sft)

    def make(folder: Path, _: Path) -> dict[str, Any]:
        pairs = pipeline.labelled_pairs("valid")
        prompts = list(prompts_of(pairs, config.valid_prompts, pipeline.seed("prompts"), "valid").values())

        def rewards(model: Path) -> list[float]:
            opened = open_policy(model, pipeline.tokenizer, pipeline.config)
            return judged_samples(pipeline, opened, prompts, f"{name} validation")[1]

        if base is None:
            return {"rewards": rewards(policy.path)}
        metrics = {}
        for step, model in _snapshots(policy).items():
            difference = np.array(rewards(model)) - np.array(base.metrics["rewards"])
            interval = bootstrap_interval(difference, config.confidence, config.resamples, pipeline.seed("bootstrap"))
            metrics[str(step)] = {"advantage": float(difference.mean()), "ci": interval}
        return metrics

    inputs = {
        "policy": policy,
        "labels": pipeline.labels,
        **_judge(pipeline),
        "sampling": pipeline.config.sampling,
        "prompts": config.valid_prompts,
        "interval": [config.confidence, config.resamples],
        "seed": pipeline.seed("evaluate"),
    }
    return pipeline.store.get("validate", name, inputs, make)


def prompts_of(pairs: Dataset, count: int | None, seed: int, split: str = "test") -> dict[str, list[int]]:
    """The prompts of a split's pairs with their token ids, or so many of them; ValueError where there are fewer."""
    prompts = dict(zip(pairs["prompt"][:], pairs["prompt_ids"][:], strict=True))
    if count is None:
        return prompts
    if count > len(prompts):
        option = "prompts" if split == "test" else "valid_prompts"
        raise ValueError(f"evaluation.{option} is {count}, but the {split} split has only {len(prompts)} prompts")
    kept = np.random.default_rng(seed).choice(len(prompts), count, replace=False)
    texts = list(prompts)
    return {texts[i]: prompts[texts[i]] for i in sorted(kept)}


def truth(pipeline: Pipeline, prompt: str, sample: list[int]) -> dict[str, float]:
    """The embedded world's utility of a sample; nothing for other data, where the truth is not known."""
    if pipeline.config.data.kind != "world":
        return {}
    before, after = pipeline.config.data.prompt_template.split("{post}")
    post = prompt.removeprefix(before.format(subreddit="town", title="news")).removesuffix(after)
    return {"utility": world.utility(post, pipeline.tokenizer.decode(sample, skip_special_tokens=True))}


def results(pipeline: Pipeline) -> dict[str, Any]:
    """The table of every configured method against pi_ref, as `results.json` has it."""
    config = pipeline.config.evaluation
    sft = evaluation(pipeline, SFT)
    base = _column(sft, "oracle_reward")
    methods, rewards = {}, {}
    for name in pipeline.config.methods:
        rewards[name] = _column(evaluation(pipeline, name), "oracle_reward")
        methods[name] = _row(pipeline, name, rewards[name] - base)
    return {
        "methods": methods,
        "sft": {**sft.metrics, "policy": str(pipeline.sft.path), "samples": _samples(pipeline, sft)},
        "wald": {f"{one} - {other}": wald(rewards[one] - rewards[other]) for one, other in combinations(rewards, 2)},
        "wins": {name: {SFT: win_rates(own, base)} for name, own in rewards.items()},
        "reward_models": {name: pipeline.reward_accuracy(name) for name in pipeline.distilled},
        "oracle": None if pipeline.config.oracle_model else pipeline.oracle.metrics["accuracy"],
        "labels": pipeline.labels.metrics,
        "bias": pipeline.bias.metrics,
        "data": pipeline.data.metrics,
        "rho": pipeline.config.bias.rho,
        "confidence": config.confidence,
        "provenance": provenance(pipeline.config.seed),
    }


def _row(pipeline: Pipeline, name: str, differences: np.ndarray) -> dict[str, Any]:
    """What results.json says of one method."""
    config, chosen, artifact = pipeline.config.evaluation, choose(pipeline, name), evaluation(pipeline, name)
    return {
        "advantage": float(differences.mean()),
        "ci": bootstrap_interval(differences, config.confidence, config.resamples, pipeline.seed("bootstrap")),
        **artifact.metrics,
        "policy": str(chosen.model),
        "samples": _samples(pipeline, artifact),
        "setting": asdict(chosen.method),
        "step": chosen.step,
        "validation": chosen.tried,
        "probe": probe_history(pipeline, chosen.policy),
    }


def _samples(pipeline: Pipeline, artifact: Artifact) -> str:
    """Where an evaluation's samples lie in the run's folder, which may be copied elsewhere: `lm.judge` reads them."""
    return str((artifact.path / "samples.jsonl").relative_to(pipeline.store.root))


def probe_history(pipeline: Pipeline, policy: Artifact) -> list[dict[str, Any]]:
    """What was logged of the policy on the probe pairs, by step: see `lm.trainer.PolicyTrainer.evaluate`.

    Names lose their "eval_"; member_shares is in the order of the ensemble, and absent for methods without a beta.
    """
    history = []
    for entry in policy.metrics["history"]:
        if "eval_chosen_logps" in entry:
            values = {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}
            shares = [values.pop(f"member_{k}") for k in range(len(pipeline.members)) if f"member_{k}" in values]
            history.append({"step": entry["step"], **values, **({"member_shares": shares} if shares else {})})
    return history


def cell(pipeline: Pipeline, name: str) -> dict[str, Any]:
    """One method of one run, for a grid: `chosen` (setting, step), `test` (metrics, advantage and interval),
    `validation`, `probe`, and `rewards`: the oracle's of each test prompt, of the policy and of pi_ref."""
    rewards, base = (_column(evaluation(pipeline, policy), "oracle_reward") for policy in (name, SFT))
    row = _row(pipeline, name, rewards - base)
    apart = ("policy", "samples", "setting", "step", "validation", "probe")
    return {
        "seed": pipeline.config.seed,
        "rho": pipeline.config.bias.rho,
        "method": name,
        "chosen": {"setting": row["setting"], "step": row["step"]},
        "test": {key: value for key, value in row.items() if key not in apart},
        "validation": row["validation"],
        "probe": row["probe"],
        "rewards": {name: rewards.tolist(), SFT: base.tolist()},
    }


def _column(artifact: Artifact, name: str) -> np.ndarray:
    return np.array([row[name] for _, row in read_jsonl(artifact.path / "samples.jsonl")])


def bootstrap_interval(values: np.ndarray, confidence: float, resamples: int, seed: int) -> list[float]:
    """Percentile bootstrap interval of the mean over prompts."""
    if np.ptp(values) == 0:
        return [float(values[0]), float(values[0])]
    interval = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        batch=1000,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return [float(interval.low), float(interval.high)]


def wald(differences: np.ndarray) -> dict[str, float | None]:
    """Two-sided Wald test that a mean paired difference is zero: mean, z and p. z and p are None without variance."""
    mean = float(differences.mean())
    error = float(differences.std(ddof=1) / np.sqrt(len(differences))) if len(differences) > 1 else 0.0
    if error == 0:
        return {"difference": mean, "z": None, "p": None}
    z = mean / error
    return {"difference": mean, "z": z, "p": float(2 * stats.norm.sf(abs(z)))}


def win_rates(rewards: np.ndarray, against: np.ndarray) -> dict[str, float]:
    """Shares of prompts on which the first reward is larger, equal and smaller: win, tie, loss, and n.

    Args:
        rewards: [N], of one policy's completions.
        against: [N], of another's on the same prompts, in the same order.

    Raises:
        ValueError: other shapes, no prompts, or a reward that is not finite.
    """
    outcomes = compare(rewards, against)
    return {**{name: float(np.mean(outcomes == sign)) for name, sign in SIGNS.items()}, "n": len(outcomes)}


def compare(rewards: np.ndarray, against: np.ndarray) -> np.ndarray:
    """+1 where the first reward is larger, 0 where both are equal, -1 where it is smaller, [N]."""
    rewards, against = np.asarray(rewards, dtype=float), np.asarray(against, dtype=float)
    if rewards.ndim != 1 or rewards.shape != against.shape or not len(rewards):
        raise ValueError(f"rewards and against must be of one shape [N], N > 0; got {rewards.shape}, {against.shape}")
    for name, values in (("rewards", rewards), ("against", against)):
        if not np.isfinite(values).all():
            row = int((~np.isfinite(values)).argmax())
            raise ValueError(f"{name}[{row}] is {values[row]}; every reward must be finite")
    outcomes: np.ndarray = np.sign(rewards - against)
    return outcomes


def table(report: dict[str, Any]) -> Table:
    """The results as a rich table."""
    percent = f"{report['confidence']:.0%}"
    truth = "utility" in report["sft"]
    rho = "unbiased pairs" if report["rho"] is None else f"rho = {report['rho']:g}"
    # Narrow enough for 80 columns, where a terminal or a log file would otherwise lose digits.
    title = f"Oracle advantage over SFT on {report['sft']['n']} test prompts ({rho})"
    view = Table(title=title, box=box.SIMPLE, padding=0)
    headings = [
        "method",
        "advantage",
        f"{percent}\ninterval",
        "length",
        "KL\nto ref",
        "Δlogp\nwinners",
        "Δlogp\nlosers",
    ]
    for heading in [*headings, *(["utility"] if truth else [])]:
        view.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for name, row in [(SFT, report["sft"]), *report["methods"].items()]:
        cells = ["", ""] if name == SFT else [f"{row['advantage']:+.3f}", "[{:+.3f}, {:+.3f}]".format(*row["ci"])]
        cells += [f"{row['length']:.2f}", f"{row['kl']:.2f}"]
        cells += [f"{row['chosen_logratio']:+.2f}", f"{row['rejected_logratio']:+.2f}"]
        view.add_row(name, *cells, *([f"{row['utility']:.3f}"] if truth else []))
    return view


def comparisons(report: dict[str, Any]) -> Table:
    """Win rates against pi_ref by oracle reward, and p-values of Wald tests between the methods, as a rich table."""
    title = "Wins against SFT, ties, losses (%); p of a difference in advantage"
    view = Table(title=title, box=box.SIMPLE, padding=0)
    names = list(report["methods"])
    for heading in ("method", *SIGNS, *names[:-1]):
        view.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for index, name in enumerate(names):
        shares = [f"{100 * report['wins'][name][SFT][outcome]:.0f}" for outcome in SIGNS]
        tests = [report["wald"][f"{other} - {name}"]["p"] for other in names[:index]]
        view.add_row(name, *shares, *("-" if p is None else f"{p:.3f}" if p >= 0.001 else "<.001" for p in tests))
    return view


def report(pipeline: Pipeline) -> None:
    """Writes results.json, results.png and report.html, and prints the table."""
    from figures.methods import draw
    from figures.paths import write_atomically
    from figures.style import style
    from lm.report import write_report

    values = results(pipeline)
    if not ranks.is_first():
        return
    folder = Path(pipeline.config.output_dir)
    write_json(folder / "results.json", values)
    with style():
        write_atomically(folder / "results.png", draw(values).savefig)
    Console().print(table(values), comparisons(values))
    write_report(folder)
    progress.say(f"written: {', '.join(str(folder / name) for name in OUTPUTS)}")


OUTPUTS = ("results.json", "results.png", "report.html")
UPSTREAM = frozenset({"data", "sft", "oracle", "labels", "bias", "reward", "score", "policy"})

if __name__ == "__main__":
    sys.exit(run("lm.evaluate", report, read_only=UPSTREAM))
