"""Speed of the trainer next to TRL's: pairs and tokens a second, peak memory, share of the machine's product peak.

    python -m lm.bench [--quick] [--curves] [--json FILE] [--markdown FILE]
    python -m lm.bench --device cuda [--lengths hh] [--pairs 32]
    python -m lm.bench --startup
    python -m lm.bench --scale [PAIRS ...] [--json FILE]

Every variant runs in a process of its own, so that its allocator settings and its peak memory are its own. The
processes take turns: a round is one turn of each, on the same pairs; ratios are taken within a round, then medians over
the rounds, so that what else the machine does touches both sides of a ratio. TRL is an optional extra. With --startup
it tells how long commands take to say --help, likewise; with --scale what the data side costs as sets grow
(`lm.studies.scale`). Exit status 1 where two rounds of a ratio disagree by more than half.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lm.base import progress
from lm.base.command import add_force, argument_parser, as_command, check_free, path
from lm.base.store import provenance
from lm.studies.bench_plan import BATCH, CLOCKS, CONFIGS, GPU, LENGTHS, QUICK, SIZES, VARIANTS, Shape
from theory.records import write_json


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


@as_command
def main(arguments: Sequence[str], configs: dict[str, Shape] = CONFIGS) -> int:
    """The command."""
    parser = argument_parser(
        "lm.bench",
        "Speed of the trainer next to TRL's; medians of interleaved rounds.",
        "--quick",
        "--curves --json bench.json --markdown docs/performance.md",
        "--startup",
        "--scale 10000 100000 --json figures/results/scale.json",
    )
    parser.add_argument("--quick", action="store_true", help=f"S8, {', '.join(QUICK)}; 3 rounds of 2 steps")
    parser.add_argument(
        "--configs", nargs="+", choices=configs, metavar="MODEL", help=f"{', '.join(configs)}; those of random weights"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, metavar="VARIANT", help=f"what to measure: {', '.join(VARIANTS)}"
    )
    parser.add_argument("--lengths", choices=LENGTHS, default="tldr", help="of prompts and completions; %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where; %(default)s")
    parser.add_argument("--rounds", type=_positive, help="turns of each variant; 5")
    parser.add_argument("--steps", type=_positive, help="timed steps a turn, after one that is not; 3")
    parser.add_argument("--pairs", type=_positive, default=BATCH, help="a step; %(default)s")
    parser.add_argument("--threads", type=_positive, default=os.cpu_count(), help="%(default)s")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="seconds that pass, or (cpu) that a process had a core, for a machine with other jobs; with --threads 1",
    )
    parser.add_argument("--curves", action="store_true", help="cost against prompt length, completion length, K too")
    parser.add_argument("--startup", action="store_true", help="only how long commands take to say --help")
    parser.add_argument(
        "--scale",
        nargs="*",
        type=_positive,
        metavar="PAIRS",
        help="only what the data side costs as sets grow, beside TRL's preparation: made sets of so many pairs each; "
        f"{' '.join(map(str, SIZES))}",
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="write the measurements here")
    parser.add_argument("--markdown", type=path, metavar="FILE", help="put the tables between the marks of this file")
    add_force(parser)
    options = parser.parse_args(arguments)
    if options.json:
        check_free("--json", options.json, force=options.force)
    elif options.force:
        parser.error("--force goes with --json")
    if options.startup:
        _startup(parser, options)
        return 0
    if options.scale is not None:
        _scale(parser, options)
        return 0
    if options.clock == "cpu" and options.threads != 1:
        parser.error(f"--clock cpu: threads count while they wait for each other; --threads 1, not {options.threads}")
    if options.device == "cuda":
        _check_gpu(parser, options)
    from lm.studies import loaded
    from lm.studies.bench import Plan, disagreements, gemm_peak, machine, put_between_marks, render, threads

    loaded.warn_of_queue()
    began = loaded.ticks()
    if options.markdown:
        try:
            put_between_marks(options.markdown, "A run is in progress.")
        except ValueError as error:
            parser.error(str(error))
    on_gpu = options.device == "cuda"
    made_up = [name for name, shape in configs.items() if shape.model is None and shape.for_gpu == on_gpu]
    chosen = options.configs or (["S8"] if options.quick else made_up)
    shapes = {name: _at_hand(configs[name]) for name in chosen}
    names = options.variants or (GPU if on_gpu else QUICK if options.quick else tuple(VARIANTS))
    with threads(options.threads):
        peaks = dict.fromkeys((VARIANTS[name].dtype for name in names), 0.0)
        peaks.setdefault("float32", 0.0)
        gemm_peak(peaks, options.clock, options.device)
        plan = Plan(
            rounds=options.rounds or (3 if options.quick else 5),
            steps=options.steps or (2 if options.quick else 3),
            threads=options.threads,
            pairs=options.pairs,
            clock=options.clock,
            device=options.device,
            lengths=LENGTHS[options.lengths],
            skip_bf16=options.variants is None and peaks.get("bfloat16", 0.0) < peaks["float32"],
        )
        document: dict[str, Any] = {
            "rows": [],
            "curves": [],
            "rounds": plan.rounds,
            "steps": plan.steps,
            "pairs": plan.pairs,
            "clock": plan.clock,
            "lengths": options.lengths,
            "machine": machine(plan.threads, peaks, plan.device),
            "provenance": provenance(seed=0),
        }
        for config in chosen:
            for stage in dict.fromkeys(VARIANTS[name].stage for name in names):
                of_stage = [name for name in names if VARIANTS[name].stage == stage]
                document["rows"] += plan.run(config, shapes[config], of_stage, peaks)
                progress.say(f"{config}, {stage}: done")
        if options.curves:
            document["curves"] = plan.curves("S8", configs["S8"], peaks)
    document["machine"]["steal"] = loaded.stolen(began, loaded.ticks())
    loaded.warn_of_steal(document["machine"]["steal"])
    text = render(document)
    print(text)
    if options.json:
        write_json(options.json, document)
    if options.markdown:
        put_between_marks(options.markdown, text)
    apart = disagreements([*document["rows"], *document["curves"]])
    for told in apart:
        print(
            f"error: two rounds disagree by more than half: {told}; measure again when the machine is idle, or with "
            "more --steps",
            file=sys.stderr,
        )
    return int(bool(apart))


def _check_gpu(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses what no GPU is for, or where there is none."""
    import torch

    for name in ("quick", "curves"):
        if getattr(options, name):
            parser.error(f"--{name} is for the CPU")
    if options.clock == "cpu":
        parser.error("--clock cpu: a process does not have a core while the GPU computes; --clock wall")
    if not torch.cuda.is_available():
        built = "has no CUDA in it" if torch.version.cuda is None else "sees no GPU here"
        parser.error(f"--device cuda: torch {torch.__version__} {built}; --device cpu measures the processor")


