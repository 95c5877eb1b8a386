"""DPO on a bag-of-words policy: gradient descent moves along one ray, and the winner's likelihood bound only falls.

The model. pi_theta(y) = prod_t softmax(theta)[y_t] for strings of n tokens, so that with token counts c(y)

    log pi_theta(y) = c(y).theta - n logsumexp(theta) <= c(y).theta - n max theta,

the bound of the claim. D = c(y_w) - c(y_l), M = max D, and s >= 0 is the place on the ray theta = s D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import combinations_with_replacement, product
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import losses
from theory.algebra import limit, simplify, vanishes
from theory.claim import Claim, require

Counts = tuple[int, ...]

BETA, STEP = sp.symbols("beta eta", positive=True)
S = sp.Symbol("s", nonnegative=True)


def count_vectors(vocabulary: int, length: int) -> Iterator[Counts]:
    """Token counts of every string of the length, up to order."""
    for string in combinations_with_replacement(range(vocabulary), length):
        yield tuple(string.count(token) for token in range(vocabulary))


def log_likelihood(counts: Any, theta: Any, log_normaliser: Any) -> Any:
    """log pi_theta(y) = c(y).theta - |y| logsumexp(theta), nats. [V], [V] -> scalar."""
    return counts @ theta - counts.sum() * log_normaliser


def bound(counts: Counts, theta: list[Fraction]) -> Fraction:
    """log pihat_theta(y) = c(y).theta - |y| max(theta), exactly."""
    return sum((c * t for c, t in zip(counts, theta, strict=True)), Fraction(0)) - sum(counts) * max(theta)


def difference(chosen: Counts, rejected: Counts) -> Counts:
    """D = c(y_w) - c(y_l)."""
    return tuple(w - el for w, el in zip(chosen, rejected, strict=True))


def bound_slope(chosen: Counts, d: Counts) -> int:
    """k = c_w.D - n max D: the bound at y_w is s k."""
    return sum(c * x for c, x in zip(chosen, d, strict=True)) - sum(chosen) * max(d)


# ---------------------------------------------------------------- checks


def check_ray(direction: Callable[[sp.Symbol, sp.Symbol], sp.Expr]) -> None:
    """Coordinate j of DPO's gradient is -beta sigma(-beta Delta) D_j: each step adds a positive multiple of D to theta.

    The other coordinates enter as free symbols and the normaliser as an unspecified function of theta_j, so this holds
    for every vocabulary; equal lengths make the normaliser cancel.
    """
    theta, rest_w, rest_l, ref_w, ref_l = sp.symbols("theta_j rest_w rest_l ref_w ref_l", real=True)
    c_w, c_l = sp.symbols("c_wj c_lj", integer=True, nonnegative=True)
    n, normaliser = sp.Symbol("n", integer=True, positive=True), sp.Function("Z")(theta)
    chosen, rejected = c_w * theta + rest_w - n * normaliser, c_l * theta + rest_l - n * normaliser
    margin = losses.logratio_margin(chosen, rejected, ref_w, ref_l)
    step = -STEP * sp.diff(losses.dpo(margin, beta=BETA), theta)
    log_odds = sp.expand((chosen - ref_w) - (rejected - ref_l))
    rate = STEP * BETA / (1 + sp.exp(BETA * log_odds))  # d s = eta beta sigma(-beta Delta)
    require(vanishes(step - rate * direction(c_w, c_l)), "the step is not along the claimed direction")
    require(rate.is_positive, "s does not increase")


def check_unbounded() -> None:
    """s -> infinity: below any finite s, each step adds at least the increment there, since these decrease."""
    squared_norm, offset = sp.Symbol("D2", positive=True), sp.Symbol("Delta_0", real=True)
    rate = -STEP * sp.diff(losses.dpo(S * squared_norm + offset, beta=BETA), S) / squared_norm
    e = sp.exp(BETA * (S * squared_norm + offset))
    require(vanishes(rate - STEP * BETA / (1 + e)), "another increment")
    slope = -STEP * BETA**2 * squared_norm * e / (1 + e) ** 2
    require(vanishes(rate.diff(S) - slope) and slope.is_negative, "the increments do not decrease in s")


def check_bound_slope(term: Callable[[sp.Expr, sp.Expr], sp.Expr]) -> None:
    """k = sum_j c_j (D_j - M) is a sum of non-positive terms, one of them negative iff c_j > 0 and D_j < M."""
    j, last = sp.symbols("j V", integer=True, positive=True)
    c, d, top = sp.IndexedBase("c"), sp.IndexedBase("D"), sp.Symbol("M", integer=True)
    k = sp.Sum(c[j] * d[j], (j, 1, last)) - top * sp.Sum(c[j], (j, 1, last))
    terms = sp.Sum(term(c[j], top - d[j]), (j, 1, last))
    require(vanishes(sp.expand((k - terms).expand(), func=True)), "k is not that sum")
    some, gap = sp.symbols("c g", integer=True, positive=True)
    none = sp.Symbol("c", integer=True, nonnegative=True)
    require(term(none, gap - gap) == 0 and term(some * 0, gap) == 0, "a term is not 0 where it should be")
    require(term(some, gap).is_negative, "a term with c_j > 0, D_j < M is not negative")


def check_winner_path() -> None:
    """log pi(y_w) along the ray, l(s) = s c_w.D - n log sum_j e^(s D_j), is concave, starts with slope c_w.D, and tends
    to s k - n log(number of tokens with D_j = M)."""
    d_i, d_j, c_d, n = sp.symbols("D_i D_j cD n", real=True)
    m = sp.Function("Z")(S)
    # With Z = sum e_j and Z' = sum D_j e_j: l'' = -n (Z'' Z - Z'^2) / Z^2, and Z'' Z - Z'^2 is the sum over (i, j) of
    # e_i e_j ((D_i^2 + D_j^2) / 2 - D_i D_j), a sum of squares.
    path = S * c_d - n * sp.log(m)
    second = -n * (m.diff(S, 2) * m - m.diff(S) ** 2) / m**2
    require(vanishes(path.diff(S, 2) - second), "unexpected second derivative")
    symmetrised = (d_i**2 + d_j**2) / 2 - d_i * d_j
    require(sp.expand(symmetrised - (d_i - d_j) ** 2 / 2) == 0, "not a sum of squares")
    # At s = 0 all e_j = 1 and Z'(0) = sum_j D_j = n - n = 0.
    slope = path.diff(S).subs(m.diff(S), 0)
    require(vanishes(slope - c_d), "the first slope is not c_w.D")
    # Tail: Z = e^(s M) (A + e^(-s g)), A tokens at the top, one term for each other token, gap g > 0.
    at_top, gap = sp.Symbol("A", integer=True, positive=True), sp.Symbol("g", positive=True)
    rest = sp.log(at_top + sp.exp(-S * gap))
    require(limit(rest, S, sp.oo) == sp.log(at_top), "the tail does not tend to log |argmax D|")


def descend(
    pairs: Sequence[tuple[Counts, Counts]], start: Sequence[int], update: Callable[[sp.Expr], sp.Expr] | None = None
) -> tuple[list[sp.Expr], sp.Expr]:
    """theta after one step of size 1 down the loss of some pairs at beta = 1, and its s; exactly, on the ray of the
    first pair's D or CheckFailed.

    Args:
        pairs: (counts of the winner, of the loser); the claims are about one.
        start: theta, [V].
        update: slope of a coordinate -> its step, in the place of plain gradient descent.
    """
    d, theta = difference(*pairs[0]), [sp.Integer(x) for x in start]
    slopes = [gradient_step(chosen, rejected, theta, sp.S.One) for chosen, rejected in pairs]
    step = [simplify(sum(parts)) for parts in zip(*slopes, strict=True)]
    step = step if update is None else [update(x) for x in step]
    place = simplify(sum(x * y for x, y in zip(step, d, strict=True)) / sum(y * y for y in d))
    require(place.is_positive, f"s grows by {place}")
    require(all(vanishes(x - place * y) for x, y in zip(step, d, strict=True)), f"a step along {step}, not {d}")
    return [x + y for x, y in zip(theta, step, strict=True)], place


def check_bound_after(
    pairs: Sequence[tuple[Counts, Counts]], start: Sequence[int], update: Callable[[sp.Expr], sp.Expr] | None = None
) -> None:
    """After a step the bound at y_w has moved by s k, k <= 0. Arguments as of `descend`."""
    chosen, (theta, place) = pairs[0][0], descend(pairs, start, update)
    before, after = (
        sum(c * t for c, t in zip(chosen, at, strict=True)) - sum(chosen) * sp.Max(*at) for at in (start, theta)
    )
    k = bound_slope(chosen, difference(*pairs[0]))
    require(vanishes(after - before - place * k), f"the bound moves by {after - before}, not by s k")
    require(k <= 0, "the bound rises")


PAIRS: tuple[tuple[Counts, Counts], ...] = (
    ((2, 1, 0), (0, 0, 3)),
    ((1, 1, 0, 0), (0, 0, 1, 1)),
    ((1, 1), (0, 2)),
)
"""aab > ccc, ab > cd, ab > bb."""
UNEQUAL: tuple[Counts, Counts] = ((1, 1, 0), (0, 2, 1))
BOTH_WAYS: tuple[tuple[Counts, Counts], ...] = (((1, 1), (2, 0)), ((2, 0), (1, 1)))


def prove() -> None:
    check_ray(lambda c_w, c_l: c_w - c_l)
    check_unbounded()
    check_bound_slope(lambda c, gap: -c * gap)
    check_winner_path()
    for pair in PAIRS:
        check_bound_after([pair], [0] * len(pair[0]))


def some_token_below_top(chosen: Counts, d: Counts) -> bool:
    """The sharp condition: y_w uses a token whose count it does not exceed y_l's by the largest difference."""
    return any(c > 0 and x < max(d) for c, x in zip(chosen, d, strict=True))


