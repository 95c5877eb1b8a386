"""Which pairs are shown changes the Bradley-Terry fit, unless the preferences are Bradley-Terry to begin with.

With P(i > j) the true preferences and w_ij how often the pair is sampled, the fit minimises
sum over pairs of w_ij (P_ij l(r_i - r_j) + (1 - P_ij) l(r_j - r_i)). A preference cycle is fitted to whatever
circulation of residuals the sampler makes cheapest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import losses
from theory.algebra import simplify, vanishes
from theory.claim import Claim, require
from theory.strategies import positive, vectors

Preferences = dict[tuple[int, int], Any]
"""P(i > j) for i < j."""
Weights = dict[tuple[int, int], Any]

MARGIN = sp.Symbol("d", real=True)


def expected_loss(rewards: Any, preferences: Preferences, weights: Weights) -> Any:
    """The sampled, weighted Bradley-Terry loss. Any backend."""
    return sum(
        w
        * (
            preferences[pair] * losses.bradley_terry(rewards[pair[0]] - rewards[pair[1]])
            + (1 - preferences[pair]) * losses.bradley_terry(rewards[pair[1]] - rewards[pair[0]])
        )
        for pair, w in weights.items()
    )


def slopes(rewards: list[sp.Expr], preferences: Preferences, weights: Weights) -> list[sp.Expr]:
    """dL/dr_i at the given rewards, exactly; the fit is where all vanish (the loss is convex)."""
    r = sp.symbols(f"r0:{len(rewards)}", real=True)
    loss = expected_loss(r, preferences, weights)
    at = dict(zip(r, rewards, strict=True))
    return [simplify(sp.diff(loss, x).subs(at)) for x in r]


def cycle(p: Any) -> Preferences:
    """1 > 2, 2 > 3 and 3 > 1, each with probability p."""
    return {(0, 1): p, (1, 2): p, (0, 2): 1 - p}


def three_weights(w12: Any, w23: Any, w31: Any) -> Weights:
    """Sampling weights of the three pairs."""
    return {(0, 1): w12, (1, 2): w23, (0, 2): w31}


# ---------------------------------------------------------------- checks


def check_fit(rewards: list[sp.Expr], preferences: Preferences, weights: Weights) -> None:
    """The rewards are the fit: every slope is exactly 0. (Connected pairs: the fit is unique up to a constant.)"""
    require(all(s == 0 for s in slopes(rewards, preferences, weights)), f"{rewards} is not the fit under {weights}")


def check_dependence(preferences: Preferences, fits: Sequence[tuple[Weights, list[sp.Expr]]]) -> None:
    """Each sampler has the fit that stands beside it, and they are not all the same up to a constant."""
    for weights, rewards in fits:
        check_fit(rewards, preferences, weights)
    found = {tuple(simplify(x - rewards[0]) for x in rewards) for _, rewards in fits}
    require(len(found) > 1, "all samplers give the same fit")


def check_only_bradley_terry(pairs: Sequence[tuple[int, int]], residual: Callable[[sp.Expr, sp.Expr], sp.Expr]) -> None:
    """dL/dr_i is linear in the weights, with coefficient -(P_ij - sigma(r_i - r_j)) at w_ij.

    So a fit that stays for every sampler has P_ij = sigma(r_i - r_j) on all pairs: Bradley-Terry; and the converse.

    Args:
        pairs: that may be sampled.
        residual: (P, margin) -> what a fit for every sampler makes 0.
    """
    r = sp.symbols(f"r0:{1 + max(map(max, pairs))}", real=True)
    p = {pair: sp.Symbol(f"P{pair[0]}{pair[1]}", positive=True) for pair in pairs}
    w = {pair: sp.Symbol(f"w{pair[0]}{pair[1]}", positive=True) for pair in pairs}
    loss = expected_loss(r, p, w)
    for i, x in enumerate(r):
        slope = sp.diff(loss, x)
        for pair in pairs:
            sign = 1 if pair[0] == i else -1 if pair[1] == i else 0
            expected = -sign * residual(p[pair], r[pair[0]] - r[pair[1]])
            require(vanishes(sp.diff(slope, w[pair]) - expected), f"another coefficient of {w[pair]}")


def check_unique() -> None:
    """Each pair adds curvature w sigma (1 - sigma) > 0 along its margin, whatever P."""
    p = sp.Symbol("P", positive=True)
    loss = p * losses.bradley_terry(MARGIN) + (1 - p) * losses.bradley_terry(-MARGIN)
    curvature = sp.exp(MARGIN) / (1 + sp.exp(MARGIN)) ** 2
    require(vanishes(sp.diff(loss, MARGIN, 2) - curvature) and curvature.is_positive, "not strictly convex")


def bradley_terry_residual(p: sp.Expr, margin: sp.Expr) -> sp.Expr:
    """P - sigma(margin)."""
    return p - 1 / (1 + sp.exp(-margin))


EQUAL, FIRST_BETTER = [sp.Integer(0)] * 3, [sp.log(2), sp.Integer(0), sp.Integer(0)]
UNIFORM, SKEWED = three_weights(1, 1, 1), three_weights(15, 5, 3)
ONE_PAIR, TREE, TRIANGLE = [(0, 1)], [(0, 1), (1, 2), (1, 3)], [(0, 1), (1, 2), (0, 2)]


def prove() -> None:
    check_unique()
    check_dependence(cycle(sp.Rational(3, 4)), [(UNIFORM, EQUAL), (SKEWED, FIRST_BETTER)])
    for pairs in (ONE_PAIR, TREE, TRIANGLE):
        check_only_bradley_terry(pairs, bradley_terry_residual)


def enumerate_cycles(thorough: bool) -> str:
    """Every target fit log(a, b, 1) within reach of a 3-cycle has a sampler that produces it: residuals P - sigma must
    make a circulation, w_12 e_12 = w_23 e_23 = w_31 e_31, which all-positive residuals allow."""
    largest, count = (6 if thorough else 3), 0
    for p in (sp.Rational(3, 4), sp.Rational(9, 10)):
        for a, b in product(range(1, largest + 1), repeat=2):
            odds = [sp.Integer(a), sp.Integer(b), sp.Integer(1)]
            residuals = [p - odds[i] / (odds[i] + odds[j]) for i, j in ((0, 1), (1, 2), (2, 0))]
            if min(residuals) > 0:
                check_fit([sp.log(x) for x in odds], cycle(p), three_weights(*(1 / e for e in residuals)))
                count += 1
    return f"{count} fits of 3-cycles, each by a sampler of its own, reward odds <= {largest}"


# ---------------------------------------------------------------- without each assumption


def _bradley_terry() -> str:
    rewards = [sp.log(4), sp.log(2), sp.Integer(0)]
    preferences = {(0, 1): sp.Rational(2, 3), (1, 2): sp.Rational(2, 3), (0, 2): sp.Rational(4, 5)}
    w = sp.symbols("w12 w23 w31", positive=True)
    check_fit(rewards, preferences, three_weights(*w))
    return "P = (2/3, 2/3, 4/5), i.e. Bradley-Terry with rewards log(4, 2, 1): the fit is the same for every sampler"


def _no_cycle_of_comparisons() -> str:
    """On a tree of pairs, any probabilities are Bradley-Terry."""
    preferences = {(0, 1): sp.Rational(3, 4), (1, 2): sp.Rational(3, 4)}
    w = sp.symbols("w12 w23", positive=True)
    check_fit([sp.log(9), sp.log(3), sp.Integer(0)], preferences, dict(zip(preferences, w, strict=True)))
    return "pairs 1-2 and 2-3 only: rewards log(9, 3, 1) fit P = 3/4 on both, for every sampler"


# ---------------------------------------------------------------- properties


@given(vectors(4), vectors(4, 2.0), st.lists(positive(), min_size=6, max_size=6))
def bradley_terry_fit_is_sampler_free(rewards: Any, shift: Any, sampler: list[float]) -> None:
    """NumPy: the true rewards minimise the loss of Bradley-Terry preferences under every sampler."""
    pairs = list(combinations(range(4), 2))
    preferences = {(i, j): 1 / (1 + np.exp(rewards[j] - rewards[i])) for i, j in pairs}
    weights = dict(zip(pairs, sampler, strict=True))
    at, away = (expected_loss(x, preferences, weights) for x in (rewards, rewards + shift))
    assert at <= away + 1e-12 * (1 + away)


@given(st.lists(st.floats(-0.5, 0.5), min_size=3, max_size=3), st.floats(0.8, 0.99))
def torch_gradient_vanishes_at_each_samplers_fit(rewards: list[float], p: float) -> None:
    """torch: on a 3-cycle, any rewards with all residuals positive are the fit of some sampler."""
    import torch

    r = torch.tensor(rewards, dtype=torch.float64, requires_grad=True)
    residuals = [p - 1 / (1 + np.exp(rewards[j] - rewards[i])) for i, j in ((0, 1), (1, 2), (2, 0))]
    loss = expected_loss(r, cycle(p), three_weights(*(float(1 / e) for e in residuals)))
    (gradient,) = torch.autograd.grad(loss, r)
    assert float(gradient.abs().max()) <= 1e-10 * max(1 / e for e in residuals), gradient


CLAIMS = (
    Claim(
        id="drdo-sampling",
        source="[N], dependence on the sampling distribution",
        statement=(
            "If preferences are not Bradley-Terry, the Bradley-Terry (hence DPO) fit depends on which pairs are "
            "sampled: a 3-arm cycle has equal rewards under uniform sampling and log(2, 1, 1) under 15 : 5 : 3. Sharp: "
            "the fit is the same for every sampler iff the preferences are Bradley-Terry."
        ),
        formula=r"\partial_{r_i}L=-\sum_j w_{ij}\,(P_{ij}-\sigma(r_i-r_j))",
        domain="finitely many responses, one reward a response; minimisers, no flow",
        losses=("bradley_terry",),
        assumptions={
            "not Bradley-Terry": "no rewards r have P_ij = sigma(r_i - r_j) on all pairs",
            "comparisons form a cycle": "the sampled pairs are not a tree",
        },
        prove=prove,
        counterexamples={
            "not Bradley-Terry": _bradley_terry,
            "comparisons form a cycle": _no_cycle_of_comparisons,
        },
        controls={
            "without not Bradley-Terry": lambda: check_dependence(
                {(0, 1): sp.Rational(2, 3), (1, 2): sp.Rational(2, 3), (0, 2): sp.Rational(4, 5)},
                [(sampler, [sp.log(4), sp.log(2), sp.Integer(0)]) for sampler in (UNIFORM, SKEWED)],
            ),
            "without comparisons form a cycle": lambda: check_dependence(
                {(0, 1): sp.Rational(3, 4), (1, 2): sp.Rational(3, 4)},
                [({(0, 1): 1, (1, 2): w}, [sp.log(9), sp.log(3), sp.Integer(0)]) for w in (1, 5)],
            ),
            "equal rewards under the second sampler": lambda: check_dependence(
                cycle(sp.Rational(3, 4)), [(UNIFORM, EQUAL), (SKEWED, EQUAL)]
            ),
            "the best arm reversed": lambda: check_dependence(
                cycle(sp.Rational(3, 4)), [(UNIFORM, EQUAL), (SKEWED, [sp.Integer(0), sp.log(2), sp.log(2)])]
            ),
            "residual without the sigmoid": lambda: check_only_bradley_terry(
                ONE_PAIR, lambda p, margin: p - sp.Rational(1, 2) - margin / 4
            ),
            "residual of the other sign": lambda: check_only_bradley_terry(
                ONE_PAIR, lambda p, margin: -bradley_terry_residual(p, margin)
            ),
        },
        enumerate=enumerate_cycles,
        properties=(bradley_terry_fit_is_sampler_free, torch_gradient_vanishes_at_each_samplers_fit),
        sharpens=True,
    ),
)
