"""Magnitude-matched random start: the control for every start that is said to find good directions."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..errors import UnsupportedLayerError
from .method import Method, MethodInfo
from .registry import get_method, register


def factors(reference: Factors, *, generator: torch.Generator) -> Factors:
    """Return factors in random directions with the reference's singular values: those of A, of B and of BA.

    Written as A = LQ with orthonormal rows of Q, and B = Q'R with orthonormal columns of Q', the start keeps L and R
    and draws both frames at random (Haar). What is left of the reference is its magnitude. Float32 on the generator's
    device.

    Raises:
        ValueError: the rank exceeds in or out, so that there is no such frame.
    """
    A, B = (factor.to(device=generator.device, dtype=torch.float64) for factor in reference)
    rank = A.shape[0]
    if rank > min(A.shape[1], B.shape[0]):
        raise ValueError(f"rank {rank} exceeds min(in, out) = {min(A.shape[1], B.shape[0])}")

    def frame(size: int) -> torch.Tensor:
        normal = torch.randn(size, rank, generator=generator, device=generator.device, dtype=torch.float64)
        Q, R = torch.linalg.qr(normal)
        return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)  # without the signs QR's frame is not uniform

    L, R = torch.linalg.qr(A.mT).R.mT, torch.linalg.qr(B).R
    return Factors((L @ frame(A.shape[1]).mT).float(), (frame(B.shape[0]) @ R).float())


@register
@dataclasses.dataclass(frozen=True)
class Random(Method):
    """A reference's start turned into random directions: what it still gains over vanilla is due to its magnitude.

    Args:
        reference: the data-free method whose magnitude is matched: its name, or a method object.
    """

    reference: str | Method = "pissa"

    info: ClassVar = MethodInfo(
        name="random",
        summary="a reference's singular values (default: PiSSA's) in random directions",
        paper="a control; cf. Zhang et al. 2025, LoRAM, arXiv:2507.06558",
        product="preserve",
    )

    def __post_init__(self) -> None:
        """Check the reference."""
        info = self._reference().info
        if info.needs or info.name == self.info.name:
            raise ValueError(f"reference={self.reference!r} must be a data-free method other than this one")

    def _reference(self) -> Method:
        return get_method(self.reference)

    def start(self, site: LoraSite, generator: torch.Generator) -> Factors:
        """Return the turned reference."""
        reference = self._reference().start(site, generator)
        try:
            return factors(reference, generator=generator)
        except ValueError as error:
            raise UnsupportedLayerError(f"layer '{site.name}': {error}") from error
