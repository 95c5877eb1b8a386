"""Our losses against TRL's own code on the same log-probs: `DPOTrainer._compute_loss` and `CPOTrainer.cpo_loss`.

TRL's methods, from its installed source, run unbound on a stand-in for the trainer, and TRL's model is one that returns
prescribed log-probs a token. So nothing of TRL is copied, and everything is float64.
"""

from __future__ import annotations

import ast
import importlib.util
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from theory import losses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None or importlib.util.find_spec("trl") is None,
        reason="compares with TRL, which is not installed: pip install 'reward-distillation[trl]'",
    ),
]

N, LONGEST = 6, 5
LENGTHS = ([1, 2, 3, 4, 5, 2], [5, 2, 1, 3, 4, 4])
"""Tokens of the chosen and of the rejected completions."""


@cache
def trl_method(file: str, trainer: str, name: str) -> Callable[..., Any]:
    """A method of one of TRL's trainers, compiled from the installed source by itself: importing TRL takes longer than
    all that is done here. A name that the method uses and that is not given to it is an error."""
    import torch

    [package] = importlib.util.find_spec("trl").submodule_search_locations  # type: ignore[union-attr, misc]
    path = Path(package, file)
    [class_] = [
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef) and node.name == trainer
    ]
    [method] = [node for node in class_.body if isinstance(node, ast.FunctionDef) and node.name == name]
    names: dict[str, Any] = {"torch": torch, "F": torch.nn.functional}
    exec(compile(ast.Module(body=[method], type_ignores=[]), str(path), "exec"), names)
    found: Callable[..., Any] = names[name]
    return found


class Pairs:
    """N pairs with log-probs of each token under both models, [2 N, LONGEST], 0 beyond the completion's end."""

    def __init__(self, seed: int, *, scale: float = 1.0, rows: slice = slice(None)) -> None:
        import torch

        rng = np.random.default_rng(seed)
        lengths = torch.tensor(LENGTHS)[:, rows].reshape(-1)
        self.mask = torch.arange(LONGEST) < lengths[:, None]
        shape = (2, N, LONGEST)
        drawn = [torch.tensor(-scale * rng.exponential(size=shape)) for _ in range(2)]
        self.policy, self.ref = (values[:, rows].reshape(-1, LONGEST) * self.mask for values in drawn)
        self.lengths = lengths.double().chunk(2)
        self.policy_logps, self.ref_logps = self.policy.sum(1).chunk(2), self.ref.sum(1).chunk(2)
        self.logratios = tuple(p - r for p, r in zip(self.policy_logps, self.ref_logps, strict=True))

    @property
    def margin(self) -> Any:
        """Delta, [N]."""
        return losses.logratio_margin(*self.policy_logps, *self.ref_logps)


def trl_dpo(pairs: Pairs, loss_type: Sequence[str], loss_weights: Sequence[float] = (1.0,), **settings: float) -> Any:
    """The mean loss over the pairs by TRL's DPOTrainer."""
    import torch

    def model(log_probs: Any) -> Callable[..., Any]:
        unused = torch.zeros_like(log_probs)
        outputs = SimpleNamespace(log_probs=log_probs, entropy=unused, mean_logits=unused, is_top1=unused.bool())
        return lambda **_: outputs

    def gather(values: Any) -> Any:
        return values

    policy = model(pairs.policy)
    policy.training = True  # type: ignore[attr-defined]
    trainer = SimpleNamespace(
        model=policy,
        ref_model=model(pairs.ref),
        accelerator=SimpleNamespace(device="cpu", gather=gather, gather_for_metrics=gather),
        args=SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        loss_types=loss_type,
        loss_weights=loss_weights,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **({"label_smoothing": 0.0} | settings),
    )
    # One prompt token in front, since TRL leaves out the first position, which nothing predicts.
    mask = torch.cat([torch.zeros(len(pairs.mask), 1, dtype=torch.bool), pairs.mask], dim=1).long()
    inputs = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "ref_chosen_logps": pairs.ref_logps[0],
        "ref_rejected_logps": pairs.ref_logps[1],
    }
    return trl_method("trainer/dpo_trainer.py", "DPOTrainer", "_compute_loss")(
        trainer, policy, inputs, return_outputs=False
    )


