"""What DPO's minimisers have in common: nothing on the losers. Where the mass goes instead, the loss does not say.

The printed corollary asks for pi(complement of the losers) -> 1 with every winner's probability positive. That is exact
for a policy, with the loss continued to probability 0. Along a sequence, winners that are positive but vanish faster
than the losers do not qualify, and winners that vanish more slowly do; so the limit points of minimising sequences are
*all* policies without mass on losers, among them those that give every winner probability 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import algebra, losses
from theory.algebra import simplify, vanishes
from theory.certificates import reaches
from theory.claim import Claim, require
from theory.preferences import Floats, PreferenceGraph
from theory.propositions.dpo_divergence import OPPOSED, Features, margin_at_least
from theory.strategies import disjoint_pairs, log_policies, positive, simplex

BETA, LEVEL, T = sp.symbols("beta epsilon t", positive=True)
WINNER, LOSER, REF_W, REF_L, MARGIN = sp.symbols("l_w l_l ref_w ref_l Delta", real=True)

Path = Callable[[Any], Any]
"""t in (0, 1] -> a probability; t tends to 0."""
PairLoss = Callable[[Any], Any]
"""Log-ratio margin -> loss at beta = BETA."""


def _dpo(margin: Any) -> Any:
    return losses.dpo(margin, beta=BETA)


def _margin(winner: Any, loser: Any) -> Any:
    return losses.logratio_margin(winner, loser, REF_W, REF_L)


# ---------------------------------------------------------------- checks


def check_level(bound: Callable[[Any, Any], Any], loss: PairLoss, ref_w: Any = REF_W) -> None:
    """A pair loss of at most eps bounds log pi(y_l) above, by something that falls to -infinity with eps.

    Args:
        bound: (log pi(y_w), eps) -> the largest log pi(y_l).
        loss: of the margin.
        ref_w: log pi_ref(y_w), which may depend on eps.
    """
    value = loss(_margin(WINNER, LOSER))
    slope = sp.factor(simplify(sp.diff(value, LOSER).subs(LOSER, WINNER + REF_L - REF_W - MARGIN)))
    require(slope.is_positive, "the loss does not rise with pi(y_l)")
    require(vanishes(value.subs(LOSER, bound(WINNER, LEVEL)) - LEVEL), "the bound does not attain the level")
    # log pi(y_w) <= 0, so this holds whatever the winner's probability is.
    largest = bound(sp.S.Zero, LEVEL).subs(REF_W, ref_w)
    require(algebra.limit(largest, LEVEL, 0, "+") == -sp.oo, "the loser's probability need not vanish")


def largest_loser(winner: Any, level: Any) -> Any:
    """log pi(y_l) <= log pi(y_w) + log(ref_l / ref_w) + log(e^eps - 1) / beta."""
    return winner + REF_L - REF_W - margin_at_least(level, BETA)


def check_continued_loss(loss: PairLoss) -> None:
    """pi(y_l) -> 0 with pi(y_w) fixed gives loss 0, the converse infinite loss."""
    require(algebra.limit(loss(MARGIN), MARGIN, sp.oo) == 0, "no mass on the loser does not give loss 0")
    require(algebra.limit(loss(MARGIN), MARGIN, -sp.oo) == sp.oo, "no mass on the winner does not give infinite loss")


def check_attained(graph: PreferenceGraph, loss: PairLoss) -> None:
    """The continued loss of a policy is 0 iff its support holds every winner and no loser; some support does."""
    require(simplify(sp.exp(loss(MARGIN)) - 1).is_positive, "the loss is not positive at every finite margin")
    ends = {
        (True, False): algebra.limit(loss(MARGIN), MARGIN, sp.oo),
        (False, True): algebra.limit(loss(MARGIN), MARGIN, -sp.oo),
    }
    winners, losers = set(graph.winners.tolist()), set(graph.losers.tolist())
    found = False
    for bits in range(1, 2**graph.n):
        support = {y for y in range(graph.n) if bits >> y & 1}
        zero = all(ends.get((w in support, lo in support)) == 0 for w, lo in graph.edges.tolist())
        minimal = winners <= support and not losers & support
        require(zero == minimal, f"{graph.edges.tolist()}: loss 0 is {zero} on the support {support}")
        found |= minimal
    require(found, f"{graph.edges.tolist()}: no policy attains the infimum")


def check_path(
    graph: PreferenceGraph, winner: Path, loser: Path, loss: PairLoss, features: Features | None = None
) -> None:
    """Along a path every response of the pairs vanishes, so all mass goes to the unseen, and yet the loss tends to 0.

    Args:
        graph: the pairs, and responses that none of them mentions.
        winner: probability of each winner that is no loser.
        loser: of each loser.
        loss: of the margin.
        features: of the policy; one free parameter a response where not given.
    """
    losers, seen = set(graph.losers.tolist()), set(graph.edges.reshape(-1).tolist())
    require(len(seen) < graph.n, "no response is left that could take the mass")
    refs = sp.symbols(f"ref0:{graph.n}", real=True)
    logs = {y: sp.expand_log(sp.log((loser if y in losers else winner)(T))) for y in seen}
    for y, log in logs.items():
        require(algebra.limit(log, T, 0, "+") == -sp.oo, f"response {y} keeps mass")
    for w, lo in graph.edges.tolist():
        margin = losses.logratio_margin(logs[w], logs[lo], refs[w], refs[lo])
        require(algebra.limit(margin, T, 0, "+") == sp.oo, f"the margin of ({w}, {lo}) does not diverge")
    require(algebra.limit(loss(MARGIN), MARGIN, sp.oo) == 0, "the loss does not vanish with a diverging margin")
    if features is not None:
        rates = [[algebra.limit(logs[y] / sp.log(T), T, 0, "+") if y in seen else 0] for y in range(graph.n)]
        require(reaches(features, rates), "the policy cannot follow that path")


def check_limit_point() -> None:
    """Any policy pi without mass on losers is a limit: (1 - k (t + t^2)) pi, plus t at winners and t^2 at losers."""
    share, pairs = sp.symbols("c k", nonnegative=True)
    rest = sp.Symbol("rest", nonnegative=True)  # 1 - k (t + t^2), for t small enough
    winner = rest * share + T
    require(simplify(winner - T).is_nonnegative, "the winner falls below t")
    require(algebra.limit(1 - pairs * (T + T**2), T, 0, "+") == 1, "the path does not end at pi")


ONE_PAIR = PreferenceGraph(3, [(0, 1)])
CHAIN = PreferenceGraph(4, [(0, 1), (1, 2)])
TWO_CYCLE = PreferenceGraph(3, [(0, 1), (1, 0)])
TWO_PAIRS = PreferenceGraph(5, [(0, 1), (2, 3)])
DISJOINT = (ONE_PAIR, TWO_PAIRS, PreferenceGraph(8, [(4, 1), (0, 5), (6, 2)], [1.0, 0.5, 3.0]))


def linear(t: Any) -> Any:
    """The winners' probability on the path of the claim."""
    return t


