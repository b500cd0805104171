"""Makes the tables of the report from a folder of results: a row for each method, compared with vanilla."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..grids.result_files import Record
from . import search, statistics
from .plan import Group, settled
from .results import Results
from .search import Point
from .statistics import Estimate
from .suite import VANILLA, Suite
from .trial import Cell, trial

# Times of a table are not shown where its slowest run took more than this many times as long as its fastest.
COMPARABLE = 1.5
_TIMING = ("loss", "epoch", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


@dataclasses.dataclass(frozen=True)
class Rate:
    """The runs of a method at one learning rate.

    Attributes:
        rate: the rate.
        loss: evaluation loss over the seeds.
        broken: runs that failed, diverged or were stopped.
    """

    rate: float
    loss: Estimate
    broken: int


@dataclasses.dataclass(frozen=True)
class Row:
    """A method in a cell.

    Losses are evaluation losses. Differences are to vanilla, paired by seed, each method at its own tuned rate.

    Attributes:
        label: name of the row.
        rates: the runs at each rate that was tried.
        tuned: the best rate; None where nothing trains or the search is unfinished.
        edge: whether the best rate is the lowest or highest tried.
        broken: runs at the tuned rate that failed or diverged; with one there is no p, as the others alone would look
            too good.
        loss: at the tuned rate, over the seeds that ended well.
        metric: the task's metric, likewise.
        difference: of the loss.
        metric_difference: of the metric.
        p: of the difference.
        p_holm: p, Holm-adjusted over the rows of the cell.
        rows: the difference over test rows, bootstrapped; None where rows have no loss of their own.
        compared: the difference at rates that were not searched for, by the suite's kinds of comparison; infinite where
            a run failed or diverged.
        suggested: the rate that `suggest_lr` derives from vanilla's; None without a diagnosis.
        steps_share: steps to vanilla's final training loss as a share of all; None if it is never reached.
        seconds_share: the same in wall-clock time, the start's own included, as a share of vanilla's whole training;
            None too where the table's runs did not have the machine to themselves.
        early: mean training loss over the first quarter of the steps.
        forgetting: loss on held-out text, after − before.
        start_seconds: seconds that the start took.
        start_bytes: its peak memory.
        curve: mean training loss by step.
        clock: seconds by step, the start's own included.
        diagnosis: what `diagnose` found.
        advice: what `suggest_lr` said.
        trials: keys of the runs at the tuned rate.
        commands: how to repeat them.
        errors: of the runs that failed or diverged, by key.
        missing: number of runs that are still to come, as far as is known.
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
class CellTable:
    """A cell with its rows: one table of the report.

    Attributes:
        cell: the cell.
        metric: name of the task's metric; None where the loss is the metric.
        rows: one a method, in the suite's order.
        provenance: of the runs at the tuned rates.
        slowest: training time of the slowest of these runs as a multiple of the fastest's, without the rows that set
            options of LoRA, which may cost time by themselves. The others take the same steps: a large ratio means a
            machine that did other work, or several machines.
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
        """Heading of the table."""
        ranks = f", rank {self.cell.rank}" if len(self.cell.suite.ranks) > 1 else ""
        return f"{self.cell.model.label}, {self.cell.task.name}{ranks}"


def cell_tables(suite: Suite, results: Results) -> list[CellTable]:
    """Make the tables of a suite from a folder of results; cells without any run are left out."""
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
    """The runs of a method that its row is made from.

    Attributes:
        group: the method in its cell.
        records: of the runs at the tuned rate, by seed.
        compared: losses of the runs at other rates, by kind of comparison and seed.
    """

    group: Group
    records: dict[int, Record]
    compared: dict[str, dict[int, float]]

    def each(self, read: Callable[[Record], float]) -> dict[int, float]:
        """Return a number of each run that ended well, by seed."""
        return {seed: read(record) for seed, record in self.records.items() if record["status"] == "done"}


def _table(pairs: list[tuple[Group, Group]], results: Results) -> CellTable:
    """Make the table of a cell from its methods, each with the cell's vanilla."""
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
    return CellTable(cell, metric, rows, [r["provenance"] for r in known if "provenance" in r], slowest)


