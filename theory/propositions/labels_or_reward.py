"""When a reward model teaches a margin better than the labels do.

k labels of a comparison whose winner wins with probability p are worth k p (1 - p) units of Fisher information on its
reward margin: the curvature of the expected loss, and the variance of its slope. Comparisons add up as conductances
do, so what labels leave undetermined of a margin is an effective resistance. `theory.resistance` computes it.

Asymptotic variance is meant as usual: the fit is a smooth function of the label frequencies, which are independent
with variance p (1 - p) / k; its derivative in them gives the variance of the limit law (delta method). With finitely
many labels the fit is infinite with positive probability, and its mean squared error with it.

The Cramer-Rao bound needs care. No estimator from finitely many labels is unbiased for every reward: its mean is
bounded, a margin is not. What holds for any number of labels, and is attained, is the bound for estimators that are
unbiased to first order at the truth (mean and its gradient are right).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from math import comb
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import gammaln

from theory import algebra, losses
from theory.algebra import limit, simplify, vanishes
from theory.claim import Claim, require
from theory.preferences import Floats, PreferenceGraph
from theory.propositions.mass_transfer import dpo, optimum
from theory.resistance import effective_resistance, infinite_probability
from theory.strategies import positive, preference_graphs, vectors

BETA, LABELS = sp.symbols("beta k", positive=True)
P = sp.Symbol("p", positive=True)
MARGIN = sp.Symbol("d", real=True)

PairLoss = Callable[[Any], Any]
"""Log-ratio margin -> loss at beta = BETA."""
OfLabels = Callable[[Any, Any], Any]
"""(number of labels, probability of a win) -> information, variance of the number of wins, or a probability."""

STRUCTURES: dict[str, tuple[PreferenceGraph, tuple[int, int]]] = {
    "a comparison of its own": (PreferenceGraph(2, [(0, 1)]), (0, 1)),
    "two in series": (PreferenceGraph.chain(3), (0, 2)),
    "a triangle": (PreferenceGraph(3, [(0, 1), (1, 2), (2, 0)]), (0, 1)),
    "a triangle and a bridge": (PreferenceGraph(4, [(0, 1), (1, 2), (0, 2), (3, 2)]), (0, 3)),
}


def _dpo(margin: Any) -> Any:
    return losses.dpo(margin, beta=BETA)


def bernoulli(labels: Any, p: Any) -> Any:
    """k p (1 - p): Fisher information, and variance of the number of wins, of independent labels."""
    return labels * p * (1 - p)


def sigmoid(margin: Any) -> Any:
    """Probability of a win under Bradley-Terry."""
    return 1 / (1 + sp.exp(-margin))


# ---------------------------------------------------------------- checks


def check_information(
    graph: PreferenceGraph,
    *,
    pair_loss: PairLoss = _dpo,
    information: OfLabels = bernoulli,
    wins_variance: OfLabels = bernoulli,
    truth: Callable[[Any], Any] = sigmoid,
) -> None:
    """The implicit rewards v = beta u that DPO fits: at infinitely many labels the true rewards; curvature there and
    covariance of the slopes both B' diag(information) B; and frequencies enter the slopes with -k b.

    Args:
        graph: the comparisons, symbolic rewards and numbers of labels.
        pair_loss: of the log-ratio margin.
        information: of a comparison's labels, under test.
        wins_variance: of the number of wins among k labels.
        truth: true reward margin -> probability of a win.
    """
    n, m = graph.n, len(graph)
    v, ref = (np.array(sp.symbols(f"{name}0:{n}", real=True), dtype=object) for name in ("v", "rho"))
    r = _map(sp.log, sp.symbols(f"x0:{n}", positive=True))  # so that all is rational at the true rewards
    q, k = (np.array(sp.symbols(f"{name}0:{m}", positive=True), dtype=object) for name in "qk")
    logps = v / BETA + ref
    w, lo = graph.winners, graph.losers
    forward = losses.logratio_margin(logps[w], logps[lo], ref[w], ref[lo])
    reverse = losses.logratio_margin(logps[lo], logps[w], ref[lo], ref[w])
    total = sum(k * (q * _map(pair_loss, forward) + (1 - q) * _map(pair_loss, reverse)))
    p = _map(truth, r[w] - r[lo])
    at = dict(zip(v, r, strict=True)) | dict(zip(q, p, strict=True))
    for e, signs in enumerate(graph.incidence.toarray().astype(int)):
        # The loss, and with it all that follows, is linear in the k: one comparison at a time.
        alone = total.xreplace(dict.fromkeys(np.delete(k, e), sp.S.Zero))
        fisher, noise = (sp.cancel(f(k[e], p[e])) for f in (information, wins_variance))
        require(vanishes(noise - fisher), "the slopes' variance is not the information")
        for i, x in enumerate(v):
            slope = sp.diff(alone, x)
            require(vanishes(slope.xreplace(at)), "the true rewards are not the limit of the fit")
            # One win more, of which there are k q: the slopes move by -b, and their covariance is noise b b'.
            require(vanishes(sp.diff(slope, q[e]) + k[e] * signs[i]), "frequencies enter otherwise")
            for j in range(i, graph.n):
                curvature = sp.diff(slope, v[j]).xreplace(at)
                require(vanishes(curvature - fisher * signs[i] * signs[j]), "the curvature is not the information")


def _map(function: Callable[[Any], Any], values: Any) -> Any:
    return np.array([function(value) for value in values], dtype=object)


def laplacian(graph: PreferenceGraph, conductances: Any) -> sp.Matrix:
    """B' diag(conductances) B, exact."""
    b = sp.Matrix(graph.incidence.toarray().astype(int))
    return b.T * sp.diag(*conductances) * b


