"""A policy with adapters: the same by every route, pi_ref without them, merged into plain weights, resumed exactly."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from lm.base.store import seal
from lm.config import (
    BiasConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LogprobsConfig,
    LoraConfig,
    ProbeConfig,
    TrainingConfig,
    WorldConfig,
)
from lm.logprobs.completions import CompletionModel, collate
from lm.logprobs.scoring import score_rows
from lm.models.loading import SCRATCH, check_lora
from lm.models.lora import NAME, add_adapter, is_adapted, merged, save_adapter, without_adapter
from lm.objectives import DPO, DRDO, EnsembleDPO, Method
from lm.stages import trainings
from lm.stages.policies import policy
from lm.stages.rewards import reward
from lm.stages.run import Run
from lm.stages.trainings import inputs_of, sft
from lm.training.batches import pair_collator
from lm.training.loop import fit, training_arguments
from lm.training.policy import PolicyTrainer
from lm.training.trainer import RewardTrainer
from tests.interrupted import Kill
from tests.tiny import causal_lm, close, pairs, reward_model, training

LORA = LoraConfig(rank=3, alpha=4.0)
BASE = "./sft/policy-0"


def adapted(model: PreTrainedModel, *, moved: bool = True, options: LoraConfig = LORA) -> PreTrainedModel:
    """With adapters, far from the zero they start at where `moved`."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        add_adapter(model, options, base=BASE)
        for parameter in model.parameters() if moved else ():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


def batch(count: int = 4) -> dict[str, Any]:
    data = pairs(count)
    return collate(data["prompt_ids"][:], list(zip(data["chosen_ids"][:], data["rejected_ids"][:], strict=True)))


def outputs(model: PreTrainedModel, route: str = "packed") -> Tensor:
    options = LogprobsConfig(route=route, allocator=False)  # type: ignore[arg-type]
    output = CompletionModel(model, options=options)(**batch())
    return output.rewards if output.logps is None else output.logps  # type: ignore[no-any-return]


