"""Keeps sums on the device where they are computed, in CPU memory, or in memory-mapped files."""

from __future__ import annotations

import dataclasses
import mmap
import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

from .._typing import Tensor
from ..errors import LoraInitError

Offload = bool | str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Storage:
    """Where sums are kept while they are collected and solved.

    In a folder each sum of a page or more is a memory-mapped file. The file is unlinked once it is mapped: it goes with
    the sum, or with the process, however that ends.

    Attributes:
        device: of the sums; None: where they are computed.
        folder: of the files.
    """

    device: torch.device | None = None
    folder: Path | None = None

    @classmethod
    def of(cls, offload: Offload) -> Storage:
        """Return the storage for the argument ``offload`` of `lorainit.initialize`.

        Raises:
            LoraInitError: neither True, False nor a folder that can be written to.
        """
        if isinstance(offload, bool):
            return cls(torch.device("cpu") if offload else None)
        if not isinstance(offload, (str, os.PathLike)):
            raise LoraInitError(f"offload={offload!r} is neither True, False nor a folder")
        folder = Path(offload)
        if not folder.is_dir():
            raise LoraInitError(f"offload='{folder}': there is no such folder")
        _mapped(folder, (1,), torch.uint8)
        return cls(torch.device("cpu"), folder)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a sum that is still zero; ``device``: where it is computed."""
        if self._is_filed(prod(shape) * dtype.itemsize):
            return _mapped(self.folder, shape, dtype)
        return torch.zeros(shape, dtype=dtype, device=self.device or device)

    def keep(self, value: Tensor) -> Tensor:
        """Return a value in this storage; the value itself if it lies there already."""
        if self._is_filed(value.nbytes):
            return _mapped(self.folder, value.shape, value.dtype).copy_(value)
        return value.to(self.device or value.device)

    def _is_filed(self, size: int) -> bool:
        return self.folder is not None and size >= mmap.PAGESIZE


ON_DEVICE = Storage()


def _mapped(folder: Path | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return zeros in a memory-mapped file of a folder.

    Raises:
        LoraInitError: the folder cannot be written to, or has too little space.
    """
    size = prod(shape) * dtype.itemsize
    try:
        descriptor, name = tempfile.mkstemp(prefix="lorainit-", suffix=".scratch", dir=folder)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)  # a full disk raises here; later it would be a signal
            else:
                os.ftruncate(descriptor, size)
            return torch.from_file(name, shared=True, size=prod(shape), dtype=dtype).view(*shape)
        finally:
            os.close(descriptor)
            os.unlink(name)
    except OSError as error:
        raise LoraInitError(f"offload='{folder}': a sum of {size:,} bytes cannot be kept there ({error})") from error
