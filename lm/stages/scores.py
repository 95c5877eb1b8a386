"""What policies are trained on beside tokens: log-probs of pi_ref and its samples, and rewards, each model's apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset

from lm.base.store import Artifact
from lm.data import rewards, votes
from lm.data.messages import restored
from lm.data.scored import REF_PAIR, REF_SAMPLES, SAMPLE_IDS, SAMPLED, TOKENS
from lm.logprobs.sampling import sample_completions
from lm.logprobs.scoring import score_pairs, score_rows
from lm.models.opening import open_policy, open_reward_model
from lm.objectives import MAIN, Method
from lm.stages.data import opened, save, sized, tokenizer
from lm.stages.heads import head_rewards
from lm.stages.labels import labelled_pairs
from lm.stages.readings import pair_rewards, reader, sized_for, tokenizer_of
from lm.stages.rewards import own_oracle, planned, reward, reward_artifact, stored_rewards, teachers
from lm.stages.run import Run, once
from lm.stages.sampled import together
from lm.stages.subsets import bias, members, subset
from lm.stages.trainings import accuracy, sft
from lm.stages.unlabelled import PAIRS as UNLABELLED
from lm.stages.unlabelled import distils_unlabelled, rows_of, unlabelled

Sides = tuple[rewards.Floats, rewards.Floats]
PAIRS, PROBE = "pairs", "probe"
"""The training pairs, and the validation pairs that a policy is probed on. Beside them there may be UNLABELLED ones."""


@once
def scores(run: Run) -> Artifact:
    """The pairs of D_rho and the probe's with reference log-probs, and samples of pi_ref for each prompt.

    Its key counts all the reward models of the run, made or not, as it did when it held their rewards too: artifacts of
    that time are read as they are.
    """

    def make(folder: Path, _: Path) -> dict[str, Any]:
        probe = drawn(labelled_pairs(run, "valid"), run.config.probe.pairs, run.seed("probe"))
        of_training = subset(run, MAIN)
        scored, prompts = _by_reference(run, datasets.concatenate_datasets([of_training, probe]), run.seed("score"))
        save(scored.select(range(len(of_training))), folder / PAIRS)
        if len(probe):
            save(scored.select(range(len(of_training), len(scored))), folder / PROBE)
        names = [MAIN, *members(run)]
        return {"reward_models": names, "pairs": len(of_training), "probe": len(probe), "prompts": prompts}

    inputs = {
        "bias": bias(run),
        "policy": sft(run),
        "rewards": planned(run),
        "sampling": run.config.sampling,
        "probe": run.config.probe.pairs,
        "seed": run.seed("score"),
    }
    return run.store.get("score", PAIRS, inputs, make)


def _by_reference(run: Run, pairs: Dataset, seed: int) -> tuple[Dataset, int]:
    """The pairs' tokens and labels with log-probs of pi_ref, and its samples of each prompt; how many prompts."""
    policy = open_policy(sft(run).path, tokenizer(run), sized(run))
    ref_chosen, ref_rejected = score_pairs(policy, pairs, "reference log-probs")
    prompts = dict(zip(pairs["prompt"][:], pairs["prompt_ids"][:], strict=True))
    each = run.config.sampling.reference_samples
    repeated = [ids for ids in prompts.values() for _ in range(each)]
    samples = sample_completions(policy, repeated, tokenizer(run), sized(run), seed=seed, what="reference samples")
    ref_samples = score_rows(policy, repeated, samples, "samples' log-probs").tolist()
    of_prompt = {prompt: slice(i * each, (i + 1) * each) for i, prompt in enumerate(prompts)}
    rows = [of_prompt[prompt] for prompt in pairs["prompt"][:]]
    labels = [name for name in votes.COLUMNS if name in pairs.column_names]
    scored = pairs.select_columns(["id", *TOKENS, *labels])
    scored = scored.flatten_indices(keep_in_memory=True)  # as add_column would, into a file, see stages.data.where
    for column, values in {
        REF_PAIR[0]: ref_chosen.tolist(),
        REF_PAIR[1]: ref_rejected.tolist(),
        SAMPLE_IDS: [samples[i] for i in rows],
        REF_SAMPLES: [ref_samples[i] for i in rows],
    }.items():
        scored = scored.add_column(column, values)
    return scored, len(prompts)


