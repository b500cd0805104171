"""``lorainit table``."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import LoraInitError
from .command import Command


def table(
    file: str,
    scale: str = "paper",
    row: list[str] | None = None,
    column: list[str] | None = None,
    seeds: list[int] | None = None,
    rates: list[float] | None = None,
    data: str = "{data}",
    results: str = "runs/tables/results",
    scratch: str = "runs/tables/scratch",
    show: bool = False,
    redo: bool = False,
    write_recipe: str | None = None,
) -> None:
    """Repeat a published table: carry out its missing runs, print what was measured beside what was printed.

    Started twice with the same folders, two workers share the runs.

    Args:
        file: table file, such as recipes/tables/t5_glue.yaml.
        scale: "paper", or "small" for the same rows on small models and local data.
        row: only these rows.
        column: only these columns.
        seeds: instead of the table's.
        rates: learning rates instead of the table's.
        data: the folder that stands for {data} in the table file.
        results: folder for one JSON a run; what is there is not run again.
        scratch: folder for adapters that other rows need.
        show: run nothing, only print the table.
        redo: first remove the chosen runs' results that were made from another recipe than the table file's.
        write_recipe: run nothing, only write the chosen runs' recipes to this folder, for `lorainit train --config`.
    """
    from pathlib import Path

    from ..tables.folders import TableFolders
    from ..tables.measured import Measured
    from ..tables.recipe_files import write_recipes
    from ..tables.run_table import run_table
    from ..tables.table_file import read_table
    from ..tables.table_page import table_page
    from ..tables.table_records import discard_changed

    if show + redo + (write_recipe is not None) > 1:
        raise LoraInitError("show, redo and write-recipe exclude each other")
    chosen = read_table(file, scale).selected(row, column, seeds, rates)
    folders = TableFolders(Path(results), Path(scratch), data)
    if write_recipe is not None:
        files, left = write_recipes(chosen, Path(write_recipe), data)
        for path in files:
            print(f"wrote {path}")
        for run in left:
            print(f"{run.name}: no recipe, only `lorainit table` carries out a control", file=sys.stderr)
        return
    if not show:
        chosen.check_data(data)  # before anything is removed or run
    if redo:
        for path in discard_changed(chosen, folders):
            print(f"removed {path}, made from another recipe")
    if not show:
        run_table(chosen, folders)
    print(table_page(chosen, folders))
    left = Measured(chosen, folders).hours()
    if left:
        print(f"missing: about {left:.1f} hours of one worker", file=sys.stderr)


def _add_options(parser: Any) -> None:
    parser.add_argument("file", type=str, help="table file, such as recipes/tables/t5_glue.yaml")
    for name, kind, what in (
        ("row", str, "only these rows"),
        ("column", str, "only these columns"),
        ("seeds", int, "instead of the table's"),
        ("rates", float, "learning rates instead of the table's"),
    ):
        parser.add_argument(f"--{name}", type=kind, nargs="+", help=what)
    own = {"file", "row", "column", "seeds", "rates", "show", "redo", "write_recipe"}
    parser.add_function_arguments(table, as_group=False, skip=own)
    parser.add_argument("--show", action="store_true", help="run nothing, only print the table")
    parser.add_argument(
        "--redo", action="store_true", help="first remove the results of another recipe than the table file's"
    )
    parser.add_argument(
        "--write-recipe",
        dest="write_recipe",
        metavar="FOLDER",
        type=str,
        help="run nothing, only write the runs' recipes there, for `lorainit train --config`",
    )


COMMAND = Command(table, _add_options)
