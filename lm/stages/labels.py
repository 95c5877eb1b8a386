"""The oracle, and every pair with its label, or with the set's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from lm.base import ranks
from lm.base.store import Artifact
from lm.config import TrainingConfig
from lm.data import votes
from lm.data.rewards import ORACLE
from lm.data.tokens import mapped
from lm.logprobs.completions import CompletionModel
from lm.models.opening import open_reward_model
from lm.stages.data import data, given_pairs, of_split, opened, save
from lm.stages.heads import bradley_terry_model, head_rewards
from lm.stages.readings import check_fits, input_of, pair_rewards, sized_for
from lm.stages.run import Run, once
from lm.stages.trainings import inputs_of, length_classes, precision, start_input


def check_judge(run: Run) -> None:
    """ValueError, for stages that judge, where there is nobody to judge: before anything is computed."""
    if run.config.oracle_model is None and not run.config.oracle.is_given:
        raise ValueError(
            f"{TrainingConfig.ONE_LENGTH}; got None and None for oracle: policies are judged by an oracle, so give "
            "oracle_model, or say how long to train one"
        )


@once
def oracle(run: Run) -> Artifact:
    """The oracle reward model, trained on the training split's own labels."""
    check_judge(run)
    return bradley_terry_model(
        run,
        "oracle",
        "oracle",
        run.config.oracle,
        inputs_of(run, "oracle", run.config.oracle, data=data(run), **start_input(run, "oracle")),
        lambda: given_pairs(run, "train"),
        lambda: given_pairs(run, "valid"),
    )


def open_oracle(run: Run) -> CompletionModel:
    """The given oracle, or the trained one, ready to score."""
    model = open_reward_model(run.config.oracle_model or oracle(run).path, sized_for(run, "oracle"))
    check_fits(run, "oracle", model)
    return model


def oracle_input(run: Run) -> Any:
    """What the oracle counts as in an artifact's key."""
    if run.config.oracle_model is None:
        return oracle(run)
    content, read = run.content(run.config.oracle_model), input_of(run, "oracle")
    return {"model": content, **read} if read else content


def oracle_accuracy(run: Run) -> dict[str, Any] | None:
    """How often a trained oracle orders validation pairs as they were given; None for a given one."""
    return None if run.config.oracle_model is not None else oracle(run).metrics["accuracy"]


@once
def labels(run: Run) -> Artifact:
    """Every pair of every split with the oracle's labels, or with the set's own (`data.labels`).

    The set's own may be soft. The oracle learns from these; it gives none itself, but a pair keeps its weight.
    """
    name = run.config.data.labels

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
        pairs = opened(data(run).path / "preferences")
        metrics: dict[str, Any] = {}
        if name == "oracle":
            pairs, metrics = _relabelled(run, pairs, scratch / f"relabelled-{ranks.index()}.arrow")
        save(pairs, folder / "preferences")
        classes = length_classes(run, pairs)
        longer, shorter = (int((classes == side).sum()) for side in ("longer", "shorter"))
        return {**metrics, "longer_preferred": longer / max(longer + shorter, 1)}

    inputs = {"data": data(run), "length_ratio": run.config.bias.length_ratio}
    if name == "oracle":
        inputs |= {"oracle": oracle_input(run), "precision": precision(run)}
    return run.store.get("labels", name, inputs, make)


def labelled_pairs(run: Run, split: str) -> Dataset:
    """Preferences of a split as they are learnt from, and judged."""
    return of_split(labels(run).path / "preferences", split)


def _relabelled(run: Run, pairs: Dataset, path: Path) -> tuple[Dataset, dict[str, Any]]:
    """The pairs with the better one by the oracle as chosen, kept in the file `path`; ties are dropped and counted.

    ValueError where ties leave nothing of a split.
    """
    pairs = pairs.remove_columns([name for name in pairs.column_names if name == votes.PROBABILITY])
    if run.config.oracle_model is None and run.config.oracle.train == "head":
        first, second = head_rewards(run, oracle(run), pairs, "oracle")
        told = {name: value for name, value in oracle(run).metrics.items() if name == "reading"}
    else:
        first, second, told = pair_rewards(run, "oracle", open_oracle(run), pairs, "oracle rewards")
    count = Counter[str]()

    def rows() -> Iterator[dict[str, Any]]:
        for row, a, b in zip(pairs, first.tolist(), second.tolist(), strict=True):
            if a == b:
                count["ties"] += 1
                continue
            if b > a:
                count["flipped"] += 1
                for one in [name for name in row if name.startswith("chosen")]:
                    other = one.replace("chosen", "rejected")
                    row[one], row[other] = row[other], row[one]
            count[row["split"]] += 1
            yield {**row, **dict(zip(ORACLE, (max(a, b), min(a, b)), strict=True))}

    rewards = {name: datasets.Value("float64") for name in ORACLE}
    relabelled = mapped(rows(), {**pairs.features, **rewards}, path)
    for split in ("train", "valid", "test"):
        if not count[split]:
            raise ValueError(
                f"no pairs are left in the {split} split: the oracle rewards both completions alike in "
                f"{count['ties']} of {len(pairs)} pairs; look at oracle_model, or set data.labels to given"
            )
    return relabelled, {"agreement": 1 - count["flipped"] / len(relabelled), "ties_dropped": count["ties"], **told}
