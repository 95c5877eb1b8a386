"""Tables of docs/real-text.md, from the summary of the studies on real text; see `lm.workflow.tables`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np

from theory import records

Real = dict[str, Any]
"""real_text.json, as `lm.workflow.summary.with_study` makes it."""
CLASSES = ("all", "longer", "shorter")
"""Pairs by which completion is preferred."""
table = partial(records.table, padded=False)


def _over(values: Iterable[float | None], form: str = ".2f") -> str:
    """The mean over seeds, and after it the least and the greatest where these are written otherwise."""
    kept = [value for value in values if value is not None]
    if not kept:
        return "-"
    mean, least, greatest = (format(of(kept), form) for of in (np.mean, min, max))
    return mean if least == greatest else f"{mean} ({least} to {greatest})"


def _accuracies(found: Iterable[dict[str, Any]]) -> list[str]:
    """By length class, a column each."""
    seeds = list(found)
    return [_over((one[of]["accuracy"] for one in seeds), ".3f") for of in CLASSES]


def _cells(study: dict[str, Any]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Of each rho and method: how the rho is called, the method, its cells, one a seed."""
    for rho in study["rhos"]:
        for method in study["methods"]:
            cells = [cell for cell in study["cells"] if (cell["rho"], cell["method"]) == (rho, method)]
            yield "null" if rho is None else f"{rho:g}", method, cells


def _named(study: str, rho: str) -> str:
    return study if rho == "null" else f"{study}, rho {rho}"


def evaluations(real: Real) -> str:
    """Every method on test prompts: advantage, its interval over the prompts of all seeds, and what came with it."""
    rows = []
    for name, study in real["studies"].items():
        bases = study["sft"].values()
        about = [_over((base[key] for base in bases), form) for key, form in (("length", ".1f"), ("finished", ".2f"))]
        rows.append([name, "pi_ref", f"{len(study['seeds'])}", "0", *about, "0"])
        for rho, method, cells in _cells(study):
            advantage = study["advantages"][rho][method]
            rows.append(
                [
                    _named(name, rho),
                    method,
                    f"{len(cells)}",
                    records.estimate(advantage["advantage"], advantage["ci"], "+.3f"),
                    _over((cell["test"]["length"] for cell in cells), ".1f"),
                    _over(cell["test"]["finished"] for cell in cells),
                    _over((cell["test"]["kl"] for cell in cells), ".1f"),
                ]
            )
    return table(["study", "method", "seeds", "advantage", "tokens", "finished", "KL to pi_ref"], rows)


def accuracy(real: Real) -> str:
    """Share of test pairs ordered as labelled: by the reward models, and by the policies' implicit rewards."""
    rows = []
    for name, study in real["studies"].items():
        models = study["reward_models"]
        for rho in study["rhos"]:
            of_rho = [model for model in models if model["rho"] == rho]
            for own in dict.fromkeys(model["name"] for model in of_rho):
                tested = [m["test_accuracy"] for m in of_rho if m["name"] == own and m.get("test_accuracy")]
                called = _named(name, "null" if rho is None else f"{rho:g}")
                rows.append([called, f"{len(tested)}", f"reward model {own}", *_accuracies(tested)])
        for rho, method, cells in _cells(study):
            found = _accuracies(cell["test"]["accuracies"] for cell in cells)
            rows.append([_named(name, rho), f"{len(cells)}", method, *found])
    return table(["study", "seeds", "by", "all pairs", "longer preferred", "shorter preferred"], rows)


PROBED = {
    "winners, train": "train_chosen_logratio",
    "losers, train": "train_rejected_logratio",
    "winners, held out": "chosen_logratio",
    "losers, held out": "rejected_logratio",
    "KL, samples of pi_ref": "forward_kl_reference",
    "KL, preferences": "forward_kl_preferences",
}
"""Columns -> what the probe of the last step has of them."""


