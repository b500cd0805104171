"""The notebook in `examples/` runs from top to bottom, and prints what is committed with it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import notebook
import pytest
from pages import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
UNITS = {"ms", "min", "KiB", "MiB", "GiB"}


def words(cell: dict) -> list[str]:
    """The words of a cell's output without its numbers and units, which depend on the machine."""
    return [word for word in re.findall(r"[^\W\d_]{2,}", notebook.stored(cell)) if word not in UNITS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_prints_what_is_committed_with_it(path, tmp_path) -> None:
    again = Path(shutil.copy(path, tmp_path))
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", notebook.__file__, str(again)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    here, there = (notebook.code_cells(notebook.load(file)) for file in (again, path))
    assert [words(cell) for cell in here] == [words(cell) for cell in there]
    assert any(words(cell) for cell in there)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_its_outputs_are_whole_and_name_no_folder_of_a_machine(path) -> None:
    cells = notebook.code_cells(notebook.load(path))
    for cell in cells:
        assert not re.search(r"(?<![\w.:/])/\w+/\w|[A-Z]:\\|site-packages", notebook.stored(cell))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output["output_type"] == "stream" for cell in cells for output in cell["outputs"])


def test_there_is_a_notebook() -> None:
    assert [path.name for path in NOTEBOOKS] == ["start_diagnose_train.ipynb"]
