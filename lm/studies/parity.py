"""Our numbers beside those of transformers' plain forward of each row alone: log-probs, rewards, gradients.

The reference shares no code with `lm.logprobs`: a row is prompt and completion, by itself, without a mask, and a
log-prob is read off its logits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
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
    return picked.sum()


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


def gradients(model: torch.nn.Module, values: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Gradient of the sum of values by each parameter that has one."""
    model.zero_grad(set_to_none=True)
    values().double().sum().backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def gradient_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of a parameter's gradient, in norm, beside its own norm or a thousandth of that of all.

    Returns it, and the parameter. Raises no error where one of them lacks a gradient: that counts as zero.
    """
    total = torch.stack([g.double().norm() for g in other.values()]).norm().item() or 1.0

    def off(name: str) -> float:
        pair = [gradients.get(name) for gradients in (one, other)]
        known = [g.double() for g in pair if g is not None]
        size = 0.0 if pair[1] is None else pair[1].double().norm().item()
        apart = (known[0] - known[1] if len(known) == 2 else known[0]).norm().item()
        return apart / max(size, 1e-3 * total)

    return max(((off(name), name) for name in one.keys() | other.keys()), default=(0.0, ""))
