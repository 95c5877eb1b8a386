"""Our log-probs beside those of transformers' plain forward of each row alone.

The reference shares no code with `lm.logprobs`: a row is prompt and completion, by itself, without a mask, and a
log-prob is read off its logits.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lm.logprobs.completions import CompletionModel, Route, collate

Example = tuple[list[int], list[list[int]]]
"""A prompt and its completions, token ids."""

RELATIVE = 2e-5
"""How far a log-prob may be off in float32, for each of its tokens and each nat: rounding, and no wrong position."""


@dataclass(frozen=True)
class Difference:
    """The value that is furthest from its reference, in units of what rounding explains."""

    value: float
    """nats (or the reward's unit), absolute."""
    limit: float
    """what rounding explains at this value."""

    @property
    def ok(self) -> bool:
        """Whether rounding explains it; NaN is not."""
        return self.value <= self.limit


def examples(tokens: Sequence[int], end: int, *, completions: int, prompt: int, seed: int = 0) -> list[Example]:
    """Three examples of unequal lengths, whose prompts and completions differ.

    Args:
        tokens: ids to draw from.
        end: the token that ends a completion.
        completions: of each prompt.
        prompt: tokens of the longest prompt, at least 6.
        seed: of the draws.
    """
    rng = random.Random(seed)

    def drawn(count: int) -> list[int]:
        return [rng.choice(tokens) for _ in range(count)]

    return [
        (drawn(length), [[*drawn(3 + (at + own) % 4), end] for own in range(completions)])
        for at, length in enumerate((prompt, prompt - 5, max(2, prompt // 2)))
    ]


def rows_of(examples: Sequence[Example]) -> Iterator[tuple[list[int], list[int]]]:
    """Each completion with its prompt."""
    return ((prompt, completion) for prompt, own in examples for completion in own)


def plain_logps(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """Log-prob of each completion by the plain forward of its row alone, nats, [R], float64 where the logits may be."""
    return torch.stack([_plain_row(model, *row) for row in rows_of(examples)])


def _plain_row(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> Tensor:
    ids = torch.tensor([prompt + completion], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    picked = logits.double().log_softmax(-1)[torch.arange(len(completion)), completion]
    total: Tensor = picked.sum()
    return total


def values(model: CompletionModel, examples: Sequence[Example], route: Route) -> Tensor:
    """Log-probs, or rewards of a reward model, by one of our routes, [R].

    A model that has settled on packed rows is left so.
    """
    batch = collate([prompt for prompt, _ in examples], [own for _, own in examples])
    before, model.route = model.route, route
    try:
        if route == "padded":
            with model.stock():
                output = model(batch["input_ids"].to(model.model.device), batch["lengths"])
        else:
            output = model(batch["input_ids"].to(model.model.device), batch["lengths"])
    finally:
        model.route = before
    result: Tensor = output.rewards if model.is_reward_model else output.logps
    return result


def difference(values: Tensor, reference: Tensor, examples: Sequence[Example]) -> Difference:
    """The worst of R values."""
    values, reference = values.detach().double().cpu(), reference.detach().double().cpu()
    counts = torch.tensor([len(completion) for _, completion in rows_of(examples)], dtype=torch.float64)
    off, allowed = (values - reference).abs(), RELATIVE * (counts + reference.abs())
    worst = int((off / allowed).nan_to_num(float("inf"), posinf=float("inf")).argmax())
    return Difference(off[worst].item(), allowed[worst].item())
