"""Data sets and metrics: hub names and local parquet by the same code."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from ..errors import LoraInitError
from . import glue, glue_prompts, instruct, structured, text, vtab
from .task import DataOptions, Task, fingerprint

_ALL = (
    *glue.TASKS,
    *glue_prompts.TASKS,
    *vtab.TASKS,
    *vtab.EXTRA,
    *structured.TASKS,
    *text.TASKS,
    *instruct.TASKS,
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def get_task(name: str, **options: Any) -> Task:
    """Return a task by name, with some of its fields changed.

    Raises:
        LoraInitError: an unknown name (near matches are listed), unknown or wrong options.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3) or list(TASKS)
        raise LoraInitError(f"unknown task '{name}'; did you mean one of {near}?")
    task = TASKS[name]
    known = [field.name for field in dataclasses.fields(task)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise LoraInitError(f"task '{name}' has no option {unknown}; its options: {known}")
    try:
        return dataclasses.replace(task, **options)
    except (TypeError, ValueError) as error:
        raise LoraInitError(f"task '{name}': {error}") from error


__all__ = ["TASKS", "DataOptions", "Task", "fingerprint", "get_task"]
