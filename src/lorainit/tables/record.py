"""What a result keeps of the table file that it was made from, and whether the file still says the same."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import LoraInitError
from ..train.recipe import Recipe
from .place import SCRATCH, Place, has_diverged, read_result
from .table import DRIFT, TEACHER, Run, Table, build

# where a run leaves what it makes, and whether it was interrupted before, is no part of what it does
_NOT_COMPARED = ("output", "resume")
_DEFAULTS = dataclasses.asdict(Recipe(model="", task=""))
_NOTHING = "nothing"


def record(table: Table, run: Run) -> dict[str, Any]:
    """Return what a run's result keeps of the table file.

    Returns:
        ``recipe``, with its defaults filled in and its references and ``{data}`` as the file has them; ``needs``,
        {reference: the run that it refers to, with a record of its own}; and, if it answers any, ``evaluations``.
    """
    needs = {
        text: {"row": need.row, "column": need.column, "seed": need.seed} | record(table, need)
        for text, need in table.needs(run).items()
    }
    asked = table.asked(run)
    return {"recipe": _recipe(table, run, {}), "needs": needs} | ({"evaluations": asked} if asked else {})


def is_recorded(table: Table, run: Run, stored: Mapping[str, Any]) -> bool:
    """Tell whether a result keeps all that it was made from.

    Those from before there were records have the recipe as it was carried out, or nothing where the run diverged, and
    never what their teachers were.
    """
    return "needs" in stored or ("recipe" in stored and not table.needs(run))


def read_checked(table: Table, run: Run, place: Place) -> dict[str, Any] | None:
    """Return a run's stored result, or None where the run is not done.

    A result without a record of what it refers to is compared with what lies there of that now.

    Raises:
        LoraInitError: the result, or one that it refers to, is that of another recipe than the table file's.
    """
    file = place.result(table, run)
    stored = read_result(file)
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
            read_checked(table, need, place)
    return stored


def discard_changed(table: Table, place: Place) -> list[Path]:
    """Remove the results of another recipe than the table file's, of the table's runs and of those that they need.

    Returns:
        The files that there were.
    """
    changed = [run for run in _with_needs(table) if _has_changed(table, run, place)]
    files = [place.result(table, run) for run in changed]
    for file in files:
        file.unlink()
    return files


def _has_changed(table: Table, run: Run, place: Place) -> bool:
    try:
        read_checked(table, run, place)
    except LoraInitError:
        return True
    return False


def _with_needs(table: Table) -> list[Run]:
    found: dict[Run, None] = {}
    left = table.runs()
    while left:
        run = left.pop()
        if run not in found:
            found[run] = None
            left += table.needs(run).values()
    return list(found)


def _recipe(table: Table, run: Run, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's recipe as JSON gives it back."""
    recipe = json.loads(json.dumps(dataclasses.asdict(build(table, run, found, "{data}"))))
    return {key: value for key, value in recipe.items() if key not in _NOT_COMPARED}


def _differences(table: Table, run: Run, stored: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the table file says otherwise than a result."""
    if not has_diverged(stored):  # what diverged was never asked
        yield from _fields(table.asked(run), stored.get("evaluations", {}), {}, "evaluations")
    if "needs" in stored:
        yield from _between(record(table, run), stored)
    elif "recipe" in stored:
        named = Place(Path(), Path(SCRATCH))
        teachers = {
            text: str(named.folder(table, need) / "adapter")
            for text, need in table.needs(run).items()
            if text.startswith(TEACHER)
        }
        yield from _fields(_recipe(table, run, teachers), stored["recipe"], _DEFAULTS)


def _between(now: Mapping[str, Any], stored: Mapping[str, Any]) -> Iterator[str]:
    """Yield the differences of two records; a reference that only one of them has shows in its recipe."""
    yield from _fields(now["recipe"], stored["recipe"], _DEFAULTS)
    for text, need in now["needs"].items():
        if text in stored["needs"]:
            yield from (f"in '{text}', {difference}" for difference in _between(need, stored["needs"][text]))


def _fields(now: Any, stored: Any, default: Any, path: str = "") -> Iterator[str]:
    """Yield the fields that differ.

    A field that recipes had not yet counts as its default; one that they have no longer says nothing about the table.
    """
    if isinstance(now, Mapping) and isinstance(stored, Mapping):
        known = default if isinstance(default, Mapping) else {}
        # what has defaults has just these fields; the rest (train, lora, ...) has what it is given
        for name in now if known else {**now, **stored}:
            inner = known.get(name, _NOTHING)
            yield from _fields(
                now.get(name, _NOTHING), stored.get(name, inner), inner, f"{path}.{name}" if path else name
            )
    elif isinstance(stored, Mapping) and isinstance(now, str) and now.startswith(DRIFT):
        return  # the figures themselves, from before there were records
    elif now != stored:
        yield f"{path} was {_text(stored)}, and the table file says {_text(now)}"


def _text(value: Any) -> str:
    return value if value is _NOTHING else repr(value)
