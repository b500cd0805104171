"""Requests: the statistics that a method asks the calibration pass for."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from ..adapter.sites import LoraSite
from .batches import MaskKind

INPUT_STREAMS = frozenset({"input_second_moment", "input_sum", "input_magnitude", "input_sketch", "input_energy"})
WEIGHT_GRADIENT_STREAMS = frozenset({"weight_gradient", "odd_weight_gradient", "gradient_range", "gradient_corange"})
GRADIENT_STREAMS = WEIGHT_GRADIENT_STREAMS | {"output_gradient_squares", "output_gradient_second_moment"}

ERROR_ROWS = 10  # of a gradient's sketch: left out of the solution, they estimate its error


@dataclasses.dataclass(frozen=True)
class Sketch:
    """Seeded projections in place of large sums: of the input second moment, of the weight gradient.

    Attributes:
        per_rank: columns for each unit of a layer's rank.
        extra: columns beside those.
        at_least: how many times as many features as columns a layer must have; others keep the full sum.
        seed: of the test matrices.
    """

    per_rank: int
    extra: int
    at_least: float = 2.0
    seed: int = 0

    def columns(self, site: LoraSite) -> int:
        """Return k, the columns of a layer's test matrix."""
        return self.per_rank * site.rank + self.extra

    def rows(self, site: LoraSite) -> int:
        """Return l, the rows of the second sketch of a gradient: 2k + 1 to solve with, and some to estimate the error.

        Twice as many as columns is what balances the two errors (Tropp et al. 2017, arXiv:1609.00048, section 4.5).
        """
        return 2 * self.columns(site) + 1 + ERROR_ROWS


@dataclasses.dataclass(frozen=True)
class Request:
    """The statistics to collect, and over which positions and loss.

    Attributes:
        streams: fields of `LayerStatistics`.
        loss: ``"sum"`` over label terms (independent of the batch size), or ``"sequence_mean"``: the mean over each
            row's own terms, rows run one at a time (the convention of some published code).
        mask: which positions count in the input and output-gradient moments: all but padding, or only those whose
            output is scored. The weight gradient always takes all but padding.
        dtype: of the sums.
        samples: use the first so many rows of the data; None for all.
        sketch: collect sketches instead of the input second moment and the weight gradient, where layers are large.
    """

    streams: frozenset[str]
    loss: Literal["sum", "sequence_mean"] = "sum"
    mask: MaskKind = "attention"
    dtype: torch.dtype = torch.float32
    samples: int | None = None
    sketch: Sketch | None = None

    @property
    def needs_gradients(self) -> bool:
        """Whether a backward pass is needed."""
        return bool(self.streams & GRADIENT_STREAMS)

    def seeded(self, seed: int) -> Request:
        """Return the request with the run's seed for its test matrices."""
        if self.sketch is None:
            return self
        return dataclasses.replace(self, sketch=dataclasses.replace(self.sketch, seed=seed))

    def streams_of(self, site: LoraSite) -> frozenset[str]:
        """Return the streams of one layer, sketched where the request says so."""
        streams, sketch = self.streams, self.sketch
        if sketch is None:
            return streams
        n, m = site.in_features, site.out_features
        if "input_second_moment" in streams and n >= sketch.at_least * sketch.columns(site):
            streams = streams - {"input_second_moment"} | {"input_sketch", "input_energy"}
        # the longer one of both sketches has to pay off
        if "weight_gradient" in streams and min(n, m) >= sketch.at_least * sketch.rows(site):
            streams = streams - {"weight_gradient"} | {"gradient_range", "gradient_corange"}
        return streams

    def sum_bytes(self, site: LoraSite) -> int:
        """Return the memory that the sums of one layer take, of all its experts together."""
        n, m = site.in_features, site.out_features
        sizes = {
            "input_second_moment": n * n,
            "input_sum": n,
            "input_magnitude": n,
            "input_energy": 1,
            "output_gradient_squares": m,
            "output_gradient_second_moment": m * m,
            "weight_gradient": n * m,
            "odd_weight_gradient": n * m,
        }
        if self.sketch is not None:
            columns, rows = self.sketch.columns(site), self.sketch.rows(site)
            sizes |= {"input_sketch": n * columns, "gradient_range": m * columns, "gradient_corange": rows * n}
        return sum(sizes[stream] for stream in self.streams_of(site)) * self.dtype.itemsize * site.experts
