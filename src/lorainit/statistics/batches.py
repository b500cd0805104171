"""Reads calibration batches: their rows, which positions count, how many label terms their loss averages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from ..errors import LoraInitError
from ..machine import memory
from .architecture import is_encoder_decoder, shifts_labels
from .row_cuts import RowCutter, like

MaskKind = Literal["attention", "labels"]
NO_BATCH = "the calibration data are empty: not a single batch"
_INPUTS = ("input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values")  # the first has all rows
_BY_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "labels", "position_ids", "token_type_ids")
LossFunction = Callable[[nn.Module, Any], tuple[Tensor, int]]


def iterate(
    data: Iterable[Any],
    max_batches: int | None,
    max_rows: int | None,
    device: torch.device,
    *,
    may_be_empty: bool = False,
) -> Iterator[Any]:
    """Yield the batches on the model's device, at most ``max_batches`` and ``max_rows`` rows, the last batch cut.

    Raises:
        LoraInitError: there is no batch and ``may_be_empty`` is False, or ``max_batches`` is below 1.
    """
    check_max_batches(max_batches)
    index, left = -1, math.inf if max_rows is None else max_rows
    for index, batch in enumerate(data):
        if left <= 0 or (max_batches is not None and index >= max_batches):
            return
        rows = count_rows(batch)
        yield to_device(batch if rows <= left else take_rows(batch, slice(0, int(left))), device)
        left -= rows
    if index < 0 and not may_be_empty:
        raise LoraInitError(NO_BATCH)


def check_max_batches(max_batches: int | None) -> None:
    """Raise unless at least one batch is to be used."""
    if max_batches is not None and max_batches < 1:
        raise LoraInitError(f"max_batches must be ≥ 1 or None, got {max_batches}")


def forward(model: nn.Module, batch: Any) -> Any:
    """Run the model on a batch as a training loop would: a mapping by keyword, a sequence by position.

    A trainer's ``num_items_in_batch`` is left out: with it the loss would be no mean over the batch's own terms.

    Raises:
        LoraInitError: the model refuses the batch.
    """
    try:
        if isinstance(batch, Mapping):
            return model(**{k: v for k, v in batch.items() if k != "num_items_in_batch"})
        return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    except LoraInitError:  # raised by a hook
        raise
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_about_the_batch(error):
            raise
        raise LoraInitError(f"the model refuses a calibration batch ({describe(batch)}): {error}") from error


def _is_about_the_batch(error: RuntimeError) -> bool:
    """Say whether torch refuses a batch's shapes or types; the rest is known elsewhere, or of other processes."""
    together = distributed.is_available() and distributed.is_initialized()
    return not (together or memory.ran_out(error) or str(error).startswith("Inference tensors cannot"))


def describe(batch: Any) -> str:
    """Return the keys and shapes of a batch for a message."""
    if isinstance(batch, Mapping):
        return ", ".join(f"{k}{list(v.shape) if isinstance(v, Tensor) else ''}" for k, v in batch.items())
    return type(batch).__name__


def count_rows(batch: Any) -> int:
    """Return the number of rows (sequences, images) in a batch: the length of its inputs, or of most of its tensors.

    Raises:
        LoraInitError: it holds no tensor, no row or no token, or ids that are none, or it is one row of a dataset.
    """
    fields = named_fields(batch)
    inputs = [fields[name] for name in _INPUTS if isinstance(fields.get(name), Tensor)]
    tensors = [v for v in inputs[:1] or _tensors(batch) if v.dim() > 0]
    if not tensors:
        raise LoraInitError(f"a calibration batch holds no tensor ({describe(batch)})")
    ids = fields.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() == 1:
        raise LoraInitError(
            f"a calibration batch ({describe(batch)}) is one row: its input_ids have one axis instead of two, rows × "
            "tokens; put the rows together with a DataLoader"
        )
    if isinstance(ids, Tensor) and ids.is_floating_point():
        raise LoraInitError(f"a calibration batch ({describe(batch)}) has input_ids of {ids.dtype}: pass integers")
    if any(v.numel() == 0 for v in inputs[:1]):
        raise LoraInitError(f"a calibration batch ({describe(batch)}) is empty: it has no row, or rows of no token")
    rows = Counter(v.shape[0] for v in tensors).most_common(1)[0][0]
    if rows == 0:
        raise LoraInitError(f"a calibration batch ({describe(batch)}) is empty: it has no row")
    return rows


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(value)


