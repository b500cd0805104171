"""Writes a table as Markdown: what was measured here beside what was published."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from ..grids import markdown
from ..tasks.vtab import means
from .folders import TableFolders
from .measured import Measured
from .table import Table


def table_page(table: Table, folders: TableFolders) -> str:
    """Write a table as Markdown: each row at its own best rate, all at the reference's, and the published figures."""
    measured = Measured(table, folders)
    lines = [f"## {table.title}", "", _head(table, measured), ""]
    if len(table.rates) > 1:
        lines += [
            _how_chosen(table),
            "",
            *_grid(table, measured, measured.best),
            f"All rows at the rate that is best for {table.reference}:",
            "",
            *_grid(table, measured, lambda row, column: measured.best(table.reference, column), published=False),
        ]
    else:
        rate = table.rates[0] if table.rates else None
        lines += _grid(table, measured, lambda row, column: rate)
    lines += [f"* {note}" for note in (*table.notes, *_remarks(measured))]
    if table.paper_notes:
        lines += ["", "Of the published figures, and of the runs at the papers' scale:", ""]
        lines += [f"* {note}" for note in table.paper_notes]
    return "\n".join([*lines, ""])


def _head(table: Table, measured: Measured) -> str:
    """Return where the published figures come from, and what was measured."""
    wanted = measured.wanted()  # not all results: a cell's best rate is another one where rates were added
    done = sum(run in measured.results for run in wanted)
    shown = _metrics({table.score: table.times} | table.also)
    spread = ", mean ± standard deviation" if len(table.seeds) > 1 else ""
    return (
        f"Published (in italics): {table.source}. Here: `{table.name}`, {done} of {len(wanted)} runs, seeds "
        f"{list(table.seeds)}: {shown}{spread}."
    )


def _how_chosen(table: Table) -> str:
    """Return how the rate of each row was chosen."""
    rates = ", ".join(f"{rate:g}" for rate in table.rates)
    return (
        f"Each row at its best of the rates {rates} by seed {', '.join(map(str, table.searching_seeds()))}, which "
        "stands in brackets, with a * where it is the lowest or the highest of them (of equals the lowest is "
        "taken). It is chosen on the scores that are shown: the best of several draws, for every row alike."
    )


def _remarks(measured: Measured) -> list[str]:
    """Return the notes that follow from the results."""
    remarks = []
    unrecorded = measured.unrecorded()
    if unrecorded:
        remarks.append(
            f"{unrecorded} of the results carry no record of all that they were made from (they diverged or have "
            "teachers, and are older than such records): they are taken as they are."
        )
    unread = sum(kept["unparsable"] for kept in measured.evaluated())
    if unread:
        remarks.append(f"{unread} replies of the judge could not be read: the means are over the others.")
    return remarks


def _grid(
    table: Table, measured: Measured, rate_of: Callable[[str, str], float | None], published: bool = True
) -> list[str]:
    """Return the lines of one Markdown table; what is published stands below what is measured.

    Where no published column was run here, the published columns stand behind the others.
    """
    tasks = {column: changes.get("task", "") for column, changes in table.columns.items()}
    groups = list(_means(tasks, dict.fromkeys(tasks, 0.0)))
    printed_columns = dict.fromkeys(column for row in table.published.values() for column in row) if published else {}
    others = [] if set(printed_columns) & set(tasks) else list(printed_columns)
    lines = markdown.head(["row", *(_title(table, column) for column in tasks), *groups, *others])
    for row in table.rows:
        cells: dict[str, list[str]] = {name: [] for name in (*tasks, *groups, *others)}
        _add_measured(cells, table, measured, row, tasks, rate_of)
        _add_printed(cells, table.published.get(row, {}) if published else {}, tasks)
        lines.append(markdown.line([row, *("<br>".join(texts) for texts in cells.values())]))
    return [*lines, ""]


def _add_measured(
    cells: dict[str, list[str]],
    table: Table,
    measured: Measured,
    row: str,
    tasks: dict[str, str],
    rate_of: Callable[[str, str], float | None],
) -> None:
    """Add to the cells of a row what was measured here."""
    ours = {}
    for column in tasks:
        rate = rate_of(row, column)
        scores = [list(measured.scores(row, column, rate, metric).values()) for metric in table.shown(column)]
        lost = _lost(table, measured, row, column, rate)
        if any(scores) or lost:
            cells[column].append(_shown(scores, lost) + _mark(table, rate))
        if scores[0] and not lost:  # the mean of the other seeds would make the group's look too good
            ours[column] = statistics.mean(scores[0])
    for name, mean in _means(tasks, ours).items():
        cells[name].append(f"{mean:.2f}")


def _add_printed(cells: dict[str, list[str]], printed: Mapping[str, Any], tasks: dict[str, str]) -> None:
    """Add to the cells of a row what was published."""
    for column, value in printed.items():
        if column in cells:
            cells[column].append(f"*{value}*")
    numbers = {column: float(value) for column, value in printed.items() if isinstance(value, int | float)}
    for name, mean in _means(tasks, numbers).items():
        cells[name].append(f"*{mean:.2f}*")


def _title(table: Table, column: str) -> str:
    """Return a column's name, with its metrics where they are not the table's."""
    shown = table.shown(column)
    return column if shown == {table.score: table.times} | table.also else f"{column} ({_metrics(shown)})"


def _metrics(shown: Mapping[str, float]) -> str:
    """Return metrics and their factors in words."""
    return " / ".join(metric if factor == 1 else f"{metric} × {factor:g}" for metric, factor in shown.items())


def _lost(table: Table, measured: Measured, row: str, column: str, rate: float | None) -> int:
    """Return how many runs of a cell diverged at a rate; where none could be chosen, at the rate where fewest did."""
    rates = (table.rates or (None,)) if rate is None else (rate,)
    return min(len(measured.diverged(row, column, each)) for each in rates)


def _mark(table: Table, rate: float | None) -> str:
    """Return a rate as it stands behind a score, with a * where it is the lowest or highest that was tried."""
    if rate is None:
        return ""
    at_an_edge = len(table.rates) > 1 and rate in (min(table.rates), max(table.rates))
    return f" [{rate:g}{'*' * at_an_edge}]"


def _shown(scores: list[list[float]], lost: int) -> str:
    """Return the text of a cell: the mean and spread of each metric, and how many runs diverged."""
    texts = [" / ".join(_spread(values) if values else "–" for values in scores)] if any(scores) else []
    if lost:
        texts.append(f"{lost} diverged" if texts else "diverged")
    return ", ".join(texts)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _means(tasks: dict[str, str], scores: dict[str, float]) -> dict[str, float]:
    """Return the means of VTAB's groups over the columns that are its tasks, of groups that are complete."""
    return means({tasks[column]: score for column, score in scores.items() if column in tasks})
