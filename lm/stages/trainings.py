"""What the stages that train share, pi_ref, and reward models: a Bradley-Terry one, and one of a method's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lm.base import ranks
from lm.base.store import Artifact, keyed
from lm.config import TrainingConfig
from lm.data import votes
from lm.data.lengths import LengthClass, length_class
from lm.logprobs.completions import CompletionModel
from lm.logprobs.scoring import score_pairs
from lm.models.loading import (
    content_of,
    is_sharded,
    load_policy,
    load_reward_model,
    reward_tokenizer,
    state_of,
)
from lm.models.lora import add_adapter, is_adapted, merged, save_adapter
from lm.models.opening import open_policy, open_reward_model
from lm.objectives import JointOracle
from lm.stages.data import data, references, tokenizer
from lm.stages.run import Run, once
from lm.training.batches import CompletionArguments, agreement, pair_collator, sft_collator
from lm.training.loop import fit, training_arguments
from lm.training.trainer import JointOracleTrainer, RewardTrainer, SFTTrainer

# ---------------------------------------------------------------- what trainings share


def inputs_of(run: Run, stage: str, training: TrainingConfig, **inputs: Any) -> dict[str, Any]:
    """What decides a trained model, beside its data."""
    keys = {"training": replace(training, **training.INDIFFERENT), "seed": run.seed(stage), "precision": precision(run)}
    if _has_adapters(run, stage):
        keys["lora"] = {name: value for name, value in keyed(run.config.lora).items() if name != "stages"}
    return {**keys, "base": content_of(run.config.model), **inputs}


def precision(run: Run) -> str:
    """One numeric path: log-probs and rewards of another precision are other artifacts."""
    return run.config.dtype + (" autocast" if run.config.logprobs.autocast else "")


def _has_adapters(run: Run, stage: str) -> bool:
    """Whether adapters are trained in this stage, and not all parameters."""
    return run.config.lora.rank is not None and stage in run.config.lora.stages


def adapted(run: Run, stage: str, model: PreTrainedModel) -> PreTrainedModel:
    """What the stage trains: the model, with adapters where the stage has them."""
    if _has_adapters(run, stage):
        # A path that is no hub name, and the same whatever the run's folder is called.
        base = run.config.model if stage == "sft" else f"./{sft(run).path.relative_to(run.store.root)}"
        add_adapter(model, run.config.lora, base=base)
    return model


def arguments_of(run: Run, training: TrainingConfig, scratch: Path, seed: int, probes: int = 0) -> CompletionArguments:
    """One training in transformers' terms, which trackers call as its artifact is called."""
    name = scratch.parent.name
    return training_arguments(
        training,
        scratch,
        seed=seed,
        device=run.config.device,
        probes=probes,
        report_to=run.config.report_to,
        logs=run.store.root / "logs" / name,
    )


def save_model(run: Run, model: CompletionModel, folder: Path) -> None:
    """A model that transformers loads, its reward head beside it; of adapters, merged into its weights, a copy."""
    state = state_of(model)  # of all ranks, where it is sharded
    if not ranks.is_first():
        return
    own, plain = {n.removeprefix("model."): v for n, v in state.items() if n.startswith("model.")}, model.model
    if is_adapted(plain):
        save_adapter(plain, own, folder / "adapter")
        plain = merged(plain, own)
        own = plain.state_dict()
    beside = reward_tokenizer(plain, tokenizer(run)) if model.is_reward_model else tokenizer(run)
    plain.save_pretrained(folder, state_dict=own)
    beside.save_pretrained(folder)
    if model.reward_head is not None:
        save_file({"weight": state["reward_head.weight"].contiguous()}, folder / "reward_head.safetensors")


def _whole(model: CompletionModel, folder: Path, reopen: Callable[[Path], CompletionModel]) -> CompletionModel:
    """A trained model, read again from where it was saved if it is sharded: ranks score at their own paces."""
    if not is_sharded(model):
        return model.eval()
    return reopen(ranks.from_first(lambda: folder))


# ---------------------------------------------------------------- pi_ref


