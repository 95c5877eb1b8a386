"""What a finished run tells its trackers: the final table, pictures of the advantages and of the frontier, and samples
side by side."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from figures import methods
from figures.record import Results
from figures.style import style
from lm.base.files import read_jsonl
from lm.config import SFT
from lm.stages.run import Run
from lm.stages.trainings import described, logs_of
from lm.training import trackers
from lm.training.trackers import RESULTS, Ending, Rows

PROMPTS = 20
"""Of the samples' table."""
NUMBERS = ("advantage", "oracle_reward", "length", "kl", "utility")
"""Of each policy, where it has them: means over the test prompts."""


def tell(run: Run, found: Results, picture: Path) -> None:
    """Tells `report_to`; nothing without trackers. On the first rank.

    Args:
        run: the run.
        found: its results.
        picture: of the frontier, a .png file.
    """
    if run.config.report_to:
        with TemporaryDirectory() as folder:
            advantage = Path(folder) / "advantage.png"
            with style():
                methods.draw(found).savefig(advantage)
            pictures = {"advantage": advantage, "frontier": picture}
            trackers.end(run.config.report_to, logs_of(run, RESULTS), ending(run, found, pictures))


def ending(run: Run, found: Results, pictures: dict[str, Path]) -> Ending:
    """What is told."""
    policies: dict[str, Any] = {SFT: found.sft, **found.methods}
    names = [name for name in NUMBERS if any(getattr(one, name, None) is not None for one in policies.values())]
    table: list[list[Any]] = []
    for policy, one in policies.items():
        low, high = getattr(one, "ci", (None, None))
        values = [getattr(one, name, None) for name in names]
        table.append([policy, *values, low, high])
    numbers = {
        f"{policy}/{name}": value
        for policy, *values in table
        for name, value in zip(names, values, strict=False)
        if value is not None
    }
    return Ending(
        {"stage": RESULTS, **described(run)},
        numbers,
        {"table": Rows(("policy", *names, "ci_low", "ci_high"), table), "samples": samples(run, policies)},
        pictures,
    )


def samples(run: Run, policies: dict[str, Any]) -> Rows:
    """The first PROMPTS test prompts, with each policy's completion and its oracle reward."""
    rows: list[list[Any]] = []
    for policy, one in policies.items():
        for number, (_, row) in zip(range(PROMPTS), read_jsonl(run.store.root / one.samples), strict=False):
            if policy == SFT:
                rows.append([row["prompt"]])
            elif rows[number][0] != row["prompt"]:
                raise RuntimeError(f"{one.samples}, row {number}: of another prompt than {SFT}'s")
            rows[number] += [row["completion"], row["oracle_reward"]]
    return Rows(("prompt", *(column for policy in policies for column in (policy, f"{policy} reward"))), rows)
