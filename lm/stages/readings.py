"""Models of a run with another tokenizer than the policy: the oracle, or reward models.

They read the texts, each by its own tokenizer, as `lm.judging.reading` has it; their rewards are numbers, whatever they
were read from.

Where the tokenizers are the same, there is no reader, and rows are read by the ids that they have.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lm.base import progress, ranks
from lm.config import Config
from lm.data.messages import STORED, Message
from lm.data.rows import BATCH
from lm.data.tokens import mapped
from lm.judging.reading import Read, Reader, Said, longest_input, sample_text
from lm.judging.reward_models import is_ours
from lm.logprobs.completions import CompletionModel
from lm.logprobs.definition import position_limit
from lm.logprobs.scoring import ScoreError, row_states, score_pairs, score_rows
from lm.models import checks
from lm.models.loading import same_tokenizer
from lm.models.weights import config_of
from lm.stages.data import data, opened, others_tokenizer, sized, tokenizer
from lm.stages.run import Run, base_of, once

Asked = Mapping[str, tuple[list[Message], list[Any] | None]]
"""Of prompts that were written from messages: prompt -> these, and the tools."""


@once
def reader(run: Run, stage: str) -> Reader | None:
    """How the models of a stage, "oracle" or "reward", read texts; None where they have the policy's tokenizer.

    A given oracle with a chat template of its own has one for messages, too. Raises ValueError where it is not known
    how a completion is read.
    """
    given = stage == "oracle" and run.config.oracle_model is not None
    option, spec = ("oracle_model", str(run.config.oracle_model)) if given else base_of(run.config, stage)
    if option == "model":
        return None
    policys, own = tokenizer(run), others_tokenizer(run, option)
    if same_tokenizer(policys, own) and not (given and _writes_otherwise(run, policys, own)):
        return None
    config = config_of(option, spec, run.config.trust_remote_code)
    most = [n for n in (longest_input(config, own), position_limit(config)) if n is not None]
    found = Reader(
        own,
        spec,
        ours=not given or is_ours(spec),
        limit=min(most, default=None),
        pad=config.get_text_config().pad_token_id,
        how="control" if run.config.data.control_tokens == "control" else "text",
    )
    found.check(option)
    return found


def _writes_otherwise(run: Run, policys: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> bool:
    if own.chat_template in (None, policys.chat_template):
        return False
    return STORED[0] in opened(data(run).path / "preferences").column_names


def input_of(run: Run, stage: str) -> dict[str, Any]:
    """What the reading adds to an artifact's key: nothing where there is no reader."""
    own = reader(run, stage)
    return {} if own is None else {"tokenizer": own.digest}


def tokenizer_of(run: Run, stage: str) -> PreTrainedTokenizerBase:
    """Of the models of a stage."""
    own = reader(run, stage)
    return tokenizer(run) if own is None else own.tokenizer


def sized_for(run: Run, stage: str) -> Config:
    """The options with limits in the tokens of a stage's models, as long as they are read."""
    own = reader(run, stage)
    if own is None or own.limit is None:
        return sized(run)
    config = sized(run)
    return replace(config, data=replace(config.data, max_prompt_length=own.limit - 2, max_completion_length=1))


def check_fits(run: Run, stage: str, model: CompletionModel) -> None:
    """ValueError where the tokenizer has ids beyond the model's embedding."""
    if (own := reader(run, stage)) is not None:
        option = "oracle_model" if stage == "oracle" and run.config.oracle_model else base_of(run.config, stage)[0]
        checks.require(f"{option} {own.spec!r}", checks.tokenizer_fits(own.tokenizer, model.model))


# ---------------------------------------------------------------- pairs


def said(policys: PreTrainedTokenizerBase, row: Mapping[str, Any], side: str) -> Said:
    """A side of a run's row as it was said: the messages that it was written from, or its text without the policy's own
    beginning and end of text, which are not a part of what it says."""
    where = f"row {row['id']}"
    if row.get(STORED[0]) is not None:
        prompt, (reply,) = json.loads(row[STORED[0]]), json.loads(row[f"{side}_messages"])
        tools = json.loads(row["tools"]) if row.get("tools") is not None else None
        return Said(where, prompt, {**reply, "content": _without_end(policys, reply["content"])}, tools)
    return Said(where, _without_begin(policys, row["prompt"]), _without_end(policys, row[side]))


