"""What there is of a table's results, and which runs are still wanted."""

from __future__ import annotations

import statistics
from typing import Any

from ..errors import LoraInitError
from .place import Place, has_diverged
from .record import is_recorded, read_checked
from .table import Run, Table

Scores = dict[int, float]


class Measured:
    """The results of a table that there are.

    Args:
        table: the table.
        place: where they lie.

    Raises:
        LoraInitError: one of them was made from another recipe than the table file's.
    """

    def __init__(self, table: Table, place: Place) -> None:
        self.table, self.place = table, place
        self.results: dict[Run, dict[str, Any]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the results that have come since.

        Raises:
            LoraInitError: one of them was made from another recipe than the table file's.
        """
        for run in self.table.runs():
            found = None if run in self.results else read_checked(self.table, run, self.place)
            if found:
                self.results[run] = found

    def wanted(self) -> list[Run]:
        """Return the runs of the table, done or not, as far as it is known which they are.

        The seeds that search try every rate. The others, once a cell's search is over, run only at the two rates that
        are shown: the cell's best and the reference's.
        """
        searching = self.table.searching_seeds()
        best = {}
        for row, column in {(run.row, run.column): None for run in self.table.runs()}:
            rates = {self.best(row, column), self.best(self.table.reference, column)}
            best[row, column] = rates if self._searched(row, column) else set()
        return [run for run in self.table.runs() if run.seed in searching or run.rate in best[run.row, run.column]]

    def scores(self, row: str, column: str, rate: float | None, metric: str | None = None) -> Scores:
        """Return {seed: score} of a cell at a rate: of the column's score, or of another metric that it shows.

        Runs that diverged have none, nor have those whose judge has left none.

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
        """Return what the benchmarks have told of their replies and verdicts, one for each that a run has answered."""
        return [told for result in self.results.values() for told in result.get("evaluated", {}).values()]

    def diverged(self, row: str, column: str, rate: float | None) -> set[int]:
        """Return the seeds whose runs of a cell diverged at a rate."""
        cell = (row, column, rate)
        return {
            r.seed for r, found in self.results.items() if (r.row, r.column, r.rate) == cell and has_diverged(found)
        }

    def best(self, row: str, column: str) -> float | None:
        """Return the rate of a cell's best mean score over the seeds that search.

        A rate at which one of them diverged is none to choose: the mean of the others would flatter it. None where no
        rate is left, or where the row's own is all.
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
        """Return what the missing runs will take, going by those that are done; None before the first.

        A cell whose search is unfinished counts as if its other seeds were to run at two rates.
        """
        costs = [result["cost"] for result in self.results.values() if not has_diverged(result)]
        if not costs:
            return None
        mean = statistics.mean(cost["start"]["seconds"] + cost["training"]["seconds"] for cost in costs)
        others = len(self.table.seeds) - len(self.table.searching_seeds())
        cells = {(run.row, run.column) for run in self.table.runs()}
        open_cells = sum(not self._searched(*cell) for cell in cells)
        missing = sum(run not in self.results for run in self.wanted()) + open_cells * others * 2
        return mean * missing / 3600

    def _searched(self, row: str, column: str) -> bool:
        """Return whether every rate has been tried by the seeds that search, here and for the reference."""
        rows = {row, self.table.reference} & {run.row for run in self.table.runs()}
        return all(
            Run(each, column, seed, rate) in self.results
            for each in rows
            for seed in self.table.searching_seeds()
            for rate in self.table.rates or (None,)
        )
