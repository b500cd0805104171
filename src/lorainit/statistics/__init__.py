"""What is measured while batches run: sums per layer, collected in one pass for all that a method needs."""

from __future__ import annotations

from .collect import Request, collect
from .layer import LayerStatistics

__all__ = ["LayerStatistics", "Request", "collect"]
