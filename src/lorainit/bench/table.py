"""From the folder of results to the rows of the report."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from . import search, statistics
from .plan import Group, settled
from .results import Results
from .search import Point
from .statistics import Estimate
from .suite import VANILLA, Suite
from .trial import Cell, trial

# the slowest run's time beside the fastest's, above which times of one table say nothing of its starts
COMPARABLE = 1.5
_TIMING = ("loss", "epoch", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


@dataclasses.dataclass(frozen=True)
class Rate:
    """What is known at one rate.

    Attributes:
        rate: the rate.
        loss: over the seeds.
        broken: runs that failed, diverged or were stopped.
    """

    rate: float
    loss: Estimate
    broken: int


@dataclasses.dataclass(frozen=True)
class Row:
    """A method in a cell. Losses are evaluation losses; differences are to vanilla, each at its own tuned rate.

    Attributes:
        label: the method's row.
        rates: the search, by rate.
        tuned: the best rate; None where nothing trains or the search is unfinished.
        edge: the best rate is the lowest or highest tried.
        broken: runs at the tuned rate that failed or diverged; with one there is no p, as the others would flatter it.
        loss: at the tuned rate, over the seeds that ended well.
        metric: the task's metric likewise.
        difference: of the loss, paired over seeds.
        metric_difference: of the metric.
        p: of the difference.
        p_holm: the same, for all rows of the cell together.
        rows: the difference over test rows, bootstrapped; None where rows have no loss of their own.
        compared: the difference, likewise, by the suite's kinds of comparison: at a rate that was not searched for;
            infinite where a run failed or diverged.
        suggested: that rate; None without a diagnosis.
        steps_share: steps to vanilla's final training loss as a share of all; None if it is never reached.
        seconds_share: the same in wall-clock time, the start's own included, as a share of vanilla's whole training;
            None too where the table's runs did not have the machine to themselves.
        early: mean training loss over the first quarter.
        forgetting: loss on held-out text, after − before.
        start_seconds: what the start took.
        start_bytes: its peak memory.
        curve: mean training loss by step.
        clock: seconds by step, the start's own included.
        diagnosis: what `diagnose` found.
        advice: what `suggest_lr` said.
        trials: keys of the runs at the tuned rate.
        commands: how to repeat them.
        errors: of the runs that failed or diverged, by key.
        missing: runs that are still to come, as far as is known.
    """

    label: str
    rates: list[Rate]
    tuned: float | None
    edge: bool
    broken: int
    loss: Estimate
    metric: Estimate
    difference: Estimate
    metric_difference: Estimate
    p: float
    p_holm: float
    rows: Estimate | None
    compared: dict[str, Estimate]
    suggested: float | None
    steps_share: float | None
    seconds_share: float | None
    early: float
    forgetting: Estimate
    start_seconds: float
    start_bytes: int | None
    curve: list[list[float]]
    clock: list[list[float]]
    diagnosis: dict[str, Any] | None
    advice: dict[str, Any] | None
    trials: list[str]
    commands: list[str]
    errors: dict[str, str]
    missing: int


@dataclasses.dataclass(frozen=True)
class Table:
    """A cell with its rows.

    Attributes:
        cell: the cell.
        metric: name of the task's metric; None where the loss is the metric.
        rows: one a method, in the suite's order.
        provenance: of its runs at the tuned rates.
        slowest: seconds of training of the slowest of these runs, as a multiple of the fastest's; without those that
            set options of LoRA, which may cost by themselves. The others take the same steps, so more than a little
            means a machine that did other work, or several machines.
    """

    cell: Cell
    metric: str | None
    rows: list[Row]
    provenance: list[dict[str, Any]]
    slowest: float

    @property
    def control(self) -> Row:
        """Vanilla's row."""
        return next(row for row in self.rows if row.label == VANILLA)

    @property
    def title(self) -> str:
        """What it is called."""
        ranks = f", rank {self.cell.rank}" if len(self.cell.suite.ranks) > 1 else ""
        return f"{self.cell.model.label}, {self.cell.task.name}{ranks}"


