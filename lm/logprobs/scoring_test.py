"""Scores keep the given order and are finite; samples come from the policy's own distribution."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lm.config import Config, DataConfig, LogprobsConfig, SamplingConfig
from lm.logprobs import scoring
from lm.logprobs.completions import CompletionModel, collate
from lm.logprobs.sampling import sample_completions
from lm.logprobs.scoring import over_ranks, score_pairs, score_rows
from tests.tiny import END, VOCABULARY, causal_lm, close, completion, reward_model, training

SIDES = ("prompt", "chosen", "rejected")


class Ends(PreTrainedTokenizerFast):  # type: ignore[misc]
    """All that sampling, and a policy that is loaded, read of a tokenizer."""

    def __init__(self) -> None:
        pass

    eos_token_id, pad_token_id, bos_token_id = END, 0, None


def config(temperature: float = 1.0, batch_size: int = 4, longest: int = 6) -> Config:
    once: Any = training()
    return Config(
        output_dir="unused",
        model="unused",
        device="cpu",
        sft=once,
        oracle=once,
        reward=once,
        policy=once,
        data=DataConfig(max_completion_length=longest),
        sampling=SamplingConfig(temperature=temperature, batch_size=batch_size),
    )


def draw(model: CompletionModel, prompts: list[list[int]], options: Config, seed: int = 0) -> list[list[int]]:
    return sample_completions(model, prompts, Ends(), options, seed=seed, what="samples")


def prompts_of(count: int) -> list[list[int]]:
    rng = random.Random(0)
    return [completion(rng, 2, 9)[:-1] for _ in range(count)]


def test_scores_that_were_kept_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(2)
    ids = [{"id": str(i), **{f"{what}_ids": completion(rng) for what in SIDES}} for i in range(7)]
    pairs, model = Dataset.from_list(ids), CompletionModel(causal_lm())
    expected = torch.stack(score_pairs(model, pairs, "log-probs"))
    asked: list[str] = []

    def scored(*given: Any, **options: Any) -> torch.Tensor:
        asked.append(given[3])
        if len(asked) > 2:
            raise MemoryError
        return score_rows(*given, **options)

    monkeypatch.setattr(scoring, "PAIRS", 3)
    monkeypatch.setattr(scoring, "score_rows", scored)
    with pytest.raises(MemoryError):
        score_pairs(model, pairs, "log-probs", kept=tmp_path)
    asked[:] = [""]
    close(torch.stack(score_pairs(model, pairs, "log-probs", kept=tmp_path)), expected)
    assert asked[1:] == ["log-probs, pairs from 6 of 7"]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("reward", [False, True])
def test_scores_are_in_the_given_order_whatever_the_batches(reward: bool) -> None:
    rng = random.Random(1)
    # Prompts come again, so that rows share one.
    prompts, completions = prompts_of(6) * 3, [completion(rng) for _ in range(18)]
    wrapped = reward_model() if reward else causal_lm()
    model = CompletionModel(wrapped, options=LogprobsConfig(scoring_tokens=25)).train()
    scores = score_rows(model, prompts, completions, "scores")
    one_by_one = [model(**collate([p], [[c]])) for p, c in zip(prompts, completions, strict=True)]
    close(scores, torch.cat([out.rewards if reward else out.logps for out in one_by_one]).detach())
    assert model.training, "the mode is put back"


def test_a_score_that_is_not_finite_is_an_error() -> None:
    model = causal_lm()
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = float("nan")
    with pytest.raises(FloatingPointError, match="log-probs: the score of row 0 is nan; every score must be finite"):
        score_rows(CompletionModel(model), [[2]], [[3, END]], "log-probs")


def test_samples_are_cut_after_end_of_text_or_have_full_length() -> None:
    samples = draw(CompletionModel(causal_lm()), prompts_of(60), config(batch_size=16))
    assert any(sample[-1] == END for sample in samples)
    for sample in samples:
        assert END not in sample[:-1]
        assert sample[-1] == END or len(sample) == 6


def test_sampling_is_a_function_of_its_seed_and_shifts_no_other_draw() -> None:
    model, prompts = CompletionModel(causal_lm()), prompts_of(8)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = draw(model, prompts, config())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert draw(model, prompts, config()) == first
    assert draw(model, prompts, config(), seed=1) != first


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_have_the_policys_probabilities(temperature: float) -> None:
    """Pearson's statistic on 4,000 draws against the softmax at the temperature, and against a wrong temperature."""
    model, count = causal_lm(), 4000
    samples = draw(CompletionModel(model), [[3, 4]] * count, config(temperature, batch_size=count, longest=1))
    seen = torch.bincount(torch.tensor([sample[0] for sample in samples]), minlength=VOCABULARY).double()
    logits = model(input_ids=torch.tensor([[3, 4]])).logits[0, -1].detach()

    def statistic(at: float) -> float:
        expected = count * (logits / at).softmax(-1)
        return float(((seen - expected) ** 2 / expected).mean())

    assert statistic(temperature) < 2
    assert statistic(1.5 - temperature) > 10


