"""Which way the first step of DPO moves the winner and the loser, when parameters are shared.

Let g_y be the gradient of log pi(y) in the parameters. The gradient flow of one pair moves them along g_w - g_l, at the
rate beta sigma(-beta Delta) > 0; so log pi(y_w) starts in the direction of <g_w, g_w - g_l>, and log pi(y_l) in that of
<g_l, g_w - g_l>. Where logits are linear in the parameters these are the inner products of `theory.first_to_fall`: of
centred features for a log-linear policy, of sums over tokens for the output head of a language model, whatever the
rest of the network is as long as it stays.

At the reference the gradient of KL(pi_ref || pi) is -E_ref[g_y] = 0, and its curvature the Fisher information; so a
penalty acts at second order only. The token-level estimate has no gradient there on *any* sample; the sequence-level
one only in the mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from theory import first_to_fall, losses
from theory.algebra import vanishes
from theory.claim import Claim, require
from theory.first_to_fall import Completion, Moves
from theory.preferences import Floats
from theory.strategies import log_policies, matrices, positive, vectors

BETA, ALPHA, RATE = sp.symbols("beta alpha s", positive=True)
"""RATE: beta sigma(-beta Delta), at which one pair of weight one moves the parameters."""
LOGP_W, LOGP_L, REF_W, REF_L, PENALTY = sp.symbols("l_w l_l ref_w ref_l KL", real=True)

Tokens = tuple[int, ...]
Pair = tuple[Tokens, Tokens]
"""(winner, loser)."""


@dataclass(frozen=True)
class Policy:
    """A policy of strings near its present parameters, which are called 0; symbols or exact numbers throughout."""

    parameters: Sequence[sp.Symbol]
    logits: Mapping[Tokens, Any]
    """Prefix -> [V] next-token logits there, in the parameters."""
    responses: Sequence[Tokens]
    """All strings with positive probability."""
    features: Any = None
    """[V, d], where strings have one token and the logits are features times parameters, plus anything."""
    states: Mapping[Tokens, Any] = field(default_factory=dict)
    """Prefix -> [H], where the logits are a head's weights times states, plus anything."""

    def logps(self, prefix: Tokens) -> Any:
        """[V], next-token log-probabilities in the parameters."""
        return self.logits[prefix] - sp.log(sum(sp.exp(logit) for logit in self.logits[prefix]))

    def logp(self, response: Tokens) -> sp.Expr:
        """log pi(response)."""
        return sum(self.logps(response[:t])[token] for t, token in enumerate(response))

    def gradient(self, value: sp.Expr) -> list[sp.Expr]:
        """Of a function of the parameters, here."""
        return [self.here(sp.diff(value, parameter)) for parameter in self.parameters]

    def here(self, value: Any) -> Any:
        """At the present parameters: a polynomial in the symbols, since the masses at each prefix add up to 1."""
        return sp.expand(value.subs(dict.fromkeys(self.parameters, 0)))

    def probs(self, prefix: Tokens) -> Any:
        """[V], present next-token probabilities."""
        return np.array([self.here(sp.exp(logp)) for logp in self.logps(prefix)], dtype=object)


def log_linear(features: Any, masses: Any) -> Policy:
    """log pi(y) = theta . phi_y + log of a mass - log Z; features [n, d], masses [n], which add up to 1."""
    theta = np.array(sp.symbols(f"theta0:{features.shape[1]}", real=True), dtype=object)
    logits = features @ theta + np.array([sp.log(mass) for mass in masses], dtype=object)
    return Policy(list(theta), {(): logits}, [(y,) for y in range(len(masses))], features=features)


