"""Preference sets and reference completions, from the hub or local files, to one tokenised form.

The form: preferences with id, prompt, chosen, rejected, split and prompt_ids, chosen_ids, rejected_ids; reference
completions with id, prompt, completion, split and prompt_ids, completion_ids. Splits are by prompt, so none crosses.
Prompt and completion are tokenised apart and joined as ids; every completion ends with end-of-text. What is dropped is
counted, by reason.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lm.config import DataConfig
from lm.io import read_jsonl

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class Drop:
    """A row that is left out, and why."""

    reason: str


# ---------------------------------------------------------------- reading rows


def read_rows(path: str, subset: str | None = None) -> Iterator[tuple[str, Row]]:
    """(where it stands, row) of a local file, a folder of files, or a hub dataset (all its splits).

    A hub dataset is owner/name, or owner/name/folder for one folder of it.

    Raises FileNotFoundError for a local path that is not there, ValueError for a malformed line, an unknown file type,
    or a hub dataset that cannot be loaded.
    """
    local = Path(path)
    if local.exists():
        if subset is not None:
            raise ValueError(
                f"data.subset {subset!r} goes with a hub name, but {path} is local; name the folder itself"
            )
        yield from _read_local(local)
    elif (hub := re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w.-]+))?", path)) and not path.endswith(SUFFIXES):
        try:
            loaded = datasets.load_dataset(hub[1], data_dir=subset or hub[2])
        except Exception as error:
            raise ValueError(
                f"data path {path!r} is neither a local file or folder nor a hub dataset that can be loaded "
                f"({type(error).__name__}: {error})"
            ) from None
        for split, rows in loaded.items():
            for number, row in enumerate(rows):
                yield f"{path}/{split}, row {number}", row
    else:
        raise FileNotFoundError(
            f"data path {path!r}: there is no such file or folder, and it is no hub name (owner/name)"
        )


def _read_local(path: Path) -> Iterator[tuple[str, Row]]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES))
        if not files:
            raise ValueError(f"{path} holds no {', '.join(SUFFIXES)} file")
        for file in files:
            yield from _read_local(file)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        for number, row in read_jsonl(path):
            yield f"{path}, line {number}", row
    elif path.suffix == ".parquet":
        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{path}: cannot be read as parquet ({error})") from None
        for number, row in enumerate(rows):
            yield f"{path}, row {number}", row
    else:
        raise ValueError(f"{path}: a file of type {', '.join(SUFFIXES)} is needed")


def _column(row: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: an object with {name!r} is needed, got {type(row).__name__}: {row!r}")
    if name not in row:
        close = difflib.get_close_matches(name, row, n=1, cutoff=0.6)
        hint = f"; is {close[0]!r} meant to be it?" if close else ""
        raise ValueError(f"{where}: column {name!r} is missing, there are {sorted(row)}{hint}")
    value = row[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: {name!r} must be of type {kind.__name__}, got {type(value).__name__}: {value!r}")
    return value


# ---------------------------------------------------------------- schemas


def hh_pair(row: Row, where: str) -> Row | Drop:
    """One Anthropic HH row: two dialogues, split at the last turn boundary that they share.

    The prompt is all shared turns and the opening of the reply; each side is that one reply. Rows whose dialogues are
    not made of Human and Assistant turns, or differ by more than one final reply, cannot be split.
    """
    dialogues = [_turns(_column(row, name, str, where)) for name in ("chosen", "rejected")]
    if not all(dialogues):
        return Drop("not a dialogue of Human and Assistant turns")
    chosen, rejected = dialogues
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        return Drop("identical completions")
    if shared == min(len(chosen), len(rejected)):
        return Drop("empty completion")
    tails = chosen[shared:], rejected[shared:]
    if shared == 0 or any(len(tail) != 1 or tail[0][0] != "Assistant" for tail in tails):
        return Drop("differs by more than one final reply")
    prompt = "".join(f"\n\n{speaker}:{text}" for speaker, text in chosen[:shared]) + "\n\nAssistant:"
    return _pair(prompt, tails[0][0][1], tails[1][0][1])


def _turns(dialogue: str) -> list[tuple[str, str]]:
    """(speaker, text as written) of each turn; empty where the text does not start with a turn."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", dialogue)
    return [] if before.strip() else list(zip(parts[::2], parts[1::2], strict=True))


def _pair(prompt: str, chosen: str, rejected: str) -> Row | Drop:
    chosen, rejected = chosen.strip(), rejected.strip()
    if not prompt.strip():
        return Drop("empty prompt")
    if not chosen or not rejected:
        return Drop("empty completion")
    if chosen == rejected:
        return Drop("identical completions")
    # A completion continues its prompt after a space, in every schema.
    return {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}


def tldr_pair(row: Row, where: str, template: str) -> Row | Drop:
    """One row of openai/summarize_from_feedback (comparisons)."""
    info, summaries = _column(row, "info", dict, where), _column(row, "summaries", list, where)
    choice = _column(row, "choice", int, where)
    if info.get("post") is None and ("post" in info or "article" in info):  # the set has news articles too
        return Drop("no Reddit post")
    if len(summaries) != 2 or choice not in (0, 1):
        raise ValueError(f"{where}: two summaries and a choice of 0 or 1 are needed, got {len(summaries)} and {choice}")
    texts = [_column(summary, "text", str, f"{where}, summaries") for summary in summaries]
    return _pair(tldr_prompt(info, where, template), texts[choice], texts[1 - choice])


