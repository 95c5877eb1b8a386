"""IPO on comparison graphs: the optimum solves a Laplacian system, and a transitive closure narrows its spread.

Every edge (i, j) wants u_i - u_j = 1 / (2 tau). Stationarity of the sum of squares is L u = B' w / (2 tau), with L the
weighted Laplacian, B the incidence matrix and B' w each response's wins minus losses. No equal gaps are assumed; for
the chain and its closure they come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, product

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st
from sympy.polys.matrices import DomainMatrix

from theory import losses
from theory.algebra import limit, vanishes
from theory.claim import Claim, require
from theory.preferences import Floats, PreferenceGraph
from theory.strategies import positive, preference_graphs, vectors

TAU = sp.Symbol("tau", positive=True)
MARGIN = sp.Symbol("Delta", real=True)

Rationals = list[sp.Rational]


def edge_slope(margin: sp.Expr, tau: sp.Expr) -> sp.Expr:
    """d ipo / d Delta at (Delta, tau), from the loss itself."""
    return sp.diff(losses.ipo(MARGIN, tau=TAU), MARGIN).subs({MARGIN: margin, TAU: tau})


def solve_exactly(graph: PreferenceGraph, tau: sp.Rational) -> Rationals:
    """Rational solution of L u = B' w / (2 tau), the first response of each component at 0."""
    laplacian = [[sp.Rational(x) for x in row] for row in graph.laplacian().toarray().tolist()]
    target = [[sp.Rational(x) / (2 * tau)] for x in (graph.incidence.T @ graph.weights).tolist()]
    for anchor in np.unique(graph.components, return_index=True)[1].tolist():
        laplacian[anchor], target[anchor] = [sp.Integer(j == anchor) for j in range(graph.n)], [sp.Integer(0)]
    system, right = (
        DomainMatrix.from_list_sympy(graph.n, len(rows[0]), rows).to_field() for rows in (laplacian, target)
    )
    return list(system.convert_to(sp.QQ).lu_solve(right.convert_to(sp.QQ)).to_Matrix())


def total_slopes(graph: PreferenceGraph, values: Sequence[sp.Expr], tau: sp.Expr) -> list[sp.Expr]:
    """dL/du_y at every response of sum over the edges of weight * ipo, for any reference.

    Args:
        graph: the edges.
        values: log-ratios, [n].
        tau: of the loss.
    """
    slopes: list[sp.Expr] = [sp.Integer(0)] * graph.n
    refs = sp.symbols(f"ref0:{graph.n}", real=True)
    logps = [value + ref for value, ref in zip(values, refs, strict=True)]
    slope_at = sp.lambdify((MARGIN, TAU), edge_slope(MARGIN, TAU), modules=[{}])  # many edges, one formula
    for (winner, loser), weight in zip(graph.edges.tolist(), graph.weights.tolist(), strict=True):
        margin = losses.logratio_margin(logps[winner], logps[loser], refs[winner], refs[loser])
        slope = sp.Rational(weight) * slope_at(margin, tau)
        slopes[winner] += slope
        slopes[loser] -= slope
    return slopes


# ---------------------------------------------------------------- checks


WEIGHT = sp.Symbol("w", positive=True)


def check_edge(slope_formula: Callable[[sp.Expr, sp.Expr], sp.Expr], weight: sp.Expr = WEIGHT) -> None:
    """An edge of weight one contributes 2 (Delta - 1/(2 tau)) at its winner, minus that at its loser, and any edge a
    curvature 2 w > 0 in Delta.

    Added up: 2 B' W (B u - 1/(2 tau)) = 2 (L u - B' w / (2 tau)), a convex function whose Hessian 2 L vanishes only
    along vectors that are constant on components.
    """
    u_w, u_l, ref_w, ref_l = sp.symbols("l_w l_l ref_w ref_l", real=True)
    loss = losses.ipo(losses.logratio_margin(u_w, u_l, ref_w, ref_l), tau=TAU)
    margin = (u_w - ref_w) - (u_l - ref_l)
    require(sp.expand(sp.diff(loss, u_w) - slope_formula(margin, TAU)) == 0, "another slope at the winner")
    require(sp.expand(sp.diff(loss, u_l) + slope_formula(margin, TAU)) == 0, "another slope at the loser")
    curvature = sp.diff(weight * losses.ipo(MARGIN, tau=TAU), MARGIN, 2)
    require(curvature == 2 * weight, "another curvature")
    require(curvature.is_positive, "a stationary point need not be a minimum")


