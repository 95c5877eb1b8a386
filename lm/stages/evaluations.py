"""Trained policies on held-out prompts: samples and their oracle rewards, log-ratios, and validation's choice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from lm.base import ranks
from lm.base.files import write_jsonl
from lm.base.store import Artifact
from lm.config import SFT, Config
from lm.data import world
from lm.data.columns import digests, numbered, texts
from lm.data.messages import STORED
from lm.judging.reading import sample_text
from lm.judging.statistics import bootstrap_interval
from lm.logprobs.completions import CompletionModel
from lm.logprobs.sampling import in_keys, sample_completions
from lm.logprobs.scoring import score_pairs, score_rows
from lm.models.opening import open_policy
from lm.objectives import Method
from lm.stages.data import given_pairs, sized, tokenizer
from lm.stages.labels import judge_input, judge_samples, labelled_pairs, labels
from lm.stages.policies import policies
from lm.stages.readings import Asked
from lm.stages.run import Run, once
from lm.stages.subsets import members
from lm.stages.trainings import accuracy, ordered_right, sft

LOGPS, LOGRATIOS = "logps.npy", "logratios.npy"


@once
def reference_on_test(run: Run) -> Artifact:
    """log pi_ref of the test pairs' chosen and rejected completions, [2, N], as a file of NumPy: what every policy's
    evaluation takes from its own."""

    def make(folder: Path, _: Path) -> dict[str, Any]:
        pairs, reference = labelled_pairs(run, "test"), open_policy(sft(run).path, tokenizer(run), sized(run))
        both = torch.stack(score_pairs(reference, pairs, "reference on test pairs"))
        if ranks.is_first():
            np.save(folder / LOGPS, both.numpy())
        return {"pairs": len(pairs)}

    return run.store.get("evaluate", "reference", {"policy": sft(run), "labels": labels(run)}, make)


@once
def evaluation(run: Run, name: str) -> Artifact:
    """Samples of one policy ("sft" for pi_ref; else the method's, as validation chose it) on the test prompts, judged
    by the oracle.

    The artifact has samples.jsonl: prompt, messages where a chat template wrote it from some, completion,
    oracle_reward, length (tokens, end-of-text included), finished
    (whether end-of-text was reached), log_ratio (log pi - log pi_ref of the sample, nats), and for the embedded world
    the true utility; and of a trained policy logratios.npy: log pi - log pi_ref of the test pairs' chosen and rejected
    completions, [2, N], nats.
    """
    config = run.config
    trained, model = trained_policy(run, name)

    def make(folder: Path, _: Path) -> dict[str, Any]:
        pairs = labelled_pairs(run, "test")
        prompts = prompts_of(pairs, config.evaluation.prompts, run.seed("prompts"))
        asked = asked_of(pairs)
        ref_chosen, ref_rejected = torch.from_numpy(np.load(reference_on_test(run).path / LOGPS))
        policy = open_policy(model, tokenizer(run), sized(run))
        ids = list(prompts.values())
        samples, rewards, told = judged_samples(run, policy, prompts, name, asked)
        end = tokenizer(run).eos_token_id
        ref_logps = logps = score_rows(policy, ids, samples, f"{name} log-probs")
        chosen, rejected = ref_chosen, ref_rejected
        if name != SFT:
            chosen, rejected = score_pairs(policy, pairs, f"{name} on test pairs")
            del policy  # not two models at a time
            reference = open_policy(sft(run).path, tokenizer(run), sized(run))
            ref_logps = score_rows(reference, ids, samples, "reference log-probs")
            if ranks.is_first():
                np.save(folder / LOGRATIOS, torch.stack([chosen - ref_chosen, rejected - ref_rejected]).numpy())
        ratios = (logps - ref_logps).tolist()
        rows = [
            {
                "prompt": prompt,
                **({"messages": asked[prompt][0]} if prompt in asked else {}),
                "completion": sample_text(tokenizer(run), prompts[prompt], sample),
                "oracle_reward": reward,
                "length": len(sample),
                "finished": sample[-1] == end,
                "log_ratio": ratio,
                **truth(run, prompt, sample),
            }
            for prompt, sample, reward, ratio in zip(prompts, samples, rewards, ratios, strict=True)
        ]
        write_jsonl(folder / "samples.jsonl", rows)
        return {
            "n": len(rows),
            "oracle_reward": float(np.mean(rewards)),
            "length": float(np.mean([row["length"] for row in rows])),
            "finished": float(np.mean([row["finished"] for row in rows])),
            "kl": float(np.mean(ratios)),
            "chosen_logratio": float((chosen - ref_chosen).mean()),
            "rejected_logratio": float((rejected - ref_rejected).mean()),
            "accuracy": float(((chosen - ref_chosen) > (rejected - ref_rejected)).float().mean()),
            "accuracies": accuracy(run, pairs, chosen - ref_chosen, rejected - ref_rejected),
            **({"utility": float(np.mean([row["utility"] for row in rows]))} if "utility" in rows[0] else {}),
            **told,
        }

    inputs = {
        "policy": trained,
        "step": model.name if model != trained.path else None,
        "reference": sft(run),
        "labels": labels(run),
        **judge_input(run, labels_count=True),
        "sampling": in_keys(config.sampling),
        "prompts": config.evaluation.prompts,
        "seed": run.seed("evaluate"),
    }
    return run.store.get("evaluate", name, inputs, make)


def pair_logratios(run: Run, name: str) -> dict[str, Any] | None:
    """A trained policy on each test pair, as `lm.workflow.record.Pairs` has it, nats to four decimals; None where an
    earlier version made the evaluation, which kept their means alone."""
    file = evaluation(run, name).path / LOGRATIOS
    if not file.is_file():
        return None
    pairs, (chosen, rejected) = labelled_pairs(run, "test"), torch.from_numpy(np.load(file)).double()
    of_prompt, _ = numbered(digests(texts(pairs, "prompt")))
    return {
        "digest": hashlib.sha256("\n".join(texts(pairs, "id")).encode()).hexdigest()[:12],
        "prompt": of_prompt.tolist(),
        "chosen_logratio": chosen.numpy().round(4).tolist(),
        "rejected_logratio": rejected.numpy().round(4).tolist(),
        "accuracy": ordered_right(pairs, chosen, rejected).tolist(),
    }


def trained_policy(run: Run, name: str) -> tuple[Artifact, Path]:
    """The artifact of a policy and the folder of its model."""
    if name == SFT:
        return sft(run), sft(run).path
    chosen = choose(run, name)
    return chosen.policy, chosen.model


def judged_samples(
    run: Run,
    policy: CompletionModel,
    prompts: Mapping[str, list[int]],
    name: str,
    asked: Asked,
    temperature: float | None = None,
) -> tuple[list[list[int]], list[float], dict[str, Any]]:
    """A completion of each prompt and its oracle reward, at another temperature than the configured where given; and
    what an oracle with another tokenizer adds to metrics, see `lm.stages.readings`.

    Args:
        run: the run.
        policy: what is sampled from.
        prompts: text -> token ids.
        name: the policy's.
        asked: the messages of those that were written from some.
        temperature: of the samples; None for the configured one.
    """
    config = sized(run)
    if temperature is not None:
        config = replace(config, sampling=replace(config.sampling, temperature=temperature))
    samples = sample_completions(
        policy,
        list(prompts.values()),
        tokenizer(run),
        config,
        seed=run.seed("evaluate"),  # one for all policies: where two agree, they draw the same
        what=f"{name} samples",
    )
    rewards, told = judge_samples(run, prompts, samples, asked)
    return samples, rewards.tolist(), told


# ---------------------------------------------------------------- validation


@dataclass(frozen=True)
class Chosen:
    """The policy that validation chose for a method."""

    method: Method
    policy: Artifact
    step: int
    model: Path
    """Folder of the model."""
    tried: list[dict[str, Any]]
    """setting, step, advantage over pi_ref on validation prompts with its interval, KL from it, share of finished
    samples; empty where there was no choice."""


@once
def choose(run: Run, name: str) -> Chosen:
    """The setting and the step of a method with the greatest oracle advantage on validation prompts.

    The first of equals. Where there is one policy only, nothing is sampled.
    """
    methods, trained = run.config.settings(name), policies(run, name)
    candidates = [
        (method, policy, step, model)
        for method, policy in zip(methods, trained, strict=True)
        for step, model in _snapshots(policy).items()
    ]
    if len(candidates) == 1:
        return Chosen(*candidates[0], tried=[])
    tried = [
        {"setting": asdict(method), "step": step, **validation(run, name, policy).metrics[str(step)]}
        for method, policy, step, _ in candidates
    ]
    best = max(range(len(tried)), key=lambda i: tried[i]["advantage"])
    return Chosen(*candidates[best], tried=tried)


def has_choice(config: Config, name: str) -> bool:
    """Whether validation chooses between a method's policies: of more settings than one, or of more steps."""
    return len(config.settings(name)) * config.snapshots > 1


def chooses(config: Config) -> bool:
    """Whether validation chooses for any method of a run."""
    return any(has_choice(config, name) for name in config.methods)


def _snapshots(policy: Artifact) -> dict[int, Path]:
    """The models of a policy's artifact by step, the last included."""
    earlier = {int(path.name.removeprefix("step-")): path for path in policy.path.glob("step-*")}
    return dict(sorted({**earlier, policy.metrics["steps"]: policy.path}.items()))


def validation(run: Run, name: str, trained: Artifact) -> Artifact:
    """Oracle advantage over pi_ref of a policy's snapshots on validation prompts, and their KL from it, by step; for
    "sft", its rewards. The KL, and the share of finished samples, are not in artifacts of earlier versions, whose keys
    are the same."""
    config = run.config.evaluation
    base = None if name == SFT else validation(run, SFT, sft(run))

    def make(folder: Path, _: Path) -> dict[str, Any]:
        pairs = labelled_pairs(run, "valid")
        prompts, asked = prompts_of(pairs, config.valid_prompts, run.seed("prompts"), "valid"), asked_of(pairs)

        def opened(model: Path) -> CompletionModel:
            return open_policy(model, tokenizer(run), sized(run))

        if base is None:
            return {"rewards": judged_samples(run, opened(trained.path), prompts, f"{name} validation", asked)[1]}
        metrics, reference, ids = {}, opened(sft(run).path), list(prompts.values())
        for step, model in _snapshots(trained).items():
            policy = opened(model)
            samples, rewards, _told = judged_samples(run, policy, prompts, f"{name} validation", asked)
            ratios = score_rows(policy, ids, samples, f"{name} log-probs") - score_rows(
                reference, ids, samples, "reference log-probs"
            )
            difference = np.array(rewards) - np.array(base.metrics["rewards"])
            interval = bootstrap_interval(difference, config.confidence, config.resamples, run.seed("bootstrap"))
            ended = np.mean([sample[-1] == tokenizer(run).eos_token_id for sample in samples])
            means = {"kl": float(ratios.mean()), "finished": float(ended)}
            metrics[str(step)] = {"advantage": float(difference.mean()), "ci": interval, **means}
        return metrics

    inputs = {
        "policy": trained,
        "labels": labels(run),
        **judge_input(run, labels_count=True),
        "sampling": in_keys(run.config.sampling),
        "prompts": config.valid_prompts,
        "interval": [config.confidence, config.resamples],
        "seed": run.seed("evaluate"),
    }
    return run.store.get("validate", name, inputs, make)


def prompts_of(pairs: Dataset, count: int | None, seed: int, split: str = "test") -> dict[str, list[int]]:
    """The prompts of a split's pairs with their token ids, or so many of them; ValueError where there are fewer."""
    prompts = dict(zip(pairs["prompt"][:], pairs["prompt_ids"][:], strict=True))
    if count is None:
        return prompts
    if count > len(prompts):
        option = "prompts" if split == "test" else "valid_prompts"
        raise ValueError(f"evaluation.{option} is {count}, but the {split} split has only {len(prompts)} prompts")
    kept = np.random.default_rng(seed).choice(len(prompts), count, replace=False)
    texts = list(prompts)
    return {texts[i]: prompts[texts[i]] for i in sorted(kept)}


def check_prompts(run: Run) -> None:
    """ValueError where more prompts are to be sampled from than a split has: known before anything is trained."""
    config = run.config
    counts = {"test": config.evaluation.prompts, "valid": config.evaluation.valid_prompts if chooses(config) else None}
    for split, count in counts.items():
        if count is not None:
            prompts_of(given_pairs(run, split), count, run.seed("prompts"), split)


def asked_of(pairs: Dataset) -> Asked:
    """The messages and tools that prompts were written from, by these; empty where the set is of text."""
    if STORED[0] not in pairs.column_names:
        return {}
    columns = zip(*(pairs[name][:] for name in ("prompt", STORED[0], "tools")), strict=True)
    return {
        prompt: (json.loads(messages), None if tools is None else json.loads(tools))
        for prompt, messages, tools in columns
        if messages is not None
    }


def truth(run: Run, prompt: str, sample: list[int]) -> dict[str, float]:
    """The embedded world's utility of a sample; nothing for other data, where the truth is not known."""
    if run.config.data.kind != "world":
        return {}
    post = world.post_of(prompt, run.config.data.prompt_template)
    return {"utility": world.utility(post, tokenizer(run).decode(sample, skip_special_tokens=True))}


def probe_history(run: Run, trained: Artifact) -> list[dict[str, Any]]:
    """What was logged of the policy on the probe pairs, by step: see `lm.training.policy.PolicyTrainer.evaluate`.

    Names lose their "eval_", and TRL's, which are the same numbers, are left out; member_shares is in the order of
    the ensemble, and absent for methods that distil none.
    """
    history = []
    for entry in trained.metrics["history"]:
        if "eval_chosen_logps" in entry:
            values = {key.removeprefix("eval_"): value for key, value in entry.items() if _ours(key)}
            shares = [values.pop(f"member_{k}") for k in range(len(members(run))) if f"member_{k}" in values]
            history.append({"step": entry["step"], **values, **({"member_shares": shares} if shares else {})})
    return history


def _ours(key: str) -> bool:
    return key.startswith("eval_") and "/" not in key
