"""p-DPO on one pair with pi(y_w) held fixed: where pi(y_l) ends up, and in which variable the loss is convex.

The paper's proof calls the loss convex in the probability pi(y_l). It is not, wherever the proposition applies; it is
convex in log pi(y_l), and that is enough for the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import losses
from theory.algebra import limit, simplify, vanishes
from theory.claim import Claim, require

BETA, ALPHA, SHARE, TAU = sp.symbols("beta alpha c tau", positive=True)
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = sp.symbols("l_w l_l ref_w ref_l", real=True)
EXCESS = sp.Symbol("q", nonnegative=True)
ODDS = sp.Symbol("o", positive=True)
"""beta / a - 1 for a KL weight a < beta."""

Formula = Callable[[Any, Any, Any, Any, Any], Any]
"""(log pi(y_w), log pi_ref(y_w), log pi_ref(y_l), beta, a) -> log pi(y_l)."""


def pair_loss(
    chosen: Any, rejected: Any, ref_chosen: Any, ref_rejected: Any, *, beta: Any, alpha: Any, share: Any
) -> Any:
    """p-DPO of one pair, its KL estimated on the pair's own completions, each counted with weight `share`.

    share = 1/2 averages the two completions, share = 1 adds them up: a = share * alpha is the weight that meets -u_l.
    """
    margin = losses.logratio_margin(chosen, rejected, ref_chosen, ref_rejected)
    kl = share * (losses.forward_kl(chosen - ref_chosen) + losses.forward_kl(rejected - ref_rejected))
    return losses.pessimistic(losses.dpo(margin, beta=beta), kl, alpha=alpha)


def interior_optimum(chosen: Any, ref_chosen: Any, ref_rejected: Any, beta: Any, a: Any) -> Any:
    """log pi(y_l) = log pi(y_w) + log(ref_l / ref_w) - (1 / beta) log(beta / a - 1), for 0 < a < beta."""
    log = sp.log if isinstance(a, sp.Expr) else np.log
    return chosen + ref_rejected - ref_chosen - log(beta / a - 1) / beta


def _loss() -> sp.Expr:
    return pair_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, beta=BETA, alpha=ALPHA, share=SHARE)


def _slope(variable: sp.Symbol, a: sp.Expr) -> sp.Expr:
    """dL/d(variable) with the KL weight a = share * alpha."""
    return sp.diff(_loss(), variable).subs(ALPHA, a / SHARE)


# ---------------------------------------------------------------- checks


def check_stationary(
    formula: Formula,
    kl_weight: Callable[[sp.Expr, sp.Expr], sp.Expr] = lambda c, al: c * al,
    free: Sequence[sp.Symbol] = (REJECTED,),
) -> None:
    """The loss is stationary at the formula, for every alpha, share and reference with 0 < a < beta.

    Args:
        formula: of log pi(y_l).
        kl_weight: (share, alpha) -> a.
        free: log-probabilities that are not held.
    """
    a = kl_weight(SHARE, ALPHA)
    point = formula(CHOSEN, REF_CHOSEN, REF_REJECTED, BETA, a)
    for variable in free:
        slope = sp.expand(sp.diff(_loss(), variable).subs(REJECTED, point))
        require(vanishes(slope), f"the loss has slope {slope} in {variable} at the formula")


def check_interior(a: sp.Expr) -> None:
    """With the KL weight a, the slope in log pi(y_l) goes from negative to positive: there is an interior optimum."""
    slope = _slope(REJECTED, a).subs({CHOSEN: 0, REF_CHOSEN: 0, REF_REJECTED: 0})
    ends = [sp.factor(limit(slope, REJECTED, end)) for end in (-sp.oo, sp.oo)]
    require(ends[0].is_negative, f"the slope starts at {ends[0]}")
    require(ends[1].is_positive, f"the slope ends at {ends[1]}")


def check_convex_in_log_probability(free: Sequence[sp.Symbol] = (REJECTED,)) -> None:
    """d2L/d(log pi(y_l))^2 = beta^2 E / (1 + E)^2 > 0 with E = exp(beta Delta).

    Args:
        free: log-probabilities that are not held; the loss is to be strictly convex in all of them.
    """
    e = sp.exp(BETA * ((CHOSEN - REF_CHOSEN) - (REJECTED - REF_REJECTED)))
    curvature = BETA**2 * e / (1 + e) ** 2
    require(vanishes(sp.diff(_loss(), REJECTED, 2) - curvature), "unexpected curvature")
    require(curvature.is_positive, "the curvature is not positive")
    odds = sp.Symbol("E", positive=True)
    chosen = REF_CHOSEN + REJECTED - REF_REJECTED + sp.log(odds) / BETA
    determinant = sp.factor(sp.expand(sp.hessian(_loss(), free).det().subs(CHOSEN, chosen)))
    require(determinant.is_positive, f"the Hessian's determinant is {determinant}")


def check_clipped(candidate: Callable[[Fraction, Fraction, Fraction, int, Fraction], Fraction], largest: int) -> int:
    """KKT conditions of min L over pi(y_l) in (0, 1 - pi(y_w)], in exact rational arithmetic.

    For a = beta / (1 + m^beta) and integer beta everything is rational. Returns the number of instances.

    Args:
        candidate: (pi(y_w), ref_l / ref_w, m, beta, a) -> pi(y_l).
        largest: denominators of pi(y_w) go up to this.
    """
    count = 0
    for beta, winner, ratio, m in _rational_instances(largest):
        a = Fraction(beta) / (1 + m**beta)
        loser, cap = candidate(winner, ratio, m, beta, a), 1 - winner
        require(0 < loser <= cap, f"pi(y_l) = {loser} is not feasible: pi(y_w) = {winner}")
        slope = _rational_slope(beta)(winner, loser, ratio, a)
        kkt = slope == 0 or (loser == cap and slope < 0)
        require(kkt, f"pi(y_l) = {loser} is not optimal: beta = {beta}, pi(y_w) = {winner}, ref_l/ref_w = {ratio}")
        count += 1
    return count


def clipped_optimum(winner: Fraction, ratio: Fraction, m: Fraction, beta: int, a: Fraction) -> Fraction:
    """The claim's formula in probabilities: (beta / a - 1)^(1 / beta) = m."""
    return min(winner * ratio / m, 1 - winner)


