"""The core of the LM side: summed log-probs and end-of-text rewards of any number of completions a prompt.

Training, reference scoring, reward models and diagnostics all go through `CompletionModel`. Two routes give the
same numbers: "packed" computes each prompt once for all its completions (see `lm.logprobs.packing`), "padded" is the
plain forward of rows of prompt and one completion, right for every causal architecture. Which one a model takes is
settled by trial before it is used, and said where it is not the fast one.

Tensor names carry shapes: T tokens, R completions, C completion tokens, V vocabulary, H hidden, P padded row.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass
from transformers import PretrainedConfig, PreTrainedModel

from lm.base.memory import keep_freed_memory
from lm.config import LogprobsConfig
from lm.logprobs.definition import check_positions
from lm.logprobs.kernels import (
    ONEDNN_WIDTH,
    allow_recompiling,
    at_least_float32,
    linear_logps,
    onednn_available,
    onednn_gains,
    rewards_of,
    use_onednn,
)
from lm.logprobs.packing import PACKED, LastLayer, Layout
from lm.logprobs.trial import Trial

LARGE_HEAD = 2**24
"""Weights of a head beside which a gradient of the embedding, as large and nearly all zeros, is noticed."""

Ids = Sequence[int] | npt.NDArray[np.int32]
Lengths = Sequence[Sequence[int]]
Route = Literal["packed", "padded"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompletionOutput:
    """What one forward says about R completions, in the order of examples and of each example's completions."""

    logps: Tensor | None
    """[R], summed over the completion's tokens, nats; None for a reward model."""
    lengths: Tensor
    """[R], completion tokens."""
    rewards: Tensor | None
    """[R], read at the completion's last token; None without a reward head."""


register_dataclass(CompletionOutput)  # or FSDP would find no tensors in it, and not know when the backward begins


def collate(prompts: Sequence[Ids], completions: Sequence[Sequence[Ids]]) -> dict[str, Any]:
    """Examples laid end to end, each as prompt | completion_1 | ... | completion_K.

    Args:
        prompts: N prompts, at least one token each (the first completion token is predicted from the last of them).
        completions: for each prompt its completions, at least one token each.

    Returns:
        input_ids [T] int64, and lengths: for each example the tokens of its prompt and of each completion.
    """
    for row, (prompt, own) in enumerate(zip(prompts, completions, strict=True)):
        if not len(prompt) or not len(own) or not all(map(len, own)):
            side = "completion" if len(prompt) else "prompt"
            raise ValueError(f"row {row} has an empty {side}; prompt and completion need at least one token each")
    parts = [part for prompt, own in zip(prompts, completions, strict=True) for part in (prompt, *own)]
    return {
        "input_ids": torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *parts])),
        "lengths": [[len(prompt), *map(len, own)] for prompt, own in zip(prompts, completions, strict=True)],
    }


def longest_row(lengths: Lengths) -> int:
    """Tokens of the longest prompt with one completion."""
    return max(prompt + max(completions) for prompt, *completions in lengths)


