"""Settings that are trained together are what each is alone, as are logs, snapshots and probes, resumed or not."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lm.config import Config
from lm.logprobs.completions import CompletionModel, collate, longest_row
from lm.objectives import DPO, DRDO, EnsembleDPO, HullDPO, Method, Pessimism, PessimisticDPO
from lm.training import stack
from lm.training.batches import pair_collator
from lm.training.loop import Snapshots, fit, training_arguments
from lm.training.policy import PolicyTrainer
from lm.training.stack import Stack, misfit
from lm.training.together import TogetherTrainer, fit_together, why_alone
from tests.interrupted import Kill
from tests.tiny import ARCHITECTURES, causal_lm, pairs, reward_model, training, wrap

Parameters = dict[str, Tensor]
TARGET = Pessimism(alpha_start=0.05, alpha_end=0.05, target=0.5)
SWEEPS: dict[str, list[Method]] = {
    "dpo": [DPO(beta=0.1), DPO(beta=1.0), DPO(beta=10.0)],
    "p-dpo": [PessimisticDPO(beta=0.1), PessimisticDPO(beta=0.5, kl=Pessimism(alpha_start=0.1, alpha_end=1.0))],
    "p-dpo, target": [PessimisticDPO(beta=0.1, kl=TARGET), PessimisticDPO(beta=2.0, kl=TARGET)],
    "e-dpo": [EnsembleDPO(beta=0.1), EnsembleDPO(beta=2.0)],
    "hull-dpo": [HullDPO(beta=0.1), HullDPO(beta=2.0)],
    "drdo": [DRDO(alpha=0.3), DRDO(alpha=1.0)],
}
OPTIONS: dict[str, Any] = {
    "max_steps": 7,
    "max_grad_norm": 0.05,  # clips, each member by a factor of its own
    "weight_decay": 0.1,
    "schedule": "cosine",
    "warmup_fraction": 0.3,
    "logging_steps": 2,
}


@dataclass(frozen=True)
class Trained:
    """What a training left behind; parameters by step, the snapshots among them."""

    parameters: dict[int, Parameters]
    history: list[dict[str, float]]


def model_of(method: Method, **config: Any) -> CompletionModel:
    torch.manual_seed(0)
    return CompletionModel(causal_lm(**config), reward_head=method.needs_reward_head).double()


def values(model: CompletionModel) -> Parameters:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def given(methods: list[Method], folder: Path, soft: bool, options: dict[str, Any]) -> dict[str, Any]:
    arguments = training_arguments(training(**{**OPTIONS, **options}), folder, seed=3, device="cpu", probes=2)
    return {
        "dataset": pairs(20, soft=soft),  # the last mini-batch of an epoch has four pairs, the others eight
        "collator": pair_collator(sample=methods[0].needs_samples),
        "arguments": arguments,
        "eval_dataset": pairs(5, seed=1, soft=soft),
        "train_probe": pairs(3, soft=soft),
    }


def alone(method: Method, folder: Path, *, soft: bool = False, **options: Any) -> Trained:
    model, seen = model_of(method), dict[int, Parameters]()
    snapshots = Snapshots(3, lambda step: seen.update({step: values(model)}))
    known = given([method], folder, soft, options)
    history = fit(PolicyTrainer, model, method=method, callbacks=[snapshots], **known)
    return Trained({**seen, int(history[-1]["step"]): values(model)}, history)


def together(
    methods: list[Method], folder: Path, *, soft: bool = False, killed: int | None = None, **options: Any
) -> list[Trained]:
    seen: list[dict[int, Parameters]] = [{} for _ in methods]

    def save(whole: Stack, step: int) -> None:
        for member, of_member in enumerate(seen):
            of_member[step] = values(whole.unstack(member))

    def callbacks(whole: Stack) -> list[Any]:
        return [Snapshots(3, lambda step: save(whole, step)), *([] if killed is None else [Kill(killed, "step_end")])]

    found = fit_together(model_of(methods[0]), methods, callbacks=callbacks, **given(methods, folder, soft, options))
    assert found is not None
    whole, histories = found
    save(whole, int(histories[0][-1]["step"]))
    return [Trained(*both) for both in zip(seen, histories, strict=True)]


def distance(one: Trained, other: Trained) -> float:
    assert one.parameters.keys() == other.parameters.keys()
    return max(
        float((values[name] - other.parameters[step][name]).abs().max())
        for step, values in one.parameters.items()
        for name in values
    )


def told(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """All but how long it took."""
    return [
        {name: value for name, value in line.items() if not name.startswith("train_") and name != "total_flos"}
        for line in history
    ]


def assert_the_same(mine: Trained, lone: Trained) -> None:
    assert distance(mine, lone) <= 1e-10
    for line, expected in zip(told(mine.history), told(lone.history), strict=True):
        assert line == pytest.approx(expected, rel=2e-6, abs=1e-9)  # means of the log are in float32


BY_DEFAULT = {("dpo", False), ("p-dpo, target", True), ("e-dpo", True), ("drdo", False)}
"""Of each kind one: labels, dual ascent, an ensemble, a reward head."""


@pytest.mark.parametrize(
    ("name", "soft"),
    [
        pytest.param(name, soft, marks=[] if (name, soft) in BY_DEFAULT else pytest.mark.thorough)
        for name in SWEEPS
        for soft in (False, True)
    ],
)
def test_each_setting_is_what_it_is_alone(name: str, soft: bool, tmp_path: Path) -> None:
    """Parameters of both snapshots and the end, log lines, probes before, between and after."""
    methods = SWEEPS[name]
    lone = [alone(method, tmp_path / str(i), soft=soft) for i, method in enumerate(methods)]
    assert sorted(lone[0].parameters) == [2, 4, 7]
    assert distance(lone[0], lone[1]) > 1e-4, "or it would not matter who is who"
    for mine, expected in zip(together(methods, tmp_path / "stack", soft=soft), lone, strict=True):
        assert_the_same(mine, expected)


def test_gradients_clipped_by_the_norm_of_all_members_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control."""
    methods = SWEEPS["dpo"]
    lone = alone(methods[0], tmp_path / "alone")

    def of_all(self: TogetherTrainer, model: torch.nn.Module) -> Tensor:
        self._norms = [0.0] * len(methods)
        return torch.nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)

    monkeypatch.setattr(TogetherTrainer, "_clip_grad_norm", of_all)
    assert distance(together(methods, tmp_path / "stack")[0], lone) > 1e-6


