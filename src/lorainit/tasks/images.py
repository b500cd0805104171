"""Image classification with a fresh head, a thousand images of training at a time."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np

from ..errors import LoraInitError
from .task import DataOptions, LabelKind, Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Protocol = Literal["final", "tune"]
# what the hub's data sets call the two columns
IMAGE_NAMES, LABEL_NAMES = ("image", "img", "webp", "jpg", "png"), ("label", "fine_label", "cls")
TRAIN, VALIDATION, SPLIT_SEED = 800, 200, 0


@dataclasses.dataclass(frozen=True)
class ImageTask(Task):
    """An image to one of ``num_labels`` classes, by VTAB-1k's protocol (Zhai et al. 2019, arXiv:1910.04867).

    800 images to train on are drawn from the source's training part and 200 to choose options with from its validation
    part, or from the training part too where there is no other; always the same ones, and a part of just that size is
    taken as it is. ``protocol="final"`` trains on all 1000 and scores the source's test part; ``"tune"`` trains on the
    800 and scores the 200. The score is that of the model as it is after the last step: no epoch is chosen by it.

    A local folder holds ``train.parquet``, ``test.parquet`` and, if there is a validation part, ``validation.parquet``.

    Attributes:
        num_labels: classes.
        group: the part of VTAB that the task belongs to.
        protocol: what is trained on and what is scored.
        raw_labels: where the hub's labels are finer than the task's classes, how many values they take: label i is then
            of class ⌊i · num_labels / raw_labels⌋, as VTAB groups neighbours. The labels of local files are never
            grouped: there they are the classes, and a label beyond them is refused.
    """

    num_labels: int = 2
    group: str = ""
    protocol: Protocol = "final"
    raw_labels: int | None = None

    # PEFT has no name for image classification; without one it wraps any model
    task_type: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        """Check the options."""
        if self.protocol not in get_args(Protocol):
            raise ValueError(f"protocol={self.protocol!r} is not one of {list(get_args(Protocol))}")
        if self.raw_labels is not None and self.raw_labels <= self.num_labels:
            raise ValueError(f"raw_labels={self.raw_labels} must be more than num_labels={self.num_labels}")

    @property
    def label_kind(self) -> LabelKind:
        """What the label column holds: a class."""
        return "integer"

    @property
    def texts(self) -> tuple[str, ...]:
        """No column holds text."""
        return ()

    def load_model(self, name_or_path: str, **options: Any) -> Any:
        """Load the model with a fresh head, in place of a head for other classes if it has one."""
        from transformers import AutoModelForImageClassification

        names = {i: str(i) for i in range(self.num_labels)}
        labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
        options = labels | {"ignore_mismatched_sizes": True} | options
        return AutoModelForImageClassification.from_pretrained(name_or_path, **options)

    def load_processor(self, name_or_path: str) -> Any:
        """Load the image processor that goes with the weights: it knows size and normalization."""
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(name_or_path)

    def load_data(self, options: DataOptions, seed: int) -> tuple[Dataset, Dataset]:
        """Return the raw rows to train on and to score, by the task's protocol.

        Raises:
            LoraInitError: missing files, splits or columns, too few rows, or a column that holds no images.
        """
        splits = self._splits(options.path)
        parts = {name: splits[name] for name in ("train", "validation", "test") if name in splits}
        for name, rows in parts.items():
            self._check(rows, f"split '{name}'", self.columns)
        parts = self._drawn(parts)
        if self.protocol == "tune":
            train, evaluation = parts["train"], parts["validation"]
        else:
            if "test" not in parts:
                raise LoraInitError(f"task '{self.name}': the data have no split 'test'; protocol='tune' needs none")
            train, evaluation = self._joined(parts["train"], parts["validation"]), parts["test"]
        if options.train_samples is not None:
            train = train.shuffle(seed=seed).select(range(min(options.train_samples, len(train))))
        if options.eval_samples is not None:
            # a test part may be sorted by class, so that its first images would be of a few classes only
            evaluation = evaluation.shuffle(seed=SPLIT_SEED).select(range(min(options.eval_samples, len(evaluation))))
        return train, evaluation

    def encode(self, rows: Dataset, tokenizer: Any, max_length: int) -> Dataset:
        """Have images decoded and processed when they are asked for: a test part of many images needs no copy.

        Raises:
            LoraInitError: a label that is no class of the task; later, an image that cannot be decoded.
        """
        label = self.columns[-1]
        if label in rows.column_names:
            rows = rows.cast_column(label, _integer())
            self._check_labels(rows, self.num_labels)

        def process(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            pixels = tokenizer([self._decoded(cell) for cell in batch["image"]], return_tensors="pt")["pixel_values"]
            return {"pixel_values": list(pixels)} | ({"labels": batch[label]} if label in batch else {})

        from datasets import Image

        return rows.cast_column("image", Image(decode=False)).with_transform(process)

    def collator(self, tokenizer: Any) -> Any:
        """Stack the images of a batch."""
        import torch

        def stack(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
            return batch | ({"labels": torch.tensor([row["labels"] for row in rows])} if "labels" in rows[0] else {})

        return stack

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return top-1 accuracy."""
        return {"accuracy": float((predictions.argmax(-1) == labels).mean())}

    def _splits(self, path: str | None) -> DatasetDict:
        """Return the source's parts: train and, where they are there, validation and test."""
        from pathlib import Path

        if path is None:
            splits = self._read(None, ())
        else:
            there = [name for name in ("train", "validation", "test") if (Path(path) / f"{name}.parquet").is_file()]
            splits = self._read(path, ("train", *(name for name in there if name != "train")))
        if "train" not in splits:
            raise LoraInitError(f"task '{self.name}': the data have no split 'train', only {list(splits)}")
        return splits

    def _drawn(self, parts: dict[str, Dataset]) -> dict[str, Dataset]:
        """Return the parts with 800 rows of train and 200 of validation."""
        if "validation" not in parts:
            drawn = self._draw(parts["train"], "train", TRAIN + VALIDATION)
            return parts | {
                "train": drawn.select(range(TRAIN)),
                "validation": drawn.select(range(TRAIN, TRAIN + VALIDATION)),
            }
        for split, count in (("train", TRAIN), ("validation", VALIDATION)):
            if len(parts[split]) != count:
                parts = parts | {split: self._draw(parts[split], split, count).select(range(count))}
        return parts

    def _joined(self, train: Dataset, validation: Dataset) -> Dataset:
        """Return the rows of both parts; of parts in different columns or types, what the task needs alone."""
        from datasets import Image, concatenate_datasets

        parts = [train, validation]
        if train.features != validation.features:
            bare = [part.select_columns(["image", "label"]) for part in parts]
            parts = [part.cast_column("image", Image()).cast_column("label", _integer()) for part in bare]
        return concatenate_datasets(parts)

    def _draw(self, rows: Dataset, split: str, count: int) -> Dataset:
        """Return the rows in the order of the draw, if there are enough of them."""
        if len(rows) < count:
            raise LoraInitError(
                f"task '{self.name}': {count} images are to be drawn from split '{split}', which has {len(rows)}"
            )
        return rows.shuffle(seed=SPLIT_SEED)

    def _load(self, files: dict[str, str] | None) -> DatasetDict:
        """Return the splits with their columns called image and label, and the hub's labels grouped into classes."""
        splits = super()._load(files)
        for split, rows in splits.items():
            for wanted, names in zip(("image", "label"), (IMAGE_NAMES, LABEL_NAMES), strict=True):
                found = [name for name in names if name in rows.column_names]
                if found and wanted not in rows.column_names:
                    rows = rows.rename_column(found[0], wanted)  # noqa: PLW2901
            splits[split] = self._grouped(rows, str(split)) if files is None and self.raw_labels is not None else rows
        return splits

    def _grouped(self, rows: Dataset, split: str) -> Dataset:
        """Return rows of the hub with classes for labels; the images are not touched.

        Raises:
            LoraInitError: the labels are not what `raw_labels` says, because they are grouped already, for example.
        """
        self._check(rows, f"split '{split}'", self.columns)
        table: Any = rows.with_format("arrow").select_columns(["label"])[:]
        labels, raw = table["label"].to_numpy().astype(np.int64), self.raw_labels or 0
        if labels.min() < 0 or not self.num_labels <= labels.max() < raw:
            raise LoraInitError(
                f"task '{self.name}': raw_labels={raw} says that the hub's labels go to {raw - 1}; in split '{split}' "
                f"they go from {labels.min()} to {labels.max()}"
            )
        classes: Any = labels * self.num_labels // raw
        return rows.remove_columns("label").add_column("label", classes)  # pyright: ignore[reportCallIssue]

    def _check(self, rows: Dataset, where: str, columns: tuple[str, ...]) -> None:
        super()._check(rows, where, columns)
        from datasets import Image

        if not isinstance(rows.features["image"], Image):
            raise LoraInitError(
                f"task '{self.name}': column 'image' of {where} holds {rows.features['image']}, no images"
            )

    def _decoded(self, cell: dict[str, Any]) -> Any:
        """Return an RGB image; grey ones get three equal channels."""
        import io

        from PIL import Image, UnidentifiedImageError

        try:
            return Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise LoraInitError(f"task '{self.name}': an image cannot be decoded: {error}") from error


def _integer() -> Any:
    """Return the feature type of a label without names: what the labels of every source can be read as."""
    from datasets import Value

    return Value("int64")
