"""Reward models that are heads on a frozen body, whose last hidden states are computed once for all of them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lm.base import ranks
from lm.base.files import link_or_copy
from lm.base.store import Artifact
from lm.config import TrainingConfig
from lm.data import votes
from lm.logprobs.completions import CompletionModel
from lm.logprobs.scoring import score_states
from lm.models.loading import load_reward_model, reward_tokenizer, state_of
from lm.models.noise import own_config
from lm.models.opening import device_of
from lm.stages.data import data, opened
from lm.stages.readings import States, check_fits, sized_for, tokenizer_of
from lm.stages.run import Run, once
from lm.stages.trainings import held_out_metrics, precision, reward_model, start_input, start_of
from lm.training.heads import Head, Pairs, fit_head
from theory.records import replacing, write_json

CHUNK = 1024
"""Pairs that are lost at most where the machine stops."""
BODY = "body"
SHARED, HEAD = "model-body.safetensors", "model-head.safetensors"
"""Files of a reward model."""


@once
def features(run: Run, stage: str = "reward") -> Artifact:
    """Of what the models of a stage, "oracle" or "reward", start from: states at the last token of both completions of
    every pair, as float32 files of NumPy, in the order and with the labels that the set came with; and the body, as a
    reward model without a trained head, once for all heads."""

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
        base = load_reward_model(start_of(run, stage), sized_for(run, stage), new_head=True)  # which is not read
        model = CompletionModel(base, options=run.config.logprobs).to(device_of(run.config)).eval()
        check_fits(run, stage, model)
        found = States(run, stage, model)
        pairs = opened(data(run).path / "preferences")
        parts = []
        for first in range(0, len(pairs), CHUNK):
            part = scratch / f"states-{first}.npy"
            parts.append(part)
            rows, known = pairs.select(range(first, min(first + CHUNK, len(pairs)))), ranks.from_first(part.is_file)
            what = f"hidden states, pairs from {first:,} of {len(pairs):,}"
            read = found.read(rows)  # also of a part that is there: it is counted again
            if known:
                continue
            states = score_states(model, rows, what) if read is None else found.of(read, what)
            if ranks.is_first():
                with replacing(part) as temporary, temporary.open("wb") as file:
                    np.save(file, np.stack([one.float().numpy() for one in states], axis=1))
            ranks.wait()
        width = np.load(parts[0], mmap_mode="r").shape[-1]
        if ranks.is_first():
            whole = np.lib.format.open_memmap(
                folder / "states.npy", mode="w+", dtype=np.float32, shape=(len(pairs), 2, width)
            )
            for first, part in zip(range(0, len(pairs), CHUNK), parts, strict=True):
                block = np.load(part)
                whole[first : first + len(block)] = block
            whole.flush()
            beside = reward_tokenizer(model.model, tokenizer_of(run, stage))
            bare = {key: value for key, value in state_of(model.model).items() if not key.startswith("score.")}
            with own_config(model.model):
                model.model.save_pretrained(folder / BODY, state_dict=bare, max_shard_size="1000TB")
            (folder / BODY / "model.safetensors").rename(folder / BODY / SHARED)
            beside.save_pretrained(folder / BODY)
        return {"pairs": len(pairs), "width": width, **found.metrics()}

    start = start_input(run, stage)
    inputs = {"data": data(run), "body": start.pop("start"), **start, "precision": precision(run)}
    return run.store.get("features", "states", inputs, make)


def states_of(run: Run, pairs: Dataset, stage: str = "reward") -> npt.NDArray[np.float64]:
    """States, by what the models of a stage start from, of these pairs' chosen and rejected completions, [N, 2, H], as
    they are labelled now.

    Raises:
        ValueError: a pair is not one of the run's data.
    """
    every = opened(data(run).path / "preferences")
    place = {row: i for i, row in enumerate(every["id"][:])}
    given = every["chosen_ids"]
    states = np.load(features(run, stage).path / "states.npy", mmap_mode="r")
    found = np.empty((len(pairs), 2, states.shape[-1]))
    for i, (row, chosen, rejected) in enumerate(
        zip(pairs["id"][:], pairs["chosen_ids"][:], pairs["rejected_ids"][:], strict=True)
    ):
        if row not in place:
            raise ValueError(f"pair {row} is none of the run's data, of which the states are")
        ours = states[place[row]]
        at = given[place[row]]
        if at not in (chosen, rejected):
            raise ValueError(f"pair {row} has other completions than when its states were computed")
        found[i] = ours if at == chosen else ours[::-1]
    return found


def bradley_terry_model(
    run: Run,
    stage: str,
    name: str,
    training: TrainingConfig,
    inputs: dict[str, Any],
    pairs: Callable[[], Dataset],
    held_out: Callable[[], Dataset],
) -> Artifact:
    """A reward model as `training.train` says: a head, or `lm.stages.trainings.reward_model`."""
    if training.train != "head":
        return reward_model(run, stage, name, training, inputs, pairs, held_out)
    body = features(run, stage)

    def make(folder: Path, _: Path) -> dict[str, Any]:
        began = time.process_time()
        valid = held_out()
        learnt, states = pairs(), states_of(run, valid, stage)
        head = fit_head(_labelled(learnt, states_of(run, learnt, stage)), _labelled(valid, states))
        if ranks.is_first():
            _save(body.path / BODY, head, folder)
        rewards = torch.from_numpy(states @ head.weight)
        seconds = time.process_time() - began
        return {
            **held_out_metrics(run, valid, rewards[:, 0], rewards[:, 1]),
            "head": {"strength": head.strength, "path": head.path, "cpu_seconds": seconds},
            **({"reading": body.metrics["reading"]} if "reading" in body.metrics else {}),
            "history": [],
        }

    decides = {name: value for name, value in inputs.items() if name not in ("training", "seed", "lora", "kept")}
    return run.store.get(stage, name, {**decides, "train": "head", "features": body}, make)


def head_rewards(run: Run, model: Artifact, pairs: Dataset, stage: str = "reward") -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards by a head of a stage, of the chosen and of the rejected completions of these pairs, [N] each, float64:
    those that the saved model gives, without its forward pass. Raises as `states_of`."""
    weight = load_file(model.path / HEAD)["score.weight"][0].double()
    rewards = torch.from_numpy(states_of(run, pairs, stage)) @ weight
    return rewards[:, 0], rewards[:, 1]


def _labelled(pairs: Dataset, states: npt.NDArray[np.float64]) -> Pairs:
    probabilities, weights = (
        np.array(pairs[name][:], dtype=np.float64) if name in pairs.column_names else None for name in votes.COLUMNS
    )
    return Pairs(states[:, 0] - states[:, 1], probabilities, weights)


def _save(body: Path, head: Head, folder: Path) -> None:
    """An ordinary reward model whose weights are in two files: the body's, which all heads share, and the head's."""
    shutil.copytree(body, folder, dirs_exist_ok=True, copy_function=link_or_copy)
    with safe_open(folder / SHARED, "pt") as shared:
        names = list(shared.keys())
        dtype = shared.get_tensor(names[0]).dtype
    save_file({"score.weight": torch.from_numpy(head.weight)[None].to(dtype)}, folder / HEAD, metadata={"format": "pt"})
    size = sum((folder / file).stat().st_size for file in (SHARED, HEAD))
    index = {"metadata": {"total_size": size}, "weight_map": {**dict.fromkeys(names, SHARED), "score.weight": HEAD}}
    write_json(folder / "model.safetensors.index.json", index)
