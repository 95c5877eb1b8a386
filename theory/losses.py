"""Every loss of the project, once: `lm.train` minimises these, `bandits` solves them, `theory` proves about them.

Conventions. All losses are unreduced (one value a pair, in nats or squared reward units) and act elementwise on
SymPy expressions, NumPy arrays or torch tensors; shapes must be equal, nothing is broadcast. With
u_y = log pi(y) - log pi_ref(y), the *log-ratio margin* is Delta = u_w - u_l, summed over tokens and without beta; the
*reward margin* is delta = r(y_w) - r(y_l). NaN and infinite entries propagate; callers decide.

Every function raises TypeError where arguments come from different libraries, ValueError where shapes differ or a
hyper-parameter is out of range; the message names the argument and its value.

Sources: [F] Fisch et al. 2024 (arXiv 2405.19316), [N] Nath et al. 2024 (arXiv 2410.08458), [A] Azar et al. 2024
(arXiv 2310.12036); those of the other pairwise losses stand with them. Where TRL 1.16 has a loss, its name there is
given, and `theory/losses_trl_test.py` compares the values.
"""

from __future__ import annotations

from typing import Any

from theory.backend import Array, backend_of, hyperparameter, same_shapes, shape_of

Scalar = Any
"""A real number or a SymPy expression."""


# ---------------------------------------------------------------- quantities the losses are written in


def logratio_margin(
    policy_chosen_logps: Array, policy_rejected_logps: Array, ref_chosen_logps: Array, ref_rejected_logps: Array
) -> Array:
    """Delta = (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)).

    All arguments [...], summed log-probs in nats; returns [...].
    """
    named = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
    }
    _, chosen, rejected, ref_chosen, ref_rejected = backend_of(**named)
    same_shapes(**named)
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def normalised_logratio_margin(
    chosen_logratios: Array, rejected_logratios: Array, chosen_lengths: Array, rejected_lengths: Array
) -> Array:
    """u_w / |y_w| - u_l / |y_l|, nats a token: the length-normalised margin that some frameworks feed to IPO.

    Not what [A] defines; offered under its own name. All arguments [...], lengths in tokens, at least 1.
    """
    named = {
        "chosen_logratios": chosen_logratios,
        "rejected_logratios": rejected_logratios,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
    }
    _, chosen, rejected, chosen_tokens, rejected_tokens = backend_of(**named)
    same_shapes(**named)
    return chosen / chosen_tokens - rejected / rejected_tokens


def focal_weight(policy_chosen_logps: Array, policy_rejected_logps: Array, *, gamma: Scalar) -> Array:
    """(1 - p_w)^gamma with p_w = sigma(log pi(y_w) - log pi(y_l)); [N] eq 6.

    Both arguments [...], summed log-probs in nats; returns [...] in [0, 1].
    """
    b, chosen, rejected = backend_of(
        policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps
    )
    gamma = hyperparameter(b, "gamma", gamma, positive=False)
    same_shapes(policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps)
    # 1 - sigma(z) = sigma(-z); its power is taken in the log, where neither end rounds away.
    return b.exp(gamma * b.logsigmoid(rejected - chosen))


# ---------------------------------------------------------------- pairwise losses


def bradley_terry(reward_margin: Array) -> Array:
    """softplus(-d), the negative log-likelihood that y_w is preferred; [F] eq 2. [...] -> [...], nats."""
    b, margin = backend_of(reward_margin=reward_margin)
    return -b.logsigmoid(margin)


def dpo(logratio_margin: Array, *, beta: Scalar) -> Array:
    """softplus(-beta Delta); [F] eq 6. [...] -> [...], nats."""
    b, margin = backend_of(logratio_margin=logratio_margin)
    beta = hyperparameter(b, "beta", beta, positive=True)
    return bradley_terry(beta * margin)


def ipo(logratio_margin: Array, *, tau: Scalar) -> Array:
    """(Delta - 1 / (2 tau))^2; [A] eq 17. [...] -> [...], nats squared."""
    b, margin = backend_of(logratio_margin=logratio_margin)
    tau = hyperparameter(b, "tau", tau, positive=True)
    return (margin - 1 / (2 * tau)) ** 2


def distillation(logratio_margin: Array, reward_margin: Array, *, beta: Scalar) -> Array:
    """(delta - beta Delta)^2; [F] eq 7. Both [...] -> [...], reward units squared."""
    b, margin, target = backend_of(logratio_margin=logratio_margin, reward_margin=reward_margin)
    beta = hyperparameter(b, "beta", beta, positive=True)
    same_shapes(logratio_margin=margin, reward_margin=target)
    return (target - beta * margin) ** 2


