"""When the DPO loss has no finite optimum, and which margins then diverge.

The printed proposition treats disjoint pairs. The sharp form, for any preference graph, is the classical condition of
Zermelo (1929) and Ford (1957) for a Bradley-Terry maximum-likelihood estimate to exist: an edge's margin diverges
along minimising sequences iff its ends lie in different strongly connected components.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import losses
from theory.algebra import limit, simplify, vanishes
from theory.certificates import farkas, reaches, stationarity
from theory.claim import Claim, require
from theory.preferences import Floats, PreferenceGraph
from theory.propositions.mass_transfer import dpo, optimum, slope_and_curvature
from theory.strategies import disjoint_pairs, positive, preference_graphs, vectors

BETA, LEVEL = sp.symbols("beta epsilon", positive=True)
MARGIN = sp.Symbol("Delta", real=True)

Loss = Callable[[Any], Any]
"""Log-ratio margin -> unreduced loss at beta = BETA."""
Margin = Callable[[Any, Any, Any, Any], Any]
"""log pi(y_w), log pi(y_l), log pi_ref(y_w), log pi_ref(y_l) -> log-ratio margin."""
Features = Sequence[Sequence[int]]
"""[n, p]: the policy's logits are features @ theta."""
Crossing = Callable[[PreferenceGraph], npt.NDArray[np.bool_]]
"""Graph -> [m], whether an edge's margin diverges."""


def _dpo(margin: Any) -> Any:
    return losses.dpo(margin, beta=BETA)


def _margin(winner: Any, loser: Any, ref_winner: Any, ref_loser: Any) -> Any:
    return losses.logratio_margin(winner, loser, ref_winner, ref_loser)


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
    require(simplify(sp.exp(value) - 1).is_positive, "the loss is not positive at every finite margin")
    require(sp.factor(simplify(sp.diff(value, MARGIN))).is_negative, "the loss does not fall with the margin")
    require(sp.factor(simplify(sp.diff(value, MARGIN, 2))).is_positive, "the loss is not strictly convex")
    require(limit(value, MARGIN, sp.oo) == 0, "the loss does not tend to 0")
    bound = margin_at_least(LEVEL, BETA)
    require(vanishes(value.subs(MARGIN, bound) - LEVEL), "the bound does not attain the level")
    require(limit(bound, LEVEL, 0, "+") == sp.oo, "a small loss does not force a large margin")


def check_margin(margin: Margin) -> None:
    """A margin is the log of the pair's odds under pi over those under pi_ref: normalising pi is not seen, so that any
    log-ratios will do."""
    winner, loser, ref_winner, ref_loser = sp.symbols("p_w p_l q_w q_l", positive=True)
    odds = (winner / loser) / (ref_winner / ref_loser)
    found = sp.exp(margin(*(sp.log(p) for p in (winner, loser, ref_winner, ref_loser))))
    require(vanishes(found - odds), f"the margin is log({simplify(found)})")


def check_all_rise(graph: PreferenceGraph, features: Features | None = None) -> None:
    """Exactly, in integers: lifting winners and lowering losers raises every margin, and the policy can do that.

    Args:
        graph: the pairs.
        features: of the policy; one free parameter a response where not given.
    """
    net_wins = np.rint(graph.incidence.T @ np.ones(len(graph))).astype(int)
    rises = graph.margins(net_wins)
    require(bool((rises > 0).all()), f"{graph.edges.tolist()}: the margins rise by {rises.tolist()}")
    if features is not None:
        require(reaches(features, net_wins[:, None].tolist()), "the policy cannot lift all winners over the losers")


def check_unbounded_below(loss: Loss) -> None:
    """The loss tends to infinity at a margin of -infinity, so that a level of it bounds the margin below."""
    require(limit(loss(MARGIN), MARGIN, -sp.oo) == sp.oo, "the loss stays finite however negative the margin")


def check_cycles_cancel(difference: Callable[[Any, Any], Any]) -> None:
    """Margins cancel round a cycle of any length k: each is minus the sum of the others, which the loss bounds below.

    Args:
        difference: log-ratios of an edge's ends -> its margin.
    """
    u = sp.Function("u")
    i, k = sp.symbols("i k", integer=True, positive=True)
    around = sp.summation(difference(u(i), u(i + 1)), (i, 1, k))
    require(around.subs(u(k + 1), u(1)) == 0, "margins do not cancel round a cycle")


