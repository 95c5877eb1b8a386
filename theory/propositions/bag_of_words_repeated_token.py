"""DPO on a bag-of-words policy: the mass goes to strings over the tokens whose count differs the most.

Model and notation as in `theory.propositions.bag_of_words_winner`: theta^t = s(t) D, s increasing to infinity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import product
from math import prod
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import algebra, losses
from theory.algebra import simplify, vanishes
from theory.claim import Claim, require
from theory.propositions.bag_of_words_winner import (
    BOTH_WAYS,
    PAIRS,
    UNEQUAL,
    Counts,
    bound_slope,
    check_ray,
    check_unbounded,
    count_pairs,
    count_vectors,
    descend,
    difference,
    gradient_step,
    log_likelihood,
    log_normaliser,
)

S = sp.Symbol("s", nonnegative=True)


# ---------------------------------------------------------------- checks


def check_gap(token_term: Callable[[Any, Any, Any], Any]) -> None:
    """log pi(y_w) - log pi(yhat) = s k token by token: the normaliser cancels, what is left is s sum_j c_j (D_j - M).

    Written for one token position of each string, with an unspecified normaliser Z(s).
    """
    d, top = sp.symbols("D_j M", real=True)
    z = sp.Function("Z")(S)
    per_token = (S * d - sp.log(z)) - (S * top - sp.log(z))
    require(sp.expand(per_token - token_term(S, d, top)) == 0, "a token of y_w contributes something else")
    gap = sp.Symbol("g", nonnegative=True)
    require(token_term(sp.Integer(1), top - gap, top).equals(-gap) and (-gap).is_nonpositive, "k may be positive")


def check_mass_limit(limit: Callable[[sp.Symbol, sp.Symbol], sp.Expr]) -> None:
    """The strings over A = argmax D have mass (sum_{j in A} p_j)^n -> 1: all other shares decay as e^(-s g)."""
    at_top, others = sp.symbols("A B", integer=True, positive=True)
    gap = sp.Symbol("g", positive=True)  # the smallest gap; larger ones make the share only larger
    share = at_top / (at_top + others * sp.exp(-S * gap))
    require(algebra.limit(share, S, sp.oo) == limit(at_top, others), "the share of argmax D has another limit")
    rise = others * gap * at_top * sp.exp(-S * gap) / (at_top + others * sp.exp(-S * gap)) ** 2
    require(vanishes(share.diff(S) - rise) and rise.is_positive, "the share does not rise")


def check_gap_after(
    pairs: Sequence[tuple[Counts, Counts]], start: Sequence[int], update: Callable[[sp.Expr], sp.Expr] | None = None
) -> None:
    """After a step log pi(y_w) - log pi(yhat) is s k: with equal lengths the normaliser cancels. Arguments as of
    `theory.propositions.bag_of_words_winner.descend`."""
    chosen, d = pairs[0][0], difference(*pairs[0])
    theta, place = descend(pairs, start, update)
    gap = sum(c * t for c, t in zip(chosen, theta, strict=True)) - sum(chosen) * theta[d.index(max(d))]
    require(vanishes(gap - place * bound_slope(chosen, d)), f"the gap is {gap} at s = {place}")


def prove() -> None:
    check_ray(lambda c_w, c_l: c_w - c_l)
    check_unbounded()
    check_gap(lambda s, d, top: s * (d - top))
    check_mass_limit(lambda at_top, others: sp.Integer(1))
    for pair in PAIRS:
        check_gap_after([pair], [0] * len(pair[0]))
    check_strings(2, 2, lambda d: d.index(max(d)))


def string_probability(string: tuple[int, ...], d: Counts, x: Fraction) -> Fraction:
    """pi(y) on the ray, exactly: with x = e^s a token's weight is x^D_j."""
    return prod((x ** d[token] for token in string), start=Fraction(1)) / sum(x**t for t in d) ** len(string)


