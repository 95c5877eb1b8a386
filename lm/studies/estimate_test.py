"""The estimate's arithmetic, against counts made in other ways; what it refuses; that the page shows what it prints."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lm.base.options import CONFIGS, parse
from lm.config import BiasConfig, Config, LoraConfig, ProbeConfig, TrainingConfig
from lm.data.lengths import largest_feasible
from lm.estimate import main
from lm.studies.bench_plan import Shape, useful_flops
from lm.studies.estimate import DATA, GPUS, Cost, Work, member_size, stages

PAGE = Path(__file__).parents[2] / "docs" / "full-runs.md"


@pytest.fixture(name="config", scope="module")
def _config() -> Config:
    return parse("lm.train", "", ["--config", str(CONFIGS / "tldr.yaml")])[0]


def work(config: Config, stage: str) -> Work:
    (found,) = [one for one in stages(config) if one.stage == stage]
    return found


def policy(config: Config, *methods: str, **training: Any) -> float:
    """Tokens passed by the policies, without their probes."""
    options = replace(config.policy, max_steps=10, batch_size=16, **training)
    return work(replace(config, methods=list(methods), policy=options, probe=ProbeConfig(pairs=0)), "policy").passes


def cost(config: Config, parameters: float = 7e9) -> Cost:
    return Cost(config=config, parameters=parameters, gpu=GPUS["h100"], utilisation=0.3)


def test_operations_a_token_are_those_of_a_llama() -> None:
    shape = Shape(hidden=4096, layers=32, heads=32, intermediate=11008, vocabulary=32000)
    layer = 4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate
    parameters = shape.layers * layer + 2 * shape.hidden * shape.vocabulary
    counted = useful_flops(shape, DATA["tldr"].prompt, [DATA["tldr"].completion] * 2, head=True, backward=True)
    assert 2 * parameters * DATA["tldr"].row(2) * 3 == pytest.approx(counted, rel=0.05)


def test_passes_of_a_policy_follow_from_its_method(config: Config) -> None:
    pairs, data = 10 * 16, DATA["tldr"]
    d_dpo = policy(config, "d-dpo")
    assert d_dpo == pairs * (data.prompt + 2 * data.completion) * 3
    assert policy(config, "p-dpo") == pairs * (data.prompt + 3 * data.completion) * 3  # a sample for the KL term
    assert policy(config, "e-dpo") == pairs * (data.prompt + 3 * data.completion) * 4  # a pass to choose the member
    assert policy(config, "d-dpo", "dpo") == 2 * d_dpo
    assert policy(config, "d-dpo", activation_checkpointing=True) == d_dpo / 3 * 4


def test_sweeps_and_snapshots_multiply_policies_and_bring_validation(config: Config) -> None:
    assert "validate" not in [one.stage for one in stages(config)]
    swept = replace(config, methods=["dpo"], sweep={"dpo": [{"beta": 0.1}, {"beta": 1.0}]}, snapshots=3)
    assert work(swept, "policy").kept == 6
    assert work(swept, "policy").passes == 2 * work(replace(config, methods=["dpo"]), "policy").passes
    assert work(swept, "validate").batches == 6 * -(-round(DATA["tldr"].pairs * 0.05) // config.sampling.batch_size)


def test_the_judge_reads_several_samples_of_each_probe_prompt(config: Config) -> None:
    def passed(samples: int, probe: int) -> list[float]:
        sampling = replace(config.sampling, reference_samples=samples)
        asked = replace(config, sampling=sampling, probe=replace(config.probe, pairs=probe))
        return [one.passes for one in stages(asked) if one.stage == "yardstick"]

    data = DATA["tldr"]
    assert passed(4, 100) == [100 * 4 * (data.prompt + data.completion)]
    assert passed(2, 10**6) == [round(data.pairs * config.data.valid_fraction) * 2 * data.row(1)], (
        "no more than held out"
    )
    assert passed(1, 100) == passed(4, 0) == [], "no best of one, nor of none"


def test_every_setting_that_is_swept_has_its_teachers(config: Config) -> None:
    def models(*settings: dict[str, Any]) -> int:
        return work(replace(config, methods=["drdo"], sweep={"drdo": list(settings)}), "reward").kept

    assert models({"alpha": 0.1}, {"alpha": 1.0}) == 1, "the one that methods share"
    assert models({"oracle_alpha": 0.01}, {"oracle_alpha": 0.1}) == 2, "an oracle each"
    assert models({"oracle_alpha": 0.01, "alpha": 0.1}, {"oracle_alpha": 0.01, "alpha": 1.0}) == 1
    assert models({"oracle_alpha": 0.01}, {"alpha": 1.0}) == 2, "its own, and the shared one"


def test_epochs_pass_over_what_is_left_to_train_on(config: Config) -> None:
    once = replace(config, sft=TrainingConfig(epochs=1, batch_size=16))
    data = DATA["tldr"]
    assert work(once, "sft").passes == pytest.approx(data.references * 0.85 * data.row(1) * 3)


@pytest.mark.parametrize("rho", [0.2, 0.35, 0.5, 0.8])
def test_members_are_as_large_as_the_subsets_allow(rho: float, config: Config) -> None:
    biased = 2000
    longer = round(rho * biased)
    classes = ["longer"] * longer + ["shorter"] * (biased - longer)
    feasible = min(largest_feasible(classes, share) for share in config.bias.member_fractions)  # type: ignore[arg-type]
    assert member_size(replace(config, bias=BiasConfig(rho=rho)), biased) == pytest.approx(feasible, abs=2)


def test_a_given_oracle_is_not_trained(config: Config) -> None:
    given = replace(config, oracle_model="a/judge")
    assert {one.stage for one in stages(config)} - {one.stage for one in stages(given)} == {"oracle"}


def test_memory_and_time_follow_the_precision(config: Config) -> None:
    autocast = replace(config, logprobs=replace(config.logprobs, autocast=True))
    assert cost(config).state_bytes == 16 * 7e9
    assert cost(autocast).state_bytes == 18 * 7e9
    assert cost(replace(config, dtype="bfloat16")).state_bytes == 8 * 7e9
    one = Work("any", True, passes=1e9)
    assert cost(autocast).hours(one) == pytest.approx(2 * 7e9 * 1e9 / (989e12 * 0.3) / 3600)
    assert cost(config).hours(one) / cost(autocast).hours(one) == pytest.approx(989 / 67)


def test_checkpointing_and_smaller_micro_batches_need_less_memory(config: Config) -> None:
    def bytes_with(**options: Any) -> float:
        names = ("sft", "oracle", "reward", "policy")
        return cost(replace(config, **{n: replace(getattr(config, n), **options) for n in names})).activation_bytes

    assert bytes_with(activation_checkpointing=True) < bytes_with(micro_batch_tokens=16384) / 3
    assert bytes_with(micro_batch_tokens=16384) < bytes_with()
    assert bytes_with(micro_batch_tokens=1) == bytes_with(micro_batch_size=1)  # an example goes alone, whole
    assert bytes_with(micro_batch_size=2) == pytest.approx(2 * bytes_with(micro_batch_size=1))


def with_adapters(config: Config, *stages: str, rank: int | None = 16) -> Config:
    return replace(config, lora=LoraConfig(rank=rank, stages=list(stages)))  # type: ignore[arg-type]


def test_an_adapters_parameters_are_those_of_a_llama(config: Config) -> None:
    width, inner, layers, rank = 4096, 11008, 32, 16
    counted = rank * layers * (4 * 2 * width + 3 * (width + inner))  # of 6.7B parameters, embeddings among them
    priced = cost(with_adapters(config, "policy", rank=rank)).adapter_bytes / 4
    assert priced == pytest.approx(counted, rel=0.1)
    assert cost(with_adapters(config, "policy", rank=4 * rank)).adapter_bytes == 4 * 4 * priced


def test_adapters_alone_have_gradients_and_moments(config: Config) -> None:
    every = cost(with_adapters(config, "sft", "oracle", "reward", "policy"))
    assert every.state_bytes == pytest.approx(4 * 7e9 + 4 * every.adapter_bytes)
    assert every.adapter_bytes < 0.01 * every.model_bytes
    autocast = cost(replace(every.config, logprobs=replace(config.logprobs, autocast=True)))
    assert autocast.state_bytes == pytest.approx(every.state_bytes + 2 * 7e9)
    three = with_adapters(config, "sft", "reward", "policy")
    assert cost(three).state_bytes == cost(config).state_bytes, "the oracle is trained whole"
    assert cost(replace(three, oracle_model="a/judge")).state_bytes == pytest.approx(every.state_bytes)
    assert cost(with_adapters(config, "policy", rank=None)).state_bytes == cost(config).state_bytes


def test_frozen_parameters_save_a_pass_of_the_backward(config: Config) -> None:
    pairs, data, lora = 10 * 16, DATA["tldr"], with_adapters(config, "policy")
    assert policy(lora, "d-dpo") == pairs * (data.prompt + 2 * data.completion) * 2
    assert policy(lora, "e-dpo", activation_checkpointing=True) == pairs * (data.prompt + 3 * data.completion) * 4
    for stage in ("sft", "oracle", "reward", "score", "evaluate"):
        assert work(lora, stage) == work(config, stage)
    other = with_adapters(config, "sft", "reward")
    for stage in ("sft", "reward"):
        assert work(other, stage).passes < work(config, stage).passes
    assert work(other, "policy") == work(config, "policy")


def test_an_adapter_lies_beside_its_merged_model(capsys: pytest.CaptureFixture[str]) -> None:
    def disk(*options: str) -> dict[str, int]:
        assert main(["--parameters", "7e9", "--config", str(CONFIGS / "tldr.yaml"), *options]) == 0
        rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
        return {row[1]: int(row[6].replace(",", "")) for row in rows if len(row) > 6 and row[2].isdecimal()}

    plain, lora = disk(), disk("--lora.rank", "64")
    assert lora["policy"] == plain["policy"] + 5  # 8 of 0.67 GB
    assert {stage: size for stage, size in lora.items() if size != plain[stage]}.keys() == {"policy", "all, one rho"}


def test_shared_stages_are_paid_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--parameters", "1e9", "--rhos", "7", "--config", str(CONFIGS / "tldr.yaml")]) == 0
    rows = {cells[1].strip(): cells for line in capsys.readouterr().out.splitlines() if (cells := line.split("|"))[1:]}
    models = {stage: int(cells[2].replace(",", "")) for stage, cells in rows.items() if cells[2].strip(" -:").isdigit()}
    assert (models["sft"], models["oracle"], models["reward"], models["policy"]) == (1, 1, 6, 8)
    assert models["all, one rho"] == 16
    assert models["all, 7 rho's"] == 2 + 7 * 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data.kind", "preferences"],
            "data.kind must be one of tldr, hh, with data.rewards models; got 'preferences'",
        ),
        (["--utilisation", "0"], "--utilisation must be above 0 and at most 1, got 0.0"),
        (["--utilisation", "nan"], "--utilisation must be above 0 and at most 1, got nan"),
        (["--rhos", "0"], "--rhos must be a finite number >= 1, got 0"),
        (["--parameters", "inf"], "--parameters must be a finite number >= 1, got inf"),
    ],
)
def test_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    size = [] if "--parameters" in arguments else ["--parameters", "1e9"]
    assert main([*size, "--config", str(CONFIGS / "tldr.yaml"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_page_shows_what_the_commands_print(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(PAGE.parents[1])
    page = PAGE.read_text(encoding="utf-8")
    commands = re.findall(r"```sh\npython -m lm\.estimate (.*?)\n```\n\n", page, flags=re.DOTALL)
    assert len(commands) >= 4
    for command in commands:
        assert main(shlex.split(command.replace("\\\n", " "))) == 0
        printed = capsys.readouterr().out
        assert f"{command}\n```\n\n{printed}" in page, f"docs/full-runs.md does not show what this prints: {command}"


@pytest.mark.parametrize(("dtype", "moved"), [(torch.float32, 1.0), (torch.bfloat16, 0.05)])
def test_bfloat16_parameters_round_small_updates_away(dtype: torch.dtype, moved: float) -> None:
    """Why the page trains float32 parameters: 100 AdamW steps at the presets' rate of 1e-6."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter((0.02 * torch.randn(10_000, generator=generator)).to(dtype))
    before = weights.detach().clone()
    optimiser = torch.optim.AdamW([weights], lr=1e-6, weight_decay=0.0)
    weights.grad = torch.randn(10_000, generator=generator).to(dtype)
    for _ in range(100):
        optimiser.step()
    share = float((weights.detach() != before).float().mean())
    assert share == 1 if moved == 1 else share < moved
