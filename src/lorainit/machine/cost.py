"""What a piece of work costs: wall-clock seconds and peak memory above its start."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclasses.dataclass
class Cost:
    """Cost of a block of code, filled when it ends.

    Attributes:
        seconds: wall-clock time.
        peak_bytes: highest memory above what was held at the start: allocated memory of the accelerator where there is
            one, else resident memory of this process (Linux); None where neither can be read.
    """

    seconds: float = 0.0
    peak_bytes: int | None = None


@contextlib.contextmanager
def measure() -> Iterator[Cost]:
    """Measure the block under a ``with`` statement; the yielded cost is filled when the block ends."""
    cost = Cost()
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        with contextlib.suppress(OSError):
            _CLEAR_REFS.write_text("5")  # resets this process's high-water mark
        before = _resident("VmRSS")
    start = time.perf_counter()
    try:
        yield cost
    finally:
        if cuda:
            torch.cuda.synchronize()
        cost.seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")
        if before is not None and peak is not None:
            cost.peak_bytes = max(0, peak - before)


def _resident(field: str) -> int | None:
    """Return a memory field of /proc/self/status in bytes, or None where there is no such file."""
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
