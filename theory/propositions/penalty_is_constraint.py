"""What the KL penalty means: the penalised minimiser is the closest policy to pi_ref among those that fit as well.

For e-DPO, to fit means that the implicit reward is within lambda of *some* member; for p-DPO, that the DPO loss is at
most lambda. Either way lambda is the value that the minimiser attains, not one chosen beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import losses
from theory.algebra import simplify, vanishes
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


def check_choice(choose: Callable[[Any], Any], members: int) -> None:
    """All weight goes to the member of the smallest mean loss, whatever the off-diagonal entries are.

    Args:
        choose: Gram matrix [K, K] -> weights of the members.
        members: K.
    """
    smallest, steps = sp.Symbol("a", real=True), sp.symbols(f"d0:{members}", positive=True)
    for best in range(members):
        gram = np.empty((members, members), dtype=object)
        for i, step in enumerate(steps):
            gram[i, i] = smallest if i == best else smallest + step
        for i, j in combinations(range(members), 2):
            gram[i, j] = gram[j, i] = sp.Symbol(f"c{i}{j}", real=True)
        weights = choose(gram)
        for i in range(members):
            require(weights[i] == int(i == best), f"of {members} members the weights are {weights}, the best is {best}")


def check_union(graph: PreferenceGraph, members: Any, choose: Callable[[Any], Any] | None = None) -> None:
    """The ensemble's mean loss is the smallest of the members' own: it is at most lambda iff some member's is. Exactly,
    at the reference, at each member's own policy and half-way between the first and each.

    Args:
        graph: the pairs.
        members: integer rewards, [K, n].
        choose: Gram matrix -> weights of the members, in the place of `ensemble_min`'s.
    """
    beta, count = sp.Integer(2), sp.Integer(len(graph))
    rewards = np.array([[sp.Integer(r) for r in member] for member in members], dtype=object)
    targets = graph.margins(rewards)
    for u in (0 * rewards[0], *rewards / beta, *(rewards + rewards[:1]) / (2 * beta)):
        margins = graph.margins(u)
        means = [sum(losses.distillation(margins, target, beta=beta)) / count for target in targets]
        gram = losses.ensemble_gram(margins, targets, beta=beta)
        require(list(gram.diagonal()) == means, "the Gram matrix does not hold the members' losses")
        if choose is None:
            found = sum(losses.ensemble_min(margins, targets, beta=beta)) / count
        else:
            found = sum(losses.distillation(margins, choose(gram) @ targets, beta=beta)) / count
        require(found == min(means), f"the ensemble's loss is {found}, the members' are {means}")


def check_two_arms(loss: Callable[[Any], Any], level: Any, *, policy: Any, ref: Any, alpha: Any) -> None:
    """Two responses, exactly: the objective is stationary where the winner has probability `policy`, the loss is
    `level` there, and the KL grows with the distance from pi_ref, so that everything closer fits worse.

    Args:
        loss: log-ratio margin -> loss of the one pair.
        level: lambda.
        policy: pi(y_w), between `ref` and 1.
        ref: pi_ref(y_w).
        alpha: of the penalty.
    """
    p = sp.Symbol("p", positive=True)
    value = loss(losses.logratio_margin(sp.log(p), sp.log(1 - p), sp.log(ref), sp.log(1 - ref)))
    kl = ref * losses.forward_kl(sp.log(p / ref)) + (1 - ref) * losses.forward_kl(sp.log((1 - p) / (1 - ref)))
    require(vanishes(sp.diff(kl, p) - (p - ref) / (p * (1 - p))), "the KL does not grow with the distance")
    slope = sp.diff(pessimistic(value, kl, alpha), p).subs(p, policy)
    require(vanishes(sp.expand_log(slope, force=True)), f"the objective has slope {slope} at {policy}")
    require(simplify(sp.exp(value.subs(p, policy) - level)) == 1, f"the loss at {policy} is not {level}")
    require(sp.diff(value, p).subs(p, policy).is_negative, "a closer policy does not fit worse")


GRAPHS = (PreferenceGraph(2, [(0, 1)]), PreferenceGraph(4, [(0, 1), (1, 2), (2, 0)]), PreferenceGraph.chain(3))
MEMBERS = ([[1, 0, 2, 0], [0, 3, 0, 1]], [[0, 0, 0, 0], [2, 1, 0, 0], [-3, 1, 1, 0], [1, 2, 5, 0]])
THIRD = sp.Rational(1, 3)


def prove_exchange(objective: Penalised) -> None:
    check_exchange(objective)
    check_path(objective)


def prove_ensemble_on(graphs: Iterable[PreferenceGraph], choose: Callable[[Any], Any] | None = None) -> None:
    """The exchange holds for any loss; the set {loss <= lambda} is the union of the members' own.

    Args:
        graphs: the pairs, of one problem each.
        choose: Gram matrix -> weights of the members, in the place of the ensemble's.
    """
    prove_exchange(pessimistic)
    for count in range(1, 5):
        check_choice(losses.member_weights if choose is None else choose, count)
    for graph in graphs:
        for members in MEMBERS:
            check_union(graph, [member[: graph.n] for member in members], choose)
    # pi_ref 1/3 and pi 3/5 have odds that differ by the factor 3; alpha (3/5 - 1/3) is the slope 2 (delta - log 3).
    near = sp.log(3) + sp.Rational(1, 4)
    targets = np.array([[sp.Integer(-4)], [near], [near + 2]], dtype=object)
    check_two_arms(
        lambda margin: losses.ensemble_min(np.array([margin], dtype=object), targets, beta=sp.Integer(1))[0],
        sp.Rational(1, 16), policy=sp.Rational(3, 5), ref=THIRD, alpha=sp.Rational(15, 8),
    )  # fmt: skip


def prove_dpo_on(loss: Callable[[Any, Any, Any], Any] = dpo) -> None:
    """As for the ensemble; and the loss and the KL are convex in the log-ratios, so the minimiser is one.

    Args:
        loss: (log-ratio margin, reward margin, beta) -> loss of a pair.
    """
    prove_exchange(pessimistic)
    require(sp.factor(simplify(sp.diff(loss(MARGIN, None, BETA), MARGIN, 2))).is_positive, "DPO is not convex")
    for beta, policy, ref, alpha in (  # odds that differ by the factors 3, 3 and 2
        (1, sp.Rational(3, 4), sp.Rational(1, 2), 1),
        (1, sp.Rational(3, 5), THIRD, sp.Rational(15, 16)),
        (2, sp.Rational(2, 3), sp.Rational(1, 2), sp.Rational(12, 5)),
    ):
        factor = policy * (1 - ref) / ((1 - policy) * ref)
        pair = partial(_with_beta_first(loss), beta)
        check_two_arms(pair, sp.log(1 + factor**-beta), policy=policy, ref=ref, alpha=sp.sympify(alpha))


def _with_beta_first(loss: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda beta, margin: loss(margin, None, beta)


# ---------------------------------------------------------------- by a conic solver


def _fits(graph: PreferenceGraph, loss: PairLoss, targets: Floats, margins: Any, beta: float) -> list[Any]:
    """The mean loss of each member, in CVXPY."""
    import cvxpy as cp

    if loss is dpo:
        return [graph.weights @ cp.logistic(-beta * margins)]
    return [graph.weights @ cp.square(target - beta * margins) for target in targets]


def check_closest(
    graph: PreferenceGraph,
    loss: PairLoss,
    targets: Floats,
    ref: Floats,
    beta: float,
    logratios: Floats,
    level: float | None = None,
) -> None:
    """The policy is the closest to pi_ref of those whose loss is at most the level, says Clarabel.

    Args:
        graph: the pairs.
        loss: dpo or distillation.
        targets: reward margins of the members, [K, m]; one row for DPO.
        ref: pi_ref, [n].
        beta: of the loss.
        logratios: log(pi / pi_ref) of the policy under test, [n].
        level: lambda; what the policy attains where not given.
    """
    import cvxpy as cp

    u = cp.Variable(graph.n)
    if level is None:
        level = min(graph.weights @ loss(graph.margins(logratios), target, beta) for target in targets)
    kl, closest = -ref @ u, []
    for fit in _fits(graph, loss, targets, graph.incidence @ u, beta):
        problem = cp.Problem(cp.Minimize(kl), [cp.log_sum_exp(u + np.log(ref)) <= 0, fit <= level + 1e-9])
        problem.solve(solver=cp.CLARABEL)
        if problem.status == cp.OPTIMAL:  # a member that no policy fits as well is infeasible
            closest.append((float(kl.value), u.value))
    require(bool(closest), "no policy fits as well")
    kl_closest, policy = min(closest, key=lambda row: row[0])
    distance = float(-ref @ logratios)
    require(abs(distance - kl_closest) < 1e-4 * (1 + distance), f"KL {distance:.5f}, of the closest {kl_closest:.5f}")
    require(bool(np.abs(ref * (np.exp(logratios) - np.exp(policy))).max() < 1e-2), "the policies differ")


def _check_against_clarabel(
    graph: PreferenceGraph, loss: PairLoss, targets: Floats, ref: Floats, beta: float, alpha: float
) -> None:
    """Two programs a member, penalised and constrained: the same KL, the same policy. Arguments as in `check_closest`,
    the graph's weights adding up to one; alpha is the weight of the penalty."""
    import cvxpy as cp

    u = cp.Variable(graph.n)
    penalised = []
    for fit in _fits(graph, loss, targets, graph.incidence @ u, beta):
        problem = cp.Problem(cp.Minimize(fit - alpha * ref @ u), [cp.log_sum_exp(u + np.log(ref)) <= 0])
        penalised.append((problem.solve(solver=cp.CLARABEL), float(fit.value), u.value))
    _, level, best = min(penalised, key=lambda row: row[0])
    check_closest(graph, loss, targets, ref, beta, best, level)


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
        fits.append(simplify(pair(losses.logratio_margin(logs[0], logs[1], third, third))))
        kls.append(sum(losses.forward_kl(logp - third) for logp in logs) / 3)
    require(vanishes(fits[0] - fits[1]), "they fit differently")
    require(vanishes(kls[0]), "the reference is at a distance from itself")
    require(kls[1] > 0, "both are as close")
    return "alpha = 0, 3 arms, one pair fitted at Delta = 0: (1/4, 1/4, 1/2) is a minimiser too, pi_ref is closer"


