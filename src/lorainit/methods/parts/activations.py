"""Shared by starts from activations: means from sums, truncated SVDs, parts of a weight, padding to the rank."""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch

from ..._typing import Float, Tensor
from ...adapter.factors import Factors
from ...adapter.sites import LoraSite
from ...errors import LoraInitError, NonFiniteError, UnsupportedLayerError
from ...numerics.linalg import SVD, exact_svd, frobenius_norm, randomized_svd
from ...statistics.layer import LayerStatistics

Stream = Literal["input_second_moment", "input_sum", "input_magnitude", "input_sketch", "input_energy"]


def mean_of(site: LoraSite, statistics: LayerStatistics, stream: Stream) -> Tensor:
    """Return a collected sum divided by the number of tokens, on the layer's device.

    Raises:
        LoraInitError: the sum was not collected.
        UnsupportedLayerError: the layer saw no tokens, or nothing but zeros.
        NonFiniteError: it holds NaN or infinity.
    """
    total = getattr(statistics, stream)
    if total is None:
        raise LoraInitError(f"layer '{site.name}': the statistic '{stream}' was not collected")
    if statistics.tokens < 1:
        raise UnsupportedLayerError(f"layer '{site.name}' saw no tokens in the calibration data")
    size = frobenius_norm(total.flatten()[None])  # one read; `isfinite` of a large moment makes three copies
    if not math.isfinite(size):
        raise NonFiniteError(f"layer '{site.name}': the statistic '{stream}' holds NaN or infinite entries")
    # a sum of inputs may cancel; squares and magnitudes do not
    if stream != "input_sum" and size == 0:
        raise UnsupportedLayerError(f"layer '{site.name}': its inputs are all zero in the calibration data")
    return total.to(site.device) / statistics.tokens


def centred(second_moment: Float[Tensor, "n m"], left: Float[Tensor, " n"], right: Float[Tensor, " m"]) -> Tensor:
    """Return the covariance ``E[xyᵀ] − μ_x μ_yᵀ``."""
    return torch.addr(second_moment, left, right, alpha=-1)


def rounding(matrix: Tensor) -> float:
    """Return the size, relative to the largest, below which eigenvalues and singular values are rounding errors.

    LAPACK's eigenvalues of rank-deficient moments come out at up to 5 rounding units of the largest at n = 1024.
    """
    return 16 * torch.finfo(matrix.dtype).eps


def decompose(matrix: Float[Tensor, "m n"], rank: int, *, exact: bool, generator: torch.Generator | None) -> SVD:
    """Return the leading triplets: from a full SVD, or from a randomized one (seed 0 where no generator is given)."""
    if exact:
        return exact_svd(matrix, rank)
    return randomized_svd(matrix, rank, generator=generator or torch.Generator().manual_seed(0))


def projection(weight: Float[Tensor, "out in"], svd: SVD, scaling: float) -> Factors:
    """Return ``B = U √(S/s)``, ``A = √(S/s) V̂ᵀ`` with ``V̂ᵀ = Vᵀ R⁻¹``, from triplets ``U S Vᵀ`` of ``W R``.

    ``Uᵀ W = S Vᵀ R⁻¹`` turns this into ``A = Uᵀ W / √(s S)`` without an inverse of R: ``s·BA = U Uᵀ W``. All S > 0.
    """
    root = (svd.S / scaling).sqrt()
    return Factors((svd.U.mT @ weight) / (scaling * root)[:, None], svd.U * root)


def pad_to_rank(start: Factors, rank: int, generator: torch.Generator | None) -> Factors:
    """Append components of a plain LoRA start up to ``rank``, A uniform in ±1/√in and B zero, which leaves BA as it is.

    A component with A = B = 0 would never train. Warns where anything is appended.
    """
    missing = rank - start.A.shape[0]
    if missing == 0:
        return start
    warnings.warn(
        f"only {rank - missing} of {rank} components are above rounding; the other {missing} start as in plain LoRA "
        "(A random, B zero), a lower rank would do",
        stacklevel=2,
    )
    generator = generator or torch.Generator().manual_seed(0)
    n = start.A.shape[1]
    fill = torch.rand(missing, n, generator=generator, device=generator.device, dtype=torch.float64)
    A = torch.cat([start.A, ((2 * fill - 1) / math.sqrt(n)).to(start.A)])
    return Factors(A, torch.cat([start.B, start.B.new_zeros(start.B.shape[0], missing)], dim=1))


def significant(svd: SVD, floor: float) -> SVD:
    """Return the triplets above rounding: those with ``S > floor`` (``S`` is descending)."""
    count = int((svd.S > floor).sum())
    return SVD(svd.U[:, :count], svd.S[:count], svd.Vh[:count])
