"""`initialize(..., match_lr=...)`: a started adapter, re-expressed so that vanilla's learning rate suits it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from ..adapter import scaling
from ..adapter.sites import LoraSite
from ..errors import LoraInitError
from ..report import LayerReport
from ..statistics.batches import LossFunction

_BATCHES = 8
_PRODUCTS = 24  # with the Hessian, at most: for this start and for vanilla's
CHANCE = 0.2  # two draws of vanilla's own start differ by about this much


def by_magnitude(sites: Sequence[LoraSite], rows: Mapping[str, LayerReport]) -> dict[str, LayerReport]:
    """Give each layer the scale at which its first update under Adam is as large as vanilla's, or smaller if it was."""
    found: dict[str, LayerReport] = {}
    for site in sites:
        row = rows[site.name]
        if row.rank > 0:  # else the adapter was taken off
            ratio = scaling.match(site)
            row = dataclasses.replace(row, scaling=site.scaling, rate_ratio=ratio)
        found[site.name] = row
    return found


def by_curvature(
    model: nn.Module,
    sites: Sequence[LoraSite],
    rows: Mapping[str, LayerReport],
    data: Iterable[Any],
    scalings: Mapping[str, float],
    *,
    max_batches: int | None,
    seed: int,
    loss_function: LossFunction | None = None,
    progress: bool = False,
) -> tuple[dict[str, LayerReport], dict[str, float]]:
    """Give all layers a smaller scale where the loss is nearer to instability than with vanilla's start.

    Under Adam that is by √(λ of vanilla / λ here), λ the top curvature in A and B (`lorainit.diagnostics.curvature`).

    Args:
        model: the model.
        sites: the started layers, matched `by_magnitude`, one at least.
        rows: of the report.
        data: batches with labels.
        scalings: the user's, which vanilla has, by layer.
        max_batches: use at most so many batches, and eight at most.
        seed: of vanilla's start and the eigenvalue's first vector.
        loss_function: (model, batch) -> (summed loss, number of terms); default: the model's own loss.
        progress: show a progress bar.

    Returns:
        The rows, and what was found: ``sharpness``, ``vanilla_sharpness`` and the ``ratio`` that all layers were given.

    Raises:
        LoraInitError: no batch, no labels, no positive curvature, or a model that cannot be differentiated twice.
    """
    from ..diagnostics.curvature import AdapterLoss  # needs more than a start does
    from ..diagnostics.learning_rate import sharpness_beside_vanilla

    most = min(max_batches or _BATCHES, _BATCHES)
    loss = AdapterLoss(model, sites, data, max_batches=most, loss_function=loss_function)
    with tqdm(total=_PRODUCTS, desc="curvature", unit="product", disable=not progress, leave=False) as bar:
        product = loss.hessian_product

        def counted(vectors: Sequence[Tensor]) -> list[Tensor]:
            found = product(vectors)
            bar.update()
            return found

        loss.hessian_product = counted
        here, vanilla = sharpness_beside_vanilla(loss, sites, scalings, seed=seed)
    ratio = math.sqrt(vanilla / here)
    ratio = ratio if ratio < 1 - CHANCE else 1.0
    found = dict(rows)
    for site in sites:
        row = rows[site.name]
        if row.rate_ratio is not None:
            total = row.rate_ratio * ratio
            scaling.express(site, ratio, scalings[site.name] * total**2)
            found[site.name] = dataclasses.replace(row, scaling=site.scaling, rate_ratio=total)
    return found, {"sharpness": here, "vanilla_sharpness": vanilla, "ratio": ratio}


def check_curvature(data: Iterable[Any] | None, base: str, processes: int, sites: Sequence[LoraSite]) -> None:
    """Raise unless ``match_lr="curvature"`` is possible."""
    if data is None:
        raise LoraInitError("match_lr='curvature' needs data: pass batches as the model takes them, with labels")
    if base == "subtract":
        raise LoraInitError("match_lr='curvature' compares with vanilla's start, which base='subtract' leaves no base")
    if processes > 1 or any(site.is_sharded for site in sites):
        raise LoraInitError(
            "match_lr='curvature' runs in one process that holds the whole model: start the adapter there, save it, "
            "and lorainit.load it in the others; or pass match_lr=True"
        )