def tables(suite: Suite, results: Results) -> list[Table]:
    """Return what a folder of results says about a suite; cells without any run are left out."""
    found: dict[str, list[tuple[Group, Group]]] = {}
    for group, vanilla in settled(suite, results):
        found.setdefault(group.cell.name, []).append((group, vanilla))
    made = []
    for pairs in found.values():
        if any(group.losses for group, _ in pairs):
            made.append(_table(pairs, results))
    return made


@dataclasses.dataclass
class _Runs:
    """The records of a method at its tuned rate, by seed, and those that it is compared by."""

    group: Group
    records: dict[int, dict[str, Any]]
    compared: dict[str, dict[int, float]]

    def each(self, read: Any) -> dict[int, float]:
        """Return a number of each run that ended well, by seed."""
        return {seed: read(record) for seed, record in self.records.items() if record["status"] == "done"}


def _table(pairs: list[tuple[Group, Group]], results: Results) -> Table:
    cell = pairs[0][0].cell
    runs = {group.entry.label: _runs(group, vanilla, results) for group, vanilla in pairs}
    metric = cell.task.metric or _first_metric(runs)
    control = runs[VANILLA]
    known = [record for each in runs.values() for record in each.records.values()]
    slowest = _slowest(
        [record for each in runs.values() if not each.group.entry.lora for record in each.records.values()]
    )
    rows = [
        _row(each, control, metric, vanilla, results) for each, (_, vanilla) in zip(runs.values(), pairs, strict=True)
    ]
    if slowest > COMPARABLE:
        rows = [dataclasses.replace(row, seconds_share=None) for row in rows]
    adjusted = statistics.holm({row.label: row.p for row in rows})
    rows = [dataclasses.replace(row, p_holm=adjusted[row.label]) for row in rows]
    return Table(cell, metric, rows, [r["provenance"] for r in known if "provenance" in r], slowest)


def _slowest(records: list[dict[str, Any]]) -> float:
    """Return the ratio of the slowest training to the fastest; 1 of fewer than two."""
    seconds = [record["cost"]["training"]["seconds"] for record in records if record["status"] == "done"]
    return max(seconds) / min(seconds) if seconds else 1.0


def _runs(group: Group, vanilla: Group, results: Results) -> _Runs:
    def read(point: Point) -> dict[str, Any] | None:
        key = trial(group.cell, group.entry, point).key
        return results.read(key) if key in results.summaries else None

    records = {point.seed: read(point) for point in group.finals()}
    compared: dict[str, dict[int, float]] = {}
    # not only the seeds that the suite asks for: a start's own search may have run others at the same rate
    for (kind, seed), point in group.comparisons(vanilla, group.cell.final_seeds).items():
        summary = results.summaries.get(trial(group.cell, group.entry, point).key)
        if summary is not None:
            compared.setdefault(kind, {})[seed] = summary.loss
    return _Runs(group, {seed: record for seed, record in records.items() if record is not None}, compared)


def _first_metric(runs: dict[str, _Runs]) -> str | None:
    for each in runs.values():
        for record in each.records.values():
            names = [name for name in record["metrics"] if name not in _TIMING]
            if names:
                return names[0]
    return None


