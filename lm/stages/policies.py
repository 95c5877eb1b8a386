"""The policies: each method, in each of its settings, trained on D_rho."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from lm.base import progress, ranks
from lm.base.files import link_or_copy
from lm.base.store import Artifact
from lm.logprobs.completions import CompletionModel
from lm.models.loading import load_policy
from lm.objectives import Method
from lm.stages.data import sized, tokenizer
from lm.stages.run import Run, once
from lm.stages.scores import PROBE, drawn, learnt_pairs, own_scores, scored_pairs, scores, unlabelled_scores
from lm.stages.trainings import adapted, arguments_of, inputs_of, method_described, save_model, sft
from lm.stages.unlabelled import distils_unlabelled
from lm.training.batches import pair_collator
from lm.training.loop import Snapshots, fit
from lm.training.policy import PolicyTrainer


def policies(run: Run, name: str) -> list[Artifact]:
    """The named method's policy in each of its settings, see `lm.config.Config.settings`."""
    return [policy(run, name, method) for method in run.config.settings(name)]


@once
def policy(run: Run, name: str, method: Method | None = None) -> Artifact:
    """A policy trained by a method, called `name`, on D_rho: in its configured setting, or in another one.

    The folder is the last step's model; the snapshots before it are in `step-<n>` below.
    """
    method, training = run.config.method(name) if method is None else method, run.config.policy

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
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
        probes = run.config.probe.times if probe is not None else 0
        about = {"stage": "policy", **method_described(name, method)}
        arguments = arguments_of(run, training, scratch, seed, probes=probes, about=about)
        kept = scratch / "snapshots"  # they outlive a crash, as the checkpoints do

        def save(step: int) -> None:
            final, half = kept / f"step-{step}", kept / ".half"
            if ranks.is_first():
                shutil.rmtree(half, ignore_errors=True)
            save_model(run, wrapped, half)
            if ranks.is_first():
                shutil.rmtree(final, ignore_errors=True)
                half.rename(final)

        history = fit(
            PolicyTrainer,
            wrapped,
            learnt,
            pair_collator(sample=method.needs_samples),
            arguments,
            method=method,
            eval_dataset=probe,
            train_probe=drawn(scored_pairs(run, method, name), few, run.seed("probe")) if few else None,
            callbacks=[Snapshots(run.config.snapshots, save)],
        )
        save_model(run, wrapped, folder)
        if ranks.is_first():
            for snapshot in sorted(kept.glob("step-*")):  # not moved: the artifact is not finished yet
                shutil.copytree(snapshot, folder / snapshot.name, copy_function=link_or_copy)
        return {"history": history, "steps": history[-1]["step"]}

    inputs = inputs_of(
        run,
        "policy",
        training,
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
    return run.store.get("policy", name, inputs, make)
