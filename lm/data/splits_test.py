"""Splits: one for all ways to write what was asked, a set's own where they are wanted, and what stands in several."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.config import DataConfig, WorldConfig
from lm.data.rows import Row, write_rows
from lm.data.schemas import Message
from lm.data.splits import letters, named, opening, own_split, split_of, why_empty
from lm.data.tokens import Loaded, load, standing_twice
from lm.data.world import generate

SHARES = {"valid_fraction": 0.2, "test_fraction": 0.3}


def pairs(path: Path, rows: Iterable[Row]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, rows)
    return str(path)


def read(folder: Path, rows: Iterable[Row], *, render: Any = None, seed: int = 0, **options: Any) -> Loaded:
    folder.mkdir(parents=True, exist_ok=True)
    config = DataConfig(**{"kind": "preferences", "path": pairs(folder / "p.jsonl", rows), **SHARES, **options})
    return load(config, seed, folder, **({} if render is None else {"render": render}))


def text(prompt: str, i: int = 0, **more: Any) -> Row:
    return {"prompt": prompt, "chosen": f" yes {i}", "rejected": " no", **more}


def chat(*turns: str, system: str | None = None) -> Row:
    before = [] if system is None else [{"role": "system", "content": system}]
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    reply = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    return {"prompt": [*before, *messages], **reply}


def dialogue(*turns: str) -> Row:
    shared = "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))
    return {side: f"{shared}\n\nAssistant: {side}" for side in ("chosen", "rejected")}


QUESTIONS = [f"What is the colour of thing {i}?" for i in range(60)]
WAYS: dict[str, Callable[[str], Row]] = {
    "as it is": text,
    "a line's end behind it": lambda question: text(f"{question}\n"),
    "spaces": lambda question: text(f"  {question.replace(' ', '   ')} "),
    "capitals": lambda question: text(question.upper()),
    "full-width letters": lambda question: text(question.replace("W", "\uff37")),
    "a message": chat,
    "a longer conversation": lambda question: chat(question, "Red.", "Sure?"),
    "a dialogue": dialogue,
    "a longer dialogue": lambda question: dialogue(question, "Red.", "Sure?"),
    "a dialogue as the prompt": lambda question: text(f"\n\nHuman: {question}\n\nAssistant:"),
}


@pytest.fixture(scope="module")
def as_it_is(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    splits: list[str] = read(tmp_path_factory.mktemp("plain"), map(text, QUESTIONS)).preferences["split"][:]
    assert min(Counter(splits).values()) > 5
    assert len(set(splits)) == 3
    return splits


@pytest.mark.parametrize("way", WAYS)
def test_a_question_is_in_one_split_however_it_is_written(way: str, as_it_is: list[str], tmp_path: Path) -> None:
    assert read(tmp_path, map(WAYS[way], QUESTIONS)).preferences["split"][:] == as_it_is


@pytest.mark.parametrize("made_of", ["the date: {}", "{} today", "<{}>"])
def test_no_template_moves_a_prompt(made_of: str, as_it_is: list[str], tmp_path: Path) -> None:
    def render(messages: Any, reply: Message, where: str, *_: Any, **__: Any) -> tuple[str, str]:
        return made_of.format(messages), reply["content"]

    found = read(tmp_path, map(chat, QUESTIONS), render=render).preferences
    assert found["split"][:] == as_it_is
    assert found["prompt"][0] == made_of.format([{"role": "user", "content": QUESTIONS[0]}])


def test_what_a_system_asks_is_asked(tmp_path: Path) -> None:
    """A set whose users all say the same is split by what differs."""
    rows = [chat("Go on.", system=f"Write of thing {i}.") for i in range(60)]
    assert len(set(read(tmp_path, rows).preferences["split"][:])) == 3
    assert opening(rows[0]["prompt"]) == "write of thing 0. go on."
    assert opening([{"role": "assistant", "content": "Hello"}]) == "hello"


def test_a_post_is_in_one_split_under_every_template(tmp_path: Path) -> None:
    def split(template: str, folder: Path, write: Callable[[str], str] = str) -> list[str]:
        posts = [{"subreddit": "a", "title": "t", "post": write(f"My cat number {i}.")} for i in range(60)]
        sides = {"summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}
        references = pairs(folder / "sft.jsonl", ({**post, "summary": "a"} for post in posts))
        rows = ({"info": post, **sides} for post in posts)
        found = read(folder, rows, kind="tldr", sft_path=references, prompt_template=template)
        assert found.references["split"][:] == found.preferences["split"][:]
        return found.preferences["split"][:]  # type: ignore[no-any-return]

    one = split("{post}", tmp_path / "a")
    assert split("2026-11-29 {title}: {post}", tmp_path / "b") == one
    assert split("{post}", tmp_path / "c", lambda post: f"{post.upper()}\n") == one


def test_the_world_is_split_by_its_posts_as_it_was(tmp_path: Path) -> None:
    generate(WorldConfig(posts=80, pairs_per_post=2), 3, tmp_path)
    found = []
    for i, template in enumerate(("{post}\n\nTL;DR:", DataConfig.prompt_template)):
        (tmp_path / str(i)).mkdir()
        loaded = load(DataConfig(prompt_template=template, **SHARES), 3, tmp_path / str(i), world=tmp_path)  # type: ignore[arg-type]
        found.append([*loaded.preferences["split"][:], *loaded.references["split"][:]])
    assert found[0] == found[1]
    # Of the first edition, by the prompts of the presets: `split_of(prompt, ...)`.
    config, prompts = DataConfig(**SHARES), loaded_prompts(tmp_path)  # type: ignore[arg-type]
    assert found[0][-80:] == [split_of(prompt, config, 3) for prompt in prompts]


def loaded_prompts(folder: Path) -> list[str]:
    lines = (folder / "sft.jsonl").read_text().splitlines()
    return [f"{json.loads(line)['post'].strip()}\n\nTL;DR:" for line in lines]


# ---------------------------------------------------------------- own splits


def test_own_splits_are_put_together_and_it_is_said(tmp_path: Path) -> None:
    rows = [text(question, split=("train", "test", "validation")[i % 3]) for i, question in enumerate(QUESTIONS)]
    found = read(tmp_path, rows)
    assert found.own_splits == {"preferences": {"train": 20, "test": 20, "validation": 20}}
    plain = read(tmp_path / "plain", ({**row, "split": "math"} for row in rows))
    assert plain.own_splits == {}, "another column of that name"
    assert found.preferences["split"][:] == plain.preferences["split"][:]


def test_own_splits_are_kept_where_wanted(tmp_path: Path) -> None:
    names = ("train_prefs", "test_prefs", "Validation-2", "training")
    rows = [text(question, split=names[i % 4]) for i, question in enumerate(QUESTIONS)]
    found = read(tmp_path, rows, split="own")
    assert found.preferences["split"][:] == ["train", "test", "valid", "train"] * 15
    assert found.references["split"][:] == found.preferences["split"][:]
    assert found.drawn == []
    assert found.own_splits == {"preferences": dict.fromkeys(names, 15)}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("place", ["{}{}", "{}-00000-of-00001{}", "{}/part-0{}", "data/{}/a{}"])
def test_files_and_folders_name_splits(place: str, suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "train-of-thought"  # above the set: no split
    for i, name in enumerate(("train", "validation", "test")):
        pairs(folder / place.format(name, suffix), (text(f"{name} {k}", k) for k in range(i + 1)))
    (tmp_path / "out").mkdir()
    config = DataConfig(kind="preferences", path=str(folder), split="own")
    found = load(config, 0, tmp_path / "out").preferences
    assert Counter(found["split"][:]) == {"train": 1, "valid": 2, "test": 3}
    for row in found:
        assert row["prompt"].split()[0].startswith(row["split"])


def test_what_a_set_has_not_is_drawn_from_its_training_rows(tmp_path: Path) -> None:
    rows = [
        text(f"{question} {i}", split="test" if i % 5 == 0 else "train") for i in range(5) for question in QUESTIONS
    ]
    found = read(tmp_path, rows, split="own", valid_fraction=0.25)
    assert found.drawn == ["valid"]
    assert [split == "test" for split in found.preferences["split"]] == [row["split"] == "test" for row in rows]
    drawn = Counter(found.preferences["split"][:])
    assert drawn["test"] == 60
    assert 30 <= drawn["valid"] <= 90
    assert found.references["split"][:] == found.preferences["split"][:]


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_that_a_run_drew_for_training_are_drawn_again(seed: int, tmp_path: Path) -> None:
    """By the seed of that run, all of them would be for training again."""
    first = read(tmp_path, (text(f"{question} {i}") for i in range(5) for question in QUESTIONS), seed=seed).preferences
    exported = [
        {name: row[name] for name in ("prompt", "chosen", "rejected", "split")}
        for row in first
        if row["split"] == "train"
    ]
    again = read(tmp_path / "again", exported, seed=seed).preferences
    assert set(again["split"][:]) == {"train"}
    own = read(tmp_path / "own", exported, seed=seed, split="own")
    assert own.drawn == ["valid", "test"]
    share = Counter(own.preferences["split"][:])["test"] / len(exported)
    assert abs(share - 0.3) < 4 * (0.21 / len(exported)) ** 0.5


def test_references_without_splits_stay_away_from_what_is_held_out(tmp_path: Path) -> None:
    rows = [text(question, split=("train", "valid", "test")[i % 3]) for i, question in enumerate(QUESTIONS)]
    others = [f"Another {i}?" for i in range(10)]
    references = pairs(tmp_path / "r.jsonl", ({"prompt": q.upper(), "completion": " a"} for q in [*QUESTIONS, *others]))
    found = read(tmp_path, rows, split="own", sft_path=references)
    assert found.references["split"][:] == [*(row["split"] for row in rows), *["train"] * 10]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (text("Why?"), r"p.jsonl, line 1: data.split \"own\" needs .*neither a column `split` nor the name"),
        (text("Why?", split="gold"), r"p.jsonl, line 1: data.split \"own\" needs .*got 'gold'"),
    ],
)
def test_a_row_of_no_split_is_refused(row: Row, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, [row], split="own")


def test_the_world_has_no_splits_of_its_own() -> None:
    with pytest.raises(ValueError, match=r'DataConfig.split "own" goes with kinds that are read'):
        DataConfig(split="own")


def test_names_of_splits() -> None:
    for name, split in {
        "dev": "valid",
        "VAL": "valid",
        "test_sft": "test",
        "valid2": "valid",
        "training": "train",
    }.items():
        assert named(name, "here") == split
    assert own_split({}, "set/train-1.jsonl, line 3", "set") == "train-1"
    assert own_split({}, "owner/train/test, row 3", "owner/train") == "test"
    assert own_split({}, "test/pairs.jsonl, line 3", "test/pairs.jsonl") is None
    assert own_split({}, "x/test.jsonl.gz, line 3", "x/test.jsonl.gz") == "test"
    assert own_split({"split": 3}, "x/trained.jsonl, line 3", "x") is None


# ---------------------------------------------------------------- what stands in several


def test_near_duplicates_across_splits_are_counted(tmp_path: Path) -> None:
    held_out = [text(f"Name {i} towns, please!", split="test") for i in range(3)]
    trained = [text("Name 77 towns please", split="train"), text("Sum 1 and 2", split="train")]
    same = [
        text("sum 1  AND 2", split="valid"),
        text("Something else", split="valid"),
        text("sum 3 and 4.", split="valid"),
    ]
    found = read(tmp_path, [*held_out, *trained, *same], split="own")
    assert standing_twice(found.preferences, found.references) == {
        "valid": {"prompts": 3, "in_training": 1, "nearly": 1},
        "test": {"prompts": 3, "in_training": 0, "nearly": 3},
    }


@given(st.text(st.characters(max_codepoint=127)))
def test_letters_of_plain_text_are_those_of_any(text: str) -> None:
    assert letters(text) == (re.sub(r"[\W\d_]+", "", text) or text)
    assert letters(f"{text}\u00e9") == re.sub(r"[\W\d_]+", "", f"{text}\u00e9"), "the other way"


def test_drawn_splits_share_no_prompt(tmp_path: Path) -> None:
    found = read(tmp_path, (text(f"{question}{'!' * (i % 2)}", i) for i, question in enumerate(QUESTIONS * 4)))
    for counts in standing_twice(found.preferences, found.references).values():
        assert counts["in_training"] == 0
        assert 0 < counts["prompts"] < 60


@pytest.mark.parametrize("path", ["test/mine.jsonl", "./test/mine.jsonl", "test/../test/mine.jsonl"])
def test_the_folders_above_a_set_say_no_split_however_its_path_is_spelled(path: str) -> None:
    """Neither does the folder that a user keeps a file in; a folder of the set, and the file's own name, do."""
    where = f"{Path(path)}, line 1"
    assert own_split({}, where, path) is None
    assert own_split({}, "./data/train.jsonl, line 1".removeprefix("./"), "./data/train.jsonl") == "train"
    assert own_split({}, "data/test/mine.jsonl, line 1", "./data/") == "test"


