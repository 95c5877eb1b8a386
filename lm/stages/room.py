"""How much room a run will take on the disk, said and held against what is free before anything is trained."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lm.base import progress, ranks
from lm.base.store import WORK, Artifact, MissingArtifact, Refused, Store, key_of
from lm.config import SFT, TrainingConfig
from lm.models.loading import Size, size_of
from lm.objectives import Method
from lm.stages.data import data, opened, sized, tokenizer
from lm.stages.evaluations import evaluation, has_choice, reference_on_test, validation
from lm.stages.heads import features
from lm.stages.labels import labels, oracle
from lm.stages.policies import policy
from lm.stages.rewards import asked, own_oracle, reward
from lm.stages.run import Run, base_of, once
from lm.stages.sampled import IDS, TEXTS
from lm.stages.scores import (
    model_scores,
    own_scores,
    scores,
    unlabelled_rewards,
    unlabelled_scores,
)
from lm.stages.subsets import bias
from lm.stages.trainings import sft
from lm.stages.unlabelled import PAIRS as UNLABELLED
from lm.stages.unlabelled import distils_unlabelled, unlabelled

BESIDE = 10_000
"""Bytes of an artifact's record, log and config. [set]"""
CHARACTERS = 6
"""Bytes a token of a sample as text. [set]"""
NUMBER = 25
"""Bytes of a number in an artifact's record."""
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


@dataclass(frozen=True)
class Piece:
    """One artifact of a run."""

    need: Need
    made: Callable[[Run], Artifact]
    """The stage that makes it."""


def needs(run: Run) -> list[Need]:
    """What all stages of a run of every method take after the data's, whether they are made yet or not. The data are
    made for it where they are missing: their size is the pairs'.

    A model is its parameters in the run's dtype and the tokenizer; pi_ref, the oracle and each reward model that some
    method distils are one each (heads on one frozen body share it, the states of all pairs beside it), a policy is one
    a setting and snapshot. A checkpoint has AdamW's two moments too, three parameters for one, of adapters their own
    alone; there are three of them at a time, where `save_steps` asks for any. Pairs are as large as they are in the
    data, D_rho as all training pairs where it has no size, and samples as long as they may be: what it says is rather
    too much than too little.
    """
    return _by_stage(_pieces(run))


def _by_stage(pieces: Iterable[Piece]) -> list[Need]:
    found: dict[str, Need] = {}
    for need in (piece.need for piece in pieces):
        before = found.get(need.stage, Need(need.stage, 0))
        found[need.stage] = Need(need.stage, before.kept + need.kept, max(before.passing, need.passing))
    return list(found.values())


@once
def _pieces(run: Run) -> list[Piece]:
    return list(_each(run))


