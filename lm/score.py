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
from pathlib import Path
from typing import TYPE_CHECKING

from lm.base import progress, ranks
from lm.base.command import add_data, argument_parser, as_command, said_once
from lm.config import DTYPES, TASKS, Scoring
from lm.stages.run import Run, command

if TYPE_CHECKING:
    from lm.judging.scored_sets import Summary


def is_for_any_set(arguments: Sequence[str]) -> bool:
    """Which of the two commands it is: only this one has a reward model or a judge, or a file to write."""
    return bool({"--reward-model", "--judge-model", "--out"} & {argument.split("=")[0] for argument in arguments})


# ---------------------------------------------------------------- the command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. Leaves with status 2 and a message for one that is unknown, missing, or without effect."""
    parser = argument_parser(
        "lm.score",
        __doc__,
        "--data pairs.jsonl --reward-model Skywork/Skywork-Reward-V2-Qwen3-0.6B --out scored.jsonl",
        "--data pairs.jsonl --reward-model runs/own/reward/* --out scored.parquet",
        "--data pairs.jsonl --judge-model NAME --task helpfulness --endpoint http://localhost:8000/v1 --out s.jsonl",
    )
    add_data(parser, "--data", required=True)
    parser.add_argument("--subset", metavar="NAME", help="folder of a hub dataset")
    parser.add_argument(
        "--reward-model",
        action="extend",
        nargs="+",
        default=[],
        metavar="A",
        help="hub name or folder; several, or the option again, for an ensemble",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".jsonl, .jsonl.gz or .parquet")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the parameters; by default as saved")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="default: the accelerator, if any")
    parser.add_argument("--batch-tokens", type=int, default=Scoring.batch_tokens, help="default: %(default)s")
    parser.add_argument("--max-length", type=int, metavar="N", help="longest text, tokens; the model's own by default")
    parser.add_argument(
        "--judge-model", metavar="NAME", help="an LLM at an OpenAI-compatible endpoint, the last member"
    )
    parser.add_argument("--endpoint", metavar="URL", help="its base URL, usually ending in /v1; default: OpenAI's")
    parser.add_argument("--task", choices=TASKS, help="what the judge compares")
    options = parser.parse_args(arguments)
    if not options.reward_model and options.judge_model is None:
        parser.error("name one or more models by --reward-model, or a judge by --judge-model")
    if (options.judge_model is None) != (options.task is None):
        parser.error("--judge-model and --task go together")
    if options.endpoint is not None and options.judge_model is None:
        parser.error("--endpoint goes with --judge-model")
    return options


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
    judge = None
    if options.judge_model is not None:
        url = options.endpoint or os.environ.get("OPENAI_BASE_URL")
        judge = LLMJudge(task=options.task, model=options.judge_model, base_url=url)
    with ranks.together(options.device):
        summary = score_set(
            options.data,
            options.out,
            options.reward_model,
            scoring,
            subset=options.subset,
            judge=judge,
            prompt=options.prompt,
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
    for spec, why in summary.unused.items():
        print(f"  left out: model {spec}, {why}")
    for name, agree in summary.agree.items():
        cut = summary.cut[name]
        print(
            f"  {name}: the chosen completion has the larger reward in {agree / summary.pairs:.1%}, the same in "
            f"{summary.ties[name] / summary.pairs:.1%}"
            + (f"; {cut:,} of {2 * summary.pairs:,} texts were too long and lost their beginning" if cut else "")
        )
    print(
        f"  the one reward: {summary.one or 'the mean of the members'}; the ensemble: "
        f"{', '.join(summary.members) or 'none'}"
    )


def work(run: Run) -> None:
    """Scores the pairs by pi_ref, and by every reward model that a method distils."""
    from lm.stages.scores import everything

    everything(run)


if __name__ == "__main__":
    if is_for_any_set(sys.argv[1:]):
        sys.exit(main())
    sys.exit(command("lm.score", work))
