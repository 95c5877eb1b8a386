"""What the KL penalty means: the penalised minimiser is the closest policy to pi_ref among those that fit as well.

For e-DPO, to fit means that the implicit reward is within lambda of *some* member; for p-DPO, that the DPO loss is at
most lambda. Either way lambda is the value that the minimiser attains, not one chosen beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import losses
from theory.claim import Claim, require
from theory.preferences import Floats, PreferenceGraph
from theory.propositions.mass_transfer import PairLoss, distillation, dpo, optimum
from theory.strategies import log_policies, positive, preference_graphs, vectors

ALPHA, STEP, BETA = sp.symbols("alpha d beta", positive=True)
MARGIN = sp.Symbol("Delta", real=True)

Penalised = Callable[[Any, Any, Any], Any]
"""(loss, kl, alpha) -> objective."""


def pessimistic(loss: Any, kl: Any, alpha: Any) -> Any:
    """The objective under test."""
    return losses.pessimistic(loss, kl, alpha=alpha)


# ---------------------------------------------------------------- checks


def check_exchange(objective: Penalised) -> None:
    """alpha (KL - KL*) = [objective - objective*] + [loss* - loss]: where pi* minimises the objective and pi fits at
    least as well, both brackets are >= 0, so pi is no closer to pi_ref than pi*."""
    loss, kl, best_loss, best_kl = sp.symbols("L K L_star K_star", real=True)
    gain = objective(loss, kl, ALPHA) - objective(best_loss, best_kl, ALPHA)
    require(sp.expand(ALPHA * (kl - best_kl) - gain - (best_loss - loss)) == 0, "the KLs are not ordered by the values")


def check_path(objective: Penalised) -> None:
    """(alpha' - alpha) (KL - KL') = [objective(pi') - objective(pi)] at alpha + [objective'(pi) - objective'(pi')] at
    alpha': with minimisers pi, pi' both brackets are >= 0. So KL falls and the attained level rises with alpha."""
    loss, kl, other_loss, other_kl = sp.symbols("L K L_1 K_1", real=True)
    at = objective(other_loss, other_kl, ALPHA) - objective(loss, kl, ALPHA)
    at_larger = objective(loss, kl, ALPHA + STEP) - objective(other_loss, other_kl, ALPHA + STEP)
    require(sp.expand(STEP * (kl - other_kl) - at - at_larger) == 0, "the KL need not fall with alpha")


def check_union(choose: Callable[[Any], Any]) -> None:
    """The ensemble loss is the smallest member's mean: it is at most lambda iff some member's is.

    Args:
        choose: Gram matrix [2, 2] -> weights of the members.
    """
    margins = np.array(sp.symbols("Delta0:3", real=True), dtype=object)
    members = np.array(sp.symbols("delta0:6", real=True), dtype=object).reshape(2, 3)
    gram = losses.ensemble_gram(margins, members, beta=BETA)
    for i in range(2):
        mean = sum(losses.distillation(margins, members[i], beta=BETA)) / 3
        require(sp.expand(gram[i, i] - mean) == 0, "the Gram matrix does not hold the members' losses")
    smaller, cross = sp.symbols("a c", real=True)
    for i in range(2):
        values = [smaller + STEP, smaller + STEP]
        values[i] = smaller
        weights = choose(np.array([[values[0], cross], [cross, values[1]]], dtype=object))
        require(weights[i] == 1 and weights[1 - i] == 0, "another member is chosen")


def prove_ensemble() -> None:
    check_exchange(pessimistic)
    check_path(pessimistic)
    check_union(losses.member_weights)


def prove_dpo() -> None:
    """As for the ensemble; and the loss and the KL are convex in the log-ratios, so the minimiser is one."""
    check_exchange(pessimistic)
    check_path(pessimistic)
    require(sp.factor(sp.simplify(sp.diff(dpo(MARGIN, None, BETA), MARGIN, 2))).is_positive, "DPO is not convex")


def _check_against_clarabel(
    graph: PreferenceGraph, loss: PairLoss, targets: Floats, ref: Floats, beta: float, alpha: float
) -> None:
    """Two programs a member, penalised and constrained, by a conic solver: the same KL, the same policy.

    Args:
        graph: the pairs; weights add up to one.
        loss: dpo or distillation.
        targets: reward margins of the members, [K, m]; one row for DPO.
        ref: pi_ref, [n].
        beta: of the loss.
        alpha: weight of the penalty.
    """
    import cvxpy as cp

    u = cp.Variable(graph.n)
    margins, kl, normalised = graph.incidence @ u, -ref @ u, [cp.log_sum_exp(u + np.log(ref)) <= 0]
    if loss is dpo:
        fits = [graph.weights @ cp.logistic(-beta * margins)]
    else:
        fits = [graph.weights @ cp.square(target - beta * margins) for target in targets]
    penalised = []
    for fit in fits:
        value = cp.Problem(cp.Minimize(fit + alpha * kl), normalised).solve(solver=cp.CLARABEL)
        penalised.append((value, float(fit.value), float(kl.value), u.value))
    _, level, best_kl, best = min(penalised, key=lambda row: row[0])
    closest = []
    for fit in fits:
        problem = cp.Problem(cp.Minimize(kl), [*normalised, fit <= level])
        problem.solve(solver=cp.CLARABEL)
        if problem.status == cp.OPTIMAL:  # a member that no policy fits as well is infeasible
            closest.append((float(kl.value), u.value))
    kl_constrained, policy = min(closest, key=lambda row: row[0])
    require(
        abs(best_kl - kl_constrained) < 1e-4 * (1 + best_kl), f"KL {best_kl} penalised, {kl_constrained} constrained"
    )
    require(bool(np.abs(ref * (np.exp(best) - np.exp(policy))).max() < 1e-2), "the policies differ")


def _programs(loss: PairLoss, members: int, thorough: bool) -> str:
    rng = np.random.default_rng(0)
    count = 20 if thorough else 3
    for _ in range(count):
        n = int(rng.integers(3, 5))
        edges = [(i, j) for i in range(n) for j in range(i + 1, n)]
        graph = PreferenceGraph(n, edges, rng.dirichlet(np.ones(len(edges))))
        targets = np.stack([graph.margins(rng.normal(size=n)) for _ in range(members)])
        ref = rng.dirichlet(3 * np.ones(n))
        _check_against_clarabel(graph, loss, targets, ref, float(rng.uniform(0.5, 2)), float(rng.uniform(0.05, 1)))
    return f"{count} instances, {members} member{'s' * (members > 1)}, as exponential-cone programs"


# ---------------------------------------------------------------- without each assumption


def _kl_two_arms(margin: Any) -> Any:
    """KL(pi_ref || pi) for two arms and a uniform reference, as a function of the margin."""
    logs = [-sp.log(1 + sp.exp(-margin)), -sp.log(1 + sp.exp(margin))]
    return sum(losses.forward_kl(logp + sp.log(2)) for logp in logs) / 2


def _no_penalty(pair: Callable[[Any], Any]) -> str:
    """3 arms, uniform reference, one pair that is content with equal probabilities: (x, x, 1 - 2 x)."""
    third = -sp.log(3)
    kls, fits = [], []
    for x in (sp.Rational(1, 3), sp.Rational(1, 4)):
        logs = [sp.log(x), sp.log(x), sp.log(1 - 2 * x)]
        fits.append(sp.simplify(pair(losses.logratio_margin(logs[0], logs[1], third, third))))
        kls.append(sum(losses.forward_kl(logp - third) for logp in logs) / 3)
    require(sp.simplify(fits[0] - fits[1]) == 0, "they fit differently")
    require(sp.simplify(kls[0]) == 0, "the reference is at a distance from itself")
    require(kls[1] > 0, "both are as close")
    return "alpha = 0, 3 arms, one pair fitted at Delta = 0: (1/4, 1/4, 1/2) is a minimiser too, pi_ref is closer"


def _without_penalty_ensemble() -> str:
    return _no_penalty(lambda margin: losses.distillation(margin, sp.S.Zero, beta=BETA))


def _without_penalty_dpo() -> str:
    pair = dpo(MARGIN, None, BETA) + dpo(-MARGIN, None, BETA)
    require(sp.simplify(sp.diff(pair, MARGIN).subs(MARGIN, 0)) == 0, "0 is not stationary")
    return _no_penalty(lambda margin: pair.subs(MARGIN, margin)) + " (0 > 1 and 1 > 0 observed once each)"


def _local_minimum() -> str:
    """Rewards with margins 1 and -3: near -3 lies a local minimum, with loss > 0 and |Delta| > 2; Delta = 1 has loss 0
    and is closer to the reference. beta = 1, alpha = 1/10."""
    alpha = sp.Rational(1, 10)
    near, far = (losses.distillation(MARGIN, sp.Integer(d), beta=1) for d in (1, -3))
    slope = sp.diff(pessimistic(far, _kl_two_arms(MARGIN), alpha), MARGIN)
    require(slope.subs(MARGIN, -3) < 0, "the objective does not fall at -3")
    require(slope.subs(MARGIN, -2) > 0, "the objective does not rise at -2")
    # On [-3, -2] the far member is the better one: near - far is 8 (-1 - Delta), at least 8.
    require(sp.expand(near - far - 8 * (-1 - MARGIN)) == 0, "another difference")
    require(near.subs(MARGIN, 1) == 0, "Delta = 1 does not fit the near member")
    require(_kl_two_arms(sp.Integer(1)) < _kl_two_arms(sp.Integer(-2)), "Delta = 1 is not closer")
    return "2 arms, reward margins 1 and -3, alpha = 0.1: the local minimum near Delta = -3 is farther than Delta = 1"


def _another_level(loss: Callable[[Any], Any]) -> str:
    """The minimiser lies at Delta > 0 strictly; at the level of the reference itself, the reference is closest."""
    objective = pessimistic(loss(MARGIN), _kl_two_arms(MARGIN), ALPHA)
    require(sp.simplify(sp.diff(objective, MARGIN).subs(MARGIN, 0)).is_negative, "the reference is the minimiser")
    require(sp.simplify(_kl_two_arms(sp.S.Zero)) == 0, "the reference is at a distance from itself")
    rise = sp.diff(_kl_two_arms(MARGIN), MARGIN).subs(MARGIN, STEP) - sp.tanh(STEP / 2) / 2
    require(sp.simplify(rise.rewrite(sp.exp)) == 0, "the KL does not rise with a positive margin")
    return (
        "2 arms, one pair: with lambda the loss of pi_ref, the closest policy is pi_ref, not the minimiser (Delta > 0)"
    )


def _another_level_ensemble() -> str:
    return _another_level(lambda margin: losses.distillation(margin, sp.S.One, beta=BETA))


def _another_level_dpo() -> str:
    return _another_level(lambda margin: losses.dpo(margin, beta=BETA))


# ---------------------------------------------------------------- properties

Problem = tuple[PreferenceGraph, Floats, Floats, float, float]


@st.composite
def _problems(draw: st.DrawFn) -> Problem:
    """A graph with weights 1/m, two members' reward margins, log pi_ref, beta and alpha."""
    drawn = draw(preference_graphs(max_responses=4, weighted=False))
    graph = drawn.with_weights(np.full(len(drawn), 1 / len(drawn)))
    members = np.stack([graph.margins(draw(vectors(graph.n, 2.0))) for _ in range(2)])
    return graph, members, draw(log_policies(graph.n, 2.0)), draw(positive(0.3, 3)), draw(positive(0.02, 5))


