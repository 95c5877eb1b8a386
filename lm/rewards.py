"""Rewards for any preference set, by any sequence-classification models and by an LLM judge.

    python -m lm.score --data DATA --reward-model A [B ...] [--judge-model NAME ...] --out FILE

FILE has the set's rows as they are, and beside them `chosen_reward_A` and `rejected_reward_A` for each model, and
`chosen_rewards` and `rejected_rewards`, lists with one reward a model, which `data.rewards given` distils (two or more
are an ensemble). Rewards are the models' own numbers, each on its own scale.

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

import argparse
import hashlib
import json
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from lm import progress, ranks
from lm.artifacts import verify
from lm.cli import argument_parser, as_command, only_run_in, said_once
from lm.config import LogprobsConfig
from lm.data import (
    GIVEN_REWARDS,
    REWARDS,
    Drop,
    Message,
    Renderer,
    Row,
    any_conversation,
    any_pair,
    chat_renderer,
    check_suffix,
    completion_ids,
    is_tldr,
    plain_chat,
    prompt_ids,
    read_rows,
    write_rows,
)
from lm.io import write_json
from lm.judge import TASKS, LLMJudge, Log, Pair, shares_won
from lm.logprobs import CompletionModel, collate
from lm.models import check_reward_model, load_tokenizer
from lm.score import batches, device_named, over_ranks, score_rows

SHARD = 2048
"""Pairs that are scored between two savings."""
DTYPES = ("auto", "float32", "bfloat16", "float64")
Placed = tuple[str, Row]
"""Where a row stands, and the row."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How models are loaded and run.

    Args:
        dtype: of the parameters; "auto" as they are saved.
        device: "auto" (accelerator if there is one), or "cpu".
        batch_tokens: most tokens a forward pass, where one pair has no more.
        max_length: longest text, tokens; None for the model's positions.
    """

    dtype: str = "auto"
    device: str = "auto"
    batch_tokens: int = LogprobsConfig.scoring_tokens
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("batch_tokens", self.batch_tokens, 1), ("max_length", self.max_length, 2)):
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


# ---------------------------------------------------------------- a model


def role_text(messages: Sequence[Message], reply: Message, where: str) -> tuple[str, str]:
    """A conversation for a model without a chat template; a `lm.data.Renderer`."""
    return f"{plain_chat(messages, reply, where)[0]}\n\n{reply['role']}:", f" {reply['content']}"


@dataclass(frozen=True)
class Encoded:
    """Both sides of N pairs as a model's inputs: the chosen, then the rejected, [2N] each."""

    inputs: list[dict[str, list[int]]]
    cut: int
    """How many of them were too long."""


