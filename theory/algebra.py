"""Whether an expression is 0, shown exactly and without a general simplification wherever that can be spared.

All of this is kept by expression: a check and its controls, or two claims, often ask the same.
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import cache
from typing import Any

import sympy as sp
from sympy.core.function import AppliedUndef

simplify_by_rules = cache(sp.simplify)
"""SymPy's general simplification, which tries all that it knows."""
BEYOND = (sp.Piecewise, sp.Sum, sp.Product, sp.Integral, sp.Limit, sp.Derivative)
"""What is left to it."""
ELEMENTARY = (sp.Add, sp.Mul, sp.Pow, sp.exp, sp.log, sp.Symbol, sp.Number, sp.NumberSymbol)


def elementary(expression: sp.Expr) -> bool:
    """Whether an expression consists of symbols, numbers, arithmetic, powers, exponentials and logarithms."""
    return all(isinstance(node, ELEMENTARY) for node in sp.preorder_traversal(expression))


@cache
def simplify(expression: Any) -> Any:
    """The expression, factored as a rational function of its symbols, logarithms and exponentials; where there is more
    to it, or no symbol, as SymPy simplifies it."""
    expression = sp.sympify(expression)
    if not expression.free_symbols or not elementary(expression):
        return simplify_by_rules(expression)
    rational, meant = as_rational(expression)
    return sp.factor(rational).xreplace(meant)


@cache
def limit(expression: Any, variable: sp.Symbol, point: Any, direction: str = "+") -> Any:
    """The limit: the value there, with e^-oo = 0, where it is finite, for then all is continuous; else SymPy's."""
    expression, point = sp.sympify(expression), sp.sympify(point)
    if elementary(expression) and not any(power.exp.has(variable) for power in expression.atoms(sp.Pow)):
        value = expression.xreplace({variable: point}) if point.is_finite else at_infinity(expression, variable, point)
        if value.is_finite:
            return value
    return sp.limit(expression, variable, point, direction)


def at_infinity(expression: sp.Expr, variable: sp.Symbol, point: Any) -> sp.Expr:
    """The expression with 0 for each exponential whose exponent falls linearly as the variable tends to +-oo; NaN where
    the variable is elsewhere too."""
    slopes = {power: sp.diff(sp.expand(power.exp), variable) for power in expression.atoms(sp.exp)}
    gone = {
        power: sp.Dummy()
        for power, slope in slopes.items()
        if not slope.has(variable) and (slope * point).is_extended_negative
    }
    rest = expression.xreplace(gone)
    # All at once: one after the other, d / (d + e) would become 0 / e.
    return sp.nan if rest.has(variable) else rest.xreplace(dict.fromkeys(gone.values(), sp.S.Zero))


@cache
def vanishes(expression: Any) -> bool:
    """Whether an expression is identically 0.

    One value tells most of those that are not. What is then 0 as a rational function of its symbols, logarithms,
    exponentials, powers and sums, taken as variables, is 0; of the others SymPy's simplification decides.
    """
    expression = sp.sympify(expression)
    if expression == 0:
        return True
    if expression.has(sp.Sum):
        expression = expression.replace(sp.Sum, without_factors)
        if sums_cancel(expression):
            return True
        if differs(of_three_terms(expression)):
            return False
    if not expression.has(*BEYOND):
        if differs(expression):
            return False
        if sp.expand(sp.numer(sp.together(as_rational(expression)[0]))) == 0:
            return True
    return bool(simplify_by_rules(expression) == 0)


def without_factors(term: sp.Expr, *limits: Any) -> sp.Expr:
    """The sum, with the factors in front that are the same in all its terms."""
    factor, rest = sp.factor_terms(term).as_independent(*(limit[0] for limit in limits), as_Add=False)
    return factor * sp.Sum(rest, *limits)


def sums_cancel(expression: sp.Expr) -> bool:
    """Whether an expression is 0 as a rational function of its sums, taken as variables."""
    variables = {total: sp.Dummy() for total in expression.atoms(sp.Sum)}
    return bool(sp.expand(sp.numer(sp.together(expression.xreplace(variables)))) == 0)


