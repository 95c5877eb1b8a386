"""D_rho, the length-biased training set, and the subsets of it that the ensemble's members learn from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from lm.base import progress, ranks
from lm.base.store import Artifact
from lm.data import confidence, votes
from lm.data.columns import column, numbers, sizes, tables
from lm.data.lengths import biased_subset, largest_feasible, length_report
from lm.data.rows import BATCH
from lm.data.votes import SIDES
from lm.objectives import MAIN, member_name
from lm.stages.data import data, opened, where
from lm.stages.labels import labelled_pairs, labels
from lm.stages.run import Run, once
from lm.stages.trainings import length_classes
from theory.records import write_json


@once
def bias(run: Run) -> Artifact:
    """D_rho and each member's subset of it, as row ids. Without subsets where no reward models are trained.

    A soft label counts for the likelier side. A tie prefers none, and so is in no subset of a given share.
    """
    config, rewards = run.config.bias, run.config.data.rewards

    def make(folder: Path, _: Path) -> dict[str, Any]:
        pairs = labelled_pairs(run, "train")
        ids, classes = column(pairs, "id").combine_chunks(), length_classes(run, pairs)
        seed = run.seed("bias")
        known = numbers(pairs, "confidence") if "confidence" in pairs.column_names else np.full(len(pairs), np.nan)
        rows, selection = confidence.subset(config.pairs, known, *(_each(pairs, f"{side}_ids") for side in SIDES))
        soft = votes.PROBABILITY in pairs.column_names
        ties = int((numbers(pairs, votes.PROBABILITY) == 0.5).sum()) if soft else 0
        if ties and ranks.is_first() and (config.rho is not None or rewards == "models"):
            progress.say(f"  {ties:,} ties are in no subset that is drawn for a share which prefers the longer")
        if config.rho is not None:
            rows = rows[biased_subset(classes[rows], config.rho, config.size, seed=seed, what="bias.size")]
        inside = classes[rows]
        fractions = config.member_fractions if rewards == "models" else []
        size = config.member_size or min((largest_feasible(inside, share) for share in fractions), default=0)
        of_members = {
            member_name(share): biased_subset(
                inside, share, size, seed=run.seed("bias", f"{share:g}"), what="bias.member_size"
            )
            for share in fractions
        }
        subsets = {MAIN: rows, **{name: rows[member] for name, member in of_members.items()}}
        write_json(folder / "rows.json", {name: ids.take(subset).to_pylist() for name, subset in subsets.items()})
        chosen, rejected = (sizes(pairs, f"{side}_ids") for side in SIDES)
        report = {name: length_report(classes, chosen, rejected, subset) for name, subset in subsets.items()}
        return {**report, **({"selection": selection} if selection else {})}

    inputs = {"labels": labels(run), "bias": config, "seed": run.seed("bias")}
    if rewards != "models":
        inputs["rewards"] = rewards
    if noise := run.config.data.reward_noise:
        inputs["reward_noise"] = noise
    return run.store.get("bias", "rows", inputs, make)


def _each(pairs: Dataset, name: str) -> Iterator[list[int]]:
    """Its token ids, row by row."""
    for table in progress.bar(f"reading {name}", tables(pairs, [name], BATCH), total=-(-len(pairs) // BATCH)):
        yield from table[name].to_pylist()


def subset(run: Run, name: str) -> Dataset:
    """The pairs of D_rho ("rho") or of a member's subset ("b0.2", ...), in the order of the labels."""
    ids = json.loads((bias(run).path / "rows.json").read_text())[name]
    rows = where(opened(labels(run).path / "preferences"), "id", ids)
    if len(rows) != len(ids):
        raise RuntimeError(f"subset {name}: {len(ids)} row ids, but {len(rows)} rows were found")
    return rows


def members(run: Run) -> list[str]:
    """Names of the ensemble's members, in the order of every length-K list."""
    if run.config.data.rewards == "given":
        return [f"given{k}" for k in range(data(run).metrics["members"])]
    if run.config.data.rewards == "oracle":
        return []
    return [member_name(share) for share in run.config.bias.member_fractions]
