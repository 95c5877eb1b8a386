"""What one more pair does to the optimum: to its own margin always the same, to others by the reduction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import algebra, losses
from theory.algebra import simplify, vanishes
from theory.claim import Claim, require
from theory.preferences import Floats, PreferenceGraph
from theory.propositions.mass_transfer import PairLoss, dpo, ipo, optimum, slope_and_curvature
from theory.propositions.pessimism_certificate import STRUCTURES, forward_kl
from theory.strategies import log_policies, positive, preference_graphs

ALPHA, SCALE = sp.symbols("alpha b", positive=True)
MARGIN, TARGET = sp.symbols("Delta delta", real=True)

Edge = tuple[int, int]
Reduced = Callable[[Any, Any], Any]
"""(sum of weighted losses, sum of weights) -> data term."""


def summed(total: Any, weight: Any) -> Any:
    """The losses add up."""
    return total


def averaged(total: Any, weight: Any) -> Any:
    """The losses are averaged."""
    return total / weight


# ---------------------------------------------------------------- the general statement, on a structure


def objective(
    graph: PreferenceGraph, loss: PairLoss, weights: Any, u: Any, ref: Any, alpha: Any, reduced: Reduced = summed
) -> Any:
    """Reduced pair losses + alpha KL(pi_ref || pi) at log-ratios u, [n]; SymPy or numbers."""
    total = sum(
        weight * loss(losses.logratio_margin(u[w], u[lo], sp.S.Zero, sp.S.Zero), TARGET, SCALE)
        for (w, lo), weight in zip(graph.edges.tolist(), weights, strict=True)
    )
    return losses.pessimistic(reduced(total, sum(weights)), forward_kl(ref, None, u), alpha=alpha)


def with_pair(graph: PreferenceGraph, pair: Edge) -> PreferenceGraph:
    """The graph with one more edge, at the end."""
    return PreferenceGraph(graph.n, [*graph.edges.tolist(), pair], [*graph.weights, 1.0])


def check_revealed(
    graph: PreferenceGraph, pair: Edge, loss: PairLoss, *, reduced: Reduced = summed, judged: Edge | None = None
) -> None:
    """What two optima reveal: before(u1) - before(u0) >= 0 and after(u0) - after(u1) >= 0, by optimality alone, add up
    to the new pair's weight times f(Delta at u0) - f(Delta at u1). So its loss does not rise.

    Args:
        graph: the pairs before.
        pair: the one that is added, (winner, loser).
        loss: of a pair.
        reduced: how the pairs' losses enter.
        judged: the pair whose loss is said not to rise; the added one.
    """
    more = with_pair(graph, pair)
    weights = sp.symbols(f"w0:{len(more)}", positive=True)
    ref = sp.symbols(f"q0:{graph.n}", positive=True)
    before, after = (sp.symbols(f"{x}0:{graph.n}", real=True) for x in ("u", "v"))  # the two optima

    def first(u: Any) -> Any:
        return objective(graph, loss, weights[:-1], u, ref, ALPHA, reduced)

    def second(u: Any) -> Any:
        return objective(more, loss, weights, u, ref, ALPHA, reduced)

    w, lo = judged or pair
    fall = loss(before[w] - before[lo], TARGET, SCALE) - loss(after[w] - after[lo], TARGET, SCALE)
    revealed = (first(after) - first(before)) + (second(before) - second(after))
    difference = sp.expand(revealed - weights[-1] * fall)
    require(vanishes(difference), "optimality does not bound the pair's loss")


def check_falls(loss: PairLoss) -> None:
    """f' < 0: a loss that does not rise is a margin that does not narrow; and no optimum before is one after."""
    require(simplify(sp.diff(loss(MARGIN, TARGET, SCALE), MARGIN)).is_negative, "the loss may rise with the margin")


def check_draws(loss: PairLoss, target: Any) -> None:
    """f is a convex function of the distance from one margin.

    Args:
        loss: of a pair.
        target: the margin, under test.
    """
    away = sp.Symbol("x", real=True)
    value = loss(target + away, TARGET, SCALE)
    require(vanishes(value - value.subs(away, -away)), "the loss is not the same on both sides")
    require(simplify(sp.diff(value, away, 2)).is_positive, "the loss is not convex")
    require(vanishes(sp.diff(value, away).subs(away, 0)), "the loss is not least there")


