"""The grid: the workflow on a very small world through Snakemake, killed and resumed; records; their summary."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from figures.studies import read_real_text
from lm.base.options import CONFIGS, parse
from lm.config import EvaluationConfig, LoraConfig, WorldConfig
from lm.objectives import DPO, METHODS, Pessimism, looks
from lm.stages.run import Run
from lm.workflow import job
from lm.workflow.record import JOBS, VERSION, read
from lm.workflow.summary import _mean, as_text, main, summary, whole_seeds, with_defaults, with_study

WORKFLOW = Path(job.__file__).parent
STEPS = {"max_steps": 2, "batch_size": 8, "learning_rate": 0.01}
TINY = {
    "output_dir": "store",
    "model": "scratch:tiny",
    "device": "cpu",
    "data": {
        "kind": "world",
        "prompt_template": "{post}\n\nTL;DR:",
        "max_prompt_length": 120,
        "max_completion_length": 12,
        "valid_fraction": 0.15,
        "test_fraction": 0.15,
        "world": {"posts": 60},
    },
    "bias": {"member_fractions": [0.4, 0.6]},
    **dict.fromkeys(("sft", "oracle", "reward"), STEPS),
    "policy": {**STEPS, "max_steps": 4, "learning_rate": 0.05},
    "evaluation": {"resamples": 100},
    "probe": {"pairs": 8, "times": 1},
    "snapshots": 2,
    "sweep": {"p-dpo": [{"beta": 0.1}, {"beta": 1.0}]},
}
AXES = ["seeds=[0]", "rhos=[0.2,0.8]", "methods=[dpo,p-dpo]", "constant_alpha={values: []}"]


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preset") / "tiny.yaml"
    path.write_text(json.dumps(TINY))  # without YAML's aliases, which are not read
    return path


def command(folder: Path, preset: Path, *arguments: str, axes: Iterable[str] = AXES) -> list[str]:
    run = [sys.executable, "-m", "snakemake", "-s", str(WORKFLOW / "Snakefile"), "--directory", str(folder)]
    return [*run, "--cores", "2", *arguments, "--config", f"preset={preset}", *axes]


def snakemake(folder: Path, preset: Path, *arguments: str, axes: Iterable[str] = AXES) -> tuple[int, str]:
    run = command(folder, preset, *arguments, axes=axes)
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


def planned(folder: Path, preset: Path) -> list[str]:
    """Outputs that a run would make."""
    status, said = snakemake(folder, preset, "-n")
    assert status == 0, said
    return sorted(line.split("output: ")[1] for line in said.splitlines() if line.strip().startswith("output: "))


def times(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.glob("*/*.json")}


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory, preset: Path) -> tuple[Path, dict[str, int]]:
    """A grid that was killed after its first cell and then finished; and when the records before were written."""
    folder = tmp_path_factory.mktemp("grid")
    with (folder / "out").open("w") as out:
        running = subprocess.Popen(command(folder, preset), stdout=out, stderr=out, start_new_session=True)
        try:
            until = time.monotonic() + 240
            while "(Rule: cell)" not in (said := (folder / "out").read_text()):  # as Snakemake says of a finished one
                assert running.poll() is None, said
                assert time.monotonic() < until
                time.sleep(0.05)
        finally:
            os.killpg(running.pid, signal.SIGKILL)  # Snakemake and its jobs
            running.wait()
    before = times(folder)
    assert not (folder / "grid.json").exists()
    status, said = snakemake(folder, preset)
    assert status, "a killed run leaves its lock"
    assert "--unlock" in said
    assert snakemake(folder, preset, "--unlock")[0] == 0
    status, said = snakemake(folder, preset)
    assert status == 0, said
    return folder, before


@pytest.mark.thorough
def test_a_killed_grid_goes_on_where_it_was(grid: tuple[Path, dict[str, int]], preset: Path) -> None:
    folder, before = grid
    after = times(folder)
    assert len(before) < len(after) == 1 + 2 + 4, "it was killed before its end"
    kept = [name.split("/")[0] for name in before if after[name] == before[name]]
    # A cell that was written, but that Snakemake had not yet looked at when it was killed, is made again.
    assert kept.count("base") == 1
    assert kept.count("scores") == 2
    assert kept.count("cells") >= 1


@pytest.mark.thorough
def test_what_a_finished_grid_makes_again(grid: tuple[Path, dict[str, int]], preset: Path, tmp_path: Path) -> None:
    folder, _ = grid
    assert planned(folder, preset) == []
    os.utime(preset)
    assert planned(folder, preset) == [], "the same preset, written later"
    said = preset.read_text()
    preset.write_text(said + "seed: 3\n")
    assert len(planned(folder, preset)) == 1 + 2 + 4 + 1
    preset.write_text(said)
    assert planned(folder, preset) == []


@pytest.mark.thorough
def test_a_grid_is_summed_up(grid: tuple[Path, dict[str, int]]) -> None:
    folder, _ = grid
    document = json.loads((folder / "grid.json").read_text())
    assert (document["seeds"], document["rhos"], document["methods"]) == ([0], [0.2, 0.8], ["dpo", "p-dpo"])
    assert len(document["cells"]) == 4
    for row in document["cells"]:
        record = json.loads((folder / f"cells/seed0-rho{row['rho']}-{row['method']}.json").read_text())
        difference = np.subtract(record["rewards"][row["method"]], record["rewards"]["sft"])
        assert row["test"]["advantage"] == pytest.approx(difference.mean(), rel=1e-5)
        assert difference.any(), "the policy moved"
        assert row["test"]["n"] == len(difference)
        pooled = document["advantages"][f"{row['rho']}"][row["method"]]
        assert pooled["by_seed"] == [row["test"]["advantage"]], "of one seed"
        assert len(row["validation"]) == (4 if row["method"] == "p-dpo" else 2), "settings times snapshots"
        assert row["probe"][0]["step"] == 0
    assert document["config"]["sweep"] == TINY["sweep"]
    assert [(one["seed"], one["rho"]) for one in document["sets"]] == [(0, 0.2), (0, 0.8)]
    assert all(one["teacher"]["accuracy"]["all"]["pairs"] for one in document["sets"])
    of_students = {row["method"]: row.get("students") for row in document["cells"] if row["rho"] == 0.2}
    assert [one["setting"]["beta"] for one in of_students["dpo"]] == [0.1]
    assert of_students["p-dpo"] is None, "a student is a DPO"
    assert "rewards" not in json.dumps(document["cells"])


@pytest.mark.thorough
def test_no_two_jobs_make_one_artifact(grid: tuple[Path, dict[str, int]]) -> None:
    may_make = {
        "base": {"data", "sft", "oracle", "labels", "features", "evaluate", "validate"},
        "scores": {"bias", "reward", "score"},
        "cell": {"policy", "evaluate", "validate"},
    }
    logs = [path for path in (grid[0] / "logs").iterdir() if not path.stem.startswith("summary")]
    assert len(logs) == 7
    for path in logs:
        made = [line.split() for line in path.read_text().splitlines() if line.startswith("[")]
        part = path.stem.split("-")[0]
        assert {stage.strip("[]") for stage, _ in made} <= may_make[part], path.name
        assert part == "base" or not any(name == "sft" for stage, name in made), "pi_ref is evaluated once a seed"


@pytest.mark.thorough
def test_only_the_deleted_cell_is_made_again_and_from_finished_artifacts(
    grid: tuple[Path, dict[str, int]], preset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = grid
    path = folder / "cells/seed0-rho0.2-p-dpo.json"
    record = json.loads(path.read_text())
    monkeypatch.chdir(folder)
    path.unlink()
    assert planned(folder, preset) == ["cells/seed0-rho0.2-p-dpo.json", "grid.json"]
    options = ["--config", str(preset), "--output_dir", "store", "--bias.rho", "0.2", "--methods", "[p-dpo]"]
    assert job.main(["cell", "--out", str(path), *options]) == 0
    assert "[" not in capsys.readouterr().err, "nothing is trained"
    again = json.loads(path.read_text())
    assert {**again, "provenance": None} == {**record, "provenance": None}

    alpha = folder / "alpha.json"
    constant = ["alpha", "--out", str(alpha), "--like", str(path), "--constant", "5"]
    assert job.main([*constant, *options]) == 0
    made = json.loads(alpha.read_text())
    assert capsys.readouterr().err.count("[policy]") == 1, "only the setting that was chosen"
    chosen = record["chosen"]["setting"]
    assert made["chosen"]["setting"] == {**chosen, "kl": {**chosen["kl"], "alpha_start": 5, "alpha_end": 5}}
    assert made["rewards"]["p-dpo"] != record["rewards"]["p-dpo"]


@pytest.mark.parametrize(
    ("axes", "what"),
    [
        (["rhos=[0.2,1.5]"], "1.5 is greater than the maximum of 1"),
        (["rhos=[0.2,x]"], "'x' is not of type 'number'"),
        (["seeds=[0,0]"], "[0, 0] has non-unique elements"),
        (["methods=[dpo,rlhf]"], f"'rlhf' is not one of {list(METHODS)}"),
        (["seed=1"], "'seed' was unexpected"),
        (["settle=perhaps"], "'perhaps' is not of type 'boolean'"),
    ],
)
def test_axes_that_cannot_be_are_named(axes: list[str], what: str, tmp_path: Path, preset: Path) -> None:
    status, said = snakemake(tmp_path, preset, "-n", axes=axes)
    assert status
    assert what in said


def test_the_plan_of_the_whole_grid(tmp_path: Path) -> None:
    axes = yaml.safe_load((WORKFLOW / "config.yaml").read_text())
    seeds, rhos, methods, alpha = (axes[name] for name in ("seeds", "rhos", "methods", "constant_alpha"))
    status, said = snakemake(tmp_path, CONFIGS / "grid.yaml", "-n", "-q", "rules", axes=[])
    assert status == 0, said
    counts = dict(line.split() for line in said.splitlines() if len(line.split()) == 2 and line.split()[1].isdigit())
    cells = len(seeds) * len(rhos) * len(methods)
    constant = len(seeds) * len(alpha["rhos"]) * len(alpha["methods"]) * len(alpha["values"])
    scores = len(seeds) * len(rhos)
    assert {name: int(count) for name, count in counts.items()} == {
        "base": len(seeds),
        "scores": scores,
        "cell": cells,
        "alpha": constant,
        "summary": 1,
        "all": 1,
        "total": len(seeds) + scores + cells + constant + 2,
    }


@pytest.mark.parametrize("settle", [True, False])
def test_cells_settle_where_the_axes_ask_for_it(settle: bool, tmp_path: Path, preset: Path) -> None:
    status, said = snakemake(tmp_path, preset, "-n", "-p", axes=["seeds=[0]", f"settle={str(settle).lower()}"])
    assert status == 0, said
    jobs = [line for line in said.splitlines() if "-m lm.workflow.job" in line]
    assert {"--settle" in line for line in jobs if ".job cell " in line} == {settle}
    assert not any("--settle" in line for line in jobs if ".job cell " not in line)


def test_presets_agree_with_the_workflow() -> None:
    config, _ = parse("lm.train", "", ["--config", str(CONFIGS / "grid.yaml")])
    assert config.data.kind == "world"
    for name in config.methods:
        assert config.settings(name)


def test_the_workflow_takes_any_name_of_a_method(tmp_path: Path, preset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "dpo-2.x_Y"
    code = f"import sys\nsys.path.insert(0, {str(WORKFLOW.parents[1])!r})\n"
    code += f"from lm.objectives import METHODS\nMETHODS[{name!r}] = METHODS['p-dpo']\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    axes = ["seeds=[0]", "rhos=[0.2]", f"methods=[{name}]"]
    status, said = snakemake(tmp_path, preset, "-n", axes=[*axes, f"constant_alpha={{methods: [{name}]}}"])
    assert status == 0, said
    assert f"cells/seed0-rho0.2-{name}.json" in said
    assert f"alpha/seed0-rho0.2-{name}-0.1.json" in said


# ---------------------------------------------------------------- jobs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cell", "--out", "r", "--constant", "1"], "--constant goes with alpha"),
        (["alpha", "--out", "r", "--constant", "1"], "alpha with --like and --constant"),
        (["alpha", "--out", "r", "--like", "cell.json"], "alpha with --like and --constant"),
        (["cell", "--out", "r", "--like", "cell.json"], "--like goes with alpha, or with cell --settle"),
        (["base", "--out", "r", "--settle"], "--settle goes with cell, and not with base"),
        (["alpha"], "--out"),
        (["x"], "invalid choice"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        job.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err.split("error: ")[1]


def test_a_cell_is_of_one_method(preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", str(preset), "--output_dir", str(tmp_path), "--methods", "[dpo, ipo]"]
    assert job.main(["cell", "--out", str(tmp_path / "r"), *options]) == 2
    assert "methods must name the cell's one method, got ['dpo', 'ipo']" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("method", "like", "message"),
    [
        ("p-dpo", {"rho": 0.8}, r"--like is a cell of \('p-dpo', 0, 0.8\) .* ask for \('p-dpo', 0, 0.2\)"),
        ("p-dpo", {"job": "alpha"}, "--like must be the record of a cell, got one of alpha"),
        ("p-dpo", {"seed": 1}, r"--like is a cell of \('p-dpo', 1, 0.2\)"),
        ("p-dpo", {"method": "e-dpo"}, r"--like is a cell of \('e-dpo', 0, 0.2\)"),
        ("dpo", {"method": "dpo"}, "--constant goes with a method that has a KL term, which dpo has not"),
        (
            "p-dpo",
            {"chosen": {"setting": {"kl": {"target": 2.0}}}},
            "--like is a cell whose KL is held at kl.target 2; a constant",
        ),
    ],
)
def test_a_constant_alpha_is_of_the_same_cell(
    method: str, like: dict[str, Any], message: str, preset: Path, tmp_path: Path
) -> None:
    options = ["--config", str(preset), "--output_dir", str(tmp_path), "--methods", f"[{method}]"]
    run = Run(parse("lm.train", "", options)[0])
    cell = {"job": "cell", "seed": 0, "rho": 0.2, "method": "p-dpo", "chosen": {"setting": {"beta": 0.1}}, **like}
    with pytest.raises(ValueError, match=message):
        job.constant_alpha(run, cell, 0.1)


@dataclass(frozen=True, kw_only=True)
class Held(DPO):
    """A method that calls its KL term by a name of its own."""

    term: Pessimism = field(default_factory=Pessimism)

    @property
    def pessimism(self) -> Pessimism:
        return self.term


def test_a_constant_alpha_goes_where_the_method_has_its_term(
    preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "dpo", Held)
    monkeypatch.setattr("lm.reporting.results.cell", lambda run, name: {"tried": run.config.settings(name)})
    run = Run(parse("lm.train", "", ["--config", str(preset), "--output_dir", str(tmp_path), "--methods", "[dpo]"])[0])
    setting = {"beta": 0.5, "term": {"alpha_start": 0.1, "alpha_end": 0.2, "samples": "preferences"}}
    cell = {"job": "cell", "seed": 0, "rho": 0.2, "method": "dpo", "chosen": {"setting": setting}}
    term = Pessimism(alpha_start=3.0, alpha_end=3.0, samples="preferences")
    assert job.constant_alpha(run, cell, 3.0) == {"tried": [Held(beta=0.5, term=term)], "alpha": 3.0}


# ---------------------------------------------------------------- the summary

MEANS = {"dpo": 0.0, "ipo": 0.1, "p-dpo": 0.5}
MEASURED = dict.fromkeys(("oracle_reward", "finished", "kl", "chosen_logratio", "rejected_logratio", "accuracy"), 0.5)
ACCURACIES = {kind: {"accuracy": 0.5, "pairs": 2} for kind in ("all", "longer", "shorter", "neither")}
ROWS = {"kept": {"train": 2}, "dropped": {}}
BIAS = {"pairs": 2, "longer_preferred": 1, "shorter_preferred": 1, "mean_chosen_length": 1, "mean_rejected_length": 1}


def records(seeds: int = 3, prompts: int = 200) -> list[dict[str, Any]]:
    """A grid of two rhos, in which each method's rewards are its mean, a seed's own shift and noise above pi_ref's."""
    rng = np.random.default_rng(0)
    config = {
        "output_dir": "store",
        "seed": 0,
        "methods": [],
        "bias": {"rho": 0.2},
        "evaluation": {"confidence": 0.9, "resamples": 500},
    }
    machine = {"processor": "P", "cores": 2}
    common = {"config": config, "provenance": {"commit": "c", "date": "2026-01-02", "machine": machine}}
    made: list[dict[str, Any]] = []
    for seed in range(seeds):
        base = rng.normal(size=prompts)
        sft = {**MEASURED, "n": prompts, "length": 1.0, "oracle_reward": float(base.mean())}
        shared = {"sft": sft, "oracle": ACCURACIES, "labels": {"longer_preferred": 0.5}}
        data = {"preferences": ROWS, "references": ROWS, "vocabulary": 9}
        made.append({"job": "base", "seed": seed, **shared, "data": data, **common})
        for rho in (0.2, 0.8):
            models: dict[str, Any] = {name: {"accuracy": ACCURACIES, **BIAS} for name in ("rho", "b0.4")}
            made.append({"job": "scores", "seed": seed, "rho": rho, "reward_models": models, **common})
            for method, mean in MEANS.items():
                rewards = base + mean * (rho < 0.5) + 0.1 * seed + rng.normal(size=prompts) / 2
                kl = {"kl": {"alpha_start": 1e-4, "alpha_end": 1e-2}} if method == "p-dpo" else {}
                cell: dict[str, Any] = {
                    "job": "cell",
                    "seed": seed,
                    "rho": rho,
                    "method": method,
                    "chosen": {"setting": {"beta": 0.1, **kl}, "step": 2},
                    "test": {
                        **MEASURED,
                        "n": prompts,
                        "length": 1 / 3,
                        "advantage": float((rewards - base).mean()),
                        "ci": [-1, 1],
                    },
                    "validation": [],
                    "probe": [],
                    "rewards": {method: rewards.tolist(), "sft": base.tolist()},
                    "pairs": {
                        "digest": f"of seed {seed}",
                        "prompt": [0, 0, 0, 1, 2, 2, 3],
                        "chosen_logratio": (seed - mean + rng.normal(size=7)).tolist(),
                        "rejected_logratio": rng.normal(size=7).tolist(),
                        "accuracy": rng.integers(2, size=7).tolist(),
                    },
                    **common,
                }
                made.append(cell)
                if kl and rho == 0.2:
                    constant = deepcopy({**cell, "job": "alpha", "alpha": 0.1})
                    constant["chosen"]["setting"]["kl"] = {"alpha_start": 0.1, "alpha_end": 0.1}
                    made.append(constant)
    return made