def _row(runs: _Runs, control: _Runs, metric: str | None, vanilla: Group, results: Results) -> Row:
    group = runs.group
    cell = group.cell
    losses, base = (each.each(lambda record: record["metrics"]["loss"]) for each in (runs, control))
    scores, base_scores = (
        each.each(lambda record: record["metrics"].get(metric, math.nan)) if metric else {} for each in (runs, control)
    )
    own = runs is control
    differences = [] if own else statistics.paired(losses, base)
    broken = len(runs.records) - len(losses)
    certain = not broken and len(control.records) == len(base)
    curve, clock = _curves(runs)
    level = statistics.final_level(statistics.smooth(_curves(control)[0]))
    reached = statistics.steps_to(statistics.smooth(curve), level) if curve else None
    whole, _ = _last(control)
    best = group.best()
    rate = None if best is None else search.rate(cell.search, best)
    vanilla_best = vanilla.best()
    suggested = None
    if group.ratio is not None and vanilla_best is not None:
        suggested = search.suggestion(search.rate(cell.search, vanilla_best), group.ratio)
    diagnosis = _diagnosis(group, results)
    starts = [record["cost"]["start"] for record in runs.records.values() if "cost" in record]
    peaks = [start["peak_bytes"] for start in starts if start["peak_bytes"] is not None]
    wanted = [*dict.fromkeys(group.points(vanilla))]
    return Row(
        label=group.entry.label,
        rates=_rates(group),
        tuned=rate,
        edge=search.at_edge(cell.search, group.center, cell.suite.seeds, group.losses, best),
        broken=broken,
        loss=statistics.estimate(list(losses.values())),
        metric=statistics.estimate(list(scores.values())),
        difference=statistics.estimate(differences),
        metric_difference=statistics.estimate([] if own else statistics.paired(scores, base_scores)),
        p=statistics.p_value(differences) if certain else math.nan,
        p_holm=math.nan,
        rows=None if own else _rows(runs, control),
        compared={kind: _compared(found, base) for kind, found in runs.compared.items() if base},
        suggested=suggested,
        steps_share=reached / curve[-1][0] if reached is not None else None,
        seconds_share=statistics.at_step(clock, reached) / whole if reached is not None and clock and whole else None,
        early=statistics.early_area(curve),
        forgetting=statistics.estimate(
            [r["forgetting"]["after"] - r["forgetting"]["before"] for r in runs.records.values() if "forgetting" in r]
        ),
        start_seconds=float(np.mean([start["seconds"] for start in starts])) if starts else math.nan,
        start_bytes=max(peaks, default=None),
        curve=curve,
        clock=clock,
        diagnosis=diagnosis.get("diagnosis"),
        advice=diagnosis.get("advice"),
        trials=[record["trial"]["key"] for record in runs.records.values()],
        commands=[record["trial"]["command"] for record in runs.records.values()],
        errors=_errors(group, results),
        missing=len(wanted),
    )


def _compared(losses: dict[int, float], base: dict[int, float]) -> Estimate:
    """Return the mean difference; infinite, without an interval, where a run failed or diverged."""
    differences = statistics.paired(losses, base)
    if not all(map(math.isfinite, differences)):
        return Estimate(math.inf, math.nan, math.nan, len(differences))
    return statistics.estimate(differences)


def _curves(runs: _Runs) -> tuple[list[list[float]], list[list[float]]]:
    """Return the mean training loss and the mean seconds, the start's own included, by step."""
    done = [record for record in runs.records.values() if record["status"] == "done"]
    curve = statistics.mean_curve([record["curves"].get("loss", []) for record in done])
    seconds = statistics.mean_curve([record["curves"].get("seconds", []) for record in done])
    start = float(np.mean([record["cost"]["start"]["seconds"] for record in done])) if done else 0.0
    return curve, [[step, start + value] for step, value in seconds]


def _last(runs: _Runs) -> tuple[float, float]:
    """Return (seconds, step) at the end of the training curve."""
    curve, clock = _curves(runs)
    if not (curve and clock):
        return 0.0, 0.0
    return statistics.at_step(clock, curve[-1][0]), curve[-1][0]


def _rates(group: Group) -> list[Rate]:
    by_rate: dict[float, list[float]] = {}
    for point, loss in group.losses.items():
        if not (point.diagnosis or point.matched):
            by_rate.setdefault(point.rate, []).append(loss)
    return [
        Rate(rate, statistics.estimate([v for v in found if math.isfinite(v)]), sum(map(math.isinf, found)))
        for rate, found in sorted(by_rate.items())
    ]


def _rows(runs: _Runs, control: _Runs) -> Estimate | None:
    """Return the difference over the test rows, each the mean over the seeds that both have."""
    pairs = []
    for seed in runs.records.keys() & control.records.keys():
        mine, other = (each.records[seed].get("items") or [] for each in (runs, control))
        if mine and len(mine) == len(other):
            pairs.append(np.subtract(mine, other))
    return statistics.rows_interval(np.mean(pairs, axis=0).tolist()) if pairs else None


def _diagnosis(group: Group, results: Results) -> dict[str, Any]:
    key = trial(group.cell, group.entry, group.diagnosis).key
    return results.read(key) if key in results.summaries else {}


def _errors(group: Group, results: Results) -> dict[str, str]:
    found = {}
    for point in group.losses:
        key = trial(group.cell, group.entry, point).key
        if results.summaries[key].status in ("failed", "diverged"):
            found[key] = results.read(key)["error"]
    return found
