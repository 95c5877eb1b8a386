"""What a machine-checked statement consists of, and how it is run.

A module in `theory.propositions` states one claim (or a printed form and its sharpening) as `Claim` objects in a
module-level tuple `CLAIMS`. `run` executes all that a claim brings and *derives* the verdict; none is stored.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["holds", "holds as sharpened", "fails as printed"]


class CheckFailed(AssertionError):
    """A check rejected a statement; also raised where a symbolic simplification stays inconclusive."""


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
    assumptions: Mapping[str, str]
    """Assumption name -> what it says. `counterexamples` has the same keys."""
    prove: Callable[[], object]
    """Derives the statement from `theory.losses` exactly; raises CheckFailed where it cannot."""
    counterexamples: Mapping[str, Callable[[], str]]
    """Assumption name -> builds an instance that violates only it, checks that the claim breaks, describes it."""
    controls: Mapping[str, Callable[[], object]]
    """What is wrong -> runs the claim's own checks on that wrong variant; each must raise CheckFailed."""
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
    symbolic: bool
    enumerated: str | None
    examples: int
    verdict: Verdict | None
    """None where a check failed."""
    counterexample: str | None
    """To the printed statement, where it fails."""
    seconds: float
    errors: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The row as plain JSON values."""
        return asdict(self)


def all_claims() -> Iterator[Claim]:
    """Every claim of `theory.propositions`, module by module in alphabetical order."""
    package = importlib.import_module("theory.propositions")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.endswith("_test"):
            yield from importlib.import_module(f"theory.propositions.{module.name}").CLAIMS


def run(claim: Claim, *, thorough: bool) -> Row:
    """Runs the proof, enumeration, counterexamples, controls and properties, and derives the verdict.

    A property draws as many examples as the Hypothesis profile says that was current when its module was imported
    (`theory.testing.load_profile`); the row has the number that really ran to the end.

    Args:
        claim: what to check.
        thorough: enumerate to the larger size.
    """
    start, errors, drawn = time.perf_counter(), [], 0

    def attempt(what: str, check: Callable[[], Any]) -> Any:
        try:
            return check()
        except Exception as error:  # reported in the row, and in the exit status
            errors.append(f"{what}: {type(error).__name__}: {error}")
            return None

    attempt("proof", claim.prove)
    symbolic = not errors
    enumerate_all = claim.enumerate
    enumerated = attempt("enumeration", lambda: enumerate_all(thorough)) if enumerate_all else None
    if set(claim.counterexamples) != set(claim.assumptions):
        errors.append(f"counterexamples {set(claim.counterexamples)} are not those of {set(claim.assumptions)}")
    for name, counterexample in claim.counterexamples.items():
        attempt(f"counterexample without {name}", counterexample)
    for name, control in claim.controls.items():
        try:
            control()
            errors.append(f"control {name}: the wrong variant was accepted")
        except CheckFailed:
            pass
        except Exception as error:
            errors.append(f"control {name}: {type(error).__name__}: {error}")
    for prop in claim.properties:
        drawn += attempt(f"property {prop.__name__}", functools.partial(_draw, prop)) or 0
    broken = attempt("search for a counterexample to the printed form", claim.printed) if claim.printed else None
    return Row(
        id=claim.id,
        source=claim.source,
        assumptions=list(claim.assumptions),
        symbolic=symbolic,
        enumerated=enumerated,
        examples=drawn,
        verdict=None if errors else verdict(claim, broken),
        counterexample=broken,
        seconds=time.perf_counter() - start,
        errors=errors,
    )


def verdict(claim: Claim, counterexample: str | None) -> Verdict:
    """The verdict on a claim that passed all its checks, given what breaks its printed form."""
    return "fails as printed" if counterexample else "holds as sharpened" if claim.sharpens else "holds"


def _draw(prop: Any) -> int:
    """Runs a Hypothesis test; the number of examples that met its assumptions and passed."""
    inner, passed = prop.hypothesis.inner_test, 0

    @functools.wraps(inner)
    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal passed
        inner(*args, **kwargs)
        passed += 1

    prop.hypothesis.inner_test = counted
    try:
        prop()
    finally:
        prop.hypothesis.inner_test = inner
    return passed
