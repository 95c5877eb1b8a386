"""What the stages that train share, pi_ref, and reward models: a Bradley-Terry one, and one of a method's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lm.base import progress, ranks
from lm.base.documents import flat
from lm.base.files import link_or_copy
from lm.base.store import Artifact, keyed, provenance
from lm.config import TrainingConfig
from lm.data import columns, votes
from lm.data.lengths import Classes, slope_on_length
from lm.data.lengths import length_classes as of_lengths
from lm.logprobs.completions import CompletionModel
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
from lm.stages.readings import check_fits, input_of, pair_rewards, sized_for, tokenised, tokenizer_of
from lm.stages.run import Run, base_of, once, reward_bases
from lm.training.batches import CompletionArguments, agreement, pair_collator, sft_collator
from lm.training.best import KeepBest, Patience, spread, verdict
from lm.training.heads import calibration
from lm.training.loop import fit, training_arguments
from lm.training.trackers import GROUP
from lm.training.trainer import CompletionTrainer, JointOracleTrainer, RewardTrainer, SFTTrainer

# ---------------------------------------------------------------- what trainings share


def inputs_of(run: Run, stage: str, training: TrainingConfig, **inputs: Any) -> dict[str, Any]:
    """What decides a trained model, beside its data."""
    keys = {"training": replace(training, **training.INDIFFERENT), "seed": run.seed(stage), "precision": precision(run)}
    if run.config.adapts(stage):
        keys["lora"] = {name: value for name, value in keyed(run.config.lora).items() if name != "stages"}
    if stage in ("oracle", "reward") and training.stopping is not None:
        keys["kept"] = training.stopping  # without it the last step is, as of the artifacts that have no such key
    return {**keys, "base": run.content(run.config.model), **inputs}


def precision(run: Run) -> str:
    """One numeric path: log-probs and rewards of another precision are other artifacts."""
    return run.config.dtype + (" autocast" if run.config.logprobs.autocast else "")


def adapted(run: Run, stage: str, model: PreTrainedModel) -> PreTrainedModel:
    """What the stage trains: the model, with adapters where the stage has them."""
    if run.config.adapts(stage):
        rewards = stage in ("oracle", "reward")
        option, base = base_of(run.config, stage) if rewards else ("model", run.config.model)
        if stage != "sft" and option == "model":
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

    kl = method.pessimism
    alpha = {} if kl is None else {"alpha": None if kl.target is not None else kl.alpha_end}
    return {"method": name, **dict(flat(asdict(method))), **alpha}


def arguments_of(
    run: Run,
    training: TrainingConfig,
    scratch: Path,
    seed: int,
    *,
    about: Mapping[str, Any],
    probes: int = 0,
    evaluations: int = 0,
) -> CompletionArguments:
    """One training in transformers' terms, which trackers call as its artifact is called.

    Args:
        run: the run.
        training: its options.
        scratch: where checkpoints go.
        seed: of what it draws.
        about: what trackers are told besides `described`.
        probes: so many probes of the policy.
        evaluations: so many looks at held-out rows, of a reward model.
    """
    name = scratch.parent.name
    return training_arguments(
        training,
        scratch,
        seed=seed,
        device=run.config.device,
        probes=probes,
        evaluations=evaluations,
        report_to=run.config.report_to,
        logs=logs_of(run, name),
        described={**about, **described(run)} if run.config.report_to else None,
    )


def logs_of(run: Run, name: str) -> Path:
    """TensorBoard's folder of a training, or of the results."""
    return run.store.root / "logs" / name


def save_model(run: Run, model: CompletionModel, folder: Path, stage: str = "policy") -> None:
    """A model of a stage that transformers loads, its reward head and its tokenizer beside it; of adapters, merged into
    its weights, a copy."""
    words = tokenizer_of(run, stage) if stage in ("oracle", "reward") else tokenizer(run)
    state = state_of(model)  # of all ranks, where it is sharded
    if not ranks.is_first():
        return
    own, plain = {n.removeprefix("model."): v for n, v in state.items() if n.startswith("model.")}, model.model
    with own_config(plain):
        if is_adapted(plain):
            save_adapter(plain, own, folder / "adapter")
            plain = merged(plain, own)
            own = plain.state_dict()
        beside = reward_tokenizer(plain, words) if model.is_reward_model else words
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
        for option, spec in reward_bases(run.config).items():
            check_reward_base(spec, run.config.trust_remote_code, option)
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


