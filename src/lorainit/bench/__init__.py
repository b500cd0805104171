"""Compares starts: carries out the trials of a suite on Ray, and writes a report of what they show."""

from __future__ import annotations

from .suite import Suite
from .suite_checks import load

__all__ = ["Suite", "load"]
