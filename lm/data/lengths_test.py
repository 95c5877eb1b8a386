"""A biased subset has exactly the asked share and size, or the refusal names the largest size that can be had."""

from __future__ import annotations

import math
import re
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lm.bias import is_for_any_set, main
from lm.config import BiasConfig
from lm.data.lengths import (
    LengthClass,
    bias_file,
    biased_subset,
    counts,
    largest_feasible,
    length_class,
    length_report,
    read_lengths,
    slope_on_length,
)
from lm.data.rows import read_rows, write_rows
from lm.models.loading import load_tokenizer
from tests.command_lines import over

classes_of = st.lists(st.sampled_from(["longer", "shorter", "neither"]), max_size=60)
shares = st.one_of(
    st.sampled_from([0.0, 0.2, 0.3, 0.5, 0.7, 0.8, 1.0]),
    st.integers(0, 1000).map(lambda n: n / 1000),
    st.integers(1, 9).map(lambda n: n / 100),  # a small share: many sizes round to the same few pairs
)


def feasible(classes: list[LengthClass], share: float, size: int) -> bool:
    """Referee in exact decimal arithmetic: round half up, then count."""
    longer = math.floor(Fraction(str(share)) * size + Fraction(1, 2))
    return longer <= classes.count("longer") and size - longer <= classes.count("shorter")


@given(shares, st.integers(0, 10_000))
def test_counts_are_the_share_to_the_nearest_pair(share: float, size: int) -> None:
    longer, shorter = counts(share, size)
    assert longer + shorter == size
    assert longer == math.floor(Fraction(str(share)) * size + Fraction(1, 2))


def test_half_a_pair_is_rounded_up_in_decimal_not_in_binary() -> None:
    assert 0.29 * 50 < 14.5, "the binary product is below the half that the decimal one is"
    assert counts(0.29, 50) == (15, 35)


@given(classes_of, shares)
@example(["shorter"] * 10, 0.01)
@example(["longer"] + ["shorter"] * 40, 0.04)
def test_the_largest_feasible_size_is_feasible_and_one_more_is_not(classes: list[LengthClass], share: float) -> None:
    most = largest_feasible(classes, share)
    assert feasible(classes, share, most)
    assert not any(feasible(classes, share, size) for size in range(most + 1, len(classes) + 2))


@given(classes_of, shares, st.data())
def test_a_subset_has_exact_counts_and_no_duplicates(
    classes: list[LengthClass], share: float, data: st.DataObject
) -> None:
    most = largest_feasible(classes, share)
    assume(most > 0)
    size = data.draw(st.integers(1, most), "size")
    seed = data.draw(st.integers(0, 5), "seed")
    rows = biased_subset(classes, share, size, seed=seed, what="bias.size")
    assert rows == sorted(set(rows))
    drawn = [classes[i] for i in rows]
    assert (drawn.count("longer"), drawn.count("shorter")) == counts(share, size)
    assert len(drawn) == size
    assert rows == biased_subset(classes, share, size, seed=seed, what="bias.size")


@given(classes_of, shares, st.integers(1, 5))
def test_more_than_feasible_is_refused_with_the_largest_size(
    classes: list[LengthClass], share: float, more: int
) -> None:
    most = largest_feasible(classes, share)
    with pytest.raises(ValueError, match=rf"bias\.size: {most + more} pairs .* the largest feasible size is {most}$"):
        biased_subset(classes, share, most + more, seed=0, what="bias.size")


def test_without_a_size_the_largest_is_taken_and_nothing_is_refused() -> None:
    longer, shorter, neither = (list[LengthClass]([name]) for name in get_args(LengthClass))
    classes = longer * 10 + shorter * 8 + neither * 5
    assert len(biased_subset(classes, 0.2, None, seed=0, what="bias.size")) == 10
    with pytest.raises(ValueError, match="the largest feasible size is 0"):
        biased_subset(neither * 3, 0.5, None, seed=0, what="bias.size")


def test_other_seeds_draw_other_rows() -> None:
    both: list[LengthClass] = ["longer", "shorter"]
    classes = both * 50
    assert len({tuple(biased_subset(classes, 0.5, 20, seed=seed, what="bias.size")) for seed in range(5)}) == 5


@given(st.integers(1, 500), st.integers(1, 500), st.sampled_from([1.1, 1.2, 1.25, 1.5, 2.0]))
def test_length_classes_are_exact_and_antisymmetric(chosen: int, rejected: int, ratio: float) -> None:
    ours = length_class(chosen, rejected, ratio)
    exact = Fraction(str(ratio))
    assert (ours == "longer") == (chosen >= exact * rejected)
    assert (ours == "shorter") == (rejected >= exact * chosen)
    swapped = length_class(rejected, chosen, ratio)
    assert swapped == {"longer": "shorter", "shorter": "longer", "neither": "neither"}[ours]