# ---------------------------------------------------------------- pairwise losses of the margin, by other authors


def hinge(logratio_margin: Array, *, beta: Scalar) -> Array:
    """max(0, 1 - beta Delta); SLiC, Zhao et al. 2023 (arXiv 2305.10425). TRL: "hinge". [...] -> [...].

    At the kink the slope is 0.
    """
    b, margin = backend_of(logratio_margin=logratio_margin)
    beta = hyperparameter(b, "beta", beta, positive=True)
    return b.relu(1 - beta * margin)


def cdpo(logratio_margin: Array, *, beta: Scalar, label_smoothing: Scalar) -> Array:
    """(1 - e) softplus(-beta Delta) + e softplus(beta Delta): conservative DPO, Mitchell 2023 (note on noisy labels).

    Args:
        logratio_margin: Delta, [...].
        beta: implicit-reward scale, > 0.
        label_smoothing: e, how often a label is taken to be flipped, 0 <= e < 1/2; 0 is DPO.

    Returns:
        [...], nats. TRL: "sigmoid" of the CPO trainer, or "aot" on one pair, with label_smoothing.
    """
    b, margin = backend_of(logratio_margin=logratio_margin)
    flipped = _flip_rate(b, label_smoothing)
    return (1 - flipped) * dpo(margin, beta=beta) + flipped * dpo(-margin, beta=beta)


def robust_dpo(logratio_margin: Array, *, beta: Scalar, label_smoothing: Scalar) -> Array:
    """((1 - e) softplus(-beta Delta) - e softplus(beta Delta)) / (1 - 2 e); Chowdhury et al. 2024 (arXiv 2403.00409).

    Its mean under labels that are flipped with probability e is that of DPO under the true ones. Not bounded below.
    Arguments as in `cdpo`. TRL: "robust". [...] -> [...], nats.
    """
    b, margin = backend_of(logratio_margin=logratio_margin)
    scaled = hyperparameter(b, "beta", beta, positive=True) * margin
    flipped = _flip_rate(b, label_smoothing)
    # softplus(x) = x + softplus(-x) leaves one softplus: the difference of two would lose digits as e nears 1/2.
    return bradley_terry(scaled) - flipped / (1 - 2 * flipped) * scaled


def soft_label(logratio_margin: Array, reward_margin: Array, *, beta: Scalar) -> Array:
    """p softplus(-beta Delta) + (1 - p) softplus(beta Delta), p = sigma(delta): the label is the reward's.

    RPO, Adler et al. 2024 (arXiv 2406.11704), less p's entropy, which no policy changes; its eta is a factor on delta.
    Both [...] -> [...], nats.
    """
    b, margin, target = backend_of(logratio_margin=logratio_margin, reward_margin=reward_margin)
    scaled = hyperparameter(b, "beta", beta, positive=True) * margin
    same_shapes(logratio_margin=margin, reward_margin=target)
    return b.exp(b.logsigmoid(target)) * bradley_terry(scaled) + b.exp(b.logsigmoid(-target)) * bradley_terry(-scaled)


def rdpo(
    logratio_margin: Array, chosen_lengths: Array, rejected_lengths: Array, *, beta: Scalar, alpha: Scalar
) -> Array:
    """softplus(-(beta Delta + alpha (|y_w| - |y_l|))): length-regularised DPO, Park et al. 2024 (arXiv 2403.19159).

    DPO for the reward r - alpha |y|. All [...] -> [...], nats; lengths in tokens; alpha >= 0 in nats a token.
    """
    named = {
        "logratio_margin": logratio_margin,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
    }
    b, margin, chosen_tokens, rejected_tokens = backend_of(**named)
    beta = hyperparameter(b, "beta", beta, positive=True)
    alpha = hyperparameter(b, "alpha", alpha, positive=False)
    same_shapes(**named)
    return bradley_terry(beta * margin + alpha * (chosen_tokens - rejected_tokens))


def _flip_rate(b: Any, label_smoothing: Scalar) -> Scalar:
    flipped = hyperparameter(b, "label_smoothing", label_smoothing, positive=False)
    if (2 * flipped >= 1) == True:  # noqa: E712  (a symbolic comparison may be neither true nor false)
        raise ValueError(f"label_smoothing must be below 1/2, got {label_smoothing}")
    return flipped


