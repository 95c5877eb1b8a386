"""Mini-batches: how rows become one, how it is cut into micro-batches, and the options that say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from lm.data import scored, votes
from lm.logprobs.completions import collate

Batch = dict[str, Any]
"""ids [N]; input_ids and lengths as of `lm.logprobs.completions.collate`; scores: tensors [N, ...] of SCORES."""

MOST_STEPS, LINES = 25, 10
"""Between two log lines, and lines of a training, where nothing says how often it logs."""


@dataclass
class CompletionArguments(TrainingArguments):  # type: ignore[misc]
    """transformers' options, the limits of a micro-batch and the lines of a log, see `lm.config.TrainingConfig`, and
    `lm.training.trackers`, which are told all of this as the training's config, and `described` first."""

    micro_batch_size: int | None = field(default=None)
    micro_batch_tokens: int | None = field(default=None)
    trackers: list[str] = field(default_factory=list)
    logs: str | None = field(default=None)
    paced: bool = field(default=False)
    """Whether logging_steps is the most that there may be, and the least number of log lines is LINES."""
    described: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As transformers has it; what is described stands beside it, and not in it."""
        own: dict[str, Any] = super().to_dict()
        described: dict[str, Any] = own.pop("described")
        return own | described


def cut(batch: Batch, limits: CompletionArguments, tokens: int | None = None) -> list[tuple[Batch, float]]:
    """A mini-batch cut into micro-batches with weights, ranks x n of them for the least n that keeps the limits, or
    the number of `tokens`, where no gradient is taken.

    Examples of similar length go together, and all parts have about the same number of tokens. Every rank gets n
    parts, as collective operations need; where the examples do not suffice, the first is repeated with weight 0.
    """
    sizes = [sum(example) for example in batch["lengths"]]
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    most, budget = limits.micro_batch_size or len(sizes), limits.micro_batch_tokens or sum(sizes)
    if tokens is not None:
        most, budget = len(sizes), tokens
    for a_rank in range(1, len(sizes) + 1):
        groups = _even(order, sizes, a_rank * limits.world_size)
        if all(len(g) <= 1 or (len(g) <= most and sum(sizes[i] for i in g) <= budget) for g in groups):
            break
    if len(groups) == 1:
        return [(batch, 1.0)]
    examples = batch["input_ids"].split(sizes)
    return [(_part(batch, examples, group), 1.0) if group else (_part(batch, examples, [0]), 0.0) for group in groups]


def _even(order: Sequence[int], tokens: Sequence[int], parts: int) -> list[list[int]]:
    """Consecutive runs of `order`, with about the same tokens each; as few empty ones as can be."""
    groups: list[list[int]] = [[] for _ in range(parts)]
    left, index = sum(tokens), 0
    for part, group in enumerate(groups):
        goal, size = left / (parts - part), 0
        while index < len(order):
            enough = len(order) - index <= parts - part - 1  # one each for the parts to come
            if group and (enough or size + tokens[order[index]] / 2 > goal):
                break
            group.append(order[index])
            size += tokens[order[index]]
            index += 1
        left -= size
    groups[-1].extend(order[index:])
    return groups


def _part(batch: Batch, examples: Sequence[Tensor], group: Sequence[int]) -> Batch:
    return {
        "ids": [batch["ids"][i] for i in group],
        "input_ids": torch.cat([examples[i] for i in group]),
        "lengths": [batch["lengths"][i] for i in group],
        "scores": {name: values[list(group)] for name, values in batch["scores"].items()},
    }


# ---------------------------------------------------------------- collators: dataset rows -> batch

SCORES = scored.NUMBERS
"""Columns of a scored pair that a batch carries; [N], the members' margins [N, K], those of samples [N, S]."""


def probability_of(batch: Batch) -> Tensor | None:
    """[N], how likely each pair's chosen side is the preferred one; None where that is certain for all."""
    probability: Tensor | None = batch["scores"].get(votes.PROBABILITY)
    return probability


def weight_of(batch: Batch) -> Tensor | None:
    """[N], what each pair weighs; None where all weigh 1."""
    weight: Tensor | None = batch["scores"].get(votes.WEIGHT)
    return weight


def agreement(chosen: Tensor, rejected: Tensor, probability: Tensor | None) -> Tensor:
    """Accuracy of each pair, [N]: 1 where the chosen side has the larger value, else 0; by a soft label, how likely it
    agrees with such a value, 1/2 for a tie. Equal values agree with nothing."""
    right = (chosen > rejected).double()
    return right if probability is None else probability * right + (1 - probability) * (rejected > chosen).double()


def sft_collator() -> Callable[[list[dict[str, Any]]], Batch]:
    """Rows with id, prompt_ids, completion_ids."""

    def call(rows: list[dict[str, Any]]) -> Batch:
        packed = collate([r["prompt_ids"] for r in rows], [[r["completion_ids"]] for r in rows])
        return {"ids": [r["id"] for r in rows], "scores": {}, **packed}

    return call


def pair_collator(*, sample: bool = False) -> Callable[[list[dict[str, Any]]], Batch]:
    """Pairs with id, prompt_ids, chosen_ids, rejected_ids (and sample_ids, a list of completions), and those of SCORES
    that are there."""

    def call(rows: list[dict[str, Any]]) -> Batch:
        completions = [[r["chosen_ids"], r["rejected_ids"], *(r["sample_ids"] if sample else [])] for r in rows]
        packed = collate([r["prompt_ids"] for r in rows], completions)
        scores = {
            name: torch.tensor([r[name] for r in rows], dtype=torch.float64) for name in SCORES if name in rows[0]
        }
        return {"ids": [r["id"] for r in rows], "scores": scores, **packed}

    return call
