"""One more pair, as when a chain of preferences is closed: what it does to its own margin, and what averaging does.

For any objective F and a pair's loss f added with a weight, the two minimisers' exchange shows that f never rises. For
p-DPO with the pairs *summed* this widens the margin of the added pair, whatever alpha, beta, pi_ref and the graph; IPO
moves it towards 1 / (2 tau). With the pairs *averaged*, m pairs and one more weigh the KL term by (m + 1) / m against
the old pairs: where a spread shrinks on closing, that factor shrinks it, not the pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import assume, given
from hypothesis import strategies as st

from theory import losses
from theory.algebra import simplify, vanishes
from theory.certificates import policy_kkt
from theory.claim import CheckFailed, Claim, require
from theory.preferences import Floats, PreferenceGraph
from theory.propositions.mass_transfer import PairLoss, dpo, ipo, optimum, slope_and_curvature
from theory.strategies import log_policies, positive, preference_graphs

ALPHA = sp.Symbol("alpha", positive=True)
CHAIN = PreferenceGraph.chain(3)

Edge = tuple[int, int]
After = Callable[[Any, Any, Any, Any], Any]
"""(loss of the old pairs, loss of the added one, KL, alpha) -> objective with the added pair."""


def before(pairs: Any, kl: Any, alpha: Any) -> Any:
    """Objective without the added pair."""
    return losses.pessimistic(pairs, kl, alpha=alpha)


def summed(pairs: Any, added: Any, kl: Any, alpha: Any) -> Any:
    """Objective with it, its weight in `added`."""
    return losses.pessimistic(pairs + added, kl, alpha=alpha)


def averaged(pairs: Any, added: Any, kl: Any, alpha: Any) -> Any:
    """Objective with it, if `pairs` is the mean over two pairs."""
    return losses.pessimistic((2 * pairs + added) / 3, kl, alpha=alpha)


@dataclass(frozen=True)
class Instance:
    """An optimum known exactly: pi = c pi_ref with rational c, for which alpha and pi_ref are computed."""

    graph: PreferenceGraph
    ratios: Sequence[sp.Rational]
    """c = pi / pi_ref, [n]; 1 for responses in no pair, of which there is at most one, with pi_ref = 1/5."""
    added: Edge
    loss: PairLoss
    beta: sp.Rational
    """Of the loss; tau for IPO."""


def _rationals(*values: str) -> list[sp.Rational]:
    return [sp.Rational(value) for value in values]


THREE = Instance(PreferenceGraph(3, [(0, 1), (1, 2)], [1, 2]), _rationals("3", "3/2", "1/2"), (0, 2), dpo, sp.S.One)
FOUR = Instance(
    PreferenceGraph(5, [(0, 1), (1, 2), (2, 3)], [1, 2, 1]),
    _rationals("3", "3/2", "2/3", "1/3", "1"),
    (0, 3),
    dpo,
    sp.S.One,
)
FORK = Instance(PreferenceGraph(3, [(0, 2), (1, 2)]), _rationals("4", "3", "1/2"), (0, 1), dpo, sp.S.Half)
IPO_BELOW = Instance(
    PreferenceGraph(3, [(0, 1), (1, 2)], [1, 2]), _rationals("6/5", "21/20", "4/5"), (0, 2), ipo, sp.S.One
)
IPO_BEYOND = Instance(
    PreferenceGraph(3, [(0, 1), (1, 2)], [1, 0.5]), _rationals("7/5", "19/20", "7/10"), (0, 2), ipo, sp.S.One
)


# ---------------------------------------------------------------- checks


def check_exchange(after: After) -> None:
    """[after(old) - after(new)] + [before(new) - before(old)] = f(old) - f(new): as the new policy minimises `after`
    and the old one `before`, neither bracket is negative, so f does not rise."""
    old, new = (sp.symbols(f"L_{name} f_{name} K_{name}", real=True) for name in ("old", "new"))
    rise = after(old[0], old[1], old[2], ALPHA) - after(new[0], new[1], new[2], ALPHA)
    brackets = rise + before(new[0], new[2], ALPHA) - before(old[0], old[2], ALPHA)
    require(sp.expand(brackets - (old[1] - new[1])) == 0, "the added pair's loss may rise")


def check_averaging(factor: Callable[[sp.Symbol], sp.Expr]) -> None:
    """(m + 1) / m times the averaged objective of m + 1 pairs is that of the m old ones with alpha times the factor and
    the added pair at weight 1 / m: so averaging adds the pair and raises alpha."""
    m = sp.Symbol("m", positive=True)
    total, added, kl = sp.symbols("L f K", real=True)  # L is a sum over m pairs
    mean = losses.pessimistic((total + added) / (m + 1), kl, alpha=ALPHA)
    as_sum = losses.pessimistic(total / m + added / m, kl, alpha=factor(m) * ALPHA)
    require(vanishes((m + 1) / m * mean - as_sum), "not that objective")


def check_moves(instance: Instance, *, widens: bool) -> None:
    """At the exact optimum without the pair the added pair has a slope, so that the optimum moves, and f falls
    strictly; the slope's sign says which way, as f is convex in the margin."""
    graph, loss, beta = instance.graph, instance.loss, instance.beta
    u = sp.symbols(f"u0:{graph.n}", real=True)
    at = {x: sp.log(c) for x, c in zip(u, instance.ratios, strict=True)}
    weights = [sp.Rational(w) for w in graph.weights.tolist()]
    zero = sp.Integer(0)
    log_ref = sp.symbols(f"ref0:{graph.n}", real=True)
    logps = [x + q for x, q in zip(u, log_ref, strict=True)]
    pairs = sum(
        weight * loss(losses.logratio_margin(logps[w], logps[lo], log_ref[w], log_ref[lo]), None, beta)
        for (w, lo), weight in zip(graph.edges.tolist(), weights, strict=True)
    )
    require(not pairs.free_symbols & set(log_ref), "the reference is left in the margins")
    gains = [-sp.diff(pairs, x).subs(at) for x in u]
    free = [c == 1 for c in instance.ratios]
    shares = [zero if c == 1 else gain / (c - 1) for c, gain in zip(instance.ratios, gains, strict=True)]
    rest = 1 - sp.Rational(sum(free), 5)
    alpha = simplify(sum(shares) / rest)
    ref = [sp.Rational(1, 5) if lone else share / alpha for lone, share in zip(free, shares, strict=True)]
    require(all(bool(q > 0) for q in (*ref, alpha)), f"pi_ref = {ref}, alpha = {alpha} are no reference and weight")
    require(vanishes(sum(ref) - 1), "pi_ref does not add up to 1")
    kl = sum(q * losses.forward_kl(x) for q, x in zip(ref, u, strict=True))
    objective = before(pairs, kl, alpha)
    for x, q, c in zip(u, ref, instance.ratios, strict=True):
        require(vanishes(sp.diff(objective, x).subs(at) + alpha * q * c), f"not stationary in {x}: pi is no optimum")
    margin = sp.Symbol("Delta", real=True)
    now = sp.log(instance.ratios[instance.added[0]]) - sp.log(instance.ratios[instance.added[1]])
    slope = sp.diff(loss(margin, None, beta), margin).subs(margin, now)
    require(bool(slope < 0) if widens else bool(slope > 0), f"the added pair's slope is {slope}")


