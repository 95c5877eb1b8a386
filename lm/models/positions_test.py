"""Models whose positions depend on the company that a row is in are refused where they are loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lm.config import Config, DataConfig
from lm.logprobs.scoring_test import Ends, config
from lm.models.loading import load_policy, load_reward_model
from tests.tiny import causal_lm, reward_model

FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 10}
LONGROPE: dict[str, Any] = {
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 10,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **FACTORS},
}


def rows_of(prompt: int, completion: int) -> Config:
    return replace(
        config(), dtype="float32", data=DataConfig(max_prompt_length=prompt, max_completion_length=completion)
    )


@pytest.mark.parametrize("reward", [False, True])
def test_rows_beyond_the_original_context_are_refused_before_anything_is_computed(reward: bool, tmp_path: Path) -> None:
    """Phi-3 has room for them, but picks its frequencies by the longest row of a batch."""
    (reward_model if reward else causal_lm)("phi3-sliding", **LONGROPE).float().save_pretrained(tmp_path)

    def load(options: Config) -> Any:
        return load_reward_model(tmp_path, options) if reward else load_policy(tmp_path, Ends(), options)

    assert load(rows_of(5, 4)).config.rope_parameters["rope_type"] == "longrope"
    message = r"model '.*': rows may have 11 tokens, but beyond 10 .* data.max_prompt_length .* must be at most 10"
    with pytest.raises(ValueError, match=message):
        load(rows_of(5, 5))
