"""Each loss against its definition in the papers, written out here a second time and evaluated to 400 digits.

Three backends, value and gradient, to within what rounding the inputs may do; then the identities that tie the losses
to the field, the ensembles against exact rational and convex-solver optima, and the token-level KL on a whole tree.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

import cvxpy as cp
import mpmath as mp
import numpy as np
import pytest
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import losses

DIGITS = 400  # e^-745, the smallest float64, has its first digit at place 324: log(1 + e^-745) needs them all
ULPS = 16  # what a few elementary functions in a row may lose; the tightest wrong formula here loses 1e5 or more
COPIES = 9  # of a point in an array: torch's vector and scalar kernels both run


# ---------------------------------------------------------------- the definitions, as the papers have them


def sigma(z: Any) -> Any:
    return 1 / (1 + sp.exp(-z))


@dataclass(frozen=True)
class Definition:
    """A loss as a formula of symbols, and where its arguments live."""

    formula: Callable[..., Any]
    arguments: Sequence[str]
    """Of each array argument: "real", "logp" or "length"."""
    hyperparameters: dict[str, tuple[float, float]]
    """Name -> range."""
    loss: Callable[..., Any] | None = None
    """In place of the function of `theory.losses` of the same name, where its arguments are not all elementwise."""
    slope_of_one: Callable[..., float] = lambda *point: 0.0
    """Arguments and hyper-parameters -> the size of what cancels in a slope, beside the inputs' own rounding."""


def stack(values: Sequence[Any]) -> Any:
    """Along a new last axis, in the library of the values."""
    if isinstance(values[0], sp.Expr):
        return np.array(values, dtype=object)
    if isinstance(values[0], np.ndarray):
        return np.stack(values, axis=-1)
    import torch

    return torch.stack(list(values), dim=-1)


BETA, TAU, ALPHA, GAMMA, FLIPPED = (1e-2, 1e2), (1e-2, 25.0), (0.0, 10.0), (0.0, 5.0), (0.0, 0.49)


def positive_part(z: Any) -> Any:
    """max(0, z); its derivative at 0 is that of the other branch, 0."""
    return sp.Piecewise((z, z > 0), (0, True))


