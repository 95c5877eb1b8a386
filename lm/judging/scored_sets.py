"""Rewards for any preference set, by any sequence-classification models and by an LLM judge.

    python -m lm.score --data DATA --reward-model A [B ...] [--judge-model NAME ...] [--reference M ...] --out FILE

FILE has the set's rows as they are, and beside them `chosen_reward_A` and `rejected_reward_A` for each model, and what
`data.rewards given` distils, in the columns of `lm.data.rewards`. One model alone gives the one reward; several are the
members of an ensemble. Of our own, which the folders name, `rho` is the one reward whatever stands beside it, and never
a member; so the `rho`s of two runs are refused, while their members may stand together. Rewards are the models' own
numbers, each on its own scale. With --reference, the file has besides what methods need of pi_ref: token ids,
log-probs, and samples (`lm.judging.reference`). All columns are those of `lm.data.scored`.

What a model reads. With a chat template, the conversation as the template writes it, nothing added. Without one, prompt
and completion, tokenised apart and joined, then end-of-text; messages among them as `role: content`, a blank line
before each; a tokenizer with a separator (BERT's) gets prompt and completion as its two segments. A model that
`lm.reward` trained gets what it was trained on. What is longer than the model's positions loses its beginning, as the
reward is read at the end; how much that was is said.

The LLM sees each pair in both orders. A side's reward is half the log-odds of winning, +-1/2 log((w + 1/2) / (2 - w +
1/2)) for w of the two comparisons won, ties as half of one: the Bradley-Terry margin, in nats, with a half added to
both counts so that two of two stay finite (Haldane 1956). A grade from one to ten would need no other order, but is on
a scale of its own, which no beta is known for. Pairs without a verdict are left out and counted.

A run that broke goes on where it was: finished parts stand in FILE.parts until the file is whole, replies in
FILE.judge.jsonl. Several ranks (torchrun) share the work out.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

from lm.base import progress, ranks
from lm.base.command import check_free, only_run_in
from lm.config import ReferenceScoring, Scoring
from lm.data import places, rewards, scored, sets, votes
from lm.data.messages import Message, plain, written_out
from lm.data.prompts import ALONE, AUTO, Layout
from lm.data.rows import Row, Tally, Writable, check_suffix, read_rows, write_rows
from lm.data.schemas import any_pair, is_tldr
from lm.data.templates import plain_chat
from lm.data.tokens import FORM
from lm.judging.llm import LLMJudge, Log, Pair, shares_won
from lm.judging.reference import LEFT_OUT, Reference, check_reference
from lm.judging.reward_models import Origin, Placed, RewardModel, _kept, origin
from lm.logprobs.draws import FORM as DRAWS
from lm.models.loading import check_reward_model
from lm.models.opening import device_named
from lm.objectives import MAIN
from theory.records import write_json

SHARD = 2048
"""Pairs that are scored between two savings."""


def comparisons(
    path: str, subset: str | None, left_out: Tally | None = None, layout: Layout = ALONE
) -> Iterator[Placed]:
    """The rows of a set that are comparisons, their labels as of `lm.data.votes`; counts the others by reason, and says
    what is odd about the labels.

    Raises ValueError or FileNotFoundError as `lm.data.rows.read_rows` and `lm.data.schemas.any_pair` do.
    """
    labels = votes.Reader()
    rows = labels(read_rows(path, subset))
    for _, where, row, _ in sets.comparisons(rows, lambda row, at: any_pair(row, at, plain_chat, layout), left_out):
        yield where, row
    if left_out is not None:
        left_out.take(labels.left_out)
        for line in labels.says():
            progress.say(f"[rewards] {line}")


def in_shards(rows: Iterator[Placed]) -> Iterator[list[Placed]]:
    """SHARD rows at a time."""
    shard: list[Placed] = []
    for row in rows:
        shard.append(row)
        if len(shard) == SHARD:
            yield shard
            shard = []
    if shard:
        yield shard


@dataclass
class Parts:
    """The finished shards of one model, a file each.

    Args:
        folder: where they are.
        number: of the model.
        settings: everything but the rows that decides their rewards.
    """

    folder: Path
    number: int
    settings: dict[str, Any]

    def path(self, shard: int) -> Path:
        """The shard's file."""
        return self.folder / f"{self.number:02}-{shard:06}.json"

    def key(self, rows: Sequence[Placed]) -> str:
        """Digest of the settings and the rows."""
        content = json.dumps([self.settings, [row for _, row in rows]], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    def read(self, shard: int, rows: Sequence[Placed]) -> dict[str, Any] | None:
        """The shard's record; None where there is none of these rows and settings."""
        try:
            record: dict[str, Any] = json.loads(self.path(shard).read_text(encoding="utf-8"))
            return record if record["key"] == self.key(rows) else None
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or not whole: it is computed again
            return None

    def write(self, shard: int, rows: Sequence[Placed], values: Tensor, cut: int) -> None:
        """Rewards, [2N], as of `RewardModel.rewards`."""
        chosen, rejected = values.reshape(2, -1).tolist()
        self.keep(shard, rows, {"chosen": chosen, "rejected": rejected, "cut": cut})

    def keep(self, shard: int, rows: Sequence[Placed], record: dict[str, Any]) -> None:
        """A shard's record."""
        write_json(self.path(shard), {"key": self.key(rows), **record})


def identity(spec: str) -> Any:
    """What tells a model from another one of the same name: the hub's commit, or a folder's files by size and time."""
    folder = Path(spec)
    if not folder.is_dir():
        return getattr(AutoConfig.from_pretrained(spec), "_commit_hash", None)
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def column_names(specs: Sequence[str]) -> list[str]:
    """What each model is called in the columns: the last part of its name, all of it where that is not its alone."""
    short = [spec.rstrip("/").rpartition("/")[2] for spec in specs]
    names = [one if short.count(one) == 1 else spec for one, spec in zip(short, specs, strict=True)]
    if len({os.path.realpath(spec) if Path(spec).exists() else spec for spec in specs}) < len(specs):
        raise ValueError(f"--reward-model and --judge-model name one model twice: {', '.join(specs)}")
    return names


def told_apart(specs: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The models that give rewards, and why others that were named do not.

    Raises:
        ValueError: one is a run's, but no reward model; two are one model of one run, tried again; two are the one
            reward, of a run each; or none is left.
    """
    of_run = {spec: known for spec in specs if (known := origin(spec)) is not None}
    for spec, known in of_run.items():
        if known.stage not in ("reward", "oracle"):
            raise ValueError(
                f"--reward-model {spec!r}: a reward model is needed, it is a run's {known.stage}/{known.name}; name a "
                "folder of the run's reward/ or oracle/"
            )
    left = {
        spec: f"it is the oracle of {known.name}'s own, whose rewards only its run reads"
        for spec, known in of_run.items()
        if known.own_oracle
    }
    if specs and len(left) == len(specs):
        raise ValueError(f"--reward-model {specs[0]!r}: {left[specs[0]]}; name one of the run's other reward models")
    tries: dict[tuple[Path, str, str], list[tuple[Origin, str]]] = {}
    for spec, known in of_run.items():
        if spec not in left:
            run = Path(spec).resolve().parents[1]
            tries.setdefault((run, known.stage, known.name), []).append((known, spec))
    if twice := {key: sorted(found, key=lambda one: one[0].made) for key, found in tries.items() if len(found) > 1}:
        told = (
            f"{name!r} is there {len(found)} times, {', '.join(spec for _, spec in found)}, of which the last is the "
            "newest"
            for (_, _, name), found in twice.items()
        )
        raise ValueError(f"--reward-model: {'; '.join(told)}; name one folder of each")
    if len(mains := [spec for spec in of_run if spec not in left and _is_main(of_run[spec])]) > 1:
        raise ValueError(
            f"--reward-model: {', '.join(mains)} are each a run's {MAIN!r}, the one reward and never a member; name "
            "one of them"
        )
    return [spec for spec in specs if spec not in left], left


def one_reward(specs: Sequence[str], judges: int) -> int | None:
    """Which of the models, and the judge after them, gives the one reward: one that is alone, or our own MAIN."""
    if len(specs) + judges == 1:
        return 0
    own = [origin(spec) for spec in specs]
    return next((i for i, known in enumerate(own) if known and _is_main(known)), None)


def _is_main(known: Origin) -> bool:
    return (known.stage, known.name) == ("reward", MAIN)


@dataclass
class Summary:
    """What `score_set` did."""

    pairs: int = 0
    """Rows in the file."""
    left_out: Tally = field(default_factory=Tally)
    """Rows that are not, by reason."""
    notes: list[str] = field(default_factory=list)
    """What is said of how the set was read."""
    removed: set[str] = field(default_factory=set)
    """Columns with other rewards, which would be read as well."""
    replaced: set[str] = field(default_factory=set)
    """Columns of another pi_ref, which --reference writes anew."""
    reference: str | None = None
    """pi_ref, where it was asked for."""
    unused: dict[str, str] = field(default_factory=dict)
    """Models that were named and give no rewards, and why."""
    one: str | None = None
    """Which model gives the one reward; None where that is the members' mean."""
    members: list[str] = field(default_factory=list)
    """Of the ensemble, in the order of the lists."""
    agree: Counter[str] = field(default_factory=Counter)
    """Of each model, pairs whose chosen completion has the larger reward."""
    ties: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    """Of each model, texts that were too long for it."""


def score_set(
    path: str,
    out: Path,
    specs: Sequence[str],
    scoring: Scoring,
    *,
    subset: str | None = None,
    judge: LLMJudge | None = None,
    prompt: str = AUTO,
    force: bool = False,
    reference: ReferenceScoring | None = None,
) -> Summary:
    """Writes the set with rewards to `out`, see the top of this file. All ranks call this, the first one writes.

    Args:
        path: a set in any schema, as of `lm.data.rows.read_rows`. It is read several times and never held, but for a
            judge's questions.
        out: .jsonl, .jsonl.gz or .parquet file, which must not be there yet, unless by `force`.
        specs: reward models, hub names or local folders.
        scoring: how they are run.
        subset: as of `lm.data.rows.read_rows`.
        judge: an LLM, the last of the ensemble.
        prompt: as of `lm.config.DataConfig.prompt`.
        force: overwrite `out`.
        reference: pi_ref, and what it adds; alone, it leaves the rewards as they are.

    Raises:
        ValueError: an unfit model, file or row, or no comparison among the rows.
        FileNotFoundError: no such data.
        FloatingPointError: a reward is not finite.
        EndpointError: the judge's endpoint failed for good.
        MalformedReplies: it gives no verdicts. Rewards by models are kept for the next try, as after any error.
    """
    check_free("--out", out, force=force)
    check_suffix(out)
    if force and out.exists() and Path(path).exists() and out.samefile(path):
        raise ValueError(f"--out {out} is the data itself; name another file")
    places.check(path)
    reference = reference or ReferenceScoring()
    if not specs and judge is None and reference.model is None:
        raise ValueError("name a model by --reward-model or --judge-model, or pi_ref by --reference")
    check_reference(reference)
    specs, unused = told_apart(specs)
    names = column_names([*specs, *([judge.model] if judge else [])])
    for spec in specs:
        check_reward_model(spec, False, option="--reward-model")
    main = one_reward(specs, int(judge is not None))
    others = [name for i, name in enumerate(names) if i != main]
    summary = Summary(
        unused=unused,
        reference=reference.model,
        one=None if main is None else names[main],
        members=others if len(others) > 1 else [],
    )
    anew = {*(rewards.EVERY if names else ()), *(scored.REFERENCE if reference.model is not None else ())}
    of_set = sets.survey(votes.Reader()(read_rows(path, subset)), path, prompt)
    layout, summary.notes = of_set.layout, of_set.notes
    writable = Writable(out)  # not to learn it when everything is scored
    for where, row in comparisons(path, subset, summary.left_out, layout):
        writable.check(_staying(row, where, anew))
    writable.settle()
    if not (total := writable.rows):
        raise ValueError(f"{path}: no row is a comparison, left out were {dict(summary.left_out) or 'none'}")
    folder = out.with_name(f"{out.name}.parts")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    how = {
        **vars(scoring),
        **({} if layout == ALONE else {"layout": asdict(layout)}),
        "device": device_named(scoring.device).type,
        "shard": SHARD,
        "form": FORM,
        **versions,
    }
    with only_run_in(folder):
        spelled = [os.path.realpath(spec) if Path(spec).exists() else spec for spec in specs]
        parts = [Parts(folder, i, {"model": identity(spec), "spec": spec, **how}) for i, spec in enumerate(spelled)]
        for name, spec, own in zip(names, specs, parts, strict=False):
            shards = in_shards(comparisons(path, subset, layout=layout))
            _score_shards(own, spec, scoring, layout, shards, f"{name}, {total:,} pairs")
        of_reference = None
        if reference.model is not None:
            settings = {"model": identity(reference.model), "reference": asdict(reference), "draws": DRAWS, **how}
            of_reference = Parts(folder, len(specs), settings)
            shards = in_shards(comparisons(path, subset, layout=layout))
            _refer_shards(of_reference, reference, scoring, layout, shards, f"{reference.model}, {total:,} pairs")
        shares = None
        if judge:
            rows = comparisons(path, subset, layout=layout)
            shares = ranks.from_first(lambda: _judged(judge, rows, layout, out))
        if ranks.is_first():
            shards = in_shards(comparisons(path, subset, layout=layout))
            write_rows(out, _scored(path, shards, names, parts, shares, of_reference, anew, summary))
            shutil.rmtree(folder)
        ranks.wait()
    return summary


def _score_shards(
    parts: Parts, spec: str, scoring: Scoring, layout: Layout, shards: Iterator[list[Placed]], what: str
) -> None:
    """Scores what is not there yet."""
    model: RewardModel | None = None
    for number, rows in enumerate(shards):
        if ranks.from_first(lambda number=number, rows=rows: parts.read(number, rows) is not None):  # type: ignore[misc]
            continue
        if model is None:
            progress.say(f"[rewards] {what}{f', going on at {number * SHARD:,}' if number else ''}")
            model = RewardModel(spec, scoring, layout)
        values, cut = model.rewards(rows, f"{what}, from {number * SHARD:,}")
        if ranks.is_first():
            parts.write(number, rows, values, cut)
    if model is not None and ranks.is_first():
        for line in model.names.notes():
            progress.say(f"[rewards] {what}: {line}")


def _refer_shards(
    parts: Parts,
    reference: ReferenceScoring,
    scoring: Scoring,
    layout: Layout,
    shards: Iterator[list[Placed]],
    what: str,
) -> None:
    """Likewise by pi_ref."""
    model: Reference | None = None
    for number, rows in enumerate(shards):
        if ranks.from_first(lambda number=number, rows=rows: parts.read(number, rows) is not None):  # type: ignore[misc]
            continue
        if model is None:
            progress.say(f"[reference] {what}{f', going on at {number * SHARD:,}' if number else ''}")
            model = Reference(reference, scoring, layout)
        columns = model.columns(rows, f"{what}, from {number * SHARD:,}", number)
        if ranks.is_first():
            parts.keep(number, rows, columns)
    if model is not None and ranks.is_first():
        for line in model.names.notes():
            progress.say(f"[reference] {what}: {line}")


def _read_aloud(
    messages: Sequence[Message], reply: Message, where: str, tools: list[Any] | None = None
) -> tuple[str, str]:
    """A conversation for an LLM that judges; a `lm.data.templates.Renderer`."""
    return f"{plain(messages, tools)}\n\n{reply['role']}:", f" {written_out(reply)}"


def _judged(judge: LLMJudge, rows: Iterator[Placed], layout: Layout, out: Path) -> list[float | None]:
    """For each row, the share of its comparisons that the chosen side wins."""
    pairs = [_kept(any_pair(row, where, _read_aloud, layout), where) for where, row in rows]
    questions = [Pair(pair["prompt"].strip(), pair["chosen"].strip(), pair["rejected"].strip()) for pair in pairs]
    with Log(judge_log(out)) as log:
        return shares_won(judge, questions, log)


def judge_log(out: Path) -> Path:
    """Where an LLM's replies are kept."""
    return out.with_name(f"{out.name}.judge.jsonl")


def judge_reward(share: float) -> float:
    """The reward of a side that wins this share of its two comparisons, nats; minus that of the other side."""
    won = 2 * share
    return 0.5 * math.log((won + 0.5) / (2 - won + 0.5))


def _scored(
    path: str,
    shards: Iterator[list[Placed]],
    names: Sequence[str],
    parts: Sequence[Parts],
    shares: Sequence[float | None] | None,
    of_reference: Parts | None,
    anew: Collection[str],
    summary: Summary,
) -> Iterator[Row]:
    """The set's rows with their rewards; fills the summary."""
    number = 0
    for shard, rows in enumerate(shards):
        records = [one.read(shard, rows) for one in parts]
        known = {LEFT_OUT: [None] * len(rows)} if of_reference is None else of_reference.read(shard, rows)
        if None in records or known is None:
            raise ValueError(f"{path} has changed while it was scored; start again")
        for name, record in zip(names, records, strict=False):
            summary.cut[name] += record["cut"]  # type: ignore[index]
        for i, (where, row) in enumerate(rows):
            values = [(record["chosen"][i], record["rejected"][i]) for record in records]  # type: ignore[index]
            if shares is not None:
                share = shares[number]
                number += 1
                if share is None:
                    summary.left_out.add("no verdict of the judge", where)
                    continue
                values.append((judge_reward(share), judge_reward(1 - share)))
            if (why := known[LEFT_OUT][i]) is not None:
                summary.left_out.add(why, where)
                continue
            summary.pairs += 1
            for name, (chosen, rejected) in zip(names, values, strict=True):
                summary.agree[name] += chosen > rejected
                summary.ties[name] += chosen == rejected
            summary.removed |= row.keys() & set(rewards.EVERY) & set(anew)
            summary.replaced |= row.keys() & set(scored.REFERENCE) & set(anew)
            yield {
                **_staying(row, where, anew),
                **_columns(dict(zip(names, values, strict=True)), summary),
                **{name: column[i] for name, column in known.items() if name in scored.REFERENCE},
            }
    if not summary.pairs:
        raise ValueError(f"{path}: no row is left, left out were {dict(summary.left_out)}")


def _staying(row: Row, where: str, anew: Collection[str]) -> Row:
    """What of a row is written beside what is found out: all but columns `anew`, or the texts of the schema with
    posts."""
    own = _kept(any_pair(row, where), where) if is_tldr(row) else row
    return {name: value for name, value in own.items() if name not in anew}


def _columns(of_model: dict[str, tuple[float, float]], summary: Summary) -> Row:
    """Rewards of a row, chosen and rejected by each model, as its columns."""
    row: Row = {}
    for name, both in of_model.items():
        row |= zip(rewards.of_model(name), both, strict=True)
    if summary.one is not None:
        row |= zip(rewards.ONE, of_model[summary.one], strict=True)
    if summary.members:
        listed = zip(*(of_model[name] for name in summary.members), strict=True)
        row |= zip(rewards.MEMBERS, map(list, listed), strict=True)
    return row
