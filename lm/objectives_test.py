"""What a method refuses, what it needs, and where its KL term and reward estimate come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from figures.style import COLOURS
from lm.base.options import parse, parser_of
from lm.config import Config
from lm.objectives import (
    DPO,
    DRDO,
    IPO,
    METHODS,
    PAPERS,
    EnsembleDPO,
    HullDPO,
    Method,
    PairBatch,
    Pessimism,
    PessimisticDPO,
    looks,
    option_of,
)
from tests.tiny import close
from theory import losses

ALPHA = (1e-4 + 1e-2) / 2
"""The default weight of the forward KL after half of the training."""


def with_kl(loss: Any, p: PairBatch) -> Any:
    return losses.pessimistic(loss, losses.forward_kl(p.sample_logratios), alpha=ALPHA)


EXPECTED: dict[str, Callable[[PairBatch], Any]] = {
    "dpo": lambda p: losses.dpo(p.logratio_margin, beta=0.1),
    "ipo": lambda p: losses.ipo(p.logratio_margin, tau=1.0),
    "d-dpo": lambda p: losses.distillation(p.logratio_margin, p.reward_margin, beta=1.0),
    "p-dpo": lambda p: with_kl(losses.dpo(p.logratio_margin, beta=0.1), p),
    "dp-dpo": lambda p: with_kl(losses.distillation(p.logratio_margin, p.reward_margin, beta=1.0), p),
    "e-dpo": lambda p: with_kl(losses.ensemble_min(p.logratio_margin, p.member_margins, beta=1.0), p),
    "hull-dpo": lambda p: with_kl(losses.ensemble_hull(p.logratio_margin, p.member_margins, beta=1.0), p),
    "drdo": lambda p: losses.drdo(
        p.reward_margin,
        p.estimated_reward_margin,
        p.policy_chosen_logps,
        p.policy_rejected_logps,
        alpha=0.1,
        gamma=2,
    ),
    "member-dpo": lambda p: losses.distillation(p.logratio_margin, p.reward_margin, beta=1.0),
    "cdpo": lambda p: losses.cdpo(p.logratio_margin, beta=0.1, label_smoothing=0.1),
    "robust-dpo": lambda p: losses.robust_dpo(p.logratio_margin, beta=0.1, label_smoothing=0.1),
    "soft-label": lambda p: losses.soft_label(p.logratio_margin, p.reward_margin, beta=1.0),
    "dpo-nll": lambda p: losses.dpo_nll(
        p.logratio_margin, p.policy_chosen_logps, p.chosen_lengths, beta=0.1, alpha=1.0
    ),
    "dpop": lambda p: losses.dpop(p.chosen_logratios, p.rejected_logratios, beta=0.1, lam=50.0),
    "simpo": lambda p: losses.simpo(
        p.policy_chosen_logps, p.policy_rejected_logps, p.chosen_lengths, p.rejected_lengths, beta=2.0, gamma=0.5
    ),
    "hinge": lambda p: losses.hinge(p.logratio_margin, beta=0.1),
    "rdpo": lambda p: losses.rdpo(p.logratio_margin, p.chosen_lengths, p.rejected_lengths, beta=0.1, alpha=0.01),
    "sppo": lambda p: losses.sppo_hard(p.chosen_logratios, p.rejected_logratios, beta=0.1),
    "nca": lambda p: losses.nca(p.chosen_logratios, p.rejected_logratios, beta=0.1),
}
"""Each method's loss after half of the training, with the default hyper-parameters written out again."""
NO_REFERENCE = {"drdo", "simpo"}
"""The methods that pi_ref does not enter."""
REFUSED: list[tuple[str, dict[str, float], str]] = [
    ("cdpo", {"label_smoothing": 0.5}, "label_smoothing must be below 1/2, got 0.5"),
    ("cdpo", {"label_smoothing": -0.1}, "label_smoothing must be a finite number >= 0, got -0.1"),
    ("robust-dpo", {"label_smoothing": 0.5}, "label_smoothing must be below 1/2, got 0.5"),
    ("dpo-nll", {"alpha": -1.0}, "alpha must be a finite number >= 0, got -1.0"),
    ("dpop", {"lam": -1.0}, "lam must be a finite number >= 0, got -1.0"),
    ("simpo", {"gamma": -1.0}, "gamma must be a finite number >= 0, got -1.0"),
    ("rdpo", {"alpha": -1.0}, "alpha must be a finite number >= 0, got -1.0"),
]
"""Options out of range, beside beta and tau, and what is said of them."""
BETA = [name for name, method in METHODS.items() if "beta" in {field.name for field in fields(method)}]


