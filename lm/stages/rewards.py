"""Reward models, each made when a method that was asked for distils it, or the rewards that stand in for them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from scipy.special import ndtri

from lm.base.store import Artifact, Planned, key_of
from lm.data import rewards as columns
from lm.data.splits import draw_of
from lm.objectives import MAIN, JointOracle, Method
from lm.stages.heads import bradley_terry_model
from lm.stages.labels import labelled_pairs
from lm.stages.run import Run, once
from lm.stages.subsets import bias, members, subset
from lm.stages.trainings import as_reported, held_out_metrics, inputs_of, joint_oracle, start_input


def teachers(run: Run, method: Method) -> list[str]:
    """Names of the reward models whose rewards a method distils; of one of its own, none."""
    one = method.teacher
    ensemble = members(run) if "members" in method.needs else []
    return [*([one] if one is not None and one not in ensemble else []), *ensemble]


def asked(run: Run) -> list[str]:
    """Names of all reward models that some method of the run distils: of D_rho, the members, and methods' own, which
    are called as the methods."""
    settings = {name: run.config.settings(name) for name in run.config.methods}
    needed = {teacher for each in settings.values() for method in each for teacher in teachers(run, method)}
    own = [name for name, each in settings.items() if any(method.own_oracle is not None for method in each)]
    return [*(name for name in (MAIN, *members(run)) if name in needed), *own]


def _inputs(run: Run, name: str) -> dict[str, Any]:
    return inputs_of(run, "reward", run.config.reward, bias=bias(run), subset=name, **start_input(run, "reward"))


def planned(run: Run) -> list[Planned]:
    """The reward models of D_rho and of the members as a key counts them, made or not."""
    if run.config.data.rewards != "models":
        return []
    return [Planned(key_of("reward", name, _inputs(run, name))) for name in (MAIN, *members(run))]


@once
def reward(run: Run, name: str) -> Artifact:
    """The reward model of D_rho ("rho"), or of a member's subset. ValueError where none are trained."""
    if (rewards := run.config.data.rewards) != "models":
        whose = "set" if rewards == "given" else "oracle"
        raise ValueError(f"data.rewards is {rewards}: the {whose}'s own rewards are distilled, no model is trained")
    if not run.config.reward.is_given:
        raise ValueError(f"{run.config.reward.ONE_LENGTH}; got None and None for reward, of which {name} is asked for")
    return bradley_terry_model(
        run,
        "reward",
        name,
        run.config.reward,
        _inputs(run, name),
        lambda: subset(run, name),
        lambda: labelled_pairs(run, "valid"),
    )


@once
def own_oracle(run: Run, name: str, method: Method) -> Artifact:
    """The reward model of a method's own, trained on D_rho; called as the method is."""
    oracle = method.own_oracle
    if oracle is None:
        raise ValueError(f"{name} has no oracle of its own")
    # What [N]'s oracle does not have is counted besides, so that the keys of [N]'s stay what they were.
    own = {} if type(oracle) is JointOracle else {"oracle": {"kind": type(oracle).__qualname__, **asdict(oracle)}}
    start = start_input(run, "reward")
    inputs = inputs_of(run, "reward", run.config.reward, bias=bias(run), alpha=oracle.alpha, **start, **own)
    return joint_oracle(run, name, oracle, inputs, lambda: subset(run, MAIN), lambda: labelled_pairs(run, "valid"))


def reward_artifact(run: Run, name: str) -> Artifact:
    """The model behind one of the names that `asked` gives."""
    if name not in run.config.methods:
        return reward(run, name)
    with_one = next(method for method in run.config.settings(name) if method.own_oracle is not None)
    return own_oracle(run, name, with_one)


def reward_held_out(run: Run, name: str) -> dict[str, Any]:
    """How a reward model, or the reward distilled in its place, does on validation pairs, by
    `figures.record.RewardModel`."""
    if name in run.config.methods or run.config.data.rewards == "models":
        return as_reported(reward_artifact(run, name).metrics)
    pairs = labelled_pairs(run, "valid")
    chosen, rejected = (torch.from_numpy(side) for side in stored_rewards(run, pairs, name))
    return as_reported(held_out_metrics(run, pairs, chosen, rejected))


def _noise(run: Run, pairs: Any, side: str) -> columns.Floats:
    """[N], standard normal: a function of the seed, the prompt and the completion, wherever these stand."""
    seed = run.seed("reward-noise")
    draws = [draw_of(seed, *both) for both in zip(pairs["prompt"][:], pairs[side][:], strict=True)]
    inside = np.clip(draws, 2.0**-65, 1 - 2.0**-53)  # at 0 and at 1 it would be infinite
    drawn: columns.Floats = ndtri(inside)
    return drawn


def stored_rewards(run: Run, pairs: Any, name: str) -> tuple[columns.Floats, columns.Floats]:
    """Rewards of the chosen and of the rejected completions, [N] each, that stand in the place of a reward model's: the
    set's own, or the oracle's."""
    if run.config.data.rewards == "oracle":
        one, other = (columns.checked_column(pairs, name) for name in columns.ORACLE)
        if (scale := run.config.data.reward_noise) == 0:
            return one, other
        return one + scale * _noise(run, pairs, "chosen"), other + scale * _noise(run, pairs, "rejected")
    found = columns.stored(pairs)
    assert found is not None, "rows of given rewards were checked when they were read"
    (chosen, rejected), (of_chosen, of_rejected) = found
    if name == MAIN:
        return chosen, rejected
    k = members(run).index(name)
    return of_chosen[:, k], of_rejected[:, k]
