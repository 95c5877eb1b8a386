"""The record of a run of which every number is made up, and no two of one kind alike, for tests that read one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import combinations
from typing import Any

from figures.record import VERSION
from lm.objectives import Method, looks


def recorded(methods: Mapping[str, Method], text: str = "plain words") -> dict[str, Any]:
    """results.json as a run of these methods leaves it; every text that comes from the data is `text`.

    Members are b0.2 and b0.8; the policies are in policy/NAME-abc, that of the first method in a snapshot of step 2,
    the samples in evaluate/NAME-abc.
    """
    accuracy: dict[str, Any] = {
        kind: {"accuracy": 0.25 + len(kind) / 100, "pairs": 7} for kind in ("all", "longer", "shorter")
    }
    accuracy["neither"] = {"accuracy": None, "pairs": 0}
    model = {**accuracy, "calibration": {"loss": 0.6432, "calibration_error": 0.0717}}
    rows: dict[str, Any] = {}
    for index, (name, method) in enumerate(methods.items(), 1):
        logps = ("chosen_logps", "rejected_logps", "chosen_logratio", "rejected_logratio")
        probe: dict[str, Any] = dict(zip(logps, (-3.5, -4.0, 0.5, -0.5), strict=True))
        probe |= {"accuracy": 0.5, "forward_kl_reference": 0.1, "forward_kl_preferences": -1.0}
        probe |= {"member_shares": [0.75, 0.25]} if "members" in method.needs else {}
        means = ("oracle_reward", "length", "kl", "chosen_logratio", "rejected_logratio")
        rows[name] = {
            "advantage": 0.1234567 * index,
            "ci": [-0.0111 * index, 0.3333 * index],
            **dict.fromkeys(means, 1.7171 * index),
            "n": 6,
            "finished": 0.5,
            "accuracy": 0.6161 + index / 1000,
            "policy": f"elsewhere/policy/{name}-abc" + ("/step-2" if index == 1 else ""),
            "samples": f"evaluate/{name}-abc/samples.jsonl",
            "setting": asdict(method),
            "step": 2 if index == 1 else 4,
            "validation": [],
            "probe": [{"step": step, **probe} for step in (0, 2, 4)],
        }
    first = next(iter(rows.values()))
    tried = {"setting": first["setting"], "advantage": 0.4141, "ci": [0.1, 0.9], "kl": 0.3737}
    first["validation"] = [{**tried, "step": 2}, {**tried, "step": 4, "advantage": 0.2323}]
    sft = {key: first[key] for key in ("n", "oracle_reward", "length", "finished", "kl", "accuracy")}
    sft |= {"chosen_logratio": 0.0, "rejected_logratio": 0.0}
    sft |= {"policy": "elsewhere/sft/policy-abc", "samples": "evaluate/sft-abc/samples.jsonl"}
    bias: dict[str, Any] = {"pairs": 9, "longer_preferred": 2, "shorter_preferred": 6}
    bias |= {"mean_chosen_length": 4.4545, "mean_rejected_length": 5.5656}
    chances = [0.04321, 1.234e-9, None]
    kept = {"kept": {"train": 1234, "valid": 50, "test": 60}, "dropped": {text: 17}}
    return {
        "version": VERSION,
        "methods": rows,
        "sft": sft,
        "wald": {
            f"{one} - {other}": {"difference": -0.0707, "z": 1.0, "p": chances[i % 3]}
            for i, (one, other) in enumerate(combinations(rows, 2))
        },
        "wins": {name: {"sft": {"win": 0.51, "tie": 0.2, "loss": 0.29, "n": 6}} for name in rows},
        "reward_models": {"rho": model, "b0.2": model, "b0.8": accuracy},  # the last one of an earlier version
        "oracle": model,
        "labels": {"agreement": 0.8181, "ties_dropped": 3, "longer_preferred": 0.5959},
        "bias": {"rho": bias, "b0.2": bias, "b0.8": bias},
        "data": {"preferences": kept, "references": {**kept, "dropped": {}}, "vocabulary": 300},
        "rho": 0.2,
        "confidence": 0.95,
        "looks": looks(rows),
        "provenance": {
            "versions": {"python": "3.11"},
            "commit": None,
            "machine": {"cores": 2},
            "ranks": 1,
            "date": "2026-01-02",
            "seed": 5,
            "command": ["train.py", text],
        },
    }
