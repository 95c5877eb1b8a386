"""Ties: a pair preferred either way half of the time has Bradley-Terry margin 0, and DPO leaves its ratio as it was.

[N] calls such pairs non-deterministic. Its Lemma 1a is printed with the policy's ratio tending to 0; what tends to 0
is the log of the ratio (relative to the reference's), the ratio itself to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import losses
from theory.algebra import limit, simplify, vanishes
from theory.claim import Claim, require

BETA, REF_RATIO = sp.symbols("beta rho_ref", positive=True)
MARGIN = sp.Symbol("d", real=True)
ODDS = sp.Symbol("o", positive=True)
"""P(y_w > y_l) / P(y_l > y_w): positive, so P = o / (1 + o) lies strictly between 0 and 1."""
P = ODDS / (1 + ODDS)
HALF = sp.Rational(1, 2)

Pairwise = Callable[[Any], Any]


def expected_loss(pairwise: Pairwise, margin: Any, p: Any) -> Any:
    """Mean of a pairwise loss when a share p of the labels says y_w > y_l. Any backend."""
    return p * pairwise(margin) + (1 - p) * pairwise(-margin)


def dpo(margin: Any) -> Any:
    """DPO with symbolic beta."""
    return losses.dpo(margin, beta=BETA)


# ---------------------------------------------------------------- checks


def check_minimiser(pairwise: Pairwise, margin: Callable[[sp.Expr], sp.Expr], beta: sp.Expr) -> None:
    """The mean loss has one minimiser, margin(odds): stationary, strictly convex; it tends to infinity on both sides,
    so every minimising sequence converges to the minimiser."""
    loss = expected_loss(pairwise, MARGIN, P)
    slope = sp.diff(loss, MARGIN)
    require(vanishes(slope.subs(MARGIN, margin(ODDS))), "not stationary")
    e = sp.exp(beta * MARGIN)
    require(vanishes(sp.diff(slope, MARGIN) - beta**2 * e / (1 + e) ** 2), "another curvature")
    require((beta**2 * e / (1 + e) ** 2).is_positive, "not strictly convex")
    # d loss = beta (sigma(beta d) - P): its ends are beta (1 - P) > 0 and -beta P < 0, so the loss grows linearly.
    require(vanishes(slope - beta * (e / (1 + e) - P)), "another slope")
    require((beta * (1 - P)).simplify().is_positive and (-beta * P).is_negative, "bounded on one side")


def check_tie(margin: Callable[[sp.Expr], sp.Expr], labels: sp.Expr = HALF) -> None:
    """The fit is `margin` for every odds; where a share `labels` of the labels says y > y', it is 0.

    Args:
        margin: odds -> the minimiser.
        labels: share of the labels that say y > y'.
    """
    check_minimiser(losses.bradley_terry, margin, sp.Integer(1))
    slope = sp.diff(expected_loss(losses.bradley_terry, MARGIN, labels), MARGIN)
    require(vanishes(slope.subs(MARGIN, 0)), f"margin 0 is no minimum where the labels' share is {labels}")


def check_policy_ratio(
    ratio: Callable[[sp.Expr], sp.Expr], labels: sp.Expr = HALF, reference: sp.Expr = REF_RATIO
) -> None:
    """The optimal pi(y_w) / pi(y_l), as a function of the reference's ratio.

    Args:
        ratio: under test.
        labels: share of the labels that say y_w > y_l.
        reference: pi_ref(y_w) / pi_ref(y_l).
    """
    check_minimiser(dpo, lambda odds: sp.log(odds) / BETA, BETA)
    best = ratio(reference)
    require(best.is_positive, f"the ratio {best} has an infinite loss")
    logp, ref_logp = sp.symbols("l_l ref_l", real=True)
    margin = losses.logratio_margin(logp + sp.log(best), logp, ref_logp + sp.log(reference), ref_logp)
    slope = sp.diff(expected_loss(dpo, MARGIN, labels), MARGIN).subs(MARGIN, sp.expand(margin))
    require(vanishes(slope), f"not stationary at ratio {best}")


def prove_margin() -> None:
    check_tie(sp.log)


def prove_ratio() -> None:
    check_policy_ratio(lambda reference: reference)
    check_policy_ratio(lambda reference: sp.Integer(1), reference=sp.Integer(1))


def enumerate_labels(thorough: bool) -> str:
    """k of n labels for y_w: the fitted margin is log(k / (n - k)), which is 0 only for a balanced sample."""
    largest = 30 if thorough else 12
    for n in range(2, largest + 1):
        for k in range(1, n):
            slope = sp.diff(expected_loss(losses.bradley_terry, MARGIN, sp.Rational(k, n)), MARGIN)
            require(slope.subs(MARGIN, sp.log(sp.Rational(k, n - k))) == 0, f"another margin for {k} of {n}")
            require((slope.subs(MARGIN, 0) == 0) == (2 * k == n), f"margin 0 for {k} of {n}")
    return f"every count of labels, n <= {largest}"


# ---------------------------------------------------------------- without each assumption


def _not_a_tie() -> str:
    slope = sp.diff(expected_loss(losses.bradley_terry, MARGIN, sp.Rational(3, 4)), MARGIN)
    require(slope.subs(MARGIN, 0) != 0 and slope.subs(MARGIN, sp.log(3)) == 0, "the margin is still 0")
    return "P = 3/4: the margin is log 3"


def _one_label() -> str:
    """An odd number of labels is never balanced; a single one has no finite fit at all."""
    slope = sp.diff(losses.bradley_terry(MARGIN), MARGIN)
    require(vanishes(slope + 1 / (1 + sp.exp(MARGIN))), "another slope")
    require((-1 / (1 + sp.exp(MARGIN))).is_negative, "a finite minimiser exists")
    return "a tie labelled once, y_w > y_l: the loss falls in the margin everywhere, the fit is +infinity"


def _not_a_tie_ratio() -> str:
    slope = sp.diff(expected_loss(dpo, MARGIN, sp.Rational(3, 4)), MARGIN)
    require(vanishes(slope.subs(MARGIN, sp.log(3) / BETA)), "another optimum")
    return "P = 3/4, beta = 1, indifferent reference: the ratio tends to 3"


def _biased_reference() -> str:
    three = sp.Integer(3)
    margin = losses.logratio_margin(sp.log(three), sp.Integer(0), sp.log(three), sp.Integer(0))
    slope = sp.diff(expected_loss(dpo, MARGIN, sp.Rational(1, 2)), MARGIN)
    require(margin == 0 and vanishes(slope.subs(MARGIN, margin)), "ratio 3 is not optimal")
    require(not vanishes(slope.subs(MARGIN, -sp.log(three))), "ratio 1 is optimal too")
    return "pi_ref(y_w) = 3 pi_ref(y_l): the ratio stays at 3 and does not tend to 1"


def ratio_to_zero_fails() -> str | None:
    """Smallest instance in which the mean loss does not fall as the ratio tends to 0: two responses suffice."""
    ratio = sp.Symbol("rho", positive=True)
    for arms in range(2, 5):
        loss = expected_loss(losses.bradley_terry, sp.log(ratio), sp.Rational(1, 2))  # beta = 1, uniform reference
        at_one, at_zero = simplify(loss.subs(ratio, 1)), limit(loss, ratio, 0, "+")
        if at_zero > at_one:
            return (
                f"{arms} responses, uniform reference, beta = 1, P = 1/2: the expected DPO loss is {at_one} at ratio 1 "
                "and tends to infinity as the ratio tends to 0"
            )
    return None


# ---------------------------------------------------------------- properties


@given(st.floats(0.01, 0.99), st.floats(0.05, 20), st.floats(-30, 30))
def no_margin_is_better(p: float, beta: float, other: float) -> None:
    """NumPy: logit(p) / beta minimises the mean DPO loss, for beta = 1 the mean Bradley-Terry loss."""
    best = np.log(p / (1 - p)) / beta
    for scale, pairwise in ((1.0, lambda d: losses.dpo(d, beta=beta)), (beta, losses.bradley_terry)):
        at, away = (expected_loss(pairwise, scale * d, p) for d in (best, other))
        assert at <= away + 1e-12 * (1 + away), (at, away)


@given(st.floats(-40, -0.01), st.floats(-40, -0.01), st.floats(-40, -0.01), st.floats(0.05, 20))
def torch_gradient_vanishes_at_the_reference_ratio(chosen: float, ref_w: float, ref_l: float, beta: float) -> None:
    """torch: on a tie the training gradient is 0 exactly where the policy's ratio is the reference's."""
    import torch

    w = torch.tensor(chosen, dtype=torch.float64)
    rw, rl = (torch.tensor(v, dtype=torch.float64) for v in (ref_w, ref_l))
    x = (w - (rw - rl)).detach().requires_grad_()
    margin = losses.logratio_margin(w, x, rw, rl)
    (slope,) = torch.autograd.grad(expected_loss(lambda d: losses.dpo(d, beta=beta), margin, 0.5), x)
    assert abs(slope.item()) <= 1e-12 * beta * (1 + beta), slope


CLAIMS = (
    Claim(
        id="drdo-prop",
        source="[N], proposition on non-deterministic pairs",
        statement=(
            "Where P(y > y') = 1/2, the Bradley-Terry margin that minimises the expected loss is 0, and no other is. "
            "In general it is the log-odds of P."
        ),
        formula=r"\arg\min_d\ P\,\ell(d)+(1-P)\,\ell(-d)=\log\tfrac P{1-P},\quad=0\iff P=\tfrac12",
        domain="one pair; minimisers of the mean loss, no flow",
        losses=("bradley_terry",),
        assumptions={"tie": "P(y > y') = 1/2", "balanced labels": "both orders are seen equally often"},
        prove=prove_margin,
        counterexamples={"tie": _not_a_tie, "balanced labels": _one_label},
        controls={
            "without tie": lambda: check_tie(sp.log, labels=sp.Rational(3, 4)),
            "without balanced labels": lambda: check_tie(sp.log, labels=sp.S.One),
            "sign": lambda: check_tie(lambda odds: -sp.log(odds)),
            "probability in place of log-odds": lambda: check_tie(lambda odds: odds / (1 + odds) - sp.Rational(1, 2)),
            "half the log-odds": lambda: check_tie(lambda odds: sp.log(odds) / 2),
        },
        enumerate=enumerate_labels,
        properties=(no_margin_is_better,),
    ),
    Claim(
        id="drdo-lemma1a",
        source="[N], Lemma 1a",
        statement=(
            "On a tie every minimising sequence of the expected DPO loss has log-ratio margin -> 0: the policy's ratio "
            "tends to the reference's, that is to 1 where the reference is indifferent. (Printed: the ratio -> 0.)"
        ),
        formula=r"P=\tfrac12:\quad\tfrac{\pi(y_w)}{\pi(y_l)}\to\tfrac{\pi_{\rm ref}(y_w)}{\pi_{\rm ref}(y_l)}",
        domain="one pair among finitely many responses, tabular; minimising sequences, no flow",
        losses=("logratio_margin", "bradley_terry", "dpo"),
        assumptions={
            "tie": "P(y_w > y_l) = 1/2",
            "balanced labels": "both orders are seen equally often",
            "indifferent reference": "pi_ref(y_w) = pi_ref(y_l), for the ratio 1",
        },
        prove=prove_ratio,
        counterexamples={
            "tie": _not_a_tie_ratio,
            "balanced labels": _one_label,
            "indifferent reference": _biased_reference,
        },
        controls={
            "without tie": lambda: check_policy_ratio(lambda reference: reference, labels=sp.Rational(3, 4)),
            "without balanced labels": lambda: check_policy_ratio(lambda reference: reference, labels=sp.S.One),
            "without indifferent reference": lambda: check_policy_ratio(
                lambda reference: sp.Integer(1), reference=sp.Integer(3)
            ),
            "ratio 0, as printed": lambda: check_policy_ratio(lambda reference: sp.Integer(0)),
            "ratio 1 for every reference": lambda: check_policy_ratio(lambda reference: sp.Integer(1)),
            "inverse reference ratio": lambda: check_policy_ratio(lambda reference: 1 / reference),
        },
        properties=(no_margin_is_better, torch_gradient_vanishes_at_the_reference_ratio),
        printed=ratio_to_zero_fails,
        sharpens=True,
    ),
)
