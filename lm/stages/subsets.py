"""D_rho, the length-biased training set, and the subsets of it that the ensemble's members learn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from lm.base import progress, ranks
from lm.base.store import Artifact
from lm.data import confidence, votes
from lm.data.lengths import biased_subset, largest_feasible, length_report
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
        ids, classes = pairs["id"][:], length_classes(run, pairs)
        seed = run.seed("bias")
        rows, selection = confidence.subset(
            config.pairs,
            pairs["confidence"][:] if "confidence" in pairs.column_names else [None] * len(ids),
            pairs["chosen_ids"][:],
            pairs["rejected_ids"][:],
        )
        ties = pairs[votes.PROBABILITY][:].count(0.5) if votes.PROBABILITY in pairs.column_names else 0
        if ties and ranks.is_first() and (config.rho is not None or rewards == "models"):
            progress.say(f"  {ties:,} ties are in no subset that is drawn for a share which prefers the longer")
        if config.rho is not None:
            candidates = [classes[i] for i in rows]
            drawn = biased_subset(candidates, config.rho, config.size, seed=seed, what="bias.size")
            rows = [rows[i] for i in drawn]
        inside = [classes[i] for i in rows]
        fractions = config.member_fractions if rewards == "models" else []
        size = config.member_size or min((largest_feasible(inside, share) for share in fractions), default=0)
        of_members = {
            member_name(share): biased_subset(
                inside, share, size, seed=run.seed("bias", f"{share:g}"), what="bias.member_size"
            )
            for share in fractions
        }
        subsets = {MAIN: rows, **{name: [rows[i] for i in member] for name, member in of_members.items()}}
        write_json(folder / "rows.json", {name: [ids[i] for i in subset] for name, subset in subsets.items()})
        chosen, rejected = ([len(row) for row in pairs[f"{side}_ids"][:]] for side in ("chosen", "rejected"))
        report = {name: length_report(classes, chosen, rejected, subset) for name, subset in subsets.items()}
        return {**report, **({"selection": selection} if selection else {})}

    inputs = {"labels": labels(run), "bias": config, "seed": run.seed("bias")}
    if rewards != "models":
        inputs["rewards"] = rewards
    if noise := run.config.data.reward_noise:
        inputs["reward_noise"] = noise
    return run.store.get("bias", "rows", inputs, make)


def subset(run: Run, name: str) -> Dataset:
    """The pairs of D_rho ("rho") or of a member's subset ("b0.2", ...), in the order of the labels."""
    ids = set(json.loads((bias(run).path / "rows.json").read_text())[name])
    rows = where(opened(labels(run).path / "preferences"), "id", lambda row: row in ids)
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
