r"""The boundary loss and the agreement that it certifies: pure functions on pre-activations.

Lee et al. 2025, "ABM-LoRA: Activation Boundary Matching for Fast Convergence in Low-Rank Adaptation", arXiv:2511.19145
(eq. 22), and the authors' code. With z the student's pre-activation and τ the sign of the teacher's zᵗ (−1 for zᵗ ≤ 0):

    L = (1/K) Σ_k c_k · mean over (row, position, unit) of max(0, m − τ z)²

The gradient at an entry is −2τ(m − τz)·c_k/(K·E_k) where τz < m and 0 elsewhere, with E_k the entries that count. A
mismatched sign costs at least m², so the share of mismatches at a site is at most L_k/m² (its unweighted mean).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .._typing import Float, Tensor

MarginKind = Literal["absolute", "relative", "clipped"]
Weighting = Literal["sequential", "linear", "uniform", "quartic"]

_POWER = {"uniform": 0, "linear": 1, "sequential": 2, "quartic": 4}
_LEVELS = 255


class Target(NamedTuple):
    """A teacher's target at one site: the side of the boundary, and the margin to keep from it.

    Attributes:
        active: zᵗ > 0, of the shape of the pre-activation.
        margin: m, the same for every entry or one an entry.
    """

    active: Tensor
    margin: float | Tensor


def layer_weights(layers: int, kind: Weighting = "sequential") -> tuple[float, ...]:
    """Return the coefficients c_j = ((j+1)/J)^p of the J matched layers of one stack.

    p = 2 for ``"sequential"`` (the authors' arithmetic), 1 for ``"linear"``, 0 for ``"uniform"``, and 4 for
    ``"quartic"``: the reading in which the paper's quadratic weight is squared once more.
    """
    return tuple(((j + 1) / layers) ** _POWER[kind] for j in range(layers))


def standard_deviation(teacher: Float[Tensor, "*shape width"], keep: Tensor | None = None) -> float:
    """Return the standard deviation (around the mean) of a teacher's pre-activations, padding left out."""
    counted = (teacher if keep is None else teacher[keep]).double()
    return float(counted.std(correction=0))


def target(teacher: Float[Tensor, "*shape width"], margin: float, kind: MarginKind = "absolute") -> Target:
    """Return the target from a teacher's pre-activations.

    Args:
        teacher: zᵗ.
        margin: m; for ``"relative"`` m in units of the standard deviation of zᵗ.
        kind: ``"absolute"`` m, ``"relative"`` m·std(zᵗ), or ``"clipped"`` min(m, |zᵗ|): the teacher itself has loss 0.
    """
    if kind == "relative":
        return Target(teacher > 0, margin * standard_deviation(teacher))
    return Target(teacher > 0, margin if kind == "absolute" else teacher.abs().clamp(max=margin))


def quantized(distance: Tensor, margin: float) -> Tensor:
    """Return min(m, |zᵗ|) in steps of m/255 as bytes, rounded down so that the teacher itself keeps loss 0."""
    if margin == 0:
        return torch.zeros_like(distance, dtype=torch.uint8)
    return (distance.abs().clamp(max=margin) * (_LEVELS / margin)).floor().to(torch.uint8)


def dequantized(levels: Tensor, margin: float, dtype: torch.dtype) -> Tensor:
    """Return the distances that `quantized` stored, reduced by a few rounding units so that rounding adds no loss."""
    return levels.to(dtype) * (margin / _LEVELS * (1 - 4 * torch.finfo(dtype).eps))


class _MeanHinge(torch.autograd.Function):
    """Mean of max(0, m − τz)² that saves one tensor of the size of z for the backward pass, the gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, active: Tensor, margin: float | Tensor, keep: Tensor | None) -> Tensor:
        slack = _slack(z, active, margin, keep)
        count = z.numel() if keep is None else int(keep.sum()) * z.shape[-1]
        loss = slack.square().sum() / count
        if ctx.needs_input_grad[0]:
            # not yet divided by the count: half precision would round that to zero
            ctx.save_for_backward(torch.where(active, -slack, slack).to(z.dtype))
            ctx.factor = 2 / count
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        scaled = upstream * ctx.factor
        return (gradient.to(scaled.dtype) * scaled).to(gradient.dtype), None, None, None


def _slack(z: Tensor, active: Tensor, margin: float | Tensor, keep: Tensor | None) -> Tensor:
    """Return max(0, m − τz) in at least float32, 0 where a position does not count."""
    z = z.detach() if z.dtype == torch.float64 else z.detach().float()
    slack = torch.where(active, -z, z).add_(margin).clamp_(min=0)
    return slack if keep is None else slack.masked_fill_(~keep.unsqueeze(-1), 0)


def site_loss(z: Float[Tensor, "*shape width"], wanted: Target, keep: Tensor | None = None) -> Tensor:
    """Return the mean of max(0, m − τz)² over the entries that count; differentiable once in z.

    Args:
        z: the student's pre-activations.
        wanted: the target.
        keep: which positions count, of the shape of z without its width; default: all.
    """
    return _MeanHinge.apply(z, wanted.active, wanted.margin, keep)  # pyright: ignore[reportReturnType]


def squared_error(
    z: Float[Tensor, "*shape width"], teacher: Float[Tensor, "*shape width"], keep: Tensor | None = None
) -> Tensor:
    """Return the mean of (z − zᵗ)² over the entries that count: ordinary feature distillation, ABM's control."""
    z = z if z.dtype == torch.float64 else z.float()
    gap = (z - teacher.to(z.dtype)).square()
    return gap.mean() if keep is None else gap[keep].mean()


def boundary_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    margin: float,
    weights: Sequence[float],
    *,
    kind: MarginKind = "absolute",
    keep: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Return L = (1/K) Σ_k c_k · mean max(0, m − τz)² over K sites (eq. 22, with the authors' normalization).

    Args:
        student: pre-activations of each site, (..., width); gradients flow into them.
        teacher: the teacher's, of the same shapes.
        margin: m ≥ 0.
        weights: c_k.
        kind: of the margin, see `target`.
        keep: positions that count, a site; default: all.

    Raises:
        ValueError: no site, different numbers of sites, or shapes that differ.
    """
    if not student or not len(student) == len(teacher) == len(weights):
        raise ValueError(f"{len(student)} students, {len(teacher)} teachers, {len(weights)} weights: one a site each")
    total = torch.zeros((), dtype=torch.promote_types(student[0].dtype, torch.float32), device=student[0].device)
    for k, (z, reference, weight) in enumerate(zip(student, teacher, weights, strict=True)):
        if z.shape != reference.shape:
            raise ValueError(f"site {k}: student {tuple(z.shape)} and teacher {tuple(reference.shape)} differ")
        mask = None if keep is None else keep[k]
        margins = margin * standard_deviation(reference, mask) if kind == "relative" else margin
        wanted = target(reference, margins, "clipped" if kind == "clipped" else "absolute")
        total = total + weight * site_loss(z, wanted, mask)
    return total / len(student)


def agreement(
    student: Float[Tensor, "*shape width"], teacher: Float[Tensor, "*shape width"], keep: Tensor | None = None
) -> float:
    """Return the share of entries on the teacher's side of the boundary (0 counts as inactive on both sides)."""
    same = (student > 0) == (teacher > 0)
    return float((same if keep is None else same[keep]).double().mean())


def certificate(loss: float, margin: float) -> float:
    """Return the largest share of mismatched signs that an unweighted site loss at margin m allows: min(1, L/m²)."""
    return min(1.0, loss / margin**2) if margin > 0 else 1.0
