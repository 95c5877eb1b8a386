"""A method's objective as MathML: not written down, but what its loss returns when called on symbols."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import sympy
from markupsafe import Markup
from sympy.printing.mathml import mathml

from lm.objectives import Method, PairBatch, Pessimism
from lm.reporting.settings import method_of


@dataclass(frozen=True)
class Objective:
    """What a policy was trained on."""

    title: str
    says: str
    """First sentences of the method's own docstring, with the source."""
    formula: Markup
    where: list[str]
    """What the formula's letters stand for."""


@dataclass(frozen=True, kw_only=True)
class _Symbols(PairBatch):
    """A pair whose quantities are symbols."""

    margin: Any
    logratios: tuple[Any, Any]

    @property
    def logratio_margin(self) -> Any:
        return self.margin

    @property
    def chosen_logratios(self) -> Any:
        return self.logratios[0]

    @property
    def rejected_logratios(self) -> Any:
        return self.logratios[1]


def objective(name: str, setting: Mapping[str, Any]) -> Objective:
    """The objective of a method in a setting; raises as `method_of`."""
    method = method_of(name, setting)
    return Objective(method.heading(), method.says(), formula(method), list(method.legend()))


def formula(method: Method) -> Markup:
    """One pair's loss as MathML: not written down here, but what the method returns when called on symbols."""

    def one(value: Any) -> Any:
        return np.array([value], dtype=object)

    def positive(name: str) -> Any:
        return sympy.Symbol(name, positive=True)

    # An ensemble of one stands for the member, or the mixture, that the mini-batch chooses.
    pair = _Symbols(
        policy_chosen_logps=one(sympy.log(positive("pi_w"))),
        policy_rejected_logps=one(sympy.log(positive("pi_l"))),
        ref_chosen_logps=one(sympy.log(positive("pi_ref_w"))),
        ref_rejected_logps=one(sympy.log(positive("pi_ref_l"))),
        chosen_lengths=one(positive("|y|_w")),
        rejected_lengths=one(positive("|y|_l")),
        reward_margin=one(sympy.Symbol("delta", real=True)),
        member_margins=one(sympy.Symbol(method.member_letter, real=True))[None],
        sample_logratios=one(-sympy.Function("KL", real=True)(sympy.Symbol("y"))),
        estimated_reward_margin=one(sympy.Symbol("δ̂", real=True)),
        margin=one(sympy.Symbol("Delta", real=True)),
        logratios=(one(sympy.Symbol("u_w", real=True)), one(sympy.Symbol("u_l", real=True))),
    )
    (loss,) = _with_letters(method)(pair)
    presented = mathml(loss.rewrite(sympy.Pow).replace(sympy.Piecewise, _positive_part), printer="presentation")
    # As papers set them; SymPy writes names of functions small.
    for ours, theirs in (("<mi>e</mi>", "<mi>&ExponentialE;</mi>"), ("<mo>−</mo>", "<mo>-</mo>"), (">KL<", ">kl<")):
        presented = presented.replace(theirs, ours)
    return Markup(f'<math display="block"><mi>ℓ</mi><mo>=</mo>{presented}</math>')


def _positive_part(*branches: Any) -> Any:
    """max(0, x) where a loss has x for x > 0 and 0 elsewhere."""
    (value, condition), *others = branches
    strict = isinstance(condition, sympy.Gt | sympy.Lt)
    if strict and others == [(0, True)] and sympy.expand(condition.gts - condition.lts - value) == 0:
        return sympy.Max(0, value)
    return sympy.Piecewise(*branches)


def _with_letters(method: Method) -> Method:
    """The method with a letter for each number among its hyper-parameters that may be any positive one."""
    for field in fields(method):
        value = getattr(method, field.name)
        letters: Any = None
        if isinstance(value, float):
            letters = sympy.Symbol(field.metadata.get("letter", field.name), positive=True)
        elif isinstance(value, Pessimism):
            alpha: Any = sympy.Symbol("alpha", positive=True)
            letters = Pessimism(alpha_start=alpha, alpha_end=alpha, samples=value.samples)  # a target's is a letter too
        if letters is not None:
            with contextlib.suppress(TypeError):  # it has bounds that a letter is on neither side of: its number stays
                method = replace(method, **{field.name: letters})
    return method
