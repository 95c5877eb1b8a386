"""The commands: what they compute, what they write, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bandits import bench, degeneration, pessimism, transitive
from theory import losses


def status(command: Any, *arguments: str) -> int:
    """The exit status, however the command leaves."""
    try:
        left: int = command.main(arguments)
    except SystemExit as end:
        left = int(end.code or 0)
    return left


def test_transitive_writes_the_documented_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--arms", "4", "--out", str(tmp_path), "--beta", "0.1", "1", "--alpha", "0.1", "--tau", "0.5"]
    assert transitive.main(command) == 0
    rows = json.loads((tmp_path / "transitive.json").read_text())
    assert len(rows) == 2 * (1 + 2)
    for row in rows:
        assert set(row) == {
            *("objective", "data", "beta", "alpha", "tau", "log_probs", "weights", "spread", "certificate")
        }
        np.testing.assert_allclose(np.exp(row["log_probs"]), row["weights"])
        assert max(row["certificate"].values()) <= 1e-10
    spreads = {row["data"]: row["spread"] for row in rows if row["objective"] == "ipo"}
    assert spreads == pytest.approx({"chain": 3 / (2 * 0.5), "closure": 3 / (4 * 0.5)})
    assert {path.name for path in tmp_path.iterdir()} == {
        *("transitive.json", "figure_b2.json", "figure_b2.caption.md"),
        *("figure_b2.png", "figure_b2.pdf", "figure_b2.svg"),
    }
    assert json.loads((tmp_path / "figure_b2.json").read_text())["provenance"]["config"]["reduction"] == "mean"
    assert "p-DPO changes by less than 0.01" in capsys.readouterr().out


def test_the_reduction_matters_for_p_dpo_only() -> None:
    """Averaging divides the loss, not the KL: summed over m pairs with alpha is averaged with alpha / m."""
    mean = transitive.records(3, [1.0], [0.1], [0.5], "mean")
    total = transitive.records(3, [1.0], [0.1], [0.5], "sum")
    scaled = transitive.records(3, [1.0], [0.2], [0.5], "sum")
    for left, right, other in zip(mean, total, scaled, strict=True):
        if left["objective"] == "ipo":
            np.testing.assert_allclose(left["weights"], right["weights"])
        elif left["data"] == "chain":  # two pairs
            np.testing.assert_allclose(left["weights"], other["weights"], atol=1e-12)
            assert np.abs(np.array(left["weights"]) - right["weights"]).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "1"], "arms must be at least 2, got 1"),
        (["--alpha", "0"], "alpha must be a finite number > 0, got 0.0"),
        (["--beta", "-1"], "beta must be a finite number > 0, got -1.0"),
        (["--tau", "nan"], "tau must be a finite number > 0, got nan"),
        (["--alpha", "1", "0.1", "1"], "alpha must hold each value once, got [1.0, 0.1, 1.0]"),
        (["--reduction", "max"], "invalid choice: 'max'"),
    ],
)
def test_transitive_refuses(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(transitive, *arguments, "--out", str(tmp_path)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (degeneration, ["--steps", "0"], "--steps: '0' is no positive whole number"),
        (degeneration, ["--beta", "0"], "beta must be a finite number > 0, got 0.0"),
        (degeneration, ["--rate", "nan"], "rate must be a finite number > 0, got nan"),
        (degeneration, ["--rate", "1e9", "--steps", "100"], "rate must be smaller: d-dpo diverges with 1e+09"),
        (pessimism, ["--beta", "inf"], "beta must be a finite number > 0, got inf"),
        (bench, ["--count", "many"], "--count: 'many' is no positive whole number"),
        (bench, ["--count", "5", "--referee-count", "6"], "--referee-count 6 is more than the 5 problems of --count"),
        (bench, ["--json", "no/such/bench.json"], "--json: no/such/bench.json: there is no folder no/such"),
        (bench, ["--force"], "--force goes with --json"),
    ],
)
def test_commands_refuse(command: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(command, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [transitive, pessimism, degeneration])
def test_out_must_be_a_folder(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results"
    file.write_text("kept")
    assert status(command, "--out", str(file)) == 2
    assert f"{file} is no folder" in capsys.readouterr().err
    assert file.read_text() == "kept"


@pytest.mark.parametrize(
    ("command", "option", "name"),
    [
        (bench, "--json", "bench.json"),
        (transitive, "--out", "transitive.json"),
        (transitive, "--out", "figure_b2.json"),
        (pessimism, "--out", "figure_1.json"),
        (degeneration, "--out", "degeneration.json"),
    ],
)
def test_a_file_that_is_there_is_overwritten_by_force_alone(
    command: Any, option: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    file.write_text("kept")
    assert status(command, option, str(file if option == "--json" else tmp_path)) == 2
    said = f"error: {option} {file} exists; name another file, or remove it, or overwrite it by --force\n"
    assert capsys.readouterr().err == said
    assert [(path, path.read_text()) for path in tmp_path.iterdir()] == [(file, "kept")]


def test_pessimism_chooses_the_hull(tmp_path: Path) -> None:
    (tmp_path / "figure_1.json").write_text("of an earlier run")
    assert pessimism.main(["--out", str(tmp_path), "--force"]) == 0
    results = json.loads((tmp_path / "figure_1.json").read_text())["results"]
    assert results["max_min"]["forward_kl"] < results["closest_member"]["forward_kl"]
    assert results["max_min"]["worst_case"] > 0 > results["closest_member"]["worst_case"]
    # With little KL weight both optima approach their targets, with much the reference.
    for name, target in (("e-dpo", "closest_member"), ("hull-dpo", "max_min")):
        path = np.array(results["paths"][name])
        np.testing.assert_allclose(path[0], results[target]["policy"], atol=5e-3)
        np.testing.assert_allclose(path[-1], results["ref"], atol=2e-2)
    with pytest.raises(ValueError, match=r"simplex of three arms, got rewards of shape \(1, 4\)"):
        pessimism.compute([[1.0, 2.0, 3.0, 4.0]], [0.25] * 4, 1.0)


def test_degeneration() -> None:
    """Shared parameters: DPO moves all mass to the unseen aa; p-DPO with free logits reaches the exact optimum."""
    results = degeneration.compute(beta=1.0, tau=0.1, alpha=0.1, reward_margin=2.0, rate=0.5, steps=4000)
    final = {(name, kind): np.exp(path[-1]) for name, paths in results["paths"].items() for kind, path in paths.items()}
    winner, unseen = results["strings"].index("ab"), results["strings"].index("aa")
    assert final["dpo", "shared"][unseen] > 0.99
    assert final["dpo", "shared"][winner] < 0.01 < 0.9 < final["dpo", "free"][winner]
    assert final["p-dpo", "shared"][winner] > 0.05
    np.testing.assert_allclose(final["p-dpo", "free"], results["optima"]["p-dpo"], atol=1e-4)
    assert results["optima"]["dpo"] is None


def test_descent_follows_the_gradient_of_the_losses() -> None:
    features, alpha, step = degeneration.FEATURES["shared"], 0.3, 1e-6
    (objective, _) = degeneration.objectives(1.5, 0.1, alpha, 2.0)["p-dpo"]

    def value(parameters: np.ndarray) -> float:
        logits = features @ parameters
        u = logits - np.logaddexp.reduce(logits) - np.log(0.25)
        margin = np.array([u[degeneration.STRINGS.index("ab")] - u[degeneration.STRINGS.index("bb")]])
        return float(losses.dpo(margin, beta=1.5)[0] + alpha * losses.forward_kl(u).mean())

    _, path = degeneration.descend(objective.pair_loss(), alpha, features, rate=0.1, steps=1)
    slopes = np.array([(value(step * axis) - value(-step * axis)) / (2 * step) for axis in np.eye(2)])
    logits = features @ (-0.1 * slopes)
    np.testing.assert_allclose(path[1], logits - np.logaddexp.reduce(logits), atol=1e-9)


def test_bench_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SIZES", (100,))
    monkeypatch.setattr(bench, "ARMS", (3, 4))
    assert bench.main(["--count", "64", "--referee-count", "2", "--json", str(tmp_path / "bench.json")]) == 0
    document = json.loads((tmp_path / "bench.json").read_text())
    assert [row["arms"] for row in document["batched"]] == [3, 4]
    assert max(row["residual"] for row in document["batched"]) <= 1e-10
    assert max(row["distance"] for row in document["batched"]) <= 1e-4
