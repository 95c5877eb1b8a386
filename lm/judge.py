"""Win rates between policies' completions, judged by an LLM behind an OpenAI-compatible endpoint or by the oracle.

    python -m lm.judge RUN --task helpfulness --model NAME [--base_url URL]
    python -m lm.judge ONE/samples.jsonl OTHER/samples.jsonl --judge oracle --out FILE

RUN is the output folder of a finished `lm.train` or `lm.evaluate`: each of its methods is judged against pi_ref and
against DPO, as in Table 1 of Fisch et al. 2024. The endpoint is any that speaks the protocol: a hosted one, vLLM,
`transformers serve`. Its key is read from the environment variable OPENAI_API_KEY, and from nowhere else. An LLM sees
every pair in both orders; where its verdicts disagree, the pair is a tie. Every reply is kept in a log, from which a
run that broke goes on without asking again.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.base import progress
from lm.base.command import add_common, add_force, as_command, check_free, epilog
from lm.base.files import expanded
from lm.config import TASKS, EvaluationConfig, check_seed
from lm.judging.llm import LLMJudge, Log, spelled

if TYPE_CHECKING:
    from jsonargparse import Namespace


def table(report: dict[str, Any]) -> Any:
    """Win, tie and loss in percent, with intervals, as a rich table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from lm.judging.matches import BASELINE
    from lm.judging.statistics import SIGNS

    judge = report["judge"]
    by = "the oracle" if judge["kind"] == "oracle" else f"{judge['model']} ({judge['task']})"
    title = f"Judged by {by}, percent, {report['confidence']:.0%} intervals"
    view = Table(title=Text(title), box=box.SIMPLE, padding=0)
    rows = [(name, other, row) for name, others in report["wins"].items() for other, row in others.items()]
    malformed = any(row.get("malformed") for *_, row in rows)
    for heading in ("policy", "against", *SIGNS, "n", *(["malformed"] if malformed else [])):
        named = heading in ("policy", "against")  # which may be long paths
        view.add_column(heading, justify="left" if named else "right", no_wrap=not named, overflow="fold")
    for name, other, row in sorted(rows, key=lambda item: item[1] == BASELINE):
        shares = ["-"] * len(SIGNS)
        if row["n"]:
            shares = [
                f"{100 * row[name]:.1f} [{100 * low:.1f}, {100 * high:.1f}]" for name, (low, high) in row["ci"].items()
            ]
        view.add_row(Text(name), Text(other), *shares, str(row["n"]), *([str(row["malformed"])] if malformed else []))
    return view


# ---------------------------------------------------------------- the command


