"""What a pessimistic optimum guarantees: its advantage over pi_ref under *any* reward, by how that fits the data.

    python -m bandits.certify

For pi at the optimum of f(u) + alpha KL(pi_ref || pi), f convex in the margins (DPO, IPO, distillation, the hull of
distillations), and every reward r (`theory`, row `pessimism-certificate`):

    E_pi[r] - E_ref[r] >= beta J - (beta / alpha) (f(r / beta) - lambda),  lambda = f(u), J = the sum of both KLs.

So under a true reward that fits the data at least as well as beta u does, the advantage is at least beta J. At another
policy, as that of a trained network, the guarantee holds with (1 / alpha) g.(r - beta u) added, g the objective's
gradient in the logits. The command draws a true reward and labels, and sets what is guaranteed beside what is true.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bandits.objectives import (
    DPO,
    IPO,
    Distillation,
    EnsembleHull,
    Floats,
    check_kind,
    numbers,
)
from bandits.policy import check_graph, reference
from bandits.solve import Optimum, Reduction, check_pairs, one_number, reduced_weights, solve
from theory import budget, losses
from theory.preferences import PreferenceGraph
from theory.shell import argument_parser, as_command, whole_number

Certifiable = DPO | IPO | Distillation | EnsembleHull

_SUMS = 1e-6
_BISECTIONS = 60
_SMALLEST_ALPHA, _LARGEST_ALPHA = 1e-6, 1e6


@dataclass(frozen=True, eq=False, kw_only=True)
class Guarantee:
    """What holds at a policy; all of it computed from the policy, pi_ref and the pairs, none of it from a reward."""

    objective: Certifiable
    graph: PreferenceGraph
    weights: Floats
    """Of the pairs as they enter the objective, [m]."""
    alpha: float
    beta: float
    """Reward units a nat: r / beta is compared with log-ratios."""
    ref: Floats
    """pi_ref, [n]."""
    policy: Floats
    """pi, [n]."""
    logratios: Floats
    """u, [n], nats; 0 where pi_ref is 0."""
    level: float
    """lambda = f(u), the data's loss of the implicit reward beta u."""
    forward_kl: float
    """KL(pi_ref || pi), nats."""
    reverse_kl: float
    """KL(pi || pi_ref), nats."""
    gradient: Floats
    """Of the objective in the logits, [n]; 0 at the optimum."""

    @property
    def divergence(self) -> float:
        """J, nats."""
        return self.forward_kl + self.reverse_kl

    @property
    def advantage(self) -> float:
        """beta J: what every reward with f(r / beta) <= lambda is worth at least, where the gradient is 0."""
        return self.beta * self.divergence

    @property
    def max_min_value(self) -> float:
        """beta KL(pi_ref || pi): the largest that any policy has of E_pi[r] - E_ref[r] - beta KL(pi || pi_ref) under
        the worst of those rewards ([F] eq 8); at the optimum."""
        return self.beta * self.forward_kl

    @property
    def residual(self) -> float:
        """By how much the guarantee falls at most for each nat of the range of r / beta - u; 0 at the optimum."""
        return float(self.beta / self.alpha * np.abs(self.gradient).sum() / 2)

    @property
    def divergence_bound(self) -> float:
        """C / alpha of `theory.budget`, nats: an optimum's J is not above it."""
        return budget.divergence_bound(self.alpha, self._constant)

    @property
    def _constant(self) -> float:
        total, objective = float(self.weights.sum()), self.objective
        if isinstance(objective, DPO):
            return total * budget.DPO
        if isinstance(objective, IPO):
            return total * budget.ipo_constant(tau=float(objective.tau))
        squares = np.square(np.atleast_2d(objective.reward_margins)) @ self.weights
        return float(squares.max()) / 2

    def loss(self, rewards: Any) -> float:
        """f(r / beta), the data's loss of a reward, [n]: under DPO the log-loss of the labels by Bradley-Terry."""
        return data_loss(self.objective, self.graph, self.weights, self._checked(rewards) / self.beta)

    def for_reward(self, rewards: Any) -> float:
        """The least that E_pi[r] - E_ref[r] can be under this reward, [n], reward units. Holds at any policy."""
        rewards = self._checked(rewards)
        off = float(self.gradient @ (rewards - self.beta * self.logratios)) / self.alpha
        return self.advantage - self.beta / self.alpha * (self.loss(rewards) - self.level) + off

    def true_advantage(self, rewards: Any) -> float:
        """E_pi[r] - E_ref[r]."""
        return float((self.policy - self.ref) @ self._checked(rewards))

    def _checked(self, rewards: Any) -> Floats:
        array = numbers("rewards", rewards)
        if array.shape != self.ref.shape or not np.isfinite(array).all():
            raise ValueError(f"rewards must be {len(self.ref)} finite numbers, one an arm, got {array.tolist()}")
        return array


