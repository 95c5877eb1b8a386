"""What policies are trained on beside tokens: log-probs of pi_ref and its samples, and rewards, each model's apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from datasets import Dataset, List, Value

from lm.base import ranks
from lm.base.store import Artifact
from lm.data import rewards, votes
from lm.data.columns import Rows, column, digests, kept_arrays, listed, numbered, places_of, tables, texts, written
from lm.data.messages import restored
from lm.data.scored import REF_PAIR, REF_SAMPLES, SAMPLE_IDS, SAMPLED, TOKENS
from lm.logprobs.completions import CompletionModel
from lm.logprobs.sampling import in_keys, sample_completions
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
from lm.stages.trainings import as_reported, held_out_metrics, length_coefficient, sft
from lm.stages.unlabelled import PAIRS as UNLABELLED
from lm.stages.unlabelled import distils_unlabelled, rows_of, unlabelled

Sides = tuple[rewards.Floats, rewards.Floats]
SAMPLES = 65_536
"""Of pi_ref, that are drawn between two savings."""
PAIRS, PROBE = "pairs", "probe"
"""The training pairs, and the validation pairs that a policy is probed on. Beside them there may be UNLABELLED ones."""


@once
def scores(run: Run) -> Artifact:
    """The pairs of D_rho and the probe's with reference log-probs, and samples of pi_ref for each prompt.

    Its key counts all the reward models of the run, made or not, as it did when it held their rewards too: artifacts of
    that time are read as they are.
    """

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
        probe = drawn(labelled_pairs(run, "valid"), run.config.probe.pairs, run.seed("probe"))
        of_training = subset(run, MAIN)
        pairs = datasets.concatenate_datasets([of_training, probe])
        parts = {PAIRS: range(len(of_training)), PROBE: range(len(of_training), len(pairs))}
        prompts = _by_reference(run, pairs, run.seed("score"), parts, folder, scratch)
        names = [MAIN, *members(run)]
        return {"reward_models": names, "pairs": len(of_training), "probe": len(probe), "prompts": prompts}

    inputs = {
        "bias": bias(run),
        "policy": sft(run),
        "rewards": planned(run),
        "sampling": in_keys(run.config.sampling),
        "probe": run.config.probe.pairs,
        "seed": run.seed("score"),
    }
    return run.store.get("score", PAIRS, inputs, make)


def _by_reference(run: Run, pairs: Dataset, seed: int, parts: Mapping[str, range], folder: Path, scratch: Path) -> int:
    """Writes the pairs' tokens and labels with log-probs of pi_ref, and its samples of each prompt; how many prompts.

    Args:
        run: the run.
        pairs: N.
        seed: of the samples.
        parts: which of the pairs go where, below the folder; of none, only PAIRS.
        folder: of the artifact.
        scratch: what is finished is kept there until all is.
    """
    policy = open_policy(sft(run).path, tokenizer(run), sized(run))
    reference = score_pairs(policy, pairs, "reference log-probs", kept=scratch)
    of_prompt, first = numbered(digests(texts(pairs, "prompt")))
    samples, ref_samples = _samples(run, policy, pairs.select(first), seed, scratch)
    each = run.config.sampling.reference_samples
    labels = [name for name in votes.COLUMNS if name in pairs.column_names]
    names = ["id", *TOKENS, *labels]

    def scored(rows: range) -> Iterator[pa.Table]:
        """With what was found of these pairs."""
        at = rows.start
        for table in tables(pairs.select(rows), names):
            here = slice(at, at + len(table))
            at += len(table)
            own = (of_prompt[here, None] * each + np.arange(each)).reshape(-1)
            ends = pa.array(np.arange(0, len(own) + 1, each), pa.int32())
            found: dict[str, Any] = {
                **{name: pa.array(side[here].numpy()) for name, side in zip(REF_PAIR, reference, strict=True)},
                SAMPLE_IDS: pa.ListArray.from_arrays(ends, samples.taken(own).arrow()),
                REF_SAMPLES: listed(ref_samples[of_prompt[here]]),
            }
            for name, values in found.items():
                table = table.append_column(name, values)
            yield table

    more = {**dict.fromkeys(REF_PAIR, Value("float64")), SAMPLE_IDS: List(List(Value("int32")))}
    features = {**{name: pairs.features[name] for name in names}, **more, REF_SAMPLES: List(Value("float64"))}
    for part, rows in parts.items():
        if rows or part == PAIRS:
            save(written(scored(rows), features, scratch / f"{part}-{ranks.index()}.arrow"), folder / part)
    return len(first)


def _samples(
    run: Run, policy: CompletionModel, prompts: Dataset, seed: int, scratch: Path
) -> tuple[Rows, rewards.Floats]:
    """What pi_ref draws of each of M prompts, S samples one after the other, and their log-probs, [M, S]. Of SAMPLES at
    a time, which are kept in the folder `scratch`: a run that broke goes on with the others."""
    each = run.config.sampling.reference_samples
    parts, logps = [], [np.empty((0, each))]
    step = max(1, SAMPLES // each)
    for start in range(0, len(prompts), step):
        ids = Rows.of(prompts.select(range(start, min(start + step, len(prompts)))), "prompt_ids")
        of = "" if len(ids) == len(prompts) else f", prompts from {start:,} of {len(prompts):,}"
        repeated = [one for one in ids for _ in range(each)]
        found = kept_arrays(
            scratch / f"samples-{start:09}.npz",
            {"counts": (len(repeated),)},
            # vLLM takes a seed for each prompt, counted from here: the same, however cut.
            partial(_drawn, run, policy, repeated, seed + start * each, of),
        )
        parts.append(Rows(found["flat"], found["counts"]))
        logps.append(found["logps"].reshape(-1, each))
    return Rows.joined(parts), np.concatenate(logps)


def _drawn(run: Run, policy: CompletionModel, prompts: list[Any], seed: int, of: str) -> dict[str, Any]:
    """A completion of each prompt, as `Rows` has them, and their log-probs; `of` says which prompts they are."""
    drawn = sample_completions(policy, prompts, tokenizer(run), sized(run), seed=seed, what=f"reference samples{of}")
    scores = score_rows(policy, prompts, drawn, f"samples' log-probs{of}").numpy()
    rows = Rows.from_lists(drawn)
    return {"flat": rows.flat, "counts": rows.counts, "logps": scores}


@once
def unlabelled_scores(run: Run) -> Artifact:
    """The unlabelled pairs with reference log-probs and samples of pi_ref, as `scores` has those of D_rho."""

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
        pairs = rows_of(run)
        parts = {UNLABELLED: range(len(pairs))}
        prompts = _by_reference(run, pairs, run.seed("score", UNLABELLED), parts, folder, scratch)
        return {"pairs": len(pairs), "prompts": prompts}

    inputs = {"pairs": unlabelled(run), "policy": sft(run), "sampling": in_keys(run.config.sampling)}
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


def on_test_pairs(run: Run, name: str) -> dict[str, Any]:
    """Of a reward model, or of what stands in its place, on the pairs that an evaluation has the policies' accuracy of:
    `test_accuracy`, by `figures.record.RewardModel`, and `length_coefficient`, as `lm.data.lengths.slope_on_length`
    has it."""
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
    return {
        "test_accuracy": as_reported(held_out_metrics(run, pairs, chosen, rejected)),
        "length_coefficient": length_coefficient(pairs, chosen, rejected),
    }


@once
def own_scores(run: Run, name: str, method: Method) -> Artifact:
    """The rewards of D_rho's pairs by a method's own oracle."""

    def make(folder: Path, _: Path) -> dict[str, Any]:
        pairs = subset(run, MAIN)
        words, limits = tokenizer_of(run, "reward"), sized_for(run, "reward")
        model = open_policy(own_oracle(run, name, method).path, words, limits, reward_head=True)
        *both, told = pair_rewards(run, "reward", model, pairs, f"rewards of {name}'s oracle", rewards=True)
        save(_rewarded(pairs, both), folder / PAIRS)
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
        save(_rewarded(pairs, both), folder / part)
        counts |= {part: len(pairs), **{f"{part}_{name}": value for name, value in told.items()}}
    return counts


def _rewarded(pairs: Dataset, both: Sequence[torch.Tensor]) -> Dataset:
    """The ids of pairs with the rewards of both sides."""
    sides = {name: pa.array(side.numpy()) for name, side in zip(rewards.ONE, both, strict=True)}
    return Dataset(pa.table({"id": column(pairs, "id"), **sides}))


def _with_texts(run: Run, pairs: Dataset, part: str) -> Dataset:
    """The scored pairs with the texts that models with another tokenizer read; as they are where there are none."""
    if reader(run, "reward") is None:
        return pairs
    texts = subset(run, MAIN) if part == PAIRS else labelled_pairs(run, "valid")
    return texts.select(places_of(column(pairs, "id"), column(texts, "id")))


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
    ids = column(pairs, "id")
    for needed in (*REF_PAIR, REF_SAMPLES):
        if needed not in pairs.column_names:
            raise ValueError(f"scored pairs lack {needed}; there are {', '.join(pairs.column_names)}")
        rewards.checked_column(pairs, needed)
    one = None if (teacher := method.teacher) is None else margin(run, teacher, part)
    if method.own_oracle is not None and part == PAIRS:
        one = _margin(_sides(opened(own_scores(run, name, method).path / PAIRS), ids), ids)
    ensemble = [margin(run, each, part) for each in members(run)] if "members" in method.needs else []
    pairs = pairs.remove_columns([name for name in pairs.column_names if name in rewards.EVERY])
    if one is not None:
        pairs = pairs.add_column(rewards.MARGIN, pa.array(one))
    if ensemble:
        pairs = pairs.add_column(rewards.MEMBER_MARGINS, listed(np.stack(ensemble, axis=1)))
    return pairs


def margin(run: Run, name: str, part: str = PAIRS) -> rewards.Floats:
    """Reward margins of the scored pairs by a reward model, or by what stands in its place, [N].

    ValueError, with the row, where one is missing or not finite.
    """
    return _margin(both_sides(run, name, part), column(opened(_folder(run, part)), "id"))


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
        ids = column(opened(_folder(run, part)), "id")
        if run.config.data.rewards == "models":
            return _sides(opened(unlabelled_rewards(run, name).path / part), ids)
        rows = rows_of(run)
        return _in_order(column(rows, "id"), stored_rewards(run, rows, name), ids)
    pairs = opened(scores(run).path / part)
    if (older := rewards.stored(pairs)) is not None:
        k = scores(run).metrics["reward_models"].index(name)
        chosen, rejected = (one if k == 0 else listed[:, k - 1] for one, listed in zip(*older, strict=True))
        return chosen, rejected
    if run.config.data.rewards == "models":
        return _sides(opened(model_scores(run, name).path / part), column(pairs, "id"))
    rows = subset(run, MAIN) if part == PAIRS else labelled_pairs(run, "valid")
    return _in_order(column(rows, "id"), stored_rewards(run, rows, name), column(pairs, "id"))


def _sides(scored: Dataset, ids: pa.ChunkedArray) -> Sides:
    """The one reward of each side of these rows, from an artifact that has it."""
    found = rewards.stored(scored)
    assert found is not None, f"no rewards among {scored.column_names}"
    return _in_order(column(scored, "id"), (found[0][0], found[0][1]), ids)


def _in_order(have: pa.ChunkedArray, sides: Sides, ids: pa.ChunkedArray) -> Sides:
    """ValueError where a row has no reward."""
    at = places_of(ids, have)
    if len(lacking := np.flatnonzero(at < 0)):
        raise ValueError(f"row {ids[int(lacking[0])].as_py()} has no reward; every pair must have been scored")
    return sides[0][at], sides[1][at]


def _margin(sides: Sides, ids: pa.ChunkedArray) -> rewards.Floats:
    for side, name in zip(sides, rewards.ONE, strict=True):
        if not np.isfinite(side).all():
            rewards.checked(side.tolist(), name, ids.to_pylist())
    return sides[0] - sides[1]


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
    if not column(texts, "id").equals(column(scored, "id")):
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
