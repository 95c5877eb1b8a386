"""Speed of the trainer next to TRL's: pairs and tokens a second, peak memory, share of the machine's product peak.

    python -m lm.bench [--quick] [--curves] [--json FILE] [--markdown FILE]

Every variant runs in a process of its own, so that its allocator settings and its peak memory are its own. The
processes take turns: a round is one turn of each, on the same pairs; ratios are taken within a round, then medians over
the rounds, so that what else the machine does touches both sides of a ratio. TRL is an optional extra.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from lm.base import progress
from lm.base.files import write_text
from lm.base.markdown import table
from lm.config import LogprobsConfig, TrainingConfig
from lm.logprobs.completions import CompletionModel, collate
from lm.logprobs.kernels import keep_freed_memory, onednn_available, onednn_gains
from lm.logprobs.scoring import score_pairs
from lm.objectives import DPO, PessimisticDPO
from lm.training.batches import Batch, pair_collator
from lm.training.loop import fit, training_arguments
from lm.training.policy import PolicyTrainer
from lm.training.trainer import CompletionTrainer, RewardTrainer

BATCH = 8
"""Pairs an optimiser step."""
PAD, END = 0, 1
BEGIN_MARK, END_MARK = "<!-- lm.bench: begin -->", "<!-- lm.bench: end -->"

# ---------------------------------------------------------------- what is run


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama-type model: width, layers, heads, width of the gated layer, vocabulary."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int


CONFIGS = {
    "S8": Shape(hidden=256, layers=4, heads=4, intermediate=688, vocabulary=8192),
    "S32": Shape(hidden=256, layers=4, heads=4, intermediate=688, vocabulary=32768),
    "L8": Shape(hidden=512, layers=8, heads=8, intermediate=1376, vocabulary=8192),
    "L32": Shape(hidden=512, layers=8, heads=8, intermediate=1376, vocabulary=32768),
}
"""Two sizes (layers of 3M and 25M parameters), two vocabularies (8k and 32k)."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Lengths in tokens.

    Args:
        prompt: median.
        completion: median, end-of-text included.
        completions: K, for each prompt: chosen, rejected, K - 2 samples for the KL term.
        spread: log-normal around the medians like TL;DR's, or all alike.
    """

    prompt: int = 340
    completion: int = 36
    completions: int = 2
    spread: bool = True

    def lengths(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Of `count` prompts, [N], and their completions, [N, K]."""
        if not self.spread:
            return np.full(count, self.prompt), np.full((count, self.completions), self.completion)
        prompts = np.clip(self.prompt * rng.lognormal(0, 0.30, count), 150, 500)
        completions = np.clip(self.completion * rng.lognormal(0, 0.35, (count, self.completions)), 10, 60)
        return prompts.round().astype(int), completions.round().astype(int)


TLDR = Workload()


def make_pairs(workload: Workload, vocabulary: int, count: int, seed: int = 0) -> Dataset:
    """Scored pairs of random tokens, as the policy trainer reads them."""
    rng = np.random.default_rng(seed)
    prompts, completions = workload.lengths(count, rng)

    def tokens(length: int) -> list[int]:
        return [int(token) for token in rng.integers(2, vocabulary, length)]

    def row(index: int) -> dict[str, Any]:
        chosen, rejected, *samples = ([*tokens(length - 1), END] for length in completions[index])
        score = rng.normal(-9.0, 0.1, workload.completions).tolist()  # nats a token of a model that knows nothing
        logps = [each * int(length) for each, length in zip(score, completions[index], strict=True)]
        pair = {
            "id": str(index),
            "prompt_ids": tokens(prompts[index]),
            "chosen_ids": chosen,
            "rejected_ids": rejected,
            "ref_chosen_logps": logps[0],
            "ref_rejected_logps": logps[1],
        }
        return pair | ({"sample_ids": samples, "ref_sample_logps": logps[2:]} if samples else {})

    return Dataset.from_list([row(index) for index in range(count)])


