"""Keeps one JSON file for each job of a grid: a job is done if its file is there.

A grid is any list of runs: the trials of a suite, the rows, columns, seeds and rates of a published table. The same
command, called again, carries out the jobs without a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..errors import LoraInitError

Status = Literal["done", "failed", "diverged", "stopped"]
"""How a job ended: ``failed`` by an error; ``diverged`` to a loss that is no number; ``stopped`` early by ASHA."""
Record = dict[str, Any]


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write a record whole or not at all, each top-level key on its own line, so that long lists stay out of a diff."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in record.items())
    replace_file(file, f"{{\n{lines}\n}}\n")


def read_record(file: Path) -> Record:
    """Read a record.

    Raises:
        LoraInitError: the file holds no record.
    """
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise LoraInitError(f"{file} holds no result, delete it: {error}") from error


def find_record(file: Path) -> Record | None:
    """Read a record; None where there is no file, so that the job is still to be done.

    Raises:
        LoraInitError: the file holds no record.
    """
    return read_record(file) if file.exists() else None


def replace_file(file: Path, text: str) -> None:
    """Write a file under another name and rename it: a reader, or a kill, sees the old content or the new one."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    with partial.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())  # a power cut after the rename must not leave an empty file
    partial.replace(file)


def has_diverged(record: Mapping[str, Any]) -> bool:
    """Return whether a record is that of a run that diverged: it has no metrics and no cost."""
    return record.get("status") == "diverged"


def seconds(record: Mapping[str, Any]) -> float:
    """Return the seconds that a run took, its start and its training."""
    return record["cost"]["start"]["seconds"] + record["cost"]["training"]["seconds"]
