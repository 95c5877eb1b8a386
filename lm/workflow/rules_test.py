"""The two rules of the study, and what a cell does that one of them doubts."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lm.base.options import parse
from lm.stages.run import Run
from lm.workflow import job
from lm.workflow.rules import MOST, around_end, at_edge, still_learning


def cell(
    chosen: float,
    method: str = "ipo",
    tried: tuple[float, ...] = (0.1, 0.3, 1.0),
    last: float = 0.7,
    advantage: float = 1.0,
) -> dict[str, Any]:
    """A record's part that the rules read: its choice, and accuracy at the last of three probes, after 0.7 and 0.7."""
    option = {"ipo": "tau", "drdo": "alpha"}.get(method, "beta")
    return {
        "method": method,
        "chosen": {"setting": {option: chosen}, "step": 600},
        "validation": [{"setting": {option: value}, "step": 600, "advantage": advantage} for value in tried],
        "probe": [{"accuracy": accuracy} for accuracy in (0.5, 0.7, 0.7, last)],
    }


def test_an_edge_is_an_end_of_what_was_tried() -> None:
    assert not at_edge(cell(0.3))
    assert at_edge(cell(0.1))
    assert at_edge(cell(1.0))
    assert not at_edge(cell(1.0, advantage=0.04)), "beyond the greatest tau lies pi_ref, which is as good"
    assert at_edge(cell(0.1, advantage=0.04)), "nothing is known of what lies below the least"
    assert at_edge(cell(1.0, "drdo", advantage=0.04)), "beyond its greatest weight lies no pi_ref"
    assert not at_edge(cell(0.3, tried=(0.3,))), "one value is no sweep"
    assert not at_edge(cell(0.0, "drdo", tried=(0.0, 0.1))), "nothing lies below 0"
    assert not at_edge(cell(0.1, "drdo", tried=(0.0, 0.1))), "one value above 0 is no sweep"
    other = cell(0.3)
    other["validation"] += [
        {"setting": {"tau": tau, "length_normalised": True}, "step": 600, "advantage": 2.0} for tau in (0.3, 1.0)
    ]
    other["chosen"]["setting"]["length_normalised"] = True
    for one in other["validation"][:3]:
        one["setting"]["length_normalised"] = False
    assert at_edge(other), "the least of those with its other options"
    assert around_end(other)[1] == {"tau": 0.09, "length_normalised": True}


def test_a_student_that_rose_by_a_point_still_learns() -> None:
    assert not still_learning(cell(0.3))
    assert still_learning(cell(0.3, last=0.711))
    assert not still_learning(cell(0.3, last=0.709))
    assert not still_learning(cell(0.3) | {"probe": [{"accuracy": 0.5}, {"accuracy": 0.9}]}), "two probes show nothing"


@pytest.mark.parametrize(
    ("tried", "chosen", "beyond"),
    [
        ((0.01, 0.03, 0.1), 0.01, 0.003),
        ((0.01, 0.03, 0.1), 0.1, 0.3),
        ((3.0, 0.3, 1.0), 3.0, 10.0),
        ((0.003, 0.01, 0.03, 0.1, 0.3, 1.0), 1.0, 3.0),
        ((0.5, 1.0, 2.0, 4.0), 0.5, 0.25),
        ((0.1, 1.0), 1.0, 10.0),
    ],
)
def test_a_sweep_goes_on_in_its_own_steps(tried: tuple[float, ...], chosen: float, beyond: float) -> None:
    assert around_end(cell(chosen, tried=tried)) == ({"tau": chosen}, {"tau": beyond})


SWEEP = (0.1, 0.3, 1.0)


def settle(
    monkeypatch: pytest.MonkeyPatch, folder: Path, best: float, learns_until: int = 0, like: Any = None
) -> tuple[Any, list[Any]]:
    """A cell of IPO whose best tau is the nearest to `best`, and whose student learns for so many steps: its record,
    and the taus and steps of each time that it was made."""
    made: list[Any] = []

    def one(run: Run, name: str) -> dict[str, Any]:
        taus = tuple(asdict(setting)["tau"] for setting in run.config.settings(name))
        steps = run.config.policy.max_steps or 0
        made.append((taus, steps))
        chosen = min(taus, key=lambda tau: abs(tau - best))
        rows = [{"setting": {"tau": tau}, "step": steps, "advantage": 1.0} for tau in taus]
        return cell(chosen, last=0.8 if steps < learns_until else 0.7) | {"validation": rows}

    monkeypatch.setattr("lm.reporting.results.cell", one)
    return job.settled(run_of(folder), like), made