def check_directions(loss: PairLoss, formula: Callable[[Any, Any], Any], turn: Callable[[Any], Any] | None) -> None:
    """f has that slope in the margin, is strictly convex, and falls everywhere (turn None) or exactly below turn(beta).

    Args:
        loss: f.
        formula: (margin, beta) -> slope.
        turn: beta -> margin at which f is least.
    """
    margin, beta = sp.Symbol("Delta", real=True), sp.Symbol("beta", positive=True)
    slope = sp.diff(loss(margin, None, beta), margin)
    require(vanishes(slope - formula(margin, beta)), "another slope")
    require(sp.factor(simplify(sp.diff(slope, margin))).is_positive, "not strictly convex")
    if turn is None:
        require(sp.factor(simplify(slope)).is_negative, "f does not fall everywhere")
    else:
        require(vanishes(slope.subs(margin, turn(beta))), "f turns elsewhere")


def dpo_slope(margin: Any, beta: Any) -> Any:
    """-beta sigma(-beta Delta)."""
    return -beta / (1 + sp.exp(beta * margin))


def ipo_slope(margin: Any, tau: Any) -> Any:
    """2 (Delta - 1 / (2 tau))."""
    return 2 * (margin - 1 / (2 * tau))


def prove() -> None:
    check_exchange(summed)
    check_averaging(lambda m: (m + 1) / m)
    check_directions(dpo, dpo_slope, None)
    check_directions(ipo, ipo_slope, lambda tau: 1 / (2 * tau))
    for instance in (THREE, FOUR, FORK, IPO_BELOW):
        check_moves(instance, widens=True)
    check_moves(IPO_BEYOND, widens=False)


