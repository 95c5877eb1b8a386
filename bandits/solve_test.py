"""Exact optima against referees: CVXPY + Clarabel, projected gradient, 60-digit arithmetic, closed forms."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bandits.objectives import DPO, IPO, Distillation, EnsembleHull, EnsembleMin, Floats
from bandits.policy import uniform
from bandits.projected_gradient import project_to_simplex, projected_gradient
from bandits.solve import NotConverged, Optimum, Unattained, simplex_newton_step, solve
from theory.certificates import policy_kkt
from theory.preferences import PreferenceGraph
from theory.strategies import preference_graphs, vectors

CHAIN = PreferenceGraph.chain(3)


def optimum(*arguments: Any, **keywords: Any) -> Optimum:
    result = solve(*arguments, **keywords)
    assert isinstance(result, Optimum)
    return result


def random_problem(rng: np.random.Generator) -> tuple[PreferenceGraph, Floats]:
    n, m = int(rng.integers(2, 6)), int(rng.integers(1, 7))
    winners = rng.integers(0, n, m)
    losers = (winners + rng.integers(1, n, m)) % n
    return PreferenceGraph(n, np.stack([winners, losers], axis=1), rng.uniform(0.1, 3, m)), rng.dirichlet(np.ones(n))


def clarabel(
    kind: str,
    graph: PreferenceGraph,
    ref: Floats,
    alpha: float,
    *,
    scale: float,
    target: Any = None,
    sums: bool = False,
) -> tuple[Floats, float]:
    """(pi, value) by the exponential-cone solver; the losses are written out anew, in CVXPY's own atoms."""
    u = cp.Variable(graph.n)
    margins = u[graph.winners] - u[graph.losers]
    weights = graph.weights if sums else graph.weights / graph.weights.sum()
    kl = -ref @ u
    constraints = [cp.log_sum_exp(u + np.log(ref)) <= 0]
    if kind == "dpo":
        loss = weights @ cp.logistic(-scale * margins)
    elif kind == "hull":
        mixture = cp.Variable(len(target), nonneg=True)
        constraints.append(cp.sum(mixture) == 1)
        loss = weights @ cp.square(mixture @ target - scale * margins)
    else:
        loss = weights @ cp.square(target - scale * margins)
    problem = cp.Problem(cp.Minimize(loss + alpha * kl), constraints)
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    return ref * np.exp(u.value), float(problem.value)


@pytest.mark.parametrize("seed", range(8))
def test_every_objective_agrees_with_the_cone_solver(seed: int) -> None:
    rng = np.random.default_rng(seed)
    graph, ref = random_problem(rng)
    alpha, beta, tau = (float(10 ** rng.uniform(-1, 1)) for _ in range(3))
    rewards = rng.normal(size=(3, len(graph)))
    sums = bool(seed % 2)
    shared: dict[str, Any] = {"alpha": alpha, "reduction": "sum" if sums else "mean"}
    members = [clarabel("square", graph, ref, alpha, scale=beta, target=row, sums=sums) for row in rewards]
    for objective, (probs, value) in (
        (DPO(beta=beta), clarabel("dpo", graph, ref, alpha, scale=beta, sums=sums)),
        (IPO(tau=tau), clarabel("square", graph, ref, alpha, scale=1, target=1 / (2 * tau), sums=sums)),
        (Distillation(beta=beta, reward_margins=rewards[0]), members[0]),
        (EnsembleMin(beta=beta, reward_margins=rewards), min(members, key=lambda member: member[1])),
        (
            EnsembleHull(beta=beta, reward_margins=rewards),
            clarabel("hull", graph, ref, alpha, scale=beta, target=rewards, sums=sums),
        ),
    ):
        ours = optimum(objective, graph, ref, **shared)
        assert ours.certificate.residuals["relative"] <= 1e-10
        np.testing.assert_allclose(ours.probs, probs, atol=2e-4)  # the cone solver's own accuracy
        assert ours.value == pytest.approx(value, abs=1e-6)
        assert ours.value <= value + 1e-8


