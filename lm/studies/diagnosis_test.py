"""The report counts what is there: against enumeration on small sets, by hand on others; and the list of commands."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import lm.__main__
from lm.base.files import write_jsonl
from lm.config import DataConfig
from lm.data import rewards
from lm.data.columns import numbered
from lm.data.lengths import length_class
from lm.data.rows import Tally
from lm.data.templates import chat_renderer
from lm.data.tokens import load, tokenise
from lm.diagnose import main
from lm.models.loading import load_tokenizer
from lm.studies.diagnosis import (
    QUANTILES,
    RATIOS,
    TEXTS,
    Comparisons,
    FirstToFall,
    Report,
    advise,
    measure,
    read,
    renderer_of,
)
from lm.studies.first_moves_test import trained_moves
from tests import tiny
from tests.startup_test import UNREAD, loaded
from theory import budget
from theory.claim import all_claims

Rows = list[dict[str, Any]]


def row(prompt: str, chosen: str, rejected: str, **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def report_on(rows: Rows, folder: Path, **options: Any) -> Report:
    write_jsonl(folder / "pairs.jsonl", rows)
    limits = {"max_prompt_length": 512, "max_completion_length": 128, **options}
    return measure(read(str(folder / "pairs.jsonl")), "pairs", **limits)


def texts_of(data: Comparisons) -> list[list[str]]:
    return [[pair[name] for _, pair in data.again()] for name in TEXTS]


# ---------------------------------------------------------------- a set without its texts


VOTED = {"response_a": "a", "response_b": "b c", "votes_a": 2, "votes_b": 1}
SHAPES: dict[str, Rows] = {
    "repeated": [row("p", "a", "b"), row("q", "b", "a"), row("p", "a", "b"), row("p", "b", "a"), row("p", "a", "a")],
    "soft": [row("p", "a", "b", chosen_probability=p) for p in (1.0, 0.5, 0.2)],
    "votes": [{"prompt": "p", **VOTED}, {"prompt": "q", **VOTED, "votes_b": 9}],
    "groups": [{"prompt": p, "completions": ["a", "b", "c d", "b"], "ranks": [1, 2, 2, 4]} for p in "pqp"],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_digests_and_lengths_are_those_of_the_texts(shape: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", SHAPES[shape])
    data = read(str(tmp_path / "pairs.jsonl"))
    prompts, *sides = texts_of(data)
    answers = [(prompt, text) for side in sides for prompt, text in zip(prompts, side, strict=True)]
    for found, texts in ((data.prompts, prompts), (data.completions.reshape(-1), answers)):
        different: list[Any] = list(dict.fromkeys(texts))
        assert numbered(found)[0].tolist() == [different.index(text) for text in texts]
    assert data.characters.tolist() == [list(map(len, side)) for side in sides]
    if shape == "repeated":  # control: a text under another prompt is another completion
        assert sides[0][0] == sides[1][1]
        assert data.completions[0, 0] != data.completions[1, 1]


def test_what_is_held_of_a_set_is_less_than_its_texts(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", [row(f"{i} {'x' * 9000}", "a", "b") for i in range(400)])
    tracemalloc.start()
    data = read(str(tmp_path / "pairs.jsonl"))
    held = tracemalloc.get_traced_memory()[0]
    texts = texts_of(data)
    with_texts = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    size = sum(map(len, texts[0]))
    assert held < size / 4 < size < with_texts


def test_a_set_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    rows = [row("p", "a", "b"), row("p", "b", "c")]
    for other, count in ((rows[:1], 1), (rows * 2, 3)):
        write_jsonl(tmp_path / "pairs.jsonl", rows)
        data = read(str(tmp_path / "pairs.jsonl"))
        write_jsonl(tmp_path / "pairs.jsonl", other)
        with pytest.raises(ValueError, match=rf"changed while it was read: of 2 comparisons there are {count}"):
            measure(data, "", tokenizer="scratch:tiny")


# ---------------------------------------------------------------- the preference graph


def reached(pairs: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """(better, worse) by any chain of preferences."""
    chains = set(pairs)
    while longer := {(a, d) for a, b in chains for c, d in chains if b == c} - chains:
        chains |= longer
    return chains


def by_enumeration(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same numbers, prompt by prompt, from chains of preferences."""
    finite = longer = contradicted = isolated = unconnected = 0
    for prompt in {r["prompt"] for r in rows}:
        pairs = [(r["chosen"], r["rejected"]) for r in rows if r["prompt"] == prompt]
        one_way = [p for p in pairs if p[::-1] not in pairs]
        finite += sum(p[::-1] in reached(pairs) for p in pairs)
        longer += sum(p[::-1] in reached(one_way) for p in one_way)
        contradicted += len(pairs) - len(one_way)
        isolated += sum(not any(set(p) & set(q) for q in pairs if q != p) for p in pairs)
        linked = reached([*pairs, *(p[::-1] for p in pairs)])
        unconnected += not all(p in linked for p in permutations({text for p in pairs for text in p}, 2))
    return {
        "no_finite_dpo_optimum": 1 - finite / len(rows),
        "on_longer_cycles": longer,
        "contradicted": contradicted,
        "isolated": isolated / len(rows),
        "unconnected_prompts": unconnected,
        "duplicates": len(rows) - len({(r["prompt"], r["chosen"], r["rejected"]) for r in rows}),
    }


def drawn(seed: int) -> Rows:
    """Few prompts that share their completions' texts, so that every kind of graph turns up."""
    rng = random.Random(seed)
    texts = [chr(ord("a") + i) for i in range(rng.randint(2, 5))]
    rows = [row(f"p{rng.randrange(3)}", *rng.sample(texts, 2)) for _ in range(rng.randint(1, 12))]
    return rows


