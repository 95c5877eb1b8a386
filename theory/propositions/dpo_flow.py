"""Where DPO's gradient flow goes: of all minimisers that Corollary 1 allows, to one on the winners.

The loss of disjoint pairs pulls a pair's two logits apart and moves no other, so each margin obeys an equation of its
own, d(beta Delta)/dt = 2 beta^2 w / (1 + e^(beta Delta)), which integrates to beta Delta + e^(beta Delta) - 1 =
2 beta^2 w t. Winners' logits grow like log(t) / (2 beta), all at that rate, and so outrun everything else. The mass
that DPO is seen to lose from *winners* therefore needs shared parameters.

The margins' slopes sum to zero over the responses, hence the gradient in logits is the one in log-probabilities, and
the flow is the same in either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.special import wrightomega

from theory import algebra, losses
from theory.algebra import simplify, vanishes
from theory.claim import Claim, require
from theory.preferences import Floats, PreferenceGraph
from theory.propositions.mass_transfer import dpo, slope_and_curvature
from theory.strategies import disjoint_pairs, log_policies, positive

BETA, STEP, LEVEL, TIME, WEIGHT = sp.symbols("beta eta E t w", positive=True)
MARGIN = sp.Symbol("Delta", real=True)

PairLoss = Callable[[Any], Any]
"""Log-ratio margin -> loss at beta = BETA."""
Clock = Callable[[Any, Any], Any]
"""(log-ratio margin, weight of the pair) -> the time at which the flow has that margin."""
Limit = Callable[[PreferenceGraph, Any, Any, Any], Any]
"""(graph, pi_ref [n], weights [m], beta) -> the policy that the flow tends to, [n]."""

STRUCTURES = {
    "one pair": PreferenceGraph(2, [(0, 1)]),
    "one pair and two unseen responses": PreferenceGraph(4, [(0, 1)]),
    "two pairs, one listed loser first, and one unseen response": PreferenceGraph(5, [(3, 0), (1, 4)]),
    "three pairs": PreferenceGraph(6, [(0, 1), (2, 3), (4, 5)]),
}


def _dpo(margin: Any) -> Any:
    return losses.dpo(margin, beta=BETA)


def _margin(policy_w: Any, policy_l: Any, ref_w: Any, ref_l: Any) -> Any:
    return losses.logratio_margin(policy_w, policy_l, ref_w, ref_l)


def clock(margin: Any, weight: Any) -> Any:
    """t = (beta Delta + e^(beta Delta) - 1) / (2 beta^2 w)."""
    return (BETA * margin + sp.exp(BETA * margin) - 1) / (2 * BETA**2 * weight)


def limit_policy(graph: PreferenceGraph, ref: Any, weights: Any, beta: Any) -> Any:
    """pi(y_w) proportional to pi_ref(y_w) w^(1 / (2 beta)), 0 on all but winners. NumPy or SymPy object arrays."""
    shares = np.zeros_like(ref)
    shares[graph.winners] = ref[graph.winners] * weights ** (1 / (2 * beta))
    return shares / shares.sum()


def flow_margins(weights: Floats, beta: float, time: float) -> Floats:
    """Delta of each pair at time t, [m] -> [m]: e^(beta Delta) is Wright's omega at 1 + 2 beta^2 w t."""
    return np.asarray(np.log(wrightomega(1 + 2 * beta**2 * weights * time)) / beta)


def moved_logits(graph: PreferenceGraph, margins: Any) -> Any:
    """Change of every logit, [n]: half a margin up at the winner, half down at the loser, none elsewhere."""
    moved = np.zeros(graph.n, dtype=np.asarray(margins).dtype)
    moved[graph.winners] += margins / 2
    moved[graph.losers] -= margins / 2
    return moved


# ---------------------------------------------------------------- checks