def test_exactly_ten_per_cent_more_is_longer() -> None:
    assert 55 < 1.1 * 50, "the binary product is above the decimal one"
    assert length_class(55, 50, 1.1) == "longer"
    assert length_class(55, 50, 1.1000000000000001) == "longer"
    assert length_class(10**6, 10**6, 1.0000000000000002) == "neither", "and no product is too large"
    assert length_class(50, 55, 1.1) == "shorter"
    assert length_class(109, 100, 1.1) == "neither"


def test_a_length_report_counts_the_asked_rows_only() -> None:
    classes: list[LengthClass] = ["longer", "shorter", "neither", "longer"]
    assert length_report(classes, [20, 5, 9, 30], [10, 10, 9, 10], [0, 2]) == {
        "pairs": 2,
        "longer_preferred": 1,
        "shorter_preferred": 0,
        "mean_chosen_length": 14.5,
        "mean_rejected_length": 9.5,
    }
    assert length_report(classes, [1], [1], [])["mean_chosen_length"] is None


# ---------------------------------------------------------------- any preference set


def text_of(length: int) -> str:
    return "x" * length


sets = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=40)
"""Lengths of chosen and rejected; with rows that are no comparison (empty or identical), and with equal rows."""


@given(sets, shares, st.data())
def test_a_file_is_biased_exactly_or_refused_with_the_largest_size(
    lengths: list[tuple[int, int]], share: float, data: st.DataObject
) -> None:
    rows = [{"n": n, "prompt": "p", "chosen": text_of(c), "rejected": text_of(r)} for n, (c, r) in enumerate(lengths)]
    classes = [length_class(c, r, 1.1) for c, r in lengths if c and r and c != r]
    most = largest_feasible(classes, share)
    size = data.draw(st.one_of(st.none(), st.integers(1, 50)), "size")
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name) / "pairs.jsonl", Path(name) / "biased.jsonl"
        write_rows(source, rows)
        config = BiasConfig(rho=share, size=size)
        if most == 0 or (size or 0) > most:
            with pytest.raises(ValueError, match=rf"^--(size|rho): .* the largest feasible size is {most}$"):
                bias_file(str(source), out, config, seed=0)
            assert not out.exists()
            return
        report = bias_file(str(source), out, config, seed=0)
        drawn = [row for _, row in read_rows(str(out))]
        again = Path(name) / "again.jsonl"
        bias_file(str(source), again, config, seed=0)
        assert again.read_bytes() == out.read_bytes()
    assert all(row == rows[row["n"]] for row in drawn), "rows are as they were"
    numbers = [row["n"] for row in drawn]
    assert numbers == sorted(set(numbers)), "none twice, in their order"
    found = [length_class(len(row["chosen"]), len(row["rejected"]), 1.1) for row in drawn]
    assert (found.count("longer"), found.count("shorter")) == counts(share, size or most)
    assert len(found) == (size or most), "and none that has no longer side"
    assert report["after"]["pairs"] == len(found)
    assert report["before"]["pairs"] + sum(report["left_out"].values()) == len(rows)
    assert report["before"]["longer_preferred"] == classes.count("longer")