def test_methods_are_compared_with_dpo_pair_by_pair() -> None:
    rows = records()
    document = summary(rows)
    cells = {(r["seed"], r["rho"], r["method"]): r for r in rows if r["job"] == "cell"}
    assert document["less_dpo"]["seeds"] == [0, 1, 2]
    assert set(document["less_dpo"]["rhos"]["0.8"]) == {"ipo", "p-dpo"}
    for method in ("ipo", "p-dpo"):
        found = document["less_dpo"]["rhos"]["0.8"][method]
        for key in ("chosen_logratio", "rejected_logratio", "accuracy"):
            own, dpo = ([cells[seed, 0.8, name]["pairs"][key] for seed in range(3)] for name in (method, "dpo"))
            less = np.subtract(own, dpo)
            assert found[key]["by_seed"] == pytest.approx(less.mean(1).tolist(), rel=1e-5)
            assert found[key]["mean"] == pytest.approx(less.mean(), rel=1e-5)
            assert found[key]["n"] == 21
            low, high = found[key]["ci"]
            assert low < found[key]["mean"] < high
            drawn = _mean(list(less), rows[0]["config"]["evaluation"], groups=[[0, 0, 0, 1, 2, 2, 3]] * 3)
            assert found[key]["ci"] == pytest.approx(drawn["ci"], rel=1e-5), "prompts, each with its pairs"
        advantages = [document["advantages"]["0.8"][name]["advantage"] for name in (method, "dpo")]
        assert found["advantage"]["mean"] == pytest.approx(np.subtract(*advantages), rel=1e-4)
    assert "pairs" not in document["cells"][0], "which stay in the records"
    del cells[1, 0.2, "dpo"]["pairs"]
    some, alone = summary(rows), summary([row for row in rows if row["seed"] != 1])
    assert some["less_dpo"]["seeds"] == [0, 2], "whose cells all have pairs"
    assert some["less_dpo"] == alone["less_dpo"]
    for seed in (0, 2):
        cells[seed, 0.8, "dpo"]["pairs"] = None
    assert summary(rows)["less_dpo"] is None, "all of an earlier version"
    assert summary([row for row in records() if row.get("method") != "dpo"])["less_dpo"] is None


