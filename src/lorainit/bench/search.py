"""Searches the learning rates unit·2^k: which runs a method still needs, given the losses of those that are done."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from .suite import Search


class Point(NamedTuple):
    """A run of a method in a cell.

    Attributes:
        rate: the learning rate.
        seed: the seed.
        matched: the recipe's ``match_lr``.
        diagnosis: whether the start is only diagnosed, not trained.
        judged: whether ASHA may stop it early.
    """

    rate: float
    seed: int
    matched: bool | Literal["curvature"] = False
    diagnosis: bool = False
    judged: bool = False


Losses = Mapping[Point, float]
"""Evaluation loss by point; infinite where the run failed, diverged or was stopped early."""


def rate(search: Search, exponent: int) -> float:
    """Return unit·2^k."""
    return search.unit * 2.0**exponent


def tried(search: Search, center: int, seeds: Sequence[int], losses: Losses) -> tuple[list[int], bool]:
    """Return the exponents that the search has asked for so far, and whether it is over.

    Args:
        search: the options.
        center: exponent at which the best is expected.
        seeds: the suite's; the first one searches, unless the schedule is the full grid.
        losses: of the runs that are done.
    """
    wanted, step = _first_exponents(search, center)
    while True:
        values = {k: mean_loss(search, k, _searching(search, seeds), losses) for k in wanted}
        known = {k: value for k, value in values.items() if value is not None}
        if len(known) < len(wanted):
            return wanted, False
        best = min(known, key=lambda k: known[k])
        if not math.isfinite(known[best]):
            return wanted, True  # nothing trains here; more rates would only fail too
        new = _more_exponents(search, center, wanted, best, step)
        if not new:
            return wanted, True
        wanted = sorted({*wanted, *new})


def _first_exponents(search: Search, center: int) -> tuple[list[int], int]:
    """Return the exponents that a search begins with, and the step by which it widens."""
    if search.schedule == "bracket":
        return [center - search.stride, center, center + search.stride], search.stride
    wanted = sorted(center + k for k in search.exponents)
    return wanted, min((b - a for a, b in zip(wanted, wanted[1:], strict=False)), default=1)


def _more_exponents(search: Search, center: int, wanted: list[int], best: int, step: int) -> list[int]:
    """Return the exponents to try next: beyond the edge if the best lies there, else between it and its neighbours."""
    if best == wanted[0] and center - best < search.widest:
        return [best - step]
    if best == wanted[-1] and best - center < search.widest:
        return [best + step]
    if search.schedule != "bracket":
        return []
    place = wanted.index(best)
    neighbours = [*wanted[max(place - 1, 0) : place], *wanted[place + 1 : place + 2]]
    return [(best + other) // 2 for other in neighbours if abs(other - best) > 1]


def _searching(search: Search, seeds: Sequence[int]) -> Sequence[int]:
    """Return the seeds by whose mean loss the search compares rates."""
    return seeds if search.schedule == "grid" else seeds[:1]


def mean_loss(search: Search, exponent: int, seeds: Iterable[int], losses: Losses) -> float | None:
    """Return the mean over the seeds; None while one is missing."""
    found = [losses.get(_searched(search, exponent, seed)) for seed in seeds]
    if any(loss is None for loss in found):
        return None
    return statistics.fmean(loss for loss in found if loss is not None)


def finalists(search: Search, center: int, seeds: Sequence[int], losses: Losses) -> list[int]:
    """Return the exponents whose rates run with every final seed, the best by the search's own seeds first.

    There are none before the search is over, or if nothing trains.
    """
    wanted, over = tried(search, center, seeds, losses)
    if not over:
        return []
    values = {k: mean_loss(search, k, _searching(search, seeds), losses) for k in wanted}
    finite = {k: value for k, value in values.items() if value is not None and math.isfinite(value)}
    return sorted(finite, key=lambda k: finite[k])[: search.finalists]


def tuned(finals: Mapping[int, Sequence[float | None]]) -> int | None:
    """Return the exponent of the best rate: the finalist of the lowest mean over the final seeds.

    None before all of them have run. A rate at which a run failed wins only where runs failed at every finalist.

    Args:
        finals: losses over the final seeds by exponent, the best by the search's own seeds first; None where missing.
    """
    means = {}
    for exponent, found in finals.items():
        known = [loss for loss in found if loss is not None]
        if len(known) < len(found):
            return None
        means[exponent] = statistics.fmean(known)
    return min(means, key=lambda k: means[k], default=None)


def at_edge(search: Search, center: int, seeds: Sequence[int], losses: Losses, best: int | None) -> bool:
    """Return whether the best rate is the lowest or the highest that was tried; a better one may lie beyond."""
    wanted, _ = tried(search, center, seeds, losses)
    return best is not None and best in (wanted[0], wanted[-1])


def search_points(search: Search, center: int, seeds: Sequence[int], losses: Losses) -> Iterator[Point]:
    """Yield the points that the search wants now and that are missing."""
    wanted, over = tried(search, center, seeds, losses)
    if over:
        return
    for seed in _searching(search, seeds):
        for exponent in wanted:
            point = _searched(search, exponent, seed)
            if point not in losses:
                yield point


def _searched(search: Search, exponent: int, seed: int) -> Point:
    """Return the run by which a rate is judged."""
    return Point(rate(search, exponent), seed, judged=search.schedule == "asha")


def suggestion(vanilla_rate: float, ratio: float) -> float:
    """Return the suggested rate, rounded to three digits so that a trial has the same name on every machine."""
    return float(f"{vanilla_rate * ratio:.3g}")