def named_fields(batch: Any) -> dict[str, Any]:
    """Return the named fields of a batch, nested mappings included (sentence-transformers models take them)."""
    batch = _by_name(batch)
    found: dict[str, Any] = {}
    if isinstance(batch, (Mapping, tuple, list)):
        for name, value in batch.items() if isinstance(batch, Mapping) else ((None, v) for v in batch):
            found |= named_fields(value) if name is None or isinstance(value, Mapping) else {name: value}
    return found


def _by_name(batch: Any) -> Any:
    """Return a named tuple as a mapping."""
    return batch._asdict() if hasattr(batch, "_asdict") else batch


def take_rows(batch: Any, rows: slice, model: nn.Module | None = None) -> Any:
    """Return some rows of a batch.

    Raises:
        LoraInitError: a field of the batch does not lie by rows.
    """
    return RowCutter(batch, count_rows(batch), model).take(rows)


def split_rows(batch: Any, size: int = 1, model: nn.Module | None = None) -> list[Any]:
    """Return the batch as batches of at most ``size`` rows.

    Raises:
        LoraInitError: a field of the batch does not lie by rows.
    """
    cutter = RowCutter(batch, count_rows(batch), model)
    return [cutter.take(slice(i, min(i + size, cutter.count))) for i in range(0, cutter.count, size)]


def without_padding(row: Any) -> Any:
    """Return a batch of one row without the padding behind its tokens.

    Raises:
        LoraInitError: there is padding in front of them, or nothing but padding.
    """
    mask = named_fields(row)["attention_mask"].bool()
    length = int(mask.sum())
    if length == 0 or not bool(mask[:, :length].all()):
        raise LoraInitError(
            "experts see tokens that do not say whether they are padding, so padding is cut off, and that is only "
            f"possible behind the tokens of a row (attention_mask {mask.int().tolist()[0]}); pad on the right, or use "
            "batches without padding"
        )
    return _cut(row, mask.shape[1], length)


def _cut(value: Any, full: int, length: int, name: str = "") -> Any:
    if isinstance(value, Mapping):
        return {key: _cut(item, full, length, str(key)) for key, item in value.items()}
    by_token = name in _BY_TOKEN and isinstance(value, Tensor) and value.shape[1:2] == (full,)
    classes = name == "labels" and isinstance(value, Tensor) and value.is_floating_point()
    return value[:, :length] if by_token and not classes else value


def count_terms(model: nn.Module, batch: Any) -> int | None:
    """Return how many label terms a model's loss averages over: labelled tokens, or rows; None without labels."""
    fields = named_fields(batch)
    if not isinstance(fields.get("labels"), Tensor):
        return None
    labels = _token_labels(fields)
    if labels is None:
        return fields["labels"].shape[0]
    return int(((labels[:, 1:] if shifts_labels(model) else labels) != -100).sum())


def _token_labels(fields: Mapping[str, Any]) -> Tensor | None:
    """Return the labels if there is one for each token."""
    labels = fields.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():  # noqa: PLR2004
        return None
    return labels


def summed_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """Return the loss of a batch summed over its label terms, and their number.

    Transformers' models return the mean over the terms: rows for a classifier, labelled tokens for a language model
    (one fewer a row where labels are shifted inside the model).

    Raises:
        LoraInitError: no labels in the batch, no loss in the output, or not a single label term.
    """
    loss, terms = loss_of_output(forward(model, batch), model, batch)
    if terms == 0:
        raise LoraInitError(f"a calibration batch ({describe(batch)}) has no label that counts: all are -100")
    return loss, terms


