from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from lorainit import LoraInitError
from lorainit.bench import load
from lorainit.bench.search import Point
from lorainit.bench.suite import CONTROLS, MethodEntry, Search, read
from lorainit.bench.trial import cells, command, located, trial
from lorainit.cli import _parse, train
from tiny_suite import SUITE

BASE = """
name: x
methods: [loram, {label: exact, method: pissa, options: {exact: true}, center: -2}]
models:
  - label: m
    model: root:models/m
    tasks: [{task: sst2, data: {path: "root:sst2"}}]
train: {learning_rate: 1e-4, max_steps: 5}
"""


def written(tmp_path, text: str) -> Path:
    (tmp_path / "suite.yaml").write_text(text)
    return tmp_path / "suite.yaml"


def test_controls_come_first_and_are_never_left_out(tmp_path) -> None:
    labels = [entry.label for entry in load(written(tmp_path, BASE)).entries()]
    assert labels == ["kaiming", "rslora", "init-ab", "random", "loram", "exact"]
    own = BASE.replace("[loram,", "[{label: init-ab, options: {c_b: 2.0}}, loram,")
    entries = {entry.label: entry for entry in load(written(tmp_path, own)).entries()}
    assert len(entries) == 6
    assert entries["init-ab"].options == {"c_b": 2.0}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("loram,", "lorm,", "methods: lorm: unknown method 'lorm'; did you mean 'loram'"),
        ("exact: true", "exactly: true", r"methods: exact: method 'pissa' has no option \['exactly'\]"),
        ("task: sst2", "task: sst3", "models: m: tasks: sst3: unknown task 'sst3'"),
        ("name: x", "nme: x", "nme"),
        ("model: root:models/m", "modle: a", "modle"),
        ("name: x", "name: x\nranks: []", "ranks is empty"),
        ("name: x", "name: x\nseeds: [1, 1]", "seeds: 1 stands there twice"),
        ("name: x", "name: x\nranks: [0]", "ranks: 0 is below 1"),
        ("name: x", "name: x\nsearch: {schedule: grid, exponents: []}", "search.exponents is empty"),
        ("name: x", "name: x\nsearch: {schedule: random}", "schedule"),
        ("name: x", "name: x\nsearch: {unit: 0}", "search: unit must be positive"),
        ("{task: sst2,", "{task: sst2, search: {unit: 0},", "models: m: tasks: sst2: search: unit must be positive"),
        ("{task: sst2,", "{task: sst2, search: {schedule: asha, exponents: []},", "search.exponents is empty"),
        ("name: x", "name: x\ndiagnosis: null", "'suggested' needs the diagnosis"),
        ("name: x", "name: x\ncompare: [bounded]", "'bounded' needs the diagnosis with curvature: true"),
        ("name: x", "name: x\nimports: [no_such_module]", "module 'no_such_module' cannot be imported"),
        ("name: x", "name: x\nresources: {workers: 0}", "workers must be at least 1"),
        ("loram,", "loram, loram,", "methods: loram stands there twice"),
        ("label: m", "label: a/b", "models: label 'a/b' cannot be a folder's name"),
        ("{task: sst2,", "{task: sst2, forgetting: {task: text},", "causal language model only"),
        ('tasks: [{task: sst2, data: {path: "root:sst2"}}]', "tasks: []", "models: m: tasks is empty"),
    ],
    ids=lambda value: None,
)
def test_a_wrong_suite_is_refused_by_one_line_that_names_the_place(tmp_path, old, new, message) -> None:
    assert old in BASE
    with pytest.raises(LoraInitError, match=message) as caught:
        load(written(tmp_path, BASE.replace(old, new)))
    assert "suite.yaml" in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(LoraInitError, match=r"there is no suite no\.yaml"):
        load("no.yaml")


@pytest.mark.parametrize("name", ["quick", "reference", "learning_rates", "cluster"])
def test_every_suite_that_ships_is_one(name) -> None:
    suite = load(Path(__file__).parents[2] / f"recipes/bench/{name}.yaml")
    assert suite.name == name
    assert {entry.label for entry in CONTROLS} <= {entry.label for entry in suite.entries()}
    assert all(len(cell.final_seeds) >= 3 for cell in cells(suite))


