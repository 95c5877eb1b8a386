"""The solver's values, slopes and curvatures are those of `theory.losses`, from both tails to the middle."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest
import sympy as sp

from bandits.objectives import DPO, IPO, Distillation, EnsembleHull, EnsembleMin
from theory import losses

MARGINS = np.array([-80.0, -3.0, -1e-3, 0.0, 0.25, 4.0, 300.0])
SCALE, TARGET = 1.7, 0.6

_DELTA = sp.Symbol("Delta", real=True)
CASES: dict[str, tuple[Any, Any]] = {
    "dpo": (DPO(beta=SCALE), losses.dpo(_DELTA, beta=sp.Float(SCALE, 60))),
    "ipo": (IPO(tau=TARGET), losses.ipo(_DELTA, tau=sp.Float(TARGET, 60))),
    "distillation": (
        Distillation(beta=SCALE, reward_margins=np.full(len(MARGINS), TARGET)),
        losses.distillation(_DELTA, sp.Float(TARGET, 60), beta=sp.Float(SCALE, 60)),
    ),
}


def agrees(ours: np.ndarray, expression: sp.Expr) -> bool:
    """To 1e-13 of SymPy's expression at 400 digits, relative, at every margin."""
    with mpmath.workdps(400):
        exact = [sp.N(expression.subs(_DELTA, sp.Float(float(margin), 400)), 400) for margin in MARGINS]
        return all(
            abs(got - want) <= 1e-13 * abs(want) + 1e-300 for got, want in zip(ours.tolist(), exact, strict=True)
        )


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_the_loss(name: str) -> None:
    objective, loss = CASES[name]
    by_margin = objective.pair_loss().derivatives(MARGINS)
    assert agrees(objective.pair_loss().value(MARGINS), loss)
    assert agrees(by_margin.slope, sp.diff(loss, _DELTA))
    assert agrees(np.array(by_margin.curvature), sp.diff(loss, _DELTA, 2))
    assert (by_margin.magnitude >= np.abs(by_margin.slope)).all()
    assert not agrees(-by_margin.slope, sp.diff(loss, _DELTA))
    assert not agrees(by_margin.slope, sp.diff(loss, _DELTA) / SCALE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPO(beta=0), "beta must be a finite number > 0, got 0"),
        (lambda: DPO(beta=-1.5), "beta must be a finite number > 0, got -1.5"),
        (lambda: DPO(beta=np.array([1.0, np.inf])), "beta must be a finite number > 0, got .*inf"),
        (lambda: IPO(tau=float("nan")), "tau must be a finite number > 0, got nan"),
        (lambda: IPO(tau="0.5"), "tau must be a finite number > 0, got '0.5'"),
        (lambda: Distillation(beta=True, reward_margins=[1.0]), "beta must be a finite number > 0, got True"),
        (lambda: Distillation(beta=1, reward_margins=[1, np.inf]), "reward margin of pair 1 must be finite, got inf"),
        (lambda: EnsembleMin(beta=1, reward_margins=[1.0]), r"shape \[K, m\], K >= 1, got \(1,\)"),
        (lambda: EnsembleHull(beta=1, reward_margins=[[0.0, np.nan]]), "reward margin of pair 1 must be finite"),
    ],
)
def test_bad_parameters(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