# ---------------------------------------------------------------- pairwise losses that see more than the margin


def sft_term(policy_chosen_logps: Array, chosen_lengths: Array) -> Array:
    """-log pi(y_w) / |y_w|, nats a token; the NLL term of Pang et al. 2024 (arXiv 2404.19733). Both [...] -> [...].

    TRL's "sft" averages over the tokens of a batch instead, which is the same on one pair, or at equal lengths.
    """
    _, chosen, tokens = backend_of(policy_chosen_logps=policy_chosen_logps, chosen_lengths=chosen_lengths)
    same_shapes(policy_chosen_logps=chosen, chosen_lengths=tokens)
    return -chosen / tokens


def dpo_nll(
    logratio_margin: Array, policy_chosen_logps: Array, chosen_lengths: Array, *, beta: Scalar, alpha: Scalar
) -> Array:
    """softplus(-beta Delta) - alpha log pi(y_w) / |y_w|; Pang et al. 2024 (arXiv 2404.19733), who weigh the DPO term.

    Args:
        logratio_margin: Delta, [...].
        policy_chosen_logps: log pi(y_w), summed, in nats, <= 0, [...].
        chosen_lengths: |y_w| in tokens, at least 1, [...].
        beta: implicit-reward scale, > 0.
        alpha: weight of the NLL, >= 0.

    Returns:
        [...], nats. TRL: loss_type ["sigmoid", "sft"], loss_weights [1, alpha]; see `sft_term`.
    """
    named = {
        "logratio_margin": logratio_margin,
        "policy_chosen_logps": policy_chosen_logps,
        "chosen_lengths": chosen_lengths,
    }
    b, margin, chosen, tokens = backend_of(**named)
    alpha = hyperparameter(b, "alpha", alpha, positive=False)
    same_shapes(**named)
    return dpo(margin, beta=beta) + alpha * sft_term(chosen, tokens)


def dpop(chosen_logratios: Array, rejected_logratios: Array, *, beta: Scalar, lam: Scalar) -> Array:
    """softplus(-beta (u_w - u_l - lam max(0, -u_w))): DPO-Positive, Pal et al. 2024 (arXiv 2402.13228) eq 3.

    Both [...], u = log pi - log pi_ref, summed, nats; lam >= 0 weighs a winner below its reference (50 there). At
    u_w = 0 the slope is that of DPO. [...] -> [...], nats.
    """
    b, chosen, rejected = backend_of(chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios)
    lam = hyperparameter(b, "lam", lam, positive=False)
    same_shapes(chosen_logratios=chosen, rejected_logratios=rejected)
    return dpo(chosen - rejected - lam * b.relu(-chosen), beta=beta)


def simpo(
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_lengths: Array,
    rejected_lengths: Array,
    *,
    beta: Scalar,
    gamma: Scalar,
) -> Array:
    """softplus(-(beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma)); Meng et al. 2024 (arXiv 2405.14734) eq 6.

    Args:
        policy_chosen_logps: log pi(y_w), summed, in nats, [...]. No reference model enters.
        policy_rejected_logps: log pi(y_l), likewise.
        chosen_lengths: |y_w| in tokens, at least 1, [...].
        rejected_lengths: |y_l|, likewise.
        beta: scale of the per-token margin, > 0 (2 to 10 there).
        gamma: target of the scaled margin, >= 0.

    Returns:
        [...], nats. TRL: "simpo" of the CPO trainer, beta and simpo_gamma.
    """
    margin = normalised_logratio_margin(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths)
    b, margin = backend_of(margin=margin)
    beta = hyperparameter(b, "beta", beta, positive=True)
    gamma = hyperparameter(b, "gamma", gamma, positive=False)
    return bradley_terry(beta * margin - gamma)


def sppo_hard(chosen_logratios: Array, rejected_logratios: Array, *, beta: Scalar) -> Array:
    """(u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2; Wu et al. 2024 (arXiv 2405.00675) eq 4.7 at P = 1 and 0.

    Both [...], u = log pi - log pi_ref, summed, nats. TRL: "sppo_hard". [...] -> [...], nats squared.
    """
    b, chosen, rejected = backend_of(chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios)
    beta = hyperparameter(b, "beta", beta, positive=True)
    same_shapes(chosen_logratios=chosen, rejected_logratios=rejected)
    return ipo(chosen, tau=beta) + ipo(-rejected, tau=beta)


