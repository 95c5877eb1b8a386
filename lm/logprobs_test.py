"""Batched log-probs and rewards equal the plain forward, one unpadded sequence at a time, in value and gradient."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lm.logprobs import CompletionModel, collate
from lm.testing import ARCHITECTURES, END, VOCABULARY, WINDOW, causal_lm, close, completion, reward_model

Rows = list[tuple[list[int], list[int]]]


def rows(count: int = 7, seed: int = 0) -> Rows:
    """Prompts and completions of very unequal length, one of each a single token."""
    rng = random.Random(seed)
    drawn = [(completion(rng, 1, 12)[:-1], completion(rng)) for _ in range(count)]
    return [*drawn, ([7], completion(rng)), (completion(rng, 9, 9)[:-1], [END])]


def batched(model: CompletionModel, data: Rows, pad_id: int = 0, *, rewards: bool = False) -> Tensor:
    """[R], by the code under test."""
    output = model(**collate([p for p, _ in data], [c for _, c in data], pad_id))
    values = output.rewards if rewards else output.logps
    assert isinstance(values, Tensor)
    return values


def plain_logps(model: PreTrainedModel, data: Rows, shift: int = 1) -> Tensor:
    """[R], the definition: one sequence, full logits, log-softmax, gather. `shift` 1 is right, others are controls."""
    values = []
    for prompt, tokens in data:
        ids = torch.tensor([[*prompt, *tokens]])
        logprobs = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        values.append(sum(logprobs[len(prompt) + i - shift, token] for i, token in enumerate(tokens)))
    return torch.stack(values)


def plain_rewards(model: PreTrainedModel, data: Rows) -> Tensor:
    """[R], the head's value at the last token of one unpadded sequence."""
    states = [
        model.base_model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).last_hidden_state[0, -1]
        for prompt, tokens in data
    ]
    rewards: Tensor = model.score(torch.stack(states))[:, 0]
    return rewards


def gradients(model: nn.Module, values: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Gradients of a sum that weighs every row differently; every parameter has one."""
    model.zero_grad()
    result = values()
    torch.autograd.backward((result * torch.linspace(0.5, 2, len(result), dtype=result.dtype)).sum())
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        close(gradient, other[name], what=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logps_and_every_parameters_gradient_equal_the_plain_forward(architecture: str) -> None:
    model, data = causal_lm(architecture), rows()
    assert max(len(p) + len(c) for p, c in data) > WINDOW
    wrapped = CompletionModel(model)
    close(batched(wrapped, data), plain_logps(model, data))
    ours = gradients(model, lambda: batched(wrapped, data))
    assert set(ours) == {name for name, _ in model.named_parameters()}
    assert_same_gradients(ours, gradients(model, lambda: plain_logps(model, data)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shifted_mask_is_noticed(architecture: str) -> None:
    model, data = causal_lm(architecture), [row for row in rows() if len(row[0]) > 1]
    ours = batched(CompletionModel(model), data)
    for shift in (0, 2):
        assert ((ours - plain_logps(model, data, shift)).abs() > 1e-3).all()


def test_the_sliding_window_is_honoured() -> None:
    """The same weights without a window give other numbers, so the parity above says something about windows."""
    data = [row for row in rows() if len(row[0]) + len(row[1]) > WINDOW + 2]
    windowed, full = causal_lm("mistral-sliding"), causal_lm("mistral-sliding", sliding_window=None)
    assert all(torch.equal(a, b) for a, b in zip(windowed.parameters(), full.parameters(), strict=True))
    difference = batched(CompletionModel(windowed), data) - batched(CompletionModel(full), data)
    assert (difference.abs() > 1e-3).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_and_batch_order_change_nothing(architecture: str) -> None:
    model, data = CompletionModel(causal_lm(architecture)), rows()
    values = batched(model, data)
    torch.testing.assert_close(batched(model, data, pad_id=END), values, rtol=0, atol=0)
    close(batched(model, data[::-1]).flip(0), values)
    close(torch.cat([batched(model, [row]) for row in data]), values)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pad_id", [0, END], ids=["pad", "pad is end-of-text"])
def test_rewards_are_read_at_the_completions_last_token(architecture: str, pad_id: int) -> None:
    model, data = reward_model(architecture, pad_token_id=pad_id), rows()
    wrapped = CompletionModel(model)
    close(batched(wrapped, data, pad_id, rewards=True), plain_rewards(model, data))
    ours = gradients(model, lambda: batched(wrapped, data, pad_id, rewards=True))
    assert_same_gradients(ours, gradients(model, lambda: plain_rewards(model, data)))
    # Control: one token earlier is another number.
    earlier = [(prompt, tokens[:-1]) for prompt, tokens in data if len(tokens) > 1]
    later = [(prompt, tokens) for prompt, tokens in data if len(tokens) > 1]
    assert not torch.isclose(plain_rewards(model, earlier), batched(wrapped, later, pad_id, rewards=True)).any()


def test_a_policys_reward_head_reads_the_last_hidden_state_at_end_of_text() -> None:
    model, data = causal_lm(), rows()
    wrapped = CompletionModel(model, reward_head=True)
    assert wrapped.reward_head is not None
    states = [model.base_model(torch.tensor([[*p, *c]]), use_cache=False).last_hidden_state[0, -1] for p, c in data]
    expected = wrapped.reward_head(torch.stack(states))[:, 0]
    close(batched(wrapped, data, rewards=True), expected)
    close(batched(wrapped, data), plain_logps(model, data))
    assert "reward_head.weight" in gradients(wrapped, lambda: batched(wrapped, data, rewards=True))


def test_lengths_count_completion_tokens_with_end_of_text() -> None:
    data = rows()
    output = CompletionModel(causal_lm())(**collate([p for p, _ in data], [c for _, c in data], 0))
    assert output.lengths.tolist() == [len(c) for _, c in data]
    assert output.rewards is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_weights_sum_in_float32(dtype: torch.dtype) -> None:
    values = batched(CompletionModel(causal_lm().to(dtype)), rows())
    assert values.dtype == torch.float32
    torch.testing.assert_close(
        values.double(),
        batched(CompletionModel(causal_lm()), rows()),
        rtol=0.05 if dtype.itemsize == 2 else 1e-4,
        atol=0,
    )


def test_every_completion_of_two_tokens_has_its_share_of_probability() -> None:
    """Referee without a second forward: the probabilities of all first tokens sum to one, and so do those of all
    second tokens after a first one."""
    model = CompletionModel(causal_lm())
    for prefix in ([], [9]):
        values = batched(model, [([3, 4], [*prefix, token]) for token in range(VOCABULARY)])
        total = values.exp().sum()
        expected = batched(model, [([3, 4], prefix)]).exp().sum() if prefix else torch.ones((), dtype=torch.float64)
        close(total, expected)


@pytest.mark.parametrize(("prompt", "tokens", "side"), [([], [1], "prompt"), ([2], [], "completion")])
def test_an_empty_side_is_refused(prompt: list[int], tokens: list[int], side: str) -> None:
    with pytest.raises(ValueError, match=f"row 1 has an empty {side}; prompt and completion need at least one token"):
        collate([[2], prompt], [[1], tokens], 0)


def test_models_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(ValueError, match="a reward model has one label, but LlamaForSequenceClassification has 2"):
        CompletionModel(reward_model(num_labels=2))
    with pytest.raises(ValueError, match="LlamaModel has neither a language-model head nor a `score` head"):
        CompletionModel(causal_lm().base_model)