def check_alternatives(
    graph: PreferenceGraph,
    crossing: Crossing,
    *,
    weights: Sequence[float] | None = None,
    features: Features | None = None,
) -> None:
    """Exactly, in integers: an edge called divergent rises along a direction in which no margin falls; any other edge
    lies on a cycle, which bounds it. By Farkas' lemma every edge has one of the two certificates and none has both.

    Args:
        graph: the preferences.
        crossing: which edges are called divergent.
        weights: in place of the graph's own, >= 0; an edge without weight is in no sum, and bounds nothing.
        features: of the policy; one free parameter a response where not given.
    """
    rises = graph.margins(graph.ranks)
    require(bool((rises >= 0).all()), f"{graph.edges.tolist()}: a margin falls along the ranks")
    if features is not None:
        require(reaches(features, graph.ranks[:, None].tolist()), "the policy cannot move along the ranks")
    beats = np.zeros((graph.n, graph.n), dtype=bool)  # Warshall: by some chain of preferences
    counted = np.asarray(graph.weights if weights is None else weights) > 0
    beats[graph.winners[counted], graph.losers[counted]] = True
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


ONE_PAIR = PreferenceGraph(2, [(0, 1)])
TWO_CYCLE = PreferenceGraph(2, [(0, 1), (1, 0)], [2.0, 1.0])
THREE_CYCLE = PreferenceGraph(3, [(0, 1), (1, 2), (2, 0)])
TWO_PAIRS = PreferenceGraph(4, [(0, 1), (2, 3)])
DISJOINT = (ONE_PAIR, TWO_PAIRS, PreferenceGraph(7, [(4, 1), (0, 5), (6, 2)], [1.0, 0.5, 3.0]))
OPPOSED = [[1], [-1], [-1], [1]]
"""Features of one parameter t that gives the pairs 0 > 1 and 2 > 3 the margins 2t and -2t."""


def prove_pairs_on(
    graphs: Iterable[PreferenceGraph],
    *,
    loss: Loss = _dpo,
    margin: Margin = _margin,
    features: Features | None = None,
) -> None:
    """Each weighted term is positive, so a total near 0 makes each small, and only a large margin does that
    (`check_infimum_at_infinity`). All become small at once along a direction that raises every margin.

    Args:
        graphs: the pairs, of one dataset each.
        loss: of a pair.
        margin: from log-probabilities.
        features: of the policy; one free parameter a response where not given.
    """
    check_infimum_at_infinity(loss)
    check_margin(margin)
    for graph in graphs:
        check_all_rise(graph, features)


def prove_components_on(graphs: Iterable[PreferenceGraph], *, margin: Margin = _margin) -> None:
    """On u + t ranks the crossing terms tend to 0 and the others stay: so the infimum is the sum over components of
    their own minima, and a minimising sequence sends every crossing term to 0. Within a component, the loss bounds
    every margin below, and cycles bound it above: the minimum is attained, at one set of margins by strict convexity.
    """
    check_infimum_at_infinity(_dpo)
    check_unbounded_below(_dpo)
    check_margin(margin)
    check_cycles_cancel(lambda a, b: margin(a, b, sp.S.Zero, sp.S.Zero))
    for graph in graphs:
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
        require(vanishes(sp.diff(total, variable).subs(origin)), "0 is not stationary")
    return simplify(total.subs(origin))


def _three_cycle() -> str:
    u = sp.symbols("u0:3", real=True)
    value = _finite_optimum(sum(_dpo(u[i] - u[(i + 1) % 3]) for i in range(3)), *u)
    require(vanishes(value - 3 * sp.log(2)), "another minimum")
    return "0 > 1, 1 > 2, 2 > 0: the minimum 3 log 2 is attained at equal log-ratios"


def _both_directions() -> str:
    a, b = sp.symbols("a b", positive=True)
    total = a * _dpo(MARGIN) + b * _dpo(-MARGIN)
    slope = sp.diff(total, MARGIN).subs(MARGIN, sp.log(a / b) / BETA)
    require(vanishes(slope), "log(a / b) / beta is not stationary")
    return "0 > 1 with weight a, 1 > 0 with weight b: the optimum is Delta = log(a / b) / beta"


def _tied_parameters() -> str:
    """One parameter t for two disjoint pairs, with features that oppose them: Delta_1 = t, Delta_2 = -t."""
    value = _finite_optimum(_dpo(MARGIN) + _dpo(-MARGIN), MARGIN)
    require(vanishes(value - 2 * sp.log(2)), "another minimum")
    return "0 > 1 and 2 > 3 with margins t and -t of one shared parameter: the minimum 2 log 2 is attained at t = 0"


def _zero_weight() -> str:
    require(limit(_dpo(MARGIN) + 0 * _dpo(-MARGIN), MARGIN, sp.oo) == 0, "the loss stays positive")
    return "0 > 1 with weight 1, 1 > 0 with weight 0: one strong component, yet the margin diverges"


def _ipo() -> str:
    tau = sp.Symbol("tau", positive=True)
    require(losses.ipo(1 / (2 * tau), tau=tau) == 0, "IPO does not attain 0")
    return "IPO on the single pair 0 > 1: different strong components, yet the optimum 1 / (2 tau) is finite"


