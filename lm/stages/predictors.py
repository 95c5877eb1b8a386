"""What may predict which method pays on a set, by a few minutes of fitting: of anybody's set, and of a study's worlds.

All of it is known without a judge: accuracies and lengths are of validation pairs, as they are labelled.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.special import expit

from lm.config import TrainingConfig
from lm.data.columns import digests, numbered, numbers, texts
from lm.data.rewards import ORACLE
from lm.logprobs.scoring import score_pairs
from lm.models.opening import open_policy
from lm.objectives import MAIN
from lm.stages.data import sized, tokenizer
from lm.stages.heads import features, head_rewards
from lm.stages.labels import labelled_pairs
from lm.stages.policies import policies
from lm.stages.rewards import reward, stored_rewards
from lm.stages.run import Run, once
from lm.stages.subsets import subset
from lm.stages.trainings import accuracy, length_coefficient, sft

STUDENT = "dpo"
"""The method of the student."""


def described(run: Run) -> dict[str, Any]:
    """Of D_rho: `pairs`, `prompts`, `passes` over the pairs by a policy's training, and `disagreement`, the chance that
    two labels of one pair differ; None where the judge gives none."""
    learnt, training = subset(run, MAIN), run.config.policy
    passes = training.epochs or (training.max_steps or 0) * training.batch_size / len(learnt)
    prompts = len(numbered(digests(texts(learnt, "prompt")))[1])
    return {"pairs": len(learnt), "prompts": prompts, "passes": passes, "disagreement": _disagreement(run, learnt)}


def _disagreement(run: Run, pairs: Dataset) -> float | None:
    """Of the judge's own labels, as its noise says."""
    if run.config.data.labels != "oracle":
        return None
    if (sharpness := run.config.judge.sharpness) is None:
        return 0.0
    first = expit(sharpness * np.subtract(*(numbers(pairs, name) for name in ORACLE)))
    return float(np.mean(2 * first * (1 - first)))


@once
def with_heads(run: Run) -> Run | None:
    """The run with a frozen reward head for a reward model; None where pi_ref sampled the pairs, of which there are no
    states."""
    config = run.config
    if config.data.on_policy.pairs is not None:
        return None
    adapters = replace(config.lora, stages=[stage for stage in config.lora.stages if stage != "reward"])
    head = TrainingConfig(train="head")
    return run.like(replace(config, methods=[STUDENT], sweep={}, reward=head, lora=adapters))


def shared_states(run: Run) -> None:
    """Makes what the teachers of all D_rho have in common."""
    if run.config.data.rewards == "models" and (heads := with_heads(run)) is not None:
        features(heads)


def teacher(run: Run) -> dict[str, Any] | None:
    """`_told` of the rewards that are given in place of a reward model's, or else of a frozen reward head on D_rho,
    whose penalty these pairs chose; None where there is none, see `with_heads`."""
    pairs = labelled_pairs(run, "valid")
    if run.config.data.rewards != "models":
        return _told(run, pairs, *map(torch.from_numpy, stored_rewards(run, pairs, MAIN)))
    if (heads := with_heads(run)) is None:
        return None
    return _told(run, pairs, *head_rewards(heads, reward(heads, MAIN), pairs))


def students(run: Run) -> list[dict[str, Any]]:
    """Of DPO, in each of its settings after its last step: `setting`, and `_told` of the implicit reward."""
    pairs, methods = labelled_pairs(run, "valid"), run.config.settings(STUDENT)
    models = [sft(run).path, *(policy.path for policy in policies(run, STUDENT))]
    opened = (open_policy(model, tokenizer(run), sized(run)) for model in models)
    reference, *scored = (score_pairs(policy, pairs, "the student on validation pairs") for policy in opened)
    ratios = ([own - base for own, base in zip(sides, reference, strict=True)] for sides in scored)
    return [
        {"setting": asdict(method), **_told(run, pairs, *sides)} for method, sides in zip(methods, ratios, strict=True)
    ]


def _told(run: Run, pairs: Dataset, chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, Any]:
    """`accuracy` and `length_coefficient`, as of `lm.stages.trainings`, of rewards, [N] each."""
    return {
        "accuracy": accuracy(run, pairs, chosen, rejected),
        "length_coefficient": length_coefficient(pairs, chosen, rejected),
    }
