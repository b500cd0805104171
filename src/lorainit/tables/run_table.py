"""Carries out the runs of a table; can be interrupted, and shared by as many processes as are started.

There is no driver as in `bench`: each process takes the next run that none of the others has locked.
"""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any

from ..errors import LoraInitError, NonFiniteError
from ..grids.result_files import Record, find_record, has_diverged, write_record
from ..grids.same_recipe import as_stored
from ..machine.lock import taken
from ..train.recipe import Recipe
from ..train.run import train
from .evaluations import answering, evaluate
from .folders import SCRATCH, TableFolders
from .measured import Measured
from .table import DRIFT, TEACHER, Run, Table, build, filled, slug
from .table_records import read_checked, record

WAIT = 5.0  # seconds until a process looks again, while others carry out all that is left


def run_table(table: Table, folders: TableFolders) -> None:
    """Carry out every run that is missing, and the runs that it needs, except those that another process has locked.

    Raises:
        LoraInitError: anything wrong in a recipe, or a result that was made from another one than the table file's.
    """
    measured = Measured(table, folders)
    while pending := [run for run in measured.wanted() if run not in measured.results]:
        ready = list(dict.fromkeys(_first(table, run, folders) for run in pending))
        if not any(_attempt(table, run, folders, text) for run, text in ready):
            time.sleep(WAIT)
        measured.refresh()


def _done(table: Table, run: Run, folders: TableFolders, text: str = "") -> bool:
    """Return whether a run has left what a reference to it means: its adapter, or only its result.

    A run that diverged leaves only its result, and is done: repeated, it would diverge again.
    """
    result = read_checked(table, run, folders)
    if result is None:
        return False
    return not text.startswith(TEACHER) or has_diverged(result) or (folders.folder(table, run) / "adapter").is_dir()


def _first(table: Table, run: Run, folders: TableFolders, text: str = "") -> tuple[Run, str]:
    """Return the first thing to do for a run, one of its needs or itself, and the reference that asks for it."""
    for reference, need in table.needs(run).items():
        if not _done(table, need, folders, reference):
            return _first(table, need, folders, reference)
    return run, text


def _attempt(table: Table, run: Run, folders: TableFolders, text: str) -> bool:
    """Carry out a run unless another process has it; return whether it is done."""
    with taken(folders.lock(table, run)) as mine:
        if not mine:
            return False
        if _done(table, run, folders, text):
            return True
        begin = time.perf_counter()
        carry_out(table, run, folders)
        print(f"{table.name}: {run.name} in {time.perf_counter() - begin:.0f} s", flush=True)
        return True


def carry_out(table: Table, run: Run, folders: TableFolders) -> None:
    """Carry out a run whose needs are there; its result appears only when it is done.

    A run that diverges, or needs one that did, is done too: its result says so, and the table goes on. A run whose
    judge is out of reach is not done, but what was trained, answered and judged stays in its folder.

    Raises:
        LoraInitError: anything wrong in its recipe or its evaluations; the message says in which row and column.
    """
    folder = folders.folder(table, run)
    try:
        recipe = build(table, run, _found(table, run, folders), folders.data, str(folder))
        result = _trained_and_evaluated(table, run, recipe, folders)
    except NonFiniteError as error:
        result = {"status": "diverged", "message": str(error)}
    except LoraInitError as error:
        raise LoraInitError(f"{table.where(run)}: {error}") from error
    _store(table, run, folders, result)
    if has_diverged(result) or (not table.keep_adapters and run not in table.teachers()):
        shutil.rmtree(folder, ignore_errors=True)


def _trained_and_evaluated(table: Table, run: Run, recipe: Recipe, folders: TableFolders) -> Record:
    """Train, unless an earlier attempt already has, and run the benchmarks on what was trained."""
    folder, asked = folders.folder(table, run), table.asked(run)
    result = (_trained_before(recipe, folder) if asked else None) or _train(recipe, folder)
    for name, fields in asked.items():
        model = answering(recipe.model, recipe.adapter, folder)
        found = evaluate(name, filled(fields, {}, folders.data), model, folder / slug(name))
        result["metrics"] |= found["metrics"]
        result.setdefault("evaluated", {})[name] = found["kept"]
    return result


def _train(recipe: Recipe, folder: Path) -> Record:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return train(recipe)


def _trained_before(recipe: Recipe, folder: Path) -> Record | None:
    """Return the result of a training whose evaluations were interrupted; None without one of this recipe."""
    stored = find_record(folder / "result.json")
    return stored if stored is not None and stored["recipe"] == as_stored(recipe) else None


def _found(table: Table, run: Run, folders: TableFolders) -> dict[str, Any]:
    """Return {reference: what it stands for} from the runs that a run needs.

    Raises:
        NonFiniteError: one of them diverged.
        LoraInitError: one of them has no drift in its report.
    """
    found = {}
    for text, need in table.needs(run).items():
        stored = read_checked(table, need, folders) or {}
        if has_diverged(stored):
            raise NonFiniteError(f"'{text}' diverged: {stored['message']}")
        if not text.startswith(DRIFT):
            found[text] = str(folders.folder(table, need) / "adapter")
            continue
        found[text] = stored.get("init", {}).get("details", {}).get("drift")
        if found[text] is None:
            raise LoraInitError(f"row '{need.row}' has no drift in its report, which '{run.row}' needs")
    return found


def _store(table: Table, run: Run, folders: TableFolders, result: Record) -> None:
    """Write the result of a run, with names in place of this machine's folders."""
    names = {"table": table.name, "row": run.row, "column": run.column}
    stands_for = {str(folders.scratch): SCRATCH, folders.data: "{data}"}
    write_record(folders.result(table, run), names | _portable(result, stands_for) | record(table, run))


def _portable(value: Any, folders: dict[str, str]) -> Any:
    """Return a result with names in place of this machine's folders, in texts that hold paths into them."""
    if isinstance(value, dict):
        return {key: _portable(inner, folders) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(inner, folders) for inner in value]
    if isinstance(value, str) and value:
        for folder in sorted(folders, key=len, reverse=True):  # one may lie in the other
            value = _masked(value, folder, folders[folder])
    return value


def _masked(text: str, folder: str, name: str) -> str:
    """Return a text with a name in place of a folder, where it is a path into that folder or contains one.

    A folder whose path is a single word looks like any word inside a longer text, and is left there.
    """
    stem = folder.rstrip("/")
    if folder and (text == stem or text.startswith(f"{stem}/")):
        text = name + text[len(stem) :]
    if "/" not in stem:
        return text
    return re.sub(rf"(?<![\w./~-]){re.escape(stem)}(?![\w-]|\.[\w.])", lambda _: name, text)