def check_flow(
    graph: PreferenceGraph,
    *,
    pair_loss: PairLoss = _dpo,
    margin: Callable[[Any, Any, Any, Any], Any] = _margin,
    time: Clock = clock,
    features: sp.Matrix | None = None,
    start: Any = 0,
    step: Callable[[Any], Any] = lambda slope: -slope,
) -> None:
    """At every point of parameter space, with a symbolic reference and weights: the clock of each pair advances by
    one per unit of time, from 0 at the start, and the logits move as `moved_logits` says.

    Args:
        graph: its edges are the pairs; its weights are replaced by symbols.
        pair_loss: of the margin.
        margin: (log pi(w), log pi(l), log pi_ref(w), log pi_ref(l)) -> Delta.
        time: under test.
        features: logits per parameter, [n, d]; the identity where not given (tabular).
        start: what the first response's logit has beyond the reference's at the start.
        step: slope of the loss in a parameter -> the parameter's velocity.
    """
    features = sp.eye(graph.n) if features is None else features
    theta = sp.Matrix(sp.symbols(f"theta0:{features.cols}", real=True))
    ref = np.array(sp.symbols(f"rho0:{graph.n}", real=True), dtype=object)
    weights = np.array(sp.symbols(f"w0:{len(graph)}", positive=True), dtype=object)
    logits = ref + np.array((features * theta)[:], dtype=object)
    logits[0] += start
    logps = logits - sp.log(sum(sp.exp(logit) for logit in logits))
    margins = np.array([margin(logps[w], logps[lo], ref[w], ref[lo]) for w, lo in graph.edges.tolist()], dtype=object)
    total = sum(weights * np.array([pair_loss(value) for value in margins], dtype=object))
    velocity = features * sp.Matrix([step(sp.diff(total, parameter)) for parameter in theta])
    speeds = np.array(velocity[:], dtype=object)
    rates = graph.margins(speeds)
    for value, rate, weight in zip(margins, rates, weights, strict=True):
        at_start = time(value.subs(dict.fromkeys(theta, 0)), weight)
        require(vanishes(at_start), "the clock does not start at 0")
        advance = sp.diff(time(MARGIN, weight), MARGIN).subs(MARGIN, value) * rate
        require(vanishes(advance - 1), "the clock does not advance with time")
    for y, difference in enumerate(speeds - moved_logits(graph, rates)):
        require(vanishes(difference), f"the logit of response {y} moves otherwise")


def check_limit(graph: PreferenceGraph, limit: Limit, *, time: Clock = clock) -> None:
    """With E = e^(beta Delta), E / (2 beta^2 w t) -> 1; put into the logits, that gives the limit of every ratio."""
    level_time = time(sp.log(LEVEL) / BETA, WEIGHT)
    require(simplify(sp.diff(level_time, LEVEL)).is_positive, "time does not rise with the margin")
    require(algebra.limit(level_time, LEVEL, sp.oo) == sp.oo, "a finite time leads to an infinite margin")
    require(
        algebra.limit(2 * BETA**2 * WEIGHT * level_time / LEVEL, LEVEL, sp.oo) == 1, "E is not asymptotic to 2 b^2 w t"
    )
    ref = np.array(sp.symbols(f"p0:{graph.n}", positive=True), dtype=object)
    weights = np.array(sp.symbols(f"w0:{len(graph)}", positive=True), dtype=object)
    margins = np.array([sp.log(2 * BETA**2 * w * TIME) / BETA for w in weights], dtype=object)
    logits = np.array([sp.log(share) for share in ref], dtype=object) + moved_logits(graph, margins)
    claimed, anchor = limit(graph, ref, weights, BETA), int(graph.winners[0])
    require(vanishes(sum(claimed) - 1), "probabilities do not add up to 1")
    require(not vanishes(claimed[anchor]), "a winner vanishes")
    for y in range(graph.n):
        ratio = sp.exp(limit_in_log(sp.expand_log(logits[y] - logits[anchor]), TIME))
        require(vanishes(claimed[y] / claimed[anchor] - ratio), f"another limit of response {y}")


def limit_in_log(value: sp.Expr, x: sp.Symbol) -> sp.Expr:
    """As x -> infinity, of c log(x) + d; raises CheckFailed for any other expression."""
    value = sp.expand(value)
    slope = value.coeff(sp.log(x))
    rest = sp.expand(value - slope * sp.log(x))
    require(not rest.has(x) and not slope.has(x), f"{value} is not linear in log({x})")
    if slope == 0:
        return rest
    require(slope.is_positive or slope.is_negative, f"the sign of {slope} is not known")
    return sp.oo if slope.is_positive else -sp.oo


