"""MiLoRA: the adapter starts as the minor singular part of the weight."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from .._typing import Float, Tensor
from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..errors import UnsupportedLayerError
from ..numerics.linalg import exact_svd
from .method import Method, MethodInfo, require_rank_at_most_min
from .pissa import split_evenly
from .registry import register


def factors(weight: Float[Tensor, "out in"], rank: int, scaling: float) -> Factors:
    """Return the r *trailing* singular triplets: ``A = √(S/s)·Vᵀ``, ``B = U·√(S/s)``.

    Wang et al. 2024, arXiv:2406.09044. A full SVD: the trailing subspace has no randomized shortcut.
    """
    return split_evenly(exact_svd(weight, rank, smallest=True), scaling)


@register
@dataclasses.dataclass(frozen=True)
class MiLoRA(Method):
    """The r smallest singular triplets of W, so that training disturbs the principal part least."""

    info: ClassVar = MethodInfo(
        name="milora",
        summary="s·BA = the r trailing singular triplets of W",
        paper="Wang et al. 2024, arXiv:2406.09044",
        product="preserve",
        deterministic=True,
    )

    def start(self, site: LoraSite, generator: torch.Generator) -> Factors:
        """Return the minor part of the site's weight.

        Raises:
            UnsupportedLayerError: the trailing singular values vanish, so that A = B = 0 would never train.
        """
        require_rank_at_most_min(site)
        start = factors(site.weight(), site.rank, site.scaling)
        # columns of B have norm √(S_i/s); below rounding of the norm of W they are noise, not directions
        smallest = float(start.B.norm(dim=0).min()) ** 2 * site.scaling
        if smallest <= torch.finfo(start.B.dtype).eps * site.weight_norm:
            raise UnsupportedLayerError(
                f"layer '{site.name}': its {site.rank} smallest singular values reach down to {smallest:.1e}, so the "
                "minor part of the weight is zero and the MiLoRA start would be dead; use another method or rank"
            )
        return start
