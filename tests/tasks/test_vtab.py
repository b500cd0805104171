from __future__ import annotations

import io

import datasets
import pytest
from PIL import Image

from lorainit.errors import LoraInitError
from lorainit.tasks import DataOptions, get_task
from lorainit.tasks.vtab import GROUPS, TASKS, means


def test_there_are_nineteen_tasks_in_three_groups() -> None:
    assert [sum(task.group == group for task in TASKS) for group in GROUPS] == [7, 4, 8]
    assert all(get_task(task.name) is not None for task in TASKS)


def test_means_follow_the_published_row() -> None:
    # vanilla LoRA of arXiv 2511.19145, table 3
    published = "73.9 93.5 66.1 98.7 88.3 84.2 51.1 85.6 95.3 79.8 72.9 79.9 62.9 47.0 76.5 85.4 49.5 28.9 39.2".split()
    found = means({task.name: float(value) for task, value in zip(TASKS, published, strict=True)})
    assert {key: round(value, 2) for key, value in found.items()} == {
        "natural": 79.4,
        "specialized": 83.4,
        "structured": 58.66,
        "all": 71.51,
        "groups": 73.82,
    }


def test_a_group_that_is_not_complete_has_no_mean() -> None:
    assert means({"cifar100": 1.0}) == {}
    assert means({name: 50.0 for name in ("camelyon", "eurosat", "resisc45", "retinopathy")}) == {
        "specialized": pytest.approx(50.0)
    }


def hub_copy(labels, names=("webp", "cls")):
    """A split as the hub's copies hold it, one small image a label."""
    file = io.BytesIO()
    Image.new("L", (2, 2)).save(file, "PNG")
    cells = [{"bytes": file.getvalue(), "path": None}] * len(labels)
    features = datasets.Features({names[0]: datasets.Image(), names[1]: datasets.Value("int64")})
    return datasets.Dataset.from_dict({names[0]: cells, names[1]: labels}, features=features)


@pytest.fixture
def hub(monkeypatch):
    """Put splits where the hub is; what is asked for is listed."""
    asked = []

    def put(**splits):
        found = datasets.DatasetDict(splits)

        def load(*source):
            asked.append(source)
            return datasets.DatasetDict(found)

        monkeypatch.setattr(datasets, "load_dataset", load)
        return asked

    return put


@pytest.mark.parametrize(("name", "count", "factor"), [("location", 32, 2), ("orientation", 40, 2.5)])
def test_dsprites_labels_of_the_hub_are_grouped_as_vtab_does(hub, name, count, factor):
    labels = [i % count for i in range(1000)]
    hub(train=hub_copy(labels), test=hub_copy(list(range(count))))
    task = get_task(f"dsprites-{name}")
    train, test = task.load_data(DataOptions(), 0)
    assert list(test["label"]) == [int(label // factor) for label in range(count)]
    assert sorted(train["label"]) == sorted(int(label // factor) for label in labels)
    assert set(train["label"]) == set(range(16))
    # a start that is calibrated on a split by name sees the same classes
    assert list(task.load_rows(DataOptions(), split="test")["label"]) == list(test["label"])


@pytest.mark.parametrize("largest", [15, 40])
def test_hub_labels_that_are_not_as_fine_as_said_are_refused(hub, largest):
    hub(train=hub_copy([largest] * 1000), test=hub_copy([largest]))
    with pytest.raises(LoraInitError, match=f"raw_labels=40 says .* go to 39; in split 'train' .* to {largest}"):
        get_task("dsprites-orientation").load_data(DataOptions(), 0)


def test_local_labels_are_classes_already(tmp_path):
    """They stay as they are, and those that nobody grouped are refused."""
    task = get_task("dsprites-location")
    for split, count in (("train", 800), ("validation", 200), ("test", 16)):
        hub_copy([i % 16 for i in range(count)]).to_parquet(str(tmp_path / f"{split}.parquet"))
    _, test = task.load_data(DataOptions(path=str(tmp_path)), 0)
    assert list(test["label"]) == list(range(16))
    hub_copy(list(range(32))).to_parquet(str(tmp_path / "test.parquet"))
    _, test = task.load_data(DataOptions(path=str(tmp_path)), 0)
    with pytest.raises(LoraInitError, match="row 16 has the label 16, which is not one of 0 to 15"):
        task.encode(test, None, 0)


def test_raw_labels_must_be_finer_than_the_classes():
    with pytest.raises(LoraInitError, match="raw_labels=16 must be more than num_labels=16"):
        get_task("dsprites-location", raw_labels=16)
    assert {task.name for task in TASKS if task.raw_labels} == {"dsprites-location", "dsprites-orientation"}


def test_sun397_comes_from_a_source_with_a_train_part(hub):
    """The CLIP benchmark's copy has a test part alone, which is an error."""
    names = ("image", "label")
    parts = {"train": 900, "validation": 300, "test": 30}
    asked = hub(**{split: hub_copy([i % 397 for i in range(count)], names) for split, count in parts.items()})
    train, test = get_task("sun397").load_data(DataOptions(), 0)
    assert (len(train), len(test)) == (1000, 30)
    assert asked == [("dpdl-benchmark/sun397", None)]
    hub(test=hub_copy([0]))
    with pytest.raises(LoraInitError, match="no split 'train', only .'test'"):
        get_task("sun397").load_data(DataOptions(), 0)
