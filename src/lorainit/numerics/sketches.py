"""Low-rank approximations from one pass over the data: Nyström for second moments, two sketches for a gradient."""

from __future__ import annotations

import hashlib
from typing import Literal, NamedTuple

import torch

from .._typing import Float, Tensor
from .linalg import SVD, canonical_signs


def test_matrix(
    side: Literal["in", "out"], features: int, columns: int, seed: int
) -> Float[Tensor, "features columns"]:
    """Return a Gaussian test matrix (Ω for the inputs, Ψᵀ for the outputs) in float32 on the CPU.

    Side, shape and seed determine it, so that it need not be kept with the sketch.
    """
    digest = hashlib.blake2b(f"{side}:{features}:{columns}:{seed}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(features, columns, generator=generator, dtype=torch.float32)


class Nystrom(NamedTuple):
    """A low-rank approximation ``U diag(values) Uᵀ ≤ C`` of a positive semidefinite matrix.

    Attributes:
        values: descending.
        vectors: U, orthonormal columns.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "n k"]


def nystrom(sketch: Float[Tensor, "n k"], test: Float[Tensor, "n k"], *, noise: float | None = None) -> Nystrom:
    """Return the Nyström approximation ``(CΩ)(ΩᵀCΩ)⁻¹(CΩ)ᵀ`` of a positive semidefinite C, in float64.

    Tropp, Yurtsever, Udell & Cevher 2017, "Fixed-rank approximation of a positive-semidefinite matrix from streaming
    data", arXiv:1706.05736, algorithm 3, but with eigenpairs of the small matrix in place of its Cholesky factor:
    directions at the level of the sketch's rounding are left out, and so need no shift. Exact where rank(C) ≤ k.

    Args:
        sketch: CΩ.
        test: Ω.
        noise: norm of the rounding errors in a column of the sketch; default `column_rounding`.

    Returns:
        Eigenpairs of the approximation: k of them, or fewer where C has a smaller rank.
    """
    Y = sketch.double()
    core = test.double().mT @ Y
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    noise = column_rounding(sketch) if noise is None else noise
    # errors E of that size move the small matrix by ‖ΩᵀE‖, about 2√k times as much
    kept = values > 16 * noise * sketch.shape[1] ** 0.5
    half = (Y @ vectors[:, kept]) / values[kept].sqrt()
    U, S, _ = torch.linalg.svd(half, full_matrices=False)
    return Nystrom(S.square(), canonical_signs(SVD(U, S, U.mT)).U)


def column_rounding(sketch: Float[Tensor, "n k"]) -> float:
    """Return the norm of the rounding errors in a column of a sketch, from its dtype."""
    return torch.finfo(sketch.dtype).eps * float(sketch.norm(dim=0).max())


def missed(sketch: Float[Tensor, "n k"], found: Nystrom, rank: int) -> float:
    """Return about the share of the leading ``rank`` directions' energy that the found ones miss, between 0 and 1.

    In first order a Gaussian sketch turns direction i away by ``sin²θ_i ≈ Σ_{j>r} λ_j² / (k λ_i²)``; the sum comes from
    ``‖CΩ‖_F² ≈ k Σ_j λ_j²``. What a direction loses is taken to be nothing: the estimate is rather too high.
    """
    k = sketch.shape[1]
    leading = found.values[:rank]
    tail = (sketch.double().square().sum() / k - leading.square().sum()).clamp_min(0)
    turned = (tail / (k * leading.square()).clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1)
    return float((turned * leading).sum() / leading.sum().clamp_min(torch.finfo(torch.float64).tiny))


class Reconstruction(NamedTuple):
    """A matrix from its sketches.

    Attributes:
        svd: its triplets, as many as the range sketch has columns.
        error: estimate of ``‖G − U S Vᵀ‖_F / ‖G‖_F`` with all of them, unbiased in its square; None without check rows.
    """

    svd: SVD
    error: float | None


def two_sided(
    range_: Float[Tensor, "m k"], corange: Float[Tensor, "l n"], test_out: Float[Tensor, "m l"], *, check: int = 0
) -> Reconstruction:
    """Return the triplets of G from ``GΩ`` and ``ΨG``, in float64.

    Tropp, Yurtsever, Udell & Cevher 2017, "Practical sketching algorithms for low-rank matrix approximation",
    arXiv:1609.00048, algorithm 4: ``Q`` an orthonormal basis of GΩ, ``X = (ΨQ)⁺ ΨG``, ``G ≈ Q X``. Exact where
    rank(G) ≤ k. The last ``check`` rows of ΨG play no part in it and estimate its error (arXiv:1902.08651, section 6).

    Args:
        range_: GΩ.
        corange: ΨG, l > k + check rows.
        test_out: Ψᵀ.
        check: rows that are kept out.
    """
    Y, W, test = range_.double(), corange.double(), test_out.double()
    solve = slice(0, len(W) - check)
    Q = torch.linalg.qr(Y).Q
    X = torch.linalg.lstsq(test[:, solve].mT @ Q, W[solve]).solution
    V, S, Uh = torch.linalg.svd(X.mT, full_matrices=False)  # tall: the cheap orientation
    svd = canonical_signs(SVD(Q @ Uh.mT, S, V.mT))
    if not check:
        return Reconstruction(svd, None)
    held = W[len(W) - check :]
    rest = held - (test[:, len(W) - check :].mT @ Q) @ X
    return Reconstruction(svd, float(rest.norm() / held.norm().clamp_min(torch.finfo(torch.float64).tiny)))
