"""Makes batches of what a fine-tuner has in hand: rows of text or messages, tokenized rows, a data set, a Trainer."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..errors import LoraInitError
from ..statistics.batches import LossFunction, count_rows, count_terms, describe

Collate = Callable[[list[Any]], Any]

_TEXTS = ("text", "messages", "prompt")  # columns that are not for the model; rows that have one are text
_IGNORED_LABEL = -100
_WRITE = "; write DataLoader(rows, batch_size=8, collate_fn=...), whose batches are what the model takes"
_ROW_DIMS = {
    "input_ids": 1,
    "pixel_values": 3,
    "input_features": 2,
    "input_values": 1,
}  # of a row; a batch has one more


class Batches(NamedTuple):
    """What a start reads.

    Attributes:
        data: batches as the model takes them.
        loss_function: the loss that goes with them; None for the model's own.
    """

    data: Any
    loss_function: LossFunction | None = None


def as_batches(
    data: Any,
    *,
    processing: Any | None = None,
    collate_fn: Collate | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    gradients: bool = True,
) -> Batches:
    """Make batches of the data, whatever form they have.

    Args:
        data: batches (a DataLoader, a list of dictionaries of tensors, an iterator, one batch alone); rows (a list, a
            `datasets.Dataset` or `IterableDataset`, a map-style data set); or a Trainer, whose training batches and
            loss are taken.
        processing: a tokenizer or processor for rows of text: strings, or rows with ``text``, ``messages`` (by its chat
            template) or ``prompt`` and ``completion``; it also pads rows that are tokenized.
        collate_fn: makes a batch of a list of rows.
        batch_size: how many rows make a batch.
        max_length: longer rows of text are cut; default: what the tokenizer says.
        gradients: a loss is needed: a Trainer's batches go with its loss. Else they go through the model as it is.

    Raises:
        LoraInitError: data that are none of these; the message shows what to write.
    """
    if hasattr(data, "get_train_dataloader") and hasattr(data, "compute_loss"):
        return _of_trainer(data, gradients)
    if isinstance(data, (str, bytes, Tensor)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise LoraInitError(f"data={_shown(data)} are neither batches nor rows{_WRITE}")
    if isinstance(data, Mapping):
        return Batches([data])
    if isinstance(data, DataLoader):
        return Batches(data)
    made = functools.partial(
        _made, processing=processing, collate_fn=collate_fn, batch_size=batch_size, max_length=max_length
    )
    return Batches(_lazily(data, made) if isinstance(data, Iterator) else _Unread(data, made))


def _lazily(data: Iterator[Any], made: Callable[[Any], Iterable[Any]]) -> Iterator[Any]:
    """Yield the batches of an iterator; nothing is read before the first one is asked for."""
    yield from made(data)


class _Unread:
    """Data of which not even the first element is looked at before they are iterated."""

    def __init__(self, data: Any, made: Callable[[Any], Iterable[Any]]) -> None:
        self._data, self._made = data, made

    def __iter__(self) -> Iterator[Any]:
        """Read the batches from the first one on."""
        return iter(self._made(self._data))


def _made(
    data: Any, *, processing: Any | None, collate_fn: Collate | None, batch_size: int, max_length: int | None
) -> Iterable[Any]:
    """Return the batches of the data, which are batches already or rows: the first element tells."""
    first, data = _first(data)
    if first is None:  # no rows and no batches: what reads them says so
        return data
    if not (_is_row(first) or collate_fn is not None or processing is not None):
        return data
    return _loader(data, collate_fn or _collate_of(first, processing, max_length), batch_size)


def _first(data: Any) -> tuple[Any, Any]:
    """Return the first element, and the data with it still in them."""
    if isinstance(data, Iterator):
        first = next(data, None)
        return first, data if first is None else itertools.chain([first], data)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return (data[0] if len(data) else None), data
    return next(iter(data), None), data


def _is_row(first: Any) -> bool:
    """Say whether the first element is a row of a data set rather than a batch."""
    if isinstance(first, str):
        return True
    if not isinstance(first, Mapping):
        return False
    for name, value in first.items():
        if name in _ROW_DIMS and (isinstance(value, (list, tuple)) or hasattr(value, "ndim")):
            return _depth(value) <= _ROW_DIMS[name]
    return any(name in first for name in _TEXTS)


def _depth(value: Any) -> int:
    """Return how deep lists or arrays are nested."""
    if hasattr(value, "ndim"):
        return int(value.ndim)
    depth = 0
    while isinstance(value, (list, tuple)):
        depth, value = depth + 1, value[0] if value else None
    return depth


def _collate_of(first: Any, processing: Any | None, max_length: int | None) -> Collate:
    """Return what makes a batch of rows like this one."""
    if isinstance(first, str) or any(name in first for name in _TEXTS if isinstance(first, Mapping)):
        if processing is None:
            raise LoraInitError(
                "data are rows of text: pass processing=tokenizer too (or collate_fn=, which makes a batch of a list "
                "of rows)"
            )
        return _TextCollator(processing, max_length)
    if not isinstance(first, Mapping):
        raise LoraInitError(f"data are rows that are no dictionaries ({_shown(first)}): pass collate_fn={_WRITE}")
    return _PaddingCollator(processing)


def _loader(data: Any, collate: Collate, batch_size: int) -> Iterable[Any]:
    """Return the batches of rows: in their order, read again at each iteration where the data can be."""
    if isinstance(data, Iterator):
        return map(collate, iter(lambda: list(itertools.islice(data, batch_size)), []))
    if isinstance(data, (Dataset, IterableDataset)) or hasattr(data, "__getitem__"):
        return DataLoader(data, batch_size=batch_size, collate_fn=collate)
    return _Chunks(data, collate, batch_size)


class _Chunks:
    """Batches of rows that can only be iterated, such as a `datasets.IterableDataset`'s."""

    def __init__(self, rows: Iterable[Any], collate: Collate, batch_size: int) -> None:
        self._rows, self._collate, self._batch_size = rows, collate, batch_size

    def __iter__(self) -> Iterator[Any]:
        """Read the rows from the first one on."""
        rows = iter(self._rows)
        while chunk := list(itertools.islice(rows, self._batch_size)):
            yield self._collate(chunk)


