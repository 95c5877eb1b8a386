"""Artifacts that were finished before a change of the code are found after it: their keys are a committed list.

Where the same options are to give something else, the keys have to change (`lm.data.tokens.FORM`,
`lm.base.store.FORMAT`) and `python -m tests.artifact_keys_test` writes the list anew; CHANGELOG.md says what is
computed again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lm.base.options import parse
from lm.base.store import Artifact, Store, key_of
from lm.config import SFT
from lm.objectives import MAIN, JointOracle, Method
from lm.stages import data, evaluations
from lm.stages.policies import policies
from lm.stages.rewards import asked, own_oracle, reward_artifact
from lm.stages.run import Run

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
