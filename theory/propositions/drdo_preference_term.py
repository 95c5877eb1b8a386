"""DRDO's preference term does not penalise the loser: its minimum is reached with all mass on y_l, or on neither.

log(pi(y_w) / (1 - pi(y_l))) is log P(y_w | not y_l): it compares the winner with everything but the loser. It is 0
wherever the pair holds all mass, however that is split. (An unlikelihood term would be log pi(y_w) + log(1 - pi(y_l)),
with the other sign of the second part.) w = pi(y_w), x = pi(y_l), m = the mass of all other responses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import algebra, losses
from theory.algebra import simplify, vanishes
from theory.claim import CheckFailed, Claim, require
from theory.strategies import log_policies

ALPHA, GAMMA = sp.symbols("alpha gamma", positive=True)
WINNER, LOSER, REST = sp.symbols("w x m", positive=True)
K = sp.Symbol("k", positive=True)
DELTA, ESTIMATE, LOG_W, LOG_X = sp.symbols("delta deltahat l_w l_x", real=True)

Term = Callable[[sp.Expr, sp.Expr, sp.Expr, sp.Expr], sp.Expr]
"""(pi(y_w), pi(y_l), alpha, gamma) -> preference term."""
Path = tuple[sp.Expr, sp.Expr]
"""(pi(y_w), pi(y_l)) as functions of k -> infinity."""

LOSER_TAKES_ALL: Path = (1 / K, 1 - 1 / K)
UNSEEN_TAKES_ALL: Path = (1 / K, 1 / K**2)


def unlikelihood_term(winner: sp.Expr, loser: sp.Expr, alpha: sp.Expr, gamma: sp.Expr) -> sp.Expr:
    """What would penalise the loser: -alpha W (log w + log(1 - x)). Used as a wrong variant."""
    weight = losses.focal_weight(sp.log(winner), sp.log(loser), gamma=gamma)
    return -alpha * weight * (sp.log(winner) + sp.log(1 - loser))


def log_ratio_term(winner: sp.Expr, loser: sp.Expr, alpha: sp.Expr, gamma: sp.Expr) -> sp.Expr:
    """-alpha W (log w - log x). Used as a wrong variant."""
    weight = losses.focal_weight(sp.log(winner), sp.log(loser), gamma=gamma)
    return -alpha * weight * (sp.log(winner) - sp.log(loser))


def preference_term(winner: sp.Expr, loser: sp.Expr, alpha: sp.Expr, gamma: sp.Expr) -> sp.Expr:
    """DRDO where the reward head reproduces the oracle's margin: what is left is -alpha W log(w / (1 - x))."""
    zero = sp.Integer(0)
    return losses.drdo(zero, zero, sp.log(winner), sp.log(loser), alpha=alpha, gamma=gamma)


# ---------------------------------------------------------------- checks


def check_bounded_below(term: Term) -> None:
    """term = alpha W log(1 + m / w) with W > 0: never negative, 0 exactly where m = 0."""
    gap = term(WINNER, LOSER, ALPHA, GAMMA).subs(LOSER, 1 - WINNER - REST)
    weight = losses.focal_weight(sp.log(WINNER), sp.log(1 - WINNER - REST), gamma=GAMMA)
    ratio = sp.exp(simplify(-gap / (ALPHA * weight)))
    require(vanishes(ratio - WINNER / (WINNER + REST)), "not log P(y_w | not y_l)")
    require((1 - WINNER / (WINNER + REST)).simplify().is_positive, "not below 0 with mass elsewhere")
    require(simplify(ratio.subs(REST, 0)) == 1, "not 0 where the pair holds all mass")


def check_infimum(term: Term, paths: Sequence[tuple[Path, int]]) -> None:
    """The term is never negative (`check_bounded_below`), and along each path, on which pi(y_w) -> 0, it tends to 0:
    that is its infimum.

    Args:
        term: under test.
        paths: and the gamma to go along each with.
    """
    check_bounded_below(term)
    for (winner, loser), gamma in paths:
        require(algebra.limit(winner, K, sp.oo) == 0, "the winner keeps mass")
        value = term(winner, loser, sp.Integer(1), sp.Integer(gamma))
        limit = algebra.limit(simplify(sp.expand_log(value, force=True)), K, sp.oo)
        require(limit == 0, f"the term tends to {limit} for gamma = {gamma}")


