"""The README and the pages of the documentation: figures, links, the map of the house."""

from __future__ import annotations

import ast
import csv
import re
from pathlib import Path

import pytest
from pages import PAGES, REPOSITORY, ROOT, blocks, name

import lorainit

REFERENCE = ROOT / "benchmarks/results/reference"
# made by the scripts that they name, or added to by every piece of work
MADE = {"docs/abm.md", "docs/experiments.md", "docs/learning_rates.md", "docs/log.md"}


def test_the_headline_table_is_that_of_the_committed_report() -> None:
    report = (REFERENCE / "report.md").read_text()
    start = report.index("| start | tuned |")
    assert report[start : report.index("\n\n", start)] in (ROOT / "docs/results.md").read_text()


def test_the_committed_report_is_of_a_finished_suite_with_five_rates_and_three_seeds_for_each_start() -> None:
    rows = list(csv.DictReader((REFERENCE / "report.csv").read_text().splitlines()))
    assert len(rows) == 19 * 9
    assert sum(int(row["missing"]) for row in rows) == 0
    for row in rows:
        assert int(row["loss_count"]) >= 3, row
        folder = REFERENCE / Path(row["trials"].split()[0]).parent
        searched = {re.search(r"_lr(.*?)_s0_", f.name).group(1) for f in folder.glob(f"{row['method']}_lr*_s0_*")}
        assert len([rate for rate in searched if not rate.endswith(("_matched", "_bounded"))]) >= 5, row


def test_what_the_readme_says_of_the_evidence_is_what_the_report_counts() -> None:
    rows = csv.DictReader((REFERENCE / "report.csv").read_text().splitlines())
    compared = [row for row in rows if row["method"] != "kaiming"]
    decided = [row for row in compared if row["p_holm"] and float(row["p_holm"]) < 0.05]
    better = sum(float(row["difference_mean"]) < 0 for row in decided)
    assert (len(compared), better, len(decided) - better) == (162, 1, 9)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "Of 162 comparisons with it on nine small tasks" in readme
    assert "one was better beyond chance and nine were worse" in readme


def test_the_readme_is_short_and_installs_from_where_the_package_is() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    for page in PAGES:
        for line in re.findall(r"pip install .*", page.read_text()):
            assert " @ git+" in line or not re.match(r"pip install (-U )?'?lorainit\b", line), f"{name(page)}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_that_are_there(page) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if target.startswith(f"{REPOSITORY}/blob/main/"):
            assert (ROOT / target.removeprefix(f"{REPOSITORY}/blob/main/")).exists(), target
        elif "://" not in target:
            # the README is shown where there is no repository around it
            assert page.name != "README.md", f"{target} leads nowhere outside the repository"
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [page for page in PAGES if name(page) not in MADE], ids=name)
def test_pages_wrap_at_120_columns(page) -> None:
    text = page.read_text()
    long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|") and "](http" not in line]
    assert not long


def test_the_map_names_files_that_are_there_and_what_they_define() -> None:
    rows = re.findall(r"^\| (.*\?) \| `([\w/.]+)` \| `(\w+)` \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(rows) >= 10
    for question, file, defined in rows:
        assert (ROOT / file).is_file(), f"{question} {file} is not there"
        names = [getattr(node, "name", None) for node in ast.parse((ROOT / file).read_text()).body]
        assert defined in names, f"{question} {file} does not define {defined}"


def test_the_tests_that_the_support_page_names_are_there() -> None:
    named = set(re.findall(r"`((?:[\w/]+/)?test_\w+\.py)`", (ROOT / "docs/support.md").read_text()))
    assert len(named) > 20
    assert not {path for path in named if not (ROOT / path).is_file()}


def test_the_reference_has_every_public_name() -> None:
    listed = set(re.findall(r"^::: lorainit\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE))
    methods = {name for name in lorainit.__all__ if getattr(getattr(lorainit, name), "info", None)}
    assert listed | methods | {"methods", "offset", "__version__"} == set(lorainit.__all__)


def test_every_python_block_of_the_documentation_is_one_that_is_run() -> None:
    from test_snippets import RUN

    for page in PAGES:
        if blocks(page.read_text(), "python"):
            # tests/methods/test_new_start.py holds this one against the example that it shows
            assert name(page) in RUN or name(page) == "docs/new_start.md", page
