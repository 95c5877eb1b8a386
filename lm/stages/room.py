"""How much room a run will take on the disk, said and held against what is free before anything is trained."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lm.base import progress, ranks
from lm.base.store import Refused
from lm.config import TrainingConfig
from lm.models.loading import Size, size_of
from lm.stages.data import data, opened, sized, tokenizer
from lm.stages.rewards import asked
from lm.stages.run import Run, once

BESIDE = 10_000
"""Bytes of an artifact's record, log and config. [set]"""
CHARACTERS = 6
"""Bytes a token of a sample as text. [set]"""
WORTH_SAYING = 10**8
"""Bytes from which on the estimate is said, and not only held against what is free."""


@dataclass(frozen=True)
class Need:
    """What the artifacts of a stage take, in bytes."""

    stage: str
    kept: int
    """When all of them are finished."""
    passing: int = 0
    """Besides, at most, while one of them is made: checkpoints, models that were the best so far."""


@once
def needs(run: Run) -> list[Need]:
    """What all stages of a run of every method take after the data's, whether they are made yet or not. The data are
    made for it where they are missing: their size is the pairs'.

    A model is its parameters in the run's dtype and the tokenizer; pi_ref, the oracle and each reward model that some
    method distils are one each (heads on a frozen body share one, the states of all pairs beside it), a policy is one a
    setting and snapshot. A checkpoint has AdamW's two moments too, three parameters for one, of adapters their own
    alone; there are three of them at a time, where `save_steps` asks for any. Pairs are as large as they are in the
    data, D_rho as all training pairs where it has no size, and samples as long as they may be: what it says is rather
    too much than too little.
    """
    return list(_needs(run))


def _needs(run: Run) -> Iterator[Need]:
    config, made = sized(run), data(run)
    body = size_of("model", tokenizer(run), config)
    of_rewards = body if config.reward_base is None else size_of("reward_base", tokenizer(run), config)
    beside = _bytes_below(made.path / "tokenizer") + BESIDE
    pairs = opened(made.path / "preferences")
    count, whole = len(pairs), _bytes_below(made.path / "preferences")
    columns = {name: pairs.data.column(name).nbytes / count for name in pairs.column_names}
    kept = made.metrics["preferences"]["kept"]
    biased = min(config.bias.size or count, kept["train"])
    probed = min(config.probe.pairs, kept["valid"])
    settings = {name: config.settings(name) for name in config.methods}
    own = {(name, one) for name, each in settings.items() for method in each if (one := method.own_oracle) is not None}
    yield Need("sft", body.weights + beside, _checkpoints(config.sft, body, config.adapts("sft")))
    trains_oracle = config.oracle_model is None  # which judges, whoever labels
    shared = [name for name in asked(run) if name not in settings] if config.data.rewards == "models" else []
    names = [*shared, *own]
    heads = {"oracle": trains_oracle, "reward": bool(shared)}
    if any(asked_for and getattr(config, stage).train == "head" for stage, asked_for in heads.items()):
        states = count * 2 * of_rewards.width * 4
        yield Need("features", of_rewards.weights + states + beside, states)

    def models(stage: str, number: int, *, stepped: bool = False) -> Need:
        training: TrainingConfig = getattr(config, stage)
        if training.train == "head" and not stepped:
            return Need(stage, number * (beside + of_rewards.width * 4))
        adapted, looks = config.adapts(stage), training.stopping is not None
        one = of_rewards.weights + of_rewards.adapters * adapted + beside
        # The best so far and the next are there at once, and those that checkpoints would go on from.
        best = one * (1 + 2 * (training.save_steps is not None)) * looks
        return Need(stage, number * one, (best + _checkpoints(training, of_rewards, adapted)) * (number > 0))

    if trains_oracle:
        yield models("oracle", 1)
    by_oracle = config.data.labels == "oracle"
    yield Need("labels", whole + (16 * count if by_oracle else 0), whole if by_oracle else 0)
    yield Need("bias", int(biased * (1 + len(shared)) * (columns["id"] + 8)) + BESIDE)
    if names:
        of_shared, of_own = models("reward", len(shared)), models("reward", len(own), stepped=True)
        yield Need("reward", of_shared.kept + of_own.kept, max(of_shared.passing, of_own.passing))
    ids = sum(columns[name] for name in ("id", "prompt_ids", "chosen_ids", "rejected_ids"))
    samples = config.sampling.reference_samples * (config.data.limits[1] * 8 + 8)
    scored = (biased + probed) * (ids + samples + 16) + (biased + probed) * len(names) * (columns["id"] + 16)
    yield Need("score", int(scored) + BESIDE * (1 + len(names)))
    count_of = sum(len(each) for each in settings.values()) * config.snapshots
    adapted = config.adapts("policy")
    of_policy = body.weights + body.adapters * adapted + beside
    yield Need("policy", count_of * of_policy, _checkpoints(config.policy, body, adapted))
    sample = columns["prompt"] + config.data.limits[1] * CHARACTERS + 300
    if count_of > len(settings):
        prompts = min(config.evaluation.valid_prompts or kept["valid"], kept["valid"])
        yield Need("validate", int((count_of + 1) * (prompts * sample + BESIDE)))
    prompts = min(config.evaluation.prompts or kept["test"], kept["test"])
    yield Need("evaluate", int((len(settings) + 1) * (prompts * sample + BESIDE)))


def _checkpoints(training: TrainingConfig, size: Size, adapted: bool) -> int:
    """Two that are kept and one that is written."""
    if training.save_steps is None or not training.has_steps:
        return 0
    return 3 * 3 * (size.adapters if adapted else size.weights)


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _in_words(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def missing(found: Sequence[Need], root: Path) -> list[Need]:
    """What is still to be written of each stage, beside what lies in its folder."""
    left = []
    for need in found:
        there = _bytes_below(root / need.stage)
        if need.kept > there:
            left.append(Need(need.stage, need.kept - there, need.passing))
    return left


def check_room(run: Run) -> None:
    """Refused where what a run of every method has still to write (see `needs`) is more than the disk of its folder has
    free; where it is much, it is said."""

    def refused() -> str | None:
        left, root = missing(found, run.store.root), run.store.root
        passing = max((need.passing for need in left), default=0)
        needed = sum(need.kept for need in left) + passing
        free = shutil.disk_usage(root).free
        parts = [f"{need.stage} {_in_words(need.kept)}" for need in sorted(left, key=lambda need: -need.kept)[:4]]
        if passing:
            parts.append(f"checkpoints and the like {_in_words(passing)}")
        words = f"about {_in_words(needed)} are still to be written to {root} ({', '.join(parts)})"
        if needed > free:
            return (
                f"{words}, where {_in_words(free)} are free; make room, name another output_dir, or ask for less "
                "(methods, sweep, snapshots, save_steps)"
            )
        if needed >= WORTH_SAYING:
            progress.say(f"{words}; {_in_words(free)} are free")
        return None

    found = needs(run)
    if (why := ranks.from_first(refused)) is not None:
        raise Refused(why)
