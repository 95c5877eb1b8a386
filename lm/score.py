"""Scores of a run's pairs; with --data, --reward-model and --out, of any preference set by any reward model.

`python -m lm.score` scores the training pairs by pi_ref and every reward model, and samples pi_ref for the KL term.
`python -m lm.score --data DATA --reward-model A --out FILE` is `lm.judging.scored_sets`; with --help after these it
explains itself. Both score offline, every row once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lm.base import progress, ranks
from lm.base.command import add_data, add_force, argument_parser, as_command, path, place, said_once
from lm.config import DTYPES, TASKS, ReferenceScoring, Scoring
from lm.stages.run import Run, command

if TYPE_CHECKING:
    from lm.judging.scored_sets import Summary


def is_for_any_set(arguments: Sequence[str]) -> bool:
    """Which of the two commands it is: only this one has models of its own, or a file to write."""
    own = {"--reward-model", "--judge-model", "--reference", "--samples", "--sample-tokens", "--out"}
    return bool(own & {argument.split("=")[0] for argument in arguments})


# ---------------------------------------------------------------- the command


def parser_of() -> argparse.ArgumentParser:
    """Of the options for any set."""
    parser = argument_parser(
        "lm.score",
        __doc__,
        "--data pairs.jsonl --reward-model Skywork/Skywork-Reward-V2-Qwen3-0.6B --out scored.jsonl",
        "--data pairs.jsonl --reward-model runs/own/reward/* --out scored.parquet",
        "--data pairs.jsonl --reward-model A B --reference Qwen/Qwen2.5-0.5B --samples 1 --out scored.parquet",
        "--data pairs.jsonl --judge-model NAME --task helpfulness --base_url http://localhost:8000/v1 --out s.jsonl",
    )
    add_data(parser, "--data", required=True)
    parser.add_argument("--subset", metavar="NAME", help="folder of a hub dataset")
    parser.add_argument(
        "--reward-model",
        action="extend",
        nargs="+",
        type=place,
        default=[],
        metavar="A",
        help="hub name or folder; several, or the option again, for an ensemble",
    )
    parser.add_argument(
        "--reference",
        type=place,
        metavar="M",
        help="the causal LM that is to be pi_ref, hub name or folder: adds token ids and its log-probs of both sides",
    )
    parser.add_argument(
        "--samples", type=int, default=0, metavar="S", help="completions of each prompt that it draws, with log-probs"
    )
    parser.add_argument(
        "--sample-tokens",
        type=int,
        metavar="N",
        help=f"of its longest sample; {ReferenceScoring.sample_tokens} by default",
    )
    parser.add_argument("--seed", type=int, help=f"of its samples; {ReferenceScoring.seed} by default")
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help=".jsonl, .jsonl.gz or .parquet")
    add_force(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the parameters; by default as saved")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="default: the accelerator, if any")
    parser.add_argument("--batch-tokens", type=int, default=Scoring.batch_tokens, help="default: %(default)s")
    parser.add_argument("--max-length", type=int, metavar="N", help="longest text, tokens; the model's own by default")
    parser.add_argument(
        "--judge-model", "--model", metavar="NAME", help="an LLM at an OpenAI-compatible endpoint, the last member"
    )
    parser.add_argument("--task", choices=TASKS, help="what the judge compares")
    for name, kind in JUDGES.items():
        parser.add_argument(f"--{name}", type=kind, help="of the judge, see lm.judge --help")
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. Leaves with status 2 and a message for one that is unknown, missing, or without effect."""
    from lm.judging.llm import spelled

    parser = parser_of()
    written = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(spelled(written))
    if not options.reward_model and options.judge_model is None and options.reference is None:
        parser.error("name one or more models by --reward-model, or a judge by --judge-model, or pi_ref by --reference")
    for name in ("sample_tokens", "seed"):
        if getattr(options, name) is not None and not options.samples:
            parser.error(f"--{name.replace('_', '-')} goes with --samples")
    if (options.judge_model is None) != (options.task is None):
        parser.error("--judge-model and --task go together")
    given = [name for name in JUDGES if getattr(options, name) is not None]
    if given and options.judge_model is None:
        typed = next(one.partition("=")[0] for one in written if spelled([one])[0].startswith(f"--{given[0]}"))
        parser.error(f"{typed} goes with --judge-model")
    return options


JUDGES = {
    "base_url": str,
    "temperature": float,
    "max_tokens": int,
    "timeout": float,
    "retries": int,
    "attempts": int,
    "parallel": int,
}
"""Options of `lm.judging.llm.LLMJudge`, which explains them, beside task and model."""


@as_command
def main(arguments: Sequence[str]) -> None:
    """The command."""
    options = said_once(lambda: parse(arguments))
    from lm.judging.llm import LLMJudge
    from lm.judging.scored_sets import score_set

    scoring = Scoring(
        dtype=options.dtype,
        device=options.device,
        batch_tokens=options.batch_tokens,
        max_length=options.max_length,
    )
    drawn = {name: value for name in ("sample_tokens", "seed") if (value := getattr(options, name)) is not None}
    reference = ReferenceScoring(model=options.reference, samples=options.samples, **drawn)
    judge = None
    if options.judge_model is not None:
        given = {name: value for name in JUDGES if (value := getattr(options, name)) is not None}
        given.setdefault("base_url", os.environ.get("OPENAI_BASE_URL"))
        judge = LLMJudge(task=options.task, model=options.judge_model, **given)
    with ranks.together(options.device):
        summary = score_set(
            options.data,
            options.out,
            options.reward_model,
            scoring,
            subset=options.subset,
            judge=judge,
            prompt=options.prompt,
            force=options.force,
            reference=reference,
        )
        report(summary, options.data)
        progress.say(f"written: {options.out}")


def report(summary: Summary, data: str) -> None:
    """Says what was scored, cut and left out."""
    from lm.data.rows import left_out

    print(f"{data}: {summary.pairs:,} pairs")
    for line in (*left_out(summary.left_out, summary.left_out.first), *summary.notes):
        print(f"  {line}")
    if summary.removed:
        print(f"  left out: columns {', '.join(sorted(summary.removed))}, which hold other rewards")
    if summary.replaced:
        print(f"  left out: columns {', '.join(sorted(summary.replaced))} as they were, which are written anew")
    for spec, why in summary.unused.items():
        print(f"  left out: model {spec}, {why}")
    for name, agree in summary.agree.items():
        cut = summary.cut[name]
        print(
            f"  {name}: the chosen completion has the larger reward in {agree / summary.pairs:.1%}, the same in "
            f"{summary.ties[name] / summary.pairs:.1%}"
            + (f"; {cut:,} of {2 * summary.pairs:,} texts were too long and lost their beginning" if cut else "")
        )
    if summary.one or summary.members:
        print(
            f"  the one reward: {summary.one or 'the mean of the members'}; the ensemble: "
            f"{', '.join(summary.members) or 'none'}"
        )
    if summary.reference:
        print(f"  pi_ref: {summary.reference}")


def work(run: Run) -> None:
    """Scores the pairs by pi_ref, and by every reward model that a method distils."""
    from lm.stages.scores import everything

    everything(run)


@as_command
def door(arguments: Sequence[str]) -> int:
    """One or the other."""
    if is_for_any_set(arguments):
        return main(arguments)
    if {"-h", "--help"} & {*arguments}:
        print("For any preference set, with --out:\n")
        parser_of().print_help()
        print("\nFor a run's pairs, without:\n")
    return command("lm.score", work, arguments=arguments)


if __name__ == "__main__":
    sys.exit(door())