@once
def sft(run: Run) -> Artifact:
    """pi_ref: the base model trained on the reference completions."""

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
        seed = run.seed("sft")
        torch.manual_seed(seed)
        base = load_policy(run.config.model, tokenizer(run), run.config)
        model = CompletionModel(adapted(run, "sft", base), options=run.config.logprobs)
        arguments = arguments_of(run, run.config.sft, scratch, seed)
        history = fit(SFTTrainer, model, references(run), sft_collator(), arguments)
        save_model(run, model, folder)
        return {"parameters": sum(p.numel() for p in model.parameters()), "history": history}

    return run.store.get("sft", "policy", inputs_of(run, "sft", run.config.sft, data=data(run)), make)


# ---------------------------------------------------------------- reward models


def reward_model(
    run: Run,
    stage: str,
    name: str,
    training: TrainingConfig,
    inputs: dict[str, Any],
    pairs: Callable[[], Dataset],
    held_out: Callable[[], Dataset],
) -> Artifact:
    """A Bradley-Terry model started from pi_ref, and its accuracy on held-out pairs; both sets are read only where it
    is trained."""

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
        seed = run.seed(stage, name)
        torch.manual_seed(seed)
        base = load_reward_model(sft(run).path, run.config)
        model = CompletionModel(adapted(run, stage, base), options=run.config.logprobs)
        arguments = arguments_of(run, training, scratch, seed)
        history = fit(RewardTrainer, model, pairs(), pair_collator(), arguments)
        save_model(run, model, folder)
        valid = held_out()
        scorer = _whole(model, folder, lambda saved: open_reward_model(saved, run.config))
        chosen, rejected = score_pairs(scorer, valid, f"{name} on validation pairs")
        return {"accuracy": accuracy(run, valid, chosen, rejected), "history": history}

    return run.store.get(stage, name, inputs, make)


def joint_oracle(
    run: Run,
    name: str,
    oracle: JointOracle,
    inputs: dict[str, Any],
    pairs: Callable[[], Dataset],
    held_out: Callable[[], Dataset],
) -> Artifact:
    """A reward model of a method's own: pi_ref with a reward head, both heads trained jointly."""

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
        seed = run.seed("reward", name)
        torch.manual_seed(seed)
        policy = adapted(run, "reward", load_policy(sft(run).path, tokenizer(run), run.config))
        model = CompletionModel(policy, reward_head=True, options=run.config.logprobs)
        arguments = arguments_of(run, run.config.reward, scratch, seed)
        history = fit(JointOracleTrainer, model, pairs(), pair_collator(), arguments, oracle=oracle)
        save_model(run, model, folder)
        valid = held_out()
        scorer = _whole(model, folder, lambda saved: open_policy(saved, tokenizer(run), run.config, reward_head=True))
        chosen, rejected = score_pairs(scorer, valid, f"{name}'s oracle on validation pairs", rewards=True)
        return {"accuracy": accuracy(run, valid, chosen, rejected), "history": history}

    return run.store.get("reward", name, inputs, make)


def accuracy(run: Run, pairs: Dataset, chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, Any]:
    """Share of pairs ordered right, in all and by which completion is preferred; a pair counts once, whatever it
    weighs, and by a soft label as of `lm.training.batches.agreement`: a tie counts half."""
    classes, labels = length_classes(run, pairs), None
    if votes.PROBABILITY in pairs.column_names:
        labels = torch.tensor(pairs[votes.PROBABILITY][:], dtype=torch.float64, device=chosen.device)
    right = agreement(chosen, rejected, labels)
    result: dict[str, Any] = {}
    for name in ("all", "longer", "shorter", "neither"):
        rows = [name in ("all", c) for c in classes]
        count = sum(rows)
        share = float(right[torch.tensor(rows)].float().mean()) if count else None
        result[name] = {"accuracy": share, "pairs": count}
    return result


def length_classes(run: Run, pairs: Dataset) -> list[LengthClass]:
    """Which completion of each pair is the longer; of a tie neither is preferred."""
    ratio, both = run.config.bias.length_ratio, (pairs["chosen_ids"][:], pairs["rejected_ids"][:])
    soft = votes.PROBABILITY in pairs.column_names
    labels = pairs[votes.PROBABILITY][:] if soft else [1.0] * len(pairs)
    return [length_class(len(c), len(r), ratio, p) for c, r, p in zip(*both, labels, strict=True)]