def resistance(graph: PreferenceGraph, conductances: Any, pair: tuple[int, int]) -> sp.Expr:
    """c' L^+ c exactly, with L^+ = (L + 11'/n)^-1 - 11'/n of a connected graph."""
    ones = sp.ones(graph.n, graph.n) / graph.n
    c = sp.zeros(graph.n, 1)
    c[pair[0]], c[pair[1]] = 1, -1
    adjugate, determinant = algebra.adjugate(laplacian(graph, conductances) + ones)
    return sp.factor((c.T * adjugate * c)[0]) / sp.factor(determinant)


def check_variance(
    graph: PreferenceGraph,
    pair: tuple[int, int],
    formula: Callable[[PreferenceGraph, Any, tuple[int, int]], Any] = resistance,
    *,
    features: sp.Matrix | None = None,
) -> None:
    """The delta method: minus the inverse curvature times -k b, squared, times the variances of the frequencies.

    Args:
        graph: comparisons of symbolic information.
        pair: whose margin.
        formula: (graph, information of each comparison, pair) -> variance, under test.
        features: implicit rewards per parameter, [n, d]; where not given, one each, the last response's held at 0
            (no margin sees a shift).
    """
    g = sp.symbols(f"g0:{len(graph)}", positive=True)
    features = sp.eye(graph.n)[:, :-1] if features is None else features
    curvature = features.T * laplacian(graph, g) * features
    adjugate, determinant = algebra.adjugate(curvature)
    require(determinant != 0, "the labels do not determine the fit")
    asked = features[pair[0], :] - features[pair[1], :]
    gains = adjugate * asked.T / determinant  # of the margin, from one unit of slope
    b = sp.Matrix(graph.incidence.toarray().astype(int)) * features
    # The slope of comparison e has variance g_e, so what it adds to the margin has (b_e . gains)^2 g_e.
    variance = sum(g[e] * (b[e, :] * gains)[0] ** 2 for e in range(len(graph)))
    require(vanishes(variance - formula(graph, g, pair)), "the fit has another variance")


def outcomes(labels: Sequence[int], p: Sequence[Any]) -> Iterator[tuple[tuple[int, ...], Any]]:
    """(wins of each comparison, probability), independent labels."""
    for wins in itertools.product(*(range(k + 1) for k in labels)):
        chance = sp.S.One
        for x, k, q in zip(wins, labels, p, strict=True):
            chance *= comb(k, x) * q**x * (1 - q) ** (k - x)
        yield wins, chance


