"""Weights of a folder or of the hub into a model, or refused by name: none drawn at random, none left out unsaid."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lm.base import hub
from lm.models import checks
from lm.models.gguf import as_folder
from lm.models.heads import ensure_reward_class

MANY = 10**7
"""Parameters of models, opened before and still there, for which it is worth to look for what nothing needs."""
_OPENED: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def open_weights(
    auto: Any, option: str, spec: str | Path, *, trust_remote_code: bool, new_head: bool = False, **extra: Any
) -> PreTrainedModel:
    """A model with the weights of a folder or of the hub. ValueError, with the option, where they do not fit,
    or are not finite.

    Args:
        auto: transformers' AutoModelFor...
        option: that names the model.
        spec: its value.
        trust_remote_code: whether it may bring code of its own.
        new_head: as of `lm.models.checks.weights_complete`.
        extra: for `from_pretrained`.
    """
    if sum(one.num_parameters() for one in _OPENED) > MANY:
        gc.collect()  # what nothing needs any more, but for circles (DDP's), dies before there is another one
    model, _ = _from_pretrained(
        auto, option, str(spec), trust_remote_code=trust_remote_code, new_head=new_head, **extra
    )
    checks.require(f"{option} {str(spec)!r}", checks.finite(model))
    if model.dtype == torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # grouped products of experts do not know float64
    _OPENED.add(model)
    return model


def _from_pretrained(
    auto: Any,
    option: str,
    spec: str,
    *,
    trust_remote_code: bool,
    new_head: bool = False,
    refuse: bool = True,
    **extra: Any,
) -> tuple[PreTrainedModel, checks.Check]:
    """The model, and the check of its weights, which holds where those that lack something are to be refused."""
    what = f"{option} {spec!r}"
    config = config_of(option, spec, trust_remote_code)
    checks.require(what, checks.not_quantised(config))
    try:
        if auto is AutoModelForSequenceClassification:
            ensure_reward_class(config)
        with _without_report():
            model, found = auto.from_pretrained(
                as_folder(spec),
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to be refused by name
                **extra,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{what} cannot be loaded: {_shortened(error)}") from None
    if getattr(model, "_hf_peft_config_loaded", False):  # a hub's, which has no folder to be looked at before
        raise ValueError(f"{what}: it is an adapter; merge it into the weights of its base and name that model")
    complete = checks.weights_complete(model, found, new_head=new_head)
    if refuse:
        checks.require(what, complete)
    return model, complete


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers prints a table of weights that are missing or left over, of which the checks speak."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _shortened(error: Exception) -> str:
    """The first line of what went wrong; transformers goes on with a list of all its architectures."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def opened_without_weights(
    auto: Any, option: str, spec: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, checks.Check]:
    """A model on the device "meta", and whether its weights are complete, which is read from the files' headers.

    Raises ValueError where it cannot be opened at all.
    """
    return _from_pretrained(auto, option, spec, trust_remote_code=trust_remote_code, refuse=False, device_map="meta")


def rows_by_config(option: str, spec: str, trust_remote_code: bool) -> int:
    """Rows of the embedding, as the config says."""
    return int(config_of(option, spec, trust_remote_code).get_text_config().vocab_size)


def missing(spec: str | Path) -> str | None:
    """Why a model is neither here nor on the hub, found within seconds: loading would ask the hub again and again."""
    here = str(spec).startswith("scratch:") or Path(spec).exists()
    return None if here else hub.missing(str(spec), "model")


def config_of(option: str, spec: str, trust_remote_code: bool) -> PretrainedConfig:
    folder = as_folder(spec)
    if why := missing(folder):
        raise ValueError(f"{option} {spec!r}: its config cannot be loaded ({why})")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{option} {spec!r}: its config cannot be loaded ({error})") from None
