"""FSDP2 through accelerate: the parameters of one process, models saved whole, and launchers' options not ignored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from datasets import load_from_disk
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lm.base import ranks
from lm.logprobs.completions import CompletionOutput
from lm.models.loading import SCRATCH
from tests.fsdp_ranks import RESUMED, SHARDED, experiment, run_stages
from tests.small_run import SMALL

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "lm" / "configs" / "accelerate"


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    """By `accelerate launch` with the shipped config, on two processes of this machine that talk by gloo."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "fsdp2.yaml")]
    return subprocess.run(
        [sys.executable, *launcher, "--num_processes", "2", "--main_process_port", "0", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every job on two processes, in float64."""
    out = tmp_path_factory.mktemp("sharded")
    done = launch(str(ROOT / "tests" / "fsdp_ranks.py"), str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def read(path: Path) -> dict[str, Tensor]:
    values: dict[str, Tensor] = torch.load(path, weights_only=True)
    return values


def largest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference, relative to the largest parameter."""
    assert one.keys() == other.keys()
    scale = max(float(value.abs().max()) for value in one.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) / scale


@pytest.mark.thorough
@pytest.mark.parametrize("name", SHARDED)
def test_sharded_training_gives_the_parameters_of_one_process(name: str, sharded: Path, tmp_path: Path) -> None:
    """Also with several micro-batches, an uneven last mini-batch, adapters and a reward head."""
    found, expected = read(sharded / f"{name}.pt"), SHARDED[name].run(tmp_path)
    assert found.pop("units") == 3, "each of two layers, and the rest"
    assert expected.pop("units") == 0
    for logged in ("loss", "accuracy"):
        if logged in found:
            torch.testing.assert_close(found.pop(logged), expected.pop(logged), rtol=1e-5, atol=1e-6)
    assert largest(found, expected) <= 1e-10
    start = {f"model.{key}": value for key, value in SHARDED[name].base().state_dict().items()}
    assert max(float((found[key] - start[key]).abs().max()) for key in start) > 1e-3, "training moved them"


@pytest.mark.thorough
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_sharded_run_is_bit_identical(name: str, sharded: Path) -> None:
    whole, parts = (read(sharded / f"{name} in {how}.pt") for how in ("one go", "two"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    earlier = sharded / "runs" / f"{name}-in-two" / RESUMED[name].method / "checkpoint-1"
    assert (earlier / "trainer_state.json").is_file(), "there was something to resume from"


def test_fsdp_finds_the_tensors_of_an_output() -> None:
    """Else it would not know when the backward begins, nor add the ranks' gradients up."""
    logps = torch.zeros(2)
    assert tree_leaves(CompletionOutput(logps, torch.ones(2), None))[0] is logps


# ---------------------------------------------------------------- the stages around it


@pytest.fixture(scope="module")
def runs(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The experiment on one process, and sharded over two."""
    alone = tmp_path_factory.mktemp("alone") / "experiment"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCRATCH, "scratch:tiny", SMALL)
        run_stages(experiment(alone))
    return alone / "run", sharded / "experiment" / "run"


@pytest.mark.thorough
def test_saved_models_are_whole_and_those_of_one_process(runs: tuple[Path, Path]) -> None:
    one, two = runs

    def files(run: Path) -> dict[str, Path]:
        """By stage, artifact and file, without the keys, in which is the path of the data."""
        return {
            str(Path(path.parts[0], path.parts[1].rsplit("-", 1)[0], *path.parts[2:])): path
            for path in (path.relative_to(run) for path in sorted(run.rglob("*.safetensors")))
        }

    assert files(one).keys() == files(two).keys()
    assert files(two).keys() >= {
        "sft/policy/model.safetensors",
        "oracle/oracle/model.safetensors",
        "policy/drdo/model.safetensors",
        "policy/drdo/reward_head.safetensors",
        "policy/drdo/adapter/adapter_model.safetensors",
        "policy/drdo/step-1/model.safetensors",
    }
    start = load_file(two / files(two)["sft/policy/model.safetensors"])
    for name, path in files(two).items():
        found = load_file(two / path)
        assert largest(found, load_file(one / files(one)[name])) < 1e-6, name
        if "model.safetensors" in name and "adapter" not in name and not name.startswith("sft"):
            assert max(float((found[key] - start[key]).abs().max()) for key in start) > 1e-3, f"{name}: trained"
    for kind, auto in (("policy", AutoModelForCausalLM), ("oracle", AutoModelForSequenceClassification)):
        (folder,) = (two / kind).iterdir()
        _, told = auto.from_pretrained(folder, output_loading_info=True)
        assert not told["missing_keys"], kind
        assert not told["unexpected_keys"], kind


@pytest.mark.thorough
def test_stages_between_trainings_find_what_one_process_finds(runs: tuple[Path, Path]) -> None:
    """They read the models whole on every rank, and share the rows out."""
    records = []
    for run in runs:
        found = [json.loads(path.read_text()) for path in run.glob("*/*/artifact.json")]
        records.append({(record["stage"], record["name"]): record for record in found})
    assert records[0].keys() == records[1].keys()
    assert [record["score", "pairs"]["provenance"]["ranks"] for record in records] == [1, 2]
    accuracies = [record["oracle", "oracle"]["metrics"]["accuracy"] for record in records]
    assert accuracies[0] == accuracies[1]
    pairs = [load_from_disk(str(next((run / "score").iterdir()) / "pairs")) for run in runs]
    for column in ("ref_chosen_logps", "ref_rejected_logps", "ref_sample_logps"):
        one, two = (torch.tensor(scored[column][:], dtype=torch.float64) for scored in pairs)
        torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-6, msg=column)


# ---------------------------------------------------------------- the launcher's options


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "distributed_type must be FSDP, or MULTI_GPU for DDP, got DEEPSPEED"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "distributed_type must be FSDP, .* got MEGATRON_LM"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision must be \"no\", got 'bf16': our option logprobs"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, r"fsdp_config\.fsdp_version must be 2, got 1"),
        ({"ACCELERATE_USE_FSDP": "true"}, r"fsdp_config\.fsdp_version must be 2, got 1"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
            r"fsdp_config\.fsdp_state_dict_type must be SHARDED_STATE_DICT, got FULL_STATE_DICT: ranks that resume",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            r"fsdp_config\.fsdp_cpu_ram_efficient_loading must be false, got true",
        ),
    ],
)
def test_what_a_launcher_asks_for_in_vain_is_refused(
    asked: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks.check_launch()
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), ranks.together("cpu"):
        pass


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_shipped_configs_are_accelerates_and_ask_for_nothing_in_vain(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert str(config.distributed_type).endswith({"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[name])
    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    assert set(config.fsdp_config or {}) <= known, "a misspelt option would be passed over"
    arguments, *_ = _validate_launch_command(parser.parse_args(["--config_file", str(path), "script.py"]))
    arguments.num_processes = 2
    for variable, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(variable, value)
    ranks.check_launch()
    assert ranks.sharding() == (name == "fsdp2")
