"""Reading, splitting and tokenising: what a prompt is, what is dropped and counted, what is refused and how."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lm.config import DataConfig
from lm.data.rows import BATCH, SUFFIXES, Row, read_rows, write_rows
from lm.data.schemas import (
    Drop,
    Message,
    any_pair,
    chat_renderer,
    hh_pair,
    plain_chat,
    preference_pair,
    tldr_pair,
    tldr_reference,
)
from lm.data.splits import split_of
from lm.data.tokens import load, tokenise
from lm.models.loading import load_tokenizer

SAMPLE = Path(__file__).parents[3] / "shared/data/hh-rlhf/harmless-base-sample.jsonl.gz"
TEMPLATE = DataConfig().prompt_template


def dialogue(*turns: str) -> str:
    """Human and Assistant in turn."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(turns))


def hh(chosen: str, rejected: str) -> dict[str, Any] | Drop:
    return hh_pair({"chosen": chosen, "rejected": rejected}, "here")


def comparison(**changes: Any) -> dict[str, Any]:
    """A row of openai/summarize_from_feedback."""
    return {
        "info": {"id": "t3_1", "subreddit": "pets", "title": "My cat", "post": "It sleeps all day."},
        "summaries": [{"text": " Cat sleeps.", "policy": "ref", "note": None}, {"text": " Dog.", "policy": "a"}],
        "choice": 0,
        **changes,
    }


def folder(parent: Path, name: str) -> Path:
    """A new folder: what was read into one stays mapped."""
    (parent / name).mkdir()
    return parent / name


def write_jsonl(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---------------------------------------------------------------- HH: the last shared turn


def test_the_prompt_is_every_shared_turn_and_the_opening_of_the_reply() -> None:
    shared = ("Hi", "Hello", "How are you?")
    assert hh(dialogue(*shared, "Well."), dialogue(*shared, "Bad.")) == {
        "prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How are you?\n\nAssistant:",
        "chosen": " Well.",
        "rejected": " Bad.",
    }


def test_characters_that_both_last_replies_begin_with_stay_in_the_replies() -> None:
    row = hh(dialogue("Hi", "I think that yes."), dialogue("Hi", "I think that no."))
    assert isinstance(row, dict)
    assert row["prompt"] == "\n\nHuman: Hi\n\nAssistant:"
    assert (row["chosen"], row["rejected"]) == (" I think that yes.", " I think that no.")


def test_a_reply_that_is_a_prefix_of_the_other_is_a_reply_all_the_same() -> None:
    row = hh(dialogue("Hi", "Yes."), dialogue("Hi", "Yes. And more"))
    assert isinstance(row, dict)
    assert (row["chosen"], row["rejected"]) == (" Yes.", " Yes. And more")


def test_speakers_named_inside_a_paragraph_are_text() -> None:
    row = hh(dialogue("Hi", "The Human: a novel.\nAssistant: its author"), dialogue("Hi", "No."))
    assert isinstance(row, dict)
    assert row["chosen"] == " The Human: a novel.\nAssistant: its author"


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (dialogue("Hi", "Yes"), dialogue("Hi", "Yes"), "identical completions"),
        (dialogue("Hi", "Yes"), dialogue("Hi", " Yes "), "identical completions"),
        (dialogue("Hi", "Yes"), dialogue("Hi", ""), "empty completion"),
        (dialogue("Hi", ""), dialogue("Hi", "Yes"), "empty completion"),
        (dialogue("Hi"), dialogue("Hi", "Yes"), "empty completion"),
        (dialogue("Hi", "Yes", "Why?", "So"), dialogue("Hi", "Yes"), "empty completion"),
        ("Hi", dialogue("Hi", "Yes"), "not a dialogue of Human and Assistant turns"),
        ("Once upon a time" + dialogue("Hi", "A"), dialogue("Hi", "B"), "not a dialogue of Human and Assistant turns"),
        ("", "", "not a dialogue of Human and Assistant turns"),
        (dialogue("Hi", "A", "Why?", "So"), dialogue("Hi", "B", "Why?", "So"), "differs by more than one final reply"),
        (dialogue("Hi", "A"), dialogue("Ho", "B"), "differs by more than one final reply"),
        (dialogue("Hi", "A", "What?"), dialogue("Hi", "A", "When?"), "differs by more than one final reply"),
        (dialogue("Hi", "A", "What?", "C"), dialogue("Hi", "B"), "differs by more than one final reply"),
    ],
)
def test_what_cannot_be_split_is_dropped_with_its_reason(chosen: str, rejected: str, reason: str) -> None:
    assert hh(chosen, rejected) == Drop(reason)


