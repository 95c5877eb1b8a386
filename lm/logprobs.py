"""The core of the LM side: summed log-probs and end-of-text rewards of any number of completions a prompt.

Training, reference scoring, reward models and diagnostics all go through :class:`CompletionModel`. Prompt and
completions are token ids; a row is prompt followed by one completion, padded on the right, so that the stock causal
forward of any architecture is exact without position ids.

Tensor names carry shapes: R rows (prompt with one completion), T tokens, N completion tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class CompletionOutput:
    """What one forward says about its rows."""

    logps: Tensor | None
    """[R], summed over the completion's tokens, nats; None for a reward model."""
    lengths: Tensor
    """[R], completion tokens."""
    rewards: Tensor | None
    """[R], read at the completion's last token; None without a reward head."""


def collate(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Right-padded rows of prompt and completion.

    Args:
        prompts: R prompts, at least one token each (the first completion token is predicted from the last of them).
        completions: R completions, at least one token each.
        pad_id: any valid token id; padding is masked and read by nothing.

    Returns:
        input_ids [R, T] int64, attention_mask [R, T] int64, completion_mask [R, T] bool, true on completion tokens.
    """
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not prompt or not completion:
            side = "completion" if prompt else "prompt"
            raise ValueError(f"row {row} has an empty {side}; prompt and completion need at least one token each")
    longest = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    input_ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    completion_mask = torch.zeros(input_ids.shape, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor([*prompt, *completion])
        attention_mask[row, :end] = 1
        completion_mask[row, len(prompt) : end] = True
    return {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": completion_mask}


class CompletionModel(nn.Module):
    """A transformers model seen as a function from rows to log-probs, rewards, or both.

    Wraps a causal LM (log-probs; rewards too with `reward_head`, as DRDO needs) or a sequence-classification model with
    one label (rewards). One module with one `forward`, so that DDP, FSDP and the Trainer see every parameter in it.
    """

    def __init__(self, model: PreTrainedModel, *, reward_head: bool = False) -> None:
        super().__init__()
        self.model = model
        self.is_reward_model = hasattr(model, "score")
        if not self.is_reward_model and model.get_output_embeddings() is None:
            raise ValueError(f"{type(model).__name__} has neither a language-model head nor a `score` head")
        if self.is_reward_model and model.config.num_labels != 1:
            raise ValueError(f"a reward model has one label, but {type(model).__name__} has {model.config.num_labels}")
        # Drawn from the global generator: the Trainer's seed makes it reproducible.
        hidden = model.config.get_text_config().hidden_size
        self.reward_head = nn.Linear(hidden, 1, bias=False, dtype=model.dtype) if reward_head else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> CompletionOutput:
        """Arguments as :func:`collate` makes them, [R, T]."""
        lengths = completion_mask.sum(1)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        ends = attention_mask.sum(1) - 1
        if self.is_reward_model:
            hidden_RTH = self.model.base_model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state
            return CompletionOutput(None, lengths, _at_least_float32(self.model.score(hidden_RTH[rows, ends])[:, 0]))
        # Position t is predicted by the state at t - 1; the head runs only where some row has a completion token.
        is_target = completion_mask[:, 1:]
        keep = is_target.any(0).nonzero()[:, 0]
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            logits_to_keep=keep,
            output_hidden_states=self.reward_head is not None,
        )
        is_target = is_target[:, keep]
        targets_N = input_ids[:, 1:][:, keep][is_target]
        logps_N = -nn.functional.cross_entropy(_at_least_float32(output.logits[is_target]), targets_N, reduction="none")
        row_N = rows[:, None].expand_as(is_target)[is_target]
        logps = torch.zeros(len(rows), dtype=logps_N.dtype, device=logps_N.device).index_add(0, row_N, logps_N)
        rewards = None
        if self.reward_head is not None:
            rewards = _at_least_float32(self.reward_head(output.hidden_states[-1][rows, ends])[:, 0])
        return CompletionOutput(logps, lengths, rewards)

    # What the Trainer asks of a model, passed on.
    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Activation checkpointing of the wrapped model."""
        self.model.gradient_checkpointing_enable(*args, **kwargs)


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
