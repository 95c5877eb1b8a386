"""Which losses share the fate of DPO: one table, whose every cell is a proof or a counterexample that is run.

A loss of a pair is a function of the log-ratios u = log(pi / pi_ref) of its two responses. Each column of the table
(`FATES`) asks one thing of it; each answer is a check (`evidence`) that fails for the losses of which it is not true.
`table` runs them all and returns the cells; `python -m theory.fates` writes them into docs/losses.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize, nnls, root

from theory import losses
from theory.algebra import limit, simplify, vanishes
from theory.certificates import policy_kkt
from theory.claim import CheckFailed, Claim, losses_now, require
from theory.preferences import Floats, PreferenceGraph
from theory.propositions.dpo_divergence import Crossing, across_components, check_alternatives, digraphs
from theory.strategies import positive

U, V = sp.symbols("u_w u_l", real=True)
Z, TARGET = sp.symbols("Delta delta", real=True)
P, Q, X, Y, T, MORE = sp.symbols("p_w p_l X Y t k", positive=True)
ALPHA, BETA, TAU, FLIPPED, NLL, LAM, GAMMA, RHO = sp.symbols("alpha beta tau epsilon a lambda gamma rho", positive=True)
LONG, SHORT = sp.symbols("n_w n_l", positive=True)
PEAK = sp.Symbol("x", positive=True)
LOG_P, LOG_Q = sp.log(P), sp.log(Q)

# ---------------------------------------------------------------- a loss, of symbols and of numbers


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Hyper-parameters of all the losses, and what a pair has beside its log-probs; symbols where not given."""

    beta: Any = BETA
    tau: Any = TAU
    label_smoothing: Any = FLIPPED
    nll: Any = NLL
    lam: Any = LAM
    gamma: Any = GAMMA
    per_token: Any = RHO
    reward_margin: Any = TARGET
    chosen_length: Any = LONG
    rejected_length: Any = SHORT

    @property
    def values(self) -> list[Any]:
        """In the order of the fields."""
        return [getattr(self, one.name) for one in fields(self)]


