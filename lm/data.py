"""Preference sets and reference completions, from the hub or local files, to one tokenised form.

The form: preferences with id, prompt, chosen, rejected, split and prompt_ids, chosen_ids, rejected_ids; reference
completions with id, prompt, completion, split and prompt_ids, completion_ids. Splits are by prompt (TL;DR: by post), so
none crosses. Beside these, where the schema has them: confidence and worker (None where a row has none), and the set's
own rewards. Prompt and completion are tokenised apart and joined as ids; every completion ends with end-of-text. What
is dropped is counted, by reason. Sets stay on disk, memory-mapped, from reading to training.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from lm import progress
from lm.config import DataConfig
from lm.io import read_jsonl, replacing, write_jsonl

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
HUB_DATASET = r"([\w-][\w.-]*/[\w.-]+)(?:/([\w.-]+))?(?:@([\w./-]+))?"
"""owner/name/folder@revision."""
TEXTS = ("prompt", "completion", "chosen", "rejected")
REWARDS = ("chosen_rewards", "rejected_rewards")
"""Columns of a set's own rewards, a list a row: the one reward, then the ensemble's members."""
ONE_REWARD = (("score_chosen", "score_rejected"), ("chosen_reward", "rejected_reward"))
"""Columns of a set's one reward."""
GIVEN_REWARDS = (*REWARDS, *(name for names in ONE_REWARD for name in names), "margin")
"""Every column that `given_rewards` reads."""
BATCH = 1000
"""Rows at a time, of what is tokenised or read from Parquet."""


@dataclass(frozen=True)
class Drop:
    """A row that is left out, and why."""

    reason: str


# ---------------------------------------------------------------- reading rows


def read_rows(path: str, subset: str | None = None) -> Iterator[tuple[str, Row]]:
    """(where it stands, row) of a local file, a folder of files, or a hub dataset (all its splits).

    A hub dataset is owner/name, or owner/name/folder for one folder of it; either with @revision after it.

    Raises FileNotFoundError for a local path that is not there, ValueError for a malformed line, an unknown file type,
    or a hub dataset that cannot be loaded.
    """
    local = Path(path)
    try:
        there = local.exists()
    except OSError as error:
        raise ValueError(f"data path {shown(path)} cannot be looked up ({error.strerror})") from None
    if there:
        if subset is not None:
            raise ValueError(
                f"data.subset {subset!r} goes with a hub name, but {path} is local; name the folder itself"
            )
        yield from _read_local(local)
    elif (hub := re.fullmatch(HUB_DATASET, path)) and not path.endswith(SUFFIXES):
        try:
            loaded = datasets.load_dataset(hub[1], data_dir=subset or hub[2], revision=hub[3])
        except Exception as error:
            copy = f"; the hub's own copy of it may do: {path}@refs/convert/parquet" if "scripts" in str(error) else ""
            raise ValueError(
                f"data path {path!r} is neither a local file or folder nor a hub dataset that can be loaded "
                f"({type(error).__name__}: {error}){copy}"
            ) from None
        for split, rows in loaded.items():
            for number, row in enumerate(rows):
                yield f"{path}/{split}, row {number}", row
    else:
        raise FileNotFoundError(
            f"data path {shown(path)}: there is no such file or folder, and it is no hub name (owner/name)"
        )


