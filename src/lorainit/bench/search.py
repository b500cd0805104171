"""Which runs a method still needs, given the losses that there are: pure bookkeeping on the rates unit·2^k."""

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
        matched: ``match_lr``.
        diagnosis: no training: the diagnosis of the start.
        judged: ASHA may stop it early.
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
    """Return the exponents that the search wants so far, and whether it is over.

    Args:
        search: the options.
        center: exponent at which the best is expected.
        seeds: the suite's; the first one searches, unless the schedule is the full grid.
        losses: what is known.
    """
    if search.schedule == "bracket":
        wanted = [center - search.stride, center, center + search.stride]
        step = search.stride
    else:
        wanted = sorted(center + k for k in search.exponents)
        step = min((b - a for a, b in zip(wanted, wanted[1:], strict=False)), default=1)
    searching = seeds if search.schedule == "grid" else seeds[:1]
    while True:
        values = {k: mean_loss(search, k, searching, losses) for k in wanted}
        known = {k: value for k, value in values.items() if value is not None}
        if len(known) < len(wanted):
            return wanted, False
        best = min(known, key=lambda k: known[k])
        if not math.isfinite(known[best]):
            return wanted, True  # nothing trains here; more rates would only fail too
        new: list[int] = []
        if best == wanted[0] and center - best < search.widest:
            new = [best - step]
        elif best == wanted[-1] and best - center < search.widest:
            new = [best + step]
        elif search.schedule == "bracket":
            # halve the gaps around the best until its neighbours are a factor 2 away
            places = [wanted.index(best)]
            below = [wanted[i - 1] for i in places if i > 0]
            above = [wanted[i + 1] for i in places if i + 1 < len(wanted)]
            new = [(best + other) // 2 for other in (*below, *above) if abs(other - best) > 1]
        if not new:
            return wanted, True
        wanted = sorted({*wanted, *new})


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
    searching = seeds if search.schedule == "grid" else seeds[:1]
    values = {k: mean_loss(search, k, searching, losses) for k in wanted}
    finite = {k: value for k, value in values.items() if value is not None and math.isfinite(value)}
    return sorted(finite, key=lambda k: finite[k])[: search.finalists]


def tuned(finals: Mapping[int, Sequence[float | None]]) -> int | None:
    """Return the exponent of the best rate: the finalist of the lowest mean over the final seeds.

    None before all of them have run. A rate at which a run failed wins only where one failed at each of them.

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
    """Return whether the best rate is the lowest or the highest tried, so that the true best may lie beyond."""
    wanted, _ = tried(search, center, seeds, losses)
    return best is not None and best in (wanted[0], wanted[-1])


def search_points(search: Search, center: int, seeds: Sequence[int], losses: Losses) -> Iterator[Point]:
    """Yield the points that the search wants now and that are missing."""
    wanted, over = tried(search, center, seeds, losses)
    if over:
        return
    for seed in seeds if search.schedule == "grid" else seeds[:1]:
        for exponent in wanted:
            point = _searched(search, exponent, seed)
            if point not in losses:
                yield point


def _searched(search: Search, exponent: int, seed: int) -> Point:
    """Return the run by which a rate is judged."""
    return Point(rate(search, exponent), seed, judged=search.schedule == "asha")


def suggestion(vanilla_rate: float, ratio: float) -> float:
    """Return the suggested rate to three digits: a name that is the same everywhere."""
    return float(f"{vanilla_rate * ratio:.3g}")
