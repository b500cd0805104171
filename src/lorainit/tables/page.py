"""A table as text: what was published beside what was measured here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

from ..tasks.vtab import means
from .measured import Measured
from .place import Place
from .table import Table


def page(table: Table, place: Place) -> str:
    """Return a table as Markdown: each row at its own best rate, all at the reference's, and the published figures."""
    measured = Measured(table, place)
    wanted = measured.wanted()  # not all that there is: a cell's best rate is another one where rates were added
    done = sum(run in measured.results for run in wanted)
    shown = _metrics({table.score: table.times} | table.also)
    spread = ", mean ± standard deviation" if len(table.seeds) > 1 else ""
    lines = [
        f"## {table.title}",
        "",
        f"Published (in italics): {table.source}. Here: `{table.name}`, {done} of {len(wanted)} runs, seeds "
        f"{list(table.seeds)}: {shown}{spread}.",
        "",
    ]
    if len(table.rates) > 1:
        rates = ", ".join(f"{rate:g}" for rate in table.rates)
        lines += [
            f"Each row at its best of the rates {rates} by seed {', '.join(map(str, table.searching_seeds()))}, which "
            "stands in brackets, with a * where it is the lowest or the highest of them (of equals the lowest is "
            "taken). It is chosen on the scores that are shown: the best of several draws, for every row alike.",
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


def _remarks(measured: Measured) -> list[str]:
    """Return what the results themselves call for."""
    remarks = []
    unrecorded = measured.unrecorded()
    if unrecorded:
        remarks.append(
            f"{unrecorded} of the results carry no record of all that they were made from (they diverged or have "
            "teachers, and are older than such records): they are taken as they are."
        )
    unread = sum(told["unparsable"] for told in measured.evaluated())
    if unread:
        remarks.append(f"{unread} replies of the judge could not be read: the means are over the others.")
    return remarks


def _grid(
    table: Table, measured: Measured, rate_of: Callable[[str, str], float | None], published: bool = True
) -> list[str]:
    """Return the lines of one Markdown table; what is published stands below what is measured.

    Where no published column was run here, they stand behind the others.
    """
    tasks = {column: changes.get("task", "") for column, changes in table.columns.items()}
    groups = list(_means(tasks, dict.fromkeys(tasks, 0.0)))
    printed_columns = dict.fromkeys(column for row in table.published.values() for column in row) if published else {}
    others = [] if set(printed_columns) & set(tasks) else list(printed_columns)
    titles = [*(_title(table, column) for column in tasks), *groups, *others]
    lines = ["| row | " + " | ".join(titles) + " |", "|---" * (1 + len(titles)) + "|"]
    for row in table.rows:
        cells: dict[str, list[str]] = {name: [] for name in (*tasks, *groups, *others)}
        ours = {}
        for column in tasks:
            rate = rate_of(row, column)
            scores = [list(measured.scores(row, column, rate, m).values()) for m in table.shown(column)]
            lost = _lost(table, measured, row, column, rate)
            if any(scores) or lost:
                cells[column].append(_shown(scores, lost) + _mark(table, rate))
            if scores[0] and not lost:  # a mean of those that are left would flatter the group's
                ours[column] = statistics.mean(scores[0])
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
    """Return a column's name, with its metrics where they are not the table's."""
    shown = table.shown(column)
    return column if shown == {table.score: table.times} | table.also else f"{column} ({_metrics(shown)})"


def _metrics(shown: Mapping[str, float]) -> str:
    """Return what a cell shows, in words."""
    return " / ".join(metric if factor == 1 else f"{metric} × {factor:g}" for metric, factor in shown.items())


def _lost(table: Table, measured: Measured, row: str, column: str, rate: float | None) -> int:
    """Return how many runs of a cell diverged at a rate; where none could be chosen, at the rate where fewest did."""
    rates = (table.rates or (None,)) if rate is None else (rate,)
    return min(len(measured.diverged(row, column, each)) for each in rates)


def _mark(table: Table, rate: float | None) -> str:
    """Return a rate as it stands behind a score, marked where a better one may lie beyond those that were tried."""
    if rate is None:
        return ""
    at_an_edge = len(table.rates) > 1 and rate in (min(table.rates), max(table.rates))
    return f" [{rate:g}{'*' * at_an_edge}]"


def _shown(scores: list[list[float]], lost: int) -> str:
    """Return what a cell shows: the spread of each metric, and how many runs beside them diverged."""
    texts = [" / ".join(_spread(values) if values else "–" for values in scores)] if any(scores) else []
    if lost:
        texts.append(f"{lost} diverged" if texts else "diverged")
    return ", ".join(texts)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _means(tasks: dict[str, str], scores: dict[str, float]) -> dict[str, float]:
    """Return VTAB's group means of the columns that are its tasks, as far as groups are complete."""
    return means({tasks[column]: score for column, score in scores.items() if column in tasks})
