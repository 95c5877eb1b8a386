"""Preference sets and reference completions, from the hub or local files, to one tokenised form.

The form: preferences with id, prompt, chosen, rejected, split and prompt_ids, chosen_ids, rejected_ids; reference
completions with id, prompt, completion, split and prompt_ids, completion_ids. Splits are by what was asked
(`lm.data.splits`), so no prompt crosses. Beside these, where the schema has them: confidence and worker (None where a
row has none), and the set's own rewards. Prompt and completion are tokenised apart and joined as ids; every completion
ends with end-of-text, and has none before. Names of control tokens in texts are characters (`lm.data.control_tokens`).
What is dropped is counted, by reason. Sets stay on disk, memory-mapped, from reading to training.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow  # type: ignore[import-untyped]
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from lm.base import progress
from lm.config import DataConfig
from lm.data import messages, rewards, scored, splits, votes
from lm.data.columns import Ints, Rows, column, counted, places_of, rows_where, sizes, tables, written
from lm.data.control_tokens import COMPLETIONS, MARK, TEXTS, Names, token_ids, unmarked
from lm.data.rows import BATCH, Row, Tally, read_rows
from lm.data.schemas import Drop, hh_pair, preference_pair, preference_reference, tldr_pair, tldr_reference
from lm.data.sets import Survey, comparisons, survey
from lm.data.splits import split_of
from lm.data.templates import Renderer, plain_chat
from theory.records import replacing

FORM = 2
"""Raised where the same rows become other ids, texts or splits, so that older ones are made again."""
PLACE = "place"
"""Where a row stands in its set, between reading and tokenising."""
PART = 65_536
"""Rows of a file of tokenised ones."""
KEYS = ("group", "letters")
"""Digests of what `lm.data.splits` goes by, likewise, and up to where what is kept is known."""


# ---------------------------------------------------------------- loading


@dataclass(frozen=True)
class Loaded:
    """Untokenised rows with splits, memory-mapped, and what was left out. Control tokens in texts are marked."""

    preferences: Dataset
    references: Dataset
    dropped: dict[str, dict[str, int]]
    """Set ("preferences", "references") -> reason -> rows."""
    first: dict[str, dict[str, list[str]]]
    """Set -> reason -> where the first such rows stand."""
    notes: dict[str, list[str]]
    """Set -> what is said of how it was read, a line each."""
    control: dict[str, dict[str, Any]]
    """Set -> what `Names.report` says of it, where control tokens were found in texts."""
    own_splits: dict[str, dict[str, int]]
    """Set -> name of a split of the set's own -> rows, where there are several, or where they are kept."""
    drawn: list[str]
    """Splits that the preferences lacked, drawn from their training split, where the set's own are kept."""


