"""Non-deterministic preferences: methods trained on sure and on unsure pairs, at several sampling temperatures.

After [N]: policies are trained on all pairs (D_all), on those with high annotator confidence and a high edit distance
(D_hc,he), and on those with low confidence and a low edit distance (D_lc,le); see `lm.confidence`. Each is sampled at
every temperature of `evaluation.temperatures`, on test prompts and on prompts out of domain, and compared with pi_ref
and with the others. The oracle judges, out of domain too, where none was trained; in the embedded world so does the
true utility.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from lm import progress, ranks, world
from lm.artifacts import Artifact, provenance
from lm.cli import run
from lm.confidence import Pairs
from lm.data import read_rows, tldr_prompt
from lm.evaluate import (
    SFT,
    bootstrap_interval,
    choose,
    judged_samples,
    probe_history,
    prompts_of,
    trained_policy,
    truth,
    wald,
    win_rates,
)
from lm.io import read_jsonl, write_json, write_jsonl
from lm.pipeline import DRDO, MAIN, Pipeline, content_of
from lm.score import open_policy
from theory import losses

SPLITS: tuple[Pairs, ...] = get_args(Pairs)
IN, OUT = "in_domain", "out_of_domain"
BINS = 40
"""Of the histograms of advantages."""
IMPLICIT, IMPLICIT_BETAS = "drdo-implicit", (0.1, 0.3, 1.0)
"""DRDO's other reading, and the scales of its reward estimate that validation chooses from."""
GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
"""Focal exponents whose curves are drawn; 2 is [N]'s."""

# ---------------------------------------------------------------- prompts and samples


def out_of_domain(pipeline: Pipeline) -> Artifact | None:
    """prompts.jsonl with prompt and prompt_ids, from another set than the training data; None where there is none.

    Prompts over `data.max_prompt_length` are passed over and counted.

    Raises:
        ValueError: a row without an article, or fewer prompts than asked for.
    """
    config, wanted = pipeline.config, pipeline.config.evaluation.out_of_domain
    if wanted.path is None and config.data.kind != "world":
        return None

    def texts(scratch: Path) -> Iterator[str]:
        if wanted.path is not None:
            for where, row in read_rows(wanted.path):
                if not isinstance(row.get("article"), str):
                    raise ValueError(f"{where}: a column 'article' of text is needed, there are {sorted(row)}")
                yield wanted.prompt_template.format(article=row["article"].strip())
        else:
            low, high = wanted.events
            posts = replace(
                config.data.world,
                posts=wanted.prompts or config.data.world.posts,
                pairs_per_post=1,
                min_events=low,
                max_events=high,
            )
            world.generate(posts, pipeline.seed(OUT), scratch)
            for number, row in read_jsonl(scratch / "sft.jsonl"):
                yield tldr_prompt(row, f"line {number}", config.data.prompt_template)

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
        prompts = list(dict.fromkeys(texts(scratch)))
        order = np.random.default_rng(pipeline.seed(OUT)).permutation(len(prompts))
        rows: list[dict[str, Any]] = []
        too_long = 0
        for index in order:
            if len(rows) == wanted.prompts:
                break
            ids = pipeline.tokenizer(prompts[index])["input_ids"]
            if len(ids) > config.data.max_prompt_length:
                too_long += 1
            else:
                rows.append({"prompt": prompts[index], "prompt_ids": ids})
        if not rows or (wanted.path is not None and wanted.prompts is not None and len(rows) < wanted.prompts):
            raise ValueError(
                f"evaluation.out_of_domain.prompts is {wanted.prompts}, but of the {len(prompts)} prompts of "
                f"{wanted.path or 'the world'} only {len(rows)} have at most {config.data.max_prompt_length} tokens "
                "(data.max_prompt_length)"
            )
        write_jsonl(folder / "prompts.jsonl", rows)
        return {"prompts": len(rows), "too_long": too_long, "tokens": _mean(len(row["prompt_ids"]) for row in rows)}

    inputs = {
        "data": pipeline.data,
        "prompts": wanted,
        "content": content_of(wanted.path),
        "longest": config.data.max_prompt_length,
        "seed": pipeline.seed(OUT),
    }
    return pipeline.store.get("prompts", OUT, inputs, make)