def check_chain(gap: sp.Expr) -> None:
    """psi_i = -i gap solves the chain's normal equations: at its first, inner and last arm, so for every n."""
    i = sp.Symbol("i", integer=True)

    def psi(at: sp.Expr) -> sp.Expr:
        return -at * gap

    as_winner, as_loser = edge_slope(psi(i) - psi(i + 1), TAU), -edge_slope(psi(i - 1) - psi(i), TAU)
    for where, slope in (("first", as_winner), ("inner", as_winner + as_loser), ("last", as_loser)):
        require(vanishes(slope), f"the chain is not stationary at its {where} arm")


def check_closure(gap: sp.Expr, n: sp.Symbol) -> None:
    """psi_i = -i gap solves the closure's normal equations at arm i, for symbolic i and n."""
    i, j = sp.symbols("i j", integer=True, positive=True)
    wins = sp.summation(sp.expand(edge_slope((j - i) * gap, TAU)), (j, i + 1, n))
    defeats = sp.summation(sp.expand(-edge_slope((i - j) * gap, TAU)), (j, 1, i - 1))
    require(vanishes(wins + defeats), "the closure is not stationary")


def check_spreads(chain_gap: Callable[[sp.Symbol], sp.Expr], closure_gap: Callable[[sp.Symbol], sp.Expr]) -> None:
    """Both gaps, and the closure's spread being 2 / n of the chain's: smaller exactly for n > 2."""
    n, beyond = sp.Symbol("n", integer=True, positive=True), sp.Symbol("m", integer=True, positive=True)
    check_edge(lambda margin, tau: 2 * (margin - 1 / (2 * tau)))
    check_chain(chain_gap(n))
    check_closure(closure_gap(n), n)
    narrowing = (n - 1) * (chain_gap(n) - closure_gap(n))
    require(vanishes(narrowing.subs(n, 2)), "different spreads at n = 2")
    require(sp.factor(narrowing.subs(n, beyond + 2)).is_positive, "the closure is not narrower for n > 2")


def check_spreads_of(
    chain: PreferenceGraph, closure: PreferenceGraph, ref: Sequence[sp.Rational] | None = None
) -> None:
    """The spreads of log pi on two given graphs over the same arms, solved exactly; the closure's is the narrower.

    Args:
        chain: compared pairs of the one.
        closure: of the other.
        ref: pi_ref, [n]; uniform where not given.
    """
    n, tau = chain.n, sp.Rational(1, 3)
    ends = sp.S.One if ref is None else ref[0] / ref[-1]
    spreads = []
    for graph, gap in ((chain, 1 / (2 * tau)), (closure, 1 / (n * tau))):
        check_graph(solve_exactly, graph)
        u = solve_exactly(graph, tau)
        spreads.append(u[0] - u[-1] + sp.log(ends))
        require(spreads[-1] == (n - 1) * gap, f"{graph.edges.tolist()}: the spread is {spreads[-1]}")
    require(bool(spreads[1] < spreads[0]), f"{n} arms: the spreads are {spreads}")


def closures(n: int) -> tuple[PreferenceGraph, PreferenceGraph]:
    """The chain of n arms and its transitive closure."""
    chain = PreferenceGraph.chain(n)
    return chain, chain.transitive_closure()


def prove_chain() -> None:
    check_spreads(lambda n: 1 / (2 * TAU), lambda n: 1 / (n * TAU))
    for n in (3, 5):
        check_spreads_of(*closures(n))


def enumerate_chains(thorough: bool) -> str:
    """The Laplacian systems solved in rational arithmetic, arm count by arm count."""
    largest, tau = (16 if thorough else 7), sp.Rational(1, 3)
    for n in range(2, largest + 1):
        chain = PreferenceGraph.chain(n)
        for graph, gap in ((chain, 1 / (2 * tau)), (chain.transitive_closure(), 1 / (n * tau))):
            psi = solve_exactly(graph, tau)
            require(all(a - b == gap for a, b in pairwise(psi)), f"other gaps at n = {n}: {psi}")
    return f"chain and closure solved exactly, n <= {largest}"


