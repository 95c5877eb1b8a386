"""Pessimism over a set of rewards: the max-min policy is the closest to pi_ref, if the set is convex.

The printed theorem exchanges max and min. For one reward there is nothing to exchange; for a convex compact set a
saddle point allows it; for a finite set, which is what e-DPO uses, the closest member's policy can do worse than not
moving from pi_ref at all. That is why there is an `ensemble_hull`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import logsumexp

from theory import losses
from theory.algebra import limit, simplify, vanishes
from theory.certificates import saddle_point
from theory.claim import Claim, require
from theory.preferences import Floats, PreferenceGraph
from theory.strategies import log_policies, matrices, positive

BETA = sp.Symbol("beta", positive=True)
REF = sp.symbols("p0:3", positive=True)
WEIGHT = sp.Symbol("w", nonnegative=True)

Divergence = Callable[[Any, Any], Any]
"""(pi_ref [n], log-ratios log(pi / pi_ref) [n]) -> a divergence between pi_ref and pi."""


def game_value(policy: Any, logratios: Any, ref: Any, reward: Any, beta: Any) -> Any:
    """V(pi, r) = E_pi[r] - E_ref[r] - beta KL(pi || pi_ref). Sequences [n] of SymPy numbers or floats."""
    return sum(
        p * (r - beta * losses.forward_kl(-u)) - q * r  # samples from pi: KL(pi || pi_ref) is forward_kl of -u
        for p, u, q, r in zip(policy, logratios, ref, reward, strict=True)
    )


def forward_kl(ref: Any, logratios: Any) -> Any:
    """KL(pi_ref || pi)."""
    return sum(q * losses.forward_kl(u) for q, u in zip(ref, logratios, strict=True))


def _tilted(ref: Any, reward: Any, beta: Any) -> tuple[list[Any], list[Any]]:
    """pi_ref exp(r / beta) / Z and its log-ratios, SymPy."""
    z = sum(q * sp.exp(r / beta) for q, r in zip(ref, reward, strict=True))
    return [q * sp.exp(r / beta) / z for q, r in zip(ref, reward, strict=True)], [r / beta - sp.log(z) for r in reward]


def _identity(expression: Any, message: str) -> None:
    """Zero as a rational function, exponentials and then logarithms taken as variables: sufficient, and quick."""
    for kind in (sp.exp, sp.log):
        expression = expression.xreplace({atom: sp.Dummy() for atom in expression.atoms(kind)})
    require(sp.expand(sp.numer(sp.together(expression))) == 0, message)


# ---------------------------------------------------------------- checks

R, S = sp.symbols("r0:3", real=True), sp.symbols("s0:3", real=True)
MIXED = [WEIGHT * r + (1 - WEIGHT) * s for r, s in zip(R, S, strict=True)]


def check_identity(divergence: Divergence) -> None:
    """max over pi of V(pi, r) = beta divergence(pi_ref, pi_r), 3 arms, all symbols free; attained at pi_r alone,
    because V(pi, r) = V(pi_r, r) - beta KL(pi || pi_r) (Theorem 1's identity)."""
    policy, logratios = _tilted(REF, R, BETA)
    best = game_value(policy, logratios, REF, R, BETA).subs(REF[2], 1 - REF[0] - REF[1])
    _identity(best - BETA * divergence(REF, logratios).subs(REF[2], 1 - REF[0] - REF[1]), "max V is another divergence")
    logp = sp.Symbol("l", real=True)
    ref, reward, log_z = sp.log(REF[0]), R[0], sp.Symbol("logZ", real=True)
    per_response = reward - BETA * losses.forward_kl(ref - logp)
    against_best = BETA * log_z - BETA * losses.forward_kl(ref + reward / BETA - log_z - logp)
    _identity(per_response - against_best, "V is not its maximum minus a KL")


def check_slope(slope: Callable[[Any, Any, Any], Any]) -> None:
    """d/dw of g(w) = max over pi of V(pi, w r + (1-w) s) is what the formula says, and g is convex in w.

    Args:
        slope: (pi_w [3], pi_ref [3], reward difference r - s [3]) -> dg/dw.
    """
    policy, logratios = _tilted(REF, MIXED, BETA)
    value = BETA * forward_kl(REF, logratios).subs(REF[2], 1 - REF[0] - REF[1])
    gap = [r - s for r, s in zip(R, S, strict=True)]
    claimed = slope(policy, REF, gap).subs(REF[2], 1 - REF[0] - REF[1])
    _identity(sp.diff(value, WEIGHT) - claimed, "another slope")
    # E_ref does not depend on w; E_pi's derivative is a variance / beta, half a sum of squares over pairs of arms.
    mean = sum(p * d for p, d in zip(policy, gap, strict=True))
    squares = sum(policy[i] * policy[j] * (gap[i] - gap[j]) ** 2 for i, j in itertools.combinations(range(3), 2))
    _identity(sp.diff(mean, WEIGHT) - squares / BETA, "another curvature")


def envelope_slope(policy: Any, ref: Any, gap: Any) -> Any:
    """E_pi[r - s] - E_ref[r - s], the slope of V itself at the policy that maximises it."""
    return sum((p - q) * d for p, q, d in zip(policy, ref, gap, strict=True))


def check_saddle(slope: Callable[[Any, Any, Any], Any]) -> None:
    """V is affine in the reward: moving the mixture from r_w to r adds (1 - w) slope, to s subtracts w slope.

    At the minimiser of g the slope is 0 inside, >= 0 at w = 0, <= 0 at w = 1: so at pi_w no member gives less than
    r_w, min over members of V(pi_w, .) = V(pi_w, r_w) = g(w); and no policy's minimum exceeds V(., r_w) <= g(w).
    With more members the same holds along every segment from the minimiser to a member.
    """
    policy, logratios = sp.symbols("q0:3", positive=True), sp.symbols("u0:3", real=True)
    step = slope(policy, REF, [r - s for r, s in zip(R, S, strict=True)])
    at = {
        name: game_value(policy, logratios, REF, reward, BETA)
        for name, reward in zip("rsw", (R, S, MIXED), strict=True)
    }
    _identity(at["r"] - at["w"] - (1 - WEIGHT) * step, "another step towards r")
    _identity(at["s"] - at["w"] + WEIGHT * step, "another step towards s")


def check_any_number_of_arms(moment: Callable[[Any, Any], Any]) -> None:
    """The identity, slope and curvature once more, as sums over n arms, n a symbol.

    Args:
        moment: (E_pi[d^2], E_pi[d]) -> beta times the curvature, d = r - s.
    """
    # beta forward_kl(u_y) = beta log Z - r(y) at every y, so beta KL(pi_ref || pi_r) = beta log Z - E_ref[r].
    log_z = sp.Symbol("logZ", real=True)
    require(sp.expand(BETA * losses.forward_kl(R[0] / BETA - log_z) - BETA * log_z + R[0]) == 0, "another divergence")
    y, n = sp.symbols("y n", integer=True, positive=True)
    q, r, s = (sp.IndexedBase(name)[y] for name in ("q", "r", "s"))
    tilt = q * sp.exp((WEIGHT * r + (1 - WEIGHT) * s) / BETA)
    z, first, second = (sp.Sum(tilt * (r - s) ** power, (y, 1, n)) for power in range(3))
    require(vanishes(sp.diff(BETA * sp.log(z), WEIGHT) - first / z), "another slope")
    curvature = sp.diff(first, WEIGHT) / z - first * sp.diff(z, WEIGHT) / z**2
    require(vanishes(BETA * curvature - moment(second / z, first / z)), "another curvature")


def variance(square: Any, mean: Any) -> Any:
    """E[d^2] - E[d]^2 >= 0."""
    return square - mean**2


Members = Sequence[Sequence[Any]]
"""[K, n], exact numbers or symbols: a row a member's reward."""


def check_one_maximiser(beta: Any) -> None:
    """V is strictly concave in the policy: response by response its second derivative is -beta / p."""
    p, ref, reward = sp.symbols("p q r", positive=True)
    curvature = simplify(sp.diff(game_value([p], [sp.log(p / ref)], [ref], [reward], beta), p, 2))
    require(curvature.is_negative, f"the maximum need not be attained once: second derivative {curvature}")


def check_max_min(ref: Sequence[Any], members: Members, weights: Sequence[Any], beta: Any = sp.S.One) -> None:
    """(pi_r, r) with r = sum_i w_i r_i is a saddle point, exactly: at pi_r no member gives less than r does, and to r
    pi_r is the best answer. Then the max-min over the members is V(pi_r, r) = beta KL(pi_ref || pi_r).

    Args:
        ref: pi_ref, [n].
        members: [K, n].
        weights: w, [K], on the simplex.
        beta: > 0.
    """
    check_one_maximiser(beta)
    mixture = _mixture(members, weights)
    policy, logratios = _tilted(ref, mixture, beta)
    value = game_value(policy, logratios, ref, mixture, beta)
    require(vanishes(value - beta * forward_kl(ref, logratios)), "V(pi_r, r) is another divergence")
    for i, member in enumerate(members):
        more = game_value(policy, logratios, ref, member, beta) - value
        if vanishes(more):
            continue
        more = sp.factor(simplify(more).rewrite(sp.exp))
        require(more.is_nonnegative, f"member {i} gives {more} more than the mixture: the adversary would choose it")


def check_losses(
    members: Members,
    weights: Sequence[Any],
    graph: PreferenceGraph | None = None,
    choose: Callable[[Any], Any] | None = None,
) -> None:
    """At pi_r, r = sum_i w_i r_i: ensemble_hull is 0, and ensemble_min is the squared distance to the nearest member's
    margins, 0 iff r is a member up to a constant.

    Args:
        members: [K, n], rational.
        weights: [K], on the simplex.
        graph: the pairs; all where not given.
        choose: Gram matrix -> weights, in the place of the hull's.
    """
    beta, everything = sp.Integer(2), list(itertools.combinations(range(len(members[0])), 2))
    pairs = everything if graph is None else graph.edges.tolist()
    margins = np.array([[r[i] - r[j] for i, j in pairs] for r in members], dtype=object)
    target = np.array(weights, dtype=object) @ margins
    if choose is None:
        hull = losses.ensemble_hull(target / beta, margins, beta=beta)
    else:
        mixed = choose(losses.ensemble_gram(target / beta, margins, beta=beta)) @ margins
        hull = losses.distillation(target / beta, mixed, beta=beta)
    require(all(vanishes(x) for x in hull), f"ensemble_hull is {hull.tolist()} at the mixture's policy")
    nearest = min(sum((target - row) ** 2) / sp.Integer(len(pairs)) for row in margins)
    found = sum(losses.ensemble_min(target / beta, margins, beta=beta)) / sp.Integer(len(pairs))
    require(vanishes(found - nearest), f"ensemble_min is {found} at the mixture's policy, not {nearest}")
    shifted = any(len({x - y for x, y in zip(_mixture(members, weights), r, strict=True)}) == 1 for r in members)
    require((nearest == 0) == shifted, f"ensemble_min is {nearest}, a member up to a constant is {shifted}")


def _mixture(members: Members, weights: Sequence[Any]) -> list[Any]:
    return [sum(w * r for w, r in zip(weights, arm, strict=True)) for arm in zip(*members, strict=True)]


def _exact(*values: Any) -> list[Any]:
    return [sp.Rational(*value) if isinstance(value, tuple) else sp.Integer(value) for value in values]


GAMES: dict[str, tuple[list[Any], Members, list[Any]]] = {
    "two opposed rewards: the reference itself": (
        _exact((1, 2), (1, 2)),
        [_exact(0, 1), _exact(1, 0)],
        _exact((1, 2), (1, 2)),
    ),
    "inside the segment, off the reference": (
        _exact((1, 4), (1, 4), (1, 2)),
        [_exact(1, 0, 3), _exact(0, 1, 3)],
        _exact((1, 2), (1, 2)),
    ),
    "three members, all needed": (
        _exact((1, 6), (1, 6), (1, 6), (1, 2)),
        [_exact(1, 0, 0, -1), _exact(0, 1, 0, -1), _exact(0, 0, 1, -1)],
        _exact((1, 3), (1, 3), (1, 3)),
    ),
    "a member is the closest of the hull": (
        _exact((1, 3), (2, 3)),
        [_exact(1, 0), _exact(2, 0), _exact(3, 1)],
        _exact(1, 0, 0),
    ),
}
"""pi_ref, members, weights of the mixture whose policy is the closest to pi_ref; beta 1."""
OPPOSED = GAMES["two opposed rewards: the reference itself"]
ALONE = GAMES["a member is the closest of the hull"]


def prove_single() -> None:
    check_identity(forward_kl)
    check_saddle(envelope_slope)
    check_max_min(*ALONE)
    check_max_min(OPPOSED[0], [_exact(2, 5)], _exact(1))  # a single reward, whichever


def prove_hull() -> None:
    """By compactness the closest point of the hull exists; at it the slope towards every member is >= 0
    (`check_slope`), which is what makes it a saddle point (`check_saddle`)."""
    check_identity(forward_kl)
    check_saddle(envelope_slope)
    check_slope(envelope_slope)
    check_any_number_of_arms(variance)
    for ref, members, weights in GAMES.values():
        check_max_min(ref, members, weights)
        check_losses(members, weights)
    check_losses([_exact(0, 1), _exact(1, 2)], _exact((1, 2), (1, 2)))  # members that differ by a constant
    check_losses([_exact(0, 0, 1), _exact(3, 0, 1), _exact(0, 2, 4)], _exact((1, 2), (1, 4), (1, 4)))
    check_losses([_exact(0, 4, 1), _exact(3, 0, 1)], _exact((1, 4), (3, 4)), PreferenceGraph.chain(3))


# ---------------------------------------------------------------- two members, in floating point


def policy_of(reward: Floats, ref: Floats, beta: float) -> Floats:
    """log pi_r, [n]."""
    logits = ref + reward / beta
    return np.asarray(logits - logsumexp(logits))


def worst_value(policy: Floats, ref: Floats, rewards: Floats, beta: float) -> float:
    """min over members of V(pi, r_i); log-probabilities [n], rewards [K, n]."""
    p, q = np.exp(policy), np.exp(ref)
    return min(float(game_value(p, policy - ref, q, reward, beta)) for reward in rewards)


def hull_weight(rewards: Floats, ref: Floats, beta: float) -> float:
    """The w whose policy of w r + (1 - w) s is closest to pi_ref in forward KL; rewards [2, n]."""
    gap, q = rewards[0] - rewards[1], np.exp(ref)

    def slope(w: float) -> float:
        return float((np.exp(policy_of(w * rewards[0] + (1 - w) * rewards[1], ref, beta)) - q) @ gap)

    if slope(0.0) >= 0:
        return 0.0
    if slope(1.0) <= 0:
        return 1.0
    return float(brentq(slope, 0.0, 1.0, xtol=1e-15, rtol=1e-14))


def closest_members(rewards: Floats, ref: Floats, beta: float) -> list[int]:
    """Members whose policies are closest to pi_ref in forward KL; several where they tie."""
    distances = [float(forward_kl(np.exp(ref), policy_of(reward, ref, beta) - ref)) for reward in rewards]
    return [i for i, distance in enumerate(distances) if distance <= min(distances) + 1e-12]


def enumerate_pairs(thorough: bool) -> str:
    """The printed statement holds for {r, s} iff the hull's minimiser is a member: every pair of small rewards."""
    largest, count, holding = 3 if thorough else 2, 0, 0
    for n in (2, 3):
        ref = np.full(n, -np.log(n))
        vectors = list(itertools.product(range(largest + 1), repeat=n))
        for pair in itertools.combinations(vectors, 2):
            rewards = np.array(pair, dtype=np.float64)
            w = hull_weight(rewards, ref, 1.0)
            maximin = policy_of(w * rewards[0] + (1 - w) * rewards[1], ref, 1.0)
            best = worst_value(maximin, ref, rewards, 1.0)
            printed = all(
                worst_value(policy_of(rewards[i], ref, 1.0), ref, rewards, 1.0) >= best - 1e-9
                for i in closest_members(rewards, ref, 1.0)
            )
            member = any(np.abs(policy_of(r, ref, 1.0) - maximin).max() < 1e-6 for r in rewards)
            require(printed == member, f"rewards {pair}: printed form {printed}, minimiser a member {member}")
            count, holding = count + 1, holding + printed
    return f"all {count} pairs of rewards in 0..{largest} on 2 and 3 arms, {holding} of which obey the printed form"


def enumerate_programs(thorough: bool) -> str:
    """Clarabel, max-min over the policy on one side and min over the mixture on the other, up to 4 members."""
    import cvxpy as cp

    rng = np.random.default_rng(0)
    count = 30 if thorough else 5
    for _ in range(count):
        n, k = int(rng.integers(2, 6)), int(rng.integers(2, 5))
        ref, rewards, beta = rng.dirichlet(np.ones(n)), rng.normal(size=(k, n)), float(rng.uniform(0.3, 2))
        policy, weights = cp.Variable(n), cp.Variable(k, nonneg=True)
        gains = rewards @ (policy - ref) - beta * cp.sum(cp.rel_entr(policy, ref))
        outer = cp.Problem(cp.Maximize(cp.min(gains)), [cp.sum(policy) == 1])
        mixture = rewards.T @ weights
        closest = cp.Problem(
            cp.Minimize(beta * cp.log_sum_exp(np.log(ref) + mixture / beta) - ref @ mixture), [cp.sum(weights) == 1]
        )
        values = [problem.solve(solver=cp.CLARABEL) for problem in (outer, closest)]
        require(bool(abs(values[0] - values[1]) < 1e-6), f"max-min {values[0]}, min-max {values[1]}")
        w = np.maximum(weights.value, 0) / np.maximum(weights.value, 0).sum()
        best = policy_of(w @ rewards, np.log(ref), beta)
        require(bool(np.abs(policy.value - np.exp(best)).max() < 1e-3), "the policies differ")
        certificate = saddle_point(best, np.log(ref), rewards, w, beta=beta)
        require(certificate.accepts(1e-3), f"no saddle point: {dict(certificate.residuals)}")
    return f"{count} pairs of exponential-cone programs, 2 to 5 arms, 2 to 4 members"


# ---------------------------------------------------------------- without each assumption


def _exactly_below_the_reference(rewards: Any, members: list[int]) -> list[sp.Expr]:
    """Exact worst-case values of the members' policies, uniform reference, beta 1, each shown to be < 0 = V(pi_ref)."""
    n = len(rewards[0])
    ref = [sp.Rational(1, n)] * n
    values = []
    for i in members:
        policy, logratios = _tilted(ref, [sp.Integer(r) for r in rewards[i]], sp.S.One)
        worst = [game_value(policy, logratios, ref, [sp.Integer(x) for x in r], sp.S.One) for r in rewards]
        values.append(min(worst, key=float))
        require(values[-1] < 0, "the closest member is no worse than the reference")
    return values


def smallest_counterexample(*, ties: bool) -> str | None:
    """The first finite set of integer rewards, by arms and then by size, all of whose closest members do worse than
    the reference; uniform reference, beta 1.

    Args:
        ties: whether several members may be equally close.
    """
    for n, largest in itertools.product((1, 2, 3), (1, 2, 3)):
        for pair in itertools.combinations(itertools.product(range(largest + 1), repeat=n), 2):
            rewards, ref = np.array(pair, dtype=np.float64), np.full(n, -np.log(n))
            members = closest_members(rewards, ref, 1.0)
            worst = [worst_value(policy_of(rewards[i], ref, 1.0), ref, rewards, 1.0) for i in members]
            if max(worst) < -1e-9 and (ties or len(members) == 1):
                exact = _exactly_below_the_reference(pair, members)
                w = hull_weight(rewards, ref, 1.0)
                best = worst_value(policy_of(w * rewards[0] + (1 - w) * rewards[1], ref, 1.0), ref, rewards, 1.0)
                return (
                    f"{n} arms, uniform reference, beta 1, S = {{{pair[0]}, {pair[1]}}}: worst-case value "
                    f"{float(max(exact, key=float)):.4f} of the closest member's policy, 0 of the reference, "
                    f"{max(best, 0.0):.4f} of the hull's"
                )
    return None


def _finite_set() -> str:
    found = smallest_counterexample(ties=False)
    require(found is not None, "no counterexample with one closest member")
    return str(found)


def _open_set() -> str:
    """S = {t (1, -1): 0 < t <= 1}, uniform reference: the KL is log cosh(t / beta), falls to 0, not attained."""
    t = sp.Symbol("t", positive=True)
    half = [sp.Rational(1, 2)] * 2
    _, logratios = _tilted(half, [t, -t], BETA)
    distance = forward_kl(half, logratios)
    require(vanishes((distance - sp.log(sp.cosh(t / BETA))).rewrite(sp.exp)), "another distance")
    require(sp.tanh(t / BETA).is_positive, "the distance does not rise with t")
    require(vanishes((sp.diff(distance, t) - sp.tanh(t / BETA) / BETA).rewrite(sp.exp)), "another slope")
    require(limit(sp.log(sp.cosh(t)), t, 0, "+") == 0, "the distance does not vanish")
    require(vanishes(game_value(half, [sp.S.Zero] * 2, half, [t, -t], BETA)), "the reference's value is not 0")
    return "S = {t (1, -1): 0 < t <= 1}: the max-min policy is pi_ref, which belongs to no member, and none is closest"


def _no_regularisation() -> str:
    a = sp.Symbol("a", positive=True)
    third = [sp.Rational(1, 3)] * 3
    value = game_value([a, 1 - a, 0], [sp.S.Zero] * 3, third, [1, 1, 0], 0)
    require(vanishes(value - sp.Rational(1, 3)), "the value depends on a")
    return "beta = 0, r = (1, 1, 0): every (a, 1 - a, 0) attains the maximum, not one policy"


# ---------------------------------------------------------------- properties

Game = tuple[Floats, Floats, float]


@st.composite
def _games(draw: st.DrawFn) -> Game:
    n = draw(st.integers(2, 5))
    return draw(log_policies(n, 2.0)), draw(matrices(2, n)), draw(positive(0.2, 5))


@given(_games(), st.data())
def closest_in_the_hull_is_a_saddle_point(game: Game, data: st.DataObject) -> None:
    """NumPy: both residuals vanish, and no other policy has a better worst case."""
    ref, rewards, beta = game
    w = hull_weight(rewards, ref, beta)
    weights = np.array([w, 1 - w])
    best = policy_of(weights @ rewards, ref, beta)
    assert saddle_point(best, ref, rewards, weights, beta=beta).accepts(1e-11 * (1 + beta + np.abs(rewards).max()))
    value = worst_value(best, ref, rewards, beta)
    other = data.draw(log_policies(len(ref)))
    assert worst_value(other, ref, rewards, beta) <= value + 1e-11 * (1 + beta)
    np.testing.assert_allclose(value, beta * forward_kl(np.exp(ref), best - ref), atol=1e-11 * (1 + beta))


@given(_games())
def hull_loss_vanishes_there_and_member_loss_does_not(game: Game) -> None:
    """NumPy: on all pairs, ensemble_hull is 0 at the max-min policy; ensemble_min is the square of the distance to the
    nearer member, min(w, 1 - w)^2 mean (delta_r - delta_s)^2."""
    ref, rewards, beta = game
    w = hull_weight(rewards, ref, beta)
    best = policy_of(w * rewards[0] + (1 - w) * rewards[1], ref, beta)
    i, j = np.triu_indices(len(ref), 1)
    margin, members = (best - ref)[i] - (best - ref)[j], rewards[:, i] - rewards[:, j]
    distance = min(w, 1 - w) ** 2 * np.mean((members[0] - members[1]) ** 2)
    assert losses.ensemble_hull(margin, members, beta=beta).mean() <= 1e-13 * (1 + np.square(members).max())
    np.testing.assert_allclose(losses.ensemble_min(margin, members, beta=beta).mean(), distance, rtol=1e-6, atol=1e-12)


@given(_games(), st.floats(0, 1))
def envelope_under_torch(game: Game, w: float) -> None:
    """torch: autograd through beta KL(pi_ref || pi_w) gives E_pi[r - s] - E_ref[r - s]; V is stationary at pi_w."""
    import torch

    ref, rewards, beta = game
    weight = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    r, s, ref_logps = (torch.tensor(x) for x in (*rewards, ref))
    mixed = weight * r + (1 - weight) * s
    logits = ref_logps + mixed / beta
    policy = torch.log_softmax(logits, 0)
    distance = (ref_logps.exp() * losses.forward_kl(policy - ref_logps)).sum()
    (slope,) = torch.autograd.grad(beta * distance, weight, retain_graph=True)
    expected = ((policy.exp() - ref_logps.exp()) * (r - s)).sum()
    assert abs((slope - expected).item()) <= 1e-11 * (1 + np.abs(rewards).max())
    free = logits.detach().requires_grad_()
    logps = torch.log_softmax(free, 0)
    value = game_value(logps.exp(), logps - ref_logps, ref_logps.exp(), mixed.detach(), beta)
    assert torch.autograd.grad(value, free)[0].abs().max() <= 1e-12 * (1 + beta + np.abs(rewards).max())


def _reverse_kl(ref: Any, logratios: Any) -> Any:
    return sum(q * sp.exp(u) * losses.forward_kl(-u) for q, u in zip(ref, logratios, strict=True))


def _half_open() -> None:
    """No member of {t (1, -1): 0 < t <= 1} is the closest: t / 2 always gives less at the policy of t."""
    t = 2 * sp.log(1 + sp.Symbol("x", positive=True))
    check_max_min(OPPOSED[0], [[t, -t], [t / 2, -t / 2]], _exact(1, 0))


IDENTITY_CONTROLS: dict[str, Callable[[], object]] = {
    "reverse KL": lambda: check_identity(_reverse_kl),
    "half the KL": lambda: check_identity(lambda q, u: forward_kl(q, u) / 2),
    "sign of the KL": lambda: check_identity(lambda q, u: -forward_kl(q, u)),
    "slope without the baseline": lambda: check_saddle(lambda p, q, d: sum(x * y for x, y in zip(p, d, strict=True))),
    "without positive beta": lambda: check_max_min(*ALONE, beta=sp.S.Zero),
    "another member than the closest": lambda: check_max_min(*ALONE[:2], _exact(0, 1, 0)),
}

CLAIMS = (
    Claim(
        id="thm2",
        source="[F] A.4, Theorem 2",
        statement=(
            "max over pi of E[r(pi) - r(pi_ref)] - beta KL(pi || pi_ref) is beta KL(pi_ref || pi_r), attained at pi_r "
            "alone. For a finite set the member closest to pi_ref attains the max-min iff its policy is the closest "
            "over the convex hull; printed without that condition, the statement fails for two rewards on two arms."
        ),
        formula=(
            r"\max_\pi\mathbb E_\pi[r]-\mathbb E_{\pi_{\rm ref}}[r]-\beta\,\mathrm{KL}(\pi\Vert\pi_{\rm ref})"
            r"=\beta\,\mathrm{KL}(\pi_{\rm ref}\Vert\pi_r)"
        ),
        domain="finitely many responses and rewards, tabular; max-min policies, no flow",
        losses=("forward_kl",),
        assumptions={
            "closest over the hull": "one reward, or a member whose policy is the closest over the convex hull",
            "positive beta": "beta > 0",
        },
        prove=prove_single,
        counterexamples={"closest over the hull": _finite_set, "positive beta": _no_regularisation},
        controls={
            **IDENTITY_CONTROLS,
            "without closest over the hull": lambda: check_max_min(*OPPOSED[:2], _exact(1, 0)),
        },
        enumerate=enumerate_pairs,
        properties=(envelope_under_torch,),
        printed=lambda: smallest_counterexample(ties=True),
    ),
    Claim(
        id="thm2-hull",
        source="ours; repairs [F] A.4, Theorem 2",
        statement=(
            "Over a convex compact set of rewards, the max-min policy is pi_r for the r in the set whose policy is "
            "closest to pi_ref in forward KL, and the max-min value is beta times that KL: (pi_r, r) is a saddle "
            "point. At it ensemble_hull is 0 on any pairs, and ensemble_min on connected ones only if r is a member up "
            "to a constant."
        ),
        formula=(
            r"\max_\pi\min_{r\in\mathrm{conv}\,S}V(\pi,r)=\beta\min_{r\in\mathrm{conv}\,S}"
            r"\mathrm{KL}(\pi_{\rm ref}\Vert\pi_r)"
        ),
        domain="finitely many responses, tabular; max-min policies, no flow; the losses: finitely many members' hull",
        losses=(
            "forward_kl",
            "distillation",
            "ensemble_gram",
            "member_weights",
            "hull_weights",
            "ensemble_min",
            "ensemble_hull",
        ),
        assumptions={
            "convex": "the set of rewards is convex",
            "compact": "the set of rewards is compact",
            "positive beta": "beta > 0",
        },
        prove=prove_hull,
        counterexamples={"convex": _finite_set, "compact": _open_set, "positive beta": _no_regularisation},
        controls={
            **IDENTITY_CONTROLS,
            "without convex": lambda: check_max_min(*OPPOSED[:2], _exact(1, 0)),
            "without compact": _half_open,
            "hull loss with equal weights": lambda: check_losses(
                *ALONE[1:], choose=lambda gram: np.array(_exact((1, 3), (1, 3), (1, 3)), dtype=object)
            ),
            "ensemble_min on pairs that do not connect": lambda: check_losses(
                [_exact(0, 1, 0), _exact(1, 2, 5)], _exact((1, 2), (1, 2)), PreferenceGraph(3, [(0, 1)])
            ),
            "hull loss with a member's weights": lambda: check_losses(*OPPOSED[1:], choose=losses.member_weights),
            "slope of E_pi alone": lambda: check_slope(lambda p, q, d: sum(x * y for x, y in zip(p, d, strict=True))),
            "sign of the slope": lambda: check_slope(lambda p, q, d: -envelope_slope(p, q, d)),
            "curvature without the mean": lambda: check_any_number_of_arms(lambda square, mean: square),
        },
        enumerate=enumerate_programs,
        properties=(
            closest_in_the_hull_is_a_saddle_point,
            hull_loss_vanishes_there_and_member_loss_does_not,
            envelope_under_torch,
        ),
        sharpens=True,
    ),
)
