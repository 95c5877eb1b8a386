"""What can be wrong with a model that someone brings, a function a check. Stages refuse by them, before they run."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lm.config import LoraConfig
from lm.logprobs.completions import CompletionModel, Lengths
from lm.logprobs.kernels import at_least_float32
from lm.models.lora import check_target_modules, not_adaptable

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Where transformers looks for the weights of a folder: one file, or what tells the shards."""
HARMLESS = re.compile(
    r"(^|\.)(masked_bias|causal_mask|inv_freq|cos_cached|sin_cached|position_ids)$"
    r"|(^|\.)(attn|attention|self_attn)\.bias$|^score\."
)
"""Left-overs that change nothing: masks and tables that are computed (GPT-2's mask is `attn.bias`), and what a reward
head adds to all rewards alike."""
HEAD = "score."
"""What the parameters of a reward model's head begin with."""


@dataclass(frozen=True)
class Check:
    """What was found of a model in one respect."""

    name: str
    ok: bool
    value: Any
    """Found; JSON."""
    limit: Any
    """What it must be."""
    advice: str
    """Where it is not: what is wrong and what to do, in a line without the model's name. Else empty, or a remark."""


def require(what: str, *checks: Check) -> None:
    """ValueError for the first check that does not hold; `what` is the option and its value."""
    for check in checks:
        if not check.ok:
            raise ValueError(f"{what}: {check.advice}")


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---------------------------------------------------------------- the folder, of which no weights are read


