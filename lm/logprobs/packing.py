"""Packed, prefix-shared rows: where every token lies, and attention that keeps siblings apart.

N examples lie end to end in one row, each as prompt | completion_1 | ... | completion_K. Positions restart after the
prompt for every completion; a completion sees its prompt and itself. So a prompt is computed once, whatever K, and
there is no padding.

Tensor names carry shapes: T tokens, N examples, R completions (of all examples), C completion tokens, S tokens of the
longest example; B batch (1), H heads, D head dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface

from lm.logprobs.past import Past

PACKED = "lm_packed"
"""Name under which `packed_attention` is known to transformers."""

DENSE_LIMIT = 128
"""Examples up to this many tokens are attended to in one masked call for all; longer ones in two calls each."""

QUERY_ROWS = 96
"""Rows of queries attended to at once in blocks: a causal block then computes few scores that are masked."""

KEPT_SCORES = 2**24
"""Most attention probabilities that one layer keeps for the backward; above it the fused kernel takes over."""

FLEX_BLOCK = 128
"""Queries, and keys, that FlexAttention takes or skips together."""

MASK_CELLS = 2**25
"""Most entries of its mask that are looked at together."""


class Layout:
    """Where the tokens of N packed examples lie.

    Args:
        lengths: for each example the tokens of its prompt, then of each completion; all at least 1.
        device: of the index tensors.
    """

    def __init__(self, lengths: Sequence[Sequence[int]], device: torch.device) -> None:
        self.lengths = [tuple(example) for example in lengths]
        self.device = device
        positions, states, targets, ends, starts = [], [], [], [], []
        start = 0
        for prompt, *completions in self.lengths:
            starts.append(start)
            positions.append(np.arange(prompt))
            last_of_prompt, offset = start + prompt - 1, start + prompt
            for count in completions:
                positions.append(np.arange(prompt, prompt + count))
                targets.append(np.arange(offset, offset + count))
                states.append(np.concatenate([[last_of_prompt], np.arange(offset, offset + count - 1)]))
                offset += count
                ends.append(offset - 1)
            start = offset
        self.starts = starts
        self.total = start
        counts = [count for _, *completions in self.lengths for count in completions]
        none = np.empty(0, dtype=np.int64)
        self.positions_T = self._index(np.concatenate(positions))
        """[T], position within prompt followed by the own completion."""
        self.states_C = self._index(np.concatenate([none, *states]))
        """[C], the token whose state predicts each completion token."""
        self.targets_C = self._index(np.concatenate([none, *targets]))
        """[C], the completion tokens."""
        self.rows_C = self._index(np.repeat(np.arange(len(counts)), counts))
        """[C], which completion each belongs to."""
        self.ends_R = self._index(np.array(ends, dtype=np.int64))
        """[R], the last token of each completion."""
        self.counts_R = self._index(np.array(counts))
        """[R], tokens of each completion."""
        self.read_only = False
        """Whether only the outputs at `read_U` are asked for, and the others may be anything finite."""
        self._masks: dict[tuple[int | None, torch.dtype, str], Any] = {}

    @cached_property
    def read_U(self) -> Tensor:
        """[U], in order, the tokens whose last state is read: of a prompt the last, of its completions all."""
        spans = zip(self.starts, self.lengths, strict=True)
        return self._index(np.concatenate([np.arange(s + own[0] - 1, s + sum(own)) for s, own in spans]))

    @cached_property
    def for_last_layer(self) -> Layout:
        """The same, `read_only`."""
        layout = copy.copy(self)
        layout.read_only = True
        return layout

    def keep(self, key: Tensor, value: Tensor) -> None:
        """Keys and values, [1, heads, T, D], that the next attention computed: nobody asks for them later."""

    def _index(self, values: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.device)

    @cached_property
    def blocks_T(self) -> Tensor:
        """[T], within its example: 0 for the prompt, k for the k-th completion."""
        return self._index(np.concatenate([np.repeat(np.arange(len(example)), example) for example in self.lengths]))

    @cached_property
    def examples_T(self) -> Tensor:
        """[T], which example."""
        return self._index(np.repeat(np.arange(len(self.lengths)), [sum(example) for example in self.lengths]))

    def sees(self, query: Any, key: Any, window: int | None = None) -> Any:
        """Whether tokens `query` may look at tokens `key` (index tensors that broadcast)."""
        return _sees(self.positions_T, self.examples_T, self.blocks_T, query, key, window)

    def flex_mask(self, window: int | None) -> BlockMask:
        """[1, 1, T, T], for `flex_attention`.

        What `create_block_mask` gives, without its [T, T] of integers: so many rows at a time as fit MASK_CELLS.
        """
        key = (window, torch.bool, "flex")
        if key not in self._masks:
            # Tensors, not the layout: what is compiled for one batch then serves the next.
            positions, examples, blocks = self.positions_T, self.examples_T, self.blocks_T

            def mask_mod(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
                seen: Tensor = _sees(positions, examples, blocks, query, key, window)
                return seen

            count = -(-self.total // FLEX_BLOCK)
            tokens = torch.arange(count * FLEX_BLOCK, device=self.device)
            inside, tokens = tokens < self.total, tokens.clamp(max=self.total - 1)
            step = max(1, MASK_CELLS // (FLEX_BLOCK * len(tokens))) * FLEX_BLOCK
            anything, everything = [], []
            for start in range(0, len(tokens), step):
                rows = slice(start, start + step)
                allowed = self.sees(tokens[rows, None], tokens[None], window) & inside[rows, None] & inside[None]
                cells = allowed.view(-1, FLEX_BLOCK, count, FLEX_BLOCK)
                anything.append(cells.any(3).any(1))
                everything.append(cells.all(3).all(1))
            full = torch.cat(everything)
            partial_ = torch.cat(anything) & ~full
            self._masks[key] = BlockMask.from_kv_blocks(
                *_listed(partial_),
                *_listed(full),
                BLOCK_SIZE=FLEX_BLOCK,
                mask_mod=mask_mod,
                seq_lengths=(self.total,) * 2,
            )
        mask: BlockMask = self._masks[key]
        return mask

    @cached_property
    def rows_NS(self) -> Tensor:
        """[N, S], the tokens of each example, padded with its first."""
        longest = max(sum(example) for example in self.lengths)
        offsets = np.arange(longest)[None]
        sizes, starts = np.array([sum(example) for example in self.lengths])[:, None], np.array(self.starts)[:, None]
        return self._index(starts + np.where(offsets < sizes, offsets, 0))

    @cached_property
    def back_T(self) -> Tensor:
        """[T], where each token is in the flattened `rows_NS`."""
        longest = self.rows_NS.shape[1]
        return self._index(np.concatenate([n * longest + np.arange(sum(x)) for n, x in enumerate(self.lengths)]))

    def dense_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[N, 1, S, S], additive, over `rows_NS`. Padding repeats a token, whose state nobody takes back."""
        key = (window, dtype, "dense")
        if key not in self._masks:
            rows = self.rows_NS
            inside = torch.zeros(rows.numel(), dtype=torch.bool, device=self.device)
            inside[self.back_T] = True
            allowed = self.sees(rows[:, :, None], rows[:, None, :], window) & inside.view(rows.shape)[:, None, :]
            self._masks[key] = _additive(allowed, dtype)[:, None]
        mask: Tensor = self._masks[key]
        return mask

    def segment_masks(
        self, window: int | None, dtype: torch.dtype, causal_mask: bool = False
    ) -> list[tuple[Tensor | None, Tensor]]:
        """For each example, additive: [P, P] of its prompt, [S - P, S] of its completions. The first is None where it
        is plain causal, unless `causal_mask`."""
        key = (window, dtype, "segments")
        if key not in self._masks:
            masks = []
            for start, (prompt, *completions) in zip(self.starts, self.lengths, strict=True):
                tokens = torch.arange(start, start + prompt + sum(completions), device=self.device)
                inner = None
                if causal_mask or (window is not None and prompt > window):
                    inner = _additive(self.sees(tokens[:prompt, None], tokens[None, :prompt], window), dtype)
                masks.append((inner, _additive(self.sees(tokens[prompt:, None], tokens[None], window), dtype)))
            self._masks[key] = masks
        result: list[tuple[Tensor | None, Tensor]] = self._masks[key]
        return result