def check_graph(solution: Callable[[PreferenceGraph, sp.Rational], Rationals], graph: PreferenceGraph) -> None:
    """The solution zeroes the derivative of the IPO loss itself, in exact arithmetic."""
    tau = sp.Rational(1, 3)
    slopes = [sp.expand(slope) for slope in total_slopes(graph, solution(graph, tau), tau)]
    require(all(s == 0 for s in slopes), f"not stationary on edges {graph.edges.tolist()}: {slopes}")


def check_unique(graph: PreferenceGraph, components: int) -> None:
    """Exactly: two solutions differ by a constant on each of so many components."""
    rank = sp.Matrix([[sp.Rational(x) for x in row] for row in graph.laplacian().toarray().tolist()]).rank()
    require(graph.n - rank == components, f"{graph.edges.tolist()}: {graph.n - rank} free constants")


CONNECTED = (
    PreferenceGraph(3, [(0, 1), (1, 2), (2, 0), (0, 2)], [1, 2, 3, 1]),
    PreferenceGraph(4, [(0, 1), (2, 1), (3, 1)], [1, 0.5, 4]),
)
APART = PreferenceGraph(4, [(0, 1), (2, 3)])


def prove_graphs(graphs: Iterable[PreferenceGraph]) -> None:
    """Existence: B' w lies in the range of L = B' W B, whose kernel, B x = 0, is orthogonal to it; and solved exactly.

    Args:
        graphs: connected ones.
    """
    check_edge(lambda margin, tau: 2 * (margin - 1 / (2 * tau)))
    for graph in graphs:
        check_graph(solve_exactly, graph)
        check_unique(graph, 1)


def prove_graph() -> None:
    prove_graphs(CONNECTED)
    check_graph(solve_exactly, APART)
    check_unique(APART, 2)


def enumerate_graphs(thorough: bool) -> str:
    """Every directed graph, weights 1, 2, 3, ... along its edges and, for n < 4, all one; referee Clarabel."""
    largest, count = (4 if thorough else 3), 0
    for n in range(2, largest + 1):
        pairs = [(i, j) for i, j in product(range(n), repeat=2) if i != j]
        for mask in range(1, 2 ** len(pairs)):
            edges = [pair for at, pair in enumerate(pairs) if mask >> at & 1]
            for weights in (None, range(1, len(edges) + 1)) if n < 4 else (range(1, len(edges) + 1),):
                check_graph(solve_exactly, PreferenceGraph(n, edges, weights))
                count += 1
    _check_against_clarabel()
    return f"{count} weighted digraphs, n <= {largest}; 3 quadratic programs"


def _check_against_clarabel() -> None:
    import cvxpy as cp

    for graph in (
        PreferenceGraph.chain(5).transitive_closure(),
        PreferenceGraph(4, [(0, 1), (1, 2), (2, 0), (2, 3)], [1, 0.5, 2, 3]),
        PreferenceGraph(6, [(0, 5), (5, 3), (0, 3), (3, 1), (4, 2), (2, 1)]),
    ):
        u, tau = cp.Variable(graph.n), 0.7
        residual = graph.incidence @ u - 1 / (2 * tau)
        cp.Problem(cp.Minimize(cp.sum_squares(cp.multiply(np.sqrt(graph.weights), residual)))).solve(cp.CLARABEL)
        close = np.allclose(graph.margins(u.value), graph.margins(solve(graph, tau)), atol=1e-5)
        require(close, f"Clarabel finds other margins on edges {graph.edges.tolist()}")


def solve(graph: PreferenceGraph, tau: float) -> Floats:
    """The minimum-norm solution in float64, [n]."""
    net_wins = graph.incidence.T @ graph.weights
    solution: Floats = np.linalg.lstsq(graph.laplacian().toarray(), net_wins / (2 * tau), rcond=None)[0]
    return solution


# ---------------------------------------------------------------- without each assumption


