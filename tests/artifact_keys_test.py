"""Artifacts that were finished before a change of the code are found after it: their keys are a committed list.

Where the same options are to give something else, the keys have to change (`lm.data.tokens.FORM`,
`lm.base.store.FORMAT`) and `python -m tests.artifact_keys_test` writes the list anew; CHANGELOG.md says what is
computed again.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lm.base.options import parse
from lm.base.store import Artifact, Store, key_of
from lm.config import SFT
from lm.objectives import MAIN, JointOracle, Method
from lm.stages import data, evaluations, readings
from lm.stages.policies import policies
from lm.stages.rewards import asked, own_oracle, reward_artifact
from lm.stages.run import COMMITS, Run
from theory.records import write_json

LIST = Path(__file__).with_name("artifact_keys.json")
CASES = json.loads(LIST.read_text())
"""The options of a run, and the keys of all that it made, by stage and name: what the first edition made at 518f96f,
with the keys since form 2 of the data."""
METRICS = {
    "members": 3,
    "accuracy": {"all": {}},
    "steps": 3,
    "rewards": [0.0],
    **{step: {"advantage": float(step)} for step in "123"},
}


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What the store is asked for; nothing is made."""
    return watched(monkeypatch)


def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}

    def get(store: Store, stage: str, name: str, inputs: Any, make: Any, *, alone: bool = False) -> Artifact:
        key = key_of(stage, name, inputs)
        of_name = found.setdefault(f"{stage}/{name}", [])
        of_name += [key] if key not in of_name else []
        return Artifact(store.root / stage / f"{name}-{key}", key, METRICS)

    monkeypatch.setattr(Store, "get", get)
    monkeypatch.setattr(data, "_checked_tokenizer", lambda *_: None)
    monkeypatch.setattr(readings, "reader", lambda *_: None)
    monkeypatch.setattr(evaluations, "_snapshots", lambda a: {1: a.path / "step-1", 3: a.path})
    return found


def ask_for_all(case: str) -> None:
    run = Run(parse("lm.test", "", CASES[case]["arguments"])[0])
    for name in run.config.methods:
        policies(run, name)
        evaluations.evaluation(run, name)
    evaluations.evaluation(run, SFT)
    if run.config.data.rewards == "models":
        for name in (*asked(run), MAIN):  # which no method may distil
            reward_artifact(run, name)


@pytest.mark.parametrize("case", CASES)
def test_finished_artifacts_keep_their_keys(case: str, keys: dict[str, list[str]]) -> None:
    ask_for_all(case)
    known = CASES[case]["keys"]
    assert {name: keys.get(name) for name in known} == known
    # Scores of a reward model are an artifact of their own since; they were a part of the pairs'.
    assert {name.split("/")[0] for name in keys.keys() - known.keys()} <= {"score"}


def test_another_option_is_another_key(keys: dict[str, list[str]]) -> None:
    run = Run(parse("lm.test", "", ["--dpo.beta", "0.123"])[0])
    policies(run, "dpo")
    known = CASES["demo"]["keys"]
    assert keys["sft/policy"] == known["sft/policy"]
    assert keys["policy/dpo"] != known["policy/dpo"]


def test_a_target_of_the_kl_is_in_the_key_with_its_rate_and_only_where_there_is_one(
    keys: dict[str, list[str]],
) -> None:
    def key(*options: str) -> str:
        keys.clear()
        policies(Run(parse("lm.test", "", list(options))[0]), "p-dpo")
        return keys["policy/p-dpo"][0]

    assert key() == key("--p_dpo.kl.target", "null") == CASES["demo"]["keys"]["policy/p-dpo"][0]
    target = ("--p_dpo.kl.target", "2")
    assert key(*target) == key("--p_dpo.kl.target", "2.0") == key("--sweep", "{p-dpo: [{kl: {target: 2}}]}")
    assert len({key(), key(*target), key("--p_dpo.kl.target", "3"), key(*target, "--p_dpo.kl.rate", "0.1")}) == 4


@dataclass(frozen=True)
class Warm(JointOracle):
    """An oracle with an option more."""

    temperature: float = 1.0


def test_an_oracle_of_another_kind_or_with_another_option_has_a_key_of_its_own(keys: dict[str, list[str]]) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Own(Method):
        oracle: JointOracle

        @property
        def own_oracle(self) -> JointOracle:
            return self.oracle

    run = Run(parse("lm.test", "", CASES["own-oracle"]["arguments"])[0])
    oracles = [JointOracle(alpha=0.01), Warm(alpha=0.01), Warm(alpha=0.01, temperature=10.0)]
    for oracle in oracles:
        own_oracle(run, "drdo", Own(oracle=oracle))
    assert len(set(keys["reward/drdo"])) == 3


