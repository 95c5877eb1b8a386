"""alpha by a budget: the ascent itself, and with the trainer, in float64, on a problem whose optimum is solved for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cvxpy as cp
import numpy as np
import numpy.typing as npt
import pytest
import torch
from datasets import Dataset

from lm.logprobs.completions import CompletionModel
from lm.logprobs.scoring import score_rows
from lm.objectives import (
    EnsembleDPO,
    HullDPO,
    Method,
    Pessimism,
    PessimisticDistilledDPO,
    PessimisticDPO,
)
from lm.training.batches import pair_collator
from lm.training.dual_ascent import DualAscent, ascent_of
from lm.training.loop import fit, training_arguments
from lm.training.policy import PolicyTrainer
from tests.tiny import causal_lm, pairs, training
from theory import budget
from theory.preferences import PreferenceGraph

Floats = npt.NDArray[np.float64]
ARMS = 8
GRAPH = PreferenceGraph(ARMS, [(2, 3), (3, 4), (4, 5), (5, 6), (2, 6), (7, 3)])
"""A completion is one token of eight, so the policy is tabular: any distribution on the tokens is a network's."""
REWARDS = np.array([0.0, 0.0, 1.5, 0.2, -0.4, 0.3, -1.0, 0.9])


# ---------------------------------------------------------------- the ascent


def test_alpha_starts_where_it_is_told_and_rises_above_the_target_and_falls_below_it() -> None:
    ascent = DualAscent(start=0.3, target=2.0, rate=0.1)
    assert ascent.alpha == 0.3
    ascent.step(2.0)
    assert (ascent.last, ascent.alpha) == (0.3, 0.3), "at the target nothing changes"
    above, below = (DualAscent(start=0.3, target=2.0, rate=0.1) for _ in range(2))
    for _ in range(3):
        above.step(2.5)
        below.step(1.5)
    assert above.multiplier == pytest.approx(0.3 * math.exp(3 * 0.1 * 0.25))
    assert below.multiplier == pytest.approx(0.3 * math.exp(-3 * 0.1 * 0.25))
    assert below.alpha < 0.3 < above.alpha


def test_a_step_moves_the_multiplier_by_the_rate_at_most_and_alpha_stays_positive() -> None:
    ascent = DualAscent(start=1.0, target=1e-3, rate=0.05)
    for kl in (1e6, 1e6, -1e9, -1e9):
        before = ascent.multiplier
        ascent.step(kl)
        assert abs(math.log(ascent.multiplier / before)) <= 0.05 + 1e-12
        assert ascent.alpha > 0


def test_where_the_constraint_does_not_bind_alpha_goes_to_zero() -> None:
    ascent = DualAscent(start=1.0, target=2.0, rate=0.05)
    for _ in range(800):
        ascent.step(1.0)
    assert ascent.alpha == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kl", [0.0, 1e6])
def test_however_long_it_was_on_one_side_it_comes_back(kl: float) -> None:
    ascent = DualAscent(start=1.0, target=2.0, rate=0.05)
    for _ in range(20_000):
        ascent.step(kl)
    assert 0 < ascent.alpha < math.inf
    for _ in range(600):  # the other side
        ascent.step(4.0 if kl < 2 else -1e4)
    assert (ascent.alpha > 1) == (kl < 2)


def test_a_saved_ascent_goes_on_to_the_bit(tmp_path: Path) -> None:
    one, other = (DualAscent(start=start, target=0.7, rate=0.03) for start in (0.1, 5.0))
    kls = np.random.default_rng(0).normal(1, 1, 40).tolist()
    for kl in kls[:20]:
        one.step(kl)
    one.save(tmp_path)
    other.load(tmp_path)
    assert (other.last, other.alpha) == (one.last, one.alpha)
    for kl in kls[20:]:
        one.step(kl)
        other.step(kl)
    assert other.alpha == one.alpha


# ---------------------------------------------------------------- where it starts


@pytest.mark.parametrize(
    ("kind", "constant"),
    [
        (PessimisticDPO, budget.DPO),
        (PessimisticDistilledDPO, 2.5 / 2),
        (EnsembleDPO, 8.0 / 2),
        (HullDPO, 8.0 / 2),
    ],
)
def test_it_starts_at_the_alpha_of_the_budget_or_as_configured(kind: Any, constant: float) -> None:
    rows = Dataset.from_dict(
        {"reward_margin": [1.0, -2.0], "member_margins": [[1.0, 4.0], [1.0, 0.0]], "ref_sample_logps": [[0.0]] * 2}
    )
    ascent = ascent_of(kind(kl=Pessimism(target=2.0)), rows)
    assert ascent is not None
    assert ascent.alpha == pytest.approx(constant / 2.0)
    own = ascent_of(kind(kl=Pessimism(target=2.0, alpha_start=0.07, alpha_end=0.07)), rows)
    assert own is not None
    assert own.alpha == 0.07
    assert ascent_of(kind(), rows) is None