def batch(count: int = 5, members: int = 3) -> PairBatch:
    """Everything that any method may ask for."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return PairBatch(
        policy_chosen_logps=-10 + draw(count),
        policy_rejected_logps=-10 + draw(count),
        ref_chosen_logps=-10 + draw(count),
        ref_rejected_logps=-10 + draw(count),
        chosen_lengths=torch.tensor([2.0, 3, 4, 5, 6], dtype=torch.float64),
        rejected_lengths=torch.tensor([6.0, 5, 4, 3, 2], dtype=torch.float64),
        reward_margin=draw(count),
        member_margins=draw(members, count),
        sample_logratios=draw(count),
        estimated_reward_margin=draw(count),
    )


def without(pairs: PairBatch, *names: str) -> PairBatch:
    absent: dict[str, Any] = dict.fromkeys(names)
    return replace(pairs, **absent)


@pytest.mark.parametrize("name", BETA)
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_beta_must_be_positive_and_finite(name: str, value: float) -> None:
    options: dict[str, Any] = {"beta": value, **({"reward_estimate": "implicit"} if name == "drdo" else {})}
    with pytest.raises(ValueError, match=f"beta must be a finite number > 0, got {value}"):
        METHODS[name](**options)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_tau_must_be_positive_and_finite(value: float) -> None:
    with pytest.raises(ValueError, match=f"tau must be a finite number > 0, got {value}"):
        IPO(tau=value)


@pytest.mark.parametrize("owner", [Pessimism, DRDO])
@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
def test_weights_must_not_be_negative(owner: Any, value: float) -> None:
    for name in ("alpha_start", "alpha_end") if owner is Pessimism else ("alpha", "gamma"):
        with pytest.raises(ValueError, match=f"{name} must be a finite number >= 0, got {value}"):
            owner(**{name: value})
        assert getattr(owner(**{name: 0.0}), name) == 0.0


@pytest.mark.parametrize("name", METHODS)
def test_an_option_that_a_method_does_not_honour_does_not_exist(name: str) -> None:
    own = {field.name for field in fields(METHODS[name])}
    others = {field.name for kind in METHODS.values() for field in fields(kind)} - own
    assert others
    for other in {"temperature", *others}:
        unknown: dict[str, Any] = {other: 0.1}
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            METHODS[name](**unknown)


def test_drdos_beta_goes_with_the_implicit_estimate_only() -> None:
    for options in ({"beta": 1.0}, {"reward_estimate": "implicit"}):
        with pytest.raises(ValueError, match='beta goes with reward_estimate "implicit" and only with it'):
            DRDO(**options)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("d-dpo", "reward_margin"),
        ("p-dpo", "sample_logratios"),
        ("dp-dpo", "reward_margin"),
        ("dp-dpo", "sample_logratios"),
        ("e-dpo", "member_margins"),
        ("e-dpo", "sample_logratios"),
        ("hull-dpo", "member_margins"),
        ("hull-dpo", "sample_logratios"),
        ("drdo", "reward_margin"),
        ("drdo", "estimated_reward_margin"),
    ],
)
def test_what_a_method_needs_is_never_filled_in(name: str, field: str) -> None:
    method = METHODS[name]()
    assert method(batch()).shape == (5,)
    with pytest.raises(ValueError, match=f"{field} is needed by this method, but the batch does not have it"):
        method(without(batch(), field))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_its_loss_of_theory_and_reads_the_reference_or_not(name: str) -> None:
    pairs = replace(batch(), progress=0.5)
    method = METHODS[name]()
    close(method(pairs), EXPECTED[name](pairs))
    for side in ("ref_chosen_logps", "ref_rejected_logps"):
        moved: dict[str, Any] = {side: getattr(pairs, side) + 1}
        assert torch.equal(method(replace(pairs, **moved)), method(pairs)) == (name in NO_REFERENCE), side


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_options_out_of_the_losss_range_are_refused_when_they_are_given(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{METHODS[name].__name__}.{message}"):
        METHODS[name](**options)


def test_methods_are_told_apart_without_colour_and_those_of_the_papers_by_it() -> None:
    drawn = looks(METHODS)
    assert len({(look["dashes"], look["marker"], look["hollow"]) for look in drawn.values()}) == len(METHODS)
    assert len({drawn[name]["colour"] for name in PAPERS}) == len(PAPERS)
    assert {look["colour"] for look in drawn.values()} <= set(COLOURS)
    assert len({look["title"] for look in drawn.values()}) == len(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_says_it_needs_is_what_it_reads(name: str) -> None:
    """Drop everything optional that is not declared: the loss stays the same."""
    method, full = METHODS[name](), batch()
    declared = {
        "reward_margin": "rewards" in method.needs,
        "member_margins": "members" in method.needs,
        "sample_logratios": method.needs_samples,
        "estimated_reward_margin": method.needs_reward_head,
    }
    least = without(full, *(field for field, needed in declared.items() if not needed))
    close(method(least), method(full))


def test_alpha_is_linear_in_progress_and_constant_outside_it() -> None:
    kl = Pessimism(alpha_start=1.0, alpha_end=3.0)
    assert [kl.alpha(p) for p in (-1, 0, 0.25, 1, 2)] == [1, 1, 1.5, 3, 3]
    assert Pessimism(alpha_start=0.2, alpha_end=0.2).alpha(0.7) == 0.2


def test_under_a_target_the_batch_says_alpha_and_nothing_is_filled_in() -> None:
    pairs = batch()
    assert pairs.sample_logratios is not None
    method = PessimisticDPO(kl=Pessimism(target=2))
    with pytest.raises(ValueError, match="alpha is held by the target of 2 nats; give the batch its alpha"):
        method(pairs)
    close(method(replace(pairs, alpha=0.3)), DPO()(pairs) - 0.3 * pairs.sample_logratios)
    assert Pessimism(target=2) == Pessimism(target=2.0), "one setting"


def test_the_kl_terms_samples_come_from_the_reference_or_from_the_pair() -> None:
    pairs = batch()
    base = losses.dpo(pairs.logratio_margin, beta=0.1)
    reference, preferences = (
        PessimisticDPO(kl=Pessimism(alpha_start=0.5, alpha_end=0.5, samples=samples))
        for samples in ("reference", "preferences")
    )
    assert pairs.sample_logratios is not None
    close(reference(pairs), base - 0.5 * pairs.sample_logratios)
    chosen = pairs.policy_chosen_logps - pairs.ref_chosen_logps
    rejected = pairs.policy_rejected_logps - pairs.ref_rejected_logps
    close(preferences(pairs), base - 0.5 * (chosen + rejected) / 2)
    assert reference.needs_samples
    assert not preferences.needs_samples
    assert preferences(replace(pairs, sample_logratios=None)).shape == (5,)


def test_the_kl_weight_follows_progress() -> None:
    method = PessimisticDPO(kl=Pessimism(alpha_start=0.0, alpha_end=1.0))
    start, half = batch(), replace(batch(), progress=0.5)
    assert start.sample_logratios is not None
    close(method(start), DPO()(start))
    close(method(half), DPO()(half) - 0.5 * start.sample_logratios)


def test_drdo_estimates_rewards_with_its_head_or_implicitly() -> None:
    pairs = batch()
    head, implicit = DRDO(), DRDO(reward_estimate="implicit", beta=2.0)
    shared = {"alpha": 0.1, "gamma": 2.0}
    logps = pairs.policy_chosen_logps, pairs.policy_rejected_logps
    close(head(pairs), losses.drdo(pairs.reward_margin, pairs.estimated_reward_margin, *logps, **shared))
    close(implicit(pairs), losses.drdo(pairs.reward_margin, 2.0 * pairs.logratio_margin, *logps, **shared))
    assert head.needs_reward_head
    assert not implicit.needs_reward_head
    moved = replace(pairs, ref_chosen_logps=pairs.ref_chosen_logps + 1)
    close(head(moved), head(pairs))
    assert not torch.isclose(implicit(moved), implicit(pairs)).any()


def test_ipos_length_normalised_margin_is_an_option_with_its_own_name() -> None:
    pairs = batch()
    chosen = (pairs.policy_chosen_logps - pairs.ref_chosen_logps) / pairs.chosen_lengths
    rejected = (pairs.policy_rejected_logps - pairs.ref_rejected_logps) / pairs.rejected_lengths
    close(IPO(length_normalised=True)(pairs), losses.ipo(chosen - rejected, tau=1.0))
    close(IPO()(pairs), losses.ipo(pairs.logratio_margin, tau=1.0))


@pytest.mark.parametrize("method", [EnsembleDPO, HullDPO])
def test_a_given_gram_matrix_decides_the_ensembles_choice(method: type[EnsembleDPO]) -> None:
    """A Gram matrix under which only the last member fits makes it the target, whatever this batch says."""
    pairs = batch()
    assert pairs.member_margins is not None
    gram = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    no_kl = method(kl=Pessimism(alpha_start=0.0, alpha_end=0.0))
    expected = losses.distillation(pairs.logratio_margin, pairs.member_margins[2], beta=1.0)
    close(no_kl(replace(pairs, gram=gram)), expected)
    assert not torch.allclose(no_kl(pairs), expected)


def test_every_method_has_its_options_in_the_config() -> None:
    parser = parser_of("lm.test", "")
    options = {name for action in parser._actions for name in action.option_strings}
    for name, kind in METHODS.items():
        assert {f"--{option_of(name)}.{field.name}" for field in fields(kind) if field.name != "kl"} <= options
    assert {"--e_dpo.kl.alpha_end", "--hull_dpo.kl.samples"} <= options
    assert set(Config.as_dict(parse("lm.test", "", [])[0])) >= {option_of(name) for name in METHODS}


def test_members_are_weighed_against_an_implicit_reward() -> None:
    class Weighing(Method):
        needs = frozenset({"members"})

        def weights(self, gram: Tensor) -> Tensor:
            return gram[0]

    with pytest.raises(ValueError, match=r"Weighing weighs members .* needs are \['members'\], the scale None"):
        Weighing()
    assert EnsembleDPO().weighs_members
    assert not DPO().weighs_members
