"""Schemas of preference sets: a row of each becomes a comparison, as text or as messages, or says why it is none."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lm.config import DataConfig
from lm.data.rows import Row, column, number, shown, unicode_text


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
    dialogues = [_turns(column(row, name, str, where)) for name in ("chosen", "rejected")]
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

Message = dict[str, str]


class Conversation(NamedTuple):
    """Two replies to the same messages."""

    context: list[Message]
    chosen: Message
    rejected: Message


Renderer = Callable[[Sequence[Message], Message, str], tuple[str, str]]
"""(messages, the reply to them, where they stand) -> (prompt, completion)."""


def plain_chat(messages: Sequence[Message], reply: Message, where: str) -> tuple[str, str]:
    """A dialogue as text with the roles named, for what reads replies and has no model; a `Renderer`."""
    return "".join(f"\n\n{message['role']}: {message['content']}" for message in messages), reply["content"]


def chat_renderer(tokenizer: PreTrainedTokenizerBase | None, model: str) -> Renderer:
    """A `Renderer` by the model's chat template. End-of-text is left to the tokenising.

    What it returns raises ValueError where there is no template, or it cannot write the messages so that a prompt is
    the beginning of a prompt with its reply.
    """
    from jinja2 import TemplateError

    def render(messages: Sequence[Message], reply: Message, where: str) -> tuple[str, str]:
        if tokenizer is None or tokenizer.chat_template is None:
            raise ValueError(
                f"{where}: there are messages, and model {model!r} has no chat template to write them by; give a model "
                "that has one, or prompt, chosen and rejected as text"
            )
        try:
            prompt = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template([*messages, reply], tokenize=False)
        except TemplateError as error:
            raise ValueError(f"{where}: the chat template of model {model!r} refuses the messages: {error}") from None
        if not whole.startswith(prompt):
            raise ValueError(
                f"{where}: the chat template of model {model!r} writes a prompt otherwise when its reply follows, so "
                "that the two cannot be told apart; give prompt, chosen and rejected as text"
            )
        return prompt, whole[len(prompt) :].rstrip().removesuffix(tokenizer.eos_token)

    return render


def preference_pair(row: Row, where: str, render: Renderer) -> Row | Drop:
    """One row of a TRL-style set: prompt, chosen and rejected, as text or as messages, with or without the prompt.

    Text stays as written, white space too. Without a prompt it is what both texts begin with, in whole words; or all
    shared turns where they are dialogues of Human and Assistant. Messages go through `render`: the prompt is what comes
    before the one last reply in which the sides differ, whether it stands in `prompt`, in both sides, or in both
    places. `confidence` and `worker` are kept as in `tldr_pair`.
    """
    prompt, chosen, rejected = _sides(row, where)
    if isinstance(prompt, list) or not isinstance(chosen, str) or not isinstance(rejected, str):
        pair = _rendered(_conversation(prompt, _reply(chosen), _reply(rejected), where), where, render)
    elif prompt is None and _turns(chosen) and _turns(rejected):
        pair = hh_pair(row, where)
    else:
        pair = _text_pair(prompt, chosen, rejected)
    return pair if isinstance(pair, Drop) else pair | _annotation(row.get("confidence"), row.get("worker"), where)


def is_tldr(row: Row) -> bool:
    """Whether the columns are those of openai/summarize_from_feedback."""
    return {"info", "summaries", "choice"} <= row.keys()


def any_pair(row: Row, where: str, render: Renderer = plain_chat) -> Row | Drop:
    """A comparison in the schema that its columns say, as text."""
    if is_tldr(row):
        return tldr_pair(row, where, DataConfig.prompt_template)
    return preference_pair(row, where, render)


def any_conversation(row: Row, where: str) -> Conversation | Drop:
    """A comparison in the schema that its columns say, as messages.

    Text is one message of the user's and its replies, or the turns where it is a dialogue of Human and Assistant turns;
    white space around it is left out.
    """
    if not is_tldr(row):
        prompt, chosen, rejected = _sides(row, where)
        if isinstance(prompt, list) or not isinstance(chosen, str) or not isinstance(rejected, str):
            return _conversation(prompt, _reply(chosen), _reply(rejected), where)
    pair = any_pair(row, where)
    if isinstance(pair, Drop):
        return pair
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[speaker], "content": text.strip()} for speaker, text in _turns(pair["prompt"])]
    if turns and turns[-1] == {"role": "assistant", "content": ""}:  # the opening of the reply
        turns.pop()
    context = turns or [{"role": "user", "content": pair["prompt"].strip()}]
    replies = [{"role": "assistant", "content": pair[name].strip()} for name in ("chosen", "rejected")]
    return Conversation(context, *replies)


def preference_reference(row: Row, where: str, render: Renderer) -> Row | Drop:
    """One row of a set of reference completions: prompt and completion, as text or messages, or `messages` alone."""
    prompt: str | list[Message] = [] if "messages" in row else _side(row, "prompt", where)
    completion = _side(row, "messages" if "messages" in row else "completion", where)
    if isinstance(completion, list) or isinstance(prompt, list):
        completion = _reply(completion)
        if not completion or completion[-1]["role"] != "assistant":
            return Drop("no reply at the end")
        context = [*_context(prompt), *completion[:-1]]
        if not context:
            return Drop("empty prompt")
        prompt, completion = render(context, completion[-1], where)
    if not prompt.strip():
        return Drop("empty prompt")
    return {"prompt": prompt, "completion": completion} if completion.strip() else Drop("empty completion")


def _sides(row: Row, where: str) -> tuple[str | list[Message] | None, str | list[Message], str | list[Message]]:
    """Prompt, chosen and rejected, checked."""
    chosen, rejected = (_side(row, name, where) for name in ("chosen", "rejected"))
    prompt = _side(row, "prompt", where) if row.get("prompt") is not None else None
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(f"{where}: 'chosen' and 'rejected' must both be text or both be messages")
    return prompt, chosen, rejected


def _side(row: Row, name: str, where: str) -> str | list[Message]:
    """Text, or messages, checked."""
    if not isinstance(row.get(name), list):
        text: str = column(row, name, str, where)
        return text
    messages = row[name]
    for message in messages:
        for key in ("role", "content"):
            column(message, key, str, f"{where}, {name}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _reply(completion: str | list[Message]) -> list[Message]:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def _context(prompt: str | list[Message] | None) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []


def _text_pair(prompt: str | None, chosen: str, rejected: str) -> Row | Drop:
    if chosen.strip() == rejected.strip():
        return Drop("identical completions")
    if prompt is None:
        shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
        while shared and not (chosen[shared : shared + 1].isspace() and rejected[shared : shared + 1].isspace()):
            shared -= 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt.strip():
        return Drop("empty prompt")
    if not chosen.strip() or not rejected.strip():
        return Drop("empty completion")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _conversation(
    prompt: str | list[Message] | None, chosen: list[Message], rejected: list[Message], where: str
) -> Conversation | Drop:
    if not chosen or not rejected:
        return Drop("empty completion")
    if chosen == rejected:
        return Drop("identical completions")
    shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    context, before = _context(prompt), chosen[:shared]
    if context and before and before[0]["role"] in ("system", "user"):
        # Some sets have the prompt in both places, and then perhaps a system message in one of them only.
        if not any(before[i : i + len(context)] == context for i in range(len(before))):
            raise ValueError(f"{where}: 'chosen' and 'rejected' begin with messages that are not those of 'prompt'")
        context = before
    else:
        context = [*context, *before]
    tails = chosen[shared:], rejected[shared:]
    if any(len(tail) > 1 or tail[0]["role"] != "assistant" for tail in tails if tail):
        return Drop("differs by more than one final reply")
    if not context:
        return Drop("empty prompt")
    if not all(tail and tail[0]["content"].strip() for tail in tails):
        return Drop("empty completion")
    if tails[0][0]["content"].strip() == tails[1][0]["content"].strip():
        return Drop("identical completions")
    return Conversation(context, tails[0][0], tails[1][0])


def _rendered(conversation: Conversation | Drop, where: str, render: Renderer) -> Row | Drop:
    if isinstance(conversation, Drop):
        return conversation
    context, *replies = conversation
    (prompt, chosen), (_, rejected) = (render(context, reply, where) for reply in replies)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
