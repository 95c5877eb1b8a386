"""The elimination against linear algebra in sixty digits."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest

from bandits.newton import Layout, dense_direction
from bandits.objectives import Floats

ARMS = 6
PAIRS = np.array([(0, 1), (1, 2), (2, 0), (2, 3), (4, 3), (5, 4), (0, 4), (5, 0)])


def problem(seed: int) -> tuple[Layout, Floats, Floats, Floats, Floats]:
    """Arms 0, 1, 2 trade 1e12 times as much with one another, round in a circle, as with the rest."""
    rng = np.random.default_rng(seed)
    column = np.log(np.full((ARMS, 1), 1 / ARMS))
    pairs = PAIRS[rng.permutation(len(PAIRS))]
    inside = np.all(pairs < 3, axis=1, keepdims=True)
    layout = Layout(pairs[:, :1], pairs[:, 1:], np.ones((len(pairs), 1)), column, np.zeros((ARMS, 1), dtype=np.int8))
    curvature = rng.uniform(1, 2, inside.shape) * np.where(inside, 1.0, 1e-12)
    flow = rng.normal(size=inside.shape) * np.where(inside, 1.0, 1e-12)
    return layout, curvature, rng.uniform(1, 2, column.shape) * 1e-12, rng.normal(size=column.shape) * 1e-12, flow


def exact(layout: Layout, curvature: Floats, diagonal: Floats, rhs: Floats, flow: Floats) -> Floats:
    """The solution of (B' C B + diagonal) d = rhs + B' flow."""
    with mpmath.workdps(60):
        matrix, right = mpmath.diag([mpmath.mpf(float(x)) for x in diagonal[:, 0]]), mpmath.matrix(rhs[:, 0].tolist())
        for pair, (winner, loser) in enumerate(zip(layout.winners[:, 0], layout.losers[:, 0], strict=True)):
            for arm, other, sign in ((int(winner), int(loser), 1), (int(loser), int(winner), -1)):
                matrix[arm, arm] += float(curvature[pair, 0])
                matrix[arm, other] -= float(curvature[pair, 0])
                right[arm] += sign * mpmath.mpf(float(flow[pair, 0]))
        return np.array([float(x) for x in mpmath.lu_solve(matrix, right)])[:, None]


@pytest.mark.parametrize("seed", range(5))
def test_flows_that_cancel_are_not_lost(seed: int) -> None:
    layout, curvature, diagonal, rhs, flow = problem(seed)
    wanted = exact(layout, curvature, diagonal, rhs, flow)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(dense_direction(layout, curvature, diagonal, rhs, flow), wanted, atol=1e-12 * scale)
    summed = dense_direction(layout, curvature, diagonal, rhs + layout.scatter(flow))
    assert np.abs(summed - wanted).max() > 1e-7 * scale, "summed by arm, they are"
    unsigned: Any = dense_direction(layout, curvature, diagonal, rhs, np.abs(flow))
    assert np.abs(unsigned - wanted).max() > 1e-2 * scale


def test_direction_without_flows() -> None:
    layout, curvature, diagonal, rhs, flow = problem(0)
    wanted = exact(layout, curvature, diagonal, rhs, 0 * flow)
    np.testing.assert_allclose(dense_direction(layout, curvature, diagonal, rhs), wanted, rtol=1e-12)
