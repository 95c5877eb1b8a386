"""The study as one file: what the regime map says of made-up worlds, and that figures are drawn from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from figures import frontier, regimes
from figures.paths import RESULTS
from figures.studies import read_study
from figures.style import style
from lm.workflow.regimes import document, main, says
from lm.workflow.regimes import table as regimes_table
from lm.workflow.verdicts import grids_of
from lm.workflow.verdicts_test import DESIGN, Advantage, study

PROVENANCE = {"commits": ["c"], "machines": ["m"], "first": "2026", "last": "2026"}


def accuracies(value: float) -> dict[str, Any]:
    return {name: {"accuracy": value, "pairs": 100} for name in ("all", "longer", "shorter", "neither")}


def summaries(advantage: Advantage, noise: float = 0.01) -> dict[str, Any]:
    """As of `lm.workflow.summary`, with what the regime map reads besides."""
    rng, made = np.random.default_rng(1), study(advantage, noise)
    for corner, grid in made.items():
        of = DESIGN["corners"][corner]
        grid["seeds"], grid["rhos"] = of["seeds"], of.get("rhos", DESIGN["rhos"])
        grid["methods"] = of.get("methods", DESIGN["methods"])
        grid["config"] = {"evaluation": {"valid_prompts": 500}, "judge": {"kind": "exact"}}
        grid["provenance"] = {"jobs": PROVENANCE}
        best = [{"n": n, "kl": 0.0, "advantage": float(np.log2(n)), "prompts": 500} for n in (1, 2, 4)]
        grid["base"] = {str(seed): {"best_of_n": best} for seed in grid["seeds"]}
        for cell in grid["cells"]:
            if cell["method"] == "dpo":
                told = {"accuracy": accuracies(0.6), "length_coefficient": 0.1}
                cell["students"] = [{"setting": {"beta": beta}, **told} for beta in (0.1, 1.0)]
        grid["sets"] = [
            {
                "seed": seed,
                "rho": rho,
                "pairs": 3000,
                "prompts": 1500,
                "passes": 6.4,
                "disagreement": 0.3,
                "teacher": {"accuracy": accuracies(0.7 + 0.01 * rng.random()), "length_coefficient": -0.2},
            }
            for seed in grid["seeds"]
            for rho in grid["rhos"]
        ]
    return made


def gain(corner: str, method: str, rho: float) -> float:
    """d-DPO helps below rho 0.5 and hurts above, p-DPO does nothing."""
    return 1 + (method == "d-dpo") * (0.3 if rho < 0.5 else -0.3 if rho > 0.5 else 0.0)


def test_a_regime_is_what_its_interval_allows() -> None:
    assert says(0.2, 0.1, 0.3) == "helps"
    assert says(-0.2, -0.3, -0.1) == "hurts"
    assert says(0.01, -0.02, 0.04) == "nothing"
    assert says(0.2, -0.1, 0.5) == "undecided"
    assert says(0.03, 0.01, 0.06) == "undecided", "it is there, and may matter or not"
    assert says(0.9, None, None) == "undecided", "of one world"


def test_the_map_says_where_an_effect_is_and_where_it_is_not(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    path.write_text(json.dumps(document(summaries(gain))))
    found = read_study(path)
    told = {(one.corner, one.rho, one.effect): one.says for one in found.regimes}
    for corner in ("n3000-s1", "n1000-none"):
        of_rho = [told[corner, rho, "distillation"] for rho in (0.2, 0.5, 0.8)]
        assert of_rho == ["helps", "nothing" if corner == "n3000-s1" else of_rho[1], "hurts"]
        assert {told[corner, rho, "pessimism"] for rho in (0.2, 0.8)} <= {"nothing", "undecided"}
    assert told["n3000-s1", 0.2, "pessimism"] == "nothing"
    assert told["teacher-0", 0.2, "distillation"] == "helps", "against the reference's DPO, which reads no rewards"
    assert ("teacher-0", 0.2, "pessimism") not in told
    flat = document(summaries(lambda *_: 1.0))
    assert {one["says"] for one in flat["regimes"]} <= {"nothing", "undecided"}, "no effect is made up"


def test_worlds_have_their_predictors_and_effects() -> None:
    made = document(summaries(gain))
    (one,) = [s for s in made["sets"] if (s["corner"], s["seed"], s["rho"]) == ("n3000-s1", 0, 0.2)]
    assert one["predictors"]["pairs_a_prompt"] == 2
    assert one["predictors"]["teacher_less_student"] == pytest.approx(0.1, abs=0.011)
    assert one["effects"]["distillation"] == pytest.approx(0.3, abs=0.1)
    (of_teacher,) = [s for s in made["sets"] if (s["corner"], s["seed"]) == ("teacher-0", 0)]
    assert set(of_teacher["effects"]) == {"distillation"}
    part = {"n1000-s1": summaries(gain)["n1000-s1"]}
    assert {s["corner"] for s in document(part)["sets"]} == {"n1000-s1"}, "corners that were run"


def test_figures_are_drawn_of_the_corners_that_were_run(tmp_path: Path) -> None:
    path, whole = tmp_path / "study.json", summaries(gain)
    path.write_text(json.dumps(document({name: whole[name] for name in ("n3000-s1", "teacher-0", "n1000-s1")})))
    found = read_study(path)
    with style():
        shown = regimes.draw(found)
        panels = frontier.draw(found).axes
    names = [label.get_text() for label in shown.axes[0].get_yticklabels()]
    assert len(names) == 3 + 1 + 3
    assert names[-1].startswith("n3000-s1, "), "the first stands on top"
    titles = [axis.get_title() for axis in panels if axis.get_visible()]
    assert titles == [f"{corner}, rho {rho}" for corner in ("n3000-s1", "n1000-s1") for rho in (0.2, 0.5, 0.8)]
    for text in (regimes.caption(found), frontier.caption(found)):
        assert text.isascii()
    rows = regimes_table(path).splitlines()
    assert len(rows) == 2 + 7
    assert rows[2].startswith("| `n3000-s1` | 0.2 | +0.3")
    assert "] helps |" in rows[2]
    assert "| – | – |" in next(row for row in rows if "teacher-0" in row), "what was not measured is no number"
    broken = json.loads(path.read_text())
    broken["regimes"][0]["says"] = "perhaps"
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="distillation: perhaps, where one of"):
        read_study(path)


def test_the_command_reads_the_corners_of_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "study.json"
    assert main(["--runs", str(tmp_path), "--out", str(out)]) == 2
    assert "there is no corner's grid.json" in capsys.readouterr().err
    for name, grid in summaries(gain).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "grid.json").write_text(json.dumps(grid))
    assert main(["--runs", str(tmp_path), "--out", str(out)]) == 0
    assert read_study(out).n == 500
    grid = json.loads((tmp_path / "n3000-s1" / "grid.json").read_text())
    grid["base"]["0"] = {}
    (tmp_path / "n3000-s1" / "grid.json").write_text(json.dumps(grid))
    assert main(["--runs", str(tmp_path), "--out", str(out)]) == 2
    assert "n3000-s1 has no best_of_n of seed 0: evaluation.best_of asks for it" in capsys.readouterr().err


def test_the_committed_study_is_that_of_the_committed_corners() -> None:
    found, made = json.loads((RESULTS / "study.json").read_text()), document(grids_of())
    for name in ("presets", "regimes", "sets", "looks", "judge", "n"):
        assert found[name] == made[name], "run `python -m lm.workflow.regimes --out figures/results/study.json`"
