"""Carries out the runs of a table: resumable, and shared between as many workers as are started."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

from ..errors import LoraInitError, NonFiniteError
from ..machine.lock import taken
from ..train.recipe import Recipe
from ..train.run import train
from .evaluations import answering, evaluate
from .measured import Measured
from .place import SCRATCH, Place, has_diverged, read_result
from .record import read_checked, record
from .table import DRIFT, TEACHER, Run, Table, build, filled, slug


def work(table: Table, place: Place) -> None:
    """Carry out every run that is missing, and what it needs, as long as there is one that nobody else does.

    Raises:
        LoraInitError: anything wrong in a recipe, or a result that was made from another one than the table file's.
    """
    measured = Measured(table, place)
    while True:
        pending = [run for run in measured.wanted() if run not in measured.results]
        if not pending:
            return
        ready = list(dict.fromkeys(_first(table, run, place) for run in pending))
        if not any(_attempt(table, run, place, text) for run, text in ready):
            time.sleep(5)  # all that is left is being done by others
        measured.refresh()


def _done(table: Table, run: Run, place: Place, text: str = "") -> bool:
    """Tell whether a run has left what a reference to it means: its adapter, or only its result.

    One that diverged never leaves more than its result, and doing it again would end alike.
    """
    result = read_checked(table, run, place)
    if result is None:
        return False
    return not text.startswith(TEACHER) or has_diverged(result) or (place.folder(table, run) / "adapter").is_dir()


def _first(table: Table, run: Run, place: Place, text: str = "") -> tuple[Run, str]:
    """Return the first thing to do for a run, one of its needs or itself, and the reference that asks for it."""
    for reference, need in table.needs(run).items():
        if not _done(table, need, place, reference):
            return _first(table, need, place, reference)
    return run, text


def _attempt(table: Table, run: Run, place: Place, text: str) -> bool:
    """Carry out a run unless another worker has it; return whether it is done."""
    with taken(place.lock(table, run)) as mine:
        if not mine:
            return False
        if _done(table, run, place, text):
            return True
        begin = time.perf_counter()
        carry_out(table, run, place)
        print(f"{table.name}: {run.name} in {time.perf_counter() - begin:.0f} s", flush=True)
        return True


def carry_out(table: Table, run: Run, place: Place) -> None:
    """Do a run whose needs are there; its result appears only when it is done.

    A run that diverges, or needs one that did, is done too: its result says so, and the table goes on. One whose judge
    is out of reach is not: what was trained, answered and judged waits in its folder.

    Raises:
        LoraInitError: anything wrong in its recipe or its evaluations; the message says in which row and column.
    """
    folder, asked = place.folder(table, run), table.asked(run)
    try:
        recipe = build(table, run, _found(table, run, place), place.data, str(folder))
        result = (_trained(recipe, folder) if asked else None) or _train(recipe, folder)
        for name, fields in asked.items():
            model = answering(recipe.model, recipe.adapter, folder)
            found = evaluate(name, filled(fields, {}, place.data), model, folder / slug(name))
            result["metrics"] |= found["metrics"]
            result.setdefault("evaluated", {})[name] = found["told"]
    except NonFiniteError as error:
        result = {"status": "diverged", "message": str(error)}
    except LoraInitError as error:
        raise LoraInitError(f"{table.where(run)}: {error}") from error
    _store(table, run, place, result)
    if has_diverged(result) or (not table.keep_adapters and run not in table.teachers()):
        shutil.rmtree(folder, ignore_errors=True)


def _train(recipe: Recipe, folder: Path) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return train(recipe)


def _trained(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    """Return the result of a training that has waited for its evaluations; None without one of this recipe."""
    stored = read_result(folder / "result.json")
    same = stored is not None and stored["recipe"] == json.loads(json.dumps(dataclasses.asdict(recipe)))
    return stored if same else None


def _found(table: Table, run: Run, place: Place) -> dict[str, Any]:
    """Return {reference: what it stands for} from the runs that a run needs.

    Raises:
        NonFiniteError: one of them diverged.
        LoraInitError: one of them tells no drift.
    """
    found = {}
    for text, need in table.needs(run).items():
        stored = read_checked(table, need, place) or {}
        if has_diverged(stored):
            raise NonFiniteError(f"'{text}' diverged: {stored['message']}")
        if not text.startswith(DRIFT):
            found[text] = str(place.folder(table, need) / "adapter")
            continue
        found[text] = stored.get("init", {}).get("details", {}).get("drift")
        if found[text] is None:
            raise LoraInitError(f"row '{need.row}' tells no drift, which '{run.row}' takes")
    return found


def _store(table: Table, run: Run, place: Place, result: dict[str, Any]) -> None:
    """Write a result at once: a reader sees the whole of it or nothing."""
    names = {"table": table.name, "row": run.row, "column": run.column}
    folders = {str(place.scratch): SCRATCH, place.data: "{data}"}
    target = place.result(table, run)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text(json.dumps(names | _portable(result, folders) | record(table, run)) + "\n")
    partial.replace(target)


def _portable(value: Any, folders: dict[str, str]) -> Any:
    """Return a result with names instead of folders of this machine, in the texts that tell paths into them."""
    if isinstance(value, dict):
        return {key: _portable(inner, folders) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(inner, folders) for inner in value]
    if isinstance(value, str) and value:
        for folder in sorted(folders, key=len, reverse=True):  # one may lie in the other
            value = _masked(value, folder, folders[folder])
    return value


def _masked(text: str, folder: str, name: str) -> str:
    """Return a text with a name instead of a folder, where it is a path into it or tells one.

    Inside a text, a folder of a single name cannot be told from a word, and is left.
    """
    stem = folder.rstrip("/")
    if folder and (text == stem or text.startswith(f"{stem}/")):
        text = name + text[len(stem) :]
    if "/" not in stem:
        return text
    return re.sub(rf"(?<![\w./~-]){re.escape(stem)}(?![\w-]|\.[\w.])", lambda _: name, text)
