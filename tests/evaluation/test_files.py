from __future__ import annotations

import json

import pytest
from datasets import Dataset

from lorainit.errors import LoraInitError
from lorainit.evaluation.files import read_rows

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
    assert read_rows(str(tmp_path), f"rows.{kind}", ("a", "b")) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", "", "holds no rows"),
        ("x.jsonl", '{"a": 1}\n{"c": 2}', r"row 2: lacks the columns \['a'\]; it has \['c'\]"),
        ("x.jsonl", '{"a": 1}\n{', "cannot be read"),
        ("x.json", '{"a": 1}', "not a list of rows"),
        ("x.json", "[1]", "not a list of rows"),
        ("x.txt", "a", r"'\.txt' is none of"),
        ("x.parquet", "PAR?", "cannot be read"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(LoraInitError, match=message) as error:
        read_rows(str(tmp_path), name, ("a",))
    assert name in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(LoraInitError, match=r"there is no file .*question\.jsonl"):
        read_rows(str(tmp_path), "question.jsonl", ())


def test_a_hub_that_is_out_of_reach_is_one_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LoraInitError, match="'no/such-set' is no local folder, and the hub gives no file 'x.json'"):
        read_rows("no/such-set", "x.json", ())
