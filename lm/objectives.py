"""The methods: which loss of `theory.losses` each trains on, and what it needs to know about a pair.

A method is a frozen dataclass: its fields are its hyper-parameters (so a field that a method does not honour does not
exist), calling it on a `PairBatch` gives one loss a pair.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from torch import Tensor

from theory import losses

Need = Literal["rewards", "members"]


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
    """[N], completion tokens including end-of-text."""
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

    @property
    def logratio_margin(self) -> Tensor:
        """[N], Delta."""
        margin: Tensor = losses.logratio_margin(
            self.policy_chosen_logps, self.policy_rejected_logps, self.ref_chosen_logps, self.ref_rejected_logps
        )
        return margin

    def known(self, name: str) -> Tensor:
        """The named optional tensor; ValueError where it is missing (nothing is ever filled in)."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                f"{name} is needed by this method, but the batch does not have it; run `python -m lm.score`"
            )
        tensor: Tensor = value
        return tensor


@dataclass(frozen=True, kw_only=True)
class Pessimism:
    """The forward-KL term alpha * KL(pi_ref || pi), [F] eq 9-13.

    Args:
        alpha_start: weight at the first step, >= 0. [set]
        alpha_end: weight at the last step, reached linearly; equal to alpha_start for a constant. [set]
        samples: where the completions of the estimate come from: "reference" (samples of pi_ref, unbiased) or
            "preferences" (the mean over the pair's two completions; Figure B.1 reports both).
    """

    alpha_start: float = 1e-4
    alpha_end: float = 1e-2
    samples: Literal["reference", "preferences"] = "reference"

    def __post_init__(self) -> None:
        for name in ("alpha_start", "alpha_end"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"Pessimism.{name} must be a finite number >= 0, got {getattr(self, name)}")

    def alpha(self, progress: float) -> float:
        """The weight after this share of training."""
        return self.alpha_start + (self.alpha_end - self.alpha_start) * min(max(progress, 0.0), 1.0)

    def add(self, loss: Tensor, pairs: PairBatch) -> Tensor:
        """The per-pair loss with the KL term. [N] -> [N]."""
        if self.samples == "reference":
            kl = losses.forward_kl(pairs.known("sample_logratios"))
        else:
            kl = (
                losses.forward_kl(pairs.policy_chosen_logps - pairs.ref_chosen_logps)
                + losses.forward_kl(pairs.policy_rejected_logps - pairs.ref_rejected_logps)
            ) / 2
        penalised: Tensor = losses.pessimistic(loss, kl, alpha=self.alpha(pairs.progress))
        return penalised


