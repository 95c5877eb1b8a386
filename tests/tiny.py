"""Tiny models and data that the tests of this package share. Vocabulary of 50, weights in float64, seeded."""

from __future__ import annotations

import random
from types import MethodType
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lm.config import LogprobsConfig, TrainingConfig
from lm.logprobs.completions import CompletionModel
from lm.models.loading import load_tokenizer
from lm.objectives import METHODS, PAPERS

VOCABULARY = 50
END = 1
"""End-of-text."""
WINDOW = 5
"""Sliding window of the Mistral: shorter than every row of `pairs`."""

_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": END, "bos_token_id": None}
_LLAMA = {
    **_IDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_HEADS = {**_LLAMA, "head_dim": 8}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
_SLIDING = {"sliding_window": WINDOW}
_GPT2 = {**_IDS, "n_embd": 16, "n_layer": 2, "n_head": 2}
_OPT = {**_IDS, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_NEXT = {
    f"linear_{what}": value
    for what, value in zip(
        ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim"), (2, 2, 8, 8), strict=True
    )
}

Architectures = dict[str, tuple[str, dict[str, Any]]]
PACKED: Architectures = {
    "llama": ("Llama", _LLAMA),
    "mistral-sliding": ("Mistral", {**_LLAMA, **_SLIDING}),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen2-sliding": ("Qwen2", {**_LLAMA, **_SLIDING, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3", _HEADS),
    "qwen3-moe": ("Qwen3Moe", {**_HEADS, **_EXPERTS, "num_experts": 4, "decoder_sparse_step": 1}),
    "gemma2": ("Gemma2", {**_HEADS, **_SLIDING, "query_pre_attn_scalar": 8}),
    "gemma3": (
        "Gemma3Text",
        {**_HEADS, **_SLIDING, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3-sliding": ("Phi3", {**_LLAMA, **_SLIDING}),
    "phi": ("Phi", _LLAMA),
    "gpt2": ("GPT2", {**_GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt-neox": ("GPTNeoX", {**_LLAMA, "num_key_value_heads": None}),
    "opt": ("OPT", {**_OPT, "word_embed_proj_dim": 16, "dropout": 0.0}),
    "olmo2": ("Olmo2", _LLAMA),
    "smollm3": ("SmolLM3", {**_LLAMA, "no_rope_layers": [1, 0]}),
    "granite": ("Granite", {**_LLAMA, "logits_scaling": 4.0, "attention_multiplier": 0.3}),
    "cohere2": ("Cohere2", {**_LLAMA, **_SLIDING, "logit_scale": 0.5}),
    "gpt-oss": ("GptOss", {**_HEADS, **_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
"""Architectures that take packed rows: transformers' config class and a small shape."""
PADDED: Architectures = {
    "bloom": ("Bloom", {**_IDS, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "mpt": ("Mpt", {**_IDS, "d_model": 16, "n_layers": 2, "n_heads": 2}),
    "mamba": ("Mamba", {**_IDS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "lfm2": ("Lfm2", {**_LLAMA, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "recurrent-gemma": (
        "RecurrentGemma",
        {**_HEADS, "num_hidden_layers": 3, "attention_window_size": WINDOW, "lru_width": 16},
    ),
    "qwen3-next": (
        "Qwen3Next",
        {
            **_HEADS,
            **_EXPERTS,
            **_NEXT,
            "num_experts": 4,
            "shared_expert_intermediate_size": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "stablelm": ("StableLm", _LLAMA),
    "falcon-alibi": (
        "Falcon",
        {**_IDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": True},
    ),
    "gptj": ("GPTJ", {**_GPT2, "rotary_dim": 4}),
    "falcon": ("Falcon", {**_IDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}),
    "mamba2": (
        "Mamba2",
        {
            **_IDS,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 4,
            "num_heads": 4,
            "head_dim": 8,
            "n_groups": 1,
        },
    ),
    "jamba": (
        "Jamba",
        {
            **_LLAMA,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "use_mamba_kernels": False,
        },
    ),
    "rwkv": ("Rwkv", {**_IDS, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}),
}
"""Architectures that cannot: recurrence, convolution, ALiBi, or attention that does not take the layout."""
ARCHITECTURES: Architectures = PACKED | PADDED


def close(actual: Tensor, expected: Tensor, *, tolerance: float = 1e-10, what: str = "") -> None:
    """Asserts that two tensors agree, absolutely or relatively, in value, shape and dtype."""
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}" if what else text
    )


def _rms_norm(self: Any, hidden: Tensor) -> Tensor:
    scale: Tensor = self.weight * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return hidden * scale


def _build(auto: Any, architecture: str, seed: int, options: dict[str, Any]) -> PreTrainedModel:
    name, shape = ARCHITECTURES[architecture]
    config = getattr(transformers, f"{name}Config")
    # Mixtures of experts have grouped products that do not know float64.
    experts = {"experts_implementation": "eager"} if {"num_experts", "num_local_experts"} & set(shape) else {}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(config(**{**shape, **options}), dtype=torch.float64, **experts)
        for parameter in model.parameters():
            # Far from the initialisation, so that no wrong position or mask goes unnoticed.
            parameter.add_(torch.randn_like(parameter) * 0.3)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = MethodType(_rms_norm, module)  # transformers' own computes in float32
    return model.eval()


def causal_lm(architecture: str = "llama", *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random causal LM, float64, in eval mode."""
    return _build(AutoModelForCausalLM, architecture, seed, config)


def reward_model(architecture: str = "llama", *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random sequence classifier with one label, float64, in eval mode."""
    return _build(AutoModelForSequenceClassification, architecture, seed, {"num_labels": 1, **config})


def wrap(model: PreTrainedModel, **options: Any) -> CompletionModel:
    """A model as the core runs it, with options of `LogprobsConfig`."""
    return CompletionModel(model, options=LogprobsConfig(**{"allocator": False, **options}))


TEXTS = ["the cat sat on the mat", "a dog ran to the cat"] * 5


def tokenizer() -> PreTrainedTokenizerBase:
    """Trained on TEXTS."""
    return load_tokenizer("scratch:tiny", TEXTS, False)


def completion(rng: random.Random, least: int = 1, most: int = 7) -> list[int]:
    """Token ids that end with end-of-text."""
    return [*(rng.randrange(2, VOCABULARY) for _ in range(rng.randint(least, most))), END]


def pairs(count: int, *, members: int = 3, seed: int = 0, soft: bool = False) -> Dataset:
    """Scored pairs as the policy trainer reads them; rows are of unequal length, scores are arbitrary numbers, and so
    are labels and weights, where these are soft."""
    rng = random.Random(seed)

    def row(index: int) -> dict[str, Any]:
        return {
            "id": f"row{index}",
            "prompt_ids": completion(rng, 3, 9)[:-1],
            "chosen_ids": completion(rng, 3),
            "rejected_ids": completion(rng, 3),
            "sample_ids": [completion(rng, 3), completion(rng, 3)],
            "ref_chosen_logps": rng.gauss(-20, 3),
            "ref_rejected_logps": rng.gauss(-20, 3),
            "ref_sample_logps": [rng.gauss(-20, 3), rng.gauss(-20, 3)],
            "reward_margin": rng.gauss(0, 2),
            "member_margins": [rng.gauss(0, 20) for _ in range(members)],
        }

    made = Dataset.from_list([row(index) for index in range(count)])
    if soft:
        for name, values in (("chosen_probability", [0.5, 0.7, 0.9, 1.0]), ("weight", [1.0, 3.0, 0.2])):
            made = made.add_column(name, [values[i % len(values)] for i in range(count)])
    return made


def training(**options: Any) -> TrainingConfig:
    """One step of SGD-like size on a mini-batch of eight; options override."""
    return TrainingConfig(
        **{
            "max_steps": 1,
            "batch_size": 8,
            "learning_rate": 1e-2,
            "schedule": "constant_with_warmup",
            "warmup_fraction": 0.0,
            "max_grad_norm": 1e6,
            "logging_steps": 1,
            **options,
        }
    )


def each_method(*more: str) -> list[Any]:
    """Names of METHODS as parameters of a test, and `more`. Other authors' methods are another function of the same
    log-probs as the papers', so all but one (SimPO, which has no reference) are thorough tests."""
    always = {*PAPERS, "simpo"}
    marks = {name: [] if name in always else [pytest.mark.thorough] for name in METHODS}
    return [*(pytest.param(name, marks=marks[name]) for name in METHODS), *more]


class ExactHead:
    """TRL's chunked head in the hidden states' own type; TRL's rounds to float32."""

    @staticmethod
    def apply(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *_: Any) -> tuple[Any, ...]:
        logps = torch.nn.functional.linear(hidden, weight, bias).log_softmax(-1)
        return (logps.gather(1, targets[:, None])[:, 0], None, None, None, None)
