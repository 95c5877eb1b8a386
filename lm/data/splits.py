"""Which split a row is in: by what was asked, however it is written, or as the set has it.

A row's group is what was asked in it, without what a template, a model or an edition of the set make of it: a TL;DR
post; of a conversation its system message and the first message of its user, whether it is text, messages, or a
dialogue of Human and Assistant, so that a dialogue stays with its continuations; else the prompt's text. Case, white
space and the forms that Unicode has of one character make no difference. All rows of a group are in one split.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import PurePath
from typing import Any

import numpy as np
import numpy.typing as npt

from lm.config import DataConfig
from lm.data.rows import Row, shown

Digests = npt.NDArray[np.bytes_]
SPLITS = ("train", "valid", "test")
HELD_OUT = ("valid", "test")
_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
}
_NAMED = re.compile(rf"({'|'.join(sorted(_NAMES, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)
_NO_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())
_DIALOGUE = re.compile(r"\s*Human:(.*?)(?:\r?\n\s*(?:Human|Assistant):|\Z)", re.DOTALL)


# ---------------------------------------------------------------- groups


def normalised(text: str) -> str:
    """The text in one spelling: compatible characters as one, no case, white space as single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def opening(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """What was asked first: of messages, of a dialogue of Human and Assistant, or the whole text."""
    if isinstance(prompt, str):
        dialogue = _DIALOGUE.match(prompt)
        return normalised(dialogue[1] if dialogue else prompt)
    first = next((i for i, message in enumerate(prompt) if message.get("role") == "user"), 0)
    asked = [m for i, m in enumerate(prompt[: first + 1]) if i == first or m.get("role") == "system"]
    return normalised("\n".join(str(message.get("content")) for message in asked))


def letters(group: str) -> str:
    """What is left of a group without digits, punctuation and white space; the group itself where that is nothing."""
    if group.isascii():  # the same, in a twentieth of the time
        return group.encode().translate(None, _NO_LETTERS).decode() or group
    return re.sub(r"[\W\d_]+", "", group) or group


def digest(text: str) -> str:
    """Short and of one length, of as many texts as there may be."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------- splits drawn


def draw_of(seed: int, *texts: str) -> float:
    """A draw from [0, 1] that is a function of the seed and of these texts, whatever else there is."""
    return int.from_bytes(hashlib.sha256("\0".join((str(seed), *texts)).encode()).digest()[:8], "big") / 2**64


def split_of(group: str, config: DataConfig, seed: int) -> str:
    """train, valid or test: a function of the group and the seed, so a group is in one split of every set."""
    draw = draw_of(seed, group)
    if draw < config.test_fraction:
        return "test"
    return "valid" if draw < config.test_fraction + config.valid_fraction else "train"


# ---------------------------------------------------------------- a set's own splits


def own_split(row: Row, where: str, path: str) -> str | None:
    """What the set calls the split that a row is in: by its column `split`, or by the name of its split at the hub, its
    file or a folder of it. None where nothing says.

    Args:
        row: as it was read.
        where: it stands, as `lm.data.rows.read_rows` tells it.
        path: of the set.
    """
    column = row.get("split")
    if isinstance(column, str):
        return column
    return _split_in(where.rpartition(", ")[0], path)


@cache
def _split_in(place: str, path: str) -> str | None:
    """By the name of its file, or of a folder of it."""
    inside = place.removeprefix(str(PurePath(path))) or PurePath(place).name  # as it is read, so is it spelled
    for part in reversed(PurePath(inside).parts):
        if _NAMED.match(part):
            return part.partition(".")[0]
    return None


def is_named(own: str | None) -> bool:
    """Whether a name is one of a split, as `named` takes it."""
    return own is not None and _NAMED.match(own) is not None


def named(own: str | None, where: str) -> str:
    """Which of SPLITS that is. ValueError where it is none, or nothing says."""
    if own is not None and (found := _NAMED.match(own)):
        return _NAMES[found[1].lower()]
    what = (
        "neither a column `split` nor the name of its file or folder says one" if own is None else f"got {shown(own)}"
    )
    raise ValueError(
        f'{where}: data.split "own" needs a split of the set\'s own, named train, valid (or validation, val, dev) or '
        f'test, perhaps with more after it (test_prefs); {what}. "drawn" draws splits by the seed'
    )


def completed(splits: Iterable[tuple[str, str]], lacking: Sequence[str], config: DataConfig, seed: int) -> list[str]:
    """The splits of a set's own, with what it lacks drawn from its training split.

    By another draw than `split_of` makes: all rows that a run exported are in its training split.

    Args:
        splits: (split, group) of each row.
        lacking: which of HELD_OUT the set has not.
        config: shares.
        seed: of the draw.
    """

    def one(split: str, group: str) -> str:
        drawn = split_of(f"own\0{group}", config, seed)
        return drawn if split == "train" and drawn in lacking else split

    return [one(*row) for row in splits]


# ---------------------------------------------------------------- what stands in several splits


def crossing(training: Sequence[Digests], held_out: Mapping[str, Sequence[Digests]]) -> dict[str, dict[str, int]]:
    """Of each split that is held out: `prompts`, how many there are; `in_training`, how many of these stand in training
    as well; `nearly`, how many do but for digits, punctuation and white space.

    Args:
        training: of the training rows the digests of their groups, [N], and of the groups' `letters`, [N].
        held_out: split -> likewise.
    """
    found = {}
    for split, (groups, spelt) in held_out.items():
        if not len(groups):
            continue
        groups, first = np.unique(groups, return_index=True)  # a group is spelt in one way
        same = np.isin(groups, training[0])
        nearly = ~same & np.isin(spelt[first], training[1])
        found[split] = {"prompts": len(groups), "in_training": int(same.sum()), "nearly": int(nearly.sum())}
    return found


def why_empty(split: str, before: Mapping[str, int], dropped: Mapping[str, int]) -> str:
    """Why a split has no tokenised rows, and what would give it some, in words.

    Args:
        split: which is empty.
        before: rows by split, before any was dropped for its tokens.
        dropped: why rows of all splits were, with counts.
    """
    total = sum(before.values())
    if had := before.get(split, 0):
        told = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        longer = [side for side in ("prompt", "completion") if any(r.startswith(f"{side} longer") for r in dropped)]
        cure = f"raise {' or '.join(f'data.max_{side}_length' for side in longer)}" if longer else "look at data.path"
        rows = f"{had:,} rows of it were" if had > 1 else "1 row of it was"
        return f"all {rows} dropped (of all {total:,} rows: {told}); {cure}"
    if not total:
        return "0 rows were read; look at data.path and data.sft_path"
    filled = [name for name, count in before.items() if count]
    if len(filled) == 1:
        rows = f"{total:,} rows are" if total > 1 else "1 row is"
        return (
            f"all {rows} in {filled[0]}, as rows that a run exported are: set data.split to own, or give another seed"
        )
    option = "data.limit" if split == "train" else f"data.{split}_fraction"
    return f"none of {total:,} rows was drawn for it; look at {option}, data.split and the seed"