def make_model(shape: Shape, longest: int, *, reward: bool = False) -> PreTrainedModel:
    """Random weights, float32; the same for every variant."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        max_position_embeddings=longest,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
        tie_word_embeddings=False,
        num_labels=1,
    )
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    return model


def useful_flops(shape: Shape, prompt: int, completions: Iterable[int], *, head: bool, backward: bool) -> int:
    """Least floating-point operations of one example: its prompt once, causal attention, the head on completions only.

    Two a multiply-add of matrix products and attention, nothing for the rest; a backward is two forwards.
    """
    counts = list(completions)
    weights = 4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate
    looks = prompt * (prompt + 1) // 2 + sum(count * prompt + count * (count + 1) // 2 for count in counts)
    layer = 2 * weights * (prompt + sum(counts)) + 4 * shape.hidden * looks
    logits = 2 * shape.hidden * shape.vocabulary * sum(counts) if head else 0
    return (shape.layers * layer + logits) * (3 if backward else 1)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of doing a stage.

    Args:
        stage: variants of a stage take turns with each other.
        run: a worker's whole life.
        options: of our core.
        bf16: autocast, in TRL (ours has it in `options`).
        tuned: TRL with our allocator settings, and with its head on the completions only, as it does on a GPU.
        shared: False: a row for each completion, prompt included, still without padding.
        completions: K.
    """

    stage: str
    run: Callable[[Job, Turns], None]
    options: LogprobsConfig = field(default_factory=LogprobsConfig)
    bf16: bool = False
    tuned: bool = False
    shared: bool = True
    completions: int = 2

    @property
    def dtype(self) -> str:
        """Of the matrix products."""
        return "bfloat16" if self.bf16 or self.options.autocast else "float32"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does: `turns` turns of steps + 1 steps, of which the first is not timed."""

    variant: Variant
    shape: Shape
    workload: Workload
    turns: int
    steps: int
    threads: int

    @property
    def longest(self) -> int:
        """Positions that the model needs."""
        return max(1024, self.workload.prompt + self.workload.completion + 1)

    def data(self) -> Dataset:
        """Pairs for all turns."""
        return make_pairs(self.workload, self.shape.vocabulary, self.turns * (self.steps + 1) * BATCH)

    def timed(self, turn: int) -> range:
        """Rows of the timed part of a turn."""
        first = (turn * (self.steps + 1) + 1) * BATCH
        return range(first, first + self.steps * BATCH)


# ---------------------------------------------------------------- a worker's turns


class Turn(NamedTuple):
    """What a worker reports of one turn."""

    seconds: float
    peak_mb: float | None


class Turns:
    """A worker's side of the rounds: it waits for its turn, and says what it took."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def begin(self) -> None:
        """Waits."""
        self.connection.recv()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # peak memory counts from here

    def end(self, seconds: float) -> None:
        """Reports, and gives free memory back so that the next has it."""
        self.connection.send(Turn(seconds, peak_mb()))
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_mb() -> float | None:
    """Largest resident memory of this process in the turn, MB (10^6 bytes); None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


class StepTurns(TrainerCallback):  # type: ignore[misc]
    """Makes a Trainer stop after each turn's steps until the next turn."""

    def __init__(self, job: Job, turns: Turns) -> None:
        self.turns, self.steps = turns, job.steps
        self.stamps: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first turn."""
        self.turns.begin()

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """The clock runs from the end of the turn's first step: log lines and batches are in."""
        self.stamps.append(time.perf_counter())
        if len(self.stamps) == self.steps + 1:
            self.turns.end(self.stamps[-1] - self.stamps[0])
            self.stamps.clear()
            if state.global_step < state.max_steps:
                self.turns.begin()


def score_in_turns(job: Job, turns: Turns, data: Dataset, score: Callable[[Dataset], object]) -> None:
    """Turns of scoring: the batch before the timed rows warms up."""
    for turn in range(job.turns):
        rows = job.timed(turn)
        turns.begin()
        score(data.select(range(rows.start - BATCH, rows.start)))
        start = time.perf_counter()
        score(data.select(rows))
        turns.end(time.perf_counter() - start)


def work(job: Job, connection: Connection) -> None:
    """A worker process."""
    os.environ |= {"CI": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}  # CI: TRL does not report its use
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    progress.be_quiet()
    torch.set_num_threads(job.threads)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            job.variant.run(job, Turns(connection))
        except Exception:
            connection.send(traceback.format_exc())


# ---------------------------------------------------------------- ours


def _training(job: Job) -> TrainingConfig:
    return TrainingConfig(
        max_steps=job.turns * (job.steps + 1),
        batch_size=BATCH,
        learning_rate=1e-5,
        schedule="constant_with_warmup",
        warmup_fraction=0.0,
        logging_steps=1,
    )


