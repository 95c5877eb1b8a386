"""What is refused of a model that someone brings, by kind, with several instances, at each door that opens models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lm.config import Config, DataConfig, LoraConfig, Scoring
from lm.judging.reward_models import RewardModel
from lm.judging.scored_sets import score_set
from lm.logprobs.completions import CompletionModel, collate
from lm.models import checks, noise
from lm.models.loading import (
    check_lora,
    check_model,
    check_reward_model,
    load_policy,
    load_reward_model,
    load_tokenizer,
)
from lm.models.weights import opened_without_weights
from lm.stages.run import Run
from tests.tiny import ARCHITECTURES, causal_lm, reward_model, training


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, **options: Any) -> Path:
    """A whole folder."""
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def policy(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    return save(causal_lm(vocab_size=len(tokenizer)), tokenizer, tmp_path / "policy")


@pytest.fixture
def judge(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    return save(reward_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "judge")


def config(**options: Any) -> Config:
    once = training()
    return Config(
        **{"output_dir": "unused", "model": "scratch:tiny", "dtype": "float64", "device": "cpu", **options},
        sft=once,
        oracle=once,
        reward=once,
        policy=once,
        data=DataConfig(max_prompt_length=16, max_completion_length=16),
    )


def changed(folder: Path, **settings: Any) -> None:
    """Of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def without(folder: Path, *names: str) -> None:
    """Takes weights away."""
    file = folder / "model.safetensors"
    state = {name: value for name, value in load_file(file).items() if name not in names}
    save_file(state, file, metadata={"format": "pt"})


# ---------------------------------------------------------------- folders


def _adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))


def _adapter_alone(folder: Path) -> None:
    _adapter(folder)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def _sharded(folder: Path) -> None:
    """In two files and an index."""
    file = folder / "model.safetensors"
    state = load_file(file)
    file.unlink()
    parts = {
        "model-00001-of-00002.safetensors": dict(list(state.items())[:5]),
        "model-00002-of-00002.safetensors": dict(list(state.items())[5:]),
    }
    for name, part in parts.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    where = {key: name for name, part in parts.items() for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _shard_missing(folder: Path) -> None:
    _sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def _shard_truncated(folder: Path) -> None:
    _sharded(folder)
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _shard_of_another(folder: Path) -> None:
    _sharded(folder)
    first, second = sorted(folder.glob("*.safetensors"))
    shutil.copy(first, second)


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "adapter beside": (_adapter, r"an adapter of owner/base \(adapter_config.json\) beside full weights.*remove"),
    "adapter alone": (_adapter_alone, r"is an adapter of owner/base alone.*merge_and_unload"),
    "truncated": (_truncated, r"model.safetensors \([\d,]+ bytes\) is truncated or damaged"),
    "empty": (_empty, r"model.safetensors \(0 bytes\) is truncated or damaged"),
    "git-lfs": (_pointer, "model.safetensors is a pointer of git-lfs and no weights; run git lfs pull"),
    "shard missing": (_shard_missing, "names model-00002-of-00002.safetensors, which the folder lacks"),
    "shard truncated": (_shard_truncated, "model-00002-of-00002.safetensors .* is truncated or damaged"),
    "shard of another": (_shard_of_another, "says that model-00002-of-00002.safetensors has .*, which it has not"),
    "gptq": (lambda f: changed(f, quantization_config={"quant_method": "gptq", "bits": 4}), r"quantised \(gptq"),
    "awq": (lambda f: changed(f, quantization_config={"quant_method": "awq", "bits": 4}), r"quantised \(awq"),
    "bnb": (
        lambda f: changed(f, quantization_config={"load_in_4bit": True}),
        r"quantised \(bitsandbytes, quantization_config in config.json\).*name the model that it was quantised from",
    ),
    "fp8": (lambda f: changed(f, quantization_config={"quant_method": "fp8"}), r"quantised \(fp8"),
    "more layers": (
        lambda f: changed(f, num_hidden_layers=3, layer_types=None),
        r"its weights lack model\.layers\.2\..* and 5 more, which would be drawn at random; the config or the weights",
    ),
    "fewer layers": (
        lambda f: changed(f, num_hidden_layers=1, layer_types=None),
        r"have more layers than its config says \(model\.layers\.1\.",
    ),
    "other shape": (
        lambda f: changed(f, intermediate_size=32),
        r"model\.layers\.0\.mlp\.down_proj\.weight.* of another shape than its config says",
    ),
    "no norm": (
        lambda f: without(f, "model.norm.weight"),
        r"its weights lack model\.norm\.weight, which would be drawn",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "its config.json is no JSON"),
}
"""What was done to a whole folder, and what is said."""


