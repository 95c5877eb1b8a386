"""Where a comparison's prompt stands: in which column, in front of both sides as well, or nowhere, and then what it is.

A prompt is inferred, as what both texts begin with, only where no other column could hold it, or where that is asked
for. It is taken off the sides only where nearly all rows of a set have it there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from lm.data.formats import NUMBERS
from lm.data.messages import Message, is_missing, side
from lm.data.rows import Row, like

AUTO, INFERRED = "auto", "inferred"
"""Of `lm.config.DataConfig.prompt`; anything else is a column's name."""
CONVERSATIONS = ("conversations", "conversation", "messages")
"""Columns that are the prompt where there is none of that name and they are messages that a reply can follow."""
METADATA = re.compile(
    r"(^|_)(id|ids|uuid|idx|index|hash|source|dataset|origin|subset|split|category|lang|language|license|model|"
    r"generator|worker|annotator|labell?er|url|date|time|timestamp|created_at|version|batch|confidence|meta|metadata|"
    r"tags?)$",
    re.IGNORECASE,
)
"""Columns of text that are about a row, and no part of it."""


@dataclass(frozen=True)
class Layout:
    """How the rows of a set are read, as `lm.data.sets.survey` decides over all of them; by default, each by itself."""

    prompt: str = AUTO
    """The option."""
    prompted: bool = False
    """Whether rows have a prompt; then none is inferred for those that lack one."""
    repeated: bool = False
    """Whether a prompt that both sides begin with is taken off them."""
    texts: tuple[str, ...] = ()
    """Columns that are called as what is about a row, and hold text of another kind: they may be the prompt."""


ALONE = Layout()


def prompt_of(row: Row, where: str, layout: Layout) -> str | list[Message] | None:
    """The prompt as text or messages, None where there is none. ValueError where the column that is named, or the
    messages in it, cannot be read, and where a prompt is to be inferred that is there."""
    if layout.prompt not in (AUTO, INFERRED):
        if layout.prompt in row and is_missing(row[layout.prompt]):
            return ""
        return side(row, layout.prompt, where)
    if row.get("prompt") is not None:
        if layout.prompt == INFERRED:
            raise ValueError(f"{where}: data.prompt is {INFERRED!r}, and the row has a 'prompt'; leave one of them out")
        return side(row, "prompt", where)
    return None


def conversation_of(row: Row, where: str) -> list[Message] | None:
    """The messages of one of CONVERSATIONS that a reply can follow, or None."""
    for name in CONVERSATIONS:
        if not is_missing(row.get(name)):
            found = side(row, name, where)
            if isinstance(found, list) and found[-1]["role"] != "assistant":
                return found
    return None


def is_text(value: Any) -> bool:
    """Whether a value is text that says something, messages, or a list or an object with text in it."""
    if isinstance(value, str):
        return bool(value.strip()) and not _NUMBER.fullmatch(value.strip())
    if isinstance(value, Mapping):
        return any(map(is_text, value.values()))
    return isinstance(value, list) and any(map(is_text, value))


_NUMBER = re.compile(r"[-+]?[\d.,:]+(e[-+]?\d+)?\s*%?|\d{4}-\d\d?-\d\d?(.\d\d?:[\d:.+-]+Z?)?", re.IGNORECASE)
"""A number or a date."""


def text_columns(row: Row) -> list[str]:
    """Columns beside the sides and the prompt that hold text, and are not called as METADATA or NUMBERS are."""
    return [name for name in _others(row) if not _is_about(name)]


def doubtful_columns(row: Row) -> dict[str, str]:
    """Column -> text of those that are called as METADATA or NUMBERS are, and have more than one word there."""
    found = {name: words_of(row[name]) for name in _others(row) if _is_about(name) and not _TIMES.search(name)}
    return {name: words for name, words in found.items() if len(words.split()) > 1}


def words_of(value: Any) -> str:
    """All text in a value."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return " ".join(map(words_of, value)) if isinstance(value, list) else value if is_text(value) else ""


def _others(row: Row) -> list[str]:
    return [name for name, value in row.items() if name not in _READ and is_text(value)]


def _is_about(name: str) -> bool:
    return METADATA.search(name) is not None or NUMBERS.search(name) is not None


_READ = ("prompt", "chosen", "rejected", "tools")
_TIMES = re.compile(r"(^|_)(date|time|timestamp|created_at|url|meta|metadata|tags?)$", re.IGNORECASE)
"""Of METADATA, what has several words in it and differs in every row, and is no prompt."""


def refuse_others(row: Row, where: str, layout: Layout, kind: Literal["slip", "any"]) -> None:
    """ValueError where a row without a prompt has a column that may be it: one of nearly that name ("slip"), or any
    other text ("any")."""
    if layout.prompt != AUTO:
        return
    others = text_columns(row) + [name for name in layout.texts if is_text(row.get(name))]
    close = like("prompt", others)
    if kind == "slip":
        plain = [re.sub(r"\W|_", "", name).lower() for name in close]
        close = others = [
            name
            for name, text in zip(close, plain, strict=True)
            if text.removesuffix("s") == "prompt" or (abs(len(text) - 6) < 2 and like("prompt", [text]))
        ]
    if not others:
        return
    name = (close or others)[0]
    raise ValueError(
        f"{where}: there is no 'prompt', but {'column' if len(others) == 1 else 'columns'} "
        f"{', '.join(map(repr, others[:5]))}{'; is ' + repr(name) + ' meant to be it? N' if close else '; n'}ame the "
        f"prompt's column by data.prompt (elsewhere --prompt), as {name!r}, or say {INFERRED!r}: what both sides "
        "begin with"
    )


def inferred(chosen: str, rejected: str) -> tuple[str, str, str]:
    """What both texts begin with, in whole words, and the rest of each."""
    shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    while shared and not (chosen[shared : shared + 1].isspace() and rejected[shared : shared + 1].isspace()):
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def begins_with(text: str, prompt: str) -> bool:
    """Whether a text begins with the whole prompt, and no word of it goes on; white space before both is nothing."""
    start, text = prompt.strip(), text.lstrip()
    after = text[len(start) : len(start) + 1]
    return bool(start) and text.startswith(start) and not (start[-1].isalnum() and after.isalnum())


def without(text: str, prompt: str) -> str:
    """The text after the prompt that it begins with, as written."""
    return text.lstrip()[len(prompt.strip()) :]
