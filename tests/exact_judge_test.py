"""The exact judge, and labels that are drawn by a judge's rewards, on very small data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit

import lm
from figures.record import Results
from lm.config import (
    BiasConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    JudgeConfig,
    ProbeConfig,
    SamplingConfig,
    TrainingConfig,
    WorldConfig,
)
from lm.data.rewards import ORACLE
from lm.data.world import events_of, utility
from lm.models.loading import SCRATCH
from lm.reporting.cautions import cautions
from lm.reporting.results import results
from lm.stages.data import opened, tokenizer
from lm.stages.evaluations import evaluation, prompts_of
from lm.stages.labels import judge_samples, labelled_pairs, labels, open_oracle
from lm.stages.run import Run
from lm.stages.scores import margin, scores
from lm.stages.yardstick import best_of_n

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TEMPLATE = "{post}\n\nTL;DR:"


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Iterable[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCRATCH, "scratch:tiny", {**SCRATCH["scratch:tiny"], "hidden_size": 32, "vocab_size": 400})
        yield


def small(folder: Path, judge: JudgeConfig, **options: Any) -> Config:
    training = TrainingConfig(max_steps=2, batch_size=8, learning_rate=1e-3)
    return Config(
        **{
            "output_dir": str(folder),
            "model": "scratch:tiny",
            "sft": training,
            "policy": training,
            "device": "cpu",
            "methods": ["dpo", "d-dpo"],
            "judge": judge,
            "data": DataConfig(
                prompt_template=TEMPLATE,
                max_prompt_length=120,
                max_completion_length=12,
                valid_fraction=0.1,
                test_fraction=0.2,
                rewards="oracle",
                world=WorldConfig(posts=300),
            ),
            "bias": BiasConfig(rho=0.4),
            "sampling": SamplingConfig(reference_samples=2),
            "probe": ProbeConfig(pairs=8, times=1),
            "evaluation": EvaluationConfig(resamples=100),
            **options,
        }
    )


def worth(prompt: str, completion: str, per_word: float, per_unit: float = 1.0) -> float:
    """By hand."""
    post = prompt.removesuffix("\n\nTL;DR:")
    assert events_of(post)
    return per_unit * utility(post, completion) + per_word * len(completion.split())


def labelled(run: Run) -> list[dict[str, Any]]:
    return opened(labels(run).path / "preferences").to_list()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all runs: they share their data and pi_ref."""
    return tmp_path_factory.mktemp("exact")


def test_the_exact_judge_labels_by_the_annotators_taste_and_no_oracle_is_trained(folder: Path) -> None:
    run = Run(small(folder, JudgeConfig(kind="exact")))
    for row in labelled(run):
        one, other = (worth(row["prompt"], row[side], per_word=0.05) for side in ("chosen", "rejected"))
        assert one > other
        assert (row[ORACLE[0]], row[ORACLE[1]]) == (one, other)
    assert labels(run).metrics["agreement"] > 0.8, "the annotators have the same taste, with noise"
    assert "against_judge" not in labels(run).metrics
    assert not (folder / "oracle").exists()
    with pytest.raises(ValueError, match=r"judge.kind is exact: there is no oracle model"):
        open_oracle(run)


def test_its_parameters_are_what_it_judges_by_and_what_is_distilled(folder: Path) -> None:
    run = Run(small(folder, JudgeConfig(kind="exact", utility=2.0, length_preference=1.5)))
    rows = {row["id"]: row for row in labelled(run)}
    assert labels(run).key != labels(Run(small(folder, JudgeConfig(kind="exact")))).key
    assert labels(run).metrics["longer_preferred"] > 0.8, "a word more is worth more than most slips cost"
    ids = opened(scores(run).path / "pairs")["id"][:]
    by_hand = [
        worth(rows[i]["prompt"], rows[i]["chosen"], 1.5, 2.0) - worth(rows[i]["prompt"], rows[i]["rejected"], 1.5, 2.0)
        for i in ids
    ]
    np.testing.assert_allclose(margin(run, "rho"), by_hand, rtol=1e-12)


def test_drawn_labels_have_the_noise_that_bradley_terry_gives_them_but_for_test_pairs(folder: Path) -> None:
    sharpness = 0.7
    run = Run(small(folder, JudgeConfig(kind="exact", sharpness=sharpness)))
    rows = labelled(run)
    drawn = [row for row in rows if row["split"] != "test"]
    gaps = np.array([row[ORACLE[0]] - row[ORACLE[1]] for row in drawn])
    against = expit(-sharpness * np.abs(gaps))
    spread = np.sqrt((against * (1 - against)).sum())
    assert abs((gaps < 0).sum() - against[gaps != 0].sum()) < 4 * spread
    assert abs((gaps < 0).sum() - expit(-3 * np.abs(gaps)).sum()) > 4 * spread, "another sharpness is another share"
    assert (gaps < 0).mean() == pytest.approx(labels(run).metrics["against_judge"])
    assert (gaps == 0).any(), "a coin decides ties"
    held_out = [row for row in rows if row["split"] == "test"]
    assert all(row[ORACLE[0]] > row[ORACLE[1]] for row in held_out)
    again = Run(small(folder / "again", JudgeConfig(kind="exact", sharpness=sharpness)))
    assert [row["chosen"] for row in labelled(again)] == [row["chosen"] for row in rows]


