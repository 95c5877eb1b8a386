"""The embedded world against what real comparisons look like, and against chance."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from lm.base.files import read_jsonl
from lm.config import WorldConfig
from lm.data.confidence import certainty
from lm.data.world import Taste, generate, post_of, utility

REAL = Path(__file__).parents[3] / "shared/data/tldr/batch13.json.gz"
WORLD = WorldConfig(posts=300)

GENERATE = """
import hashlib, sys
from pathlib import Path
from lm.config import WorldConfig
from lm.data import world
folder = Path(sys.argv[1])
world.generate(WorldConfig(posts=60), 0, folder)
digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.iterdir())))
words = world.EVENTS
values = [world.utility(" ".join(words[i : i + 16]), " ".join(words[i // 2 : i // 2 + 23])) for i in range(14)]
print(digest.hexdigest(), [value.hex() for value in values])
"""


def confidences(rows: Iterable[dict[str, Any]]) -> dict[int, set[int]]:
    """Choice -> confidences that go with it."""
    found: dict[int, set[int]] = {0: set(), 1: set()}
    for row in rows:
        found[row["choice"]].add(row["extra"]["confidence"])
    return found


def test_confidence_goes_with_the_choice_as_in_real_comparisons(tmp_path: Path) -> None:
    generate(WORLD, 0, tmp_path)
    rows = [row for _, row in read_jsonl(tmp_path / "comparisons.jsonl")]
    assert confidences(rows) == {0: {1, 2, 3, 4}, 1: {6, 7, 8, 9}}


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not there")
def test_real_comparisons_are_of_that_scale() -> None:
    with gzip.open(REAL, "rt", encoding="utf-8") as file:
        assert confidences(map(json.loads, file)) == {0: {1, 2, 3, 4}, 1: {6, 7, 8, 9}}


def test_the_surer_side_is_the_better_one(tmp_path: Path) -> None:
    """By the annotators' own utility: those at the ends of the scale err less often than those in the middle."""
    generate(WORLD, 0, tmp_path)
    right: dict[float, list[bool]] = {}
    for _, row in read_jsonl(tmp_path / "comparisons.jsonl"):
        first, second = (utility(row["info"]["post"], summary["text"]) for summary in row["summaries"])
        if first != second:
            right.setdefault(certainty(row["extra"]["confidence"]), []).append((second > first) == row["choice"])
    share = {sure: sum(each) / len(each) for sure, each in right.items()}
    assert share[4] > 0.95
    assert share[4] > share[2] > share[1] > 0.45


def test_no_number_depends_on_the_order_of_sets(tmp_path: Path) -> None:
    said = []
    for seed in ("1", "2", "33"):
        (tmp_path / seed).mkdir()
        command = [sys.executable, "-c", GENERATE, str(tmp_path / seed)]
        made = subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        said.append(made.stdout)
    assert said[0] == said[1] == said[2]


def test_no_sharpness_of_the_annotators_overflows(tmp_path: Path) -> None:
    sure = WorldConfig(posts=60, annotator_sharpness=1e6)
    generate(sure, 0, tmp_path)
    taste = Taste(1.0, sure.length_preference)
    for _, row in read_jsonl(tmp_path / "comparisons.jsonl"):
        first, second = (taste(row["info"]["post"], each["text"]) for each in row["summaries"])
        assert first == second or row["choice"] == (second > first)


def test_a_taste_is_utility_and_length_as_they_are_weighed() -> None:
    assert Taste(2.0, 0.5)("fire picnic vote", " fire vote") == pytest.approx(2 * 1.3 + 2 * 0.5)
    assert Taste(1.0, 0.0)("fire picnic vote", " fire") == utility("fire picnic vote", " fire")


def test_a_post_is_found_in_its_prompt() -> None:
    template = "r/{subreddit} {title}:{post}\n\nTL;DR:"
    assert post_of("r/town news: fire picnic\n\nTL;DR:", template) == " fire picnic"
