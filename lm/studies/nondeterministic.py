"""Non-deterministic preferences: methods trained on sure and on unsure pairs, at several sampling temperatures.

After [N]: policies are trained on all pairs (D_all), on those with high annotator confidence and a high edit distance
(D_hc,he), and on those with low confidence and a low edit distance (D_lc,le); see `lm.data.confidence`. Each is sampled
at every temperature of `evaluation.temperatures`, on test prompts and on prompts out of domain, and compared with
pi_ref and with the others. The oracle judges, out of domain too, where none was trained; in the embedded world so does
the true utility.
"""

from __future__ import annotations

import json
from collections import Counter
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

from lm import objectives
from lm.base import progress, ranks
from lm.base.files import read_jsonl, write_jsonl
from lm.base.store import Artifact, provenance
from lm.config import SFT, Pairs
from lm.data import places, world
from lm.data.control_tokens import Names
from lm.data.rows import read_rows
from lm.data.schemas import Drop, tldr_prompt
from lm.data.tokens import prompt_ids
from lm.judging.reading import sample_text
from lm.judging.statistics import bootstrap_interval, wald, win_rates
from lm.logprobs.sampling import in_keys
from lm.models.opening import open_policy
from lm.objectives import MAIN, HullDPO, looks
from lm.stages.data import data, opened, sized, tokenizer
from lm.stages.evaluations import (
    asked_of,
    choose,
    judged_samples,
    probe_history,
    prompts_of,
    trained_policy,
    truth,
)
from lm.stages.labels import judge_input, labelled_pairs, labels, oracle_held_out
from lm.stages.readings import Asked
from lm.stages.rewards import asked, reward_held_out
from lm.stages.run import Run
from lm.stages.scores import PAIRS, scores
from lm.stages.subsets import bias
from theory import losses
from theory.records import write_json

SPLITS: tuple[Pairs, ...] = get_args(Pairs)
IN, OUT = "in_domain", "out_of_domain"
BINS = 40
"""Of the histograms of advantages."""
DRDO, IMPLICIT, IMPLICIT_BETAS = "drdo", "drdo-implicit", (0.1, 0.3, 1.0)
"""DRDO's other reading, and the scales of its reward estimate that validation chooses from."""
IMPLICIT_LOOK = {"title": "DRDO, implicit rewards", **HullDPO.look._asdict(), "hollow": False}
GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
"""Focal exponents whose curves are drawn; 2 is [N]'s."""

# ---------------------------------------------------------------- prompts and samples


def out_of_domain(run: Run) -> Artifact | None:
    """prompts.jsonl with prompt and prompt_ids, from another set than the training data; None where there is none.

    Prompts over `data.max_prompt_length` are passed over and counted.

    Raises:
        ValueError: a row without an article, or fewer prompts than asked for.
    """
    config, wanted = run.config, run.config.evaluation.out_of_domain
    if wanted.path is None and config.data.kind != "world":
        return None
    longest = sized(run).data.limits[0]

    def texts(scratch: Path) -> Iterator[tuple[str, str]]:
        if wanted.path is not None:
            places.check(wanted.path, option="evaluation.out_of_domain.path")
            for where, row in read_rows(wanted.path):
                if not isinstance(row.get("article"), str):
                    raise ValueError(f"{where}: a column 'article' of text is needed, there are {sorted(row)}")
                yield wanted.prompt_template.format(article=row["article"].strip()), where
        else:
            low, high = wanted.events
            posts = replace(
                config.data.world,
                posts=wanted.prompts or config.data.world.posts,
                pairs_per_post=1,
                min_events=low,
                max_events=high,
            )
            world.generate(posts, run.seed(OUT), scratch)
            for number, row in read_jsonl(scratch / "sft.jsonl"):
                yield tldr_prompt(row, f"line {number}", config.data.prompt_template), f"line {number}"

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
        prompts = list(dict(texts(scratch)).items())
        names = Names.by(tokenizer(run), config.data.control_tokens)
        order = np.random.default_rng(run.seed(OUT)).permutation(len(prompts))
        rows: list[dict[str, Any]] = []
        too_long, left_out = 0, Counter[str]()
        for index in order:
            if len(rows) == wanted.prompts:
                break
            text, where = prompts[index]
            row = names.row({"prompt": text}, where, rendered=False)
            if isinstance(row, Drop):
                left_out[row.reason] += 1
                continue
            (ids,) = prompt_ids(tokenizer(run), [row["prompt"]])
            if len(ids) > longest:
                too_long += 1
            else:
                rows.append({"prompt": text, "prompt_ids": ids})
        if not rows or (wanted.path is not None and wanted.prompts is not None and len(rows) < wanted.prompts):
            raise ValueError(
                f"evaluation.out_of_domain.prompts is {wanted.prompts}, but of the {len(prompts)} prompts of "
                f"{wanted.path or 'the world'} only {len(rows)} have at most {longest} tokens "
                "(data.max_prompt_length)"
            )
        write_jsonl(folder / "prompts.jsonl", rows)
        for line in names.notes():
            progress.say(f"prompts out of domain: {line}")
        return {
            "prompts": len(rows),
            "too_long": too_long,
            "tokens": _mean(len(row["prompt_ids"]) for row in rows),
            **({"left_out": dict(left_out)} if left_out else {}),
            **({"control_tokens": found} if (found := names.report()) else {}),
        }

    inputs = {
        "data": data(run),
        "prompts": replace(wanted, path=places.placeless(wanted.path)),
        "content": run.content(wanted.path, "dataset"),
        "longest": longest,
        "seed": run.seed(OUT),
    }
    return run.store.get("prompts", OUT, inputs, make)