def head(vocabulary: int, width: int, responses: Sequence[Tokens], *, states_move: bool = False) -> Policy:
    """A head of trained weights on given states, symbolic states and present probabilities at every prefix.

    Args:
        vocabulary: V.
        width: H.
        responses: all strings, by which the prefixes are those of one another.
        states_move: whether the states of the empty prefix are trained as well.
    """
    weights = np.array(sp.symbols(f"W0:{vocabulary * width}", real=True), dtype=object).reshape(vocabulary, width)
    parameters, start = list(weights.reshape(-1)), np.array(sp.symbols(f"A0:{vocabulary * width}", real=True))
    logits, states = {}, {}
    for prefix in sorted({response[:t] for response in responses for t in range(len(response))}):
        name = "".join(map(str, prefix))
        states[prefix] = np.array(sp.symbols(f"h{name}_0:{width}", real=True), dtype=object)
        masses = symbolic_masses(f"q{name}_", vocabulary)
        logits[prefix] = weights @ states[prefix] + np.array([sp.log(mass) for mass in masses], dtype=object)
    if states_move:
        moved = np.array(sp.symbols(f"v0:{width}", real=True), dtype=object)
        logits[()] = logits[()] + (weights + start.reshape(vocabulary, width)) @ moved
        parameters += list(moved)
    return Policy(parameters, logits, responses, states=states)


def symbolic_log_linear(responses: int, width: int) -> Policy:
    """Every feature and probability a symbol."""
    features = np.array(sp.symbols(f"phi0:{responses * width}", real=True), dtype=object)
    return log_linear(features.reshape(responses, width), symbolic_masses("q", responses))


def symbolic_masses(name: str, count: int) -> list[sp.Expr]:
    """Probabilities, the last of them one minus the others."""
    free = sp.symbols(f"{name}0:{count - 1}", positive=True)
    return [*free, 1 - sum(free)]


STRUCTURES: dict[str, tuple[Callable[[], Policy], Pair]] = {
    "three responses, two features": (lambda: symbolic_log_linear(3, 2), ((0,), (1,))),
    "four responses, one feature": (lambda: symbolic_log_linear(4, 1), ((3,), (1,))),
    "a head, strings of two tokens that share the first": (
        lambda: head(2, 2, list(itertools.product(range(2), repeat=2))),
        ((0, 0), (0, 1)),
    ),
    "a head, strings of two tokens that share nothing": (
        lambda: head(2, 2, list(itertools.product(range(2), repeat=2))),
        ((0, 1), (1, 1)),
    ),
    "a head, unequal lengths, 2 ends a string": (
        lambda: head(3, 1, [(0, 2), (0, 1), (0, 0), (1,), (2,)]),
        ((0, 2), (2,)),
    ),
}


# ---------------------------------------------------------------- the inner products under test, and wrong ones


def inner_products(policy: Policy, pair: Pair) -> Moves:
    """`theory.first_to_fall`, called on symbols."""
    if policy.features is not None:
        expected = policy.probs(()) @ policy.features
        chosen, rejected = (policy.features[y] for (y,) in pair)
        return first_to_fall.moves_from_features(chosen, rejected, expected)
    return first_to_fall.moves(*first_to_fall.head_gram(*(completion(policy, response) for response in pair)))


def completion(policy: Policy, response: Tokens) -> Completion:
    """What the head sees of a response."""
    prefixes = [response[:t] for t in range(len(response))]
    return Completion(
        np.array([policy.states[prefix] for prefix in prefixes], dtype=object),
        np.array([policy.probs(prefix) for prefix in prefixes], dtype=object),
        np.array(response),
    )


def uncentred(policy: Policy, pair: Pair) -> Moves:
    """Features without their mean."""
    chosen, rejected = (policy.features[y] for (y,) in pair)
    return first_to_fall.moves_from_features(chosen, rejected, 0 * chosen)


def summed_states(policy: Policy, pair: Pair) -> Moves:
    """Inner products of the summed hidden states, tokens ignored: a score of similarity, not the first move."""
    w, lo = (completion(policy, response).states.sum(0) for response in pair)
    return first_to_fall.moves(w @ w, w @ lo, lo @ lo)


def position_by_position(policy: Policy, pair: Pair) -> Moves:
    """Pairs of positions s != t left out."""

    def inner(a: Completion, b: Completion) -> Any:
        cut = [(Completion(*(x[t : t + 1] for x in a)), Completion(*(x[t : t + 1] for x in b))) for t in range(2)]
        return sum(first_to_fall.head_inner_product(*both) for both in cut)

    w, lo = (completion(policy, response) for response in pair)
    return first_to_fall.moves(inner(w, w), inner(w, lo), inner(lo, lo))