class _InOrder(CompletionTrainer):
    """Takes the pairs in the order of the data, as TRL is told to: all variants have the same batches."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataset, batch_size=BATCH, collate_fn=self.data_collator)


class _Policy(_InOrder, PolicyTrainer):
    pass


class _Reward(_InOrder, RewardTrainer):
    pass


def _unshared(collator: Callable[[list[dict[str, Any]]], Batch]) -> Callable[[list[dict[str, Any]]], Batch]:
    """The same batch with every completion as an example of its own."""

    def call(rows: list[dict[str, Any]]) -> Batch:
        completions = [[r["chosen_ids"], r["rejected_ids"], *r.get("sample_ids", ())] for r in rows]
        each = [(r["prompt_ids"], [own]) for r, all_ in zip(rows, completions, strict=True) for own in all_]
        return collator(rows) | collate([prompt for prompt, _ in each], [own for _, own in each])

    return call


def train_ours(job: Job, turns: Turns, *, reward: bool = False) -> None:
    """The real trainer, with its log lines and diagnostics."""
    samples = job.workload.completions > 2
    model = CompletionModel(make_model(job.shape, job.longest, reward=reward), options=job.variant.options)
    collator = pair_collator(sample=samples)
    method = {} if reward else {"method": PessimisticDPO() if samples else DPO()}
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(_training(job), Path(folder), seed=0, device="cpu")
        fit(
            _Reward if reward else _Policy,
            model,
            job.data(),
            collator if job.variant.shared else _unshared(collator),
            arguments,
            callbacks=[StepTurns(job, turns)],
            **method,
        )


def score_ours(job: Job, turns: Turns, *, reward: bool = False) -> None:
    """Reference log-probs, or rewards, of both completions."""
    model = CompletionModel(make_model(job.shape, job.longest, reward=reward), options=job.variant.options)
    score_in_turns(job, turns, job.data(), partial(score_pairs, model, what="benchmark"))


# ---------------------------------------------------------------- TRL


def trl_installed() -> bool:
    """Whether the optional extra is there."""
    return importlib.util.find_spec("trl") is not None


def _tune_trl(job: Job) -> None:
    import trl.trainer.utils

    if job.variant.tuned:
        keep_freed_memory()
        trl.trainer.utils._use_triton = lambda device: True  # only asked whether to leave out positions without label


def _tokenizer() -> PreTrainedTokenizerFast:
    """Padding and end-of-text are all that TRL needs of it."""
    words = Tokenizer(WordLevel({"<pad>": PAD, "<end>": END}, unk_token="<end>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def _trl_options(job: Job, folder: str) -> dict[str, Any]:
    """Our options in TRL's terms. Its gradient checkpointing, on by default, would only slow it down here."""
    ours = training_arguments(_training(job), Path(folder), seed=0, device="cpu")
    same = ("max_steps", "learning_rate", "lr_scheduler_type", "max_grad_norm", "weight_decay", "optim", "seed")
    return {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "bf16": job.variant.bf16,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_length": None,
        **{name: getattr(ours, name) for name in same},
    }


def policy_trl(job: Job, turns: Turns, *, score: bool = False) -> None:
    """`DPOTrainer`: its training loop, or (`score`) its pre-computation of reference log-probs."""
    from trl import DPOConfig, DPOTrainer

    class OnTokens(DPOTrainer):  # type: ignore[misc]
        """The data is tokenised, and its reference log-probs are there."""

        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

        def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

    _tune_trl(job)
    data = job.data()
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = OnTokens(
            model=make_model(job.shape, job.longest),
            args=DPOConfig(precompute_ref_log_probs=True, **_trl_options(job, folder)),
            train_dataset=data.select_columns([*columns, "ref_chosen_logps", "ref_rejected_logps"]),
            processing_class=_tokenizer(),
            callbacks=[StepTurns(job, turns)],
        )
        if score:
            precompute = partial(DPOTrainer._precompute_ref_logps, trainer, name="train", batch_size=BATCH)
            score_in_turns(job, turns, data.select_columns(columns), precompute)
        else:
            trainer.train()


def reward_trl(job: Job, turns: Turns) -> None:
    """`RewardTrainer`: rows of prompt and completion."""
    from trl import RewardConfig, RewardTrainer

    _tune_trl(job)
    rows = [{side: r["prompt_ids"] + r[side] for side in ("chosen_ids", "rejected_ids")} for r in job.data()]
    with tempfile.TemporaryDirectory() as folder:
        RewardTrainer(
            model=make_model(job.shape, job.longest, reward=True),
            args=RewardConfig(**_trl_options(job, folder)),
            train_dataset=Dataset.from_list(rows),
            processing_class=_tokenizer(),
            callbacks=[StepTurns(job, turns)],
        ).train()