def test_what_it_cannot_start_from_is_refused() -> None:
    flat = Dataset.from_dict({"reward_margin": [0.0, 0.0], "ref_sample_logps": [[0.0]] * 2})
    target = Pessimism(target=1.0)
    with pytest.raises(ValueError, match=r"kl.target: no alpha .* margins that are all 0; give alpha_start and"):
        ascent_of(PessimisticDistilledDPO(kl=target), flat)
    with pytest.raises(ValueError, match=r'kl.target .* no ref_sample_logps; score them, or set samples to "pref'):
        ascent_of(PessimisticDPO(kl=target), flat.remove_columns("ref_sample_logps"))
    assert ascent_of(PessimisticDPO(kl=replace(target, samples="preferences")), flat.select_columns("reward_margin"))

    @dataclass(frozen=True, kw_only=True)
    class Own(Method):
        kl: Pessimism = target

        @property
        def pessimism(self) -> Pessimism:
            return self.kl

    assert ascent_of(Own(kl=replace(target, alpha_start=0.5, alpha_end=0.5)), flat) is not None
    with pytest.raises(ValueError, match=r"Own.kl: alpha_start and alpha_end must be one number > 0 with a target"):
        Own(kl=target)


# ---------------------------------------------------------------- with the trainer


@pytest.fixture(scope="module")
def ref_logps() -> Floats:
    """log pi_ref of every token, that of the network from which training starts."""
    scores = score_rows(CompletionModel(causal_lm(vocab_size=ARMS)), [[2]] * ARMS, [[y] for y in range(ARMS)], "tokens")
    return scores.numpy()


def tabular_rows(ref: Floats) -> Dataset:
    """The pairs of GRAPH, each with all tokens as samples, weighted by pi_ref: the KL is exact."""
    everything = {"sample_ids": [[y] for y in range(ARMS)], "ref_sample_logps": ref.tolist()}
    return Dataset.from_list(
        [
            {
                "id": f"{w}>{lo}",
                "prompt_ids": [2],
                "chosen_ids": [w],
                "rejected_ids": [lo],
                "ref_chosen_logps": ref[w],
                "ref_rejected_logps": ref[lo],
                "reward_margin": REWARDS[w] - REWARDS[lo],
                "sample_weights": np.exp(ref).tolist(),
                **everything,
            }
            for w, lo in GRAPH.edges.tolist()
        ]
    )


def trained(method: Method, ref: Floats, folder: Path, steps: int = 200) -> tuple[Floats, list[dict[str, float]]]:
    """(log pi of every token, log lines)."""
    model = CompletionModel(causal_lm(vocab_size=ARMS)).double()
    options = training(max_steps=steps, batch_size=len(GRAPH), learning_rate=5e-3, schedule="cosine", logging_steps=10)
    arguments = training_arguments(options, folder, seed=3, device="cpu")
    history = fit(PolicyTrainer, model, tabular_rows(ref), pair_collator(sample=True), arguments, method=method)
    scores = score_rows(model, [[2]] * ARMS, [[y] for y in range(ARMS)], "tokens")
    return scores.numpy(), [line for line in history if "alpha" in line]


def constrained(method: Method, ref: Floats, target: float) -> tuple[Floats, float]:
    """(log pi, multiplier) of min loss subject to KL(pi_ref || pi) <= target, by an interior-point solver."""
    u = cp.Variable(ARMS)
    margins = GRAPH.incidence @ u
    assert method.implicit_scale is not None
    scaled = method.implicit_scale * margins
    if isinstance(method, PessimisticDPO):
        fit_ = cp.sum(cp.logistic(-scaled)) / len(GRAPH)
    else:
        fit_ = cp.sum_squares(GRAPH.margins(REWARDS) - scaled) / len(GRAPH)
    within = -np.exp(ref) @ u <= target
    problem = cp.Problem(cp.Minimize(fit_), [within, cp.log_sum_exp(u + ref) <= 0])
    problem.solve(solver=cp.CLARABEL)
    return np.asarray(ref + u.value), float(within.dual_value)


def kl_of(ref: Floats, logps: Floats) -> float:
    return float(np.exp(ref) @ (ref - logps))


def apart(one: Floats, other: Floats) -> float:
    return float(np.abs(np.exp(one) - np.exp(other)).sum() / 2)


