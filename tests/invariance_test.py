"""The result does not depend on how it was run: micro-batches, token budgets, ranks, routes, checkpointing."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from lm.config import LogprobsConfig
from lm.logprobs.completions import CompletionModel
from lm.logprobs.scoring import score_pairs, score_rows
from lm.objectives import METHODS, PairBatch
from lm.objectives_test import NO_REFERENCE
from lm.training.policy import PolicyTrainer
from tests.tiny import causal_lm, each_method, pairs
from tests.two_ranks import TWO_RANKS, Job, run_all


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of a parameter, relative to the largest parameter."""
    assert one.keys() == other.keys()
    names = [name for name in one if name not in ("loss", "accuracy")]
    largest = max(float(one[name].abs().max()) for name in names)
    return max(float((one[name] - other[name]).abs().max()) for name in names) / largest


def same(one: dict[str, Tensor], other: dict[str, Tensor], what: str) -> None:
    assert distance(one, other) <= 1e-10, what
    for name in ("loss", "accuracy"):
        if name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6, msg=f"{what}: {name}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Every method's step on one process, the mini-batch in one piece, packed; made when it is asked for."""

    class Made(dict[str, dict[str, Tensor]]):
        def __missing__(self, name: str) -> dict[str, Tensor]:
            self[name] = Job(name).run(tmp_path_factory.mktemp("whole"))
            return self[name]

    return Made()


HOW: dict[str, dict[str, Any]] = {
    "4x2": {"options": {"micro_batch_size": 4}},
    "60 tokens": {"options": {"micro_batch_tokens": 60}},
    "padded": {"route": "padded"},
    "1x8": {"options": {"micro_batch_size": 1}},
    "checkpointing": {"options": {"activation_checkpointing": True}},
    "padded 2x4": {"route": "padded", "options": {"micro_batch_size": 2}},
}
OF_EACH_KIND = {"4x2": None, "60 tokens": {"e-dpo", "sft", "reward"}, "padded": {"dp-dpo", "sft", "reward"}}
"""How -> whose step is compared by default: every method's where it is None, nobody's where it is not here."""


def steps() -> Iterator[Any]:
    """Every method's step in every way; by default every method's in one way, and each kind of step in two more."""
    for how in HOW:
        for one in each_method("sft", "reward"):
            name, marks = (one, []) if isinstance(one, str) else (one.values[0], one.marks)
            by_default = how in OF_EACH_KIND and (OF_EACH_KIND[how] is None or name in OF_EACH_KIND[how])
            yield pytest.param(how, name, id=f"{how}-{name}", marks=marks if by_default else pytest.mark.thorough)


@pytest.mark.parametrize(("how", "name"), list(steps()))
def test_one_step_is_the_same_however_it_is_cut_and_computed(
    how: str, name: str, whole: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    same(Job(name, **HOW[how]).run(tmp_path), whole[name], f"{name} {how}")


@pytest.mark.parametrize("name", ["dpo", "e-dpo", "drdo", "reward"])
def test_soft_labels_and_weights_are_of_the_whole_mini_batch(name: str, tmp_path: Path) -> None:
    """Weights are divided by their sum over all parts: in each part alone, another step would be taken."""
    whole = Job(name, soft=True).run(tmp_path / "whole")
    same(Job(name, soft=True, options={"micro_batch_size": 3}).run(tmp_path / "cut"), whole, name)
    assert distance(Job(name).run(tmp_path / "plain"), whole) > 1e-6, "labels and weights are noticed"


OWN_REFERENCE = {"dpo", "p-dpo", "e-dpo", "simpo"}
"""By what they read of pi_ref: the pair's log-probs, the samples' too, those beside members, and none."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OWN_REFERENCE else pytest.mark.thorough) for name in METHODS]
)
def test_reference_log_probs_scored_before_are_those_of_the_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored for all pairs at once, or by pi_ref on each micro-batch while training, as other trainers do."""
    reference = CompletionModel(causal_lm(seed=1), options=LogprobsConfig(allocator=False))
    arbitrary = pairs(8)
    chosen, rejected = score_pairs(reference, arbitrary, "before")
    repeated = [ids for ids in arbitrary["prompt_ids"] for _ in range(2)]
    samples = score_rows(reference, repeated, [ids for two in arbitrary["sample_ids"] for ids in two], "before")
    columns = {
        "ref_chosen_logps": chosen.tolist(),
        "ref_rejected_logps": rejected.tolist(),
        "ref_sample_logps": samples.view(-1, 2).tolist(),
    }
    scored = Dataset.from_list([{**row, **{c: columns[c][i] for c in columns}} for i, row in enumerate(arbitrary)])

    class Online(PolicyTrainer):
        def _pairs(self, model: torch.nn.Module, batch: dict[str, Any], gram: Tensor | None = None) -> PairBatch:
            with torch.no_grad():
                logps = reference(batch["input_ids"], batch["lengths"]).logps.view(self.units(batch), -1)
            own = dict(zip(columns, (logps[:, 0], logps[:, 1], logps[:, 2:]), strict=True))
            return super()._pairs(model, {**batch, "scores": {**batch["scores"], **own}}, gram)

    halves = {"options": {"micro_batch_size": 4}}
    online = Job(name, trainer=Online, **halves).run(tmp_path / "online")
    control = Job(name, **halves).run(tmp_path / "control")
    monkeypatch.setattr("tests.two_ranks.pairs", lambda count: scored)
    before = Job(name).run(tmp_path / "before")
    same(online, before, name)
    if name not in NO_REFERENCE:
        assert distance(control, before) > 1e-6, "the arbitrary ones are noticed"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All jobs on two processes that talk by gloo, forked from one that has done the imports."""
    out = tmp_path_factory.mktemp("two")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.two_ranks"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        context.Process(target=run_all, args=(out, {**address, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}))
        for rank in "01"
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(600)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return out


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_give_what_one_gives(name: str, two_ranks: Path, tmp_path: Path) -> None:
    """Also where the last mini-batch is uneven, so that one rank has nothing of its own to do."""
    same(torch.load(two_ranks / f"{name}.pt", weights_only=True), TWO_RANKS[name].run(tmp_path), name)


class OwnChoice(PolicyTrainer):
    """Control: every micro-batch chooses its own ensemble member, or mixture."""

    def before_step(self, *_: Any) -> None:
        return None


@pytest.mark.parametrize("name", ["e-dpo", "hull-dpo"])
def test_a_choice_for_each_micro_batch_is_noticed(
    name: str, whole: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    wrong = Job(name, options={"micro_batch_size": 2}, trainer=OwnChoice).run(tmp_path)
    assert distance(wrong, whole[name]) > 1e-6
