from __future__ import annotations

import json

import pytest
import yaml

from lorainit.errors import LoraInitError
from lorainit.tables.folders import TableFolders
from lorainit.tables.measured import Measured
from lorainit.tables.table import Run, Table
from lorainit.tables.table_file import read_table
from lorainit.tables.table_page import table_page

RATES = (1e-3, 1e-2, 1e-1)


def table(folder, **changes) -> Table:
    content = {"title": "T", "source": "S", "recipe": {"model": "m"}, "columns": {"C": {"task": "svhn"}}}
    content |= {"rows": {"LoRA": {}, "PiSSA": {"method": "pissa"}}, "seeds": [0, 1, 2], "rates": list(RATES)} | changes
    (folder / "t.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return read_table(folder / "t.yaml")


@pytest.fixture
def measured(tmp_path):
    """A table of two rows whose first seed searches, and what writes a score into its results."""
    found = Measured(table(tmp_path, search_seeds=1), TableFolders(tmp_path, tmp_path))

    def write(row: str, rate: float, score: float, seed: int = 0) -> None:
        file = found.folders.result(found.table, Run(row, "C", seed, rate))
        file.parent.mkdir(parents=True, exist_ok=True)
        cost = {part: {"seconds": 1.8} for part in ("start", "training")}
        file.write_text(json.dumps({"metrics": {"accuracy": score}, "cost": cost}))
        found.refresh()

    return found, write


def wanted(measured: Measured, row: str) -> dict[int, list[float | None]]:
    found: dict[int, list[float | None]] = {}
    for run in measured.wanted():
        if run.row == row:
            found.setdefault(run.seed, []).append(run.rate)
    return found


def test_other_seeds_run_at_the_best_of_the_row_and_of_the_reference_once_both_are_searched(measured) -> None:
    found, write = measured
    searching = {0: list(RATES)}
    assert found.hours() is None
    for rate, score in zip(RATES, (0.3, 0.5, 0.4), strict=True):
        assert (wanted(found, "LoRA"), wanted(found, "PiSSA")) == (searching, searching)
        write("LoRA", rate, score)
    assert wanted(found, "LoRA") == searching | {1: [1e-2], 2: [1e-2]}
    assert wanted(found, "PiSSA") == searching
    # one hour is 1000 runs: LoRA's 2, PiSSA's 3, and 2 rates for 2 seeds that are not known yet
    assert found.hours() == pytest.approx((2 + 3 + 4) / 1000)
    for rate, score in zip(RATES, (0.9, 0.5, 0.4), strict=True):
        write("PiSSA", rate, score)
    assert wanted(found, "PiSSA") == searching | {1: [1e-3, 1e-2], 2: [1e-3, 1e-2]}
    assert found.hours() == pytest.approx((2 + 4) / 1000)


def test_a_seed_that_does_not_search_cannot_move_the_best_rate(measured) -> None:
    found, write = measured
    for rate, score in zip(RATES, (0.3, 0.5, 0.4), strict=True):
        write("LoRA", rate, score)
    write("LoRA", 1e-2, 0.0, seed=1)
    assert found.best("LoRA", "C") == 1e-2


def test_a_rate_at_which_a_seed_diverged_is_not_the_best_and_its_cell_says_so(measured) -> None:
    found, write = measured
    for rate, score in zip(RATES, (0.3, 0.5, 0.4), strict=True):
        write("LoRA", rate, score)
    lost = found.folders.result(found.table, Run("LoRA", "C", 1, 1e-2))
    lost.write_text(json.dumps({"status": "diverged", "message": "nan"}))
    found.refresh()
    assert found.best("LoRA", "C") == 1e-2  # the seed does not search
    assert found.scores("LoRA", "C", 1e-2) == {0: 50.0}
    assert found.diverged("LoRA", "C", 1e-2) == {1}
    assert "| LoRA | 50.00, 1 diverged [0.01] |" in table_page(found.table, found.folders)
    all_search = Measured(table(found.folders.results), found.folders)
    assert all_search.best("LoRA", "C") == 1e-1


def test_without_search_seeds_every_seed_tries_every_rate(tmp_path) -> None:
    found = Measured(table(tmp_path), TableFolders(tmp_path, tmp_path))
    assert found.wanted() == found.table.runs()


def test_rows_without_rates_run_at_their_own(tmp_path) -> None:
    found = Measured(table(tmp_path, rates=[]), TableFolders(tmp_path, tmp_path))
    assert wanted(found, "LoRA") == {0: [None], 1: [None], 2: [None]}


@pytest.mark.parametrize("given", [0, 4, -1])
def test_a_number_of_seeds_that_there_is_not_is_refused(tmp_path, given) -> None:
    with pytest.raises(LoraInitError, match=f"search_seeds is {given}, not 1 to 3"):
        table(tmp_path, search_seeds=given)
