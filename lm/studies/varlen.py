"""Attention of rows that share nothing, by torch's FlashAttention for rows of any length: what sharing a prompt is held
against on a GPU. For measurements alone; the trial of the core does not know it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from lm.logprobs.completions import CompletionModel
from lm.logprobs.packing import PACKED, Layout

VARLEN = "bench_varlen"
"""Its name in transformers' `AttentionInterface`."""


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """[1, H, T, D] -> [1, T, H, D], in 16 bits.

    Raises:
        ValueError: an example has several completions, which would see each other; or there is what this ignores.
    """
    if any(len(example) != 2 for example in packed.lengths):
        raise ValueError("rows by FlashAttention have one completion each")
    if attention_mask is not None or dropout or sliding_window is not None:
        raise ValueError("rows by FlashAttention know no mask, dropout or window")
    sizes = [sum(example) for example in packed.lengths]
    ends = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=query.device)
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    query, key, value = (states[0].transpose(0, 1).to(dtype).contiguous() for states in (query, key, value))
    longest, grouped = max(sizes), query.shape[1] != key.shape[1]
    out: Any = varlen_attn(
        query, key, value, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=grouped
    )
    return out[None], None


def use_varlen(model: CompletionModel, longest: int) -> None:
    """Settles the model's route to this, untried (tests compare it), for rows of `longest` tokens."""
    model.route, model.tried = "packed", longest
    model.sharing = (PACKED, False)  # with the layout passed on, and the last layer whole
    model.model.set_attn_implementation(VARLEN)


AttentionInterface.register(VARLEN, varlen_attention)
