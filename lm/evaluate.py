"""Evaluates trained policies on held-out prompts: oracle advantage over pi_ref, intervals, lengths, divergences."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import stats

from lm import world
from lm.artifacts import Artifact, provenance
from lm.cli import run
from lm.io import read_jsonl, write_json, write_jsonl
from lm.pipeline import MAIN, Pipeline
from lm.score import open_policy, sample_completions, score_pairs, score_rows

SFT = "sft"


def evaluation(pipeline: Pipeline, name: str) -> Artifact:
    """Samples of one policy ("sft" for pi_ref) on the test prompts, judged by the oracle.

    The artifact has samples.jsonl: prompt, completion, oracle_reward, length (tokens, end-of-text included), finished
    (whether end-of-text was reached), log_ratio (log pi - log pi_ref of the sample, nats), and for the embedded world
    the true utility.
    """
    config = pipeline.config
    trained = pipeline.sft if name == SFT else pipeline.policy(name)

    def make(folder: Path, _: Path) -> dict[str, Any]:
        pairs = pipeline.labelled_pairs("test")
        prompts = _test_prompts(pairs, config.evaluation.prompts, pipeline.seed("prompts"))
        policy = open_policy(trained.path, pipeline.tokenizer, config)
        # One seed for all policies: where two agree, they draw the same.
        samples = sample_completions(
            policy,
            list(prompts.values()),
            pipeline.tokenizer,
            config,
            seed=pipeline.seed("evaluate"),
            what=f"{name} samples",
        )
        ids = list(prompts.values())
        end = pipeline.tokenizer.eos_token_id
        finished = [sample[-1] == end for sample in samples]
        # The oracle reads the state at end-of-text, so a completion cut off at the maximum gets one to be read at.
        judged = [sample if done else [*sample, end] for sample, done in zip(samples, finished, strict=True)]
        rewards = score_rows(pipeline.open_oracle(), ids, judged, "oracle rewards").tolist()
        logps = score_rows(policy, ids, samples, f"{name} log-probs")
        reference = open_policy(pipeline.sft.path, pipeline.tokenizer, config)
        ratios = (logps - score_rows(reference, ids, samples, "reference log-probs")).tolist()
        rows = [
            {
                "prompt": prompt,
                "completion": pipeline.tokenizer.decode(sample, skip_special_tokens=True),
                "oracle_reward": reward,
                "length": len(sample),
                "finished": done,
                "log_ratio": ratio,
                **_truth(pipeline, prompt, sample),
            }
            for prompt, sample, reward, done, ratio in zip(prompts, samples, rewards, finished, ratios, strict=True)
        ]
        write_jsonl(folder / "samples.jsonl", rows)
        chosen, rejected = score_pairs(policy, pairs, f"{name} on test pairs")
        ref_chosen, ref_rejected = score_pairs(reference, pairs, "reference on test pairs")
        return {
            "n": len(rows),
            "oracle_reward": float(np.mean(rewards)),
            "length": float(np.mean([row["length"] for row in rows])),
            "finished": float(np.mean(finished)),
            "kl": float(np.mean(ratios)),
            "chosen_logratio": float((chosen - ref_chosen).mean()),
            "rejected_logratio": float((rejected - ref_rejected).mean()),
            "accuracy": float(((chosen - ref_chosen) > (rejected - ref_rejected)).float().mean()),
            **({"utility": float(np.mean([row["utility"] for row in rows]))} if "utility" in rows[0] else {}),
        }

    inputs = {
        "policy": trained,
        "reference": pipeline.sft,
        "labels": pipeline.labels,
        "sampling": config.sampling,
        "prompts": config.evaluation.prompts,
        "seed": pipeline.seed("evaluate"),
    }
    return pipeline.store.get("evaluate", name, inputs, make)


def _test_prompts(pairs: Dataset, count: int | None, seed: int) -> dict[str, list[int]]:
    prompts = dict(zip(pairs["prompt"], pairs["prompt_ids"], strict=True))
    if count is None:
        return prompts
    if count > len(prompts):
        raise ValueError(f"evaluation.prompts is {count}, but the test split has only {len(prompts)} prompts")
    kept = np.random.default_rng(seed).choice(len(prompts), count, replace=False)
    texts = list(prompts)
    return {texts[i]: prompts[texts[i]] for i in sorted(kept)}


def _truth(pipeline: Pipeline, prompt: str, sample: list[int]) -> dict[str, float]:
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
    methods, differences = {}, {}
    for name in pipeline.config.methods:
        artifact = evaluation(pipeline, name)
        differences[name] = _column(artifact, "oracle_reward") - base
        methods[name] = {
            "advantage": float(differences[name].mean()),
            "ci": _interval(differences[name], config.confidence, config.resamples, pipeline.seed("bootstrap")),
            **artifact.metrics,
            "policy": str(pipeline.policy(name).path),
        }
    return {
        "methods": methods,
        "sft": {**sft.metrics, "policy": str(pipeline.sft.path)},
        "wald": {
            f"{one} - {other}": wald(differences[one] - differences[other])
            for one, other in combinations(differences, 2)
        },
        "reward_models": {name: pipeline.reward(name).metrics["accuracy"] for name in (MAIN, *pipeline.members)},
        "oracle": None if pipeline.config.oracle_model else pipeline.oracle.metrics["accuracy"],
        "labels": pipeline.labels.metrics,
        "bias": pipeline.bias.metrics,
        "data": pipeline.data.metrics,
        "rho": pipeline.config.bias.rho,
        "confidence": config.confidence,
        "provenance": provenance(pipeline.config.seed),
    }


def _column(artifact: Artifact, name: str) -> np.ndarray:
    return np.array([row[name] for _, row in read_jsonl(artifact.path / "samples.jsonl")])


def _interval(values: np.ndarray, confidence: float, resamples: int, seed: int) -> list[float]:
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


def report(pipeline: Pipeline) -> None:
    """Writes results.json and results.png, and prints the table."""
    from figures.methods import draw
    from figures.paths import write_atomically
    from figures.style import style

    values = results(pipeline)
    folder = Path(pipeline.config.output_dir)
    write_json(folder / "results.json", values)
    with style():
        write_atomically(folder / "results.png", draw(values).savefig)
    Console().print(table(values))
    print(f"written: {folder / 'results.json'}, {folder / 'results.png'}", file=sys.stderr)


UPSTREAM = frozenset({"data", "sft", "oracle", "labels", "bias", "reward", "score", "policy"})

if __name__ == "__main__":
    sys.exit(run("lm.evaluate", report, read_only=UPSTREAM))
