"""Speed of the trainer next to TRL's: pairs and tokens a second, peak memory, share of the machine's product peak.

    python -m lm.bench [--quick] [--curves] [--json FILE] [--markdown FILE]

Every variant runs in a process of its own, so that its allocator settings and its peak memory are its own. The
processes take turns: a round is one turn of each, on the same pairs; ratios are taken within a round, then medians over
the rounds, so that what else the machine does touches both sides of a ratio. TRL is an optional extra.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import platform
import signal
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm.base import progress
from lm.base.memory import forget_alignment
from lm.logprobs.kernels import onednn_available, onednn_gains, onednn_product
from lm.studies.bench_plan import (
    BATCH,
    CURVES,
    PEERS,
    TLDR,
    VARIANTS,
    Job,
    Shape,
    Turn,
    Variant,
    Work,
    Workload,
    clock_of,
    is_trl,
    trl_installed,
    useful_flops,
    work_of,
)
from theory.records import table, write_text


def marks(command: str) -> tuple[str, str]:
    """Lines of a Markdown file between which this command writes."""
    return f"<!-- {command}: begin -->", f"<!-- {command}: end -->"


BEGIN_MARK, END_MARK = marks("lm.bench")


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's own on so many threads, inside; the number is the process's, which goes on with what it had."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- the rounds


Product = Callable[[Tensor, Tensor], object]
"""[a, k], [b, k] -> [a, b]."""


def gemm_peak(peaks: dict[str, float], clock: str = "wall", device: str = "cpu") -> None:
    """Raises each dtype's entry to the fastest matrix product of this moment, GFLOP/s: torch's own, and in float32
    oneDNN's (torch's own in bfloat16, where the processor has it), of the shapes of S, L, and a square."""
    now = clock_of(clock, device)
    shapes = [(3456, 256, 688), (3456, 512, 1376), (1024, 1024, 1024)]
    if device == "cuda":
        shapes.append((8192, 8192, 8192))
    for name in peaks:
        products: list[Product] = [lambda left, right: left @ right.t()]
        if name == "float32" and device == "cpu" and onednn_available():
            products.append(onednn_product)
        for rows, inner, columns in shapes:
            left, right, _ = _operands(rows, inner, columns, getattr(torch, name), device)
            for product in products:
                for _ in range(3):
                    start = now()
                    product(left, right)
                    rate = 2 * rows * inner * columns / max(now() - start, 1e-9) / 1e9
                    peaks[name] = max(peaks[name], rate)


def products_of(job: Job) -> list[tuple[int, int, int]]:
    """[a, k], [b, k] -> [a, b]: a, k and b of each product of a forward over a step's pairs of middling lengths."""
    shape, work = job.shape, job.workload
    completions = job.pairs * work.completions * work.completion
    tokens = job.pairs * work.prompt + completions
    queries, keys = shape.attention
    of_layer = [(shape.hidden, queries), (shape.hidden, keys), (shape.hidden, keys), (queries, shape.hidden)]
    of_layer += [(shape.hidden, shape.intermediate)] * 2 + [(shape.intermediate, shape.hidden)]
    return [(tokens, *size) for size in of_layer] * shape.layers + [(completions, shape.hidden, shape.vocabulary)]


SUSTAINED = 1.0
"""Seconds of products in a row: a processor that has cooled down does a few of them faster."""


def sustained(job: Job, dtype: str) -> float:
    """GFLOP/s of the products of the model's shapes, one forward after the other for SUSTAINED seconds at least; by
    torch, or by oneDNN where the core takes it."""
    sizes, now = products_of(job), clock_of(job.clock, job.device)
    through = dtype == "float32" and job.device == "cpu" and onednn_gains(job.shape.hidden)
    made = {size: _operands(*size, getattr(torch, dtype), job.device) for size in dict.fromkeys(sizes)}
    done, start = 0, now()
    while (spent := now() - start) < SUSTAINED:
        for size in sizes:
            left, right, result = made[size]
            onednn_product(left, right) if through else torch.mm(left, right.t(), out=result)
            done += 2 * math.prod(size)
    return done / spent / 1e9