def test_the_graph_is_that_of_each_prompts_chains(tmp_path: Path) -> None:
    seen: dict[str, set[Any]] = {}
    for seed in range(150):
        rows = drawn(seed)
        report = report_on(rows, tmp_path)
        for name, expected in by_enumeration(rows).items():
            assert getattr(report, name) == pytest.approx(expected, abs=1e-12), (seed, name)
            seen.setdefault(name, set()).add(expected)
    assert all(len(values) > 2 for values in seen.values()), "every number varied"


def test_prompts_do_not_mix(tmp_path: Path) -> None:
    """The same texts the other way round under another prompt contradict nothing; under the same prompt they do."""
    apart = report_on([row("p", "a", "b"), row("q", "b", "a")], tmp_path)
    assert (apart.no_finite_dpo_optimum, apart.contradicted, apart.isolated, apart.prompts) == (1.0, 0, 1.0, 2)
    together = report_on([row("p", "a", "b"), row("p", "b", "a")], tmp_path)
    assert (together.no_finite_dpo_optimum, together.contradicted, together.isolated) == (0.0, 2, 0.0)


def test_a_cycle_with_a_tail(tmp_path: Path) -> None:
    rows = [row("p", *pair) for pair in ("ab", "bc", "ca", "cd")]
    report = report_on(rows, tmp_path)
    assert report.no_finite_dpo_optimum == 0.25
    assert (report.on_longer_cycles, report.responses, report.comparisons) == (3, 4, 4)


# ---------------------------------------------------------------- labels or reward


def resistances_by_pseudoinverse(rows: Rows, *, count: bool = True) -> list[float]:
    """Of every row, at even odds, prompt by prompt; `count` False takes a pair's labels for one."""
    found = []
    for prompt in {r["prompt"] for r in rows}:
        pairs = [tuple(sorted((r["chosen"], r["rejected"]))) for r in rows if r["prompt"] == prompt]
        texts = sorted({text for pair in pairs for text in pair})
        laplacian = np.zeros((len(texts), len(texts)))
        ends = [[texts.index(text) for text in pair] for pair in pairs]
        for i, j in ends if count else {tuple(pair) for pair in ends}:
            laplacian[[i, j], [i, j]] += 1 / 4
            laplacian[[i, j], [j, i]] -= 1 / 4
        inverse = np.linalg.pinv(laplacian)
        found += [inverse[i, i] + inverse[j, j] - 2 * inverse[i, j] for i, j in ends]
    return found


def test_labels_are_resistors_of_their_prompts_comparisons(tmp_path: Path) -> None:
    differ = 0
    for seed in range(60):
        rows = drawn(seed)
        report = report_on(rows, tmp_path, reward_error=(-1.0, 0.93))
        expected = resistances_by_pseudoinverse(rows)
        assert report.labels.resistance_quantiles == pytest.approx(np.quantile(expected, QUANTILES), rel=1e-9)
        assert report.labels.reward_error is not None
        assert report.labels.reward_error.better == pytest.approx(np.mean([r > 1.93 for r in expected]))
        once = np.quantile(resistances_by_pseudoinverse(rows, count=False), QUANTILES)
        differ += not np.allclose(once, np.quantile(expected, QUANTILES))
    assert differ > 20, "labels of a pair add up"


def test_comparisons_by_the_labels_of_their_pair(tmp_path: Path) -> None:
    rows = [row("once", "a", "b"), *[row("agree", "a", "b")] * 3]
    rows += [row("split", *pair) for pair in ("ab", "ba", "ab", "ab", "ab", "ab", "ab", "ab")]
    labels = report_on(rows, tmp_path).labels
    told = {(g.labels, g.or_more): (g.share, g.no_finite_dpo_optimum, g.all_agree_at_least) for g in labels.by_count}
    assert told == {(1, False): (1 / 12, 1, 1), (3, False): (3 / 12, 1, 1 / 4), (5, True): (8 / 12, 0, 2**-7)}
    assert labels.resistance_quantiles[0] == pytest.approx(4 / 8), "4 / k of a pair of its own"
    assert labels.reward_error is None


# ---------------------------------------------------------------- soft labels, ties, votes


def test_a_soft_label_or_a_tie_is_an_edge_each_way(tmp_path: Path) -> None:
    """Of four pairs of their own the certain one has no finite optimum."""
    report = report_on([row(f"p{i}", "a", "b", label=p) for i, p in enumerate((1.0, 0.7, 0.5, 0.2))], tmp_path)
    assert report.no_finite_dpo_optimum == report.isolated == 0.25
    assert (report.agreement.soft, report.agreement.ties) == (2, 1)
    assert (report.contradicted, report.on_longer_cycles, report.duplicates) == (0, 0, 0)
    assert report.agreement.disagreement is None, "nobody counted the labels"
    advice = [one.text for one in report.advice if "soft labels" in one.text]
    assert len(advice) == 1
    assert advice[0].startswith("50.0% of the comparisons have soft labels and 25.0% are ties")
    # On a path a > b > c of which the first is soft, only the second diverges; a cycle with a soft edge is no cycle.
    chain = report_on([row("p", "a", "b", label=0.6), row("p", "b", "c", label=1.0)], tmp_path)
    assert chain.no_finite_dpo_optimum == 0.5
    cycle = [row("p", "a", "b", label=0.6), row("p", "b", "c", label=1.0), row("p", "c", "a", label=1.0)]
    assert report_on(cycle, tmp_path).on_longer_cycles == 0
    assert report_on([{**one, "label": 1.0} for one in cycle], tmp_path).on_longer_cycles == 3


