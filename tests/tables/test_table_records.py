from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from lorainit.cli import main
from lorainit.errors import LoraInitError, NonFiniteError
from lorainit.tables import run_table as module
from lorainit.tables.folders import SCRATCH, TableFolders
from lorainit.tables.measured import Measured
from lorainit.tables.run_table import run_table
from lorainit.tables.table import Run, Table, build
from lorainit.tables.table_file import read_table
from lorainit.tables.table_page import table_page
from lorainit.tables.table_records import discard_changed, record

CONTENT = {
    "title": "T",
    "source": "S",
    "recipe": {
        "model": "benchmarks/small",
        "data": {"path": "{data}/rows"},
        "train": {"max_steps": 100, "learning_rate": 0.1},
    },
    "columns": {"C": {"task": "sst2"}},
    "rows": {
        "LoRA": {},
        "ABM": {"method": "abm", "method_options": {"teacher": "teacher:LoRA", "steps": 5}},
        "Continued": {"method": "continue", "method_options": {"folder": "teacher:LoRA"}},
        "Random": {"method": "random-b", "method_options": {"sizes": "drift:ABM"}},
    },
    "seeds": [0],
}
RESULT = {
    "metrics": {"accuracy": 0.5},
    "cost": {part: {"seconds": 1.0} for part in ("start", "training")},
    "init": {"details": {"drift": {"layer": 0.1}}},
}


def table(folder: Path, **changes) -> Table:
    content = copy.deepcopy(CONTENT)
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = content
        for parent in parents:
            inner = inner[parent]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    (folder / "t.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return read_table(folder / "t.yaml")


@pytest.fixture(params=["benchmarks", "../data", "/some/data"])
def place(request, tmp_path) -> TableFolders:
    return TableFolders(tmp_path / "results", tmp_path / "scratch", request.param)


@pytest.fixture
def done(place, tmp_path, monkeypatch) -> Table:
    """The table, every run of which is done, by a training that does nothing."""

    def train(recipe):
        Path(recipe.output, "adapter").mkdir()
        return RESULT | {"recipe": dataclasses.asdict(recipe)}

    monkeypatch.setattr(module, "train", train)
    run_table(table(tmp_path), place)
    return table(tmp_path)


def without_record(place: TableFolders) -> None:
    """Make the results such as they were before there were records."""
    found = table(place.results.parent)
    for run in (*found.runs(), Run("LoRA", "C", 100), Run("ABM", "C", 0)):
        file = place.result(found, run)
        stored = json.loads(file.read_text())
        if "needs" not in stored:
            continue
        teacher = f"{SCRATCH}/{found.name}/c/lora_own_100/adapter"
        meant = {"teacher:LoRA": teacher, "drift:ABM": {"layer": 0.1}}
        recipe = dataclasses.asdict(build(found, run, meant, "{data}", f"{SCRATCH}/{found.name}/{run.name}"))
        del recipe["data"]["packing"], recipe["match_lr"], stored["needs"]  # older than these fields, too
        recipe["gone"] = 1
        file.write_text(json.dumps(stored | {"recipe": recipe}))


def test_a_result_keeps_what_the_table_file_says_of_it_and_of_what_it_refers_to(done, place) -> None:
    stored = json.loads(place.result(done, Run("Random", "C", 0)).read_text())
    assert stored["recipe"]["model"] == "benchmarks/small"
    assert stored["recipe"]["data"]["path"] == "{data}/rows"
    assert stored["recipe"]["method"] == {"sizes": "drift:ABM"}
    abm = stored["needs"]["drift:ABM"]
    assert (abm["row"], abm["recipe"]["method_options"]) == ("ABM", {"teacher": "teacher:LoRA", "steps": 5})
    teacher = abm["needs"]["teacher:LoRA"]
    assert (teacher["seed"], teacher["recipe"]["seed"], teacher["needs"]) == (100, 100, {})
    assert stored["needs"] == record(done, Run("Random", "C", 0))["needs"]


CHANGES = [
    ({"recipe__train__max_steps": 60}, "row 'LoRA', .*lora_own_0.json .*train.max_steps was 100, .* says 60"),
    ({"recipe__train__max_steps": None}, "row 'LoRA', .*train.max_steps was 100, .* says nothing"),
    ({"recipe__train__warmup_steps": 6}, "row 'LoRA', .*train.warmup_steps was nothing, .* says 6"),
    ({"recipe__data__path": "{data}/else"}, "row 'LoRA', .*data.path was '{data}/rows', .* says '{data}/else'"),
    ({"recipe__lora_plus": 16}, "row 'LoRA', .*lora_plus was None, .* says 16"),
    ({"recipe__match_lr": True}, "row 'LoRA', .*match_lr was False, .* says True"),
    ({"columns__C__task": "rte"}, "row 'LoRA', column 'C': .*task was 'sst2', .* says 'rte'"),
    ({"rows__ABM__method_options__steps": 6}, "row 'ABM', .*abm_own_0.json .*method_options.steps was 5, .* says 6"),
    ({"rows__Random__method": "kaiming", "rows__Random__method_options": {}}, "row 'Random', .*method was .*sizes"),
]


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "before records"])
@pytest.mark.parametrize(("changes", "message"), CHANGES, ids=[next(iter(changes)) for changes, _ in CHANGES])
def test_a_result_of_another_recipe_is_refused_by_its_first_field(done, place, changes, message, recorded) -> None:
    if not recorded:
        without_record(place)
    changed = table(place.results.parent, **changes)
    for call in (
        lambda: Measured(changed, place),
        lambda: table_page(changed, place),
        lambda: run_table(changed, place),
    ):
        with pytest.raises(LoraInitError, match=f"{message}.*delete the file, or pass --redo"):
            call()


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "before records"])
def test_a_teachers_recipe_is_part_of_its_pupils(done, place, recorded) -> None:
    if not recorded:
        without_record(place)
    changed = table(place.results.parent, rows__LoRA={"lora": {"r": 4}}).selected(["Continued"])
    wanted = "in 'teacher:LoRA', lora.r" if recorded else "row 'LoRA', .*lora_own_100.json .* lora.r"
    with pytest.raises(LoraInitError, match=f"{wanted} was nothing, and the table file says 4"):
        table_page(changed, place)
    # a pupil does not take an adapter of another recipe, either
    place.result(changed, Run("Continued", "C", 0)).unlink()
    with pytest.raises(LoraInitError, match="row 'LoRA', .*lora_own_100.json .*lora.r was nothing"):
        run_table(changed, place)


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "before records"])
def test_what_says_the_same_is_no_change(done, place, recorded) -> None:
    if not recorded:
        without_record(place)
    same = table(
        place.results.parent,
        recipe__dtype="float32",
        recipe__match_lr=False,
        recipe__calibration={"samples": 256},
        recipe__train={"learning_rate": 0.1, "max_steps": 100.0},
        columns__C={"task": "sst2", "score": "loss", "times": 1.0},
        rows__More={"method": "pissa"},
        title="Another",
    )
    elsewhere = dataclasses.replace(place, scratch=Path("/other"), data="/else/where")
    assert len(Measured(same, elsewhere).results) == 4