# ---------------------------------------------------------------- content, and not spelling


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a set, a model and a judge that are enough to be keyed."""
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    for name, kind in (("base", "LlamaForCausalLM"), ("judge", "LlamaForSequenceClassification")):
        one = {"model_type": "llama", "architectures": [kind], "num_labels": 1, "name": name}
        write_json(tmp_path / name / "config.json", one)
        for file in ("tokenizer.json", "model.safetensors"):
            (tmp_path / name / file).write_text("{}")
    (tmp_path / "below").mkdir()
    (tmp_path / "link.jsonl").symlink_to("pairs.jsonl")
    (tmp_path / "link").symlink_to("base")
    for check in ("check_model", "check_reward_model", "check_reward_base"):  # which would look into them
        monkeypatch.setattr(f"lm.models.loading.{check}", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SETS", str(tmp_path / "below" / ".."))
    return tmp_path


def asked_keys(*options: str) -> Run:
    """A run of a set that asks for a policy, and so for all below it."""
    arguments = ["--data.kind", "preferences", "--methods", "[d-dpo]", "--output_dir", "run", *options]
    run = Run(parse("lm.test", "", arguments)[0])
    policies(run, "d-dpo")
    return run


PATHS = ["{home}/pairs.jsonl", "./pairs.jsonl", "below/../pairs.jsonl", "~/pairs.jsonl"]
MODELS = ["{home}/base/", "link", "$SETS/base"]


@pytest.mark.parametrize(
    ("path", "model"),
    [  # each spelling of the one by default, with all of the other in the thorough ones
        pytest.param(path, model, marks=[] if i % len(MODELS) == j else pytest.mark.thorough)
        for i, path in enumerate(PATHS)
        for j, model in enumerate(MODELS)
    ],
)
def test_a_path_counts_by_its_content(path: str, model: str, home: Path, keys: dict[str, list[str]]) -> None:
    asked_keys("--data.path", "pairs.jsonl", "--model", "base", "--data.sft_path", "pairs.jsonl")
    spelled = [option.format(home=home) for option in (path, model)]
    again = ["--data.path", spelled[0], "--model", spelled[1], "--data.sft_path", "link.jsonl"]
    asked_keys(*again)
    assert all(len(found) == 1 for found in keys.values()), keys
    (home / "base" / "tokenizer.json").write_text("{ }")
    asked_keys(*again)
    assert all(len(found) == 2 for found in keys.values()), "another content is another key"


def test_a_given_judge_and_rows_of_another_type_count_likewise(home: Path, keys: dict[str, list[str]]) -> None:
    options = ["--data.path", "pairs.jsonl", "--data.labels", "oracle", "--oracle_model"]
    for spelled in ("judge", "./judge/", str(home / "below" / ".." / "judge")):
        asked_keys(*options, spelled)
    assert {name: len(found) for name, found in keys.items()} == dict.fromkeys(keys, 1)
    (home / "pairs.json").write_bytes((home / "pairs.jsonl").read_bytes())
    asked_keys("--data.path", "pairs.json")
    assert len(keys["data/preferences"]) == 2, "the same bytes are read in another way"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, of a machine without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache: Path, repository: str, revision: str, commit: str) -> None:
    """What the hub's client leaves when it loads a revision."""
    for part in ("refs", f"snapshots/{commit}"):
        (cache / repository / part).mkdir(parents=True, exist_ok=True)
    (cache / repository / "refs" / revision).write_text(commit)


def test_a_hub_name_counts_by_its_commit(
    home: Path, cache: Path, keys: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    put(cache, "models--me--tiny", "main", "a" * 40)
    put(cache, "datasets--me--set", "main", "b" * 40)
    put(cache, "datasets--me--set", "v1", "b" * 40)
    names = ("--model", "me/tiny", "--data.path")
    for path in ("me/set", "me/set@v1", f"me/set@{'b' * 40}"):
        asked_keys(*names, path)
    assert all(len(found) == 1 for found in keys.values())
    put(cache, "models--me--tiny", "main", "c" * 40)
    asked_keys(*names, "me/set")
    assert all(len(found) == 2 for found in keys.values()), "the name stands for another model now"
    assert "commit" not in capsys.readouterr().err
    os.rename(cache, home / "gone")
    write_json(home / "run" / COMMITS, {"model me/tiny": "c" * 40, "dataset me/set": "b" * 40})
    asked_keys(*names, "me/set")
    assert all(len(found) == 2 for found in keys.values()), "a run's folder knows what its names stood for"
    assert "model me/tiny: neither the hub nor its cache tells the commit" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"model 'me/tinny': there is no such folder, and the hub's cache here has no"):
        asked_keys("--model", "me/tinny", "--data.path", "pairs.jsonl")


def write_anew() -> None:
    """The list with the keys of today, of what it lists."""
    blocks = []
    for case, made in CASES.items():
        with pytest.MonkeyPatch.context() as patch:
            found = watched(patch)
            ask_for_all(case)
        listed = ",\n".join(f"  {json.dumps(name)}: {json.dumps(found[name])}" for name in made["keys"])
        arguments = json.dumps(made["arguments"])
        blocks.append(f' {json.dumps(case)}: {{"arguments": {arguments}, "keys": {{\n{listed}\n }}}}')
    LIST.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


if __name__ == "__main__":
    write_anew()
