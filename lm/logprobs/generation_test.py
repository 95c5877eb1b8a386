"""Samples come from the policy that is scored, however its `generate` treats padding, caches, precision and memory."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lm.logprobs import generation
from lm.logprobs.generation import Generation, cache_size, fitting, generation_of, left_padded, own_draws
from lm.logprobs.sampling import sample_completions
from lm.logprobs.scoring_test import Ends, config, draw
from tests.tiny import END, VOCABULARY, causal_lm, wrap

pytestmark = pytest.mark.filterwarnings("ignore")  # some architectures say that they lack a fast kernel

PROMPTS = [[3, 4], [5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16]]
NOT_PADDED = ("recurrent-gemma", "rwkv")
"""Whose recurrence runs over padding on the left."""


def greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """By plain forwards of the row alone."""
    row = list(prompt)
    for _ in range(count):
        row.append(int(model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        if row[-1] == END:
            break
    return row[len(prompt) :]


@pytest.mark.parametrize(
    "architecture",
    ["llama", "mistral-sliding", "gpt2", "opt", "bloom", "falcon-alibi", "mamba", "lfm2", "jamba", *NOT_PADDED],
)
def test_samples_of_prompts_of_mixed_length_are_the_plain_forwards(
    architecture: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At a temperature near zero they are what plain forwards of each row alone say. Control: padded on the left
    whatever the model does with it, some are others."""
    model = causal_lm(architecture).float()
    expected = [greedy(model, prompt, 6) for prompt in PROMPTS]
    cold = config(temperature=1e-4)
    with caplog.at_level(logging.WARNING, "lm.logprobs"):
        assert draw(wrap(model), PROMPTS, cold) == expected
    assert ("without its cache" in caplog.text) == (architecture == "rwkv")  # whose cache mixes the rows of a batch up
    said = "with left padding a token's log-prob is off by" in caplog.text
    assert said == (architecture in NOT_PADDED)
    if architecture in NOT_PADDED:
        blind = Generation(pads=True, caches=True, reason=None, gap=None)
        monkeypatch.setattr("lm.logprobs.sampling.generation_of", lambda *args, **kwargs: blind)
        assert draw(wrap(model), PROMPTS, cold) != expected


def test_prompts_of_one_length_need_no_padding() -> None:
    found = generation_of(wrap(causal_lm("recurrent-gemma")), 8, pads=False)
    assert (found.pads, found.caches, found.spare) == (False, True, None)
    assert found.reason is not None
    assert "in packed rows a token's log-prob is off by" in found.reason
    assert "left padding" not in found.reason
    assert found.gap is not None
    assert found.gap < 1e-5


def test_a_model_without_positions_to_spare_is_sampled() -> None:
    """As many as the longest prompt and completion have, of embeddings that end there; prompts of a token or two."""
    for longest, prompts in ((1, PROMPTS), (2, PROMPTS), (1, [[3], [4, 5]]), (1, [[3], [4]])):
        positions = max(map(len, prompts)) + longest + 1  # what a model is refused without
        model = wrap(causal_lm("gpt2", n_positions=positions))
        assert len(draw(model, prompts, config(longest=longest))) == len(prompts)