def _each(run: Run) -> Iterator[Piece]:
    config, made = sized(run), data(run)
    sizes: dict[str, Size] = {}

    def size(option: str) -> Size:
        return sizes.setdefault(option, size_of(option, tokenizer(run), config))

    body = size("model")
    beside = _bytes_below(made.path / "tokenizer") + BESIDE
    pairs = opened(made.path / "preferences")
    count, whole = len(pairs), _bytes_below(made.path / "preferences")
    columns = {name: pairs.data.column(name).nbytes / count for name in pairs.column_names}
    kept = made.metrics["preferences"]["kept"]
    biased = min(config.bias.size or count, kept["train"])
    probed = min(config.probe.pairs, kept["valid"])
    every = [(name, method) for name in config.methods for method in config.settings(name)]
    own = {(name, method.own_oracle): (name, method) for name, method in every if method.own_oracle is not None}
    trains_oracle = config.trains_oracle  # which judges, whoever labels
    shared = [name for name in asked(run) if name not in config.methods] if config.data.rewards == "models" else []

    yield Piece(Need("sft", body.weights + beside, _checkpoints(config.sft, body, config.adapts("sft"))), sft)
    asked_for = {"oracle": trains_oracle, "reward": bool(shared)}
    heads = [stage for stage, is_asked in asked_for.items() if is_asked and getattr(config, stage).train == "head"]
    # An option and the other may name the same model; pi_ref is none of those that they name.
    bodies = {(option == "model", spec): stage for stage in heads for option, spec in [base_of(config, stage)]}
    for stage in bodies.values():
        one = size(base_of(config, stage)[0])
        states = count * 2 * one.width * 4
        yield Piece(Need("features", one.weights + states + beside, states), partial(features, stage=stage))

    def model(stage: str, *, stepped: bool = False) -> Need:
        training: TrainingConfig = getattr(config, stage)
        base = size(base_of(config, stage)[0])
        if training.train == "head" and not stepped:
            return Need(stage, beside + base.width * 4)
        adapted, looks = config.adapts(stage), training.stopping is not None
        one = base.weights + base.adapters * adapted + beside
        # The best so far and the next are there at once, and those that checkpoints would go on from.
        best = one * (1 + 2 * (training.save_steps is not None)) * looks
        return Need(stage, one, best + _checkpoints(training, base, adapted))

    if trains_oracle:
        yield Piece(model("oracle"), oracle)
    by_oracle = config.data.labels == "oracle"
    on_policy, unlabelled_pairs = config.data.sampled(kept["train"])  # no more prompts than pairs
    of_pair = sum(columns[name] for name in (*TEXTS, *IDS)) + NUMBER
    labelled = whole + int(on_policy * of_pair)
    yield Piece(Need("labels", labelled + (16 * count if by_oracle else 0), labelled if by_oracle else 0), labels)
    yield Piece(Need("bias", int(biased * (1 + len(shared)) * (columns["id"] + 8)) + BESIDE), bias)
    for name in shared:
        yield Piece(model("reward"), partial(reward, name=name))
    for name, method in own.values():
        yield Piece(model("reward", stepped=True), partial(own_oracle, name=name, method=method))
    ids = sum(columns[name] for name in ("id", "prompt_ids", "chosen_ids", "rejected_ids"))
    samples = config.sampling.reference_samples * (config.data.limits[1] * 8 + 8)
    yield Piece(Need("score", int((biased + probed) * (ids + samples + 16)) + BESIDE), scores)
    by_model = Need("score", int((biased + probed) * (columns["id"] + 16)) + BESIDE)
    for name in shared:
        yield Piece(by_model, partial(model_scores, name=name))
    if unlabelled_pairs and any(distils_unlabelled(run, method) for _, method in every):
        yield Piece(
            Need(UNLABELLED, int(unlabelled_pairs * of_pair) + BESIDE, int(unlabelled_pairs * of_pair)), unlabelled
        )
        yield Piece(Need("score", int(unlabelled_pairs * (ids + samples + 16)) + BESIDE), unlabelled_scores)
        for name in shared:
            scored = Need("score", int(unlabelled_pairs * (columns["id"] + 16)) + BESIDE)
            yield Piece(scored, partial(unlabelled_rewards, name=name))
    for name, method in own.values():
        yield Piece(by_model, partial(own_scores, name=name, method=method))
    adapted = config.adapts("policy")
    of_policy = config.snapshots * (body.weights + body.adapters * adapted + beside)
    checkpoints = _checkpoints(config.policy, body, adapted)
    for name, method in every:
        yield Piece(Need("policy", of_policy, checkpoints), partial(policy, name=name, method=method))
    sample = columns["prompt"] + config.data.limits[1] * CHARACTERS + 300
    tried = [(name, method) for name, method in every if has_choice(config, name)]
    if tried:
        prompts = min(config.evaluation.valid_prompts or kept["valid"], kept["valid"])
        yield Piece(Need("validate", prompts * NUMBER + BESIDE), lambda run: validation(run, SFT, sft(run)))
    for name, method in tried:
        yield Piece(Need("validate", BESIDE), partial(_validation, name=name, method=method))
    prompts = min(config.evaluation.prompts or kept["test"], kept["test"])
    yield Piece(Need("evaluate", kept["test"] * 16 + BESIDE), reference_on_test)
    for name in (SFT, *config.methods):
        yield Piece(Need("evaluate", int(prompts * sample + BESIDE)), partial(evaluation, name=name))


