"""The constants against numerical maxima, and what is refused. That the optimum stays within: `alpha-budget`."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from scipy.optimize import minimize_scalar
from scipy.special import lambertw

from theory import budget, losses


def largest(loss: Callable[[Any], Any], scale: float) -> float:
    """max over z of -z f'(z), the slope by central differences."""

    def negative(z: float) -> float:
        step = 1e-5 * scale
        return float(z * (loss(z + step) - loss(z - step)) / (2 * step))

    found = minimize_scalar(negative, bounds=(0, 10 * scale), method="bounded", options={"xatol": 1e-9 * scale})
    return float(-found.fun)


@pytest.mark.parametrize("parameter", [0.1, 1.0, 7.0])
def test_constants_are_the_largest_products(parameter: float) -> None:
    assert largest(lambda z: losses.dpo(z, beta=parameter), 1 / parameter) == pytest.approx(budget.DPO, rel=1e-7)
    ipo = largest(lambda z: losses.ipo(z, tau=parameter), 1 / parameter)
    assert ipo == pytest.approx(budget.ipo_constant(tau=parameter), rel=1e-7)
    one = largest(lambda z: losses.distillation(z, 3.0, beta=parameter), 1 / parameter)
    assert one == pytest.approx(budget.distillation_constant([3.0]), rel=1e-7)


def test_values() -> None:
    assert math.isclose(budget.DPO, lambertw(math.exp(-1)).real, rel_tol=1e-15)
    assert budget.DPO * math.exp(budget.DPO) == pytest.approx(math.exp(-1), rel=1e-15)
    assert budget.distillation_constant(iter([1.0, -3.0])) == 2.5
    assert budget.alpha_for_budget(2.0, budget.DPO) == pytest.approx(0.1392, abs=5e-5)
    assert budget.divergence_bound(budget.alpha_for_budget(0.3, 2.0), 2.0) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: budget.alpha_for_budget(0.0, budget.DPO), "budget must be a finite number > 0, got 0.0"),
        (lambda: budget.alpha_for_budget(1.0, -1.0), "constant must be a finite number > 0, got -1.0"),
        (lambda: budget.divergence_bound(math.inf, 1.0), "alpha must be a finite number > 0, got inf"),
        (lambda: budget.ipo_constant(tau=math.nan), "tau must be a finite number > 0, got nan"),
        (lambda: budget.distillation_constant([]), "reward_margins must be at least one finite number, got 0"),
        (lambda: budget.distillation_constant([1.0, math.inf]), "got 2 with mean square inf"),
    ],
)
def test_bad_input(call: Callable[[], float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_it_needs_neither_sympy_nor_numpy() -> None:
    code = "import sys, theory.budget; print({'sympy', 'numpy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