@given(
    graph=preference_graphs(max_responses=5),
    data=st.data(),
    log_alpha=st.floats(-6, 3),
    log_beta=st.floats(-2, 2),
    square=st.booleans(),
)
def test_extremes_in_sixty_digits(
    graph: PreferenceGraph, data: st.DataObject, log_alpha: float, log_beta: float, square: bool
) -> None:
    """Each arm's balance of mass, evaluated at 60 digits from the policy that was returned."""
    alpha, beta = 10**log_alpha, 10**log_beta
    exponents = np.array([data.draw(st.floats(-27.6, 0)) for _ in range(graph.n)])
    ref = np.exp(exponents) / np.exp(exponents).sum()
    rewards = data.draw(vectors(len(graph)))
    objective = Distillation(beta=beta, reward_margins=rewards) if square else DPO(beta=beta)
    ours = optimum(objective, graph, ref, alpha=alpha)
    assert worst_imbalance(ours.logratios, graph, ref, alpha, beta, rewards if square else None) <= 1e-9
    moved = ours.logratios.copy()
    moved[graph.winners[0]] += 1e-4 if abs(moved[graph.winners[0]]) < 50 else 1e-2
    assert worst_imbalance(moved, graph, ref, alpha, beta, rewards if square else None) > 1e-9


def worst_imbalance(
    u: Floats, graph: PreferenceGraph, ref: Floats, alpha: float, beta: float, rewards: Floats | None
) -> float:
    """Largest |alpha (pi - pi_ref) + dL/du| of an arm over the sum of its absolute terms."""
    with mpmath.workdps(60):
        exact = [mpmath.mpf(float(value)) for value in u]
        masses = [mpmath.mpf(float(p)) for p in ref]
        terms = [[alpha * mass * mpmath.exp(value), -alpha * mass] for mass, value in zip(masses, exact, strict=True)]
        total = mpmath.fsum(float(weight) for weight in graph.weights)
        for pair, ((winner, loser), weight) in enumerate(zip(graph.edges.tolist(), graph.weights, strict=True)):
            margin = exact[winner] - exact[loser]
            if rewards is None:
                parts = [-beta / (1 + mpmath.exp(beta * margin))]
            else:
                parts = [2 * beta**2 * margin, -2 * beta * mpmath.mpf(float(rewards[pair]))]
            for part in parts:
                terms[winner].append(weight / total * part)
                terms[loser].append(-weight / total * part)
        return max(float(abs(mpmath.fsum(arm)) / mpmath.fsum(abs(term) for term in arm)) for arm in terms)


@pytest.mark.parametrize("seed", range(12))
def test_newton_agrees_with_projected_gradient(seed: int) -> None:
    rng = np.random.default_rng(seed)
    graph, _ = random_problem(rng)
    ref = rng.dirichlet(np.full(graph.n, 3.0))
    alpha = float(10 ** rng.uniform(-0.5, 1))
    for objective in (DPO(beta=float(10 ** rng.uniform(-1, 0.5))), IPO(tau=1.0)):
        descended = projected_gradient(objective, graph, ref, alpha=alpha, tolerance=1e-11)
        np.testing.assert_allclose(optimum(objective, graph, ref, alpha=alpha).probs, descended, atol=1e-8)
        other = optimum(objective, graph, ref, alpha=1.01 * alpha).probs
        assert np.abs(other - descended).max() > 1e-8


def test_projection_is_the_nearest_distribution() -> None:
    point = np.array([0.9, 0.6, -0.3])
    np.testing.assert_allclose(project_to_simplex(point), [0.65, 0.35, 0.0])
    np.testing.assert_allclose(project_to_simplex(point + 1e6), [0.65, 0.35, 0.0], atol=1e-9)


@pytest.mark.parametrize("n", [2, 3, 7, 200])
def test_ipo_on_the_chain_and_its_closure(n: int) -> None:
    """[F] Prop 7: spreads (n - 1) / (2 tau) and (n - 1) / (n tau)."""
    tau, chain = 0.7, PreferenceGraph.chain(n)
    u = optimum(IPO(tau=tau), chain, uniform(n)).logratios
    assert u[0] - u[-1] == pytest.approx((n - 1) / (2 * tau), rel=1e-9)
    if n <= 7:
        closed = optimum(IPO(tau=tau), chain.transitive_closure(), uniform(n)).logratios
        assert closed[0] - closed[-1] == pytest.approx((n - 1) / (n * tau), rel=1e-12)


