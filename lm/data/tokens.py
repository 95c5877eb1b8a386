"""Preference sets and reference completions, from the hub or local files, to one tokenised form.

The form: preferences with id, prompt, chosen, rejected, split and prompt_ids, chosen_ids, rejected_ids; reference
completions with id, prompt, completion, split and prompt_ids, completion_ids. Splits are by prompt (TL;DR: by post), so
none crosses. Beside these, where the schema has them: confidence and worker (None where a row has none), and the set's
own rewards. Prompt and completion are tokenised apart and joined as ids; every completion ends with end-of-text. What
is dropped is counted, by reason. Sets stay on disk, memory-mapped, from reading to training.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from lm.base import progress
from lm.config import DataConfig
from lm.data import messages, rewards
from lm.data.rows import BATCH, Row, Tally, read_rows
from lm.data.schemas import (
    Drop,
    Renderer,
    hh_pair,
    plain_chat,
    preference_pair,
    preference_reference,
    tldr_pair,
    tldr_reference,
)
from lm.data.sets import comparisons, survey

TEXTS = ("prompt", "completion", "chosen", "rejected")
PLACE = "place"
"""Where a row stands in its set, between reading and tokenising."""


# ---------------------------------------------------------------- loading


@dataclass(frozen=True)
class Loaded:
    """Untokenised rows with splits, memory-mapped, and what was left out."""

    preferences: Dataset
    references: Dataset
    dropped: dict[str, dict[str, int]]
    """Set ("preferences", "references") -> reason -> rows."""
    first: dict[str, dict[str, list[str]]]
    """Set -> reason -> where the first such rows stand."""
    notes: dict[str, list[str]]
    """Set -> what is said of how it was read, see `lm.data.sets.survey`."""


def load(
    config: DataConfig, seed: int, folder: Path, *, world: Path | None = None, render: Renderer = plain_chat
) -> Loaded:
    """Reads, splits and counts.

    Args:
        config: which data.
        seed: of the splits and of the limit's draw.
        folder: where the rows are kept; it has to stay as long as they are used.
        world: folder of the generated embedded world, for that kind.
        render: how messages become text.

    Raises:
        ValueError: a row is malformed, or has another number of rewards than the rows before it.
    """
    pairs_path, references_path = config.path, config.sft_path
    if world is not None:
        pairs_path, references_path = str(world / "comparisons.jsonl"), str(world / "sft.jsonl")
    assert pairs_path is not None

    own_rewards = rewards.Reader()
    schema = "tldr" if config.kind == "world" else str(config.kind)
    of_pairs = survey(read_rows(pairs_path), pairs_path, config.prompt, schema)

    def pair(row: Row, where: str) -> Row | Drop:
        if config.kind == "hh":
            return hh_pair(row, where)
        if config.kind != "preferences":
            return tldr_pair(row, where, config.prompt_template)
        kept = preference_pair(row, where, render, of_pairs.layout)
        if isinstance(kept, Drop):
            return kept
        given = own_rewards(row, where) if config.rewards == "given" else {}
        return {**kept, **given, **messages.stored(kept.get("messages"))}

    def reference(row: Row, where: str) -> Row | Drop:
        if config.kind == "preferences":
            return preference_reference(row, where, render, of_references.layout)
        return tldr_reference(row, where, config.prompt_template)

    columns = {name: Value("string") for name in ("prompt", "chosen", "rejected")}
    if of_pairs.has_messages:
        columns |= {name: Value("string") for name in messages.STORED}
    if config.kind != "hh":
        columns |= {"confidence": Value("float64"), "worker": Value("string")}
    if config.rewards == "given":
        columns |= {name: Value("float64") for name in rewards.ONE}
        columns |= {name: List(Value("float64")) for name in rewards.MEMBERS}
    preferences, dropped = _finish(pair, read_rows(pairs_path), columns, config, seed, folder / "preferences.arrow")
    notes = {"preferences": of_pairs.notes, "references": []}
    if config.limit is not None and config.limit < len(preferences):
        rng = np.random.default_rng([seed, 1])
        preferences = preferences.select(sorted(rng.choice(len(preferences), config.limit, replace=False)))
    if references_path is None:
        references = preferences.select_columns(["id", "prompt", "split", PLACE, "chosen"]).rename_column(
            "chosen", "completion"
        )
        return Loaded(preferences, references, *_told(dropped, Tally()), notes)
    schema = "references" if config.kind == "preferences" else "tldr"
    of_references = survey(read_rows(references_path), references_path, config.prompt, schema)
    notes["references"] = of_references.notes
    columns = {name: Value("string") for name in ("prompt", "completion")}
    references, dropped_references = _finish(
        reference, read_rows(references_path), columns, config, seed, folder / "references.arrow"
    )
    return Loaded(preferences, references, *_told(dropped, dropped_references), notes)


def _told(preferences: Tally, references: Tally) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, list[str]]]]:
    """The counts, and where the first rows of each reason stand."""
    both = {"preferences": preferences, "references": references}
    return {name: dict(each) for name, each in both.items()}, {name: each.first for name, each in both.items()}


def _finish(
    convert: Callable[[Row, str], Row | Drop],
    rows: Iterable[tuple[str, Row]],
    columns: dict[str, Any],
    config: DataConfig,
    seed: int,
    path: Path,
) -> tuple[Dataset, Tally]:
    dropped = Tally()

    def kept() -> Iterator[Row]:
        for number, where, _, row in comparisons(rows, convert, dropped):
            content = hashlib.sha256("\0".join(row[name] for name in TEXTS if name in row).encode()).hexdigest()
            # A post has several prompts, by its titles; in the embedded world a prompt is its post.
            group = row["post"] if config.kind == "tldr" else row["prompt"]
            yield {
                "id": f"{number}-{content[:12]}",
                **{name: row.get(name) for name in columns},
                "split": split_of(group, config, seed),
                PLACE: where,
            }

    features = {"id": Value("string"), **columns, "split": Value("string"), PLACE: Value("string")}
    return mapped(kept(), features, path), dropped


def mapped(rows: Iterable[Row], features: Mapping[str, Any], path: Path) -> Dataset:
    """Writes rows to an Arrow file as they come, and opens it memory-mapped."""
    with ArrowWriter(path=str(path), features=Features(features)) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    return Dataset.from_file(str(path))


def split_of(group: str, config: DataConfig, seed: int) -> str:
    """train, valid or test: a function of the text and the seed, so a prompt (a post) is in one split of every set."""
    draw = int.from_bytes(hashlib.sha256(f"{seed}\0{group}".encode()).digest()[:8], "big") / 2**64
    if draw < config.test_fraction:
        return "test"
    return "valid" if draw < config.test_fraction + config.valid_fraction else "train"


# ---------------------------------------------------------------- tokenising


def prompt_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of prompts; one that its chat template begins with the beginning-of-text token gets no second one."""
    ids: list[list[int]] = tokenizer(texts)["input_ids"]
    twice = [tokenizer.bos_token_id] * 2
    return [prompt[1:] if None not in twice and prompt[:2] == twice else prompt for prompt in ids]


