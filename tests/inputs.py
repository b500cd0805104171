"""Inputs of a layer, and what is known about them, that the tests of the starts from activations use."""

from __future__ import annotations

import torch
from torch import Tensor

from lorainit.statistics import LayerStatistics
from matrices import normal, orthonormal


def inputs(tokens: int, size: int, *, seed: int = 0, spread: float = 30.0, mean: float = 0.5) -> Tensor:
    """Return tokens×size correlated inputs whose standard deviations fall from 1 to 1/spread, around a mean."""
    deviations = torch.logspace(0, -1, size, base=spread, dtype=torch.float64)
    mixed = (normal(tokens, size, seed=seed) * deviations) @ orthonormal(size, size, seed=seed + 1).mT
    return mixed + mean * normal(1, size, seed=seed + 2)


def second_moment(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Return the mean of x xᵀ, or of x yᵀ, over the rows."""
    return x.mT @ (x if y is None else y) / len(x)


def damped(C: Tensor, damping: float = 1e-2) -> Tensor:
    """Return C + δ·mean(diag C)·I."""
    return C + damping * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)


def power(C: Tensor, exponent: float) -> Tensor:
    """Return a power of a positive definite matrix, by its eigenvalues."""
    values, Q = torch.linalg.eigh(C)
    return (Q * values**exponent) @ Q.mT


def known(x: Tensor, proxy: Tensor) -> dict[str, Tensor]:
    """Return everything beside the second moment of x that some constraint of CNTLoRA asks for."""
    return {
        "input_mean": x.mean(0),
        "proxy_second_moment": second_moment(proxy),
        "proxy_mean": proxy.mean(0),
        "cross_second_moment": second_moment(proxy, x),
    }


def sums(x: Tensor) -> LayerStatistics:
    """Return everything that a forward pass collects about these inputs, as one sequence."""
    return LayerStatistics(
        sequences=1,
        tokens=len(x),
        input_second_moment=x.mT @ x,
        input_sum=x.sum(0),
        input_magnitude=x.abs().sum(0),
    )
