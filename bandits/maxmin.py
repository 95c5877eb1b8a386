"""Pessimism over an ensemble of rewards: the max-min policy, its saddle point, and forward-KL-closest policies.

[F] Theorem 2: max over pi of min over rewards r of E[r(pi) - r(pi_ref)] - beta KL(pi || pi_ref) is attained by the
policy pi_r = argmax for one r, pi_r proportional to pi_ref exp(r / beta), whose forward KL from pi_ref is least. It
holds for the *mixtures* of finitely many rewards and fails for the rewards alone; both choices are computed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp

from bandits.objectives import Floats, numbers, positive
from bandits.policy import probabilities, sum_error
from bandits.solve import NotConverged, simplex_newton_step
from theory.certificates import Certificate, saddle_point

_MAX_ITERATIONS = 200


@dataclass(frozen=True, eq=False, kw_only=True)
class MaxMin:
    """A mixture of rewards and its optimal policy."""

    log_probs: Floats
    """log pi_r, [n], nats."""
    weights: Floats
    """[K], of the mixture r."""
    value: float
    """min over the members of E[r(pi) - r(pi_ref)] - beta KL(pi || pi_ref), in reward units."""
    forward_kl: float
    """KL(pi_ref || pi_r), nats."""
    certificate: Certificate
    """`theory.certificates.saddle_point`: zero gaps iff this is the max-min policy."""


def target_policy(rewards: Floats, ref: Floats, *, beta: float) -> Floats:
    """log of pi_ref exp(r / beta) / Z, the optimum of [F] eq 1. rewards [..., n], ref [n] -> [..., n]."""
    scores = np.log(ref) + rewards / beta
    return np.asarray(scores - logsumexp(scores, axis=-1, keepdims=True))


def closest_member(rewards: Any, ref: Any, *, beta: float) -> MaxMin:
    """The single member whose policy has the least forward KL from pi_ref: e-DPO's choice. rewards [K, n], ref [n]."""
    rewards, ref, beta = _checked(rewards, ref, beta)
    divergences = -(target_policy(rewards, ref, beta=beta) - np.log(ref)) @ ref
    return _described(np.eye(len(rewards))[int(np.argmin(divergences))], rewards, ref, beta)


def max_min(rewards: Any, ref: Any, *, beta: float, tolerance: float = 1e-10) -> MaxMin:
    """The max-min policy over all policies: the forward-KL-closest one over the convex hull of the rewards.

    Newton's method on KL(pi_ref || pi_r) = log E_ref exp(r / beta) - E_ref r / beta, convex in the weights.

    Args:
        rewards: [K, n], finite, a row a member.
        ref: pi_ref, [n], positive.
        beta: weight of the reverse KL, > 0, in reward units a nat.
        tolerance: on both gaps of the saddle point, in reward units relative to the rewards' range.

    Raises:
        ValueError: bad input.
        NotConverged: the gaps stayed above the tolerance.
    """
    rewards, ref, beta = _checked(rewards, ref, beta)
    weights = np.full(len(rewards), 1 / len(rewards))
    scaled = rewards / beta
    scale = max(1.0, float(np.ptp(rewards)))

    def policy_and_slope(weights: Floats) -> tuple[Floats, Floats]:
        pi = np.exp(target_policy(weights @ scaled, ref, beta=1.0))
        slope = scaled @ (pi - ref)
        return pi, slope - weights @ slope  # only differences count on the simplex

    pi, slope = policy_and_slope(weights)
    best = _described(weights, rewards, ref, beta)
    for _ in range(_MAX_ITERATIONS):
        centred = scaled - (scaled @ pi)[:, None]
        hessian = (centred * pi) @ centred.T
        ridge = 1e-13 * float(np.trace(hessian)) + np.finfo(np.float64).tiny
        move = simplex_newton_step(hessian, slope, weights, ridge=ridge)
        step = 1.0
        new_pi, new_slope = policy_and_slope(weights + move)
        while new_slope @ move > 0.1 * abs(slope @ move) and step > 1e-6:  # past the minimum of a convex function
            step /= 2
            new_pi, new_slope = policy_and_slope(weights + step * move)
        weights, pi, slope = weights + step * move, new_pi, new_slope
        weights = weights / weights.sum()
        found = _described(weights, rewards, ref, beta)
        improved = found.certificate.worst < 0.5 * best.certificate.worst
        if found.certificate.worst < best.certificate.worst:
            best = found
        if best.certificate.accepts(tolerance * scale) and not improved:
            return best
    raise NotConverged(f"saddle point residuals {dict(best.certificate.residuals)} above {tolerance * scale:g}")


def _described(weights: Floats, rewards: Floats, ref: Floats, beta: float) -> MaxMin:
    log_probs = target_policy(weights @ rewards, ref, beta=beta)
    pi, u = np.exp(log_probs), log_probs - np.log(ref)
    return MaxMin(
        log_probs=log_probs,
        weights=weights,
        value=float((rewards @ (pi - ref)).min() - beta * pi @ u),
        forward_kl=float(-ref @ u),
        certificate=saddle_point(log_probs, np.log(ref), rewards, weights, beta=beta),
    )


def _checked(rewards: Any, ref: Any, beta: Any) -> tuple[Floats, Floats, float]:
    rewards, ref = numbers("rewards", rewards), probabilities(ref)
    if rewards.ndim != 2 or ref.shape != rewards.shape[1:] or not rewards.size:
        raise ValueError(f"rewards must have shape [K, n] and ref [n], got {rewards.shape} and {ref.shape}")
    if not np.isfinite(rewards).all():
        member, arm = np.argwhere(~np.isfinite(rewards))[0].tolist()
        raise ValueError(f"the reward of member {member} for arm {arm} must be finite, got {rewards[member, arm]}")
    bad = ~(np.isfinite(ref) & (ref > 0))
    if bad.any():
        arm = int(np.argmax(bad))
        raise ValueError(f"ref of arm {arm} must be a probability > 0, got {ref[arm]:g}")
    if abs(ref.sum() - 1) > 1e-9:
        raise ValueError(f"ref must sum to 1, its entries {sum_error(float(ref.sum()))}")
    beta_number = positive("beta", beta)
    if np.ndim(beta_number):
        raise ValueError(f"beta must be one number, got shape {np.shape(beta_number)}")
    return rewards, ref, float(beta_number)
