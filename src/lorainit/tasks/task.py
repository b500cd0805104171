"""What a task is: where its data lie, how a row becomes model input, how predictions are scored."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import LoraInitError

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, DatasetDict
    from torch import Tensor

LabelKind = Literal["text", "integer", "number"]


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which rows of a task are used.

    Attributes:
        path: folder with ``train.parquet`` and ``validation.parquet`` in the hub data set's columns; default: the hub.
        train_samples: use this many training rows, drawn with the run's seed; default: all.
        eval_samples: use the first so many validation rows, of images always the same random ones; default: all.
        max_length: tokens a row (or a block of text) holds at most.
        packing: train on a batch's rows side by side in one row, without padding (instruction tasks).
    """

    path: str | None = None
    train_samples: int | None = None
    eval_samples: int | None = None
    max_length: int = 128
    packing: bool = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            LoraInitError: a number below 1.
        """
        for name in ("train_samples", "eval_samples", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise LoraInitError(f"data: {name} must be ≥ 1, got {value}")


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """A data set with its model class and its metric.

    Attributes:
        name: as recipes spell it.
        hub: (repository, configuration) on the Hugging Face hub.
        columns: the columns that a row needs, the one with the label (or the reply) last.
        train_split: name of the split to train on.
        eval_split: name of the split that is scored.
    """

    name: str
    hub: tuple[str, str | None]
    columns: tuple[str, ...]
    train_split: str = "train"
    eval_split: str = "validation"

    task_type: ClassVar[str | None]
    nullable: ClassVar[tuple[str, ...]] = ()  # columns that may hold nothing

    @property
    def label_kind(self) -> LabelKind:
        """What the column with the label (or the reply) holds."""
        return "text"

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns that hold text, the one with the label (or the reply) aside."""
        return self.columns[:-1]

    @abc.abstractmethod
    def load_model(self, name_or_path: str, **options: Any) -> Any:
        """Load the base model with the head that this task needs; options go to ``from_pretrained``."""

    def load_processor(self, name_or_path: str) -> Any:
        """Load what turns rows into model inputs: a tokenizer, unless a kind of task says otherwise."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name_or_path)

    @abc.abstractmethod
    def encode(self, rows: Dataset, tokenizer: Any, max_length: int) -> Dataset:
        """Turn rows into model inputs; without ``labels`` where the rows have no label column."""

    @abc.abstractmethod
    def collator(self, tokenizer: Any) -> Any:
        """Return the function that makes a batch of encoded rows."""

    def packed_collator(self, tokenizer: Any) -> Any:
        """Return the function that makes one row of a batch of encoded rows.

        Raises:
            LoraInitError: this task's rows cannot be packed.
        """
        raise LoraInitError(f"task '{self.name}': its rows cannot be packed; set data.packing to false")

    def predict(self, model: Any, tokenizer: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return a batch's predictions and labels as `metrics` takes them; None: the model's own outputs and labels."""
        return None

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Score raw model outputs against labels; empty where the loss is the metric."""
        return {}

    def load_data(self, options: DataOptions, seed: int) -> tuple[Dataset, Dataset]:
        """Return the raw training and evaluation rows, from the hub or from local parquet by the same code.

        Raises:
            LoraInitError: missing files, splits, columns or values, values of the wrong type, or an empty split.
        """
        splits = self._read(options.path, (self.train_split, self.eval_split))
        for split in (self.train_split, self.eval_split):
            if split not in splits:
                raise LoraInitError(f"task '{self.name}': the data have no split '{split}', only {list(splits)}")
            self._check(splits[split], f"split '{split}'", self.columns)
        train, evaluation = splits[self.train_split], splits[self.eval_split]
        if options.train_samples is not None:
            train = train.shuffle(seed=seed).select(range(min(options.train_samples, len(train))))
        if options.eval_samples is not None:
            evaluation = evaluation.select(range(min(options.eval_samples, len(evaluation))))
        return train, evaluation

    def load_rows(self, options: DataOptions, *, split: str | None = None, file: str | None = None) -> Dataset:
        """Return the raw rows of a split by name, or of a parquet file; they may lack the label column.

        Raises:
            LoraInitError: no such split or file, missing columns or values, values of the wrong type, or no rows.
        """
        where = f"file {file}" if file is not None else f"split '{split}'"
        if file is not None:
            rows = self._load({"rows": self._existing(Path(file))})["rows"]
        else:
            splits = self._read(options.path, (str(split),))
            if split not in splits:
                raise LoraInitError(f"task '{self.name}': the data have no split '{split}', only {list(splits)}")
            rows = splits[split]
        self._check(rows, where, self.columns[:-1] or self.columns)
        return rows

    def _check(self, rows: Dataset, where: str, columns: tuple[str, ...]) -> None:
        self._check_there(rows, where, columns)
        if len(rows) == 0:
            raise LoraInitError(f"task '{self.name}': {where} is empty")
        for column in dict.fromkeys((*self.columns, *self.texts)):
            if column in rows.column_names and column not in self.nullable:
                self._check_no_nulls(rows, where, column)
        for column in dict.fromkeys((*self.texts, self.columns[-1])):
            if column in rows.column_names:
                self._check_type(rows, where, column, self.label_kind if column == self.columns[-1] else "text")

    def _check_there(self, rows: Dataset, where: str, columns: tuple[str, ...]) -> None:
        missing = [c for c in columns if c not in rows.column_names]
        if missing:
            raise LoraInitError(f"task '{self.name}': {where} lacks the columns {missing}; it has {rows.column_names}")

    def _check_no_nulls(self, rows: Dataset, where: str, column: str) -> None:
        """Raise at the first row that holds nothing in a column: in a prompt it would silently become ``None``."""
        import pyarrow.compute as pc

        if rows.data.column(column).null_count == 0:  # of all that the rows are chosen from: known without a copy
            return
        table: Any = rows.with_format("arrow").select_columns([column])[:]
        row = pc.index(table[column].is_null(), True).as_py()
        if row >= 0:
            raise LoraInitError(f"task '{self.name}': {where}: row {row} holds nothing (null) in column '{column}'")

    def _check_type(self, rows: Dataset, where: str, column: str, wanted: LabelKind) -> None:
        """Raise at the first value of a column that is of another type than wanted; one without values passes."""
        from pyarrow import types

        kind = rows.data.column(column).type
        fits = {
            "text": str(kind) in ("string", "large_string", "string_view"),
            "integer": types.is_integer(kind),
            "number": types.is_integer(kind) or types.is_floating(kind),
        }
        if fits[wanted]:
            return
        for i, value in enumerate(rows[column]):
            if value is not None:
                raise LoraInitError(
                    f"task '{self.name}': {where}: row {i} holds {value!r} ({kind}) in column '{column}', which is "
                    f"no {wanted}"
                )

    def _check_labels(self, rows: Dataset, names: Sequence[str] | int) -> None:
        """Raise at the first label that is no index into some names, or below a number of classes."""
        count = names if isinstance(names, int) else len(names)
        for i, label in enumerate(rows[self.columns[-1]]):
            if not (isinstance(label, int) and 0 <= label < count):
                known = f"0 to {count - 1}" if isinstance(names, int) else f"{dict(enumerate(names))}"
                raise LoraInitError(f"task '{self.name}': row {i} has the label {label!r}, which is not one of {known}")

    def _read(self, path: str | None, splits: tuple[str, ...]) -> DatasetDict:
        """Return the splits: from ``path/SPLIT.parquet``, or all that the hub has."""
        if path is None:
            return self._load(None)
        return self._load({s: self._existing(Path(path) / f"{s}.parquet") for s in splits})

    def _existing(self, file: Path) -> str:
        if not file.is_file():
            raise LoraInitError(f"task '{self.name}': there is no file {file}")
        return str(file)

    def _load(self, files: dict[str, str] | None) -> DatasetDict:
        """Return each parquet file as a split, or all splits that the hub has."""
        from datasets import DatasetDict, load_dataset

        if files is None:
            with self._reading(f"the hub's {self.hub[0]}"):
                return load_dataset(*self.hub)  # pyright: ignore[reportReturnType]
        splits = DatasetDict()
        for split, file in files.items():
            with self._reading(file):
                splits[split] = _parquet(split, file)
        return splits

    @contextlib.contextmanager
    def _reading(self, where: str) -> Iterator[None]:
        """Say from where no rows can be read, and why."""
        from datasets.exceptions import DatasetsError

        try:
            yield
        except (DatasetsError, ValueError, OSError) as error:
            # of some errors only the cause tells what is wrong
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            raise LoraInitError(f"task '{self.name}': no rows can be read from {where}: {error}{cause}") from error


def _parquet(split: str, file: str) -> Any:
    """Return a split's rows; files that are loaded together would all need the columns of the first."""
    import pyarrow.parquet as pq
    from datasets import Dataset, load_dataset

    if pq.read_metadata(file).num_rows == 0:  # which `load_dataset` does not take
        return Dataset(pq.read_table(file))  # pyright: ignore[reportArgumentType]
    return load_dataset("parquet", data_files={split: file}, split=split)


def fingerprint(rows: Dataset) -> str:
    """Return the SHA-256 of the rows' content: the same for a hub data set and its local copy."""
    from datasets import Image

    for name, feature in rows.features.items():
        if isinstance(feature, Image):  # as stored: decoded ones have no text form
            rows = rows.cast_column(name, Image(decode=False))
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
    return digest.hexdigest()
