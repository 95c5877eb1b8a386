"""How far a KL weight alpha lets a policy move, and the least alpha for a budget: the row `alpha-budget` as numbers.

At the tabular optimum of mean loss + alpha KL(pi_ref || pi), or of any family of policies with logits linear in the
parameters and pi_ref at zero, J = KL(pi || pi_ref) + KL(pi_ref || pi) is at most C / alpha, whatever the data and
pi_ref. C, the *constant* of the loss, is the supremum over margins z of -z f'(z), in loss units; with prompts, where
losses and KL are averaged over them, J is the average too. A large network is neither tabular nor linear: for it,
C / budget is where to start.

    alpha_for_budget(2.0, DPO)                                                  # J of at most 2 nats, DPO: alpha 0.139
    alpha_for_budget(2.0, distillation_constant([1.3, 0.2, 2.1]))               # distilled rewards
"""

from __future__ import annotations

import math
from collections.abc import Iterable

DPO = 0.27846454276107379
"""Of DPO, whatever its beta: W(1/e), the c with c e^c = 1/e, reached at beta Delta = 1 + c. nats."""


def ipo_constant(*, tau: float) -> float:
    """1 / (8 tau^2) nats squared, reached at Delta = 1 / (4 tau).

    Raises:
        ValueError: tau is not a finite number > 0.
    """
    return 1 / (8 * _positive("tau", tau) ** 2)


def distillation_constant(reward_margins: Iterable[float]) -> float:
    """E[delta^2] / 2 in reward units squared, whatever beta; reached where every beta Delta is delta / 2.

    Args:
        reward_margins: delta of each pair, all weighing the same. For an ensemble, the largest constant of a member
            holds for e-DPO and for hull-DPO.

    Raises:
        ValueError: no margin, or one that is not finite.
    """
    squares = [float(margin) ** 2 for margin in reward_margins]
    mean = math.fsum(squares) / len(squares) if squares else math.nan
    if not math.isfinite(mean):
        raise ValueError(
            f"reward_margins must be at least one finite number, got {len(squares)} with mean square {mean}"
        )
    return mean / 2


def alpha_for_budget(budget: float, constant: float) -> float:
    """The least alpha that keeps the optimum within a budget: constant / budget, in loss units a nat.

    Each of the two KLs is at most J, so a target for one of them alone may be given as the budget; for small moves
    each is about J / 2. A controller that adapts alpha to a target of the KL (dual ascent) may start here: the
    tabular optimum keeps the target then, and the alpha that it looks for is at most this one.

    Args:
        budget: what J may be at most, > 0, nats.
        constant: of the loss: `DPO`, `ipo_constant` or `distillation_constant`; times the total weight where the losses
            of the pairs are summed instead of averaged.

    Raises:
        ValueError: one of them is not a finite number > 0.
    """
    return _positive("constant", constant) / _positive("budget", budget)


def divergence_bound(alpha: float, constant: float) -> float:
    """The largest J that an alpha allows, nats: the inverse of `alpha_for_budget`.

    Raises:
        ValueError: one of them is not a finite number > 0.
    """
    return _positive("constant", constant) / _positive("alpha", alpha)


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
    return value
