"""Where pessimism puts probability: losses of margins with a forward-KL penalty move mass along the pairs only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import losses
from theory.algebra import simplify, vanishes
from theory.certificates import policy_kkt, reaches
from theory.claim import Claim, require
from theory.preferences import Floats, PreferenceGraph
from theory.strategies import log_policies, positive, preference_graphs, vectors

PairLoss = Callable[[Any, Any, Any], Any]
"""(log-ratio margin, reward margin, beta) -> unreduced loss; any backend."""
Transfer = Callable[[Any, Any, Any], Any]
"""(pi_ref(y), dL/du_y, alpha) -> pi(y)."""

MARGIN, TARGET = sp.symbols("Delta delta", real=True)
BETA, ALPHA = sp.symbols("beta alpha", positive=True)


def dpo(margin: Any, target: Any, beta: Any) -> Any:
    """DPO; the reward margin does not enter."""
    return losses.dpo(margin, beta=beta)


def ipo(margin: Any, target: Any, beta: Any) -> Any:
    """IPO with tau in the place of beta."""
    return losses.ipo(margin, tau=beta)


def distillation(margin: Any, target: Any, beta: Any) -> Any:
    """Reward distillation."""
    return losses.distillation(margin, target, beta=beta)


MARGIN_LOSSES: tuple[PairLoss, ...] = (dpo, ipo, distillation)


def transfer(ref: Any, slope: Any, alpha: Any) -> Any:
    """pi(y) = pi_ref(y) - (1/alpha) dL/du_y."""
    return ref - slope / alpha


# ---------------------------------------------------------------- a tabular solver, judged by certificates only


@cache
def slope_and_curvature(loss: PairLoss) -> tuple[Callable[..., Floats], Callable[..., Floats]]:
    """First and second derivative in the margin, differentiated by SymPy: (margin, reward margin, beta) -> values."""
    value = loss(MARGIN, TARGET, BETA)
    first, second = (simplify(sp.diff(value, MARGIN, order)) for order in (1, 2))
    variables, modules = (MARGIN, TARGET, BETA), [{"exp": _exp}, "numpy"]
    return sp.lambdify(variables, first, modules), sp.lambdify(variables, second, modules)


def _exp(values: Any) -> Any:
    """Up to e^350, whose square is a float64 still: past it a sigmoid's slope and curvature are below 1e-150, and
    would be inf / inf."""
    return np.exp(np.minimum(values, 350.0))


def optimum(
    graph: PreferenceGraph, loss: PairLoss, *, targets: Floats, beta: float, ref_logps: Floats, alpha: float
) -> Floats:
    """Log-ratios u minimising sum_e w_e loss(Delta_e) + alpha KL(pi_ref || pi), by damped Newton steps. Float64.

    The normalisation enters as alpha (sum_y pi_ref(y) e^u(y) - 1). Margins do not see a shift of u, so at the
    stationary point of that unconstrained, convex sum the probabilities add up to one. With alpha = 0 nothing fixes
    the shift; the smallest u is returned, not normalised.

    Args:
        graph: n responses, m weighted edges.
        loss: convex in the margin.
        targets: reward margins, [m].
        beta: the loss's parameter.
        ref_logps: [n], finite, nats.
        alpha: >= 0.

    Raises:
        RuntimeError: no convergence in 200 steps, as where there is no finite optimum.
    """
    slope, curvature = slope_and_curvature(loss)
    b, ref = graph.incidence.toarray(), np.exp(ref_logps)

    def objective(u: Floats) -> float:
        pairs = graph.weights @ loss(b @ u, targets, beta)
        penalty = ref @ (losses.forward_kl(u) + np.exp(u) - 1) if alpha else 0.0
        return float(pairs + alpha * penalty)

    u, polished = np.zeros(graph.n), 0
    for _ in range(200):
        margins = b @ u
        gradient = b.T @ (graph.weights * slope(margins, targets, beta)) + alpha * ref * np.expm1(u)
        hessian = b.T @ ((graph.weights * curvature(margins, targets, beta))[:, None] * b)
        step = -np.linalg.lstsq(hessian + alpha * np.diag(ref * np.exp(u)), gradient, rcond=1e-13)[0]
        now, decrement = objective(u), -gradient @ step
        if decrement <= 1e-10 * (1 + abs(now)):  # below what the objective resolves: Newton's own convergence
            u, polished = u + step, polished + 1
            if polished == 3:
                return np.asarray(u)
            continue
        fraction = min(1.0, 5 / np.abs(step).max())  # so that e^u stays representable
        while objective(u + fraction * step) > now - 1e-4 * fraction * decrement:
            fraction /= 2
        u = u + fraction * step
    raise RuntimeError(f"no convergence on {graph.edges.tolist()}: Newton decrement {decrement:.1e}")


# ---------------------------------------------------------------- checks


def check_transfer(
    graph: PreferenceGraph,
    loss: PairLoss,
    formula: Transfer,
    kl: Callable[[Any, Any], Any],
    *,
    features: Sequence[Sequence[int]] | None = None,
    supervised: Any = 0,
) -> None:
    """Lagrange's condition, all symbols free: weights, reward margins, policy and reference.

    d/dlog pi_y [L + alpha KL] = mu pi_y for every y; mu from the sum over y (probabilities add up to one), and then
    pi_y from the condition itself must be what the formula says.

    Args:
        graph: the pairs, and responses that no pair mentions.
        loss: of a pair.
        formula: under test.
        kl: (pi_ref [n], log-ratios [n]) -> the exact penalty.
        features: [n, p], of the policy; one free parameter a response where not given.
        supervised: weight of -log pi(0) in the loss.
    """
    n, m = graph.n, len(graph)
    u, ref_logps = sp.symbols(f"u0:{n}", real=True), sp.symbols(f"ref0:{n}", real=True)
    ref = np.array(sp.symbols(f"p0:{n}", positive=True), dtype=object)
    weights, targets = sp.symbols(f"a0:{m}", positive=True), sp.symbols(f"delta0:{m}", real=True)
    logps = [x + reference for x, reference in zip(u, ref_logps, strict=True)]
    data_term = -supervised * u[0]
    for (w, lo), weight, target in zip(graph.edges.tolist(), weights, targets, strict=True):
        margin = sp.expand(losses.logratio_margin(logps[w], logps[lo], ref_logps[w], ref_logps[lo]))
        data_term += weight * loss(margin, target, BETA)
    slopes = [sp.diff(data_term, x) for x in u]
    total = losses.pessimistic(data_term, kl(ref, u), alpha=ALPHA)
    gradient = [sp.diff(total, x) for x in u]
    # sum_y pi_ref(y) = 1 is all that is known of pi_ref.
    multiplier = simplify(simplify(sum(gradient)).subs(ref[-1], 1 - sum(ref[:-1])))
    require(vanishes(multiplier + ALPHA), f"the multiplier is {multiplier}, not -alpha")
    for slope, total_slope, share in zip(slopes, gradient, ref, strict=True):
        difference = simplify(total_slope / multiplier - formula(share, slope, ALPHA))
        require(difference == 0, f"the condition and the formula differ by {difference}")
    for y in set(range(n)) - set(graph.edges.reshape(-1).tolist()):
        require(sp.expand(formula(ref[y], slopes[y], ALPHA) - ref[y]) == 0, f"the unseen response {y} moves")
    if features is not None:
        every = np.eye(n, dtype=int).tolist()
        require(reaches(features, every), "the policy is stationary where the condition does not hold")


def forward_kl(ref: Any, logratios: Any) -> Any:
    """KL(pi_ref || pi), exactly."""
    return sum(share * losses.forward_kl(x) for share, x in zip(ref, logratios, strict=True))


def check_convexity(loss: PairLoss) -> None:
    """Convex in the margin, so that the condition is sufficient."""
    require(sp.factor(simplify(sp.diff(loss(MARGIN, TARGET, BETA), MARGIN, 2))).is_positive, "not convex in the margin")


def check_one_pair(step: Callable[[sp.Expr], sp.Expr]) -> None:
    """p-DPO on one pair: the winner gains and the loser loses s / alpha, s = beta sigma(-beta Delta).

    Args:
        step: margin -> s.
    """
    w, lo, ref_w, ref_l = sp.symbols("l_w l_l ref_w ref_l", real=True)
    value = dpo(losses.logratio_margin(w, lo, ref_w, ref_l), None, BETA)
    for slope, sign in ((sp.diff(value, w), -1), (sp.diff(value, lo), 1)):
        require(vanishes(slope - sign * step((w - ref_w) - (lo - ref_l))), "the mass moved is another")


def dpo_step(margin: Any) -> Any:
    """s = beta sigma(-beta Delta)."""
    return BETA / (1 + sp.exp(BETA * margin))


ONE_PAIR = PreferenceGraph(3, [(0, 1)])
CYCLE = PreferenceGraph(5, [(0, 1), (1, 3), (3, 1)])
STAR = PreferenceGraph(4, [(0, 1), (0, 2), (3, 0)])


def any_loss(margin: Any, target: Any, beta: Any) -> Any:
    """A function of the margin of which nothing is known."""
    return sp.Function("f")(margin)


def prove_on(graphs: Iterable[PreferenceGraph]) -> None:
    """The condition for a loss of which nothing is known, on every graph; that it is sufficient, and the mass that
    p-DPO moves, from the losses themselves."""
    for graph in graphs:
        check_transfer(graph, any_loss, transfer, forward_kl)
    for loss in MARGIN_LOSSES:
        check_convexity(loss)
    check_transfer(ONE_PAIR, dpo, transfer, forward_kl)
    check_one_pair(dpo_step)


def enumerate_instances(thorough: bool) -> str:
    """An exponential-cone solver finds the policy that the formula gives, on a graph with two unseen responses."""
    import cvxpy as cp

    graph, beta, targets = PreferenceGraph(5, [(0, 1), (1, 2)], [1.0, 0.5]), 0.7, np.array([1.0, -0.5])
    ref = np.array([0.1, 0.3, 0.2, 0.15, 0.25])
    alphas = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0) if thorough else (0.1, 1.0)
    for loss in MARGIN_LOSSES:
        for alpha in alphas:
            u = cp.Variable(5)
            margins = graph.incidence @ u
            cones = (
                cp.logistic(-beta * margins),
                cp.square(margins - 1 / (2 * beta)),
                cp.square(targets - beta * margins),
            )
            pairs = cones[MARGIN_LOSSES.index(loss)]
            problem = cp.Problem(
                cp.Minimize(graph.weights @ pairs - alpha * ref @ u), [cp.log_sum_exp(u + np.log(ref)) <= 0]
            )
            problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
            slope = graph.incidence.T @ (graph.weights * slope_and_curvature(loss)[0](margins.value, targets, beta))
            policy = ref * np.exp(u.value)
            gap = np.abs(policy - transfer(ref, slope, alpha)).max()
            require(bool(gap < 1e-5), f"Clarabel's policy is {gap:.1e} from the formula at alpha {alpha}")
            require(bool(np.abs(policy[3:] - ref[3:]).max() < 1e-6), "Clarabel moves an unseen response")
    return f"{3 * len(alphas)} exponential-cone programs, 5 responses"


# ---------------------------------------------------------------- without each assumption


def _not_margins_only() -> str:
    """-c log pi(y_w) + alpha KL: the optimum is the mixture (c e_w + alpha pi_ref) / (c + alpha)."""
    c, share = sp.symbols("c p", positive=True)
    u = sp.Symbol("u", real=True)
    winner = sp.diff(losses.pessimistic(-c * u, share * losses.forward_kl(u), alpha=ALPHA), u)
    unseen = sp.diff(losses.pessimistic(sp.S.Zero, share * losses.forward_kl(u), alpha=ALPHA), u)
    multiplier = -(c + ALPHA)  # the sum of the slopes
    require(vanishes(winner / multiplier - (c + ALPHA * share) / (c + ALPHA)), "another optimum")
    kept = simplify(unseen / multiplier / share)
    require(simplify(1 - kept).is_positive, "the unseen response keeps its probability")
    return "supervised loss -c log pi(y_w): each unseen probability is multiplied by alpha / (alpha + c)"


def _reverse_kl() -> str:
    """With KL(pi || pi_ref) in its place, a pair that moves at all moves the unseen response too.

    Let pi_ref(w) = pi_ref(l) = a and suppose the unseen keep their probability, so that pi(w) = a (1 + x),
    pi(l) = a (1 - x). Stationarity, d/dlog pi_y: +-s + alpha pi_y (u_y + 1) = mu pi_y; an unseen y with u_y = 0 makes
    mu = alpha, and the sum over the pair a ((1+x) log(1+x) + (1-x) log(1-x)) = 0: only at x = 0.
    """
    x, y = sp.symbols("x y", positive=True)
    total = (1 + x) * sp.log(1 + x) + (1 - x) * sp.log(1 - x)
    require(total.subs(x, 0) == 0, "the sum does not start at 0")
    slope = sp.diff(total, x)
    require(vanishes(slope - sp.log(1 + x) + sp.log(1 - x)), "another slope")
    # On 0 < x < 1, with x = y / (1 + y): the slope's exponential is 1 + 2 y > 1.
    require(simplify((1 + x) / (1 - x)).subs(x, y / (1 + y)).simplify().equals(1 + 2 * y), "the slope may vanish")
    return "KL(pi || pi_ref), pi_ref(w) = pi_ref(l): the unseen keep their probability only if the pair does not move"


def _shared_parameters() -> str:
    """One parameter raises winner and unseen response together: logits (t, 0, t), uniform reference."""
    t = sp.Symbol("t", real=True)
    logits = [t, sp.S.Zero, t]
    logs = [x - sp.log(sum(sp.exp(z) for z in logits)) + sp.log(3) for x in logits]
    objective = losses.pessimistic(
        losses.dpo(logs[0] - logs[1], beta=BETA), forward_kl([sp.Rational(1, 3)] * 3, logs), alpha=ALPHA
    )
    at_reference = simplify(sp.diff(objective, t).subs(t, 0))
    require(at_reference.is_negative, "the reference is optimal")
    require(sp.factor(simplify(sp.diff(logs[2], t))).is_positive, "the unseen response does not rise with t")
    return "logits (t, 0, t), one pair 0 > 1: the optimum has t > 0, so the unseen response 2 gains probability"


# ---------------------------------------------------------------- properties


@st.composite
def _problems(draw: st.DrawFn) -> tuple[PreferenceGraph, Floats, Floats, float, float]:
    seen = draw(preference_graphs(max_responses=4))
    graph = PreferenceGraph(seen.n + draw(st.integers(1, 2)), seen.edges, seen.weights)
    ref, targets = draw(log_policies(graph.n, 2.0)), draw(vectors(len(graph), 2.0))
    return graph, ref, targets, draw(positive(0.2, 4)), draw(positive(0.1, 10))


@given(_problems(), st.sampled_from(MARGIN_LOSSES))
def optimum_transfers_mass_and_keeps_the_unseen(
    problem: tuple[PreferenceGraph, Floats, Floats, float, float], loss: PairLoss
) -> None:
    """NumPy: a certified optimum is pi_ref - slopes / alpha, and every unseen response keeps its probability."""
    graph, ref, targets, beta, alpha = problem
    u = optimum(graph, loss, targets=targets, beta=beta, ref_logps=ref, alpha=alpha)
    slope = graph.incidence.T @ (graph.weights * slope_and_curvature(loss)[0](graph.margins(u), targets, beta))
    scale = 1 + alpha + np.abs(slope).max()
    assert policy_kkt(ref + u, slope - alpha * np.exp(ref)).worst <= 1e-9 * scale / min(1, alpha)
    np.testing.assert_allclose(np.exp(ref + u), transfer(np.exp(ref), slope, alpha), atol=1e-9 * scale / alpha)
    seen = np.zeros(graph.n, dtype=bool)
    seen[graph.edges] = True
    np.testing.assert_allclose(u[~seen], 0, atol=1e-9)


@given(_problems(), st.sampled_from(MARGIN_LOSSES))
def logits_are_stationary_under_torch(
    problem: tuple[PreferenceGraph, Floats, Floats, float, float], loss: PairLoss
) -> None:
    """torch: automatic differentiation through a softmax agrees; plain DPO on the same pairs is not stationary."""
    import torch

    graph, ref, targets, beta, alpha = problem
    u = optimum(graph, loss, targets=targets, beta=beta, ref_logps=ref, alpha=alpha)
    logits = torch.tensor(ref + u, requires_grad=True)
    ref_logps, weights = torch.tensor(ref), torch.tensor(graph.weights)

    def gradient(pessimism: float) -> Floats:
        logratios = torch.log_softmax(logits, 0) - ref_logps
        pairs = (weights * loss(graph.margins(logratios), torch.tensor(targets), beta)).sum()
        penalty = (ref_logps.exp() * losses.forward_kl(logratios)).sum()
        total = losses.pessimistic(pairs, penalty, alpha=pessimism)
        slopes: Floats = torch.autograd.grad(total, logits)[0].numpy()
        return slopes

    scale = 1 + alpha + np.abs(gradient(0.0)).max()
    assert np.abs(gradient(alpha)).max() <= 1e-9 * scale
    if loss is dpo and graph.crossing.all():  # no finite optimum without pessimism
        assert np.abs(gradient(0.0)).max() > 1e-9


@given(positive(0.1, 10), positive(0.1, 10), st.floats(1e-6, 0.1))
def pessimism_stops_the_leak(beta: float, alpha: float, t: float) -> None:
    """DPO falls to 0 along policies that put all mass on an unseen response; the penalised loss rises along them."""

    def values(t: float) -> tuple[float, float]:
        logs = np.log([t, t * t, 1 - t - t * t])  # winner, loser, unseen
        u = logs - np.log([0.3, 0.3, 0.4])
        pair = float(losses.dpo(u[0] - u[1], beta=beta))
        return pair, float(losses.pessimistic(pair, float(forward_kl([0.3, 0.3, 0.4], u)), alpha=alpha))

    (leaked, _), (before, _) = values(t / 2), values(t)
    assert leaked < before
    graph = PreferenceGraph(3, [(0, 1)])
    ref = np.log([0.3, 0.3, 0.4])
    u = optimum(graph, dpo, targets=np.zeros(1), beta=beta, ref_logps=ref, alpha=alpha)
    best = float(
        losses.pessimistic(float(losses.dpo(u[0] - u[1], beta=beta)), float(forward_kl(np.exp(ref), u)), alpha=alpha)
    )
    assert values(t)[1] >= best
    assert abs(u[2]) < 1e-9


CLAIMS = (
    Claim(
        id="mass-transfer",
        source="ours",
        statement=(
            "For any loss of the margins with a forward-KL penalty, the tabular optimum is the reference minus the "
            "loss's slopes over alpha: responses that no pair mentions keep exactly their reference probability, and "
            "one p-DPO pair moves the mass beta sigma(-beta Delta) / alpha from loser to winner."
        ),
        formula=(r"\pi(y)=\pi_{\rm ref}(y)-\tfrac1\alpha\,\partial L/\partial u_y,\qquad u=\log(\pi/\pi_{\rm ref})"),
        domain="finitely many responses, tabular; minimisers where the loss is convex, stationary points else; no flow",
        losses=("logratio_margin", "bradley_terry", "dpo", "forward_kl", "pessimistic"),
        assumptions={
            "margins only": "the loss depends on the policy through log-ratio margins only",
            "forward KL": "the penalty is KL(pi_ref || pi)",
            "tabular": "one free parameter a response",
        },
        prove=lambda: prove_on((ONE_PAIR, CYCLE, STAR)),
        counterexamples={
            "margins only": _not_margins_only,
            "forward KL": _reverse_kl,
            "tabular": _shared_parameters,
        },
        controls={
            "without margins only": lambda: check_transfer(
                ONE_PAIR, dpo, transfer, forward_kl, supervised=sp.Symbol("c", positive=True)
            ),
            "without forward KL": lambda: check_transfer(
                ONE_PAIR,
                dpo,
                transfer,
                lambda p, u: -sum(q * sp.exp(x) * losses.forward_kl(x) for q, x in zip(p, u, strict=True)),
            ),
            "without tabular": lambda: check_transfer(ONE_PAIR, dpo, transfer, forward_kl, features=[[1], [0], [1]]),
            "sign of the slope": lambda: check_transfer(ONE_PAIR, dpo, lambda p, s, a: p + s / a, forward_kl),
            "alpha for 1/alpha": lambda: check_transfer(ONE_PAIR, dpo, lambda p, s, a: p - s * a, forward_kl),
            "half the KL": lambda: check_transfer(ONE_PAIR, dpo, transfer, lambda p, u: forward_kl(p, u) / 2),
            "beta missing in the step": lambda: check_one_pair(lambda z: dpo_step(z) / BETA),
            "sigma(+beta Delta)": lambda: check_one_pair(lambda z: dpo_step(-z)),
            "concave loss": lambda: check_convexity(lambda m, d, b: -dpo(m, d, b)),
        },
        enumerate=enumerate_instances,
        properties=(
            optimum_transfers_mass_and_keeps_the_unseen,
            logits_are_stationary_under_torch,
            pessimism_stops_the_leak,
        ),
    ),
)