def check_path(graph: PreferenceGraph, pair: Edge, reduced: Reduced = summed) -> None:
    """As the new pair's weight t grows, its margin moves at the rate -f'(Delta) R, R > 0: always towards lower loss.

    From the stationarity B'(w f') + t b f' + alpha (pi - pi_ref) = 0 in u, R = b' H^-1 b / (1 + t f'' b' H^-1 b) with H
    = B' diag(w f'') B + alpha diag(pi), a Laplacian plus a positive diagonal. Curvatures c = w f'' > 0 and masses m =
    alpha pi > 0 are free symbols: b' adj(H) b and det(H) are polynomials in them with positive coefficients only.

    Args:
        graph: the pairs before.
        pair: the one that is added.
        reduced: how the losses enter: averaged, the other pairs' weights fall as the new one's grows.
    """
    n = graph.n
    bends = sp.symbols(f"c0:{len(graph)}", positive=True)
    slopes = sp.symbols(f"s0:{len(graph)}", real=True)
    masses = sp.symbols(f"m0:{n}", positive=True)
    t, slope = sp.symbols("t s", positive=True)
    incidence = sp.Matrix(graph.incidence.toarray().astype(int))
    b = sp.zeros(n, 1)
    b[pair[0]], b[pair[1]] = 1, -1
    hessian = incidence.T * sp.diag(*bends) * incidence + sp.diag(*masses)
    adjugate, determinant = algebra.adjugate(hessian)
    # d/dt of the data term's slopes at a fixed u, at t = 0 or with the new pair's own curvature left out; f' is -slope.
    weight = sp.Symbol("W", positive=True)  # of the other pairs
    others = incidence.T * sp.Matrix(slopes)
    push = sp.diff(reduced(t, weight + t), t) * b * -slope + sp.diff(reduced(1, weight + t), t) * others
    rate = sp.expand((b.T * adjugate * -push)[0])  # of the margin, times det(H)
    for what, polynomial in (("rate", sp.expand(rate / slope)), ("determinant", determinant)):
        coefficients = sp.Poly(polynomial, *bends, *masses).coeffs()
        require(bool(coefficients) and all(c.is_positive for c in coefficients), f"the {what} may be negative")


def check_reduction(graph: PreferenceGraph, pair: Edge, loss: PairLoss, factor: Callable[[Any, Any], Any]) -> None:
    """Averaging is summing with another alpha; the pair raises it by (W + w) / W, (m + 1) / m where all weigh the same.

    Args:
        graph: the pairs before.
        pair: the one that is added.
        loss: of a pair.
        factor: (W before, weight of the pair) -> by what alpha rises in the summed form, under test.
    """
    more = with_pair(graph, pair)
    weights = sp.symbols(f"w0:{len(more)}", positive=True)
    ref, u = sp.symbols(f"q0:{graph.n}", positive=True), sp.symbols(f"u0:{graph.n}", real=True)
    weight = sum(weights[:-1])
    raised = weight * ALPHA * factor(weight, weights[-1])
    for pairs, count, alpha in ((graph, len(graph), weight * ALPHA), (more, len(more), raised)):
        mean = objective(pairs, loss, weights[:count], u, ref, ALPHA, averaged) * sum(weights[:count])
        difference = sp.cancel(sp.expand(mean - objective(pairs, loss, weights[:count], u, ref, alpha)))
        require(difference == 0, "averaging is not summing with that alpha")


ADDED: dict[str, Edge] = {
    "one pair, one unseen": (0, 2),
    "chain": (0, 2),
    "a pair both ways, and another": (1, 2),
    "cycle with a tail": (0, 3),
}
"""Structure -> the pair that is added to it."""


def prove() -> None:
    for name, pair in ADDED.items():
        graph = STRUCTURES[name]
        check_revealed(graph, pair, lambda margin, target, scale: sp.Function("f")(margin))
        check_path(graph, pair)
    for loss in (dpo, ipo):
        check_revealed(STRUCTURES["chain"], (0, 2), loss)
    check_falls(dpo)
    check_draws(ipo, 1 / (2 * SCALE))
    for loss in (dpo, ipo):
        check_reduction(STRUCTURES["chain"], (0, 2), loss, lambda total, added: (total + added) / total)


