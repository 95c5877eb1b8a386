"""Names that are neither here nor on the hub are told within seconds, and once."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from lm.base import hub
from lm.data import places
from lm.models.loading import check_model, check_reward_model, load_tokenizer
from lm.models.weights import missing


@pytest.fixture(autouse=True)
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the hub is asked for, and says that it has not: in an empty folder, with an empty cache."""
    names: list[str] = []

    def repo_info(_: Any, name: str, **__: Any) -> None:
        names.append(name)
        raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", repo_info)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    hub._ask.cache_clear()
    return names


@pytest.mark.parametrize("load", [partial(check_reward_model, option="model"), partial(load_tokenizer, texts=())])
def test_a_name_that_the_hub_has_not_is_told_after_one_question(load: Any, asked: list[str], tmp_path: Path) -> None:
    (tmp_path / "models" / "fool").mkdir(parents=True)
    for name, meant in (("modles/fool", r" \(is 'models/fool' meant\?\)"), ("SmolLM2", "")):
        message = rf"^model '{name}': .* \(there is no such folder{meant}, and the hub has no model of this name"
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                load(name, trust_remote_code=False)
    assert asked == ["modles/fool", "SmolLM2"]


def test_offline_and_for_what_is_no_name_the_hub_is_not_asked(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("models/foo/", "my models/foo", "a\\b"):
        with pytest.raises(ValueError, match="there is no such folder"):
            check_model(name, False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="model 'file': a folder is needed, it is a file"):
        check_model("file", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"oracle_model 'me/judge': its config cannot be loaded \(.*cache here has no"):
        check_reward_model("me/judge", False)
    (tmp_path / "cache" / "models--me--judge" / "snapshots" / "0a").mkdir(parents=True)
    refs = tmp_path / "cache" / "models--me--judge" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0a")
    assert missing("me/judge") is None
    assert hub.commit_of("me/judge", "model") == "0a"
    assert hub.commit_of("me/other", "model") is None
    assert asked == []


def test_a_hub_that_does_not_answer_is_not_waited_for(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    forever = threading.Event()
    monkeypatch.setattr(hub, "PATIENCE", 0.01)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: forever.wait(60) and 1 / 0)
    assert missing("me/far") == "there is no such folder, and the hub gave no answer within 0.01 s"
    forever.set()


def test_a_set_is_looked_for_likewise(asked: list[str], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(
        FileNotFoundError, match=r"'data/pears.jsonl': .*\(is 'data/pairs.jsonl' meant\?\), and it is no"
    ):
        places.check("data/pears.jsonl")
    assert asked == []
    with pytest.raises(ValueError, match=r"data path 'dta/pairs': .* and the hub has no dataset of this name"):
        places.check("dta/pairs")
    places.check("data")
    assert asked == ["dta/pairs"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("pairs.jsonl.gz", "a file.jsonl.gz"),
        ("./pairs.csv", "a file.csv"),
        ("folder/", "a folder"),
        ("me/set@v1", "me/set"),
        ("me/set/part@refs/x", "me/set/part"),
    ],
)
def test_what_a_path_says_beside_its_content(path: str, said: str, tmp_path: Path) -> None:
    for name in ("pairs.jsonl.gz", "pairs.csv"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder").mkdir()
    assert places.placeless(path) == said