DEFINITIONS = {
    "logratio_margin": Definition(lambda c, r, ref_c, ref_r: (c - ref_c) - (r - ref_r), ["logp"] * 4, {}),
    "normalised_logratio_margin": Definition(
        lambda c, r, n_c, n_r: c / n_c - r / n_r, ["real", "real", "length", "length"], {}
    ),
    # 1 - sigma(z) written as sigma(-z): 1 - sigma(2e4) would take 8,700 digits
    "focal_weight": Definition(lambda c, r, gamma: sigma(r - c) ** gamma, ["logp"] * 2, {"gamma": GAMMA}),
    "bradley_terry": Definition(lambda d: -sp.log(sigma(d)), ["real"], {}),
    "dpo": Definition(lambda D, beta: -sp.log(sigma(beta * D)), ["real"], {"beta": BETA}),
    "ipo": Definition(lambda D, tau: (D - 1 / (2 * tau)) ** 2, ["real"], {"tau": TAU}),
    "distillation": Definition(lambda D, d, beta: (d - beta * D) ** 2, ["real"] * 2, {"beta": BETA}),
    "hinge": Definition(lambda D, beta: positive_part(1 - beta * D), ["real"], {"beta": BETA}),
    "cdpo": Definition(
        lambda D, beta, label_smoothing: (
            -(1 - label_smoothing) * sp.log(sigma(beta * D)) - label_smoothing * sp.log(sigma(-beta * D))
        ),
        ["real"],
        {"beta": BETA, "label_smoothing": FLIPPED},
    ),
    "robust_dpo": Definition(
        lambda D, beta, label_smoothing: (
            (-(1 - label_smoothing) * sp.log(sigma(beta * D)) + label_smoothing * sp.log(sigma(-beta * D)))
            / (1 - 2 * label_smoothing)
        ),
        ["real"],
        {"beta": BETA, "label_smoothing": FLIPPED},
    ),
    "soft_label": Definition(
        lambda D, d, beta: -sigma(d) * sp.log(sigma(beta * D)) - sigma(-d) * sp.log(sigma(-beta * D)),
        ["real"] * 2,
        {"beta": BETA},
        slope_of_one=lambda D, d, beta: beta + 1,  # beta times a difference of two probabilities, and one of two logs
    ),
    "rdpo": Definition(
        lambda D, n_c, n_r, beta, alpha: -sp.log(sigma(beta * D + (alpha * n_c - alpha * n_r))),
        ["real", "length", "length"],
        {"beta": BETA, "alpha": ALPHA},
    ),
    "sft_term": Definition(lambda c, n: -c / n, ["logp", "length"], {}),
    "dpo_nll": Definition(
        lambda D, c, n, beta, alpha: -sp.log(sigma(beta * D)) - alpha * c / n,
        ["real", "logp", "length"],
        {"beta": BETA, "alpha": ALPHA},
    ),
    "dpop": Definition(
        lambda u, v, beta, lam: -sp.log(sigma(beta * (u - v - lam * positive_part(-u)))),
        ["real"] * 2,
        {"beta": BETA, "lam": (0.0, 50.0)},
    ),
    "simpo": Definition(
        lambda c, r, n_c, n_r, beta, gamma: -sp.log(sigma(beta / n_c * c - beta / n_r * r - gamma)),
        ["logp", "logp", "length", "length"],
        {"beta": BETA, "gamma": GAMMA},
    ),
    "sppo_hard": Definition(
        lambda u, v, beta: (u - 1 / (2 * beta)) ** 2 + (v + 1 / (2 * beta)) ** 2, ["real"] * 2, {"beta": TAU}
    ),
    "nca": Definition(
        lambda u, v, beta: -sp.log(sigma(beta * u)) - sp.log(sigma(-beta * u)) / 2 - sp.log(sigma(-beta * v)) / 2,
        ["real"] * 2,
        {"beta": BETA},
    ),
    "forward_kl": Definition(lambda u: -u, ["real"], {}),
    "forward_kl_tokens": Definition(
        lambda *x: sum(sp.exp(p) * sp.log(sp.exp(p) / sp.exp(q)) for p, q in zip(x[:3], x[3:], strict=True)),
        ["logp"] * 6,
        {},
        loss=lambda *x: losses.forward_kl_tokens(stack(x[:3]), stack(x[3:])),
    ),
    "pessimistic": Definition(lambda loss, kl, alpha: loss + alpha * kl, ["real"] * 2, {"alpha": ALPHA}),
    "drdo": Definition(
        lambda d, e, c, r, alpha, gamma: (
            (d - e) ** 2 - alpha * sigma(r - c) ** gamma * sp.log(sp.exp(c) / (1 - sp.exp(r)))
        ),
        ["real", "real", "logp", "logp"],
        {"alpha": ALPHA, "gamma": GAMMA},
    ),
    "drdo_oracle": Definition(
        lambda d, c, alpha: -(1 - alpha) * sp.log(sigma(d)) - alpha * c, ["real", "logp"], {"alpha": (0.0, 1.0)}
    ),
}
ENSEMBLES = {"ensemble_gram", "member_weights", "hull_weights", "ensemble_min", "ensemble_hull"}


def test_every_loss_has_a_definition_here() -> None:
    public = {
        name
        for name, function in inspect.getmembers(losses, inspect.isfunction)
        if function.__module__ == losses.__name__ and not name.startswith("_")
    }
    assert public == set(DEFINITIONS) | ENSEMBLES


# ---------------------------------------------------------------- the referee


@dataclass(frozen=True)
class Referee:
    """Value and gradient of a definition, exact for our purposes, and how sharply floats can be held to them."""

    evaluate: Callable[..., list[Any]]
    """(arguments, hyper-parameters) -> value and its derivatives by the arguments, in mpmath."""

    def at(self, point: Sequence[float], unit: float) -> list[tuple[Any, Any]]:
        """(exact, allowed error) of value and gradient, for arithmetic of the given unit roundoff.

        Allowed are ULPS relative errors of the result and of each input in turn, so that an answer may be as far off
        as its condition number says, and no farther.
        """
        with mp.workdps(DIGITS):
            inputs = [mp.mpf(x) for x in point]
            exact = self.evaluate(*inputs)
            allowed = [ULPS * unit * abs(value) for value in exact]
            for i, x in enumerate(inputs):
                for moved in (x * (1 - ULPS * unit), x * (1 + ULPS * unit)):
                    nearby = self.evaluate(*inputs[:i], moved, *inputs[i + 1 :])
                    allowed = [a + abs(n - e) for a, n, e in zip(allowed, nearby, exact, strict=True)]
        return list(zip(exact, allowed, strict=True))