def start_of(run: Run, stage: str) -> Path | str:
    """What the models of a stage, "oracle" or "reward", start from: pi_ref, or what the options name."""
    option, spec = base_of(run.config, stage)
    return sft(run).path if option == "model" else spec


def start_input(run: Run, stage: str) -> dict[str, Any]:
    """What it adds to a key: its content, and its reading where it has another tokenizer than the policy."""
    option, spec = base_of(run.config, stage)
    return {"start": sft(run) if option == "model" else run.content(spec), **input_of(run, stage)}


def _fit_reward(
    run: Run,
    about: Mapping[str, Any],
    trainer: type[CompletionTrainer],
    model: CompletionModel,
    training: TrainingConfig,
    sets: tuple[Dataset, Dataset],
    folders: tuple[Path, Path],
    seed: int,
    reopen: Callable[[Path], CompletionModel],
    **extra: Any,
) -> tuple[CompletionModel, dict[str, Any]]:
    """Trains a reward model and leaves it in its folder, as it was after the step of the least loss of validation
    pairs, or after the last one, see `lm.config.TrainingConfig.stopping`.

    Args:
        run: the run.
        about: what trackers are told of it; its `stage` is "oracle" or "reward".
        trainer: of its kind.
        model: as it starts.
        training: the options.
        sets: training and validation pairs.
        folders: where it is to be left, and where what outlives a crash goes.
        seed: of the training.
        reopen: the model in a folder, ready to score.
        extra: for the trainer.

    Returns:
        The model that was kept, ready to score, and what its metrics say of the training.
    """
    (pairs, valid), (folder, scratch), how, stage = sets, folders, training.stopping, about["stage"]
    if how is None:
        history = fit(
            trainer, model, pairs, pair_collator(), arguments_of(run, training, scratch, seed, about=about), **extra
        )
        save_model(run, model, folder, stage)
        return _whole(model, folder, reopen), {"kept": verdict(history), "history": history}
    few, place = spread(valid, how["evaluation_pairs"]), scratch / f"seen-{ranks.index()}.arrow"
    seen, _ = tokenised(run, stage, few, place, "validation pairs")
    keep = KeepBest(scratch, lambda half: save_model(run, model, half, stage))
    history = fit(
        trainer,
        model,
        pairs,
        pair_collator(),
        arguments_of(run, training, scratch, seed, about=about, evaluations=how["evaluations"] or 0),
        eval_dataset=seen,
        callbacks=[keep, *([Patience(how["patience"])] if how["patience"] is not None else [])],
        **extra,
    )
    kept = verdict(history)
    if ranks.is_first():
        shutil.copytree(keep.folder(kept["step"]), folder, copy_function=link_or_copy, dirs_exist_ok=True)
    if ranks.is_first():
        progress.say(
            f"step {kept['step']} of {kept['last_step']} is kept: loss of validation pairs "
            f"{kept['validation_loss']:.4f}, after the last {kept['last_validation_loss']:.4f}"
        )
    is_last = kept["step"] == kept["last_step"]
    scorer = _whole(model, folder, reopen) if is_last else reopen(ranks.from_first(lambda: folder))
    return scorer, {"kept": kept, "history": history}


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
        base = load_reward_model(start_of(run, stage), sized_for(run, stage), new_head=True)
        model = CompletionModel(adapted(run, stage, base), options=run.config.logprobs)
        about = {"stage": stage, "reward_model": name}
        check_fits(run, stage, model)
        learnt, told = tokenised(run, stage, pairs(), scratch / f"read-{ranks.index()}.arrow")
        valid = held_out()

        def reopen(saved: Path) -> CompletionModel:
            return open_reward_model(saved, sized_for(run, stage))

        sets, folders = (learnt, valid), (folder, scratch)
        scorer, trained = _fit_reward(run, about, RewardTrainer, model, training, sets, folders, seed, reopen)
        chosen, rejected, _ = pair_rewards(run, stage, scorer, valid, f"{name} on validation pairs")
        return {**held_out_metrics(run, valid, chosen, rejected), **told, **trained}

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
        words, limits = tokenizer_of(run, "reward"), sized_for(run, "reward")
        policy = adapted(run, "reward", load_policy(start_of(run, "reward"), words, limits))
        model = CompletionModel(policy, reward_head=True, options=run.config.logprobs)
        about = {"stage": "reward", "oracle_of": name, "oracle_alpha": oracle.alpha}
        check_fits(run, "reward", model)
        learnt, told = tokenised(run, "reward", pairs(), scratch / f"read-{ranks.index()}.arrow")
        valid, training = held_out(), run.config.reward

        def reopen(saved: Path) -> CompletionModel:
            return open_policy(saved, words, limits, reward_head=True)

        sets, folders, trainer = (learnt, valid), (folder, scratch), JointOracleTrainer
        scorer, trained = _fit_reward(run, about, trainer, model, training, sets, folders, seed, reopen, oracle=oracle)
        what = f"{name}'s oracle on validation pairs"
        chosen, rejected, _ = pair_rewards(run, "reward", scorer, valid, what, rewards=True)
        return {**held_out_metrics(run, valid, chosen, rejected), **told, **trained}

    return run.store.get("reward", name, inputs, make)


