"""The embedded world: a generated, TL;DR-shaped preference corpus with a known utility, in the hub's schema.

A post is a telegram of events, a word each, some of which matter more than others (a fire more than a picnic). A
summary names some of the events, perhaps with a slip or twice. Utility is the importance of the events named, minus
what is invented or repeated. Simulated annotators compare two summaries with Bradley-Terry noise and a mild taste for
length.

Everything is drawn from one seed with a private generator, so the same config gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from lm.base.files import write_jsonl
from lm.config import WorldConfig
from lm.data.confidence import UNDECIDED

IMPORTANT = "fire flood strike robbery crash outage riot quake war plague".split()
ORDINARY = "wedding storm funeral match harvest protest debate rescue sale vote".split()
TRIVIAL = "picnic fair lecture banquet feast play dance quiz party nap".split()
WORTH = {**dict.fromkeys(IMPORTANT, 1.0), **dict.fromkeys(ORDINARY, 0.3), **dict.fromkeys(TRIVIAL, -0.1)}
"""What naming an event of the post adds to a summary's utility."""
EVENTS = tuple(WORTH)
INVENTED, REPEATED = -1.0, -0.5
"""What a word that is no event of the post adds, and each repetition of a word."""


@dataclass(frozen=True)
class Writer:
    """A summary-writing policy: the chances of its habits."""

    name: str
    covers: tuple[float, float, float]
    """Chance of naming an important, an ordinary, a trivial event."""
    invents: float
    repeats: float


REFERENCE = Writer("ref", covers=(0.75, 0.5, 0.3), invents=0.04, repeats=0.03)
"""Who writes the summaries that pi_ref learns from: decent, with room above."""

WRITERS = (
    REFERENCE,
    Writer("careful", covers=(0.95, 0.7, 0.1), invents=0.02, repeats=0.0),
    Writer("terse", covers=(0.6, 0.15, 0.05), invents=0.02, repeats=0.0),
    Writer("verbose", covers=(0.95, 0.9, 0.8), invents=0.1, repeats=0.1),
    Writer("sloppy", covers=(0.6, 0.6, 0.6), invents=0.3, repeats=0.2),
)


def events_of(post: str) -> tuple[str, ...]:
    """The events of a post, in order; ValueError where the text is not a post of this world."""
    events = tuple(post.split())
    if not events or not set(events) <= WORTH.keys():
        raise ValueError(f"not a post of the embedded world: {post!r}")
    return events


def utility(post: str, summary: str) -> float:
    """True utility of a summary of a post: see WORTH, INVENTED and REPEATED."""
    events, words = set(events_of(post)), summary.split()
    named = sorted(set(words))  # a sum of floats depends on its order
    return sum(WORTH[word] if word in events else INVENTED for word in named) + REPEATED * (len(words) - len(named))


@dataclass(frozen=True)
class Taste:
    """What a judge of this world finds a summary worth."""

    utility: float
    """Of a unit of true utility."""
    length_preference: float
    """Of one more word."""

    def __call__(self, post: str, summary: str) -> float:
        return self.utility * utility(post, summary) + self.length_preference * len(summary.split())


def post_of(prompt: str, template: str) -> str:
    """The post in a prompt that was written by the template (`lm.config.DataConfig.prompt_template`)."""
    before, after = template.split("{post}")
    return prompt.removeprefix(before.format(subreddit="town", title="news")).removesuffix(after)


def generate(config: WorldConfig, seed: int, folder: Path) -> None:
    """Writes `comparisons.jsonl` and `sft.jsonl`, in the schemas of openai/summarize_from_feedback (comparisons) and of
    the filtered TL;DR set, into the folder."""
    rng = np.random.default_rng([seed, 0x0DD])
    comparisons: list[dict[str, Any]] = []
    references: list[dict[str, Any]] = []
    low, high = config.min_events, config.max_events
    for index in range(config.posts):
        events = tuple(str(e) for e in rng.choice(EVENTS, rng.integers(low, high + 1), replace=False))
        info = {"id": f"w{index}", "subreddit": "town", "title": "news", "post": "".join(f" {e}" for e in events)}
        references.append({**info, "summary": _write(rng, REFERENCE, events)})
        for _ in range(config.pairs_per_post):
            pair = _draw_pair(rng, events)
            if pair is not None:
                comparisons.append(_judge(rng, config, info, pair))
    write_jsonl(folder / "comparisons.jsonl", comparisons)
    write_jsonl(folder / "sft.jsonl", references)


def _write(rng: np.random.Generator, writer: Writer, events: Sequence[str]) -> str:
    kinds = (IMPORTANT, ORDINARY, TRIVIAL)
    chance = {event: cover for kind, cover in zip(kinds, writer.covers, strict=True) for event in kind}
    named: list[str] = []
    for event in events:
        if rng.random() < chance[event]:
            named.append(str(rng.choice(EVENTS)) if rng.random() < writer.invents else event)
            if rng.random() < writer.repeats:
                named.append(named[-1])
    return "".join(f" {event}" for event in named or [max(events, key=WORTH.__getitem__)])


def _draw_pair(rng: np.random.Generator, events: Sequence[str]) -> list[tuple[Writer, str]] | None:
    for _ in range(10):
        writers = [WRITERS[i] for i in rng.choice(len(WRITERS), 2, replace=False)]
        pair = [(writer, _write(rng, writer, events)) for writer in writers]
        if pair[0][1] != pair[1][1]:
            return pair
    return None


def _judge(
    rng: np.random.Generator, config: WorldConfig, info: dict[str, str], pair: Sequence[tuple[Writer, str]]
) -> dict[str, Any]:
    """One annotator's comparison, in the hub's schema."""
    taste = Taste(1.0, config.length_preference)
    first, second = (config.annotator_sharpness * taste(info["post"], text) for _, text in pair)
    first_preferred = float(expit(first - second))  # which no sharpness overflows
    choice = int(rng.random() >= first_preferred)
    # As released: 1 (surely) to 4 go with the first as the better one, 6 to 9 (surely) with the second, 5 never occurs.
    sure = max(1, round(abs(8 * first_preferred - 4)))
    confidence = UNDECIDED + (sure if choice else -sure)
    return {
        "info": info,
        "summaries": [{"text": text, "policy": writer.name, "note": None} for writer, text in pair],
        "choice": choice,
        "worker": f"annotator{int(rng.integers(8))}",
        "batch": "world",
        "split": "train",
        "extra": {"confidence": confidence},
    }
