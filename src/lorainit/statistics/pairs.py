"""Σ x_p x_fᵀ: the inputs of a layer on one set of batches beside its inputs on another, position by position."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import LoraInitError
from ..processes import ALONE, Processes
from ..sites import LoraSite
from .batches import describe, forward, iterate, position_masks
from .collect import base_only
from .layer import LayerStatistics
from .place import COMPUTED, Place
from .positions import counted, input_positions
from .request import Request
from .shards import add_up


def collect_pairs(
    model: nn.Module,
    sites: Collection[LoraSite],
    data: Iterable[Any],
    proxy_data: Iterable[Any],
    request: Request,
    *,
    place: Place = COMPUTED,
    processes: Processes = ALONE,
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
        place: where the sums live.
        processes: those whose pairs are shards of one whole, as in `lorainit.statistics.collect.collect`.
        progress: show a progress bar.

    Raises:
        LoraInitError: more batches in one of the two, or a pair whose positions that count are not as many.
    """
    found = {site.name: LayerStatistics() for site in sites}
    device = next(model.parameters()).device
    samples, several = processes.share(request.samples), processes.size > 1
    pairs = zip_longest(
        *(iterate(batches, None, samples, device, may_be_empty=several) for batches in (data, proxy_data))
    )
    with base_only(model), torch.no_grad():
        for batch, proxy in tqdm(pairs, desc="pairs", unit="batch", disable=not progress, leave=False):
            if batch is None or proxy is None:
                raise LoraInitError("data and proxy_data are to be paired, but one of them has more batches")
            after, before = (_inputs(model, sites, each, request) for each in (batch, proxy))
            for name, sums in found.items():
                x, y = after[name], before[name]
                if x.shape != y.shape:
                    raise LoraInitError(
                        f"layer '{name}': {x.shape[0]} positions count in a batch of data ({describe(batch)}), "
                        f"{y.shape[0]} in its pair ({describe(proxy)})"
                    )
                sums.tokens += y.shape[0]
                sums.add("input_sum", y.sum(0), place)
                sums.add_product("input_second_moment", y.mT, y, place)
                sums.add_product("cross_second_moment", y.mT, x, place)
    add_up(found, processes, {site.name: site.device for site in sites}, place)
    return found


def _inputs(model: nn.Module, sites: Collection[LoraSite], batch: Any, request: Request) -> dict[str, Tensor]:
    """Return each layer's inputs on a batch, a position a row."""
    masks = position_masks(model, batch, request.mask)
    seen: dict[str, list[Tensor]] = {site.name: [] for site in sites}

    def hook(site: LoraSite) -> Any:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = counted(site, input_positions(site, inputs[0]), inputs[0], masks)
            seen[site.name].append(rows.to(request.dtype))

        return keep

    handles = [site.base_layer.register_forward_pre_hook(hook(site)) for site in sites]
    try:
        forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if unseen := [name for name, rows in seen.items() if not rows]:
        raise LoraInitError(f"layer '{unseen[0]}' saw no token of the calibration data ({len(unseen)} such layers)")
    return {name: torch.cat(rows) for name, rows in seen.items()}