@once
def unlabelled_scores(run: Run) -> Artifact:
    """The unlabelled pairs with reference log-probs and samples of pi_ref, as `scores` has those of D_rho."""

    def make(folder: Path, _: Path) -> dict[str, Any]:
        scored, prompts = _by_reference(run, rows_of(run), run.seed("score", UNLABELLED))
        save(scored, folder / UNLABELLED)
        return {"pairs": len(scored), "prompts": prompts}

    inputs = {"pairs": unlabelled(run), "policy": sft(run), "sampling": run.config.sampling}
    return run.store.get("score", UNLABELLED, inputs | {"seed": run.seed("score", UNLABELLED)}, make)


@once
def unlabelled_rewards(run: Run, name: str) -> Artifact:
    """The rewards of the unlabelled pairs by one reward model."""

    def make(folder: Path, _: Path) -> dict[str, Any]:
        model, pairs = open_reward_model(reward(run, name).path, sized_for(run, "reward")), rows_of(run)
        *both, told = pair_rewards(run, "reward", model, pairs, f"rewards of {name}, unlabelled")
        sides = dict(zip(rewards.ONE, (side.tolist() for side in both), strict=True))
        save(Dataset.from_dict({"id": pairs["id"][:], **sides}), folder / UNLABELLED)
        return {"pairs": len(pairs), **told}

    inputs = {"model": reward(run, name), "pairs": unlabelled(run)}
    return run.store.get("score", f"{name}-{UNLABELLED}", inputs, make)


@once
def model_scores(run: Run, name: str) -> Artifact:
    """The rewards of the scored pairs by one reward model."""

    def make(folder: Path, _: Path) -> dict[str, Any]:
        if run.config.reward.train == "head":
            return _scored(run, folder, lambda pairs: (*head_rewards(run, reward(run, name), pairs), {}))
        model = open_reward_model(reward(run, name).path, sized_for(run, "reward"))
        return _scored(run, folder, lambda pairs: pair_rewards(run, "reward", model, pairs, f"rewards of {name}"))

    return run.store.get("score", name, {"model": reward(run, name), "pairs": scores(run)}, make)


def test_accuracy(run: Run, name: str) -> dict[str, Any]:
    """How often a reward model, or what stands in its place, orders test pairs as they are labelled, as
    `lm.stages.trainings.accuracy` has it: on the pairs that an evaluation has the policies' accuracy of."""
    pairs, what = labelled_pairs(run, "test"), f"{name} on test pairs"
    if name in run.config.methods:
        path, words, limits = reward_artifact(run, name).path, tokenizer_of(run, "reward"), sized_for(run, "reward")
        model = open_policy(path, words, limits, reward_head=True)
        chosen, rejected, _ = pair_rewards(run, "reward", model, pairs, what, rewards=True)
    elif run.config.data.rewards != "models":
        chosen, rejected = (torch.from_numpy(side) for side in stored_rewards(run, pairs, name))
    elif run.config.reward.train == "head":
        chosen, rejected = head_rewards(run, reward(run, name), pairs)
    else:
        model = open_reward_model(reward(run, name).path, sized_for(run, "reward"))
        chosen, rejected, _ = pair_rewards(run, "reward", model, pairs, what)
    return accuracy(run, pairs, chosen, rejected)


@once
def own_scores(run: Run, name: str, method: Method) -> Artifact:
    """The rewards of D_rho's pairs by a method's own oracle."""

    def make(folder: Path, _: Path) -> dict[str, Any]:
        pairs = subset(run, MAIN)
        words, limits = tokenizer_of(run, "reward"), sized_for(run, "reward")
        model = open_policy(own_oracle(run, name, method).path, words, limits, reward_head=True)
        *both, told = pair_rewards(run, "reward", model, pairs, f"rewards of {name}'s oracle", rewards=True)
        sides = dict(zip(rewards.ONE, (side.tolist() for side in both), strict=True))
        save(Dataset.from_dict({"id": pairs["id"][:], **sides}), folder / PAIRS)
        return {"pairs": len(pairs), **told}

    return run.store.get("score", name, {"oracle": own_oracle(run, name, method), "bias": bias(run)}, make)