def check_reward_term(loss: Callable[..., sp.Expr]) -> None:
    """The loss is (delta - deltahat)^2 plus the preference term, into which no reward enters. So a head of its own that
    gives deltahat = delta leaves the preference term, whatever the policy does.

    Args:
        loss: as `losses.drdo`.
    """
    logps = LOG_W, LOG_X
    left = loss(DELTA, ESTIMATE, *logps, alpha=ALPHA, gamma=GAMMA)
    term = preference_term(sp.exp(LOG_W), sp.exp(LOG_X), ALPHA, GAMMA)
    require(sp.expand(left - (DELTA - ESTIMATE) ** 2 - term) == 0, "the reward term is another")
    defaults = loss(DELTA, ESTIMATE, *logps, alpha=0.1, gamma=2)
    require(loss(DELTA, ESTIMATE, *logps) == defaults, "other defaults than alpha = 0.1, gamma = 2")


def check_whole_loss(path: Path, estimate: Callable[[sp.Expr, sp.Expr], sp.Expr]) -> None:
    """Along the path the whole loss tends to 0, delta = 1, [N]'s alpha and gamma.

    Args:
        path: of the policy.
        estimate: (pi(y_w), pi(y_l)) -> deltahat.
    """
    winner, loser = path
    loss = losses.drdo(sp.S.One, estimate(winner, loser), sp.log(winner), sp.log(loser), alpha=sp.Rational(1, 10))
    limit = algebra.limit(simplify(sp.expand_log(loss, force=True)), K, sp.oo)
    require(limit == 0, f"the loss tends to {limit}")


def head_that_fits(winner: sp.Expr, loser: sp.Expr) -> sp.Expr:
    """A reward head of its own has the oracle's margin, whatever the policy."""
    return sp.S.One


def check_loser_slope(slope: Callable[[sp.Expr, sp.Expr, sp.Expr, sp.Expr], sp.Expr]) -> None:
    """dT/dlog pi(y_l) as a function of (W, p, g, x): with gamma = 0 it is -alpha x / (1 - x) < 0, so that descent
    *raises* the loser; with gamma > 0 it does so exactly where x / (1 - x) > gamma p |g|."""
    term = preference_term(WINNER, LOSER, ALPHA, GAMMA)
    weight = losses.focal_weight(sp.log(WINNER), sp.log(LOSER), gamma=GAMMA)
    p, g = WINNER / (WINNER + LOSER), sp.log(WINNER) - sp.log(1 - LOSER)
    require(vanishes(LOSER * sp.diff(term, LOSER) - slope(weight, p, g, LOSER)), "another slope")
    plain = preference_term(WINNER, LOSER, ALPHA, sp.Integer(0))
    raised = simplify(LOSER * sp.diff(plain, LOSER)).subs(LOSER, 1 - WINNER - REST)
    require(vanishes(raised + ALPHA * (1 - WINNER - REST) / (WINNER + REST)), "another slope at gamma = 0")


def loser_slope(weight: sp.Expr, p: sp.Expr, g: sp.Expr, x: sp.Expr) -> sp.Expr:
    """-alpha W (x / (1 - x) - gamma p |g|)."""
    return -ALPHA * weight * (x / (1 - x) + GAMMA * p * g)


Velocity = Callable[[float, float, float, float], float]
"""(pi(y_w), pi(y_l), dT/dlog pi(y_w), dT/dlog pi(y_l)) -> d log pi(y_l) / dt under descent on T."""


def with_winner_held(w: float, x: float, in_winner: float, in_loser: float) -> float:
    """Mass moves between y_l and the rest only, down the slope in log pi(y_l)."""
    return -in_loser


def in_logits(w: float, x: float, in_winner: float, in_loser: float) -> float:
    """Gradient flow on the logits z of winner, loser and one response that stands for the rest.

    With slopes g in log pi, dz = -(g - pi sum(g)), and d log pi = dz - sum_y pi(y) dz(y).
    """
    policy, slope = np.array([w, x, 1 - w - x]), np.array([in_winner, in_loser, 0.0])
    dz = -(slope - policy * slope.sum())
    return float(dz[1] - policy @ dz)


def policies(largest: int) -> Iterator[tuple[sp.Rational, sp.Rational]]:
    """(pi(y_w), pi(y_l)) with denominators n <= `largest`, and mass elsewhere."""
    for n in range(3, largest + 1):
        for i in range(1, n - 1):
            for j in range(1, n - i):
                yield sp.Rational(i, n), sp.Rational(j, n)


def check_feeding(velocity: Velocity, largest: int) -> tuple[int, int]:
    """pi(y_l) rises at every policy whose odds of y_l exceed gamma p_w |g|, and falls where they are below; gamma 2.

    Returns:
        Number of policies, and of those where it rises.
    """
    term = preference_term(WINNER, LOSER, sp.S.One, sp.Integer(2))
    slopes = [sp.lambdify((WINNER, LOSER), y * sp.diff(term, y), "math") for y in (WINNER, LOSER)]
    count = raised = 0
    for w, x in policies(largest):
        excess = float(x / (1 - x) - 2 * w / (w + x) * sp.log((1 - x) / w))
        moves = velocity(float(w), float(x), *(float(slope(float(w), float(x))) for slope in slopes))
        require(abs(excess) > 1e-9 and (moves > 0) == (excess > 0), f"pi(y_w) = {w}, pi(y_l) = {x}: rate {moves:.3g}")
        count, raised = count + 1, raised + (moves > 0)
    return count, raised


