from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "benchmarks/results/reference"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_headline_table_is_that_of_the_committed_report() -> None:
    report = (REFERENCE / "report.md").read_text()
    start = report.index("| start | tuned |")
    assert report[start : report.index("\n\n", start)] in (ROOT / "README.md").read_text()


def test_the_committed_report_is_of_a_finished_suite_with_five_rates_and_three_seeds_for_each_start() -> None:
    rows = list(csv.DictReader((REFERENCE / "report.csv").read_text().splitlines()))
    assert len(rows) == 19 * 9
    assert sum(int(row["missing"]) for row in rows) == 0
    for row in rows:
        assert int(row["loss_count"]) >= 3, row
        folder = REFERENCE / Path(row["trials"].split()[0]).parent
        searched = {re.search(r"_lr(.*?)_s0_", f.name).group(1) for f in folder.glob(f"{row['method']}_lr*_s0_*")}
        assert len([rate for rate in searched if not rate.endswith(("_matched", "_bounded"))]) >= 5, row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_are_there(page) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
