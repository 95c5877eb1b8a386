"""The study's design is one that its jobs can run: every corner's options, with each of its methods."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from lm.base.options import CONFIGS, parse
from lm.config import Config
from lm.workflow import job

WORKFLOW = Path(job.__file__).parent
DESIGN: dict[str, Any] = yaml.safe_load((WORKFLOW / "study.yaml").read_text())
CORNERS: dict[str, dict[str, Any]] = DESIGN["corners"]
REFERENCE = "n3000-s1"


def config_of(corner: str, methods: list[str]) -> Config:
    of = CORNERS[corner]
    rho = of.get("rhos", DESIGN["rhos"])[0]
    options = shlex.split(of.get("options", ""))
    cell = ["--config", str(CONFIGS / "study.yaml"), *options, "--seed", "0", "--bias.rho", str(rho)]
    return parse("lm.workflow.job", "", [*cell, "--methods", f"[{','.join(methods)}]"], shared=True)[0]


@pytest.mark.parametrize("corner", CORNERS)
def test_every_cell_of_a_corner_takes_its_options_and_as_many_settings_as_any_other(corner: str) -> None:
    methods = CORNERS[corner].get("methods", DESIGN["methods"])
    assert config_of(corner, methods).judge.kind == "exact"
    for name in methods:
        config = config_of(corner, [name])
        assert (len(config.settings(name)), config.snapshots) == (6, 6)
        assert (config.evaluation.valid_prompts or 0) >= 500


def test_worlds_are_shared_by_single_factors_and_the_reference_and_by_no_others() -> None:
    seeds = {name: set(of["seeds"]) for name, of in CORNERS.items()}
    of_n = [name for name in CORNERS if name.startswith("n")]
    for one, other in combinations(of_n, 2):
        assert not seeds[one] & seeds[other]
    for name in CORNERS.keys() - set(of_n):
        assert (seeds[name], CORNERS[name]["rhos"]) == (seeds[REFERENCE], [0.2])
    assert next(iter(CORNERS)) == REFERENCE, "what others are compared with comes first"


def test_a_design_of_corners_runs_each_after_what_it_shares_artifacts_with(tmp_path: Path) -> None:
    """Of a plan, not of a run: what each job waits for."""
    design = {
        "preset": "../configs/study.yaml",
        "seeds": [7],
        "rhos": [0.2, 0.8],
        "methods": ["dpo", "d-dpo"],
        "corners": {
            "one": {},
            "two.5": {"options": "--bias.size 99", "rhos": [0.8], "methods": ["dpo"]},
            "x": {"seeds": [8]},
        },
    }
    file = tmp_path / "design.json"
    file.write_text(json.dumps(design))
    run = [sys.executable, "-m", "snakemake", "-s", str(WORKFLOW / "Snakefile"), "--directory", str(tmp_path), "-n"]
    done = subprocess.run(
        [*run, "--cores", "1", "--configfile", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    waits = {
        lines[i + 1].removeprefix("output: "): set(lines[i].removeprefix("input: ").split(", "))
        for i in range(len(lines) - 1)
        if lines[i].startswith("input: ") and lines[i + 1].startswith("output: ")
    }
    assert waits["two.5/base/seed7.json"] == {"one/base/seed7.json"}
    assert waits["two.5/scores/seed7-rho0.8.json"] == {"two.5/base/seed7.json", "one/scores/seed7-rho0.8.json"}
    assert waits["two.5/cells/seed7-rho0.8-dpo.json"] == {
        "two.5/scores/seed7-rho0.8.json",
        "one/cells/seed7-rho0.8-dpo.json",
    }
    assert waits["x/cells/seed8-rho0.2-dpo.json"] == {"x/scores/seed8-rho0.2.json"}, "another world shares nothing"
    assert "two.5/cells/seed7-rho0.8-d-dpo.json" not in waits
    assert waits["two.5/grid.json"] == {name for name in waits if name.startswith("two.5/")} - {"two.5/grid.json"}
    assert not [name for name in waits if "alpha" in name], "no corner asked for one"