def load(
    config: DataConfig,
    seed: int,
    folder: Path,
    *,
    world: Path | None = None,
    render: Renderer = plain_chat,
    control: Callable[[], Names] = lambda: Names((), "text"),
) -> Loaded:
    """Reads, splits and counts.

    Args:
        config: which data.
        seed: of the splits and of the limit's draw.
        folder: where the rows are kept; it has to stay as long as they are used.
        world: folder of the generated embedded world, for that kind.
        render: how messages become text.
        control: how control tokens in texts are read, anew for each set; by default none are known.

    Raises:
        ValueError: a row is malformed, or has another number of rewards than the rows before it.
    """
    pairs_path, references_path = config.path, config.sft_path
    if world is not None:
        pairs_path, references_path = str(world / "comparisons.jsonl"), str(world / "sft.jsonl")
    assert pairs_path is not None

    own_rewards = rewards.Reader()
    pairs = _Set("preferences", pairs_path, config, seed, folder, control())

    def pair(row: Row, where: str, render: Renderer) -> Row | Drop:
        label = votes.label_of(row, where)
        if config.kind == "hh":
            kept = hh_pair(row, where)
        elif config.kind != "preferences":
            kept = tldr_pair(row, where, config.prompt_template)
        else:
            kept = preference_pair(row, where, render, pairs.survey.layout)
        if isinstance(kept, Drop):
            return kept
        given = own_rewards(row, where) if config.rewards == "given" else {}
        return {**kept, **given, **label, **messages.stored(kept.get("messages"))}

    columns = {name: Value("string") for name in ("prompt", "chosen", "rejected")}
    if pairs.survey.has_messages:
        columns |= {name: Value("string") for name in messages.STORED}
    if config.kind != "hh":
        columns |= {"confidence": Value("float64"), "worker": Value("string")}
    if config.rewards == "given":
        columns |= {name: Value("float64") for name in rewards.ONE}
        columns |= {name: List(Value("float64")) for name in rewards.MEMBERS}
    of_labels = {**{name: Value("float64") for name in votes.COLUMNS}, votes.REFERENCE: Value("bool")}
    preferences = pairs.read(pair, render, columns | of_labels)
    if config.split == "own":
        preferences = pairs.completed(preferences)
    if config.limit is not None and config.limit < len(preferences):
        rng = np.random.default_rng([seed, 1])
        preferences = preferences.select(sorted(rng.choice(len(preferences), config.limit, replace=False)))
    soft = pairs.labels.any
    best = preferences.filter(bool, input_columns=votes.REFERENCE, keep_in_memory=True) if soft else preferences
    preferences = preferences.remove_columns([votes.REFERENCE, *(() if soft else votes.COLUMNS)])
    if references_path is None:
        names = ["id", "prompt", "split", *KEYS, PLACE, "chosen"]
        references = best.select_columns(names).rename_column("chosen", "completion")
        return _loaded(preferences, references, pairs, None)
    others = _Set("references", references_path, config, seed, folder, control())

    def reference(row: Row, where: str, render: Renderer) -> Row | Drop:
        if config.kind == "preferences":
            return preference_reference(row, where, render, others.survey.layout)
        return tldr_reference(row, where, config.prompt_template)

    references = others.read(reference, render, {name: Value("string") for name in ("prompt", "completion")})
    if config.split == "own" and not others.has_own:
        references = others.beside(references, preferences)
    return _loaded(preferences, references, pairs, others)


