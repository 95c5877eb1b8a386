"""What pessimism over a finite set of rewards guarantees: an advantage under every mixture, and how large a one.

The max-min policy pi* of V(pi, r) = E_pi[r] - E_ref[r] - beta KL(pi || pi_ref) over the mixtures of S is the RLHF
optimum of one mixture r*, and no mixture lies lower than r* in the direction pi* - pi_ref. So the advantage
E_pi*[r] - E_ref[r] is at least that under r*, which is beta (KL(pi_ref || pi*) + KL(pi* || pi_ref)). That may be 0:
nothing is promised where the rewards of S contradict each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from theory import losses
from theory.algebra import simplify, vanishes
from theory.certificates import saddle_point
from theory.claim import Claim, require
from theory.preferences import Floats
from theory.strategies import log_policies, positive, simplex, vectors

BETA = sp.Symbol("beta", positive=True)

Divergence = Callable[[Any, Any, Any], Any]
"""(policy [n], pi_ref [n], log-ratios log(pi / pi_ref) [n]) -> what beta multiplies in the guarantee."""


def symmetric_kl(policy: Any, ref: Any, logratios: Any) -> Any:
    """J = KL(pi_ref || pi) + KL(pi || pi_ref)."""
    return sum(
        q * losses.forward_kl(u) + p * losses.forward_kl(-u) for p, q, u in zip(policy, ref, logratios, strict=True)
    )


def advantage(policy: Any, ref: Any, reward: Any) -> Any:
    """E_pi[r] - E_ref[r]."""
    return sum((p - q) * r for p, q, r in zip(policy, ref, reward, strict=True))


@dataclass(frozen=True)
class Game:
    """A finite set of rewards, exactly; pi* is to be pi_ref exp(r* / beta), normalised, r* the mixture of members."""

    ref: Sequence[Any]
    members: Sequence[Sequence[Any]]
    weights: Sequence[Any]
    beta: Any = BETA

    @property
    def mixture(self) -> list[Any]:
        """r*, [n]."""
        columns = zip(*self.members, strict=True)
        return [sum(w * r for w, r in zip(self.weights, column, strict=True)) for column in columns]


L2 = sp.log(2)
THIRD, QUARTER, HALF = sp.Rational(1, 3), sp.Rational(1, 4), sp.Rational(1, 2)
CONTRADICTION = Game([HALF, HALF], [[0, 1], [1, 0]], [HALF, HALF])
ONE_REWARD = Game([QUARTER, HALF, QUARTER], [[0, BETA * L2, BETA * sp.log(3)]], [1])
# r* = beta (-log 2, log 2, 0), pi* = (1/4, 1/2, 1/4); members r* + d with d_0 = d_1, and one in no use, d_1 > d_0.
COMPROMISE = Game(
    [HALF, QUARTER, QUARTER],
    [[-BETA * L2 + 1, BETA * L2 + 1, 3], [-BETA * L2 - 1, BETA * L2 - 1, -3], [-BETA * L2, BETA * L2 + 4, 1]],
    [HALF, HALF, 0],
)
# Unequal weights: d = (2, 2, -1) and (-1, -1, 1/2).
WEIGHTED = Game(
    [HALF, QUARTER, QUARTER],
    [[-BETA * L2 + 2, BETA * L2 + 2, -1], [-BETA * L2 - 1, BETA * L2 - 1, HALF]],
    [THIRD, 2 * THIRD],
)
GAMES = (CONTRADICTION, ONE_REWARD, COMPROMISE, WEIGHTED)


# ---------------------------------------------------------------- checks


def optimum(ref: Sequence[Any], reward: Sequence[Any], beta: Any) -> tuple[list[Any], list[Any]]:
    """pi_ref exp(r / beta) / Z and its log-ratios, SymPy."""
    z = sum(q * sp.exp(sp.sympify(r) / beta) for q, r in zip(ref, reward, strict=True))
    return [q * sp.exp(sp.sympify(r) / beta) / z for q, r in zip(ref, reward, strict=True)], [
        sp.sympify(r) / beta - sp.log(z) for r in reward
    ]


def check_guarantee(game: Game, divergence: Divergence = symmetric_kl) -> None:
    """At the policy of the game's mixture, no member's advantage is below beta J, and that of the mixture equals it.

    Mixtures of members lie in between, as the advantage is linear in the reward.
    """
    policy, logratios = optimum(game.ref, game.mixture, game.beta)
    policy = [simplify(p) for p in policy]
    bound = game.beta * divergence(policy, game.ref, logratios)
    for reward in game.members:
        gap = simplify(sp.expand_log(advantage(policy, game.ref, reward) - bound, force=True))
        require(gap.is_nonnegative, f"the advantage under {reward} is {gap} above the bound")
    slack = simplify(sp.expand_log(advantage(policy, game.ref, game.mixture) - bound, force=True))
    require(slack == 0, f"the advantage under the mixture is {slack} above the bound")


def check_saddle(game: Game) -> None:
    """The policy of the mixture is the max-min policy: no member gives less than the mixture (min over rewards), and
    against the mixture it is the best (max over policies; V(pi, r*) = beta log Z - E_ref[r*] - beta KL(pi || pi*))."""
    policy, logratios = optimum(game.ref, game.mixture, game.beta)
    require(sum(game.weights) == 1 and all(w >= 0 for w in game.weights), "the weights are no mixture")
    for reward in game.members:
        difference = [a - b for a, b in zip(reward, game.mixture, strict=True)]
        step = simplify(advantage([simplify(p) for p in policy], game.ref, difference))
        require(step.is_nonnegative, f"{reward} gives {step} less than the mixture")
    logp = sp.Symbol("l", real=True)
    for q, reward, u in zip(game.ref, game.mixture, logratios, strict=True):
        value = reward - game.beta * losses.forward_kl(sp.log(q) - logp)
        constant = reward - game.beta * u  # beta log Z
        best = constant - game.beta * losses.forward_kl(sp.log(q) + u - logp)
        require(vanishes(value - best), "V is not its maximum minus a KL")


def check_identity(divergence: Divergence) -> None:
    """E_pi[r] - E_ref[r] = beta J for r = beta u + c, whatever c and the number of responses: term by term, with the
    constant's terms adding up to c (1 - 1)."""
    p, q, u, c = (sp.Symbol(name, real=True) for name in ("p", "q", "u", "c"))
    term = advantage([p], [q], [BETA * u + c]) - BETA * divergence([p], [q], [u])
    require(sp.expand(term - c * (p - q)) == 0, "the advantage is not beta times that divergence")