SYMBOLS = Setting()
NUMBERS = Setting(
    beta=1.0,
    tau=0.5,
    label_smoothing=0.1,
    nll=0.5,
    lam=3.0,
    gamma=0.5,
    per_token=0.1,
    reward_margin=1.0,
    chosen_length=3.0,
    rejected_length=3.0,
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Log-ratios and reference log-probs of winner and loser, in nats."""

    u: Any = U
    v: Any = V
    ref_u: Any = LOG_P
    ref_v: Any = LOG_Q

    @property
    def margin(self) -> Any:
        """Delta."""
        return losses.logratio_margin(self.u + self.ref_u, self.v + self.ref_v, self.ref_u, self.ref_v)

    @property
    def policy(self) -> tuple[Any, Any]:
        """log pi of both."""
        return self.u + self.ref_u, self.v + self.ref_v


Value = Callable[[Pair, Setting], Any]
SMOOTH: tuple[dict[Any, Any], ...] = ({},)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A loss, and what the table says of it in formulas; the checks of its cells hold them to the loss."""

    name: str
    source: str
    functions: tuple[str, ...]
    """Of `theory.losses`; none where the loss is there for comparison only."""
    value: Value
    pull: Any
    """-dL/du_w, what the winner is pulled up with."""
    push: Any
    """dL/du_l, what the loser is pushed down with."""
    regions: tuple[dict[Any, Any], ...] = SMOOTH
    """Substitutions that lead to each smooth piece."""
    best: tuple[Any, Any] = (sp.S.Zero, -sp.oo)
    """u_w and u_l at which the loss attains its infimum, or -oo where it only tends to it."""
    infimum: Any = sp.S.Zero
    budget: Any = None
    """C, where it has a formula: the most that alpha J can be."""
    peak: Any = None
    """The x = beta Delta where -Delta f' = C: a number, or x -> e^x where no formula gives x itself."""
    example: Example | None = None
    """The chain on which an added pair narrows its margin, if not the plain one."""
    cells: tuple[Evidence, ...]
    """One for each of FATES, in order."""
    found: dict[Evidence, str] = field(default_factory=dict, compare=False)
    """What evidence has accepted of it."""

    @cached_property
    def total(self) -> Any:
        """The loss of symbols."""
        return self.value(Pair(), SYMBOLS)

    @cached_property
    def drift(self) -> Any:
        """dL/du_w + dL/du_l: 0 for a loss of the log-ratio margin."""
        slopes = [exact((sp.diff(self.total, U) + sp.diff(self.total, V)).subs(region)) for region in self.regions]
        return next((slope for slope in slopes if slope != 0), sp.S.Zero)

    @cached_property
    def least(self) -> Any:
        """The loss at `best`: its value, or the limit."""
        return at(self, *self.best)

    @cached_property
    def compiled(self) -> Callable[..., tuple[Any, Any, Any]]:
        """(u_w, u_l, pi_ref of both, *Setting.values) -> the loss and its slopes in u_w and u_l, of floats."""
        value = self.total
        compiled: Callable[..., tuple[Any, Any, Any]] = sp.lambdify(
            [U, V, P, Q, *SYMBOLS.values],
            [value, sp.diff(value, U), sp.diff(value, V)],
            [{"exp": lambda x: math.exp(min(x, 700.0))}, "math"],  # a line search may go beyond what floats hold
            cse=True,
        )
        return compiled

    @cached_property
    def stated(self) -> Callable[..., tuple[Any, Any]]:
        """`compiled`'s arguments -> pull and push."""
        stated: Callable[..., tuple[Any, Any]] = sp.lambdify(
            [U, V, P, Q, *SYMBOLS.values], [self.pull, self.push], "numpy"
        )
        return stated

    @cached_property
    def normalised(self) -> bool:
        """Whether it is a loss of log pi(y_w) / |y_w| - log pi(y_l) / |y_l|."""
        if self.drift == 0 or self.regions != SMOOTH:
            return False
        return bool(exact(LONG * sp.diff(self.total, U) + SHORT * sp.diff(self.total, V)) == 0)

    @cached_property
    def of_margin(self) -> Any:
        """The loss as a function of its own margin Z: the log-ratio one, or that of `normalised`."""
        require(self.normalised or self.drift == 0, f"{self.name} sees more than one margin")
        if self.normalised:
            return self.value(Pair(u=LONG * Z - sp.log(P), v=-sp.log(Q)), SYMBOLS)
        return self.total.subs({U: Z, V: 0})

    @cached_property
    def slope(self) -> Any:
        """Its derivative."""
        return exact(sp.diff(self.of_margin, Z))

    @cached_property
    def curvature(self) -> Any:
        """Its second derivative."""
        return exact(sp.diff(self.of_margin, Z, 2))


def exact(expression: Any) -> Any:
    """Simplified, with e^(beta u_w) = X, e^(beta u_l) = Y; a flip rate epsilon is written 1 / (2 + k), k > 0."""
    expression = sp.sympify(expression)
    if expression.has(sp.Piecewise):
        return simplify(expression)
    known = {FLIPPED: 1 / (2 + MORE)}
    if expression.has(sp.exp):
        known |= {U: sp.log(X) / BETA, V: sp.log(Y) / BETA, Z: sp.log(X) / BETA}
    return sp.factor(sp.expand(expression.subs(known)))


def at(subject: Subject, u: Any, v: Any) -> Any:
    """The loss there; the limit where one is infinite. A flip rate is written as in `exact`."""
    value = subject.total.subs(FLIPPED, 1 / (2 + MORE))
    for variable, number in ((U, u), (V, v)):
        value = limit(value, variable, number) if number.is_infinite else value.subs(variable, number)
    return value.subs(FLIPPED, 1 / (2 + MORE))


def check_slopes(subject: Subject) -> None:
    """The loss pulls and pushes as is said of it, on each of its smooth pieces, and its infimum is the one named."""
    for variable, stated in ((U, -subject.pull), (V, subject.push)):
        for region in subject.regions:
            gap = exact((sp.diff(subject.total, variable) - stated).subs(region))
            require(gap == 0, f"{subject.name}: dL/d{variable} is not {stated}")
    if subject.least != subject.infimum:
        gap = subject.least - subject.infimum.subs(FLIPPED, 1 / (2 + MORE))
        gap = gap.replace(sp.log, lambda x: sp.log(sp.factor(x)))
        require(vanishes(sp.expand_log(gap, force=True)), f"{subject.name}: the infimum is {subject.least}")


# ---------------------------------------------------------------- the table's columns, and how they are filled

FATES = {
    "diverges": "one pair: does the margin diverge?",
    "scc": "a graph: do exactly the margins across strong components diverge?",
    "bounded": "bounded below?",
    "unseen": "at the infimum: mass of unseen responses",
    "budget": "with KL: αJ bounded?",
    "attained": "with KL: attained?",
    "kept": "with KL: unseen mass kept?",
    "closure": "with KL: can adding 0>2 to 0>1>2 narrow that margin?",
}
"""Column -> what it asks. KL is alpha KL(pi_ref || pi); J = KL(pi || pi_ref) + KL(pi_ref || pi) at the optimum, with
weights of the pairs that add up to 1."""


@dataclass(frozen=True)
class Evidence:
    """A check that answers a column's question, for every loss that it accepts."""

    fate: str
    answer: str
    kind: Literal["proof", "counterexample"]
    check: Callable[[Subject], str]
    """Raises CheckFailed, or returns what it found: a formula or numbers, in Markdown; may be empty."""

    @property
    def name(self) -> str:
        """Of the check, and of its paragraph on the page."""
        return self.check.__name__.replace("_", "-")

    @property
    def words(self) -> str:
        """What the page says of it."""
        return " ".join((self.check.__doc__ or "").split())

    def __call__(self, subject: Subject) -> str:
        if self not in subject.found:
            subject.found[self] = self.check(subject)
        return subject.found[self]

    def accepts(self, subject: Subject) -> bool:
        """Whether the check passes."""
        try:
            self(subject)
        except CheckFailed:
            return False
        return True


EVIDENCE: list[Evidence] = []


def evidence(fate: str, answer: str, kind: Literal["proof", "counterexample"] = "proof") -> Callable[..., Evidence]:
    """Makes a check evidence; its docstring is what the page says of it."""

    def register(check: Callable[[Subject], str]) -> Evidence:
        EVIDENCE.append(Evidence(fate, answer, kind, check))
        return EVIDENCE[-1]

    return register


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of the table."""

    loss: str
    fate: str
    answer: str
    found: str
    """A formula or numbers, in Markdown; may be empty."""
    evidence: Evidence


def table() -> Sequence[Cell]:
    """Every cell, row by row, each found by running its check. Raises CheckFailed where one does not pass."""
    return _table(losses_now())


@cache
def _table(_: tuple[Any, ...]) -> Sequence[Cell]:
    cells = []
    for subject in subjects():
        check_slopes(subject)
        for fate, of_cell in zip(FATES, subject.cells, strict=True):
            require(of_cell.fate == fate, f"{subject.name}: {of_cell.name} says nothing about {fate}")
            found = of_cell(subject)
            cells.append(Cell(loss=subject.name, fate=fate, answer=of_cell.answer, found=found, evidence=of_cell))
    return cells


def latex(expression: Any) -> str:
    """An inline formula."""
    return f"${sp.latex(expression)}$"


# ---------------------------------------------------------------- one pair: does the margin diverge?


@evidence("diverges", "yes")
def falls_for_ever(subject: Subject) -> str:
    """The loss is one of a margin and falls with it everywhere, so no finite margin is best. For a length-normalised
    loss that margin is of log-probs a token; the log-ratio margin need not follow it."""
    require(subject.slope.is_negative, f"{subject.name} does not fall everywhere")
    return "per token" if subject.normalised else ""


@evidence("diverges", "yes")
def dpo_and_more(subject: Subject) -> str:
    """The loss is DPO's and a term that is never negative, and has infimum 0, so along any minimising sequence DPO's
    loss vanishes."""
    more = exact((subject.total - losses.dpo(U - V, beta=BETA)).subs(U, -sp.log(P) - T))
    require(more.is_positive, f"{subject.name} is not DPO and a positive term where pi(y_w) = e^-t < 1")
    require(subject.least == 0, f"{subject.name} has another infimum")
    return ""


@evidence("diverges", "yes")
def dpo_of_less(subject: Subject) -> str:
    """The loss is DPO's of at most the margin, and has infimum 0, so along any minimising sequence DPO's loss
    vanishes."""
    less = [simplify((U - V - seen_margin(subject)).subs(region)) for region in subject.regions]
    require(all(gap.is_nonnegative for gap in less), f"{subject.name} sees more than the margin")
    require(subject.least == 0, f"{subject.name} has another infimum")
    return ""


def seen_margin(subject: Subject) -> Any:
    """z such that the loss is DPO's of z; it may be piecewise."""
    exponents = subject.total.atoms(sp.exp)
    require(len(exponents) == 1, f"{subject.name} is not DPO of anything")
    z = -exponents.pop().args[0] / BETA
    require(sp.expand(losses.dpo(z, beta=BETA) - subject.total) == 0, f"{subject.name} is not DPO of anything")
    return z


@evidence("diverges", "yes")
def loser_falls_for_ever(subject: Subject) -> str:
    """The loss sees both log-ratios by themselves: strictly convex with a finite best one for the winner, rising for
    ever for the loser."""
    winner, loser = parts(subject)
    require(exact(sp.diff(winner, U, 2)).is_positive, f"{subject.name}: the winner's part is not strictly convex")
    require(vanishes(sp.diff(winner, U).subs(U, subject.best[0])), f"{subject.name}: another best u_w")
    require(exact(sp.diff(loser, V)).is_positive, f"{subject.name}: the loser's part does not rise")
    return f"$u_w$ to {latex(subject.best[0])}"


def parts(subject: Subject) -> tuple[Any, Any]:
    """g(u_w) and h(u_l) of a loss g + h."""
    require(exact(sp.diff(subject.total, U, V)) == 0, f"{subject.name} sees its log-ratios together")
    loser = sum(term for term in sp.Add.make_args(subject.total) if term.has(V))
    require(not sp.sympify(loser).has(U), f"{subject.name} sees its log-ratios together")
    return subject.total - loser, loser


@evidence("diverges", "no")
def has_a_finite_target(subject: Subject) -> str:
    """The loss is one of the margin, strictly convex, and least at a finite one."""
    target = subject.best[0] - subject.best[1]
    require(not target.is_infinite, f"{subject.name} has no finite target")
    require(subject.curvature.is_positive, f"{subject.name} is not strictly convex")
    gap = sp.diff(subject.of_margin, Z).subs(Z, target)
    require(vanishes(gap), f"{subject.name} is not least at {target}")
    return f"at {latex(target)}"


@evidence("diverges", "no")
def is_flat_beyond_a_target(subject: Subject) -> str:
    """The loss is one of the margin, positive up to a finite one and 0 from there on."""
    require(subject.drift == 0 and subject.regions != SMOOTH, f"{subject.name} has no kink in the margin")
    before, beyond = (simplify(subject.total.subs(region)) for region in subject.regions)
    require(beyond == 0, f"{subject.name} is not 0 beyond its margin")
    require(before.is_positive, f"{subject.name} is not positive before")
    return f"from {latex(subject.best[0] - subject.best[1])} on"


@evidence("diverges", "no")
def has_two_finite_targets(subject: Subject) -> str:
    """The loss sees both log-ratios by themselves, and is strictly convex and least at a finite value of each."""
    for part, variable, best in zip(parts(subject), (U, V), subject.best, strict=True):
        require(not best.is_infinite, f"{subject.name} has no finite target of {variable}")
        require(exact(sp.diff(part, variable, 2)).is_positive, f"{subject.name} is not strictly convex in {variable}")
        require(vanishes(sp.diff(part, variable).subs(variable, best)), f"another target of {variable}")
    return f"$u$ at $\\pm$ {latex(subject.best[0])}"


# ---------------------------------------------------------------- a graph: across strong components, and only there?


@evidence("scc", "yes")
def components_decide(subject: Subject) -> str:
    """The loss falls with its margin, is strictly convex and tends to 0, which is all that the sharp form of
    Proposition 1 needs: an edge across components rises along a direction in which no margin falls, any other lies on
    a cycle that bounds it. Each edge may have a loss of its own, as lengths make them; and any margins are those of a
    policy, per token too: moving all log-probs a token alike normalises it."""
    require(subject.slope.is_negative, f"{subject.name} does not fall everywhere")
    require(subject.curvature.is_positive, f"{subject.name} is not strictly convex")
    require(limit(subject.of_margin, Z, sp.oo) == 0, f"{subject.name} does not tend to 0")
    return ""


def check_components(graphs: Sequence[PreferenceGraph], crossing: Crossing) -> None:
    """The combinatorial half of that, in integers, on each graph."""
    for graph in graphs:
        check_alternatives(graph, crossing)


@evidence("scc", "no", "counterexample")
def one_way_pair_stays(subject: Subject) -> str:
    """The ends of a single pair are in different components, and yet its margin stays finite (first column)."""
    finite = (has_a_finite_target, is_flat_beyond_a_target, has_two_finite_targets)
    require(any(check.accepts(subject) for check in finite), f"{subject.name}: a one-way pair's margin diverges")
    return ""


@evidence("scc", "no", "counterexample")
def cycle_runs_away(subject: Subject) -> str:
    """0>1 seen more often than 1>0, by a factor of 2 + k, k > 0: one component, and yet the total falls for ever."""
    total = (2 + MORE) * subject.of_margin + subject.of_margin.subs(Z, -Z)
    require(exact(sp.diff(total, Z)).is_negative, f"{subject.name}: the total on a two-cycle does not fall for ever")
    return ""


@evidence("scc", "no", "counterexample")
def winners_are_held(subject: Subject) -> str:
    """0>1>2: each pair is a component's edge, but the loss of 1>2 tends to infinity as pi(1) vanishes, whatever pi(2)
    does; so pi(1) stays positive, and the margin of 0>1 finite."""
    require(exact(sp.diff(subject.total, V)).is_positive, f"{subject.name} does not rise with the loser")
    least = limit(subject.total, V, -sp.oo)
    require(limit(least, U, -sp.oo) == sp.oo, f"{subject.name} lets a winner vanish")
    return ""


@evidence("scc", "no", "counterexample")
def cycles_do_not_sink(subject: Subject) -> str:
    """0>1, 1>2, 2>1: the margins that the loss sees add up to lambda (u_1 + u_2) round the cycle where both are
    negative; so they stay bounded, and with them the margin of 0>1, which lies across components."""
    z = seen_margin(subject)
    first, second = sp.symbols("t_1 t_2", positive=True)
    around = z.subs({U: -first, V: -second}) + z.subs({U: -second, V: -first})
    require(sp.expand(around + LAM * (first + second)) == 0, f"{subject.name}: margins cancel round a cycle")
    return ""


# ---------------------------------------------------------------- bounded below?


@evidence("bounded", "yes")
def has_an_infimum(subject: Subject) -> str:
    """By the first column, nothing is below what the loss has where it says that it is least."""
    require(subject.cells[0].accepts(subject), f"{subject.name}: the first column fails")
    require(subject.least.is_finite is not False, f"{subject.name} is not bounded below")
    of_a_label = bool(subject.infimum.free_symbols)
    return "by the label's entropy" if of_a_label else f"by {latex(subject.infimum)}"


@evidence("bounded", "no")
def falls_below_everything(subject: Subject) -> str:
    """As the margin grows, the loss tends to minus infinity, linearly."""
    require(limit(subject.slope.subs(X, 1 / T), T, 0, "+").is_negative, f"{subject.name} levels off")
    return ""


# ---------------------------------------------------------------- at the infimum: the unseen responses


@evidence("unseen", "anything")
def a_common_shift_is_not_seen(subject: Subject) -> str:
    """Lowering both log-ratios alike changes nothing, and gives all the pair's mass to the unseen."""
    shifted = subject.value(Pair(u=U - T, v=V - T), SYMBOLS)
    gap = sp.expand(shifted - subject.total)
    require(gap == 0, f"{subject.name} sees a common shift")
    return ""


@evidence("unseen", "anything", "counterexample")
def leaks_faster_than_it_sees(subject: Subject) -> str:
    """Along log pi(y_w) = -n_w t, log pi(y_l) = -2 n_l t (length-normalised), or u_w = -t, u_l = -(lambda + 2) t, the
    loss tends to its infimum, and both probabilities to 0."""
    if subject.normalised:
        path = {U: -LONG * T - sp.log(P), V: -2 * SHORT * T - sp.log(Q)}
    else:
        path = {U: -T, V: -(LAM + 2) * T}
    along = simplify(subject.total.subs(path))
    require(subject.drift != 0, f"{subject.name} is one of the log-ratio margin")
    require(limit(along, T, sp.oo) == subject.infimum, f"{subject.name} does not tend to its infimum")
    return ""


@evidence("unseen", "none")
def winner_takes_all(subject: Subject) -> str:
    """The term beside DPO's vanishes only as pi(y_w) tends to 1."""
    require(dpo_and_more.accepts(subject), f"{subject.name} has infimum 0 elsewhere")
    require(exact(sp.diff(subject.total - losses.dpo(U - V, beta=BETA), U)).is_negative, "the term does not fall")
    return ""


@evidence("unseen", "the rest")
def both_log_ratios_are_pinned(subject: Subject) -> str:
    """The infimum asks for one value of each log-ratio, so what the pair leaves is the unseen's; where their mass would
    exceed 1, none is left."""
    require(has_two_finite_targets.accepts(subject) or loser_falls_for_ever.accepts(subject), "not by themselves")
    shares = [share * sp.exp(best) for share, best in zip((P, Q), subject.best, strict=True)]
    return latex(sp.Max(0, 1 - sum(shares)))


# ---------------------------------------------------------------- with forward KL: a bound on the divergence


@evidence("budget", "yes")
def slope_has_a_peak(subject: Subject) -> str:
    """pi - pi_ref is -1/alpha times the loss's slopes, so alpha J is the mean of -Delta f'(Delta): positive for
    Delta > 0 only, log-concave there, and largest where its derivative vanishes."""
    require(subject.drift == 0 and subject.peak is not None, f"{subject.name} has no such peak")
    odds = sp.Symbol("E", positive=True)
    factor = sp.factor((-subject.slope / BETA).subs(X, sp.exp(PEAK)))  # -Delta f'(Delta) = x factor(x)
    require(factor.is_positive, f"{subject.name} does not fall everywhere")
    bend = sp.factor(sp.expand_power_exp(simplify(sp.diff(sp.log(factor), PEAK, 2))).subs(sp.exp(PEAK), odds))
    require(bend.is_nonpositive, f"{subject.name}: not log-concave")
    condition, largest, point = (
        sp.diff(PEAK * factor, PEAK),
        PEAK * factor,
        {RHO: sp.Rational(1, 10), LONG: 3, SHORT: 7},
    )
    if callable(subject.peak):
        known = {sp.exp(n * PEAK): subject.peak(PEAK) ** n for n in (-1, 1, 2, 3, 4)}
        condition, largest = condition.subs(known), largest.subs(known)
        where = sp.nsolve(
            (sp.exp(PEAK) - subject.peak(PEAK)).subs(point), PEAK, (1.0001, 3), solver="bisect", prec=40, verify=False
        )
    else:
        condition, where = condition.subs(PEAK, subject.peak), subject.peak
    require(vanishes(condition), f"{subject.name}: the peak is elsewhere")
    gap = (largest - subject.budget).subs(point).subs(PEAK, where).evalf(30)
    require(bool(abs(gap) < sp.Float(10) ** -25), f"{subject.name}: C is not {subject.budget}")
    number = "" if subject.budget.free_symbols - {PEAK} else f" = {float(subject.budget.subs(PEAK, where)):.4f}"
    return latex(subject.budget) + number


@evidence("budget", "yes")
def below_the_peak_of_dpo(subject: Subject) -> str:
    """A label p in place of 1 makes beta Delta (p - sigma(beta Delta)), which is below DPO's at |Delta|, on either
    side of 0."""
    x = sp.Symbol("x", positive=True)
    ratio = simplify((-subject.slope / BETA).subs(X, sp.exp(x)) + 1 / (1 + sp.exp(-x)))  # p
    require(not ratio.has(x), f"{subject.name} has no label")
    require(sp.factor(1 - ratio).is_positive and sp.factor(ratio).is_positive, f"{subject.name}: no probability")
    dpo_at_size = x / (1 + sp.exp(x))
    for sign in (1, -1):
        below = dpo_at_size - (-sign * x * subject.slope / BETA).subs(X, sp.exp(sign * x))
        require(sp.factor(simplify(below)).is_positive, f"{subject.name} is above DPO")
    return "below $W(1/e)$"


@evidence("budget", "yes")
def square_has_a_peak(subject: Subject) -> str:
    """For a squared loss -Delta f'(Delta) is a parabola with its vertex half way to the target."""
    require(subject.drift == 0 and subject.budget is not None, f"{subject.name} is not one of the margin")
    half = (subject.best[0] - subject.best[1]) / 2
    below = sp.factor(simplify(subject.budget + Z * sp.diff(subject.of_margin, Z)))
    require(simplify(below / (Z - half) ** 2).is_positive, f"{subject.name}: no parabola at {half}")
    require(not simplify(below / (Z - half) ** 2).has(Z), f"{subject.name}: no parabola")
    return latex(subject.budget)


@evidence("budget", "yes")
def ramp_has_an_end(subject: Subject) -> str:
    """-Delta f'(Delta) = beta Delta up to the kink, and 0 beyond."""
    require(is_flat_beyond_a_target.accepts(subject), f"{subject.name} has no kink in the margin")
    for region, largest in zip(subject.regions, (1 - T, sp.S.Zero), strict=True):
        reached = simplify((-Z * sp.diff(subject.of_margin, Z)).subs(Z, (region[U] - V)))
        require(vanishes(reached - largest), f"{subject.name}: -Delta f' is {reached}")
    return latex(sp.S.One)


@evidence("budget", "yes")
def dpo_and_what_the_kl_pays(subject: Subject) -> str:
    """-u . grad L is DPO's term of the margin that the loss sees. What is added, the drift times KL(pi_ref || pi) over
    alpha + drift, is at most alpha KL(pi_ref || pi) <= L(pi_ref) = log 2."""
    z = seen_margin(subject)
    for region in subject.regions:
        slopes = [sp.diff(subject.total, variable).subs(region) for variable in (U, V)]
        along = -(U.subs(region) * slopes[0] + V * slopes[1])
        seen = (BETA * z / (1 + sp.exp(BETA * z))).subs(region)
        require(vanishes(along - seen), f"{subject.name}: -u . grad L is another")
    require(at(subject, sp.S.Zero, sp.S.Zero) == sp.log(2), f"{subject.name} is not log 2 at the reference")
    check_drift_below(subject)
    return "$W(1/e)+\\log2$, or less"


@evidence("budget", "no")
def slope_does_not_vanish(subject: Subject) -> str:
    """-Delta f'(Delta) grows with Delta without bound."""
    require(limit(subject.slope.subs(X, 1 / T), T, 0, "+").is_negative, f"{subject.name} levels off")
    return ""


def check_drift_below(subject: Subject) -> None:
    """The slopes add up to 0 above the reference, and to minus lambda times the loser's below."""
    require(len(subject.regions) == 2, f"{subject.name} has no kink")
    above, below = (
        simplify((sp.diff(subject.total, U) + sp.diff(subject.total, V)).subs(region)) for region in subject.regions
    )
    pushed = sp.diff(subject.total, V).subs(subject.regions[1])
    require(above == 0, f"{subject.name} drifts above its reference")
    require(vanishes(below + LAM * pushed), f"{subject.name}: the drift below is {below}")
    require(simplify(pushed).is_positive, f"{subject.name} does not push the loser down")


@cache
def check_unbounded_divergence() -> None:
    """KL((c, 1 - c) || (x, 1 - x)) -> infinity as x -> 0 for any fixed c; J is at least that, on an event."""
    x = sp.Symbol("x", positive=True)
    c = 1 / (1 + T)
    divergence = c * sp.log(c / x) + (1 - c) * sp.log((1 - c) / (1 - x))
    require(limit(divergence, x, 0, "+") == sp.oo, "the divergence stays finite")


@evidence("budget", "no")
def winner_is_given_mass(subject: Subject) -> str:
    """At the optimum pi(y_w) is at least a / (n_w alpha + a), however small pi_ref(y_w) is; as that vanishes, J grows
    without bound."""
    require(dpo_and_more.accepts(subject), f"{subject.name} is not DPO and more")
    given_mass = -sp.diff(subject.total - losses.dpo(U - V, beta=BETA), U)
    require(exact(given_mass + subject.drift) == 0, "the term is not all of the drift")
    require(exact(given_mass).is_positive and not given_mass.has(U, P), "what the winner is given may vanish")
    check_unbounded_divergence()
    return ""


@evidence("budget", "no")
def log_probs_have_no_reference(subject: Subject) -> str:
    """At equal lengths n, stationarity of the loser asks for a slope below n alpha; where n alpha < beta this is a
    least ratio of pi(y_w) to pi(y_l), whatever pi_ref(y_w) is. As that vanishes, J grows without bound."""
    require(subject.normalised, f"{subject.name} is not length-normalised")
    require(subject.slope.is_negative and subject.curvature.is_positive, f"{subject.name}: no slope has one margin")
    steepest = limit(subject.slope, X, 0, "+")
    require(vanishes(steepest + BETA), f"{subject.name}: the slope does not reach beta")
    check_unbounded_divergence()
    return ""


@evidence("budget", "no")
def loser_is_emptied(subject: Subject) -> str:
    """Stationarity of the loser asks for dL/du_l < alpha. This rises with u_l, so for alpha below its value at 0 it
    bounds u_l away from 0, also as pi_ref(y_l) tends to 1: mass that the others, of vanishing reference, must take."""
    _, loser = parts(subject)
    rise = sp.diff(loser, V)
    require(exact(sp.diff(rise, V)).is_positive, f"{subject.name}: the loser's slope does not rise")
    require(exact(rise.subs(V, 0)).is_positive, f"{subject.name}: the loser is not pushed at the reference")
    check_unbounded_divergence()
    return ""


# ---------------------------------------------------------------- with forward KL: is the optimum attained?


@evidence("attained", "yes")
def the_kl_holds_every_response(subject: Subject) -> str:
    """The loss is bounded below, and the penalty tends to infinity as any probability vanishes."""
    require(has_an_infimum.accepts(subject), f"{subject.name} is not bounded below")
    check_coercive(subject, Q)
    return ""


def check_coercive(subject: Subject, ref_loser: Any) -> None:
    """A response weighs alpha pi_ref(y) > 0 in the penalty, against -log pi(y)."""
    for variable, share in ((U, P), (V, ref_loser)):
        penalty = share * losses.forward_kl(variable)
        held = -sp.diff(losses.pessimistic(subject.total, penalty, alpha=ALPHA) - subject.total, variable)
        require(vanishes(held - ALPHA * share), "the penalty is another")
        require(held.is_positive, "the penalty lets a response vanish")


@evidence("attained", "if")
def the_kl_may_hold_the_loser(subject: Subject) -> str:
    """The loss pushes the loser with at least epsilon beta / (1 - 2 epsilon), which the penalty resists with
    alpha pi_ref(y_l): stationarity needs the second to be larger, and if it is, the sum tends to infinity as a
    probability vanishes."""
    pushes = exact(sp.diff(subject.total, V))
    least = limit(pushes.subs(X, Y / T), T, 0, "+")  # the margin to infinity
    stated = exact(FLIPPED * BETA / (1 - 2 * FLIPPED))
    require(vanishes(least - stated), f"{subject.name} pushes the loser with {least}")
    require(sp.factor(pushes - least).is_positive, f"{subject.name} pushes the loser with less")
    require(least.is_positive, f"{subject.name}: its push vanishes")
    # What is left of it is DPO: at least 0, so that the terms linear in u_w and u_l decide.
    rest = simplify(subject.total - losses.dpo(U - V, beta=BETA) + FLIPPED * BETA / (1 - 2 * FLIPPED) * (U - V))
    require(rest == 0, f"{subject.name} is not DPO and linear terms")
    return "$\\frac{\\epsilon\\beta}{1-2\\epsilon}<\\alpha\\,\\pi_{\\rm ref}(y_l)$"


# ---------------------------------------------------------------- with forward KL: do the unseen keep their mass?

Penalty = Callable[[Sequence[Any], Sequence[Any]], Any]
"""(pi_ref, log-ratios) -> the penalty."""


def forward_kl(ref: Sequence[Any], logratios: Sequence[Any]) -> Any:
    """KL(pi_ref || pi)."""
    return sum(share * losses.forward_kl(u) for share, u in zip(ref, logratios, strict=True))


def unseen_factor(subject: Subject, penalty: Penalty) -> Any:
    """pi(y) / pi_ref(y) of an unseen y at a stationary policy: Lagrange's condition on winner, loser and y."""
    unseen = sp.Symbol("u_0", real=True)
    shares = (P, Q, 1 - P - Q)
    total = losses.pessimistic(subject.total, penalty(shares, (U, V, unseen)), alpha=ALPHA)
    gradient = [sp.diff(total, variable) for variable in (U, V, unseen)]
    pairs = sp.diff(subject.total, U) + sp.diff(subject.total, V)
    of_penalty = sp.expand(sum(gradient) - pairs)
    multiplier = of_penalty + (exact(pairs) if not pairs.has(sp.Piecewise) else pairs)
    factor = gradient[2] / multiplier / shares[2]
    return simplify(factor) if factor.has(sp.exp, sp.Piecewise) else sp.cancel(factor)


def check_kept(subject: Subject, penalty: Penalty) -> None:
    """The factor is 1."""
    factor = unseen_factor(subject, penalty)
    require(factor == 1, f"{subject.name}: unseen responses are multiplied by {factor}")


@evidence("kept", "exactly")
def the_multiplier_is_alpha(subject: Subject) -> str:
    """The loss's slopes add up to 0, so by Lagrange's condition the unseen are multiplied by alpha / alpha."""
    check_kept(subject, forward_kl)
    return ""


@evidence("kept", "no")
def every_winner_takes_from_them(subject: Subject) -> str:
    """The slopes add up to the same negative number at every policy: the unseen are multiplied by less than 1."""
    require(subject.drift.is_negative, f"{subject.name}: no constant drift")
    require(not subject.drift.has(U, V, X, Y), f"{subject.name}: no constant drift")
    factor = unseen_factor(subject, forward_kl)
    require(vanishes(factor - ALPHA / (ALPHA - subject.drift)), f"{subject.name}: another factor")
    return f"times {latex(sp.factor(factor))}"


@evidence("kept", "at equal lengths", "counterexample")
def lengths_move_them(subject: Subject) -> str:
    """The slopes add up to 0 iff both completions have the same length. Run: one pair of a reference
    (0.3, 0.3, 0.4), beta 2, gamma 0.5, alpha 1/2, lengths 4 and 2, then 2 and 4."""
    require(subject.normalised, f"{subject.name} is not length-normalised")
    require(vanishes(subject.drift.subs(SHORT, LONG)), f"{subject.name} moves them at equal lengths")
    require(sp.factor(subject.drift / (LONG - SHORT)).is_nonzero, f"{subject.name}: or at other lengths")
    masses = []
    for lengths in ((4.0, 2.0), (2.0, 4.0)):
        one = Example(
            edges=((0, 1),),
            weights=(1.0,),
            ref=(0.3, 0.3, 0.4),
            alpha=0.5,
            setting=replace(NUMBERS, beta=2.0, chosen_length=lengths[0], rejected_length=lengths[1]),
        )
        masses.append(0.4 * float(np.exp(fitted(subject, one)[2])))
    require(masses[0] > 0.401 and masses[1] < 0.399, f"{subject.name}: the unseen keep {masses}")
    return f"0.4 becomes {masses[0]:.3f}, {masses[1]:.3f}"


@evidence("kept", "on one pair", "counterexample")
def losing_winners_take_from_them(subject: Subject) -> str:
    """The slopes add up to 0 where the winner is not below its reference, and on one pair it never is: it would have
    to be below by a factor above 1. Run: 0>1>2 with weights 8 and 1, where 1 is below."""
    seen_margin(subject)
    check_drift_below(subject)
    # With push s, (alpha p + (1 + lambda) s) / (alpha + lambda s) > p for a reference p = 1 / (1 + t) < 1.
    s = sp.Symbol("s", positive=True)
    excess = (ALPHA + (1 + LAM) * s * (1 + T)) / (ALPHA + LAM * s) - 1
    require(sp.factor(excess).is_positive, "a winner may be below its reference on one pair")
    u = fitted(subject, replace(CHAIN, weights=(8.0, 1.0), alpha=1.0))
    require(u[1] < -0.01 and abs(u[3]) > 0.01, f"{subject.name}: the unseen keep their mass on the chain, {u}")
    return f"chain: times {np.exp(u[3]):.2f}"


@evidence("kept", "no", "counterexample")
def pinned_pairs_move_them(subject: Subject) -> str:
    """The slopes do not add up to 0. Run: one pair of the uniform reference on 4 responses, beta 1, alpha 1."""
    parts(subject)
    factor = float(np.exp(fitted(subject, replace(CHAIN, edges=((0, 1),), weights=(1.0,), alpha=1.0))[3]))
    require(abs(factor - 1) > 0.01, f"{subject.name}: the unseen keep their mass")
    return f"run: times {factor:.2f}"


# ---------------------------------------------------------------- with forward KL: the closure effect


@evidence("closure", "never")
def what_is_added_never_rises(subject: Subject) -> str:
    """Adding f to an objective never raises f at the optimum, and f falls with its margin (or is flat, where the
    optimum does not move)."""
    slopes = [exact(sp.diff(subject.of_margin, Z).subs(Z, (region.get(U, Z) - V))) for region in subject.regions]
    require(all(s.is_negative for s in slopes[:1]), f"{subject.name} does not fall with its margin")
    require(all(s.is_negative or s == 0 for s in slopes), f"{subject.name} rises with its margin")
    return "per token" if subject.normalised else ""


@evidence("closure", "never")
def what_raises_a_winner_widens_its_margins(subject: Subject) -> str:
    """DPO's part widens the margin. The other adds to the weight of -log pi(0), which moves log pi along the first
    column of the inverse of a Hessian, a Laplacian with a positive diagonal added; its entry 0 is the largest."""
    require(dpo_and_more.accepts(subject), f"{subject.name} is not DPO and more")
    term = subject.total - losses.dpo(U - V, beta=BETA)
    require(exact(sp.diff(term, U)).is_negative and sp.diff(term, U, 2) == 0, "the term is not a weight of -log pi")
    require(exact(subject.total.diff(U, 2)).is_positive, "a margin's curvature may vanish")
    diagonal = sp.symbols("d0:4", positive=True)
    links = {(i, j): sp.Symbol(f"l{i}{j}", positive=True) for i in range(4) for j in range(i + 1, 4)}
    hessian = sp.diag(*diagonal)
    for (i, j), link in links.items():
        hessian += link * sp.Matrix(4, 4, lambda a, b, i=i, j=j: ((a == i) - (a == j)) * ((b == i) - (b == j)))
    for other in (1, 2, 3):
        lead = sp.expand(hessian.cofactor(0, 0) - hessian.cofactor(0, other))
        require(all(c > 0 for c in sp.Poly(lead, *diagonal, *links.values()).coeffs()), "another entry is larger")
    return ""


@evidence("closure", "never")
def the_top_of_a_chain_never_sinks(subject: Subject) -> str:
    """What the loss sees of 0>2 never falls, and is the margin where 0 is not below its reference; on 0>1>2 it never
    is: that would take a push on 1 both above and below the one of 1 on 2."""
    z = seen_margin(subject)
    require(vanishes((z - (U - V)).subs(U, T)), f"{subject.name} does not see the margin of a winner above")
    require(sp.diff(z.subs(U, -T), V) == -1, f"{subject.name} sees another loser")
    check_drift_below(subject)
    # Slopes s of 0>1 and r of 1>2, which pulls 1 with (1 + j) r, 0 <= j <= lambda; shares p_0 = 1 - p_1 - q. Below its
    # reference, 0 has (1 + lambda (1 - p_0)) s < p_0 j r; so j > 0, and 1 is not above its own, which takes
    # (1 + p_1 lambda) s >= (1 + j (1 - p_1)) r. Both together:
    j, p1, q = sp.symbols("j p_1 q", positive=True)
    p0 = 1 - p1 - q
    gap = (1 + j * (1 - p1)) * (1 + LAM * (1 - p0)) - p0 * j * (1 + p1 * LAM)
    stated = 1 + LAM * p1 + LAM * q + j * (1 - p1) * LAM * q + j * q * (1 + p1 * LAM)  # p_1 < 1: all terms > 0
    require(sp.expand(gap - stated) == 0, "the top may sink")
    return ""


@evidence("closure", "yes", "counterexample")
def a_target_draws_it_in(subject: Subject) -> str:
    """Run: a chain with the optimum's margin of 0 over 2 beyond what the loss of 0>2 asks for. (Where the target is a
    reward's, three margins that no reward has.)"""
    chain = subject.example or CHAIN
    before, after = (fitted(subject, example) for example in (chain, chain.closed))
    margins = [float(u[0] - u[2]) for u in (before, after)]
    require(margins[1] < margins[0] - 0.01, f"{subject.name}: the margin goes from {margins[0]} to {margins[1]}")
    return f"{margins[0]:.2f} to {margins[1]:.2f}"


# ---------------------------------------------------------------- optima with forward KL, certified


@dataclass(frozen=True, kw_only=True)
class Example:
    """Pairs of a tabular problem with forward KL; the last response is unseen."""

    edges: tuple[tuple[int, int], ...] = ((0, 1), (1, 2))
    weights: tuple[float, ...] = (1.0, 1.0)
    ref: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)
    alpha: float = 0.1
    setting: Setting = NUMBERS
    added: float = 1.0
    """Weight of the pair 0 > 2 in `closed`."""

    @property
    def closed(self) -> Example:
        """With the pair 0 > 2 added, the others as they were."""
        return replace(self, edges=(*self.edges, (0, 2)), weights=(*self.weights, self.added))


