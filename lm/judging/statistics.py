"""Intervals, tests and win rates over prompts."""

from __future__ import annotations

import numpy as np
from scipy import stats
from scipy.special import comb

SIGNS = {"win": 1, "tie": 0, "loss": -1}


def bootstrap_interval(values: np.ndarray, confidence: float, resamples: int, seed: int) -> list[float]:
    """Percentile bootstrap interval of the mean over prompts."""
    if np.ptp(values) == 0:
        return [float(values[0]), float(values[0])]
    interval = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        batch=1000,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return [float(interval.low), float(interval.high)]


def wald(differences: np.ndarray) -> dict[str, float | None]:
    """Two-sided Wald test that a mean paired difference is zero: mean, z and p. z and p are None without variance."""
    mean = float(differences.mean())
    error = float(differences.std(ddof=1) / np.sqrt(len(differences))) if len(differences) > 1 else 0.0
    if error == 0:
        return {"difference": mean, "z": None, "p": None}
    z = mean / error
    return {"difference": mean, "z": z, "p": float(2 * stats.norm.sf(abs(z)))}


def best_of(rewards: np.ndarray, n: int) -> np.ndarray:
    """Mean reward of the best of n samples, over all choices of n among the R that there are, [N].

    The r-th smallest is the best of C(r - 1, n - 1) of the C(R, n) choices, which is unbiased for every n <= R.

    Args:
        rewards: [N, R], of R samples of one policy on each of N prompts.
        n: from 1 to R.

    Raises:
        ValueError: another n.
    """
    samples = rewards.shape[1]
    if not 1 <= n <= samples:
        raise ValueError(f"n must be from 1 to the {samples} samples that there are of a prompt, got {n}")
    weights = comb(np.arange(samples), n - 1) / comb(samples, n)
    expected: np.ndarray = np.sort(rewards, axis=1) @ weights
    return expected


def win_rates(rewards: np.ndarray, against: np.ndarray) -> dict[str, float]:
    """Shares of prompts on which the first reward is larger, equal and smaller: win, tie, loss, and n.

    Args:
        rewards: [N], of one policy's completions.
        against: [N], of another's on the same prompts, in the same order.

    Raises:
        ValueError: other shapes, no prompts, or a reward that is not finite.
    """
    outcomes = compare(rewards, against)
    return {**{name: float(np.mean(outcomes == sign)) for name, sign in SIGNS.items()}, "n": len(outcomes)}


def compare(rewards: np.ndarray, against: np.ndarray) -> np.ndarray:
    """+1 where the first reward is larger, 0 where both are equal, -1 where it is smaller, [N]."""
    rewards, against = np.asarray(rewards, dtype=float), np.asarray(against, dtype=float)
    if rewards.ndim != 1 or rewards.shape != against.shape or not len(rewards):
        raise ValueError(f"rewards and against must be of one shape [N], N > 0; got {rewards.shape}, {against.shape}")
    for name, values in (("rewards", rewards), ("against", against)):
        if not np.isfinite(values).all():
            row = int((~np.isfinite(values)).argmax())
            raise ValueError(f"{name}[{row}] is {values[row]}; every reward must be finite")
    outcomes: np.ndarray = np.sign(rewards - against)
    return outcomes