def check_descent(time: Clock) -> None:
    """Gradient descent of step eta, Delta -> Delta + eta / time'(Delta): its clock gains at least eta a step, and
    e^(beta Delta) gains 2 beta^2 w eta a step in the limit, hence is asymptotic to the flow's at t = eta k."""
    slope = sp.diff(time(MARGIN, WEIGHT), MARGIN)
    require(slope.is_positive, "a step does not widen the margin")
    # A convex clock lies above its tangent, which gains eta; and so the steps add up to infinity.
    require(simplify(sp.diff(slope, MARGIN)).is_positive, "the clock is not convex")
    factor = sp.exp(BETA * STEP / slope.subs(MARGIN, sp.log(LEVEL) / BETA))
    gain = algebra.limit(simplify(LEVEL * (factor - 1)), LEVEL, sp.oo)
    require(vanishes(gain - 2 * BETA**2 * WEIGHT * STEP), f"a step gains {gain} in the limit")


def prove() -> None:
    for graph in STRUCTURES.values():
        check_flow(graph)
        check_limit(graph, limit_policy)
    check_descent(clock)


def enumerate_flows(thorough: bool) -> str:
    """scipy's Runge-Kutta of order 8 on all logits, through the softmax; and gradient descent for many steps."""
    rng, solved, worst = np.random.default_rng(0), 0, 0.0
    for pairs in (1, 2, 3):
        for unseen in (0, 2):
            for beta in (0.2, 0.5, 1.0, 3.0) if thorough else (0.5, 3.0):
                graph = PreferenceGraph(
                    2 * pairs + unseen, [(2 * i, 2 * i + 1) for i in range(pairs)], rng.uniform(0.3, 3, pairs)
                )
                ref = np.log(rng.dirichlet(np.ones(graph.n)))
                times = np.array([0.1, 1.0, 10.0, 100.0])
                solution = solve_ivp(
                    lambda _, logits, *given: -logit_slopes(logits, *given),
                    (0, 100),
                    ref,
                    method="DOP853",
                    t_eval=times,
                    args=(graph, ref, beta),
                    rtol=1e-12,
                    atol=1e-12,
                )
                for time, logits in zip(times, solution.y.T, strict=True):
                    ours = ref + moved_logits(graph, flow_margins(graph.weights, beta, time))
                    worst = max(worst, float(np.abs(normalised(logits) - normalised(ours)).max()))
                solved += 1
    require(worst < 1e-8, f"the integrator's log-probabilities are {worst:.1e} away")
    steps, step = 100_000 if thorough else 3_000, 0.2  # a large first step overshoots, which takes long to wear off
    for beta in (0.5, 2.0):
        graph, ref = PreferenceGraph(5, [(0, 1), (2, 3)], [1.0, 2.0]), np.log([0.1, 0.3, 0.2, 0.15, 0.25])
        logits = ref.copy()
        for _ in range(steps):
            logits = logits - step * logit_slopes(logits, graph, ref, beta)
        level = np.exp(beta * graph.margins(logits - ref)) / (2 * beta**2 * graph.weights * step * steps)
        require(bool((np.abs(level - 1) < 20 / steps * np.log(steps)).all()), f"descent is at {level} of the flow")
    return f"{solved} flows by DOP853, largest error {worst:.0e} nats; 2 descents of {steps} steps"


def logit_slopes(logits: Floats, graph: PreferenceGraph, ref: Floats, beta: float) -> Floats:
    """Gradient of the loss in the logits, [n], through the softmax's Jacobian."""
    policy = np.exp(normalised(logits))
    margins = graph.margins(normalised(logits) - ref)
    in_logps = graph.by_response(graph.weights * slope_and_curvature(dpo)[0](margins, np.zeros_like(margins), beta))
    slopes: Floats = (np.eye(graph.n) - policy[:, None]) @ in_logps
    return slopes