def _sees(positions: Any, examples: Any, blocks: Any, query: Any, key: Any, window: int | None) -> Any:
    """The one definition of who sees whom."""
    behind = positions[query] - positions[key]
    allowed = (behind >= 0) & (examples[query] == examples[key]) & ((blocks[key] == 0) | (blocks[query] == blocks[key]))
    return allowed if window is None else allowed & (behind < window)


def _listed(blocks_QK: Tensor) -> tuple[Tensor, Tensor]:
    """As `BlockMask` has it: how many blocks of keys each block of queries has, and which, those first."""
    order = torch.argsort(blocks_QK.int(), dim=1, descending=True, stable=True)
    return blocks_QK.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def _ours(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks exceptions in what of ours runs inside a model's forward: but for those that a shape or an argument that
    does not fit raises (torch's RuntimeError, NotImplementedError), they are faults, not misfits."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except RuntimeError:
            raise
        except Exception as error:
            error.__dict__["of_ours"] = True
            raise

    return call


@torch.compiler.disable  # type: ignore[untyped-decorator]
@_ours
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Layout | Past | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Attention over packed rows, or of one token of each row over its past, in transformers' `AttentionInterface`.
    [1, H, T, D] -> [1, T, H, D].

    Raises:
        NotImplementedError: for what this attention would otherwise ignore (position bias, dropout, other masks), or
            where the architecture did not pass the layout on. The trial in `lm.logprobs` turns that into a fallback.
    """
    if packed is None:
        raise NotImplementedError(
            f"no layout reached {type(module).__name__}: a plain forward goes inside `with CompletionModel.stock()`, "
            "unless the architecture does not pass its arguments on"
        )
    ignored = [name for name in ("position_bias", "attn_bias") if extra.get(name) is not None]
    ignored += ["attention_mask"] if attention_mask is not None else []
    ignored += (
        ["bidirectional attention"]
        if (extra.get("is_causal") is False or module.__dict__.get("is_causal") is False)
        else []
    )
    if ignored or dropout:
        raise NotImplementedError(f"packed rows do not know {', '.join(ignored) or f'attention dropout ({dropout})'}")
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings come back in float32
        # Blocks stay in float32: on a CPU faster than the fused kernel's 16 bits, whose backward is slow, and exact.
        kind = query.device.type
        dtype = torch.float32 if kind == "cpu" else torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if isinstance(packed, Past):
        with torch.autocast(query.device.type, enabled=False):
            later = packed.attend(
                query, key, value, scaling=scaling, window=sliding_window, softcap=softcap, sinks_H=s_aux
            )
        return later, None
    packed.keep(key, value)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if softcap is not None or s_aux is not None:
        attend: Callable[..., Tensor] = partial(_explicit_attention, softcap=softcap, sinks_H=s_aux)
        out = _attend_segments(query, key, value, packed, sliding_window, scaling, attend, causal_mask=True)
    elif max(map(sum, packed.lengths)) <= DENSE_LIMIT:
        out = _attend_dense(query, key, value, packed, sliding_window, scaling)
    elif _fits_blocks(query, packed, sliding_window):
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        with torch.autocast(query.device.type, enabled=False):
            out = _BlockAttention.apply(query, key, value, packed, sliding_window, scale)  # type: ignore[no-untyped-call]
    else:
        attend = nn.functional.scaled_dot_product_attention
        out = _attend_segments(query, key, value, packed, sliding_window, scaling, attend)
    return out.transpose(1, 2), None


def _attend_dense(
    query: Tensor, key: Tensor, value: Tensor, packed: Layout, window: int | None, scaling: float | None
) -> Tensor:
    """One masked call over the examples as padded rows."""
    rows_NS = packed.rows_NS

    def spread(states: Tensor) -> Tensor:
        return states[0].transpose(0, 1)[rows_NS.flatten()].view(*rows_NS.shape, *states.shape[1::2]).transpose(1, 2)

    out = nn.functional.scaled_dot_product_attention(
        spread(query), spread(key), spread(value), packed.dense_mask(window, query.dtype), scale=scaling
    )
    return out.transpose(1, 2).flatten(0, 1)[packed.back_T].transpose(0, 1)[None]


def _attend_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Layout,
    window: int | None,
    scaling: float | None,
    attend: Callable[..., Tensor],
    *,
    causal_mask: bool = False,
) -> Tensor:
    """Two calls an example: the prompt causally on itself, all completions on prompt and completions with a mask."""
    sizes = [sum(example) for example in packed.lengths]
    masks = packed.segment_masks(window, query.dtype, causal_mask)
    out = []
    queries, keys, values = (torch.split(states, sizes, 2) for states in (query, key, value))
    for (prompt, *_), (inner, outer), q, k, v in zip(packed.lengths, masks, queries, keys, values, strict=True):
        own = (q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt])
        out.append(attend(*own, inner, is_causal=inner is None, scale=scaling))
        out.append(attend(q[:, :, prompt:], k, v, outer, scale=scaling))
    return torch.cat(out, 2)


def _explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
    is_causal: bool = False,
) -> Tensor:
    """Attention with capped scores (Gemma 2) or a learned sink for each head (GPT-OSS), which no fused kernel has."""
    assert not is_causal
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores + mask
    if sinks_H is not None:
        scores = torch.cat([scores, sinks_H.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], 3)
    weights = scores.softmax(3, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return weights[..., : key.shape[2]] @ value


def _blocks(packed: Layout) -> Iterator[tuple[int, int, int, int | None]]:
    """(first key, first query, end of keys and queries, the example if these are its completions)."""
    for index, (start, (prompt, *completions)) in enumerate(zip(packed.starts, packed.lengths, strict=True)):
        for first in range(prompt - 1 if packed.read_only else 0, prompt, QUERY_ROWS):
            yield start, start + first, start + min(first + QUERY_ROWS, prompt), None
        yield start, start + prompt, start + prompt + sum(completions), index


def _fits_blocks(query: Tensor, packed: Layout, window: int | None) -> bool:
    """Whether `_BlockAttention` gains: on a CPU, in full precision, with prompts that no window cuts."""
    if query.device.type != "cpu" or query.dtype.itemsize < 4:
        return False
    if window is not None and any(prompt > window for prompt, *_ in packed.lengths):
        return False
    if not query.requires_grad:  # nothing is kept
        return True
    scores = sum((end - first) * (end - start) for start, first, end, _ in _blocks(packed))
    return query.shape[1] * scores <= KEPT_SCORES


class _BlockAttention(torch.autograd.Function):
    """softmax(scale q k^T + mask) v, a few rows of queries at a time, with the probabilities kept for the backward: on
    a CPU faster than the fused kernel, whose backward computes them again."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, packed: Layout, window: int | None, scale: float
    ) -> Tensor:
        (q, k, v), (_, heads, _, size) = (query[0] * scale, key[0], value[0]), query.shape
        out = (q.new_zeros if packed.read_only else q.new_empty)(packed.total, heads, size).transpose(0, 1)
        masks = packed.segment_masks(window, q.dtype)
        later = torch.full((QUERY_ROWS, QUERY_ROWS), float("-inf"), dtype=q.dtype).triu_(1)
        kept = []
        for start, first, end, index in _blocks(packed):
            scores = torch.bmm(q[:, first:end], k[:, start:end].transpose(1, 2))
            if index is None:
                scores[:, :, first - start :] += later[: end - first, : end - first]
            else:
                scores += masks[index][1]
            torch.softmax(scores, 2, out=scores)
            out[:, first:end] = torch.bmm(scores, v[:, start:end])
            if any(ctx.needs_input_grad):
                kept.append(scores)
        ctx.save_for_backward(q, k, v)
        ctx.rest = (packed, scale, kept)
        return out[None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v = ctx.saved_tensors
        packed, scale, kept = ctx.rest
        grad_q = torch.zeros_like(q) if packed.read_only else torch.empty_like(q)
        grad_k, grad_v = (q.new_zeros(q.shape) for _ in range(2))
        for (start, first, end, _), probs in zip(_blocks(packed), kept, strict=True):
            own = grad[0, :, first:end]
            grad_v[:, start:end].baddbmm_(probs.transpose(1, 2), own)
            # In place of d loss / d probabilities: d loss / d scores.
            inner = torch.bmm(own, v[:, start:end].transpose(1, 2))
            torch.ops.aten._softmax_backward_data.out(inner, probs, 2, probs.dtype, grad_input=inner)
            grad_q[:, first:end] = torch.bmm(inner, k[:, start:end])
            grad_k[:, start:end].baddbmm_(inner.transpose(1, 2), q[:, first:end])
        return (grad_q * scale)[None], grad_k[None], grad_v[None], None, None, None


class LastLayer:
    """Spares a model's last layer what nobody reads: of a prompt it needs keys and values, but only the last token's
    state. The feed-forward network, and attention in blocks, then run on `Layout.read_U` alone.

    Hooks, which do nothing unless a `Layout` comes by and `on` is set. They are on the layer itself so that
    activation checkpointing, which runs the layer again, runs them again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.on = False
        self._layout: Layout | None = None
        for module in model.modules():  # another one's, or a copy of it: states would be picked twice
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [
                    key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), LastLayer)
                ]:
                    del hooks[key]
        layers = next((module for module in model.modules() if isinstance(module, nn.ModuleList)), None)
        layer = layers[-1] if layers else None
        network = getattr(layer, "mlp", None)
        if layer is not None and isinstance(network, nn.Module):
            layer.register_forward_pre_hook(self._enter, with_kwargs=True)
            network.register_forward_pre_hook(self._pick)
            network.register_forward_hook(self._put_back)

    @_ours
    def _enter(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        layout = kwargs.get("packed") if self.on else None
        self._layout = layout
        return None if layout is None else (args, kwargs | {"packed": layout.for_last_layer})

    @_ours
    def _pick(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if self._layout is None else (args[0][:, self._layout.read_U], *args[1:])

    @_ours
    def _put_back(self, _: nn.Module, __: Any, out: Any) -> Tensor | None:
        if self._layout is None:
            return None
        if not isinstance(out, Tensor):
            raise NotImplementedError("a feed-forward network of the last layer that gives more than its states")
        return out.new_zeros(out.shape[0], self._layout.total, *out.shape[2:]).index_copy(1, self._layout.read_U, out)


AttentionInterface.register(PACKED, packed_attention)
