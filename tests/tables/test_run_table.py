from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from lorainit.cli import main
from lorainit.errors import LoraInitError, NonFiniteError
from lorainit.tables import run_table as module
from lorainit.tables.folders import TableFolders
from lorainit.tables.measured import Measured
from lorainit.tables.run_table import carry_out, run_table
from lorainit.tables.table import Run
from lorainit.tables.table_file import read_table
from lorainit.tables.table_page import table_page
from runs import save_images, save_tiny_vit


@pytest.fixture(scope="module")
def table_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    save_tiny_vit(folder / "vit")
    save_images(folder / "images", rows=800)  # as many as the task draws
    abm = {"teacher": "teacher:LoRA", "steps": 2, "batch_size": 4, "report_batches": 0}
    content = {
        "title": "Tiny images",
        "source": "nowhere",
        "recipe": {
            "model": "{data}/vit",
            "data": {"path": "{data}/images", "eval_samples": 32},
            "train": {"max_steps": 2, "per_device_train_batch_size": 8, "disable_tqdm": True},
        },
        "columns": {"Digits": {"task": "svhn"}},
        "rows": {
            "LoRA": {},
            "ABM": {"method": "abm", "method_options": abm},
            "Continued": {"method": "continue", "method_options": {"folder": "teacher:LoRA"}},
            "Random B": {"method": "random-b", "method_options": {"sizes": "drift:ABM"}},
        },
        "published": {"LoRA": [12.5]},
        "seeds": [0],
        "rates": [1e-3, 1e-2],
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def done(table_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    table = read_table(table_file)
    place = TableFolders(folder / "results", folder / "scratch", str(table_file.parent))
    run_table(table, place)
    return table, place


def test_every_run_and_what_it_needs_leaves_one_result(done) -> None:
    table, place = done
    stored = {path.stem for path in (place.results / table.name).rglob("*.json")}
    rows = ("lora", "abm", "continued", "random-b")
    # beside the grid: the teacher, and the ABM run whose drift the random B takes
    assert stored == {f"{row}_{rate}_0" for row in rows for rate in ("0.001", "0.01")} | {"lora_own_100", "abm_own_0"}
    result = json.loads(place.result(table, Run("ABM", "Digits", 0, 1e-3)).read_text())
    assert (result["table"], result["row"], result["column"]) == ("tiny-paper", "ABM", "Digits")
    assert result["learning_rate"] == 1e-3
    assert str(place.data) not in json.dumps(result)
    assert [path.parent.name for path in place.scratch.rglob("adapter")] == ["lora_own_100"]


def test_controls_start_where_they_say(done, table_file) -> None:
    table, place = done
    abm = json.loads(place.result(table, Run("ABM", "Digits", 0)).read_text())["init"]["details"]["drift"]
    random = json.loads(place.result(table, Run("Random B", "Digits", 0, 1e-3)).read_text())["init"]
    assert abm
    for layer in random["layers"]:
        assert layer["relative_size"] == pytest.approx(abm[layer["name"]], rel=1e-3, abs=1e-7)


def test_what_is_done_is_not_done_again(done) -> None:
    table, place = done
    before = {path: path.stat().st_mtime_ns for path in place.results.rglob("*.json")}
    run_table(table, place)
    assert {path: path.stat().st_mtime_ns for path in place.results.rglob("*.json")} == before


def test_the_page_shows_the_best_rate_the_matched_one_and_what_was_published(done) -> None:
    table, place = done
    text = table_page(table, place)
    assert "8 of 8 runs" in text
    assert "*12.5*" in text
    assert "All rows at the rate that is best for LoRA" in text
    scores = {
        rate: json.loads(place.result(table, Run("LoRA", "Digits", 0, rate)).read_text())["metrics"]["accuracy"]
        for rate in (1e-3, 1e-2)
    }
    best = max(scores, key=scores.__getitem__)
    assert f"| LoRA | {100 * scores[best]:.2f} [{best:g}*]<br>*12.5* |" in text


def test_losses_are_better_when_lower_and_an_unknown_metric_is_refused(done) -> None:
    table, place = done
    losses = {
        rate: json.loads(place.result(table, Run("LoRA", "Digits", 0, rate)).read_text())["metrics"]["loss"]
        for rate in (1e-3, 1e-2)
    }
    best = Measured(dataclasses.replace(table, score="loss"), place).best("LoRA", "Digits")
    assert best == min(losses, key=losses.__getitem__)
    with pytest.raises(LoraInitError, match="column 'Digits' shows 'f1', but row 'LoRA' has only"):
        table_page(dataclasses.replace(table, score="f1"), place)


def test_a_column_may_have_a_score_of_its_own_and_the_page_names_it(done) -> None:
    table, place = done
    own = {"Digits": table.columns["Digits"] | {"score": "loss", "times": 1.0}}
    measured = Measured(dataclasses.replace(table, columns=own), place)  # what is scored is no part of a recipe
    losses = {
        rate: json.loads(place.result(table, Run("LoRA", "Digits", 0, rate)).read_text())["metrics"]["loss"]
        for rate in (1e-3, 1e-2)
    }
    best = min(losses, key=losses.__getitem__)
    assert measured.best("LoRA", "Digits") == best
    text = table_page(measured.table, place)
    assert "| row | Digits (loss) |" in text
    assert f"| LoRA | {losses[best]:.2f} [{best:g}*]<br>*12.5* |" in text


def test_a_row_that_fails_says_which_it_is_and_leaves_no_result(table_file, tmp_path) -> None:
    table = read_table(table_file)
    place = TableFolders(tmp_path / "results", tmp_path / "scratch", str(tmp_path))  # no model there
    with pytest.raises(
        LoraInitError, match=r"table 'tiny-paper', row 'LoRA', column 'Digits': .*cannot be loaded|no file"
    ):
        carry_out(table, Run("LoRA", "Digits", 0), place)
    assert not place.results.exists()


@pytest.mark.parametrize("data", [".", "data", "0", "data/", "/", ""])
def test_folders_are_named_only_where_a_text_is_a_path_into_them(table_file, tmp_path, monkeypatch, data) -> None:
    table, run = read_table(table_file), Run("LoRA", "Digits", 0)
    place = TableFolders(tmp_path / "results", tmp_path / "scratch", data)
    kept = {"data": 0.5, "text": "no data. 0", "near": f"{data.rstrip('/')}x", "none": "", "list": [1.0, None, True]}
    paths = {"file": f"{data.rstrip('/')}/vit", "output": str(place.folder(table, run))} if data else {}
    monkeypatch.setattr(module, "train", lambda recipe: kept | {"paths": [paths]})
    carry_out(table, run, place)
    result = json.loads(place.result(table, run).read_text())
    assert {key: result[key] for key in kept} == kept
    named = {"file": "{data}/vit", "output": "SCRATCH/tiny-paper/digits/lora_own_0"}
    assert result["paths"] == [named if data else {}]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("run.py --data ../some/data --only x", "run.py --data {data} --only x"),
        ("run.py --data=../some/data/", "run.py --data={data}/"),
        ("table '../some/data/glue' and ../some/data.", "table '{data}/glue' and {data}."),
        ("../some/data and ../some/data/x", "{data} and {data}/x"),
        ("cat ../some/database ../some/data-2 ../some/data.txt", None),
        ("cat /else/../some/data a../some/data", None),
        ("cat /made/here/x", "cat SCRATCH/x"),
    ],
)
def test_folders_are_named_in_the_middle_of_a_text_at_the_bounds_of_a_path(text, shown) -> None:
    folders = {"/made/here": "SCRATCH", "../some/data": "{data}"}
    assert module._portable({"command": text}, folders) == {"command": shown or text}