def test_every_dropped_row_is_counted(tmp_path: Path) -> None:
    good = [{"chosen": dialogue(f"Q{i}", "A"), "rejected": dialogue(f"Q{i}", "B")} for i in range(5)]
    bad = [{"chosen": "no", "rejected": "turns"}] * 2 + [{"chosen": dialogue("Q", "A"), "rejected": dialogue("Q", "A")}]
    path = write_jsonl(tmp_path / "hh.jsonl", [*bad, *good])
    loaded = load(DataConfig(kind="hh", path=path), 0, tmp_path)
    assert len(loaded.preferences) == 5
    counted = {"not a dialogue of Human and Assistant turns": 2, "identical completions": 1}
    assert loaded.dropped == {"preferences": counted, "references": {}}
    assert loaded.references["completion"][:] == loaded.preferences["chosen"][:]


@pytest.mark.skipif(not SAMPLE.exists(), reason=f"{SAMPLE} is not there")
def test_every_row_of_real_dialogues_is_accounted_for_and_can_be_put_together_again(tmp_path: Path) -> None:
    rows = [row for _, row in read_rows(str(SAMPLE))]
    outcomes = [hh_pair(row, "here") for row in rows]
    kept = 0
    for row, outcome in zip(rows, outcomes, strict=True):
        if isinstance(outcome, Drop):
            continue
        kept += 1
        for side in ("chosen", "rejected"):
            text = f"{outcome['prompt']}{outcome[side]}"
            # The one thing not kept is white space at the two ends of a reply.
            head = len(outcome["prompt"])
            assert row[side][:head] == text[:head]
            assert row[side][head:].strip() == text[head:].strip()
        assert outcome["prompt"].endswith("\n\nAssistant:")
        assert "\n\nHuman:" not in outcome["chosen"] + outcome["rejected"]
    loaded = load(DataConfig(kind="hh", path=str(SAMPLE)), 0, tmp_path)
    dropped = loaded.dropped["preferences"]
    assert len(loaded.preferences) == kept
    assert kept + sum(dropped.values()) == len(rows) == 1500
    assert kept > 1300, dropped


# ---------------------------------------------------------------- TL;DR


def test_the_chosen_summary_is_the_one_of_the_choice() -> None:
    for choice, (chosen, rejected) in enumerate([(" Cat sleeps.", " Dog."), (" Dog.", " Cat sleeps.")]):
        row = tldr_pair(comparison(choice=choice), "here", TEMPLATE)
        assert row == {
            "prompt": "SUBREDDIT: r/pets\n\nTITLE: My cat\n\nPOST: It sleeps all day.\n\nTL;DR:",
            "chosen": chosen,
            "rejected": rejected,
            "post": "It sleeps all day.",
            "confidence": None,
            "worker": None,
        }


@pytest.mark.parametrize(
    "info",
    [
        {"id": "cnn", "site": "cnn.com", "article": "News.", "title": None, "post": None, "subreddit": None},
        {"id": "cnn", "site": "cnn.com", "article": "News.", "title": "News"},
    ],
    ids=["null post", "no post"],
)
def test_news_articles_are_dropped_and_counted(info: dict[str, Any]) -> None:
    assert tldr_pair(comparison(info=info), "here", TEMPLATE) == Drop("no Reddit post")


def test_a_misspelt_post_is_an_error_and_not_a_dropped_row() -> None:
    info = {"id": "t3_1", "subreddit": "pets", "title": "My cat", "posts": "It sleeps all day."}
    with pytest.raises(ValueError, match=r"here: column 'post' is missing, there are .*; is 'posts' meant to be it"):
        tldr_pair(comparison(info=info), "here", TEMPLATE)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_comparison_has_two_summaries(count: int) -> None:
    with pytest.raises(ValueError, match=f"here: two summaries and a choice of 0 or 1 are needed, got {count} and 0"):
        tldr_pair(comparison(summaries=[{"text": "a"}] * count), "here", TEMPLATE)


def test_a_choice_is_zero_or_one() -> None:
    with pytest.raises(ValueError, match="here: two summaries and a choice of 0 or 1 are needed, got 2 and 2"):
        tldr_pair(comparison(choice=2), "here", TEMPLATE)


