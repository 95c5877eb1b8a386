"""What a run will cost on GPUs, by arithmetic and before it is started: tokens, operations, hours, memory, disk.

    python -m lm.estimate --parameters 7e9 [--gpu h100] [--utilisation 0.3] [--rhos 7] [options of lm.train]

Nothing is measured. Operations are counted as 2 a parameter and token of a forward pass; a backward is two forwards,
or one where only adapters are trained (`lora`), and activation checkpointing a third. The utilisation is an assumption
of the reader's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from lm.config import Config, TrainingConfig
from lm.stages.run import base_of
from theory.records import table


class Data(NamedTuple):
    """Size of a data set: rows of all splits, mean lengths in tokens."""

    references: int
    pairs: int
    prompt: int
    completion: int

    def row(self, completions: int) -> int:
        """Tokens of a prompt with so many completions."""
        return self.prompt + completions * self.completion


DATA = {
    # Comparisons of TL;DR posts and the filtered TL;DR set, counted by the cards of their public copies; lengths by
    # the histograms of vwxyzjn/summarize_from_feedback_oai_preprocessing_1711138084 (Pythia's tokenizer).
    "tldr": Data(references=129_722, pairs=176_660, prompt=346, completion=34),
    # helpful-base, counted by the card of trl-lib/hh-rlhf-helpful-base; lengths from its bytes, at 4.4 a token.
    "hh": Data(references=46_189, pairs=46_189, prompt=115, completion=50),
}
"""By `data.kind`."""


class GPU(NamedTuple):
    """A data sheet's dense peaks, operations a second, bytes a second, bytes."""

    bfloat16: float
    float32: float
    bandwidth: float
    memory: float


GPUS = {
    "a100": GPU(312e12, 19.5e12, 2.04e12, 80e9),
    "h100": GPU(989e12, 67e12, 3.35e12, 80e9),
    "h200": GPU(989e12, 67e12, 4.8e12, 141e9),
}
STEP_SECONDS = 0.02
"""Least time of a step of `generate`, which launches kernels from Python; assumed."""
LAYER_BYTES = 34
"""Activations kept a token, layer and unit of width, without attention scores: Korthikanti et al. 2022, section 4.1."""


@dataclass(frozen=True)
class Work:
    """What one stage does.

    Args:
        stage: as its artifacts are filed.
        each_rho: done again for every rho.
        passes: tokens of forward passes, a backward counted as two forwards, or as one through frozen parameters.
        kept: models that it leaves behind.
        batches: calls of `generate`.
        adapters: whether it trains adapters, which lie beside the models.
    """

    stage: str
    each_rho: bool
    passes: float
    kept: int = 0
    batches: int = 0
    adapters: bool = False


