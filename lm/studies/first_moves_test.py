"""First moves of the head against training it: one small step, by autograd, on every pair alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lm.studies import first_moves
from lm.studies.first_moves import head_moves, seen_by_head
from tests import tiny
from theory import losses
from theory.first_to_fall import Completion, head_gram, moves

BETA, STEP = 0.7, 1e-6
ROUNDING = 1e-12
"""Nats: a predicted change below this is not told from rounding in float64."""


def rows(count: int = 24) -> list[Any]:
    """(prompt, chosen, rejected); sides are much alike in two thirds, or nothing would fall."""
    made = []
    for i, row in enumerate(tiny.pairs(count, seed=5)):
        prompt, chosen, rejected = (row[f"{name}_ids"] for name in ("prompt", "chosen", "rejected"))
        if i % 3 == 1:  # the loser says it again and again
            rejected = [*(chosen[:-1] * 3), tiny.END]
        elif i % 3 == 2:  # the winner does
            chosen, rejected = [*(chosen[:-1] * 3), tiny.END], chosen
        made.append((prompt, chosen, rejected))
    return made


def logp(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> Tensor:
    """The plain forward of the whole row."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
    own = logits[len(prompt) - 1 : -1].log_softmax(-1)
    total: Tensor = own[torch.arange(len(completion)), torch.tensor(completion)].sum()
    return total


def trained_moves(model: PreTrainedModel, pairs: list[Any]) -> np.ndarray[Any, Any]:
    """By how much log pi(y_w) and log pi(y_l) move, [N, 2], in a step of the head alone; other weights stay."""
    model = copy.deepcopy(model).requires_grad_(False)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())  # no longer tied
    weights = list(head.requires_grad_(True).parameters())
    moved = []
    for prompt, *both in pairs:
        before = torch.stack([logp(model, prompt, completion) for completion in both])
        margin = before[0] - before[1] - (before[0] - before[1]).detach()
        gradients = torch.autograd.grad(losses.dpo(margin, beta=BETA), weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= STEP * gradient
            after = torch.stack([logp(model, prompt, completion) for completion in both])
            for weight, gradient in zip(weights, gradients, strict=True):
                weight += STEP * gradient
        moved.append((after - before.detach()).tolist())
    return np.array(moved)


# phi's head has a bias, gpt2's is tied, cohere2 and granite scale the logits after it.
@pytest.mark.parametrize("architecture", ["llama", "phi", "gpt2", "cohere2", "granite"])
def test_a_small_step_of_the_head_moves_both_sides_as_predicted(architecture: str) -> None:
    model, pairs = tiny.causal_lm(architecture), rows()
    predicted = head_moves(model, pairs)
    scale = {"cohere2": 0.5**2, "granite": 1 / 4.0**2}.get(architecture, 1.0)  # of the logits, in both gradients
    both = np.stack([predicted.winner, predicted.loser], axis=1) * scale * BETA / 2 * STEP
    moved = trained_moves(model, pairs)
    told = abs(both) > ROUNDING
    assert told.all()
    np.testing.assert_array_equal(np.sign(moved), np.sign(both))
    np.testing.assert_allclose(moved, both, rtol=1e-2, atol=ROUNDING)
    for move in (predicted.winner_falls, predicted.loser_rises):
        assert 0 < move.sum() < len(pairs), "it happens, and not always"
    np.testing.assert_array_equal(predicted.winner_falls, moved[:, 0] < 0)
    np.testing.assert_array_equal(predicted.loser_rises, moved[:, 1] > 0)


def test_other_inner_products_get_the_signs_wrong() -> None:
    """Controls: sides exchanged, sides added, and means over tokens where sums are due."""
    model, pairs = tiny.causal_lm(), rows()
    right = np.sign(trained_moves(model, pairs)[:, 0])
    exchanged = head_moves(model, [(prompt, rejected, chosen) for prompt, chosen, rejected in pairs])
    assert (np.sign(exchanged.loser) == -right).all()
    with torch.inference_mode():
        seen = [[seen_by_head(model, prompt, side) for side in both] for prompt, *both in pairs]
        means = [[Completion(one.states / len(one.states), *one[1:]) for one in both] for both in seen]
        sums, averages = (np.array([head_gram(*both) for both in one], dtype=float).T for one in (seen, means))
    assert (np.sign(moves(*sums).winner) == right).all()
    assert (np.sign(sums[0] + sums[1]) != right).any()
    assert (np.sign(moves(*averages).winner) != right).any()


@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
def test_what_the_head_sees_is_of_the_tokens_of_the_completion(architecture: str) -> None:
    model = tiny.causal_lm(architecture)
    for prompt, chosen, _ in rows(3):
        with torch.inference_mode():
            seen = seen_by_head(model, prompt, chosen)
            expected = logp(model, prompt, chosen)
        assert len(seen.states) == len(seen.tokens) == len(chosen)
        own = seen.probs[torch.arange(len(chosen)), seen.tokens].log().sum()
        tiny.close(own, expected.double(), tolerance=1e-5, what=architecture)


def test_a_model_from_scratch_or_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a trained model is needed"):
        first_moves.check("scratch:tiny")
    with pytest.raises(ValueError, match=r"no config\.json"):
        first_moves.check(str(tmp_path))