@cache
def referee(name: str) -> Referee:
    definition = DEFINITIONS[name]
    arguments = sp.symbols(f"x:{len(definition.arguments)}", real=True)
    hyperparameters = {h: sp.Symbol(h, positive=True) for h in definition.hyperparameters}
    value = definition.formula(*arguments, **hyperparameters)
    expressions = [value, *[sp.diff(value, x) for x in arguments]]
    inputs = [*arguments, *hyperparameters.values()]
    return Referee(sp.lambdify(inputs, expressions, [ELEMENTARY, "mpmath"], cse=True))


@lru_cache(1000)
def elementary(name: str, x: Any, precision: int) -> Any:
    """e^x or log x to so many bits. To move one input leaves most of what is asked for as it was."""
    return getattr(mp, name)(x)


ELEMENTARY = {name: lambda x, name=name: elementary(name, x, mp.mp.prec) for name in ("exp", "log")}


def assert_within(got: Any, exact: Any, allowed: Any, dtype: Any, what: str) -> None:
    underflow = 1e5 * float(np.finfo(dtype).tiny)  # lost below the smallest normal number, then multiplied by a margin
    for entry in set(np.asarray(got).ravel().tolist()):  # the copies of a point mostly agree
        error = abs(mp.mpf(entry) - exact)
        assert error <= allowed + underflow, f"{what} is {entry!r}, but {mp.nstr(exact, 20)} by definition"


REALS = [0.0, *[s * z for z in (1e-12, 1e-3, 1.0, 17.0, 20.5, 88.5, 104.0, 709.5, 746.0, 1e4) for s in (1, -1)]]
LOGPS = [-1e-12, -1e-7, -0.69, -0.6931471805599453, -0.7, -17.0, -88.0, -746.0, -1e4]
LENGTHS = [1.0, 2.0, 3.0, 7.0, 512.0, 4096.0]


def entries(kind: str, dtype: Any) -> st.SearchStrategy[float]:
    """Values of a kind that the dtype holds exactly: those where a formula could break, and any."""
    width: Any = np.finfo(dtype).bits
    corners = {"real": REALS, "logp": LOGPS, "length": LENGTHS}[kind]
    corner = st.sampled_from([float(dtype(x)) for x in corners])
    if kind == "length":
        return corner
    top = 1e4 if kind == "real" else float(dtype(-1e-12))
    return corner | st.floats(-1e4, top, width=width)


@pytest.mark.parametrize("name", DEFINITIONS)
@given(data=st.data())
def test_value_and_gradient(name: str, data: st.DataObject) -> None:
    import torch

    definition = DEFINITIONS[name]
    loss = definition.loss or getattr(losses, name)
    dtype: Any = data.draw(st.sampled_from([np.float32, np.float64]))
    point = [data.draw(entries(kind, dtype)) for kind in definition.arguments]
    hyper = {h: data.draw(st.sampled_from([lo, hi]) | st.floats(lo, hi), label=h) for h, (lo, hi) in _ranges(name)}
    unit = float(np.finfo(dtype).eps)
    (value, value_allowed), *gradient = referee(name).at([*point, *hyper.values()], unit)
    cancelled = ULPS * unit * definition.slope_of_one(*point, *hyper.values())

    arrays = [np.full(COPIES, x, dtype) for x in point]
    got = loss(*arrays, **hyper)
    assert got.dtype == dtype
    assert_within(got, value, value_allowed, dtype, f"{name} in NumPy")

    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    got = loss(*tensors, **hyper)
    assert got.dtype == tensors[0].dtype
    assert_within(got.detach(), value, value_allowed, dtype, f"{name} in torch")
    got.sum().backward()
    for i, (tensor, (slope, slope_allowed)) in enumerate(zip(tensors, gradient, strict=True)):
        assert tensor.grad is not None
        assert_within(
            tensor.grad, slope, slope_allowed + cancelled, dtype, f"derivative of {name} by argument {i} in torch"
        )


def _ranges(name: str) -> Iterator[tuple[str, tuple[float, float]]]:
    return iter(DEFINITIONS[name].hyperparameters.items())


