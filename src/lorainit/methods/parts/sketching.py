"""Shared by starts that can use a sketch of their statistics: the option, and decompositions from the sketch."""

from __future__ import annotations

import warnings
from typing import Literal

from ..._typing import Float, Tensor
from ...adapter.sites import LoraSite
from ...numerics.linalg import SVD
from ...numerics.sketches import Nystrom, missed, test_matrix, two_sided
from ...statistics import LayerStatistics, Sketch
from ...statistics.request import ERROR_ROWS
from .activations import mean_of
from .gradient import collected, require_signal

SketchChoice = bool | Literal["auto"]

_MISSED_ENERGY = 0.1
_MISSED_NORM = 0.5


def require_sketch_option(sketch: SketchChoice, columns: int | None, *, exact: bool = False) -> None:
    """Raise ValueError unless the options of a sketch are valid and go together."""
    if sketch not in (True, False, "auto"):
        raise ValueError(f"sketch={sketch!r} is not True, False or 'auto'")
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be ≥ 1 or None, got {columns}")
    if exact and sketch is True:
        raise ValueError("exact=True needs the whole statistic, sketch=True keeps a part of it: choose one")


def chosen_sketch(choice: SketchChoice, columns: int | None, *, per_rank: int, extra: int) -> Sketch | None:
    """Return the sketch to ask for: where it is smaller than the sum, or with ``"auto"`` far smaller; or None.

    Args:
        choice: the method's option.
        columns: so many for every layer, instead of ``per_rank`` times its rank and ``extra``.
        per_rank: see `Sketch`.
        extra: see `Sketch`.
    """
    if choice is False:
        return None
    if columns is not None:
        per_rank, extra = 0, columns
    return Sketch(per_rank, extra, at_least=8.0 if choice == "auto" else 2.0)


def input_sketch(site: LoraSite, statistics: LayerStatistics) -> tuple[Float[Tensor, "in k"], Float[Tensor, "in k"]]:
    """Return CΩ, with C the mean of x xᵀ, and Ω."""
    sketch = mean_of(site, statistics, "input_sketch")
    return sketch, test_matrix("in", sketch.shape[0], sketch.shape[1], statistics.sketch_seed).to(sketch)


def centred_sketch(
    sketch: Float[Tensor, "in k"], test: Float[Tensor, "in k"], mean: Float[Tensor, " in"]
) -> Float[Tensor, "in k"]:
    """Return ``(C − μμᵀ) Ω``, in float64: subtracting a large mean would leave rounding errors."""
    sketch, test, mean = sketch.double(), test.double(), mean.double()
    return sketch.addr(mean, mean @ test, alpha=-1)


def warn_if_missed(sketch: Float[Tensor, "in k"], found: Nystrom, rank: int) -> None:
    """Warn where the sketch misses more than an estimated tenth of the energy of the leading ``rank`` directions."""
    share = missed(sketch, found, rank)
    if share > _MISSED_ENERGY:
        warnings.warn(
            f"the spectrum of the inputs decays slowly for a sketch of {sketch.shape[1]} columns: it misses up to "
            f"about {share:.0%} of the energy of the leading directions; more columns or sketch=False finds more",
            stacklevel=3,
        )


def triplets_of_sketch(site: LoraSite, statistics: LayerStatistics, rank: int) -> SVD:
    """Return the leading triplets of a layer's weight gradient from its two sketches, in the dtype of the sums.

    Raises:
        NonFiniteError: NaN or infinity in a sketch.
        ValueError: the gradient is zero, or has no such number of triplets in the sketch.

    Warns:
        UserWarning: the sketches miss a large part of the gradient; the message tells the estimate.
    """
    sums = collected(statistics, ("gradient_range", "gradient_corange"))
    range_, corange = (value.to(site.device) for value in sums.values())
    require_signal("weight gradient", range_)
    require_signal("weight gradient", corange)
    if not 1 <= rank <= range_.shape[1]:
        raise ValueError(f"the sketch has {range_.shape[1]} columns, too few for {rank} directions; raise columns")
    test = test_matrix("out", len(range_), len(corange), statistics.sketch_seed).to(range_)
    svd, error = two_sided(range_, corange, test, check=ERROR_ROWS)
    if error is not None and error > _MISSED_NORM:
        warnings.warn(
            f"the sketch of the weight gradient misses an estimated {error:.0%} of its norm: the leading directions "
            "are approximate; more columns or sketch=False finds better ones",
            stacklevel=3,
        )
    return SVD(svd.U[:, :rank].to(range_), svd.S[:rank].to(range_), svd.Vh[:rank].to(range_))
