from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from benchmarks import save_mt_bench, save_tiny_llama
from loopback import completion, no_key, serving, status  # noqa: F401
from lorainit.cli import main
from lorainit.errors import LoraInitError
from lorainit.tables import run_table as module
from lorainit.tables.folders import TableFolders
from lorainit.tables.measured import Measured
from lorainit.tables.recipe_files import write_recipes
from lorainit.tables.run_table import run_table
from lorainit.tables.table import Run
from lorainit.tables.table_file import read_table
from lorainit.tables.table_page import table_page
from lorainit.tables.table_records import discard_changed

RECIPES = Path(__file__).parents[2] / "recipes"
JUDGED, COUNTED = "mt-bench first turn", "gsm8k last number"
ROW = Run("LoRA", "Sums", 0)
pytestmark = pytest.mark.usefixtures("no_key")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_tiny_llama(folder / "llama")
    save_mt_bench(folder / "mt_bench")
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(8)]
    (folder / "sums").mkdir()
    for split in ("train", "test"):
        Dataset.from_list(rows).to_parquet(str(folder / f"sums/{split}.parquet"))
    return folder


def written(files, folder, url: str, **changes):
    """Return a table whose row answers GSM8K and a judged MT-Bench."""
    content = {
        "title": "Sums",
        "source": "nowhere",
        "score": JUDGED,
        "times": 1,
        "also": {COUNTED: 100, "loss": 1},
        "evaluations": {
            "gsm8k": {"data": "{data}/sums", "questions": 4, "generation": {"max_new_tokens": 4}},
            "mt-bench": {
                "data": "{data}/mt_bench",
                "turns": 1,
                "judge": {"model": "judge", "base_url": url, "retries": 0},
                "generation": {"template": "alpaca", "max_new_tokens": 4},
            },
        },
        "recipe": {
            "model": "{data}/llama",
            "data": {"path": "{data}/sums", "max_length": 200},
            "train": {"max_steps": 1, "per_device_train_batch_size": 4, "disable_tqdm": True},
        },
        "columns": {"Sums": {"task": "gsm8k"}},
        "rows": {"LoRA": {}, "Continued": {"method": "continue", "method_options": {"folder": "teacher:LoRA"}}},
        "published": {"LoRA": ["5.89 / 10"]},
        "seeds": [0],
    }
    file = folder / "sums.yaml"
    file.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return file, TableFolders(folder / "results", folder / "scratch", str(files))


def test_what_was_trained_and_answered_waits_for_a_judge_that_is_away(files, tmp_path, monkeypatch) -> None:
    trained = []
    monkeypatch.setattr(module, "train", lambda recipe, train=module.train: trained.append(recipe) or train(recipe))
    said = [status(503), completion("Rating: [[7]]"), completion("Rating: [[7]]"), completion("no rating")]
    with serving(lambda body, number: said[number]) as judge:
        file, place = written(files, tmp_path, judge.url)
        table = read_table(file).selected(["LoRA"])
        with pytest.raises(
            LoraInitError, match="table 'sums-paper', row 'LoRA', column 'Sums': .*1 requests got no reply, .*503"
        ):
            run_table(table, place)
        assert not place.result(table, ROW).exists()
        run_table(table, place)
    assert len(trained) == 1
    result = json.loads(place.result(table, ROW).read_text())
    assert result["metrics"][JUDGED] == 7
    assert 0 <= result["metrics"][COUNTED] <= 1
    assert result["evaluated"]["gsm8k"]["metrics"]["last number"]["questions"] == 4
    assert result["evaluated"]["mt-bench"]["unparsable"] == 1
    assert result["evaluations"]["gsm8k"]["data"] == "{data}/sums"
    text = table_page(table, place)
    assert f"{JUDGED} / {COUNTED} × 100 / loss." in text
    scores = f"7.00 / {100 * result['metrics'][COUNTED]:.2f} / {result['metrics']['loss']:.2f}"
    assert f"| LoRA | {scores}<br>*5.89 / 10* |" in text
    assert "* 1 replies of the judge could not be read: the means are over the others." in text


