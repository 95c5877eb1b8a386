"""How a policy's own distribution is drawn from: by the loop of `lm.logprobs.decoding`, or by transformers' `generate`.

What the loop keeps of earlier tokens is right for what takes packed rows. In `generate` prompts of unequal length are
padded on the left, and a recurrent state that is not masked, or positions that are not shifted, then make samples of
another policy. As with the log-probs' routes, both are tried before they are relied on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from lm.logprobs.completions import CompletionModel, Ids
from lm.logprobs.copies import Unbuildable, precise
from lm.logprobs.decoding import decode
from lm.logprobs.definition import described, examples_of, of_the_model, trying, vocabulary_of
from lm.logprobs.kernels import at_least_float32, free_memory
from lm.logprobs.past import Indices
from lm.logprobs.trial import MARGIN, ROUNDING

log = logging.getLogger(__name__)
PAD = 0
"""The token that fills rows on the left; it is masked, so that any will do."""
STEPS = 3
"""Tokens that a trial generates, at most."""
SHARE = 0.8
"""Of the memory that is free, what the caches of a batch may take."""
CACHE = 2**31
"""Bytes, most that the loop's cache takes: with more rows at once a token costs no less."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How a policy's own distribution is drawn from."""

    pads: bool
    """Whether prompts of unequal length may go together, padded on the left."""
    caches: bool
    """Whether keys, values and states of earlier tokens may be kept."""
    reason: str | None
    """What is wrong with the one or the other."""
    gap: float | None
    """Largest difference of a token's log-prob that is left, nats; None where it could not be measured."""
    spare: bool | None = None
    """None where `generate` draws; else the loop does, without padding, and this is what `decode` is to spare."""


def generation_of(model: CompletionModel, tokens: int, *, pads: bool = True, steps: int = STEPS) -> Generation:
    """Tries the loop (on a CPU), else `generate`, against the plain forward of each row alone: every token's log-prob,
    for a few new tokens.

    Args:
        model: a causal LM; it is left as it was.
        tokens: of the longest prompt; a window shows only in prompts that are longer.
        pads: whether prompts are of unequal length.
        steps: new tokens; no more than the model has positions for.

    Raises:
        ValueError: what `generate` draws from is not the plain forward's distribution, whatever it is asked for.
    """
    try:
        subject = precise(model, model.model.device) if model.model.dtype.itemsize < 4 else model
        found = _tried(subject, tokens, pads, steps)
        if found is None:  # it reacts to nothing
            subject = model  # not two copies at a time
            subject = precise(model, model.model.device, shaken=True)
            found = _tried(subject, tokens, pads, steps)
    except Unbuildable as error:
        return Generation(pads=False, caches=True, reason=str(error), gap=None)
    if found is None:
        return Generation(pads=False, caches=True, reason="it reacts too little for a trial", gap=None)
    if found.spare is not None and (subject is not model or model.options.autocast):
        with model._precision(model.model.device):  # its numbers were judged without the rounding
            problem, _ = _of_the_loop(model, [[PAD], [PAD]], steps, found.spare, compare=False)
        if problem is not None:
            found = _tried(subject, tokens, pads, steps, loop=False)
            assert found is not None
            return replace(found, reason="; ".join(filter(None, (f"as it runs {problem}", found.reason))))
    return found


