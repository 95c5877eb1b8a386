"""The embedded world: a generated, TL;DR-shaped preference corpus with a known utility, in the hub's schema.

A post is a list of events, a word each; a star marks the important ones, a dash the others. A summary retells some of
the events, perhaps with a slip or twice. Utility counts important events retold, minus what is
invented or repeated. Simulated annotators compare two summaries with Bradley-Terry noise and a mild taste for length.

Everything is drawn from one seed with a private generator, so the same config gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import WorldConfig
from lm.io import write_jsonl

EVENTS = (
    "wedding fire flood strike picnic concert robbery election storm parade funeral match auction harvest fair "
    "festival protest debate lecture banquet rescue crash outage trial regatta march jubilee opening eclipse drought "
    "feast duel race play film dance quiz sale tour vote raid riot frost quake launch party truce"
).split()


@dataclass(frozen=True)
class Writer:
    """A summary-writing policy: the chances of its habits."""

    name: str
    covers_important: float
    covers_minor: float
    invents: float
    repeats: float


REFERENCE = Writer("ref", covers_important=0.8, covers_minor=0.25, invents=0.03, repeats=0.02)
"""Who writes the summaries that pi_ref learns from: decent, with room above."""

WRITERS = (
    REFERENCE,
    Writer("careful", covers_important=0.95, covers_minor=0.1, invents=0.02, repeats=0.0),
    Writer("terse", covers_important=0.5, covers_minor=0.02, invents=0.05, repeats=0.0),
    Writer("verbose", covers_important=0.9, covers_minor=0.8, invents=0.1, repeats=0.05),
    Writer("sloppy", covers_important=0.6, covers_minor=0.4, invents=0.3, repeats=0.1),
)


@dataclass(frozen=True)
class Post:
    """Events in order, each with whether it is important."""

    events: tuple[str, ...]
    important: tuple[bool, ...]

    @property
    def text(self) -> str:
        """As it stands in the corpus."""
        return "".join(
            f" {'*' if mark else '-'} {event}" for event, mark in zip(self.events, self.important, strict=True)
        )


def parse_post(text: str) -> Post:
    """The post behind its text; ValueError where the text is not one of this world's."""
    words = text.split()
    marks, events = words[::2], words[1::2]
    if not words or len(marks) != len(events) or not set(marks) <= {"*", "-"}:
        raise ValueError(f"not a post of the embedded world: {text!r}")
    return Post(tuple(events), tuple(mark == "*" for mark in marks))


def utility(post: Post, summary: str) -> float:
    """True worth of a summary: +1 for each important event retold, +0.1 for another, -1 for each sentence that is no
    event of the post, -0.5 for each repetition."""
    worth = dict(zip(post.events, (1.0 if mark else 0.1 for mark in post.important), strict=True))
    told: set[str] = set()
    total = 0.0
    for sentence in summary.split("."):
        event = sentence.strip()
        if event:
            total += -0.5 if event in told else worth.get(event, -1.0)
            told.add(event)
    return total


def generate(config: WorldConfig, seed: int, folder: Path) -> None:
    """Writes `comparisons.jsonl` and `sft.jsonl`, in the schemas of openai/summarize_from_feedback (comparisons) and of
    the filtered TL;DR set, into the folder."""
    rng = np.random.default_rng([seed, 0x0DD])
    comparisons: list[dict[str, Any]] = []
    references: list[dict[str, Any]] = []
    for index in range(config.posts):
        post = _draw_post(rng, config)
        info = {"id": f"w{index}", "subreddit": "town", "title": "news", "post": post.text}
        references.append({**info, "summary": _write(rng, REFERENCE, post)})
        for _ in range(config.pairs_per_post):
            pair = _draw_pair(rng, post)
            if pair is not None:
                comparisons.append(_judge(rng, config, post, info, pair))
    write_jsonl(folder / "comparisons.jsonl", comparisons)
    write_jsonl(folder / "sft.jsonl", references)


def _draw_post(rng: np.random.Generator, config: WorldConfig) -> Post:
    count = int(rng.integers(config.min_events, config.max_events + 1))
    events = tuple(str(event) for event in rng.choice(EVENTS, count, replace=False))
    important = rng.random(count) < 0.5
    important[rng.integers(count)] = True
    return Post(events, tuple(bool(mark) for mark in important))


def _write(rng: np.random.Generator, writer: Writer, post: Post) -> str:
    told: list[str] = []
    for event, mark in zip(post.events, post.important, strict=True):
        if rng.random() < (writer.covers_important if mark else writer.covers_minor):
            told.append(str(rng.choice(EVENTS)) if rng.random() < writer.invents else event)
            if rng.random() < writer.repeats:
                told.append(told[-1])
    if not told:
        told.append(post.events[post.important.index(True)])
    return "".join(f" {event}." for event in told)


def _draw_pair(rng: np.random.Generator, post: Post) -> list[tuple[Writer, str]] | None:
    for _ in range(10):
        writers = [WRITERS[i] for i in rng.choice(len(WRITERS), 2, replace=False)]
        pair = [(writer, _write(rng, writer, post)) for writer in writers]
        if pair[0][1] != pair[1][1]:
            return pair
    return None


def _judge(
    rng: np.random.Generator, config: WorldConfig, post: Post, info: dict[str, str], pair: Sequence[tuple[Writer, str]]
) -> dict[str, Any]:
    """One annotator's comparison, in the hub's schema."""
    taste = [
        config.annotator_sharpness * (utility(post, text) + config.length_preference * len(text.split()))
        for _, text in pair
    ]
    first_preferred = 1 / (1 + math.exp(taste[1] - taste[0]))
    choice = int(rng.random() >= first_preferred)
    # Confidence as the hub has it, 1 (second surely better) to 9 (first surely better).
    confidence = round(1 + 8 * first_preferred)
    return {
        "info": info,
        "summaries": [{"text": text, "policy": writer.name, "note": None} for writer, text in pair],
        "choice": choice,
        "worker": f"annotator{int(rng.integers(8))}",
        "batch": "world",
        "split": "train",
        "extra": {"confidence": confidence},
    }
