"""The primitives that differ between SymPy, NumPy and torch; everything else is plain arithmetic.

A loss in `theory.losses` is written once. It asks `backend_of` which library its arguments
belong to and gets the handful of functions whose stable form differs there. Neither torch nor SymPy is
imported unless the caller already holds one of its objects.

SymPy arguments are expressions, or NumPy object arrays of expressions where a loss takes a batch.
"""

from __future__ import annotations

import math
import numbers
import sys
from fractions import Fraction
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor as Tensor
else:
    Tensor = Any
"""torch's, where only such may stand; torch itself is not imported for it."""

Array = Any
"""A SymPy expression, a NumPy array (of numbers or of SymPy expressions) or a torch tensor."""


class NumpyBackend:
    """NumPy floats. Stable in float32 and float64."""

    name = "numpy"

    def logsigmoid(self, z: Array) -> Array:
        """log sigma(z), elementwise."""
        with np.errstate(invalid="ignore"):  # a NaN propagates, as everywhere else, without a warning
            return -np.logaddexp(0, -z)

    def exp(self, z: Array) -> Array:
        """e^z, elementwise."""
        return np.exp(z)

    def relu(self, z: Array) -> Array:
        """max(0, z), elementwise."""
        return np.maximum(z, 0)

    def log1mexp(self, z: Array) -> Array:
        """log(1 - e^z) for z <= 0, elementwise; -inf at 0."""
        near_zero = z > -math.log(2)
        with np.errstate(divide="ignore"):
            return np.where(
                near_zero,
                np.log(-np.expm1(np.where(near_zero, z, -1.0))),
                np.log1p(-np.exp(np.where(near_zero, -1.0, z))),
            ).astype(np.result_type(z), copy=False)[()]

    def relative_entropy(self, log_p: Array, log_q: Array) -> Array:
        """sum over the last axis of p (log p - log q); an outcome with p = 0 adds nothing, whatever its q."""
        present = log_p != -np.inf  # a NaN is present, and propagates
        return np.sum(np.exp(log_p) * (np.where(present, log_p, 0.0) - np.where(present, log_q, 0.0)), axis=-1)

    def one_hot_argmin(self, values: Array) -> Array:
        """[K] -> [K], one at the first smallest entry."""
        return np.eye(len(values), dtype=values.dtype)[int(np.argmin(values))]

    def hull_argmin(self, gram: Array) -> Array:
        """argmin over the simplex of w' gram w, gram [K, K] positive semi-definite."""
        return _min_norm_weights(gram)

    def constant(self, value: Array) -> Array:
        """The value, with no gradient flowing through it."""
        return value


class TorchBackend:
    """torch tensors of any floating dtype, on any device. Only made once a tensor has been passed."""

    name = "torch"

    def __init__(self) -> None:
        import torch

        self._torch = torch

    def logsigmoid(self, z: Array) -> Array:
        """log sigma(z). (`softplus` of torch is linear above 20, which float64 notices.)"""
        return self._torch.nn.functional.logsigmoid(z)

    def exp(self, z: Array) -> Array:
        """e^z, elementwise."""
        return self._torch.exp(z)

    def relu(self, z: Array) -> Array:
        """max(0, z), elementwise; slope 0 at the kink."""
        return self._torch.relu(z)

    def log1mexp(self, z: Array) -> Array:
        """log(1 - e^z) for z <= 0. Each branch sees a harmless stand-in where the other applies, so that no
        infinite derivative is multiplied by zero in the backward pass."""
        where = self._torch.where
        near_zero = z > -math.log(2)
        stand_in = self._torch.full_like(z, -1.0)
        return where(
            near_zero,
            self._torch.log(-self._torch.expm1(where(near_zero, z, stand_in))),
            self._torch.log1p(-self._torch.exp(where(near_zero, stand_in, z))),
        )

    def relative_entropy(self, log_p: Array, log_q: Array) -> Array:
        """sum over the last axis of p (log p - log q); an outcome with p = 0 adds nothing, to the gradient either."""
        where, present = self._torch.where, log_p != -math.inf  # a NaN is present, and propagates
        return (self._torch.exp(log_p) * (where(present, log_p, 0.0) - where(present, log_q, 0.0))).sum(-1)

    def one_hot_argmin(self, values: Array) -> Array:
        """[K] -> [K], one at the first smallest entry."""
        return self._torch.nn.functional.one_hot(values.argmin(), len(values)).to(values.dtype)

    def hull_argmin(self, gram: Array) -> Array:
        """argmin over the simplex of w' gram w; solved in float64 on the host, K numbers."""
        weights = _min_norm_weights(gram.detach().double().cpu().numpy())
        return self._torch.as_tensor(weights, dtype=gram.dtype, device=gram.device)

    def constant(self, value: Array) -> Array:
        """The value, detached."""
        return value.detach()


