"""DRDO's two parts at a joint minimum: the head takes the oracle's margins, and nothing of them reaches the policy.

With a reward head that is free of the policy's log-probabilities the loss is the sum of a square in the head's margins,
0 exactly where they are the oracle's, and the preference term, in which the oracle does not occur. So whatever the
policy, the best head is the oracle; whatever the head, the policy's gradient is that of the preference term. In a
network the two meet in shared parameters only.

The oracle is itself trained by such a sum ([N] eq 5): a Bradley-Terry fit of its head, and the likelihood of winners.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import algebra, losses
from theory.algebra import vanishes
from theory.claim import CheckFailed, Claim, require
from theory.preferences import Floats, PreferenceGraph
from theory.strategies import log_policies, preference_graphs, vectors

ALPHA, GAMMA = sp.symbols("alpha gamma", positive=True)

TRIANGLE = PreferenceGraph(3, [(0, 1), (1, 2), (0, 2)], [1, 2, 3])
BOTH_WAYS = PreferenceGraph(2, [(0, 1), (1, 0)], [3, 1])
PAIRS = PreferenceGraph(5, [(0, 1), (3, 2)], [1, 2])
"""Response 4 is in neither pair."""

Loss = Callable[..., Any]
"""(oracle's margin, estimated margin, log pi(y_w), log pi(y_l)) -> loss of a pair."""
Head = Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]
"""(free values h [n], log pi [n]) -> reward estimates [n]."""


def drdo(target: Any, estimate: Any, chosen: Any, rejected: Any) -> Any:
    """DRDO with symbolic alpha and gamma."""
    return losses.drdo(target, estimate, chosen, rejected, alpha=ALPHA, gamma=GAMMA)


def free_head(values: Sequence[Any], logps: Sequence[Any]) -> Sequence[Any]:
    """A head of its own."""
    return values


def implicit_head(values: Sequence[Any], logps: Sequence[Any]) -> Sequence[Any]:
    """Estimates read off the policy."""
    return logps


def preference_term(winner: Any, loser: Any) -> Any:
    """alpha (1 - p_w)^gamma log((1 - pi(y_l)) / pi(y_w)), p_w = pi(y_w) / (pi(y_w) + pi(y_l)), in probabilities."""
    return ALPHA * (loser / (winner + loser)) ** GAMMA * sp.log((1 - loser) / winner)


# ---------------------------------------------------------------- checks


def check_split(
    graph: PreferenceGraph,
    margins: Sequence[sp.Expr],
    reward: Sequence[sp.Expr],
    *,
    loss: Loss = drdo,
    head: Head = free_head,
) -> None:
    """Summed over the pairs, loss(h, pi) - loss(r, pi) = sum w ((h_w - h_l) - (r_w - r_l))^2 for all h and pi: the head
    with the oracle's margins is best for every policy, and any other margin costs its square. And the slope of the loss
    in every log pi(y) contains neither h nor r.

    Args:
        graph: weighted pairs.
        margins: the oracle's on every pair, [m].
        reward: r, [n], which is claimed to have these margins.
        loss: of a pair.
        head: the reward estimates.
    """
    h, logps = (sp.symbols(f"{name}0:{graph.n}", real=True) for name in ("h", "l"))

    def total(estimates: Sequence[Any]) -> Any:
        edges = zip(graph.edges.tolist(), graph.weights.tolist(), margins, strict=True)
        return sum(
            sp.Rational(weight) * loss(delta, estimates[w] - estimates[lo], logps[w], logps[lo])
            for (w, lo), weight, delta in edges
        )

    squares = sum(
        sp.Rational(weight) * ((h[w] - h[lo]) - (reward[w] - reward[lo])) ** 2
        for (w, lo), weight in zip(graph.edges.tolist(), graph.weights.tolist(), strict=True)
    )
    loss_at_head = total(head(h, logps))
    require(sp.expand(loss_at_head - total(reward) - squares) == 0, "another price of a wrong margin")
    outside = set(h) | {x for delta in margins for x in delta.free_symbols}
    for logp in logps:
        slope = sp.expand(sp.diff(loss_at_head, logp))
        require(not slope.free_symbols & outside, f"the slope in {logp} depends on the rewards")


