"""When the DPO loss has no finite optimum, and which margins then diverge.

The printed proposition treats disjoint pairs. The sharp form, for any preference graph, is the classical condition of
Zermelo (1929) and Ford (1957) for a Bradley-Terry maximum-likelihood estimate to exist: an edge's margin diverges
along minimising sequences iff its ends lie in different strongly connected components.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import losses
from theory.certificates import farkas, stationarity
from theory.claim import Claim, require
from theory.preferences import Floats, PreferenceGraph
from theory.propositions.mass_transfer import dpo, optimum, slope_and_curvature
from theory.strategies import disjoint_pairs, positive, preference_graphs, vectors

BETA, LEVEL = sp.symbols("beta epsilon", positive=True)
MARGIN, SHIFT = sp.symbols("Delta c", real=True)

Loss = Callable[[Any], Any]
"""Log-ratio margin -> unreduced loss at beta = BETA."""
Crossing = Callable[[PreferenceGraph], npt.NDArray[np.bool_]]
"""Graph -> [m], whether an edge's margin diverges."""


def _dpo(margin: Any) -> Any:
    return losses.dpo(margin, beta=BETA)


def margin_at_least(level: Any, beta: Any) -> Any:
    """The margin at which a pair's loss is `level`, -log(e^level - 1) / beta; SymPy or NumPy, any level > 0."""
    if isinstance(level, sp.Expr):
        return -sp.log(sp.exp(level) - 1) / beta
    return -(level + np.log(-np.expm1(-level))) / beta


# ---------------------------------------------------------------- checks


def check_infimum_at_infinity(loss: Loss) -> None:
    """0 < loss everywhere, strictly falling, strictly convex, with limit 0: it is small only at a large margin."""
    value = loss(MARGIN)
    # The loss is a logarithm; SymPy settles its sign on the exponential.
    require(sp.simplify(sp.exp(value) - 1).is_positive, "the loss is not positive at every finite margin")
    require(sp.factor(sp.simplify(sp.diff(value, MARGIN))).is_negative, "the loss does not fall with the margin")
    require(sp.factor(sp.simplify(sp.diff(value, MARGIN, 2))).is_positive, "the loss is not strictly convex")
    require(sp.limit(value, MARGIN, sp.oo) == 0, "the loss does not tend to 0")
    bound = margin_at_least(LEVEL, BETA)
    require(sp.simplify(value.subs(MARGIN, bound) - LEVEL) == 0, "the bound does not attain the level")
    require(sp.limit(bound, LEVEL, 0, "+") == sp.oo, "a small loss does not force a large margin")


def check_margins_are_free() -> None:
    """Normalising a policy shifts all log-ratios alike, which no margin sees; so any log-ratios will do."""
    policy_w, policy_l, ref_w, ref_l = sp.symbols("l_w l_l ref_w ref_l", real=True)
    moved = losses.logratio_margin(policy_w + SHIFT, policy_l + SHIFT, ref_w, ref_l)
    require(sp.expand(moved - losses.logratio_margin(policy_w, policy_l, ref_w, ref_l)) == 0, "the shift is seen")
    require(losses.logratio_margin(MARGIN, sp.S.Zero, sp.S.Zero, sp.S.Zero) == MARGIN, "a margin is not attained")


def check_cycles_cancel(difference: Callable[[Any, Any], Any]) -> None:
    """Margins cancel round a cycle of any length k: each is minus the sum of the others, which the loss bounds below.

    Args:
        difference: log-ratios of an edge's ends -> its margin.
    """
    u = sp.Function("u")
    i, k = sp.symbols("i k", integer=True, positive=True)
    around = sp.summation(difference(u(i), u(i + 1)), (i, 1, k))
    require(around.subs(u(k + 1), u(1)) == 0, "margins do not cancel round a cycle")


def check_alternatives(graph: PreferenceGraph, crossing: Crossing) -> None:
    """Exactly, in integers: an edge called divergent rises along a direction in which no margin falls; any other edge
    lies on a cycle, which bounds it. By Farkas' lemma every edge has one of the two certificates and none has both.
    """
    rises = graph.margins(graph.ranks)
    require(bool((rises >= 0).all()), f"{graph.edges.tolist()}: a margin falls along the ranks")
    beats = np.zeros((graph.n, graph.n), dtype=bool)  # Warshall: by some chain of preferences
    beats[graph.winners, graph.losers] = True
    for via in range(graph.n):
        beats |= beats[:, via, None] & beats[via]
    for (winner, loser), rise, divergent in zip(graph.edges.tolist(), rises, crossing(graph), strict=True):
        edge = f"{graph.edges.tolist()}: ({winner}, {loser}) is called"
        if divergent:
            require(bool(rise > 0), f"{edge} divergent, but does not rise")
        else:
            require(bool(beats[loser, winner]), f"{edge} bounded, but lies on no cycle")