def test_pairs_of_one_prompt_are_drawn_together() -> None:
    """Of four prompts with one value each, repeated: as wide as of four values, and not as of forty."""
    rng = np.random.default_rng(0)
    values, config = rng.normal(size=4), {"confidence": 0.9, "resamples": 2000}
    groups = np.repeat(np.arange(4), 10)
    alone, together, apart = (
        _mean([values], config),
        _mean([values[groups]], config, groups=[groups.tolist()]),
        _mean([values[groups]], config),
    )
    assert together["mean"] == pytest.approx(values.mean())
    assert together["ci"] == pytest.approx(alone["ci"])
    assert np.ptp(apart["ci"]) < np.ptp(together["ci"]) / 2, "control"
    uneven = _mean([np.array([1.0, 1.0, 1.0, 4.0])], config, groups=[[0, 0, 0, 1]])
    assert uneven["mean"] == 1.75, "over pairs, not over prompts"
    assert uneven["ci"] == [1.0, 4.0]


def difference(rows: list[dict[str, Any]], rho: float, method: str) -> list[np.ndarray]:
    cells = [r for r in rows if r["job"] == "cell" and (r["rho"], r["method"]) == (rho, method)]
    return [np.subtract(r["rewards"][method], r["rewards"]["sft"]) for r in cells]