_COMPILED, _BF16 = LogprobsConfig(compile=True), LogprobsConfig(autocast=True)
_train_reward, _score_reward = partial(train_ours, reward=True), partial(score_ours, reward=True)
_score_trl = partial(policy_trl, score=True)

VARIANTS = {
    "trl": Variant(stage="policy", run=policy_trl),
    "trl-tuned": Variant(stage="policy", run=policy_trl, tuned=True),
    "trl-bf16": Variant(stage="policy", run=policy_trl, bf16=True),
    "ours": Variant(stage="policy", run=train_ours),
    "ours-compile": Variant(stage="policy", run=train_ours, options=_COMPILED),
    "ours-bf16": Variant(stage="policy", run=train_ours, options=_BF16),
    "ours-bf16-compile": Variant(stage="policy", run=train_ours, options=replace(_BF16, compile=True)),
    "ours-unshared": Variant(stage="policy", run=train_ours, shared=False),
    "ours-padded": Variant(stage="policy", run=train_ours, options=LogprobsConfig(route="padded")),
    "kl-ours": Variant(stage="kl", run=train_ours, completions=3),
    "kl-ours-unshared": Variant(stage="kl", run=train_ours, completions=3, shared=False),
    "reward-trl": Variant(stage="reward", run=reward_trl),
    "reward-trl-tuned": Variant(stage="reward", run=reward_trl, tuned=True),
    "reward-ours": Variant(stage="reward", run=_train_reward),
    "score-trl": Variant(stage="score", run=_score_trl),
    "score-trl-tuned": Variant(stage="score", run=_score_trl, tuned=True),
    "score-ours": Variant(stage="score", run=score_ours),
    "score-ours-reward": Variant(stage="score", run=_score_reward),
}
"""Stages: training a policy by DPO, the same by p-DPO with a sample for the KL term, training a reward model, scoring
(reference log-probs or rewards)."""
QUICK = ("trl", "trl-tuned", "ours", "score-trl", "score-ours")
CURVES = ("trl-tuned", "ours", "ours-unshared", "ours-padded")
PEERS = {"ratio_trl": "trl", "ratio_trl_tuned": "trl-tuned", "ratio_unshared": "ours-unshared"}
"""Ratio -> the variant it is to, less the stage's prefix."""


def _is_trl(name: str) -> bool:
    return "trl" in name.split("-")


# ---------------------------------------------------------------- the rounds


def gemm_peak(peaks: dict[str, float]) -> None:
    """Raises each dtype's entry to the fastest matrix product of this moment, GFLOP/s: torch's own, and in float32
    oneDNN's (torch's own in bfloat16, where the processor has it), of the shapes of S, L, and a square."""
    for name in peaks:
        products: list[Callable[[Tensor, Tensor], object]] = [lambda left, right: left @ right.t()]
        if name == "float32" and onednn_available():
            products.append(lambda left, right: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], ""))
        for rows, inner, columns in ((3456, 256, 688), (3456, 512, 1376), (1024, 1024, 1024)):
            left, right = (torch.randn(n, inner, dtype=getattr(torch, name)) for n in (rows, columns))
            for product in products:
                for _ in range(3):
                    start = time.perf_counter()
                    product(left, right)
                    rate = 2 * rows * inner * columns / (time.perf_counter() - start) / 1e9
                    peaks[name] = max(peaks[name], rate)


@dataclass
class Worker:
    """The conductor's side of one process."""

    name: str
    job: Job
    took: list[Turn] = field(default_factory=list)

    def __enter__(self) -> Worker:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(self.job, theirs), daemon=True)
        self.process.start()
        theirs.close()
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.connection.close()
        if error is not None:
            self.process.terminate()
        self.process.join()

    def turn(self) -> None:
        """RuntimeError where the process failed."""
        try:
            self.connection.send(None)
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise RuntimeError(f"{self.name}: its process died, exit status {self.process.exitcode}") from None
        if not isinstance(answer, Turn):
            raise RuntimeError(f"{self.name} failed:\n{answer}")
        self.took.append(answer)


def run_rounds(jobs: dict[str, Job], peaks: dict[str, float]) -> dict[str, list[Turn]]:
    """Variant -> its turns, without the first, in which everything warms up."""
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(name, job)) for name, job in jobs.items()]
        for _ in range(max((job.turns for job in jobs.values()), default=0)):
            gemm_peak(peaks)
            for worker in workers:
                worker.turn()
    return {worker.name: worker.took[1:] for worker in workers}