@given(graph=preference_graphs(max_responses=6), tau=st.floats(0.1, 10))
def test_ipo_without_kl_meets_the_normal_equations(graph: PreferenceGraph, tau: float) -> None:
    ours = optimum(IPO(tau=tau), graph, uniform(graph.n))
    pull = graph.incidence.T @ graph.weights / (2 * tau)
    np.testing.assert_allclose(
        graph.laplacian() @ ours.logratios, pull, atol=1e-10 * max(1, 1 / tau) * graph.weights.sum()
    )
    assert ours.unique == graph.is_connected
    np.testing.assert_allclose(component_mass(graph, ours.probs), component_mass(graph, uniform(graph.n)), atol=1e-13)


def component_mass(graph: PreferenceGraph, probs: Floats) -> Floats:
    return np.asarray(np.bincount(graph.components, probs), dtype=np.float64)


@given(graph=preference_graphs(max_responses=6), tau=st.floats(0.3, 3))
def test_without_kl_is_the_limit_of_little_kl(graph: PreferenceGraph, tau: float) -> None:
    free, nearly = (optimum(IPO(tau=tau), graph, uniform(graph.n), alpha=alpha).probs for alpha in (None, 1e-8))
    np.testing.assert_allclose(free, nearly, atol=1e-5)


def test_distillation_on_a_connected_graph_recovers_the_rlhf_optimum() -> None:
    """[F] Theorem 1 in its connected form: pi proportional to pi_ref exp(r / beta)."""
    rewards, ref, beta = np.array([1.0, -0.5, 2.0, 0.3]), np.array([0.1, 0.2, 0.3, 0.4]), 0.5
    graph = PreferenceGraph(4, [(0, 1), (2, 1), (3, 2)])
    target = ref * np.exp(rewards / beta)
    ours = optimum(Distillation(beta=beta, reward_margins=graph.margins(rewards)), graph, ref)
    np.testing.assert_allclose(ours.probs, target / target.sum(), rtol=1e-12)
    apart = PreferenceGraph(4, [(0, 1), (2, 3)])
    ours = optimum(Distillation(beta=beta, reward_margins=apart.margins(rewards)), apart, ref)
    assert not ours.unique
    assert np.abs(ours.probs - target / target.sum()).max() > 0.05


@given(graph=preference_graphs(max_responses=6))
def test_dpo_without_kl(graph: PreferenceGraph) -> None:
    """Finite iff every pair is on a preference cycle; otherwise exactly the pairs on none diverge."""
    result = solve(DPO(beta=1.0), graph, uniform(graph.n))
    if not graph.crossing.any():
        assert isinstance(result, Optimum)
        assert result.certificate.accepts(1e-10)
        return
    assert isinstance(result, Unattained)
    assert result.diverging == [tuple(edge) for edge in graph.edges[graph.crossing].tolist()]
    weights = graph.weights / graph.weights.sum()
    loss = DPO(beta=1.0).pair_loss()
    along = [
        weights @ loss.value(graph.margins(result.inside.logratios + far * result.direction)) for far in (0, 5, 20, 60)
    ]
    assert along[0] > along[1] > along[2] >= result.infimum
    assert along[-1] == pytest.approx(result.infimum, abs=1e-10)
    both_ways = PreferenceGraph(graph.n, np.concatenate([graph.edges, graph.edges[:, ::-1]]))
    assert isinstance(solve(DPO(beta=1.0), both_ways, uniform(graph.n)), Optimum)


def test_unattained_says_what_diverges() -> None:
    result = solve(DPO(beta=1.0), PreferenceGraph(4, [(0, 1), (1, 0), (1, 2)], [2, 1, 1]), uniform(4))
    assert isinstance(result, Unattained)
    assert "1 pair(s) on no preference cycle diverge (1 > 2)" in str(result)
    assert result.inside.logratios[0] - result.inside.logratios[1] == pytest.approx(np.log(2))


