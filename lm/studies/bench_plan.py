"""What is measured: models, pairs, and the ways of doing each stage. Nothing here imports torch."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

from lm.config import LogprobsConfig

SIZES = (10_000, 100_000)
"""Pairs of the made sets of `lm.studies.scale`, where nothing is said."""
BATCH = 8
"""Pairs an optimiser step, where nothing is said."""
PAD, END = 0, 1
SAMPLED = 64
"""Most tokens of a sample."""

# ---------------------------------------------------------------- what is run


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model: width, layers, heads, width of the gated layer, vocabulary.

    Args:
        kv_heads: heads of keys and values; None for as many as of queries.
        head_size: None for hidden / heads.
        model: whose weights are taken, as `lm.train --model` names it; None for a Llama-type model with random ones.
        for_gpu: measured where nothing is said on a GPU, instead of the others.
    """

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    kv_heads: int | None = None
    head_size: int | None = None
    model: str | None = None
    for_gpu: bool = False

    @property
    def attention(self) -> tuple[int, int]:
        """Width of all queries, and of all keys."""
        size = self.head_size or self.hidden // self.heads
        return self.heads * size, (self.kv_heads or self.heads) * size


CONFIGS = {
    "S8": Shape(hidden=256, layers=4, heads=4, intermediate=688, vocabulary=8192),
    "S32": Shape(hidden=256, layers=4, heads=4, intermediate=688, vocabulary=32768),
    "L8": Shape(hidden=512, layers=8, heads=8, intermediate=1376, vocabulary=8192),
    "L32": Shape(hidden=512, layers=8, heads=8, intermediate=1376, vocabulary=32768),
    "smollm2": Shape(
        hidden=576, layers=30, heads=9, kv_heads=3, intermediate=1536, vocabulary=49152, model="real:smollm2"
    ),
    "llama-0.5b": Shape(
        hidden=896, layers=24, heads=14, kv_heads=2, intermediate=4864, vocabulary=151936, for_gpu=True
    ),
    "gemma3": Shape(
        hidden=640,
        layers=18,
        heads=4,
        kv_heads=1,
        head_size=256,
        intermediate=2048,
        vocabulary=262144,
        model="real:gemma3",
    ),
}
"""Two sizes (layers of 3M and 25M parameters) with two vocabularies (8k and 32k); pretrained models of packages, which
are measured where they are asked for; and one of half a billion parameters, which a GPU is measured with."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Lengths in tokens.

    Args:
        prompt: median.
        completion: median, end-of-text included.
        completions: K, for each prompt: chosen, rejected, K - 2 samples for the KL term.
        spread: log-normal around the medians, or all alike.
        prompts: fewest and most.
        of_completions: likewise.
        deviations: of the logarithms of both.
    """

    prompt: int = 340
    completion: int = 36
    completions: int = 2
    spread: bool = True
    prompts: tuple[int, int] = (150, 500)
    of_completions: tuple[int, int] = (10, 60)
    deviations: tuple[float, float] = (0.30, 0.35)

    def lengths(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Of `count` prompts, [N], and their completions, [N, K]."""
        if not self.spread:
            return np.full(count, self.prompt), np.full((count, self.completions), self.completion)
        of_prompts, of_completions = self.deviations
        prompts = np.clip(self.prompt * rng.lognormal(0, of_prompts, count), *self.prompts)
        lengths = self.completion * rng.lognormal(0, of_completions, (count, self.completions))
        completions = np.clip(lengths, *self.of_completions)
        return prompts.round().astype(int), completions.round().astype(int)


TLDR = Workload()
LENGTHS = {
    "tldr": TLDR,
    "hh": Workload(prompt=115, completion=50, prompts=(16, 512), of_completions=(8, 256), deviations=(0.8, 0.8)),
}
"""Summaries, which are short after long prompts, and dialogues, which are neither."""


def make_pairs(workload: Workload, vocabulary: int, count: int, seed: int = 0) -> Dataset:
    """Scored pairs of random tokens, as the policy trainer reads them."""
    from datasets import Dataset

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


def useful_flops(shape: Shape, prompt: int, completions: Iterable[int], *, head: bool, backward: bool) -> int:
    """Least floating-point operations of one example: its prompt once, causal attention, the head on completions only.

    Two a multiply-add of matrix products and attention (over all positions, also where a layer has a window), nothing
    for the rest; a backward is two forwards.
    """
    counts = list(completions)
    queries, keys = shape.attention
    weights = 2 * shape.hidden * (queries + keys) + 3 * shape.hidden * shape.intermediate
    looks = prompt * (prompt + 1) // 2 + sum(count * prompt + count * (count + 1) // 2 for count in counts)
    layer = 2 * weights * (prompt + sum(counts)) + 4 * queries * looks
    logits = 2 * shape.hidden * shape.vocabulary * sum(counts) if head else 0
    return (shape.layers * layer + logits) * (3 if backward else 1)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of doing a stage.

    Args:
        stage: variants of a stage take turns with each other.
        run: a worker's whole life, by the name of a function of `lm.studies.bench_workers`.
        options: of our core.
        bf16: autocast, in TRL (ours has it in `options`).
        tuned: TRL with our allocator settings, and with its head on the completions only, as it does on a GPU; or
            `generate` with these settings.
        shared: False: a row for each completion, prompt included, still without padding.
        varlen: those rows by torch's FlashAttention, which is for CUDA.
        completions: K; of sampling, those drawn of each prompt.
    """

    stage: str
    run: str
    options: LogprobsConfig = field(default_factory=LogprobsConfig)
    bf16: bool = False
    tuned: bool = False
    shared: bool = True
    varlen: bool = False
    completions: int = 2

    @property
    def untouched(self) -> bool:
        """Whether it is others' code as it is installed, with nothing of our settings."""
        return not self.tuned and self.run in ("policy_trl", "score_trl", "reward_trl", "sample_generate")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.run.startswith("sample_")

    @property
    def dtype(self) -> str:
        """Of the matrix products."""
        return "bfloat16" if self.bf16 or self.options.autocast else "float32"


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""What a turn takes by: seconds that pass, or seconds of this process on a core."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does: `turns` turns of steps + 1 steps, of which the first is not timed.

    Args:
        pairs: a step.
        clock: of CLOCKS.
        device: "cpu" or "cuda".
        seed: of the pairs.
    """

    variant: Variant
    shape: Shape
    workload: Workload
    turns: int
    steps: int
    threads: int
    pairs: int = BATCH
    clock: str = "wall"
    device: str = "cpu"
    seed: int = 0

    @property
    def apart(self) -> bool:
        """Whether each turn has a process of its own, as pretrained models are too large to wait in memory."""
        return self.shape.model is not None

    def only(self, turn: int) -> Job:
        """A process of this turn alone, which has pairs of its own."""
        return replace(self, turns=1, seed=turn)

    @property
    def longest(self) -> int:
        """Positions that the model needs."""
        return max(1024, self.workload.prompt + self.workload.completion + 1)

    @property
    def sampled(self) -> int:
        """Most tokens of a sample."""
        return min(SAMPLED, self.workload.of_completions[1])

    def data(self) -> Dataset:
        """Pairs for all turns."""
        count = self.turns * (self.steps + 1) * self.pairs
        return make_pairs(self.workload, self.shape.vocabulary, count, self.seed)

    def timed(self, turn: int) -> range:
        """Rows of the timed part of a turn."""
        first = (turn * (self.steps + 1) + 1) * self.pairs
        return range(first, first + self.steps * self.pairs)


def clock_of(clock: str, device: str) -> Callable[[], float]:
    """Seconds; on a GPU those at which all that was asked of it is done."""
    if device == "cpu":
        return CLOCKS[clock]
    import torch

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


# ---------------------------------------------------------------- a worker's turns


class Turn(NamedTuple):
    """What a worker reports of one turn."""

    seconds: float
    peak_mb: float | None
    product: float | None = None
    """GFLOP/s of the model's products, for a second on end, in this round."""
    drawn: int | None = None
    """Tokens sampled; None where there is the same to do whoever does it."""

    @property
    def cost(self) -> float:
        """What ratios are of: seconds, a token where these were drawn."""
        return self.seconds / (self.drawn or 1)


# ---------------------------------------------------------------- TRL


def trl_installed() -> bool:
    """Whether the optional extra is there."""
    return importlib.util.find_spec("trl") is not None


_COMPILED, _BF16 = LogprobsConfig(compile=True), LogprobsConfig(autocast=True)

VARIANTS = {
    "trl": Variant(stage="policy", run="policy_trl"),
    "trl-tuned": Variant(stage="policy", run="policy_trl", tuned=True),
    "trl-bf16": Variant(stage="policy", run="policy_trl", bf16=True),
    "trl-tuned-bf16": Variant(stage="policy", run="policy_trl", bf16=True, tuned=True),
    "ours": Variant(stage="policy", run="train_ours"),
    "ours-compile": Variant(stage="policy", run="train_ours", options=_COMPILED),
    "ours-bf16": Variant(stage="policy", run="train_ours", options=_BF16),
    "ours-unshared-bf16": Variant(stage="policy", run="train_ours", options=_BF16, shared=False),
    "ours-varlen-bf16": Variant(stage="policy", run="train_ours", options=_BF16, shared=False, varlen=True),
    "ours-bf16-compile": Variant(stage="policy", run="train_ours", options=replace(_BF16, compile=True)),
    "ours-unshared": Variant(stage="policy", run="train_ours", shared=False),
    "ours-padded": Variant(stage="policy", run="train_ours", options=LogprobsConfig(route="padded")),
    "kl-ours": Variant(stage="kl", run="train_ours", completions=3),
    "kl-ours-unshared": Variant(stage="kl", run="train_ours", completions=3, shared=False),
    "kl8-ours": Variant(stage="kl8", run="train_ours", completions=8),
    "kl8-ours-unshared": Variant(stage="kl8", run="train_ours", completions=8, shared=False),
    "reward-trl": Variant(stage="reward", run="reward_trl"),
    "reward-trl-tuned": Variant(stage="reward", run="reward_trl", tuned=True),
    "reward-ours": Variant(stage="reward", run="train_reward"),
    "score-trl": Variant(stage="score", run="score_trl"),
    "score-trl-tuned": Variant(stage="score", run="score_trl", tuned=True),
    "score-trl-bf16": Variant(stage="score", run="score_trl", bf16=True),
    "score-trl-tuned-bf16": Variant(stage="score", run="score_trl", bf16=True, tuned=True),
    "score-ours": Variant(stage="score", run="score_ours"),
    "score-ours-bf16": Variant(stage="score", run="score_ours", options=_BF16),
    "score-ours-reward": Variant(stage="score", run="score_reward"),
    "sample-generate": Variant(stage="sample", run="sample_generate", completions=4),
    "sample-generate-tuned": Variant(stage="sample", run="sample_generate", tuned=True, completions=4),
    "sample-ours": Variant(stage="sample", run="sample_ours", completions=4),
    "sample-one-generate": Variant(stage="sample-one", run="sample_generate", completions=1),
    "sample-one-generate-tuned": Variant(stage="sample-one", run="sample_generate", tuned=True, completions=1),
    "sample-one-ours": Variant(stage="sample-one", run="sample_ours", completions=1),
}
"""Stages: training a policy by DPO, the same by p-DPO with a sample for the KL term, or six, training a reward model,
scoring (reference log-probs or rewards), sampling four completions of a prompt, or one."""
QUICK = ("trl-tuned", "ours", "score-trl-tuned", "score-ours")
"""TRL as it is installed takes as long as all the others together."""
GPU = (
    "trl-bf16",
    "ours-bf16",
    "ours-bf16-compile",
    "ours-unshared-bf16",
    "ours-varlen-bf16",
    "score-trl-bf16",
    "score-ours-bf16",
)
"""On a GPU TRL's head is on the completions by itself, and memory is not the C library's: tuned is as installed."""
CURVES = ("trl-tuned", "ours", "ours-unshared", "ours-padded")
PEERS = {
    "ratio_trl": "trl",
    "ratio_trl_tuned": "trl-tuned",
    "ratio_unshared": "ours-unshared",
    "ratio_varlen": "ours-varlen",
    "ratio_generate": "generate",
    "ratio_generate_tuned": "generate-tuned",
}
"""Ratio -> the variant it is to, less the stage's prefix and -bf16: what is in bfloat16 is held against the like."""


def is_trl(name: str) -> bool:
    """Whether a variant is TRL's."""
    return "trl" in name.split("-")


class Work(NamedTuple):
    """What there is to do in a turn."""

    pairs: int
    tokens: int
    """Prompts once, and completions: the same number whatever the variant computes."""
    flops: int
    """See `useful_flops`."""


def work_of(job: Job) -> list[Work]:
    """Of each turn but the first."""
    turns = range(1, job.turns)
    if job.apart:
        return [_work_of(job.only(turn), job.only(turn).data(), 0) for turn in turns]
    data = job.data()
    return [_work_of(job, data, turn) for turn in turns]


def _work_of(job: Job, data: Dataset, turn: int) -> Work:
    if job.variant.samples:  # how much is drawn, a turn says
        rows = job.timed(turn)
        return Work(len(rows), 0, 0)
    columns = ["chosen_ids", "rejected_ids", *(["sample_ids"] if job.workload.completions > 2 else [])]
    backward = job.variant.stage != "score"
    head = job.variant.run not in ("train_reward", "score_reward", "reward_trl")
    tokens, flops = 0, 0
    for row in data.select(job.timed(turn)):
        pair = [row[name] for name in columns[:2]] + (row["sample_ids"] if len(columns) > 2 else [])
        counts = [len(completion) for completion in pair]
        tokens += len(row["prompt_ids"]) + sum(counts)
        flops += useful_flops(job.shape, len(row["prompt_ids"]), counts, head=head, backward=backward)
    return Work(len(job.timed(turn)), tokens, flops)
