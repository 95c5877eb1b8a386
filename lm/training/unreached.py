"""Parameters that no gradient of text reaches: vision towers and their like."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from lm.logprobs.completions import CompletionModel, Lengths

log = logging.getLogger(__name__)


def freeze_unreached(model: CompletionModel, input_ids: Tensor, lengths: Lengths) -> list[str]:
    """Freezes, and says, what no log-prob or reward of an example depends on: DDP waits for every parameter's gradient,
    and text brings none to the images' half of a model. Training without it is the same training.

    Experts of the decoder stay: the next example may go to others. One forward, whose graph is walked; no gradients
    are made. Returns the names.
    """
    device = next(model.parameters()).device
    route, was_training = model.route, model.training
    model.route = "padded"
    try:
        with model.stock(), torch.enable_grad():
            output = model.train()(input_ids.to(device), lengths)
    finally:
        model.route = route
        model.train(was_training)
    there = _reached([part for part in (output.logps, output.rewards) if part is not None])
    spared = {id(parameter) for parameter in _experts(model.model.get_decoder())}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in there | spared]
    for _, parameter in named:
        parameter.requires_grad_(False)
    if named:
        parts = sorted({".".join(name.removeprefix("model.").split(".")[:2]) for name, _ in named})
        count = sum(parameter.numel() for _, parameter in named)
        log.warning(
            "%s: %s parameters in %d tensors get no gradient from text and are frozen, in %s",
            type(model.model).__name__,
            f"{count:,}",
            len(named),
            ", ".join(parts),
        )
    return [name for name, _ in named]


def _reached(outputs: list[Tensor]) -> set[int]:
    """The leaves of their graph, as ids."""
    found: set[int] = set()
    seen, left = set(), [output.grad_fn for output in outputs]
    while left:
        step = left.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        if (leaf := getattr(step, "variable", None)) is not None:
            found.add(id(leaf))
        left.extend(before for before, _ in step.next_functions)
    return found


def _experts(decoder: nn.Module) -> list[nn.Parameter]:
    return [
        parameter
        for name, module in decoder.named_modules()
        if "expert" in f"{name} {type(module).__name__}".lower()
        for parameter in module.parameters()
    ]
