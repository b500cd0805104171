"""Every published table on the small models and data that fit here; resumable, shareable.

    python benchmarks/experiments.py --data FOLDER              # all that is missing; start it twice for two workers
    python benchmarks/experiments.py --data FOLDER --mini       # a seed, a column, 20 steps, to runs/: do rows run?
    python benchmarks/experiments.py --only vtab t5_glue ...    # some tables
    python benchmarks/experiments.py --data FOLDER --redo       # what another recipe has made is run again
    python benchmarks/experiments.py --list                     # what is done, what is missing, and its hours
    python benchmarks/experiments.py --page                     # only docs/experiments.md, from the results there are

``FOLDER`` holds ``glue``, ``vtab`` and ``instruct`` in local parquet, and beside it ``models``; the backbones are those
of ``benchmarks/backbones``. One JSON a run goes to ``benchmarks/results/tables``, teachers' adapters to
``runs/tables``. Run from the repository's root.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from lorainit import LoraInitError
from lorainit.tables.folders import TableFolders
from lorainit.tables.measured import Measured
from lorainit.tables.run_table import run_table
from lorainit.tables.table import Table, merge
from lorainit.tables.table_file import read_table
from lorainit.tables.table_page import table_page
from lorainit.tables.table_records import discard_changed

RECIPES, PAGE = Path("recipes/tables"), Path("docs/experiments.md")
TABLES = ("t5_glue", "vtab", "vtab_ablation", "deberta_glue", "llama_wizardlm", "llama_math")
MINI_STEPS, MINI_ROWS = 20, 200
HEAD = """# The papers' tables, beside what was measured here

Made by `python benchmarks/experiments.py` from the JSON files in `benchmarks/results/tables/`. Where a machine with the
hub and an accelerator is at hand, `lorainit table recipes/tables/NAME.yaml` runs the same rows on the papers' models;
`--scale small` is what is shown here. *In italics* what the papers print, **for other models**: an absolute score here
says nothing about theirs, only the order of the rows could.

How to read it: the published tables compare rows at learning rates that differ or were not tuned for each row. So a
table with several rates comes twice, every row at its own best rate, and every row at the rate that is best for vanilla
LoRA. A gap is worth a look when it is larger than the deviations over seeds beside it, and when no control shows it
too: continuing the teacher, plain feature distillation, as many more training steps, a random B of the same size.

What the starts themselves cost on T5-base and ViT-B/16, the ABM-LoRA paper's table 6, stands in
[`init_cost.md`](../benchmarks/results/init_cost.md).
"""


def place(data: str, shortened: bool = False) -> TableFolders:
    results = Path("runs/tables/mini") if shortened else Path("benchmarks/results/tables")
    return TableFolders(results, Path("runs/tables"), data)


def mini(table: Table) -> Table:
    """Return a table cut to what proves that each row runs: the first seed and column, few steps."""
    short = {"train": {"max_steps": MINI_STEPS}, "data": {"eval_samples": MINI_ROWS}}
    rows = {name: _short(row) for name, row in table.rows.items()}
    if len(rows) > 30:
        rows = {name: rows[name] for name in list(rows)[:1] + list(rows)[1::12]}
    # a cross-task teacher needs its column too, but no run of its own there
    return dataclasses.replace(
        table,
        name=table.name.replace("-small", "-mini"),
        recipe=merge(table.recipe, short),
        rows=rows,
        seeds=table.seeds[:1],
        rates=(),
        chosen_columns=tuple(table.columns)[:1],
    )


def _short(row: dict[str, Any]) -> dict[str, Any]:
    row = merge(row, {"method_options": {"steps": 10}}) if row.get("method") == "abm" else row
    return merge(row, {"train": {"max_steps": MINI_STEPS + 5}}) if "max_steps" in row.get("train", {}) else row


def document() -> str:
    """Return docs/experiments.md."""
    tables = [table_page(read_table(RECIPES / f"{name}.yaml", "small"), place("{data}")) for name in TABLES]
    return "\n".join([HEAD, *tables])


def main(data: str | None, only: list[str], shortened: bool, listed: bool, paged: bool, redo: bool) -> None:
    """Run, or only tell."""
    here, working = place(data or "{data}", shortened), data is not None and not (listed or paged)
    if redo and not working:
        raise LoraInitError("--redo runs again what it removes: give --data, and neither --list nor --page")
    for name in TABLES if working and not redo else ():  # results of other recipes show before hours of work, not after
        Measured(read_table(RECIPES / f"{name}.yaml", "small"), here)
    for name in only:
        table = read_table(RECIPES / f"{name}.yaml", "small")
        table = mini(table) if shortened else table
        if working:
            for file in discard_changed(table, here) if redo else ():
                print(f"removed {file}, made from another recipe")
            run_table(table, here)
        measured = Measured(table, here)
        left = measured.hours()
        rest = "" if left is None else f", {left:.1f} hours of one worker are missing"
        print(f"{table.name}: {len(measured.results)} runs{rest}")
    if not listed:
        PAGE.write_text(document())
        print(PAGE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the data")
    parser.add_argument("--only", nargs="+", default=TABLES, choices=TABLES, help="only these tables")
    parser.add_argument("--mini", dest="shortened", action="store_true", help="only the short runs")
    parser.add_argument("--list", dest="listed", action="store_true", help="only count what is done and missing")
    parser.add_argument("--page", dest="paged", action="store_true", help="only write the page")
    parser.add_argument("--redo", action="store_true", help="run again what was made from another recipe")
    main(**vars(parser.parse_args()))
