"""The arithmetic under the log-prob core: log-probs straight from hidden states, matrix products, free memory.

Tensor names carry shapes: C completion tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn

STORED_LOGITS = 2**28
"""Most entries of a [C, V] buffer kept from forward to backward; above it chunks are computed again in the backward."""

CHUNK_LOGITS = 2**26
"""Most entries of logits that are computed together: what float32 and low-precision copies of them are made of."""

WITHOUT_FLOAT64 = {"mps"}
"""Accelerators that refuse it, also where a tensor is only moved to them."""


def at_least_float32(values: Tensor) -> Tensor:
    """Low-precision values as float32: sums over tokens, and losses, need the digits."""
    return values if values.dtype == torch.float64 else values.float()


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a kind of accelerator that has none."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def rewards_of(head: nn.Module, states_RH: Tensor) -> Tensor:
    """A head's single column, [R], in float32 or float64: in 16 bits, also of autocast, different rewards would tie."""
    parameters = {name: at_least_float32(parameter) for name, parameter in head.named_parameters()}
    wide = parameters and next(iter(parameters.values())).dtype
    with torch.autocast(states_RH.device.type, enabled=False):
        states = states_RH.to(wide) if wide else at_least_float32(states_RH)
        rewards_R1: Tensor = torch.func.functional_call(head, parameters, (states,))
    return rewards_R1[:, 0].clone()  # no view, which FSDP warns of where a model returns one


class _LinearLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias)[targets], in float32 (float64 for float64). There is one [C, V] buffer at
    most, in the products' type, and copies of a chunk of it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_CH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_C: Tensor,
        onednn: bool,
        gradient: bool,
    ) -> Tensor:
        ctx.chunk, ctx.onednn = max(1, CHUNK_LOGITS // weight_VH.shape[0]), onednn
        # What needs a gradient is said to need it under `no_grad` as well.
        keep = gradient and any(ctx.needs_input_grad) and len(hidden_CH) * weight_VH.shape[0] <= STORED_LOGITS
        logps, ctx.kept = [], list[tuple[Tensor, Tensor]]()
        for hidden, targets in zip(torch.split(hidden_CH, ctx.chunk), torch.split(targets_C, ctx.chunk), strict=True):
            logps_c, exponentials, sums = _softmax(hidden, weight_VH, bias_V, targets, onednn)
            logps.append(logps_c)
            if keep:
                ctx.kept.append((exponentials.to(weight_VH.dtype), sums))
            del exponentials
        ctx.save_for_backward(hidden_CH, weight_VH, bias_V, targets_C)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, grad_C: Tensor) -> tuple[Tensor | None, ...]:
        hidden_CH, weight_VH, bias_V, targets_C = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        grad_hidden, grad_weight, grad_bias = [], None, None
        kept, ctx.kept = ctx.kept, []
        for hidden, targets, grad in zip(
            *(torch.split(tensor, ctx.chunk) for tensor in (hidden_CH, targets_C, grad_C)), strict=True
        ):
            if kept:
                exponentials, sums = kept.pop(0)  # each chunk is free again when it is done
            else:
                _, exponentials, sums = _softmax(hidden, weight_VH, bias_V, targets, ctx.onednn)
            # d logp / d logits = one-hot - softmax; in place, the buffer is not needed again.
            logits_grad = exponentials.mul_((-grad / sums)[:, None])
            rows = torch.arange(len(targets), device=targets.device)
            logits_grad[rows, targets] += grad.to(logits_grad.dtype)
            if wants_bias:
                total = at_least_float32(logits_grad).sum(0)
                grad_bias = total if grad_bias is None else grad_bias + total
            logits_grad = logits_grad.to(weight_VH.dtype)
            del exponentials
            if wants_hidden:
                grad_hidden.append(_product(logits_grad, weight_VH.t(), ctx.onednn))
            if wants_weight:
                grad_weight = _add_weight_gradient(grad_weight, logits_grad, hidden, ctx.onednn)
            del logits_grad
        return (
            torch.cat(grad_hidden) if wants_hidden else None,
            None if grad_weight is None else grad_weight.to(weight_VH.dtype),
            None if grad_bias is None else grad_bias.to(weight_VH.dtype),
            *[None] * 3,
        )


def _softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, onednn: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the targets, exp(logits - max), and its row sums."""
    logits = at_least_float32(_product(hidden, weight, onednn))
    if bias is not None:
        logits += bias
    logits -= logits.amax(1, keepdim=True)
    picked = logits.gather(1, targets[:, None])[:, 0]
    exponentials = logits.exp_()
    sums = exponentials.sum(1)
    return picked - sums.log(), exponentials, sums


class Head(Protocol):
    """A language-model head: logits are weight times a state, plus bias."""

    weight: Any
    """[V, H]."""
    bias: Any
    """[V]; None for none."""


def linear_logps(hidden_CH: Tensor, head: Head, targets_C: Tensor, *, onednn: bool = False) -> Tensor:
    """Log-prob of each target under the head's softmax, nats, [C], float32 or float64.

    Args:
        hidden_CH: states that predict the targets.
        head: the language-model head.
        targets_C: token ids.
        onednn: float32 products on the CPU through oneDNN.
    """
    weight, bias = head.weight, head.bias
    if torch.is_autocast_enabled(hidden_CH.device.type):
        dtype = torch.get_autocast_dtype(hidden_CH.device.type)
        hidden_CH, weight = hidden_CH.to(dtype), weight.to(dtype)
    with torch.autocast(hidden_CH.device.type, enabled=False):
        logps: Tensor = _LinearLogProbs.apply(  # type: ignore[no-untyped-call]
            hidden_CH, weight, bias, targets_C, onednn, torch.is_grad_enabled()
        )
        return logps


# ---------------------------------------------------------------- matrix products

FLOAT32 = torch.float32
"""The type that oneDNN multiplies here, by a name that is nobody else's: tests have torch compute in float64."""


