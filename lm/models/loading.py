"""Models and tokenizers: from the hub, from a local folder, or from scratch; safetensors only."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lm.base import hub
from lm.base.files import sha256_of
from lm.config import Config, LoraConfig
from lm.models.lora import add_adapter

SCRATCH = {"scratch:tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 4096}}
"""Models from random weights, by name."""
END, PAD = "<|endoftext|>", "<|padding|>"


def check_model(spec: str, trust_remote_code: bool) -> None:
    """Raises ValueError, before anything is computed, for what could be known to fail later.

    A local folder needs a config, a tokenizer and safetensors weights; pickled weights are refused, as loading them
    runs code from the file; so is code of the model's own unless `trust_remote_code`.
    """
    if spec.startswith("scratch:"):
        if spec not in SCRATCH:
            raise ValueError(f"model {spec!r}: the models from scratch are {', '.join(SCRATCH)}")
        return
    folder = Path(spec)
    if not folder.exists():
        if not hub.NAME.fullmatch(spec):
            raise ValueError(f"model {spec!r}: there is no such folder{hub.meant(spec)}")
        return  # a hub name: the hub is asked when it is loaded
    if not folder.is_dir():
        raise ValueError(f"model {spec!r}: a folder is needed, it is a file")
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {spec!r}: the folder has no config.json")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ValueError(f"model {spec!r}: the folder has no tokenizer (tokenizer.json); save one with the model")
    if not any(folder.glob("*.safetensors")):
        pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern)]
        found = (
            f"only pickled ones ({', '.join(sorted(pickled))}), which can run code when loaded" if pickled else "none"
        )
        raise ValueError(f"model {spec!r}: safetensors weights are needed, the folder has {found}")
    if "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8")) and not trust_remote_code:
        raise ValueError(f"model {spec!r} brings code of its own; set trust_remote_code to true to run it")


def check_reward_model(spec: str, trust_remote_code: bool, *, option: str = "oracle_model") -> None:
    """`check_model` for a model that is to judge, named by this option: it needs a trained head with one label.

    Without this, a head that the weights lack would be drawn at random, and judge.
    """
    if spec.startswith("scratch:"):
        hint = "; null trains one" if option == "oracle_model" else ""
        raise ValueError(f"{option} {spec!r}: a trained reward model is needed{hint}")
    check_model(spec, trust_remote_code)
    config = _config_of(option, spec, trust_remote_code)
    kinds = config.architectures or ["model of no named class"]
    if not any("ForSequenceClassification" in kind for kind in kinds):
        raise ValueError(f"{option} {spec!r}: a sequence-classification model is needed, it is a {kinds[0]}")
    if config.num_labels != 1:
        raise ValueError(f"{option} {spec!r}: a reward model has one label, it has {config.num_labels}")


def check_lora(spec: str, options: LoraConfig, trust_remote_code: bool) -> None:
    """Raises ValueError where the base model cannot have these adapters; nothing of it but its config is read."""
    if options.rank is None:
        return
    config = LlamaConfig(num_hidden_layers=1) if spec in SCRATCH else _config_of("model", spec, trust_remote_code)
    with torch.device("meta"):
        add_adapter(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code), options, base=spec)


def missing(spec: str | Path) -> str | None:
    """Why a model is neither here nor on the hub, found within seconds: loading would ask the hub again and again."""
    return None if str(spec) in SCRATCH or Path(spec).exists() else hub.missing(str(spec), "model")


def _config_of(option: str, spec: str, trust_remote_code: bool) -> PretrainedConfig:
    if why := missing(spec):
        raise ValueError(f"{option} {spec!r}: its config cannot be loaded ({why})")
    try:
        return AutoConfig.from_pretrained(spec, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{option} {spec!r}: its config cannot be loaded ({error})") from None


def load_tokenizer(
    spec: str, texts: Iterable[str], trust_remote_code: bool, *, needs_end: bool = True
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or for "scratch:" a byte-level BPE trained on the texts.

    It has an end-of-text token, without which it is refused unless it `needs_end` not.
    """
    if spec in SCRATCH:
        return _train_bpe(texts, SCRATCH[spec]["vocab_size"])
    if why := missing(spec):
        raise ValueError(f"model {spec!r}: its tokenizer cannot be loaded ({why})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(spec, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ValueError(f"model {spec!r}: its tokenizer cannot be loaded ({type(error).__name__}: {error})") from None
    if needs_end and tokenizer.eos_token_id is None:
        raise ValueError(f"model {spec!r}: its tokenizer has no end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, never read
    return tokenizer


def _train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
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
        one.get_vocab() == other.get_vocab()
        and one.eos_token_id == other.eos_token_id
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
    """A causal LM in the run's dtype, on the CPU; from scratch under the current torch seed.

    Raises ValueError where it has fewer positions than the longest row of the configured data.
    """
    longest = sum(config.data.limits) + 1  # evaluation may add end-of-text
    if str(spec) in SCRATCH:
        shape = SCRATCH[str(spec)]
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(
                hidden_size=shape["hidden_size"],
                intermediate_size=shape["hidden_size"] * 8 // 3 // 32 * 32,
                num_hidden_layers=shape["num_hidden_layers"],
                num_attention_heads=shape["num_attention_heads"],
                vocab_size=len(tokenizer),
                max_position_embeddings=longest,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                tie_word_embeddings=True,
                # The usual 0.02 starts a model this narrow so flat that it takes many times the steps to learn to copy.
                initializer_range=0.1,
            ),
            dtype=getattr(torch, config.dtype),
        )
    else:
        model = _from_pretrained(AutoModelForCausalLM, spec, config)
    _disable_dropout(model)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < longest:
        raise ValueError(
            f"data.max_prompt_length {config.data.max_prompt_length} + data.max_completion_length "
            f"{config.data.max_completion_length} + 1 must be at most the {positions} positions of model {str(spec)!r}"
        )
    return model


def load_reward_model(spec: str | Path, config: Config) -> PreTrainedModel:
    """A sequence-classification model with one label; a head that the weights lack is drawn under the torch seed."""
    model = _from_pretrained(AutoModelForSequenceClassification, spec, config, num_labels=1)
    _disable_dropout(model)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP has cut its parameters up, a share for each rank."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The state on the CPU. Of a sharded model it is gathered: every rank calls this, and the first gets it."""
    if not is_sharded(model):
        return {name: value.cpu() for name, value in model.state_dict().items()}
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=whole)
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state:  # gathering makes two of a tied tensor
            state[name] = state[first.setdefault(parameter, name)]
    return state


def _disable_dropout(model: PreTrainedModel) -> None:
    """Log-ratios and rewards compare models: noise in one is no regulariser. The config keeps its values."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _from_pretrained(auto: Any, spec: str | Path, config: Config, **extra: Any) -> PreTrainedModel:
    if why := missing(spec):
        raise ValueError(f"model {str(spec)!r} cannot be loaded: {why}")
    try:
        model: PreTrainedModel = auto.from_pretrained(
            str(spec),
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            **extra,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model {str(spec)!r} cannot be loaded: {error}") from None
    return model


def content_of(path: str | Path | None, commit: str | None = None) -> str | None:
    """What a path stands for in an artifact's key: a digest of local content; of a name its commit on the hub, or the
    name where that cannot be told."""
    if path is None or str(path) in SCRATCH or not Path(path).exists():
        return None if path is None else commit or str(path)
    return sha256_of(Path(path))
