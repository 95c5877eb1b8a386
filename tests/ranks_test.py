"""The commands on several ranks: the artifacts of one process, errors told once, and going on after one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lm.base import ranks
from lm.base.files import read_jsonl
from lm.base.store import seal
from lm.config import LogprobsConfig
from lm.logprobs.completions import CompletionModel
from lm.logprobs.scoring import score_rows
from lm.models.loading import SCRATCH
from lm.reporting.results import report
from lm.stages.run import command
from tests.small_run import SMALL
from tests.tiny import causal_lm, pairs

ROOT = Path(__file__).parents[1]

OPTIONS = """
model: scratch:tiny
device: cpu
data:
  kind: world
  prompt_template: "{post}\\n\\nTL;DR:"
  max_prompt_length: 120
  max_completion_length: 40
  valid_fraction: 0.1
  test_fraction: 0.15
  world: {posts: 100}
# Steps too small to change a float32: ranks add gradients in another order, and what is made of a model that was
# trained could not be compared byte by byte.
sft: {max_steps: 2, batch_size: 8, learning_rate: 1.0e-60}
oracle: {max_steps: 2, batch_size: 8, learning_rate: 1.0e-60}
reward: {max_steps: 2, batch_size: 8, learning_rate: 1.0e-60}
policy: {max_steps: 6, batch_size: 6, learning_rate: 1.0e-3, save_steps: 1, logging_steps: 1}
bias: {rho: 0.4, member_fractions: [0.4, 0.6]}
logprobs: {scoring_tokens: 1024}
snapshots: 2
methods: [e-dpo, drdo]
drdo: {oracle_alpha: 0.01}
evaluation: {resamples: 100}
"""
TRAINED = "policy"
"""The stage with a learning rate to speak of."""


def torchrun(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command on two ranks that talk by gloo."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@dataclass
class Runs:
    """One run by one process, and by two ranks that fail on the way and are started again."""

    one: Path
    two: Path
    failed: subprocess.CompletedProcess[str]
    left: list[str]
    """Checkpoints after the failure."""
    finished: subprocess.CompletedProcess[str]

    def artifacts(self, stage: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """Name and both records of every artifact of a stage."""
        for path in sorted((self.one / stage).iterdir()):
            records = (
                json.loads((run / stage / path.name / "artifact.json").read_text()) for run in (self.one, self.two)
            )
            yield (path.name, *records)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "options.yaml").write_text(OPTIONS)
    one, two = folder / "one", folder / "two"
    own = ["--config", str(folder / "options.yaml"), "--output_dir"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setitem(SCRATCH, "scratch:tiny", SMALL)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as the ranks have: on other threads a product is another in the last bit
        assert command("lm.train", report, arguments=[*own, str(one)]) == 0
        torch.set_num_threads(threads)
    failed = torchrun("tests/small_run.py", *own, str(two), NAN_AT="3")
    (scratch,) = (two / ".work").glob("policy-e-dpo-*/scratch")
    left = sorted(path.name for path in scratch.glob("checkpoint-*"))
    for state in scratch.glob("checkpoint-*/trainer_state.json"):
        written = json.loads(state.read_text())
        written["log_history"][0]["before_the_failure"] = True
        state.write_text(json.dumps(written))
        seal(state.parent)
    (scratch / "checkpoint-5").mkdir()  # one that a kill has cut off
    return Runs(one, two, failed, left, torchrun("tests/small_run.py", *own, str(two)))


@pytest.mark.thorough
def test_an_error_on_one_rank_ends_all_and_is_told_once(runs: Runs) -> None:
    assert runs.failed.returncode != 0
    assert runs.failed.stderr.count("error: loss is nan at step 3, rows ") == 1
    assert runs.failed.stderr.count("Traceback") == 1, "the launcher's"
    assert runs.failed.stderr.count("exitcode  : 1") == 1
    assert "checkpoint-2" in runs.left
    assert "checkpoint-4" not in runs.left


@pytest.mark.thorough
def test_two_ranks_write_the_files_of_one_process(runs: Runs) -> None:
    assert runs.finished.returncode == 0, runs.finished.stderr[-3000:]
    names = [{str(p.parent.relative_to(run)) for p in run.glob("*/*/artifact.json")} for run in (runs.one, runs.two)]
    assert names[0] == names[1]
    stages = {name.split("/")[0] for name in names[0]}
    assert {"data", "sft", "oracle", "labels", "bias", "reward", "score", "policy", "validate", "evaluate"} <= stages
    for stage in stages:
        for name, one, two in runs.artifacts(stage):
            assert one["files"].keys() == two["files"].keys(), name
            depends = stage == TRAINED or (stage in ("validate", "evaluate") and not name.startswith("sft"))
            if not depends:
                assert _bytes(one) == _bytes(two), name
                if stage not in ("sft", "oracle", "reward"):  # their log has losses, summed in another order
                    assert one["metrics"] == two["metrics"], name
            assert (one["provenance"]["ranks"], two["provenance"]["ranks"]) == (1, 2)
    assert not any((runs.two / ".work").iterdir())


def _bytes(record: dict[str, Any]) -> dict[str, str]:
    """Checksums by file, without those where datasets keeps a fingerprint of its own, which no two runs share."""
    return {name: digest for name, digest in record["files"].items() if not name.endswith("/state.json")}


def largest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.thorough
def test_policies_are_those_of_one_process_up_to_rounding(runs: Runs) -> None:
    (start,) = (load_file(path / "model.safetensors") for path in (runs.one / "sft").iterdir())
    for name, one, two in runs.artifacts("policy"):
        for file in one["files"]:
            if file.endswith(".safetensors"):
                models = [load_file(run / "policy" / name / file) for run in (runs.one, runs.two)]
                assert largest(*models) < 1e-5, (name, file)
                if file.endswith("model.safetensors"):
                    assert largest(start, models[1]) > 1e-3, "training moved it"
        steps = [[entry["step"] for entry in record["metrics"]["history"]] for record in (one, two)]
        assert steps[0] == steps[1]
        for mine, theirs in zip(one["metrics"]["history"], two["metrics"]["history"], strict=True):
            for key in mine.keys() & {"loss", "accuracy", "chosen_logps", "eval_chosen_logps"}:
                assert theirs[key] == pytest.approx(mine[key], rel=1e-4, abs=1e-5), (name, mine["step"], key)
        resumed = "before_the_failure" in two["metrics"]["history"][0]
        assert resumed == name.startswith("e-dpo")


@pytest.mark.thorough
def test_the_results_are_told_once_and_are_those_of_one_process(runs: Runs) -> None:
    assert runs.finished.stdout.count("Oracle advantage over SFT") == 1
    assert runs.finished.stderr.count("written: ") == 1
    assert runs.finished.stderr.count("[policy] e-dpo") == 1
    one, two = (json.loads((run / "results.json").read_text()) for run in (runs.one, runs.two))
    assert one["sft"] | {"policy": ""} == two["sft"] | {"policy": ""}
    for name, row in one["methods"].items():
        assert two["methods"][name]["advantage"] == pytest.approx(row["advantage"], abs=1e-3)
        samples = [dict(read_jsonl(run / row["samples"])) for run in (runs.one, runs.two)]
        same = [samples[0][i]["completion"] == samples[1][i]["completion"] for i in samples[0]]
        assert sum(same) >= 0.9 * len(same), "a draw may fall on the other side of a rounding"


@pytest.mark.thorough
def test_a_users_error_is_told_once() -> None:
    done = torchrun("-m", "lm.train", "--dpo.beta", "-1")
    assert done.returncode != 0
    assert done.stderr.count("error: DPO.beta must be a finite number > 0, got -1") == 1
    assert done.stderr.count("Traceback") == 1, "the launcher's"


# ---------------------------------------------------------------- scoring


@pytest.fixture
def rows() -> tuple[CompletionModel, list[list[int]], list[list[int]]]:
    data = pairs(11)
    prompts, completions = [*data["prompt_ids"], *data["prompt_ids"]], [*data["chosen_ids"], *data["rejected_ids"]]
    return (
        CompletionModel(causal_lm(), options=LogprobsConfig(scoring_tokens=40, allocator=False)),
        prompts,
        completions,
    )


def test_ranks_share_scoring_out_and_a_lost_or_doubled_row_is_noticed(
    rows: tuple[CompletionModel, list[list[int]], list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, parts = score_rows(*rows, ""), list[Any]()

    def gathered(value: Any) -> list[Any]:
        parts.append(value)
        return parts

    monkeypatch.setattr(ranks, "from_all", gathered)
    monkeypatch.setattr(ranks, "count", lambda: 3)
    for rank in range(2):
        monkeypatch.setattr(ranks, "index", lambda rank=rank: rank)
        with pytest.raises(RuntimeError, match=r"log-probs: row \d+ was scored 0 times; each must be scored once"):
            score_rows(*rows, "log-probs")
    monkeypatch.setattr(ranks, "index", lambda: 2)
    assert torch.equal(score_rows(*rows, "log-probs"), alone)
    sizes = [sum(len(found) for found, _ in part) for part in parts]
    assert sum(sizes) == len(alone)
    assert min(sizes) > 0
    with pytest.raises(RuntimeError, match=r"log-probs: row \d+ was scored 2 times"):
        score_rows(*rows, "log-probs")
