"""How a set is read, decided over all of its rows before any becomes a comparison, by every command in the same way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm.data import scored
from lm.data.messages import Conversation, is_messages, is_missing, unread_keys
from lm.data.prompts import (
    AUTO,
    CONVERSATIONS,
    INFERRED,
    Layout,
    begins_with,
    doubtful_columns,
    is_text,
    text_columns,
)
from lm.data.rows import Row, Tally, like, places, shown
from lm.data.schemas import (
    Drop,
    Message,
    are_dialogues,
    begins_with_asked,
    conversation_or_texts,
    dialogues_hold,
    is_tldr,
    preference_reference,
)

NEARLY_ALL, FEW = 0.9, 0.1
"""From which share of a set's rows on a prompt that stands in front of the sides is taken off, and up to which it is
taken for chance; between them the set is refused."""
DIFFERENT = 0.5
"""From which share of its rows on a column's text differs, so that it is not about the rows, whatever it is called."""


@dataclass(frozen=True)
class Survey:
    """What holds of a whole set."""

    layout: Layout
    """How its rows are read."""
    kind: str
    """"tldr", "hh" or "preferences": of the schemas, what all rows are."""
    has_messages: bool
    """Whether any row is of messages."""
    columns: Mapping[str, str]
    """Column -> where the first row stands that has it."""
    notes: list[str]
    """What was decided and is not read, a line each."""


@dataclass
class _Seen:
    """Counted over the rows."""

    rows: int = 0
    tldr: int = 0
    dialogues: int = 0
    inferred: Tally = field(default_factory=Tally)
    forms: Tally = field(default_factory=Tally)
    """"text" and "messages"."""
    prompts: Tally = field(default_factory=Tally)
    """Of rows of text with a prompt, and of messages: whether "both" sides begin with it, or one ("chosen",
    "rejected"), or "none"."""
    prompted: bool = False
    columns: dict[str, str] = field(default_factory=dict)
    unread: Tally = field(default_factory=Tally)
    keys: Tally = field(default_factory=Tally)
    doubtful: Tally = field(default_factory=Tally)
    """Columns that may be the prompt, though they are called as what is about a row."""
    different: dict[str, set[int]] = field(default_factory=dict)
    """Column -> hashes of its texts, likewise."""


def survey(rows: Iterable[tuple[str, Row]], what: str, prompt: str = AUTO, kind: str = "auto") -> Survey:
    """Reads all rows of a set once.

    Args:
        rows: (where it stands, row), as of `lm.data.rows.read_rows`.
        what: the set is called, in messages.
        prompt: as of `lm.config.DataConfig.prompt`.
        kind: "preferences", "hh" and "tldr" as in `lm.config.DataConfig`, "references" of the first kind; "auto" goes
            by the columns of each row.

    Raises:
        ValueError: a prompt stands in front of both sides in some rows and not in others, or in front of one side.
    """
    if kind in ("hh", "tldr") and prompt != AUTO:
        raise ValueError(
            f"{what}: the prompts of {kind!r} stand where they do; --prompt {prompt!r} goes with other kinds"
        )
    seen, sides = _Seen(), ("completion",) if kind == "references" else ("chosen", "rejected")
    name = "prompt" if prompt in (AUTO, INFERRED) else prompt
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: an object with columns is needed, got {type(row).__name__}: {shown(row)}")
        if kind == "auto" and not seen.rows:
            _check_known(row, where)
        seen.rows += 1
        for column in row:
            seen.columns.setdefault(column, where)
        if kind == "tldr" or (kind == "auto" and is_tldr(row)):
            seen.tldr += 1
        elif kind == "hh":
            seen.dialogues += 1
            for column in (*text_columns(row), *(["prompt"] if is_text(row.get("prompt")) else [])):
                seen.unread.add(column, where)
        else:
            _look(row, where, seen, name, sides, prompt)
    repeated = _is_repeated(seen, what, name)
    texts = tuple(
        column
        for column, found in seen.different.items()
        if len(found) > 1 and len(found) > DIFFERENT * seen.doubtful[column]
    )
    every = {"tldr": seen.tldr, "hh": seen.dialogues}
    notes = [] if kind in ("tldr", "hh") and not seen.unread else _notes(seen, repeated, kind, name)
    return Survey(
        Layout(prompt=prompt, prompted=seen.prompted, repeated=repeated, texts=texts),
        next((one for one, count in every.items() if count == seen.rows), "preferences"),
        "messages" in seen.forms,
        seen.columns,
        notes,
    )


def _check_known(row: Row, where: str) -> None:
    if is_tldr(row) or {"chosen", "rejected"} & row.keys():
        return
    close = [(name, found[0]) for name in ("chosen", "rejected") if (found := like(name, row))]
    hint = "".join(f"; is {found!r} meant to be {name!r}?" for name, found in close)
    raise ValueError(
        f"{where}: no preference set with the columns {shown(sorted(row))} is known; there should be prompt, "
        f"chosen and rejected, or chosen and rejected dialogues, or info, summaries and choice{hint}"
    )


