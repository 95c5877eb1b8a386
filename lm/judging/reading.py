"""How a reward model reads what was asked and what was replied: by its own tokenizer, under its own chat template.

The one definition for `lm.score` and for a run whose oracle or reward models have another tokenizer than the policy. A
model that this project trained gets prompt and completion, tokenised apart and joined, and end-of-text, at which it is
read: also a sample that was cut off before its end. Messages are written by its chat template, and without one as
`role: content`. Another's model with a chat template gets the conversation as that writes it, nothing added. What is
longer than the model's positions loses its beginning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lm.config import ControlTokens
from lm.data.control_tokens import LAST, MARK, Names, token_ids
from lm.data.messages import Message, carries
from lm.data.schemas import context_of
from lm.data.templates import Renderer, chat_renderer, plain_chat, templated
from lm.data.tokens import completion_ids, prompt_ids

FORM = 1
"""Raised where the same texts are read as other tokens."""
Ids = list[int]


def role_text(
    messages: Sequence[Message], reply: Message, where: str, tools: list[Any] | None = None
) -> tuple[str, str]:
    """A conversation for a model without a chat template; a `lm.data.templates.Renderer`. ValueError for what only a
    template writes."""
    if carried := [*(["tools"] if tools else []), *carries([*messages, reply])]:
        raise ValueError(
            f"{where}: {carried[0]!r} of messages is written by a chat template, and there is none; give a model that "
            "has one, or leave such rows out"
        )
    return f"{plain_chat(messages, reply, where)[0]}\n\n{reply['role']}:", f" {reply['content']}"


class Said(NamedTuple):
    """A reply and what it replies to."""

    where: str
    """It stands, for messages."""
    prompt: str | list[Message]
    reply: str | Message
    """A message where the prompt is messages."""
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Read:
    """R texts in a model's tokens."""

    prompts: list[Ids]
    completions: list[Ids]
    cut: list[bool]
    """Whether a text was too long, and lost its beginning."""
    unknown: list[bool]
    """Whether a text has characters that the tokenizer reads as its token for the unknown, and so does not tell apart.
    """

    def counts(self) -> dict[str, int]:
        """How many texts there are, and of how many the model reads less than they say."""
        return {"texts": len(self.cut), "cut": sum(self.cut), "unknown": sum(self.unknown)}


