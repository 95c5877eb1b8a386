"""What a run's options name is looked for before anything is computed, and all that is nowhere is told at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lm.base import hub
from lm.base.options import parse
from lm.stages import run
from lm.stages.data import data
from lm.stages.run import Run


def told(folder: Path, *arguments: str, command: str = "lm.test") -> str:
    """What is wrong with a run of these options, found by the time that data is asked for."""
    config, _ = parse(command, "", ["--output_dir", str(folder), *arguments])
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        data(Run(config, command=command))
    assert not [path for path in folder.rglob("*") if path.is_file()], "nothing is computed"
    return str(error.value)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "is_offline", lambda: True)
    monkeypatch.setattr(hub, "_cached", lambda *_: None)


@pytest.mark.parametrize(
    ("arguments", "places"),
    [
        (
            ["--config", "helpfulness", "--model", "typo"],
            ["model 'typo'", "data path 'Anthropic/hh-rlhf/helpful-base'"],
        ),
        (
            ["--config", "helpfulness.yaml", "--reward_base", "no/base"],
            ["model 'Qwen/Qwen2.5-0.5B'", "reward_base 'no/base'"],
        ),
        (["--config", "tldr", "--config", "scratch"], ["data path 'openai", "data path 'vwxyzjn/"]),
        (["--config", "helpfulness", "--model", "/no/where"], ["model '/no/where'", "data path 'Anthropic"]),
        (
            ["--config", "helpfulness", "--oracle_model", "no/judge"],
            ["oracle_model 'no/judge'", "model 'Qwen", "data p"],
        ),
        (["--oracle_model", "no/judge"], ["oracle_model 'no/judge'"]),
        (
            ["--config", "helpfulness", "--model", "/no/where", "--oracle_model", "no/judge"],
            ["model '/no/where'", "oracle_model 'no/judge'", "data path 'Anthropic"],
        ),
        (["--reward_base", "./base", "--oracle_model", "./judge"], ["reward_base './base'", "oracle_model './judge'"]),
    ],
)
def test_one_mistake_hides_no_other(arguments: list[str], places: list[str], tmp_path: Path) -> None:
    message = told(tmp_path, *arguments)
    at = [message.find(place) for place in places]
    assert -1 not in at, message
    assert at == sorted(at)
    assert "\n" not in message
    for place in places:
        assert message.count(place) == 1, "each is told once"


@pytest.mark.parametrize("path", ["me/articles", "nowhere.jsonl"])
def test_prompts_from_another_set_are_looked_for_where_they_are_read(path: str, tmp_path: Path) -> None:
    (tmp_path / "far.yaml").write_text(f"evaluation: {{out_of_domain: {{path: {path}}}}}\n")
    config = ["--config", "demo", "--config", str(tmp_path / "far.yaml")]
    message = told(tmp_path / "run", *config, command="lm.nondeterministic")
    assert message.startswith(f"evaluation.out_of_domain.path '{path}': there is no such file or folder")
    message = told(tmp_path / "run", *config, "--model", "typo", command="lm.nondeterministic")
    assert message.startswith("model 'typo'")
    assert message.count(path) == 1
    assert path not in told(tmp_path / "run", *config, "--model", "typo"), "no other command reads it"
    Run(parse("lm.train", "", [*config, "--output_dir", str(tmp_path / "run")])[0], command="lm.train").check_places()


@pytest.mark.parametrize(
    ("size", "threads", "environment", "expected"),
    [
        (2**20, None, False, 1),
        (2**23, None, False, 3),
        (None, None, False, 1),  # from scratch
        (2**20, 2, False, 2),
        (2**20, None, True, 3),
    ],
)
def test_small_models_compute_with_one_thread(
    size: int | None,
    threads: int | None,
    environment: bool,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless the options, or the environment, name a number. Control: a larger model has torch's own, here 3."""
    model = "scratch:tiny"
    if size is not None:
        model = str(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(bytes(size))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(run, "_usual_threads", lambda: 3)
    config, _ = parse("lm.test", "", ["--output_dir", str(tmp_path / "run")])
    before = torch.get_num_threads()
    try:
        assert run.take_threads(replace(config, threads=threads), [model]) == expected
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_a_number_of_threads_is_above_0() -> None:
    with pytest.raises(ValueError, match=r"Config.threads must be > 0, got 0"):
        replace(parse("lm.test", "", [])[0], threads=0)
