"""Verdicts follow from the cells by the rules of docs/study.md, and every hypothesis finds its cells in the design."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from lm.objectives import METHODS
from lm.workflow import verdicts
from lm.workflow.rules import swept_option
from lm.workflow.verdicts import (
    HYPOTHESES,
    Contrast,
    Finding,
    NotRun,
    fill,
    found,
    grids_of,
    holm,
    main,
    minus,
    verdict,
)

DESIGN: dict[str, Any] = yaml.safe_load(Path(verdicts.__file__).with_name("study.yaml").read_text())
PAGE = Path(__file__).parents[2] / "docs" / "study.md"
Advantage = Callable[[str, str, float], float]


def study(advantage: Advantage, noise: float = 0.01) -> dict[str, Any]:
    """Summaries of every corner of the design, with these advantages and noise of each world and cell."""
    rng = np.random.default_rng(0)
    grids = {}
    for corner, of in DESIGN["corners"].items():
        rhos, methods = of.get("rhos", DESIGN["rhos"]), of.get("methods", DESIGN["methods"])
        cells, alphas, models = [], [], []
        for seed in of["seeds"]:
            for rho in rhos:
                for method in methods:
                    value = advantage(corner, method, rho) + noise * rng.standard_normal()
                    setting = {swept_option(method): 0.3}
                    tried = [{next(iter(setting)): scale} for scale in (0.1, 0.3, 1.0)]
                    shares = [0.2, 0.2, 0.2, 0.2, 0.2] if method == "e-dpo" else None
                    accuracy = {"all": {"accuracy": 0.7 + noise * rng.standard_normal(), "pairs": 100}}
                    cells.append(
                        {
                            "seed": seed,
                            "rho": rho,
                            "method": method,
                            "chosen": {"setting": setting, "step": 600},
                            "test": {"advantage": value, "accuracies": accuracy, "finished": 0.99},
                            "validation": [{"setting": s, "step": 600, "advantage": value, "kl": 1.5} for s in tried],
                            "probe": [{"accuracy": 0.7, "member_shares": shares} for _ in range(3)],
                        }
                    )
                for constant in of.get("constant_alpha", {}).get("methods", []) if rho == 0.2 else []:
                    for start, end in ((1e-4, 1e-2), (0.01, 0.01), (0.03, 0.03), (0.1, 0.1)):
                        test = {"advantage": 1 + noise * rng.standard_normal()}
                        weights = {"alpha_start": start, "alpha_end": end}
                        alphas.append({"seed": seed, "rho": rho, "method": constant, "alpha": weights, "test": test})
                accuracy = {"all": {"accuracy": 0.9 + noise * rng.standard_normal(), "pairs": 100}}
                models.append({"seed": seed, "rho": rho, "name": "rho", "test_accuracy": accuracy})
        grids[corner] = {"cells": cells, "alpha": alphas, "reward_models": models}
    return grids


def verdicts_of(grids: dict[str, Any]) -> dict[str, str]:
    """By hypothesis, as the table has them."""
    lines = verdicts.hypotheses(grids).splitlines()[2:]
    return {cells[0]: cells[-1] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines)}


def test_every_hypothesis_finds_its_cells_in_the_design_and_none_without_runs() -> None:
    assert set(verdicts_of(study(lambda *_: 1.0)).values()) <= {"supported", "refuted", "undecided"}
    assert set(verdicts_of({}).values()) == {"not run"}
    assert len({one.name for one in HYPOTHESES}) == len(HYPOTHESES)


def test_where_methods_do_not_differ_nothing_is_said_to_be_better() -> None:
    told = verdicts_of(study(lambda *_: 1.0))
    assert {told[one.name] for one in HYPOTHESES if one.kind == "same"} == {"supported"}
    assert told["S1"] == "supported", "teachers are right in 90%, students in 70%"
    better = {told[one.name] for one in HYPOTHESES if one.kind == "greater" and one.name != "S1"}
    assert better == {"refuted"}


def test_an_effect_is_supported_where_it_is_and_not_where_one_comparison_lacks_it() -> None:
    gains = {"d-dpo": 0.2, "dp-dpo": 0.2, "e-dpo": 0.5}

    def advantage(corner: str, method: str, rho: float) -> float:
        return 1 + gains.get(method, 0.0) * (rho < 0.5) + 0.3 * (corner == "unlabelled")

    told = verdicts_of(study(advantage))
    assert (told["F1"], told["F2"], told["U"], told["E"]) == ("supported",) * 4
    assert told["F3"] == "refuted", "there is no gain from rho 0.5 on"
    gains["dp-dpo"] = 0.0
    assert verdicts_of(study(advantage))["F1"] == "refuted"
    assert verdicts_of(study(advantage, noise=1.0))["F2"] == "undecided"


def test_a_small_effect_is_refuted_however_sure_it_is() -> None:
    told = verdicts_of(study(lambda _, method, __: 1 + 0.02 * (method == "hull-dpo"), noise=1e-4))
    assert told["M"] == "refuted"


def test_frontiers_and_slopes_by_hand() -> None:
    tried = [{"advantage": a, "kl": kl} for a, kl in ((0.5, 0.8), (0.9, 1.9), (0.7, 1.5), (3.0, 9.0))]
    assert verdicts.frontier({"validation": tried}) == pytest.approx((0.5 + 0.9 + 0.9) / 3)
    assert verdicts.frontier({"validation": [{"advantage": -1.0, "kl": 0.1}]}) == 0, "pi_ref is within any budget"
    grids = study(lambda *_: 1.0)
    for cell in grids["n3000-s1"]["cells"]:
        cell["chosen"]["setting"] = {"beta": float(np.exp(2 - 3 * cell["rho"]))}
    values = verdicts.slope(grids, ("n3000-s1",), "dpo", verdicts.scale)
    assert list(values.values()) == pytest.approx([-3.0] * 6)


def test_intervals_and_p_are_students_and_welchs() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.normal(0.3, 1, 6), rng.normal(0, 2, 4)
    paired = Contrast("x", {("a", i): v for i, v in enumerate(one)})
    reference = stats.ttest_1samp(one, 0.1, alternative="greater")
    assert paired.p_above(0.1) == pytest.approx(reference.pvalue)
    assert paired.p_below(0.1) == pytest.approx(1 - reference.pvalue)
    assert paired.interval() == pytest.approx(tuple(stats.ttest_1samp(one, 0).confidence_interval(0.95)))
    groups = Contrast("x", paired.values, {("b", i): v for i, v in enumerate(other)})
    welch = stats.ttest_ind(one, other, equal_var=False, alternative="greater")
    assert groups.p_above(0.0) == pytest.approx(welch.pvalue)
    assert groups.worlds == 10
    with pytest.raises(NotRun):
        Contrast("x", {("a", 0): 1.0}).interval()


def test_holm_is_of_the_whole_family() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.04, None, 0.09, 0.09])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_worlds_that_have_not_both_are_left_out() -> None:
    assert minus({("a", 0): 3.0, ("a", 1): 1.0}, {("a", 0): 1.0}) == {("a", 0): 2.0}
    with pytest.raises(NotRun):
        minus({("a", 0): 3.0}, {("b", 0): 1.0})


def test_pooled_hypotheses_take_the_corners_that_were_run() -> None:
    grids = study(lambda _, method, __: 1 + 0.5 * (method == "hull-dpo"))
    part = {name: grids[name] for name in ("n3000-s1", "n1000-s1")}
    hull = next(one for one in HYPOTHESES if one.name == "M")
    contrast = found(hull, part).contrast
    assert contrast is not None
    assert contrast.worlds == 9
    assert verdict(hull, Finding(None, None), None, []) == "not run"


def test_edges_and_cells_that_still_learn_are_counted() -> None:
    grids = study(lambda *_: 1.0)
    cell = copy.deepcopy(next(c for c in grids["n3000-s1"]["cells"] if c["method"] == "ipo"))
    assert "| ipo | 1 | 0 | 0% | 0% | 99.0% |" in verdicts.checks({"one": {"cells": [cell]}})
    cell["chosen"]["setting"]["tau"] = 1.0
    cell["probe"][-1]["accuracy"] = 0.72
    cell["settled"] = {"settings": [{"tau": 3.0}, {"tau": 10.0}], "longer": False}
    assert "| ipo | 1 | 1 | 100% | 100% | 99.0% |" in verdicts.checks({"one": {"cells": [cell]}})


def test_the_page_says_what_the_code_tests() -> None:
    page, grids = PAGE.read_text(encoding="utf-8"), grids_of()
    assert fill(page, grids) == page, "run `python -m lm.workflow.verdicts docs/study.md`"
    for cell in grids["n3000-s1"]["cells"]:
        cell["test"]["advantage"] += 0.3 * (cell["method"] == "d-dpo")
    assert fill(page, grids) != page, "control: a number that changes is noticed"
    assert all(f"| {one.name} | {one.claim}" in page for one in HYPOTHESES)
    assert set(METHODS) >= set(DESIGN["methods"])


def test_the_command_reads_the_corners_of_a_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page, runs = tmp_path / "page.md", tmp_path / "runs"
    page.write_text("# A study\n<!-- hypotheses -->\n<!-- end -->\n")
    runs.mkdir()
    assert main([str(page), "--runs", str(runs)]) == 2
    assert "there is no corner's grid.json" in capsys.readouterr().err
    monkeypatch.setattr(verdicts, "CORNERS", tmp_path / "corners")
    assert main([str(page)]) == 2
    assert "name the folder of a run with --runs" in capsys.readouterr().err, "the reference alone is no study"
    for name, grid in study(lambda *_: 1.0).items():
        (runs / name).mkdir()
        (runs / name / "grid.json").write_text(json.dumps(grid))
    assert main([str(page), "--runs", str(runs)]) == 0
    assert "refuted" in page.read_text()