# ---------------------------------------------------------------- penalties


Penalty = Callable[[Policy, Policy], sp.Expr]
"""(policy, reference) -> KL(pi_ref || pi), or an estimate, in the policy's parameters."""


def exact_kl(policy: Policy, reference: Policy) -> sp.Expr:
    """The mean of `losses.forward_kl` over all strings."""
    ref_logps = {y: reference.logp(y).subs(dict.fromkeys(reference.parameters, 0)) for y in policy.responses}
    return sum(reference.here(sp.exp(logp)) * losses.forward_kl(policy.logp(y) - logp) for y, logp in ref_logps.items())


def one_sample(policy: Policy, reference: Policy) -> sp.Expr:
    """`losses.forward_kl` of the last string."""
    y = policy.responses[-1]
    return losses.forward_kl(policy.logp(y) - reference.logp(y).subs(dict.fromkeys(reference.parameters, 0)))


def one_sample_by_tokens(policy: Policy, reference: Policy) -> sp.Expr:
    """`losses.forward_kl_tokens` along the last string."""
    y, origin = policy.responses[-1], dict.fromkeys(reference.parameters, 0)
    total = sp.S.Zero
    for prefix in (y[:t] for t in range(len(y))):
        ref_logps = np.array([logp.subs(origin) for logp in reference.logps(prefix)], dtype=object)
        total += losses.forward_kl_tokens(ref_logps, policy.logps(prefix))
    return total


# ---------------------------------------------------------------- checks


def check_rate(pair_loss: Callable[[Any], Any]) -> None:
    """Minus the slopes of the penalised loss: s = beta sigma(-beta Delta) in log pi(y_w), -s in log pi(y_l), -alpha
    in the penalty. s > 0, whatever beta and the margin.
    """
    margin = losses.logratio_margin(LOGP_W, LOGP_L, REF_W, REF_L)
    total = losses.pessimistic(pair_loss(margin), PENALTY, alpha=ALPHA)
    rate = BETA / (1 + sp.exp(BETA * (LOGP_W - REF_W - LOGP_L + REF_L)))
    require(rate.is_positive, "the rate may vanish")
    for variable, claimed in ((LOGP_W, rate), (LOGP_L, -rate), (PENALTY, -ALPHA)):
        require(vanishes(sp.diff(total, variable) + claimed), f"another slope in {variable}")


def speeds(
    policy: Policy,
    pairs: Sequence[tuple[Pair, Any]],
    *,
    penalty: Penalty | None = exact_kl,
    reference: Policy | None = None,
    step: Callable[[int, Any], Any] = lambda k, velocity: velocity,
) -> tuple[sp.Expr, sp.Expr]:
    """d log pi / dt of the first pair's winner and loser, by differentiating the policy itself.

    Args:
        policy: where the flow is.
        pairs: with their weights; all margins equal, as they are at the reference.
        penalty: weighted by ALPHA.
        reference: of the penalty; the policy itself where not given.
        step: (parameter, minus the gradient there) -> its velocity.
    """
    slope = policy.gradient(penalty(policy, reference or policy)) if penalty else [0] * len(policy.parameters)
    velocity = [-ALPHA * k for k in slope]
    gradients = {y: policy.gradient(policy.logp(y)) for pair, _ in pairs for y in pair}
    for (w, lo), weight in pairs:
        velocity = [v + RATE * weight * (g - h) for v, g, h in zip(velocity, gradients[w], gradients[lo], strict=True)]
    velocity = [step(k, v) for k, v in enumerate(velocity)]
    winner, loser = (sum(g * v for g, v in zip(gradients[y], velocity, strict=True)) for y in pairs[0][0])
    return winner, loser


