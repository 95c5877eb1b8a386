"""One optimiser step of every method, which `tests/invariance_test.py` takes on one process and on two."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from lm.config import LogprobsConfig, LoraConfig
from lm.logprobs.completions import CompletionModel
from lm.models.loading import state_of
from lm.models.lora import add_adapter
from lm.objectives import METHODS, PAPERS, Pessimism
from lm.training.batches import CompletionArguments, pair_collator, sft_collator
from lm.training.best import KeepBest, Patience, verdict
from lm.training.loop import fit, training_arguments
from lm.training.policy import PolicyTrainer
from lm.training.trainer import RewardTrainer, SFTTrainer
from tests.tiny import causal_lm, pairs, reward_model, training


@dataclass(frozen=True)
class Job:
    """One training run: a method (or "sft", "reward") and how its mini-batches are cut up and computed."""

    method: str
    pairs: int = 8
    steps: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    route: str = "packed"
    trainer: type[PolicyTrainer] = PolicyTrainer
    lora: LoraConfig | None = None
    hyper: dict[str, Any] = field(default_factory=dict)
    soft: bool = False
    """Whether the pairs have soft labels and weights."""
    evaluations: int = 0
    """Looks at held-out pairs, after which the best step's model is told of, and the training ends early."""

    def run(self, folder: Path) -> dict[str, Tensor]:
        """Parameters after training, and under "loss", "accuracy" and "alpha" what was logged at the last step.

        Sharded ones are gathered on the first rank, the others have none.
        """
        torch.manual_seed(0)
        options = LogprobsConfig(route=self.route, allocator=False)  # type: ignore[arg-type]
        data, extra, trainer, collator = self.data(), {}, self.trainer, pair_collator()
        if self.method == "sft":
            data = data.rename_column("chosen_ids", "completion_ids")
            model, trainer, collator = CompletionModel(self.base(), options=options), SFTTrainer, sft_collator()  # type: ignore[assignment]
        elif self.method == "reward":
            model, trainer = CompletionModel(self.base(), options=options), RewardTrainer  # type: ignore[assignment]
        else:
            method = METHODS[self.method](**self.hyper)
            model = CompletionModel(self.base(), reward_head=method.needs_reward_head, options=options).double()
            collator, extra = pair_collator(sample=method.needs_samples), {"method": method}
        config = training(max_steps=self.steps, **self.options)
        arguments = training_arguments(config, folder / self.method, seed=3, device="cpu", evaluations=self.evaluations)
        if self.evaluations:
            return self.best(folder, model, arguments)
        history = fit(trainer, model, data, collator, arguments, **extra)
        logged = [row for row in history if "loss" in row][-1]
        report = {name: torch.tensor(logged[name]) for name in ("loss", "accuracy", "alpha") if name in logged}
        return {**self.state(model), **report}

    def best(self, folder: Path, model: CompletionModel, arguments: CompletionArguments) -> dict[str, Tensor]:
        """The reward model of the best step, and every loss of held-out pairs."""
        own = folder / f"rank-{arguments.process_index}"  # there are no `lm.base.ranks` here

        def save(half: Path) -> None:
            half.mkdir(parents=True)
            torch.save(self.state(model), half / "all.pt")

        keep = KeepBest(own, save)
        history = fit(
            *(RewardTrainer, model, self.data(), pair_collator(), arguments),
            eval_dataset=pairs(5, seed=12),
            callbacks=[keep, Patience(2)],
        )
        told = verdict(history)
        held_out = torch.tensor([row["eval_loss"] for row in history if "eval_loss" in row], dtype=torch.float64)
        steps = torch.tensor([told["step"], told["last_step"]], dtype=torch.float64)
        return {**torch.load(keep.folder(told["step"]) / "all.pt"), "held out": held_out, "steps": steps}

    def data(self) -> Dataset:
        """What is trained on."""
        return pairs(self.pairs, soft=True) if self.soft else pairs(self.pairs)

    def state(self, model: CompletionModel) -> dict[str, Tensor]:
        """What is told of the trained model."""
        return state_of(model)

    def base(self) -> PreTrainedModel:
        """The model to train."""
        model = reward_model() if self.method == "reward" else causal_lm()
        if self.lora is not None:
            add_adapter(model, self.lora, base="")
        return model


TWO_RANKS: dict[str, Job] = {
    **{name: Job(name) for name in (*PAPERS, "simpo", "sft", "reward")},
    "uneven": Job("hull-dpo", pairs=11, steps=2, options={"micro_batch_tokens": 40}),
    "more ranks than pairs": Job("dpo", pairs=9, steps=2, options={"micro_batch_size": 1}),
    "checkpointing": Job("e-dpo", options={"activation_checkpointing": True}),
    "padded": Job("p-dpo", route="padded", options={"micro_batch_size": 2}),
    "KL target": Job("p-dpo", pairs=11, steps=4, hyper={"kl": Pessimism(target=150.0, rate=0.5)}),
    "soft labels": Job("hull-dpo", pairs=11, steps=2, options={"micro_batch_size": 3}, soft=True),
    "soft reward": Job("reward", pairs=11, steps=2, options={"micro_batch_size": 2}, soft=True),
    "early stopping": Job(
        "reward",
        pairs=10,
        steps=8,
        options={"batch_size": 4, "learning_rate": 0.02, "schedule": "cosine"},
        evaluations=8,
    ),
    "adapters": Job("e-dpo", steps=2, options={"micro_batch_size": 2}, lora=LoraConfig(rank=2)),
}
"""What is run on two processes too."""


def run_all(out: Path, environment: dict[str, str]) -> None:
    """All jobs, as the rank that the environment says; the first one leaves their results in `out`, as NAME.pt."""
    os.environ |= environment
    torch.set_num_threads(1)
    for name, job in TWO_RANKS.items():
        result = job.run(out / "runs" / name.replace(" ", "-"))
        if torch.distributed.get_rank() == 0:
            torch.save(result, out / f"{name}.pt")
    torch.distributed.destroy_process_group()
