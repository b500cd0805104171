"""Gaussian start: PEFT's ``init_lora_weights="gaussian"``."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from .method import Method, MethodInfo
from .registry import register


def factors(out_features: int, in_features: int, rank: int, *, generator: torch.Generator) -> Factors:
    """Return ``A ~ N(0, 1/rank²)``, ``B = 0`` (Hu et al. 2021, arXiv:2106.09685, section 4.1, with PEFT's deviation).

    Float32 on the generator's device.
    """
    A = torch.randn(rank, in_features, generator=generator, device=generator.device) / rank
    return Factors(A, torch.zeros(out_features, rank, device=generator.device))


@register
@dataclasses.dataclass(frozen=True)
class Gaussian(Method):
    """Gaussian A with deviation 1/r, zero B."""

    info: ClassVar = MethodInfo(
        name="gaussian",
        summary="A normal with deviation 1/r, B = 0",
        paper="Hu et al. 2021, arXiv:2106.09685",
        product="zero",
    )

    def start(self, site: LoraSite, generator: torch.Generator) -> Factors:
        """Return Gaussian A and zero B."""
        return factors(site.out_features, site.in_features, site.rank, generator=generator)