def judged(run: Run, name: str, domain: str, temperature: float) -> Artifact:
    """A completion of every prompt of a domain by one policy ("sft" for pi_ref) at one temperature.

    samples.jsonl has prompt, completion, oracle_reward, length (tokens), and the true utility in the embedded world.
    """
    config = run.config
    trained, model = trained_policy(run, name)
    other = out_of_domain(run) if domain == OUT else None
    known = other is None or config.evaluation.out_of_domain.path is None  # the truth of the world's own posts

    def make(folder: Path, _: Path) -> dict[str, Any]:
        asked: Asked = {}
        if other is None:
            pairs = labelled_pairs(run, "test")
            prompts, asked = prompts_of(pairs, config.evaluation.prompts, run.seed("prompts")), asked_of(pairs)
        else:
            rows = [row for _, row in read_jsonl(other.path / "prompts.jsonl")]
            prompts = {row["prompt"]: row["prompt_ids"] for row in rows}
        policy = open_policy(model, tokenizer(run), sized(run))
        what = f"{name} at {temperature:g}"
        samples, rewards, told = judged_samples(run, policy, prompts, what, asked, temperature)
        result: list[dict[str, Any]] = [
            {
                "prompt": prompt,
                "completion": sample_text(tokenizer(run), prompts[prompt], sample),
                "oracle_reward": reward,
                "length": len(sample),
                **(truth(run, prompt, sample) if known else {}),
            }
            for prompt, sample, reward in zip(prompts, samples, rewards, strict=True)
        ]
        write_jsonl(folder / "samples.jsonl", result)
        names = [column for column in ("oracle_reward", "length", "utility") if column in result[0]]
        return {"n": len(result), **{column: _mean(row[column] for row in result) for column in names}, **told}

    inputs = {
        "policy": trained,
        "step": model.name if model != trained.path else None,
        **judge_input(run),
        "prompts": other if other is not None else [labels(run), config.evaluation.prompts],
        "sampling": in_keys(replace(config.sampling, temperature=temperature)),
        "seed": run.seed("evaluate"),
    }
    return run.store.get("evaluate", f"{name}-{domain}-t{temperature:g}", inputs, make)


# ---------------------------------------------------------------- the study


def contenders(run: Run) -> dict[str, tuple[Run, str]]:
    """Every policy by its label, with the run that trains it and its name there.

    [N] does not say what DRDO's own reward estimates are. Where they come from a reward head, distillation does not
    act on the log-probs, and the focal term is all that teaches preferences; so the reading by which they are implicit
    rewards, beta times the log-ratio margin, is trained beside it, to tell the method from the reading.
    """
    config = run.config
    found = {name: (run, name) for name in (SFT, *config.methods)}
    if DRDO in config.methods and config.method(DRDO).needs_reward_head:
        settings = [{"reward_estimate": "implicit", "beta": beta} for beta in IMPLICIT_BETAS]
        other = replace(config, sweep={**config.sweep, DRDO: settings})
        found[IMPLICIT] = run.like(other), DRDO
    return found


