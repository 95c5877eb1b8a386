"""Options that a run would pass over: refused where they were given for it, said where a file brings them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm.base import hosts, progress
from lm.base.documents import Document
from lm.config import Config
from lm.objectives import METHODS, option_of

STUDY = "lm.nondeterministic"
"""The command that reads options of its own."""


def idle(config: Config, command: str) -> Iterator[tuple[str, str]]:
    """(option or group of options, why) of all that this command's run of these options does not read."""
    data, methods = config.data, ", ".join(config.methods)
    settings = [method for name in config.methods for method in config.settings(name)]
    for name in METHODS:
        if name not in config.methods:
            yield option_of(name), f"methods are {methods}"
    for name in config.methods:
        for option in _replaced_by_all(config.sweep.get(name, [])):
            yield f"{option_of(name)}.{option}", f"every setting of {name} in sweep replaces it"
    for name in config.sweep:
        if name not in config.methods:
            yield f"sweep.{name}", f"methods are {methods}"
    if data.kind != "world":
        yield "data.world", f"data.kind is {data.kind}"
        if data.kind != "tldr":
            yield "data.prompt_template", f"data.kind is {data.kind}"
    if data.on_policy.pairs is None:
        yield "data.on_policy.completions", "data.on_policy.pairs is null"
    if not any(method.needs and not method.reads_labels and method.own_oracle is None for method in settings):
        yield "data.unlabelled", f"methods are {methods}, which learn from labels"
    if data.rewards != "models":
        why = f"data.rewards is {data.rewards}: no ensemble is trained"
        yield from ((f"bias.{name}", why) for name in ("member_fractions", "member_size"))
    if not any(method.own_oracle is not None for method in settings):
        if data.rewards != "models":
            yield "reward", f"data.rewards is {data.rewards}: no reward model is trained"
        elif not any(method.needs for method in settings):
            yield "reward", f"methods are {methods}, which distil no rewards"
    if config.oracle_model is not None:
        yield from ((name, "oracle_model is given: none is trained") for name in ("oracle", "oracle_base"))
    if config.judge.kind == "exact":
        yield from ((name, "judge.kind is exact: no oracle is trained") for name in ("oracle", "oracle_base"))
    else:
        yield from ((f"judge.{name}", "judge.kind is model") for name in ("utility", "length_preference"))
    if data.labels == "given":
        yield "judge.sharpness", "data.labels is given: the judge labels no pairs"
    for stage in ("oracle", "reward"):
        training = getattr(config, stage)
        why = f"{stage}.evaluations is 0: the last step is kept" if training.evaluations == 0 else ""
        if training.train == "head" and not training.has_steps:
            why = f"{stage}.train is head: there is no step to keep"
        if why:
            yield from ((f"{stage}.{name}", why) for name in ("evaluation_pairs", "patience"))
    if config.lora.rank is None:
        yield from ((f"lora.{name}", "lora.rank is null") for name in ("alpha", "target_modules", "stages"))
    if config.probe.pairs == 0:
        yield "probe.times", "probe.pairs is 0"
    one_each = all(len(config.settings(name)) == 1 for name in config.methods)
    if one_each:
        yield "train_together", "there is one setting a method, and nothing to train beside it"
    if one_each and config.snapshots == 1 and config.evaluation.best_of is None:
        yield "evaluation.valid_prompts", "there is one setting and one snapshot a method, and nothing to choose from"
    if config.sampling.engine == "vllm":
        yield "sampling.batch_size", "sampling.engine is vllm, which schedules by itself"
    if not any(method.needs_samples for method in settings):
        yield "sampling.reference_samples", f"methods are {methods}, of which none has a KL term by samples of pi_ref"
    if not hosts.several():
        yield "host_timeout", "one machine runs it"
    if command != STUDY:
        yield from ((f"evaluation.{name}", f"only {STUDY} reads it") for name in ("temperatures", "out_of_domain"))
    elif config.evaluation.out_of_domain.path is not None or data.kind != "world":
        yield "evaluation.out_of_domain.events", "it is of the embedded world's own posts"
    else:
        yield "evaluation.out_of_domain.prompt_template", "it is of articles of evaluation.out_of_domain.path"


def in_force(config: Config) -> str:
    """What a run of a set that is read does with it, in one line."""
    data, rho = config.data, config.bias.rho
    limits = {"prompts": data.max_prompt_length, "completions": data.max_completion_length}
    rewards = {
        "models": "rewards of models that are trained on it",
        "given": "the set's own rewards",
        "oracle": "the judge's own rewards",
    }
    return "; ".join(
        (
            f"{data.path}: "
            + ("the set's own labels" if data.labels == "given" else "every pair labelled again by the oracle"),
            "no bias is drawn" if rho is None else f"pairs drawn so that {rho:.0%} prefer the longer completion",
            *(
                f"{what} of {'a length that 99% of the rows have' if most is None else f'at most {most:,} tokens'}"
                for what, most in limits.items()
            ),
            *([f"pairs of pi_ref {data.on_policy.pairs} those of the training split"] if data.on_policy.pairs else []),
            rewards[data.rewards],
            *(["unlabelled pairs for methods that distil"] if data.unlabelled.is_asked else []),
            f"methods {', '.join(config.methods)}",
            f"model {config.model}",
        )
    )


def _replaced_by_all(settings: Sequence[Mapping[str, Any]]) -> set[str]:
    """Options that every setting names, dotted."""
    named = [set(_leaves(setting)) for setting in settings]
    return set.intersection(*named) if named else set()


def _leaves(group: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for name, value in group.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def check(
    config: Config,
    command: str,
    given: Mapping[str, Any],
    documents: Sequence[Document],
    defaults: Mapping[str, Any],
) -> None:
    """Raises ValueError for an option of the command line that has no effect in this run, and for one of a file that a
    sweep of the run replaces everywhere. What else a file holds for other runs is said, where it is no default.

    Args:
        config: the run.
        command: its module.
        given: options of the command line, by name; a mapping for a group that was given whole.
        documents: the files that are the user's own.
        defaults: of options, by name.
    """
    passed_over = dict(idle(config, command))
    for name, value in given.items():
        for option in [f"{name}.{own}" for own in _leaves(value)] if isinstance(value, Mapping) else [name]:
            if (idly := _within(option, passed_over)) is not None:
                raise ValueError(f"--{option} has no effect: {passed_over[idly]}")
    found = dict[str, str]()
    for document in documents:
        for option in _leaves(document.values):
            idly = _within(option, passed_over)
            if idly is None or document.value(option) == defaults.get(option, ...):
                continue
            if "in sweep" in passed_over[idly]:
                raise ValueError(f"{document.where(option)}: {option} has no effect: {passed_over[idly]}")
            found.setdefault(idly, passed_over[idly])
    for option, why in found.items():
        progress.say(f"without effect in this run: {option}, as {why}")


def _within(option: str, groups: Mapping[str, str]) -> str | None:
    """Which of these options or groups one is, or is in."""
    return next((group for group in groups if option == group or option.startswith(f"{group}.")), None)
