"""One pass of the model over the calibration batches for everything that a method needs."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..errors import LoraInitError
from ..processes import ALONE, Processes
from ..sites import LoraSite
from .batches import LossFunction, iterate, summed_loss
from .layer import LayerStatistics
from .request import Request, Sketch
from .shards import add_up
from .watch import Watch

__all__ = ["Request", "Sketch", "collect", "collect_groups"]


def collect(
    model: nn.Module,
    sites: Collection[LoraSite],
    data: Iterable[Any],
    request: Request,
    *,
    max_batches: int | None = None,
    memory_budget: int | None = None,
    micro_batch: int | None = None,
    offload: bool = False,
    loss_function: LossFunction | None = None,
    processes: Processes = ALONE,
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
        offload: keep the sums in CPU memory while the model runs on an accelerator.
        loss_function: (model, batch) -> (summed loss, number of terms); default `summed_loss`.
        processes: those whose data are shards of one whole: the sums are over all of them, the same in each. One that
            has no batch may be among them; of ``request.samples`` each takes its share, of ``max_batches`` all.
        progress: show a progress bar.

    Raises:
        LoraInitError: no batch, no labels where gradients are needed, a batch that the model refuses, a layer that saw
            no token, or whose positions cannot be told from padding, or that does not fit the budget alone.
        NonFiniteError: NaN or infinity; the message names layer and batch.
    """
    found: dict[str, LayerStatistics] = {}
    options: dict[str, Any] = {"max_batches": max_batches, "memory_budget": memory_budget}
    options |= {"micro_batch": micro_batch, "offload": offload, "loss_function": loss_function, "progress": progress}
    options |= {"processes": processes}
    for _, statistics in collect_groups(model, sites, data, request, **options):
        found |= statistics
    return found


def collect_groups(
    model: nn.Module,
    sites: Collection[LoraSite],
    data: Iterable[Any],
    request: Request,
    *,
    max_batches: int | None = None,
    memory_budget: int | None = None,
    micro_batch: int | None = None,
    offload: bool = False,
    loss_function: LossFunction | None = None,
    processes: Processes = ALONE,
    progress: bool = True,
) -> Iterator[tuple[list[LoraSite], dict[str, LayerStatistics]]]:
    """Yield the groups of sites that fit the budget, each with its sums, as `collect` does.

    The next group is only collected when it is asked for: drop the sums of one before that, and no more than the budget
    is ever held.
    """
    if micro_batch is not None and micro_batch < 1:
        raise LoraInitError(f"micro_batch must be ≥ 1 or None, got {micro_batch}")
    groups = _groups(list(sites), request, memory_budget)
    store = torch.device("cpu") if offload else None
    batches = data if len(groups) == 1 or not isinstance(data, Iterator) else list(data)
    for group in groups:
        with base_only(model), Watch(model, group, request, store=store) as watch:
            bar = tqdm(desc="calibration", unit="batch", disable=not progress, leave=False)
            device, samples = next(model.parameters()).device, processes.share(request.samples)
            for batch in iterate(batches, max_batches, samples, device, may_be_empty=processes.size > 1):
                watch.run(batch, loss_function or summed_loss, micro_batch)
                bar.update()
            bar.close()
        add_up(watch.statistics, processes, {site.name: store or site.device for site in group})
        found = watch.finish()
        yield group, found
        del found, watch


@contextlib.contextmanager
def base_only(model: nn.Module) -> Iterator[None]:
    """Switch adapters, training mode and parameter gradients off, and put them back."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "_disable_adapters")]
    disabled = [m._disable_adapters for m in layers]
    training = [(m, m.training) for m in model.modules()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for layer in layers:
            layer._disable_adapters = True
        for parameter in trainable:
            parameter.requires_grad_(False)
        model.eval()
        yield
    finally:
        for layer, flag in zip(layers, disabled, strict=True):
            layer._disable_adapters = flag
        for module, flag in training:
            module.training = flag
        for parameter in trainable:
            parameter.requires_grad_(True)


def _groups(sites: list[LoraSite], request: Request, budget: int | None) -> list[list[LoraSite]]:
    """Split the sites, in order, into groups whose sums fit the budget (shared inputs counted as if they were not)."""
    if budget is None:
        return [sites]
    groups: list[list[LoraSite]] = [[]]
    held = 0
    for site in sites:
        size = request.sum_bytes(site)
        if size > budget:
            raise LoraInitError(
                f"layer '{site.name}' alone needs {size:,} bytes of statistics, more than memory_budget ({budget:,})"
            )
        if held + size > budget:
            groups.append([])
            held = 0
        groups[-1].append(site)
        held += size
    return groups
