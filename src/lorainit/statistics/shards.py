"""Adds up the sums that several processes have collected over their shards of the data, in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..machine.processes import Processes
from .layer import LayerStatistics, Shared
from .request import INPUT_STREAMS
from .storage import ON_DEVICE, Storage

_COUNTS = ("sequences", "tokens", "labels")


class _Layer(NamedTuple):
    """Description of a layer's sums in one process.

    Attributes:
        counts: sequences, tokens, labels.
        sums: shape and dtype of each sum that it has.
        leader: the first layer with the same input; None where the layer saw no token.
    """

    counts: dict[str, int]
    sums: dict[str, tuple[torch.Size, torch.dtype]]
    leader: str | None


def all_reduce(
    statistics: Mapping[str, LayerStatistics],
    processes: Processes,
    devices: Mapping[str, torch.device],
    storage: Storage = ON_DEVICE,
) -> None:
    """Replace the sums of every layer by those over all processes, also where this process has seen no token of it.

    Layers share their input sums where they do so in every process that has any.

    Args:
        statistics: the sums by layer name, for the same layers in every process.
        processes: the processes.
        devices: where the sums of a layer are computed.
        storage: where they are kept.
    """
    if processes.size == 1:
        return
    by_process: list[dict[str, _Layer]] = processes.exchange(_described(statistics))
    units: dict[tuple[object, str], Tensor] = {}  # each sum once
    taken: set[int] = set()
    shared: dict[object, Shared] = {}
    for name, sums in statistics.items():
        described = [layers[name] for layers in by_process]
        for count in _COUNTS:
            setattr(sums, count, sum(layer.counts[count] for layer in described))
        same_input = tuple(layer.leader for layer in described)
        sums.shared = shared.setdefault(same_input, Shared())
        for stream, (shape, dtype) in sorted(
            {s: kind for layer in described for s, kind in layer.sums.items()}.items()
        ):
            unit = (same_input if stream in INPUT_STREAMS else name, stream)
            if unit not in units:
                own = getattr(sums, stream)
                if own is None:
                    own = storage.zeros(shape, dtype, devices[name])
                elif id(own) in taken:  # shared here, but not everywhere
                    own = storage.zeros(shape, dtype, devices[name]).copy_(own)
                units[unit] = own
                taken.add(id(own))
            setattr(sums, stream, units[unit])
    processes.add_up(units.values())


def _described(statistics: Mapping[str, LayerStatistics]) -> dict[str, _Layer]:
    leaders: dict[int, str] = {}
    found: dict[str, _Layer] = {}
    for name, sums in statistics.items():
        held = {field.name: getattr(sums, field.name) for field in dataclasses.fields(sums)}
        tensors = {stream: (value.shape, value.dtype) for stream, value in held.items() if isinstance(value, Tensor)}
        counts = {count: held[count] for count in _COUNTS}
        leader = leaders.setdefault(id(sums.shared), name) if sums.tokens else None
        found[name] = _Layer(counts, tensors, leader)
    return found