CHAIN = Example()


def slopes_of(subject: Subject, example: Example) -> Callable[[Floats], tuple[float, Floats]]:
    """Log-ratios [n] -> sum_e w_e loss_e - alpha pi_ref . u, and its slopes in them, [n]."""
    ref, of_pair = np.array(example.ref), subject.compiled

    def slopes(u: Floats) -> tuple[float, Floats]:
        total, gradient = float(-example.alpha * ref @ u), -example.alpha * ref
        for (w, lo), weight in zip(example.edges, example.weights, strict=True):
            value, of_winner, of_loser = of_pair(u[w], u[lo], ref[w], ref[lo], *example.setting.values)
            total += weight * float(value)
            gradient[w] += weight * of_winner
            gradient[lo] += weight * of_loser
        return total, gradient

    return slopes


def fitted(subject: Subject, example: Example) -> Floats:
    """Log-ratios [n] at the optimum of sum_e w_e loss_e + alpha KL(pi_ref || pi), in float64.

    Raises:
        CheckFailed: the policy found does not meet the Karush-Kuhn-Tucker conditions to 1e-8.
    """
    ref, slopes = np.array(example.ref), slopes_of(subject, example)

    def in_logits(logits: Floats) -> tuple[float, Floats]:
        logps = logits - np.logaddexp.reduce(logits)
        total, gradient = slopes(logps - np.log(ref))
        return total, gradient - np.exp(logps) * gradient.sum()

    with np.errstate(all="ignore"):  # where there is no optimum, the search leaves what floats hold
        found = minimize(in_logits, np.log(ref), jac=True, method="BFGS", options={"gtol": 1e-9})
        polished = root(lambda x: in_logits(np.append(x, 0.0))[1][:-1], found.x[:-1] - found.x[-1], tol=1e-13)
        logps = np.append(polished.x, 0.0) - np.logaddexp.reduce(np.append(polished.x, 0.0))
    certificate = policy_kkt(logps, slopes(logps - np.log(ref))[1])
    require(certificate.accepts(1e-8), f"{subject.name}: no optimum found, {certificate}")
    u: Floats = logps - np.log(ref)
    return u