def across_components(graph: PreferenceGraph) -> npt.NDArray[np.bool_]:
    """The sharp form: ends in different strongly connected components."""
    return graph.crossing


def prove_pairs() -> None:
    check_infimum_at_infinity(_dpo)
    check_margins_are_free()


def prove_components() -> None:
    """On u + t ranks the crossing terms tend to 0 and the others stay: so the infimum is the sum over components of
    their own minima, and a minimising sequence sends every crossing term to 0. Within a component, the loss bounds
    every margin below, and cycles bound it above: the minimum is attained, at one set of margins by convexity.
    """
    check_infimum_at_infinity(_dpo)
    check_margins_are_free()
    check_cycles_cancel(lambda a, b: losses.logratio_margin(a, b, sp.S.Zero, sp.S.Zero))
    for graph in digraphs(3):
        check_alternatives(graph, across_components)


def digraphs(n: int) -> Iterator[PreferenceGraph]:
    """Every directed graph on n responses with at least one edge and no loop, once up to relabelling."""
    pairs = list(itertools.permutations(range(n), 2))
    codes = np.arange(1, 2 ** len(pairs))
    canonical = codes.copy()
    for order in itertools.permutations(range(n)):
        renamed = np.zeros_like(codes)
        for bit, (i, j) in enumerate(pairs):
            renamed |= ((codes >> bit) & 1) << pairs.index((order[i], order[j]))
        np.minimum(canonical, renamed, out=canonical)
    for code in codes[canonical == codes].tolist():
        yield PreferenceGraph(n, [pair for bit, pair in enumerate(pairs) if code >> bit & 1])


def enumerate_graphs(thorough: bool) -> str:
    largest = 5 if thorough else 4
    count = 0
    for n in range(2, largest + 1):
        for graph in digraphs(n):
            check_alternatives(graph, across_components)
            count += 1
    solved = 0
    for n in range(2, 5 if thorough else 4):
        for graph in digraphs(n):
            _check_against_clarabel(graph.with_weights([1.0 + edge % 3 for edge in range(len(graph))]))
            solved += 1
    return f"all {count} digraphs up to relabelling, n <= {largest}; {solved} exponential-cone programs"


def _check_against_clarabel(graph: PreferenceGraph) -> None:
    """An independent conic solver, log-ratios in a box: same infimum, same bounded margins, the rest at the box."""
    import cvxpy as cp

    beta, box = 1.5, 20.0
    u = cp.Variable(graph.n)
    problem = cp.Problem(
        cp.Minimize(graph.weights @ cp.logistic(-beta * (graph.incidence @ u))), [cp.abs(u) <= box / beta]
    )
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-7, tol_gap_rel=1e-7)
    margins, crossing, where = graph.margins(u.value), graph.crossing, graph.edges.tolist()
    ours = graph.margins(component_optimum(graph, beta))
    require(bool(np.abs(margins - ours)[~crossing].max(initial=0) < 1e-3), f"{where}: other margins inside components")
    require(bool((beta * margins[crossing] > 4).all()), f"{where}: a crossing margin stays at {margins[crossing]}")
    infimum = float((graph.weights * losses.dpo(ours, beta=beta))[~crossing].sum())
    require(abs(problem.value - infimum) < 1e-3, f"{where}: infimum {problem.value}, by components {infimum}")


def component_optimum(graph: PreferenceGraph, beta: float) -> Floats:
    """Log-ratios [n] of smallest norm that minimise the loss of the edges inside strong components."""
    inside = ~graph.crossing
    if not inside.any():
        return np.zeros(graph.n)
    inner = PreferenceGraph(graph.n, graph.edges[inside], graph.weights[inside])
    ref = np.full(graph.n, -np.log(graph.n))
    return optimum(inner, dpo, targets=np.zeros(len(inner)), beta=beta, ref_logps=ref, alpha=0.0)


# ---------------------------------------------------------------- without each assumption


