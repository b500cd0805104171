"""Carries out the runs of a table: resumable, and shared between as many workers as are started."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import LoraInitError
from ..training import train
from .measured import Measured
from .place import Place, read_result
from .table import DRIFT, TEACHER, Run, Table, build


def work(table: Table, place: Place) -> None:
    """Carry out every run that is missing, and what it needs, as long as there is one that nobody else does."""
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
    """Tell whether a run has left what a reference to it means: its adapter, or only its result."""
    there = place.result(table, run).exists()
    return there and (not text.startswith(TEACHER) or (place.folder(table, run) / "adapter").is_dir())


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

    Raises:
        LoraInitError: anything wrong in its recipe; the message says in which row and column.
    """
    found = {}
    for text, need in table.needs(run).items():
        if text.startswith(DRIFT):
            stored = read_result(place.result(table, need)) or {}
            drift = stored.get("init", {}).get("details", {}).get("drift")
            if drift is None:
                raise LoraInitError(f"table '{table.name}': row '{need.row}' tells no drift, which '{run.row}' takes")
            found[text] = drift
        else:
            found[text] = str(place.folder(table, need) / "adapter")
    folder = place.folder(table, run)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        result = train(build(table, run, found, place.data, str(folder)))
    except LoraInitError as error:
        raise LoraInitError(f"table '{table.name}', row '{run.row}', column '{run.column}': {error}") from error
    names = {"table": table.name, "row": run.row, "column": run.column}
    text = json.dumps(names | result).replace(str(place.scratch), "SCRATCH").replace(place.data, "{data}")
    target = place.result(table, run)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text(text + "\n")
    partial.replace(target)
    if not table.keep_adapters and run not in table.teachers():
        shutil.rmtree(folder)


@contextlib.contextmanager
def taken(lock: Path) -> Iterator[bool]:
    """Take a piece of work for this process by a lock file; yields False where another living process has it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError, ValueError):
        if not _alive(int(lock.read_text())):
            lock.unlink()
    try:
        handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        yield False
        return
    os.write(handle, str(os.getpid()).encode())
    os.close(handle)
    try:
        yield True
    finally:
        lock.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