def votes(prompt: str, chosen: int, rejected: int) -> dict[str, Any]:
    return row(prompt, f"a {prompt}", "b", votes_chosen=chosen, votes_rejected=rejected)


def test_votes_are_told_as_the_same_rows_one_by_one(tmp_path: Path) -> None:
    counts = {"p": (3, 1), "q": (1, 2), "r": (2, 0), "s": (4, 0), "t": (1, 0)}
    counted = report_on([votes(prompt, *both) for prompt, both in counts.items()], tmp_path)
    rows: Rows = []
    for prompt, (a, b) in counts.items():
        rows += [row(prompt, f"a {prompt}", "b")] * a + [row(prompt, "b", f"a {prompt}")] * b
    singly = report_on(rows, tmp_path)
    # By hand: two of a pair's labels differ in 2ab / n(n - 1) of the draws.
    by_hand = np.mean([2 * a * b / ((a + b) * (a + b - 1)) for a, b in counts.values() if a + b > 1])
    for report in (counted, singly):
        found = report.agreement
        assert found.labelled_twice == 4
        assert found.disagreement == pytest.approx(by_hand)
        assert found.flip_rate is not None
        assert 2 * found.flip_rate * (1 - found.flip_rate) == pytest.approx(by_hand)
    assert [one.labels for one in counted.labels.by_count] == [one.labels for one in singly.labels.by_count]
    assert counted.no_finite_dpo_optimum == 3 / 5
    assert counted.notes[0] == "14 votes on 5 pairs; a pair counts as often as it has votes"
    text = [one.text for one in counted.advice if "--cdpo.label_smoothing" in one.text]
    assert len(text) == 1
    assert "on 4 pairs with two labels or more" in text[0]


def test_labels_that_always_differ_are_flipped_half_of_the_time(tmp_path: Path) -> None:
    found = report_on([row("p", "a", "b"), row("p", "b", "a")], tmp_path).agreement
    assert (found.labelled_twice, found.disagreement, found.flip_rate) == (1, 1.0, 0.5)


def test_sides_that_changed_places_keep_their_rewards_and_a_tie_has_no_longer_winner(tmp_path: Path) -> None:
    rewarded = {"chosen_reward": 2.0, "rejected_reward": 1.0}
    rows = [row(f"p{i}", "long text", "b", label=p, **rewarded) for i, p in enumerate((0.9, 0.1, 0.5))]
    report = report_on(rows, tmp_path)
    assert (report.rewards[0].agree, report.rewards[0].disagree, report.rewards[0].missing) == (0.5, 0.5, 0)
    assert report.length_bias[0].comparisons == 2
    assert report.longer_preferred == 0.5


