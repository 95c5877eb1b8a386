"""The exact optimum over tabular policies of any objective of the project, with a certificate.

    result = solve(DPO(beta=1.0), PreferenceGraph.chain(3), uniform(3), alpha=0.1)

minimises mean over pairs of the loss + alpha KL(pi_ref || pi) over all distributions pi on the arms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from bandits.hull import best_mixture, closest_mixture, face_directions, face_moves, moves
from bandits.newton import Direction, Layout, dense_direction, evaluate, minimise, newton_diagonal, sparse_direction
from bandits.objectives import (
    DPO,
    KINDS,
    Distillation,
    EnsembleHull,
    EnsembleMin,
    Floats,
    Objective,
    PairLoss,
    Square,
    check_kind,
    positive,
)
from bandits.policy import check_graph, reference
from theory import losses
from theory.certificates import Certificate, policy_kkt, simplex_kkt
from theory.preferences import PreferenceGraph

Reduction = Literal["mean", "sum"]

_DENSE_ARMS = 64  # above it, conjugate gradients on the sparse Newton matrix are cheaper
_MAX_ITERATIONS = 500
_POLISH = 1e-3  # small problems go on below the tolerance: it costs one more iteration
_NORMALISED = 1e-9
_SAME_POLICY = 1e-8  # total variation
_ACCEPTED_SLOPE = 0.1
_SHORTEST_STEP = 1e-6
_RIDGE = 1e-13
_TINY = np.finfo(np.float64).tiny


class NotConverged(ArithmeticError):
    """The residual stayed above the tolerance: the problem is beyond double precision. Never returned as a result."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Optimum:
    """A minimiser and what proves that it is one."""

    log_probs: Floats
    """log pi, [n], nats; -inf where the reference has no support."""
    logratios: Floats
    """u = log pi - log pi_ref, [n], nats; 0 exactly for arms that no pair mentions."""
    value: float
    """The objective there: mean (or sum) of the pair losses, plus alpha KL(pi_ref || pi)."""
    certificate: Certificate
    """`feasibility` and `stationarity` of `theory.certificates.policy_kkt`, in nats and loss a nat; `relative`, the
    worst arm's stationarity over the sum of the absolute values of the terms it adds up (what the tolerance is on);
    for ensembles also the conditions on the weights."""
    unique: bool
    """True only where this is shown to be the only optimal policy. Without a KL it is not on a graph of several
    components, nor where several members, or mixtures, fit equally well; the optimum given is then the limit for alpha
    -> 0: every component has its mass under pi_ref, and of equals the closest to pi_ref in forward KL is chosen. With a
    KL it is not where members tie."""
    iterations: int
    weights: Floats | None = None
    """For ensembles the mixture of the members that is fitted, [K]; one-hot for `EnsembleMin`."""
    member_values: Floats | None = None
    """For `EnsembleMin`, each member's own optimal value, [K]."""
    ties: tuple[int, ...] = ()
    """For `EnsembleMin`, the members whose value is the least one to within the tolerance, the chosen one included."""

    @property
    def probs(self) -> Floats:
        """pi, [n]."""
        return np.exp(self.log_probs)


@dataclass(frozen=True, eq=False, kw_only=True)
class Unattained:
    """DPO without a finite optimum: minimising sequences drive the margins of some pairs to infinity."""

    diverging: list[tuple[int, int]]
    """The pairs (winner, loser) whose log-ratio margin goes to +infinity: those on no preference cycle."""
    infimum: float
    """What the objective falls to without reaching it."""
    direction: Floats
    """[n]: along u + t direction the objective falls to its infimum as t -> infinity."""
    inside: Optimum
    """The optimum of the remaining pairs: the limits of all other margins are its margins."""

    def __str__(self) -> str:
        pairs = ", ".join(f"{w} > {el}" for w, el in self.diverging[:8]) + (" ..." if len(self.diverging) > 8 else "")
        return (
            f"no finite optimum: margins of {len(self.diverging)} pair(s) on no preference cycle diverge ({pairs}); "
            f"infimum {self.infimum:.6g}. A KL weight alpha > 0 makes the optimum finite."
        )


