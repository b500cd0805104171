"""Shared by starts from a gradient: checks, leading singular triplets, and errors that name the layer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch

from ..._typing import Float, Tensor
from ...adapter.sites import LoraSite
from ...errors import NonFiniteError, UnsupportedLayerError
from ...numerics.linalg import SVD, exact_svd, frobenius_norm, randomized_svd, require_rank, squared_singular_values
from ...statistics.layer import LayerStatistics


def require_signal(name: str, values: Tensor) -> None:
    """Raise unless all values are finite and some are not zero.

    Raises:
        NonFiniteError: NaN or infinity.
        ValueError: nothing but zeros.
    """
    norm = frobenius_norm(values if values.ndim > 1 else values[None])
    if not math.isfinite(norm):
        raise NonFiniteError(f"the {name} holds NaN or infinite entries")
    if norm == 0:
        raise ValueError(f"the {name} is zero: no loss depends on this layer, or no data reached it")


def leading_triplets(
    gradient: Float[Tensor, "out in"],
    rank: int,
    *,
    exact: bool = False,
    generator: torch.Generator | None = None,
    oversample: int | None = None,
    iterations: int = 3,
) -> SVD:
    """Return the ``rank`` leading singular triplets of a gradient, in float32 or float64.

    Args:
        gradient: G, out×in.
        rank: how many, at most min(out, in).
        exact: full SVD instead of the seeded randomized one.
        generator: source of the randomized SVD's test matrix (default: a fresh one with seed 0).
        oversample: extra columns of the randomized SVD (default: as many as the rank, at least 16).
        iterations: its power iterations.

    Raises:
        NonFiniteError: NaN or infinity in the gradient.
        ValueError: the gradient is zero, or the rank is out of range.
    """
    require_rank(gradient, rank)
    require_signal("weight gradient", gradient)
    gradient = gradient if gradient.dtype == torch.float64 else gradient.float()
    if exact:
        return exact_svd(gradient, rank)
    generator = generator or torch.Generator().manual_seed(0)
    return randomized_svd(gradient, rank, generator=generator, oversample=oversample, iterations=iterations)


def gradient_energies(gradient: Float[Tensor, "out in"]) -> Float[Tensor, " k"]:
    """Return the squared singular values of a gradient, descending.

    Raises:
        NonFiniteError: NaN or infinity in the gradient.
        ValueError: the gradient is zero.
    """
    require_signal("weight gradient", gradient)
    # its entries may be so small that their fourth powers vanish in float32
    return squared_singular_values(gradient / gradient.abs().max())


@contextlib.contextmanager
def naming(site: LoraSite) -> Iterator[None]:
    """Turn a ValueError of the mathematics into an error of the package that names the layer."""
    try:
        yield
    except ValueError as error:
        kind = NonFiniteError if isinstance(error, NonFiniteError) else UnsupportedLayerError
        raise kind(f"layer '{site.name}': {error}") from error


def collected(statistics: LayerStatistics, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the collected sums of these names.

    Raises:
        ValueError: a sum was not collected, or no data reached the layer.
    """
    found = {name: getattr(statistics, name) for name in names}
    missing = sorted(name for name, value in found.items() if value is None)
    if missing:
        raise ValueError(f"the statistics lack {missing}: not collected, or the loss does not depend on this layer")
    if statistics.sequences < 1 or statistics.tokens < 1:
        raise ValueError("no calibration data reached it")
    return found
