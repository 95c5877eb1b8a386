"""Messages of a set as chat templates take them: `role`, `content`, and beside these what a message carries.

Read are lists of messages, a message alone, JSON of either, `role` and `content` or ShareGPT's `from` and `value`,
content as text or as parts of type text, one written after the other. What is not text (images, audio, parts that call
tools) is refused.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm.base.files import parse_json
from lm.data.rows import Row, column, shown, unicode_text

Message = dict[str, Any]
"""role and content, both text, and those of CARRIED and LINKS that it has."""


class Conversation(NamedTuple):
    """Two replies to the same messages."""

    context: list[Message]
    chosen: Message
    rejected: Message
    tools: list[Any] | None = None
    """Descriptions of the tools that may be called, for the chat template."""


ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "function")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant"},
    **{"ai": "assistant", "bot": "assistant", "model": "assistant", "observation": "tool"},
}
"""What sets call who speaks -> what chat templates do."""
CARRIED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal", "documents")
"""Keys of a message that are a part of what it says: a template writes them, or the message is refused."""
LINKS = ("name", "tool_call_id")
"""Keys that say whom a message is from or what it answers: a template may write them."""
MEDIA = ("images", "image", "audio", "audios", "video", "videos")
"""Columns of what no tokenizer of text reads."""
NOT_TEXT = (*MEDIA, "image_url", "input_audio", "file", "files")
"""Likewise, keys of a message, and types of a part of its content."""
TEXT_PARTS = ("text", "input_text", "output_text")

_JSON = re.compile(r"\s*\[?\s*\{\s*['\"](role|content|from|value)['\"]\s*:")
"""How text begins that is messages, written out, whether or not it can be read."""
_OBJECT = re.compile(r"\s*(?:array\()?\s*\[?\s*\{\s*['\"]")
"""How text begins that may be messages, by the keys of its first object."""
_ROLE = re.compile(rf"['\"](?:role|from)['\"]\s*:\s*['\"](?:{'|'.join(ROLES)})['\"]", re.IGNORECASE)
_SAID = re.compile(r"['\"](?:content|value)['\"]\s*:")
"""What stands in messages that are written out, whatever wrote them."""


def is_missing(value: Any) -> bool:
    """Whether there is nothing: null, or an empty list, object or text, as a column that others fill has it."""
    return value is None or (isinstance(value, list | dict | str) and not value)


def is_messages(value: Any) -> bool:
    """Whether a set has messages there, as they are or as JSON."""
    return isinstance(value, list | Mapping) or (isinstance(value, str) and _is_written(value))


def _is_written(text: str) -> bool:
    """Whether text is messages, as JSON or as something that should have been JSON."""
    if _JSON.match(text):
        return True
    if not _OBJECT.match(text):
        return False
    try:
        value = parse_json(text)
    except (ValueError, RecursionError):
        return _ROLE.search(text) is not None and _SAID.search(text) is not None
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, Mapping):
        return False
    return ("role" in first and not first.keys().isdisjoint(("content", *CARRIED))) or {"from", "value"} <= first.keys()


def side(row: Row, name: str, where: str) -> str | list[Message]:
    """A column as text or as messages, checked."""
    value = row.get(name)
    if isinstance(value, str) and _is_written(value):
        value = _parsed(value, name, where)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        text: str = column(row, name, str, where)
        return text
    return [message(item, f"{where}, {name}") for item in value]


def _parsed(text: str, name: str, where: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        raise ValueError(
            f"{where}: {name!r} begins as messages do and is not JSON; write it by json.dumps (Python's str() is "
            f"not read), got {shown(text)}"
        ) from None


def message(value: Any, where: str) -> Message:
    """One message; ValueError for what is none, or holds what is not read."""
    speaker = "from" if isinstance(value, Mapping) and "from" in value and "role" not in value else "role"
    said = "value" if speaker == "from" and "content" not in value else "content"
    role = column(value, speaker, str, where)
    if role.lower() not in ROLES:
        hint = "; write the call into 'tool_calls' of an assistant's message" * (role.lower() == "function_call")
        raise ValueError(f"{where}: {speaker!r} must be one of {', '.join(ROLES)}, got {shown(role)}{hint}")
    if found := [name for name in NOT_TEXT if not is_missing(value.get(name))]:
        raise ValueError(f"{where}: a message has {found[0]!r}; text alone is read: leave such rows out")
    carried = {name: _without_nulls(value[name]) for name in (*CARRIED, *LINKS) if not is_missing(value.get(name))}
    if "tool_calls" in carried:
        carried["tool_calls"] = _calls(carried["tool_calls"], where)
    for name, what in carried.items():
        _check_text(what, name, where)
    content = value.get(said)
    if isinstance(content, list):
        text = "".join(_part(part, where) for part in content)
    elif content is None and {"tool_calls", "function_call"} & carried.keys():
        text = ""
    else:
        text = column(value, said, str, where)
    return {"role": ROLES[role.lower()], "content": text, **carried}


def _calls(value: Any, where: str) -> list[Any]:
    """Calls of tools with their arguments as objects: chat templates write JSON, and would quote JSON in text again."""
    if not isinstance(value, list) or not all(isinstance(call, Mapping) for call in value):
        raise ValueError(f"{where}: 'tool_calls' must be a list of objects, got {shown(value)}")

    def parsed(call: Mapping[str, Any]) -> dict[str, Any]:
        call = {**call, "function": parsed(call["function"])} if isinstance(call.get("function"), Mapping) else {**call}
        if isinstance(call.get("arguments"), str):
            with contextlib.suppress(ValueError, RecursionError):
                arguments = parse_json(call["arguments"])
                call["arguments"] = arguments if isinstance(arguments, dict) else call["arguments"]
        return call

    return [parsed(call) for call in value]


def _part(part: Any, where: str) -> str:
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(part, Mapping) or kind not in TEXT_PARTS:
        raise ValueError(
            f"{where}: 'content' has a part of type {shown(kind)}; parts of type text are read: leave such rows out"
            + ", or give calls of tools as 'tool_calls'" * (isinstance(kind, str) and kind.startswith("tool"))
        )
    if found := [name for name in NOT_TEXT if not is_missing(part.get(name))]:
        raise ValueError(f"{where}: 'content' has a part with {found[0]!r}; text alone is read: leave such rows out")
    text: str = column(part, "text", str, f"{where}, content")
    return text


def _check_text(value: Any, name: str, where: str) -> None:
    """ValueError for what JSON can hold and no file can."""
    if isinstance(value, str):
        unicode_text(value, name, where)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _check_text(key, name, where)
            _check_text(inner, name, where)
    elif isinstance(value, list):
        for inner in value:
            _check_text(inner, name, where)


def unread_keys(value: Any) -> set[str]:
    """The keys of messages, as a set has them, that are not read."""
    items = value if isinstance(value, list) else [value] if isinstance(value, Mapping) else []
    known = {"role", "content", "from", "value", *CARRIED, *LINKS, *NOT_TEXT}
    return {
        str(key)
        for item in items
        if isinstance(item, Mapping)
        for key, inner in item.items()
        if key not in known and not is_missing(inner)
    }


def tools(row: Row, where: str) -> list[Any] | None:
    """A row's `tools` as chat templates take them, a list or JSON of one; None where there are none."""
    value = row.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except (ValueError, RecursionError):
            raise ValueError(f"{where}: 'tools' must be a list, or JSON of one, got {shown(value)}") from None
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise ValueError(f"{where}: 'tools' must be a list of objects, got {shown(value)}")
    _check_text(value, "tools", where)
    return [_without_nulls(tool) for tool in value]