class SympyBackend:
    """Exact expressions; object arrays are mapped entry by entry."""

    name = "sympy"

    def __init__(self) -> None:
        import sympy

        self._sympy = sympy

    def _map(self, function: Any, z: Array) -> Array:
        return np.frompyfunc(function, 1, 1)(z) if isinstance(z, np.ndarray) else function(z)

    def logsigmoid(self, z: Array) -> Array:
        """log sigma(z) = -log(1 + e^-z)."""
        return self._map(lambda x: -self._sympy.log(1 + self._sympy.exp(-x)), z)

    def exp(self, z: Array) -> Array:
        """e^z."""
        return self._map(self._sympy.exp, z)

    def relu(self, z: Array) -> Array:
        """max(0, z) as a Piecewise; slope 0 at the kink, as torch has it."""
        return self._map(lambda x: self._sympy.Piecewise((x, x > 0), (0, True)), z)

    def log1mexp(self, z: Array) -> Array:
        """log(1 - e^z)."""
        return self._map(lambda x: self._sympy.log(1 - self._sympy.exp(x)), z)

    def relative_entropy(self, log_p: Array, log_q: Array) -> Array:
        """sum over the last axis of p (log p - log q); all finite."""
        return np.sum(self.exp(log_p) * (log_p - log_q), axis=-1)

    def one_hot_argmin(self, values: Array) -> Array:
        """[K] -> [K] of Piecewise; ties go to the first, as in NumPy and torch."""
        sp = self._sympy
        return np.array(
            [
                sp.Piecewise(
                    (1, sp.And(*[(v < u) if j < i else (v <= u) for j, u in enumerate(values) if j != i])), (0, True)
                )
                for i, v in enumerate(values)
            ],
            dtype=object,
        )

    def hull_argmin(self, gram: Array) -> Array:
        """argmin over the simplex of w' gram w: the first support, smallest first, that meets the KKT conditions.

        A solution with affinely independent support always exists, so singular supports are passed over.
        """
        sp, k = self._sympy, len(gram)
        pieces: list[tuple[list[Any], Any]] = []
        for size in range(1, k + 1):
            for support in combinations(range(k), size):
                index = list(support)
                bordered = sp.zeros(size + 1, size + 1)
                bordered[:size, :size] = sp.Matrix(gram[np.ix_(index, index)])
                bordered[:size, size] = sp.ones(size, 1)
                bordered[size, :size] = sp.ones(1, size)
                determinant = sp.simplify(bordered.det())
                if determinant == 0:
                    continue
                inner = bordered.adjugate()[:size, size] / determinant
                weights = [sp.Integer(0)] * k
                for position, member in enumerate(support):
                    weights[member] = sp.simplify(inner[position])
                slopes = list(gram @ np.array(weights, dtype=object))
                value = slopes[support[0]]
                kkt = [w >= 0 for w in weights] + [s >= value for j, s in enumerate(slopes) if j not in support]
                pieces.append((weights, sp.And(sp.Ne(determinant, 0), *kkt)))
        return np.array(
            [sp.Piecewise(*[(weights[i], condition) for weights, condition in pieces]) for i in range(k)], dtype=object
        )

    def constant(self, value: Array) -> Array:
        """The value itself: SymPy has no notion of a stopped gradient."""
        return value


def _min_norm_weights(gram: np.ndarray) -> np.ndarray:
    """Weights on the simplex of the point of smallest norm in the hull of vectors whose Gram matrix this is.

    With x = t w, t = sum(x), the non-negative least-squares objective |E x|^2 + (sum(x) - 1)^2 has
    minimum q / (1 + q) over t, q = w' gram w, which rises with q: so the active-set NNLS solver gives the
    exact simplex solution after normalisation.
    """
    from scipy.optimize import nnls  # half of the time that the import of this module would take

    gram64 = np.asarray(gram, dtype=np.float64)
    if not np.isfinite(gram64).all():
        raise ValueError("gram of the ensemble residuals must be finite: a reward or log-prob is NaN or infinite")
    scale = np.trace(gram64)
    if scale <= 0:  # every member fits exactly
        return np.asarray(np.eye(len(gram64))[0], dtype=gram.dtype)
    values, vectors = np.linalg.eigh(gram64 / scale)
    root = np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T
    k = len(gram64)
    weights, _ = nnls(np.vstack([root, np.ones(k)]), np.append(np.zeros(k), 1.0))
    return np.asarray(weights / weights.sum(), dtype=gram.dtype)


_BACKENDS: dict[str, Any] = {}
Backend = NumpyBackend | TorchBackend | SympyBackend