# ---------------------------------------------------------------- routes


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gpt2", "phi3-sliding", "gpt-neox", "granite", "opt"])
def test_packed_and_padded_give_the_same_log_probs_and_adapter_gradients(name: str) -> None:
    found = {}
    for route in ("packed", "padded"):
        model = adapted(causal_lm(name))
        logps = outputs(model, route)
        torch.autograd.backward((logps / 10).tanh().sum())
        found[route] = (logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    close(found["packed"][0], found["padded"][0])
    packed, padded = found["packed"][1], found["padded"][1]
    assert packed.keys() == padded.keys()
    assert all(".lora_A." in n or ".lora_B." in n for n in packed), "what was there before is frozen"
    for n, gradient in packed.items():
        assert gradient.abs().max() > 1e-8, n
        close(gradient, padded[n], what=n)
    plain = outputs(causal_lm(name))
    assert (plain - found["packed"][0]).abs().max() > 1e-2, "the adapters act"


def test_a_reward_model_has_adapters_and_a_head_of_its_own() -> None:
    found = []
    for route in ("packed", "padded"):
        model = adapted(reward_model())
        torch.autograd.backward(outputs(model, route).tanh().sum())
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any(n.startswith("score.") for n in found[0])
    assert found[0].keys() == found[1].keys()
    for n, gradient in found[0].items():
        close(gradient, found[1][n], what=n)


def test_an_architecture_that_packed_rows_do_not_fit_falls_back_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lm.logprobs"):
        model = CompletionModel(adapted(causal_lm("stablelm")), options=LogprobsConfig(allocator=False))
        model(**batch())
    assert model.route == "padded"
    assert "StableLmForCausalLM takes the padded route" in caplog.text


def test_pefts_own_wrapper_is_seen_through_and_longer_prompts_are_refused() -> None:
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "lm_head"])
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):  # peft's, of transformers
        wrapped = peft.get_peft_model(causal_lm(), config)
    model = CompletionModel(wrapped, options=LogprobsConfig(allocator=False))
    output = model(**batch())
    assert model.route == "packed"
    with model.stock():
        close(output.logps, outputs(wrapped, "padded"))
    with wrapped.disable_adapter():
        assert (model(**batch()).logps - output.logps).abs().max() > 1e-3, "the head's adapter acts as well"
        close(model(**batch()).logps, outputs(causal_lm()))
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        longer = peft.get_peft_model(
            causal_lm(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", token_dim=16)
        )
    with pytest.raises(ValueError, match=r"PROMPT_TUNING: adapters that lengthen the prompt are not supported"):
        CompletionModel(longer)


def test_adapters_of_a_model_in_16_bits_are_kept_in_32() -> None:
    model = adapted(causal_lm().bfloat16(), moved=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


# ---------------------------------------------------------------- training


def train(
    folder: Path, method: Method, *, callbacks: Iterable[Any] = (), options: LoraConfig = LORA, **how: Any
) -> CompletionModel:
    torch.manual_seed(0)
    policy = causal_lm()
    add_adapter(policy, options, base=BASE)
    model = CompletionModel(
        policy, reward_head=method.needs_reward_head, options=LogprobsConfig(allocator=False)
    ).double()
    arguments = training_arguments(training(**how), folder, seed=3, device="cpu")
    collator = pair_collator(sample=method.needs_samples)
    fit(PolicyTrainer, model, pairs(10), collator, arguments, method=method, callbacks=list(callbacks))
    return model


def test_training_moves_the_adapters_only_and_without_them_the_policy_is_pi_ref(tmp_path: Path) -> None:
    """Reference log-probs that were computed before are those of the policy without its adapters, for good."""
    data = pairs(10)
    rows = (data["prompt_ids"][:], data["chosen_ids"][:], "log-probs")
    reference = score_rows(CompletionModel(causal_lm(), options=LogprobsConfig(allocator=False)), *rows)
    start = CompletionModel(adapted(causal_lm(), moved=False), options=LogprobsConfig(allocator=False))
    assert torch.equal(score_rows(start, *rows), reference), "B is zero: training starts at pi_ref"
    trained = train(tmp_path, EnsembleDPO(), max_steps=3)
    before, after = causal_lm().state_dict(), trained.model.state_dict()
    for name, value in before.items():
        name = name if name in after else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(after[name], value), name
    assert (score_rows(trained, *rows) - reference).abs().max() > 1e-2
    with without_adapter(trained):
        close(score_rows(trained, *rows), reference)
    assert (score_rows(trained, *rows) - reference).abs().max() > 1e-2, "they are on again"
    assert all(p.requires_grad for n, p in trained.named_parameters() if ".lora_" in n)


@pytest.mark.parametrize(
    "how",
    [{"micro_batch_size": 2}, {"activation_checkpointing": True}],
    ids=["micro-batches", "checkpointing"],
)
def test_how_a_step_is_computed_changes_nothing(how: dict[str, Any], tmp_path: Path) -> None:
    one = train(tmp_path / "whole", EnsembleDPO()).state_dict()
    other = train(tmp_path / "other", EnsembleDPO(), **how).state_dict()
    for name, value in one.items():
        close(other[name], value, what=name)


@pytest.mark.parametrize("method", [EnsembleDPO(), DRDO()], ids=["e-dpo", "drdo"])
def test_a_resumed_run_is_bit_identical(method: Method, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 5,
        "batch_size": 4,
        "micro_batch_size": 2,
        "schedule": "cosine",
        "save_steps": 2,
    }
    whole = train(tmp_path / "whole", method, **options).state_dict()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", method, callbacks=[Kill(3, "step_end")], **options)
    file = tmp_path / "killed" / "checkpoint-2" / "model.safetensors"
    kept = load_file(file)
    assert all(".lora_" in name or name == "reward_head.weight" for name in kept), "adapters alone"
    assert ("reward_head.weight" in kept) == method.needs_reward_head
    assert any(not torch.equal(value, whole[name]) for name, value in kept.items()), "training went on after it"
    resumed = train(tmp_path / "killed", method, **options).state_dict()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path: Path) -> None:
    train(tmp_path, DPO(), max_steps=2, save_steps=1)
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    kept = load_file(file)
    some = dict(list(kept.items())[1:])
    for wrong in (some, {**kept, "another": torch.zeros(1)}):
        save_file(wrong, file)
        seal(file.parent)
        with pytest.raises(ValueError, match=r"model\.safetensors holds other adapters than lora says"):
            train(tmp_path, DPO(), max_steps=3, save_steps=1)


# ---------------------------------------------------------------- saved


def loaded(folder: Path, auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    model: PreTrainedModel = auto.from_pretrained(folder, dtype=torch.float64)
    for module in model.modules():  # as tests.tiny does: transformers' own computes in float32
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda hidden, own=module: (
                own.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + own.variance_epsilon)
            )
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merged_weights_load_in_transformers_and_the_adapter_in_peft(name: str, tied: bool, tmp_path: Path) -> None:
    model = adapted(causal_lm(name, tie_word_embeddings=tied))
    expected, before = outputs(model), {n: v.clone() for n, v in model.state_dict().items()}
    plain = merged(model, model.state_dict())
    plain.save_pretrained(tmp_path / "merged")
    save_adapter(model, model.state_dict(), tmp_path / "adapter")
    assert not is_adapted(plain)
    for n, value in model.state_dict().items():
        assert torch.equal(value, before[n]), f"{n}: training goes on from where it was"
    close(outputs(loaded(tmp_path / "merged")), expected)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["r"], written["lora_alpha"]) == (BASE, 3, 4.0)
    assert written["target_modules"] == sorted(written["target_modules"]), "the file is the same in every process"
    base = causal_lm(name, tie_word_embeddings=tied)
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):  # peft's, of transformers
        by_peft = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    close(outputs(by_peft), expected)
    assert (outputs(causal_lm(name, tie_word_embeddings=tied)) - expected).abs().max() > 1e-2


