"""Models and tokenizers: from the hub, a local folder, a GGUF file or scratch; safetensors, never pickles."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lm.base import hub
from lm.base.files import sha256_of
from lm.config import Config, DataConfig, LoraConfig
from lm.logprobs.definition import check_positions
from lm.models import checks, noise
from lm.models.gguf import as_folder
from lm.models.heads import without_weights
from lm.models.lora import add_adapter
from lm.models.weights import config_of, missing, open_weights, opened_without_weights

SCRATCH = {
    "scratch:tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 4096},
    "scratch:small": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 4096},
}
"""Models from random weights, by name."""
END, PAD = "<|endoftext|>", "<|padding|>"
log = logging.getLogger(__name__)


def check_model(spec: str, trust_remote_code: bool, *, option: str = "model") -> None:
    """Raises ValueError, before anything is computed, for what could be known to fail later.

    A local folder needs a config, a tokenizer and safetensors weights; pickled weights are refused, as loading them
    runs code from the file; so is code of the model's own unless `trust_remote_code`. The weights have to be plain,
    whole, and all that the config wants, and the tokenizer's ids within the embedding: of the files the headers are
    read. Of a model on the hub the same is found where it is loaded.
    """
    if spec.startswith("scratch:"):
        if spec not in SCRATCH:
            raise ValueError(f"model {spec!r}: the models from scratch are {', '.join(SCRATCH)}")
        return
    if (folder := _check_folder(option, spec, trust_remote_code)) is not None:
        _check_weights(AutoModelForCausalLM, option, spec, folder, trust_remote_code)


def check_reward_model(spec: str, trust_remote_code: bool, *, option: str = "oracle_model") -> None:
    """`check_model` for a model that is to judge, named by this option: it needs a trained head with one label.

    Without this, a head that the weights lack would be drawn at random, and judge.
    """
    if spec.startswith("scratch:"):
        hint = "; null trains one" if option == "oracle_model" else ""
        raise ValueError(f"{option} {spec!r}: a trained reward model is needed{hint}")
    folder = _check_folder(option, spec, trust_remote_code)
    config = config_of(option, spec, trust_remote_code)
    kinds = config.architectures or ["model of no named class"]
    if not any("ForSequenceClassification" in kind for kind in kinds):
        raise ValueError(f"{option} {spec!r}: a sequence-classification model is needed, it is a {kinds[0]}")
    if config.num_labels != 1:
        raise ValueError(f"{option} {spec!r}: a reward model has one label, it has {config.num_labels}")
    if folder is not None:
        model = _check_weights(AutoModelForSequenceClassification, option, spec, folder, trust_remote_code)
        if option == "oracle_model" and model is not None:
            checks.require(f"{option} {spec!r}", checks.reward_head(model))
    else:
        checks.require(f"{option} {spec!r}", checks.not_quantised(config))


def _check_folder(option: str, spec: str, trust_remote_code: bool) -> Path | None:
    """The folder, where it is one and has all files of a model; None for a hub's name."""
    folder, what = Path(as_folder(spec)), f"{option} {spec!r}"
    if not folder.exists():
        if not hub.NAME.fullmatch(spec):
            raise ValueError(f"{what}: there is no such folder{hub.meant(spec)}")
        return None  # a hub name: the hub is asked when it is loaded
    if not folder.is_dir():
        raise ValueError(f"{what}: a folder is needed, it is a file")
    checks.require(what, checks.no_adapter(folder))
    if not (folder / "config.json").is_file():
        raise ValueError(f"{what}: the folder has no config.json")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ValueError(f"{what}: the folder has no tokenizer (tokenizer.json); save one with the model")
    if not any(folder.glob("*.safetensors")):
        pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern)]
        found = (
            f"only pickled ones ({', '.join(sorted(pickled))}), which can run code when loaded" if pickled else "none"
        )
        raise ValueError(f"{what}: safetensors weights are needed, the folder has {found}")
    try:
        own_code = "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{what}: its config.json is no JSON ({error})") from None
    if own_code and not trust_remote_code:
        raise ValueError(f"{what} brings code of its own; set trust_remote_code to true to run it")
    return folder


def _check_weights(auto: Any, option: str, spec: str, folder: Path, trust_remote_code: bool) -> PreTrainedModel | None:
    """Opens the model without its numbers, see `check_model`; None where only its own code can say what it is."""
    what = f"{option} {spec!r}"
    checks.require(what, checks.weights_whole(folder))
    if "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        return None
    model, complete = opened_without_weights(auto, option, spec, trust_remote_code)
    checks.require(what, complete)
    if complete.advice:
        log.warning("%s: %s", what, complete.advice)
    fits = checks.tokenizer_fits(load_tokenizer(spec, (), trust_remote_code, needs_end=False), model)
    checks.require(what, fits)
    if fits.advice:
        log.warning("%s: %s", what, fits.advice)
    return model


