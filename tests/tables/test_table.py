from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lorainit.errors import LoraInitError
from lorainit.tables.controls import Continue
from lorainit.tables.table import Run, build
from lorainit.tables.table_file import read_table
from lorainit.tasks import TASKS

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "tables").glob("*.yaml"))
CONTENT = {
    "title": "A table",
    "source": "somewhere",
    "recipe": {"model": "some/model", "lora": {"r": 8}, "train": {"learning_rate": 1e-4}},
    "columns": {"One": {"task": "sst2"}, "Two": {"task": "cola"}},
    "rows": {
        "LoRA": {},
        "ABM": {
            "method": "abm",
            "method_options": {"teacher": "teacher:LoRA", "steps": 5},
            "lora": {"r": 4},
            "cells": {"Two": {"method_options": {"teacher": "teacher:LoRA@One"}}},
        },
        "Random": {"method": "random-b", "method_options": {"sizes": "drift:ABM"}},
        "Continued": {"method": "continue", "method_options": {"folder": "teacher:LoRA"}},
    },
    "published": {"LoRA": [1.0, None]},
    "small": {
        "recipe": {"model": "{data}/small"},
        "columns": {"Three": {"task": "rte"}},
        "rows": {"ABM": {"cells": {"Two": None}}, "Random": None, "More": {"train": {"max_steps": 3}}},
        "seeds": [7],
        "rates": [0.1, 0.2],
    },
}


@pytest.fixture
def file(tmp_path):
    def write(changes=None):
        path = tmp_path / "a_table.yaml"
        path.write_text(yaml.safe_dump(CONTENT | (changes or {}), sort_keys=False))
        return path

    return write


def test_a_runs_recipe_is_the_shared_one_with_column_row_and_cell_laid_over_it(file) -> None:
    table = read_table(file())
    fields = table.fields(Run("ABM", "Two", 3, 1e-2))
    assert fields["model"] == "some/model"
    assert fields["task"] == "cola"
    assert fields["lora"] == {"r": 4}
    assert fields["method_options"] == {"teacher": "teacher:LoRA@One", "steps": 5}
    assert fields["train"] == {"learning_rate": 1e-2}
    assert fields["seed"] == 3
    assert table.fields(Run("LoRA", "One", 0))["train"] == {"learning_rate": 1e-4}
    assert table.recipe == CONTENT["recipe"]


def test_references_name_the_runs_that_have_to_be_done_before(file) -> None:
    table = read_table(file())
    assert table.needs(Run("LoRA", "One", 0)) == {}
    assert table.needs(Run("ABM", "Two", 0, 0.1)) == {"teacher:LoRA@One": Run("LoRA", "One", 100)}
    assert table.needs(Run("Random", "Two", 0, 0.1)) == {"drift:ABM": Run("ABM", "Two", 0)}
    assert Run("LoRA", "One", 101) in table.teachers()
    assert not any(run.row == "ABM" for run in table.teachers())


def test_references_are_filled_in_and_controls_become_methods(file) -> None:
    table = read_table(file())
    recipe = build(table, Run("ABM", "One", 0), {"teacher:LoRA": "some/folder"}, "data", "out")
    assert recipe.method_options == {"teacher": "some/folder", "steps": 5}
    assert recipe.output == "out"
    continued = build(table, Run("Continued", "One", 0), {"teacher:LoRA": "some/folder"}, "data")
    assert continued.method == Continue("some/folder")
    sizes = build(table, Run("Random", "One", 0), {"drift:ABM": {"layer": 0.1}}, "data").method
    assert sizes.sizes == {"layer": 0.1}


def test_the_small_scale_lies_over_the_papers(file) -> None:
    table = read_table(file(), "small")
    assert table.name == "a_table-small"
    assert list(table.columns) == ["Three"]
    assert list(table.rows) == ["LoRA", "ABM", "Continued", "More"]
    assert table.seeds == (7,)
    assert len(table.runs()) == 4 * 2
    assert build(table, Run("More", "Three", 7), {}, "folder").model == "folder/small"


