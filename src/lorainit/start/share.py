"""The work on single layers (a start, the worth of its components), shared out over the processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapter.sites import LoraSite, on_cpu
from ..errors import LoraInitError, UnsupportedLayerError
from ..machine import memory
from ..machine.processes import Processes, shared_out
from ..statistics import LayerStatistics

Known = tuple[LayerStatistics, ...]  # of the data, and of the data to compare them with if there are any
Work = Callable[[LoraSite, Sequence[Known]], tuple[Any, Sequence[Tensor]]]


class Done(NamedTuple):
    """What came out of the work on one layer.

    Attributes:
        site: the layer.
        about: what the work says beside tensors; None where it was refused.
        tensors: what it has computed.
        refused: why the method cannot start the layer; None where it can.
        remarks: what the user should know.
        starved: memory ran out; it may suffice while no sums of other layers are held.
    """

    site: LoraSite
    about: Any
    tensors: Sequence[Tensor]
    refused: str | None
    remarks: tuple[str, ...] = ()
    starved: bool = False


def each_layer(
    sites: Sequence[LoraSite],
    known: dict[str, Known],
    work: Work,
    processes: Processes,
    *,
    skip: str,
    alone: bool = False,
) -> Iterator[Done]:
    """Yield what the work on every layer comes to, the same in every process; each layer is one process's business.

    Layers with the same input stay with the same process, which computes what they share once. A sharded weight is put
    together just for the one that works on it, one layer a process at a time.

    Args:
        sites: the layers.
        known: what is known about them, or about their experts; each layer's is dropped when it is done with, or not
            this process's.
        work: takes a layer and what is known about each of its `members`, returns an object and tensors.
        processes: who shares the work.
        skip: ``"error"``: a layer that the method cannot start is one; else it comes back refused.
        alone: nothing else is held that could be dropped: a layer that memory does not suffice for is an error, too;
            else it comes back starved.

    Raises:
        UnsupportedLayerError: see ``skip``.
        LoraInitError: the memory does not suffice for one layer, or another process has failed.
    """
    if processes.size == 1:
        for site in sites:
            site.put_together(keep=True)
            yield _work_on(site, _taken(site, known), work, skip, alone=alone)
            site.drop_whole()
        return
    shares = _shares(sites, known, processes.size)
    mine = set(shares[processes.rank])
    for site in sites:
        if site.name not in mine:
            _taken(site, known)
    named = {site.name: site for site in sites}
    found: dict[str, Done] = {}
    for turn in itertools.zip_longest(*shares):
        for rank, name in enumerate(turn):
            if name is not None:
                named[name].put_together(keep=rank == processes.rank)
        if (name := turn[processes.rank]) is not None:
            found[name] = _work_on(named[name], _taken(named[name], known), work, skip, alone=alone)
            named[name].drop_whole()
        if any(site.is_sharded for site in sites):  # else nobody waits for anybody before the end
            processes.exchange(None)
    pooled = processes.pool(
        {name: ((done.about, done.refused, done.remarks, done.starved), done.tensors) for name, done in found.items()}
    )
    for site in sites:
        (about, refused, remarks, starved), tensors = pooled[site.name]
        yield Done(site, about, [tensor.to(site.device) for tensor in tensors], refused, remarks, starved)


def _taken(site: LoraSite, known: dict[str, Known]) -> list[Known]:
    """Take out what is known about each member of a layer."""
    return [known.pop(member.name, ()) for member in site.members]


def _shares(sites: Sequence[LoraSite], known: dict[str, Known], size: int) -> list[list[str]]:
    """Return the names of the layers that each process works on; those that share their input stay together."""
    units: dict[object, list[LoraSite]] = {}
    for site in sites:
        sums = known.get(site.members[0].name)
        units.setdefault(id(sums[0].shared) if sums else site.name, []).append(site)
    costs: dict[str, float] = {}
    members: dict[str, list[str]] = {}
    for unit in units.values():
        first = unit[0].name
        members[first] = [site.name for site in unit]
        costs[first] = sum(
            site.experts * site.out_features * site.in_features * min(site.out_features, site.in_features)
            for site in unit
        )
    return [[name for first in share for name in members[first]] for share in shared_out(costs, size)]


def _work_on(site: LoraSite, known: Sequence[Known], work: Work, skip: str, *, alone: bool) -> Done:
    """Do the work on a layer; once more on the CPU, if its device has not the memory for it.

    Raises:
        UnsupportedLayerError: see `each_layer`; or its numbers are none that can be worked with.
        LoraInitError: memory does not suffice.
    """
    remarks: tuple[str, ...] = ()
    last = ""
    elsewhere = site.device.type != "cpu" and site.kind != "experts"
    try:
        if site.kind != "experts" and any(sums.tokens == 0 for own in known for sums in own):
            raise UnsupportedLayerError(f"layer '{site.name}' saw no token of the calibration data")
        for place in (site, on_cpu(site)) if elsewhere else (site,):
            try:
                about, tensors = work(place, known)
                return Done(site, about, [tensor.to(site.device) for tensor in tensors], None, remarks)
            except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
                raise UnsupportedLayerError(
                    f"layer '{site.name}': its start cannot be computed ({str(error).splitlines()[0]}); is its weight, "
                    f"of norm {site.weight_norm:.3g}, or are its statistics near the largest or the smallest number?"
                ) from error
            except (RuntimeError, MemoryError) as error:
                if not memory.ran_out(error):
                    raise
                last = str(error).splitlines()[0]
            memory.free()
            remarks = (f"memory ran out while its start was computed on {place.device}: computed on the CPU",)
    except UnsupportedLayerError as error:
        if skip == "error":
            raise
        return Done(site, None, (), str(error), remarks)
    if any(known) and not alone:
        return Done(site, None, (), None, starved=True)
    raise LoraInitError(
        f"layer '{site.name}': memory does not suffice to compute its start, not even of this layer alone and on the "
        f"CPU ({last}); lower its rank, or leave it out"
    )
