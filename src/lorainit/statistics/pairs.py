"""Collects cross moments Σ x_p x_fᵀ of a layer's inputs on two sets of batches, paired position by position."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..adapter import switches
from ..adapter.sites import LoraSite
from ..errors import LoraInitError
from ..machine.processes import ALONE, Processes
from .batches import describe, forward, iterate, position_masks
from .layer import LayerStatistics
from .lockstep import Part, Passes, passes_of
from .positions import input_positions, select_counted
from .request import Request
from .shards import all_reduce
from .storage import ON_DEVICE, Storage

Masks = dict[str, Tensor]


def collect_pairs(
    model: nn.Module,
    sites: Collection[LoraSite],
    data: Iterable[Any],
    proxy_data: Iterable[Any],
    request: Request,
    *,
    storage: Storage = ON_DEVICE,
    processes: Processes = ALONE,
    may_miss: bool = False,
    progress: bool = True,
) -> dict[str, LayerStatistics]:
    """Run the base model over pairs of batches and return, by layer name, the sums over the proxy's inputs x_p.

    Those are ``input_sum``, ``input_second_moment`` and ``cross_second_moment``. The model is left as it was.

    Args:
        model: the model that holds the sites.
        sites: the layers to watch.
        data: batches as the model takes them: x_f.
        proxy_data: the batches that they are paired with, each of the same shape: x_p.
        request: for its mask, dtype and number of samples.
        storage: where the sums are kept.
        processes: those whose pairs are shards of one whole, as in `lorainit.statistics.collect.collect`.
        may_miss: a layer may see no token; its sums are then None.
        progress: show a progress bar.

    Raises:
        LoraInitError: more batches in one of the two, or a pair whose positions that count are not as many.
    """
    found = {site.name: LayerStatistics() for site in sites}
    device = next(model.parameters()).device
    samples, several = processes.share(request.samples), processes.size > 1
    sets = (iterate(batches, None, samples, device, may_be_empty=several) for batches in (data, proxy_data))
    pairs = tqdm(zip_longest(*sets), desc="pairs", unit="batch", disable=not progress, leave=False)
    with passes_of(model, processes) as passes, switches.evaluation(model), torch.no_grad():
        for pair, masks in passes.each(_with_masks(model, pairs, request)):
            watched = sites if masks is not None else ()
            both = zip(pair, masks or ({}, {}), strict=True)
            seen = [_inputs(model, watched, batch, mask, request, passes) for batch, mask in both]
            if masks is not None:
                passes.attempt(_add, found, pair, *seen, storage, may_miss)
    all_reduce(found, processes, {site.name: site.device for site in sites}, storage)
    return found


def _with_masks(model: nn.Module, pairs: Iterable[tuple[Any, Any]], request: Request) -> Iterator[Part[list[Masks]]]:
    """Yield the pairs, each with the masks of its two batches."""
    for pair in pairs:
        if any(batch is None for batch in pair):
            raise LoraInitError("data and proxy_data are to be paired, but one of them has more batches")
        yield pair, [position_masks(model, batch, request.mask) for batch in pair]


def _inputs(
    model: nn.Module,
    sites: Collection[LoraSite],
    batch: Any,
    masks: Masks,
    request: Request,
    passes: Passes,
) -> dict[str, list[Tensor]]:
    """Return each layer's inputs in a pass over a batch, one position a row."""
    seen: dict[str, list[Tensor]] = {site.name: [] for site in sites}

    def add(site: LoraSite, x: Tensor) -> None:
        seen[site.name].append(select_counted(site, input_positions(site, x), x, masks).to(request.dtype))

    def hook(site: LoraSite) -> Any:
        return lambda module, inputs: passes.attempt(add, site, inputs[0])

    handles = [site.base_layer.register_forward_pre_hook(hook(site)) for site in sites]
    try:
        with passes.running():
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _add(
    found: dict[str, LayerStatistics],
    pair: tuple[Any, Any],
    after: dict[str, list[Tensor]],
    before: dict[str, list[Tensor]],
    storage: Storage,
    may_miss: bool,
) -> None:
    """Add the inputs on a batch of the data and on its pair to the sums."""
    for name, sums in found.items():
        if may_miss and not (after[name] or before[name]):
            continue
        if not (after[name] and before[name]):
            unseen = [n for n in found if not (after[n] and before[n])]
            raise LoraInitError(f"layer '{name}' saw no token of the calibration data ({len(unseen)} such layers)")
        x, y = torch.cat(after[name]), torch.cat(before[name])
        if x.shape != y.shape:
            raise LoraInitError(
                f"layer '{name}': {x.shape[0]} positions count in a batch of data ({describe(pair[0])}), "
                f"{y.shape[0]} in its pair ({describe(pair[1])})"
            )
        sums.tokens += y.shape[0]
        sums.add("input_sum", y.sum(0), storage)
        sums.add_product("input_second_moment", y.mT, y, storage)
        sums.add_product("cross_second_moment", y.mT, x, storage)