# ---------------------------------------------------------------- instances


def check_margins(before: Any, after: Any, tolerance: float = 0.0) -> None:
    """The added pair's margin is not narrower than before."""
    require(bool(after >= before - tolerance), f"the margin narrows from {float(before):.4f} to {float(after):.4f}")


def optimal_margins(loss: PairLoss, pair: Edge, graph: PreferenceGraph, parameter: float, alpha: float) -> list[Floats]:
    """Log-ratios before and with the pair, uniform reference, at weights of the graph and of one for the pair."""
    n, more = graph.n, with_pair(graph, pair)
    ref = np.full(n, -np.log(n))
    return [
        optimum(pairs, loss, targets=np.zeros(len(pairs)), beta=parameter, ref_logps=ref, alpha=alpha)
        for pairs in (graph, more)
    ]


def averaged_chain() -> tuple[float, float]:
    """Margins of the ends of 0 > 1 > 2, and with 0 > 2: p-DPO, beta 1, alpha 0.1, losses averaged. Newton's method.

    Averaging is summing with alpha times the number of pairs (proved above), hence 0.2 and 0.3.
    """
    before, _ = optimal_margins(dpo, (0, 2), PreferenceGraph.chain(3), 1.0, 0.2)
    _, after = optimal_margins(dpo, (0, 2), PreferenceGraph.chain(3), 1.0, 0.3)
    return float(before[0] - before[2]), float(after[0] - after[2])


def ipo_beyond() -> tuple[Any, Any]:
    """IPO, tau 1/2 (every margin to 1): on the chain the ends are 2 apart, with their pair 4/3; without KL, exactly."""
    u = sp.symbols("x y", real=True)  # of the first two responses; the third has 0
    chain, margins = [(u[0] - u[1]), u[1]], []
    for pairs in (chain, [*chain, u[0]]):
        total = sum(losses.ipo(margin, tau=sp.Rational(1, 2)) for margin in pairs)
        margins.append(sp.solve([sp.diff(total, x) for x in u], u)[u[0]])
    return margins[0], margins[1]


def local_minimum() -> tuple[Any, Any]:
    """Two arms, F the loss of the better of two rewards with margins 2 and -2, and DPO, beta 1, added on 0 > 1.

    F is least at Delta = 2. On Delta < 0 the member -2 is the better; F + f falls at -2 and rises at -1.
    """
    members = np.array([[sp.Integer(2)], [sp.Integer(-2)]], dtype=object)

    def first(margin: sp.Expr) -> Any:
        return losses.ensemble_min(np.array([margin], dtype=object), members, beta=1)[0]

    require(first(sp.Integer(2)) == 0, "2 is not a global minimum of F")
    with_dpo = losses.distillation(MARGIN, sp.Integer(-2), beta=1) + losses.dpo(MARGIN, beta=1)
    for margin in (sp.Integer(-2), sp.Integer(-1)):
        require(first(margin) == losses.distillation(margin, sp.Integer(-2), beta=1), "another member is chosen")
    slope = sp.diff(with_dpo, MARGIN)
    require(slope.subs(MARGIN, -2) < 0, "the sum does not fall at -2")
    require(slope.subs(MARGIN, -1) > 0, "the sum does not rise at -1")
    return sp.Integer(2), sp.Integer(-1)  # the local minimum is below -1


def _narrows(margins: tuple[Any, Any], what: str) -> str:
    before, after = margins
    require(bool(after < before), "the margin does not narrow")
    return f"{what}: the margin narrows from {float(before):.3f} to {float(after):.3f}"


# ---------------------------------------------------------------- enumeration


