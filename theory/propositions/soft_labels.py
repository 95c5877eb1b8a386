"""Distillation and the cross-entropy with the labels sigma(delta): one optimum, if the margins can all be fitted.

Both losses pull the implicit reward margin beta Delta to delta and nowhere else. Where every pair can have its own way
they agree; where the pairs must compromise, because the margins are no reward's or the policy has too few parameters,
one weighs the residuals of the margins and the other those of the probabilities, and they part.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import losses
from theory.algebra import simplify, vanishes
from theory.claim import CheckFailed, Claim, require
from theory.preferences import Floats, PreferenceGraph
from theory.propositions.mass_transfer import distillation, optimum
from theory.strategies import log_policies, positive, preference_graphs, reals, vectors

BETA = sp.Symbol("beta", positive=True)
MARGIN, DELTA = sp.symbols("Delta delta", real=True)

TRIANGLE = PreferenceGraph(3, [(0, 1), (1, 2), (0, 2)])
PARALLEL = PreferenceGraph(2, [(0, 1), (0, 1), (1, 0)], [1, 2, 1])
FOREST = PreferenceGraph(5, [(0, 1), (1, 2), (3, 4)], [1, 3, 2])

Label = Callable[[Any], Any]
"""reward margin -> P(the first response is preferred)."""
Features = Any
"""[n, parameters]: log pi(y) is features(y).theta up to the normaliser."""


def sigmoid(z: Any) -> Any:
    """1 / (1 + e^-z), SymPy or NumPy."""
    return 1 / (1 + (sp.exp(-z) if isinstance(z, sp.Expr) else np.exp(-z)))


def soft_cross_entropy(margin: Any, target: Any, beta: Any, label: Label = sigmoid) -> Any:
    """q dpo(Delta) + (1 - q) dpo(-Delta), q = label(delta): DPO with the label of a reward's Bradley-Terry model."""
    q = label(target)
    return q * losses.dpo(margin, beta=beta) + (1 - q) * losses.dpo(-margin, beta=beta)


# ---------------------------------------------------------------- checks


def check_one_pair(label: Label) -> None:
    """Slopes in Delta: beta (sigma(beta Delta) - sigma(delta)) and 2 beta (beta Delta - delta). Both rise strictly and
    vanish at Delta = delta / beta alone, so they have the same sign everywhere: the same way down, at another pace."""
    soft = sp.diff(soft_cross_entropy(MARGIN, DELTA, BETA, label), MARGIN)
    require(vanishes(soft - BETA * (sigmoid(BETA * MARGIN) - sigmoid(DELTA))), "another slope of the labels")
    squared = sp.diff(losses.distillation(MARGIN, DELTA, beta=BETA), MARGIN)
    require(sp.expand(squared - 2 * BETA * (BETA * MARGIN - DELTA)) == 0, "another slope of the distillation")
    z = sp.Symbol("z", real=True)
    require(sp.factor(simplify(sp.diff(sigmoid(z), z))).is_positive, "sigma does not rise")


def check_same_optimum(graph: PreferenceGraph, margins: list[sp.Expr], features: Features | None = None) -> None:
    """At the minimiser of the distillation loss, both are stationary in every parameter of the policy.

    Both are convex in the log-ratios, which are linear in the parameters; distillation's minimiser is solved for.

    Args:
        graph: weighted pairs.
        margins: of the rewards, one an edge.
        features: [n, k] of a linear policy; tabular where not given.
    """
    phi = sp.eye(graph.n) if features is None else sp.Matrix(features)
    theta = sp.Matrix(sp.symbols(f"theta0:{phi.cols}", real=True))
    u = list(phi * theta)  # the normaliser cancels in the margins

    def total(loss: Callable[[Any, Any], Any]) -> sp.Expr:
        edges = zip(graph.edges.tolist(), graph.weights.tolist(), margins, strict=True)
        return sum(sp.Rational(weight) * loss(u[w] - u[lo], delta) for (w, lo), weight, delta in edges)

    squared = total(lambda margin, delta: losses.distillation(margin, delta, beta=BETA))
    at = sp.solve([sp.diff(squared, x) for x in theta], list(theta), dict=True)[0]
    soft = total(lambda margin, delta: soft_cross_entropy(margin, delta, BETA))
    for x in theta:
        slope = sp.diff(soft, x).subs(at, simultaneous=True)
        require(vanishes(slope), f"the label loss has a slope in {x} where distillation is least")