def _read_local(path: Path) -> Iterator[tuple[str, Row]]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES))
        if not files:
            raise ValueError(f"{path} holds no {', '.join(SUFFIXES)} file")
        for file in files:
            yield from _read_local(file)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        for number, row in read_jsonl(path):
            yield f"{path}, line {number}", row
    elif path.suffix == ".parquet":
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                number = 0
                for batch in file.iter_batches(BATCH):
                    for row in batch.to_pylist():
                        yield f"{path}, row {number}", row
                        number += 1
        except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read as parquet ({error})") from None
    else:
        raise ValueError(f"{path}: a file of type {', '.join(SUFFIXES)} is needed")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes a .jsonl, .jsonl.gz or .parquet file, whole or not at all: JSON lines as they come, Parquet at once."""
    check_suffix(path)
    if path.suffix != ".parquet":
        write_jsonl(path, rows)
        return
    with replacing(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), temporary)


def check_suffix(path: Path) -> None:
    """ValueError where `write_rows` cannot write such a file."""
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: a file of type {', '.join(SUFFIXES)} is needed")


def _column(row: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: an object with {name!r} is needed, got {type(row).__name__}: {shown(row)}")
    if name not in row:
        close = difflib.get_close_matches(name, row, n=1, cutoff=0.6)
        hint = f"; is {close[0]!r} meant to be it?" if close else ""
        raise ValueError(f"{where}: column {name!r} is missing, there are {shown(sorted(row))}{hint}")
    value = row[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(
            f"{where}: {name!r} must be of type {kind.__name__}, got {type(value).__name__}: {shown(value)}"
        )
    return _text(value, name, where) if isinstance(value, str) else value


def _text(value: str, name: str, where: str) -> str:
    """The text, which can be written; JSON can hold what cannot."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: {name!r} is not Unicode text: half of a surrogate pair, {value[error.start]!r}, at "
                f"character {error.start}"
            ) from None
    return value


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 4, 200, 200, 100
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 30


def shown(value: Any) -> str:
    """A value in a message: its beginning, where it is long or deep."""
    return _SHORT.repr(value)


# ---------------------------------------------------------------- schemas


def hh_pair(row: Row, where: str) -> Row | Drop:
    """One Anthropic HH row: two dialogues, split at the last turn boundary that they share.

    The prompt is all shared turns and the opening of the reply; each side is that one reply. Rows whose dialogues are
    not made of Human and Assistant turns, or differ by more than one final reply, cannot be split.
    """
    dialogues = [_turns(_column(row, name, str, where)) for name in ("chosen", "rejected")]
    if not all(dialogues):
        return Drop("not a dialogue of Human and Assistant turns")
    chosen, rejected = dialogues
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        return Drop("identical completions")
    if shared == min(len(chosen), len(rejected)):
        return Drop("empty completion")
    tails = chosen[shared:], rejected[shared:]
    if shared == 0 or any(len(tail) != 1 or tail[0][0] != "Assistant" for tail in tails):
        return Drop("differs by more than one final reply")
    prompt = "".join(f"\n\n{speaker}:{text}" for speaker, text in chosen[:shared]) + "\n\nAssistant:"
    return _pair(prompt, tails[0][0][1], tails[1][0][1])


def _turns(dialogue: str) -> list[tuple[str, str]]:
    """(speaker, text as written) of each turn; empty where the text does not start with a turn."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", dialogue)
    return [] if before.strip() else list(zip(parts[::2], parts[1::2], strict=True))


def _pair(prompt: str, chosen: str, rejected: str) -> Row | Drop:
    chosen, rejected = chosen.strip(), rejected.strip()
    if not prompt.strip():
        return Drop("empty prompt")
    if not chosen or not rejected:
        return Drop("empty completion")
    if chosen == rejected:
        return Drop("identical completions")
    # A completion continues its prompt after a space, in every schema that does not itself say how they join.
    return {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}


def tldr_pair(row: Row, where: str, template: str) -> Row | Drop:
    """One row of openai/summarize_from_feedback (comparisons).

    Beside the texts: `post`, which the splits are by; the annotator's `confidence` on the set's scale, and the
    `worker`'s name, None where the row has none.
    """
    info, summaries = _column(row, "info", dict, where), _column(row, "summaries", list, where)
    choice = _column(row, "choice", int, where)
    if info.get("post") is None and ("post" in info or "article" in info):  # the set has news articles too
        return Drop("no Reddit post")
    if len(summaries) != 2 or choice not in (0, 1):
        raise ValueError(
            f"{where}: two summaries and a choice of 0 or 1 are needed, got {len(summaries)} and {shown(choice)}"
        )
    texts = [_column(summary, "text", str, f"{where}, summaries") for summary in summaries]
    pair = _pair(tldr_prompt(info, where, template), texts[choice], texts[1 - choice])
    if isinstance(pair, Drop):
        return pair
    extra = row.get("extra") or {}
    if not isinstance(extra, Mapping):
        raise ValueError(f"{where}: 'extra' must be of type dict, got {type(extra).__name__}: {shown(extra)}")
    return {**pair, "post": _post(info), **_annotation(extra.get("confidence"), row.get("worker"), where)}


def tldr_reference(row: Row, where: str, template: str) -> Row | Drop:
    """One row of the filtered TL;DR reference set: subreddit, title, post, summary."""
    summary = _column(row, "summary", str, where).strip()
    if not summary:
        return Drop("empty completion")
    return {"prompt": tldr_prompt(row, where, template), "completion": f" {summary}", "post": _post(row)}


def _post(info: Row) -> str:
    """A post's words: the same post is in several sets, differently spaced, and under several titles."""
    return " ".join(str(info["post"]).split())


