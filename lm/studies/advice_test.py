"""A rule is known only where it predicts on worlds left out of its fitting; and what the command says of a set."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from rich.console import Console

from figures.studies import Regime, StudiedSet
from lm.advise import main
from lm.studies.advice import LEVEL, Advice, advised, in_distribution, lines, nearest, predictors, said, show
from lm.studies.fitting import repeated_disagreement

KNOWN = {"teacher_less_student": 0.1, "passes": 6.0, "length_coefficient": 0.2}


def worlds(count: int = 12, slope: float = 2.0, noise: float = 0.05, seed: int = 0) -> list[StudiedSet]:
    """Worlds at three rhos, whose effect is a line in teacher less student, and noise."""
    rng, made = np.random.default_rng(seed), []
    for world in range(count):
        for rho in (0.2, 0.5, 0.8):
            gap = float(rng.uniform(-0.2, 0.3))
            found = {"teacher_less_student": gap, "passes": 2.0 + world % 3, "length_coefficient": float(rng.normal())}
            effect = slope * gap + noise * float(rng.normal())
            own = StudiedSet(corner="c", seed=world, rho=rho, predictors=found, effects={"distillation": effect})
            made.append(own)
    return made


def test_a_predictor_enters_where_it_predicts_left_out_worlds_and_no_other_does() -> None:
    best, *others = lines(worlds(), "distillation")
    assert best.predictor == "teacher_less_student"
    assert best.is_rule
    assert best.slope == pytest.approx(2, abs=0.2)
    assert (best.worlds, best.cells) == (12, 36)
    assert best.skill > 0.9
    assert not any(line.is_rule for line in others)
    assert {line.predictor for line in others} == {"passes", "length_coefficient"}


def test_of_noise_no_rule_is_learnt() -> None:
    """The negative control: predictors that say nothing, in many studies."""
    entered = [any(line.is_rule for line in lines(worlds(slope=0.0, seed=s), "distillation")) for s in range(60)]
    assert np.mean(entered) <= 2 * LEVEL


def test_left_out_errors_are_those_of_a_line_that_has_not_seen_the_world() -> None:
    sets = worlds(count=5, noise=0.5)
    line = next(one for one in lines(sets, "distillation") if one.predictor == "teacher_less_student")
    x = np.array([one.predictors["teacher_less_student"] for one in sets])
    y, which = np.array([one.effects["distillation"] for one in sets]), np.array([one.seed for one in sets])
    errors = []
    for world in range(5):
        fitted = np.polyfit(x[which != world], y[which != world], 1)
        errors += list(np.polyval(fitted, x[which == world]) - y[which == world])
    assert line.error == pytest.approx(np.sqrt(np.mean(np.square(errors))))


def test_with_few_worlds_no_rule_is_looked_for() -> None:
    assert lines(worlds(count=4, noise=0.0), "distillation") == []
    assert lines(worlds(), "ensemble") == [], "of which nothing was run"


def test_what_is_said_of_a_set_names_the_strength_of_the_evidence() -> None:
    regimes = [
        Regime(corner="c", rho=0.2, effect="distillation", estimate=0.3, low=0.1, high=0.5, worlds=12, says="helps")
    ]
    told = advised(KNOWN, worlds(), regimes)
    assert told[0].predicted == pytest.approx(0.2, abs=0.05)
    assert not told[0].outside
    assert advised({**KNOWN, "teacher_less_student": 0.9}, worlds(), regimes)[0].outside
    accuracy = {"accuracy": {"all": {"accuracy": 0.7, "pairs": 50}}}
    common: dict[str, Any] = {"data": "d", "model": "m", "pairs": 9, "prompts": 3, "predictors": KNOWN}
    advice = Advice(**common, teacher=None, student=accuracy, study="study.json", effects=told)
    text = " ".join(said(advice))
    assert "on the nearest worlds of the study (c, rho 0.2) it helps (+0.30, +0.10 to +0.50, 12 worlds" in text
    assert "by the teacher's held-out accuracy less the student's (skill 0.9" in text
    assert "p-DPO less DPO: no rule is known" in text
    none = Advice(**common, teacher=accuracy, student=accuracy, study=None, effects=[])
    assert said(none)[-1].startswith("no rule is known: there are no results of the study yet")
    out = io.StringIO()
    show(none, Console(file=out, width=200))
    assert "no pair is labelled twice" in out.getvalue()
    unknown = advised(KNOWN, worlds(slope=0.0), [])[0]
    assert (unknown.rule, unknown.predicted, unknown.nearest) == (None, None, None)


def test_the_nearest_cell_is_that_of_the_likest_sets() -> None:
    def of(corner: str, gap: float) -> StudiedSet:
        return StudiedSet(corner=corner, seed=0, rho=0.2, predictors={"teacher_less_student": gap}, effects={})

    sets = [of("low", -0.1), of("high", 0.2)]
    common: dict[str, Any] = {"rho": 0.2, "effect": "distillation", "low": None, "high": None, "worlds": 1}
    regimes = [Regime(corner=c, estimate=0.0, says="undecided", **common) for c in ("low", "high")]
    found = [nearest({"teacher_less_student": gap, "passes": 1.0}, sets, regimes) for gap in (-0.05, 0.3)]
    assert [one.corner for one in found if one is not None] == ["low", "high"]
    assert nearest({"passes": 1.0}, sets, regimes) is None, "nothing to tell by"


def test_accuracy_is_as_in_the_training_pairs() -> None:
    accuracies = {"longer": {"accuracy": 0.9}, "shorter": {"accuracy": 0.5}}
    assert in_distribution(accuracies, 0.25) == pytest.approx(0.25 * 0.9 + 0.75 * 0.5)
    empty = {"longer": {"accuracy": None}, "shorter": {"accuracy": 0.5}}
    assert in_distribution(empty, 0.25) is None
    assert in_distribution(empty, 0.0) == 0.5
    of_set = {"pairs": 8, "prompts": 2, "passes": 3.0, "disagreement": None}
    assert predictors(of_set, None, None, 0.5) == {"pairs_a_prompt": 4, "passes": 3, "longer_preferred": 0.5}


def test_labels_of_a_pair_differ_as_often_as_two_rows_of_it_do() -> None:
    def pairs(*rows: tuple[str, str, str]) -> Dataset:
        columns = map(list, zip(*rows, strict=True))
        return Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), columns, strict=True)))

    rows = (("p", "a", "b"), ("p", "b", "a"), ("p", "a", "b"), ("q", "a", "b"), ("r", "c", "d"), ("r", "c", "d"))
    assert repeated_disagreement(pairs(*rows)) == pytest.approx((2 / 3 + 0) / 2), "p: 2 of 3; r: 0; q stands once"
    assert repeated_disagreement(pairs(rows[0], *rows[3:5])) is None
    assert repeated_disagreement(pairs(*rows[4:])) == 0


def test_mistakes_are_told_before_anything_is_fitted(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n')
    folder = ["--output_dir", str(tmp_path / "run")]
    for arguments, message in (
        ([], "DATA is needed"),
        ([str(data), "--force"], "--force goes with --json"),
        ([str(data), "--study", str(tmp_path / "x"), *folder], f"there is no {tmp_path / 'x'}; `python -m"),
        (
            [str(data), "--methods", "[ipo]", *folder],
            "methods must be [dpo], which is what is fitted here, got ['ipo']",
        ),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