def check_bound(graph: PreferenceGraph, labels: Sequence[int], variance: OfLabels = bernoulli) -> None:
    """For any function T of the labels, Cov(T, score) is the gradient of E[T], outcome by outcome; and the score,
    minus the slope of the loss, has mean 0 and covariance L. With T* = margin + c' L^+ score therefore
    Cov(T, T*) = c' L^+ c = Var(T*) for every T that is unbiased to first order, and Var(T) = R_eff + Var(T - T*).
    """
    p = sp.symbols(f"p0:{len(graph)}", positive=True)
    b = sp.Matrix(graph.incidence.toarray().astype(int))
    mean, covariance = sp.zeros(graph.n, 1), sp.zeros(graph.n, graph.n)
    slopes = [[likelihood_slope(x, k, share) for x in range(k + 1)] for k, share in zip(labels, p, strict=True)]
    for wins, chance in outcomes(labels, p):
        score = b.T * sp.Matrix([of_edge[x] for of_edge, x in zip(slopes, wins, strict=True)])
        mean += chance * score
        covariance += chance * score * score.T
    require(all(vanishes(entry) for entry in mean), "the score has another mean than 0")
    information = laplacian(graph, [variance(k, share) for k, share in zip(labels, p, strict=True)])
    require(all(vanishes(entry) for entry in covariance - information), "the score has another covariance")


def likelihood_slope(wins: int, labels: int, p: sp.Symbol) -> sp.Expr:
    """d log P / d margin of so many wins, at the margin log(p / (1 - p)): minus the slope of the loss, after a check
    that the loss is minus the log-likelihood but for a constant.
    """
    loss = wins * _dpo(MARGIN / BETA) + (labels - wins) * _dpo(-MARGIN / BETA)
    chance = comb(labels, wins) * sigmoid(MARGIN) ** wins * sigmoid(-MARGIN) ** (labels - wins)
    score = -sp.diff(loss, MARGIN)
    require(vanishes(sp.diff(chance, MARGIN) - chance * score), "the loss is not the labels' likelihood")
    return sp.cancel(score.subs(MARGIN, sp.log(p / (1 - p))))


def check_nothing_is_unbiased(labels: int) -> None:
    """Whatever T says of each number of wins, its mean stays finite as p -> 1, where the margin does not."""
    t = sp.symbols(f"t0:{labels + 1}", real=True)
    mean = sum(t[wins[0]] * chance for wins, chance in outcomes([labels], [P]))
    require(limit(mean, P, 1, "-") == t[labels], "the mean has another limit")
    require(limit(sp.log(P / (1 - P)), P, 1, "-") == sp.oo, "the margin stays finite")


def check_distillation(graph: PreferenceGraph, margins: Sequence[Any], pair_loss: Any = None) -> None:
    """The distilled policy has the reward model's own margins; so its error there is the model's, b^2 + v.

    Args:
        graph: connected, positive weights.
        margins: of the reward model, one a comparison.
        pair_loss: (log-ratio margin, reward margin) -> loss; distillation where not given.
    """

    def distil(margin: Any, target: Any) -> Any:
        return losses.distillation(margin, target, beta=BETA)

    loss = pair_loss or distil
    v = np.array([*sp.symbols(f"v0:{graph.n - 1}", real=True), sp.S.Zero], dtype=object)
    implicit = v[graph.winners] - v[graph.losers]
    total = sum(loss(z / BETA, sp.sympify(target)) for z, target in zip(implicit, margins, strict=True))
    [solution] = sp.linsolve([sp.diff(total, x) for x in v[:-1]], *v[:-1])
    at = dict(zip(v[:-1], solution, strict=True))
    for z, target in zip(implicit, margins, strict=True):
        require(vanishes(z.subs(at) - target), "the distilled margin is not the reward model's")
    truth, bias, noise, variance = sp.symbols("d b e v", real=True)
    square = sp.Poly(sp.expand((truth + bias + noise - truth) ** 2), noise)
    moments = {0: 1, 1: 0, 2: variance}  # of the noise
    error = sum(coefficient * moments[power] for (power,), coefficient in square.terms())
    require(sp.expand(error - bias**2 - variance) == 0, "another mean squared error")


