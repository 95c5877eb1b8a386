"""What the stages that train share, pi_ref, and reward models: a Bradley-Terry one, and one of a method's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lm.base import ranks
from lm.base.store import Artifact, keyed, provenance
from lm.config import TrainingConfig
from lm.data import votes
from lm.data.lengths import LengthClass, length_class
from lm.logprobs.completions import CompletionModel
from lm.logprobs.scoring import score_pairs
from lm.models.loading import (
    check_reward_base,
    is_sharded,
    load_policy,
    load_reward_model,
    reward_tokenizer,
    state_of,
)
from lm.models.lora import add_adapter, is_adapted, merged, save_adapter
from lm.models.noise import own_config
from lm.models.opening import open_policy, open_reward_model
from lm.objectives import JointOracle, Method
from lm.stages.data import data, references, sized, tokenizer
from lm.stages.run import Run, once, trains_reward_models
from lm.training.batches import CompletionArguments, agreement, pair_collator, sft_collator
from lm.training.heads import calibration
from lm.training.loop import fit, training_arguments
from lm.training.trackers import GROUP
from lm.training.trainer import JointOracleTrainer, RewardTrainer, SFTTrainer

# ---------------------------------------------------------------- what trainings share


def inputs_of(run: Run, stage: str, training: TrainingConfig, **inputs: Any) -> dict[str, Any]:
    """What decides a trained model, beside its data."""
    keys = {"training": replace(training, **training.INDIFFERENT), "seed": run.seed(stage), "precision": precision(run)}
    if run.config.adapts(stage):
        keys["lora"] = {name: value for name, value in keyed(run.config.lora).items() if name != "stages"}
    return {**keys, "base": run.content(run.config.model), **inputs}


def precision(run: Run) -> str:
    """One numeric path: log-probs and rewards of another precision are other artifacts."""
    return run.config.dtype + (" autocast" if run.config.logprobs.autocast else "")


def adapted(run: Run, stage: str, model: PreTrainedModel) -> PreTrainedModel:
    """What the stage trains: the model, with adapters where the stage has them."""
    if run.config.adapts(stage):
        base = run.config.model if stage == "sft" else run.config.reward_base
        if stage == "policy" or base is None:
            # A path that is no hub name, and the same whatever the run's folder is called.
            base = f"./{sft(run).path.relative_to(run.store.root)}"
        add_adapter(model, run.config.lora, base=base)
    return model


def described(run: Run) -> dict[str, Any]:
    """What a run's trackers are told that it is about, beside the options of a training."""
    config = run.config
    return {
        GROUP: config.output_dir,
        "commit": provenance(config.seed)["commit"],
        "base_model": config.model,
        "data": config.data.path or config.data.kind,
        "data.kind": config.data.kind,
        "data.labels": config.data.labels,
        "data.rewards": config.data.rewards,
        "rho": config.bias.rho,
        "run_seed": config.seed,
    }