def check_counts(vocabulary: int, length: int, strict: Callable[[Counts, Counts], bool]) -> int:
    """Every pair of count vectors: the bound along theta = s D never rises, and falls iff `strict`. Exact."""
    vectors, count = list(count_vectors(vocabulary, length)), 0
    for chosen, rejected in product(vectors, vectors):
        d, previous = difference(chosen, rejected), Fraction(0)
        require(sum(d) == 0, "D does not add up to 0, so the first slope of log pi(y_w) is not c_w.D")
        for s in (Fraction(1, 3), Fraction(1), Fraction(7, 2)):
            value = bound(chosen, [s * x for x in d])
            require(value == s * bound_slope(chosen, d), f"the bound is not s k for counts {chosen}, {rejected}")
            require(value <= previous, f"the bound rises for counts {chosen}, {rejected}")
            falls = value < previous
            require(falls == strict(chosen, d), f"strict descent is {falls} for counts {chosen} against {rejected}")
            previous = value
        count += 1
    return count


def enumerate_counts(thorough: bool) -> str:
    sizes = [(v, n) for v in range(1, 6 if thorough else 5) for n in range(1, 6 if thorough else 4)]
    pairs = sum(check_counts(v, n, some_token_below_top) for v, n in sizes)
    return f"{pairs} pairs of count vectors, all with V <= {sizes[-1][0]}, n <= {sizes[-1][1]}"