def test_advantages_and_tests_pool_the_prompts_of_all_seeds() -> None:
    rows = records()
    document = summary([rows[i] for i in np.random.default_rng(1).permutation(len(rows))])
    assert (document["seeds"], document["rhos"], document["methods"]) == ([0, 1, 2], [0.2, 0.8], list(MEANS))
    assert document["members"] == ["b0.4"]
    assert document["looks"] == json.loads(json.dumps(looks(MEANS)))
    for rho in (0.2, 0.8):
        for method in MEANS:
            by_seed = difference(rows, rho, method)
            row = document["advantages"][f"{rho}"][method]
            assert row["n"] == 600
            assert row["advantage"] == pytest.approx(np.mean(by_seed), rel=1e-5)
            assert row["by_seed"] == pytest.approx([d.mean() for d in by_seed], rel=1e-5)
            # Within seeds: what the seeds differ by is not in the interval.
            error = np.sqrt(sum(d.var() / 200 for d in by_seed)) / 3
            assert row["ci"][1] - row["ci"][0] == pytest.approx(2 * stats.norm.isf(0.05) * error, rel=0.15)
        one, other = (np.concatenate(difference(rows, rho, name)) for name in ("dpo", "p-dpo"))
        test = document["wald"][f"{rho}"]["dpo - p-dpo"]
        t = stats.ttest_rel(one, other)  # 599 degrees of freedom: nearly the normal
        assert (test["z"], test["p"]) == (pytest.approx(t.statistic, rel=1e-4), pytest.approx(t.pvalue, abs=1e-2))
        assert (test["p"] < 0.01) == (rho < 0.5)
        assert len(document["wald"][f"{rho}"]) == 3