def as_reported(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The `held_out_metrics` of a reward model as `figures.record.RewardModel` has them; an earlier version made no
    calibration."""
    return {**metrics["accuracy"], **{key: metrics[key] for key in ("calibration",) if key in metrics}}


def held_out_metrics(run: Run, pairs: Dataset, chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, Any]:
    """How a reward model does on validation pairs: its accuracy, and how well its probabilities are calibrated."""
    labels = pairs[votes.PROBABILITY][:] if votes.PROBABILITY in pairs.column_names else None
    how_sure = calibration((chosen - rejected).numpy(), None if labels is None else np.array(labels))
    return {"accuracy": accuracy(run, pairs, chosen, rejected), "calibration": how_sure}


def accuracy(run: Run, pairs: Dataset, chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, Any]:
    """Share of pairs ordered right, in all and by which completion is preferred; a pair counts once, whatever it
    weighs, and by a soft label as of `lm.training.batches.agreement`: a tie counts half."""
    classes, right = length_classes(run, pairs), ordered_right(pairs, chosen, rejected)
    result: dict[str, Any] = {}
    for name in ("all", "longer", "shorter", "neither"):
        rows = torch.from_numpy((classes == name) | (name == "all"))
        count = int(rows.sum())
        share = float(right[rows].float().mean()) if count else None
        result[name] = {"accuracy": share, "pairs": count}
    return result


def ordered_right(pairs: Dataset, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """1 of each pair that is ordered as labelled, [N], by a soft label as of `lm.training.batches.agreement`."""
    labels = None
    if votes.PROBABILITY in pairs.column_names:
        labels = torch.tensor(pairs[votes.PROBABILITY][:], dtype=torch.float64, device=chosen.device)
    return agreement(chosen, rejected, labels)


def length_coefficient(pairs: Dataset, chosen: torch.Tensor, rejected: torch.Tensor) -> float | None:
    """`lm.data.lengths.slope_on_length` of rewards of these pairs, [N] each, and their lengths in tokens."""
    longer = np.subtract(*(columns.sizes(pairs, f"{side}_ids") for side in votes.SIDES))
    return slope_on_length((chosen - rejected).double().numpy(), longer)


def length_classes(run: Run, pairs: Dataset) -> Classes:
    """Which completion of each pair is the longer, [N]; of a tie neither is preferred."""
    soft = votes.PROBABILITY in pairs.column_names
    labels = columns.numbers(pairs, votes.PROBABILITY) if soft else np.ones(len(pairs))
    chosen, rejected = (columns.sizes(pairs, name) for name in ("chosen_ids", "rejected_ids"))
    return of_lengths(chosen, rejected, run.config.bias.length_ratio, labels)
