"""Reads the results of a table, and decides which runs are still wanted."""

from __future__ import annotations

import statistics
from typing import Any

from ..errors import LoraInitError
from ..grids.result_files import Record, has_diverged, seconds
from .folders import TableFolders
from .table import Run, Table
from .table_records import is_recorded, read_checked

Scores = dict[int, float]


class Measured:
    """The results of a table.

    Args:
        table: the table.
        folders: where they lie.

    Raises:
        LoraInitError: one of them was made from another recipe than the table file's.
    """

    def __init__(self, table: Table, folders: TableFolders) -> None:
        self.table, self.folders = table, folders
        self.results: dict[Run, Record] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the results that were written since the last call.

        Raises:
            LoraInitError: one of them was made from another recipe than the table file's.
        """
        for run in self.table.runs():
            found = None if run in self.results else read_checked(self.table, run, self.folders)
            if found:
                self.results[run] = found

    def wanted(self) -> list[Run]:
        """Return the runs of the table, done or not, as far as they are known.

        The seeds that search try every rate. Once a cell's search is over, the others run only at the two rates that
        are shown: the cell's best and the reference's.
        """
        searching = self.table.searching_seeds()
        best = {}
        for row, column in {(run.row, run.column): None for run in self.table.runs()}:
            rates = {self.best(row, column), self.best(self.table.reference, column)}
            best[row, column] = rates if self._searched(row, column) else set()
        return [run for run in self.table.runs() if run.seed in searching or run.rate in best[run.row, run.column]]

    def scores(self, row: str, column: str, rate: float | None, metric: str | None = None) -> Scores:
        """Return {seed: score} of a cell at a rate, of the column's score or of another metric that it shows.

        Runs that diverged are left out, and runs whose judge has given no score.

        Raises:
            LoraInitError: the runs have no such metric.
        """
        metric = metric or self.table.score_of(column)
        factor, found = self.table.shown(column)[metric], {}
        for run, result in self.results.items():
            if (run.row, run.column, run.rate) == (row, column, rate) and not has_diverged(result):
                if metric not in result["metrics"]:
                    raise LoraInitError(
                        f"table '{self.table.name}', column '{column}' shows '{metric}', but row '{row}' has only "
                        f"{list(result['metrics'])}"
                    )
                if result["metrics"][metric] is not None:
                    found[run.seed] = factor * result["metrics"][metric]
        return found

    def unrecorded(self) -> int:
        """Return how many of the results do not keep all that they were made from."""
        return sum(not is_recorded(self.table, run, result) for run, result in self.results.items())

    def evaluated(self) -> list[dict[str, Any]]:
        """Return what the benchmarks have kept of their replies and verdicts, one for each benchmark of each run."""
        return [kept for result in self.results.values() for kept in result.get("evaluated", {}).values()]

    def diverged(self, row: str, column: str, rate: float | None) -> set[int]:
        """Return the seeds whose runs of a cell diverged at a rate."""
        cell = (row, column, rate)
        return {
            r.seed for r, found in self.results.items() if (r.row, r.column, r.rate) == cell and has_diverged(found)
        }

    def best(self, row: str, column: str) -> float | None:
        """Return the rate of a cell's best mean score over the seeds that search.

        A rate at which one of them diverged is not chosen: the mean of the others would look too good. None where no
        rate is left, or where the table has no rates.
        """
        sign = -1 if self.table.score_of(column) == "loss" else 1
        means = {}
        for rate in self.table.rates:
            searching = self.table.searching_seeds()
            found = [score for seed, score in self.scores(row, column, rate).items() if seed in searching]
            if found and not self.diverged(row, column, rate).intersection(searching):
                means[rate] = sign * statistics.mean(found)
        return max(means, key=means.__getitem__, default=None)

    def hours(self) -> float | None:
        """Estimate the hours that the missing runs will take from those that are done; None before the first.

        Where a cell's search is unfinished, its other seeds are counted at two rates.
        """
        times = [seconds(result) for result in self.results.values() if not has_diverged(result)]
        if not times:
            return None
        others = len(self.table.seeds) - len(self.table.searching_seeds())
        cells = {(run.row, run.column) for run in self.table.runs()}
        open_cells = sum(not self._searched(*cell) for cell in cells)
        missing = sum(run not in self.results for run in self.wanted()) + open_cells * others * 2
        return statistics.mean(times) * missing / 3600

    def _searched(self, row: str, column: str) -> bool:
        """Return whether every rate has been tried by the seeds that search, here and for the reference."""
        rows = {row, self.table.reference} & {run.row for run in self.table.runs()}
        return all(
            Run(each, column, seed, rate) in self.results
            for each in rows
            for seed in self.table.searching_seeds()
            for rate in self.table.rates or (None,)
        )
