"""What a solved pessimistic objective guarantees about *every* reward, and over which rewards its policy is max-min.

With v = r / beta, everything follows from one identity, true at any policy: the advantage under r is beta J minus
(beta / alpha) (f(v) - lambda), plus (beta / alpha) times how far f lies above its tangent at u (nothing negative where
f is convex), plus (beta / alpha) g.(v - u) with g the objective's gradient in the logits, which is 0 at the optimum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import losses
from theory.algebra import simplify, vanishes
from theory.certificates import policy_kkt
from theory.claim import Claim, require
from theory.preferences import Floats, PreferenceGraph
from theory.propositions.mass_transfer import PairLoss, distillation, dpo, ipo, optimum, slope_and_curvature
from theory.strategies import log_policies, positive, preference_graphs, vectors

ALPHA, BETA, SCALE = sp.symbols("alpha beta b", positive=True)
MARGIN, TARGET = sp.symbols("Delta delta", real=True)

MARGIN_LOSSES: tuple[PairLoss, ...] = (dpo, ipo, distillation)
STRUCTURES = {
    "one pair, one unseen": PreferenceGraph(3, [(0, 1)]),
    "chain": PreferenceGraph.chain(3),
    "a pair both ways, and another": PreferenceGraph(4, [(0, 1), (1, 0), (2, 3)]),
    "cycle with a tail": PreferenceGraph(4, [(0, 1), (1, 2), (2, 0), (2, 3)]),
}

Vector = Any
"""[n], of numbers or of SymPy expressions."""
Guarantee = Callable[[Any, Any, Any, Any, Any, Any], Any]
"""(KL(pi || pi_ref), KL(pi_ref || pi), f(r / beta), lambda, alpha, beta) -> lower bound of the advantage under r."""
Penalty = Callable[[Vector, Vector, Vector], Any]
"""(pi_ref, pi, log-ratios), each [n] -> what alpha weighs."""


def guarantee(reverse: Any, forward: Any, loss: Any, level: Any, alpha: Any, beta: Any) -> Any:
    """beta J - (beta / alpha) (f(r / beta) - lambda), J = KL(pi || pi_ref) + KL(pi_ref || pi)."""
    return beta * (reverse + forward) - beta / alpha * (loss - level)


def forward_kl(ref: Vector, policy: Vector, logratios: Vector) -> Any:
    """KL(pi_ref || pi), exactly."""
    return sum(share * losses.forward_kl(x) for share, x in zip(ref, logratios, strict=True))


def reverse_kl(ref: Vector, policy: Vector, logratios: Vector) -> Any:
    """KL(pi || pi_ref), exactly."""
    return -forward_kl(policy, ref, logratios)


def gradient_in_logits(objective: Any, logps: Vector, policy: Vector) -> list[Any]:
    """Through a softmax, d log pi_z / d logit_y = [z = y] - pi_y. The objective may hold log pi and pi as symbols."""
    slopes = [sp.diff(objective, x) + sp.diff(objective, p) * p for x, p in zip(logps, policy, strict=True)]
    return [slope - share * sum(slopes) for slope, share in zip(slopes, policy, strict=True)]


# ---------------------------------------------------------------- the identity, on a structure


def check_identity(
    graph: PreferenceGraph,
    loss: PairLoss,
    *,
    judged: PreferenceGraph | None = None,
    others: Callable[[Vector], Any] = lambda logratios: sp.S.Zero,
    penalty: Penalty = forward_kl,
    bound: Guarantee = guarantee,
) -> None:
    """The identity of the module's head on a graph, with all weights, targets, policies and rewards free symbols.

    Args:
        graph: the pairs of the objective that pi is at, or not at, the optimum of.
        loss: of a pair.
        judged: the pairs on which the reward's loss is taken; those of the objective.
        others: log-ratios [n] -> what the data term has beside the pairs' losses; nothing.
        penalty: what alpha weighs.
        bound: the guarantee under test.
    """
    n = graph.n
    logps, ref_logps, rewards = (np.array(sp.symbols(f"{x}0:{n}", real=True), dtype=object) for x in "acr")
    policy, ref = (np.array(sp.symbols(f"{x}0:{n}", positive=True), dtype=object) for x in "pq")
    weights = sp.symbols(f"w0:{len(graph)}", positive=True)
    targets = sp.symbols(f"delta0:{len(graph)}", real=True)
    normalised = {simplex[-1]: 1 - sum(simplex[:-1]) for simplex in (policy, ref)}

    def total(pairs: PreferenceGraph, margin: Callable[[int, int], Any]) -> Any:
        edges = zip(pairs.edges.tolist(), weights, targets, strict=True)
        return sum(weight * loss(margin(w, lo), target, SCALE) for (w, lo), weight, target in edges)

    def policy_margin(w: int, lo: int) -> Any:
        return losses.logratio_margin(logps[w], logps[lo], ref_logps[w], ref_logps[lo])

    def reward_margin(w: int, lo: int) -> Any:
        return losses.logratio_margin(rewards[w] / BETA, rewards[lo] / BETA, sp.S.Zero, sp.S.Zero)

    u = logps - ref_logps
    level = total(graph, policy_margin) + others(u)
    objective = losses.pessimistic(level, penalty(ref, policy, u), alpha=ALPHA)
    gradient = gradient_in_logits(objective, logps, policy)

    above_tangent = sp.S.Zero
    for (w, lo), weight, target in zip(graph.edges.tolist(), weights, targets, strict=True):
        here, there = policy_margin(w, lo), reward_margin(w, lo)
        slope = sp.diff(loss(MARGIN, target, SCALE), MARGIN).subs(MARGIN, here)
        above_tangent += weight * (loss(there, target, SCALE) - loss(here, target, SCALE) - slope * (there - here))

    loss_of_reward = total(judged or graph, reward_margin) + others(rewards / BETA)
    promised = bound(reverse_kl(ref, policy, u), forward_kl(ref, policy, u), loss_of_reward, level, ALPHA, BETA)
    slack = (policy - ref) @ rewards - promised
    explained = BETA / ALPHA * (above_tangent + sum(g * x for g, x in zip(gradient, rewards / BETA - u, strict=True)))
    difference = sp.expand((slack - explained).subs(normalised))
    require(vanishes(difference), "the slack is not the distance from the tangent")


def check_convexity(loss: PairLoss) -> None:
    """f'' > 0, so that f lies above its tangents (Taylor's remainder, the integral of (b - t) f''(t))."""
    bend = sp.factor(simplify(sp.diff(loss(MARGIN, TARGET, SCALE), MARGIN, 2)))
    require(bend.is_positive, "not convex in the margin")


def check_loss_of_reward(loss: PairLoss, stated: Callable[[Any, Any], Any]) -> None:
    """What f(r / beta) is, pair by pair, as a statement about the reward: beta is not in it.

    Args:
        loss: of a pair, with parameter beta.
        stated: (margin of the reward, the pair's own reward margin) -> value.
    """
    difference = loss(MARGIN / BETA, TARGET, BETA) - stated(MARGIN, TARGET)
    require(vanishes(sp.expand_log(difference, force=True)), "the reward's loss is another")


def check_best_response(n: int, reward: Callable[[Any, Any], Any]) -> None:
    """Against r = beta u, a policy x earns beta KL(pi_ref || pi) - beta KL(x || pi): most at x = pi, and only there.

    Args:
        n: number of responses.
        reward: (log-ratios, beta) -> the reward that the adversary answers with.
    """
    others, ref, policy = (np.array(sp.symbols(f"{x}0:{n}", positive=True), dtype=object) for x in "xqp")
    logs = [np.array([sp.log(x) for x in simplex], dtype=object) for simplex in (others, ref, policy)]
    u = logs[2] - logs[1]
    value = (others - ref) @ reward(u, BETA) - BETA * reverse_kl(ref, others, logs[0] - logs[1])
    claimed = BETA * (forward_kl(ref, policy, u) - reverse_kl(policy, others, logs[0] - logs[2]))
    require(sp.expand(value - claimed) == 0, "the best response to the reward is another policy")


def log_loss(margin: Any, target: Any) -> Any:
    """-log of the Bradley-Terry probability of the label."""
    return -sp.log(1 / (1 + sp.exp(-margin)))


def squared_error(margin: Any, target: Any) -> Any:
    """Of the reward's margin against the pair's target."""
    return (margin - target) ** 2


def prove() -> None:
    for graph in STRUCTURES.values():
        check_identity(graph, dpo)
        check_identity(graph, lambda margin, target, scale: sp.Function("f")(margin))
    for loss in MARGIN_LOSSES[1:]:
        check_identity(STRUCTURES["chain"], loss)
    for loss in MARGIN_LOSSES:
        check_convexity(loss)
    check_loss_of_reward(dpo, log_loss)
    check_loss_of_reward(lambda margin, target, beta: losses.bradley_terry(beta * margin), log_loss)
    check_loss_of_reward(distillation, squared_error)
    check_loss_of_reward(
        lambda margin, target, beta: BETA**2 * losses.ipo(margin, tau=beta * SCALE),
        lambda margin, target: (margin - 1 / (2 * SCALE)) ** 2,
    )
    for n in (2, 4):
        check_best_response(n, lambda u, beta: beta * u)


# ---------------------------------------------------------------- instances


@dataclass(frozen=True)
class Instance:
    """A policy that minimises something, and what it minimises; numbers of one library (SymPy's are exact)."""

    data: Callable[[Any], Any]
    """Log-ratios [n] -> f."""
    policy: Any
    """pi, [n]."""
    ref: Any
    """pi_ref, [n]."""
    alpha: Any
    beta: Any
    log: Callable[[Any], Any] = np.log

    @property
    def logratios(self) -> Any:
        """u, [n]."""
        return self.log(self.policy) - self.log(self.ref)

    def slack(self, reward: Any) -> Any:
        """Advantage under a reward [n] minus what is guaranteed; NumPy or SymPy."""
        u = self.logratios
        promised = guarantee(
            reverse_kl(self.ref, self.policy, u),
            forward_kl(self.ref, self.policy, u),
            self.data(reward / self.beta),
            self.data(u),
            self.alpha,
            self.beta,
        )
        return (self.policy - self.ref) @ reward - promised


def check_instance(instance: Instance, rewards: Sequence[Any], tolerance: float = 0.0) -> None:
    """No reward earns less than its guarantee, and beta u earns exactly that."""
    for reward in rewards:
        slack = instance.slack(reward)
        require(bool(slack >= -tolerance), f"the reward {reward} earns {float(slack):.3g} more than guaranteed")
    tight = instance.slack(instance.beta * instance.logratios)
    require(bool(abs(simplify(tight)) <= tolerance), f"beta u earns {float(tight):.1e} more than guaranteed")


def exact_log(values: Any) -> Any:
    """SymPy's logarithm of each entry."""
    return np.array([sp.log(x) for x in values], dtype=object)


def _exact(*values: Any) -> Any:
    return np.array([sp.sympify(x) for x in values], dtype=object)


def two_rewards() -> tuple[Instance, list[Any]]:
    """Two arms, uniform reference, members with margins 1 and -1: Delta = 1/2 is the optimum of e-DPO, and so is -1/2.

    For the member 1, -2 (1 - Delta) + alpha (sigma(Delta) - 1/2) = 0 sets alpha.
    """
    winner = 1 / (1 + sp.exp(-sp.Rational(1, 2)))
    alpha = 1 / (winner - sp.Rational(1, 2))
    members = np.array([[sp.Integer(1)], [sp.Integer(-1)]], dtype=object)

    def data(u: Any) -> Any:
        return losses.ensemble_min(np.array([simplify(u[0] - u[1])], dtype=object), members, beta=1)[0]

    instance = Instance(data, _exact(winner, 1 - winner), _exact("1/2", "1/2"), alpha, sp.Integer(1), exact_log)
    return instance, [-instance.logratios]


def supervised() -> tuple[Instance, list[Any]]:
    """-log pi of the first of two arms + KL: the optimum (3/4, 1/4). A constant reward is loved by the data term."""
    return (
        Instance(lambda u: -u[0], _exact("3/4", "1/4"), _exact("1/2", "1/2"), sp.Integer(1), sp.Integer(1), exact_log),
        [_exact(1, 1)],
    )


def reverse_penalty() -> tuple[Instance, list[Any]]:
    """Two arms, uniform reference, DPO with KL(pi || pi_ref): (1 - p) (alpha p Delta - 1) = 0 at p = sigma(Delta)."""
    winner = 1 / (1 + sp.exp(-1))
    return (
        Instance(
            lambda u: losses.dpo(u[0] - u[1], beta=1),
            _exact(winner, 1 - winner),
            _exact("1/2", "1/2"),
            1 / winner,
            sp.Integer(1),
            exact_log,
        ),
        [_exact("9/10", 0)],
    )


def shared_parameter() -> tuple[Instance, list[Any]]:
    """Logits (t, 0, t), uniform reference, pair 0 > 1: alpha such that t = 1 is optimal; the unseen arm has risen."""
    e = sp.exp(1)
    alpha = (1 / (1 + e)) / (2 * e / (2 * e + 1) - sp.Rational(2, 3))
    return (
        Instance(
            lambda u: losses.dpo(u[0] - u[1], beta=1),
            _exact(e, 1, e) / (2 * e + 1),
            _exact("1/3", "1/3", "1/3"),
            alpha,
            sp.Integer(1),
            exact_log,
        ),
        [_exact(1, 0, -10)],
    )


def _earns(instance: Instance, rewards: list[Any], what: str) -> str:
    """Describes an instance whose reward earns less than is guaranteed to it."""
    slack = instance.slack(rewards[0])
    require(bool(slack < 0), "the guarantee holds")
    return f"{what}: the reward {tuple(map(str, rewards[0].tolist()))} earns {float(-slack):.3g} less than guaranteed"


def _not_convex() -> str:
    instance, rewards = two_rewards()
    u = instance.logratios
    require(vanishes(instance.data(-u) - instance.data(u)), "-u fits another member as badly")
    worst = (instance.policy - instance.ref) @ -u - reverse_kl(instance.ref, instance.policy, u)
    return _earns(instance, rewards, "e-DPO, members (1, 0), (0, 1)") + (
        f"; worst case of pi* over S_lambda {float(worst):.3f}, of pi_ref 0"
    )


def adversary(
    graph: PreferenceGraph, loss: PairLoss, targets: Floats, ref: Floats, *, beta: float, alpha: float
) -> tuple[float, float]:
    """(worst advantage over the rewards that fit as well as beta u, beta J), both by exponential-cone programs."""
    import cvxpy as cp

    def fit(log_ratios: Any) -> Any:
        margins = graph.incidence @ log_ratios
        cones = (
            cp.logistic(-beta * margins),
            cp.square(margins - 1 / (2 * beta)),
            cp.square(targets - beta * margins),
        )
        return graph.weights @ cones[MARGIN_LOSSES.index(loss)]

    precision = {"solver": cp.CLARABEL, "tol_gap_abs": 1e-9, "tol_gap_rel": 1e-9, "tol_feas": 1e-9}
    u = cp.Variable(graph.n)
    solved = fit(u)
    cp.Problem(cp.Minimize(solved - alpha * ref @ u), [cp.log_sum_exp(u + np.log(ref)) <= 0]).solve(**precision)
    moved = ref * np.expm1(u.value)
    reward = cp.Variable(graph.n)
    inside = [fit(reward / beta) <= float(solved.value), cp.sum(reward) == 0]
    cp.Problem(cp.Minimize(moved @ reward), inside).solve(**precision)
    return float(moved @ reward.value), beta * float(moved @ u.value)


def enumerate_instances(thorough: bool) -> str:
    """A conic solver looks for the reward of S_lambda under which the policy earns least."""
    targets, ref = np.array([1.0, -0.5, 0.8, 0.3]), np.array([0.1, 0.3, 0.2, 0.4])
    graphs = (
        PreferenceGraph(4, [(0, 1), (1, 2), (2, 0), (2, 3)], [0.4, 0.3, 0.2, 0.1]),
        PreferenceGraph(4, [(0, 1), (1, 2), (0, 2), (2, 3)], [0.2, 0.1, 0.6, 0.1]),
    )
    instances = list(product(graphs, (0.03, 0.1, 0.3, 1.0, 3.0) if thorough else (0.1, 1.0), MARGIN_LOSSES))
    for graph, alpha, loss in instances:
        worst, value = adversary(graph, loss, targets, ref, beta=0.7, alpha=alpha)
        require(abs(worst - value) < 1e-6, f"the adversary leaves {worst}, beta J is {value}, at alpha {alpha}")
    return f"{len(instances)} adversaries as exponential-cone programs, 4 responses: beta J to 1e-6"


# ---------------------------------------------------------------- properties

Problem = tuple[PreferenceGraph, PairLoss, Floats, Floats, float, float]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Graph, loss, targets, log pi_ref, beta, alpha; a response or two that no pair mentions."""
    seen = draw(preference_graphs(max_responses=4))
    graph = PreferenceGraph(seen.n + draw(st.integers(0, 2)), seen.edges, seen.weights / seen.weights.sum())
    loss, targets = draw(st.sampled_from(MARGIN_LOSSES)), draw(vectors(len(graph), 2.0))
    return graph, loss, targets, draw(log_policies(graph.n, 2.0)), draw(positive(0.2, 4)), draw(positive(0.1, 10))


def solved(problem: Problem) -> Instance:
    """The instance at the certified optimum."""
    graph, loss, targets, ref_logps, beta, alpha = problem
    u = optimum(graph, loss, targets=targets, beta=beta, ref_logps=ref_logps, alpha=alpha)
    slope = graph.incidence.T @ (graph.weights * slope_and_curvature(loss)[0](graph.margins(u), targets, beta))
    scale = 1 + alpha + np.abs(slope).max()
    assert policy_kkt(ref_logps + u, slope - alpha * np.exp(ref_logps)).worst <= 1e-9 * scale
    return Instance(
        lambda x: graph.weights @ loss(graph.margins(x), targets, beta),
        np.exp(ref_logps + u),
        np.exp(ref_logps),
        alpha,
        beta,
    )


@given(problems(), st.data())
def no_reward_earns_less(problem: Problem, data: st.DataObject) -> None:
    """NumPy: at certified optima, for rewards near beta u and far from it; and the closer, the tighter."""
    instance, beta, n = solved(problem), problem[4], problem[0].n
    direction, size = data.draw(vectors(n)), data.draw(st.sampled_from([1e-3, 1.0, 30.0]))
    near = beta * instance.logratios + size * direction
    scale = (beta / instance.alpha) * (1 + instance.data(near / beta)) + np.abs(near).max()
    check_instance(instance, [near, near + 5, direction], tolerance=1e-9 * scale)


@given(problems(), st.data())
def any_policy_has_the_guarantee_less_its_residual(problem: Problem, data: st.DataObject) -> None:
    """torch: away from the optimum the guarantee holds less (1/alpha) g.(r - beta u), g by autograd in the logits."""
    import torch

    graph, loss, targets, ref_logps, beta, alpha = problem
    logits = torch.tensor(data.draw(log_policies(graph.n, 2.0)), requires_grad=True)
    ref, given_targets, weights = torch.tensor(ref_logps), torch.tensor(targets), torch.tensor(graph.weights.copy())
    logratios = torch.log_softmax(logits, 0) - ref
    fit = (weights * loss(graph.margins(logratios), given_targets, beta)).sum()
    penalty = (ref.exp() * losses.forward_kl(logratios)).sum()
    (gradient,) = torch.autograd.grad(losses.pessimistic(fit, penalty, alpha=alpha), logits)
    policy = np.exp((ref + logratios).detach().numpy())
    instance = Instance(
        lambda x: graph.weights @ loss(graph.margins(x), targets, beta), policy, np.exp(ref_logps), alpha, beta
    )
    reward = data.draw(vectors(graph.n))
    residual = float(gradient.numpy() @ (reward - beta * instance.logratios)) / alpha
    scale = (beta / alpha) * (1 + instance.data(reward / beta) + fit.item()) + abs(residual)
    assert instance.slack(reward) >= residual - 1e-10 * scale


CLAIMS = (
    Claim(
        id="pessimism-certificate",
        source="ours; joins [F] A.7, Proposition 4 (forward KL) with [F] eq 8 (reverse KL)",
        statement=(
            "Let pi* minimise f(u) + alpha KL(pi_ref || pi), f a convex differentiable loss of the margins, and lambda "
            "= f(u*). Under every reward r its advantage over pi_ref is at least beta J - (beta / alpha) (f(r / beta) "
            "- lambda), J the sum of both KLs, with equality at r = beta u*. So pi* is the max-min policy of [F] eq 8 "
            "over the rewards with f(r / beta) <= lambda, with value beta KL(pi_ref || pi*); for p-DPO those are the "
            "rewards whose Bradley-Terry log-loss on the data is at most lambda. At any other policy the guarantee "
            "holds with (1 / alpha) g.(r - beta u) added, g the objective's gradient in the logits. For e-DPO with two "
            "members it fails."
        ),
        formula=(
            r"\mathbb E_{\pi^*}[r]-\mathbb E_{\pi_{\rm ref}}[r]\ \ge\ \beta J-\tfrac\beta\alpha\bigl(f(r/\beta)-\lambda"
            r"\bigr),\quad J=\mathrm{KL}(\pi^*\Vert\pi_{\rm ref})+\mathrm{KL}(\pi_{\rm ref}\Vert\pi^*)"
        ),
        domain="finite responses, full-support reference, tabular policies; the residual's gradient is in logits",
        losses=("dpo", "bradley_terry", "ipo", "distillation", "forward_kl", "pessimistic", "logratio_margin"),
        assumptions={
            "convex": "f is convex in the margins: one reward, not the best of several",
            "margins only": "f depends on the policy through log-ratio margins only",
            "forward KL": "the penalty is KL(pi_ref || pi)",
            "tabular optimum": "pi* is the minimiser over all policies, not over a family of them",
        },
        prove=prove,
        counterexamples={
            "convex": _not_convex,
            "margins only": lambda: _earns(*supervised(), "supervised loss -log pi(y_w)"),
            "forward KL": lambda: _earns(*reverse_penalty(), "DPO with KL(pi || pi_ref), 2 arms, beta = 1"),
            "tabular optimum": lambda: _earns(*shared_parameter(), "logits (t, 0, t), pair 0 > 1, t = 1 optimal"),
        },
        controls={
            "without convex": lambda: check_instance(*two_rewards()),
            "without margins only": lambda: check_instance(*supervised()),
            "without forward KL": lambda: check_instance(*reverse_penalty()),
            "without tabular optimum": lambda: check_instance(*shared_parameter()),
            "concave loss": lambda: check_convexity(lambda m, d, b: -dpo(m, d, b)),
            "sigmoid loss": lambda: check_convexity(lambda m, d, b: 1 / (1 + sp.exp(b * m))),
            "supervised term in the identity": lambda: check_identity(
                PreferenceGraph.chain(2), dpo, others=lambda u: -u[0]
            ),
            "reverse KL in the identity": lambda: check_identity(PreferenceGraph.chain(2), dpo, penalty=reverse_kl),
            "reward judged on reversed pairs": lambda: check_identity(
                PreferenceGraph.chain(2), dpo, judged=PreferenceGraph(2, [(1, 0)])
            ),
            "reward judged on another pair": lambda: check_identity(
                STRUCTURES["chain"], dpo, judged=PreferenceGraph(3, [(0, 1), (0, 2)])
            ),
            "forward KL alone for J": lambda: check_identity(
                PreferenceGraph.chain(2), dpo, bound=lambda rev, fwd, f, level, a, b: guarantee(0, fwd, f, level, a, b)
            ),
            "beta left out of the slack": lambda: check_identity(
                PreferenceGraph.chain(2),
                dpo,
                bound=lambda rev, fwd, f, level, a, b: b * (rev + fwd) - (f - level) / a,
            ),
            "alpha for 1 / alpha": lambda: check_identity(
                PreferenceGraph.chain(2),
                dpo,
                bound=lambda rev, fwd, f, level, a, b: guarantee(rev, fwd, f, level, 1 / a, b),
            ),
            "a worse fit earns more": lambda: check_identity(
                PreferenceGraph.chain(2),
                dpo,
                bound=lambda rev, fwd, f, level, a, b: guarantee(rev, fwd, level, f, a, b),
            ),
            "twice the label's log-loss": lambda: check_loss_of_reward(dpo, lambda m, d: 2 * log_loss(m, d)),
            "the loser's probability": lambda: check_loss_of_reward(dpo, lambda m, d: log_loss(-m, d)),
            "adversary answers u": lambda: check_best_response(3, lambda u, beta: u),
            "adversary answers -beta u": lambda: check_best_response(3, lambda u, beta: -beta * u),
        },
        enumerate=enumerate_instances,
        properties=(no_reward_earns_less, any_policy_has_the_guarantee_less_its_residual),
    ),
)
