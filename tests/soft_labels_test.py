"""Runs on a set with soft labels, ties, votes, weights and groups of completions, from its file to results and back."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lm import export, prepare
from lm.config import BiasConfig, Config
from lm.data.lengths import biased_subset
from lm.data.rows import read_rows, write_rows
from lm.data.votes import COLUMNS, PROBABILITY, WEIGHT
from lm.integrations.trl import with_margins
from lm.logprobs.scoring import score_pairs
from lm.models.loading import SCRATCH
from lm.models.opening import open_reward_model
from lm.objectives import DPO, MAIN
from lm.reporting.results import report
from lm.stages.data import data, references
from lm.stages.labels import labelled_pairs
from lm.stages.rewards import reward
from lm.stages.run import Run
from lm.stages.scores import PROBE, export_rows, scored_pairs
from lm.stages.subsets import subset
from tests.preference_sets_test import WORDS, config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Iterable[None]:
    """The run is under test, not the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCRATCH, "scratch:tiny", {**SCRATCH["scratch:tiny"], "hidden_size": 32, "vocab_size": 300})
        yield


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def voted(count: int = 120) -> list[dict[str, Any]]:
    """Pairs with counts of votes, among them ties and rows of which the other side has more."""
    rng = random.Random(0)
    return [
        {
            "prompt": f"{text(rng, 4)} {index}?",
            "chosen": f" {text(rng, rng.randint(1, 9))} a",
            "rejected": f" {text(rng, rng.randint(1, 9))} b",
            "votes_chosen": rng.randint(1, 3),
            "votes_rejected": rng.randint(0, 3),
        }
        for index in range(count)
    ]