def normalised(logits: Floats) -> Floats:
    """Log-probabilities of logits, [..., n]."""
    normalisers: Floats = np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return logits - normalisers


# ---------------------------------------------------------------- without each assumption


def _chain() -> str:
    """0 > 1 > 2, uniform: by symmetry both margins are d, logits (d, 0, -d), and beta d + e^(beta d) - 1 = beta^2 t."""
    d = sp.Symbol("d", real=True)
    theta = sp.symbols("theta0:3", real=True)
    total = _dpo(_margin(theta[0], theta[1], 0, 0)) + _dpo(_margin(theta[1], theta[2], 0, 0))
    slopes = [sp.diff(total, x).subs(dict(zip(theta, (d, 0, -d), strict=True))) for x in theta]
    require(vanishes(slopes[1]), "the middle response moves")
    require(vanishes(sp.diff(clock(d, 1), d) * -slopes[0] - sp.Rational(1, 2)), "not half the speed")
    return "0 > 1 > 2, uniform reference: at half the speed to pi(0) = 1; response 1 wins a pair, and vanishes"


def _both_directions() -> str:
    a, b = sp.symbols("a b", positive=True)
    slope = sp.diff(a * _dpo(MARGIN) + b * _dpo(-MARGIN), MARGIN)
    require(vanishes(slope.subs(MARGIN, sp.log(a / b) / BETA)), "log(a / b) / beta is not stationary")
    require(simplify(sp.diff(slope, MARGIN)).is_positive, "not convex: the flow may go elsewhere")
    return "0 > 1 with weight a, 1 > 0 with weight b: Delta tends to log(a / b) / beta, and the loser keeps its mass"


def _other_start() -> str:
    """theta_w + theta_l of a pair is conserved, so a start off the reference is never forgotten."""
    theta = sp.symbols("theta0:4", real=True)
    total = _dpo(_margin(theta[0], theta[1], 0, 0)) + _dpo(_margin(theta[2], theta[3], 0, 0))
    sums = [simplify(sp.diff(total, theta[i]) + sp.diff(total, theta[i + 1])) for i in (0, 2)]
    require(sums == [0, 0], "the sums of a pair's logits move")
    # The first clock starts at clock(log 4) and not at 0, which t outgrows: the margins' difference tends to 0.
    ahead = (TIME + clock(sp.log(4), 1)) / TIME
    winners = sp.log(4) / 2 + sp.log(2 * BETA**2 * TIME * ahead) / (2 * BETA), sp.log(2 * BETA**2 * TIME) / (2 * BETA)
    ratio = sp.exp(algebra.limit(sp.expand_log(winners[0] - winners[1], force=True), TIME, sp.oo))
    require(vanishes(ratio - 2), f"the ratio tends to {ratio}")
    return "0 > 1, 2 > 3, weights 1, uniform reference, start at logits (log 4, 0, 0, 0): pi(0) : pi(2) -> 2, not 1"


def _shared_parameter() -> str:
    """One parameter, features 1, 0 and 2 of winner, loser and an unseen response."""
    theta = sp.Symbol("theta", real=True)
    slope = sp.diff(_dpo(_margin(theta, sp.S.Zero, 0, 0)), theta)
    require(simplify(-slope).is_positive, "theta does not rise for ever")
    policy = sp.exp(theta) / (1 + sp.exp(theta) + sp.exp(2 * theta))
    require(algebra.limit(policy, theta, sp.oo) == 0, "the winner keeps mass")
    return "logits (1, 0, 2) theta of winner, loser, unseen: the flow puts all mass on the unseen, the winner vanishes"


def _sign_descent() -> str:
    """Every winner's logit rises at speed one, every loser's falls so, whatever the weights."""
    slope = sp.diff(WEIGHT * _dpo(_margin(MARGIN, sp.S.Zero, 0, 0)), MARGIN)
    require(simplify(sp.sign(sp.factor(simplify(slope)))) == -1, "the sign depends on the weight")
    claimed = limit_policy(
        PreferenceGraph(4, [(0, 1), (2, 3)]), np.full(4, sp.Rational(1, 4)), np.array([sp.S.One, sp.Integer(4)]), BETA
    )
    require((simplify(claimed[2] / claimed[0]) - 4 ** (1 / (2 * BETA))).equals(0), "another claim")
    return "sign descent (Adam's first steps), weights 1 and 4, uniform: both winners tend to 1/2, not to 1 : 4^(1/2b)"