def nca(chosen_logratios: Array, rejected_logratios: Array, *, beta: Scalar) -> Array:
    """softplus(-beta u_w) + (softplus(beta u_w) + softplus(beta u_l)) / 2; Chen et al. 2024 (arXiv 2402.05369).

    Both [...], u = log pi - log pi_ref, summed, nats. TRL: "nca_pair". [...] -> [...], nats.
    """
    _, chosen, rejected = backend_of(chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios)
    same_shapes(chosen_logratios=chosen, rejected_logratios=rejected)
    return dpo(chosen, beta=beta) + (dpo(-chosen, beta=beta) + dpo(-rejected, beta=beta)) / 2


# ---------------------------------------------------------------- pessimism


def forward_kl(ref_sample_logratios: Array) -> Array:
    """-u_y for y ~ pi_ref: its mean estimates KL(pi_ref || pi) without bias; [F] eq 9. [...] -> [...], nats."""
    _, logratios = backend_of(ref_sample_logratios=ref_sample_logratios)
    return -logratios


def forward_kl_tokens(ref_logprobs: Array, policy_logprobs: Array) -> Array:
    """KL(pi_ref(. | y_<t) || pi(. | y_<t)) at each position of samples from pi_ref; [F] eq 9-13.

    Both [..., V], log-probs over the vocabulary, -inf allowed; returns [...]. Summed over the positions of a sample it
    has the mean of `forward_kl` and is never negative. Its variance is usually smaller; for one position always.
    """
    b, ref, policy = backend_of(ref_logprobs=ref_logprobs, policy_logprobs=policy_logprobs)
    same_shapes(ref_logprobs=ref, policy_logprobs=policy)
    if not shape_of(ref):
        raise ValueError("ref_logprobs needs a vocabulary axis, got a scalar")
    return b.relative_entropy(ref, policy)


def pessimistic(loss: Array, kl: Array, *, alpha: Scalar) -> Array:
    """loss + alpha * kl; [F] eq 11, 13. p-DPO is `dpo` with it, dp-DPO is `distillation` with it.

    Both [...] -> [...]; kl is one of the forward-KL estimates above, or the exact KL.
    """
    b, base, penalty = backend_of(loss=loss, kl=kl)
    alpha = hyperparameter(b, "alpha", alpha, positive=False)
    same_shapes(loss=base, kl=penalty)
    return base + alpha * penalty


# ---------------------------------------------------------------- ensembles of K reward models
#
# For weights w on the simplex, sum_i w_i delta_i - beta Delta = sum_i w_i e_i with e_i = delta_i - beta Delta, so the
# mean loss of a mixture is w' G w with G the Gram matrix of the residuals. G is a mean over pairs: micro-batches and
# ranks add theirs up, and the choice of w on the sum is the choice on the global mini-batch. e-DPO lets w be a vertex,
# hull-DPO any point of the simplex.


def ensemble_gram(logratio_margin: Array, reward_margins: Array, *, beta: Scalar) -> Array:
    """G[i, j] = mean over the pairs of e_i e_j, e_i = delta_i - beta Delta. [N], [K, N] -> [K, K], no gradient."""
    b, residuals = _ensemble_residuals(logratio_margin, reward_margins, beta)
    residuals = b.constant(residuals)
    return residuals @ residuals.T / residuals.shape[1]


def member_weights(gram: Array) -> Array:
    """One-hot weights of the member with the smallest mean loss (the first of equals). [K, K] -> [K]."""
    b, g = _square_gram(gram)
    return b.one_hot_argmin(g.diagonal())


def hull_weights(gram: Array) -> Array:
    """Weights on the simplex with the smallest mean loss: argmin_w w' G w, solved exactly. [K, K] -> [K]."""
    b, g = _square_gram(gram)
    return b.hull_argmin(g)


def ensemble_min(logratio_margin: Array, reward_margins: Array, *, beta: Scalar, gram: Array | None = None) -> Array:
    """Distillation of the best member: its mean is min_i mean (delta_i - beta Delta)^2; [F] eq 11, footnote 5.

    Args:
        logratio_margin: [N] pairs.
        reward_margins: [K, N], a row a member.
        beta: inverse reward scale, > 0.
        gram: [K, K], `ensemble_gram` of the *global* mini-batch where these N pairs are only a part of it.

    Returns:
        [N]. e-DPO adds the KL term with `pessimistic`.
    """
    return _ensemble(logratio_margin, reward_margins, beta, gram, member_weights)


