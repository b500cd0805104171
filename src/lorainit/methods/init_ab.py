"""Init[AB]: both factors random and non-zero."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from .method import Method, MethodInfo
from .registry import register


def factors(
    out_features: int, in_features: int, rank: int, *, generator: torch.Generator, c_a: float = 1.0, c_b: float = 1.0
) -> Factors:
    """Return ``A ~ U(±√(c_a/in))``, ``B ~ U(±√(c_b/in))``: the layer's fan-in bounds *both* factors.

    "Beyond Zero Initialization", arXiv:2505.23194 (ICML 2025). Float32 on the generator's device.
    """

    def uniform(rows: int, columns: int, c: float) -> torch.Tensor:
        bound = math.sqrt(c / in_features)
        return torch.rand(rows, columns, generator=generator, device=generator.device) * (2 * bound) - bound

    return Factors(uniform(rank, in_features, c_a), uniform(out_features, rank, c_b))


@register
@dataclasses.dataclass(frozen=True)
class InitAB(Method):
    """Random non-zero A and B; as in the paper the base stays and the function moves by s·BA (``base="offset"``: not).

    Args:
        c_a: variance constant of A (its entries lie within ±√(c_a/in)).
        c_b: variance constant of B.
    """

    c_a: float = 1.0
    c_b: float = 1.0

    info: ClassVar = MethodInfo(
        name="init-ab",
        aliases=("init_ab", "initab"),
        summary="A and B uniform ±√(c/in): the function moves by s·BA",
        paper="Li et al. 2025, Beyond Zero Initialization, arXiv:2505.23194",
        product="step",
    )

    def __post_init__(self) -> None:
        """Check the options."""
        if not (self.c_a > 0 and self.c_b > 0):
            raise ValueError(f"c_a and c_b must be positive, got {self.c_a} and {self.c_b}")

    def start(self, site: LoraSite, generator: torch.Generator) -> Factors:
        """Return the two random factors."""
        shape = (site.out_features, site.in_features, site.rank)
        return factors(*shape, generator=generator, c_a=self.c_a, c_b=self.c_b)