class _Set:
    """A set while it is read: what is left out of it, and its own splits."""

    def __init__(self, name: str, path: str, config: DataConfig, seed: int, folder: Path, control: Names) -> None:
        self.name, self.path, self.config, self.seed, self.folder = name, path, config, seed, folder
        self.control = control
        self.dropped, self.own, self.present = Tally(), Counter[str](), Counter[str]()
        self.lacking: list[str] = []
        """Splits that the set has not, where its own are kept."""
        schema = "tldr" if config.kind == "world" else str(config.kind)
        if name == "references":
            schema = "references" if config.kind == "preferences" else "tldr"
        self.survey: Survey = survey(self._rows(votes.Reader()), path, config.prompt, schema)
        self.labels = votes.Reader(config.group_weight)

    def _rows(self, labels: votes.Reader) -> Iterator[tuple[str, Row]]:
        """As they stand in the set; of preferences, with their labels."""
        rows = read_rows(self.path)
        return labels(rows) if self.name == "preferences" else rows

    @property
    def has_own(self) -> bool:
        """Whether a row says which split it is in."""
        return bool(self.own)

    def read(
        self, convert: Callable[[Row, str, Renderer], Row | Drop], render: Renderer, columns: dict[str, Any]
    ) -> Dataset:
        """The rows that `convert` keeps, with these columns and id, split, KEYS and PLACE."""

        def kept() -> Iterator[Row]:
            reading = self.control.reading(convert, render)
            for number, where, raw, row in comparisons(self._rows(self.labels), reading, self.dropped):
                texts = "\0".join(unmarked(row[name]) for name in TEXTS if name in row)
                group = self._group(row)
                split = self._split(group, raw, where)
                self.present[split] += 1
                yield {
                    "id": f"{number}-{hashlib.sha256(texts.encode()).hexdigest()[:12]}",
                    **{name: row.get(name) for name in columns},
                    "split": split,
                    PLACE: where,
                    **dict(zip(KEYS, map(splits.digest, (group, splits.letters(group))), strict=True)),
                }

        more = {name: Value("string") for name in ("split", *KEYS, PLACE)}
        rows = mapped(kept(), {"id": Value("string"), **columns, **more}, self.folder / f"{self.name}.arrow")
        self.control.settle(self.path)
        self.dropped.take(self.labels.left_out)
        return rows

    def _group(self, row: Row) -> str:
        if self.config.kind == "world":  # as its prompts are written in our presets, whose splits stay what they were
            return f"{row['post']}\n\nTL;DR:"
        if self.config.kind == "tldr":  # a post has several prompts, by its titles
            return splits.normalised(row["post"])
        return splits.opening(self.control.messages or unmarked(row["prompt"]))

    def _split(self, group: str, raw: Row, where: str) -> str:
        own = splits.own_split(raw, where, self.path)
        if splits.is_named(own):
            self.own[str(own)] += 1
        if self.config.split == "drawn":
            return split_of(group, self.config, self.seed)
        if own is None and self.name == "references" and not self.has_own:
            return "train"
        return splits.named(own, where)

    def completed(self, rows: Dataset) -> Dataset:
        """With the splits that the set's own lack drawn from its training split."""
        self.lacking = [split for split in splits.HELD_OUT if split not in self.present]
        if not self.lacking:
            return rows
        known = zip(rows["split"][:], rows["group"][:], strict=True)
        return self._with(rows, splits.completed(known, self.lacking, self.config, self.seed))

    def beside(self, rows: Dataset, preferences: Dataset) -> Dataset:
        """References that say no splits: those of prompts which the preferences hold out are held out too."""
        known = zip(preferences["group"][:], preferences["split"][:], strict=True)
        held_out = {group: split for group, split in known if split != "train"}
        return self._with(rows, [held_out.get(group, "train") for group in rows["group"][:]])

    def _with(self, rows: Dataset, found: list[str]) -> Dataset:
        changed = ({**row, "split": split} for row, split in zip(rows, found, strict=True))
        return mapped(changed, rows.features, self.folder / f"{self.name}-split.arrow")

    @property
    def own_splits(self) -> dict[str, int]:
        """Name of a split of the set's own -> rows, where there are several, or where they are kept."""
        return dict(self.own) if len(self.own) > 1 or self.config.split == "own" else {}

    def notes(self) -> list[str]:
        """What is said of how it was read, a line each."""
        lines = [*self.survey.notes, *self.labels.says(), *self.control.notes()]
        lines += scored.of_another_reference(self.survey.columns)
        if self.own_splits:
            named = ", ".join(f"{split} {rows:,}" for split, rows in self.own.items())
            become = "put together and drawn anew" if self.config.split == "drawn" else "kept"
            lines.append(f"the set's own splits ({named} rows) are {become} (data.split)")
        if self.lacking:
            lines.append(f"the set has no {' and no '.join(self.lacking)} split, drawn from its train")
        return lines


def _loaded(preferences: Dataset, references: Dataset, pairs: _Set, others: _Set | None) -> Loaded:
    sets = [each for each in (pairs, others) if each is not None]
    nothing: dict[str, Any] = {"preferences": {}, "references": {}}
    return Loaded(
        preferences,
        references,
        nothing | {each.name: dict(each.dropped) for each in sets},
        nothing | {each.name: each.dropped.first for each in sets},
        {"preferences": [], "references": []} | {each.name: each.notes() for each in sets},
        {each.name: found for each in sets if (found := each.control.report()) is not None},
        {each.name: each.own_splits for each in sets if each.own_splits},
        pairs.lacking,
    )


def mapped(rows: Iterable[Row], features: Mapping[str, Any], path: Path) -> Dataset:
    """Writes rows to an Arrow file as they come, and opens it memory-mapped."""
    with ArrowWriter(path=str(path), features=Features(features)) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    return Dataset.from_file(str(path))


def standing_twice(preferences: Dataset, references: Dataset) -> dict[str, dict[str, int]]:
    """Prompts that the preferences hold out and that stand in training too, as of `lm.data.splits.crossing`."""

    def keys(rows: Dataset, split: str) -> list[npt.NDArray[np.bytes_]]:
        of_split = rows.select(rows_where(rows, "split", [split]))
        return [np.array(column(of_split, name).to_numpy(), dtype="S16") for name in KEYS]

    training = [
        np.concatenate(both) for both in zip(*(keys(r, "train") for r in (preferences, references)), strict=True)
    ]
    return splits.crossing(training, {split: keys(preferences, split) for split in splits.HELD_OUT})