def prove() -> None:
    check_reward_term(losses.drdo)
    # Exactly 0, for every gamma, while the loser takes all mass.
    winner, loser = LOSER_TAKES_ALL
    at = simplify(sp.expand_log(preference_term(winner, loser, ALPHA, GAMMA), force=True))
    require(at == 0, f"the term is {at} while y_l takes all mass")
    check_infimum(preference_term, [(LOSER_TAKES_ALL, 2), *((UNSEEN_TAKES_ALL, gamma) for gamma in (1, 2, 3))])
    for path in (LOSER_TAKES_ALL, UNSEEN_TAKES_ALL):
        check_whole_loss(path, head_that_fits)
    check_loser_slope(loser_slope)
    check_feeding(with_winner_held, 4)


def enumerate_policies(thorough: bool) -> str:
    """Every policy over winner, loser and the rest with denominator n: the term is 0 iff the rest has no mass, else
    positive. Counts where descent moves mass from the rest to the loser (gamma = 2)."""
    largest, count = (12 if thorough else 6), 0
    for n in range(2, largest + 1):
        for i in range(1, n):
            for j in range(1, n - i + 1):
                w, x = sp.Rational(i, n), sp.Rational(j, n)
                value = simplify(preference_term(w, x, sp.Integer(1), sp.Integer(2)))
                require((value == 0) == (i + j == n), f"term {value} at pi(y_w) = {w}, pi(y_l) = {x}")
                require(value == 0 or value.is_positive, f"term {value} < 0")
                count += 1
    inside, raised = check_feeding(with_winner_held, largest)
    require(raised > 0, "descent never raises the loser")
    return f"{count} policies, denominators <= {largest}; of {inside} with mass elsewhere, {raised} feed the loser"


# ---------------------------------------------------------------- without each assumption


def _implicit_reward() -> str:
    """Reward estimates read off the policy, beta (log w - log x): the distillation part then fixes the ratio."""
    winner, loser = LOSER_TAKES_ALL
    estimate = sp.log(winner) - sp.log(loser)
    loss = losses.drdo(sp.Integer(0), estimate, sp.log(winner), sp.log(loser), alpha=sp.Rational(1, 10), gamma=2)
    require(algebra.limit(simplify(sp.expand_log(loss, force=True)), K, sp.oo) == sp.oo, "the loss stays bounded")
    return "estimate log pi(y_w) - log pi(y_l), delta = 0: the loss -> infinity as y_l takes all mass"


def _gamma_zero() -> str:
    winner, loser = UNSEEN_TAKES_ALL
    term = preference_term(winner, loser, sp.Integer(1), sp.Integer(0))
    require(algebra.limit(sp.expand_log(term, force=True), K, sp.oo) == sp.oo, "the term stays bounded")
    return "gamma = 0: with pi(y_w) = 1/k, pi(y_l) = 1/k^2 the term -> infinity; the leak to unseen responses is closed"


def _flow_in_logits() -> str:
    """The first policy, by denominator, at which y_l is to be fed and the flow on logits starves it."""
    term = preference_term(WINNER, LOSER, sp.S.One, sp.Integer(2))
    for w, x in policies(8):
        slopes = [float((y * sp.diff(term, y)).subs({WINNER: w, LOSER: x})) for y in (WINNER, LOSER)]
        held, moved = (rate(float(w), float(x), *slopes) for rate in (with_winner_held, in_logits))
        if held > 1e-6 and moved < -1e-6:
            return (
                f"gradient flow on logits, gamma = 2, pi = ({w}, {x}, {1 - w - x}): y_l's odds exceed gamma p_w |g|, "
                f"yet d log pi(y_l) / dt = {moved:.3f} alpha, because y_w takes mass"
            )
    raise CheckFailed("the flow on logits feeds the loser too")


# ---------------------------------------------------------------- properties


@given(log_policies(3), st.floats(0, 8))
def term_is_never_negative(policy: Any, gamma: float) -> None:
    """NumPy: over any policy on winner, loser and another response."""
    assert losses.drdo(0.0, 0.0, policy[0], policy[1], alpha=1.0, gamma=gamma) >= -1e-12


