"""Matrices that the tests of the mathematics feed to the methods."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(rows: int, columns: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return independent standard normal entries; the seed and the shape fix them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)


def orthonormal(size: int, columns: int, *, seed: int = 0) -> Tensor:
    """Return a random orthonormal frame."""
    return torch.linalg.qr(normal(size, columns, seed=seed)).Q


def with_spectrum(rows: int, columns: int, values: list[float] | Tensor, *, seed: int = 0) -> Tensor:
    """Return a matrix with these singular values and random singular vectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    left, right = (orthonormal(n, len(values), seed=seed + i) for i, n in enumerate((rows, columns)))
    return (left * values) @ right.mT


def decaying(rows: int, columns: int, power: float, *, seed: int = 0) -> Tensor:
    """Return a full-rank matrix with singular values i^-power, the shape of a trained weight's spectrum."""
    values = torch.arange(1, min(rows, columns) + 1, dtype=torch.float64) ** -power
    return with_spectrum(rows, columns, values, seed=seed)


def best(matrix: Tensor, rank: int) -> Tensor:
    """Return the best approximation of that rank (Eckart–Young), from a dense float64 SVD."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]
