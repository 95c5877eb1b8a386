"""The policies: each method, in each of its settings, trained on D_rho."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from lm.base import cost, progress, ranks
from lm.base.files import link_or_copy
from lm.base.store import SHARE, Artifact, key_of
from lm.logprobs.completions import CompletionModel
from lm.models.loading import load_policy
from lm.objectives import Method
from lm.stages.data import sized, tokenizer
from lm.stages.rewards import teachers
from lm.stages.run import Run, once
from lm.stages.scores import PROBE, drawn, learnt_pairs, own_scores, scored_pairs, scores, unlabelled_scores
from lm.stages.trainings import adapted, arguments_of, inputs_of, method_described, save_model, sft
from lm.stages.unlabelled import distils_unlabelled
from lm.training.batches import CompletionArguments, pair_collator
from lm.training.loop import Snapshots, fit
from lm.training.policy import PolicyTrainer
from lm.training.stack import Stack
from lm.training.together import fit_together, why_alone
from theory.records import write_json

TRAINED = "trained"
"""In the scratch folder of a setting: its model and its log history, of settings that were trained together."""


def policies(run: Run, name: str) -> list[Artifact]:
    """The named method's policy in each of its settings, see `lm.config.Config.settings`; those that are missing are
    trained together where that can be."""
    methods, groups = run.config.settings(name), dict[Any, tuple[Method, ...]]()
    if run.config.train_together == "auto" and "policy" not in run.store.read_only:
        for method in methods:
            if not run.store.holds("policy", name, _inputs(run, name, method)):
                groups[_read_by(run, method)] = (*groups.get(_read_by(run, method), ()), method)
    return [policy(run, name, method, groups.get(_read_by(run, method), ())) for method in methods]


def _read_by(run: Run, method: Method) -> tuple[Any, ...]:
    """What settings have in common that can be trained together: what they read of a pair, and a reward head."""
    return method.needs_samples, method.needs_reward_head, method.own_oracle, *teachers(run, method)


@once
def policy(run: Run, name: str, method: Method | None = None, beside: tuple[Method, ...] = ()) -> Artifact:
    """A policy trained by a method, called `name`, on D_rho: in its configured setting, or in another one.

    The folder is the last step's model; the snapshots before it are in `step-<n>` below.

    Args:
        run: the run.
        name: the method's.
        method: in the setting.
        beside: settings that are missing, to be trained in one go where that can be when the first of them is asked
            for.
    """
    method = run.config.method(name) if method is None else method

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
        if len(beside) > 1 and method == beside[0]:
            _train_together(run, name, beside)
        if (scratch / TRAINED).is_dir():
            shutil.copytree(scratch / TRAINED, folder, copy_function=link_or_copy, dirs_exist_ok=True)
            (folder / HISTORY).unlink()
            history = json.loads((scratch / TRAINED / HISTORY).read_text(encoding="utf-8"))
        else:
            start = _start(run, name, method, scratch)
            history = fit(
                PolicyTrainer,
                start.model,
                start.pairs,
                pair_collator(sample=method.needs_samples),
                start.arguments,
                method=method,
                eval_dataset=start.probe,
                train_probe=start.train_probe,
                callbacks=[Snapshots(run.config.snapshots, lambda step: _snapshot(run, start.model, scratch, step))],
            )
            save_model(run, start.model, folder)
        if ranks.is_first():
            for snapshot in sorted((scratch / SNAPSHOTS).glob("step-*")):  # not moved: the artifact is not finished yet
                shutil.copytree(snapshot, folder / snapshot.name, copy_function=link_or_copy)
        return {"history": history, "steps": history[-1]["step"]}

    return run.store.get("policy", name, _inputs(run, name, method), make)


def _inputs(run: Run, name: str, method: Method) -> dict[str, Any]:
    inputs = inputs_of(
        run,
        "policy",
        run.config.policy,
        scores=scores(run),
        method=method,
        start=sft(run),
        snapshots=run.config.snapshots,
        probes=run.config.probe.times,
    )
    if run.config.probe.train_pairs:
        inputs["train_probe"] = run.config.probe.train_pairs
    if distils_unlabelled(run, method):
        inputs["unlabelled"] = unlabelled_scores(run)
    if method.own_oracle is not None:
        inputs["oracle"] = own_scores(run, name, method)
    return inputs


@dataclass(frozen=True)
class _Start:
    """What a training of a method starts from."""

    model: CompletionModel
    pairs: Dataset
    probe: Dataset | None
    train_probe: Dataset | None
    arguments: CompletionArguments


def _start(run: Run, name: str, method: Method, scratch: Path) -> _Start:
    seed = run.seed("policy")  # the same for every method: they see the same batches
    torch.manual_seed(seed)
    model = adapted(run, "policy", load_policy(sft(run).path, tokenizer(run), sized(run)))
    wrapped = CompletionModel(model, reward_head=method.needs_reward_head, options=run.config.logprobs)
    probe = scored_pairs(run, method, name, PROBE) if run.config.probe.pairs else None
    learnt = learnt_pairs(run, method, name)
    if run.config.data.unlabelled.is_asked and ranks.is_first():
        labelled = scores(run).metrics["pairs"]
        more = f"and {len(learnt) - labelled:,} unlabelled" if len(learnt) > labelled else "and none without"
        progress.say(f"  {name} learns from {labelled:,} pairs with labels {more}")
    few = run.config.probe.train_pairs
    train_probe = drawn(scored_pairs(run, method, name), few, run.seed("probe")) if few else None
    probes = run.config.probe.times if probe is not None else 0
    about = {"stage": "policy", **method_described(name, method)}
    arguments = arguments_of(run, run.config.policy, scratch, seed, probes=probes, about=about)
    return _Start(wrapped, learnt, probe, train_probe, arguments)


SNAPSHOTS = "snapshots"
"""In a scratch folder: they outlive a crash, as the checkpoints do."""
HISTORY = "history.json"


def _snapshot(run: Run, model: CompletionModel, scratch: Path, step: int) -> None:
    _save_whole(run, model, scratch / SNAPSHOTS / f"step-{step}")


def _save_whole(run: Run, model: CompletionModel, final: Path, **beside: Any) -> None:
    """A policy in a folder that is there whole or not at all, with these values as JSON files."""
    half = final.parent / ".half"
    if ranks.is_first():
        shutil.rmtree(half, ignore_errors=True)
    save_model(run, model, half)
    if ranks.is_first():
        for name, value in beside.items():
            write_json(half / f"{name}.json", value)
        shutil.rmtree(final, ignore_errors=True)
        half.rename(final)


def _train_together(run: Run, name: str, methods: Sequence[Method]) -> None:
    """Trains a method in those of these settings that no earlier call has trained, in one go, and leaves each in the
    scratch folder of its artifact, as TRAINED. Nothing is done where they have to be trained one by one.

    What checkpoints it leaves when it is stopped are of these settings together: the same go on from there.
    """
    spots = {method: run.store.scratch("policy", name, _inputs(run, name, method)) for method in methods}
    spots = {method: spot for method, spot in spots.items() if not (spot / TRAINED).is_dir()}
    if len(spots) < 2:
        return
    if (why := why_alone(run.config, sft(run).metrics["parameters"])) is not None:
        progress.say(f"[policy] {name}: {len(spots)} settings one by one: {why}")
        return
    keys = " ".join(key_of("policy", name, _inputs(run, name, method)) for method in spots)
    # In the first one's, and so gone with it, however that is finished.
    above = next(iter(spots.values())) / f"policy-{name}-together-{hashlib.sha256(keys.encode()).hexdigest()[:12]}"
    work = above / "scratch"
    resumed = work.is_dir()
    start = _start(run, name, methods[0], work)
    progress.say(f"[policy] {name}: {len(spots)} settings together")

    def save(stack: Stack, step: int) -> None:
        for member, spot in enumerate(spots.values()):
            _snapshot(run, stack.unstack(member), spot, step)

    with cost.Meter() as meter:
        trained = fit_together(
            start.model,
            list(spots),
            start.pairs,
            pair_collator(sample=methods[0].needs_samples),
            start.arguments,
            callbacks=lambda stack: [Snapshots(run.config.snapshots, lambda step: save(stack, step))],
            eval_dataset=start.probe,
            train_probe=start.train_probe,
        )
    if trained is None:
        return
    stack, histories = trained
    for member, (spot, history) in enumerate(zip(spots.values(), histories, strict=True)):
        spot.mkdir(parents=True, exist_ok=True)
        write_json(spot / SHARE, {**cost.share(meter.found(), len(spots)), "resumed": resumed})
        _save_whole(run, stack.unstack(member), spot / TRAINED, history=history)
    shutil.rmtree(above, ignore_errors=True)