# ---------------------------------------------------------------- the losses


def sigma(z: Any) -> Any:
    """1 / (1 + e^-z)."""
    return 1 / (1 + sp.exp(-z))


def subjects() -> tuple[Subject, ...]:
    """The rows of the table; the same as long as the losses are, with all that was found of them."""
    return _subjects(losses_now())


@cache
def _subjects(_: tuple[Any, ...]) -> tuple[Subject, ...]:
    margin, half = U - V, 1 / (2 * BETA)
    seen = margin - LAM * sp.Piecewise((-U, U < 0), (0, True))
    per_token = (U + sp.log(P)) / LONG - (V + sp.log(Q)) / SHORT
    dpo_pull = BETA * sigma(-BETA * margin)
    scaled = 1 - BETA * margin
    peak_of_dpo = {"budget": sp.LambertW(sp.exp(-1)), "peak": lambda x: 1 / (x - 1)}
    of_margins = (the_multiplier_is_alpha, what_is_added_never_rises)
    drawn_in = (the_multiplier_is_alpha, a_target_draws_it_in)
    targeted = (has_a_finite_target, one_way_pair_stays, has_an_infimum, a_common_shift_is_not_seen)
    inconsistent = replace(CHAIN, alpha=0.05)
    return (
        Subject(
            name="DPO",
            source="[F] eq 6",
            functions=("dpo",),
            value=lambda pair, h: losses.dpo(pair.margin, beta=h.beta),
            pull=dpo_pull,
            push=dpo_pull,
            **peak_of_dpo,
            cells=(
                falls_for_ever,
                components_decide,
                has_an_infimum,
                a_common_shift_is_not_seen,
                slope_has_a_peak,
                the_kl_holds_every_response,
                *of_margins,
            ),
        ),
        Subject(
            name="cDPO",
            source="Mitchell 2023",
            functions=("cdpo",),
            value=lambda pair, h: losses.cdpo(pair.margin, beta=h.beta, label_smoothing=h.label_smoothing),
            pull=BETA * (sigma(-BETA * margin) - FLIPPED),
            push=BETA * (sigma(-BETA * margin) - FLIPPED),
            best=(sp.log((1 - FLIPPED) / FLIPPED) / BETA, sp.S.Zero),
            infimum=-FLIPPED * sp.log(FLIPPED) - (1 - FLIPPED) * sp.log(1 - FLIPPED),
            cells=(*targeted, below_the_peak_of_dpo, the_kl_holds_every_response, *drawn_in),
        ),
        Subject(
            name="robust DPO",
            source="[arXiv 2403.00409](https://arxiv.org/abs/2403.00409)",
            functions=("robust_dpo",),
            value=lambda pair, h: losses.robust_dpo(pair.margin, beta=h.beta, label_smoothing=h.label_smoothing),
            pull=BETA * (sigma(-BETA * margin) + FLIPPED / (1 - 2 * FLIPPED)),
            push=BETA * (sigma(-BETA * margin) + FLIPPED / (1 - 2 * FLIPPED)),
            infimum=-sp.oo,
            cells=(
                falls_for_ever,
                cycle_runs_away,
                falls_below_everything,
                a_common_shift_is_not_seen,
                slope_does_not_vanish,
                the_kl_may_hold_the_loser,
                *of_margins,
            ),
        ),
        Subject(
            name="soft labels (RPO)",
            source="[arXiv 2406.11704](https://arxiv.org/abs/2406.11704)",
            functions=("soft_label",),
            value=lambda pair, h: losses.soft_label(pair.margin, h.reward_margin, beta=h.beta),
            pull=BETA * (sigma(TARGET) - sigma(BETA * margin)),
            push=BETA * (sigma(TARGET) - sigma(BETA * margin)),
            best=(TARGET / BETA, sp.S.Zero),
            infimum=-sigma(TARGET) * sp.log(sigma(TARGET)) - sigma(-TARGET) * sp.log(sigma(-TARGET)),
            example=inconsistent,
            cells=(*targeted, below_the_peak_of_dpo, the_kl_holds_every_response, *drawn_in),
        ),
        Subject(
            name="distillation (REBEL)",
            source="[F] eq 7",
            functions=("distillation",),
            value=lambda pair, h: losses.distillation(pair.margin, h.reward_margin, beta=h.beta),
            pull=2 * BETA * (TARGET - BETA * margin),
            push=2 * BETA * (TARGET - BETA * margin),
            best=(TARGET / BETA, sp.S.Zero),
            budget=TARGET**2 / 2,
            example=inconsistent,
            cells=(*targeted, square_has_a_peak, the_kl_holds_every_response, *drawn_in),
        ),
        Subject(
            name="IPO",
            source="[arXiv 2310.12036](https://arxiv.org/abs/2310.12036)",
            functions=("ipo",),
            value=lambda pair, h: losses.ipo(pair.margin, tau=h.tau),
            pull=1 / TAU - 2 * margin,
            push=1 / TAU - 2 * margin,
            best=(1 / (2 * TAU), sp.S.Zero),
            budget=1 / (8 * TAU**2),
            cells=(*targeted, square_has_a_peak, the_kl_holds_every_response, *drawn_in),
        ),
        Subject(
            name="hinge (SLiC)",
            source="[arXiv 2305.10425](https://arxiv.org/abs/2305.10425)",
            functions=("hinge",),
            value=lambda pair, h: losses.hinge(pair.margin, beta=h.beta),
            pull=sp.Piecewise((BETA, scaled > 0), (0, True)),
            push=sp.Piecewise((BETA, scaled > 0), (0, True)),
            regions=({U: V + (1 - T) / BETA}, {U: V + (1 + T) / BETA}),
            best=(1 / BETA, sp.S.Zero),
            cells=(
                is_flat_beyond_a_target,
                one_way_pair_stays,
                has_an_infimum,
                a_common_shift_is_not_seen,
                ramp_has_an_end,
                the_kl_holds_every_response,
                *of_margins,
            ),
        ),
        Subject(
            name="exponential",
            source="for comparison",
            functions=(),
            value=lambda pair, h: sp.exp(-h.beta * pair.margin),
            pull=BETA * sp.exp(-BETA * margin),
            push=BETA * sp.exp(-BETA * margin),
            budget=sp.exp(-1),
            peak=sp.S.One,
            cells=(
                falls_for_ever,
                components_decide,
                has_an_infimum,
                a_common_shift_is_not_seen,
                slope_has_a_peak,
                the_kl_holds_every_response,
                *of_margins,
            ),
        ),
        Subject(
            name="sigmoid",
            source="for comparison",
            functions=(),
            value=lambda pair, h: sigma(-h.beta * pair.margin),
            pull=BETA * sigma(BETA * margin) * sigma(-BETA * margin),
            push=BETA * sigma(BETA * margin) * sigma(-BETA * margin),
            budget=(PEAK - 1 / PEAK) / 4,
            peak=lambda x: (x + 1) / (x - 1),
            cells=(
                falls_for_ever,
                cycle_runs_away,
                has_an_infimum,
                a_common_shift_is_not_seen,
                slope_has_a_peak,
                the_kl_holds_every_response,
                *of_margins,
            ),
        ),
        Subject(
            name="R-DPO",
            source="[arXiv 2403.19159](https://arxiv.org/abs/2403.19159)",
            functions=("rdpo",),
            value=lambda pair, h: losses.rdpo(
                pair.margin, h.chosen_length, h.rejected_length, beta=h.beta, alpha=h.per_token
            ),
            pull=BETA * sigma(-BETA * margin - RHO * (LONG - SHORT)),
            push=BETA * sigma(-BETA * margin - RHO * (LONG - SHORT)),
            budget=sp.LambertW(sp.exp(-1 - RHO * (LONG - SHORT))),
            peak=lambda x: sp.exp(-RHO * (LONG - SHORT)) / (x - 1),
            cells=(
                falls_for_ever,
                components_decide,
                has_an_infimum,
                a_common_shift_is_not_seen,
                slope_has_a_peak,
                the_kl_holds_every_response,
                *of_margins,
            ),
        ),
        Subject(
            name="SimPO",
            source="[arXiv 2405.14734](https://arxiv.org/abs/2405.14734)",
            functions=("simpo",),
            value=lambda pair, h: losses.simpo(
                *pair.policy, h.chosen_length, h.rejected_length, beta=h.beta, gamma=h.gamma
            ),
            pull=BETA / LONG * sigma(GAMMA - BETA * per_token),
            push=BETA / SHORT * sigma(GAMMA - BETA * per_token),
            cells=(
                falls_for_ever,
                components_decide,
                has_an_infimum,
                leaks_faster_than_it_sees,
                log_probs_have_no_reference,
                the_kl_holds_every_response,
                lengths_move_them,
                what_is_added_never_rises,
            ),
        ),
        Subject(
            name="DPO + NLL",
            source="[arXiv 2404.19733](https://arxiv.org/abs/2404.19733)",
            functions=("dpo_nll", "sft_term"),
            value=lambda pair, h: losses.dpo_nll(
                pair.margin, pair.policy[0], h.chosen_length, beta=h.beta, alpha=h.nll
            ),
            pull=dpo_pull + NLL / LONG,
            push=dpo_pull,
            best=(-sp.log(P), -sp.oo),
            cells=(
                dpo_and_more,
                winners_are_held,
                has_an_infimum,
                winner_takes_all,
                winner_is_given_mass,
                the_kl_holds_every_response,
                every_winner_takes_from_them,
                what_raises_a_winner_widens_its_margins,
            ),
        ),
        Subject(
            name="DPOP",
            source="[arXiv 2402.13228](https://arxiv.org/abs/2402.13228)",
            functions=("dpop",),
            value=lambda pair, h: losses.dpop(pair.u, pair.v, beta=h.beta, lam=h.lam),
            pull=BETA * sigma(-BETA * seen) * sp.Piecewise((1 + LAM, U < 0), (1, True)),
            push=BETA * sigma(-BETA * seen),
            regions=({U: T}, {U: -T}),
            cells=(
                dpo_of_less,
                cycles_do_not_sink,
                has_an_infimum,
                leaks_faster_than_it_sees,
                dpo_and_what_the_kl_pays,
                the_kl_holds_every_response,
                losing_winners_take_from_them,
                the_top_of_a_chain_never_sinks,
            ),
        ),
        Subject(
            name="SPPO, hard labels",
            source="[arXiv 2405.00675](https://arxiv.org/abs/2405.00675)",
            functions=("sppo_hard",),
            value=lambda pair, h: losses.sppo_hard(pair.u, pair.v, beta=h.beta),
            pull=2 * (half - U),
            push=2 * (half + V),
            best=(half, -half),
            example=Example(
                ref=(0.4, 0.3, 0.2, 0.1), alpha=1.0, weights=(8.0, 1.0), setting=replace(NUMBERS, beta=0.5)
            ),
            cells=(
                has_two_finite_targets,
                one_way_pair_stays,
                has_an_infimum,
                both_log_ratios_are_pinned,
                loser_is_emptied,
                the_kl_holds_every_response,
                pinned_pairs_move_them,
                a_target_draws_it_in,
            ),
        ),
        Subject(
            name="NCA",
            source="[arXiv 2402.05369](https://arxiv.org/abs/2402.05369)",
            functions=("nca",),
            value=lambda pair, h: losses.nca(pair.u, pair.v, beta=h.beta),
            pull=BETA * (1 - sp.Rational(3, 2) * sigma(BETA * U)),
            push=BETA * sigma(BETA * V) / 2,
            best=(sp.log(2) / BETA, -sp.oo),
            infimum=sp.Rational(3, 2) * sp.log(3) - sp.log(2),
            example=Example(
                ref=(0.125, 0.125, 0.5, 0.25),
                alpha=5.0,
                weights=(0.25, 5.0),
                setting=replace(NUMBERS, beta=3.5),
                added=0.75,
            ),
            cells=(
                loser_falls_for_ever,
                winners_are_held,
                has_an_infimum,
                both_log_ratios_are_pinned,
                loser_is_emptied,
                the_kl_holds_every_response,
                pinned_pairs_move_them,
                a_target_draws_it_in,
            ),
        ),
    )


