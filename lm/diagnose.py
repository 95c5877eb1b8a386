"""Says, before anything is trained, what DPO will do on a preference set, and what is odd about the set."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args

from lm.base import progress
from lm.base.command import add_data, add_force, argument_parser, as_command, check_free, path, place
from lm.config import KINDS, ControlTokens, DataConfig

# ---------------------------------------------------------------- the command


@as_command
def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argument_parser(
        "lm.diagnose",
        __doc__,
        "pairs.jsonl.gz",
        "pairs.jsonl.gz --json report.json --tokenizer gpt2",
        "pairs.jsonl.gz --reward-error 0.3 1.5 --model runs/own/sft/NAME",
    )
    add_data(parser, "data", metavar="DATA")
    parser.add_argument("--json", type=path, metavar="FILE", help="also write the report as JSON")
    add_force(parser)
    parser.add_argument("--kind", choices=["auto", *KINDS], default="auto", help="schema; default: by the columns")
    parser.add_argument("--subset", metavar="NAME", help="folder of a hub dataset")
    parser.add_argument(
        "--tokenizer", type=place, metavar="MODEL", help="measure lengths in this model's tokens, and check limits"
    )
    parser.add_argument(
        "--control-tokens",
        choices=get_args(ControlTokens),
        help="what names of the tokenizer's control tokens in texts are, as data.control_tokens of a run",
    )
    for what in ("prompt", "completion"):
        help_text = "limit in tokens; default: as a run takes it from the data, so that 99%% of the rows are within"
        parser.add_argument(f"--max-{what}-length", type=_positive, metavar="N", help=help_text)
    parser.add_argument(
        "--reward-error",
        nargs=2,
        type=float,
        metavar=("BIAS", "VARIANCE"),
        help="of a reward model's margins, in log-odds and log-odds squared: where does it teach better than labels?",
    )
    parser.add_argument(
        "--model",
        type=place,
        metavar="MODEL",
        help="the causal LM that is to be pi_ref, hub name or folder: which winners fall at the first step?",
    )
    parser.add_argument(
        "--model-pairs", type=_positive, metavar="N", help="pairs to measure it on, drawn from the set; default 500"
    )
    options = parser.parse_args(arguments)
    limits = {name: getattr(options, name) for name in ("max_prompt_length", "max_completion_length")}
    if options.tokenizer is None and options.model is None and any(limits.values()):
        parser.error("--max-prompt-length and --max-completion-length are in tokens: name a --tokenizer or a --model")
    if options.tokenizer is None and options.model is None and options.control_tokens is not None:
        parser.error("--control-tokens are those of a --tokenizer or a --model: name one")
    if options.model is None and options.model_pairs:
        parser.error("--model-pairs are of a --model: name it")
    if options.reward_error:
        bias, variance = options.reward_error
        if not (math.isfinite(bias) and math.isfinite(variance) and variance >= 0):
            parser.error(
                f"--reward-error needs a finite bias and a finite variance >= 0, got {bias:g} and {variance:g}"
            )
    if options.json:
        check_free("--json", options.json, force=options.force)
    elif options.force:
        parser.error("--force goes with --json")
    from rich.console import Console
    from rich.text import Text

    from lm.data.places import check
    from lm.studies.diagnosis import MODEL_PAIRS, measure, names_of, read, renderer_of, show
    from theory.records import write_json

    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing forks here
    with Console(stderr=True, quiet=progress.is_quiet()).status(Text(f"reading {options.data}")):
        check(options.data)
        render = renderer_of(options.model, options.tokenizer)
        names = names_of(options.model, options.tokenizer, options.control_tokens or DataConfig.control_tokens)
        comparisons = read(
            options.data,
            kind=options.kind,
            subset=options.subset,
            render=render,
            prompt=options.prompt,
            names=names,
        )
        report = measure(
            comparisons,
            options.data,
            tokenizer=options.tokenizer,
            reward_error=options.reward_error,
            model=options.model,
            model_pairs=options.model_pairs or MODEL_PAIRS,
            **limits,
        )
    if options.json:
        write_json(options.json, asdict(report))
    show(report, Console())


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a whole number above 0 is needed, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
