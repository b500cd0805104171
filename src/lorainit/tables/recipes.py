"""The runs of a table as recipe files, each for ``lorainit train --config``."""

from __future__ import annotations

from pathlib import Path

import yaml

from .controls import CONTROLS
from .table import DRIFT, Run, Table, filled


def write_recipes(table: Table, folder: Path, data: str) -> tuple[list[Path], list[Run]]:
    """Write a recipe for every run of a table and for the runs that those need.

    A reference becomes the path where the recipe of the run that it means leaves its adapter; a comment names that
    recipe.

    Args:
        table: the table, its runs narrowed or not.
        folder: of the recipes; what they make goes there too.
        data: what ``{data}`` stands for.

    Returns:
        The files, a needed one before those that need it; and the runs that have no recipe: controls, which only
        `work` carries out, and what needs one.

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
    """Tell whether `train` can carry out a run: it knows no controls, and a drift is no path."""
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
    file = folder / f"{run.name}.yaml"
    lines = [
        f"{table.title}: row '{run.row}', column '{run.column}', seed {run.seed}. Made from {table.name}.",
        *(f"{found[text]} is made by {files[need]}: that one first." for text, need in needs.items()),
        f"  lorainit train --config {file}",
    ]
    content = yaml.safe_dump(
        filled(fields, found, data) | {"output": str(folder / run.name)}, sort_keys=False, allow_unicode=True
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"# {line}\n" for line in lines) + content)
    files[run] = file
