"""`python -m lm.score` on any preference set: what each kind of model reads, kills and ranks, judges, refusals."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lm.base.files import read_jsonl, write_jsonl
from lm.base.store import Store
from lm.config import BiasConfig, Config, DataConfig, EvaluationConfig, ProbeConfig, SamplingConfig, Scoring
from lm.data import rewards
from lm.data.rows import read_rows, write_rows
from lm.data.schemas import any_pair, chat_renderer
from lm.data.tokens import load, tokenise
from lm.judging import scored_sets
from lm.judging.llm import LLMJudge
from lm.judging.llm_test import SECRET, Endpoint, fair
from lm.judging.reward_models import RewardModel
from lm.judging.scored_sets import judge_reward
from lm.logprobs.completions import CompletionModel
from lm.logprobs.scoring import score_pairs
from lm.models.loading import load_tokenizer
from lm.models.opening import open_reward_model
from lm.objectives import METHODS
from lm.score import is_for_any_set, main
from lm.stages.labels import labelled_pairs
from lm.stages.policies import policy as trained_policy
from lm.stages.rewards import reward
from lm.stages.run import Run
from lm.stages.scores import scored_pairs
from lm.stages.subsets import subset
from tests.command_lines import over
from tests.tiny import causal_lm, reward_model, training

ROOT = Path(__file__).parents[2]
CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Ends a conversation with a newline after end-of-text, as many templates do."""
END = "<|endoftext|>"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


POST = {"subreddit": "cats", "title": "My cat", "post": "It ran away."}
ROWS: list[dict[str, Any]] = [
    {"id": 7, "prompt": "Which sky?", "chosen": " A blue one.", "rejected": " None at all"},
    {"prompt": "empty", "chosen": "", "rejected": "none"},
    {
        "prompt": [{"role": "system", "content": "Be kind."}, user("Hi")],
        "chosen": [assistant("Hello there")],
        "rejected": [assistant("Go")],
    },
    {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why is it?\n\nAssistant: It is blue",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why is it?\n\nAssistant: No",
    },
    {"info": POST, "summaries": [{"text": "The cat ran away, alas."}, {"text": "A cat"}], "choice": 1},
]
"""Every schema, and a row that is no comparison."""
TLDR = "SUBREDDIT: r/cats\n\nTITLE: My cat\n\nPOST: It ran away.\n\nTL;DR:"
CONVERSATIONS = [
    ("<user>Which sky?\x00", "A blue one.", "None at all"),
    ("<system>Be kind.\x00<user>Hi\x00", "Hello there", "Go"),
    ("<user>Hi\x00<assistant>Yes?\x00<user>Why is it?\x00", "It is blue", "No"),
    (f"<user>{TLDR}\x00", "A cat", "The cat ran away, alas."),
]
"""What a model with the template reads, \x00 for the end of a turn: before the replies, and the replies."""
TEXTS = [
    ("Which sky?", " A blue one.", " None at all"),
    ("\n\nsystem: Be kind.\n\nuser: Hi\n\nassistant:", " Hello there", " Go"),
    ("\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why is it?\n\nAssistant:", " It is blue", " No"),
    (TLDR, " A cat", " The cat ran away, alas."),
]
"""What a model without one reads."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(
        "scratch:tiny", ["A blue sky, a cat ran away. Hello there user assistant <system>"] * 5, False
    )


Saved = tuple[PreTrainedModel, PreTrainedTokenizerBase, str]


def save(folder: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Saved:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, str(folder)


def chat_model(folder: Path, tokenizer: PreTrainedTokenizerBase, architecture: str = "llama", **config: Any) -> Saved:
    tokenizer.chat_template = CHAT
    return save(folder, tokenizer, reward_model(architecture, vocab_size=len(tokenizer), **config))


def plain_model(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Saved:
    tokenizer.chat_template = None
    return save(folder, tokenizer, reward_model("gpt2", seed=seed, vocab_size=len(tokenizer)))


def encoder(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Saved:
    """A BERT, with a tokenizer that joins two texts by a separator."""
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"sep_token": "[SEP]", "cls_token": "[CLS]"})
    names = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=names
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="<|padding|>",
        sep_token="[SEP]",
        cls_token="[CLS]",
    )
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=len(tokenizer), num_labels=1, max_position_embeddings=128, **shape)
        model = BertForSequenceClassification(config).double().eval()
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return save(folder, tokenizer, model)


def score(out: Path, *options: str, rows: list[dict[str, Any]] = ROWS, status: int = 0) -> list[dict[str, Any]]:
    """The written rows."""
    path = out.parent / "pairs.jsonl"
    if not path.exists():
        write_jsonl(path, rows)
    assert main(["--data", str(path), "--out", str(out), "--device", "cpu", *options]) == status
    return [row for _, row in read_rows(str(out))] if out.exists() else []


def by_transformers(model: PreTrainedModel, inputs: Any) -> float:
    """The reward of one text by the model's own forward, nothing shared and nothing padded."""
    with torch.no_grad():
        return float(model(**inputs).logits[0, 0])


def check(rows: list[dict[str, Any]], name: str, expected: list[tuple[float, float]]) -> None:
    assert len(rows) == len(expected)
    for row, both in zip(rows, expected, strict=True):
        assert (row[f"chosen_reward_{name}"], row[f"rejected_reward_{name}"]) == pytest.approx(both, rel=1e-6, abs=1e-6)


# ---------------------------------------------------------------- what is read


