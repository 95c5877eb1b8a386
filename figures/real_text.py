"""Figure B.1 on real text: log-ratios of winners and losers, both estimates of the KL, and accuracy, over training.

Log-ratios to pi_ref, where Figure B.1 has log-probs: each seed has pairs of its own, whose log-probs lie further apart
than training moves them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

from matplotlib.figure import Figure

from figures.captions import plain
from figures.seeds import together
from figures.studies import RealText, RealTextPreset, Training, read_real_text
from figures.style import Look, figure, handles_of, layered, legend

RESULTS = "real_text.json"
READ = read_real_text

Panel = tuple[str, Callable[[Any], float]]
"""Title, and quantity of a probe; NaN is not drawn. Accuracy has none before the first step:
policy and pi_ref are one, and the sign of their log-ratios is rounding."""
PANELS: tuple[tuple[Panel, ...], ...] = (
    (
        ("winners, training", lambda probe: probe.train_chosen_logratio),
        ("winners, held-out", lambda probe: probe.chosen_logratio),
        ("losers, training", lambda probe: probe.train_rejected_logratio),
        ("losers, held-out", lambda probe: probe.rejected_logratio),
    ),
    (
        ("KL by samples", lambda probe: probe.forward_kl_reference),
        ("KL by pairs", lambda probe: probe.forward_kl_preferences),
        ("margin, held-out", lambda probe: probe.chosen_logratio - probe.rejected_logratio),
        ("accuracy, held-out", lambda probe: probe.accuracy if probe.step else math.nan),
    ),
)


def draw(results: RealText) -> Figure:
    """Two rows of panels a preset, a line a method: the mean over seeds; these as thin ones where there are several.

    ValueError where seeds share no step.
    """
    looks = {
        name: Look(look)
        for name, look in results.looks.items()
        if any(name in _of(p) for p in results.presets.values())
    }
    lines = dict(zip(looks, layered([look.line | {"label": look.title} for look in looks.values()]), strict=True))
    count = len(results.presets)
    shown = figure(2.5 * count + 0.4)
    axes = shown.subplots(len(PANELS) * count, len(PANELS[0]), squeeze=False)
    for number, (name, preset) in enumerate(results.presets.items()):
        block = axes[len(PANELS) * number : len(PANELS) * (number + 1)]
        drawn = {method: line for method, line in lines.items() if method in _of(preset)}
        for axis, (title, quantity) in zip(block.flat, chain(*PANELS), strict=True):
            _draw(axis, name, preset, drawn, quantity)
            axis.set_title(title)
            if axis is not block[0, 0]:
                axis.sharex(block[0, 0])
        for axis in block[0]:
            axis.tick_params(labelbottom=False)
        if count > 1:
            block[0, 0].set_ylabel(plain(name), y=-0.2)  # beside both rows
    for axis in axes[-1]:
        axis.set_xlabel("step")
    legend(shown, *handles_of(axes.flat))
    return shown


def caption(results: RealText) -> str:
    """What is shown."""
    counts = {plain(name): len(preset.seeds) for name, preset in results.presets.items()}
    seeds = ", ".join(f"{name} ({count} seed{'s' if count > 1 else ''})" for name, count in counts.items())
    each = " thin lines: each seed;" if max(counts.values()) > 1 else ""
    return (
        r"$\log\pi/\pi_{\mathrm{ref}}$ of winners and losers, nats a completion, means over training pairs and over "
        f"held-out pairs: {seeds}. Lines: means over seeds, as far as all of them trained;{each} where lines cover "
        r"each other the later method is the narrower one on top. KL is the mean of "
        r"$\log\pi_{\mathrm{ref}}-\log\pi$, over samples of $\pi_{\mathrm{ref}}$ or over both completions of held-out "
        r"pairs; the latter is no divergence and may be negative. Margin: that of winners less "
        "that of losers; accuracy: share of pairs in which it is positive."
    )


def _of(preset: RealTextPreset) -> dict[str, Training]:
    return next(iter(preset.seeds.values())).methods


def _draw(
    axis: Any,
    name: str,
    preset: RealTextPreset,
    lines: dict[str, dict[str, Any]],
    quantity: Callable[[Any], float],
) -> None:
    for method, line in lines.items():
        logged = [seed.methods[method].probe for seed in preset.seeds.values()]
        paths = [{one.step: quantity(one) for one in log} for log in logged]
        steps, values = together(paths)
        if not steps:
            raise ValueError(f"presets.{name}: the seeds' probes of {method} share no step")
        axis.plot(steps, values.mean(0), **line)
        for seed in values if len(values) > 1 else ():
            axis.plot(steps, seed, color=line["color"], linewidth=0.5, alpha=0.5)