def stages(config: Config) -> Iterator[Work]:
    """The pipeline's stages that need a GPU.

    A prompt a pair is assumed where prompts are counted, and pairs that all have a longer side: both are the most.

    Raises:
        ValueError: data of a kind whose size is not known here, or rewards that come with the data.
    """
    if config.data.kind not in DATA or config.data.rewards != "models":
        raise ValueError(
            f"data.kind must be one of {', '.join(DATA)}, with data.rewards models; got {config.data.kind!r}, "
            f"{config.data.rewards!r}"
        )
    data = DATA[config.data.kind]
    pairs = min(data.pairs, config.data.limit or data.pairs)
    valid, test = round(pairs * config.data.valid_fraction), round(pairs * config.data.test_fraction)
    kept_out = config.data.valid_fraction + config.data.test_fraction
    on_policy, unlabelled = config.data.sampled(pairs - valid - test)
    given = 0 if config.data.on_policy.pairs == "instead" else pairs - valid - test
    biased = config.bias.size or given + on_policy
    samples = config.sampling.reference_samples
    test_prompts, valid_prompts = config.evaluation.prompts or test, config.evaluation.valid_prompts or valid

    def training(stage: str, size: float, completions: int, *, more: int = 0) -> float:
        options: TrainingConfig = getattr(config, stage)
        if options.train == "head" and not options.has_steps:
            return 0.0
        # Frozen parameters pass gradients on and have none of their own; the adapters' products are left out.
        passes = 3 - config.adapts(stage) + options.activation_checkpointing + more
        return examples(options, size) * data.row(completions) * passes

    def looks(stage: str) -> float:
        """At validation pairs while a reward model trains; it may end before all of them."""
        options: TrainingConfig = getattr(config, stage)
        if options.stopping is None or (options.train == "head" and not options.has_steps):
            return 0.0
        most = options.evaluation_pairs
        return (options.stopping["evaluations"] or 0) * (valid if most is None else min(most, valid)) * data.row(2)

    def calls(prompts: int) -> int:
        return ceil(prompts / config.sampling.batch_size)

    if config.sft.train != "nothing":
        passed = training("sft", data.references * (1 - kept_out), 1)
        yield Work("sft", False, passed, kept=1, adapters=config.adapts("sft"))
    for _ in {base_of(config, stage) for stage in ("oracle", "reward") if getattr(config, stage).train == "head"}:
        yield Work("features", False, pairs * data.row(2))
    if config.trains_oracle:
        oracle = training("oracle", pairs - valid - test, 2) + looks("oracle") + valid * data.row(2)
        yield Work("oracle", False, oracle, kept=1, adapters=config.adapts("oracle"))
    if config.data.labels == "oracle" and config.judge.kind == "model":
        yield Work("labels", False, (pairs + 2 * on_policy) * data.row(2), batches=calls(2 * on_policy))
    every = [(name, method) for name in config.methods for method in config.settings(name)]
    models: list[float] = [biased] * any("rewards" in method.needs and not method.own_oracle for _, method in every)
    ensemble = any("members" in method.needs for _, method in every)
    models += [member_size(config, biased)] * len(config.bias.member_fractions) * ensemble
    models += [biased] * len({(name, method.own_oracle) for name, method in every if method.own_oracle})
    reward = sum(training("reward", size, 2) + looks("reward") + valid * data.row(2) for size in models)
    yield Work("reward", True, reward, kept=len(models), adapters=config.adapts("reward"))
    distilling = any(method.needs and not method.reads_labels for _, method in every)
    scored = biased + unlabelled * distilling
    score = scored * (data.row(2) * (1 + len(models)) + samples * 2 * data.row(1)) + unlabelled * distilling * data.row(
        2
    )
    yield Work("score", True, score, batches=calls(scored * samples + 2 * unlabelled * distilling))
    policy, evaluated = 0.0, len(config.methods)
    for _, method in every:
        completions = 2 + samples * method.needs_samples
        policy += training("policy", biased, completions, more="members" in method.needs)
        probed = min(config.probe.pairs, valid) + min(config.probe.train_pairs, biased)
        policy += (config.probe.times + 1) * probed * data.row(2 + samples)
    policies = len(every) * config.snapshots
    yield Work("policy", True, policy, kept=policies, adapters=config.adapts("policy"))
    if policies > evaluated:  # there is a choice
        yield Work(
            "validate", True, policies * valid_prompts * 2 * data.row(1), batches=policies * calls(valid_prompts)
        )
    evaluate = evaluated * (test_prompts * 4 * data.row(1) + 2 * test * data.row(2))
    yield Work("evaluate", True, evaluate, batches=evaluated * calls(test_prompts))
    if (drawn := config.evaluation.best_of) is not None:
        yield Work("yardstick", True, valid_prompts * drawn * 2 * data.row(1), batches=calls(valid_prompts * drawn))
    elif samples >= 2 and config.probe.pairs:  # best of n of pi_ref, of samples that are there
        yield Work("yardstick", True, min(config.probe.pairs, valid) * samples * data.row(1))


def examples(options: TrainingConfig, size: float) -> float:
    """Examples that a training run sees."""
    if options.max_steps is not None:
        return options.max_steps * options.batch_size
    assert options.epochs is not None
    return options.epochs * size