def named(name: str, **changes: Any) -> Subject:
    """A row of the table, perhaps with changes, of which nothing has been found yet."""
    [subject] = [subject for subject in subjects() if subject.name == name]
    return replace(subject, found={}, **changes) if changes else subject


# ---------------------------------------------------------------- proof and enumeration


def prove() -> None:
    table()
    check_components(list(digraphs(3)), across_components)


def enumerate_cells(thorough: bool) -> str:
    """No loss is accepted by evidence for two answers (of the first column, or of all); and a conic solver finds
    the optima that were certified."""
    tried, programs = 0, 0
    for subject in subjects():
        for of_cell in subject.cells[: None if thorough else 1]:
            for other in EVIDENCE:
                if other.fate == of_cell.fate and other.answer != of_cell.answer:
                    require(not other.accepts(subject), f"{subject.name}: {of_cell.name} and {other.name} both hold")
                    tried += 1
    for name, cone in CONES.items():
        for weights in itertools.product((0.5, 4.0), repeat=2) if thorough else ((4.0, 0.5),):
            for alpha in (0.3, 3.0) if thorough else (1.0,):
                example = Example(ref=(0.4, 0.3, 0.2, 0.1), alpha=alpha, weights=weights)
                _check_against_clarabel(named(name), example.closed, cone)
                programs += 1
    return f"{len(subjects()) * len(FATES)} cells, {tried} other answers refuted; {programs} exponential-cone programs"