def check_first_moves(
    policy: Policy,
    pair: Pair,
    claimed: Callable[[Policy, Pair], Moves] = inner_products,
    *,
    others: Sequence[tuple[Pair, Any]] = (),
    **more: Any,
) -> None:
    """Both log-probabilities of the pair start at s times the claimed inner products; more as in `speeds`."""
    moved, inner = speeds(policy, [(pair, 1), *others], **more), claimed(policy, pair)
    for what, speed, product in zip(("winner", "loser"), moved, (inner.winner, inner.loser), strict=True):
        require(sp.expand(speed - RATE * product) == 0, f"the {what} starts otherwise")


def check_curvature(policy: Policy, penalty: Penalty) -> None:
    """The penalty's gradient at the reference is 0 and its Hessian the Fisher information E[g g'] of what it averages:
    of the whole string, or (by tokens) of each next token along the sample.
    """
    value = penalty(policy, policy)
    slopes = [sp.diff(value, parameter) for parameter in policy.parameters]
    require(all(policy.here(slope) == 0 for slope in slopes), "the penalty has a slope at the reference")
    if penalty is exact_kl:
        terms = [(policy.here(sp.exp(policy.logp(y))), policy.gradient(policy.logp(y))) for y in policy.responses]
    else:
        prefixes = [policy.responses[-1][:t] for t in range(len(policy.responses[-1]))]
        terms = [
            (p, policy.gradient(logp))
            for prefix in prefixes
            for p, logp in zip(policy.probs(prefix), policy.logps(prefix), strict=True)
        ]
    for i, j in itertools.combinations_with_replacement(range(len(policy.parameters)), 2):
        curvature = policy.here(sp.diff(slopes[i], policy.parameters[j]))
        information = sum(p * g[i] * g[j] for p, g in terms)
        require(sp.expand(curvature - information) == 0, "the curvature is not the Fisher information")


def _dpo(margin: Any) -> Any:
    return losses.dpo(margin, beta=BETA)


def prove() -> None:
    check_rate(_dpo)
    for make, pair in STRUCTURES.values():
        check_first_moves(make(), pair)
        check_first_moves(make(), pair, penalty=one_sample_by_tokens)
    check_curvature(symbolic_log_linear(3, 2), exact_kl)
    check_curvature(head(2, 1, list(itertools.product(range(2), repeat=2))), exact_kl)
    check_curvature(head(2, 1, list(itertools.product(range(2), repeat=2))), one_sample_by_tokens)


def enumerate_features(thorough: bool) -> str:
    """All features in {-1, 0, 1}^2 of three responses, all flows of p-DPO at once by scipy, the gradient by central
    differences of the loss itself: after a short time each winner and loser has gone where its inner product says."""
    n = 4 if thorough else 3
    features = np.array(list(itertools.product((-1.0, 0.0, 1.0), repeat=2 * n))).reshape(-1, n, 2)
    ref = np.log([0.1, 0.2, 0.7] if n == 3 else [0.1, 0.2, 0.4, 0.3])
    claimed = first_to_fall.moves_from_features(features[:, 0], features[:, 1], np.exp(ref) @ features)

    def logps(theta: Floats) -> Floats:
        logits = np.einsum("pnd,pd->pn", features, theta) + ref
        normalised: Floats = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        return normalised

    def velocity(_: float, flat: Floats, beta: float, alpha: float) -> Floats:
        def loss(theta: Floats) -> Floats:
            u = logps(theta) - ref
            pairs, kl = losses.dpo(u[:, 0] - u[:, 1], beta=beta), losses.forward_kl(u) @ np.exp(ref)
            values: Floats = losses.pessimistic(pairs, kl, alpha=alpha)
            return values

        theta, h = flat.reshape(-1, 2), 1e-5
        slopes = [(loss(theta + h * e) - loss(theta - h * e)) / (2 * h) for e in np.eye(2)]
        return -np.stack(slopes, axis=-1).reshape(-1)

    for beta, alpha in ((1.0, 0.0), (0.3, 10.0)):
        end = solve_ivp(velocity, (0, 1e-3), np.zeros(2 * len(features)), args=(beta, alpha), rtol=1e-9, atol=1e-14)
        moved = logps(end.y[:, -1].reshape(-1, 2)) - ref
        for response, speed in ((0, claimed.winner), (1, claimed.loser)):
            clear = np.abs(speed) > 1e-9
            wrong = np.sign(moved[:, response])[clear] != np.sign(speed)[clear]
            require(not wrong.any(), f"response {response} goes the other way in {wrong.sum()} flows")
    falls, rises = int((claimed.winner < -1e-9).sum()), int((claimed.loser > 1e-9).sum())
    return (
        f"{2 * len(features)} flows: all features in {{-1, 0, 1}}^2 of {n} responses; {falls} of {len(features)} "
        f"winners fall first, {rises} losers rise"
    )


