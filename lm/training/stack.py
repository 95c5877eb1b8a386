"""Several copies of a small model as one: each layer computes all of them in one call.

A small model is bound by how many calls a step has, not by what they compute. The members' tokens lie one after another
in one packed row, each member's prompts and completions as examples of their own, so that attention, positions and all
else without parameters is computed as ever; only layers with parameters know of members, by equal shares of the tokens.

Tensor names carry shapes: M members, T tokens of one member, H hidden.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lm.logprobs.completions import CompletionModel, CompletionOutput, Lengths, longest_row
from lm.logprobs.kernels import linear_logps

AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far a stack's log-probs, rewards and gradients may be from those of its members alone, relative to the largest,
by the type of the parameters. Other types are not stacked."""


class _Layer(nn.Module):
    """A layer of all members: its parameters have the names that a member's have, stacked, [M, ...].

    Args:
        layer: a member's.
        count: M.
        seen: parameters that were stacked already, by the id of the member's: tied ones stay tied.
    """

    def __init__(self, layer: nn.Module, count: int, seen: dict[int, nn.Parameter]) -> None:
        super().__init__()
        self.count = count
        self.one = (layer,)  # in a tuple, so that its parameters are none of this module's
        for name, parameter in layer.named_parameters(recurse=False):
            if id(parameter) not in seen:
                values = parameter.detach().expand(count, *parameter.shape).clone()
                seen[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            self.register_parameter(name, seen[id(parameter)])

    def forward(self, states: Tensor) -> Tensor:
        """Of all members' tokens in turn, [1, M * T, H] or [M * T, H]."""
        parts = states.reshape(self.count, -1, states.shape[-1])
        out: Tensor = torch.vmap(lambda own, part: functional_call(self.one[0], own, (part,)))(
            dict(self.named_parameters()), parts
        )
        return out.reshape(*states.shape[:-1], out.shape[-1])


class _Linear(_Layer):
    weight: Tensor
    """[M, out, in]."""

    def forward(self, states: Tensor) -> Tensor:
        parts = states.reshape(self.count, -1, states.shape[-1])
        weight, bias = self.weight.transpose(1, 2), getattr(self, "bias", None)
        out = torch.bmm(parts, weight) if bias is None else torch.baddbmm(bias[:, None], parts, weight)
        return out.reshape(*states.shape[:-1], out.shape[-1])


class _Embedding(_Layer):
    weight: Tensor
    """[M, V, H]."""

    def forward(self, ids: Tensor) -> Tensor:
        size = self.weight.shape[1]
        own = ids.reshape(self.count, -1) + torch.arange(self.count, device=ids.device)[:, None] * size
        out = nn.functional.embedding(own, self.weight.flatten(0, 1)).reshape(*ids.shape, -1)
        padding: int | None = self.one[0].padding_idx  # type: ignore[assignment]
        return out if padding is None else torch.where((ids == padding)[..., None], out.detach(), out)


KINDS: dict[type[nn.Module], type[_Layer]] = {nn.Linear: _Linear, nn.Embedding: _Embedding}


class Stack(CompletionModel):
    """Copies of a model that has settled on the packed route. Parameters are called as the model's, stacked, [M, ...].

    Args:
        model: what every member is at first; it is left as it is, and `unstack` fills it.
        count: M.
    """

    def __init__(self, model: CompletionModel, count: int) -> None:
        super().__init__(copy.deepcopy(model.model), options=model.options)
        self.reward_head = copy.deepcopy(model.reward_head)
        self.count, self.one = count, (model,)
        self.route, self.tried, self.sharing = model.route, model.tried, model.sharing
        seen: dict[int, nn.Parameter] = {}
        for name, layer in list(self.named_modules()):
            if next(layer.parameters(recurse=False), None) is not None:
                above, _, last = name.rpartition(".")
                stacked = KINDS.get(type(layer), _Layer)(layer, count, seen)
                setattr(self.get_submodule(above), last, stacked.train(layer.training))

    def forward(self, input_ids: Tensor, lengths: Lengths) -> list[CompletionOutput]:  # type: ignore[override]
        """What each member says of the same examples, as a `CompletionModel` is asked; ValueError for rows longer than
        those that the model was settled for."""
        if self.tried and longest_row(lengths) > self.tried:
            raise ValueError(f"a row has {longest_row(lengths)} tokens, and the stack was settled for {self.tried}")
        whole = super().forward(input_ids.repeat(self.count), [*lengths] * self.count)
        each = zip(*(_shares(part, self.count) for part in (whole.logps, whole.lengths, whole.rewards)), strict=True)
        return [CompletionOutput(*parts) for parts in each]

    def _head_logps(self, states_CH: Tensor, targets_C: Tensor) -> Tensor:
        head: Any = self.model.get_output_embeddings()
        biases = [None] * self.count if getattr(head, "bias", None) is None else head.bias.unbind()
        heads: list[Any] = [
            SimpleNamespace(weight=w, bias=b) for w, b in zip(head.weight.unbind(), biases, strict=True)
        ]
        each = zip(states_CH.chunk(self.count), heads, targets_C.chunk(self.count), strict=True)
        return torch.cat([linear_logps(states, own, targets) for states, own, targets in each])

    def unstack(self, member: int) -> CompletionModel:
        """The model that the stack was made of, with this member's parameters in it."""
        model, mine = self.one[0], dict(self.named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(mine[name][member])
        return model


def _shares(values: Tensor | None, count: int) -> tuple[Tensor | None, ...]:
    return (None,) * count if values is None else values.chunk(count)


def misfit(model: CompletionModel, input_ids: Tensor, lengths: Lengths) -> str | None:
    """Why a model cannot be stacked, in words; None where two members that differ give the log-probs, the rewards and
    the gradients that each gives alone. The model is left as it is, and has no gradients.

    Args:
        model: settled.
        input_ids: of some examples, as of `lm.logprobs.completions.collate`.
        lengths: likewise.
    """
    if model.route != "packed":
        return f"it takes the {model.route} route"
    if (dtype := model.model.dtype) not in AGREEMENT:
        return f"its parameters are {str(dtype).removeprefix('torch.')}"
    others = [copy.deepcopy(model), copy.deepcopy(model)]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.enable_grad():
            stack = Stack(others[0], 2)
            mine = dict(stack.named_parameters())
            for member, one in enumerate(others):
                for name, parameter in one.named_parameters():
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
                    parameter.data += 0.1 * parameter.data.abs().mean() * noise
                    mine[name].data[member] = parameter.data
            pairs = list(zip(stack(input_ids, lengths), (one(input_ids, lengths) for one in others), strict=True))
            for at in range(2):
                torch.stack([_total(pair[at], member) for member, pair in enumerate(pairs)]).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever a model's own layers make of tokens that are no batch
        return f"{type(error).__name__}: {error}".splitlines()[0]
    outputs = [(_values(got), _values(alone)) for got, alone in pairs]
    gradients = [
        (stacked.grad[member], own.grad)
        for member, one in enumerate(others)
        for name, own in one.named_parameters()
        if (stacked := mine[name]).grad is not None and own.grad is not None
    ]
    off = max(float((got - alone).abs().max() / alone.abs().max().clamp(min=1e-30)) for got, alone in outputs)
    limit, largest = AGREEMENT[dtype], max(float(alone.abs().max()) for _, alone in gradients)
    slope = max(float((got - alone).abs().max()) for got, alone in gradients) / largest
    if not (off <= limit and slope <= limit):
        return f"its numbers are off by {off:.2g}, its gradients by {slope:.2g}, relatively"
    return None


def _values(output: CompletionOutput) -> Tensor:
    return torch.cat([part.detach() for part in (output.logps, output.rewards) if part is not None])


def _total(output: CompletionOutput, member: int) -> Tensor:
    """A sum that treats every row, log-prob, reward and member another way."""
    values = torch.cat([part for part in (output.logps, output.rewards) if part is not None])
    return (values * torch.arange(1 + member, 1 + member + len(values)).to(values)).sum()