# ---------------------------------------------------------------- in floating point


@dataclass(frozen=True)
class Problem:
    """A graph, the pair to add, and the penalised loss; weights are counts, averaged over the pairs or summed."""

    graph: PreferenceGraph
    added: Edge
    ref: Floats
    beta: float
    alpha: float
    loss: PairLoss = dpo
    averaged: bool = False

    def solve(self, *, with_added: bool) -> Floats:
        """Log-ratios of the optimum, certified; CheckFailed where there is none."""
        graph = self.graph
        if with_added:
            graph = PreferenceGraph(graph.n, np.vstack([graph.edges, [self.added]]), np.append(graph.weights, 1.0))
        if self.averaged:
            graph = graph.with_weights(graph.weights / len(graph))
        targets = np.zeros(len(graph))
        try:
            u = optimum(graph, self.loss, targets=targets, beta=self.beta, ref_logps=self.ref, alpha=self.alpha)
        except RuntimeError as error:
            raise CheckFailed(f"no optimum: {error}") from error
        slope, _ = slope_and_curvature(self.loss)
        gradient = graph.by_response(graph.weights * slope(graph.margins(u), targets, self.beta))
        certificate = policy_kkt(u + self.ref, gradient - self.alpha * np.exp(self.ref))
        require(certificate.accepts(1e-7), f"no optimum: {dict(certificate.residuals)}")
        return u

    def margins(self) -> tuple[float, float]:
        """The added pair's margin at the optimum without it and with it."""
        w, lo = self.added
        old, new = (self.solve(with_added=flag) for flag in (False, True))
        return float(old[w] - old[lo]), float(new[w] - new[lo])


def check_widens(problem: Problem) -> None:
    """The added pair's margin does not shrink."""
    old, new = problem.margins()
    require(new > old - 1e-9, f"the margin goes from {old:.4f} to {new:.4f}")


def closed_chain(beta: float, alpha: float, *, averaged: bool) -> Problem:
    """1 > 2 > 3 on a uniform reference, to be closed by 1 > 3."""
    return Problem(CHAIN, (0, 2), np.full(3, -np.log(3)), beta, alpha, averaged=averaged)


