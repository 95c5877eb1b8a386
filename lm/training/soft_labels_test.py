"""A soft label is the weights of both directions: in every loss, in training, and in the optimum that is reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor

import bandits.objectives
from bandits.solve import Optimum, solve
from lm.config import LogprobsConfig
from lm.logprobs.completions import CompletionModel
from lm.objectives import CDPO, DPO, IPO, METHODS, JointOracle, Method, PairBatch, in_both_directions
from lm.objectives_test import batch
from lm.training.batches import agreement, pair_collator
from lm.training.loop import fit, training_arguments
from lm.training.policy import PolicyTrainer
from lm.training.trainer import CompletionTrainer, JointOracleTrainer, RewardTrainer
from tests.tiny import causal_lm, close, pairs, reward_model, training
from theory import losses
from theory.preferences import PreferenceGraph

PROBABILITIES = torch.tensor([1.0, 0.9, 0.5, 0.25, 0.0], dtype=torch.float64)


def other_way_round(pairs: PairBatch) -> PairBatch:
    """By hand: rejected is chosen."""
    values: dict[str, Any] = {one.name: getattr(pairs, one.name) for one in fields(pairs)}
    for one in [name for name in values if "chosen_l" in name]:
        other = one.replace("chosen", "rejected")
        values[one], values[other] = values[other], values[one]
    for name in ("reward_margin", "member_margins", "estimated_reward_margin"):
        values[name] = -values[name]
    return PairBatch(**values)


# ---------------------------------------------------------------- every loss

NO_LABELS = {"d-dpo", "dp-dpo", "e-dpo", "hull-dpo", "soft-label", "member-dpo"}
"""They distil rewards, whatever the labels are."""


@pytest.mark.parametrize("name", METHODS)
def test_a_soft_label_is_the_mean_over_both_directions(name: str) -> None:
    method, pairs = METHODS[name](), batch()
    forward, backward = method(pairs), method(other_way_round(pairs))
    soft = replace(pairs, chosen_probability=PROBABILITIES)
    close(method.expected(soft), PROBABILITIES * forward + (1 - PROBABILITIES) * backward)
    close(method.expected(replace(pairs, chosen_probability=torch.ones(5, dtype=torch.float64))), forward)
    assert torch.equal(method.expected(pairs), forward), "plain pairs, to the last bit"


@pytest.mark.parametrize("name", METHODS)
def test_whether_a_method_reads_labels_is_what_it_says(name: str) -> None:
    method, pairs = METHODS[name](), batch()
    assert METHODS[name].reads_labels == (name not in NO_LABELS)
    forward, backward = method(pairs), method(other_way_round(pairs))
    if name in NO_LABELS:
        close(backward, forward)
        assert torch.equal(method.expected(replace(pairs, chosen_probability=PROBABILITIES)), forward)
    else:
        assert not torch.isclose(backward, forward).any()


@pytest.mark.parametrize("name", METHODS)
def test_turned_pairs_are_the_other_way_round_and_twice_turned_the_same(name: str) -> None:
    method, pairs = METHODS[name](), replace(batch(), chosen_probability=PROBABILITIES)
    close(method(pairs.turned), method(other_way_round(batch())))
    close(method.expected(pairs.turned), method.expected(pairs))
    close(method(pairs.turned.turned), method(pairs))


@pytest.mark.parametrize("flipped", [0.0, 0.125, 0.25, 0.4])
def test_the_same_label_everywhere_is_conservative_dpo(flipped: float) -> None:
    pairs = batch()
    soft = replace(pairs, chosen_probability=torch.full((5,), 1 - flipped, dtype=torch.float64))
    expected = CDPO(beta=0.3, label_smoothing=flipped)(pairs)
    torch.testing.assert_close(DPO(beta=0.3).expected(soft), expected, rtol=1e-15, atol=1e-15)
    assert not torch.allclose(DPO(beta=0.3).expected(soft), CDPO(beta=0.3, label_smoothing=flipped + 0.05)(pairs))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_joint_oracles_language_model_learns_from_both_sides(alpha: float) -> None:
    margin, chosen, rejected = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    oracle = JointOracle(alpha=alpha)
    found = in_both_directions(PROBABILITIES, oracle(margin, chosen), lambda: oracle(-margin, rejected))
    entropy = -PROBABILITIES * torch.log_softmax(torch.stack([margin, 0 * margin]), 0)[0]
    entropy = entropy - (1 - PROBABILITIES) * torch.log_softmax(torch.stack([margin, 0 * margin]), 0)[1]
    likelihood = PROBABILITIES * chosen + (1 - PROBABILITIES) * rejected
    close(found, (1 - alpha) * entropy - alpha * likelihood)


# ---------------------------------------------------------------- the optimum that is reached


def minimiser(loss: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """By L-BFGS in float64; the gradient there is next to nothing."""
    x = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [x], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def step() -> Tensor:
        solver.zero_grad()
        value = loss(x)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    for _ in range(5):
        solver.step(step)  # type: ignore[no-untyped-call]
    (gradient,) = torch.autograd.grad(loss(x), x)
    assert gradient.abs().max() < 1e-8
    return x.detach()


EDGES = [(0, 1), (1, 2), (2, 3), (0, 2)]
LABELS, WEIGHTS = [0.9, 0.6, 0.5, 0.7], [1.0, 3.0, 0.5, 2.0]


def tabular(logits: Tensor, reference: Tensor, edges: list[tuple[int, int]], probability: list[float]) -> PairBatch:
    logps = logits.log_softmax(0)
    winners, losers = (list(side) for side in zip(*edges, strict=True))
    ones = torch.ones(len(edges), dtype=torch.float64)
    return PairBatch(
        policy_chosen_logps=logps[winners],
        policy_rejected_logps=logps[losers],
        ref_chosen_logps=reference[winners],
        ref_rejected_logps=reference[losers],
        chosen_lengths=ones,
        rejected_lengths=ones,
        chosen_probability=torch.tensor(probability, dtype=torch.float64),
    )


def margins(method: Method, labels: list[float], weights: list[float]) -> Tensor:
    """Delta of EDGES at the optimum, by the method's loss."""
    reference = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    weigh = torch.tensor(weights, dtype=torch.float64)
    found = minimiser(lambda x: (weigh * method.expected(tabular(x, reference, EDGES, labels))).sum() / weigh.sum(), 4)
    return tabular(found, reference, EDGES, labels).logratio_margin


