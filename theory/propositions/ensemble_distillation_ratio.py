"""e-DPO on one pair: the policy's ratio is exp(delta / beta) for some member's reward margin delta, hence finite.

Lemma 2 of [N] has the ratio diverge on non-deterministic pairs. On a tie the fitted reward margin is 0 and e-DPO keeps
the reference's ratio. The lemma holds where reward estimates are unbounded, as they are for a reward model fitted to
one-way labels without regularisation: then delta -> infinity, and the ratio with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import losses
from theory.algebra import limit, simplify, vanishes
from theory.certificates import reaches
from theory.claim import Claim, require
from theory.strategies import positive, reals

BETA = sp.Symbol("beta", positive=True)
MARGIN = sp.Symbol("Delta", real=True)

Minimisers = Callable[[Sequence[Any], Any], set[Any]]
"""(the members' reward margins, beta) -> the log-ratio margins that minimise e-DPO's loss."""


def pair_loss(margin: Any, deltas: Sequence[Any], beta: Any) -> Any:
    """e-DPO's loss of a single pair, SymPy or NumPy."""
    dtype = object if isinstance(margin, sp.Expr) else np.float64
    members = np.array([[d] for d in deltas], dtype=dtype)
    return losses.ensemble_min(np.array([margin], dtype=dtype), members, beta=beta)[0]


def minimisers(deltas: Sequence[Any], beta: Any) -> set[Any]:
    """Delta = delta_i / beta, one for each member."""
    return {d / beta for d in deltas}


# ---------------------------------------------------------------- checks


def check_single_reward(best: Callable[[sp.Expr, sp.Expr], sp.Expr]) -> None:
    """(delta - beta Delta)^2 = beta^2 (Delta - best)^2; the ratio relative to the reference is exp(best)."""
    delta = sp.Symbol("delta", real=True)
    difference = losses.distillation(MARGIN, delta, beta=BETA) - BETA**2 * (MARGIN - best(delta, BETA)) ** 2
    require(sp.expand(difference) == 0, "the loss is not the square around the formula")
    require(sp.exp(best(delta, BETA)).is_finite, "the ratio may be infinite")


def check_ensemble(formula: Minimisers) -> None:
    """Two members, symbolic: the smaller of the two squares, 0 exactly at either member's margin."""
    delta, gap = sp.Symbol("delta", real=True), sp.Symbol("g", positive=True)
    loss = pair_loss(MARGIN, [delta, delta + gap], BETA)
    for at in formula([delta, delta + gap], BETA):
        require(vanishes(loss.subs(MARGIN, at)), f"the loss is not 0 at {at}")
    # Elsewhere: with beta Delta = delta + g / 2 + t the residuals are -(t + g / 2) and g / 2 - t; t > 0 and t < 0 each
    # pick the nearer member, so away from both members' margins the loss is a positive square.
    distance = sp.Symbol("t", positive=True)
    for t in (distance, -distance):
        value = _decided(loss.subs(MARGIN, (delta + gap / 2 + t) / BETA))
        require(sp.expand(value - (distance - gap / 2) ** 2) == 0, f"{value} is not the nearer member's square")


def _decided(loss: sp.Expr) -> sp.Expr:
    """The expression with its comparisons expanded, so that the signs of the symbols decide them."""
    return loss.replace(
        lambda node: isinstance(node, sp.core.relational.Relational),
        lambda node: node.func(sp.expand(node.lhs - node.rhs), 0),
    )


def check_zeros(formula: Minimisers, members: int, values: range) -> int:
    """Exact, on a grid: the loss is 0 at the formula's margins and positive at every other grid point."""
    count = 0
    for deltas in product(values, repeat=members):
        exact = [sp.Integer(d) for d in deltas]
        zeros = formula(exact, sp.Integer(2))
        require(len(zeros) > 0, "no minimiser")
        for twice in range(2 * min(values) - 1, 2 * max(values) + 2):
            margin = sp.Rational(twice, 2)
            loss = pair_loss(margin, exact, 2)
            require((loss == 0) == (margin in zeros), f"loss {loss} at Delta = {margin}, rewards {deltas}, beta = 2")
            count += 1
    return count


def check_members(
    deltas: Sequence[Any],
    *,
    formula: Minimisers = minimisers,
    alpha: Any = 0,
    features: Sequence[Sequence[int]] = ((1, 0), (0, 1)),
) -> None:
    """For beta = 2 the objective is stationary at the formula's margins, which are finite and within the policy's
    reach; two responses, uniform reference.

    Args:
        deltas: the members' reward margins, exact.
        formula: under test.
        alpha: weight of the penalty KL(pi_ref || pi).
        features: [2, p], of the policy: logits features @ theta.
    """
    beta = sp.Integer(2)
    logps = [-sp.log(1 + sp.exp(-MARGIN)), -sp.log(1 + sp.exp(MARGIN))]
    kl = sum(losses.forward_kl(logp + sp.log(2)) for logp in logps) / 2
    objective = losses.pessimistic(pair_loss(MARGIN, deltas, beta), kl, alpha=alpha)
    require(reaches(features, [[1], [-1]]), "the policy cannot move the ratio")
    for at in formula(deltas, beta):
        require(sp.exp(at).is_finite, f"the ratio exp({at}) is infinite")
        slope = simplify(sp.diff(objective, MARGIN).subs(MARGIN, at))
        require(slope == 0, f"the objective has slope {slope} at Delta = {at}")


def prove() -> None:
    """A square for one member, the nearer square for two; for any number the least of squares is 0 exactly where one
    of them is, which is run on ensembles of three and four."""
    check_single_reward(lambda delta, beta: delta / beta)
    check_ensemble(minimisers)
    for deltas in ([0], [2, 3], [-1, 0, 4], [5, -2, 1, 1]):
        exact = [sp.Integer(delta) for delta in deltas]
        check_members(exact)
        for at in minimisers(exact, 2):
            require(pair_loss(at, exact, 2) == 0, f"the loss is not 0 at Delta = {at}, rewards {deltas}")
    check_zeros(minimisers, 3, range(2))


def enumerate_rewards(thorough: bool) -> str:
    values = range(-2, 3) if thorough else range(-1, 2)
    count = sum(check_zeros(minimisers, members, values) for members in (1, 2, 3))
    return f"{count} losses: up to 3 members, integer margins |delta| <= {max(values)}"


# ---------------------------------------------------------------- without each assumption


def _unbounded_rewards() -> str:
    """The reading under which Lemma 2 holds: maximum-likelihood rewards of a pair that is labelled one way."""
    delta = sp.Symbol("delta", positive=True)
    slope = sp.diff(losses.bradley_terry(delta), delta)
    require(vanishes(slope + 1 / (1 + sp.exp(delta))), "another slope")
    require((-1 / (1 + sp.exp(delta))).is_negative, "the reward estimate stays bounded")
    require(limit(sp.exp(delta / BETA), delta, sp.oo) == sp.oo, "the ratio stays bounded")
    return "one label, unregularised reward model: delta -> infinity, so the ratio exp(delta/beta) -> infinity"


def _shared_parameters() -> str:
    theta = sp.Symbol("theta", real=True)
    margin = losses.logratio_margin(theta, theta, sp.Integer(0), sp.Integer(0))
    require(pair_loss(margin + 0 * MARGIN, [sp.Integer(1)], 1) == 1, "the loss reaches 0")
    return "y_w and y_l with equal features, delta = 1: the ratio is 1, not exp(1/beta)"


def _with_kl() -> str:
    """2 (Delta - 2) + alpha tanh(Delta / 2) / 2 vanishes below 2, and towards 3 the objective is larger."""
    alpha, deltas = sp.Rational(1, 10), [sp.Integer(2), sp.Integer(3)]
    kl = sum(losses.forward_kl(sp.log(2) - sp.log(1 + sp.exp(s * MARGIN))) for s in (1, -1)) / 2
    objective = losses.pessimistic(pair_loss(MARGIN, deltas, 1), kl, alpha=alpha)
    slope = sp.diff(objective, MARGIN)
    require(bool(slope.subs(MARGIN, 2) > 0 and slope.subs(MARGIN, 3) > 0), "a member's margin is stationary")
    best = sp.nsolve(slope, MARGIN, sp.Rational(39, 20))
    require(bool(abs(best - 2) > 1e-2 and objective.subs(MARGIN, best) < objective.subs(MARGIN, 2)), "no better margin")
    return f"alpha = 1/10, beta = 1, members 2 and 3: the optimum is Delta = {float(best):.3f}, neither member's"


def diverging_ratio_fails() -> str | None:
    """Smallest ensemble and smallest |delta| for which the optimal ratio on a tie is finite."""
    for members, delta in product(range(1, 3), (sp.Integer(0), sp.Integer(1))):
        loss = pair_loss(MARGIN, [delta] * members, sp.Integer(1))
        at, far = loss.subs(MARGIN, delta), limit(loss, MARGIN, sp.oo)
        if at == 0 and far == sp.oo:
            return (
                f"{members} member, beta = 1, a tie (reward margin {delta}): the loss is 0 at ratio {sp.exp(delta)} "
                "and tends to infinity as the ratio does"
            )
    return None


# ---------------------------------------------------------------- properties


@given(st.lists(reals(10), min_size=1, max_size=4), positive(), reals(20))
def loss_is_zero_only_at_members(deltas: list[float], beta: float, other: float) -> None:
    """NumPy: 0 at each delta_i / beta; elsewhere the squared distance to the nearest."""
    for d in deltas:
        assert pair_loss(d / beta, deltas, beta) <= 1e-24 * (1 + d * d)
    nearest = min(abs(d - beta * other) for d in deltas)
    assert np.isclose(pair_loss(other, deltas, beta), nearest**2, rtol=1e-9, atol=1e-18)


@given(st.lists(reals(10), min_size=1, max_size=4), positive(), st.data())
def torch_gradient_vanishes_at_members(deltas: list[float], beta: float, data: Any) -> None:
    """torch: the training gradient is 0 at every member's margin, and pulls back to it from beyond all of them."""
    import torch

    members = torch.tensor(deltas, dtype=torch.float64)[:, None]
    for at, pull in ((data.draw(st.sampled_from(deltas)) / beta, 0), ((max(deltas) + 1) / beta, 1)):
        margin = torch.tensor([at], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(losses.ensemble_min(margin, members, beta=beta).sum(), margin)
        assert abs(slope.item()) <= 1e-12 * beta * (1 + max(map(abs, deltas))) if pull == 0 else slope.item() > 0


CLAIMS = (
    Claim(
        id="drdo-lemma2",
        source="[N], Lemma 2",
        statement=(
            "e-DPO's ensemble loss on one pair with finite reward estimates, without a KL term: the optimal ratio, "
            "relative to the reference's, is exp(delta_i / beta) for some member i, finite; on a tie (delta = 0) it is "
            "1. (Printed: the ratio -> infinity on non-deterministic pairs, which needs unbounded reward estimates.)"
        ),
        formula=r"\arg\min_\Delta\min_i(\delta_i-\beta\Delta)^2=\{\delta_i/\beta\}",
        domain="one pair, finitely many members, tabular; minimisers, no flow",
        losses=("distillation", "ensemble_gram", "member_weights", "ensemble_min"),
        assumptions={
            "finite rewards": "every reward estimate is finite",
            "free parameters": "the policy can move the ratio of the two responses",
            "no KL term": "alpha = 0",
        },
        prove=prove,
        counterexamples={
            "finite rewards": _unbounded_rewards,
            "free parameters": _shared_parameters,
            "no KL term": _with_kl,
        },
        controls={
            "without finite rewards": lambda: check_members([sp.oo]),
            "without free parameters": lambda: check_members([sp.Integer(1)], features=((1,), (1,))),
            "without no KL term": lambda: check_members([sp.Integer(2), sp.Integer(3)], alpha=sp.Rational(1, 10)),
            "the mean of three members": lambda: check_members(
                [sp.Integer(0), sp.Integer(1), sp.Integer(5)], formula=lambda deltas, beta: {sp.Integer(1)}
            ),
            "no optimum, as printed": lambda: check_zeros(lambda deltas, beta: set(), 1, range(2)),
            "factor 1/beta missing": lambda: check_single_reward(lambda delta, beta: delta),
            "sign of delta": lambda: check_single_reward(lambda delta, beta: -delta / beta),
            "the ensemble's mean": lambda: check_zeros(
                lambda deltas, beta: {sp.Add(*deltas) / len(deltas) / beta}, 2, range(2)
            ),
            "the first member only": lambda: check_zeros(lambda deltas, beta: {deltas[0] / beta}, 2, range(2)),
        },
        enumerate=enumerate_rewards,
        properties=(loss_is_zero_only_at_members, torch_gradient_vanishes_at_members),
        printed=diverging_ratio_fails,
        sharpens=True,
    ),
)