def run_of(folder: Path, *more: str) -> Run:
    """Of IPO with SWEEP and 50 steps."""
    options = ["--output_dir", str(folder), "--methods", "[ipo]", "--policy.max_steps", "50", *more]
    return Run(parse("lm.train", "", [*options, "--sweep", "{ipo: [{tau: 0.1}, {tau: 0.3}, {tau: 1.0}]}"])[0])


def options_of(folder: Path, *more: str) -> Any:
    """As a record on disk has them."""
    return json.loads(json.dumps(run_of(folder, *more).config.as_dict()))


def taus(record: dict[str, Any]) -> list[float]:
    return sorted(one["setting"]["tau"] for one in record["validation"])


def test_a_cell_goes_on_until_its_choice_is_inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record, made = settle(monkeypatch, tmp_path, 0.3)
    assert record["settled"] == {"settings": [], "longer": False}
    assert made == [(SWEEP, 50)], "nothing is made twice where nothing is in doubt"
    record, made = settle(monkeypatch, tmp_path, 3.0)
    assert record["settled"] == {"settings": [{"tau": 3.0}, {"tau": 10.0}], "longer": False}
    assert record["chosen"]["setting"]["tau"] == 3.0
    assert made == [(SWEEP, 50), ((1.0, 3.0), 50), ((3.0, 10.0), 50)], "the end against what lies beyond it"
    assert taus(record) == [*SWEEP, 3.0, 10.0], "each once"
    record, made = settle(monkeypatch, tmp_path, 0.0)
    assert len(record["settled"]["settings"]) == MOST
    assert at_edge(record), "and then it is told as one that is at an edge"


def test_a_student_that_still_learns_gets_twice_the_steps_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record, made = settle(monkeypatch, tmp_path, 3.0, 80)
    assert record["settled"] == {"settings": [{"tau": 3.0}, {"tau": 10.0}], "longer": True}
    assert made[-1] == ((*SWEEP, 3.0, 10.0), 100), "in all settings"
    assert not still_learning(record)
    record, made = settle(monkeypatch, tmp_path, 0.3, 1000)
    assert made == [(SWEEP, 50), (SWEEP, 100)]
    assert still_learning(record), "and is told as one"


def test_a_record_is_gone_on_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    like, _ = settle(monkeypatch, tmp_path, 3.0)
    told = {"job": "cell", "seed": 0, "rho": 0.2, "stages": [], "config": options_of(tmp_path)}
    rows = [{"setting": {"tau": tau}, "step": 50, "advantage": 1.0} for tau in SWEEP]
    first = told | cell(1.0) | {"validation": rows}
    record, made = settle(monkeypatch, tmp_path, 3.0, like=first)
    assert made == [((1.0, 3.0), 50), ((3.0, 10.0), 50)], "what it has is not made again"
    assert record["validation"] == like["validation"]
    assert {key: record[key] for key in like} == like
    assert not set(record) & {"config", "stages"}, "those are of this job"
    with pytest.raises(ValueError, match="--like is a cell of"):
        settle(monkeypatch, tmp_path, 3.0, like=first | {"seed": 1})
    with pytest.raises(ValueError, match="is settled already"):
        settle(monkeypatch, tmp_path, 3.0, like=first | record)
    other = options_of(tmp_path, "--policy.learning_rate", "0.5")
    with pytest.raises(ValueError, match=r"made with other options \(policy.learning_rate .* and not 0.5\)"):
        settle(monkeypatch, tmp_path, 3.0, like=first | {"config": other})


def test_a_method_without_a_sweep_may_learn_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps: list[int | None] = []

    def one(run: Run, name: str) -> dict[str, Any]:
        steps.append(run.config.policy.max_steps)
        return cell(1.0, "dpo", tried=(1.0,), last=0.8) | {"validation": []}

    monkeypatch.setattr("lm.reporting.results.cell", one)
    monkeypatch.setattr(job, "_is_studied", lambda run: False)
    options = ["--output_dir", str(tmp_path), "--methods", "[dpo]", "--policy.max_steps", "50"]
    run = Run(replace(parse("lm.train", "", options)[0], sweep={}))
    assert job.settled(run)["settled"] == {"settings": [], "longer": True}
    assert steps == [50, 100]
