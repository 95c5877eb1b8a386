"""Bag of words: the more tokens a pair shares, the faster DPO lets its winner fall behind, if no token is repeated.

Model and notation as in `theory.propositions.bag_of_words_winner`: theta = s D on the flow of gradient descent, and
log pi(y_w) - log pi(yhat) = s k, yhat a string that repeats one token of argmax D. Where the n tokens of either
response are distinct and m are shared, k = -m and |D|^2 = 2 (n - m): what is shared costs y_w, and what is not makes s
slow down sooner. With a repeated token neither k nor |D|^2 is a matter of how much is shared.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.special import wrightomega

from theory import losses
from theory.algebra import limit, simplify, vanishes
from theory.claim import Claim, require
from theory.preferences import Floats
from theory.propositions.bag_of_words_winner import (
    Counts,
    bound_slope,
    count_vectors,
    difference,
    log_likelihood,
)
from theory.strategies import positive

BETA = sp.Symbol("beta", positive=True)
S = sp.Symbol("s", positive=True)
X = sp.Symbol("x", positive=True)

Pair = tuple[Counts, Counts]
"""Token counts of y_w and y_l."""


def distinct_pair(n: int, shared: int) -> Pair:
    """n distinct tokens in either response, `shared` of them in both."""
    own = n - shared
    return (1,) * shared + (1,) * own + (0,) * own, (1,) * shared + (0,) * own + (1,) * own


def overlap(pair: Pair) -> int:
    """How many tokens the responses share, with multiplicity."""
    return sum(map(min, *pair))


def dpo_loss(pairs: list[Pair], theta: Any, start: Any, beta: Any, log_sum_exp: Callable[[Any], Any]) -> Any:
    """Sum over the pairs of DPO, the reference being the policy at the start. theta, start [V]; any backend."""

    def logps(at: Any) -> list[list[Any]]:
        z = log_sum_exp(at)
        return [[log_likelihood(np.array(counts), at, z) for counts in pair] for pair in pairs]

    return sum(
        losses.dpo(losses.logratio_margin(*policy, *ref), beta=beta)
        for policy, ref in zip(logps(theta), logps(start), strict=True)
    )


def _log_sum_exp(theta: Any) -> Any:
    return sp.log(sum(sp.exp(x) for x in theta))


# ---------------------------------------------------------------- checks


def check_flow(pairs: list[Pair], start: list[int] | None = None) -> None:
    """For the first pair, with n tokens of which m are shared: gradient descent moves theta = start + s D along D at
    the rate beta sigma(-2 beta (n - m) s), and log pi(y_w) - log pi(yhat) = -m s for every yhat.

    Args:
        pairs: that the loss is over; the statement is about one.
        start: theta at s = 0, [V].
    """
    chosen, rejected = pairs[0]
    n, shared, d = sum(chosen), overlap(pairs[0]), difference(chosen, rejected)
    begin = np.array([sp.Integer(x) for x in (start or [0] * len(d))], dtype=object)
    theta = np.array(sp.symbols(f"theta0:{len(d)}", real=True), dtype=object)
    on_ray = dict(zip(theta, begin + S * np.array([sp.Integer(x) for x in d], dtype=object), strict=True))
    loss = dpo_loss(pairs, theta, begin, BETA, _log_sum_exp)
    rate = BETA / (1 + sp.exp(2 * BETA * (n - shared) * S))
    for x, step in zip(theta, d, strict=True):
        slope = sp.diff(loss, x).subs(on_ray, simultaneous=True)
        require(vanishes(slope + rate * step), f"another velocity of {x}")
    z, at = sp.Symbol("Z", real=True), np.array([on_ray[x] for x in theta], dtype=object)
    for token in (token for token, x in enumerate(d) if x == max(d)):
        repeated = np.array([n * (i == token) for i in range(len(d))])
        gap = log_likelihood(np.array(chosen), at, z) - log_likelihood(repeated, at, z)
        require(sp.expand(gap + shared * S) == 0, f"log pi(y_w)/pi(yhat) is {sp.expand(gap)}, not -{shared} s")


def check_time(clock: Callable[[sp.Expr], sp.Expr], slope: Callable[[sp.Expr, sp.Expr], sp.Expr]) -> None:
    """x = beta |D|^2 s keeps clock(x) = beta^2 |D|^2 t, and -m s / log t tends to slope(m, |D|^2).

    ds/dt = beta sigma(-x), so that d clock / dt must be beta^2 |D|^2. With more shared, |D|^2 is smaller and s is
    larger at every t > 0: t = clock(beta A s) / (beta^2 A) rises with A at a given s.
    """
    norm, shared = sp.symbols("A m", positive=True)
    velocity = (
        BETA * norm * -sp.diff(losses.dpo(X / BETA, beta=BETA), X) * BETA
    )  # dx/dt, with Delta = |D|^2 s = x / beta
    require(clock(sp.Integer(0)) == 0, "the clock does not start at 0")
    require(vanishes(sp.diff(clock(X), X) * velocity - BETA**2 * norm), "another clock")
    time = clock(X) / (BETA**2 * norm)
    ratio = limit(-shared * X / (BETA * norm) / sp.log(time), X, sp.oo)
    require(vanishes(ratio - slope(shared, norm)), f"log pi(y_w)/pi(yhat) goes as {ratio} log t")
    at_s = sp.diff((clock(BETA * norm * S)) / (BETA**2 * norm), norm)
    z = BETA * norm * S
    require(vanishes(at_s - (z * sp.exp(z) - sp.exp(z) + 1) / (BETA * norm) ** 2), "another derivative in A")
    bracket = X * sp.exp(X) - sp.exp(X) + 1
    require(bracket.subs(X, 0) == 0 and simplify(sp.diff(bracket, X)).is_positive, "s does not fall with |D|^2")


def clock(x: Any) -> Any:
    """x + e^x - 1."""
    return x + sp.exp(x) - 1


def asymptotic_slope(shared: Any, norm: Any) -> Any:
    """-m / (beta |D|^2), |D|^2 = 2 (n - m)."""
    return -shared / (BETA * norm)


def prove_on(n: int, shared: int) -> None:
    """One pair of n distinct tokens."""
    pair = distinct_pair(n, shared)
    d = difference(*pair)
    require(bound_slope(pair[0], d) == -shared, "k is not -m")
    require(sum(x * x for x in d) == 2 * (n - shared), "|D|^2 is not 2 (n - m)")
    check_flow([pair])


def prove() -> None:
    check_time(clock, asymptotic_slope)
    for n, shared in ((1, 0), (2, 1), (3, 1), (3, 2), (4, 3)):
        prove_on(n, shared)


def place(norm: Any, beta: Any, time: Any) -> Any:
    """s at time t: x + e^x - 1 = beta^2 |D|^2 t at x = log omega(beta^2 |D|^2 t + 1), omega Wright's function."""
    return np.log(wrightomega(beta**2 * norm * time + 1)) / (beta * norm)


