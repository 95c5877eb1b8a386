"""Tiny models and data that the tests of this package share. Vocabulary of 50, weights in float64, seeded."""

from __future__ import annotations

import random
from types import MethodType
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from lm.config import TrainingConfig

VOCABULARY = 50
END = 1
"""End-of-text."""
WINDOW = 5
"""Sliding window of the Mistral: shorter than every row of :func:`pairs`."""

_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": END, "bos_token_id": None}
_LLAMA = {
    **_IDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

ARCHITECTURES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, _LLAMA),
    "gpt2": (
        GPT2Config,
        {**_IDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "mistral-sliding": (MistralConfig, {**_LLAMA, "sliding_window": WINDOW}),
    "qwen2": (Qwen2Config, _LLAMA),
    "gpt-neox": (GPTNeoXConfig, {**_LLAMA, "num_key_value_heads": None}),
}


def close(actual: Tensor, expected: Tensor, *, tolerance: float = 1e-10, what: str = "") -> None:
    """Asserts that two tensors agree, absolutely or relatively, in value, shape and dtype."""
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}" if what else text
    )


def _rms_norm(self: Any, hidden: Tensor) -> Tensor:
    scale: Tensor = self.weight * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return hidden * scale


def _build(auto: Any, architecture: str, seed: int, options: dict[str, Any]) -> PreTrainedModel:
    config, shape = ARCHITECTURES[architecture]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(config(**{**shape, **options}), dtype=torch.float64)
        for parameter in model.parameters():
            # Far from the initialisation, so that no wrong position or mask goes unnoticed.
            parameter.add_(torch.randn_like(parameter) * 0.3)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_rms_norm, module)  # transformers' own computes in float32
    return model.eval()


def causal_lm(architecture: str = "llama", *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random causal LM, float64, in eval mode."""
    return _build(AutoModelForCausalLM, architecture, seed, config)


def reward_model(architecture: str = "llama", *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random sequence classifier with one label, float64, in eval mode."""
    return _build(AutoModelForSequenceClassification, architecture, seed, {"num_labels": 1, **config})


def completion(rng: random.Random, least: int = 1, most: int = 7) -> list[int]:
    """Token ids that end with end-of-text."""
    return [*(rng.randrange(2, VOCABULARY) for _ in range(rng.randint(least, most))), END]


def pairs(count: int, *, members: int = 3, seed: int = 0) -> Dataset:
    """Scored pairs as the policy trainer reads them; rows are of unequal length, scores are arbitrary numbers."""
    rng = random.Random(seed)

    def row(index: int) -> dict[str, Any]:
        return {
            "id": f"row{index}",
            "prompt_ids": completion(rng, 3, 9)[:-1],
            "chosen_ids": completion(rng, 3),
            "rejected_ids": completion(rng, 3),
            "sample_ids": completion(rng, 3),
            "ref_chosen_logps": rng.gauss(-20, 3),
            "ref_rejected_logps": rng.gauss(-20, 3),
            "ref_sample_logps": rng.gauss(-20, 3),
            "reward_margin": rng.gauss(0, 2),
            "member_margins": [rng.gauss(0, 20) for _ in range(members)],
        }

    return Dataset.from_list([row(index) for index in range(count)])


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
