"""What the data side costs as sets grow: every stage on made pairs, in a process of its own, with TRL's preparation of
the same rows beside.

    python -m lm.bench --scale [PAIRS ...] [--json FILE]

Pairs are made text of TL;DR's lengths, with confidences and rewards of three members, in a tokenizer of their own.
Forward passes are left out: a stand-in scores, and draws samples, so that what is measured is reading, tokenising,
sorting, batching and writing.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import signal
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from lm.base import progress
from lm.data import rewards as rewards_of
from lm.studies.bench_plan import TLDR, trl_installed
from lm.studies.scale_plan import STAGES, Job, Measured
from theory.records import replacing, table

WORDS, MEMBERS, CHUNK = 6000, 3, 10_000


# ---------------------------------------------------------------- made text


def make_text(path: Path, pairs: int, seed: int = 0) -> None:
    """So many pairs as JSON lines: words by Zipf's law, lengths as `TLDR` has them, a token a word or so."""
    rng = np.random.default_rng(seed)
    syllables = ["".join(both) for both in itertools.product("bdfgklmnprst", "aeiou")]
    words = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(WORDS)]
    share = 1 / np.arange(2, WORDS + 2)
    below = np.cumsum(share / share.sum())

    def rows() -> Iterator[dict[str, Any]]:
        for start in range(0, pairs, CHUNK):
            prompts, completions = TLDR.lengths(min(CHUNK, pairs - start), rng)
            for number, (prompt, sides) in enumerate(zip(prompts.tolist(), completions.tolist(), strict=True), start):
                drawn = np.minimum(np.searchsorted(below, rng.random(prompt + sum(sides))), WORDS - 1).tolist()
                said = [words[i] for i in drawn]
                post, chosen, rejected = said[:prompt], said[prompt : prompt + sides[0]], said[prompt + sides[0] :]
                rewards = rng.normal(size=(2, MEMBERS)).round(4).tolist()
                yield {
                    "prompt": f"POST {number}: {' '.join(post)}\n\nTL;DR:",
                    "chosen": f" {' '.join(chosen)}.",
                    "rejected": f" {' '.join(rejected)}.",
                    "confidence": int(rng.integers(1, 10)),
                    **dict(zip(rewards_of.ONE, (side[0] for side in rewards), strict=True)),
                    **dict(zip(rewards_of.MEMBERS, rewards, strict=True)),
                }

    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in progress.bar("making text", rows(), total=pairs, unit="pair"):
            file.write(json.dumps(row) + "\n")


# ---------------------------------------------------------------- a stage in a process


def _work(job: Job, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: who waits for it ends it
    from lm.studies.scale_workers import work  # torch is for the workers

    work(job, connection)


def measured(job: Job) -> Measured:
    """In a process of its own. RuntimeError where it failed."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(job, there))
    process.start()
    there.close()
    try:
        answer = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{job.stage}: its process died, exit status {process.exitcode}") from None
    except KeyboardInterrupt:
        process.terminate()
        raise
    process.join()
    if not isinstance(answer, Measured):
        raise RuntimeError(f"{job.stage} failed:\n{answer}")
    return answer


def measure(sizes: Sequence[int], folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """A row for each stage and size, in this order, as they come.

    Args:
        sizes: pairs.
        folder: what is made is kept there, and taken from there again; None for a temporary one.
    """
    stages = [stage for stage in STAGES if stage != "trl" or trl_installed()]
    with tempfile.TemporaryDirectory() as temporary:
        root = folder or Path(temporary)
        with progress.bar("scale", total=sum(sizes) * len(stages), unit="pair") as bar:
            for pairs in sizes:
                own = root / str(pairs)
                own.mkdir(parents=True, exist_ok=True)
                if not (own / "pairs.jsonl").exists():
                    make_text(own / "pairs.jsonl", pairs)
                for stage in stages:
                    found = measured(Job(stage, own))
                    row = {"stage": stage, "pairs": pairs, **rates(pairs, found), **vars(found)}
                    progress.say(in_words(row))
                    bar.update(pairs)
                    yield row


def rates(pairs: int, found: Measured) -> dict[str, float]:
    """Pairs a second, by the clock and of a processor."""
    return {"pairs_per_s": pairs / found.seconds, "pairs_per_cpu_s": pairs / found.cpu_seconds}


def in_words(row: dict[str, Any]) -> str:
    """A row as it comes."""
    return (
        f"{row['stage']}, {row['pairs']:,} pairs: {row['pairs_per_s']:,.0f} pairs/s "
        f"({row['pairs_per_cpu_s']:,.0f} a CPU second), peak {row['peak_mb']:,.0f} MB, files {row['file_mb']:,.0f} MB"
    )


# ---------------------------------------------------------------- the tables


def over_trl(rows: Sequence[dict[str, Any]], key: str = "pairs_per_cpu_s") -> dict[int, float]:
    """Pairs -> how many times as fast `prepare` is as TRL's preparation, where both were measured."""
    of = {(row["stage"], row["pairs"]): row[key] for row in rows}
    sizes = dict.fromkeys(row["pairs"] for row in rows)
    return {n: of["prepare", n] / of["trl", n] for n in sizes if ("prepare", n) in of and ("trl", n) in of}


def growth(rows: Sequence[dict[str, Any]], stage: str) -> float | None:
    """Exponent of a stage's CPU seconds in the pairs, by least squares over the logarithms: 1 is linear. None of one
    size."""
    own = [row for row in rows if row["stage"] == stage]
    if len(own) < 2:
        return None
    return statistics.linear_regression(
        np.log([row["pairs"] for row in own]).tolist(), np.log([row["cpu_seconds"] for row in own]).tolist()
    ).slope


def render(document: dict[str, Any]) -> str:
    """The document's tables."""
    rows = document["rows"]
    header = ["pairs", "stage", "pairs/s", "pairs/CPU s", "CPU s", "peak MB", "anonymous MB", "base MB", "files MB"]
    numbers = (
        ("pairs_per_s", ",.0f"),
        ("pairs_per_cpu_s", ",.0f"),
        ("cpu_seconds", ",.1f"),
        *((name, ",.0f") for name in ("peak_mb", "anonymous_mb", "base_mb", "file_mb")),
    )
    cells = [[f"{r['pairs']:,}", r["stage"], *(format(r[name], how) for name, how in numbers)] for r in rows]
    lines = [table(header, cells)]
    for pairs, ratio in over_trl(rows).items():
        lines.append(f"{pairs:,} pairs: prepare is {ratio:.2f} times as fast as TRL's preparation, in CPU seconds.")
    grown = {stage: growth(rows, stage) for stage in dict.fromkeys(row["stage"] for row in rows)}
    if known := [f"{stage} {power:.2f}" for stage, power in grown.items() if power is not None]:
        lines.append(f"CPU seconds grow as the pairs to the power of: {', '.join(known)}.")
    return "\n\n".join(lines)
