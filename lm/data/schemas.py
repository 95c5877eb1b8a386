"""Schemas of preference sets: a row of each becomes a comparison, as text or as messages, or says why it is none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from lm.config import DataConfig
from lm.data.messages import (
    MEDIA,
    Conversation,
    is_empty,
    is_missing,
    says,
    side,
)
from lm.data.messages import Message as Message
from lm.data.messages import tools as tools_of
from lm.data.prompts import (
    ALONE,
    AUTO,
    Layout,
    begins_with,
    conversation_of,
    inferred,
    prompt_of,
    refuse_others,
    without,
)
from lm.data.rows import Row, column, number, shown, unicode_text
from lm.data.templates import Renderer as Renderer
from lm.data.templates import chat_renderer as chat_renderer
from lm.data.templates import plain_chat as plain_chat


@dataclass(frozen=True)
class Drop:
    """A row that is left out, and why."""

    reason: str


# ---------------------------------------------------------------- schemas


def hh_pair(row: Row, where: str) -> Row | Drop:
    """One Anthropic HH row: two dialogues, split at the last turn boundary that they share.

    The prompt is all shared turns and the opening of the reply; each side is that one reply. Rows whose dialogues are
    not made of Human and Assistant turns, or differ by more than one final reply, cannot be split.
    """
    dialogues = turns_of(*(column(row, name, str, where) for name in ("chosen", "rejected")))
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


Turns = list[tuple[str, str]]
"""(speaker, text as written) of each turn."""
_TURN = re.compile(r"(?:\A\s*|(?:\r?\n){2})(Human|Assistant):")
_LINE = re.compile(r"(?:\A\s*|\r?\n)(Human|Assistant):")
"""How a turn begins: after a blank line, or, in dialogues that have no blank lines before turns, on a line of its own;
the first one needs neither."""


_OTHER_TURN = re.compile(r"(?:\A\s*|\n)[ \t>*#\[]*(?:(human|user)|assistant|ai|bot|gpt)[ \t*\]]*:", re.IGNORECASE)


def _has_other_turns(text: str) -> bool:
    """Whether a text begins with a turn of the user's, and has one of the assistant's after it, in any spelling."""
    first = _OTHER_TURN.match(text)
    if first is None or first[1] is None:
        return False
    return any(turn[1] is None for turn in _OTHER_TURN.finditer(text))


def turns_of(*dialogues: str) -> list[Turns]:
    """The turns of dialogues that are written in one way; empty for a text that does not start with a turn."""
    turn = _TURN if any(is_dialogue(text) for text in dialogues) else _LINE
    parts = [turn.split(text) for text in dialogues]
    return [[] if before.strip() else list(zip(rest[::2], rest[1::2], strict=True)) for before, *rest in parts]


def _names_a_speaker(text: str) -> bool:
    """Whether there can be a turn at all, which is told much sooner than where."""
    return "Human:" in text or "Assistant:" in text


def is_dialogue(text: str) -> bool:
    """Whether a turn begins inside a text, after a blank line."""
    if not _names_a_speaker(text):
        return False
    return any(match.start() > 0 and text[: match.start()].strip() for match in _TURN.finditer(text))


def are_dialogues(chosen: str, rejected: str) -> bool:
    """Whether two texts are dialogues, or one is and the other should be."""
    if not (_names_a_speaker(chosen) or _names_a_speaker(rejected)):
        return False
    return is_dialogue(chosen) or is_dialogue(rejected) or all(turns_of(chosen, rejected))


def _pair(prompt: str, chosen: str, rejected: str) -> Row | Drop:
    chosen, rejected = chosen.strip(), rejected.strip()
    if not prompt.strip():
        return Drop("empty prompt")
    if not chosen or not rejected:
        return Drop("empty completion")
    if chosen == rejected:
        return Drop("identical completions")
    # A completion continues its prompt after a space, in every schema that does not itself say how they join.
    return {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}


def tldr_pair(row: Row, where: str, template: str) -> Row | Drop:
    """One row of openai/summarize_from_feedback (comparisons).

    Beside the texts: `post`, which the splits are by; the annotator's `confidence` on the set's scale, and the
    `worker`'s name, None where the row has none.
    """
    info, summaries = column(row, "info", dict, where), column(row, "summaries", list, where)
    choice = column(row, "choice", int, where)
    if info.get("post") is None and ("post" in info or "article" in info):  # the set has news articles too
        return Drop("no Reddit post")
    if len(summaries) != 2 or choice not in (0, 1):
        raise ValueError(
            f"{where}: two summaries and a choice of 0 or 1 are needed, got {len(summaries)} and {shown(choice)}"
        )
    texts = [column(summary, "text", str, f"{where}, summaries") for summary in summaries]
    pair = _pair(tldr_prompt(info, where, template), texts[choice], texts[1 - choice])
    if isinstance(pair, Drop):
        return pair
    extra = row.get("extra") or {}
    if not isinstance(extra, Mapping):
        raise ValueError(f"{where}: 'extra' must be of type dict, got {type(extra).__name__}: {shown(extra)}")
    return {**pair, "post": _post(info), **_annotation(extra.get("confidence"), row.get("worker"), where)}


def tldr_reference(row: Row, where: str, template: str) -> Row | Drop:
    """One row of the filtered TL;DR reference set: subreddit, title, post, summary."""
    summary = column(row, "summary", str, where).strip()
    if not summary:
        return Drop("empty completion")
    return {"prompt": tldr_prompt(row, where, template), "completion": f" {summary}", "post": _post(row)}


def _post(info: Row) -> str:
    """A post's words: the same post is in several sets, differently spaced, and under several titles."""
    return " ".join(str(info["post"]).split())