def test_a_reference_summary_continues_its_prompt_after_a_space() -> None:
    row = {"subreddit": "pets", "title": "My cat", "post": "It sleeps.", "summary": "Sleepy cat.\n"}
    outcome = tldr_reference(row, "here", "{post} TL;DR:")
    assert outcome == {"prompt": "It sleeps. TL;DR:", "completion": " Sleepy cat.", "post": "It sleeps."}
    assert tldr_reference({**row, "summary": " "}, "here", TEMPLATE) == Drop("empty completion")


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosne": "a", "rejected": "b"},
            r"column 'chosen' is missing, there are \['chosne', 'rejected'\]; is 'chosne'",
        ),
        ({"text": "a", "rejected": "b"}, r"column 'chosen' is missing, there are \['rejected', 'text'\]$"),
        ({"chosen": 1, "rejected": "b"}, "'chosen' must be of type str, got int: 1"),
        ({"chosen": None, "rejected": "b"}, "'chosen' must be of type str, got NoneType: None"),
        ({"chosen": ["a"], "rejected": "b"}, "'chosen' must be of type str, got list"),
    ],
)
def test_a_column_that_is_not_there_or_of_another_type_is_named(row: Any, message: str, tmp_path: Path) -> None:
    good = {"chosen": dialogue("Q", "A"), "rejected": dialogue("Q", "B")}
    path = write_jsonl(tmp_path / "hh.jsonl", [good, row])
    with pytest.raises(ValueError, match=f"{path}, line 2: {message}"):
        load(DataConfig(kind="hh", path=path), 0, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choice": "0"}, "'choice' must be of type int, got str: '0'"),
        ({"choice": True}, "'choice' must be of type int, got bool: True"),
        ({"info": None}, "'info' must be of type dict, got NoneType"),
        ({"summaries": "a b"}, "'summaries' must be of type list, got str"),
        (
            {"summaries": [{"txt": "a"}, {"text": "b"}]},
            "summaries: column 'text' is missing, .* is 'txt' meant to be it",
        ),
        ({"summaries": ["a", "b"]}, "summaries: an object with 'text' is needed, got str: 'a'"),
    ],
)
def test_a_comparisons_columns_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"here.* ?{message}"):
        tldr_pair(comparison(**change), "here", TEMPLATE)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"chosen": "a", "rejected": ', "line 3: not JSON"),
        ("[1, 2]", "line 3: a JSON object is needed, got list"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_malformed_line_is_named_with_its_file(line: str, message: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"hh{suffix}"
    good = json.dumps({"chosen": "a", "rejected": "b"})
    text = f"{good}\n\n{line}\n".encode()
    path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    with pytest.raises(ValueError, match=f"{path}, {message}"):
        list(read_rows(str(path)))


@pytest.mark.parametrize("content", ["", "\n \n"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_set_without_rows_is_refused(content: str, folder: bool, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text(content)
    path = tmp_path if folder else tmp_path / "empty.jsonl"
    with pytest.raises(ValueError, match=f"{path} holds no rows; one JSON object a line is needed"):
        list(read_rows(str(path)))


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.parquet"
    write_rows(path, [])
    with pytest.raises(ValueError, match=f"{path} holds no rows$"):
        list(read_rows(str(path)))


def test_a_file_that_is_no_text_is_told_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bin.jsonl"
    path.write_bytes(b"\x93\xff\x00\n")
    with pytest.raises(
        ValueError, match=r"what is read is \.jsonl, \.jsonl\.gz, \.json, .*\.parquet, JSON lines as text in UTF-8"
    ):
        list(read_rows(str(path)))


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "hh.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"chosen": "a"}\n' * 1000)[:-20])
    with pytest.raises(ValueError, match=rf"{path}, after line \d+: cannot be read"):
        list(read_rows(str(path)))
    parquet = tmp_path / "hh.parquet"
    parquet.write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match=f"{parquet}: cannot be read as parquet"):
        list(read_rows(str(parquet)))
    for name, text in (("promptä", "a"), ("prompt", "ä")):  # a column's name, and a text, that are not UTF-8
        write_rows(parquet, [{name: text}])
        parquet.write_bytes(parquet.read_bytes().replace("ä".encode(), b"\xe4 "))
        with pytest.raises(ValueError, match=f"{parquet}: cannot be read as parquet"):
            list(read_rows(str(parquet)))


def test_paths_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"nowhere.jsonl': there is no such file or folder, and it is no hub name"
    ):
        list(read_rows(str(tmp_path / "nowhere.jsonl")))
    with pytest.raises(FileNotFoundError, match=r"data/here.jsonl.gz': there is no such file"):
        list(read_rows("data/here.jsonl.gz"))
    (tmp_path / "a.xlsx").write_text("chosen,rejected\n")
    with pytest.raises(ValueError, match=r"a.xlsx: a file of type .jsonl, .jsonl.gz, .json, .*.parquet is needed"):
        list(read_rows(str(tmp_path / "a.xlsx")))
    with pytest.raises(ValueError, match=r"holds no .jsonl, .jsonl.gz, .json, .*.parquet file"):
        list(read_rows(str(tmp_path)))
    with pytest.raises(ValueError, match=r"--subset 'helpful-base' goes with a hub name, but .* is local"):
        list(read_rows(str(tmp_path), "helpful-base"))


@pytest.mark.parametrize(
    ("name", "subset", "asked"),
    [
        ("owner/name", "part", ("owner/name", "part", None)),
        ("owner/name", None, ("owner/name", None, None)),
        ("owner/name/part", None, ("owner/name", "part", None)),
        ("owner/name/part@refs/convert/parquet", None, ("owner/name", "part", "refs/convert/parquet")),
        ("owner/name@v1.0", None, ("owner/name", None, "v1.0")),
    ],
)
def test_a_hub_dataset_is_read_in_all_its_splits(
    name: str, subset: str | None, asked: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(path: str, *, data_dir: str | None, revision: str | None) -> dict[str, Dataset]:
        assert (path, data_dir, revision) == asked
        return {"train": Dataset.from_list([{"a": 1}, {"a": 2}]), "test": Dataset.from_list([{"a": 3}])}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_rows(name, subset)) == [
        (f"{name}/train, row 0", {"a": 1}),
        (f"{name}/train, row 1", {"a": 2}),
        (f"{name}/test, row 0", {"a": 3}),
    ]


def test_a_hub_dataset_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=r"'owner/name' is neither a local file or folder nor a hub dataset .*no route"
    ):
        list(read_rows("owner/name"))


def test_a_hub_dataset_with_a_loading_script_has_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found name.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=r"found name.py\); the hub's own copy .*: owner/name/part@refs/convert/parquet$"
    ):
        list(read_rows("owner/name/part"))


def test_jsonl_gz_parquet_and_folders_give_the_same_rows(tmp_path: Path) -> None:
    rows = [comparison(choice=i % 2) for i in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    files = {name: tmp_path / name / "rows" for name in ("jsonl", "jsonl.gz", "parquet")}
    for suffix, stem in files.items():
        stem.parent.mkdir()
        files[suffix] = stem.with_suffix(f".{suffix}")
    files["jsonl"].write_text(lines)
    files["jsonl.gz"].write_bytes(gzip.compress(lines.encode()))
    Dataset.from_list(rows).to_parquet(str(files["parquet"]))
    expected = [tldr_pair(row, "here", TEMPLATE) for row in rows]
    for file in files.values():
        for path in (file, file.parent):
            assert [tldr_pair(row, where, TEMPLATE) for where, row in read_rows(str(path))] == expected
    everything = [where for where, _ in read_rows(str(tmp_path))]
    order = [str(file) for file in sorted(files.values()) for _ in range(4)]
    assert [where.rsplit(",", 1)[0] for where in everything] == order


# ---------------------------------------------------------------- splits


def many(path: Path, prompts: int = 60, each: int = 3) -> str:
    return write_jsonl(
        path,
        (
            {"chosen": dialogue(f"Question {p}", f"Good {i}"), "rejected": dialogue(f"Question {p}", f"Bad {i}")}
            for p in range(prompts)
            for i in range(each)
        ),
    )


def test_no_prompt_is_in_two_splits_of_any_set(tmp_path: Path) -> None:
    config = DataConfig(kind="hh", path=many(tmp_path / "hh.jsonl"), valid_fraction=0.2, test_fraction=0.3)
    loaded = load(config, 7, folder(tmp_path, "one"))
    splits: dict[str, set[str]] = {}
    for row in [*loaded.preferences, *loaded.references]:
        splits.setdefault(row["prompt"], set()).add(row["split"])
    assert len(splits) == 60
    assert all(len(found) == 1 for found in splits.values())
    shares = Counter(next(iter(found)) for found in splits.values())
    assert set(shares) == {"train", "valid", "test"}
    assert list(load(config, 7, folder(tmp_path, "same")).preferences) == list(loaded.preferences)
    assert list(load(config, 8, folder(tmp_path, "other")).preferences) != list(loaded.preferences)


def test_split_shares_are_the_asked_ones() -> None:
    config = DataConfig(valid_fraction=0.2, test_fraction=0.3)
    drawn = Counter(split_of(f"prompt {i}", config, 0) for i in range(4000))
    for split, share in (("train", 0.5), ("valid", 0.2), ("test", 0.3)):
        assert abs(drawn[split] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_a_limit_draws_pairs_and_keeps_their_references_only(tmp_path: Path) -> None:
    config = DataConfig(kind="hh", path=many(tmp_path / "hh.jsonl"), limit=50)
    loaded = load(config, 0, tmp_path)
    assert len({row["id"] for row in loaded.preferences}) == 50
    assert {row["id"] for row in loaded.references} == {row["id"] for row in loaded.preferences}


# ---------------------------------------------------------------- tokenising


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("scratch:tiny", ["Question and answer. " * 20, *(f"{i} good bad" for i in range(60))], False)


def test_completions_end_with_end_of_text_and_nothing_is_cut(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    config = DataConfig(kind="hh", path=many(tmp_path / "hh.jsonl"), valid_fraction=0.2, test_fraction=0.2)
    dataset, dropped = tokenise(load(config, 0, tmp_path).preferences, tokenizer, config, tmp_path / "ids.arrow")
    assert dropped == {}
    assert len(dataset) == 180
    for row in dataset:
        for side in ("chosen", "rejected"):
            ids = row[f"{side}_ids"]
            assert ids[-1] == tokenizer.eos_token_id
            assert ids.count(tokenizer.eos_token_id) == 1
            assert tokenizer.decode(ids[:-1]) == row[side]
        assert tokenizer.decode(row["prompt_ids"]) == row["prompt"]


def test_over_long_rows_are_dropped_and_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    def row(prompt: int, completion: int, split: str = "train") -> dict[str, str]:
        texts = {"prompt": "!" * prompt, "chosen": "?" * completion, "rejected": "?"}
        return {"id": f"{prompt}-{completion}-{split}", **texts, "split": split}

    assert len(tokenizer("!" * 9)["input_ids"]) == 9, "one token a mark, by the training texts"
    config = DataConfig(max_prompt_length=5, max_completion_length=4)
    rows = [row(5, 3), row(6, 3), row(5, 4), row(6, 4), row(1, 1, "valid"), row(1, 1, "test")]
    dataset, dropped = tokenise(Dataset.from_list(rows), tokenizer, config, tmp_path / "ids.arrow")
    assert dataset["id"][:] == ["5-3-train", "1-1-valid", "1-1-test"]
    assert dropped == {"prompt longer than 5 tokens": 2, "completion longer than 4 tokens": 1}


def test_nothing_left_is_an_error_that_says_what_was_dropped(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [
        {"id": str(i), "prompt": "a", "chosen": "!" * 9, "rejected": "?", "split": split}
        for i, split in enumerate(("train", "valid", "test"))
    ]
    config = DataConfig(max_completion_length=4)
    with pytest.raises(
        ValueError,
        match=r"no preference pairs are left in the train split: all 1 row of it was dropped \(of all 3 rows: "
        r"3 completion longer than 4 tokens\); raise data.max_completion_length$",
    ):
        tokenise(Dataset.from_list(rows), tokenizer, config, tmp_path / "ids.arrow")
    with pytest.raises(
        ValueError, match="no reference completions are left in the train split: 0 rows were read; look"
    ):
        tokenise(Dataset.from_list([]), tokenizer, config, tmp_path / "none.arrow")
    only_train = [{"id": "0", "prompt": "a", "chosen": "b", "rejected": "c", "split": "train"}]
    exported = (
        r"no preference pairs are left in the valid split: all 1 row is in train, as .* exported are: .*another seed"
    )
    with pytest.raises(ValueError, match=exported):
        tokenise(Dataset.from_list(only_train), tokenizer, config, tmp_path / "train.arrow")


def test_prompt_and_completion_are_tokenised_apart(tmp_path: Path) -> None:
    """A vocabulary in which "a b" joined would become one token across the boundary."""
    merging = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "<end>": 3}, merges=[("a", "b")]))
    merging.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="<end>", pad_token="<end>")
    assert tokenizer("ab")["input_ids"] == [2], "joined, the boundary is lost"
    rows = [
        {"id": split, "prompt": "a", "chosen": "b", "rejected": "bb", "split": split}
        for split in ("train", "valid", "test")
    ]
    dataset, _ = tokenise(Dataset.from_list(rows), tokenizer, DataConfig(), tmp_path / "ids.arrow")
    assert dataset[0]["prompt_ids"] == [0]
    assert dataset[0]["chosen_ids"] == [1, 3]
    assert dataset[0]["rejected_ids"] == [1, 1, 3]


# ---------------------------------------------------------------- TL;DR: posts and annotators


def tldr_set(path: Path, rows: Iterable[dict[str, Any]]) -> tuple[str, str]:
    """Comparisons, and references of the same posts, each spaced in a way of its own."""
    rows = list(rows)
    references = [
        {**row["info"], "post": f" {row['info']['post'].replace(' ', '  ')}\n", "summary": "Cat."} for row in rows
    ]
    return write_jsonl(path / "pairs.jsonl", rows), write_jsonl(path / "sft.jsonl", references)


def retitled(posts: int, titles: int) -> list[dict[str, Any]]:
    return [
        comparison(info={"subreddit": f"r{t % 2}", "title": f"Title {t}", "post": f"My cat number {p} sleeps."})
        for p in range(posts)
        for t in range(titles)
    ]


def test_no_post_crosses_splits_under_whatever_title(tmp_path: Path) -> None:
    pairs, references = tldr_set(tmp_path, retitled(40, 4))
    config = DataConfig(kind="tldr", path=pairs, sft_path=references, valid_fraction=0.2, test_fraction=0.3)
    loaded = load(config, 0, tmp_path)
    by_post: dict[str, set[str]] = {}
    by_prompt: dict[str, set[str]] = {}
    for row in [*loaded.preferences, *loaded.references]:
        post = row["prompt"].split("POST:")[1].split()[3]
        by_post.setdefault(post, set()).add(row["split"])
        by_prompt.setdefault(post, set()).add(split_of(row["prompt"], config, 0))
    assert len(by_post) == 40
    assert all(len(splits) == 1 for splits in by_post.values())
    assert set.union(*by_post.values()) == {"train", "valid", "test"}
    assert any(len(splits) > 1 for splits in by_prompt.values()), "prompts alone would not have kept them apart"


def test_confidence_and_worker_are_kept_and_none_where_there_is_none(tmp_path: Path) -> None:
    extras: list[dict[str, Any]] = [
        {"extra": {"confidence": 7}, "worker": "ann"},
        {"extra": {"confidence": None}, "worker": "bob"},
        {"extra": {}},
        {"extra": None, "worker": 3},
        {},
    ]
    pairs, references = tldr_set(tmp_path, [comparison(**extra) for extra in extras])
    loaded = load(DataConfig(kind="tldr", path=pairs, sft_path=references), 0, tmp_path)
    assert loaded.preferences["confidence"][:] == [7.0, None, None, None, None]
    assert loaded.preferences["worker"][:] == ["ann", "bob", None, "3", None]
    assert loaded.dropped["preferences"] == {}, "a pair without a confidence is a pair"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": {"confidence": "7"}}, "'confidence' must be a finite number, got '7'"),
        ({"extra": {"confidence": float("nan")}}, "'confidence' must be a finite number, got nan"),
        ({"extra": {"confidence": True}}, "'confidence' must be a finite number, got True"),
        ({"extra": [7]}, r"'extra' must be of type dict, got list: \[7\]"),
        ({"worker": ["ann"]}, r"'worker' must be a name or a number, got list: \['ann'\]"),
    ],
)
def test_annotations_of_another_type_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^here: {message}$"):
        tldr_pair(comparison(**change), "here", TEMPLATE)


