r"""LoftQ: the adapter starts as what quantization has taken from the weight.

Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization", arXiv:2310.08659. With Q the quantized weight in floating
point, the adapter is the best rank-r part of the error, s·BA = SVD_r(W − Q), so that Q + s·BA is nearer to W than Q is.

The paper alternates (algorithm 1): it quantizes what the adapter leaves, Q = q(W − s·BA), and fits the adapter again.
That makes another base. The base of a model that is quantized already is fixed (PEFT's ``replace_lora_weights_loftq``
takes it so, too), and there the first step is the best one possible (Eckart-Young). `alternate` is for those who
quantize themselves.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch

from .._typing import Float, Tensor
from ..adapter.factors import Factors
from ..adapter.quantized import is_quantized
from ..adapter.sites import LoraSite
from ..adapter.unquantized import original_weight
from ..errors import LoraInitError, UnsupportedLayerError
from ..numerics.linalg import exact_svd, frobenius_norm, randomized_svd, require_sketch
from .method import Method, MethodInfo, require_rank_at_most_min
from .pissa import split_evenly
from .registry import register

_LARGEST_ERROR = 0.5  # of |W|: 2 bits are below it, another matrix is at 1.4


def factors(
    error: Float[Tensor, "out in"],
    rank: int,
    scaling: float,
    *,
    exact: bool = True,
    generator: torch.Generator | None = None,
    iterations: int = 3,
) -> Factors:
    """Return the factors of the best rank-r part of a quantization error: ``s·BA = SVD_r(W − Q)``.

    Args:
        error: W − Q, out×in.
        rank: r, at most min(out, in).
        scaling: s.
        exact: full SVD. The error has a flat spectrum, of which a randomized SVD keeps less than the best.
        generator: source of the randomized SVD's test matrix (default: a fresh one with seed 0).
        iterations: its power iterations.
    """
    if exact:
        return split_evenly(exact_svd(error, rank), scaling)
    generator = generator or torch.Generator().manual_seed(0)
    return split_evenly(randomized_svd(error, rank, generator=generator, iterations=iterations), scaling)


def alternate(
    weight: Float[Tensor, "out in"],
    quantize: Callable[[Tensor], Tensor],
    rank: int,
    scaling: float,
    *,
    iterations: int = 5,
) -> tuple[Factors, Float[Tensor, "out in"]]:
    """Alternate between quantizing and fitting the adapter; return the adapter and the Q that goes with it.

    Args:
        weight: W, out×in.
        quantize: a matrix → its quantized values in floating point.
        rank: r, at most min(out, in).
        scaling: s.
        iterations: T of the paper's algorithm 1, at least 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be ≥ 1, got {iterations}")
    rest = weight
    for _ in range(iterations):
        quantized = quantize(rest)
        start = factors(weight - quantized, rank, scaling)
        rest = weight - scaling * start.B @ start.A
    return start, quantized  # pyright: ignore[reportPossiblyUnboundVariable]


@register
@dataclasses.dataclass(frozen=True)
class LoftQ(Method):
    """The leading part of the quantization error: the start moves a quantized model towards the original one.

    The adapter belongs to this quantized base: on the original one it would add an error where there is none.

    Args:
        weights: where the weights from before quantization are: a checkpoint folder (safetensors), one such file, or a
            state dict; read a layer at a time.
        exact: full SVD instead of the seeded randomized one, which is faster and keeps less of the error.
        iterations: power iterations of the randomized one.
    """

    weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None
    exact: bool = True
    iterations: int = 3

    info: ClassVar = MethodInfo(
        name="loftq",
        summary="s·BA = the leading part of the quantization error W - Q (the adapter then belongs to Q)",
        paper="Li et al. 2023, arXiv:2310.08659",
        product="step",
        needs=("weights",),
    )

    def __post_init__(self) -> None:
        """Check the options."""
        require_sketch(None, self.iterations)

    def start(self, site: LoraSite, generator: torch.Generator) -> Factors:
        """Return the leading part of the error of the site's quantized weight."""
        require_rank_at_most_min(site)
        if self.weights is None:
            raise LoraInitError("loftq compares with the weights from before quantization: set its option weights")
        if not is_quantized(site.base_layer):
            raise UnsupportedLayerError(f"layer '{site.name}' is not quantized: it has no error to start from")
        quantized = site.weight()
        error = _error(original_weight(self.weights, site.name).to(quantized), quantized, site.name)
        return factors(
            error, site.rank, site.scaling, exact=self.exact, generator=generator, iterations=self.iterations
        )


def _error(original: Tensor, quantized: Tensor, name: str) -> Tensor:
    """Return W − Q; a checkpoint may hold W transposed (GPT-2).

    Raises:
        LoraInitError: W is not what Q was made from.
    """
    if original.dim() != 2 or original.numel() != quantized.numel():  # noqa: PLR2004
        raise LoraInitError(
            f"layer '{name}': its original weight has shape {tuple(original.shape)}, the quantized one "
            f"{tuple(quantized.shape)}"
        )
    errors = [w - quantized for w in (original, original.mT) if w.shape == quantized.shape]
    size = frobenius_norm(quantized)
    near = [error for error in errors if frobenius_norm(error) <= _LARGEST_ERROR * size]
    if not near:
        raise LoraInitError(f"layer '{name}': the quantized weight was not made from the given one, they are far apart")
    return near[0]
