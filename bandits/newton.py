"""Newton's method on the convex log-ratio form, for one large problem or for thousands of small ones at once.

With u = log pi - log pi_ref, every objective of `bandits.solve` is, in each component of the preference graph,

    F(u) = sum_pairs w f(u_w - u_l) - alpha sum_y pi_ref(y) u_y,   sum_y pi_ref(y) e^u_y = the component's mass under
    pi_ref.

The masses are constraints without loss of generality: the pairs do not see a shift of u by component, and of all
shifts KL(pi_ref || pi) prefers the one that moves no mass between components. Where alpha = 0 the shift is free and
the same choice is its limit for alpha -> 0. Three things follow. Arms in no pair keep their reference probability
exactly. The gradient, B' (w f'(B u)) + alpha (pi - pi_ref), sums to zero over each component. And the Newton matrix

    H = B' diag(w f'') B + alpha diag(pi)

is a Laplacian plus a diagonal, an M-matrix given by non-negative numbers alone: elimination in those numbers never
subtracts, so no accuracy is lost however far the weights are apart (Alfa, Xue and Ye 2002, after Grassmann, Taksar
and Heyman), where Cholesky on H breaks down once alpha pi falls below its rounding errors.

Arrays are [arms, problems] and [pairs, problems]: with the batch last, each step of the elimination is one vectorised
operation over all problems, about ten times cheaper than LAPACK called once a problem.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import splu

from bandits.objectives import Floats, PairLoss

_ACCEPTED_SLOPE = 0.1
_ROUNDING = 1e-13
_WORTH_DROPPING = 0.7  # once fewer problems are pending, go on with those alone
_EASY = 12  # iterations before rounding is looked after
_TINY = np.finfo(np.float64).tiny
_NARROW = 16
_SHORTEST_STEP = 1e-14  # below it, rounding errors decide about the move
_RESOLVED = 1e-5
_LONGEST_STEP = 40.0  # nats
_NOTHING = 1e-16  # nats: no probability changes
_OVERFLOWS, _UNDERFLOWS = 600.0, 1e-250  # exponent, and sum of exponentials


@dataclass(eq=False)
class Layout:
    """Where the pairs of P problems of n arms lie. Padding pairs have weight 0; padding arms `log_ref` -inf.

    Args:
        winners: [m, P], arm indices.
        losers: [m, P].
        weights: [m, P], >= 0.
        log_ref: [n, P], nats.
        labels: [n, P], which component of its problem an arm is in; numbers from 0 to n - 1 at most.
    """

    winners: Any
    losers: Any
    weights: Floats
    log_ref: Floats
    labels: Any

    def __post_init__(self) -> None:
        n, problems = self.log_ref.shape
        column = np.arange(problems)
        self.size = n * problems
        self.flat_winners = (self.winners * problems + column).ravel()
        self.flat_losers = (self.losers * problems + column).ravel()
        real = self.weights.ravel() > 0
        winners, losers = self.flat_winners[real], self.flat_losers[real]
        across = (np.asarray(self.labels, dtype=np.intp) * problems + column).ravel()
        self.components = (np.cumsum(np.bincount(across) > 0) - 1)[across]  # numbered across all problems
        self.ref = np.exp(self.log_ref)
        self.compared = np.zeros(self.log_ref.shape, dtype=bool)
        self.compared.ravel()[winners] = True
        self.compared.ravel()[losers] = True
        self.mass = np.bincount(self.components, self.ref.ravel())
        self.sizes = np.bincount(self.components)

    @cached_property
    def couplings(self) -> Any:
        """[m * P], where each pair goes in the table of `dense_direction`; padding goes anywhere, as nothing."""
        n, problems = self.log_ref.shape
        low, high = np.minimum(self.winners, self.losers), np.maximum(self.winners, self.losers)
        entries = _row_starts(n)[low] + np.maximum(high - low - 1, 0)
        return (entries * problems + np.arange(problems)).ravel()

    @cached_property
    def grounded(self) -> Any:
        """[n, P], true at one arm of each component."""
        first = np.zeros(self.size, dtype=bool)
        first[np.unique(self.components, return_index=True)[1]] = True
        return first.reshape(self.log_ref.shape)

    def subset(self, keep: Any) -> Layout:
        """The problems at these positions."""
        arrays = (self.winners, self.losers, self.weights, self.log_ref, self.labels)
        return Layout(*[array[:, keep] for array in arrays])

    def margins(self, u: Floats) -> Floats:
        """B u: [n, P] -> [m, P]."""
        flat = u.ravel()
        return np.asarray(flat.take(self.flat_winners) - flat.take(self.flat_losers)).reshape(self.weights.shape)

    def scatter(self, slopes: Floats) -> Floats:
        """B' slopes: [m, P] -> [n, P]."""
        flat = slopes.ravel()
        total = np.bincount(self.flat_winners, flat, self.size) - np.bincount(self.flat_losers, flat, self.size)
        return np.asarray(total).reshape(self.log_ref.shape)

    def scatter_abs(self, values: Floats) -> Floats:
        """|B|' values: [m, P] -> [n, P]."""
        flat = values.ravel()
        total = np.bincount(self.flat_winners, flat, self.size) + np.bincount(self.flat_losers, flat, self.size)
        return np.asarray(total).reshape(self.log_ref.shape)

    def normalise(self, u: Floats) -> tuple[Floats, Floats]:
        """(u, pi), u shifted so that each component has its mass under pi_ref.

        The ratio of an arm in no pair is exactly 1, so such an arm keeps u = 0 and its reference probability exactly.
        """
        logits = self.log_ref + u
        if np.max(logits) > _OVERFLOWS:
            u, logits = self.lowered(u, logits)
        pi = np.exp(logits)
        found = np.bincount(self.components, pi.ravel())
        if np.min(found, where=self.mass > 0, initial=1.0) < _UNDERFLOWS:
            u, logits = self.lowered(u, logits)
            pi = np.exp(logits)
            found = np.bincount(self.components, pi.ravel())
        ratio = np.divide(self.mass, found, out=np.ones_like(found), where=found > 0)
        shape = u.shape
        return u + np.log(ratio)[self.components].reshape(shape), pi * ratio[self.components].reshape(shape)

    def lowered(self, u: Floats, logits: Floats) -> tuple[Floats, Floats]:
        """Both shifted so that the largest logit of each component is 0: their exponentials are representable."""
        largest = np.full(len(self.mass), -np.inf)
        np.maximum.at(largest, self.components, logits.ravel())
        shift = np.where(np.isfinite(largest) & (self.sizes > 1), largest, 0.0)[self.components].reshape(u.shape)
        return u - shift, logits - shift

    def balanced(self, gradient: Floats, scale: Floats) -> Floats:
        """The gradient with its rounding errors moved, in each component, to the arm of the largest scale.

        The entries of a component sum to zero exactly; the rounding errors of large preference flows that cancel
        do not, and would push the whole cluster against arms that are tied to it only weakly.
        """
        order = np.lexsort((scale.ravel(), self.components))
        labels = self.components[order]
        anchors = order[np.append(labels[1:] != labels[:-1], True)]
        balanced = gradient.ravel().copy()
        balanced[anchors] -= np.bincount(self.components, balanced)[self.components[anchors]]
        return balanced.reshape(gradient.shape)


