"""Pairs without labels, which reward models score and methods that distil learn from, beside D_rho; [F] 5.1."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from lm.base import progress, ranks
from lm.base.store import Artifact
from lm.config import Kind, OnPolicyConfig
from lm.data import places, splits, votes
from lm.data.control_tokens import Names, unmarked
from lm.data.messages import STORED, is_messages
from lm.data.rewards import ORACLE
from lm.data.rows import read_rows, shown
from lm.data.templates import chat_renderer
from lm.data.tokens import KEYS, load, prompt_ids, tokenise
from lm.objectives import Method
from lm.stages.data import opened, save, sized, tokenizer
from lm.stages.labels import judge_pairs, labelled_pairs, labels, oracle_input
from lm.stages.run import Run, once
from lm.stages.sampled import IDS, TEXTS, Prompts, prompts_in, sampled_pairs, some
from lm.stages.trainings import sft

PAIRS = "unlabelled"
"""Of ids, and of folders."""


def distils_unlabelled(run: Run, method: Method) -> bool:
    """Whether a method learns from unlabelled pairs: there are some, and its loss reads rewards and no labels."""
    asked = run.config.data.unlabelled.is_asked
    return asked and bool(method.needs) and not method.reads_labels and method.own_oracle is None


@once
def unlabelled(run: Run) -> Artifact:
    """The pairs, with texts and tokens, what each weighs, and the judge's rewards where these are distilled.

    Prompts that stand in the validation or the test split are left out, and counted: as they are spelt, but for case,
    white space, digits and punctuation.
    """
    options, kept_out = run.config.data.unlabelled, _held_out(run)

    def make(folder: Path, scratch: Path) -> dict[str, Any]:
        if options.completions is None:
            pairs, report = _pairs(run, scratch)
        else:
            every = prompts_in(labelled_pairs(run, "train")) if options.path is None else _prompts(run, options.path)
            prompts = {text: of for text, of in every.items() if _spelt(text) not in kept_out}
            few = some(prompts, options.prompts, run.seed(PAIRS, "prompts"), "data.unlabelled.prompts")
            file = scratch / f"sampled-{ranks.index()}.arrow"
            pairs, found = sampled_pairs(run, few, options.completions, PAIRS, file)
            report = {"held_out": len(every) - len(prompts), "prompts": len(few), **found}
        if report["held_out"] and ranks.is_first():
            what = "pairs" if options.completions is None else "prompts"
            progress.say(f"  unlabelled: {report['held_out']:,} {what} are left out, of prompts that are held out")
        pairs = pairs.flatten_indices(keep_in_memory=True)
        if run.config.data.rewards == "oracle":
            first, second, told = judge_pairs(run, pairs, are_the_sets=False)
            for name, side in zip(ORACLE, (first, second), strict=True):
                pairs = pairs.add_column(name, side.tolist())
            report |= told
        save(pairs, folder / PAIRS)
        return report

    inputs: dict[str, Any] = {
        "unlabelled": replace(options, path=None),
        "content": run.content(options.path, "dataset"),
        "labels": labels(run),
        "policy": sft(run),
        "sampling": run.config.sampling,
        "group_weight": run.config.data.group_weight,
        "seed": run.seed(PAIRS),
    }
    if run.config.data.rewards == "oracle":
        inputs["oracle"] = oracle_input(run)
    return run.store.get(PAIRS, "pairs", inputs, make)


def _spelt(prompt: str) -> str:
    return splits.letters(splits.opening(prompt))


def _held_out(run: Run) -> set[str]:
    return {_spelt(text) for split in ("valid", "test") for text in set(labelled_pairs(run, split)["prompt"][:])}


def _prompts(run: Run, path: str) -> Prompts:
    """Of a file of rows with `prompt`, text or messages; longer ones than data.max_prompt_length are left out."""
    places.check(path, option="data.unlabelled.path")
    words, limit = tokenizer(run), sized(run).data.limits[0]
    names, render = Names.by(words, run.config.data.control_tokens), chat_renderer(words, run.config.model)

    def written() -> Iterator[tuple[str, dict[str, str]]]:
        for where, row in read_rows(path):
            prompt = row.get("prompt")
            if is_messages(prompt):
                messages = list(prompt or ())
                text = render(names.mark_all(messages, where), {"role": "assistant", "content": "."}, where)[0]
                yield text, {STORED[0]: json.dumps(messages, ensure_ascii=False)}
            elif isinstance(prompt, str) and prompt.strip():
                yield prompt, {}
            else:
                raise ValueError(
                    f"{where}: data.unlabelled.path needs a prompt, text or messages, in each row; got {shown(prompt)} "
                    f"among the columns {shown(sorted(row))}"
                )

    every = dict(written())
    found = zip(every.items(), prompt_ids(words, list(every)), strict=True)
    return {unmarked(text): (ids, asked) for (text, asked), ids in found if 0 < len(ids) <= limit}


def _pairs(run: Run, scratch: Path) -> tuple[Dataset, dict[str, Any]]:
    """Of the file of pairs, whose labels are not kept, and how many there are, and are held out. ValueError where none
    is left."""
    options, config, words = run.config.data.unlabelled, sized(run).data, tokenizer(run)
    scratch = scratch / f"rank-{ranks.index()}"  # all of them read the file
    scratch.mkdir(exist_ok=True)
    assert options.path is not None, "the options were checked"
    places.check(options.path, option="data.unlabelled.path")
    kind: Kind = "hh" if config.kind == "hh" else "preferences"
    changed: dict[str, Any] = {
        "kind": kind,
        "path": options.path,
        "sft_path": None,
        "limit": None,
        "split": "drawn",
        "prompt": "auto",
    }
    own = replace(config, **changed, labels="given", rewards="models", on_policy=OnPolicyConfig(), reward_noise=0.0)
    loaded = load(
        own,
        run.config.seed,
        scratch,
        render=chat_renderer(words, run.config.model),
        control=lambda: Names.by(words, config.control_tokens),
    )
    read = loaded.preferences.remove_columns(["split", *KEYS]).add_column("split", ["train"] * len(loaded.preferences))
    rows, _ = tokenise(read, words, own, scratch / "pairs.arrow", splits_needed=("train",))
    kept_out, texts = _held_out(run), rows["prompt"][:]
    kept = [i for i, text in enumerate(texts) if _spelt(text) not in kept_out]
    if not kept:
        raise ValueError(f"data.unlabelled.path: validation or test has the prompts of all pairs of {options.path}")
    few = some(prompts_in(rows.select(kept)), options.prompts, run.seed(PAIRS, "prompts"), "data.unlabelled.prompts")
    pairs = rows.select([i for i in kept if texts[i] in few])
    columns = [name for name in (*TEXTS, *IDS, votes.WEIGHT, *STORED) if name in pairs.column_names]
    ids = [f"{PAIRS}-{row}" for row in pairs["id"][:]]
    named = pairs.select_columns(columns).flatten_indices(keep_in_memory=True).add_column("id", ids)
    return named, {"held_out": len(rows) - len(kept), "prompts": len(few), "pairs": len(pairs)}


def rows_of(run: Run) -> Dataset:
    """The pairs."""
    return opened(unlabelled(run).path / PAIRS)