def _without_begin(policys: PreTrainedTokenizerBase, prompt: str) -> str:
    return prompt.removeprefix(str(policys.bos_token)) if policys.bos_token else prompt


def _without_end(policys: PreTrainedTokenizerBase, text: str) -> str:
    bare, end = text.rstrip(), str(policys.eos_token)
    return bare.removesuffix(end) if bare.endswith(end) else text


def read_pairs(run: Run, own: Reader, pairs: Dataset) -> Read:
    """The chosen, then the rejected sides in the tokens of these models."""
    read_of = ("id", "prompt", "chosen", "rejected", *STORED)
    policys = tokenizer(run)
    rows = pairs.select_columns([name for name in read_of if name in pairs.column_names]).to_list()
    read = own.pairs(*([said(policys, row, side) for row in rows] for side in ("chosen", "rejected")))
    _check_ids(run, own, [f"row {row['id']}" for row in rows], read)
    return read


def _check_ids(run: Run, own: Reader, places: Sequence[str], read: Read) -> None:
    """ValueError where a text holds a token that the model has no embedding for; it says in which of these places."""
    vocabulary = config_vocabulary(run, own)
    if vocabulary is None or max(own.tokenizer.get_vocab().values()) < vocabulary:
        return
    for i, ids in enumerate(zip(read.prompts, read.completions, strict=True)):
        checks.ids_fit(places[i % len(places)], own.tokenizer, vocabulary, [*ids[0], *ids[1]])


def config_vocabulary(run: Run, own: Reader) -> int | None:
    """Rows of the embedding, by the model's config."""
    config = config_of("model", own.spec, run.config.trust_remote_code)
    return getattr(config.get_text_config(), "vocab_size", None)


def tokenised(run: Run, stage: str, pairs: Dataset, path: Path, what: str = "pairs") -> tuple[Dataset, dict[str, Any]]:
    """Pairs, which errors call `what`, as a stage's models learn from them, kept in the file `path`, and what the
    reading adds to metrics.

    A pair with a text that the model would have to cut is left out, and counted. Raises ValueError where none is left.
    """
    own = reader(run, stage)
    if own is None:
        return pairs, {}
    count = Counter[str]()

    def rows() -> Iterator[dict[str, Any]]:
        for start in range(0, len(pairs), BATCH):
            batch = pairs.select(range(start, min(start + BATCH, len(pairs))))
            read, size = read_pairs(run, own, batch), len(batch)
            count.update(read.counts())
            for i, row in enumerate(batch):
                if read.cut[i] or read.cut[i + size]:
                    count["left_out"] += 1
                    continue
                ids = read.prompts[i], read.completions[i], read.completions[i + size]
                yield {**row, **dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True))}

    made = mapped(rows(), pairs.features, path)
    if not len(made):
        raise ValueError(
            f"all {len(pairs):,} {what} are longer than the {own.limit} tokens that {own.spec!r} takes, by its own "
            "tokenizer; name another model, or lower data.max_prompt_length"
        )
    return made, _told(own, dict(count), stage)


