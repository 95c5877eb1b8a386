"""A KL budget in the exact world: the optimum under the constraint, against a training by dual ascent on alpha."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize

from lm.base import progress
from lm.config import ExactConfig
from lm.models.opening import open_policy
from lm.objectives import Method, Pessimism
from lm.studies import exact
from lm.studies.exact import (
    GUARANTEED,
    Floats,
    Graphs,
    Run,
    Trained,
    World,
    distributions,
    forward_kl,
    make_world,
    optimum,
    total_variation,
)
from theory.budget import alpha_for_budget

HELD, MULTIPLIER, NEAR = 1e-3, 1e-2, 1e-3
"""Acceptance: how far the KL may be from its target and alpha from the exact multiplier, relatively, and the largest
total variation from the constrained optimum, which an alpha and a KL that are off by as much allow."""
_SLACK = 1e-7  # of the alpha that is enough whatever the labels: the constraint does not bind there


def held(method: Method, target: float, **options: Any) -> Method:
    """The method with a target of the KL in place of its own alpha."""
    return _with(method, Pessimism(target=target, **options))


def _with(method: Method, term: Pessimism) -> Method:
    option = method.pessimism_option
    assert option is not None, f"{type(method).__name__} has no KL term"
    return replace(method, **{option: term})


def constrained_optimum(
    method: Method, world: World, ref: Floats, graphs: Graphs, target: float
) -> tuple[Floats, float]:
    """log of the policy of least mean loss over all pairs with KL(pi_ref || pi) of at most `target` nats, [P, n], and
    the multiplier of that constraint: the alpha whose penalised optimum has that KL, 0 where it does not bind.

    The KL is a mean over pairs, as the trainer has it: prompts weigh by their pairs. ValueError where there is no
    optimum.
    """
    weights = _weights(graphs)
    margins = np.concatenate([graph.margins(rewards) for graph, rewards in zip(graphs, world.rewards, strict=True)])
    # As both KLs of every prompt stay below a budget, so does the mean.
    enough = max(
        alpha_for_budget(target, method.divergence_constant(margins[part], None))
        for part in np.split(np.arange(len(margins)), np.cumsum([len(graph) for graph in graphs])[:-1])
    )

    def solved(alpha: float) -> Floats:
        return optimum(_with(method, Pessimism(alpha_start=alpha, alpha_end=alpha)), world, ref, graphs)

    def excess(log_alpha: float) -> float:
        return float(weights @ forward_kl(ref, solved(math.exp(log_alpha)))) / target - 1

    low = high = math.log(enough)
    while excess(low) < 0:
        high, low = low, low - math.log(10)
        if math.exp(low) < enough * _SLACK:
            return solved(math.exp(high)), 0.0
    alpha = math.exp(optimize.brentq(excess, low, high, xtol=1e-12, rtol=1e-12)) if low < high else enough
    return solved(alpha), alpha


def held_run(method: Method, world: World, ref: Floats, graphs: Graphs, run: Trained) -> dict[str, Any]:
    """What a training of a method with a target reached: KL in nats, alpha, and its distance from the optimum."""
    kl = method.pessimism
    assert kl is not None
    assert kl.target is not None
    assert run.alpha is not None
    best, multiplier = constrained_optimum(method, world, ref, graphs, kl.target)
    return {
        "target": kl.target,
        "kl": float(_weights(graphs) @ forward_kl(ref, np.log(distributions(run.logps)))),
        "alpha": run.alpha,
        "multiplier": multiplier,
        "tv": float(total_variation(np.exp(run.logps), np.exp(best)).max()),
        "tv_ref": float(total_variation(ref, np.exp(best)).min()),
    }


def experiment(config: ExactConfig, reference: Path) -> dict[str, dict[str, Any]]:
    """`held_run` of p-DPO and dp-DPO, with the exact KL of pi_ref, which `exact.experiment` has saved."""
    assert config.policy.max_steps is not None
    world, rng = make_world(config), np.random.default_rng([config.seed, 3])
    ref = distributions(world.log_probs(open_policy(reference, world.tokenizer, world.config)))
    likely = [np.argsort(-p, kind="stable")[: round(config.compared * len(p))] for p in ref]
    graphs = [exact.sparse_pairs(r, among, rng) for r, among in zip(world.rewards, likely, strict=True)]
    methods = {name: held(config.method(name), config.kl_target) for name in GUARANTEED}
    training = replace(config.policy, batch_size=sum(map(len, graphs)))
    runs = {
        name: Run(config=config, reference=reference, method=method, graphs=graphs, training=training, samples=ref)
        for name, method in methods.items()
    }
    with exact.workers() as pool:
        started = {name: pool.submit(exact.train, run) for name, run in runs.items()}
        trained = {name: run.result() for name, run in progress.bar("KL targets", started.items(), unit="run")}
    return {name: held_run(methods[name], world, ref, graphs, trained[name]) for name in methods}


def _weights(graphs: Graphs) -> Floats:
    """Of each prompt in a mean over all pairs, [P]."""
    counts = np.array([len(graph) for graph in graphs], dtype=np.float64)
    return np.asarray(counts / counts.sum())


def failures(budgets: dict[str, dict[str, Any]]) -> list[str]:
    """What of the acceptance is not met, in words; empty when all of it is."""
    found = []
    for name, run in budgets.items():
        for what, value, wanted, most in (
            ("a KL of", run["kl"], run["target"], HELD),
            ("an alpha of", run["alpha"], run["multiplier"], MULTIPLIER),
        ):
            if not abs(value - wanted) <= most * wanted:
                found.append(f"{name}, KL target: {what} {value:.4g} instead of {wanted:.4g}, {most:.1%} is allowed")
        if not run["tv"] <= NEAR:
            found.append(
                f"{name}, KL target: total variation {run['tv']:.2g} from the constrained optimum, at most {NEAR:g} is "
                "allowed"
            )
    return found


def remark(name: str, run: dict[str, Any]) -> str:
    """One of `held_run` in a line."""
    return (
        f"{name} with a KL target of {run['target']:g} nats: KL {run['kl']:.4f}, alpha {run['alpha']:.4f}, the exact "
        f"multiplier {run['multiplier']:.4f}; total variation from the constrained optimum {run['tv']:.1e} (of pi_ref "
        f"{run['tv_ref']:.3f})"
    )