def _logistic(z: Any) -> Any:
    import cvxpy as cp

    return cp.logistic(z)


def _positive_part(z: Any) -> Any:
    import cvxpy as cp

    return cp.pos(z)


CONES: dict[str, Callable[[Any, Any, Any, Setting], Any]] = {
    "cDPO": lambda u, v, logp, h: (
        (1 - h.label_smoothing) * _logistic(-h.beta * (u - v)) + h.label_smoothing * _logistic(h.beta * (u - v))
    ),
    "SimPO": lambda u, v, logp, h: _logistic(h.gamma - h.beta * (logp[0] - logp[1]) / h.chosen_length),
    "DPO + NLL": lambda u, v, logp, h: _logistic(-h.beta * (u - v)) - h.nll / h.chosen_length * logp[0],
    "DPOP": lambda u, v, logp, h: _logistic(-h.beta * (u - v) + h.beta * h.lam * _positive_part(-u)),
    "SPPO, hard labels": lambda u, v, logp, h: (u - 0.5 / h.beta) ** 2 + (v + 0.5 / h.beta) ** 2,
    "NCA": lambda u, v, logp, h: _logistic(-h.beta * u) + (_logistic(h.beta * u) + _logistic(h.beta * v)) / 2,
}
"""The convex losses as cones, of log-ratios, log-probs and a setting."""