def pairs(count: int = 40) -> list[dict[str, Any]]:
    """Half prefer the longer; messages of some words."""

    def message(words: int) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": "word " * words}]

    ask = [{"role": "user", "content": "Say it."}]
    long, short = message(9), message(3)
    return [
        {"prompt": ask, "chosen": long if i % 2 else short, "rejected": short if i % 2 else long} for i in range(count)
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_messages_from_any_file_to_any_file(suffix: str, tmp_path: Path) -> None:
    source, out = tmp_path / f"pairs{suffix}", tmp_path / f"biased{suffix}"
    write_rows(source, pairs())
    report = bias_file(str(source), out, BiasConfig(rho=0.2, size=10), seed=1)
    drawn = [row for _, row in read_rows(str(out))]
    assert sum(len(str(row["chosen"])) > len(str(row["rejected"])) for row in drawn) == 2
    assert all(row in pairs() for row in drawn)
    assert report == {
        "before": {
            "pairs": 40,
            "longer_preferred": 20,
            "shorter_preferred": 20,
            "mean_chosen_length": 29.0,
            "mean_rejected_length": 29.0,
        },
        "after": {
            "pairs": 10,
            "longer_preferred": 2,
            "shorter_preferred": 8,
            "mean_chosen_length": 0.2 * 44 + 0.8 * 14,
            "mean_rejected_length": 0.2 * 14 + 0.8 * 44,
        },
        "left_out": {},
        "unit": "characters",
    }


def test_other_seeds_draw_other_rows_of_a_file(tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    write_rows(source, [{**row, "n": n} for n, row in enumerate(pairs())])
    drawn = set()
    for seed in range(4):
        bias_file(str(source), tmp_path / "out.jsonl", BiasConfig(rho=0.5, size=10), seed=seed)
        drawn.add(tuple(row["n"] for _, row in read_rows(str(tmp_path / "out.jsonl"))))
    assert len(drawn) == 4


def test_lengths_in_tokens_are_the_tokenizers_with_end_of_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("scratch:tiny", ["wordwordword a b c"] * 50, False)
    row = {"prompt": "p", "chosen": "wordwordword", "rejected": "a b c"}
    write_rows(tmp_path / "pairs.jsonl", [row])
    characters = read_lengths(str(tmp_path / "pairs.jsonl"))
    tokens = read_lengths(str(tmp_path / "pairs.jsonl"), tokenizer)
    assert (list(characters.chosen), list(characters.rejected)) == ([12], [5])
    expected = [len(tokenizer(row[side])["input_ids"]) + 1 for side in ("chosen", "rejected")]
    assert [tokens.chosen[0], tokens.rejected[0]] == expected
    assert characters.classes(1.1) == ["longer"]
    assert tokens.classes(1.1) == ["shorter"], "the unit decides"


def test_the_command_writes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    write_rows(source, [*pairs(), {"prompt": "p", "chosen": "same", "rejected": "same"}])
    assert main([str(source), "--rho", "0.2", "--size", "10", "--seed", "3", "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 10
    shown = capsys.readouterr()
    assert "left out: 1 rows, identical completions" in shown.out
    lines = {" ".join(line.split()[:-2]): line.split()[-2:] for line in shown.out.splitlines() if len(line.split()) > 2}
    assert lines["pairs"] == ["40", "10"]
    assert lines["share preferring the longer"] == ["0.5000", "0.2000"]
    assert lines["mean chosen length (characters)"] == ["29.00", "20.00"]
    assert f"written: {out}" in shown.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rho", "0.2", "--size", "400"], "--size: 400 pairs of which 20% .*; the largest feasible size is 25$"),
        (["--rho", "1.2"], "BiasConfig.rho must be between 0 and 1, got 1.2"),
        (["--rho", "0.2", "--size", "0"], "BiasConfig.size must be > 0, got 0"),
        (["--rho", "0.2", "--length-ratio", "1"], "BiasConfig.length_ratio must be > 1 and finite, got 1"),
        (["--rho", "0.2", "--out", "out.csv"], "out.csv: a file of type .jsonl, .jsonl.gz, .parquet is needed"),
        (["--rho", "0.2", "--out", "pairs.jsonl"], "--out pairs.jsonl is the data itself; name another file"),
        (["--rho", "0.2", "--tokenizer", "scratch:tiny"], "--tokenizer must be a hub name or a folder, got 'scratch:"),
        (["--rho", "0.2", "--tokenizer", "./nowhere"], "model './nowhere': its tokenizer cannot be loaded"),
    ],
)
def test_the_command_says_what_is_wrong(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("pairs.jsonl"), pairs())
    before = Path("pairs.jsonl").read_bytes()
    assert main(["pairs.jsonl", *over({"--out": "out.jsonl"}, options)]) == 2
    assert re.match(f"error: {message}", capsys.readouterr().err.strip())
    assert Path("pairs.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_which_of_the_two_commands_it_is() -> None:
    assert is_for_any_set(["pairs.jsonl", "--rho", "0.2"])
    assert is_for_any_set(["pairs.jsonl", "--help"])
    assert is_for_any_set(["--rho", "0.2", "--out=b.jsonl", "pairs.jsonl"])
    assert not is_for_any_set([])
    assert not is_for_any_set(["--help"])
    assert not is_for_any_set(["--config", "lm/configs/tldr.yaml", "--output_dir", "out", "--bias.rho", "0.2"])


def test_a_slope_on_length_does_not_depend_on_which_side_is_called_chosen() -> None:
    rng = np.random.default_rng(0)
    longer = rng.integers(-9, 10, 4000)
    assert slope_on_length(0.3 * longer, longer) == pytest.approx(1)
    assert slope_on_length(-7.0 * longer, longer) == pytest.approx(-1)
    noise = rng.standard_normal(4000)
    assert slope_on_length(noise, longer) == pytest.approx(0, abs=0.05)
    mixed = noise + 0.2 * longer
    spread = 0.2 * float(np.sqrt(np.mean(longer**2)))
    assert slope_on_length(mixed, longer) == pytest.approx(spread / np.sqrt(1 + spread**2), abs=0.03)
    turned = rng.choice([-1, 1], 4000)
    assert slope_on_length(turned * mixed, turned * longer) == pytest.approx(slope_on_length(mixed, longer))
    assert slope_on_length(turned * mixed, longer) == pytest.approx(0, abs=0.05), "of sides that do not go together"


def test_without_differences_there_is_no_slope_on_length() -> None:
    assert slope_on_length(np.ones(3), np.zeros(3, dtype=int)) is None
    assert slope_on_length(np.array([]), np.array([], dtype=int)) is None