def test_a_models_own_generation_habits_are_not_used() -> None:
    """Hub models ship penalties and truncations; a sample with them is not one of the policy."""
    plain, habits = causal_lm(), causal_lm()
    habits.generation_config.update(
        repetition_penalty=5.0, no_repeat_ngram_size=2, min_p=0.5, top_k=1, suppress_tokens=[3, 4], max_length=3
    )
    prompts = prompts_of(12)
    assert draw(CompletionModel(habits), prompts, config()) == draw(CompletionModel(plain), prompts, config())


class Saved(Ends):
    """Saves nothing that the stand-in reads."""

    def save_pretrained(self, folder: Any) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def vllm(seen: dict[str, Any], answer: Any) -> ModuleType:
    """A stand-in with the arguments that vLLM documents for `LLM`, `SamplingParams` and `LLM.generate`."""
    module = ModuleType("vllm")

    class SamplingParams(SimpleNamespace):
        def __init__(
            self,
            n: int = 1,
            temperature: float = 1.0,
            top_p: float = 1.0,
            top_k: int = 0,
            seed: int | None = None,
            stop_token_ids: list[int] | None = None,
            max_tokens: int | None = 16,
            detokenize: bool = True,
        ) -> None:
            super().__init__(temperature=temperature, seed=seed, max_tokens=max_tokens)
            assert (n, top_p, top_k, stop_token_ids) == (1, 1.0, 0, None), "nothing truncates the distribution"

    class LLM:
        def __init__(
            self,
            model: str,
            *,
            tokenizer: str | None = None,
            trust_remote_code: bool = False,
            dtype: str = "auto",
            seed: int = 0,
            max_model_len: int | None = None,
        ) -> None:
            folder = Path(model)
            assert (folder / "tokenizer.json").exists()
            loaded = AutoModelForCausalLM.from_pretrained(folder)
            generation = json.loads((folder / "generation_config.json").read_text())
            seen.update(dtype=dtype, max_model_len=max_model_len, state=loaded.state_dict(), generation=generation)

        def generate(
            self, prompts: list[Any], sampling_params: list[SamplingParams], *, use_tqdm: bool = True
        ) -> list[Any]:
            seen.update(prompts=[p["prompt_token_ids"] for p in prompts], parameters=sampling_params)
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=answer(i))]) for i in range(len(prompts))]

    module.__dict__.update(LLM=LLM, SamplingParams=SamplingParams, TokensPrompt=dict)
    return module


def by_vllm(temperature: float = 0.7) -> Config:
    options = config(temperature, longest=3)
    return replace(options, sampling=replace(options.sampling, engine="vllm"))


def test_vllm_gets_the_policy_and_a_seed_for_each_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for vLLM, which does not run on every machine: what it is given, and what comes back."""
    seen: dict[str, Any] = {}
    wrapped = causal_lm()
    wrapped.generation_config.update(repetition_penalty=5.0, eos_token_id=[END, 7])
    model, prompts = CompletionModel(wrapped), prompts_of(5)
    answers = [(3, 4, 5), (3, END), (END,), (7, END, 9), (5, 6, END)]
    monkeypatch.setitem(sys.modules, "vllm", vllm(seen, answers.__getitem__))
    samples = sample_completions(model, prompts, Saved(), by_vllm(), seed=11, what="samples")
    assert samples == [[3, 4, 5], [3, END], [END], [7, END], [5, 6, END]]
    assert seen["prompts"] == prompts
    assert seen["dtype"] == "float32"
    assert seen["max_model_len"] == max(map(len, prompts)) + 3
    assert {(p.temperature, p.max_tokens) for p in seen["parameters"]} == {(0.7, 3)}
    assert len({p.seed for p in seen["parameters"]}) == len(prompts), "the same noise for every prompt"
    assert seen["generation"]["eos_token_id"] == END
    assert "repetition_penalty" not in seen["generation"]
    for name, value in wrapped.state_dict().items():
        close(seen["state"][name], value, what=name)


def test_vllm_completions_that_ended_otherwise_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CompletionModel(causal_lm())
    monkeypatch.setitem(sys.modules, "vllm", vllm({}, lambda _: (3, 4)))
    with pytest.raises(RuntimeError, match="after 2 tokens, without end-of-text"):
        sample_completions(model, prompts_of(2), Saved(), by_vllm(), seed=0, what="samples")


def test_vllm_that_is_not_there_or_cannot_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r'sampling.engine is "vllm", but .* install the extra "vllm"'):
        draw(CompletionModel(causal_lm()), prompts_of(2), by_vllm())
    with pytest.raises(ValueError, match=r'dtype must be float32 or bfloat16 with sampling.engine "vllm"'):
        replace(by_vllm(), dtype="float64")


class WithoutFloat64(torch.Tensor):
    """As on MPS: it is no float64 before it is on the CPU."""

    def double(self) -> Any:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self, *_: Any) -> Any:
        return self.as_subclass(torch.Tensor)


def test_scores_leave_the_device_before_they_are_float64() -> None:
    scores = over_ranks([[[0], [1]]], 2, lambda _: torch.tensor([1.5, 2.5]).as_subclass(WithoutFloat64), "")
    assert scores.dtype == torch.float64
    assert scores.tolist() == [1.5, 2.5]
