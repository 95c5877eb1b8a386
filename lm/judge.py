"""Judges completions pairwise, by an LLM behind an OpenAI-compatible endpoint or by the oracle: win rates."""

from __future__ import annotations

import numpy as np


def win_rates(rewards: np.ndarray, against: np.ndarray) -> dict[str, float]:
    """Shares of prompts on which the first reward is larger, equal and smaller: win, tie, loss, and n.

    Args:
        rewards: [N], of one policy's completions.
        against: [N], of another's on the same prompts, in the same order.

    Raises:
        ValueError: other shapes, no prompts, or a reward that is not finite.
    """
    rewards, against = np.asarray(rewards, dtype=float), np.asarray(against, dtype=float)
    if rewards.ndim != 1 or rewards.shape != against.shape or not len(rewards):
        raise ValueError(f"rewards and against must be of one shape [N], N > 0; got {rewards.shape}, {against.shape}")
    for name, values in (("rewards", rewards), ("against", against)):
        if not np.isfinite(values).all():
            row = int((~np.isfinite(values)).argmax())
            raise ValueError(f"{name}[{row}] is {values[row]}; every reward must be finite")
    return shares(np.sign(rewards - against))


def shares(outcomes: np.ndarray) -> dict[str, float]:
    """Of outcomes +1 (win), 0 (tie) and -1 (loss), [N]: win, tie and loss as shares of N, and n = N."""
    names = {"win": 1, "tie": 0, "loss": -1}
    return {**{name: float(np.mean(outcomes == sign)) for name, sign in names.items()}, "n": len(outcomes)}
