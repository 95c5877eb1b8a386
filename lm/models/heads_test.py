"""Reward models of architectures for which transformers has no class are as those for which it has one; heads read the
last hidden state, as wide as it is, in float32."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from lm.config import BiasConfig, Config, DataConfig, LogprobsConfig, LoraConfig, Scoring, WorldConfig
from lm.judging.reward_models import RewardModel
from lm.logprobs.completions import CompletionModel, collate, state_width
from lm.logprobs.scoring import score_pairs
from lm.models.heads import ensure_reward_class
from lm.models.loading import check_reward_base, check_reward_model, load_tokenizer
from lm.models.opening import open_policy, open_reward_model
from lm.stages.data import tokenizer
from lm.stages.labels import labelled_pairs, open_oracle
from lm.stages.policies import policy
from lm.stages.rewards import reward
from lm.stages.run import Run
from tests.tiny import ARCHITECTURES, causal_lm, completion, reward_model, training

LLAMA = ARCHITECTURES["llama"][1]
EXPERTS = {"num_experts_per_tok": 2}
WITHOUT_A_CLASS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ARCHITECTURES["mamba"],
    "lfm2": ARCHITECTURES["lfm2"],
    "granite": ARCHITECTURES["granite"],
    "olmoe": ("Olmoe", {**LLAMA, **EXPERTS, "num_experts": 4}),
    "gemma4": (
        "Gemma4Text",
        {**LLAMA, "head_dim": 8, "vocab_size_per_layer_input": 50, "hidden_size_per_layer_input": 8},
    ),
    "granitemoe": ("GraniteMoe", {**LLAMA, **EXPERTS, "num_local_experts": 4}),
    "recurrent-gemma": ARCHITECTURES["recurrent-gemma"],
    "cohere": ("Cohere", LLAMA),
}
"""Some of the hundred."""


def shape(name: str, **options: Any) -> Any:
    kind, own = WITHOUT_A_CLASS[name]
    return getattr(transformers, f"{kind}Config")(**{**own, **options})


@pytest.mark.parametrize("name", WITHOUT_A_CLASS)
def test_a_reward_model_of_any_architecture_is_saved_and_read_and_reads_the_last_state(
    name: str, tmp_path: Path
) -> None:
    config = shape(name, num_labels=1)
    ensure_reward_class(config)
    ensure_reward_class(config)  # once is enough
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    base.save_pretrained(tmp_path / "base")
    model, found = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, output_loading_info=True
    )
    assert set(found["missing_keys"]) == {"score.weight"}
    model.eval().save_pretrained(tmp_path / "reward")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    assert json.loads((tmp_path / "reward" / "config.json").read_text())["architectures"] == [type(model).__name__]
    rows = [[3, 4, 5, 6, 1], [3, 4, 7, 1]]
    with torch.no_grad():
        by_hand = torch.stack([model.score(base.base_model(torch.tensor([r]))[0][0, -1]) for r in rows])[:, 0]
        alone = torch.cat([again(torch.tensor([row])).logits for row in rows])[:, 0]
        padded = again(torch.tensor([rows[0], [*rows[1], config.pad_token_id]])).logits[:, 0]
        ours = CompletionModel(again)(**collate([[3, 4]], [[[5, 6, 1], [7, 1]]])).rewards
    for rewards in (alone, padded, ours):
        torch.testing.assert_close(rewards, by_hand, rtol=1e-4, atol=1e-5)
    assert abs(float(by_hand[0] - by_hand[1])) > 1e-6


def test_an_architecture_that_has_a_class_keeps_it() -> None:
    ensure_reward_class(transformers.LlamaConfig())
    assert type(reward_model("llama")).__module__.startswith("transformers.")
    assert type(reward_model("llama")) is transformers.LlamaForSequenceClassification


def test_what_can_be_no_reward_model_is_refused_before_pi_ref_is_trained(tmp_path: Path) -> None:
    transformers.ViTConfig(hidden_size=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no reward model can be started from it .*'vit'.*oracle_model"):
        check_reward_base(str(tmp_path), False)


WORLD = DataConfig(
    prompt_template="{post}\n\nTL;DR:",
    max_prompt_length=120,
    max_completion_length=60,
    valid_fraction=0.2,
    test_fraction=0.2,
    world=WorldConfig(posts=40),
)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    return load_tokenizer("scratch:tiny", ["the cat sat on the mat"] * 5, False)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("lora", [None, pytest.param(2, marks=pytest.mark.thorough)])
def test_mambas_go_all_the_way(lora: int | None, words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """pi_ref, a reward model that orders pairs, which judges as a given oracle and by lm.score; with adapters too."""
    base = tmp_path / "base"
    causal_lm("mamba", vocab_size=len(words)).save_pretrained(base)
    words.save_pretrained(base)
    once = training(micro_batch_size=8)
    trainings: Any = dict.fromkeys(("sft", "oracle", "reward", "policy"), once)
    options: dict[str, Any] = {"model": str(base), "device": "cpu", "data": WORLD, **trainings}
    options |= {"bias": BiasConfig(rho=None, member_fractions=[0.4, 0.6]), "methods": ["d-dpo"]}
    options["lora"] = LoraConfig(rank=lora, target_modules=["x_proj", "in_proj"] if lora else None)
    run = Run(Config(output_dir=str(tmp_path / "run"), **options))
    folder = reward(run, "rho").path
    rows = labelled_pairs(run, "valid")
    ours = torch.cat(score_pairs(open_reward_model(folder, run.config), rows, ""))
    assert len(set(ours.tolist())) > len(rows)
    check_reward_model(str(folder), False)
    judged = Run(Config(output_dir=str(tmp_path / "judged"), oracle_model=str(folder), **options))
    torch.testing.assert_close(torch.cat(score_pairs(open_oracle(judged), rows, "")), ours)
    texts = [{"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in rows]
    by_score, cut = RewardModel(str(folder), Scoring(device="cpu")).rewards(
        [(str(i), r) for i, r in enumerate(texts)], ""
    )
    torch.testing.assert_close(by_score, ours, rtol=1e-4, atol=1e-5)
    assert cut == 0


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize(
    ("architecture", "options", "width"),
    [
        ("opt", {"word_embed_proj_dim": 8, "do_layer_norm_before": False}, 8),
        ("opt", {"word_embed_proj_dim": 24}, 24),
        ("llama", {}, 16),
        ("mpt", {}, 16),
        ("granite", {}, 16),
    ],
)
def test_a_reward_head_is_as_wide_as_the_last_state_and_reads_it_on_both_routes(
    architecture: str, options: dict[str, Any], width: int
) -> None:
    base = causal_lm(architecture, **options).train()
    assert state_width(base) == width
    assert base.training
    model = CompletionModel(base.eval(), reward_head=True).double()
    head = model.reward_head
    assert head is not None
    assert head.weight.shape == (1, width)
    batch = collate([[3, 4, 5]], [[[6, 7, 1], [8, 1]]])
    settled = model(**batch)
    model.route = "padded"
    with model.stock() as plain, torch.no_grad():
        padded = model(**batch)
        by_hand = [
            head(plain.base_model(torch.tensor([row]))[0][0, -1]) for row in ([3, 4, 5, 6, 7, 1], [3, 4, 5, 8, 1])
        ]
    torch.testing.assert_close(padded.rewards, torch.cat(by_hand), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(settled.rewards, padded.rewards, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
@pytest.mark.parametrize("kind", ["reward model", "reward head"])
@pytest.mark.parametrize("route", ["packed", "padded"])
def test_heads_compute_in_float32_whatever_the_rest_does(how: str, kind: str, route: Any) -> None:
    rng = random.Random(0)
    rows = [completion(rng, 6, 9) for _ in range(1000)]
    torch.manual_seed(0)
    base = reward_model() if kind == "reward model" else causal_lm()
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    options = LogprobsConfig(autocast=how == "autocast", route=route)
    model = CompletionModel(base.to(dtype), reward_head=kind == "reward head", options=options).to(dtype).eval()
    with torch.no_grad():
        rewards = model(**collate([[3, 4]] * len(rows), [[row] for row in rows])).rewards
    assert rewards.dtype == torch.float32
    assert len(set(rewards.tolist())) > 0.99 * len(set(map(tuple, rows))), "16 bits have 256 values between 1 and 2"


@pytest.mark.parametrize("kind", ["Llama", "Roberta"])
def test_any_sets_rewards_do_not_tie_in_16_bits(kind: str, words: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Of models whose head is a `score`, and of those with another one."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, pad_token_id=words.pad_token_id, initializer_range=0.3, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    judge = RewardModel(str(tmp_path), Scoring(device="cpu", dtype="bfloat16"))
    assert judge.model.base_model.dtype == torch.bfloat16
    rng = random.Random(0)
    ids = [{"input_ids": completion(rng, 6, 9)} for _ in range(300)]
    with torch.no_grad():
        rewards = judge._plain(ids, "")
    assert len(set(rewards.tolist())) > 0.98 * len({tuple(row["input_ids"]) for row in ids})


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_drdo_trains_and_reads_a_head_of_an_opt_that_projects_its_states(
    words: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    causal_lm("opt", vocab_size=len(words), word_embed_proj_dim=8, max_position_embeddings=256).save_pretrained(base)
    words.save_pretrained(base)
    once = training(micro_batch_size=8)
    trainings: Any = dict.fromkeys(("sft", "oracle", "reward", "policy"), once)
    run = Run(Config(output_dir=str(tmp_path / "run"), model=str(base), device="cpu", data=WORLD, methods=["drdo"],
                     bias=BiasConfig(rho=None, member_fractions=[0.4, 0.6]), **trainings))  # fmt: skip
    folder = policy(run, "drdo").path
    assert load_file(folder / "reward_head.safetensors")["weight"].shape == (1, 8)
    opened = open_policy(folder, tokenizer(run), run.config, reward_head=True)
    rewards = score_pairs(opened, labelled_pairs(run, "valid"), "", rewards=True)
    assert torch.isfinite(torch.cat(rewards)).all()
