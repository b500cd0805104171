"""Collects calibration statistics for the layers of a plan, and reallocates ranks by them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from ..adapter.rank import resize
from ..adapter.sites import LoraSite
from ..adapter.undo import Undo
from ..adapter.write import write_start
from ..errors import LoraInitError
from ..machine.precision import own_precision
from ..methods import Method
from ..methods.kaiming import Kaiming
from ..methods.method import TrainedMethod
from ..numerics.seeds import layer_generator
from ..report import LayerReport
from ..statistics import LayerStatistics, Request
from ..statistics.collect import collect as collect_sums
from ..statistics.collect import collect_groups
from ..statistics.pairs import collect_pairs
from ..statistics.store import collect_cached
from .budget import allocate
from .call import Call
from .checks import check_proxies, check_rereadable
from .find import Plan
from .rows import row_without_rank
from .share import Known, each_layer


class Group(NamedTuple):
    """Layers whose statistics are held at the same time.

    Attributes:
        sites: the layers.
        known: what the data say about each, by name; about expert parameters by the names of the experts.
    """

    sites: list[LoraSite]
    known: dict[str, Known]


class Calibration:
    """The calibration data of a call, and the statistics of layers that they give.

    Attributes:
        batches: what the method may use of the data: () for a data-free method, None where saved statistics stand in.
        remarks: what the user should know about the passes that were made.
        source: where saved statistics were found or written; None without a cache.
    """

    def __init__(self, call: Call) -> None:
        """Check the data against the method; nothing is read yet.

        Raises:
            LoraInitError: data that are missing, not wanted or not to be read twice; a cache with a memory budget.
        """
        self._call = call
        self.remarks: list[str] = []
        self.source: dict[str, Any] | None = None
        self._request = _sums_to_collect(call)
        if self._request is not None and call.cache is not None and call.memory_budget is not None:
            raise LoraInitError("cache keeps the statistics of all layers together: it does not go with memory_budget")
        check_proxies(call.method, call.proxy_data)
        self.batches = usable_batches(call.method, call.data, call.max_batches, cached=call.cache is not None)
        check_rereadable(self.batches, call.proxy_data)
        gradients = self._request is not None and self._request.needs_gradients
        if call.cache is not None and gradients and call.loss_function is not None:
            raise LoraInitError(
                "cache knows statistics by model and data, not by loss: leave out cache or loss_function"
            )

    def groups(self, sites: list[LoraSite]) -> Iterator[Group]:
        """Run the data and yield the layers in groups whose statistics fit the memory budget.

        The statistics of a group are the receiver's: what is popped from them is free.
        """
        if self._request is None:
            yield Group(sites, {})
            return
        for group, statistics in self._collected(sites, self._request):
            seconds = self._compared(group, self._request)
            known = {name: (sums, seconds[name]) if seconds else (sums,) for name, sums in statistics.items()}
            statistics.clear()  # so that what is popped from `known` is free
            del seconds
            yield Group(group, known)

    def _collected(
        self, sites: list[LoraSite], request: Request
    ) -> Iterable[tuple[list[LoraSite], dict[str, LayerStatistics]]]:
        """Return the statistics of the data: from the cache, or collected group by group."""
        call = self._call
        options: dict[str, Any] = {"memory_budget": call.memory_budget, "micro_batch": call.micro_batch}
        options |= {"storage": call.storage, "processes": call.processes, "progress": call.progress}
        options |= {"may_miss": call.skip == "default"}  # such a layer is then refused by itself
        if call.cache is None:
            data = () if self.batches is None else self.batches
            more = {"workspace": call.method.workspace, "remarks": self.remarks}
            return collect_groups(call.model, sites, data, request, **options, **more)
        found, self.source = collect_cached(call.model, sites, self.batches, request, Path(call.cache), **options)
        return [(sites, found)]

    def _compared(self, sites: list[LoraSite], request: Request) -> dict[str, LayerStatistics]:
        """Return the statistics of the batches to compare the data with, if the method compares."""
        call = self._call
        options: dict[str, Any] = {"storage": call.storage, "processes": call.processes, "progress": call.progress}
        options |= {"may_miss": call.skip == "default"}
        if call.proxy_data is None:
            return {}
        if call.method.comparison == "pairs" and self.batches is not None:
            return collect_pairs(call.model, sites, self.batches, call.proxy_data, request, **options)
        return collect_sums(call.model, sites, call.proxy_data, request, **options)


class Sums(NamedTuple):
    """What is known about the layers that are going to be started.

    Attributes:
        sites: the layers that have an adapter: all of the plan's, but for those that rank 0 was given to.
        groups: their statistics, group by group; the data are run as they are asked for.
        calibration: where the statistics come from.
        without_rank: rows of the report for the layers that rank 0 was given to, by name.
    """

    sites: list[LoraSite]
    groups: Iterable[Group]
    calibration: Calibration
    without_rank: Mapping[str, LayerReport] = MappingProxyType({})


def collect(plan: Plan, undo: Undo) -> Sums:
    """Collect the statistics that the method needs, lazily, group by group; reallocate ranks if they are shared out.

    Raises:
        LoraInitError: see `Calibration`.
    """
    calibration = Calibration(plan.call)
    if plan.call.rule.rule != "fixed":
        return _share_out(plan, calibration, undo)
    return Sums(plan.sites, calibration.groups(plan.sites), calibration)


def _share_out(plan: Plan, calibration: Calibration, undo: Undo) -> Sums:
    """Give the layers the ranks that the rule says; those that get rank 0 lose their adapter.

    Where all statistics are held at once they serve for the start as well; else the data are run a second time.
    """
    call, sites = plan.call, plan.sites
    energies, held = _energies(call, sites, calibration)
    shared = [site for site in sites if site.name in energies]
    before = {site.name: site.rank for site in sites}
    bare = {site.name: row_without_rank(site) for site in sites}
    given = allocate(
        energies,
        {site.name: site.rank for site in shared},
        shapes={site.name: (site.out_features, site.in_features) for site in shared},
        limits={site.name: call.method.rank_limit(site) for site in shared},
        **dataclasses.asdict(call.rule),
    )
    kept = resize(call.model, sites, before | given, undo)
    for site in kept:
        if site.rank != before[site.name]:  # so that a layer that the method then cannot start is a plain LoRA
            write_start(site, Kaiming().start(site, layer_generator(call.seed, site.name)), "keep", undo)
    for site in kept:
        del bare[site.name]
    again = not held and call.method.request is not None
    return Sums(kept, calibration.groups(kept) if again else [Group(kept, held)], calibration, bare)


def _energies(
    call: Call, sites: list[LoraSite], calibration: Calibration
) -> tuple[dict[str, Tensor], dict[str, Known]]:
    """Return what the components of each layer are worth, and the statistics if those of all layers are held at once.

    Raises:
        LoraInitError: memory does not suffice for a layer.
    """
    energies: dict[str, Tensor] = {}
    held: dict[str, Known] = {}

    def worth(site: LoraSite, known: Sequence[Known]) -> tuple[None, list[Tensor]]:
        with own_precision(site.device):
            return None, [call.method.energies(site, *known[0])]

    for group, known in calibration.groups(sites):
        for done in each_layer(group, dict(known), worth, call.processes, skip=call.skip):
            if done.starved:
                raise LoraInitError(
                    f"layer '{done.site.name}': memory does not suffice to tell what its components are worth; pass "
                    "memory_budget"
                )
            if done.refused is None:
                energies[done.site.name] = done.tensors[0].cpu()
        held = known if len(group) == len(sites) else {}
    return energies, held


def usable_batches(
    method: Method, data: Iterable[Any] | None, max_batches: int | None, *, cached: bool
) -> Iterable[Any] | None:
    """Return the batches that the method may use; nothing for a data-free one, None where saved statistics stand in.

    Raises:
        LoraInitError: it needs data, and there are none.
    """
    trained = isinstance(method, TrainedMethod)
    if method.request is None and not trained:
        return ()
    if data is None:
        if cached and not trained:
            return None
        labels = ", with labels" if method.request is not None and method.request.needs_gradients else ""
        raise LoraInitError(
            f"{method.info.name} needs calibration data: pass data=batches as the model takes them{labels}"
        )
    if max_batches is None and not isinstance(data, Iterator):
        return data
    few = itertools.islice(data, max_batches)
    again = trained or cached or method.comparison == "pairs"  # these are run more than once
    return list(few) if again else few


def _sums_to_collect(call: Call) -> Request | None:
    """Return what is to be collected for the method, with the ranks given by the rule; None: nothing."""
    request = call.method.request and call.method.request.seeded(call.seed)
    if request is None:
        return None
    if call.rule.rule != "fixed":  # the worth of every component, not of the leading ones
        request = dataclasses.replace(request, sketch=None)
    return dataclasses.replace(request, loss_function=call.loss_function)
