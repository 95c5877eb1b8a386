"""What a run's options name is looked for before anything is computed, and all that is nowhere is told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm.base import hub
from lm.base.options import parse
from lm.stages.data import data
from lm.stages.run import Run


def told(folder: Path, *arguments: str) -> str:
    """What is wrong with a run of these options, found by the time that data is asked for."""
    config, _ = parse("lm.test", "", ["--output_dir", str(folder), *arguments])
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        data(Run(config))
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
            ["model 'Qwen/Qwen2.5-0.5B'", "model 'no/base'"],
        ),
        (["--config", "tldr", "--config", "scratch"], ["data path 'openai", "data path 'vwxyzjn/"]),
        (["--config", "helpfulness", "--model", "/no/where"], ["model '/no/where'", "data path 'Anthropic"]),
        (
            ["--config", "helpfulness", "--oracle_model", "no/judge"],
            ["oracle_model 'no/judge'", "model 'Qwen", "data p"],
        ),
        (["--oracle_model", "no/judge"], ["oracle_model 'no/judge'"]),
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