def test_predictors_are_summed_up_where_records_have_them() -> None:
    rows = records(seeds=1)
    assert summary(rows)["sets"] == []
    of_set = {"pairs": 4, "prompts": 2, "passes": 1.5, "disagreement": None}
    told = {"accuracy": ACCURACIES, "length_coefficient": 0.25}
    for row in rows:
        if row["job"] == "scores":
            row |= {"set": of_set, "teacher": told if row["rho"] == 0.2 else None}
        elif row["job"] == "cell" and row["method"] == "dpo":
            row["students"] = [{"setting": {"beta": 0.1}, **told}]
    document = summary(rows)
    one = {"seed": 0, **of_set}
    assert document["sets"] == [{**one, "rho": 0.2, "teacher": told}, {**one, "rho": 0.8, "teacher": None}]
    assert {cell["method"]: "students" in cell for cell in document["cells"]} == {
        "dpo": True,
        "ipo": False,
        "p-dpo": False,
    }


def test_wins_are_against_pi_ref_and_the_chosen_dpo() -> None:
    rows = records()
    wins = summary(rows)["wins"]["0.2"]
    assert wins["p-dpo"]["sft"]["win"] == pytest.approx(
        np.mean(np.concatenate(difference(rows, 0.2, "p-dpo")) > 0), rel=1e-5
    )
    own, dpo = (np.concatenate(difference(rows, 0.2, name)) for name in ("p-dpo", "dpo"))
    assert wins["p-dpo"]["dpo"]["win"] == pytest.approx(np.mean(own > dpo), rel=1e-5)
    assert list(wins["dpo"]) == ["sft"]
    without = [row for row in rows if row.get("method") != "dpo"]
    assert list(summary(without)["wins"]["0.2"]["p-dpo"]) == ["sft"]


@pytest.mark.parametrize("varied", ["beta", "kl"])
def test_settings_that_were_tried_name_what_they_differ_in(varied: str) -> None:
    rows = records(seeds=1)
    settings = [{"beta": 0.1, "kl": {"alpha_end": 1.0}} for _ in range(2)]
    settings[1][varied] = {"beta": 1.0, "kl": {"alpha_end": 2.0}}[varied]
    for row in rows:
        if row["job"] == "cell":
            row["validation"] = [{"setting": setting, "step": 2, "advantage": 0.0} for setting in settings]
    kept = [row["setting"] for row in summary(rows)["cells"][0]["validation"]]
    assert kept == (settings if varied == "kl" else [{"beta": 0.1}, {"beta": 1.0}])


def test_constant_alphas_come_with_the_annealed_one() -> None:
    alphas = summary(records(seeds=2))["alpha"]
    assert [(row["seed"], *row["alpha"].values()) for row in alphas] == [
        (0, 1e-4, 1e-2),
        (0, 0.1, 0.1),
        (1, 1e-4, 1e-2),
        (1, 0.1, 0.1),
    ]


def test_alphas_are_read_where_the_method_has_its_term(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "p-dpo", Held)
    rows = records(seeds=1)
    for row in rows:
        if row.get("method") == "p-dpo":
            setting = row["chosen"]["setting"]
            setting["term"] = setting.pop("kl")
    assert [row["alpha"] for row in summary(rows)["alpha"]] == [
        {"alpha_start": 1e-4, "alpha_end": 1e-2},
        {"alpha_start": 0.1, "alpha_end": 0.1},
    ]


def test_a_summary_is_small_and_reads_back() -> None:
    document = summary(records())
    text = as_text(document)
    assert json.loads(text) == document
    assert document["cells"][0]["test"]["length"] == 0.333333
    assert sum(line.startswith('{"seed"') for line in text.splitlines()) == 3 * 2 * 3 + 3 * 2 * 2 + 3 * 2
    assert document["provenance"]["jobs"] == {
        "commits": ["c"],
        "machines": ["P, 2 cores"],
        "first": "2026-01-02",
        "last": "2026-01-02",
    }