def completion_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of completions, which end with end-of-text, once."""
    end = tokenizer.eos_token_id
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [completion if completion[-1:] == [end] else [*completion, end] for completion in ids]


def too_long(prompt: int, completions: Iterable[int], config: DataConfig) -> str | None:
    """Why a row is left out whose prompt and completions have so many tokens; None where it is not."""
    if prompt > config.max_prompt_length:
        return f"prompt longer than {config.max_prompt_length} tokens"
    if max(completions) > config.max_completion_length:
        return f"completion longer than {config.max_completion_length} tokens"
    return None


def tokenise(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig, path: Path, dropped: Tally | None = None
) -> tuple[Dataset, dict[str, int]]:
    """Adds `<column>_ids` for the prompt and each completion, and drops over-long rows.

    Returns the dataset, kept in the file `path`, and the counts of dropped rows by reason, which are in `dropped` too,
    with where they stand. Nothing is cut. Raises ValueError where no row of some split is left.
    """
    columns = [name for name in ("completion", "chosen", "rejected") if name in rows.column_names]
    dropped, present = Tally() if dropped is None else dropped, Counter[str]()

    def kept() -> Iterator[Row]:
        for start in progress.bar("tokenising", range(0, len(rows), BATCH), unit="batch"):
            batch = rows[start : start + BATCH]
            places = batch.pop(PLACE, batch["id"])
            ids = {"prompt_ids": prompt_ids(tokenizer, batch["prompt"])}
            ids |= {f"{name}_ids": completion_ids(tokenizer, batch[name]) for name in columns}
            table = {**batch, **ids}
            for place, *values in zip(places, *table.values(), strict=True):
                row = dict(zip(table, values, strict=True))
                lengths = (len(row[f"{name}_ids"]) for name in columns)
                if (reason := too_long(len(row["prompt_ids"]), lengths, config)) is not None:
                    dropped.add(reason, place)
                else:
                    present[row["split"]] += 1
                    yield row

    ids = {f"{name}_ids": List(Value("int64")) for name in ("prompt", *columns)}
    features = {name: kind for name, kind in rows.features.items() if name != PLACE}
    dataset = mapped(kept(), {**features, **ids}, path)
    what = "preference pairs" if "chosen" in columns else "reference completions"
    for split in ("train", "valid", "test") if "chosen" in columns else ("train",):
        if not present[split]:
            elsewhere = [name for name, count in present.items() if count]
            hint = f"; all are in {''.join(elsewhere)}, as rows that a run exported are: give another seed"
            raise ValueError(
                f"no {what} are left in the {split} split: {len(rows)} rows before length limits, dropped "
                f"{dict(dropped) or 'none'}; look at data.path, data.limit, data.max_prompt_length, "
                f"data.max_completion_length, data.valid_fraction and data.test_fraction" + hint * (len(elsewhere) == 1)
            )
    return dataset, dict(dropped)