def _tried(model: CompletionModel, tokens: int, pads: bool, steps: int, *, loop: bool = True) -> Generation | None:
    """None where nothing can be told: another row's past, or padding, would make no difference to this model."""
    (one, (_, other)), (beginning, (rest, _)), _ = examples_of(vocabulary_of(model.model), max(2, tokens))
    size = min(2, len(one), len(other), max(2, tokens) - 1)
    short, long = [one[:size], other[:size]], [[*beginning, *rest], [*beginning, *rest][::-1]]
    filled = [PAD] * len(long[0])
    with trying(model):
        right, *wrong = (
            _plain(model, row, 1)
            for row in (short[0], *(front[size:] + short[0] for front in (long[0], *([filled] if pads else []))))
        )
    if min(_off(seen, right) for seen in wrong) < MARGIN * ROUNDING:
        return None
    reasons: list[str] = []
    if loop and model.model.device.type == "cpu" and model.options.route != "padded":
        for spare in (True, False):
            problem, gap = _of_the_loop(model, [*long, short[0], short[0]], steps, spare)
            if problem is None:
                return Generation(pads=True, caches=True, reason=None, gap=gap, spare=spare)
        reasons.append(f"in packed rows {problem}")
    for what, batches, caches in (
        *([("left padding", [[short[0], *long]], True)] if pads else []),
        ("its cache", [short, long], True),
        ("a batch", [short, long], False),
    ):
        each = [_problem(model, batch, steps, caches=caches) for batch in batches]
        problem = next((problem for problem, _ in each if problem is not None), None)
        if problem is None:
            gap = max(gap for _, gap in each)
            mixed = what == "left padding"
            return Generation(pads=mixed, caches=caches, reason="; ".join(reasons) or None, gap=gap)
        reasons.append(f"with {what} {problem}")
    raise ValueError(
        f"{type(model.model).__name__} cannot be sampled from: what `generate` draws from is not the plain forward's "
        f"distribution ({'; '.join(reasons)})"
    )


def _of_the_loop(
    model: CompletionModel, prompts: Sequence[Sequence[int]], steps: int, spare: bool, *, compare: bool = True
) -> tuple[str | None, float]:
    """What is wrong with the loop on these prompts, of which the short one waits for a place and its two rows go
    different ways, and the largest difference in nats; only whether it runs, unless `compare`."""
    seen: dict[int, list[Tensor]] = {row: [] for row in range(len(prompts))}
    drawn: dict[int, list[int]] = {}

    def choose(rows_B: Indices, _: Indices, logits_BV: Tensor) -> Indices:
        for row, logits_V in zip(rows_B, logits_BV, strict=True):
            seen[int(row)].append(at_least_float32(logits_V))
        best = logits_BV.topk(2).indices.cpu().numpy()
        return np.where(rows_B % 2, best[:, 1], best[:, 0])

    with trying(model):
        try:
            decode(model, prompts, choose, drawn.__setitem__, end=-1, most=steps, groups=2, each=2, spare=spare)
        except Exception as error:
            if not of_the_model(error):
                raise
            return described(error), float("inf")
        if not compare:
            return None, 0.0
        return _compared(model, prompts, [drawn[row] for row in seen], [torch.stack(own) for own in seen.values()])


def _compared(
    model: CompletionModel, prompts: Sequence[Sequence[int]], drawn: Sequence[list[int]], logits: Sequence[Tensor]
) -> tuple[str | None, float]:
    """What is wrong with the logits that each of these tokens was drawn from, and the largest difference in nats."""
    worst, gap = 0.0, 0.0
    for prompt, tokens, own in zip(prompts, drawn, logits, strict=True):
        got, right = own.log_softmax(-1), _plain(model, [*prompt, *tokens[:-1]], len(tokens))
        worst = max(worst, _off(got, right))
        gap = max(gap, float((got - right).abs().nan_to_num(float("inf")).max()))
    return (None if worst <= ROUNDING else f"a token's log-prob is off by {gap:.2g} nats"), gap


def _problem(
    model: CompletionModel, prompts: Sequence[Sequence[int]], steps: int, *, caches: bool
) -> tuple[str | None, float]:
    """What is wrong with generating after these prompts in one batch, and the largest difference in nats."""
    longest = max(map(len, prompts))
    with trying(model), model.stock() as policy:
        before = policy.generation_config
        policy.generation_config = GenerationConfig()
        try:
            ids, mask = left_padded(prompts, policy.device)
            output = model.call(
                policy.generate,
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=steps,
                use_cache=caches,
                pad_token_id=PAD,
                output_logits=True,
                return_dict_in_generate=True,
            )
        except Exception as error:
            if not of_the_model(error):
                raise
            return described(error), float("inf")
        finally:
            policy.generation_config = before
        drawn = output.sequences[:, longest:].tolist()
        logits = [torch.stack([at_least_float32(step[row]) for step in output.logits]) for row in range(len(prompts))]
        return _compared(model, prompts, drawn, logits)