ONEDNN_WIDTH = 512
"""Least width of a model whose products gain by oneDNN: in narrower ones the way there takes longer than it saves."""


def onednn_gains(width: int = ONEDNN_WIDTH) -> bool:
    """Whether oneDNN multiplies float32 matrices of a model of this width faster than torch's default here: of one that
    is not narrow, on AMD with AVX-512, where MKL stays on AVX2. Decided from what they are, not from a timing, so that
    reruns take the same path."""
    if width < ONEDNN_WIDTH:
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not onednn_available():
        return False
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            return "AuthenticAMD" in cpuinfo.read()
    except OSError:
        return False


def onednn_available() -> bool:
    """Whether this torch has the (semi-private) oneDNN linear operator."""
    built = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(built) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T through oneDNN; float32 on the CPU, [a, k], [b, k] -> [a, b]."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return result


def _product(left: Tensor, right: Tensor, onednn: bool) -> Tensor:
    """left @ right.T; [a, k], [b, k] -> [a, b]."""
    if onednn and left.dtype == FLOAT32 and left.device.type == "cpu":
        return onednn_product(left, right)
    return left @ right.t()


TRANSPOSED = 2**24
"""Entries of a gradient from which on it costs more to transpose it than to copy what it is made of, also where that
has more: 24 against 28 ms for [1,376, 512] of 3,456 rows, 721 against 453 ms for [49,152, 576] of 1,365, by one thread
of an AMD EPYC."""


def _weight_gradient(grad: Tensor, inputs: Tensor, onednn: bool) -> Tensor:
    """grad.T @ inputs; [a, v], [a, h] -> [v, h]."""
    if onednn and grad.dtype == FLOAT32 and grad.device.type == "cpu":
        # oneDNN copies a strided first operand and reads a strided second one in place. With the narrow one first less
        # is copied, but the result is transposed, and copied again into the parameter's layout.
        rows, width, narrow = *grad.shape, inputs.shape[1]
        if narrow < min(rows, width) and width * narrow < TRANSPOSED:
            return onednn_product(inputs.t(), grad.t()).t()
        return onednn_product(grad.t(), inputs.t())
    return grad.t() @ inputs


def _add_weight_gradient(total: Tensor | None, grad: Tensor, inputs: Tensor, onednn: bool) -> Tensor:
    """total + grad.T @ inputs, in place where it can be: a [V, H] buffer is as large as the head."""
    if total is None:
        return _weight_gradient(grad, inputs, onednn)
    if total.dtype == inputs.dtype == FLOAT32 and not onednn:
        return total.addmm_(grad.t(), inputs)
    return at_least_float32(total).add_(_weight_gradient(grad, inputs, onednn))


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        flat = inputs.reshape(-1, inputs.shape[-1])
        result: Tensor = torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "")
        return result.view(*inputs.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        wants_inputs, wants_weight, wants_bias = ctx.needs_input_grad
        flat_grad, flat = grad.reshape(-1, grad.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
        return (
            onednn_product(flat_grad, weight.t()).view(inputs.shape) if wants_inputs else None,
            _weight_gradient(flat_grad, flat, True) if wants_weight else None,
            flat_grad.sum(0) if wants_bias else None,
        )


class _OneDNNForward:
    """A linear layer's forward, which does not keep the layer alive: a method of it in it would, with its weights,
    until the garbage is collected."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = weakref.ref(layer)

    def __call__(self, inputs: Tensor) -> Tensor:
        layer = self._layer()
        assert layer is not None
        if inputs.dtype != FLOAT32 or inputs.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return nn.functional.linear(inputs, layer.weight, layer.bias)
        result: Tensor = _OneDNNLinear.apply(inputs, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> _OneDNNForward:
        """The copy's own."""
        layer = self._layer()
        assert layer is not None
        return _OneDNNForward(memo.get(id(layer), layer))


def use_onednn(model: nn.Module, on: bool = True) -> None:
    """Float32 products of the model's linear layers through oneDNN from now on, or as torch has them. Other models are
    left as they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            if on:
                module.forward = _OneDNNForward(module)  # type: ignore[method-assign, assignment]
            elif isinstance(module.__dict__.get("forward"), _OneDNNForward):
                del module.__dict__["forward"]


# ---------------------------------------------------------------- compiling

RECOMPILES = 64
"""Versions of one function that may be compiled."""


def allow_recompiling() -> None:
    """FlexAttention is compiled once for every kind of mask, head size and mode; torch's limit of 8 is passed by a
    model with two kinds of layers, and what is beyond it runs uncompiled, with all scores in memory."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILES)


# ---------------------------------------------------------------- memory


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on the device now; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            found = next(line for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return int(found.split()[1]) * 1024
