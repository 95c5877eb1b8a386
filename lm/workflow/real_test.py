"""The studies on real text: what they plan, how long they run, what is summed up of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from figures.studies import read_real_text
from lm.base.options import parse
from lm.objectives import PAPERS
from lm.workflow import real
from lm.workflow.workflow_test import records, unbiased


@pytest.mark.slow
@pytest.mark.parametrize("study", real.STUDIES)
def test_a_study_is_a_grid_of_every_method_and_two_seeds(study: str, tmp_path: Path) -> None:
    workflow = ["-s", str(real.HERE / "Snakefile"), "--configfile", str(real.HERE / "real" / f"{study}.yaml")]
    command = [sys.executable, "-m", "snakemake", *workflow, "--directory", str(tmp_path), "-n"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    rhos = ["null"] if study == "helpfulness" else ["0.2", "0.8"]
    for seed in (0, 1):
        for rho in rhos:
            for method in PAPERS:
                assert f"output: cells/seed{seed}-rho{rho}-{method}.json" in said


@pytest.mark.parametrize("preset", ["helpfulness-small", "tldr-small"])
def test_the_presets_are_whole(preset: str) -> None:
    config, _ = parse("lm.train", "", ["--config", preset])
    assert config.model == "real:smollm2"
    assert config.probe.train_pairs > 0, "which the figure needs"
    assert config.policy.save_steps is not None, "it goes on after a break"
    assert set(config.methods) == set(PAPERS)


def test_what_is_finished_is_summed_up_and_what_is_not_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row for row in unbiased(records()) if (row["seed"], row["job"], row.get("method")) != (2, "cell", "ipo")]
    for i, row in enumerate(rows):
        file = tmp_path / "helpfulness" / f"{row['job']}{'s' * (row['job'] == 'cell')}" / f"{i}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row))
    real.sum_up("helpfulness", tmp_path)
    assert list(read_real_text(tmp_path / "real_text.json").presets["helpfulness"].seeds) == ["0", "1"]
    assert "seed 2 is left out" in capsys.readouterr().err
    before = (tmp_path / "real_text.json").read_text()
    real.sum_up("tldr", tmp_path)
    assert "tldr: nothing to sum up yet" in capsys.readouterr().err
    assert (tmp_path / "real_text.json").read_text() == before


def test_seeds_that_were_run_elsewhere_are_summed_up_with_those_here(tmp_path: Path) -> None:
    for row in unbiased(records()):
        place = (
            tmp_path
            / ("here" if row["seed"] == 2 else "elsewhere")
            / "tldr"
            / f"{row['job']}{'s' * (row['job'] == 'cell')}"
        )
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{row['seed']}{row.get('method', '')}.json").write_text(json.dumps(row))
    real.sum_up("tldr", tmp_path / "here")
    of = tmp_path / "here" / "real_text.json"
    assert list(read_real_text(of).presets["tldr"].seeds) == ["2"]
    real.sum_up("tldr", tmp_path / "here", [tmp_path / "elsewhere"])
    assert list(read_real_text(of).presets["tldr"].seeds) == ["0", "1", "2"]


class Workflow:
    """In Snakemake's place: a process that ends with a status, or goes on until it is interrupted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
        start = subprocess.Popen
        self.commands: list[list[str]] = []

        def popen(command: list[str], **options: Any) -> Any:
            self.commands.append(command)
            return start([sys.executable, "-c", code], **options)

        monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)
        monkeypatch.setattr(subprocess, "Popen", popen)


def test_a_study_is_interrupted_after_its_time_and_may_finish_what_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "ended"
    code = (
        "import time\ntry:\n    time.sleep(60)\n"
        f"except KeyboardInterrupt:\n    open({str(mark)!r}, 'w').close()\n    raise SystemExit(1)"
    )
    workflow = Workflow(monkeypatch, code)
    began = time.monotonic()
    assert not real.go_on("tldr", tmp_path, 2, "--data.path '/a b'", 2.0)
    assert time.monotonic() - began < 50
    assert mark.exists(), "interrupted, not killed"
    assert workflow.commands[0][-2:] == ["--config", "options=--data.path '/a b'"]


def test_a_study_that_ends_by_itself_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Workflow(monkeypatch, "")
    assert real.go_on("tldr", tmp_path, 1, "", 60.0)


def test_a_job_that_failed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Workflow(monkeypatch, "raise SystemExit(1)")
    with pytest.raises(ChildProcessError, match=r"tldr: a job failed; its log is in .*tldr/logs"):
        real.go_on("tldr", tmp_path, 1, "", 60.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reddit"], "no study named reddit; there are helpfulness, tldr"),
        (["--options", "reddit=x"], "no study named reddit; there are helpfulness, tldr"),
        (["--options", "x"], "--options must be STUDY=OPTIONS, got 'x'"),
        (["--records", "no/such"], "--records no/such is no folder; name one that has a study's records"),
        (["--hours", "0"], "--hours must be > 0 and --cores at least 1, got 0 and 2"),
    ],
)
def test_a_mistake_is_one_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        real.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
