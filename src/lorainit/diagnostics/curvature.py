r"""Measures the curvature of the loss in the adapter's parameters θ = {A, B}: Hessian products, top eigenvalue.

Gradient descent is stable up to η = 2/λ, λ the top eigenvalue of the Hessian; "Learning Rate Matters"
(arXiv:2602.04998) found that the best rates of LoRA starts go with it. Under (A, B, s) → (cA, cB, s/c²) the Hessian is
divided by c² and the matched rate multiplied by c² for SGD, by c for Adam (see `lorainit.adapter.scaling`): so two
starts of one model are equally near to instability at rates as 1/λ under SGD and as 1/√λ under Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._typing import Float, Tensor
from ..adapter import offset, switches
from ..adapter.sites import LoraSite
from ..errors import LoraInitError, NonFiniteError
from ..numerics.linalg import to_double
from ..statistics.batches import LossFunction, iterate, summed_loss


class TopEigenvalue(NamedTuple):
    """The largest eigenvalue of a symmetric operator: some eigenvalue lies within ``residual`` of ``value``."""

    value: float
    residual: float


def top_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Float[Tensor, " n"], *, iterations: int = 20, tolerance: float = 0.01
) -> TopEigenvalue:
    """Return the largest (algebraic) eigenvalue of a symmetric operator by Lanczos with full reorthogonalization.

    Args:
        product: v ↦ Hv.
        start: a vector that is not orthogonal to the top eigenvector (a random one).
        iterations: Krylov dimension at most; so many vectors are held.
        tolerance: stop when the residual ‖Hv − λv‖ is below this part of λ.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    found = TopEigenvalue(0.0, float("inf"))
    for _ in range(min(iterations, start.numel())):
        image = product(basis[-1])
        diagonal.append(float(image @ basis[-1]))
        for _ in range(2):  # twice is enough (Parlett) against converged directions that come back by rounding
            for vector in basis:
                image = image - (image @ vector) * vector
        rest = float(image.norm())
        T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if off_diagonal:
            beta = torch.tensor(off_diagonal, dtype=torch.float64)
            T = T + torch.diag(beta, 1) + torch.diag(beta, -1)
        values, vectors = torch.linalg.eigh(T)
        found = TopEigenvalue(float(values[-1]), rest * abs(float(vectors[-1, -1])))
        if found.residual <= tolerance * abs(found.value) or rest <= 1e-12 * float(T.abs().max()):
            break
        off_diagonal.append(rest)
        basis.append(image / rest)
    return found


class AdapterLoss:
    """The mean loss per label term over fixed batches, as a function of one adapter's factors, the others off."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[LoraSite],
        data: Iterable[Any],
        *,
        max_batches: int | None = None,
        loss_function: LossFunction | None = None,
    ) -> None:
        """Keep the batches, on the model's device."""
        self.model, self.adapter = model, sites[0].adapter
        self.parameters = [offset.trained_factor(m) for s in sites for m in (s.lora_A, s.lora_B)]
        self.batches = list(iterate(data, max_batches, None, self.parameters[0].device))
        self.loss_function = loss_function or summed_loss

    def hessian_product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the product of the mean loss's Hessian with a direction, given parameter by parameter.

        Raises:
            LoraInitError: an operation of the model cannot be differentiated twice.
        """
        terms, sums = 0, [torch.zeros_like(p) for p in self.parameters]
        # the fused attention kernels have no second derivative
        alone = switches.evaluation(self.model, self.adapter, self.parameters)
        with torch.enable_grad(), alone, sdpa_kernel(SDPBackend.MATH):
            for loss, count in self._losses():
                try:
                    first = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
                    pairs = [(g, v) for g, v in zip(first, vectors, strict=True) if g is not None and g.requires_grad]
                    slope = torch.stack([(g * v).sum() for g, v in pairs]).sum()
                    found = torch.autograd.grad(slope, self.parameters, allow_unused=True)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    raise LoraInitError(f"curvature: the model cannot be differentiated twice: {error}") from error
                for total, product in zip(sums, found, strict=True):
                    if product is not None:
                        total.add_(product)
                terms += count
        return [total / terms for total in sums]

    def sharpness(self, *, iterations: int = 12, tolerance: float = 0.01, seed: int = 0) -> TopEigenvalue:
        """Return the top eigenvalue of the Hessian of the mean loss.

        Args:
            iterations: Lanczos steps at most; each costs about two gradients over the batches, and holds a vector.
            tolerance: of `top_eigenvalue`.
            seed: of the first vector.
        """
        sizes = [p.numel() for p in self.parameters]

        def product(vector: Tensor) -> Tensor:
            parts = [v.to(p).view_as(p) for v, p in zip(vector.split(sizes), self.parameters, strict=True)]
            return torch.cat([to_double(h.flatten()).cpu() for h in self.hessian_product(parts)])

        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(sum(sizes), generator=generator, dtype=torch.float64)
        return top_eigenvalue(product, start, iterations=iterations, tolerance=tolerance)

    def _losses(self) -> Iterator[tuple[Tensor, int]]:
        for index, batch in enumerate(self.batches):
            loss, terms = self.loss_function(self.model, batch)
            if not torch.isfinite(loss):
                raise NonFiniteError(f"batch {index}: the loss is {float(loss)}")
            if not loss.requires_grad:
                raise LoraInitError("the loss does not depend on any layer that carries the adapter")
            yield loss, terms