def member_size(config: Config, biased: int) -> float:
    """The most pairs that every member's subset of D_rho can have; where rho is null, half of it prefers the longer."""
    if config.bias.member_size is not None:
        return config.bias.member_size
    rho = 0.5 if config.bias.rho is None else config.bias.rho
    shares = config.bias.member_fractions
    return biased * min(1.0, *(rho / b for b in shares if b), *((1 - rho) / (1 - b) for b in shares if b < 1))


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A config priced for a model and a GPU.

    Args:
        config: the run.
        parameters: of every model of it.
        gpu: one of GPUS.
        utilisation: useful operations over the GPU's peak; of `generate`, bytes of parameters over its bandwidth.
    """

    config: Config
    parameters: float
    gpu: GPU
    utilisation: float

    @property
    def peak(self) -> float:
        """Operations a second at best, at the run's precision."""
        slow = self.config.dtype == "float32" and not self.config.logprobs.autocast
        return self.gpu.float32 if slow else self.gpu.bfloat16

    @property
    def model_bytes(self) -> float:
        """Of the parameters, in memory and on disk."""
        return self.parameters * (2 if self.config.dtype == "bfloat16" else 4)

    @property
    def depth(self) -> float:
        """Layers. The shape is taken to be Llama's: N = 12 L H^2 with a width of 128 times the depth."""
        layers: float = (self.parameters / (12 * 128**2)) ** (1 / 3)
        return layers

    @property
    def adapter_bytes(self) -> float:
        """Of an adapter's parameters, float32, in memory and on disk: in and out of every linear layer, 8 H a layer and
        rank in attention and 11 H in the MLP. With `lora.target_modules` it is less."""
        return 4 * 19 * (self.config.lora.rank or 0) * 128 * self.depth**2

    @property
    def state_bytes(self) -> float:
        """Of the largest training, whatever the mini-batch: parameters, and autocast's copies; gradients and AdamW's
        two moments, of the adapters alone where a training has them."""
        trained = {"sft", "reward", "policy"} | ({"oracle"} if self.config.trains_oracle else set())
        copies = self.model_bytes + 2 * self.parameters * self.config.logprobs.autocast
        return copies + max(
            4 * self.adapter_bytes if self.config.adapts(stage) else 3 * self.model_bytes for stage in trained
        )

    @property
    def activation_bytes(self) -> float:
        """Of the largest micro-batch of any training, at mean lengths."""
        depth = self.depth
        unit = LAYER_BYTES * (2 if self.peak == self.gpu.float32 else 1)

        def of(options: TrainingConfig, completions: int) -> float:
            if not options.has_steps:
                return 0.0
            row = DATA[self.config.data.kind].row(completions)
            tokens = min(options.micro_batch_size or options.batch_size, options.batch_size) * row
            tokens = max(row, min(tokens, options.micro_batch_tokens or tokens))
            # Checkpointing keeps each layer's input, in float32, and one layer's activations.
            per_layer = unit + depth * 4 if options.activation_checkpointing else unit * depth
            return tokens * 128 * depth * per_layer

        config = self.config
        return max(of(config.sft, 1), of(config.oracle, 2), of(config.reward, 2), of(config.policy, 3))

    def hours(self, work: Work) -> float:
        """GPU hours of a stage."""
        computing = 2 * self.parameters * work.passes / (self.peak * self.utilisation)
        step = max(STEP_SECONDS, self.model_bytes / (self.gpu.bandwidth * self.utilisation))
        sampling = work.batches * self.config.data.limits[1] * step
        hours: float = (computing + sampling) / 3600
        return hours


def render(cost: Cost, name: str, rhos: int) -> str:
    """The estimate as Markdown: a table by stage, then memory."""
    works = list(stages(cost.config))

    def line(label: str, chosen: Sequence[tuple[Work, int]]) -> tuple[str, ...]:
        def total(values: Iterator[float]) -> float:
            return sum(value * times for value, (_, times) in zip(values, chosen, strict=True))

        kept = total(float(work.kept) for work, _ in chosen)
        saved = total(work.kept * (cost.model_bytes + work.adapters * cost.adapter_bytes) for work, _ in chosen)
        passes = total(work.passes for work, _ in chosen)
        hours = total(cost.hours(work) for work, _ in chosen)
        operations, disk = 2 * cost.parameters * passes / 1e18, saved / 1e9
        return label, f"{kept:,.0f}", f"{passes / 1e9:,.2f}", f"{operations:,.1f}", f"{hours:,.1f}", f"{disk:,.0f}"

    rows = [line(work.stage, [(work, 1)]) for work in works]
    rows.append(line("all, one rho", [(work, 1) for work in works]))
    if rhos > 1:
        rows.append(line(f"all, {rhos} rho's", [(work, rhos if work.each_rho else 1) for work in works]))
    products = "float32" if cost.peak == cost.gpu.float32 else "bfloat16"
    settings = sum(len(cost.config.settings(method)) for method in cost.config.methods)
    lora = cost.config.lora
    adapters = f", adapters of rank {lora.rank} in {', '.join(lora.stages)}" if lora.rank is not None else ""
    needed = cost.state_bytes + cost.activation_bytes
    fits = "fits" if needed <= cost.gpu.memory else "does not fit"
    return "\n".join(
        [
            f"{cost.config.data.kind}, {cost.parameters / 1e9:g}B parameters in {cost.config.dtype}{adapters}, "
            f"{products} products; {len(cost.config.methods)} methods, {settings} settings; {name}, "
            f"{cost.utilisation:.0%} of {cost.peak / 1e12:g} TFLOP/s:",
            "",
            table(("stage", "models kept", "Gtokens passed", "EFLOP", "GPU hours", "disk, GB"), rows),
            "",
            f"Training holds {cost.state_bytes / 1e9:.0f} GB of parameters, gradients and moments, and about "
            f"{cost.activation_bytes / 1e9:.0f} GB of activations; this {fits} one {name} "
            f"({cost.gpu.memory / 1e9:g} GB).",
        ]
    )