class _TextCollator:
    """Tokenizes rows of text and pads them; every token is a label, but those of a prompt."""

    def __init__(self, processing: Any, max_length: int | None) -> None:
        self._tokenizer = getattr(processing, "tokenizer", processing)
        self._processing, self._max_length = processing, max_length
        if getattr(self._tokenizer, "pad_token_id", None) is None:
            raise LoraInitError(
                "processing has no padding token: set it first, for example tokenizer.pad_token = tokenizer.eos_token"
            )

    def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
        """Make a batch."""
        tokens, prompts = zip(*(self._tokens(row) for row in rows), strict=True)
        batch = self._tokenizer.pad([{"input_ids": ids} for ids in tokens], return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, _IGNORED_LABEL)
        for row, (mask, prompt) in enumerate(zip(batch["attention_mask"], prompts, strict=True)):
            begin = int(mask.argmax())
            labels[row, begin : begin + prompt] = _IGNORED_LABEL
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    def _tokens(self, row: Any) -> tuple[list[int], int]:
        """Return a row's tokens, and how many of them, from the first, are a prompt's."""
        if isinstance(row, Mapping) and "messages" in row:
            found = self._processing.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
            return self._cut(found), 0
        if isinstance(row, Mapping) and "completion" in row:
            prompt = self._tokenizer(row["prompt"])["input_ids"]
            return self._cut(self._tokenizer(row["prompt"] + row["completion"])["input_ids"]), len(prompt)
        text = row if isinstance(row, str) else row["text"] if "text" in row else row["prompt"]
        return self._cut(self._tokenizer(text)["input_ids"]), 0

    def _cut(self, tokens: list[int]) -> list[int]:
        most = self._max_length or self._tokenizer.model_max_length
        return list(tokens)[:most]