def check_own_comparison(lower: Callable[[Any], Any]) -> None:
    """R_eff = 1 / (k p (1 - p)) >= lower(k), with equality at p = 1/2 alone."""
    own = resistance(PreferenceGraph(2, [(0, 1)]), [bernoulli(LABELS, P)], (0, 1))
    require(vanishes(own - 1 / bernoulli(LABELS, P)), "another resistance")
    excess = simplify((own - lower(LABELS)) * bernoulli(LABELS, P))
    require(vanishes(excess - (2 * P - 1) ** 2), "the bound is another, or not sharp at p = 1/2 alone")


def check_infinite(graph: PreferenceGraph, edge: int, labels: int, claimed: OfLabels) -> None:
    """All label outcomes: the margin of a comparison diverges (`prop1-scc`) with the claimed probability."""
    p = sp.symbols(f"p0:{len(graph)}", positive=True)
    total = sp.S.Zero
    for wins, chance in outcomes([labels] * len(graph), p):
        seen = [(w, lo) for (w, lo), x in zip(graph.edges.tolist(), wins, strict=True) if x > 0]
        seen += [(lo, w) for (w, lo), x in zip(graph.edges.tolist(), wins, strict=True) if x < labels]
        strong = PreferenceGraph(graph.n, seen).strong_components
        if strong[graph.edges[edge, 0]] != strong[graph.edges[edge, 1]]:
            total += chance
    require(sp.expand(total - claimed(labels, p[edge])) == 0, "infinite with another probability")


def check_fit(frequency: sp.Expr) -> None:
    """On a comparison of its own the fit is the log-odds of the label frequency, finite iff labels disagree."""
    total = frequency * _dpo(MARGIN / BETA) + (1 - frequency) * _dpo(-MARGIN / BETA)
    slope = sp.diff(total, MARGIN)
    if frequency == 1:
        require(simplify(-slope).is_positive, "the loss of labels that agree has a minimum")
    else:
        at = sp.log(frequency / (1 - frequency))
        require(vanishes(slope.subs(MARGIN, at)), "the log-odds are not the fit")


def agreement(labels: Any, p: Any) -> Any:
    """p^k + (1 - p)^k."""
    return p**labels + (1 - p) ** labels


def check_many_labels(labels: int, p: float) -> float:
    """Exact sums over the number of wins: mean squared error of the fit over R_eff, which is to be within 6 R_eff of
    1 with all but 1e-6 of the probability on finite fits; returns the ratio.
    """
    x = np.arange(1, labels)
    # By hand: scipy.stats takes half a second to import.
    ways = gammaln(labels + 1) - gammaln(x + 1) - gammaln(labels - x + 1)
    chance = np.exp(ways + x * np.log(p) + (labels - x) * np.log1p(-p))
    infinite = float(infinite_probability(p, labels))
    require(infinite < 1e-6, f"{labels} labels: the fit is infinite with probability {infinite:.3g}")
    error = chance @ (np.log(x / (labels - x)) - np.log(p / (1 - p))) ** 2 / chance.sum()
    [expected] = effective_resistance(PreferenceGraph(2, [(0, 1)], [labels]), p)
    ratio = float(error / expected)
    require(abs(ratio - 1) < 6 * expected, f"{labels} labels: squared error {ratio:.3f} times R_eff")
    return ratio


def prove() -> None:
    for graph, pair in STRUCTURES.values():
        check_information(graph)
        check_variance(graph, pair)
        check_distillation(graph, _margins_of_rewards(graph))
    check_bound(PreferenceGraph(2, [(0, 1)]), [3])
    check_bound(PreferenceGraph(3, [(0, 1), (1, 2), (2, 0)]), [1, 1, 1])
    check_nothing_is_unbiased(3)
    check_own_comparison(lambda k: 4 / k)
    check_fit(P)
    check_fit(sp.S.One)
    for labels in (1, 2, 3):
        check_infinite(PreferenceGraph(2, [(0, 1)]), 0, labels, agreement)
    check_infinite(STRUCTURES["a triangle and a bridge"][0], 3, 2, agreement)


