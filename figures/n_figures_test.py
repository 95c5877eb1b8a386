"""N-Figures from a small made-up study: what is drawn follows what the results hold."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from figures import n_figure_2, n_figure_3, n_figure_4, n_figure_5
from figures.nondeterministic import SPLITS
from lm.objectives import looks

METHODS = ["dpo", "e-dpo", "drdo", "drdo-implicit"]
TEMPERATURES = [0.5, 1.0]


def study(*, outside: bool = True, world: bool = True) -> dict[str, Any]:
    """Every number is arbitrary, and no two of one kind are alike."""
    count = iter(range(10_000))
    domains = ["in_domain", *(["out_of_domain"] if outside else [])]
    where: list[dict[str, Any]] = [{"split": s, "domain": d} for s in SPLITS for d in domains]
    wins = [
        {**place, "temperature": t, "policy": policy, "against": against, "judge": judge, "n": 40}
        for place in where
        for t in TEMPERATURES
        for against, policy in combinations(["sft", *METHODS], 2)
        for judge in (("oracle", "utility") if world else ("oracle",))
    ]
    for win in wins:
        rate = 0.3 + next(count) / 1000
        win |= {"rate": rate, "ci": [rate - 0.1, rate + 0.1]}
    names = ("chosen_logps", "rejected_logps", "accuracy", "forward_kl_reference")
    training = {
        split: {
            method: [{"step": step, **{name: float(next(count)) for name in names}} for step in (0, 5, 10)]
            for method in METHODS
        }
        for split in SPLITS
    }
    histograms = [
        {**place, "policy": method, "counts": [next(count), 3, 1], "mean": next(count) / 1000}
        for place in where
        for method in METHODS
    ]
    curve = {name: [0.1, 0.2, 0.3] for name in ("weight", "term", "chosen_gradient", "rejected_gradient")}
    return {
        "methods": METHODS,
        "looks": {**looks(METHODS[:3]), "drdo-implicit": {**looks(["hull-dpo"])["hull-dpo"], "title": "DRDO, other"}},
        "temperatures": TEMPERATURES,
        "confidence": 0.95,
        "labels": "given",
        "world": {"max_events": 8} if world else None,
        "out_of_domain": {"path": None if world else "news", "events": [12, 16]} if outside else None,
        "splits": {split: {"pairs": {"pairs": 1000 + next(count)}} for split in SPLITS},
        "wins": wins,
        "training": training,
        "histograms": {"temperature": 1.0, "edges": [0.0, 1.0, 2.0, 3.0], "counts": histograms},
        "focal": {
            "alpha": 0.1,
            "mean_logp": -10.0,
            "margin": [-1.0, 0.0, 1.0],
            "curves": [{"gamma": g, **curve} for g in (0.0, 2.0)],
        },
        "config": {"data": {"kind": "tldr", "path": "some/set"}},
        "provenance": {"seed": 7},
    }


def test_a_panel_for_each_split_domain_and_judge() -> None:
    assert len(n_figure_3.draw(study()).axes) == 3 * 2 * 2
    assert len(n_figure_3.draw(study(world=False)).axes) == 3 * 2
    assert len(n_figure_3.draw(study(outside=False)).axes) == 3 * 2
    assert len(n_figure_4.draw(study()).axes) == 3 * 2
    assert len(n_figure_4.draw(study(outside=False)).axes) == 3
    assert len(n_figure_5.draw(study()).axes) == 3 * 4


def test_win_rates_are_those_of_the_panels_split_domain_and_judge() -> None:
    results = study()
    panel: Any = n_figure_3.draw(results).axes[3 * 3 + 1]  # out of domain by utility, hc_he
    lines = {bars.get_label(): bars.lines[0].get_ydata() for bars in panel.containers}
    against_dpo = [f"{name} against DPO" for name in ("e-DPO", "DRDO", "DRDO, other")]
    assert list(lines) == [*against_dpo, "DRDO against e-DPO"]
    key = {"split": "hc_he", "domain": "out_of_domain", "judge": "utility", "policy": "drdo", "against": "e-dpo"}
    expected = [win["rate"] for t in TEMPERATURES for win in results["wins"] if win | key | {"temperature": t} == win]
    assert list(lines["DRDO against e-DPO"]) == expected
    assert len(expected) == len(TEMPERATURES)


def test_distribution_functions_are_shares_and_curves_are_the_probes() -> None:
    results = study()
    panel: Any = n_figure_4.draw(results).axes[2]  # in domain, lc_le
    rows = [row for row in results["histograms"]["counts"] if (row["split"], row["domain"]) == ("lc_le", "in_domain")]
    drawn = [line.get_xydata() for line in panel.lines if len(line.get_xdata()) == 2 and line.get_linestyle() != "None"]
    known = [[(1.0, c[0] / sum(c)), (2.0, (c[0] + c[1]) / sum(c))] for c in (row["counts"] for row in rows)]
    np.testing.assert_allclose(drawn[2:], known, err_msg="at the edges between bins, and nowhere else")
    means = [line.get_xdata()[0] for line in panel.lines if line.get_linestyle() == "None"]
    assert means == [row["mean"] for row in rows]
    curves: Any = n_figure_5.draw(results).axes[3 + 1].lines  # rejected, hc_he
    assert [list(line.get_ydata()) for line in curves] == [
        [entry["rejected_logps"] for entry in history] for history in results["training"]["hc_he"].values()
    ]
    accuracy: Any = n_figure_5.draw(results).axes[2 * 3].lines[0]
    assert list(accuracy.get_xdata()) == [5, 10], "at step 0 the policy is SFT, and accuracy is rounding"


def test_captions_say_which_data() -> None:
    for words in (n_figure_3.caption, n_figure_4.caption, n_figure_5.caption):
        outside = words is not n_figure_5.caption
        assert "Embedded world" in words(study())
        assert "one seed (7)" in words(study())
        other = words(study(world=False))
        assert "tldr (some/set), one seed (7), its own labels" in other
        assert ("Out of domain: news." in other) == outside
        assert ("Out of domain: posts of 12 to 16 events" in words(study())) == outside
        assert "Embedded world" not in other
        assert "Out of domain" not in words(study(outside=False))


def test_the_focal_figure_has_a_line_an_exponent_and_the_forces() -> None:
    drawn: list[list[Any]] = [[line.get_ydata() for line in axis.lines] for axis in n_figure_2.draw(study()).axes]
    curves = [[line for line in lines if len(line) == 3] for lines in drawn]
    assert [len(lines) for lines in curves] == [2, 2, 4]
    assert list(curves[2][0]) == [-0.1, -0.2, -0.3], "minus the gradient"
    without = study()
    del without["looks"]["drdo-implicit"]
    for draw in (n_figure_3.draw, n_figure_4.draw, n_figure_5.draw):
        with pytest.raises(ValueError, match=r"nondeterministic.json has no looks.drdo-implicit, by which"):
            draw(without)
    many = study()
    many["focal"]["curves"] *= 4
    with pytest.raises(ValueError, match="can tell 7 focal exponents apart"):
        n_figure_2.draw(many)