def parse(arguments: Sequence[str] | None) -> tuple[Namespace, EvaluationConfig, LLMJudge | None]:
    """(options, what is judged and how sure, the LLM or None for the oracle).

    Leaves with status 2 and a message for an option that is unknown, missing, or without effect; raises ValueError
    where its value is out of range.
    """
    from lm.base.options import ConfigHelp, Parser

    parser = Parser(
        prog="python -m lm.judge",
        usage="%(prog)s RUN | SAMPLES SAMPLES [--OPTION VALUE ...]",
        description=(__doc__ or "").replace("\n\n    python", "\n\npython").split("\n\n")[0],
        epilog=epilog(
            "lm.judge",
            (
                "runs/demo --judge oracle",
                "runs/helpfulness --task helpfulness --model gpt-4o-mini",
                "ours/samples.jsonl theirs/samples.jsonl --task summary --model qwen "
                "--base_url http://localhost:8000/v1 --out judge.json",
            ),
        ),
        formatter_class=ConfigHelp,
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="A run's folder, or two samples.jsonl.")
    parser.add_argument("--judge", choices=["llm", "oracle"], default="llm", help="Who judges.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="The report; of a run, judge.json in its folder.")
    parser.add_argument("--log", type=Path, metavar="FILE", help="An LLM's replies; beside the report, as .jsonl.")
    parser.add_argument("--prompts", type=int | None, help="Judge only so many prompts, the first.")
    parser.add_argument("--confidence", type=float, default=0.95, help="Level of the bootstrap intervals.")
    parser.add_argument("--resamples", type=int, default=10_000, help="Bootstrap resamples over prompts.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the bootstrap.")
    add_common(parser)
    add_force(parser)
    parser.add_argument("--task", choices=list(TASKS), help="What an LLM compares.")
    parser.add_argument("--model", "--judge-model", type=str | None, help="An LLM's name at its endpoint.")
    names = parser.add_class_arguments(LLMJudge, skip={"task", "model"})
    parser.check_once(words := spelled(sys.argv[1:] if arguments is None else arguments))
    options = parser.parse_args(words)
    options.sources = [Path(expanded(str(source))) for source in options.sources]
    for name in ("out", "log"):
        if options[name] is not None:
            options[name] = Path(expanded(str(options[name])))
    check_seed(options.seed, "--seed")
    unset = parser.get_defaults()
    given = {name: options[name] for name in (*names, "task", "model") if options[name] != unset[name]}
    if len(options.sources) > 2:
        parser.error(f"one run's folder or two samples.jsonl are compared; got {len(options.sources)} paths")
    if len(options.sources) == 2 and options.out is None:
        parser.error("name the report by --out; only a run's has a place of its own")
    if options.judge == "oracle" and (given or options.log):
        name = next(iter(given), "log")
        parser.error(f"--{name} goes with an LLM as the judge; the oracle's rewards are in the samples")
    if options.judge == "llm" and not {"task", "model"} <= given.keys():
        parser.error("an LLM needs --task and --model; --judge oracle neither")
    given.setdefault("base_url", os.environ.get("OPENAI_BASE_URL"))
    shown = EvaluationConfig(prompts=options.prompts, confidence=options.confidence, resamples=options.resamples)
    return options, shown, LLMJudge(**given) if options.judge == "llm" else None


def _is_report(file: Path) -> bool:
    """Whether this command wrote a file."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        return isinstance(report, dict) and {"judge", "wins"} <= report.keys()
    except (OSError, ValueError):
        return False


@as_command
def main(arguments: Sequence[str]) -> None:
    """The command."""
    options, shown, judge = parse(arguments)
    from rich.console import Console

    from lm.base.store import provenance
    from lm.judging.matches import by_llm, by_oracle, comparisons_of, pair_up, rates
    from theory.records import write_json

    out = options.out or options.sources[0] / "judge.json"
    check_free(
        "--out", out, force=options.force or _is_report(out)
    )  # its own is kept up to date: replies are in the log
    column = "completion" if judge else "oracle_reward"
    if len(options.sources) == 1:
        comparisons = comparisons_of(options.sources[0], shown.prompts, column)
    else:
        one, other = options.sources
        ours, theirs = (path.parent.name if path.name == "samples.jsonl" else str(path) for path in (one, other))
        if ours == theirs:
            ours, theirs = str(one), str(other)
        comparisons = [pair_up(ours, theirs, one, other, shown.prompts, column)]
    if judge:
        with Log(options.log or out.with_suffix(".jsonl")) as log:
            results = by_llm(judge, comparisons, log)
    else:
        results = [(by_oracle(comparison), {}) for comparison in comparisons]
    wins: dict[str, dict[str, Any]] = defaultdict(dict)
    for comparison, (outcomes, counts) in zip(comparisons, results, strict=True):
        wins[comparison.policy][comparison.against] = {**rates(outcomes, shown, options.seed), **counts}
    report = {
        "judge": {"kind": "llm", **asdict(judge)} if judge else {"kind": "oracle"},
        "wins": wins,
        "confidence": shown.confidence,
        "provenance": provenance(options.seed),
    }
    write_json(out, report)
    Console().print(table(report))
    progress.say(f"written: {out}")


if __name__ == "__main__":
    sys.exit(main())
