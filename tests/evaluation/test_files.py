from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from lorainit import cli
from lorainit.errors import LoraInitError
from lorainit.evaluation.alpaca_eval import AlpacaEval
from lorainit.evaluation.annotators import load_annotator
from lorainit.evaluation.files import read_rows
from lorainit.evaluation.gsm8k import GSM8K
from lorainit.evaluation.mt_bench import MTBench
from lorainit.tables.table_file import read_table

ROWS = [{"a": "1", "b": "x\u2028y"}, {"a": "2", "b": "z, w"}]


def save(folder, kind):
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(str(path))
    elif kind == "csv":
        Dataset.from_list(ROWS).to_csv(str(path))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS) + "\n")
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "jsonl"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    save(tmp_path, kind)
    assert read_rows(str(tmp_path), f"rows.{kind}", {"a": str, "b": str}) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", "", "holds no rows"),
        ("x.jsonl", '{"a": "1"}\n{"c": 2}', r"row 2: lacks the columns \['a'\]; it has \['c'\]"),
        ("x.jsonl", '{"a": 1}\n{', "cannot be read"),
        ("x.json", '{"a": 1}', "not a list of rows"),
        ("x.json", "[1]", "not a list of rows"),
        ("x.txt", "a", r"'\.txt' is none of"),
        ("x.parquet", "PAR?", "cannot be read"),
        ("x.jsonl", '{"a": "1"}\n{"a": null}', "row 2, column 'a': not text: None"),
        ("x.json", '[{"a": 5}]', "row 1, column 'a': not text: 5"),
        ("x.csv", "b,a\n1,2\n3\n", "row 2, column 'a': not text: None"),
        ("x.csv", "b\n1,2\n", r"row 1: lacks the columns \['a'\]"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(LoraInitError, match=message) as error:
        read_rows(str(tmp_path), name, {"a": str})
    assert name in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(LoraInitError, match=r"there is no file .*question\.jsonl"):
        read_rows(str(tmp_path), "question.jsonl", {})


def test_a_hub_that_is_out_of_reach_is_one_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LoraInitError, match="'no/such-set' is no local folder, and the hub gives no file 'x.json'"):
        read_rows("no/such-set", "x.json", {})


RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = {
    "mt_bench": ("mt-bench", MTBench, ["--data", "d"]),
    "alpaca_eval": ("alpaca-eval", AlpacaEval, []),
    "gsm8k": ("gsm8k", GSM8K, []),
}


@pytest.mark.parametrize("file", sorted(RECIPES.glob("evaluation/*.yaml")), ids=lambda file: file.stem)
def test_every_evaluation_that_ships_is_one(file):
    """It is read by its command, with what the file's own first line adds, and its options are valid."""
    command, kind, more = SHIPPED[file.stem]
    arguments = ["evaluate", command, "--config", str(file), "--adapter", "a", "--output", "o", *more]
    _, options = cli._parse(arguments)
    chosen = kind(**options)
    assert (chosen.model, chosen.adapter, chosen.output) == ("meta-llama/Llama-2-7b-hf", "a", "o")
    first = file.read_text().splitlines()[0]
    assert first.startswith(f"# lorainit evaluate {command} --config recipes/evaluation/{file.name} --adapter DIR")
    for name, value in yaml.safe_load(file.read_text()).items():
        found = getattr(chosen, name)
        expected = value.items() if isinstance(value, dict) else {(None, value)}
        assert all((found if key is None else getattr(found, key)) == part for key, part in expected)


def test_every_evaluation_has_its_command():
    assert sorted(SHIPPED) == sorted(file.stem for file in RECIPES.glob("evaluation/*.yaml"))


@pytest.mark.skipif(importlib.util.find_spec("alpaca_eval") is None, reason="needs the alpaca_eval package")
def test_the_annotator_that_ships_can_be_used():
    load_annotator(yaml.safe_load((RECIPES / "evaluation/alpaca_eval.yaml").read_text())["annotator"])


def test_gsm8k_is_asked_as_the_table_trains():
    """The prompt is the same because it is that of one task."""
    asked = yaml.safe_load((RECIPES / "evaluation/gsm8k.yaml").read_text())["task"]
    table = read_table(RECIPES / "tables/llama_math.yaml")
    for run in table.runs():
        fields = table.fields(run)
        assert fields["task"] == asked
        assert "prompt" not in fields.get("task_options", {})