def enumerate_graphs(thorough: bool) -> str:
    """A conic solver's optima: the pair 0 > 2 added to every graph on 3 responses that is without it."""
    import cvxpy as cp

    n, pair, beta = 3, (0, 2), 1.0
    edges = [edge for edge in product(range(n), repeat=2) if edge[0] != edge[1] and edge != pair]
    sets = [chosen for size in range(1, len(edges) + 1) for chosen in combinations(edges, size)]
    u, weights, kl = cp.Variable(n), cp.Parameter(len(edges) + 1, nonneg=True), cp.Parameter(nonneg=True)
    margins = PreferenceGraph(n, [*edges, pair]).incidence @ u
    programs_of = [  # compiled once; a pair that is not there weighs 0
        cp.Problem(cp.Minimize(weights @ loss - kl * cp.sum(u) / n), [cp.log_sum_exp(u - np.log(n)) <= 0])
        for loss in (cp.logistic(-beta * margins), cp.square(margins - 1 / (2 * beta)))
    ]

    def margin(pairs: Sequence[Any], alpha: float, square: bool) -> float:
        weights.value, kl.value = [edge in pairs for edge in (*edges, pair)], alpha
        programs_of[square].solve(solver=cp.CLARABEL)
        return float(u.value[pair[0]] - u.value[pair[1]])

    narrower, programs = 0, 0
    for alpha in (0.02, 0.1, 1.0) if thorough else (0.1,):
        for chosen in sets:
            m, more = len(chosen), [*chosen, pair]
            before = margin(chosen, m * alpha, False)
            after, mean = (margin(more, (m + extra) * alpha, False) for extra in (0, 1))
            check_margins(before + 1e-6, after)
            narrower += mean < before - 1e-4
            programs += 3
            if thorough:
                towards = margin(chosen, m * alpha, True), margin(more, m * alpha, True)
                target = 1 / (2 * beta)
                require(abs(towards[1] - target) <= abs(towards[0] - target) + 1e-5, f"IPO moves away on {chosen}")
                programs += 2
    require(narrower > 0, "averaging narrows no margin")
    return f"all {len(sets)} graphs on 3 responses without the pair: {programs} exponential-cone programs"


# ---------------------------------------------------------------- properties

Problem = tuple[PreferenceGraph, Edge, Floats, float, float]


@st.composite
def _problems(draw: st.DrawFn) -> Problem:
    """A graph, a pair to add, log pi_ref, beta and alpha."""
    graph = draw(preference_graphs(min_responses=3, max_responses=5))
    pair = draw(st.sampled_from([(i, j) for i in range(graph.n) for j in range(graph.n) if i != j]))
    return graph, pair, draw(log_policies(graph.n, 2.0)), draw(positive(0.2, 4)), draw(positive(0.1, 10))


def _margin(graph: PreferenceGraph, loss: PairLoss, problem: Problem) -> float:
    _, (w, lo), ref, beta, alpha = problem
    u = optimum(graph, loss, targets=np.zeros(len(graph)), beta=beta, ref_logps=ref, alpha=alpha)
    return float(u[w] - u[lo])


@given(_problems(), positive(0.1, 3))
def the_pair_gets_its_way(problem: Problem, weight: float) -> None:
    """NumPy: p-DPO widens the added pair's margin, IPO moves it towards 1 / (2 tau) and not beyond; for any weight."""
    graph, pair, _, tau, _ = problem
    more = with_pair(graph, pair).with_weights([*graph.weights, weight])
    before, after = (_margin(pairs, dpo, problem) for pairs in (graph, more))
    check_margins(before, after, 1e-9 * (1 + abs(before)))
    target = 1 / (2 * tau)
    before, after = (_margin(pairs, ipo, problem) for pairs in (graph, more))
    low, high = sorted((before, target))
    slack = 1e-9 * (1 + high - low + abs(target))
    assert low - slack <= after <= high + slack, (before, after, target)


@given(_problems())
def the_rate_is_that_of_the_hessian(problem: Problem) -> None:
    """torch: with H by automatic differentiation, -f' b' H^-1 b is the rate at which optima move, and positive."""
    import torch

    graph, (w, lo), ref, beta, alpha = problem
    more, step = with_pair(graph, (w, lo)), 1e-4
    start = optimum(graph, dpo, targets=np.zeros(len(graph)), beta=beta, ref_logps=ref, alpha=alpha)
    moved = _margin(more.with_weights([*graph.weights, step]), dpo, problem)
    weights, shares = torch.tensor(graph.weights.copy()), torch.tensor(np.exp(ref))

    def total(u: Any) -> Any:
        # alpha KL with its constraint: alpha (E_ref[-u] + E_ref[e^u] - 1), least where the probabilities sum to one
        pairs = (weights * losses.dpo(graph.margins(u), beta=beta)).sum()
        return losses.pessimistic(pairs, (shares * (losses.forward_kl(u) + u.exp() - 1)).sum(), alpha=alpha)

    functional: Any = torch.autograd.functional
    hessian = functional.hessian(total, torch.tensor(start))
    b = torch.zeros(graph.n, dtype=torch.float64)
    b[w], b[lo] = 1.0, -1.0
    resistance = float(b @ torch.linalg.solve(hessian, b))
    slope, bend = (float(f(start[w] - start[lo], 0.0, beta)) for f in slope_and_curvature(dpo))
    assert resistance > 0
    rate, linear = (moved - (start[w] - start[lo])) / step, -slope * resistance
    # The second-order part of the move is of the size step resistance (bend + |slope|) relative to it.
    assert abs(rate - linear) <= linear * (1e-4 + 20 * step * resistance * (1 + beta) * (bend + beta)) + 1e-6


