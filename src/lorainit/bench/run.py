"""``lorainit bench``: a suite's missing trials on Ray, until none is missing."""

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
from ..machine import provenance
from ..machine.lock import taken
from . import pool
from .checks import check_folders
from .plan import Plan
from .results import Results, Summary, write_json
from .suite import Suite
from .trial import Cell, Trial, cells
from .work import carry_out


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a call of `bench` did.

    Attributes:
        carried_out: trials by status.
        found: trials that were there before.
        seconds: wall-clock time.
    """

    carried_out: dict[str, int]
    found: int
    seconds: float


def bench(
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
        output: folder of results, one JSON a trial.
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
    tables = cells(suite)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder), contextlib.closing(Results(folder)) as results:
        write_json(folder / "suite.json", description(suite))
        plan, found, counts = Plan(suite, results, retry_failed=retry_failed), len(results.summaries), Counter()

        def end(trial: Trial, record: dict[str, Any]) -> None:
            """Keep a record, and tell the plan."""
            summary = results.write(trial.key, record)
            counts[summary.status] += 1
            plan.ended(trial.key, summary)
            tell(_line(trial, summary, record))

        def lose(trial: Trial, why: str) -> None:
            """Record a trial whose workers died."""
            end(trial, trial.record("failed") | {"error": why, "provenance": provenance.collect()})

        first = plan.next()
        if first is not None:
            with pool.cluster(address):
                work = _worker(root, results, tables)
                pool.run(_Ahead(first, plan), work, end, lose, suite.resources)
    return Outcome(dict(counts), found, time.perf_counter() - begin)


def description(suite: Suite) -> dict[str, Any]:
    """Return the suite as the folder of results remembers it."""
    return dataclasses.asdict(suite)


@dataclasses.dataclass
class _Ahead:
    """The plan, whose first trial has been looked at already: Ray is not started for nothing."""

    first: Trial | None
    plan: Plan

    def next(self) -> Trial | None:
        """Return the first trial, then the plan's."""
        first, self.first = self.first, None
        return first if first is not None else self.plan.next()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second driver out of the folder."""
    with taken(folder / ".lock") as mine:
        if not mine:
            raise LoraInitError(f"another process is at work in {folder}")
        yield


def _worker(root: str | None, results: Results, tables: list[Cell]) -> Callable[[Trial], dict[str, Any]]:
    """Return what a worker does with a trial."""
    judged = [cell for cell in tables if cell.search.schedule == "asha"]
    if not judged:
        return functools.partial(carry_out, root=root)
    from . import asha

    judges = asha.judges(judged, results)
    return functools.partial(_judged, root=root, judges=judges)


def _judged(trial: Trial, root: str | None, judges: dict[str, Any]) -> dict[str, Any]:
    return carry_out(trial, root, judges[trial.cell] if trial.point.judged else None)


def _line(trial: Trial, summary: Summary, record: dict[str, Any]) -> str:
    if summary.status in ("failed", "diverged"):
        return f"{trial.key} {summary.status}: {record['error']}"
    if trial.point.diagnosis:
        return f"{trial.key} suggested rate {record['ratio']:.3g} × vanilla's"
    cost = record["cost"]["start"]["seconds"] + record["cost"]["training"]["seconds"]
    return f"{trial.key} {summary.status}, loss {record['metrics']['loss']:.4f}, {cost:.1f} s"