def everything(run: Run) -> None:
    """All that the policies of the run are trained on."""
    scores(run)
    for name in run.config.methods:
        for method in run.config.settings(name):
            if run.config.data.rewards == "models":
                for teacher in teachers(run, method):
                    margin(run, teacher)
                    if distils_unlabelled(run, method):
                        margin(run, teacher, UNLABELLED)
            if method.own_oracle is not None:
                own_scores(run, name, method)


def _scored(run: Run, folder: Path, score: Any) -> dict[str, Any]:
    """Writes the rewards of the parts that `scores` has; returns how many rows there are of each."""
    counts: dict[str, Any] = {}
    for part in _parts(run):
        pairs = opened(scores(run).path / part)
        *both, told = score(_with_texts(run, pairs, part))
        sides = dict(zip(rewards.ONE, (side.tolist() for side in both), strict=True))
        save(Dataset.from_dict({"id": pairs["id"][:], **sides}), folder / part)
        counts |= {part: len(pairs), **{f"{part}_{name}": value for name, value in told.items()}}
    return counts


def _with_texts(run: Run, pairs: Dataset, part: str) -> Dataset:
    """The scored pairs with the texts that models with another tokenizer read; as they are where there are none."""
    if reader(run, "reward") is None:
        return pairs
    texts = subset(run, MAIN) if part == PAIRS else labelled_pairs(run, "valid")
    place = {row: i for i, row in enumerate(texts["id"][:])}
    return texts.select([place[row] for row in pairs["id"][:]])


def _parts(run: Run) -> list[str]:
    return [PAIRS, *([PROBE] if scores(run).metrics["probe"] else [])]


# ---------------------------------------------------------------- pairs as policies are trained on them


def scored_pairs(run: Run, method: Method, name: str, part: str = PAIRS) -> Dataset:
    """Pairs as `lm.training.batches.pair_collator` reads them, with the reward margins that the method needs.

    Args:
        run: the run.
        method: in one of its settings.
        name: the method's.
        part: PAIRS, PROBE, or UNLABELLED.

    Raises:
        ValueError: a score is missing, or not finite; it names the row.
    """
    pairs = opened(_folder(run, part))
    ids = pairs["id"][:]
    for column in (*REF_PAIR, REF_SAMPLES):
        if column not in pairs.column_names:
            raise ValueError(f"scored pairs lack {column}; there are {', '.join(pairs.column_names)}")
        rewards.checked(pairs[column][:], column, ids)
    one = None if (teacher := method.teacher) is None else margin(run, teacher, part)
    if method.own_oracle is not None and part == PAIRS:
        one = _margin(_sides(opened(own_scores(run, name, method).path / PAIRS), ids), ids)
    ensemble = [margin(run, each, part) for each in members(run)] if "members" in method.needs else []
    pairs = pairs.remove_columns([column for column in pairs.column_names if column in rewards.EVERY])
    if one is not None:
        pairs = pairs.add_column(rewards.MARGIN, one.tolist())
    if ensemble:
        pairs = pairs.add_column(rewards.MEMBER_MARGINS, np.stack(ensemble, axis=1).tolist())
    return pairs


def margin(run: Run, name: str, part: str = PAIRS) -> rewards.Floats:
    """Reward margins of the scored pairs by a reward model, or by what stands in its place, [N].

    ValueError, with the row, where one is missing or not finite.
    """
    return _margin(both_sides(run, name, part), opened(_folder(run, part))["id"][:])


def _folder(run: Run, part: str) -> Path:
    return (unlabelled_scores(run) if part == UNLABELLED else scores(run)).path / part


def learnt_pairs(run: Run, method: Method, name: str) -> Dataset:
    """What a policy is trained on: `scored_pairs` of D_rho and, for a method that learns from them, the unlabelled."""
    labelled = scored_pairs(run, method, name)
    if not distils_unlabelled(run, method):
        return labelled
    both = labelled, scored_pairs(run, method, name, UNLABELLED)
    return together(*(rows.remove_columns([c for c in rows.column_names if c == votes.PROBABILITY]) for rows in both))