def judged(pipeline: Pipeline, name: str, domain: str, temperature: float) -> Artifact:
    """A completion of every prompt of a domain by one policy ("sft" for pi_ref) at one temperature.

    samples.jsonl has prompt, completion, oracle_reward, length (tokens), and the true utility in the embedded world.
    """
    config = pipeline.config
    trained, model = trained_policy(pipeline, name)
    other = out_of_domain(pipeline) if domain == OUT else None
    known = other is None or config.evaluation.out_of_domain.path is None  # the truth of the world's own posts

    def make(folder: Path, _: Path) -> dict[str, Any]:
        if other is None:
            prompts = prompts_of(pipeline.labelled_pairs("test"), config.evaluation.prompts, pipeline.seed("prompts"))
        else:
            rows = [row for _, row in read_jsonl(other.path / "prompts.jsonl")]
            prompts = {row["prompt"]: row["prompt_ids"] for row in rows}
        ids = list(prompts.values())
        policy = open_policy(model, pipeline.tokenizer, config)
        samples, rewards = judged_samples(pipeline, policy, ids, f"{name} at {temperature:g}", temperature)
        result = [
            {
                "prompt": prompt,
                "completion": pipeline.tokenizer.decode(sample, skip_special_tokens=True),
                "oracle_reward": reward,
                "length": len(sample),
                **(truth(pipeline, prompt, sample) if known else {}),
            }
            for prompt, sample, reward in zip(prompts, samples, rewards, strict=True)
        ]
        write_jsonl(folder / "samples.jsonl", result)
        names = [column for column in ("oracle_reward", "length", "utility") if column in result[0]]
        return {"n": len(result), **{column: _mean(row[column] for row in result) for column in names}}

    inputs = {
        "policy": trained,
        "step": model.name if model != trained.path else None,
        "oracle": pipeline.oracle_input,
        "prompts": other if other is not None else [pipeline.labels, config.evaluation.prompts],
        "sampling": replace(config.sampling, temperature=temperature),
        "seed": pipeline.seed("evaluate"),
    }
    return pipeline.store.get("evaluate", f"{name}-{domain}-t{temperature:g}", inputs, make)


# ---------------------------------------------------------------- the study


def contenders(pipeline: Pipeline) -> dict[str, tuple[Pipeline, str]]:
    """Every policy by its label, with the pipeline that trains it and its name there.

    [N] does not say what DRDO's own reward estimates are. Where they come from a reward head, distillation does not
    act on the log-probs, and the focal term is all that teaches preferences; so the reading by which they are implicit
    rewards, beta times the log-ratio margin, is trained beside it, to tell the method from the reading.
    """
    config = pipeline.config
    found = {name: (pipeline, name) for name in (SFT, *config.methods)}
    if DRDO in config.methods and config.drdo.needs_reward_head:
        settings = [{"reward_estimate": "implicit", "beta": beta} for beta in IMPLICIT_BETAS]
        other = replace(config, sweep={**config.sweep, DRDO: settings})
        found[IMPLICIT] = Pipeline(other, read_only=pipeline.store.read_only), DRDO
    return found


def study(pipeline: Pipeline) -> dict[str, Any]:
    """Trains and compares every configured method, and DRDO in both readings, on every split.

    `outcomes` has a row a split, domain, temperature and policy: means over the prompts. `wins` has a row a pair of
    policies besides: shares of prompts by the judge ("oracle", or the world's "utility"); `rate`, wins plus half the
    ties, with its bootstrap interval over prompts; Wald's test on the paired differences. `histograms` are of the
    oracle reward less pi_ref's on the same prompt, `training` of the probe pairs (see `probe_history`).
    """
    config = pipeline.config
    domains = [IN] if out_of_domain(pipeline) is None else [IN, OUT]
    report: dict[str, Any] = {"focal": focal_curves(), "outcomes": [], "wins": [], "splits": {}, "training": {}}
    advantages: dict[tuple[str, str, str], np.ndarray] = {}
    for split in SPLITS:
        of_split = Pipeline(replace(config, bias=replace(config.bias, pairs=split)), read_only=pipeline.store.read_only)
        report["splits"][split] = _split_report(of_split)
        policies = contenders(of_split)
        report["training"][split] = {
            label: probe_history(run, choose(run, name).policy)
            for label, (run, name) in policies.items()
            if name != SFT
        }
        for domain in domains:
            for temperature in config.evaluation.temperatures:
                where = {"split": split, "domain": domain, "temperature": temperature}
                made = {label: judged(run, name, domain, temperature) for label, (run, name) in policies.items()}
                report["outcomes"] += [{**where, "policy": name, **artifact.metrics} for name, artifact in made.items()]
                report["wins"] += [{**where, **row} for row in _wins(of_split, made)]
                if temperature == config.evaluation.temperatures[-1]:
                    base = _column(made[SFT], "oracle_reward")
                    for label in report["training"][split]:
                        advantages[split, domain, label] = _column(made[label], "oracle_reward") - base
    report["histograms"] = _histograms(pipeline, advantages)
    other = out_of_domain(pipeline)
    return {
        **report,
        "methods": [label for label in contenders(pipeline) if label != SFT],
        "temperatures": config.evaluation.temperatures,
        "confidence": config.evaluation.confidence,
        "out_of_domain": None if other is None else {**asdict(config.evaluation.out_of_domain), **other.metrics},
        "oracle": None if config.oracle_model else pipeline.oracle.metrics["accuracy"],
        "labels": config.data.labels,
        "data": pipeline.data.metrics,
        "world": asdict(config.data.world) if config.data.kind == "world" else None,
        "config": asdict(config),
        "provenance": provenance(config.seed),
    }