@pytest.mark.parametrize(
    ("method", "theirs"),
    [(DPO(beta=0.5), bandits.objectives.DPO(beta=0.5)), (IPO(tau=0.7), bandits.objectives.IPO(tau=0.7))],
    ids=["dpo", "ipo"],
)
def test_the_optimum_is_that_of_the_preferences_weighted_both_ways(method: Method, theirs: Any) -> None:
    both = [*EDGES, *((loser, winner) for winner, loser in EDGES)]
    weights = [w * p for w, p in zip(WEIGHTS, LABELS, strict=True)]
    weights += [w * (1 - p) for w, p in zip(WEIGHTS, LABELS, strict=True)]
    graph = PreferenceGraph(4, both, weights)
    assert not graph.crossing.any(), "finite"
    optimum = solve(theirs, graph, np.array([0.1, 0.2, 0.3, 0.4]))
    assert isinstance(optimum, Optimum)
    expected = torch.from_numpy(graph.margins(optimum.logratios)[: len(EDGES)])
    found = margins(method, LABELS, WEIGHTS)
    close(found, expected, tolerance=1e-6)
    swapped = margins(method, [1 - p for p in LABELS], WEIGHTS)
    close(swapped, -found, tolerance=1e-6)
    assert not torch.allclose(margins(method, LABELS, [1.0] * 4), found, atol=1e-2), "weights are noticed"


@pytest.mark.parametrize("label", [0.5, 0.6, 0.95])
def test_a_pair_of_its_own_ends_at_the_log_odds_of_its_label(label: float) -> None:
    def alone(method: Method) -> float:
        reference = torch.tensor([0.3, 0.7], dtype=torch.float64).log()
        found = minimiser(lambda x: method.expected(tabular(x, reference, [(0, 1)], [label])).sum(), 2)
        return float(tabular(found, reference, [(0, 1)], [label]).logratio_margin)

    odds = log(label / (1 - label))
    assert alone(DPO(beta=0.4)) == pytest.approx(odds / 0.4, abs=1e-6)
    assert alone(IPO(tau=0.4)) == pytest.approx((2 * label - 1) / (2 * 0.4), abs=1e-6)
    probability = torch.tensor([label], dtype=torch.float64)

    def bradley_terry(x: Tensor) -> Tensor:
        margin = x[:1] - x[1:]
        return in_both_directions(
            probability, losses.bradley_terry(margin), lambda: losses.bradley_terry(-margin)
        ).sum()

    found = minimiser(bradley_terry, 2)
    assert float(found[0] - found[1]) == pytest.approx(odds, abs=1e-6)


# ---------------------------------------------------------------- training: votes are rows of several annotators

VOTES = [(3, 1), (1, 1), (2, 0), (1, 2)]


def counted() -> Dataset:
    """Four pairs with probabilities and weights."""
    data = pairs(4)
    data = data.add_column("chosen_probability", [a / (a + b) for a, b in VOTES])
    return data.add_column("weight", [float(a + b) for a, b in VOTES])