def _margins_of_rewards(graph: PreferenceGraph) -> Any:
    rewards = np.array(sp.symbols(f"s0:{graph.n}", real=True), dtype=object)
    return rewards[graph.winners] - rewards[graph.losers]


# ---------------------------------------------------------------- enumeration


def least_variance(graph: PreferenceGraph, rewards: Floats, pair: tuple[int, int]) -> float:
    """Of all functions T of one label a comparison, 2^m numbers, that are unbiased to first order: the least variance.

    A least-norm problem: T sqrt(P) of smallest norm with E[T] = 0 (taking the margin off) and d E[T] / dr = c.
    """
    p = 1 / (1 + np.exp(-graph.margins(rewards)))
    wins = np.array(list(itertools.product((0, 1), repeat=len(graph))))
    chance = np.where(wins, p, 1 - p).prod(axis=1)
    slopes = (chance[:, None] * np.where(wins, 1 - p, -p)) @ graph.incidence.toarray()  # dP/dr by d log sigma
    constraints = np.vstack([np.sqrt(chance), (slopes / np.sqrt(chance)[:, None]).T])
    wanted = np.zeros(1 + graph.n)
    wanted[1 + pair[0]], wanted[1 + pair[1]] = 1.0, -1.0
    solution = np.linalg.lstsq(constraints, wanted, rcond=1e-12)[0]
    require(bool(np.abs(constraints @ solution - wanted).max() < 1e-9), "nothing is unbiased to first order")
    return float(solution @ solution)


def connected_graphs(n: int) -> Iterator[PreferenceGraph]:
    """On n labelled responses, every connected graph, each comparison listed once."""
    pairs = list(itertools.combinations(range(n), 2))
    for size in range(n - 1, len(pairs) + 1):
        for chosen in itertools.combinations(pairs, size):
            if (graph := PreferenceGraph(n, list(chosen))).is_connected:
                yield graph


def simulated_ratio(graph: PreferenceGraph, rewards: Floats, labels: int, draws: int) -> Floats:
    """Monte Carlo: mean squared error of the fitted margins over R_eff, [m]; the fits by Newton's method, at once."""
    p = 1 / (1 + np.exp(-graph.margins(rewards)))
    frequencies = np.random.default_rng(0).binomial(labels, p, (draws, len(graph))) / labels
    b = graph.incidence.toarray()[:, :-1]
    v = np.tile(rewards[:-1] - rewards[-1], (draws, 1))
    for _ in range(8):
        fitted = 1 / (1 + np.exp(-v @ b.T))
        curvature = np.einsum("em,de,en->dmn", b, fitted * (1 - fitted), b)
        v = v + np.linalg.solve(curvature, ((frequencies - fitted) @ b)[..., None])[..., 0]
    error = ((v @ b.T - graph.margins(rewards)) ** 2).mean(axis=0)
    counted = graph.with_weights([labels] * len(graph))
    return np.asarray(error / effective_resistance(counted, p))


