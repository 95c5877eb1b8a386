"""What every route has to give: transformers' plain forward of each row alone, on examples made up for a trial.

Tensor names carry shapes: R completions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lm.logprobs.kernels import CHUNK_LOGITS, at_least_float32, rewards_of

if TYPE_CHECKING:
    from lm.logprobs.completions import CompletionModel, CompletionOutput

Example = tuple[list[int], list[list[int]]]
"""A prompt and its completions."""

# ---------------------------------------------------------------- positions


def position_limit(config: PretrainedConfig) -> int | None:
    """Longest row, tokens, whose log-prob depends on nothing but itself; None where there is no such limit.

    Rotary frequencies are chosen by the longest row of a batch beyond the context that the model was first trained
    with if they are of kind "longrope", and beyond `max_position_embeddings` if of kind "dynamic". Keys that Doge's
    attention keeps are chosen by scores, many of which are alike: which of them are kept depends on a row's padding.
    """
    return min(_limits(config), default=(None, ""))[0]


def _limits(config: PretrainedConfig) -> list[tuple[int, str]]:
    """What `position_limit` is the least of, and what is chosen by the batch beyond it."""
    text = config.get_text_config()
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    most = getattr(text, "max_position_embeddings", None)
    limits = [(getattr(text, "keep_window_size", None), "the keys that are attended to (keep_window_size")]
    for rope in (given, *(value for value in given.values() if isinstance(value, dict))):
        kind = str(rope.get("rope_type", rope.get("type", "")))
        if kind == "longrope":
            own = rope.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            limits.append((own or most, "the rotary frequencies (rope_scaling"))
        elif "dynamic" in kind:
            limits.append((most, "the rotary frequencies (rope_scaling"))
    return [(int(limit), what) for limit, what in limits if limit is not None]


def check_positions(config: PretrainedConfig, longest: int, what: str) -> None:
    """Raises ValueError where rows of up to `longest` tokens would depend on their neighbours, see `position_limit`.

    Args:
        config: the model's.
        longest: of prompt and completion.
        what: the model, or the options that say how long rows may be, for the message.
    """
    limit, chosen = min(_limits(config), default=(longest, ""))
    if longest > limit:
        raise ValueError(
            f"{what}: rows may have {longest} tokens, but beyond {limit} {chosen} in the model's config.json) are "
            "chosen by the longest row of a batch, so that a row's log-prob depends on its neighbours; "
            f"data.max_prompt_length + data.max_completion_length + 1 must be at most {limit}"
        )


# ---------------------------------------------------------------- examples


def examples_of(vocabulary: Sequence[int], tokens: int, seed: int = 0) -> list[Example]:
    """A short example, one with a row of `tokens` tokens, and another short one; two completions each.

    Args:
        vocabulary: token ids to draw from.
        tokens: of the longest row, at least 2.
        seed: of the draws.
    """
    rng = random.Random(seed)

    def drawn(count: int) -> list[int]:
        return [rng.choice(vocabulary) for _ in range(count)]

    last = max(1, min(tokens // 2, 16))
    made = []
    for prompt, *counts in ((5, 3, 6), (tokens - last, last, max(1, last // 2)), (2, 4, 3)):
        size = max(1, min(prompt, tokens - 2))
        made.append((drawn(size), [drawn(max(1, min(count, tokens - size))) for count in counts]))
    return made


def vocabulary_of(model: PreTrainedModel) -> list[int]:
    """Token ids without those that the config gives a meaning: padding, images, ends."""
    text = model.config.get_text_config()
    size = min(getattr(text, "vocab_size", math.inf), model.get_input_embeddings().weight.shape[0])
    special = set(_special(model.config.to_dict()))
    plain = [token for token in range(size) if token not in special]
    return plain if len(plain) > 1 else list(range(size))


def _special(config: dict[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special({str(key): inner for key, inner in value.items()})
        elif name.endswith(("_token_id", "_token_ids", "_token_index")):
            yield from (value if isinstance(value, list) else [value])


def rows_of(examples: Sequence[Example]) -> list[tuple[list[int], int]]:
    """(prompt and one completion, tokens of the completion) of every completion."""
    return [([*prompt, *own], len(own)) for prompt, completions in examples for own in completions]


# ---------------------------------------------------------------- what is right


@dataclass(frozen=True)
class Values:
    """Of R completions; see `lm.logprobs.completions.CompletionOutput`."""

    logps: Tensor | None
    rewards: Tensor | None
    lengths: Tensor

    def _pairs(self, got: Values | CompletionOutput) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """(what, own numbers, the other's, what the difference may be in proportion to)."""
        for what in ("logps", "rewards"):
            mine, other = getattr(self, what), getattr(got, what)
            if mine is not None and other is not None:
                mine, other = (values.detach().double() for values in (mine, other))
                yield what, mine, other, mine.abs() + (self.lengths if what == "logps" else 1)

    def excess(self, got: Values | CompletionOutput) -> float:
        """How far the other is off, a token and in proportion to the numbers' size; infinite where not finite."""
        each = [((mine - other).abs() / size).nan_to_num(math.inf) for _, mine, other, size in self._pairs(got)]
        return max(float(values.max()) for values in each)

    def problem(self, got: Values | CompletionOutput, tolerance: float) -> str | None:
        """The first number whose `excess` is above the tolerance, in words."""
        for what, mine, other, size in self._pairs(got):
            excess = ((mine - other).abs() / size).nan_to_num(math.inf)
            row = int(excess.argmax())
            if float(excess[row]) > tolerance:
                count = int(self.lengths[row])
                return f"{what} {float(other[row]):.6g} instead of {float(mine[row]):.6g} ({count} tokens)"
        return None

    def largest(self, got: Values | CompletionOutput) -> float:
        """Largest difference, nats (or of rewards)."""
        return max(float((mine - other).abs().max()) for _, mine, other, _ in self._pairs(got))


def alone(model: CompletionModel, rows: Sequence[tuple[list[int], int]]) -> Values:
    """The definition: transformers' own forward of each row alone, no padding, no mask, and log-softmax.

    Args:
        model: its attention is the stock one meanwhile.
        rows: token ids, and how many of the last are the completion.
    """
    logps, rewards = [], []
    device = model.model.device
    with model.stock() as plain:
        for ids, count in rows:
            row = torch.tensor([ids], device=device)
            inputs = {"input_ids": row, "use_cache": False}
            if model.is_reward_model:
                states = model.call(plain.base_model, **inputs).last_hidden_state
                rewards.append(rewards_of(plain.score, states[:, -1])[0])
                continue
            large = len(ids) * getattr(plain.config.get_text_config(), "vocab_size", 0) > CHUNK_LOGITS
            keep = {"logits_to_keep": count + 1} if large else {}
            with model.last_states() as found:
                output = model.call(plain, **inputs, **keep)
            logprobs = at_least_float32(output.logits[0, -count - 1 : -1]).log_softmax(-1)
            logps.append(logprobs.gather(1, row[0, -count:, None]).sum())
            if model.reward_head is not None:
                rewards.append(rewards_of(model.reward_head, found[-1][:, -1])[0])
    lengths = torch.tensor([count for _, count in rows], device=device)
    return Values(torch.stack(logps) if logps else None, torch.stack(rewards) if rewards else None, lengths)


def some(values: Values, rows: list[int]) -> Values:
    """Some rows of them."""
    logps, rewards = (None if part is None else part[rows] for part in (values.logps, values.rewards))
    return Values(logps, rewards, values.lengths[rows])


@contextmanager
def trying(model: CompletionModel, *, gradients: bool = False) -> Iterator[None]:
    """Eval mode, and no gradients unless asked for; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, training in modes:
            module.training = training


# ---------------------------------------------------------------- exceptions


def of_the_model(error: Exception) -> bool:
    """Whether an exception says that the architecture does not fit: it came out of the model's own forward, and is
    neither a fault of the attention that is ours in it, nor a lack of memory."""
    marks = error.__dict__
    return bool(marks.get("in_forward")) and not marks.get("of_ours") and not isinstance(error, torch.OutOfMemoryError)


def described(error: Exception) -> str:
    """Type and text, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:297] + '...'}"
