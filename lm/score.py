"""Scores of a run's pairs; with --data, --reward-model and --out, of any preference set by any reward model.

`python -m lm.score` scores the training pairs by pi_ref and every reward model, and samples pi_ref for the KL term.
`python -m lm.score --data DATA --reward-model A --out FILE` is `lm.rewards`; with --help after these it explains
itself. Both score offline, every row once.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lm import progress, ranks
from lm.config import Config
from lm.logprobs import CompletionModel, collate
from lm.models import load_policy, load_reward_model

Ids = Sequence[int]


class ScoreError(FloatingPointError):
    """A row's score is not finite."""

    def __init__(self, what: str, row: int, value: float) -> None:
        super().__init__(f"{what}: the score of row {row} is {value}; every score must be finite")
        self.row, self.value = row, value


def device_of(config: Config) -> torch.device:
    """Where scoring runs."""
    return device_named(config.device)


def device_named(name: str) -> torch.device:
    """The accelerator for "auto" where there is one, else the CPU."""
    if name == "cpu" or not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return accelerator


def score_rows(
    model: CompletionModel,
    prompts: Sequence[Ids],
    completions: Sequence[Ids],
    what: str,
    *,
    rewards: bool | None = None,
) -> Tensor:
    """Summed log-probs, or rewards, of R completions, [R], float64 on the CPU, in the given order.

    Rewards are what a reward model is read for by default; only a policy with a reward head has both. Eval mode, no
    gradient; rows of the same prompt share it, batches are of similar length. Ranks share the batches out, and all get
    all scores. Raises FloatingPointError where a score is not finite.
    """
    read_rewards = model.is_reward_model if rewards is None else rewards
    examples = _by_prompt(prompts, completions, model.options.scoring_tokens)
    tokens = [len(prompts[rows[0]]) + sum(len(completions[i]) for i in rows) for rows in examples]
    examples = [examples[i] for i in sorted(range(len(examples)), key=tokens.__getitem__, reverse=True)]
    tokens.sort(reverse=True)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()

    def batch_of(chosen: list[list[int]]) -> dict[str, Any]:
        batch = collate([prompts[rows[0]] for rows in chosen], [[completions[i] for i in rows] for rows in chosen])
        return {**batch, "input_ids": batch["input_ids"].to(device)}

    if examples and model.route is None:
        model.settle(**batch_of(examples[:1]))

    def scores_of(batch: list[list[int]]) -> Tensor:
        output = model(**batch_of(batch))
        scores: Tensor = output.rewards if read_rewards else output.logps
        return scores

    scores = over_ranks(batches(examples, tokens, model.options.scoring_tokens), len(prompts), scores_of, what)
    model.train(was_training)
    return scores


def over_ranks(
    batches: Sequence[list[list[int]]], count: int, scores_of: Callable[[list[list[int]]], Tensor], what: str
) -> Tensor:
    """Scores of `count` rows, [count], float64 on the CPU: ranks share the batches out, and all get all scores.

    Args:
        batches: of examples, each of which is the rows in it.
        count: of the rows.
        scores_of: a batch's scores, in the order of its rows; called without gradient.
        what: is scored, for the progress bar and errors.

    Raises:
        FloatingPointError: a score is not finite.
    """
    # Whole batches, not rows: the numbers are then the same whoever computes them.
    mine = batches[ranks.index() :: ranks.count()]
    found: list[tuple[list[int], Tensor]] = []
    total = sum(len(example) for batch in mine for example in batch)
    with torch.inference_mode(), progress.bar(what, total=total) as bar:
        for batch in mine:
            rows = [i for example in batch for i in example]
            found.append((rows, scores_of(batch).double().cpu()))
            bar.update(len(rows))
    scores = torch.zeros(count, dtype=torch.float64)
    times = torch.zeros(count, dtype=torch.long)
    for rows, values in (one for part in ranks.from_all(found) for one in part):
        scores[rows] = values
        times[rows] += 1
    if (times != 1).any():
        bad = int((times != 1).nonzero()[0])
        raise RuntimeError(f"{what}: row {bad} was scored {int(times[bad])} times; each must be scored once")
    if not torch.isfinite(scores).all():
        bad = int((~torch.isfinite(scores)).nonzero()[0])
        raise ScoreError(what, bad, scores[bad].item())
    return scores


def _by_prompt(prompts: Sequence[Ids], completions: Sequence[Ids], most: int) -> list[list[int]]:
    """Rows with the same prompt together, in groups of at most `most` tokens (a single row may be longer)."""
    groups: list[list[int]] = []
    open_group: dict[tuple[int, ...], tuple[list[int], int]] = {}
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        key = tuple(prompt)
        group, size = open_group.get(key, ([], most))
        if size + len(completion) > most:
            group, size = [], len(prompt)
            groups.append(group)
        group.append(row)
        open_group[key] = (group, size + len(completion))
    return groups


def batches(examples: list[list[int]], tokens: Sequence[int], most: int) -> list[list[list[int]]]:
    """Consecutive examples in batches of at most `most` tokens, where one example has no more."""
    made: list[list[list[int]]] = []
    size = 0
    for example, own in zip(examples, tokens, strict=True):
        if not made or size + own > most:
            made.append([])
            size = 0
        made[-1].append(example)
        size += own
    return made


def open_policy(
    folder: Path, tokenizer: PreTrainedTokenizerBase, config: Config, *, reward_head: bool = False
) -> CompletionModel:
    """A trained policy, ready to score or sample; with the reward head that was trained beside it, where asked for."""
    model = CompletionModel(load_policy(folder, tokenizer, config), reward_head=reward_head, options=config.logprobs)
    if model.reward_head is not None:
        model.reward_head.load_state_dict(load_file(folder / "reward_head.safetensors"))
    return model.to(device_of(config)).eval()


def open_reward_model(folder: Path | str, config: Config) -> CompletionModel:
    """A trained reward model, ready to score."""
    return CompletionModel(load_reward_model(folder, config), options=config.logprobs).to(device_of(config)).eval()


def score_pairs(
    model: CompletionModel, pairs: Dataset, what: str, *, rewards: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and of the rejected completions, [N] each, float64; see `score_rows`."""
    # Columns as a whole: iterating decodes them row by row, which takes longer than a small model's forward pass.
    prompts, completions = pairs["prompt_ids"][:], [*pairs["chosen_ids"][:], *pairs["rejected_ids"][:]]
    try:
        both = score_rows(model, [*prompts, *prompts], completions, what, rewards=rewards)
    except ScoreError as error:
        side, row = ("chosen", "rejected")[error.row // len(pairs)], error.row % len(pairs)
        raise FloatingPointError(
            f"{what}: the score of the {side} completion of pair {pairs['id'][row]} is {error.value}; every score must "
            "be finite"
        ) from None
    return both[: len(pairs)], both[len(pairs) :]


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
                max_new_tokens=config.data.max_completion_length,
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
    device, longest = policy.device, config.data.max_completion_length
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


def is_for_any_set(arguments: Sequence[str]) -> bool:
    """Which of the two commands it is: only this one has a reward model or a judge, or a file to write."""
    return bool({"--reward-model", "--judge-model", "--out"} & {argument.split("=")[0] for argument in arguments})


if __name__ == "__main__":
    if is_for_any_set(sys.argv[1:]):
        import lm.rewards

        sys.exit(lm.rewards.main())

    from lm.cli import run

    sys.exit(run("lm.score", lambda pipeline: pipeline.scores))
