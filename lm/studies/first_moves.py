"""Which completions of a set a first step of DPO would move down, measured on a model: `theory.first_to_fall` with the
last hidden states and next-token distributions of a causal LM.

Exact where the output head alone is trained (its bias too, where it has one), by a small step of plain gradient descent
on one pair, from this model as pi_ref. For the training of all parameters, or of a head that is tied to the input
embeddings, it is one term of the inner product: a diagnostic of the head's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lm.base import progress
from lm.config import Config, DataConfig, TrainingConfig
from lm.data.tokens import completion_ids, prompt_ids
from lm.logprobs.kernels import widest
from lm.models.loading import SCRATCH, check_model, load_policy
from lm.models.opening import device_named
from theory.first_to_fall import Completion, Moves, head_gram, moves

Ids = Sequence[int]


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """First moves of N pairs of a set, and what they are of."""

    moves: Moves
    """NumPy, [N], float64; the unit is that of the inner products."""
    too_long: int
    """Pairs that were drawn and exceed a limit."""
    tied: bool
    """Whether the head is the input embeddings too."""
    capped: bool
    """Whether logits are squashed after the head, which the inner products leave out."""


def check(spec: str) -> None:
    """Raises ValueError for a model that cannot be measured, before anything is read."""
    if spec in SCRATCH:
        raise ValueError(f"model {spec!r}: a trained model is needed, the one that is to be pi_ref")
    check_model(spec, trust_remote_code=False)


def drawn(pairs: int, most: int) -> npt.NDArray[np.int64]:
    """Numbers of at most so many of the pairs, without replacement (seed 0), ascending."""
    return np.sort(np.random.default_rng(0).permutation(pairs)[:most])


def measure(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, ...]],
    *,
    max_prompt_length: int,
    max_completion_length: int,
) -> Measured:
    """First moves on pairs, in float32 parameters and one pair at a time.

    Args:
        spec: hub name or folder of the model.
        tokenizer: its own.
        texts: (prompt, chosen, rejected) of N pairs; tokenised as for training.
        max_prompt_length: longest prompt, tokens; a pair beyond it is left out.
        max_completion_length: likewise, with end-of-text.

    Raises:
        ValueError: the model cannot be loaded, has too few positions for the limits, or no pair is within them.
    """
    asked, *answers = map(list, zip(*texts, strict=True))
    prompts, sides = prompt_ids(tokenizer, asked), [completion_ids(tokenizer, side) for side in answers]
    rows = [
        (prompt, chosen, rejected)
        for prompt, chosen, rejected in zip(prompts, *sides, strict=True)
        if 0 < len(prompt) <= max_prompt_length and max(len(chosen), len(rejected)) <= max_completion_length
    ]
    if not rows:
        raise ValueError(
            f"model {spec!r}: none of {len(texts)} pairs is within {max_prompt_length} tokens of prompt and "
            f"{max_completion_length} of completion; raise --max-prompt-length or --max-completion-length"
        )
    limits = DataConfig(max_prompt_length=max_prompt_length, max_completion_length=max_completion_length)
    none = TrainingConfig(max_steps=1)
    config = Config(output_dir="unused", model=spec, data=limits, sft=none, oracle=none, reward=none, policy=none)
    model = load_policy(spec, tokenizer, config).to(device_named(config.device)).eval()
    return Measured(
        moves=head_moves(model, rows),
        too_long=len(texts) - len(rows),
        tied=model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        capped=getattr(model.config.get_text_config(), "final_logit_softcapping", None) is not None,
    )


def head_moves(model: PreTrainedModel, rows: Sequence[tuple[Ids, Ids, Ids]]) -> Moves:
    """First moves of pairs (prompt, chosen, rejected) of token ids, [N], float64 NumPy arrays."""
    grams: list[tuple[float, ...]] = []
    with torch.inference_mode(), progress.bar("first moves", total=len(rows)) as bar:
        for prompt, *both in rows:
            chosen, rejected = (seen_by_head(model, prompt, completion) for completion in both)
            grams.append(tuple(float(product) for product in head_gram(chosen, rejected)))
            bar.update(1)
    own: npt.NDArray[np.float64] = np.array(grams)
    return moves(*own.T)


def seen_by_head(model: PreTrainedModel, prompt: Ids, completion: Ids) -> Completion:
    """What the output head gets and gives at each token of a completion; a 1 is added to its states for a bias.

    In float64 where the device has it: a move is the difference of inner products that may be close.
    """
    head, inputs = model.get_output_embeddings(), []
    ids = torch.tensor([[*prompt, *completion]], device=model.device)
    keep = torch.arange(len(prompt) - 1, ids.shape[1] - 1, device=model.device)
    hook = head.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    try:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=keep).logits[
            0
        ]
    finally:
        hook.remove()
    (states,) = inputs
    states = _precise(states[0])
    if getattr(head, "bias", None) is not None:
        states = nn.functional.pad(states, (0, 1), value=1.0)
    return Completion(states, _precise(logits).softmax(-1), ids[0, len(prompt) :])


def _precise(values: Tensor) -> Tensor:
    return values.to(widest(values.device))
