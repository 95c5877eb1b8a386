"""Reward distillation and KL-regularised reward maximisation have the same optimum, if the pairs connect all responses.

The printed theorem asks for every pair of responses; a connected comparison graph (for each prompt) is what it takes,
and exactly that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import losses
from theory.algebra import limit, simplify, vanishes
from theory.certificates import saddle_point
from theory.claim import Claim, require
from theory.preferences import Floats, PreferenceGraph
from theory.strategies import log_policies, positive, preference_graphs, vectors

BETA = sp.Symbol("beta", positive=True)
LOG_Z = sp.Symbol("logZ", real=True)
NORMALISER = sp.Symbol("Z", positive=True)
MARGIN, DELTA, NOISE = sp.symbols("Delta delta epsilon", real=True)
LOGP, REF, REWARD = (sp.symbols(f"{name}_i {name}_j", real=True) for name in ("l", "ref", "r"))

Formula = Callable[[Any, Any, Any], Any]
"""(log pi_ref(y), r(y), beta) -> log pi(y) + log Z."""
Connected = Callable[[PreferenceGraph], bool]


def tilted(ref_logp: Any, reward: Any, beta: Any) -> Any:
    """log pi_ref + r / beta: unnormalised, it is pi_ref exp(r / beta)."""
    return ref_logp + reward / beta


# ---------------------------------------------------------------- checks


def check_zero_loss(
    graph: PreferenceGraph, formula: Formula, refs: Sequence[Any] | None = None, rewards: Sequence[Any] | None = None
) -> None:
    """The formula's policy has distillation loss 0 on every pair, whatever its normalisation.

    Args:
        graph: the compared pairs.
        formula: under test.
        refs: log pi_ref, [n]; symbols where not given.
        rewards: [n]; likewise.
    """
    refs = sp.symbols(f"ref0:{graph.n}", real=True) if refs is None else refs
    rewards = sp.symbols(f"r0:{graph.n}", real=True) if rewards is None else rewards
    logps = [formula(ref, reward, BETA) - LOG_Z for ref, reward in zip(refs, rewards, strict=True)]
    for i, j in graph.edges.tolist():
        margin = losses.logratio_margin(logps[i], logps[j], refs[i], refs[j])
        loss = losses.distillation(margin, rewards[i] - rewards[j], beta=BETA)
        require(sp.expand(loss) == 0, f"the loss is not 0 on the pair ({i}, {j})")


def check_margin_determined(distillation: Callable[[Any, Any], Any]) -> None:
    """For a reward margin delta + epsilon, epsilon of mean 0 and variance v whatever the pair's policy, the expected
    loss is beta^2 (Delta - delta / beta)^2 + v: least at one margin, that of the mean reward.

    Args:
        distillation: (log-ratio margin, reward margin) -> loss at beta = BETA.
    """
    loss = sp.Poly(distillation(MARGIN, DELTA + NOISE), NOISE)
    square = BETA**2 * (MARGIN - DELTA / BETA) ** 2
    require(loss.degree() == 2 and loss.coeff_monomial(NOISE**2) == 1, "the noise adds something else than v")
    require(sp.expand(loss.coeff_monomial(1) - square) == 0, "not that square")  # epsilon itself has mean 0


def check_along_paths(margin: Callable[[Any, Any], Any]) -> None:
    """Zero loss on k edges in a row fixes the margin of the ends: the residuals telescope.

    Args:
        margin: values at an edge's ends -> their margin.
    """
    u, r = sp.Function("u"), sp.Function("r")
    i, k = sp.symbols("i k", integer=True, positive=True)
    total = sp.summation(BETA * margin(u(i), u(i + 1)), (i, 1, k)) - sp.summation(margin(r(i), r(i + 1)), (i, 1, k))
    ends = BETA * (u(1) - u(k + 1)) - (r(1) - r(k + 1))
    require(sp.expand(total - ends) == 0, "the ends' margin is not determined")


def check_one_normalisation(z: Any) -> None:
    """Margins fix log pi up to a constant c, and probabilities adding up to one fix c: e^c Z = 1 has one solution.

    Args:
        z: Z, the sum of pi_ref exp(r / beta).
    """
    c = sp.Symbol("c", real=True)
    require(z.is_finite is not False, f"the normaliser is {z}")
    total = sp.exp(c) * z
    require(sp.diff(total, c).is_positive, "the total mass does not rise with c")
    require(vanishes(total.subs(c, -sp.log(z)) - 1), "-log Z does not normalise")


def geometric_normaliser(growth: Any) -> Any:
    """Z for countably many responses k = 1, 2, ..., pi_ref(k) = 2^-k and exp(r(k) / beta) = growth^k."""
    k = sp.Symbol("k", integer=True, positive=True)
    return sp.summation((growth / 2) ** k, (k, 1, sp.oo))


def check_rlhf(formula: Formula) -> None:
    """r - beta log(pi / pi_ref) = beta log Z - beta log(pi / pi*) for any pi, response by response. So the RLHF
    objective is beta log Z - beta KL(pi || pi*), and KL >= 0 with equality at pi* alone (Gibbs).
    """
    logp, ref, reward = LOGP[0], REF[0], REWARD[0]
    best = formula(ref, reward, BETA) - LOG_Z
    objective = reward - BETA * losses.forward_kl(ref - logp)  # y ~ pi: the penalty is KL(pi || pi_ref)
    require(sp.expand(objective - BETA * LOG_Z + BETA * losses.forward_kl(best - logp)) == 0, "another RLHF objective")
    u = sp.Symbol("u", real=True)
    gibbs = losses.forward_kl(u) + sp.exp(u) - 1  # the last two have mean 0
    require(gibbs.subs(u, 0) == 0, "KL does not vanish at equality")
    require(sp.diff(gibbs, u).subs(u, 0) == 0, "0 is not stationary")
    require(sp.diff(gibbs, u, 2).is_positive, "not strictly convex")


def free_dimensions(graph: PreferenceGraph) -> int:
    """Exactly: the dimension of the policies with zero loss, n - rank(incidence) - 1, one being taken by the
    normalisation. Weights do not matter as long as they are positive."""
    return int(graph.n - sp.Matrix(graph.incidence.toarray().astype(int)).rank() - 1)


def check_alone(graph: PreferenceGraph) -> None:
    """The pairs determine all margins."""
    free = free_dimensions(graph)
    require(free == 0, f"{graph.edges.tolist()} on {graph.n}: {free} free dimensions")


def check_identified(graph: PreferenceGraph, connected: Connected) -> None:
    """There is one minimiser alone iff the pairs are called connected; the free dimensions are the components but one,
    counted by merging labels."""
    free, labels = free_dimensions(graph), list(range(graph.n))
    for i, j in graph.edges.tolist():
        labels = [labels[j] if label == labels[i] else label for label in labels]
    require(free == len(set(labels)) - 1, f"{graph.edges.tolist()} on {graph.n}: {free} free dimensions")
    require((free == 0) == connected(graph), f"{graph.edges.tolist()} on {graph.n}: {free} free dimensions")


def check_split_is_free() -> None:
    """Two components: raising all log-ratios of one by s is seen by no pair, but its odds against the other by e^s."""
    s, odds = sp.Symbol("s", real=True), sp.Symbol("odds", positive=True)
    inside = losses.logratio_margin(LOGP[0] + s, LOGP[1] + s, *REF) - losses.logratio_margin(*LOGP, *REF)
    require(sp.expand(inside) == 0, "a pair inside the component sees the shift")
    mass = sp.exp(s) * odds / (1 + sp.exp(s) * odds)
    require(sp.factor(simplify(sp.diff(mass, s))).is_positive, "the component's mass does not change")


def is_connected(graph: PreferenceGraph) -> bool:
    """The sharp condition."""
    return graph.is_connected


def distillation(margin: Any, reward_margin: Any) -> Any:
    """The loss at beta = BETA."""
    return losses.distillation(margin, reward_margin, beta=BETA)


def complete(n: int) -> PreferenceGraph:
    """Every pair of n responses."""
    return PreferenceGraph(n, list(itertools.combinations(range(n), 2)))


COMPLETE = (complete(2), complete(3), complete(5))
ONE_PAIR_OF_THREE = PreferenceGraph(3, [(0, 1)])
CONNECTED = (
    PreferenceGraph.chain(4),
    PreferenceGraph(4, [(1, 0), (1, 2), (3, 1)]),
    PreferenceGraph(3, [(0, 1), (1, 2), (2, 0)]),
)
APART = (ONE_PAIR_OF_THREE, PreferenceGraph(4, [(0, 1), (2, 3)]), PreferenceGraph(6, [(0, 1), (1, 2), (4, 3)]))


def prove_on(
    graphs: Iterable[PreferenceGraph],
    *,
    formula: Formula = tilted,
    refs: Sequence[Any] | None = None,
    rewards: Sequence[Any] | None = None,
    normaliser: Any = NORMALISER,
) -> None:
    """The formula has the least loss on every pair; the pairs fix its margins, and the normalisation the rest.

    Args:
        graphs: the compared pairs, of one problem each.
        formula: of the minimiser.
        refs: log pi_ref, [n]; symbols where not given.
        rewards: [n]; likewise.
        normaliser: Z.
    """
    check_margin_determined(distillation)
    check_one_normalisation(normaliser)
    check_rlhf(formula)
    for graph in graphs:
        check_zero_loss(graph, formula, refs, rewards)
        check_alone(graph)


def prove_connected() -> None:
    prove_on(CONNECTED)
    for graph in APART:
        check_zero_loss(graph, tilted)
        check_identified(graph, is_connected)
    check_along_paths(lambda a, b: losses.logratio_margin(a, b, sp.S.Zero, sp.S.Zero))
    check_split_is_free()


def graphs(n: int) -> Iterator[PreferenceGraph]:
    """Every undirected graph on n labelled responses; an edge's direction does not enter the loss."""
    pairs = list(itertools.combinations(range(n), 2))
    for keep in itertools.product([False, True], repeat=len(pairs)):
        yield PreferenceGraph(n, [pair for pair, kept in zip(pairs, keep, strict=True) if kept])


