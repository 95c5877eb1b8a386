"""The checks of `tests.gpu` without an accelerator: none applies; each holds on the CPU, and fails where it should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lm.logprobs.packing import Layout
from tests import gpu

CPU = torch.device("cpu")
ALWAYS = ("route llama", "route gemma3", "route bloom", "gradient gemma3", "autocast llama")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ALWAYS or " " not in name else [pytest.mark.thorough])
        if name.split()[0] in ("route", "gradient", "autocast")
        else name
        for name in gpu.CHECKS
    ],
)
def test_a_check_holds_on_the_cpu(name: str) -> None:
    if name in ("flex-attention stays compiled", "mask of a long row", "cache of a batch"):
        with pytest.raises(gpu.NotApplicable):
            gpu.CHECKS[name](CPU)
    else:
        assert gpu.CHECKS[name](CPU)


def test_without_an_accelerator_none_applies(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert gpu.main([]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == len(gpu.CHECKS)
    assert all(line.startswith("not applicable  ") and "there is no accelerator" in line for line in lines)
    assert last == f"{len(gpu.CHECKS)} checks, 0 failed"


def test_one_that_fails_is_told_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(_: torch.device) -> str:
        raise RuntimeError("device-side assert triggered")

    def wrong(_: torch.device) -> str:
        raise AssertionError("off by 3 nats")

    assert gpu.run({"broken": broken, "wrong": wrong, "right": lambda _: "exact"}, CPU) == 1
    out, err = capsys.readouterr()
    outcomes = [line.split("  ")[0].strip() for line in out.splitlines()]
    assert outcomes == ["FAIL", "FAIL", "pass", "3 checks, 2 failed"]
    assert "RuntimeError: device-side assert triggered" in out
    assert "off by 3 nats" in out
    assert "Traceback" in err


def test_checks_are_not_begun_when_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "SECONDS", -1)
    assert gpu.run({"late": lambda _: "done"}, CPU) == 1
    assert "not begun" in capsys.readouterr().out


def test_a_word_that_no_check_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--only", "nothing of the kind"])
    assert "there are route llama" in capsys.readouterr().err


# ---------------------------------------------------------------- controls: each check notices what it is for


def leak(monkeypatch: pytest.MonkeyPatch) -> None:
    def sees(self: Layout, query: Any, key: Any, window: int | None = None) -> Any:
        return (self.positions_T[query] >= self.positions_T[key]) & (self.examples_T[query] == self.examples_T[key])

    monkeypatch.setattr(Layout, "sees", sees)


def two_of_a_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "state_of", lambda model: {n: v.clone() for n, v in model.state_dict().items()})


def kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(gpu, "fit", lambda _, model, *__, **___: kept.append(model))


def wasteful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "peak_of", lambda *_: gpu.LONG**2 * 8)


def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.CompletionModel, "_precision", lambda *_: torch.autocast("cpu", enabled=False))


def low_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = gpu.score_rows
    monkeypatch.setattr(gpu, "score_rows", lambda *given: scores(*given).float())


def another_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm.config import SamplingConfig

    options = gpu._run(1)
    object.__setattr__(options, "sampling", SamplingConfig(temperature=0.5))
    monkeypatch.setattr(gpu, "_run", lambda *_, **__: options)


def another_method(monkeypatch: pytest.MonkeyPatch) -> None:
    turn: list[int] = []

    class Other(gpu.DPO):
        def __init__(self) -> None:
            turn.append(1)
            super().__init__(beta=0.1 * len(turn))

    monkeypatch.setattr(gpu, "DPO", Other)


@pytest.mark.parametrize(
    ("name", "breaking", "message"),
    [
        ("route llama", leak, "takes the padded route"),
        ("tied tensors saved once", two_of_a_tie, "two copies of one"),
        ("memory between stages", kept_alive, "a model is alive"),
        ("mask of a long row", wasteful, "MiB for"),
        ("cache of a batch", wasteful, "MiB, thought"),
        ("samples under autocast", in_float32, "products are in"),
        ("scores", low_precision, "float64"),
        ("samples", another_temperature, "total variation"),
        ("training as on the CPU", another_method, "losses"),
    ],
)
def test_a_check_fails_where_it_should(
    name: str, breaking: Callable[[pytest.MonkeyPatch], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch)
    with pytest.raises(AssertionError, match=message):
        gpu.CHECKS[name](CPU)
