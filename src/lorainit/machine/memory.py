"""Memory: reads amounts such as "4GiB", recognizes that it ran out, frees what can be freed."""

from __future__ import annotations

import gc
import re

import numpy as np
import torch

from ..errors import LoraInitError

_WORDS = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "out of memory")


def ran_out(error: BaseException) -> bool:
    """Say whether an error means that memory could not be allocated, on a device or on the CPU."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS))


def free() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parse_bytes(amount: int | str | None) -> int | None:
    """Return a memory size in bytes from a number, "4GiB", "500 MB" or None.

    Example:
        >>> parse_bytes("2 KiB")
        2048
    """
    if amount is None:
        return None
    if isinstance(amount, (int, float, np.integer)) and not isinstance(amount, bool) and amount == amount // 1 >= 0:
        return int(amount)
    if not isinstance(amount, str):
        raise LoraInitError(f"memory_budget={amount!r} is no memory size; write bytes, or for example '4GiB'")
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", amount)
    if not found:
        raise LoraInitError(f"memory_budget={amount!r} is no memory size; write bytes, or for example '4GiB'")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or " "))
