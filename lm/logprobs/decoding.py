"""Completions a token at a time from a model that takes packed rows: the loop around `lm.logprobs.past`.

Each distinct prompt is computed once, packed with others. Rows that end leave at once; when enough groups have gone,
waiting ones take their places, and when none waits the cache shrinks.

Tensor names carry shapes as in `lm.logprobs.past`; V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm.logprobs.completions import CompletionModel, Ids
from lm.logprobs.packing import PACKED, Layout
from lm.logprobs.past import Indices, Past

TOGETHER = 16
"""Most rows of a prompt in a group: with more of them attention gains little, and their places would stay theirs until
the last has ended."""
ENTER = 4
"""Waiting groups enter when one in so many places is free: a forward pass of few prompts costs more a token."""


Choose = Callable[[Indices, Indices, Tensor], Indices]
"""Rows [B], of each how many tokens it has, logits [B, V] -> a token of each."""


class _Prompts(Layout):
    """Packed prompts, whose keys and values are kept for these groups."""

    def __init__(self, past: Past, prompts: Sequence[Ids], groups: Sequence[int], device: torch.device) -> None:
        super().__init__([(len(prompt),) for prompt in prompts], device)
        self.past, self.groups = past, groups
        past.prompts_G[list(groups)] = [len(prompt) for prompt in prompts]
        past.begin()

    def keep(self, key: Tensor, value: Tensor) -> None:
        self.past.keep(key, value, self.groups)


def chunks_of(prompts: Sequence[Ids], each: int) -> list[tuple[int, list[int]]]:
    """(The first row of a prompt, rows of it, `each` at most), those of the longest prompt first."""
    of_prompt: dict[bytes, list[int]] = {}
    for row, prompt in enumerate(prompts):
        of_prompt.setdefault(np.asarray(prompt, dtype=np.int64).tobytes(), []).append(row)
    ordered = sorted(of_prompt.values(), key=lambda rows: len(prompts[rows[0]]), reverse=True)
    return [(rows[0], rows[start : start + each]) for rows in ordered for start in range(0, len(rows), each)]


def most_together(prompts: Sequence[Ids]) -> int:
    """K: the rows that a group has places for, as many as the prompts of most rows have, TOGETHER at most."""
    sizes, counts = np.unique([len(rows) for _, rows in chunks_of(prompts, TOGETHER)], return_counts=True)
    return int(sizes[(sizes * counts).argmax()])


def decode(
    model: CompletionModel,
    prompts: Sequence[Ids],
    choose: Choose,
    done: Callable[[int, list[int]], object],
    *,
    end: int,
    most: int,
    groups: int,
    each: int,
    spare: bool,
) -> None:
    """A completion of each prompt, until the end token or cut off at `most` tokens.

    Args:
        model: a causal LM that takes packed rows with a cache; in eval mode.
        prompts: token ids of each row; rows of one prompt share it.
        choose: the next tokens.
        done: is told each row and its completion when it has ended.
        end: the token that ends a completion.
        most: tokens of a completion, at least 1.
        groups: G, at once.
        each: K.
        spare: as of `lm.logprobs.trial.Trial.packed`, for prompts.
    """
    before = model.sharing
    try:
        with model.stock(), model._attention(PACKED), torch.no_grad():
            model.sharing = (PACKED, spare)
            _Loop(model, prompts, choose, done, end, most, groups, each).run()
    finally:
        model.sharing = before


class _Loop:
    """The state of `decode`. Of the B rows being drawn: their numbers, slots, last tokens, and tokens so far."""

    def __init__(
        self,
        model: CompletionModel,
        prompts: Sequence[Ids],
        choose: Choose,
        done: Callable[[int, list[int]], object],
        end: int,
        most: int,
        groups: int,
        each: int,
    ) -> None:
        self.model, self.prompts, self.choose, self.done, self.end = model, prompts, choose, done, end
        self.waiting = deque(chunks_of(prompts, each))
        groups = min(groups, len(self.waiting))
        self.past = Past(groups, each, len(prompts[self.waiting[0][0]]), max(1, most - 1))
        self.tokens_SC = np.zeros((groups * each, most), dtype=np.int64)
        self.rows_B, self.slots_B, self.last_B, self.counts_B = (np.zeros(0, dtype=np.int64) for _ in range(4))
        self.entered: tuple[int, int, Tensor] | None = None
        """The prompt that came last, by its first row: its group, and the logits of what comes next, [V]."""
        self.spare = model.sharing[1]

    def run(self) -> None:
        """Until no row is left."""
        while self.waiting or len(self.rows_B):
            free = np.flatnonzero(np.bincount(self.slots_B // self.past.each, minlength=self.past.groups) == 0)
            if self.waiting and len(free) * ENTER >= self.past.groups:
                self._enter(free.tolist())
            elif not self.waiting and len(free) * 2 >= self.past.groups:
                self._shrink()
            if len(self.rows_B):
                self._step()

    def _enter(self, free: list[int]) -> None:
        """Waiting rows take these groups' places, and their first tokens."""
        coming = [(group, *self.waiting.popleft()) for group in free[: len(self.waiting)]]
        places: dict[int, list[int]] = {}
        for group, prompt, _ in coming:
            places.setdefault(prompt, []).append(group)
        logits: dict[int, Tensor] = {}
        if self.entered is not None and self.entered[0] in places:  # before another takes the place of what is copied
            prompt, group, logits[prompt] = self.entered
            self.past.copy(group, places[prompt])
        for prompts in self._batches([prompt for prompt in places if prompt not in logits]):
            logits |= zip(prompts, self._computed(prompts, [places[prompt][0] for prompt in prompts]), strict=True)
            for prompt in prompts:
                self.past.copy(places[prompt][0], places[prompt][1:])
        group, prompt, _ = coming[-1]
        self.entered = (prompt, group, logits[prompt].clone())
        rows_B = np.array([row for _, _, rows in coming for row in rows])
        slots_B = np.array([group * self.past.each + k for group, _, rows in coming for k in range(len(rows))])
        logits_BV = torch.stack([logits[prompt] for _, prompt, rows in coming for _ in rows])
        before = (self.rows_B, self.slots_B, self.last_B, self.counts_B)
        self._draw(rows_B, slots_B, np.zeros_like(rows_B), logits_BV)
        now = (self.rows_B, self.slots_B, self.last_B, self.counts_B)
        both = (np.concatenate(pair) for pair in zip(before, now, strict=True))
        self.rows_B, self.slots_B, self.last_B, self.counts_B = both

    def _batches(self, prompts: list[int]) -> Iterator[list[int]]:
        """Cut where a forward pass has as many tokens as one of scoring."""
        start, tokens = 0, 0
        for at, prompt in enumerate(prompts):
            tokens += len(self.prompts[prompt])
            if tokens > self.model.options.scoring_tokens and at > start:
                yield prompts[start:at]
                start, tokens = at, len(self.prompts[prompt])
        if prompts:
            yield prompts[start:]

    def _computed(self, prompts: list[int], groups: list[int]) -> Tensor:
        """Keeps these prompts in these groups; the logits of what comes next, [prompts, V]."""
        ids, device = [self.prompts[prompt] for prompt in prompts], self.model.model.device
        assert all(len(one) for one in ids), "of no token there is nothing that comes next"
        layout = _Prompts(self.past, ids, groups, device)
        self.model.sharing = (PACKED, self.spare)
        ends = torch.tensor([len(one) for one in ids], device=device).cumsum(0) - 1
        return self._forward(np.concatenate(ids), layout.positions_T, layout, ends)

    def _step(self) -> None:
        """One token of each row."""
        self.past.step(self.slots_B, self.counts_B - 1)
        positions = self.past.prompts_G[self.slots_B // self.past.each] + self.counts_B - 1
        self.model.sharing = (PACKED, False)
        every = torch.arange(len(self.rows_B), device=self.model.model.device)
        logits_BV = self._forward(self.last_B, torch.from_numpy(positions), self.past, every)
        self._draw(self.rows_B, self.slots_B, self.counts_B, logits_BV)

    def _forward(self, ids_T: Any, positions_T: Tensor, packed: Layout | Past, keep: Tensor) -> Tensor:
        ids = torch.from_numpy(np.asarray(ids_T, dtype=np.int64)).to(keep.device)
        inputs = {"input_ids": ids[None], "position_ids": positions_T.to(keep.device)[None], "use_cache": False}
        logits_1BV, _ = self.model._logits({**inputs, "attention_mask": None, "packed": packed}, keep)
        return logits_1BV[0]

    def _draw(self, rows_B: Indices, slots_B: Indices, counts_B: Indices, logits_BV: Tensor) -> None:
        """Chooses tokens; these rows are then the ones that are being drawn, without those that have ended."""
        tokens_B = self.choose(rows_B, counts_B, logits_BV)
        self.tokens_SC[slots_B, counts_B] = tokens_B
        counts_B = counts_B + 1
        ended_B = (tokens_B == self.end) | (counts_B == self.tokens_SC.shape[1])
        for at in np.flatnonzero(ended_B):
            self.done(int(rows_B[at]), self.tokens_SC[slots_B[at], : counts_B[at]].tolist())
        live = (of[~ended_B] for of in (rows_B, slots_B, tokens_B, counts_B))
        self.rows_B, self.slots_B, self.last_B, self.counts_B = live

    def _shrink(self) -> None:
        """Nobody waits: the cache becomes that of the groups that are left."""
        kept, at = np.unique(self.slots_B // self.past.each, return_inverse=True)
        self.tokens_SC = self.tokens_SC.reshape(self.past.groups, self.past.each, -1)[kept].reshape(
            -1, self.tokens_SC.shape[1]
        )
        self.past.only(kept)
        self.slots_B = at * self.past.each + self.slots_B % self.past.each