# ---------------------------------------------------------------- properties


@st.composite
def _problems(draw: st.DrawFn) -> tuple[PreferenceGraph, Floats, float]:
    graph = draw(disjoint_pairs())
    return graph, draw(log_policies(graph.n)), draw(positive(0.1, 4))


@given(_problems(), positive(1e-3, 1e4))
def the_training_loss_moves_logits_along_the_solution(
    problem: tuple[PreferenceGraph, Floats, float], time: float
) -> None:
    """torch: the gradient of the loss at the solved logits is the solution's velocity, 2 beta w / (1 + e^(beta D))."""
    import torch

    graph, ref, beta = problem
    margins = flow_margins(graph.weights, beta, time)
    logits = torch.tensor(ref + moved_logits(graph, margins), requires_grad=True)
    logps = torch.log_softmax(logits, 0)
    w, lo = graph.winners, graph.losers
    ref_logps = torch.tensor(ref)
    margin = losses.logratio_margin(logps[w], logps[lo], ref_logps[w], ref_logps[lo])
    total = (torch.tensor(graph.weights) * losses.dpo(margin, beta=beta)).sum()
    slopes = torch.autograd.grad(total, logits)[0].numpy()
    speeds = 2 * beta * graph.weights / (1 + np.exp(beta * margins))
    np.testing.assert_allclose(-slopes, moved_logits(graph, speeds), rtol=1e-7, atol=1e-13)


@given(_problems())
def the_flow_ends_at_the_limit(problem: tuple[PreferenceGraph, Floats, float]) -> None:
    """NumPy: late enough, the solved policy is the claimed one; and all along, winners together only gain."""
    graph, ref, beta = problem
    rate = 2 * beta**2 * graph.weights.min()
    policies = [
        np.exp(normalised(ref + moved_logits(graph, flow_margins(graph.weights, beta, time))))
        for time in np.exp(2 * beta * np.array([0.0, 0.5, 2.0, 60.0])) / rate
    ]
    together = [policy[graph.winners].sum() for policy in policies]
    assert (np.diff([np.exp(ref[graph.winners]).sum(), *together]) >= -1e-12).all()
    # E / (2 beta^2 w t) is 1 to about log(E) / E, and its power 1 / (2 beta) moves the ratios.
    off = 120 * beta * np.exp(-120 * beta) / (2 * beta)
    np.testing.assert_allclose(
        policies[-1], limit_policy(graph, np.exp(ref), graph.weights, beta), atol=1e-12 + 4 * off
    )


@given(_problems(), positive(0.1, 100))
def descent_is_never_behind_the_flow(problem: tuple[PreferenceGraph, Floats, float], step: float) -> None:
    """NumPy: after k steps through the softmax, beta D + e^(beta D) - 1 >= 2 beta^2 w eta k; no other logit moved."""
    graph, ref, beta = problem
    logits, steps = ref.copy(), 5
    for _ in range(steps):
        logits = logits - step * logit_slopes(logits, graph, ref, beta)
    margins = graph.margins(logits - ref)
    np.testing.assert_allclose(logits - ref, moved_logits(graph, margins), atol=1e-9 * (1 + np.abs(margins).max()))
    behind = flow_margins(graph.weights, beta, step * steps) - margins
    assert (behind <= 1e-9 * (1 + np.abs(margins))).all()


