"""Will this model work here, exactly? Says so before a night is spent on it, with what to do where it does not."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lm.base import progress
from lm.base.command import add_force, argument_parser, as_command, check_free
from theory.shell import output_file


@as_command
def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argument_parser(
        "lm.check",
        "Opens a model as a training would and checks it: weights, tokenizer, causality, the route of its log-probs "
        "and their difference from transformers' plain forward, gradients, samples, end-of-text, reward heads, "
        "adapters. Where memory does not allow for it, a small copy of its config is checked. Status 1 where something "
        "does not hold.",
        "scratch:tiny",
        "Qwen/Qwen2.5-0.5B-Instruct --json check.json",
        "runs/own/reward/rho --reward-model",
        "--architectures --markdown docs/models.md",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="hub name, local folder, .gguf file, or scratch:tiny")
    parser.add_argument("--reward-model", action="store_true", help="it is to judge: check its head, and its rewards")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write what was found as JSON")
    parser.add_argument("--tokens", type=int, metavar="N", help="of the longest row tried; 64, or beyond its window")
    parser.add_argument("--small", action="store_true", help="a small copy of its config, though the whole would fit")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto", help="default: %(default)s")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the model run its own code")
    parser.add_argument(
        "--architectures", action="store_true", help="instead of a model: all of transformers', small, as a table"
    )
    parser.add_argument("--markdown", type=output_file, metavar="FILE", help="put it between the marks of this file")
    add_force(parser)
    options = parser.parse_args(arguments)
    if (options.model is None) is not options.architectures:
        parser.error(
            "name a MODEL, or --architectures"
            if options.model is None
            else f"--architectures tries all of transformers' and not {options.model!r}; leave one of the two out"
        )
    if options.markdown and not options.architectures:
        parser.error("--markdown is for --architectures")
    if options.tokens is not None and options.tokens < 8:
        parser.error(f"--tokens must be at least 8, got {options.tokens}")
    if options.json:
        check_free("--json", options.json, force=options.force)
    from rich.console import Console

    from theory.records import write_json

    if options.architectures:
        from lm.studies.survey import survey

        return survey(options.markdown, options.json)
    from lm.models.gguf import as_folder
    from lm.studies.model_check import examine, show

    model = as_folder(options.model)
    with Console(stderr=True, quiet=progress.is_quiet()).status(f"checking {options.model}"):
        report = examine(
            model,
            reward_model=options.reward_model,
            tokens=options.tokens,
            copy=options.small,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )
    if options.json:
        write_json(options.json, report.as_dict())
    show(report, Console())
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
