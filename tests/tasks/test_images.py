from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from lorainit.errors import LoraInitError
from lorainit.tasks import DataOptions, fingerprint, get_task
from runs import save_tiny_vit


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return get_task("svhn").load_processor(str(save_tiny_vit(tmp_path_factory.mktemp("vit") / "vit")))


def colours(rows: int, labels=None, names=("image", "label")) -> Dataset:
    features = Features({names[0]: ImageFeature(), names[1]: Value("int64")})
    images = [Image.new("RGB", (4, 6), (i % 256, i // 256, 0)) for i in range(rows)]
    columns = {names[0]: images, names[1]: [i % 10 for i in range(rows)] if labels is None else labels}
    return Dataset.from_dict(columns, features=features)


def save_parts(folder, train=800, validation=200, test=20, **options):
    """Save the parts of a source; no two images of the first two parts are alike."""
    rows = colours(train + validation, **options)
    parts = {"train": range(train), "validation": range(train, train + validation)}
    for split, chosen in parts.items():
        rows.select(chosen).to_parquet(str(folder / f"{split}.parquet"))
    colours(test, **options).to_parquet(str(folder / "test.parquet"))
    return DataOptions(path=str(folder))


def keys(rows) -> list:
    return [row["image"].getpixel((0, 0)) for row in rows]


def test_images_are_resized_and_normalized_as_the_weights_want_them(processor) -> None:
    task = get_task("svhn")
    encoded = task.encode(colours(3), processor, 0)
    batch = task.collator(processor)([encoded[i] for i in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    assert batch["labels"].tolist() == [0, 1, 2]
    expected = torch.tensor([2 / 255, 0, 0]) * 2 - 1
    torch.testing.assert_close(batch["pixel_values"][2, :, 4, 4], expected)


def test_grey_images_get_three_channels(processor) -> None:
    grey = colours(1).map(lambda row: {"image": row["image"].convert("L")})
    pixels = get_task("svhn").encode(grey, processor, 0)[0]["pixel_values"]
    assert torch.equal(pixels[0], pixels[1])


def test_final_trains_on_both_draws_and_scores_the_test_part(tmp_path) -> None:
    options = dataclasses.replace(save_parts(tmp_path), eval_samples=7)
    assert [len(part) for part in get_task("svhn").load_data(options, 0)] == [1000, 7]
    assert [len(part) for part in get_task("svhn", protocol="tune").load_data(options, 0)] == [800, 7]
    (tmp_path / "test.parquet").unlink()
    with pytest.raises(LoraInitError, match="no split 'test'"):
        get_task("svhn").load_data(options, 0)


def test_parts_of_800_and_200_are_taken_as_they_are(tmp_path) -> None:
    train, validation = get_task("svhn", protocol="tune").load_data(save_parts(tmp_path), 0)
    assert keys(train) + keys(validation) == keys(colours(1000))


def test_800_and_200_are_drawn_from_larger_parts(tmp_path) -> None:
    """Always the same, each from its own part; a part of the right size stays as it is."""
    options = save_parts(tmp_path, train=900, validation=300)
    draws = [[keys(part) for part in get_task("svhn", protocol="tune").load_data(options, seed)] for seed in (0, 1)]
    assert draws[0] == draws[1]
    everything = keys(colours(1200))
    for part, count, source in zip(draws[0], (800, 200), (everything[:900], everything[900:]), strict=True):
        assert (len(part), len(set(part))) == (count, count)
        assert set(part) <= set(source)
        assert part != source[:count]
    options = save_parts(tmp_path, train=900)
    assert keys(get_task("svhn").load_data(options, 0)[0])[800:] == keys(colours(1100))[900:]


@pytest.mark.parametrize(
    ("counts", "message"),
    [((700, 200), "800 images .* from split 'train', which has 700"), ((900, 20), "200 .* 'validation', which has 20")],
)
def test_parts_that_are_too_small_are_refused(tmp_path, counts, message) -> None:
    with pytest.raises(LoraInitError, match=message):
        get_task("svhn").load_data(save_parts(tmp_path, *counts), 0)


def test_scored_images_are_a_fixed_draw_not_the_first(tmp_path) -> None:
    save_parts(tmp_path)
    colours(40, [i // 4 for i in range(40)]).to_parquet(str(tmp_path / "test.parquet"))
    options = DataOptions(path=str(tmp_path), eval_samples=10)
    drawn = [get_task("svhn").load_data(options, seed)[1]["label"] for seed in (0, 1)]
    assert list(drawn[0]) == list(drawn[1])
    assert len(set(drawn[0])) > 5  # the first ten are of three classes


def test_a_source_without_draws_gives_always_the_same_800_and_200(tmp_path) -> None:
    colours(1100).to_parquet(str(tmp_path / "train.parquet"))
    colours(5).to_parquet(str(tmp_path / "test.parquet"))
    options = DataOptions(path=str(tmp_path))
    draws = [get_task("svhn", protocol="tune").load_data(options, seed) for seed in (0, 1)]
    assert [len(part) for part in draws[0]] == [800, 200]
    assert fingerprint(draws[0][0]) == fingerprint(draws[1][0])
    assert not set(keys(draws[0][0])) & set(keys(draws[0][1]))
    colours(900).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(LoraInitError, match="1000 images are to be drawn from split 'train', which has 900"):
        get_task("svhn").load_data(options, 0)


def test_draws_from_files_of_other_types_are_joined(tmp_path) -> None:
    options = save_parts(tmp_path)
    whole = get_task("svhn").load_data(options, 0)[0]
    other = colours(1000).select(range(800, 1000)).cast_column("label", Value("int32")).add_column("id", ["x"] * 200)
    other.to_parquet(str(tmp_path / "validation.parquet"))
    joined = get_task("svhn").load_data(options, 0)[0]
    assert fingerprint(joined) == fingerprint(whole)


def test_the_hubs_other_column_names_are_understood(tmp_path) -> None:
    train, _ = get_task("svhn").load_data(save_parts(tmp_path, names=("webp", "cls")), 0)
    assert train.column_names == ["image", "label"]


def test_what_is_no_image_is_refused(tmp_path, processor) -> None:
    for split in ("train", "validation", "test"):
        Dataset.from_dict({"image": ["text"], "label": [0]}).to_parquet(str(tmp_path / f"{split}.parquet"))
    with pytest.raises(LoraInitError, match=r"column 'image' of split 'train' holds .*string.*, no images"):
        get_task("svhn").load_data(DataOptions(path=str(tmp_path)), 0)
    broken = Dataset.from_dict(
        {"image": [{"bytes": b"no image", "path": None}], "label": [0]},
        features=Features({"image": ImageFeature(), "label": Value("int64")}),
    )
    with pytest.raises(LoraInitError, match="an image cannot be decoded"):
        get_task("svhn").encode(broken, processor, 0)[0]


def test_missing_columns_and_foreign_labels_are_refused(tmp_path, processor) -> None:
    for split in ("train", "validation", "test"):
        colours(4).remove_columns("label").to_parquet(str(tmp_path / f"{split}.parquet"))
    with pytest.raises(LoraInitError, match=r"lacks the columns \['label'\]"):
        get_task("svhn").load_data(DataOptions(path=str(tmp_path)), 0)
    with pytest.raises(LoraInitError, match="row 1 has the label 10, which is not one of 0 to 9"):
        get_task("svhn").encode(colours(2, [0, 10]), processor, 0)


def test_top1_is_the_share_of_right_classes() -> None:
    predictions = np.array([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6]])
    assert get_task("camelyon").metrics(predictions, np.array([1, 1, 1])) == {"accuracy": pytest.approx(2 / 3)}


def test_a_head_for_other_classes_is_replaced_and_reported_as_fresh(tmp_path) -> None:
    from lorainit.train.model import load_base

    folder = str(save_tiny_vit(tmp_path / "vit"))
    model, _, fresh = load_base(folder, get_task("svhn"), "float32")
    assert fresh == ["classifier"]
    assert model.classifier.out_features == 10


def test_the_local_extracts_are_read_by_the_same_code(shared) -> None:
    path = str(shared / "data/vtab/fashion_mnist")
    train, test = get_task("fashion-mnist").load_data(DataOptions(path=path), 0)
    assert (len(train), len(test)) == (1000, 10000)


@pytest.mark.parametrize("label", ["cat", 0.5])
def test_labels_that_are_no_integers_are_refused(tmp_path, label) -> None:
    for split in ("train", "validation", "test"):
        colours(4).remove_columns("label").add_column("label", [label] * 4).to_parquet(
            str(tmp_path / f"{split}.parquet")
        )
    with pytest.raises(LoraInitError, match="split 'train': row 0 holds .* in column 'label', which is no integer"):
        get_task("svhn").load_data(DataOptions(path=str(tmp_path)), seed=0)
