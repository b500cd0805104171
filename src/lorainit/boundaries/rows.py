"""Splits the user's batches into rows without padding, and collates rows into new batches.

Training steps must not depend on how the data came in batches, so the rows are separated first. A row's padding is cut
off by its attention mask and put back, on the right, only as far as the new batch needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import LoraInitError
from ..statistics.batches import count_rows, describe, iterate, split_rows

_IGNORED_LABEL = -100


def read_rows(data: Iterable[Any], samples: int | None, model: nn.Module) -> list[Any]:
    """Return the first ``samples`` rows of the data as batches of one row without padding, on the CPU.

    Rows that hold nothing else are left out.

    Raises:
        LoraInitError: the data are empty, or nothing but padding.
    """
    two_sided = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    batches = iterate(data, None, samples, torch.device("cpu"))
    rows = [row for batch in batches for row in split_rows(batch)]
    filled = [row for row in rows if not _is_padding(row)]
    if rows and not filled:
        raise LoraInitError("the calibration data hold nothing but padding: every attention_mask is 0")
    return [_unpadded(row, two_sided) for row in filled]


def _is_padding(row: Any) -> bool:
    mask = row.get("attention_mask") if isinstance(row, Mapping) else None
    return _is_sequence(mask) and not bool(mask.any())


def _unpadded(row: Any, two_sided: bool) -> Any:
    """Cut off a row's padding: in all tensors as long as the attention mask, and in those of a decoder by its own."""
    if not isinstance(row, Mapping):
        return row
    row = dict(row)
    decoder = {k for k in row if two_sided and (k == "labels" or k.startswith("decoder_"))}
    masks = [("attention_mask", row.keys() - decoder), ("decoder_attention_mask", decoder)]
    for name, keys in masks:
        mask = row.get(name)
        if mask is None and keys is decoder and _is_sequence(row.get("labels")):
            mask = row["labels"] != _IGNORED_LABEL
        if not _is_sequence(mask) or not bool(mask.any()):
            continue
        used = mask[0].nonzero().flatten()
        cut = slice(int(used[0]), int(used[-1]) + 1)
        row |= {k: row[k][:, cut] for k in keys if _is_sequence(row[k]) and row[k].shape[1] == mask.shape[1]}
    return row


def _is_sequence(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dim() == 2  # noqa: PLR2004 - (rows, tokens)


def collate(rows: Sequence[Any], model: nn.Module) -> Any:
    """Return one batch of some rows, padded on the right where their lengths differ.

    Raises:
        LoraInitError: rows that do not fit together: other keys, or lengths that differ where nothing can be padded.
    """
    first = rows[0]
    if len(rows) == 1:
        return first
    if not isinstance(first, Mapping):
        parts = list(zip(*rows, strict=True)) if isinstance(first, (tuple, list)) else [rows]
        if any(len({p.shape[1:] for p in part}) > 1 for part in parts if isinstance(part[0], Tensor)):
            raise LoraInitError("rows of different shapes can only be batched as mappings with an attention_mask")
        joined = tuple(torch.cat(p) if isinstance(p[0], Tensor) else p[0] for p in map(tuple, parts))
        return joined if isinstance(first, (tuple, list)) else joined[0]
    if any(row.keys() != first.keys() for row in rows):
        raise LoraInitError("the rows of the calibration data have different keys")
    lengths = {row["input_ids"].shape[1] for row in rows if _is_sequence(row.get("input_ids"))}
    if len(lengths) > 1 and "attention_mask" not in first:
        rows = [dict(row) | {"attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
    values = _padding(model)
    return {key: _joined(key, [row[key] for row in rows], values) for key in rows[0]}


def _padding(model: nn.Module) -> dict[str, int]:
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    pad = pad if isinstance(pad, int) and pad >= 0 else 0
    return {"input_ids": pad, "decoder_input_ids": pad, "labels": _IGNORED_LABEL}


def _joined(key: str, values: list[Any], padding: dict[str, int]) -> Any:
    if not isinstance(values[0], Tensor) or values[0].dim() == 0:
        return values[0]
    if all(_is_sequence(v) for v in values):
        longest = max(v.shape[1] for v in values)
        values = [F.pad(v, (0, longest - v.shape[1]), value=padding.get(key, 0)) for v in values]
    elif len({v.shape[1:] for v in values}) > 1:
        raise LoraInitError(f"rows of the calibration data differ in the shape of '{key}', which cannot be padded")
    return torch.cat(values)


def without_labels(batch: Any, model: nn.Module, decoder_inputs: str) -> Any:
    """Return the batch as stage 1 feeds it: without labels, unless an encoder-decoder takes them as decoder inputs.

    ``decoder_inputs="start_token"`` gives an encoder-decoder the start token alone.

    Raises:
        LoraInitError: ``"labels"`` was asked for and there are none, or no start token is known.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(batch, Mapping):
        return batch
    if not getattr(config, "is_encoder_decoder", False):
        return {k: v for k, v in batch.items() if k != "labels"}
    if decoder_inputs == "labels":
        if "labels" not in batch and "decoder_input_ids" not in batch:
            raise LoraInitError(f"decoder_inputs='labels', but the batch ({describe(batch)}) has none")
        return batch
    start = getattr(config, "decoder_start_token_id", None)
    start = getattr(config, "bos_token_id", None) if start is None else start
    if start is None:
        raise LoraInitError("the model's config names no decoder_start_token_id; use decoder_inputs='labels'")
    rows = count_rows(batch)
    device = next(v.device for v in batch.values() if isinstance(v, Tensor))
    encoder = {k: v for k, v in batch.items() if k != "labels" and not k.startswith("decoder_")}
    return encoder | {"decoder_input_ids": torch.full((rows, 1), start, dtype=torch.long, device=device)}


def position_mask(name: str, output: Tensor, batch: Any, model: nn.Module, reads_decoder: bool) -> Tensor | None:
    """Return the mask of the positions of a module's output that count (rows × positions); None where all do.

    Raises:
        LoraInitError: there is padding, and the positions cannot be matched with the mask.
    """
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    if reads_decoder and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
        mask = labels != _IGNORED_LABEL if mask is None and _is_sequence(labels) else mask
    if isinstance(mask, Tensor) and mask.dim() == 3 and output.shape[:-1] == mask.flatten(0, 1).shape:  # noqa: PLR2004
        mask = mask.flatten(0, 1)  # rows × choices × tokens: a multiple-choice model runs each choice as a row
    if not _is_sequence(mask) or bool((mask != 0).all()):
        return None
    if output.shape[:-1] == mask.shape:
        return mask != 0
    if output.dim() == 2 and output.shape[0] == mask.numel():  # noqa: PLR2004 - positions of all rows in one axis
        return (mask != 0).flatten()
    if output.dim() == 2 and output.shape[0] == mask.shape[0]:  # noqa: PLR2004 - one vector a row, after pooling
        return None
    raise LoraInitError(
        f"matched site '{name}': its output {list(output.shape)} does not fit the attention mask {list(mask.shape)}, "
        "so padding cannot be told apart; use rows of equal length"
    )
