r"""A bootstrap interval for the information loss, from a sketch of each batch's gradient instead of the gradient.

The loss of a resample with weights w is √(wᵀLw / wᵀKw), K_bc = ⟨G_b, G_c⟩ and L_bc the same of the residuals
(I − P_B)G_b(I − P_A). Held for each batch are the two k×k sketches ΨG_bΩ and Ψ(I − P_B)G_b(I − P_A)Ω with common
normal test matrices, whose inner products estimate K and L; a side of at most k features is kept as it is. The sketches
only spread the interval: its centre is the loss of the whole gradients, which is exact.
"""

from __future__ import annotations

import torch

from .._typing import Float, Tensor
from ..numerics.sketches import test_matrix
from .tangent import Tangent

_SIZE = 64


class Sketches:
    """The sketches of one layer.

    Args:
        tangent: of the layer's factors.
        seed: of the test matrices.
    """

    def __init__(self, tangent: Tangent, seed: int = 0) -> None:
        self._left = _test("out", tangent.U.shape[0], seed).to(tangent.U)
        self._right = _test("in", tangent.V.shape[0], seed).to(tangent.V)
        self._left_rest = self._left - tangent.U @ (tangent.U.mT @ self._left)
        self._right_rest = self._right - tangent.V @ (tangent.V.mT @ self._right)
        self._whole: list[Tensor] = []
        self._rest: list[Tensor] = []

    def add(self, gradient: Float[Tensor, "out in"]) -> None:
        """Keep the sketches of a batch's gradient."""
        self._whole.append((self._left.mT @ (gradient @ self._right)).flatten().double().cpu())
        self._rest.append((self._left_rest.mT @ (gradient @ self._right_rest)).flatten().double().cpu())

    def energies(self, weights: Float[Tensor, "resamples batches"]) -> tuple[Tensor, Tensor]:
        """Return (‖Σ_b w_b R_b‖², ‖Σ_b w_b G_b‖²) for each resample."""
        return _energies(self._rest, weights), _energies(self._whole, weights)


def resamples(batches: int, count: int, seed: int) -> Float[Tensor, "resamples batches"]:
    """Return how often each batch is drawn, for every resample; the first is the data as they are."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(batches, (count, batches), generator=generator)
    weights = torch.zeros(count, batches, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    return torch.cat((torch.ones(1, batches, dtype=torch.float64), weights))


def interval(rest: Tensor, whole: Tensor, loss: float, level: float = 0.95) -> tuple[float, float] | None:
    """Return the percentile interval of √(rest/whole), moved to the exact loss; None without resamples.

    Args:
        rest: ‖residual‖² of each resample, the data as they are first.
        whole: ‖G‖² of each resample.
        loss: the exact loss of the data as they are.
        level: share of the resamples that lie inside.
    """
    if rest.numel() < 2 or not bool(whole[0] > 0):
        return None
    ratios = (rest / whole.clamp_min(torch.finfo(whole.dtype).tiny)).sqrt()
    values = ratios[1:] - ratios[0] + loss
    tail = (1 - level) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype)).clamp(0, 1).tolist()
    return low, high


def _test(side: str, size: int, seed: int) -> Tensor:
    if size <= _SIZE:
        return torch.eye(size)
    return test_matrix(side, size, _SIZE, seed) / _SIZE**0.5  # pyright: ignore[reportArgumentType]


def _energies(sketches: list[Tensor], weights: Tensor) -> Tensor:
    stacked = torch.stack(sketches)
    gram = stacked @ stacked.mT
    return ((weights @ gram) * weights).sum(1).clamp_min(0)