def twice_in_words(crossing: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The same in words, a line where there is something to say."""
    return [
        f"{split}: {count[what]:,} of {count['prompts']:,} prompts stand in the training split as well{but}"
        for split, count in crossing.items()
        for what, but in (("in_training", ""), ("nearly", ", but for digits, punctuation and white space"))
        if count[what]
    ]


# ---------------------------------------------------------------- tokenising


def prompt_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of prompts, after what the tokenizer puts before a text; one that begins with it already, as chat
    templates write it, gets no second one. What the tokenizer puts after a text is left out: an end of the prompt would
    be the end of everything."""
    before = _put_before(tokenizer, texts)
    ids = token_ids(tokenizer, texts)
    return [prompt if prompt[: len(before)] == before else [*before, *prompt] for prompt in ids]


def _put_before(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    """The token ids that the tokenizer puts before every text, as the first of these shows that is not empty."""
    for text in map(unmarked, texts):
        bare, whole = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True))
        if bare:  # the last place: a text may itself begin with what is put before it
            return max((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), key=len, default=[])
    return []


def completion_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of completions, which end with end-of-text, once; white space after one that is there is left out."""
    end = tokenizer.eos_token_id
    ids = token_ids(tokenizer, [bare if (bare := t.rstrip()).endswith(str(tokenizer.eos_token)) else t for t in texts])
    return [completion if completion[-1:] == [end] else [*completion, end] for completion in ids]


def ends_early(completion: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether end-of-text stands inside a completion: a row with such a one is left out."""
    return tokenizer.eos_token_id in completion[:-1]


EARLY = "end-of-text inside a completion"