def _annotation(confidence: Any, worker: Any, where: str) -> Row:
    if confidence is not None:
        confidence = number(confidence, "confidence", where)
    if isinstance(worker, int):  # some sets number them
        worker = str(worker)
    if not isinstance(worker, str | None):
        raise ValueError(f"{where}: 'worker' must be a name or a number, got {type(worker).__name__}: {shown(worker)}")
    return {"confidence": confidence, "worker": worker if worker is None else unicode_text(worker, "worker", where)}


def tldr_prompt(info: Row, where: str, template: str) -> str:
    """The post as a prompt, by a template with {subreddit}, {title} and {post}."""
    fields = {name: column(info, name, str, where).strip() for name in ("subreddit", "title", "post")}
    return template.format(**fields)


# ---------------------------------------------------------------- TRL-style sets


def preference_pair(row: Row, where: str, render: Renderer, layout: Layout = ALONE) -> Row | Drop:
    """One row of a TRL-style set: prompt, chosen and rejected, as text or as messages, with or without the prompt.

    Text stays as written, white space too. Without a prompt, dialogues of Human and Assistant are split at the last
    turn that they share; of other text the prompt is what both sides begin with, in whole words, where no other column
    may hold it. Messages go through `render`: the prompt is what comes before the one last reply in which the sides
    differ, whether it stands in `prompt`, in both sides, or in both places. Where they do, "messages" are kept beside
    the texts as a `Conversation`. `confidence` and `worker` are kept as in `tldr_pair`.
    """
    made = conversation_or_texts(row, where, layout)
    if isinstance(made, Conversation):
        pair = _rendered(made, where, render)
    elif isinstance(made, Drop):
        return made
    else:
        pair = _text_pair(row, where, layout, *made)
    return pair if isinstance(pair, Drop) else pair | _annotation(row.get("confidence"), row.get("worker"), where)


def is_tldr(row: Row) -> bool:
    """Whether the columns are those of openai/summarize_from_feedback."""
    return {"info", "summaries", "choice"} <= row.keys()


def any_pair(row: Row, where: str, render: Renderer = plain_chat, layout: Layout = ALONE) -> Row | Drop:
    """A comparison in the schema that its columns say, as text."""
    if is_tldr(row):
        return tldr_pair(row, where, DataConfig.prompt_template)
    return preference_pair(row, where, render, layout)


def any_conversation(row: Row, where: str, layout: Layout = ALONE) -> Conversation | Drop:
    """A comparison in the schema that its columns say, as messages.

    Text is one message of the user's and its replies, or the turns where it is a dialogue of Human and Assistant turns;
    white space around it is left out.
    """
    pair: Row | Drop
    if is_tldr(row):
        pair = any_pair(row, where)
    else:
        made = conversation_or_texts(row, where, layout)
        if isinstance(made, Drop | Conversation):
            return made
        pair = _text_pair(row, where, layout, *made)
    if isinstance(pair, Drop):
        return pair
    context = context_of(pair["prompt"])
    chosen, rejected = ({"role": "assistant", "content": pair[name].strip()} for name in ("chosen", "rejected"))
    return Conversation(context, chosen, rejected)


def context_of(prompt: str) -> list[Message]:
    """A prompt of text as messages: one of the user's, or the turns where it is a dialogue of Human and Assistant
    turns; white space around them is left out."""
    roles = {"Human": "user", "Assistant": "assistant"}
    (turns,) = turns_of(prompt)
    context: list[Message] = [{"role": roles[speaker], "content": text.strip()} for speaker, text in turns]
    if context and context[-1] == {"role": "assistant", "content": ""}:  # the opening of the reply
        context.pop()
    return context or [{"role": "user", "content": prompt.strip()}]