def test_a_dialogue_is_with_its_continuations_whatever_ends_its_lines() -> None:
    for end in ("\n\n", "\r\n\r\n", "\n"):
        begun = f"{end}Human: Why?{end}Assistant:"
        assert opening(begun) == opening(f"{begun} So.{end}Human: And then?{end}Assistant:") == "why?"


@pytest.mark.parametrize(
    ("split", "before", "dropped", "said"),
    [
        (
            "train",
            {"train": 20, "valid": 5, "test": 5},
            {"prompt longer than 3 tokens": 22},
            "all 20 rows of it were dropped (of all 30 rows: 22 prompt longer than 3 tokens); raise "
            "data.max_prompt_length",
        ),
        (
            "test",
            {"train": 20, "test": 1},
            {"prompt longer than 3 tokens": 1, "completion longer than 9 tokens": 2},
            "all 1 row of it was dropped (of all 21 rows: 1 prompt longer than 3 tokens, 2 completion longer than 9 "
            "tokens); raise data.max_prompt_length or data.max_completion_length",
        ),
        (
            "valid",
            {"train": 7, "valid": 2, "test": 2},
            {"end-of-text inside a completion": 2},
            "all 2 rows of it were dropped (of all 11 rows: 2 end-of-text inside a completion); look at data.path",
        ),
        ("train", {}, {}, "0 rows were read; look at data.path and data.sft_path"),
        (
            "valid",
            {"train": 70},
            {},
            "all 70 rows are in train, as rows that a run exported are: set data.split to own, or give another seed",
        ),
        (
            "valid",
            {"train": 70, "test": 9},
            {"prompt longer than 3 tokens": 1},
            "none of 79 rows was drawn for it; look at data.valid_fraction, data.split and the seed",
        ),
    ],
)
def test_an_empty_split_is_told_why_it_is_empty(
    split: str, before: dict[str, int], dropped: dict[str, int], said: str
) -> None:
    assert why_empty(split, before, dropped) == said
