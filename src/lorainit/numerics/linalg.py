"""Linear algebra shared by the methods: seeded randomized SVD, canonical signs, low-rank norms and truncation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .._typing import Float, Tensor

_BLOCK = 128  # entries that are summed in float32 before float64 takes over: 8 additions a SIMD lane
_CHUNK = 2**20  # entries that are converted at a time: they stay in the cache, and no copy of the matrix is made
_SMALL = 2**16  # entries up to which float64 throughout costs next to nothing


class SVD(NamedTuple):
    """A (truncated) singular value decomposition ``U diag(S) Vh``, ``S`` descending."""

    U: Float[Tensor, "m k"]
    S: Float[Tensor, " k"]
    Vh: Float[Tensor, "k n"]


def canonical_signs(svd: SVD) -> SVD:
    """Flip each singular pair so that the entry of largest magnitude in every left vector is positive.

    Singular vectors are only defined up to a common sign; this rule makes two solvers agree.
    """
    pivot = svd.U.abs().argmax(dim=0)
    sign = torch.where(svd.U.gather(0, pivot[None])[0] < 0, -1.0, 1.0).to(svd.U.dtype)
    return SVD(svd.U * sign, svd.S, svd.Vh * sign[:, None])


def require_rank(matrix: Float[Tensor, "m n"], rank: int) -> None:
    """Raise ValueError unless 1 ≤ rank ≤ min(m, n): a slice would silently give fewer or other columns."""
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank {rank} is not between 1 and min{tuple(matrix.shape)} = {min(matrix.shape)}")


def exact_svd(matrix: Float[Tensor, "m n"], rank: int, *, smallest: bool = False) -> SVD:
    """Return the ``rank`` leading (or, with ``smallest``, trailing) singular triplets from a full SVD.

    Trailing triplets keep the descending order of ``S``.
    """
    require_rank(matrix, rank)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    part = slice(S.numel() - rank, S.numel()) if smallest else slice(0, rank)
    return canonical_signs(SVD(U[:, part].contiguous(), S[part], Vh[part].contiguous()))


def require_sketch(oversample: int | None, iterations: int) -> None:
    """Raise ValueError unless these are options that `randomized_svd` takes."""
    if (oversample or 0) < 0 or iterations < 0:
        raise ValueError(f"oversample and iterations must be ≥ 0, got {oversample} and {iterations}")


def randomized_svd(
    matrix: Float[Tensor, "m n"],
    rank: int,
    *,
    generator: torch.Generator,
    oversample: int | None = None,
    iterations: int = 3,
) -> SVD:
    """Return approximately the ``rank`` leading singular triplets by randomized subspace iteration.

    Range finder with ``rank + oversample`` columns and ``iterations`` power iterations, orthonormalized at each
    half step (Halko, Martinsson & Tropp 2011, algorithm 4.4 and section 5.1). It reads ``matrix``
    ``2 * iterations + 2`` times and allocates nothing of its size.

    Args:
        matrix: the matrix to decompose.
        rank: number of triplets, at most ``min(m, n)``.
        generator: source of the Gaussian test matrix. It is drawn on the generator's device and moved, so that a
            CPU generator gives the same start on every device.
        oversample: extra columns that sharpen the captured subspace. Default: as many as the rank, at least 16;
            with three iterations that captures 99.9 % of the energy that ``rank`` directions can hold, at any rank, on
            a spectrum that falls as slowly as i^-0.5.
        iterations: power iterations; the range finder sees the singular values to the power 2·iterations + 1.
    """
    require_rank(matrix, rank)
    width = sketch_width(rank, matrix.shape, oversample)
    test = torch.randn(matrix.shape[1], width, generator=generator, device=generator.device).to(matrix)
    return subspace_svd(lambda x: matrix @ x, lambda x: matrix.mT @ x, test, rank, iterations=iterations)


def sketch_width(rank: int, shape: Sequence[int], oversample: int | None = None) -> int:
    """Return how many columns `randomized_svd` works with."""
    return min(rank + (max(rank, 16) if oversample is None else oversample), *shape)


def subspace_svd(
    apply: Callable[[Tensor], Tensor],
    apply_transposed: Callable[[Tensor], Tensor],
    test: Float[Tensor, "n k"],
    rank: int,
    *,
    iterations: int = 3,
) -> SVD:
    """Return what `randomized_svd` does, of a matrix that is only known by its products with blocks of columns."""
    Q = torch.linalg.qr(apply(test)).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(apply_transposed(Q)).Q
        Q = torch.linalg.qr(apply(Q)).Q
    # (n, width): the tall orientation is the cheap one for LAPACK
    V, S, Uh = torch.linalg.svd(apply_transposed(Q), full_matrices=False)
    return canonical_signs(SVD(Q @ Uh.mT[:, :rank], S[:rank], V.mT[:rank].contiguous()))


def psd_eigh(matrix: Float[Tensor, "n n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Return eigenvalues (descending, rounding below 0 set to 0) and eigenvectors (columns) of a moment matrix.

    A solver that does not converge in a narrower dtype is called again in float64.

    Raises:
        ValueError: NaN or infinite entries.
    """
    if not bool(matrix.isfinite().all()):
        raise ValueError("the moment matrix holds NaN or infinite entries")
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        values, vectors = (result.to(matrix) for result in torch.linalg.eigh(to_double(matrix)))
    return values.flip(0).clamp_min(0), vectors.flip(1)