def _flow(pair: Pair, beta: float, time: float) -> Floats:
    """theta at time t, by an ODE solver that is told the gradient in all V coordinates and nothing of the ray."""
    counts = np.array(pair, dtype=np.float64)

    def velocity(_: float, theta: Floats) -> Floats:
        margin = (counts[0] - counts[1]) @ theta  # equal lengths: the normaliser cancels
        return np.asarray(beta / (1 + np.exp(beta * margin)) * (counts[0] - counts[1]))

    start = np.zeros(len(pair[0]))
    return np.asarray(solve_ivp(velocity, (0, time), start, method="LSODA", rtol=1e-9, atol=1e-11).y[:, -1])


def enumerate_pairs(thorough: bool) -> str:
    """Every (n, m): the flow, exactly; and the gap at three times against an ODE solver."""
    largest, count, worst = (6 if thorough else 4), 0, 0.0
    for n in range(1, largest + 1):
        for shared in range(n):
            prove_on(n, shared)
            pair = distinct_pair(n, shared)
            repeated = np.array([n * (i == shared) for i in range(len(pair[0]))])
            for time in (0.3, 5.0, 400.0):
                theta = _flow(pair, 0.7, time)
                gap = (np.array(pair[0]) - repeated) @ theta
                worst = max(worst, abs(gap + shared * place(2 * (n - shared), 0.7, time)))
            count += 1
    require(bool(worst < 1e-6), f"an ODE solver's gaps are {worst:.1e} away")
    return f"all {count} (n, m), n <= {largest}; 3 times each by an ODE solver"