def test_arms_in_no_pair_keep_their_probability_exactly() -> None:
    ref = np.array([0.1, 0.3, 0.2, 0.4])
    ours = optimum(DPO(beta=2.0), PreferenceGraph(4, [(0, 1)]), ref, alpha=0.5)
    assert ours.logratios[2] == ours.logratios[3] == 0
    moved = 2.0 / (1 + np.exp(2.0 * (ours.logratios[0] - ours.logratios[1]))) / 0.5
    assert ours.probs[0] - ref[0] == pytest.approx(moved, abs=1e-15)
    with_zero = optimum(DPO(beta=2.0), PreferenceGraph(5, [(0, 1)]), np.append(ref, 0.0), alpha=0.5)
    assert with_zero.probs[4] == 0
    np.testing.assert_allclose(with_zero.probs[:4], ours.probs, rtol=1e-13)


@given(graph=preference_graphs(max_responses=6), data=st.data(), alpha=st.sampled_from([None, 1e-4, 0.1, 30.0]))
def test_hull_is_below_every_member_and_its_weights_are_optimal(
    graph: PreferenceGraph, data: st.DataObject, alpha: float | None
) -> None:
    rewards = np.stack([data.draw(vectors(len(graph))) for _ in range(3)])
    hull = optimum(EnsembleHull(beta=0.5, reward_margins=rewards), graph, uniform(graph.n), alpha=alpha)
    least = optimum(EnsembleMin(beta=0.5, reward_margins=rewards), graph, uniform(graph.n), alpha=alpha)
    assert least.member_values is not None
    assert hull.value <= least.value + 1e-12
    assert least.value == pytest.approx(least.member_values.min(), abs=1e-18)  # of ties the closest, not the first
    assert {"weights_feasibility", "weights_dual_feasibility", "weights_complementarity"} <= set(
        hull.certificate.residuals
    )
    assert max(value for name, value in hull.certificate.residuals.items() if name != "stationarity") <= 1e-9


def test_simplex_newton_step_solves_the_quadratic() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        root, gradient, weights = rng.normal(size=(4, 4)), rng.normal(size=4), rng.dirichlet(np.ones(4))
        d = cp.Variable(4)
        model = gradient @ d + cp.sum_squares(root @ d) / 2
        cp.Problem(cp.Minimize(model), [weights + d >= 0, cp.sum(d) == 0]).solve(solver=cp.CLARABEL)
        np.testing.assert_allclose(
            simplex_newton_step(root.T @ root, gradient, weights, ridge=1e-12), d.value, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["chain", "star", "random", "components"])