def test_a_folder_in_another_one_has_its_own_name() -> None:
    folders = {"/made": "SCRATCH", "/made/data/": "{data}"}
    assert module._portable(["/made/data/x", "cp /made/data/x /made/y"], folders) == [
        "{data}/x",
        "cp {data}/x SCRATCH/y",
    ]


def test_what_diverges_and_what_needs_it_is_done_and_shown_as_such(table_file, tmp_path, monkeypatch) -> None:
    def train(recipe):
        if recipe.train["learning_rate"] == 1e-2 or recipe.seed != 0:
            raise NonFiniteError("the loss is nan")
        return {"metrics": {"accuracy": 0.5}, "cost": {part: {"seconds": 1.0} for part in ("start", "training")}}

    monkeypatch.setattr(module, "train", train)
    table = read_table(table_file).selected(["LoRA", "Continued"])
    place = TableFolders(tmp_path / "results", tmp_path / "scratch", str(table_file.parent))
    table = dataclasses.replace(table, recipe=table.recipe | {"train": {"learning_rate": 1.0}})
    run_table(table, place)
    stored = json.loads(place.result(table, Run("Continued", "Digits", 0, 1e-3)).read_text())
    assert stored["status"] == "diverged"
    assert stored["message"] == "'teacher:LoRA' diverged: the loss is nan"
    assert (stored["table"], stored["row"], stored["column"]) == ("tiny-paper", "Continued", "Digits")
    measured = Measured(table, place)
    assert (measured.best("LoRA", "Digits"), measured.best("Continued", "Digits")) == (1e-3, None)
    assert measured.hours() == 0
    assert stored["recipe"]["train"]["learning_rate"] == 1e-3
    assert stored["needs"]["teacher:LoRA"]["seed"] == 100
    text = table_page(table, place)
    assert "| LoRA | 50.00 [0.001*]<br>*12.5* |" in text
    assert "| Continued | diverged |" in text
    assert "| Continued | diverged [0.001*] |" in text


def test_a_result_that_was_cut_short_is_named(done, tmp_path) -> None:
    table, place = done
    place = dataclasses.replace(place, results=tmp_path)
    file = place.result(table, Run("LoRA", "Digits", 0, 1e-3))
    file.parent.mkdir(parents=True)
    for text in ("", '{"metrics": {', "3"):
        file.write_text(text)
        with pytest.raises(LoraInitError, match="lora_0.001_0.json holds no result, delete it"):
            table_page(table, place)


def test_the_command_prints_the_table(done, table_file, capsys) -> None:
    table, place = done
    folders = ["--results", str(place.results), "--scratch", str(place.scratch)]
    assert main(["table", str(table_file), "--data", place.data, *folders]) == 0
    assert "## Tiny images" in capsys.readouterr().out
    assert main(["table", str(table_file), "--row", "None", *folders]) == 1
    assert "has no row 'None'" in capsys.readouterr().err
    assert main(["table", str(table_file), "--show", "--redo"]) == 1
    assert "show, redo and write-recipe exclude each other" in capsys.readouterr().err
