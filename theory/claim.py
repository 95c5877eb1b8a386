"""What a machine-checked statement consists of, and how it is run.

A module in `theory.propositions` states one claim (or a printed form and its sharpening) as `Claim` objects in a
module-level tuple `CLAIMS`. `run` executes all that a claim brings and *derives* the verdict; none is stored.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import pkgutil
import time
import unittest
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["holds", "holds as sharpened", "fails as printed"]
OPTIONAL = frozenset({"torch"})
"""Libraries that a check may need and an installation may lack."""


class CheckFailed(AssertionError):
    """A check rejected a statement; also raised where a symbolic simplification stays inconclusive."""


class NotRun(unittest.SkipTest):
    """A check needs a library that is not installed: it neither passed nor failed, Hypothesis and pytest skip it."""


@contextlib.contextmanager
def not_run_without_library() -> Iterator[None]:
    """Raises NotRun where an import fails because one of OPTIONAL is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        raise NotRun(f"not run: {error.name} is not installed") from error


def require(condition: object, message: str) -> None:
    """Raises CheckFailed unless the condition is exactly True (a symbolic relation that stays undecided fails)."""
    if condition is not True and str(condition) != "True":
        raise CheckFailed(f"{message} (got {condition!r})")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement of the papers, or of ours, and everything that checks it."""

    id: str
    """Ledger id, e.g. "prop1-scc"."""
    source: str
    """Paper and place, e.g. "[F] A.1, Proposition 1"; "ours" where neither paper has it."""
    statement: str
    """In words: one or two sentences."""
    formula: str
    """The same in LaTeX, without dollar signs."""
    domain: str = ""
    """What it speaks of: finite or countable responses, tabular or parametric policies, and where it is about a flow,
    the gradient in log-probs or in logits."""
    losses: tuple[str, ...] = ()
    """Functions of `theory.losses` that the proof calls; a change of any of them is to be noticed by it."""
    no_losses: str = ""
    """Why the proof calls none, where `losses` is empty."""
    assumptions: Mapping[str, str]
    """Assumption name -> what it says. `counterexamples` has the same keys."""
    prove: Callable[[], object]
    """Derives the statement from `theory.losses` exactly; raises CheckFailed where it cannot."""
    counterexamples: Mapping[str, Callable[[], str]]
    """Assumption name -> builds an instance that violates only it, checks that the claim breaks, describes it."""
    controls: Mapping[str, Callable[[], object]]
    """What is wrong -> runs the claim's own checks on that wrong variant; each must raise CheckFailed.

    For each assumption a there is "without a": the check on an instance that violates only a.
    """
    enumerate: Callable[[bool], str] | None = None
    """Checks every instance up to a size (larger when thorough); returns the size, e.g. "all graphs, n <= 4"."""
    properties: tuple[Callable[[], None], ...] = ()
    """Hypothesis tests without arguments left (decorated with @given), on NumPy and, where it adds something, torch."""
    printed: Callable[[], str | None] | None = None
    """Searches, smallest first, for an instance that breaks the statement *as printed*; None if there is none."""
    sharpens: bool = False
    """True where the statement is a strictly stronger or repaired form of the printed one."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the ledger."""

    id: str
    source: str
    assumptions: list[str]
    domain: str
    losses: list[str]
    symbolic: bool
    enumerated: str | None
    examples: int
    verdict: Verdict | None
    """None where a check failed, or one that decides was not run."""
    counterexample: str | None
    """To the printed statement, where it fails."""
    seconds: float
    errors: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    """Checks that need what is not installed, with the reason."""

    def as_json(self) -> dict[str, Any]:
        """The row as plain JSON values."""
        return asdict(self)


def proposition_modules() -> list[str]:
    """The modules that state claims, in alphabetical order."""
    package = importlib.import_module("theory.propositions")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [f"{package.__name__}.{name}" for name in names if not name.endswith("_test")]


def all_claims() -> Iterator[Claim]:
    """Every claim of `theory.propositions`, module by module in alphabetical order."""
    for name in proposition_modules():
        yield from importlib.import_module(name).CLAIMS


def loss_names() -> list[str]:
    """The public functions of `theory.losses`, in the order of that file."""
    losses = importlib.import_module("theory.losses")
    public = {name: f for name, f in vars(losses).items() if inspect.isfunction(f) and not name.startswith("_")}
    return [name for name, function in public.items() if function.__module__ == losses.__name__]