# ---------------------------------------------------------------- without each assumption


UNIFORM = [sp.Rational(1, 3)] * 3


def _at(values: tuple[sp.Expr, sp.Expr], **numbers: Any) -> tuple[sp.Expr, sp.Expr]:
    """Speeds at numbers for s and alpha."""
    at = {RATE: numbers["rate"], ALPHA: numbers["alpha"]}
    winner, loser = (sp.nsimplify(sp.sympify(value).subs(at)) for value in values)
    return winner, loser


def _on_a_line() -> tuple[Policy, Pair]:
    """Features 2, 1, 0, uniform: centred 1, 0, -1; winner and loser the first two; <g_w, g_w - g_l> = 1."""
    policy, pair = log_linear(np.array([[2], [1], [0]], dtype=object), UNIFORM), ((0,), (1,))
    require(inner_products(policy, pair).winner == 1, "another inner product")
    return policy, pair


def _states_move() -> str:
    """V = 3, H = 1, head weights (1, 0, 10), state 1/10, uniform next token: 1/100 of the head, -8/3 of the state."""
    policy, pair = head(3, 1, [(0,), (1,), (2,)], states_move=True), ((0,), (1,))
    numbers = dict(zip(sp.symbols("A0:3", real=True), (1, 0, 10), strict=True))
    numbers |= {sp.Symbol("h_0", real=True): sp.Rational(1, 10)}
    numbers |= dict.fromkeys(sp.symbols("q_0:2", positive=True), sp.Rational(1, 3))
    claimed = inner_products(policy, pair).winner.subs(numbers)
    true = speeds(policy, [(pair, 1)], penalty=None)[0].subs(numbers) / RATE
    require(claimed == sp.Rational(1, 100) and vanishes(true - claimed + sp.Rational(8, 3)), f"{true}")
    return "one token of three, head (1, 0, 10), state 1/10, both trained: by the head +1/100, in truth 1/100 - 8/3"


def _two_pairs() -> str:
    policy, pair = log_linear(np.eye(3, dtype=object) * sp.S.One, UNIFORM), ((0,), (1,))
    require(inner_products(policy, pair).winner == 1, "another inner product")
    winner, _ = speeds(policy, [(pair, 1), (((2,), (0,)), 2)])
    require(winner == -RATE, f"the winner starts at {winner}")
    return "tabular, uniform, 0 > 1 once and 2 > 0 twice: alone the winner 0 starts at +s, with the other pair at -s"


def _sign_descent() -> str:
    features, pair = np.array([[3, -4], [1, -5], [-4, 9]], dtype=object) * sp.S.One, ((0,), (1,))
    policy = log_linear(features, UNIFORM)
    require(inner_products(policy, pair).winner == 2, "another inner product")
    winner, _ = speeds(policy, [(pair, 1)], step=lambda k, velocity: sp.sign(velocity))
    require(winner == -1, f"the winner starts at {winner}")
    return "features (3, -4), (1, -5), (-4, 9), uniform: the inner product is 2, under sign descent the winner falls"


def _away_from_the_reference() -> str:
    policy, pair = _on_a_line()
    reference = log_linear(
        policy.features, [sp.Rational(k, 8) for k in (1, 1, 6)]
    )  # winner and loser alike: the margin is 0, s = beta / 2
    winner, _ = _at(speeds(policy, [(pair, 1)], reference=reference), rate=sp.Rational(1, 2), alpha=1)
    require(winner == sp.Rational(1, 2) - sp.Rational(5, 8), f"the winner starts at {winner}")
    return "features 2, 1, 0, policy uniform, reference (1, 1, 6) / 8, beta = alpha = 1: inner product 1, speed -1/8"


