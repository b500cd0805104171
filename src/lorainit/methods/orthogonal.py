"""Orthogonal start: two non-zero factors on orthogonal halves of the rank space, so that BA = 0."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..errors import UnsupportedLayerError
from .method import Method, MethodInfo
from .registry import register


def factors(
    out_features: int, in_features: int, rank: int, *, generator: torch.Generator, gain: float = 0.1
) -> Factors:
    """Return A and B, both of rank r/2 and non-zero, with ``BA = 0`` up to rounding.

    Q is the orthogonal factor of an r×r normal matrix; ``A = gain·Q_oddᵀ R_A`` and ``B = gain·R_B Q_even`` with normal
    R_A (r/2 × in), R_B (out × r/2): the rows of Q_odd and Q_even are orthogonal to each other (PEFT's
    ``init_lora_weights="orthogonal"``). Computed in float64, returned in float32 on the generator's device.

    Raises:
        ValueError: the rank is odd.
    """
    if rank % 2:
        raise ValueError(f"the orthogonal start needs an even rank, got {rank}")
    normal = {"generator": generator, "device": generator.device, "dtype": torch.float64}
    Q = torch.linalg.qr(torch.randn(rank, rank, **normal)).Q
    A = gain * Q[0::2].mT @ torch.randn(rank // 2, in_features, **normal)
    B = gain * torch.randn(out_features, rank // 2, **normal) @ Q[1::2]
    return Factors(A.float(), B.float())


@register
@dataclasses.dataclass(frozen=True)
class Orthogonal(Method):
    """Non-zero A and B of rank r/2 each with BA = 0: both factors get a gradient at the first step.

    Args:
        gain: standard deviation of the entries before the rotation.
    """

    gain: float = 0.1

    info: ClassVar = MethodInfo(
        name="orthogonal",
        summary="A, B ≠ 0 on orthogonal halves of the rank space: BA = 0 up to rounding",
        paper="PEFT, init_lora_weights='orthogonal'",
        product="zero",
    )

    def __post_init__(self) -> None:
        """Check the options."""
        if not self.gain > 0:
            raise ValueError(f"gain must be positive, got {self.gain}")

    def start(self, site: LoraSite, generator: torch.Generator) -> Factors:
        """Return the orthogonal pair; the rank must be even."""
        if site.rank % 2:
            raise UnsupportedLayerError(
                f"layer '{site.name}': the orthogonal start needs an even rank, got {site.rank}"
            )
        return factors(site.out_features, site.in_features, site.rank, generator=generator, gain=self.gain)