def enumerate_all(thorough: bool) -> str:
    rng, count, worst = np.random.default_rng(0), 0, 0.0
    for n in (2, 3, 4):
        for graph in connected_graphs(n):
            rewards = rng.normal(size=n)
            p = 1 / (1 + np.exp(-graph.margins(rewards)))
            for pair in itertools.combinations(range(n), 2):
                best = least_variance(graph, rewards, pair)
                [ours] = effective_resistance(graph, p, pairs=[pair])
                worst, count = max(worst, abs(best / ours - 1)), count + 1
    require(worst < 1e-8, f"the least variance is {worst:.1e} from R_eff")
    ratios = [check_many_labels(labels, p) for labels in (100, 1000, 10000) for p in (0.5, 0.75)]
    graph, rewards = PreferenceGraph(4, [(0, 1), (1, 2), (2, 3), (0, 2)]), np.array([0.8, 0.2, -0.3, -0.7])
    draws = 50_000 if thorough else 5_000
    simulated = simulated_ratio(graph, rewards, 400, draws)
    # A variance of `draws` normal errors is known to sqrt(2 / draws); the rest is the finite number of labels.
    allowed = 4 * np.sqrt(2 / draws) + 0.03
    require(bool((np.abs(simulated - 1) < allowed).all()), f"Monte Carlo / R_eff is {simulated}")
    return (
        f"least variances of {count} margins, all connected graphs, n <= 4; squared error / R_eff "
        f"{max(ratios[:2]):.3f}, {max(ratios[2:4]):.4f}, {max(ratios[4:]):.5f} at 100, 1,000, 10,000 labels, "
        f"{simulated.max():.2f} in {draws:,} simulated fits"
    )


# ---------------------------------------------------------------- without each assumption


def _not_bradley_terry() -> str:
    """The 3-cycle of P = 3/4: the fit is 0, its curvature 1/4 a label, the slopes' variance 3/16."""
    p, variance = sp.Rational(3, 4), bernoulli(1, sp.Rational(3, 4))
    total = 3 * (p * _dpo(MARGIN / BETA) + (1 - p) * _dpo(-MARGIN / BETA))
    curvature = simplify(sp.diff(total, MARGIN, 2).subs(MARGIN, 0)) / 3
    graph = STRUCTURES["a triangle"][0]
    at_truth = resistance(graph, [variance] * 3, (0, 1))
    sandwich = resistance(graph, [curvature] * 3, (0, 1)) * variance / curvature
    require((curvature, variance) == (sp.Rational(1, 4), sp.Rational(3, 16)), "another curvature or variance")
    require(at_truth > sandwich, "the formula does not fail")
    return f"3-cycle, P = 3/4, one label each: R_eff is {at_truth}, the variance of the fit {sandwich} a label"


def _copied_labels() -> str:
    """k copies of one label: the number of wins has variance k^2 p (1 - p)."""
    copies = [(LABELS, P), (sp.S.Zero, 1 - P)]
    mean = sum(x * chance for x, chance in copies)
    variance = simplify(sum((x - mean) ** 2 * chance for x, chance in copies))
    require(vanishes(variance / bernoulli(LABELS, P) - LABELS), "another variance")
    return "one annotator's label, copied k times: the variance of the slope is k times k p (1 - p)"


def _shared_parameters() -> str:
    """Two prompts with one feature: margins of both pairs are theta."""
    graph, features = PreferenceGraph(4, [(0, 1), (2, 3)]), sp.Matrix([1, 0, 1, 0])
    g = sp.symbols("g0:2", positive=True)
    information = (features.T * laplacian(graph, g) * features)[0]
    require(vanishes(information - g[0] - g[1]), "another information")
    require(simplify(1 / g[0] - 1 / information).is_positive, "the labels of the other prompt do not help")
    return "two prompts whose pairs share one parameter: the variance is 1 / (g1 + g2), R_eff of either is 1 / g"


def _not_connected() -> str:
    graph = PreferenceGraph(4, [(0, 1), (2, 3)])
    curvature = (laplacian(graph, sp.symbols("g0:2", positive=True)))[:-1, :-1]
    require(vanishes(curvature.det()), "the fit is determined")
    found = effective_resistance(graph, pairs=[(0, 2)])
    require(bool(found[0] == np.inf), "a finite resistance")
    return "comparisons 0-1 and 2-3: the margin between 0 and 2 is not determined by any number of labels"


def _not_one_reward() -> str:
    """Margins (1, 1, 3) of 0 > 1, 1 > 2, 0 > 2 are those of no reward; the nearest are (4/3, 4/3, 8/3)."""
    v = sp.symbols("v0:2", real=True)
    total = sum(
        losses.distillation(z / BETA, sp.Integer(d), beta=BETA) for z, d in ((v[0] - v[1], 1), (v[1], 1), (v[0], 3))
    )
    [solution] = sp.linsolve([sp.diff(total, x) for x in v], *v)
    require(solution == (sp.Rational(8, 3), sp.Rational(4, 3)), f"the optimum is {solution}")
    return "pairwise margins (1, 1, 3) on 0 > 1 > 2: distilled to (4/3, 4/3, 8/3), so the error is not the model's"


