"""An evaluation set is what was asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from datasets import Dataset

from lm.base.options import parse
from lm.stages.evaluations import has_choice, prompts_of


def pairs(prompts: int) -> Dataset:
    rows = [{"prompt": f"p{i}", "prompt_ids": [i]} for i in range(prompts) for _ in range(2)]
    return Dataset.from_list(rows)


def test_evaluation_prompts_are_distinct_and_a_function_of_the_seed() -> None:
    assert prompts_of(pairs(6), None, 0) == {f"p{i}": [i] for i in range(6)}
    some = prompts_of(pairs(50), 20, 0)
    assert len(some) == 20
    assert all(text == f"p{ids[0]}" for text, ids in some.items())
    assert some == prompts_of(pairs(50), 20, 0)
    assert some != prompts_of(pairs(50), 20, 1)


def test_more_evaluation_prompts_than_there_are_is_an_error() -> None:
    assert len(prompts_of(pairs(6), 6, 0)) == 6
    with pytest.raises(ValueError, match=r"evaluation\.prompts is 7, but the test split has only 6 prompts"):
        prompts_of(pairs(6), 7, 0)


def test_validation_has_a_choice_of_settings_or_of_steps() -> None:
    config, _ = parse(
        "lm.train",
        "",
        [
            "--snapshots",
            "1",
            "--methods",
            "[dpo,ipo]",
            "--sweep",
            "{ipo: [{tau: 0.1}, {tau: 1.0}], dpo: [{beta: 0.1}]}",
        ],
    )
    assert [has_choice(config, name) for name in ("dpo", "ipo")] == [False, True]
    assert has_choice(replace(config, snapshots=2), "dpo")
