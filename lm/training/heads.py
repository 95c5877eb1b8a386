"""Reward heads on frozen states: a Bradley-Terry model that is linear in them is a convex problem, and is solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
class Head:
    """A linear head, and how it was found."""

    weight: Floats
    """[H], on the states as they are."""
    strength: float
    """Of the penalty that validation chose."""
    path: list[dict[str, float]]
    """For each strength: itself, the mean loss of training and of validation pairs, nats."""


def solve(differences: Floats, strength: float, start: Floats | None = None) -> Floats:
    """The head of the least mean Bradley-Terry loss ([F] eq 2) plus (strength / 2) |w|^2, by SciPy's L-BFGS.

    Args:
        differences: states of the chosen completions less those of the rejected, [N, H].
        strength: of the penalty, > 0: without it, pairs that a head orders without a fault have no minimiser.
        start: where to start, [H]; the solution does not depend on it.

    Raises:
        RuntimeError: the solver has not converged.
    """

    def objective(weight: Floats) -> tuple[float, Floats]:
        margins = differences @ weight
        value = losses.bradley_terry(margins).mean() + strength / 2 * weight @ weight
        return float(value), strength * weight - differences.T @ expit(-margins) / len(margins)

    start = np.zeros(differences.shape[1]) if start is None else start
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


def fit_head(differences: Floats, held_out: Floats, strengths: Sequence[float] = STRENGTHS) -> Head:
    """The head whose penalty has the least mean loss on held-out pairs.

    Args:
        differences: of the training pairs, as of `solve`, [N, H].
        held_out: of the validation pairs, [M, H].
        strengths: to choose from.
    """
    if not len(differences) or not len(held_out):
        raise ValueError(f"a head needs training and validation pairs, got {len(differences)} and {len(held_out)}")
    scale = float(np.sqrt(np.mean(differences**2))) or 1.0
    path, heads = [], []
    weight: Floats | None = None
    for strength in sorted(strengths, reverse=True):  # each starts at the one before, which is near
        weight = solve(differences / scale, strength, weight)
        ours, theirs = (float(losses.bradley_terry(rows @ weight / scale).mean()) for rows in (differences, held_out))
        path.append({"strength": strength, "training_loss": ours, "validation_loss": theirs})
        heads.append(weight / scale)
    best = min(range(len(path)), key=lambda i: path[i]["validation_loss"])
    return Head(heads[best], path[best]["strength"], path)


def calibration(margins: Floats, bins: int = 10) -> dict[str, Any]:
    """How far a reward model's probabilities are from what held-out labels say.

    Args:
        margins: rewards of the chosen completions less those of the rejected, [N].
        bins: of equal width in the probability of the likelier side, 1/2 to 1.

    Returns:
        The mean Bradley-Terry loss in nats, and the expected calibration error: the mean over pairs of the distance
        between a bin's mean probability and its share of pairs that are ordered right.
    """
    certain, right = expit(np.abs(margins)), (margins > 0) + 0.5 * (margins == 0)
    place = np.minimum(((certain - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = [abs(certain[place == b].sum() - right[place == b].sum()) for b in range(bins)]
    return {"loss": float(losses.bradley_terry(margins).mean()), "calibration_error": float(sum(gaps) / len(margins))}
