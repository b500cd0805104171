from __future__ import annotations

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from lorainit.cli import main
from lorainit.errors import LoraInitError
from lorainit.tasks import TASKS, DataOptions, fingerprint, get_task


def test_accuracy_and_the_tasks_own_score_match_hand_counts() -> None:
    predictions = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0], [3.0, 1.0]])  # classes 0 1 1 0
    labels = np.array([0, 1, 0, 1])
    assert get_task("sst2").metrics(predictions, labels) == {"accuracy": 0.5}
    assert get_task("mrpc").metrics(predictions, labels) == {"accuracy": 0.5, "f1": 0.5}
    assert get_task("cola").metrics(predictions, labels) == {"accuracy": 0.5, "matthews": 0.0}


def test_regression_is_scored_by_correlation() -> None:
    scores = np.array([[0.1], [0.2], [0.4]])
    assert get_task("stsb").metrics(scores, np.array([1.0, 2.0, 4.0]))["pearson"] == pytest.approx(1.0)


def test_an_unknown_task_lists_near_matches() -> None:
    with pytest.raises(LoraInitError, match=r"unknown task 'sst3'.*'sst2'"):
        get_task("sst3")


def test_every_task_is_registered_under_its_name() -> None:
    assert all(TASKS[name].name == name for name in TASKS)
    assert {"sst2", "cola", "mrpc", "rte", "stsb", "wnli", "qnli", "mnli", "text", "tinystories"} <= set(TASKS)


@pytest.mark.parametrize(
    ("columns", "files", "message"),
    [
        ({"sentence": ["a"], "label": [0]}, ("train",), "there is no file .*validation.parquet"),
        ({"text": ["a"], "label": [0]}, ("train", "validation"), r"lacks the columns \['sentence'\]"),
        ({"sentence": [], "label": []}, ("train", "validation"), "split 'train' is empty"),
    ],
    ids=["missing file", "missing column", "no rows"],
)
def test_unusable_data_are_refused_by_name(tmp_path, columns, files, message) -> None:
    for split in files:
        Dataset.from_dict(columns).to_parquet(str(tmp_path / f"{split}.parquet"))
    with pytest.raises(LoraInitError, match=message):
        get_task("sst2").load_data(DataOptions(path=str(tmp_path)), seed=0)


GOOD = {"sentence": ["a", "b"], "label": [0, 1]}


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ({"label": [0]}, GOOD, r"split 'train' lacks the columns \['sentence'\]"),
        (GOOD, {"label": [0]}, r"split 'validation' lacks the columns \['sentence'\]"),
        ({"sentence": [], "label": []}, GOOD, "split 'train' is empty"),
        (GOOD, {"sentence": [], "label": []}, "split 'validation' is empty"),
        (GOOD, GOOD | {"sentence": [3, 4]}, r"split 'validation': row 0 holds 3 \(int64\) in column 'sentence'"),
        (GOOD | {"label": ["x", "y"]}, GOOD, r"split 'train': row 0 holds 'x' \(string\) in column 'label'"),
    ],
)
def test_what_one_split_alone_has_wrong_is_said_of_it(tmp_path, train, validation, message) -> None:
    for split, columns in (("train", train), ("validation", validation)):
        Dataset.from_dict(columns).to_parquet(str(tmp_path / f"{split}.parquet"))
    with pytest.raises(LoraInitError, match=f"task 'sst2': {message}"):
        get_task("sst2").load_data(DataOptions(path=str(tmp_path)), seed=0)


def test_a_typed_file_without_rows_is_empty(tmp_path) -> None:
    """The library does not load a file whose one row group is empty."""
    schema = pa.schema({"sentence": pa.string(), "label": pa.int64()})
    pq.write_table(schema.empty_table(), tmp_path / "rows.parquet")
    with pytest.raises(LoraInitError, match="task 'sst2': file .*rows.parquet is empty"):
        get_task("sst2").load_rows(DataOptions(), file=str(tmp_path / "rows.parquet"))


def test_splits_may_differ_in_columns_that_the_task_does_not_need(tmp_path) -> None:
    Dataset.from_dict(GOOD).to_parquet(str(tmp_path / "train.parquet"))
    Dataset.from_dict(GOOD | {"idx": [0, 1]}).to_parquet(str(tmp_path / "validation.parquet"))
    train, validation = get_task("sst2").load_data(DataOptions(path=str(tmp_path)), seed=0)
    assert list(train["sentence"]) == list(validation["sentence"]) == ["a", "b"]


def test_a_file_that_is_no_parquet_is_named(tmp_path) -> None:
    (tmp_path / "train.parquet").write_text("no parquet")
    (tmp_path / "validation.parquet").write_text("no parquet")
    with pytest.raises(LoraInitError, match="task 'sst2': no rows can be read from .*train.parquet: Parquet magic"):
        get_task("sst2").load_data(DataOptions(path=str(tmp_path)), seed=0)


def test_the_cause_of_the_hubs_failure_is_told(monkeypatch) -> None:
    def fail(*_):
        raise DatasetGenerationError("An error occurred") from OSError("the disk is full")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(LoraInitError, match=r"from the hub's nyu-mll/glue: An error occurred \(the disk is full\)"):
        get_task("sst2").load_data(DataOptions(), seed=0)