def enumerate_graphs(thorough: bool) -> str:
    largest, count = 5 if thorough else 4, 0
    for n in range(1, largest + 1):
        for graph in graphs(n):
            check_identified(graph, is_connected)
            count += 1
    return f"all {count} graphs, n <= {largest}, rank in exact integers"


def enumerate_programs(thorough: bool) -> str:
    """An exponential-cone solver maximises E_pi[r] - beta KL(pi || pi_ref) and finds the formula's policy."""
    import cvxpy as cp

    rng = np.random.default_rng(0)
    count = 30 if thorough else 6
    for _ in range(count):
        n = int(rng.integers(2, 6))
        ref, reward, beta = rng.dirichlet(np.ones(n)), rng.normal(size=n), float(rng.uniform(0.3, 3))
        policy = cp.Variable(n)
        objective = reward @ policy - beta * cp.sum(cp.rel_entr(policy, ref))
        cp.Problem(cp.Maximize(objective), [cp.sum(policy) == 1]).solve(solver=cp.CLARABEL)
        gap = np.abs(policy.value - np.exp(_optimum(np.log(ref), reward, beta))).max()
        require(
            bool(gap < 1e-4), f"Clarabel's RLHF optimum is {gap:.1e} from the formula"
        )  # values agree to its square
    return f"{count} exponential-cone programs, 2 to 5 responses"