@dataclass(frozen=True, kw_only=True)
class Method:
    """A preference method. Subclasses add hyper-parameters and the loss."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    """What must have been scored beside the reference log-probs: the reward model's rewards, or each member's."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in {"beta", "tau"} and not 0 < value < float("inf"):
                raise ValueError(f"{type(self).__name__}.{field.name} must be a finite number > 0, got {value}")

    @property
    def needs_samples(self) -> bool:
        """Whether completions sampled from pi_ref enter the loss."""
        kl = getattr(self, "kl", None)
        return isinstance(kl, Pessimism) and kl.samples == "reference"

    @property
    def needs_reward_head(self) -> bool:
        """Whether the policy estimates rewards itself, with a linear head."""
        return False

    def __call__(self, pairs: PairBatch) -> Tensor:
        """One loss a pair, [N]."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DPO(Method):
    """DPO, [F] eq 6.

    Args:
        beta: implicit-reward scale, > 0. [set]
    """

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

    tau: float = 1.0
    length_normalised: bool = False

    def __call__(self, pairs: PairBatch) -> Tensor:
        margin = pairs.logratio_margin
        if self.length_normalised:
            margin = losses.normalised_logratio_margin(
                pairs.policy_chosen_logps - pairs.ref_chosen_logps,
                pairs.policy_rejected_logps - pairs.ref_rejected_logps,
                pairs.chosen_lengths.to(margin.dtype),
                pairs.rejected_lengths.to(margin.dtype),
            )
        loss: Tensor = losses.ipo(margin, tau=self.tau)
        return loss


@dataclass(frozen=True, kw_only=True)
class DistilledDPO(Method):
    """d-DPO: the reward model's margin distilled into the policy, [F] eq 7.

    Args:
        beta: implicit-reward scale, > 0. [set]
    """

    beta: float = 1.0
    needs: ClassVar[frozenset[Need]] = frozenset({"rewards"})

    def __call__(self, pairs: PairBatch) -> Tensor:
        loss: Tensor = losses.distillation(pairs.logratio_margin, pairs.known("reward_margin"), beta=self.beta)
        return loss


@dataclass(frozen=True, kw_only=True)
class PessimisticDPO(DPO):
    """p-DPO: DPO plus the forward-KL term, [F] eq 13.

    Args:
        beta: implicit-reward scale, > 0. [set]
        kl: the forward-KL term.
    """

    kl: Pessimism = Pessimism()

    def __call__(self, pairs: PairBatch) -> Tensor:
        return self.kl.add(super().__call__(pairs), pairs)


@dataclass(frozen=True, kw_only=True)
class PessimisticDistilledDPO(DistilledDPO):
    """dp-DPO: distillation plus the forward-KL term, [F] eq 11 with one reward model.

    Args:
        beta: implicit-reward scale, > 0. [set]
        kl: the forward-KL term.
    """

    kl: Pessimism = Pessimism()

    def __call__(self, pairs: PairBatch) -> Tensor:
        return self.kl.add(super().__call__(pairs), pairs)


@dataclass(frozen=True, kw_only=True)
class EnsembleDPO(Method):
    """e-DPO: distillation of the ensemble member that fits the global mini-batch best, plus forward KL, [F] eq 11.

    Args:
        beta: implicit-reward scale, > 0. [set]
        kl: the forward-KL term.
    """

    beta: float = 1.0
    kl: Pessimism = Pessimism()
    needs: ClassVar[frozenset[Need]] = frozenset({"members"})

    def weights(self, gram: Tensor) -> Tensor:
        """The members' weights in the reward that is distilled. [K, K] -> [K]."""
        weights: Tensor = losses.member_weights(gram)
        return weights

    def __call__(self, pairs: PairBatch) -> Tensor:
        loss = losses.ensemble_min(
            pairs.logratio_margin, pairs.known("member_margins"), beta=self.beta, gram=pairs.gram
        )
        return self.kl.add(loss, pairs)


@dataclass(frozen=True, kw_only=True)
class HullDPO(EnsembleDPO):
    """hull-DPO: distillation of the best mixture of the members, plus forward KL; ours.

    Args:
        beta: implicit-reward scale, > 0. [set]
        kl: the forward-KL term.
    """

    def weights(self, gram: Tensor) -> Tensor:
        """The members' weights in the reward that is distilled. [K, K] -> [K]."""
        weights: Tensor = losses.hull_weights(gram)
        return weights

    def __call__(self, pairs: PairBatch) -> Tensor:
        loss = losses.ensemble_hull(
            pairs.logratio_margin, pairs.known("member_margins"), beta=self.beta, gram=pairs.gram
        )
        return self.kl.add(loss, pairs)


@dataclass(frozen=True, kw_only=True)
class DRDO(Method):
    """DRDO: reward distillation with a focal preference term, [N] eq 6. No reference model enters the loss.

    Args:
        alpha: weight of the preference term, >= 0.
        gamma: focal exponent, >= 0.
        reward_estimate: what distils the reward: "head" (a linear head on the last hidden state at end-of-text) or
            "implicit" (beta times the log-ratio margin, which does use the reference).
        beta: scale of the implicit estimate, > 0; read only with reward_estimate "implicit".
    """

    alpha: float = 0.1
    gamma: float = 2.0
    reward_estimate: Literal["head", "implicit"] = "head"
    beta: float | None = None
    needs: ClassVar[frozenset[Need]] = frozenset({"rewards"})

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


METHODS: dict[str, type[Method]] = {
    "dpo": DPO,
    "ipo": IPO,
    "d-dpo": DistilledDPO,
    "p-dpo": PessimisticDPO,
    "dp-dpo": PessimisticDistilledDPO,
    "e-dpo": EnsembleDPO,
    "hull-dpo": HullDPO,
    "drdo": DRDO,
}
"""Every method by its name in configs, tables and results files."""