def check_strings(vocabulary: int, length: int, repeated: Callable[[Counts], int]) -> int:
    """Every pair of counts, every string of the length, exact: probabilities add to 1, pi(y_w) / pi(yhat) = x^k <= 1,
    no string is more likely than yhat, and the mass of strings over argmax D rises with s.

    Args:
        vocabulary: V.
        length: n.
        repeated: D -> the token that yhat repeats.
    """
    vectors, strings = list(count_vectors(vocabulary, length)), list(product(range(vocabulary), repeat=length))
    count = 0
    for chosen, rejected in product(vectors, vectors):
        d, previous = difference(chosen, rejected), Fraction(0)
        y_w = tuple(token for token, c in enumerate(chosen) for _ in range(c))
        for x in (Fraction(1), Fraction(3, 2), Fraction(4)):
            mass = {string: string_probability(string, d, x) for string in strings}
            require(sum(mass.values()) == 1, "the policy does not add up to 1")
            top = mass[(repeated(d),) * length]
            require(mass[y_w] / top == x ** bound_slope(chosen, d), f"pi(y_w)/pi(yhat) is not e^(s k): D = {d}")
            require(max(mass.values()) == top, f"a string is more likely than yhat: D = {d}")
            at_top = sum((p for y, p in mass.items() if all(d[token] == max(d) for token in y)), Fraction(0))
            require(at_top > previous or min(d) == max(d), f"the mass over argmax D does not rise: D = {d}")
            previous = at_top
        count += 1
    return count


def enumerate_strings(thorough: bool) -> str:
    sizes = [(v, n) for v in (1, 2, 3) for n in range(1, 5 if thorough else 4)]
    pairs = sum(check_strings(v, n, lambda d: d.index(max(d))) for v, n in sizes)
    return f"{pairs} pairs of counts and all their strings, V <= 3, n <= {sizes[-1][1]}"


# ---------------------------------------------------------------- without each assumption


def _unequal_lengths() -> str:
    """A longer loser pushes theta along D + the model's own distribution: k no longer describes the gap."""
    chosen, rejected = (1, 1, 0), (0, 2, 1)
    step = gradient_step(chosen, rejected, [sp.Integer(0)] * 3, sp.Integer(1))
    d = difference(chosen, rejected)
    place = step[0] / d[0]
    gap = simplify(sum(c * x for c, x in zip(chosen, step, strict=True)) - 2 * max(step))
    claimed = place * bound_slope(chosen, d)
    require(not vanishes(gap - claimed), "the gap is still s k")
    return f"y_w = ab, y_l = bbc: after one step of size 1 the gap to aa is {gap}, s k would be {claimed}"


def _other_start() -> str:
    chosen, rejected, start = (1, 1), (0, 2), (Fraction(0), Fraction(1))
    d = difference(chosen, rejected)
    gaps = []
    for s in (Fraction(0), Fraction(1)):
        theta = [t + s * x for t, x in zip(start, d, strict=True)]
        gaps.append(sum(c * t for c, t in zip(chosen, theta, strict=True)) - 2 * theta[0])
    require(gaps[0] != 0 and gaps[0] > 0, "the gap starts at 0")
    return f"y_w = ab, y_l = bb, theta^0 = (0, 1): the gap to yhat = aa starts at {gaps[0]}, not at 0 k"


def _several_pairs() -> str:
    zero = [sp.Integer(0)] * 2
    steps = [gradient_step(w, el, zero, sp.Integer(1)) for w, el in (((1,) * 2, (2, 0)), ((2, 0), (1,) * 2))]
    require([simplify(a + b) for a, b in zip(*steps, strict=True)] == [0, 0], "theta moves")
    return "ab > aa and aa > ab both observed: theta stays at 0, so bb keeps its mass 1/4 instead of gaining all"


def _other_optimiser() -> str:
    chosen, rejected = (2, 1, 0), (0, 0, 3)
    signs = [int(sp.sign(x)) for x in gradient_step(chosen, rejected, [sp.Integer(0)] * 3, sp.Integer(1))]
    d = difference(chosen, rejected)
    argmax = [j for j in range(3) if d[j] == max(d)]
    shares = sum(sp.exp(S * signs[j]) for j in argmax) / sum(sp.exp(S * x) for x in signs)
    limit = algebra.limit(shares**3, S, sp.oo)
    require(limit == sp.Rational(1, 8), "all mass goes to argmax D")
    return f"sign descent, y_w = aab, y_l = ccc, argmax D = {{a}}: the mass of aaa tends to {limit}, not to 1"


# ---------------------------------------------------------------- properties


