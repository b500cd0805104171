"""OLoRA: the adapter starts from the QR decomposition of the weight."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from .._typing import Float, Tensor
from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..numerics.linalg import require_rank
from .method import Method, MethodInfo, require_rank_at_most_min
from .registry import register


def factors(weight: Float[Tensor, "out in"], rank: int) -> Factors:
    """Return ``B = Q[:, :r]`` (orthonormal columns) and ``A = R[:r]`` of the reduced ``W = QR``.

    Büyükakyüz 2024, arXiv:2406.01775. Only the first r Householder steps are needed: the first r columns of Q depend on
    the first r columns of W alone, and ``R[:r] = Q[:, :r]ᵀ W``. The sign rule is ``R[i, i] ≥ 0``.
    The scaling does not enter.
    """
    require_rank(weight, rank)
    Q, R = torch.linalg.qr(weight[:, :rank])
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q.dtype)
    B = Q * sign
    return Factors(B.mT @ weight, B)


@register
@dataclasses.dataclass(frozen=True)
class OLoRA(Method):
    """Orthonormal B and the matching rows of R: BA is the projection of W on its first r columns' span."""

    info: ClassVar = MethodInfo(
        name="olora",
        summary="B = Q[:, :r], A = R[:r] of W = QR",
        paper="Büyükakyüz 2024, arXiv:2406.01775",
        product="preserve",
        deterministic=True,
    )

    def start(self, site: LoraSite, generator: torch.Generator) -> Factors:
        """Return the leading QR part of the site's weight."""
        require_rank_at_most_min(site)
        return factors(site.weight(), site.rank)
