"""DPO's beta and where gradient descent ends: it sets the speed, and with unequal weights the destination as well.

Tabular logits theta, log pi = theta - logsumexp(theta), started at the reference; disjoint pairs of weights w_i. The
gradient flow moves the two logits of a pair by a_i and -a_i, and x_i = beta Delta_i = 2 beta a_i keeps
x + e^x - 1 = 2 beta^2 w_i t. So x_i - log(2 beta^2 w_i t) -> 0: every margin diverges, for every beta, and the winners
end in the ratio of pi_ref(y_w^i) w_i^(1 / (2 beta)), with all other mass gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.special import wrightomega

from theory import algebra, losses
from theory.algebra import vanishes
from theory.claim import CheckFailed, Claim, require
from theory.preferences import Floats, PreferenceGraph
from theory.strategies import disjoint_pairs, log_policies, positive

BETA = sp.Symbol("beta", positive=True)
X = sp.Symbol("x", positive=True)

Limit = Callable[[Sequence[Any], Sequence[Any], Any], list[Any]]
"""(pi_ref of the winners, weights of the pairs, beta) -> the winners' limiting probabilities."""

ONE_PAIR = PreferenceGraph(2, [(0, 1)])
TWO_PAIRS = PreferenceGraph(4, [(0, 1), (2, 3)], [1, 4])
EQUAL_WEIGHTS = PreferenceGraph(4, [(0, 1), (2, 3)], [3, 3])
WITH_UNSEEN = PreferenceGraph(6, [(0, 1), (4, 2)], [2, 3])
CHAIN = PreferenceGraph.chain(3)


def limit_of_winners(ref: Sequence[Any], weights: Sequence[Any], beta: Any) -> list[Any]:
    """pi_ref(y_w^i) w_i^(1 / (2 beta)), normalised."""
    share = [q * w ** (1 / (2 * beta)) for q, w in zip(ref, weights, strict=True)]
    return [x / sum(share) for x in share]


def clock(x: Any) -> Any:
    """x + e^x - 1."""
    return x + sp.exp(x) - 1


# ---------------------------------------------------------------- checks


def check_flow(graph: PreferenceGraph, features: Sequence[Sequence[int]] | None = None) -> None:
    """The velocity -dL/dtheta is w_i beta sigma(-beta Delta_i) at the winner of pair i, minus that at its loser, 0
    elsewhere, and each margin starts at 0: so logits move as ref + (a_i, -a_i), and beta Delta_i = 2 beta a_i.

    Args:
        graph: weighted pairs.
        features: [n, k], logits are features @ theta; one parameter a response where not given.
    """
    n, edges, weights = graph.n, graph.edges.tolist(), [sp.Rational(w) for w in graph.weights.tolist()]
    phi = sp.eye(n) if features is None else sp.Matrix(features)
    ref, logits = (sp.Matrix(sp.symbols(f"{name}0:{n}", real=True)) for name in ("ref", "logit"))
    theta = sp.Matrix(sp.symbols(f"theta0:{phi.cols}", real=True))

    def total(at: Any, z: Any) -> Any:
        return sum(
            weight * losses.dpo(losses.logratio_margin(at[w] - z, at[lo] - z, ref[w], ref[lo]), beta=BETA)
            for (w, lo), weight in zip(edges, weights, strict=True)
        )

    # The normaliser is a function of theta; it drops out of every margin before anything is differentiated.
    log_z = sp.Function("Z")(*theta)
    require(total(logits, log_z) == total(logits, 0), "the normaliser enters")
    a = sp.symbols(f"a0:{len(edges)}", positive=True)
    moved = {x: sp.Integer(0) for x in logits}
    for (w, lo), step in zip(edges, a, strict=True):
        moved[logits[w]], moved[logits[lo]] = step, -step
    claimed = [sp.Integer(0)] * n
    for (w, lo), weight, step in zip(edges, weights, a, strict=True):
        rate = weight * BETA / (1 + sp.exp(2 * BETA * step))
        claimed[w], claimed[lo] = rate, -rate
    # Velocity of the logits under the flow of theta: phi phi' times the negative gradient in the logits.
    gradient = sp.Matrix([sp.diff(total(logits, 0), x) for x in logits])
    velocity = -(phi * phi.T * gradient).subs({x: r + moved[x] for x, r in zip(logits, ref, strict=True)})
    for y in range(n):
        require(vanishes(velocity[y] - claimed[y]), f"response {y} moves at {velocity[y]}")