def reward_margins(graph: PreferenceGraph) -> list[sp.Expr]:
    """Margins of one reward, symbols r0 ... r(n - 1)."""
    r = sp.symbols(f"r0:{graph.n}", real=True)
    return [r[w] - r[lo] for w, lo in graph.edges.tolist()]


def prove() -> None:
    check_one_pair(sigmoid)
    for graph in (TRIANGLE, PARALLEL, FOREST):
        check_same_optimum(graph, reward_margins(graph))
    # A reward that the policy can represent will do: u = theta phi and r = c phi.
    c, phi = sp.Symbol("c", real=True), [2, 1, -1]
    check_same_optimum(TRIANGLE, [c * (phi[w] - phi[lo]) for w, lo in TRIANGLE.edges.tolist()], [[x] for x in phi])


def _gap(graph: PreferenceGraph, margins: Floats, beta: float = 1.0) -> float:
    """Largest difference of a margin of the two minimisers; Newton's, no KL term."""
    ref = np.full(graph.n, -np.log(graph.n))
    at = [
        optimum(graph, loss, targets=margins, beta=beta, ref_logps=ref, alpha=0.0)
        for loss in (distillation, soft_cross_entropy)
    ]
    return float(np.abs(graph.margins(at[0] - at[1])).max())


def enumerate_margins(thorough: bool) -> str:
    """Integer margins on the triangle: those of a reward (delta_02 = delta_01 + delta_12) have one optimum. Of the
    others a few do too, where the residuals of margins and of probabilities happen to go round in the same ratio."""
    largest = 3 if thorough else 2
    count = reward = same = 0
    for target in product(range(-largest, largest + 1), repeat=3):
        agree, consistent = _gap(TRIANGLE, np.array(target, dtype=float)) < 1e-7, target[2] == target[0] + target[1]
        require(agree or not consistent, f"margins {target} are a reward's, but the optima differ")
        count, reward, same = count + 1, reward + consistent, same + (agree and not consistent)
    require(4 * same < count - reward, "the optima often agree where the margins are no reward's")
    programs = _check_against_clarabel()
    return (
        f"{count} triples of margins in {-largest}..{largest} on a triangle: all {reward} of a reward agree, of the "
        f"others {same}; {programs} exponential-cone programs"
    )


def _check_against_clarabel() -> int:
    import cvxpy as cp

    cases = [(TRIANGLE, [1.0, 2.0, 3.0]), (TRIANGLE, [1.0, 1.0, 3.0]), (PARALLEL, [1.0, 1.0, -1.0])]
    for graph, target in cases:
        q, u = sigmoid(np.array(target)), cp.Variable(graph.n)
        m = graph.incidence @ u
        objective = (graph.weights * q) @ cp.logistic(-m) + (graph.weights * (1 - q)) @ cp.logistic(m)
        cp.Problem(cp.Minimize(objective), [u[0] == 0]).solve(solver=cp.CLARABEL)
        ours = optimum(
            graph,
            soft_cross_entropy,
            targets=np.array(target),
            beta=1.0,
            ref_logps=np.full(graph.n, -np.log(graph.n)),
            alpha=0.0,
        )
        gap = float(np.abs(graph.margins(u.value - ours)).max())
        require(gap < 1e-4, f"Clarabel's margins are {gap:.1e} away on {target}")
    return len(cases)


# ---------------------------------------------------------------- without each assumption


def _no_reward() -> str:
    """(1, 1, 3) on a triangle, beta = 1: by symmetry both optima are (m, 0, -m), stationary at the first response."""
    m = sp.Symbol("m", real=True)

    def slope(loss: Callable[[Any, Any], Any]) -> sp.Expr:
        adjacent, long = (sp.diff(loss(MARGIN, sp.Integer(d)), MARGIN) for d in (1, 3))
        return adjacent.subs(MARGIN, m) + long.subs(MARGIN, 2 * m)

    squared = slope(lambda margin, d: losses.distillation(margin, d, beta=1))
    require(sp.solve(squared, m) == [sp.Rational(4, 3)], "another minimiser of the distillation loss")
    soft = slope(lambda margin, d: soft_cross_entropy(margin, d, sp.Integer(1)))
    low, high = sp.Rational(1194, 1000), sp.Rational(1195, 1000)
    require(bool(soft.subs(m, low) < 0) and bool(soft.subs(m, high) > 0), "its minimiser is not in between")
    return (
        "margins (1, 1, 3) of 0 > 1, 1 > 2, 0 > 2, beta 1: distillation ends at (1.33, 1.33, 2.67), soft labels at "
        "(1.19, 1.19, 2.39)"
    )