def square(t: Any) -> Any:
    """The losers'."""
    return t**2


def prove_on(graphs: Iterable[PreferenceGraph], loss: PairLoss = _dpo) -> None:
    """That the path makes the loss vanish is also what makes every policy without losers a limit: on the way to it the
    winners have at least what they have on this path, and the losers no more (`check_limit_point`)."""
    check_level(largest_loser, loss)
    check_continued_loss(loss)
    check_limit_point()
    for graph in graphs:
        check_attained(graph, loss)
        check_path(graph, linear, square, loss)


def enumerate_policies(thorough: bool) -> str:
    """Loss 0 iff no mass on losers and some on every winner, for every policy with probabilities in (1/d) Z."""
    d, count = 7 if thorough else 5, 0
    for pairs, unseen in [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]:
        n = 2 * pairs + unseen
        for parts in itertools.product(range(d + 1), repeat=n):
            if sum(parts) != d:
                continue
            winners, losers = parts[: 2 * pairs : 2], parts[1 : 2 * pairs : 2]
            with np.errstate(divide="ignore", invalid="ignore"):
                u = np.log(np.array(parts) / d) + np.log(n)
                value = losses.dpo(u[0 : 2 * pairs : 2] - u[1 : 2 * pairs : 2], beta=0.5).sum()
            minimal = sum(losers) == 0 and all(winners)
            require(bool(value == 0) == minimal, f"policy {parts} / {d}: loss {value}")
            count += 1
    return f"{count} policies: at most 2 pairs and 2 unseen responses, probabilities in multiples of 1/{d}"


# ---------------------------------------------------------------- without each assumption


