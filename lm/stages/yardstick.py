"""What pi_ref can do without any training: the best of n of its samples by the oracle, as a yardstick for policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from figures.studies import kl_of_best_of
from lm.base.store import Artifact
from lm.judging.statistics import best_of, bootstrap_interval
from lm.logprobs.sampling import in_keys, sample_completions
from lm.models.opening import open_policy
from lm.stages.data import opened, sized, tokenizer
from lm.stages.evaluations import asked_of, prompts_of
from lm.stages.labels import judge_input, judge_samples, labelled_pairs, labels
from lm.stages.run import Run, once
from lm.stages.scores import PROBE, scores
from lm.stages.trainings import sft


@once
def best_of_n(run: Run) -> list[dict[str, Any]] | None:
    """Of n: 1, 2, 4, ... and all samples that there are of a prompt, as `figures.record.BestOf` has them.

    The samples are drawn for this, on validation prompts, where `evaluation.best_of` says how many; else they are those
    that the KL term is estimated from, on the held-out prompts of the probe. None where these are one a prompt, or
    there is no probe.
    """
    own = run.config.evaluation.best_of
    if own is None and (run.config.sampling.reference_samples < 2 or not scores(run).metrics["probe"]):
        return None
    made = _rewards(run) if own is None else _own_rewards(run, own)
    rewards, shown = np.array(made.metrics["rewards"]), run.config.evaluation
    base, found, each = rewards.mean(axis=1), [], rewards.shape[1]
    for n in sorted({*(2**i for i in range(each.bit_length())), each}):
        gains = best_of(rewards, n) - base
        found.append(
            {
                "n": n,
                "kl": kl_of_best_of(n),
                "advantage": float(gains.mean()),
                "ci": bootstrap_interval(gains, shown.confidence, shown.resamples, run.seed("bootstrap")),
                "prompts": len(rewards),
            }
        )
    return found


def _own_rewards(run: Run, each: int) -> Artifact:
    """By the judge, of so many samples of pi_ref on each validation prompt, [prompts, samples]."""

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
        pairs = labelled_pairs(run, "valid")
        prompts = prompts_of(pairs, run.config.evaluation.valid_prompts, run.seed("prompts"), "valid")
        policy = open_policy(sft(run).path, tokenizer(run), sized(run))
        repeated = [ids for ids in prompts.values() for _ in range(each)]
        seed = run.seed("yardstick")
        samples = sample_completions(policy, repeated, tokenizer(run), sized(run), seed=seed, what="best-of-n samples")
        kth = [judge_samples(run, prompts, samples[k::each], asked_of(pairs))[0] for k in range(each)]
        return {"rewards": torch.stack(kth, dim=1).tolist()}

    inputs = {
        "policy": sft(run),
        "labels": labels(run),
        **judge_input(run),
        "sampling": in_keys(run.config.sampling),
        "prompts": run.config.evaluation.valid_prompts,
        "samples": each,
        "seed": run.seed("yardstick"),
    }
    return run.store.get("yardstick", f"best-of-{each}", inputs, make)


def _rewards(run: Run) -> Artifact:
    """By the oracle, of the samples of pi_ref on each prompt of the probe, [prompts, samples]."""

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
        probe, held_out = opened(scores(run).path / PROBE), labelled_pairs(run, "valid")
        samples_of = {tuple(row["prompt_ids"]): row["sample_ids"] for row in probe}
        every = prompts_of(held_out, None, 0, "valid")
        prompts = {text: ids for text, ids in every.items() if tuple(ids) in samples_of}
        kth, asked = zip(*(samples_of[tuple(ids)] for ids in prompts.values()), strict=True), asked_of(held_out)
        rewards = [judge_samples(run, prompts, samples, asked)[0] for samples in kth]
        return {"rewards": torch.stack(rewards, dim=1).tolist()}

    inputs = {"scores": scores(run), "labels": labels(run), **judge_input(run)}
    return run.store.get("yardstick", "best-of-n", inputs, make)