def test_runs_can_be_narrowed(file) -> None:
    table = read_table(file()).selected(["LoRA"], ["Two"], [5, 6], [1e-3])
    assert table.runs() == [Run("LoRA", "Two", seed, 1e-3) for seed in (5, 6)]
    with pytest.raises(LoraInitError, match=r"has no row 'LoRO', only \['LoRA'"):
        table.selected(["LoRO"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colums": {}}, r"unknown fields \['colums'\]"),
        ({"rows": {"A": {"methd": "abm"}}}, "row 'A', column 'One': .*methd"),
        ({"rows": {"A": {"data": {"pth": "x"}}}}, "row 'A', column 'One': .*pth"),
        ({"rows": {"A": {"method_options": {"teacher": "teacher:B"}}}}, "'teacher:B' names no row and column"),
        ({"rows": {"A": {"method": "continue", "method_options": {"x": 1}}}}, "row 'A', column 'One': .*x"),
        ({"rows": {"A": {"method_options": {"teacher": "teacher:A"}}}}, "row 'A', column 'One' is its own teacher"),
        ({"rows": {"A (b)": {}, "A b": {}}}, "would have the same file name 'a-b'"),
        ({"published": {"LoRA": [1.0]}}, "published row 'LoRA' has 1 values"),
        ({"small": {}}, "has no scale 'small'"),
        ({"rows": {"A": {"cells": {"one": {}}}}, "published": {}}, "row 'A', cells: there is no column 'one', only"),
        ({"reference": "Lora"}, "reference: there is no row 'Lora', only"),
        ({"published": {"Lora": [1.0, 2.0]}}, "published: there is no row 'Lora', only"),
        ({"columns": {"r 8": {"task": "sst2"}, "R-8": {"task": "cola"}}}, "the columns .* the same file name 'r-8'"),
        ({"rows": [{"LoRA": {}}]}, r"rows must be {name: fields of a recipe}, not \[{'LoRA'"),
        ({"rows": {8: {}}}, "rows must be {name: fields of a recipe}, not {8"),
        ({"rows": {}}, "has no rows"),
        ({"columns": None}, "columns must be {name: fields of a recipe}, not None"),
        ({"published": {"LoRA": 1}}, "published must be {row: one number or text a column}, not"),
        ({"rates": ["fast"]}, r"rates must be a list of numbers, not \['fast'\]"),
        ({"seeds": 3}, "seeds must be a list of whole numbers, not 3"),
        ({"small": {"seeds": 3}}, "small: seeds must be a list of whole numbers, not 3"),
        ({"small": None}, "small must be fields of a table file, not None"),
        ({"rows": {"A": {"method": "pisa"}}}, "row 'A', column 'One': unknown method 'pisa'"),
        ({"columns": {"A": {"task": "sst3"}, "B": {"task": "cola"}}}, "row 'LoRA', column 'A': .*sst3"),
    ],
    ids=[
        "field",
        "recipe field",
        "nested field",
        "reference",
        "control option",
        "circle",
        "same file",
        "published",
        "scale",
        "cell",
        "reference row",
        "published row",
        "same column file",
        "list of rows",
        "number for a row",
        "no rows",
        "no columns",
        "published number",
        "rate",
        "seeds",
        "small seeds",
        "small null",
        "method",
        "task",
    ],
)
def test_a_wrong_table_file_is_refused_by_name(file, changes, message) -> None:
    with pytest.raises(LoraInitError, match=message):
        read_table(file(changes), "small" if "small" in changes else "paper")


def test_a_file_that_is_none_is_refused(tmp_path) -> None:
    with pytest.raises(LoraInitError, match="there is no table file"):
        read_table(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(LoraInitError, match="lacks some of title, source, columns, rows"):
        read_table(tmp_path / "list.yaml")


@pytest.mark.parametrize("scale", ["paper", "small"])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_table_of_the_project_can_be_built_at_both_scales(path, scale) -> None:
    from lorainit.methods import get_method

    table = read_table(path, scale)
    for run in table.selected(seeds=list(table.seeds)[:1], rates=[]).runs():
        found = {text: {} if text.startswith("drift") else "folder" for text in table.needs(run)}
        recipe = build(table, run, found, "data")
        get_method(recipe.method, **recipe.method_options)
        assert recipe.task in TASKS or recipe.task == "wizardlm"
    assert set(table.published) <= set(table.rows)