def settings(folder: Path, rows: list[dict[str, Any]], data: dict[str, Any] | None = None, **options: Any) -> Config:
    given = {"methods": ["dpo"], "bias": BiasConfig(rho=None, member_fractions=[0.4, 0.6]), **options}
    return config(folder, rows, {"rewards": "models", **(data or {})}, **given)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run on votes."""
    done = settings(tmp_path_factory.mktemp("votes"), voted())
    report(Run(done))
    return done


def expected_labels() -> dict[str, tuple[float, float]]:
    return {
        row["prompt"]: (max(a, b) / (a + b), float(a + b))
        for row in voted()
        for a, b in [(row["votes_chosen"], row["votes_rejected"])]
    }


def test_votes_reach_the_trainers_of_policies_and_reward_models(finished: Config) -> None:
    run, expected = Run(finished), expected_labels()
    of_prompt = {row["prompt"]: row for row in voted()}
    for row in subset(run, MAIN):
        assert (row[PROBABILITY], row[WEIGHT]) == pytest.approx(expected[row["prompt"]], rel=1e-15)
        given = of_prompt[row["prompt"]]
        turned = given["votes_rejected"] > given["votes_chosen"]
        assert row["chosen"] == given["rejected" if turned else "chosen"]
    ids = dict(zip(labelled_pairs(run, "train")["id"], labelled_pairs(run, "train")["prompt"], strict=True))
    scored = scored_pairs(run, DPO(), "dpo")
    for row in scored:
        assert (row[PROBABILITY], row[WEIGHT]) == pytest.approx(expected[ids[row["id"]]], rel=1e-15)
    assert set(COLUMNS) <= set(scored_pairs(run, DPO(), "dpo", PROBE).column_names)


def test_a_tie_is_no_reference_completion(finished: Config) -> None:
    run, expected = Run(finished), expected_labels()
    train = [row["prompt"] for row in labelled_pairs(run, "train")]
    assert sorted(references(run)["prompt"]) == sorted(prompt for prompt in train if expected[prompt][0] > 0.5)
    assert len(references(run)) < len(train)


def test_a_reward_models_accuracy_is_how_likely_a_label_agrees_with_it(finished: Config) -> None:
    run = Run(finished)
    valid = labelled_pairs(run, "valid")
    chosen, rejected = score_pairs(open_reward_model(reward(run, MAIN).path, finished), valid, "")
    label = torch.tensor(valid[PROBABILITY][:], dtype=torch.float64)
    right = torch.where(chosen > rejected, label, torch.where(chosen < rejected, 1 - label, 0.0))
    found = reward(run, MAIN).metrics["accuracy"]
    assert found["all"]["accuracy"] == pytest.approx(float(right.mean()))
    assert found["neither"]["pairs"] >= valid[PROBABILITY][:].count(0.5) > 0, "a tie prefers neither length"


def test_prepare_says_what_the_labels_are(finished: Config, capsys: pytest.CaptureFixture[str]) -> None:
    prepare.work(Run(finished))
    out = capsys.readouterr().out
    rows = voted()
    votes = sum(row["votes_chosen"] + row["votes_rejected"] for row in rows)
    turned = sum(row["votes_chosen"] < row["votes_rejected"] for row in rows)
    ties = sum(row["votes_chosen"] == row["votes_rejected"] for row in rows)
    assert f"{votes:,} votes on 120 pairs" in out
    assert f"{ties} are ties" in out
    assert f"in {turned} rows the label prefers the second side" in out


def test_what_is_exported_is_read_back_with_its_labels(finished: Config, tmp_path: Path) -> None:
    run, out = Run(replace(finished, methods=["d-dpo"])), tmp_path / "scored.jsonl"
    export.export(run, out)
    written = [row for _, row in read_rows(str(out))]
    labels = {row["id"]: (row[PROBABILITY], row[WEIGHT]) for row in subset(run, MAIN)}
    assert {row["id"]: (row[PROBABILITY], row[WEIGHT]) for row in written} == labels
    again = Run(
        replace(
            finished,
            output_dir=str(tmp_path / "again"),
            data=replace(finished.data, path=str(out), rewards="given"),
            seed=1,
        )
    )
    of_prompt = {row["prompt"]: row for row in written}
    read = [row for split in ("train", "valid", "test") for row in labelled_pairs(again, split)]
    assert len(read) == len(written)
    for row in read:
        before = of_prompt[row["prompt"]]
        same = ("chosen", "rejected", *COLUMNS, "chosen_reward", "rejected_reward")
        assert [row[name] for name in same] == [before[name] for name in same]
    from datasets import Dataset

    taken = with_margins(Dataset.from_list(written), DPO(), "pairs")
    assert set(COLUMNS) <= set(taken.column_names), "TRL's trainer takes them as well"
    wrong = Dataset.from_list([{**written[0], PROBABILITY: 1.5}])
    with pytest.raises(ValueError, match=r"pairs, row 0: chosen_probability must be between 0 and 1, got 1\.5"):
        with_margins(wrong, DPO(), "pairs")


def test_an_oracle_relabels_soft_labels_and_keeps_the_weights(tmp_path: Path) -> None:
    run = Run(settings(tmp_path, voted(60), {"labels": "oracle"}))
    pairs = labelled_pairs(run, "train")
    assert PROBABILITY not in pairs.column_names
    expected = expected_labels()
    rows = voted(60)
    assert {row["prompt"]: row[WEIGHT] for row in pairs} == {
        row["prompt"]: expected[row["prompt"]][1] for row in rows if row["prompt"] in set(pairs["prompt"])
    }
    assert any("soft labels" in note for note in data(run).metrics["preferences"]["notes"])


def test_a_tie_is_not_drawn_for_a_share_that_prefers_the_longer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(settings(tmp_path, voted(), bias=BiasConfig(rho=0.5, member_fractions=[0.4, 0.6])))
    drawn = subset(run, MAIN)
    assert 0.5 not in drawn[PROBABILITY]
    assert 0.5 in labelled_pairs(run, "train")[PROBABILITY]
    assert "ties are in no subset that is drawn for a share which prefers the longer" in capsys.readouterr().err


@pytest.mark.parametrize("group_weight", ["prompt", "pair"])
def test_groups_of_completions_are_trained_on(group_weight: str, tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = [
        {
            "prompt": f"{text(rng, 4)} {index}?",
            "completions": [f" {text(rng, 3)} {k}" for k in range(3)],
            "scores": [rng.randint(0, 3) for _ in range(3)],
        }
        for index in range(60)
    ]
    options = {"rewards": "given", "group_weight": group_weight}
    run = Run(settings(tmp_path, rows, options, methods=["d-dpo", "dpo"]))
    pairs = scored_pairs(run, DPO(), "dpo")
    assert set(pairs[WEIGHT]) == {1 / 3 if group_weight == "prompt" else 1.0}
    exported = list(export_rows(run))
    ties = [row for row in exported if row[PROBABILITY] == 0.5]
    assert ties
    assert all((row["reward_margin"] == 0) == (row[PROBABILITY] == 0.5) for row in exported)
    assert data(run).key != data(Run(settings(tmp_path, rows, {**options, "group_weight": "prompt"}))).key or (
        group_weight == "prompt"
    )


def test_labels_of_one_value_are_another_artifact_than_the_same_rows_without(tmp_path: Path) -> None:
    """Before labels were read, the same file was plain pairs: what was made then is not taken for this."""
    plain = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in voted(60)]
    soft = settings(tmp_path / "soft", [{**row, "label": 0.75} for row in plain])
    write_rows(tmp_path / "plain.jsonl", plain)
    assert set(labelled_pairs(Run(soft), "train")[PROBABILITY]) == {0.75}
    hard = replace(soft, data=replace(soft.data, path=str(tmp_path / "plain.jsonl")))
    assert not {*COLUMNS} & set(labelled_pairs(Run(hard), "train").column_names)


@pytest.mark.parametrize("labels", [{"label": 0.5}, {"preference": 1.5}, {"votes_chosen": 2, "votes_rejected": 2}])
def test_a_set_of_ties_alone_has_no_reference_completions_and_is_told_so(
    labels: dict[str, Any], tmp_path: Path
) -> None:
    plain = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in voted(60)]
    with pytest.raises(ValueError, match=r"all \d+ pairs of the train split are ties, .* by data.sft_path"):
        data(Run(settings(tmp_path, [{**row, **labels} for row in plain])))


def test_where_limits_leave_nothing_of_one_split_they_are_named_and_no_export(tmp_path: Path) -> None:
    rows = [{**row, "chosen": " red" * (30 if row["split"] == "train" else 3)} for row in _split_rows()]
    with pytest.raises(
        ValueError, match=r"in the train split: all \d+ rows .* raise data.max_completion_length$"
    ) as told:
        data(Run(settings(tmp_path, rows, {"split": "own", "max_completion_length": 12})))
    assert "exported" not in str(told.value)


def _split_rows() -> list[dict[str, Any]]:
    plain = ({name: row[name] for name in ("prompt", "chosen", "rejected")} for row in voted(60))
    return [{**row, "split": "train" if i < 40 else "valid"} for i, row in enumerate(plain)]


def test_members_of_ties_alone_are_told_that_no_side_is_preferred() -> None:
    with pytest.raises(
        ValueError, match=r"and 0 that prefer the shorter \(5 prefer neither: ties, or of one length by"
    ):
        biased_subset(["neither"] * 5, 0.4, None, seed=0, what="bias.member_size")
