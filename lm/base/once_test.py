"""An option of one value that stands twice is refused by every command, whichever parser it has."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from lm.base.options import parse

RUN = ["data.world.posts", "seed", "dpo.beta", "model", "methods", "sampling.temperature"]
VALUES = {"model": "scratch:tiny", "methods": "[dpo]", "sampling.temperature": "0.5"}


def left(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a run's options are refused with; AssertionError where they are not."""
    with pytest.raises(SystemExit) as end:
        parse("lm.test", "", arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("joined", [True, False])
def test_options_of_a_run(name: str, joined: bool, capsys: pytest.CaptureFixture[str]) -> None:
    value = VALUES.get(name, "7")
    second = [f"--{name}={value}"] if joined else [f"--{name}", value]
    error = left(["--output_dir", "x", f"--{name}={value}", *second], capsys)
    assert error == f"error: --{name} stands twice, as {value} and as {value}; leave one\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data.world", '{"posts": 60}', "--data.world.posts", "70"],
            "--data.world.posts stands twice, in --data.world",
        ),
        (
            ["--sft.max_steps=5", '--sft={"max_steps": 6}'],
            "--sft.max_steps stands twice, in --sft.m",
        ),
        (["--drdo", '{"alpha": 1}', "--drdo.alpha", "1"], "--drdo.alpha stands twice, in --drdo and in --drdo.alpha"),
        (["--sft", "null", "--sft.max_steps", "5"], "--sft.max_steps stands twice, as null and as 5"),
    ],
)
def test_groups_count_as_what_is_in_them(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in left(arguments, capsys)


def test_what_may_stand_more_than_once(tmp_path: Path) -> None:
    files = [tmp_path / "one.yaml", tmp_path / "two.yaml"]
    for number, file in enumerate(files, 1):
        file.write_text(f"seed: {number}\n")
    config, _ = parse(
        "lm.test", "", ["--config", "demo", *(word for file in files for word in ("--config", str(file)))]
    )
    assert config.seed == 2, "of files, later ones win"
    group = ["--data.world", '{"posts": 60}', "--data.world.min_events", "5", "--debug", "--debug"]
    assert parse("lm.test", "", group)[0].data.world.posts == 60
    added = ["--methods", "[dpo]", "--methods+", "ipo", "--methods+", "d-dpo"]
    assert parse("lm.test", "", added)[0].methods == ["dpo", "ipo", "d-dpo"]


COMMANDS = {
    "lm.advise": ["x.jsonl", "--study", "1", "--study", "2"],
    "lm.bias": ["x.jsonl", "--out", "y.jsonl", "--rho", "0.5", "--seed", "1", "--seed=2"],
    "lm.card": ["run", "dpo", "--output", "1", "--output", "2"],
    "lm.diagnose": ["x.jsonl", "--tokenizer", "1", "--tokenizer", "2"],
    "lm.estimate": ["--parameters", "1", "--parameters", "2"],
    "lm.exact": ["--seed", "1", "--seed", "2"],
    "lm.export": ["--out", "1", "--out", "2"],
    "lm.judge": ["run", "--seed", "1", "--seed", "2"],
    "lm.push": ["run", "dpo", "--repo-id", "1", "--repo-id", "2"],
    "lm.score": ["--data", "1", "--data", "2", "--out", "x", "--reward-model", "m"],
    "lm.workflow.job": ["base", "--out", "1", "--out", "2"],
    "lm.workflow.regimes": ["--out", "1", "--out", "2"],
    "lm.workflow.summary": ["r.json", "--out", "1", "--out", "2"],
    "theory.__main__": ["--examples", "1", "--examples", "2"],
    "bandits.transitive": ["--out", "1", "--out", "2"],
    "bandits.certify": ["--beta", "1", "--beta", "2"],
    "figures.__main__": ["--out", "1", "--out", "2"],
}


@pytest.mark.parametrize("module", COMMANDS)
def test_commands_with_options_of_their_own(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = importlib.import_module(module).main(COMMANDS[module])
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2, error
    assert "stands twice, as 1 and as 2; leave one" in error