def tldr_reference(row: Row, where: str, template: str) -> Row | Drop:
    """One row of the filtered TL;DR reference set: subreddit, title, post, summary."""
    summary = _column(row, "summary", str, where).strip()
    if not summary:
        return Drop("empty completion")
    return {"prompt": tldr_prompt(row, where, template), "completion": f" {summary}"}


def tldr_prompt(info: Row, where: str, template: str) -> str:
    """The post as a prompt, by a template with {subreddit}, {title} and {post}."""
    fields = {name: _column(info, name, str, where).strip() for name in ("subreddit", "title", "post")}
    return template.format(**fields)


# ---------------------------------------------------------------- loading


@dataclass(frozen=True)
class Loaded:
    """Untokenised rows with splits, and what was left out."""

    preferences: list[Row]
    references: list[Row]
    dropped: dict[str, dict[str, int]]
    """Set ("preferences", "references") -> reason -> rows."""


def load(config: DataConfig, seed: int, world: Path | None = None) -> Loaded:
    """Reads, splits by prompt and counts; `world` is the folder of the generated embedded world, for that kind.

    Raises ValueError where a row is malformed or a split is left without rows.
    """
    if config.kind == "hh":
        assert config.path is not None
        raw = ((where, hh_pair(row, where)) for where, row in read_rows(config.path, config.subset))
        preferences, dropped = _finish(raw, config, seed)
        references = [{**{k: r[k] for k in ("id", "prompt", "split")}, "completion": r["chosen"]} for r in preferences]
        report = {"preferences": dropped, "references": {}}
    else:
        pairs_path, references_path = (
            (str(world / "comparisons.jsonl"), str(world / "sft.jsonl")) if world else (config.path, config.sft_path)
        )
        assert pairs_path is not None
        assert references_path is not None
        template = config.prompt_template
        pairs = ((where, tldr_pair(row, where, template)) for where, row in read_rows(pairs_path, config.subset))
        preferences, dropped = _finish(pairs, config, seed)
        summaries = ((where, tldr_reference(row, where, template)) for where, row in read_rows(references_path))
        references, dropped_references = _finish(summaries, config, seed)
        report = {"preferences": dropped, "references": dropped_references}
    if config.limit is not None and config.limit < len(preferences):
        rng = np.random.default_rng([seed, 1])
        preferences = [preferences[i] for i in sorted(rng.choice(len(preferences), config.limit, replace=False))]
        if config.kind == "hh":
            kept = {row["id"] for row in preferences}
            references = [row for row in references if row["id"] in kept]
    return Loaded(preferences, references, report)


def _finish(rows: Iterable[tuple[str, Row | Drop]], config: DataConfig, seed: int) -> tuple[list[Row], dict[str, int]]:
    kept, dropped = [], Counter[str]()
    for number, (_, row) in enumerate(rows):
        if isinstance(row, Drop):
            dropped[row.reason] += 1
            continue
        content = hashlib.sha256("\0".join(row.values()).encode()).hexdigest()
        kept.append({"id": f"{number}-{content[:12]}", **row, "split": split_of(row["prompt"], config, seed)})
    return kept, dict(dropped)


def split_of(prompt: str, config: DataConfig, seed: int) -> str:
    """train, valid or test: a function of the prompt's text and the seed, so a prompt is in one split of every set."""
    draw = int.from_bytes(hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()[:8], "big") / 2**64
    if draw < config.test_fraction:
        return "test"
    return "valid" if draw < config.test_fraction + config.valid_fraction else "train"


# ---------------------------------------------------------------- tokenising


def tokenise(rows: list[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> tuple[Dataset, dict[str, int]]:
    """Adds `<column>_ids` for the prompt and each completion, and drops over-long rows.

    Returns the dataset and the counts of dropped rows by reason. Completion ids end with end-of-text; nothing is cut.
    Raises ValueError where no row of some split is left.
    """
    columns = [name for name in ("completion", "chosen", "rejected") if rows and name in rows[0]]
    kept, dropped = [], Counter[str]()
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"] if rows else []
    completions = {
        name: tokenizer([row[name] for row in rows], add_special_tokens=False)["input_ids"] for name in columns
    }
    end = tokenizer.eos_token_id
    for index, (row, prompt_ids) in enumerate(zip(rows, prompts, strict=True)):
        ids = {f"{name}_ids": [*completions[name][index], end] for name in columns}
        if len(prompt_ids) > config.max_prompt_length:
            dropped[f"prompt longer than {config.max_prompt_length} tokens"] += 1
        elif max(len(value) for value in ids.values()) > config.max_completion_length:
            dropped[f"completion longer than {config.max_completion_length} tokens"] += 1
        else:
            kept.append({**row, "prompt_ids": prompt_ids, **ids})
    what = "preference pairs" if "chosen" in columns else "reference completions"
    present = Counter(row["split"] for row in kept)
    for split in ("train", "valid", "test") if "chosen" in columns else ("train",):
        if not present[split]:
            raise ValueError(
                f"no {what} are left in the {split} split: {len(rows)} rows before length limits, dropped "
                f"{dict(dropped) or 'none'}; look at data.path, data.limit, data.max_prompt_length, "
                f"data.max_completion_length, data.valid_fraction and data.test_fraction"
            )
    return Dataset.from_list(kept), dict(dropped)