def preference_reference(row: Row, where: str, render: Renderer, layout: Layout = ALONE) -> Row | Drop:
    """One row of a set of reference completions: prompt and completion, as text or messages, or `messages` (or
    `conversations`) alone."""
    refuse_columns_of_others(row, where)
    whole = next((name for name in ("messages", "conversations") if not is_missing(row.get(name))), None)
    completion = side(row, whole or "completion", where)
    prompt: str | list[Message] = []
    if whole is None or row.get("prompt") is not None:
        named = layout.prompt if layout.prompt in row else "prompt"
        prompt = "" if named in row and is_missing(row[named]) else side(row, named, where)
    if whole is not None and isinstance(completion, str):
        raise ValueError(f"{where}: {whole!r} must be messages, got text")
    if isinstance(completion, list) or isinstance(prompt, list):
        completion = _reply(completion)
        if not completion or completion[-1]["role"] != "assistant":
            return Drop("no reply at the end")
        context = _joined(_context(prompt), completion[:-1], f"{whole or 'completion'!r} begins", where)
        if not context:
            return Drop("empty prompt")
        _refuse_reply_before(prompt, context, where)
        reply = completion[-1]
        if layout.repeated and begins_with_asked(reply, context):
            reply = _without_asked(reply, context)
        if is_empty(reply):
            return Drop("empty completion")
        prompt, completion = render(_with_system(row, context, where), reply, where, tools_of(row, where))
    elif layout.repeated and begins_with(completion, prompt):
        completion = without(completion, prompt)
    if not prompt.strip():
        return Drop("empty prompt")
    return {"prompt": prompt, "completion": completion} if completion.strip() else Drop("empty completion")


def conversation_or_texts(row: Row, where: str, layout: Layout) -> Conversation | Drop | tuple[str | None, str, str]:
    """A comparison as messages, or prompt (None where there is none), chosen and rejected as text. ValueError as of
    `lm.data.messages.side`, and where no reply can follow the prompt."""
    refuse_columns_of_others(row, where)
    chosen, rejected = (side(row, name, where) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(f"{where}: 'chosen' and 'rejected' must both be text or both be messages")
    prompt = prompt_of(row, where, layout)
    if prompt is None and layout.prompt == AUTO:
        prompt = conversation_of(row, where)
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        return prompt, chosen, rejected
    if prompt is None:
        refuse_others(row, where, layout, "slip")
    made = _conversation(prompt, _reply(chosen), _reply(rejected), where)
    if isinstance(made, Drop):
        if made == _NO_PROMPT and prompt is None:
            refuse_others(row, where, layout, "any")
        return made
    _refuse_reply_before(prompt, made.context, where)
    if layout.repeated and all(begins_with_asked(reply, made.context) for reply in (made.chosen, made.rejected)):
        replies = [_without_asked(reply, made.context) for reply in (made.chosen, made.rejected)]
        if any(map(is_empty, replies)):
            return Drop("empty completion")
        made = made._replace(chosen=replies[0], rejected=replies[1])
    return made._replace(context=_with_system(row, made.context, where), tools=tools_of(row, where))


def begins_with_asked(reply: Message, context: Sequence[Message]) -> bool:
    """Whether a reply begins with the whole message of the user's that it answers."""
    return context[-1]["role"] == "user" and begins_with(reply["content"], context[-1]["content"])


def _without_asked(reply: Message, context: list[Message]) -> Message:
    return {**reply, "content": without(reply["content"], context[-1]["content"]).lstrip()}


def _refuse_reply_before(prompt: str | list[Message] | None, context: list[Message], where: str) -> None:
    """ValueError where the prompt ends with a reply, and another one would follow."""
    both_end = isinstance(prompt, list) and prompt and prompt[-1]["role"] == context[-1]["role"] == "assistant"
    if both_end and not {"tool_calls", "function_call"} & context[-1].keys():
        raise ValueError(
            f"{where}: the prompt's last message is the assistant's, and a reply would follow it; leave that message "
            "out, or write it in front of the replies"
        )


def refuse_columns_of_others(row: Row, where: str) -> None:
    """ValueError for what stands beside the texts, is a part of what was compared, and is not read."""
    if found := [name for name in MEDIA if not is_missing(row.get(name))]:
        raise ValueError(f"{where}: the row has {found[0]!r}; text alone is read: leave such rows out")


def _with_system(row: Row, context: list[Message], where: str) -> list[Message]:
    """The messages, after the `system` text, or message, of a set that has it in a column of its own. ValueError for
    another message there, and where the messages begin with another one."""
    if is_missing(row.get("system")):
        return context
    given = side(row, "system", where)
    given = [{"role": "system", "content": given}] if isinstance(given, str) else given
    if len(given) != 1 or given[0]["role"] not in _SYSTEM:
        raise ValueError(f"{where}: 'system' must be text or one message of the system's, got {shown(row['system'])}")
    if is_empty(given[0]):
        return context
    if context[0]["role"] not in _SYSTEM:
        return [*given, *context]
    if says(context[0]) != says(given[0]):
        raise ValueError(
            f"{where}: 'system' is {shown(given[0]['content'])}, and the messages begin with that of the system's "
            f"{shown(context[0]['content'])}; leave one of them out"
        )
    return context


_SYSTEM = ("system", "developer")


def _reply(completion: str | list[Message]) -> list[Message]:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def _context(prompt: str | list[Message] | None) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}] if prompt.strip() else []
    return prompt or []


