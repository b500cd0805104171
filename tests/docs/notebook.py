"""Runs a notebook's cells and keeps what they print.

python tests/docs/notebook.py examples/start_diagnose_train.ipynb    # writes its outputs anew
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def load(path: Path) -> dict[str, Any]:
    """Read a notebook."""
    return json.loads(path.read_text())


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: dict[str, Any]) -> list[str]:
    """Run the code cells in order, in one namespace, and return what each prints; a last expression is shown too."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for number, cell in enumerate(code_cells(notebook), start=1):
        *statements, last = ast.parse("".join(cell["source"])).body
        shown = isinstance(last, ast.Expr)
        body = ast.Module(statements if shown else [*statements, last], type_ignores=[])
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(body, f"cell {number}", "exec"), names)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
                if value is not None:
                    print(value)
        printed.append(out.getvalue())
    return printed


def stored(cell: dict[str, Any]) -> str:
    """Return what a cell printed when its outputs were written."""
    return "".join("".join(output["text"]) for output in cell["outputs"])


def main(path: Path) -> None:
    notebook = load(path)
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            printed = run(notebook)
        finally:
            os.chdir(here)
    for number, (cell, text) in enumerate(zip(code_cells(notebook), printed, strict=True), start=1):
        cell["execution_count"] = number
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell["outputs"] = [stream] if text else []
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