def method_described(name: str, method: Method) -> dict[str, Any]:
    """A method's name and its options, those of groups as `kl.alpha_end`; and as alpha the weight of its KL term at the
    end, where it has one that no target decides."""

    def flat(options: Mapping[str, Any], before: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for option, value in options.items():
            found |= flat(value, f"{before}{option}.") if isinstance(value, Mapping) else {f"{before}{option}": value}
        return found

    kl = method.pessimism
    alpha = {} if kl is None else {"alpha": None if kl.target is not None else kl.alpha_end}
    return {"method": name, **flat(asdict(method)), **alpha}


def arguments_of(
    run: Run,
    training: TrainingConfig,
    scratch: Path,
    seed: int,
    probes: int = 0,
    *,
    about: Mapping[str, Any],
) -> CompletionArguments:
    """One training in transformers' terms, which trackers call as its artifact is called.

    Args:
        run: the run.
        training: its options.
        scratch: where checkpoints go.
        seed: of what it draws.
        probes: so many probes of the policy.
        about: what trackers are told besides `described`.
    """
    name = scratch.parent.name
    return training_arguments(
        training,
        scratch,
        seed=seed,
        device=run.config.device,
        probes=probes,
        report_to=run.config.report_to,
        logs=logs_of(run, name),
        described={**about, **described(run)} if run.config.report_to else None,
    )


def logs_of(run: Run, name: str) -> Path:
    """TensorBoard's folder of a training, or of the results."""
    return run.store.root / "logs" / name


def save_model(run: Run, model: CompletionModel, folder: Path) -> None:
    """A model that transformers loads, its reward head beside it; of adapters, merged into its weights, a copy."""
    state = state_of(model)  # of all ranks, where it is sharded
    if not ranks.is_first():
        return
    own, plain = {n.removeprefix("model."): v for n, v in state.items() if n.startswith("model.")}, model.model
    with own_config(plain):
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
    """pi_ref: the base model trained on the reference completions, or as it is."""
    training = run.config.sft

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
        if trains_reward_models(run.config):
            option = "model" if run.config.reward_base is None else "reward_base"
            check_reward_base(getattr(run.config, option), run.config.trust_remote_code, option)
        seed = run.seed("sft")
        torch.manual_seed(seed)
        base = load_policy(run.config.model, tokenizer(run), sized(run))
        if training.train == "nothing":
            model = CompletionModel(base, options=run.config.logprobs)
            save_model(run, model, folder)
            return {"parameters": sum(p.numel() for p in model.parameters()), "history": []}
        model = CompletionModel(adapted(run, "sft", base), options=run.config.logprobs)
        arguments = arguments_of(run, training, scratch, seed, about={"stage": "sft"})
        history = fit(SFTTrainer, model, references(run), sft_collator(), arguments)
        save_model(run, model, folder)
        return {"parameters": sum(p.numel() for p in model.parameters()), "history": history}

    if training.train == "nothing":
        inputs = {"base": run.content(run.config.model), "precision": precision(run), "data": data(run)}
        return run.store.get("sft", "as-it-is", inputs, make)
    return run.store.get("sft", "policy", inputs_of(run, "sft", training, data=data(run)), make)


# ---------------------------------------------------------------- reward models


def start_of(run: Run) -> Path | str:
    """What reward models start from: pi_ref, or `reward_base`."""
    return sft(run).path if run.config.reward_base is None else run.config.reward_base


def start_input(run: Run) -> Artifact | str | None:
    """What it counts as in a key."""
    return sft(run) if run.config.reward_base is None else run.content(run.config.reward_base)


def reward_model(
    run: Run,
    stage: str,
    name: str,
    training: TrainingConfig,
    inputs: dict[str, Any],
    pairs: Callable[[], Dataset],
    held_out: Callable[[], Dataset],
) -> Artifact:
    """A Bradley-Terry model, trained from `start_of`, and its accuracy on held-out pairs; both sets are read only where
    it is trained."""

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
        seed = run.seed(stage, name)
        torch.manual_seed(seed)
        base = load_reward_model(start_of(run), sized(run), new_head=True)
        model = CompletionModel(adapted(run, stage, base), options=run.config.logprobs)
        arguments = arguments_of(run, training, scratch, seed, about={"stage": stage, "reward_model": name})
        history = fit(RewardTrainer, model, pairs(), pair_collator(), arguments)
        save_model(run, model, folder)
        valid = held_out()
        scorer = _whole(model, folder, lambda saved: open_reward_model(saved, sized(run)))
        chosen, rejected = score_pairs(scorer, valid, f"{name} on validation pairs")
        return {**held_out_metrics(run, valid, chosen, rejected), "history": history}

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
        policy = adapted(run, "reward", load_policy(start_of(run), tokenizer(run), sized(run)))
        model = CompletionModel(policy, reward_head=True, options=run.config.logprobs)
        about = {"stage": "reward", "oracle_of": name, "oracle_alpha": oracle.alpha}
        arguments = arguments_of(run, run.config.reward, scratch, seed, about=about)
        history = fit(JointOracleTrainer, model, pairs(), pair_collator(), arguments, oracle=oracle)
        save_model(run, model, folder)
        valid = held_out()
        scorer = _whole(model, folder, lambda saved: open_policy(saved, tokenizer(run), sized(run), reward_head=True))
        chosen, rejected = score_pairs(scorer, valid, f"{name}'s oracle on validation pairs", rewards=True)
        return {**held_out_metrics(run, valid, chosen, rejected), "history": history}

    return run.store.get("reward", name, inputs, make)


def held_out_metrics(run: Run, pairs: Dataset, chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, Any]:
    """How a reward model does on validation pairs: its accuracy, and how well its probabilities are calibrated."""
    labels = pairs[votes.PROBABILITY][:] if votes.PROBABILITY in pairs.column_names else None
    how_sure = calibration((chosen - rejected).numpy(), None if labels is None else np.array(labels))
    return {"accuracy": accuracy(run, pairs, chosen, rejected), "calibration": how_sure}


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
