"""What no gradient of text reaches is frozen before there is an optimiser, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel

from lm.logprobs.completions import CompletionModel, collate
from lm.training.batches import sft_collator
from lm.training.loop import fit, training_arguments
from lm.training.trainer import SFTTrainer
from lm.training.unreached import freeze_unreached
from tests.tiny import _HEADS, causal_lm, pairs, reward_model, training

BATCH: dict[str, Any] = collate([[3, 4, 5]], [[[6, 7, 1], [8, 1]]])


def sees() -> PreTrainedModel:
    """A Gemma 3 of images and text."""
    text = {**_HEADS, "sliding_window": 5, "query_pre_attn_scalar": 8}
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def left(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def without_gradient(model: CompletionModel) -> set[str]:
    output = model(**BATCH)
    parts = [part for part in (output.logps, output.rewards) if part is not None]
    torch.autograd.backward(torch.cat(parts).sum())
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}


def test_the_half_that_sees_is_frozen_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model = CompletionModel(sees()).eval()
    assert without_gradient(CompletionModel(sees())), "today DDP waits for these"
    frozen = freeze_unreached(model, **BATCH)
    assert set(frozen) == left(model) == without_gradient(CompletionModel(sees()))
    assert all("vision_tower" in name or "multi_modal_projector" in name for name in frozen)
    assert "get no gradient from text and are frozen, in model.multi_modal_projector, model.vision_tower" in caplog.text
    assert model.route is None
    assert not model.training


@pytest.mark.parametrize("architecture", ["llama", "qwen3-moe", "mamba", "opt", "lfm2", "gpt-oss"])
def test_nothing_of_a_language_model_is_frozen(architecture: str) -> None:
    model = CompletionModel(causal_lm(architecture))
    assert freeze_unreached(model, **BATCH) == []
    assert left(model) == set()


def test_heads_are_not_frozen_and_experts_wait_for_their_tokens() -> None:
    for model in (CompletionModel(reward_model()), CompletionModel(causal_lm(), reward_head=True)):
        assert freeze_unreached(model, **BATCH) == []
    base = causal_lm()

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(16, 16).double() for _ in range(2))

        def forward(self, states: Tensor) -> Tensor:
            result: Tensor = self.experts[0](states)
            return result

    base.model.layers[0].mlp = Experts()
    assert freeze_unreached(CompletionModel(base), **BATCH) == []


def test_a_model_that_sees_trains_under_ddp(tmp_path: Path) -> None:
    """Two steps: DDP says at the second that parameters of the first had no gradient."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        for frozen in (False, True):
            model = CompletionModel(sees())
            model(**BATCH)  # settles
            if frozen:
                freeze_unreached(model, **BATCH)
            wrapped = DistributedDataParallel(model)
            torch.autograd.backward(wrapped(**BATCH).logps.sum())
            if frozen:
                torch.autograd.backward(wrapped(**BATCH).logps.sum())
            else:
                with pytest.raises(RuntimeError, match=r"did not receive grad|not used in producing loss"):
                    wrapped(**BATCH)
    finally:
        dist.destroy_process_group()


def test_a_training_freezes_them_and_moves_the_rest(tmp_path: Path) -> None:
    model = CompletionModel(sees())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = pairs(8).rename_column("chosen_ids", "completion_ids")
    fit(SFTTrainer, model, rows, sft_collator(), training_arguments(training(), tmp_path, seed=3, device="cpu"))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert moved.isdisjoint(left(model))
    assert left(model)
