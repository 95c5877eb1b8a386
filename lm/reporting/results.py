"""A run's results: the table of every method against pi_ref, as results.json has it."""

from __future__ import annotations

from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from lm.base import progress, ranks
from lm.base.files import read_jsonl, write_json
from lm.base.store import Artifact, provenance
from lm.config import SFT
from lm.judging.statistics import SIGNS, bootstrap_interval, wald, win_rates
from lm.stages.data import data
from lm.stages.evaluations import choose, evaluation, probe_history
from lm.stages.labels import check_judge, labels, oracle_accuracy
from lm.stages.rewards import asked, reward_accuracy
from lm.stages.run import Run
from lm.stages.trainings import sft
from lm.stages.subsets import bias


def results(run: Run) -> dict[str, Any]:
    """The table of every configured method against pi_ref, as `results.json` has it."""
    check_judge(run)
    config, reference = run.config.evaluation, evaluation(run, SFT)
    base = _column(reference, "oracle_reward")
    methods, rewards = {}, {}
    for name in run.config.methods:
        rewards[name] = _column(evaluation(run, name), "oracle_reward")
        methods[name] = _row(run, name, rewards[name] - base)
    return {
        "methods": methods,
        "sft": {**reference.metrics, "policy": str(sft(run).path), "samples": _samples(run, reference)},
        "wald": {f"{one} - {other}": wald(rewards[one] - rewards[other]) for one, other in combinations(rewards, 2)},
        "wins": {name: {SFT: win_rates(own, base)} for name, own in rewards.items()},
        "reward_models": {name: reward_accuracy(run, name) for name in asked(run)},
        "oracle": oracle_accuracy(run),
        "labels": labels(run).metrics,
        "bias": bias(run).metrics,
        "data": data(run).metrics,
        "rho": run.config.bias.rho,
        "confidence": config.confidence,
        "provenance": provenance(run.config.seed),
    }


def _row(run: Run, name: str, differences: np.ndarray) -> dict[str, Any]:
    """What results.json says of one method."""
    config, chosen, artifact = run.config.evaluation, choose(run, name), evaluation(run, name)
    return {
        "advantage": float(differences.mean()),
        "ci": bootstrap_interval(differences, config.confidence, config.resamples, run.seed("bootstrap")),
        **artifact.metrics,
        "policy": str(chosen.model),
        "samples": _samples(run, artifact),
        "setting": asdict(chosen.method),
        "step": chosen.step,
        "validation": chosen.tried,
        "probe": probe_history(run, chosen.policy),
    }


def _samples(run: Run, artifact: Artifact) -> str:
    """Where an evaluation's samples lie in the run's folder, which may be copied elsewhere: `lm.judge` reads them."""
    return str((artifact.path / "samples.jsonl").relative_to(run.store.root))


def cell(run: Run, name: str) -> dict[str, Any]:
    """One method of one run, for a grid: `chosen` (setting, step), `test` (metrics, advantage and interval),
    `validation`, `probe`, and `rewards`: the oracle's of each test prompt, of the policy and of pi_ref."""
    rewards, base = (_column(evaluation(run, policy), "oracle_reward") for policy in (name, SFT))
    row = _row(run, name, rewards - base)
    apart = ("policy", "samples", "setting", "step", "validation", "probe")
    return {
        "seed": run.config.seed,
        "rho": run.config.bias.rho,
        "method": name,
        "chosen": {"setting": row["setting"], "step": row["step"]},
        "test": {key: value for key, value in row.items() if key not in apart},
        "validation": row["validation"],
        "probe": row["probe"],
        "rewards": {name: rewards.tolist(), SFT: base.tolist()},
    }


def _column(artifact: Artifact, name: str) -> np.ndarray:
    return np.array([row[name] for _, row in read_jsonl(artifact.path / "samples.jsonl")])


def table(report: dict[str, Any]) -> Table:
    """The results as a rich table."""
    percent = f"{report['confidence']:.0%}"
    truth = "utility" in report["sft"]
    rho = "unbiased pairs" if report["rho"] is None else f"rho = {report['rho']:g}"
    # Narrow enough for 80 columns, where a terminal or a log file would otherwise lose digits.
    title = f"Oracle advantage over SFT on {report['sft']['n']} test prompts ({rho})"
    view = Table(title=title, box=box.SIMPLE, padding=0)
    headings = [
        "method",
        "advantage",
        f"{percent}\ninterval",
        "length",
        "KL\nto ref",
        "Δlogp\nwinners",
        "Δlogp\nlosers",
    ]
    for heading in [*headings, *(["utility"] if truth else [])]:
        view.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for name, row in [(SFT, report["sft"]), *report["methods"].items()]:
        cells = ["", ""] if name == SFT else [f"{row['advantage']:+.3f}", "[{:+.3f}, {:+.3f}]".format(*row["ci"])]
        cells += [f"{row['length']:.2f}", f"{row['kl']:.2f}"]
        cells += [f"{row['chosen_logratio']:+.2f}", f"{row['rejected_logratio']:+.2f}"]
        view.add_row(name, *cells, *([f"{row['utility']:.3f}"] if truth else []))
    return view


def comparisons(report: dict[str, Any]) -> Table:
    """Win rates against pi_ref by oracle reward, and p-values of Wald tests between the methods, as a rich table."""
    title = "Wins against SFT, ties, losses (%); p of a difference in advantage"
    view = Table(title=title, box=box.SIMPLE, padding=0)
    names = list(report["methods"])
    for heading in ("method", *SIGNS, *names[:-1]):
        view.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for index, name in enumerate(names):
        shares = [f"{100 * report['wins'][name][SFT][outcome]:.0f}" for outcome in SIGNS]
        tests = [report["wald"][f"{other} - {name}"]["p"] for other in names[:index]]
        view.add_row(name, *shares, *("-" if p is None else f"{p:.3f}" if p >= 0.001 else "<.001" for p in tests))
    return view


def report(run: Run) -> None:
    """Writes results.json, results.png and report.html, and prints the table."""
    from figures.methods import draw
    from figures.paths import write_atomically
    from figures.style import style
    from lm.reporting.page import write_report

    values = results(run)
    if not ranks.is_first():
        return
    folder = Path(run.config.output_dir)
    write_json(folder / "results.json", values)
    with style():
        write_atomically(folder / "results.png", draw(values).savefig)
    Console().print(table(values), comparisons(values))
    write_report(folder)
    progress.say(f"written: {', '.join(str(folder / name) for name in OUTPUTS)}")


OUTPUTS = ("results.json", "results.png", "report.html")