def _split_report(pipeline: Pipeline) -> dict[str, Any]:
    """Which pairs there are, how good the reward models on them are, and what validation chose."""
    chosen = {label: choose(run, name) for label, (run, name) in contenders(pipeline).items() if name != SFT}
    return {
        "pairs": pipeline.bias.metrics[MAIN],
        "selection": pipeline.bias.metrics.get("selection"),
        "focal_weights": _focal_weights(pipeline),
        "reward_models": {name: pipeline.reward_accuracy(name) for name in pipeline.distilled},
        "chosen": {name: {"setting": asdict(c.method), "step": c.step, "tried": c.tried} for name, c in chosen.items()},
    }


def _focal_weights(pipeline: Pipeline) -> dict[str, Any]:
    """DRDO's mean focal weight before training (by pi_ref's log-probs), by which completion is preferred.

    Log-probs are summed and no reference is subtracted, so p_w also compares lengths: `length_correlation` is of
    log pi_ref(y_w) - log pi_ref(y_l) with the difference in tokens, `longer_above_half` the share with a longer winner
    among the pairs of a weight over 1/2.
    """
    pairs = pipeline.scored_pairs()
    chosen, rejected = (np.array(pairs[f"ref_{side}_logps"][:]) for side in ("chosen", "rejected"))
    lengths = ([len(ids) for ids in pairs[f"{side}_ids"][:]] for side in ("chosen", "rejected"))
    longer = np.subtract(*map(np.array, lengths))
    weight = losses.focal_weight(chosen, rejected, gamma=pipeline.config.drdo.gamma)
    groups = {"longer": longer > 0, "shorter": longer < 0, "equal": longer == 0}
    return {
        **{
            name: {"weight": float(weight[rows].mean()) if rows.any() else None, "pairs": int(rows.sum())}
            for name, rows in groups.items()
        },
        "length_correlation": float(np.corrcoef(chosen - rejected, longer)[0, 1]) if longer.any() else None,
        "longer_above_half": float((longer[weight > 0.5] > 0).mean()) if (weight > 0.5).any() else None,
    }


def _wins(pipeline: Pipeline, made: dict[str, Artifact]) -> Iterator[dict[str, Any]]:
    """Every policy against every one before it, by every judge."""
    options, seed = pipeline.config.evaluation, pipeline.seed("bootstrap")
    judges = {"oracle": "oracle_reward", **({"utility": "utility"} if "utility" in made[SFT].metrics else {})}
    for against, policy in combinations(made, 2):
        for judge, column in judges.items():
            own, theirs = _column(made[policy], column), _column(made[against], column)
            score = (np.sign(own - theirs) + 1) / 2
            yield {
                "policy": policy,
                "against": against,
                "judge": judge,
                **win_rates(own, theirs),
                "rate": float(score.mean()),
                "ci": bootstrap_interval(score, options.confidence, options.resamples, seed),
                **wald(own - theirs),
            }


def _histograms(pipeline: Pipeline, advantages: dict[tuple[str, str, str], np.ndarray]) -> dict[str, Any]:
    """All on the same bins, between the extreme percentiles; what is beyond counts in the outermost."""
    options, everything = pipeline.config.evaluation, np.concatenate(list(advantages.values()))
    low, high = np.percentile(everything, [0.5, 99.5])
    edges = np.linspace(low, high, BINS + 1)
    return {
        "temperature": options.temperatures[-1],
        "edges": edges.tolist(),
        "counts": [
            {
                **dict(zip(("split", "domain", "policy"), key, strict=True)),
                "counts": np.histogram(values.clip(edges[0], edges[-1]), edges)[0].tolist(),
                "mean": float(values.mean()),
                "ci": bootstrap_interval(values, options.confidence, options.resamples, pipeline.seed("bootstrap")),
            }
            for key, values in advantages.items()
        ],
    }


