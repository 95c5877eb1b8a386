"""What is decided over a whole set: where its prompts stand, what is taken off, and what every command says of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from lm.config import BiasConfig, DataConfig
from lm.data.lengths import bias_file
from lm.data.messages import Conversation
from lm.data.prompts import Layout
from lm.data.rows import Row, left_out, like, places
from lm.data.schemas import Drop, any_conversation, any_pair, hh_pair, plain_chat, preference_reference
from lm.data.sets import survey
from lm.data.tokens import Loaded, load
from lm.studies.diagnosis import read

ASK = {"role": "user", "content": "Sky?"}
BLUE, GREEN = ({"role": "assistant", "content": content} for content in ("Blue.", "Green."))


def write(folder: Path, rows: Iterable[Any]) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def loaded(folder: Path, rows: Iterable[Row], **options: Any) -> Loaded:
    return load(DataConfig(**{"kind": "preferences", "path": write(folder, rows), **options}), 0, folder)


def texts(made: Loaded) -> list[tuple[str, str, str]]:
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in made.preferences]


ALIKE = {"chosen": "It is a yes", "rejected": "It is a no"}


def pairs(count: int = 3, **columns: Any) -> list[Row]:
    """Sides that begin alike, and other columns, with the number in them."""
    return [{**{name: value.format(i) for name, value in columns.items()}, **ALIKE} for i in range(count)]


# ---------------------------------------------------------------- the column of the prompts


@pytest.mark.parametrize(
    ("name", "close"),
    [
        *(
            (name, True)
            for name in ("Prompt", "promt", "PROMPTS", "prompt_text", "user_prompt", "question", "Question")
        ),
        *((name, True) for name in ("instruction", "input", "query", "userQuery", "conversation-context")),
        *((name, False) for name in ("text", "document", "abstract")),
    ],
)
def test_a_prompt_under_another_name_is_not_ignored(name: str, close: bool, tmp_path: Path) -> None:
    rows = [{**row, name: f"Why {i}?"} for i, row in enumerate(pairs(id="x{}", source="web"))]
    with pytest.raises(
        ValueError, match=r"pairs.jsonl, line 1: there is no 'prompt', but column '.*data\.prompt"
    ) as said:
        loaded(tmp_path, rows)
    assert (f"is {name!r} meant to be it?" in str(said.value)) == close
    for way in (
        read,
        lambda path: bias_file(path, tmp_path / "out.jsonl", BiasConfig(rho=0.5), seed=0),
    ):
        with pytest.raises(ValueError, match="line 1: there is no 'prompt', but column"):
            way(write(tmp_path, rows))
    expected = [(f"Why {i}?", "It is a yes", "It is a no") for i in range(3)]
    assert texts(loaded(tmp_path, rows, prompt=name)) == expected
    again = read(write(tmp_path, rows), prompt=name).again()
    assert [row["prompt"] for _, row in again] == [prompt for prompt, *_ in expected]


def test_a_prompt_is_inferred_where_nothing_else_may_hold_it_and_that_is_said(tmp_path: Path) -> None:
    plain = loaded(tmp_path, pairs(id="x{}", source="web", chosen_model="m", score="0.5"))
    assert texts(plain) == [("It is a", " yes", " no")] * 3
    assert [note.partition(" (")[0] for note in plain.notes["preferences"]] == [
        "3 of 3 rows without a prompt have as prompt what both sides begin with, in whole words",
        "column 'score' looks like a label and is not read; is 'scores' meant to be it?",
    ]
    asked = loaded(tmp_path, pairs(question="Why {}?"), prompt="inferred")
    assert texts(asked) == texts(plain)
    assert asked.notes["preferences"][1:] == ["not read: columns question (3 rows)"]
    other = loaded(tmp_path, pairs(question="Why {}?", prompt="Never"), prompt="question")
    assert other.notes["preferences"] == ["not read: columns prompt (3 rows)"]


def test_a_prompt_that_is_named_and_not_there_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 1: column 'Query' is missing, .* is 'query' meant to be it\?"):
        loaded(tmp_path, pairs(query="Why {}?"), prompt="Query")
    with pytest.raises(ValueError, match=r"line 1: data\.prompt is 'inferred', and the row has a 'prompt'"):
        loaded(tmp_path, pairs(prompt="Why {}?"), prompt="inferred")
    for wrong in ({"kind": "hh", "prompt": "query"}, {"kind": "preferences", "prompt": ""}):
        with pytest.raises(ValueError, match=r"DataConfig.prompt must be \"auto\", \"inferred\" or a column's name"):
            DataConfig(path="pairs.jsonl", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pairs.jsonl: the prompts of 'hh' stand where they do; .*'query' goes"):
        read(write(tmp_path, pairs()), kind="hh", prompt="query")


@pytest.mark.parametrize("empty", [{"prompt": None}, {}, {"prompt": ""}])
def test_no_prompt_is_made_up_for_a_row_of_a_set_that_has_them(empty: Row, tmp_path: Path) -> None:
    rows = [*pairs(2, prompt="Why {}?"), {**pairs(1)[0], **empty}]
    made = loaded(tmp_path, rows)
    assert [prompt for prompt, *_ in texts(made)] == ["Why 0?", "Why 1?"]
    (count,) = made.dropped["preferences"].values()
    assert count == 1
    assert list(made.first["preferences"].values()) == [[f"{tmp_path}/pairs.jsonl, line 3"]]


def test_a_slip_in_one_row_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="line 3: there is no 'prompt', but column 'pormpt'; is 'pormpt' meant to be it"
    ):
        loaded(tmp_path, [*pairs(2, prompt="Why {}?"), *pairs(1, pormpt="Why?")])
    with pytest.raises(
        ValueError, match=r"line 3: column 'rejected' is missing, .*is 'rejected_response' meant to be it"
    ):
        loaded(tmp_path, [*pairs(2, prompt="a"), {"prompt": "a", "chosen": "b", "rejected_response": "c"}])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("Chosen", "Rejected"), r"is 'Chosen' meant to be 'chosen'\?; is 'Rejected' meant to be 'rejected'\?"),
        (("response_chosen", "response_rejected"), "is 'response_chosen' meant to be 'chosen'"),
        (("winner", "loser"), r"is 'winner' meant to be 'chosen'\?; is 'loser' meant to be 'rejected'\?"),
        (
            ("chosen", "dispreferred_response"),
            r"column 'rejected' is missing.*is 'dispreferred_response' meant to be it\?",
        ),
        (("preferred", "rejected"), r"column 'chosen' is missing, .*; is 'preferred' meant to be it\?"),
    ],
)
def test_sides_under_other_names_are_named(columns: tuple[str, str], message: str, tmp_path: Path) -> None:
    row = {"prompt": "Why?", columns[0]: "a", columns[1]: "b", "margin": 1.0}
    with pytest.raises(ValueError, match=f"pairs.jsonl, line 1: .*{message}"):
        read(write(tmp_path, [row]))


def test_columns_that_are_like_a_name_come_nearest_first() -> None:
    assert like("prompt", ["question", "prompt_text", "promt", "Prompt", "chosen"]) == [
        *("Prompt", "prompt_text", "promt", "question")
    ]
    assert like("rejected", ["rejected_reward", "score_rejected"]) == [], "these are rewards"
    assert like("completion", ["prompt", "id"]) == []


def test_messages_without_their_prompt_are_refused_where_a_column_may_be_it(tmp_path: Path) -> None:
    alone = {"chosen": [BLUE], "rejected": [GREEN]}
    with pytest.raises(ValueError, match="line 1: there is no 'prompt', but column 'question'"):
        loaded(tmp_path, [{"question": "Sky?", **alone}])
    assert texts(loaded(tmp_path, [{"question": "Sky?", **alone}], prompt="question"))[0][0] == "\n\nuser: Sky?"
    whole = {"chosen": [ASK, BLUE], "rejected": [ASK, GREEN]}
    made = loaded(tmp_path, [{"topic": "colours", **whole}])  # nothing is invented: the messages have the prompt
    assert texts(made)[0][0] == "\n\nuser: Sky?"
    assert made.notes["preferences"] == ["not read: columns topic (1 rows)"]
    with pytest.raises(ValueError, match="line 1: there is no 'prompt', but column 'Prompt'"):
        loaded(tmp_path, [{"Prompt": "Sea?", **whole}])


# ---------------------------------------------------------------- a prompt in front of both sides


def doubled(count: int, **every: Any) -> list[Row]:
    """Rows of which both sides begin with the prompt."""
    return [{"prompt": f"Q{i}?\n", "chosen": f"Q{i}? Yes", "rejected": f"\nQ{i}?\nNo", **every} for i in range(count)]


def test_a_prompt_that_all_sides_begin_with_is_taken_off(tmp_path: Path) -> None:
    made = loaded(tmp_path, [*doubled(19), {"prompt": "Q?", "chosen": "Yes", "rejected": "No"}])
    assert texts(made) == [*((f"Q{i}?\n", " Yes", "\nNo") for i in range(19)), ("Q?", "Yes", "No")]
    (note,) = made.notes["preferences"]
    assert note == (
        "in 19 of 20 rows both sides begin with the prompt, which is taken off there (not in "
        f"{tmp_path}/pairs.jsonl, line 20)"
    )
    assert [row["chosen"] for _, row in read(write(tmp_path, doubled(4))).again()] == [" Yes"] * 4


def test_where_few_begin_with_it_that_is_chance_and_said(tmp_path: Path) -> None:
    rows = [{"prompt": f"P{i}", "chosen": "Yes", "rejected": "No"} for i in range(19)]
    made = loaded(tmp_path, [*rows, *doubled(1)])
    assert texts(made)[-1] == ("Q0?\n", "Q0? Yes", "\nQ0?\nNo")
    (note,) = made.notes["preferences"]
    assert note.startswith("in 1 of 20 rows both sides begin with the prompt, which stays, as chance (")
    assert note.endswith("line 20)")


def test_a_word_that_goes_on_is_another_word(tmp_path: Path) -> None:
    rows = [{"prompt": "Sky", "chosen": "Skyline", "rejected": "Skylark"}]
    made = loaded(tmp_path, rows)
    assert (texts(made), made.notes["preferences"]) == ([("Sky", "Skyline", "Skylark")], [])


def test_a_mixed_set_is_refused_with_a_line_of_either_kind(tmp_path: Path) -> None:
    rows = [{"prompt": f"P{i}", "chosen": "Yes", "rejected": "No"} for i in range(3)]
    with pytest.raises(ValueError, match=r"in 3 of 6 rows both sides begin .*line 4\), in the others not .*line 1\)"):
        loaded(tmp_path, [*rows, *doubled(3)])
    with pytest.raises(ValueError, match=r"in 3 of 4 rows 'rejected' alone begins with the prompt .*line 1, line 2"):
        loaded(tmp_path, [*({**row, "chosen": "Yes"} for row in doubled(3)), rows[0]])


def test_a_prompt_that_stands_in_both_dialogues_is_not_doubled(tmp_path: Path) -> None:
    before = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: "
    rows = [
        {"prompt": f"Q{i}?", **{s: f"{before}Q{i}?\n\nAssistant: I say {s}" for s in ("chosen", "rejected")}}
        for i in range(3)
    ]
    made = loaded(tmp_path, rows)
    assert texts(made)[1] == (f"{before}Q1?\n\nAssistant:", " I say chosen", " I say rejected")
    assert made.notes["preferences"] == ["in 3 of 3 rows both sides begin with the prompt, which is taken off there"]


def test_a_reference_that_begins_with_its_prompt_loses_it(tmp_path: Path) -> None:
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps({"Q": f"Q{i}?", "completion": f"Q{i}? Yes"}) + "\n" for i in range(3)))
    rows = [{"Q": "a", "chosen": "b", "rejected": "c"}]
    made = loaded(tmp_path, rows, prompt="Q", sft_path=str(path))
    assert made.references["prompt"][:] == ["Q0?", "Q1?", "Q2?"]
    assert made.references["completion"][:] == [" Yes"] * 3
    assert made.notes["references"] == ["in 3 of 3 rows the completion begins with the Q, which is taken off there"]
    with pytest.raises(ValueError, match=r"sft.jsonl, line 1: column 'prompt' is missing"):
        loaded(tmp_path, pairs(prompt="a"), sft_path=str(path))


# ---------------------------------------------------------------- dialogues


def test_dialogues_need_no_blank_line_at_their_start() -> None:
    usual = {side: f"\n\nHuman: Hi\n\nAssistant: I think {side}" for side in ("chosen", "rejected")}
    expected = hh_pair(usual, "here")
    assert expected == {
        "prompt": "\n\nHuman: Hi\n\nAssistant:",
        "chosen": " I think chosen",
        "rejected": " I think rejected",
    }
    for change in (
        lambda text: text.strip(),
        lambda text: f"\n{text}",
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.strip().replace("\n\n", "\n"),
        lambda text: text.strip() if "chosen" in text else text,
        lambda text: f" \n{text}",
    ):
        assert hh_pair({side: change(text) for side, text in usual.items()}, "here") == expected


def test_a_reply_is_not_cut_inside(tmp_path: Path) -> None:
    """Whichever way such dialogues are read."""
    tail = "a list:\nHuman: a person\nAssistant: a machine"
    rows = [{side: f"Human: Hi\n\nAssistant: I think {tail} {side}" for side in ("chosen", "rejected")}]
    for kind in ("hh", "preferences"):
        (found,) = texts(loaded(tmp_path, rows, kind=kind))
        assert found == ("\n\nHuman: Hi\n\nAssistant:", f" I think {tail} chosen", f" I think {tail} rejected")
    story = [{side: f"Once.\n\nHuman: Hi\n\nAssistant: I think {side}" for side in ("chosen", "rejected")}]
    made = loaded(tmp_path, story)
    assert made.dropped["preferences"] == {"not a dialogue of Human and Assistant turns": 1}


# ---------------------------------------------------------------- what is said


def test_the_first_rows_of_each_reason_are_named(tmp_path: Path) -> None:
    bad = {"prompt": "a", "chosen": "b", "rejected": "b"}
    rows = [bad, {"prompt": "a", "chosen": "b", "rejected": "c"}, bad, {**bad, "prompt": " "}, bad, bad]
    rows[3] = {"prompt": " ", "chosen": "b", "rejected": "c"}
    made = loaded(tmp_path, rows)
    at = f"{tmp_path}/pairs.jsonl, line"
    assert made.first["preferences"] == {
        "identical completions": [f"{at} 1", f"{at} 3", f"{at} 5"],
        "empty prompt": [f"{at} 4"],
    }
    assert left_out(made.dropped["preferences"], made.first["preferences"]) == [
        "left out: 4 rows, identical completions",
        f"  first: {at} 1, line 3, line 5, ...",
        "left out: 1 rows, empty prompt",
        f"  first: {at} 4",
    ]
    assert places(["a, line 1", "b, line 1", "b, line 2"], 3) == "a, line 1, b, line 1, line 2"


def test_forms_that_are_mixed_and_keys_that_are_not_read_are_said(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"prompt": "Sky?", "chosen": "a", "rejected": "b", "topic": "colours"},
        {"prompt": [{**ASK, "stars": 5}], "chosen": [BLUE], "rejected": [GREEN]},
    ]
    forms, columns, keys = loaded(tmp_path, rows).notes["preferences"]
    assert forms.startswith("rows of two forms, 1 of text (")
    assert "1 of messages (" in forms
    assert columns == "not read: columns topic (1 rows)"
    assert keys == "not read: keys of messages stars (1 rows)"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source", "Guten Morgen, Nummer {}"),
        ("user_choice_text", "What is {}?"),
        ("text_to_label", "Sort this thing {}"),
        ("category", "Which animal is number {}?"),
        ("problem", "3-{}"),
        ("context", ["Hi {}", "Hello"]),
        ("input", {"question": "What is {}?"}),
        ("data", {"turns": [{"text": "What is {}?"}]}),
    ],
)
def test_no_prompt_is_made_up_beside_a_column_that_may_be_it(tmp_path: Path, name: str, value: Any) -> None:
    rows = [ALIKE | {name: json.loads(json.dumps(value).replace("{}", str(i)))} for i in range(4)]
    with pytest.raises(ValueError, match=f"there is no 'prompt', but column '{name}'"):
        loaded(tmp_path, rows)


@pytest.mark.parametrize(
    "columns",
    [{"source": "Open Assistant"}, {"id": "a-{}"}, {"score": "3"}, {"when": "2023-01-0{}"}, {"date": "May {} 2023"}],
)
def test_what_is_about_a_row_is_no_prompt(tmp_path: Path, columns: Row) -> None:
    rows = [ALIKE | json.loads(json.dumps(columns).replace("{}", str(i))) for i in range(4)]
    assert {prompt for prompt, *_ in texts(loaded(tmp_path, rows))} == {"It is a"}


def reply_after(form: str, reply: str, i: int) -> Any:
    said = f"What is {i}? {reply}"
    return said if form == "text" else [{"role": "assistant", "content": said}]


@pytest.mark.parametrize(("prompt", "form"), [("messages", "text"), ("text", "messages"), ("messages", "messages")])
def test_a_prompt_that_replies_to_messages_begin_with_is_taken_off(prompt: str, form: str) -> None:
    asked = [f"What is {i}?" for i in range(4)]
    rows = [
        {
            "prompt": ask if prompt == "text" else [{"role": "user", "content": ask}],
            "chosen": reply_after(form, "One.", i),
            "rejected": reply_after(form, "None.", i),
        }
        for i, ask in enumerate(asked)
    ]
    found = survey(((f"row {i}", row) for i, row in enumerate(rows)), "pairs")
    assert "in 4 of 4 rows both sides begin with the prompt, which is taken off there" in found.notes
    for row, ask in zip(rows, asked, strict=True):
        made = any_conversation(row, "row", found.layout)
        assert isinstance(made, Conversation)
        assert made.context == [{"role": "user", "content": ask}]
        assert (made.chosen["content"], made.rejected["content"]) == ("One.", "None.")
    mixed = rows + [row | {"chosen": "One.", "rejected": "None."} for row in rows]
    with pytest.raises(ValueError, match="in 4 of 8 rows both sides begin with the 'prompt'"):
        survey(((f"row {i}", row) for i, row in enumerate(mixed)), "pairs")
    references = [("row", {"prompt": row["prompt"], "completion": row["chosen"]}) for row in rows]
    layout = survey(references, "references", kind="references").layout
    for where, row in references:
        made_reference = preference_reference(row, where, plain_chat, layout)
        assert isinstance(made_reference, dict)
        assert made_reference["completion"].strip() == "One."


@pytest.mark.parametrize(
    ("human", "assistant"),
    [("human", "assistant"), ("HUMAN", "ASSISTANT"), ("Human ", "Assistant "), ("user", "AI"), ("**User", "**Bot")],
)
def test_no_prompt_is_inferred_of_dialogues_in_another_spelling(human: str, assistant: str) -> None:
    start = f"\n\n{human}: Sky?\n\n{assistant}: The"
    for layout in (Layout(), Layout(prompt="inferred")):
        with pytest.raises(ValueError, match="row 1: 'chosen' and 'rejected' are dialogues whose turns do not begin"):
            any_pair({"chosen": f"{start} blue", "rejected": f"{start} green"}, "row 1", layout=layout)


@pytest.mark.parametrize("longer", ["What is it? Yes", " What is it?\nYes"])
def test_a_text_that_the_other_begins_with_is_an_empty_completion(longer: str) -> None:
    for row in ({"chosen": longer, "rejected": "What is it?"}, {"chosen": "What is it? ", "rejected": longer}):
        assert any_pair(row, "row 1") == Drop("empty completion")