class Work(NamedTuple):
    """What there is to do in a turn."""

    pairs: int
    tokens: int
    """Prompts once, and completions: the same number whatever the variant computes."""
    flops: int
    """See `useful_flops`."""


def work_of(job: Job) -> list[Work]:
    """Of each turn but the first."""
    data = job.data()
    columns = ["chosen_ids", "rejected_ids", *(["sample_ids"] if job.workload.completions > 2 else [])]
    backward = job.variant.stage != "score"
    head = job.variant.run not in (_train_reward, _score_reward, reward_trl)
    result = []
    for turn in range(1, job.turns):
        tokens, flops = 0, 0
        for row in data.select(job.timed(turn)):
            pair = [row[name] for name in columns[:2]] + (row["sample_ids"] if len(columns) > 2 else [])
            counts = [len(completion) for completion in pair]
            tokens += len(row["prompt_ids"]) + sum(counts)
            flops += useful_flops(job.shape, len(row["prompt_ids"]), counts, head=head, backward=backward)
        result.append(Work(len(job.timed(turn)), tokens, flops))
    return result


def summarise(
    config: str,
    variants: dict[str, Variant],
    took: dict[str, list[Turn]],
    works: dict[str, list[Work]],
    notes: dict[str, str],
) -> list[dict[str, Any]]:
    """Rows of one stage, medians over rounds; None where there is nothing to say, and `notes` on what was not measured.
    `gflop_per_s` are useful ones."""
    rows = []
    for name, variant in variants.items():
        row: dict[str, Any] = {"config": config, "stage": variant.stage, "variant": name, "dtype": variant.dtype}
        row |= dict.fromkeys(("pairs_per_s", "tokens_per_s", "gflop_per_s", "peak_mb", *PEERS))
        if name not in took:
            rows.append(row | {"note": notes[name]})
            continue
        turns = took[name]
        for key, what, unit in (("pairs_per_s", 0, 1), ("tokens_per_s", 1, 1), ("gflop_per_s", 2, 1e9)):
            rates = [todo[what] / turn.seconds / unit for todo, turn in zip(works[name], turns, strict=True)]
            row[key] = statistics.median(rates)
        memory = [turn.peak_mb for turn in turns if turn.peak_mb is not None]
        row["peak_mb"] = max(memory) if memory else None
        prefix = "" if variant.stage == "policy" else f"{variant.stage}-"
        for key, peer in PEERS.items():
            if (other := took.get(prefix + peer)) is not None:
                row[key] = statistics.median(o.seconds / t.seconds for o, t in zip(other, turns, strict=True))
        rows.append(row)
    return rows


# ---------------------------------------------------------------- the command


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to measure.

    Args:
        rounds: timed turns of each variant.
        steps: timed optimiser steps (or batches of scoring) a turn.
        threads: of each process.
        skip_bf16: leave out what computes in bfloat16, as this machine does that more slowly than float32.
    """

    rounds: int
    steps: int
    threads: int
    skip_bf16: bool = False

    def why_not(self, name: str) -> str | None:
        """Why a variant is not measured; None where it is."""
        if _is_trl(name) and not trl_installed():
            return "trl not installed"
        if self.skip_bf16 and VARIANTS[name].dtype == "bfloat16":
            return "no bfloat16 products in this processor"
        return None

    def run(
        self, config: str, shape: Shape, names: Iterable[str], peaks: dict[str, float], workload: Workload | None = None
    ) -> list[dict[str, Any]]:
        """Rows of these variants of one stage, on `workload` or on TL;DR-shaped pairs with each variant's K."""
        variants = {name: VARIANTS[name] for name in names}
        notes = {name: why for name in variants if (why := self.why_not(name)) is not None}
        jobs = {
            name: Job(
                variant=variant,
                shape=shape,
                workload=workload or replace(TLDR, completions=variant.completions),
                turns=self.rounds + 1,
                steps=self.steps,
                threads=self.threads,
            )
            for name, variant in variants.items()
            if name not in notes
        }
        took = run_rounds(jobs, peaks)
        return summarise(config, variants, took, {name: work_of(job) for name, job in jobs.items()}, notes)

    def curves(self, config: str, shape: Shape, peaks: dict[str, float]) -> list[dict[str, Any]]:
        """Rows along prompt length, completion length and K, each from the middle; lengths all alike.

        `flops_unshared` is what sharing can gain: the useful operations when every completion has its own prompt, over
        those with one prompt.
        """
        middle = replace(TLDR, spread=False)
        points = [
            *(("prompt", replace(middle, prompt=count)) for count in (64, 128, 256, 512, 1024)),
            *(("completion", replace(middle, completion=count)) for count in (8, 32, 128, 512)),
            *(("completions", replace(middle, completions=count)) for count in (2, 3, 4, 8)),
        ]
        rows = []
        for axis, workload in points:
            names = [name for name in CURVES if workload.completions == 2 or not _is_trl(name)]
            flops = partial(useful_flops, shape, workload.prompt, head=True, backward=True)
            shared = flops(completions=[workload.completion] * workload.completions)
            apart = workload.completions * flops(completions=[workload.completion])
            at = {"axis": axis, "flops_unshared": apart / shared}
            at |= {name: getattr(workload, name) for name in ("prompt", "completion", "completions")}
            rows += [at | row for row in self.run(config, shape, names, peaks, workload)]
        return rows


