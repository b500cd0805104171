"""Structured vision tasks that are drawn here, for machines without VTAB's own.

They ask what three structured tasks of VTAB ask, of images made from a seed: where a shape stands
(``shapes-location``, after dSprites), how it is turned (``shapes-orientation``), how many there are (``shapes-count``,
after CLEVR). They are *not* those data sets: scores are comparable between runs of this project only.

Images are grey, 32×32, drawn at four times that size. One bright shape (square, ellipse, triangle) of random size,
brightness, position and angle lies on a noisy background; counting draws one to eight discs and squares that do not
overlap. Location has 16 classes of equal width along x, from 7 to 25 whatever the shape's size, so that the label is a
function of the place alone; orientation 16 of equal width over a half turn for a shape without symmetry below that (an
ellipse or a bar); count has 8.
"""

from __future__ import annotations

import dataclasses
import io
import zlib
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .images import TRAIN, VALIDATION, ImageTask

if TYPE_CHECKING:
    from datasets import DatasetDict
    from PIL.ImageDraw import ImageDraw

Question = Literal["location", "orientation", "count"]
SIZE, SCALE = 32, 4
SMALLEST, LARGEST = 4, 7  # radius of the one shape
TEST = 2000
SPLITS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
CLASSES: dict[Question, int] = {"location": 16, "orientation": 16, "count": 8}


@dataclasses.dataclass(frozen=True)
class DrawnTask(ImageTask):
    """An image task whose images are drawn; there is nothing to download and no folder to name.

    Attributes:
        question: what the label tells about the image.
    """

    question: Question = "location"

    def _splits(self, path: str | None) -> DatasetDict:
        from datasets import DatasetDict

        if path is not None:
            return super()._splits(path)
        return DatasetDict({split: self.draw(split) for split in SPLITS})

    def draw(self, split: str) -> Any:
        """Return a split, the same in every process; its images are PNG."""
        from datasets import ClassLabel, Dataset, Features, Image

        generator = np.random.default_rng([zlib.crc32(self.question.encode()), list(SPLITS).index(split)])
        count = CLASSES[self.question]
        labels = [i % count for i in generator.permutation(SPLITS[split])]
        features = Features({"image": Image(), "label": ClassLabel(num_classes=count)})
        images = [{"bytes": draw(self.question, label, generator), "path": None} for label in labels]
        return Dataset.from_dict({"image": images, "label": labels}, features=features)


def draw(question: Question, label: int, generator: np.random.Generator) -> bytes:
    """Return an image with the given answer, as PNG."""
    from PIL import Image, ImageDraw

    canvas = Image.new("L", (SIZE * SCALE, SIZE * SCALE), 0)
    brush = ImageDraw.Draw(canvas)
    if question == "count":
        _scatter(brush, label + 1, generator)
    else:
        _shape(brush, question, label, generator)
    shapes = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX), float)
    background = generator.uniform(20, 80) + generator.normal(0, 8, shapes.shape)
    drawn = np.clip(np.maximum(shapes, background), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(drawn).save(file, "PNG")
    return file.getvalue()


def _shape(brush: ImageDraw, question: Question, label: int, generator: np.random.Generator) -> None:
    """Draw one shape whose place or angle has the label."""
    radius = generator.uniform(SMALLEST, LARGEST)
    x, y = generator.uniform(radius, SIZE - radius, 2)
    angle = generator.uniform(0, np.pi)
    inside = (label + generator.uniform(0.05, 0.95)) / CLASSES[question]
    if question == "location":
        # the same room for shapes of every size: the label is a function of the place alone
        x = LARGEST + inside * (SIZE - 2 * LARGEST)
        corners = generator.choice([3, 4, 32])
    else:
        angle, corners = np.pi * inside, generator.choice([4, 32])
    turns = 2 * np.pi * np.arange(corners) / corners + np.pi / corners
    # an outline twice as long as wide, turned: only a half turn brings it back
    outline = np.stack([radius * np.cos(turns), radius / 2 * np.sin(turns)])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = (turn @ outline + np.array([[x], [y]])) * SCALE
    brush.polygon([tuple(point) for point in points.T], fill=int(generator.integers(150, 256)))


def _scatter(brush: ImageDraw, count: int, generator: np.random.Generator) -> None:
    """Draw so many discs and squares apart from each other, on jittered places of a 4×4 grid."""
    cell = SIZE / 4
    for place in generator.permutation(16)[:count]:
        radius = generator.uniform(1.8, 3.2)
        slack = cell / 2 - radius - 0.5
        x, y = (np.array(divmod(int(place), 4)) + 0.5) * cell + generator.uniform(-slack, slack, 2)
        box = [(v * SCALE) for v in (x - radius, y - radius, x + radius, y + radius)]
        paint = int(generator.integers(150, 256))
        (brush.ellipse if generator.random() < 0.5 else brush.rectangle)(box, fill=paint)


TASKS = tuple(
    DrawnTask(
        name=f"shapes-{question}",
        hub=("", None),
        columns=("image", "label"),
        num_labels=count,
        group="structured",
        question=question,
    )
    for question, count in CLASSES.items()
)