def check_clock(time: Callable[[sp.Expr], sp.Expr], starts_at: sp.Expr) -> None:
    """clock(x) = 2 beta^2 w t: dx/dt = 2 beta da/dt; and x - log(2 beta^2 w t) -> 0, whatever beta and w.

    Args:
        time: x -> 2 beta^2 w t.
        starts_at: beta Delta at t = 0.
    """
    w = sp.Symbol("w", positive=True)
    rate = -w * sp.diff(losses.dpo(X / BETA, beta=BETA), X) * BETA  # da/dt, Delta = x / beta
    require(time(starts_at) == 0, "the clock does not start at 0")
    require(vanishes(sp.diff(time(X), X) * 2 * BETA * rate - 2 * BETA**2 * w), "another clock")
    require(algebra.limit(X - sp.log(time(X)), X, sp.oo) == 0, "x does not tend to log(2 beta^2 w t)")


def check_limit(graph: PreferenceGraph, ref: Sequence[sp.Expr], formula: Limit = limit_of_winners) -> None:
    """With x_i = log(2 beta^2 w_i t) + o(1) the logits are log pi_ref(y) +- x_i / (2 beta): the policy's limit in T = 2
    beta^2 t -> infinity is the formula on the winners and 0 elsewhere.

    Args:
        graph: disjoint weighted pairs.
        ref: pi_ref, [n].
        formula: under test.
    """
    root = sp.Symbol("R", positive=True)  # R^4 = T, so that all powers are whole
    weights = [sp.Rational(w) for w in graph.weights.tolist()]
    for beta in (sp.Rational(1, 2), sp.Integer(1), sp.Integer(2)):
        mass = list(ref)
        for (w, lo), weight in zip(graph.edges.tolist(), weights, strict=True):
            step = weight ** (1 / (2 * beta)) * root ** (4 / (2 * beta))  # e^a
            mass[w], mass[lo] = mass[w] * step, mass[lo] / step
        policy = [algebra.limit(sp.cancel(x / sum(mass)), root, sp.oo) for x in mass]
        winners = graph.winners.tolist()
        claimed = formula([ref[w] for w in winners], weights, beta)
        for winner, share in zip(winners, claimed, strict=True):
            require(vanishes(policy[winner] - share), f"the limit of {winner} is {policy[winner]}")
        rest = [p for y, p in enumerate(policy) if y not in winners]
        require(all(p == 0 for p in rest), f"mass is left on losers or unseen responses: {policy}")


def check_destination(graph: PreferenceGraph, *, depends: bool) -> None:
    """Whether the winners' limit depends on beta: it does unless all weights are equal."""
    winners = [sp.Rational(1, graph.n)] * len(graph)
    limits = {tuple(limit_of_winners(winners, [sp.Rational(w) for w in graph.weights.tolist()], b)) for b in (1, 2)}
    require((len(limits) > 1) == depends, f"the limits for beta = 1 and 2 are {limits}")


def prove_on(graph: PreferenceGraph) -> None:
    """The flow and its limit on disjoint pairs, the reference uneven."""
    check_flow(graph)
    check_limit(graph, [sp.Rational(2 * (y + 1), graph.n * (graph.n + 1)) for y in range(graph.n)])
    check_destination(graph, depends=len(set(graph.weights.tolist())) > 1)


def prove() -> None:
    check_clock(clock, sp.Integer(0))
    for graph in (ONE_PAIR, TWO_PAIRS, EQUAL_WEIGHTS, WITH_UNSEEN):
        prove_on(graph)


# ---------------------------------------------------------------- an ODE solver that knows of no clock


def flow(graph: PreferenceGraph, ref: Floats, beta: float, time: float, start: Floats | None = None) -> Floats:
    """log pi at time t under gradient flow in all n logits, from the start (the reference); [n], nats."""

    def velocity(_: float, logits: Floats) -> Floats:
        slope = -graph.weights * beta / (1 + np.exp(beta * graph.margins(logits - ref)))
        return -graph.by_response(slope)

    begin = ref if start is None else start
    logits = solve_ivp(velocity, (0, time), begin, method="LSODA", rtol=1e-9, atol=1e-11).y[:, -1]
    return np.asarray(logits - np.logaddexp.reduce(logits))


def margin_at(weights: Floats, beta: float, time: float) -> Floats:
    """beta Delta_i(t) = log omega(2 beta^2 w_i t + 1), omega Wright's function; [m]."""
    return np.asarray(np.log(wrightomega(2 * beta**2 * weights * time + 1)))


