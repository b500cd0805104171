"""Where the runs of a table leave what they make."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import LoraInitError
from .table import Run, Table

SCRATCH = "SCRATCH"  # what stands for the scratch folder in results


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the runs of a table leave what they make.

    Attributes:
        results: folder of the JSON files, one a run: a file there says that the run is done.
        scratch: folder of adapters that other runs need, and of locks.
        data: what ``{data}`` stands for in recipes.
    """

    results: Path
    scratch: Path
    data: str = "{data}"

    def result(self, table: Table, run: Run) -> Path:
        """Return the file with a run's result."""
        return self.results / table.name / f"{run.name}.json"

    def lock(self, table: Table, run: Run) -> Path:
        """Return the file that a worker holds locked while it is at a run."""
        return self.scratch / table.name / f"{run.name}.lock"

    def folder(self, table: Table, run: Run) -> Path:
        """Return the folder with a run's adapter."""
        return self.scratch / table.name / run.name


def read_result(file: Path) -> dict[str, Any] | None:
    """Return a stored result, or None where the run is not done.

    Raises:
        LoraInitError: the file holds no result.
    """
    if not file.exists():
        return None
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise LoraInitError(f"{file} holds no result, delete it: {error}") from error


def has_diverged(result: Mapping[str, Any]) -> bool:
    """Tell whether a stored result is that of a run that diverged: it has no scores and no cost."""
    return result.get("status") == "diverged"