def _few_labels() -> str:
    [finite] = effective_resistance(PreferenceGraph(2, [(0, 1)], [1]))
    require(bool(finite == 4.0), "another resistance")
    require(agreement(1, P).equals(1), "one label may leave the fit finite")
    check_fit(sp.S.One)
    return "one label: the fit is infinite whatever it says, and so is the squared error; R_eff is 4 at p = 1/2"


# ---------------------------------------------------------------- properties


@st.composite
def _problems(draw: st.DrawFn) -> tuple[PreferenceGraph, Floats, Floats]:
    """(connected graph with each pair once, weights the labels; rewards; probabilities of a win)."""
    graph = draw(preference_graphs(max_responses=5, connected=True))
    rewards = draw(vectors(graph.n, 1.5))
    return graph, rewards, 1 / (1 + np.exp(-graph.margins(rewards)))


@given(_problems(), positive(0.1, 5))
def curvature_of_the_training_loss_gives_the_resistance(
    problem: tuple[PreferenceGraph, Floats, Floats], beta: float
) -> None:
    """torch: the Hessian of the expected DPO loss by automatic differentiation, pseudo-inverted."""
    import torch

    graph, rewards, p = problem
    k, q = torch.tensor(graph.weights), torch.tensor(p)

    def expected(implicit: Any) -> Any:
        margins = graph.margins(implicit) / beta
        return (k * (q * losses.dpo(margins, beta=beta) + (1 - q) * losses.dpo(-margins, beta=beta))).sum()

    hessian = torch.autograd.functional.hessian(expected, torch.tensor(rewards))  # type: ignore[no-untyped-call]
    c = graph.incidence.toarray()
    variances = np.einsum("ei,ij,ej->e", c, np.linalg.pinv(hessian.numpy(), rcond=1e-12, hermitian=True), c)
    np.testing.assert_allclose(effective_resistance(graph, p), variances, rtol=1e-7)


@given(_problems())
def the_fits_response_to_frequencies_gives_the_resistance(problem: tuple[PreferenceGraph, Floats, Floats]) -> None:
    """NumPy: central differences of the solved fit in each label frequency, squared, times p (1 - p) / k."""
    graph, _, p = problem
    both = np.concatenate([graph.edges, graph.edges[:, ::-1]])
    ref = np.full(graph.n, -np.log(graph.n))

    def margin(frequencies: Floats) -> float:
        counted = PreferenceGraph(
            graph.n, both, np.concatenate([graph.weights * frequencies, graph.weights * (1 - frequencies)])
        )
        u = optimum(counted, dpo, targets=np.zeros(len(both)), beta=1.0, ref_logps=ref, alpha=0.0)
        return float(graph.margins(u)[0])

    h, m = 1e-4, len(graph)
    slopes = np.array([margin(p + h * e) - margin(p - h * e) for e in np.eye(m)]) / (2 * h)
    variance = (slopes**2 * p * (1 - p) / graph.weights).sum()
    np.testing.assert_allclose(effective_resistance(graph, p)[0], variance, rtol=1e-4)