def loss_of_output(output: Any, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """Return the summed loss from a model's output on a batch, NaN without a label term, and the number of terms.

    Raises:
        LoraInitError: no labels in the batch, or no loss in the output.
    """
    terms = count_terms(model, batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if terms is None or loss is None:
        raise LoraInitError(
            f"this method needs gradients, hence a loss: the batch ({describe(batch)}) must hold 'labels' and the "
            "model must return a loss; or pass loss_function=(model, batch) -> mean loss"
        )
    return loss * terms, terms


def position_masks(model: nn.Module, batch: Any, kind: MaskKind) -> dict[str, Tensor]:
    """Return masks of the positions that count, by what a layer reads (`lorainit.statistics.positions.side`).

    ``"input"`` is the (encoder's) input, ``"decoder"`` the decoder's, ``"encoder"`` the encoder's output, of which
    cross-attention makes keys and values. A side without a mask counts whole. ``kind="labels"`` keeps the positions
    whose output is scored.

    Raises:
        LoraInitError: a mask that does not say of each token whether it counts.
    """
    fields = named_fields(batch)
    attention = _mask(fields, "attention_mask")
    if is_encoder_decoder(model):
        found = {"input": attention, "encoder": attention, "decoder": _decoder_mask(fields, attention, kind)}
    else:
        labels = _token_labels(fields) if kind == "labels" else None
        if labels is not None:
            scored = labels != -100
            if shifts_labels(model):
                scored = torch.cat((scored[:, 1:], torch.zeros_like(scored[:, :1])), dim=1)
            attention = _scored(attention, scored)
        # one side, whatever a layer is called; the encoder's output of cross-attention comes with a mask of its own
        found = {"input": attention, "decoder": attention, "encoder": _mask(fields, "encoder_attention_mask")}
    return {side: mask for side, mask in found.items() if mask is not None}


def _mask(fields: Mapping[str, Any], name: str) -> Tensor | None:
    """Return a mask of a batch as (rows, tokens); in multiple choice every answer is a row, as in the model."""
    mask = fields.get(name)
    if not isinstance(mask, Tensor):
        return None
    ids, embeddings = fields.get("input_ids"), fields.get("inputs_embeds")
    tokens = ids.shape if isinstance(ids, Tensor) else embeddings.shape[:-1] if isinstance(embeddings, Tensor) else ()
    if mask.dim() == 3 and mask.shape == tokens:  # noqa: PLR2004 - (rows, answers, tokens)
        mask = mask.flatten(0, 1)
    if mask.dim() != 2:  # noqa: PLR2004
        raise LoraInitError(
            f"{name}{list(mask.shape)} in a calibration batch does not say of each token whether it is padding; pass a "
            "mask of rows × tokens, or batches without padding and without that mask"
        )
    return mask.bool()


def _decoder_mask(fields: Mapping[str, Any], attention: Tensor | None, kind: MaskKind) -> Tensor | None:
    """Return the mask of a decoder's positions: its own, else that of the positions with a label."""
    mask, labels = _mask(fields, "decoder_attention_mask"), _token_labels(fields)
    if labels is not None and (mask is None or kind == "labels"):
        return _scored(mask, labels != -100)
    if mask is None and attention is not None and not any(str(name).startswith("decoder_") for name in fields):
        # the decoder then reads the encoder's tokens, shifted by one (BART as a classifier)
        return torch.cat((torch.ones_like(attention[:, :1]), attention[:, :-1]), dim=1)
    return mask


def _scored(mask: Tensor | None, scored: Tensor) -> Tensor:
    """Return the mask of positions that are scored and are no padding."""
    if mask is not None and mask.shape != scored.shape:
        raise LoraInitError(
            f"the mask {list(mask.shape)} and the labels {list(scored.shape)} of a calibration batch differ in shape"
        )
    return scored if mask is None else mask & scored


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device."""
    if isinstance(batch, Mapping):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return like(batch, (to_device(v, device) for v in batch))
    return batch.to(device) if isinstance(batch, Tensor) else batch