BINDING = [
    pytest.param(PessimisticDPO(beta=0.7, kl=Pessimism(target=0.3)), id="p-dpo"),
    pytest.param(PessimisticDistilledDPO(beta=0.5, kl=Pessimism(target=0.2, rate=0.1)), id="dp-dpo"),
    pytest.param(
        PessimisticDPO(beta=0.7, kl=Pessimism(target=0.3, alpha_start=0.02, alpha_end=0.02)),
        id="p-dpo from below",
        marks=pytest.mark.thorough,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("method", BINDING)
def test_training_ends_at_the_optimum_under_the_constraint_and_alpha_at_its_multiplier(
    method: Any, ref_logps: Floats, tmp_path: Path
) -> None:
    target = method.kl.target
    best, multiplier = constrained(method, ref_logps, target)
    assert kl_of(ref_logps, best) == pytest.approx(target, rel=1e-4), "it binds"
    assert apart(best, ref_logps) > 0.1
    logps, lines = trained(method, ref_logps, tmp_path)
    assert kl_of(ref_logps, logps) == pytest.approx(target, rel=2e-2)
    assert lines[-1]["alpha"] == pytest.approx(multiplier, rel=3e-2)
    assert apart(logps, best) < 1e-2
    assert {line["kl_target"] for line in lines} == {target}
    assert abs(math.log(lines[0]["alpha"] / multiplier)) > 0.2, "it did not start there"


@pytest.mark.thorough
@pytest.mark.slow
def test_a_constraint_that_does_not_bind_leaves_the_optimum_and_alpha_goes_to_zero(
    ref_logps: Floats, tmp_path: Path
) -> None:
    method = PessimisticDistilledDPO(beta=1.0, kl=Pessimism(target=5.0, rate=0.1))
    logits = ref_logps + REWARDS
    assert kl_of(ref_logps, logits - np.logaddexp.reduce(logits)) < 2.5, "a policy with a loss of 0 is within"
    logps, lines = trained(method, ref_logps, tmp_path)
    assert lines[-1]["alpha"] < 1e-4 * lines[0]["alpha"]
    assert kl_of(ref_logps, logps) < 2.5
    np.testing.assert_allclose(GRAPH.margins(logps - ref_logps), GRAPH.margins(REWARDS), atol=1e-2)


@pytest.mark.slow
def test_an_ascent_of_the_wrong_sign_is_noticed(
    ref_logps: Floats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = BINDING[0].values[0]
    step = DualAscent.step

    def descend(ascent: DualAscent, kl: float) -> None:
        step(ascent, 2 * ascent.target - kl)

    monkeypatch.setattr(DualAscent, "step", descend)
    logps, _ = trained(method, ref_logps, tmp_path)  # type: ignore[arg-type]
    assert abs(kl_of(ref_logps, logps) / 0.3 - 1) > 0.5


def run(
    method: Method, folder: Path, data: Dataset | None = None, **options: Any
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """(parameters, alphas) after six steps on ten pairs, four at a time."""
    torch.manual_seed(0)
    model = CompletionModel(causal_lm(), reward_head=False).double()
    chosen = training(**{"max_steps": 6, "batch_size": 4, "learning_rate": 1e-3, **options})
    arguments = training_arguments(chosen, folder, seed=3, device="cpu")
    collator = pair_collator(sample=method.needs_samples)
    history = fit(PolicyTrainer, model, pairs(10) if data is None else data, collator, arguments, method=method)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    return state, [line["alpha"] for line in history if "alpha" in line]


CUT = [
    pytest.param(PessimisticDPO(kl=Pessimism(target=150.0, rate=0.5)), id="p-dpo"),
    pytest.param(
        HullDPO(kl=Pessimism(target=150.0, rate=0.5, samples="preferences")),
        id="hull-dpo, preferences",
        marks=pytest.mark.thorough,
    ),
]


@pytest.mark.parametrize("method", CUT)
def test_alpha_does_not_depend_on_how_a_mini_batch_is_cut_nor_on_what_is_logged(method: Any, tmp_path: Path) -> None:
    """Its last mini-batch of an epoch is ragged."""
    whole, alphas = run(method, tmp_path / "whole")
    assert len(set(alphas)) == 6, "it moves"
    for how in ({"micro_batch_size": 3}, {"micro_batch_size": 1}, {"micro_batch_tokens": 40}):
        part, same = run(method, tmp_path / str(how), **how)
        assert same == pytest.approx(alphas, rel=1e-10)
        assert max(float((whole[n] - part[n]).abs().max()) for n in whole) <= 1e-10
    seldom, few = run(method, tmp_path / "seldom", logging_steps=3)
    assert all(torch.equal(whole[n], seldom[n]) for n in whole)
    assert few == [alphas[2], alphas[5]]


def test_what_is_held_is_the_estimate_that_enters_the_loss(tmp_path: Path) -> None:
    """Of the reference's samples or of the pairs': another quantity, so another alpha."""
    _, by_samples = run(PessimisticDPO(kl=Pessimism(target=150.0)), tmp_path / "samples")
    _, by_pairs = run(PessimisticDPO(kl=Pessimism(target=150.0, samples="preferences")), tmp_path / "pairs")
    assert by_samples[0] == by_pairs[0] == pytest.approx(budget.DPO / 150)
    assert by_samples[1] != by_pairs[1]