def one_by_one() -> Dataset:
    """The same, a row a vote."""
    rows = []
    for row, (ahead, against) in zip(pairs(4), VOTES, strict=True):
        turned = dict(row)
        for one in ("chosen_ids", "ref_chosen_logps"):
            other = one.replace("chosen", "rejected")
            turned[one], turned[other] = row[other], row[one]
        turned["reward_margin"] = -row["reward_margin"]
        turned["member_margins"] = [-margin for margin in row["member_margins"]]
        votes = [*[row] * ahead, *[turned] * against]
        rows += [{**vote, "id": f"{row['id']}-{i}"} for i, vote in enumerate(votes)]
    return Dataset.from_list(rows)


def trained(name: str, data: Dataset, folder: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Parameters after one step on all rows, and what it logged."""
    torch.manual_seed(0)
    options, collator = LogprobsConfig(allocator=False), pair_collator()
    trainer: type[CompletionTrainer] = PolicyTrainer
    extra: dict[str, Any] = {}
    if name == "reward":
        model, trainer = CompletionModel(reward_model(), options=options), RewardTrainer
    elif name == "joint oracle":
        model = CompletionModel(causal_lm(), reward_head=True, options=options).double()
        trainer, extra = JointOracleTrainer, {"oracle": JointOracle(alpha=0.3)}
    else:
        method = METHODS[name]()
        model = CompletionModel(causal_lm(), reward_head=method.needs_reward_head, options=options).double()
        collator, extra = pair_collator(sample=method.needs_samples), {"method": method}
    arguments = training_arguments(training(batch_size=len(data)), folder, seed=3, device="cpu")
    history = fit(trainer, model, data, collator, arguments, **extra)
    return {name: p.detach() for name, p in model.named_parameters()}, [row for row in history if "loss" in row][-1]


OFTEN = ["dpo", "hull-dpo", "reward", "joint oracle"]
RARELY = ["ipo", "dpo-nll", "dpop", "p-dpo", "simpo", "e-dpo", "drdo"]


@pytest.mark.parametrize("name", [*OFTEN, *(pytest.param(name, marks=pytest.mark.thorough) for name in RARELY)])
def test_votes_train_as_rows_of_so_many_annotators_do(name: str, tmp_path: Path) -> None:
    found, logged = trained(name, counted(), tmp_path / "counted")
    expected, logged_one_by_one = trained(name, one_by_one(), tmp_path / "rows")
    for parameter, value in expected.items():
        close(found[parameter], value, tolerance=1e-9, what=parameter)
    for what in ("loss", "accuracy"):
        assert logged[what] == pytest.approx(logged_one_by_one[what], rel=1e-5)
    if name not in ("e-dpo", "hull-dpo"):  # labels or no, a step that passes the weights over is another one
        once, _ = trained(name, counted().remove_columns("weight"), tmp_path / "once")
        assert max(float((once[p] - value).abs().max()) for p, value in expected.items()) > 1e-6


def test_an_ensembles_choice_counts_pairs_as_they_weigh() -> None:
    """Member 0 fits the first pair, member 1 the other two: the heavier side decides."""
    pairs = replace(batch(), member_margins=torch.zeros(2, 5, dtype=torch.float64))
    margin = pairs.logratio_margin
    members = torch.stack([margin + torch.tensor([0, 1, 1, 0, 0]), margin + torch.tensor([1.2, 0, 0, 0, 0])])
    pairs, method = replace(pairs, member_margins=members), METHODS["e-dpo"]()
    assert method.weights(method.gram(pairs)).tolist() == [0, 1]
    heavy = torch.tensor([10.0, 1, 1, 1, 1], dtype=torch.float64)
    assert method.weights(method.gram(pairs, heavy)).tolist() == [1, 0]
    residuals = members - margin
    close(method.gram(pairs, heavy), (heavy * residuals) @ residuals.T / heavy.sum())
    close(method.gram(pairs, torch.full((5,), 0.3, dtype=torch.float64)), method.gram(pairs))


def test_a_tie_is_half_right_and_a_soft_label_as_likely_as_it_says() -> None:
    chosen, rejected = torch.tensor([1.0, 1, 0, 0, 1]), torch.tensor([0.0, 0, 1, 1, 1])
    label = torch.tensor([0.5, 0.8, 0.8, 1, 0.8], dtype=torch.float64)
    close(agreement(chosen, rejected, label), torch.tensor([0.5, 0.8, 0.2, 0, 0], dtype=torch.float64))
    assert agreement(chosen, rejected, None).tolist() == [1, 1, 0, 0, 0]