@given(count_pairs(), st.floats(0, 200))
def gap_is_s_times_k(pair: tuple[Counts, Counts], s: float) -> None:
    """NumPy, from the log-likelihoods with their normaliser; and the mass over argmax D beyond s = 40 is 1."""
    chosen, d = np.array(pair[0]), np.array(difference(*pair), dtype=np.float64)
    repeated = np.zeros_like(chosen)
    repeated[int(np.argmax(d))] = chosen.sum()
    z = log_normaliser(s * d)
    gap = log_likelihood(chosen, s * d, z) - log_likelihood(repeated, s * d, z)
    assert np.isclose(gap, s * bound_slope(pair[0], difference(*pair)), rtol=1e-9, atol=1e-6)
    if s > 40:
        assert np.isclose(np.exp(s * d - z)[d == d.max()].sum(), 1, atol=1e-12)


@given(count_pairs(5, 4), st.floats(0.05, 1), st.floats(0.05, 0.2))
def gap_widens_under_gradient_descent(pair: tuple[Counts, Counts], beta: float, step: float) -> None:
    """torch: the gap after each of three steps on the training loss is s k with s read off theta."""
    import torch

    chosen, rejected = (torch.tensor(c, dtype=torch.float64) for c in pair)
    d, zero = chosen - rejected, torch.tensor(0.0, dtype=torch.float64)
    theta, k, previous = torch.zeros_like(d, requires_grad=True), bound_slope(pair[0], difference(*pair)), 0.0
    for _ in range(3):
        logps = [log_likelihood(c, theta, torch.logsumexp(theta, 0)) for c in (chosen, rejected)]
        loss = losses.dpo(losses.logratio_margin(logps[0], logps[1], zero, zero), beta=beta)
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = (theta - step * gradient).detach().requires_grad_()
        place = (theta @ d / (d @ d)).item() if d.any() else 0.0
        gap = (chosen @ theta - chosen.sum() * theta[d.argmax()]).item()
        assert abs(gap - place * k) < 1e-9
        assert gap <= previous + 1e-12
        previous = gap


CLAIMS = (
    Claim(
        id="prop3",
        source="[F] A.6, Proposition 3",
        statement=(
            "Setting of Proposition 2, yhat = (i, ..., i) with i in argmax D: log pi_t(y_w) - log pi_t(yhat) = s(t) k "
            "with k <= 0 and s increasing. Sharp: no string is ever more likely than yhat, and the mass of the "
            "strings over argmax D rises to 1."
        ),
        formula=r"\log\tfrac{\pi_t(y_w)}{\pi_t(\hat y)}=s(t)\,(c_w\cdot D-n\max D)\le 0",
        domain="strings over a finite vocabulary; bag-of-words policy; gradient descent on theta, its logits",
        losses=("logratio_margin", "bradley_terry", "dpo"),
        assumptions={
            "equal lengths": "|y_w| = |y_l|",
            "zero start": "theta^0 = 0",
            "one pair": "the loss is over a single preference pair",
            "gradient descent": "plain gradient descent, no per-coordinate scaling",
        },
        prove=prove,
        counterexamples={
            "equal lengths": _unequal_lengths,
            "zero start": _other_start,
            "one pair": _several_pairs,
            "gradient descent": _other_optimiser,
        },
        controls={
            "without equal lengths": lambda: check_gap_after([UNEQUAL], [0, 0, 0]),
            "without zero start": lambda: check_gap_after([((1, 1), (0, 2))], [0, 1]),
            "without one pair": lambda: check_gap_after(BOTH_WAYS, [0, 0]),
            "without gradient descent": lambda: check_gap_after(PAIRS[:1], [0, 0, 0], sp.sign),
            "gap without the maximum": lambda: check_gap(lambda s, d, top: s * d),
            "sign of the gap": lambda: check_gap(lambda s, d, top: s * (top - d)),
            "mass shared with other tokens": lambda: check_mass_limit(
                lambda at_top, others: at_top / (at_top + others)
            ),
            "yhat repeats the smallest difference": lambda: check_strings(2, 2, lambda d: d.index(min(d))),
        },
        enumerate=enumerate_strings,
        properties=(gap_is_s_times_k, gap_widens_under_gradient_descent),
        sharpens=True,
    ),
)