def solve(
    objective: Objective,
    graph: PreferenceGraph,
    ref: Any,
    *,
    alpha: float | None = None,
    reduction: Reduction = "mean",
    tolerance: float = 1e-10,
) -> Optimum | Unattained:
    """Minimises the objective over all distributions on the arms.

    Args:
        objective: one of `bandits.objectives`.
        graph: the preference pairs over n arms, weighted.
        ref: pi_ref, [n] probabilities; positive on every arm in a pair.
        alpha: weight of KL(pi_ref || pi), > 0; None for no pessimism.
        reduction: "mean" divides the weights by their sum (the losses are expectations), "sum" takes them as given.
        tolerance: on the relative residual.

    Returns:
        The optimum; for DPO without KL on a graph with a pair on no cycle, what diverges instead.

    Raises:
        TypeError: input of the wrong kind; the message names the field and what would be right.
        ValueError: bad input; the message names the field, the pair or the arm.
        NotConverged: double precision does not reach the tolerance, or not a distribution.
    """
    check_kind(objective, *KINDS)
    check_graph(graph)
    ref = reference(ref, graph)
    pair_weights = reduced_weights(graph, reduction)
    kl_weight = 0.0 if alpha is None else one_number("alpha", alpha)
    check_pairs(objective, graph)
    problem = _Problem(graph, pair_weights, ref, kl_weight, one_number("tolerance", tolerance))
    try:
        with np.errstate(all="ignore"):  # the residuals judge what comes out
            return problem.solution(objective)
    except (np.linalg.LinAlgError, OverflowError, ZeroDivisionError, RuntimeError) as error:
        raise NotConverged(f"numbers beyond double precision: {error}") from error


def reduced_weights(graph: PreferenceGraph, reduction: Reduction) -> Floats:
    """The pair weights as they enter the objective, [m]; raises ValueError for an unknown reduction."""
    check_reduction(reduction)
    total = graph.weights.sum() if reduction == "mean" and len(graph) else 1.0
    return np.asarray(graph.weights / total)


def one_number(name: str, value: Any) -> float:
    """A float > 0; raises ValueError, naming it, for anything else."""
    number = positive(name, value)
    if np.ndim(number):
        raise ValueError(f"{name} must be one number for one problem, got shape {np.shape(number)}")
    return float(number)


def check_reduction(reduction: Any) -> None:
    """Raises ValueError, with what would be right, for an unknown reduction."""
    if not isinstance(reduction, str) or reduction not in get_args(Reduction):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')


def check_pairs(objective: Objective, graph: PreferenceGraph) -> None:
    """Raises ValueError where the objective's parameters do not fit one problem of this graph."""
    if not isinstance(objective, Distillation | EnsembleMin | EnsembleHull):
        scale = objective.beta if isinstance(objective, DPO) else objective.tau
        name = "beta" if isinstance(objective, DPO) else "tau"
    else:
        scale, name = objective.beta, "beta"
        expected = (len(graph),) if isinstance(objective, Distillation) else (len(objective.reward_margins), len(graph))
        if objective.reward_margins.shape != expected:
            raise ValueError(
                f"reward_margins must have shape {expected}, one a pair, got {objective.reward_margins.shape}"
            )
    if np.ndim(scale):
        raise ValueError(f"{name} must be one number for one problem, got shape {np.shape(scale)}")


