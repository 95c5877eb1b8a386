"""Draws of tokens: each row's from a stream of its own, so that no other row, batch or order changes them.

Tensor names carry shapes: N rows, B rows that are drawn for, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lm.logprobs.kernels import at_least_float32

FORM = 2
"""Of the draws that a seed stands for, which goes into the keys of what is made of samples: 1 was transformers' own."""
BLOCK = 256
"""Tokens of the vocabulary whose probability is summed up first, to look for the drawn one in."""
GOLDEN, FIRST, SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Draws:
    """The numbers by which tokens are drawn: a function of seed, prompt, which of the prompt's rows it is, and step.

    Args:
        seed: of all.
        prompts: token ids of N rows; those of one prompt are told apart by their order.
        temperature: of the softmax, > 0.
    """

    def __init__(self, seed: int, prompts: Sequence[Sequence[int] | npt.NDArray[np.int32]], temperature: float) -> None:
        self.temperature = temperature
        counts, keys = Counter[bytes](), []
        for prompt in prompts:
            content = np.asarray(prompt, dtype=np.int64).tobytes()
            named = hashlib.blake2b(content, digest_size=8, salt=f"{seed:x}".encode()[-16:])
            named.update(counts[content].to_bytes(8, "little"))
            counts[content] += 1
            keys.append(int.from_bytes(named.digest(), "little"))
        self.keys_N = np.array(keys, dtype=np.uint64)

    def uniform(self, rows_B: npt.NDArray[np.int64], steps_B: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """[B] in [0, 1): of each of these rows its number for this step, by SplitMix64 (Steele et al. 2014)."""
        with np.errstate(over="ignore"):
            z = self.keys_N[rows_B] + (steps_B.astype(np.uint64) + np.uint64(1)) * GOLDEN
            z = (z ^ (z >> np.uint64(30))) * FIRST
            z = (z ^ (z >> np.uint64(27))) * SECOND
        z ^= z >> np.uint64(31)
        numbers: npt.NDArray[np.float64] = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return numbers

    def __call__(
        self, rows_B: npt.NDArray[np.int64], steps_B: npt.NDArray[np.int64], logits_BV: Tensor
    ) -> npt.NDArray[np.int64]:
        """[B], tokens drawn from the softmax of the logits at the temperature."""
        return drawn(logits_BV, self.temperature, self.uniform(rows_B, steps_B))


def drawn(logits_BV: Tensor, temperature: float, uniform_B: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """[B], the token at which the softmax, summed up along the vocabulary, passes each number in [0, 1).

    A token of probability 0 is never drawn. Raises FloatingPointError where a row has no probabilities.
    """
    logits_BV = at_least_float32(logits_BV)
    probs_BV = torch.softmax(logits_BV if temperature == 1 else logits_BV / temperature, 1)
    missing = -probs_BV.shape[1] % BLOCK
    blocks = torch.nn.functional.pad(probs_BV, (0, missing)) if missing else probs_BV
    blocks = blocks.view(len(blocks), -1, BLOCK)
    uniform_B1 = torch.from_numpy(uniform_B)[:, None].to(probs_BV.device)
    sums = blocks.sum(2).double().cumsum(1)
    if not bool(sums[:, -1].isfinite().all()):
        raise FloatingPointError("a token cannot be drawn: the policy's logits are not finite")
    block_B1, left_B1 = _passed(sums, uniform_B1 * sums[:, -1:])
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block_B1[:, 0]].double().cumsum(1)
    token_B1, _ = _passed(inside, left_B1)
    tokens: npt.NDArray[np.int64] = (block_B1 * BLOCK + token_B1)[:, 0].cpu().numpy()
    return tokens


def _passed(sums: Tensor, target_B1: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 1], where sums that only grow pass a target, the last place where they grow at the latest, and how far above
    the sum before that place it is."""
    below = torch.nextafter(sums[:, -1:], sums.new_zeros(()))
    target_B1 = torch.minimum(target_B1, below)
    at_B1 = torch.searchsorted(sums, target_B1, right=True)
    before = sums.gather(1, (at_B1 - 1).clamp(min=0)).where(at_B1 > 0, sums.new_zeros(()))
    return at_B1, target_B1 - before