def _text_pair(row: Row, where: str, layout: Layout, prompt: str | None, chosen: str, rejected: str) -> Row | Drop:
    if chosen.strip() == rejected.strip():
        return Drop("identical completions")
    if prompt is None and are_dialogues(chosen, rejected):
        refuse_others(row, where, layout, "slip")
        return hh_pair({"chosen": chosen, "rejected": rejected}, where)
    if prompt is None:
        if layout.prompted:
            refuse_others(row, where, layout, "slip")
            return Drop("no prompt")
        refuse_others(row, where, layout, "any")
        if all(map(_has_other_turns, (chosen, rejected))):
            raise ValueError(
                f"{where}: 'chosen' and 'rejected' are dialogues whose turns do not begin with 'Human:' and "
                f"'Assistant:', got {shown(chosen)}; write them so, or give the prompt in a column of its own"
            )
        if begins_with(chosen, rejected) or begins_with(rejected, chosen):
            return Drop("empty completion")
        prompt, chosen, rejected = inferred(chosen, rejected)
    elif layout.repeated:
        if begins_with(chosen, prompt) and begins_with(rejected, prompt):
            chosen, rejected = (without(text, prompt) for text in (chosen, rejected))
        elif dialogues_hold(prompt, chosen, rejected):
            return hh_pair({"chosen": chosen, "rejected": rejected}, where)
    if not prompt.strip():
        return Drop("empty prompt")
    if not chosen.strip() or not rejected.strip():
        return Drop("empty completion")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def dialogues_hold(prompt: str, chosen: str, rejected: str) -> bool:
    """Whether both texts are dialogues in one of whose shared turns the prompt stands: it is there in other words."""
    if not are_dialogues(chosen, rejected):
        return False
    one, other = turns_of(chosen, rejected)
    said = [text.strip() for (_, text), same in zip(one, other, strict=False) if same[1] == text]
    return prompt.strip() in said


_NO_PROMPT = Drop("empty prompt")


def _conversation(
    prompt: str | list[Message] | None, chosen: list[Message], rejected: list[Message], where: str
) -> Conversation | Drop:
    if not chosen or not rejected:
        return Drop("empty completion")
    if chosen == rejected:
        return Drop("identical completions")
    shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    context = _joined(_context(prompt), chosen[:shared], "'chosen' and 'rejected' begin", where)
    tails = chosen[shared:], rejected[shared:]
    if any(len(tail) > 1 or tail[0]["role"] != "assistant" for tail in tails if tail):
        return Drop("differs by more than one final reply")
    if not context:
        return _NO_PROMPT
    if not all(tail and not is_empty(tail[0]) for tail in tails):
        return Drop("empty completion")
    if says(tails[0][0]) == says(tails[1][0]):
        return Drop("identical completions")
    return Conversation(context, tails[0][0], tails[1][0])


def _joined(context: list[Message], before: list[Message], who: str, where: str) -> list[Message]:
    """The prompt's messages and those that stand before the reply; once, where these have the prompt in them."""
    if not context or not before or before[0]["role"] not in ("system", "developer", "user"):
        return [*context, *before]
    # Some sets have the prompt in both places, and then perhaps a system message in one of them only.
    said = [(one["role"], *says(one)) for one in context]
    if not any([(one["role"], *says(one)) for one in before[i : i + len(said)]] == said for i in range(len(before))):
        if context[0]["role"] == "system" and len(context) > 1:
            return [context[0], *_joined(context[1:], before, who, where)]
        raise ValueError(f"{where}: {who} with messages that are not those of 'prompt'")
    length = 2 * len(said)
    if any([(one["role"], *says(one)) for one in before[i : i + length]] == 2 * said for i in range(len(before))):
        raise ValueError(f"{where}: {who} with the messages of 'prompt' twice; leave one of them out")
    return before


def _rendered(conversation: Conversation, where: str, render: Renderer) -> Row | Drop:
    context, *replies, tools = conversation
    (prompt, chosen), (_, rejected) = (render(context, reply, where, tools) for reply in replies)
    if chosen.strip() == rejected.strip():
        return Drop("replies that the chat template writes alike")
    if not chosen.strip() or not rejected.strip():
        return Drop("empty completion")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "messages": conversation}
