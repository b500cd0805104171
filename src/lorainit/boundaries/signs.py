"""Caches a fixed teacher's targets: one bit an entry, in memory up to a budget and on disk beyond it."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_BITS = 8


class Packed(NamedTuple):
    """Booleans, eight a byte.

    Attributes:
        data: the bytes, on the CPU.
        shape: of the booleans.
    """

    data: Tensor
    shape: tuple[int, ...]


def pack(flags: Tensor) -> Packed:
    """Pack booleans into bits.

    Example:
        >>> import torch
        >>> pack(torch.tensor([True, False, True])).data
        tensor([5], dtype=torch.uint8)
    """
    flat = flags.flatten()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % _BITS)).view(-1, _BITS).to(torch.uint8)
    data = padded[:, 0].clone()
    for bit in range(1, _BITS):
        data |= padded[:, bit] << bit
    return Packed(data.cpu(), tuple(flags.shape))


def unpack(packed: Packed, device: torch.device | None = None) -> Tensor:
    """Return the booleans of packed bits."""
    data = packed.data.to(device)
    bits = torch.arange(_BITS, dtype=torch.uint8, device=data.device)
    flags = (data[:, None] >> bits) & 1
    count = int(torch.tensor(packed.shape).prod())
    return flags.flatten()[:count].view(packed.shape).bool()


class TensorCache:
    """Lists of tensors by key, in memory up to a budget and in a temporary folder beyond it.

    Args:
        budget: bytes to hold in memory.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.bytes_in_memory, self.bytes_on_disk = budget, 0, 0
        self._held: dict[Hashable, list[Tensor]] = {}
        self._files: dict[Hashable, Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held or key in self._files

    def put(self, key: Hashable, tensors: list[Tensor]) -> None:
        """Keep tensors."""
        size = sum(t.numel() * t.element_size() for t in tensors)
        if self.bytes_in_memory + size <= self.budget:
            self._held[key] = tensors
            self.bytes_in_memory += size
            return
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="lorainit-signs-")
        path = Path(self._folder.name) / f"{len(self._files)}.pt"
        torch.save(tensors, path)
        self._files[key] = path
        self.bytes_on_disk += size

    def get(self, key: Hashable) -> list[Tensor]:
        """Return the tensors under a key."""
        return self._held[key] if key in self._held else torch.load(self._files[key], weights_only=True)

    def close(self) -> None:
        """Remove the temporary folder, if there is one."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        self._held.clear()
        self._files.clear()