def check_constant_mixture(game: Game) -> None:
    """pi* = pi_ref exactly where the mixture is constant."""
    policy, _ = optimum(game.ref, game.mixture, game.beta)
    moved = any(not vanishes(p - q) for p, q in zip(policy, game.ref, strict=True))
    constant = all(vanishes(r - game.mixture[0]) for r in game.mixture)
    require(moved != constant, f"constant mixture {constant}, policy moved {moved}")


def prove_on(game: Game) -> None:
    check_saddle(game)
    check_guarantee(game)
    check_constant_mixture(game)


def prove() -> None:
    check_identity(symmetric_kl)
    for game in GAMES:
        prove_on(game)


def best_uniform_advantage(members: Sequence[Sequence[float]], ref: Floats) -> float:
    """max over policies of the least advantage over the members, by linear programming (HiGHS). No KL term."""
    rewards, n = np.array(members, dtype=np.float64), len(ref)
    solution = linprog(
        np.append(np.zeros(n), -1.0),
        A_ub=np.hstack([-rewards, np.ones((len(rewards), 1))]),
        b_ub=-rewards @ ref,
        A_eq=np.append(np.ones(n), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * n + [(None, None)],
    )
    return float(-solution.fun)


def constant_in_hull(members: Sequence[Sequence[float]]) -> bool:
    """Whether some mixture of the members is the same for every response: feasibility, by linear programming."""
    rewards = np.array(members, dtype=np.float64)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    system = np.vstack([centred.T, np.ones(len(rewards))])
    target = np.append(np.zeros(centred.shape[1]), 1.0)
    return bool(linprog(np.zeros(len(rewards)), A_eq=system, b_eq=target).status == 0)


def enumerate_sets(thorough: bool) -> str:
    """Some policy has a positive advantage under all of S iff no mixture of S is constant: every small set, both sides
    by programs of their own. And max-min policies from Clarabel keep the guarantee."""
    most, count, empty = 3 if thorough else 2, 0, 0
    for n, size in product((2, 3), range(1, most + 1)):
        ref = np.full(n, 1 / n)
        for members in combinations(list(product((0, 1, 2) if n == 2 else (0, 1), repeat=n)), size):
            promised, constant = best_uniform_advantage(members, ref) > 1e-9, constant_in_hull(members)
            require(promised != constant, f"S = {members}: advantage for all {promised}, constant mixture {constant}")
            count, empty = count + 1, empty + constant
    programs = _check_programs(20 if thorough else 4)
    return f"all {count} sets of at most {most} small rewards on 2 and 3 arms, {empty} promise nothing; {programs}"


def _check_programs(count: int) -> str:
    import cvxpy as cp

    rng = np.random.default_rng(0)
    for _ in range(count):
        n, k, beta = int(rng.integers(2, 6)), int(rng.integers(1, 5)), float(rng.uniform(0.3, 2))
        ref, rewards, policy = rng.dirichlet(3 * np.ones(n)), rng.normal(size=(k, n)), cp.Variable(n)
        gains = rewards @ (policy - ref) - beta * cp.sum(cp.rel_entr(policy, ref))
        cp.Problem(cp.Maximize(cp.min(gains)), [cp.sum(policy) == 1]).solve(solver=cp.CLARABEL)
        p = np.maximum(policy.value, 1e-12) / np.maximum(policy.value, 1e-12).sum()
        gap = (rewards @ (p - ref)).min() - beta * symmetric_kl(p, ref, np.log(p / ref))
        require(bool(abs(gap) < 1e-4), f"the least advantage is {gap:.1e} from beta J")  # equality: r* has members
    return f"{count} exponential-cone programs"


# ---------------------------------------------------------------- without each assumption


def _check_member(game: Game, member: int) -> None:
    """The guarantee at the policy of one member instead of the mixture."""
    weights = [int(i == member) for i in range(len(game.members))]
    check_guarantee(Game(game.ref, game.members, weights, game.beta))


def _closest_member() -> str:
    """For {(0, 1), (1, 0)} both members are equally close; either one's policy loses under the other."""
    policy, _ = optimum(CONTRADICTION.ref, CONTRADICTION.members[0], sp.S.One)
    loss = simplify(advantage(policy, CONTRADICTION.ref, CONTRADICTION.members[1]))
    require(bool(loss < 0), "the closest member's policy gains under the other")
    return "S = {(0, 1), (1, 0)}, the policy of a closest member, as e-DPO has it: advantage -0.231 under the other"


UNSUPPORTED = Game([HALF, HALF, 0], [[0, 0, 1]], [1])


def _unsupported_response() -> str:
    policy, _ = optimum(UNSUPPORTED.ref, UNSUPPORTED.mixture, BETA)
    require([simplify(p) for p in policy] == UNSUPPORTED.ref, "the max-min policy moves")
    require(advantage([0, 0, 1], UNSUPPORTED.ref, UNSUPPORTED.mixture) == 1, "no policy gains")
    return "pi_ref = (1/2, 1/2, 0), S = {(0, 0, 1)}: the max-min policy is pi_ref, yet no mixture is constant"


def smallest_counterexample() -> str | None:
    """The first set of integer rewards, by arms, members and size, none of them constant, such that no policy has a
    positive advantage under all of them."""
    for n, size, largest in product((1, 2, 3), (1, 2), (1, 2)):
        vectors_ = [r for r in product(range(largest + 1), repeat=n) if len(set(r)) > 1]
        for members in combinations(vectors_, size):
            if best_uniform_advantage(members, np.full(n, 1 / n)) < 1e-9:
                # Exactly: under a constant mixture every policy's advantage is 0, so none is positive under all of S.
                weights = [sp.Rational(1, size)] * size
                require(len(set(Game([], members, weights).mixture)) == 1, "the even mixture is not constant")
                listed = ", ".join(map(str, members))
                return (
                    f"{n} arms, uniform reference, S = {{{listed}}}: the max-min policy is pi_ref, with advantage 0 "
                    "under both, and it maximises neither; no policy's advantage is positive under both"
                )
    return None


# ---------------------------------------------------------------- properties


@st.composite
def _games(draw: st.DrawFn) -> tuple[Floats, Floats, Floats, Floats, float]:
    """log pi_ref, log pi*, members [K, n], weights [K], beta: members are r* + d_i with sum w_i d_i = 0 and d_i
    orthogonal to pi* - pi_ref, so that (pi*, w) is a saddle point by construction."""
    n, k = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    ref, best, beta = draw(log_policies(n, 2.0)), draw(log_policies(n, 2.0)), draw(positive(0.1, 5))
    w = draw(simplex(k))
    step = np.exp(best) - np.exp(ref)
    d = np.array([draw(vectors(n)) for _ in range(k)])
    d = d - w @ d
    if (norm := step @ step) > 0:  # however small, as members may differ by much along it
        d = d - np.outer(d @ step, step) / norm
    return ref, best, beta * (best - ref) + d, w, beta


@given(_games())
def mixtures_keep_the_advantage(game: tuple[Floats, Floats, Floats, Floats, float]) -> None:
    """NumPy: at a saddle point every member's advantage is at least beta J."""
    ref, best, members, weights, beta = game
    assert saddle_point(best, ref, members, weights, beta=beta).accepts(1e-8 * (1 + beta))
    p, q = np.exp(best), np.exp(ref)
    bound = beta * symmetric_kl(p, q, best - ref)
    assert (members @ (p - q)).min() >= bound - 1e-9 * (1 + beta)


@given(_games())
def torch_max_min_policy_is_stationary(game: tuple[Floats, Floats, Floats, Floats, float]) -> None:
    """torch: E_pi[r*] - beta KL(pi || pi_ref) has zero gradient in the logits at pi*."""
    import torch

    ref, best, members, weights, beta = game
    logits, reference = torch.tensor(best, requires_grad=True), torch.tensor(ref)
    logp = torch.log_softmax(logits, 0)
    value = (logp.exp() * (torch.tensor(weights @ members) - beta * losses.forward_kl(reference - logp))).sum()
    assert torch.autograd.grad(value, logits)[0].abs().max() <= 1e-10 * (1 + beta)


CLAIMS = (
    Claim(
        id="remark-advantage",
        source="[F] 5.2, remark on the pessimistic objective; repaired",
        statement=(
            "The max-min policy over a finite set S is the RLHF optimum of a mixture r* of S, often of no member. Its "
            "advantage over pi_ref is at least beta (KL(pi_ref || pi) + KL(pi || pi_ref)) under every mixture, with "
            "equality under r*. It is pi_ref, with advantage 0, iff a mixture of S is constant; only otherwise does "
            "any policy have a positive advantage under all of S."
        ),
        formula=r"\mathbb E_{\pi^*}[r]-\mathbb E_{\pi_{\rm ref}}[r]\ge\beta\,[\mathrm{KL}(\pi_{\rm ref}\Vert\pi^*)"
        r"+\mathrm{KL}(\pi^*\Vert\pi_{\rm ref})]\quad\forall r\in\mathrm{conv}\,S",
        domain="finite responses; finite sets of finite rewards; beta > 0; tabular; optima, no flow",
        losses=("forward_kl",),
        assumptions={
            "hull": "the policy is the max-min policy over all mixtures of S",
            "reference support": "pi_ref(y) > 0 for every response",
        },
        prove=prove,
        counterexamples={"hull": _closest_member, "reference support": _unsupported_response},
        controls={
            "without hull": lambda: _check_member(CONTRADICTION, 0),
            "without reference support": lambda: check_constant_mixture(UNSUPPORTED),
            "forward KL alone": lambda: check_guarantee(
                ONE_REWARD,
                lambda p, q, u: 2 * sum(b * losses.forward_kl(x) for b, x in zip(q, u, strict=True)),
            ),
            "reverse KL alone": lambda: check_identity(lambda p, q, u: p[0] * losses.forward_kl(-u[0])),
            "log-ratios negated": lambda: check_identity(lambda p, q, u: symmetric_kl(p, q, [-x for x in u])),
            "a member of a compromise": lambda: check_saddle(Game(COMPROMISE.ref, COMPROMISE.members, [1, 0, 0])),
            "even weights for uneven ones": lambda: check_saddle(Game(WEIGHTED.ref, WEIGHTED.members, [HALF, HALF])),
        },
        enumerate=enumerate_sets,
        properties=(mixtures_keep_the_advantage, torch_max_min_policy_is_stationary),
        printed=smallest_counterexample,
    ),
)
