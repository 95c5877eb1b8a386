"""Completions drawn from a policy, by transformers or by vLLM."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lm.base import progress, ranks
from lm.config import Config
from lm.logprobs.completions import CompletionModel
from lm.logprobs.scoring import Ids


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
            return _sample_by_generate(policy, prompts, tokenizer, config, seed, what)

    samples = ranks.from_first(drawn)
    return [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in samples]


def _sample_by_generate(
    policy: PreTrainedModel,
    prompts: Sequence[Ids],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    seed: int,
    what: str,
) -> list[list[int]]:
    device = policy.device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    result: list[list[int]] = [[] for _ in prompts]
    size = config.sampling.batch_size
    with (
        torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []),
        progress.bar(what, total=len(order)) as bar,
    ):
        torch.manual_seed(seed)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            longest = len(prompts[batch[0]])
            ids = torch.tensor([[0] * (longest - len(prompts[i])) + list(prompts[i]) for i in batch], device=device)
            mask = torch.tensor(
                [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device
            )
            output = policy.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=config.sampling.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=config.data.limits[1],
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            for i, tokens in zip(batch, output[:, longest:].tolist(), strict=True):
                result[i] = tokens
            bar.update(len(batch))
    return result


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
                [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
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
