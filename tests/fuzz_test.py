"""Whatever stands in a data file or in a config: it is read, or refused by one message that says where; nothing hangs.

Hypothesis breaks good rows, files and configs. `tests/fuzz_atheris.py` looks for more behind the same two doors,
`read_data` and `read_config`.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lm.base.files import read_jsonl
from lm.base.options import CONFIGS, parse
from lm.config import Config, DataConfig
from lm.data.schemas import Drop, any_conversation
from lm.data.tokens import load
from lm.studies.diagnosis import measure, read

PATIENCE = 120
"""Seconds until an input counts as one that hangs; on an idle machine none takes one."""
LONGEST = 4000
"""Characters of a message: no text of the data stands in it as a whole."""


class Hangs(BaseException):
    """No exception of any library's, which would catch it."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def works_or_says(action: Callable[[], Any], where: str) -> str | None:
    """None where the action works, the message of its ValueError where it has one that matches `where`; any other
    exception, a ValueError of some library's included, is a fault of ours and raised."""
    with in_time():
        try:
            action()
        except ValueError as error:
            message = str(error)
            if type(error) is not ValueError or not re.search(where, message) or len(message) > LONGEST:
                raise
            return message
    return None


# ---------------------------------------------------------------- the two doors


def read_data(path: Path, folder: Path) -> list[str]:
    """Reads a file in every way that a preference set is read, and returns the messages."""
    where = re.escape(str(path))

    def conversations() -> None:
        for number, row in read_jsonl(path):
            conversation = any_conversation(row, f"{path}, line {number}")
            assert isinstance(conversation, Drop) or conversation.context

    def diagnosis() -> None:
        measure(read(str(path)), "pairs", max_prompt_length=512, max_completion_length=128)

    def loading(config: DataConfig) -> Callable[[], Any]:
        return lambda: load(config, 0, folder)

    ways = [
        *(
            loading(DataConfig(kind=kind, path=str(path), **more))
            for kind, more in (
                ("preferences", {}),
                ("preferences", {"rewards": "given"}),
                ("preferences", {"sft_path": str(path)}),
                ("hh", {}),
                ("tldr", {"sft_path": str(path)}),
            )
        ),
        diagnosis,
    ]
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        ways.append(conversations)
    return [message for way in ways if (message := works_or_says(way, where))]


def read_config(path: Path, *options: str) -> str | None:
    """Reads a config file over the demo's, as every command does; the message, None where it is a config."""
    said = io.StringIO()

    def parsing() -> None:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            config, _ = parse("lm.train", "", ["--config", str(CONFIGS / "demo.yaml"), "--config", str(path), *options])
        assert isinstance(config, Config)

    try:
        return works_or_says(parsing, r"\w+\.\w+|\w*Config\b|--\w+")
    except SystemExit as left:
        if left.code != 2 or "error: " not in said.getvalue():
            raise RuntimeError(f"left with {left.code} and {said.getvalue()!r}") from None
        return said.getvalue()


# ---------------------------------------------------------------- good rows, and how they are broken

ROWS: list[dict[str, Any]] = [
    {
        "prompt": "Which sky?",
        "chosen": " A blue one.",
        "rejected": " None",
        "chosen_rewards": [1.0, 0.5],
        "rejected_rewards": [0.0, -1.0],
        "margin": 1.25,
        "confidence": 4,
        "worker": "w",
        "completion": " Blue",
    },
    {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "Hello"}],
        "rejected": [{"role": "assistant", "content": "Go"}],
        "score_chosen": 1,
        "score_rejected": 0.5,
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    },
    {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"role": "tool", "content": [{"type": "text", "text": "3"}]},
        ],
        "chosen": {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
        },
        "rejected": {"from": "gpt", "value": "Go", "reasoning_content": "x", "weight": 1},
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "system": "Be kind.",
        "prompt": None,
        "messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        "margin": 1,
    },
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
    {
        "info": {"subreddit": "cats", "title": "My cat", "post": "It ran away."},
        "summaries": [{"text": "A cat ran."}, {"text": "Cat"}],
        "choice": 1,
        "extra": {"confidence": 7},
        "worker": 3,
        "subreddit": "cats",
        "title": "My cat",
        "post": "It ran away.",
        "summary": "A cat ran.",
    },
]
"""Every schema, with all that is read of it."""

