"""What the figures of `python -m lm.nondeterministic` share: its splits and domains, and who they are about."""

from __future__ import annotations

from typing import Any

from figures.captions import plain
from figures.style import Look
from figures.style import looks_of as looks_in

RESULTS = "nondeterministic.json"
SPLITS = {
    "all": r"$\mathcal{D}_{all}$",
    "hc_he": r"$\mathcal{D}_{hc,he}$",
    "lc_le": r"$\mathcal{D}_{lc,le}$",
}
"""By their names in configs."""


def looks_of(results: dict[str, Any]) -> dict[str, Look]:
    """By a policy's label in results; ValueError for one that has none."""
    return looks_in(results, results["methods"], RESULTS)


def domains_of(results: dict[str, Any]) -> dict[str, str]:
    """By their names in results: the study may have had no prompts out of domain."""
    titles = {"in_domain": "test prompts"}
    return titles if results["out_of_domain"] is None else {**titles, "out_of_domain": "out of domain"}


def title_of(results: dict[str, Any], split: str) -> str:
    """The split with its number of training pairs."""
    return f"{SPLITS[split]}, {results['splits'][split]['pairs']['pairs']:,} pairs"


def data_of(results: dict[str, Any], *, outside: bool = True) -> str:
    """For captions: which data, out of domain too where that is drawn, and how far from [N]'s."""
    seed, other = results["provenance"]["seed"], results["out_of_domain"] if outside else None
    if results["world"] is None:
        data, labels = results["config"]["data"], {"given": "its own", "oracle": "the oracle's"}[results["labels"]]
        text = f"{data['kind']} ({plain(str(data['path']))}), one seed ({seed}), {labels} labels."
    else:
        text = (
            f"Embedded world (synthetic, ours), a small policy from random weights, one seed ({seed}), annotators' "
            "labels. [N] has TL;DR, large policies, CNN/DailyMail and an LLM judge."
        )
    if other is None:
        return text
    if other["path"] is not None:
        return f"{text} Out of domain: {plain(str(other['path']))}."
    low, high = other["events"]
    most = results["world"]["max_events"]
    return f"{text} Out of domain: posts of {low} to {high} events; none that is trained on has over {most}."