@pytest.mark.parametrize("name", DEFINITIONS)
def test_sympy_value_and_derivative(name: str) -> None:
    definition = DEFINITIONS[name]
    loss = definition.loss or getattr(losses, name)
    arguments = sp.symbols(f"x:{len(definition.arguments)}", real=True)
    hyper = {h: sp.Symbol(h, positive=True) for h in definition.hyperparameters}
    value = loss(*arguments, **hyper)
    ours = sp.lambdify([*arguments, *hyper.values()], [value, *[sp.diff(value, x) for x in arguments]], "mpmath")
    rng = np.random.default_rng(0)
    for _ in range(5):
        point = [mp.mpf(-rng.exponential(3)) for _ in (*arguments, *hyper)]
        point[len(arguments) :] = [-x for x in point[len(arguments) :]]
        with mp.workdps(60):
            for got, exact in zip(ours(*point), referee(name).evaluate(*point), strict=True):
                assert abs(got - exact) <= mp.mpf(10) ** -50 * (1 + abs(exact))


@pytest.mark.parametrize("wrong", ["softplus, linear above 20", "log(1 + exp(-z)) as written", "a factor 1 + 1e-9"])
def test_referee_rejects(wrong: str) -> None:
    import torch

    z, computed = {
        "softplus, linear above 20": (-20.5, torch.nn.functional.softplus(torch.tensor(20.5, dtype=torch.float64))),
        "log(1 + exp(-z)) as written": (40.0, np.log(1 + np.exp(-40.0))),
        "a factor 1 + 1e-9": (0.0, np.log(2) * (1 + 1e-9)),
    }[wrong]
    [(value, allowed), _] = referee("bradley_terry").at([z], float(np.finfo(np.float64).eps))
    assert_within(losses.bradley_terry(z), value, allowed, np.float64, "ours")
    with pytest.raises(AssertionError, match="by definition"):
        assert_within(computed, value, allowed, np.float64, wrong)


# ---------------------------------------------------------------- identities that tie the losses to the field

D, d, r_w, r_l = sp.symbols("Delta delta r_w r_l", real=True)
beta, tau, eta, alpha, gamma = sp.symbols("beta tau eta alpha gamma", positive=True)


def assert_zero(expression: sp.Expr) -> None:
    left = sp.simplify(sp.expand_log(sp.expand(expression), force=True))
    assert left == 0, f"{left} is not zero"


def test_ipo_distils_a_constant_margin() -> None:
    assert_zero(losses.ipo(D, tau=tau) - losses.distillation(D, beta / (2 * tau), beta=beta) / beta**2)


def test_rebel_regresses_what_distillation_does() -> None:
    """The paper divides the log-ratios by eta, its code multiplies the rewards by it: beta^2 lies between the two."""
    paper = (D / eta - (r_w - r_l)) ** 2
    code = (D - eta * (r_w - r_l)) ** 2
    ours = losses.distillation(D, r_w - r_l, beta=1 / eta)
    assert_zero(paper - ours)
    assert_zero(code - ours * eta**2)


def test_rpo_sq_is_distillation() -> None:
    assert_zero((beta * D - d) ** 2 - losses.distillation(D, d, beta=beta))


def test_rpo_bwd_kl_is_soft_label_dpo_less_the_entropy_of_the_label() -> None:
    label, policy = sigma(d), sigma(beta * D)
    bernoulli_kl = label * sp.log(label / policy) + (1 - label) * sp.log((1 - label) / (1 - policy))
    soft = losses.soft_label(D, d, beta=beta)
    entropy = -label * sp.log(label) - (1 - label) * sp.log(1 - label)
    s, t = sp.symbols("s t", positive=True)  # the odds: e^delta and e^(beta Delta)
    difference = (bernoulli_kl - (soft - entropy)).subs({d: sp.log(s), D: sp.log(t) / beta})
    assert_zero(difference.replace(sp.log, lambda x: sp.log(sp.factor(x))))


def test_dpo_is_bradley_terry_on_implicit_rewards() -> None:
    assert_zero(losses.dpo(D, beta=beta) - losses.bradley_terry(beta * D))


def test_robust_dpo_is_unbiased_under_flipped_labels_and_cdpo_is_a_soft_label() -> None:
    """Labels are flipped with probability e, so the other pair is seen: in the mean, DPO with the true label."""
    e, options = sp.Rational(1, 5), {"beta": 1, "label_smoothing": sp.Rational(1, 5)}
    seen = (1 - e) * losses.robust_dpo(D, **options) + e * losses.robust_dpo(-D, **options)
    assert_zero(sp.log(sp.factor(sp.exp(sp.expand(10 * (seen - losses.dpo(D, beta=1)))))))
    assert_zero(losses.cdpo(D, **options) - losses.soft_label(D, sp.log(4), beta=1))
    for noisy in (losses.cdpo, losses.robust_dpo):
        assert_zero(noisy(D, beta=beta, label_smoothing=0) - losses.dpo(D, beta=beta))


