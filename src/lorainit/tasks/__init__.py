"""Data sets and metrics: hub names and local parquet by the same code."""

from __future__ import annotations

import difflib

from ..errors import LoraInitError
from . import glue, instruct, text
from .task import DataOptions, Task, fingerprint

TASKS: dict[str, Task] = {task.name: task for task in (*glue.TASKS, *text.TASKS, *instruct.TASKS)}


def get_task(name: str) -> Task:
    """Return a task by name.

    Raises:
        LoraInitError: an unknown name; near matches are listed.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3) or list(TASKS)
        raise LoraInitError(f"unknown task '{name}'; did you mean one of {near}?")
    return TASKS[name]


__all__ = ["TASKS", "DataOptions", "Task", "fingerprint", "get_task"]