def _sampled_kl() -> str:
    policy, pair = _on_a_line()
    winner, _ = _at(speeds(policy, [(pair, 1)], penalty=one_sample), rate=sp.Rational(1, 2), alpha=1)
    require(winner == -sp.Rational(1, 2), f"the winner starts at {winner}")
    return (
        "features 2, 1, 0, uniform, beta = alpha = 1, -log pi(y) of the one sample y = 2: inner product 1, speed -1/2"
    )


# ---------------------------------------------------------------- properties


@given(matrices(4, 3), log_policies(4, 2.0), vectors(4, 1.0), positive(0.1, 5))
def features_predict_the_first_move(features: Floats, logps: Floats, ref: Floats, beta: float) -> None:
    """NumPy, alpha = 0, at any policy: central differences along the step of the loss itself, in nats per s."""

    def at(theta: Floats) -> Floats:
        logits = features @ theta + logps
        normalised: Floats = logits - np.logaddexp.reduce(logits)
        return normalised

    def loss(theta: Floats) -> float:
        policy = at(theta)
        return float(losses.dpo(losses.logratio_margin(policy[0], policy[1], ref[0], ref[1]), beta=beta))

    h = 1e-5
    slopes = np.array([loss(h * e) - loss(-h * e) for e in np.eye(3)]) / (2 * h)
    rate = beta / (1 + np.exp(beta * losses.logratio_margin(logps[0], logps[1], ref[0], ref[1])))
    moved = (at(-h * slopes) - at(h * slopes)) / (2 * h) / rate
    claimed = first_to_fall.moves_from_features(features[0], features[1], np.exp(logps) @ features)
    np.testing.assert_allclose([moved[0], moved[1]], [claimed.winner, claimed.loser], atol=1e-5 / min(rate, 1))


@st.composite
def _sequences(draw: st.DrawFn) -> tuple[Floats, Floats, list[Tokens], list[Floats]]:
    """(head [4, 3], bias [4], two completions of 1 to 3 tokens, their states [T, 3])."""
    lengths = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    tokens = [tuple(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))) for n in lengths]
    return draw(matrices(4, 3, 1.0)), draw(vectors(4)), tokens, [draw(matrices(n, 3)) for n in lengths]


@given(_sequences(), positive(0.05, 5), positive(0.01, 10))
def a_heads_first_step_is_predicted(
    problem: tuple[Floats, Floats, list[Tokens], list[Floats]], beta: float, alpha: float
) -> None:
    """torch: the gradient of p-DPO in a head's weights, the KL by tokens along the winner, at the reference."""
    import torch

    weights, bias, tokens, states = problem
    head = torch.tensor(weights, requires_grad=True)
    logprobs = [torch.log_softmax(torch.tensor(h) @ head.T + torch.tensor(bias), -1) for h in states]
    logps = [table[range(len(y)), y].sum() for table, y in zip(logprobs, tokens, strict=True)]
    margin = losses.logratio_margin(*logps, *(logp.detach() for logp in logps))
    kl = losses.forward_kl_tokens(logprobs[0].detach(), logprobs[0]).sum()
    total = losses.pessimistic(losses.dpo(margin, beta=beta), kl, alpha=alpha)
    velocity = -torch.autograd.grad(total, head, retain_graph=True)[0]
    true = [float((torch.autograd.grad(logp, head, retain_graph=True)[0] * velocity).sum()) for logp in logps]
    chosen, rejected = (
        Completion(h, table.detach().exp().numpy(), np.array(y))
        for h, table, y in zip(states, logprobs, tokens, strict=True)
    )
    claimed = first_to_fall.moves(*first_to_fall.head_gram(chosen, rejected))
    expected = np.array([claimed.winner, claimed.loser]) * beta / 2
    np.testing.assert_allclose(true, expected, rtol=1e-9, atol=1e-11 * (1 + alpha))