def _annotation(confidence: Any, worker: Any, where: str) -> Row:
    if confidence is not None:
        confidence = _number(confidence, "confidence", where)
    if isinstance(worker, int):  # some sets number them
        worker = str(worker)
    if not isinstance(worker, str | None):
        raise ValueError(f"{where}: 'worker' must be a name or a number, got {type(worker).__name__}: {shown(worker)}")
    return {"confidence": confidence, "worker": worker if worker is None else _text(worker, "worker", where)}


def _number(value: Any, name: str, where: str) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond the largest float
        pass
    raise ValueError(f"{where}: {name!r} must be a finite number, got {shown(value)}")


def tldr_prompt(info: Row, where: str, template: str) -> str:
    """The post as a prompt, by a template with {subreddit}, {title} and {post}."""
    fields = {name: _column(info, name, str, where).strip() for name in ("subreddit", "title", "post")}
    return template.format(**fields)


# ---------------------------------------------------------------- TRL-style sets

Message = dict[str, str]


class Conversation(NamedTuple):
    """Two replies to the same messages."""

    context: list[Message]
    chosen: Message
    rejected: Message


Renderer = Callable[[Sequence[Message], Message, str], tuple[str, str]]
"""(messages, the reply to them, where they stand) -> (prompt, completion)."""


def plain_chat(messages: Sequence[Message], reply: Message, where: str) -> tuple[str, str]:
    """A dialogue as text with the roles named, for what reads replies and has no model; a `Renderer`."""
    return "".join(f"\n\n{message['role']}: {message['content']}" for message in messages), reply["content"]


def chat_renderer(tokenizer: PreTrainedTokenizerBase | None, model: str) -> Renderer:
    """A `Renderer` by the model's chat template. End-of-text is left to the tokenising.

    What it returns raises ValueError where there is no template, or it cannot write the messages so that a prompt is
    the beginning of a prompt with its reply.
    """
    from jinja2 import TemplateError

    def render(messages: Sequence[Message], reply: Message, where: str) -> tuple[str, str]:
        if tokenizer is None or tokenizer.chat_template is None:
            raise ValueError(
                f"{where}: there are messages, and model {model!r} has no chat template to write them by; give a model "
                "that has one, or prompt, chosen and rejected as text"
            )
        try:
            prompt = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template([*messages, reply], tokenize=False)
        except TemplateError as error:
            raise ValueError(f"{where}: the chat template of model {model!r} refuses the messages: {error}") from None
        if not whole.startswith(prompt):
            raise ValueError(
                f"{where}: the chat template of model {model!r} writes a prompt otherwise when its reply follows, so "
                "that the two cannot be told apart; give prompt, chosen and rejected as text"
            )
        return prompt, whole[len(prompt) :].rstrip().removesuffix(tokenizer.eos_token)

    return render


