"""Settings of one method trained together on the same mini-batches: one Trainer, whose model is a stack of them.

AdamW is elementwise, so that one over stacked parameters is one for each member; gradients are clipped, and means
logged, for each. What is of one member is called `<member>/<name>` in logs; `histories` takes them apart.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from lm.base import ranks
from lm.config import Config
from lm.logprobs.completions import CompletionModel
from lm.objectives import Method
from lm.training.batches import Batch, CompletionArguments, pair_collator
from lm.training.dual_ascent import ascent_of
from lm.training.loop import looked_through, run_through, settled
from lm.training.policy import PolicyTrainer
from lm.training.stack import Stack, misfit
from lm.training.trainer import CompletionTrainer, Logged
from theory.records import write_json

log = logging.getLogger(__name__)
History = list[dict[str, float]]
MOST_PARAMETERS = 2**20
"""Of a member: a larger model is bound by what it computes, and gains nothing."""
_OWN = re.compile(r"((?:eval_(?:train_)?)?)(\d+)/(.*)")


def of_member(member: int, told: dict[str, Any]) -> dict[str, Any]:
    """What was told of this member and of all, by the names that it has of one that is trained alone."""
    found = {name: _OWN.fullmatch(name) for name in told}
    of_all = {name: told[name] for name, match in found.items() if match is None}
    own = {match[1] + match[3]: told[name] for name, match in found.items() if match and int(match[2]) == member}
    return of_all | own


class TogetherTrainer(PolicyTrainer):
    """Trains a `Stack` whose members have a method each, in the order of `methods`."""

    model: Stack

    def __init__(self, *args: Any, methods: Sequence[Method], **kwargs: Any) -> None:
        super().__init__(*args, method=methods[0], **kwargs)
        self._members = [(method, ascent_of(method, self.train_dataset)) for method in methods]
        self._own_loss = torch.zeros(len(methods), device=self.args.device)  # in float32, as the Trainer's own
        self._norms: list[float] = []
        self._logged_at = 0

    @contextmanager
    def _member(self, index: int) -> Iterator[None]:
        """Inside, this Trainer is one of this member alone."""
        before = self.method, self._ascent
        self.method, self._ascent = self._members[index]
        try:
            yield
        finally:
            self.method, self._ascent = before

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Those of a member: the classes of its layers are not seen in the stack."""
        names: list[str] = super().get_decay_parameter_names(self.model.one[0])
        return names

    def before_step(self, model: torch.nn.Module, parts: Sequence[tuple[Batch, float]], units: float) -> Any:
        """Nothing: a mini-batch is one part."""
        assert len(parts) == 1
        return None

    def losses(self, model: torch.nn.Module, batch: Batch, known: Any = None) -> tuple[Tensor, Logged]:
        """[N] pairs, summed over members."""
        each: list[Tensor] = []
        told: Logged = {}
        for member, output in enumerate(model(batch["input_ids"], batch["lengths"])):
            with self._member(member):
                loss, logged = super().losses(lambda *_, said=output: said, batch)  # type: ignore[arg-type]
            if not torch.isfinite(loss).all():
                raise FloatingPointError(
                    f"loss of {self._members[member][0]} is not finite at step {self.state.global_step}, rows "
                    f"{', '.join(batch['ids'])}; leave this setting out, or set train_together to off, which finishes "
                    "those before it"
                )
            each.append(loss)
            told |= {f"{member}/{name}": values for name, values in {**logged, "loss": loss}.items()}
        return torch.stack(each).sum(0), told

    def held_out(self, batch: Batch) -> dict[str, Tensor]:
        """Of each member."""
        told: dict[str, Tensor] = {}
        for member, output in enumerate(self.model(batch["input_ids"], batch["lengths"])):
            with self._member(member):
                told |= {f"{member}/{name}": values for name, values in self.probed(batch, output).items()}
        return told

    def after_step(self, told: Sequence[tuple[Logged, float]], units: float) -> None:
        """Each member's loss, and its next alpha."""
        for member in range(len(self._members)):
            own = [(of_member(member, logged), weight) for logged, weight in told]
            self._own_loss[member] += sum(weight * logged["loss"].sum() for logged, weight in own) / units
            self._sums.pop(f"{member}/loss")  # the mean over steps is told, as the Trainer has it
            with self._member(member):
                super().after_step(own, units)

    def _clip_grad_norm(self, model: torch.nn.Module) -> Tensor:
        """Each member's gradient by its own norm. Raises FloatingPointError where one is not finite."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        self._norms = norms.tolist()
        for member, norm in enumerate(self._norms):
            if not math.isfinite(norm):
                raise FloatingPointError(
                    f"gradient norm of {self._members[member][0]} is {norm} at step {self.state.global_step}, "
                    f"mini-batch of rows {', '.join(self._rows)}"
                )
        shrunk = (self.args.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(shrunk.view(-1, *[1] * (gradient.dim() - 1)))
        largest: Tensor = norms.max()
        return largest

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With each member's loss, gradient norm and weight of the forward KL in place of the stack's."""
        if "loss" in logs:
            steps = self.state.global_step - self._logged_at
            for member, total in enumerate(self._own_loss.tolist()):
                with self._member(member):
                    own = {"loss": total / steps, "grad_norm": self._norms[member], **self.weights_told()}
                logs |= {f"{member}/{name}": value for name, value in own.items()}
            self._own_loss.zero_()
            self._logged_at = self.state.global_step
        CompletionTrainer.log(self, logs, start_time)

    def _save_rng_state(self, output_dir: str) -> None:
        """With each member's part of the next log line, and its ascent to a target."""
        CompletionTrainer._save_rng_state(self, output_dir)
        write_json(Path(output_dir) / "members.json", {"loss": self._own_loss.tolist(), "logged_at": self._logged_at})
        for member, (_, ascent) in enumerate(self._members):
            if ascent is not None:
                (folder := Path(output_dir) / f"member-{member}").mkdir()
                ascent.save(folder)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        CompletionTrainer._load_rng_state(self, checkpoint)
        if checkpoint is None:
            return
        state = json.loads((Path(checkpoint) / "members.json").read_text(encoding="utf-8"))
        self._own_loss.copy_(torch.tensor(state["loss"]))
        self._logged_at = state["logged_at"]
        for member, (_, ascent) in enumerate(self._members):
            if ascent is not None:
                ascent.load(Path(checkpoint) / f"member-{member}")