def check_left_over(graph: PreferenceGraph, loss: Loss = drdo) -> None:
    """At the best head a pair is left with the preference term; it is positive while others hold mass, and 0 where the
    pair holds all of it, however that is split."""
    w, x, rest = sp.symbols("w x m", positive=True)
    delta = sp.Symbol("delta", real=True)
    for weight in graph.weights.tolist():
        left = sp.Rational(weight) * loss(delta, delta, sp.log(w), sp.log(x))
        require(vanishes(left / sp.Rational(weight) - preference_term(w, x)), "something else is left")
    ratio = (1 - x).subs(x, 1 - w - rest) / w
    require(vanishes(ratio - 1 - rest / w), "the odds of the rest are others")
    require((rest / w).is_positive, "not positive while others hold mass")


def check_infimum(graph: PreferenceGraph, gamma: int) -> None:
    """On disjoint pairs what is left has infimum 0, approached as all mass leaves the pairs: pi(y_w) = 1/k^2 and
    pi(y_l) = 1/k^4 on each. (Probabilities add up to less than 1 for k >= 2 m; the rest is the unseen response's.)"""
    k = sp.Symbol("k", positive=True)
    total = sum(
        sp.Rational(weight)
        * losses.drdo(sp.S.Zero, sp.S.Zero, sp.log(k**-2), sp.log(k**-4), alpha=sp.S.One, gamma=gamma)
        for weight in graph.weights.tolist()
    )
    limit = algebra.limit(sp.expand_log(total, force=True), k, sp.oo)
    require(limit == 0, f"what is left tends to {limit}")


def check_defaults(alpha: Any, gamma: Any) -> None:
    """[N] eq 6 as it is called without hyper-parameters."""
    named = losses.drdo(2.0, 0.5, -1.0, -2.0, alpha=alpha, gamma=gamma)
    require(bool(named == losses.drdo(2.0, 0.5, -1.0, -2.0)), "other hyper-parameters by default")


def prove() -> None:
    for graph in (TRIANGLE, BOTH_WAYS, PAIRS):
        r = sp.symbols(f"r0:{graph.n}", real=True)
        check_split(graph, [r[w] - r[lo] for w, lo in graph.edges.tolist()], r)
        check_left_over(graph)
    for gamma in (1, 2, 3):
        check_infimum(PAIRS, gamma)
    check_defaults(0.1, 2)


def enumerate_heads(thorough: bool) -> str:
    """Every head with values -2 ... 2 (integers) against every oracle of that kind on three responses, three policies:
    the least total loss is at the heads with the oracle's margins alone."""
    largest, count = (2 if thorough else 1), 0
    values = [np.array(v, dtype=np.float64) for v in product(range(-largest, largest + 1), repeat=3)]
    for policy in np.log([[0.2, 0.3, 0.5], [0.98, 0.01, 0.01], [0.01, 0.01, 0.98]]):
        chosen, rejected = policy[TRIANGLE.winners], policy[TRIANGLE.losers]
        for oracle in values:
            target = TRIANGLE.margins(oracle)
            total = np.array(
                [TRIANGLE.weights @ losses.drdo(target, TRIANGLE.margins(head), chosen, rejected) for head in values]
            )
            best = {tuple(TRIANGLE.margins(values[i])) for i in np.flatnonzero(total <= total.min() + 1e-9)}
            require(best == {tuple(target)}, f"oracle {oracle}: the best heads have margins {best}")
            count += len(values)
    return f"{count} heads, integers in {-largest}..{largest}, 3 policies, 3 responses"