class _PaddingCollator:
    """Pads tokenized rows with the tokenizer, if there is one; stacks the other columns."""

    def __init__(self, processing: Any | None) -> None:
        self._tokenizer = getattr(processing, "tokenizer", processing)

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch.

        Raises:
            LoraInitError: rows of different lengths without a tokenizer, or a column that is no number.
        """
        return {name: self._column(name, [row[name] for row in rows], rows) for name in rows[0]} | self._mask(rows)

    def _mask(self, rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        lengths = [len(row["input_ids"]) for row in rows if "input_ids" in row]
        if "attention_mask" in rows[0] or len(set(lengths)) < 2:  # noqa: PLR2004 - nothing is padded
            return {}
        return {"attention_mask": (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()}

    def _column(self, name: str, values: list[Any], rows: list[Mapping[str, Any]]) -> Tensor:
        try:
            tensors = [torch.as_tensor(value) for value in values]
        except (TypeError, ValueError, RuntimeError) as error:
            raise LoraInitError(
                f"the column '{name}' of data ({_shown(values[0])}) is nothing that a model takes: remove it, or pass "
                "collate_fn="
            ) from error
        if len({tensor.shape for tensor in tensors}) == 1:
            return torch.stack(tensors)
        if self._tokenizer is None or tensors[0].dim() != 1:
            raise LoraInitError(
                f"rows of data differ in the length of '{name}': pass processing=tokenizer, which pads them, or "
                "collate_fn="
            )
        padding = {"input_ids": self._tokenizer.pad_token_id, "labels": _IGNORED_LABEL}.get(name, 0)
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding)


def _of_trainer(trainer: Any, gradients: bool) -> Batches:
    """Return a Trainer's own training batches and loss."""
    from transformers import Trainer

    if not gradients and hasattr(trainer, "collect_features"):  # sentence-transformers: columns of several sentences
        return Batches(_Features(trainer))

    plain = type(trainer).compute_loss is Trainer.compute_loss
    smoothed = getattr(trainer, "label_smoother", None) or getattr(trainer, "compute_loss_func", None)
    if plain and not smoothed:  # the model's own loss
        return Batches(_TrainerBatches(trainer))

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        terms = count_terms(model, batch) or count_rows(batch)
        found = trainer.compute_loss(model, dict(batch))
        return found * terms, terms

    return Batches(_TrainerBatches(trainer), loss)


class _TrainerBatches:
    """The training batches of a Trainer, which does not notice that they are read."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        """Read them from the first one on."""
        prepared = self._trainer.accelerator._dataloaders
        loader = self._trainer.get_train_dataloader()
        if loader in prepared:
            prepared.remove(loader)
        return iter(loader)


class _Features:
    """The sentences of a sentence-transformers trainer, one column at a time, as its model takes them."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        """Read them from the first one on."""
        for batch in _TrainerBatches(self._trainer):
            for features in self._trainer.collect_features(batch)[0]:
                yield {"input": {name: value for name, value in features.items() if isinstance(value, Tensor)}}


def summed(loss_function: Callable[[nn.Module, Any], Any]) -> LossFunction:
    """Return a loss (model, batch) -> mean loss as (model, batch) -> (summed loss, number of terms): of rows.

    One that returns both already stays as it is.
    """

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        found = loss_function(model, batch)
        if isinstance(found, tuple):
            return found
        if not (isinstance(found, Tensor) and found.numel() == 1):
            raise LoraInitError(
                f"loss_function returned {_shown(found)} for a batch ({describe(batch)}): it must return the mean loss "
                "as a tensor of one number"
            )
        rows = count_rows(batch)
        return found.reshape(()) * rows, rows

    return loss


def _shown(value: Any) -> str:
    """Return a value for a message: its type, and its beginning where that is short."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'…' * (len(text) > 60)}"  # noqa: PLR2004