class RewardModel:
    """A sequence-classification model with one label, and its own tokenizer and way to write a conversation.

    Args:
        spec: hub name or local folder.
        scoring: how it is run.

    Raises:
        ValueError: it has no trained head with one label, brings code of its own, has no safetensors weights, or fewer
            positions than `scoring.max_length`.
    """

    def __init__(self, spec: str, scoring: Scoring) -> None:
        self.spec, self.scoring = spec, scoring
        self.tokenizer = load_tokenizer(spec, (), False, needs_end=False)
        self.model = _load(spec, scoring)
        self.is_ours = is_ours(spec)
        own = self.tokenizer
        self.reads_conversations = own.chat_template is not None and not self.is_ours
        self.reads_segments = own.chat_template is None and not self.is_ours and own.sep_token_id is not None
        self.limit = self._limit()
        # A head of this name reads one state of a causal model, so that both sides of a pair can share their beginning.
        self.sharing: CompletionModel | None = None
        if hasattr(self.model, "score") and not self.reads_segments:
            self.sharing = CompletionModel(self.model, options=LogprobsConfig(scoring_tokens=scoring.batch_tokens))

    def _limit(self) -> int | None:
        """Longest input, tokens."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        # A tokenizer knows of positions that are not for tokens (RoBERTa's first two); unset, it says 1e30.
        named = self.tokenizer.model_max_length if self.tokenizer.model_max_length < 10**9 else None
        default = min((n for n in (positions, named) if n is not None), default=None)
        most, asked = default if self.reads_segments else positions, self.scoring.max_length
        if most is not None and asked is not None and asked > most:
            raise ValueError(f"--max-length {asked} must be at most the {most} tokens that {self.spec!r} takes")
        return asked or default

    def rewards(self, rows: Sequence[Placed], what: str) -> tuple[Tensor, int]:
        """Rewards of the chosen, then of the rejected sides, [2N], float64; and how many of them were cut.

        A function of these rows, on one type of device: whatever else is scored, by however many ranks.
        """
        encoded = self._encoded(rows)
        if self.sharing is not None:
            self.sharing.route = None  # to be settled by the longest of these rows
            prompts, completions = self._shared([row["input_ids"] for row in encoded.inputs])
            with self.sharing.stock():
                problem = self._trial(self.sharing, encoded.inputs, prompts, completions)
                if problem is None:
                    return score_rows(self.sharing, prompts, completions, what), encoded.cut
            log.warning("%s is run a row a text, %s", self.spec, problem)
        return self._plain(encoded.inputs, what), encoded.cut

    # ------------------------------------------------------------ what it reads

    def _encoded(self, rows: Sequence[Placed]) -> Encoded:
        if self.reads_conversations:
            texts = [self._templated(*row, side) for side in ("chosen", "rejected") for row in rows]
            ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            return self._cut(ids)
        own_template = self.is_ours and self.tokenizer.chat_template is not None
        render: Renderer = chat_renderer(self.tokenizer, self.spec) if own_template else role_text
        pairs = [_kept(any_pair(row, where, render)) for where, row in rows]
        prompts = [pair["prompt"] for pair in pairs] * 2
        completions = [pair[side] for side in ("chosen", "rejected") for pair in pairs]
        if self.reads_segments:
            return self._segments(prompts, completions)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"--reward-model {self.spec!r}: its tokenizer has neither a chat template, nor a separator, nor an "
                "end-of-text token; it is not known how the model reads a completion"
            )
        both = zip(prompt_ids(self.tokenizer, prompts), completion_ids(self.tokenizer, completions), strict=True)
        return self._cut([[*prompt, *completion] for prompt, completion in both])

    def _templated(self, where: str, row: Row, side: str) -> str:
        conversation = _kept(any_conversation(row, where))
        try:
            text: str = self.tokenizer.apply_chat_template(
                [*conversation.context, getattr(conversation, side)], tokenize=False
            )
        except TemplateError as error:
            raise ValueError(f"{where}: the chat template of {self.spec!r} refuses the messages: {error}") from None
        return text

    def _cut(self, ids: list[list[int]]) -> Encoded:
        limit = self.limit or max(map(len, ids))
        return Encoded([{"input_ids": row[-limit:]} for row in ids], sum(len(row) > limit for row in ids))

    def _segments(self, prompts: list[str], completions: list[str]) -> Encoded:
        self.tokenizer.truncation_side = "left"
        whole = self.tokenizer(prompts, completions)
        cut = sum(len(row) > self.limit for row in whole["input_ids"]) if self.limit else 0
        if cut:
            whole = self.tokenizer(prompts, completions, truncation="longest_first", max_length=self.limit)
        names = [name for name in whole if name != "attention_mask"]
        return Encoded(
            [dict(zip(names, row, strict=True)) for row in zip(*(whole[n] for n in names), strict=True)], cut
        )

    # ------------------------------------------------------------ how it is computed

    def _shared(self, ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        """As prompts and completions: what both sides of a pair begin with, and the rest."""
        pad = self.model.config.get_text_config().pad_token_id
        if not self.is_ours and pad is not None:
            # transformers reads the reward at the last token that is not the padding one, which may be end-of-text.
            ids = [row[: max((i for i, token in enumerate(row, 1) if token != pad), default=1)] for row in ids]
        count = len(ids) // 2
        if short := [i for i, row in enumerate(ids) if len(row) < 2]:
            raise ValueError(f"{self.spec!r}: a text of pair {short[0] % count} has fewer than two tokens to read")
        prompts, completions = [], []
        for one, other in zip(ids, [*ids[count:], *ids[:count]], strict=True):
            most = min(len(one), len(other)) - 1
            size = max(1, next((i for i in range(most) if one[i] != other[i]), most))
            prompts.append(one[:size])
            completions.append(one[size:])
        return prompts, completions

    def _trial(
        self,
        model: CompletionModel,
        inputs: Sequence[dict[str, list[int]]],
        prompts: Sequence[list[int]],
        completions: Sequence[list[int]],
    ) -> str | None:
        """What is wrong with sharing, on the longest pair; None where it gives what transformers gives."""
        count = len(inputs) // 2
        longest = max(range(count), key=lambda i: len(inputs[i]["input_ids"]) + len(inputs[i + count]["input_ids"]))
        rows = [longest, longest + count]
        batch: dict[str, Any] = collate([prompts[row] for row in rows], [[completions[row]] for row in rows])
        if prompts[rows[0]] == prompts[rows[1]]:
            batch = collate([prompts[rows[0]]], [[completions[row] for row in rows]])
        batch["input_ids"] = batch["input_ids"].to(self.model.device)
        with torch.inference_mode():
            # Ours are read at the end-of-text that they were trained to be read at, also where it is the padding token.
            expected = None if self.is_ours else torch.cat([self._forward([inputs[row]]) for row in rows])
            try:
                model.settle(**batch)
                got = model(**batch).rewards
            except Exception as error:  # whatever an architecture does with what it does not know
                return f"{type(error).__name__}: {error}".splitlines()[0]
        if expected is None:
            return None
        # A prompt that is computed with others rounds otherwise; a wrong token or mask is off by far more.
        tolerance = 1e-3 if self.model.dtype.itemsize >= 4 else 5e-2
        if ((got - expected).abs() <= tolerance * (1 + expected.abs())).all():
            return None
        return f"as sharing gives {got.tolist()} instead of {expected.tolist()} for one pair"

    def _plain(self, inputs: Sequence[dict[str, list[int]]], what: str) -> Tensor:
        """By the model's own forward, a row a text."""
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]["input_ids"]), reverse=True)
        pads = self.model.config.get_text_config().pad_token_id is not None
        # Without a padding token of its own, transformers' models take one row at a time.
        tokens = [len(inputs[i]["input_ids"]) if pads else self.scoring.batch_tokens for i in order]
        made = batches([[i] for i in order], tokens, self.scoring.batch_tokens)
        return over_ranks(made, len(inputs), lambda batch: self._forward([inputs[i] for (i,) in batch]), what)

    def _forward(self, inputs: Sequence[dict[str, list[int]]]) -> Tensor:
        if len(inputs) == 1:
            batch = {name: torch.tensor([ids]) for name, ids in inputs[0].items()}
        else:
            batch = self.tokenizer.pad(list(inputs), padding_side="right", return_tensors="pt")
        logits: Tensor = self.model(**{name: ids.to(self.model.device) for name, ids in batch.items()}).logits
        return logits[:, 0]


