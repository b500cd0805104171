from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from lorainit import LoraInitError
from lorainit.bench import load
from lorainit.bench.search import Point
from lorainit.bench.suite import CONTROLS, MethodEntry, Search, read
from lorainit.bench.suite_checks import check_folders
from lorainit.bench.trial import cells, command, located, trial
from lorainit.cli import _parse, main
from lorainit.cli.train import train
from tiny_suite import SUITE

BASE = """
name: x
methods: [loram, {label: exact, method: pissa, options: {exact: true}, center: -2}]
models:
  - label: m
    model: root:models/m
    tasks: [{task: sst2, data: {path: "root:sst2"}}]
train: {weight_decay: 1e-4, max_steps: 5}
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
        ("name: x", "name: x\nsearch: {unit: 0}", "search: unit: 0 is no positive number"),
        ("{task: sst2,", "{task: sst2, search: {unit: 0},", "models: m: tasks: sst2: search: unit: 0 is no"),
        ("{task: sst2,", "{task: sst2, search: {schedule: asha, exponents: []},", "search.exponents is empty"),
        ("name: x", "name: x\ndiagnosis: null", "'suggested' needs the diagnosis"),
        ("name: x", "name: x\ncompare: [bounded]", "'bounded' needs the diagnosis with curvature: true"),
        ("name: x", "name: x\nimports: [no_such_module]", "module 'no_such_module' cannot be imported"),
        ("name: x", "name: x\nresources: {workers: 0}", "workers must be at least 1"),
        ("loram,", "loram, loram,", "methods: loram stands there twice"),
        ("label: m", "label: a/b", "models: label 'a/b' cannot be a folder's name"),
        ("{task: sst2,", "{task: sst2, forgetting: {task: text},", "causal language model only"),
        ('tasks: [{task: sst2, data: {path: "root:sst2"}}]', "tasks: []", "models: m: tasks is empty"),
        ("name: x", "name: x\nsearch: {final_seeds: [1, 1]}", r"search.final_seeds: 1 stands there twice$"),
        ("name: x", "name: x\nsearch: {final_seeds: []}", "search.final_seeds is empty"),
        ("name: x", "name: x\nsearch: {compare_seeds: [0, 0]}", "search.compare_seeds: 0 stands there twice"),
        (
            "name: x",
            "name: x\nsearch: {final_seeds: [3, 4], compare_seeds: [0, 3]}",
            r"search: compare_seeds: \[0\] are not among the seeds at the tuned rate, \[3, 4\]",
        ),
        ("name: x", "name: x\nsearch: {compare_seeds: [7]}", r"\[7\] are not among .*, \[0, 1, 2\]"),
        ("name: x", "name: x\nsearch: {finalists: 0}", "search: finalists: 0 is below 1"),
        ("name: x", "name: x\nsearch: {stride: 0}", "search: stride: 0 is below 1"),
        ("{task: sst2,", "{task: sst2, search: {reduction: 1},", "tasks: sst2: search: reduction: 1 is below 2"),
        ("name: x", "name: x\nsearch: {schedule: asha, grace: 0}", "search: grace: 0 is below 1"),
        ("name: x", "name: x\nsearch: {schedule: asha}", "models: m: tasks: sst2: asha needs train.max_steps"),
        (
            "max_steps: 5}",
            "max_steps: 5, eval_strategy: steps, eval_steps: 5}\nsearch: {schedule: asha}",
            "models: m: tasks: sst2: search.grace: 1 × 5 steps are no less than max_steps, 5",
        ),
        ("{task: sst2,", "{task: sst2, metric: acuracy,", r"sst2: .*no metric 'acuracy'; its metrics: \['accuracy'\]"),
        ("{task: sst2,", "{task: stsb, metric: accuracy,", r"its metrics: \['pearson'\]"),
        ("{task: sst2,", "{task: text, metric: accuracy,", "none beside the loss; leave metric out"),
        ("max_steps: 5", "max_step: 5", "train: 'max_step' is no field of .*; did you mean 'max_steps'"),
        ("max_steps: 5", "seed: 5", "train: 'seed' is no field .* that can be set here"),
        ("max_steps: 5", "learning_rate: 1.0", "train: 'learning_rate' is no field .* that can be set here"),
        ("max_steps: 5", "resume_from_checkpoint: true", "train: 'resume_from_checkpoint' is no field"),
        ("name: x", "name: x\nlora: {r: 16}", "lora: a suite's ranks stand in `ranks`, not in r"),
        ("label: m", "label: m\n    lora: {r: 16}", "models: m: lora: a suite's ranks stand in `ranks`"),
        ("label: m", "label: .m", "models: label '.m' cannot be a folder's name; .* begins with no dot"),
        ("{task: sst2,", "{task: sst2, train: {bf61: true},", "models: m: tasks: sst2: train: 'bf61' is no field"),
        ("label: m", "label: m\n    train: {zzz: 1}", "models: m: train: 'zzz' is no field"),
        ("label: m", "label: m\n    lora: {alpha: 1}", "models: m: lora: 'alpha' is no field of peft.LoraConfig"),
        ("loram,", "{label: loram, lora: {rslora: true}},", "methods: loram: lora: 'rslora' is no field"),
    ],
    ids=lambda value: None,
)
def test_a_wrong_suite_is_refused_by_one_line_that_names_the_place(tmp_path, old, new, message) -> None:
    assert old in BASE
    with pytest.raises(LoraInitError, match=message) as caught:
        load(written(tmp_path, BASE.replace(old, new)))
    assert "suite.yaml" in str(caught.value)


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_every_metric_of_a_task_may_be_shown(tmp_path, metric) -> None:
    own = BASE.replace("{task: sst2,", f"{{task: mrpc, metric: {metric},")
    assert load(written(tmp_path, own)).models[0].tasks[0].metric == metric


def test_seeds_that_all_have_a_partner_are_taken(tmp_path) -> None:
    for search in ("{final_seeds: [3, 4], compare_seeds: [4]}", "{final_seeds: [3, 4]}", "{compare_seeds: []}"):
        load(written(tmp_path, BASE + f"search: {search}"))


def test_a_document_may_have_a_start_and_wrong_lines_are_counted_as_an_editor_does(tmp_path) -> None:
    plain = load(written(tmp_path, BASE))
    assert load(written(tmp_path, f"# what it is for\n---{BASE}")) == plain
    with pytest.raises(LoraInitError, match="line 2, column 9"):
        load(written(tmp_path, "name: x\nmodels: ]\nmethods: []\n"))


@pytest.mark.parametrize(
    ("model", "missing"),
    [
        ("root:models/m", "models: m: there is no folder {root}/models/m"),
        ("benchmarks/backbones/none", "models: m: there is no folder benchmarks/backbones/none"),
        ("./none", "models: m: there is no folder ./none"),
        ("/none", "models: m: there is no folder /none"),
        ("package:json/none", "models: m: model 'package:json/none': the package has no folder 'none'"),
        ("package:no_such_package/none", "the Python package 'no_such_package' is not installed"),
        ("FacebookAI/roberta-large", None),
        ("gpt2", None),
        ("root:there", None),
    ],
)
def test_a_model_folder_that_is_not_there_is_named_and_a_hub_name_is_let_pass(tmp_path, model, missing) -> None:
    for folder in ("sst2", "there"):
        (tmp_path / folder).mkdir()
    suite = load(written(tmp_path, BASE.replace("root:models/m", model)))
    if missing is None:
        check_folders(suite, str(tmp_path))
        return
    with pytest.raises(LoraInitError, match=re.escape(missing.format(root=tmp_path))):
        check_folders(suite, str(tmp_path))


def test_data_folders_that_are_not_there_are_named(tmp_path) -> None:
    (tmp_path / "models" / "m").mkdir(parents=True)
    text = BASE.replace("{task: sst2,", "{task: text, forgetting: {task: text, data: {path: root:held}},")
    suite = load(written(tmp_path, text))
    with pytest.raises(LoraInitError, match="models: m: tasks: text: there is no folder .*/sst2"):
        check_folders(suite, str(tmp_path))
    (tmp_path / "sst2").mkdir()
    with pytest.raises(LoraInitError, match="models: m: tasks: text: there is no folder .*/held"):
        check_folders(suite, str(tmp_path))


def test_the_command_checks_the_folders_before_anything_runs(tmp_path, capsys) -> None:
    (tmp_path / "sst2").mkdir()
    file, output = written(tmp_path, BASE), tmp_path / "results"
    assert main(["bench", str(file), "--root", str(tmp_path), "--output", str(output)]) == 1
    assert f"error: models: m: there is no folder {tmp_path}/models/m" in capsys.readouterr().err
    assert not output.exists()
    assert main(["bench", str(file), "--output", str(output)]) == 1
    assert "pass --root FOLDER" in capsys.readouterr().err


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
    from lorainit.bench.run_suite import description
    from lorainit.grids.result_files import write_record

    write_record(tmp_path / "suite.json", description(SUITE))
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

    from lorainit.train.recipe import Recipe

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
