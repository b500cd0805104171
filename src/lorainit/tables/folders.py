"""Names the folders and files of a table's runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .table import Run, Table

SCRATCH = "SCRATCH"  # what results have in place of the scratch folder's path


@dataclasses.dataclass(frozen=True)
class TableFolders:
    """The folders of a table's runs.

    Attributes:
        results: folder of the JSON files, one a run.
        scratch: folder of adapters that other runs need, and of locks.
        data: the folder that ``{data}`` in recipes stands for.
    """

    results: Path
    scratch: Path
    data: str = "{data}"

    def result(self, table: Table, run: Run) -> Path:
        """Return the file with a run's result."""
        return self.results / table.name / f"{run.name}.json"

    def lock(self, table: Table, run: Run) -> Path:
        """Return the file that a process keeps locked while it carries out a run."""
        return self.scratch / table.name / f"{run.name}.lock"

    def folder(self, table: Table, run: Run) -> Path:
        """Return the folder with a run's adapter."""
        return self.scratch / table.name / run.name
