"""The oracle, and every pair with its label, or with the set's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from scipy.special import expit

from lm.base import ranks
from lm.base.store import Artifact
from lm.config import TrainingConfig
from lm.data import votes, world
from lm.data.rewards import ORACLE
from lm.data.splits import draw_of
from lm.data.tokens import mapped
from lm.logprobs.completions import CompletionModel
from lm.logprobs.sampling import in_keys
from lm.models.opening import open_reward_model
from lm.stages.data import data, given_pairs, of_split, opened, save, tokenizer
from lm.stages.heads import bradley_terry_model, head_rewards
from lm.stages.readings import Asked, check_fits, input_of, pair_rewards, sample_rewards, sized_for
from lm.stages.run import Run, once
from lm.stages.sampled import prompts_in, sampled_pairs, together
from lm.stages.trainings import as_reported, inputs_of, length_classes, precision, sft, start_input


def check_judge(run: Run) -> None:
    """ValueError, for stages that judge, where there is nobody to judge: before anything is computed."""
    if run.config.trains_oracle and not run.config.oracle.is_given:
        raise ValueError(
            f"{TrainingConfig.ONE_LENGTH}; got None and None for oracle: policies are judged by an oracle, so give "
            "oracle_model, or say how long to train one"
        )


def exact_judge(run: Run) -> Callable[[str, str], float] | None:
    """The reward of a completion by its prompt, as text, where the judge is exact (`lm.config.JudgeConfig`); None where
    it is a reward model."""
    if not is_exact(run):
        return None
    taste, template = _taste(run), run.config.data.prompt_template
    return lambda prompt, completion: taste(world.post_of(prompt, template), completion)


def _taste(run: Run) -> world.Taste:
    """Of the exact judge."""
    judge, annotators = run.config.judge, run.config.data.world
    own = judge.length_preference
    return world.Taste(judge.utility, annotators.length_preference if own is None else own)


@once
def oracle(run: Run) -> Artifact:
    """The oracle reward model, trained on the training split's own labels. ValueError where the judge is exact."""
    check_judge(run)
    _check_is_model(run)
    return bradley_terry_model(
        run,
        "oracle",
        "oracle",
        run.config.oracle,
        inputs_of(run, "oracle", run.config.oracle, data=data(run), **start_input(run, "oracle")),
        lambda: given_pairs(run, "train"),
        lambda: given_pairs(run, "valid"),
    )


def _check_is_model(run: Run) -> None:
    if is_exact(run):
        raise ValueError("judge.kind is exact: there is no oracle model; leave judge.kind out to train one")


def open_oracle(run: Run) -> CompletionModel:
    """The given oracle, or the trained one, ready to score. ValueError where the judge is exact."""
    _check_is_model(run)
    model = open_reward_model(run.config.oracle_model or oracle(run).path, sized_for(run, "oracle"))
    check_fits(run, "oracle", model)
    return model


def oracle_input(run: Run) -> Any:
    """What the oracle counts as in an artifact's key."""
    if is_exact(run):
        taste = _taste(run)
        return {"exact": [taste.utility, taste.length_preference]}
    if run.config.oracle_model is None:
        return oracle(run)
    content, read = run.content(run.config.oracle_model), input_of(run, "oracle")
    return {"model": content, **read} if read else content


def oracle_held_out(run: Run) -> dict[str, Any] | None:
    """How a trained oracle does on validation pairs as given, by `figures.record.RewardModel`; None without one."""
    return as_reported(oracle(run).metrics) if run.config.trains_oracle else None


def is_exact(run: Run) -> bool:
    """Whether the judge is no model."""
    return run.config.judge.kind == "exact"


def judge_described(run: Run) -> dict[str, Any]:
    """As `figures.record.Judge` has it."""
    judge = run.config.judge
    taste = oracle_input(run)["exact"] if is_exact(run) else [None, None]
    known = dict(zip(("utility", "length_preference"), taste, strict=True))
    noise = judge.sharpness if run.config.data.labels == "oracle" else None
    return {"kind": judge.kind, **known, "sharpness": noise, "unfinished": judge.unfinished}


def judge_input(run: Run, *, labels_count: bool = False) -> dict[str, Any]:
    """What the judge of samples adds to an artifact's key.

    Args:
        run: the run.
        labels_count: the key counts the labels too: then the oracle is in it where they are its own.
    """
    known = labels_count and run.config.data.labels == "oracle"
    unfinished = run.config.judge.unfinished
    return {
        **({} if known else {"oracle": oracle_input(run)}),
        **({} if unfinished is None else {"unfinished": unfinished}),
    }