def both_sides(run: Run, name: str, part: str = PAIRS) -> Sides:
    """Rewards of the chosen and of the rejected completions of the scored pairs, likewise, [N] each."""
    if part == UNLABELLED:
        ids = opened(_folder(run, part))["id"][:]
        if run.config.data.rewards == "models":
            return _sides(opened(unlabelled_rewards(run, name).path / part), ids)
        rows = rows_of(run)
        return _in_order(rows["id"][:], stored_rewards(run, rows, name), ids)
    pairs = opened(scores(run).path / part)
    if (older := rewards.stored(pairs)) is not None:
        k = scores(run).metrics["reward_models"].index(name)
        chosen, rejected = (one if k == 0 else listed[:, k - 1] for one, listed in zip(*older, strict=True))
        return chosen, rejected
    if run.config.data.rewards == "models":
        return _sides(opened(model_scores(run, name).path / part), pairs["id"][:])
    rows = subset(run, MAIN) if part == PAIRS else labelled_pairs(run, "valid")
    return _in_order(rows["id"][:], stored_rewards(run, rows, name), pairs["id"][:])


def _sides(scored: Dataset, ids: list[str]) -> Sides:
    """The one reward of each side of these rows, from an artifact that has it."""
    found = rewards.stored(scored)
    assert found is not None, f"no rewards among {scored.column_names}"
    return _in_order(scored["id"][:], (found[0][0], found[0][1]), ids)


def _in_order(have: list[str], sides: Sides, ids: list[str]) -> Sides:
    """ValueError where a row has no reward."""
    place = {row: i for i, row in enumerate(have)}
    if lacking := [row for row in ids if row not in place]:
        raise ValueError(f"row {lacking[0]} has no reward; every pair must have been scored")
    at = [place[row] for row in ids]
    return sides[0][at], sides[1][at]


def _margin(sides: Sides, ids: list[str]) -> rewards.Floats:
    chosen, rejected = (
        rewards.checked(side.tolist(), name, ids) for side, name in zip(sides, rewards.ONE, strict=True)
    )
    return chosen - rejected


def export_rows(run: Run, *, ids: bool = False, samples: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of D_rho for other trainers, in the order of the scores, with the columns of `lm.data.scored`: texts, or
    the messages that they were written from, labels, the rewards that the run's methods distil, and log-probs of
    pi_ref. Makes what is missing of the run up to these.

    Args:
        run: the run.
        ids: token ids as well, which messages have in any case.
        samples: token ids, and pi_ref's samples with their log-probs.
    """
    scored, texts = opened(scores(run).path / PAIRS), subset(run, MAIN)
    if texts["id"][:] != scored["id"][:]:
        raise RuntimeError("the scores are of other rows than D_rho has")
    methods = [run.config.method(name) for name in run.config.methods]
    ones = sorted({teacher for method in methods if (teacher := method.teacher) is not None})
    if len(ones) > 1:
        raise ValueError(f"methods distil the rewards of {' and '.join(ones)}, and a file has one: name fewer methods")
    one = both_sides(run, ones[0]) if ones else None
    ensemble = any("members" in method.needs for method in methods)
    listed = [both_sides(run, name) for name in members(run)] if ensemble else []

    def row_of(i: int, text: dict[str, Any], score: dict[str, Any]) -> dict[str, Any]:
        row = {"id": text["id"], **restored(text), "split": text["split"]}
        row |= {name: text[name] for name in votes.COLUMNS if name in text}
        # The log-probs are of these tokens, however another template writes messages.
        if ids or samples or isinstance(row["prompt"], list):
            row |= {name: text[name] for name in TOKENS}
        if one is not None:
            own = [float(side[i]) for side in one]
            row |= {**dict(zip(rewards.ONE, own, strict=True)), rewards.MARGIN: own[0] - own[1]}
        if listed:
            sides = [[float(member[side][i]) for member in listed] for side in (0, 1)]
            row |= dict(zip(rewards.MEMBERS, sides, strict=True))
        row |= {name: score[name] for name in REF_PAIR}
        if samples:
            row |= {name: score[name] for name in SAMPLED if name in score}
        return row

    return (row_of(i, text, score) for i, (text, score) in enumerate(zip(texts, scored, strict=True)))


def drawn(dataset: Dataset, size: int, seed: int) -> Dataset:
    """So many rows in their order, or all where they are fewer."""
    size = min(size, len(dataset))
    return dataset.select(sorted(np.random.default_rng(seed).choice(len(dataset), size, replace=False)))
