"""Which pairs DRDO's update weighs most: not the hardest, once the gradient flows through the focal weight.

p = pi(y_w) / (pi(y_w) + pi(y_l)), W = (1 - p)^gamma, G = log((1 - pi(y_l)) / pi(y_w)) >= 0. The preference term
T = alpha W G has slope -alpha S in log pi(y_w), S = W (1 + gamma p G): W from the logarithm, the rest from the weight.
W alone falls in p, from 1 on hopeless pairs to 0 on settled ones. With a winner of more than a few nats, as every text
is, the second part rules: S rises from p = 0 to a peak near 1 / (1 + gamma), and falls to 0 from there.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import losses
from theory.algebra import limit, simplify, vanishes
from theory.claim import CheckFailed, Claim, require

ALPHA, GAMMA = sp.symbols("alpha gamma", positive=True)
WINNER, LOSER = sp.symbols("w x", positive=True)
"""pi(y_w) and pi(y_l)."""
P, GAP = sp.symbols("p G", positive=True)
ORACLE, ESTIMATE = sp.symbols("delta d", real=True)

Size = Callable[[Any, Any, Any], Any]
"""(p, G, gamma) -> S, the slope in log pi(y_w) over -alpha."""
Loss = Callable[..., Any]
"""(oracle's margin, estimated margin, log pi(y_w), log pi(y_l), gamma) -> loss of a pair."""


def drdo(target: Any, estimate: Any, chosen: Any, rejected: Any, gamma: Any) -> Any:
    """DRDO with symbolic alpha."""
    return losses.drdo(target, estimate, chosen, rejected, alpha=ALPHA, gamma=gamma)


def detached(target: Any, estimate: Any, chosen: Any, rejected: Any, gamma: Any) -> Any:
    """The same with a weight that no gradient flows through: constant symbols in its place."""
    constant = {WINNER: sp.Symbol("w_", positive=True), LOSER: sp.Symbol("x_", positive=True)}
    weight = losses.focal_weight(chosen, rejected, gamma=gamma)
    return (target - estimate) ** 2 + ALPHA * weight.subs(constant) * (sp.log(1 - LOSER) - sp.log(WINNER))


def size(p: Any, gap: Any, gamma: Any) -> Any:
    """S = (1 - p)^gamma (1 + gamma p G)."""
    return (1 - p) ** gamma * (1 + gamma * p * gap)


def peak(gap: Any, gamma: Any) -> Any:
    """p at which S is largest for a given G > 1: (1 - 1/G) / (1 + gamma)."""
    return (1 - 1 / gap) / (1 + gamma)


# ---------------------------------------------------------------- checks


def check_slopes(formula: Size = size, loss: Loss = drdo, estimate: Any = ESTIMATE) -> None:
    """The whole gradient: 2 (d - delta) in the head's margin, -alpha S in log pi(y_w), and
    alpha W (gamma p G - pi(y_l) / (1 - pi(y_l))) in log pi(y_l); no part sees what belongs to another.

    Args:
        formula: S.
        loss: of a pair.
        estimate: the head's margin.
    """
    value = loss(ORACLE, estimate, sp.log(WINNER), sp.log(LOSER), GAMMA)
    p, gap, odds = WINNER / (WINNER + LOSER), sp.log(1 - LOSER) - sp.log(WINNER), LOSER / (1 - LOSER)
    require(vanishes(sp.diff(value, ESTIMATE) - 2 * (ESTIMATE - ORACLE)), "another slope of the head")
    slopes = [probability * sp.diff(value, probability) for probability in (WINNER, LOSER)]
    require(vanishes(slopes[0] + ALPHA * formula(p, gap, GAMMA)), "another slope in log pi(y_w)")
    other = (1 - p) ** GAMMA * (GAMMA * p * gap - odds)
    require(vanishes(slopes[1] - ALPHA * other), "another slope in log pi(y_l)")


def check_all_reached() -> None:
    """Every 0 < p < 1 and G > 0 is some policy's: pi(y_l) has the odds e^-G (1 - p) / p."""
    odds = sp.exp(-GAP) * (1 - P) / P
    loser = odds / (1 + odds)
    winner = (1 - loser) * sp.exp(-GAP)
    require(vanishes(winner / (winner + loser) - P), "another p")
    require(simplify(sp.exp(GAP) * winner / (1 - loser)) == 1, "another G")
    below_one = sp.together(1 - winner - loser) - (1 - sp.exp(-GAP)) / (1 + odds)
    require(vanishes(below_one), "the pair may have more than all mass")


def check_size(gap: sp.Expr, gamma: int, formula: Size = size, top: Callable[[Any, Any], Any] = peak) -> None:
    """For this G and gamma, S is 1 at p = 0, tends to 0 at p = 1, and falls throughout if G <= 1; else it rises to the
    peak and falls from there: dS/dp = gamma (1 - p)^(gamma - 1) (G - 1 - (1 + gamma) p G)."""
    value = formula(P, gap, gamma)
    require(value.subs(P, 0) == 1, "S is not 1 where the winner is hopeless")
    require(limit(value, P, 1, "-") == 0, "S does not vanish where the pair is settled")
    slope = sp.expand(sp.diff(value, P))
    factors = gamma * (1 - P) ** (gamma - 1) * (gap - 1 - (1 + gamma) * P * gap)
    require(sp.expand(slope - factors) == 0, "another slope of S in p")
    if gap > 1:
        best = top(gap, gamma)
        require(bool(0 < best < 1), f"the peak {best} is no probability")
        require(sp.expand(factors.subs(P, best)) == 0, f"the peak is not at {best}")


def check_uncertain(threshold: Callable[[Any], Any]) -> None:
    """S at p = 1/2 exceeds S at p = 0, that is 1, exactly where G is above the threshold."""
    half = sp.Rational(1, 2)
    level = size(half, threshold(GAMMA), GAMMA)
    require(vanishes(level - 1), "S at 1/2 is not 1 there")
    require(sp.diff(size(half, GAP, GAMMA), GAP).is_positive, "S does not rise with G")


def threshold(gamma: Any) -> Any:
    """2 (2^gamma - 1) / gamma nats; 3 for gamma = 2."""
    return 2 * (2**gamma - 1) / gamma


def prove() -> None:
    check_slopes()
    check_all_reached()
    for gap, gamma in product((sp.Rational(1, 2), sp.S.One, sp.Rational(3, 2), sp.Integer(40)), (1, 2, 3)):
        check_size(gap, gamma)
    check_uncertain(threshold)
    require(threshold(2) == 3, "another threshold for gamma = 2")
    require(limit(peak(GAP, GAMMA), GAP, sp.oo) == 1 / (1 + GAMMA), "the peak does not tend to 1 / (1 + gamma)")


def _pair(p: Any, gap: Any) -> tuple[Any, Any]:
    """log pi(y_w) and log pi(y_l) of the policy with these p and G; NumPy."""
    odds = np.exp(-gap) * (1 - p) / p
    return -gap - np.log1p(odds), np.log(odds) - np.log1p(odds)


def enumerate_sizes(thorough: bool) -> str:
    """p = i / n: the slope by a central difference of the loss itself, its largest on the grid next to the peak."""
    n, count, worst = (400 if thorough else 80), 0, 0.0
    p = np.arange(1, n) / n
    for gap, gamma in product((0.5, 1.0, 2.0, 8.0, 30.0), (1, 2, 3)):
        chosen, rejected = _pair(p, gap)
        step = 1e-5
        zero = np.zeros_like(p)
        ends = [losses.drdo(zero, zero, chosen + s, rejected, alpha=1.0, gamma=gamma) for s in (step, -step)]
        slope = -(ends[0] - ends[1]) / (2 * step)
        worst = max(worst, float(np.abs(slope - size(p, gap, gamma)).max() / (1 + gap)))
        best = max(peak(gap, gamma), 0.0)
        require(bool(abs(p[np.argmax(slope)] - best) <= 1 / n), f"the largest is at {p[np.argmax(slope)]}, not {best}")
        count += len(p)
    require(worst < 1e-6, f"the slopes are {worst:.1e} away")
    return f"{count} slopes by differences of the loss, G 0.5 ... 30 nats, gamma 1, 2, 3"


# ---------------------------------------------------------------- without each assumption


def _detached() -> str:
    value = detached(ORACLE, ESTIMATE, sp.log(WINNER), sp.log(LOSER), GAMMA)
    slope = WINNER * sp.diff(value, WINNER)
    require(not slope.has(WINNER), "the slope depends on more than the weight")
    return "weight detached: the slope in log pi(y_w) is -alpha (1 - p)^gamma, largest on the hardest pairs, whatever G"


def _check_gamma_zero() -> None:
    check_size(sp.Integer(2), 0)


def _gamma_zero() -> str:
    require(size(P, GAP, 0) == 1, "S depends on p")
    return "gamma = 0: S = 1 for every pair; nothing is tempered"


def _moving_gap(p: Any, gap: Any, gamma: Any) -> Any:
    """S along a fixed loser, pi(y_l) = 1/1000, with pi(y_w) rising: G falls as p rises."""
    loser = sp.Rational(1, 1000)
    return size(p, sp.log((1 - loser) / (loser * p / (1 - p))), gamma)


def _check_moving_gap() -> None:
    check_size(sp.Integer(2), 2, _moving_gap)


def _winner_moves() -> str:
    value = _moving_gap(P, GAP, 2)
    half, third = (float(value.subs(P, at)) for at in (sp.Rational(1, 2), sp.Rational(1, 10)))
    require(third > half, "it is largest near 1/2")
    return (
        f"pi(y_l) = 1/1000 fixed and pi(y_w) rising: G falls with p, S is {third:.2f} at p = 1/10 and {half:.2f} at 1/2"
    )


def _check_implicit() -> None:
    check_slopes(estimate=ESTIMATE + sp.log(WINNER) - sp.log(LOSER))


def _implicit() -> str:
    try:
        _check_implicit()
    except CheckFailed:
        return "estimates that contain log pi(y_w) - log pi(y_l): the square pulls on the policy too, towards delta"
    raise CheckFailed("the slopes are the same")


# ---------------------------------------------------------------- properties


@given(st.floats(0.01, 0.99), st.floats(0.05, 100), st.floats(0.1, 6), st.floats(0.01, 0.99))
def none_weighs_more_than_the_peak(p: float, gap: float, gamma: float, other: float) -> None:
    """NumPy: S <= S(peak); between the peak and 1 the surer pair weighs less."""
    best = max(peak(gap, gamma), 0.0)
    assert size(p, gap, gamma) <= size(best, gap, gamma) * (1 + 1e-12)
    near, far = sorted((max(p, best), max(other, best)))
    assert size(far, gap, gamma) <= size(near, gap, gamma) * (1 + 1e-12)


@given(st.floats(0.01, 0.99), st.floats(0.05, 100), st.floats(0.1, 6), st.floats(-3, 3), st.floats(-3, 3))
def torch_gradient_is_the_formula(p: float, gap: float, gamma: float, oracle: float, estimate: float) -> None:
    """torch: all three slopes of the loss at the policy with this p and G."""
    import torch

    chosen, rejected = _pair(p, gap)
    inputs = [torch.tensor(float(v), dtype=torch.float64, requires_grad=True) for v in (estimate, chosen, rejected)]
    target = torch.tensor(oracle, dtype=torch.float64)
    found = torch.autograd.grad(losses.drdo(target, *inputs, alpha=0.3, gamma=gamma), inputs)
    odds = np.exp(-gap) * (1 - p) / p
    weight = (1 - p) ** gamma
    claimed = [2 * (estimate - oracle), -0.3 * size(p, gap, gamma), 0.3 * weight * (gamma * p * gap - odds)]
    for slope, formula in zip(found, claimed, strict=True):
        assert abs(slope.item() - formula) <= 1e-9 * (1 + gap) * (1 + odds), (slope, formula)


CLAIMS = (
    Claim(
        id="drdo-gradient",
        source="[N], analysis of the gradient of eq 6; sharpened",
        statement=(
            "DRDO's slopes: 2 (d - delta) in the free head's margin; -alpha S in log pi(y_w), S = W (1 + gamma p G). "
            "For a given G = log((1 - pi(y_l))/pi(y_w)) settled pairs are tempered (S -> 0 as p -> 1), but hard pairs "
            "weigh most only if G <= 1: else S rises from 1 at p = 0 to a peak at (1 - 1/G)/(1 + gamma). For gamma = 2 "
            "undecided pairs outweigh hopeless ones iff G > 3 nats."
        ),
        formula=r"\partial_{\log\pi(y_w)}L=-\alpha(1-p)^\gamma(1+\gamma pG),\quad "
        r"\partial_{\log\pi(y_l)}L=\alpha(1-p)^\gamma\bigl(\gamma pG-\tfrac{\pi(y_l)}{1-\pi(y_l)}\bigr),\quad "
        r"p^*=\tfrac{1-1/G}{1+\gamma}",
        domain="one pair of any number of responses; slopes in the log-probs of the pair, as free variables",
        losses=("drdo", "focal_weight"),
        assumptions={
            "gradient through the weight": "the focal weight is not detached",
            "gamma > 0": "the focal exponent is positive",
            "G fixed": "pairs of one G are compared, not one pair along its training",
            "free head": "the reward estimates do not depend on the policy's log-probabilities",
        },
        prove=prove,
        counterexamples={
            "gradient through the weight": _detached,
            "gamma > 0": _gamma_zero,
            "G fixed": _winner_moves,
            "free head": _implicit,
        },
        controls={
            "without gradient through the weight": lambda: check_slopes(loss=detached),
            "without gamma > 0": _check_gamma_zero,
            "without G fixed": _check_moving_gap,
            "without free head": _check_implicit,
            "weight alone": lambda: check_slopes(lambda p, gap, gamma: (1 - p) ** gamma),
            "sign of the weight's part": lambda: check_slopes(lambda p, gap, gamma: size(p, -gap, gamma)),
            "peak at 1 / (1 + gamma)": lambda: check_size(sp.Integer(2), 2, top=lambda gap, gamma: 1 / sp.Integer(3)),
            "threshold 1": lambda: check_uncertain(lambda gamma: sp.Integer(1)),
            "reward term rewarded": lambda: check_slopes(
                loss=lambda t, e, c, x, gamma: drdo(t, e, c, x, gamma) - 2 * (t - e) ** 2
            ),
        },
        enumerate=enumerate_sizes,
        properties=(none_weighs_more_than_the_peak, torch_gradient_is_the_formula),
        sharpens=True,
    ),
)
