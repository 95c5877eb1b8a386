"""Control tokens in a set's own texts: "<|im_end|>" in a user's message is ten characters, and ends no turn.

A tokenizer reads the name of a control token as that token, wherever it stands. What a chat template writes is meant
so; what a set's texts contain is not, or cannot be told from what is not. So such names are marked in texts before a
template sees them, and what is marked is tokenised as the characters that it is made of.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lm.config import ControlTokens
from lm.data.messages import Message
from lm.data.rows import Row, places, shown
from lm.data.schemas import Drop
from lm.data.templates import Renderer

MARK, LAST = "\ufdd0", "\ufdd1"
"""What stands before each character of what is marked, and after the last. Unicode has them for such uses: they are no
characters."""
_MARKED = re.compile(f"(?:{MARK}[^{MARK}{LAST}])+{LAST}")
COMPLETIONS = ("completion", "chosen", "rejected")
TEXTS = ("prompt", *COMPLETIONS)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The names that it reads as tokens which no text contains: beginning and end, turns, padding and the like; also
    those that are added without being called special, and that its chat template writes between messages."""
    added = tokenizer.added_tokens_decoder.values()
    between = _between_messages(tokenizer)
    special = {each.content for each in added if each.special or (each.content.strip() and each.content in between)}
    return sorted(special | {str(token) for token in tokenizer.all_special_tokens})


def _between_messages(tokenizer: PreTrainedTokenizerBase) -> str:
    """What its chat template writes around two messages; nothing where it has none, or one that refuses them."""
    if tokenizer.chat_template is None:
        return ""
    try:
        messages = [{"role": role, "content": "."} for role in ("user", "assistant")]
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # jinja's of each template its own; whoever renders messages says it
        return ""


