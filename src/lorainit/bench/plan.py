"""Decides which trial of a suite is next, from the results that there are."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

from ..start.match_rate import CHANCE
from . import search
from .results import Results, Summary
from .search import Point
from .suite import VANILLA, MethodEntry, Suite
from .trial import Cell, Trial, cells, trial


@dataclasses.dataclass
class Group:
    """A method in a cell, with the results of its runs.

    Attributes:
        cell: the cell.
        entry: the method.
        losses: evaluation losses by point.
        ratio: the suggested rate relative to vanilla's; None before the diagnosis.
        bound: the rate by the curvature relative to the rate by the update's size; None without a curvature.
    """

    cell: Cell
    entry: MethodEntry
    losses: dict[Point, float] = dataclasses.field(default_factory=dict)
    ratio: float | None = None
    bound: float | None = None

    @property
    def diagnosis(self) -> Point:
        """The point at which the start is diagnosed."""
        return Point(0.0, self.cell.suite.seeds[0], diagnosis=True)

    @property
    def center(self) -> int:
        """Exponent at which the best rate is expected."""
        return self.cell.task.center + self.entry.center

    def best(self) -> int | None:
        """Return the exponent of the tuned rate, None while it is unknown."""
        finals = {k: [self.losses.get(point) for point in points] for k, points in self.finalists().items()}
        return search.tuned(finals)

    def finalists(self) -> dict[int, list[Point]]:
        """Return the runs that decide the tuned rate, by exponent; none before the search is over."""
        cell = self.cell
        found = search.finalists(cell.search, self.center, cell.suite.seeds, self.losses)
        return {k: [Point(search.rate(cell.search, k), seed) for seed in cell.final_seeds] for k in found}

    def over(self) -> bool:
        """Return whether the search for a learning rate is over."""
        return search.tried(self.cell.search, self.center, self.cell.suite.seeds, self.losses)[1]

    def points(self, vanilla: Group) -> Iterator[Point]:
        """Yield the runs that are missing now; their results may call for more.

        Args:
            vanilla: the control of the same cell.
        """
        suite = self.cell.suite
        if suite.diagnosis is not None and self.diagnosis not in self.losses:
            yield self.diagnosis
        if not self.over():
            yield from search.search_points(self.cell.search, self.center, suite.seeds, self.losses)
            return
        deciding = [point for points in self.finalists().values() for point in points]
        wanted = dict.fromkeys([*deciding, *self.comparisons(vanilla, self.cell.comparison_seeds).values()])
        yield from (point for point in wanted if point not in self.losses)

    def finals(self) -> list[Point]:
        """Return the runs at the tuned rate; none while it is unknown."""
        best = self.best()
        return [] if best is None else self.finalists()[best]

    def comparisons(self, vanilla: Group, seeds: Iterable[int]) -> dict[tuple[str, int], Point]:
        """Return the runs at rates that follow from vanilla's tuned rate, by kind and seed; none before it is known."""
        cell, best = self.cell, vanilla.best()
        if best is None or self is vanilla:
            return {}
        rate, found = search.rate(cell.search, best), {}
        for kind in cell.suite.compare:
            for seed in seeds:
                if kind == "vanilla":
                    found[kind, seed] = Point(rate, seed)
                elif kind == "matched" and not self.entry.lora:  # a row of LoRA's own options is no other start
                    found[kind, seed] = Point(rate, seed, matched=True)
                elif kind == "bounded" and not self.entry.lora and self.bound is not None:
                    decides = self.bound < 1 - CHANCE
                    found[kind, seed] = Point(rate, seed, matched="curvature" if decides else True)
                elif kind == "suggested" and self.ratio is not None:
                    found[kind, seed] = Point(search.suggestion(rate, self.ratio), seed)
        return found

    def note(self, point: Point, summary: Summary) -> None:
        """Take in a result."""
        self.losses[point] = summary.loss
        if point.diagnosis and summary.ratio is not None:
            self.ratio, self.bound = summary.ratio, summary.bound


class Plan:
    """Gives out the missing trials of a suite, one by one.

    The missing points of a group are a round; the next round is made when all of it is done. While one group waits for
    results, the trials of the others keep the machines busy.

    Args:
        suite: the suite.
        results: the results that there are; a failed trial counts as done.
        retry_failed: run failed trials again.
    """

    def __init__(self, suite: Suite, results: Results, *, retry_failed: bool = False) -> None:
        self.results, self._retry = results, retry_failed
        self._repeated: set[str] = set()
        self.groups: list[Group] = []
        self._vanilla: dict[str, Group] = {}
        for cell in cells(suite):
            groups = [Group(cell, entry) for entry in suite.entries()]
            self._vanilla[cell.name] = next(group for group in groups if group.entry.label == VANILLA)
            self.groups += groups
        self._rounds: list[Iterator[Point]] = [iter(()) for _ in self.groups]  # what is left of each group's round
        self._running = [0] * len(self.groups)
        self._turn = 0
        self._owner: dict[str, tuple[int, Point]] = {}

    def next(self) -> Trial | None:
        """Return a trial that is missing, None if there is none before another one has ended."""
        progress = True
        while progress:
            progress = False
            for offset in range(len(self.groups)):
                index = (self._turn + offset) % len(self.groups)
                found = self._next_of(index)
                if found is not None:
                    self._turn = index
                    return found
                if self._running[index] == 0:
                    progress = self._new_round(index) or progress
        return None

    def ended(self, key: str, summary: Summary) -> None:
        """Take in a trial's result."""
        index, point = self._owner.pop(key)
        self._running[index] -= 1
        self.groups[index].note(point, summary)

    def _next_of(self, index: int) -> Trial | None:
        """Return the next trial of a group's round that has no result, and take in the results on the way."""
        group = self.groups[index]
        for point in self._rounds[index]:
            chosen = trial(group.cell, group.entry, point)
            summary = self._known(chosen.key)
            if summary is not None:
                group.note(point, summary)
                continue
            self._owner[chosen.key] = (index, point)
            self._running[index] += 1
            return chosen
        return None

    def _new_round(self, index: int) -> bool:
        """Make a group's next round; return whether there is anything in it."""
        group = self.groups[index]
        points = group.points(self._vanilla[group.cell.name])
        first = next(points, None)
        if first is None:
            return False
        self._rounds[index] = itertools.chain([first], points)
        return True

    def _known(self, key: str) -> Summary | None:
        """Return the result of a trial; None for one that is to run, for the first time or again."""
        summary = self.results.summaries.get(key)
        if summary is not None and summary.status == "failed" and self._retry and key not in self._repeated:
            self._repeated.add(key)
            return None
        return summary


def settled(suite: Suite, results: Results) -> list[tuple[Group, Group]]:
    """Return every group with its results, and the vanilla group of its cell; runs nothing."""
    found = []
    for cell in cells(suite):
        groups = [Group(cell, entry) for entry in suite.entries()]
        vanilla = next(group for group in groups if group.entry.label == VANILLA)
        for group in (vanilla, *(group for group in groups if group is not vanilla)):
            while _take_in(group, vanilla, results):
                pass
        found += [(group, vanilla) for group in groups]
    return found


def _take_in(group: Group, vanilla: Group, results: Results) -> bool:
    """Take in the results of the points that a group wants now; return whether there were any."""
    known = {p: results.summaries.get(trial(group.cell, group.entry, p).key) for p in group.points(vanilla)}
    found = {point: summary for point, summary in known.items() if summary is not None}
    for point, summary in found.items():
        group.note(point, summary)
    return bool(found)