# ---------------------------------------------------------------- without each assumption


def _check_implicit() -> None:
    r = sp.symbols("r0:3", real=True)
    check_split(TRIANGLE, [r[w] - r[lo] for w, lo in TRIANGLE.edges.tolist()], r, head=implicit_head)


def _implicit() -> str:
    """Estimates log pi(y): the oracle enters the policy's slope, 2 (log pi(y_w) - log pi(y_l) - delta) + ..."""
    delta, chosen, rejected = sp.symbols("delta l_w l_l", real=True)
    slope = sp.diff(drdo(delta, chosen - rejected, chosen, rejected), chosen)
    require(sp.expand(sp.diff(slope, delta)) == -2, "the oracle does not enter")
    return "estimates log pi(y_w) - log pi(y_l): the slope in log pi(y_w) falls by 2 with every unit of delta"


def _check_no_oracle() -> None:
    check_split(TRIANGLE, [sp.Integer(d) for d in (1, 1, 3)], [sp.Integer(r) for r in (2, 1, 0)])


def _no_oracle() -> str:
    """Margins (1, 1, 3) on a triangle: the residuals of any head add up to 1 round it."""
    h = sp.symbols("h0:3", real=True)
    residuals = [sp.Integer(d) - (h[w] - h[lo]) for d, (w, lo) in zip((1, 1, 3), TRIANGLE.edges.tolist(), strict=True)]
    require(sp.expand(residuals[2] - residuals[0] - residuals[1]) == 1, "they can all vanish")
    return (
        "margins (1, 1, 3) of 0 > 1, 1 > 2, 0 > 2: no head has them all, the residuals add up to 1 round the triangle"
    )


def _gamma_zero() -> str:
    """Two disjoint pairs: log((1 - x) / w) >= log(1 + v / w) for the other winner's v; the two add up to at least
    log 4, since (1 + v/w)(1 + w/v) = 2 + v/w + w/v >= 4."""
    v, w, x = sp.symbols("v w x", positive=True)
    term = losses.drdo(sp.S.Zero, sp.S.Zero, sp.log(w), sp.log(x), alpha=sp.S.One, gamma=0)
    require(vanishes(term - sp.log((1 - x) / w)), "another term")
    excess = (1 + v / w) * (1 + w / v) - 4 - (v - w) ** 2 / (v * w)
    require(vanishes(excess), "another bound")
    return "gamma = 0, two disjoint pairs of weight 1: what is left is at least alpha log 4, whatever the policy"


# ---------------------------------------------------------------- properties


@given(preference_graphs(), st.data())
def wrong_heads_cost_their_square(graph: PreferenceGraph, data: st.DataObject) -> None:
    """NumPy: for any head and any policy the loss exceeds that of the oracle's head by the sum of squares."""
    oracle, head = data.draw(vectors(graph.n)), data.draw(vectors(graph.n))
    policy = data.draw(log_policies(graph.n))
    arguments = graph.margins(oracle), policy[graph.winners], policy[graph.losers]

    def total(estimates: Floats) -> float:
        target, chosen, rejected = arguments
        return float(graph.weights @ losses.drdo(target, graph.margins(estimates), chosen, rejected))

    squares = float(graph.weights @ graph.margins(head - oracle) ** 2)
    assert abs(total(head) - total(oracle) - squares) <= 1e-10 * (1 + abs(total(oracle)) + squares)