def _biased_reference() -> str:
    """u solves the system, psi = u + log pi_ref: a reference of 2 : 1 adds log 2 to the spread of psi."""
    u = solve_exactly(PreferenceGraph.chain(3), sp.Integer(1))
    ref = [sp.log(sp.Rational(4, 7)), sp.log(sp.Rational(2, 7)), sp.log(sp.Rational(1, 7))]
    spread = sp.expand_log(u[0] + ref[0] - u[2] - ref[2], force=True)
    require(vanishes(spread - 1 - 2 * sp.log(2)) and spread != 1, "the spread is still (n - 1)/(2 tau)")
    return f"n = 3, tau = 1, pi_ref = (4, 2, 1)/7: the spread of log pi is {spread}, not 1"


def _unequal_weights() -> str:
    closure = PreferenceGraph(3, [(0, 1), (1, 2), (0, 2)], [1, 1, 2])
    psi = solve_exactly(closure, sp.Integer(1))
    require(psi[0] - psi[2] != sp.Rational(2, 3), "the spread is still (n - 1)/(n tau)")
    return f"n = 3, tau = 1, pair (1, 3) seen twice: spread {psi[0] - psi[2]}, not 2/3"


def _two_arms() -> str:
    chain = PreferenceGraph.chain(2)
    both = [solve_exactly(g, sp.Integer(1)) for g in (chain, chain.transitive_closure())]
    require(both[0] == both[1], "the spreads differ")
    return "n = 2: the chain is its own closure, both spreads are 1/(2 tau)"


def _disconnected() -> str:
    graph = PreferenceGraph(4, [(0, 1), (2, 3)])
    u = solve_exactly(graph, sp.Integer(1))
    moved = [u[0] + 5, u[1] + 5, u[2], u[3]]
    require(all(sp.expand(s) == 0 for s in total_slopes(graph, moved, sp.Integer(1))), "the moved point is not optimal")
    return "edges 1 > 2 and 3 > 4: adding 5 to u_1 and u_2 keeps every slope 0, so two policies are optimal"


def _negative_weight() -> str:
    value = losses.ipo(MARGIN, tau=TAU) * -1
    require(limit(value, MARGIN, sp.oo) == -sp.oo, "bounded below")
    return "one edge of weight -1: the loss falls without bound in its margin, the stationary point is a maximum"


# ---------------------------------------------------------------- properties


@given(preference_graphs(), positive(), vectors(6))
def laplacian_solution_is_optimal(graph: PreferenceGraph, tau: float, direction: Floats) -> None:
    """NumPy: no other point has a lower loss than the solution of the normal equations."""
    u = solve(graph, tau)
    at, away = (
        float(graph.weights @ losses.ipo(graph.margins(point), tau=tau)) for point in (u, u + direction[: graph.n])
    )
    assert at <= away + 1e-9 * (1 + away), (at, away)


@given(preference_graphs(), positive())
def torch_gradient_vanishes(graph: PreferenceGraph, tau: float) -> None:
    """torch: the gradient of the weighted IPO loss is 0 at the solution of the normal equations."""
    import torch

    u = torch.tensor(solve(graph, tau), requires_grad=True)
    margins = torch.tensor(graph.incidence.toarray()) @ u
    loss = torch.tensor(graph.weights.copy()) @ losses.ipo(margins, tau=tau)
    (gradient,) = torch.autograd.grad(loss, u)
    scale = graph.weights.sum() * (1 + 1 / tau)
    assert float(gradient.abs().max()) <= 1e-10 * scale, gradient


@given(st.integers(2, 12), positive(), st.booleans())
def spread_as_claimed(n: int, tau: float, closed: bool) -> None:
    """NumPy solves the normal equations to the claimed gaps; at those gaps the gradient of torch is 0."""
    import torch

    chain = PreferenceGraph.chain(n)
    graph, gap = (chain.transitive_closure(), 1 / (n * tau)) if closed else (chain, 1 / (2 * tau))
    assert np.allclose(-np.diff(solve(graph, tau)), gap, rtol=1e-9)
    psi = torch.tensor(-gap * np.arange(n), requires_grad=True)
    margins = torch.tensor(graph.incidence.toarray()) @ psi
    (gradient,) = torch.autograd.grad(losses.ipo(margins, tau=tau).sum(), psi)
    assert float(gradient.abs().max()) <= 1e-12 * n**2 * (1 + 1 / tau), gradient


