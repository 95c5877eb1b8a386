"""Completions drawn from a policy: by our loop on a CPU, by transformers' `generate`, or by vLLM."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lm.base import progress, ranks
from lm.config import Config, SamplingConfig
from lm.logprobs.completions import CompletionModel, Ids
from lm.logprobs.decoding import decode, most_together
from lm.logprobs.definition import check_positions, trying
from lm.logprobs.draws import FORM, Draws
from lm.logprobs.generation import (
    STEPS,
    Generation,
    fitting,
    generation_of,
    groups_fitting,
    left_padded,
    own_draws,
)

Done = Callable[[int, list[int]], None]
"""Is told each row, and its completion, as it ends."""
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

    Sampling shifts no other draw. A completion without end-of-text has config.data.max_completion_length tokens. On a
    CPU a model that takes packed rows draws each row's tokens from a stream of its own (`lm.logprobs.draws`): up to
    rounding they do not depend on order, batches or other prompts. What `generate` draws is one sequence, of
    sampling.batch_size rows at a time. The engines draw other samples from one distribution. Of several ranks the first
    draws for all.

    Raises ValueError where `sampling.engine` is "vllm" and vLLM is not installed.
    """
    end = tokenizer.eos_token_id

    def drawn() -> list[list[int]]:
        with model.stock() as policy:
            # What a hub model would rather do (penalties, truncation, other ends) is not sampling from the policy.
            policy.generation_config = GenerationConfig(eos_token_id=end)
            if config.sampling.engine == "vllm":
                return _sample_by_vllm(policy, prompts, tokenizer, config, seed)
            return _sample(model, policy, prompts, tokenizer, config, seed, what)

    samples = ranks.from_first(drawn)
    return [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in samples]


def in_keys(sampling: SamplingConfig) -> Any:
    """What of sampling decides an artifact that is made of samples: the options, and the form of the draws."""
    return sampling if sampling.engine == "vllm" else {"options": sampling, "draws": FORM}


def _sample(
    model: CompletionModel,
    policy: PreTrainedModel,
    prompts: Sequence[Ids],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    seed: int,
    what: str,
) -> list[list[int]]:
    if not prompts:
        return []
    sizes, most = [len(prompt) for prompt in prompts], config.data.limits[1]
    check_positions(policy.config, max(sizes) + most, type(policy).__name__)
    how = _how(model, max(sizes), len(set(sizes)) > 1, min(STEPS, most))
    if how.reason is not None:
        log.warning(
            "%s is sampled by `generate` %s%s: %s",
            type(policy).__name__,
            "in batches of mixed lengths" if how.pads else "in batches of one length",
            "" if how.caches else ", without its cache",
            how.reason,
        )
    own = _by_loop if how.spare is not None else _by_generate
    with model._precision(policy.device), progress.bar(what, total=len(prompts)) as bar:
        result = dict[int, list[int]]()

        def done(row: int, tokens: list[int]) -> None:
            result[row] = tokens
            bar.update()

        own(model, how, prompts, tokenizer, config, seed, done)
    return [result[row] for row in range(len(prompts))]


def _how(model: CompletionModel, longest: int, pads: bool, steps: int) -> Generation:
    """What a trial found, of this model with prompts as long and as mixed, or finds now."""
    tried: tuple[int, bool, int]
    found: Generation | None
    tried, found = model.__dict__.get("sampled_as", ((0, False, 0), None))
    if found is None or longest > tried[0] or (pads, steps) != tried[1:]:
        found = generation_of(model, longest, pads=pads, steps=steps)
        model.__dict__["sampled_as"] = ((longest, pads, steps), found)
    return found


def _by_loop(
    model: CompletionModel,
    how: Generation,
    prompts: Sequence[Ids],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    seed: int,
    done: Done,
) -> None:
    most, each = config.data.limits[1], min(most_together(prompts), config.sampling.batch_size)
    assert how.spare is not None
    with trying(model):
        decode(
            model,
            prompts,
            Draws(seed, prompts, config.sampling.temperature),
            done,
            end=tokenizer.eos_token_id,
            most=most,
            groups=groups_fitting(model, config.sampling.batch_size, each, max(map(len, prompts)), most),
            each=each,
            spare=how.spare,
        )


def _by_generate(
    model: CompletionModel,
    how: Generation,
    prompts: Sequence[Ids],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    seed: int,
    done: Done,
) -> None:
    policy, sizes, most = model.model, [len(prompt) for prompt in prompts], config.data.limits[1]
    size = fitting(model, config.sampling.batch_size, max(sizes) + most)
    with own_draws(policy.device, seed):
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
                done(i, tokens)


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