def of_conversations(saved: Saved) -> list[tuple[float, float]]:
    model, tokenizer, _ = saved

    def one(before: str, reply: str) -> float:
        text = f"{before}<assistant>{reply}\x00".replace("\x00", f"{END}\n")
        return by_transformers(model, tokenizer(text, return_tensors="pt", return_token_type_ids=False))

    return [(one(before, chosen), one(before, rejected)) for before, chosen, rejected in CONVERSATIONS]


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {}),
        ("llama", {"pad_token_id": None}),
        ("bloom", {}),  # takes no shared prompts
        ("mistral-sliding", {}),
    ],
)
def test_a_chat_template_writes_the_conversation(
    architecture: str, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    saved = chat_model(tmp_path / "A", tokenizer, architecture, **config)
    expected = of_conversations(saved)
    check(score(tmp_path / "out.jsonl", "--reward-model", saved[2]), "A", expected)
    assert len({round(value, 3) for both in expected for value in both}) == 8, "no two texts are the same to the model"


def test_a_reward_at_the_padding_token_is_read_before_it_as_transformers_does(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """A template that ends in the token that the model's config names for padding."""
    end = tokenizer.eos_token_id
    model, _, folder = chat_model(tmp_path / "A", tokenizer, pad_token_id=end)
    (tmp_path / "A" / "chat_template.jinja").write_text(CHAT.replace("\n{% endfor", "{% endfor"))
    rows = score(tmp_path / "out.jsonl", "--reward-model", folder, rows=ROWS[:1])
    text = f"<user>Which sky?{END}<assistant>A blue one.{END}"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    expected = by_transformers(model, {"input_ids": ids})
    assert rows[0]["chosen_reward_A"] == pytest.approx(expected, rel=1e-5)  # some layers compute in float32
    model.config.pad_token_id = None
    assert by_transformers(model, {"input_ids": ids}) != pytest.approx(expected, rel=1e-3), "at the end it is another"


def test_without_a_template_prompt_and_completion_are_joined(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model, _, folder = plain_model(tmp_path / "B", tokenizer)

    def one(prompt: str, completion: str) -> float:
        ids = [*tokenizer(prompt)["input_ids"], *tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        return by_transformers(model, {"input_ids": torch.tensor([ids])})

    expected = [(one(prompt, chosen), one(prompt, rejected)) for prompt, chosen, rejected in TEXTS]
    check(score(tmp_path / "out.jsonl", "--reward-model", folder), "B", expected)


def test_an_encoder_gets_two_segments_and_batches_change_nothing(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model, tokenizer, folder = encoder(tmp_path / "C", tokenizer)

    def one(prompt: str, completion: str) -> float:
        inputs = tokenizer(prompt, completion, return_tensors="pt")
        assert inputs["token_type_ids"].unique().tolist() == [0, 1]
        return by_transformers(model, inputs)

    expected = [(one(prompt, chosen), one(prompt, rejected)) for prompt, chosen, rejected in TEXTS]
    check(score(tmp_path / "out.jsonl", "--reward-model", folder), "C", expected)
    check(score(tmp_path / "one.jsonl", "--reward-model", folder, "--batch-tokens", "1"), "C", expected)


def test_our_own_reward_models_get_what_they_were_trained_on(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Also with a chat template: the pipeline reads the reward at end-of-text, not at the newline after it."""
    tokenizer.chat_template = CHAT
    model = reward_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.eos_token_id)

    def make(folder: Path, _: Path) -> dict[str, Any]:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {}

    def folder(stage: str) -> Path:
        return Store(tmp_path, seed=0).get(stage, "rho", {}, make).path

    rows = [row for row in ROWS if "info" not in row] * 20
    write_jsonl(tmp_path / "pairs.jsonl", [{**row, "prompt": row["prompt"]} for row in rows if "prompt" in row])
    data = DataConfig(kind="preferences", path=str(tmp_path / "pairs.jsonl"), valid_fraction=0.3, test_fraction=0.3)
    render = chat_renderer(tokenizer, "rho")
    loaded = load(data, 3, tmp_path, render=render).preferences
    tokenised, _ = tokenise(_all_splits(loaded), tokenizer, data, tmp_path / "ids.arrow")
    expected = torch.cat(score_pairs(CompletionModel(model), tokenised, "rewards"))
    placed = list(scored_sets.comparisons(str(tmp_path / "pairs.jsonl"), None))
    assert len(placed) == len(tokenised)
    own, cut = RewardModel(str(folder("reward")), Scoring(device="cpu")).rewards(placed, "")
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)  # some layers compute in float32
    assert cut == 0
    other, _ = RewardModel(str(folder("sft")), Scoring(device="cpu")).rewards(placed, "")
    assert (other - expected).abs().max() > 1e-3, "read as a model from elsewhere it gives other rewards"


def _all_splits(rows: Any) -> Any:
    return rows.map(lambda row, i: {"split": ("train", "valid", "test")[i % 3]}, with_indices=True)


def words_alone() -> PreTrainedTokenizerBase:
    """A tokenizer of whole words, with no special token but end-of-text."""
    words = [END, "sky", "?", "blue", "cat", *map(str, range(60 * 60))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("others", [True, False])
def test_transformers_reads_a_runs_reward_models_where_we_do(
    others: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Of a base model that pads with end-of-text: with another special token in batches, without one text by text."""
    tokenizer = tokenizer if others else words_alone()
    tokenizer.pad_token = tokenizer.eos_token
    end = tokenizer.eos_token_id
    shape = {"vocab_size": len(tokenizer), "pad_token_id": end, "eos_token_id": end}
    _, _, base = save(tmp_path / "base", tokenizer, causal_lm(**shape))
    rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in numbered(60)[::2]]
    write_jsonl(tmp_path / "pairs.jsonl", [*rows, *numbered(60)[1::2]])  # the longer is chosen in half of them
    once = training(micro_batch_size=8)
    data = DataConfig(
        kind="preferences", path=str(tmp_path / "pairs.jsonl"), labels="given", valid_fraction=0.3, test_fraction=0.3
    )
    config = Config(
        output_dir=str(tmp_path / "run"),
        model=base,
        device="cpu",
        **dict.fromkeys(("sft", "oracle", "reward", "policy"), once),  # type: ignore[arg-type]
        data=data,
        bias=BiasConfig(rho=None, member_fractions=[0.4, 0.6]),
    )
    run = Run(config)
    folder, pairs = reward(run, "rho").path, labelled_pairs(run, "valid")
    ours, _ = score_pairs(open_reward_model(folder, config), pairs, "rewards")

    model, own = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [f"{prompt}{chosen}{END}" for prompt, chosen in zip(pairs["prompt"][:], pairs["chosen"][:], strict=True)]
    assert len(set(map(len, texts))) > 1, "nothing would be padded"

    def plain(batch: list[str]) -> torch.Tensor:
        inputs = own(batch, padding=True, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            rewards_B: torch.Tensor = model(**inputs).logits[:, 0].double()
        return rewards_B

    def by_one() -> torch.Tensor:
        return torch.cat([plain([text]) for text in texts])

    torch.testing.assert_close(by_one(), ours, rtol=1e-4, atol=1e-4)
    if others:
        torch.testing.assert_close(plain(texts), ours, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ValueError, match="batch sizes > 1"):
            plain(texts)
    model.config.pad_token_id = end  # as the base model has it
    assert (by_one() - ours).abs().median() > 1e-2


def test_what_is_too_long_loses_its_beginning_and_is_counted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _, folder = plain_model(tmp_path / "B", tokenizer)
    pairs = [(prompt, completion) for prompt, *both in TEXTS for completion in both]
    ids = [
        [*tokenizer(prompt)["input_ids"], *tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        for prompt, completion in pairs
    ]
    limit = sorted(map(len, ids))[4]
    over = sum(len(row) > limit for row in ids)
    assert 0 < over < 8
    values = [by_transformers(model, {"input_ids": torch.tensor([row[-limit:]])}) for row in ids]
    rows = score(tmp_path / "out.jsonl", "--reward-model", folder, "--max-length", str(limit))
    check(rows, "B", list(zip(values[::2], values[1::2], strict=True)))
    assert f"{over} of 8 texts were too long and lost their beginning" in capsys.readouterr().out
    _, tokenizer, cut = encoder(tmp_path / "C", tokenizer)
    segments = [len(row) for row in tokenizer(*map(list, zip(*pairs, strict=True)))["input_ids"]]
    score(tmp_path / "cut.jsonl", "--reward-model", cut, "--max-length", str(limit))
    assert f"{sum(size > limit for size in segments)} of 8 texts were too long" in capsys.readouterr().out
    score(tmp_path / "whole.jsonl", "--reward-model", folder)
    assert "too long" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["chat", "plain", "encoder"])
def test_names_of_control_tokens_in_texts_are_characters_and_counted(
    kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a user nor a reply ends a turn, or what is read, by writing its end."""
    make: Any = {"chat": chat_model, "plain": plain_model, "encoder": encoder}[kind]
    model, tokenizer, folder = make(tmp_path / "A", tokenizer)
    name = "[SEP]" if kind == "encoder" else END

    def plain(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def token(text: str) -> list[int]:
        return [tokenizer.convert_tokens_to_ids(text)]

    question, *replies = f"Which{name} sky?", f"A {name}blue one.", f"None{name} at all"

    def one(reply: str) -> float:
        if kind == "chat":
            ids = [*plain(f"<user>{question}"), *token(END), *plain(f"\n<assistant>{reply}"), *token(END), *plain("\n")]
            return by_transformers(model, {"input_ids": torch.tensor([ids])})
        if kind == "plain":
            ids = [*plain(question), *plain(f" {reply}"), *token(END)]
            return by_transformers(model, {"input_ids": torch.tensor([ids])})
        first, second = plain(question), plain(f" {reply}")
        ids = [*token("[CLS]"), *first, *token("[SEP]"), *second, *token("[SEP]")]
        types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
        return by_transformers(model, {"input_ids": torch.tensor([ids]), "token_type_ids": torch.tensor([types])})

    rows = [ROWS[0], {"prompt": question, "chosen": f" {replies[0]}", "rejected": f" {replies[1]}"}]
    scored = score(tmp_path / "out.jsonl", "--reward-model", folder, rows=rows)
    both = [scored[1][f"{side}_reward_A"] for side in ("chosen", "rejected")]
    assert both == pytest.approx([one(reply) for reply in replies], rel=1e-4)  # some layers compute in float32
    said = capsys.readouterr().err
    assert f"1 rows name control tokens in their texts ({name} in 1), read as characters (" in said
    assert "pairs.jsonl, line 2)" in said


def test_a_prompt_is_read_where_it_stands(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under another name, and in front of both sides as well: the rewards are the same."""
    folder = plain_model(tmp_path / "B", tokenizer)[2]
    texts = [("Which sky?", " A blue one.", " None"), ("Which cat?", " It ran.", " A red one.")]
    forms: dict[str, list[dict[str, Any]]] = {
        "usual": [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in texts],
        "named": [{"question": p, "chosen": c, "rejected": r} for p, c, r in texts],
        "doubled": [{"prompt": p, "chosen": p + c, "rejected": p + r} for p, c, r in texts],
    }
    rewards_of = {}
    for name, rows in forms.items():
        (tmp_path / name).mkdir()
        out, options = tmp_path / name / "out.jsonl", ["--reward-model", folder]
        if name == "named":
            score(out, *options, rows=rows, status=2)
            assert "pairs.jsonl, line 1: there is no 'prompt', but column 'question'" in capsys.readouterr().err
            options += ["--prompt", "question"]
        scored = score(out, *options, rows=rows)
        assert [{**row, **given} for row, given in zip(scored, rows, strict=True)] == scored, "rows are as they were"
        rewards_of[name] = [(row["chosen_reward"], row["rejected_reward"]) for row in scored]
    assert rewards_of["usual"] == rewards_of["named"] == rewards_of["doubled"]
    assert "in 2 of 2 rows both sides begin with the prompt, which is taken off there" in capsys.readouterr().out


def test_tools_are_written_by_the_template_and_refused_without_one(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    called = [{"function": {"name": "look", "arguments": {"at": place}}} for place in ("sky", "sea")]
    sides = [{"role": "assistant", "content": None, "tool_calls": [call]} for call in called]
    rows = [{"prompt": [user("Hi")], "chosen": sides[:1], "rejected": sides[1:]}]
    _, _, folder = chat_model(tmp_path / "A", tokenizer)
    score(tmp_path / "out.jsonl", "--reward-model", folder, rows=rows, status=2)
    assert "line 1: there are 'tool_calls', which the chat template of model" in capsys.readouterr().err
    score(tmp_path / "out.jsonl", "--reward-model", plain_model(tmp_path / "B", tokenizer)[2], status=2)
    assert "line 1: 'tool_calls' of messages is written by a chat template, and there is" in capsys.readouterr().err
    with_calls = CHAT.replace("{{ eos", "{% for c in message.tool_calls %}{{ c.function.arguments }}{% endfor %}{{ eos")
    (tmp_path / "A" / "chat_template.jinja").write_text(with_calls)
    (row,) = score(tmp_path / "out.jsonl", "--reward-model", folder)
    assert row["chosen_reward"] != row["rejected_reward"]


# ---------------------------------------------------------------- what is written


def test_rows_stay_as_they_are_and_other_rewards_give_way(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = chat_model(tmp_path / "A", tokenizer)[2], plain_model(tmp_path / "B", tokenizer)[2]
    given = [{**row, "score_chosen": 1.0, "margin": 3.0} if "id" in row else row for row in ROWS]
    rows = score(tmp_path / "out.jsonl", "--reward-model", a, "--reward-model", b, rows=given)
    kept = [row for row in ROWS if row.get("chosen") != ""]
    for row, original in zip(rows[:3], kept[:3], strict=True):
        assert {name: row[name] for name in original} == original
        assert not {"score_chosen", "margin"} & row.keys()
        for side in ("chosen", "rejected"):
            assert row[f"{side}_member_rewards"] == [row[f"{side}_reward_A"], row[f"{side}_reward_B"]]
            assert f"{side}_reward" not in row, "of several none is the one reward"
    assert any_pair(rows[3], "").items() < any_pair(kept[3], "").items(), "TL;DR rows become text"  # type: ignore[union-attr]
    said = capsys.readouterr().out
    assert "left out: 1 rows, empty completion" in said
    assert "left out: columns margin, score_chosen, which hold other rewards" in said
    larger = sum(row["chosen_reward_A"] > row["rejected_reward_A"] for row in rows)
    assert f"A: the chosen completion has the larger reward in {larger / 4:.1%}" in said
    assert "the one reward: the mean of the members; the ensemble: A, B" in said


def test_labels_are_written_as_they_are_trained_on_and_groups_as_their_pairs(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = plain_model(tmp_path / "A", tokenizer)[2]
    soft = [
        {"prompt": "Which sky?", "chosen": " A blue one.", "rejected": " None at all", "label": p} for p in (0.8, 0.3)
    ]
    (tmp_path / "soft").mkdir()
    one, other = score(tmp_path / "soft" / "out.jsonl", "--reward-model", model, rows=soft)
    assert (one["chosen"], one["chosen_probability"]) == (" A blue one.", 0.8)
    assert (other["chosen"], other["chosen_probability"]) == (" None at all", 0.7)
    assert "label" not in one
    for name in ("reward", "reward_A"):
        assert one[f"chosen_{name}"] == pytest.approx(other[f"rejected_{name}"])
        assert one[f"rejected_{name}"] == pytest.approx(other[f"chosen_{name}"])
    assert "the label prefers the second side" in capsys.readouterr().err
    group = {"prompt": "Which sky?", "completions": [" A blue one.", " None at all", " A"], "scores": [1, 1, 0]}
    (tmp_path / "group").mkdir()
    pairs = score(tmp_path / "group" / "out.jsonl", "--reward-model", model, rows=[group, {**group, "prompt": "And?"}])
    assert [row["chosen_probability"] for row in pairs] == [0.5, 1.0, 1.0] * 2
    assert {row["weight"] for row in pairs} == {1 / 3}
    assert pairs[0]["chosen_reward"] == pytest.approx(one["chosen_reward"]), "not the set's own score"
    read = load(DataConfig(kind="preferences", path=str(tmp_path / "group" / "out.jsonl")), 0, tmp_path).preferences
    assert read["weight"][:] == [row["weight"] for row in pairs]


def test_a_model_alone_gives_the_one_reward_and_no_ensemble(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = {name: [1.0, 2.0] if name.endswith(("rewards", "margins")) else 1.0 for name in rewards.EVERY}
    rows = score(
        tmp_path / "out.jsonl",
        *("--reward-model", plain_model(tmp_path / "B", tokenizer)[2]),
        rows=[{**row, **stale} for row in numbered(3)],
    )
    for row in rows:
        assert set(row) == {"prompt", "chosen", "rejected", *rewards.ONE, *rewards.of_model("B")}
        assert [row[name] for name in rewards.ONE] == [row[name] for name in rewards.of_model("B")]
        assert rewards.given(row, "here")["chosen_reward"] == row["chosen_reward_B"]
    said = capsys.readouterr().out
    assert f"left out: columns {', '.join(sorted(rewards.EVERY))}, which hold other rewards" in said
    assert "the one reward: B; the ensemble: none" in said


def test_what_the_file_could_not_hold_is_said_before_anything_is_scored(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = plain_model(tmp_path / "B", tokenizer)[2]
    path = tmp_path / "pairs.parquet"
    when = datetime.datetime(2026, 11, 29, 12)
    write_rows(path, [*numbered(2), {**numbered(3)[2], "made": when, "margin": 3.0}])
    around = ["--data", str(path), "--device", "cpu", "--reward-model", folder]
    assert main([*around, "--out", str(tmp_path / "out.parquet")]) == 0
    written = [row for _, row in read_rows(str(tmp_path / "out.parquet"))]
    assert [row["made"] for row in written] == [None, None, when]
    assert "margin" not in written[2]
    monkeypatch.setattr(scored_sets, "_score_shards", None)
    assert main([*around, "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "out.jsonl, row 3, column 'made': datetime.datetime(2026, 11, 29, 12, 0)" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


# ---------------------------------------------------------------- our own models, by name


def made(root: Path, tokenizer: PreTrainedTokenizerBase, name: str, seed: int, stage: str = "reward") -> str:
    """A folder as a run leaves it."""

    def make(folder: Path, _: Path) -> dict[str, Any]:
        plain_model(folder, tokenizer, seed)
        return {}

    return str(Store(root, seed=0).get(stage, name, {"seed": seed}, make).path)


def own_oracle(root: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """DRDO's, a language model with a reward head beside."""

    def make(folder: Path, _: Path) -> dict[str, Any]:
        save(folder, tokenizer, causal_lm(vocab_size=len(tokenizer)))
        save_file({"weight": torch.zeros(1, 16)}, folder / "reward_head.safetensors")
        return {}

    return str(Store(root, seed=0).get("reward", "drdo", {}, make).path)


def test_of_a_runs_models_rho_is_the_one_reward_and_never_a_member(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In whatever order, as the shell sorts `runs/own/reward/*`; a method's own oracle among them is left out."""
    specs = [made(tmp_path / "run", tokenizer, name, i) for i, name in enumerate(("b0.2", "b0.8", "rho"))]
    drdo = own_oracle(tmp_path / "run", tokenizer)
    assert sorted([*specs, drdo]) == [str(path) for path in sorted((tmp_path / "run" / "reward").iterdir())]
    rows = score(tmp_path / "out.jsonl", "--reward-model", *sorted([*specs, drdo]), rows=numbered(3))
    b2, b8, rho = (Path(spec).name for spec in specs)
    for row in rows:
        assert [row[name] for name in rewards.ONE] == [row[name] for name in rewards.of_model(rho)]
        for k, side in enumerate(rewards.MEMBERS):
            assert row[side] == [row[rewards.of_model(b2)[k]], row[rewards.of_model(b8)[k]]]
        assert not any("drdo" in name for name in row)
    said = capsys.readouterr().out
    assert f"left out: model {drdo}, it is the oracle of drdo's own, whose rewards only its run reads" in said
    assert f"the one reward: {rho}; the ensemble: {b2}, {b8}" in said


def test_rho_stays_the_one_reward_beside_models_of_others_and_alone_any_model_is(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rho, member = (made(tmp_path / "run", tokenizer, name, i) for i, name in enumerate(("rho", "b0.2")))
    oracle = made(tmp_path / "run", tokenizer, "oracle", 2, "oracle")
    other = plain_model(tmp_path / "B", tokenizer, 3)[2]
    assert [scored_sets.one_reward(specs, 0) for specs in ([rho], [member], [oracle], [other])] == [0] * 4
    assert scored_sets.one_reward([], 1) == 0, "the judge"
    assert scored_sets.one_reward([other, rho], 0) == 1
    assert scored_sets.one_reward([oracle, rho], 1) == 1
    assert [scored_sets.one_reward(specs, 1) for specs in ([member], [other], [oracle, member])] == [None] * 3
    (row,) = score(tmp_path / "out.jsonl", "--reward-model", other, rho, rows=numbered(1))
    assert row["chosen_reward"] == row[f"chosen_reward_{Path(rho).name}"]
    assert not set(rewards.MEMBERS) & row.keys(), "one model is no ensemble"
    assert "chosen_reward_B" in row


def test_models_of_earlier_tries_are_refused_and_the_newest_is_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once, again = (made(tmp_path / "run", tokenizer, "rho", seed) for seed in (1, 2))
    twice = made(tmp_path / "run", tokenizer, "b0.2", 1), made(tmp_path / "run", tokenizer, "b0.2", 2)
    for folder, date in ((once, "2026-11-03"), (again, "2026-11-02")):  # the first try's was made again
        path = Path(folder) / "artifact.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "provenance": {**record["provenance"], "date": date}}))
    score(tmp_path / "out.jsonl", "--reward-model", again, once, *twice, rows=numbered(2), status=2)
    said = capsys.readouterr().err
    assert f"'rho' is there 2 times, {again}, {once}, of which the last is the newest; " in said
    assert f"'b0.2' is there 2 times, {twice[0]}, {twice[1]}, of which the last is the newest; " in said
    assert said.rstrip().endswith("name one folder of each")
    linked = tmp_path / "linked"
    linked.symlink_to(tmp_path / "run")
    with pytest.raises(ValueError, match="'rho' is there 2 times"):
        scored_sets.told_apart([once, str(linked / "reward" / Path(again).name)])
    assert not (tmp_path / "out.jsonl").exists()


def test_models_of_two_runs_are_two_models_but_there_is_one_one_reward(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = ([made(tmp_path / run, tokenizer, name, 1) for name in ("b0.2", "rho")] for run in ("a", "b"))
    members = [one[0], other[0]]
    (row,) = score(tmp_path / "out.jsonl", "--reward-model", *members, one[1], rows=numbered(1))
    assert [row[name] for name in rewards.ONE] == [row[name] for name in rewards.of_model(Path(one[1]).name)]
    for k, side in enumerate(rewards.MEMBERS):
        assert row[side] == [row[rewards.of_model(spec)[k]] for spec in members], "of one name, so called by the whole"
    score(tmp_path / "none.jsonl", "--reward-model", *one, *other, status=2)
    assert (
        f"--reward-model: {one[1]}, {other[1]} are each a run's 'rho', the one reward and never a member; name one of "
        "them"
    ) in capsys.readouterr().err
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize("beside", [False, True])
def test_a_policy_of_a_run_is_no_reward_model(
    beside: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = made(tmp_path / "run", tokenizer, "dpo", 1, "policy")
    others = [made(tmp_path / "run", tokenizer, "rho", 1)] * beside
    score(tmp_path / "out.jsonl", "--reward-model", *others, policy, rows=numbered(1), status=2)
    assert (
        f"--reward-model {policy!r}: a reward model is needed, it is a run's policy/dpo; name a folder of the run's "
        "reward/ or oracle/"
    ) in capsys.readouterr().err


def test_a_methods_own_oracle_alone_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drdo = own_oracle(tmp_path / "run", tokenizer)
    score(tmp_path / "out.jsonl", "--reward-model", drdo, rows=numbered(2), status=2)
    said = capsys.readouterr().err
    assert f"--reward-model {drdo!r}: it is the oracle of drdo's own, whose rewards only its run reads; name" in said


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"sky {i % 7}?", "chosen": f" {i} blue" * 3, "rejected": f" {i * i} cat"} for i in range(count)]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_that_distils_the_rewards_reads_them_back(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    specs = [plain_model(tmp_path / name, tokenizer, seed)[2] for seed, name in enumerate("AB")]
    named = [option for spec in specs for option in ("--reward-model", spec)]
    scored = score(tmp_path / "scored.parquet", *named, rows=numbered(60))
    once = training(micro_batch_size=8)
    config = Config(
        output_dir=str(tmp_path / "run"),
        model="scratch:tiny",
        device="cpu",
        sft=once,
        oracle=once,
        reward=once,
        policy=once,
        methods=["e-dpo"],
        data=DataConfig(
            kind="preferences",
            path=str(tmp_path / "scored.parquet"),
            rewards="given",
            labels="given",
            valid_fraction=0.3,
            test_fraction=0.3,
        ),
        bias=BiasConfig(rho=None),
        sampling=SamplingConfig(),
        evaluation=EvaluationConfig(resamples=10),
        probe=ProbeConfig(pairs=4, times=1),
    )
    run = Run(config)
    assert trained_policy(run, "e-dpo").metrics["history"]
    of_row = {(row["prompt"], row["chosen"]): row for row in scored}
    seen = 0
    e_dpo, d_dpo = (scored_pairs(run, METHODS[name](), name) for name in ("e-dpo", "d-dpo"))
    for text, of_members, of_one in zip(subset(run, "rho"), e_dpo, d_dpo, strict=True):
        row = of_row[text["prompt"], text["chosen"]]
        members = [c - r for c, r in zip(row["chosen_member_rewards"], row["rejected_member_rewards"], strict=True)]
        assert of_members["member_margins"] == members
        assert of_one["reward_margin"] == pytest.approx(sum(members) / 2)
        seen += 1
    assert seen > 10


# ---------------------------------------------------------------- breaking off, and ranks

KILLED = """
import os, signal, sys
from lm.judging import scored_sets
from lm.score import main
scored_sets.SHARD = 8
write = scored_sets.Parts.write
def write_and_die(self, shard, *rest):
    write(self, shard, *rest)
    if (self.number, shard) == (1, 1):
        os.kill(os.getpid(), signal.SIGKILL)
scored_sets.Parts.write = write_and_die
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.thorough
def test_two_ranks_are_killed_and_one_process_goes_on_to_the_same_bytes(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    specs = [chat_model(tmp_path / "A", tokenizer)[2], plain_model(tmp_path / "B", tokenizer)[2]]
    named = [option for spec in specs for option in ("--reward-model", spec)]
    monkeypatch.setattr(scored_sets, "SHARD", 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have: on other threads a product is another in the last bit
    score(tmp_path / "whole.jsonl", *named, rows=numbered(21))
    (tmp_path / "killed.py").write_text(KILLED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun.append(str(tmp_path / "killed.py"))
    options = ["--data", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--device", "cpu"]
    killed = subprocess.run(
        [*torchrun, *options, *named],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"exitcode  : {-signal.SIGKILL}" in killed.stderr, killed.stderr[-3000:]
    assert killed.stderr.count("[rewards] B, 21 pairs") == 1
    parts = tmp_path / "out.jsonl.parts"
    assert sorted(path.name for path in parts.glob("*.json")) == [
        f"0{model}-00000{shard}.json" for model, shard in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))
    ]
    assert not (tmp_path / "out.jsonl").exists()
    (parts / "00-000001.json").write_text('{"key": ')  # cut off, by a disk that was full
    capsys.readouterr()
    score(tmp_path / "out.jsonl", *named)
    torch.set_num_threads(threads)
    said = capsys.readouterr().err
    assert "[rewards] A, 21 pairs, going on at 8" in said
    assert "[rewards] B, 21 pairs, going on at 16" in said
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not parts.exists()


def test_parts_of_other_rows_models_or_settings_are_not_taken(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plain_model(tmp_path / "B", tokenizer)[2]
    monkeypatch.setattr("lm.judging.scored_sets.shutil.rmtree", lambda _: None)
    computed: list[int] = []
    own = RewardModel.rewards

    def counted(self: RewardModel, rows: Any, what: str) -> Any:
        computed.append(len(rows))
        return own(self, rows, what)

    monkeypatch.setattr(RewardModel, "rewards", counted)

    def again(*options: str) -> tuple[list[int], list[dict[str, Any]]]:
        computed.clear()
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        rows = score(tmp_path / "out.jsonl", "--reward-model", folder, *options, rows=numbered(5))
        return list(computed), rows

    assert again()[0] == [5]
    assert again()[0] == []
    assert again("--dtype", "float32")[0] == [5]
    assert again()[0] == [5]
    plain_model(tmp_path / "B", tokenizer, seed=1)
    assert again()[0] == [5]
    write_jsonl(tmp_path / "pairs.jsonl", numbered(6))
    assert again()[0] == [6]


def test_data_that_change_meanwhile_are_noticed(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = plain_model(tmp_path / "B", tokenizer)[2]
    own = RewardModel.rewards

    def and_change(self: RewardModel, rows: Any, what: str) -> Any:
        write_jsonl(tmp_path / "pairs.jsonl", numbered(6)[1:])
        return own(self, rows, what)

    monkeypatch.setattr(RewardModel, "rewards", and_change)
    score(tmp_path / "out.jsonl", "--reward-model", folder, rows=numbered(5), status=2)
    assert "has changed while it was scored; start again" in capsys.readouterr().err


# ---------------------------------------------------------------- an LLM's verdicts

PAIRS = [
    {"prompt": f"post {i}", "chosen": f"{a} ours", "rejected": f"{b} theirs"}
    for i, (a, b) in enumerate([(5, 1), (1, 4), (3, 3)])
]


def judged(out: Path, url: str, *options: str, status: int = 0) -> list[dict[str, Any]]:
    named = ("--judge-model", "hub/m", "--endpoint", url, "--task", "summary")
    return score(out, *named, *options, rows=PAIRS, status=status)


def test_a_judges_reward_is_half_the_log_odds_of_its_verdicts(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = plain_model(tmp_path / "B", tokenizer)[2]
    with Endpoint(fair) as endpoint:
        rows = judged(tmp_path / "out.jsonl", endpoint.url, "--reward-model", folder)
    margins = [row["chosen_member_rewards"][1] - row["rejected_member_rewards"][1] for row in rows]
    assert margins == pytest.approx([math.log(5), -math.log(5), 0])
    assert [row["chosen_reward_m"] for row in rows] == [row["chosen_member_rewards"][1] for row in rows]
    assert len(endpoint.received) == 6, "every pair in both orders"
    assert judge_reward(0.75) - judge_reward(0.25) == pytest.approx(math.log(2))


def test_only_first_place_is_no_merit_and_what_has_no_verdict_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(texts: dict[str, str], _: int) -> str:
        return "no verdict" if texts["text"] == "post 1" and "ours" in texts["summary A"] else "VERDICT: A"

    with Endpoint(answer) as endpoint:
        rows = judged(tmp_path / "out.jsonl", endpoint.url)
    assert [row["prompt"] for row in rows] == ["post 0", "post 2"]
    assert [row["chosen_reward"] for row in rows] == [0.0, 0.0], "alone, it gives the one reward"
    assert not any(set(rewards.MEMBERS) & row.keys() for row in rows)
    assert "left out: 1 rows, no verdict of the judge" in capsys.readouterr().out


def test_a_judge_without_verdicts_ends_the_command_and_keeps_the_other_scores(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, folder = tmp_path / "out.jsonl", plain_model(tmp_path / "B", tokenizer)[2]
    with Endpoint(lambda *_: "both are nice") as endpoint:
        judged(out, endpoint.url, "--reward-model", folder, status=1)
    assert not out.exists()
    assert list((tmp_path / "out.jsonl.parts").glob("00-*.json"))
    monkeypatch.setattr(scored_sets, "RewardModel", None)
    monkeypatch.chdir(tmp_path)
    with Endpoint(fair) as endpoint:
        rows = judged(out, endpoint.url, "--reward-model", "B/", "--max-tokens", "4000")
    assert all(len(row["chosen_member_rewards"]) == 2 for row in rows), "scored once, whatever the model's spelling"


def test_a_judge_that_broke_goes_on_from_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm.judging.llm.LLMJudge", partial(LLMJudge, retries=0, parallel=1))

    def breaks(texts: dict[str, str], turn: int) -> Any:
        return (400, "out of credit") if turn > 3 else fair(texts, turn)

    with Endpoint(breaks) as endpoint:
        judged(tmp_path / "out.jsonl", endpoint.url, status=1)
    said = capsys.readouterr().err
    assert "out of credit" in said
    assert "the same command goes on from there" in said
    assert SECRET not in said
    with Endpoint(fair) as endpoint:
        rows = judged(tmp_path / "out.jsonl", endpoint.url)
    assert len(endpoint.received) == 3, "what was answered is not asked again"
    assert [row["chosen_reward"] > 0 for row in rows] == [True, False, False]
    assert len(list(read_jsonl(tmp_path / "out.jsonl.judge.jsonl"))) == 6


# ---------------------------------------------------------------- refusals


def broken(change: Callable[[Path], None]) -> Callable[[Path, PreTrainedTokenizerBase], str]:
    def make(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
        plain_model(folder, tokenizer)
        change(folder)
        return str(folder)

    return make


def settings(**changed: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**old, **changed}))

    return change


def headless(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def endless(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    old = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in old.items() if name != "eos_token"}))


def of_two_labels(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    return save(folder, tokenizer, reward_model(vocab_size=len(tokenizer), num_labels=2))[2]


def policy(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    return save(folder, tokenizer, causal_lm(vocab_size=len(tokenizer)))[2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (of_two_labels, "--reward-model '.*B': a reward model has one label, it has 2"),
        (policy, "--reward-model '.*B': a sequence-classification model is needed, it is a LlamaForCausalLM"),
        (broken(headless), r"--reward-model '.*B': its weights lack score.weight, which would be drawn at random"),
        (broken(pickled), r"safetensors weights are needed, the folder has only pickled ones \(pytorch_model.bin\)"),
        (broken(settings(auto_map={"AutoConfig": "own.Config"})), "brings code of its own"),
        (broken(endless), "neither a chat template, nor a separator, nor an end-of-text token"),
        (lambda *_: "scratch:tiny", "--reward-model 'scratch:tiny': a trained reward model is needed$"),
        (lambda *_: "./nowhere", "model './nowhere': there is no such folder"),
    ],
)
def test_models_that_are_refused(
    make: Callable[[Path, PreTrainedTokenizerBase], str],
    message: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = make(tmp_path / "B", tokenizer)
    score(tmp_path / "out.jsonl", "--reward-model", spec, status=2)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, said), said
    assert not (tmp_path / "out.jsonl").exists()


def test_a_template_that_refuses_names_the_row(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = chat_model(tmp_path / "A", tokenizer)[2]
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system here') }}{% endif %}"
    (tmp_path / "A" / "chat_template.jinja").write_text(refusal + CHAT)
    score(tmp_path / "out.jsonl", "--reward-model", folder, status=2)
    assert "pairs.jsonl, line 3: the chat template of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name one or more models by --reward-model, or a judge by --judge-model"),
        (["--judge-model", "m"], "--judge-model and --task go together"),
        (["--reward-model", "{B}", "--task", "summary"], "--judge-model and --task go together"),
        (["--reward-model", "{B}", "--endpoint", "http://h/v1"], "--endpoint goes with --judge-model"),
        (["--reward-model", "{B}", "--reward-model", "{B}/"], "name one model twice"),
        (["--reward-model", "{B}", "--batch-tokens", "0"], "--batch-tokens must be at least 1, got 0"),
        (["--reward-model", "{B}", "--max-length", "1"], "--max-length must be at least 2, got 1"),
        (["--reward-model", "{B}", "--max-length", "9999"], "--max-length 9999 must be at most the 1024 tokens"),
        (["--reward-model", "{B}", "--out", "out.csv"], "out.csv: a file of type .jsonl, .jsonl.gz, .parquet is"),
        (["--reward-model", "{B}", "--out", "{there}"], "exists; name another file, or remove it"),
        (
            ["--reward-model", "{B}", "--data", "{empty}"],
            "no row is a comparison, left out were {'empty completion': 1}",
        ),
        (["--reward-model", "{B}", "--data", "./nowhere.jsonl"], "there is no such file or folder"),
        (["--judge-model", "m", "--task", "summary", "--endpoint", "h"], r"LLMJudge.base_url must be http(s)"),
    ],
)
def test_options_that_are_refused(
    options: list[str],
    message: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    paths = {"B": plain_model(tmp_path / "B", tokenizer)[2]}
    for name, row in (("there", ROWS[0]), ("empty", ROWS[1])):
        paths[name] = str(tmp_path / f"{name}.jsonl")
        write_rows(Path(paths[name]), [row])
    filled = [paths.get(option.strip("{}/"), option) for option in options]
    data, out = str(tmp_path / "pairs.jsonl"), tmp_path / "out.jsonl"
    with contextlib.suppress(SystemExit):
        assert main(over({"--data": data, "--out": str(out)}, filled)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_which_of_the_two_commands_it_is() -> None:
    assert is_for_any_set(["--data", "d", "--reward-model=m", "--out", "f"])
    assert is_for_any_set(["--out", "f", "--help"])
    assert is_for_any_set(["--data", "d", "--judge-model", "m"])
    assert not is_for_any_set([])
    assert not is_for_any_set(["--config", "c.yaml", "--output_dir", "out", "--data.path", "p"])
