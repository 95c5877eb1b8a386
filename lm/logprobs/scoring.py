"""Log-probs or rewards of any number of rows, offline: batches of similar length, shared out over ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from torch import Tensor

from lm.base import progress, ranks
from lm.data.columns import Rows, kept_arrays
from lm.logprobs.completions import CompletionModel, CompletionOutput, collate

Ids = Sequence[int] | npt.NDArray[np.int32]
PAIRS = 65_536
"""Pairs at a time: of these, batches are of similar length, and their scores are kept."""


class ScoreError(FloatingPointError):
    """A row's score is not finite."""

    def __init__(self, what: str, row: int, value: float) -> None:
        super().__init__(f"{what}: the score of row {row} is {value}; every score must be finite")
        self.row, self.value = row, value


def score_rows(
    model: CompletionModel,
    prompts: Sequence[Ids],
    completions: Sequence[Ids],
    what: str,
    *,
    rewards: bool | None = None,
) -> Tensor:
    """Summed log-probs, or rewards, of R completions, [R], float64 on the CPU, in the given order.

    Rewards are what a reward model is read for by default; only a policy with a reward head has both. Eval mode, no
    gradient; rows of the same prompt share it, batches are of similar length. Ranks share the batches out, and all get
    all scores. Raises FloatingPointError where a score is not finite.
    """
    read_rewards = model.is_reward_model if rewards is None else rewards

    def read(output: CompletionOutput) -> Tensor:
        scores = output.rewards if read_rewards else output.logps
        assert scores is not None
        return scores

    return _rows(model, prompts, completions, what, read)


def _rows(
    model: CompletionModel,
    prompts: Sequence[Ids],
    completions: Sequence[Ids],
    what: str,
    read: Callable[[CompletionOutput], Tensor],
) -> Tensor:
    examples = _by_prompt(prompts, completions, model.options.scoring_tokens)
    tokens = [len(prompts[rows[0]]) + sum(len(completions[i]) for i in rows) for rows in examples]
    examples = [examples[i] for i in sorted(range(len(examples)), key=tokens.__getitem__, reverse=True)]
    tokens.sort(reverse=True)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()

    def batch_of(chosen: list[list[int]]) -> dict[str, Any]:
        batch = collate([prompts[rows[0]] for rows in chosen], [[completions[i] for i in rows] for rows in chosen])
        return {**batch, "input_ids": batch["input_ids"].to(device)}

    rows = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    if rows and (model.route is None or max(rows) > model.tried):
        model.settle(**batch_of([[rows.index(max(rows))]]))

    def scores_of(batch: list[list[int]]) -> Tensor:
        return read(model(**batch_of(batch)))

    scores = over_ranks(batches(examples, tokens, model.options.scoring_tokens), len(prompts), scores_of, what)
    model.train(was_training)
    return scores


def over_ranks(
    batches: Sequence[list[list[int]]], count: int, scores_of: Callable[[list[list[int]]], Tensor], what: str
) -> Tensor:
    """Scores of `count` rows, [count] or [count, ...], float64 on the CPU: ranks share the batches out, and all get all
    scores.

    Args:
        batches: of examples, each of which is the rows in it.
        count: of the rows.
        scores_of: a batch's scores, in the order of its rows; called without gradient.
        what: is scored, for the progress bar and errors.

    Raises:
        FloatingPointError: a score is not finite.
    """
    # Whole batches, not rows: the numbers are then the same whoever computes them.
    mine = batches[ranks.index() :: ranks.count()]
    found: list[tuple[list[int], Tensor]] = []
    total = sum(len(example) for batch in mine for example in batch)
    with torch.inference_mode(), progress.bar(what, total=total) as bar:
        for batch in mine:
            rows = [i for example in batch for i in example]
            # On the CPU first: not every accelerator has float64.
            found.append((rows, scores_of(batch).cpu().double()))
            bar.update(len(rows))
    every = [one for part in ranks.from_all(found) for one in part]
    scores = torch.zeros(count, *(every[0][1].shape[1:] if every else ()), dtype=torch.float64)
    times = torch.zeros(count, dtype=torch.long)
    for rows, values in every:
        scores[rows] = values
        times[rows] += 1
    if (times != 1).any():
        bad = int((times != 1).nonzero()[0])
        raise RuntimeError(f"{what}: row {bad} was scored {int(times[bad])} times; each must be scored once")
    if not torch.isfinite(scores).all():
        bad = int((~torch.isfinite(scores)).nonzero()[0, 0])
        raise ScoreError(what, bad, float(scores[bad].sum()))
    return scores


