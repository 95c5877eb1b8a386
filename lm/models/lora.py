"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) by peft: added to a model, saved, merged into plain weights.

peft puts an adapter's layers into the model itself, whose own forward is then the adapted one: log-probs, rewards and
samples need to know nothing of it. pi_ref is the model without them, and their B starts at 0: so training starts at
pi_ref, and log-probs of the model that was adapted are the reference's.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lm.config import LoraConfig

NAME = "default"
"""Of the one adapter, among those that peft could tell apart."""


def check_target_modules(model: PreTrainedModel, options: LoraConfig) -> dict[str, nn.Module]:
    """The model's linear layers beside its head, by name.

    Raises ValueError where there are none, or none of the name of one of `target_modules`.
    """
    heads = (model.get_output_embeddings(), getattr(model, "score", None))
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not any(module is head for head in heads)
    }
    if not layers:
        raise ValueError(
            f"lora.rank {options.rank}: {type(model).__name__} has no linear layer beside its head for an adapter; "
            "null trains all parameters"
        )
    lacking = [
        target
        for target in options.target_modules or ()
        if not any(name == target or name.endswith(f".{target}") for name in layers)
    ]
    if lacking:
        if fused := [name for name in not_adaptable(model, layers) if any(t in name.split(".") for t in lacking)]:
            raise ValueError(
                f"lora.target_modules: {', '.join(lacking)} of {type(model).__name__} are fused weights "
                f"({', '.join(fused)}) and no linear layers, which alone can have adapters; leave them out"
            )
        known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers}))
        raise ValueError(
            f"lora.target_modules: {type(model).__name__} has no linear layer named {', '.join(lacking)}; name some "
            f"of {known}, or null for all of them"
        )
    return layers


def not_adaptable(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> dict[str, int]:
    """Weights that no adapter can change, as they are no linear layers' (fused experts, mostly): how many numbers they
    are, by name with * for the number of a layer. Embeddings and heads are not counted, which `layers` leaves out too.

    Args:
        model: before it is adapted.
        layers: of `check_target_modules`.
    """
    heads = (model.get_output_embeddings(), getattr(model, "score", None))
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if name in layers or isinstance(module, nn.Embedding) or any(module is head for head in heads):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                told = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", f"{name}.{own}")
                found[told] = found.get(told, 0) + parameter.numel()
    return found


def add_adapter(model: PreTrainedModel, options: LoraConfig, *, base: str) -> None:
    """Puts adapters into the model and freezes the rest, beside a reward model's head. Draws A from torch's generator.

    Args:
        model: a causal LM or a sequence classifier.
        options: with a rank.
        base: where the model is from, for the readers of a saved adapter.

    Raises:
        ValueError: the model lacks the layers.
    """
    layers = check_target_modules(model, options)
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=options.target_modules or "all-linear",
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
        task_type="SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
        modules_to_save=["score"] if hasattr(model, "score") else None,
        base_model_name_or_path=base,
    )
    try:
        with warnings.catch_warnings():
            # Settings that peft has ready for fused experts, on which no adapter goes.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
            peft.LoraModel(model, config, NAME)  # not `get_peft_model`: its wrapper would only stand between
    except ValueError as error:  # layers that peft knows to be no plain linear maps, as Mamba's
        raise ValueError(f"lora.target_modules {options.target_modules}: {error}") from None
    cast_adapter_dtype(model, NAME)  # float32 over a base of 16 bits: else small updates are rounded away


def is_adapted(model: nn.Module) -> bool:
    """Whether there are adapters in it."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the one that was adapted; for passes without gradient."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_adapter(model: PreTrainedModel, state: Mapping[str, Tensor], folder: Path) -> None:
    """The adapter in peft's format: `PeftModel.from_pretrained(base, folder)` reads it.

    Args:
        model: an adapted model.
        state: its whole state, which may be out of reach in the model itself (sharded).
        folder: to write into.
    """
    own = peft.get_peft_model_state_dict(model, state_dict=dict(state), save_embedding_layers=False)
    config = copy.deepcopy(model.peft_config[NAME])
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set, of another order in every process
    config.save_pretrained(str(folder))
    tensors = {f"base_model.model.{name}": value.cpu().contiguous() for name, value in own.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def merged(model: PreTrainedModel, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model of plain layers with the adapter added to their weights; `model` itself is left as it is.

    Args:
        model: an adapted model.
        state: its whole state, on the CPU.
    """
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
        adapted = peft.LoraModel(plain, copy.deepcopy(model.peft_config[NAME]), NAME)
    plain.load_state_dict(copy.deepcopy(dict(state)), assign=True)
    result: PreTrainedModel = adapted.merge_and_unload()
    if model.can_generate():
        result.generation_config = model.generation_config
    return result