class Reader:
    """A reward model's tokenizer, and how it reads with it.

    Args:
        tokenizer: the model's.
        spec: the model's name, for messages.
        ours: whether this project trained the model, or is to train it.
        limit: longest text, tokens; None for any.
        pad: the padding token by the model's config, where the model is another's: transformers reads a reward at the
            last token that is not this one.
        how: control tokens in texts are read, "text" or "control".
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        spec: str,
        *,
        ours: bool,
        limit: int | None = None,
        pad: int | None = None,
        how: ControlTokens = "text",
    ) -> None:
        self.tokenizer, self.spec, self.ours, self.limit, self.pad = tokenizer, spec, ours, limit, pad
        self.names = Names.by(tokenizer, how)
        """What it found of control tokens in texts."""
        template = tokenizer.chat_template is not None
        self.writes_all = template and not ours
        """Whether the chat template writes whole conversations."""
        self.render: Renderer = chat_renderer(tokenizer, spec) if template and ours else role_text
        unknown = tokenizer.unk_token_id
        used = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
        self._unknown = None if unknown in used else unknown

    def check(self, option: str) -> None:
        """ValueError where it is not known how the model reads a completion."""
        if not self.writes_all and self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"{option} {self.spec!r}: its tokenizer has neither a chat template, nor a separator, nor an "
                "end-of-text token; it is not known how the model reads a completion"
            )

    @cached_property
    def digest(self) -> str:
        """What the reading counts as in a key: of the tokenizer with its template, and of how it is used."""
        own = self.tokenizer
        backend = json.loads(own.backend_tokenizer.to_str()) if own.is_fast else own.get_vocab()
        if own.is_fast:  # which change with the texts that were read last
            backend |= {"truncation": None, "padding": None}
        special = {name: str(token) for name, token in own.special_tokens_map.items()}
        content = [FORM, backend, own.chat_template, special, self.ours, self.limit, self.pad, self.names.how]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    # ------------------------------------------------------------ texts

    def conversation(self, messages: Sequence[Message], where: str, tools: list[Any] | None) -> str:
        """All of it by the model's chat template, control tokens marked."""
        text = templated(
            self.tokenizer, self.spec, self.names.mark_all(messages, where), where, self.names.mark_all(tools, where)
        )
        read = self.names.row({"prompt": text}, where, rendered=True)
        assert isinstance(read, dict), "neither dropped nor refused"
        return str(read["prompt"])

    def ids(self, prompts: list[str], completions: list[str]) -> tuple[list[Ids], list[Ids]]:
        """Of marked texts; completions end with end-of-text."""
        return prompt_ids(self.tokenizer, prompts), completion_ids(self.tokenizer, completions)

    def _texts(self, said: Said) -> tuple[str, str]:
        if not isinstance(said.prompt, str):
            assert not isinstance(said.reply, str)
            marked = self.names.mark_all(said.reply, said.where, last=True)
            asked, tools = (self.names.mark_all(each, said.where) for each in (said.prompt, said.tools))
            prompt, completion = self.render(asked, marked, said.where, tools)
        else:
            prompt, completion = said.prompt, str(said.reply)
        both = {"prompt": prompt, "completion": completion}
        read = self.names.row(both, said.where, rendered=not isinstance(said.prompt, str))
        assert isinstance(read, dict), "neither dropped nor refused"
        return read["prompt"], read["completion"]

    def _all(self, said: Said) -> str:
        if isinstance(said.prompt, str):
            reply: Message = {"role": "assistant", "content": str(said.reply).strip()}
            return self.conversation([*context_of(said.prompt), reply], said.where, said.tools)
        assert not isinstance(said.reply, str)
        return self.conversation([*said.prompt, said.reply], said.where, said.tools)

    # ------------------------------------------------------------ tokens

    def read(self, said: Sequence[Said]) -> Read:
        """The texts in the model's tokens; where one is a whole conversation, its last token is the completion.

        Raises:
            ValueError: the chat template refuses messages, or the tokenizer cannot read a text; it says where.
        """
        if self.writes_all:
            rows = token_ids(self.tokenizer, [self._all(one) for one in said])
            sides = [(row[:-1], row[-1:]) for row in rows]
        else:
            texts = [self._texts(one) for one in said]
            sides = self._placed(said, texts)
        unknown = [self._unknown is not None and self._unknown in (*one, *other) for one, other in sides]
        cut = [self.limit is not None and len(one) + len(other) > self.limit for one, other in sides]
        whole = [self._fitting(*side) for side in sides]
        for one, (prompt, completion) in zip(said, whole, strict=True):
            if not prompt or not completion:
                raise ValueError(f"{one.where}: for {self.spec!r} the text has fewer than two tokens to read")
        return Read([prompt for prompt, _ in whole], [completion for _, completion in whole], cut, unknown)

    def _placed(self, said: Sequence[Said], texts: Sequence[tuple[str, str]]) -> list[tuple[Ids, Ids]]:
        """Tokens of marked texts; a ValueError says where the text stands."""
        try:
            return list(zip(*self.ids([one for one, _ in texts], [other for _, other in texts]), strict=True))
        except ValueError:
            for one, (prompt, completion) in zip(said, texts, strict=True):
                try:
                    self.ids([prompt], [completion])
                except ValueError as error:
                    raise ValueError(f"{one.where}, as {self.spec!r} reads it: {error}") from None
            raise

    def pairs(self, chosen: Sequence[Said], rejected: Sequence[Said]) -> Read:
        """The same of the chosen, then of the rejected sides; of whole conversations the completions are what follows
        where the two sides part, so that they can share what is before."""
        read = self.read([*chosen, *rejected])
        if not self.writes_all:
            return read
        rows = [[*one, *other] for one, other in zip(read.prompts, read.completions, strict=True)]
        return Read(*parted(rows), read.cut, read.unknown)

    def _fitting(self, prompt: Ids, completion: Ids) -> tuple[Ids, Ids]:
        """Without its beginning where it is too long, and without padding at its end."""
        row = [*prompt, *completion]
        over = 0 if self.limit is None else max(0, len(row) - self.limit)
        kept = without_padding(row[over:], None if self.ours else self.pad)
        size = max(1, min(len(prompt) - over, len(kept) - 1))
        return kept[:size], kept[size:]


def without_padding(row: Ids, pad: int | None) -> Ids:
    """Up to the last token that is not the padding one, which may be end-of-text."""
    return row if pad is None else row[: max((i for i, token in enumerate(row, 1) if token != pad), default=1)]


def parted(rows: Sequence[Ids]) -> tuple[list[Ids], list[Ids]]:
    """Chosen and then rejected texts, [2N], as prompts, what both sides of a pair begin with, and completions."""
    count = len(rows) // 2
    prompts, completions = [], []
    for one, other in zip(rows, [*rows[count:], *rows[:count]], strict=True):
        most = min(len(one), len(other)) - 1
        size = max(1, next((i for i in range(most) if one[i] != other[i]), most))
        prompts.append(list(one[:size]))
        completions.append(list(one[size:]))
    return prompts, completions


def positions_of(config: PretrainedConfig) -> int | None:
    """Tokens that a model takes, by its config; None where that says nothing."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def longest_input(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens of the longest text, by the model's positions and by its tokenizer, which knows of positions that are not
    for tokens (RoBERTa's first two); unset, it says 1e30."""
    named = tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None
    return min((n for n in (positions_of(config), named) if n is not None), default=None)


def sample_text(tokenizer: PreTrainedTokenizerBase, prompt: Ids, sample: Ids) -> str:
    """What a sample says after its prompt, without the end-of-text that ends it: some tokenizers write a word at the
    start of a text otherwise than inside. Other control tokens are in it by name; tokens that make no whole character,
    or none at all (`MARK`), are U+FFFD."""
    bare = sample[:-1] if sample[-1:] == [tokenizer.eos_token_id] else sample
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before, both = (str(tokenizer.decode(ids, **options)) for ids in (prompt, [*prompt, *bare]))
    text = both[len(before) :] if both.startswith(before) else str(tokenizer.decode(bare, **options))
    return text.replace(MARK, "\ufffd").replace(LAST, "\ufffd")
