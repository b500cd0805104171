"""``lorainit bench``: carries out the missing trials of a suite on Ray, until none is missing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import LoraInitError
from ..grids.result_files import Record, seconds, write_record
from ..machine import provenance
from ..machine.lock import taken
from . import cluster, workers
from .plan import Plan
from .results import Results, Summary
from .run_trial import carry_out
from .suite import Suite
from .suite_checks import check_folders
from .trial import Cell, Trial, cells


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a call of `run_suite` did.

    Attributes:
        carried_out: number of trials by status.
        found: number of trials that were there before.
        seconds: wall-clock time.
    """

    carried_out: dict[str, int]
    found: int
    seconds: float


def run_suite(
    suite: Suite,
    output: str | Path,
    *,
    root: str | None = None,
    address: str | None = None,
    retry_failed: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Carry out what is missing of a suite.

    It can be killed at any time; called again, it goes on where it was. A trial that fails is a row with its error.

    Args:
        suite: what to run.
        output: folder of results, one JSON file a trial.
        root: folder that paths ``root:FOLDER`` of the suite lie below.
        address: of a Ray cluster; default: this machine.
        retry_failed: run failed trials again.
        tell: takes a line a trial.

    Raises:
        LoraInitError: a path without root, a folder that is not there, no such cluster, no room for a trial, or another
            process is at work in the folder.
    """
    begin = time.perf_counter()
    check_folders(suite, root)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder), contextlib.closing(Results(folder)) as results:
        write_record(folder / "suite.json", description(suite))
        found = len(results.summaries)
        progress = _Progress(Plan(suite, results, retry_failed=retry_failed), results, tell)
        if progress.has_more():  # else Ray is not started
            with cluster.connected(address):
                work = _work(root, results, cells(suite))
                workers.run_jobs(progress, work, progress.end, progress.lose, suite.resources)
    return Outcome(dict(progress.counts), found, time.perf_counter() - begin)


def description(suite: Suite) -> dict[str, Any]:
    """Return the suite as ``suite.json`` holds it."""
    return dataclasses.asdict(suite)


class _Progress:
    """The plan of a suite, with the trials that have ended written down."""

    def __init__(self, plan: Plan, results: Results, tell: Callable[[str], None]) -> None:
        self.counts: Counter[str] = Counter()
        self._plan, self._results, self._tell = plan, results, tell
        self._first: Trial | None = None

    def has_more(self) -> bool:
        """Return whether a trial is missing; `next` returns it."""
        self._first = self._plan.next()
        return self._first is not None

    def next(self) -> Trial | None:
        """Return a trial that is missing, None if there is none before another one has ended."""
        first, self._first = self._first, None
        return first if first is not None else self._plan.next()

    def end(self, trial: Trial, record: Record) -> None:
        """Keep the record of a trial, and let the plan know."""
        summary = self._results.write(trial.key, record)
        self.counts[summary.status] += 1
        self._plan.ended(trial.key, summary)
        self._tell(_line(trial, summary, record))

    def lose(self, trial: Trial, reason: str) -> None:
        """Keep a trial whose workers died as one that failed."""
        self.end(trial, trial.record("failed") | {"error": reason, "provenance": provenance.collect()})


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second driver out of the folder."""
    with taken(folder / ".lock") as mine:
        if not mine:
            raise LoraInitError(f"another process is at work in {folder}")
        yield


def _work(root: str | None, results: Results, cells: list[Cell]) -> Callable[[Trial], Record]:
    """Return what a worker does with a trial."""
    stopped_early = [cell for cell in cells if cell.search.schedule == "asha"]
    if not stopped_early:
        return functools.partial(carry_out, root=root)
    from . import asha

    stoppers = asha.stoppers(stopped_early, results)
    return functools.partial(_carry_out_or_stop, root=root, stoppers=stoppers)


def _carry_out_or_stop(trial: Trial, root: str | None, stoppers: dict[str, Any]) -> Record:
    return carry_out(trial, root, stoppers[trial.cell] if trial.point.judged else None)


def _line(trial: Trial, summary: Summary, record: Record) -> str:
    """Return what is printed of a trial."""
    if summary.status in ("failed", "diverged"):
        return f"{trial.key} {summary.status}: {record['error']}"
    if trial.point.diagnosis:
        return f"{trial.key} suggested rate {record['ratio']:.3g} × vanilla's"
    return f"{trial.key} {summary.status}, loss {record['metrics']['loss']:.4f}, {seconds(record):.1f} s"
