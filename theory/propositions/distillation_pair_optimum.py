"""Distillation on one pair with pi(y_w) held fixed: the loser's log-probability follows the reward margin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import losses
from theory.algebra import limit, vanishes
from theory.claim import Claim, require

BETA = sp.Symbol("beta", positive=True)
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, REWARD_W, REWARD_L = sp.symbols("l_w l_l ref_w ref_l r_w r_l", real=True)

Formula = Callable[[Any, Any, Any, Any, Any], Any]
"""(log pi(y_w), log pi_ref(y_w), log pi_ref(y_l), r_w - r_l, beta) -> log pi(y_l)."""


def pair_loss(chosen: Any, rejected: Any, ref_chosen: Any, ref_rejected: Any, reward_margin: Any, beta: Any) -> Any:
    """Distillation as a function of the four log-probabilities, nats; any backend."""
    margin = losses.logratio_margin(chosen, rejected, ref_chosen, ref_rejected)
    return losses.distillation(margin, reward_margin, beta=beta)


def interior_optimum(chosen: Any, ref_chosen: Any, ref_rejected: Any, reward_margin: Any, beta: Any) -> Any:
    """log pi(y_l) = log pi(y_w) + log(ref_l / ref_w) + (r_l - r_w) / beta."""
    return chosen + ref_rejected - ref_chosen - reward_margin / beta


DELTA = REWARD_W - REWARD_L


def _loss(delta: Any = DELTA) -> sp.Expr:
    return pair_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, delta, BETA)


# ---------------------------------------------------------------- checks


def check_optimum(formula: Formula, *, delta: Any = DELTA, free: Sequence[sp.Symbol] = (REJECTED,)) -> None:
    """L = beta^2 (log pi(y_l) - formula)^2: one optimum, value 0, and a loss that falls monotonically towards it.

    So a bound on log pi(y_l) below the formula is where the minimum over the bounded range lies: the clip.

    Args:
        formula: of log pi(y_l).
        delta: reward margin r_w - r_l.
        free: log-probabilities that are not held; the optimum is to be one in all of them.
    """
    point = formula(CHOSEN, REF_CHOSEN, REF_REJECTED, delta, BETA)
    square = BETA**2 * (REJECTED - point) ** 2
    require(sp.expand(_loss(delta) - square) == 0, "the loss is not the square around the formula")
    curvature = sp.expand(sp.hessian(_loss(delta), free).det())
    require(curvature.is_positive, f"more than one optimum: the Hessian's determinant is {curvature}")


def check_clipped(candidate: Callable[[sp.Expr, sp.Expr], sp.Expr], largest: int) -> int:
    """Exact optimality over pi(y_l) in (0, 1 - pi(y_w)]; returns the number of instances.

    Reward margins are beta log m with rational m, so that optimal probabilities are rational.

    Args:
        candidate: (interior optimum as a probability, 1 - pi(y_w)) -> pi(y_l).
        largest: denominators of pi(y_w) go up to this.
    """
    count = 0
    winners = sorted({sp.Rational(i, d) for d in range(2, largest + 1) for i in range(1, d)})
    odds = (sp.Rational(1, 3), sp.Integer(1), sp.Integer(2))
    for winner, ratio, m in product(winners, odds, odds):
        interior, cap = winner * ratio / m, 1 - winner
        loser = candidate(interior, cap)
        require(0 < loser <= cap, f"pi(y_l) = {loser} is not feasible: pi(y_w) = {winner}")
        # dL/dx = 2 beta^2 (x - x*): its sign is that of loser - interior, from the identity in check_optimum.
        kkt = loser == interior or (loser == cap and loser < interior)
        require(kkt, f"pi(y_l) = {loser} is not optimal: pi(y_w) = {winner}, ref_l/ref_w = {ratio}, m = {m}")
        count += 1
    return count


def check_probability_curvature(numerator: Callable[[sp.Expr], sp.Expr]) -> None:
    """p^2 d2L/dp^2 = 2 beta^2 (1 - log(p / p*)): convex in the probability only below e times the optimum."""
    p, best = sp.symbols("p p_star", positive=True)
    point = interior_optimum(CHOSEN, REF_CHOSEN, REF_REJECTED, REWARD_W - REWARD_L, BETA)
    centred = _loss().subs(REJECTED, point + sp.log(p) - sp.log(best))
    require(vanishes(sp.diff(centred, p, 2) * p**2 - numerator(sp.log(p) - sp.log(best))), "another curvature")


def prove() -> None:
    check_optimum(interior_optimum)
    check_clipped(min, 3)
    check_probability_curvature(lambda log_ratio: 2 * BETA**2 * (1 - log_ratio))


def enumerate_instances(thorough: bool) -> str:
    largest = 9 if thorough else 5
    count = check_clipped(min, largest)
    _check_against_clarabel()
    return f"{count} rational pairs, denominators <= {largest}; 4 exponential-cone programs"


def _check_against_clarabel() -> None:
    """An independent conic solver finds the same optimum, clip bound or not."""
    import cvxpy as cp

    for beta, reward_margin, winner, ratio in [
        (1, 1.0, 0.5, 1),
        (0.5, -1.0, 0.4, 1),
        (2, 3.0, 0.3, 4),
        (3, -9.0, 0.2, 1),
    ]:
        x = cp.Variable()
        margin = np.log(winner) + np.log(ratio) - x
        problem = cp.Problem(cp.Minimize(cp.square(reward_margin - beta * margin)), [cp.exp(x) <= 1 - winner])
        problem.solve(solver=cp.CLARABEL)
        ours = min(interior_optimum(np.log(winner), 0.0, np.log(ratio), reward_margin, beta), np.log1p(-winner))
        require(bool(abs(x.value - ours) < 1e-4), f"Clarabel finds {x.value}, the formula {ours}")


# ---------------------------------------------------------------- without each assumption


def _free_winner() -> str:
    """Any pair with the right ratio is optimal."""
    t = sp.Symbol("t", real=True)
    moved = _loss().subs({CHOSEN: CHOSEN + t, REJECTED: REJECTED + t}, simultaneous=True)
    require(sp.expand(moved - _loss()) == 0, "the loss fixes more than the ratio")
    return "pi(y_w) free, r_w = r_l, uniform reference: (pi(y_w), pi(y_l)) = (1/3, 1/3) and (1/4, 1/4) are both optimal"


def _infinite_reward() -> str:
    """The optimum leaves every bounded range."""
    margin = sp.Symbol("delta", positive=True)
    point = interior_optimum(CHOSEN, REF_CHOSEN, REF_REJECTED, margin, BETA)
    require(limit(point, margin, sp.oo) == -sp.oo, "the optimum stays finite")
    return "r_w - r_l -> infinity: log pi(y_l) -> -infinity, no optimum with pi(y_l) > 0"


# ---------------------------------------------------------------- properties

LOG_PROBABILITY = st.floats(-50, -1e-3)


@given(LOG_PROBABILITY, LOG_PROBABILITY, LOG_PROBABILITY, st.floats(-20, 20), st.floats(0.01, 100), st.data())
def no_feasible_point_is_better(
    chosen: float, ref_w: float, ref_l: float, reward_margin: float, beta: float, data: Any
) -> None:
    """NumPy: the clipped formula beats any other feasible log pi(y_l)."""
    cap = np.log(-np.expm1(chosen))
    best = min(interior_optimum(chosen, ref_w, ref_l, reward_margin, beta), cap)
    other = data.draw(st.floats(best - 20, cap))
    at, away = (pair_loss(chosen, x, ref_w, ref_l, reward_margin, beta) for x in (best, other))
    assert at <= away + 1e-9 * (1 + abs(away)), f"{at} at the formula, {away} at log pi(y_l) = {other}"


@given(LOG_PROBABILITY, LOG_PROBABILITY, LOG_PROBABILITY, st.floats(-20, 20), st.floats(0.01, 100))
def torch_gradient_vanishes(chosen: float, ref_w: float, ref_l: float, reward_margin: float, beta: float) -> None:
    """torch: the gradient is 0 at the formula, or points out of the simplex at the clip."""
    import torch

    cap = np.log(-np.expm1(chosen))
    best = interior_optimum(chosen, ref_w, ref_l, reward_margin, beta)
    w, rw, rl, delta = (torch.tensor(v, dtype=torch.float64) for v in (chosen, ref_w, ref_l, reward_margin))
    x = torch.tensor(min(best, cap), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(pair_loss(w, x, rw, rl, delta, beta), x)
    rounding = 1e-12 * beta**2 * (1 + abs(best) + abs(reward_margin) / beta)
    assert slope.item() <= rounding if best > cap else abs(slope.item()) <= rounding, slope


CLAIMS = (
    Claim(
        id="prop6",
        source="[F] A.9, Proposition 6",
        statement=(
            "On one pair with pi(y_w) held fixed, distillation has one optimum: the ratio of the log-ratios is the "
            "reward margin over beta, clipped at the mass that is left. The loss is a square in log pi(y_l); in the "
            "probability it is convex only up to e times the optimum."
        ),
        formula=(
            r"\log\pi(y_l)=\min\bigl\{\log\pi(y_w)+\log\tfrac{\pi_{\rm ref}(y_l)}{\pi_{\rm ref}(y_w)}"
            r"+\tfrac{r_l-r_w}\beta,\ \log(1-\pi(y_w))\bigr\}"
        ),
        domain="one pair among finitely many responses, pi(y_w) held; minimisers, no flow",
        losses=("logratio_margin", "distillation"),
        assumptions={"winner fixed": "pi(y_w) is held fixed", "finite rewards": "r_w - r_l is finite"},
        prove=prove,
        counterexamples={"winner fixed": _free_winner, "finite rewards": _infinite_reward},
        controls={
            "without winner fixed": lambda: check_optimum(interior_optimum, free=(REJECTED, CHOSEN)),
            "without finite rewards": lambda: check_optimum(interior_optimum, delta=sp.oo),
            "sign of the reward margin": lambda: check_optimum(
                lambda w, rw, rl, d, b: interior_optimum(w, rw, rl, -d, b)
            ),
            "sign of the reference ratio": lambda: check_optimum(
                lambda w, rw, rl, d, b: interior_optimum(w, rl, rw, d, b)
            ),
            "factor 1/beta missing": lambda: check_optimum(lambda w, rw, rl, d, b: interior_optimum(w, rw, rl, d, 1)),
            "clip missing": lambda: check_clipped(lambda interior, cap: interior, 5),
            "always at the clip": lambda: check_clipped(lambda interior, cap: cap, 5),
            "convex in the probability": lambda: check_probability_curvature(lambda log_ratio: 2 * BETA**2),
        },
        enumerate=enumerate_instances,
        properties=(no_feasible_point_is_better, torch_gradient_vanishes),
    ),
)
