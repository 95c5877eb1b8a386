"""One job of the grid: makes what is still missing of its artifacts, and writes a record of them as JSON.

A record has everything that the summary reads, so that no artifact is opened twice.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lm import evaluate, ranks
from lm.artifacts import provenance
from lm.cli import Help, epilog, run
from lm.io import write_json
from lm.pipeline import MAIN, Pipeline

Record = dict[str, Any]


def base(pipeline: Pipeline) -> Record:
    """What all cells of a seed share: data, pi_ref and its evaluations, the oracle, labels."""
    evaluate.validation(pipeline, evaluate.SFT, pipeline.sft)  # here, as no two jobs may make one artifact
    return {
        "seed": pipeline.config.seed,
        "sft": evaluate.evaluation(pipeline, evaluate.SFT).metrics,
        "oracle": None if pipeline.config.oracle_model else pipeline.oracle.metrics["accuracy"],
        "labels": pipeline.labels.metrics,
        "data": pipeline.data.metrics,
    }


def scores(pipeline: Pipeline) -> Record:
    """What all cells of a seed and a rho share: D_rho, the reward models, scores."""
    _ = pipeline.scores
    return {
        "seed": pipeline.config.seed,
        "rho": pipeline.config.bias.rho,
        "reward_models": {
            name: {"accuracy": pipeline.reward_accuracy(name), **pipeline.bias.metrics[name]}
            for name in (MAIN, *pipeline.members)
        },
    }


def cell(pipeline: Pipeline) -> Record:
    """One method: trained in each of its settings, chosen on validation prompts, evaluated on test prompts."""
    return evaluate.cell(pipeline, _method(pipeline))


def constant_alpha(pipeline: Pipeline, like: Record, alpha: float) -> Record:
    """The method of another cell in the setting chosen there, but with a constant weight of the KL term.

    Args:
        pipeline: the other cell's options.
        like: the other cell's record.
        alpha: weight of the KL term throughout training, >= 0.

    Raises:
        ValueError: the other cell is of another method, seed or rho, or its method has no KL term.
    """
    name, config = _method(pipeline), pipeline.config
    here, there = (name, config.seed, config.bias.rho), (like["method"], like["seed"], like["rho"])
    if here != there:
        raise ValueError(f"--like is a cell of {there} (method, seed, rho), but the options ask for {here}")
    chosen = like["chosen"]["setting"]
    if "kl" not in chosen:
        raise ValueError(f"--constant goes with a method that has a KL term, which {name} has not")
    setting = {**chosen, "kl": {**chosen["kl"], "alpha_start": alpha, "alpha_end": alpha}}
    same = Pipeline(replace(config, sweep={name: [setting]}))
    return {**evaluate.cell(same, name), "alpha": alpha}


def _method(pipeline: Pipeline) -> str:
    names = pipeline.config.methods
    if len(names) != 1:
        raise ValueError(f"methods must name the cell's one method, got {names}")
    return names[0]


JOBS: dict[str, Callable[[Pipeline], Record]] = {"base": base, "scores": scores, "cell": cell}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status, 2 for a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m lm.workflow.job",
        usage="%(prog)s {base,scores,cell,alpha} --out FILE [--like FILE --constant ALPHA] [OPTION OF lm.train ...]",
        description=__doc__,
        epilog="All options of `python -m lm.train` may follow; it explains them with --help.\n\n"
        + epilog("lm.workflow.job", ("cell --out cell.json --seed 1 --bias.rho 0.2 --methods '[e-dpo]'",)),
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.add_argument("job", choices=[*JOBS, "alpha"], help="which part of the grid")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the record goes")
    parser.add_argument(
        "--like", type=Path, metavar="FILE", help="record of the cell whose setting is taken; alpha only"
    )
    parser.add_argument("--constant", type=float, metavar="ALPHA", help="weight of the KL term; alpha only")
    ours, options = parser.parse_known_args(arguments)
    if {ours.like is not None, ours.constant is not None} != {ours.job == "alpha"}:
        parser.error("--like and --constant go with alpha, and alpha with both")

    def record(pipeline: Pipeline) -> None:
        if ours.job == "alpha":
            like = json.loads(ours.like.read_text(encoding="utf-8"))
            made = constant_alpha(pipeline, like, ours.constant)
        else:
            made = JOBS[ours.job](pipeline)
        if not ranks.is_first():
            return
        config = pipeline.config
        whole = {"job": ours.job, **made, "config": asdict(config), "provenance": provenance(config.seed)}
        write_json(ours.out, whole)

    return run("lm.workflow.job", record, shared=True, arguments=options)


if __name__ == "__main__":
    sys.exit(main())