# ---------------------------------------------------------------- without each assumption


def gradient_step(chosen: Counts, rejected: Counts, theta: list[sp.Expr], beta: sp.Expr) -> list[sp.Expr]:
    """-dL/dtheta at theta, exactly, with the true normaliser; lengths may differ."""
    t = sp.symbols(f"t0:{len(theta)}", real=True)
    normaliser = sp.log(sum(sp.exp(x) for x in t))
    logps = [log_likelihood(np.array(c), np.array(t, dtype=object), normaliser) for c in (chosen, rejected)]
    loss = losses.dpo(losses.logratio_margin(logps[0], logps[1], sp.Integer(0), sp.Integer(0)), beta=beta)
    return [simplify(-sp.diff(loss, x).subs(dict(zip(t, theta, strict=True)))) for x in t]


def _unequal_lengths() -> str:
    chosen, rejected = (1, 1, 0), (0, 2, 1)
    step = gradient_step(chosen, rejected, [sp.Integer(0)] * 3, sp.Integer(1))
    d = difference(chosen, rejected)
    require(not vanishes(step[0] * d[1] - step[1] * d[0]), "the first step is along D")
    return f"y_w = ab, y_l = bbc: the first step is along {tuple(sp.nsimplify(x / step[0]) for x in step)}, D = {d}"