def _plain(model: CompletionModel, row: Sequence[int], count: int) -> Tensor:
    """[count, V], log-probs of what comes after each of the last tokens, by the plain forward of the row alone."""
    with model.stock() as policy:
        logits = model.call(policy, input_ids=torch.tensor([list(row)], device=policy.device), use_cache=False).logits
    return at_least_float32(logits[0, -count:]).log_softmax(-1)


def _off(got: Tensor, right: Tensor) -> float:
    """Largest difference, in proportion to the numbers' size; infinite where one is not finite."""
    return float(((got - right).abs() / (1 + right.abs())).nan_to_num(float("inf")).max())


def left_padded(prompts: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask of prompts that end together, [R, P]."""
    longest = max(map(len, prompts))
    ids, mask = np.full((len(prompts), longest), PAD), np.zeros((len(prompts), longest), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


# ---------------------------------------------------------------- memory and draws


def cache_size(config: PretrainedConfig, tokens: int, itemsize: int) -> int:
    """Bytes of one row's keys and values in all layers, an upper bound; 0 for a model without attention heads."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        return 0
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    width = max(width, sum(getattr(text, f"qk_{part}_head_dim", None) or 0 for part in ("nope", "rope")))
    heads = getattr(text, "num_key_value_heads", None) or heads
    return int(2 * text.num_hidden_layers * heads * width * tokens * itemsize)


def groups_fitting(model: CompletionModel, rows: int, each: int, prompt: int, completion: int) -> int:
    """Groups of the loop at once: for these rows, or so many that the cache fits CACHE and the free memory.

    Args:
        model: where it is.
        rows: asked for.
        each: of a group.
        prompt: tokens of the longest prompt.
        completion: most tokens of a completion.
    """
    policy = model.model
    itemsize = max(4, policy.dtype.itemsize) if model.options.autocast else policy.dtype.itemsize
    logits = 3 * 4 * getattr(policy.config.get_text_config(), "vocab_size", 0)  # as in `fitting`
    group = cache_size(policy.config, prompt + each * completion, itemsize) + each * logits
    free = free_memory(policy.device)
    most = CACHE if free is None else min(CACHE, int(SHARE * free))
    return max(1, min(-(-rows // each), most // max(group, 1)))


def fitting(model: CompletionModel, batch: int, tokens: int) -> int:
    """How many of a batch's rows may be sampled at once: all, or so many that their caches fit the free memory.

    Args:
        model: where it is.
        batch: rows asked for.
        tokens: of the longest row, with what is to be sampled.
    """
    policy = model.model
    itemsize = 2 if model.options.autocast else policy.dtype.itemsize
    logits = 3 * 4 * getattr(policy.config.get_text_config(), "vocab_size", 0)  # in float32, their softmax, a draw
    row, free = cache_size(policy.config, tokens, itemsize) + logits, free_memory(policy.device)
    if free is None or batch * row <= SHARE * free:
        return batch
    most = max(1, int(SHARE * free / row))
    log.warning(
        "sampling.batch_size %d is cut to %d: the cache of a row of %d tokens takes %.2g GB, and %.3g GB are free on "
        "%s; the draws are those of batch_size %d",
        batch,
        most,
        tokens,
        row / 2**30,
        free / 2**30,
        policy.device,
        most,
    )
    return most


@contextmanager
def own_draws(device: torch.device, seed: int) -> Iterator[None]:
    """Draws from a state of their own, on the CPU and on this device; no other device's is touched."""
    generators = [torch.default_generator]
    if device.type == "mps":
        generators.append(torch.mps._get_default_mps_generator())
    elif device.type != "cpu":
        module = torch.get_device_module(device)
        generators.append(module.default_generators[module.current_device() if device.index is None else device.index])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