def certify(
    objective: Certifiable,
    graph: PreferenceGraph,
    ref: Any,
    *,
    alpha: float,
    beta: float | None = None,
    reduction: Reduction = "mean",
    log_probs: Any = None,
) -> Guarantee:
    """The guarantee at the exact optimum, or at a given policy.

    Args:
        objective: DPO, IPO, Distillation or EnsembleHull; for EnsembleMin there is none (its loss is not convex).
        graph: the preference pairs over n arms.
        ref: pi_ref, [n].
        alpha: the KL weight, > 0.
        beta: reward units a nat; the objective's own where not given. IPO has none.
        reduction: as in `bandits.solve.solve`.
        log_probs: log pi, [n], nats, normalised; the exact optimum's where not given.

    Raises:
        TypeError, ValueError: bad input; the message names the field.
        NotConverged: of `solve`.
    """
    check_kind(objective, DPO, IPO, Distillation, EnsembleHull)
    check_graph(graph)
    alpha = one_number("alpha", alpha)
    if beta is None and isinstance(objective, IPO):
        raise ValueError("beta must be given for IPO: the reward units of a nat of log-ratio")
    scale = one_number("beta", getattr(objective, "beta", None) if beta is None else beta)
    share, weights = reference(ref, graph), reduced_weights(graph, reduction)
    check_pairs(objective, graph)
    if log_probs is None:
        solved = solve(objective, graph, share, alpha=alpha, reduction=reduction)
        assert isinstance(solved, Optimum)  # with a KL there always is one
        logps = solved.log_probs
    else:
        logps = numbers("log_probs", log_probs)
        if logps.shape != share.shape or not abs(np.exp(logps).sum() - 1) < _SUMS:
            raise ValueError(
                f"log_probs must be log-probabilities of {graph.n} arms, got shape {logps.shape} and probabilities "
                f"that sum to {np.exp(logps).sum():.6g}"
            )
    support = share > 0
    policy, u = np.exp(logps), np.zeros(graph.n)
    if policy[~support].any():
        raise ValueError(f"log_probs of arm {int(np.argmax(policy * ~support))} must be -inf: its ref is 0")
    u[support] = logps[support] - np.log(share[support])
    if not np.isfinite(u).all():
        raise ValueError(f"log_probs of arm {int(np.argmin(np.isfinite(u)))} must be finite: its ref is positive")
    kl = losses.forward_kl(u)
    return Guarantee(
        objective=objective,
        graph=graph,
        weights=weights,
        alpha=alpha,
        beta=scale,
        ref=share,
        policy=policy,
        logratios=u,
        level=data_loss(objective, graph, weights, u),
        forward_kl=float(share @ kl),
        reverse_kl=float(-policy @ kl),
        gradient=data_slopes(objective, graph, weights, u) + alpha * (policy - share),
    )


def data_loss(objective: Certifiable, graph: PreferenceGraph, weights: Floats, logratios: Floats) -> float:
    """f at log-ratios, or at r / beta, [n]."""
    margins = graph.margins(logratios)
    return float(weights @ _single(objective, weights, margins).pair_loss().value(margins))


def data_slopes(objective: Certifiable, graph: PreferenceGraph, weights: Floats, logratios: Floats) -> Floats:
    """The gradient of f, [n]; for the hull by the envelope theorem."""
    margins = graph.margins(logratios)
    slopes = _single(objective, weights, margins).pair_loss().derivatives(margins).slope
    return np.asarray(graph.incidence.T @ (weights * slopes))


def _single(objective: Certifiable, weights: Floats, margins: Floats) -> DPO | IPO | Distillation:
    """The objective, or of a hull the mixture that fits these margins best."""
    if not isinstance(objective, EnsembleHull):
        return objective
    residuals = np.sqrt(weights) * (objective.reward_margins - objective.beta * margins)
    return objective.member(losses.hull_weights(residuals @ residuals.T))


