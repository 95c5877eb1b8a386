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
from lm.data.rows import Tally, left_out, read_rows, shown
from lm.data.schemas import Drop
from lm.data.templates import chat_renderer
from lm.data.tokens import KEYS, load, prompt_ids, tokenise
from lm.logprobs.sampling import in_keys
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
            left = Tally()
            every = prompts_in(labelled_pairs(run, "train")) if options.path is None else _prompts(run, left)
            _say_left_out(left)
            prompts = {text: of for text, of in every.items() if _spelt(text) not in kept_out}
            if not prompts:
                raise ValueError(
                    f"data.unlabelled.path: no prompt of {options.path} is left: {sum(left.values()):,} are left out, "
                    f"and {len(every):,} stand in the validation or the test split"
                )
            few = some(prompts, options.prompts, run.seed(PAIRS, "prompts"), "data.unlabelled.prompts")
            file = scratch / f"sampled-{ranks.index()}.arrow"
            pairs, found = sampled_pairs(run, few, options.completions, PAIRS, file)
            report = {"held_out": len(every) - len(prompts), "prompts": len(few), "dropped": dict(left), **found}
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
        "sampling": in_keys(run.config.sampling),
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


def _say_left_out(left: Tally) -> None:
    if ranks.is_first():
        for line in left_out(left, left.first):
            progress.say(f"  unlabelled: {line}")


def _prompts(run: Run, left: Tally) -> Prompts:
    """Of a file of rows with `prompt`, text or messages, read as the set's own (`data.control_tokens`); those that are
    left out, as longer than data.max_prompt_length, are counted."""
    path = run.config.data.unlabelled.path
    assert path is not None, "asked for where it is given"
    places.check(path, option="data.unlabelled.path")
    words, limit = tokenizer(run), sized(run).data.limits[0]
    names, render = Names.by(words, run.config.data.control_tokens), chat_renderer(words, run.config.model)

    def written() -> Iterator[tuple[str, tuple[str, dict[str, str]]]]:
        for where, row in read_rows(path):
            prompt, asked = row.get("prompt"), dict[str, str]()
            if is_messages(prompt):
                messages = list(prompt or ())
                asked = {STORED[0]: json.dumps(messages, ensure_ascii=False)}
                prompt = names.prompt(messages, render, where)
            elif not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(
                    f"{where}: data.unlabelled.path needs a prompt, text or messages, in each row; got {shown(prompt)} "
                    f"among the columns {shown(sorted(row))}"
                )
            read = names.row({"prompt": prompt}, where, rendered=bool(asked))
            if isinstance(read, Drop):
                left.add(read.reason, where)
            else:
                yield read["prompt"], (where, asked)

    every = dict(written())
    names.settle(path)
    found: dict[str, tuple[list[int], dict[str, str]]] = {}
    for (text, (where, asked)), ids in zip(every.items(), prompt_ids(words, list(every)), strict=True):
        if 0 < len(ids) <= limit:
            found[unmarked(text)] = ids, asked
        else:
            left.add(f"prompt longer than {limit} tokens" if ids else "empty prompt", where)
    return found


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
    left = Tally()
    rows, _ = tokenise(read, words, own, scratch / "pairs", left, splits_needed=("train",))
    for reason, count in loaded.dropped["preferences"].items():
        left[reason] += count
    left.first |= loaded.first["preferences"]
    _say_left_out(left)
    if ranks.is_first():
        for line in loaded.notes["preferences"]:
            progress.say(f"  unlabelled: {line}")
    kept_out, texts = _held_out(run), rows["prompt"][:]
    kept = [i for i, text in enumerate(texts) if _spelt(text) not in kept_out]
    if not kept:
        raise ValueError(f"data.unlabelled.path: validation or test has the prompts of all pairs of {options.path}")
    few = some(prompts_in(rows.select(kept)), options.prompts, run.seed(PAIRS, "prompts"), "data.unlabelled.prompts")
    pairs = rows.select([i for i in kept if texts[i] in few])
    columns = [name for name in (*TEXTS, *IDS, votes.WEIGHT, *STORED) if name in pairs.column_names]
    ids = [f"{PAIRS}-{row}" for row in pairs["id"][:]]
    named = pairs.select_columns(columns).flatten_indices(keep_in_memory=True).add_column("id", ids)
    report = {"held_out": len(rows) - len(kept), "prompts": len(few), "pairs": len(pairs)}
    return named, {**report, "dropped": dict(left)}


def rows_of(run: Run) -> Dataset:
    """The pairs."""
    return opened(unlabelled(run).path / PAIRS)