@given(st.floats(0.01, 0.99), st.floats(0, 8))
def any_split_of_the_pair_is_optimal(loser: float, gamma: float) -> None:
    """NumPy: with all mass on the pair the term is 0, whoever holds it."""
    value = losses.drdo(0.0, 0.0, np.log1p(-loser), np.log(loser), alpha=1.0, gamma=gamma)
    assert abs(value) <= 1e-12


@given(log_policies(3), st.floats(0, 4))
def torch_descent_raises_the_loser_where_claimed(policy: Any, gamma: float) -> None:
    """torch: the sign of the training gradient in log pi(y_l) is that of gamma p |g| - x / (1 - x)."""
    import torch

    chosen, rejected = (torch.tensor(float(v), dtype=torch.float64, requires_grad=True) for v in policy[:2])
    zero = torch.tensor(0.0, dtype=torch.float64)
    (slope,) = torch.autograd.grad(losses.drdo(zero, zero, chosen, rejected, alpha=1.0, gamma=gamma), rejected)
    w, x = np.exp(policy[:2])
    balance = gamma * w / (w + x) * abs(policy[0] - np.log1p(-x)) - x / (1 - x)
    if abs(balance) > 1e-9:
        assert np.sign(slope.item()) == np.sign(balance), (slope, balance)


CLAIMS = (
    Claim(
        id="drdo-degenerate",
        source="ours, on [N] eq 6",
        statement=(
            "DRDO's preference term is alpha W log(1 + m/pi(y_w)) >= 0, m the mass outside the pair, and 0 for every "
            "split of the pair when m = 0. So, with a reward head that fits, y_l taking all mass attains DRDO's "
            "minimum; for gamma > 0 all mass leaving the pair approaches it too. With pi(y_w) held, descent feeds y_l "
            "from the rest exactly where pi(y_l)'s odds exceed gamma p_w |g|; gradient flow on logits need not."
        ),
        formula=(
            r"(\pi(y_w),\pi(y_l))=(\tfrac1k,1-\tfrac1k):\ T=0;\qquad"
            r"(\pi(y_w),\pi(y_l))=(\tfrac1k,\tfrac1{k^2}):\ T\to 0"
        ),
        domain=(
            "one pair and any finite rest, tabular; minima over policies, and the slope in log pi(y_l) with pi(y_w) "
            "held, which is not the flow in logits"
        ),
        losses=("focal_weight", "drdo"),
        assumptions={
            "separate reward head": "reward estimates do not depend on the policy's log-probabilities",
            "gamma > 0": "the focal exponent is positive, for the leak to unseen responses",
            "winner held": "pi(y_w) is held fixed while mass moves between y_l and the rest",
        },
        prove=prove,
        counterexamples={
            "separate reward head": _implicit_reward,
            "gamma > 0": _gamma_zero,
            "winner held": _flow_in_logits,
        },
        controls={
            "without separate reward head": lambda: check_whole_loss(
                LOSER_TAKES_ALL, lambda w, x: sp.log(w) - sp.log(x)
            ),
            "without gamma > 0": lambda: check_infimum(preference_term, [(UNSEEN_TAKES_ALL, 0)]),
            "without winner held": lambda: check_feeding(in_logits, 6),
            "a reward term of the other sign": lambda: check_reward_term(
                lambda d, e, *logps, **weights: losses.drdo(d, e, *logps, **weights) - 2 * (d - e) ** 2
            ),
            "a reward term without the square": lambda: check_reward_term(
                lambda d, e, *logps, **weights: losses.drdo(d, e, *logps, **weights) - (d - e) ** 2 + sp.Abs(d - e)
            ),
            "the negated term": lambda: check_infimum(
                lambda *arguments: -preference_term(*arguments), [(LOSER_TAKES_ALL, 2)]
            ),
            "unlikelihood in its place": lambda: check_bounded_below(unlikelihood_term),
            "unlikelihood and the loser's mass": lambda: check_infimum(unlikelihood_term, [(LOSER_TAKES_ALL, 2)]),
            "log-ratio and the loser's mass": lambda: check_infimum(log_ratio_term, [(LOSER_TAKES_ALL, 2)]),
            "log-ratio and the unseen": lambda: check_infimum(log_ratio_term, [(UNSEEN_TAKES_ALL, 2)]),
            "a loser that stays": lambda: check_infimum(preference_term, [((1 / K, sp.Rational(1, 2)), 2)]),
            "slope without the odds": lambda: check_loser_slope(lambda w, p, g, x: -ALPHA * GAMMA * w * p * g),
            "sign of the odds": lambda: check_loser_slope(
                lambda w, p, g, x: -ALPHA * w * (GAMMA * p * g - x / (1 - x))
            ),
        },
        enumerate=enumerate_policies,
        properties=(
            term_is_never_negative,
            any_split_of_the_pair_is_optimal,
            torch_descent_raises_the_loser_where_claimed,
        ),
    ),
)
