"""Reward models of architectures for which transformers has no sequence-classification class: Mamba, LFM2, Granite, ...

The base model and a linear `score` head on its last hidden state, made as a class of transformers' own kind and entered
into its registry. So such a model is saved, loaded, sharded and adapted as any other; its folder says
`<Architecture>ForSequenceClassification` in config.json, a class that transformers alone does not have.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput


class _BaseWithHead:
    """What these classes share; mixed into an architecture's own `PreTrainedModel`."""

    causal_class: type[PreTrainedModel]

    # transformers looks for these in the source of a class's module, which here is ours.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return bool(cls.causal_class._can_set_attn_implementation())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(cls.causal_class._can_set_experts_implementation())

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, AutoModel.from_config(config))  # type: ignore[attr-defined]
        self.score = nn.Linear(_state_width(self.causal_class, config), config.num_labels, bias=False)
        self.post_init()  # type: ignore[attr-defined]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutput:
        """logits [B, labels], read as transformers' classes do: at each row's last token that is not the padding one.

        Args:
            input_ids: [B, T]
            attention_mask: [B, T]
            kwargs: for the base model.
        """
        states = self.base_model(  # type: ignore[attr-defined]
            input_ids=input_ids, attention_mask=attention_mask, **kwargs
        ).last_hidden_state
        pad = self.config.get_text_config().pad_token_id  # type: ignore[attr-defined]
        if pad is None and len(input_ids) != 1:
            raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined.")
        last = torch.full((len(input_ids),), -1, device=states.device)
        if pad is not None:
            last = ((input_ids != pad) * torch.arange(input_ids.shape[1], device=input_ids.device)).argmax(1)
        return SequenceClassifierOutput(logits=self.score(states[torch.arange(len(last), device=last.device), last]))


def ensure_reward_class(config: PretrainedConfig) -> None:
    """Gives transformers a sequence-classification class for this kind of config, where it has none.

    Raises ValueError where there is no causal language model of the kind either, or no linear head whose width says
    how wide the last hidden state is.
    """
    kind = type(config)
    if "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {}):
        return  # of its own code
    if kind in AutoModelForSequenceClassification._model_mapping:
        return
    if kind not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"transformers has no causal language model of type {config.model_type!r}")
    causal = AutoModelForCausalLM._model_mapping[kind]
    if causal.config_class is not kind:  # of a model of text and more, whose text half alone is the language model
        config = config.get_text_config()
    own = next(base for base in causal.__mro__[1:] if issubclass(base, PreTrainedModel))
    name = causal.__name__
    for ending in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"):
        name = name.removesuffix(ending)
    made = type(
        f"{name}ForSequenceClassification",
        (_BaseWithHead, own),
        {
            "__doc__": f"{name} with a linear head on its last hidden state.",
            "__module__": causal.__module__,  # where transformers looks up what the architecture can do
            "config_class": type(config),
            "base_model_prefix": causal.base_model_prefix,
            "causal_class": causal,
            "_tied_weights_keys": None,
        },
    )
    _state_width(causal, config)
    for one in {kind, type(config)}:
        AutoModelForSequenceClassification._model_mapping.register(one, made, exist_ok=True)


def _state_width(causal: type[PreTrainedModel], config: PretrainedConfig) -> int:
    """How wide the last hidden state is: as the language-model head says, not the config, which need not."""
    with torch.device("meta"):
        head = causal(copy.deepcopy(config)).get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{causal.__name__} has no linear language-model head, so no reward model is made of it")
    return head.in_features


def without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """A reward model of this config, on the device "meta".

    Raises ValueError where there is no class for one, or only one whose head does not read the state of a reply's last
    token (of the decoders BART's, CTRL's, ModernBERT's and Reformer's).
    """
    ensure_reward_class(config)
    own = copy.deepcopy(config)
    own.num_labels = 1
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(own)
    if not hasattr(model, "score"):
        raise ValueError(f"{type(model).__name__} has no `score` head, which reads the state of a reply's last token")
    return model
