"""Limits of prompts and completions from the data itself, where the options name none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from datasets import Dataset

from lm.config import DataConfig
from lm.data.columns import Ints, sizes
from lm.data.tokens import longest_completion

SHARE = 0.99
"""Of the rows, how many are within a limit from the data: the longest few would set memory and time of all."""


def with_limits(config: DataConfig, sets: Sequence[Dataset]) -> DataConfig:
    """The same options with numbers as limits: for one that is null, the least that SHARE of the rows of each set keep
    to, tokens; of fewer than a hundred rows, the longest.

    Args:
        config: the options.
        sets: rows with ids, as of `lm.data.tokens.with_ids`.
    """
    if None not in (config.max_prompt_length, config.max_completion_length):
        return config
    found = [(least(sizes(rows, "prompt_ids")), least(longest_completion(rows))) for rows in sets if len(rows)]
    prompt, completion = map(max, zip(*found, strict=True)) if found else (1, 1)
    return replace(
        config,
        max_prompt_length=config.max_prompt_length or prompt,
        max_completion_length=config.max_completion_length or completion,
    )


def least(lengths: Ints) -> int:
    """The least limit that SHARE of these lengths keep to."""
    return max(1, int(np.sort(lengths)[math.ceil(SHARE * len(lengths)) - 1]))
