"""The objectives that have an exact tabular optimum, and the derivatives that Newton's method needs.

An objective is a mean (or sum) of pair losses of `theory.losses` over weighted preference pairs, to which
`bandits.solve` may add alpha KL(pi_ref || pi). As a function of one log-ratio margin, every pair loss is one of two
shapes: a logistic loss (DPO) or a square (IPO, distillation). The values below are calls of `theory.losses`; the
slopes and curvatures are tested against SymPy's derivatives of the same functions.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from theory import losses

Floats = npt.NDArray[np.float64]

_LEAST_SCALE = 1e-150


@dataclass(frozen=True, eq=False)
class Derivatives:
    """Of a pair loss by its margin, elementwise; `magnitude` is the sum of the absolute values of the terms that the
    slope adds up, to which its rounding error is relative."""

    slope: Floats
    curvature: Floats
    magnitude: Floats


@dataclass(frozen=True, eq=False)
class Logistic:
    """softplus(-scale Delta): DPO's shape. `scale` is a number, or one a problem, [P]."""

    scale: Any

    def value(self, margins: Floats) -> Floats:
        """The loss of every margin, nats."""
        return np.asarray(losses.bradley_terry(self.scale * margins))

    def derivatives(self, margins: Floats) -> Derivatives:
        """With full relative accuracy in both tails."""
        z = self.scale * margins
        small = np.exp(-np.abs(z))
        large = 1 / (1 + small)  # sigma(|z|)
        small *= large  # sigma(-|z|)
        magnitude = self.scale * np.where(z > 0, small, large)
        return Derivatives(-magnitude, self.scale**2 * small * large, magnitude)

    def subset(self, keep: Any) -> Logistic:
        """The problems at these positions."""
        return Logistic(_last_axis(self.scale, keep))


@dataclass(frozen=True, eq=False)
class Square:
    """(target - scale Delta)^2: the shape of IPO and distillation. A number, one a problem [P], or [m, P]."""

    scale: Any
    target: Any

    def value(self, margins: Floats) -> Floats:
        """The loss of every margin, squared reward units."""
        scaled = np.asarray(self.scale * margins)
        return np.asarray(losses.distillation(scaled, np.broadcast_to(self.target, scaled.shape), beta=1))

    def derivatives(self, margins: Floats) -> Derivatives:
        """The curvature is a constant."""
        scaled = self.scale * margins
        return Derivatives(
            slope=-2 * self.scale * (self.target - scaled),
            curvature=np.broadcast_to(2 * np.square(self.scale), scaled.shape),
            magnitude=2 * self.scale * (np.abs(self.target) + np.abs(scaled)),
        )

    def subset(self, keep: Any) -> Square:
        """The problems at these positions."""
        return Square(_last_axis(self.scale, keep), _last_axis(self.target, keep))


def _last_axis(parameter: Any, keep: Any) -> Any:
    return parameter[..., keep] if np.ndim(parameter) else parameter


PairLoss = Logistic | Square


@dataclass(frozen=True, eq=False, kw_only=True)
class DPO:
    """[F] eq 6; with a KL weight, p-DPO ([F] eq 13).

    Args:
        beta: inverse scale of the implicit reward, > 0; an array [P] for a batch of P problems.

    Raises:
        ValueError: beta is not a number from 1e-150 to 1e150.
    """

    beta: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", scale("beta", self.beta))

    def pair_loss(self) -> Logistic:
        """The loss of one margin."""
        return Logistic(self.beta)


@dataclass(frozen=True, eq=False, kw_only=True)
class IPO:
    """[A] eq 17 of `theory.losses`.

    Args:
        tau: regularisation, > 0: every margin is drawn to 1 / (2 tau); an array [P] for a batch.

    Raises:
        ValueError: tau is not a number from 1e-150 to 1e150.
    """

    tau: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "tau", scale("tau", self.tau))

    def pair_loss(self) -> Square:
        """The loss of one margin."""
        return Square(1.0, 1 / (2 * self.tau))