CLAIMS = (
    Claim(
        id="labels-or-reward",
        source="ours, on the statistics of [F] eq 2, 6, 7",
        statement=(
            "Labels of Bradley-Terry preferences, k_e on comparison e, carry the information L = B' diag(k p (1 - p)) "
            "B on the rewards. So the implicit reward margin beta Delta between i and j that tabular DPO learns has "
            "asymptotic variance R_eff(i, j) = c' L^+ c, c = e_i - e_j, and with any number of labels no estimator "
            "that is unbiased to first order at the truth has less. Distilling a reward model of bias b and variance v "
            "there is better iff b^2 + v < R_eff. A comparison that no others bypass has R_eff = 1 / (k p (1 - p)) >= "
            "4 / k, and its DPO optimum is infinite with probability p^k + (1 - p)^k."
        ),
        formula=(
            r"R_{\rm eff}(i,j)=(e_i-e_j)^\top\bigl(B^\top{\rm diag}(kp(1-p))B\bigr)^+(e_i-e_j);\qquad "
            r"\text{distil}\iff b^2+v<R_{\rm eff}"
        ),
        domain="finite responses; tabular policies, their optima; reward margins in nats; no flow",
        losses=("logratio_margin", "bradley_terry", "dpo", "distillation"),
        assumptions={
            "Bradley-Terry": "labels follow P(i > j) = sigma(r_i - r_j)",
            "independent labels": "all labels are drawn independently",
            "tabular": "one free parameter a response; shared ones pool the labels of several comparisons",
            "connected": "comparisons link i and j",
            "one reward": "the reward model's margins are differences of one reward",
            "many labels": "the comparison with DPO's error is of its limit law as labels grow in fixed proportions",
        },
        prove=prove,
        counterexamples={
            "Bradley-Terry": _not_bradley_terry,
            "independent labels": _copied_labels,
            "tabular": _shared_parameters,
            "connected": _not_connected,
            "one reward": _not_one_reward,
            "many labels": _few_labels,
        },
        controls={
            "without Bradley-Terry": lambda: check_information(
                STRUCTURES["a triangle"][0], truth=lambda margin: sp.Rational(3, 4)
            ),
            "without independent labels": lambda: check_information(
                STRUCTURES["two in series"][0], wins_variance=lambda k, p: k**2 * p * (1 - p)
            ),
            "without tabular": lambda: check_variance(
                STRUCTURES["two in series"][0], (0, 1), features=sp.Matrix([2, 1, 0])
            ),
            "without connected": lambda: check_variance(PreferenceGraph(4, [(0, 1), (2, 3)]), (0, 2)),
            "without one reward": lambda: check_distillation(PreferenceGraph(3, [(0, 1), (1, 2), (0, 2)]), [1, 1, 3]),
            "without many labels": lambda: check_many_labels(1, 0.5),
            "information without the labels": lambda: check_information(
                STRUCTURES["two in series"][0], information=lambda k, p: p * (1 - p)
            ),
            "information k p": lambda: check_information(
                STRUCTURES["two in series"][0], information=lambda k, p: k * p
            ),
            "information of a probit": lambda: check_information(
                STRUCTURES["two in series"][0], information=lambda k, p: k / (p * (1 - p))
            ),
            "DPO of the other sign": lambda: check_information(
                STRUCTURES["two in series"][0], pair_loss=lambda z: _dpo(-z)
            ),
            "IPO": lambda: check_information(
                STRUCTURES["two in series"][0], pair_loss=lambda z: losses.ipo(z, tau=BETA)
            ),
            "bypasses ignored": lambda: check_variance(*STRUCTURES["a triangle"], lambda graph, g, pair: 1 / g[0]),
            "parallel for series": lambda: check_variance(
                *STRUCTURES["two in series"], lambda graph, g, pair: 1 / (g[0] + g[1])
            ),
            "covariance without 1 - p": lambda: check_bound(PreferenceGraph(2, [(0, 1)]), [2], lambda k, p: k * p),
            "distilled without beta": lambda: check_distillation(
                PreferenceGraph.chain(2), [sp.Symbol("s", real=True)], lambda z, d: losses.distillation(z, d, beta=1)
            ),
            "2 / k": lambda: check_own_comparison(lambda k: 2 / k),
            "infinite only if all are wins": lambda: check_infinite(
                PreferenceGraph(2, [(0, 1)]), 0, 2, lambda k, p: p**k
            ),
            "a comparison that others bypass": lambda: check_infinite(STRUCTURES["a triangle"][0], 0, 1, agreement),
        },
        enumerate=enumerate_all,
        properties=(
            curvature_of_the_training_loss_gives_the_resistance,
            the_fits_response_to_frequencies_gives_the_resistance,
        ),
    ),
)
