"""Preferences that only go one way: DPO's ratio of winner to loser grows without bound.

[N] states it for a pair whose label is deterministic (Lemma 1b) and for finite data, in which a label that is seen only
one way looks deterministic, whatever its true probability (Lemma 1c). Acyclic labels are the exact condition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import losses
from theory.algebra import limit, vanishes
from theory.certificates import reaches
from theory.claim import Claim, require
from theory.preferences import PreferenceGraph
from theory.propositions.dpo_divergence import OPPOSED
from theory.strategies import positive, preference_graphs

BETA = sp.Symbol("beta", positive=True)
MARGIN = sp.Symbol("Delta", real=True)
SCALE = sp.Symbol("s", positive=True)

Pairwise = Callable[[Any], Any]


def dpo(margin: Any) -> Any:
    """DPO with symbolic beta."""
    return losses.dpo(margin, beta=BETA)


# ---------------------------------------------------------------- checks


def check_diverges(pairwise: Pairwise) -> None:
    """The loss is positive, falls strictly in the margin and tends to 0: it is near its infimum only for large margins,
    so each minimising sequence has margin -> infinity."""
    loss = pairwise(MARGIN)
    e = sp.exp(BETA * MARGIN)
    require(vanishes(sp.diff(loss, MARGIN) + BETA / (1 + e)), "another slope")
    require((-BETA / (1 + e)).is_negative, "the loss does not fall everywhere")
    require(limit(loss, MARGIN, sp.oo) == 0, "the infimum is not 0")


def check_loser_vanishes(margin: Callable[..., Any]) -> None:
    """log pi(y_l) = log pi(y_w) + log(ref_l / ref_w) - Delta <= log(ref_l / ref_w) - Delta -> -infinity.

    Args:
        margin: as `losses.logratio_margin`.
    """
    chosen, rejected, ref_w, ref_l = sp.symbols("l_w l_l ref_w ref_l", real=True)
    largest = chosen + ref_l - ref_w - MARGIN
    require(sp.expand(margin(chosen, largest, ref_w, ref_l) - MARGIN) == 0, "another log pi(y_l)")
    require(sp.expand(sp.diff(margin(chosen, rejected, ref_w, ref_l), rejected)) == -1, "another slope in log pi(y_l)")
    bound = largest.subs(chosen, 0)  # log pi(y_w) <= 0
    require(limit(bound, MARGIN, sp.oo) == -sp.oo, "pi(y_l) does not vanish")


def check_free(features: Sequence[Sequence[int]]) -> None:
    """A policy with logits features @ theta can lift the winner (0) over the loser (1) of a pair."""
    require(reaches(features, [[1], [-1]]), "the policy cannot move the ratio")


def loss_vanishes(gap: int, alpha: Any = 0) -> bool:
    """Whether the loss of an edge tends to 0 along margin = s * gap, s -> infinity, u_l = -s * gap.

    Args:
        gap: between winner and loser.
        alpha: weight of a KL penalty on the loser.
    """
    along = losses.pessimistic(losses.dpo(SCALE * gap, beta=1), losses.forward_kl(-SCALE * gap), alpha=alpha)
    return bool(limit(along, SCALE, sp.oo) == 0)


def check_all_diverge(
    graph: PreferenceGraph, *, alpha: Any = 0, features: Sequence[Sequence[int]] | None = None
) -> None:
    """Along s * ranks the loss of every edge tends to 0, and the policy can move that way.

    Args:
        graph: the labels.
        alpha: weight of a KL penalty.
        features: [n, p], of the policy; one free parameter a response where not given.
    """
    for gap in {int(gap) for gap in graph.margins(graph.ranks)}:
        require(loss_vanishes(gap, alpha), f"{graph.edges.tolist()}: the loss stays positive at a gap of s * {gap}")
    if features is not None:
        require(reaches(features, graph.ranks[:, None].tolist()), "the policy cannot move along the ranks")


def check_data(
    edges: list[tuple[int, int]],
    n: int,
    ranking: Callable[[PreferenceGraph], Any] | None = None,
    separates: Callable[[int], bool] = loss_vanishes,
) -> None:
    """Acyclic: along s * ranks every term of the loss tends to 0. A cycle: the margins on it add up to 0, so one of
    them is <= 0 and the loss stays at log 2 or more.

    Args:
        edges: the labels.
        n: number of responses.
        ranking: in the place of the graph's ranks.
        separates: `loss_vanishes`, or a table of it.
    """
    graph = PreferenceGraph(n, edges)
    values = graph.ranks if ranking is None else ranking(graph)
    gaps = [int(gap) for gap in graph.margins(values)]
    separated = all(separates(gap) for gap in gaps)
    require(separated == (graph.cycle() is None), f"wrong direction {values} for {edges}")
    # Independent: some assignment of ranks puts each winner above its loser iff the labels are acyclic.
    exists = any(all(r[w] > r[el] for w, el in edges) for r in product(range(n), repeat=n))
    require(exists == separated, f"ranks exist is {exists}, divergence is {separated} for {edges}")


def prove_pair(pairwise: Pairwise = dpo, margin: Callable[..., Any] | None = None) -> None:
    check_diverges(pairwise)
    check_loser_vanishes(losses.logratio_margin if margin is None else margin)
    require(pairwise(sp.Integer(0)) == sp.log(2), "a margin <= 0 costs less than log 2")


ACYCLIC = (
    PreferenceGraph(4, [(0, 1), (1, 2), (0, 2), (3, 1)]),
    PreferenceGraph(5, [(4, 0), (2, 0), (0, 3)]),
    PreferenceGraph(4, [(0, 1), (2, 3)]),
)
CYCLE = PreferenceGraph(3, [(0, 1), (1, 2), (2, 0)])
BOTH_WAYS = PreferenceGraph(3, [(0, 1), (1, 0), (1, 2)])


def prove_data() -> None:
    """Each term is positive and tends to 0 only as its margin diverges; so does their sum, if all can at once."""
    prove_pair()
    for graph in ACYCLIC:
        check_all_diverge(graph)
    for graph in (*ACYCLIC, CYCLE, BOTH_WAYS):
        check_data(graph.edges.tolist(), graph.n)


def enumerate_data(thorough: bool) -> str:
    largest, count, table = (4 if thorough else 3), 0, cache(loss_vanishes)
    for n in range(2, largest + 1):
        pairs = [(i, j) for i, j in product(range(n), repeat=2) if i != j]
        for mask in range(1, 2 ** len(pairs)):
            check_data([pair for at, pair in enumerate(pairs) if mask >> at & 1], n, separates=table)
            count += 1
    return f"{count} label sets: every digraph, n <= {largest}"


# ---------------------------------------------------------------- without each assumption


def _non_deterministic() -> str:
    loss = sp.Rational(3, 4) * dpo(MARGIN) + sp.Rational(1, 4) * dpo(-MARGIN)
    require(vanishes(sp.diff(loss, MARGIN).subs(MARGIN, sp.log(3) / BETA)), "no finite optimum")
    return "P = 3/4: the optimum is Delta = log(3)/beta, finite"


def _with_kl() -> str:
    """beta = 1, alpha = 1/2 on -u_l: the slope 1 / (1 + e^Delta) - 1/2 vanishes at Delta = 0."""
    u_l = sp.Symbol("u_l", real=True)
    loss = losses.pessimistic(losses.dpo(-u_l, beta=1), losses.forward_kl(u_l), alpha=sp.Rational(1, 2))
    require(sp.diff(loss, u_l).subs(u_l, 0) == 0 and sp.diff(loss, u_l, 2).subs(u_l, 0) > 0, "no finite optimum")
    return "p-DPO, beta = 1, alpha = 1/2 on -u_l, u_w = 0: the optimum is Delta = 0"


def _shared_parameters() -> str:
    """Two responses with the same features: u_w = u_l for every parameter."""
    theta = sp.Symbol("theta", real=True)
    loss = dpo(losses.logratio_margin(theta, theta, sp.Integer(0), sp.Integer(0)))
    require(loss == sp.log(2) and sp.diff(loss, theta) == 0, "the margin moves")
    return "y_w and y_l with equal features: Delta = 0 for every parameter"


def _cyclic() -> str:
    u = sp.symbols("u1:4", real=True)
    loss = sum(dpo(u[i] - u[(i + 1) % 3]) for i in range(3))
    zero = dict.fromkeys(u, sp.Integer(0))
    require(all(vanishes(sp.diff(loss, x).subs(zero)) for x in u), "not stationary at ratio 1")
    return "labels 1 > 2, 2 > 3, 3 > 1: convex and stationary at u = 0, so every ratio is the reference's"


def _opposed_parameters() -> str:
    theta = sp.Symbol("theta", real=True)
    loss = dpo(theta) + dpo(-theta)
    require(vanishes(sp.diff(loss, theta).subs(theta, 0)), "not stationary at 0")
    return "two disjoint pairs whose margins are theta and -theta: acyclic labels, finite optimum theta = 0"


# ---------------------------------------------------------------- properties


@given(positive(0.05, 5), st.floats(-20, 20), st.floats(0.01, 20))
def loss_falls_in_the_margin(beta: float, margin: float, further: float) -> None:
    """NumPy: a larger margin is always better, and a margin of L costs at least softplus(-beta L)."""
    near, far = losses.dpo(margin, beta=beta), losses.dpo(margin + further, beta=beta)
    assert 0 < far < near


@given(positive(), st.floats(-20, 20))
def torch_gradient_never_vanishes(beta: float, margin: float) -> None:
    """torch: the training gradient of a deterministic pair is -beta sigma(-beta Delta), never 0."""
    import torch

    x = torch.tensor(margin, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(losses.dpo(x, beta=beta), x)
    assert slope.item() < 0


@given(preference_graphs(acyclic=True), positive(0.05, 5), st.floats(1, 100))
def ranks_drive_the_loss_to_zero(graph: PreferenceGraph, beta: float, scale: float) -> None:
    """NumPy: along s * ranks every margin is at least s, so the mean loss is at most softplus(-beta s)."""
    values = losses.dpo(graph.margins(scale * graph.ranks), beta=beta)
    assert values.max() <= losses.dpo(scale, beta=beta) * (1 + 1e-12)


@given(preference_graphs(acyclic=True), positive(0.05, 5), st.data())
def torch_gradient_points_along_ranks(graph: PreferenceGraph, beta: float, data: Any) -> None:
    """torch: at any log-ratios, moving along the ranks lowers the training loss: no stationary point exists."""
    import torch

    start = data.draw(st.lists(st.floats(-5, 5), min_size=graph.n, max_size=graph.n))
    u = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    margins = torch.tensor(graph.incidence.toarray()) @ u
    (gradient,) = torch.autograd.grad(losses.dpo(margins, beta=beta).mean(), u)
    assert gradient.numpy() @ np.asarray(graph.ranks, dtype=np.float64) < 0


CLAIMS = (
    Claim(
        id="drdo-lemma1b",
        source="[N], Lemma 1b",
        statement=(
            "A pair with P(y_w > y_l) = 1 and free parameters: every minimising sequence of DPO has "
            "pi(y_w)/pi(y_l) -> infinity and pi(y_l) -> 0; the infimum 0 is not attained."
        ),
        formula=r"P=1:\quad\Delta\to\infty,\quad\pi(y_l)\to 0",
        domain="one pair among finitely many responses, tabular; minimising sequences, no flow",
        losses=("logratio_margin", "bradley_terry", "dpo"),
        assumptions={
            "deterministic": "P(y_w > y_l) = 1",
            "no KL term": "alpha = 0",
            "free parameters": "the policy can move the ratio of the two responses",
        },
        prove=prove_pair,
        counterexamples={
            "deterministic": _non_deterministic,
            "no KL term": _with_kl,
            "free parameters": _shared_parameters,
        },
        controls={
            "without deterministic": lambda: prove_pair(lambda d: (3 * dpo(d) + dpo(-d)) / 4),
            "without no KL term": lambda: prove_pair(
                lambda d: losses.pessimistic(dpo(d), losses.forward_kl(-d), alpha=BETA / 2)
            ),
            "without free parameters": lambda: check_free([[1], [1]]),
            "a tie": lambda: prove_pair(lambda d: (dpo(d) + dpo(-d)) / 2),
            "reversed label": lambda: prove_pair(lambda d: dpo(-d)),
            "IPO": lambda: prove_pair(lambda d: losses.ipo(d, tau=BETA)),
            "sign of the reference": lambda: prove_pair(margin=lambda w, x, p, q: losses.logratio_margin(w, x, -p, -q)),
            "no reference": lambda: prove_pair(margin=lambda w, x, p, q: w - x),
        },
        properties=(loss_falls_in_the_margin, torch_gradient_never_vanishes),
    ),
    Claim(
        id="drdo-lemma1c",
        source="[N], Lemma 1c",
        statement=(
            "Finite data: if the labels that were drawn are acyclic (each pair labelled one way), every minimising "
            "sequence of DPO has all ratios -> infinity, whatever the true probabilities. Sharp: acyclic is needed."
        ),
        formula=r"\text{labels acyclic}\iff\Delta_i\to\infty\ \text{for every pair }i",
        domain="finitely many responses and labels, tabular; minimising sequences, no flow",
        losses=("logratio_margin", "bradley_terry", "dpo"),
        assumptions={
            "acyclic": "no preference cycle in the labels; in particular no pair labelled both ways",
            "free parameters": "one free parameter a response",
            "no KL term": "alpha = 0",
        },
        prove=prove_data,
        counterexamples={"acyclic": _cyclic, "free parameters": _opposed_parameters, "no KL term": _with_kl},
        controls={
            "without acyclic": lambda: check_all_diverge(CYCLE),
            "without acyclic, one pair labelled both ways": lambda: check_all_diverge(BOTH_WAYS),
            "without free parameters": lambda: check_all_diverge(ACYCLIC[2], features=OPPOSED),
            "without no KL term": lambda: check_all_diverge(ACYCLIC[0], alpha=sp.Rational(1, 2)),
            "ranks reversed": lambda: check_data([(0, 1), (1, 2)], 3, lambda graph: -graph.ranks),
            "all ranks equal": lambda: check_data([(0, 1)], 2, lambda graph: 0 * graph.ranks),
            "winners alone lifted": lambda: check_data(
                [(0, 1), (1, 2)], 3, lambda graph: np.isin(np.arange(3), graph.winners).astype(int)
            ),
        },
        enumerate=enumerate_data,
        properties=(ranks_drive_the_loss_to_zero, torch_gradient_points_along_ranks),
        sharpens=True,
    ),
)
