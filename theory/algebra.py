"""Whether an expression is 0, shown exactly and without a general simplification wherever that can be spared."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import sympy as sp
from sympy.core.function import AppliedUndef

BEYOND = (sp.Piecewise, sp.Sum, sp.Product, sp.Integral, sp.Limit, sp.Derivative)
"""What is left to SymPy's own simplification."""


def vanishes(expression: Any) -> bool:
    """Whether an expression is identically 0.

    One value tells most of those that are not. What is then 0 as a rational function of its symbols, logarithms,
    exponentials and powers, taken as variables, is 0; of the others SymPy's simplification decides.
    """
    expression = sp.sympify(expression)
    if expression == 0:
        return True
    if not expression.has(*BEYOND):
        if differs(expression):
            return False
        if sp.expand(sp.numer(sp.together(as_rational(expression)))) == 0:
            return True
    return bool(sp.simplify(expression) == 0)


def differs(expression: sp.Expr) -> bool:
    """Whether an expression is real and not 0 where each of its symbols has a small value of the kind it may have. The
    values of a function that is unknown are as free as symbols are."""
    unknown = sorted(expression.atoms(AppliedUndef), key=str)
    expression = expression.xreplace({value: sp.Symbol(f"value {i}") for i, value in enumerate(unknown)})
    point: dict[sp.Symbol, sp.Rational] = {}
    for i, symbol in enumerate(sorted(expression.free_symbols, key=str)):
        value = sp.Integer(2 + i) if symbol.is_integer else sp.Rational(2 * i + 3, 12 * i + 19)
        point[symbol] = -value if symbol.is_negative else value
    value = expression.evalf(20, subs=point, maxn=60)
    return bool(value.is_Float and value.is_finite and abs(value) > 1e-9)


def as_rational(expression: sp.Expr) -> sp.Expr:
    """The expression with a variable for each e^m and b^m, where m is a monomial of the exponents: e^(2x - y/3) is then
    X^2 / Y. It may have lost relations between those, but what is 0 of it is 0."""
    expression = sp.expand_log(expression)
    powers = {atom: atom.as_base_exp() for atom in expression.atoms(sp.exp, sp.Pow) if not atom.exp.is_Integer}
    terms = {
        atom: [(base, *term.as_coeff_Mul(rational=True)[::-1]) for term in sp.Add.make_args(sp.expand(exponent))]
        for atom, (base, exponent) in powers.items()
    }
    parts: dict[tuple[sp.Expr, sp.Expr], int] = defaultdict(lambda: 1)  # (b, m) -> k, the variable being b^(m / k)
    for base, monomial, coefficient in (term for of_atom in terms.values() for term in of_atom):
        parts[base, monomial] = math.lcm(parts[base, monomial], int(coefficient.q))
    variables = {part: sp.Dummy(positive=True) for part in parts}

    def power(base: sp.Expr, m: sp.Expr, c: sp.Rational) -> sp.Expr:
        return base**c if m == 1 and c.is_Integer else variables[base, m] ** (c * parts[base, m])

    return expression.xreplace({atom: sp.prod([power(*term) for term in of_atom]) for atom, of_atom in terms.items()})
