"""The trainer of a policy: any method on scored pairs, what it logs, and the probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from lm.data.scored import MARGIN, MEMBER_MARGINS, PROBABILITY, REF_PAIR, REF_SAMPLES, SAMPLE_WEIGHTS
from lm.logprobs.completions import CompletionOutput
from lm.logprobs.kernels import widest
from lm.objectives import Method, PairBatch, forward_kl_of_pairs
from lm.training import metrics
from lm.training.batches import Batch, agreement, pair_collator, probability_of, weight_of
from lm.training.dual_ascent import ascent_of
from lm.training.trainer import CompletionTrainer, Logged
from theory import losses


class PolicyTrainer(CompletionTrainer):
    """Any `Method` on scored pairs. An example has its chosen, its rejected and, where needed, S >= 1 sampled
    completions."""

    def __init__(self, *args: Any, method: Method, train_probe: Dataset | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.method = method
        self.train_probe = train_probe
        """Training pairs that `evaluate` tells of, too."""
        self._ascent = ascent_of(method, self.train_dataset)

    def held_out_sets(self) -> dict[str, Dataset]:
        """Also the training pairs of `train_probe`, of which names begin with eval_train_."""
        more = {} if self.train_probe is None else {"eval_train_": self.train_probe}
        return super().held_out_sets() | more

    def held_out_collator(self) -> Callable[[list[dict[str, Any]]], Batch]:
        """With samples of pi_ref, also for methods that do not learn from them."""
        return pair_collator(sample=True)

    def held_out_units(self, batch: Batch) -> float:
        """Pairs: each counts once, whatever it weighs."""
        return len(batch["ids"])

    def held_out(self, batch: Batch) -> dict[str, Tensor]:
        """`probed` of the model that is trained."""
        return self.probed(batch, self.model(batch["input_ids"], batch["lengths"]))

    def probed(self, batch: Batch, output: CompletionOutput) -> dict[str, Tensor]:
        """What the probe tells of each held-out pair, [N], nats, by what the policy says of them.

        chosen_logps and rejected_logps: log pi of winners and losers; chosen_logratio, rejected_logratio: less
        log pi_ref; accuracy: whether the winner has the greater log-ratio, by soft labels as of
        `lm.training.batches.agreement`; forward_kl_reference and forward_kl_preferences: KL(pi_ref || pi) by samples of
        pi_ref and by the pair's own completions ([F] Figure B.1); member_<k>: whether the reward margin by member k is
        nearest to the implicit one, beta times the log-ratio margin, for methods that distil members ([F] Figure B.3);
        and, by TRL's names, logps/* and rewards/* (`lm.training.metrics.as_trl`).
        """
        scores = batch["scores"]
        assert output.logps is not None
        logps = output.logps.to(widest(output.logps.device)).view(len(batch["ids"]), -1)
        chosen, rejected = (logps[:, i] - scores[name] for i, name in enumerate(REF_PAIR))
        result = {
            "chosen_logps": logps[:, 0],
            "rejected_logps": logps[:, 1],
            "chosen_logratio": chosen,
            "rejected_logratio": rejected,
            "accuracy": agreement(chosen, rejected, probability_of(batch)).to(logps.dtype),
            "forward_kl_reference": losses.forward_kl(_over_samples(logps[:, 2:], scores)),
            "forward_kl_preferences": forward_kl_of_pairs(chosen, rejected),
            **metrics.as_trl(logps[:, 0], logps[:, 1], chosen, rejected, self.method),
        }
        beta = self.method.implicit_scale
        if beta is not None and MEMBER_MARGINS in scores:
            members = scores[MEMBER_MARGINS]
            nearest = (members - beta * (chosen - rejected)[:, None]).abs().argmin(1)
            for k in range(members.shape[1]):
                result[f"member_{k}"] = (nearest == k).to(logps.dtype)
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
            ref_chosen_logps=scores[REF_PAIR[0]],
            ref_rejected_logps=scores[REF_PAIR[1]],
            chosen_lengths=lengths[:, 0].to(logps.dtype),
            rejected_lengths=lengths[:, 1].to(logps.dtype),
            reward_margin=scores.get(MARGIN),
            member_margins=scores[MEMBER_MARGINS].T if MEMBER_MARGINS in scores else None,
            sample_logratios=_over_samples(logps[:, 2:], scores) if self.method.needs_samples else None,
            estimated_reward_margin=None if rewards is None else rewards[:, 0] - rewards[:, 1],
            gram=gram,
            progress=self._progress(self.state.global_step),
            alpha=None if self._ascent is None else self._ascent.alpha,
            chosen_probability=scores.get(PROBABILITY),
        )

    def losses(self, model: torch.nn.Module, batch: Batch, known: Tensor | None = None) -> tuple[Tensor, Logged]:
        """[N] pairs. Logged are means over pairs (as they weigh) and steps of `lm.training.metrics.of_pairs`."""
        pairs = self._pairs(model, batch, known)
        if self.method.weighs_members and pairs.gram is None:
            pairs = replace(pairs, gram=self._gram(pairs, batch))
        return self.method.expected(pairs), metrics.of_pairs(self.method, pairs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds `weights_told` to the lines of training steps."""
        if "loss" in logs:
            logs |= self.weights_told()
        super().log(logs, start_time)

    def weights_told(self) -> dict[str, float]:
        """alpha, the weight of the forward KL at the last step, of methods that have it, and kl_target where a target
        decides it."""
        kl = self.method.pessimism
        if kl is None:
            return {}
        if self._ascent is None:
            return {"alpha": kl.alpha(self._progress(self.state.global_step - 1))}
        return {"alpha": self._ascent.last, "kl_target": self._ascent.target}

    # ------------------------------------------------------------ a target of the forward KL

    def after_step(self, told: Sequence[tuple[Logged, float]], units: float) -> None:
        """With a target, the next step's alpha, by the mini-batch's mean KL: the same on all ranks."""
        if self._ascent is None:
            return
        held = "forward_kl" if self.method.needs_samples else "forward_kl_preferences"
        sums = [weight * logged[held].double().sum() for logged, weight in told]
        total = self.accelerator.reduce(torch.stack(sums).sum(), "sum")
        self._ascent.step(float(total) / units)

    def _save_rng_state(self, output_dir: str) -> None:
        """With the ascent to a target: a resumed run takes it up to the bit."""
        super()._save_rng_state(output_dir)
        if self._ascent is not None and self.args.should_save:
            self._ascent.save(Path(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if self._ascent is not None and checkpoint is not None:
            self._ascent.load(Path(checkpoint))


def _over_samples(logps: Tensor, scores: dict[str, Tensor]) -> Tensor:
    """Weighted mean of log pi - log pi_ref over each pair's samples, [N, S] -> [N]; weights 1 / S if none are given."""
    logratios = logps - scores[REF_SAMPLES]
    weights = scores.get(SAMPLE_WEIGHTS)
    return logratios.mean(1) if weights is None else (weights * logratios).sum(1)