class CompletionModel(nn.Module):
    """A transformers model seen as a function from prompts with completions to log-probs, rewards, or both.

    Wraps a causal LM (log-probs; rewards too with `reward_head`, as DRDO needs) or a sequence-classification model with
    one label (rewards); peft's adapters may be in it. One module with one `forward`, so that DDP, FSDP and the Trainer
    see every parameter.
    """

    def __init__(
        self, model: PreTrainedModel, *, reward_head: bool = False, options: LogprobsConfig | None = None
    ) -> None:
        super().__init__()
        if hasattr(model, "get_base_model"):  # a peft.PeftModel, whose adapters are layers of the model in it
            if model.active_peft_config.is_prompt_learning:
                kind = model.active_peft_config.peft_type.value
                raise ValueError(f"{kind}: adapters that lengthen the prompt are not supported; LoRA is")
            model = model.get_base_model()
        self.model = model
        self.options = options or LogprobsConfig()
        self.is_reward_model = hasattr(model, "score")
        if not self.is_reward_model and model.get_output_embeddings() is None:
            raise ValueError(f"{type(model).__name__} has neither a language-model head nor a `score` head")
        if self.is_reward_model and model.config.num_labels != 1:
            raise ValueError(f"a reward model has one label, but {type(model).__name__} has {model.config.num_labels}")
        # Drawn from the global generator: the Trainer's seed makes it reproducible.
        self.reward_head = nn.Linear(state_width(model), 1, bias=False, dtype=model.dtype) if reward_head else None
        self.plain_head = not self.is_reward_model and _head_seems_plain(model)
        """Whether log-probs are the softmax of a linear map of the last hidden state; the trial looks at it again."""
        self.route: Route | None = None
        """None until `settle`."""
        self.tried = 0
        """Tokens of the longest row that it was settled for."""
        self.reason: str | None = None
        """Why it is not packed."""
        self._shared_attention = PACKED
        self.stock_attentions = attentions_of(model)
        """What it came with."""
        if any(name == PACKED for _, name in self.stock_attentions):  # it has been in another of these
            self.stock_attentions = model.__dict__.get("stock_attentions", self.stock_attentions)
        self._last_layer = LastLayer(model.base_model)
        self._apply_options()

    def _apply_options(self) -> None:
        if self.options.allocator and self.model.device.type == "cpu":
            keep_freed_memory()
        if self.options.onednn == "on" and not onednn_available():
            raise ValueError(
                'logprobs.onednn "on": this build of torch has no oneDNN linear operator; use "auto" or "off"'
            )
        width = getattr(self.model.config.get_text_config(), "hidden_size", ONEDNN_WIDTH)
        gains = self.options.onednn == "auto" and not self.options.compile and onednn_gains(width)
        self._onednn = self.options.onednn == "on" or gains
        use_onednn(self.model, self._onednn)
        if self.options.compile:
            layers = next(m for m in self.model.base_model.modules() if isinstance(m, nn.ModuleList))
            for layer in layers[:-1]:  # the last has hooks, `LastLayer`, that the compiler would break on
                layer.compile(dynamic=True)

    # ------------------------------------------------------------ the forward

    def forward(self, input_ids: Tensor, lengths: Lengths) -> CompletionOutput:
        """Arguments as `collate` makes them: [T] and, for each example, the tokens of prompt and completions."""
        if self.route is None or (self.tried and longest_row(lengths) > self.tried):
            self.settle(input_ids, lengths)
        with self._precision(input_ids.device), self._embedding_by_rows():
            return (self._packed if self.route == "packed" else self._padded)(input_ids, lengths)

    def _precision(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.options.autocast)

    @contextmanager
    def _embedding_by_rows(self) -> Iterator[None]:
        """Inside, on a CPU, a large embedding tied to the head has as its gradient the rows that were looked up, which
        are added to a copy of the head's: else it is itself [V, H], nearly all zeros, and their sum a third of these.
        With a reward head there may be no gradient of the head to add to, and optimizers do not take rows alone;
        without one, every gradient of this forward is one of log-probs, and so of the head."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if not (
            isinstance(embedding, nn.Embedding)
            and type(head) is nn.Linear
            and embedding.weight is head.weight
            and type(head.weight) is nn.Parameter  # not one that FSDP shares out
            and head.weight.device.type == "cpu"
            and head.weight.numel() >= LARGE_HEAD
            and self.reward_head is None
        ):
            yield
            return
        before, embedding.sparse = embedding.sparse, True
        try:
            yield
        finally:
            embedding.sparse = before

    def _packed(self, input_ids: Tensor, lengths: Lengths) -> CompletionOutput:
        layout = Layout(lengths, input_ids.device)
        inputs: dict[str, Any] = {
            "input_ids": input_ids[None],
            "position_ids": layout.positions_T[None],
            "use_cache": False,
            **self._sharing(layout),
        }
        if self.is_reward_model or self.plain_head:
            states_TH = self.call(self.model.base_model, **inputs).last_hidden_state[0]
            return self._read(states_TH, input_ids, layout)
        logits_1CV, states_1TH = self._logits(inputs, layout.states_C)
        return self._read(None if states_1TH is None else states_1TH[0], input_ids, layout, logits_1CV[0])

    def _logits(self, inputs: dict[str, Any], keep: Tensor) -> tuple[Tensor, Tensor | None]:
        """The head's logits at these positions, and the last hidden states where there is a reward head."""
        takes = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        with self.last_states() as states:
            output = self.call(self.model, **inputs, **({"logits_to_keep": keep} if takes else {}))
        logits = output.logits if takes else output.logits[:, keep]
        return logits, states[-1] if self.reward_head is not None else None

    def call(self, module: nn.Module, **inputs: Any) -> Any:
        """The wrapped model's own forward; an exception out of it says so to the trial."""
        with _from_the_model():
            return module(**inputs)

    def _sharing(self, layout: Layout) -> dict[str, Any]:
        """How the attention learns who sees whom."""
        if self._shared_attention == PACKED:
            return {"attention_mask": None, "packed": layout}
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ())
        if len(kinds) > 1:
            return {
                "attention_mask": {k: layout.flex_mask(window if k == "sliding_attention" else None) for k in kinds}
            }
        slides = kinds == {"sliding_attention"} or (not kinds and getattr(config, "use_sliding_window", True))
        return {"attention_mask": layout.flex_mask(window if slides else None)}

    def _padded(self, input_ids: Tensor, lengths: Lengths) -> CompletionOutput:
        """Rows of prompt and one completion, padded on the right: any causal forward is exact on them as it is."""
        layout = Layout(lengths, input_ids.device)
        # Which packed token each cell holds; padding repeats the row's first and is read by nothing.
        pieces, total = [], 0
        for prompt, *completions in lengths:
            head, offset = torch.arange(total, total + prompt), total + prompt
            for count in completions:
                pieces.append(torch.cat([head, torch.arange(offset, offset + count)]))
                offset += count
            total = offset
        sizes = torch.tensor([len(piece) for piece in pieces])
        longest = int(sizes.max())
        cells_RP = torch.stack([nn.functional.pad(p, (0, longest - len(p)), value=int(p[0])) for p in pieces])
        ids_RP = input_ids[cells_RP.to(input_ids.device)]
        rows = torch.arange(len(pieces), device=input_ids.device)
        ends, counts = sizes.to(input_ids.device) - 1, layout.counts_R
        # No mask: padding comes last, so nothing looks at it; and a masked pad token that sees nothing would be NaN.
        inputs = {"input_ids": ids_RP, "attention_mask": torch.ones_like(ids_RP), "use_cache": False}
        if self.is_reward_model:
            states = self.call(self.model.base_model, **inputs).last_hidden_state[rows, ends]
            return CompletionOutput(None, counts, rewards_of(self.model.score, states))
        # Position t is predicted by the state at t - 1; the head runs only where some row has a completion token.
        steps = torch.arange(longest, device=input_ids.device)[None]
        predicts = (steps >= (ends - counts)[:, None]) & (steps < ends[:, None])
        targets_C = input_ids[layout.targets_C]
        if self.plain_head:
            states_RPH = self.call(self.model.base_model, **inputs).last_hidden_state
            # Mamba's states are float32 whatever the weights are.
            wide = self.model.get_output_embeddings().weight.dtype
            logps_C = self._head_logps(states_RPH[predicts].to(wide), targets_C)
        else:
            keep = predicts.any(0).nonzero()[:, 0]
            logits_RKV, states_RPH = self._logits(inputs, keep)
            logps_C = _log_softmax(logits_RKV[predicts[:, keep]], targets_C)
        states_RH = None if self.reward_head is None else states_RPH[rows, ends]
        return CompletionOutput(_sum_rows(logps_C, layout), counts, self._rewards(states_RH))

    def _read(
        self, states_TH: Tensor | None, input_ids: Tensor, layout: Layout, logits_CV: Tensor | None = None
    ) -> CompletionOutput:
        """Log-probs and rewards from the states of packed rows, or from the logits of a head that is not plain."""
        ends_RH = None if states_TH is None else states_TH[layout.ends_R]
        if self.is_reward_model:
            assert ends_RH is not None
            return CompletionOutput(None, layout.counts_R, rewards_of(self.model.score, ends_RH))
        targets_C = input_ids[layout.targets_C]
        if logits_CV is None:
            assert states_TH is not None
            logps_C = self._head_logps(states_TH[layout.states_C], targets_C)
        else:
            logps_C = _log_softmax(logits_CV, targets_C)
        rewards = self._rewards(ends_RH if self.reward_head is not None else None)
        return CompletionOutput(_sum_rows(logps_C, layout), layout.counts_R, rewards)

    def _head_logps(self, states_CH: Tensor, targets_C: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        return linear_logps(states_CH, head, targets_C, onednn=self._onednn)

    def _rewards(self, states_RH: Tensor | None) -> Tensor | None:
        if states_RH is None:
            return None
        assert self.reward_head is not None
        return rewards_of(self.reward_head, states_RH)

    @contextmanager
    def last_states(self) -> Iterator[list[Tensor]]:
        """The last hidden states, [B, T, H], of the forward passes inside: what the language-model head reads. They are
        not always those of the last layer, which `output_hidden_states` gives (OPT-350m projects them); some models run
        their decoder past its wrapper, the base model.
        """
        states: list[Tensor] = []
        if self.reward_head is None:
            yield states
            return
        watched = {id(module): module for module in (self.model.get_decoder(), self.model.base_model)}
        hooks = [
            module.register_forward_hook(lambda _, __, output: states.append(output[0])) for module in watched.values()
        ]
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    # ------------------------------------------------------------ the route

    def settle(self, input_ids: Tensor, lengths: Lengths, device: torch.device | None = None) -> Route:
        """Chooses the route by a trial, see `lm.logprobs.trial`, with rows as long as the longest of these, which
        should be the longest there are (a sliding window shows only in rows longer than it).

        Args:
            input_ids: as of `collate`; the trial has tokens of its own.
            lengths: likewise.
            device: where the model is going to run; None for where it is.

        Raises:
            ValueError: `logprobs.route` is "packed", and the architecture gives other numbers that way; or padded rows
                give other numbers too; or the plain forward fails.
        """
        longest, device, name = longest_row(lengths), device or self.model.device, type(self.model).__name__
        check_positions(self.model.config, longest, name)
        trial, problem = Trial(self, longest, device), 'logprobs.route is "padded"'
        if self.options.route != "padded":
            ways = [(PACKED, True), (PACKED, False)]
            for attention, spare in ways if device.type == "cpu" else [("flex_attention", False), *ways]:
                found = trial.packed(attention, spare)
                if found is None:
                    self.sharing = (attention, spare)
                    self._take("packed", longest, None)
                    self.model.__dict__["stock_attentions"] = self.stock_attentions
                    self.model.set_attn_implementation(attention)
                    if attention == "flex_attention":
                        allow_recompiling()
                    return "packed"
                problem = found
            if self.options.route == "packed":
                raise ValueError(f'logprobs.route "packed" does not fit {name}: {problem}; use "auto" or "padded"')
        padding = trial.padded()
        if padding is not None:
            raise ValueError(
                f"{name}: a row's numbers depend on the rows that it is padded to ({padding}), and packed rows do not "
                f"fit it either ({problem}); no route is exact for this model"
            )
        if self.options.route != "padded":
            log.warning("%s takes the padded route, packed rows do not fit it: %s", name, problem)
        if trial.unchecked is not None:
            log.warning("%s takes padded rows that were not tried: %s", name, trial.unchecked)
        if self.route == "packed":  # of shorter rows
            _set_attentions(self.stock_attentions)
        return self._take("padded", longest, problem)

    def _take(self, route: Route, longest: int, reason: str | None) -> Route:
        self.route, self.tried, self.reason = route, longest, reason
        return route

    @property
    def sharing(self) -> tuple[str, bool]:
        """How packed rows are computed: by which attention function, and whether the last layer is spared."""
        return self._shared_attention, self._last_layer.on

    @sharing.setter
    def sharing(self, how: tuple[str, bool]) -> None:
        self._shared_attention, self._last_layer.on = how

    @contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        before = attentions_of(self.model)
        with _from_the_model():
            self.model.set_attn_implementation(name)
        try:
            yield
        finally:
            _set_attentions(before)

    @contextmanager
    def stock(self) -> Iterator[PreTrainedModel]:
        """The wrapped model with the attention that it came with: for `generate`, or for saving."""
        before = attentions_of(self.model)
        _set_attentions(self.stock_attentions)
        try:
            with self.uncompiled():
                yield self.model
        finally:
            _set_attentions(before)

    def uncompiled(self) -> AbstractContextManager[Any]:
        """For forwards other than of packed rows, which layers are compiled for: with a cache every layer would be
        compiled anew until torch's limit of versions, and packed rows would then run uncompiled."""
        return torch.compiler.set_stance("force_eager") if self.options.compile else nullcontext()

    # What the Trainer and accelerate ask of a model, passed on.
    @property
    def _no_split_modules(self) -> list[str]:
        """The layers that FSDP is to shard one by one."""
        return list(self.model._no_split_modules or ())

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether the wrapped model computes activations again in the backward."""
        return bool(self.model.is_activation_checkpointing)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Activation checkpointing of the wrapped model."""
        self.model.activation_checkpointing_enable(*args, **kwargs)


def attentions_of(model: PreTrainedModel) -> list[tuple[PretrainedConfig, str]]:
    """The attention of each part of a model: that of a text part need not be that of the whole, as where a vision part
    knows but one."""
    parts = [model.config, model.config.get_text_config()]
    parts += [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    return [(config, config._attn_implementation) for config in {id(part): part for part in parts}.values()]


def _set_attentions(attentions: Sequence[tuple[PretrainedConfig, str]]) -> None:
    for config, name in attentions:
        config._attn_implementation_internal = name  # the property would set the parts of this part as well


def _head_seems_plain(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    after = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    scaled = any(getattr(config, name, None) not in (None, 1, 1.0) for name in after)
    beside = model.base_model is not model  # some classes do not say which of their parts it is
    return type(model.get_output_embeddings()) is nn.Linear and beside and not scaled


@contextmanager
def _from_the_model() -> Iterator[None]:
    """Marks exceptions as the model's own, for `lm.logprobs.trial.of_the_model`."""
    try:
        yield
    except Exception as error:
        error.__dict__["in_forward"] = True
        raise


def state_width(model: PreTrainedModel) -> int:
    """How wide the last hidden state is, by a pass of one token: the config's hidden_size need not say (OPT-350m)."""
    was_training = model.training
    with torch.no_grad():
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        states = model.eval().base_model(input_ids=ids, use_cache=False)[0]
    model.train(was_training)
    return int(states.shape[-1])


def _log_softmax(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    return -nn.functional.cross_entropy(at_least_float32(logits_CV), targets_C, reduction="none")


def _sum_rows(logps_C: Tensor, layout: Layout) -> Tensor:
    return torch.zeros(len(layout.counts_R), dtype=logps_C.dtype, device=logps_C.device).index_add(
        0, layout.rows_C, logps_C
    )