def last_probe(real: Real) -> str:
    """At the last step: log-ratios to pi_ref of winners and losers, and KL(pi_ref || pi) both ways, nats."""
    rows = []
    for name, study in real["studies"].items():
        for rho, method, cells in _cells(study):
            seeds = real["presets"][_named(name, rho)]["seeds"]
            probes = [seeds[f"{cell['seed']}"]["methods"][method]["probe"][-1] for cell in cells]
            values = [_over((probe.get(key) for probe in probes), ".1f") for key in PROBED.values()]
            rows.append([_named(name, rho), f"{len(cells)}", method, *values])
    return table(["study", "seeds", "method", *PROBED], rows)


MATCHED = {
    "step": ("step", ".0f"),
    "accuracy": ("accuracy", ".3f"),
    "winners, held out": ("chosen_logratio", ".1f"),
    "losers, held out": ("rejected_logratio", ".1f"),
    "KL, samples of pi_ref": ("forward_kl_reference", ".1f"),
    "KL, preferences": ("forward_kl_preferences", ".1f"),
}
"""Columns -> what a probe that is matched by accuracy has of them, and how it is written."""


def matched(real: Real) -> str:
    """Each method where it last orders the probe's held-out pairs at least as well as DPO does after its last step, in
    those seeds in which there is such a step. Studies without DPO are not there."""
    rows = []
    for name, study in real["studies"].items():
        for rho, method, _ in _cells(study) if "dpo" in study["methods"] else ():
            seeds = [one["methods"] for one in real["presets"][_named(name, rho)]["seeds"].values()]
            found = [_as_accurate(of[method]["probe"], of["dpo"]["probe"][-1]["accuracy"]) for of in seeds]
            probes = [probe for probe in found if probe is not None]
            values = [_over((probe[key] for probe in probes), form) for key, form in MATCHED.values()]
            rows.append([_named(name, rho), f"{len(probes)} of {len(seeds)}", method, *values])
    return table(["study", "seeds", "method", *MATCHED], rows)


def _as_accurate(probes: list[dict[str, Any]], accuracy: float) -> dict[str, Any] | None:
    """The last one that is, but for that before training; None where none is."""
    return next((probe for probe in reversed(probes[1:]) if probe["accuracy"] >= accuracy), None)


COMPARED = {"chosen_logratio": "+.2f", "rejected_logratio": "+.2f", "accuracy": "+.3f", "advantage": "+.3f"}
"""What a method is compared with DPO in, and how it is written."""


def less_dpo(real: Real) -> str:
    """Each method less DPO on all test pairs and prompts, with its interval over those of all seeds that have pairs in
    their records, and the difference of each seed. Studies without DPO, or without such a seed, are not there."""
    rows = []
    for name, study in real["studies"].items():
        less = study.get("less_dpo") or {"seeds": [], "rhos": {}}
        for rho, of_methods in less["rhos"].items():
            for method, found in of_methods.items():
                cells = [_estimate(found[key], form) for key, form in COMPARED.items()]
                rows.append([_named(name, rho), ", ".join(map(str, less["seeds"])), method, *cells])
    return table(["study", "seeds", "method less DPO", "winners, nats", "losers, nats", "accuracy", "advantage"], rows)


def _estimate(found: dict[str, Any], form: str) -> str:
    """With its interval, and the seeds' own where there are several."""
    seeds = ", ".join(format(value, form) for value in found["by_seed"])
    return records.estimate(found["mean"], found["ci"], form) + (f" ({seeds})" if len(found["by_seed"]) > 1 else "")


def spent(real: Real) -> str:
    """What each stage took over all seeds, and its largest peak of memory."""
    rows = [
        [
            name,
            one["stage"],
            f"{one['artifacts']}",
            f"{60 * one['wall_hours']:.1f}",
            f"{60 * one['cpu_hours']:.1f}",
            f"{one['peak_bytes'] / 1e9:.1f}",
        ]
        for name, study in real["studies"].items()
        for one in study["stages"]
    ]
    return table(["study", "stage", "times", "wall, minutes", "CPU, minutes", "peak memory, GB"], rows)


TABLES: dict[str, Callable[[Real], str]] = {
    "real-evaluations": evaluations,
    "real-accuracy": accuracy,
    "real-probe": last_probe,
    "real-matched": matched,
    "real-less-dpo": less_dpo,
    "real-spent": spent,
}