def enumerate_flows(thorough: bool) -> str:
    """Two pairs and one more response, weights 1 and w, the beta of each: margins in the middle, shares at the end."""
    count, worst, farthest = 0, 0.0, 0.0
    ratios = (1.0, 2.0, 4.0, 8.0) if thorough else (1.0, 4.0)
    ref = np.log([0.1, 0.3, 0.2, 0.15, 0.25])
    for ratio, beta in product(ratios, (0.5, 1.0, 2.0)):
        graph = PreferenceGraph(5, [(0, 1), (2, 3)], [1.0, ratio])
        for time in (0.5, 50.0):
            gap = beta * graph.margins(flow(graph, ref, beta, time) - ref) - margin_at(graph.weights, beta, time)
            worst = max(worst, float(np.abs(gap).max()))
        last = np.exp(flow(graph, ref, beta, 1e10))
        claimed = limit_of_winners([0.1, 0.2], [1.0, ratio], beta)
        farthest = max(farthest, float(np.abs(last[[0, 2]] / last[[0, 2]].sum() - claimed).max()))
        count += 1
    require(worst < 1e-6 and farthest < 1e-4, f"margins {worst:.1e} and shares {farthest:.1e} away")
    return f"{count} settings of weights and beta by an ODE solver, to t = 1e10: winners' shares within 1e-4"


# ---------------------------------------------------------------- without each assumption

SHARED = [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1]]
"""Logits of TWO_PAIRS that share parameters."""


def _chain() -> str:
    """0 > 1 > 2 with equal weights: at logits (a, 0, -a) both margins are a, and response 1 gains what it loses."""
    a = sp.Symbol("a", positive=True)
    logits = sp.symbols("l0:3", real=True)
    zero = sp.Integer(0)
    margins = [losses.logratio_margin(logits[w], logits[lo], zero, zero) for w, lo in CHAIN.edges.tolist()]
    loss = sum(losses.dpo(margin, beta=BETA) for margin in margins)
    at = dict(zip(logits, (a, 0, -a), strict=True))
    velocity = [-sp.diff(loss, x).subs(at) for x in logits]
    require(vanishes(velocity[1]), "response 1 moves")
    clock_rate = sp.diff(clock(X), X).subs(X, BETA * a) * BETA * velocity[0]  # d clock / dt, x = beta a
    require(vanishes(clock_rate - BETA**2), "another clock")
    return "0 > 1 > 2: response 1 stays, beta Delta of both pairs has x + e^x - 1 = beta^2 t, half the speed"


def _shared_parameters() -> str:
    try:
        check_flow(TWO_PAIRS, SHARED)
    except CheckFailed:
        return (
            "logits (t0, t0 + t1, t1, t2) on 0 > 1 and 2 > 3: raising t0 raises winner and loser, the pairs are coupled"
        )
    raise CheckFailed("the flow is the tabular one")


def _other_start() -> str:
    """Started at beta Delta = -2 on one pair of uniform reference, the clock is off by its value there."""
    require(clock(sp.Integer(-2)) != 0, "the clock is 0 there")
    time, ref = 3.0, np.log([0.5, 0.5])
    x = float(ONE_PAIR.margins(flow(ONE_PAIR, ref, 1.0, time, start=ref + np.array([-1.0, 1.0])))[0])
    late = float(x + np.exp(x) - (-2 + np.exp(-2)) - 2 * time)
    require(bool(abs(late) < 1e-6), "another clock from there")
    return "one pair, beta = 1, started at Delta = -2: x + e^x - 1 = 2 t + e^-2 - 3, later by 2.86 / 2"


def smallest_counterexample() -> str | None:
    """The first disjoint pairs with small integer weights and two betas whose limits differ; uniform reference."""
    for pairs in (1, 2):
        for weights in product((1, 2), repeat=pairs):
            limits = [limit_of_winners([1] * pairs, [sp.Integer(w) for w in weights], b) for b in (sp.S.Half, sp.S.One)]
            if limits[0] != limits[1]:
                shown = [", ".join(f"{float(p):.3f}" for p in limit) for limit in limits]
                return (
                    f"{pairs} disjoint pairs of weights {weights}, uniform reference, gradient flow in the logits: the "
                    f"winners end at ({shown[0]}) for beta = 1/2, at ({shown[1]}) for beta = 1"
                )
    return None


# ---------------------------------------------------------------- properties