def test_results_without_a_record_are_taken_and_counted(done, place) -> None:
    assert "carry no record" not in table_page(done, place)
    without_record(place)
    assert Measured(done, place).unrecorded() == 3  # LoRA's tells all: it has no teacher
    place.result(done, Run("LoRA", "C", 0)).write_text(json.dumps({"status": "diverged", "message": "nan"}))
    assert Measured(done, place).unrecorded() == 4
    assert "* 4 of the results carry no record of all that they were made from" in table_page(done, place)


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "before records"])
def test_only_what_has_changed_is_redone_with_all_that_depends_on_it(done, place, recorded) -> None:
    if not recorded:
        without_record(place)
    assert discard_changed(done, place) == []
    changed = table(place.results.parent, rows__ABM={"method": "abm", "method_options": {"teacher": "base"}})
    before = {path: path.stat().st_mtime_ns for path in place.results.rglob("*.json")}
    assert sorted(path.stem for path in discard_changed(changed, place)) == ["abm_own_0", "random_own_0"]
    run_table(changed, place)
    after = {path: path.stat().st_mtime_ns for path in place.results.rglob("*.json")}
    assert sorted(path.stem for path in after if after[path] != before[path]) == ["abm_own_0", "random_own_0"]
    assert Measured(changed, place).unrecorded() == (0 if recorded else 1)


def test_a_run_that_diverged_under_another_recipe_is_refused_too(place, tmp_path, monkeypatch) -> None:
    def train(recipe):
        raise NonFiniteError("the loss is nan")

    monkeypatch.setattr(module, "train", train)
    run_table(table(tmp_path).selected(["LoRA"]), place)
    with pytest.raises(LoraInitError, match="train.learning_rate was 0.1, and the table file says 0.01"):
        table_page(table(tmp_path, recipe__train__learning_rate=0.01), place)


def test_the_command_tells_what_has_changed_and_redoes_it(done, place, tmp_path, capsys) -> None:
    table(tmp_path, recipe__train__max_steps=60)
    command = ["table", str(tmp_path / "t.yaml"), "--row", "LoRA", "--data", place.data]
    command += ["--results", str(place.results), "--scratch", str(place.scratch)]
    assert main(command) == 1
    assert "train.max_steps was 100, and the table file says 60" in capsys.readouterr().err
    assert main([*command, "--redo"]) == 0
    assert "lora_own_0.json, made from another recipe\n" in capsys.readouterr().out
    assert main([*command, "--show"]) == 0