def _finite_optimum(total: sp.Expr, *variables: sp.Symbol) -> sp.Expr:
    """The value at 0, once 0 is shown stationary; the sum is convex, each term being convex in a linear margin."""
    origin = dict.fromkeys(variables, 0)
    for variable in variables:
        require(sp.simplify(sp.diff(total, variable).subs(origin)) == 0, "0 is not stationary")
    return sp.simplify(total.subs(origin))


def _three_cycle() -> str:
    u = sp.symbols("u0:3", real=True)
    value = _finite_optimum(sum(_dpo(u[i] - u[(i + 1) % 3]) for i in range(3)), *u)
    require(sp.simplify(value - 3 * sp.log(2)) == 0, "another minimum")
    return "0 > 1, 1 > 2, 2 > 0: the minimum 3 log 2 is attained at equal log-ratios"


def _both_directions() -> str:
    a, b = sp.symbols("a b", positive=True)
    total = a * _dpo(MARGIN) + b * _dpo(-MARGIN)
    slope = sp.diff(total, MARGIN).subs(MARGIN, sp.log(a / b) / BETA)
    require(sp.simplify(slope) == 0, "log(a / b) / beta is not stationary")
    return "0 > 1 with weight a, 1 > 0 with weight b: the optimum is Delta = log(a / b) / beta"


def _tied_parameters() -> str:
    """One parameter t for two disjoint pairs, with features that oppose them: Delta_1 = t, Delta_2 = -t."""
    value = _finite_optimum(_dpo(MARGIN) + _dpo(-MARGIN), MARGIN)
    require(sp.simplify(value - 2 * sp.log(2)) == 0, "another minimum")
    return "0 > 1 and 2 > 3 with margins t and -t of one shared parameter: the minimum 2 log 2 is attained at t = 0"


def _zero_weight() -> str:
    require(sp.limit(_dpo(MARGIN) + 0 * _dpo(-MARGIN), MARGIN, sp.oo) == 0, "the loss stays positive")
    return "0 > 1 with weight 1, 1 > 0 with weight 0: one strong component, yet the margin diverges"


def _another_loss() -> str:
    tau = sp.Symbol("tau", positive=True)
    require(losses.ipo(1 / (2 * tau), tau=tau) == 0, "IPO does not attain 0")
    return "IPO on the single pair 0 > 1: different strong components, yet the optimum 1 / (2 tau) is finite"


# ---------------------------------------------------------------- properties


@st.composite
def _policies(draw: st.DrawFn, graphs: st.SearchStrategy[PreferenceGraph]) -> tuple[PreferenceGraph, Floats, float]:
    graph = draw(graphs)
    return graph, draw(vectors(graph.n, 10.0)), draw(positive(0.1, 5))


@given(_policies(disjoint_pairs()))
def small_loss_forces_every_margin_up(problem: tuple[PreferenceGraph, Floats, float]) -> None:
    """NumPy: total loss eps bounds each margin by that of eps / weight; pushing on, the loss falls below any level."""
    graph, u, beta = problem
    total = float(graph.weights @ losses.dpo(graph.margins(u), beta=beta))
    bounds = margin_at_least(total / graph.weights, beta)
    assert (graph.margins(u) >= bounds - 1e-9 * (1 + np.abs(bounds))).all()
    pushed = u + (150 / beta - min(graph.margins(u).min(), 0)) * graph.ranks
    assert 0 < float(graph.weights @ losses.dpo(graph.margins(pushed), beta=beta)) < 1e-60


@given(_policies(disjoint_pairs() | preference_graphs()))
def gradient_descent_never_rests_unless_every_edge_is_on_a_cycle(
    problem: tuple[PreferenceGraph, Floats, float],
) -> None:
    """torch: along the ranks the slope is < 0 at every policy iff some edge crosses, and 0 otherwise."""
    import torch

    graph, u, beta = problem
    # By the chain rule in the margins: added up by response first, a crossing edge's slope of 1e-40 would be lost.
    margins = graph.margins(torch.tensor(u)).requires_grad_()
    total = (torch.tensor(graph.weights) * losses.dpo(margins, beta=beta)).sum()
    slope = float(
        torch.autograd.grad(total, margins)[0] @ torch.tensor(graph.margins(graph.ranks), dtype=torch.float64)
    )
    if graph.crossing.any():
        assert slope < 0
    else:
        assert (graph.ranks == 0).all()


