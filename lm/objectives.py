"""The methods: which loss of `theory.losses` each trains on, what it needs to know about a pair, how it is shown.

A method is a frozen dataclass: its fields are its hyper-parameters (so a field that a method does not honour does not
exist; formulas call it by its name, or by the `letter` of its metadata), calling it on a `PairBatch` gives one loss a
pair. Everything else that is its own (whose reward it distils, its KL term, title, colour) it says itself: a new one is
a class here and a line in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from theory import budget, losses
from theory.backend import Tensor

Need = Literal["rewards", "members"]
MAIN = "rho"
"""Name of the reward model of all of D_rho."""


def member_name(share: float) -> str:
    """Name of the ensemble's member whose subset prefers the longer completion in this share of its pairs."""
    return f"b{share:g}"


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """What a method may look at, N pairs; log-probs are summed over tokens, in nats, end-of-text included."""

    policy_chosen_logps: Tensor
    """[N], with gradient."""
    policy_rejected_logps: Tensor
    """[N], with gradient."""
    ref_chosen_logps: Tensor
    """[N]."""
    ref_rejected_logps: Tensor
    """[N]."""
    chosen_lengths: Tensor
    """[N], completion tokens including end-of-text; of the log-probs' type."""
    rejected_lengths: Tensor
    """[N]."""
    reward_margin: Tensor | None = None
    """[N], delta of the reward model of the training pairs."""
    member_margins: Tensor | None = None
    """[K, N], delta of each ensemble member."""
    sample_logratios: Tensor | None = None
    """[N], log pi - log pi_ref of a completion that pi_ref sampled for the pair's prompt, with gradient."""
    estimated_reward_margin: Tensor | None = None
    """[N], the policy's own reward estimates (DRDO), with gradient."""
    gram: Tensor | None = None
    """[K, K], the ensemble residuals' Gram matrix over the *global* mini-batch; None: these are all of it."""
    progress: float = 0.0
    """Share of training done, 0 to 1; schedules read it."""
    alpha: float | None = None
    """Weight of the forward KL where a target of it decides it, see `Pessimism.target`."""
    chosen_probability: Tensor | None = None
    """[N], probability that w is preferred, 1/2 for a tie (`lm.data.votes`); None: 1. A loss does not read it, it is
    taken in both directions (`Method.expected`)."""

    @property
    def turned(self) -> PairBatch:
        """The same pairs the other way round: what l is to w, w is to l."""

        def minus(margin: Tensor | None) -> Tensor | None:
            return None if margin is None else -margin

        return replace(
            self,
            policy_chosen_logps=self.policy_rejected_logps,
            policy_rejected_logps=self.policy_chosen_logps,
            ref_chosen_logps=self.ref_rejected_logps,
            ref_rejected_logps=self.ref_chosen_logps,
            chosen_lengths=self.rejected_lengths,
            rejected_lengths=self.chosen_lengths,
            reward_margin=minus(self.reward_margin),
            member_margins=minus(self.member_margins),
            estimated_reward_margin=minus(self.estimated_reward_margin),
            chosen_probability=None if self.chosen_probability is None else 1 - self.chosen_probability,
        )

    @property
    def logratio_margin(self) -> Tensor:
        """[N], Delta."""
        margin: Tensor = losses.logratio_margin(
            self.policy_chosen_logps, self.policy_rejected_logps, self.ref_chosen_logps, self.ref_rejected_logps
        )
        return margin

    @property
    def chosen_logratios(self) -> Tensor:
        """[N], u_w."""
        return self.policy_chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """[N], u_l."""
        return self.policy_rejected_logps - self.ref_rejected_logps

    def known(self, name: str) -> Tensor:
        """The named optional tensor; ValueError where it is missing (nothing is ever filled in)."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                f"{name} is needed by this method, but the batch does not have it; run `python -m lm.score`"
            )
        tensor: Tensor = value
        return tensor


def forward_kl_of_pairs(chosen_logratios: Tensor, rejected_logratios: Tensor) -> Tensor:
    """The forward KL's estimate by the pairs' own completions: the mean over both sides. [N] each -> [N], nats."""
    mean: Tensor = (losses.forward_kl(chosen_logratios) + losses.forward_kl(rejected_logratios)) / 2
    return mean


@dataclass(frozen=True, kw_only=True)
class Pessimism:
    """The forward-KL term alpha * KL(pi_ref || pi), [F] eq 9-13.

    Args:
        alpha_start: weight at the first step, >= 0. [set]
        alpha_end: weight at the last step, reached linearly; equal to alpha_start for a constant. [set]
        samples: where the completions of the estimate come from: "reference" (samples of pi_ref, unbiased) or
            "preferences" (the mean over the pair's two completions; Figure B.1 reports both).
        target: what the estimate of the KL is held at by dual ascent on alpha, nats a prompt, > 0; null for the
            schedule from alpha_start to alpha_end. With a target alpha starts at `theory.budget.alpha_for_budget`, by
            which the tabular optimum keeps it, or at the one value that alpha_start and alpha_end are given.
        rate: of the dual ascent: the most that log alpha moves a step, > 0. [set]
    """

    alpha_start: float = 1e-4
    alpha_end: float = 1e-2
    samples: Literal["reference", "preferences"] = "reference"
    target: float | None = field(default=None, metadata={"keyed": "target"})
    rate: float = field(default=0.05, metadata={"keyed": "target"})

    def __post_init__(self) -> None:
        for name in ("alpha_start", "alpha_end"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"Pessimism.{name} must be a finite number >= 0, got {getattr(self, name)}")
        if self.target is not None:
            self._check_target(self.target)
        elif self.rate != Pessimism.rate:
            raise ValueError(f"Pessimism.rate is of the ascent to a target: give a target too, got rate {self.rate}")

    def _check_target(self, target: float) -> None:
        for name, value in (("target", target), ("rate", self.rate)):
            if isinstance(value, bool | str) or not 0 < value < float("inf"):
                raise ValueError(f"Pessimism.{name} must be a finite number > 0, got {value!r}")
        object.__setattr__(self, "target", float(target))  # 2 and 2.0 are one setting
        weights = self.alpha_start, self.alpha_end
        if weights != (Pessimism.alpha_start, Pessimism.alpha_end) and (weights[0] != weights[1] or not weights[0]):
            raise ValueError(
                "Pessimism.alpha_start and alpha_end must be left out with a target, which decides alpha, or be one "
                f"number > 0 for it to start at; got {weights[0]:g} and {weights[1]:g} with target {target:g}"
            )

    @property
    def first_alpha(self) -> float | None:
        """Where the ascent to the target starts, if that is configured."""
        return self.alpha_start if self.alpha_start == self.alpha_end else None

    def alpha(self, progress: float) -> float:
        """The scheduled weight after this share of training; ValueError with a target, which has no schedule."""
        if self.target is not None:
            raise ValueError(f"alpha is held by the target of {self.target:g} nats; give the batch its alpha")
        return self.alpha_start + (self.alpha_end - self.alpha_start) * min(max(progress, 0.0), 1.0)

    def estimate(self, pairs: PairBatch) -> Tensor:
        """Of the KL, by each pair. [N], nats."""
        if self.samples == "reference":
            kl: Tensor = losses.forward_kl(pairs.known("sample_logratios"))
            return kl
        return forward_kl_of_pairs(pairs.chosen_logratios, pairs.rejected_logratios)

    def add(self, loss: Tensor, pairs: PairBatch) -> Tensor:
        """The per-pair loss with the KL term. [N] -> [N]."""
        alpha = self.alpha(pairs.progress) if pairs.alpha is None else pairs.alpha
        penalised: Tensor = losses.pessimistic(loss, self.estimate(pairs), alpha=alpha)
        return penalised

    def legend(self) -> Iterator[str]:
        """As `Method.legend`."""
        if self.samples == "reference":
            yield "KL(y): −u_y of a completion y that π_ref sampled; its mean is KL(π_ref ‖ π)."
        else:
            yield "KL(y): −(u_w + u_l) / 2, over the pair's own completions."
        if self.target is not None:
            yield f"α: by dual ascent, so that the mean of KL(y) is {self.target:g} nats; near 0 where it stays below."
        elif self.alpha_start == self.alpha_end:
            yield f"α = {self.alpha_start:g} throughout."
        else:
            yield f"α: from {self.alpha_start:g} at the first step, linearly, to {self.alpha_end:g} at the last."


class Look(NamedTuple):
    """How a method is drawn: colour, dashes and marker each tell it apart."""

    colour: str
    """A name of `figures.style.COLOURS`."""
    dashes: tuple[float, ...]
    """Points drawn and left out, in turn; none: a solid line."""
    marker: str
    """As matplotlib has them."""


@dataclass(frozen=True, kw_only=True)
class JointOracle:
    """A reward model of a method's own: a reward head beside the language-model head, trained jointly, [N] eq 5.

    Args:
        alpha: weight of the language-model term, between 0 and 1.
    """

    alpha: float

    def __call__(self, reward_margin: Tensor, chosen_logps: Tensor) -> Tensor:
        """One loss a pair, [N]."""
        loss: Tensor = losses.drdo_oracle(reward_margin, chosen_logps, alpha=self.alpha)
        return loss


def in_both_directions(probability: Tensor | None, loss: Tensor, turned: Callable[[], Tensor]) -> Tensor:
    """p L(w, l) + (1 - p) L(l, w), the mean loss of a pair whose label prefers w with probability p; all [N].

    Args:
        probability: p; None: 1, and L(l, w) is not computed.
        loss: L(w, l).
        turned: gives L(l, w).
    """
    return loss if probability is None else probability * loss + (1 - probability) * turned()


@dataclass(frozen=True, kw_only=True)
class Method:
    """A preference method. Subclasses add hyper-parameters and the loss."""

    title: ClassVar[str] = ""
    """As figures and reports call it; the class's name where there is none."""
    look: ClassVar[Look] = Look("grey", (1, 2), "X")
    needs: ClassVar[frozenset[Need]] = frozenset()
    """What must have been scored beside the reference log-probs: the one reward of each completion, or each member's of
    an ensemble."""
    scale_option: ClassVar[str] = "beta"
    """The option that is its scale, where it has one of this name."""
    swept_option: ClassVar[str | None] = None
    """The option that a sweep goes over, where that is another than the scale."""
    compared_with: ClassVar[str | None] = None
    """The method beside which tables show what this one brings, such as the one that it adds a term to."""
    without_reward_head: ClassVar[str | None] = None
    """The options by which it needs no reward head, where there are any."""
    reads_labels: ClassVar[bool] = True
    """Whether it matters to the loss which of the two is w. Then a soft label or a tie is honoured, by the mean over
    both directions, also in terms that name the winner; else no label, soft or not, changes anything."""

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in {"beta", "tau"} and not 0 < value < float("inf"):
                raise ValueError(f"{type(self).__name__}.{option.name} must be a finite number > 0, got {value}")
        if self.weighs_members and ("members" not in self.needs or self.implicit_scale is None):
            raise ValueError(
                f"{type(self).__name__} weighs members by their distance from the implicit reward: it must need "
                f'"members" and have an implicit_scale; needs are {sorted(self.needs)}, the scale {self.implicit_scale}'
            )
        kl = self.pessimism
        known = kl is None or kl.target is None or kl.first_alpha is not None
        if not known and type(self).divergence_constant is Method.divergence_constant:
            raise ValueError(
                f"{type(self).__name__}.{self.pessimism_option}: alpha_start and alpha_end must be one number > 0 with "
                "a target, for alpha to start at: no constant of this loss is known to start by"
            )

    @property
    def implicit_scale(self) -> float | None:
        """beta, where the method's implicit reward is beta times the log-ratio."""
        return None

    @property
    def pessimism(self) -> Pessimism | None:
        """The forward-KL term."""
        return None

    @property
    def pessimism_option(self) -> str | None:
        """The option that holds the forward-KL term."""
        return next((one.name for one in fields(self) if isinstance(getattr(self, one.name), Pessimism)), None)

    def divergence_constant(self, rewards: Any, members: Any) -> float:
        """C of `theory.budget` for its loss: at the optimum with weight alpha both KLs sum to at most C / alpha.

        Args:
            rewards: [N], the reward margins of all training pairs; None where it needs none.
            members: [N, K], those of each ensemble member, likewise.
        """
        raise NotImplementedError(f"no constant of {type(self).__name__} is known")

    @property
    def own_oracle(self) -> JointOracle | None:
        """The reward model of its own whose rewards it distils, in place of the one that the other methods do."""
        return None

    @property
    def distilled_member(self) -> float | None:
        """The share b of the ensemble's member whose reward is the one that it distils (`bias.member_fractions`); None
        for the reward model of all training pairs."""
        return None

    @property
    def teacher(self) -> str | None:
        """The name of the one reward model that it distils, beside an ensemble; None where there is none, or it is one
        of its own."""
        if "rewards" not in self.needs or self.own_oracle is not None:
            return None
        return MAIN if self.distilled_member is None else member_name(self.distilled_member)

    @property
    def needs_samples(self) -> bool:
        """Whether completions sampled from pi_ref enter the loss."""
        return self.pessimism is not None and self.pessimism.samples == "reference"

    @property
    def needs_reward_head(self) -> bool:
        """Whether the policy estimates rewards itself, with a linear head."""
        return False

    @property
    def weighs_members(self) -> bool:
        """Whether it chooses, at each step, how much of each member it distils, by `weights`."""
        return type(self).weights is not Method.weights

    def weights(self, gram: Tensor) -> Tensor:
        """The members' weights in the reward that is distilled, [K, K] -> [K], by the Gram matrix of their distances
        from the implicit reward: of `implicit_scale` times the margin."""
        raise NotImplementedError(f"{type(self).__name__} does not weigh members")

    def gram(self, pairs: PairBatch, pair_weights: Tensor | None = None) -> Tensor:
        """What `weights` reads, of pairs whose mean is taken as `pair_weights`, [N], say; alike if None. [K, K]."""
        assert self.implicit_scale is not None, "members are compared with the implicit reward"
        margin, members = pairs.logratio_margin, pairs.known("member_margins")
        if pair_weights is not None:  # a square weighs w where its root is multiplied by that of w
            roots = (pair_weights / pair_weights.mean()) ** 0.5
            margin, members = margin * roots, members * roots
        gram: Tensor = losses.ensemble_gram(margin, members, beta=self.implicit_scale)
        return gram

    def __call__(self, pairs: PairBatch) -> Tensor:
        """One loss a pair, [N], of pairs of which w is preferred."""
        raise NotImplementedError

    def expected(self, pairs: PairBatch) -> Tensor:
        """One loss a pair, [N], the mean over both directions where labels are soft."""
        probability = pairs.chosen_probability if self.reads_labels else None
        return in_both_directions(probability, self(pairs), lambda: self(pairs.turned))

    def check_stated(self, where: str) -> None:
        """ValueError, which begins with `where`, for options by which it has no one optimum that a paper states."""
        kl = self.pessimism
        if kl is not None and (kl.first_alpha in (None, 0) or kl.samples != "reference" or kl.target is not None):
            raise ValueError(
                f"{where}.kl must have alpha_start equal to alpha_end, > 0, no target, and samples "
                f'"reference": else there is no one optimum to compare with; got {kl}'
            )

    # ------------------------------------------------------------ how it is explained

    @classmethod
    def heading(cls) -> str:
        """The title."""
        return cls.title or cls.__name__

    @classmethod
    def says(cls) -> str:
        """The first part of the docstring, with the source, in a line."""
        return " ".join((cls.__doc__ or "").split("Args:")[0].split())

    @property
    def member_letter(self) -> str:
        """What a formula calls the reward difference that an ensemble gives."""
        return "delta_k"

    def legend(self) -> Iterator[str]:
        """What the letters of the method's formula stand for, a sentence each."""
        if not self.needs_reward_head:
            yield "Δ = u_w − u_l with u_y = log π(y) − log π_ref(y), nats, summed over tokens."
        yield "w: the preferred completion; l: the other."
        if "rewards" in self.needs:
            whose = "the reward model of the training pairs" if self.own_oracle is None else "an oracle of its own"
            if self.distilled_member is not None:
                whose = f"the ensemble's member {self.teacher}"
            yield f"δ: difference of the rewards of w and l by {whose}."
        if self.pessimism is not None:
            yield from self.pessimism.legend()


@dataclass(frozen=True, kw_only=True)
class _Implicit(Method):
    """What an implicit reward, beta times the log-ratio, adds to a method."""

    beta: float = 1.0

    @property
    def implicit_scale(self) -> float:
        return self.beta


@dataclass(frozen=True, kw_only=True)
class _Pessimistic(Method):
    """What a forward-KL term adds to a method."""

    kl: Pessimism = Pessimism()

    @property
    def pessimism(self) -> Pessimism:
        return self.kl


@dataclass(frozen=True, kw_only=True)
class DPO(_Implicit):
    """DPO, [F] eq 6.

    Args:
        beta: implicit-reward scale, > 0. [set]
    """

    title: ClassVar[str] = "DPO"
    look: ClassVar[Look] = Look("black", (), "o")
    beta: float = 0.1

    def __call__(self, pairs: PairBatch) -> Tensor:
        loss: Tensor = losses.dpo(pairs.logratio_margin, beta=self.beta)
        return loss


@dataclass(frozen=True, kw_only=True)
class IPO(Method):
    """IPO, Azar et al. 2024.

    Args:
        tau: target margin is 1 / (2 tau), > 0. [set]
        length_normalised: use the margin of per-token log-ratios, as some frameworks do; not what the paper defines.
    """

    title: ClassVar[str] = "IPO"
    look: ClassVar[Look] = Look("grey", (4, 1.5), "s")
    scale_option: ClassVar[str] = "tau"
    tau: float = 1.0
    length_normalised: bool = False

    def __call__(self, pairs: PairBatch) -> Tensor:
        margin = pairs.logratio_margin
        if self.length_normalised:
            margin = losses.normalised_logratio_margin(
                pairs.chosen_logratios, pairs.rejected_logratios, pairs.chosen_lengths, pairs.rejected_lengths
            )
        loss: Tensor = losses.ipo(margin, tau=self.tau)
        return loss

    def check_stated(self, where: str) -> None:
        """As `Method.check_stated`."""
        if self.length_normalised:
            raise ValueError(f"{where}.length_normalised must be false: the Laplacian optimum is the paper's IPO's")

    def legend(self) -> Iterator[str]:
        """As `Method.legend`."""
        if not self.length_normalised:
            yield from super().legend()
            return
        yield "u_y = log π(y) − log π_ref(y), nats; |y|: tokens of y. Log-ratios are per token: not the paper's."
        yield "w: the preferred completion; l: the other."


@dataclass(frozen=True, kw_only=True)
class DistilledDPO(_Implicit):
    """d-DPO: the reward model's margin distilled into the policy, [F] eq 7.

    Args:
        beta: implicit-reward scale, > 0. [set]
    """

    title: ClassVar[str] = "d-DPO"
    look: ClassVar[Look] = Look("blue", (), "o")
    needs: ClassVar[frozenset[Need]] = frozenset({"rewards"})
    reads_labels: ClassVar[bool] = False
    beta: float = 1.0

    def __call__(self, pairs: PairBatch) -> Tensor:
        loss: Tensor = losses.distillation(pairs.logratio_margin, pairs.known("reward_margin"), beta=self.beta)
        return loss


@dataclass(frozen=True, kw_only=True)
class MemberDPO(DistilledDPO):
    """d-DPO of one member of e-DPO's ensemble, by default the balanced one: what e-DPO brings beyond it; ours.

    Args:
        beta: implicit-reward scale, > 0. [set]
        member: b of the member, one of bias.member_fractions: the share of its pairs in which the longer is preferred.
    """

    title: ClassVar[str] = "d-DPO of one member"
    look: ClassVar[Look] = Look("blue", (7, 2), "P")
    compared_with: ClassVar[str | None] = "d-dpo"
    member: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.member <= 1:
            raise ValueError(f"MemberDPO.member must be between 0 and 1, got {self.member}")

    @property
    def distilled_member(self) -> float:
        """As `Method.distilled_member`."""
        return self.member


@dataclass(frozen=True, kw_only=True)
class PessimisticDPO(_Pessimistic, DPO):
    """p-DPO: DPO plus the forward-KL term, [F] eq 13.

    Args:
        beta: implicit-reward scale, > 0. [set]
        kl: the forward-KL term.
    """

    title: ClassVar[str] = "p-DPO"
    look: ClassVar[Look] = Look("sky", (1, 1), "^")
    compared_with: ClassVar[str | None] = "dpo"

    def divergence_constant(self, rewards: Any, members: Any) -> float:
        """As `Method.divergence_constant`."""
        return budget.DPO

    def __call__(self, pairs: PairBatch) -> Tensor:
        return self.kl.add(DPO.__call__(self, pairs), pairs)


@dataclass(frozen=True, kw_only=True)
class PessimisticDistilledDPO(_Pessimistic, DistilledDPO):
    """dp-DPO: distillation plus the forward-KL term, [F] eq 11 with one reward model.

    Args:
        beta: implicit-reward scale, > 0. [set]
        kl: the forward-KL term.
    """

    title: ClassVar[str] = "dp-DPO"
    look: ClassVar[Look] = Look("green", (4, 1.5), "s")
    compared_with: ClassVar[str | None] = "d-dpo"

    def divergence_constant(self, rewards: Any, members: Any) -> float:
        """As `Method.divergence_constant`."""
        return budget.distillation_constant(rewards)

    def __call__(self, pairs: PairBatch) -> Tensor:
        return self.kl.add(DistilledDPO.__call__(self, pairs), pairs)


@dataclass(frozen=True, kw_only=True)
class EnsembleDPO(_Pessimistic, _Implicit):
    """e-DPO: distillation of the ensemble member that fits the global mini-batch best, plus forward KL, [F] eq 11.

    Args:
        beta: implicit-reward scale, > 0. [set]
        kl: the forward-KL term.
    """

    title: ClassVar[str] = "e-DPO"
    look: ClassVar[Look] = Look("red", (1, 1), "^")
    compared_with: ClassVar[str | None] = "d-dpo"
    needs: ClassVar[frozenset[Need]] = frozenset({"members"})
    reads_labels: ClassVar[bool] = False
    beta: float = 1.0

    def divergence_constant(self, rewards: Any, members: Any) -> float:
        """As `Method.divergence_constant`: the largest of a member."""
        return max(map(budget.distillation_constant, zip(*members, strict=True)))

    def weights(self, gram: Tensor) -> Tensor:
        """As `Method.weights`: all on one member."""
        weights: Tensor = losses.member_weights(gram)
        return weights

    def __call__(self, pairs: PairBatch) -> Tensor:
        loss = losses.ensemble_min(
            pairs.logratio_margin, pairs.known("member_margins"), beta=self.beta, gram=pairs.gram
        )
        return self.kl.add(loss, pairs)

    def legend(self) -> Iterator[str]:
        """As `Method.legend`."""
        yield "δ_k: that of the ensemble member k that has the least mean square over the mini-batch."
        yield from super().legend()


@dataclass(frozen=True, kw_only=True)
class HullDPO(EnsembleDPO):
    """hull-DPO: distillation of the best mixture of the members, plus forward KL; ours.

    Args:
        beta: implicit-reward scale, > 0. [set]
        kl: the forward-KL term.
    """

    title: ClassVar[str] = "hull-DPO (ours)"
    look: ClassVar[Look] = Look("purple", (5, 1, 1, 1), "D")
    compared_with: ClassVar[str | None] = "e-dpo"

    @property
    def member_letter(self) -> str:
        """As `Method.member_letter`."""
        return "δ̄"

    def weights(self, gram: Tensor) -> Tensor:
        """As `Method.weights`: any on the simplex."""
        weights: Tensor = losses.hull_weights(gram)
        return weights

    def __call__(self, pairs: PairBatch) -> Tensor:
        loss = losses.ensemble_hull(
            pairs.logratio_margin, pairs.known("member_margins"), beta=self.beta, gram=pairs.gram
        )
        return self.kl.add(loss, pairs)

    def legend(self) -> Iterator[str]:
        """As `Method.legend`."""
        yield "δ̄: difference of the rewards of w and l by the mixture of the ensemble that has the least mean square."
        yield from Method.legend(self)


@dataclass(frozen=True, kw_only=True)
class DRDO(Method):
    """DRDO: reward distillation with a focal preference term, [N] eq 6. No reference model enters the loss.

    Args:
        alpha: weight of the preference term, >= 0.
        gamma: focal exponent, >= 0.
        reward_estimate: what distils the reward: "head" (a linear head on the last hidden state at end-of-text) or
            "implicit" (beta times the log-ratio margin, which does use the reference).
        beta: scale of the implicit estimate, > 0; read only with reward_estimate "implicit".
        oracle_alpha: weight of the language-model term in an oracle of DRDO's own (a reward head and a language-model
            head trained jointly on D_rho), whose rewards are then distilled; null: those of the reward model that the
            other methods distil. 0.01 in [N].
    """

    title: ClassVar[str] = "DRDO"
    look: ClassVar[Look] = Look("orange", (7, 2), "v")
    compared_with: ClassVar[str | None] = "e-dpo"
    without_reward_head: ClassVar[str | None] = 'reward_estimate="implicit", beta=...'
    needs: ClassVar[frozenset[Need]] = frozenset({"rewards"})
    swept_option: ClassVar[str | None] = "alpha"  # a beta scales the implicit estimate alone
    alpha: float = 0.1
    gamma: float = 2.0
    reward_estimate: Literal["head", "implicit"] = "head"
    beta: float | None = None
    oracle_alpha: float | None = field(default=None, metadata={"keyed": False})  # the oracle's scores are in the key

    def __post_init__(self) -> None:
        for name in ("alpha", "gamma"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"DRDO.{name} must be a finite number >= 0, got {getattr(self, name)}")
        if (self.beta is None) != (self.reward_estimate == "head"):
            raise ValueError(
                f'DRDO.beta goes with reward_estimate "implicit" and only with it; got beta {self.beta} with '
                f'"{self.reward_estimate}"'
            )
        if self.beta is not None and not 0 < self.beta < float("inf"):
            raise ValueError(f"DRDO.beta must be a finite number > 0, got {self.beta}")
        if self.oracle_alpha is not None and not 0 <= self.oracle_alpha <= 1:
            raise ValueError(f"DRDO.oracle_alpha must be between 0 and 1, or null, got {self.oracle_alpha}")

    @property
    def implicit_scale(self) -> float | None:
        """As `Method.implicit_scale`; None with reward_estimate "head"."""
        return self.beta

    def check_stated(self, where: str) -> None:
        """As `Method.check_stated`."""
        if self.oracle_alpha is not None:
            raise ValueError(
                f"{where}.oracle_alpha must be null: the true rewards are distilled, no oracle is trained; got "
                f"{self.oracle_alpha}"
            )

    @property
    def own_oracle(self) -> JointOracle | None:
        """As `Method.own_oracle`."""
        return None if self.oracle_alpha is None else JointOracle(alpha=self.oracle_alpha)

    @property
    def needs_reward_head(self) -> bool:
        """True with reward_estimate "head"."""
        return self.reward_estimate == "head"

    def __call__(self, pairs: PairBatch) -> Tensor:
        estimate = pairs.known("estimated_reward_margin") if self.beta is None else self.beta * pairs.logratio_margin
        loss: Tensor = losses.drdo(
            pairs.known("reward_margin"),
            estimate,
            pairs.policy_chosen_logps,
            pairs.policy_rejected_logps,
            alpha=self.alpha,
            gamma=self.gamma,
        )
        return loss

    def legend(self) -> Iterator[str]:
        """As `Method.legend`."""
        yield from super().legend()
        yield "π_w, π_l: probabilities of the completions; (1 + π_w / π_l)^−γ = (1 − p_w)^γ is the focal weight."
        if self.needs_reward_head:
            yield "δ̂: difference of the policy's own reward estimates, by a linear head."


# ---------------------------------------------------------------- methods of other authors


@dataclass(frozen=True, kw_only=True)
class _Checked(Method):
    """A method whose options have the ranges that its loss checks: it is asked when they are given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(hasattr(getattr(self, option.name), "free_symbols") for option in fields(self)):
            return  # SymPy's letters, of which the loss is written
        try:
            self(_PAIR)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{type(self).__name__}.{error}") from None


_ONE: Any = np.ones(1)
_PAIR = PairBatch(
    policy_chosen_logps=-_ONE,
    policy_rejected_logps=-_ONE,
    ref_chosen_logps=-_ONE,
    ref_rejected_logps=-_ONE,
    chosen_lengths=_ONE,
    rejected_lengths=_ONE,
    reward_margin=_ONE,
)
"""Any pair."""


def _each_logratio() -> Iterator[str]:
    """The legend of a loss that sees both log-ratios by themselves."""
    yield "u_y = log π(y) − log π_ref(y), nats, summed over tokens."
    yield "w: the preferred completion; l: the other."


@dataclass(frozen=True, kw_only=True)
class CDPO(_Checked, _Implicit):
    """cDPO: DPO on smoothed labels, Mitchell 2023. Its optimum has finite margins.

    Args:
        beta: implicit-reward scale, > 0. [set]
        label_smoothing: e, the share of labels that is taken to be flipped, 0 <= e < 1/2. [set]
    """

    title: ClassVar[str] = "cDPO"
    look: ClassVar[Look] = Look("sky", (4, 1.5), "P")
    beta: float = 0.1
    label_smoothing: float = field(default=0.1, metadata={"letter": "epsilon"})

    def __call__(self, pairs: PairBatch) -> Tensor:
        loss: Tensor = losses.cdpo(pairs.logratio_margin, beta=self.beta, label_smoothing=self.label_smoothing)
        return loss


@dataclass(frozen=True, kw_only=True)
class RobustDPO(_Checked, _Implicit):
    """Robust DPO: unbiased for labels that are flipped at a known rate, Chowdhury et al. 2024. Not bounded below.

    Args:
        beta: implicit-reward scale, > 0. [set]
        label_smoothing: e, the share of labels that is taken to be flipped, 0 <= e < 1/2. [set]
    """

    title: ClassVar[str] = "robust DPO"
    look: ClassVar[Look] = Look("sky", (7, 2), "<")
    beta: float = 0.1
    label_smoothing: float = field(default=0.1, metadata={"letter": "epsilon"})

    def __call__(self, pairs: PairBatch) -> Tensor:
        loss: Tensor = losses.robust_dpo(pairs.logratio_margin, beta=self.beta, label_smoothing=self.label_smoothing)
        return loss


@dataclass(frozen=True, kw_only=True)
class SoftLabelDPO(_Checked, _Implicit):
    """Soft labels (RPO): cross-entropy with the preference probability of the reward model, Adler et al. 2024.

    Args:
        beta: implicit-reward scale, > 0. [set]
    """

    title: ClassVar[str] = "soft labels (RPO)"
    look: ClassVar[Look] = Look("blue", (1, 1), "h")
    needs: ClassVar[frozenset[Need]] = frozenset({"rewards"})
    reads_labels: ClassVar[bool] = False

    def __call__(self, pairs: PairBatch) -> Tensor:
        loss: Tensor = losses.soft_label(pairs.logratio_margin, pairs.known("reward_margin"), beta=self.beta)
        return loss


@dataclass(frozen=True, kw_only=True)
class DPONLL(_Checked, _Implicit):
    """DPO + NLL: DPO with an SFT term on the chosen completion, nats a token; Pang et al. 2024.

    Args:
        beta: implicit-reward scale, > 0. [set]
        alpha: weight of the SFT term, >= 0. [set]
    """

    title: ClassVar[str] = "DPO + NLL"
    look: ClassVar[Look] = Look("green", (1, 1), "p")
    beta: float = 0.1
    alpha: float = 1.0

    def __call__(self, pairs: PairBatch) -> Tensor:
        loss: Tensor = losses.dpo_nll(
            pairs.logratio_margin, pairs.policy_chosen_logps, pairs.chosen_lengths, beta=self.beta, alpha=self.alpha
        )
        return loss

    def legend(self) -> Iterator[str]:
        """As `Method.legend`."""
        yield from super().legend()
        yield "π_w: probability of w; |y|_w: its tokens, end-of-text included."


@dataclass(frozen=True, kw_only=True)
class DPOP(_Checked, _Implicit):
    """DPOP: DPO that pays where a winner falls below its reference, Pal et al. 2024.

    Args:
        beta: implicit-reward scale, > 0. [set]
        lam: weight of what the winner has fallen, >= 0; 50 in the paper.
    """

    title: ClassVar[str] = "DPOP"
    look: ClassVar[Look] = Look("green", (5, 1, 1, 1), ">")
    beta: float = 0.1
    lam: float = field(default=50.0, metadata={"letter": "lambda"})

    def __call__(self, pairs: PairBatch) -> Tensor:
        loss: Tensor = losses.dpop(pairs.chosen_logratios, pairs.rejected_logratios, beta=self.beta, lam=self.lam)
        return loss

    def legend(self) -> Iterator[str]:
        """As `Method.legend`."""
        yield from _each_logratio()


@dataclass(frozen=True, kw_only=True)
class SimPO(_Checked):
    """SimPO: DPO in log-probs a token, with a target and without a reference, Meng et al. 2024 eq 6.

    Args:
        beta: scale of the margin a token, > 0; 2 to 10 in the paper.
        gamma: target of the scaled margin, >= 0. [set]
    """

    title: ClassVar[str] = "SimPO"
    look: ClassVar[Look] = Look("red", (), "d")
    beta: float = 2.0
    gamma: float = 0.5

    def __call__(self, pairs: PairBatch) -> Tensor:
        loss: Tensor = losses.simpo(
            pairs.policy_chosen_logps,
            pairs.policy_rejected_logps,
            pairs.chosen_lengths,
            pairs.rejected_lengths,
            beta=self.beta,
            gamma=self.gamma,
        )
        return loss

    def legend(self) -> Iterator[str]:
        """As `Method.legend`."""
        yield "π_y: probability of a completion; |y|: its tokens, end-of-text included. No reference enters."
        yield "w: the preferred completion; l: the other."


@dataclass(frozen=True, kw_only=True)
class Hinge(_Checked, _Implicit):
    """The hinge loss of SLiC on the implicit reward, Zhao et al. 2023.

    Args:
        beta: implicit-reward scale, > 0; the margin is not pushed beyond 1 / beta. [set]
    """

    title: ClassVar[str] = "hinge (SLiC)"
    look: ClassVar[Look] = Look("grey", (5, 1, 1, 1), "*")
    beta: float = 0.1

    def __call__(self, pairs: PairBatch) -> Tensor:
        loss: Tensor = losses.hinge(pairs.logratio_margin, beta=self.beta)
        return loss


@dataclass(frozen=True, kw_only=True)
class RDPO(_Checked, _Implicit):
    """R-DPO: DPO for a reward less alpha a token, Park et al. 2024.

    Args:
        beta: implicit-reward scale, > 0. [set]
        alpha: what a token costs, nats, >= 0. [set]
    """

    title: ClassVar[str] = "R-DPO"
    look: ClassVar[Look] = Look("purple", (7, 2), "H")
    beta: float = 0.1
    alpha: float = 0.01

    def __call__(self, pairs: PairBatch) -> Tensor:
        loss: Tensor = losses.rdpo(
            pairs.logratio_margin, pairs.chosen_lengths, pairs.rejected_lengths, beta=self.beta, alpha=self.alpha
        )
        return loss

    def legend(self) -> Iterator[str]:
        """As `Method.legend`."""
        yield from super().legend()
        yield "|y|: tokens of a completion, end-of-text included."


@dataclass(frozen=True, kw_only=True)
class SPPO(_Checked, _Implicit):
    """SPPO with hard labels: a target for each log-ratio, Wu et al. 2024 eq 4.7, on given pairs.

    Args:
        beta: implicit-reward scale, > 0; the targets are 1 / (2 beta) and minus that. [set]
    """

    title: ClassVar[str] = "SPPO, hard labels"
    look: ClassVar[Look] = Look("orange", (1, 1), "8")
    beta: float = 0.1

    def __call__(self, pairs: PairBatch) -> Tensor:
        loss: Tensor = losses.sppo_hard(pairs.chosen_logratios, pairs.rejected_logratios, beta=self.beta)
        return loss

    def legend(self) -> Iterator[str]:
        """As `Method.legend`."""
        yield from _each_logratio()


@dataclass(frozen=True, kw_only=True)
class NCA(_Checked, _Implicit):
    """NCA on pairs: holds each log-ratio by itself, Chen et al. 2024.

    Args:
        beta: implicit-reward scale, > 0. [set]
    """

    title: ClassVar[str] = "NCA"
    look: ClassVar[Look] = Look("black", (3, 1, 1, 1, 1, 1), "X")
    beta: float = 0.1

    def __call__(self, pairs: PairBatch) -> Tensor:
        loss: Tensor = losses.nca(pairs.chosen_logratios, pairs.rejected_logratios, beta=self.beta)
        return loss

    def legend(self) -> Iterator[str]:
        """As `Method.legend`."""
        yield from _each_logratio()


METHODS: dict[str, type[Method]] = {
    "dpo": DPO,
    "ipo": IPO,
    "d-dpo": DistilledDPO,
    "p-dpo": PessimisticDPO,
    "dp-dpo": PessimisticDistilledDPO,
    "e-dpo": EnsembleDPO,
    "hull-dpo": HullDPO,
    "drdo": DRDO,
    "member-dpo": MemberDPO,
    "cdpo": CDPO,
    "robust-dpo": RobustDPO,
    "soft-label": SoftLabelDPO,
    "dpo-nll": DPONLL,
    "dpop": DPOP,
    "simpo": SimPO,
    "hinge": Hinge,
    "rdpo": RDPO,
    "sppo": SPPO,
    "nca": NCA,
}
"""Every method by its name in configs, tables and results files. Options, results, reports and figures follow it."""

PAPERS = ("dpo", "ipo", "d-dpo", "p-dpo", "dp-dpo", "e-dpo", "hull-dpo", "drdo")
"""The methods of both papers, and hull-DPO: what a run compares that names none."""


def option_of(name: str) -> str:
    """What a method's group of options is called."""
    return name.replace("-", "_")


def looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How methods are drawn, as results files have it (see `figures.record.Look`): title, colour, dashes, marker, and
    hollow where it learns from labels and not from rewards. In the order of METHODS, which is that of all figures."""
    return {
        name: {"title": (kind := METHODS[name]).heading(), **kind.look._asdict(), "hollow": not kind.needs}
        for name in sorted(names, key=list(METHODS).index)
    }
