"""Messages as text: by a model's chat template, or plainly, for what reads replies and has no template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from lm.data.messages import Message, carries, plain, written_out


class Renderer(Protocol):
    """(messages, the reply to them, where they stand, tools) -> (prompt, completion)."""

    def __call__(
        self, messages: Sequence[Message], reply: Message, where: str, tools: list[Any] | None = None
    ) -> tuple[str, str]: ...


def plain_chat(
    messages: Sequence[Message], reply: Message, where: str, tools: list[Any] | None = None
) -> tuple[str, str]:
    """A dialogue as text with the roles named, for what reads replies and has no model; a `Renderer`."""
    return plain(messages, tools), written_out(reply)


def chat_renderer(tokenizer: PreTrainedTokenizerBase | None, model: str) -> Renderer:
    """A `Renderer` by the model's chat template. End-of-text is left to the tokenising.

    What it returns raises ValueError where there is no template, it leaves out a part of the messages, or it cannot
    write them so that a prompt is the beginning of a prompt with its reply.
    """

    def render(
        messages: Sequence[Message], reply: Message, where: str, tools: list[Any] | None = None
    ) -> tuple[str, str]:
        if tokenizer is None or tokenizer.chat_template is None:
            raise ValueError(
                f"{where}: there are messages, and model {model!r} has no chat template to write them by; give a model "
                "that has one (an instruct model), put a chat_template into its tokenizer_config.json, or give prompt, "
                "chosen and rejected as text"
            )
        prompt = _written(tokenizer, model, messages, where, tools, add_generation_prompt=True)
        whole = _written(tokenizer, model, [*messages, reply], where, tools)
        if not whole.startswith(prompt):
            raise ValueError(
                f"{where}: the chat template of model {model!r} writes a prompt otherwise when its reply follows, so "
                "that the two cannot be told apart; give prompt, chosen and rejected as text"
            )
        _check_written(whole, tokenizer, model, [*messages, reply], where, tools)
        return prompt, whole[len(prompt) :].rstrip().removesuffix(tokenizer.eos_token)

    return render


def templated(
    tokenizer: PreTrainedTokenizerBase,
    model: str,
    messages: Sequence[Message],
    where: str,
    tools: list[Any] | None = None,
) -> str:
    """Messages as the chat template of a model writes them. ValueError where it refuses them, or leaves out tools, a
    message, or what a message carries."""
    text = _written(tokenizer, model, messages, where, tools)
    _check_written(text, tokenizer, model, messages, where, tools)
    return text


def _written(
    tokenizer: PreTrainedTokenizerBase,
    model: str,
    messages: Sequence[Message],
    where: str,
    tools: list[Any] | None,
    **options: Any,
) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **options)
    except (TemplateError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(f"{where}: the chat template of model {model!r} refuses the messages: {error}") from None
    return text


def _check_written(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    model: str,
    messages: Sequence[Message],
    where: str,
    tools: list[Any] | None,
) -> None:
    if carried := [*(["tools"] if tools else []), *carries(messages)]:
        source = tokenizer.get_chat_template(tools=tools)
        if left := [name for name in carried if name not in source]:
            raise ValueError(
                f"{where}: there {'are' if left[0].endswith('s') else 'is'} {left[0]!r}, which the chat template of "
                f"model {model!r} does not write; leave such rows out, or give a model whose template does"
            )
    for i, one in enumerate(messages):
        # Templates may write content otherwise, as in JSON; whether it counts at all, another content tells.
        changed = [*messages[:i], {**one, "content": f"{one['content']}0"}, *messages[i + 1 :]]
        if one["content"].strip() not in text and _written(tokenizer, model, changed, where, tools) == text:
            raise ValueError(
                f"{where}: the chat template of model {model!r} leaves out a message of role {one['role']!r}; give a "
                "model whose template has the role, or leave such rows out"
            )