@pytest.mark.parametrize("empty", [0, 1])
def test_an_empty_summary_is_counted_whichever_side_is_chosen(empty: int) -> None:
    summaries = [{"text": " " if i == empty else "Cat."} for i in range(2)]
    for choice in (0, 1):
        row = comparison(summaries=summaries, choice=choice)
        assert tldr_pair(row, "here", TEMPLATE) == Drop("empty completion")


# ---------------------------------------------------------------- TRL-style sets: text


def pair_of(row: Row | Drop) -> tuple[str, str, str]:
    assert isinstance(row, dict)
    return row["prompt"], row["chosen"], row["rejected"]


def test_text_stays_as_written() -> None:
    row = {"prompt": "Sky?\n", "chosen": " It is\nblue. ", "rejected": "Green"}
    assert pair_of(preference_pair(row, "here", plain_chat)) == ("Sky?\n", " It is\nblue. ", "Green")


def test_without_a_prompt_it_is_what_both_begin_with_in_whole_words() -> None:
    row = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    for without in (row, {**row, "prompt": None}):
        assert pair_of(preference_pair(without, "here", plain_chat)) == ("The sky is", " blue.", " black.")
    # Not "The sky is bl", which both begin with too.
    longer = {"chosen": "The sky is", "rejected": "The sky is blue."}
    assert preference_pair(longer, "here", plain_chat) == Drop("empty completion")


