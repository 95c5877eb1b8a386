"""How pytest sees a claim: one test for each thing that the claim brings, so that a failure names what broke.

A proposition's test file is `globals().update(claim_tests(CLAIMS))`. The ledger (`python -m theory`) runs the same
checks through `theory.claim.run`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from theory.claim import Claim, complete, expect_rejection, not_run_without_library

EXAMPLES = {"default": 50, "thorough": 10_000}
"""Hypothesis examples a property, by profile."""
SYMPY_CACHE = "10000"
"""Results that SymPy keeps of each of its functions, ten times its default; a bound, since examples have no end."""


def load_profile(name: str, *, examples: int | None = None) -> None:
    """Makes a Hypothesis profile current: same examples at every run, no deadline, nothing kept between runs.

    A property takes its settings when its module is imported, and SymPy the size of its cache when it is, so this comes
    first.

    Args:
        name: "default" (fast) or "thorough".
        examples: a property, in place of the profile's own number.
    """
    from hypothesis import HealthCheck, settings  # here, so that a command can say what it does without it

    os.environ.setdefault("SYMPY_CACHE_SIZE", SYMPY_CACHE)
    settings.register_profile(
        name,
        max_examples=EXAMPLES[name] if examples is None else examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],  # a busy machine is no failure
    )
    settings.load_profile(name)


def is_thorough() -> bool:
    """Whether the thorough profile is current."""
    from hypothesis import settings

    return settings.get_current_profile_name() == "thorough"


def claim_tests(claims: Iterable[Claim]) -> dict[str, Callable[[], None]]:
    """Test functions by name: shape, proof, enumeration, each counterexample, control and property, printed form."""
    tests: dict[str, Callable[[], None]] = {}
    for claim in claims:
        for what, check in _checks(claim):
            name = re.sub(r"\W+", "_", f"test_{claim.id}_{what}".lower()).rstrip("_")
            if name in tests:
                raise ValueError(f"two checks are called {name}: rename one of {claim.id}'s")
            tests[name] = check
    return tests


def _checks(claim: Claim) -> Iterator[tuple[str, Callable[[], None]]]:
    def shape() -> None:
        assert complete(claim) == []

    def prove() -> None:
        claim.prove()

    def enumeration() -> None:
        assert claim.enumerate is not None
        assert claim.enumerate(is_thorough()), "an enumeration says how far it went"

    def printed() -> None:
        assert claim.printed is not None
        assert claim.printed(), "nothing breaks the printed statement: then it should not be called broken"

    def breaks_without(counterexample: Callable[[], str]) -> Callable[[], None]:
        def check() -> None:
            assert counterexample(), "a counterexample describes itself"

        return check

    def rejects(control: Callable[[], object]) -> Callable[[], None]:
        return lambda: expect_rejection(control)

    def draws(prop: Any) -> Callable[[], None]:
        inner = prop.hypothesis.inner_test  # here, so that Hypothesis tries no other example, as in the ledger
        prop.hypothesis.inner_test = not_run_without_library()(inner)
        return cast("Callable[[], None]", prop)

    yield "shape", shape
    yield "proof", prove
    if claim.enumerate is not None:
        yield "enumeration", enumeration
    for name, counterexample in claim.counterexamples.items():
        yield f"without_{name}", breaks_without(counterexample)
    for name, control in claim.controls.items():
        yield f"rejects_{name}", rejects(control)
    for prop in claim.properties:
        yield f"property_{prop.__name__}", draws(prop)
    if claim.printed is not None:
        yield "printed_form_fails", printed
