"""The trainer of a policy: any method on scored pairs, what it logs, and the probe."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from lm.data.rewards import MARGIN, MEMBER_MARGINS
from lm.data.votes import PROBABILITY
from lm.objectives import Method, PairBatch
from lm.training.batches import Batch, agreement, cut, pair_collator, probability_of, weight_of
from lm.training.trainer import CompletionTrainer, Logged
from theory import losses


class PolicyTrainer(CompletionTrainer):
    """Any `Method` on scored pairs. An example has its chosen, its rejected and, where needed, S >= 1 sampled
    completions."""

    def __init__(self, *args: Any, method: Method, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.method = method

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Probes the policy on held-out pairs, `eval_dataset`; logs and returns means over the pairs, of nats.

        eval_chosen_logps and eval_rejected_logps: log pi of winners and losers; eval_chosen_logratio,
        eval_rejected_logratio: less log pi_ref; eval_accuracy: share with the greater log-ratio of the winner, by soft
        labels as of `lm.training.batches.agreement` (each pair counts once, whatever it weighs);
        eval_forward_kl_reference and eval_forward_kl_preferences: KL(pi_ref || pi) by samples of pi_ref and by the
        pairs' own completions ([F] Figure B.1); eval_member_<k>: share of pairs whose reward margin by member k is
        nearest to the implicit one, beta times the log-ratio margin, for methods that distil members ([F] Figure B.3).
        """
        assert isinstance(self.eval_dataset, Dataset)
        began = time.perf_counter()
        batch = self._prepare_inputs(pair_collator(sample=True)(list(self.eval_dataset)))
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        with torch.no_grad():
            parts = cut(batch, self.args, tokens=self.model.options.scoring_tokens)
            for part, weight in parts[self.args.process_index :: self.args.world_size]:
                for name, values in self._probed(part).items():
                    sums[f"eval_{name}"] = sums[f"eval_{name}"] + weight * values.sum()
        totals = self.accelerator.reduce(torch.stack(list(sums.values())), "sum") / len(batch["ids"])
        metrics: dict[str, float] = dict(zip(sums, totals.tolist(), strict=True))
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._since += time.perf_counter() - began
        return metrics

    def _probed(self, batch: Batch) -> dict[str, Tensor]:
        """What the probe tells of each pair, [N]."""
        scores = batch["scores"]
        logps = self.model(batch["input_ids"], batch["lengths"]).logps.double().view(len(batch["ids"]), -1)
        chosen, rejected = logps[:, 0] - scores["ref_chosen_logps"], logps[:, 1] - scores["ref_rejected_logps"]
        result = {
            "chosen_logps": logps[:, 0],
            "rejected_logps": logps[:, 1],
            "chosen_logratio": chosen,
            "rejected_logratio": rejected,
            "accuracy": agreement(chosen, rejected, probability_of(batch)),
            "forward_kl_reference": losses.forward_kl(_over_samples(logps[:, 2:], scores)),
            "forward_kl_preferences": (losses.forward_kl(chosen) + losses.forward_kl(rejected)) / 2,
        }
        beta = self.method.implicit_scale
        if beta is not None and MEMBER_MARGINS in scores:
            members = scores[MEMBER_MARGINS]
            nearest = (members - beta * (chosen - rejected)[:, None]).abs().argmin(1)
            for k in range(members.shape[1]):
                result[f"member_{k}"] = (nearest == k).double()
        return result

    def before_step(self, model: torch.nn.Module, parts: Sequence[tuple[Batch, float]], units: float) -> Tensor | None:
        """For an ensemble, a pass without gradient where there are several parts: the member, or the mixture, is chosen
        on the global mini-batch and not on a part of it. Its Gram matrix, [K, K]."""
        if not self.method.weighs_members or (len(parts) == 1 and self.args.world_size == 1):
            return None
        total = torch.zeros((), device=self.args.device)
        with torch.no_grad():
            for part, weight in parts:
                gram = self._gram(self._pairs(model, part), part)  # a mean over its units
                total = total + weight * self.units(part) * gram
        reduced: Tensor = self.accelerator.reduce(total, "sum") / units
        return reduced

    def _gram(self, pairs: PairBatch, batch: Batch) -> Tensor:
        weights = weight_of(batch)
        return self.method.gram(pairs, None if weights is None else weights.to(pairs.logratio_margin.dtype))

    def _progress(self, step: int) -> float:
        """Share of the training done before a step, counted from 0."""
        share: float = step / max(self.state.max_steps - 1, 1)
        return share

    def _pairs(self, model: torch.nn.Module, batch: Batch, gram: Tensor | None = None) -> PairBatch:
        count = len(batch["ids"])
        output = model(batch["input_ids"], batch["lengths"])
        logps, lengths = output.logps.view(count, -1), output.lengths.view(count, -1)
        scores = {name: value.to(logps.dtype) for name, value in batch["scores"].items()}
        rewards = None if output.rewards is None else output.rewards.view(count, -1)
        return PairBatch(
            policy_chosen_logps=logps[:, 0],
            policy_rejected_logps=logps[:, 1],
            ref_chosen_logps=scores["ref_chosen_logps"],
            ref_rejected_logps=scores["ref_rejected_logps"],
            chosen_lengths=lengths[:, 0].to(logps.dtype),
            rejected_lengths=lengths[:, 1].to(logps.dtype),
            reward_margin=scores.get(MARGIN),
            member_margins=scores[MEMBER_MARGINS].T if MEMBER_MARGINS in scores else None,
            sample_logratios=_over_samples(logps[:, 2:], scores) if self.method.needs_samples else None,
            estimated_reward_margin=None if rewards is None else rewards[:, 0] - rewards[:, 1],
            gram=gram,
            progress=self._progress(self.state.global_step),
            chosen_probability=scores.get(PROBABILITY),
        )

    def losses(self, model: torch.nn.Module, batch: Batch, known: Tensor | None = None) -> tuple[Tensor, Logged]:
        """[N] pairs. Logged are means over pairs (as they weigh) and steps, in nats: log pi of winners and losers, the
        same less log pi_ref, whose difference is the margin; the share of winners with the greater log-ratio, by soft
        labels as of `agreement`; the forward KL by
        both estimates, as in `evaluate`; beta times the margin; the policy's own estimate of the reward margin; and
        each member's weight in the reward that an ensemble method distils."""
        pairs = self._pairs(model, batch, known)
        chosen, rejected = pairs.chosen_logratios, pairs.rejected_logratios
        margin = pairs.logratio_margin
        logged = {
            "chosen_logps": pairs.policy_chosen_logps,
            "rejected_logps": pairs.policy_rejected_logps,
            "chosen_logratio": chosen,
            "rejected_logratio": rejected,
            "margin": margin,
            "accuracy": agreement(chosen, rejected, pairs.chosen_probability).float(),
            "forward_kl_preferences": (losses.forward_kl(chosen) + losses.forward_kl(rejected)) / 2,
        }
        if pairs.sample_logratios is not None:
            logged["forward_kl"] = losses.forward_kl(pairs.sample_logratios)
        if self.method.implicit_scale is not None:
            logged["implicit_reward_margin"] = self.method.implicit_scale * margin
        if pairs.estimated_reward_margin is not None:
            logged["estimated_reward_margin"] = pairs.estimated_reward_margin
        if self.method.weighs_members:
            if pairs.gram is None:
                pairs = replace(pairs, gram=self._gram(pairs, batch))
            weights = self.method.weights(pairs.known("gram"))
            logged |= {f"member_weight_{k}": weight.expand(len(margin)) for k, weight in enumerate(weights)}
        return self.method.expected(pairs), logged

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds alpha, the weight of the forward KL at the last step, to the log lines of methods that have it."""
        if self.method.pessimism is not None and "loss" in logs:
            logs["alpha"] = self.method.pessimism.alpha(self._progress(self.state.global_step - 1))
        super().log(logs, start_time)


def _over_samples(logps: Tensor, scores: dict[str, Tensor]) -> Tensor:
    """Weighted mean of log pi - log pi_ref over each pair's samples, [N, S] -> [N]; weights 1 / S if none are given."""
    logratios = logps - scores["ref_sample_logps"]
    weights = scores.get("sample_weights")
    return logratios.mean(1) if weights is None else (weights * logratios).sum(1)