def _backend(name: str) -> Backend:
    if name not in _BACKENDS:
        _BACKENDS[name] = {"numpy": NumpyBackend, "torch": TorchBackend, "sympy": SympyBackend}[name]()
    backend: Backend = _BACKENDS[name]
    return backend


def _is_sympy(value: Any) -> bool:
    sympy = sys.modules.get("sympy")
    return sympy is not None and isinstance(value, sympy.Expr)


def _is_exact(value: Any) -> bool:
    return isinstance(value, (int, Fraction)) and not isinstance(value, bool)


def _library(name: str, value: Any) -> str:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name} has dtype {value.dtype}; a floating-point tensor is needed")
        return "torch"
    if _is_sympy(value):
        return "sympy"
    if isinstance(value, np.ndarray) and value.dtype == object:
        if all(_is_sympy(entry) or _is_exact(entry) for entry in value.flat):
            return "sympy"
        raise TypeError(f"{name} is an object array whose entries are not all SymPy expressions: {value!r}")
    if isinstance(value, bool) or (isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in "fiu"):
        raise TypeError(f"{name} must hold real numbers, got {value!r}")
    if isinstance(value, np.ndarray | np.generic | numbers.Real):
        return "numpy"
    raise TypeError(
        f"{name} must be a SymPy expression, a NumPy array or a torch tensor, got {type(value).__name__}: {value!r}"
    )


def backend_of(**arrays: Array) -> tuple[Any, ...]:
    """(backend, *arrays): the library that the named arguments share, and the arguments as that library's arrays.

    Python and NumPy integers become floats in NumPy; exact numbers (int, Fraction) become SymPy numbers next to
    SymPy expressions. Raises TypeError where the libraries differ or an argument is of none of them.
    """
    libraries = {name: _library(name, value) for name, value in arrays.items()}
    if "sympy" in libraries.values():
        exact = {name for name, value in arrays.items() if isinstance(value, (int, Fraction))}
        libraries = {name: "sympy" if name in exact else library for name, library in libraries.items()}
    if len(set(libraries.values())) > 1:
        listing = ", ".join(f"{name} is {library}" for name, library in libraries.items())
        raise TypeError(f"all arguments must come from one library, but {listing}")
    backend = _backend(next(iter(libraries.values())))
    return (backend, *[_as_array(backend, value) for value in arrays.values()])


def _as_array(backend: Backend, value: Array) -> Array:
    if backend.name == "numpy":
        array = np.asarray(value)
        return array.astype(np.float64) if array.dtype.kind in "iu" else array
    if backend.name == "sympy" and isinstance(value, (int, Fraction, np.ndarray)):
        import sympy

        # Entry by entry too: a quotient of Python integers left in an object array would be a float.
        return np.frompyfunc(sympy.sympify, 1, 1)(value) if isinstance(value, np.ndarray) else sympy.Rational(value)
    return value


def shape_of(value: Array) -> tuple[int, ...]:
    """The shape; () for a SymPy expression."""
    return tuple(getattr(value, "shape", ()))


def same_shapes(**arrays: Array) -> None:
    """Raises ValueError, with every name and shape, unless all shapes are equal (nothing is broadcast)."""
    shapes = {name: shape_of(value) for name, value in arrays.items()}
    if len(set(shapes.values())) > 1:
        listing = ", ".join(f"{name} has shape {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes must be equal, but {listing}")


def hyperparameter(backend: Backend, name: str, value: Any, *, positive: bool) -> Any:
    """The value, if it is a finite real > 0 (or >= 0): an exact one is SymPy's next to SymPy arrays, any other a float.

    A SymPy symbol passes unless its assumptions say no. Raises TypeError or ValueError with the name and the value.
    """
    bound = "> 0" if positive else ">= 0"
    if _is_sympy(value) and backend.name != "sympy":
        raise TypeError(f"{name} is the SymPy expression {value}, but the arrays are of {backend.name}")
    if isinstance(value, bool) or not (isinstance(value, numbers.Real) or _is_sympy(value)):
        raise TypeError(f"{name} must be a real number {bound}, got {type(value).__name__}: {value!r}")
    if _is_sympy(value) and not (value.is_number and value.is_real):
        sign = value.is_positive if positive else value.is_nonnegative
        refused = value.is_number or value.is_real is False or sign is False
    else:
        number = float(value)
        refused = not math.isfinite(number) or number < 0 or (positive and number == 0)
    if refused:
        raise ValueError(f"{name} must be a finite number {bound}, got {value}")
    # A plain float: NumPy's scalars would widen float32 arrays, fractions would make object arrays of them.
    return _as_array(backend, value) if backend.name == "sympy" else number