def test_a_merged_reward_model_has_the_trained_head(tmp_path: Path) -> None:
    model = adapted(reward_model())
    merged(model, model.state_dict()).save_pretrained(tmp_path)
    close(outputs(loaded(tmp_path, AutoModelForSequenceClassification)), outputs(model))
    assert torch.equal(loaded(tmp_path, AutoModelForSequenceClassification).score.weight, head_of(model))
    assert not torch.equal(head_of(model), reward_model().score.weight)


def head_of(model: PreTrainedModel) -> Tensor:
    weight: Tensor = model.score.modules_to_save[NAME].weight
    return weight


# ---------------------------------------------------------------- the run


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setitem(SCRATCH, "scratch:tiny", {**SCRATCH["scratch:tiny"], "hidden_size": 32, "vocab_size": 400})
    few = TrainingConfig(max_steps=2, batch_size=8, learning_rate=1e-2, warmup_fraction=0.0)
    return Config(
        output_dir=str(tmp_path / "run"),
        model="scratch:tiny",
        sft=few,
        oracle=few,
        reward=few,
        policy=few,
        device="cpu",
        dtype="float64",
        methods=["drdo"],
        snapshots=2,
        data=DataConfig(
            prompt_template="{post}\n\nTL;DR:",
            max_prompt_length=120,
            max_completion_length=60,
            valid_fraction=0.1,
            test_fraction=0.15,
            labels="given",
            world=WorldConfig(posts=60),
        ),
        bias=BiasConfig(rho=0.4, member_fractions=[0.4, 0.6]),
        probe=ProbeConfig(pairs=4, times=1),
        evaluation=EvaluationConfig(resamples=10),
    )