def _other_start() -> str:
    chosen, rejected = (1, 0), (0, 1)
    start, d = [Fraction(0), Fraction(1)], difference(chosen, rejected)
    values = [bound(chosen, [t + s * x for t, x in zip(start, d, strict=True)]) for s in (Fraction(0), Fraction(1, 2))]
    require(values[1] > values[0], "the bound did not rise")
    return f"y_w = a, y_l = b, theta^0 = (0, 1): the bound at y_w rises from {values[0]} to {values[1]}"


def _several_pairs() -> str:
    zero, steps = [sp.Integer(0)] * 2, []
    for chosen, rejected in (((1, 1), (2, 0)), ((2, 0), (1, 1))):
        steps.append(gradient_step(chosen, rejected, zero, sp.Integer(1)))
    require([simplify(a + b) for a, b in zip(*steps, strict=True)] == [0, 0], "theta moves")
    require(some_token_below_top((1, 1), (-1, 1)), "the claim does not predict strict descent")
    return "ab > aa and aa > ab both observed: theta stays at 0 and s at 0, where the claim has strict descent"


def _other_optimiser() -> str:
    chosen, rejected = (2, 1, 0), (0, 0, 3)
    step = gradient_step(chosen, rejected, [sp.Integer(0)] * 3, sp.Integer(1))
    signs = [Fraction(int(sp.sign(x))) for x in step]
    value, d = bound(chosen, signs), difference(chosen, rejected)
    require(value == 0 and some_token_below_top(chosen, d), "sign descent lowers the bound too")
    return f"sign descent (Adam's first step), y_w = aab, y_l = ccc: theta is along {tuple(map(int, signs))}, not {d}"


# ---------------------------------------------------------------- properties


@st.composite
def count_pairs(draw: st.DrawFn, max_vocabulary: int = 7, max_length: int = 8) -> tuple[Counts, Counts]:
    """Counts of two strings of equal length over one vocabulary."""
    v, n = draw(st.integers(2, max_vocabulary)), draw(st.integers(1, max_length))
    token = st.integers(0, v - 1)
    strings = [draw(st.lists(token, min_size=n, max_size=n)) for _ in range(2)]
    chosen, rejected = (tuple(string.count(j) for j in range(v)) for string in strings)
    return chosen, rejected


def log_normaliser(theta: Any) -> Any:
    """logsumexp, NumPy."""
    return np.logaddexp.reduce(theta)


@given(count_pairs(), st.lists(st.floats(0, 30), min_size=3, max_size=3, unique=True).map(sorted))
def winner_path_is_concave_and_bounded(pair: tuple[Counts, Counts], places: list[float]) -> None:
    """NumPy: log pi(y_w) on the ray is concave, never above the bound, and near its limit far out."""
    chosen, d = np.array(pair[0]), np.array(difference(*pair), dtype=np.float64)
    path = [log_likelihood(chosen, s * d, log_normaliser(s * d)) for s in places]
    bounds = [chosen @ (s * d) - chosen.sum() * (s * d).max() for s in places]
    assert all(p <= b + 1e-9 for p, b in zip(path, bounds, strict=True))
    a, b, c = places
    between = (path[0] * (c - b) + path[2] * (b - a)) / (c - a)
    assert path[1] >= between - 1e-7, "not concave"
    far = 100.0  # counts are integers, so every gap is at least 1 and e^(-100) is below rounding
    k, at_top = bound_slope(pair[0], difference(*pair)), int((d == d.max()).sum())
    assert np.isclose(log_likelihood(chosen, far * d, log_normaliser(far * d)), far * k - chosen.sum() * np.log(at_top))


