"""Lines that are told apart, axes that nothing stretches, captions as LaTeX reads them, intervals over seeds."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy import stats

from figures import broken
from figures.captions import latex, plain
from figures.seeds import interval, together
from figures.style import COLOURS, STYLES, figure, layered, looks_of, series, style
from lm.objectives import METHODS, PAPERS, looks


def told_apart(lines: list[Any]) -> None:
    """Of drawn lines, bottom first: no two alike, each above the ones before and narrower, so that those stay seen."""
    for below, above in combinations(sorted(lines, key=lambda line: line.get_zorder()), 2):
        assert (to_hex(below.get_color()), below._unscaled_dash_pattern) != (
            to_hex(above.get_color()),
            above._unscaled_dash_pattern,
        )
        assert above.get_linewidth() <= below.get_linewidth() - 0.25
        assert above.get_zorder() > below.get_zorder()
        assert above.get_markevery() != below.get_markevery()


def test_layered_lines_are_told_apart_whatever_they_are() -> None:
    for looked in (series("lines", range(7), "file"), [found.line for found in looks_of_all(PAPERS).values()]):
        axis = Figure().subplots()
        told_apart([axis.plot([0, 1], [0, 0], **look)[0] for look in layered(looked)])
    (alone,) = layered(series("lines", range(1), "file"))
    assert alone["markevery"] == (0, 1)


def looks_of_all(names: Any) -> dict[str, Any]:
    return looks_of({"looks": looks(names)}, list(names), "file")


def test_methods_are_drawn_in_one_order_and_look_alike_everywhere() -> None:
    asked = ["e-dpo", "dpo", "simpo", "d-dpo"]
    assert list(looks(asked)) == ["dpo", "d-dpo", "e-dpo", "simpo"] == [name for name in METHODS if name in asked]
    assert list(looks_of({"looks": looks(asked)}, asked, "file")) == list(looks(asked))
    assert list(looks_of({"looks": looks(asked)}, ["simpo", "dpo"], "file")) == ["dpo", "simpo"]


def test_colours_are_distinct_for_every_common_colour_vision() -> None:
    """Machado et al. 2009, severity 1: protanopia, deuteranopia, tritanopia, in linear RGB; and CIE Lab's distance."""
    seen = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    encoded = np.array([[int(to_hex(colour)[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in COLOURS.values()])
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    for vision, matrix in seen.items():
        lab = lab_of(np.clip(linear @ np.array(matrix).T, 0, 1))
        near = min((float(np.linalg.norm(lab[i] - lab[j])), i, j) for i, j in combinations(range(len(lab)), 2))
        assert near[0] > 15, (vision, near)


def lab_of(linear: Any) -> Any:
    xyz = linear @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    scaled = xyz / [0.9505, 1.0, 1.089]
    root = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    x, y, z = root.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


# ---------------------------------------------------------------- broken axes


NEAR = [(1.0, 1.2), (1.1, 1.4), (1.15, 1.3), (1.35, 1.5)]


@pytest.mark.parametrize(
    ("far", "parts", "main"),
    [
        ([], [(1.0, 1.5)], 0),
        ([(0.0, 0.0)], [(0.0, 0.0), (1.0, 1.5)], 1),
        ([(9.0, 9.5)], [(1.0, 1.5), (9.0, 9.5)], 0),
        ([(-40.0, -39.0), (9.0, 9.5)], [(-40.0, -39.0), (1.0, 1.5), (9.0, 9.5)], 1),
        ([(-40.0, -39.0), (-2.0, -1.9)], [(-40.0, -1.9), (1.0, 1.5)], 1),
        ([(0.9, 0.95)], [(0.9, 1.5)], 0),
        ([(1.55, 1.6), (1.8, 1.82)], [(1.0, 1.82)], 0),
        ([(0.0, 1.3)], [(0.0, 1.5)], 0),
    ],
)
def test_parts_of_an_axis(far: list[broken.Span], parts: list[broken.Span], main: int) -> None:
    assert broken.parts([*NEAR, *far]) == (parts, main)
    assert broken.parts([*far, *NEAR][::-1]) == (parts, main)


def test_without_a_majority_an_axis_is_whole() -> None:
    assert broken.parts([(0.0, 0.1), (5.0, 5.1)]) == ([(0.0, 5.1)], 0)
    assert broken.parts([(0.0, 0.0)]) == ([(0.0, 0.0)], 0)


@pytest.mark.parametrize("far", [[], [(-40.0, -39.0)], [(0.0, 0.0), (300.0, 301.0)]])
def test_most_of_a_broken_axis_is_for_most_of_the_values(far: list[broken.Span]) -> None:
    shown = Figure()
    axes = broken.axes(shown, [*NEAR, *far])
    assert len(axes) == 1 + len(far)
    heights = [axis.get_position().height for axis in axes]
    assert share_of((1.0, 1.5), axes) >= 0.4
    assert max(heights) == next(
        h for h, axis in zip(heights, axes, strict=True) if axis.get_ylim()[0] < 1.1 < axis.get_ylim()[1]
    )
    for low, high in [*NEAR, *far]:
        assert any(axis.get_ylim()[0] <= low and high <= axis.get_ylim()[1] for axis in axes)


def share_of(span: broken.Span, axes: list[Any]) -> float:
    """Of the height of an axis that may be broken, what a span takes."""
    whole: float = sum(axis.get_position().height for axis in axes)
    taken: float = 0.0
    for axis in axes:
        low, high = axis.get_ylim()
        inside = max(min(span[1], high) - max(span[0], low), 0.0)
        taken += axis.get_position().height * inside / (high - low)
    return float(taken / whole)


# ---------------------------------------------------------------- sizes, captions, seeds


def test_sizes_of_a_style() -> None:
    for name, this in STYLES.items():
        with style(name):
            scale = this.double / STYLES["paper"].double
            assert figure(2.0).get_size_inches() == pytest.approx([this.double, 2.0 * scale])
            assert figure(2.0, columns=1).get_size_inches() == pytest.approx([this.single, 2.0 * scale])
            assert figure(50.0).get_size_inches()[1] == this.tallest
            assert figure(50.0, tall=True).get_size_inches()[1] == pytest.approx(50.0 * scale)
    assert figure(2.0).get_size_inches()[0] == STYLES["paper"].double, "as it was, after the block"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        (r"$\pi_{\mathrm{ref}}$ at 50% of a_b", r"$\pi_{\mathrm{ref}}$ at 50\% of a\_b"),
        (r"$x_1$ & $y^2$ {#1}", r"$x_1$ \& $y^2$ \{\#1\}"),
        (plain("runs/$HOME_a$"), r"runs/\$HOME\_a\$"),
        (plain("5$") + r" and $\beta$", r"5\$ and $\beta$"),
        ("a < b ~ c^d \\ e", r"a \textless{} b \textasciitilde{} c\textasciicircum{}d \textbackslash{} e"),
    ],
)
def test_captions_for_latex(text: str, escaped: str) -> None:
    assert latex(text) == escaped


def test_intervals_over_seeds() -> None:
    values = np.array([[1.0, 5.0], [2.0, 5.0], [4.0, 8.0]])
    found = interval(values, 0.9)
    assert found is not None
    for column in range(2):
        known = stats.ttest_1samp(values[:, column], 0).confidence_interval(0.9)
        np.testing.assert_allclose([end[column] for end in found], [known.low, known.high])
    assert interval(values[:1], 0.9) is None
    steps, at = together([{0: 1.0, 5: 2.0, 10: 3.0}, {10: 7.0, 0: 5.0}])
    assert (steps, at.tolist()) == ([0, 10], [[1.0, 3.0], [5.0, 7.0]])