def ensemble_hull(logratio_margin: Array, reward_margins: Array, *, beta: Scalar, gram: Array | None = None) -> Array:
    """Distillation of the best mixture of members: its mean is min over the simplex of mean (w.delta - beta Delta)^2.

    Ours: the hull is what [F]'s Theorem 2 needs. Arguments and shapes as in `ensemble_min`. The gradient flows
    through Delta only; by the envelope theorem it is that of the minimum.
    """
    return _ensemble(logratio_margin, reward_margins, beta, gram, hull_weights)


def _ensemble(logratio_margin: Array, reward_margins: Array, beta: Scalar, gram: Array | None, choose: Any) -> Array:
    if gram is None:
        gram = ensemble_gram(logratio_margin, reward_margins, beta=beta)
    _, margin, members, g = backend_of(logratio_margin=logratio_margin, reward_margins=reward_margins, gram=gram)
    _check_ensemble(margin, members)
    if shape_of(g) != (len(members), len(members)):
        raise ValueError(f"gram has shape {shape_of(g)}, but reward_margins has {len(members)} members")
    # Weights times rows, summed: unlike @, this lets members and Gram matrix be of different floating types.
    return distillation(margin, (choose(g)[:, None] * members).sum(0), beta=beta)


def _ensemble_residuals(logratio_margin: Array, reward_margins: Array, beta: Scalar) -> tuple[Any, Array]:
    b, margin, members = backend_of(logratio_margin=logratio_margin, reward_margins=reward_margins)
    beta = hyperparameter(b, "beta", beta, positive=True)
    _check_ensemble(margin, members)
    return b, members - beta * margin


def _check_ensemble(margin: Array, members: Array) -> None:
    margin_shape, members_shape = shape_of(margin), shape_of(members)
    if len(margin_shape) != 1 or len(members_shape) != 2 or members_shape[1:] != margin_shape or 0 in members_shape:
        raise ValueError(
            "logratio_margin must have shape (N,) and reward_margins shape (K, N), K and N at least 1, but they have "
            f"{margin_shape} and {members_shape}"
        )


def _square_gram(gram: Array) -> tuple[Any, Array]:
    b, g = backend_of(gram=gram)
    shape = shape_of(g)
    if len(shape) != 2 or shape[0] != shape[1] or 0 in shape:
        raise ValueError(f"gram must have shape (K, K), K at least 1, got {shape}")
    return b, g


# ---------------------------------------------------------------- DRDO


def drdo(
    reward_margin: Array,
    estimated_reward_margin: Array,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    *,
    alpha: Scalar = 0.1,
    gamma: Scalar = 2,
) -> Array:
    """(delta - (rhat_w - rhat_l))^2 - alpha (1 - p_w)^gamma log(pi(y_w) / (1 - pi(y_l))); [N] eq 6.

    Args:
        reward_margin: delta of the oracle, [...].
        estimated_reward_margin: rhat_w - rhat_l, the policy's own reward estimates, [...].
        policy_chosen_logps: log pi(y_w), summed, in nats, <= 0, [...]. No reference model enters.
        policy_rejected_logps: log pi(y_l), likewise.
        alpha: weight of the preference term, >= 0.
        gamma: focal exponent, >= 0. The gradient flows through the weight.

    Returns:
        [...].
    """
    named = {
        "reward_margin": reward_margin,
        "estimated_reward_margin": estimated_reward_margin,
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
    }
    b, target, estimate, chosen, rejected = backend_of(**named)
    alpha = hyperparameter(b, "alpha", alpha, positive=False)
    same_shapes(**named)
    weight = focal_weight(chosen, rejected, gamma=gamma)
    return (target - estimate) ** 2 - alpha * weight * (chosen - b.log1mexp(rejected))


def drdo_oracle(reward_margin: Array, policy_chosen_logps: Array, *, alpha: Scalar = 0.01) -> Array:
    """(1 - alpha) softplus(-(r_w - r_l)) - alpha log pi(y_w): a reward head beside an LM head; [N] eq 5.

    Both [...] -> [...]; 0 <= alpha <= 1.
    """
    b, margin, chosen = backend_of(reward_margin=reward_margin, policy_chosen_logps=policy_chosen_logps)
    alpha = hyperparameter(b, "alpha", alpha, positive=False)
    if (alpha > 1) == True:  # noqa: E712  (a symbolic comparison may be neither true nor false)
        raise ValueError(f"alpha must be at most 1, got {alpha}")
    same_shapes(reward_margin=margin, policy_chosen_logps=chosen)
    return (1 - alpha) * bradley_terry(margin) - alpha * chosen
