"""Collects calibration statistics: sums per layer, in one pass of the model for all that a method needs."""

from __future__ import annotations

from .collect import collect
from .layer import LayerStatistics, merge
from .request import Request, Sketch

__all__ = ["LayerStatistics", "Request", "Sketch", "collect", "merge"]
