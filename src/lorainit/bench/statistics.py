"""Computes the numbers of the report: intervals, paired differences, adjusted p-values, and figures of loss curves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

Curve = Sequence[Sequence[float]]
"""[[step, value], ...]"""
_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        mean: the mean; NaN of nothing.
        low: lower end; NaN where one value gives no interval.
        high: upper end.
        count: number of values.
    """

    mean: float
    low: float
    high: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean over seeds with Student's t interval.

    A bootstrap of three values covers far less than 95 % (three values have only ten different resamples). The t
    interval assumes normal deviations, which is the smaller error. Rows of a test set are bootstrapped.
    """
    from scipy.stats import t

    count = len(values)
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = float(np.mean(values))
    if count == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    half = float(t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Estimate(mean, mean - half, mean + half, count)


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """Return first − second for the seeds that both have: runs of a seed share head, data order and rows."""
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def p_value(differences: Sequence[float]) -> float:
    """Return the two-sided p of the paired t-test that the mean difference is zero; NaN for fewer than two."""
    from scipy.stats import t

    count = len(differences)
    if count < 2:
        return math.nan
    spread = float(np.std(differences, ddof=1)) / math.sqrt(count)
    mean = float(np.mean(differences))
    if spread == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * t.sf(abs(mean) / spread, count - 1))


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """Return Holm's adjusted p-values (1979): if those below α are called real, any is wrong with probability ≤ α.

    Values that are NaN stay NaN and do not count.
    """
    known = sorted((name for name, p in values.items() if not math.isnan(p)), key=lambda name: values[name])
    adjusted, highest = dict.fromkeys(values, math.nan), 0.0
    for place, name in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - place) * values[name]))
        adjusted[name] = highest
    return adjusted


def rows_interval(differences: Sequence[float], seed: int = 0) -> Estimate:
    """Return the mean difference over test rows with its bootstrap interval: how much it depends on these rows."""
    from scipy.stats import bootstrap

    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or np.ptp(values) == 0:
        return Estimate(float(values.mean()) if len(values) else math.nan, math.nan, math.nan, len(values))
    found = bootstrap(
        (values,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(seed), batch=200
    ).confidence_interval
    return Estimate(float(values.mean()), float(found.low), float(found.high), len(values))


def mean_curve(curves: Sequence[Curve]) -> list[list[float]]:
    """Return the mean of curves at the steps that all of them have."""
    if not curves:
        return []
    by_step = [{step: value for step, value in reversed(curve)} for curve in curves]  # the first entry of a step counts
    steps = sorted(set.intersection(*(set(each) for each in by_step)))
    return [[step, float(np.mean([each[step] for each in by_step]))] for step in steps]


def smooth(curve: Curve, width: int = 5) -> list[list[float]]:
    """Return the centred moving average, narrower at the ends: the loss of one batch depends mostly on its rows."""
    values = [value for _, value in curve]
    half = width // 2
    smoothed = []
    for place, (step, _) in enumerate(curve):
        reach = min(half, place, len(values) - 1 - place)
        smoothed.append([step, float(np.mean(values[place - reach : place + reach + 1]))])
    return smoothed


def final_level(curve: Curve, share: float = 0.2) -> float:
    """Return the mean over the last part of a curve; NaN of nothing."""
    if not curve:
        return math.nan
    count = max(1, round(share * len(curve)))
    return float(np.mean([value for _, value in curve[-count:]]))


def steps_to(curve: Curve, level: float) -> float | None:
    """Return the step at which a curve first falls to a level, interpolated linearly; None if it never does."""
    before: Sequence[float] | None = None
    for point in curve:
        if point[1] <= level:
            if before is None or before[1] == point[1]:
                return float(point[0])
            return float(before[0] + (point[0] - before[0]) * (before[1] - level) / (before[1] - point[1]))
        before = point
    return None


def at_step(curve: Curve, step: float) -> float:
    """Return a curve's value at a step, interpolated linearly; the curve, of a time, begins at (0, 0)."""
    steps, values = zip(*([0.0, 0.0], *curve), strict=True)
    return float(np.interp(step, steps, values))


def early_area(curve: Curve, share: float = 0.25) -> float:
    """Return the area under the first part of a loss curve, per step, so a mean loss; NaN for fewer than two points.

    Args:
        curve: the curve.
        share: of the steps.
    """
    if len(curve) < 2:
        return math.nan
    steps, values = (np.asarray(each, dtype=float) for each in zip(*curve, strict=True))
    end = steps[0] + share * (steps[-1] - steps[0])
    inside = steps < end
    steps, values = np.append(steps[inside], end), np.append(values[inside], np.interp(end, steps, values))
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))