@dataclass(frozen=True, eq=False)
class State:
    """A normalised point and what Newton's method needs there; `residual` is [P], the rest [n, P] or [m, P]."""

    u: Floats
    pi: Floats
    gradient: Floats
    scale: Floats
    curvature: Floats
    residual: Floats

    def replaced(self, at: Any, by: State) -> State:
        """With the problems where `at` [P] is true taken from the other state."""
        pairs = zip(vars(by).values(), vars(self).values(), strict=True)
        return State(*[np.where(at, new, old) for new, old in pairs])

    def subset(self, keep: Any) -> State:
        """The problems at these positions."""
        return State(*[array[..., keep] for array in vars(self).values()])


def evaluate(layout: Layout, loss: PairLoss, alpha: Floats, u: Floats) -> State:
    """The state at u, shifted to the right masses.

    `scale` is the sum of the absolute values of the terms that make up an arm's gradient entry, and `residual` the
    worst |gradient| / scale: a relative measure, so that it means the same for alpha = 1e-6 and 1e3, and for arms of
    probability 1e-12 and 1. (Margins are not asked to be right to less than 1e-5 nats times the residual.)
    """
    u, pi = layout.normalise(u)
    by_margin = loss.derivatives(layout.margins(u))
    gradient = layout.scatter(layout.weights * by_margin.slope) + alpha * (pi - layout.ref)
    curvature = layout.weights * by_margin.curvature
    scale = layout.scatter_abs(layout.weights * by_margin.magnitude + _RESOLVED * curvature)
    scale = scale + alpha * (pi + layout.ref)
    relative = np.abs(gradient) / np.maximum(scale, _TINY)
    return State(u, pi, gradient, scale, curvature, relative.max(axis=0))


Direction = Callable[[Layout, Floats, Floats, Floats], Floats]
"""(layout, pair curvatures [m, P], diagonal [n, P], right-hand side [n, P]) -> solution of H d = rhs, [n, P]."""


def newton_diagonal(layout: Layout, alpha: Floats, pi: Floats) -> Floats:
    """What H has beside the Laplacian, [n, P]."""
    diagonal = np.where(layout.compared, alpha * pi, 1.0)
    if (alpha > 0).all():
        return diagonal
    # With alpha = 0 the shift of each component is free: any positive weight on one of its arms fixes it.
    return np.where((alpha == 0) & layout.grounded, 1.0, diagonal)