CLAIMS = (
    Claim(
        id="added-pair",
        source="ours; on [F] 7.2, Figure B.2 and A.10, Proposition 7",
        statement=(
            "Let f on one more pair, with any weight, be added to any objective. At global minimisers its loss is not "
            "higher than before: with DPO's f the pair's margin never narrows, with IPO's it moves towards 1 / (2 tau) "
            "and not beyond. Under p-DPO with summed losses it widens strictly, whatever alpha, beta, pi_ref and the "
            "other pairs. Averaging the losses is summing them with alpha times the total weight W, so a pair of "
            "weight w also raises alpha by (W + w) / W: only that can narrow its margin."
        ),
        formula=(
            r"u_0\in\arg\min F,\ u_1\in\arg\min F+wf(\Delta_{ik})\ \Rightarrow\ f(\Delta_{ik}(u_1))\le f(\Delta_{ik}"
            r"(u_0));\qquad\tfrac{d\Delta_{ik}}{dw}=-f'\,\tfrac{R}{1+wf''R},\ R=b^\top H^{-1}b>0"
        ),
        domain="the first sentence: any policies; the strict one: finite responses, tabular, alpha > 0, full support",
        losses=("dpo", "ipo", "forward_kl", "pessimistic", "logratio_margin"),
        assumptions={
            "summed": "the other terms keep their weights",
            "global minimisers": "both points are global minimisers of their objectives",
            "decreasing loss": "f falls with the margin, as DPO's; for the margin not to narrow",
        },
        prove=prove,
        counterexamples={
            "summed": lambda: _narrows(averaged_chain(), "p-DPO, beta 1, alpha 0.1, averaged, 0 > 2 on 0 > 1 > 2"),
            "global minimisers": lambda: _narrows(
                local_minimum(), "rewards of margins 2, -2 and DPO added: 2 to a local minimum below -1"
            ),
            "decreasing loss": lambda: _narrows(ipo_beyond(), "IPO, tau = 1/2, 0 > 2 on 0 > 1 > 2"),
        },
        controls={
            "without summed": lambda: check_margins(*averaged_chain()),
            "without global minimisers": lambda: check_margins(*local_minimum()),
            "without decreasing loss": lambda: check_margins(*ipo_beyond()),
            "averaged in the proof": lambda: check_revealed(STRUCTURES["chain"], (0, 2), dpo, reduced=averaged),
            "another pair's loss": lambda: check_revealed(STRUCTURES["chain"], (0, 2), dpo, judged=(0, 1)),
            "the pair the other way round": lambda: check_revealed(STRUCTURES["chain"], (0, 2), dpo, judged=(2, 0)),
            "averaged along the path": lambda: check_path(STRUCTURES["chain"], (0, 2), averaged),
            "IPO falls": lambda: check_falls(ipo),
            "IPO draws to 1 / tau": lambda: check_draws(ipo, 1 / SCALE),
            "DPO draws to 1 / (2 beta)": lambda: check_draws(dpo, 1 / (2 * SCALE)),
            "alpha stays": lambda: check_reduction(STRUCTURES["chain"], (0, 2), dpo, lambda total, added: 1),
            "alpha falls": lambda: check_reduction(
                STRUCTURES["chain"], (0, 2), dpo, lambda total, added: total / (total + added)
            ),
        },
        enumerate=enumerate_graphs,
        properties=(the_pair_gets_its_way, the_rate_is_that_of_the_hessian),
    ),
)
