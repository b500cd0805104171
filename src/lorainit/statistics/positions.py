"""Turns a layer's inputs and output gradients into rows, one a position, and selects those that count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from ..adapter.sites import LoraSite
from ..errors import LoraInitError
from .layout import Layout

Side = Literal["input", "decoder", "encoder"]
_DECODERS = ("decoder", "text_decoder")
_HEADS = ("lm_head", "proj_out")  # of an encoder-decoder: their positions are the decoder's
_CROSS = ("encdecattention", "encoder_attn", "encoder_decoder_attention", "crossattention", "cross_attn")
_KEYS_AND_VALUES = ("k", "v", "k_proj", "v_proj", "key", "value", "key_proj", "value_proj", "c_attn")


def input_positions(site: LoraSite, x: Tensor) -> Tensor:
    """Return a layer's input as (positions, in): tokens, or the unfolded patches of a convolution."""
    if site.kind != "conv":
        return x.reshape(-1, x.shape[-1])
    base: Any = site.base_layer
    padding = base._reversed_padding_repeated_twice  # padding="same" included
    x = F.pad(x, padding)
    for axis, (size, stride) in enumerate(zip(base.kernel_size, base.stride, strict=True)):
        x = x.unfold(2 + axis, size, stride)  # (rows, channels, *positions, *kernel)
    dims = len(base.kernel_size)
    x = x.movedim(1, 1 + dims)  # (rows, *positions, channels, *kernel)
    return x.reshape(-1, site.in_features)


def geometry(site: LoraSite) -> tuple[Any, ...]:
    """Return kernel, stride and padding, or the width: layers with equal ones and the same input tensor share sums."""
    base: Any = site.base_layer
    if site.kind != "conv":
        return (site.in_features,)
    return (*base.kernel_size, *base.stride, *base._reversed_padding_repeated_twice)


def output_positions(site: LoraSite, gradient: Tensor) -> Tensor:
    """Return a gradient at a layer's output as (positions, out), in the order of `input_positions`."""
    if site.kind != "conv":
        return gradient.reshape(-1, gradient.shape[-1])
    return gradient.movedim(1, -1).reshape(-1, site.out_features)


def select_counted(
    site: LoraSite, rows: Tensor, tensor: Tensor, masks: Mapping[str, Tensor], layout: Layout | None = None
) -> Tensor:
    """Return the rows (positions × features) of a tensor whose positions count: no padding, or scored ones.

    Args:
        site: the layer.
        rows: its positions.
        tensor: what they were taken from.
        masks: which tokens count, by the side that a layer reads.
        layout: how the positions lie; None: told by the tensor's shape, where that is possible.

    Raises:
        LoraInitError: there is padding, and the layer's positions cannot be matched with the mask.
    """
    mask = masks.get(side(site.name))
    if mask is None or site.kind == "conv" or bool(mask.all()):
        return rows
    if site.is_routed:
        raise LoraInitError(
            f"layer '{site.name}': an expert's tokens do not say which positions they come from, so those that do not "
            f"count in the mask {list(mask.shape)} cannot be told apart; use batches without padding"
        )
    order = _order_in(tensor, mask) if layout is None else layout
    if order == "unreached":
        return rows
    pooled = tensor.dim() == 2 or layout is not None  # noqa: PLR2004 - one vector a row
    if pooled and rows.shape[0] == mask.shape[0] != mask.numel():
        return rows
    if order in ("rows first", "tokens first") and rows.shape[0] == mask.numel():
        return rows[(mask.T if order == "tokens first" else mask).flatten()]
    raise LoraInitError(
        f"layer '{site.name}': {rows.shape[0]} positions do not match the attention mask {list(mask.shape)}, so "
        "padding cannot be told apart; use batches without padding"
    )


def _order_in(tensor: Tensor, mask: Tensor) -> Layout:
    """Return the order of a tensor's positions as far as its shape tells it."""
    count, length = mask.shape
    if tensor.shape[:-1] == mask.shape and (count != length or count == 1):
        return "rows first"
    if tensor.shape[:-1] == mask.T.shape and count != length:
        return "tokens first"
    return "rows first" if 1 in (count, length) else "other"


def side(name: str) -> Side:
    """Return which positions a layer reads: the decoder's, the encoder's output (cross-attention), or the input's.

    In a model with one side only a decoder's positions are the input.
    """
    parts = name.lower().split(".")
    decodes = any(part in _DECODERS for part in parts)
    crosses = any(part in _CROSS or (decodes and part == "cross_attention") for part in parts)
    if crosses and parts[-1] in _KEYS_AND_VALUES:
        return "encoder"
    return "decoder" if decodes or any(part in _HEADS for part in parts) else "input"


def reads_decoder(name: str) -> bool:
    """Say whether a layer of an encoder-decoder reads decoder positions; cross-attention keys and values do not."""
    return side(name) == "decoder"