def test_a_judge_whose_replies_say_nothing_leaves_a_score_open(files, tmp_path) -> None:
    with serving(lambda body, number: completion("no rating")) as judge:
        file, place = written(files, tmp_path, judge.url)
        table = read_table(file).selected(["LoRA"])
        run_table(table, place)
    assert Measured(table, place).scores("LoRA", "Sums", None) == {}
    assert "| LoRA | – / " in table_page(table, place)


def test_other_options_of_an_evaluation_are_another_recipe_and_other_runs_are_not_asked(files, tmp_path) -> None:
    counted = {"gsm8k": {"data": "{data}/sums", "questions": 2, "generation": {"max_new_tokens": 2}}}
    file, place = written(files, tmp_path, "", score=COUNTED, also={}, evaluations=counted)
    run_table(read_table(file), place)
    teacher = json.loads(place.result(read_table(file), Run("LoRA", "Sums", 100)).read_text())
    assert "evaluated" not in teacher and COUNTED not in teacher["metrics"]
    counted["gsm8k"]["questions"] = 3
    file, _ = written(files, tmp_path, "", score=COUNTED, also={}, evaluations=counted)
    with pytest.raises(LoraInitError, match="evaluations.gsm8k.questions was 2, and the table file says 3"):
        Measured(read_table(file), place)
    assert {path.stem for path in discard_changed(read_table(file), place)} == {"lora_own_0", "continued_own_0"}


def test_a_recipe_that_is_written_out_tells_what_to_ask(files, tmp_path) -> None:
    file, place = written(files, tmp_path, "http://127.0.0.1:1/v1")
    recipes, _ = write_recipes(read_table(file).selected(["LoRA"]), tmp_path / "out", place.data)
    commands = [line[2:].split() for line in recipes[0].read_text().splitlines() if line.startswith("#   lorainit")]
    assert [command[1:3] for command in commands] == [
        ["train", "--config"],
        ["evaluate", "gsm8k"],
        ["evaluate", "mt-bench"],
    ]
    assert main(commands[0][1:]) == 0
    assert main(commands[1][1:]) == 0
    assert json.loads((tmp_path / "out/sums/lora_own_0/gsm8k/result.json").read_text())["benchmark"] == "gsm8k"


@pytest.mark.parametrize(
    ("table", "benchmark", "file"),
    [
        ("llama_math", "gsm8k", "gsm8k"),
        ("llama_wizardlm", "mt-bench", "mt_bench"),
        ("llama_wizardlm", "alpaca-eval", "alpaca_eval"),
    ],
)
def test_the_tables_ask_as_the_evaluation_recipes_do(table, benchmark, file) -> None:
    asked = read_table(RECIPES / f"tables/{table}.yaml").evaluations[benchmark]
    recipe = yaml.safe_load((RECIPES / f"evaluation/{file}.yaml").read_text())
    assert {key: asked[key] for key in asked if key in recipe} == {key: recipe[key] for key in recipe if key != "model"}


@pytest.mark.parametrize(
    ("evaluations", "message"),
    [
        ({"gsm": {}}, r"evaluations: there is no 'gsm', only \['mt-bench'"),
        ({"gsm8k": {"question": 3}}, "evaluations: gsm8k: .*question"),
        ({"gsm8k": {"questions": "all"}}, "evaluations: gsm8k: .*questions"),
        ({"gsm8k": {"questions": 0}}, "gsm8k: questions must be ≥ 1"),
        ({"gsm8k": {"adapter": "x"}}, r"evaluations: gsm8k: \['adapter'\] are the run's own"),
        ({"mt-bench": {"data": "x"}}, "evaluations: mt-bench: .*judge"),
        ([], "evaluations must be {benchmark: options}"),
    ],
    ids=["benchmark", "option", "type", "value", "own", "missing", "form"],
)
def test_wrong_evaluations_show_before_anything_is_trained(files, tmp_path, evaluations, message) -> None:
    file, _ = written(files, tmp_path, "", evaluations=evaluations)
    with pytest.raises(LoraInitError, match=message):
        read_table(file)
