"""Figures of the grid, drawn from a small synthetic one: what they show, and what they refuse."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from figures import figure_2, figure_b1, figure_b3, figure_b4, figure_b5
from figures.__main__ import main
from figures.grid import methods_of
from figures.registry import modules, redraw
from figures.seeds import interval
from figures.style import COLOURS, series
from figures.style_test import share_of, told_apart
from lm.objectives import METHODS, PAPERS, looks

NAMES = ("figure_2", "figure_b1", "figure_b3", "figure_b4", "figure_b5")
SEEDS, RHOS = (0, 1, 2), (0.2, 0.35, 0.5, 0.65, 0.8)
MEMBERS = ("b0.2", "b0.4", "b0.5", "b0.6", "b0.8")
KL = {"kl": {"alpha_start": 0.0001, "alpha_end": 0.01, "samples": "reference"}}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "dpo": [{"beta": beta} for beta in (0.1, 0.3, 1.0)],
    "ipo": [{"tau": tau, "length_normalised": False} for tau in (0.03, 0.1, 0.3)],
    "p-dpo": [{"beta": beta, **KL} for beta in (0.1, 0.3, 1.0)],
    "d-dpo": [{"beta": 3.0}],
    "dp-dpo": [{"beta": beta, **KL} for beta in (0.1, 1.0)],
    "e-dpo": [{"beta": beta, **KL} for beta in (0.1, 0.3, 1.0)],
    "hull-dpo": [{"beta": 1.0, **KL}],
    "drdo": [{"alpha": alpha, "gamma": 2.0, "reward_estimate": "head", "beta": None} for alpha in (0.01, 0.1)],
}


def synthetic_grid(seeds: tuple[int, ...] = SEEDS, rhos: tuple[float, ...] = RHOS) -> dict[str, Any]:
    """Made-up numbers in the shape of grid.json: a test's, never a result's."""
    rng = np.random.default_rng(0)

    def tested() -> dict[str, Any]:
        advantage = float(rng.normal(0.3, 0.1))
        return {"advantage": advantage, "ci": [advantage - 0.08, advantage + 0.08], "n": 614}

    def cell(seed: int, rho: float, method: str) -> dict[str, Any]:
        settings = copy.deepcopy(SETTINGS[method])
        probe = []
        for step in range(0, 250, 50):
            drift = step / 50 * rng.uniform(0.5, 1.5)
            probe.append(
                {
                    "step": step,
                    "chosen_logps": -20 - drift,
                    "rejected_logps": -22 - 3 * drift,
                    "forward_kl_reference": 0.2 * drift,
                    "forward_kl_preferences": 2 * drift,
                    "member_shares": rng.dirichlet(np.ones(len(MEMBERS))).tolist(),
                }
            )
        return {
            "seed": seed,
            "rho": rho,
            "method": method,
            "chosen": {"setting": settings[0], "step": 200},
            "test": tested(),
            "validation": [
                {"setting": dict(setting), "step": step, **tested()} for setting in settings for step in (100, 200)
            ],
            "probe": probe,
        }

    def pooled() -> dict[str, Any]:
        by_seed = rng.normal(0.3, 0.03, len(seeds))
        mean = float(by_seed.mean())
        return {"advantage": mean, "ci": [mean - 0.08, mean + 0.08], "n": 614, "by_seed": by_seed.tolist()}

    schedules = [(0.001, 0.001), (0.01, 0.01), (0.1, 0.1), (0.0001, 0.01)]
    return {
        "seeds": list(seeds),
        "rhos": list(rhos),
        "methods": list(PAPERS),
        "looks": looks(PAPERS),
        "members": list(MEMBERS),
        "confidence": 0.95,
        "cells": [cell(seed, rho, method) for seed in seeds for rho in rhos for method in PAPERS],
        "advantages": {f"{rho:g}": {method: pooled() for method in PAPERS} for rho in rhos},
        "alpha": [
            {
                "seed": seed,
                "rho": rhos[0],
                "method": method,
                "alpha": {"alpha_start": start, "alpha_end": end},
                "test": tested(),
            }
            for seed in seeds
            for method in ("p-dpo", "dp-dpo", "e-dpo")
            for start, end in schedules
        ],
    }


@pytest.fixture(name="grid")
def _grid() -> dict[str, Any]:
    return synthetic_grid(seeds=(0, 1), rhos=(0.2, 0.8))


def cell_of(grid: dict[str, Any], seed: int, rho: float, method: str) -> dict[str, Any]:
    """The one cell."""
    found: list[dict[str, Any]] = [
        c for c in grid["cells"] if (c["seed"], c["rho"], c["method"]) == (seed, rho, method)
    ]
    assert len(found) == 1
    return found[0]


def line(axis: Any, label: str) -> npt.NDArray[np.float64]:
    """Points of the line with this label, [T, 2]."""
    (found,) = [one for one in axis.lines if one.get_label() == label]
    return np.array(found.get_xydata(), dtype=np.float64)


@pytest.mark.parametrize("name", NAMES)
def test_draws(name: str, grid: dict[str, Any], tmp_path: Path) -> None:
    png, pdf, svg, caption = redraw(name, tmp_path, grid)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert pdf.read_bytes().startswith(b"%PDF")
    assert "<svg " in svg.read_text()
    assert caption.read_text().isascii()


def test_draws_one_seed_at_one_rho() -> None:
    grid = synthetic_grid(seeds=(0,), rhos=(0.2,))
    for name in NAMES:
        modules()[name].draw(grid)
    captions = [modules()[name].caption(grid) for name in NAMES]
    assert all("1 seed" in text and "1 seeds" not in text and "Embedded world" in text for text in captions)


def test_lines_differ_without_colour_and_by_colour(grid: dict[str, Any]) -> None:
    methods = list(methods_of(grid).values())
    for shown in (
        [(str(look.dashes), look.marker, look.hollow) for look in methods],
        [(str(look["linestyle"]), look["marker"], True) for look in series("rhos", range(7), "grid.json")],
        [look.colour for look in methods],
        list(COLOURS.values()),
    ):
        assert len(set(shown)) == len(shown)


# ---------------------------------------------------------------- what they show


def test_figure_2_shows_pooled_advantages_side_by_side(grid: dict[str, Any]) -> None:
    grid["advantages"]["0.8"]["ipo"] = {"advantage": 0.5, "ci": [0.4, 0.9], "by_seed": [0.45, 0.55]}
    (axis,) = figure_2.draw(grid).axes
    drawn = {container.get_label(): container for container in axis.containers}
    assert list(drawn) == [METHODS[name].heading() for name in PAPERS]
    at = np.array([container[0].get_xdata() for container in drawn.values()])
    assert (np.diff(at, axis=0) > 0).all()
    assert (np.abs(at - [0.2, 0.8]) < 0.3).all()  # no method stands nearer to another rho
    assert drawn["IPO"][0].get_ydata()[1] == 0.5
    (bars,) = drawn["IPO"][2]
    over_seeds = stats.ttest_1samp([0.45, 0.55], 0.0).confidence_interval(grid["confidence"])
    np.testing.assert_allclose(bars.get_segments()[1][:, 1], over_seeds)
    assert "intervals over seeds, each with a world" in figure_2.caption(grid)


def test_figure_2_of_one_seed_has_its_prompts_interval() -> None:
    grid = synthetic_grid(seeds=(0,), rhos=(0.2, 0.8))
    grid["advantages"]["0.8"]["ipo"] = {"advantage": 0.5, "ci": [0.4, 0.9], "by_seed": [0.5]}
    (axis,) = figure_2.draw(grid).axes
    drawn = {container.get_label(): container for container in axis.containers}
    np.testing.assert_allclose(drawn["IPO"][2][0].get_segments()[1][:, 1], [0.4, 0.9])
    assert "intervals over prompts" in figure_2.caption(grid)


def test_figure_b1_shows_the_mean_over_seeds_as_far_as_all_have_it(grid: dict[str, Any]) -> None:
    first, second = (cell_of(grid, seed, 0.8, "d-dpo")["probe"] for seed in (0, 1))
    del second[-1]
    axes = np.array(figure_b1.draw(grid).axes).reshape(4, 2)
    expected = [
        [one["step"], (one["rejected_logps"] + other["rejected_logps"]) / 2]
        for one, other in zip(first, second, strict=False)
    ]
    np.testing.assert_allclose(line(axes[1, 1], "d-DPO"), expected)
    assert len(line(axes[1, 1], "DPO")) == len(first)


def test_figure_b3_has_a_line_for_each_member(grid: dict[str, Any]) -> None:
    for seed, share in ((0, 0.9), (1, 0.7)):
        cell_of(grid, seed, 0.8, "e-dpo")["probe"][0]["member_shares"] = [share, 1 - share, 0, 0, 0]
    _, last = figure_b3.draw(grid).axes
    np.testing.assert_allclose(line(last, "$b = 0.2$")[0], [0, 0.8])
    np.testing.assert_allclose(line(last, "$b = 0.4$")[0], [0, 0.2])


def test_figure_b4_takes_each_setting_at_its_best_step(grid: dict[str, Any]) -> None:
    values = {
        0: {0.1: (0.2, 0.1), 0.3: (0.4, 0.5), 1.0: (0.0, 0.0)},
        1: {0.1: (0.0, 0.4), 0.3: (0.1, 0.1), 1.0: (0, 0)},
    }
    for seed, settings in values.items():
        cell_of(grid, seed, 0.2, "dpo")["validation"] = [
            {"setting": {"beta": beta}, "step": step, "advantage": advantage, "ci": [advantage - 0.3, advantage + 0.4]}
            for beta, advantages in settings.items()
            for step, advantage in zip((100, 200), advantages, strict=True)
        ]
    axis = figure_b4.draw(grid).axes[0]
    curve, bars = (axis.containers[0][part] for part in (0, 2))
    np.testing.assert_allclose(curve.get_ydata(), [0.3, 0.3, 0.0], atol=1e-15)
    np.testing.assert_allclose(np.diff(np.log(curve.get_xdata())), np.diff(np.log([0.1, 0.3, 1.0])))
    half = np.array([0.3, 0.4]) / np.sqrt(2)  # of a mean of two, each with its own prompts
    np.testing.assert_allclose(next(ends[:, 1] for ends in bars[0].get_segments()), [0.3 - half[0], 0.3 + half[1]])
    (best,) = [one for one in axis.lines if np.shape(one.get_xydata()) == (1, 2)][:1]  # filled, of the first rho
    np.testing.assert_allclose(np.asarray(best.get_ydata(), dtype=float), [0.3])
    assert best.get_markerfacecolor() == curve.get_color()
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0.1", "0.3", "1"]


def test_figure_b4_names_what_was_swept(grid: dict[str, Any]) -> None:
    axes = figure_b4.draw(grid).axes
    titles = {axis.get_title(): axis.get_xlabel() for axis in axes}
    assert (titles["DPO"], titles["IPO"], titles["DRDO"]) == (r"$\beta$", r"$\tau$", r"$\alpha$")
    (hull,) = [axis for axis in axes if axis.get_title() == "hull-DPO (ours)"]  # one setting only
    assert (hull.get_xlabel(), [text.get_text() for text in hull.get_xticklabels()]) == (r"$\beta$", ["1"])


def test_figure_b5_puts_the_annealed_weight_last(grid: dict[str, Any]) -> None:
    panel = figure_b5.draw(grid).axes[1]
    assert panel.get_title() == r"dp-DPO, $\rho = 0.2$"
    assert [text.get_text() for text in panel.get_xticklabels()] == ["0.001", "0.01", "0.1", "0.0001\nto 0.01"]
    annealed = [
        entry["test"]["advantage"]
        for entry in grid["alpha"]
        if entry["method"] == "dp-dpo" and entry["alpha"]["alpha_start"] == 0.0001
    ]
    (means,) = [lines for lines in panel.collections if lines.get_label() == "mean"]
    np.testing.assert_allclose(np.asarray(means.get_paths()[-1].vertices)[:, 1], np.mean(annealed))


# ---------------------------------------------------------------- what they refuse


def no_beta(grid: dict[str, Any]) -> None:
    """Settings that differ in two hyper-parameters."""
    cell_of(grid, 0, 0.2, "ipo")["validation"][0]["setting"]["length_normalised"] = True


def other_settings(grid: dict[str, Any]) -> None:
    """A seed with a setting less."""
    del cell_of(grid, 1, 0.8, "dpo")["validation"][:2]


def no_common_step(grid: dict[str, Any]) -> None:
    """Seeds that were probed at different steps."""
    for entry in cell_of(grid, 1, 0.8, "dpo")["probe"]:
        entry["step"] += 1


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("figure_2", lambda g: g.pop("advantages"), "grid.json has no advantages; this figure is drawn from it"),
        ("figure_2", lambda g: g["advantages"]["0.2"].pop("dpo"), "grid.json has no advantages.0.2.dpo;"),
        ("figure_2", lambda g: g["advantages"].pop("0.8"), "grid.json has no advantages.0.8;"),
        ("figure_2", lambda g: g["cells"].pop(), "must have one cell for seed 1, rho 0.8, method drdo, it has 0"),
        ("figure_2", lambda g: g["cells"].append(g["cells"][0]), "one cell for seed 0, rho 0.2, method dpo, it has 2"),
        ("figure_b1", lambda g: g["looks"].pop("d-dpo"), "grid.json has no looks.d-dpo, by which d-dpo is drawn"),
        ("figure_b5", lambda g: g.pop("looks"), "grid.json has no looks.p-dpo, by which p-dpo is drawn"),
        ("figure_b4", lambda g: g["looks"]["ipo"].pop("marker"), "grid.json, looks: lacks marker"),
        (
            "table_1",
            lambda g: g["looks"]["ipo"].update(colour="pink"),
            "grid.json, looks: the colour of IPO must be one of black, .*; got 'pink'",
        ),
        (
            "figure_2",
            lambda g: g["methods"].append("ppo"),
            "grid.json has no looks.ppo, .* write it anew",
        ),
        (
            "figure_b1",
            lambda g: cell_of(g, 1, 0.8, "p-dpo").pop("probe"),
            "grid.json has no probe for seed 1, rho 0.8, method p-dpo;",
        ),
        ("figure_b1", no_common_step, "the seeds' probes share no step for rho 0.8, method dpo"),
        (
            "figure_b3",
            lambda g: cell_of(g, 0, 0.2, "e-dpo")["probe"][2].pop("member_shares"),
            "grid.json has no member_shares",
        ),
        (
            "figure_b3",
            lambda g: g["members"].pop(),
            "one share for each of b0.2, .*, at rho 0.2 their shape is \\(5,\\)",
        ),
        ("figure_b3", lambda g: g["members"].extend("xyz"), "a figure can tell 7 members apart, grid.json has 8"),
        ("figure_b4", no_beta, "settings of ipo must differ in one of beta, tau, .* they have tau, length_normalised"),
        ("figure_b4", other_settings, "at rho 0.8 the seeds of dpo have different settings"),
        ("figure_b4", lambda g: cell_of(g, 0, 0.2, "dpo")["validation"][0].pop("advantage"), "has no advantage"),
        ("figure_b5", lambda g: g.update(alpha=[]), "grid.json has no alpha"),
        ("figure_b5", lambda g: g["alpha"].pop(), "alpha has no seed 1 of e-dpo at rho 0.2, alpha \\(0.0001, 0.01\\)"),
        ("figure_b5", lambda g: g["alpha"][0].pop("test"), "has no test for seed 0, rho 0.2, method p-dpo"),
    ],
)
def test_refuses(name: str, spoil: Callable[[dict[str, Any]], object], message: str, grid: dict[str, Any]) -> None:
    def both() -> None:
        modules()[name].draw(grid)
        modules()[name].caption(grid)

    if name != "table_1":  # whose numbers are not among these
        both()
    spoil(grid)
    with pytest.raises(ValueError, match=message):
        both()


def test_the_command_says_what_is_missing(
    grid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("figures.registry.RESULTS", tmp_path)
    del grid["cells"]
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    assert main(["figure_b4", "--out", str(tmp_path)]) == 1
    assert "grid.json has no cells; this figure is drawn from it" in capsys.readouterr().err


# ---------------------------------------------------------------- told apart, and not stretched


@pytest.mark.parametrize("spoilt", ["drdo", "ipo"])
@pytest.mark.parametrize("at", [("0.2",), ("0.2", "0.8")])
@pytest.mark.parametrize("value", [-60.0, 7.0, 0.31])
def test_figure_2_is_not_stretched_by_one_method(
    spoilt: str, at: tuple[str, ...], value: float, grid: dict[str, Any]
) -> None:
    for rho in at:
        ends = {"ci": [value - 0.1, value + 0.1], "by_seed": [value - 0.01, value + 0.01]}
        grid["advantages"][rho][spoilt] = {"advantage": value, **ends}
    entries = [
        entry
        for rho, row in grid["advantages"].items()
        for name, entry in row.items()
        if not (name == spoilt and rho in at)
    ]
    bars = [end for entry in entries for end in interval(entry["by_seed"], grid["confidence"]) or ()]
    drawn = [*map(float, bars), *(number for entry in entries for number in entry["by_seed"])]
    figure = figure_2.draw(grid)
    axes: list[Any] = figure.axes
    assert share_of((min(drawn), max(drawn)), axes) >= 0.55
    for number in [*drawn, value, 0.0]:
        assert any(axis.get_ylim()[0] <= number <= axis.get_ylim()[1] for axis in axes), "all is shown"
    assert ("the axis is broken" in figure_2.caption(grid)) == (len(axes) > 1)
    told = [
        text for text in figure.findobj() if getattr(text, "get_text", str)() == "advantage over SFT (oracle reward)"
    ]
    assert len(told) == 1


@pytest.mark.parametrize("module", [figure_b1, figure_b3])
def test_lines_that_cover_each_other_are_told_apart(module: Any, grid: dict[str, Any]) -> None:
    probes = {(cell["seed"], cell["rho"]): cell["probe"] for cell in grid["cells"] if cell["method"] == "d-dpo"}
    for cell in grid["cells"]:
        cell["probe"] = copy.deepcopy(probes[cell["seed"], cell["rho"]])  # all methods learn alike
    for axis in module.draw(grid).axes:
        told_apart([one for one in axis.lines if len(one.get_xdata()) > 2])


def test_figure_b4_leaves_out_what_single_cells_added(grid: dict[str, Any]) -> None:
    before = figure_b4.best_steps(cell_of(grid, 1, 0.8, "dpo"), "beta")
    cell = cell_of(grid, 1, 0.8, "dpo")
    cell["validation"].append(copy.deepcopy(cell["validation"][0]) | {"setting": {"beta": 30.0}, "advantage": 9.0})
    with pytest.raises(ValueError, match="the seeds of dpo have different settings"):
        figure_b4.draw(grid)
    cell["settled"] = {"settings": [{"beta": 30.0}], "longer": False}
    assert figure_b4.best_steps(cell, "beta") == before
    figure_b4.draw(grid)


def test_figure_b4_gives_far_panels_an_axis_of_their_own(grid: dict[str, Any]) -> None:
    for seed in (0, 1):
        for rho in (0.2, 0.8):
            for entry in cell_of(grid, seed, rho, "e-dpo")["validation"]:
                entry["advantage"] -= 30
                entry["ci"] = [end - 30 for end in entry["ci"]]
    figure = figure_b4.draw(grid)
    limits = {axis.get_title(): axis.get_ylim() for axis in figure.axes}
    own = limits.pop("e-DPO")
    assert len(set(limits.values())) == 1
    (common,) = set(limits.values())
    assert own[1] < -20 < common[0]
    assert max(high - low for low, high in (own, common)) < 2
    (far,) = [axis for axis in figure.axes if axis.get_title() == "e-DPO"]
    assert any(label.get_visible() for label in far.get_yticklabels())
