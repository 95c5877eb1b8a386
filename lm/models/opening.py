"""Models on the device where they score or sample."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from lm.config import Config
from lm.logprobs.completions import CompletionModel
from lm.models.loading import load_policy, load_reward_model


def device_of(config: Config) -> torch.device:
    """Where scoring runs."""
    return device_named(config.device)


def device_named(name: str) -> torch.device:
    """The accelerator for "auto" where there is one, else the CPU."""
    if name == "cpu" or not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return accelerator


def open_policy(
    folder: Path, tokenizer: PreTrainedTokenizerBase, config: Config, *, reward_head: bool = False
) -> CompletionModel:
    """A trained policy, ready to score or sample; with the reward head that was trained beside it, where asked for."""
    model = CompletionModel(load_policy(folder, tokenizer, config), reward_head=reward_head, options=config.logprobs)
    if model.reward_head is not None:
        model.reward_head.load_state_dict(load_file(folder / "reward_head.safetensors"))
    return model.to(device_of(config)).eval()


def open_reward_model(folder: Path | str, config: Config) -> CompletionModel:
    """A trained reward model, ready to score."""
    return CompletionModel(load_reward_model(folder, config), options=config.logprobs).to(device_of(config)).eval()
