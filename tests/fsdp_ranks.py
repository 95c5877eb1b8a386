"""Run by a launcher on two processes with FSDP2 asked for: what `tests/fsdp_test.py` also runs on one process.

    accelerate launch --config_file lm/configs/accelerate/fsdp2.yaml --num_processes 2 tests/fsdp_ranks.py OUT

Each job's parameters go to OUT/<job>.pt, the stages of an experiment to OUT/experiment.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lm.base import ranks
from lm.config import BiasConfig, Config, DataConfig, LoraConfig, ProbeConfig, TrainingConfig
from lm.data.rows import write_rows
from lm.logprobs.completions import CompletionModel
from lm.models import loading as models
from lm.stages.labels import oracle
from lm.stages.policies import policies
from lm.stages.run import Run
from tests.small_run import SMALL
from tests.two_ranks import Job

# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Sharded(Job):
    """Counts, under "units", the modules that were sharded each by itself."""

    def state(self, model: CompletionModel) -> dict[str, Tensor]:
        units = sum(isinstance(module, FSDPModule) for module in model.modules())
        return {**super().state(model), "units": torch.tensor(units)}


LORA = LoraConfig(rank=2)
SHARDED: dict[str, Job] = {
    "e-dpo": Sharded("e-dpo", options={"micro_batch_size": 2}),
    "drdo": Sharded("drdo", route="padded"),
    "sft": Sharded("sft"),
    "reward": Sharded("reward"),
    "uneven": Sharded(
        "hull-dpo", pairs=11, steps=2, options={"micro_batch_tokens": 40, "activation_checkpointing": True}
    ),
    "e-dpo with adapters": Sharded("e-dpo", steps=2, options={"micro_batch_size": 2}, lora=LORA),
    "reward with adapters": Sharded("reward", steps=2, lora=LORA),
}
RESUMED: dict[str, Job] = {"drdo": Job("drdo"), "adapters": Job("dpo", lora=LORA)}
"""Also run for two steps, in one go and in two."""


def train(out: Path) -> None:
    """Runs all jobs."""

    def run(name: str, job: Job, folder: str) -> None:
        result = job.run(out / "runs" / folder.replace(" ", "-"))
        if ranks.is_first():
            torch.save(result, out / f"{name}.pt")

    for name, job in SHARDED.items():
        run(name, job, name)
    for name, job in RESUMED.items():
        run(f"{name} in one go", replace(job, steps=2), f"{name} in one go")
        for steps in (1, 2):
            run(f"{name} in two", replace(job, steps=steps, options={"save_steps": 1}), f"{name} in two")


# ---------------------------------------------------------------- the stages around it


def experiment(folder: Path) -> Run:
    """A small one that distils given rewards: pi_ref and the oracle with all parameters, policies with adapters."""
    rng, data = random.Random(0), folder / "pairs.jsonl"
    words = "red blue green dog cat tree runs sleeps".split()

    def text() -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, 6)))

    def row(index: int) -> dict[str, object]:
        scores = {f"score_{side}": rng.gauss(0, 1) for side in ("chosen", "rejected")}
        return {"prompt": f"{text()} {index}?", "chosen": f" {text()} a", "rejected": f" {text()} b", **scores}

    if ranks.is_first():
        folder.mkdir(parents=True)
        write_rows(data, [row(index) for index in range(60)])
    ranks.wait()
    few = TrainingConfig(max_steps=2, batch_size=8, learning_rate=1e-2, warmup_fraction=0.0)
    models.SCRATCH["scratch:tiny"] = SMALL
    return Run(
        Config(
            output_dir=str(folder / "run"),
            model="scratch:tiny",
            device="cpu",
            dtype="float64",
            sft=few,
            oracle=few,
            reward=few,
            policy=few,
            lora=LoraConfig(rank=2),
            data=DataConfig(
                kind="preferences",
                path=str(data),
                labels="given",
                rewards="given",
                max_completion_length=16,
                valid_fraction=0.15,
                test_fraction=0.15,
            ),
            bias=BiasConfig(rho=None),
            probe=ProbeConfig(pairs=4, times=1),
            snapshots=2,
            methods=["drdo"],
        )
    )


def run_stages(run: Run) -> None:
    """A policy, so all that comes before, and the oracle, which scores what it was not trained on."""
    policies(run, "drdo")
    _ = oracle(run)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with ranks.together("cpu"):
        train(folder)
        run_stages(experiment(folder / "experiment"))