ROWS = __file__
"""A file that is there, and is not read before the models are looked at."""


@pytest.mark.parametrize("what", FOLDERS)
def test_folders_that_are_not_whole_plain_models_are_refused_by_name(what: str, policy: Path, judge: Path) -> None:
    spoil, said = FOLDERS[what]
    for folder, option, check in (
        (policy, "model", lambda: check_model(str(policy), False)),
        (judge, "oracle_model", lambda: check_reward_model(str(judge), False)),
        (judge, "--reward-model", lambda: score_set(ROWS, Path("none.jsonl"), [str(judge)], Scoring())),
    ):
        if option != "--reward-model":
            check()
            spoil(folder)
        with pytest.raises(ValueError, match=f"^{option} '.*{folder.name}': .*{said}") as refused:
            check()
        assert "\n" not in str(refused.value)


def test_a_sharded_folder_is_whole_where_all_shards_are(policy: Path) -> None:
    _sharded(policy)
    check_model(str(policy), False)
    assert checks.weights_whole(policy).value == "2 files"


def test_a_run_refuses_before_it_makes_anything(policy: Path, judge: Path, tmp_path: Path) -> None:
    _truncated(policy)
    with pytest.raises(ValueError, match=r"model '.*policy': .* is truncated"):
        Run(config(model=str(policy), output_dir=str(tmp_path / "run")))
    without(judge, "score.weight")
    with pytest.raises(ValueError, match=r"oracle_model '.*judge': its weights lack score\.weight.*name a trained"):
        Run(config(oracle_model=str(judge), output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").rglob("*.safetensors"))


# ---------------------------------------------------------------- weights


def test_only_the_head_of_what_is_about_to_be_trained_may_be_new(
    tokenizer: PreTrainedTokenizerBase, policy: Path, judge: Path
) -> None:
    own = config(model=str(policy), oracle_model=str(judge))
    torch.manual_seed(0)
    assert load_reward_model(policy, own, new_head=True).score.weight.abs().sum() > 0
    load_reward_model(judge, own)
    with pytest.raises(ValueError, match=r"lack score\.weight, which would be drawn at random; name a trained reward"):
        load_reward_model(policy, own)
    without(judge, "score.weight")
    with pytest.raises(ValueError, match=r"oracle_model '.*' ?: its weights lack score\.weight"):
        load_reward_model(judge, own)
    with pytest.raises(ValueError, match=r"--reward-model '.*': its weights lack score\.weight"):
        RewardModel(str(judge), Scoring(device="cpu"))
    without(policy, "model.norm.weight")  # not even beside a new head
    with pytest.raises(ValueError, match=r"its weights lack model\.norm\.weight"):
        load_reward_model(policy, own, new_head=True)


@pytest.mark.parametrize("architecture", ["llama", "gpt-neox", "mamba"])
def test_a_base_model_without_its_head_is_refused(
    architecture: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    whole = causal_lm(architecture, vocab_size=len(tokenizer), tie_word_embeddings=False)
    folder = save(whole.base_model, tokenizer, tmp_path / "headless")
    with pytest.raises(ValueError, match="drawn at random; name a causal language model with its head"):
        check_model(str(folder), False)
    with pytest.raises(ValueError, match="drawn at random"):
        load_policy(folder, tokenizer, config(model=str(folder)))
    tied = causal_lm(architecture, vocab_size=len(tokenizer), tie_word_embeddings=True)
    check_model(str(save(tied, tokenizer, tmp_path / "tied")), False)


def test_weights_that_are_left_over_are_said(policy: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = policy / "model.safetensors"
    save_file({**load_file(file), "v_head.summary.weight": torch.zeros(3)}, file, metadata={"format": "pt"})
    check_model(str(policy), False)
    assert "weights that the model has no place for are left out: v_head.summary.weight" in caplog.text


LEFT_OVER: dict[str, tuple[str, bool]] = {
    "a bias": ("model.layers.0.self_attn.q_proj.bias", False),
    "a bias without the prefix": ("layers.1.mlp.down_proj.bias", False),
    "a norm": ("model.layers.1.self_attn.q_norm.weight", False),
    "a bias of the last norm": ("model.norm.bias", False),
    "a bias of the head": ("lm_head.bias", False),
    "an adapter": ("model.layers.0.self_attn.q_proj.lora_A.weight", False),
    "a rotary table": ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
    "a mask": ("model.layers.0.self_attn.masked_bias", True),
    "GPT-2's mask": ("h.0.attn.bias", True),
    "a reward head": ("score.weight", True),
    "a value head": ("v_head.summary.bias", True),
    "a tower of images": ("vision_tower.layers.0.fc.bias", True),
    "layers that predict further": ("mtp.layers.0.eh_proj.weight", True),
}


@pytest.mark.parametrize("what", LEFT_OVER)
def test_weights_left_over_within_the_model_are_refused(what: str, policy: Path, judge: Path) -> None:
    key, ok = LEFT_OVER[what]
    for folder, look in ((policy, check_model), (judge, check_reward_model)):
        file, refused = folder / "model.safetensors", not ok and not (folder == judge and key.startswith("lm_head"))
        save_file({key: torch.zeros(3), **load_file(file)}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"its weights have {key}, for which") if refused else nullcontext():
            look(str(folder), False)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_where_they_are_read(
    number: float, policy: Path, judge: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    for folder in (policy, judge):
        file = folder / "model.safetensors"
        state = load_file(file)
        state["model.layers.1.mlp.up_proj.weight"][3, 2] = number
        save_file(state, file, metadata={"format": "pt"})
    said = r"not all finite: model\.layers\.1\.mlp\.up_proj\.weight has NaN or infinity in float64"
    with pytest.raises(ValueError, match=f"^model .*{said}"):
        load_policy(policy, tokenizer, config(model=str(policy)))
    with pytest.raises(ValueError, match=f"^oracle_model .*{said}"):
        load_reward_model(judge, config(oracle_model=str(judge)))


def test_a_reward_model_opens_a_language_model_and_the_other_way_round(policy: Path, judge: Path) -> None:
    """Their heads are left out, and said."""
    load_reward_model(policy, config(), new_head=True)
    without_head = opened_without_weights(AutoModelForCausalLM, "model", str(judge), False)[1]
    assert "lack lm_head.weight" in without_head.advice


def test_an_oracle_reads_token_ids_by_a_score_head(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """An encoder with another head can be scored with, by its own way of reading, but be no oracle of a run."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    made = transformers.BertConfig(**shape, vocab_size=len(tokenizer), num_labels=1)
    folder = save(AutoModelForSequenceClassification.from_config(made), tokenizer, tmp_path / "bert")
    with pytest.raises(ValueError, match=r"oracle_model '.*bert': a `score` head with one label is needed, Bert"):
        check_reward_model(str(folder), False)
    check_reward_model(str(folder), False, option="--reward-model")


# ---------------------------------------------------------------- tokens


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused(
    tokenizer: PreTrainedTokenizerBase, judge: Path, tmp_path: Path
) -> None:
    small = save(causal_lm(vocab_size=len(tokenizer) - 3), tokenizer, tmp_path / "small")
    said = rf"ids up to {len(tokenizer) - 1} \('.*'\), its embedding has {len(tokenizer) - 3} rows, for ids up to"
    with pytest.raises(ValueError, match=f"model '.*small': its tokenizer has {said}"):
        check_model(str(small), False)
    with pytest.raises(ValueError, match=said):
        load_policy(small, tokenizer, config(model=str(small)))
    more = load_tokenizer(str(judge), (), False)
    more.add_tokens(["<new>"])
    more.save_pretrained(judge)
    said = r"--reward-model '.*judge': its tokenizer has ids up to \d+ \('<new>'\)"
    with pytest.raises(ValueError, match=said):
        score_set(ROWS, Path("none.jsonl"), [str(judge)], Scoring())
    with pytest.raises(ValueError, match=said):
        RewardModel(str(judge), Scoring(device="cpu"))


def test_an_end_beyond_the_embedding_is_refused_and_a_special_token_of_images_only_said(
    policy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Gemma 3 1B is as the second."""
    images = load_tokenizer(str(policy), (), False)
    images.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images.save_pretrained(policy)
    check_model(str(policy), False)
    assert "no text may hold <image>: the embedding has no row for it" in caplog.text
    images.chat_template = "<image>{{ messages }}"
    images.save_pretrained(policy)
    with pytest.raises(ValueError, match="'<image>'"):
        check_model(str(policy), False)
    images.chat_template = None
    images.add_special_tokens({"eos_token": "<end>"})
    images.save_pretrained(policy)
    with pytest.raises(ValueError, match="'<end>'"):
        check_model(str(policy), False)


# ---------------------------------------------------------------- what passes say


def encoder(kind: str, **options: Any) -> PreTrainedModel:
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}Config")(**shape, intermediate_size=24, **options)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(made)
    return model


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra", "XLMRoberta", "RoFormer"])
def test_encoders_see_the_answer_and_are_refused(kind: str) -> None:
    check = checks.causal(encoder(kind))
    assert not check.ok
    assert check.value > check.limit
    assert "changing a row's last token changes an earlier log-prob" in check.advice
    assert not checks.causal(encoder(kind).bfloat16()).ok
    assert checks.causal(encoder(kind, is_decoder=True)).ok


@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", "gemma2", "bloom", "mamba", "lfm2", "qwen3-next", "qwen3-moe"]
)
def test_decoders_are_causal_in_every_type(architecture: str) -> None:
    model = causal_lm(architecture).train()
    assert checks.causal(model).ok
    assert model.training
    assert checks.causal(model.bfloat16()).ok


def test_an_encoder_as_the_model_is_refused_where_it_is_opened(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    made = transformers.BertConfig(**shape, vocab_size=len(tokenizer), max_position_embeddings=64)
    folder = save(AutoModelForCausalLM.from_config(made), tokenizer, tmp_path / "bert")
    with pytest.raises(ValueError, match=r"model '.*bert': BertLMHeadModel is not causal.*is_decoder true"):
        load_policy(folder, tokenizer, config(model=str(folder)))
    changed(folder, is_decoder=True)
    load_policy(folder, tokenizer, config(model=str(folder)))


NOISY: dict[str, tuple[str, dict[str, Any]]] = {
    "dropout": ("gpt2", {"resid_pdrop": 0.5}),
    "layers left out": ("opt", {"layerdrop": 0.7}),
    "jitter": ("mixtral", {"router_jitter_noise": 0.9}),
    "dropout by the config": ("falcon-alibi", {"hidden_dropout": 0.5}),
    "attention dropout": ("llama", {"attention_dropout": 0.5}),
}
MIXTRAL = ("Mixtral", {**ARCHITECTURES["qwen3-moe"][1], "num_local_experts": 4})
BATCH = collate([[3, 4, 5, 6]], [[[7, 8, 9, 1], [10, 1]]])


@pytest.mark.parametrize("what", NOISY)
def test_noise_in_training_is_found_and_turned_off_where_models_are_opened(
    what: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "mixtral", MIXTRAL)
    architecture, options = NOISY[what]
    model = causal_lm(architecture, vocab_size=len(tokenizer), **options)
    found = checks.train_equals_eval(CompletionModel(model), **BATCH)
    assert not found.ok
    assert found.value > found.limit
    folder = save(causal_lm(architecture, vocab_size=len(tokenizer), **options), tokenizer, tmp_path / "noisy")
    opened = load_policy(folder, tokenizer, config(model=str(folder)))
    assert checks.train_equals_eval(CompletionModel(opened), **BATCH).ok
    name, value = next(iter(options.items()))
    assert json.loads((folder / "config.json").read_text())[name] == value


PHIMOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 128}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("jitter", [0.01, 0.0001])
def test_a_jitter_that_evaluation_reads_stays(seed: int, jitter: float) -> None:
    """PhiMoE's is a threshold in evaluation, which decides for few tokens; training, which draws from it, differs."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(seed)
    settings = transformers.PhimoeConfig(
        vocab_size=320, num_hidden_layers=2, router_jitter_noise=jitter, **shape, **PHIMOE
    )
    model = transformers.PhimoeForCausalLM(settings).eval()
    ids = torch.randint(3, 300, (8, 100))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
        before = model(ids).logits
        noise.turn_off(model)
        assert torch.equal(model.eval()(ids).logits, before)
    assert settings.router_jitter_noise == jitter
    assert {one.router_jitter_noise for one in model.modules() if hasattr(one, "router_jitter_noise")} == {jitter}


class Normalised(nn.Module):
    """Batch statistics instead of a dropout: nothing random, and yet another model in training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(states.transpose(1, 2)).transpose(1, 2)
        return result


class Rarely(nn.Module):
    """Noise under a name of its own."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + 0.1 * torch.randn_like(states) if self.training else states


@pytest.mark.parametrize("module", [Normalised(16).double(), Rarely()])
def test_what_cannot_be_turned_off_is_found_and_nothing_is_changed(module: nn.Module) -> None:
    model = causal_lm()
    model.model.norm = nn.Sequential(model.model.norm, module)
    wrapped = CompletionModel(model).train()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    drawn = torch.random.get_rng_state()
    assert not checks.train_equals_eval(wrapped, **BATCH).ok
    assert wrapped.training
    assert wrapped.route is None
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert torch.equal(drawn, torch.random.get_rng_state())


@pytest.mark.parametrize("architecture", ["llama", "qwen3-moe", "mamba", "qwen3-next"])
def test_models_without_noise_are_the_same_in_training(architecture: str) -> None:
    assert checks.train_equals_eval(CompletionModel(causal_lm(architecture)), **BATCH).value == 0
    assert checks.train_equals_eval(CompletionModel(causal_lm(architecture), reward_head=True), **BATCH).ok


# ---------------------------------------------------------------- the rest


def test_what_gets_no_adapter_is_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(causal_lm("qwen3-moe", vocab_size=len(tokenizer)), tokenizer, tmp_path / "moe")
    check_lora(str(folder), LoraConfig(rank=2), False)
    (said,) = [record.getMessage() for record in caplog.records if "lora" in record.getMessage()]
    assert "no adapter goes on model.layers.*.mlp.experts.down_proj, model.layers.*.mlp.experts.gate_up_proj" in said
    with pytest.raises(ValueError, match=r"gate_up_proj of Qwen3MoeForCausalLM are fused weights .* and no linear"):
        check_lora(str(folder), LoraConfig(rank=2, target_modules=["q_proj", "gate_up_proj"]), False)
    caplog.clear()
    check_lora(
        str(save(causal_lm(vocab_size=len(tokenizer)), tokenizer, tmp_path / "llama")), LoraConfig(rank=2), False
    )
    assert not caplog.records


def test_every_check_speaks_of_a_whole_model_and_holds(policy: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model, complete = opened_without_weights(AutoModelForCausalLM, "model", str(policy), False)
    found = [
        complete,
        checks.no_adapter(policy),
        checks.not_quantised(model.config),
        checks.weights_whole(policy),
        checks.tokenizer_fits(tokenizer, model),
        checks.end_token(tokenizer),
        checks.lora_targets(model, LoraConfig(rank=2)),
        checks.causal(causal_lm()),
        checks.train_equals_eval(CompletionModel(causal_lm()), **BATCH),
        checks.reward_head(reward_model()),
    ]
    assert all(check.ok for check in found)
    assert len({check.name for check in found}) == len(found)
    json.dumps([vars(check) for check in found])
    checks.require("model 'm'", *found)
    assert not checks.reward_head(causal_lm()).ok
    assert not checks.reward_head(reward_model(num_labels=2)).ok
