"""Thousands of small problems at once: the same Newton method, vectorised over the problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bandits.newton import Layout, dense_direction, minimise
from bandits.objectives import (
    DPO,
    IPO,
    MARGIN_KINDS,
    Distillation,
    Floats,
    Square,
    check_kind,
    described,
    numbers,
    positive,
)
from bandits.policy import probabilities
from bandits.solve import NotConverged, Reduction, check_reduction

_MAX_ITERATIONS = 500
_CHUNK = 500_000  # Newton-matrix entries worked on at a time: they stay in the cache
_KEPT = 4_000_000  # numbers
_NORMALISED = 1e-9


@dataclass(frozen=True, eq=False, kw_only=True)
class BatchOptimum:
    """The minimisers of P problems."""

    log_probs: Floats
    """log pi, [P, n], nats."""
    logratios: Floats
    """u, [P, n], nats."""
    residual: Floats
    """[P]: the worst arm's stationarity over the sum of the absolute values of the terms it adds up."""

    @property
    def probs(self) -> Floats:
        """pi, [P, n]."""
        return np.exp(self.log_probs)


def solve_batch(
    objective: DPO | IPO | Distillation,
    edges: Any,
    ref: Any,
    *,
    alpha: Any,
    weights: Any = None,
    reduction: Reduction = "mean",
    tolerance: float = 1e-10,
) -> BatchOptimum:
    """Minimises P objectives of n arms and m pairs each, with a KL term each.

    Args:
        objective: its parameters are numbers or arrays [P] (reward margins [P, m]).
        edges: (winner, loser) pairs, [P, m, 2]; (-1, -1) pads problems of fewer pairs.
        ref: [P, n], distributions with full support.
        alpha: weight of KL(pi_ref || pi), > 0, a number or [P].
        weights: [P, m], > 0 (padding aside); all one where not given.
        reduction: as in `bandits.solve.solve`.
        tolerance: on the relative residual of every problem.

    Raises:
        TypeError: input of the wrong kind; the message names the field and what would be right.
        ValueError: bad input; the message names the field, the problem, and the pair or arm.
        NotConverged: double precision does not solve some problems to the tolerance; names the first, and how many.
    """
    check_kind(objective, *MARGIN_KINDS)
    try:
        edges = np.asarray(edges)
    except ValueError as error:
        raise ValueError(f"edges must be integers of shape [P, m, 2], {error}, got {described(edges)}") from None
    ref = probabilities(ref)
    if ref.ndim != 2 or edges.ndim != 3 or edges.shape[::2] != (len(ref), 2) or edges.dtype.kind not in "iu":
        raise ValueError(
            f"edges must be integers of shape [P, m, 2] and ref of shape [P, n], got {edges.shape} of dtype "
            f"{edges.dtype} and {ref.shape}"
        )
    problems, n = ref.shape
    m = edges.shape[1]
    given = np.ones((problems, m)) if weights is None else numbers("weights", weights)
    if given.shape != (problems, m):
        raise ValueError(f"weights must have shape {(problems, m)}, one a pair, got {given.shape}")
    # From here on the problems are the last axis: [m, P] and [n, P].
    winners, losers = np.array(edges.T, dtype=np.intp, order="C")
    pair_weights, refs = np.array(given.T, order="C"), np.array(ref.T, order="C")
    padding = (winners == -1) & (losers == -1)
    outside = (winners < 0) | (winners >= n) | (losers < 0) | (losers >= n)
    _refuse(outside & ~padding, "pair", f"arms must be in 0 ... {n - 1}", edges)
    _refuse((winners == losers) & ~padding, "pair", "an arm cannot be preferred to itself", edges)
    _refuse(
        ~(np.isfinite(pair_weights) & (pair_weights > 0)) & ~padding, "pair", "the weight must be finite and > 0", given
    )
    _refuse(~(np.isfinite(refs) & (refs > 0)), "arm", "ref must be a probability > 0", ref)
    total = refs.sum(axis=0)
    _refuse(abs(total[None] - 1) > 1e-9, "entry", "ref must sum to 1", total[:, None])
    check_reduction(reduction)
    pair_weights[padding] = 0.0
    if reduction == "mean":
        pair_weights /= np.maximum(pair_weights.sum(axis=0), np.finfo(np.float64).tiny)
    loss = objective.pair_loss()
    if isinstance(objective, Distillation):
        loss = Square(objective.beta, np.broadcast_to(objective.reward_margins, (problems, m)).T)
    alphas = _per_problem("alpha", positive("alpha", alpha), problems)
    _per_problem(
        "tau" if isinstance(objective, IPO) else "beta",
        loss.scale if not isinstance(objective, IPO) else objective.tau,
        problems,
    )

    winners[padding] = losers[padding] = 0
    columns = [winners, losers, pair_weights, np.log(refs), _components(winners, losers, n)]
    # The C library returns freed blocks to the system beyond a size that follows the largest block freed so far (glibc
    # stops at 32 MB). Freeing a large one, never touched, keeps the work arrays in the process: their page faults would
    # take a third of the time.
    np.empty(_KEPT)
    u, residual = np.empty((problems, n)), np.empty(problems)
    size = max(256, _CHUNK // n**2)
    for start in range(0, problems, size):
        part = slice(start, start + size)
        layout = Layout(*[np.ascontiguousarray(array[:, part]) for array in columns])
        with np.errstate(all="ignore"):  # the residuals judge what comes out
            state, _ = minimise(
                layout,
                loss.subset(part),
                alphas[part],
                dense_direction,
                start=np.zeros(layout.log_ref.shape),
                tolerance=tolerance,
                max_iterations=_MAX_ITERATIONS,
            )
        u[part], residual[part] = state.u.T, state.residual
    sums = np.exp(np.log(ref) + u).sum(axis=1)
    failed = ~((residual <= tolerance) & (np.abs(sums - 1) <= _NORMALISED))
    if failed.any():
        at = int(np.argmax(failed))
        raise NotConverged(
            f"problem {at}: probabilities that sum to {sums[at]:.6g}, not 1, or relative residual {residual[at]:.1e} "
            f"above the tolerance {tolerance:g} ({failed.sum()} of {problems} problems)"
        )
    return BatchOptimum(log_probs=np.log(ref) + u, logratios=u, residual=residual)


def _components(winners: Any, losers: Any, n: int) -> Any:
    """[m, P], [m, P] -> [n, P]: equal labels for arms of a problem that are linked by pairs."""
    arms = np.arange(n, dtype=np.min_scalar_type(-n))  # the narrower, the faster
    labels, column = np.repeat(arms[:, None], winners.shape[1], axis=1), np.arange(winners.shape[1])
    for winner, loser in zip(winners, losers, strict=True):
        kept, dropped = labels[winner, column], labels[loser, column]
        labels += (labels == dropped) * (kept - dropped)
    return labels


def _per_problem(name: str, value: Any, problems: int) -> Floats:
    if np.shape(value) not in ((), (problems,)):
        raise ValueError(f"{name} must be a number or one a problem, [{problems}], got shape {np.shape(value)}")
    return np.broadcast_to(np.asarray(value, dtype=np.float64), (problems,))


def _refuse(bad: Any, what: str, rule: str, values: Any) -> None:
    if bad.any():
        problem, at = np.argwhere(bad.T)[0].tolist()
        raise ValueError(f"problem {problem}, {what} {at}: {rule}, got {np.asarray(values)[problem, at].tolist()}")