@given(preference_graphs(), st.data())
def torch_the_oracle_never_reaches_the_policy(graph: PreferenceGraph, data: st.DataObject) -> None:
    """torch: the policy's gradient is the same under two oracles and two heads; the head's vanishes at the oracle."""
    import torch

    policy = data.draw(log_policies(graph.n))

    def gradients(oracle: Floats, head: Floats) -> tuple[Any, Any]:
        logits, estimates = (torch.tensor(x, requires_grad=True) for x in (policy, head))
        logps = torch.log_softmax(logits, 0)
        w, lo = torch.tensor(graph.winners), torch.tensor(graph.losers)
        pairs = losses.drdo(torch.tensor(graph.margins(oracle)), graph.margins(estimates), logps[w], logps[lo])
        of_policy, of_head = torch.autograd.grad((torch.tensor(graph.weights) * pairs).sum(), (logits, estimates))
        return of_policy, of_head

    one, other = data.draw(vectors(graph.n)), data.draw(vectors(graph.n))
    (policy_one, head_one), (policy_other, _) = gradients(one, one), gradients(other, one)
    assert head_one.abs().max() == 0
    assert (policy_one - policy_other).abs().max() <= 1e-12


# ---------------------------------------------------------------- the oracle's own training


def check_oracle(
    graph: PreferenceGraph, loss: Callable[[Any, Any], Any], head_share: sp.Expr = 1 - ALPHA, tied: bool = False
) -> None:
    """The slopes in the head are head_share times those of Bradley-Terry, and those in log pi(y) are -alpha times the
    weight of the pairs that y won: two problems, of which neither sees the other.

    Args:
        graph: weighted pairs.
        loss: (reward margin, log pi(y_w)) -> loss of a pair.
        head_share: what multiplies the Bradley-Terry fit.
        tied: the head reads the policy's log-probs.
    """
    logps = sp.symbols(f"l0:{graph.n}", real=True)
    h = logps if tied else sp.symbols(f"h0:{graph.n}", real=True)
    pairs = list(zip(graph.edges.tolist(), [sp.Rational(w) for w in graph.weights.tolist()], strict=True))
    total = sum(weight * loss(h[w] - h[lo], logps[w]) for (w, lo), weight in pairs)
    for y in range(graph.n):
        fit: sp.Expr = sp.Integer(0)
        for (w, lo), weight in pairs:
            losing = weight / (1 + sp.exp(h[w] - h[lo]))
            fit += losing * (int(lo == y) - int(w == y))
        require(vanishes(sp.diff(total, h[y]) - head_share * fit), f"another slope of the head at {y}")
        wins = sum(weight for (w, _), weight in pairs if w == y)
        require(vanishes(sp.diff(total, logps[y]) + ALPHA * wins), f"another slope in log pi of {y}")


def drdo_oracle(margin: Any, chosen: Any) -> Any:
    """[N] eq 5 with symbolic alpha."""
    return losses.drdo_oracle(margin, chosen, alpha=ALPHA)


def check_oracle_value(default: float) -> None:
    """At margin 0 and log pi(y_w) = -1 the loss is (1 - alpha) log 2 + alpha; alpha is 0.01 by default."""
    require(vanishes(drdo_oracle(sp.Integer(0), sp.Integer(-1)) - (1 - ALPHA) * sp.log(2) - ALPHA), "another value")
    require(bool(losses.drdo_oracle(0.5, -1.0) == losses.drdo_oracle(0.5, -1.0, alpha=default)), "another default")


def prove_oracle() -> None:
    check_oracle_value(0.01)
    for graph in (TRIANGLE, BOTH_WAYS, PAIRS):
        check_oracle(graph, drdo_oracle)


def enumerate_oracles(thorough: bool) -> str:
    """Counts a : b of one pair, labelled both ways: the head's optimum log(a / b) and the policy's a / (a + b),
    whatever alpha, by a solver of both together."""
    from scipy.optimize import minimize

    largest, count = (5 if thorough else 3), 0
    for a, b, alpha in product(range(1, largest + 1), range(1, largest + 1), (0.01, 0.5)):

        def total(x: Floats, a: int = a, b: int = b, alpha: float = alpha) -> float:
            logps = -np.logaddexp.reduce(np.array([[0.0, 0.0], [-x[1], x[1]]]))
            return float(
                a * losses.drdo_oracle(x[0], logps[0], alpha=alpha)
                + b * losses.drdo_oracle(-x[0], logps[1], alpha=alpha)
            )

        found = minimize(total, np.zeros(2), method="BFGS", options={"gtol": 1e-7}).x
        require(bool(np.abs(found - np.log(a / b)).max() < 1e-3), f"{a} : {b}, alpha {alpha}: {found}")
        count += 1
    return f"{count} optima by BFGS: counts of one pair up to {largest}, two alphas"