def judge_samples(
    run: Run, prompts: Mapping[str, list[int]], samples: Sequence[list[int]], asked: Asked
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The judge's rewards of a policy's samples, one a prompt, [N], float64, and what the reading adds to metrics: as
    of `lm.stages.readings.sample_rewards`. What an unfinished one counts, `judge.unfinished` says."""
    words, exact, told = tokenizer(run), exact_judge(run), dict[str, Any]()
    if exact is None:
        rewards, told = sample_rewards(run, open_oracle(run), prompts, samples, asked)
    else:
        texts = [words.decode(sample, skip_special_tokens=True) for sample in samples]
        rewards = torch.tensor([exact(*both) for both in zip(prompts, texts, strict=True)], dtype=torch.float64)
    if (fixed := run.config.judge.unfinished) is not None:
        unfinished = torch.tensor([sample[-1] != words.eos_token_id for sample in samples])
        rewards = torch.where(unfinished, torch.full_like(rewards, fixed), rewards)
    return rewards, told


def judge_pairs(
    run: Run, pairs: Dataset, *, are_the_sets: bool = True
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """The judge's rewards of the chosen and of the rejected completions, [N] each, float64, and what the reading adds
    to metrics. Of pairs that are not the set's own, a head on a frozen body has no states yet: the model reads them."""
    if (exact := exact_judge(run)) is not None:
        sides = (
            [exact(prompt, text) for prompt, text in zip(pairs["prompt"][:], pairs[side][:], strict=True)]
            for side in ("chosen", "rejected")
        )
        first, second = (torch.tensor(side, dtype=torch.float64) for side in sides)
        return first, second, {}
    if run.config.oracle_model is None and run.config.oracle.train == "head" and are_the_sets:
        first, second = head_rewards(run, oracle(run), pairs, "oracle")
        return first, second, {name: value for name, value in oracle(run).metrics.items() if name == "reading"}
    return pair_rewards(run, "oracle", open_oracle(run), pairs, "oracle rewards")


@once
def labels(run: Run) -> Artifact:
    """Every pair of every split with the oracle's labels, or with the set's own (`data.labels`).

    The set's own may be soft. The oracle learns from these; it gives none itself, but a pair keeps its weight.
    """
    name, sampled = run.config.data.labels, run.config.data.on_policy

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
        pairs = opened(data(run).path / "preferences")
        metrics: dict[str, Any] = {}
        if sampled.pairs is not None:
            pairs, metrics["on_policy"] = _with_sampled(run, pairs, scratch / f"sampled-{ranks.index()}.arrow")
        if name == "oracle":
            pairs, of_labels = _relabelled(run, pairs, scratch / f"relabelled-{ranks.index()}.arrow")
            metrics |= of_labels
        save(pairs, folder / "preferences")
        classes = length_classes(run, pairs)
        longer, shorter = (int((classes == side).sum()) for side in ("longer", "shorter"))
        return {**metrics, "longer_preferred": longer / max(longer + shorter, 1)}

    inputs = {"data": data(run), "length_ratio": run.config.bias.length_ratio}
    if name == "oracle":
        inputs |= {"oracle": oracle_input(run), "precision": precision(run)}
        if (sharpness := run.config.judge.sharpness) is not None:
            inputs["noise"] = [sharpness, run.seed("labels"), "by row"]
        if sampled.pairs is not None:
            weight = run.config.data.group_weight
            inputs |= {
                "on_policy": sampled,
                "policy": sft(run),
                "sampling": in_keys(run.config.sampling),
                "weight": weight,
            }
    return run.store.get("labels", name, inputs, make)


def labelled_pairs(run: Run, split: str) -> Dataset:
    """Preferences of a split as they are learnt from, and judged."""
    return of_split(labels(run).path / "preferences", split)


def _with_sampled(run: Run, pairs: Dataset, path: Path) -> tuple[Dataset, dict[str, int]]:
    """The pairs with those that pi_ref samples, beside the given ones of the training split or instead of them."""
    options = run.config.data.on_policy
    train = pairs.filter(lambda split: split == "train", input_columns="split", keep_in_memory=True)
    made, report = sampled_pairs(run, prompts_in(train), options.completions, ON_POLICY, path)
    if votes.WEIGHT not in pairs.column_names and set(made[votes.WEIGHT][:]) == {1.0}:
        made = made.remove_columns(votes.WEIGHT)
    given = pairs
    if options.pairs == "instead":
        given = pairs.filter(lambda split: split != "train", input_columns="split", keep_in_memory=True)
    return together(given, made), report


ON_POLICY = "on-policy"
"""Of the ids of pairs that pi_ref sampled."""


def _relabelled(run: Run, pairs: Dataset, path: Path) -> tuple[Dataset, dict[str, Any]]:
    """The pairs with the one that the oracle prefers as chosen, kept in the file `path`; ties are dropped and counted,
    but where labels are drawn (`lm.config.JudgeConfig.sharpness`) a coin decides them.

    ValueError where ties leave nothing of a split.
    """
    pairs = pairs.remove_columns([name for name in pairs.column_names if name == votes.PROBABILITY])
    first, second, told = judge_pairs(run, pairs)
    sharpness, count = run.config.judge.sharpness, Counter[str]()
    seed = run.seed("labels")
    preferred = None if sharpness is None else expit(sharpness * (first - second).numpy())

    def rows() -> Iterator[dict[str, Any]]:
        for i, (row, a, b) in enumerate(zip(pairs, first.tolist(), second.tolist(), strict=True)):
            turned, given = b > a, not row["id"].startswith(ON_POLICY)
            if preferred is not None and row["split"] != "test":
                turned = bool(draw_of(seed, row["id"]) >= preferred[i])
                count["drawn"] += 1
                count["against"] += turned != (b > a) and a != b
            elif a == b:
                count["ties"] += 1
                count["given ties"] += given
                continue
            count["given"] += given
            if turned:
                count["flipped"] += given
                a, b = b, a
                for one in [name for name in row if name.startswith("chosen")]:
                    other = one.replace("chosen", "rejected")
                    row[one], row[other] = row[other], row[one]
            count[row["split"]] += 1
            yield {**row, **dict(zip(ORACLE, (a, b), strict=True))}

    rewards = {name: datasets.Value("float64") for name in ORACLE}
    relabelled = mapped(rows(), {**pairs.features, **rewards}, path)
    for split in ("train", "valid", "test"):
        if not count[split]:
            raise ValueError(
                f"no pairs are left in the {split} split: the oracle rewards both completions alike in "
                f"{count['ties']} of {len(pairs)} pairs; look at oracle_model, or set data.labels to given"
            )
    if preferred is not None:
        told = {**told, "against_judge": count["against"] / count["drawn"]}
    agreement = 1 - count["flipped"] / count["given"] if count["given"] else None  # what pi_ref sampled had no label
    return relabelled, {"agreement": agreement, "ties_dropped": count["given ties"], **told}
