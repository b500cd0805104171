"""A table as text: what was published beside what was measured here."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from ..errors import LoraInitError
from ..tasks.vtab import means
from .table import Run, Table
from .work import Place, read_result

Scores = dict[int, float]


class Measured:
    """The results of a table that there are.

    Args:
        table: the table.
        place: where they lie.
    """

    def __init__(self, table: Table, place: Place) -> None:
        self.table = table
        found = {run: read_result(place.result(table, run)) for run in table.runs()}
        self.results: dict[Run, dict[str, Any]] = {run: result for run, result in found.items() if result}

    def scores(self, row: str, column: str, rate: float | None) -> Scores:
        """Return {seed: score} of a cell at a rate.

        Raises:
            LoraInitError: the runs have no such metric.
        """
        found = {}
        for run, result in self.results.items():
            if (run.row, run.column, run.rate) == (row, column, rate):
                if self.table.score not in result["metrics"]:
                    raise LoraInitError(
                        f"table '{self.table.name}' shows '{self.table.score}', but row '{row}' has only "
                        f"{list(result['metrics'])}"
                    )
                found[run.seed] = self.table.times * result["metrics"][self.table.score]
        return found

    def rates(self, row: str, column: str) -> list[float | None]:
        """Return the rates at which a cell has been measured."""
        found = {run.rate for run in self.results if (run.row, run.column) == (row, column)}
        return sorted(found, key=lambda rate: rate or 0.0)

    def best(self, row: str, column: str) -> float | None:
        """Return the rate of a cell's best mean score, or None where the row's own is all there is."""
        sign = -1 if self.table.score == "loss" else 1
        means = {rate: statistics.mean(self.scores(row, column, rate).values()) for rate in self.rates(row, column)}
        return max(means, key=lambda rate: sign * means[rate], default=None)

    def hours(self) -> float | None:
        """Return what the missing runs will take, going by those that are done; None before the first."""
        costs = [result["cost"] for result in self.results.values()]
        if not costs:
            return None
        mean = statistics.mean(cost["start"]["seconds"] + cost["training"]["seconds"] for cost in costs)
        return mean * (len(self.table.runs()) - len(costs)) / 3600


def page(table: Table, place: Place) -> str:
    """Return a table as Markdown: each row at its own best rate, all at the reference's, and the published figures."""
    measured = Measured(table, place)
    lines = [
        f"## {table.title}",
        "",
        f"Published (in italics): {table.source}. Here: `{table.name}`, {len(measured.results)} of {len(table.runs())}"
        f" runs, seeds {list(table.seeds)}, mean ± standard deviation.",
        "",
    ]
    if len(table.rates) > 1:
        rates = ", ".join(f"{rate:g}" for rate in table.rates)
        lines += [
            f"Each row at its best of the rates {rates}, which stands in brackets. It is chosen on the scores that are "
            "shown: the best of several draws, for every row alike.",
            "",
            *_grid(table, measured, measured.best),
            f"All rows at the rate that is best for {table.reference}:",
            "",
            *_grid(table, measured, lambda row, column: measured.best(table.reference, column), published=False),
        ]
    else:
        rate = table.rates[0] if table.rates else None
        lines += _grid(table, measured, lambda row, column: rate)
    return "\n".join([*lines, *(f"* {note}" for note in table.notes), ""])


def _grid(
    table: Table, measured: Measured, rate_of: Callable[[str, str], float | None], published: bool = True
) -> list[str]:
    """Return the lines of one Markdown table; what is published stands below what is measured."""
    tasks = {column: changes.get("task", "") for column, changes in table.columns.items()}
    groups = list(_means(tasks, dict.fromkeys(tasks, 0.0)))
    lines = ["| row | " + " | ".join([*tasks, *groups]) + " |", "|---" * (1 + len(tasks) + len(groups)) + "|"]
    for row in dict.fromkeys([*table.rows, *table.published]):
        cells: dict[str, list[str]] = {name: [] for name in (*tasks, *groups)}
        ours = {}
        for column in tasks:
            rate = rate_of(row, column)
            values = list(measured.scores(row, column, rate).values())
            if values:
                ours[column] = statistics.mean(values)
                cells[column].append(_spread(values) + (f" [{rate:g}]" if rate is not None else ""))
        printed = table.published.get(row, {}) if published else {}
        for column, value in printed.items():
            if column in cells:
                cells[column].append(f"*{value}*")
        for name, mean in _means(tasks, ours).items():
            cells[name].append(f"{mean:.2f}")
        numbers = {column: float(value) for column, value in printed.items() if isinstance(value, int | float)}
        for name, mean in _means(tasks, numbers).items():
            cells[name].append(f"*{mean:.2f}*")
        lines.append(f"| {row} | " + " | ".join("<br>".join(texts) for texts in cells.values()) + " |")
    return [*lines, ""]


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _means(tasks: dict[str, str], scores: dict[str, float]) -> dict[str, float]:
    """Return VTAB's group means of the columns that are its tasks, as far as groups are complete."""
    return means({tasks[column]: score for column, score in scores.items() if column in tasks})