def _check_too_few_parameters() -> None:
    """One parameter, u = theta (2, 1, -1); the reward (3, 1, 0) is no multiple of that."""
    reward = (3, 1, 0)
    margins = [sp.Integer(reward[w] - reward[lo]) for w, lo in TRIANGLE.edges.tolist()]
    check_same_optimum(TRIANGLE, margins, [[2], [1], [-1]])


def _too_few_parameters() -> str:
    try:
        _check_too_few_parameters()
    except CheckFailed:
        return "u = theta (2, 1, -1), reward (3, 1, 0): one parameter cannot fit both gaps, and the optima differ"
    raise CheckFailed("the optima agree")


# ---------------------------------------------------------------- properties


@given(reals(10), reals(10), positive(0.1, 10))
def slopes_have_one_sign(margin: float, target: float, beta: float) -> None:
    """NumPy: no step from the minimiser lowers either loss; on one pair both fall towards delta / beta."""
    best = target / beta
    for loss in (soft_cross_entropy, distillation):
        near, far = (loss(best + share * (margin - best), target, beta) for share in (0.5, 1.0))
        assert loss(best, target, beta) <= near + 1e-9 * (1 + near)
        assert near <= far + 1e-9 * (1 + far)


@given(preference_graphs(connected=True), positive(0.1, 10), st.data())
def torch_both_stationary_at_the_rewards_policy(graph: PreferenceGraph, beta: float, data: st.DataObject) -> None:
    """torch: at pi_ref exp(r / beta) both gradients in the logits vanish, whatever the graph and its weights."""
    import torch

    reward, ref = data.draw(vectors(graph.n)), data.draw(log_policies(graph.n))
    logits = torch.tensor(ref + reward / beta, requires_grad=True)
    logratios = torch.log_softmax(logits, 0) - torch.tensor(ref)
    target, weights = torch.tensor(graph.margins(reward)), torch.tensor(graph.weights)
    soft = torch.sigmoid(target) * losses.dpo(graph.margins(logratios), beta=beta) + torch.sigmoid(
        -target
    ) * losses.dpo(-graph.margins(logratios), beta=beta)
    for values in (soft, losses.distillation(graph.margins(logratios), target, beta=beta)):
        gradient = torch.autograd.grad((weights * values).sum(), logits, retain_graph=True)[0]
        assert gradient.abs().max() <= 1e-11 * (1 + beta) ** 2 * graph.weights.sum()


CLAIMS = (
    Claim(
        id="remark-soft-labels",
        source="[F] 5.1, remark on matching sigma(delta); sharpened",
        statement=(
            "Distillation and the cross-entropy with the soft labels sigma(delta) have the same minimisers, "
            "beta Delta = delta on every pair, where the margins are one reward's and the policy can fit them; on one "
            "pair their slopes have the same sign throughout. Where the pairs must compromise, they part."
        ),
        formula=r"\arg\min_\pi\textstyle\sum w\,(\delta-\beta\Delta)^2=\arg\min_\pi\sum w\,"
        r"[\sigma(\delta)\,\ell_{\rm DPO}(\Delta)+\sigma(-\delta)\,\ell_{\rm DPO}(-\Delta)]",
        domain="finite responses; any weighted graph; tabular, or linear in the log-probs; minimisers, no flow, no KL",
        losses=("dpo", "bradley_terry", "distillation"),
        assumptions={
            "one reward": "the margins are differences of one reward",
            "realisable": "the policy has parameters enough for these margins",
        },
        prove=prove,
        counterexamples={"one reward": _no_reward, "realisable": _too_few_parameters},
        controls={
            "without one reward": lambda: check_same_optimum(TRIANGLE, [sp.Integer(d) for d in (1, 1, 3)]),
            "without realisable": _check_too_few_parameters,
            "labels sigma(2 delta)": lambda: check_one_pair(lambda delta: sigmoid(2 * delta)),
            "labels the other way round": lambda: check_one_pair(lambda delta: sigmoid(-delta)),
            "labels linear in the margin": lambda: check_one_pair(lambda delta: sp.Rational(1, 2) + delta / 4),
            "both orders, margins not opposite": lambda: check_same_optimum(
                PARALLEL, [sp.Integer(d) for d in (1, 1, 1)]
            ),
        },
        enumerate=enumerate_margins,
        properties=(slopes_have_one_sign, torch_both_stationary_at_the_rewards_policy),
        sharpens=True,
    ),
)