def _check_against_clarabel(subject: Subject, example: Example, cone: Callable[..., Any]) -> None:
    import cvxpy as cp

    ref, u = np.array(example.ref), cp.Variable(len(example.ref))
    logps = u + np.log(ref)
    pairs = sum(
        weight * cone(u[w], u[lo], (logps[w], logps[lo]), example.setting)
        for (w, lo), weight in zip(example.edges, example.weights, strict=True)
    )
    problem = cp.Problem(cp.Minimize(pairs - example.alpha * ref @ u), [cp.log_sum_exp(logps) <= 0])
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    if subject.name in BENT and (bends := [w for w in {w for w, _ in example.edges} if abs(u.value[w]) < 1e-5]):
        _check_on_a_bend(subject, example, u.value, bends)
        return
    gap = float(np.abs(u.value - fitted(subject, example)).max())
    require(gap < 1e-4, f"{subject.name}: Clarabel's log-ratios are {gap:.1e} from ours")


BENT = {"DPOP"}
"""Losses whose slope jumps where a winner has the reference's probability: no optimum there is a root of the slopes."""


def _check_on_a_bend(subject: Subject, example: Example, u: Floats, bends: Sequence[int]) -> None:
    """Zero lies between the slopes to both sides of the winners that are on a bend: a mean of the corners, with weights
    that add up to one, is stationary on the simplex, to what a conic solver's optimum is known to."""
    step, slopes, corners = 1e-4, slopes_of(subject, example), []
    policy = np.array(example.ref) * np.exp(u)
    for signs in itertools.product((-step, step), repeat=len(bends)):
        near = u.copy()
        near[list(bends)] = signs
        gradient = slopes(near)[1]
        corners.append(gradient - policy * gradient.sum())
    matrix = np.vstack([np.array(corners).T, np.ones(len(corners))])
    _, residual = nnls(matrix, np.append(np.zeros(len(u)), 1.0))
    require(residual < 1e-4, f"{subject.name}: the optimum on a bend is off by {residual:.1e}")


# ---------------------------------------------------------------- without each assumption


def _tied(name: str) -> Subject:
    """Two pairs whose margins are t and -t of one shared parameter, as a loss of t."""

    def value(pair: Pair, h: Setting) -> Any:
        swapped = Pair(u=pair.v, v=pair.u, ref_u=pair.ref_v, ref_v=pair.ref_u)
        return subject.value(pair, h) + subject.value(swapped, h)

    subject = named(name)
    return replace(subject, value=value, found={})


def _tied_parameters() -> str:
    tied = _tied("DPO")
    require(tied.curvature.is_positive, "not strictly convex")
    require(vanishes(tied.slope.subs(X, 1)), "0 is not stationary")
    return "DPO, margins t and -t of one shared parameter: finite at t = 0, though both pairs are seen one way"


def _reference_without_the_loser() -> str:
    total = named("DPO").total - ALPHA * P * U - ALPHA * 0 * V
    require(sp.diff(total, V).is_positive, "a larger pi(y_l) is better")
    require(limit(total, V, -sp.oo) == -ALPHA * P * U, "an infimum elsewhere")
    return "DPO with forward KL and pi_ref(y_l) = 0: falls for ever as pi(y_l) does, an optimum is not attained"


def reverse_kl(ref: Sequence[Any], logratios: Sequence[Any]) -> Any:
    """KL(pi || pi_ref)."""
    return -sum(share * sp.exp(u) * losses.forward_kl(u) for share, u in zip(ref, logratios, strict=True))


