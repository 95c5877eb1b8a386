"""The loop draws what plain forwards of each row alone would, whoever shares the batch; draws are the softmax's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lm.logprobs import draws, generation
from lm.logprobs.completions import CompletionModel
from lm.logprobs.decoding import Choose, chunks_of, decode, most_together
from lm.logprobs.draws import Draws, drawn
from lm.logprobs.generation import Generation, cache_size, generation_of, groups_fitting
from lm.logprobs.generation_test import greedy
from lm.logprobs.past import Indices, Past
from lm.logprobs.scoring_test import config, draw, prompts_of
from tests.tiny import END, PACKED, VOCABULARY, causal_lm, wrap

PROMPTS = [[3, 4], [5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16], [3, 4], [3, 4], [22], [3, 4], [12, 13, 14]]


def best(_: Indices, __: Indices, logits_BV: Tensor) -> Indices:
    tokens: Indices = logits_BV.argmax(-1).numpy()
    return tokens


def decoded(
    model: CompletionModel, prompts: list[list[int]], *, groups: int = 2, each: int = 2, choose: Choose = best
) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    tell = found.__setitem__
    decode(model.eval(), prompts, choose, tell, end=END, most=6, groups=groups, each=each, spare=False)
    return [found[row] for row in range(len(prompts))]


@pytest.mark.parametrize("architecture", ["llama", "qwen2-sliding", "gemma2", "gpt2", "gpt-oss"])
def test_greedy_decoding_is_the_plain_forwards(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With windows, capped scores, sinks, learned positions; places are few, so that rows leave and others enter.
    Control: where attention knows nothing of who is masked, some rows are others."""
    model = causal_lm(architecture)
    expected = [greedy(model, prompt, 6) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) > 3
    for groups, each in ((2, 2), (1, 1), (9, 3)):
        assert decoded(wrap(model), PROMPTS, groups=groups, each=each) == expected
    mask = Past._mask

    def blind(past: Past, window: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        of_prompts, own = mask(past, window, dtype)
        return torch.zeros_like(of_prompts), own

    monkeypatch.setattr(Past, "_mask", blind)
    assert decoded(wrap(model), PROMPTS) != expected


def test_a_prompt_is_computed_once_and_a_row_that_ended_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(causal_lm())
    asked: list[tuple[bool, int]] = []
    logits = CompletionModel._logits

    def counted(self: CompletionModel, inputs: dict[str, Any], keep: Tensor) -> Any:
        asked.append((isinstance(inputs["packed"], Past), inputs["input_ids"].numel()))
        return logits(self, inputs, keep)

    monkeypatch.setattr(CompletionModel, "_logits", counted)
    many = PROMPTS * 20
    samples = decoded(model, many, groups=3, each=4, choose=Draws(0, many, 4.0))
    assert any(len(sample) < 6 for sample in samples)
    assert sum(count for later, count in asked if not later) == sum(map(len, {tuple(p): p for p in PROMPTS}.values()))
    assert sum(count for later, count in asked if later) == sum(len(sample) - 1 for sample in samples)


def test_rows_of_a_prompt_are_together_and_the_longest_first() -> None:
    assert chunks_of(PROMPTS, 3) == [(1, [1]), (2, [2, 8]), (0, [0, 4, 5]), (0, [7]), (3, [3]), (6, [6])]
    assert most_together(PROMPTS) == 4
    assert most_together([[1], [2], [2], [3], [4]]) == 1
    assert most_together([[1]] * 100) == 16


def as_drawn(prompts: list[list[int]], samples: list[list[int]]) -> dict[tuple[int, ...], list[list[int]]]:
    found: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt, sample in zip(prompts, samples, strict=True):
        found.setdefault(tuple(prompt), []).append(sample)
    return found


def test_no_batch_order_or_company_changes_a_rows_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64. Control: drawn from one sequence for all rows they change with the batches."""
    model, prompts = wrap(causal_lm()), [*PROMPTS, *prompts_of(12)]
    expected = draw(model, prompts, config(batch_size=64))
    assert len(set(map(tuple, expected))) > len(prompts) // 2
    for size in (1, 3, 10):
        assert draw(model, prompts, config(batch_size=size)) == expected
    backwards = prompts[::-1]
    assert as_drawn(backwards, draw(model, backwards, config())) == as_drawn(prompts, expected)
    for prompt, own in as_drawn(prompts, expected).items():
        assert draw(model, [list(prompt)] * len(own), config()) == own
    sequence = np.random.default_rng(0)
    monkeypatch.setattr(Draws, "uniform", lambda self, rows_B, steps_B: sequence.random(len(rows_B)))
    first = draw(model, prompts, config(batch_size=64))
    sequence = np.random.default_rng(0)
    assert draw(model, prompts, config(batch_size=3)) != first


@pytest.mark.parametrize("architecture", [*PACKED, "mamba", "bloom", "falcon"])
def test_what_takes_packed_rows_is_drawn_by_the_loop_and_nothing_else(architecture: str) -> None:
    found = generation_of(wrap(causal_lm(architecture).float()), 8)
    assert (found.spare is not None) == (architecture in PACKED), found.reason
    assert (found.reason is None) == (architecture in PACKED)


def test_a_cache_of_our_own_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A completion that sees its sibling, in the slot beside its own."""
    attend = Past.attend

    def leaking(past: Past, *args: Any, **options: Any) -> Tensor:
        out = attend(past, *args, **options)
        return out + 0.1 * out.roll(1, 1)

    monkeypatch.setattr(Past, "attend", leaking)
    found = generation_of(wrap(causal_lm()), 8)
    assert found.spare is None
    assert found.reason is not None
    assert "in packed rows a token's log-prob is off by" in found.reason


def test_a_model_that_fails_as_it_runs_is_drawn_by_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged as a copy in float32, which runs."""
    of_the_loop = generation._of_the_loop

    def fails(*args: Any, compare: bool = True) -> tuple[str | None, float]:
        return of_the_loop(*args) if compare else ("RuntimeError: no such product", float("inf"))

    model = wrap(causal_lm().to(torch.bfloat16))
    assert generation_of(model, 8).spare is not None
    monkeypatch.setattr(generation, "_of_the_loop", fails)
    found = generation_of(model, 8)
    assert (found.spare, found.pads) == (None, True)
    assert found.reason == "as it runs RuntimeError: no such product"


def test_a_trial_is_not_repeated_for_shorter_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    found = Generation(pads=True, caches=True, reason=None, gap=None, spare=True)

    def noted(_: Any, longest: int, **__: Any) -> Generation:
        tried.append(longest)
        return found

    monkeypatch.setattr("lm.logprobs.sampling.generation_of", noted)
    model = wrap(causal_lm())
    for prompts in ([[3, 4], [5]], [[6, 7], [8]], [[3] * 4, [5]]):
        draw(model, prompts, config())
    assert tried == [2, 4]


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_the_cache_takes_what_it_is_thought_to(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = wrap(causal_lm(architecture)), list[Past]()
    only = Past.__init__

    def noted(past: Past, *args: Any) -> None:
        only(past, *args)
        made.append(past)

    monkeypatch.setattr(Past, "__init__", noted)
    monkeypatch.setattr(Past, "only", lambda *_: pytest.fail("nothing shrinks here"))
    decoded(model, [[3] * 7, [3] * 7, [4, 5], [6]], groups=3, choose=lambda rows_B, *_: np.full(len(rows_B), 9))
    buffers = [buffer for layer in made[0].layers for buffer in (*layer.prompts, *layer.own)]
    bytes_ = sum(buffer.numel() * buffer.itemsize for buffer in buffers)
    assert bytes_ == 3 * cache_size(model.model.config, 7 + 2 * 5, 8)


def test_groups_fit_the_cache_and_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(causal_lm())
    group = cache_size(model.model.config, 10 + 4 * 6, 8) + 4 * 12 * VOCABULARY
    assert groups_fitting(model, 64, 4, 10, 6) == 16
    assert groups_fitting(model, 65, 4, 10, 6) == 17
    monkeypatch.setattr(generation, "free_memory", lambda device: int(2.5 * group / generation.SHARE))
    assert groups_fitting(model, 64, 4, 10, 6) == 2
    monkeypatch.setattr(generation, "free_memory", lambda device: None)
    monkeypatch.setattr(generation, "CACHE", 5 * group)
    assert groups_fitting(model, 64, 4, 10, 6) == 5
    monkeypatch.setattr(generation, "CACHE", 1)
    assert groups_fitting(model, 64, 4, 10, 6) == 1


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize("size", [50, draws.BLOCK, 3 * draws.BLOCK + 7])
def test_a_token_is_drawn_where_the_summed_softmax_passes_the_number(size: int) -> None:
    logits = torch.randn(200, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    logits[:, 5:9] = -torch.inf
    logits[:, -1] = -torch.inf
    uniform = np.random.default_rng(size).random(200)
    sums = (logits / 0.7).softmax(-1).cumsum(-1)
    expected = (sums <= torch.from_numpy(uniform)[:, None]).sum(-1)
    assert drawn(logits, 0.7, uniform).tolist() == expected.tolist()
    edge = drawn(logits.float(), 1.0, np.full(200, 1 - 2.0**-53))
    assert (edge == size - 2).all(), "the last token that has a probability"
    assert (drawn(logits.float(), 1.0, np.zeros(200)) == 0).all()


def test_a_token_of_no_probability_is_not_drawn() -> None:
    logits = torch.full((1000, 600), -torch.inf)
    logits[:, [7, 300, 301]] = torch.tensor([0.0, 1.0, -3.0])
    rows = np.arange(1000)
    tokens = Draws(3, [[1]] * 1000, 1.0)(rows, rows * 0, logits)
    assert set(tokens.tolist()) == {7, 300, 301}
    with pytest.raises(FloatingPointError, match="the policy's logits are not finite"):
        drawn(torch.full((1, 600), torch.nan), 1.0, np.zeros(1))


def test_the_numbers_are_uniform_and_of_no_other_row() -> None:
    """Pearson's statistic of 40,000 numbers in a hundred bins: rows of one prompt, of many, steps of one, by seed."""
    zeros, many = np.zeros(40_000, dtype=np.int64), np.arange(40_000)
    of_one, of_many = Draws(0, [[5, 6]] * 40_000, 1.0), Draws(0, [[5, i] for i in range(40_000)], 1.0)
    found = [of_one.uniform(many, zeros), of_many.uniform(many, zeros), of_one.uniform(zeros, many)]
    found.append(Draws(1, [[5, 6]] * 40_000, 1.0).uniform(many, zeros))
    for numbers in found:
        seen = np.bincount((numbers * 100).astype(int), minlength=100)
        assert ((seen - 400) ** 2 / 400).sum() < 150  # of 99 degrees of freedom: 1 in 1,300
    for one, other in ((0, 1), (0, 2), (0, 3), (1, 3)):
        assert abs(np.corrcoef(found[one], found[other])[0, 1]) < 0.02
    steps = np.stack([of_one.uniform(many[:200], np.full(200, t)) for t in range(200)])
    assert abs(np.corrcoef(steps[:-1].ravel(), steps[1:].ravel())[0, 1]) < 0.02