@given(disjoint_pairs(), st.data(), positive(0.2, 5), positive(1e-3, 1e3))
def clock_solves_the_flow(graph: PreferenceGraph, data: st.DataObject, beta: float, time: float) -> None:
    """NumPy: a step in time moves the formula's logits by the velocity; checked by a central difference."""
    ref = data.draw(log_policies(graph.n))

    def logits(at: float) -> Floats:
        half = margin_at(graph.weights, beta, at) / (2 * beta)
        return np.asarray(ref + graph.incidence.T @ half)

    step = 1e-4 * time / (1 + 2 * beta**2 * graph.weights.max() * time)
    moved = (logits(time + step) - logits(time - step)) / (2 * step)
    sigma = 1 / (1 + np.exp(beta * graph.margins(logits(time) - ref)))
    velocity = graph.incidence.T @ (graph.weights * beta * sigma)
    assert np.abs(moved - velocity).max() <= 1e-5 * (np.abs(velocity).max() + 1e-9)


@given(disjoint_pairs(), st.data(), positive(0.2, 5))
def torch_gradient_is_the_velocity(graph: PreferenceGraph, data: st.DataObject, beta: float) -> None:
    """torch: through log_softmax, at logits ref + (a, -a), the gradient is that of the claim, unseen responses 0."""
    import torch

    ref, a = data.draw(log_policies(graph.n)), np.array([data.draw(st.floats(0, 5)) for _ in range(len(graph))])
    logits = torch.tensor(ref + graph.incidence.T @ a, requires_grad=True)
    logratios = torch.log_softmax(logits, 0) - torch.tensor(ref)
    loss = (torch.tensor(graph.weights) * losses.dpo(graph.margins(logratios), beta=beta)).sum()
    velocity = -torch.autograd.grad(loss, logits)[0].numpy()
    claimed = graph.incidence.T @ (graph.weights * beta / (1 + np.exp(2 * beta * a)))
    assert np.abs(velocity - claimed).max() <= 1e-11 * (1 + beta) * graph.weights.max()


CLAIMS = (
    Claim(
        id="remark-beta-speed",
        source="[F], remark on beta after Proposition 1",
        statement=(
            "Under gradient flow in tabular logits from the reference, on disjoint pairs, beta Delta_i solves "
            "x + e^x - 1 = 2 beta^2 w_i t: every margin diverges, whatever beta. The policy tends to "
            "pi_ref(y_w) w^(1/(2 beta)), normalised, on the winners and 0 elsewhere. So beta sets the speed, and the "
            "destination too unless all pairs have equal weights."
        ),
        formula=r"\beta\Delta_i+e^{\beta\Delta_i}-1=2\beta^2w_it,\qquad"
        r"\pi_\infty(y_w^i)\propto\pi_{\rm ref}(y_w^i)\,w_i^{1/(2\beta)}",
        domain="finite responses with pi_ref > 0; tabular; gradient flow in the logits, no KL term",
        losses=("dpo", "bradley_terry", "logratio_margin"),
        assumptions={
            "disjoint pairs": "no response is in two pairs",
            "tabular logits": "one free logit a response",
            "start at the reference": "pi = pi_ref at t = 0",
        },
        prove=prove,
        counterexamples={
            "disjoint pairs": _chain,
            "tabular logits": _shared_parameters,
            "start at the reference": _other_start,
        },
        controls={
            "without disjoint pairs": lambda: check_flow(CHAIN),
            "without tabular logits": lambda: check_flow(TWO_PAIRS, SHARED),
            "without start at the reference": lambda: check_clock(clock, sp.Integer(-2)),
            "clock at half the speed": lambda: check_clock(lambda x: 2 * clock(x), sp.Integer(0)),
            "clock without its linear term": lambda: check_clock(lambda x: sp.exp(x) - 1, sp.Integer(0)),
            "beta changes nothing": lambda: check_limit(
                TWO_PAIRS, [sp.Rational(1, 4)] * 4, lambda ref, w, beta: [q / sum(ref) for q in ref]
            ),
            "exponent 1 / beta": lambda: check_limit(
                TWO_PAIRS, [sp.Rational(1, 4)] * 4, lambda ref, w, beta: limit_of_winners(ref, w, beta / 2)
            ),
            "without the reference": lambda: check_limit(
                EQUAL_WEIGHTS,
                [sp.Rational(y + 1, 10) for y in range(4)],
                lambda ref, w, beta: limit_of_winners([1] * len(w), w, beta),
            ),
            "unequal weights, one destination": lambda: check_destination(TWO_PAIRS, depends=False),
        },
        enumerate=enumerate_flows,
        properties=(clock_solves_the_flow, torch_gradient_is_the_velocity),
        printed=smallest_counterexample,
    ),
)
