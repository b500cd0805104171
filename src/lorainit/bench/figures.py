"""Draws the figures of the report; lines differ by marker and dashes, not only by colour."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..diagnostics import svg
from ..diagnostics.svg import INK, STYLE
from ..errors import LoraInitError
from . import statistics
from .cell_table import CellTable, Row
from .suite import CONTROLS, VANILLA

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES: list[tuple[str, Any, str]] = [
    ("#2b7fc4", (0, (5, 1.5)), "s"),
    ("#d55e00", (0, (1, 1)), "^"),
    ("#12936b", (0, (5, 1, 1, 1)), "D"),
    ("#8a4fbf", (0, (3, 1, 1, 1, 1, 1)), "v"),
    ("#a8821a", (0, (8, 3)), "P"),
]
_TICKS = [digit * 10.0**power for power in range(-4, 6) for digit in (1, 2, 5)]
_CONTROLS = {entry.label for entry in CONTROLS}


def rate_panels(table: CellTable) -> list[tuple[str, str]]:
    """Draw the loss at each learning rate: (label, SVG) for each method, with vanilla's curve in all of them."""
    control = table.control
    values = [rate.loss.mean for row in table.rows for rate in row.rates if rate.loss.count]
    rates = [rate.rate for row in table.rows for rate in row.rates]
    if not values:
        return []
    best = min(values)
    top = min(max(values), best + 2.5 * max(sorted(values)[len(values) // 2] - best, 1e-3))
    margin = 0.08 * (top - best) or 0.1
    panels = []
    for row in table.rows:
        if any(rate.loss.count for rate in row.rates):
            figure, axes = _axes((2.5, 1.9))
            if row is not control:
                _rates(axes, control, color=INK, linestyle=(0, (2, 1.5)), alpha=0.45, linewidth=1.2)
            axes.set(xscale="log", xlim=(min(rates) / 1.3, max(rates) * 1.3), ylim=(best - margin, top + margin))
            _rate_panel(axes, row, top, margin)
            panels.append((row.label, svg.svg(figure)))
    return panels


def _rate_panel(axes: Axes, row: Row, top: float, margin: float) -> None:
    """Draw the losses of a row at its rates, with intervals, marks of failed runs at the top, and the tuned rate."""
    _rates(axes, row, color=INK, marker="o", markersize=3.5, linewidth=1.4)
    for rate in row.rates:
        if not math.isnan(rate.loss.low):
            axes.plot((rate.rate, rate.rate), (rate.loss.low, rate.loss.high), color=INK, linewidth=0.9)
        if rate.broken:
            axes.plot(rate.rate, top, "x", color=INK, markersize=5)
    if row.tuned is not None:
        axes.plot(row.tuned, row.loss.mean, "o", mfc="none", mec=INK, markersize=9, mew=0.9)
    least = min(rate.loss.mean for rate in row.rates if rate.loss.count)
    if least > top + margin:
        axes.text(0.5, 0.9, f"above: {least:.3f}", transform=axes.transAxes, ha="center", fontsize=8)
    axes.tick_params(labelsize=7)


def loss_curves(table: CellTable) -> dict[str, str]:
    """Draw the training loss against steps and against time: vanilla and the best five others."""
    chosen = _leaders(table)
    if not chosen:
        return {}
    drawn = {}
    for name, label in (("steps", "training steps"), ("time", "seconds, the start's own included")):
        figure, axes = _axes((5.2, 3.4))
        for row, (color, dashes, marker) in zip(chosen, [(INK, "-", "o"), *_LINES], strict=False):
            curve = statistics.smooth(row.curve)
            x = [step if name == "steps" else statistics.at_step(row.clock, step) for step, _ in curve]
            y = [value for _, value in curve]
            every = max(1, len(x) // 6)
            axes.plot(
                x, y, color=color, linestyle=dashes, marker=marker, markevery=every, ms=4, lw=1.4, label=row.label
            )
        axes.set(xlabel=label, ylabel="training loss")
        control = [value for _, value in statistics.smooth(chosen[0].curve)]
        low, high = axes.get_ylim()
        axes.set_ylim(low, min(high, max(control) + 0.15 * (max(control) - min(control))))
        axes.legend(frameon=False, fontsize=8)
        drawn[name] = svg.svg(figure)
    return drawn


def pareto(table: CellTable) -> str | None:
    """Draw the loss against the cost of the start; marks are filled where no start is both cheaper and better."""
    points = [row for row in table.rows if row.loss.count and row.start_seconds > 0]
    if not points:
        return None
    figure, axes = _axes((6.4, 4.0))
    best = math.inf
    front = set()
    for row in sorted(points, key=lambda row: (row.start_seconds, row.loss.mean)):
        if row.loss.mean < best:
            best = row.loss.mean
            front.add(row.label)
    for row in points:
        marker = "s" if row.label in _CONTROLS else "o"
        face = INK if row.label in front else "none"
        axes.plot(row.start_seconds, row.loss.mean, marker, mfc=face, mec=INK, markersize=5.5)
    axes.set(xscale="log", xlabel="seconds that the start takes", ylabel="evaluation loss")
    low, high = min(r.start_seconds for r in points), max(r.start_seconds for r in points)
    axes.set_xlim(low / 1.6, high * 2.6)
    ticks = [tick for tick in _TICKS if low / 1.6 <= tick <= high * 2.6]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    _clip_outliers(axes, points)
    _labels(axes, points)
    return svg.svg(figure)


def _axes(size: tuple[float, float]) -> tuple[Any, Any]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise LoraInitError(f"{error}; figures need `pip install lorainit[bench]`") from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.grid(color=INK, alpha=0.12, linewidth=0.5)
    return figure, axes


def _rates(axes: Axes, row: Row, **look: Any) -> None:
    known = [(rate.rate, rate.loss.mean) for rate in row.rates if rate.loss.count]
    if known:
        axes.plot(*zip(*known, strict=True), **look)


def _leaders(table: CellTable) -> list[Row]:
    """Return vanilla and the best others, as many as there are different lines."""
    known = [row for row in table.rows if len(row.curve) > 1 and row.clock]
    others = sorted((row for row in known if row.label != VANILLA), key=lambda row: row.loss.mean)
    return [*(row for row in known if row.label == VANILLA), *others[: len(_LINES)]]


def _clip_outliers(axes: Axes, points: list[Row]) -> None:
    """Scale the axis to the losses near the best; losses far above get an arrow at the upper edge."""
    losses = sorted(row.loss.mean for row in points)
    top = losses[0] + 3 * max(losses[len(losses) // 2] - losses[0], 1e-4)
    if losses[-1] <= top:
        return
    inside = [loss for loss in losses if loss <= top]
    span = max(inside[-1] - losses[0], 1e-4)
    axes.set_ylim(losses[0] - 0.1 * span, inside[-1] + 0.25 * span)
    for row in points:
        if row.loss.mean > top:
            axes.plot(row.start_seconds, inside[-1] + 0.2 * span, "^", mfc="none", mec=INK, markersize=6)


def _labels(axes: Axes, points: list[Row]) -> None:
    """Write the label of each point, moved up until it covers no other."""
    low, high = axes.get_ylim()
    unit, taken = (high - low) / 24, []
    for row in sorted(points, key=lambda row: row.loss.mean):
        x, beyond = math.log10(row.start_seconds), row.loss.mean > high
        y = high - 1.2 * unit if beyond else row.loss.mean
        while any(abs(y - other) < unit and abs(x - place) < 0.55 for place, other in taken):
            y += -unit if beyond else unit
        taken.append((x, y))
        text = f"{row.label} ({row.loss.mean:.3f})" if beyond else row.label
        axes.annotate(text, (row.start_seconds, y), xytext=(6, -3), textcoords="offset points", fontsize=7.5)
