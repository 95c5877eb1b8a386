"""Many problems at once give what each gives alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bandits.batched import _components, solve_batch
from bandits.objectives import DPO, IPO, Distillation, Floats
from bandits.policy import uniform
from bandits.solve import NotConverged, Optimum, solve
from theory.preferences import PreferenceGraph


def problems(count: int, n: int, m: int, seed: int) -> tuple[Any, Floats, Floats, Floats]:
    """edges, ref, weights, rewards; references down to 1e-12."""
    rng = np.random.default_rng(seed)
    winners = rng.integers(0, n, (count, m))
    losers = (winners + rng.integers(1, n, (count, m))) % n
    ref = np.exp(rng.uniform(-27.6, 0, (count, n)))
    weights, rewards = rng.uniform(0.1, 3, (count, m)), rng.normal(size=(count, m))
    return np.stack([winners, losers], axis=2), ref / ref.sum(axis=1, keepdims=True), weights, rewards


def test_each_is_what_it_is_alone() -> None:
    edges, ref, weights, rewards = problems(25, 5, 6, 0)
    rng = np.random.default_rng(1)
    alphas, scales = 10 ** rng.uniform(-2, 1, 25), 10 ** rng.uniform(-1, 1, 25)
    for many, one in (
        (DPO(beta=scales), lambda p: DPO(beta=scales[p])),
        (IPO(tau=scales), lambda p: IPO(tau=scales[p])),
        (
            Distillation(beta=scales, reward_margins=rewards),
            lambda p: Distillation(beta=scales[p], reward_margins=rewards[p]),
        ),
    ):
        batch = solve_batch(many, edges, ref, alpha=alphas, weights=weights, reduction="sum")
        for p in range(25):
            graph = PreferenceGraph(5, edges[p], weights[p])
            alone = solve(one(p), graph, ref[p], alpha=float(alphas[p]), reduction="sum")
            assert isinstance(alone, Optimum)
            np.testing.assert_allclose(batch.probs[p], alone.probs, atol=1e-9)
            np.testing.assert_allclose(batch.logratios[p], alone.logratios, atol=1e-6)


@pytest.mark.parametrize("square", [False, True])
def test_thousands_of_extreme_problems(square: bool) -> None:
    edges, ref, weights, rewards = problems(4000, 4, 6, 2)
    rng = np.random.default_rng(3)
    alphas, betas = 10 ** rng.uniform(-6, 3, 4000), 10 ** rng.uniform(-2, 2, 4000)
    objective = Distillation(beta=betas, reward_margins=rewards) if square else DPO(beta=betas)
    batch = solve_batch(objective, edges, ref, alpha=alphas, weights=weights)
    assert batch.residual.max() <= 1e-10
    np.testing.assert_allclose(batch.probs.sum(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize(
    ("seed", "at", "alpha", "beta"),
    [
        (5, 4106, 2.0434054307889835e-4, 97.312303777032),  # large flows between two arms cancel
        (9, 3818, 8.692124680275011e-06, 13.441951436867235),
    ],
)
def test_cancelling_flows(seed: int, at: int, alpha: float, beta: float) -> None:
    edges, ref, weights, _ = (array[at : at + 1] for array in problems(10_000, 6, 9, seed))
    batch = solve_batch(DPO(beta=beta), edges, ref, alpha=alpha, weights=weights)
    assert batch.residual.max() <= 1e-10


def test_only_a_step_that_descends_is_taken() -> None:
    """Arms 0 and 4 can take all mass or none: steps that halve the residual uphill lead round in a circle."""
    edges, ref, weights, _ = (array[7980:7981] for array in problems(20_000, 6, 9, 24))
    batch = solve_batch(DPO(beta=0.08803033626645962), edges, ref, alpha=2.4318205418097817e-06, weights=weights)
    assert batch.residual.max() <= 1e-10


def test_arrays_stay_as_given_and_any_integer_will_do() -> None:
    edges, ref, weights, _ = problems(300, 4, 3, 0)
    edges[0, 1] = -1
    given = edges.astype(np.int8), ref[:, :1] * 0 + uniform(4), weights
    before = [array.copy() for array in given]
    small = solve_batch(DPO(beta=1.0), given[0], given[1], alpha=0.1, weights=given[2])
    for array, kept in zip(given, before, strict=True):
        np.testing.assert_array_equal(array, kept)
    wide = solve_batch(DPO(beta=1.0), edges, given[1], alpha=0.1, weights=weights)
    np.testing.assert_array_equal(small.logratios, wide.logratios)
    one = [array[:1].copy() for array in given]  # its transpose is as contiguous as itself
    solve_batch(DPO(beta=1.0), one[0], one[1], alpha=0.1, weights=one[2])
    for array, kept in zip(one, before, strict=True):
        np.testing.assert_array_equal(array, kept[:1])


def test_components_are_those_of_the_graph() -> None:
    edges = problems(200, 7, 5, 0)[0]
    labels = _components(edges[..., 0].T, edges[..., 1].T, 7)
    for pairs, found in zip(edges, labels.T, strict=True):
        wanted = PreferenceGraph(7, pairs).components
        np.testing.assert_array_equal(found[:, None] == found, wanted[:, None] == wanted)


def test_padding_changes_nothing() -> None:
    ref = uniform(3)[None]
    short = solve_batch(DPO(beta=1.0), [[[0, 1]]], ref, alpha=0.1)
    padded = solve_batch(DPO(beta=1.0), [[[0, 1], [-1, -1]]], ref, alpha=0.1)
    np.testing.assert_array_equal(short.logratios, padded.logratios)
    assert padded.logratios[0, 2] == 0


EDGES, REF = np.array([[[0, 1]], [[1, 2]]]), np.tile(uniform(3), (2, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges": EDGES + np.array([0, 2])}, r"problem 0, pair 0: arms must be in 0 ... 2, got \[0, 3\]"),
        ({"edges": EDGES * 0}, "problem 0, pair 0: an arm cannot be preferred to itself"),
        ({"edges": EDGES[:1]}, r"edges must be integers of shape \[P, m, 2\] and ref of shape \[P, n\]"),
        ({"weights": [[1.0], [0.0]]}, "problem 1, pair 0: the weight must be finite and > 0, got 0.0"),
        ({"weights": [1.0, 1.0]}, r"weights must have shape \(2, 1\), one a pair, got \(2,\)"),
        ({"ref": [[0.5, 0.5, 0.0]] * 2}, "problem 0, arm 2: ref must be a probability > 0, got 0.0"),
        ({"ref": [[0.5, 0.5, 0.5]] * 2}, "problem 0, entry 0: ref must sum to 1, got 1.5"),
        ({"alpha": [0.1, 0.0]}, "alpha must be a finite number > 0, got .*0.0"),
        ({"alpha": [0.1, 0.1, 0.1]}, r"alpha must be a number or one a problem, \[2\], got shape \(3,\)"),
        ({"objective": DPO(beta=[1.0, 1.0, 1.0])}, r"beta must be a number or one a problem, \[2\], got shape \(3,\)"),
        ({"objective": IPO(tau=[1.0, 1.0, 1.0])}, r"tau must be a number or one a problem, \[2\], got shape \(3,\)"),
        ({"reduction": "max"}, 'reduction must be "mean" or "sum"'),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"objective": DPO(beta=1.0), "edges": EDGES, "ref": REF, "alpha": 0.1} | change
    with pytest.raises(ValueError, match=message):
        solve_batch(**arguments)


def test_kinds_extremes_and_narrow_references() -> None:
    ref = np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], dtype=np.float32)
    batch = solve_batch(DPO(beta=1.0), EDGES, ref, alpha=0.1)
    np.testing.assert_allclose(batch.probs.sum(axis=1), 1, atol=1e-12)
    with pytest.raises(TypeError, match=r"objective must be a DPO, IPO or Distillation, made with .*, got str: 'dpo'"):
        solve_batch("dpo", EDGES, REF, alpha=0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ref must hold real numbers, got list"):
        solve_batch(DPO(beta=1.0), EDGES, [["a"] * 3] * 2, alpha=0.1)
    with pytest.raises(ValueError, match="edges must be integers"):
        solve_batch(DPO(beta=1.0), [[[0, 1]], [[0, 1], [1, 2]]], REF, alpha=0.1)
    with pytest.raises(NotConverged, match="problem 0: probabilities that sum to"):
        solve_batch(IPO(tau=1e-150), EDGES, REF, alpha=0.1)


def test_beyond_double_precision_is_refused() -> None:
    with pytest.raises(NotConverged, match=r"problem 0: .* above the tolerance 1e-30 \(2 of 2 problems\)"):
        solve_batch(DPO(beta=1.0), EDGES, REF, alpha=0.1, tolerance=1e-30)
