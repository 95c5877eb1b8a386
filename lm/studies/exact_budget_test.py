"""The optimum under a KL budget, and what a training that misses it is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cvxpy as cp
import numpy as np
import pytest

from lm.config import ExactConfig
from lm.objectives import DPO, Method, Pessimism, PessimisticDistilledDPO, PessimisticDPO
from lm.studies import exact, exact_budget
from lm.studies.exact import Floats, Graphs, Trained, World
from lm.studies.exact_test import small


@pytest.fixture(scope="module")
def world() -> World:
    return exact.make_world(small())


def graphs_of(world: World) -> Graphs:
    """More pairs of one prompt than of the other."""
    rng = np.random.default_rng(0)
    return [exact.sparse_pairs(r, np.arange(k), rng) for r, k in zip(world.rewards, (8, 5), strict=True)]


def by_cone_program(method: Method, world: World, graphs: Graphs, target: float) -> tuple[Floats, float]:
    """All prompts at once, and the multiplier as the solver's dual variable."""
    ref, pairs = world.target, sum(map(len, graphs))
    us = [cp.Variable(ref.shape[1]) for _ in graphs]
    terms: list[Any] = []
    kl: Any = 0.0
    assert method.implicit_scale is not None
    for x, (graph, u) in enumerate(zip(graphs, us, strict=True)):
        implicit = method.implicit_scale * (graph.incidence @ u)
        if isinstance(method, DPO):
            terms.append(cp.sum(cp.logistic(-implicit)) / pairs)
        else:
            terms.append(cp.sum_squares(graph.margins(world.rewards[x]) - implicit) / pairs)
        kl += len(graph) / pairs * (-ref[x] @ u)
    within = kl <= target
    normalised = [cp.log_sum_exp(u + np.log(p)) <= 0 for u, p in zip(us, ref, strict=True)]
    cp.Problem(cp.Minimize(cp.sum(terms)), [within, *normalised]).solve(solver=cp.CLARABEL)
    return np.log(ref) + np.array([u.value for u in us]), float(within.dual_value)


@pytest.mark.parametrize("target", [0.1, 0.6])
@pytest.mark.parametrize("method", [PessimisticDPO(beta=0.7), PessimisticDistilledDPO(beta=0.3)])
def test_the_constrained_optimum_and_its_multiplier_are_those_of_a_cone_program(
    method: Method, target: float, world: World
) -> None:
    graphs = graphs_of(world)
    best, multiplier = exact_budget.constrained_optimum(method, world, world.target, graphs, target)
    other, dual = by_cone_program(method, world, graphs, target)
    assert multiplier == pytest.approx(dual, rel=1e-4)
    assert np.abs(np.exp(best) - np.exp(other)).max() < 1e-4
    by_prompt = exact.forward_kl(world.target, best)
    assert np.average(by_prompt, weights=[len(g) for g in graphs]) == pytest.approx(target, rel=1e-6)


def test_a_constraint_that_does_not_bind_has_the_multiplier_0(world: World) -> None:
    method, graphs = PessimisticDistilledDPO(beta=1.0), [exact.all_pairs(r) for r in world.rewards]
    best, multiplier = exact_budget.constrained_optimum(method, world, world.target, graphs, 50.0)
    assert multiplier == 0
    logits = np.log(world.target) + world.rewards  # Theorem 1
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.abs(np.exp(best) - expected).max() < 1e-5


def measured(world: World, method: PessimisticDPO, alpha: float, factor: float = 1.0) -> dict[str, Any]:
    """`held_run` of the penalised optimum for the exact multiplier times a factor, had training ended there."""
    graphs = graphs_of(world)
    assert method.kl.target is not None
    _, multiplier = exact_budget.constrained_optimum(method, world, world.target, graphs, method.kl.target)
    kl = Pessimism(alpha_start=factor * multiplier, alpha_end=factor * multiplier)
    logps = exact.optimum(replace(method, kl=kl), world, world.target, graphs)
    run = Trained(logps=logps, loss=0.0, margins=[], rewards=None, alpha=alpha * multiplier)
    return exact_budget.held_run(method, world, world.target, graphs, run)


def test_what_misses_the_budget_is_told(world: World) -> None:
    method = exact_budget.held(PessimisticDPO(beta=0.7), 0.3)
    assert isinstance(method, PessimisticDPO)
    assert exact_budget.failures({"p-dpo": measured(world, method, 1.0)}) == []
    (said,) = exact_budget.failures({"p-dpo": measured(world, method, 1.2)})
    assert said.startswith("p-dpo, KL target: an alpha of ")
    far = exact_budget.failures({"p-dpo": measured(world, method, 1.0, factor=1.5)})
    assert [line.split(": ")[1][:7] for line in far] == ["a KL of", "total v"]
    assert "instead of 0.3" in far[0]
    assert "KL target of 0.3 nats: KL 0.3000" in exact_budget.remark("p-dpo", measured(world, method, 1.0))


def test_a_budget_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ExactConfig.kl_target must be > 0, got 0"):
        ExactConfig(**{**vars(small()), "kl_target": 0.0})
    with pytest.raises(ValueError, match=r"p_dpo.kl must have .* no target, and samples"):
        small("--p_dpo.kl.target", "1")
