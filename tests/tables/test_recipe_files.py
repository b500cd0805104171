from __future__ import annotations

from pathlib import Path

import pytest

from lorainit import cli, get_method
from lorainit.errors import LoraInitError
from lorainit.tables.recipe_files import write_recipes
from lorainit.tables.table import Run, build
from lorainit.tables.table_file import read_table
from lorainit.train.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
TABLES = sorted((RECIPES / "tables").glob("*.yaml"))


def parsed(file: Path) -> Recipe:
    """Return a recipe file as ``lorainit train`` reads it."""
    return Recipe(**cli._parse(["train", "--config", str(file)])[1])


def test_every_recipe_that_ships_is_one() -> None:
    files = [file for file in RECIPES.rglob("*.yaml") if file.parent.name not in ("bench", "evaluation", "tables")]
    assert len(files) >= 5
    for file in files:
        recipe = parsed(file)
        get_method(recipe.method, **recipe.method_options)


def test_the_recipe_for_t5_and_cola_is_the_tables_cell() -> None:
    table, run = read_table(RECIPES / "tables" / "t5_glue.yaml"), Run("ABM, LoRA teacher", "CoLA", 0)
    found = {"teacher:LoRA": "runs/teacher_t5_cola/adapter"}
    file = RECIPES / "abm" / "t5_cola.yaml"
    assert parsed(file) == build(table, run, found, "", "runs/abm_t5_cola")
    # and so is the teacher's, whose command the file's head tells
    lines = file.read_text().split("lorainit train ")[1].replace("\\\n#", "").split("\n")[0]
    _, options = cli._parse(["train", *lines.replace("recipes/abm/t5_cola.yaml", str(file)).split()])
    teacher = build(table, Run("LoRA", "CoLA", 100), {}, "", "runs/teacher_t5_cola")
    assert Recipe(**options) == teacher


@pytest.mark.parametrize("scale", ["paper", "small"])
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_cells_of_every_table_are_recipes_for_train(path, scale, tmp_path) -> None:
    table = read_table(path, scale)
    table = table.selected(list(table.rows)[:12], list(table.columns)[:1], list(table.seeds)[:1], list(table.rates)[:1])
    files, left = write_recipes(table, tmp_path, "data")
    assert {table.fields(run)["method"] for run in left} <= {"continue", "random-b"}
    for run in set(table.runs()) - set(left):
        file = tmp_path / f"{run.name}.yaml"
        found = {}
        for text, need in table.needs(run).items():
            recipe = tmp_path / f"{need.name}.yaml"
            assert files.index(recipe) < files.index(file)
            found[text] = f"{parsed(recipe).output}/adapter"
            assert f"# {found[text]} is made by {recipe}" in file.read_text()
        assert parsed(file) == build(table, run, found, "data", str(tmp_path / run.name))


def test_the_command_writes_recipes_and_says_for_what_there_is_none(tmp_path, capsys) -> None:
    command = [
        "table",
        str(RECIPES / "tables" / "t5_glue.yaml"),
        "--scale",
        "small",
        "--column",
        "CoLA",
        "--seeds",
        "0",
    ]
    command += ["--rates", "1e-3", "--write-recipe", str(tmp_path), "--row", "ABM, LoRA teacher", "Control: random B"]
    assert cli.main(command) == 1
    assert "its recipe names {data}; pass --data" in capsys.readouterr().err
    assert cli.main([*command, "--data", "some/data"]) == 0
    output, error = capsys.readouterr()
    names = ["lora_own_100", "abm-lora-teacher_0.001_0"]
    assert output.splitlines() == [f"wrote {tmp_path}/cola/{name}.yaml" for name in names]
    assert "cola/control-random-b_0.001_0: no recipe, only `lorainit table` carries out a control" in error
    assert parsed(tmp_path / "cola" / f"{names[0]}.yaml").data.path == "some/data/glue/cola"


def test_a_folder_for_the_data_is_asked_for_only_where_the_recipe_names_one(tmp_path) -> None:
    assert len(write_recipes(read_table(TABLES[0]), tmp_path, "{data}")[0]) > 0
    with pytest.raises(LoraInitError, match="row 'LoRA', column 'MRPC': its recipe names {data}"):
        write_recipes(read_table(TABLES[0], "small"), tmp_path, "{data}")
