"""alpha by a budget: dual ascent that holds KL(pi_ref || pi) at a target while a policy trains.

The minimiser of the data's loss subject to KL <= target is that of loss + alpha KL for the multiplier alpha >= 0 of the
constraint (the rows `prop4` and `prop4-pdpo` of the ledger), and the dual function's slope in alpha is KL - target. So
alpha rises while the KL is above the target and falls while it is below: where the constraint does not bind, to nearly
0.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from datasets import Dataset

from lm.data.scored import MARGIN, MEMBER_MARGINS, REF_SAMPLES
from lm.objectives import Method, Pessimism
from theory.budget import alpha_for_budget
from theory.records import write_json

SMOOTHING = 0.9
"""What the running mean of the KL keeps a step: one mini-batch's estimate has a large variance. [set]"""
DAMPING = 1.0
"""How many times the excess, KL / target - 1, log alpha is above the multiplier's. It is 0 where the KL is at the
target, and keeps the two, which answer each other late, from swinging. [set]"""
RANGE = 1e5
"""The multiplier is kept within its start / RANGE and its start * RANGE: a KL that took thousands of steps to grow, or
never could be lowered, leaves none behind that takes as many to come back. [set]"""
FILE = "dual_ascent.json"
"""Of a checkpoint."""


class DualAscent:
    """The multiplier, and the alpha of the next step.

    In logarithms, which keeps alpha > 0 and makes one rate do for rewards of any scale, of which alpha is a multiple. A
    step's alpha is decided by the steps before it: it has nothing to do with the noise of that step's own estimate.

    Args:
        start: the first step's alpha, > 0.
        target: of the KL, nats, > 0.
        rate: what log alpha moves a step at most, > 0.
    """

    def __init__(self, *, start: float, target: float, rate: float) -> None:
        self.start, self.target, self.rate = start, target, rate
        self.multiplier = self.last = start
        """The dual variable, and the alpha of the step before."""
        self._mean: float | None = None

    @property
    def _excess(self) -> float:
        """Of the KL, relative to the target, between -1 and 1."""
        return 0.0 if self._mean is None else min(max(self._mean / self.target - 1, -1.0), 1.0)

    @property
    def alpha(self) -> float:
        """Of the next step."""
        return self.multiplier * math.exp(DAMPING * self._excess)

    def step(self, kl: float) -> None:
        """After a step whose mini-batch had this mean KL, nats."""
        self.last = self.alpha
        self._mean = kl if self._mean is None else SMOOTHING * self._mean + (1 - SMOOTHING) * kl
        moved = self.multiplier * math.exp(self.rate * self._excess)
        self.multiplier = min(max(moved, self.start / RANGE), self.start * RANGE)

    def save(self, folder: Path) -> None:
        """Into a checkpoint."""
        write_json(folder / FILE, {"multiplier": self.multiplier, "last": self.last, "mean": self._mean})

    def load(self, folder: Path) -> None:
        """From a checkpoint, to the bit."""
        state = json.loads((folder / FILE).read_text(encoding="utf-8"))
        self.multiplier, self.last, self._mean = state["multiplier"], state["last"], state["mean"]


def ascent_of(method: Method, pairs: Dataset) -> DualAscent | None:
    """The ascent to the target of a method that has one.

    Raises:
        ValueError: the pairs lack what the estimate of the KL needs, or no alpha to start at follows from them.
    """
    kl = method.pessimism
    if kl is None or kl.target is None:
        return None
    if method.needs_samples and REF_SAMPLES not in pairs.column_names:
        raise ValueError(
            f"{method.pessimism_option}.target is held by samples of pi_ref, but the pairs have no ref_sample_logps; "
            'score them, or set samples to "preferences"'
        )
    return DualAscent(start=first_alpha(method, kl, pairs), target=kl.target, rate=kl.rate)


def first_alpha(method: Method, kl: Pessimism, pairs: Dataset) -> float:
    """Where the ascent starts: as configured, else at the least alpha by which the tabular optimum keeps the target,
    whatever the labels (the row `alpha-budget`): the KL is at most J there."""
    assert kl.target is not None
    if kl.first_alpha is not None:
        return kl.first_alpha
    margins = (pairs[name][:] if name in pairs.column_names else None for name in (MARGIN, MEMBER_MARGINS))
    constant = method.divergence_constant(*margins)
    if not constant > 0:
        raise ValueError(
            f"{method.pessimism_option}.target: no alpha to start at follows from reward margins that are all 0; give "
            "alpha_start and alpha_end one number > 0"
        )
    return alpha_for_budget(kl.target, constant)