def alpha_at_level(
    objective: Certifiable, graph: PreferenceGraph, ref: Any, level: float, *, reduction: Reduction = "mean"
) -> float:
    """The alpha from 1e-6 to 1e6 whose optimum has f(u) = level, by bisection: f(u) rises with alpha.

    With the level at the loss of the true reward (about the labels' entropy), the guarantee is beta J for that reward.

    Raises:
        ValueError: no alpha in that range has it; says which levels there are.
    """
    check_graph(graph)
    weights = reduced_weights(graph, reduction)

    def attained(alpha: float) -> float:
        solved = solve(objective, graph, ref, alpha=alpha, reduction=reduction)
        assert isinstance(solved, Optimum)
        return data_loss(objective, graph, weights, solved.logratios)

    low, high = _SMALLEST_ALPHA, _LARGEST_ALPHA
    least, most = attained(low), attained(high)
    if not least <= level <= most:
        raise ValueError(f"level must be from {least:.6g} to {most:.6g}, the losses at alpha {low:g} and {high:g}")
    for _ in range(_BISECTIONS):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if attained(middle) < level else (low, middle)
    return float(np.sqrt(low * high))


# ---------------------------------------------------------------- an example


def example(arms: int, labels: int, seed: int) -> tuple[PreferenceGraph, Floats, Floats]:
    """Pairs labelled by Bradley-Terry under a true reward: (graph, pi_ref [n], the reward [n])."""
    rng = np.random.default_rng(seed)
    rewards, ref = rng.normal(scale=1.5, size=arms), rng.dirichlet(np.full(arms, 2.0))
    first = rng.integers(0, arms, labels)
    second = (first + rng.integers(1, arms, labels)) % arms
    wins = rng.random(labels) < np.exp(-losses.bradley_terry(rewards[first] - rewards[second]))
    pairs = np.where(wins[:, None], np.stack([first, second], 1), np.stack([second, first], 1))
    edges, counts = np.unique(pairs, axis=0, return_counts=True)
    return PreferenceGraph(arms, edges, counts), ref, rewards


def table(graph: PreferenceGraph, ref: Floats, rewards: Floats, beta: float, alphas: Sequence[float]) -> str:
    """p-DPO's guarantees as text, a line an alpha; the last alpha is that whose lambda is the true reward's loss."""
    objective = DPO(beta=beta)
    truth = data_loss(objective, graph, reduced_weights(graph, "mean"), rewards / beta)
    columns = ("alpha", "J", "C/alpha", "lambda", "beta J", "guaranteed", "true")
    lines = ["".join(f"{name:>12}" for name in columns)]
    chosen = [*alphas]
    try:
        chosen.append(alpha_at_level(objective, graph, ref, truth))
    except ValueError as error:
        lines.append(f"no alpha has lambda at the true reward's loss: {error}")
    for alpha in chosen:
        found = certify(objective, graph, ref, alpha=alpha)
        values = (
            *(alpha, found.divergence, found.divergence_bound, found.level, found.advantage),
            *(found.for_reward(rewards), found.true_advantage(rewards)),
        )
        lines.append("".join(f"{value:>12.4f}" for value in values))
    lines.append(
        f"\nThe true reward's log-loss on the labels is {truth:.4f}: where lambda is that or more, its advantage is at "
        "least\nbeta J. `guaranteed` is the bound for this very reward, `true` its advantage, both in reward units."
    )
    return "\n".join(lines)


@as_command
def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    parser = argument_parser(
        "bandits.certify",
        "What pessimism guarantees on a drawn example, beside what is true: p-DPO on Bradley-Terry labels.",
        "",
        "--arms 6 --labels 200 --beta 0.5 --alpha 0.03 0.3 --seed 1",
    )
    parser.add_argument("--arms", type=whole_number, default=4, help="number of arms (%(default)s)")
    parser.add_argument("--labels", type=whole_number, default=100, help="number of labels (%(default)s)")
    parser.add_argument("--beta", type=float, default=1.0, help="reward units a nat (%(default)s)")
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.01, 0.1, 1.0], help="KL weights (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the reward, the reference and the labels (%(default)s)")
    options = parser.parse_args(arguments)
    if options.arms < 2:
        raise ValueError(f"arms must be at least 2, got {options.arms}")
    graph, ref, rewards = example(options.arms, options.labels, options.seed)
    print(table(graph, ref, rewards, options.beta, options.alpha))
    return 0


if __name__ == "__main__":
    sys.exit(main())
