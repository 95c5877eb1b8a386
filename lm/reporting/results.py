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

from figures.record import MethodResult, PolicyResult, Results, of
from lm.base import progress, ranks
from lm.base.files import read_jsonl
from lm.base.store import Artifact, provenance
from lm.config import SFT
from lm.judging.statistics import SIGNS, bootstrap_interval, wald, win_rates
from lm.objectives import looks
from lm.reporting.cautions import cautions
from lm.stages.data import data
from lm.stages.evaluations import check_prompts, choose, evaluation, pair_logratios, probe_history
from lm.stages.labels import check_judge, judge_described, labels, oracle_held_out
from lm.stages.rewards import asked, reward_held_out
from lm.stages.room import check_room
from lm.stages.run import Run
from lm.stages.subsets import bias
from lm.stages.trainings import sft
from lm.stages.yardstick import best_of_n
from theory.records import write_json


def results(run: Run) -> Results:
    """The record of a run: every configured method against pi_ref. Makes what is missing of the run.

    Raises:
        ValueError: there is nobody to judge, or a split has fewer prompts than are to be sampled from.
        Refused: the disk has no room for what is missing.
    """
    check_judge(run)
    check_room(run)
    check_prompts(run)
    reference, methods, rewards = evaluation(run, SFT), {}, {}
    base = _column(reference, "oracle_reward")
    for name in run.config.methods:
        rewards[name] = _column(evaluation(run, name), "oracle_reward")
        chosen, artifact = choose(run, name), evaluation(run, name)
        methods[name] = {
            **_advantage(run, rewards[name] - base),
            **artifact.metrics,
            **_utility(run, artifact, reference),
            "policy": str(chosen.model),
            "samples": _samples(run, artifact),
            "setting": asdict(chosen.method),
            "step": chosen.step,
            "pairs_seen": chosen.step * run.config.policy.batch_size,
            "validation": chosen.tried,
            "probe": probe_history(run, chosen.policy),
        }
    sets = dict(bias(run).metrics)
    return of(
        Results,
        {
            "methods": methods,
            "sft": {**reference.metrics, "policy": str(sft(run).path), "samples": _samples(run, reference)},
            "wald": {f"{a} - {b}": wald(rewards[a] - rewards[b]) for a, b in combinations(rewards, 2)},
            "wins": {name: {SFT: win_rates(own, base)} for name, own in rewards.items()},
            "best_of_n": best_of_n(run),
            "reward_models": {name: reward_held_out(run, name) for name in asked(run)},
            "oracle": oracle_held_out(run),
            "judge": judge_described(run),
            "labels": labels(run).metrics,
            "selection": sets.pop("selection", None),
            "bias": sets,
            "data": {name: value for name, value in data(run).metrics.items() if name != "labels"},  # prepare says them
            "rho": run.config.bias.rho,
            "confidence": run.config.evaluation.confidence,
            "looks": looks(run.config.methods),
            "stages": run.store.costs(),
            "provenance": provenance(run.config.seed),
        },
    )


def _advantage(run: Run, differences: np.ndarray) -> dict[str, Any]:
    """Over pi_ref, of oracle rewards' differences [N], with its interval."""
    shown = run.config.evaluation
    interval = bootstrap_interval(differences, shown.confidence, shown.resamples, run.seed("bootstrap"))
    return {"advantage": float(differences.mean()), "ci": interval}


def _utility(run: Run, policy: Artifact, reference: Artifact) -> dict[str, Any]:
    """The interval of true utility over that of pi_ref, where the truth is known."""
    if "utility" not in reference.metrics:
        return {}
    return {"utility_ci": _advantage(run, _column(policy, "utility") - _column(reference, "utility"))["ci"]}


def _samples(run: Run, artifact: Artifact) -> str:
    """Where an evaluation's samples lie in the run's folder, which may be copied elsewhere: `lm.judge` reads them."""
    return str((artifact.path / "samples.jsonl").relative_to(run.store.root))


