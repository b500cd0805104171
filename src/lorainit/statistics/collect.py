"""Collects calibration statistics in one pass of the model over the batches, in groups of layers that fit a budget."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..adapter import switches
from ..adapter.sites import LoraSite
from ..errors import LoraInitError
from ..machine import memory
from ..machine.processes import ALONE, Processes
from .batches import iterate
from .layer import LayerStatistics
from .lockstep import passes_of
from .request import Request, Sketch
from .shards import all_reduce
from .storage import ON_DEVICE, Storage
from .watch import Watch

__all__ = ["Request", "Sketch", "collect", "collect_groups"]


Workspace = Callable[[LoraSite], int]


def collect(
    model: nn.Module,
    sites: Collection[LoraSite],
    data: Iterable[Any],
    request: Request,
    *,
    max_batches: int | None = None,
    memory_budget: int | None = None,
    micro_batch: int | None = None,
    storage: Storage = ON_DEVICE,
    processes: Processes = ALONE,
    may_miss: bool = False,
    progress: bool = True,
) -> dict[str, LayerStatistics]:
    """Run the base model (adapters off, eval mode) over the data and return the sums of every site by name.

    Layers that receive the very same tensor share one input statistic. The model is left as it was: flags, hooks,
    gradients, also after an exception.

    Args:
        model: the model that holds the sites.
        sites: the layers to watch.
        data: batches as the model takes them. With ``memory_budget`` it is iterated once a group.
        request: what to collect.
        max_batches: stop after so many.
        memory_budget: bytes that the sums may take at a time; layers go in groups that fit.
        micro_batch: rows that run at a time: less memory for activations, the same sums.
        storage: where the sums are kept.
        processes: those whose data are shards of one whole: the sums are over all of them, the same in each. One that
            has no batch may be among them; of ``request.samples`` each takes its share, of ``max_batches`` all. Those
            that hold a model together (FSDP2) run their passes in step, see `lorainit.statistics.lockstep`.
        may_miss: a layer may see no token; its sums are then None.
        progress: show a progress bar.

    Raises:
        LoraInitError: no batch, no labels where gradients are needed, a batch that the model refuses, a layer that saw
            no token, or whose positions cannot be told from padding, or that does not fit the budget alone.
        NonFiniteError: NaN or infinity; the message names layer and batch.
    """
    groups = collect_groups(
        model,
        sites,
        data,
        request,
        max_batches=max_batches,
        memory_budget=memory_budget,
        micro_batch=micro_batch,
        storage=storage,
        processes=processes,
        may_miss=may_miss,
        progress=progress,
    )
    return {name: sums for _, statistics in groups for name, sums in statistics.items()}


def collect_groups(
    model: nn.Module,
    sites: Collection[LoraSite],
    data: Iterable[Any],
    request: Request,
    *,
    max_batches: int | None = None,
    memory_budget: int | None = None,
    micro_batch: int | None = None,
    storage: Storage = ON_DEVICE,
    processes: Processes = ALONE,
    workspace: Workspace = lambda site: 0,
    remarks: list[str] | None = None,
    may_miss: bool = False,
    progress: bool = True,
) -> Iterator[tuple[list[LoraSite], dict[str, LayerStatistics]]]:
    """Yield the groups of sites that fit the budget, each with its sums; arguments and errors as of `collect`.

    Two arguments come on top. ``workspace`` tells how many bytes the work on a layer takes beside its sums: they come
    out of the budget too. ``remarks`` takes what the user should know.

    The experts of a stack stay in one group; their sums come by their names. The next group is only collected when it
    is asked for: drop the sums of one before that, and no more than the budget is ever held. A group on which memory
    runs out all the same is split, and the data run again.
    """
    if micro_batch is not None and micro_batch < 1:
        raise LoraInitError(f"micro_batch must be ≥ 1 or None, got {micro_batch}")
    pending = _groups(list(sites), request, memory_budget, workspace)
    once = isinstance(data, Iterator) and len(pending) == 1
    batches = list(data) if isinstance(data, Iterator) and not once else data
    while pending:
        group = pending.pop(0)
        watch = Watch(model, [part for site in group for part in site.members], request, storage=storage)
        found = _sums(watch, batches, max_batches, micro_batch, processes, progress, may_miss)
        del watch
        if found is None:
            memory.free()
            pending[:0] = _split(group, once)
            if remarks is not None:
                remarks.append(f"memory ran out on a group of {len(group)} layers: it was split and the data run again")
            continue
        yield group, found
        del found


def _split(group: list[LoraSite], once: bool) -> list[list[LoraSite]]:
    """Return the halves of a group on which memory ran out; raise if that cannot help."""
    if len(group) == 1 or once:
        raise LoraInitError(
            f"memory ran out while the statistics of {len(group)} layers ('{group[0].name}' first) were collected: "
            "pass memory_budget, a smaller micro_batch or offload=True, and data that can be iterated more than once"
        )
    return [group[: len(group) // 2], group[len(group) // 2 :]]


def _sums(
    watch: Watch,
    batches: Iterable[Any],
    max_batches: int | None,
    micro_batch: int | None,
    processes: Processes,
    progress: bool,
    may_miss: bool,
) -> dict[str, LayerStatistics] | None:
    """Return the sums over the data of all processes; None where memory ran out in one of them."""
    found = None
    if all(processes.exchange(_run(watch, batches, max_batches, micro_batch, processes, progress))):
        all_reduce(watch.statistics, processes, {site.name: site.device for site in watch.sites}, watch.storage)
        found = _finished(watch, may_miss)
    return found if all(processes.exchange(found is not None)) else None


def _finished(watch: Watch, may_miss: bool) -> dict[str, LayerStatistics] | None:
    """Return the completed sums; None where memory runs out while they are completed."""
    try:
        return watch.finish(may_miss=may_miss)
    except (RuntimeError, MemoryError) as error:
        if not memory.ran_out(error):
            raise
        return None


def _run(
    watch: Watch,
    batches: Iterable[Any],
    max_batches: int | None,
    micro_batch: int | None,
    processes: Processes,
    progress: bool,
) -> bool:
    """Run the model over this process's batches; return False where memory ran out."""
    device, samples = next(watch.model.parameters()).device, processes.share(watch.request.samples)
    try:
        with passes_of(watch.model, processes) as passes, switches.evaluation(watch.model), watch:
            found = iterate(batches, max_batches, samples, device, may_be_empty=processes.size > 1)
            bar = tqdm(found, desc="calibration", unit="batch", disable=not progress, leave=False)
            watch.run(bar, passes=passes, micro_batch=micro_batch)
    except (RuntimeError, MemoryError) as error:
        if not memory.ran_out(error):
            raise
        return False
    return True


def _groups(sites: list[LoraSite], request: Request, budget: int | None, workspace: Workspace) -> list[list[LoraSite]]:
    """Split the sites, in order, into groups whose sums fit the budget together with the work on one of them.

    Sums that layers share are counted as if they did not.
    """
    if budget is None:
        return [sites]
    groups: list[list[LoraSite]] = [[]]
    held = taken = 0
    for site in sites:
        sums, work = request.sum_bytes(site), workspace(site)
        if sums + work > budget:
            raise LoraInitError(
                f"layer '{site.name}' alone needs {sums:,} bytes of statistics and about {work:,} to be solved, more "
                f"than memory_budget ({budget:,})"
            )
        if held + sums + max(taken, work) > budget:
            groups.append([])
            held = taken = 0
        groups[-1].append(site)
        held, taken = held + sums, max(taken, work)
    return groups