def dense_direction(
    layout: Layout, curvature: Floats, diagonal: Floats, rhs: Floats, flow: Floats | None = None
) -> Floats:
    """Elimination of the M-matrix in its non-negative parameters, all problems at once; n^3 / 3 operations each.

    `flow`, [m, P], is a further right-hand side B' flow, kept apart: what an eliminated arm received from one arm goes
    on to the others as flow between those. So arms that trade much with each other, and little with the rest, move
    by the little, which in a sum over the arm would be lost among the rounding errors of the much.
    """
    n, problems = rhs.shape
    starts = _row_starts(n)
    # Row i of the table: the couplings of arm i with each later arm (minus their entries of H), what H has on the
    # diagonal beyond all couplings, and the right-hand side.
    table = np.bincount(layout.couplings, curvature.ravel(), starts[n] * problems).reshape(-1, problems)
    table[starts[1:] - 2], table[starts[1:] - 1] = diagonal, rhs
    rows = np.split(table, starts[1:-1])
    flows = None
    if flow is not None:
        signed = np.where(layout.winners < layout.losers, flow, -flow)  # into the earlier arm, from the later
        flows = np.split(np.bincount(layout.couplings, signed.ravel(), table.size).reshape(table.shape), starts[1:-1])
    pivots, x, product = np.empty_like(rhs), np.empty_like(rhs), np.empty((n, problems))
    for k, row in enumerate(rows):
        pivots[k] = np.maximum(row[:-1].sum(axis=0), _TINY)
        for j, target in enumerate(rows[k + 1 :]):
            target += np.multiply(row[j] / pivots[k], row[j + 1 :], out=product[: len(target)])
        if flows:
            received, shares = flows[k][:-2], row[:-2] / pivots[k]
            for j, target in enumerate(flows[k + 1 :]):
                target[:-2] += shares[j] * received[j + 1 :] - shares[j + 1 :] * received[j]
                rows[k + 1 + j][-1] -= row[-2] / pivots[k] * received[j]
            row[-1] += received.sum(axis=0)
    for k in range(n - 1, -1, -1):
        row = rows[k]
        x[k] = (row[-1] + np.einsum("ip,ip->p", row[:-2], x[k + 1 :])) / pivots[k]
    return x


def _row_starts(n: int) -> Any:
    """[n + 1]: where the rows of n + 1, n, ..., 2 entries begin and end."""
    return np.append(0, np.cumsum(np.arange(n + 1, 1, -1)))


def sparse_direction(layout: Layout, curvature: Floats, diagonal: Floats, rhs: Floats) -> Floats:
    """Conjugate gradients for one large problem, cost in proportion to its pairs.

    Long narrow graphs (a small profile once reordered) are factorised whole. Otherwise the preconditioner is the
    spanning tree of the strongest couplings with the full diagonal of H: trees eliminate without fill-in, so it is
    exact where the graph is a tree and never worse than the diagonal alone on one that mixes fast.
    """
    n = len(rhs)
    ends = np.stack([layout.winners[:, 0], layout.losers[:, 0]])
    low, high = np.sort(ends, axis=0)
    couplings = sparse.coo_array((curvature[:, 0], (low, high)), shape=(n, n)).tocsr()
    couplings.sum_duplicates()
    couplings.eliminate_zeros()
    off_diagonal = couplings + couplings.T
    full_diagonal = np.asarray(off_diagonal.sum(axis=0)).ravel() + diagonal[:, 0]
    matrix = sparse.csr_array(sparse.diags_array(full_diagonal) - off_diagonal)

    order = csgraph.reverse_cuthill_mckee(sparse.csr_matrix(off_diagonal), symmetric_mode=True)
    place = np.argsort(order)
    coo = off_diagonal.tocoo()
    reach = np.zeros(n)
    np.maximum.at(reach, np.maximum(place[coo.row], place[coo.col]), np.abs(place[coo.row] - place[coo.col]))
    if reach.sum() <= _NARROW * (n + coo.nnz):
        solver = _factorise(matrix)
        solved = solver(rhs[:, 0])
        return np.asarray(solved + solver(rhs[:, 0] - matrix @ solved))[:, None]

    strongest = couplings.copy()
    strongest.data = 1 + np.log(couplings.data.max()) - np.log(couplings.data)
    tree = sparse.csr_array(csgraph.minimum_spanning_tree(strongest))
    tree.data = np.exp(1 + np.log(couplings.data.max()) - tree.data)
    precondition = _factorise(sparse.csr_array(sparse.diags_array(full_diagonal) - tree - tree.T))
    return _conjugate_gradients(matrix, rhs[:, 0], precondition)[:, None]