def _operands(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """And a result, whose memory is there."""
    left, right = (torch.randn(n, inner, device=device).to(dtype) for n in (rows, columns))
    return left, right, torch.mm(left, right.t())


def _work(job: Job, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: who conducts ends the others
    if job.variant.untouched:
        forget_alignment()  # torch is imported, by this module, but has made no tensor
    from lm.studies.bench_workers import work  # torch is for the workers, and for the product below

    work(job, connection)
    with contextlib.suppress(EOFError):  # until it is let go: its end would take the cores from who is timed next
        connection.recv()


@dataclass
class Worker:
    """The conductor's side of one process."""

    name: str
    job: Job
    took: list[Turn] = field(default_factory=list)

    def __enter__(self) -> Worker:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(self.job, theirs), daemon=True)
        self.process.start()
        theirs.close()
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None:  # before its connection ends, of which it would complain
            self.process.terminate()
        self.connection.close()
        self.process.join()

    def turn(self, product: float | None = None) -> None:
        """RuntimeError where the process failed. `product` as of `Turn`."""
        try:
            self.connection.send(None)
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise RuntimeError(f"{self.name}: its process died, exit status {self.process.exitcode}") from None
        if not isinstance(answer, Turn):
            raise RuntimeError(f"{self.name} failed:\n{answer}")
        self.took.append(answer._replace(product=product))


def run_rounds(jobs: dict[str, Job], peaks: dict[str, float], what: str = "rounds") -> dict[str, list[Turn]]:
    """Variant -> its turns, without the first, in which everything warms up. Says each round's ratios as they come.

    Turns in processes of their own warm up in each: there the first round is not run at all.
    """
    if not jobs:
        return {}
    some = next(iter(jobs.values()))
    took: dict[str, list[Turn]] = {name: [] for name in jobs}
    with contextlib.ExitStack() as stack:
        workers = {} if some.apart else {name: stack.enter_context(Worker(name, job)) for name, job in jobs.items()}
        numbers = range(1 if some.apart else 0, some.turns)
        bar = stack.enter_context(progress.bar(what, total=len(numbers) * len(jobs), unit="turn"))
        for number in numbers:
            gemm_peak(peaks, some.clock, some.device)
            rates = {dtype: sustained(some, dtype) for dtype in {job.variant.dtype for job in jobs.values()}}
            for name, job in jobs.items():
                with contextlib.nullcontext(workers[name]) if workers else Worker(name, job.only(number)) as worker:
                    worker.turn(rates[job.variant.dtype])
                    took[name].append(worker.took[-1])
                bar.update()
            if number:
                last = {name: turns[-1] for name, turns in took.items()}
                progress.say(f"{what}, round {number} of {some.turns - 1}: {_ratios_in_words(last)}")
    return {name: turns if some.apart else turns[1:] for name, turns in took.items()}


def _ratios_in_words(turns: dict[str, Turn]) -> str:
    """Of one round: how many times as fast each of ours is as its peers, or what each took where there are none."""
    told = [
        f"{name} {turns[peer].cost / own.cost:.2f} x {peer}"
        for name, own in turns.items()
        for peer in _peers(name).values()
        if peer in turns and peer != name and not is_trl(name)
    ]
    return ", ".join(told or [f"{name} {own.seconds:.2f} s" for name, own in turns.items()])


def _peers(name: str) -> dict[str, str]:
    """Ratio -> the variant that it is to."""
    stage, end = VARIANTS[name].stage, "-bf16" if VARIANTS[name].dtype == "bfloat16" else ""
    return {key: (peer if stage == "policy" else f"{stage}-{peer}") + end for key, peer in PEERS.items()}


def summarise(
    config: str,
    variants: dict[str, Variant],
    took: dict[str, list[Turn]],
    works: dict[str, list[Work]],
    notes: dict[str, str],
) -> list[dict[str, Any]]:
    """Rows of one stage, medians over rounds; None where there is nothing to say, and `notes` on what was not measured.
    `gflop_per_s` are useful ones, `of_sustained` their share of the products' rate in the same round."""
    rows = []
    for name, variant in variants.items():
        row: dict[str, Any] = {"config": config, "stage": variant.stage, "variant": name, "dtype": variant.dtype}
        row |= dict.fromkeys(("pairs_per_s", "tokens_per_s", "gflop_per_s", "of_sustained", "peak_mb", *PEERS))
        if name not in took:
            rows.append(row | {"note": notes[name]})
            continue
        turns = took[name]
        over: dict[str, list[float]] = {}
        for key, what, unit in (("pairs_per_s", 0, 1), ("tokens_per_s", 1, 1), ("gflop_per_s", 2, 1e9)):
            over[key] = [todo[what] / turn.seconds / unit for todo, turn in zip(works[name], turns, strict=True)]
        if variant.samples:
            over["tokens_per_s"], _ = [1 / turn.cost for turn in turns], over.pop("gflop_per_s")
        elif all(turn.product for turn in turns):
            rates = zip(over["gflop_per_s"], turns, strict=True)
            over["of_sustained"] = [rate / turn.product for rate, turn in rates if turn.product]
        memory = [turn.peak_mb for turn in turns if turn.peak_mb is not None]
        row["peak_mb"] = max(memory) if memory else None
        for key, peer in _peers(name).items():
            if (other := took.get(peer)) is not None:
                over[key] = [o.cost / t.cost for o, t in zip(other, turns, strict=True)]
        row |= {key: statistics.median(values) for key, values in over.items()}
        rows.append(row | {"spread": {key: [min(values), max(values)] for key, values in over.items()}})
    return rows


APART = 1.5
"""How many times the smallest of its rounds a ratio's largest may be."""


def disagreements(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Ratios of which two rounds disagree by more than half, in words: these medians say nothing."""
    return [
        f"{row['config']}, {row['variant']} x {_peers(row['variant'])[key]}: from {low:.2f} to {high:.2f}"
        for row in rows
        for key, (low, high) in row.get("spread", {}).items()
        if key in PEERS and high > APART * low
    ]


# ---------------------------------------------------------------- the command


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to measure.

    Args:
        rounds: timed turns of each variant.
        steps: timed optimiser steps (or batches of scoring) a turn.
        threads: of each process.
        pairs: a step.
        clock: of CLOCKS.
        device: "cpu" or "cuda".
        lengths: of the pairs, with each variant's K.
        skip_bf16: leave out what computes in bfloat16, as this machine does that more slowly than float32.
    """

    rounds: int
    steps: int
    threads: int
    pairs: int = BATCH
    clock: str = "wall"
    device: str = "cpu"
    lengths: Workload = TLDR
    skip_bf16: bool = False

    def why_not(self, name: str) -> str | None:
        """Why a variant is not measured; None where it is."""
        if is_trl(name) and not trl_installed():
            return "trl not installed"
        if self.skip_bf16 and VARIANTS[name].dtype == "bfloat16":
            return "no bfloat16 products in this processor"
        if VARIANTS[name].varlen and self.device == "cpu":
            return "FlashAttention is for CUDA"
        return None

    def run(
        self, config: str, shape: Shape, names: Iterable[str], peaks: dict[str, float], workload: Workload | None = None
    ) -> list[dict[str, Any]]:
        """Rows of these variants of one stage, on `workload` or on pairs of the plan's lengths."""
        variants = {name: VARIANTS[name] for name in names}
        notes = {name: why for name in variants if (why := self.why_not(name)) is not None}
        jobs = {
            name: Job(
                variant=variant,
                shape=shape,
                workload=workload or replace(self.lengths, completions=max(2, variant.completions)),
                turns=self.rounds + 1,
                steps=self.steps,
                threads=self.threads,
                pairs=self.pairs,
                clock=self.clock,
                device=self.device,
            )
            for name, variant in variants.items()
            if name not in notes
        }
        took = run_rounds(jobs, peaks, f"{config}, {', '.join(dict.fromkeys(v.stage for v in variants.values()))}")
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
            names = [name for name in CURVES if workload.completions == 2 or not is_trl(name)]
            flops = partial(useful_flops, shape, workload.prompt, head=True, backward=True)
            shared = flops(completions=[workload.completion] * workload.completions)
            apart = workload.completions * flops(completions=[workload.completion])
            at = {"axis": axis, "flops_unshared": apart / shared}
            at |= {name: getattr(workload, name) for name in ("prompt", "completion", "completions")}
            rows += [at | row for row in self.run(config, shape, names, peaks, workload)]
        return rows


def machine(threads: int, peaks: dict[str, float], device: str = "cpu") -> dict[str, Any]:
    """What the numbers are measured on; `peaks` fill up meanwhile, `load` is what ran before."""
    model = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    packages = ("torch", "transformers", "trl") if trl_installed() else ("torch", "transformers")
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "onednn_float32": onednn_gains(),
        "gemm_gflop_per_s": peaks,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "load": os.getloadavg()[0],
    }


RATIOS = {
    "ratio_trl": "x TRL",
    "ratio_trl_tuned": "x TRL tuned",
    "ratio_unshared": "x unshared",
    "ratio_varlen": "x varlen",
    "ratio_generate": "x generate",
    "ratio_generate_tuned": "x generate tuned",
}
"""The headings."""


def _cell(value: object, digits: str, spread: Sequence[float] | None = None) -> str:
    """A median, and in brackets what it is the median of."""
    shown = "-" if value is None else format(value, digits)
    return shown if spread is None else f"{shown} [{', '.join(format(end, digits) for end in spread)}]"


def render(document: dict[str, Any]) -> str:
    """The document's tables."""
    about = document["machine"]
    peaks = about["gemm_gflop_per_s"]
    parts = [
        (about["gpu"] or f"{about['cpu']} ({about['capability']}), {about['threads']} threads")
        + "; "
        + ", ".join(f"{name} {number}" for name, number in about["versions"].items())
        + "; fastest matrix product "
        + ", ".join(f"{rate:.0f} GFLOP/s in {name}" for name, rate in peaks.items())
        + ".",
    ]
    for config in dict.fromkeys(row["config"] for row in document["rows"]):
        of_config = [row for row in document["rows"] if row["config"] == config]
        ratios = [key for key in PEERS if any(row[key] is not None for row in of_config)]
        header = ("pairs/s", "tokens/s", "peak MB", *(RATIOS[key] for key in ratios), "of GEMM peak", "of sustained")
        cells = []
        for row in of_config:
            share = None if row["gflop_per_s"] is None else row["gflop_per_s"] / peaks[row["dtype"]]
            measured = [
                _cell(row["pairs_per_s"], ".2f", row.get("spread", {}).get("pairs_per_s")),
                _cell(row["tokens_per_s"], ",.0f"),
                _cell(row["peak_mb"], ",.0f"),
                *(_cell(row[key], ".2f", row.get("spread", {}).get(key)) for key in ratios),
                _cell(share, ".0%"),
                _cell(row["of_sustained"], ".0%", row.get("spread", {}).get("of_sustained")),
            ]
            cells.append(
                [row["variant"], *(measured if "note" not in row else [row["note"], *["-"] * (4 + len(ratios))])]
            )
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


def put_between_marks(path: Path, text: str, command: str = "lm.bench") -> None:
    """Replaces what stands between a command's marks in a Markdown file; ValueError where it has not both once."""
    begin, end = marks(command)
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    if before.count(begin) != 1 or before.count(end) != 1 or before.index(begin) > before.index(end):
        raise ValueError(f"--markdown {path}: the file must have a line {begin!r}, and below it {end!r}")
    head, tail = before.split(begin)[0], before.split(end)[1]
    write_text(path, f"{head}{begin}\n{text}\n{end}{tail}")
