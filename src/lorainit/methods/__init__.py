"""One method a file: a frozen dataclass that says the options, and pure functions on tensors that do the work."""

from __future__ import annotations

from . import gaussian, init_ab, kaiming, loram, milora, olora, orthogonal, pissa
from .method import Factors, Method, MethodInfo
from .registry import available, get_method, register

__all__ = [
    "Factors",
    "Method",
    "MethodInfo",
    "available",
    "gaussian",
    "get_method",
    "init_ab",
    "kaiming",
    "loram",
    "milora",
    "olora",
    "orthogonal",
    "pissa",
    "register",
]
