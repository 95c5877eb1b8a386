"""The frontier and Figure B.1 on real text, from small made-up studies: what they show, and what they refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from figures import frontier, real_text
from figures.registry import redraw
from figures.seeds import interval
from figures.studies import kl_of_best_of, read_frontier, read_real_text
from figures.style_test import told_apart
from lm.objectives import looks

METHODS = ("dpo", "d-dpo", "dp-dpo", "e-dpo")


def skeleton(presets: dict[str, Any], methods: tuple[str, ...]) -> dict[str, Any]:
    return {
        "version": 1,
        "confidence": 0.9,
        "looks": looks(methods),
        "provenance": {"seed": [0, 1], "commit": None},
        "presets": presets,
    }


def frontier_values(
    seeds: int = 3, methods: tuple[str, ...] = METHODS, presets: tuple[str, ...] = ("rho 0.2", "rho 0.8")
) -> dict[str, Any]:
    """Made-up numbers in the shape of the frontier of study.json: a test's, never a result's."""
    rng = np.random.default_rng(0)

    def points(height: float) -> list[dict[str, Any]]:
        made = []
        for beta in (0.1, 0.3, 1.0, 3.0):
            for step in (100, 200, 300):
                kl = step / 100 / beta**0.7 * rng.uniform(0.8, 1.2)
                advantage = height * (math.sqrt(kl) - 0.08 * kl) + rng.normal(0, 0.08)
                made.append({"setting": {"beta": beta}, "step": step, "advantage": advantage, "kl": kl, "other": 1})
        return made

    def seed() -> dict[str, Any]:
        heights = zip(methods, (0.8, 0.9, 0.89, 0.6), strict=False)
        best = [
            {"n": n, "advantage": 0.9 * math.sqrt(kl_of_best_of(n)) + rng.normal(0, 0.02)} for n in (1, 2, 4, 8, 16, 32)
        ]
        return {"methods": {name: points(height) for name, height in heights}, "best_of": best}

    made = {name: {"seeds": {str(number): seed() for number in range(seeds)}} for name in presets}
    return {**skeleton(made, methods), "judge": "exact judge", "n": 500}


def real_text_values(
    seeds: int = 2, methods: tuple[str, ...] = METHODS, presets: tuple[str, ...] = ("tldr-small", "helpfulness-small")
) -> dict[str, Any]:
    """Made-up numbers in the shape of real_text.json: a test's, never a result's."""
    rng = np.random.default_rng(0)

    def training(pull: float) -> dict[str, Any]:
        def at(step: int, gap: float) -> dict[str, Any]:
            fall = pull * 20 * math.log1p(step / 50) * rng.uniform(0.9, 1.1)
            logps = {"chosen_logps": -90 - fall, "rejected_logps": -95 - (2 + gap) * fall}
            return {"step": step, **logps, "chosen_logratio": -fall, "rejected_logratio": -(2 + gap) * fall}

        def probed(step: int) -> dict[str, Any]:
            line = at(step, 0)
            fall = -90 - line["chosen_logps"]
            more = {
                "accuracy": 0.5 + 0.2 * math.tanh(fall / 20) + 0.02 * rng.random(),
            }
            learnt = {f"train_{name}": value + 300 for name, value in at(step, 1).items() if name != "step"}
            kl = {"forward_kl_reference": 0.5 * fall, "forward_kl_preferences": 1.5 * fall}
            return {**line, **more, **kl, **learnt}

        return {
            "setting": {"beta": 0.1},
            "probe": [probed(step) for step in range(0, 401, 50)],
            "final": {"advantage": 1.0},
        }

    def seed() -> dict[str, Any]:
        pulls = zip(methods, (1.0, 0.8, 0.8, 0.5), strict=False)
        return {"methods": {name: training(pull) for name, pull in pulls}}

    made = {name: {"seeds": {str(number): seed() for number in range(seeds)}} for name in presets}
    return skeleton(made, methods)


def read(kind: str, values: dict[str, Any], folder: Path) -> Any:
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(values))
    return (read_frontier if kind == "frontier" else read_real_text)(path)


# ---------------------------------------------------------------- frontier


def test_the_frontier_is_the_best_within_so_much_kl(tmp_path: Path) -> None:
    values = frontier_values(seeds=2, methods=("dpo",), presets=("one",))
    points = {
        "0": [(1.0, 0.2), (4.0, 0.9), (2.0, 0.5), (3.0, 0.1)],
        "1": [(1.5, 0.4), (2.5, 0.3), (6.0, 1.1)],
    }
    for seed, at in points.items():
        made = [{"setting": {}, "step": 1, "kl": kl, "advantage": advantage} for kl, advantage in at]
        values["presets"]["one"]["seeds"][seed]["methods"]["dpo"] = made
    results = read("frontier", values, tmp_path)
    found = [seed.methods["dpo"] for seed in results.presets["one"].seeds.values()]
    kl, best = frontier.envelope(found)
    assert kl.tolist() == [1.5, 2.0, 2.5, 3.0, 4.0, 6.0], "from where both have a point"
    assert best.tolist() == [[0.2, 0.5, 0.5, 0.5, 0.9, 0.9], [0.4, 0.4, 0.4, 0.4, 0.4, 1.1]]
    axis: Any = frontier.draw(results).axes[0]
    (line,) = [one for one in axis.lines if one.get_label() == "DPO"]
    np.testing.assert_allclose(line.get_xydata(), np.stack([kl, best.mean(0)], axis=1))
    assert line.get_drawstyle() == "steps-post"
    ends = interval(best, 0.9)
    assert ends is not None
    (band,) = [one for one in axis.collections if to_hex(one.get_facecolor()[0]) == to_hex(line.get_color())]
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((ends[0].min(), ends[1].max()))


def test_the_yardstick_is_best_of_n_at_its_bound(tmp_path: Path) -> None:
    results = read("frontier", frontier_values(), tmp_path)
    axis: Any = frontier.draw(results).axes[0]
    (line,) = [one for one in axis.lines if str(one.get_label()).startswith("best of")]
    seeds = results.presets["rho 0.2"].seeds.values()
    np.testing.assert_allclose(line.get_xdata(), [math.log(n) - (n - 1) / n for n in (1, 2, 4, 8, 16, 32)])
    means = np.mean([[best.advantage for best in seed.best_of] for seed in seeds], axis=0)
    np.testing.assert_allclose(line.get_ydata(), means)
    assert kl_of_best_of(1) == 0


def test_the_bound_of_best_of_n_is_its_kl_where_scores_differ() -> None:
    """Of m outcomes of one chance each, by the distribution of the best of n: from below, as m grows."""
    for n in (2, 4, 16):
        kls = []
        for m in (100, 10_000):
            share = np.diff((np.arange(m + 1) / m) ** n)
            kls.append(float((share * np.log(share * m)).sum()))
        assert kls[0] < kls[1] < kl_of_best_of(n)
        assert kls[1] == pytest.approx(kl_of_best_of(n), abs=1e-3)


def test_a_collapsed_policy_does_not_stretch_the_frontier(tmp_path: Path) -> None:
    values = frontier_values()
    collapsed = values["presets"]["rho 0.8"]["seeds"]["1"]["methods"]["e-dpo"][-1]
    collapsed |= {"advantage": -500.0, "kl": 3.0}
    results = read("frontier", values, tmp_path)
    _, second = frontier.draw(results).axes
    assert second.get_ylim()[0] > -1
    assert " 1 point lies below the panels." in frontier.caption(results)
    assert "below the panels" not in frontier.caption(read("frontier", frontier_values(), tmp_path))


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    for kind, values in (("frontier", frontier_values(seeds=1)), ("real_text", real_text_values(seeds=1))):
        module: Any = {"frontier": frontier, "real_text": real_text}[kind]
        results = read(kind, values, tmp_path)
        assert not any(axis.collections for axis in module.draw(results).axes)
        assert "interval" not in module.caption(results)
        several = {"frontier": "90% intervals over seeds", "real_text": "thin lines: each seed"}[kind]
        assert several in module.caption(read(kind, BOTH[kind](), tmp_path))
        assert several not in module.caption(results)


# ---------------------------------------------------------------- real text


def test_real_text_draws_each_quantity_of_each_method(tmp_path: Path) -> None:
    values = real_text_values(presets=("one",))
    results = read("real_text", values, tmp_path)
    panels = {axis.get_title(): axis for axis in real_text.draw(results).axes}
    known = {
        "winners, training": "train_chosen_logratio",
        "winners, held-out": "chosen_logratio",
        "losers, training": "train_rejected_logratio",
        "losers, held-out": "rejected_logratio",
        "KL by samples": "forward_kl_reference",
        "KL by pairs": "forward_kl_preferences",
        "accuracy, held-out": "accuracy",
    }
    assert set(panels) == {*known, "margin, held-out"}
    logs = [seed["methods"]["d-dpo"] for seed in values["presets"]["one"]["seeds"].values()]
    for title, name in known.items():
        (line,) = [one for one in panels[title].lines if one.get_label() == "d-DPO"]
        mean = np.mean([[entry[name] for entry in log["probe"]] for log in logs], axis=0)
        shown = np.array(line.get_ydata(), dtype=float)
        skipped = 1 if name == "accuracy" else 0  # at step 0 the policy is pi_ref
        assert np.isnan(shown[:skipped]).all()
        np.testing.assert_allclose(shown[skipped:], mean[skipped:])
        low, high = panels[title].get_ylim()
        assert low < np.nanmin(shown) <= np.nanmax(shown) < high, "held-out pairs may be longer than those of training"
        lines = [one for one in panels[title].lines if not str(one.get_label()).startswith("_")]
        told_apart(lines)
        assert len(lines) == len(METHODS)
        thin = [np.array(one.get_ydata(), dtype=float) for one in panels[title].lines if one not in lines]
        assert len(thin) == len(METHODS) * len(logs)
        for log in logs:
            own = [entry[name] for entry in log["probe"]][skipped:]
            assert any(np.allclose(own, seed[skipped:]) for seed in thin), "each seed"


def test_presets_may_differ_in_methods_and_seeds(tmp_path: Path) -> None:
    values = real_text_values()
    fewer = values["presets"]["tldr-small"]["seeds"]
    del fewer["1"]
    del fewer["0"]["methods"]["dpo"]
    results = read("real_text", values, tmp_path)
    figure = real_text.draw(results)
    assert [len(axis.lines) for axis in figure.axes] == [3] * 8 + [4 * 3] * 8, "a mean, and two seeds"
    (legend,) = figure.legends
    assert sorted(text.get_text() for text in legend.get_texts()) == ["DPO", "d-DPO", "dp-DPO", "e-DPO"]
    assert "tldr-small (1 seed), helpfulness-small (2 seeds)" in real_text.caption(results)


# ---------------------------------------------------------------- both


BOTH: dict[str, Callable[..., dict[str, Any]]] = {"frontier": frontier_values, "real_text": real_text_values}


@pytest.mark.parametrize(("kind", "style"), [("frontier", "slides"), ("real_text", "paper")])
def test_drawn_from_the_file(kind: str, style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("figures.registry.RESULTS", tmp_path)
    (tmp_path / ("study.json" if kind == "frontier" else f"{kind}.json")).write_text(
        json.dumps(BOTH[kind](presets=("one",)))
    )
    caption = redraw(kind, tmp_path / "out", style=style)[3].read_text()
    assert caption.isascii()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"{kind}.{suffix}" for suffix in ("caption.md", "pdf", "png", "svg")
    ]
    (tmp_path / ("study.json" if kind == "frontier" else f"{kind}.json")).write_text("{}")
    with pytest.raises(ValueError, match=f"figure {kind} is drawn from .*, which is not what its experiment writes"):
        redraw(kind, tmp_path / "out")


def first_seed(values: dict[str, Any]) -> dict[str, Any]:
    seed: dict[str, Any] = next(iter(next(iter(values["presets"].values()))["seeds"].values()))
    return seed


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v: v.update(version=2), "is of version 2, and version 1 is read here"),
        (lambda v: v.pop("provenance"), "lacks provenance"),
        (lambda v: v.update(confidence=95.0), "has confidence 95, where a number between 0 and 1 is needed"),
        (lambda v: v.update(presets={}), "has no presets"),
        (lambda v: next(iter(v["presets"].values()))["seeds"].clear(), "has no methods in presets"),
        (
            lambda v: first_seed(v)["methods"].pop("dpo"),
            "has seeds of .* with different methods: d-dpo, dp-dpo, e-dpo; dpo, d-dpo",
        ),
        (lambda v: v["looks"].pop("e-dpo"), "lacks looks.e-dpo"),
        (lambda v: v.update(confidence=float("nan")), "is not JSON"),
    ],
)
def test_what_is_no_study_is_refused(kind: str, spoil: Any, message: str, tmp_path: Path) -> None:
    values = BOTH[kind]()
    spoil(values)
    with pytest.raises(ValueError, match=f"{kind}.json {message}.*; write it anew with the study that makes it"):
        read(kind, values, tmp_path)


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("frontier", lambda s: s["methods"]["dpo"][2].pop("kl"), r"lacks presets.rho 0.2.seeds.0.methods.dpo\[2\].kl"),
        ("frontier", lambda s: s["methods"]["dpo"].clear(), "has no points of dpo in presets.rho 0.2"),
        ("frontier", lambda s: s["best_of"].pop(), r"has best_of in presets\.rho 0\.2 with n .* where the same"),
        ("frontier", lambda s: s["best_of"].reverse(), r"has best_of in presets\.rho 0\.2 with n .* where the same"),
        ("real_text", lambda s: s["methods"]["dpo"].pop("probe"), r"lacks .*seeds\.0\.methods\.dpo\.probe"),
        ("real_text", lambda s: s["methods"]["dpo"]["probe"][1].pop("accuracy"), r"lacks .*dpo.probe\[1\].accuracy"),
    ],
)
def test_what_a_seed_lacks_is_named(kind: str, spoil: Any, message: str, tmp_path: Path) -> None:
    values = BOTH[kind]()
    spoil(first_seed(values))
    with pytest.raises(ValueError, match=message):
        read(kind, values, tmp_path)


def test_seeds_that_share_no_step_are_refused(tmp_path: Path) -> None:
    values = real_text_values()
    for entry in first_seed(values)["methods"]["e-dpo"]["probe"]:
        entry["step"] += 1
    with pytest.raises(ValueError, match=r"presets\.tldr-small: the seeds' probes of e-dpo share no step"):
        real_text.draw(read("real_text", values, tmp_path))