# ---------------------------------------------------------------- without each assumption

REPEATED: Pair = ((3, 0), (1, 2))
UNEQUAL: Pair = ((1, 1), (1, 0))
SECOND: Pair = ((0, 1, 1), (1, 1, 0))


def _repeated_tokens() -> str:
    require(bound_slope(REPEATED[0], difference(*REPEATED)) == 0, "k is not 0")
    require(overlap(REPEATED) == 1, "another overlap")
    return "aaa against abb: one token in common, and log pi(y_w)/pi(yhat) = 0 for ever, not -s: y_w is yhat"


def _unequal_lengths() -> str:
    """At s = 0 the normaliser's gradient remains: the velocity is (beta / 2) (D_j - (n_w - n_l) / V), not along D."""
    theta = np.array(sp.symbols("theta0:2", real=True), dtype=object)
    loss = dpo_loss([UNEQUAL], theta, np.array([sp.S.Zero] * 2, dtype=object), BETA, _log_sum_exp)
    velocity = [-simplify(sp.diff(loss, x).subs(dict.fromkeys(theta, 0))) for x in theta]
    require(velocity == [-BETA / 4, BETA / 4], f"the velocity is {velocity}")
    return "ab against a: theta starts along (-1, 1), though D = (0, 1); the shared token a falls"


def _other_start() -> str:
    begin = np.array([3, 0, 0])
    counts = np.array(distinct_pair(2, 1)[0]) - np.array([0, 2, 0])
    require(int(counts @ begin) == 3, "another gap at the start")
    return "theta^0 = (3, 0, 0), ab against ac: log pi(y_w)/pi(bb) = 3 - s, above 0 at first"


def _two_pairs() -> str:
    theta = np.array(sp.symbols("theta0:3", real=True), dtype=object)
    zero = np.array([sp.S.Zero] * 3, dtype=object)
    loss = dpo_loss([distinct_pair(2, 1), SECOND], theta, zero, BETA, _log_sum_exp)
    velocity = [-simplify(sp.diff(loss, x).subs(dict.fromkeys(theta, 0))) for x in theta]
    require(velocity == [-BETA / 2, BETA / 2, 0], f"the velocity is {velocity}")
    return "ab over ac and bc over ab: theta starts along (-1, 1, 0), not D = (0, 1, -1): the shared token a falls"


def smallest_counterexample() -> str | None:
    """Two pairs of one length and vocabulary, the one that shares more with k = 0, the other with k < 0."""

    def text(counts: Counts) -> str:
        return "".join("abcdef"[token] * count for token, count in enumerate(counts))

    for n in range(1, 5):
        for vocabulary in range(2, 4):
            pairs = list(combinations(count_vectors(vocabulary, n), 2))
            ordered = sorted((*pairs, *(pair[::-1] for pair in pairs)), key=overlap)
            for less in ordered:
                for more in ordered:
                    slopes = [bound_slope(pair[0], difference(*pair)) for pair in (less, more)]
                    if overlap(more) > overlap(less) and slopes[1] == 0 > slopes[0]:
                        return (
                            f"bag of words, {n} tokens: {text(more[0])} against {text(more[1])} share more than "
                            f"{text(less[0])} against {text(less[1])}, but k = 0 against {slopes[0]}: its winner stays "
                            "at yhat, the other falls behind"
                        )
    return None


# ---------------------------------------------------------------- properties


