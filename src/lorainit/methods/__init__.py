"""One method a file: a frozen dataclass that says the options, and pure functions on tensors that do the work.

A new one needs no line here: its class is marked with `register`, and importing this package imports every file of it.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from ..adapter.factors import Factors
from ..catalog import MethodInfo
from .method import Method
from .registry import available, discover, get_method, import_modules, register

__all__ = ["Factors", "Method", "MethodInfo", "available", "get_method", "import_modules", "register"]

discover(__name__, __path__)

if TYPE_CHECKING:

    def __getattr__(name: str) -> ModuleType:
        """Tell type checkers that the files are there as attributes, such as ``lorainit.methods.pissa``."""
        ...