@given(_policies(preference_graphs()))
def margins_inside_components_are_bounded_and_attained(problem: tuple[PreferenceGraph, Floats, float]) -> None:
    """NumPy: the loss at any policy bounds |Delta| inside components by the cycle's other margins; an optimum of the
    component terms is certified by stationarity, and its cycles by Farkas."""
    graph, u, beta = problem
    inside, margins = ~graph.crossing, graph.margins(u)
    total = float(graph.weights @ losses.dpo(margins, beta=beta))
    lowest = -np.minimum(margin_at_least(total / graph.weights, beta), 0).min()
    assert (margins[inside] <= (graph.n - 1) * lowest + 1e-9 * (1 + lowest)).all()
    if inside.any():
        best = component_optimum(graph, beta)
        slopes = graph.weights * slope_and_curvature(dpo)[0](graph.margins(best), 0.0, beta) * inside
        assert stationarity(graph.incidence.T @ slopes).accepts(1e-10 * beta)
        # The slopes at the optimum balance round cycles: they are themselves a Farkas certificate.
        assert farkas(graph, slopes / slopes.sum()).accepts(1e-9)


def _by_weak_components(graph: PreferenceGraph) -> npt.NDArray[np.bool_]:
    return np.asarray(graph.components[graph.winners] != graph.components[graph.losers])


def _unless_observed_both_ways(graph: PreferenceGraph) -> npt.NDArray[np.bool_]:
    both = {(lo, w) for w, lo in graph.edges.tolist()}
    return np.array([(w, lo) not in both for w, lo in graph.edges.tolist()])


def _on_all_digraphs(crossing: Crossing) -> None:
    for graph in digraphs(3):
        check_alternatives(graph, crossing)


CLAIMS = (
    Claim(
        id="prop1",
        source="[F] A.1, Proposition 1",
        statement=(
            "On disjoint pairs with one free parameter a response, the DPO loss has infimum 0, not attained, and every "
            "minimising sequence sends every margin to infinity, whatever beta."
        ),
        formula=r"\textstyle\sum_i w_i\,\ell_{\rm DPO}(\Delta_i)\to 0\iff\Delta_i\to\infty\ \text{for all } i",
        assumptions={
            "disjoint pairs": "no response is in two pairs",
            "one direction": "no pair is observed both ways",
            "free parameters": "one free parameter a response",
        },
        prove=prove_pairs,
        counterexamples={
            "disjoint pairs": _three_cycle,
            "one direction": _both_directions,
            "free parameters": _tied_parameters,
        },
        controls={
            "sign of the margin": lambda: check_infimum_at_infinity(lambda z: _dpo(-z)),
            "IPO": lambda: check_infimum_at_infinity(lambda z: losses.ipo(z, tau=BETA)),
            "beta doubled": lambda: check_infimum_at_infinity(lambda z: losses.dpo(z, beta=2 * BETA)),
            "a constant added": lambda: check_infimum_at_infinity(lambda z: _dpo(z) + 1),
        },
        properties=(
            small_loss_forces_every_margin_up,
            gradient_descent_never_rests_unless_every_edge_is_on_a_cycle,
        ),
    ),
    Claim(
        id="prop1-scc",
        source="ours, after Zermelo 1929 and Ford 1957; sharpens [F] A.1, Proposition 1",
        statement=(
            "On any weighted preference graph an edge's DPO margin diverges along minimising sequences iff its ends "
            "lie in different strongly connected components; inside one, it tends to a finite optimum. So the loss "
            "attains its minimum iff every edge lies on a preference cycle."
        ),
        formula=r"\Delta_{wl}\to\infty\iff \mathrm{scc}(w)\neq\mathrm{scc}(l)",
        assumptions={
            "positive weights": "every edge has positive weight",
            "free parameters": "one free parameter a response",
            "logistic loss": "the loss of a pair is strictly decreasing in its margin, with infimum 0",
        },
        prove=prove_components,
        counterexamples={
            "positive weights": _zero_weight,
            "free parameters": _tied_parameters,
            "logistic loss": _another_loss,
        },
        controls={
            "weak components": lambda: _on_all_digraphs(_by_weak_components),
            "cycles of length two only": lambda: _on_all_digraphs(_unless_observed_both_ways),
            "always divergent": lambda: _on_all_digraphs(lambda graph: np.ones(len(graph), dtype=bool)),
            "sum for difference": lambda: check_cycles_cancel(lambda a, b: a + b),
            "sign of the margin": lambda: check_infimum_at_infinity(lambda z: _dpo(-z)),
        },
        enumerate=enumerate_graphs,
        properties=(
            margins_inside_components_are_bounded_and_attained,
            gradient_descent_never_rests_unless_every_edge_is_on_a_cycle,
        ),
        sharpens=True,
    ),
)
