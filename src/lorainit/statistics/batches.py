"""What a calibration batch says: its rows, which positions count, how many label terms its loss averages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import LoraInitError

MaskKind = Literal["attention", "labels"]
NO_BATCH = "the calibration data are empty: not a single batch"
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
    """Yield the batches on the model's device, at most ``max_batches`` of them and ``max_rows`` rows, the last one cut.

    Raises:
        LoraInitError: there is no batch at all, and it may not be so.
    """
    index, left = -1, math.inf if max_rows is None else max_rows
    for index, batch in enumerate(data):
        if left <= 0 or (max_batches is not None and index >= max_batches):
            return
        rows = count_rows(batch)
        yield to_device(batch if rows <= left else take_rows(batch, slice(0, int(left))), device)
        left -= rows
    if index < 0 and not may_be_empty:
        raise LoraInitError(NO_BATCH)


def forward(model: nn.Module, batch: Any) -> Any:
    """Run the model on a batch as a training loop would: a mapping by keyword, a sequence by position.

    Raises:
        LoraInitError: the model refuses the batch.
    """
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    except LoraInitError:  # what a watch has to say
        raise
    except (TypeError, ValueError) as error:
        raise LoraInitError(f"the model refuses a calibration batch ({describe(batch)}): {error}") from error


def describe(batch: Any) -> str:
    """Return the keys and shapes of a batch for a message."""
    if isinstance(batch, Mapping):
        return ", ".join(f"{k}{list(v.shape) if isinstance(v, Tensor) else ''}" for k, v in batch.items())
    return type(batch).__name__


def count_rows(batch: Any) -> int:
    """Return the number of rows (sequences, images) in a batch."""
    sizes = [v.shape[0] for v in _tensors(batch) if v.dim() > 0]
    if not sizes:
        raise LoraInitError(f"a calibration batch holds no tensor ({describe(batch)})")
    return sizes[0]


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(value)


def named_fields(batch: Any) -> dict[str, Any]:
    """Return what a batch names, in mappings inside it as well (what a sentence-transformers model takes)."""
    found: dict[str, Any] = {}
    if isinstance(batch, (Mapping, tuple, list)):
        for name, value in batch.items() if isinstance(batch, Mapping) else ((None, v) for v in batch):
            found |= named_fields(value) if name is None or isinstance(value, Mapping) else {name: value}
    return found


def take_rows(batch: Any, rows: slice) -> Any:
    """Return some rows of a batch."""
    if isinstance(batch, Mapping):
        return {k: take_rows(v, rows) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(take_rows(v, rows) for v in batch)
    return batch[rows] if isinstance(batch, Tensor) and batch.dim() else batch


def split_rows(batch: Any, size: int = 1) -> list[Any]:
    """Return the batch as batches of at most ``size`` rows."""
    return [take_rows(batch, slice(i, i + size)) for i in range(0, count_rows(batch), size)]


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
    labels = named_fields(batch).get("labels")
    if not isinstance(labels, Tensor):
        return None
    if labels.dim() != 2 or labels.is_floating_point():  # noqa: PLR2004 - (rows, tokens)
        return labels.shape[0]
    return int(((labels[:, 1:] if predicts_next_token(model) else labels) != -100).sum())


def predicts_next_token(model: nn.Module) -> bool:
    """Say whether labels are shifted inside the model: the logits of a position score the next one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    name = type(base).__name__
    encoder_decoder = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    return ("CausalLM" in name or "LMHeadModel" in name) and not encoder_decoder


def summed_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """Return the loss of a batch summed over its label terms, and their number.

    Transformers' models return the mean over the terms: rows for a classifier, labelled tokens for a language model
    (one fewer a row where labels are shifted inside the model).

    Raises:
        LoraInitError: no labels in the batch, no loss in the output, or not a single label term.
    """
    loss, terms = loss_in(forward(model, batch), model, batch)
    if terms == 0:
        raise LoraInitError(f"a calibration batch ({describe(batch)}) has no label that counts: all are -100")
    return loss, terms


def loss_in(output: Any, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """Return the summed loss in what a model has made of a batch, NaN without a label term, and their number.

    Raises:
        LoraInitError: no labels in the batch, or no loss in the output.
    """
    terms = count_terms(model, batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if terms is None or loss is None:
        raise LoraInitError(
            f"this method needs gradients, hence a loss: the batch ({describe(batch)}) must hold 'labels' and the "
            "model must return a loss; or pass loss_function=(model, batch) -> (summed loss, number of terms)"
        )
    return loss * terms, terms


def position_masks(model: nn.Module, batch: Any, kind: MaskKind) -> dict[str, Tensor]:
    """Return which positions count: ``"input"`` for the (encoder's) input, ``"decoder"`` for a decoder's.

    Positions that are not named by a mask all count. ``kind="labels"`` keeps the positions whose output is scored.
    """
    fields = named_fields(batch)
    masks: dict[str, Tensor] = {}
    attention = fields.get("attention_mask")
    if isinstance(attention, Tensor) and attention.dim() == 2:  # noqa: PLR2004
        masks["input"] = attention.bool()
    labels = fields.get("labels")
    token_labels = isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()  # noqa: PLR2004
    if token_labels and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        masks["decoder"] = labels != -100  # pyright: ignore[reportArgumentType]
    elif token_labels and kind == "labels":
        scored = labels != -100
        if predicts_next_token(model):
            scored = torch.cat((scored[:, 1:], torch.zeros_like(scored[:, :1])), dim=1)  # pyright: ignore
        masks["input"] = masks.get("input", torch.ones_like(scored)) & scored  # pyright: ignore[reportArgumentType]
    return masks


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device."""
    if isinstance(batch, Mapping):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(v, device) for v in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch
