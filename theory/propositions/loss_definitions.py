"""The losses are what the papers define: each function, on symbols, against its formula written here a second time.

Every other row is about the functions of `theory.losses`; this one is what ties their names to the papers. A theorem
that would hold as well for twice a loss, or for one that takes beta = -1, cannot notice such a change; this row does.

To add a loss: one entry in DEFINITIONS. Without it the proof fails with the name of the function.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from theory import losses
from theory.algebra import vanishes
from theory.backend import SympyBackend
from theory.claim import CheckFailed, Claim, loss_names, require

POSITIVE, NOT_NEGATIVE, SHARE = sp.Interval.open(0, sp.oo), sp.Interval(0, sp.oo), sp.Interval(0, 1)
FLIPPED = sp.Interval.Ropen(0, sp.Rational(1, 2))
"""Where hyper-parameters live."""

Loss = Callable[..., Any]


# ---------------------------------------------------------------- exact comparison


def require_equal(got: Any, want: Any, what: str) -> None:
    """Two expressions are the same function of their symbols, by simplification.

    A wrong one is told at a point of small rationals, where it is quicker than simplifying what does not vanish.
    """
    difference = sp.sympify(got) - sp.sympify(want)
    point = {s: sp.Rational(3 + i, 7 + 2 * i) for i, s in enumerate(sorted(difference.free_symbols, key=str))}
    require(abs(difference.subs(point).evalf(30)) < 1e-20, f"{what} is {got}, not {want}")
    # Sums in logarithms and powers as products, which those split: log(1 + e^-x) = log(1 + e^x) - x.
    unified = (
        difference.replace(sp.Piecewise, positive_part)
        .replace(sp.log, lambda x: sp.expand_log(sp.log(sp.factor(x))))
        .replace(sp.Pow, lambda base, power: sp.expand_power_base(sp.factor(base) ** power))
    )
    require(vanishes(sp.expand(unified)), f"{what} is not shown to be {want}")


def positive_part(*pieces: Any) -> sp.Expr:
    """Max(0, x) for the pieces x where x > 0 and else 0, as the backend writes it; any others as they are."""
    whole, x = sp.Piecewise(*pieces), pieces[0][0]
    return sp.Max(0, x) if whole == sp.Piecewise((x, x > 0), (0, True)) else whole


def require_refused(what: str, loss: Loss, *arguments: Any, naming: str = "", **hyper: Any) -> None:
    """The call raises ValueError, with this name in its message."""
    try:
        loss(*arguments, **hyper)
    except ValueError as error:
        require(naming in str(error), f"{what} is refused without the name {naming}: {error}")
        return
    raise CheckFailed(f"{what} is accepted")


# ---------------------------------------------------------------- losses of one pair at a time


def argument(kind: str, name: str) -> sp.Expr:
    """A symbol that runs through all of a kind: "real", "length" (> 0), or "logp", the log of a p in (0, 1)."""
    if kind == "logp":
        return sp.log(1 / (1 + sp.Symbol(f"odds_{name}", positive=True)))
    return sp.Symbol(name, positive=True) if kind == "length" else sp.Symbol(name, real=True)


@dataclass(frozen=True)
class Elementwise:
    """A loss that acts on each entry of arrays of equal shapes; calling it checks a function against it."""

    formula: Callable[..., Any]
    """Of the arguments and, by name, the hyper-parameters."""
    arguments: str
    """The kind of each, as `argument` has them."""
    hyperparameters: Mapping[str, sp.Interval] = field(default_factory=dict)
    """Name -> where it may be."""
    defaults: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, loss: Loss) -> None:
        name = loss.__name__
        given = inspect.signature(loss).parameters
        defaults = {
            h: given[h].default for h in self.hyperparameters if given[h].default is not inspect.Parameter.empty
        }
        require(defaults == dict(self.defaults), f"{name} has defaults {defaults}, not {dict(self.defaults)}")

        point = [argument(kind, f"x{i}") for i, kind in enumerate(self.arguments.split())]
        hyper: dict[str, Any] = {
            h: sp.Symbol(h, nonnegative=True) if 0 in domain else sp.Symbol(h, positive=True)
            for h, domain in self.hyperparameters.items()
        }
        require_equal(loss(*point, **hyper), self.formula(*point, **hyper), name)

        others = [argument(kind, f"y{i}") for i, kind in enumerate(self.arguments.split())]
        pairs = [np.array(pair) for pair in zip(point, others, strict=True)]
        value = loss(*pairs, **hyper)
        require(np.shape(value) == (2,), f"{name} of two pairs has shape {np.shape(value)}")
        for i, pair in enumerate((point, others)):
            require(value[i] == loss(*pair, **hyper), f"{name} of a pair depends on another pair")
        for i in range(len(pairs)) if len(pairs) > 1 else ():
            shapes = [pair[:1] if i == j else pair for j, pair in enumerate(pairs)]
            require_refused(f"{name} with argument {i} of another shape", loss, *shapes, **hyper)

        for h, domain in self.hyperparameters.items():
            for end, outwards in ((domain.start, -1), (domain.end, 1)):
                if not end.is_finite:
                    continue
                beyond, within = end + outwards, end if end in domain else end - sp.Rational(outwards, 100)
                require_refused(f"{name} with {h} = {beyond}", loss, *point, naming=h, **hyper | {h: beyond})
                if end not in domain:
                    require_refused(f"{name} with {h} = {end}", loss, *point, naming=h, **hyper | {h: end})
                at = hyper | {h: within}
                require_equal(loss(*point, **at), self.formula(*point, **at), f"{name} with {h} = {within}")
            for number in (np.nan, np.inf):
                require_refused(f"{name} with {h} = {number}", loss, *point, naming=h, **hyper | {h: number})


def sigma(z: Any) -> Any:
    """The logistic function."""
    return 1 / (1 + sp.exp(-z))


def neg_log_sigma(z: Any) -> Any:
    """-log sigma(z)."""
    return -sp.log(sigma(z))


def focal(chosen: Any, rejected: Any, gamma: Any) -> Any:
    """(1 - p_w)^gamma, p_w = pi(y_w) / (pi(y_w) + pi(y_l))."""
    winner, loser = sp.exp(chosen), sp.exp(rejected)
    return (1 - winner / (winner + loser)) ** gamma


# ---------------------------------------------------------------- losses of a batch


def symbols(name: str, *shape: int) -> Any:
    """An object array of real symbols."""
    return np.array(sp.symbols(f"{name}:{np.prod(shape, dtype=int)}", real=True), dtype=object).reshape(shape)


def exact(values: Any) -> Any:
    """An object array of rationals."""
    return np.frompyfunc(sp.Rational, 1, 1)(np.array(values, dtype=object))


BETA = sp.Symbol("beta", positive=True)
MARGIN, MEMBERS = symbols("Delta", 2), symbols("delta", 2, 2)
BATCHES: Sequence[tuple[Any, Any]] = (
    ([1], [[3]]),
    ([0, 0], [[2, -1], [-1, 3]]),  # the best mixture is inside
    ([1, 0, -1], [[1, 0, 0], [3, 1, 1]]),  # ... is a member
    ([1, -1], [[0, 1], [0, 1]]),  # ... is any
    ([0, 1], [[2, 1], [-3, 2], [1, -4]]),  # ... has all three
    ([0, 0], [[3, 1], [1, 2], [-1, 4]]),  # ... has two of three
)
"""Log-ratio margins [N] and reward margins [K, N]."""
GLOBAL = exact([[5, 1], [1, 2]])
"""A Gram matrix of other pairs, whose best member is the second and whose best mixture is (1, 4) / 5."""


def residuals(margin: Any, members: Any, beta: Any) -> Any:
    """e_i = delta_i - beta Delta, [K, N]."""
    return np.array([[d - beta * m for d, m in zip(row, margin, strict=True)] for row in members], dtype=object)


def gram_of(rows: Any) -> Any:
    """Mean over the pairs of e_i e_j, [K, K]."""
    products = [[sum(a * b for a, b in zip(e, f, strict=True)) / sp.Integer(len(e)) for f in rows] for e in rows]
    return np.array(products, dtype=object)


def best_member(gram: Any) -> Any:
    """One at the first smallest entry of the diagonal, [K]."""
    best = min(range(len(gram)), key=lambda i: gram[i, i])
    return exact([int(i == best) for i in range(len(gram))])


def best_mixture(gram: Any) -> Any:
    """A minimiser of w' G w over the simplex, [K]: on each face the stationary point, if it is on it; the lowest."""
    found: list[tuple[Any, int, Any]] = []  # value, a number that is never equal, weights
    for face in product([False, True], repeat=len(gram)):
        chosen = [i for i, used in enumerate(face) if used]
        stationary = sp.Matrix(gram[np.ix_(chosen, chosen)]).row_join(-sp.ones(len(chosen), 1))
        system = stationary.col_join(sp.ones(1, len(chosen)).row_join(sp.zeros(1, 1)))
        if chosen and system.det() != 0:
            weights = exact([0] * len(gram))
            weights[chosen] = list(system.LUsolve(sp.Matrix([0] * len(chosen) + [1])))[:-1]
            if min(weights) >= 0:
                found.append((weights @ gram @ weights, len(found), weights))
    return min(found)[-1]


def check_gram(gram: Loss) -> None:
    """The mean products of residuals, through which no gradient flows."""
    margin, members, held = symbols("Delta", 2), symbols("delta", 3, 2), sp.Function("held", real=True)
    with mock.patch.object(SympyBackend, "constant", lambda _, value: np.frompyfunc(held, 1, 1)(value)):
        got = gram(margin, members, beta=BETA)
    want = gram_of(np.frompyfunc(held, 1, 1)(residuals(margin, members, BETA)))
    require(got.shape == (3, 3), f"the Gram matrix of three members has shape {got.shape}")
    for i, j in product(range(3), repeat=2):
        require_equal(got[i, j], want[i, j], f"entry {i}, {j} of the Gram matrix")
    check_batch_is_refused(gram)


def check_weights(choose: Loss, best: Callable[[Any], Any], grams: Sequence[Any]) -> None:
    """Weights on the simplex that are as good as the best ones, the very ones where only one choice is right."""
    for gram in grams:
        got, want = choose(gram), best(gram)
        where = f"{got} for {gram.tolist()}"
        require(all(w >= 0 for w in got) and sum(got) == 1, f"not on the simplex: {where}")
        require(got @ gram @ got == want @ gram @ want, f"not the best: {where}")
        require(best is best_mixture or (got == want).all(), f"another member: {where}")
    for shape in ((2,), (2, 3), (3, 2), (0, 0), (1, 0), (2, 2, 2)):
        require_refused(f"a Gram matrix of shape {shape}", choose, np.ones(shape))