@dataclass(frozen=True, eq=False, kw_only=True)
class Distillation:
    """[F] eq 7; with a KL weight, dp-DPO.

    Args:
        beta: inverse scale of the implicit reward, > 0; an array [P] for a batch.
        reward_margins: delta = r(y_w) - r(y_l) of every pair, [m]; [P, m] for a batch. `graph.margins(rewards)`
            makes them from the rewards of the arms.

    Raises:
        TypeError: a margin is not a real number.
        ValueError: beta is not a number from 1e-150 to 1e150, or a margin is not finite.
    """

    beta: Any
    reward_margins: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", scale("beta", self.beta))
        object.__setattr__(self, "reward_margins", finite_margins(self.reward_margins))

    def pair_loss(self) -> Square:
        """The loss of one margin."""
        return Square(self.beta, self.reward_margins)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Ensemble:
    beta: Any
    reward_margins: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", scale("beta", self.beta))
        margins = finite_margins(self.reward_margins)
        if margins.ndim != 2 or not len(margins):
            raise ValueError(f"reward_margins of an ensemble must have shape [K, m], K >= 1, got {margins.shape}")
        object.__setattr__(self, "reward_margins", margins)

    def member(self, weights: Floats) -> Distillation:
        """Distillation of one mixture of the members, weights [K]."""
        return Distillation(beta=self.beta, reward_margins=weights @ self.reward_margins)


class EnsembleMin(_Ensemble):
    """min over the members of their mean distillation loss; with a KL weight, e-DPO ([F] eq 11).

    Args:
        beta: inverse scale of the implicit reward, > 0.
        reward_margins: [K, m], a row a member.

    Raises:
        TypeError: a margin is not a real number.
        ValueError: beta is not a number from 1e-150 to 1e150, a margin is not finite, or the shape is wrong.
    """


class EnsembleHull(_Ensemble):
    """min over the *mixtures* of the members (ours, the repair of [F]'s Theorem 2). Arguments as for EnsembleMin."""


Objective = DPO | IPO | Distillation | EnsembleMin | EnsembleHull
KINDS: tuple[type, ...] = get_args(Objective)
MARGIN_KINDS: tuple[type, ...] = (DPO, IPO, Distillation)
"""The objectives that are a sum of one loss a pair."""


def positive(name: str, value: Any) -> Any:
    """The value as a float or float64 array; raises ValueError, naming it, unless all of it is finite and > 0."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}") from None
    if isinstance(value, (bool, str)) or not (np.isfinite(array) & (array > 0)).all():
        bad = value if array.ndim == 0 else array[~(np.isfinite(array) & (array > 0))][0]
        raise ValueError(f"{name} must be a finite number > 0, got {bad!r}")
    return float(array) if array.ndim == 0 else array


def scale(name: str, value: Any) -> Any:
    """As `positive`; raises ValueError too where the square, a factor of the curvature, is no normal double."""
    checked = positive(name, value)
    for bad in np.ravel(checked)[(np.ravel(checked) < _LEAST_SCALE) | (np.ravel(checked) > 1 / _LEAST_SCALE)]:
        raise ValueError(f"{name} must be from {_LEAST_SCALE:g} to {1 / _LEAST_SCALE:g}, got {bad:g}")
    return checked


def numbers(name: str, value: Any) -> Floats:
    """The value as a fresh float64 array.

    Raises:
        TypeError: it does not hold real numbers only; names it.
        ValueError: it is a list of lists of different lengths.
    """
    try:
        array = np.asarray(value)
        if array.dtype.kind == "O" and not any(isinstance(entry, str | bytes) for entry in array.flat):
            array = np.reshape([float(entry) for entry in array.flat], array.shape)  # fractions, but not None
    except ValueError as error:
        raise ValueError(f"{name} must be an array of numbers, {error}, got {described(value)}") from None
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{name} must hold real numbers, {error}, got {described(value)}") from None
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold real numbers, got {described(value)}")
    return np.array(array, dtype=np.float64)


def described(value: Any) -> str:
    """Type and value of a thing of the wrong kind, in a few words."""
    return f"{type(value).__name__}: {reprlib.repr(value)}"


def check_kind(objective: Any, *kinds: type) -> None:
    """Raises TypeError, with what would be right, unless the objective is an instance of one of these classes."""
    if not isinstance(objective, kinds):
        *names, last = (kind.__name__ for kind in kinds)
        right = f"{', '.join(names)} or {last}, made with its parameters"
        raise TypeError(f"objective must be a {right}, got {described(objective)}")


def finite_margins(margins: Any) -> Floats:
    """float64; raises ValueError, naming the pair, where a reward margin is NaN or infinite."""
    array = numbers("reward_margins", margins)
    if not np.isfinite(array).all():
        at = np.argwhere(~np.isfinite(array))[0]
        raise ValueError(f"the reward margin of pair {at[-1]} must be finite, got {array[tuple(at)]}")
    return array