CLAIMS = (
    Claim(
        id="dpo-flow",
        source="ours, on [F] A.2, Corollary 1",
        statement=(
            "From the reference, on disjoint pairs of weights w_i, the gradient flow of DPO moves the two logits of a "
            "pair by +-Delta_i / 2 and no others, with beta Delta_i + e^(beta Delta_i) - 1 = 2 beta^2 w_i t. Its limit "
            "is pi_ref(y_w) w_i^(1 / (2 beta)), normalised, on the winners: of the minimisers of Corollary 1 those "
            "with mass on unseen responses are not reached, and beta changes the limit where weights differ. Gradient "
            "descent of any fixed step has the same limit, and is never behind the flow."
        ),
        formula=(
            r"\beta\Delta_i+e^{\beta\Delta_i}-1=2\beta^2w_it,\qquad "
            r"\lim_{t\to\infty}\pi_t(y_w^i)\propto\pi_{\rm ref}(y_w^i)\,w_i^{1/(2\beta)}"
        ),
        domain=(
            "finite responses, pi_ref > 0; tabular softmax policies; gradient flow in the logits, which for a loss of "
            "margins is also the one in log-probabilities"
        ),
        losses=("logratio_margin", "bradley_terry", "dpo"),
        assumptions={
            "disjoint pairs": "no response is in two pairs",
            "one direction": "no pair is observed both ways",
            "start": "the flow starts at the reference",
            "tabular": "one logit a response, free",
            "plain gradient": "no per-coordinate scaling, as adaptive optimisers have",
        },
        prove=prove,
        counterexamples={
            "disjoint pairs": _chain,
            "one direction": _both_directions,
            "start": _other_start,
            "tabular": _shared_parameter,
            "plain gradient": _sign_descent,
        },
        controls={
            "without disjoint pairs": lambda: check_flow(PreferenceGraph.chain(3)),
            "without one direction": lambda: check_flow(PreferenceGraph(2, [(0, 1), (1, 0)])),
            "without start": lambda: check_flow(STRUCTURES["one pair"], start=sp.log(4)),
            "without tabular": lambda: check_flow(
                PreferenceGraph(3, [(0, 1)]),
                features=sp.Matrix([1, 0, 2]),
            ),
            "without plain gradient": lambda: check_flow(
                PreferenceGraph(4, [(0, 1), (2, 3)]), step=lambda slope: -slope / sp.Abs(slope)
            ),
            "half the speed": lambda: check_flow(STRUCTURES["one pair"], time=lambda z, w: 2 * clock(z, w)),
            "beta for beta squared": lambda: check_flow(STRUCTURES["one pair"], time=lambda z, w: BETA * clock(z, w)),
            "clock without the linear term": lambda: check_flow(
                STRUCTURES["one pair"], time=lambda z, w: clock(z, w) - z / (2 * BETA * w)
            ),
            "ascent": lambda: check_flow(STRUCTURES["one pair"], step=lambda slope: slope),
            "IPO": lambda: check_flow(STRUCTURES["one pair"], pair_loss=lambda z: losses.ipo(z, tau=BETA)),
            "no reference": lambda: check_flow(
                STRUCTURES["one pair"], margin=lambda w, lo, rw, rl: _margin(w, lo, 0, 0)
            ),
            "reference of the other sign": lambda: check_flow(
                STRUCTURES["one pair"], margin=lambda w, lo, rw, rl: _margin(w, lo, -rw, -rl)
            ),
            "limit without the weights": lambda: check_limit(
                STRUCTURES["three pairs"], lambda g, p, w, b: limit_policy(g, p, w**0, b)
            ),
            "limit with weights^(1 / beta)": lambda: check_limit(
                STRUCTURES["three pairs"], lambda g, p, w, b: limit_policy(g, p, w, b / 2)
            ),
            "limit without the reference": lambda: check_limit(
                STRUCTURES["three pairs"], lambda g, p, w, b: limit_policy(g, p**0, w, b)
            ),
            "unseen responses keep their share": lambda: check_limit(
                STRUCTURES["one pair and two unseen responses"],
                lambda g, p, w, b: p * np.array([1, 0, 1, 1]) / (p[0] + p[2] + p[3]),
            ),
            "descent with twice the clock": lambda: check_descent(lambda z, w: 2 * clock(z, w)),
        },
        enumerate=enumerate_flows,
        properties=(
            the_training_loss_moves_logits_along_the_solution,
            the_flow_ends_at_the_limit,
            descent_is_never_behind_the_flow,
        ),
    ),
)
