"""What was computed of earlier tokens, kept for sampling: keys and values, a prompt's once for all that it is sampled.

G groups have a prompt each and K slots for completions; the buffers are made once. A step computes one token of each of
B rows, which lie end to end in one packed row, as prompts do: no padding is computed but in attention, and rows of any
length go together. Whoever has ended is in no row, and its group's place goes to another prompt.

Tensor names carry shapes: G groups, K slots of a group, S = G K slots, B rows (slots that are drawn for), H heads, of
which N have keys and R = H / N share them, P prompt tokens, C completion tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Indices = npt.NDArray[np.int64]


@dataclass
class Kept:
    """Of one attention: keys and values of prompts, [G, N, P, D], and of completions, [S, N, C, D]."""

    prompts: list[Tensor]
    own: list[Tensor]


class Past:
    """The cache, and attention over it. Passed in place of a `Layout`, it is what a step's attention looks at.

    Args:
        groups: G.
        each: K.
        prompt: most tokens of a prompt.
        completion: most tokens of a completion that are looked at.
    """

    def __init__(self, groups: int, each: int, prompt: int, completion: int) -> None:
        self.each, self.room = each, (prompt, completion)
        self.prompts_G: Indices = np.zeros(groups, dtype=np.int64)
        """Tokens of each group's prompt; 0 where there is none."""
        self.layers: list[Kept] = []
        """In the order in which a forward pass attends, which is the same in each: a layer may be run twice."""
        self._at = 0

    @property
    def groups(self) -> int:
        """G."""
        return len(self.prompts_G)

    # ------------------------------------------------------------ what is kept

    def begin(self) -> None:
        """Before each forward pass."""
        self._at = 0

    def keep(self, key: Tensor, value: Tensor, groups: Sequence[int]) -> None:
        """Keys and values, [1, N, T, D], that the next attention computed of these groups' prompts, end to end."""
        if self._at == len(self.layers):
            (prompt, completion), sizes = self.room, [(own.shape[1], own.shape[3]) for own in (key, value)]
            self.layers.append(
                Kept(
                    [key.new_zeros(self.groups, heads, prompt, size) for heads, size in sizes],
                    [key.new_zeros(self.groups * self.each, heads, completion, size) for heads, size in sizes],
                )
            )
        for buffer, states in zip(self._next().prompts, (key[0], value[0]), strict=True):
            start = 0
            for group in groups:
                count = int(self.prompts_G[group])
                buffer[group, :, :count] = states[:, start : start + count]
                start += count

    def copy(self, source: int, targets: Sequence[int]) -> None:
        """A group's prompt for other groups as well."""
        count = int(self.prompts_G[source])
        self.prompts_G[list(targets)] = count
        for layer in self.layers:
            for buffer in layer.prompts:
                for target in targets:
                    buffer[target, :, :count] = buffer[source, :, :count]

    def only(self, groups: Indices) -> None:
        """Drops all other groups."""
        slots = torch.from_numpy((groups[:, None] * self.each + np.arange(self.each)).reshape(-1))
        kept, self.prompts_G = torch.from_numpy(groups), self.prompts_G[groups]
        for layer in self.layers:
            for buffers, index in ((layer.prompts, kept), (layer.own, slots)):
                for i, buffer in enumerate(buffers):
                    buffers[i] = buffer[index.to(buffer.device)]

    def _next(self) -> Kept:
        self._at += 1
        return self.layers[self._at - 1]

    # ------------------------------------------------------------ a step

    def step(self, slots_B: Indices, counts_B: Indices) -> None:
        """Before the forward pass of one token of each of these slots, which have so many before it, all kept."""
        self.begin()
        own_S = np.zeros(self.groups * self.each, dtype=np.int64)
        own_S[slots_B] = counts_B
        self.slots_B, self.counts_B, self.own_S = map(torch.from_numpy, (slots_B, counts_B, own_S))
        self.longest, self.newest = int(self.prompts_G.max()), int(counts_B.max()) + 1
        self._masks: dict[tuple[int | None, torch.dtype], tuple[Tensor, Tensor]] = {}

    def _mask(self, window: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Additive: [G, 1, 1, K or 1, P] over prompts and [G, 1, 1, K, C] over completions. A slot that no row is in
        sees the first token of what was in it, as what sees nothing would be NaN."""
        if (window, dtype) not in self._masks:
            own_GK, prompts_G = self.own_S.view(self.groups, self.each), torch.from_numpy(self.prompts_G)
            tokens_P, tokens_C = torch.arange(self.longest), torch.arange(self.newest)
            seen_P = (tokens_P < prompts_G[:, None])[:, None]
            seen_C = tokens_C <= own_GK[:, :, None]
            if window is not None:
                seen_P = seen_P & ((prompts_G[:, None] + own_GK)[:, :, None] - tokens_P < window)
                seen_C = seen_C & (own_GK[:, :, None] - tokens_C < window)
            masks = (torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf) for seen in (seen_P, seen_C))
            of_prompts, of_own = (mask[:, None, None].to(self.slots_B.device) for mask in masks)
            self._masks[window, dtype] = of_prompts, of_own
        return self._masks[window, dtype]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
        sinks_H: Tensor | None,
    ) -> Tensor:
        """Keeps the new tokens' keys and values and attends. [1, H, B, D], [1, N, B, D] -> [1, B, H, D].

        One batched product over a group's prompt serves its K slots; on a CPU batched products of few rows are at least
        about as fast as the fused kernel.
        """
        layer = self._next()
        for buffer, states in zip(layer.own, (key, value), strict=True):
            buffer[self.slots_B, :, self.counts_B] = states[0].transpose(0, 1)
        (_, heads, _, size), shared, groups, each = query.shape, key.shape[1], self.groups, self.each
        ratio, longest, newest = heads // shared, self.longest, self.newest
        spread = query.new_zeros(groups * each, heads, size)
        spread[self.slots_B] = query[0].transpose(0, 1) * (size**-0.5 if scaling is None else scaling)
        of_group = (
            spread.view(groups, each, shared, ratio, size).permute(0, 2, 3, 1, 4).reshape(groups * shared, -1, size)
        )
        of_slot = spread.view(groups * each * shared, ratio, size)
        (prompt_keys, prompt_values), (own_keys, own_values) = (
            [buffer[:, :, :most].flatten(0, 1) for buffer in buffers]
            for buffers, most in ((layer.prompts, longest), (layer.own, newest))
        )
        over_prompt = torch.bmm(of_group, prompt_keys.transpose(1, 2)).view(groups, shared, ratio, each, longest)
        over_own = torch.bmm(of_slot, own_keys.transpose(1, 2)).view(groups, each, shared, ratio, newest)
        over_own = over_own.permute(0, 2, 3, 1, 4)
        if softcap is not None:
            over_prompt, over_own = (softcap * (scores / softcap).tanh() for scores in (over_prompt, over_own))
        scores = query.new_empty(groups, shared, ratio, each, longest + newest + (sinks_H is not None))
        masks = self._mask(window, query.dtype)
        torch.add(over_prompt, masks[0], out=scores[..., :longest])
        torch.add(over_own, masks[1], out=scores[..., longest : longest + newest])
        if sinks_H is not None:
            scores[..., -1] = sinks_H.to(scores.dtype).view(shared, ratio, 1)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
        from_prompt = torch.bmm(weights.view(groups * shared, ratio * each, -1)[..., :longest], prompt_values)
        on_own = weights[..., longest : longest + newest].permute(0, 3, 1, 2, 4)
        from_own = torch.bmm(on_own.reshape(groups * each * shared, ratio, newest), own_values)
        from_prompt = from_prompt.view(groups, shared, ratio, each, -1).permute(0, 3, 1, 2, 4)
        both: Tensor = from_own.view(from_prompt.shape) + from_prompt
        return both.view(groups * each, heads, -1)[self.slots_B][None]