def check_ensemble(loss: Loss, best: Callable[[Any], Any]) -> None:
    """Distillation of the best mixture, chosen on the pairs themselves or by the Gram matrix that is given."""
    for (margin, members), beta in product(BATCHES, (sp.Integer(1), sp.Rational(1, 2))):
        rows = residuals(exact(margin), exact(members), beta)
        for gram in (None, GLOBAL) if len(rows) == 2 else (None,):
            weights = best(gram_of(rows) if gram is None else gram)
            got = loss(exact(margin), exact(members), beta=beta, gram=gram)
            where = f"{loss.__name__} of {margin}, {members}, beta {beta}"
            require(list(got) == list((weights @ rows) ** 2), f"{where} is {got}")
    check_batch_is_refused(loss)
    check_batch_is_refused(lambda *batch, beta: loss(*batch, beta=beta, gram=GLOBAL))
    for shape in ((3, 3), (2,), (2, 3), (1, 1)):
        gram = exact(np.ones(shape, int))
        require_refused(f"a Gram matrix of shape {shape}", loss, MARGIN, MEMBERS, beta=BETA, gram=gram)


def check_batch_is_refused(loss: Loss) -> None:
    """Shapes other than [N] and [K, N] with N and K at least 1, and a beta that is not > 0."""
    for pairs, members in (
        ((), (2,)),
        ((2, 2), (2, 2)),
        ((2,), (2,)),
        ((2,), (2, 1)),
        ((1,), (2, 2)),
        ((2,), (0, 2)),
        ((0,), (2, 0)),
    ):
        batch = exact(np.zeros(pairs, int)), exact(np.zeros(members, int))
        require_refused(f"margins {pairs} with rewards {members}", loss, *batch, beta=1)
    for beta in (0, -1, np.nan, np.inf):
        require_refused(f"beta = {beta}", loss, MARGIN, MEMBERS, beta=beta)