def of_three_terms(expression: sp.Expr) -> sp.Expr:
    """The expression with 3 for what its sums go up to, written out."""
    tops = {top for total in expression.atoms(sp.Sum) for *_, end in total.limits for top in end.free_symbols}
    return expression.subs(dict.fromkeys(tops & expression.free_symbols, 3)).doit()


def adjugate(matrix: sp.Matrix) -> tuple[sp.Matrix, sp.Expr]:
    """(adjugate, determinant), by arithmetic of polynomials: a zero is one at once, and none is searched for."""
    adj, det = matrix.to_DM().adj_det()
    return adj.to_Matrix(), adj.domain.to_sympy(det)


def differs(expression: sp.Expr) -> bool:
    """Whether an expression is real and not 0 where each of its symbols has a small value of the kind it may have. The
    values of a function that is unknown, and the entries of an array, are as free as symbols are."""
    values: dict[sp.Basic, float] = {}
    for i, leaf in enumerate(sorted(expression.atoms(sp.Symbol, AppliedUndef, sp.Indexed), key=str)):
        value = 2.0 + i if leaf.is_integer else (2 * i + 3) / (12 * i + 19)
        values[leaf] = -value if leaf.is_negative else value
    largest = 1.0  # of what is added up, which says what rounding may do

    def number(node: sp.Basic) -> float:
        nonlocal largest
        if node not in values:
            if node.is_Number or isinstance(node, sp.NumberSymbol):
                values[node] = float(node)
            elif isinstance(node, sp.Add | sp.Mul):
                parts = [number(part) for part in node.args]
                values[node] = math.fsum(parts) if node.is_Add else math.prod(parts)
                largest = max(largest, *map(abs, parts))
            elif isinstance(node, sp.Pow):
                values[node] = math.pow(*map(number, node.args))
            elif isinstance(node, sp.exp | sp.log):
                values[node] = (math.exp if isinstance(node, sp.exp) else math.log)(number(node.args[0]))
            else:
                raise ValueError(f"no number is made of {node}")
        return values[node]

    try:
        return abs(number(expression)) > 1e-9 * largest  # not true of NaN
    except (ValueError, TypeError, ArithmeticError):  # not real there, or no such function here
        return False


def as_rational(expression: sp.Expr) -> tuple[sp.Expr, dict[sp.Symbol, sp.Expr]]:
    """The expression with a variable for each e^m and b^m, where m is a monomial of the exponents: e^(2x - y/3) is then
    X^2 / Y; and what each variable stands for. It may have lost relations between those, but what is 0 of it is 0."""
    expression = sp.expand_log(expression)
    powers = {atom: atom.as_base_exp() for atom in expression.atoms(sp.exp, sp.Pow) if not atom.exp.is_Integer}

    def factor(base: sp.Expr, term: sp.Expr) -> tuple[sp.Expr, sp.Expr, sp.Rational]:
        coefficient, monomial = term.as_coeff_Mul(rational=True)
        logs = [x for x in sp.Mul.make_args(monomial) if isinstance(x, sp.log)]
        if base == sp.E and len(logs) == 1:  # e^(log(b) m) is b^m
            base, monomial = logs[0].args[0], monomial / logs[0]
        return base, monomial, coefficient

    terms = {
        atom: [factor(base, term) for term in sp.Add.make_args(sp.expand(exponent))]
        for atom, (base, exponent) in powers.items()
    }
    parts: dict[tuple[sp.Expr, sp.Expr], int] = defaultdict(lambda: 1)  # (b, m) -> k, the variable being b^(m / k)
    for base, monomial, coefficient in (term for of_atom in terms.values() for term in of_atom):
        parts[base, monomial] = math.lcm(parts[base, monomial], int(coefficient.q))
    variables = {part: sp.Dummy(positive=True) for part in parts}

    def power(base: sp.Expr, m: sp.Expr, c: sp.Rational) -> sp.Expr:
        return base**c if m == 1 and c.is_Integer else variables[base, m] ** (c * parts[base, m])

    known = {atom: sp.prod([power(*term) for term in of_atom]) for atom, of_atom in terms.items()}
    meant = {variables[base, m]: base ** (m / parts[base, m]) for base, m in variables}
    return expression.xreplace(known), meant
