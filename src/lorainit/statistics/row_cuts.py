"""Cuts a batch into rows, each field along the axis that its rows lie on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraInitError

_WHOLE = ("cache_position", "num_items_in_batch")  # of the batch, not of its rows
# patches of all images in one axis, and what says how many of them each image has
_PATCHES = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
_PLACES = {"pixel_values": ("image_token_id", "image_token_index"), "pixel_values_videos": ("video_token_id",)}


class RowCutter:
    """A batch that can be cut into rows.

    Attributes:
        count: how many rows it has.
    """

    def __init__(self, batch: Any, count: int, model: nn.Module | None = None) -> None:
        """Find out where the rows of every field lie; nothing is cut yet.

        Args:
            batch: as the model takes it.
            count: how many rows it has.
            model: whose config says which tokens are places of image patches; None: patches are not cut.
        """
        self.count = count
        self._batch = batch
        self._patches = _patches_of_rows(batch, count, model) if isinstance(batch, Mapping) else {}

    def take(self, rows: slice) -> Any:
        """Return some rows.

        Raises:
            LoraInitError: a field does not lie by rows; the message names it.
        """
        return self._take(self._batch, rows, "")

    def uncut(self) -> str | None:
        """Return a field that does not lie by rows; None where all do."""
        try:
            self.take(slice(0, 1))
        except _NotByRows as error:
            return error.field
        return None

    def _take(self, value: Any, rows: slice, name: str) -> Any:
        if name in self._patches:
            return value[self._patches[name][rows].any(0)]
        if isinstance(value, Mapping):
            return {k: self._take(v, rows, str(k)) for k, v in value.items()}
        if hasattr(value, "_asdict"):
            return like(value, (self._take(v, rows, k) for k, v in value._asdict().items()))
        if isinstance(value, (tuple, list)):
            return self._take_items(value, rows, name)
        return self._take_tensor(value, rows, name) if isinstance(value, Tensor) else value

    def _take_tensor(self, value: Tensor, rows: slice, name: str) -> Tensor:
        if name == "position_ids" and value.dim() == 3:  # noqa: PLR2004 - (time, height, width) × rows × tokens
            return value[:, rows] if value.shape[1] == self.count else value
        if value.dim() == 0 or name in _WHOLE or value.shape[0] == 1 != self.count:  # one for all rows
            return value
        if value.shape[0] != self.count:
            raise _NotByRows(name, value, self.count)
        return value[rows]

    def _take_items(self, items: Any, rows: slice, name: str) -> Any:
        """Return the rows of a sequence: of each of its tensors, or its items where those are one for each row."""
        tensors = [item for item in items if isinstance(item, Tensor)]
        by_item = (
            name != ""
            and len(items) == self.count
            and not (tensors and all(item.dim() and item.shape[0] == self.count for item in tensors))
        )
        if by_item:
            return like(items, items[rows])
        return like(items, (self._take(item, rows, name) for item in items))


class _NotByRows(LoraInitError):
    """A field of a batch does not lie by rows."""

    def __init__(self, field: str, value: Tensor, count: int) -> None:
        self.field = field
        super().__init__(
            f"the field '{field}'{list(value.shape)} of a calibration batch does not lie by rows (the batch has "
            f"{count}), so the batch cannot be cut into rows: pass batches of the size that you want, without "
            "micro_batch, and as many rows as the method's samples take"
        )


def _patches_of_rows(batch: Mapping[str, Any], count: int, model: nn.Module | None) -> dict[str, Tensor]:
    """Return which entries of fields with patches, and of their grids, belong to each row (rows × entries).

    A row's images are told by the places that its tokens keep for them: each image has as many as its patches, or a
    fixed part of them where patches are merged.
    """
    found: dict[str, Tensor] = {}
    ids, config = batch.get("input_ids"), getattr(model, "config", None)
    for patches, grid in _PATCHES.items():
        sizes = batch.get(grid)
        places = next((getattr(config, n) for n in _PLACES[patches] if getattr(config, n, None) is not None), None)
        if not (isinstance(sizes, Tensor) and isinstance(ids, Tensor) and places is not None):
            continue
        lengths = sizes.prod(-1)  # patches of each image
        kept = (ids == places).sum(1)  # places of each row
        if int(kept.sum()) == 0 or int(lengths.sum()) % int(kept.sum()):
            continue
        ends = kept.cumsum(0) * (int(lengths.sum()) // int(kept.sum()))
        if not bool(torch.isin(ends, torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))).all()):
            continue  # a row's places end inside an image
        row_of_image = torch.searchsorted(ends, lengths.cumsum(0))
        rows = torch.arange(count, device=ids.device)[:, None]
        found[grid] = rows == row_of_image
        found[patches] = rows == row_of_image.repeat_interleave(lengths)
    return found


def like(batch: Any, values: Iterable[Any]) -> Any:
    """Return a sequence of the kind of another one."""
    return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
