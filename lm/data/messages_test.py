"""Messages in the forms that sets have them: one meaning, passed on to the chat template, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lm.data.messages import Conversation, side
from lm.data.prompts import Layout
from lm.data.rows import Row
from lm.data.schemas import Drop, any_conversation, any_pair, preference_pair, preference_reference
from lm.data.templates import chat_renderer, plain_chat
from lm.judging.reward_models import role_text
from lm.models.loading import load_tokenizer

ASK: dict[str, Any] = {"role": "user", "content": "Sky?"}
BLUE, GREEN = ({"role": "assistant", "content": content} for content in ("Blue.", "Green."))
EXPECTED = Conversation([ASK], BLUE, GREEN)


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, "image_url": None} for text in texts]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK, "chosen": BLUE, "rejected": GREEN},
        {"prompt": [{**ASK, "content": parts("Sky?")}], "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": "Sky?", "chosen": {**BLUE, "content": parts("Bl", "ue.")}, "rejected": GREEN},
        {
            "prompt": [{"from": "human", "value": "Sky?"}],
            "chosen": {"from": "gpt", "value": "Blue."},
            "rejected": {"from": "gpt", "value": "Green."},
        },
        {"conversations": [{"from": "human", "value": "Sky?", "weight": None}], "chosen": BLUE, "rejected": GREEN},
        {"messages": [ASK], "chosen": "Blue.", "rejected": "Green."},
        {"prompt": None, "conversation": ASK, "chosen": BLUE, "rejected": GREEN},
        {"chosen": [{"from": "Human", "value": "Sky?"}, BLUE], "rejected": [ASK, GREEN]},
        {"prompt": json.dumps([ASK]), "chosen": json.dumps(BLUE), "rejected": json.dumps(GREEN)},
        {"prompt": [{**ASK, "tool_calls": None, "name": "", "images": []}], "chosen": [BLUE], "rejected": [GREEN]},
    ],
)
def test_one_meaning_of_every_form(row: Row) -> None:
    assert any_conversation(row, "here") == EXPECTED
    pair = preference_pair(row, "here", plain_chat)
    assert isinstance(pair, dict)
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ("\n\nuser: Sky?", "Blue.", "Green.")


def test_a_system_text_in_a_column_of_its_own_is_the_first_message() -> None:
    row = {"system": "Be kind.", "prompt": [ASK], "chosen": BLUE, "rejected": GREEN}
    kind = {"role": "system", "content": "Be kind."}
    assert any_conversation(row, "here") == EXPECTED._replace(context=[kind, ASK])
    assert any_conversation({**row, "prompt": [kind, ASK]}, "here") == EXPECTED._replace(context=[kind, ASK])


def call(**arguments: Any) -> dict[str, Any]:
    function = {"name": "look", "arguments": json.dumps(arguments)}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


TOOLS: list[Any] = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALLS: Row = {"prompt": [ASK], "chosen": [call(at="sky")], "rejected": [call(at="sea")], "tools": TOOLS}
TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content or '' }}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<{{ m.role }}>{{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("scratch:tiny", ["Sky? Blue."] * 9, False)


def test_tools_and_their_calls_reach_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = TEMPLATE
    pair = preference_pair(CALLS, "here", chat_renderer(tokenizer, "tiny"))
    assert isinstance(pair, dict)
    assert pair["prompt"].startswith('tools: [{"type": "function", "function": {"name": "look"')
    assert pair["chosen"] == 'look({"at": "sky"})', "arguments are an object to the template, and not quoted JSON"
    assert pair["rejected"] == 'look({"at": "sea"})'
    again = preference_pair({**CALLS, "tools": json.dumps(TOOLS)}, "here", chat_renderer(tokenizer, "tiny"))
    assert again == pair
    thought = {**CALLS, "chosen": {**BLUE, "reasoning_content": "It is day. "}, "rejected": BLUE, "tools": []}
    pair = preference_pair(thought, "here", chat_renderer(tokenizer, "tiny"))
    assert isinstance(pair, dict)
    assert (pair["chosen"], pair["rejected"]) == ("It is day. Blue.", "Blue.")


@pytest.mark.parametrize(
    ("row", "left"),
    [
        (CALLS, "there are 'tools'"),
        ({**CALLS, "tools": None}, "there are 'tool_calls'"),
        (
            {**CALLS, "chosen": {**BLUE, "reasoning_content": "Day."}, "rejected": BLUE, "tools": None},
            "is 'reasoning_con",
        ),
        ({"prompt": [ASK], "chosen": {**BLUE, "thinking": "Day."}, "rejected": BLUE}, "there is 'thinking'"),
    ],
)
def test_what_the_template_does_not_write_is_refused_by_name(
    row: Row, left: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = PLAIN
    with pytest.raises(
        ValueError, match=f"^line 3: there .*{left[6:]}.*, which the chat template of model 'tiny' does"
    ):
        preference_pair(row, "line 3", chat_renderer(tokenizer, "tiny"))
    with pytest.raises(ValueError, match=r"^line 3: '.*' of messages is written by a chat template, and there is none"):
        preference_pair(row, "line 3", role_text)


@pytest.mark.parametrize("role", ["system", "tool", "developer"])
def test_a_message_that_the_template_leaves_out_is_refused(role: str, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = PLAIN
    row = {"prompt": [{"role": role, "content": "Be kind."}, ASK], "chosen": BLUE, "rejected": GREEN}
    with pytest.raises(ValueError, match=f"^here: the chat template of .* leaves out a message of role '{role}'"):
        preference_pair(row, "here", chat_renderer(tokenizer, "tiny"))
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content | tojson }}")  # otherwise, but there
    row["prompt"][0]["content"] = 'Be "kind".'  # type: ignore[index]
    assert isinstance(preference_pair(row, "here", chat_renderer(tokenizer, "tiny")), dict)


def test_replies_that_a_template_writes_alike_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = PLAIN.replace("{{ m.content }}", "{{ m.content | lower }}")
    row = {"prompt": [ASK], "chosen": BLUE, "rejected": {**BLUE, "content": "blue."}}
    alike = Drop("replies that the chat template writes alike")
    assert preference_pair(row, "here", chat_renderer(tokenizer, "tiny")) == alike


def test_pairs_that_differ_in_what_a_message_carries_are_none_that_are_identical() -> None:
    pair = any_pair(CALLS, "here")
    assert isinstance(pair, dict)
    assert pair["chosen"] != pair["rejected"], "also where no template is named"
    assert any_pair({**CALLS, "rejected": CALLS["chosen"]}, "here") == Drop("identical completions")
    assert any_pair({**CALLS, "rejected": [{**BLUE, "content": None, "tool_calls": TOOLS}]}, "here") != pair


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "narrator", "content": "x"}, "'role' must be one of system, .* got 'narrator'"),
        ({"from": "function_call", "value": "{}"}, "'from' must be one of .*; write the call into 'tool_calls' of an"),
        ({**ASK, "content": [{"type": "image_url", "image_url": "x"}]}, "'content' has a part of type 'image_url'"),
        ({**ASK, "content": [{"type": "tool_use", "id": 1}]}, "part of type 'tool_use'; .*give calls of tools as"),
        ({**ASK, "content": ["Sky?"]}, "'content' has a part of type 'str'; parts of type text are read"),
        ({**ASK, "images": ["a.png"]}, "a message has 'images'; text alone is read"),
        ({**ASK, "content": None}, "'content' must be of type str, got NoneType"),
        ({**ASK, "tool_calls": "look()"}, "'tool_calls' must be a list of objects, got 'look"),
        ({"from": "human", "text": "x"}, "column 'value' is missing"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_other_messages_are_refused_with_the_cure(message: Any, said: str, alone: bool) -> None:
    row = {"prompt": message if alone else [ASK, message], "chosen": BLUE, "rejected": GREEN}
    with pytest.raises(ValueError, match=f"^line 7, prompt: .*{said}"):
        any_pair(row, "line 7")
    with pytest.raises(ValueError, match=f"^line 7, prompt: .*{said}"):
        preference_reference({"prompt": row["prompt"], "completion": "Blue."}, "line 7", plain_chat)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "Sky?", "chosen": "a", "rejected": "b", "images": ["x.png"]},
            "the row has 'images'; text alone is",
        ),
        (
            {"prompt": [ASK], "chosen": BLUE, "rejected": GREEN, "tools": "look"},
            "'tools' must be a list, or JSON of one",
        ),
        (
            {"prompt": str([ASK]), "chosen": "a", "rejected": "b"},
            "'prompt' begins as messages do and is not JSON; write",
        ),
    ],
)
def test_rows_with_more_than_text_are_refused(row: Row, said: str) -> None:
    with pytest.raises(ValueError, match=f"^line 7: {said}"):
        any_pair(row, "line 7")


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "Sky?"}, {"from": "gpt", "value": "Blue."}]},
        {"prompt": "Sky?", "messages": [ASK, BLUE]},
        {"prompt": ASK, "completion": BLUE},
        {"prompt": ASK, "completion": [ASK, BLUE]},
    ],
)
def test_references_have_the_same_forms(row: Row) -> None:
    expected = {"prompt": "\n\nuser: Sky?", "completion": "Blue."}
    assert preference_reference(row, "here", plain_chat) == expected


def test_a_reference_whose_prompt_is_another_is_refused() -> None:
    with pytest.raises(ValueError, match="here: 'messages' begins with messages that are not those of 'prompt'"):
        preference_reference({"prompt": "Sea?", "messages": [ASK, BLUE]}, "here", plain_chat)


def test_messages_written_out_are_known_whichever_key_comes_first() -> None:
    said = [{"role": "user", "content": "Sky?"}]
    assert side({"prompt": '[{"id": 1, "role": "user", "content": "Sky?"}]'}, "prompt", "row 1") == said
    assert side({"prompt": '{"weight": null, "from": "human", "value": "Sky?"}'}, "prompt", "row 1") == said
    for text in ('{"id": 3, "name": "Sky"}', '[{"a": 1}, 2]', "[{'a': 1}]"):
        assert side({"prompt": text}, "prompt", "row 1") == text
    for text in (str([{"id": 1, **said[0]}]), f"array({[{'id': 1, **said[0]}]}, dtype=object)"):
        with pytest.raises(ValueError, match="row 1: 'prompt' begins as messages do and is not JSON"):
            side({"prompt": text}, "prompt", "row 1")


def test_a_system_column_is_read_in_every_form_and_never_dropped() -> None:
    row = {"prompt": [ASK], "chosen": [BLUE], "rejected": [GREEN]}
    told = {"role": "system", "content": "Be kind."}
    for system in ("Be kind.", told, [told], json.dumps(told)):
        assert any_conversation(row | {"system": system}, "row 1") == Conversation([told, ASK], BLUE, GREEN)
        both = row | {"system": system, "prompt": [told, ASK]}
        assert any_conversation(both, "row 1") == Conversation([told, ASK], BLUE, GREEN)
        other = row | {"system": system, "prompt": [{**told, "content": "Be curt."}, ASK]}
        with pytest.raises(ValueError, match=r"row 1: 'system' is 'Be kind\.', and the messages begin .* 'Be curt\.'"):
            any_conversation(other, "row 1")
    for wrong in (ASK, [told, told]):
        with pytest.raises(ValueError, match="row 1: 'system' must be text or one message of the system's"):
            any_conversation(row | {"system": wrong}, "row 1")


def test_no_reply_follows_a_reply() -> None:
    full = [ASK, {"role": "assistant", "content": "Sure,"}]
    row = {"prompt": full, "chosen": [BLUE], "rejected": [GREEN]}
    named = {"conversations": full, "chosen": "Blue.", "rejected": "Green."}
    with pytest.raises(ValueError, match=r"row 1: the prompt's last message is the assistant's.*leave that message"):
        any_conversation(row, "row 1")
    with pytest.raises(ValueError, match="row 1: the prompt's last message is the assistant's"):
        any_conversation(named, "row 1", Layout(prompt="conversations"))
    with pytest.raises(ValueError, match="row 1: the prompt's last message is the assistant's"):
        preference_reference({"prompt": full, "completion": "Blue."}, "row 1", plain_chat)
    more = row | {"chosen": [*full, ASK, BLUE], "rejected": [*full, ASK, GREEN]}
    assert any_conversation(more, "row 1") == Conversation([*full, ASK], BLUE, GREEN)


def test_messages_that_hold_the_prompt_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="row 1: 'chosen' and 'rejected' begin with the messages of 'prompt' twice"):
        any_conversation({"prompt": [ASK], "chosen": [ASK, ASK, BLUE], "rejected": [ASK, ASK, GREEN]}, "row 1")