@pytest.mark.parametrize("name", ["train_samples", "eval_samples", "max_length"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_below_one_are_refused(name, value, capsys) -> None:
    with pytest.raises(LoraInitError, match=f"data: {name} must be ≥ 1, got {value}"):
        DataOptions(**{name: value})
    assert main(["train", "--model", "none", "--task", "sst2", f"--data.{name}", str(value)]) == 1
    assert capsys.readouterr().err == f"lorainit: error: data: {name} must be ≥ 1, got {value}\n"


@pytest.mark.parametrize("label", [float("nan"), float("inf")])
def test_a_score_that_is_no_finite_number_is_refused(label) -> None:
    rows = Dataset.from_dict({"sentence1": ["a"] * 2, "sentence2": ["b"] * 2, "label": [1.0, label]})
    with pytest.raises(LoraInitError, match=f"task 'stsb': row 1 has the label {label}, which is no finite number"):
        get_task("stsb").encode(rows, None, 32)  # pyright: ignore[reportArgumentType]


def test_training_rows_are_drawn_by_the_seed_and_evaluation_rows_are_the_first(tmp_path) -> None:
    rows = Dataset.from_dict({"sentence": [f"row {i}" for i in range(50)], "label": [i % 2 for i in range(50)]})
    for split in ("train", "validation"):
        rows.to_parquet(str(tmp_path / f"{split}.parquet"))
    options = DataOptions(path=str(tmp_path), train_samples=10, eval_samples=5)
    first, again, other = (get_task("sst2").load_data(options, seed)[0]["sentence"] for seed in (0, 0, 1))
    assert list(first) == list(again) != list(other)
    assert list(get_task("sst2").load_data(options, 0)[1]["sentence"]) == [f"row {i}" for i in range(5)]


def test_the_fingerprint_is_of_the_content_and_its_order() -> None:
    rows = Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1]})
    same = Dataset.from_list(rows.to_list())
    assert fingerprint(rows) == fingerprint(same) != fingerprint(rows.select([1, 0]))


def test_the_published_validation_sets_are_read_whole(shared) -> None:
    _, validation = get_task("rte").load_data(DataOptions(path=str(shared / "data/glue/rte")), seed=0)
    assert len(validation) == 277


def test_calibration_rows_come_from_a_named_split_or_a_file_and_may_lack_labels(tmp_path) -> None:
    Dataset.from_dict({"sentence": ["a", "b"]}).to_parquet(str(tmp_path / "unlabelled.parquet"))
    Dataset.from_dict({"label": [1]}).to_parquet(str(tmp_path / "wrong.parquet"))
    task, options = get_task("sst2"), DataOptions(path=str(tmp_path))
    assert list(task.load_rows(options, split="unlabelled")["sentence"]) == ["a", "b"]
    assert list(task.load_rows(options, file=str(tmp_path / "unlabelled.parquet"))["sentence"]) == ["a", "b"]
    for arguments, message in (
        ({"split": "none"}, "there is no file .*none.parquet"),
        ({"file": "none.parquet"}, "there is no file none.parquet"),
        ({"file": str(tmp_path / "wrong.parquet")}, r"wrong.parquet lacks the columns \['sentence'\]"),
    ):
        with pytest.raises(LoraInitError, match=message):
            task.load_rows(options, **arguments)


@pytest.mark.parametrize(
    ("task", "columns", "message"),
    [
        ("sst2", {"sentence": ["a", None], "label": [0, 1]}, "row 1 holds nothing .* in column 'sentence'"),
        ("sst2-t5", {"sentence": ["a", None], "label": [0, 1]}, "row 1 holds nothing .* in column 'sentence'"),
        ("sst2", {"sentence": ["a", "b"], "label": [None, 1]}, "row 0 holds nothing .* in column 'label'"),
        ("gsm8k", {"question": [None], "answer": ["b"]}, "row 0 holds nothing .* in column 'question'"),
        ("gsm8k", {"question": ["a"], "answer": [None]}, "row 0 holds nothing .* in column 'answer'"),
        ("gsm8k", {"question": ["a"], "answer": [3]}, r"row 0 holds 3 \(int64\) in column 'answer', which is no text"),
        ("sst2", {"sentence": [3], "label": [0]}, r"row 0 holds 3 \(int64\) in column 'sentence', which is no text"),
        ("sst2-t5", {"sentence": [3], "label": [0]}, "row 0 holds 3 .* in column 'sentence', which is no text"),
        ("mrpc", {"sentence1": ["a"], "sentence2": [3], "label": [0]}, "column 'sentence2', which is no text"),
        ("gsm8k", {"question": [3], "answer": ["b"]}, "column 'question', which is no text"),
        (
            "alpaca",
            {"instruction": ["a"] * 50, "input": [None, *range(49)], "output": ["c"] * 50},
            r"row 1 holds 0 \(int64\) in column 'input', which is no text",
        ),
        ("sst2", {"sentence": ["a"], "label": [0.5]}, "column 'label', which is no integer"),
        ("sst2-t5", {"sentence": ["a"], "label": ["good"]}, "column 'label', which is no integer"),
        ("stsb", {"sentence1": ["a"], "sentence2": ["b"], "label": ["high"]}, "column 'label', which is no number"),
    ],
)
def test_missing_values_and_values_of_the_wrong_type_are_refused_by_row(tmp_path, task, columns, message) -> None:
    for split in ("train", "validation", "test"):
        Dataset.from_dict(columns).to_parquet(str(tmp_path / f"{split}.parquet"))
    with pytest.raises(LoraInitError, match=f"task '{task}': split 'train': .*{message}"):
        get_task(task).load_data(DataOptions(path=str(tmp_path)), seed=0)


def test_an_input_of_alpacas_may_be_missing(tmp_path) -> None:
    for inputs in ([None, *"b" * 49], [None] * 50):
        rows = Dataset.from_dict({"instruction": ["a"] * 50, "input": inputs, "output": ["c"] * 50})
        rows.to_parquet(str(tmp_path / "train.parquet"))
        assert len(get_task("alpaca").load_data(DataOptions(path=str(tmp_path)), seed=0)[0]) == 48
