"""The first stage: data, tokenised, with the tokenizer; and how the stages keep datasets on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lm.base import progress
from lm.base.store import Artifact
from lm.data import rewards, world
from lm.data.control_tokens import Names, unmarked
from lm.data.rows import Tally, left_out
from lm.data.templates import chat_renderer
from lm.data.tokens import FORM, KEYS, load, standing_twice, tokenise, twice_in_words
from lm.models.loading import END, PAD, SCRATCH, content_of, load_tokenizer, same_tokenizer
from lm.stages.run import Run, once

SETS = ("preferences", "references")


@once
def data(run: Run) -> Artifact:
    """Tokenised preferences and reference completions, with the tokenizer.

    Raises ValueError where a method that was asked for needs an ensemble, and the rewards are none.
    """
    config = run.config.data
    inputs = {
        "data": replace(config, rewards="models") if config.rewards == "oracle" else config,  # alike until then
        "content": [content_of(path) for path in (config.path, config.sft_path)],
        "model": content_of(run.config.model),
        "seed": run.config.seed,
        "form": FORM,
    }

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
        source, own = None, None
        if config.kind == "world":
            source = folder / "source"
            source.mkdir()
            world.generate(config.world, run.config.seed, source)
        if run.config.model not in SCRATCH:
            own = load_tokenizer(run.config.model, (), run.config.trust_remote_code)
        render = chat_renderer(own, run.config.model)

        def control() -> Names:
            how = config.control_tokens
            return Names((END, PAD), how, end=END) if own is None else Names.by(own, how)

        loaded = load(config, run.config.seed, scratch, world=source, render=render, control=control)
        texts = (
            unmarked(row[column])
            for rows in (loaded.references, loaded.preferences)
            for row in rows
            if row["split"] == "train"
            for column in ("prompt", "completion", "chosen", "rejected")
            if column in row
        )
        made = load_tokenizer(run.config.model, texts, run.config.trust_remote_code) if own is None else own
        made.save_pretrained(folder / "tokenizer")
        report: dict[str, Any] = {}
        over = {name: Tally() for name in SETS}
        sets = {
            name: tokenise(rows, made, config, scratch / f"{name}-ids.arrow", over[name])[0]
            for name, rows in (("preferences", loaded.preferences), ("references", loaded.references))
        }
        twice = standing_twice(sets["preferences"], sets["references"])
        for name, dataset in sets.items():
            save(dataset.remove_columns(list(KEYS)), folder / name)
            report[name] = {
                "kept": dict(Counter(dataset["split"])),
                "dropped": {**loaded.dropped[name], **over[name]},
                "first": {**loaded.first[name], **over[name].first},
                "notes": [*loaded.notes[name], *(twice_in_words(twice) if name == "preferences" else [])],
                "control_tokens": loaded.control.get(name),
                "own_splits": loaded.own_splits.get(name),
            }
            for line in lines(report[name]):
                progress.say(f"{name}: {line}")
            if "confidence" in dataset.column_names:
                report[name]["without_confidence"] = dataset["confidence"][:].count(None)
            if config.rewards == "given" and name == "preferences":
                report["members"] = len(dataset[0][rewards.MEMBERS[0]])
        report["crossing"] = twice
        report["vocabulary"] = len(made)
        return report

    artifact = run.store.get("data", config.kind, inputs, make, alone=True)
    _checked_tokenizer(run, artifact)  # before anything reads the ids, and not when it is first decoded
    ensembles = [name for name in run.config.methods if "members" in run.config.method(name).needs]
    if config.rewards == "given" and artifact.metrics["members"] < 2 and ensembles:
        raise ValueError(
            f"methods {', '.join(ensembles)} need an ensemble, two or more entries in {rewards.MEMBERS[0]} and "
            f"{rewards.MEMBERS[1]}; {config.path} has one reward a completion, so leave these methods out"
        )
    if config.rewards == "oracle" and ensembles:
        raise ValueError(
            f"methods {', '.join(ensembles)} need an ensemble, but with data.rewards oracle there is one reward a "
            "completion, so leave these methods out"
        )
    return artifact


def lines(report: Mapping[str, Any]) -> list[str]:
    """What is said of a set by the stage's metrics: how it was read, and what was left out; earlier versions' too."""
    return [*left_out(report["dropped"], report.get("first", {})), *report.get("notes", ())]


@once
def tokenizer(run: Run) -> PreTrainedTokenizerBase:
    """The tokenizer of the policy, and so of every model of the run."""
    return _checked_tokenizer(run, data(run))


def _checked_tokenizer(run: Run, prepared: Artifact) -> PreTrainedTokenizerBase:
    """ValueError where a given oracle would read the token ids by another tokenizer."""
    ours: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(prepared.path / "tokenizer")
    if run.config.oracle_model is not None:
        theirs = load_tokenizer(run.config.oracle_model, (), run.config.trust_remote_code)
        if not same_tokenizer(ours, theirs):
            raise ValueError(
                f"oracle_model {run.config.oracle_model!r}: its tokenizer differs from that of model "
                f"{run.config.model!r}; rewards are read from the same token ids, so both need the same one"
            )
    return ours


def references(run: Run) -> Dataset:
    """Reference completions of the training split."""
    return of_split(data(run).path / "references", "train")


def given_pairs(run: Run, split: str) -> Dataset:
    """Preferences of a split with the labels that they came with."""
    return of_split(data(run).path / "preferences", split)


# ---------------------------------------------------------------- datasets on disk


def save(dataset: Dataset, folder: Path) -> None:
    """Into an artifact's folder."""
    dataset.save_to_disk(str(folder))


def opened(folder: Path) -> Dataset:
    """Memory-mapped."""
    dataset = datasets.load_from_disk(str(folder))
    assert isinstance(dataset, Dataset)
    return dataset


def of_split(folder: Path, split: str) -> Dataset:
    """The rows of a split."""
    return where(opened(folder), "split", lambda name: name == split)


def where(dataset: Dataset, column: str, holds: Callable[[Any], bool]) -> Dataset:
    """The rows of which it holds. Their numbers stay in memory: a file of them in the artifact's folder, as `datasets`
    would leave, has no checksum there, and would be believed."""
    return dataset.filter(holds, input_columns=column, keep_in_memory=True)