def preference_pair(row: Row, where: str, render: Renderer) -> Row | Drop:
    """One row of a TRL-style set: prompt, chosen and rejected, as text or as messages, with or without the prompt.

    Text stays as written, white space too. Without a prompt it is what both texts begin with, in whole words; or all
    shared turns where they are dialogues of Human and Assistant. Messages go through `render`: the prompt is what comes
    before the one last reply in which the sides differ, whether it stands in `prompt`, in both sides, or in both
    places. `confidence` and `worker` are kept as in `tldr_pair`.
    """
    prompt, chosen, rejected = _sides(row, where)
    if isinstance(prompt, list) or not isinstance(chosen, str) or not isinstance(rejected, str):
        pair = _rendered(_conversation(prompt, _reply(chosen), _reply(rejected), where), where, render)
    elif prompt is None and _turns(chosen) and _turns(rejected):
        pair = hh_pair(row, where)
    else:
        pair = _text_pair(prompt, chosen, rejected)
    return pair if isinstance(pair, Drop) else pair | _annotation(row.get("confidence"), row.get("worker"), where)


def is_tldr(row: Row) -> bool:
    """Whether the columns are those of openai/summarize_from_feedback."""
    return {"info", "summaries", "choice"} <= row.keys()


def any_pair(row: Row, where: str, render: Renderer = plain_chat) -> Row | Drop:
    """A comparison in the schema that its columns say, as text."""
    if is_tldr(row):
        return tldr_pair(row, where, DataConfig.prompt_template)
    return preference_pair(row, where, render)


def any_conversation(row: Row, where: str) -> Conversation | Drop:
    """A comparison in the schema that its columns say, as messages.

    Text is one message of the user's and its replies, or the turns where it is a dialogue of Human and Assistant turns;
    white space around it is left out.
    """
    if not is_tldr(row):
        prompt, chosen, rejected = _sides(row, where)
        if isinstance(prompt, list) or not isinstance(chosen, str) or not isinstance(rejected, str):
            return _conversation(prompt, _reply(chosen), _reply(rejected), where)
    pair = any_pair(row, where)
    if isinstance(pair, Drop):
        return pair
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[speaker], "content": text.strip()} for speaker, text in _turns(pair["prompt"])]
    if turns and turns[-1] == {"role": "assistant", "content": ""}:  # the opening of the reply
        turns.pop()
    context = turns or [{"role": "user", "content": pair["prompt"].strip()}]
    replies = [{"role": "assistant", "content": pair[name].strip()} for name in ("chosen", "rejected")]
    return Conversation(context, *replies)


def preference_reference(row: Row, where: str, render: Renderer) -> Row | Drop:
    """One row of a set of reference completions: prompt and completion, as text or messages, or `messages` alone."""
    prompt: str | list[Message] = [] if "messages" in row else _side(row, "prompt", where)
    completion = _side(row, "messages" if "messages" in row else "completion", where)
    if isinstance(completion, list) or isinstance(prompt, list):
        completion = _reply(completion)
        if not completion or completion[-1]["role"] != "assistant":
            return Drop("no reply at the end")
        context = [*_context(prompt), *completion[:-1]]
        if not context:
            return Drop("empty prompt")
        prompt, completion = render(context, completion[-1], where)
    if not prompt.strip():
        return Drop("empty prompt")
    return {"prompt": prompt, "completion": completion} if completion.strip() else Drop("empty completion")


def _sides(row: Row, where: str) -> tuple[str | list[Message] | None, str | list[Message], str | list[Message]]:
    """Prompt, chosen and rejected, checked."""
    chosen, rejected = (_side(row, name, where) for name in ("chosen", "rejected"))
    prompt = _side(row, "prompt", where) if row.get("prompt") is not None else None
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(f"{where}: 'chosen' and 'rejected' must both be text or both be messages")
    return prompt, chosen, rejected