def _kl(ref: Floats, logratios: Floats) -> float:
    return float(np.exp(ref) @ losses.forward_kl(logratios))


def _ensemble_optimum(problem: Problem) -> Floats:
    """The global minimiser of min_i L_i + alpha KL is the best of the members' own, each a convex problem."""
    graph, members, ref, beta, alpha = problem

    def attained(target: Floats) -> tuple[float, Floats]:
        u = optimum(graph, distillation, targets=target, beta=beta, ref_logps=ref, alpha=alpha)
        # By its own member: with the better of the two, members 1e-9 apart would differ by 1e-18.
        fit = float(losses.distillation(graph.margins(u), target, beta=beta).mean())
        return float(pessimistic(fit, _kl(ref, u), alpha)), u

    return min((attained(target) for target in members), key=lambda pair: pair[0])[1]


def _nearby(data: st.DataObject, best: Floats, ref: Floats) -> Floats:
    """Normalised log-ratios of some other policy, near or far."""
    size = data.draw(st.sampled_from([1e-3, 1e-2, 0.1, 1.0]))
    logits = ref + best + size * data.draw(vectors(len(ref)))
    return np.asarray(logits - np.logaddexp.reduce(logits) - ref)


@given(_problems(), st.data())
def nothing_closer_fits_some_member_as_well(problem: Problem, data: st.DataObject) -> None:
    """NumPy: no policy beats the objective, and none with loss at most lambda is closer to pi_ref."""
    graph, members, ref, beta, alpha = problem
    best = _ensemble_optimum(problem)
    other = _nearby(data, best, ref)
    level, fit = (float(losses.ensemble_min(graph.margins(u), members, beta=beta).mean()) for u in (best, other))
    assert pessimistic(fit, _kl(ref, other), alpha) >= pessimistic(level, _kl(ref, best), alpha) - 1e-11 * (1 + alpha)
    if fit <= level:
        assert _kl(ref, other) >= _kl(ref, best) - 1e-11 * (1 + 1 / alpha)


