"""The stages of `lm.studies.scale`, each a worker's whole life."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import datasets
import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from lm.base import progress
from lm.base.options import parse
from lm.config import BiasConfig, LogprobsConfig
from lm.data import lengths
from lm.data.rows import write_rows
from lm.models.loading import train_bpe
from lm.stages import data, scores, subsets
from lm.stages.run import Run
from lm.studies import diagnosis
from lm.studies.bench_workers import peak_mb
from lm.studies.scale_plan import Job, Measured
from lm.training.batches import pair_collator
from lm.training.loop import extremes

SAMPLE = 2000
"""Pairs whose texts the tokenizer learns from."""
VOCABULARY, BATCH, METHOD = 8192, 16, "e-dpo"
TOKENS = 36
"""Of a made sample."""


class Resident:
    """The largest anonymous memory of this process, looked at ten times a second."""

    def __init__(self) -> None:
        self.base_mb = self.most_mb = self._now()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.most_mb = max(self.most_mb, self._now())
            time.sleep(0.1)

    def _now(self) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon"))


def work(job: Job, connection: Connection) -> None:
    """Does one stage and reports what it took, or the traceback."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        make_model(job.folder)
        resident, began, used = Resident(), time.perf_counter(), time.process_time()
        written = DO[job.stage](job.folder)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - used
        peak = peak_mb() or resident.most_mb
        size = sum(file.stat().st_size for path in written for file in _files(path)) / 1e6
        connection.send(Measured(seconds, cpu_seconds, peak, resident.most_mb, resident.base_mb, size))
    except Exception:
        connection.send(traceback.format_exc())


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


# ---------------------------------------------------------------- a run of made pairs


def make_model(folder: Path) -> None:
    """A tokenizer of the pairs' words, and a model that nobody asks, beside the pairs."""
    if (folder / "model").exists():
        return
    with (folder / "pairs.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, SAMPLE)]
    tokenizer = train_bpe((row[name] for row in rows for name in ("prompt", "chosen")), VOCABULARY)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "half")
    tokenizer.save_pretrained(folder / "half")
    (folder / "half").rename(folder / "model")


def run_of(folder: Path, *options: str) -> Run:
    """The pairs' own labels and rewards, and no model trained."""
    own = [
        "--config=preferences",
        f"--output_dir={folder / 'run'}",
        f"--model={folder / 'model'}",
        f"--data.path={folder / 'pairs.jsonl'}",
        f"--methods=[{METHOD},dp-dpo]",
        "--sft=null",
        "--device=cpu",
    ]
    return Run(parse("lm.bench", "", [*own, *options])[0])


class StandIn(torch.nn.Module):
    """For a `lm.logprobs.completions.CompletionModel`: a completion's log-prob is minus its length."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))
        self.options, self.route, self.tried = LogprobsConfig(), "packed", 2**31
        self.is_reward_model = False

    def forward(self, input_ids: torch.Tensor, lengths: Sequence[Sequence[int]]) -> Any:
        """One a completion."""
        return SimpleNamespace(logps=-torch.tensor([float(count) for each in lengths for count in each[1:]]))


def drawn(_: Any, prompts: Sequence[Any], tokenizer: Any, config: Any, *, seed: int, what: str) -> list[list[int]]:
    """For `sample_completions`."""
    ids = np.random.default_rng(seed).integers(2, VOCABULARY // 2, (len(prompts), TOKENS - 1))
    return [[*row, tokenizer.eos_token_id] for row in ids.tolist()]


# ---------------------------------------------------------------- stages


def prepare(folder: Path) -> list[Path]:
    """`lm.prepare`: read, split, tokenised, counted, saved with checksums."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    return [data.data(run_of(folder)).path]


def diagnose(folder: Path) -> list[Path]:
    """`lm.diagnose`, in characters."""
    path = str(folder / "pairs.jsonl")
    diagnosis.measure(diagnosis.read(path), path)
    return []


def bias(folder: Path) -> list[Path]:
    """`lm.bias`, in characters."""
    out = folder / "biased.jsonl"
    lengths.bias_file(str(folder / "pairs.jsonl"), out, BiasConfig(rho=0.2), seed=0)
    return [out]


def confidence(folder: Path) -> list[Path]:
    """A run's labels, and D_rho of the pairs with sure annotators and a large edit distance."""
    return [subsets.bias(run_of(folder, "--bias.pairs=hc_he", "--bias.rho=0.5")).path]


def score(folder: Path) -> list[Path]:
    """`lm.score`: log-probs of pi_ref and its samples, by a stand-in."""
    with patch.object(scores, "open_policy", lambda *_: StandIn()), patch.object(scores, "sample_completions", drawn):
        return [scores.scores(run_of(folder)).path]


def export(folder: Path) -> list[Path]:
    """`lm.export --samples`, to Parquet."""
    out = folder / "scored.parquet"
    write_rows(out, progress.bar("writing", scores.export_rows(run_of(folder), samples=True)))
    return [out]


def load(folder: Path) -> list[Path]:
    """What a training does before its first step, and one epoch of its mini-batches."""
    run, collator = run_of(folder), pair_collator(sample=True)
    pairs = scores.scored_pairs(run, run.config.method(METHOD), METHOD)
    extremes([pairs], pairs, collator)
    for _ in progress.bar("loading", DataLoader(pairs, batch_size=BATCH, shuffle=True, collate_fn=collator)):
        pass
    return []


def trl(folder: Path) -> list[Path]:
    """`DPOTrainer`'s own preparation, from the file on, with its defaults."""
    from trl import DPOConfig, DPOTrainer

    cache = folder / "trl"
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    rows = datasets.load_dataset(
        "json", data_files=str(folder / "pairs.jsonl"), split="train", cache_dir=str(cache / "rows")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    arguments = DPOConfig(output_dir=str(cache / "out"), use_cpu=True, bf16=False)
    DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, arguments, "train")
    return [cache]


DO: dict[str, Callable[[Path], list[Path]]] = {
    each.__name__: each for each in (prepare, diagnose, bias, confidence, score, export, load, trl)
}
"""By the names of `lm.studies.scale_plan.STAGES`; each returns what it wrote and leaves."""