def squared_singular_values(matrix: Float[Tensor, "m n"]) -> Float[Tensor, " k"]:
    """Return all ``S²``, descending, from the smaller Gram matrix: a third of an SVD's work.

    Errors are absolute: the rounding unit times ``S_1²``, which is nothing among shares of the energy ``Σ S²``.
    """
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)


def frobenius_norm(matrix: Float[Tensor, "m n"], *, exact: bool = False) -> float:
    """Return ``‖matrix‖_F`` from one read of it; NaN or infinite where an entry is.

    Any floating dtype. A large matrix narrower than float64 is summed in blocks of 128 entries in float32, and only the
    blocks in float64, at a quarter of the time: relative error 1e-9 (half precision: 2e-8) where roundings average out,
    at most 3e-7 where they do not (equal entries). Where float32 over- or underflows, or with ``exact``, float64 is
    used throughout.
    """
    if _is_large(matrix) and not exact:
        norm = _norm(matrix, torch.float32)
        # squares below 1e-38 are lost, which is nothing beside a mean square of 1e-30
        if 1e-15 * math.sqrt(matrix.numel()) < norm < math.inf:
            return norm
    return _norm(matrix, _widest(matrix))


def total(matrix: Float[Tensor, "m n"], *, exact: bool = False) -> float:
    """Return the sum of the entries as `frobenius_norm` does; errors are relative to the sum of their magnitudes."""
    dtype = torch.float32 if _is_large(matrix) and not exact else _widest(matrix)
    return float(_blocks(matrix, dtype, lambda block: block.sum(dim=1)).sum())


def _norm(matrix: Tensor, dtype: torch.dtype) -> float:
    norms = _blocks(matrix, dtype, lambda block: torch.linalg.vector_norm(block, dim=1))
    return float(torch.linalg.vector_norm(norms))


def _blocks(matrix: Tensor, dtype: torch.dtype, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Reduce runs of `_BLOCK` entries in ``dtype``; return the results in the widest dtype of the device."""
    # the order of the entries is free: a transposed weight is read as it lies
    flat = (matrix if matrix.is_contiguous() else matrix.mT).reshape(-1)
    results = []
    for chunk in flat.split(flat.numel() if flat.dtype == dtype else _CHUNK):
        whole = chunk.numel() // _BLOCK * _BLOCK
        results.append(reduce(chunk[:whole].to(dtype).view(-1, _BLOCK)))
        if whole < chunk.numel():
            results.append(reduce(chunk[whole:, None].to(dtype)))
    return torch.cat(results).to(_widest(matrix))


def _is_large(matrix: Tensor) -> bool:
    return matrix.numel() > _SMALL and matrix.dtype != torch.float64


def _widest(matrix: Tensor) -> torch.dtype:
    return torch.float32 if matrix.device.type == "mps" else torch.float64


def to_double(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, on the CPU where its device has no float64 (Apple's)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def product_norm(A: Float[Tensor, "r n"], B: Float[Tensor, "m r"]) -> float:
    """Return the Frobenius norm of ``B @ A`` from the two r×r Gram matrices, in float64.

    ``‖BA‖² = tr((BᵀB)(AAᵀ))``; the m×n product is never formed.
    """
    A, B = to_double(A), to_double(B)
    squared = ((B.mT @ B) * (A @ A.mT)).sum()
    return float(squared.clamp_min(0).sqrt())


def product_mean(A: Float[Tensor, "r n"], B: Float[Tensor, "m r"]) -> float:
    """Return the mean entry of ``B @ A`` without forming it, in float64."""
    return float(to_double(B).mean(0) @ to_double(A).mean(1))


def truncate_product(
    A: Float[Tensor, "k n"], B: Float[Tensor, "m k"], rank: int
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"], float]:
    """Return the best rank-``rank`` approximation of ``B @ A`` as balanced factors, and its relative error.

    QR of both factors, then the SVD of the k×k core (Eckart–Young); the m×n product is never formed. Float64
    throughout, returned in the dtypes and on the devices of the factors.

    Returns:
        ``A' = √S Vᵀ`` (rank×n), ``B' = U √S`` (m×rank) and ``‖BA − B'A'‖_F / ‖BA‖_F`` (0 where ``BA`` is 0).
    """
    Qb, Rb = torch.linalg.qr(to_double(B))
    Qa, Ra = torch.linalg.qr(to_double(A).mT)
    core = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    svd = canonical_signs(SVD(Qb @ core.U, core.S, core.Vh @ Qa.mT))
    rank = min(rank, svd.S.numel())
    root = svd.S[:rank].sqrt()
    total = float(svd.S.norm())
    error = float(svd.S[rank:].norm()) / total if total > 0 else 0.0
    return (root[:, None] * svd.Vh[:rank]).to(A), (svd.U[:, :rank] * root).to(B), error