def _look(row: Row, where: str, seen: _Seen, name: str, sides: tuple[str, ...], prompt: str) -> None:
    given, texts = row.get(name), [row.get(side) for side in sides]
    seen.prompted |= not is_missing(given)
    if is_missing(given):
        for column, words in doubtful_columns(row).items():
            seen.doubtful.add(column, where)
            seen.different.setdefault(column, set()).add(hash(words))
    in_messages = any(map(is_messages, (given, *texts)))
    in_text = not in_messages and all(isinstance(text, str) for text in texts)
    seen.forms.add("messages" if in_messages else "text", where)
    asked = next((one for one in CONVERSATIONS if is_missing(given) and not is_missing(row.get(one))), None)
    for value in (given, *texts, row.get(asked or "")):
        for key in unread_keys(value):
            seen.keys.add(key, where)
    for column in (*text_columns(row), *(["prompt"] if is_text(row.get("prompt")) else [])):
        if column not in (name, asked, *sides) and not (column == "system" and in_messages):
            seen.unread.add(column, where)
    if in_messages:
        with contextlib.suppress(ValueError):  # it is raised where the row is read
            if begun := _begun_replies(row, where, Layout(prompt=prompt, prompted=True), sides):
                seen.prompts.add(_begun(begun, sides), where)
    if not in_text:
        return
    if isinstance(given, str) and given.strip():
        starts = [begins_with(text, given) for text in texts if isinstance(text, str)]
        holds = len(sides) == 2 and dialogues_hold(given, *map(str, texts))
        seen.prompts.add("both" if holds else _begun(starts, sides), where)
    elif len(sides) == 2 and is_missing(given) and not isinstance(row.get(asked or ""), list):
        if are_dialogues(*map(str, texts)):
            seen.dialogues += 1
        else:
            seen.inferred.add("prompt", where)


def _begun_replies(row: Row, where: str, layout: Layout, sides: tuple[str, ...]) -> list[bool]:
    """Whether each reply of a row of messages begins with the message that it answers; empty for a row left out."""
    begun: list[bool] = []

    def look(messages: Sequence[Message], reply: Message, where: str, tools: Any = None) -> tuple[str, str]:
        begun.append(begins_with_asked(reply, messages))
        return "prompt", "reply"

    if len(sides) == 1:
        preference_reference(row, where, look, layout)
    elif isinstance(made := conversation_or_texts(row, where, layout), Conversation):
        for reply in (made.chosen, made.rejected):
            look(made.context, reply, where)
    return begun


def _begun(starts: Sequence[bool], sides: tuple[str, ...]) -> str:
    return "both" if all(starts) else sides[starts.index(True)] if any(starts) else "none"


def _is_repeated(seen: _Seen, what: str, name: str) -> bool:
    """ValueError where it is in some rows and not in others."""
    found, total = seen.prompts, seen.prompts.total()
    both = found["both"]
    for side in ("chosen", "rejected"):
        if found[side] > total / 2:
            raise ValueError(
                f"{what}: in {found[side]:,} of {total:,} rows {side!r} alone begins with the prompt "
                f"({places(found.first[side], found[side])}), so that the prompt tells the sides apart; take it "
                "off there"
            )
    if FEW * total < both < NEARLY_ALL * total:
        other = next(place for kind, place in found.first.items() if kind != "both")
        raise ValueError(
            f"{what}: in {both:,} of {total:,} rows both sides begin with the {name!r} ({found.first['both'][0]}), in "
            f"the others not ({other[0]}); take it off, or put it in front of all"
        )
    return both >= NEARLY_ALL * total > 0


def _notes(seen: _Seen, repeated: bool, kind: str, name: str) -> list[str]:
    notes = []
    both, total = seen.prompts["both"], seen.prompts.total()
    who = "the completion begins" if kind == "references" else "both sides begin"
    if both:
        which = "both" if repeated else "none"
        rest = seen.prompts.first.get("none", []) if repeated else seen.prompts.first["both"]
        does = "is taken off there" if repeated else "stays, as chance"
        where = f" ({'not in ' * (which == 'both')}{places(rest, total - both if repeated else both)})" if rest else ""
        notes.append(f"in {both:,} of {total:,} rows {who} with the {name}, which {does}{where}")
    if inferred := seen.inferred["prompt"]:
        how = "are left out" if seen.prompted else "have as prompt what both sides begin with, in whole words"
        notes.append(
            f"{inferred:,} of {seen.rows:,} rows without a prompt {how} "
            f"({places(seen.inferred.first['prompt'], inferred)})"
        )
    if len(seen.forms) > 1:
        counts = ", ".join(
            f"{count:,} of {form} ({places(seen.forms.first[form], count)})" for form, count in seen.forms.items()
        )
        notes.append(f"rows of two forms, {counts}: a chat template writes messages only")
    for unread, plural in ((seen.unread, "columns"), (seen.keys, "keys of messages")):
        if unread:
            named = ", ".join(f"{one} ({count:,} rows)" for one, count in unread.items())
            notes.append(f"not read: {plural} {named}")
    return [*notes, *scored.older_names(seen.columns)]


def comparisons(
    rows: Iterable[tuple[str, Row]], convert: Callable[[Row, str], Row | Drop], left_out: Tally | None = None
) -> Iterator[tuple[int, str, Row, Row]]:
    """(number, where it stands, the row as it is, what it became) of each row that is a comparison; the others counted.

    Raises ValueError as `convert` does.
    """
    for number, (where, row) in enumerate(rows):
        pair: Any = convert(row, where)
        if not isinstance(pair, Drop):
            yield number, where, row, pair
        elif left_out is not None:
            left_out.add(pair.reason, where)