def cell(run: Run, name: str) -> dict[str, Any]:
    """One method of one run, for a grid: `chosen` (setting, step), `test` (metrics, advantage and interval),
    `validation`, `probe`, `rewards`: the oracle's of each test prompt, of the policy and of pi_ref, and `pairs`: the
    log-ratios of each test pair, None where an earlier version made the evaluation."""
    check_room(run)
    rewards, base = (_column(evaluation(run, policy), "oracle_reward") for policy in (name, SFT))
    chosen = choose(run, name)
    return {
        "seed": run.config.seed,
        "rho": run.config.bias.rho,
        "method": name,
        "chosen": {"setting": asdict(chosen.method), "step": chosen.step},
        "test": {**_advantage(run, rewards - base), **evaluation(run, name).metrics},
        "validation": chosen.tried,
        "probe": probe_history(run, chosen.policy),
        "rewards": {name: rewards.tolist(), SFT: base.tolist()},
        "pairs": pair_logratios(run, name),
    }


def _column(artifact: Artifact, name: str) -> np.ndarray:
    return np.array([row[name] for _, row in read_jsonl(artifact.path / "samples.jsonl")])


def table(found: Results) -> Table:
    """The results as a rich table."""
    percent = f"{found.confidence:.0%}"
    truth = found.sft.utility is not None
    rho = "unbiased pairs" if found.rho is None else f"rho = {found.rho:g}"
    # Narrow enough for 80 columns, where a terminal or a log file would otherwise lose digits.
    title = f"Oracle advantage over SFT on {found.sft.n} test prompts ({rho})"
    view = Table(title=title, box=box.SIMPLE, padding=0)
    headings = [
        "method",
        "advantage",
        f"{percent}\ninterval",
        "length",
        "ended",
        "KL\nto ref",
        "Δlogp\nwinners",
        "Δlogp\nlosers",
    ]
    for heading in [*headings, *(["utility"] if truth else [])]:
        view.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    rows: dict[str, PolicyResult] = {SFT: found.sft, **found.methods}
    for name, row in rows.items():
        cells = ["", ""]
        if isinstance(row, MethodResult):
            cells = [f"{row.advantage:+.3f}", "[{:+.3f}, {:+.3f}]".format(*row.ci)]
        cells += [f"{row.length:.2f}", f"{row.finished:.1%}", f"{row.kl:.2f}"]
        cells += [f"{row.chosen_logratio:+.2f}", f"{row.rejected_logratio:+.2f}"]
        view.add_row(name, *cells, *([f"{row.utility:.3f}"] if truth else []))
    return view


def comparisons(found: Results) -> Table:
    """Win rates against pi_ref by oracle reward, and p-values of Wald tests between the methods, as a rich table."""
    title = "Wins against SFT, ties, losses (%); p of a difference in advantage"
    view = Table(title=title, box=box.SIMPLE, padding=0)
    names = list(found.methods)
    for heading in ("method", *SIGNS, *names[:-1]):
        view.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for index, name in enumerate(names):
        won = found.wins[name][SFT]
        shares = [f"{100 * share:.0f}" for share in (won.win, won.tie, won.loss)]
        tests = [found.wald[f"{other} - {name}"].p for other in names[:index]]
        view.add_row(name, *shares, *("-" if p is None else f"{p:.3f}" if p >= 0.001 else "<.001" for p in tests))
    return view


def report(run: Run) -> None:
    """Writes results.json, results.png and report.html, and prints the table, and after it what to know before it is
    believed, a line each."""
    found = results(run)
    if not ranks.is_first():
        return
    folder = write(run, found)
    Console().print(table(found), comparisons(found))
    if found.judge is not None:
        print(found.judge.says)
    for caution in cautions(found):
        print(f"warning: {caution.line}")
    progress.say(f"written: {', '.join(str(folder / name) for name in OUTPUTS)}")


def write(run: Run, found: Results) -> Path:
    """Writes results.json, results.png and report.html into the run's folder, which it returns, and tells the run's
    trackers. On the first rank."""
    from figures.captions import write_inside
    from figures.paths import write_atomically
    from figures.run_frontier import caption, draw
    from figures.style import style
    from lm.reporting.page import write_report
    from lm.reporting.tracked import tell

    folder = Path(run.config.output_dir)
    write_json(folder / "results.json", found.as_json())
    with style():
        picture = draw(found)
        write_inside(picture, caption(found))  # nothing stands beside it
        write_atomically(folder / "results.png", picture.savefig)
    write_report(folder)
    tell(run, found, folder / "results.png")
    return folder


OUTPUTS = ("results.json", "results.png", "report.html")
