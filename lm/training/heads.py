"""Reward heads on frozen states: a Bradley-Terry model that is linear in them is a convex problem, and is solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit

from theory import losses

Floats = npt.NDArray[np.float64]
STRENGTHS = tuple(float(10**power) for power in np.arange(-5.0, 2.5, 0.5))
"""Of the L2 penalty, from which validation pairs choose; in units where a difference of states has mean square 1."""


@dataclass(frozen=True)
class Pairs:
    """What a head learns from, or is chosen by."""

    differences: Floats
    """States of the chosen completions less those of the rejected, [N, H]."""
    probabilities: Floats | None = None
    """That the chosen side is preferred, [N]; None: 1."""
    weights: Floats | None = None
    """[N], > 0; None: 1."""

    def loss(self, margins: Floats) -> float:
        """Mean Bradley-Terry loss ([F] eq 2) of these reward margins, both directions by their probabilities, nats."""
        return float(np.average(_expected(margins, self.probabilities), weights=self.weights))

    def gradient(self, margins: Floats) -> Floats:
        """Of `loss` in the head's weight, [H]."""
        certain = 1.0 if self.probabilities is None else self.probabilities
        each = expit(margins) - certain
        weights = np.ones(len(margins)) if self.weights is None else self.weights
        slope: Floats = self.differences.T @ (weights * each) / weights.sum()
        return slope


def _expected(margins: Floats, probabilities: Floats | None) -> Floats:
    won: Floats = losses.bradley_terry(margins)
    return won if probabilities is None else probabilities * won + (1 - probabilities) * losses.bradley_terry(-margins)


@dataclass(frozen=True)
class Head:
    """A linear head, and how it was found."""

    weight: Floats
    """[H], on the states as they are."""
    strength: float
    """Of the penalty that validation chose."""
    path: list[dict[str, float]]
    """For each strength: itself, the mean loss of training and of validation pairs, nats."""


def solve(pairs: Pairs, strength: float, start: Floats | None = None) -> Floats:
    """The head of the least `Pairs.loss` plus (strength / 2) |w|^2, by SciPy's L-BFGS.

    Args:
        pairs: N of them.
        strength: of the penalty, > 0: without it, pairs that a head orders without a fault have no minimiser.
        start: where to start, [H]; the solution does not depend on it.

    Raises:
        RuntimeError: the solver has not converged.
    """

    def objective(weight: Floats) -> tuple[float, Floats]:
        margins = pairs.differences @ weight
        value = pairs.loss(margins) + strength / 2 * float(weight @ weight)
        return value, strength * weight + pairs.gradient(margins)

    start = np.zeros(pairs.differences.shape[1]) if start is None else start
    found = minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 10_000, "maxfun": 20_000, "ftol": 1e-14, "gtol": 1e-9},
    )
    if not found.success and np.abs(found.jac).max() > 1e-6:
        raise RuntimeError(f"the reward head did not converge: {found.message}, gradient {np.abs(found.jac).max():.2g}")
    solution: Floats = found.x
    return solution


def fit_head(training: Pairs, held_out: Pairs, strengths: Sequence[float] = STRENGTHS) -> Head:
    """The head whose penalty has the least mean loss on held-out pairs, of these strengths.

    Raises ValueError where there are no pairs to learn from or to choose by.
    """
    counts = [len(pairs.differences) for pairs in (training, held_out)]
    if not all(counts):
        raise ValueError(f"a head needs training and validation pairs, got {counts[0]} and {counts[1]}")
    scale = float(np.sqrt(np.mean(training.differences**2))) or 1.0
    scaled = replace(training, differences=training.differences / scale)
    path, heads = [], []
    weight: Floats | None = None
    for strength in sorted(strengths, reverse=True):  # each starts at the one before, which is near
        weight = solve(scaled, strength, weight)
        ours, theirs = (pairs.loss(pairs.differences @ weight / scale) for pairs in (training, held_out))
        path.append({"strength": strength, "training_loss": ours, "validation_loss": theirs})
        heads.append(weight / scale)
    best = min(range(len(path)), key=lambda i: path[i]["validation_loss"])
    return Head(heads[best], path[best]["strength"], path)


def calibration(margins: Floats, probabilities: Floats | None = None, bins: int = 10) -> dict[str, Any]:
    """How far a reward model's probabilities are from what held-out labels say. A pair counts once.

    Args:
        margins: rewards of the chosen completions less those of the rejected, [N].
        probabilities: that the chosen side is preferred, [N]; None: 1.
        bins: of equal width in the probability of the likelier side, 1/2 to 1.

    Returns:
        The mean Bradley-Terry loss in nats, and the expected calibration error: the mean over pairs of the distance
        between a bin's mean probability and its share of pairs that are ordered right.
    """
    certain, labels = expit(np.abs(margins)), np.ones(len(margins)) if probabilities is None else probabilities
    right = np.where(margins > 0, labels, np.where(margins < 0, 1 - labels, 0.5))
    place = np.minimum(((certain - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = [abs(certain[place == b].sum() - right[place == b].sum()) for b in range(bins)]
    return {
        "loss": float(_expected(margins, probabilities).mean()),
        "calibration_error": float(sum(gaps) / len(margins)),
    }
