"""What a run is said to take on the disk is what it took, and a run without room for it begins nothing."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lm.base.store import Artifact, Refused
from lm.config import Config, LoraConfig, TrainingConfig
from lm.evaluate import UPSTREAM
from lm.models.loading import SCRATCH
from lm.objectives import DPO, DRDO
from lm.reporting.results import results
from lm.stages.room import Need, _Looking, check_room, missing, needs
from lm.stages.run import Run
from tests.pipeline_test import WORLD, config, steps
from tests.tiny import causal_lm, tokenizer

USAGE = namedtuple("USAGE", "total used free")


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCRATCH, "scratch:tiny", {**SCRATCH["scratch:tiny"], "hidden_size": 128, "vocab_size": 1000})
        yield


def small(folder: Path, **options: Any) -> Config:
    asked_for = {
        "methods": ["dpo", "e-dpo", "drdo"],
        "options": {"drdo": DRDO(oracle_alpha=0.01)},
        "sft": steps(1),
        "oracle": steps(1),
        "reward": steps(1),
        "policy": steps(2),
        "snapshots": 2,
    }
    return config(folder, WORLD, **{**asked_for, **options})


def taken(root: Path) -> dict[str, int]:
    """Bytes of each stage's files, those of two names once."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    for stage in sorted(root.iterdir(), key=lambda path: path.name != "features"):  # which heads share the body of
        files = {(one := path.stat()).st_ino: one.st_size for path in stage.rglob("*") if path.is_file()}
        found[stage.name] = sum(size for file, size in files.items() if file not in seen)
        seen |= files.keys()
    return {stage: size for stage, size in found.items() if stage not in ("data", ".work")}


CASES: dict[str, dict[str, Any]] = {
    "all parameters": {},
    "heads": {
        "oracle": TrainingConfig(train="head"),
        "reward": TrainingConfig(train="head"),
        "methods": ["dpo", "e-dpo"],
        "options": {},
    },
    "adapters": {"lora": LoraConfig(rank=4, stages=["reward", "policy"]), "dtype": "float64"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "heads" else pytest.mark.thorough) for case in CASES]
)
def test_the_estimate_is_within_a_factor_of_what_a_run_took(case: str, tmp_path: Path) -> None:
    run = Run(small(tmp_path, **CASES[case]))
    before = {need.stage: need for need in needs(run)}
    results(run)
    after = taken(tmp_path)
    assert before.keys() == after.keys(), "every stage is in it"
    for stage, size in after.items():
        if size > 200_000:
            assert 0.7 < before[stage].kept / size < 2, (stage, before[stage], size)
    total = sum(after.values())
    assert 0.8 < sum(need.kept for need in before.values()) / total < 1.5
    assert needs(Run(run.config)) == list(before.values())
    assert missing(Run(run.config)) == ([], 0), "what is there is not asked for again"


def test_a_run_without_room_begins_nothing_and_says_how_much_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(small(tmp_path))
    kept = sum(need.kept for need in needs(run))
    with_passing = kept + max(need.passing for need in needs(run))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(10**12, 0, kept - 1))
    with pytest.raises(Refused) as told:
        results(run)
    text = str(told.value)
    assert re.match(r"about [\d.]+ MB are still to be written to .* \(policy [\d.]+ MB, reward [\d.]+ MB", text)
    assert re.search(r", where [\d.]+ MB are free; make room, name another output_dir, or ask for less", text)
    assert not text.count("\n")
    assert {path.name for path in tmp_path.iterdir()} <= {"data", ".work"}
    capsys.readouterr()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(10**12, 0, with_passing - 1))
    check_room(run)
    assert re.search(r"warning: about .* are free, and it may end for want of room; make room", capsys.readouterr().err)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(10**12, 0, with_passing))
    check_room(run)
    assert "warning" not in capsys.readouterr().err


def test_the_data_which_have_to_be_known_are_not_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to be said of them would be said twice."""
    asked, get = [], _Looking.get

    def noted(store: _Looking, stage: str, *rest: Any, **more: Any) -> Artifact:
        asked.append(stage)
        return get(store, stage, *rest, **more)

    monkeypatch.setattr(_Looking, "get", noted)
    check_room(Run(small(tmp_path)))
    assert "policy" in asked
    assert "data" not in asked


def test_checkpoints_and_more_policies_count(tmp_path: Path) -> None:
    def of(stage: str, **options: Any) -> Need:
        return next(need for need in needs(Run(small(tmp_path, **options))) if need.stage == stage)

    plain = of("policy")
    assert plain.passing == 0
    assert of("policy", snapshots=1).kept == plain.kept / 2
    assert of("policy", sweep={"dpo": [{"beta": 0.1}, {"beta": 1.0}]}).kept == plain.kept * 4 / 3
    model = of("sft").kept
    saving = of("policy", policy=replace(steps(2), save_steps=1))
    assert saving.kept == plain.kept
    assert 8 * model < saving.passing < 9 * model
    last = of("reward", reward=replace(steps(1), evaluations=0))
    assert last.passing == 0
    assert of("reward").passing == model, "the best so far, while a better one is written"


def larger(folder: Path) -> str:
    """A body of another size than pi_ref's."""
    words = tokenizer()
    causal_lm(vocab_size=len(words), eos_token_id=words.eos_token_id).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("how", ["steps", "head"])
