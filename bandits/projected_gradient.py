"""Projected gradient descent on the probabilities, as [F] solves its bandits; an independent check of Newton's method.

Nothing is shared with `bandits.newton`: the variables are the probabilities, the constraint is the simplex, and the
objective is evaluated by `theory.losses`. Step lengths are Barzilai and Borwein's with a non-monotone line search
(Birgin, Martinez and Raydan 2000), without which the method needs a million steps where probabilities are small.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from bandits.objectives import DPO, IPO, MARGIN_KINDS, Distillation, Floats, check_kind, positive
from bandits.policy import check_graph, reference
from bandits.solve import NotConverged, Reduction, check_pairs, reduced_weights
from theory import losses
from theory.certificates import simplex_kkt
from theory.preferences import PreferenceGraph

_MEMORY = 10
_SUFFICIENT = 1e-4
_ROUNDING = 1e-14


def project_to_simplex(point: Floats) -> Floats:
    """The nearest probability vector in Euclidean distance. [n] -> [n]."""
    point = point - point.max()  # changes nothing but the rounding errors
    descending = np.sort(point)[::-1]
    excess = (np.cumsum(descending) - 1) / np.arange(1, len(point) + 1)
    return np.asarray(np.maximum(point - excess[np.flatnonzero(descending > excess)[-1]], 0.0))


def projected_gradient(
    objective: DPO | IPO | Distillation,
    graph: PreferenceGraph,
    ref: Any,
    *,
    alpha: float,
    reduction: Reduction = "mean",
    tolerance: float = 1e-10,
    max_iterations: int = 100_000,
) -> Floats:
    """pi, [n]: the stationary point of mean loss + alpha KL(pi_ref || pi) that descent from pi_ref reaches.

    Args:
        objective: of `bandits.objectives`, not an ensemble.
        graph: the preference pairs.
        ref: pi_ref, [n], all positive.
        alpha: KL weight, > 0.
        reduction: as in `bandits.solve.solve`.
        tolerance: on the length of the projected gradient step, in probability.
        max_iterations: at most.

    Raises:
        TypeError: input of the wrong kind.
        ValueError: bad input.
        NotConverged: the tolerance was not reached.
    """
    check_kind(objective, *MARGIN_KINDS)
    check_graph(graph)
    pi = reference(ref, graph)
    if (pi == 0).any():
        raise ValueError(f"ref of arm {int(np.argmin(pi))} must be > 0 for projected gradient descent, got 0")
    check_pairs(objective, graph)
    alpha, ref_pi, log_ref = positive("alpha", alpha), pi, np.log(pi)
    weights, loss = reduced_weights(graph, reduction), objective.pair_loss()

    def value(pi: Floats) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):
            u = np.log(pi) - log_ref
            total = weights @ loss.value(graph.margins(u)) + alpha * (ref_pi @ losses.forward_kl(u))
        return float(total) if np.isfinite(total) else np.inf  # the KL is infinite on the simplex's faces

    def gradient(pi: Floats) -> Floats:
        slopes = loss.derivatives(graph.margins(np.log(pi) - log_ref)).slope
        return np.asarray((graph.by_response(weights * slopes) - alpha * ref_pi) / pi)

    current, slope, length = value(pi), gradient(pi), 1.0
    history = deque([current], maxlen=_MEMORY)
    for _ in range(max_iterations):
        if np.abs(project_to_simplex(pi - slope) - pi).max() <= tolerance:
            return pi
        move = project_to_simplex(pi - length * slope) - pi
        descent, step = float(slope @ move), 1.0
        while value(pi + step * move) > max(history) + _SUFFICIENT * step * descent + _ROUNDING * max(
            1.0, abs(current)
        ):
            step /= 2
            if step < 1e-20:
                break
        if step < 1e-20:
            break
        moved = pi + step * move
        new_slope = gradient(moved)
        change, bend = moved - pi, float((moved - pi) @ (new_slope - slope))
        length = float(np.clip((change @ change) / bend, 1e-12, 1e12)) if bend > 0 else 1e12
        pi, slope, current = moved, new_slope, value(moved)
        history.append(current)
    kkt = simplex_kkt(pi, slope)
    if kkt.accepts(tolerance):
        return pi
    raise NotConverged(f"projected gradient stopped at {dict(kkt.residuals)}, above the tolerance {tolerance:g}")