def _rational_instances(largest: int) -> Iterator[tuple[int, Fraction, Fraction, Fraction]]:
    winners = sorted({Fraction(i, d) for d in range(2, largest + 1) for i in range(1, d)})
    ratios = (Fraction(1, 3), Fraction(1), Fraction(2))
    return product((1, 2, 3), winners, ratios, (Fraction(1, 2), Fraction(1), Fraction(3)))


@cache
def _rational_slope(beta: int) -> Callable[..., Fraction]:
    """dL/d log pi(y_l) as a rational function of (pi(y_w), pi(y_l), ref_l / ref_w, a)."""
    w, x, ratio, a = sp.symbols("w x r a", positive=True)
    slope = _slope(REJECTED, a).subs(BETA, beta)
    slope = slope.subs({CHOSEN: sp.log(w), REJECTED: sp.log(x), REF_CHOSEN: 0, REF_REJECTED: sp.log(ratio)})
    function: Callable[..., Fraction] = sp.lambdify((w, x, ratio, a), simplify(slope), modules=[{}])
    return function


def check_below_optimum_is_downhill() -> None:
    """Left of the interior optimum, at distance t, the slope is -a (beta - a)(e^(beta t) - 1) / (..) <= 0.

    So where the optimum lies beyond log(1 - pi(y_w)), the loss falls all the way up to that bound: the clip.
    """
    a, gap, t = sp.symbols("a g t", positive=True)  # beta = a + gap
    point = interior_optimum(CHOSEN, REF_CHOSEN, REF_REJECTED, BETA, a) - t
    slope = sp.expand(_slope(REJECTED, a).subs(REJECTED, point)).subs(BETA, a + gap)
    growth = sp.Symbol("G", positive=True)  # e^(beta t) - 1
    slope = slope.subs(t, sp.log(1 + growth) / (a + gap))
    closed = -a * gap * growth / (a + gap * (1 + growth))
    require(vanishes(slope - closed), "unexpected slope left of the optimum")
    require(closed.is_negative, "the slope left of the optimum is not negative")