ODD_TEXT = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            "",
            " ",
            "\0",
            "\ud800",
            "a\udfff",
            "\u202e",
            "\n\nHuman:",
            "\n\nAssistant: x",
            "é\u0301",
            "👩‍👩‍👧",
            "{post}",
            "{0}",
        ]
    ),
    st.integers(1, 4).map(lambda n: "long " * 10**n),
)
ODD_NUMBER = st.one_of(
    st.sampled_from([0, -1, 10**400, -(10**30), 1e308, -1e308, float("nan"), float("inf"), True, False]),
    st.floats(),
    st.integers(),
)
ODD = st.recursive(
    st.one_of(st.none(), ODD_NUMBER, ODD_TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(ODD_TEXT, inner, max_size=3)),
    max_leaves=6,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to everything inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in inside for found in ((*at, key), *places(item, (*at, key)))]


@st.composite
def broken(draw: st.DrawFn, good: Any, values: st.SearchStrategy[Any] = ODD) -> Any:
    """A copy of a value with one to three of its parts replaced, removed, or put in under another name."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        found = places(value)
        if not found:
            return draw(values)
        *way, last = draw(st.sampled_from(found))
        holder = value
        for key in way:
            holder = holder[key]
        what = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if what == "replace":
            holder[last] = draw(values)
        elif what == "remove":
            del holder[last]
        elif isinstance(holder, dict):
            holder[draw(ODD_TEXT)] = draw(values)
        else:
            holder.append(draw(values))
    return value


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Bytes of which some are cut off, overwritten, or put in between."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        what = draw(st.sampled_from(["cut", "write", "insert"]))
        if what == "cut":
            del data[at:]
        else:
            new = draw(st.binary(min_size=1, max_size=6))
            data[at : at + (len(new) if what == "write" else 0)] = new
    return bytes(data)


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


GOOD_FILES: dict[str, list[bytes]] = {
    ".jsonl": [lines(ROWS), *(lines([row] * 2) for row in ROWS)],
    ".jsonl.gz": [gzip.compress(lines(ROWS), mtime=0)],
    ".parquet": [parquet([row] * 2) for row in ROWS],
    ".json": [json.dumps(ROWS).encode(), lines(ROWS[:1])],
    ".csv": [b'prompt,chosen,rejected,margin,chosen_rewards\n"Which ""sky""?", A blue one., None,1.25,"[1, 2]"\n'],
    ".tsv.gz": [gzip.compress(b"prompt\tchosen\trejected\nWhich sky?\t Blue\t None\n", mtime=0)],
}


def few(count: int) -> Callable[[Any], Any]:
    """The bound of a test: this many inputs, however long one takes."""
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, suppress_health_check=slow)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def test_good_rows_are_read(folder: Path) -> None:
    """What is broken below is whole: each schema loads without a message in its own way of reading."""
    kinds = ("preferences", "preferences", "preferences", "hh", "tldr")
    for row, kind, rewards in zip(ROWS, kinds, ("given", "given", "given", "models", "models"), strict=True):
        path = folder / "good.jsonl"
        path.write_bytes(lines([row]))
        sft = str(path) if kind != "hh" else None
        config = DataConfig(kind=kind, path=str(path), sft_path=sft, rewards=rewards)  # type: ignore[arg-type]
        loaded = load(config, 0, folder)
        assert (len(loaded.preferences), len(loaded.references)) == (1, 1)


@given(st.lists(st.sampled_from(ROWS).flatmap(lambda row: st.one_of(st.just(row), broken(row))), max_size=3))
@example([{**ROWS[0], "chosen": "\ud800"}])
@example([{**ROWS[0], "worker": "\ud800"}])
@example([{**ROWS[0], "chosen_rewards": [10**400, 1.0]}])
@example([{**ROWS[0], "chosen_rewards": [1e308, 1e308], "margin": None}])
@example([{**ROWS[1], "score_chosen": 1e308, "score_rejected": -1e308}])
@example([{**ROWS[0], "chosen": {"long": "x" * 100_000}}])
@few(60)
def test_broken_rows(folder: Path, rows: list[Any]) -> None:
    path = folder / "rows.jsonl"
    path.write_bytes(lines(rows))
    read_data(path, folder)


@given(
    st.sampled_from(sorted(GOOD_FILES)).flatmap(
        lambda suffix: st.tuples(st.just(suffix), st.sampled_from(GOOD_FILES[suffix]).flatmap(damaged))
    )
)
@example((".jsonl", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"))
@example((".jsonl", b'{"prompt": ' + b"9" * 5000 + b"}"))
@example((".jsonl", b"\xff\xfe"))
@example((".jsonl.gz", gzip.compress(lines(ROWS), mtime=0)[:20] + b"\xff" * 20))
@few(60)
def test_damaged_files(folder: Path, file: tuple[str, bytes]) -> None:
    suffix, content = file
    path = folder / f"damaged{suffix}"
    path.write_bytes(content)
    read_data(path, folder)


@given(st.one_of(ODD_TEXT, st.text(max_size=300), st.just("/" * 5000), st.just("x" * 5000 + ".jsonl")))
@few(20)
def test_odd_names_of_files(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network in tests")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with contextlib.suppress(OSError, ValueError):
        if Path(path).exists():  # the folder that this runs in, or the root
            return
    with contextlib.suppress(FileNotFoundError):
        assert works_or_says(lambda: read(path), "data path")


# ---------------------------------------------------------------- configs

DEMO = yaml.safe_load((CONFIGS / "demo.yaml").read_text(encoding="utf-8"))
PLAIN = st.one_of(
    st.none(),
    st.sampled_from([0, -1, 10**400, 1e308, float("nan"), float("inf"), True, "dpo", "auto", "preferences", [], {}]),
    st.floats(),
    st.integers(),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.sampled_from(["beta", "alpha", "d-dpo", "path"]), st.floats(), max_size=2),
)


@given(broken(DEMO, PLAIN))
@example({"data": None})
@example({"policy": 0})
@example({"data": {"prompt_template": None}})
@example({"data": {"prompt_template": "{post!r:>{title}}"}})
@example({"policy": {"learning_rate": float("inf")}})
@example({"sweep": {"d-dpo": [{"beta": {}}]}})
@few(20)
def test_broken_configs(folder: Path, value: Any) -> None:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    read_config(path)


@given(damaged((CONFIGS / "demo.yaml").read_bytes()))
@example(b"data: &d {world: *d}")
@example(b"seed: " + b"[" * 3000 + b"]" * 3000)
@example(b"seed: " + b"9" * 5000)
@example(b"seed: !!python/object/apply:os.system [x]")
@example(b"\xff\xfe\x00")
@few(15)
def test_damaged_configs(folder: Path, content: bytes) -> None:
    path = folder / "config.yaml"
    path.write_bytes(content)
    read_config(path)


# ---------------------------------------------------------------- the doors themselves


class Own(ValueError):
    """Some library's."""


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        Own("pairs.jsonl"),
        ValueError("elsewhere"),
        RecursionError("x"),
        ValueError("pairs.jsonl" + "x" * LONGEST),
    ],
)
def test_other_exceptions_and_messages_count_as_faults(error: Exception) -> None:
    def fails() -> None:
        raise error

    with pytest.raises(type(error)):
        works_or_says(fails, "pairs")