def _tied_oracle() -> str:
    try:
        check_oracle(BOTH_WAYS, drdo_oracle, tied=True)
    except CheckFailed:
        return "a head that reads log pi: both terms pull on one quantity, and alpha decides between them"
    raise CheckFailed("the two parts stay apart")


def _only_wins() -> str:
    """alpha = 1: the head is not trained at all."""
    margin, chosen = sp.symbols("d l", real=True)
    require(sp.diff(losses.drdo_oracle(margin, chosen, alpha=1), margin) == 0, "the head is trained")
    return "alpha = 1: the loss is -log pi(y_w), every reward margin is optimal"


@given(preference_graphs(), st.data(), st.floats(0, 0.99))
def torch_oracle_gradients(graph: PreferenceGraph, data: st.DataObject, alpha: float) -> None:
    """torch: through log_softmax, the head's gradient is 1 - alpha times Bradley-Terry's, the policy's sees no head."""
    import torch

    head, policy = data.draw(vectors(graph.n)), data.draw(log_policies(graph.n))
    estimates, logits = (torch.tensor(x, requires_grad=True) for x in (head, policy))
    weights, winners = torch.tensor(graph.weights), torch.tensor(graph.winners)
    pairs = losses.drdo_oracle(graph.margins(estimates), torch.log_softmax(logits, 0)[winners], alpha=alpha)
    of_head, of_policy = torch.autograd.grad((weights * pairs).sum(), (estimates, logits))
    (fit,) = torch.autograd.grad((weights * losses.bradley_terry(graph.margins(estimates))).sum(), estimates)
    assert (of_head - (1 - alpha) * fit).abs().max() <= 1e-12 * graph.weights.sum()
    wins = np.bincount(graph.winners, graph.weights, graph.n)
    claimed = alpha * (graph.weights.sum() * np.exp(policy) - wins)
    assert np.abs(of_policy.numpy() - claimed).max() <= 1e-12 * graph.weights.sum()


def _margins(graph: PreferenceGraph) -> tuple[list[sp.Expr], Sequence[sp.Expr]]:
    r = sp.symbols(f"r0:{graph.n}", real=True)
    return [r[w] - r[lo] for w, lo in graph.edges.tolist()], r


def _reject(loss: Loss) -> Callable[[], object]:
    return lambda: check_split(TRIANGLE, *_margins(TRIANGLE), loss=loss)


