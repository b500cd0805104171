"""A table as text: what was published beside what was measured here."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from ..tasks.vtab import means
from .measured import Measured
from .place import Place
from .table import Table


def page(table: Table, place: Place) -> str:
    """Return a table as Markdown: each row at its own best rate, all at the reference's, and the published figures."""
    measured = Measured(table, place)
    lines = [
        f"## {table.title}",
        "",
        f"Published (in italics): {table.source}. Here: `{table.name}`, {len(measured.results)} of "
        f"{len(measured.wanted())} runs, seeds {list(table.seeds)}, mean ± standard deviation.",
        "",
    ]
    if len(table.rates) > 1:
        rates = ", ".join(f"{rate:g}" for rate in table.rates)
        lines += [
            f"Each row at its best of the rates {rates} by seed {', '.join(map(str, table.searching_seeds()))}, which "
            "stands in brackets. It is chosen on the scores that are shown: the best of several draws, for every row "
            "alike.",
            "",
            *_grid(table, measured, measured.best),
            f"All rows at the rate that is best for {table.reference}:",
            "",
            *_grid(table, measured, lambda row, column: measured.best(table.reference, column), published=False),
        ]
    else:
        rate = table.rates[0] if table.rates else None
        lines += _grid(table, measured, lambda row, column: rate)
    notes, unrecorded = [*table.notes], measured.unrecorded()
    if unrecorded:
        notes.append(
            f"{unrecorded} of the results carry no record of all that they were made from (they diverged or have "
            "teachers, and are older than such records): they are taken as they are."
        )
    return "\n".join([*lines, *(f"* {note}" for note in notes), ""])


def _grid(
    table: Table, measured: Measured, rate_of: Callable[[str, str], float | None], published: bool = True
) -> list[str]:
    """Return the lines of one Markdown table; what is published stands below what is measured."""
    tasks = {column: changes.get("task", "") for column, changes in table.columns.items()}
    groups = list(_means(tasks, dict.fromkeys(tasks, 0.0)))
    titles = [_title(table, column) for column in tasks]
    lines = ["| row | " + " | ".join([*titles, *groups]) + " |", "|---" * (1 + len(tasks) + len(groups)) + "|"]
    for row in dict.fromkeys([*table.rows, *table.published]):
        cells: dict[str, list[str]] = {name: [] for name in (*tasks, *groups)}
        ours = {}
        for column in tasks:
            rate = rate_of(row, column)
            values = list(measured.scores(row, column, rate).values())
            lost = _lost(table, measured, row, column, rate)
            if values or lost:
                cells[column].append(_shown(values, lost, rate))
            if values and not lost:  # a mean of those that are left would flatter the group's
                ours[column] = statistics.mean(values)
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


def _title(table: Table, column: str) -> str:
    """Return a column's name, with its metric where that is not the table's."""
    score = table.score_of(column)
    return column if score == table.score else f"{column} ({score})"


def _lost(table: Table, measured: Measured, row: str, column: str, rate: float | None) -> int:
    """Return how many runs of a cell diverged at a rate; where none could be chosen, at the rate where fewest did."""
    rates = (table.rates or (None,)) if rate is None else (rate,)
    return min(len(measured.diverged(row, column, each)) for each in rates)


def _shown(values: list[float], lost: int, rate: float | None) -> str:
    """Return what a cell shows: the scores' spread, and how many runs beside them diverged."""
    texts = [_spread(values)] if values else []
    if lost:
        texts.append(f"{lost} diverged" if values else "diverged")
    return ", ".join(texts) + (f" [{rate:g}]" if rate is not None else "")


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _means(tasks: dict[str, str], scores: dict[str, float]) -> dict[str, float]:
    """Return VTAB's group means of the columns that are its tasks, as far as groups are complete."""
    return means({tasks[column]: score for column, score in scores.items() if column in tasks})
