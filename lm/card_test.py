"""A model card says what the run's artifacts and results say, of the smallest real run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from lm.artifacts import CorruptArtifact, MissingArtifact
from lm.card import card, main
from lm.config import BiasConfig, Config, DataConfig, EvaluationConfig, SamplingConfig, TrainingConfig, WorldConfig
from lm.evaluate import results
from lm.io import write_json
from lm.models import SCRATCH
from lm.objectives import DPO, DRDO, EnsembleDPO, Pessimism
from lm.pipeline import Pipeline

METHODS = ["dpo", "e-dpo", "drdo"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    one_step = TrainingConfig(max_steps=1, batch_size=8, learning_rate=1e-3)
    config = Config(
        output_dir=str(folder),
        model="scratch:tiny",
        methods=METHODS,
        sft=one_step,
        oracle=one_step,
        reward=one_step,
        policy=one_step,
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
        dpo=DPO(beta=0.37),
        e_dpo=EnsembleDPO(beta=0.61, kl=Pessimism(alpha_start=0.013, alpha_end=0.017)),
        drdo=DRDO(alpha=0.19),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCRATCH, "scratch:tiny", {**SCRATCH["scratch:tiny"], "hidden_size": 32, "vocab_size": 300})
        write_json(folder / "results.json", results(Pipeline(config)))
    return folder


def section(text: str, title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


@pytest.mark.parametrize(
    ("name", "values", "source"),
    [
        ("dpo", ["| beta | 0.37 |"], "[F] eq 6"),
        ("e-dpo", ["| beta | 0.61 |", "| kl.alpha_start | 0.013 |", "| kl.alpha_end | 0.017 |"], "[F] eq 11"),
        ("drdo", ["| alpha | 0.19 |", "| reward_estimate | head |"], "[N] eq 6"),
    ],
)
def test_the_method_its_scales_and_its_source(name: str, values: list[str], source: str, run: Path) -> None:
    method = section(card(run, name), "Method")
    for value in [*values, source]:
        assert value in method
    assert ("2405.19316" in method) == ("[F]" in source)
    assert ("2410.08458" in method) == ("[N]" in source)


@pytest.mark.parametrize(("name", "models"), [("dpo", []), ("drdo", ["rho"]), ("e-dpo", ["b0.25", "b0.5"])])
def test_the_reward_models_are_those_that_the_loss_reads(name: str, models: list[str], run: Path) -> None:
    text = section(card(run, name), "Reward models")
    assert re.findall(r"^\| (rho|b[\d.]+) \|", text, re.MULTILINE) == models
    assert ("None enters the loss" in text) == (not models)
    recorded = json.loads((run / "results.json").read_text())["reward_models"]
    for model in models:
        assert f"{recorded[model]['all']['accuracy']:.1%}" in text


def test_the_results_are_those_of_the_run(run: Path) -> None:
    recorded = json.loads((run / "results.json").read_text())
    for name in METHODS:
        row = recorded["methods"][name]
        text = section(card(run, name), "Results")
        assert f"| {name} | {row['advantage']:+.3f} | {row['ci'][0]:+.3f} to {row['ci'][1]:+.3f} |" in text
        assert f"On {recorded['sft']['n']} held-out prompts" in text
        assert not any(f"| {other} |" in text for other in METHODS if other != name)


def test_data_training_and_provenance(run: Path) -> None:
    text = card(run, "dpo")
    scores = json.loads(next(run.glob("score/*/artifact.json")).read_text())["metrics"]
    assert f"{scores['pairs']:,} preference pairs on {scores['prompts']:,} prompts" in section(text, "Data")
    assert "a share of 0.4 was imposed" in section(text, "Data")
    assert r"{post}\n\nTL;DR:" in section(text, "Data")
    assert "| max_steps | 1 |" in section(text, "Training")
    assert "| base model | scratch:tiny |" in section(text, "Training")
    assert "| transformers |" in section(text, "Provenance")
    assert "reward_head.safetensors" not in text
    assert "reward_head.safetensors" in section(card(run, "drdo"), "Use")


def test_a_snapshot_is_named_by_its_step_and_found_in_its_artifact(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    results = json.loads((folder / "results.json").read_text())
    row = results["methods"]["dpo"]
    last = row["step"]
    row["policy"], row["step"] = f"{row['policy']}/step-7", 7
    write_json(folder / "results.json", results)
    text = card(folder, "dpo")
    assert "| step | 7 |" in section(text, "Training")
    assert text.replace("| step | 7 |", f"| step | {last} |") == card(run, "dpo")


def test_the_head_is_the_hubs_metadata(run: Path) -> None:
    head = yaml.safe_load(card(run, "e-dpo").split("---\n")[1])
    assert head["library_name"] == "transformers"
    assert "e-dpo" in head["tags"]
    assert "base_model" not in head, "scratch:tiny is on no hub"


def test_the_same_folder_gives_the_same_card_wherever_it_is(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "elsewhere")
    assert card(tmp_path / "elsewhere", "e-dpo") == card(run, "e-dpo")


def test_what_is_missing_or_changed_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*results.json; finish the run"):
        card(tmp_path, "dpo")
    with pytest.raises(ValueError, match=r"method must be one of dpo, e-dpo, drdo, as .* has them; got 'ipo'"):
        card(run, "ipo")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(next(copy.glob("bias/rows-*")))
    with pytest.raises(MissingArtifact, match=r"has no artifact [0-9a-f]{12} \(bias\), which the policy was made from"):
        card(copy, "dpo")
    next(copy.glob("policy/dpo-*/config.json")).write_text("{}")
    with pytest.raises(CorruptArtifact, match=r"config.json has changed"):
        card(copy, "dpo")


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "dpo"]) == 0
    assert capsys.readouterr().out == card(run, "dpo") + "\n"
    assert main([str(run), "dpo", "--output", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "card.md").read_text() == card(run, "dpo") + "\n"
    assert main([str(run), "ipo"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: method must be one of")
    assert "Traceback" not in error
    assert main([str(run), "ipo", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