def losses_now() -> tuple[Any, ...]:
    """The functions of `theory.losses` as they are at this moment: the key of what is kept of checks on them, so that
    none of it is found once a function is another."""
    return tuple(filter(inspect.isfunction, vars(importlib.import_module("theory.losses")).values()))


def complete(claim: Claim) -> list[str]:
    """What keeps a row from being complete, in words; empty where nothing does."""
    problems = []
    for name in ("source", "statement", "formula", "domain"):
        text = getattr(claim, name)
        if not text.strip():
            problems.append(f"it has no {name}")
        elif not text.isprintable():
            problems.append(f"its {name} has a control character: a raw string?")
    unknown = sorted(set(claim.losses) - set(loss_names()))
    if unknown:
        problems.append(f"theory.losses has no function {', '.join(unknown)}")
    if not claim.losses and not claim.no_losses.strip():
        problems.append("it names no losses, and `no_losses` does not say why")
    if claim.losses and claim.no_losses:
        problems.append(f"it names losses, but `no_losses` says why it has none: {claim.no_losses}")
    if set(claim.counterexamples) != set(claim.assumptions):
        have, need = sorted(claim.counterexamples), sorted(claim.assumptions)
        problems.append(f"counterexamples {have} are not those of the assumptions {need}")
    if not claim.controls:
        problems.append("it has no wrong variant that its checks reject")
    return problems + [
        f"no control `without {assumption}`: its check on an instance that violates only that"
        for assumption in claim.assumptions
        if f"without {assumption}" not in claim.controls
    ]


def run(claim: Claim, *, thorough: bool) -> Row:
    """Runs the proof, enumeration, counterexamples, controls and properties, and derives the verdict.

    A property draws as many examples as the Hypothesis profile says that was current when its module was imported
    (`theory.testing.load_profile`); the row has the number that really ran to the end.

    Args:
        claim: what to check.
        thorough: enumerate to the larger size.
    """
    start, drawn = time.perf_counter(), 0
    errors: list[str] = []
    not_run: list[str] = []

    def attempt(what: str, check: Callable[[], Any]) -> Any:
        try:
            with not_run_without_library():
                return check()
        except NotRun as reason:
            not_run.append(f"{what}: {reason}")
        except Exception as error:  # reported in the row, and in the exit status
            errors.append(f"{what}: {type(error).__name__}: {error}")
        return None

    attempt("proof", claim.prove)
    symbolic = not errors and not not_run
    enumerate_all = claim.enumerate
    enumerated = attempt("enumeration", lambda: enumerate_all(thorough)) if enumerate_all else None
    for name, counterexample in claim.counterexamples.items():
        attempt(f"counterexample without {name}", counterexample)
    for name, control in claim.controls.items():
        attempt(f"control {name}", functools.partial(expect_rejection, control))
    for prop in claim.properties:
        drawn += attempt(f"property {prop.__name__}", functools.partial(_draw, prop)) or 0
    unsearched = len(not_run)
    broken = attempt("search for a counterexample to the printed form", claim.printed) if claim.printed else None
    decided = symbolic and len(not_run) == unsearched
    errors += complete(claim)
    return Row(
        id=claim.id,
        source=claim.source,
        assumptions=list(claim.assumptions),
        domain=claim.domain,
        losses=list(claim.losses),
        symbolic=symbolic,
        enumerated=enumerated,
        examples=drawn,
        verdict=verdict(claim, broken) if decided and not errors else None,
        counterexample=broken,
        seconds=time.perf_counter() - start,
        errors=errors,
        not_run=not_run,
    )


def expect_rejection(control: Callable[[], object]) -> None:
    """Runs a control; raises AssertionError unless it raises CheckFailed."""
    try:
        control()
    except CheckFailed:
        return
    raise AssertionError("the wrong variant was accepted")


def verdict(claim: Claim, counterexample: str | None) -> Verdict:
    """The verdict on a claim that passed all its checks, given what breaks its printed form."""
    return "fails as printed" if counterexample else "holds as sharpened" if claim.sharpens else "holds"


def _draw(prop: Any) -> int:
    """Runs a Hypothesis test; the number of examples that met its assumptions and passed."""
    inner, passed = prop.hypothesis.inner_test, 0

    @functools.wraps(inner)
    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal passed
        with not_run_without_library():  # here, so that Hypothesis tries no other example
            inner(*args, **kwargs)
        passed += 1

    prop.hypothesis.inner_test = counted
    try:
        prop()
    finally:
        prop.hypothesis.inner_test = inner
    return passed
