"""What to do when memory runs out: tell that it was this, and free what can be freed."""

from __future__ import annotations

import gc

import torch

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