def check_token_kl(kl: Loss) -> None:
    """sum over the vocabulary of p (log p - log q), at each position."""
    log_p, log_q = (
        np.array([[argument("logp", f"{name}{i}{j}") for j in range(3)] for i in range(2)]) for name in "pq"
    )
    got = kl(log_p, log_q)
    require(got.shape == (2,), f"two positions have a KL of shape {got.shape}")
    for position in range(2):
        want = sum(
            sp.exp(p) * sp.log(sp.exp(p) / sp.exp(q)) for p, q in zip(log_p[position], log_q[position], strict=True)
        )
        require_equal(got[position], want, f"position {position}")
    require_refused("reference and policy of two shapes", kl, log_p, log_q[:1])
    require_refused("a KL without a vocabulary axis", kl, log_p[0, 0], log_q[0, 0])


# ---------------------------------------------------------------- the definitions

GRAMS = [gram_of(residuals(exact(margin), exact(members), 1)) for margin, members in BATCHES]

DRDO = Elementwise(
    lambda d, e, c, r, alpha, gamma: (d - e) ** 2 - alpha * focal(c, r, gamma) * sp.log(sp.exp(c) / (1 - sp.exp(r))),
    "real real logp logp",
    {"alpha": NOT_NEGATIVE, "gamma": NOT_NEGATIVE},
    {"alpha": 0.1, "gamma": 2},
)
DEFINITIONS: Mapping[str, Callable[[Loss], None]] = {
    "logratio_margin": Elementwise(
        lambda c, r, ref_c, ref_r: sp.log(sp.exp(c) * sp.exp(ref_r) / (sp.exp(r) * sp.exp(ref_c))),
        "logp logp logp logp",
    ),
    "normalised_logratio_margin": Elementwise(
        lambda c, r, n_c, n_r: (c * n_r - r * n_c) / (n_c * n_r), "real real length length"
    ),
    "focal_weight": Elementwise(focal, "logp logp", {"gamma": NOT_NEGATIVE}),
    "bradley_terry": Elementwise(neg_log_sigma, "real"),
    "dpo": Elementwise(lambda D, beta: neg_log_sigma(beta * D), "real", {"beta": POSITIVE}),
    "ipo": Elementwise(lambda D, tau: D**2 - D / tau + tau**-2 / 4, "real", {"tau": POSITIVE}),
    "distillation": Elementwise(
        lambda D, d, beta: d**2 - 2 * beta * d * D + beta**2 * D**2, "real real", {"beta": POSITIVE}
    ),
    "hinge": Elementwise(lambda D, beta: sp.Max(0, 1 - beta * D), "real", {"beta": POSITIVE}),
    "cdpo": Elementwise(
        lambda D, beta, label_smoothing: (
            (1 - label_smoothing) * neg_log_sigma(beta * D) + label_smoothing * neg_log_sigma(-beta * D)
        ),
        "real",
        {"beta": POSITIVE, "label_smoothing": FLIPPED},
    ),
    "robust_dpo": Elementwise(
        lambda D, beta, label_smoothing: (
            ((1 - label_smoothing) * neg_log_sigma(beta * D) - label_smoothing * neg_log_sigma(-beta * D))
            / (1 - 2 * label_smoothing)
        ),
        "real",
        {"beta": POSITIVE, "label_smoothing": FLIPPED},
    ),
    "soft_label": Elementwise(
        lambda D, d, beta: sigma(d) * neg_log_sigma(beta * D) + (1 - sigma(d)) * neg_log_sigma(-beta * D),
        "real real",
        {"beta": POSITIVE},
    ),
    "rdpo": Elementwise(
        lambda D, n_c, n_r, beta, alpha: neg_log_sigma(beta * D - alpha * (n_r - n_c)),
        "real length length",
        {"beta": POSITIVE, "alpha": NOT_NEGATIVE},
    ),
    "sft_term": Elementwise(lambda c, n_c: -c / n_c, "logp length"),
    "dpo_nll": Elementwise(
        lambda D, c, n_c, beta, alpha: neg_log_sigma(beta * D) - alpha * c / n_c,
        "real logp length",
        {"beta": POSITIVE, "alpha": NOT_NEGATIVE},
    ),
    "dpop": Elementwise(
        lambda u_w, u_l, beta, lam: neg_log_sigma(beta * (u_w - u_l - lam * sp.Max(0, -u_w))),
        "real real",
        {"beta": POSITIVE, "lam": NOT_NEGATIVE},
    ),
    "simpo": Elementwise(
        lambda c, r, n_c, n_r, beta, gamma: neg_log_sigma(beta * c / n_c - beta * r / n_r - gamma),
        "logp logp length length",
        {"beta": POSITIVE, "gamma": NOT_NEGATIVE},
    ),
    "sppo_hard": Elementwise(
        lambda u_w, u_l, beta: (u_w - 1 / (2 * beta)) ** 2 + (u_l + 1 / (2 * beta)) ** 2,
        "real real",
        {"beta": POSITIVE},
    ),
    "nca": Elementwise(
        lambda u_w, u_l, beta: (
            neg_log_sigma(beta * u_w) + neg_log_sigma(-beta * u_w) / 2 + neg_log_sigma(-beta * u_l) / 2
        ),
        "real real",
        {"beta": POSITIVE},
    ),
    "forward_kl": Elementwise(lambda u: sp.log(sp.exp(-u)), "real"),
    "forward_kl_tokens": check_token_kl,
    "pessimistic": Elementwise(lambda loss, kl, alpha: loss + alpha * kl, "real real", {"alpha": NOT_NEGATIVE}),
    "ensemble_gram": check_gram,
    "member_weights": lambda choose: check_weights(choose, best_member, GRAMS),
    "hull_weights": lambda choose: check_weights(choose, best_mixture, GRAMS),
    "ensemble_min": lambda loss: check_ensemble(loss, best_member),
    "ensemble_hull": lambda loss: check_ensemble(loss, best_mixture),
    "drdo": DRDO,
    "drdo_oracle": Elementwise(
        lambda d, c, alpha: (1 - alpha) * neg_log_sigma(d) - alpha * c, "real logp", {"alpha": SHARE}, {"alpha": 0.01}
    ),
}
"""Function of `theory.losses` -> what checks it."""


