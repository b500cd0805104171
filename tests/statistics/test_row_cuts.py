"""Batches are cut into rows field by field, and one that cannot be is refused by the field's name."""

from __future__ import annotations

import types

import pytest
import torch

from lorainit import LoraInitError
from lorainit.statistics.batches import split_rows, take_rows

IDS = torch.arange(12).reshape(3, 4)
PLACE = 50  # the token that keeps the place of an image
# rows with one image of 4 patches, two of 4 and 8, none; two patches share a place
GRIDS = torch.tensor([[1, 2, 2], [1, 2, 2], [1, 2, 4]])
PLACES = torch.tensor([[PLACE, PLACE, 1, 1, 1, 1, 1], [PLACE] * 6 + [1], [1] * 7])
PATCHES = torch.arange(16.0)[:, None]
MODEL = types.SimpleNamespace(config=types.SimpleNamespace(image_token_id=PLACE))


def test_patches_go_with_the_rows_that_keep_places_for_them() -> None:
    batch = {"input_ids": PLACES, "pixel_values": PATCHES, "image_grid_thw": GRIDS}
    parts = split_rows(batch, 1, MODEL)  # pyright: ignore[reportArgumentType]
    assert [part["pixel_values"].flatten().tolist() for part in parts] == [
        [0.0, 1.0, 2.0, 3.0],
        [float(i) for i in range(4, 16)],
        [],
    ]
    assert [part["image_grid_thw"].shape[0] for part in parts] == [1, 2, 0]


def test_lists_with_one_item_a_row_are_cut_between_items() -> None:
    targets = [{"boxes": torch.ones(n, 4), "class_labels": torch.zeros(n)} for n in (3, 1, 2)]
    batch = {"pixel_values": torch.ones(3, 3, 8, 8), "labels": targets, "names": ["a", "b", "c"]}
    first, last = split_rows(batch, 2)
    assert first["labels"] == targets[:2] and last["labels"] == targets[2:]
    assert (first["names"], last["names"]) == (["a", "b"], ["c"])


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"pixel_values": torch.ones(9, 2)}, r"'pixel_values'\[9, 2\]"),
        ({"pixel_values": PATCHES, "image_grid_thw": GRIDS[:2]}, "'pixel_values'"),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "'cu_seq_lens_q'"),
    ],
    ids=["patches without their sizes", "patches that the places do not explain", "ends of packed rows"],
)
def test_a_field_that_does_not_lie_by_rows_is_named(fields, named) -> None:
    with pytest.raises(LoraInitError, match=named):
        take_rows({"input_ids": IDS, **fields}, slice(0, 2), MODEL)  # pyright: ignore[reportArgumentType]
