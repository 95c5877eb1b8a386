"""Completions drawn from a policy, by transformers or by vLLM."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lm.base import progress, ranks
from lm.config import Config
from lm.logprobs.completions import CompletionModel
from lm.logprobs.definition import check_positions
from lm.logprobs.generation import STEPS, fitting, generation_of, left_padded, own_draws
from lm.logprobs.scoring import Ids

log = logging.getLogger(__name__)


def sample_completions(
    model: CompletionModel,
    prompts: Sequence[Ids],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    *,
    seed: int,
    what: str,
) -> list[list[int]]:
    """One completion a prompt, drawn at the configured temperature, end-of-text included where it was reached.

    The draws come from a generator state of their own: sampling shifts no other draw. A completion without end-of-text
    has config.data.max_completion_length tokens. The engines draw other samples from one distribution. Of several ranks
    the first draws for all: the draws are one sequence, which cannot be shared out and stay the same.

    Raises ValueError where `sampling.engine` is "vllm" and vLLM is not installed.
    """
    end = tokenizer.eos_token_id

    def drawn() -> list[list[int]]:
        with model.stock() as policy:
            # What a hub model would rather do (penalties, truncation, other ends) is not sampling from the policy.
            policy.generation_config = GenerationConfig(eos_token_id=end)
            if config.sampling.engine == "vllm":
                return _sample_by_vllm(policy, prompts, tokenizer, config, seed)
            return _sample_by_generate(model, policy, prompts, tokenizer, config, seed, what)

    samples = ranks.from_first(drawn)
    return [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in samples]


def _sample_by_generate(
    model: CompletionModel,
    policy: PreTrainedModel,
    prompts: Sequence[Ids],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    seed: int,
    what: str,
) -> list[list[int]]:
    result: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return result
    sizes, most = [len(prompt) for prompt in prompts], config.data.limits[1]
    check_positions(policy.config, max(sizes) + most, type(policy).__name__)
    how = generation_of(model, max(sizes), pads=len(set(sizes)) > 1, steps=min(STEPS, most))
    if how.reason is not None:
        log.warning(
            "%s is sampled %s%s: %s",
            type(policy).__name__,
            "in batches of mixed lengths" if how.pads else "in batches of one length",
            "" if how.caches else ", without its cache",
            how.reason,
        )
    size = fitting(model, config.sampling.batch_size, max(sizes) + most)
    with (
        own_draws(policy.device, seed),
        model._precision(policy.device),
        progress.bar(what, total=len(prompts)) as bar,
    ):
        for batch in _batches(sizes, size, mixed=how.pads):
            ids, mask = left_padded([prompts[i] for i in batch], policy.device)
            output = policy.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=config.sampling.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=most,
                use_cache=how.caches,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            for i, tokens in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
                result[i] = tokens
            bar.update(len(batch))
    return result


def _batches(sizes: Sequence[int], most: int, *, mixed: bool) -> Iterator[list[int]]:
    """Rows from the longest to the shortest, at most so many at a time, and of one length unless they are mixed."""
    order = sorted(range(len(sizes)), key=lambda i: sizes[i], reverse=True)
    groups = [order] if mixed else [list(group) for _, group in groupby(order, key=lambda i: sizes[i])]
    for group in groups:
        for start in range(0, len(group), most):
            yield group[start : start + most]


def _sample_by_vllm(
    policy: PreTrainedModel, prompts: Sequence[Ids], tokenizer: PreTrainedTokenizerBase, config: Config, seed: int
) -> list[list[int]]:
    """By vLLM's offline `LLM`, which reads the policy from a temporary copy on disk.

    Written to vLLM's documentation and tested against a stand-in that takes the documented arguments: it has not been
    run with vLLM itself. The policy waits on the CPU meanwhile, as vLLM claims most of the accelerator's memory.
    """
    try:
        from vllm import LLM, SamplingParams, TokensPrompt
    except ImportError as error:
        raise ValueError(
            f'sampling.engine is "vllm", but it cannot be imported ({error}); install the extra "vllm", or take '
            '"transformers"'
        ) from None
    device, longest = policy.device, config.data.limits[1]
    try:
        with tempfile.TemporaryDirectory() as folder:
            policy.to("cpu")
            if device.type != "cpu":
                torch.accelerator.empty_cache()
            policy.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            engine = LLM(
                model=folder,
                dtype=config.dtype,
                seed=seed,
                max_model_len=max(map(len, prompts)) + longest,
                trust_remote_code=config.trust_remote_code,
            )
            outputs = engine.generate(
                [TokensPrompt(prompt_token_ids=[int(token) for token in prompt]) for prompt in prompts],
                # A seed for each prompt: with one for all, every prompt would see the same noise.
                [
                    SamplingParams(
                        temperature=config.sampling.temperature, max_tokens=longest, seed=seed + i, detokenize=False
                    )
                    for i in range(len(prompts))
                ],
                use_tqdm=sys.stderr.isatty() and not progress.is_quiet(),
            )
            del engine
    finally:
        policy.to(device)
    samples = [list(output.outputs[0].token_ids) for output in outputs]
    for sample in samples:
        if len(sample) < longest and sample[-1:] != [tokenizer.eos_token_id]:
            raise RuntimeError(f"vLLM stopped a completion after {len(sample)} tokens, without end-of-text")
    return samples