def test_the_oracle_and_reward_models_are_as_large_as_what_each_starts_from(how: str, tmp_path: Path) -> None:
    training = steps(1) if how == "steps" else TrainingConfig(train="head")
    asked = {"oracle": training, "reward": training, "methods": ["dpo", "e-dpo"], "options": {}}

    def taken_by(**options: Any) -> dict[str, int]:
        return {need.stage: need.kept for need in needs(Run(small(tmp_path / "run", **asked, **options)))}

    body = larger(tmp_path / "body")
    plain, oracles, rewards = taken_by(), taken_by(oracle_base=body), taken_by(reward_base=body)
    both = taken_by(oracle_base=body, reward_base=body)
    assert oracles["reward"] == plain["reward"]
    assert oracles["oracle"] == both["oracle"] != plain["oracle"]
    assert rewards["reward"] == both["reward"] != plain["reward"]
    assert rewards["oracle"] == both["oracle"], "reward_base is the oracle's where it has none"
    if how == "head":
        assert oracles["features"] == plain["features"] + both["features"], "a body each"
        assert rewards["features"] == both["features"], "one body, named once or twice"
    assert oracles["policy"] == plain["policy"]


SAVING = {"policy": replace(steps(2), save_steps=1), "methods": ["dpo", "e-dpo"], "options": {}, "snapshots": 1}


@pytest.fixture(name="finished", scope="module")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    run = Run(small(tmp_path_factory.mktemp("finished"), reward=steps(1), **SAVING))
    results(run)
    return run.config


def test_of_a_finished_run_nothing_is_asked_for_again(finished: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(10**12, 10**12, 0))
    assert missing(Run(finished)) == ([], 0)
    check_room(Run(finished))


def test_only_what_other_options_change_is_asked_for(finished: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the folder for other options counts for nothing, and what is shared is not asked for."""
    other = Run(replace(finished, options={"dpo": DPO(beta=0.7)}))
    whole = {need.stage: need for need in needs(other)}
    left = {need.stage: need for need in missing(other)[0]}
    assert left.keys() == {"policy", "evaluate"}, "dpo's alone"
    assert left["policy"] == Need("policy", whole["policy"].kept // 2, whole["policy"].passing)
    of_pi_ref = whole["evaluate"].kept - 3 * left["evaluate"].kept
    assert 0 < of_pi_ref < left["evaluate"].kept, "its log-probs of test pairs are there"
    reseeded = Run(replace(finished, seed=finished.seed + 1))
    assert missing(reseeded)[0] == needs(reseeded), "of another seed all, whatever lies there"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(10**12, 0, 10**6))
    with pytest.raises(Refused, match="are still to be written"):
        check_room(other)


def test_a_command_that_makes_no_policies_needs_no_room_for_them(finished: Config) -> None:
    asked = replace(finished, options={"dpo": DPO(beta=0.7)})
    assert [need.stage for need in missing(Run(asked, read_only=UPSTREAM))[0]] == ["evaluate"]


def test_what_a_run_before_has_begun_is_there(
    finished: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(finished.output_dir, tmp_path, dirs_exist_ok=True)
    run = Run(replace(finished, output_dir=str(tmp_path)))
    (gone,) = (tmp_path / "policy").glob("e-dpo-*")
    shutil.rmtree(gone)
    for name in (gone.name, "e-dpo-of-others"):
        checkpoint = tmp_path / ".work" / f"policy-{name}" / "scratch" / "checkpoint-1"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model").write_bytes(bytes(10**6))
        (checkpoint / "link").hardlink_to(checkpoint / "model")
    left, begun = missing(run)
    assert [need.stage for need in left] == ["policy", "evaluate"], "which step it has is not known, nor its samples"
    kept = sum(need.kept for need in left)
    assert begun == 10**6, "of this run's own, and once"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(10**12, 0, kept - 10**6))
    check_room(Run(run.config))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(10**12, 0, kept - 10**6 - 1))
    with pytest.raises(Refused, match=r"less 1\.0 MB that a run before has begun"):
        check_room(Run(run.config))


def test_what_was_made_from_a_model_that_is_gone_is_there(finished: Config, tmp_path: Path) -> None:
    shutil.copytree(finished.output_dir, tmp_path, dirs_exist_ok=True)
    run = Run(replace(finished, output_dir=str(tmp_path)))
    (gone,) = (tmp_path / "reward").glob("b0.5-*")
    shutil.rmtree(gone)
    (whole,) = (need for need in needs(run) if need.stage == "reward")
    assert missing(run) == ([replace(whole, kept=whole.kept // 3)], 0), "one of three, and no score or policy"
