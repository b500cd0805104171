"""One method a file: a frozen dataclass that says the options, and pure functions on tensors that do the work."""

from __future__ import annotations

from ..adapter.factors import Factors
from . import (
    abm,
    ag_lora,
    auto,
    cntlora,
    corda,
    eva,
    gaussian,
    hrp,
    init_ab,
    kaiming,
    loftq,
    lora_da,
    lora_ga,
    lora_one,
    loram,
    milora,
    olora,
    orthogonal,
    pissa,
    random,
)
from .method import Method, MethodInfo
from .registry import available, get_method, import_modules, register

__all__ = [
    "Factors",
    "Method",
    "MethodInfo",
    "abm",
    "ag_lora",
    "auto",
    "available",
    "cntlora",
    "corda",
    "eva",
    "gaussian",
    "get_method",
    "hrp",
    "import_modules",
    "init_ab",
    "kaiming",
    "loftq",
    "lora_da",
    "lora_ga",
    "lora_one",
    "loram",
    "milora",
    "olora",
    "orthogonal",
    "pissa",
    "random",
    "register",
]
