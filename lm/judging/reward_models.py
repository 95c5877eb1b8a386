"""Any sequence-classification model with one label as a judge of conversations."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lm.base.store import CorruptArtifact, verify
from lm.config import LogprobsConfig, Scoring
from lm.data.control_tokens import token_ids, unmarked
from lm.data.prompts import ALONE, Layout
from lm.data.rows import Row
from lm.data.schemas import Drop, any_conversation, any_pair
from lm.judging.reading import Reader, longest_input, parted, positions_of, without_padding
from lm.judging.reading import role_text as role_text
from lm.logprobs.completions import CompletionModel, collate
from lm.logprobs.kernels import at_least_float32
from lm.logprobs.scoring import batches, over_ranks, score_rows
from lm.models import checks
from lm.models.loading import load_tokenizer
from lm.models.opening import device_named
from lm.models.weights import open_weights

Placed = tuple[str, Row]
"""Where a row stands, and the row."""
log = logging.getLogger(__name__)


# ---------------------------------------------------------------- a model


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
        layout: how the rows that it scores are read.

    Raises:
        ValueError: it has no trained head with one label, brings code of its own, has no safetensors weights, or fewer
            positions than `scoring.max_length`.
    """

    def __init__(self, spec: str, scoring: Scoring, layout: Layout = ALONE) -> None:
        self.spec, self.scoring, self.layout = spec, scoring, layout
        self.tokenizer = load_tokenizer(spec, (), False, needs_end=False)
        self.model = _load(spec, scoring)
        checks.require(f"--reward-model {spec!r}", checks.tokenizer_fits(self.tokenizer, self.model))
        self.is_ours = is_ours(spec)
        own = self.tokenizer
        self.reads_segments = own.chat_template is None and not self.is_ours and own.sep_token_id is not None
        self.limit = self._limit()
        self.reader = Reader(own, spec, ours=self.is_ours, limit=self.limit)
        self.names = self.reader.names
        # A head of this name reads one state of a causal model, so that both sides of a pair can share their beginning.
        self.sharing: CompletionModel | None = None
        if hasattr(self.model, "score") and not self.reads_segments:
            self.sharing = CompletionModel(self.model, options=LogprobsConfig(scoring_tokens=scoring.batch_tokens))

    def _limit(self) -> int | None:
        """Longest input, tokens."""
        default = longest_input(self.model.config, self.tokenizer)
        most, asked = default if self.reads_segments else positions_of(self.model.config), self.scoring.max_length
        if most is not None and asked is not None and asked > most:
            raise ValueError(f"--max-length {asked} must be at most the {most} tokens that {self.spec!r} takes")
        return asked or default

    def rewards(self, rows: Sequence[Placed], what: str) -> tuple[Tensor, int]:
        """Rewards of the chosen, then of the rejected sides, [2N], float64; and how many of them were cut.

        A function of these rows, on one type of device: whatever else is scored, by however many ranks.
        """
        encoded = self._encoded(rows)
        most = checks.embedding_rows(self.model)
        for index, given in enumerate(encoded.inputs):
            checks.ids_fit(rows[index % len(rows)][0], self.tokenizer, most, given["input_ids"])
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
        if self.reader.writes_all:
            texts = [self._templated(*row, side) for side in ("chosen", "rejected") for row in rows]
            return self._cut(token_ids(self.tokenizer, texts))
        read = self.names.reading(lambda row, at, marked: any_pair(row, at, marked, self.layout), self.reader.render)
        pairs = [_kept(read(row, where), where) for where, row in rows]
        prompts = [pair["prompt"] for pair in pairs] * 2
        completions = [pair[side] for side in ("chosen", "rejected") for pair in pairs]
        if self.reads_segments:
            return self._segments(prompts, completions)
        self.reader.check("--reward-model")
        return self._cut([[*one, *other] for one, other in zip(*self.reader.ids(prompts, completions), strict=True)])

    def _templated(self, where: str, row: Row, side: str) -> str:
        found = _kept(any_conversation(row, where, self.layout), where)
        return self.reader.conversation([*found.context, getattr(found, side)], where, found.tools)

    def _cut(self, ids: list[list[int]]) -> Encoded:
        limit = self.limit or max(map(len, ids))
        return Encoded([{"input_ids": row[-limit:]} for row in ids], sum(len(row) > limit for row in ids))

    def _segments(self, prompts: list[str], completions: list[str]) -> Encoded:
        self.tokenizer.truncation_side = "left"
        prompts, completions = ([unmarked(text) for text in side] for side in (prompts, completions))
        whole = self.tokenizer(prompts, completions, split_special_tokens=True)
        cut = sum(len(row) > self.limit for row in whole["input_ids"]) if self.limit else 0
        if cut:
            whole = self.tokenizer(
                prompts, completions, split_special_tokens=True, truncation="longest_first", max_length=self.limit
            )
        names = [name for name in whole if name != "attention_mask"]
        return Encoded(
            [dict(zip(names, row, strict=True)) for row in zip(*(whole[n] for n in names), strict=True)], cut
        )

    # ------------------------------------------------------------ how it is computed

    def _shared(self, ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        """As prompts and completions: what both sides of a pair begin with, and the rest."""
        pad = self.model.config.get_text_config().pad_token_id
        if not self.is_ours:  # transformers reads the reward at the last token that is not the padding one
            ids = [without_padding(row, pad) for row in ids]
        if short := [i for i, row in enumerate(ids) if len(row) < 2]:
            raise ValueError(
                f"{self.spec!r}: a text of pair {short[0] % (len(ids) // 2)} has fewer than two tokens to read"
            )
        return parted(ids)

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
            except ValueError as error:
                return f"as sharing is refused: {error}"
            got = model(**batch).rewards
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


class Origin(NamedTuple):
    """Which model of a run one is, and when it was made."""

    stage: str
    name: str
    """Of a reward model, MAIN or a member's."""
    made: tuple[str, int]
    """Grows with time."""
    own_oracle: bool
    """Whether it is a method's own, which has a reward head beside a language model's."""


def origin(spec: str) -> Origin | None:
    """What a run's folder says of itself; None of any other model. Raises CorruptArtifact where it says nothing."""
    path = Path(spec) / "artifact.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        made = record["provenance"]["date"], path.stat().st_mtime_ns
        own = record["stage"] == "reward" and "reward_head.safetensors" in record["files"]
        return Origin(record["stage"], record["name"], made, own)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{path} cannot be read ({error}); delete the folder to rebuild it") from None


def is_ours(spec: str) -> bool:
    """Whether `lm.reward` or `lm.oracle` made the model. Raises CorruptArtifact where it has changed since."""
    of_run = origin(spec)
    return of_run is not None and verify(Path(spec))["stage"] in ("reward", "oracle")


def _load(spec: str, scoring: Scoring) -> PreTrainedModel:
    dtype = scoring.dtype if scoring.dtype == "auto" else getattr(torch, scoring.dtype)
    model = open_weights(
        AutoModelForSequenceClassification, "--reward-model", spec, trust_remote_code=False, dtype=dtype
    )
    for name, head in model.named_children():
        if name != model.base_model_prefix:  # in 16 bits different rewards would tie
            _in_float32(head)
    loaded: PreTrainedModel = model.to(device_named(scoring.device)).eval()
    return loaded


def _in_float32(head: nn.Module) -> None:
    """Has it compute in float32 at least, whatever comes in."""

    def widened(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        wide = [at_least_float32(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        return tuple(wide), kwargs

    if any(parameter.dtype.itemsize < 4 for parameter in head.parameters()):
        head.float().register_forward_pre_hook(widened, with_kwargs=True)


# ---------------------------------------------------------------- a set


def _kept(pair: Any, where: str) -> Any:
    """The comparison; ValueError where it is none by this model's template, while it is one by what stands there."""
    if isinstance(pair, Drop):
        raise ValueError(f"{where}: no comparison for this model: {pair.reason}; leave the row out")
    return pair