@dataclass(frozen=True, eq=False)
class _Problem:
    graph: PreferenceGraph
    weights: Floats
    ref: Floats
    alpha: float
    tolerance: float

    def solution(self, objective: Objective) -> Optimum | Unattained:
        if isinstance(objective, EnsembleMin):
            return self.best_member(objective)
        if isinstance(objective, EnsembleHull):
            return self.hull_optimum(objective) if self.alpha else self.hull_limit(objective)
        if isinstance(objective, DPO) and not self.alpha and self.graph.crossing.any():
            return self.unattained(objective)
        return self.optimum(objective)

    @property
    def direction(self) -> Direction:
        return dense_direction if self.graph.n <= _DENSE_ARMS else sparse_direction

    def layout(self) -> Layout:
        with np.errstate(divide="ignore"):
            log_ref = np.log(self.ref)
        edges = self.graph.edges
        return Layout(edges[:, :1], edges[:, 1:], self.weights[:, None], log_ref[:, None], self.graph.components)

    def minimise(self, loss: PairLoss, start: Floats) -> tuple[Floats, int]:
        """u and the number of iterations."""
        state, iterations = minimise(
            self.layout(),
            loss,
            np.array([self.alpha]),
            self.direction,
            start=start[:, None],
            tolerance=self.tolerance * (_POLISH if self.direction is dense_direction else 1.0),
            max_iterations=_MAX_ITERATIONS,
        )
        if not state.residual[0] <= self.tolerance:
            raise NotConverged(
                f"relative residual {state.residual[0]:.1e} above the tolerance {self.tolerance:g} after {iterations} "
                "iterations"
            )
        return state.u[:, 0], iterations

    def optimum(self, objective: DPO | Distillation | Any, start: Floats | None = None) -> Optimum:
        loss = _column(objective.pair_loss())
        u, iterations = self.minimise(loss, np.zeros(self.graph.n) if start is None else start)
        return self.certified(loss, u, iterations)

    def certified(self, loss: PairLoss, u: Floats, iterations: int) -> Optimum:
        layout = self.layout()
        log_probs = layout.log_ref[:, 0] + u
        state = evaluate(layout, loss, np.array([self.alpha]), u[:, None])
        # The free gradient of the objective in log pi; policy_kkt adds the multiplier of sum pi = 1.
        free = (state.gradient[:, 0] - self.alpha * state.pi[:, 0]) if self.alpha else state.gradient[:, 0]
        support = self.ref > 0
        residuals = policy_kkt(log_probs[support], free[support]).residuals
        pair_losses = loss.value(self.graph.margins(u)[:, None])[:, 0]
        kl = losses.forward_kl(u[support]) @ self.ref[support]
        value = float(self.weights @ pair_losses + self.alpha * kl)
        if not (residuals["feasibility"] <= _NORMALISED and np.isfinite(value)):
            raise NotConverged(
                f"the probabilities sum to 1 only to {residuals['feasibility']:.1e}, and the value is {value:g}: "
                "log-ratios, or losses, beyond double precision"
            )
        return Optimum(
            log_probs=log_probs,
            logratios=u,
            value=value,
            certificate=Certificate({**residuals, "relative": float(state.residual[0])}),
            unique=bool(self.alpha or self.graph.is_connected),
            iterations=iterations,
        )

    def unattained(self, objective: DPO) -> Unattained:
        graph, crossing = self.graph, self.graph.crossing
        inner = PreferenceGraph(graph.n, graph.edges[~crossing], graph.weights[~crossing])
        inside = replace(self, graph=inner, weights=self.weights[~crossing]).optimum(objective)
        return Unattained(
            diverging=[(int(w), int(el)) for w, el in graph.edges[crossing]],
            infimum=inside.value,
            direction=graph.ranks.astype(np.float64),
            inside=inside,
        )

    def best_member(self, objective: EnsembleMin) -> Optimum:
        """Minima over policies and members commute: the best member's own optimum is the optimum.

        Of members that tie without a KL, the limit for alpha -> 0 takes the closest to pi_ref.
        """
        optima = [self.optimum(objective.member(one)) for one in np.eye(len(objective.reward_margins))]
        values = np.array([optimum.value for optimum in optima])
        divergences = np.array([self.divergence(optimum) for optimum in optima])
        # Rounding errors of a residual are relative to its terms: they enter the value times the residual, and squared.
        rounding = self.tolerance * np.sqrt(np.square(objective.reward_margins) @ self.weights)
        least = float(values.min())
        allowed = rounding * (rounding + 2 * np.sqrt(least)) + self.tolerance * self.alpha * divergences
        ties = np.flatnonzero(values - least <= allowed)
        best = int(ties[np.argmin(divergences[ties])]) if not self.alpha else int(np.argmin(values))
        apart = [np.abs(optima[tie].probs - optima[best].probs).sum() / 2 for tie in ties]
        return replace(
            optima[best],
            unique=optima[best].unique and bool(max(apart) <= _SAME_POLICY),
            weights=np.eye(len(values))[best],
            member_values=values,
            ties=tuple(ties.tolist()),
        )

    def divergence(self, optimum: Optimum) -> float:
        """KL(pi_ref || pi), nats."""
        support = self.ref > 0
        return float(losses.forward_kl(optimum.logratios[support]) @ self.ref[support])

    def hull_limit(self, objective: EnsembleHull) -> Optimum:
        """The limit for alpha -> 0: the best mixtures are a face of the simplex, and of these the closest to pi_ref."""
        rewards, beta = objective.reward_margins, objective.beta
        members = np.array([self.optimum(objective.member(one)).logratios for one in np.eye(len(rewards))])
        margins = self.graph.margins(members)
        root = np.sqrt(self.weights)
        residuals = (root * (rewards - beta * margins)).T
        scale = float(np.abs(root * rewards).max(initial=0.0))
        residuals = np.where(np.abs(residuals) <= self.tolerance * scale, 0.0, residuals)
        weights, limit = best_mixture(residuals), 0.0
        directions, largest = face_directions(residuals, scale), float(np.abs(margins).max(initial=0.0))
        if moves(directions, margins, largest):
            weights, limit = closest_mixture(members, self.layout(), weights, directions)
            if not limit <= self.tolerance:
                raise NotConverged(f"of equal mixtures, the closest to pi_ref is known to {limit:.1e} only")
        optimum = self.optimum(objective.member(weights), weights @ members)
        kkt = self.weights_kkt(objective, optimum, weights)[1]
        if not max(kkt.values()) <= self.tolerance:
            raise NotConverged(f"the weights of the hull stay {max(kkt.values())} from their optimality conditions")
        same = not face_moves(weights, directions, margins, largest)
        return replace(
            optimum,
            unique=optimum.unique and same,
            weights=weights,
            certificate=Certificate({**optimum.certificate.residuals, **kkt, "limit": limit}),
        )

    def weights_kkt(
        self, objective: EnsembleHull, optimum: Optimum, weights: Floats
    ) -> tuple[Floats, dict[str, float]]:
        """The slope of V at the weights, [K], and what its optimality conditions lack, relative to the members' terms.

        To those of all members, not of this mixture: where it is one of margins 0, its own say nothing about rounding.
        """
        rewards = objective.reward_margins
        margins = objective.beta * self.graph.margins(optimum.logratios)
        slope = 2 * rewards @ (self.weights * (weights @ rewards - margins))
        slope -= weights @ slope  # only differences count on the simplex
        scale = 2 * np.abs(rewards) @ (self.weights * (np.abs(rewards).max(axis=0) + np.abs(margins)))
        kkt = simplex_kkt(weights, slope / max(float(scale.max()), _TINY)).residuals
        return slope, {f"weights_{name}": value for name, value in kkt.items()}

    def hull_optimum(self, objective: EnsembleHull) -> Optimum:
        """Newton on the mixture: V(w) = min over u of the objective is convex in w on the simplex, and smooth.

        Its gradient needs no derivative of u (envelope theorem), its Hessian that of u by w (implicit functions).
        """
        rewards, pair_weights = objective.reward_margins, self.weights
        weights = np.full(len(rewards), 1 / len(rewards))
        optimum: Optimum | None = None
        best: tuple[float, Optimum] | None = None
        step = 1.0
        move = slope = gradient = np.zeros(len(rewards))
        for _ in range(_MAX_ITERATIONS):
            trial_weights = weights + step * move
            trial = self.optimum(objective.member(trial_weights), optimum.logratios if optimum else None)
            slope, kkt = self.weights_kkt(objective, trial, trial_weights)
            if optimum is not None and slope @ move > _ACCEPTED_SLOPE * abs(gradient @ move) and step > _SHORTEST_STEP:
                step /= 2  # past the minimum along the move
                continue
            weights, optimum, gradient, step = trial_weights, trial, slope, 1.0
            residuals = {**optimum.certificate.residuals, **kkt}
            worst = max(kkt.values())
            if best is None or worst < best[0]:
                best = worst, replace(optimum, weights=weights, certificate=Certificate(residuals))
            elif best[0] <= self.tolerance:
                break
            if worst <= _POLISH * self.tolerance:
                break
            ridge = _RIDGE * float((pair_weights * rewards**2).sum()) + _TINY
            move = simplex_newton_step(self.hessian(objective, optimum), gradient, weights, ridge=ridge)
        if best is None or best[0] > self.tolerance:
            raise NotConverged(f"the weights of the hull stay {best and best[0]:.1e} from their optimality conditions")
        return best[1]

    def hessian(self, objective: EnsembleHull, optimum: Optimum) -> Floats:
        """Of V at the optimum of one mixture, [K, K]: 2 D' W (D - beta B du/dw) with H du/dw = 2 beta B' W D."""
        layout, alpha, members = self.layout(), np.array([self.alpha]), objective.reward_margins.T
        state = evaluate(layout, Square(objective.beta, 0.0), alpha, optimum.logratios[:, None])
        diagonal = newton_diagonal(layout, alpha, state.pi)
        weighted = self.weights[:, None] * members
        responses = [
            self.direction(layout, state.curvature, diagonal, 2 * objective.beta * layout.scatter(column[:, None]))
            for column in weighted.T
        ]
        residual = members - objective.beta * np.hstack([layout.margins(response) for response in responses])
        return np.asarray(2 * weighted.T @ residual)