def enumerate_closures(thorough: bool) -> str:
    """Chains of three arms on a grid of beta and alpha: how much the spread grows on closing, pairs summed or averaged;
    Clarabel on four of them."""
    grid = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0) if thorough else (0.1, 1.0, 10.0)
    ratios: dict[bool, list[float]] = {False: [], True: []}
    for beta, alpha, averaged_ in product((0.1, 0.5, 1.0, 3.0), grid, (False, True)):
        problem = closed_chain(beta, alpha, averaged=averaged_)
        old, new = problem.margins()
        ratios[averaged_].append(new / old)
        if not averaged_:
            check_widens(problem)
    programs = _check_against_clarabel()
    shown = [f"{min(ratios[flag]):.2f} to {max(ratios[flag]):.2f}" for flag in (False, True)]
    return f"{len(ratios[False])} chains of 3: the spread grows by {shown[0]} summed, {shown[1]} averaged; {programs}"


def _check_against_clarabel() -> str:
    import cvxpy as cp

    for beta, alpha in product((0.5, 2.0), (0.1, 1.0)):
        problem = closed_chain(beta, alpha, averaged=False)
        u = cp.Variable(3)
        edges = np.vstack([CHAIN.edges, [problem.added]])
        fit = cp.sum(cp.logistic(-beta * (u[edges[:, 0]] - u[edges[:, 1]])))
        objective = fit - alpha * cp.sum(u) / 3
        cp.Problem(cp.Minimize(objective), [cp.log_sum_exp(u - np.log(3)) <= 0]).solve(solver=cp.CLARABEL)
        gap = float(np.abs(u.value - problem.solve(with_added=True)).max())
        require(gap < 1e-3, f"Clarabel's log-ratios are {gap:.1e} away")
    return "4 exponential-cone programs"


# ---------------------------------------------------------------- without each assumption

SHRINKS = closed_chain(3.0, 0.1, averaged=True)
UNPENALISED = closed_chain(1.0, 0.0, averaged=False)


def _averaged() -> str:
    old, new = SHRINKS.margins()
    require(new < 0.99 * old, f"the spread goes from {old} to {new}")
    return f"pairs averaged, 1 > 2 > 3 closed, beta 3, alpha 0.1: the spread shrinks from {old:.3f} to {new:.3f}"


def _unpenalised() -> str:
    require(bool(CHAIN.crossing.all()), "the chain has a cycle")
    try:
        UNPENALISED.solve(with_added=False)
    except CheckFailed:
        return "alpha = 0: DPO on a chain has no optimum, its margins are infinite with or without the pair"
    raise CheckFailed("there is an optimum")


def smallest_counterexample() -> str | None:
    """The first beta and alpha, large ones first, for which closing 1 > 2 > 3 moves p-DPO's policy by a total variation
    of 0.05 or more, the pairs averaged."""
    for beta, alpha in product((1.0, 0.5, 0.25, 0.1), repeat=2):
        problem = closed_chain(beta, alpha, averaged=True)
        old, new = (np.exp(problem.ref + problem.solve(with_added=flag)) for flag in (False, True))
        if (distance := float(np.abs(old - new).sum() / 2)) >= 0.05:
            shown = ["(" + ", ".join(f"{p:.3f}" for p in policy) + ")" for policy in (old, new)]
            return (
                f"3 arms, uniform reference, pairs averaged, beta {beta:g}, alpha {alpha:g}: closing 1 > 2 > 3 takes "
                f"p-DPO from {shown[0]} to {shown[1]}, total variation {distance:.3f}"
            )
    return None


# ---------------------------------------------------------------- properties


@st.composite
def _problems(draw: st.DrawFn) -> Problem:
    """Any graph, any pair to add."""
    graph = draw(preference_graphs(max_responses=5))
    added = draw(st.permutations(range(graph.n)).map(lambda order: (order[0], order[1])))
    return Problem(graph, added, draw(log_policies(graph.n, 2.0)), draw(positive(0.2, 3)), draw(positive(0.05, 5)))


@given(_problems())
def an_added_pair_widens(problem: Problem) -> None:
    """NumPy: p-DPO's margin of the added pair grows, whether it was implied, new or contradicted."""
    check_widens(problem)


