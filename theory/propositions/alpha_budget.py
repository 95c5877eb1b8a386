"""How far pessimism lets a policy go: both KLs together stay below C / alpha, with C a number of the loss alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given

from theory import budget, losses
from theory.algebra import simplify, vanishes
from theory.claim import Claim, require
from theory.preferences import Floats, PreferenceGraph
from theory.propositions.mass_transfer import PairLoss, distillation, dpo, ipo, slope_and_curvature
from theory.propositions.pessimism_certificate import (
    STRUCTURES,
    Instance,
    Penalty,
    Problem,
    exact_log,
    forward_kl,
    gradient_in_logits,
    problems,
    reverse_kl,
    reverse_penalty,
    solved,
)
from theory.strategies import matrices, vectors

ALPHA, SCALE = sp.symbols("alpha b", positive=True)
MARGIN, TARGET = sp.symbols("Delta delta", real=True)
OMEGA = sp.LambertW(sp.exp(-1))
"""The c with c e^c = 1 / e."""

MARGIN_LOSSES: tuple[PairLoss, ...] = (dpo, ipo, distillation)
CONSTANTS: dict[PairLoss, tuple[Any, Any]] = {
    dpo: (OMEGA, (1 + OMEGA) / SCALE),
    ipo: (1 / (8 * SCALE**2), 1 / (4 * SCALE)),
    distillation: (TARGET**2 / 2, TARGET / (2 * SCALE)),
}
"""Loss -> (C of a pair, the margin where it is reached), with `SCALE` in the place of beta or tau."""


def constant(loss: PairLoss, targets: Floats, weights: Floats, parameter: float) -> float:
    """C as `theory.budget` has it, of pairs whose weights sum to one; targets and weights [m]."""
    if loss is dpo:
        return budget.DPO
    if loss is ipo:
        return budget.ipo_constant(tau=parameter)
    return float(sum(w * budget.distillation_constant([t]) for w, t in zip(weights, targets, strict=True)))


# ---------------------------------------------------------------- checks of the proof


def check_divergence(
    graph: PreferenceGraph,
    loss: PairLoss,
    features: Any,
    *,
    penalty: Penalty = forward_kl,
    divergence: Callable[[Any, Any], Any] = lambda reverse, forward: reverse + forward,
) -> None:
    """J = (1 / alpha) (sum of w Delta (-f'(Delta)) + theta . gradient), at every theta; an optimum's gradient is 0.

    Args:
        graph: the pairs.
        loss: of a pair.
        features: [n, d], integers: the logits are log pi_ref + features @ theta; the identity matrix for tabular ones.
        penalty: what alpha weighs.
        divergence: (KL(pi || pi_ref), KL(pi_ref || pi)) -> J.
    """
    n, size = features.shape
    theta = np.array(sp.symbols(f"t0:{size}", real=True), dtype=object)
    logps = np.array(sp.symbols(f"a0:{n}", real=True), dtype=object)
    policy, ref = (np.array(sp.symbols(f"{x}0:{n}", positive=True), dtype=object) for x in "pq")
    normaliser = sp.Symbol("Z", real=True)  # log of E_ref exp(features @ theta)
    u = features.astype(object) @ theta - normaliser
    ref_logps = logps - u
    weights = sp.symbols(f"w0:{len(graph)}", positive=True)
    targets = sp.symbols(f"delta0:{len(graph)}", real=True)
    free = np.array(sp.symbols(f"c0:{n}", real=True), dtype=object)  # log pi_ref as the loss gets it

    pairs, data, products = list(zip(graph.edges.tolist(), weights, targets, strict=True)), sp.S.Zero, sp.S.Zero
    for (w, lo), weight, target in pairs:
        data += weight * loss(losses.logratio_margin(logps[w], logps[lo], free[w], free[lo]), target, SCALE)
        here = u[w] - u[lo]
        products -= weight * here * sp.diff(loss(MARGIN, target, SCALE), MARGIN).subs(MARGIN, here)
    objective = losses.pessimistic(data, penalty(ref, policy, logps - free), alpha=ALPHA)
    in_logits = gradient_in_logits(objective, logps, policy)
    at_policy = dict(zip(free, ref_logps, strict=True))
    gradient = features.T.astype(object) @ np.array([sp.expand(g.subs(at_policy)) for g in in_logits], dtype=object)

    found = divergence(reverse_kl(ref, policy, u), forward_kl(ref, policy, u))
    normalised = {simplex[-1]: 1 - sum(simplex[:-1]) for simplex in (policy, ref)}
    difference = sp.expand((ALPHA * found - products - theta @ gradient).subs(normalised))
    require(vanishes(difference), "J is not the sum over the pairs")


def check_constant(loss: PairLoss, bound: Any, at: Any) -> None:
    """C + z f'(z) >= 0 with equality at one margin: it is a convex function with a double zero there, over a positive.

    Args:
        loss: of a pair.
        bound: C, under test.
        at: the margin where it is reached.
    """
    excess = sp.together(simplify(bound + MARGIN * sp.diff(loss(MARGIN, TARGET, SCALE), MARGIN)))
    above, below = sp.fraction(excess)
    require(below.is_positive, f"the sign of {below} is not known")
    require(simplify(sp.diff(above, MARGIN, 2)).is_positive, "the excess is not convex")
    for order, what in ((0, "the bound is not reached"), (1, "the bound is crossed")):
        value = sp.expand(sp.diff(above, MARGIN, order).subs(MARGIN, at), power_exp=True)
        value = value.xreplace({sp.exp(OMEGA): sp.exp(-1) / OMEGA})  # what defines it
        require(vanishes(value), what)


def check_moves(graph: PreferenceGraph, loss: PairLoss, moved: Callable[[Any, Any, Any], Any]) -> None:
    """alpha (pi - pi_ref) is, response by response, the sum of w s over its wins minus that over its defeats, s = -f'.

    So a response that never loses cannot fall where s > 0; and as each pair stands in the rows of two responses, the
    l1 distance is at most 2 / alpha times the sum of w |s|.

    Args:
        graph: the pairs.
        loss: of a pair.
        moved: (sum over the wins, sum over the defeats, alpha) -> pi(y) - pi_ref(y), under test.
    """
    n = graph.n
    logps, ref_logps = (np.array(sp.symbols(f"{x}0:{n}", real=True), dtype=object) for x in "ac")
    policy, ref = (np.array(sp.symbols(f"{x}0:{n}", positive=True), dtype=object) for x in "pq")
    weights = sp.symbols(f"w0:{len(graph)}", positive=True)
    targets = sp.symbols(f"delta0:{len(graph)}", real=True)
    data, wins, defeats = sp.S.Zero, [sp.S.Zero] * n, [sp.S.Zero] * n
    for (w, lo), weight, target in zip(graph.edges.tolist(), weights, targets, strict=True):
        margin = losses.logratio_margin(logps[w], logps[lo], ref_logps[w], ref_logps[lo])
        data += weight * loss(margin, target, SCALE)
        flow = -weight * sp.diff(loss(MARGIN, target, SCALE), MARGIN).subs(MARGIN, margin)
        wins[w] += flow
        defeats[lo] += flow
    objective = losses.pessimistic(data, forward_kl(ref, policy, logps - ref_logps), alpha=ALPHA)
    gradient = gradient_in_logits(objective, logps, policy)
    normalised = {simplex[-1]: 1 - sum(simplex[:-1]) for simplex in (policy, ref)}
    for y in range(n):
        stationary = policy[y] - ref[y] - gradient[y] / ALPHA  # pi(y) - pi_ref(y) where the gradient is 0
        difference = sp.expand((stationary - moved(wins[y], defeats[y], ALPHA)).subs(normalised))
        require(vanishes(difference), f"response {y} moves otherwise")


def check_decreasing(loss: PairLoss) -> None:
    """f' < 0: every pair moves mass from the loser to the winner."""
    require(simplify(sp.diff(loss(MARGIN, TARGET, SCALE), MARGIN)).is_negative, "the slope may be positive")


def net(wins: Any, defeats: Any, alpha: Any) -> Any:
    """(wins - defeats) / alpha."""
    return (wins - defeats) / alpha


def prove() -> None:
    tabular = {name: np.eye(graph.n, dtype=int) for name, graph in STRUCTURES.items()}
    for name, graph in STRUCTURES.items():
        check_divergence(graph, dpo, tabular[name])
        check_moves(graph, dpo, net)
        check_divergence(graph, lambda margin, target, scale: sp.Function("f")(margin), tabular[name])
    linear = np.array([[1, 0], [2, -1], [0, 1]])
    for loss in MARGIN_LOSSES:
        check_divergence(STRUCTURES["chain"], loss, linear)
        check_constant(loss, *CONSTANTS[loss])
    for loss in (ipo, distillation):
        check_moves(STRUCTURES["cycle with a tail"], loss, net)
    check_decreasing(dpo)
    require(abs(float(sp.N(OMEGA, 30)) - budget.DPO) < 1e-16, f"theory.budget has {budget.DPO}")
    require(abs(budget.ipo_constant(tau=0.7) - float(CONSTANTS[ipo][0].subs(SCALE, 0.7))) < 1e-16, "IPO's is another")
    require(budget.distillation_constant([3.0]) == float(CONSTANTS[distillation][0].subs(TARGET, 3)), "another mean")


# ---------------------------------------------------------------- instances


def divergence_of(instance: Instance) -> Any:
    """J, nats."""
    u = instance.logratios
    return reverse_kl(instance.ref, instance.policy, u) + forward_kl(instance.ref, instance.policy, u)


def check_bound(instance: Instance, largest: Any, tolerance: float = 0.0) -> None:
    """J is at most C / alpha."""
    excess = sp.N(instance.alpha * divergence_of(instance) - largest)
    require(bool(excess <= tolerance), f"alpha J exceeds C by {float(excess):.3g}")


def check_directions(instance: Instance, graph: PreferenceGraph, tolerance: float = 0.0) -> None:
    """No response that never loses is below pi_ref, none that never wins above it."""
    for sign, others in ((1, graph.losers), (-1, graph.winners)):
        for y in set(range(graph.n)) - set(others.tolist()):
            move = sp.N(sign * (instance.policy[y] - instance.ref[y]))
            require(bool(move >= -tolerance), f"response {y} moves the wrong way, by {float(abs(move)):.3g}")


def two_arms(margin: Any, slope: Any, ref: Any, total_weight: Any = 1) -> Instance:
    """The two-arm problem with its optimum at this margin: total_weight s = alpha (pi(w) - pi_ref(w)) sets alpha.

    Args:
        margin: Delta.
        slope: s = -f' there.
        ref: pi_ref of the winner.
        total_weight: of the copies of the pair.
    """
    odds = ref / (1 - ref) * sp.exp(margin)
    winner = odds / (1 + odds)
    alpha = total_weight * slope / (winner - ref)
    policy, reference = (np.array([x, 1 - x], dtype=object) for x in (winner, sp.sympify(ref)))
    return Instance(lambda u: sp.S.Zero, policy, reference, alpha, sp.Integer(1), exact_log)


HALF = sp.Rational(1, 2)


def tight() -> Instance:
    """p-DPO, beta 1, uniform: the margin 1 + W(1/e), where J is the bound."""
    return two_arms(1 + OMEGA, dpo_slope(1 + OMEGA), HALF)


def offset() -> Instance:
    """softplus(-(Delta - 3)): a margin of 3 is asked for (as by an offset, or without the reference), at Delta = 1."""
    return two_arms(sp.Integer(1), dpo_slope(sp.Integer(-2)), HALF)


def dpo_slope(margin: Any) -> Any:
    """-f' of DPO at beta 1."""
    return -sp.diff(losses.dpo(MARGIN, beta=1), MARGIN).subs(MARGIN, margin)


def two_copies() -> Instance:
    """The tight problem's pair twice, summed."""
    return two_arms(1 + OMEGA, dpo_slope(1 + OMEGA), HALF, total_weight=2)


def curved_logits() -> Instance:
    """Logits (t, 0, t (2 - t)), uniform reference, pair 0 > 1, beta 1, stationary at t = 1, where the third is flat.

    So s = alpha (pi(0) - pi_ref(0)), which sets alpha.
    """
    e = sp.exp(1)
    policy = np.array([e, 1, e], dtype=object) / (2 * e + 1)
    ref = np.array([sp.Rational(1, 3)] * 3, dtype=object)
    alpha = dpo_slope(sp.Integer(1)) / (policy[0] - ref[0])
    return Instance(lambda u: sp.S.Zero, policy, ref, alpha, sp.Integer(1), exact_log)


def ipo_overshoots() -> tuple[Instance, PreferenceGraph]:
    """IPO with tau 1/2 (every margin is drawn to 1) on 0 > 1 > 2 < 3: what 2 loses to 1 takes it too far below 3.

    The policies are chosen, and the weights are what makes them stationary: the flow through each pair is w s.
    """
    policy, ref = (np.array(shares, dtype=object) / sp.Integer(100) for shares in ((60, 15, 6, 19), (40, 20, 20, 20)))
    instance = Instance(lambda u: sp.S.Zero, policy, ref, sp.S.One, sp.S.One, exact_log)
    gains, u = instance.policy - instance.ref, instance.logratios
    slope = -sp.diff(losses.ipo(MARGIN, tau=HALF), MARGIN)
    flows = {(0, 1): gains[0], (1, 2): gains[0] + gains[1], (3, 2): gains[3]}
    weights = [flow / slope.subs(MARGIN, u[w] - u[lo]) for (w, lo), flow in flows.items()]
    require(all(bool(w > 0) for w in weights), "a weight is negative")
    total = sum(weights)  # weights that sum to one, and alpha with them
    graph = PreferenceGraph(4, list(flows), [float(w / total) for w in weights])
    return replace(instance, alpha=1 / total), graph


def _exceeds(instance: Instance, largest: Any, what: str) -> str:
    product = sp.N(instance.alpha * divergence_of(instance))
    require(bool(product > largest), "J is within the bound")
    return f"{what}: alpha J = {float(product):.3f} above C = {float(largest):.3f}"


def _wrong_way() -> str:
    instance, graph = ipo_overshoots()
    require(bool(instance.policy[3] < instance.ref[3]), "3 does not fall")
    require(3 not in graph.losers, "3 loses")
    return "IPO, tau = 1/2, 0 > 1 > 2 < 3: the response 3, which never loses, falls from 0.20 to 0.19"


# ---------------------------------------------------------------- enumeration


def enumerate_instances(thorough: bool) -> str:
    """A conic solver's optima: the tight problem reaches the bound, all others stay within, and none moves wrongly."""
    import cvxpy as cp

    precision = {"solver": cp.CLARABEL, "tol_gap_abs": 1e-10, "tol_gap_rel": 1e-10, "tol_feas": 1e-10}
    targets, refs = np.array([1.0, -0.5, 0.8, 0.3]), np.array([[0.1, 0.3, 0.2, 0.4], [0.97, 0.01, 0.01, 0.01]])
    graphs = [graph for graph in STRUCTURES.values() if graph.n == 4]
    if thorough:
        graphs += [PreferenceGraph(4, [(0, 1), (0, 2), (3, 1)]), PreferenceGraph(4, [(0, 1), (1, 2), (2, 3), (0, 3)])]
    alphas = (0.02, 0.1, 0.5, 2.0) if thorough else (0.05, 0.5)
    count = 0
    for graph, ref, alpha, loss in product(graphs, refs, alphas, MARGIN_LOSSES):
        beta, weights, targeted = 0.7, graph.weights / graph.weights.sum(), targets[: len(graph)]
        u = cp.Variable(4)
        margins = graph.incidence @ u
        targets_of_squares = margins - 1 / (2 * beta), targeted - beta * margins
        cones = (cp.logistic(-beta * margins), *map(cp.square, targets_of_squares))
        objective = weights @ cones[MARGIN_LOSSES.index(loss)] - alpha * ref @ u
        cp.Problem(cp.Minimize(objective), [cp.log_sum_exp(u + np.log(ref)) <= 0]).solve(**precision)
        instance = Instance(lambda x: 0.0, ref * np.exp(u.value), ref, alpha, beta)
        check_bound(instance, constant(loss, targeted, weights, beta), 1e-6)
        slopes = slope_and_curvature(loss)[0](margins.value, targeted, beta)
        distance = np.abs(instance.policy - ref).sum() / 2
        # The bound is reached where no response is in two pairs; u is known to about the root of the gap.
        require(bool(distance <= weights @ np.abs(slopes) / alpha + 1e-5), f"the total variation is {distance}")
        if loss is dpo:
            check_directions(instance, graph, 1e-6)
        count += 1
    exact = tight()
    u = cp.Variable(2)
    pair = cp.logistic(u[1] - u[0]) - float(exact.alpha) * cp.sum(u) / 2
    cp.Problem(cp.Minimize(pair), [cp.log_sum_exp(u) <= np.log(2)]).solve(**precision)
    found = replace(exact, policy=np.exp(u.value) / 2, ref=np.full(2, 0.5), log=np.log)
    reached = float(exact.alpha * divergence_of(found))
    require(abs(reached - budget.DPO) < 1e-5, f"the tight problem reaches {reached}")
    return f"{count + 1} exponential-cone programs, 2 and 4 responses; one reaches the bound"


# ---------------------------------------------------------------- properties


@given(problems())
def optima_stay_within_the_budget(problem: Problem) -> None:
    """NumPy, certified optima: J, the total variation, and for DPO which way each response moves."""
    graph, loss, targets, _, beta, alpha = problem
    instance = solved(problem)
    largest = constant(loss, targets, graph.weights, beta)
    check_bound(instance, largest, 1e-9 * (1 + alpha + largest))
    slopes = slope_and_curvature(loss)[0](graph.margins(instance.logratios), targets, beta)
    distance, flow = np.abs(instance.policy - instance.ref).sum() / 2, graph.weights @ np.abs(slopes)
    assert alpha * distance <= flow + 1e-9 * (1 + alpha + flow)
    if loss is dpo:
        check_directions(instance, graph, 1e-9 * (1 + 1 / alpha))


@given(problems(), matrices(6, 2, 2.0), vectors(2, 2.0))
def linear_logits_obey_the_identity(problem: Problem, features: Floats, theta: Floats) -> None:
    """torch: alpha J is the sum over the pairs plus theta . gradient, by autograd, wherever the linear logits are."""
    import torch

    graph, loss, targets, ref_logps, beta, alpha = problem
    parameters = torch.tensor(theta, requires_grad=True)
    ref, weights, given_targets = torch.tensor(ref_logps), torch.tensor(graph.weights.copy()), torch.tensor(targets)
    logps = torch.log_softmax(ref + torch.tensor(features[: graph.n]) @ parameters, 0)
    margins = graph.margins(logps - ref)
    pairs, penalty = loss(margins, given_targets, beta), (ref.exp() * losses.forward_kl(logps - ref)).sum()
    total = losses.pessimistic((weights * pairs).sum(), penalty, alpha=alpha)
    (slopes,) = torch.autograd.grad(pairs.sum(), margins, retain_graph=True)
    (gradient,) = torch.autograd.grad(total, parameters)
    products = -float((weights * margins * slopes).sum().detach())
    u = (logps - ref).detach()
    found = float(((logps.detach().exp() - ref.exp()) * u).sum())
    residual = float(gradient @ parameters.detach())
    scale = 1 + alpha * (1 + abs(found)) + abs(products) + abs(residual)
    assert abs(alpha * found - products - residual) <= 1e-10 * scale


PAIR = STRUCTURES["one pair, one unseen"]
CLAIMS = (
    Claim(
        id="alpha-budget",
        source="ours",
        statement=(
            "At the optimum of mean loss + alpha KL(pi_ref || pi), J = KL(pi || pi_ref) + KL(pi_ref || pi) is the mean "
            "of -Delta f'(Delta) over alpha, so at most C / alpha, C = sup -z f'(z): W(1/e) = 0.2785 for DPO whatever "
            "beta, data and pi_ref (and reached), E[delta^2] / 2 for distillation, 1 / (8 tau^2) for IPO. It holds for "
            "all policies, and for every family with logits linear in the parameters and pi_ref at zero. Over all "
            "policies, the total variation is at most the mean |f'(Delta)| / alpha, and under p-DPO a response that "
            "never loses never falls below pi_ref, and one that never wins never rises above it."
        ),
        formula=(
            r"J=\tfrac1\alpha\,\mathbb E[-\Delta f'(\Delta)]\le\tfrac C\alpha,\quad C_{\rm DPO}=W(1/e),\quad "
            r"C_{\rm distill}=\tfrac12\mathbb E\,\delta^2,\quad C_{\rm IPO}=\tfrac1{8\tau^2}"
        ),
        domain="finite responses, full-support reference; tabular policies, J also for log-linear ones around pi_ref",
        losses=("dpo", "ipo", "distillation", "forward_kl", "pessimistic", "logratio_margin"),
        assumptions={
            "log-ratio margins": "the loss is of log-ratio margins against pi_ref, without an offset",
            "forward KL": "the penalty is KL(pi_ref || pi)",
            "weights sum to one": "the pairs' losses are averaged; summed, C is multiplied by the total weight",
            "linear logits": "log pi_ref plus a linear function of the parameters, as are tabular logits",
            "decreasing loss": "f' < 0, as DPO's; for the direction in which responses move",
        },
        prove=prove,
        counterexamples={
            "log-ratio margins": lambda: _exceeds(offset(), OMEGA, "softplus(3 - Delta), 2 arms, at Delta = 1"),
            "forward KL": lambda: _exceeds(reverse_penalty()[0], OMEGA, "DPO, KL(pi || pi_ref), 2 arms, at Delta = 1"),
            "weights sum to one": lambda: _exceeds(two_copies(), OMEGA, "one pair seen twice, summed"),
            "linear logits": lambda: _exceeds(curved_logits(), OMEGA, "logits (t, 0, t (2 - t)), pair 0 > 1, at t = 1"),
            "decreasing loss": _wrong_way,
        },
        controls={
            "without log-ratio margins": lambda: check_bound(offset(), OMEGA),
            "without forward KL": lambda: check_bound(reverse_penalty()[0], OMEGA),
            "without weights sum to one": lambda: check_bound(two_copies(), OMEGA),
            "without linear logits": lambda: check_bound(curved_logits(), OMEGA),
            "without decreasing loss": lambda: check_directions(*ipo_overshoots()),
            "reverse KL in the identity": lambda: check_divergence(PAIR, dpo, np.eye(3, dtype=int), penalty=reverse_kl),
            "forward KL alone": lambda: check_divergence(
                PAIR, dpo, np.eye(3, dtype=int), divergence=lambda reverse, forward: 2 * forward
            ),
            "a smaller constant": lambda: check_constant(dpo, sp.Rational(1, 4), (1 + OMEGA) / SCALE),
            "a larger constant": lambda: check_constant(dpo, sp.Rational(1, 3), (1 + OMEGA) / SCALE),
            "a constant with beta": lambda: check_constant(dpo, SCALE * OMEGA, (1 + OMEGA) / SCALE),
            "E[delta^2]": lambda: check_constant(distillation, TARGET**2, TARGET / (2 * SCALE)),
            "1 / (4 tau^2)": lambda: check_constant(ipo, 1 / (4 * SCALE**2), 1 / (4 * SCALE)),
            "wins and defeats exchanged": lambda: check_moves(PAIR, dpo, lambda wins, lost, a: net(lost, wins, a)),
            "alpha for 1 / alpha": lambda: check_moves(PAIR, dpo, lambda wins, defeats, a: net(wins, defeats, 1 / a)),
            "defeats forgotten": lambda: check_moves(
                STRUCTURES["chain"], dpo, lambda wins, defeats, a: net(wins, 0, a)
            ),
            "IPO decreases": lambda: check_decreasing(ipo),
        },
        enumerate=enumerate_instances,
        properties=(optima_stay_within_the_budget, linear_logits_obey_the_identity),
    ),
)
