"""Pairs that pi_ref samples: on-policy ones, which the judge labels, and unlabelled ones, which only rewards order.

Of K completions of a prompt all pairs are taken, and weigh together as much as one pair (`data.group_weight`), as the
groups of a set do. A completion that was cut off before end-of-text is in no pair, and one drawn twice counts once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, List, Value

from lm.base import progress, ranks
from lm.data import votes
from lm.data.messages import STORED
from lm.data.tokens import mapped
from lm.judging.reading import sample_text
from lm.logprobs.sampling import sample_completions
from lm.models.opening import open_policy
from lm.stages.data import sized, tokenizer
from lm.stages.run import Run
from lm.stages.trainings import sft

Prompts = Mapping[str, tuple[Sequence[int], Mapping[str, Any]]]
"""Text -> token ids, and the values of the columns of STORED that say what it asks; none where it is text."""
TEXTS, IDS = ("prompt", "chosen", "rejected"), ("prompt_ids", "chosen_ids", "rejected_ids")


def prompts_in(pairs: Dataset) -> Prompts:
    """Of these pairs."""
    asked = [name for name in (STORED[0], STORED[3]) if name in pairs.column_names]
    columns = (pairs[name][:] for name in ("prompt", "prompt_ids", *asked))
    return {text: (ids, dict(zip(asked, more, strict=True))) for text, ids, *more in zip(*columns, strict=True)}


def some(prompts: Prompts, count: int | None, seed: int, option: str) -> Prompts:
    """So many, drawn by the seed, in their order; all for None. ValueError, which names the option, where there are
    fewer."""
    if count is None:
        return prompts
    if count > len(prompts):
        raise ValueError(
            f"{option} is {count:,}, but there are only {len(prompts):,} prompts; lower it, or null for all"
        )
    texts, kept = list(prompts), np.random.default_rng(seed).choice(len(prompts), count, replace=False)
    return {texts[i]: prompts[texts[i]] for i in sorted(kept)}


def sampled_pairs(run: Run, prompts: Prompts, each: int, name: str, path: Path) -> tuple[Dataset, dict[str, int]]:
    """All pairs of completions that pi_ref samples, with TEXTS, IDS, id, split (train), votes.WEIGHT, and the columns
    of STORED where prompts have them; kept in the file `path`. And what became of the samples: "samples", "unfinished",
    "repeated", "groups" of two or more, "pairs".

    Which side is called chosen means nothing.

    Args:
        run: the run.
        prompts: what is asked.
        each: K, 2 or more completions a prompt.
        name: of these pairs, in their ids, and of the draw.
        path: of the file.

    Raises:
        ValueError: no prompt has two completions that differ and ended.
    """
    words, count = tokenizer(run), Counter[str]()
    policy = open_policy(sft(run).path, words, sized(run))
    repeated = [list(ids) for ids, _ in prompts.values() for _ in range(each)]
    samples = sample_completions(policy, repeated, words, sized(run), seed=run.seed(name), what=f"{name} samples")
    stored = any(STORED[0] in more for _, more in prompts.values())

    def rows() -> Iterator[dict[str, Any]]:
        for i, (prompt, (ids, more)) in enumerate(prompts.items()):
            drawn = samples[i * each : (i + 1) * each]
            ended = [tuple(sample) for sample in drawn if sample[-1] == words.eos_token_id]
            group = list(dict.fromkeys(ended))
            count.update(samples=each, unfinished=each - len(ended), repeated=len(ended) - len(group))
            pairs = list(combinations(group, 2))
            count.update(groups=bool(pairs), pairs=len(pairs))
            weight = 1.0 if run.config.data.group_weight == "pair" else 1 / max(len(pairs), 1)
            for k, both in enumerate(pairs):
                texts = [sample_text(words, list(ids), list(one)) for one in both]
                row = {"id": f"{name}-{i}-{k}", "split": "train", votes.WEIGHT: weight}
                row |= dict(zip(TEXTS, (prompt, *texts), strict=True))
                row |= dict(zip(IDS, (list(ids), *map(list, both)), strict=True))
                if stored:
                    row |= dict.fromkeys(STORED) | dict(more)
                    if row[STORED[0]] is not None:
                        row |= {column: _reply(text) for column, text in zip(STORED[1:3], texts, strict=True)}
                yield row

    columns = {"id": Value("string"), "split": Value("string"), votes.WEIGHT: Value("float64")}
    columns |= {column: Value("string") for column in (*TEXTS, *(STORED if stored else ()))}
    made = mapped(rows(), columns | {column: List(Value("int32")) for column in IDS}, path)
    if not len(made):
        raise ValueError(
            f"{name}: pi_ref's {count['samples']:,} samples make no pair: {count['unfinished']:,} were cut off, "
            f"{count['repeated']:,} repeat another; raise data.max_completion_length, or train pi_ref until it ends"
        )
    if ranks.is_first():
        progress.say(
            f"  {name}: {count['pairs']:,} pairs of {count['groups']:,} of {len(prompts):,} prompts; of "
            f"{count['samples']:,} samples {count['unfinished']:,} were cut off, {count['repeated']:,} repeat another"
        )
    return made, {key: count[key] for key in ("samples", "unfinished", "repeated", "groups", "pairs")}


def _reply(text: str) -> str:
    return json.dumps([{"role": "assistant", "content": text}], ensure_ascii=False)


def together(one: Dataset, other: Dataset) -> Dataset:
    """Rows of both; a column that one lacks is null there, and a weight 1."""
    features = {**one.features, **other.features}

    def filled(rows: Dataset) -> Dataset:
        for name, kind in features.items():
            if name not in rows.column_names:
                value = 1.0 if name == votes.WEIGHT else None
                rows = rows.add_column(name, [value] * len(rows), feature=kind)
        return rows.select_columns(list(features))

    both = [filled(rows.flatten_indices(keep_in_memory=True)) for rows in (one, other)]
    return datasets.concatenate_datasets([rows.cast(datasets.Features(features)) for rows in both])
