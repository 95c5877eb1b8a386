"""Every causal architecture of transformers, small and random, through our routes: is one wrong without a word?

The reference is independent of `lm.logprobs`, see `lm.studies.parity`. Of each architecture it is also told how far
log-probs move when the end of the prompt is another one: a difference that is found would otherwise say nothing.
"""

from __future__ import annotations

import math
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from lm.base import progress
from lm.logprobs.completions import CompletionModel, collate
from lm.models import checks, noise
from lm.models.heads import without_weights
from lm.studies.architectures import TYPES, VOCABULARY, build, of_type
from lm.studies.bench import put_between_marks
from lm.studies.model_check import quiet_routes
from lm.studies.parity import Difference, Example, difference, examples, plain_logps, values
from theory.records import provenance, table, write_json

SECONDS = 60
"""That one architecture may take."""
PROMPT = 24
"""Tokens of the longest prompt: several windows."""
PACKED, PADDED, REFUSED, NOT_BUILT, WRONG = "packed", "padded", "refused", "not built", "WRONG"


@dataclass(frozen=True)
class Row:
    """What was found of one architecture."""

    type: str
    name: str
    """Of its class."""
    outcome: str
    """The route whose numbers are those of the plain forward, or `refused` (with a message, before anything is
    computed), `not built` (here, from a small config), or `WRONG`: other numbers, or a traceback."""
    why: str
    """It is not packed."""
    difference: float | None
    """Largest, from the plain forward of a row alone; nats."""
    limit: float | None
    """What rounding explains, nats."""
    control: float | None
    """Nats that the log-probs move by when a prompt ends otherwise."""
    head: str
    """Of a reward model: `transformers'`, `ours`, or none."""


def survey_of(types: Iterable[str] = TYPES) -> list[Row]:
    """A row for each of these architectures."""
    chosen = list(types)
    with progress.bar("architectures", total=len(chosen)) as bar, quiet_routes():
        rows = []
        for name in chosen:
            rows.append(row_of(name))
            bar.update(1)
    return rows


def row_of(model_type: str) -> Row:
    """The row of one architecture."""
    try:
        with _limited(SECONDS):
            model = build(of_type(model_type))
    except Exception as error:  # whatever a config that was shrunk by rules makes of its class
        return Row(model_type, "", NOT_BUILT, _line(error), None, None, None, "")
    noise.turn_off(model)
    name, head = type(model).__name__, _head(model.config)

    def row(outcome: str, why: str, off: Difference | None = None, moved: float | None = None) -> Row:
        value, limit = (None, None) if off is None else (off.value, off.limit)
        return Row(model_type, name, outcome, why, value, limit, moved, head)

    causal = checks.causal(model)
    if not causal.ok:
        return row(REFUSED, causal.advice)
    tokens = range(3, VOCABULARY)
    tried = [examples(tokens, 1, completions=count, prompt=PROMPT, seed=count) for count in (1, 3)]
    try:
        with _limited(SECONDS), torch.no_grad():
            references = [plain_logps(model, each) for each in tried]
            moved = difference(plain_logps(model, _ending_otherwise(tried[1])), references[1], tried[1])
            ours = CompletionModel(model)
            batch = collate([prompt for prompt, _ in tried[1]], [own for _, own in tried[1]])
            route = ours.settle(batch["input_ids"], batch["lengths"])
            found = [
                difference(values(ours, each, route), right, each)
                for each, right in zip(tried, references, strict=True)
            ]
    except (ValueError, TimeoutError) as error:
        return row(REFUSED, _line(error))
    except Exception as error:  # to be refused by a message, and not by a traceback
        return row(WRONG, _line(error))
    worst = max(found, key=lambda each: each.value / each.limit if each.value == each.value else float("inf"))
    outcome = route if all(each.ok for each in found) else WRONG
    return row(outcome, ours.reason or "", worst, moved.value)


def _ending_otherwise(examples: Sequence[Example]) -> list[Example]:
    """The same, but for the last two tokens of each prompt."""
    return [([*p[:-2], *((t + 7) % (VOCABULARY - 3) + 3 for t in p[-2:])], own) for p, own in examples]


def _head(config: PretrainedConfig) -> str:
    stock = type(config) in AutoModelForSequenceClassification._model_mapping
    try:
        without_weights(config)
    except Exception as error:  # of the class, which may lack a head that reads one state
        return f"none: {_short_of(_line(error), 70)}"
    return "transformers'" if stock else "ours"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """TimeoutError after so many seconds, in the main thread."""

    def end(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------- the table


def counted(rows: Sequence[Row]) -> str:
    """How many of each outcome, in a sentence."""
    counts = Counter(row.outcome for row in rows)
    said = ", ".join(f"{counts[name]} {name}" for name in (PACKED, PADDED, REFUSED, NOT_BUILT, WRONG))
    return f"{len(rows)} architectures: {said}"


def markdown(rows: Sequence[Row]) -> str:
    """The table of those that were built, and the others below it."""
    lines = [
        (row.type, row.name, row.outcome, _off(row), row.head, _short(row)) for row in rows if row.outcome != NOT_BUILT
    ]
    header = ("type", "class", "route", "nats off", "reward head", "why not packed")
    made = table(header, lines, numbers=False, padded=False)
    others = "\n".join(f"- `{row.type}`: {_short(row)}" for row in rows if row.outcome == NOT_BUILT)
    return f"{counted(rows)}.\n\n{made}\n\nNot built from a small config here:\n\n{others or 'none'}"


def _finite(value: float | None) -> float | str | None:
    return str(value) if value is not None and not math.isfinite(value) else value


def _off(row: Row) -> str:
    return "" if row.difference is None else f"{row.difference:.1e}"


def _short(row: Row, most: int = 130) -> str:
    return _short_of(row.why, most)


def _short_of(text: str, most: int) -> str:
    text = text.replace("|", "/").replace("<", "").replace(">", "")
    return text if len(text) <= most else f"{text[: most - 3]}..."


def survey(page: Path | None, json: Path | None) -> int:
    """The command: measures, writes, prints; the exit status, 1 where one is wrong."""
    if page:
        put_between_marks(page, "A run is in progress.", "lm.check")
    rows = survey_of()
    source = provenance(0, ("torch", "transformers"))
    if json:
        write_json(json, {**source, "rows": [asdict(row) | {"difference": _finite(row.difference)} for row in rows]})
    if page:
        versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
        said = f"`python -m lm.check --architectures --markdown {page}`, {source['date'][:10]}, {versions}"
        put_between_marks(page, f"{said}.\n\n{markdown(rows)}", "lm.check")
    tell = partial(Console().print, highlight=False, markup=False, soft_wrap=True)
    for row in rows:
        tell(f"{row.type:28} {row.outcome:9} {_off(row):8} {_short(row, 90)}")
    tell(counted(rows))
    return int(any(row.outcome == WRONG for row in rows))
