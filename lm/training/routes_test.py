"""Trainings of architectures that packed rows do not fit are those of padded rows, step by step."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from lm.config import LogprobsConfig
from lm.logprobs.completions import CompletionModel
from lm.objectives import DistilledDPO
from lm.training.batches import pair_collator, sft_collator
from lm.training.loop import fit, training_arguments
from lm.training.policy import PolicyTrainer
from lm.training.trainer import SFTTrainer
from tests.tiny import causal_lm, pairs, training

UNPACKABLE = ("bloom", "falcon-alibi", "lfm2", "qwen3-next", "recurrent-gemma", "jamba", "mamba", "mamba2", "rwkv")
IN_DEFAULT = ("falcon-alibi", "lfm2")


def references(count: int) -> Dataset:
    """Rows of one completion each, as SFT reads them."""
    rows = pairs(count).to_list()
    return Dataset.from_list(
        [{"completion_ids": r["chosen_ids"], **{n: r[n] for n in ("id", "prompt_ids")}} for r in rows]
    )


def trained(architecture: str, what: str, route: str, folder: Path) -> tuple[CompletionModel, list[float]]:
    torch.manual_seed(0)
    model = CompletionModel(causal_lm(architecture), options=LogprobsConfig(route=route, allocator=False))  # type: ignore[arg-type]
    if route == "packed":  # what no option brings about
        model.settle = lambda *args: setattr(model, "route", "packed")  # type: ignore[assignment, method-assign]
        model.model.set_attn_implementation("lm_packed")
    options = training(max_steps=3, learning_rate=1e-3, micro_batch_size=3)
    arguments = training_arguments(options, folder / f"{what}-{route}", seed=3, device="cpu")
    extra: dict[str, Any] = {"method": DistilledDPO()} if what == "d-dpo" else {}
    data, collator = (references(12), sft_collator()) if what == "sft" else (pairs(12), pair_collator())
    history = fit(SFTTrainer if what == "sft" else PolicyTrainer, model, data, collator, arguments, **extra)
    return model, [line["loss"] for line in history if "loss" in line]


def parameters(model: CompletionModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("what", ["sft", "d-dpo"])
@pytest.mark.parametrize(
    "architecture", [pytest.param(n, marks=[] if n in IN_DEFAULT else [pytest.mark.thorough]) for n in UNPACKABLE]
)
def test_what_cannot_be_packed_is_trained_as_padded_rows_are(architecture: str, what: str, tmp_path: Path) -> None:
    """Parameters and losses of three steps, by default and by padded rows. Control: packed, they are others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fast kernels that are not there
        (ours, losses), (padded, right) = (trained(architecture, what, route, tmp_path) for route in ("auto", "padded"))
        (packed, wrong) = trained(architecture, what, "packed", tmp_path)
    assert ours.route == "padded"
    assert losses == pytest.approx(right, abs=1e-9)
    for name, value in parameters(ours).items():
        assert float((value - parameters(padded)[name]).abs().max()) <= 1e-9, name
    assert packed.route == "packed"
    assert max(abs(one - other) for one, other in zip(wrong, right, strict=True)) > 1e-3
    assert max(float((v - parameters(padded)[n]).abs().max()) for n, v in parameters(packed).items()) > 1e-4


def test_a_probe_longer_than_the_training_rows_is_tried_too(tmp_path: Path) -> None:
    """The longest of both sets: a window may cut the one and not the other."""
    rows = pairs(8).to_list()
    long = [{**row, "rejected_ids": [2] * 30} for row in rows[:2]]
    for probe in (None, Dataset.from_list(long)):
        model = CompletionModel(causal_lm(), options=LogprobsConfig(allocator=False))
        probes = int(probe is not None)
        arguments = training_arguments(training(), tmp_path / str(probes), seed=3, device="cpu", probes=probes)
        data = Dataset.from_list(rows)
        fit(PolicyTrainer, model, data, pair_collator(), arguments, method=DistilledDPO(), eval_dataset=probe)
        seen = [*rows, *(long if probes else [])]
        assert model.tried == max(
            len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in seen
        )
