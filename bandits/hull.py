"""The limit of hull-DPO for alpha -> 0: of all mixtures that fit best, the one whose policy is closest to pi_ref.

Without a KL term the residuals of a mixture's best policy are the mixture of the members' residuals. The mixtures that
fit best are then a face of the simplex, {w >= 0, E w = E w0}, often more than a point (all of it where every member is
a reward of the arms on a connected graph). There alpha -> 0 picks the least KL(pi_ref || pi_w), convex in w.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import null_space, solve_triangular
from scipy.optimize import linprog, nnls

from bandits.newton import Layout
from bandits.objectives import Floats

_MAX_ITERATIONS = 200
_SAME = 1e-10  # relative: singular values, and residuals, that rounding makes
_RIDGE = 1e-9
_GONE = 1e-14
_ACCEPTED_SLOPE = 0.1
_SHORTEST_STEP = 1e-12
_MOVES = 1e-6  # beyond the tolerance of the linear programs
_TINY = np.finfo(np.float64).tiny


def best_mixture(residuals: Floats) -> Floats:
    """Weights on the simplex whose mixture of the residuals, [m, K], is shortest, [K].

    As in `theory.backend`: |E w t|^2 + (t - 1)^2 over w on the simplex and t >= 0 is least at the shortest mixture.
    """
    k = residuals.shape[1]
    unit = max(float(np.abs(residuals).max(initial=0.0)), _TINY)
    scaled = residuals / unit
    point, _ = nnls(np.vstack([scaled, np.ones(k)]), np.append(np.zeros(len(scaled)), 1.0))
    return np.asarray(point / point.sum())


def face_directions(residuals: Floats, scale: float) -> Floats:
    """[K, d], orthonormal: how weights can change and leave the mixture of the residuals and their sum as they are.

    Args:
        residuals: [m, K].
        scale: of the members themselves, to which the residuals' rounding errors are relative.
    """
    rows = np.vstack([residuals / max(scale, _TINY), np.ones((1, residuals.shape[1]))])
    directions = null_space(np.where(np.abs(rows) <= _SAME, 0.0, rows), rcond=_SAME)
    return np.asarray(np.where(np.abs(directions) <= _SAME, 0.0, directions))  # or multipliers would act through them


def closest_mixture(logratios: Floats, layout: Layout, weights: Floats, directions: Floats) -> tuple[Floats, float]:
    """Newton's method for the mixture of least KL(pi_ref || pi_w) among weights + directions z that are >= 0.

    Args:
        logratios: u of the members' policies, [K, n], which differ; that of a mixture is their mixture, normalised by
            component.
        layout: of the one problem.
        weights: where to start, [K].
        directions: [K, d].

    Returns:
        The weights, and how far they are from the optimality conditions: the least norm of a gradient along the face
        that no multiplier of a weight of zero explains, relative to the members' spread.
    """
    support = layout.ref[:, 0] > 0
    members, ref = np.where(support, logratios, 0.0), layout.ref[:, 0]
    spread = float(np.ptp(members, axis=0).max())

    def gradient_and_policy(weights: Floats) -> tuple[Floats, Floats]:
        _, pi = layout.normalise((weights @ members)[:, None])
        return members @ (pi[:, 0] - ref), pi[:, 0]

    def unexplained(weights: Floats, gradient: Floats) -> float:
        zero, along = weights <= _GONE, directions.T @ gradient
        return float(nnls(directions[zero].T, along)[1] if zero.any() else np.linalg.norm(along)) / spread

    gradient, pi = gradient_and_policy(weights)
    best = weights, unexplained(weights, gradient)
    for _ in range(_MAX_ITERATIONS):
        step_to = _face_step(directions, weights, gradient, _hessian(members, pi, layout))
        step = 1.0
        while True:
            trial = weights + step * step_to
            trial = np.where(trial <= _GONE, 0.0, trial)  # rounding errors, of both signs
            new_gradient, new_pi = gradient_and_policy(trial)
            slope = float(new_gradient @ step_to)
            if slope <= _ACCEPTED_SLOPE * abs(float(gradient @ step_to)) or step < _SHORTEST_STEP:
                break
            step /= 2  # past the minimum along a convex function
        weights, gradient, pi = trial, new_gradient, new_pi
        left = unexplained(weights, gradient)
        if left >= 0.5 * best[1]:
            best = min(best, (weights, left), key=lambda pair: pair[1])
            if left <= _SAME or step < _SHORTEST_STEP:
                break
        else:
            best = weights, left
    chosen, left = best
    return np.asarray(chosen / chosen.sum()), left


def moves(directions: Floats, margins: Floats, scale: float) -> bool:
    """Whether log-ratio margins [K, m] change along any of these directions [K, d]; below 1e-8 scale they do not."""
    return bool(np.abs(directions.T @ margins).max(initial=0.0) > 100 * _SAME * scale)


def face_moves(weights: Floats, directions: Floats, margins: Floats, scale: float) -> bool:
    """Whether the margins of the mixtures on the face {weights + directions z >= 0} are *not* shown to be all the same.

    Arguments as above, and a point of the face, [K].
    """

    def along(free: Any) -> Floats:
        fixed = directions[~free]
        return np.asarray(directions @ null_space(fixed, rcond=_SAME)) if len(fixed) else directions

    free = weights > _MOVES
    if moves(along(free), margins, scale) or not moves(directions, margins, scale):
        return moves(directions, margins, scale)
    for row in np.flatnonzero(~free):  # the largest value of this weight on the face
        largest = linprog(-directions[row], A_ub=-directions, b_ub=weights, bounds=(None, None), method="highs")
        free[row] = not largest.success or weights[row] - largest.fun > _MOVES
    return moves(along(free), margins, scale)


def _hessian(members: Floats, pi: Floats, layout: Layout) -> Floats:
    """Of the KL in the weights, [K, K]: the covariance of the members under the policy of each component, by mass."""
    labels = layout.components
    mass = np.maximum(np.bincount(labels, pi), _TINY)
    means = np.array([np.bincount(labels, pi * row)[labels] / mass[labels] for row in members])
    centred = members - means
    return np.asarray((centred * pi) @ centred.T)


def _face_step(directions: Floats, weights: Floats, gradient: Floats, hessian: Floats) -> Floats:
    """The d = directions z, weights + d >= 0, that minimises gradient.d + d' hessian d / 2, [K].

    As a least-distance program, by non-negative least squares (Lawson and Hanson 1974, chapter 23): with A = L L' the
    reduced Hessian and x = L' z + L^-1 g, it asks for the shortest x with G x >= h.
    """
    reduced = directions.T @ hessian @ directions
    size = len(reduced)
    reduced += (_RIDGE * float(np.trace(reduced)) / size + _TINY) * np.eye(size)
    lower = np.linalg.cholesky(reduced)
    shift = solve_triangular(lower, directions.T @ gradient, lower=True)
    rows: Any = solve_triangular(lower, directions.T, lower=True).T
    bounds = rows @ shift - weights
    target = np.zeros(size + 1)
    target[-1] = 1.0
    unit = max(1.0, float(np.abs(bounds).max()))
    system = np.vstack([rows.T, bounds / unit])
    multipliers, _ = nnls(system, target)
    # What carries a multiplier goes to zero. Solved once more with that for an equation: least distances lose digits.
    zero = multipliers > 0
    if not zero.any():
        return np.asarray(directions @ np.linalg.solve(reduced, -directions.T @ gradient))
    z = np.linalg.lstsq(directions[zero], -weights[zero], rcond=_SAME)[0]
    rest = null_space(directions[zero], rcond=_SAME)
    slope = rest.T @ (directions.T @ gradient + reduced @ z)
    z = z - rest @ np.linalg.solve(rest.T @ reduced @ rest, slope)
    return np.asarray(np.where(zero, -weights, directions @ z))
