"""Will a model work here, exactly? Every check of the trainer, and what takes longer, of a model that someone brings.

The model is opened as a training would open it, with its weights where memory allows, else as a small copy of its
config: a few layers of random weights, in which each kind of its layers shows.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lm.config import Config, DataConfig, LoraConfig, TrainingConfig
from lm.logprobs.completions import CompletionModel, collate
from lm.logprobs.definition import examples_of, vocabulary_of
from lm.logprobs.generation import STEPS, Generation, generation_of
from lm.logprobs.kernels import free_memory
from lm.logprobs.trial import ROUNDING, RouteReport, route_report
from lm.models import checks, noise
from lm.models.checks import Check
from lm.models.heads import ensure_reward_class, without_weights
from lm.models.loading import SCRATCH, check_model, load_policy, load_tokenizer
from lm.models.opening import device_named
from lm.models.weights import open_weights, opened_without_weights
from lm.studies.architectures import build, small

COPIES = 5
"""Times the parameters in float32 that are held at most: the weights, a copy for the trial, three gradients."""
ROOM = 0.8
"""Share of the free memory that may be taken."""
NOT_TAKEN = "not the route that is taken"
TEXTS = ("What is it? It is what it is.", "Who has seen it? Nobody has, and nobody will.")
"""For a tokenizer from scratch."""


@dataclass
class Report:
    """What was found of a model."""

    model: str
    opened: str = "not at all"
    """As what: whole, or as a small copy of its config, and why."""
    route: str | None = None
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all checks hold."""
        return all(check.ok for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no number that is not finite."""
        given = asdict(self)
        for check in given["checks"]:
            for name in ("value", "limit"):
                if isinstance(check[name], float) and not math.isfinite(check[name]):
                    check[name] = str(check[name])
        return given

    @contextmanager
    def row(self, name: str) -> Iterator[None]:
        """Inside checks are added. What a model raises there, of whatever kind, is a check that does not hold."""
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split())
            said = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
            self.checks.append(Check(name, False, None, None, said))


def examine(
    spec: str,
    *,
    reward_model: bool = False,
    tokens: int | None = None,
    copy: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Report:
    """Every check of one model.

    Args:
        spec: hub name, local folder, or "scratch:tiny".
        reward_model: whether it is to judge, and not to be trained.
        tokens: of the longest row tried; None for 64, or more where a window of the model is longer, up to what a run
            has by default.
        copy: whether a small copy is enough, also where the model would fit.
        device: "auto" (accelerator if there is one), or "cpu".
        trust_remote_code: let a model run its own code.

    Raises:
        ValueError: there is no such model, or it has no config or no tokenizer, or fewer positions than `tokens`.
    """
    with quiet_routes():
        return _examined(Report(spec), reward_model, tokens, copy, device_named(device), trust_remote_code)


def _examined(
    report: Report, reward_model: bool, tokens: int | None, copy: bool, target: torch.device, trust_remote_code: bool
) -> Report:
    spec = report.model
    auto = AutoModelForSequenceClassification if reward_model else AutoModelForCausalLM
    folder = _folder_of(spec, trust_remote_code)
    if folder is None:
        tokenizer = load_tokenizer(spec, TEXTS, trust_remote_code)
        model = load_policy(spec, tokenizer, _run_of(spec, trust_remote_code))
        report.opened = f"from scratch, {_size(model)}"
        report.checks.append(Check("weights complete", True, "drawn at random", "nothing missing", ""))
    else:
        report.checks.append(checks.no_adapter(folder))
        if not (folder / "config.json").is_file() and not report.ok:
            return report
        config = _config_of(spec, folder, trust_remote_code)
        if tokens is not None and (room := _positions_of(config)) is not None and tokens > room:
            raise ValueError(
                f"--tokens {tokens} is more than the {room} positions of model {spec!r}; give at most these"
            )
        report.checks += [checks.not_quantised(config), checks.weights_whole(folder)]
        tokenizer = load_tokenizer(str(folder), (), trust_remote_code, needs_end=False)
        found = _opened(report, auto, folder, config, tokenizer, copy, target, trust_remote_code)
        if found is None:
            return report
        model = found
    noise.turn_off(model)
    _measure(report, model.to(target), tokens or _row_of(model.config))
    report.checks.append(_end_token(tokenizer, folder))
    if reward_model:
        report.checks.append(checks.reward_head(model))
    else:
        _possible(report, model)
    return report


@contextmanager
def quiet_routes() -> Iterator[None]:
    """Inside nothing is said of the route that a model takes, nor warned of: a table says it."""
    routes = logging.getLogger("lm.logprobs")
    before = routes.level
    routes.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        routes.setLevel(before)


# ---------------------------------------------------------------- opening


def _folder_of(spec: str, trust_remote_code: bool) -> Path | None:
    """Where the model's files are, a hub's after they are downloaded; None for one from scratch."""
    if Path(spec).is_dir():
        return Path(spec)
    check_model(spec, trust_remote_code)
    if spec in SCRATCH:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(spec, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"model {spec!r}: no such folder, and the hub does not give it ({why})") from None


def _config_of(spec: str, folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of whatever its own code, or a damaged file, raises
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"model {spec!r}: its config.json cannot be read ({why})") from None


def _run_of(spec: str, trust_remote_code: bool) -> Config:
    """The options of a run of this model, as far as opening a model asks for them."""
    once = TrainingConfig(max_steps=1)
    return Config(
        output_dir="-", model=spec, trust_remote_code=trust_remote_code, sft=once, policy=once, oracle=once, reward=once
    )


def _opened(
    report: Report,
    auto: Any,
    folder: Path,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    copy: bool,
    device: torch.device,
    trust_remote_code: bool,
) -> PreTrainedModel | None:
    """The model whole, or small; None where not even that can be had. Adds what its headers say."""
    with report.row("weights complete"):
        empty, complete = opened_without_weights(auto, "model", str(folder), trust_remote_code)
        report.checks += [complete, checks.tokenizer_fits(tokenizer, empty)]
        need = sum(p.numel() for p in empty.parameters()) * 4 * COPIES
    why = "as asked for" if copy else None if report.ok else "as it cannot be opened as it is"
    free = free_memory(device)
    if why is None and free is not None and need > ROOM * free:
        why = f"as the checks of the whole take {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {device}"
    if why is None:
        why = "as its weights cannot be loaded"
        with report.row("weights loaded"):
            dtype = getattr(torch, Config.dtype)
            model = open_weights(auto, "model", folder, trust_remote_code=trust_remote_code, dtype=dtype)
            report.opened = f"whole, {_size(model)}"
            return model
    with report.row("small copy"):
        if auto is AutoModelForSequenceClassification:
            ensure_reward_class(config)
        model = build(small(config, keep_vocabulary=True), auto=auto)
        report.opened = f"a small copy of its config, {why}"
        return model
    return None


def _size(model: PreTrainedModel) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f}M parameters"


def _row_of(config: PretrainedConfig) -> int:
    """Tokens of the longest row to try."""
    text = config.get_text_config()
    named = ("sliding_window", "attention_window_size", "window_size", "attention_chunk_size", "local_attention")
    windows = [getattr(text, name, None) or 0 for name in named]
    most = sum(DataConfig().limits)
    return min(max(64, *(window + 16 for window in windows if window + 16 <= most), 0), most)


def _positions_of(config: PretrainedConfig) -> int | None:
    """Tokens that a row may have, by the names that configs have for it (MPT's is of its own); None for no limit."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return min((one for one in found if isinstance(one, int) and one > 0), default=None)


# ---------------------------------------------------------------- numbers


def _measure(report: Report, model: PreTrainedModel, tokens: int) -> None:
    """Adds the checks that take passes of the model."""
    if (room := _positions_of(model.config)) is not None:
        tokens = min(tokens, room)
    with report.row("route"):
        subject = CompletionModel(model)
        if not subject.is_reward_model:
            report.checks.append(checks.causal(model))
        examples = examples_of(vocabulary_of(model), tokens)[:1]
        with report.row("train = eval"):
            batch = collate([prompt for prompt, _ in examples], [own for _, own in examples])
            report.checks.append(checks.train_equals_eval(subject, batch["input_ids"], batch["lengths"]))
        found = route_report(subject, tokens)
        report.route = found.route
        report.checks += _of_the_route(found, "rewards" if subject.is_reward_model else "log-probs", tokens)
        if not subject.is_reward_model:
            with report.row("samples"):
                prompt = tokens if room is None else max(2, min(tokens, room - STEPS))  # new ones take positions too
                report.checks.append(_of_the_samples(generation_of(subject, prompt)))


def _of_the_route(found: RouteReport, what: str, tokens: int) -> Iterator[Check]:
    reason = found.reason or ""
    yield Check("route", found.route is not None, found.route, "packed or padded", reason)
    for route in ("packed", "padded"):
        taken = found.route == route
        for which, many in (("one", "one completion"), ("several", "several completions")):
            value: float | None = getattr(found, f"{route}_{which}")
            ok = value is not None and value <= found.limit_several
            advice = "" if taken else NOT_TAKEN
            if taken and not ok:
                advice = f"{what} are off by {value} in rows of up to {tokens} tokens; please report this model"
            yield Check(f"{what}, {many}, {route}", ok or not taken, value, found.limit_several, advice)
    if found.route is not None:
        slope: float | None = getattr(found, f"{found.route}_gradient")
        ok = slope is not None and slope <= found.gradient_limit
        advice = "" if ok else f"gradients are off by {slope}, relatively; please report this model"
        yield Check(f"gradients, {found.route}", ok, slope, found.gradient_limit, advice)


def _of_the_samples(found: Generation) -> Check:
    """What the loop would draw from, or `generate`, for unequal prompts padded on the left where that is right."""
    how = "by `generate`, " + ("padded on the left" if found.pads else "prompts of one length a batch")
    if not found.caches:
        how += ", without a cache"
    advice = f"{how}: {found.reason}" if found.reason else ""
    return Check("samples", True, "not tried" if found.gap is None else found.gap, ROUNDING, advice)


# ---------------------------------------------------------------- what it says of itself, and what can be made of it


def _end_token(tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> Check:
    """What ends a completion here, and what the model's own files say; the trained model ends as it is trained."""
    check = checks.end_token(tokenizer)
    others: dict[str, list[str]] = {}
    if folder is not None and (folder / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
        ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
        others["generation_config.json"] = [str(tokenizer.convert_ids_to_tokens(token)) for token in ids]
    if (turn := _turn_end(tokenizer)) is not None:
        others["chat template"] = [turn]
    value = {"tokenizer": check.value, **others}
    apart = [f"{', '.join(ends)} ({where})" for where, ends in others.items() if ends and check.value not in ends]
    more = [f"{', '.join(ends)} ({where})" for where, ends in others.items() if check.value in ends and len(ends) > 1]
    remark = ""
    if apart:
        remark = (
            f"completions end with {check.value} here, the tokenizer's, its own files say {' and '.join(apart)}; if "
            "that is how it is to end, set eos_token in tokenizer_config.json"
        )
    elif more:
        remark = f"it generates until {' and '.join(more)}; what is trained here ends with {check.value} alone"
    return Check(check.name, check.ok, value, check.limit, remark if check.ok else check.advice)


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The special token that the chat template puts behind a reply; None where there is no template, or none."""
    if not tokenizer.chat_template:
        return None
    reply = "Certainly"
    turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": reply}]
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # whatever a template raises; who renders conversations by it is told then
        return None
    special = tokenizer.all_special_ids + [i for i, t in tokenizer.added_tokens_decoder.items() if t.special]
    behind = tokenizer(text.rpartition(reply)[2], add_special_tokens=False)["input_ids"]
    found = next((token for token in behind if token in special), None)
    return None if found is None else str(tokenizer.convert_ids_to_tokens(found))


def _possible(report: Report, model: PreTrainedModel) -> None:
    """Adds whether a reward model and adapters can be made of it."""
    name = "reward head"
    with report.row(name):
        stock = type(model.config) in AutoModelForSequenceClassification._model_mapping
        made = without_weights(model.config)
        value = f"transformers' {type(made).__name__}" if stock else "ours, on the last hidden state"
        report.checks.append(Check(name, True, value, "a reward model can be made of it", ""))
    with report.row("LoRA targets"):
        report.checks.append(checks.lora_targets(model, LoraConfig(rank=8)))


# ---------------------------------------------------------------- for people


def show(report: Report, console: Console) -> None:
    """The table, and a line of what to do for each check that does not hold."""
    said = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    said(f"{report.model}: {report.opened}")
    table = Table("check", "", "found", "at most")
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for check in report.checks:
        mark = "[red]fails[/]" if not check.ok else "-" if check.advice == NOT_TAKEN else "[green]holds[/]"
        limit = _text(check.limit) if isinstance(check.limit, int | float) else ""
        table.add_row(check.name, mark, escape(_text(check.value)), limit)
    console.print(table)
    for check in sorted(report.checks, key=lambda check: check.ok):
        if check.advice and check.advice != NOT_TAKEN:
            said(f"{'note' if check.ok else 'FAILS'} {check.name}: {check.advice}")
    failing = [check.name for check in report.checks if not check.ok]
    said(f"{len(failing)} of {len(report.checks)} do not hold: {', '.join(failing)}" if failing else "all hold")


def _text(value: Any) -> str:
    """A value in a cell."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2g}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_text(part)}" for name, part in value.items() if part)
    if isinstance(value, list):
        return ", ".join(map(_text, value[:6])) + (f" and {len(value) - 6} more" if len(value) > 6 else "")
    return str(value)