def no_adapter(folder: Path) -> Check:
    """Whether the folder is a model, and no adapter, alone or beside full weights: transformers would load it frozen,
    and nothing of the model would train."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return Check("adapters", True, None, None, "")
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    of = f" of {base}" if base else ""
    cure = (
        "merge it into the weights of its base by peft (PeftModel.from_pretrained(base, folder).merge_and_unload()"
        ".save_pretrained(...)) and name that folder"
    )
    if any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        advice = (
            f"the folder has an adapter{of} (adapter_config.json) beside full weights, with which nothing else would "
            f"train; remove adapter_config.json to train the full weights, or {cure}"
        )
    else:
        advice = f"the folder is an adapter{of} alone (adapter_config.json); {cure}"
    return Check("adapters", False, base or "an adapter", None, advice)


def not_quantised(config: PretrainedConfig) -> Check:
    """Whether the weights are plain numbers, which can be trained and saved again."""
    found = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if not found:
        return Check("quantisation", True, None, None, "")
    settings = found if isinstance(found, Mapping) else found.to_dict()
    method = getattr(settings.get("quant_method"), "value", settings.get("quant_method"))
    if method is None:
        method = "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else "unknown"
    advice = (
        f"its weights are quantised ({method}, quantization_config in config.json), which cannot be trained and saved "
        "as they are; name the model that it was quantised from, or save a dequantised copy "
        "(from_pretrained(...).dequantize().save_pretrained(...))"
    )
    return Check("quantisation", False, str(method), None, advice)


def weights_whole(folder: Path) -> Check:
    """Whether the files of the weights are all there, and as long as their headers say; the tensors are not read."""
    name, limit = "weights whole", "every file there, and whole"
    cure = "copy or download the folder again"
    files, index = [folder / WEIGHTS], folder / INDEX
    where: dict[str, str] = {}
    if not files[0].is_file():
        if not index.is_file():
            others = sorted(file.name for file in folder.glob("*.safetensors"))
            found = f"only {_listed(others)}" if others else "none"
            advice = f"safetensors weights are needed ({WEIGHTS}, or {INDEX} with its shards), the folder has {found}"
            return Check(name, False, found, limit, advice)
        try:
            where = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            files = [folder / file for file in sorted(set(where.values()))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            advice = f"{INDEX} cannot be read ({type(error).__name__}: {error}); {cure}"
            return Check(name, False, INDEX, limit, advice)
    held: dict[str, set[str]] = {}
    for file in files:
        if not file.is_file():
            advice = f"{INDEX} names {file.name}, which the folder lacks; {cure}"
            return Check(name, False, f"{file.name} missing", limit, advice)
        if file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
            advice = f"{file.name} is a pointer of git-lfs and no weights; run git lfs pull in the folder"
            return Check(name, False, f"{file.name} a pointer", limit, advice)
        try:
            with safe_open(file, framework="pt") as opened:
                held[file.name] = set(opened.keys())
        except (SafetensorError, OSError) as error:
            size = file.stat().st_size
            advice = f"{file.name} ({size:,} bytes) is truncated or damaged ({error}); {cure}"
            return Check(name, False, f"{file.name} damaged", limit, advice)
    if astray := sorted(tensor for tensor, file in where.items() if tensor not in held[file]):
        advice = f"{INDEX} says that {where[astray[0]]} has {_listed(astray)}, which it has not; {cure}"
        return Check(name, False, f"{len(astray)} tensors missing", limit, advice)
    return Check(name, True, f"{len(files)} files", limit, "")


# ---------------------------------------------------------------- what from_pretrained says


def weights_complete(model: PreTrainedModel, found: Mapping[str, Any], *, new_head: bool = False) -> Check:
    """Whether every parameter is from the weights, and the weights are of no more layers than the config and have
    nothing in a module of the model that it would leave out.

    Args:
        model: as loaded, also on the device "meta".
        found: the loading info of `from_pretrained(..., output_loading_info=True)`. Tied weights are not missing.
        new_head: whether the `score` head may be drawn at random, as of a reward model that is about to be trained.
    """
    name, limit = "weights complete", "nothing missing"
    missing = sorted(key for key in found["missing_keys"] if not (new_head and key.startswith(HEAD)))
    mismatched = sorted(str(key if isinstance(key, str) else key[0]) for key in found["mismatched_keys"])
    unexpected = sorted(found["unexpected_keys"])
    if missing:
        why = "which would be drawn at random"
        cure = "the config or the weights are of another model"
        if all(key.startswith(HEAD) for key in missing):
            cure = "name a trained reward model"
        elif any(re.search(r"(^|\.)(lm_head|embed_out|output_layer)\.", key) for key in missing) and len(missing) < 3:
            cure = "name a causal language model with its head"
        advice = f"its weights lack {_listed(missing)}, {why}; {cure}"
        return Check(name, False, {"missing": missing[:20]}, limit, advice)
    if mismatched:
        advice = f"{_listed(mismatched)} of its weights are of another shape than its config says; repair config.json"
        return Check(name, False, {"mismatched": mismatched[:20]}, limit, advice)
    known = {_numberless(key) for key in model.state_dict()}
    if deeper := [key for key in unexpected if re.search(r"\.\d+\.", key) and _numberless(key) in known]:
        advice = (
            f"its weights have more layers than its config says ({_listed(deeper)} would be left out); repair the "
            "number of layers in config.json"
        )
        return Check(name, False, {"unexpected": deeper[:20]}, limit, advice)
    if astray := [key for key in unexpected if not HARMLESS.search(key) and _is_within(model, key)]:
        advice = (
            f"its weights have {_listed(astray)}, for which the model that its config describes has no place: it would "
            "be another model without; repair config.json (biases, norms, architecture)"
        )
        return Check(name, False, {"unexpected": astray[:20]}, limit, advice)
    remark = f"weights that the model has no place for are left out: {_listed(unexpected)}" if unexpected else ""
    return Check(name, True, {"unexpected": unexpected[:20]}, limit, remark)


def finite(model: PreTrainedModel) -> Check:
    """Whether every weight is a finite number. The first tensor that has one that is not is named."""
    name, limit = "weights finite", "no NaN, no infinity"
    for key, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel():
            ends = torch.stack(parameter.detach().aminmax())  # NaN where there is one; no copy of the weights
            if not bool(ends.isfinite().all()):
                kind = str(parameter.dtype).removeprefix("torch.")
                advice = (
                    f"its weights are not all finite: {key} has NaN or infinity in {kind}; copy or download the model "
                    "again, or name an earlier checkpoint of it"
                )
                advice += " (or the numbers are too large for float16)" if kind == "float16" else ""
                return Check(name, False, key, limit, advice)
    return Check(name, True, None, limit, "")


def _numberless(key: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", key)


def _is_within(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight is of a module of the model that has weights, or stands in one of its layers.

    Of whole parts that the model lacks (towers of images, heads, layers that predict further tokens) it is not.
    """
    prefix = f"{model.base_model_prefix}."
    layer = re.match(r"(.*?\.)?\d+\.", key)
    parents = {key.rpartition(".")[0] + ".", *([layer[0]] if layer else [])}
    parents |= {prefix + parent for parent in parents} | {parent.removeprefix(prefix) for parent in parents}
    parents -= {"", ".", prefix}
    return any(own.startswith(tuple(parents)) for own in model.state_dict())