CLAIMS = (
    Claim(
        id="first-to-fall",
        source="ours, on [F] A.5, Proposition 2",
        statement=(
            "Let g_y be the gradient of log pi(y) in the trained parameters. At the reference the flow of p-DPO on one "
            "pair starts with d log pi(y_w)/dt = (beta / 2) <g_w, g_w - g_l> and d log pi(y_l)/dt = (beta / 2) <g_l, "
            "g_w - g_l>, for every alpha: the winner falls first iff the one is < 0, the loser rises iff the other is "
            "> 0. (With alpha = 0 and s for beta / 2, s = beta sigma(-beta Delta), so at any policy.) g_y is "
            "phi_y - E_pi[phi] for log-linear policies, sum_t (e_{y_t} - p_t) h_t' for the weights of a language "
            "model's output head."
        ),
        formula=(
            r"\left.\tfrac{d}{dt}\log\pi(y_w)\right|_0=\tfrac\beta2\langle g_w,g_w-g_l\rangle,\quad"
            r"\langle g_a,g_b\rangle=\sum_{s,t}(h_s\cdot h_t)\,(e_{a_s}-p_s)\cdot(e_{b_t}-p_t)"
        ),
        domain=(
            "finite responses; log-linear policies, and autoregressive ones of which only the output head is trained; "
            "gradient flow in those parameters, at its start: signs of first derivatives, nothing where one is 0"
        ),
        losses=(
            "logratio_margin",
            "bradley_terry",
            "dpo",
            "forward_kl",
            "forward_kl_tokens",
            "pessimistic",
        ),
        assumptions={
            "linear logits": "logits are linear in all that is trained, as in an output head over states that stay",
            "one pair": "the step is that of this pair alone",
            "plain gradient": "no per-coordinate scaling, as adaptive optimisers have",
            "at the reference": "pi = pi_ref, where alpha > 0",
            "exact KL": "the penalty is the exact KL, or its token-level estimate on any samples",
        },
        prove=prove,
        counterexamples={
            "linear logits": _states_move,
            "one pair": _two_pairs,
            "plain gradient": _sign_descent,
            "at the reference": _away_from_the_reference,
            "exact KL": _sampled_kl,
        },
        controls={
            "without linear logits": lambda: check_first_moves(
                head(2, 1, [(0,), (1,)], states_move=True), ((0,), (1,))
            ),
            "without one pair": lambda: check_first_moves(
                symbolic_log_linear(3, 2), ((0,), (1,)), others=[(((2,), (0,)), 1)]
            ),
            "without plain gradient": lambda: check_first_moves(
                symbolic_log_linear(3, 2), ((0,), (1,)), step=lambda k, v: (k + 1) * v
            ),
            "without at the reference": lambda: check_first_moves(
                symbolic_log_linear(3, 1),
                ((0,), (1,)),
                reference=log_linear(symbolic_log_linear(3, 1).features, symbolic_masses("p", 3)),
            ),
            "without exact KL": lambda: check_first_moves(symbolic_log_linear(3, 1), ((0,), (1,)), penalty=one_sample),
            "features not centred": lambda: check_first_moves(symbolic_log_linear(3, 1), ((0,), (1,)), uncentred),
            "winner and loser swapped": lambda: check_first_moves(
                symbolic_log_linear(3, 1), ((0,), (1,)), lambda policy, pair: inner_products(policy, pair[::-1])
            ),
            "hidden states without their tokens": lambda: check_first_moves(
                head(2, 1, list(itertools.product(range(2), repeat=2))), ((0, 1), (1, 1)), summed_states
            ),
            "position by position": lambda: check_first_moves(
                head(2, 1, list(itertools.product(range(2), repeat=2))), ((0, 1), (1, 1)), position_by_position
            ),
            "rate of the other sign": lambda: check_rate(lambda margin: _dpo(-margin)),
            "IPO": lambda: check_rate(lambda margin: losses.ipo(margin, tau=BETA)),
            "curvature of minus the KL": lambda: check_curvature(
                symbolic_log_linear(2, 1), lambda policy, reference: -exact_kl(policy, reference)
            ),
        },
        enumerate=enumerate_features,
        properties=(features_predict_the_first_move, a_heads_first_step_is_predicted),
    ),
)