def _without_nulls(value: Any) -> Any:
    """Parquet gives every object the keys of all of them."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def says(one: Message) -> tuple[str, str]:
    """What a message says, to compare it by: its text without the white space around it, and what it carries."""
    carried = {name: _without_nulls(one[name]) for name in CARRIED if name in one}
    return one["content"].strip(), json.dumps(carried, sort_keys=True, default=str) if carried else ""


def is_empty(one: Message) -> bool:
    """Whether it says nothing."""
    return not one["content"].strip() and not any(name in one for name in CARRIED)


def carries(messages: Sequence[Message], *, with_links: bool = False) -> list[str]:
    """What these messages carry beside their text, each once."""
    names = (*CARRIED, *LINKS) if with_links else CARRIED
    return [name for name in names if any(name in each for each in messages)]


def written_out(one: Message) -> str:
    """A message's text, and after it what it carries as JSON, for whoever reads replies without a chat template."""
    carried = {name: one[name] for name in CARRIED if name in one}
    extra = [json.dumps(carried, ensure_ascii=False, default=str)] if carried else []
    return "\n".join([*([one["content"]] if one["content"] or not extra else []), *extra])


def plain(messages: Sequence[Message], tools: list[Any] | None = None) -> str:
    """A dialogue as text with the roles named, for readers that have no template: people, and an LLM that judges."""
    before = f"\n\ntools: {json.dumps(tools, ensure_ascii=False, default=str)}" if tools else ""
    return before + "".join(f"\n\n{each['role']}: {written_out(each)}" for each in messages)


# ---------------------------------------------------------------- kept beside the text

STORED = ("prompt_messages", "chosen_messages", "rejected_messages", "tools")
"""Columns of JSON in which a run keeps the messages that its texts were written from; null where these are the set's.
What begins as the sides do changes places with them."""


def stored(conversation: Conversation | None) -> dict[str, str | None]:
    """A row's values of STORED."""
    if conversation is None:
        return dict.fromkeys(STORED)
    parts = (conversation.context, [conversation.chosen], [conversation.rejected], conversation.tools)
    return {
        name: json.dumps(part, ensure_ascii=False, default=str) if part else None
        for name, part in zip(STORED, parts, strict=True)
    }


def restored(row: Mapping[str, Any]) -> Row:
    """prompt, chosen and rejected (and tools) of a row of a run as a set has them: messages where it was written from
    some, else its texts."""
    made = {name: json.loads(row[name]) for name in STORED if row.get(name) is not None}
    if not made:
        return {name: row[name] for name in ("prompt", "chosen", "rejected")}
    return {name.removesuffix("_messages"): value for name, value in made.items()}
