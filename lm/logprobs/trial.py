"""Which route is exact for a model: tried before it is used, on examples of the trial's own.

The trial's examples are the same whatever the user's rows are, but for their length: several prompts with several
completions each, of unequal lengths, one as long as the longest row. So it shows an example that sees the one before
it, a completion that sees its sibling, wrong positions, a recurrent state that runs on, and windows shorter than the
rows. What it expects is the definition: the plain forward of each row alone, without padding.

A trial that could not fail says nothing. So it first asks how much log-probs change where tokens that should be unseen
are seen; a model that hardly reacts (small random weights) is tried as a copy whose weights have been shaken.

Tensor names carry shapes: R completions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lm.logprobs.copies import Unbuildable, precise
from lm.logprobs.definition import (
    Example,
    Values,
    alone,
    described,
    examples_of,
    of_the_model,
    position_limit,
    rows_of,
    some,
    trying,
    vocabulary_of,
)
from lm.logprobs.packing import PACKED

if TYPE_CHECKING:
    from lm.logprobs.completions import CompletionModel, CompletionOutput, Route

ROUNDING = 2e-4
"""Nats a token that rounding may account for: some layers compute in float32 whatever the dtype. A wrong mask or
position is off by much more."""
ROUNDING_64 = 1e-6
"""The same for packed rows of models in float64."""
MARGIN = 10
"""What the trial is to notice has to be at least so many times its tolerance, which is lowered for it, by as much at
most."""


# ---------------------------------------------------------------- the trial


class Trial:
    """One model's packed and padded rows against the definition.

    Args:
        model: to be tried; it is left as it was.
        tokens: of the longest row.
        device: where it is going to run.

    Raises:
        ValueError: the model's plain forward fails.
    """

    def __init__(self, model: CompletionModel, tokens: int, device: torch.device) -> None:
        self.model, self.device = model, device
        self.examples = examples_of(vocabulary_of(model.model), max(2, tokens))
        self.blind: str | None = None
        """Why packed rows cannot be judged; None where they can."""
        self.unchecked: str | None = None
        """Why nothing can be judged, padded rows neither."""
        try:
            self.subject = model
            # In 16 bits rounding hides an error, and a model that is yet to be sharded may not fit the device.
            if not _same(device, model.model.device) or model.model.dtype.itemsize < 4:
                self.subject = precise(model, device)
            if self._prepared() is not None:
                self.subject = model  # not two copies at a time
                self.subject = precise(model, device, shaken=True)
                self.blind = self._prepared(shaken=True)
        except Unbuildable as error:
            self.blind = self.unchecked = str(error)

    def _prepared(self, shaken: bool = False) -> str | None:
        """The expected values, by the plain forward; what keeps this subject from showing a leak, None if nothing."""
        self.tolerance = tolerance = ROUNDING_64 if self.subject.model.dtype == torch.float64 else ROUNDING
        with trying(self.subject), self.model.uncompiled():
            try:
                self.expected = alone(self.subject, rows_of(self.examples))
                reactions = self._reactions()
            except Exception as error:
                if not of_the_model(error):
                    raise
                name = type(self.model.model).__name__
                raise ValueError(f"the plain forward of {name} fails: {described(error)}") from error
        values = [v for v in (self.expected.logps, self.expected.rewards) if v is not None]
        if not all(torch.isfinite(v).all() for v in values):
            self.unchecked = "its plain forward gives numbers that are not finite"
            return self.unchecked
        self.unchecked = None
        for what, reaction in reactions.items():
            # With every weight shaken, none at all is no weakness but a window so short that nothing is in front.
            if reaction < tolerance and not (shaken and reaction < tolerance / MARGIN**2):
                return f"it reacts too little for a trial, {what} changes a token's log-prob by {reaction:.1g} nats"
            if reaction >= tolerance:
                self.tolerance = min(self.tolerance, reaction / MARGIN)
        return None

    def _reactions(self) -> dict[str, float]:
        """How far log-probs are off where they see what they should not: what a leak would look like here."""
        (before, _), _, (prompt, (one, other)) = self.examples
        config = self.subject.model.config
        limits = (position_limit(config), getattr(config.get_text_config(), "max_position_embeddings", None))
        most = min((limit for limit in limits if limit is not None), default=None)
        cases = {
            "another example in front": ([*before, *prompt, *one], len(one), 4),
            "a completion's sibling in front": ([*prompt, *one, *other], len(other), 5),
        }
        return {
            what: self._at(row).excess(alone(self.subject, [(ids, count)]))
            for what, (ids, count, row) in cases.items()
            if most is None or len(ids) <= most
        }

    def _at(self, row: int) -> Values:
        """What one row should be; of a policy with a reward head, which may be new and small, its log-prob alone."""
        expected = some(self.expected, [row])
        return expected if expected.logps is None else replace(expected, rewards=None)

    @cached_property
    def head_is_plain(self) -> bool:
        """Whether the logits are the head's linear map of the last hidden state, with nothing before or after it."""
        if self.model.is_reward_model or not self.model.plain_head:
            return False
        with trying(self.subject), self.subject.stock() as plain:
            row = torch.tensor([self.examples[0][0]], device=plain.device)
            logits = plain(input_ids=row, use_cache=False).logits
            states = getattr(plain.base_model(input_ids=row, use_cache=False), "last_hidden_state", None)
            head = plain.get_output_embeddings()
            if states is None or states.shape[-1] != head.in_features:
                return False
            size = float(logits.abs().max())
            return bool(torch.allclose(head(states).to(logits), logits, rtol=1e-4, atol=1e-4 * size))

    def packed(self, attention: str, spare: bool) -> str | None:
        """What is wrong with packed rows; None if they are exact.

        Args:
            attention: the attention function that knows the layout.
            spare: whether the last layer computes only what is read.
        """
        if self.blind is not None:
            return self.blind
        self.subject.plain_head = self.model.plain_head = self.head_is_plain
        run = partial(packed, self.subject, self.examples, attention, spare)
        problem = self._off(run, self.expected, self.tolerance)
        if problem is None and (self.model.options.autocast or self.subject is not self.model):
            problem = self._as_it_runs(attention, spare)
        return problem

    def _as_it_runs(self, attention: str, spare: bool) -> str | None:
        """Whether the model itself, in its own precision, runs at all; its numbers were judged without the rounding."""
        if not _same(self.device, self.model.model.device):
            return None
        with trying(self.model):
            try:
                with self.model._precision(self.device):
                    packed(self.model, self.examples, attention, spare)
            except Exception as error:
                if not of_the_model(error):
                    raise
                return described(error)
        return None

    def padded(self) -> str | None:
        """What is wrong with rows padded on the right; None if they are exact, or if nothing can be judged."""
        if self.unchecked is not None:
            self.model.plain_head = False  # nobody has seen that it is
            return None
        self.subject.plain_head = self.model.plain_head = self.head_is_plain
        # A short row and long ones: what depends on the longest row of a batch shows. And beginnings of the longest,
        # each padded by another number of tokens: which keys are chosen, of several that score alike, may depend on it.
        (prompt, (own, _)), (long, (one, other)), _ = self.examples
        row = [*long, *one]
        ends = sorted({max(2, len(row) * part // 8) for part in range(3, 8)})
        begun = [(row[: end // 2], [row[end // 2 : end]]) for end in ends]
        tried = [(prompt, [own]), (long, [one, other]), *begun]
        with self.model.uncompiled():
            with trying(self.subject):
                expected = alone(self.subject, rows_of(tried))
            return self._off(lambda: padded(self.subject, tried), expected, ROUNDING)

    def _off(self, values: Callable[[], CompletionOutput], expected: Values, tolerance: float) -> str | None:
        with trying(self.subject):
            try:
                got = values()
            except Exception as error:
                if not of_the_model(error):
                    raise
                return described(error)
        return expected.problem(got, tolerance)


def _same(one: torch.device, other: torch.device) -> bool:
    """Whether they may be one device; "cuda" is whichever of them is the current one."""
    return one.type == other.type and (one.index == other.index or None in (one.index, other.index))


def packed(model: CompletionModel, examples: Sequence[Example], attention: str, spare: bool) -> CompletionOutput:
    """By packed rows, with this attention function; `spare` as of `Trial.packed`. The model is left as it was."""
    before = model.sharing
    try:
        model.sharing = (attention, spare)
        with model._attention(attention):
            return model._packed(*_laid_out(model, examples))
    finally:
        model.sharing = before


def padded(model: CompletionModel, examples: Sequence[Example]) -> CompletionOutput:
    """By rows padded on the right."""
    with model.stock():
        return model._padded(*_laid_out(model, examples))


def _laid_out(model: CompletionModel, examples: Sequence[Example]) -> tuple[Tensor, list[list[int]]]:
    ids = [token for prompt, own in examples for part in (prompt, *own) for token in part]
    lengths = [[len(prompt), *map(len, own)] for prompt, own in examples]
    return torch.tensor(ids, device=model.model.device), lengths


# ---------------------------------------------------------------- a report


@dataclass(frozen=True, kw_only=True)
class RouteReport:
    """What `route_report` found. Differences are from transformers' plain forward of each row alone, in nats (of
    rewards for a reward model), the largest over completions; None where that way does not run."""

    route: Route | None
    """What the model takes; None where neither is exact, and it is refused."""
    reason: str | None
    """Why it is not packed, or why it is refused."""
    packed_one: float | None
    """Packed rows, examples of one completion each."""
    packed_several: float | None
    """Packed rows, examples of several completions."""
    padded_one: float | None
    """Padded rows, likewise."""
    padded_several: float | None
    packed_gradient: float | None
    """Largest difference of a parameter's gradient, in parts of the largest entry of any."""
    padded_gradient: float | None
    limit: float
    """Most nats a token that count as rounding."""
    limit_several: float
    """The same in nats, for the row of several completions that is allowed most; of the four differences above."""
    gradient_limit: float
    """Most that counts as rounding, of the two gradients."""

    @property
    def exact(self) -> bool:
        """Whether the route that it takes is exact, in value and gradient."""
        if self.route is None:
            return False
        values = [getattr(self, f"{self.route}_{which}") for which in ("one", "several")]
        slope = getattr(self, f"{self.route}_gradient")
        return all(v is not None and v <= self.limit_several for v in values) and (
            slope is not None and slope <= self.gradient_limit
        )


def route_report(model: CompletionModel, tokens: int = 64, device: torch.device | None = None) -> RouteReport:
    """Settles the model's route and measures both routes against the definition, with gradients.

    The settled route stays. All is measured in the precision in which the trial judges: the model's own weights where
    they are of at least 32 bits, else those in float32.

    Args:
        model: fresh or settled.
        tokens: of the longest row tried; a window shows only in rows that are longer.
        device: where it is going to run; None for where it is.

    Raises:
        ValueError: the plain forward fails, no copy in float32 can be made, or the option asks for packed rows that do
            not fit.
    """
    device = device or model.model.device
    trial = Trial(model, tokens, device)
    reason: str | None = None
    route: Route | None
    try:
        route = model.settle(*_laid_out(model, trial.examples), device)
        reason = model.reason
    except ValueError as error:
        route, reason = None, str(error)
    if trial.unchecked is not None:
        raise ValueError(f"{type(model.model).__name__} cannot be tried: {trial.unchecked}")
    subject, several = trial.subject, trial.examples
    subject.plain_head = trial.head_is_plain
    attention, spare = model.sharing if route == "packed" else (PACKED, False)
    one = [(prompt, own[:1]) for prompt, own in several]
    ways: dict[str, Callable[[Sequence[Example]], CompletionOutput]] = {
        "packed": lambda examples: packed(subject, examples, attention, spare),
        "padded": lambda examples: padded(subject, examples),
    }
    found: dict[str, float | None] = {}
    right = _gradients(subject, lambda: alone(subject, rows_of(several)))
    for name, way in ways.items():
        for which, examples in (("one", one), ("several", several)):
            expected = some(trial.expected, [0, 2, 4]) if which == "one" else trial.expected
            with trying(subject):
                found[f"{name}_{which}"] = _tried(lambda w=way, e=examples, x=expected: x.largest(w(e)))  # type: ignore[misc]
        slopes = _tried(lambda w=way: _gradients(subject, lambda: w(several)))  # type: ignore[misc]
        found[f"{name}_gradient"] = None if slopes is None or right is None else _apart(right, slopes)
    sizes = trial.expected.logps if trial.expected.logps is not None else trial.expected.rewards
    assert sizes is not None
    limit = trial.tolerance if route == "packed" else ROUNDING
    allowed = float((trial.expected.lengths + sizes.double().abs()).max()) * limit
    return RouteReport(
        route=route,
        reason=reason,
        limit=limit,
        limit_several=allowed,
        gradient_limit=50 * limit,
        **found,
    )


def _tried(what: Callable[[], Any]) -> Any:
    try:
        return what()
    except Exception as error:
        if not of_the_model(error):
            raise
        return None


def _gradients(model: CompletionModel, values: Callable[[], Values | CompletionOutput]) -> dict[str, Tensor]:
    """Gradients of a sum that weighs every row differently; the model's own are left as they are."""
    with trying(model, gradients=True):
        got = values()
        each = torch.cat([v for v in (got.logps, got.rewards) if v is not None])
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        total = (each * torch.linspace(0.5, 2, len(each), dtype=each.dtype, device=each.device)).sum()
        slopes = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {name: slope for name, slope in zip(named, slopes, strict=True) if slope is not None}


def _apart(right: dict[str, Tensor], got: dict[str, Tensor]) -> float:
    """Largest difference, in parts of the largest entry; of a gradient that one lacks, all of it."""
    largest = max((float(g.abs().max()) for g in right.values()), default=0.0) or 1.0
    off = 0.0
    for name in right.keys() | got.keys():
        one, other = right.get(name), got.get(name)
        gap = one - other if one is not None and other is not None else (other if one is None else one)
        assert gap is not None
        off = max(off, float(gap.abs().max()))
    return off / largest