def simplex_newton_step(hessian: Floats, gradient: Floats, weights: Floats, *, ridge: float) -> Floats:
    """d that minimises gradient . d + d' hessian d / 2 with weights + d on the simplex, by the active-set method.

    hessian [K, K] positive semi-definite, gradient and weights [K]. The ridge, > 0 and above the rounding errors of
    the Hessian, decides where the members are affinely dependent; a fixed point is a minimum whatever the ridge.
    """
    k = len(weights)
    ridged = hessian + ridge * np.eye(k)
    unit = float(np.trace(ridged)) / k
    ridged, gradient = ridged / unit, gradient / unit
    point, free = weights.copy(), weights > 0
    for _ in range(20 * k):
        slope = gradient + ridged @ (point - weights)
        index = np.flatnonzero(free)
        bordered = np.ones((len(index) + 1, len(index) + 1))
        bordered[:-1, :-1], bordered[-1, -1] = ridged[np.ix_(index, index)], 0.0
        solved = np.linalg.lstsq(bordered, np.append(-slope[index], 0.0), rcond=None)[0]
        move = np.zeros(k)
        move[index] = solved[:-1]
        blocking = free & (point + move < 0)
        if blocking.any():
            ratios = np.where(blocking, point / np.where(blocking, -move, 1.0), np.inf)
            first = int(np.argmin(ratios))
            point = point + ratios[first] * move
            point[first], free[first] = 0.0, False
            continue
        point = point + move
        reduced = np.where(free, 0.0, gradient + ridged @ (point - weights) + solved[-1])
        if reduced.min() >= -1e-14 * np.abs(gradient).max():
            break
        free[int(np.argmin(reduced))] = True
    point = np.maximum(point, 0.0)
    return np.asarray(point / point.sum() - weights)


def _column(loss: PairLoss) -> PairLoss:
    """The pair loss of one problem as that of a batch of one."""
    if isinstance(loss, Square) and np.ndim(loss.target):
        return Square(loss.scale, np.asarray(loss.target)[:, None])
    return loss
