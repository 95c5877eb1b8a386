"""A copy of a model in full precision, whole or its first layers, on which a trial can tell a fault from rounding."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lm.logprobs.definition import described
from lm.logprobs.kernels import free_memory

if TYPE_CHECKING:
    from lm.logprobs.completions import CompletionModel

WHOLE = 2**28
"""Models of at most so many parameters are tried whole; of larger ones that have to be copied, the first layers that
show every kind of layer."""


class Unbuildable(Exception):
    """No copy in full precision can be made; says why."""


def precise(model: CompletionModel, device: torch.device, *, shaken: bool = False) -> CompletionModel:
    """A copy of the model in float32 (or what it has beyond), on the device; of a large one the first layers alone.

    Args:
        model: left as it is.
        device: of the copy.
        shaken: with noise on all weights, so that every part of it matters.

    Raises:
        Unbuildable: it does not fit the memory, or cannot be copied.
    """
    plain, memo = model.model, dict[int, Any]()
    layers = layers_of(plain)
    depth = depth_of(plain, layers)
    whole = sum(p.numel() for p in plain.parameters())
    dropped = (
        set[int]() if layers is None or whole <= WHOLE else {id(p) for x in layers[depth:] for p in x.parameters()}
    )
    kept = [p for p in model.parameters() if id(p) not in dropped]
    need, free = sum(max(p.element_size(), 4) * p.numel() for p in kept), free_memory(device)
    if free is not None and need > free / 2:
        raise Unbuildable(
            f"a trial needs a copy in float32 of {need / 2**30:.1f} GB, and {free / 2**30:.1f} GB are free on {device}"
        )
    generator = torch.Generator().manual_seed(0)
    try:
        for tensor in [*kept, *model.buffers()]:
            value = tensor.detach().to(device, copy=True)
            if value.is_floating_point() and value.element_size() < 4:
                value = value.float()
            if isinstance(tensor, nn.Parameter):
                if shaken and value.is_floating_point() and value.numel():
                    noise = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value)
                    value += noise * (0.3 if value.dim() < 2 else 0.7 / math.sqrt(value.shape[-1]))
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = value
        if dropped and layers is not None:
            memo[id(layers)] = nn.ModuleList([copy.deepcopy(layer, memo) for layer in layers[:depth]])
        head = copy.deepcopy(model.reward_head, memo)
        subject = type(model)(
            copy.deepcopy(plain, memo),
            options=replace(model.options, autocast=False, compile=False, onednn="off", allocator=False),
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise Unbuildable(f"no copy can be made for a trial ({described(error)})") from error
    subject.reward_head = head
    # Flash attention knows no float32.
    subject.stock_attentions = [
        (config, "sdpa" if name.startswith("flash") else name) for config, name in subject.stock_attentions
    ]
    return subject


def layers_of(model: PreTrainedModel) -> nn.ModuleList | None:
    """The decoder's layers; None where no list of modules has as many as the config says."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return lists[0] if len(lists) == 1 else None


def depth_of(model: PreTrainedModel, layers: nn.ModuleList | None) -> int:
    """How many of the first layers show every kind of layer, at least 2."""
    if layers is None:
        return 0
    named = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(layers)
    first: dict[Any, int] = {}
    for index, layer in enumerate(layers):
        first.setdefault((named[index] if index < len(named) else None, _kind(layer)), index)
    return max(2, *(index + 1 for index in first.values())) if first else 0


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """What a layer is made of: classes, and settings that are not its number."""

    def settings(module: nn.Module) -> tuple[Any, ...]:
        plain = {
            name: value
            for name, value in vars(module).items()
            if (value is None or isinstance(value, bool | int | str))
            and not name.startswith("_")
            and not any(part in name for part in ("idx", "index", "layer_id", "training"))
        }
        return tuple(sorted(plain.items()))

    return tuple((name, type(module).__name__, settings(module)) for name, module in layer.named_modules())