def test_rdpo_is_dpo_for_a_reward_less_the_length() -> None:
    """A policy proportional to pi_ref exp((r - alpha |y|) / beta) has the Bradley-Terry likelihood of r itself."""
    n_w, n_l = sp.symbols("n_w n_l", integer=True, positive=True)
    margin = ((r_w - alpha * n_w) - (r_l - alpha * n_l)) / beta
    assert_zero(losses.rdpo(margin, n_w, n_l, beta=beta, alpha=alpha) - losses.bradley_terry(r_w - r_l))


def test_losses_that_add_to_dpo_are_dpo_without_the_addition() -> None:
    u, v, c = sp.symbols("u v c", real=True)
    dpo = losses.dpo(u - v, beta=beta)
    assert_zero(losses.dpop(u, v, beta=beta, lam=0) - dpo)
    assert losses.dpop(2.0, 1.0, beta=0.5, lam=50) == losses.dpo(1.0, beta=0.5)
    assert losses.dpop(-2.0, 1.0, beta=0.5, lam=3) == losses.dpo(-9.0, beta=0.5)
    assert_zero(losses.dpo_nll(u - v, c, 1, beta=beta, alpha=0) - dpo)
    assert_zero(losses.rdpo(u - v, 3, 3, beta=beta, alpha=alpha) - dpo)
    assert_zero(losses.simpo(u, v, 1, 1, beta=beta, gamma=0) - dpo)
    assert losses.sft_term(-6.0, 3.0) == 2.0


def test_hinge_is_flat_beyond_its_margin() -> None:
    import torch

    assert_zero(losses.hinge(1 / beta, beta=beta))
    assert [float(losses.hinge(z, beta=2.0)) for z in (-1.0, 0.25, 0.5, 3.0)] == [3.0, 0.5, 0.0, 0.0]
    margin = torch.tensor([0.25, 0.5, 3.0], requires_grad=True)
    losses.hinge(margin, beta=2.0).sum().backward()
    assert margin.grad is not None
    assert margin.grad.tolist() == [-2.0, 0.0, 0.0]


def test_focal_weight_in_probabilities() -> None:
    """p_w = 3/4 where pi(y_w) = 3 pi(y_l); squared (1 - p_w) is 1/16."""
    weight = losses.focal_weight(sp.log(sp.Rational(3, 8)), sp.log(sp.Rational(1, 8)), gamma=2)
    assert sp.nsimplify(sp.simplify(weight)) == sp.Rational(1, 16)
    assert losses.focal_weight(-1.0, -1.0, gamma=0) == 1


def test_drdo_in_probabilities_and_its_default_hyperparameters() -> None:
    point = (1.25, 0.5, np.log(0.375), np.log(0.125))
    expected = 0.75**2 - 0.1 * 0.25**2 * np.log(0.375 / 0.875)
    np.testing.assert_allclose(losses.drdo(*point), expected, rtol=1e-14)
    assert losses.drdo(*point) == losses.drdo(*point, alpha=0.1, gamma=2)


def test_drdo_oracle_in_probabilities_and_its_default_hyperparameter() -> None:
    expected = 0.99 * np.log(4 / 3) - 0.01 * np.log(0.25)
    np.testing.assert_allclose(losses.drdo_oracle(np.log(3.0), np.log(0.25)), expected, rtol=1e-14)


def test_pessimism_adds_to_either_loss() -> None:
    kl = sp.Symbol("kl", nonnegative=True)
    p_dpo = losses.pessimistic(losses.dpo(D, beta=beta), kl, alpha=alpha)
    assert_zero(sp.diff(p_dpo, kl) - alpha)
    assert_zero(p_dpo.subs(alpha, 0) - losses.dpo(D, beta=beta))


def test_logratio_margin_is_antisymmetric_and_forgets_constants() -> None:
    c, r, ref_c, ref_r, z = sp.symbols("c r ref_c ref_r z", real=True)
    margin = losses.logratio_margin(c, r, ref_c, ref_r)
    assert_zero(margin + losses.logratio_margin(r, c, ref_r, ref_c))
    assert_zero(margin - losses.logratio_margin(c + z, r + z, ref_c, ref_r))


