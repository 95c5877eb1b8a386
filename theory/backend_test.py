"""What the losses refuse and how they say so, what they import, and primitives at points that no loss reaches."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sympy as sp

from theory import losses
from theory.backend import backend_of

x = sp.Symbol("x", real=True)
one = np.ones(2)
ROOT = Path(__file__).parents[1]


def tensor(values: Any, dtype: str = "float32") -> Any:
    """A torch tensor; torch is imported by the tests that need one, not by collecting this file."""
    import torch

    return torch.tensor(values, dtype=getattr(torch, dtype))


def arrays() -> list[Any]:
    """One of each library."""
    return [one, tensor([1.0, 1.0]), x]


# ---------------------------------------------------------------- arrays


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)])
def test_mixed_libraries(first: int, second: int) -> None:
    libraries = ["numpy", "torch", "sympy"]
    listing = f"logratio_margin is {libraries[first]}, reward_margin is {libraries[second]}"
    with pytest.raises(TypeError, match=f"^all arguments must come from one library, but {listing}$"):
        losses.distillation(arrays()[first], arrays()[second], beta=1.0)


def test_python_numbers_are_numpy_unless_exact_next_to_sympy() -> None:
    with pytest.raises(TypeError, match="logratio_margin is torch, reward_margin is numpy"):
        losses.distillation(tensor(1.0), 1.0, beta=1.0)
    with pytest.raises(TypeError, match="logratio_margin is sympy, reward_margin is numpy"):
        losses.distillation(x, 0.5, beta=1.0)
    assert losses.distillation(x, Fraction(1, 2), beta=1) == (sp.Rational(1, 2) - x) ** 2
    assert losses.distillation(1.0, 3, beta=1.0) == 4.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [1.0, 2.0], r"got list: \[1\.0, 2\.0\]"),
        (lambda: "1.0", r"got str: '1\.0'"),
        (lambda: None, "got NoneType: None"),
        (lambda: 1j, "got complex: 1j"),
        (lambda: True, "must hold real numbers, got True"),
        (lambda: np.array([True]), r"must hold real numbers, got array\(\[ True\]\)"),
        (lambda: np.array(["a"]), r"must hold real numbers, got array\(\['a'\]"),
        (lambda: np.array([1j]), r"must hold real numbers, got array\(\[0\.\+1\.j\]\)"),
        (lambda: tensor([1, 2], "int64"), r"has dtype torch\.int64; a floating-point tensor is needed"),
        (lambda: tensor([True], "bool"), r"has dtype torch\.bool; a floating-point tensor is needed"),
        (lambda: np.array([x, 0.5]), r"object array whose entries are not all SymPy expressions: array\(\[x, 0\.5\]"),
        (lambda: np.array([x, True]), "object array whose entries are not all SymPy expressions"),
    ],
)
def test_not_an_array_of_reals(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^logratio_margin .*{message}"):
        losses.dpo(make(), beta=1.0)


PAIRS: dict[str, Callable[[Any, Any], Any]] = {
    "distillation": lambda a, b: losses.distillation(a, b, beta=1.0),
    "pessimistic": lambda a, b: losses.pessimistic(a, b, alpha=1.0),
    "focal_weight": lambda a, b: losses.focal_weight(a, b, gamma=1.0),
    "drdo_oracle": losses.drdo_oracle,
    "forward_kl_tokens": losses.forward_kl_tokens,
    "logratio_margin": lambda a, b: losses.logratio_margin(a, a, a, b),
    "normalised_logratio_margin": lambda a, b: losses.normalised_logratio_margin(a, a, a, b),
    "drdo": lambda a, b: losses.drdo(a, b, a, a),
    "soft_label": lambda a, b: losses.soft_label(a, b, beta=1.0),
    "rdpo": lambda a, b: losses.rdpo(a, a, b, beta=1.0, alpha=1.0),
    "sft_term": losses.sft_term,
    "dpo_nll, log-probs": lambda a, b: losses.dpo_nll(a, b, b, beta=1.0, alpha=1.0),
    "dpo_nll, lengths": lambda a, b: losses.dpo_nll(a, a, b, beta=1.0, alpha=1.0),
    "dpop": lambda a, b: losses.dpop(a, b, beta=1.0, lam=1.0),
    "simpo": lambda a, b: losses.simpo(a, a, a, b, beta=1.0, gamma=1.0),
    "sppo_hard": lambda a, b: losses.sppo_hard(a, b, beta=1.0),
    "nca": lambda a, b: losses.nca(a, b, beta=1.0),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("make", [np.ones, lambda shape: tensor(np.ones(shape)), lambda shape: np.full(shape, x)])
def test_nothing_is_broadcast(name: str, make: Callable[..., Any]) -> None:
    for shape, other in [((2, 3), (2, 1)), ((2, 3), (3,)), ((2,), (3,))]:
        with pytest.raises(ValueError, match=r"shapes must be equal, but .* has shape .* has shape ") as error:
            PAIRS[name](-make(shape), -make(other))
        assert str(shape) in str(error.value)
        assert str(other) in str(error.value)


def test_a_vocabulary_axis_is_needed() -> None:
    with pytest.raises(ValueError, match="ref_logprobs needs a vocabulary axis, got a scalar"):
        losses.forward_kl_tokens(-1.0, -1.0)


@pytest.mark.parametrize("loss", [losses.ensemble_gram, losses.ensemble_min, losses.ensemble_hull])
@pytest.mark.parametrize(
    ("margin", "members"), [((2,), (2,)), ((2,), (2, 3)), ((2, 2), (2, 2)), ((0,), (2, 0)), ((2,), (0, 2))]
)
def test_ensemble_shapes(loss: Callable[..., Any], margin: tuple[int, ...], members: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"logratio_margin must have shape \(N,\) and reward_margins shape") as error:
        loss(np.ones(margin), np.ones(members), beta=1.0)
    assert f"{margin} and {members}" in str(error.value)
    if loss is not losses.ensemble_gram:
        with pytest.raises(ValueError, match="logratio_margin must have shape"):
            loss(np.ones(margin), np.ones(members), beta=1.0, gram=np.eye(2))


def test_gram_shapes() -> None:
    with pytest.raises(ValueError, match=r"gram has shape \(3, 3\), but reward_margins has 2 members"):
        losses.ensemble_min(np.ones(2), np.ones((2, 2)), beta=1.0, gram=np.eye(3))
    for weights in (losses.member_weights, losses.hull_weights):
        for shape in [(2,), (2, 3), (0, 0)]:
            with pytest.raises(ValueError, match="gram must have shape"):
                weights(np.ones(shape))


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_hull_of_non_finite_rewards(broken: float) -> None:
    with pytest.raises(ValueError, match="must be finite: a reward or log-prob is NaN or infinite"):
        losses.ensemble_hull(np.ones(2), np.array([[1.0, broken], [0.0, 0.0]]), beta=1.0)


# ---------------------------------------------------------------- hyper-parameters

HYPERPARAMETERS: dict[str, tuple[Callable[[Any, Any], Any], bool]] = {
    "beta of dpo": (lambda z, value: losses.dpo(z, beta=value), True),
    "beta of distillation": (lambda z, value: losses.distillation(z, z, beta=value), True),
    "tau of ipo": (lambda z, value: losses.ipo(z, tau=value), True),
    "alpha of pessimistic": (lambda z, value: losses.pessimistic(z, z, alpha=value), False),
    "gamma of focal_weight": (lambda z, value: losses.focal_weight(z, z, gamma=value), False),
    "alpha of drdo": (lambda z, value: losses.drdo(z, z, -abs(z), -abs(z), alpha=value), False),
    "gamma of drdo": (lambda z, value: losses.drdo(z, z, -abs(z), -abs(z), gamma=value), False),
    "alpha of drdo_oracle": (lambda z, value: losses.drdo_oracle(z, z, alpha=value), False),
    "beta of hinge": (lambda z, value: losses.hinge(z, beta=value), True),
    "beta of cdpo": (lambda z, value: losses.cdpo(z, beta=value, label_smoothing=0.1), True),
    "label_smoothing of cdpo": (lambda z, value: losses.cdpo(z, beta=1, label_smoothing=value), False),
    "beta of robust_dpo": (lambda z, value: losses.robust_dpo(z, beta=value, label_smoothing=0.1), True),
    "label_smoothing of robust_dpo": (lambda z, value: losses.robust_dpo(z, beta=1, label_smoothing=value), False),
    "beta of soft_label": (lambda z, value: losses.soft_label(z, z, beta=value), True),
    "beta of rdpo": (lambda z, value: losses.rdpo(z, z, z, beta=value, alpha=1), True),
    "alpha of rdpo": (lambda z, value: losses.rdpo(z, z, z, beta=1, alpha=value), False),
    "beta of dpo_nll": (lambda z, value: losses.dpo_nll(z, z, z, beta=value, alpha=1), True),
    "alpha of dpo_nll": (lambda z, value: losses.dpo_nll(z, z, z, beta=1, alpha=value), False),
    "beta of dpop": (lambda z, value: losses.dpop(z, z, beta=value, lam=1), True),
    "lam of dpop": (lambda z, value: losses.dpop(z, z, beta=1, lam=value), False),
    "beta of simpo": (lambda z, value: losses.simpo(z, z, z, z, beta=value, gamma=1), True),
    "gamma of simpo": (lambda z, value: losses.simpo(z, z, z, z, beta=1, gamma=value), False),
    "beta of sppo_hard": (lambda z, value: losses.sppo_hard(z, z, beta=value), True),
    "beta of nca": (lambda z, value: losses.nca(z, z, beta=value), True),
}


@pytest.mark.parametrize("name", HYPERPARAMETERS)
@pytest.mark.parametrize("value", [-1, -0.5, np.nan, np.inf, -np.inf, Fraction(-1, 3), np.float32(-1)])
def test_hyperparameter_out_of_range(name: str, value: Any) -> None:
    call, positive = HYPERPARAMETERS[name]
    bound = "> 0" if positive else ">= 0"
    for z in arrays():
        with pytest.raises(ValueError, match=f"^{name.split()[0]} must be a finite number {bound}, got {value}$"):
            call(z, value)


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_zero_is_a_weight_but_not_a_scale(name: str) -> None:
    call, positive = HYPERPARAMETERS[name]
    for z in arrays():
        if positive:
            with pytest.raises(ValueError, match=f"^{name.split()[0]} must be a finite number > 0, got 0$"):
                call(z, 0)
        else:
            call(z, 0)


@pytest.mark.parametrize("name", HYPERPARAMETERS)
@pytest.mark.parametrize("value", [True, "0.1", None, [0.1], np.array(0.1), 1j])
def test_hyperparameter_of_a_wrong_type(name: str, value: Any) -> None:
    call, _ = HYPERPARAMETERS[name]
    with pytest.raises(
        TypeError, match=f"^{name.split()[0]} must be a real number >=? 0, got {type(value).__name__}: "
    ):
        call(one, value)


@pytest.mark.parametrize("loss", [losses.ensemble_gram, losses.ensemble_min, losses.ensemble_hull])
def test_beta_of_an_ensemble(loss: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"^beta must be a finite number > 0, got 0$"):
        loss(np.ones(2), np.ones((2, 2)), beta=0)


@pytest.mark.parametrize(
    "value",
    [sp.Integer(-1), sp.Integer(0), sp.oo, sp.nan, sp.I, 1 - sp.sqrt(2), sp.Symbol("b", nonpositive=True),
     sp.Symbol("b", zero=True), sp.Symbol("b", imaginary=True)],
    ids=str,
)  # fmt: skip
def test_symbolic_hyperparameter_that_cannot_be_positive(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^beta must be a finite number > 0, got "):
        losses.dpo(x, beta=value)


def test_symbolic_hyperparameter_next_to_numbers() -> None:
    with pytest.raises(TypeError, match=r"^beta is the SymPy expression b, but the arrays are of torch$"):
        losses.dpo(tensor(1.0), beta=sp.Symbol("b"))


def test_symbolic_hyperparameters_that_may_be_positive() -> None:
    for value in (sp.Symbol("b"), sp.Symbol("b", real=True), sp.sqrt(2), Fraction(1, 3), 2):
        losses.dpo(x, beta=value)


def test_a_mixing_weight_is_at_most_one() -> None:
    for value in (1.5, 2, Fraction(3, 2)):
        for z in arrays():
            with pytest.raises(ValueError, match=f"^alpha must be at most 1, got {'1.5|3/2' if value != 2 else 2}"):
                losses.drdo_oracle(z, z, alpha=value)
    losses.drdo_oracle(x, x, alpha=sp.Symbol("a"))
    losses.drdo_oracle(one, -one, alpha=1)


@pytest.mark.parametrize("noisy", [losses.cdpo, losses.robust_dpo])
def test_fewer_than_half_of_the_labels_are_flipped(noisy: Callable[..., Any]) -> None:
    for value in (0.5, 1, Fraction(1, 2)):
        for z in arrays():
            with pytest.raises(ValueError, match=f"^label_smoothing must be below 1/2, got {value}$"):
                noisy(z, beta=1, label_smoothing=value)
    noisy(x, beta=1, label_smoothing=sp.Symbol("e"))
    noisy(one, beta=1, label_smoothing=0.4999)


@pytest.mark.parametrize("value", [Fraction(1, 4), np.float64(0.25), np.float32(0.25), 0.25])
def test_hyperparameters_do_not_change_the_floating_type(value: Any) -> None:
    for name, (call, _) in HYPERPARAMETERS.items():
        assert call(-one.astype(np.float32), value).dtype == np.float32, name
        assert call(-tensor([1.0]), value).dtype == tensor(1.0).dtype, name


# ---------------------------------------------------------------- exactness


def test_exact_numbers_stay_exact() -> None:
    assert losses.ipo(sp.Integer(2), tau=Fraction(1, 3)) == sp.Rational(1, 4)
    assert losses.distillation(x, 1, beta=2) == (1 - 2 * x) ** 2
    integers = np.array([1, 2], dtype=object)
    [third, _] = losses.normalised_logratio_margin(integers, integers * 0, np.array([3, 3], dtype=object), integers)
    assert third == sp.Rational(1, 3)


def test_integers_become_floats_in_numpy() -> None:
    assert losses.ipo(np.array([1, 2]), tau=1).dtype == np.float64
    assert losses.ipo(np.int64(1), tau=1) == losses.ipo(1, tau=1) == 0.25


def test_ensembles_take_rewards_of_another_floating_type() -> None:
    """Log-probs in float32 next to rewards stored as float64, and the reverse."""
    members = [[1.0, 0.0], [0.0, 1.0]]
    for of_logps, of_rewards in (("float32", "float64"), ("float64", "float32")):
        got = losses.ensemble_hull(tensor([0.0, 0.0], of_logps), tensor(members, of_rewards), beta=1.0)
        np.testing.assert_allclose(got, [0.25, 0.25], rtol=1e-6)


# ---------------------------------------------------------------- primitives, imports


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log1mexp_at_its_ends(dtype: Any) -> None:
    for z in (np.array([0.0, -np.inf], dtype), tensor([0.0, -np.inf], dtype.__name__)):
        b, array = backend_of(z=z)
        got = b.log1mexp(array)
        assert got.dtype == z.dtype
        assert [float(entry) for entry in got] == [-np.inf, 0.0]
    b, scalar = backend_of(z=dtype(-1.0))
    assert b.log1mexp(scalar).dtype == dtype


def test_log1mexp_gradient_is_finite_on_both_branches() -> None:
    values = np.array([-1e-12, -0.5, -1.0, -1e4])
    z = tensor(values, "float64").requires_grad_()
    backend_of(z=z)[0].log1mexp(z).sum().backward()
    np.testing.assert_allclose(z.grad, np.exp(values) / np.expm1(values), rtol=1e-14)


def test_no_torch_without_a_tensor_and_no_sympy_without_an_expression() -> None:
    code = """
import sys
import numpy as np
from theory import losses

def report():
    print(*[name for name in ("sympy", "torch") if name in sys.modules], sep="+")

losses.drdo(*[-np.ones(2)] * 4), losses.ensemble_hull(np.ones(2), np.eye(2), beta=1)
report()
import sympy
losses.drdo(*sympy.symbols("a b c d")), losses.dpo(np.ones(2), beta=1)
report()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["", "sympy"]