def tokenizer_fits(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Check:
    """Whether every token id has a row of the embedding.

    Special tokens beyond it that only a text that names them can hold are let pass with a remark (Gemma 3 1B has one,
    of images); such a text is refused where it is met, by `ids_fit`.
    """
    rows = embedding_rows(model)
    ids = tokenizer.get_vocab()
    beyond = {token: index for token, index in ids.items() if index >= rows}
    used = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    special = {index for index, added in tokenizer.added_tokens_decoder.items() if added.special} - used
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    read = {token: index for token, index in beyond.items() if index not in special or token in template}
    name, largest = "tokenizer within the embedding", max(ids.values(), default=-1)
    if read:
        token = max(read, key=read.__getitem__)
        advice = (
            f"its tokenizer has ids up to {read[token]} ({token!r}), its embedding has {rows} rows, for ids up to "
            f"{rows - 1}; save the model with the tokenizer that it was trained with, or resize the embedding "
            "(resize_token_embeddings) and train it"
        )
        return Check(name, False, largest, rows - 1, advice)
    remark = f"no text may hold {_listed(sorted(beyond))}: the embedding has no row for it" if beyond else ""
    return Check(name, True, largest, rows - 1, remark)


def ids_fit(what: str, tokenizer: PreTrainedTokenizerBase, rows: int, ids: Iterable[int]) -> None:
    """ValueError where one of the ids has no row of the embedding; `what` has them."""
    if (largest := max(ids, default=-1)) >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"{what} holds the special token {token!r} (id {largest}), for which the model's embedding has no row, of "
            f"{rows}; leave it out of the text"
        )


def embedding_rows(model: PreTrainedModel) -> int:
    """Ids that the model can read; those below it."""
    embedding = model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0])


def end_token(tokenizer: PreTrainedTokenizerBase) -> Check:
    """Whether the tokenizer says what ends a completion."""
    end = tokenizer.eos_token
    advice = "its tokenizer has no end-of-text token; set eos_token in tokenizer_config.json"
    return Check("end token", end is not None, end, "a token", advice if end is None else "")


# ---------------------------------------------------------------- what a few passes say


