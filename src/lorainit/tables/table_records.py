"""Keeps in each result the recipe that it was made from, and refuses results of another recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import LoraInitError
from ..grids.result_files import Record, find_record, has_diverged
from ..grids.same_recipe import DEFAULTS, as_stored, differences
from .folders import SCRATCH, TableFolders
from .table import DRIFT, TEACHER, Run, Table, build

# These fields do not change what a run computes.
_NOT_COMPARED = ("output", "resume")


def record(table: Table, run: Run) -> dict[str, Any]:
    """Return what a run's result keeps of the table file.

    Returns:
        ``recipe``, with its defaults filled in, and its references and ``{data}`` as in the file; ``needs``,
        {reference: the run that it refers to, with a record of its own}; and ``evaluations``, if there are any.
    """
    needs = {
        text: {"row": need.row, "column": need.column, "seed": need.seed} | record(table, need)
        for text, need in table.needs(run).items()
    }
    asked = table.asked(run)
    return {"recipe": _recipe(table, run, {}), "needs": needs} | ({"evaluations": asked} if asked else {})


def is_recorded(table: Table, run: Run, stored: Mapping[str, Any]) -> bool:
    """Return whether a result keeps all that it was made from.

    Older results have the recipe as it was carried out, or nothing where the run diverged, and never the recipes of
    their teachers.
    """
    return "needs" in stored or ("recipe" in stored and not table.needs(run))


def read_checked(table: Table, run: Run, folders: TableFolders) -> Record | None:
    """Return a run's stored result, or None where the run is not done.

    Where a result does not keep the recipes of the runs that it needs, the results of those are checked instead.

    Raises:
        LoraInitError: the result, or one that it refers to, is that of another recipe than the table file's.
    """
    file = folders.result(table, run)
    stored = find_record(file)
    if stored is None:
        return None
    found = next(_differences(table, run, stored), None)
    if found is not None:
        raise LoraInitError(
            f"{table.where(run)}: {file} was made from another recipe: {found}; delete the file, or pass --redo to run "
            "again what has changed"
        )
    if not is_recorded(table, run, stored):
        for need in table.needs(run).values():
            read_checked(table, need, folders)
    return stored


def discard_changed(table: Table, folders: TableFolders) -> list[Path]:
    """Remove the results that were made from another recipe than the table file's, also of runs that others need.

    Returns:
        The files that were removed.
    """
    changed = [run for run in _with_needs(table) if _has_changed(table, run, folders)]
    files = [folders.result(table, run) for run in changed]
    for file in files:
        file.unlink()
    return files


def _has_changed(table: Table, run: Run, folders: TableFolders) -> bool:
    try:
        read_checked(table, run, folders)
    except LoraInitError:
        return True
    return False


def _with_needs(table: Table) -> list[Run]:
    """Return the runs of a table and those that they need."""
    found: dict[Run, None] = {}
    left = table.runs()
    while left:
        run = left.pop()
        if run not in found:
            found[run] = None
            left += table.needs(run).values()
    return list(found)


def _recipe(table: Table, run: Run, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a run's recipe that are compared, as JSON gives them back."""
    recipe = as_stored(build(table, run, found, "{data}"))
    return {key: value for key, value in recipe.items() if key not in _NOT_COMPARED}


def _differences(table: Table, run: Run, stored: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs between the table file and a result, in words."""
    if not has_diverged(stored):  # a run that diverged was never evaluated
        yield from differences(table.asked(run), stored.get("evaluations", {}), {}, "evaluations")
    if "needs" in stored:
        yield from _between(record(table, run), stored)
    elif "recipe" in stored:
        named = TableFolders(Path(), Path(SCRATCH))
        teachers = {
            text: str(named.folder(table, need) / "adapter")
            for text, need in table.needs(run).items()
            if text.startswith(TEACHER)
        }
        yield from differences(_recipe(table, run, teachers), stored["recipe"], DEFAULTS, equal=_same_or_drift)


def _between(now: Mapping[str, Any], stored: Mapping[str, Any]) -> Iterator[str]:
    """Yield the differences of two records; a reference that only one of them has shows in its recipe."""
    yield from differences(now["recipe"], stored["recipe"], DEFAULTS)
    for text, need in now["needs"].items():
        if text in stored["needs"]:
            yield from (f"in '{text}', {difference}" for difference in _between(need, stored["needs"][text]))


def _same_or_drift(now: Any, stored: Any) -> bool:
    """Compare two values; results without a record of their needs hold the figures of a drift, not its reference."""
    is_drift = isinstance(stored, Mapping) and isinstance(now, str) and now.startswith(DRIFT)
    return is_drift or now == stored