class Names:
    """How control tokens in a set's own texts are read, and what was found of them.

    A prompt that begins with beginning-of-text, and a completion that ends with end-of-text, have one each already:
    these are read as what they are.

    Args:
        names: of the control tokens; those of one character are text.
        how: as of `lm.config.DataConfig.control_tokens`.
        begin: name of beginning-of-text.
        end: name of end-of-text.
    """

    def __init__(
        self, names: Iterable[str], how: ControlTokens, *, begin: str | None = None, end: str | None = None
    ) -> None:
        longest_first = sorted({name for name in names if len(name) > 1}, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._begins = {name[0] for name in longest_first}
        self.how, self._begin, self._end = how, begin, end
        self.found: dict[str, set[str]] = {}
        """Where a row stands -> names in it, of rows that have some."""
        self.rows, self.written = 0, 0
        """Rows, and those whose prompt is text that begins with one, as chat templates write it."""
        self.messages: Sequence[Message] | None = None
        """What the row that was read last asks, where that is messages."""

    @classmethod
    def by(cls, tokenizer: PreTrainedTokenizerBase, how: ControlTokens) -> Names:
        """Of what this tokenizer reads as control tokens."""
        begin, end = tokenizer.bos_token, tokenizer.eos_token
        return cls(control_tokens(tokenizer), how, begin=begin, end=end)

    def reading(
        self, convert: Callable[[Row, str, Renderer], Row | Drop], render: Renderer
    ) -> Callable[[Row, str], Row | Drop]:
        """A way to read rows, whose texts then have their control tokens marked.

        Args:
            convert: (row, where it stands, renderer) -> its texts.
            render: how messages become text.
        """

        def marked(
            messages: Sequence[Message], reply: Message, where: str, tools: list[Any] | None = None
        ) -> tuple[str, str]:
            self.messages = messages
            asked, answered = self.mark_all(messages, where), self.mark_all(reply, where, last=True)
            return render(asked, answered, where, self.mark_all(tools, where))

        def read(row: Row, where: str) -> Row | Drop:
            self.messages = None
            pair = convert(row, where, marked)
            return pair if isinstance(pair, Drop) else self.row(pair, where, rendered=self.messages is not None)

        return read

    def row(self, pair: Row, where: str, rendered: bool) -> Row | Drop:
        """A pair or a reference with its control tokens marked, or as they were where they are to be read as such.

        Args:
            pair: its texts.
            where: it stands.
            rendered: whether the texts are messages that were marked before; if not, they are the set's own.

        Raises:
            ValueError: where control tokens are refused.
        """
        texts = {name: pair[name] for name in TEXTS if name in pair}
        self.rows += 1
        if not rendered:
            texts = {name: self._mark(text, name, where) for name, text in texts.items()}
            prompt = texts["prompt"].removeprefix(self._begin or "")
            self.written += prompt.lstrip().startswith(MARK)
        found = {name for text in texts.values() for name in _names_in(text)}
        if not found:
            return pair
        if self.how == "refuse":
            raise ValueError(
                f"{where}: {', '.join(sorted(found))} in a text, which the tokenizer reads as control tokens; set "
                'data.control_tokens to "text" to read them as the characters that they are made of, to "drop" to '
                'leave such rows out, or to "control" where texts were written by a chat template'
            )
        if self.how == "drop":
            return Drop("control tokens in a text")
        self.found.setdefault(where, set()).update(found)
        return pair | ({name: unmarked(text) for name, text in texts.items()} if self.how == "control" else texts)

    def settle(self, path: str) -> None:
        """After all rows. ValueError where it is not said how they are to be read, and most look as if a chat template
        had written them."""
        if self.how == "auto" and 2 * self.written > self.rows:
            where, names = next(iter(self.found.items()))
            raise ValueError(
                f"{path}: {self.written:,} of {self.rows:,} prompts are text that begins with a control token "
                f"({where}: {', '.join(sorted(names))}), as if a chat template had written it; set "
                'data.control_tokens to "control" to read them so, or to "text" to read them as characters'
            )

    def report(self) -> dict[str, Any] | None:
        """Rows that have control tokens, where the first of them stand, and rows by token; None of none."""
        if not self.found:
            return None
        return {
            "read_as": "control" if self.how == "control" else "text",
            "rows": len(self.found),
            "first": list(self.found)[:3],
            "tokens": dict(sorted(Counter(name for names in self.found.values() for name in names).items())),
        }

    def notes(self) -> list[str]:
        """The same in words, a line where there is something to say."""
        if (found := self.report()) is None:
            return []
        names = ", ".join(f"{token} in {rows:,}" for token, rows in found["tokens"].items())
        read_as = "control tokens" if self.how == "control" else "characters"
        return [
            f"{found['rows']:,} rows name control tokens in their texts ({names}), read as {read_as} "
            f"({places(found['first'], found['rows'])})"
        ]

    def _mark(self, text: str, column: str, where: str) -> str:
        _check(text, where)
        if column == "prompt":
            begin = self._begin if self._begin and text.startswith(self._begin) else ""
            return begin + self._marked(text[len(begin) :])
        return self._but_end(text)

    def mark_all(self, value: Any, where: str, *, last: bool = False) -> Any:
        """All texts of messages, but for end-of-text at the end of the last."""
        if isinstance(value, str):
            _check(value, where)
            return self._but_end(value) if last else self._marked(value)
        if isinstance(value, Mapping):
            return {name: self.mark_all(item, where, last=last) for name, item in value.items()}
        return [self.mark_all(item, where, last=last) for item in value] if isinstance(value, list | tuple) else value

    def prompt(self, messages: Sequence[Message], render: Renderer, where: str) -> str:
        """Messages that a reply is asked for, as text with what control tokens they spell marked. ValueError as of the
        renderer."""
        return render(self.mark_all(list(messages), where), {"role": "assistant", "content": "."}, where)[0]

    def _but_end(self, text: str) -> str:
        bare = text.rstrip()
        if not self._end or not bare.endswith(self._end):
            return self._marked(text)
        return self._marked(bare.removesuffix(self._end)) + self._end + text[len(bare) :]

    def _marked(self, text: str) -> str:
        if not any(character in text for character in self._begins):  # as of most texts; the names take far longer
            return text
        return self._names.sub(lambda found: "".join(MARK + character for character in found[0]) + LAST, text)


def _check(text: str, where: str) -> None:
    if MARK in text or LAST in text:
        raise ValueError(f"{where}: U+FDD0 or U+FDD1, which are no characters, in {shown(text)}")


def unmarked(text: str) -> str:
    """The text as it was."""
    return text.replace(MARK, "").replace(LAST, "")


def _names_in(text: str) -> list[str]:
    """What is marked."""
    return [unmarked(found) for found in _MARKED.findall(text)] if MARK in text else []


# ---------------------------------------------------------------- tokenising


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, nothing put before or after them; what is marked is read as characters.

    Raises ValueError where the tokenizer cannot read it so.
    """
    plain = [text for text in texts if MARK not in text]
    ids_alone = {"return_attention_mask": False, "return_token_type_ids": False}
    read = iter(tokenizer(plain, add_special_tokens=False, **ids_alone)["input_ids"] if plain else [])
    return [_with_marked(tokenizer, text) if MARK in text else next(read) for text in texts]


def _with_marked(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    special = sorted(control_tokens(tokenizer), key=len, reverse=True)
    added = {each.content: each for each in tokenizer.added_tokens_decoder.values()}
    space = r"\s*"  # which some control tokens take in
    taken = (
        (space if name in added and added[name].lstrip else "")
        + re.escape(name)
        + (space if name in added and added[name].rstrip else "")
        for name in special
    )
    names = re.compile(f"({'|'.join(taken)})")

    def read(piece: str, before: str = "", **options: Any) -> list[int]:
        ids, lead = (
            tokenizer(one, add_special_tokens=False, **options)["input_ids"] if one else []
            for one in (before + piece, before)
        )
        # Where both grow together, there is no telling them apart.
        own: list[int] = ids[len(lead) :] if ids[: len(lead)] == lead else read(piece, **options)
        return own

    def joined(pieces: Sequence[str], before: str) -> list[int]:
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            if i % 2:
                ids.append(tokenizer.convert_tokens_to_ids(piece.strip()))
            elif piece:
                own = {"split_special_tokens": True} if MARK in piece else {}
                ids += read(unmarked(piece), before if i else "", **own)
        return ids

    # A text is read in the pieces between its control tokens. Some tokenizers put a space before the first word of what
    # they are given, so for them a piece from inside is read after a line's end. The whole text tells which is right.
    whole = unmarked(text)
    expected = read(whole)
    before = next((lead for lead in ("", "\n") if joined(names.split(whole), lead) == expected), None)
    ids = [] if before is None else joined(names.split(text), before)
    control = set(tokenizer.convert_tokens_to_ids(special)) - {tokenizer.unk_token_id}
    meant = sum(name.strip() != tokenizer.unk_token for name in names.split(text)[1::2])
    if before is None or sum(token in control for token in ids) != meant:
        raise ValueError(
            f"the tokenizer cannot read {', '.join(_names_in(text))} in a text as characters; set data.control_tokens "
            'to "drop" to leave such rows out'
        )
    return ids
