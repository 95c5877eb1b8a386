"""A worker's whole life, in a process of its own: one way of doing a stage, a turn at a time."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

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
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from lm.base import progress
from lm.base.memory import keep_freed_memory
from lm.config import Config, DataConfig, TrainingConfig
from lm.logprobs.completions import CompletionModel, collate
from lm.logprobs.generation import left_padded
from lm.logprobs.sampling import sample_completions
from lm.logprobs.scoring import score_pairs
from lm.objectives import DPO, PessimisticDPO
from lm.studies.bench_plan import END, PAD, Job, Shape, Turn, clock_of
from lm.training.batches import Batch, pair_collator
from lm.training.loop import fit, training_arguments
from lm.training.policy import PolicyTrainer
from lm.training.trainer import CompletionTrainer, RewardTrainer


def make_model(shape: Shape, longest: int, *, reward: bool = False) -> PreTrainedModel:
    """Random weights, or those of a pretrained model, float32; the same for every variant.

    Raises:
        ValueError: the pretrained model is not of this shape.
    """
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    torch.manual_seed(0)
    if shape.model is not None:
        more = {"num_labels": 1, "pad_token_id": PAD} if reward else {}
        pretrained: PreTrainedModel = auto.from_pretrained(shape.model, dtype=torch.float32, **more)
        own = pretrained.config
        queries, keys = (n * own.head_dim for n in (own.num_attention_heads, own.num_key_value_heads))
        found = (own.hidden_size, own.num_hidden_layers, own.intermediate_size, own.vocab_size, (queries, keys))
        if found != (shape.hidden, shape.layers, shape.intermediate, shape.vocabulary, shape.attention):
            raise ValueError(
                f"{shape.model} has (width, layers, gated width, vocabulary, attention) {found}, not {shape}"
            )
        return pretrained
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        head_dim=shape.head_size or shape.hidden // shape.heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        max_position_embeddings=longest,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
        tie_word_embeddings=False,
        num_labels=1,
    )
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    return model


class Turns:
    """A worker's side of the rounds: it waits for its turn, and says what it took."""

    def __init__(self, job: Job, connection: Connection) -> None:
        self.on_gpu, self.clock, self.connection = job.device == "cuda", clock_of(job.clock, job.device), connection

    def begin(self) -> None:
        """Waits."""
        self.connection.recv()

    def start(self) -> None:
        """What is timed begins: peak memory counts from here, without what starting and trying a route took."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def end(self, seconds: float, drawn: int | None = None) -> None:
        """Reports, and gives free memory back so that the next has it."""
        peak = torch.cuda.max_memory_allocated() / 1e6 if self.on_gpu else peak_mb()
        self.connection.send(Turn(seconds, peak, drawn=drawn))
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
        if not self.stamps:
            self.turns.start()
        self.stamps.append(self.turns.clock())
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
        score(data.select(range(rows.start - job.pairs, rows.start)))
        turns.start()
        start = turns.clock()
        score(data.select(rows))
        turns.end(turns.clock() - start)


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
            RUNS[job.variant.run](job, Turns(job, connection))
        except Exception:
            connection.send(traceback.format_exc())


# ---------------------------------------------------------------- ours


def _training(job: Job) -> TrainingConfig:
    return TrainingConfig(
        max_steps=job.turns * (job.steps + 1),
        batch_size=job.pairs,
        learning_rate=1e-5,
        schedule="constant_with_warmup",
        warmup_fraction=0.0,
        logging_steps=1,
    )


class _InOrder(CompletionTrainer):
    """Takes the pairs in the order of the data, as TRL is told to: all variants have the same batches."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        size = self.args.per_device_train_batch_size
        return DataLoader(self.train_dataset, batch_size=size, collate_fn=self.data_collator)


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


def _device(job: Job) -> str:
    """As `lm.training.loop.training_arguments` has it."""
    return "cpu" if job.device == "cpu" else "auto"


def _wrapped(job: Job, reward: bool) -> CompletionModel:
    model = make_model(job.shape, job.longest, reward=reward).to(job.device)
    core = CompletionModel(model, options=job.variant.options)
    if job.variant.varlen:
        from lm.studies.varlen import use_varlen

        use_varlen(core, job.longest)
    return core