def check_lora(spec: str, options: LoraConfig, trust_remote_code: bool, option: str = "model") -> None:
    """Raises ValueError where the base model cannot have these adapters; nothing of it but its config is read. Says
    which of its weights are left without one because they are no linear layers."""
    if options.rank is None:
        return
    config = LlamaConfig(num_hidden_layers=1) if spec in SCRATCH else config_of(option, spec, trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        targets = checks.lora_targets(model, options)
        if targets.advice:
            log.warning("%s %r, lora: %s", option, spec, targets.advice)
        add_adapter(model, options, base=spec)


def check_reward_base(spec: str, trust_remote_code: bool, option: str = "model") -> None:
    """Raises ValueError where no reward model can be made of the base model, which would be told after SFT."""
    if spec in SCRATCH:
        return
    try:
        without_weights(config_of(option, spec, trust_remote_code))
    except ValueError as error:
        raise ValueError(
            f"{option} {spec!r}: no reward model can be started from it ({error}); name another model, or train none: "
            "give oracle_model, and data.rewards given or oracle"
        ) from None


def load_tokenizer(
    spec: str, texts: Iterable[str], trust_remote_code: bool, *, needs_end: bool = True
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or for "scratch:" a byte-level BPE trained on the texts.

    It has an end-of-text token, without which it is refused unless it `needs_end` not.
    """
    if spec in SCRATCH:
        return train_bpe(texts, SCRATCH[spec]["vocab_size"])
    folder = as_folder(spec)
    if why := missing(folder):
        raise ValueError(f"model {spec!r}: its tokenizer cannot be loaded ({why})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ValueError(f"model {spec!r}: its tokenizer cannot be loaded ({type(error).__name__}: {error})") from None
    if needs_end and tokenizer.eos_token_id is None:
        raise ValueError(f"model {spec!r}: its tokenizer has no end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, never read
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of at most so many tokens, trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give every text the same ids: one vocabulary, one end-of-text, one pipeline."""

    def pipeline(tokenizer: PreTrainedTokenizerBase) -> Any:
        backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
        return {part: backend.get(part) for part in ("normalizer", "pre_tokenizer", "model")}

    return bool(
        one.eos_token_id == other.eos_token_id
        and len(one) == len(other)  # the rest takes seconds of a large vocabulary
        and one.get_vocab() == other.get_vocab()
        and pipeline(one) == pipeline(other)
    )


def reward_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """What to save beside a reward model: a copy whose padding token, which the model's config names too, is not
    end-of-text.

    transformers reads a reward at the last token that is not the padding one, our models at end-of-text. A tokenizer
    without another special token stays as it is and the config names no padding: single texts are then read right, and
    transformers refuses batches.
    """
    config, end = model.config.get_text_config(), tokenizer.eos_token_id
    special = sorted(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
    fit = [t for t in (tokenizer.pad_token_id, *special) if t is not None and t != end and t < config.vocab_size]
    config.pad_token_id = fit[0] if fit else None
    own = copy.deepcopy(tokenizer)
    if fit:
        own.pad_token = own.convert_ids_to_tokens(fit[0])
    return own


def load_policy(spec: str | Path, tokenizer: PreTrainedTokenizerBase, config: Config) -> PreTrainedModel:
    """A causal LM in the run's dtype, on the CPU, without noise; from scratch under the current torch seed. It
    generates as it is trained: see `generation_config`.

    Raises ValueError where weights are missing, the model is not causal, or it has fewer rows in its embedding than the
    tokenizer has ids, or fewer positions than the longest row of the configured data.
    """
    if str(spec) in SCRATCH:
        model = AutoModelForCausalLM.from_config(
            _scratch_config(str(spec), tokenizer, config.data),
            dtype=getattr(torch, config.dtype),
        )
    else:
        model = open_weights(AutoModelForCausalLM, "model", spec, **_as_of(config))
        if str(spec) == config.model:  # what came from it is as it is
            what = f"model {str(spec)!r}"
            checks.require(what, checks.tokenizer_fits(tokenizer, model), checks.causal(model))
    noise.turn_off(model)
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    model.generation_config = generation_config(tokenizer)
    check_context(model.config, config.data, f"model {str(spec)!r}")
    return model


def _scratch_config(spec: str, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> LlamaConfig:
    shape = SCRATCH[spec]
    return LlamaConfig(
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["hidden_size"] * 8 // 3 // 32 * 32,
        num_hidden_layers=shape["num_hidden_layers"],
        num_attention_heads=shape["num_attention_heads"],
        vocab_size=len(tokenizer),
        max_position_embeddings=_longest_row(data),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        # The usual 0.02 starts a model this narrow so flat that it takes many times the steps to learn to copy.
        initializer_range=0.1,
    )


@dataclass(frozen=True)
class Size:
    """Of a model, in bytes of the run's dtype and in numbers."""

    weights: int
    """A tied one once."""
    adapters: int
    """As the options of the adapters say; 0 where they have no rank."""
    width: int
    """Of its hidden states."""


def size_of(option: str, tokenizer: PreTrainedTokenizerBase, config: Config) -> Size:
    """How large the model is that this option names, by its config alone. A reward model of it has a row for a head in
    place of a language model's, and is no larger."""
    spec = getattr(config, option)
    own = (
        _scratch_config(spec, tokenizer, config.data)
        if spec in SCRATCH
        else config_of(option, spec, config.trust_remote_code)
    )
    each, adapters = getattr(torch, config.dtype).itemsize, 0
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(own, trust_remote_code=config.trust_remote_code)
        weights = sum(parameter.numel() for parameter in model.parameters())
        if config.lora.rank is not None:
            add_adapter(model, config.lora, base=spec)
            adapters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Size(weights * each, adapters * each, int(own.get_text_config().hidden_size))


def generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """How a policy generates: it draws from its own distribution, as evaluation does, until the end-of-text that it was
    trained with. A base model's own settings (other ends, penalties, top-k) would sample from another policy."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )


def load_reward_model(spec: str | Path, config: Config, *, new_head: bool = False) -> PreTrainedModel:
    """A sequence-classification model with one label, without noise. A head that the weights lack is drawn under the
    torch seed where it may be a `new_head`, which is then to be trained; else ValueError. Its context is checked as of
    `check_context`."""
    option = "oracle_model" if str(spec) == config.oracle_model else "reward model"
    auto = AutoModelForSequenceClassification
    model = open_weights(auto, option, spec, new_head=new_head, num_labels=1, **_as_of(config))
    check_context(model.config, config.data, f"{option} {str(spec)!r}")
    noise.turn_off(model)
    return model


def check_context(config: PretrainedConfig, data: DataConfig, what: str) -> None:
    """Raises ValueError where a model has fewer positions than the longest row of the data, or such as depend on a
    row's neighbours (see `lm.logprobs.definition.check_positions`).

    Args:
        config: the model's.
        data: with numbers as limits.
        what: the model, for the message.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < _longest_row(data):
        raise ValueError(
            f"data.max_prompt_length {data.max_prompt_length} + data.max_completion_length "
            f"{data.max_completion_length} + 1 must be at most the {positions} positions of {what}"
        )
    check_positions(config, _longest_row(data), what)


def check_contexts(config: Config, data: DataConfig, options: Iterable[str], *, ask_hub: bool) -> None:
    """`check_context` of the models that these options name and that read the tokens of the limits, by their configs
    alone: that of a judge, or of what reward models start from, would be told after pi_ref was trained. Hub names
    are passed over where it is not to be asked."""
    for option in options:
        spec = getattr(config, option)
        if spec is not None and spec not in SCRATCH and (ask_hub or Path(spec).exists()):
            check_context(config_of(option, spec, config.trust_remote_code), data, f"{option} {spec!r}")


def _longest_row(data: DataConfig) -> int:
    """Tokens that a row of the data may have; evaluation may add end-of-text."""
    return sum(data.limits) + 1


def _as_of(config: Config) -> dict[str, Any]:
    return {"trust_remote_code": config.trust_remote_code, "dtype": getattr(torch, config.dtype)}


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP has cut its parameters up, a share for each rank."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The state on the CPU, tied tensors as one. Of a sharded model it is gathered: every rank calls this, and the
    first gets it."""
    if not is_sharded(model):
        copies: dict[Any, Tensor] = {}
        own = model.state_dict(keep_vars=True)  # where tied tensors are one object
        return {name: copies.setdefault(id(value), value.detach().cpu()) for name, value in own.items()}
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=whole)
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state:  # gathering makes two of a tied tensor
            state[name] = state[first.setdefault(parameter, name)]
    return state


def content_of(path: str | Path | None, commit: str | None = None) -> str | None:
    """What a path stands for in an artifact's key: a digest of local content; of a name its commit on the hub, or the
    name where that cannot be told."""
    if path is None or str(path) in SCRATCH or not Path(path).exists():
        return None if path is None else commit or str(path)
    return sha256_of(Path(path))