def pair_rewards(
    run: Run, stage: str, model: CompletionModel, pairs: Dataset, what: str, *, rewards: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Rewards of the chosen and of the rejected completions by a stage's model, [N] each, float64, and what the reading
    adds to metrics; as of `lm.logprobs.scoring.score_pairs`."""
    own = reader(run, stage)
    if own is None:
        return *score_pairs(model, pairs, what, rewards=rewards), {}
    read = read_pairs(run, own, pairs)
    try:
        both = score_rows(model, read.prompts, read.completions, what, rewards=rewards)
    except ScoreError as error:
        raise FloatingPointError(
            f"{what}: the score of the {('chosen', 'rejected')[error.row // len(pairs)]} completion of pair "
            f"{pairs['id'][error.row % len(pairs)]} is {error.value}; every score must be finite"
        ) from None
    return both[: len(pairs)], both[len(pairs) :], _told(own, read.counts(), stage)


class States:
    """Last hidden states of pairs, chunk by chunk, with what is to be told of all of them."""

    def __init__(self, run: Run, stage: str, model: CompletionModel) -> None:
        self.run, self.stage, self.model, self.own = run, stage, model, reader(run, stage)
        self.count = Counter[str]()

    def read(self, pairs: Dataset) -> Read | None:
        """The chosen, then the rejected sides, which are counted; None where the models read by the policy's tokens."""
        if self.own is None:
            return None
        read = read_pairs(self.run, self.own, pairs)
        self.count.update(read.counts())
        return read

    def of(self, read: Read, what: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the chosen and of the rejected completions, [N, H] each."""
        both = row_states(self.model, read.prompts, read.completions, what)
        return both[: len(both) // 2], both[len(both) // 2 :]

    def metrics(self) -> dict[str, Any]:
        """What the reading adds to metrics."""
        return {} if self.own is None else _told(self.own, dict(self.count), self.stage)


def _told(own: Reader, counts: dict[str, int], stage: str) -> dict[str, Any]:
    """Metrics of a reading, of which is said what the model does not get to read."""
    what = {
        "cut": f"longer than its {own.limit} tokens: read without their beginning",
        "left_out": "pairs with such a text: left out of training",
        "unknown": "with characters that its tokenizer does not know",
        "broken": "samples with bytes that make no whole character: read as U+FFFD",
    }
    told = [f"{counts[name]:,} {words}" for name, words in what.items() if counts.get(name)]
    if told and ranks.is_first():
        texts = f"{counts['texts']:,} texts"
        progress.say(f"[{stage}] {Path(own.spec).name} by its own tokenizer, of {texts}: {'; '.join(told)}")
    return {"reading": counts}


# ---------------------------------------------------------------- samples, and other texts


def sample_rewards(
    run: Run, model: CompletionModel, prompts: Mapping[str, list[int]], samples: Sequence[list[int]], asked: Asked
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Rewards of a sample of each prompt by the oracle, [N], float64, and what the reading adds to metrics.

    Also a sample that was cut off at the maximum gets an end, as the oracle reads the state there and was trained to.
    """
    own, policys, ids = reader(run, "oracle"), tokenizer(run), list(prompts.values())
    if own is None:
        end = policys.eos_token_id
        judged = [sample if sample[-1] == end else [*sample, end] for sample in samples]
        return score_rows(model, ids, judged, "oracle rewards"), {}
    texts = [sample_text(policys, *both) for both in zip(ids, samples, strict=True)]
    every = [
        _replied(policys, f"sample {i}", prompt, text, asked)
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1)
    ]
    broken = sum("\ufffd" in text for text in texts)
    return _said_rewards(run, own, "oracle", model, every, "oracle rewards", broken=broken)


def text_rewards(
    run: Run,
    stage: str,
    model: CompletionModel,
    prompts: Sequence[str | Sequence[Message]],
    completions: Sequence[str],
    asked: Asked,
    what: str,
) -> torch.Tensor:
    """Rewards of N completions by a stage's model that has a reader, [N], float64.

    Args:
        run: the run.
        stage: "oracle" or "reward".
        model: of the stage.
        prompts: N, messages or text; of text that was written from messages, these are read where they are known.
        completions: N, an end-of-text of the policy's at their end is no part of what they say.
        asked: the messages of prompts.
        what: is computed, for bars and errors.
    """
    own, policys = reader(run, stage), tokenizer(run)
    assert own is not None, f"models of {stage} read by the policy's tokens"
    every = [
        _replied(policys, f"prompts[{i}]", prompt, _without_end(policys, text), asked)
        for i, (prompt, text) in enumerate(zip(prompts, completions, strict=True))
    ]
    return _said_rewards(run, own, stage, model, every, what)[0]


def _replied(
    policys: PreTrainedTokenizerBase, where: str, prompt: str | Sequence[Message], text: str, asked: Asked
) -> Said:
    if isinstance(prompt, str) and prompt not in asked:
        return Said(where, _without_begin(policys, prompt), text)
    messages, tools = asked[prompt] if isinstance(prompt, str) else (list(prompt), None)
    return Said(where, messages, {"role": "assistant", "content": text}, tools)


def _said_rewards(
    run: Run, own: Reader, stage: str, model: CompletionModel, every: Sequence[Said], what: str, **counts: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    read = own.read(every)
    _check_ids(run, own, [each.where for each in every], read)
    rewards = score_rows(model, read.prompts, read.completions, what)
    return rewards, _told(own, {**read.counts(), **counts}, stage)