def train_ours(job: Job, turns: Turns, *, reward: bool = False) -> None:
    """The real trainer, with its log lines and diagnostics."""
    samples = job.workload.completions > 2
    model = _wrapped(job, reward)
    collator = pair_collator(sample=samples)
    method = {} if reward else {"method": PessimisticDPO() if samples else DPO()}
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(_training(job), Path(folder), seed=0, device=_device(job))
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
    model, data = _wrapped(job, reward), job.data()
    completions = zip(*(map(len, data[name]) for name in ("chosen_ids", "rejected_ids")), strict=True)
    rows = [len(prompt) + max(both) for prompt, both in zip(data["prompt_ids"], completions, strict=True)]
    longest = max(range(len(rows)), key=rows.__getitem__)
    score_pairs(model, data.select([longest]), what="the trial, which a run pays once")
    score_in_turns(job, turns, data, partial(score_pairs, model, what="benchmark"))


def sample(job: Job, turns: Turns, *, ours: bool) -> None:
    """K completions of each prompt: by `sample_completions`, or by one call of a plain model's `generate`, prompts as
    they come. Every token may be the last, with the chance at which half of the completions are as long as the data's.
    """
    prompts, each = job.data()["prompt_ids"][:], job.variant.completions
    chance, words = 1 - 0.5 ** (1 / job.workload.completion), _tokenizer()
    core = _wrapped(job, False).eval() if ours else None
    model = core.model if core is not None else make_model(job.shape, job.longest).to(job.device).eval()
    if job.variant.tuned:
        keep_freed_memory()
    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=PAD)

    def may_end(_: Any, __: Any, logits: Tensor) -> Tensor:
        logits[..., END] = -torch.inf
        logits[..., END] = logits.logsumexp(-1) + math.log(chance / (1 - chance))
        return logits

    model.get_output_embeddings().register_forward_hook(may_end)

    def draw(some: list[list[int]], seed: int) -> int:
        if core is not None:
            many = [prompt for prompt in some for _ in range(each)]
            found = sample_completions(core, many, words, _sampling(job), seed=seed, what="benchmark")
            return sum(map(len, found))
        torch.manual_seed(seed)
        ids, mask = left_padded(some, model.device)
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "max_new_tokens": job.sampled}
        rows = model.generate(input_ids=ids, attention_mask=mask, num_return_sequences=each, **options)
        new = rows[:, ids.shape[1] :]
        return int(((new == END).cumsum(1) - (new == END).long() == 0).sum())

    draw([max(prompts, key=len), prompts[0]], 0)  # what is tried of a model is tried for the longest
    for turn in range(job.turns):
        rows = job.timed(turn)
        turns.begin()
        draw(prompts[rows.start - job.pairs : rows.start], job.seed)
        turns.start()
        start = turns.clock()
        drawn = draw(prompts[rows.start : rows.stop], job.seed + turn)
        turns.end(turns.clock() - start, drawn)


def _sampling(job: Job) -> Config:
    once = TrainingConfig(max_steps=1)
    return Config(
        output_dir="unused",
        model="unused",
        methods=["dpo"],
        device=cast(Any, job.device),
        data=DataConfig(max_prompt_length=1, max_completion_length=job.sampled),
        sft=once,
        oracle=once,
        reward=once,
        policy=once,
    )


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
    ours = training_arguments(_training(job), Path(folder), seed=0, device=_device(job))
    same = ("max_steps", "learning_rate", "lr_scheduler_type", "max_grad_norm", "weight_decay", "optim", "seed")
    return {
        "output_dir": folder,
        "per_device_train_batch_size": job.pairs,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "bf16": job.variant.bf16,
        "use_cpu": job.device == "cpu",
        "dataloader_pin_memory": job.device == "cuda",
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
            precompute = partial(DPOTrainer._precompute_ref_logps, trainer, name="train", batch_size=job.pairs)
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


RUNS: dict[str, Callable[[Job, Turns], None]] = {
    "policy_trl": policy_trl,
    "score_trl": partial(policy_trl, score=True),
    "reward_trl": reward_trl,
    "train_ours": train_ours,
    "score_ours": score_ours,
    "train_reward": partial(train_ours, reward=True),
    "score_reward": partial(score_ours, reward=True),
    "sample_generate": partial(sample, ours=False),
    "sample_ours": partial(sample, ours=True),
}
"""By the names that `lm.studies.bench_plan.Variant` has."""