def _alone(parser: argparse.ArgumentParser, options: argparse.Namespace, *kept: str) -> None:
    """Refuses options that would have no effect beside the first."""
    also = {*kept, "json", "force", "debug", "quiet"}
    idle = [name for name, value in vars(options).items() if name not in also and value != parser.get_default(name)]
    if idle:
        parser.error(f"--{idle[0]} has no effect with --{kept[0]}")


def _scale(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Measures, and prints the table. What is measured is written as it comes: large sets take hours."""
    _alone(parser, options, "scale")
    from lm.studies import loaded
    from lm.studies.bench import machine
    from lm.studies.scale import measure, render

    loaded.warn_of_queue()
    rows: list[dict[str, Any]] = []
    document = {"rows": rows, "machine": machine(1, {}), "provenance": provenance(seed=0)}
    for row in measure(sorted(set(options.scale or SIZES))):
        rows.append(row)
        if options.json:
            write_json(options.json, document)
    print(render(document))


def _at_hand(shape: Shape) -> Shape:
    """With its pretrained model, if any, in a folder, before processes ask for it. ValueError where it is nowhere."""
    from lm.models.gguf import as_folder

    return shape if shape.model is None else replace(shape, model=as_folder(shape.model))


def _startup(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Measures, and prints the table."""
    _alone(parser, options, "startup", "rounds")
    from lm.studies.startup import measure, render

    rows = measure(options.rounds or 5)
    print(render(rows))
    if options.json:
        write_json(options.json, {"rows": rows, "provenance": provenance(seed=0)})


if __name__ == "__main__":
    sys.exit(main())