def _slowest(records: list[dict[str, Any]]) -> float:
    """Return the ratio of the slowest training to the fastest; 1 of fewer than two."""
    seconds = [record["cost"]["training"]["seconds"] for record in records if record["status"] == "done"]
    return max(seconds) / min(seconds) if seconds else 1.0


def _runs(group: Group, vanilla: Group, results: Results) -> _Runs:
    """Read the runs that a method's row is made from."""

    def read(point: Point) -> Record | None:
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
    """Make the row of a method; p is adjusted once all rows of the table are there."""
    diagnosis = _diagnosis(runs.group, results)
    return Row(
        label=runs.group.entry.label,
        p_holm=math.nan,
        diagnosis=diagnosis.get("diagnosis"),
        advice=diagnosis.get("advice"),
        trials=[record["trial"]["key"] for record in runs.records.values()],
        commands=[record["trial"]["command"] for record in runs.records.values()],
        errors=_errors(runs.group, results),
        **_rate_fields(runs.group, vanilla),
        **_quality_fields(runs, control, metric),
        **_speed_fields(runs, control),
        **_start_fields(runs),
    )


def _rate_fields(group: Group, vanilla: Group) -> dict[str, Any]:
    """Return the fields of a row about learning rates."""
    options, best, vanilla_best = group.cell.search, group.best(), vanilla.best()
    suggested = None
    if group.ratio is not None and vanilla_best is not None:
        suggested = search.suggestion(search.rate(options, vanilla_best), group.ratio)
    return {
        "rates": _rates(group),
        "tuned": None if best is None else search.rate(options, best),
        "edge": search.at_edge(options, group.center, group.cell.suite.seeds, group.losses, best),
        "suggested": suggested,
        "missing": len({*group.points(vanilla)}),
    }


def _quality_fields(runs: _Runs, control: _Runs, metric: str | None) -> dict[str, Any]:
    """Return the fields of a row about loss and metric, beside the control's."""
    losses, base = (each.each(lambda record: record["metrics"]["loss"]) for each in (runs, control))
    scores, base_scores = (
        each.each(lambda record: record["metrics"].get(metric, math.nan)) if metric else {} for each in (runs, control)
    )
    is_control = runs is control
    differences = [] if is_control else statistics.paired(losses, base)
    broken = len(runs.records) - len(losses)
    all_ended_well = not broken and len(control.records) == len(base)
    return {
        "broken": broken,
        "loss": statistics.estimate(list(losses.values())),
        "metric": statistics.estimate(list(scores.values())),
        "difference": statistics.estimate(differences),
        "metric_difference": statistics.estimate([] if is_control else statistics.paired(scores, base_scores)),
        "p": statistics.p_value(differences) if all_ended_well else math.nan,
        "rows": None if is_control else _rows(runs, control),
        "compared": {kind: _compared(found, base) for kind, found in runs.compared.items() if base},
    }


def _speed_fields(runs: _Runs, control: _Runs) -> dict[str, Any]:
    """Return the fields of a row about the training's course, beside the control's."""
    curve, clock = _curves(runs)
    level = statistics.final_level(statistics.smooth(_curves(control)[0]))
    reached = statistics.steps_to(statistics.smooth(curve), level) if curve else None
    whole = _total_seconds(control)
    return {
        "curve": curve,
        "clock": clock,
        "steps_share": reached / curve[-1][0] if reached is not None else None,
        "seconds_share": statistics.at_step(clock, reached) / whole
        if reached is not None and clock and whole
        else None,
        "early": statistics.early_area(curve),
    }


def _start_fields(runs: _Runs) -> dict[str, Any]:
    """Return the fields of a row about what the start costs and what training forgets."""
    records = runs.records.values()
    starts = [record["cost"]["start"] for record in records if "cost" in record]
    peaks = [start["peak_bytes"] for start in starts if start["peak_bytes"] is not None]
    forgotten = [r["forgetting"]["after"] - r["forgetting"]["before"] for r in records if "forgetting" in r]
    return {
        "forgetting": statistics.estimate(forgotten),
        "start_seconds": float(np.mean([start["seconds"] for start in starts])) if starts else math.nan,
        "start_bytes": max(peaks, default=None),
    }


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


def _total_seconds(runs: _Runs) -> float:
    """Return the mean seconds of start and training; 0 where they are not known."""
    curve, clock = _curves(runs)
    return statistics.at_step(clock, curve[-1][0]) if curve and clock else 0.0


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