def trl_cpo(
    pairs: Pairs, loss_type: str, *, beta: float, label_smoothing: float = 0.0, simpo_gamma: float = 0.0
) -> Any:
    """The loss of each pair by TRL's CPOTrainer, which averages log-probs over tokens for SimPO, as is done here."""
    trainer = SimpleNamespace(
        loss_type=loss_type,
        beta=beta,
        label_smoothing=label_smoothing,
        simpo_gamma=simpo_gamma,
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    logps = pairs.policy_logps
    if loss_type == "simpo":
        logps = tuple(
            summed / mask.sum(1) for summed, mask in zip(pairs.policy_logps, pairs.mask.chunk(2), strict=True)
        )
    return trl_method("experimental/cpo/cpo_trainer.py", "CPOTrainer", "cpo_loss")(trainer, *logps)[0]


OURS: dict[str, tuple[Callable[[Pairs], Any], Callable[[Pairs], Any]]] = {
    "dpo": (lambda p: losses.dpo(p.margin, beta=0.3), lambda p: trl_dpo(p, ["sigmoid"], beta=0.3)),
    "hinge": (lambda p: losses.hinge(p.margin, beta=0.3), lambda p: trl_dpo(p, ["hinge"], beta=0.3)),
    "robust_dpo": (
        lambda p: losses.robust_dpo(p.margin, beta=0.3, label_smoothing=0.2),
        lambda p: trl_dpo(p, ["robust"], beta=0.3, label_smoothing=0.2),
    ),
    "sppo_hard": (lambda p: losses.sppo_hard(*p.logratios, beta=0.3), lambda p: trl_dpo(p, ["sppo_hard"], beta=0.3)),
    "nca": (lambda p: losses.nca(*p.logratios, beta=0.3), lambda p: trl_dpo(p, ["nca_pair"], beta=0.3)),
    "ipo, length-normalised": (
        lambda p: losses.ipo(losses.normalised_logratio_margin(*p.logratios, *p.lengths), tau=0.3),
        lambda p: trl_dpo(p, ["ipo"], beta=0.3),
    ),
    "simpo": (
        lambda p: losses.simpo(*p.policy_logps, *p.lengths, beta=2.0, gamma=0.7),
        lambda p: trl_cpo(p, "simpo", beta=2.0, simpo_gamma=0.7).mean(),
    ),
    "cdpo, without a reference": (
        lambda p: losses.cdpo(p.policy_logps[0] - p.policy_logps[1], beta=0.3, label_smoothing=0.2),
        lambda p: trl_cpo(p, "sigmoid", beta=0.3, label_smoothing=0.2).mean(),
    ),
}
"""Loss -> (ours, one a pair; TRL's mean), of the same pairs."""
ON_ONE_PAIR: dict[str, tuple[Callable[[Pairs], Any], Callable[[Pairs], Any]]] = {
    "cdpo": (  # "aot" sorts the margins of a batch, and is cDPO where there is nothing to sort
        lambda p: losses.cdpo(p.margin, beta=0.3, label_smoothing=0.2),
        lambda p: trl_dpo(p, ["aot"], beta=0.3, label_smoothing=0.2),
    ),
    "sft_term": (
        lambda p: losses.sft_term(p.policy_logps[0], p.lengths[0]),
        lambda p: trl_dpo(p, ["sft"], beta=0.3),
    ),
    "dpo_nll": (
        lambda p: losses.dpo_nll(p.margin, p.policy_logps[0], p.lengths[0], beta=0.3, alpha=0.7),
        lambda p: trl_dpo(p, ["sigmoid", "sft"], [1.0, 0.7], beta=0.3),
    ),
}
"""The same, where TRL's value for a batch is no mean over its pairs."""


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("name", OURS)
def test_the_mean_over_pairs_is_trls(name: str, scale: float) -> None:
    ours, trls = OURS[name]
    for seed in range(3):
        pairs = Pairs(seed, scale=scale)
        got, expected = ours(pairs), trls(pairs)
        assert (got.shape, got.dtype, expected.dtype) == ((N,), pairs.policy.dtype, pairs.policy.dtype)
        np.testing.assert_allclose(got.mean(), expected, rtol=1e-12)


@pytest.mark.parametrize("name", [*OURS, *ON_ONE_PAIR])
def test_each_pair_by_itself_is_trls(name: str) -> None:
    ours, trls = (OURS | ON_ONE_PAIR)[name]
    for row in range(N):
        pairs = Pairs(7, scale=3.0, rows=slice(row, row + 1))
        np.testing.assert_allclose(ours(pairs)[0], trls(pairs), rtol=1e-12)


def test_what_is_not_the_same() -> None:
    """TRL's SFT term weighs pairs by their length, its IPO is length-normalised: neither is our loss of that name."""
    pairs = Pairs(0, scale=3.0)
    for ours, trls in (ON_ONE_PAIR["sft_term"], ON_ONE_PAIR["dpo_nll"]):
        assert abs(float(ours(pairs).mean() - trls(pairs))) > 0.05
    summed = losses.ipo(pairs.margin, tau=0.3).mean()
    assert abs(float(summed - trl_dpo(pairs, ["ipo"], beta=0.3))) > 0.1