def _optimum(ref: Floats, reward: Floats, beta: float) -> Floats:
    logits = tilted(ref, reward, beta)
    return np.asarray(logits - np.logaddexp.reduce(logits))


# ---------------------------------------------------------------- without each assumption


def _infinite_reward() -> str:
    roots = sp.solve(losses.distillation(MARGIN, DELTA, beta=BETA), MARGIN)
    require(len(roots) == 1 and limit(roots[0], DELTA, sp.oo) == sp.oo, "the optimal margin stays finite")
    return "r(1) = -infinity: the optimal margin of 0 over 1 is infinite, no policy that can generate 1 attains it"


def _infinite_normaliser() -> str:
    require(geometric_normaliser(sp.E) == sp.oo, "the normaliser is finite")
    require(geometric_normaliser(sp.Rational(3, 2)) == 3, "another normaliser")
    return "responses k = 1, 2, ..., pi_ref(k) = 2^-k, r(k) = k, beta = 1: sum of (e/2)^k, no policy has those margins"


def _unsupported_response() -> str:
    m = sp.Symbol("m", positive=True)
    half, logp = -sp.log(2), sp.log((1 - m) / 2)
    moved = losses.logratio_margin(logp, logp, half, half)
    require(losses.distillation(moved, sp.S.Zero, beta=BETA) == 0, "the pair sees the mass on response 2")
    return "pi_ref = (1/2, 1/2, 0), equal rewards: every policy ((1-m)/2, (1-m)/2, m) has zero loss on the pair 0, 1"


