"""The log-prob head and the oneDNN products give the textbook values and gradients; chunks and frozen weights too."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from lm.config import LogprobsConfig
from lm.logprobs import kernels
from lm.logprobs.completions import CompletionModel, collate
from lm.logprobs.kernels import linear_logps, onednn_available, use_onednn
from tests.tiny import causal_lm, close

COUNT, HIDDEN, VOCABULARY = 7, 5, 11


def problem(dtype: torch.dtype = torch.float64, *, bias: bool = True) -> tuple[Tensor, nn.Linear, Tensor]:
    """States with a gradient, a head, and targets."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    hidden = torch.randn(COUNT, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, head, torch.randint(0, VOCABULARY, (COUNT,), generator=generator)


def textbook(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    logps: Tensor = head(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return logps


def derivatives(values: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((values * torch.linspace(-1, 2, len(values), dtype=values.dtype)).sum(), of)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stored", [0, kernels.STORED_LOGITS], ids=["computed again", "kept"])
@pytest.mark.parametrize("chunk", [0, 2 * VOCABULARY, kernels.CHUNK_LOGITS], ids=["1 a chunk", "2 a chunk", "whole"])
def test_log_probs_and_gradients_are_the_textbooks(
    chunk: int, stored: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(kernels, "STORED_LOGITS", stored)
    hidden, head, targets = problem(bias=bias)
    ours, expected = linear_logps(hidden, head, targets), textbook(hidden, head, targets)
    close(ours, expected)
    for one, other in zip(
        derivatives(ours, hidden, *head.parameters()), derivatives(expected, hidden, *head.parameters()), strict=True
    ):
        close(one, other)
    wrong = textbook(hidden, head, targets.roll(1))
    assert not torch.isclose(ours, wrong).all()


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of the storages that are made inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak, self.known = 0, 0, set[int]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(outputs):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                size = tensor.untyped_storage().nbytes()
                given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
                if key not in {leaf.untyped_storage()._cdata for leaf in given}:
                    self.known.add(key)
                    self.now += size
                    weakref.finalize(tensor.untyped_storage(), self.freed, key, size)
                    self.peak = max(self.peak, self.now)
        return outputs

    def freed(self, key: int, size: int) -> None:
        """A storage is gone."""
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_held_twice(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a large vocabulary [C, V] is what a step's memory is; scoring holds a chunk of it alone."""
    count, width, vocabulary = 64, 4, 3000
    monkeypatch.setattr(kernels, "CHUNK_LOGITS", 4 * vocabulary)
    head = nn.Linear(width, vocabulary, bias=False, dtype=dtype)
    states, targets = torch.randn(count, width, dtype=dtype, requires_grad=True), torch.arange(count)

    def peak(logps: Callable[..., Tensor], backward: bool) -> float:
        with Live() as live, torch.set_grad_enabled(backward):
            total = logps(states, head, targets).sum()
            if backward:
                torch.autograd.backward(total)
        states.grad = head.weight.grad = None
        return float(live.peak / (count * vocabulary * dtype.itemsize))

    assert 1 < peak(linear_logps, True) < 1.6
    assert peak(linear_logps, False) < 0.4
    assert peak(lambda *given: textbook(*given).float(), True) > 2  # control


def test_a_frozen_head_or_frozen_states_get_no_gradient_and_cost_the_other_nothing() -> None:
    hidden, head, targets = problem()
    expected = derivatives(textbook(hidden, head, targets), hidden, head.weight)
    head.requires_grad_(False)
    (of_hidden,) = derivatives(linear_logps(hidden, head, targets), hidden)
    close(of_hidden, expected[0])
    head.requires_grad_(True)
    (of_weight,) = derivatives(linear_logps(hidden.detach(), head, targets), head.weight)
    close(of_weight, expected[1])


def test_extreme_logits_stay_finite() -> None:
    hidden, head, targets = problem()
    with torch.no_grad():
        head.weight.mul_(1e4)
    ours = linear_logps(hidden, head, targets)
    close(ours, textbook(hidden, head, targets))
    assert ours.min().item() < -1e4
    assert all(torch.isfinite(g).all() for g in derivatives(ours, hidden, head.weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_states_give_float32_log_probs(dtype: torch.dtype) -> None:
    hidden, head, targets = problem(dtype)
    ours = linear_logps(hidden, head, targets)
    assert ours.dtype == torch.float32
    exact = textbook(hidden.double(), head.double(), targets)
    torch.testing.assert_close(ours.double(), exact, rtol=0.02 if dtype.itemsize == 2 else 1e-6, atol=0)


@pytest.mark.skipif(not onednn_available(), reason="this torch has no oneDNN linear operator")
@pytest.mark.parametrize("bias", [True, False])
def testonednn_products_agree_with_torchs(bias: bool) -> None:
    """Value and every gradient of a linear layer and of the head; float64 keeps its own path."""
    hidden, head, targets = problem(torch.float32, bias=bias)
    layer = nn.Linear(HIDDEN, HIDDEN, bias=bias)
    inputs = hidden.view(1, COUNT, HIDDEN)

    def run(onednn: bool) -> tuple[Tensor, ...]:
        use_onednn(layer, onednn)
        values = linear_logps(layer(inputs)[0], head, targets, onednn=onednn)
        return values, *derivatives(values, hidden, *layer.parameters(), *head.parameters())

    expected = run(False)
    for one, other in zip(run(True), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    layer.double()
    assert layer(inputs.double()).dtype == torch.float64


@pytest.mark.skipif(not onednn_available(), reason="this torch has no oneDNN linear operator")
@pytest.mark.parametrize(
    ("rows", "width", "narrow", "as_the_parameter"),
    [(3, 50, 7, True), (40, 50, 7, False), (40, 7, 50, True), (40, 60, 7, True)],
)
def test_a_gradient_by_weights_is_transposed_only_where_that_is_less_work(
    rows: int, width: int, narrow: int, as_the_parameter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of few rows, nor where the result is large, here from 400 entries on."""
    monkeypatch.setattr(kernels, "TRANSPOSED", 400)
    grad, inputs = torch.randn(rows, width), torch.randn(rows, narrow)
    found = kernels._weight_gradient(grad, inputs, True)
    torch.testing.assert_close(found, grad.t() @ inputs)
    assert found.is_contiguous() == as_the_parameter


@pytest.mark.skipif(not onednn_available(), reason="this torch has no oneDNN linear operator")
def test_a_layer_with_onednn_is_gone_when_its_model_is() -> None:
    """Without waiting for the garbage collector, or models of earlier stages would add up; a copy has its own."""
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN))
    use_onednn(model)
    again = copy.deepcopy(model)
    inputs = torch.ones(2, HIDDEN)
    with torch.no_grad():
        again.get_parameter("0.weight").zero_()
    assert torch.equal(again(inputs), again.get_parameter("0.bias").detach().expand(2, -1))
    assert not torch.allclose(model(inputs), again(inputs))
    layer = weakref.ref(model[0])
    gc.disable()
    try:
        del model
        assert layer() is None
        assert again(inputs).shape == (2, HIDDEN)
    finally:
        gc.enable()


@pytest.mark.skipif(not onednn_available(), reason="this torch has no oneDNN linear operator")
def test_the_switch_is_the_models_and_not_the_processs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a second view of the same model, and in the head's backward."""
    calls: list[str] = []
    product: Any = kernels.onednn_product
    forward: Any = kernels._OneDNNLinear.apply

    def noted(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls.append(function.__name__)
            return function(*arguments)

        return call

    monkeypatch.setattr(kernels, "onednn_product", noted(product))
    monkeypatch.setattr(kernels._OneDNNLinear, "apply", noted(forward))

    def products(subject: CompletionModel) -> int:
        calls.clear()
        output = subject(**collate([[2, 3]], [[[4, 1], [5, 6, 1]]]))
        output.logps.sum().backward()
        return len(calls)

    def view(model: PreTrainedModel, onednn: Literal["on", "off"]) -> CompletionModel:
        return CompletionModel(model, options=LogprobsConfig(onednn=onednn, route="packed"))

    with_it, without = causal_lm().float(), causal_lm(seed=1).float()
    assert products(view(with_it, "on")) > 0
    assert products(view(without, "off")) == 0
    assert products(view(with_it, "off")) == 0
    assert products(view(with_it, "on")) > 0


def test_layers_that_are_compiled_have_the_compilers_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler cannot read oneDNN's operator: packed rows then failed their trial, and padded ones were taken."""
    monkeypatch.setattr("lm.logprobs.completions.onednn_gains", lambda width: True)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)  # which takes long to import

    def through_onednn(compiled: bool) -> list[bool]:
        model = CompletionModel(causal_lm().float(), options=LogprobsConfig(compile=compiled, allocator=False))
        layers = [module for module in model.modules() if type(module) is torch.nn.Linear]
        return [isinstance(layer.__dict__.get("forward"), kernels._OneDNNForward) for layer in layers]

    assert all(through_onednn(compiled=False))
    assert not any(through_onednn(compiled=True))
    with pytest.raises(ValueError, match=r'logprobs.onednn "on" and logprobs.compile true do not go together: .* use'):
        CompletionModel(causal_lm().float(), options=LogprobsConfig(compile=True, onednn="on", allocator=False))


def test_onednn_is_for_models_that_are_not_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine gains by it at all. Control: one that does not."""
    monkeypatch.setattr(kernels, "onednn_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("builtins.open", lambda *_: io.StringIO("AuthenticAMD"))
    assert kernels.onednn_gains(kernels.ONEDNN_WIDTH)
    assert not kernels.onednn_gains(kernels.ONEDNN_WIDTH - 1)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not kernels.onednn_gains(kernels.ONEDNN_WIDTH)