def _both_directions() -> str:
    total = _dpo(MARGIN) + _dpo(-MARGIN)
    require(vanishes(sp.diff(total, MARGIN).subs(MARGIN, 0)), "0 is not stationary")
    require(algebra.limit(total, MARGIN, sp.oo) == sp.oo, "the loss stays finite without mass on a loser")
    return "0 > 1 and 1 > 0, uniform reference: the optimum is pi(0) = pi(1); no mass on a loser costs infinite loss"


def _tied_parameters() -> str:
    total = _dpo(MARGIN) + _dpo(-MARGIN)  # margins t and -t of the pairs 0 > 1 and 2 > 3
    require(vanishes(sp.diff(total, MARGIN).subs(MARGIN, 0)), "0 is not stationary")
    require(simplify(sp.diff(total, MARGIN, 2)).is_positive, "not convex")
    return "0 > 1, 2 > 3 with margins t, -t of one parameter: the only minimiser is the reference, losers at 1/4 each"


def _chain() -> str:
    """What the statement asks of response 1 is that it have some probability, and none."""
    winners, losers = ({edge[i] for edge in CHAIN.edges.tolist()} for i in (0, 1))
    require(winners & losers == {1}, "no response is both")
    ends = algebra.limit(_dpo(MARGIN), MARGIN, sp.oo), algebra.limit(_dpo(MARGIN), MARGIN, -sp.oo)
    require(ends == (0, sp.oo), "another loss without mass")
    return "0 > 1 > 2: response 1 would need probability 0 as a loser and more as a winner, so no policy has loss 0"


def _nothing_unseen() -> str:
    loser = sp.Symbol("p_l", positive=True)
    margin = _margin(sp.log(1 - loser), sp.log(loser))
    require(algebra.limit(margin, loser, 0, "+") == sp.oo, "the margin stays finite")
    require(algebra.limit(1 - loser, loser, 0) == 1, "the winner vanishes")
    return "2 responses, 0 > 1: the loss -> 0 only where pi(y_w) = 1 - pi(y_l) -> 1, the winner cannot vanish"


def _reference_without_the_winner() -> str:
    half = sp.log(sp.Rational(1, 2))
    margin = losses.logratio_margin(half, half, REF_W, half)
    require(algebra.limit(margin, REF_W, -sp.oo) == sp.oo, "the margin stays finite")
    require(algebra.limit(_dpo(MARGIN), MARGIN, sp.oo) == 0, "the loss stays positive")
    return "pi_ref(y_w) -> 0: loss -> 0 at pi = (1/2, 1/2), half its mass on the loser"


def _vanishing_winner() -> str:
    margin = sp.expand_log(_margin(sp.expand_log(sp.log(T**2)), sp.log(T)))
    require(algebra.limit(margin, T, 0, "+") == -sp.oo, "the margin does not fall")
    require(algebra.limit(_dpo(MARGIN), MARGIN, -sp.oo) == sp.oo, "the loss stays finite")
    return "pi(y_l) = t -> 0 with pi(y_w) = t^2, positive all along: the loss tends to infinity"


# ---------------------------------------------------------------- properties


@st.composite
def _problems(draw: st.DrawFn) -> tuple[PreferenceGraph, Floats, float]:
    graph = draw(disjoint_pairs())
    return graph, draw(log_policies(graph.n)), draw(positive(0.1, 5))


@given(_problems(), st.data())
def small_loss_leaves_little_on_losers(problem: tuple[PreferenceGraph, Floats, float], data: st.DataObject) -> None:
    """NumPy: at any policy the loss bounds each loser's probability as the proof says."""
    graph, ref, beta = problem
    policy = data.draw(log_policies(graph.n, 10.0))
    total = float(graph.weights @ losses.dpo(graph.margins(policy - ref), beta=beta))
    bound = policy[graph.winners] - graph.margins(ref) - margin_at_least(total / graph.weights, beta)
    assert (policy[graph.losers] <= bound + 1e-9 * (1 + np.abs(bound))).all()


@given(_problems(), st.data(), st.floats(1e-8, 0.05))
def every_policy_without_losers_is_a_limit(
    problem: tuple[PreferenceGraph, Floats, float], data: st.DataObject, t: float
) -> None:
    """NumPy: the loss along the path to it is at most sum_i w_i (t ref_w / ref_l)^beta, which vanishes with t."""
    graph, ref, beta = problem
    target = np.zeros(graph.n)
    others = np.setdiff1d(np.arange(graph.n), graph.losers)
    target[others] = data.draw(simplex(len(others)))
    policy = (1 - len(graph) * (t + t**2)) * target
    policy[graph.winners] += t
    policy[graph.losers] += t**2
    np.testing.assert_allclose(policy.sum(), 1)
    logs = np.log(np.maximum(policy, t**3))  # an unseen response may have probability 0, and enters no margin
    total = graph.weights @ losses.dpo(graph.margins(logs - ref), beta=beta)
    bound = graph.weights @ (t * np.exp(graph.margins(ref))) ** beta
    assert 0 < total <= bound * (1 + 1e-9)