def test_sparse_and_dense_agree(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, n = np.random.default_rng(1), 60
    edges = {
        "chain": [(i, i + 1) for i in range(n - 1)],
        "star": [(0, i) for i in range(1, n)],
        "random": [tuple(rng.choice(n, 2, replace=False)) for _ in range(5 * n)],
        "components": [tuple(3 * (i % 20) + rng.choice(3, 2, replace=False)) for i in range(n)],
    }[kind]
    graph, ref = PreferenceGraph(n, edges, rng.uniform(0.1, 3, len(edges))), rng.dirichlet(np.ones(n))
    for objective, alpha in ((DPO(beta=1.0), 0.05), (IPO(tau=0.5), None), (IPO(tau=0.5), 0.1)):
        monkeypatch.setattr("bandits.solve._DENSE_ARMS", n)
        dense = optimum(objective, graph, ref, alpha=alpha)
        monkeypatch.setattr("bandits.solve._DENSE_ARMS", 1)
        sparse = optimum(objective, graph, ref, alpha=alpha)
        np.testing.assert_allclose(dense.logratios, sparse.logratios, atol=1e-8)


def test_ten_thousand_arms() -> None:
    rng, n = np.random.default_rng(0), 10_000
    winners = rng.integers(0, n, 50_000)
    graph = PreferenceGraph(n, np.stack([winners, (winners + rng.integers(1, n, 50_000)) % n], axis=1))
    ours = optimum(DPO(beta=1.0), graph, uniform(n), alpha=0.3)
    assert ours.certificate.accepts(1e-10)


def test_certificate_rejects_a_perturbed_policy() -> None:
    ref, alpha = np.array([0.2, 0.3, 0.5]), 0.2
    ours = optimum(DPO(beta=1.0), CHAIN, ref, alpha=alpha)
    assert ours.certificate.accepts(1e-10)
    for step in (1e-4, -1e-4):
        log_probs = ours.log_probs + step * np.array([1, -1, 0])
        log_probs -= np.logaddexp.reduce(log_probs)
        slopes = DPO(beta=1.0).pair_loss().derivatives(CHAIN.margins(log_probs - np.log(ref))).slope / 2
        assert not policy_kkt(log_probs, CHAIN.incidence.T @ slopes - alpha * ref).accepts(1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PreferenceGraph(3, [(0, 3)]), r"edge 0, \(0, 3\) of weight 1: responses must be in 0 ... 2"),
        (lambda: PreferenceGraph(3, [(0, 1), (2, 2)]), r"edge 1, \(2, 2\) .* cannot be preferred to itself"),
        (
            lambda: PreferenceGraph(3, [(0, 1)], [0.0]),
            r"edge 0, \(0, 1\) of weight 0: the weight must be finite and > 0",
        ),
        (lambda: PreferenceGraph(3, [(0, 1)], [-2.0]), r"of weight -2: the weight must be finite and > 0"),
        (
            lambda: solve(DPO(beta=1), CHAIN, [0.5, 0.5]),
            r"ref must have shape \(3,\), a probability an arm, got \(2,\)",
        ),
        (lambda: solve(DPO(beta=1), CHAIN, [0.5, 0.4, 0.2]), "ref must sum to 1, its 3 entries sum to 1.1"),
        (lambda: solve(DPO(beta=1), CHAIN, [0.5, 0.7, -0.2]), "ref of arm 2 must be a probability, got -0.2"),
        (lambda: solve(DPO(beta=1), CHAIN, [0.5, 0.5, 0.0]), r"ref of arm 2 is 0, but pair 1, \(1, 2\), needs"),
        (lambda: solve(DPO(beta=1), CHAIN, uniform(3), alpha=0), "alpha must be a finite number > 0, got 0"),
        (lambda: solve(DPO(beta=1), CHAIN, uniform(3), alpha=-0.1), "alpha must be a finite number > 0, got -0.1"),
        (
            lambda: solve(DPO(beta=[1, 2]), CHAIN, uniform(3)),
            r"beta must be one number for one problem, got shape \(2,\)",
        ),
        (
            lambda: solve(DPO(beta=1), CHAIN, uniform(3), reduction="max"),  # type: ignore[arg-type]
            'reduction must be "mean" or "sum", got \'max\'',
        ),
        (
            lambda: solve(Distillation(beta=1, reward_margins=[1.0]), CHAIN, uniform(3)),
            r"reward_margins must have shape \(2,\), one a pair, got \(1,\)",
        ),
        (
            lambda: projected_gradient(DPO(beta=1), PreferenceGraph(3, [(0, 1)]), [0.5, 0.5, 0.0], alpha=1.0),
            "ref of arm 2 must be > 0 for projected gradient descent, got 0",
        ),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- limits, ties, extremes, kinds


def small_problem(seed: int, kind: str) -> tuple[PreferenceGraph, Floats, Floats]:
    """Graph, reference, and margins of 3 members: of rewards of the arms (all fit), or drawn from -1, 0, 1 (ties)."""
    rng = np.random.default_rng(seed)
    graph, _ = random_problem(rng)
    if kind == "rewards":
        members = np.stack([graph.margins(rewards) for rewards in rng.normal(size=(3, graph.n))])
    else:
        members = rng.integers(-1, 2, (3, len(graph))).astype(float)
    return graph, rng.dirichlet(np.full(graph.n, 2.0)), members


@pytest.mark.parametrize("kind", ["rewards", "ties"])
@pytest.mark.parametrize("ensemble", [EnsembleMin, EnsembleHull])
def test_ensembles_without_kl_are_the_limit_of_little_kl(ensemble: Any, kind: str) -> None:
    """Of members, and mixtures, that fit equally well alpha -> 0 picks the closest to pi_ref."""
    for seed in range(8):
        graph, ref, members = small_problem(seed, kind)
        objective = ensemble(beta=0.5, reward_margins=members)
        free, nearly = (optimum(objective, graph, ref, alpha=alpha) for alpha in (None, 1e-7))
        assert np.abs(free.probs - nearly.probs).sum() / 2 <= 1e-4, seed
        assert free.certificate.residuals.get("limit", 0.0) <= 1e-10
        if kind == "rewards":  # all fit exactly
            assert not free.unique
            if ensemble is EnsembleMin:
                assert free.ties == (0, 1, 2)


def test_of_mixtures_that_fit_the_limit_is_not_the_equal_one() -> None:
    """Two arms: any mixture of the margins 1 and 3 fits exactly; 1 is the closest to the uniform reference."""
    pair = PreferenceGraph(2, [(0, 1)])
    found = optimum(EnsembleHull(beta=1.0, reward_margins=[[1.0], [3.0]]), pair, uniform(2))
    assert found.weights is not None
    np.testing.assert_allclose(found.weights, [1, 0], atol=1e-12)
    assert found.logratios[0] - found.logratios[1] == pytest.approx(1)
    both = optimum(EnsembleHull(beta=1.0, reward_margins=[[-1.0], [3.0]]), pair, uniform(2))
    np.testing.assert_allclose(both.probs, 0.5, atol=1e-12)
    assert not found.unique
    assert optimum(EnsembleHull(beta=1.0, reward_margins=[[1.0], [1.0]]), pair, uniform(2)).unique
    inconsistent = PreferenceGraph(2, [(0, 1), (1, 0)])
    only = optimum(EnsembleHull(beta=1.0, reward_margins=[[1.0, 0.0], [3.0, 0.0]]), inconsistent, uniform(2))
    assert only.unique


@pytest.mark.parametrize("alpha", [1e-2, 1e-4])
def test_a_hull_with_a_member_of_margins_zero(alpha: float) -> None:
    """It asks for the reference, at which every term of the weights' slopes vanishes."""
    both_ways = PreferenceGraph(2, [(0, 1), (1, 0)], [0.125, 1.0])
    members = [[0.0, 0.0], [1.0, 0.0625], [-2.0, 0.0]]
    found = optimum(EnsembleHull(beta=0.5, reward_margins=members), both_ways, uniform(2), alpha=alpha)
    np.testing.assert_allclose(found.probs, 0.5, atol=1e-9)


@pytest.mark.parametrize("alpha", [None, 0.1])
def test_ties_are_found_and_listed(alpha: float | None) -> None:
    pair = PreferenceGraph(2, [(0, 1)])

    def solved(margins: list[float]) -> Optimum:
        objective = EnsembleMin(beta=1.0, reward_margins=[[margin] for margin in margins])
        return optimum(objective, pair, uniform(2), alpha=alpha)

    symmetric = solved([2.0, 5.0, -2.0])
    assert symmetric.ties == ((0, 1, 2) if alpha is None else (0, 2))
    assert not symmetric.unique
    same = solved([2.0, 2.0])
    assert same.ties == (0, 1)
    assert same.unique
    if alpha:
        assert solved([2.0, 3.0]).ties == (0,)
        assert solved([2.0, 3.0]).unique
    else:
        closest = solved([3.0, -1.0, 2.0])
        assert closest.logratios[0] - closest.logratios[1] == pytest.approx(-1)


@pytest.mark.parametrize("scale", [1e-300, 1e-155, 1e-150, 1e-100, 1e-12, 1e12, 1e100, 1e150, 1e155, 1e300])
def test_extreme_parameters_are_solved_or_refused(scale: float) -> None:
    """No overflow, no warning, no policy that is none: a certified optimum, or what `solve` documents."""
    solved = 0
    ring = PreferenceGraph(3, [(0, 1), (1, 2), (2, 0)], [1.0, 2.0, 3.0])
    makers: tuple[Any, ...] = (
        lambda: (DPO(beta=scale), {}),
        lambda: (IPO(tau=scale), {}),
        lambda: (Distillation(beta=scale, reward_margins=[1.0, 2.0, 0.5]), {}),
        lambda: (Distillation(beta=1.0, reward_margins=[scale, 2.0, 0.5]), {}),
        lambda: (EnsembleHull(beta=scale, reward_margins=[[1.0, 2.0, 0.5], [0.0, 1.0, 1.0]]), {}),
        lambda: (EnsembleMin(beta=1.0, reward_margins=[[scale, 2.0, 0.5], [0.0, 1.0, 1.0]]), {}),
        lambda: (DPO(beta=1.0), {"alpha": scale}),
    )
    for make in makers:
        for alpha in (None, 0.1):
            try:
                objective, keywords = make()
                found = optimum(objective, ring, uniform(3), **({"alpha": alpha} | keywords))
            except (ValueError, NotConverged):
                continue
            assert found.probs.sum() == pytest.approx(1, abs=1e-9)
            assert found.certificate.residuals["relative"] <= 1e-10
            assert np.isfinite(found.value)
            solved += 1
    assert solved >= 1


def test_extreme_parameters_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"beta must be from 1e-150 to 1e\+150, got 1e\+155"):
        DPO(beta=1e155)
    with pytest.raises(NotConverged, match=r"probabilities sum to 1 only to 5.0e-01"):
        solve(IPO(tau=1e-150), PreferenceGraph(2, [(0, 1)]), uniform(2))
    with pytest.raises(ValueError, match=r"tau must be from 1e-150 to 1e\+150, got 1e-300"):
        IPO(tau=[1.0, 1e-300])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"objective": "dpo"},
            "objective must be a DPO, IPO, .* or EnsembleHull, made with its parameters, got str: 'dpo'",
        ),
        ({"objective": DPO}, "made with its parameters, got type"),
        (
            {"graph": [(0, 1)]},
            r"graph must be a PreferenceGraph, as PreferenceGraph\(n, edges\) is, got list: \[\(0, 1\)\]",
        ),
        ({"ref": "uniform"}, "ref must hold real numbers, got str: 'uniform'"),
        ({"ref": ["0.5", "0.3", "0.2"]}, "ref must hold real numbers, got list"),
        ({"ref": [0.5, 0.5, None]}, "ref must hold real numbers, .* got list"),
        ({"ref": None}, "ref must hold real numbers, .* got NoneType"),
    ],
)
def test_input_of_the_wrong_kind(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"objective": DPO(beta=1), "graph": CHAIN, "ref": uniform(3), "alpha": 0.1} | change
    with pytest.raises(TypeError, match=message):
        solve(**arguments)
    if "objective" in change or "graph" in change:
        with pytest.raises(TypeError, match=message.split(" or ")[0].split(", .*")[0].split(", made")[-1]):
            projected_gradient(**arguments)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: Distillation(beta=1, reward_margins=["a", "b"]),
            TypeError,
            "reward_margins must hold real numbers, got",
        ),
        (
            lambda: Distillation(beta=1, reward_margins=[[1.0], [1.0, 2.0]]),
            ValueError,
            "reward_margins must be an array",
        ),
        (
            lambda: solve(DPO(beta=1), CHAIN, uniform(3), alpha=[0.1]),  # type: ignore[arg-type]
            ValueError,
            r"alpha must be one number .* \(1,\)",
        ),
        (
            lambda: solve(DPO(beta=1), CHAIN, uniform(3), tolerance=0),
            ValueError,
            "tolerance must be a finite number > 0",
        ),
        (
            lambda: solve(DPO(beta=1), CHAIN, uniform(3), reduction=["mean"]),  # type: ignore[arg-type]
            ValueError,
            r"reduction must be \"mean\" or \"sum\", got \['mean'\]",
        ),
    ],
)
def test_parameters_of_the_wrong_kind(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_references_of_float32_are_normalised_and_others_are_refused_with_the_cure() -> None:
    rng, refused = np.random.default_rng(0), 0
    for _ in range(50):
        exact = rng.dirichlet(np.ones(3))
        narrow = exact.astype(np.float32)
        found = optimum(DPO(beta=1.0), CHAIN, narrow, alpha=0.1)
        assert found.probs.sum() == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(found.probs, optimum(DPO(beta=1.0), CHAIN, exact, alpha=0.1).probs, atol=1e-6)
        if abs(narrow.astype(float).sum() - 1) > 1e-9:
            refused += 1
            with pytest.raises(ValueError, match=r"ref must sum to 1, .* if that is rounding, divide it by its sum"):
                solve(DPO(beta=1.0), CHAIN, narrow.astype(float), alpha=0.1)
    assert refused > 10
    with pytest.raises(ValueError, match=r"ref must sum to 1, its 3 entries sum to 1\.001"):
        solve(DPO(beta=1.0), CHAIN, np.array([0.5, 0.3, 0.201], dtype=np.float32))


def test_beyond_double_precision_is_refused() -> None:
    with pytest.raises(NotConverged, match="above the tolerance 1e-30"):
        solve(DPO(beta=1.0), CHAIN, uniform(3), alpha=0.1, tolerance=1e-30)
