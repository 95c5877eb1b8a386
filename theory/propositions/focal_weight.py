"""DRDO's focal weight (1 - p_w)^gamma: its value and gradient where the policy is wrong, undecided and right.

p = p_w = pi(y_w) / (pi(y_w) + pi(y_l)), W = (1 - p)^gamma, g = log(pi(y_w) / (1 - pi(y_l))) <= 0. The gradient flows
through W, so the preference term T = -alpha W g has slope -alpha W (1 - gamma p g) in log pi(y_w): never less steep
than the -alpha W of a detached weight, and steeper the less likely the winner is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import algebra, losses
from theory.algebra import simplify, vanishes
from theory.claim import Claim, require

ALPHA, GAMMA = sp.symbols("alpha gamma", positive=True)
WINNER, LOSER = sp.symbols("w x", positive=True)
"""pi(y_w) and pi(y_l)."""
P = WINNER / (WINNER + LOSER)

Formula = Callable[[sp.Expr, sp.Expr], sp.Expr]
"""(p, gamma) -> weight."""
Ends = tuple[sp.Expr, sp.Expr, sp.Expr]
"""At p -> 0, p = 1/2 and p -> 1."""
K, KEPT = sp.symbols("k c", positive=True)
Path = tuple[sp.Expr, sp.Expr]
"""(log pi(y_w), log pi(y_l)) as functions of k -> infinity."""
TOWARDS_WRONG: Path = (-sp.log(K), -sp.log(2))
TOWARDS_RIGHT: Path = (-sp.log(2), -sp.log(K))


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


def _limits(gamma: Any = GAMMA) -> tuple[Ends, Ends]:
    """W and dW / d(log pi(y_w) - log pi(y_l))."""
    return _at_ends(weight(gamma)), _at_ends(in_log(weight(gamma), WINNER))


def _at_ends(expression: sp.Expr) -> Ends:
    middle = simplify(expression.subs(WINNER, LOSER))
    odds = sp.Symbol("o", positive=True)  # p / (1 - p); only the ratio of the probabilities enters
    by_odds = simplify(expression.subs(WINNER, odds * LOSER))
    return algebra.limit(by_odds, odds, 0, "+"), middle, algebra.limit(by_odds, odds, sp.oo)


def check_weight(formula: Formula) -> None:
    """W = (1 - p)^gamma and dW/dz = -gamma p W, z = log pi(y_w) - log pi(y_l); the slope is steepest at
    p = 1 / (1 + gamma)."""
    require(algebra.simplify_by_rules(weight() / formula(P, GAMMA)) == 1, "the weight is another one")
    slope = -GAMMA * P * weight()
    for variable, sign in ((WINNER, 1), (LOSER, -1)):
        require(vanishes(in_log(weight(), variable) - sign * slope), "another slope")
    p = sp.Symbol("p", positive=True)
    steepest = sp.diff(sp.log(GAMMA * p * (1 - p) ** GAMMA), p)
    require(vanishes(steepest - (1 / p - GAMMA / (1 - p))), "another curvature")
    require(vanishes(steepest.subs(p, 1 / (1 + GAMMA))), "steepest elsewhere")


def check_ends(values: Ends, slopes: Ends, gamma: Any = GAMMA) -> None:
    """Value and slope of W at p -> 0, p = 1/2, p -> 1."""
    for found, claimed in zip(_limits(gamma), (values, slopes), strict=True):
        for at, a, b in zip(("p -> 0", "p = 1/2", "p -> 1"), found, claimed, strict=True):
            require(vanishes(a - b), f"{a} at {at}, not {b}")


def check_gradient(in_winner: Callable[[Any, Any, Any], Any], in_loser: Callable[[Any, Any, Any], Any]) -> None:
    """dT/dlog pi(y_w) and dT/dlog pi(y_l), as functions of (W, p, g)."""
    g = sp.log(WINNER) - sp.log(1 - LOSER)
    for variable, formula in ((WINNER, in_winner), (LOSER, in_loser)):
        slope = in_log(preference_term(), variable)
        require(vanishes(slope - formula(weight(), P, g)), f"another slope in log pi of {variable}")


def slope_in_winner(w: Any, p: Any, g: Any) -> Any:
    """-alpha W (1 - gamma p g)."""
    return -ALPHA * w * (1 - GAMMA * p * g)


def slope_in_loser(w: Any, p: Any, g: Any) -> Any:
    """-alpha W (gamma p g + pi(y_l) / (1 - pi(y_l)))."""
    return -ALPHA * w * (GAMMA * p * g + LOSER / (1 - LOSER))


def check_gradient_middle(undecided: Any) -> None:
    """dT/dlog pi(y_w) at p = 1/2."""
    slope = in_log(preference_term(), WINNER)
    require(vanishes(slope.subs(WINNER, LOSER) - undecided), "another slope at p = 1/2")


def check_bounds() -> None:
    """log pi(y_w) <= g <= 0. So with pi(y_l) >= c, p |g| <= pi(y_w) |log pi(y_w)| / c -> 0 with p, and with
    pi(y_w) >= c, |g| <= |log c| while W -> 0 as p -> 1: in either case the limit of the slope is that of -alpha W."""
    rest = sp.Symbol("m", nonnegative=True)
    g = (sp.log(WINNER) - sp.log(1 - LOSER)).subs(LOSER, 1 - WINNER - rest)
    require((1 - sp.exp(g)).simplify().is_nonnegative, "g may be positive")
    require(algebra.limit(-WINNER * sp.log(WINNER) / KEPT, WINNER, 0, "+") == 0, "p g need not vanish with p")
    require(sp.factor(P.subs(LOSER, KEPT + rest) - WINNER / KEPT).is_nonpositive, "p exceeds pi(y_w) / c")


def check_gradient_along(path: Path, limit: Any, gamma: int = 2) -> None:
    """dT/dlog pi(y_w) along a path of policies tends to the limit.

    Args:
        path: of the pair's log-probabilities.
        limit: claimed.
        gamma: focal exponent.
    """
    chosen, rejected = path
    p = 1 / (1 + sp.exp(rejected - chosen))
    w = losses.focal_weight(chosen, rejected, gamma=gamma)
    slope = slope_in_winner(w, p, chosen - sp.log(1 - sp.exp(rejected))).subs(GAMMA, gamma)
    small = sp.Symbol("x", positive=True)  # 1 / k
    terms = sp.Add.make_args(sp.expand(sp.cancel(sp.expand_log(slope.subs(K, 1 / small)))))
    found = sum(algebra.limit(term, small, 0, "+") for term in terms)
    require(vanishes(found - limit), f"the slope tends to {found}, not to {limit}")


HALF = sp.Rational(1, 2)
SLOPE_UNDECIDED = -ALPHA * HALF**GAMMA * (1 - GAMMA * HALF * (sp.log(LOSER) - sp.log(1 - LOSER)))


def prove() -> None:
    check_weight(lambda p, gamma: (1 - p) ** gamma)
    check_ends((1, HALF**GAMMA, 0), (0, -GAMMA * HALF ** (GAMMA + 1), 0))
    check_gradient(slope_in_winner, slope_in_loser)
    check_gradient_middle(SLOPE_UNDECIDED)
    check_bounds()
    for gamma in (1, 2, 3):
        check_gradient_along(TOWARDS_WRONG, -ALPHA, gamma)
        check_gradient_along(TOWARDS_RIGHT, 0, gamma)


def enumerate_values(thorough: bool) -> str:
    """W at every p = i / n, integer gamma, in rational arithmetic."""
    largest, count = (20 if thorough else 8), 0
    for n in range(2, largest + 1):
        for i in range(1, n):
            for gamma in range(4):
                value = losses.focal_weight(sp.log(i), sp.log(n - i), gamma=gamma)
                exact = sp.Rational(n - i, n) ** gamma
                require(vanishes(value - exact), f"W = {value} at p = {i}/{n}, gamma = {gamma}")
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
    require(algebra.limit(leading, k, sp.oo) == -sp.oo, "the slope tends to 0")
    gap = sp.N(along.subs(k, 5) - leading.subs(k, 5), 30)
    require(bool(abs(gap) < sp.Float("1e-20")), "not the slope along that path")
    return "pi(y_w) = e^(-k^3), pi(y_l) = pi(y_w)/k, gamma = 2: p -> 1, but the slope in log pi(y_w) -> -infinity"


LOSER_FASTER: Path = (-K - sp.log(K), -K)
"""pi(y_l) = e^-k, pi(y_w) = pi(y_l) / k: p -> 0 with both."""
WINNER_FASTER: Path = (sp.log(K) - K**4, -(K**4))
"""pi(y_l) = e^(-k^4), pi(y_w) = k pi(y_l): p -> 1 while both vanish."""


def _loser_vanishes() -> str:
    check_gradient_along(LOSER_FASTER, -3 * ALPHA)
    return "pi(y_l) = e^-k, pi(y_w) = pi(y_l)/k, gamma = 2: p -> 0, but the slope in log pi(y_w) -> -3 alpha"


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
            "1/2, 1; steepest at p_w = 1/(1 + gamma). The preference term's slope in log pi(y_w) is "
            "-alpha 2^-gamma (1 - gamma g/2) at 1/2; it tends to -alpha as p_w -> 0 with pi(y_l) kept away from 0, and "
            "to 0 as p_w -> 1 with pi(y_w) kept away from 0; along other paths these limits are others."
        ),
        formula=r"\tfrac{\partial T}{\partial\log\pi(y_w)}=-\alpha(1-p)^\gamma(1-\gamma p\,g),\quad "
        r"g=\log\tfrac{\pi(y_w)}{1-\pi(y_l)}",
        domain="one pair, tabular; partial derivatives in log-probs, the other one held; no flow",
        losses=("focal_weight", "drdo"),
        assumptions={
            "gamma > 0": "the focal exponent is positive",
            "loser kept": "pi(y_l) stays away from 0 as p_w -> 0",
            "winner kept": "pi(y_w) stays away from 0 as p_w -> 1",
        },
        prove=prove,
        counterexamples={"gamma > 0": _gamma_zero, "loser kept": _loser_vanishes, "winner kept": _winner_vanishes},
        controls={
            "without gamma > 0": lambda: check_ends((1, 1, 0), (0, 0, 0), gamma=0),
            "without loser kept": lambda: check_gradient_along(LOSER_FASTER, -ALPHA),
            "without winner kept": lambda: check_gradient_along(WINNER_FASTER, 0),
            "p in place of 1 - p": lambda: check_weight(lambda p, gamma: p**gamma),
            "exponent off by one": lambda: check_weight(lambda p, gamma: (1 - p) ** (gamma + 1)),
            "value at 1/2": lambda: check_ends((1, HALF, 0), (0, -GAMMA * HALF ** (GAMMA + 1), 0)),
            "slope at 1/2": lambda: check_ends((1, HALF**GAMMA, 0), (0, -GAMMA * HALF**GAMMA, 0)),
            "detached weight": lambda: check_gradient(lambda w, p, g: -ALPHA * w, slope_in_loser),
            "sign of the loser's odds": lambda: check_gradient(
                slope_in_winner, lambda w, p, g: -ALPHA * w * (GAMMA * p * g - LOSER / (1 - LOSER))
            ),
            "full slope at p -> 1": lambda: check_gradient_along(TOWARDS_RIGHT, -ALPHA),
            "slope at 1/2 without g": lambda: check_gradient_middle(-ALPHA * HALF**GAMMA),
        },
        enumerate=enumerate_values,
        properties=(weight_agrees_with_mpmath, torch_gradient_agrees_with_mpmath, weight_falls_in_the_margin),
        sharpens=True,
    ),
)