def _without_penalty_ensemble() -> str:
    return _no_penalty(lambda margin: losses.distillation(margin, sp.S.Zero, beta=BETA))


def _without_penalty_dpo() -> str:
    pair = dpo(MARGIN, None, BETA) + dpo(-MARGIN, None, BETA)
    require(vanishes(sp.diff(pair, MARGIN).subs(MARGIN, 0)), "0 is not stationary")
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
    require(simplify(sp.diff(objective, MARGIN).subs(MARGIN, 0)).is_negative, "the reference is the minimiser")
    require(vanishes(_kl_two_arms(sp.S.Zero)), "the reference is at a distance from itself")
    rise = sp.diff(_kl_two_arms(MARGIN), MARGIN).subs(MARGIN, STEP) - sp.tanh(STEP / 2) / 2
    require(vanishes(rise.rewrite(sp.exp)), "the KL does not rise with a positive margin")
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


def _another_minimiser(loss: PairLoss, edges: list[tuple[int, int]]) -> None:
    """alpha = 0: (1/4, 1/4, 1/2) fits pairs that are content with equal odds as well as the uniform reference does."""
    ref = np.full(3, 1 / 3)
    logratios = np.log(np.array([0.25, 0.25, 0.5]) / ref)
    check_closest(PreferenceGraph(3, edges), loss, np.zeros((1, len(edges))), ref, 1.0, logratios)