def test_nothing_is_reduced() -> None:
    import torch

    rng = np.random.default_rng(0)
    for shape in [(), (3,), (2, 3)]:
        x, y = rng.normal(size=shape), rng.normal(size=shape)
        assert losses.distillation(x, y, beta=0.5).shape == shape
        assert losses.dpo(torch.tensor(x), beta=0.5).shape == shape
        assert losses.forward_kl_tokens(rng.normal(size=(*shape, 5)), rng.normal(size=(*shape, 5))).shape == shape


def test_nan_propagates() -> None:
    import torch

    nan = np.array([np.nan, -1.0])
    for name, definition in DEFINITIONS.items():
        loss = definition.loss or getattr(losses, name)
        hyper = dict.fromkeys(definition.hyperparameters, 0.25)
        for broken in range(len(definition.arguments)):
            arrays = [nan if i == broken else np.full(2, -2.0) for i in range(len(definition.arguments))]
            for got in (loss(*arrays, **hyper), loss(*map(torch.tensor, arrays), **hyper)):
                assert np.isnan(np.asarray(got)).tolist() == [True, False], f"{name}, argument {broken}"


# ---------------------------------------------------------------- the token-level forward KL

# Probabilities of the next token after each prefix, [stop, a, b]; two tokens at most, the third is always stop.
TREE_REF = {"": (0, 1, 2), "a": (1, 1, 2), "b": (3, 0, 1)}
TREE_POLICY = {"": (1, 2, 1), "a": (2, 5, 1), "b": (1, 1, 1)}


def completions(ref: dict[str, Any], policy: dict[str, Any]) -> list[tuple[Any, Any, Any]]:
    """(probability under ref, -u, token-level estimate) of each completion, exactly, from the two losses."""

    def logprobs(counts: Sequence[int]) -> Any:
        return np.array([sp.log(sp.Rational(c, sum(counts))) for c in counts], dtype=object)

    found = []
    for first in "Sab":
        for second in "Sab" if first != "S" else "S":
            probability, u, estimate = sp.Integer(1), sp.Integer(0), sp.Integer(0)
            for prefix, token in [("", first), *([(first, second)] if first != "S" else [])]:
                index = "Sab".index(token)
                probability *= sp.Rational(ref[prefix][index], sum(ref[prefix]))
                if not probability:
                    break
                here = [i for i in range(3) if ref[prefix][i]]  # exact logs: no log of 0 among SymPy's
                lp, lq = logprobs(ref[prefix]), logprobs(policy[prefix])
                u += lq[index] - lp[index]
                estimate += losses.forward_kl_tokens(lp[here], lq[here])
            if probability:
                found.append((probability, losses.forward_kl(u), estimate))
    return found


def moments(weighted: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    mean = sum(p * x for p, x in weighted)
    return mean, sum(p * (x - mean) ** 2 for p, x in weighted)


def test_token_level_kl_has_the_mean_of_forward_kl() -> None:
    tree = completions(TREE_REF, TREE_POLICY)
    assert sum(p for p, _, _ in tree) == 1
    assert_zero(moments([(p, x) for p, x, _ in tree])[0] - moments([(p, x) for p, _, x in tree])[0])
    assert all(float(x) >= 0 for _, _, x in tree)
    assert min(float(x) for _, x, _ in tree) < 0, "the plain estimate does go below zero, or this tree shows nothing"


def test_token_level_kl_has_a_smaller_variance_on_one_position_but_not_always() -> None:
    """Where a later KL offsets an earlier log-ratio, the plain estimate is constant and the token-level one is not."""
    tree = completions(TREE_REF, TREE_POLICY)
    assert float(moments([(p, x) for p, _, x in tree])[1]) < float(moments([(p, x) for p, x, _ in tree])[1])
    offset = completions(
        {"": (0, 1, 1), "a": (1, 0, 0), "b": (1, 0, 0)}, {"": (0, 3, 1), "a": (1, 2, 0), "b": (1, 0, 0)}
    )
    plain, token_level = moments([(p, x) for p, x, _ in offset]), moments([(p, x) for p, _, x in offset])
    assert_zero(plain[0] - token_level[0])
    assert_zero(plain[1])
    assert float(token_level[1]) > 0.3


@given(data=st.data())
def test_token_level_kl_is_never_negative(data: st.DataObject) -> None:
    import torch

    logits = st.lists(st.floats(-1e3, 1e3), min_size=6, max_size=6)
    ref, policy = (torch.log_softmax(torch.tensor(data.draw(logits), dtype=torch.float64), -1) for _ in "rp")
    for got in (losses.forward_kl_tokens(ref, policy), losses.forward_kl_tokens(ref.numpy(), policy.numpy())):
        assert float(got) >= -1e-12
    assert float(losses.forward_kl_tokens(ref, ref)) == 0


def test_token_level_kl_with_masked_tokens() -> None:
    import torch

    inf = np.inf
    ref = np.log(np.array([[0.5, 0.5, 1.0], [0.25, 0.5, 0.25]]))
    ref[0, 2] = -inf
    policy = np.log(np.array([[0.25, 0.75, 1.0], [0.5, 0.5, 1.0]]))
    policy[:, 2] = -inf
    expected = [0.5 * np.log(2) + 0.5 * np.log(2 / 3), inf]
    np.testing.assert_allclose(losses.forward_kl_tokens(ref, policy), expected, rtol=1e-14)

    logits = torch.tensor(policy, requires_grad=True)
    got = losses.forward_kl_tokens(torch.tensor(ref), torch.log_softmax(logits, -1))
    np.testing.assert_allclose(got.detach(), expected, rtol=1e-14)
    got[0].backward()
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad[0], [-0.25, 0.25, 0.0], atol=1e-15)  # policy - ref, and nothing masked