def is_ours(spec: str) -> bool:
    """Whether `lm.reward` or `lm.oracle` made the model. Raises CorruptArtifact where it has changed since."""
    folder = Path(spec)
    return (folder / "artifact.json").is_file() and verify(folder)["stage"] in ("reward", "oracle")


def _load(spec: str, scoring: Scoring) -> PreTrainedModel:
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            spec,
            dtype=scoring.dtype if scoring.dtype == "auto" else getattr(torch, scoring.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"--reward-model {spec!r} cannot be loaded: {error}") from None
    if found["missing_keys"]:
        raise ValueError(
            f"--reward-model {spec!r}: its weights lack {', '.join(sorted(found['missing_keys']))}, which would be "
            "drawn at random"
        )
    loaded: PreTrainedModel = model.to(device_named(scoring.device)).eval()
    return loaded


# ---------------------------------------------------------------- a set


def _kept(pair: Any) -> Any:
    assert not isinstance(pair, Drop), "rows that are no comparison have been left out"
    return pair


def comparisons(path: str, subset: str | None, left_out: Counter[str] | None = None) -> Iterator[Placed]:
    """The rows of a set that are comparisons; counts the others by reason.

    Raises ValueError or FileNotFoundError as `lm.data.read_rows` and `lm.data.any_pair` do.
    """
    for where, row in read_rows(path, subset):
        pair = any_pair(row, where)
        if not isinstance(pair, Drop):
            yield where, row
        elif left_out is not None:
            left_out[pair.reason] += 1


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

    def write(self, shard: int, rows: Sequence[Placed], rewards: Tensor, cut: int) -> None:
        """Rewards, [2N], as of `RewardModel.rewards`."""
        chosen, rejected = rewards.reshape(2, -1).tolist()
        write_json(self.path(shard), {"key": self.key(rows), "chosen": chosen, "rejected": rejected, "cut": cut})


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
    if len(set(names)) < len(names):
        raise ValueError(f"--reward-model and --judge-model name one model twice: {', '.join(specs)}")
    return names