def sigmoid_loss(margin: Any) -> Any:
    """sigma(-beta Delta): strictly decreasing with infimum 0, and not convex."""
    return 1 - sp.exp(-_dpo(margin))


def _not_convex() -> str:
    """2 sigma(-z) + sigma(z) = 1 + sigma(-z) falls for ever, inside one strong component."""
    total = 2 * sigmoid_loss(MARGIN) + sigmoid_loss(-MARGIN)
    require(vanishes(total - 1 - sigmoid_loss(MARGIN)), "another total")
    require(sp.factor(simplify(sp.diff(sigmoid_loss(MARGIN), MARGIN))).is_negative, "the loss does not fall")
    require(limit(sigmoid_loss(MARGIN), MARGIN, sp.oo) == 0, "the infimum of the loss is not 0")
    at = [float(total.subs({BETA: 1, MARGIN: z})) for z in (-50, 0, 5, 50)]
    return (
        "sigma(-z), 0 > 1 with weight 2 and 1 > 0 with weight 1: one strong component, yet the total is "
        f"{', '.join(f'{value:.4g}' for value in at)} at z = -50, 0, 5, 50 and the margin diverges"
    )


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
            "minimising sequence sends every margin to infinity, that is the winner's odds against the loser relative "
            "to those of the reference, whatever beta."
        ),
        formula=r"\textstyle\sum_i w_i\,\ell_{\rm DPO}(\Delta_i)\to 0\iff\Delta_i\to\infty\ \text{for all } i,\quad "
        r"e^{\Delta_i}=\tfrac{\pi(y_w^i)/\pi(y_l^i)}{\pi_{\rm ref}(y_w^i)/\pi_{\rm ref}(y_l^i)}",
        domain="finitely many responses, tabular; minimising sequences of any kind, no flow",
        losses=("logratio_margin", "bradley_terry", "dpo"),
        assumptions={
            "disjoint pairs": "no response is in two pairs",
            "one direction": "no pair is observed both ways",
            "free parameters": "one free parameter a response",
        },
        prove=lambda: prove_pairs_on(DISJOINT),
        counterexamples={
            "disjoint pairs": _three_cycle,
            "one direction": _both_directions,
            "free parameters": _tied_parameters,
        },
        controls={
            "without disjoint pairs": lambda: prove_pairs_on([THREE_CYCLE]),
            "without one direction": lambda: prove_pairs_on([TWO_CYCLE]),
            "without free parameters": lambda: prove_pairs_on([TWO_PAIRS], features=OPPOSED),
            "sign of the margin": lambda: prove_pairs_on(DISJOINT, loss=lambda z: _dpo(-z)),
            "IPO": lambda: prove_pairs_on(DISJOINT, loss=lambda z: losses.ipo(z, tau=BETA)),
            "beta doubled": lambda: prove_pairs_on(DISJOINT, loss=lambda z: losses.dpo(z, beta=2 * BETA)),
            "a constant added": lambda: prove_pairs_on(DISJOINT, loss=lambda z: _dpo(z) + 1),
            "sign of the reference": lambda: prove_pairs_on(DISJOINT, margin=lambda w, x, p, q: _margin(w, x, -p, -q)),
            "no reference": lambda: prove_pairs_on(DISJOINT, margin=lambda w, x, p, q: w - x),
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
            "attains its minimum iff every edge lies on a preference cycle. What DPO's loss brings to this is that it "
            "is strictly convex and strictly decreasing, with infimum 0."
        ),
        formula=r"\Delta_{wl}\to\infty\iff \mathrm{scc}(w)\neq\mathrm{scc}(l)",
        domain="finitely many responses, tabular; minimising sequences of any kind, no flow",
        losses=("logratio_margin", "bradley_terry", "dpo"),
        assumptions={
            "positive weights": "every edge has positive weight",
            "free parameters": "one free parameter a response",
            "decreasing loss": "the loss of a pair falls strictly with its margin, to an infimum of 0",
            "convex loss": "the loss of a pair is strictly convex in its margin; so it is unbounded at -infinity",
        },
        prove=lambda: prove_components_on(digraphs(3)),
        counterexamples={
            "positive weights": _zero_weight,
            "free parameters": _tied_parameters,
            "decreasing loss": _ipo,
            "convex loss": _not_convex,
        },
        controls={
            "without positive weights": lambda: check_alternatives(TWO_CYCLE, across_components, weights=[1.0, 0.0]),
            "without free parameters": lambda: check_alternatives(TWO_PAIRS, across_components, features=OPPOSED),
            "without decreasing loss": lambda: check_infimum_at_infinity(lambda z: losses.ipo(z, tau=BETA)),
            "without convex loss": lambda: check_unbounded_below(sigmoid_loss),
            "sign of the reference": lambda: prove_components_on([], margin=lambda w, x, p, q: _margin(w, x, -p, -q)),
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