# ---------------------------------------------------------------- ensembles


def exact(values: Any) -> Any:
    """An object array of SymPy rationals."""
    return np.frompyfunc(lambda x: sp.Rational(Fraction(x)), 1, 1)(np.array(values))


def simplex_gap(residuals: Any, weights: Any) -> Any:
    """At least half of how far |weights @ residuals|^2 is above its minimum over the simplex (the Frank-Wolfe gap)."""
    mixture = weights @ residuals
    return mixture @ mixture - min(residuals @ mixture)


small_ensembles = st.tuples(st.integers(1, 3), st.integers(1, 3)).flatmap(
    lambda kn: st.tuples(
        st.lists(st.integers(-4, 4), min_size=kn[1], max_size=kn[1]),
        st.lists(st.lists(st.integers(-4, 4), min_size=kn[1], max_size=kn[1]), min_size=kn[0], max_size=kn[0]),
        st.sampled_from([Fraction(1, 2), Fraction(1), Fraction(3)]),
    )
)


@given(small_ensembles)
def test_ensembles_against_exact_optima(ensemble: Any) -> None:
    import torch

    margin, members, beta = ensemble
    n = len(margin)
    residuals = exact(members) - sp.Rational(beta) * exact(margin)
    member_means = [sum(row**2) / n for row in residuals]

    gram = losses.ensemble_gram(exact(margin), exact(members), beta=beta)
    assert (gram == residuals @ residuals.T / sp.Integer(n)).all()
    weights = losses.hull_weights(gram)
    assert all(w >= 0 for w in weights)
    assert sum(weights) == 1
    assert simplex_gap(residuals, weights) == 0
    hull = sum((weights @ residuals) ** 2) / n
    assert hull <= min(member_means)

    for loss, optimum in ((losses.ensemble_min, min(member_means)), (losses.ensemble_hull, hull)):
        assert sum(loss(exact(margin), exact(members), beta=beta)) / n == optimum
        for dtype, tolerance in ((np.float64, 1e-13), (np.float32, 1e-5)):
            arrays = np.array(margin, dtype), np.array(members, dtype)
            for got in (loss(*arrays, beta=beta), loss(*map(torch.tensor, arrays), beta=beta)):
                assert got.shape == (n,)
                assert abs(float(got.mean()) - float(optimum)) <= tolerance * (1 + float(max(member_means)))