def test_no_sharpness_overflows_and_a_great_one_leaves_no_noise(folder: Path) -> None:
    run = Run(small(folder, JudgeConfig(kind="exact", sharpness=1e300)))
    with np.errstate(over="raise"):
        assert labels(run).metrics["against_judge"] == 0
    assert all(row[ORACLE[0]] >= row[ORACLE[1]] for row in labelled(run))


def test_an_unfinished_sample_is_judged_as_it_stands_or_given_what_the_options_say(folder: Path) -> None:
    plain, fixed = (Run(small(folder, JudgeConfig(kind="exact", unfinished=value))) for value in (None, -7.0))
    words = tokenizer(plain)
    prompt, text = " fire picnic\n\nTL;DR:", " fire"
    prompts = {prompt: words(prompt)["input_ids"]}
    ids = words(text)["input_ids"]
    ended = [*ids, words.eos_token_id]
    for run, sample, reward in [(plain, ended, 1.05), (plain, ids, 1.05), (fixed, ended, 1.05), (fixed, ids, -7.0)]:
        assert judge_samples(run, prompts, [sample], {})[0].tolist() == pytest.approx([reward])
    assert evaluation(plain, "sft").key != evaluation(fixed, "sft").key


def test_a_run_says_who_judged_and_how_many_samples_ended(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(small(folder, JudgeConfig(kind="exact", sharpness=1.0, unfinished=-2.0)))
    found: Results = results(run)
    assert found.oracle is None
    assert found.judge is not None
    assert found.judge.says == (
        "The judge is exact: 1 a unit of true utility, 0.05 a word; its labels are drawn with sharpness 1; an "
        "unfinished sample is judged with -2."
    )
    assert found.best_of_n is not None, "the yardstick is judged too"
    (caution,) = {one.text for one in cautions(found) if one.kind == "unfinished" and one.about == "sft"}
    assert "each of these is given -2" in caution
    assert not [one for one in cautions(found) if one.kind == "oracle"], "it is known, whatever the noise"


def test_the_best_of_n_is_of_samples_of_its_own_where_it_is_asked_for(folder: Path) -> None:
    plain = small(folder, JudgeConfig(kind="exact"), methods=["dpo"], sampling=SamplingConfig())
    assert best_of_n(Run(plain)) is None, "one sample a prompt for the KL term"
    found = best_of_n(Run(replace(plain, evaluation=EvaluationConfig(resamples=100, best_of=6))))
    assert found is not None
    assert [one["n"] for one in found] == [1, 2, 4, 6]
    assert found[0]["advantage"] == pytest.approx(0, abs=1e-9)
    assert all(one["advantage"] < other["advantage"] for one, other in pairwise(found))
    prompts = len(prompts_of(labelled_pairs(Run(plain), "valid"), None, 0, "valid"))
    assert {one["prompts"] for one in found} == {prompts}, "all of validation"
    with pytest.raises(ValueError, match=r"EvaluationConfig.best_of must be at least 2, or null, got 1"):
        EvaluationConfig(best_of=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"data": DataConfig(kind="hh", path="x.jsonl")},
            r'judge.kind "exact" goes with data.kind "world", .* got data.kind "hh": give oracle_model',
        ),
        ({"oracle_model": "x"}, r'judge.kind "exact" and oracle_model .x. are two judges: leave one out'),
    ],
)
def test_where_no_exact_judge_is_known_it_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        small(tmp_path, JudgeConfig(kind="exact"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharpness": 0.0}, "JudgeConfig.sharpness must be > 0, got 0"),
        ({"sharpness": float("inf")}, "JudgeConfig.sharpness must be finite, got inf"),
        ({"utility": -1.0}, "JudgeConfig.utility must be > 0, got -1"),
        ({"unfinished": float("nan")}, "JudgeConfig.unfinished must be a finite number or null, got nan"),
        ({"length_preference": float("inf")}, "JudgeConfig.length_preference must be a finite number or null, got inf"),
    ],
)
def test_a_judge_that_cannot_be_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JudgeConfig(**options)  # type: ignore[arg-type]


def test_the_judge_needs_no_oracle_training_to_be_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got None and None for oracle"):
        replace(small(tmp_path, JudgeConfig(kind="exact")), judge=JudgeConfig())


def test_python_asks_the_exact_judge(tmp_path: Path) -> None:
    run = lm.load("demo", output_dir=str(tmp_path), data={"world": {"posts": 60}}, judge={"kind": "exact"})
    assert run.rewards([" fire picnic\n\nTL;DR:"] * 2, [" fire", " vote"]).tolist() == pytest.approx([1.05, -0.95])