def unbiased(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of rho 0.8, as if no bias had been drawn there; with a probe, and what it cost."""
    probe = {**dict.fromkeys(PROBED, -1.0), "step": 0} | {f"train_{name}": -2.0 for name in PROBED}
    spent = {"stage": "policy", "name": "dpo", "wall_seconds": 1800.0, "cpu_seconds": 3600.0, "peak_bytes": 7}
    made = []
    for row in rows:
        if row["job"] == "base" or (row.get("rho") == 0.8 and row["job"] != "alpha"):
            row = {
                **row,
                "stages": [{**spent, "finished": "2026-01-02"}, {"stage": "sft", "name": "x", "finished": "y"}],
            }
            row |= {"rho": None} if "rho" in row else {}
            made.append({**row, "probe": [probe]} if row["job"] == "cell" else row)
    return made


PROBED = (
    *("chosen_logps", "rejected_logps", "chosen_logratio", "rejected_logratio", "accuracy"),
    *("forward_kl_reference", "forward_kl_preferences"),
)


def test_a_grid_without_a_bias_is_summed_up_as_one_with(tmp_path: Path) -> None:
    rows = records()
    plain, none = summary(rows), summary(unbiased(rows))
    assert (none["rhos"], list(none["advantages"])) == ([None], ["null"])
    assert none["advantages"]["null"] == plain["advantages"]["0.8"]
    assert none["wald"]["null"] == plain["wald"]["0.8"]
    assert none["stages"] == [
        {"stage": "policy", "artifacts": 1, "wall_hours": 0.5, "cpu_hours": 1.0, "peak_bytes": 7}
    ], "one artifact, however many jobs asked for it"
    row = next(row for row in unbiased(rows) if row["job"] == "cell")
    (tmp_path / "cell.json").write_text(json.dumps(row))
    assert read(tmp_path / "cell.json")["rho"] is None


def test_several_studies_are_one_file_of_which_figures_are_drawn(tmp_path: Path) -> None:
    rows, out = records(), tmp_path / "real.json"
    for i, row in enumerate(unbiased(rows)):
        (tmp_path / f"r{i}.json").write_text(json.dumps(row))
    paths = [str(path) for path in sorted(tmp_path.glob("r*.json")) if path != out]
    for study in ("helpfulness", "other", "helpfulness"):
        assert main([*paths, "--out", str(out), "--study", study]) == 0
    found = read_real_text(out)
    assert list(found.presets) == ["other", "helpfulness"], "the second time it takes the place of the first"
    assert list(found.presets["other"].seeds) == ["0", "1", "2"]
    assert {
        name: one.setting["beta"] for name, one in found.presets["other"].seeds["2"].methods.items()
    } == dict.fromkeys(MEANS, 0.1)
    document = json.loads(out.read_text())
    assert document["studies"]["other"]["advantages"] == json.loads(json.dumps(summary(unbiased(rows))["advantages"]))
    rho = with_study(
        tmp_path / "none", "tldr", summary([{**r, "probe": []} if r["job"] == "cell" else r for r in rows])
    )
    assert list(rho["presets"]) == ["tldr, rho 0.2", "tldr, rho 0.8"]


def test_a_file_that_is_not_of_studies_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "grid.json").write_text('{"cells": []}')
    with pytest.raises(ValueError, match=r"grid.json has no presets and studies; name another file with --out"):
        with_study(tmp_path / "grid.json", "tldr", summary(records()))


def test_so_far_leaves_out_a_seed_that_lacks_records_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    rows = records()
    lacking = [row for row in rows if (row["seed"], row["job"], row.get("method")) != (1, "cell", "ipo")]
    assert whole_seeds(rows) == rows
    kept = whole_seeds(lacking)
    assert {row["seed"] for row in kept} == {0, 2}
    assert "seed 1 is left out: it lacks 2 of 10 records so far" in capsys.readouterr().err
    assert summary(kept)["seeds"] == [0, 2]
    other = [{**row, "method": "d-dpo"} if row.get("method") == "ipo" and row["seed"] == 1 else row for row in rows]
    assert {row["seed"] for row in whole_seeds(other)} == {0, 2}, "as many records, and not the same"


def _drop(job_name: str) -> Any:
    def change(rows: list[dict[str, Any]]) -> None:
        rows.remove(next(row for row in rows if row["job"] == job_name and row["seed"] == 1))

    return change


def _other_option(rows: list[dict[str, Any]]) -> None:
    rows[-1] = {**rows[-1], "config": {**rows[-1]["config"], "evaluation": {"confidence": 0.5, "resamples": 500}}}


def _other_prompts(rows: list[dict[str, Any]]) -> None:
    cell = next(row for row in rows if row["job"] == "cell" and row["rho"] == 0.8)
    cell["rewards"]["sft"].reverse()


def _unsettled(rows: list[dict[str, Any]]) -> None:
    """One cell was gone on with, and another chose the least of two settings."""
    one, other = [row for row in rows if row["job"] == "cell" and row["method"] == "dpo"][:2]
    one["settled"] = {"settings": [], "longer": False}
    tried = [{"setting": {"beta": beta}, "step": 2, "advantage": 0.1} for beta in (0.1, 0.3)]
    other |= {"chosen": {"setting": {"beta": 0.1}, "step": 2}, "validation": tried, "probe": []}
    one |= {"chosen": {"setting": {"beta": 0.1}, "step": 2}, "validation": [], "probe": []}


def _other_pairs(rows: list[dict[str, Any]]) -> None:
    one = next(row for row in rows if (row["seed"], row.get("rho"), row.get("method")) == (1, 0.8, "ipo"))
    one["pairs"] = {**one["pairs"], "digest": "of others"}


def _stale_alpha(rows: list[dict[str, Any]]) -> None:
    alpha = next(row for row in rows if row["job"] == "alpha")
    alpha["chosen"] = {**alpha["chosen"], "setting": {**alpha["chosen"]["setting"], "beta": 77.0}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_unsettled, "the cell of seed 0, rho 0.8, method dpo chose an end of its sweep or still learns"),
        (_stale_alpha, r"the alpha record of seed 0, rho 0.2, method p-dpo, alpha 0.1 is of the setting .*77.0"),
        (list.clear, "a summary needs the records of a grid, got none"),
        (_drop("base"), "the base record of seed 1 is missing; run the workflow to its end"),
        (_drop("scores"), "the scores record of seed 1, rho 0.2 is missing"),
        (_drop("cell"), "the cell record of seed 1, rho 0.2, method dpo is missing"),
        (lambda rows: rows.append(rows[2]), "there are two cell records of seed 0, rho 0.2, method dpo; one is needed"),
        (
            _other_option,
            r"the cell record of seed 2, rho 0.8, method p-dpo was made with other options \(evaluation.confidence 0.5 "
            r"and not 0.9\) than the base record of seed 0; make one of them again, or leave it out",
        ),
        (_other_pairs, r"the cell of seed 1, rho 0.8, method ipo has other test pairs \(pairs.digest, pairs.prompt\)"),
        (
            lambda rows: rows.append({**rows[1], "job": "rewards"}),
            "the rewards record of seed 0, rho 0.2 is of reward models alone, which are no part of a grid; leave it",
        ),
        (_other_prompts, "the cell of seed 0, rho 0.8, method dpo has other test samples of pi_ref than others"),
    ],
)
def test_records_that_make_no_grid(change: Any, message: str, tmp_path: Path) -> None:
    rows = records()
    change(rows)
    with pytest.raises(ValueError, match=message):
        summary(rows)


def later(row: dict[str, Any], **lora: Any) -> dict[str, Any]:
    """The record with options that have come since, one of them in a group that there was."""
    evaluation = {**row["config"]["evaluation"], "prompts": EvaluationConfig().prompts}
    options = {**row["config"], "evaluation": evaluation, "lora": asdict(LoraConfig(**lora))}
    return {**row, "config": json.loads(json.dumps(options))}


def test_options_that_came_later_are_at_their_defaults_before() -> None:
    rows = records(seeds=2)
    alone = summary(rows)
    for mixed in ([*rows[:3], *map(later, rows[3:])], [*map(later, rows[:3]), *rows[3:]]):
        document = summary(mixed)
        for part in ("advantages", "wald", "wins", "cells"):
            assert document[part] == alone[part]
    with pytest.raises(
        ValueError, match=r"with other options \(lora.rank 8 and not None\) than the base record of seed 0"
    ):
        summary([*rows[:3], *(later(row, rank=8) for row in rows[3:])])
    gone = {**rows[-1], "config": {**rows[-1]["config"], "no_more": 1}}
    with pytest.raises(ValueError, match=r"was made with other options \(no_more 1 and not nothing\)"):
        summary([*rows[:-1], gone])


def with_options(row: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {**row, "config": {**row["config"], **options}}


def test_only_its_own_cells_are_asked_for_the_options_of_a_method() -> None:
    """IPO's tau and the sweep of p-DPO changed after the base, the scores and DPO's cells were made."""
    rows, tried = records(seeds=2), [{"beta": 0.3}]
    own = {"ipo": {"tau": 0.1, "length_normalised": False}, "sweep": {"p-dpo": tried}}
    late = [with_options(row, **own) if row.get("method") in ("ipo", "p-dpo") else row for row in rows]
    document, alone = summary(late), summary(rows)
    for part in ("advantages", "wald", "wins", "cells", "less_dpo"):
        assert document[part] == alone[part]
    assert document["config"]["sweep"] == {**alone["config"].get("sweep", {}), "p-dpo": tried}
    assert document["config"]["ipo"] == own["ipo"]
    again = [with_options(row, sweep={"dpo": tried}) if row.get("method") == "dpo" else row for row in rows]
    assert summary(again)["config"]["sweep"]["dpo"] == tried, "the settings that its cells had"
    one = next(i for i, row in enumerate(rows) if row.get("method") == "dpo")
    for options, differs in (({"sweep": {"dpo": tried}}, r"sweep\.dpo"), ({"dpo": {"beta": 0.7}}, r"dpo\.beta")):
        mixed = [*rows[:one], with_options(rows[one], **options), *rows[one + 1 :]]
        with pytest.raises(
            ValueError, match=rf"cell record .* with other options \({differs} .* and not .*\) than the cell"
        ):
            summary(mixed)


def elsewhere(row: dict[str, Any], where: str, model: str, kept: str = "{}/models/{}") -> dict[str, Any]:
    return with_options(row, output_dir=where, model=kept.format(where, model))


def test_seeds_that_were_run_elsewhere_have_their_models_in_other_places() -> None:
    rows, model = records(seeds=2), "Small.Q4_1-0123456789ab"
    document = summary([elsewhere(row, ("/home/a/runs/store", "store")[row["seed"]], model) for row in rows])
    assert document["config"]["model"] == model
    cached = "/home/b/.cache/reward-distillation/models/{1}"
    summary([elsewhere(row, "store", model, cached if row["seed"] else "{}/models/{}") for row in rows])
    for change in (
        {"model": "Small.Q4_1-ba9876543210"},  # another file
        {"model": model, "kept": "{}/mine/{}"},  # folders of the user's own, whose content their names do not tell
    ):
        ours = [elsewhere(row, "a", model) for row in rows if row["seed"] == 0]
        theirs = [elsewhere(row, "b", **change) for row in rows if row["seed"] == 1]
        with pytest.raises(ValueError, match=r"with other options \(model '.*' and not '.*'\)"):
            summary([*ours, *theirs])
    for kept in ("{}/models/{}", "{}/reward-distillation/models/{}"):
        both = [elsewhere(row, "ab"[row["seed"]], "mine", kept) for row in rows]
        with pytest.raises(ValueError, match=r"with other options \(model"):
            summary(both)


def test_a_summary_names_no_place_of_the_machine(tmp_path: Path) -> None:
    rows = records(seeds=1)
    config = {"model": f"{tmp_path}/mine", "data": {"path": f"{tmp_path}/sets/a.jsonl", "sft_path": None, "world": {}}}
    rows = [with_options(row, **config) for row in rows]
    dropped = {"too long": [f"{tmp_path}/sets/a.jsonl, line 3"]}
    rows[0]["data"] = {**rows[0]["data"], "preferences": {**ROWS, "first": dropped}}
    document = summary(rows)
    assert document["config"]["model"] == "mine"
    assert document["config"]["data"] == {"path": "a.jsonl", "sft_path": None, "world": {}}
    assert document["base"]["0"]["data"]["preferences"]["first"] == {"too long": ["a.jsonl, line 3"]}
    assert str(tmp_path) not in json.dumps(document)
    assert str(tmp_path) in json.dumps(rows[0]), "control"


def test_defaults_are_filled_in_at_every_level() -> None:
    whole = json.loads(
        json.dumps(
            parse("lm.test", "", ["--snapshots", "1", "--hull_dpo.beta", "1", "--sweep", "{dpo: [{beta: 0.5}]}"])[
                0
            ].as_dict()
        )
    )
    assert with_defaults(whole) == whole
    older = deepcopy(whole)
    del (
        older["lora"],
        older["snapshots"],
        older["evaluation"]["out_of_domain"],
        older["p_dpo"]["kl"]["alpha_start"],
        older["data"]["world"]["posts"],
    )
    before = deepcopy(older)
    filled = with_defaults(older)
    assert older == before
    assert filled["lora"] == asdict(LoraConfig())
    assert filled["snapshots"] == 1
    assert filled["evaluation"] == whole["evaluation"], "a pair of numbers is a list in a record"
    assert filled["p_dpo"]["kl"]["alpha_start"] == Pessimism().alpha_start
    assert filled["data"]["world"]["posts"] == WorldConfig().posts
    assert filled["dpo"] == whole["dpo"]
    assert with_defaults({**older, "drdo_oracle_alpha": None, "data": {**older["data"], "subset": None}}) == whole
    with pytest.raises(ValueError, match=r"option data.subset is no more, got 'x'"):
        with_defaults({**older, "data": {**older["data"], "subset": "x"}})
    del older["hull_dpo"]
    assert with_defaults(older) == whole, "a method that has come since"
    del older["model"]
    assert "model" not in with_defaults(older), "what has no default stays missing"


def test_a_mistake_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "record.json"
    record.write_text(json.dumps(records()[0]))
    assert main([str(record), "--out", str(tmp_path / "grid.json")]) == 2
    assert main([str(tmp_path / "absent.json"), "--out", str(tmp_path / "grid.json")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: there are no cells among the records"
    assert second.startswith(f"error: there is no {tmp_path / 'absent.json'}; run the workflow to its end")
    assert not (tmp_path / "grid.json").exists()


# ---------------------------------------------------------------- the records


def test_records_are_read_as_they_are_and_so_are_the_first_ones_without_a_version(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    seen = set()
    rows = records(seeds=1)
    for row in (*rows, {**rows[1], "job": "rewards"}):
        for record in (row, {**row, "version": VERSION}):
            path.write_text(json.dumps(record))
            assert read(path) == record
        seen.add(row["job"])
    assert seen == set(JOBS)


@pytest.mark.parametrize(
    ("of", "change", "message"),
    [
        (2, lambda row: row.pop("config"), "lacks config: it is not whole; "),
        (2, lambda row: row["test"].pop("length"), "lacks test.length: it is not whole; "),
        (2, lambda row: row.update(seed="x"), 'has seed "x", where a whole number is needed'),
        (2, lambda row: row.update(rho="0.2"), 'has rho "0.2", where a number is needed'),
        (2, lambda row: row.update(method="rlhf"), "has method 'rlhf', where one of dpo, ipo, "),
        (2, lambda row: row["rewards"].pop("sft"), "lacks rewards.sft"),
        (
            2,
            lambda row: row["pairs"]["chosen_logratio"].pop(),
            "has 7 pairs.prompt, 6 pairs.chosen_logratio, 7 pairs",
        ),
        (2, lambda row: row["pairs"].pop("rejected_logratio"), "lacks pairs.rejected_logratio"),
        (2, lambda row: row["rewards"]["sft"].pop(), "has 200 rewards.dpo and 199 rewards.sft, where as many are"),
        (4, lambda row: row["chosen"]["setting"].pop("kl"), "lacks chosen.setting.kl.alpha_start, "),
        (4, lambda row: row["chosen"]["setting"].update(kl=1), "lacks chosen.setting.kl.alpha_start, "),
        (2, lambda row: row.update(job="alpha", alpha=1), "has method 'dpo', where one with a KL term is needed"),
        (5, lambda row: row.pop("alpha"), "lacks alpha: "),
        (1, lambda row: row["reward_models"]["rho"].pop("pairs"), "lacks reward_models.rho.pairs"),
        (0, lambda row: row["provenance"].pop("date"), "lacks provenance.date"),
        (0, lambda row: row["config"]["evaluation"].pop("resamples"), "lacks config.evaluation.resamples"),
        (0, lambda row: row.pop("job"), "has no job, where one of base, rewards, scores, cell, alpha is needed"),
        (0, lambda row: row.update(job=["cell"]), "has job ['cell'], where one of base"),
        (0, lambda row: row.update(version=2), "is of version 2, and version 1 is read here; "),
    ],
)
def test_a_record_that_is_not_whole_is_refused_by_its_files_name_and_the_field(
    of: int, change: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = deepcopy(records(seeds=1)[of])
    change(row)
    refused(tmp_path / "r.json", json.dumps(row), message, capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"job": "cell", "seed": 0}', "lacks config, provenance, rho, method and 5 more: it is not whole; "),
        ("[]", "has no job, where one of base, rewards, scores, cell, alpha is needed: it is no record of a job; "),
        ('{"version": 1, "methods": {}}', "has no job, where one of base"),  # as results.json begins
        ("seed: 0", "is not JSON (Expecting value"),
        ("", "is not JSON (Expecting value"),
        ('{"job": NaN}', "is not JSON (NaN is no number in it); "),
    ],
)
def test_a_file_that_is_no_record_is_refused_by_its_name(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(tmp_path / "r.json", text, message, capsys)


def refused(path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By the summary, and where a constant alpha's cell is wanted."""
    path.write_text(text)
    assert main([str(path), "--out", str(path.with_name("grid.json"))]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path} {message}")
    assert said.count("\n") == 1
    assert said.rstrip().endswith("a broken one is deleted, and made anew by the workflow")
    assert not path.with_name("grid.json").exists()
    like = ["alpha", "--out", str(path.with_name("a.json")), "--like", str(path), "--constant", "1"]
    assert job.main([*like, "--output_dir", str(path.with_name("store")), "--methods", "[p-dpo]"]) == 2
    assert f"{path} {message}" in capsys.readouterr().err