def test_a_cache_that_forgets_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose cached steps see the last token alone is sampled without its cache; one that cannot be helped is
    refused."""
    monkeypatch.setattr(generation, "_of_the_loop", lambda *_: ("it is not taken here", 0.0))
    model = causal_lm()
    forward, wrong = model.forward, {"cache": True, "all": False}

    def forgetful(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        output = forward(*args, past_key_values=past_key_values, **kwargs)
        generating = kwargs.get("attention_mask") is not None
        if generating and (wrong["all"] or (past_key_values is not None and kwargs["input_ids"].shape[1] == 1)):
            output.logits = output.logits.flip(-1)
        return output

    monkeypatch.setattr(model, "forward", forgetful)
    found = generation_of(wrap(model), 8)
    assert (found.pads, found.caches) == (False, False)
    assert found.reason is not None
    assert "with its cache a token's log-prob is off by" in found.reason
    wrong["all"] = True
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be sampled from: what `generate` draws from is not"):
        generation_of(wrap(model), 8)


@pytest.mark.parametrize("architecture", NOT_PADDED)
def test_low_precision_and_small_weights_hide_nothing(architecture: str) -> None:
    """In bfloat16, or where nothing reacts to anything: found on a copy in float32, or with its weights shaken."""
    assert not generation_of(wrap(causal_lm(architecture).to(torch.bfloat16)), 8).pads
    weak = causal_lm(architecture)
    with torch.no_grad():
        for parameter in weak.parameters():
            parameter.mul_(1e-3)
    assert not generation_of(wrap(weak), 8).pads


def test_the_model_is_left_as_it_was() -> None:
    model = causal_lm().train()
    model.generation_config.update(repetition_penalty=5.0)
    habits, state = model.generation_config, torch.get_rng_state()
    generation_of(wrap(model), 8)
    assert model.generation_config is habits
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_prompts_end_together() -> None:
    ids, mask = left_padded([[3], [4, 5, 6]], torch.device("cpu"))
    assert ids.tolist() == [[0, 0, 3], [4, 5, 6]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_rows_beyond_the_original_context_are_not_sampled() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = wrap(causal_lm(max_position_embeddings=12, rope_parameters=rope))
    assert len(draw(model, PROMPTS, config(longest=5))) == 4
    with pytest.raises(ValueError, match="rows may have 13 tokens, but beyond 12"):
        draw(model, PROMPTS, config(longest=6))


# ---------------------------------------------------------------- precision, memory, draws


def test_under_autocast_samples_are_drawn_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_lm().float()
    seen: list[bool] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: seen.append(out.dtype == torch.bfloat16))
    for autocast, spare in product((False, True), (None, True)):
        wrapped = wrap(model, autocast=autocast)
        found = Generation(pads=True, caches=True, reason=None, gap=None, spare=spare)
        monkeypatch.setattr("lm.logprobs.sampling.generation_of", lambda *_, found=found, **__: found)
        draw(wrapped, PROMPTS, config())
        assert set(seen) == {autocast}
        seen.clear()


def test_the_size_of_a_cache() -> None:
    model = causal_lm()  # two layers, one head of keys and values, 8 wide
    assert cache_size(model.config, 10, 4) == 2 * 2 * 1 * 8 * 10 * 4
    assert cache_size(causal_lm("gpt2").config, 10, 2) == 2 * 2 * 2 * 8 * 10 * 2
    assert cache_size(causal_lm("mamba").config, 10, 4) == 0


def test_a_batch_whose_cache_does_not_fit_is_cut_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    by_generate = Generation(pads=True, caches=True, reason=None, gap=None)
    monkeypatch.setattr("lm.logprobs.sampling.generation_of", lambda *args, **kwargs: by_generate)
    model = wrap(causal_lm())
    row = cache_size(model.model.config, 13, 8) + 12 * VOCABULARY
    batches: list[int] = []
    generate = model.model.generate

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs["do_sample"]:
            batches.append(len(kwargs["input_ids"]))
        result: Tensor = generate(*args, **kwargs)
        return result

    monkeypatch.setattr(model.model, "generate", noted)
    assert fitting(model, 4, 13) == 4
    draw(model, PROMPTS, config())
    assert batches == [4]
    batches.clear()
    monkeypatch.setattr(generation, "free_memory", lambda device: int(2.5 * row / generation.SHARE))
    with caplog.at_level(logging.WARNING, "lm.logprobs"):
        draw(model, PROMPTS, config())
    assert batches == [2, 2]
    assert "sampling.batch_size 4 is cut to 2" in caplog.text
    monkeypatch.setattr(generation, "free_memory", lambda device: 1)
    assert fitting(model, 4, 13) == 1
    monkeypatch.setattr(generation, "free_memory", lambda device: None)
    assert fitting(model, 4, 13) == 4


def test_draws_of_their_own_touch_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an accelerator with several devices, played by generators on the CPU."""
    devices = [torch.Generator().manual_seed(i) for i in range(3)]
    module = SimpleNamespace(default_generators=devices, current_device=lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    torch.manual_seed(9)
    before = [g.get_state() for g in (*devices, torch.default_generator)]
    for device, mine in (("cuda:1", 1), ("cuda", 2)):
        with own_draws(torch.device(device), 5):
            assert [g.initial_seed() for g in devices] == [5 if i == mine else i for i in range(3)]
            first = torch.rand(3)
        after = [g.get_state() for g in (*devices, torch.default_generator)]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), first)


def test_no_prompts_no_samples() -> None:
    options = replace(config(), seed=1)
    assert sample_completions(wrap(causal_lm()), [], Ends(), options, seed=0, what="samples") == []