@torch.no_grad()
def causal(model: PreTrainedModel) -> Check:
    """Whether a log-prob depends on no later token: an encoder's does, which sees the answer that it is to predict.

    One forward of two short rows that differ in their last token alone. How much that moves earlier log-probs is
    compared with how much it moves those that may depend on it: an encoder with small random weights moves both little.
    """
    name, subject = "causal", model
    if model.dtype.itemsize < 4 and sum(p.numel() for p in model.parameters()) < 10**8:
        subject = copy.deepcopy(model).float()  # in 16 bits rounding hides what such a model shows
    rows, modes = embedding_rows(model), [(module, module.training) for module in subject.modules()]
    ids = torch.randint(rows, (8,), generator=torch.Generator().manual_seed(0))
    both = torch.stack([ids, ids])
    both[1, -1] = (both[1, -1] + rows // 2) % rows
    both = both.to(model.device)
    subject.eval()
    try:
        logits = subject(input_ids=both, attention_mask=torch.ones_like(both), use_cache=False).logits
    except Exception as error:  # whatever an architecture wants beside the tokens
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        advice = f"{type(model).__name__} does not run on token ids alone ({why}); name a causal language model of text"
        return Check(name, False, None, None, advice)
    finally:
        for module, training in modes:
            module.training = training
    logps = at_least_float32(logits).log_softmax(-1)
    moved = (logps[0] - logps[1]).abs().amax(-1)
    off, may = float(moved[:-1].amax()), float(moved[-1])
    limit = max(1e-6, may * (2e-5 if subject.dtype.itemsize >= 4 else 5e-2))
    ok = off <= limit
    advice = (
        f"{type(model).__name__} is not causal: changing a row's last token changes an earlier log-prob by {off:.3g} "
        f"nats (and its own by {may:.3g}), so log-probs would see the answer; name a causal language model (some "
        "encoders are one with is_decoder true in config.json)"
    )
    return Check(name, ok, off, limit, "" if ok else advice)


@torch.no_grad()
def train_equals_eval(model: CompletionModel, input_ids: Tensor, lengths: Lengths, *, passes: int = 4) -> Check:
    """Whether log-probs, or rewards, of an example are the same in train and in eval mode: log-ratios compare passes
    of both kinds, so noise (dropout, jitter of routers, layers left out) or statistics of a batch would be in them.

    Changes nothing of the model: generators and buffers are as before.
    """
    device = next(model.parameters()).device
    batch = input_ids.to(device)
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    route = model.route
    model.route = "padded"
    try:
        with model.stock(), _own_generators(device):
            model.eval()
            expected = _numbers(model, batch, lengths)
            model.train()
            off = torch.zeros(())
            for seed in range(passes):
                torch.manual_seed(seed)
                random.seed(seed)
                got = _numbers(model, batch, lengths)
                off = torch.maximum(off, ((got - expected).abs() / (1 + expected.abs())).amax())
    finally:
        model.route = route
        for module, training in modes:
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)
    coarse = model.model.dtype.itemsize < 4 or model.options.autocast
    limit, value = (2e-2 if coarse else 1e-5), float(off.nan_to_num(float("inf")))
    advice = (
        f"{type(model.model).__name__} is not the same in training and in evaluation: log-probs or rewards of one "
        f"example differ by {value:.3g}, relatively, which would be in every log-ratio; set what is random or depends "
        "on the batch (dropout, jitter, noise, batch normalisation) to none in config.json"
    )
    ok = value <= limit
    return Check("train = eval", ok, value, limit, "" if ok else advice)


def _numbers(model: CompletionModel, input_ids: Tensor, lengths: Lengths) -> Tensor:
    output = model(input_ids, lengths)
    return torch.cat([part.cpu() for part in (output.logps, output.rewards) if part is not None])


@contextmanager
def _own_generators(device: torch.device) -> Iterator[None]:
    """Draws inside are not felt outside."""
    state, of_python = np.random.get_state(), random.getstate()  # noqa: NPY002
    devices = [] if device.type == "cpu" else [device.index or 0]
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
        random.setstate(of_python)


# ---------------------------------------------------------------- what can be added to it


def lora_targets(model: PreTrainedModel, options: LoraConfig) -> Check:
    """What adapters can be put on, and in the advice what can have none: fused experts are no linear layers.

    Args:
        model: not adapted, also on the device "meta".
        options: of the adapters.
    """
    name, limit = "LoRA targets", "some"
    try:
        layers = check_target_modules(model, options)
    except ValueError as error:
        return Check(name, False, [], limit, str(error))
    without, total = not_adaptable(model, layers), sum(parameter.numel() for parameter in model.parameters())
    remark = ""
    if without:
        share = sum(without.values()) / total
        remark = f"no adapter goes on {_listed(sorted(without))}, which are no linear layers ({share:.1%} of all)"
    return Check(name, True, sorted({layer.rsplit(".", 1)[-1] for layer in layers}), limit, remark)


def reward_head(model: PreTrainedModel) -> Check:
    """Whether it is a reward model: a `score` head with one label."""
    head = getattr(model, "score", None)
    labels = getattr(model.config, "num_labels", None)
    ok = isinstance(head, nn.Module) and labels == 1
    advice = f"a `score` head with one label is needed, {type(model).__name__} has " + (
        f"{labels} labels" if head is not None else "none"
    )
    return Check("reward head", ok, labels if head is not None else None, 1, "" if ok else advice)