def study(run: Run) -> dict[str, Any]:
    """Trains and compares every configured method, and DRDO in both readings, on every split.

    `outcomes` has a row a split, domain, temperature and policy: means over the prompts. `wins` has a row a pair of
    policies besides: shares of prompts by the judge ("oracle", or the world's "utility"); `rate`, wins plus half the
    ties, with its bootstrap interval over prompts; Wald's test on the paired differences. `histograms` are of the
    oracle reward less pi_ref's on the same prompt, `training` of the probe pairs (see `probe_history`).
    """
    config = run.config
    domains = [IN] if out_of_domain(run) is None else [IN, OUT]
    report: dict[str, Any] = {"focal": focal_curves(), "outcomes": [], "wins": [], "splits": {}, "training": {}}
    advantages: dict[tuple[str, str, str], np.ndarray] = {}
    for split in SPLITS:
        of_split = run.like(replace(config, bias=replace(config.bias, pairs=split)))
        report["splits"][split] = _split_report(of_split)
        policies = contenders(of_split)
        report["training"][split] = {
            label: probe_history(its, choose(its, name).policy)
            for label, (its, name) in policies.items()
            if name != SFT
        }
        for domain in domains:
            for temperature in config.evaluation.temperatures:
                where = {"split": split, "domain": domain, "temperature": temperature}
                made = {label: judged(its, name, domain, temperature) for label, (its, name) in policies.items()}
                report["outcomes"] += [{**where, "policy": name, **artifact.metrics} for name, artifact in made.items()]
                report["wins"] += [{**where, **row} for row in _wins(of_split, made)]
                if temperature == config.evaluation.temperatures[-1]:
                    base = _column(made[SFT], "oracle_reward")
                    for label in report["training"][split]:
                        advantages[split, domain, label] = _column(made[label], "oracle_reward") - base
    report["histograms"] = _histograms(run, advantages)
    labelled = list(report["training"][SPLITS[0]])
    other = out_of_domain(run)
    return {
        **report,
        "methods": labelled,
        "looks": {name: IMPLICIT_LOOK if name == IMPLICIT else looks([name])[name] for name in labelled},
        "temperatures": config.evaluation.temperatures,
        "confidence": config.evaluation.confidence,
        "out_of_domain": None if other is None else {**asdict(config.evaluation.out_of_domain), **other.metrics},
        "oracle": oracle_held_out(run),
        "labels": config.data.labels,
        "data": data(run).metrics,
        "world": asdict(config.data.world) if config.data.kind == "world" else None,
        "config": config.as_dict(),
        "provenance": provenance(config.seed),
    }


def _split_report(run: Run) -> dict[str, Any]:
    """Which pairs there are, how good the reward models on them are, and what validation chose."""
    chosen = {label: choose(its, name) for label, (its, name) in contenders(run).items() if name != SFT}
    return {
        "pairs": bias(run).metrics[MAIN],
        "selection": bias(run).metrics.get("selection"),
        "focal_weights": _focal_weights(run),
        "reward_models": {name: reward_held_out(run, name) for name in asked(run)},
        "chosen": {name: {"setting": asdict(c.method), "step": c.step, "tried": c.tried} for name, c in chosen.items()},
    }


def _focal_weights(run: Run) -> dict[str, Any]:
    """DRDO's mean focal weight before training (by pi_ref's log-probs), by which completion is preferred.

    Log-probs are summed and no reference is subtracted, so p_w also compares lengths: `length_correlation` is of
    log pi_ref(y_w) - log pi_ref(y_l) with the difference in tokens, `longer_above_half` the share with a longer winner
    among the pairs of a weight over 1/2.
    """
    pairs = opened(scores(run).path / PAIRS)
    chosen, rejected = (np.array(pairs[f"ref_{side}_logps"][:]) for side in ("chosen", "rejected"))
    lengths = ([len(ids) for ids in pairs[f"{side}_ids"][:]] for side in ("chosen", "rejected"))
    longer = np.subtract(*map(np.array, lengths))
    weight = losses.focal_weight(chosen, rejected, gamma=_gamma(run))
    groups = {"longer": longer > 0, "shorter": longer < 0, "equal": longer == 0}
    return {
        **{
            name: {"weight": float(weight[rows].mean()) if rows.any() else None, "pairs": int(rows.sum())}
            for name, rows in groups.items()
        },
        "length_correlation": float(np.corrcoef(chosen - rejected, longer)[0, 1]) if longer.any() else None,
        "longer_above_half": float((longer[weight > 0.5] > 0).mean()) if (weight > 0.5).any() else None,
    }


def _gamma(run: Run) -> float:
    method = run.config.method(DRDO)
    assert isinstance(method, objectives.DRDO)
    return method.gamma


def _wins(run: Run, made: dict[str, Artifact]) -> Iterator[dict[str, Any]]:
    """Every policy against every one before it, by every judge."""
    options, seed = run.config.evaluation, run.seed("bootstrap")
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


def _histograms(run: Run, advantages: dict[tuple[str, str, str], np.ndarray]) -> dict[str, Any]:
    """All on the same bins, between the extreme percentiles; what is beyond counts in the outermost."""
    options, everything = run.config.evaluation, np.concatenate(list(advantages.values()))
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
                "ci": bootstrap_interval(values, options.confidence, options.resamples, run.seed("bootstrap")),
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


def report(run: Run) -> None:
    """Writes nondeterministic.json (floats to six significant digits) and its figures, and prints the table."""
    from figures.registry import redraw

    values = json.loads(json.dumps(study(run), allow_nan=False), parse_float=lambda text: float(f"{float(text):.6g}"))
    if not ranks.is_first():
        return
    folder = Path(run.config.output_dir)
    write_json(folder / "nondeterministic.json", values)
    written = [folder / "nondeterministic.json"]
    for name in ("n_figure_2", "n_figure_3", "n_figure_4", "n_figure_5"):
        written += redraw(name, folder, values)
    Console().print(table(values))
    progress.say(f"written: {', '.join(map(str, written))}")
