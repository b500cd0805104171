"""Comparing starts: a suite's trials on Ray, one JSON a trial, and a page that says what they show."""

from __future__ import annotations

from .checks import load
from .suite import Suite

__all__ = ["Suite", "load"]