CLAIMS = (
    Claim(
        id="drdo-joint-minimiser",
        source="ours, on [N] eq 6",
        statement=(
            "With a free reward head, DRDO's loss exceeds its least over heads by the squares of the margins' errors: "
            "whatever the policy, the head's margins are the oracle's at the minimum, and the policy's slopes contain "
            "neither. What is left is the preference term, positive while others than the pair hold mass; on disjoint "
            "pairs its infimum is 0, approached as all mass leaves them."
        ),
        formula=r"L(h,\pi)-\min_hL(\cdot,\pi)=\textstyle\sum w\,[(h_w-h_l)-\delta]^2,\quad"
        r"\min_hL=\alpha\sum w\,(1-p_w)^\gamma\log\tfrac{1-\pi(y_l)}{\pi(y_w)}",
        domain="finite responses; any weighted graph; tabular policy and head; minimisers; slopes in log-probs",
        losses=("drdo", "focal_weight"),
        assumptions={
            "free head": "the reward estimates have parameters of their own, one a response",
            "one oracle": "the targets are the margins of one reward",
            "gamma > 0": "the focal exponent is positive, for the infimum 0 on several pairs",
        },
        prove=prove,
        counterexamples={"free head": _implicit, "one oracle": _no_oracle, "gamma > 0": _gamma_zero},
        controls={
            "without free head": _check_implicit,
            "without one oracle": _check_no_oracle,
            "without gamma > 0": lambda: check_infimum(PAIRS, 0),
            "error not squared": _reject(lambda t, e, c, x: drdo(t, e, c, x) - (t - e) ** 2 + (t - e)),
            "sum for difference": _reject(lambda t, e, c, x: drdo(t, -e, c, x)),
            "half the target": _reject(lambda t, e, c, x: drdo(t / 2, e, c, x)),
            "reward term rewarded": _reject(lambda t, e, c, x: drdo(t, e, c, x) - 2 * (t - e) ** 2),
            "reward term halved": _reject(lambda t, e, c, x: drdo(t, e, c, x) - (t - e) ** 2 / 2),
            "estimates off by a policy's margin": _reject(lambda t, e, c, x: drdo(t, e + c - x, c, x)),
            "preference term rewarded": lambda: check_left_over(
                PAIRS, lambda t, e, c, x: 2 * (t - e) ** 2 - drdo(t, e, c, x)
            ),
            "unlikelihood of the loser": lambda: check_left_over(
                PAIRS,
                lambda t, e, c, x: (
                    drdo(t, e, c, x) - 2 * ALPHA * losses.focal_weight(c, x, gamma=GAMMA) * sp.log(1 - sp.exp(x))
                ),
            ),
            "alpha 0.01 by default": lambda: check_defaults(0.01, 2),
        },
        enumerate=enumerate_heads,
        properties=(wrong_heads_cost_their_square, torch_the_oracle_never_reaches_the_policy),
    ),
    Claim(
        id="drdo-oracle",
        source="[N] eq 5",
        statement=(
            "The oracle's loss parts likewise where its reward head is free: the head's slopes are 1 - alpha times "
            "those of a Bradley-Terry fit, so that for alpha < 1 it has the same optima (margin log-odds) whatever "
            "alpha; those in log pi(y) are -alpha times y's wins, whose optimum is the share of wins."
        ),
        formula=r"\partial_{h_y}L=(1-\alpha)\,\partial_{h_y}L_{\rm BT},\qquad"
        r"\partial_{\log\pi(y)}L=-\alpha\,\#\text{wins}(y)",
        domain="finite responses; any weighted graph; tabular policy and head; slopes in log-probs",
        losses=("drdo_oracle", "bradley_terry"),
        assumptions={
            "free head": "the reward head has parameters of its own, one a response",
            "alpha < 1": "the Bradley-Terry term is there, for the optima",
        },
        prove=prove_oracle,
        counterexamples={"free head": _tied_oracle, "alpha < 1": _only_wins},
        controls={
            "without free head": lambda: check_oracle(BOTH_WAYS, drdo_oracle, tied=True),
            "without alpha < 1": lambda: check_oracle(
                BOTH_WAYS, lambda d, c: losses.drdo_oracle(d, ALPHA * c, alpha=1), sp.Integer(1)
            ),
            "the shares exchanged": lambda: check_oracle(BOTH_WAYS, drdo_oracle, ALPHA),
            "likelihood of the loser": lambda: check_oracle(
                BOTH_WAYS, lambda d, c: losses.drdo_oracle(d, -c, alpha=ALPHA)
            ),
            "sign of the margin": lambda: check_oracle(BOTH_WAYS, lambda d, c: losses.drdo_oracle(-d, c, alpha=ALPHA)),
            "alpha 0.1 by default": lambda: check_oracle_value(0.1),
        },
        enumerate=enumerate_oracles,
        properties=(torch_oracle_gradients,),
    ),
)