def focal_curves(
    gammas: Sequence[float] = GAMMAS, *, alpha: float = 0.1, mean_logp: float = -10.0, width: float = 8.0
) -> dict[str, Any]:
    """DRDO's preference term, [N] eq 6, against log pi(y_w) - log pi(y_l), by the focal exponent.

    Args:
        gammas: exponents.
        alpha: weight of the term; 0.1 in [N].
        mean_logp: (log pi(y_w) + log pi(y_l)) / 2, held fixed, nats.
        width: the margin goes from minus this to this, nats; less than -2 mean_logp.

    Returns:
        margin [M]; and for each exponent `weight`, (1 - p_w)^gamma; `term`, of the loss; `chosen_gradient` and
        `rejected_gradient`, of the term by either log-prob.
    """
    if not abs(mean_logp) > width / 2 or mean_logp >= 0:
        raise ValueError(f"width must be below -2 mean_logp, so that log-probs are negative; got {width}, {mean_logp}")
    margin = torch.linspace(-width, width, 161, dtype=torch.float64)
    zero = torch.zeros_like(margin)
    curves = []
    for gamma in gammas:
        chosen, rejected = ((mean_logp + sign * margin / 2).clone().requires_grad_() for sign in (1, -1))
        term = losses.drdo(zero, zero, chosen, rejected, alpha=alpha, gamma=gamma)
        gradients = torch.autograd.grad(term.sum(), [chosen, rejected])
        weight = losses.focal_weight(chosen, rejected, gamma=gamma)
        values = {"weight": weight, "term": term, "chosen_gradient": gradients[0], "rejected_gradient": gradients[1]}
        curves.append({"gamma": gamma, **{name: value.detach().tolist() for name, value in values.items()}})
    return {"alpha": alpha, "mean_logp": mean_logp, "margin": margin.tolist(), "curves": curves}


def _column(artifact: Artifact, name: str) -> np.ndarray:
    return np.array([row[name] for _, row in read_jsonl(artifact.path / "samples.jsonl")])


def _mean(values: Iterator[float]) -> float:
    return float(np.mean(list(values)))


# ---------------------------------------------------------------- the command


def table(report: dict[str, Any]) -> Table:
    """Win rates against DPO (or the first method) by the oracle, and oracle rewards, at the last temperature."""
    last, first = report["temperatures"][-1], report["methods"][0]
    view = Table(title=f"Sampled at temperature {last:g}, judged by the oracle", box=box.SIMPLE, padding=0)
    for heading in ("pairs", "prompts", "method", "reward", f"win rate\nagainst {first}", "interval", "p"):
        view.add_column(heading, justify="right" if heading in ("reward", "interval", "p") else "left", no_wrap=True)
    for row in report["outcomes"]:
        if row["temperature"] != last:
            continue
        cells = ["", "", ""]
        for win in report["wins"]:
            same = all(win[key] == row[key] for key in ("split", "domain", "temperature", "policy"))
            if same and win["against"] == first and win["judge"] == "oracle":
                p = "" if win["p"] is None else f"{win['p']:.2g}"
                cells = [f"{win['rate']:.1%}", "[{:.1%}, {:.1%}]".format(*win["ci"]), p]
        view.add_row(
            row["split"], row["domain"].replace("_", " "), row["policy"], f"{row['oracle_reward']:.3f}", *cells
        )
    return view


def report(pipeline: Pipeline) -> None:
    """Writes nondeterministic.json (floats to six significant digits) and its figures, and prints the table."""
    from figures.registry import redraw

    values = json.loads(
        json.dumps(study(pipeline), allow_nan=False), parse_float=lambda text: float(f"{float(text):.6g}")
    )
    if not ranks.is_first():
        return
    folder = Path(pipeline.config.output_dir)
    write_json(folder / "nondeterministic.json", values)
    written = [folder / "nondeterministic.json"]
    for name in ("n_figure_2", "n_figure_3", "n_figure_4", "n_figure_5"):
        written += redraw(name, folder, values)
    Console().print(table(values))
    progress.say(f"written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    examples = ("", "--config lm/configs/nondeterministic.yaml --output_dir runs/nondeterministic")
    sys.exit(run("lm.nondeterministic", report, preset="nondeterministic_world.yaml", examples=examples))
