"""Policies' completions paired up prompt by prompt, and how often each wins."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from figures.record import read
from lm.base.files import inside, read_jsonl
from lm.config import SFT, EvaluationConfig
from lm.data.messages import is_messages, plain, side
from lm.data.rows import like, shown
from lm.judging.llm import LLMJudge, Log, Pair, outcome
from lm.judging.statistics import SIGNS, bootstrap_interval, compare

BASELINE = "dpo"


# ---------------------------------------------------------------- comparisons


class Comparison(NamedTuple):
    """Two policies, and of each prompt their rows of samples.jsonl."""

    policy: str
    against: str
    rows: list[tuple[dict[str, Any], dict[str, Any]]]


def read_samples(path: Path, *columns: str) -> dict[str, dict[str, Any]]:
    """Rows of a samples.jsonl by their prompt: by its messages where there are some, as models write them differently.

    Raises ValueError, with the line, for a row that lacks a column, or a prompt that comes twice; and for no rows.
    """
    rows: dict[str, dict[str, Any]] = {}
    for number, row in read_jsonl(path):
        absent = [name for name in ("prompt", *columns) if row.get(name) is None]
        if absent:
            close = [found[0] for name in absent if (found := like(name, row))]
            hint = f"; is {close[0]!r} meant to be it?" if close else ""
            raise ValueError(f"{path}, line {number}: no {' and no '.join(absent)}{hint}")
        where = f"{path}, line {number}"
        given = next((name for name in ("messages", "prompt") if is_messages(row.get(name))), None)
        if given is not None:
            row = {**row, "messages": side(row, given, where)}
        prompt = row["prompt"] if given is None else json.dumps(row["messages"], sort_keys=True, default=str)
        if not isinstance(prompt, str):
            raise ValueError(f"{where}: 'prompt' must be text or messages, got {shown(prompt)}")
        if prompt in rows:
            raise ValueError(f"{where}: its prompt has come before; one completion a prompt is compared")
        rows[prompt] = row
    if not rows:
        raise ValueError(f"{path} has no samples")
    return rows


def pair_up(policy: str, against: str, ours: Path, theirs: Path, count: int | None, *columns: str) -> Comparison:
    """The comparison of two samples.jsonl, on all prompts or on the first `count`.

    Raises ValueError where they are not of the same prompts, or there are fewer than `count`.
    """
    one, other = read_samples(ours, *columns), read_samples(theirs, *columns)
    if one.keys() != other.keys():
        raise ValueError(
            f"{ours} and {theirs} must be of the same prompts: {len(one.keys() - other.keys())} are only in the first, "
            f"{len(other.keys() - one.keys())} only in the second"
        )
    if count is not None and count > len(one):
        raise ValueError(f"prompts is {count}, but {ours} has only {len(one)}")
    return Comparison(policy, against, [(one[prompt], other[prompt]) for prompt in list(one)[:count]])


def comparisons_of(run: Path, count: int | None, *columns: str) -> list[Comparison]:
    """Every method of a run against pi_ref, then against DPO where the run has it.

    Raises as `figures.record.read` where the folder has no results.json that is whole, and as `pair_up`.
    """
    results = read(run / "results.json")
    samples = {name: inside(run, row.samples) for name, row in results.methods.items()}
    samples[SFT] = inside(run, results.sft.samples)
    opponents = [SFT, *([BASELINE] if BASELINE in results.methods else [])]
    return [
        pair_up(name, other, samples[name], samples[other], count, *columns)
        for other in opponents
        for name in results.methods
        if name != other
    ]


def by_oracle(comparison: Comparison) -> np.ndarray:
    """Outcomes by the oracle's rewards, [N]."""
    ours, theirs = ([row["oracle_reward"] for row in rows] for rows in zip(*comparison.rows, strict=True))
    return compare(np.array(ours), np.array(theirs))


def by_llm(judge: LLMJudge, comparisons: Sequence[Comparison], log: Log) -> list[tuple[np.ndarray, dict[str, int]]]:
    """Outcomes by an LLM, [n], and what became of the N prompts of each comparison.

    Equal completions are ties, and not asked about. Counts: equal; disagreed (other verdicts in the two orders, also
    ties); malformed (no verdict in one order or both: left out of the outcomes).
    """
    asked = [
        [
            (Pair(prompt, a, b), Pair(prompt, b, a)) if a != b else None
            for one, other in comparison.rows
            for prompt, a, b in [(_asked(one), one["completion"], other["completion"])]
        ]
        for comparison in comparisons
    ]
    pairs = [pair for both in itertools.chain(*asked) if both for pair in both]
    verdicts = dict(zip(pairs, judge.verdicts(pairs, log), strict=True))
    results = []
    for questions in asked:
        replies = [(verdicts[both[0]], verdicts[both[1]]) for both in questions if both]
        outcomes = [outcome(*both) for both in replies]
        counts = {
            "equal": questions.count(None),
            "disagreed": sum(
                result == 0 and both != ("TIE", "TIE") for result, both in zip(outcomes, replies, strict=True)
            ),
            "malformed": outcomes.count(None),
        }
        judged = [0] * counts["equal"] + [result for result in outcomes if result is not None]
        results.append((np.array(judged), counts))
    return results


def _asked(row: dict[str, Any]) -> str:
    """What a reader is told that the policies were asked: the dialogue, where a chat template wrote the prompt."""
    return plain(row["messages"]).strip() if row.get("messages") else str(row["prompt"])


def rates(outcomes: np.ndarray, shown: EvaluationConfig, seed: int) -> dict[str, Any]:
    """Shares of wins, ties and losses among outcomes +1, 0, -1, [n], with bootstrap intervals over prompts.

    Everything but n is None where nothing was judged.
    """
    if not len(outcomes):
        return {**dict.fromkeys(SIGNS), "n": 0, "ci": None}
    won = {name: (outcomes == sign).astype(float) for name, sign in SIGNS.items()}
    return {
        **{name: float(values.mean()) for name, values in won.items()},
        "n": len(outcomes),
        "ci": {
            name: bootstrap_interval(values, shown.confidence, shown.resamples, seed) for name, values in won.items()
        },
    }
