"""The tables of the documentation are the committed grid's, and nothing else on its pages is touched."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lm.objectives import METHODS, DistilledDPO
from lm.workflow.real_tables import _as_accurate, _over, less_dpo
from lm.workflow.tables import BLOCK, GRID, TABLES, Grid, differences, fill, main

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [DOCS / name for name in ("results.md", "choosing.md")]
REAL = GRID.with_name("real_text.json")
REAL_PAGE = DOCS / "real-text.md"
PERFORMANCE = DOCS / "performance.md"


@pytest.fixture
def grid() -> Grid:
    found: Grid = json.loads(GRID.read_text(encoding="utf-8"))
    return found


def test_the_pages_tables_are_those_of_the_committed_grid(grid: Grid) -> None:
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    every = [*pages, REAL_PAGE.read_text(encoding="utf-8")]
    named = sorted(name for page in every for _, name, _ in BLOCK.findall(page) if ":" not in name)
    assert named == sorted(TABLES), "each table once"
    for path, page in zip(PAGES, pages, strict=True):
        assert fill(page, grid) == page, f"run `python -m lm.workflow.tables {path}`"
    changed = copy.deepcopy(grid)
    changed["advantages"][f"{grid['rhos'][0]:g}"]["dpo"]["by_seed"][0] += 0.5
    changed["cells"][0]["validation"][-1]["advantage"] += 0.5
    for page in pages:
        assert fill(page, changed) != page, "control: a number that changes is noticed"


def test_the_tables_of_real_text_are_those_of_the_committed_studies() -> None:
    real, page = json.loads(REAL.read_text(encoding="utf-8")), REAL_PAGE.read_text(encoding="utf-8")
    assert fill(page, real) == page, f"run `python -m lm.workflow.tables {REAL_PAGE} --grid {REAL}`"
    for study in real["studies"].values():
        study["cells"][0]["test"]["kl"] += 100.0
        study["cells"][0]["test"]["accuracies"]["longer"]["accuracy"] = 0.123
    changed = fill(page, real)
    assert {
        name for (_, name, _), block in zip(BLOCK.findall(page), _tables(page), strict=True) if block not in changed
    } == {
        "real-evaluations",
        "real-accuracy",
    }, "control: a number that changes is noticed, where it stands"


def test_what_stages_took_is_what_runs_left(grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = PERFORMANCE.read_text(encoding="utf-8")
    assert fill(page, grid) == page, f"run `python -m lm.workflow.tables {PERFORMANCE}`"
    named = [name for _, name, _ in BLOCK.findall(page)]
    assert named == [
        "bench:figures/results/bench_real_models.json",
        "stages:figures/results/demo.json",
        "stages:figures/results/records/real/helpfulness",
        "scale:figures/results/scale.json",
    ]

    took = {"wall_seconds": 4.0, "cpu_seconds": 3.0, "peak_bytes": 5_000_000}
    once = {"stage": "sft", "name": "policy", "finished": "1", **took}
    first = [once, {**once, "stage": "reward", "name": "rho", "finished": "2"}]
    other = [
        once,
        *(
            {**once, "stage": "reward", "name": "b", "artifact": key, "finished": "3", "peak_bytes": 7_000_000}
            for key in "ab"
        ),
    ]
    (tmp_path / "jobs").mkdir()
    for name, stages in {"one": first, "jobs/two": [*other, {"stage": "old", "name": "x", "finished": "0"}]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"stages": stages}), encoding="utf-8")
    monkeypatch.setattr("lm.workflow.tables.ROOT", tmp_path)
    lines = fill("<!-- table: stages:. -->\n<!-- end -->", grid).splitlines()
    assert [line.split(" | ") for line in lines[3:-1]] == [
        ["| `sft`", "1", "3.0", "25%", "4.0", "5 |"],
        ["| `reward` rho", "1", "3.0", "25%", "4.0", "5 |"],
        ["| `reward`", "2", "6.0", "50%", "8.0", "7 |"],
        ["| all", "4", "12.0", "100%", "16.0", "7 |"],
    ], "what two jobs asked for counts once, two of a name and a second twice, what was not measured not at all"
    with pytest.raises(ValueError, match=r"no JSON file at or below .*none tells what stages took"):
        fill("<!-- table: stages:none -->\n<!-- end -->", grid)


def reward_record(
    job: str, seed: int, train: str, models: dict[str, tuple[float, float | None]], **options: Any
) -> str:
    """As `lm.workflow.job` writes it; of each model its accuracy and its calibration error."""
    pairs = dict.fromkeys(("pairs", "longer_preferred", "shorter_preferred", "mean_chosen_length"), 2)

    def model(accuracy: float, error: float | None) -> dict[str, Any]:
        classes = {of: {"accuracy": accuracy, "pairs": 4} for of in ("all", "longer", "neither")}
        none = {"shorter": {"accuracy": None, "pairs": 0}}
        calibration = {} if error is None else {"calibration": {"loss": 0.5, "calibration_error": error}}
        held_out = {**classes, **none, **calibration}
        return {"accuracy": held_out, "test_accuracy": held_out, **pairs, "mean_rejected_length": 2}

    def stage(of: str, name: str, seconds: float) -> dict[str, Any]:
        cost = dict.fromkeys(("wall_seconds", "peak_bytes"), 1)
        return {"stage": of, "name": name, "finished": name, "cpu_seconds": seconds, **cost}

    stages = [stage("features", "states", 30.0), *(stage("reward", name, 2.0 + seed) for name in models)]
    trained = {"reward": {"train": train, "epochs": seed}, "lora": {"rank": 8 if train == "lora" else None}}
    evaluation = {"confidence": 0.9, "resamples": 100}
    config = {"output_dir": "s", "bias": {"rho": 0.2}, "evaluation": evaluation, **trained, **options}
    about = {"commit": "c", "date": "2026-01-02", "machine": {"processor": "P", "cores": 2}}
    made = {name: model(*found) for name, found in models.items()}
    own = {"job": job, "seed": seed, "rho": 0.2, "reward_models": made, "config": config, "stages": stages}
    return json.dumps({**own, "provenance": about})


def test_reward_models_are_told_by_how_they_were_trained(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm.workflow.tables.ROOT", tmp_path)
    page = "<!-- table: rewards:. -->\n<!-- end -->"

    def write(**files: str) -> None:
        for name, text in files.items():
            (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")

    write(
        a=reward_record("scores", 0, "head", {"rho": (0.5, 0.125), "b0.2": (0.75, 0.25)}),
        b=reward_record("rewards", 1, "head", {"rho": (0.7, 0.375)}),
        c=reward_record("rewards", 0, "lora", {"rho": (0.9, 0.0625)}),
        d=reward_record("rewards", 0, "all", {"rho": (0.9, None)}),
    )
    assert fill(page, grid).splitlines()[3:-1] == [
        "| `head` | 2 | rho | 0.600 | 0.600 | – | 0.500 | 0.250 | 2.5 | 30.0 |",
        "| `head` | 1 | b0.2 | 0.750 | 0.750 | – | 0.500 | 0.250 | 2.0 | 30.0 |",
        "| `lora` | 1 | rho | 0.900 | 0.900 | – | 0.500 | 0.062 | 2.0 | – |",
    ], "means over seeds; one of an earlier version, without a calibration, is left out"
    with pytest.raises(ValueError, match=r"no record of rewards at or below .*d.json has its reward models"):
        fill("<!-- table: rewards:d.json -->\n<!-- end -->", grid)
    write(d=reward_record("rewards", 0, "head", {"rho": (0.9, 0.1)}))
    with pytest.raises(ValueError, match=r"there are two records of rho of seed 0, trained head, in"):
        fill(page, grid)
    write(d=reward_record("rewards", 2, "head", {"rho": (0.9, 0.1)}, data={"kind": "hh"}))
    with pytest.raises(ValueError, match=r"of seed 2, rho 0.2 was made with other options \(data"):
        fill(page, grid)
    write(d="{")
    with pytest.raises(ValueError, match=r"d.json is not JSON"):
        fill(page, grid)


def test_what_benchmarks_measured_is_what_they_left(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {
        "config": "S8",
        "variant": "ours",
        "pairs_per_s": 3.14159,
        "peak_mb": 1234.5,
        "of_sustained": 0.761,
        "ratio_trl": 9.0,
        "ratio_trl_tuned": 3.456,
        "spread": {"ratio_trl_tuned": [3.2, 3.7], "ratio_trl": [8.0, 10.0]},
    }
    alone = {**first, "variant": "trl", "ratio_trl_tuned": None, "peak_mb": None, "of_sustained": None, "spread": {}}
    run = {"pairs": 4, "rounds": 2, "steps": 3, "rows": [first, alone], "provenance": {"commit": "0123456789"}}
    other = {**run, "rows": [alone], "provenance": {"commit": "0123456789-dirty"}}
    (tmp_path / "bench.json").write_text(json.dumps({"runs": [run, other]}), encoding="utf-8")
    (tmp_path / "none.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr("lm.workflow.tables.ROOT", tmp_path)
    lines = fill("<!-- table: bench:bench.json -->\n<!-- end -->", grid).splitlines()
    assert lines[3:-1] == [
        "| S8 | `ours` | 4 | 2 x 3 | 3.14 | 1,234 | 3.46 [3.20, 3.70] x TRL tuned | 76% | 0123456 |",
        "| S8 | `trl` | 4 | 2 x 3 | 3.14 | – | 9.00 x TRL | – | 0123456 |",
        "| S8 | `trl` | 4 | 2 x 3 | 3.14 | – | 9.00 x TRL | – | 0123456 with changes |",
    ], "of several ratios that to the fairest peer, and what was not measured is no number"
    with pytest.raises(ValueError, match=r'none.json has no "runs"'):
        fill("<!-- table: bench:none.json -->\n<!-- end -->", grid)
    with pytest.raises(ValueError, match=r'bench.json has no "rows" by stage'):
        fill("<!-- table: scale:bench.json -->\n<!-- end -->", grid)

    keys = ("cpu_seconds", "pairs_per_cpu_s", "anonymous_mb", "peak_mb", "file_mb")
    rows = [{"stage": "score", "pairs": 10**n, **dict.fromkeys(keys, 2.0 * 3**n)} for n in (4, 1, 2, 3)]
    (tmp_path / "scale.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    lines = fill("<!-- table: scale:scale.json -->\n<!-- end -->", grid).splitlines()
    assert lines[3:-1] == [
        "| score | 100 | 18.0 | – | 18 | 18 | 18 | 18 |",
        "| score | 1,000 | 54.0 | 3.0 | 54 | 54 | 54 | 54 |",
        "| score | 10,000 | 162.0 | 3.0 | 162 | 162 | 162 | 162 |",
    ]


def test_a_page_without_tables_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("prose", encoding="utf-8")
    assert main([str(page)]) == 2
    assert "page.md has no table to write" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == "prose"


def _tables(page: str) -> list[str]:
    return [found.group(0) for found in BLOCK.finditer(page)]


def test_several_seeds_are_a_mean_and_its_ends() -> None:
    assert (_over([0.5]), _over([0.5, 0.7, None]), _over([None])) == ("0.50", "0.60 (0.50 to 0.70)", "-")


def test_a_matched_probe_is_the_last_that_is_accurate_enough() -> None:
    probes = [{"step": step, "accuracy": a} for step, a in enumerate((0.9, 0.5, 0.7, 0.6, 0.7, 0.4))]
    found = {bar: _as_accurate(probes, bar) for bar in (0.4, 0.6, 0.65, 0.7, 0.8)}
    steps = {bar: probe and probe["step"] for bar, probe in found.items()}
    assert steps == {0.4: 5, 0.6: 4, 0.65: 4, 0.7: 4, 0.8: None}, "never the untrained one"
    assert _as_accurate(probes[:1], 0.1) is None


def test_differences_from_dpo_have_their_interval_and_every_seed() -> None:
    def found(*by_seed: float) -> dict[str, object]:
        return {"mean": 0.5, "ci": [-0.25, 1.25], "by_seed": list(by_seed), "n": 9}

    of_method = dict.fromkeys(("chosen_logratio", "rejected_logratio", "accuracy"), found(0.4, 0.6))
    of_method["advantage"] = found(0.5)
    less = {"seeds": [3, 5], "rhos": {"0.2": {"ipo": of_method}}}
    rows = less_dpo({"studies": {"a": {"less_dpo": less}, "b": {"less_dpo": None}, "c": {}}}).splitlines()[2:]
    assert [cell.strip() for cell in rows[0].strip("| ").split("|")] == [
        "a, rho 0.2",
        "3, 5",
        "ipo",
        *["+0.50 [-0.25, +1.25] (+0.40, +0.60)"] * 2,
        "+0.500 [-0.250, +1.250] (+0.400, +0.600)",
        "+0.500 [-0.250, +1.250]",
    ]
    assert len(rows) == 1, "studies without pairs are not there"


def test_prose_is_left_alone_and_an_unknown_table_is_named(grid: Grid) -> None:
    page = "before\n<!-- table: best -->\nold\n<!-- end -->\nbetween | x |\n<!-- table: alphas --><!-- end -->"
    assert fill(page.split("between")[0], grid).startswith("before\n<!-- table: best -->\n| rho |")
    assert "old" not in fill(page, grid)
    assert "between | x |" in fill(page, grid)
    with pytest.raises(
        ValueError, match=r"no table 'worst'; .*, stages:PLACE, rewards:PLACE, bench:PLACE, scale:PLACE"
    ):
        fill("<!-- table: worst -->\n<!-- end -->", grid)


def test_what_is_compared_follows_from_the_methods(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(DistilledDPO):
        compared_with = "ipo"

    monkeypatch.setitem(METHODS, "p-dpo", Doubled)
    assert "| p-dpo − ipo |" in TABLES["distilling"](grid), "it distils now"
    assert "| p-dpo − ipo |" in TABLES["pessimism"](grid)
    without = {**grid, "methods": [name for name in grid["methods"] if name not in ("ipo", "d-dpo")]}
    assert "| hull-dpo − e-dpo |" in TABLES["pessimism"](without)
    for name in ("pessimism", "distilling"):
        assert "− d-dpo |" not in TABLES[name](without)
        assert "− ipo |" not in TABLES[name](without)


def test_a_difference_is_of_worlds_and_turns_with_its_order(grid: Grid) -> None:
    worlds = [np.array(grid["advantages"][f"{grid['rhos'][0]:g}"][name]["by_seed"]) for name in ("dpo", "ipo")]
    test = stats.ttest_rel(*worlds)
    low, high = test.confidence_interval(grid["confidence"])
    mean = np.mean(worlds[0] - worlds[1])
    one, other = (
        differences(grid, [pair]).splitlines()[-1].split(" | ")[1] for pair in (("dpo", "ipo"), ("ipo", "dpo"))
    )
    assert one == f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
    assert other == f"{-mean:+.2f} [{-high:+.2f}, {-low:+.2f}]"
    for row in grid["advantages"].values():
        for entry in row.values():
            entry["by_seed"] = entry["by_seed"][:1]
    assert "[" not in differences(grid, [("dpo", "ipo")]), "one seed has no interval over seeds"


def test_the_command_rewrites_in_place_and_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- table: best -->\n<!-- end -->\n", encoding="utf-8")
    assert main([str(page)]) == 0
    assert "| rho |" in page.read_text(encoding="utf-8")
    assert main([str(page), "--grid", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
