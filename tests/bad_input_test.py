"""What cannot work is told in one line before anything costly: contexts, templates, ensembles, room on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from lm.config import BiasConfig, Config, DataConfig, TrainingConfig
from lm.models.gguf_test import write as gguf_file
from lm.models.loading import SCRATCH, load_reward_model, load_tokenizer
from lm.stages.data import data
from lm.stages.run import Run
from tests.pipeline_test import WORLD, config
from tests.tiny import causal_lm, reward_model

ROWS = [
    {"prompt": f"what is {number} and {number}", "chosen": f" it is {2 * number}", "rejected": " I do not know"}
    for number in range(40)
]
GIVEN = {"kind": "preferences", "labels": "given", "valid_fraction": 0.2, "test_fraction": 0.2}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCRATCH, "scratch:tiny", {**SCRATCH["scratch:tiny"], "hidden_size": 32, "vocab_size": 300})


def saved(model: PreTrainedModel, folder: Path) -> str:
    """A model with a tokenizer that has no chat template; a config of so many positions."""
    texts = [text for row in ROWS for text in row.values()]
    load_tokenizer("scratch:tiny", texts, False).save_pretrained(folder)
    model.float().save_pretrained(folder)
    return str(folder)


def lm(folder: Path, positions: int, seed: int = 0) -> str:
    return saved(causal_lm(seed=seed, vocab_size=300, max_position_embeddings=positions), folder)


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def options(folder: Path, rows: list[dict[str, Any]] = ROWS, limits: tuple[Any, Any] = (30, 20), **more: Any) -> Config:
    prompt, completion = limits
    read = DataConfig(
        **GIVEN,
        path=written(folder / "pairs.jsonl", rows),
        max_prompt_length=prompt,
        max_completion_length=completion,
    )
    short = {"bias": BiasConfig(rho=None, member_fractions=[0.4, 0.6])}
    return config(folder / "run", read, **{**short, "methods": ["d-dpo"], **more})


def made(folder: Path) -> list[str]:
    """Artifacts of the run."""
    return sorted(path.parent.parent.name for path in (folder / "run").glob("*/*/artifact.json"))


# ---------------------------------------------------------------- context


@pytest.mark.parametrize("option", ["model", "reward_base", "oracle_model", "oracle_base"])
def test_a_context_beyond_a_models_is_told_before_anything_is_trained(option: str, tmp_path: Path) -> None:
    models = {"model": lm(tmp_path / "long", 64)}
    if option == "oracle_model":
        models[option] = saved(reward_model(vocab_size=300, max_position_embeddings=50), tmp_path / "short")
    else:
        models[option] = lm(tmp_path / "short", 50, seed=1)
    message = (
        r"data.max_prompt_length 30 \+ data.max_completion_length 20 \+ 1 must be at most the 50 positions of "
        rf"{option} '.*short'"
    )
    with pytest.raises(ValueError, match=message):
        data(Run(options(tmp_path, **models)))
    assert made(tmp_path) in (["data"], [])
    data(Run(options(tmp_path, limits=(30, 19), **models)))


@pytest.mark.parametrize("option", ["model", "reward_base"])
def test_where_the_limits_are_the_datas_it_is_told_when_they_are_known(option: str, tmp_path: Path) -> None:
    models = {"model": lm(tmp_path / "long", 64)}
    models[option] = lm(tmp_path / "short", 12, seed=1)
    run = Run(options(tmp_path, limits=(None, None), **models))
    with pytest.raises(ValueError, match=rf"must be at most the 12 positions of {option} '.*short'"):
        data(run)
    assert made(tmp_path) in (["data"], [])


def test_a_reward_model_is_held_to_its_context_where_it_is_opened(tmp_path: Path) -> None:
    """Learned positions would be an index out of range in the middle of a run, rotary ones a guess."""
    folder = saved(reward_model("gpt2", vocab_size=300, n_positions=40), tmp_path / "judge")
    with pytest.raises(ValueError, match=r"must be at most the 40 positions of reward model '.*judge'"):
        load_reward_model(folder, options(tmp_path))
    assert load_reward_model(folder, options(tmp_path, limits=(30, 9))) is not None


# ---------------------------------------------------------------- a file cut short


@pytest.mark.parametrize("option", ["reward_base", "oracle_model"])
def test_no_file_is_read_in_before_all_have_been_looked_at(option: str, tmp_path: Path) -> None:
    """Reading one in takes minutes, where it is large."""
    whole = gguf_file(tmp_path / "whole.gguf")
    (tmp_path / "short.gguf").write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"short\.gguf' is cut short.* fetch it again"):
        Run(options(tmp_path, model=str(whole), **{option: str(tmp_path / "short.gguf")}))
    assert not (tmp_path / "run" / "models").exists()


# ---------------------------------------------------------------- chat template


CHATS = {
    "messages": [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
        }
        for row in ROWS
    ],
    "whole conversations": [
        {
            side: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            for side in ("chosen", "rejected")
        }
        for row in ROWS
    ],
}


@pytest.mark.parametrize("kind", CHATS)
def test_a_chat_set_with_a_base_model_says_what_to_do(kind: str, tmp_path: Path) -> None:
    run = Run(options(tmp_path, rows=CHATS[kind], model=lm(tmp_path / "base", 64)))
    message = (
        r"pairs.jsonl, line 1: there are messages, and model '.*base' has no chat template .*; give a model that has "
        r"one \(an instruct model\), put a chat_template into its tokenizer_config.json, or give prompt, chosen and"
    )
    with pytest.raises(ValueError, match=message):
        data(run)
    assert made(tmp_path) == []


def test_dialogues_as_text_need_none(tmp_path: Path) -> None:
    rows = [
        {side: f"\n\nHuman: {row['prompt']}\n\nAssistant:{row[side]}" for side in ("chosen", "rejected")}
        for row in ROWS
    ]
    read = DataConfig(
        **{**GIVEN, "kind": "hh"},
        path=written(tmp_path / "hh.jsonl", rows),
        max_prompt_length=60,
        max_completion_length=30,
    )
    run = Run(config(tmp_path / "run", read, model=lm(tmp_path / "base", 128), methods=["dpo"]))
    assert data(run).metrics["preferences"]["kept"]["train"] > 0


# ---------------------------------------------------------------- ensembles


@pytest.mark.parametrize("train", ["head", "all"])
@pytest.mark.parametrize(
    ("fractions", "match"),
    [
        ([0.5], r"BiasConfig.member_fractions must be two or more shares between 0 and 1, got \[0.5\]"),
        ([0.5, 0.5], r"BiasConfig.member_fractions must be shares that differ: .*, got \[0.5, 0.5\]"),
        ([0.2, 0.5, 0.20000001], "BiasConfig.member_fractions must be shares that differ"),
    ],
)
def test_an_ensemble_of_one_is_refused(fractions: list[float], match: str, train: Any, tmp_path: Path) -> None:
    training = TrainingConfig(train=train) if train == "head" else TrainingConfig(max_steps=1)
    with pytest.raises(ValueError, match=match):
        config(tmp_path, WORLD, reward=training, methods=["e-dpo"], bias=BiasConfig(member_fractions=fractions))


def test_an_ensemble_of_one_that_comes_with_the_data_is_refused(tmp_path: Path) -> None:
    rows = [{**row, "chosen_member_rewards": [1.0], "rejected_member_rewards": [0.0]} for row in ROWS]
    given = options(tmp_path, rows=rows, methods=["e-dpo"], reward=TrainingConfig(train="head"))
    given = Config(**{**vars(given), "data": DataConfig(**{**vars(given.data), "rewards": "given"})})
    with pytest.raises(ValueError, match=r"methods e-dpo need an ensemble, two or more .*; .* has one reward"):
        data(Run(given))
