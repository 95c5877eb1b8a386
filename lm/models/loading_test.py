"""Which model folders are refused before anything runs, and which tokenizers count as the same."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from lm.config import Config, DataConfig
from lm.logprobs.completions import CompletionModel
from lm.models import weights
from lm.models.loading import (
    check_model,
    check_reward_model,
    load_policy,
    load_reward_model,
    load_tokenizer,
    same_tokenizer,
    state_of,
)
from tests.tiny import TEXTS, causal_lm, reward_model, training


def config(**options: Any) -> Config:
    once = training()
    return Config(
        **{"output_dir": "unused", "model": "scratch:tiny", "dtype": "float64", "device": "cpu", **options},
        sft=once,
        oracle=once,
        reward=once,
        policy=once,
    )


def save(folder: Path, tokenizer: PreTrainedTokenizerBase, *, reward: bool = False, **shape: Any) -> str:
    """A complete model folder."""
    build = reward_model if reward else causal_lm
    build(vocab_size=len(tokenizer), **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_complete_folders_are_accepted_and_loaded(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    policy, judge = save(tmp_path / "policy", tokenizer), save(tmp_path / "judge", tokenizer, reward=True)
    check_model(policy, False)
    check_reward_model(judge, False)
    loaded = load_policy(policy, tokenizer, config())
    assert all(
        torch.equal(one, other)
        for one, other in zip(loaded.parameters(), causal_lm(vocab_size=len(tokenizer)).parameters(), strict=True)
    )
    assert load_reward_model(judge, config()).config.num_labels == 1
    assert same_tokenizer(tokenizer, load_tokenizer(policy, (), False))


def test_scratch_names_and_folders_that_are_not_there_are_named() -> None:
    with pytest.raises(ValueError, match=r"model 'scratch:tinny': the models from scratch are scratch:tiny"):
        check_model("scratch:tinny", False)
    for spec in ("./nowhere", "/no/where", "~/nowhere", "a/b/c"):
        with pytest.raises(ValueError, match=rf"model '{spec}': there is no such folder"):
            check_model(spec, False)
    check_model("owner/name", False)  # a hub name; the hub answers when it is loaded


def test_a_folder_without_tokenizer_config_or_weights_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = Path(save(tmp_path / "model", tokenizer))
    for pattern, message in (
        ("*.safetensors", "safetensors weights are needed, the folder has none"),
        ("tokenizer*", r"the folder has no tokenizer \(tokenizer.json\); save one with the model"),
        ("config.json", "the folder has no config.json"),
    ):
        for file in folder.glob(pattern):
            file.unlink()
        with pytest.raises(ValueError, match=message):
            check_model(str(folder), False)
    with pytest.raises(ValueError, match=r"the folder has no config\.json"):
        check_model(str(tmp_path), False)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickled_weights_are_refused(name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    folder = Path(save(tmp_path / "model", tokenizer))
    (folder / name).write_bytes(b"never read")
    check_model(str(folder), False)  # beside safetensors it is not loaded
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"only pickled ones \({name}\), which can run code when loaded"):
        check_model(str(folder), False)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_policy(folder, tokenizer, config())


def test_a_models_own_code_needs_consent(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    folder = Path(save(tmp_path / "model", tokenizer))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "auto_map": {"AutoConfig": "own.Config"}}))
    with pytest.raises(ValueError, match="brings code of its own; set trust_remote_code to true to run it"):
        check_model(str(folder), False)
    check_model(str(folder), True)


def test_only_a_trained_head_with_one_label_judges(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="oracle_model 'scratch:tiny': a trained reward model is needed; null trains one"
    ):
        check_reward_model("scratch:tiny", False)
    policy = save(tmp_path / "policy", tokenizer)
    with pytest.raises(ValueError, match="a sequence-classification model is needed, it is a LlamaForCausalLM"):
        check_reward_model(policy, False)
    two = save(tmp_path / "two", tokenizer, reward=True, num_labels=2)
    with pytest.raises(ValueError, match=r"oracle_model '.*two': a reward model has one label, it has 2"):
        check_reward_model(two, False)


def test_a_model_with_too_few_positions_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", tokenizer, max_position_embeddings=40)
    fits = DataConfig(max_prompt_length=31, max_completion_length=8)
    load_policy(folder, tokenizer, config(data=fits))
    with pytest.raises(
        ValueError,
        match=r"data.max_prompt_length 32 \+ data.max_completion_length 8 \+ 1 must be at most the 40 positions",
    ):
        load_policy(folder, tokenizer, config(data=DataConfig(max_prompt_length=32, max_completion_length=8)))


def test_a_tokenizer_that_cannot_be_loaded_or_never_ends_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = Path(save(tmp_path / "model", tokenizer))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded"):
        load_tokenizer(str(folder), (), False)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="its tokenizer has no end-of-text token"):
        load_tokenizer(str(folder), (), False)


def test_a_tokenizer_without_padding_pads_with_end_of_text(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(str(tmp_path), (), False).pad_token_id == tokenizer.eos_token_id


def test_the_same_tokenizer_is_the_one_that_gives_every_text_the_same_ids(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "copy")
    assert same_tokenizer(tokenizer, load_tokenizer(str(tmp_path / "copy"), (), False))
    assert same_tokenizer(tokenizer, load_tokenizer("scratch:tiny", TEXTS, False))
    other_texts = load_tokenizer("scratch:tiny", ["quick brown foxes jump"] * 5, False)
    assert not same_tokenizer(tokenizer, other_texts)
    # One vocabulary, but text is cut up in another way.
    tokenizer.save_pretrained(tmp_path / "cut")
    path = tmp_path / "cut" / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(settings))
    cut = load_tokenizer(str(tmp_path / "cut"), (), False)
    assert cut.get_vocab() == tokenizer.get_vocab()
    assert cut("cat")["input_ids"] != tokenizer("cat")["input_ids"]
    assert not same_tokenizer(tokenizer, cut)


def test_scratch_tokenizers_read_any_text_back(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in (" the cat", "żółć \n\n 🙂", "\tTL;DR:"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_scratch_models_are_functions_of_the_torch_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        weight: torch.Tensor = load_policy("scratch:tiny", tokenizer, config()).get_input_embeddings().weight
        return weight

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


# ---------------------------------------------------------------- what is saved


def test_a_saved_policy_generates_as_it_was_trained(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Not as its base model's settings say: other ends, penalties, a maximum, and only the likeliest tokens."""
    base = causal_lm(vocab_size=len(tokenizer))
    base.generation_config = GenerationConfig(
        eos_token_id=[3, 4], pad_token_id=5, repetition_penalty=1.7, no_repeat_ngram_size=2, suppress_tokens=[0, 7],
        do_sample=True, top_k=1, top_p=0.1, min_p=0.2, temperature=0.1, max_new_tokens=2, min_new_tokens=2,
    )  # fmt: skip
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    load_policy(tmp_path / "base", tokenizer, config()).save_pretrained(tmp_path / "policy")
    saved = json.loads((tmp_path / "policy" / "generation_config.json").read_text())
    kept = {name: value for name, value in saved.items() if name != "transformers_version" and value is not None}
    assert kept == {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
    } | ({"_from_model_config": False} if "_from_model_config" in kept else {})
    assert json.loads((tmp_path / "policy" / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mamba"])
def test_plain_generate_stops_at_our_end_and_draws_from_the_policy(
    architecture: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    end = tokenizer.eos_token_id
    base = causal_lm(architecture, vocab_size=len(tokenizer), eos_token_id=7)
    base.generation_config = GenerationConfig(
        eos_token_id=7, pad_token_id=7, suppress_tokens=[end], do_sample=True, top_k=1
    )
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    load_policy(tmp_path / "base", tokenizer, config()).save_pretrained(tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    prompt = torch.full((400, 1), 10)
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1)[:, 1]
        share = model(prompt[:1]).logits[0, -1].float().softmax(-1)
    counted = torch.bincount(drawn, minlength=len(share)) / len(drawn)
    assert float((counted - share).abs().sum()) < 1.2 * float((share * (1 - share) / len(drawn)).sqrt().sum() + 0.05)
    assert len(set(drawn.tolist())) > 1, "not the likeliest alone"
    with torch.no_grad():  # a policy that says the end after three tokens
        calls: list[int] = []

        def says(_: Any, __: Any, output: Any) -> Any:
            calls.append(1)
            output.logits[..., end if len(calls) > 3 else 9] += 1e6
            return output

        model.register_forward_hook(says)
        rows = model.generate(prompt[:1], attention_mask=prompt[:1] * 0 + 1, max_new_tokens=20)[0].tolist()
    assert rows == [10, 9, 9, 9, end]


def test_tied_tensors_are_copied_from_a_device_once(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As from an accelerator: `cpu` makes a new tensor of each."""
    model = causal_lm("gpt2")
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: self.clone())
    state = state_of(CompletionModel(model))
    assert state["model.lm_head.weight"] is state["model.transformer.wte.weight"]
    own = {name.removeprefix("model."): value for name, value in state.items()}
    model.save_pretrained(tmp_path, state_dict=own)
    assert (
        len([n for n in load_file(tmp_path / "model.safetensors") if n in ("lm_head.weight", "transformer.wte.weight")])
        == 1
    )
    assert not any(value.requires_grad for value in state.values())


def test_models_that_nothing_needs_are_gone_before_the_next_is_opened(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "model", tokenizer)
    monkeypatch.setattr(weights, "MANY", 0)
    model = load_policy(folder, tokenizer, config())
    model.circle = [model]  # as DDP and closures make them
    gone = weakref.ref(model)
    del model
    gc.disable()
    try:
        assert gone() is not None
        load_policy(folder, tokenizer, config())
        assert gone() is None
    finally:
        gc.enable()
