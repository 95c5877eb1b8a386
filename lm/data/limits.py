"""Limits of prompts and completions from the data itself, where the options name none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lm.base import progress
from lm.config import DataConfig
from lm.data.rows import BATCH
from lm.data.tokens import completion_ids, prompt_ids

SHARE = 0.99
"""Of the rows, how many are within a limit from the data: the longest few would set memory and time of all."""
SIDES = ("completion", "chosen", "rejected")


def with_limits(config: DataConfig, sets: Sequence[Dataset], tokenizer: PreTrainedTokenizerBase) -> DataConfig:
    """The same options with numbers as limits: for one that is null, the least that SHARE of the rows of each set keep
    to, tokens; of fewer than a hundred rows, the longest.

    Args:
        config: the options.
        sets: untokenised rows, as of `lm.data.tokens.load`.
        tokenizer: what counts.
    """
    if None not in (config.max_prompt_length, config.max_completion_length):
        return config
    found = [zip(*_lengths(rows, tokenizer), strict=True) for rows in sets if len(rows)]
    prompt, completion = (max(map(least, side)) for side in zip(*found, strict=True)) if found else (1, 1)
    return replace(
        config,
        max_prompt_length=config.max_prompt_length or prompt,
        max_completion_length=config.max_completion_length or completion,
    )


def least(lengths: Sequence[int]) -> int:
    """The least limit that SHARE of these lengths keep to."""
    return max(1, sorted(lengths)[math.ceil(SHARE * len(lengths)) - 1])


def _lengths(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int]]:
    """Of each row, tokens of the prompt and of the longer completion."""
    sides = [name for name in SIDES if name in rows.column_names]
    for start in progress.bar("measuring", range(0, len(rows), BATCH), unit="batch"):
        batch = rows[start : start + BATCH]
        prompts = map(len, prompt_ids(tokenizer, batch["prompt"]))
        completions: list[Iterable[int]] = [map(len, completion_ids(tokenizer, batch[name])) for name in sides]
        yield from zip(prompts, map(max, *completions) if len(sides) > 1 else completions[0], strict=True)
