from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from theory.first_to_fall import Completion, Moves, head_gram, head_inner_product, moves, moves_from_features
from theory.preferences import Floats
from theory.strategies import log_policies, matrices, vectors


@st.composite
def completions(draw: st.DrawFn, vocabulary: int = 4, width: int = 3) -> Completion:
    """One to three tokens with states and distributions of their own."""
    length = draw(st.integers(1, 3))
    probs = np.exp([draw(log_policies(vocabulary, 2.0)) for _ in range(length)])
    tokens = draw(st.lists(st.integers(0, vocabulary - 1), min_size=length, max_size=length))
    return Completion(draw(matrices(length, width)), probs, np.array(tokens))


def head_gradient(completion: Completion) -> Floats:
    """[V, H], token by token: sum_t (e_{y_t} - p_t) h_t'."""
    total = np.zeros((completion.probs.shape[1], completion.states.shape[1]))
    for state, probs, token in zip(*completion, strict=True):
        total += np.outer(np.eye(len(probs))[token] - probs, state)
    return total


@given(completions(), completions())
def test_inner_products_are_those_of_the_gradients(a: Completion, b: Completion) -> None:
    gradients = head_gradient(a), head_gradient(b)
    for (one, two), (g, h) in zip(
        itertools.product((a, b), repeat=2), itertools.product(gradients, repeat=2), strict=True
    ):
        np.testing.assert_allclose(head_inner_product(one, two), (g * h).sum(), atol=1e-10)
    first = moves(*head_gram(a, b))
    np.testing.assert_allclose(first.winner, (gradients[0] * (gradients[0] - gradients[1])).sum(), atol=1e-10)
    np.testing.assert_allclose(first.loser, (gradients[1] * (gradients[0] - gradients[1])).sum(), atol=1e-10)
    assert first.winner >= first.loser - 1e-9


@given(completions(), completions())
def test_tensors_go_the_same_way(a: Completion, b: Completion) -> None:
    import torch

    tensors = [Completion(*(torch.tensor(part) for part in completion)) for completion in (a, b)]
    found = head_inner_product(*tensors)
    assert isinstance(found, torch.Tensor)
    np.testing.assert_allclose(found.item(), head_inner_product(a, b), atol=1e-12)
    assert moves(*head_gram(*tensors)).winner_falls.dtype == torch.bool


def test_against_automatic_differentiation_of_a_head() -> None:
    """The log-prob of a completion whose states depend on its own prefix, differentiated in the head's weights."""
    import torch

    generator = torch.Generator().manual_seed(0)
    head = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    embedding = torch.randn(5, 3, generator=generator, dtype=torch.float64)

    def parts(tokens: list[int]) -> tuple[Any, Completion]:
        states = torch.stack([embedding[tokens[:t]].sum(0) + 0.1 * t + 1 for t in range(len(tokens))])
        logps = torch.log_softmax(states @ head.T, -1)
        return logps[range(len(tokens)), tokens].sum(), Completion(states, logps.exp().detach(), torch.tensor(tokens))

    chosen, rejected = parts([3, 1, 4]), parts([3, 1])
    gradients = [torch.autograd.grad(logp, head)[0] for logp, _ in (chosen, rejected)]
    expected = [(g * h).sum().item() for g, h in itertools.combinations_with_replacement(gradients, 2)]
    np.testing.assert_allclose([value.item() for value in head_gram(chosen[1], rejected[1])], expected, rtol=1e-12)


@given(vectors(3), log_policies(4), matrices(4, 3))
def test_features_and_inner_products_agree(shift: Floats, logps: Floats, features: Floats) -> None:
    expected = np.exp(logps) @ features
    chosen, rejected = features[[0, 2]], features[[1, 3]]
    both = np.broadcast_to(expected, (2, 3))
    first = moves_from_features(chosen, rejected, both)
    g, h = chosen - expected, rejected - expected
    inner = moves((g * g).sum(-1), (g * h).sum(-1), (h * h).sum(-1))
    shifted = moves_from_features(chosen + shift, rejected + shift, both + shift)
    for other in (inner, shifted):
        np.testing.assert_allclose(other.winner, first.winner, atol=1e-11)
        np.testing.assert_allclose(other.loser, first.loser, atol=1e-11)
    assert first.winner.shape == (2,)


def test_a_single_token_never_falls() -> None:
    """One position, only the head trained: <g_w, g_w - g_l> = |h|^2 (1 - p_w + p_l) > 0."""
    state, probs = np.array([[1.0, 2.0]]), np.array([[0.9, 0.05, 0.05]])
    pair = [Completion(state, probs, np.array([token])) for token in (0, 1)]
    first = moves(*head_gram(*pair))
    assert first.winner == pytest.approx(5 * (1 - 0.9 + 0.05))
    assert first.loser == pytest.approx(5 * (0.05 - 0.9 - 1))
    assert (bool(first.winner_falls), bool(first.loser_rises)) == (False, False)


def test_signs() -> None:
    first = Moves(winner=np.array([-1.0, 0.0, 2.0]), loser=np.array([-2.0, 0.0, 1.0]))
    assert first.winner_falls.tolist() == [True, False, False]
    assert first.loser_rises.tolist() == [False, False, True]
    # 0 > 1 in features on a line, with all other mass beyond the winner: the winner falls; beyond the loser, it rises.
    line = moves_from_features(np.array([[1.0], [1.0]]), np.array([[0.0], [0.0]]), np.array([[1.5], [-0.5]]))
    assert line.winner_falls.tolist() == [True, False]
    assert line.loser_rises.tolist() == [False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokens": np.array([0])},
            r"b must have states \[T, H\], probs \[T, V\] and tokens \[T\], got shapes \(2, 3\), \(2, 4\), \(1,\)",
        ),
        ({"states": np.ones(3)}, r"got shapes \(3,\), \(2, 4\), \(2,\)"),
        ({"states": np.ones((2, 5))}, r"a and b must share H and V, got states \(2, 3\) and \(2, 5\)"),
        ({"probs": np.ones((2, 5))}, r"probs \(2, 4\) and \(2, 5\)"),
    ],
)
def test_bad_completions(changes: dict[str, np.ndarray], message: str) -> None:
    good = Completion(np.ones((2, 3)), np.full((2, 4), 0.25), np.array([0, 1]))
    with pytest.raises(ValueError, match=message):
        head_inner_product(good, good._replace(**changes))


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match=r"chosen has shape \(2, 3\), rejected has shape \(2, 3\), expected has shape"):
        moves_from_features(np.ones((2, 3)), np.ones((2, 3)), np.ones(3))
    with pytest.raises(ValueError, match="chosen needs a feature axis, got a scalar"):
        moves_from_features(np.float64(1), np.float64(1), np.float64(1))
    with pytest.raises(ValueError, match="loser_loser has shape"):
        moves(np.ones(2), np.ones(2), np.ones(3))