@given(_problems())
def ipo_moves_towards_its_target(problem: Problem) -> None:
    """NumPy: the added pair's IPO loss falls, from either side of 1 / (2 tau)."""
    moved = Problem(problem.graph, problem.added, problem.ref, problem.beta, problem.alpha, ipo)
    old, new = (losses.ipo(margin, tau=problem.beta) for margin in moved.margins())
    assert new <= old + 1e-9 * (1 + old)


@given(_problems())
def torch_objective_falls_along_the_widening(problem: Problem) -> None:
    """torch: at the old optimum the new objective's gradient in the logits is the added pair's alone."""
    import torch

    assume(problem.alpha > 0.1)
    u = problem.solve(with_added=False)
    logits, ref = torch.tensor(problem.ref + u, requires_grad=True), torch.tensor(problem.ref)
    logratios = torch.log_softmax(logits, 0) - ref
    w, lo = problem.added
    pairs = (
        torch.tensor(problem.graph.weights) * losses.dpo(problem.graph.margins(logratios), beta=problem.beta)
    ).sum()
    added = losses.dpo(logratios[w] - logratios[lo], beta=problem.beta)
    total = summed(pairs, added, (ref.exp() * losses.forward_kl(logratios)).sum(), problem.alpha)
    gradient = torch.autograd.grad(total, logits)[0].numpy()
    claimed = np.zeros(problem.graph.n)
    slope = problem.beta / (1 + np.exp(problem.beta * (u[w] - u[lo])))
    claimed[w], claimed[lo] = -slope, slope
    assert np.abs(gradient - claimed).max() <= 1e-7 * (1 + problem.beta)


CLAIMS = (
    Claim(
        id="remark-closure",
        source="[F] 7.2 and Figure B.2, on the transitive closure",
        statement=(
            "A pair added to a penalised objective with summed pairs lowers its own loss at the optimum: under p-DPO "
            "its margin widens strictly, for every graph, reference, alpha and beta; under IPO it moves towards "
            "1/(2 tau), so it narrows iff beyond. Averaging m + 1 pairs instead also raises alpha by (m+1)/m, which "
            "may shrink it. (Printed: closing a chain changes p-DPO's optimum imperceptibly.)"
        ),
        formula=r"\pi^+=\arg\min\,F+w f(\Delta_{ik}):\quad f(\Delta_{ik}(\pi^+))\le f(\Delta_{ik}(\pi^*)),\quad"
        r"\text{p-DPO: }\Delta_{ik}(\pi^+)>\Delta_{ik}(\pi^*)",
        domain="finite responses with pi_ref > 0; tabular; optima with a forward-KL penalty, no flow",
        losses=("dpo", "bradley_terry", "ipo", "pessimistic", "forward_kl", "logratio_margin"),
        assumptions={
            "summed pairs": "the pairs are summed, so that the others keep their weights",
            "positive alpha": "alpha > 0, so that there is an optimum",
        },
        prove=prove,
        counterexamples={"summed pairs": _averaged, "positive alpha": _unpenalised},
        controls={
            "without summed pairs": lambda: check_widens(SHRINKS),
            "without positive alpha": lambda: check_widens(UNPENALISED),
            "exchange with averaged pairs": lambda: check_exchange(averaged),
            "averaging leaves alpha": lambda: check_averaging(lambda m: sp.Integer(1)),
            "averaging lowers alpha": lambda: check_averaging(lambda m: m / (m + 1)),
            "IPO falls everywhere": lambda: check_directions(ipo, ipo_slope, None),
            "p-DPO narrows": lambda: check_moves(THREE, widens=False),
            "ratios of no optimum": lambda: check_moves(
                Instance(THREE.graph, _rationals("3", "2/3", "1/2"), (0, 2), dpo, sp.S.One), widens=True
            ),
        },
        enumerate=enumerate_closures,
        properties=(an_added_pair_widens, ipo_moves_towards_its_target, torch_objective_falls_along_the_widening),
        printed=smallest_counterexample,
    ),
)
