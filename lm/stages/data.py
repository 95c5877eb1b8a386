"""The first stage: data, tokenised, with the tokenizer; and how the stages keep datasets on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lm.base import progress
from lm.base.store import Artifact
from lm.config import Config
from lm.data import places, rewards, world
from lm.data.columns import column, counted, rows_where, tables
from lm.data.control_tokens import TEXTS, Names, unmarked
from lm.data.limits import SHARE, with_limits
from lm.data.rows import BATCH, Tally, left_out
from lm.data.templates import chat_renderer
from lm.data.tokens import FORM, KEYS, ids_of_chosen, load, standing_twice, twice_in_words, with_ids, within
from lm.models import checks
from lm.models.loading import END, PAD, SCRATCH, check_contexts, load_tokenizer, same_tokenizer
from lm.models.weights import rows_by_config
from lm.stages.run import Run, once

SETS = ("preferences", "references")
LIMITS = ("max_prompt_length", "max_completion_length")
SPLITS = ("train", "valid", "test")
FEW = 100
"""Pairs of a split that are too few to go by without being told."""


OTHERS = ("oracle_model", "oracle_base", "reward_base")
"""Options that name models which may have other tokenizers than the policy."""


@once
def data(run: Run) -> Artifact:
    """Tokenised preferences and reference completions, with the tokenizer.

    Raises ValueError where a method that was asked for needs an ensemble, and the rewards are none.
    """
    run.check_places()
    config = run.config.data
    paths = (config.path, config.sft_path)
    alike = replace(config, rewards="models", reward_noise=0.0) if config.rewards == "oracle" else config  # until then
    inputs = {
        "data": replace(alike, path=places.placeless(config.path), sft_path=places.placeless(config.sft_path)),
        "content": [run.content(path, "dataset") for path in paths],
        "model": run.content(run.config.model),
        "seed": run.config.seed,
        "form": FORM,
    }
    if config.split == "own":  # a file's name may say its split
        inputs["names"] = [Path(path).name for path in paths if path is not None and Path(path).is_file()]

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
        source, own = None, None
        if config.kind == "world":
            source = folder / "source"
            source.mkdir()
            world.generate(config.world, run.config.seed, source)
        for path in paths:
            if path is not None:
                places.check(path)
        if run.config.model not in SCRATCH:
            own = load_tokenizer(run.config.model, (), run.config.trust_remote_code)
        render = chat_renderer(own, run.config.model)

        def control() -> Names:
            how = config.control_tokens
            return Names((END, PAD), how, end=END) if own is None else Names.by(own, how)

        loaded = load(config, run.config.seed, scratch, world=source, render=render, control=control)
        if 0 < (prompts := _different(loaded.preferences, "group", len(SPLITS))) < len(SPLITS):
            raise ValueError(
                f"{config.path}: all {len(loaded.preferences):,} pairs are of {prompts} "
                f"prompt{'s' * (prompts > 1)}, and a prompt is in one split: for {', '.join(SPLITS)} there must be "
                f"{len(SPLITS)} or more"
            )
        trained = counted(loaded.preferences, "split")["train"]
        if trained and config.sft_path is None and not counted(loaded.references, "split")["train"]:
            raise ValueError(
                f"{config.path}: all {trained:,} pairs of the train split are ties, of which no side is preferred, and "
                "pi_ref learns from the preferred ones: give reference completions by data.sft_path"
            )
        texts = _training_texts(loaded.references, loaded.preferences)
        made = load_tokenizer(run.config.model, texts, run.config.trust_remote_code) if own is None else own
        made.save_pretrained(folder / "tokenizer")
        ids = {"preferences": with_ids(loaded.preferences, made, scratch / "preferences-ids")}
        ids["references"] = (
            ids_of_chosen(loaded.references, ids["preferences"])
            if config.sft_path is None and config.kind != "world"
            else with_ids(loaded.references, made, scratch / "references-ids", "tokenising references")
        )
        limited = with_limits(config, list(ids.values()))
        limits = {name: getattr(limited, name) for name in LIMITS}
        report: dict[str, Any] = {"limits": limits} if limited is not config else {}
        over = {name: Tally() for name in SETS}
        sets = {name: within(rows, made, limited, over[name]) for name, rows in ids.items()}
        twice = standing_twice(sets["preferences"], sets["references"])
        for name, dataset in sets.items():
            if own is not None:
                _check_ids(run, own, name, dataset)
            save(dataset.remove_columns(list(KEYS)), folder / name)
            report[name] = {
                "kept": dict(counted(dataset, "split")),
                "dropped": {**loaded.dropped[name], **over[name]},
                "first": {**loaded.first[name], **over[name].first},
                "notes": [*loaded.notes[name], *(twice_in_words(twice) if name == "preferences" else [])],
                "control_tokens": loaded.control.get(name),
                "own_splits": loaded.own_splits.get(name),
            }
            for line in lines(report[name]) if name in told_of(run) else ():
                progress.say(f"{name}: {line}")
            if "confidence" in dataset.column_names:
                report[name]["without_confidence"] = column(dataset, "confidence").null_count
            if config.rewards == "given" and name == "preferences":
                report["members"] = len(dataset[0][rewards.MEMBERS[0]])
        report["crossing"] = twice
        report["vocabulary"] = len(made)
        return report

    artifact = run.store.get("data", config.kind, inputs, make, alone=True)
    if config.kind != "world":
        _say(artifact.metrics)
    known = replace(config, **artifact.metrics.get("limits", {}))
    ours = _checked_tokenizer(run, artifact)  # before anything reads the ids, and not when it is first decoded
    if None not in (known.max_prompt_length, known.max_completion_length):
        # Who reads by a tokenizer of his own reads no more than fits, and says what that leaves out.
        same = [o for o in OTHERS if getattr(run.config, o) and same_tokenizer(ours, others_tokenizer(run, o))]
        check_contexts(run.config, known, ["model", *same], ask_hub=True)
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


def _different(rows: Dataset, name: str, most: int) -> int:
    """How many different values a column has, counted up to so many."""
    seen = set[str]()
    for table in tables(rows, [name]):
        seen.update(islice(dict.fromkeys(table[name].to_pylist()), most))
        if len(seen) >= most:
            break
    return min(len(seen), most)


def _training_texts(*sets: Dataset) -> Iterator[str]:
    """The texts of the training split."""
    for rows in sets:
        trained = rows.select(rows_where(rows, "split", ["train"]))
        names = [name for name in TEXTS if name in rows.column_names]
        for table in tables(trained, names, BATCH):
            for texts in zip(*(table[name].to_pylist() for name in names), strict=True):
                yield from map(unmarked, texts)


def _say(report: dict[str, Any]) -> None:
    """What is to be known of a set before its numbers are believed."""
    if limits := report.get("limits"):
        prompt, completion = (limits[name] for name in LIMITS)
        progress.say(
            f"limits from the data: prompts of at most {prompt:,} tokens, completions of at most {completion:,}, to "
            f"which {SHARE:.0%} of the rows keep"
        )
    kept = report.get("preferences", {}).get("kept", {})
    for split in ("valid", "test"):
        if 0 < (n := kept.get(split, FEW)) < FEW:
            progress.say(
                f"warning: the {split} split has n = {n:,} pairs, so that shares of them are known to "
                f"+-{98 / math.sqrt(n):.0f} points (95%); data.{split}_fraction says how many there are"
            )


def sized(run: Run) -> Config:
    """The options with limits that are numbers, those from the data too: what models and samplers are given."""
    if not (limits := data(run).metrics.get("limits")):
        return run.config
    return replace(run.config, data=replace(run.config.data, **limits))


def _check_ids(run: Run, own: PreTrainedTokenizerBase, name: str, dataset: Dataset) -> None:
    """ValueError where a text holds a token that the model has no embedding for. Looks only where there are such."""
    rows = rows_by_config("model", run.config.model, run.config.trust_remote_code)
    if max(own.get_vocab().values()) < rows:
        return
    columns = [each for each in dataset.column_names if each.endswith("_ids")]
    for row in dataset:
        for each in columns:
            checks.ids_fit(f"{name}, row {row['id']}, {each.removesuffix('_ids')}", own, rows, row[each])


def told_of(run: Run) -> tuple[str, ...]:
    """The sets of a run that something learns from: no references where the model is pi_ref as it is."""
    return SETS[:1] if run.config.sft.train == "nothing" else SETS


def lines(report: Mapping[str, Any]) -> list[str]:
    """What is said of a set by the stage's metrics: how it was read, and what was left out; earlier versions' too."""
    return [*left_out(report["dropped"], report.get("first", {})), *report.get("notes", ())]


@once
def tokenizer(run: Run) -> PreTrainedTokenizerBase:
    """The tokenizer of the policy, and of every model of the run that has no other, see `lm.stages.readings`."""
    return _checked_tokenizer(run, data(run))


def _checked_tokenizer(run: Run, prepared: Artifact) -> PreTrainedTokenizerBase:
    """The tokenizer of a finished `data`. ValueError, before anything is trained, where that of a given oracle, or of
    what reward models start from, is none that rewards can be read by."""
    for option in OTHERS:
        if getattr(run.config, option) is not None:
            others_tokenizer(run, option)
    ours: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(prepared.path / "tokenizer")
    return ours


@once
def others_tokenizer(run: Run, option: str) -> PreTrainedTokenizerBase:
    """That of the model which an option names. ValueError where it cannot be loaded, or does not say where a text
    ends."""
    spec = getattr(run.config, option)
    own = load_tokenizer(spec, (), run.config.trust_remote_code, needs_end=False)
    if own.eos_token_id is None and (option != "oracle_model" or own.chat_template is None):
        raise ValueError(f"{option} {spec!r}: its tokenizer has no end-of-text token, at which rewards are read")
    return own


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
    return where(opened(folder), "split", [split])


def where(dataset: Dataset, name: str, values: Sequence[str]) -> Dataset:
    """The rows whose value of a column is one of these. Their numbers stay in memory: a file of them in the artifact's
    folder, as `datasets` would leave, has no checksum there, and would be believed."""
    return dataset.select(rows_where(dataset, name, values), keep_in_memory=True)