def test_the_learning_rate_suite_shares_its_trials_with_the_reference() -> None:
    shared, own = (load(Path(__file__).parents[2] / f"recipes/bench/{n}.yaml") for n in ("reference", "learning_rates"))
    assert {cell.name for cell in cells(own)} < {cell.name for cell in cells(shared)}
    assert [cell.search.schedule for cell in cells(own)] == ["grid", "grid", "grid", "bracket", "bracket"]


@pytest.mark.parametrize(("given", "expected"), [(None, [0, 1]), ([2, 3], [2, 3]), ([], [])])
def test_the_final_seeds_are_compared_unless_the_search_says_which(given, expected) -> None:
    suite = dataclasses.replace(SUITE, search=Search(compare_seeds=given))
    assert [cell.comparison_seeds for cell in cells(suite)] == [expected]


def test_a_suite_survives_the_folder_of_results(tmp_path) -> None:
    from lorainit.bench.results import write_json
    from lorainit.bench.run import description

    write_json(tmp_path / "suite.json", description(SUITE))
    assert read(tmp_path / "suite.json") == SUITE


def test_the_key_names_all_that_decides_the_numbers_and_nothing_else() -> None:
    cell, entry, point = cells(SUITE)[0], MethodEntry("pissa"), Point(1e-3, 0)
    key = trial(cell, entry, point).key
    assert trial(cells(dataclasses.replace(SUITE, name="other", methods=["eva"]))[0], entry, point).key == key
    others = [
        trial(cell, entry, Point(2e-3, 0)).key,
        trial(cell, entry, Point(1e-3, 1)).key,
        trial(cell, entry, Point(1e-3, 0, matched=True)).key,
        trial(cell, entry, Point(1e-3, 0, matched="curvature")).key,
        trial(cell, MethodEntry("pissa", options={"exact": True}), point).key,
        trial(cell, MethodEntry("pissa", base="keep"), point).key,
        trial(cells(dataclasses.replace(SUITE, train=SUITE.train | {"max_steps": 5}))[0], entry, point).key,
        trial(cells(dataclasses.replace(SUITE, ranks=[2]))[0], entry, point).key,
    ]
    assert len({key, *others}) == len(others) + 1


def test_a_path_below_the_root_needs_one() -> None:
    recipe = cells(SUITE)[0].recipe(MethodEntry("kaiming"), Point(1.0, 0))
    assert located(recipe, "/data/").model == "/data/bert"
    assert located(recipe, "/data").data.path == "/data/sst2"
    with pytest.raises(LoraInitError, match="pass --root"):
        located(recipe, None)


@pytest.mark.parametrize("matched", [True, "curvature"])
def test_the_command_repeats_the_recipe(matched) -> None:
    import shlex

    from lorainit.training import Recipe

    entry = MethodEntry("exact", method="pissa", options={"exact": True}, lora={"use_rslora": True})
    recipe = cells(SUITE)[0].recipe(entry, Point(0.002, 1, matched=matched))
    function, options = _parse(shlex.split(command(recipe))[1:])
    assert function is train
    again = Recipe(**{k: v for k, v in options.items() if k != "resume"})
    assert dataclasses.replace(again, output=recipe.output, lora=recipe.lora, train=recipe.train) == recipe
    assert recipe.lora.items() >= again.lora.items()
    assert recipe.train.items() >= again.train.items()
    assert again.train["learning_rate"] == 0.002


def test_a_third_partys_method_gets_a_row(tmp_path, monkeypatch) -> None:
    (tmp_path / "their_starts.py").write_text(
        "import dataclasses, lorainit\n"
        "@lorainit.register\n@dataclasses.dataclass(frozen=True)\n"
        "class Theirs(lorainit.Kaiming):\n"
        "    info = dataclasses.replace(lorainit.Kaiming.info, name='theirs', aliases=())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from lorainit.methods import registry

    before = dict(registry._METHODS)
    try:
        text = BASE.replace("loram,", "theirs,").replace("name: x", "name: x\nimports: [their_starts]")
        assert "theirs" in [entry.label for entry in load(written(tmp_path, text)).entries()]
    finally:
        registry._METHODS.clear()
        registry._METHODS.update(before)
        sys.modules.pop("their_starts", None)


def test_each_schedule_has_its_defaults() -> None:
    assert Search().schedule == "bracket"
    assert dataclasses.replace(Search(), schedule="asha").reduction == 3.0