def test_a_hang_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.alarm", lambda seconds: signal.setitimer(signal.ITIMER_REAL, 0.05 if seconds else 0))

    def forever() -> None:
        while True:
            with contextlib.suppress(Exception):
                re.match("x", "x")

    with pytest.raises(Hangs):
        works_or_says(forever, "")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "ab\ud800"}, r"'chosen' is not Unicode text: half of a surrogate pair, '\\ud800', at character 2"),
        ({"margin": 10**400}, "'margin' must be a finite number, got 1000"),
        ({"score_chosen": 1e308, "score_rejected": -1e308}, "the difference of the rewards must be a finite number"),
        (
            {"margin": None, "chosen_rewards": [1e308] * 2},
            "'the mean of chosen_rewards' must be a finite number, got inf",
        ),
        ({"chosen": {"x": "y" * 10**6}}, "'chosen' must be of type str, got dict: {'x': 'yyy"),
        ('{"prompt": ' + "9" * 5000 + "}", "not JSON that can be read"),
        ("[" * 100_000, "not JSON that can be read"),
    ],
)
def test_what_the_messages_say(row: Any, message: str, folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_text(row if isinstance(row, str) else json.dumps(ROWS[0] | row))
    assert any(re.search(f"line 1: {message}", said) for said in read_data(path, folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data: &d {world: *d}", r"aliases \(\*name\) are not read; write out what they stand for"),
        ("seed: " + "[" * 30 + "]" * 30, "nested more than 20 deep"),
        ("seed: !!python/object/apply:os.system [x]", "could not determine a constructor for the tag"),
        ("data: null", "--data must be a mapping of its options, got null"),
        ("policy: 0", "--policy must be a mapping of its options, got 0"),
        ("data: {prompt_template: null}", "--data.prompt_template must not be null"),
        ("data: {limit: null}", "^$"),
        ("policy: {learning_rate: .inf}", "TrainingConfig.learning_rate must be finite, got inf"),
        ("data: {prompt_template: '{post!r:>9}'}", "DataConfig.prompt_template must have {post} once"),
        ("data: {prompt_template: '{post.__class__}'}", "DataConfig.prompt_template must have {post} once"),
    ],
)
def test_what_configs_are_told(content: str, message: str, folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_text(content)
    assert re.search(message, read_config(path) or ""), "none where a null is right"
