"""An artifact is whole or absent, made once for its inputs, and never believed after it has changed."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from lm.base.files import read_jsonl, sha256_of, write_jsonl
from lm.base.store import Artifact, CorruptArtifact, MissingArtifact, Store, keyed
from lm.config import DataConfig
from theory import records
from theory.records import write_json, write_text


@dataclass(frozen=True)
class Options:
    """Stands for a stage's options."""

    rate: float = 0.1
    layers: tuple[int, ...] = (1, 2)


class Maker:
    """Fills an artifact and counts how often it was asked to."""

    def __init__(self, text: str = "weights") -> None:
        self.calls, self.text = 0, text

    def __call__(self, folder: Path, scratch: Path) -> dict[str, Any]:
        self.calls += 1
        (folder / "deep").mkdir()
        (folder / "deep" / "weights.txt").write_text(self.text)
        return {"loss": 0.5}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "run", seed=7)


def test_a_record_has_the_command_to_give_again(monkeypatch: pytest.MonkeyPatch) -> None:
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["some/script.py", "--methods", "[dpo, e-dpo]"])
    assert records.command() == ["python", "some/script.py", "--methods", "[dpo, e-dpo]"]
    for module in ("lm.train", "theory.__main__"):
        main.__spec__ = ModuleSpec(module, None)
        assert records.command()[:3] == ["python", "-m", module.removesuffix(".__main__")]


def test_the_same_inputs_are_made_once(store: Store) -> None:
    make = Maker()
    first = store.get("policy", "dpo", {"options": Options()}, make)
    again = Store(store.root, seed=7).get("policy", "dpo", {"options": Options()}, make)
    assert make.calls == 1
    assert first == again
    assert first.metrics == {"loss": 0.5}
    assert first.path == store.root / "policy" / f"dpo-{first.key}"
    record = json.loads((first.path / "artifact.json").read_text())
    assert record["provenance"]["seed"] == 7
    assert {"torch", "transformers", "python"} <= record["provenance"]["versions"].keys()
    assert not (store.root / ".work").exists() or not any((store.root / ".work").iterdir())


def test_other_inputs_stages_or_names_go_to_another_folder_and_nothing_is_overwritten(store: Store) -> None:
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("policy", "dpo", {"options": Options()}),
        ("policy", "dpo", {"options": Options(rate=0.2)}),
        ("policy", "dpo", {"options": Options(layers=(2, 1))}),
        ("policy", "dpo", {"options": Options(), "seed": 1}),
        ("policy", "ipo", {"options": Options()}),
        ("reward", "dpo", {"options": Options()}),
        ("policy", "dpo", {"options": {"rate": 0.1, "layers": [1, 2]}}),
    ]
    made = [store.get(*what, Maker(str(number))) for number, what in enumerate(asked)]
    assert len({artifact.path for artifact in made}) == len(asked)
    for number, artifact in enumerate(made):
        assert (artifact.path / "deep" / "weights.txt").read_text() == str(number)


def test_an_upstream_artifact_counts_by_its_key_and_not_by_its_place(store: Store, tmp_path: Path) -> None:
    upstream = store.get("sft", "policy", {"seed": 0}, Maker())
    moved = Artifact(tmp_path / "elsewhere", upstream.key, {})
    other = Artifact(upstream.path, "0" * 12, {})
    keys = [store.get("policy", "dpo", {"start": start}, Maker()).key for start in (upstream, moved, other)]
    assert keys[0] == keys[1] != keys[2]


def test_a_stage_that_fails_leaves_nothing_to_believe_and_keeps_its_scratch(store: Store) -> None:
    def fail(folder: Path, scratch: Path) -> dict[str, Any]:
        (folder / "half.txt").write_text("half")
        (scratch / "checkpoint").write_text("step 5")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get("policy", "dpo", {}, fail)
    assert not (store.root / "policy").exists()

    def finish(folder: Path, scratch: Path) -> dict[str, Any]:
        assert (scratch / "checkpoint").read_text() == "step 5"
        assert not list(folder.iterdir()), "the half-written result is gone"
        return {}

    finished = store.get("policy", "dpo", {}, finish)
    assert [path.name for path in finished.path.iterdir()] == ["artifact.json"]


def test_metrics_that_json_cannot_hold_leave_nothing(store: Store) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.get("policy", "dpo", {}, lambda folder, scratch: {"loss": float("nan")})
    assert not (store.root / "policy").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "deep" / "weights.txt").write_text("others"), "weights.txt has changed since"),
        (lambda path: (path / "deep" / "weights.txt").unlink(), "weights.txt is missing since"),
        (lambda path: (path / "artifact.json").write_text("{"), "artifact.json cannot be read"),
        (lambda path: (path / "artifact.json").write_text("{}"), "artifact.json cannot be read"),
        (lambda path: (path / "artifact.json").unlink(), "artifact.json cannot be read"),
    ],
    ids=["changed", "missing", "truncated record", "empty record", "no record"],
)
def test_damage_is_named_with_the_remedy(damage: Any, message: str, store: Store) -> None:
    made = store.get("policy", "dpo", {}, Maker())
    damage(made.path)
    with pytest.raises(CorruptArtifact, match=f"{message}.*; delete .*{made.path.name}|{message}.*delete the folder"):
        store.get("policy", "dpo", {}, Maker())


def test_a_read_only_stage_is_never_made(store: Store) -> None:
    reader = Store(store.root, seed=7, read_only=frozenset({"policy"}))
    make = Maker()
    with pytest.raises(MissingArtifact, match=r"there is no finished policy dpo in .*; run `python -m lm.train` first"):
        reader.get("policy", "dpo", {}, make)
    assert make.calls == 0
    assert not store.root.exists()
    reader.get("evaluate", "dpo", {}, make)
    store.get("policy", "dpo", {}, make)
    assert reader.get("policy", "dpo", {}, make).metrics == {"loss": 0.5}
    assert make.calls == 2


def test_an_option_that_came_later_is_in_a_key_where_it_is_set() -> None:
    @dataclass(frozen=True)
    class Options:
        old: int = 1
        later: str = field(default="auto", metadata={"keyed": "where set"})
        never: int = field(default=0, metadata={"keyed": False})

    assert keyed(Options(never=3)) == {"old": 1}
    assert keyed(Options(later="named")) == {"old": 1, "later": "named"}
    data = {"kind": "preferences", "path": "pairs.jsonl"}
    assert "prompt" not in keyed(DataConfig(**data))  # type: ignore[arg-type]
    assert keyed(DataConfig(**data, prompt="question"))["prompt"] == "question"  # type: ignore[arg-type]


def test_what_has_no_plain_description_is_no_key(store: Store) -> None:
    with pytest.raises(TypeError, match="an artifact cannot be keyed by a PosixPath"):
        store.get("policy", "dpo", {"path": Path("/somewhere")}, Maker())


# ---------------------------------------------------------------- files


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("inf")})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_json_lines_are_read_back_with_their_numbers(tmp_path: Path) -> None:
    rows = [{"a": "ż\n"}, {"b": [1, 2]}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == [(1, rows[0]), (2, rows[1])]


def test_a_folders_digest_depends_on_names_and_bytes(tmp_path: Path) -> None:
    digests = []
    for number, (name, text) in enumerate([("a", "1"), ("b", "1"), ("a", "2")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_text(text)
        digests.append(sha256_of(folder))
    assert len(set(digests)) == 3
    assert sha256_of(tmp_path / "0") == digests[0]
    assert sha256_of(tmp_path / "0" / "a") == sha256_of(tmp_path / "1" / "b"), "a file's digest is of its bytes"