@given(_problems())
def ensemble_optimum_is_stationary_under_torch(problem: Problem) -> None:
    """torch: autograd through ensemble_min and a softmax gives zero at the minimiser."""
    import torch

    graph, members, ref, beta, alpha = problem
    ref_logps = torch.tensor(ref)
    logits = torch.tensor(ref + _ensemble_optimum(problem), requires_grad=True)
    logratios = torch.log_softmax(logits, 0) - ref_logps
    fit = losses.ensemble_min(graph.margins(logratios), torch.tensor(members), beta=beta).mean()
    total = pessimistic(fit, (ref_logps.exp() * losses.forward_kl(logratios)).sum(), alpha)
    assert torch.autograd.grad(total, logits)[0].abs().max() <= 1e-10 * (1 + alpha + beta**2)


@given(_problems(), st.data())
def nothing_closer_has_as_low_a_dpo_loss(problem: Problem, data: st.DataObject) -> None:
    """NumPy: the same for p-DPO; and with a larger alpha the optimum is closer to pi_ref and fits worse."""
    graph, _, ref, beta, alpha = problem
    targets = np.zeros(len(graph))

    def solved(alpha: float) -> Floats:
        return optimum(graph, dpo, targets=targets, beta=beta, ref_logps=ref, alpha=alpha)

    def fit(u: Floats) -> float:
        return float(graph.weights @ losses.dpo(graph.margins(u), beta=beta))

    best, larger = solved(alpha), solved(2 * alpha)
    other = _nearby(data, best, ref)
    if fit(other) <= fit(best):
        assert _kl(ref, other) >= _kl(ref, best) - 1e-11 * (1 + 1 / alpha)
    assert _kl(ref, larger) <= _kl(ref, best) + 1e-11
    assert fit(larger) >= fit(best) - 1e-11