@given(count_pairs(5, 4), st.floats(0.05, 1), st.floats(0.05, 0.2))
def gradient_descent_stays_on_the_ray(pair: tuple[Counts, Counts], beta: float, step: float) -> None:
    """torch: three steps of gradient descent on the training loss itself; the bound at y_w falls iff predicted."""
    import torch

    chosen, rejected = (torch.tensor(c, dtype=torch.float64) for c in pair)
    d, zero = chosen - rejected, torch.tensor(0.0, dtype=torch.float64)
    theta, place, previous = torch.zeros_like(d, requires_grad=True), 0.0, 0.0
    strict = some_token_below_top(pair[0], difference(*pair))
    for _ in range(3):
        logps = [log_likelihood(c, theta, torch.logsumexp(theta, 0)) for c in (chosen, rejected)]
        loss = losses.dpo(losses.logratio_margin(logps[0], logps[1], zero, zero), beta=beta)
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = (theta - step * gradient).detach().requires_grad_()
        if d.any():
            new_place = (theta @ d / (d @ d)).item()
            assert new_place > place, "s did not increase"
            place = new_place
        assert torch.allclose(theta, place * d, atol=1e-9), "left the ray"
        value = (chosen @ theta - chosen.sum() * theta.max()).item()
        assert value < previous if strict else abs(value) < 1e-9, (previous, value)
        previous = value


CLAIMS = (
    Claim(
        id="prop2",
        source="[F] A.5, Proposition 2",
        statement=(
            "Bag-of-words policy, |y_w| = |y_l| = n, theta^0 = 0, gradient descent on DPO: theta^t = s(t) D with s "
            "increasing to infinity, and the bound log pihat(y_w) = s k never rises. Sharp: it falls at every step iff "
            "y_w has a token with D_j < max D; log pi(y_w) is concave in s with first slope c_w.D, and tends to "
            "-infinity under that same condition, else to -n log |argmax D|."
        ),
        formula=r"\theta^t=s(t)D,\quad \log\hat\pi_t(y_w)=s(t)k,\quad k=\sum_j c_w[j]\,(D_j-\max D)\le 0",
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
            "without equal lengths": lambda: check_bound_after([UNEQUAL], [0, 0, 0]),
            "without zero start": lambda: check_bound_after([((1, 0), (0, 1))], [0, 1]),
            "without one pair": lambda: check_bound_after(BOTH_WAYS, [0, 0]),
            "without gradient descent": lambda: check_bound_after(PAIRS[:1], [0, 0, 0], sp.sign),
            "direction c_w alone": lambda: check_ray(lambda c_w, c_l: c_w),
            "ascent": lambda: check_ray(lambda c_w, c_l: c_l - c_w),
            "sign of k": lambda: check_bound_slope(lambda c, gap: c * gap),
            "k without the counts": lambda: check_bound_slope(lambda c, gap: -gap),
            "strict iff y_w has two distinct tokens": lambda: check_counts(
                3, 2, lambda chosen, d: any(d) and sum(c > 0 for c in chosen) > 1
            ),
            "strict iff some token at all is below the top": lambda: check_counts(
                3, 2, lambda chosen, d: min(d) < max(d)
            ),
        },
        enumerate=enumerate_counts,
        properties=(winner_path_is_concave_and_bounded, gradient_descent_stays_on_the_ray),
        sharpens=True,
    ),
)