def prove() -> None:
    """Every function, and no function that is not there."""
    names = set(loss_names())
    require(names <= set(DEFINITIONS), f"no definition here of {', '.join(sorted(names - set(DEFINITIONS)))}")
    for name, check in DEFINITIONS.items():
        check(getattr(losses, name))


def enumerate_batches(thorough: bool) -> str:
    """The choice among members, for every batch of small integers."""
    bound = 2 if thorough else 1
    vectors = list(product(range(-bound, bound + 1), repeat=2))
    grams = [gram_of(residuals(exact([0, 0]), exact(rows), 1)) for rows in product(vectors, repeat=2)]
    check_weights(losses.member_weights, best_member, grams)
    check_weights(losses.hull_weights, best_mixture, grams)
    return f"the choice of members in all {len(grams)} Gram matrices of 2 residuals in [-{bound}, {bound}]^2"


# ---------------------------------------------------------------- without each assumption

NOT_A_GRAM_MATRIX = exact([[2, 3], [3, 1]])


def _more_than_one() -> str:
    value = losses.drdo(sp.S.Zero, sp.S.Zero, sp.log(sp.Rational(1, 2)), sp.log(2), alpha=1, gamma=0)
    require(sp.im(value) != 0, "the loss is real")
    return f"pi(y_l) = 2, pi(y_w) = 1/2: drdo at alpha = 1, gamma = 0 is {sp.expand_log(value)}, not a real number"


def _indefinite() -> str:
    weights = losses.hull_weights(NOT_A_GRAM_MATRIX)
    reached, best = weights @ NOT_A_GRAM_MATRIX @ weights, min(NOT_A_GRAM_MATRIX.diagonal())
    require(bool(reached > best), "the weights are the best")
    return f"[[2, 3], [3, 1]]: hull_weights are {weights.tolist()} with value {reached}, the second member's is {best}"


# ---------------------------------------------------------------- properties