@dataclass
class Summary:
    """What `score_set` did."""

    pairs: int = 0
    """Rows in the file."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows that are not, by reason."""
    removed: set[str] = field(default_factory=set)
    """Columns with other rewards, which would be read as well."""
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
) -> Summary:
    """Writes the set with rewards to `out`, see the top of this file. All ranks call this, the first one writes.

    Args:
        path: a set in any schema, as of `lm.data.read_rows`. It is read several times and never held, but for a
            judge's questions.
        out: .jsonl, .jsonl.gz or .parquet file, which must not be there yet.
        specs: reward models, hub names or local folders.
        scoring: how they are run.
        subset: as of `lm.data.read_rows`.
        judge: an LLM, the last of the ensemble.

    Raises:
        ValueError: an unfit model, file or row, or no comparison among the rows.
        FileNotFoundError: no such data.
        FloatingPointError: a reward is not finite.
        EndpointError: the judge's endpoint failed for good.
    """
    check_suffix(out)
    if out.exists():
        raise ValueError(f"--out {out} exists; name another file, or remove it")
    if not specs and judge is None:
        raise ValueError("name a model by --reward-model or --judge-model")
    names = column_names([*specs, *([judge.model] if judge else [])])
    for spec in specs:
        check_reward_model(spec, False, option="--reward-model")
    summary = Summary()
    total = sum(1 for _ in comparisons(path, subset, summary.left_out))
    if not total:
        raise ValueError(f"{path}: no row is a comparison, left out were {dict(summary.left_out) or 'none'}")
    folder = out.with_name(f"{out.name}.parts")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    how = {**vars(scoring), "device": device_named(scoring.device).type, "shard": SHARD, **versions}
    with only_run_in(folder):
        parts = [Parts(folder, i, {"model": identity(spec), "spec": spec, **how}) for i, spec in enumerate(specs)]
        for name, spec, own in zip(names, specs, parts, strict=False):
            _score_shards(own, spec, scoring, in_shards(comparisons(path, subset)), f"{name}, {total:,} pairs")
        shares = ranks.from_first(lambda: _judged(judge, comparisons(path, subset), out)) if judge else None
        if ranks.is_first():
            write_rows(out, _scored(path, subset, names, parts, shares, summary))
            shutil.rmtree(folder)
        ranks.wait()
    return summary


def _score_shards(parts: Parts, spec: str, scoring: Scoring, shards: Iterator[list[Placed]], what: str) -> None:
    """Scores what is not there yet."""
    model: RewardModel | None = None
    for number, rows in enumerate(shards):
        if ranks.from_first(lambda number=number, rows=rows: parts.read(number, rows) is not None):  # type: ignore[misc]
            continue
        if model is None:
            progress.say(f"[rewards] {what}{f', going on at {number * SHARD:,}' if number else ''}")
            model = RewardModel(spec, scoring)
        rewards, cut = model.rewards(rows, f"{what}, from {number * SHARD:,}")
        if ranks.is_first():
            parts.write(number, rows, rewards, cut)


def _judged(judge: LLMJudge, rows: Iterator[Placed], out: Path) -> list[float | None]:
    """For each row, the share of its comparisons that the chosen side wins."""
    pairs = [_kept(any_pair(row, where, role_text)) for where, row in rows]
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
    subset: str | None,
    names: Sequence[str],
    parts: Sequence[Parts],
    shares: Sequence[float | None] | None,
    summary: Summary,
) -> Iterator[Row]:
    """The set's rows with their rewards; fills the summary."""
    number = 0
    for shard, rows in enumerate(in_shards(comparisons(path, subset))):
        records = [one.read(shard, rows) for one in parts]
        if None in records:
            raise ValueError(f"{path} has changed while it was scored; start again")
        for name, record in zip(names, records, strict=False):
            summary.cut[name] += record["cut"]  # type: ignore[index]
        for i, (where, row) in enumerate(rows):
            rewards = [(record["chosen"][i], record["rejected"][i]) for record in records]  # type: ignore[index]
            if shares is not None:
                share = shares[number]
                number += 1
                if share is None:
                    summary.left_out["no verdict of the judge"] += 1
                    continue
                rewards.append((judge_reward(share), judge_reward(1 - share)))
            summary.pairs += 1
            for name, (chosen, rejected) in zip(names, rewards, strict=True):
                summary.agree[name] += chosen > rejected
                summary.ties[name] += chosen == rejected
            own = _kept(any_pair(row, where)) if is_tldr(row) else row
            summary.removed |= own.keys() & set(GIVEN_REWARDS)
            yield {
                **{name: value for name, value in own.items() if name not in GIVEN_REWARDS},
                **{
                    f"{side}_reward_{name}": reward
                    for name, both in zip(names, rewards, strict=True)
                    for side, reward in zip(("chosen", "rejected"), both, strict=True)
                },
                **{name: list(values) for name, values in zip(REWARDS, zip(*rewards, strict=True), strict=True)},
            }