def _placed(
    ids: Callable[[PreTrainedTokenizerBase, list[str]], list[list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    different: list[str],
    texts: list[str],
    places: list[str],
) -> list[list[int]]:
    """Ids of the different texts among these; a ValueError says where the text stands."""
    try:
        return ids(tokenizer, different)
    except ValueError:
        for text, place in zip(texts, places, strict=True):
            try:
                ids(tokenizer, [text])
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
        raise


def too_long(prompt: int, completion: int, config: DataConfig) -> str | None:
    """Why a row is left out whose prompt and longer completion have so many tokens; None where it is not."""
    longest_prompt, longest_completion = config.limits
    if prompt > longest_prompt:
        return f"prompt longer than {longest_prompt} tokens"
    if completion > longest_completion:
        return f"completion longer than {longest_completion} tokens"
    return None


def tokenise(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    path: Path,
    dropped: Tally | None = None,
    splits_needed: Sequence[str] | None = None,
) -> tuple[Dataset, dict[str, int]]:
    """`with_ids`, and of these the rows that are `within` the limits; with the counts of dropped rows by reason."""
    dropped = Tally() if dropped is None else dropped
    return within(with_ids(rows, tokenizer, path), tokenizer, config, dropped, splits_needed), dict(dropped)


def with_ids(rows: Dataset, tokenizer: PreTrainedTokenizerBase, folder: Path, what: str = "tokenising") -> Dataset:
    """Adds `<column>_ids` for the prompt and each completion. Nothing is cut.

    The rows are kept in files of PART rows in this folder. Each is whole or absent, and is found again by what it was
    made of: a run that broke goes on where it was.
    """
    if not len(rows):
        return rows
    columns = [name for name in TEXTS if name in rows.column_names]
    features = Features({**rows.features, **{f"{name}_ids": List(Value("int32")) for name in columns}})
    folder.mkdir(parents=True, exist_ok=True)
    own = f"{tokenizer.backend_tokenizer.to_str()}{FORM}" if tokenizer.is_fast else None
    parts = []
    with progress.bar(what, total=len(rows)) as bar:
        for number, start in enumerate(range(0, len(rows), PART)):
            part = rows.select(range(start, min(start + PART, len(rows))))
            made_of = hashlib.sha256("\0".join([str(own), *part["id"][:]]).encode()).hexdigest()
            path = folder / f"{number:05}-{made_of[:12]}.arrow"
            if own is None or not path.exists():
                with replacing(path) as temporary:
                    written(_tokenised(part, tokenizer, columns, bar), features, temporary)
            else:
                bar.update(len(part))
            parts.append(Dataset.from_file(str(path)))
    return concatenate_datasets(parts)


def _tokenised(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, columns: Sequence[str], bar: Any
) -> Iterator[pyarrow.Table]:
    for table in tables(rows, rows=BATCH):
        places = table[PLACE if PLACE in table.column_names else "id"].to_pylist()
        for name in columns:
            texts = table[name].to_pylist()
            different = list(dict.fromkeys(texts))  # a prompt often stands in several rows, one after the other
            how = prompt_ids if name == "prompt" else completion_ids
            found = dict(zip(different, _placed(how, tokenizer, different, texts, places), strict=True))
            ids = Rows.from_lists([found[text] for text in texts]).arrow()
            if any(MARK in text for text in different):
                plain = pyarrow.array(map(unmarked, texts), pyarrow.string())
                table = table.set_column(table.column_names.index(name), name, plain)
            table = table.append_column(f"{name}_ids", ids)
        bar.update(len(table))
        yield table


def ids_of_chosen(references: Dataset, pairs: Dataset) -> Dataset:
    """Reference completions that are the chosen sides of pairs, with the ids which these have from `with_ids`."""
    rows = pairs.select(places_of(column(references, "id"), column(pairs, "id")))
    names = {"chosen": "completion", "chosen_ids": "completion_ids"}
    kept = [*(name for name in references.column_names if name not in names.values()), "prompt_ids", *names]
    return rows.select_columns(kept).rename_columns(names)


def within(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    dropped: Tally,
    splits_needed: Sequence[str] | None = None,
) -> Dataset:
    """The rows of `with_ids` that are not over-long and do not end early; the others are counted in `dropped`, by
    reason, with where they stand. Raises ValueError where no row is left of a split that is needed: of train, valid and
    test for pairs, of train for references, or of `splits_needed`."""
    sides = [name for name in COMPLETIONS if name in rows.column_names]
    early = np.zeros(len(rows), dtype=bool)
    none = np.zeros(0, dtype=np.int64)
    prompts, completions = (sizes(rows, "prompt_ids"), longest_completion(rows)) if len(rows) else (none, none)
    for name in sides if len(rows) else ():
        early |= _early(rows, f"{name}_ids", tokenizer.eos_token_id)
    left = early | (prompts > config.limits[0]) | (completions > config.limits[1])
    for row in np.flatnonzero(left).tolist():
        reason = EARLY if early[row] else too_long(int(prompts[row]), int(completions[row]), config)
        assert reason is not None
        dropped.add(reason, rows[row][PLACE if PLACE in rows.column_names else "id"])
    kept = rows.select(np.flatnonzero(~left)) if left.any() else rows
    before, present = (counted(each, "split") for each in (rows, kept))
    what = "preference pairs" if "chosen" in sides else "reference completions"
    known = splits.SPLITS if "chosen" in sides else ("train",)
    for split in known if splits_needed is None else splits_needed:
        if not present[split]:
            raise ValueError(
                f"no {what} are left in the {split} split: {splits.why_empty(split, before, dict(dropped))}"
            )
    return kept.remove_columns([PLACE]) if PLACE in kept.column_names else kept


def longest_completion(rows: Dataset) -> Ints:
    """[N], tokens of the longer completion of each of the rows of `with_ids`."""
    lengths = [sizes(rows, f"{name}_ids") for name in COMPLETIONS if name in rows.column_names]
    return np.max(lengths, axis=0) if lengths else np.empty(0, dtype=np.int64)


def _early(rows: Dataset, name: str, end: int) -> npt.NDArray[np.bool_]:
    """[N], whether end-of-text stands in a completion before its end."""
    found = [np.empty(0, dtype=bool)]
    for table in tables(rows, [name]):
        ids = Rows.of_table(table, name)
        inside = ids.flat == end
        inside[ids.ends[1:] - 1] = False  # no completion is empty
        before = np.concatenate([[0], np.cumsum(inside)])
        found.append(before[ids.ends[1:]] > before[ids.ends[:-1]])
    return np.concatenate(found)