def check_heavy_weight_binds(weight: sp.Expr) -> None:
    """With a >= beta the loss falls in log pi(y_l) everywhere, so no interior optimum exists."""
    e = sp.Symbol("E", positive=True)  # exp(beta Delta)
    margin = losses.logratio_margin(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
    slope = simplify(_slope(REJECTED, weight) - (BETA / (1 + sp.exp(BETA * margin)) - weight))
    require(slope == 0, "unexpected slope in log pi(y_l)")
    require(sp.factor(BETA / (1 + e) - weight).is_negative, "the slope is not negative for every margin")


def check_fixing_the_loser() -> None:
    """With pi(y_l) fixed instead, dL/d log pi(y_w) = -beta sigma(-beta Delta) - a < 0: the clip always binds."""
    a = sp.Symbol("a", positive=True)
    margin = losses.logratio_margin(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
    closed = -BETA / (1 + sp.exp(BETA * margin)) - a
    require(vanishes(_slope(CHOSEN, a) - closed), "unexpected slope in log pi(y_w)")
    require(closed.is_negative, "the slope in log pi(y_w) is not negative")


def check_ipo_ratio(margin_at_optimum: sp.Expr) -> None:
    """IPO's optimum 1 / (2 tau) is the same margin, for tau > 0 exactly where a < beta / 2."""
    margin = sp.Symbol("Delta", real=True)
    ipo = losses.ipo(margin, tau=TAU)
    best = sp.solve(sp.diff(ipo, margin), margin)
    require(best == [1 / (2 * TAU)] and sp.diff(ipo, margin, 2) == 2, "IPO has another optimum")
    a, gap = sp.symbols("a g", positive=True)
    matched = margin_at_optimum.subs(ALPHA, a / SHARE)  # = 1 / (2 tau)
    require(vanishes(sp.exp(BETA * matched) - (BETA / a - 1)), "another ratio than IPO's")
    require(simplify((BETA / a - 1).subs(BETA, 2 * a + gap) - 1).is_positive, "no tau > 0 for a < beta / 2")
    require(vanishes(matched.subs(BETA, 2 * a)), "the margin is not 0 at a = beta / 2")


def _margin_at_optimum() -> sp.Expr:
    point = interior_optimum(CHOSEN, REF_CHOSEN, REF_REJECTED, BETA, SHARE * ALPHA)
    return sp.expand(losses.logratio_margin(CHOSEN, point, REF_CHOSEN, REF_REJECTED))


def prove() -> None:
    check_stationary(interior_optimum)
    check_interior(BETA / (1 + ODDS))
    check_convex_in_log_probability()
    check_below_optimum_is_downhill()
    check_heavy_weight_binds(BETA + EXCESS)
    check_fixing_the_loser()
    check_ipo_ratio(_margin_at_optimum())


def enumerate_instances(thorough: bool) -> str:
    largest = 9 if thorough else 5
    count = check_clipped(clipped_optimum, largest)
    _check_against_clarabel()
    return f"{count} rational pairs, denominators <= {largest}, beta in 1..3; 6 exponential-cone programs"


def _check_against_clarabel() -> None:
    """An independent conic solver finds the same optimum, clip bound or not."""
    import cvxpy as cp

    for beta, a, winner, ratio in [(1, 0.1, 0.5, 1), (2, 1.2, 0.3, 1), (0.1, 0.05, 0.2, 3), (0.5, 0.4, 0.6, 0.5),
                                   (1, 2, 0.4, 1), (3, 0.01, 0.9, 0.1)]:  # fmt: skip
        x = cp.Variable()
        margin = np.log(winner) + np.log(ratio) - x
        problem = cp.Problem(cp.Minimize(cp.logistic(-beta * margin) - a * x), [cp.exp(x) <= 1 - winner])
        problem.solve(solver=cp.CLARABEL)
        cap = np.log1p(-winner)
        ours = min(interior_optimum(np.log(winner), 0.0, np.log(ratio), beta, a), cap) if a < beta else cap
        require(bool(abs(x.value - ours) < 1e-3), f"Clarabel finds {x.value}, the formula {ours}")
        x.value = np.float64(ours)
        require(bool(problem.objective.value < problem.value + 1e-6), f"Clarabel does better than {ours}")


# ---------------------------------------------------------------- without each assumption


def _free_winner() -> str:
    """At the formula's point the loss still falls in log pi(y_w), at rate 2a."""
    a = sp.Symbol("a", positive=True)
    point = interior_optimum(CHOSEN, REF_CHOSEN, REF_REJECTED, BETA, a)
    slope = simplify(sp.expand(_slope(CHOSEN, a).subs(REJECTED, point)))
    require(slope == -2 * a, "the joint loss is stationary")
    return "pi(y_w) free: dL/dlog pi(y_w) = -2a at the formula's point, so the pair drifts up to the simplex boundary"


def _weight_too_large() -> str:
    slope = simplify(_slope(REJECTED, sp.Integer(1)).subs({BETA: 1, CHOSEN: 0, REF_CHOSEN: 0, REF_REJECTED: 0}))
    require(vanishes(slope + 1 / (1 + sp.exp(REJECTED))), "unexpected slope at a = beta = 1")
    require((-1 / (1 + sp.exp(REJECTED))).is_negative, "the slope has a zero")
    return "a = beta = 1: dL/dlog pi(y_l) = -1/(1 + pi(y_l)/pi(y_w)) < 0 everywhere, no interior optimum"


def _no_penalty() -> str:
    slope = sp.diff(_loss(), REJECTED).subs(ALPHA, 0)
    require(simplify(slope).is_positive, "DPO alone has a stationary point")
    at = {ALPHA: 0, BETA: 1, CHOSEN: 0, REF_CHOSEN: 0, REF_REJECTED: 0}
    require(limit(_loss().subs(at), REJECTED, -sp.oo) == 0, "the infimum is not 0")
    return "a = 0 (DPO): the loss rises in log pi(y_l) everywhere; its infimum 0 is at pi(y_l) = 0"


# ---------------------------------------------------------------- properties

LOG_PROBABILITY = st.floats(-50, -1e-3)


@given(LOG_PROBABILITY, LOG_PROBABILITY, LOG_PROBABILITY, st.floats(0.01, 100), st.floats(1e-3, 0.999), st.data())
def no_feasible_point_is_better(chosen: float, ref_w: float, ref_l: float, beta: float, part: float, data: Any) -> None:
    """NumPy: the clipped formula beats any other feasible log pi(y_l)."""
    cap = np.log(-np.expm1(chosen))
    best = min(interior_optimum(chosen, ref_w, ref_l, beta, part * beta), cap)
    other = data.draw(st.floats(best - 20, cap))
    at, away = (pair_loss(chosen, x, ref_w, ref_l, beta=beta, alpha=2 * part * beta, share=0.5) for x in (best, other))
    assert at <= away + 1e-9 * (1 + abs(away)), f"{at} at the formula, {away} at log pi(y_l) = {other}"


@given(LOG_PROBABILITY, LOG_PROBABILITY, LOG_PROBABILITY, st.floats(0.01, 100), st.floats(1e-3, 0.999))
def torch_gradient_vanishes(chosen: float, ref_w: float, ref_l: float, beta: float, part: float) -> None:
    """torch: the gradient that training would follow is 0 at the formula, or points out of the simplex at the clip."""
    import torch

    cap = np.log(-np.expm1(chosen))
    best = interior_optimum(chosen, ref_w, ref_l, beta, part * beta)
    w, rw, rl = (torch.tensor(v, dtype=torch.float64) for v in (chosen, ref_w, ref_l))
    x = torch.tensor(min(best, cap), dtype=torch.float64, requires_grad=True)
    loss = pair_loss(w, x, rw, rl, beta=beta, alpha=part * beta, share=1)
    (slope,) = torch.autograd.grad(loss, x)
    if best <= cap:
        assert abs(slope.item()) <= 1e-9 * beta * (1 + beta), slope
    else:
        assert slope.item() <= 1e-12 * beta, slope


# ---------------------------------------------------------------- the printed proof's convexity

A, P, KAPPA = sp.symbols("a p kappa", positive=True)
S = sp.Symbol("s", positive=True)


def probability_curvature() -> sp.Expr:
    """d2L/dp2 with p = pi(y_l), kappa = pi(y_w) ref_l / ref_w, so that exp(-beta Delta) = (p / kappa)^beta."""
    at = {CHOSEN: sp.log(KAPPA), REJECTED: sp.log(P), REF_CHOSEN: 0, REF_REJECTED: 0}
    return sp.diff(_loss().subs(ALPHA, A / SHARE).subs(at), P, 2)


def check_curvature(numerator: sp.Expr) -> None:
    """p^2 L''(p) equals the given polynomial in s = sigma(-beta Delta)."""
    exact = probability_curvature() * P**2
    by_s = numerator.subs(S, 1 / (1 + (KAPPA / P) ** BETA))
    e = sp.Symbol("E", positive=True)
    difference = sp.powsimp(sp.expand_power_base(sp.powdenest(exact - by_s, force=True), force=True), force=True)
    difference = difference.subs(P, KAPPA * e ** (1 / BETA))  # E = exp(-beta Delta)
    require(vanishes(sp.powsimp(sp.expand_power_base(difference, force=True), force=True)), "another curvature")


NUMERATOR = A - BETA * S + BETA**2 * S * (1 - S)


def check_convex_iff_heavy(numerator: sp.Expr) -> None:
    """Over p > 0 (s in (0, 1)) the curvature is >= 0 exactly when a >= beta.

    It is concave in s, a at s = 0 and a - beta at s = 1: non-negative ends decide, and a < beta makes it negative
    for s near 1. At the optimum, s = a / beta, it is a (beta - a) > 0, so a local test there sees nothing.
    """
    require(sp.diff(numerator, S, 2) == -2 * BETA**2, "not concave in s")
    require(sp.expand(numerator.subs(S, 0) - A) == 0, "wrong at s = 0")
    require(sp.expand(numerator.subs(S, 1) - (A - BETA)) == 0, "wrong at s = 1")
    require(sp.expand(numerator.subs(S, A / BETA) - A * (BETA - A)) == 0, "wrong at the optimum")


def prove_convexity() -> None:
    check_convex_in_log_probability()
    check_curvature(NUMERATOR)
    check_convex_iff_heavy(NUMERATOR)


def convex_in_probability_fails() -> str | None:
    """Smallest equal-weight instance, in an arm count and a = 1/m, where L is concave at a feasible pi(y_l)."""
    for beta, arms in product((1, 2), range(2, 6)):
        curvature = simplify(probability_curvature().subs(BETA, beta))
        for m, i, j in product(range(2, 6), range(1, arms), range(1, arms)):
            if i + j >= arms:  # strictly inside, so that a neighbourhood is feasible
                continue
            value = curvature.subs({A: sp.Rational(1, m), KAPPA: sp.Rational(i, arms), P: sp.Rational(j, arms)})
            if value < 0:
                return (
                    f"uniform reference over {arms} responses, beta = {beta}, a = 1/{m} < beta, "
                    f"pi(y_w) = {i}/{arms}: d2L/dpi(y_l)2 = {value} < 0 at pi(y_l) = {j}/{arms}"
                )
    return None


def check_convex_for(numerator: sp.Expr, beta: sp.Expr, a: sp.Expr) -> None:
    """The curvature is non-negative for every s in (0, 1); refutes "convex for beta >= 1" too."""
    low = sp.minimum(numerator.subs({BETA: beta, A: a}), S, sp.Interval(0, 1))
    require(low >= 0, f"negative curvature {low} at beta = {beta}, a = {a}")


def _both_free() -> str:
    t = sp.Symbol("t", real=True)
    moved = _loss().subs({CHOSEN: CHOSEN + t, REJECTED: REJECTED + t}, simultaneous=True)
    require(vanishes(sp.diff(moved, t, 2)), "strictly convex in both log-probabilities")
    return "moving both log-probabilities by t: the loss is affine in t, so not strictly convex"


@given(st.floats(0.01, 50), st.floats(1e-3, 3), st.floats(-5, 5), st.floats(0.01, 4), st.booleans())
def convex_where_claimed(beta: float, part: float, centre: float, width: float, in_log: bool) -> None:
    """NumPy: midpoint convexity in log pi(y_l) always, in pi(y_l) for a >= beta."""
    if in_log:
        left, right = centre - width, centre + width
        middle = centre
    else:
        part = max(part, 1.0)
        p, q = np.exp(centre), np.exp(centre + width)
        left, right, middle = np.log(p), np.log(q), np.log((p + q) / 2)
    values = [pair_loss(0.0, float(x), 0.0, 0.0, beta=beta, alpha=part * beta, share=1) for x in (left, right, middle)]
    assert values[2] <= (values[0] + values[1]) / 2 + 1e-9 * (1 + max(map(abs, values))), values


CLAIMS = (
    Claim(
        id="prop5",
        source="[F] A.8, Proposition 5",
        statement=(
            "On one pair with pi(y_w) held fixed and KL weight a on -log pi(y_l), 0 < a < beta, p-DPO has one optimum: "
            "a finite ratio to pi(y_w), clipped at the mass that is left. a is alpha/2 where the KL averages the two "
            "completions and alpha where it adds them up. For a >= beta the clip always binds, likewise with pi(y_l) "
            "fixed instead. IPO has the same ratio for one tau, which is positive exactly where a < beta/2."
        ),
        formula=(
            r"\log\pi(y_l)=\min\bigl\{\log\pi(y_w)+\log\tfrac{\pi_{\rm ref}(y_l)}{\pi_{\rm ref}(y_w)}"
            r"-\tfrac1\beta\log(\tfrac\beta a-1),\ \log(1-\pi(y_w))\bigr\}"
        ),
        domain="one pair among finitely many responses, pi(y_w) held; minimisers, no flow",
        losses=("logratio_margin", "bradley_terry", "dpo", "ipo", "forward_kl", "pessimistic"),
        assumptions={
            "winner fixed": "pi(y_w) is held fixed",
            "a < beta": "the KL weight on log pi(y_l) is below beta",
            "a > 0": "there is a KL term",
        },
        prove=prove,
        counterexamples={"winner fixed": _free_winner, "a < beta": _weight_too_large, "a > 0": _no_penalty},
        controls={
            "without winner fixed": lambda: check_stationary(interior_optimum, free=(REJECTED, CHOSEN)),
            "without a < beta": lambda: check_interior(BETA + EXCESS),
            "without a > 0": lambda: check_interior(sp.S.Zero),
            "sign of the reference ratio": lambda: check_stationary(
                lambda w, rw, rl, b, a: interior_optimum(w, rl, rw, b, a)
            ),
            "a = alpha whatever the share": lambda: check_stationary(interior_optimum, lambda c, alpha: alpha),
            "factor 1/beta missing": lambda: check_stationary(lambda w, rw, rl, b, a: w + rl - rw - sp.log(b / a - 1)),
            "clip missing": lambda: check_clipped(lambda w, r, m, b, a: w * r / m, 5),
            "always at the clip": lambda: check_clipped(lambda w, r, m, b, a: 1 - w, 5),
            "clip binds for every a": lambda: check_heavy_weight_binds(sp.Symbol("a", positive=True)),
            "IPO margin doubled": lambda: check_ipo_ratio(BETA * _margin_at_optimum() - 1),
        },
        enumerate=enumerate_instances,
        properties=(no_feasible_point_is_better, torch_gradient_vanishes),
        sharpens=True,
    ),
    Claim(
        id="prop5-convexity",
        source="[F] A.8, proof of Proposition 5",
        statement=(
            "With pi(y_w) fixed the pair loss is strictly convex in log pi(y_l). In the probability pi(y_l), where the "
            "proof has it, it is convex over all p > 0 only if a >= beta, that is, never where the proposition applies."
        ),
        formula=r"p^2\,\tfrac{d^2L}{dp^2}=a-\beta s+\beta^2 s(1-s),\quad s=\sigma(-\beta\Delta)",
        domain="one pair among finitely many responses, pi(y_w) held; a function of one probability, no flow",
        losses=("logratio_margin", "bradley_terry", "dpo", "forward_kl", "pessimistic"),
        assumptions={"winner fixed": "pi(y_w) is held fixed"},
        prove=prove_convexity,
        counterexamples={"winner fixed": _both_free},
        controls={
            "without winner fixed": lambda: check_convex_in_log_probability((REJECTED, CHOSEN)),
            "curvature without the chain rule's -beta s": lambda: check_curvature(NUMERATOR + BETA * S),
            "sign of the beta^2 term": lambda: check_curvature(NUMERATOR - 2 * BETA**2 * S * (1 - S)),
            "convex for beta >= 1": lambda: check_convex_for(NUMERATOR, sp.Integer(2), sp.Rational(1, 2)),
        },
        properties=(convex_where_claimed,),
        printed=convex_in_probability_fails,
    ),
)