def _on_two_arms(loss: PairLoss, targets: list[float], minimised: float, level: float | None = None) -> None:
    """One pair, uniform reference, beta 1, alpha 1/10: the penalised minimiser for one of the reward margins.

    Args:
        loss: of the pair.
        targets: the members' reward margins, [K].
        minimised: the one whose minimiser is tested.
        level: lambda; what that policy attains where not given.
    """
    graph, ref = PreferenceGraph(2, [(0, 1)]), np.full(2, 0.5)
    best = optimum(graph, loss, targets=np.array([minimised]), beta=1.0, ref_logps=np.log(ref), alpha=0.1)
    check_closest(graph, loss, np.array(targets)[:, None], ref, 1.0, best, level)


def _smallest_row_sum(gram: Any) -> Any:
    return losses.member_weights(np.array(np.diag(gram.sum(axis=1)), dtype=object))


def _first_two(gram: Any) -> Any:
    rest = [sp.Integer(0)] * (len(gram) - 2)
    return np.array([*losses.member_weights(gram[:2, :2]), *rest], dtype=object)


def _negated(loss: Any, kl: Any, alpha: Any) -> Any:
    return 2 * loss - pessimistic(loss, kl, alpha)


CONTROLS: dict[str, Callable[[], object]] = {
    "KL rewarded": lambda: prove_exchange(_negated),
    "KL rewarded, along alpha": lambda: check_path(_negated),
    "alpha squared": lambda: prove_exchange(lambda loss, kl, alpha: pessimistic(loss, kl, alpha**2)),
    "penalty left out": lambda: prove_exchange(lambda loss, kl, alpha: loss),
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
        domain="any set of policies; finitely many responses and members where solved; minimisers, no flow",
        losses=(
            "logratio_margin",
            "distillation",
            "forward_kl",
            "pessimistic",
            "ensemble_gram",
            "member_weights",
            "ensemble_min",
        ),
        assumptions={
            "positive alpha": "alpha > 0",
            "global minimiser": "pi is a global minimiser; the ensemble loss has local ones",
            "attained level": "lambda is the loss that the minimiser attains",
        },
        prove=lambda: prove_ensemble_on(GRAPHS),
        counterexamples={
            "positive alpha": _without_penalty_ensemble,
            "global minimiser": _local_minimum,
            "attained level": _another_level_ensemble,
        },
        controls={
            **CONTROLS,
            "without positive alpha": lambda: _another_minimiser(distillation, [(0, 1)]),
            "without global minimiser": lambda: _on_two_arms(distillation, [1.0, -3.0], -3.0),
            "without attained level": lambda: _on_two_arms(distillation, [1.0], 1.0, level=1.0),
            "the worst member": lambda: prove_ensemble_on(GRAPHS, lambda gram: losses.member_weights(-gram)),
            "all members alike": lambda: check_choice(lambda gram: np.full(2, sp.Rational(1, 2)), 2),
            "the smallest row sum": lambda: check_choice(_smallest_row_sum, 3),
            "the smallest row sum, on pairs": lambda: check_union(GRAPHS[1], MEMBERS[1], _smallest_row_sum),
            "the first two members only": lambda: check_choice(_first_two, 3),
            "the first two members only, on pairs": lambda: check_union(GRAPHS[1], MEMBERS[1], _first_two),
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
        domain="any set of policies; finitely many responses where solved; minimisers, no flow",
        losses=("logratio_margin", "bradley_terry", "dpo", "forward_kl", "pessimistic"),
        assumptions={
            "positive alpha": "alpha > 0",
            "attained level": "lambda is the loss that the minimiser attains",
        },
        prove=prove_dpo_on,
        counterexamples={"positive alpha": _without_penalty_dpo, "attained level": _another_level_dpo},
        controls={
            **CONTROLS,
            "without positive alpha": lambda: _another_minimiser(dpo, [(0, 1), (1, 0)]),
            "without attained level": lambda: _on_two_arms(dpo, [0.0], 0.0, level=float(np.log(2))),
            "the label reversed": lambda: prove_dpo_on(lambda margin, target, beta: dpo(-margin, target, beta)),
            "beta doubled": lambda: prove_dpo_on(lambda margin, target, beta: dpo(margin, target, 2 * beta)),
        },
        enumerate=lambda thorough: _programs(dpo, 1, thorough),
        properties=(nothing_closer_has_as_low_a_dpo_loss,),
    ),
)