def test_without_a_prompt_dialogues_are_split_at_a_turn() -> None:
    row = {"chosen": dialogue("Hi", "I think yes"), "rejected": dialogue("Hi", "I think no")}
    assert pair_of(preference_pair(row, "here", plain_chat)) == pair_of(hh_pair(row, "here"))
    assert pair_of(preference_pair(row, "here", plain_chat))[1] == " I think yes"


# ---------------------------------------------------------------- TRL-style sets: messages

SYSTEM = {"role": "system", "content": "Be kind."}
ASK = {"role": "user", "content": "Sky?"}
BLUE, GREEN = ({"role": "assistant", "content": content} for content in ("Blue.", "Green."))


@pytest.mark.parametrize(
    ("row", "context"),
    [
        ({"prompt": [ASK], "chosen": [BLUE], "rejected": [GREEN]}, [ASK]),
        ({"prompt": "Sky?", "chosen": [BLUE], "rejected": [GREEN]}, [ASK]),
        ({"prompt": [ASK], "chosen": "Blue.", "rejected": "Green."}, [ASK]),
        ({"chosen": [ASK, BLUE], "rejected": [ASK, GREEN]}, [ASK]),
        ({"prompt": None, "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]}, [ASK]),
        ({"prompt": "Sky?", "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]}, [ASK]),
        ({"prompt": [ASK], "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]}, [ASK]),
        ({"prompt": "Sky?", "chosen": [SYSTEM, ASK, BLUE], "rejected": [SYSTEM, ASK, GREEN]}, [SYSTEM, ASK]),
        ({"prompt": [SYSTEM, ASK], "chosen": [BLUE], "rejected": [GREEN]}, [SYSTEM, ASK]),
        ({"chosen": [ASK, BLUE, ASK, BLUE], "rejected": [ASK, BLUE, ASK, GREEN]}, [ASK, BLUE, ASK]),
        ({"prompt": [ASK], "chosen": [BLUE, ASK, BLUE], "rejected": [BLUE, ASK, GREEN]}, [ASK, BLUE, ASK]),
    ],
)
def test_the_prompt_is_every_message_before_the_replies_wherever_it_stands(
    row: dict[str, Any], context: list[Message]
) -> None:
    text = plain_chat(context, BLUE, "here")[0]
    assert pair_of(preference_pair(row, "here", plain_chat)) == (text, "Blue.", "Green.")


EMPTY = {"role": "assistant", "content": " "}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Sky?", "chosen": "Blue.", "rejected": " Blue. "}, "identical completions"),
        ({"prompt": "Sky?", "chosen": " ", "rejected": "Blue."}, "empty completion"),
        ({"prompt": " ", "chosen": "Green.", "rejected": "Blue."}, "empty prompt"),
        ({"chosen": "Green.", "rejected": "Blue."}, "empty prompt"),
        ({"prompt": [ASK], "chosen": [BLUE], "rejected": [BLUE]}, "identical completions"),
        (
            {"prompt": [ASK], "chosen": [BLUE], "rejected": [{**BLUE, "content": " Blue. "}]},
            "identical completions",
        ),
        ({"prompt": [ASK], "chosen": [], "rejected": [BLUE]}, "empty completion"),
        ({"prompt": [ASK], "chosen": [BLUE], "rejected": [EMPTY]}, "empty completion"),
        ({"chosen": [ASK], "rejected": [ASK, BLUE]}, "empty completion"),
        ({"chosen": [BLUE], "rejected": [GREEN]}, "empty prompt"),
        (
            {"chosen": [ASK, BLUE, ASK, BLUE], "rejected": [ASK, GREEN, ASK, BLUE]},
            "differs by more than one final reply",
        ),
        ({"chosen": [ASK, BLUE, ASK, BLUE], "rejected": [ASK, BLUE]}, "differs by more than one final reply"),
        ({"prompt": [ASK], "chosen": [ASK], "rejected": [SYSTEM]}, "differs by more than one final reply"),
    ],
)
def test_what_is_no_comparison_is_dropped_with_its_reason(row: dict[str, Any], reason: str) -> None:
    assert preference_pair(row, "here", plain_chat) == Drop(reason)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Sky?", "chosen": "Blue."}, r"column 'rejected' is missing, there are \['chosen', 'prompt'\]"),
        ({"prompt": "Sky?", "choosen": "a", "rejected": "b"}, "column 'chosen' is missing, .* is 'choosen' meant"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' must be of type str, got int: 3"),
        ({"prompt": "Sky?", "chosen": [BLUE], "rejected": "b"}, "'chosen' and 'rejected' must both be text or both be"),
        ({"prompt": "Sky?", "chosen": ["a"], "rejected": [BLUE]}, "chosen: an object with 'role' is needed, got str"),
        (
            {"prompt": "Sky?", "chosen": [{"role": "assistant"}], "rejected": [BLUE]},
            r"chosen: column 'content' is missing, there are \['role'\]",
        ),
        (
            {"prompt": "Sky?", "chosen": [{**BLUE, "content": None}], "rejected": [BLUE]},
            "chosen: 'content' must be of type str, got NoneType",
        ),
        (
            {"prompt": "Sea?", "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]},
            "'chosen' and 'rejected' begin with messages that are not those of 'prompt'",
        ),
        (
            {"prompt": "Sky?", "chosen": "a", "rejected": "b", "confidence": "low"},
            "'confidence' must be a finite number",
        ),
    ],
)
def test_a_row_that_cannot_be_read_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^here(: |, ){message}"):
        preference_pair(row, "here", plain_chat)


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer("scratch:tiny", ["Sky? Blue. Green. system user assistant Be kind."] * 9, False)
    tokenizer.chat_template = template
    return tokenizer


def test_the_chat_template_writes_prompt_and_completion(tmp_path: Path) -> None:
    """The ids are those of the template's own conversation, up to the end of the reply."""
    tokenizer = chat_tokenizer(CHATML)
    rows = [
        {"prompt": [SYSTEM, {**ASK, "content": f"Sky {i}?"}], "chosen": [BLUE], "rejected": [GREEN]} for i in range(30)
    ]
    config = DataConfig(
        kind="preferences", path=write_jsonl(tmp_path / "p.jsonl", rows), valid_fraction=0.2, test_fraction=0.2
    )
    loaded = load(config, 0, tmp_path, render=chat_renderer(tokenizer, "tiny"))
    dataset, _ = tokenise(loaded.preferences, tokenizer, config, tmp_path / "ids.arrow")
    assert len(dataset) == 30
    for row, made in zip(rows, dataset, strict=True):
        for side in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template([*row["prompt"], *row[side]], tokenize=False)
            ids = [*made["prompt_ids"], *made[f"{side}_ids"]]
            assert tokenizer.decode(ids) == whole.rstrip()
            assert ids[-1] == tokenizer.eos_token_id
            assert made[f"{side}_ids"].count(tokenizer.eos_token_id) == 1
    # The references are the chosen completions, with the same prompts.
    assert loaded.references["prompt"][:] == loaded.preferences["prompt"][:]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            None,
            r"there are messages, and model 'tiny' has no chat template .*; give a model that has one .*, or give",
        ),
        ("{{ raise_exception('roles must alternate') }}", "the chat template of model 'tiny' refuses .*: roles must"),
        (
            "{{ messages | length }}: {{ messages[0].content }}",
            "the chat template of model 'tiny' writes a prompt other",
        ),
    ],
)
def test_a_template_that_cannot_write_the_messages_is_refused(template: str | None, message: str) -> None:
    render = chat_renderer(chat_tokenizer(template), "tiny")
    with pytest.raises(ValueError, match=f"^line 3: {message}"):
        preference_pair({"prompt": [ASK], "chosen": [BLUE], "rejected": [GREEN]}, "line 3", render)
    text = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."}
    assert pair_of(preference_pair(text, "line 3", render)) == tuple(text.values()), "text needs no template"


def test_without_a_tokenizer_there_is_no_template() -> None:
    with pytest.raises(ValueError, match=r"here: there are messages, and model 'scratch:tiny' has no chat template"):
        chat_renderer(None, "scratch:tiny")([ASK], BLUE, "here")


def test_beginning_and_end_of_text_are_there_once(tmp_path: Path) -> None:
    """A tokenizer that adds a beginning-of-text, and texts that have it and the end already."""
    plain = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4}, unk_token="c"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    assert tokenizer("<s> a")["input_ids"] == [0, 0, 2]
    rows = [
        {"id": split, "prompt": prompt, "chosen": chosen, "rejected": "c", "split": split}
        for split, prompt, chosen in (("train", "<s> a", "b </s>"), ("valid", "a", "b"), ("test", "a", "b"))
    ]
    dataset, _ = tokenise(Dataset.from_list(rows), tokenizer, DataConfig(), tmp_path / "ids.arrow")
    assert dataset["prompt_ids"][:] == [[0, 2]] * 3
    assert dataset["chosen_ids"][:] == [[3, 1]] * 3


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "\n\nuser: Sky?", "completion": "Blue."},
        {"prompt": [ASK], "completion": [BLUE]},
        {"prompt": "Sky?", "completion": [BLUE]},
        {"prompt": [ASK], "completion": "Blue."},
        {"messages": [ASK, BLUE]},
    ],
)
def test_references_of_their_own_are_read_as_text_or_messages(row: dict[str, Any], tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."}])
    bad: list[dict[str, Any]] = [
        {"messages": [ASK]},
        {"prompt": "Sky?", "completion": " "},
        {"prompt": " ", "completion": "a"},
        {"messages": [BLUE]},
    ]
    references = write_jsonl(tmp_path / "r.jsonl", [row, *bad])
    loaded = load(DataConfig(kind="preferences", path=pairs, sft_path=references), 0, tmp_path)
    (one,) = loaded.references
    assert (one["prompt"], one["completion"]) == ("\n\nuser: Sky?", "Blue.")
    counted = {"no reply at the end": 1, "empty completion": 1, "empty prompt": 2}
    assert loaded.dropped == {"preferences": {}, "references": counted}


# ---------------------------------------------------------------- on disk


def test_sets_stay_on_disk(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = DataConfig(kind="hh", path=many(tmp_path / "hh.jsonl"), valid_fraction=0.2, test_fraction=0.2, limit=150)
    loaded = load(config, 0, tmp_path)
    dataset, _ = tokenise(loaded.preferences, tokenizer, config, tmp_path / "ids.arrow")
    for mapped in (loaded.preferences, loaded.references):
        assert [Path(file["filename"]).parent for file in mapped.cache_files] == [tmp_path]
    assert [Path(file["filename"]).parent for file in dataset.cache_files] == [tmp_path / "ids.arrow"]
    assert Dataset.from_list([{"a": 1}]).cache_files == [], "what is in memory has no file"


def test_parquet_is_read_in_batches_and_rows_are_numbered_through(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    Dataset.from_dict({"a": list(range(BATCH + 5))}).to_parquet(str(path))
    rows = list(read_rows(str(path)))
    assert rows[-1] == (f"{path}, row {BATCH + 4}", {"a": BATCH + 4})
    assert [row["a"] for _, row in rows] == list(range(BATCH + 5))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_that_are_written_are_read_again(suffix: str, tmp_path: Path) -> None:
    rows: list[Row] = [
        {"prompt": "é\n", "chosen": [BLUE], "rewards": [0.1, -1e-300]},
        {"prompt": "", "chosen": [], "rewards": []},
    ]
    path = tmp_path / f"rows{suffix}"
    write_rows(path, iter(rows))
    assert [row for _, row in read_rows(str(path))] == rows
    before = path.read_bytes()
    write_rows(path, rows)
    assert path.read_bytes() == before

    def broken() -> Iterator[Row]:
        yield rows[1]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_rows(path, broken())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path], "nothing half-written is left"


def test_rows_are_not_written_to_another_type_of_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows.csv: a file of type .jsonl, .jsonl.gz, .parquet is needed"):
        write_rows(tmp_path / "rows.csv", [])


def test_the_schema_is_told_by_the_columns() -> None:
    assert pair_of(any_pair(comparison(), "here"))[1] == " Cat sleeps."
    assert pair_of(any_pair({"chosen": dialogue("Hi", "A"), "rejected": dialogue("Hi", "B")}, "here"))[1] == " A"
    assert pair_of(any_pair({"prompt": "Hi", "chosen": [BLUE], "rejected": [GREEN]}, "here"))[1] == "Blue."
    with pytest.raises(ValueError, match=r"here: column 'chosen' is missing, there are \['text'\]"):
        any_pair({"text": "a"}, "here")
