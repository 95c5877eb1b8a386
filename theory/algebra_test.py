"""What is 0 is found to be, by whichever of the three ways; what is not, is not."""

from __future__ import annotations

from typing import Any

import pytest
import sympy as sp
from sympy.core.cache import CACHE

from theory import algebra
from theory.algebra import as_rational, differs, limit, simplify, vanishes
from theory.testing import SYMPY_CACHE

A, B = sp.symbols("a b", positive=True)
X, Y = sp.symbols("x y", real=True)
N, M, K = sp.symbols("n m k", integer=True, positive=True)

ZERO = [
    0,
    (A + B) ** 2 - A**2 - 2 * A * B - B**2,
    1 / (1 + sp.exp(-X)) - sp.exp(X) / (1 + sp.exp(X)),
    sp.exp(X + Y) / (1 + sp.exp(X / 2)) - sp.exp(Y) * sp.exp(X) / (1 + sp.sqrt(sp.exp(X))),
    sp.log(A / B) - sp.log(A) + sp.log(B),
    (1 - A) ** (B + 2) / (1 - A) - (1 - A) ** (1 + B),
    A ** (1 / B) * A ** (-1 / B) - 1,
    sp.exp(B * (sp.log(A) - X) / B) - A * sp.exp(-X),
    sp.exp(2 * X * sp.log(A)) - (A**X) ** 2,
    sp.Sum(A * sp.exp(N * X) / B, (N, 1, K)) / sp.Sum(sp.exp(N * X), (N, 1, K)) - A / B,
    sp.Sum(A * N * K, (N, 1, K)) - A * K * sp.Sum(N, (N, 1, K)),
    sp.Sum(A * N * M, (M, 1, N), (N, 1, K)) - A * sp.Sum(N * M, (M, 1, N), (N, 1, K)),
]
SIMPLIFIED = [
    sp.sin(X) ** 2 + sp.cos(X) ** 2 - 1,
    sp.Piecewise((0, X < 0), (A - A * sp.exp(0 * X), True)),
    sp.sqrt(8) - 2 * sp.sqrt(2),
]
OTHER = [
    sp.Rational(1, 10**6),
    A - B,
    sp.exp(X) - sp.exp(-X),
    sp.log(1 + A) - A,
    sp.exp(2 * X) - sp.exp(X) ** 3,
    (-1) ** N,
    sp.Function("f")(X) - X,
    sp.log(A - 1),
    sp.Sum(N, (N, 1, 3)),
    sp.Sum(N**2, (N, 1, K)) - K * sp.Sum(N, (N, 1, K)),
]


@pytest.mark.parametrize("expression", [*ZERO, *SIMPLIFIED], ids=str)
def test_what_is_zero(expression: Any) -> None:
    assert vanishes(expression)
    assert not vanishes(expression + A)
    assert not differs(sp.sympify(expression))


@pytest.mark.parametrize("expression", ZERO, ids=str)
def test_what_is_shown_without_simplifying(expression: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algebra, "simplify_by_rules", None)
    assert vanishes.__wrapped__(expression)


@pytest.mark.parametrize("expression", OTHER, ids=str)
def test_what_is_not_zero(expression: Any) -> None:
    assert not vanishes(expression)


def test_a_small_difference_is_not_taken_for_none() -> None:
    """Below what a value can tell, it is the algebra that decides."""
    assert not differs(A - A * (1 + sp.Rational(1, 10**30)))
    assert not vanishes(A - A * (1 + sp.Rational(1, 10**30)))


def test_values_outside_of_a_logarithms_domain_tell_nothing() -> None:
    assert not differs(sp.log(A - 1) + sp.log(1 - B))


def test_exponentials_become_powers_of_as_few_variables_as_there_are_monomials() -> None:
    expression = sp.exp(2 * X - Y / 3) + sp.exp(-X) + sp.exp(Y)
    rational, meant = as_rational(expression)
    assert sp.powsimp(rational.xreplace(meant)) == expression
    assert not rational.has(sp.exp)
    assert len(rational.free_symbols) == 2


@pytest.mark.parametrize(
    ("expression", "factored"),
    [
        (sp.diff(sp.log(1 + sp.exp(-A * X)), X), -A / (1 + sp.exp(A * X))),
        (sp.exp(2 * X) / (sp.exp(X) + 1) - 1 / (1 + sp.exp(X)), sp.exp(X) - 1),
        (A**2 - B**2, (A - B) * (A + B)),
        (sp.sin(X) ** 2 + sp.cos(X) ** 2, sp.S.One),
    ],
    ids=str,
)
def test_what_is_factored(expression: Any, factored: Any) -> None:
    assert simplify(expression) == factored


LIMITS = [
    (sp.log(1 + sp.exp(-A * (X - Y))), X, sp.oo, 0),
    (sp.log(1 + sp.exp(-A * (X - Y))), X, -sp.oo, sp.oo),
    (B / (1 + sp.exp(A * X)), X, -sp.oo, B),
    (1 / (1 + A), A, 0, 1),
    (A * sp.log(A), A, 0, 0),
    (1 / A, A, 0, sp.oo),
    (A ** (1 / sp.log(A)), A, 0, sp.E),
    (sp.exp(-A) * sp.exp(2 * A), A, sp.oo, sp.oo),
    (X * sp.exp(-X), X, sp.oo, 0),
    ((1 + sp.exp(X)) * sp.exp(-X), X, sp.oo, 1),
    ((1 + 1 / A) ** A, A, sp.oo, sp.E),
    (sp.exp(-1 / A), A, 0, 0),
    (sp.exp(-X) / (sp.exp(-X) + sp.exp(-2 * X)), X, sp.oo, 1),
]


@pytest.mark.parametrize(("expression", "variable", "point", "value"), LIMITS, ids=str)
def test_limits(expression: Any, variable: Any, point: Any, value: Any) -> None:
    assert limit(expression, variable, point) == value


def test_a_limit_that_is_a_value_needs_no_series(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sp, "limit", None)
    for expression, variable, point, value in LIMITS[0], LIMITS[2], LIMITS[3]:
        assert limit.__wrapped__(expression, variable, point) == value


def test_sympy_keeps_what_the_profile_asks_for() -> None:
    """It reads the size when it is imported: nothing may import it before the profile is loaded."""
    assert {function.cache_info().maxsize for function in CACHE} == {int(SYMPY_CACHE)}
