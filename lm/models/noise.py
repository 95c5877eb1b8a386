"""Noise that models have in training: dropout of every kind, layers left out, jitter of routers. None of it is wanted
where log-ratios and rewards compare models, so it is turned off; what cannot be is found by `lm.models.checks`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PretrainedConfig, PreTrainedModel

from lm.logprobs.definition import vocabulary_of

NAMES = re.compile("drop|jitter|noise")
"""In the names of the numbers that set it: attention_dropout, layerdrop, drop_path_rate, embd_pdrop, jitter_noise."""
MAY_BE_READ_IN_EVALUATION = re.compile("jitter|noise")
"""PhiMoE's router compares scores with its jitter, also where it draws none."""
TRIED = (0.0, 10.0, 100.0)
"""Multiples of such a value under which evaluation must stay what it is, to the bit, before the value is set to 0. A
small value decides for few tokens, a large one for nearly all, so that the large ones show what is read at all."""
ROWS, TOKENS = 4, 64
"""Of random ids, on which that is tried."""


def turn_off(model: PreTrainedModel) -> None:
    """Sets to 0 what sets noise: in the layers, and in the configs, which some layers read as they run.

    What evaluation may read stays as it is, so that training that draws from it is refused by the checks. `own_config`
    gives the config its values back, for saving.
    """
    settings = list(_settings(model))
    doubtful = [one for one in settings if MAY_BE_READ_IN_EVALUATION.search(one[1])]
    _set_all([one for one in settings if one not in doubtful], off=True)
    kept = [one for one in settings if one not in doubtful and isinstance(one[0], PretrainedConfig)]
    if doubtful:
        before = _evaluated(model)
        for name in sorted({one[1] for one in doubtful}):
            group = [one for one in doubtful if one[1] == name]
            if all(torch.equal(_evaluated_at(model, group, times), before) for times in TRIED):
                _set_all(group, off=True)
                kept += [one for one in group if isinstance(one[0], PretrainedConfig)]
    model.__dict__["noise_of_config"] = [*model.__dict__.get("noise_of_config", ()), *kept]


def turn_off_dropout(module: nn.Module) -> int:
    """Dropout layers alone, of any module; how many there were on."""
    layers = [layer for layer in module.modules() if isinstance(layer, _DropoutNd) and layer.p]
    for layer in layers:
        layer.p = 0.0
    return len(layers)


@contextmanager
def own_config(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the configs say what they said before `turn_off`."""
    settings = model.__dict__.get("noise_of_config", [])
    _set_all(settings, off=False)
    try:
        yield
    finally:
        _set_all(settings, off=True)


Setting = tuple[Any, str, float]
"""Of what, which attribute, and the value that it came with."""


def _settings(model: PreTrainedModel) -> Iterator[Setting]:
    configs: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        if isinstance(module, _DropoutNd) and module.p:
            yield module, "p", module.p
        yield from _numbers(module)
        for value in vars(module).values():
            if isinstance(value, PretrainedConfig):
                configs[id(value)] = value
    for config in configs.values():
        yield from _numbers(config)


def _numbers(holder: Any) -> Iterator[Setting]:
    for name, value in vars(holder).items():
        if NAMES.search(name) and isinstance(value, float) and value:
            yield holder, name, value


def _set_all(settings: list[Setting], *, off: bool) -> None:
    for holder, name, value in settings:
        setattr(holder, name, 0.0 if off else value)


def _evaluated_at(model: PreTrainedModel, settings: list[Setting], times: float) -> Tensor:
    """What it says in evaluation with these settings multiplied; they are left as they were."""
    try:
        for holder, name, value in settings:
            setattr(holder, name, value * times)
        return _evaluated(model)
    finally:
        _set_all(settings, off=False)


@torch.no_grad()
def _evaluated(model: PreTrainedModel) -> Tensor:
    """What it says of rows of random tokens in evaluation."""
    was_training = model.training
    vocabulary = torch.tensor(vocabulary_of(model))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or TOKENS
    drawn = torch.randint(len(vocabulary), (ROWS, min(TOKENS, positions)), generator=torch.Generator().manual_seed(0))
    ids = vocabulary[drawn].to(model.device)
    states: Tensor = model.eval().base_model(input_ids=ids, use_cache=False).last_hidden_state
    model.train(was_training)
    return states