CLAIMS = (
    Claim(
        id="prop7",
        source="[F] A.10, Proposition 7",
        statement=(
            "n arms, indifferent reference, the chain 1 > 2 > ... > n: IPO's spread is (n - 1)/(2 tau). On the "
            "transitive closure adjacent gaps are 1/(n tau), the spread is (n - 1)/(n tau): smaller for n > 2. Derived "
            "from the normal equations; equal gaps, which the printed proof assumes, come out."
        ),
        formula=r"\psi_1-\psi_n=\tfrac{n-1}{2\tau}\ \text{(chain)},\qquad\tfrac{n-1}{n\tau}\ \text{(closure)}",
        domain="finitely many responses, tabular; minimisers, no flow",
        losses=("logratio_margin", "ipo"),
        assumptions={
            "indifferent reference": "pi_ref is uniform over the arms",
            "equal weights": "every pair of the closure counts the same",
            "more than two arms": "n > 2, for the closure to be narrower",
        },
        prove=prove_chain,
        counterexamples={
            "indifferent reference": _biased_reference,
            "equal weights": _unequal_weights,
            "more than two arms": _two_arms,
        },
        controls={
            "without indifferent reference": lambda: check_spreads_of(
                *closures(3), ref=[sp.Rational(4, 7), sp.Rational(2, 7), sp.Rational(1, 7)]
            ),
            "without equal weights": lambda: check_spreads_of(
                PreferenceGraph.chain(3), PreferenceGraph(3, [(0, 1), (1, 2), (0, 2)], [1, 1, 2])
            ),
            "without more than two arms": lambda: check_spreads_of(*closures(2)),
            "the chain for its closure": lambda: check_spreads_of(*closures(4)[:1] * 2),
            "chain gap 1/tau": lambda: check_spreads(lambda n: 1 / TAU, lambda n: 1 / (n * TAU)),
            "closure gap of the chain": lambda: check_spreads(lambda n: 1 / (2 * TAU), lambda n: 1 / (2 * TAU)),
            "closure gap 1/((n - 1) tau)": lambda: check_spreads(
                lambda n: 1 / (2 * TAU), lambda n: 1 / ((n - 1) * TAU)
            ),
            "sign of the preference": lambda: check_spreads(lambda n: -1 / (2 * TAU), lambda n: -1 / (n * TAU)),
        },
        enumerate=enumerate_chains,
        properties=(spread_as_claimed,),
    ),
    Claim(
        id="prop7-graph",
        source="ours, generalises [F] A.10",
        statement=(
            "On any weighted comparison graph and for any reference, IPO's minimisers are the log-ratios with "
            "L u = B'w / (2 tau): they always exist, are finite, and are unique up to a constant on each component, "
            "so that a connected graph has exactly one optimal policy."
        ),
        formula=r"L\,u=\tfrac1{2\tau}B^\top w,\qquad L=B^\top\mathrm{diag}(w)\,B",
        domain="finitely many responses, tabular; minimisers, no flow",
        losses=("logratio_margin", "ipo"),
        assumptions={"positive weights": "every edge has weight > 0", "connected": "one component, for uniqueness"},
        prove=prove_graph,
        counterexamples={"positive weights": _negative_weight, "connected": _disconnected},
        controls={
            "without positive weights": lambda: check_edge(
                lambda margin, tau: 2 * (margin - 1 / (2 * tau)), weight=sp.Integer(-1)
            ),
            "without connected": lambda: prove_graphs([APART]),
            "target 1/tau": lambda: check_graph(
                lambda g, tau: solve_exactly(g, tau / 2), PreferenceGraph(3, [(0, 1), (1, 2)])
            ),
            "weights ignored": lambda: check_graph(
                lambda g, tau: solve_exactly(g.with_weights(np.ones(len(g))), tau),
                PreferenceGraph(3, [(0, 1), (1, 2), (0, 2)], [1, 1, 2]),
            ),
            "directions reversed": lambda: check_graph(
                lambda g, tau: [-x for x in solve_exactly(g, tau)], PreferenceGraph(2, [(0, 1)])
            ),
            "slope of a single square": lambda: check_edge(lambda margin, tau: margin - 1 / (2 * tau)),
        },
        enumerate=enumerate_graphs,
        properties=(laplacian_solution_is_optimal, torch_gradient_vanishes),
        sharpens=True,
    ),
)