def _factorise(matrix: Any) -> Callable[[Floats], Floats]:
    """Solver of a symmetric positive definite sparse system, scaled to unit diagonal first."""
    scale = 1 / np.sqrt(matrix.diagonal())
    scaled = sparse.diags_array(scale) @ matrix @ sparse.diags_array(scale)
    factors = splu(
        sparse.csc_matrix(scaled), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
    )
    return lambda b: np.asarray(scale * factors.solve(scale * b))


def _conjugate_gradients(matrix: Any, rhs: Floats, precondition: Callable[[Floats], Floats]) -> Floats:
    """Stops at a relative residual of 1e-10, or where rounding stops it: Newton's method corrects what is left."""
    x, r = np.zeros_like(rhs), rhs.copy()
    z = precondition(r)
    p, rz = z.copy(), float(r @ z)
    target = 1e-20 * float(rhs @ rhs)
    for _ in range(4 * len(rhs)):
        if float(r @ r) <= target or rz <= 0:
            break
        q = matrix @ p
        step = rz / float(p @ q)
        x += step * p
        r -= step * q
        z = precondition(r)
        rz, previous = float(r @ z), rz
        p = z + (rz / previous) * p
    return x


def minimise(
    layout: Layout,
    loss: PairLoss,
    alpha: Floats,
    direction: Direction,
    *,
    start: Floats,
    tolerance: float,
    max_iterations: int,
) -> tuple[State, int]:
    """Damped Newton for all problems at once, each stopped at its own convergence.

    Args:
        layout: the problems.
        loss: the pair loss; its parameters broadcast against [m, P].
        alpha: [P], >= 0. Where it is 0 the loss must have its optimum in the given graph.
        direction: how to solve the Newton system.
        start: u, [n, P], nats.
        tolerance: on the relative residual of `evaluate`.
        max_iterations: after which, or once no step is accepted any more, the state is returned as it is; the caller
            judges its residual.
    """
    state = result = evaluate(layout, loss, alpha, start)
    problems = layout.log_ref.shape[1]
    active, step, iteration = np.arange(problems), np.ones(problems), 0
    while iteration < max_iterations:
        pending = (state.residual > tolerance) & (step > _SHORTEST_STEP)
        if not pending.any():
            break
        iteration += 1
        if pending.sum() <= _WORTH_DROPPING * len(pending):
            result = _scattered(result, state, active)
            active, step, alpha = active[pending], step[pending], alpha[pending]
            layout, loss, state = layout.subset(pending), loss.subset(pending), state.subset(pending)
        diagonal = newton_diagonal(layout, alpha, state.pi)
        gradient = state.gradient
        if iteration <= _EASY:
            move = direction(layout, state.curvature, diagonal, -gradient)
        elif direction is dense_direction:
            flow = -layout.weights * loss.derivatives(layout.margins(state.u)).slope
            move = dense_direction(layout, state.curvature, diagonal, alpha * (layout.ref - state.pi), flow)
        else:
            gradient = layout.balanced(gradient, state.scale)
            move = direction(layout, state.curvature, diagonal, -gradient)
        largest = np.abs(move).max(axis=0)
        # Below its place, an arm of little mass sees almost no curvature: unlimited, the step to it is e^distance.
        move *= step * np.where(alpha > 0, np.minimum(1.0, _LONGEST_STEP / np.maximum(largest, 1.0)), 1.0)
        trial = evaluate(layout, loss, alpha, state.u + move)
        # F is convex along the move: a slope that is still negative there, or small, means that F has fallen.
        # Comparing slopes rather than values keeps the test meaningful down to the last digits.
        before, after = -(gradient * move).sum(axis=0), (trial.gradient * move).sum(axis=0)
        accepted = after <= _ACCEPTED_SLOPE * before
        if not accepted.all():  # a slope among the rounding errors of its terms decides nothing; the residual does
            lost = np.abs(after) <= _ROUNDING * (trial.scale * np.abs(move)).sum(axis=0)
            accepted |= lost & (trial.residual < 0.5 * state.residual)
        if accepted.all() and np.abs(move).max() > _NOTHING:
            state, step = trial, np.ones_like(step)
        else:
            step = np.where(accepted, 1.0, step * np.clip(before / np.maximum(before + after, _TINY), 0.1, 0.5))
            step[np.abs(move).max(axis=0) <= _NOTHING] = 0.0
            state = state.replaced(accepted, trial)
    return _scattered(result, state, active), iteration


def _scattered(whole: State, part: State, positions: Any) -> State:
    """`whole` with `part` at these problems."""
    arrays = []
    for old, new in zip(vars(whole).values(), vars(part).values(), strict=True):
        array = np.array(old)
        array[..., positions] = new
        arrays.append(array)
    return State(*arrays)