def _two_pairs() -> str:
    check_split_is_free()
    check_identified(PreferenceGraph(4, [(0, 1), (2, 3)]), lambda graph: False)
    return "pairs 0 > 1 and 2 > 3 only: how the mass is split between the two pairs is undetermined"


def _one_pair_of_three() -> str:
    """The smallest disconnected graph with an edge."""
    m = sp.Symbol("m", positive=True)
    third, logp = -sp.log(3), sp.log((1 - m) / 2)
    margin = losses.logratio_margin(logp, logp, third, third)
    require(losses.distillation(margin, sp.S.Zero, beta=BETA) == 0, "the pair sees m")
    return "3 responses, the pair 0 > 1 only, equal rewards: every ((1-m)/2, (1-m)/2, m) has zero loss"


# ---------------------------------------------------------------- properties


@st.composite
def _problems(draw: st.DrawFn) -> tuple[PreferenceGraph, Floats, Floats, float]:
    graph = draw(preference_graphs(connected=True))
    return graph, draw(log_policies(graph.n)), draw(vectors(graph.n)), draw(positive(0.1, 10))


def _loss(graph: PreferenceGraph, policy: Any, ref: Any, reward: Any, beta: float) -> Any:
    return losses.distillation(graph.margins(policy - ref), graph.margins(reward), beta=beta)


@given(_problems(), st.data())
def loss_grows_with_distance(problem: tuple[PreferenceGraph, Floats, Floats, float], data: st.DataObject) -> None:
    """NumPy: zero at pi*, and at any other policy at least beta^2 min(w) spread^2 / (n - 1), spread being that of
    log(pi / pi*): a path of at most n - 1 edges joins its extremes."""
    graph, ref, reward, beta = problem
    best = _optimum(ref, reward, beta)
    assert graph.weights @ _loss(graph, best, ref, reward, beta) <= 1e-20 * (1 + beta**2)
    other = data.draw(log_policies(graph.n))
    bound = beta**2 * graph.weights.min() * np.ptp(other - best) ** 2 / (graph.n - 1)
    assert graph.weights @ _loss(graph, other, ref, reward, beta) >= bound * (1 - 1e-9) - 1e-18


@given(_problems())
def both_objectives_are_stationary(problem: tuple[PreferenceGraph, Floats, Floats, float]) -> None:
    """torch: distillation and RLHF have zero gradient in the logits at pi*, and RLHF has none other that descends."""
    import torch

    graph, ref, reward, beta = problem
    best = _optimum(ref, reward, beta)
    assert saddle_point(best, ref, reward[None], np.ones(1), beta=beta).accepts(1e-9 * (1 + beta))
    logits = torch.tensor(best, requires_grad=True)
    ref_logps, rewards = torch.tensor(ref), torch.tensor(reward)

    def gradient(objective: Any) -> Any:
        return torch.autograd.grad(objective(torch.log_softmax(logits, 0)), logits)[0].numpy()

    def rlhf(policy: Any) -> Any:
        return (policy.exp() * (rewards - beta * losses.forward_kl(ref_logps - policy))).sum()

    def distilled(policy: Any) -> Any:
        return (torch.tensor(graph.weights) * _loss(graph, policy, ref_logps, rewards, beta)).sum()

    for objective in (rlhf, distilled):
        assert np.abs(gradient(objective)).max() <= 1e-11 * (1 + beta) ** 2


@given(_problems(), _problems(), st.floats(0.01, 0.99))
def mass_between_components_is_free(
    first: tuple[PreferenceGraph, Floats, Floats, float],
    second: tuple[PreferenceGraph, Floats, Floats, float],
    share: float,
) -> None:
    """NumPy: two connected graphs side by side; any split of the mass between them has zero loss."""
    (one, ref_1, reward_1, beta), (two, ref_2, reward_2, _) = first, second
    graph = PreferenceGraph(one.n + two.n, np.vstack([one.edges, two.edges + one.n]))
    ref = np.concatenate([ref_1, ref_2]) - np.log(2)
    parts = (_optimum(ref_1, reward_1, beta) + np.log(share), _optimum(ref_2, reward_2, beta) + np.log1p(-share))
    loss = _loss(graph, np.concatenate(parts), ref, np.concatenate([reward_1, reward_2]), beta)
    assert not graph.is_connected
    assert loss.max() <= 1e-20 * (1 + beta**2)


