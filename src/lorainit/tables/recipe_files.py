"""Writes the runs of a table as recipe files, each for ``lorainit train --config``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .controls import CONTROLS
from .evaluations import answering
from .table import DRIFT, Run, Table, filled, slug


def write_recipes(table: Table, folder: Path, data: str) -> tuple[list[Path], list[Run]]:
    """Write a recipe for every run of a table and for the runs that those need.

    A reference to another run becomes the path of that run's adapter; a comment names the recipe that makes it.

    Args:
        table: the table, its runs narrowed or not.
        folder: of the recipes; what they make goes there too.
        data: what ``{data}`` stands for.

    Returns:
        The files, each behind those that it needs; and the runs that have no recipe: controls, which only `run_table`
        carries out, and the runs that need one.

    Raises:
        LoraInitError: a recipe names ``{data}`` and no folder is given for it.
    """
    table.check_data(data)
    files: dict[Run, Path] = {}
    left = []
    for run in table.runs():
        if _has_recipe(table, run):
            _write(table, run, folder, data, files)
        else:
            left.append(run)
    return list(files.values()), left


def _has_recipe(table: Table, run: Run) -> bool:
    """Return whether `train` can carry out a run: it knows no controls, and a drift is no path."""
    needs = table.needs(run)
    if table.fields(run).get("method") in CONTROLS or any(text.startswith(DRIFT) for text in needs):
        return False
    return all(_has_recipe(table, need) for need in needs.values())


def _write(table: Table, run: Run, folder: Path, data: str, files: dict[Run, Path]) -> None:
    """Write a run's recipe after those of the runs that it needs, and add it to the files."""
    if run in files:
        return
    needs = table.needs(run)
    for need in needs.values():
        _write(table, need, folder, data, files)
    fields = table.fields(run)
    found = {text: str(folder / need.name / "adapter") for text, need in needs.items()}
    file, asked = folder / f"{run.name}.yaml", _write_evaluations(table, run, folder, data)
    lines = [
        f"{table.title}: {table.where(run)}, seed {run.seed}.",
        *(f"{found[text]} is made by {files[need]}: that one first." for text, need in needs.items()),
        f"  lorainit train --config {file}",
        *(f"  lorainit evaluate {name} --config {evaluation}" for name, evaluation in asked.items()),
    ]
    _dump(file, filled(fields, found, data) | {"output": str(folder / run.name)}, lines)
    files[run] = file


def _write_evaluations(table: Table, run: Run, folder: Path, data: str) -> dict[str, Path]:
    """Write the options of a run's benchmarks, for ``lorainit evaluate``; return {benchmark: file}."""
    fields, made, written = table.fields(run), folder / run.name, {}
    model = answering(filled(fields["model"], {}, data), fields.get("adapter", "lora"), made)
    for name, options in table.asked(run).items():
        written[name] = folder / f"{run.name}_{slug(name)}.yaml"
        _dump(written[name], filled(options, {}, data) | model | {"output": str(made / slug(name))}, [])
    return written


def _dump(file: Path, content: dict[str, Any], comments: list[str]) -> None:
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"# {line}\n" for line in comments) + text)