def machine(threads: int, peaks: dict[str, float]) -> dict[str, Any]:
    """What the numbers are measured on; `peaks` fill up meanwhile, `load` is what ran before."""
    model = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    packages = ("torch", "transformers", "trl") if trl_installed() else ("torch", "transformers")
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "onednn_float32": onednn_gains(),
        "gemm_gflop_per_s": peaks,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "load": os.getloadavg()[0],
    }


def _cell(value: object, digits: str) -> str:
    return "-" if value is None else format(value, digits)


def render(document: dict[str, Any]) -> str:
    """The document's tables."""
    about = document["machine"]
    peaks = about["gemm_gflop_per_s"]
    parts = [
        f"{about['cpu']} ({about['capability']}), {about['threads']} threads; "
        + ", ".join(f"{name} {number}" for name, number in about["versions"].items())
        + "; fastest matrix product "
        + ", ".join(f"{rate:.0f} GFLOP/s in {name}" for name, rate in peaks.items())
        + ".",
    ]
    header = ("pairs/s", "tokens/s", "peak MB", "x TRL", "x TRL tuned", "x unshared", "of GEMM peak")
    for config in dict.fromkeys(row["config"] for row in document["rows"]):
        cells = []
        for row in (row for row in document["rows"] if row["config"] == config):
            share = None if row["gflop_per_s"] is None else row["gflop_per_s"] / peaks[row["dtype"]]
            measured = [
                _cell(row["pairs_per_s"], ".2f"),
                _cell(row["tokens_per_s"], ",.0f"),
                _cell(row["peak_mb"], ",.0f"),
                *(_cell(row[key], ".2f") for key in PEERS),
                _cell(share, ".0%"),
            ]
            cells.append([row["variant"], *(measured if "note" not in row else [row["note"], *["-"] * 6])])
        parts.append(table([config, *header], cells))
    for axis in dict.fromkeys(row["axis"] for row in document["curves"]):
        rows = [row for row in document["curves"] if row["axis"] == axis]
        names = list(dict.fromkeys(row["variant"] for row in rows))
        cells = []
        for point in dict.fromkeys(row[axis] for row in rows):
            here = {row["variant"]: row for row in rows if row[axis] == point}
            per_pair = [
                None if (rate := here.get(name, {}).get("pairs_per_s")) is None else 1e3 / rate for name in names
            ]
            any_row = here["ours"]
            gains = [_cell(any_row["ratio_unshared"], ".2f"), _cell(any_row["flops_unshared"], ".2f")]
            cells.append([f"{point}", *(_cell(value, ".1f") for value in per_pair), *gains])
        what = {"prompt": "prompt tokens", "completion": "completion tokens", "completions": "K"}[axis]
        parts.append(table([what, *(f"{name}, ms/pair" for name in names), "gain of sharing", "in FLOPs"], cells))
    return "\n\n".join(parts)


def put_between_marks(path: Path, text: str) -> None:
    """Replaces what stands between the marks of a Markdown file; ValueError where it does not have both once."""
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    if (
        before.count(BEGIN_MARK) != 1
        or before.count(END_MARK) != 1
        or before.index(BEGIN_MARK) > before.index(END_MARK)
    ):
        raise ValueError(f"--markdown {path}: the file must have a line {BEGIN_MARK!r}, and below it {END_MARK!r}")
    head, tail = before.split(BEGIN_MARK)[0], before.split(END_MARK)[1]
    write_text(path, f"{head}{BEGIN_MARK}\n{text}\n{END_MARK}{tail}")