def _negated(loss: Any, kl: Any, alpha: Any) -> Any:
    return 2 * loss - pessimistic(loss, kl, alpha)


CONTROLS: dict[str, Callable[[], object]] = {
    "KL rewarded": lambda: check_exchange(_negated),
    "KL rewarded, along alpha": lambda: check_path(_negated),
    "alpha squared": lambda: check_exchange(lambda loss, kl, alpha: pessimistic(loss, kl, alpha**2)),
    "penalty left out": lambda: check_exchange(lambda loss, kl, alpha: loss),
}

CLAIMS = (
    Claim(
        id="prop4",
        source="[F] A.7, Proposition 4",
        statement=(
            "The minimiser of min_i distillation_i + alpha KL(pi_ref || pi) is the closest policy to pi_ref among "
            "those whose implicit reward is within lambda of some member, lambda being the loss it attains. "
            "With alpha, lambda rises and the KL falls."
        ),
        formula=(
            r"\pi^*\in\arg\min_\pi\{\mathrm{KL}(\pi_{\rm ref}\Vert\pi):\exists i\ L_i(\pi)\le\lambda\},\quad"
            r"\lambda=\min_iL_i(\pi^*)"
        ),
        assumptions={
            "positive alpha": "alpha > 0",
            "global minimiser": "pi is a global minimiser; the ensemble loss has local ones",
            "attained level": "lambda is the loss that the minimiser attains",
        },
        prove=prove_ensemble,
        counterexamples={
            "positive alpha": _without_penalty_ensemble,
            "global minimiser": _local_minimum,
            "attained level": _another_level_ensemble,
        },
        controls={
            **CONTROLS,
            "the worst member": lambda: check_union(lambda gram: losses.member_weights(-gram)),
            "all members alike": lambda: check_union(lambda gram: np.array([sp.Rational(1, 2)] * 2, dtype=object)),
        },
        enumerate=lambda thorough: _programs(distillation, 2, thorough),
        properties=(nothing_closer_fits_some_member_as_well, ensemble_optimum_is_stationary_under_torch),
    ),
    Claim(
        id="prop4-pdpo",
        source="[F] A.7, eq 14",
        statement=(
            "The minimiser of the DPO loss + alpha KL(pi_ref || pi) is the closest policy to pi_ref among those with a "
            "DPO loss of at most lambda, lambda being the loss it attains. With alpha, lambda rises and the KL falls."
        ),
        formula=(
            r"\pi^*=\arg\min_\pi\{\mathrm{KL}(\pi_{\rm ref}\Vert\pi):L_{\rm DPO}(\pi)\le\lambda\},\quad"
            r"\lambda=L_{\rm DPO}(\pi^*)"
        ),
        assumptions={
            "positive alpha": "alpha > 0",
            "attained level": "lambda is the loss that the minimiser attains",
        },
        prove=prove_dpo,
        counterexamples={"positive alpha": _without_penalty_dpo, "attained level": _another_level_dpo},
        controls=CONTROLS,
        enumerate=lambda thorough: _programs(dpo, 1, thorough),
        properties=(nothing_closer_has_as_low_a_dpo_loss,),
    ),
)