@given(st.data())
def floats_agree_with_the_formulas(data: st.DataObject) -> None:
    """NumPy: every loss of one pair, at an ordinary point; losses_test.py has the extremes, gradients and torch."""
    name = data.draw(st.sampled_from([name for name, check in DEFINITIONS.items() if isinstance(check, Elementwise)]))
    definition = DEFINITIONS[name]
    assert isinstance(definition, Elementwise)
    bounds = {"real": (-5.0, 5.0), "logp": (-9.0, -0.1), "length": (1.0, 9.0)}
    point = [data.draw(st.floats(*bounds[kind])) for kind in definition.arguments.split()]
    ends = {h: min(2, float(domain.end)) for h, domain in definition.hyperparameters.items()}
    hyper = {h: data.draw(st.floats(0.1 * end, 0.9 * end)) for h, end in ends.items()}
    want = float(definition.formula(*map(sp.Float, point), **hyper))
    got = float(getattr(losses, name)(*point, **hyper))
    assert abs(got - want) <= 1e-9 * (1 + abs(want)), f"{name}{tuple(point)} at {hyper}: {got}, by definition {want}"


def _checks(name: str, wrong: Loss) -> Callable[[], None]:
    """A control: the check of a function, run on something wrong that bears its name and signature."""

    @functools.wraps(getattr(losses, name))
    def named(*arguments: Any, **hyper: Any) -> Any:
        return wrong(*arguments, **hyper)

    return lambda: DEFINITIONS[name](named)


CLAIMS = (
    Claim(
        id="loss-definitions",
        source="[F] eq 2, 6, 7, 9-13; [N] eq 5, 6; Azar et al. 2024, eq 17; others as theory.losses cites them",
        statement=(
            "Every function of theory.losses is the formula that its source prints, for all real margins, all "
            "probabilities in (0, 1) and all hyper-parameters that it takes; each entry of an array by itself, or for "
            "an ensemble the best member or mixture of the batch that it is given. It refuses arrays of different "
            "shapes and hyper-parameters out of range, infinite or NaN."
        ),
        formula=r"\ell_{\rm code}(x;h)=\ell_{\rm paper}(x;h)\ \text{for } h\in H,\qquad\text{refused for } h\notin H",
        domain="single pairs, and batches of pairs with finitely many reward models; any policy",
        losses=tuple(DEFINITIONS),
        assumptions={
            "probabilities": "log-probabilities are below 0",
            "Gram matrix": "weights are chosen by a matrix of mean products, which is positive semi-definite",
        },
        prove=prove,
        counterexamples={"probabilities": _more_than_one, "Gram matrix": _indefinite},
        controls={
            "without probabilities": lambda: replace(DRDO, arguments="real real real real")(losses.drdo),
            "without Gram matrix": lambda: check_weights(losses.hull_weights, best_mixture, [NOT_A_GRAM_MATRIX]),
            "a factor": _checks("ipo", lambda margin, tau: 2 * losses.ipo(margin, tau=tau)),
            "a sign of DRDO's reward": _checks(
                "drdo", lambda d, e, *logps, **hyper: losses.drdo(d, -e, *logps, **hyper)
            ),
            "the reward term of DRDO not squared": _checks(
                "drdo", lambda d, e, *logps, **hyper: losses.drdo(d, e, *logps, **hyper) - (d - e) ** 2 + (d - e)
            ),
            "a mean over the pairs": _checks(
                "forward_kl", lambda u: sum(np.atleast_1d(losses.forward_kl(u))) / np.size(u)
            ),
            "any beta": _checks("dpo", lambda margin, beta: losses.bradley_terry(beta * margin)),
            "shapes broadcast": _checks(
                "pessimistic", lambda loss, kl, alpha: loss + losses.pessimistic(0 * kl, kl, alpha=alpha)
            ),
            "a mixture for the best member": _checks("ensemble_min", losses.ensemble_hull),
            "a member for the best mixture": _checks("ensemble_hull", losses.ensemble_min),
            "the Gram matrix not used": _checks(
                "ensemble_min", lambda margin, members, beta, gram=None: losses.ensemble_min(margin, members, beta=beta)
            ),
        },
        enumerate=enumerate_batches,
        properties=(floats_agree_with_the_formulas,),
    ),
)