def _on_all_graphs(connected: Connected) -> None:
    for graph in graphs(4):
        check_identified(graph, connected)


HALF = -sp.log(2)
INSTANCE_CONTROLS: dict[str, Callable[[], object]] = {
    "without finite reward": lambda: prove_on([complete(2)], rewards=[sp.S.Zero, -sp.oo]),
    "without reference support": lambda: prove_on([complete(3)], refs=[HALF, HALF, -sp.oo]),
    "without finite normaliser": lambda: prove_on([complete(3)], normaliser=geometric_normaliser(sp.E)),
    "sign of the reward": lambda: prove_on(COMPLETE, formula=lambda ref, r, b: ref - r / b),
    "beta for 1/beta": lambda: prove_on(COMPLETE, formula=lambda ref, r, b: ref + r * b),
    "reference missing": lambda: check_zero_loss(complete(3), lambda ref, r, b: r / b),
    "RLHF without the reference": lambda: check_rlhf(lambda ref, r, b: r / b),
    "noise that the policy sees": lambda: check_margin_determined(lambda m, d: distillation(m * (1 + NOISE), d)),
}
ASSUMPTIONS = {
    "finite reward": "r is finite; where it is random, so are its mean and variance",
    "finite normaliser": "sum of pi_ref exp(r / beta) < infinity, as it is on finitely many responses",
    "reference support": "pi_ref(y) > 0 for every response",
}
COUNTEREXAMPLES: dict[str, Callable[[], str]] = {
    "finite reward": _infinite_reward,
    "finite normaliser": _infinite_normaliser,
    "reference support": _unsupported_response,
}
DOMAIN = "finitely many responses, or countably many with a finite normaliser; tabular; minimisers, no flow"
LOSSES = ("logratio_margin", "distillation", "forward_kl")

CLAIMS = (
    Claim(
        id="thm1",
        source="[F] A.3, Theorem 1",
        statement=(
            "With every pair of responses compared, the minimiser of the distillation loss is pi_ref exp(r / beta), "
            "normalised, and nothing else: the optimum of KL-regularised reward maximisation. A random reward counts "
            "by its mean given prompt and response."
        ),
        formula=r"\arg\min_\pi\mathbb E(\delta-\beta\Delta)^2=\{\pi_{\rm ref}e^{r/\beta}/Z\}"
        r"=\arg\max_\pi\mathbb E_\pi[r]-\beta\,\mathrm{KL}(\pi\Vert\pi_{\rm ref})",
        domain=DOMAIN,
        losses=LOSSES,
        assumptions={**ASSUMPTIONS, "pair support": "every pair of responses is compared with positive probability"},
        prove=lambda: prove_on(COMPLETE),
        counterexamples={**COUNTEREXAMPLES, "pair support": _two_pairs},
        controls={**INSTANCE_CONTROLS, "without pair support": lambda: prove_on([ONE_PAIR_OF_THREE])},
        enumerate=enumerate_programs,
        properties=(loss_grows_with_distance, both_objectives_are_stationary),
    ),
    Claim(
        id="thm1-connected",
        source="ours; sharpens [F] A.3, Theorem 1",
        statement=(
            "The minimiser is that one policy iff the compared pairs connect all responses (for each prompt); with "
            "several components the split of the mass between them is undetermined, and all else is determined."
        ),
        formula=r"\dim\{\pi:\ell=0\}=\#\text{components}-1",
        domain=DOMAIN,
        losses=LOSSES,
        assumptions={**ASSUMPTIONS, "connected": "the comparison graph is connected"},
        prove=prove_connected,
        counterexamples={**COUNTEREXAMPLES, "connected": _one_pair_of_three},
        controls={
            **INSTANCE_CONTROLS,
            "without connected": lambda: prove_on([APART[1]]),
            "sum for difference": lambda: check_along_paths(lambda a, b: a + b),
            "every response in some pair": lambda: _on_all_graphs(
                lambda graph: len(set(graph.edges.reshape(-1).tolist())) == graph.n
            ),
            "every pair compared": lambda: _on_all_graphs(lambda graph: len(graph) == graph.n * (graph.n - 1) // 2),
        },
        enumerate=enumerate_graphs,
        properties=(loss_grows_with_distance, mass_between_components_is_free),
        sharpens=True,
    ),
)
