"""What is measured while batches run: sums per layer, collected in one pass for all that a method needs."""

from __future__ import annotations

from .collect import collect
from .layer import LayerStatistics, merge
from .request import Request, Sketch

__all__ = ["LayerStatistics", "Request", "Sketch", "collect", "merge"]
