"""Guarantees against what an adversary finds, at optima and elsewhere; and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from bandits import certify as module
from bandits.certify import Guarantee, alpha_at_level, certify, example
from bandits.maxmin import max_min
from bandits.objectives import DPO, IPO, Distillation, EnsembleHull, EnsembleMin, Floats
from bandits.policy import uniform
from theory.preferences import PreferenceGraph

GRAPH = PreferenceGraph(4, [(0, 1), (1, 2), (2, 0), (2, 3)], [3.0, 2.0, 1.0, 2.0])
REF = np.array([0.1, 0.4, 0.2, 0.3])
MEMBERS = np.array([[1.0, 0.5, -0.8, 0.3], [0.2, 1.5, -0.1, -1.0]])
OBJECTIVES: dict[str, Any] = {
    "dpo": DPO(beta=0.7),
    "ipo": IPO(tau=0.6),
    "distillation": Distillation(beta=0.7, reward_margins=MEMBERS[0]),
    "hull": EnsembleHull(beta=0.7, reward_margins=MEMBERS),
}
of_each = pytest.mark.parametrize("name", OBJECTIVES)


def least_slack(found: Guarantee, seed: int) -> float:
    """min over rewards of advantage minus guarantee, by a quasi-Newton method from a random start."""
    start = np.random.default_rng(seed).normal(size=4)
    ended = minimize(lambda r: found.true_advantage(r) - found.for_reward(r), start, method="BFGS", tol=1e-10)
    return float(ended.fun)


@of_each
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_adversary_finds_the_bound_and_nothing_below(name: str, reduction: Any) -> None:
    found = certify(OBJECTIVES[name], GRAPH, REF, alpha=0.3, beta=0.7, reduction=reduction)
    assert found.residual <= 1e-10
    assert least_slack(found, 0) == pytest.approx(0, abs=1e-8)
    implicit = found.beta * found.logratios
    assert found.loss(implicit + 3) == pytest.approx(found.level, abs=1e-12)
    assert found.true_advantage(implicit) == pytest.approx(found.advantage, abs=1e-12)
    assert found.for_reward(implicit) == pytest.approx(found.advantage, abs=1e-12)
    assert 0 < found.divergence <= found.divergence_bound


@of_each
def test_at_another_policy_the_residual_enters(name: str) -> None:
    other = np.log([0.4, 0.1, 0.3, 0.2])
    found = certify(OBJECTIVES[name], GRAPH, REF, alpha=0.3, beta=0.7, log_probs=other)
    assert found.residual > 0.01
    assert least_slack(found, 1) == pytest.approx(0, abs=1e-8)
    reward = np.array([2.0, -1.0, 0.0, 1.0])
    without = found.advantage - found.beta / found.alpha * (found.loss(reward) - found.level)
    off = reward / found.beta - found.logratios
    assert abs(found.for_reward(reward) - without) <= found.residual * np.ptp(off) + 1e-12


def test_the_gradient_is_that_of_the_objective_in_the_logits() -> None:
    logits, alpha, step = np.array([0.3, -0.2, 0.8, 0.0]), 0.3, 1e-6

    def at(logits: Floats) -> Guarantee:
        return certify(OBJECTIVES["hull"], GRAPH, REF, alpha=alpha, log_probs=logits - np.logaddexp.reduce(logits))

    ends = [[at(logits + sign * step * axis) for sign in (1, -1)] for axis in np.eye(4)]
    slopes = [(a.level + alpha * a.forward_kl - b.level - alpha * b.forward_kl) / (2 * step) for a, b in ends]
    np.testing.assert_allclose(at(logits).gradient, slopes, atol=1e-8)


def test_it_is_the_max_min_policy_over_rewards_that_fit() -> None:
    """Against the max-min solver on rewards of the level set, its own implicit reward among them."""
    found = certify(DPO(beta=0.7), GRAPH, REF, alpha=0.3)
    rng, inside = np.random.default_rng(0), [found.beta * found.logratios]
    for direction in rng.normal(size=(40, 4)):
        step = 2.0 ** -np.arange(8)
        near = [inside[0] + length * direction for length in step]
        inside += [reward for reward in near if found.loss(reward) <= found.level][:1]
    assert len(inside) > 10
    solved = max_min(np.array(inside), REF, beta=0.7)
    assert solved.value == pytest.approx(found.max_min_value, abs=1e-8)
    np.testing.assert_allclose(np.exp(solved.log_probs), found.policy, atol=1e-5)


def test_alpha_at_the_true_reward_s_loss_guarantees_it() -> None:
    for seed in range(4):
        graph, ref, rewards = example(4, 200, seed)
        truth = certify(DPO(beta=1.0), graph, ref, alpha=1.0).loss(rewards)
        alpha = alpha_at_level(DPO(beta=1.0), graph, ref, truth)
        found = certify(DPO(beta=1.0), graph, ref, alpha=alpha)
        assert found.level == pytest.approx(truth, rel=1e-6)
        assert found.true_advantage(rewards) >= found.advantage - 1e-6 > 0


def test_the_loss_of_a_reward_under_dpo_is_the_labels_log_loss() -> None:
    found = certify(DPO(beta=0.2), GRAPH, REF, alpha=0.3)
    rewards = np.array([1.0, 0.0, 0.5, -1.0])
    wins = 1 / (1 + np.exp(-GRAPH.margins(rewards)))
    assert found.loss(rewards) == pytest.approx(-np.log(wins) @ GRAPH.weights / GRAPH.weights.sum(), rel=1e-12)


def test_an_arm_without_reference_has_no_part() -> None:
    graph = PreferenceGraph(5, GRAPH.edges, GRAPH.weights)
    found = certify(DPO(beta=0.7), graph, np.append(REF, 0.0), alpha=0.3)
    assert found.divergence == pytest.approx(certify(DPO(beta=0.7), GRAPH, REF, alpha=0.3).divergence, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: certify(EnsembleMin(beta=1, reward_margins=MEMBERS), GRAPH, REF, alpha=1),  # type: ignore[arg-type]
            TypeError,
            "objective must be a DPO, IPO, Distillation or EnsembleHull",
        ),
        (lambda: certify(IPO(tau=1), GRAPH, REF, alpha=1), ValueError, "beta must be given for IPO"),
        (lambda: certify(DPO(beta=1), GRAPH, REF, alpha=0), ValueError, "alpha must be a finite number > 0, got 0"),
        (
            lambda: certify(DPO(beta=1), GRAPH, REF, alpha=1, log_probs=[0.0] * 4),
            ValueError,
            r"got shape \(4,\) and probabilities that sum to 4",
        ),
        (
            lambda: certify(DPO(beta=1), GRAPH, REF, alpha=1, log_probs=[0.0, -np.inf, -np.inf, -np.inf]),
            ValueError,
            "log_probs of arm 1 must be finite: its ref is positive",
        ),
        (
            lambda: certify(DPO(beta=1), GRAPH, REF, alpha=1).for_reward([1.0]),
            ValueError,
            r"rewards must be 4 finite numbers, one an arm, got \[1.0\]",
        ),
        (
            lambda: alpha_at_level(DPO(beta=1), PreferenceGraph.chain(3), uniform(3), 5.0),
            ValueError,
            "level must be from .* the losses at alpha 1e-06 and 1e",
        ),
    ],
)
def test_bad_input(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_the_command_prints_guarantees_that_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert module.main(["--labels", "100", "--alpha", "0.05", "0.5"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    names = head.replace("beta J", "beta_J").split()
    values = [dict(zip(names, map(float, row.split()), strict=True)) for row in rows[:3]]
    for row in values:
        assert row["guaranteed"] <= row["true"] + 1e-3
        assert row["J"] <= row["C/alpha"]
    assert values[-1]["guaranteed"] == pytest.approx(values[-1]["beta_J"], abs=2e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "1"], "arms must be at least 2, got 1"),
        (["--alpha", "0"], "alpha must be a finite number > 0, got 0.0"),
        (["--beta", "nan"], "beta must be a finite number > 0, got nan"),
    ],
)
def test_the_command_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert module.main(arguments) == 2
    assert message in capsys.readouterr().err
