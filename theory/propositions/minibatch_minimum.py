"""The minimum over the members taken on each mini-batch: the batch size is part of what e-DPO minimises.

With L_i(B) member i's mean distillation loss on a batch B, training on random batches of b pairs minimises
E_b = E_B[min_i L_i(B)]. A mean over b + 1 pairs is the mean of its means over b of them, and a minimum of means is at
least the mean of the minima: so E_b rises with b, from every pair choosing its own member to the loss of the data set.
What is 0 at batch size 1 is not a member's policy but any mixture that takes each pair from another member.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import losses
from theory.claim import CheckFailed, Claim, require
from theory.preferences import Floats, PreferenceGraph
from theory.strategies import matrices, positive, vectors

HALF = sp.Rational(1, 2)

Batch = tuple[int, ...]
Batches = Callable[[int, int], list[Batch]]
"""(pairs, batch size) -> the batches that are drawn."""
Objective = Callable[[Any, Any, Any, Batch], Any]
"""(log-ratio margins [N], members' reward margins [K, N], beta, batch) -> loss of the batch."""


def all_batches(pairs: int, size: int) -> list[Batch]:
    """Every set of `size` pairs: what reshuffling in each epoch draws."""
    return list(combinations(range(pairs), size))


def batch_loss(margins: Any, members: Any, beta: Any, batch: Batch) -> Any:
    """Mean of `losses.ensemble_min` on the batch, whose members are chosen on the batch."""
    chosen = list(batch)
    return losses.ensemble_min(margins[chosen], members[:, chosen], beta=beta).sum() / len(batch)


def member_loss(margins: Any, members: Any, beta: Any, batch: Batch, i: int) -> Any:
    """L_i(B), from the distillation loss alone."""
    chosen = list(batch)
    return losses.distillation(margins[chosen], members[i, chosen], beta=beta).sum() / len(batch)


@dataclass(frozen=True)
class Ensemble:
    """Pairs, and the rewards of K members, exactly."""

    graph: PreferenceGraph
    rewards: Sequence[Sequence[int]]
    beta: Any

    @property
    def members(self) -> Any:
        """Reward margins, object array [K, N] of SymPy integers."""
        margins = self.graph.margins(np.array(self.rewards))
        return np.array([[sp.Integer(int(d)) for d in row] for row in margins], dtype=object)


def disjoint(members: Sequence[Sequence[int]]) -> Ensemble:
    """Pairs that share no response, with the given margins [K, N]; beta = 1/2."""
    n = len(members[0])
    rewards = [[d * (1 - side) for d in row for side in (0, 1)] for row in members]
    return Ensemble(PreferenceGraph(2 * n, [(2 * i, 2 * i + 1) for i in range(n)]), rewards, HALF)


THREE_PAIRS = disjoint([[0, 1, 2], [1, 3, -1]])
FOUR_PAIRS = disjoint([[0, 1, 2, 1], [1, 3, -1, 0]])
CHAIN = Ensemble(PreferenceGraph.chain(4), [[3, 3, 2, 0], [6, 5, 2, 3], [0, 1, 1, 0]], sp.Integer(2))
TRIANGLE = Ensemble(PreferenceGraph(3, [(0, 1), (1, 2), (0, 2)]), [[2, 1, 0], [5, 3, 0]], HALF)
TIED = disjoint([[0, 0, 1], [0, 1, 0], [1, 0, 0]])


# ---------------------------------------------------------------- checks


def check_batch_loss(ensemble: Ensemble, objective: Objective = batch_loss) -> None:
    """The loss of every batch is the smallest member's mean on it, near each member in turn; the Gram matrix's diagonal
    holds these means."""
    members, n, beta = ensemble.members, len(ensemble.graph), ensemble.beta
    for near in members:
        margins = (near + sp.Rational(1, 3)) / beta
        for batch in (batch for size in range(1, n + 1) for batch in all_batches(n, size)):
            means = [member_loss(margins, members, beta, batch, i) for i in range(len(members))]
            require(objective(margins, members, beta, batch) == min(means), f"another loss on {batch}")
            gram = losses.ensemble_gram(margins[list(batch)], members[:, list(batch)], beta=beta)
            require(list(gram.diagonal()) == means, f"the Gram matrix of {batch} does not hold the members' losses")


def check_rises(most: int) -> None:
    """A mean over b + 1 numbers is the mean of its means over b of them, for b < most; min_i is concave."""
    for b in range(1, most):
        values = sp.symbols(f"L0:{b + 1}", real=True)
        means = [sum(values[i] for i in batch) / sp.Integer(b) for batch in all_batches(b + 1, b)]
        require(sp.expand(sum(means) / (b + 1) - sum(values) / sp.Integer(b + 1)) == 0, f"not so for b = {b}")


def expected_losses(
    ensemble: Ensemble, margins: Any, batches: Batches = all_batches, objective: Objective = batch_loss
) -> list[Any]:
    """[E_1, ..., E_N], exactly."""
    n = len(ensemble.graph)
    drawn = [batches(n, size) for size in range(1, n + 1)]
    return [
        sum(objective(margins, ensemble.members, ensemble.beta, batch) for batch in of_size) / len(of_size)
        for of_size in drawn
    ]


def check_order(ensemble: Ensemble, objective: Objective = batch_loss) -> None:
    """E_1 <= E_2 <= ... <= E_N = min_i L_i, and the first is strictly below the last, at a mixture of two members."""
    members, n = ensemble.members, len(ensemble.graph)
    margins = np.array([members[i % 2, i] for i in range(n)], dtype=object) / ensemble.beta
    losses_by_size = expected_losses(ensemble, margins, objective=objective)
    require(all(a <= b for a, b in pairwise(losses_by_size)), f"{losses_by_size} fall")
    everything = tuple(range(n))
    least = min(member_loss(margins, members, ensemble.beta, everything, i) for i in range(len(members)))
    require(losses_by_size[-1] == least, "the largest batch does not have the data set's loss")
    require(bool(losses_by_size[0] < least), "batch size 1 has the data set's loss")


def zero_loss_policies(ensemble: Ensemble, size: int, batches: Batches = all_batches) -> set[tuple[Any, ...]]:
    """Margins beta Delta, [N], of every policy with loss 0 on all batches, among those that take each pair from some
    member or fit it for none; policies exist only where the margins add up round every cycle of pairs."""
    members, n = ensemble.members, len(ensemble.graph)
    circulations = sp.Matrix(ensemble.graph.incidence.toarray().astype(int)).T.nullspace()
    choices = [[*sorted(set(members[:, e])), max(members[:, e]) + HALF] for e in range(n)]
    found = set()
    for values in product(*choices):
        if any(sum(z * d for z, d in zip(walk, values, strict=True)) != 0 for walk in circulations):
            continue
        margins = np.array(values, dtype=object) / ensemble.beta
        if all(batch_loss(margins, members, ensemble.beta, batch) == 0 for batch in batches(n, size)):
            found.add(values)
    return found


def check_zero_loss(ensemble: Ensemble, size: int, batches: Batches = all_batches) -> None:
    """At batch size 1 the policies with loss 0 are all mixtures by pair, K^N of them; from size 2 on the members."""
    members, n = ensemble.members, len(ensemble.graph)
    mixtures = {tuple(members[i, e] for e, i in enumerate(choice)) for choice in product(range(len(members)), repeat=n)}
    claimed = mixtures if size == 1 else {tuple(row) for row in members}
    require(len(claimed) == len(members) ** (n if size == 1 else 1), "some of the claimed policies are the same")
    found = zero_loss_policies(ensemble, size, batches)
    require(found == claimed, f"batches of {size}: {len(found)} policies with loss 0, not those {len(claimed)}")


def check_micro_batches(ensemble: Ensemble, global_gram: bool = True) -> None:
    """Micro-batches that are given the Gram matrix of the whole batch choose its member: their losses add up to it."""
    members, n = ensemble.members, len(ensemble.graph)
    margins = np.array([members[i % 2, i] for i in range(n)], dtype=object) / ensemble.beta
    gram = losses.ensemble_gram(margins, members, beta=ensemble.beta) if global_gram else None
    parts = [losses.ensemble_min(margins[[e]], members[:, [e]], beta=ensemble.beta, gram=gram).sum() for e in range(n)]
    whole = n * batch_loss(margins, members, ensemble.beta, tuple(range(n)))
    require(sum(parts) == whole, f"the micro-batches' losses add up to {sum(parts)}, not {whole}")


def prove_on(ensemble: Ensemble) -> None:
    check_batch_loss(ensemble)
    check_order(ensemble)
    check_micro_batches(ensemble)
    for size in range(1, len(ensemble.graph) + 1):
        check_zero_loss(ensemble, size)


def prove() -> None:
    check_rises(6)
    for ensemble in (THREE_PAIRS, CHAIN):
        prove_on(ensemble)


def _ensembles(largest: int) -> Iterator[Floats]:
    """Every two members on three pairs that differ on each, margins 0 ... largest, [2, 3]."""
    pairs = [(a, b) for a in range(largest + 1) for b in range(largest + 1) if a != b]
    for columns in product(pairs, repeat=3):
        yield np.array(columns, dtype=np.float64).T


def enumerate_ensembles(thorough: bool) -> str:
    """In floating point, which is exact on such numbers: zero-loss policies on a grid that holds much more."""
    largest, count = (2 if thorough else 1), 0
    for members in _ensembles(largest):
        for size, expected in ((1, 8), (2, 2), (3, 2)):
            zero = 0
            for values in product(np.arange(-0.5, largest + 0.75, 0.5), repeat=3):
                margins = np.array(values)
                zero += all(batch_loss(margins, members, 1.0, batch) == 0 for batch in all_batches(3, size))
            require(zero == expected, f"{zero} policies with loss 0 at batch size {size}, members {members.tolist()}")
        count += 1
    rng = np.random.default_rng(0)
    members, margins = rng.normal(size=(4, 12)), rng.normal(size=12)
    by_size = [np.mean([batch_loss(margins, members, 1.0, b) for b in all_batches(12, size)]) for size in (1, 3, 12)]
    require(by_size[0] < by_size[1] < by_size[2], f"E_b falls: {by_size}")
    shown = ", ".join(f"{x:.2f}" for x in by_size)
    return f"all {count} pairs of members on 3 pairs, margins in 0..{largest}; E_b {shown} at b = 1, 3, 12 of 12 pairs"


# ---------------------------------------------------------------- without each assumption


def _fixed_batches(pairs: int, size: int) -> list[Batch]:
    """The same consecutive batches in every epoch."""
    return [tuple(range(start, min(start + size, pairs))) for start in range(0, pairs, size)]


def _breaks(check: Callable[[], None], description: str) -> str:
    try:
        check()
    except CheckFailed:
        return description
    raise CheckFailed("the statement holds without it")


def _check_cycle() -> None:
    check_zero_loss(TRIANGLE, 1)


def _check_ties() -> None:
    check_zero_loss(TIED, 2)


def _check_fixed() -> None:
    check_zero_loss(FOUR_PAIRS, 2, _fixed_batches)


def _cycle_of_pairs() -> str:
    require(len(zero_loss_policies(TRIANGLE, 1)) == 2, "another number of policies")
    return _breaks(
        _check_cycle, "a triangle of pairs, 2 members: of the 8 mixtures by pair only the 2 members' are policies"
    )


def _ties() -> str:
    require((0, 0, 0) in zero_loss_policies(TIED, 2), "the policy has a positive loss")
    return _breaks(
        _check_ties,
        "3 pairs, margins (0, 0, 1), (0, 1, 0), (1, 0, 0): beta Delta = 0, no member's, has loss 0 at batch size 2",
    )


def _fixed() -> str:
    require(len(zero_loss_policies(FOUR_PAIRS, 2, _fixed_batches)) == 4, "another number of policies")
    return _breaks(
        _check_fixed, "4 pairs, always batched as {0, 1} and {2, 3}: 4 policies with loss 0, a member for each batch"
    )


# ---------------------------------------------------------------- properties


@given(matrices(3, 5), vectors(5), positive(0.1, 5))
def expectation_rises_with_the_batch(members: Floats, margins: Floats, beta: float) -> None:
    """NumPy: E_1 <= ... <= E_5 = min_i L_i."""
    by_size = [
        np.mean([batch_loss(margins, members, beta, batch) for batch in all_batches(5, size)]) for size in range(1, 6)
    ]
    assert (np.diff(by_size) >= -1e-12 * (1 + by_size[-1])).all(), by_size
    whole = min(losses.distillation(margins, member, beta=beta).mean() for member in members)
    assert abs(by_size[-1] - whole) <= 1e-12 * (1 + whole)


@given(matrices(3, 6), vectors(6), positive(0.1, 5), st.integers(1, 6))
def torch_micro_batches_with_the_global_gram(members: Floats, margins: Floats, beta: float, size: int) -> None:
    """torch: with the global Gram matrix the micro-batches' gradients are the whole batch's; without, at size 1, they
    are those of distilling each pair's nearest member."""
    import torch

    rewards, delta = torch.tensor(members), torch.tensor(margins, requires_grad=True)
    gram = losses.ensemble_gram(delta, rewards, beta=beta)

    def gradient(size: int, gram: Any) -> Any:
        batches = _fixed_batches(6, size)
        total = sum(
            losses.ensemble_min(delta[list(b)], rewards[:, list(b)], beta=beta, gram=gram).sum() for b in batches
        )
        return torch.autograd.grad(total, delta)[0]

    assert torch.equal(gradient(size, gram), gradient(6, None))
    nearest = np.abs(members - beta * margins).argmin(axis=0)
    own = -2 * beta * (members[nearest, np.arange(6)] - beta * margins)
    assert np.abs(gradient(1, None).numpy() - own).max() <= 1e-12 * (1 + beta**2)


CLAIMS = (
    Claim(
        id="remark-minibatch-min",
        source="[F] footnote 5, on the minimum over the members; sharpened",
        statement=(
            "With the minimum over members taken on random batches of b pairs, e-DPO minimises E_B[min_i L_i(B)]. It "
            "rises with b, up to min_i L_i on the data set: the batch size is part of the objective. At b = 1 its "
            "zeros are all mixtures that take each pair from some member, from b = 2 on the members alone. "
            "Micro-batches with the Gram matrix of the batch leave it as it is."
        ),
        formula=r"E_b=\mathbb E_{|B|=b}\min_iL_i(B)\le E_{b+1}\le\min_iL_i;\qquad"
        r"\#\{\pi:E_b=0\}=K^N\ (b=1),\quad K\ (b\ge2)",
        domain="finitely many responses, pairs and members; tabular; values and zeros of the objective, no flow",
        losses=("ensemble_min", "ensemble_gram", "member_weights", "distillation"),
        assumptions={
            "forest": "the pairs form no cycle, so that every mixture by pair is some policy's (for b = 1)",
            "distinct margins": "no two members agree on the margin of a pair (for b >= 2)",
            "reshuffled": "every set of b pairs is drawn (for b >= 2)",
        },
        prove=prove,
        counterexamples={"forest": _cycle_of_pairs, "distinct margins": _ties, "reshuffled": _fixed},
        controls={
            "without forest": _check_cycle,
            "without distinct margins": _check_ties,
            "without reshuffled": _check_fixed,
            "micro-batches that choose on their own": lambda: check_micro_batches(THREE_PAIRS, global_gram=False),
            "the hull in place of the minimum": lambda: check_batch_loss(
                THREE_PAIRS,
                lambda m, r, beta, batch: (
                    losses.ensemble_hull(m[list(batch)], r[:, list(batch)], beta=beta).sum() / len(batch)
                ),
            ),
            "always the first member": lambda: check_batch_loss(
                THREE_PAIRS, lambda m, r, beta, batch: member_loss(m, r, beta, batch, 0)
            ),
            "mean of the members' losses": lambda: check_order(
                THREE_PAIRS,
                lambda m, r, beta, batch: sum(member_loss(m, r, beta, batch, i) for i in range(len(r))) / len(r),
            ),
            "the worst member": lambda: check_order(
                THREE_PAIRS,
                lambda m, r, beta, batch: max(member_loss(m, r, beta, batch, i) for i in range(len(r))),
            ),
        },
        enumerate=enumerate_ensembles,
        properties=(expectation_rises_with_the_batch, torch_micro_batches_with_the_global_gram),
        sharpens=True,
    ),
)