def test_groups_of_completions_are_all_their_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: Rows = [
        {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 2]},
        {"prompt": "q", "completions": ["a"], "ranks": [1]},
    ]
    report = report_on(rows, tmp_path)
    assert (report.pairs, report.comparisons, report.prompts, report.responses) == (4, 3, 1, 3)
    assert report.left_out == {"fewer than two completions": 1}
    assert main([str(tmp_path / "pairs.jsonl")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 groups of completions are 3 pairs, of which 1 are ties; a prompt counts once" in shown


def test_a_column_that_looks_like_a_label_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", [row("p", "a", "b", preference_strength=2)])
    assert main([str(tmp_path / "pairs.jsonl")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "column 'preference_strength' looks like a label and is not read" in shown


def test_budgets_of_the_losses_that_the_set_allows(tmp_path: Path) -> None:
    margins = [2.0, -1.0, None, 1.0]
    rows = [
        row(
            f"p{i}",
            "a",
            "b",
            margin=m,
            member_margins=None if i == 0 or m is None else [m, 3.0],
            oracle_chosen_reward=9.0,
            oracle_rejected_reward=0.0,
        )
        for i, m in enumerate(margins)
    ]
    plain, one, members = report_on(rows, tmp_path).budgets
    assert (plain.method, plain.columns, plain.constant) == ("p-dpo", None, budget.DPO)
    assert (one.method, one.columns, members.columns) == ("dp-dpo", "margin", "member_margins")
    assert [one.constant, members.constant] == pytest.approx([(4 + 1 + 1) / 3 / 2, 9 / 2]), "the largest member's"
    advice = next(a.text for a in report_on(rows, tmp_path).advice if a.statements == ("alpha-budget",))
    assert "0.278 / B (p-dpo), 1 / B (dp-dpo with margin), 4.5 / B" in advice
    large = [row("p", "a", "b", margin=1e200), row("q", "a", "b", margin=-1e200)]
    assert len(report_on(large, tmp_path).budgets) == 1
    assert len(report_on([row("p", "a", "b", margin=0.0)], tmp_path).budgets) == 1


# ---------------------------------------------------------------- first to fall


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer of one-letter words, as a run leaves pi_ref."""
    folder = tmp_path_factory.mktemp("model")
    letters = {chr(ord("A") + i): i + 2 for i in range(tiny.VOCABULARY - 2)}
    words = Tokenizer(WordLevel({"<unknown>": 0, "<end>": tiny.END, **letters}, unk_token="<unknown>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unknown>").save_pretrained(folder)
    tiny.causal_lm(max_position_embeddings=1024).save_pretrained(folder)
    return folder


def similar_rows() -> Rows:
    """The loser, or the winner, repeats what the other says: one that repeats drags the other along."""
    rng = random.Random(3)
    rows = []
    for i in range(30):
        words = " ".join(rng.choices("BCDEFGH", k=3))
        sides = (words, " ".join([words] * 3))
        rows.append(row(" ".join(rng.choices("BCDEFGH", k=4)), *(sides if i % 3 else sides[::-1])))
    return rows


def test_the_first_to_fall_are_those_of_a_step_of_the_head(tmp_path: Path, tiny_model: Path) -> None:
    rows = [*similar_rows(), row("B " * 513, "B", "C"), row("B", "C " * 129, "C")]
    report = report_on(rows, tmp_path, model=str(tiny_model))
    first = report.first_to_fall
    assert first is not None
    assert (first.pairs, first.too_long, first.tied, first.capped) == (30, 2, False, False)
    assert report.tokens is not None, "lengths are in the model's tokens"

    def ids(text: str) -> list[int]:
        return [ord(word) - ord("A") + 2 for word in text.split()]

    pairs = [(ids(r["prompt"]), [*ids(r["chosen"]), tiny.END], [*ids(r["rejected"]), tiny.END]) for r in rows[:30]]
    moved = trained_moves(tiny.causal_lm(max_position_embeddings=1024), pairs)
    assert first.winner_falls == pytest.approx((moved[:, 0] < 0).mean())
    assert first.loser_rises == pytest.approx((moved[:, 1] > 0).mean())
    assert 0.2 < first.winner_falls < 0.9
    assert first.interval[0] < first.winner_falls < first.interval[1]
    exchanged = [row(r["prompt"], r["rejected"], r["chosen"]) for r in rows[:30]]  # control
    other = report_on(exchanged, tmp_path, model=str(tiny_model)).first_to_fall
    assert other is not None
    assert (other.winner_falls, other.loser_rises) == (first.loser_rises, first.winner_falls)
    assert other.winner_falls != first.winner_falls


def test_the_command_measures_a_model_and_says_what_it_is_exact_for(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", similar_rows())
    options = ["--model", str(tiny_model), "--model-pairs", "20", "--max-prompt-length", "9"]
    assert main([str(tmp_path / "pairs.jsonl"), *options, "--json", str(tmp_path / "report.json")]) == 0
    written = json.loads((tmp_path / "report.json").read_text())["first_to_fall"]
    assert (written["pairs"], written["model"]) == (20, str(tiny_model))
    out = " ".join(capsys.readouterr().out.split())
    assert "first step of the head, of 20 pairs: winner falls" in out
    assert "Exact if the output head alone is trained, by one small step of plain gradient descent" in out
    assert "[first-to-fall]" in out
    assert main([str(tmp_path / "pairs.jsonl"), *options[:4], "--max-completion-length", "1"]) == 2
    assert "none of 20 pairs is within 4 tokens of prompt and 1 of completion" in capsys.readouterr().err


def test_a_tied_or_capped_head_is_told(everything: Report) -> None:
    first = FirstToFall(
        model="m", pairs=9, too_long=0, winner_falls=0.5, interval=(0.2, 0.8), loser_rises=0.4, tied=True, capped=False
    )

    def text(of: FirstToFall) -> str:
        (one,) = [a.text for a in advise(replace(everything, first_to_fall=of)) if a.statements == ("first-to-fall",)]
        return one

    assert "tied to the input embeddings" in text(first)
    assert "tied" not in text(replace(first, tied=False))
    assert "Exact" not in text(replace(first, capped=True))


def test_without_a_model_there_is_no_torch(tmp_path: Path, tiny_model: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", similar_rows())
    asked = ("lm.diagnose", str(tmp_path / "pairs.jsonl"))
    given = (("--reward-error", "0.3", "1"), ("--model", str(tiny_model)))
    without, with_one = loaded(*((*asked, *more) for more in given), status=(*UNREAD, 0))
    assert "torch" not in without
    assert "torch" in with_one


# ---------------------------------------------------------------- rows, lengths, tokens


def test_rows_that_are_no_comparison_are_counted_by_reason(tmp_path: Path) -> None:
    rows = [
        row("p", "a", "b"),
        row("p", "a", "b"),
        row("p", "a", " a"),
        row("p", "", "b"),
        row("p", "a", " \n"),
        row(" ", "a", "b"),
    ]
    report = report_on(rows, tmp_path)
    assert (report.pairs, report.comparisons, report.duplicates, report.identical, report.empty) == (6, 2, 1, 1, 3)
    assert report.left_out == {"identical completions": 1, "empty completion": 2, "empty prompt": 1}


def test_length_bias_counts_by_the_length_classes(tmp_path: Path) -> None:
    rng = random.Random(0)
    lengths = [(rng.randint(1, 60), rng.randint(1, 60)) for _ in range(200)] + [(55, 50), (50, 55), (7, 7)]
    rows = [row(f"p{i}", "x" * chosen, "y" * rejected) for i, (chosen, rejected) in enumerate(lengths)]
    report = report_on(rows, tmp_path)
    for bias in report.length_bias:
        classes = [length_class(c, r, bias.ratio) for c, r in lengths if c != r]
        longer, shorter = classes.count("longer"), classes.count("shorter")
        assert bias.comparisons == longer + shorter
        assert bias.longer_preferred == longer / (longer + shorter)
        assert bias.interval is not None
        assert bias.interval[0] < bias.longer_preferred < bias.interval[1]
    assert [bias.ratio for bias in report.length_bias] == list(RATIOS)
    assert report.longer_preferred == report.length_bias[0].longer_preferred
    counts = [bias.comparisons for bias in report.length_bias]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_equal_lengths_have_no_longer_side(tmp_path: Path) -> None:
    report = report_on([row("p", "ab", "cd")], tmp_path)
    assert report.longer_preferred is None
    assert report.length_bias[0].interval is None


@pytest.fixture(scope="module")
def word_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One token a word."""
    words = Tokenizer(WordLevel({"<end>": 0, "<unknown>": 1}, unk_token="<unknown>"))
    words.pre_tokenizer = WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unknown>").save_pretrained(folder)
    return str(folder)


def test_with_a_tokenizer_lengths_are_tokens_and_limits_are_checked(tmp_path: Path, word_tokenizer: str) -> None:
    rows = [
        row("one two three", "a b c", "aaaaaaaaaaaaaaaaaaaa"),  # more tokens, fewer characters
        row("one two", "a", "a b c d e"),
        row("one", "a b", "b c d"),
    ]
    limits = {"max_prompt_length": 2, "max_completion_length": 4}
    report = report_on(rows, tmp_path, tokenizer=word_tokenizer, **limits)
    assert report.longer_preferred == pytest.approx(1 / 3)
    assert report_on(rows, tmp_path).longer_preferred == 0
    tokens = report.tokens
    assert tokens is not None
    assert (tokens.longest_prompt, tokens.longest_completion) == (3, 6)  # end-of-text is a token
    assert (tokens.too_long, tokens.tokens_cut) == (2, 1 + 2)
    assert report.length_unit == "tokens"


def test_a_tokenizers_own_limit_and_kind_change_no_count(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"<end>": 0, "<unknown>": 1}, unk_token="<unknown>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.enable_truncation(2)
    words.enable_padding(length=9)
    limited = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unknown>")
    for folder, tokenizer in (("limited", limited), ("slow", ByT5Tokenizer())):
        tokenizer.save_pretrained(tmp_path / folder)
    rows = [row("one two three", "a b c", "d")]
    for folder, prompt, completion in (("limited", 3, 4), ("slow", 13, 6)):  # in bytes, completions with their ends
        tokens = report_on(rows, tmp_path, tokenizer=str(tmp_path / folder)).tokens
        assert tokens is not None
        assert (tokens.longest_prompt, tokens.longest_completion) == (prompt, completion)


CHAT = (
    "{% for m in messages %}<|{{ m.role }}|> said: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def odd_rows(form: str) -> Rows:
    """Rows of one form, of many lengths, some of them no comparison."""
    rows: Rows = []
    for i in range(40):
        asked, good, bad = "why " * (i % 13 + 1), f"yes {i} " * (i % 7), f"no {i} " * (i % 5 + 1)
        if form == "messages":
            rows.append({"chosen": [message("user", asked), message("assistant", good)]})
            rows[-1]["rejected"] = [message("user", asked), message("assistant", good if i % 9 == 4 else bad)]
        elif form == "dialogues":
            rows.append({s: f"Human: {asked}\n\nAssistant: {t}" for s, t in (("chosen", good), ("rejected", bad))})
        elif form == "no prompt":
            rows.append({"chosen": f"{asked}{good}", "rejected": f"{asked}{bad}"})
        else:
            rows.append(row(asked, good, bad))
    return rows


@pytest.mark.parametrize("form", ["messages", "dialogues", "no prompt", "text"])
def test_the_report_and_the_preparing_agree_on_every_row(form: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("scratch:tiny", ["why yes no 0 1 2 3 4 5 6 7 8 9 user assistant"] * 9, False)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "pairs.jsonl", odd_rows(form))
    path, own = str(tmp_path / "pairs.jsonl"), str(tmp_path / "tokenizer")
    limits: dict[str, Any] = {"max_prompt_length": 40, "max_completion_length": 18}
    config = DataConfig(kind="preferences", path=path, valid_fraction=0.3, test_fraction=0.3, **limits)
    loaded, over = load(config, 0, tmp_path, render=chat_renderer(tokenizer, "tiny")), Tally()
    prepared, _ = tokenise(loaded.preferences, tokenizer, config, tmp_path / "ids.arrow", over)

    data = read(path, render=renderer_of(None, own))
    assert texts_of(data) == [loaded.preferences[name][:] for name in TEXTS]
    report = measure(data, "", tokenizer=own, **limits)
    assert (report.left_out, report.first) == (loaded.dropped["preferences"], loaded.first["preferences"])
    tokens = report.tokens
    assert tokens is not None
    assert (tokens.left_out, tokens.first) == (dict(over), over.first)
    assert report.comparisons - tokens.too_long == len(prepared) > 5
    assert tokens.too_long > 0
    arguments = [path, "--tokenizer", own, "--json", str(tmp_path / "report.json")]
    assert main([*arguments, "--max-prompt-length", "40", "--max-completion-length", "18"]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["tokens"]["left_out"] == tokens.left_out
    if form == "messages":  # control: without the template there would be fewer
        without = measure(read(path), "", tokenizer=own, **limits).tokens
        assert without is not None
        assert without.too_long < tokens.too_long


def test_the_table_names_the_first_rows_that_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("p", "a", "a"), row("p", "a", "b"), row("p", "b", "b"), {**row("p", "a", "b"), "topic": "letters"}]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert main([str(tmp_path / "pairs.jsonl")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "left out: identical completions (pairs.jsonl, line 1, line 3) │ 2" in out
    assert "- not read: columns topic (1 rows)" in out


# ---------------------------------------------------------------- rewards


def test_a_reward_that_comes_late_is_reported(tmp_path: Path) -> None:
    rows = [row("p", "a", "b"), row("q", "a", "b"), row("r", "a", "b", margin=2.0, member_margins=[1.0, -1.0])]
    report = report_on(rows, tmp_path)
    assert {(r.name, r.missing, r.agree) for r in report.rewards} == {
        ("the one reward", 2, 1.0),
        ("member 0", 2, 1.0),
        ("member 1", 2, 0.0),
    }
    with pytest.raises(ValueError, match=r"line 2: column 'score_chosen' needs 'score_rejected' beside it"):
        report_on([row("p", "a", "b"), row("q", "a", "b", score_chosen=1.0)], tmp_path)


def test_rewards_against_labels(tmp_path: Path) -> None:
    values = [(2.0, 1.0), (1.0, 1.0), (0.0, 3.0), (5.0, 1.0), (None, 1.0), (0.0, None)]
    rows = [row(f"p{i}", "a", "b", score_chosen=c, score_rejected=r) for i, (c, r) in enumerate(values)]
    (one,) = report_on(rows, tmp_path).rewards
    assert (one.missing, one.agree, one.ties, one.disagree) == (2, 0.5, 0.25, 0.25)
    assert one.margin_quantiles == pytest.approx(np.quantile([1, 0, 3, 4], [0.1, 0.5, 0.9]))


def test_every_source_of_rewards_is_reported(tmp_path: Path) -> None:
    """Also those that contradict each other, which a run would refuse."""
    given = {
        "chosen_reward": 1.0,
        "rejected_reward": 0.0,
        "score_chosen": 0.0,
        "score_rejected": 1.0,
        "margin": 2.0,
        "chosen_member_rewards": [1.0, 0.0],
        "rejected_member_rewards": [0.0, 3.0],
        "oracle_chosen_reward": 1.0,
        "oracle_rejected_reward": 2.0,
    }
    report = report_on([row("p", "a", "b", **given)], tmp_path)
    assert {(r.name, r.columns, r.agree) for r in report.rewards} == {
        ("the one reward", "chosen_reward - rejected_reward", 1.0),
        ("the one reward", "score_chosen - score_rejected", 0.0),
        ("the one reward", "margin", 1.0),
        ("member 0", "chosen_member_rewards - rejected_member_rewards", 1.0),
        ("member 1", "chosen_member_rewards - rejected_member_rewards", 0.0),
        ("the oracle", "oracle_chosen_reward - oracle_rejected_reward", 0.0),
    }
    assert [(e.columns, e.members) for e in report.ensembles] == [
        ("chosen_member_rewards - rejected_member_rewards", 2)
    ]
    assert report_on([row("p", "a", "b")], tmp_path).rewards == []


def test_every_column_of_the_vocabulary_is_told_as_what_it_is(tmp_path: Path) -> None:
    sources = {
        **{source: [("the one reward", None)] for source in rewards.OF_ONE},
        **{source: [("member", 0), ("member", 1)] for source in rewards.OF_MEMBERS},
        rewards.ORACLE: [("the oracle", None)],
    }
    for source, told in sources.items():
        values = {name: [2.0, 1.0] if source in rewards.OF_MEMBERS else 2.0 for name in source}
        report = report_on([row("p", "a", "b", **values)], tmp_path)
        assert [(r.whose, r.member) for r in report.rewards] == told
        assert [r.columns for r in report.rewards] == [" - ".join(source)] * len(told)


def test_columns_that_say_the_same_again_are_told_once(tmp_path: Path) -> None:
    """As `lm.export` writes them."""
    rows = [
        row(f"p{i}", "a", "b", chosen_reward=c, rejected_reward=1.0, reward_margin=None if c is None else c - 1.0)
        for i, c in enumerate([3.0, 0.1, None])
    ]
    (one,) = report_on(rows, tmp_path).rewards
    assert (one.columns, one.missing) == ("chosen_reward - rejected_reward", 1)
    both = report_on([*rows, row("q", "a", "b", chosen_reward=1.0, rejected_reward=1.0, reward_margin=1.0)], tmp_path)
    assert len(both.rewards) == 2, "they contradict each other"


def test_a_list_of_one_entry_is_the_one_reward(tmp_path: Path) -> None:
    rows = [row(f"p{i}", "a", "b", chosen_rewards=[c], rejected_rewards=[1.0]) for i, c in enumerate([3.0, 0.1])]
    report = report_on(rows, tmp_path)
    assert [(r.name, r.agree) for r in report.rewards] == [("the one reward", 0.5)]
    assert report.ensembles == []


def test_ensemble_disagreement(tmp_path: Path) -> None:
    margins = [[1.0, 2.0], [1.0, -1.0], [-1.0, -3.0], [0.0, 1.0], None]
    rows = [row(f"p{i}", "a", "b", member_margins=m) for i, m in enumerate(margins)]
    (ensemble,) = report_on(rows, tmp_path).ensembles
    assert (ensemble.members, ensemble.comparisons, ensemble.sign_disagreement) == (2, 4, 0.25)
    assert ensemble.spread == pytest.approx((0.5 + 1.0 + 1.0 + 0.5) / 4)


# ---------------------------------------------------------------- schemas and files


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


HH = [{"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b"}]
TLDR = [
    {
        "info": {"subreddit": "s", "title": "t", "post": "hi"},
        "summaries": [{"text": "b"}, {"text": "a"}],
        "choice": 1,
    }
]
MESSAGES = [
    {
        "chosen": [message("user", "hi"), message("assistant", "a")],
        "rejected": [message("user", "hi"), message("assistant", "b")],
    }
]
WITH_PROMPT = [
    {"prompt": "hi", "chosen": [message("assistant", "a")], "rejected": [message("assistant", "b")]},
    {"prompt": [message("user", "ho")], "chosen": [message("assistant", "a")], "rejected": [message("assistant", "b")]},
]


@pytest.mark.parametrize(
    ("rows", "kind"), [(HH, "hh"), (TLDR, "tldr"), (MESSAGES, "preferences"), (WITH_PROMPT, "preferences")]
)
def test_the_columns_tell_the_schema(rows: Rows, kind: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    data = read(str(tmp_path / "pairs.jsonl"))
    assert data.kind == kind
    assert data.rows == len(data.prompts) == len(rows)
    prompts, *sides = texts_of(data)
    assert "hi" in prompts[0]
    assert [side[0].strip() for side in sides] == ["a", "b"]


def test_messages_that_differ_before_the_last_are_left_out(tmp_path: Path) -> None:
    rows = [*MESSAGES, {**MESSAGES[0], "chosen": [message("user", "ho"), message("assistant", "a")]}]
    report = report_on(rows, tmp_path)
    assert report.left_out == {"differs by more than one final reply": 1}


def test_files_of_every_type_read_the_same(tmp_path: Path) -> None:
    rows = [row("p", "a", "b", margin=0.5), row("q", "c", "d", margin=-1.0)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress((tmp_path / "pairs.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    reports = [
        measure(read(str(tmp_path / name)), "", max_prompt_length=9, max_completion_length=9)
        for name in ("pairs.jsonl", "packed.jsonl.gz", "pairs.parquet")
    ]
    assert reports[0] == reports[1] == reports[2]
    assert reports[0].rewards[0].agree == 0.5


# ---------------------------------------------------------------- advice


@pytest.fixture
def everything(tmp_path: Path, word_tokenizer: str) -> Report:
    """A set that calls for every advice but that of a set without trouble."""
    rows = [row(f"long{i}", "a b c", "d", margin=-1.0, member_margins=[1.0, -1.0]) for i in range(30)]
    rows += [row("p", *pair, margin=1.0, member_margins=[1.0, 1.0]) for pair in ("ab", "ba", "cd", "de", "ec", "ec")]
    rows += [row("p", "a", "a", margin=0.0, member_margins=[0.0, 0.0])]
    return report_on(rows, tmp_path, tokenizer=word_tokenizer, max_completion_length=3)


def test_advice_cites_statements_of_the_ledger(everything: Report) -> None:
    ledger = {claim.id for claim in all_claims()}
    cited = {name for advice in everything.advice for name in advice.statements}
    assert cited <= ledger
    assert {"prop1", "prop1-scc", "cor1", "thm1", "thm1-connected", "thm2", "thm2-hull", "prop6"} <= cited
    assert {"labels-or-reward", "alpha-budget"} <= cited
    assert len(everything.advice) == 14


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        ({"isolated": 0.0}, "pairs of their own"),
        ({"contradicted": 0}, "both ways round"),
        ({"on_longer_cycles": 0}, "cycles of three or more"),
        ({"unconnected_prompts": 0}, "groups that are never compared"),
        ({"rewards": []}, "Labels disagree with the one reward (margin)"),
        ({"ensembles": []}, "contradict each other"),
        ({"duplicates": 0}, "repeat an earlier one"),
        ({"identical": 0, "empty": 0}, "Remove"),
        ({"tokens": None}, "exceed the limits"),
    ],
)
def test_each_advice_has_its_cause(change: dict[str, Any], gone: str, everything: Report) -> None:
    assert [gone in advice.text for advice in everything.advice].count(True) == 1
    assert not any(gone in advice.text for advice in advise(replace(everything, **change)))


def test_a_set_whose_labels_are_balanced_gets_no_warning(tmp_path: Path) -> None:
    (advice,) = report_on([row("p", "a", "b"), row("p", "b", "c"), row("p", "c", "a")], tmp_path).advice[:1]
    assert "finite optimum" in advice.text
    assert advice.statements == ("prop1-scc",)


# ---------------------------------------------------------------- the command


def test_the_command_prints_and_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {"reward_margin": 1.0, "member_margins": [1.0, -1.0]}
    pairs = [row("p", "ab", "b", **told), row("p", "b", "ab", **told), row("q", "a", "bb", **told)]
    write_jsonl(tmp_path / "[pairs].jsonl", pairs)
    assert main([str(tmp_path / "[pairs].jsonl"), "--json", str(tmp_path / "report.json")]) == 0
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["pairs"] == 3
    assert written["no_finite_dpo_optimum"] == pytest.approx(1 / 3)
    assert written["longer_preferred"] == pytest.approx(1 / 3)
    assert {"prompts", "duplicates", "identical", "empty", "advice", "length_bias"} <= written.keys()
    out = capsys.readouterr().out
    assert "[pairs].jsonl" in out.replace("\n", ""), "the title is as wide as its table"
    for text in (
        *("no finite DPO optimum", "33.3%", "[prop1-scc, drdo-lemma1c]"),
        *("the one reward: agrees with the label", "member 1: agrees with the label"),
        "the 2 members contradict each other",
    ):
        assert text in out


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("{}", "line 1: no preference set with the columns [] is known; there should be prompt, chosen and rejected"),
        ('{"prompt": "p", "chosen": 3, "rejected": "b"}', "line 1: 'chosen' must be of type str, got int: 3"),
        ('{"chosen": [{"role": "user"}], "rejected": []}', "line 1, chosen: column 'content' is missing"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p"}', "line 2: column 'chosen' is missing"),
        (
            '{"prompt": "p", "chosen": "a", "rejected": "a"}',
            "none of 1 rows is a comparison, left out were {'identical",
        ),
        ("", "pairs.jsonl holds no rows; one JSON object a line is needed"),
        ("\n \n", "pairs.jsonl holds no rows; one JSON object a line is needed"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1}', "'score_chosen' needs 'score_rejected'"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "margin": "x"}', "'margin' must be a number, got 'x'"),
        (
            '{"prompt": "p", "chosen": "a", "rejected": "b", "chosen_rewards": [1], "rejected_rewards": [1, 2]}',
            "chosen_rewards and rejected_rewards must be of one length, got [1.0] and [1.0, 2.0]",
        ),
        (
            '{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1}\n'
            '{"prompt": "p", "chosen": "a", "rejected": "b", "margin": [1, 2]}',
            "line 2: 'margin' must be a number, got [1, 2]",
        ),
        (
            '{"prompt": "p", "chosen": "a", "rejected": "b", "member_margins": [1, 2, 3]}\n'
            '{"prompt": "p", "chosen": "a", "rejected": "b", "member_margins": [1, 2]}',
            "member_margins must have as many members in every row, got [2, 3]",
        ),
        (
            '{"prompt": "p", "chosen": "a", "rejected": "b", "member_margins": 1}',
            "'member_margins' must be a list of numbers, one a member, got 1",
        ),
        *(
            (
                f'{{"prompt": "p", "chosen": "a", "rejected": "b", {given}}}',
                f"line 1: {message}",
            )
            for given, message in (
                ('"margin": NaN', "'margin' must be finite, or null where there is none, got nan"),
                ('"score_chosen": 1, "score_rejected": -Infinity', "'score_rejected' must be finite, or null where"),
                ('"oracle_chosen_reward": NaN, "oracle_rejected_reward": 1', "'oracle_chosen_reward' must be finite"),
                (
                    '"member_margins": [1, NaN]',
                    "'member_margins' must be finite, or null where there is none, got [1, nan]",
                ),
                (
                    '"member_margins": [1, null]',
                    "'member_margins' must be a list of numbers, one a member, got [1, None]",
                ),
                (
                    '"score_chosen": 1e308, "score_rejected": -1e308',
                    "score_chosen - score_rejected must be finite, got inf",
                ),
                (
                    '"chosen_member_rewards": [1, 1e308], "rejected_member_rewards": [1, -1e308]',
                    "chosen_member_rewards - rejected_member_rewards must be finite, got [0.0, inf]",
                ),
            )
        ),
        ("{", "line 1: not JSON"),
    ],
)
def test_mistakes_in_data_are_one_message_and_status_2(
    lines: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pairs.jsonl").write_text(lines)
    assert main([str(tmp_path / "pairs.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
    assert main([str(tmp_path / "pairs.jsonl"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.jsonl"], "nothing.jsonl': there is no such file or folder"),
        (["{pairs}", "--subset", "x"], "subset 'x' goes with a hub name"),
        (["{pairs}", "--tokenizer", "/nowhere"], "tokenizer cannot be loaded"),
        (["{pairs}", "--json", "/proc/report.json"], "report.json"),
        (["{pairs}", "--kind", "tldr"], "column 'info' is missing"),
        (["{pairs}", "--kind", "odd"], "invalid choice: 'odd'"),
        (["{pairs}", "--max-prompt-length", "8"], "name a --tokenizer"),
        (["{pairs}", "--model-pairs", "8"], "--model-pairs are of a --model: name it"),
        (["{pairs}", "--model", "scratch:tiny"], "a trained model is needed, the one that is to be pi_ref"),
        (["{pairs}", "--model", "/nowhere"], "model '/nowhere': there is no such folder"),
        (["{pairs}", "--reward-error", "1", "-1"], "a finite variance >= 0, got 1 and -1"),
        (["{pairs}", "--reward-error", "nan", "1"], "needs a finite bias"),
        (["{pairs}", "--tokenizer", "x", "--max-prompt-length", "0"], "a whole number above 0 is needed, got '0'"),
    ],
)
def test_mistakes_in_options_are_one_message_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", [row("p", "a", "b")])
    try:
        status = main([argument.format(pairs=tmp_path / "pairs.jsonl") for argument in arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_default_limits_are_those_that_a_run_takes_from_the_data(tmp_path: Path, word_tokenizer: str) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", [row("p", "a", "b")])
    arguments = [str(tmp_path / "pairs.jsonl"), "--tokenizer", word_tokenizer, "--max-prompt-length", "7"]
    assert main([*arguments, "--json", str(tmp_path / "report.json")]) == 0
    tokens = json.loads((tmp_path / "report.json").read_text())["tokens"]
    assert (tokens["max_prompt_length"], tokens["max_completion_length"]) == (7, 2)


# ---------------------------------------------------------------- python -m lm


def test_the_package_lists_its_commands() -> None:
    root = Path(lm.__main__.__file__).parents[1]
    listed = subprocess.run([sys.executable, "-m", "lm"], capture_output=True, text=True, check=True, cwd=root).stdout
    found = lm.__main__.commands()
    assert {"lm.train", "lm.diagnose", "lm.score"} <= found.keys()
    assert not {"lm.data", "lm.__main__", "lm.objectives_test", "lm.objectives"} & found.keys()
    for name, text in found.items():
        assert text
        assert f"python -m {name} " in listed
        assert text in listed


def test_what_is_no_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        lm.__main__.main(["train"])
    assert end.value.code == 2
    assert "unrecognized arguments: train; did you mean python -m lm.train?" in capsys.readouterr().err
