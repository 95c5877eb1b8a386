"""Labels of every kind become a probability and a weight of a pair, or are refused with their row."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm.config import BiasConfig, DataConfig
from lm.data import votes
from lm.data.lengths import bias_file, length_class
from lm.data.rows import read_rows, write_rows
from lm.data.tokens import Loaded, load

PLAIN = {"prompt": "Why?", "chosen": " So it is.", "rejected": " No."}


def read(*rows: dict[str, Any], group_weight: Any = "prompt") -> tuple[list[dict[str, Any]], votes.Reader]:
    reader = votes.Reader(group_weight)
    return [row for _, row in reader((f"line {i}", row) for i, row in enumerate(rows))], reader


def label(row: dict[str, Any]) -> tuple[str, str, float, float]:
    """Chosen, rejected, probability, weight."""
    (one,), _ = read({"prompt": "Why?", **row})
    found = votes.label_of(one, "")
    return one["chosen"], one["rejected"], found["chosen_probability"], found["weight"]


def sides(first: str, second: str) -> dict[str, str]:
    return {first: " A", second: " B"}


NAMED, LETTERS, NUMBERS = sides("chosen", "rejected"), sides("response_a", "response_b"), sides("output_1", "output_2")
READ: dict[str, tuple[dict[str, Any], tuple[str, str, float, float]]] = {
    "nothing": (NAMED, (" A", " B", 1.0, 1.0)),
    "probability": ({**NAMED, "chosen_probability": 0.75}, (" A", " B", 0.75, 1.0)),
    "label": ({**NAMED, "label": 0.75}, (" A", " B", 0.75, 1.0)),
    "label of one": ({**NAMED, "label": 1}, (" A", " B", 1.0, 1.0)),
    "label for the other side": ({**NAMED, "label": 0.25}, (" B", " A", 0.75, 1.0)),
    "label against": ({**NAMED, "label": 0.0}, (" B", " A", 1.0, 1.0)),
    "tie": ({**NAMED, "label": 0.5}, (" A", " B", 0.5, 1.0)),
    "preference": ({**NAMED, "preference": 1.25}, (" A", " B", 0.75, 1.0)),
    "preference of the first": ({**NUMBERS, "preference": 1}, (" A", " B", 1.0, 1.0)),
    "preference of the second": ({**NUMBERS, "preference": 2}, (" B", " A", 1.0, 1.0)),
    "preference of neither": ({**NUMBERS, "preference": 1.5}, (" A", " B", 0.5, 1.0)),
    "votes": ({**NAMED, "votes_chosen": 3, "votes_rejected": 1}, (" A", " B", 0.75, 4.0)),
    "votes against": ({**NAMED, "votes_chosen": 0, "votes_rejected": 2}, (" B", " A", 1.0, 2.0)),
    "votes by letter": ({**LETTERS, "votes_a": 1, "votes_b": 1}, (" A", " B", 0.5, 2.0)),
    "votes by number": ({**NUMBERS, "votes_1": 1, "votes_2": 3}, (" B", " A", 0.75, 4.0)),
    "tied votes are half of one": (
        {**NAMED, "votes_chosen": 2, "votes_rejected": 0, "votes_tied": 2},
        (" A", " B", 0.75, 4.0),
    ),
    "label by letter": ({**LETTERS, "label": 0.0}, (" B", " A", 1.0, 1.0)),
    "winner": ({**LETTERS, "winner": "response_b"}, (" B", " A", 1.0, 1.0)),
    "winner's letter": ({**LETTERS, "winner": "A"}, (" A", " B", 1.0, 1.0)),
    "winner's number": ({**NUMBERS, "winner": 2}, (" B", " A", 1.0, 1.0)),
    "no winner": ({**LETTERS, "winner": "tie"}, (" A", " B", 0.5, 1.0)),
    "weight": ({**NAMED, "weight": 3}, (" A", " B", 1.0, 3.0)),
    "weight and label": ({**NAMED, "weight": 0.5, "label": 0.25}, (" B", " A", 0.75, 0.5)),
    "two that agree": ({**NAMED, "label": 0.75, "preference": 1.25}, (" A", " B", 0.75, 1.0)),
    "votes that agree": ({**NAMED, "label": 0.75, "votes_chosen": 3, "votes_rejected": 1}, (" A", " B", 0.75, 4.0)),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "above one": ({**NAMED, "label": 1.5}, "'label' must be a number between 0 and 1 .*got 1.5"),
    "below zero": ({**NAMED, "chosen_probability": -0.1}, "'chosen_probability' must be .* got -0.1"),
    "not a number": ({**NAMED, "label": float("nan")}, "'label' must be a number between 0 and 1"),
    "text": ({**NAMED, "label": "safe"}, "'label' must be a number between 0 and 1 .*got 'safe'"),
    "true, which is about one side": ({**NAMED, "label": True}, "'label' must be a number .*got True"),
    "zero, which may be a place": ({**NAMED, "label": 0}, "'label' 0 may be the probability .*write 0.0 or"),
    "one, which may be a place": ({**LETTERS, "label": 1}, "'label' 1 may be the probability .*place"),
    "preference of neither, the older way": ({**NUMBERS, "preference": 0}, "between 1 and 2 .*1.5 for a tie.*got 0"),
    "preference in words": ({**NUMBERS, "preference": "first"}, "'preference' must be a number between 1 and 2"),
    "votes for one": ({**NAMED, "votes_chosen": 3}, "counted for one side only, 'votes_rejected' is missing"),
    "half a vote": ({**NAMED, "votes_chosen": 1.5, "votes_rejected": 1}, "'votes_chosen' must be a count.*got 1.5"),
    "fewer than none": ({**NAMED, "votes_chosen": -1, "votes_rejected": 1}, "'votes_chosen' must be a count.*got -1"),
    "no vote": ({**NAMED, "votes_chosen": 0, "votes_rejected": 0}, "count no votes"),
    "votes of other sides": ({**NAMED, "votes_a": 1, "votes_b": 0}, "'votes_a' does not go with chosen and rejected"),
    "probability of no side": ({**LETTERS, "chosen_probability": 0.7}, "does not go with response_a and response_b"),
    "nobody": ({**LETTERS, "winner": "model"}, "'winner' must be 'a', 'b', 'response_a', 'response_b' or 'tie'"),
    "no label": (LETTERS, "which of response_a and response_b is preferred"),
    "a grade, which is no label": (
        {**NUMBERS, "preference_strength": 2},
        "which of output_1 and output_2 is preferred",
    ),
    "weight of nothing": ({**NAMED, "weight": 0}, "'weight' must be a number > 0, and 1e.09 at most, got 0"),
    "weight of all": ({**NAMED, "weight": 1e308}, "'weight' must be a number > 0, and 1e.09 at most, got 1e.308"),
    "endless weight": ({**NAMED, "weight": float("inf")}, "'weight' must be a finite number"),
    "weight and votes": ({**NAMED, "weight": 1, "votes_chosen": 1, "votes_rejected": 0}, "weights already"),
    "contradiction": ({**NAMED, "label": 0.75, "preference": 1.5}, "the labels contradict each other"),
    "label of the other schema": ({"info": {}, "summaries": [], "choice": 0, "label": 0.5}, "'choice' is the label"),
    "no order": ({"completions": [" A", " B"]}, "completions need 'ranks' .* or 'scores'"),
    "rankings, which may be places": ({"completions": [" A", " B"], "rankings": [2, 1]}, "may be an order of places"),
    "ranks from zero": ({"completions": [" A", " B"], "ranks": [0, 1]}, "1 for the best, so that one has to be 1"),
    "too few ranks": ({"completions": [" A", " B", " C"], "ranks": [1, 2]}, "one entry for each of 3 completions"),
    "a score that is none": ({"responses": [" A", " B"], "scores": [1, None]}, "'scores' must be a finite number"),
    "two orders": ({"responses": [" A", " B"], "scores": [1, 2], "ranks": [1, 2]}, "order responses 0 and 1 diff"),
    "label of a group": ({"responses": [" A", " B"], "scores": [1, 2], "label": 0.5}, "'label' does not go with"),
}


@pytest.mark.parametrize("kind", READ)
def test_a_label_is_a_probability_of_the_likelier_side_and_a_weight(kind: str) -> None:
    row, expected = READ[kind]
    assert label(row) == expected


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_or_may_mean_two_things_is_refused_with_its_row(kind: str) -> None:
    row, message = REFUSED[kind]
    with pytest.raises(ValueError, match=f"^line 0: .*{message}"):
        read({"prompt": "Why?", **row})


def test_rows_that_say_nothing_pass_as_they_are() -> None:
    row = {**PLAIN, "worker": "w", "chosen_reward": 1.0, "rejected_reward": 0.0, "source": "x", "scores": "any"}
    (kept,), reader = read(row)
    assert kept is row
    assert not reader.any
    assert reader.says() == []


def test_a_label_is_in_all_rows_or_in_none() -> None:
    labelled = {**PLAIN, "label": 0.7}
    for rows, message in (
        ([labelled, PLAIN], "line 1: .* 'label' in the rows before only"),
        ([PLAIN, labelled], "line 1: .* 'label' here only"),
        ([labelled, {**PLAIN, "label": None}], "line 1: .* 'label' in the rows before only"),
        ([labelled, {**PLAIN, "preference": 1.5}], "'preference' here, 'label' in the rows before only"),
    ):
        with pytest.raises(ValueError, match=message):
            read(*rows)
    assert len(read({**PLAIN, "label": None}, PLAIN)[0]) == 2


def test_everything_that_is_known_of_the_sides_changes_places_with_them() -> None:
    row = {
        **{**PLAIN, "label": 0.25, "worker": "w"},
        **{"chosen_reward": 1.0, "rejected_reward": 3.0, "reward_margin": -2.0},
        **{"chosen_member_rewards": [1, 2], "rejected_member_rewards": [3, 4], "member_margins": [-2.0, -2.0]},
        **{"ref_chosen_logps": -5.0, "ref_rejected_logps": -7.0, "chosen_model": "x", "rejected_model": "y"},
    }
    (kept,), reader = read(row)
    assert kept == {
        **{"prompt": "Why?", "chosen": " No.", "rejected": " So it is.", "worker": "w"},
        **{"chosen_probability": 0.75, "weight": 1.0},
        **{"chosen_reward": 3.0, "rejected_reward": 1.0, "reward_margin": 2.0},
        **{"chosen_member_rewards": [3, 4], "rejected_member_rewards": [1, 2], "member_margins": [2.0, 2.0]},
        **{"ref_chosen_logps": -7.0, "ref_rejected_logps": -5.0, "chosen_model": "y", "rejected_model": "x"},
    }
    assert (
        "in 1 rows the label prefers the second side, which is then called chosen; the first: line 0" in reader.says()
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lable", "; is 'label' meant to be it?"),
        ("labels", "; is 'label' meant to be it?"),
        ("chosen_prob", "; is 'chosen_probability' meant to be it?"),
        ("vote_chosen", "; is 'votes_chosen' meant to be it?"),
        ("Weight", "; is 'weight' meant to be it?"),
        ("overall_preference", ""),
        ("is_tie", ""),
        ("winner", ""),
        ("ranks", ""),
        ("responses", ""),
        ("annotator_agreement", ""),
    ],
)
def test_a_column_that_looks_like_a_label_is_not_passed_over_silently(name: str, hint: str) -> None:
    says = read({**PLAIN, name: 1})[1].says()
    assert len(says) == 1
    assert says[0].startswith(f"column {name!r} looks like a label and is not read{hint}")


def test_such_a_column_is_noticed_in_whichever_row_it_is() -> None:
    says = read(PLAIN, {**PLAIN, "agreement": None}, {**PLAIN, "agreement": 0.5})[1].says()
    assert says == ["column 'agreement' looks like a label and is not read"]


def test_rows_without_two_sides_are_left_to_whoever_says_what_is_missing() -> None:
    for row in ({"prompt": "", "completion": "", "label": True}, {"prompt": "", "choosen": "", "label": 0.5}):
        assert read(row)[0] == [row]


@pytest.mark.parametrize("name", ["source", "worker", "confidence", "score_chosen", "margin", "ref_chosen_logps", "id"])
def test_other_columns_are(name: str) -> None:
    assert read({**PLAIN, name: 1})[1].says() == []


# ---------------------------------------------------------------- groups


def test_a_group_is_all_its_pairs_and_its_prompt_counts_once_or_by_option() -> None:
    group = {"prompt": "Why?", "completions": [" A", " B", " C", " D"], "ranks": [2, 1, 3, 3], "worker": "w"}
    pairs, reader = read(group)
    found = {(row["chosen"], row["rejected"]): (row["chosen_probability"], row["weight"]) for row in pairs}
    once = 1 / 6
    assert found == {
        (" B", " A"): (1.0, once),
        (" B", " C"): (1.0, once),
        (" B", " D"): (1.0, once),
        (" A", " C"): (1.0, once),
        (" A", " D"): (1.0, once),
        (" C", " D"): (0.5, once),
    }
    assert all(row["worker"] == "w" and row["prompt"] == "Why?" and "ranks" not in row for row in pairs)
    assert reader.says() == ["1 groups of completions are 6 pairs, of which 1 are ties; a prompt counts once"]
    assert {row["weight"] for row in read(group, group_weight="pair")[0]} == {1.0}
    assert {row["weight"] for row in read({**group, "weight": 3})[0]} == {0.5}


def test_scores_order_a_group_are_its_rewards_and_make_the_best_ones_references() -> None:
    pairs, _ = read({"prompt": "Why?", "responses": [" A", " B", " C", " D"], "scores": [0.5, 2, 2, -1]})
    for row in pairs:
        value = {" A": 0.5, " B": 2, " C": 2, " D": -1}
        assert (row["chosen_reward"], row["rejected_reward"]) == (value[row["chosen"]], value[row["rejected"]])
        assert row["chosen_probability"] == (0.5 if row["chosen_reward"] == row["rejected_reward"] else 1.0)
    assert Counter(row["chosen"] for row in pairs if row["is_reference"]) == {" B": 1, " C": 1}


def test_equal_texts_do_not_take_weight_from_the_other_pairs_and_one_completion_is_none() -> None:
    pairs, reader = read(
        {"prompt": "Why?", "completions": [" A", "A", " B"], "scores": [1, 1, 0]},
        {"prompt": "Who?", "completions": [" A"], "scores": [1]},
    )
    assert [row["weight"] for row in pairs] == [0.5] * 3, "the pair of equals is left out by the schema"
    assert reader.left_out == {"fewer than two completions": 1}


# ---------------------------------------------------------------- from a file to pairs


def loaded(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Loaded:
    write_rows(folder / "pairs.jsonl", rows)
    return load(DataConfig(kind="preferences", path=str(folder / "pairs.jsonl"), **options), 0, folder)


def test_plain_pairs_have_no_label_columns(tmp_path: Path) -> None:
    for i, more in enumerate[dict[str, float]]([{}, {"label": 1.0}, {"weight": 1}]):
        (tmp_path / str(i)).mkdir()
        pairs = loaded(tmp_path / str(i), [{**PLAIN, "prompt": f"{n}?", **more} for n in range(5)])
        assert not {*votes.COLUMNS, votes.REFERENCE} & set(pairs.preferences.column_names)
        assert len(pairs.references) == 5
        assert pairs.notes["preferences"] == []


def test_labels_rewards_and_references_follow_the_sides(tmp_path: Path) -> None:
    given = {"chosen_reward": 1.0, "rejected_reward": 2.0}
    rows = [{**PLAIN, **given, "prompt": f"{p}?", "label": p} for p in (0.1, 0.5, 0.9)]
    found = loaded(tmp_path, rows, rewards="given")
    kept = list(found.preferences)
    assert [row["chosen"] for row in kept] == [" No.", " So it is.", " So it is."]
    assert [row["chosen_probability"] for row in kept] == [0.9, 0.5, 0.9]
    assert [row["chosen_reward"] for row in kept] == [2.0, 1.0, 1.0]
    assert list(found.references["completion"]) == [" No.", " So it is."], "a tie has no better side to learn from"
    assert found.notes["preferences"][0] == "2 rows have soft labels, 1 are ties"


def test_a_group_is_in_one_split_and_its_best_is_a_reference_once(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows: list[dict[str, Any]] = [
        {"prompt": f"{i}?", "completions": [f" {i} {k}" for k in range(4)], "scores": [rng.random() for _ in range(4)]}
        for i in range(60)
    ]
    rows.append({"prompt": "alone?", "completions": [" A"], "scores": [1.0]})
    found = loaded(tmp_path, rows, valid_fraction=0.3, test_fraction=0.3, rewards="given")
    splits: dict[str, set[str]] = {}
    for row in found.preferences:
        splits.setdefault(row["prompt"], set()).add(row["split"])
        assert row["chosen_reward"] > row["rejected_reward"]
    assert all(len(each) == 1 for each in splits.values())
    assert {next(iter(each)) for each in splits.values()} == {"train", "valid", "test"}
    assert len(found.preferences) == 360
    assert sum(found.preferences["weight"]) == pytest.approx(60)
    best = {row["prompt"]: row["completions"][int(np.argmax(row["scores"]))] for row in rows[:60]}
    assert dict(zip(found.references["prompt"], found.references["completion"], strict=True)) == best
    assert len(found.references) == 60
    assert found.dropped["preferences"] == {"fewer than two completions": 1}


# ---------------------------------------------------------------- length bias


def test_a_tie_prefers_neither_length() -> None:
    assert length_class(10, 2, 1.1, 0.5) == "neither"
    assert length_class(10, 2, 1.1, 0.6) == length_class(10, 2, 1.1) == "longer"


def test_a_biased_subset_counts_the_likelier_side_and_no_tie(tmp_path: Path) -> None:
    longer = [{**PLAIN, "prompt": f"l{i}", "label": 0.8} for i in range(6)]
    shorter = [{**PLAIN, "prompt": f"s{i}", "label": 0.2} for i in range(6)]
    ties = [{**PLAIN, "prompt": f"t{i}", "label": 0.5} for i in range(6)]
    write_rows(tmp_path / "pairs.jsonl", [*longer, *shorter, *ties])
    report = bias_file(str(tmp_path / "pairs.jsonl"), tmp_path / "out.jsonl", BiasConfig(rho=0.5), seed=0)
    assert (report["before"]["longer_preferred"], report["before"]["shorter_preferred"]) == (6, 6)
    out = [row for _, row in read_rows(str(tmp_path / "out.jsonl"))]
    assert {row["prompt"] for row in out} == {row["prompt"] for row in [*longer, *shorter]}
    assert {row["chosen_probability"] for row in out} == {0.8}
    again, reader = read(*out)
    assert reader.counts["turned"] == 0, "what is written is read back as it is"
    assert [(row["chosen"], row["chosen_probability"]) for row in again] == [
        (row["chosen"], row["chosen_probability"]) for row in out
    ]


@pytest.mark.parametrize("form", ["text", "messages"])
def test_a_group_counts_once_in_every_form(form: str) -> None:
    """What is empty or said twice makes no pair, as text and as messages."""
    texts = ["A", "B", "", "A "]
    completions = texts if form == "text" else [[{"role": "assistant", "content": text}] for text in texts]
    rows, _ = read({"prompt": "p", "completions": completions, "ranks": [1, 2, 3, 4]})
    usable = [row for row in rows if {str(row[side]).strip() for side in ("chosen", "rejected")} and row["weight"]]
    assert {row["weight"] for row in usable} == {1 / 2}, "A over B, and B over A: the others are no comparison"
