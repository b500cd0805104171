"""Sums Σ v vᵀ over rows v: half of the entries are computed, the others follow by symmetry."""

from __future__ import annotations

from .._typing import Float, Tensor
from .layer import LayerStatistics
from .storage import ON_DEVICE, Storage

_BLOCK = 256  # rows of the sum that are updated at a time: (1 + block/n)/2 of all products are computed


def add_second_moment(
    statistics: LayerStatistics, stream: str, rows: Float[Tensor, "tokens n"], storage: Storage = ON_DEVICE
) -> None:
    """Add ``rowsᵀ rows`` to the lower triangle of a sum (and some of the upper one); `mirror` completes it."""
    n = rows.shape[1]
    held = getattr(statistics, stream)
    if held is None:
        held = storage.zeros((n, n), rows.dtype, rows.device)
        setattr(statistics, stream, held)
    if held.device != rows.device:
        held.add_((rows.mT @ rows).to(held.device))
        return
    for begin in range(0, n, _BLOCK):
        end = min(begin + _BLOCK, n)
        held[begin:end, :end].addmm_(rows[:, begin:end].mT, rows[:, :end])


def mirror(moment: Float[Tensor, "n n"]) -> None:
    """Copy the lower triangle over the upper one, in place."""
    n = len(moment)
    for begin in range(0, n, _BLOCK):
        end = min(begin + _BLOCK, n)
        moment[:begin, begin:end] = moment[begin:end, :begin].mT
        corner = moment[begin:end, begin:end]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