def _side(row: Row, name: str, where: str) -> str | list[Message]:
    """Text, or messages, checked."""
    if not isinstance(row.get(name), list):
        text: str = _column(row, name, str, where)
        return text
    messages = row[name]
    for message in messages:
        for key in ("role", "content"):
            _column(message, key, str, f"{where}, {name}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _reply(completion: str | list[Message]) -> list[Message]:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def _context(prompt: str | list[Message] | None) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []


def _text_pair(prompt: str | None, chosen: str, rejected: str) -> Row | Drop:
    if chosen.strip() == rejected.strip():
        return Drop("identical completions")
    if prompt is None:
        shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
        while shared and not (chosen[shared : shared + 1].isspace() and rejected[shared : shared + 1].isspace()):
            shared -= 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt.strip():
        return Drop("empty prompt")
    if not chosen.strip() or not rejected.strip():
        return Drop("empty completion")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _conversation(
    prompt: str | list[Message] | None, chosen: list[Message], rejected: list[Message], where: str
) -> Conversation | Drop:
    if not chosen or not rejected:
        return Drop("empty completion")
    if chosen == rejected:
        return Drop("identical completions")
    shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    context, before = _context(prompt), chosen[:shared]
    if context and before and before[0]["role"] in ("system", "user"):
        # Some sets have the prompt in both places, and then perhaps a system message in one of them only.
        if not any(before[i : i + len(context)] == context for i in range(len(before))):
            raise ValueError(f"{where}: 'chosen' and 'rejected' begin with messages that are not those of 'prompt'")
        context = before
    else:
        context = [*context, *before]
    tails = chosen[shared:], rejected[shared:]
    if any(len(tail) > 1 or tail[0]["role"] != "assistant" for tail in tails if tail):
        return Drop("differs by more than one final reply")
    if not context:
        return Drop("empty prompt")
    if not all(tail and tail[0]["content"].strip() for tail in tails):
        return Drop("empty completion")
    if tails[0][0]["content"].strip() == tails[1][0]["content"].strip():
        return Drop("identical completions")
    return Conversation(context, tails[0][0], tails[1][0])


def _rendered(conversation: Conversation | Drop, where: str, render: Renderer) -> Row | Drop:
    if isinstance(conversation, Drop):
        return conversation
    context, *replies = conversation
    (prompt, chosen), (_, rejected) = (render(context, reply, where) for reply in replies)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def given_rewards(row: Row, where: str) -> dict[str, list[float]]:
    """A row's own rewards as REWARDS has them: the one reward, then the ensemble's members, if any.

    The members are the entries of chosen_rewards and rejected_rewards where they are two or more. The one reward is
    score_chosen and score_rejected, or chosen_reward and rejected_reward, or margin (as the reward of chosen, against
    zero), or else the mean of the entries.

    Raises ValueError where there is no reward, one is missing or not finite, or two margins contradict each other.
    """
    listed: list[list[float]] = [[], []]
    if any(row.get(name) is not None for name in REWARDS):
        columns = [_column(row, name, list, where) for name in REWARDS]
        listed = [[_number(v, name, where) for v in values] for name, values in zip(REWARDS, columns, strict=True)]
        if len(listed[0]) != len(listed[1]):
            raise ValueError(
                f"{where}: chosen_rewards and rejected_rewards must be of one length, got {len(listed[0])} and "
                f"{len(listed[1])}"
            )
    ones: dict[str, tuple[float, float]] = {}
    for names in ONE_REWARD:
        if any(row.get(name) is not None for name in names):
            one, other = (_number(row.get(name), name, where) for name in names)
            ones[" - ".join(names)] = one, other
    if row.get("margin") is not None:
        ones["margin"] = _number(row["margin"], "margin", where), 0.0
    margins = {name: one - other for name, (one, other) in ones.items()}
    if any(not math.isfinite(margin) for margin in margins.values()):
        raise ValueError(f"{where}: the difference of the rewards must be a finite number, got {margins}")
    if any(not math.isclose(m, next(iter(margins.values())), rel_tol=1e-6, abs_tol=1e-6) for m in margins.values()):
        raise ValueError(f"{where}: the reward margins contradict each other: {margins}; leave one of them")
    if ones:
        main = next(iter(ones.values()))
    elif listed[0]:
        main = _mean(listed[0], REWARDS[0], where), _mean(listed[1], REWARDS[1], where)
    else:
        raise ValueError(
            f"{where}: data.rewards is 'given', but the row has none: no chosen_rewards and rejected_rewards, "
            "score_chosen and score_rejected, chosen_reward and rejected_reward, or margin; there are "
            f"{shown(sorted(row))}"
        )
    members = listed if len(listed[0]) > 1 else [[], []]
    return {name: [value, *rest] for name, value, rest in zip(REWARDS, main, members, strict=True)}


def _mean(values: list[float], name: str, where: str) -> float:
    return _number(sum(values) / len(values), f"the mean of {name}", where)


# ---------------------------------------------------------------- loading


@dataclass(frozen=True)
class Loaded:
    """Untokenised rows with splits, memory-mapped, and what was left out."""

    preferences: Dataset
    references: Dataset
    dropped: dict[str, dict[str, int]]
    """Set ("preferences", "references") -> reason -> rows."""


def load(
    config: DataConfig, seed: int, folder: Path, *, world: Path | None = None, render: Renderer = plain_chat
) -> Loaded:
    """Reads, splits and counts.

    Args:
        config: which data.
        seed: of the splits and of the limit's draw.
        folder: where the rows are kept; it has to stay as long as they are used.
        world: folder of the generated embedded world, for that kind.
        render: how messages become text.

    Raises:
        ValueError: a row is malformed, or has another number of rewards than the rows before it.
    """
    pairs_path, references_path = config.path, config.sft_path
    if world is not None:
        pairs_path, references_path = str(world / "comparisons.jsonl"), str(world / "sft.jsonl")
    assert pairs_path is not None

    def pair(row: Row, where: str) -> Row | Drop:
        if config.kind == "hh":
            return hh_pair(row, where)
        if config.kind != "preferences":
            return tldr_pair(row, where, config.prompt_template)
        kept = preference_pair(row, where, render)
        if config.rewards == "models" or isinstance(kept, Drop):
            return kept
        return {**kept, **given_rewards(row, where)}

    def reference(row: Row, where: str) -> Row | Drop:
        if config.kind == "preferences":
            return preference_reference(row, where, render)
        return tldr_reference(row, where, config.prompt_template)

    columns = {name: Value("string") for name in ("prompt", "chosen", "rejected")}
    if config.kind != "hh":
        columns |= {"confidence": Value("float64"), "worker": Value("string")}
    if config.rewards == "given":
        columns |= {name: List(Value("float64")) for name in REWARDS}
    preferences, dropped = _finish(
        pair, read_rows(pairs_path, config.subset), columns, config, seed, folder / "preferences.arrow"
    )
    if config.limit is not None and config.limit < len(preferences):
        rng = np.random.default_rng([seed, 1])
        preferences = preferences.select(sorted(rng.choice(len(preferences), config.limit, replace=False)))
    if references_path is None:
        references = preferences.select_columns(["id", "prompt", "split", "chosen"]).rename_column(
            "chosen", "completion"
        )
        return Loaded(preferences, references, {"preferences": dropped, "references": {}})
    columns = {name: Value("string") for name in ("prompt", "completion")}
    references, dropped_references = _finish(
        reference, read_rows(references_path), columns, config, seed, folder / "references.arrow"
    )
    return Loaded(preferences, references, {"preferences": dropped, "references": dropped_references})


def _finish(
    convert: Callable[[Row, str], Row | Drop],
    rows: Iterable[tuple[str, Row]],
    columns: dict[str, Any],
    config: DataConfig,
    seed: int,
    path: Path,
) -> tuple[Dataset, dict[str, int]]:
    dropped = Counter[str]()

    def kept() -> Iterator[Row]:
        members: int | None = None
        for number, (where, raw) in enumerate(rows):
            row = convert(raw, where)
            if isinstance(row, Drop):
                dropped[row.reason] += 1
                continue
            if (rewards := row.get(REWARDS[0])) is not None and members != len(rewards):
                if members is not None:
                    raise ValueError(
                        f"{where}: {len(rewards) - 1} rewards in an ensemble's lists, {members - 1} in the rows before"
                    )
                members = len(rewards)
            content = hashlib.sha256("\0".join(row[name] for name in TEXTS if name in row).encode()).hexdigest()
            # A post has several prompts, by its titles; in the embedded world a prompt is its post.
            group = row["post"] if config.kind == "tldr" else row["prompt"]
            yield {
                "id": f"{number}-{content[:12]}",
                **{name: row[name] for name in columns},
                "split": split_of(group, config, seed),
            }

    features = {"id": Value("string"), **columns, "split": Value("string")}
    return mapped(kept(), features, path), dict(dropped)


def mapped(rows: Iterable[Row], features: Mapping[str, Any], path: Path) -> Dataset:
    """Writes rows to an Arrow file as they come, and opens it memory-mapped."""
    with ArrowWriter(path=str(path), features=Features(features)) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    return Dataset.from_file(str(path))


def split_of(group: str, config: DataConfig, seed: int) -> str:
    """train, valid or test: a function of the text and the seed, so a prompt (a post) is in one split of every set."""
    draw = int.from_bytes(hashlib.sha256(f"{seed}\0{group}".encode()).digest()[:8], "big") / 2**64
    if draw < config.test_fraction:
        return "test"
    return "valid" if draw < config.test_fraction + config.valid_fraction else "train"


# ---------------------------------------------------------------- tokenising


def prompt_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of prompts; one that its chat template begins with the beginning-of-text token gets no second one."""
    ids: list[list[int]] = tokenizer(texts)["input_ids"]
    twice = [tokenizer.bos_token_id] * 2
    return [prompt[1:] if None not in twice and prompt[:2] == twice else prompt for prompt in ids]


def completion_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of completions, which end with end-of-text, once."""
    end = tokenizer.eos_token_id
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [completion if completion[-1:] == [end] else [*completion, end] for completion in ids]


def tokenise(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig, path: Path
) -> tuple[Dataset, dict[str, int]]:
    """Adds `<column>_ids` for the prompt and each completion, and drops over-long rows.

    Returns the dataset, kept in the file `path`, and the counts of dropped rows by reason. Nothing is cut. Raises
    ValueError where no row of some split is left.
    """
    columns = [name for name in ("completion", "chosen", "rejected") if name in rows.column_names]
    dropped, present = Counter[str](), Counter[str]()

    def kept() -> Iterator[Row]:
        for start in progress.bar("tokenising", range(0, len(rows), BATCH), unit="batch"):
            batch = rows[start : start + BATCH]
            ids = {"prompt_ids": prompt_ids(tokenizer, batch["prompt"])}
            ids |= {f"{name}_ids": completion_ids(tokenizer, batch[name]) for name in columns}
            table = {**batch, **ids}
            for values in zip(*table.values(), strict=True):
                row = dict(zip(table, values, strict=True))
                if len(row["prompt_ids"]) > config.max_prompt_length:
                    dropped[f"prompt longer than {config.max_prompt_length} tokens"] += 1
                elif max(len(row[f"{name}_ids"]) for name in columns) > config.max_completion_length:
                    dropped[f"completion longer than {config.max_completion_length} tokens"] += 1
                else:
                    present[row["split"]] += 1
                    yield row

    ids = {f"{name}_ids": List(Value("int64")) for name in ("prompt", *columns)}
    dataset = mapped(kept(), {**rows.features, **ids}, path)
    what = "preference pairs" if "chosen" in columns else "reference completions"
    for split in ("train", "valid", "test") if "chosen" in columns else ("train",):
        if not present[split]:
            raise ValueError(
                f"no {what} are left in the {split} split: {len(rows)} rows before length limits, dropped "
                f"{dict(dropped) or 'none'}; look at data.path, data.limit, data.max_prompt_length, "
                f"data.max_completion_length, data.valid_fraction and data.test_fraction"
            )
    return dataset, dict(dropped)