@given(data=st.data())
def test_hull_is_optimal_at_any_scale(data: st.DataObject) -> None:
    k, n = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 6))
    entry = st.floats(-1e4, 1e4) | st.sampled_from([0.0, 1e-12, 1.0])
    rows = st.lists(entry, min_size=n, max_size=n)
    margin, members = np.array(data.draw(rows)), np.array(data.draw(st.lists(rows, min_size=k, max_size=k)))
    members[-1] = members[0] * (1 + 1e-9)  # a near copy: the Gram matrix is singular to rounding
    residuals = members - 0.1 * margin
    weights = losses.hull_weights(losses.ensemble_gram(margin, members, beta=0.1))
    assert (weights >= 0).all()
    assert abs(weights.sum() - 1) <= 1e-12
    assert simplex_gap(residuals, weights) <= 1e-10 * (residuals**2).sum()
    hull, best = losses.ensemble_hull(margin, members, beta=0.1), losses.ensemble_min(margin, members, beta=0.1)
    assert hull.mean() <= best.mean() * (1 + 1e-12) + 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_hull_against_a_convex_solver(seed: int) -> None:
    rng = np.random.default_rng(seed)
    margin, members = rng.normal(size=40), rng.normal(size=(5, 40)) + rng.normal(size=(5, 1))
    w = cp.Variable(5)
    mean_loss = cp.sum_squares(w @ members - 0.5 * margin) / 40
    optimum = cp.Problem(cp.Minimize(mean_loss), [w >= 0, cp.sum(w) == 1]).solve(solver=cp.CLARABEL)
    ours = losses.ensemble_hull(margin, members, beta=0.5).mean()
    np.testing.assert_allclose(ours, optimum, rtol=1e-7)
    uniform = ((members.mean(0) - 0.5 * margin) ** 2).mean()
    assert not np.isclose(uniform, optimum, rtol=1e-7)


ENVELOPE_MARGIN = ["1/3", "-2", "3/4"]
ENVELOPE_MEMBERS = [["1", "-1", "2"], ["-2", "1", "1/2"], ["1", "3", "-1"]]


@pytest.mark.parametrize("name", ["ensemble_min", "ensemble_hull"])
def test_ensemble_gradient_is_that_of_the_minimum(name: str) -> None:
    """Central differences of the exact optimum, in rationals, against autograd with the weights held fixed."""
    import torch

    loss, h = getattr(losses, name), Fraction(1, 10**6)
    point = [Fraction(x) for x in ENVELOPE_MARGIN]

    def optimum(i: int, step: Fraction) -> Any:
        margin = [x + step * (i == j) for j, x in enumerate(point)]
        return sum(loss(exact(margin), exact(ENVELOPE_MEMBERS), beta=1))

    slopes = [float((optimum(i, h) - optimum(i, -h)) / (2 * h)) for i in range(3)]
    margin = torch.tensor([float(x) for x in point], dtype=torch.float64, requires_grad=True)
    members = torch.tensor([[float(Fraction(x)) for x in row] for row in ENVELOPE_MEMBERS], dtype=torch.float64)
    [gradient] = torch.autograd.grad(loss(margin, members, beta=1).sum(), margin)
    np.testing.assert_allclose(gradient, slopes, atol=1e-5)
    [other] = torch.autograd.grad(losses.distillation(margin, members.mean(0), beta=1).sum(), margin)
    assert not np.allclose(other, slopes, atol=1e-2), "any weights would pass here"
    assert not losses.ensemble_gram(margin, members, beta=1).requires_grad


def test_gram_of_micro_batches_adds_up_to_the_choice_on_the_global_batch() -> None:
    margin, members = np.zeros(5), np.array([[0.0, 0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    for loss in (losses.ensemble_min, losses.ensemble_hull):
        whole = loss(margin, members, beta=1.0)
        parts = [slice(0, 3), slice(3, 5)]
        gram = sum(losses.ensemble_gram(margin[p], members[:, p], beta=1.0) * len(margin[p]) for p in parts) / 5
        together = np.concatenate([loss(margin[p], members[:, p], beta=1.0, gram=gram) for p in parts])
        np.testing.assert_allclose(together, whole, rtol=1e-12)
        apart = np.concatenate([loss(margin[p], members[:, p], beta=1.0) for p in parts])
        assert apart.mean() < whole.mean() - 0.1, "choosing in each micro-batch is another, smaller loss"


def test_the_first_of_equal_members_is_chosen() -> None:
    import torch

    gram = np.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    for got in (
        losses.member_weights(gram),
        losses.member_weights(torch.tensor(gram)),
        losses.member_weights(exact(gram)),
    ):
        assert [float(w) for w in got] == [0, 1, 0]


def test_hull_of_perfect_members_is_a_point_of_the_simplex() -> None:
    assert losses.hull_weights(np.zeros((3, 3))).sum() == 1


def test_symbolic_ensemble_min_is_piecewise() -> None:
    x, y = sp.symbols("x y", real=True)
    value = losses.ensemble_min(np.array([x], dtype=object), np.array([[1], [y]], dtype=object), beta=1)[0]
    assert value.subs({x: 0, y: 2}) == 1
    assert value.subs({x: 0, y: sp.Rational(1, 2)}) == sp.Rational(1, 4)
