"""Certificates of optimality: residuals that are zero at an optimum and at nothing else.

Each function takes a proposed solution and returns how far it is from meeting the conditions; none solves anything,
so a solver's answer can be judged without trusting the solver. Leading axes are a batch, of which the worst counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp

from theory.preferences import PreferenceGraph

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Certificate:
    """Named residuals, each >= 0, in the units of what they measure; NaN where the proposed solution holds one."""

    residuals: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The largest residual."""
        return float(np.max(list(self.residuals.values())))

    def accepts(self, tolerance: float) -> bool:
        """Whether every residual is at most `tolerance`; False where one is NaN."""
        return self.worst <= tolerance


def stationarity(gradient: Floats) -> Certificate:
    """Of an unconstrained minimum: the largest |partial derivative|. gradient [..., n]."""
    return Certificate({"stationarity": _largest(np.abs(gradient))})


def simplex_kkt(weights: Floats, gradient: Floats) -> Certificate:
    """Karush-Kuhn-Tucker conditions of min f over the simplex; sufficient where f is convex.

    Args:
        weights: proposed minimiser, [..., n].
        gradient: of f there, [..., n].

    Returns:
        `feasibility` (of weights >= 0, sum 1), `dual_feasibility` (by how much an entry's slope falls below the
        multiplier weights . gradient) and `complementarity` (weight times slope above the multiplier).
    """
    _same_shape(weights=weights, gradient=gradient)
    multiplier = (weights * gradient).sum(axis=-1, keepdims=True)
    return Certificate(
        {
            "feasibility": max(_largest(np.abs(weights.sum(axis=-1) - 1)), _largest(np.maximum(-weights, 0))),
            "dual_feasibility": _largest(np.maximum(multiplier - gradient, 0)),
            "complementarity": _largest(np.abs(weights * (gradient - multiplier))),
        }
    )


def policy_kkt(policy_logps: Floats, gradient: Floats) -> Certificate:
    """The same conditions for a policy with all probabilities positive, in log-probabilities.

    On the set where probabilities sum to one, L(log pi) is stationary iff dL/dlog pi(y) = pi(y) * sum of all of them.
    Sufficient where L is convex in log pi and rises in no entry (then sum exp(log pi) <= 1 may stand for = 1).

    Args:
        policy_logps: log pi, [..., n], nats.
        gradient: dL/dlog pi with the entries taken as free variables, [..., n].

    Returns:
        `feasibility` (|sum of probabilities - 1|) and `stationarity`.
    """
    _same_shape(policy_logps=policy_logps, gradient=gradient)
    multiplier = gradient.sum(axis=-1, keepdims=True)
    return Certificate(
        {
            "feasibility": _largest(np.abs(np.expm1(logsumexp(policy_logps, axis=-1)))),
            "stationarity": _largest(np.abs(gradient - np.exp(policy_logps) * multiplier)),
        }
    )


def saddle_point(
    policy_logps: Floats, ref_logps: Floats, rewards: Floats, weights: Floats, *, beta: float
) -> Certificate:
    """Of the game max over pi, min over mixtures w of rewards, of
    V(pi, w) = E_pi[r_w] - E_ref[r_w] - beta KL(pi || pi_ref), r_w = sum_i w_i r_i; [F] Theorem 2.

    Args:
        policy_logps: log pi, [n], normalised, nats.
        ref_logps: log pi_ref, [n], finite.
        rewards: [K, n], a row a member.
        weights: w, [K].
        beta: KL weight, > 0.

    Returns:
        `feasibility` of pi and w; `policy_gap` = max over pi' of V(pi', w) - V(pi, w), what the policy could still
        gain; `adversary_gap` = V(pi, w) - min over w' of V(pi, w'), what the choice of reward could. Both zero iff
        (pi, w) is a saddle point, and then V(pi, w) is the max-min value.
    """
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    _same_shape(policy_logps=policy_logps, ref_logps=ref_logps)
    policy, ref = np.exp(policy_logps), np.exp(ref_logps)
    payoffs = rewards @ (policy - ref) - beta * policy @ (policy_logps - ref_logps)
    value = weights @ payoffs
    mixture = weights @ rewards
    best_response = beta * logsumexp(ref_logps + mixture / beta) - ref @ mixture
    return Certificate(
        {
            "feasibility": max(
                abs(float(policy.sum()) - 1), abs(float(weights.sum()) - 1), _largest(np.maximum(-weights, 0))
            ),
            "policy_gap": abs(float(best_response - value)),
            "adversary_gap": abs(float(value - payoffs.min())),
        }
    )


def farkas(graph: PreferenceGraph, multipliers: Floats) -> Certificate:
    """That no reward has a positive margin on every edge of a set: multipliers >= 0 on the edges, summing to one,
    under which the margins of *any* reward cancel (incidence.T @ multipliers = 0). Such multipliers flow round cycles.

    Every margin that carries a positive multiplier is bounded wherever the others are bounded below, so edges with
    one are those that do not diverge (Farkas' lemma, Stiemke's form).

    Args:
        graph: the preferences.
        multipliers: [m].
    """
    if multipliers.shape != (len(graph),):
        raise ValueError(f"multipliers must have shape ({len(graph)},), one an edge, got {multipliers.shape}")
    return Certificate(
        {
            "balance": _largest(np.abs(graph.incidence.T @ multipliers)),
            "sign": _largest(np.maximum(-multipliers, 0)),
            "normalisation": abs(float(multipliers.sum()) - 1),
        }
    )


def reaches(features: Sequence[Sequence[Any]], directions: Sequence[Sequence[Any]]) -> bool:
    """Whether a policy with logits `features @ theta` can move along some directions, exactly.

    Log-probabilities are logits up to the normalisation, so a constant is always added to what the features span.
    With one free parameter a response (features the identity) every direction is reached.

    Args:
        features: [n, p], exact numbers.
        directions: [n, k], likewise, a column a direction of the log-probabilities.
    """
    import sympy as sp  # costs most of a second, which the numeric certificates need not pay

    spanned = sp.Matrix.hstack(sp.Matrix(features), sp.ones(len(features), 1))
    return bool(sp.Matrix.hstack(spanned, sp.Matrix(directions)).rank() == spanned.rank())


def _largest(values: Floats) -> float:
    return float(np.max(values, initial=0.0))


def _same_shape(**arrays: Floats) -> None:
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes must be equal, but " + ", ".join(f"{k} has {v}" for k, v in shapes.items()))