def _by_prompt(prompts: Sequence[Ids], completions: Sequence[Ids], most: int) -> list[list[int]]:
    """Rows with the same prompt together, in groups of at most `most` tokens (a single row may be longer)."""
    groups: list[list[int]] = []
    open_group: dict[bytes, tuple[list[int], int]] = {}
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        key = hashlib.blake2b(np.asarray(prompt, dtype=np.int64).tobytes(), digest_size=16).digest()
        group, size = open_group.get(key, ([], most))
        if size + len(completion) > most:
            group, size = [], len(prompt)
            groups.append(group)
        group.append(row)
        open_group[key] = (group, size + len(completion))
    return groups


def batches(examples: list[list[int]], tokens: Sequence[int], most: int) -> list[list[list[int]]]:
    """Consecutive examples in batches of at most `most` tokens, where one example has no more."""
    made: list[list[list[int]]] = []
    size = 0
    for example, own in zip(examples, tokens, strict=True):
        if not made or size + own > most:
            made.append([])
            size = 0
        made[-1].append(example)
        size += own
    return made


def score_pairs(
    model: CompletionModel, pairs: Dataset, what: str, *, rewards: bool | None = None, kept: Path | None = None
) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and of the rejected completions, [N] each, float64; see `score_rows`.

    Args:
        model: what scores.
        pairs: rows with id, prompt_ids, chosen_ids and rejected_ids.
        what: is scored, for the progress bar and errors.
        rewards: as of `score_rows`.
        kept: a folder for the scores of every PAIRS pairs, from which a run that broke goes on; the caller's alone, for
            this model and these pairs.
    """
    found = [torch.zeros(2, 0, dtype=torch.float64)]
    for start in range(0, len(pairs), PAIRS):
        part = pairs.select(range(start, min(start + PAIRS, len(pairs)))) if len(pairs) > PAIRS else pairs
        named = what if len(pairs) <= PAIRS else f"{what}, pairs from {start:,} of {len(pairs):,}"
        path = None if kept is None else kept / f"{what.replace(' ', '-')}-{start:09}.npz"
        compute = partial(_both_sides, model, part, named, rewards)
        found.append(torch.from_numpy(kept_arrays(path, {"scores": (2, len(part))}, compute)["scores"]))
    chosen, rejected = torch.cat(found, dim=1)
    return chosen, rejected


def _both_sides(model: CompletionModel, pairs: Dataset, what: str, rewards: bool | None) -> dict[str, Any]:
    """`scores` of N pairs, [2, N]."""
    prompts, completions = Rows.of(pairs, "prompt_ids"), Rows.of(pairs, "chosen_ids", "rejected_ids")
    try:
        scores = score_rows(model, [*prompts, *prompts], completions, what, rewards=rewards)
    except ScoreError as error:
        side, row = ("chosen", "rejected")[error.row // len(pairs)], error.row % len(pairs)
        raise FloatingPointError(
            f"{what}: the score of the {side} completion of pair {pairs['id'][row]} is {error.value}; every score must "
            "be finite"
        ) from None
    return {"scores": scores.reshape(2, -1).numpy()}


def score_states(model: CompletionModel, pairs: Dataset, what: str) -> tuple[Tensor, Tensor]:
    """The states of `row_states` of the chosen and of the rejected completions, [N, H] each; rows as of
    `score_pairs`."""
    prompts, completions = Rows.of(pairs, "prompt_ids"), Rows.of(pairs, "chosen_ids", "rejected_ids")
    both = row_states(model, [*prompts, *prompts], completions, what)
    return both[: len(pairs)], both[len(pairs) :]


def row_states(model: CompletionModel, prompts: Sequence[Ids], completions: Sequence[Ids], what: str) -> Tensor:
    """What a reward model's head reads, its last hidden states at the completions' ends, [R, H], float64; rows as of
    `score_rows`."""
    seen: list[Tensor] = []
    hook = model.model.score.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    def read(_: CompletionOutput) -> Tensor:
        states = seen[-1]
        seen.clear()
        return states

    try:
        return _rows(model, prompts, completions, what, read)
    finally:
        hook.remove()