def _reverse_kl() -> str:
    """If the unseen keep their mass, Lagrange's condition on them is pi_ref(y) = pi_ref(y) (1 + KL(pi || pi_ref))."""
    unseen = sp.Symbol("u_0", real=True)
    penalty = reverse_kl((P, Q, 1 - P - Q), (U, V, unseen))
    slopes = [sp.diff(penalty, variable) for variable in (U, V, unseen)]
    mass = P * sp.exp(U) + Q * sp.exp(V) + (1 - P - Q) * sp.exp(unseen)
    require(sp.expand(sum(slopes) - penalty - mass) == 0, "the multiplier is not alpha (1 + KL)")
    require(sp.expand(slopes[2].subs(unseen, 0) - (1 - P - Q)) == 0, "the unseen's slope is not pi_ref(y)")
    return "DPO with KL(pi || pi_ref): the unseen keep their mass only if that divergence is 0, where nothing moves"


def check_budget(subject: Subject, example: Example) -> Floats:
    """alpha J at the example's optimum is at most the subject's budget; returns the log-ratios there, [n]."""
    u, setting = fitted(subject, example), example.setting
    budget = sp.LambertW(sp.exp(-1)) if subject.budget is None else subject.budget
    largest = float(budget.subs(dict(zip(SYMBOLS.values, setting.values, strict=True))))
    reached = example.alpha * float((np.array(example.ref) * np.expm1(u)) @ u)
    require(reached <= largest + 1e-9 * (1 + largest), f"{subject.name}: alpha J = {reached} is above C = {largest}")
    return u


NEAR_THE_PEAK = Example(edges=((0, 1),), weights=(1.0,), ref=(0.2, 0.4, 0.2, 0.2), alpha=0.79)
"""p-DPO's margin at its optimum is near 1.278."""


def _weights_of_two() -> str:
    heavy = replace(NEAR_THE_PEAK, weights=(2.0,))
    u = fitted(named("DPO"), heavy)
    reached = heavy.alpha * float((np.array(heavy.ref) * np.expm1(u)) @ u)
    require(reached > 1.5 * float(sp.LambertW(sp.exp(-1))), f"alpha J is only {reached}")
    return f"DPO, one pair of weight 2: alpha J = {reached:.3f}, above W(1/e) = 0.278"


# ---------------------------------------------------------------- properties


@st.composite
def _settings(draw: st.DrawFn) -> Setting:
    return Setting(
        beta=draw(positive(0.2, 3)),
        tau=draw(positive(0.2, 3)),
        label_smoothing=draw(st.floats(0.05, 0.4)),
        nll=draw(positive(0.1, 2)),
        lam=draw(positive(0.1, 10)),
        gamma=draw(positive(0.1, 2)),
        per_token=draw(positive(0.01, 0.3)),
        reward_margin=draw(st.floats(-3, 3)),
        chosen_length=float(draw(st.integers(1, 9))),
        rejected_length=float(draw(st.integers(1, 9))),
    )


TRAINED = tuple(subject.name for subject in subjects() if subject.functions)


@given(st.sampled_from(TRAINED), _settings(), st.floats(-3, 3), st.floats(-3, 3), positive(0.01, 0.5))
def autograd_pulls_and_pushes_as_stated(name: str, setting: Setting, u: float, v: float, share: float) -> None:
    """torch: the slopes of the loss that is trained are those that every cell speaks of."""
    import torch

    def tensor(number: float) -> Any:
        return torch.tensor([number], dtype=torch.float64)

    subject = named(name)
    winner, loser, ref = tensor(u).requires_grad_(), tensor(v).requires_grad_(), tensor(np.log(share))
    of_pair = replace(
        setting,
        **{key: tensor(getattr(setting, key)) for key in ("reward_margin", "chosen_length", "rejected_length")},
    )
    loss = subject.value(Pair(u=winner, v=loser, ref_u=ref, ref_v=ref), of_pair)
    slopes = torch.autograd.grad(loss.sum(), (winner, loser), allow_unused=True)
    pull, push = subject.stated(u, v, share, share, *setting.values)
    got = [0.0 if slope is None else float(slope) for slope in slopes]
    np.testing.assert_allclose(got, [-float(pull), float(push)], rtol=1e-9, atol=1e-9)


@st.composite
def _examples(draw: st.DrawFn) -> Example:
    counts = draw(st.lists(st.integers(1, 8), min_size=4, max_size=4))
    edges = draw(st.sampled_from([((0, 1),), ((0, 1), (1, 2)), ((0, 1), (1, 2), (0, 2)), ((0, 1), (1, 2), (2, 0))]))
    weights = np.array(draw(st.lists(positive(0.2, 5), min_size=len(edges), max_size=len(edges))))
    setting = replace(draw(_settings()), rejected_length=3.0, chosen_length=3.0)
    return Example(
        edges=edges,
        weights=tuple(weights / weights.sum()),
        ref=tuple(np.array(counts) / sum(counts)),
        alpha=draw(positive(0.2, 5)),
        setting=setting,
    )


@given(st.sampled_from(["DPO", "cDPO", "soft labels (RPO)", "distillation (REBEL)", "IPO", "R-DPO"]), _examples())
def the_divergence_stays_within_its_budget(name: str, example: Example) -> None:
    """NumPy: at certified optima alpha J <= C, and no unseen response has moved."""
    assert abs(check_budget(named(name), example)[3]) < 1e-6


@given(_examples())
def the_nll_takes_the_same_share_of_every_unseen(example: Example) -> None:
    """NumPy: at certified optima of DPO + NLL, the unseen are multiplied by alpha n / (alpha n + a)."""
    u, h = fitted(named("DPO + NLL"), example), example.setting
    kept = example.alpha * h.chosen_length / (example.alpha * h.chosen_length + h.nll)
    np.testing.assert_allclose(np.exp(u[3]), kept, rtol=1e-6)


def _weakly_connected(graph: PreferenceGraph) -> Any:
    return graph.components[graph.winners] != graph.components[graph.losers]


def _dpo_with(value: Value) -> Subject:
    return named("DPO", value=value)


CLAIMS = (
    Claim(
        id="loss-fates",
        source="ours, on losses of other authors; after [F] A.1, A.2, A.10",
        statement=(
            "The table of docs/losses.md: for DPO and 14 other losses, whether a pair's margin diverges, whether the "
            "condition on strong components is theirs, whether they are bounded below, what their infimum leaves to "
            "unseen responses; and with a forward-KL penalty, whether the divergence is at most C / alpha, the optimum "
            "attained, the mass of the unseen kept, and whether an added transitive pair can narrow its margin."
        ),
        formula=(
            r"C=\sup_\Delta-\Delta f'(\Delta),\qquad "
            r"\pi(\text{unseen})=\pi_{\rm ref}(\text{unseen})\,\alpha/(\alpha-\partial_{u_w}f-\partial_{u_l}f)"
        ),
        domain="finite responses, tabular policies; minimisers and infima, no flow",
        losses=(
            *(name for subject in subjects() for name in subject.functions),
            "logratio_margin",
            "forward_kl",
            "pessimistic",
        ),
        assumptions={
            "free parameters": "one free parameter a response",
            "full support": "pi_ref(y) > 0 for every response",
            "forward KL": "the penalty is alpha KL(pi_ref || pi), alpha > 0",
            "mean over pairs": "the weights of the pairs add up to 1, where a bound on the divergence is given",
        },
        prove=prove,
        counterexamples={
            "free parameters": _tied_parameters,
            "full support": _reference_without_the_loser,
            "forward KL": _reverse_kl,
            "mean over pairs": _weights_of_two,
        },
        controls={
            "without free parameters": lambda: falls_for_ever(_tied("DPO")),
            "without full support": lambda: check_coercive(named("DPO"), sp.S.Zero),
            "without forward KL": lambda: check_kept(named("DPO"), reverse_kl),
            "without mean over pairs": lambda: check_budget(named("DPO"), replace(NEAR_THE_PEAK, weights=(2.0,))),
            "sign of the margin": lambda: check_slopes(
                _dpo_with(lambda pair, h: losses.dpo(-pair.margin, beta=h.beta))
            ),
            "without the reference": lambda: check_slopes(
                _dpo_with(lambda pair, h: losses.dpo(pair.policy[0] - pair.policy[1], beta=h.beta))
            ),
            "a constant added": lambda: check_slopes(
                _dpo_with(lambda pair, h: losses.dpo(pair.margin, beta=h.beta) + 1)
            ),
            "weak components": lambda: check_components(list(digraphs(3)), _weakly_connected),
            "IPO diverges": lambda: falls_for_ever(named("IPO")),
            "the sigmoid obeys the components": lambda: components_decide(named("sigmoid")),
            "robust DPO is bounded": lambda: has_an_infimum(named("robust DPO")),
            "1/e bounds DPO's divergence": lambda: slope_has_a_peak(named("DPO", budget=sp.exp(-1))),
            "DPO with NLL keeps the unseen": lambda: the_multiplier_is_alpha(named("DPO + NLL")),
            "DPOP keeps the unseen": lambda: the_multiplier_is_alpha(named("DPOP")),
            "IPO never narrows": lambda: what_is_added_never_rises(named("IPO")),
            "DPO is drawn in": lambda: a_target_draws_it_in(named("DPO")),
        },
        enumerate=enumerate_cells,
        properties=(
            autograd_pulls_and_pushes_as_stated,
            the_divergence_stays_within_its_budget,
            the_nll_takes_the_same_share_of_every_unseen,
        ),
    ),
)