@pytest.mark.parametrize("name", ["dpo", "p-dpo, target"])
def test_a_batch_that_is_killed_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    """Between two log lines, of which the first is in the checkpoint."""
    methods = SWEEPS[name]
    whole = together(methods, tmp_path / "whole", save_steps=3)
    with pytest.raises(KeyboardInterrupt):
        together(methods, tmp_path / "killed", save_steps=3, killed=4)
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-3"]
    for mine, expected in zip(together(methods, tmp_path / "killed", save_steps=3), whole, strict=True):
        for step in (4, 7):
            for parameter, value in expected.parameters[step].items():
                assert torch.equal(mine.parameters[step][parameter], value), (step, parameter)
        assert told(mine.history) == told(expected.history)


def test_a_gradient_that_is_not_finite_names_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = PolicyTrainer.losses

    def steep(self: Any, model: Any, batch: Any, known: Any = None) -> Any:
        """Finite, with a slope that is not, of one of them."""
        loss, logged = losses(self, model, batch, known)
        return (loss + (loss - loss.detach()).abs().sqrt() if self.method.beta == 10 else loss), logged

    monkeypatch.setattr(PolicyTrainer, "losses", steep)
    with pytest.raises(FloatingPointError, match=r"gradient norm of DPO\(beta=10.0\) is nan at step 0, .*row\d"):
        together(SWEEPS["dpo"], tmp_path)


# ---------------------------------------------------------------- the stack

EXAMPLES = collate([[5, 6, 7], [8, 9]], [[[3, 4, 1], [5, 1]], [[6, 7, 8, 1], [2, 1]]])


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name in ("llama", "qwen2", "gpt-neox")])
def test_a_stack_is_its_members(architecture: str) -> None:
    for model in (wrap(causal_lm(architecture)), wrap(reward_model(architecture))):
        model.settle(**EXAMPLES)
        before = values(model)
        assert misfit(model, **EXAMPLES) is None
        assert all(torch.equal(value, before[name]) for name, value in values(model).items())


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "qwen3-moe", "bloom"])
def test_a_model_that_cannot_be_stacked_is_told_apart_or_right(architecture: str) -> None:
    """Whatever its layers are: the trial has a reason, or a stack has the log-probs of two members that differ."""
    model = wrap(causal_lm(architecture))
    model.settle(**EXAMPLES)
    if misfit(model, **EXAMPLES) is None:
        other = copy.deepcopy(model)
        whole = Stack(model, 2)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                parameter.mul_(0.9)
                dict(whole.named_parameters())[name][1] = parameter
        for mine, one in zip(whole(**EXAMPLES), (model, other), strict=True):
            torch.testing.assert_close(mine.logps, one(**EXAMPLES).logps, rtol=1e-10, atol=1e-10)


def test_a_row_beyond_those_that_were_tried_is_refused() -> None:
    model = wrap(causal_lm())
    model.settle(**EXAMPLES)
    whole = Stack(model, 2)
    longest = longest_row(EXAMPLES["lengths"])
    with pytest.raises(ValueError, match=f"a row has 8 tokens, and the stack was settled for {longest}"):
        whole(**collate([[5, 6, 7, 8]], [[[3, 4, 6, 1]]]))


def test_a_layer_that_mixes_members_up_is_a_misfit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: every member's tokens by the first member's weights."""
    model = wrap(causal_lm())
    model.settle(**EXAMPLES)
    right = stack._Linear.forward
    monkeypatch.setattr(stack._Linear, "forward", lambda self, x: right(self, x.flip(-2)).flip(-2))
    reason = misfit(model, **EXAMPLES)
    assert reason is not None
    assert "are off by" in reason


def test_the_padding_token_of_an_embedding_learns_nothing_by_it() -> None:
    """As alone; its row of a tied head does."""
    padded = collate([[5, 0, 7]], [[[3, 0, 1], [5, 1]]])
    for tied in (False, True):
        model = wrap(causal_lm(tie_word_embeddings=tied))
        model.settle(**padded)
        assert misfit(model, **padded) is None


def test_a_model_that_cannot_be_stacked_is_trained_alone_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lm.training.together.misfit", lambda *_: "it is none")
    methods = SWEEPS["dpo"]
    made = fit_together(model_of(methods[0]), methods, callbacks=lambda _: [], **given(methods, tmp_path, False, {}))
    assert made is None
    assert "3 settings of DPO are trained one by one: it is none" in caplog.text


@pytest.mark.parametrize("option", ["micro_batch_size", "micro_batch_tokens"])
def test_what_saves_memory_is_honoured_by_training_alone(option: str) -> None:
    own = training()
    plain = Config(output_dir="x", model="scratch:tiny", sft=own, oracle=own, policy=own, methods=["dpo"])
    cut = replace(plain, policy=training(**{option: 4}))
    assert why_alone(plain, 1000) is None
    assert option in str(why_alone(cut, 1000))
