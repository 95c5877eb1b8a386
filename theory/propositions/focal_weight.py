"""DRDO's focal weight (1 - p_w)^gamma: its value and gradient where the policy is wrong, undecided and right.

p = p_w = pi(y_w) / (pi(y_w) + pi(y_l)), W = (1 - p)^gamma, g = log(pi(y_w) / (1 - pi(y_l))) <= 0. The gradient flows
through W, so the preference term T = -alpha W g has slope -alpha W (1 - gamma p g) in log pi(y_w): never less steep
than the -alpha W of a detached weight, and steeper the less likely the winner is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import mpmath
import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import losses
from theory.claim import Claim, require

ALPHA, GAMMA = sp.symbols("alpha gamma", positive=True)
WINNER, LOSER = sp.symbols("w x", positive=True)
"""pi(y_w) and pi(y_l)."""
P = WINNER / (WINNER + LOSER)

Formula = Callable[[sp.Expr, sp.Expr], sp.Expr]
"""(p, gamma) -> weight."""
Ends = tuple[sp.Expr, sp.Expr, sp.Expr]
"""At p -> 0, p = 1/2 and p -> 1."""


def weight(gamma: Any = GAMMA) -> sp.Expr:
    """W in terms of the probabilities, from the loss module."""
    return losses.focal_weight(sp.log(WINNER), sp.log(LOSER), gamma=gamma)


def preference_term() -> sp.Expr:
    """T: DRDO with a reward head that is exact."""
    zero = sp.Integer(0)
    return losses.drdo(zero, zero, sp.log(WINNER), sp.log(LOSER), alpha=ALPHA, gamma=GAMMA)


def in_log(expression: sp.Expr, probability: sp.Symbol) -> sp.Expr:
    """d expression / d log(probability)."""
    return probability * sp.diff(expression, probability)


# ---------------------------------------------------------------- checks


@cache
def _limits() -> tuple[Ends, Ends]:
    """W and dW / d(log pi(y_w) - log pi(y_l))."""
    return _at_ends(weight()), _at_ends(in_log(weight(), WINNER))


def _at_ends(expression: sp.Expr) -> Ends:
    middle = sp.simplify(expression.subs(WINNER, LOSER))
    odds = sp.Symbol("o", positive=True)  # p / (1 - p); only the ratio of the probabilities enters
    by_odds = sp.simplify(expression.subs(WINNER, odds * LOSER))
    return sp.limit(by_odds, odds, 0, "+"), middle, sp.limit(by_odds, odds, sp.oo)


def check_weight(formula: Formula) -> None:
    """W = (1 - p)^gamma and dW/dz = -gamma p W, z = log pi(y_w) - log pi(y_l); the slope is steepest at
    p = 1 / (1 + gamma)."""
    require(sp.simplify(weight() / formula(P, GAMMA)) == 1, "the weight is another one")
    slope = -GAMMA * P * weight()
    for variable, sign in ((WINNER, 1), (LOSER, -1)):
        require(sp.simplify(in_log(weight(), variable) - sign * slope) == 0, "another slope")
    p = sp.Symbol("p", positive=True)
    steepest = sp.diff(sp.log(GAMMA * p * (1 - p) ** GAMMA), p)
    require(sp.simplify(steepest - (1 / p - GAMMA / (1 - p))) == 0, "another curvature")
    require(sp.simplify(steepest.subs(p, 1 / (1 + GAMMA))) == 0, "steepest elsewhere")


def check_ends(values: Ends, slopes: Ends) -> None:
    """Value and slope of W at p -> 0, p = 1/2, p -> 1."""
    for found, claimed in zip(_limits(), (values, slopes), strict=True):
        for at, a, b in zip(("p -> 0", "p = 1/2", "p -> 1"), found, claimed, strict=True):
            require(sp.simplify(a - b) == 0, f"{a} at {at}, not {b}")


def check_gradient(in_winner: Callable[[Any, Any, Any], Any], in_loser: Callable[[Any, Any, Any], Any]) -> None:
    """dT/dlog pi(y_w) and dT/dlog pi(y_l), as functions of (W, p, g)."""
    g = sp.log(WINNER) - sp.log(1 - LOSER)
    for variable, formula in ((WINNER, in_winner), (LOSER, in_loser)):
        slope = in_log(preference_term(), variable)
        require(sp.simplify(slope - formula(weight(), P, g)) == 0, f"another slope in log pi of {variable}")


def slope_in_winner(w: Any, p: Any, g: Any) -> Any:
    """-alpha W (1 - gamma p g)."""
    return -ALPHA * w * (1 - GAMMA * p * g)


def slope_in_loser(w: Any, p: Any, g: Any) -> Any:
    """-alpha W (gamma p g + pi(y_l) / (1 - pi(y_l)))."""
    return -ALPHA * w * (GAMMA * p * g + LOSER / (1 - LOSER))


def check_gradient_ends(wrong: Any, undecided: Any, right: Any) -> None:
    """dT/dlog pi(y_w): p -> 0 (pi(y_w) -> 0), p = 1/2 (equal), p -> 1 (pi(y_l) -> 0 with pi(y_w) fixed)."""
    slope = in_log(preference_term(), WINNER)
    require(sp.simplify(slope.subs(WINNER, LOSER) - undecided) == 0, "another slope at p = 1/2")
    # W is continuous with the limits of check_ends, so what is left are the limits of p g and, at p -> 1, of g.
    g = sp.log(WINNER) - sp.log(1 - LOSER)
    p_g, ends = sp.limit(P * g, WINNER, 0, "+"), _limits()[0]
    require(p_g == 0, "p g does not vanish as pi(y_w) -> 0")
    require(sp.simplify(slope_in_winner(ends[0], 1, p_g) - wrong) == 0, "another slope at p -> 0")
    at_one = sp.limit(g, LOSER, 0, "+")
    require(at_one.is_finite is not False and at_one == sp.log(WINNER), "g has another limit")
    require(sp.simplify(slope_in_winner(ends[2], 1, at_one) - right) == 0, "another slope at p -> 1")


HALF = sp.Rational(1, 2)
SLOPE_UNDECIDED = -ALPHA * HALF**GAMMA * (1 - GAMMA * HALF * (sp.log(LOSER) - sp.log(1 - LOSER)))


def prove() -> None:
    check_weight(lambda p, gamma: (1 - p) ** gamma)
    check_ends((1, HALF**GAMMA, 0), (0, -GAMMA * HALF ** (GAMMA + 1), 0))
    check_gradient(slope_in_winner, slope_in_loser)
    check_gradient_ends(-ALPHA, SLOPE_UNDECIDED, 0)


def enumerate_values(thorough: bool) -> str:
    """W at every p = i / n, integer gamma, in rational arithmetic."""
    largest, count = (20 if thorough else 8), 0
    for n in range(2, largest + 1):
        for i in range(1, n):
            for gamma in range(4):
                value = losses.focal_weight(sp.log(i), sp.log(n - i), gamma=gamma)
                exact = sp.Rational(n - i, n) ** gamma
                require(sp.simplify(value - exact) == 0, f"W = {value} at p = {i}/{n}, gamma = {gamma}")
                count += 1
    return f"{count} values: p = i/n, n <= {largest}, gamma in 0..3"


# ---------------------------------------------------------------- without each assumption


def _gamma_zero() -> str:
    require(weight(gamma=0) == 1, "the weight is not constant")
    return "gamma = 0: W = 1 at every p, also as p -> 1"


def _winner_vanishes() -> str:
    """pi(y_w) = e^(-k^3), pi(y_l) = pi(y_w) / k, gamma = 2: p = k / (k + 1) -> 1, yet the slope grows like k."""
    k = sp.Symbol("k", positive=True)
    slope = in_log(preference_term(), WINNER).subs({GAMMA: 2, ALPHA: 1})
    # Without the -log(1 - pi(y_l)) of g, which tends to 0 as pi(y_l) does.
    leading = slope_in_winner(1 / (k + 1) ** 2, k / (k + 1), -(k**3)).subs({GAMMA: 2, ALPHA: 1})
    along = slope.subs({WINNER: sp.exp(-(k**3)), LOSER: sp.exp(-(k**3)) / k})
    require(sp.limit(leading, k, sp.oo) == -sp.oo, "the slope tends to 0")
    gap = sp.N(along.subs(k, 5) - leading.subs(k, 5), 30)
    require(bool(abs(gap) < sp.Float("1e-20")), "not the slope along that path")
    return "pi(y_w) = e^(-k^3), pi(y_l) = pi(y_w)/k, gamma = 2: p -> 1, but the slope in log pi(y_w) -> -infinity"


# ---------------------------------------------------------------- properties

LOG_PROBABILITY = st.floats(-1e4, -1e-9)


@given(LOG_PROBABILITY, LOG_PROBABILITY, st.floats(0.01, 8))
def weight_agrees_with_mpmath(chosen: float, rejected: float, gamma: float) -> None:
    """NumPy: W in [0, 1] and right to rounding, extremes included."""
    value = float(losses.focal_weight(chosen, rejected, gamma=gamma))
    with mpmath.workdps(40):
        exact = (1 / (1 + mpmath.exp(mpmath.mpf(chosen) - rejected))) ** gamma
        assert 0 <= value <= 1
        assert abs(value - exact) <= 1e-11 * exact + 1e-300, (value, exact)


@given(st.floats(-700, -1e-6), st.floats(-700, -1e-6), st.floats(0.01, 8))
def torch_gradient_agrees_with_mpmath(chosen: float, rejected: float, gamma: float) -> None:
    """torch: the training gradient of T in both log-probabilities is the closed form, evaluated to 40 digits."""
    import torch

    c, x = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (chosen, rejected))
    zero = torch.tensor(0.0, dtype=torch.float64)
    gradient = torch.autograd.grad(losses.drdo(zero, zero, c, x, alpha=0.1, gamma=gamma), (c, x))
    with mpmath.workdps(40):
        w, loser = mpmath.exp(chosen), mpmath.exp(rejected)
        p, g = w / (w + loser), chosen - mpmath.log(1 - loser)
        scale = mpmath.mpf(0.1) * (loser / (w + loser)) ** gamma
        closed = (-scale * (1 - gamma * p * g), -scale * (gamma * p * g + loser / (1 - loser)))
        size = scale * (1 + gamma * p * abs(g) + loser / (1 - loser))
        for found, exact in zip(gradient, closed, strict=True):
            assert abs(found.item() - exact) <= 1e-9 * size + 1e-290, (found, exact)


@given(st.floats(-50, 50), st.floats(0, 5), st.floats(0, 8))
def weight_falls_in_the_margin(margin: float, further: float, gamma: float) -> None:
    """NumPy: the surer the policy, the smaller the weight."""
    near, far = (losses.focal_weight(z, 0.0, gamma=gamma) for z in (margin, margin + further))
    assert np.isfinite(near)
    assert far <= near * (1 + 1e-12)


CLAIMS = (
    Claim(
        id="drdo-focal",
        source="[N] eq 6",
        statement=(
            "The focal weight (1 - p_w)^gamma is 1, 2^-gamma, 0 and its slope 0, -gamma 2^-(gamma+1), 0 at p_w -> 0, "
            "1/2, 1; steepest at p_w = 1/(1 + gamma). The preference term's slope in log pi(y_w) is -alpha, "
            "-alpha 2^-gamma (1 - gamma g/2), 0 there; the last needs pi(y_w) bounded away from 0."
        ),
        formula=r"\tfrac{\partial T}{\partial\log\pi(y_w)}=-\alpha(1-p)^\gamma(1-\gamma p\,g),\quad "
        r"g=\log\tfrac{\pi(y_w)}{1-\pi(y_l)}",
        assumptions={
            "gamma > 0": "the focal exponent is positive",
            "winner fixed": "pi(y_w) stays away from 0 as p_w -> 1",
        },
        prove=prove,
        counterexamples={"gamma > 0": _gamma_zero, "winner fixed": _winner_vanishes},
        controls={
            "p in place of 1 - p": lambda: check_weight(lambda p, gamma: p**gamma),
            "exponent off by one": lambda: check_weight(lambda p, gamma: (1 - p) ** (gamma + 1)),
            "value at 1/2": lambda: check_ends((1, HALF, 0), (0, -GAMMA * HALF ** (GAMMA + 1), 0)),
            "slope at 1/2": lambda: check_ends((1, HALF**GAMMA, 0), (0, -GAMMA * HALF**GAMMA, 0)),
            "detached weight": lambda: check_gradient(lambda w, p, g: -ALPHA * w, slope_in_loser),
            "sign of the loser's odds": lambda: check_gradient(
                slope_in_winner, lambda w, p, g: -ALPHA * w * (GAMMA * p * g - LOSER / (1 - LOSER))
            ),
            "full slope at p -> 1": lambda: check_gradient_ends(-ALPHA, SLOPE_UNDECIDED, -ALPHA),
        },
        enumerate=enumerate_values,
        properties=(weight_agrees_with_mpmath, torch_gradient_agrees_with_mpmath, weight_falls_in_the_margin),
        sharpens=True,
    ),
)