@given(_problems(), st.data())
def nothing_holds_the_unseen(problem: tuple[PreferenceGraph, Floats, float], data: st.DataObject) -> None:
    """torch: the gradient on an unseen response's logit is 0 at every policy, on a winner's it is < 0."""
    import torch

    graph, ref, beta = problem
    logits = torch.tensor(data.draw(log_policies(graph.n)), requires_grad=True)
    logratios = torch.log_softmax(logits, 0) - torch.tensor(ref)
    total = (torch.tensor(graph.weights) * losses.dpo(graph.margins(logratios), beta=beta)).sum()
    slopes = torch.autograd.grad(total, logits)[0].numpy()
    unseen = np.setdiff1d(np.arange(graph.n), graph.edges)
    assert np.abs(slopes[unseen]).max(initial=0) <= 1e-14 * (1 + np.abs(slopes).max())
    assert (slopes[graph.winners] < 0).all()


CLAIMS = (
    Claim(
        id="cor1",
        source="[F] A.2, Corollary 1",
        statement=(
            "On disjoint pairs a policy attains the infimum of the DPO loss iff it gives the losers probability 0 and "
            "every winner a positive one; the limits of minimising sequences are all policies that give the losers "
            "probability 0. So loss -> 0 along a path on which every winner vanishes too (pi(y_w) = t, pi(y_l) = t^2) "
            "and all mass goes to responses that no pair mentions."
        ),
        formula=(
            r"\ell_{\rm DPO}(\pi)=0\iff\pi(\{y_l^i\})=0,\ \pi(y_w^i)>0;\qquad "
            r"\pi_t(y_w)=t,\ \pi_t(y_l)=t^2:\ \ell_{\rm DPO}\to0,\ \pi_t(\text{unseen})\to1"
        ),
        domain="finitely many responses, tabular; policies and limits of policies, no flow",
        losses=("logratio_margin", "bradley_terry", "dpo"),
        assumptions={
            "disjoint pairs": "no response is in two pairs",
            "one direction": "no pair is observed both ways",
            "free parameters": "one free parameter a response",
            "unseen responses": "some response is in no pair, for the path on which every winner vanishes",
            "full support": "0 < pi_ref(y) < 1 for every response",
            "winners positive": "in the limit pi(y_w) > 0; being positive along the way is not enough",
        },
        prove=lambda: prove_on(DISJOINT),
        counterexamples={
            "disjoint pairs": _chain,
            "one direction": _both_directions,
            "free parameters": _tied_parameters,
            "unseen responses": _nothing_unseen,
            "full support": _reference_without_the_winner,
            "winners positive": _vanishing_winner,
        },
        controls={
            "without disjoint pairs": lambda: prove_on([CHAIN]),
            "without one direction": lambda: prove_on([TWO_CYCLE]),
            "without free parameters": lambda: check_path(TWO_PAIRS, linear, square, _dpo, [*OPPOSED, [0]]),
            "without unseen responses": lambda: prove_on([PreferenceGraph(2, [(0, 1)])]),
            "without full support": lambda: check_level(largest_loser, _dpo, 2 * sp.log(LEVEL) / BETA),
            "without winners positive": lambda: check_path(ONE_PAIR, square, linear, _dpo),
            "equal rates": lambda: check_path(ONE_PAIR, linear, linear, _dpo),
            "winner kept": lambda: check_path(ONE_PAIR, lambda t: (1 + t) / 2, linear, _dpo),
            "IPO": lambda: check_path(ONE_PAIR, linear, square, lambda z: losses.ipo(z, tau=BETA)),
            "reference ratio upside down": lambda: check_level(
                lambda w, level: w + REF_W - REF_L - margin_at_least(level, BETA), _dpo
            ),
            "sign of the margin": lambda: check_continued_loss(lambda z: _dpo(-z)),
        },
        enumerate=enumerate_policies,
        properties=(
            small_loss_leaves_little_on_losers,
            every_policy_without_losers_is_a_limit,
            nothing_holds_the_unseen,
        ),
        sharpens=True,
    ),
)
