"""What a start rests on: the batches, the statistics of every layer, a random stream of its own, its rank."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapter.rank import resize
from ..adapter.sites import LoraSite
from ..adapter.undo import Undo
from ..adapter.write import write_start
from ..errors import LoraInitError
from ..machine.precision import own_precision
from ..machine.processes import Processes
from ..methods import Method
from ..methods.kaiming import Kaiming
from ..methods.method import TrainedMethod
from ..numerics.seeds import layer_generator
from ..statistics import LayerStatistics, Request
from ..statistics.batches import check_max_batches
from ..statistics.collect import collect, collect_groups
from ..statistics.pairs import collect_pairs
from ..statistics.store import collect_cached
from .budget import RankRule, Rule, allocate
from .share import Known, each_layer

Groups = Iterable[tuple[list[LoraSite], dict[str, Known]]]


def usable_batches(
    method: Method, data: Iterable[Any] | None, max_batches: int | None, *, cached: bool
) -> Iterable[Any] | None:
    """Return the batches that the method may use; nothing for a data-free one, None where saved statistics stand in.

    Raises:
        LoraInitError: it needs data, and there are none; or not even one batch is to be used.
    """
    check_max_batches(max_batches)
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


def collected_sums(method: Method, rule: RankRule, seed: int) -> Request | None:
    """Return what is to be collected for a method whose layers get their ranks by a rule; None: nothing."""
    request = method.request and method.request.seeded(seed)
    if rule.rule != "fixed" and request is not None:  # the worth of every component, not of the leading ones
        return dataclasses.replace(request, sketch=None)
    return request


def layer_groups(
    model: nn.Module,
    method: Method,
    request: Request | None,
    batches: Iterable[Any] | None,
    proxies: Iterable[Any] | None,
    sites: list[LoraSite],
    *,
    cache: str | os.PathLike[str] | None,
    saved: dict[str, Any],
    remarks: list[str],
    **options: Any,
) -> Iterator[tuple[list[LoraSite], dict[str, Known]]]:
    """Yield the sites, in groups whose statistics fit the budget, and what the method needs to know about each.

    What it knows about expert parameters comes by the names of the experts.

    Args:
        model: the model that holds the sites.
        method: the method.
        request: what it needs to know; None: nothing.
        batches: the calibration data; None: the cache has to stand in.
        proxies: the batches to compare them with.
        sites: the layers.
        cache: folder of saved statistics.
        saved: takes what is to be told about them, as ``"statistics"``.
        remarks: takes what the user should know about the collection.
        options: of `lorainit.statistics.collect_groups`.

    Raises:
        LoraInitError: a cache together with a memory budget, or data to compare with that are missing or not wanted.
    """
    _check_proxies(method, batches, proxies)
    if request is None:
        yield sites, {}
        return
    own = {name: options[name] for name in ("storage", "processes", "progress")}
    if cache is None:
        more = {"workspace": method.workspace, "remarks": remarks}
        groups = collect_groups(model, sites, () if batches is None else batches, request, **options, **more)
    elif options["memory_budget"] is not None:
        raise LoraInitError("cache keeps the statistics of all layers together: it does not go with memory_budget")
    else:
        found, saved["statistics"] = collect_cached(model, sites, batches, request, Path(cache), **options)
        groups = [(sites, found)]
    for group, statistics in groups:
        seconds: dict[str, LayerStatistics] = {}
        if proxies is not None and method.comparison == "pairs" and batches is not None:
            seconds = collect_pairs(model, group, batches, proxies, request, **own)
        elif proxies is not None:
            seconds = collect(model, group, proxies, request, **own)
        known = {name: (sums, seconds[name]) if seconds else (sums,) for name, sums in statistics.items()}
        statistics.clear()  # so that what is popped from `known` is free
        del seconds
        yield group, known


def _check_proxies(method: Method, batches: Iterable[Any] | None, proxies: Iterable[Any] | None) -> None:
    """Raise unless there is a second set of batches just where the method compares with one."""
    if proxies is None:
        if method.comparison == "pairs" or getattr(method, "constraint", None) == "F1p":
            raise LoraInitError(f"{method} compares with pre-training-like data: pass proxy_data=batches")
        return
    if method.comparison is None:
        raise LoraInitError(f"{method} compares with no second set of batches: leave proxy_data out")
    for name, given in (("data", batches), ("proxy_data", proxies)):
        if isinstance(given, Iterator):
            raise LoraInitError(f"{name} is read more than once here: pass a list or a DataLoader, not an iterator")


def rank_rule(ranks: Rule | RankRule, method: Method) -> RankRule:
    """Return the rule by which layers get their ranks; raise if the method has nothing to share out by it."""
    try:
        rule = ranks if isinstance(ranks, RankRule) else RankRule(ranks)
    except ValueError as error:
        raise LoraInitError(f"ranks: {error}") from error
    if rule.rule != "fixed" and not method.info.variable_ranks:
        raise LoraInitError(
            f"{method.info.name} has no components of falling worth to share out: ranks='fixed' is the only rule for it"
        )
    return rule


def share_out(
    model: nn.Module,
    sites: list[LoraSite],
    method: Method,
    rule: RankRule,
    seed: int,
    collecting: Callable[[list[LoraSite]], Groups],
    undo: Undo,
    processes: Processes,
    *,
    skip: str,
) -> tuple[list[LoraSite], Groups]:
    """Give the layers the ranks that the rule says; return the sites that keep their adapter, and their groups.

    Where all statistics are held at once they serve for the start as well; else the data are run a second time.
    """
    energies: dict[str, Tensor] = {}
    held: dict[str, Known] = {}

    def worth(site: LoraSite, known: Sequence[Known]) -> tuple[None, list[Tensor]]:
        with own_precision(site.device):
            return None, [method.energies(site, *known[0])]

    for group, statistics in collecting(sites):
        for done in each_layer(group, dict(statistics), worth, processes, skip=skip):
            if done.starved:
                raise LoraInitError(
                    f"layer '{done.site.name}': memory does not suffice to tell what its components are worth; pass "
                    "memory_budget"
                )
            if done.refused is None:
                energies[done.site.name] = done.tensors[0].cpu()
        held = statistics if len(group) == len(sites) else {}
    shared = [site for site in sites if site.name in energies]
    before = {site.name: site.rank for site in sites}
    given = allocate(
        energies,
        {site.name: site.rank for site in shared},
        shapes={site.name: (site.out_features, site.in_features) for site in shared},
        limits={site.name: method.rank_limit(site) for site in shared},
        **dataclasses.asdict(rule),
    )
    kept = resize(model, sites, before | given, undo)
    for site in kept:
        if site.rank != before[site.name]:  # so that a layer that the method then cannot start is a plain LoRA
            write_start(site, Kaiming().start(site, layer_generator(seed, site.name)), "keep", undo)
    return kept, [(kept, held)] if held or method.request is None else collecting(kept)
