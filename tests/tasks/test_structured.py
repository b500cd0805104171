from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from lorainit.tasks import DataOptions, get_task
from lorainit.tasks.structured import CLASSES, SIZE, draw


def pixels(question, label: int, seed: int) -> np.ndarray:
    made = Image.open(io.BytesIO(draw(question, label, np.random.default_rng(seed))))
    return np.asarray(made, float)


def bright(image: np.ndarray) -> np.ndarray:
    return image > 130


@pytest.mark.parametrize("seed", range(20))
def test_a_shape_stands_where_its_label_says(seed) -> None:
    # the centre of the shape, in the room that the largest radius leaves: the shape's own does not matter
    for label in (0, 7, 15):
        columns = np.nonzero(bright(pixels("location", label, seed)))[1]
        centre = (columns.min() + columns.max() + 1) / 2
        lowest, highest = (7 + edge / 16 * (SIZE - 14) for edge in (label, label + 1))
        assert lowest - 2 <= centre <= highest + 2


@pytest.mark.parametrize("seed", range(20))
def test_a_shape_is_turned_as_its_label_says(seed) -> None:
    for label in (0, 5, 11):
        y, x = np.nonzero(bright(pixels("orientation", label, seed)))
        axis = np.linalg.eigh(np.cov(x, y))[1][:, -1]
        angle = np.arctan2(axis[1], axis[0]) % np.pi
        middle = np.pi * (label + 0.5) / 16
        apart = abs(angle - middle) % np.pi
        assert min(apart, np.pi - apart) < np.pi / 16 + 0.25


@pytest.mark.parametrize("seed", range(20))
def test_as_many_shapes_lie_apart_as_the_label_says(seed) -> None:
    from scipy.ndimage import label as components

    for label in range(CLASSES["count"]):
        assert components(bright(pixels("count", label, seed)), np.ones((3, 3)))[1] == label + 1


def test_the_images_that_results_exist_for_stay_the_same() -> None:
    found = {}
    for question in ("orientation", "count"):
        generator, digest = np.random.default_rng(5), hashlib.sha256()
        for i in range(64):
            digest.update(draw(question, i % CLASSES[question], generator))
        found[question] = digest.hexdigest()[:16]
    assert found == {"orientation": "57add20ffcc1accd", "count": "f9901c83fcb33121"}


def test_splits_are_the_same_each_time_and_different_from_each_other() -> None:
    task = get_task("shapes-count")
    first, again = (task.draw("validation") for _ in range(2))
    assert first[0]["image"].tobytes() == again[0]["image"].tobytes()
    assert first[0]["image"].tobytes() != get_task("shapes-location").draw("validation")[0]["image"].tobytes()
    train, test = get_task("shapes-count").load_data(DataOptions(eval_samples=10), 0)
    assert (len(train), len(test)) == (1000, 10)
    assert np.ptp(np.bincount(train["label"])) == 0