def _validation(run: Run, name: str, method: Method) -> Artifact:
    return validation(run, name, policy(run, name, method))


def _checkpoints(training: TrainingConfig, size: Size, adapted: bool) -> int:
    """Two that are kept and one that is written."""
    if training.save_steps is None or not training.has_steps:
        return 0
    return 3 * 3 * (size.adapters if adapted else size.weights)


def _bytes_below(folder: Path) -> int:
    """Of its files, those of two names once."""
    files = {(found := path.stat()).st_ino: found.st_size for path in folder.rglob("*") if path.is_file()}
    return sum(files.values())


def _in_words(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


class _Unknown(dict[str, Any]):
    """Metrics of what is not made."""

    def __missing__(self, name: str) -> Any:
        raise MissingArtifact(f"there is no {name} yet")


class _Looking(Store):
    """Makes nothing: of what is not there it gives what it would be called, for the keys of those made from it. What is
    there is not read, beside its record: that it is whole is for the stage to find."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.root, seed=store.seed, read_only=store.read_only)
        self.lacking: dict[Path, Path] = {}
        """Artifacts that are not there -> where they are worked on."""

    def get(self, stage: str, name: str, inputs: Mapping[str, Any], *_: Any, **__: Any) -> Artifact:
        key = key_of(stage, name, inputs)
        final = self.root / stage / f"{name}-{key}"

        def metrics() -> dict[str, Any] | None:
            if not final.exists():
                return None
            try:
                return dict(json.loads((final / "artifact.json").read_text(encoding="utf-8"))["metrics"])
            except (OSError, ValueError, KeyError):  # told by the stage that asks for it
                return {}

        if (found := ranks.from_first(metrics)) is None:
            self.lacking[final] = self.root / WORK / f"{stage}-{name}-{key}"
        return Artifact(final, key, _Unknown(found or {}))


def missing(run: Run) -> tuple[list[Need], int]:
    """What is still to be written of each stage: of the run's own artifacts, by their keys, those that are not there
    and that it may make; and the bytes that lie there already of those that a run before has begun. All ranks call
    this."""
    pieces = _pieces(run)  # before the copy, or it would read the data, and say what there is to say of them, again
    looking, store = copy.copy(run), _Looking(run.store)
    looking.store, looking.kept = store, dict(run.kept)
    left, begun = [], set()
    for piece in pieces:
        if piece.need.stage in store.read_only:
            continue
        try:
            path = piece.made(looking).path
        except MissingArtifact:  # its key counts what another will have found
            left.append(piece)
            continue
        if path in store.lacking:
            left.append(piece)
            begun.add(store.lacking[path])
    return _by_stage(left), sum(map(_bytes_below, begun))


def check_room(run: Run) -> None:
    """Refused where what a run of every method has still to write and keeps (see `needs`) is more than the disk of its
    folder has free; where it is much, or where what lies beside for a time may not fit, it is said."""
    (left, begun), root = missing(run), run.store.root

    def refused() -> str | None:
        passing = max((need.passing for need in left), default=0)
        kept = max(0, sum(need.kept for need in left) - begun)
        needed = max(0, sum(need.kept for need in left) + passing - begun)
        free = shutil.disk_usage(root).free
        parts = [f"{need.stage} {_in_words(need.kept)}" for need in sorted(left, key=lambda need: -need.kept)[:4]]
        if passing:
            parts.append(f"checkpoints and the like, for a time, {_in_words(passing)}")
        if begun:
            parts.append(f"less {_in_words(begun)} that a run before has begun")
        words = f"about {_in_words(needed)} are still to be written to {root} ({', '.join(parts)})"
        help_ = "make room, name another output_dir, or ask for less (methods, sweep, snapshots, save_steps)"
        if kept > free:
            return f"{words}, where {_in_words(free)} are free; {help_}"
        if needed > free:
            progress.say(
                f"warning: {words}, where {_in_words(free)} are free, and it may end for want of room; {help_}"
            )
        elif needed >= WORTH_SAYING:
            progress.say(f"{words}; {_in_words(free)} are free")
        return None

    if (why := ranks.from_first(refused)) is not None:
        raise Refused(why)