@given(st.integers(2, 30), st.data(), positive(0.05, 5), positive(1e-3, 1e4))
def more_in_common_falls_faster(n: int, data: st.DataObject, beta: float, time: float) -> None:
    """NumPy: at any time -m s(t) falls with m; and s solves the clock's equation."""
    shared = data.draw(st.integers(1, n - 1))
    x = beta * 2 * (n - shared) * place(2 * (n - shared), beta, time)
    target = beta**2 * 2 * (n - shared) * time
    assert abs(x + np.expm1(x) - target) <= 1e-9 * (1 + target)
    gaps = [-m * place(2 * (n - m), beta, time) for m in (shared - 1, shared)]
    assert gaps[1] < gaps[0]


@given(st.integers(1, 6), st.data(), positive(0.1, 5), st.floats(0, 3))
def torch_moves_along_the_ray(n: int, data: st.DataObject, beta: float, s: float) -> None:
    """torch: the gradient of DPO at theta = s D is -beta sigma(-2 beta (n - m) s) D."""
    import torch

    shared = data.draw(st.integers(0, n - 1))
    pair = distinct_pair(n, shared)
    d = torch.tensor(difference(*pair), dtype=torch.float64)
    theta = (s * d).requires_grad_()
    logps = [torch.tensor(c, dtype=torch.float64) @ torch.log_softmax(theta, 0) for c in pair]
    start = [torch.full((), -sum(c) * np.log(len(c)), dtype=torch.float64) for c in pair]
    loss = losses.dpo(losses.logratio_margin(*logps, *start), beta=beta)
    velocity = -torch.autograd.grad(loss, theta)[0]
    rate = beta / (1 + np.exp(2 * beta * (n - shared) * s))
    assert (velocity - rate * d).abs().max() <= 1e-12 * (1 + beta)


CLAIMS = (
    Claim(
        id="remark-similar-pairs",
        source="[F], remark on similar responses after Proposition 3",
        statement=(
            "Bag of words, n distinct tokens in either response, m of them shared, theta^0 = 0, gradient flow on DPO: "
            "log pi(y_w)/pi(yhat) = -m s(t), where x = 2 beta (n - m) s has x + e^x - 1 = 2 beta^2 (n - m) t. It falls "
            "faster the more is shared, at every t, and as -(m / (2 beta (n - m))) log t in the end. With repeated "
            "tokens a pair that shares more may fall less, or not at all."
        ),
        formula=r"\log\tfrac{\pi_t(y_w)}{\pi_t(\hat y)}=-m\,s(t)\sim-\tfrac{m}{2\beta(n-m)}\log t",
        domain="strings of n tokens over a finite vocabulary; bag-of-words policy; gradient flow in its logits theta",
        losses=("dpo", "bradley_terry", "logratio_margin"),
        assumptions={
            "distinct tokens": "no token is twice in a response",
            "equal lengths": "|y_w| = |y_l|",
            "zero start": "theta^0 = 0",
            "one pair": "the loss is over a single preference pair",
        },
        prove=prove,
        counterexamples={
            "distinct tokens": _repeated_tokens,
            "equal lengths": _unequal_lengths,
            "zero start": _other_start,
            "one pair": _two_pairs,
        },
        controls={
            "without distinct tokens": lambda: check_flow([REPEATED]),
            "without equal lengths": lambda: check_flow([UNEQUAL]),
            "without zero start": lambda: check_flow([distinct_pair(2, 1)], [3, 0, 0]),
            "without one pair": lambda: check_flow([distinct_pair(2, 1), SECOND]),
            "a token twice in the loser": lambda: check_flow([((1, 1, 1), (2, 1, 0))]),
            "clock without its linear term": lambda: check_time(lambda x: sp.exp(x) - 1, asymptotic_slope),
            "slope without beta": lambda: check_time(clock, lambda m, norm: -m / norm),
            "slope of half the norm": lambda: check_time(clock, lambda m, norm: -2 * m / (BETA * norm)),
        },
        enumerate=enumerate_pairs,
        properties=(more_in_common_falls_faster, torch_moves_along_the_ray),
        printed=smallest_counterexample,
    ),
)
