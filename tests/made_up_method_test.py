"""A new method is a class and a line in METHODS: it trains, is chosen, judged, reported, carded and offered as options,
and only what it needs is made."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
from torch import Tensor

from figures.record import read
from lm.base.options import parse
from lm.card import main as card_command
from lm.config import (
    BiasConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ProbeConfig,
    SamplingConfig,
    TrainingConfig,
    WorldConfig,
)
from lm.judge import main as judge_command
from lm.models.loading import SCRATCH
from lm.objectives import METHODS, Look, Method, Need, PairBatch
from lm.reporting.results import report
from lm.stages.run import Run
from theory import losses


@dataclass(frozen=True, kw_only=True)
class Margin(Method):
    """A length-normalised margin loss without a reference; made up for this test, after SimPO.

    Args:
        beta: scale of the log-prob a token, > 0. [set]
        margin: how far apart winner and loser are to be.
    """

    title: ClassVar[str] = "Margin"
    look: ClassVar[Look] = Look("blue", (2, 2), "P")
    beta: float = 2.0
    margin: float = 0.5

    def __call__(self, pairs: PairBatch) -> Tensor:
        chosen = pairs.policy_chosen_logps / pairs.chosen_lengths
        rejected = pairs.policy_rejected_logps / pairs.rejected_lengths
        loss: Tensor = losses.dpo(chosen - rejected - self.margin, beta=self.beta)
        return loss

    def legend(self) -> Iterator[str]:
        """As `Method.legend`."""
        yield "|y|: tokens of a completion."


@dataclass(frozen=True, kw_only=True)
class Taught(Margin):
    """The same, whose margin is a reward model's; made up for this test.

    Args:
        beta: scale of the log-prob a token, > 0. [set]
        margin: what a unit of reward counts.
    """

    title: ClassVar[str] = "Taught margin"
    needs: ClassVar[frozenset[Need]] = frozenset({"rewards"})

    def __call__(self, pairs: PairBatch) -> Tensor:
        wanted = self.margin * pairs.known("reward_margin")
        loss: Tensor = losses.distillation(pairs.policy_chosen_logps - pairs.policy_rejected_logps, wanted, beta=1.0)
        return loss


@pytest.fixture(autouse=True)
def _methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is done to have them."""
    monkeypatch.setitem(METHODS, "made-up", Margin)
    monkeypatch.setitem(METHODS, "taught", Taught)
    monkeypatch.setitem(SCRATCH, "scratch:tiny", {**SCRATCH["scratch:tiny"], "hidden_size": 32, "vocab_size": 300})


def config_of(folder: Path, method: str) -> Config:
    steps = TrainingConfig(max_steps=2, batch_size=8, learning_rate=1e-2)
    return Config(
        output_dir=str(folder),
        model="scratch:tiny",
        methods=[method],
        **dict.fromkeys(("sft", "oracle", "reward", "policy"), steps),
        device="cpu",
        data=DataConfig(
            prompt_template="{post}\n\nTL;DR:",
            max_prompt_length=120,
            max_completion_length=20,
            valid_fraction=0.1,
            test_fraction=0.1,
            world=WorldConfig(posts=40),
        ),
        bias=BiasConfig(rho=0.4, member_fractions=[0.25, 0.5]),
        sampling=SamplingConfig(batch_size=64),
        evaluation=EvaluationConfig(resamples=100),
        probe=ProbeConfig(pairs=4, times=1),
    )


def test_a_made_up_method_is_trained_judged_reported_and_carded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config_of(tmp_path, "made-up"), sweep={"made-up": [{"margin": 0.3}, {"margin": 0.7}]})
    report(Run(config))
    assert "made-up" in capsys.readouterr().out

    found = read(tmp_path / "results.json")
    row = found.methods["made-up"]
    assert [tried.setting["margin"] for tried in row.validation] == [0.3, 0.7]
    assert row.chosen_logratio != 0, "the policy moved"
    assert (found.looks["made-up"].title, found.looks["made-up"].hollow) == ("Margin", True)
    assert found.reward_models == {}
    assert not list(tmp_path.glob("reward/*")), "no reward model is trained where none is distilled"
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")

    page = (tmp_path / "report.html").read_text()
    for said in ("Margin</h3>", "A length-normalised margin loss without a reference", "Margin: training loss"):
        assert said in page
    text = html.unescape(re.sub("<.*?>", "", page))
    assert "ℓ=log(1+e−β\u2062(−margin+log(πw)|y|w−log(πl)|y|l))" in text, "its objective is what it computes"

    assert card_command([str(tmp_path), "made-up"]) == 0
    card = capsys.readouterr().out
    assert f"| margin | {row.setting['margin']} |" in card
    assert "None enters the loss." in card

    assert judge_command([str(tmp_path), "--judge", "oracle"]) == 0
    assert json.loads((tmp_path / "judge.json").read_text())["wins"]["made-up"]["sft"]["n"] == row.n


def test_its_options_are_those_of_any_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, resolved = parse("lm.train", "", ["--methods", "[made-up]", "--made_up.margin", "0.3"])
    assert config.method("made-up") == Margin(margin=0.3)
    assert re.search(r"^made_up:\n  beta: 2.0\n  margin: 0.3$", resolved, re.MULTILINE)
    with pytest.raises(SystemExit):
        parse("lm.train", "", ["--help"])
    assert "--made_up.margin" in (shown := capsys.readouterr().out)
    assert "how far apart winner and loser are to be" in " ".join(shown.split())
    with pytest.raises(ValueError, match=r"Margin.beta must be a finite number > 0, got 0.0"):
        parse("lm.train", "", ["--made_up.beta", "0"])


@pytest.mark.thorough
def test_one_that_distils_a_reward_has_one_reward_model_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(Run(config_of(tmp_path, "taught")))
    made = [path.parent.name.split("-")[0] for path in tmp_path.glob("reward/*/artifact.json")]
    assert made == ["rho"], "and no member's"
    assert list(read(tmp_path / "results.json").reward_models) == ["rho"]
    capsys.readouterr()
    assert card_command([str(tmp_path), "taught"]) == 0
    assert re.search(r"^\| rho \| \d+ \|", capsys.readouterr().out, re.MULTILINE)