# ---------------------------------------------------------------- the command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. Leaves with status 2 and a message for one that is unknown, missing, or without effect."""
    parser = argument_parser(
        "lm.score",
        __doc__,
        "--data pairs.jsonl --reward-model Skywork/Skywork-Reward-V2-Qwen3-0.6B --out scored.jsonl",
        "--data pairs.jsonl --reward-model runs/own/reward/rho-1 runs/own/reward/b0.2-2 --out scored.parquet",
        "--data pairs.jsonl --judge-model NAME --task helpfulness --endpoint http://localhost:8000/v1 --out s.jsonl",
        allow_abbrev=False,
    )
    parser.add_argument("--data", required=True, help="hub name, .jsonl, .jsonl.gz or .parquet file, or folder of them")
    parser.add_argument("--subset", metavar="NAME", help="folder of a hub dataset")
    parser.add_argument(
        "--reward-model",
        action="extend",
        nargs="+",
        default=[],
        metavar="A",
        help="hub name or folder; several, or the option again, for an ensemble",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".jsonl, .jsonl.gz or .parquet")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the parameters; by default as saved")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="default: the accelerator, if any")
    parser.add_argument("--batch-tokens", type=int, default=Scoring.batch_tokens, help="default: %(default)s")
    parser.add_argument("--max-length", type=int, metavar="N", help="longest text, tokens; the model's own by default")
    parser.add_argument(
        "--judge-model", metavar="NAME", help="an LLM at an OpenAI-compatible endpoint, the last member"
    )
    parser.add_argument("--endpoint", metavar="URL", help="its base URL, usually ending in /v1; default: OpenAI's")
    parser.add_argument("--task", choices=list(TASKS), help="what the judge compares")
    options = parser.parse_args(arguments)
    if not options.reward_model and options.judge_model is None:
        parser.error("name one or more models by --reward-model, or a judge by --judge-model")
    if (options.judge_model is None) != (options.task is None):
        parser.error("--judge-model and --task go together")
    if options.endpoint is not None and options.judge_model is None:
        parser.error("--endpoint goes with --judge-model")
    return options


@as_command
def main(arguments: Sequence[str]) -> None:
    """The command."""
    options = said_once(lambda: parse(arguments))
    scoring = Scoring(
        dtype=options.dtype,
        device=options.device,
        batch_tokens=options.batch_tokens,
        max_length=options.max_length,
    )
    judge = None
    if options.judge_model is not None:
        url = options.endpoint or os.environ.get("OPENAI_BASE_URL")
        judge = LLMJudge(task=options.task, model=options.judge_model, base_url=url)
    with ranks.together(device_named(options.device)):
        summary = score_set(
            options.data, options.out, options.reward_model, scoring, subset=options.subset, judge=judge
        )
        report(summary, options.data)
        progress.say(f"written: {options.out}")


def report(summary: Summary, data: str) -> None:
    """Says what was scored, cut and left out."""
    print(f"{data}: {summary.pairs:,} pairs")
    for reason, count in summary.left_out.items():
        print(f"  left out: {count:,} rows, {reason}")
    if summary.removed:
        print(f"  left out: columns {', '.join(sorted(summary.removed))}, which hold other rewards")
    for name, agree in summary.agree.items():
        cut = summary.cut[name]
        print(
            f"  {name}: the chosen completion has the larger reward in {agree / summary.pairs:.1%}, the same in "
            f"{summary.ties[name] / summary.pairs:.1%}"
            + (f"; {cut:,} of {2 * summary.pairs:,} texts were too long and lost their beginning" if cut else "")
        )
