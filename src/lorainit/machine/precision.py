"""Contexts in which the package computes: no compiled graphs, no autocast, no default dtype of the caller's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled models as they were written: hooks are no part of a compiled graph, nor is what they raise."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # torch ≥ 2.6
    with set_stance("force_eager") if set_stance is not None else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def own_precision(device: torch.device) -> Iterator[None]:
    """Compute in the precision that the method asks for: autocast and the default dtype are the caller's business."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(dtype)