def why_alone(config: Config, parameters: int) -> str | None:
    """Why settings of a policy of so many parameters are trained one by one, as far as the options tell; None where a
    trial is due."""
    if parameters > MOST_PARAMETERS:
        return f"a model of {parameters:,} parameters gains nothing"
    if config.adapts("policy"):
        return "adapters are trained alone"
    for option, value in {
        "micro_batch_size": config.policy.micro_batch_size,
        "micro_batch_tokens": config.policy.micro_batch_tokens,
        "activation_checkpointing": config.policy.activation_checkpointing,
        "report_to": config.report_to,
        "logprobs.autocast": config.logprobs.autocast,
        "logprobs.compile": config.logprobs.compile,
    }.items():
        if value:
            return f"with {option} each is trained alone"
    return "several ranks train it" if ranks.launched() > 1 else None


def fit_together(
    model: CompletionModel,
    methods: Sequence[Method],
    dataset: Dataset,
    collator: Callable[[list[dict[str, Any]]], Batch],
    arguments: CompletionArguments,
    *,
    callbacks: Callable[[Stack], Sequence[TrainerCallback]],
    eval_dataset: Dataset | None = None,
    train_probe: Dataset | None = None,
) -> tuple[Stack, list[History]] | None:
    """Trains a copy of the model by each of the methods, as `lm.training.loop.fit` trains one: the stack, and each
    member's log history. None, which is said with the reason, where the model cannot be stacked.

    Args:
        model: what all start from.
        methods: of one kind, in settings that differ.
        dataset: as of `fit`; the methods all read the same of it.
        collator: likewise.
        arguments: likewise.
        callbacks: made for the stack.
        eval_dataset: pairs of the probe.
        train_probe: training pairs of the probe.
    """
    model.to(arguments.device)
    # The probe reads samples, which may be the longest rows, and a stack cannot be settled again.
    probed = collator if eval_dataset is None else pair_collator(sample=True)
    shortest = settled(model, dataset, probed, arguments, eval_dataset)
    looked_through(model, shortest)
    few = collator([dataset[i] for i in range(min(2, len(dataset)))])
    reason = misfit(model.train(), few["input_ids"].to(arguments.device), few["lengths"])
    if reason is not None:
        log.warning("%d settings of %s are trained one by one: %s", len(methods), type(methods[0]).__name__, reason)
        return None
    stack = Stack(model, len(methods))
    trainer = TogetherTrainer(
        model=stack,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=list(callbacks(stack)),
        methods=methods,
        eval_dataset=eval_dataset,
        train_probe=train_probe,
    )
    history = run_through(trainer)
    return stack, [[of_member(member, line) for line in history] for member in range(len(methods))]