@pytest.mark.parametrize("stage", ["policy", "sft", "reward", "oracle"])
def test_an_adapter_names_the_model_that_it_is_of(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy's is of pi_ref, whatever reward models start from."""
    named: list[str] = []
    monkeypatch.setattr(trainings, "add_adapter", lambda model, options, base: named.append(base))
    start = SimpleNamespace(path=Path("run/sft/policy-1"))
    monkeypatch.setattr(trainings, "sft", lambda run: start)
    options = {
        "model": "base",
        "reward_base": "rewards",
        "oracle_base": "judge",
        "lora": None,
    }
    given = SimpleNamespace(**options, adapts=lambda _: True)
    run: Any = SimpleNamespace(config=given, store=SimpleNamespace(root=Path("run")))
    trainings.adapted(run, stage, object())
    expected = {"policy": "./sft/policy-1", "sft": "base", "reward": "rewards", "oracle": "judge"}
    assert named == [expected[stage]]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_policies_are_plain_models_with_their_adapters_beside_them(config: Config) -> None:
    with_adapters = replace(config, lora=LoraConfig(rank=2, stages=["sft", "oracle", "reward", "policy"]))
    run = Run(with_adapters)
    trained, start, main = policy(run, "drdo"), sft(run), reward(run, "rho")
    assert not list(trained.path.glob("checkpoint*"))
    for folder in (trained.path, trained.path / "step-1", start.path, main.path):
        weights = load_file(folder / "model.safetensors")
        assert not [name for name in weights if "lora" in name], folder
        adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert any(value.abs().max() > 0 for name, value in adapter.items() if ".lora_B." in name), "it was trained"
        (folder / "config.json").stat()
    assert (trained.path / "reward_head.safetensors").is_file()
    written = json.loads((trained.path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == f"./sft/{start.path.name}"
    # Merged is base and adapter, by hand for one layer.
    base, own = load_file(start.path / "model.safetensors"), load_file(trained.path / "model.safetensors")
    adapter = load_file(trained.path / "adapter" / "adapter_model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    down, up = (adapter[f"base_model.model.{layer}.lora_{which}.weight"] for which in "AB")
    close(own[f"{layer}.weight"], base[f"{layer}.weight"] + 16.0 / 2 * up @ down)
    assert not torch.equal(own[f"{layer}.weight"], base[f"{layer}.weight"])


def test_adapters_are_in_the_keys_of_the_stages_that_have_them_and_of_no_other(config: Config) -> None:
    def keys(**lora: Any) -> dict[str, dict[str, Any]]:
        run = Run(replace(config, lora=LoraConfig(**lora)))
        return {stage: inputs_of(run, stage, config.policy) for stage in ("sft", "reward", "policy")}

    without = keys()
    assert not any("lora" in inputs for inputs in without.values()), "artifacts from before it was an option"
    of_policies = keys(rank=2)
    assert of_policies["sft"] == without["sft"]
    assert of_policies["policy"] != without["policy"]
    both = keys(rank=2, stages=["reward", "policy"])
    assert both["policy"] == of_policies["policy"]
    assert both["reward"] != without["reward"]
    assert keys(rank=2, alpha=1.0)["policy"] != of_policies["policy"]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"LoraConfig\.rank must be > 0, got 0"),
        ({"alpha": 0.0}, r"LoraConfig\.alpha must be > 0, got 0\.0"),
        ({"target_modules": []}, r"LoraConfig\.target_modules must be one or more names of layers, or null, got \[\]"),
        ({"stages": []}, r"LoraConfig\.stages must be one or more of sft, oracle, .* got \[\]"),
        ({"stages": ["sft", "sft"]}, r"LoraConfig\.stages must be one or more of .* none twice, got \['sft', 'sft'\]"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


def test_layers_that_a_model_lacks_are_named_before_anything_is_computed(config: Config) -> None:
    wrong = LoraConfig(rank=2, target_modules=["q_proj", "query_key_value", "proj"])
    message = (
        r"lora\.target_modules: LlamaForCausalLM has no linear layer named query_key_value, proj; name some of "
        r"down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, or null for all of them"
    )
    with pytest.raises(ValueError, match=message):
        add_adapter(causal_lm(), wrong, base=BASE)
    with pytest.raises(ValueError, match=message):
        Run(replace(config, lora=wrong))
    Run(replace(config, lora=replace(wrong, rank=None)))  # off
    some = adapted(causal_lm(), options=replace(LORA, target_modules=["q_proj", "mlp.up_proj"]))
    assert {n.rsplit(".", 1)[-1] for n, m in some.named_modules() if isinstance(m, LoraLayer)} == {"q_proj", "up_proj"}


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    bare = causal_lm(num_hidden_layers=0)
    with pytest.raises(ValueError, match=r"lora\.rank 3: LlamaForCausalLM has no linear layer beside its head"):
        add_adapter(bare, LORA, base=BASE)
    bare.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lora\.rank 3: LlamaForCausalLM has no linear layer"):
        check_lora(str(tmp_path), LORA, False)
    check_lora(str(tmp_path), LoraConfig(), False)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"model '.*' *: its config cannot be loaded"):
        check_lora(str(tmp_path), LORA, False)


def test_layers_that_peft_knows_to_be_no_plain_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lora\.target_modules None: .*incompatible with Mamba"):
        add_adapter(causal_lm("mamba"), LORA, base=BASE)


def test_the_head_of_a_reward_model_is_trained_whole(tmp_path: Path) -> None:
    model = CompletionModel(adapted(reward_model(), moved=False), options=LogprobsConfig(allocator=False))
    head = head_of(model.model).clone()
    arguments = training_arguments(training(), tmp_path, seed=3, device="cpu")
    fit(RewardTrainer, model, pairs(8), pair_collator(), arguments)
    assert not torch.equal(head_of(model.model), head)
