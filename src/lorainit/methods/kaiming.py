"""Kaiming start: PEFT's default and every comparison's control."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from .method import Method, MethodInfo
from .registry import register


def factors(out_features: int, in_features: int, rank: int, *, generator: torch.Generator) -> Factors:
    """Return ``A ~ U(±1/√in)``, ``B = 0``.

    The bound is Kaiming's for a = √5, so that Var A = 1/(3·in) (He et al. 2015, arXiv:1502.01852; Hu et al. 2021,
    arXiv:2106.09685, as implemented in PEFT). Float32 on the generator's device.
    """
    bound = 1 / math.sqrt(in_features)
    A = torch.rand(rank, in_features, generator=generator, device=generator.device) * (2 * bound) - bound
    return Factors(A, torch.zeros(out_features, rank, device=generator.device))


@register
@dataclasses.dataclass(frozen=True)
class Kaiming(Method):
    """Random A, zero B: the model starts as its base and the first step moves only B."""

    info: ClassVar = MethodInfo(
        name="kaiming",
        aliases=("vanilla", "default"),
        summary="A uniform ±1/√in, B = 0 (PEFT's default)",
        paper="Hu et al. 2021, arXiv:2106.09685",
        product="zero",
    )

    def start(self, site: LoraSite, generator: torch.Generator) -> Factors:
        """Return Kaiming-uniform A and zero B."""
        return factors(site.out_features, site.in_features, site.rank, generator=generator)
