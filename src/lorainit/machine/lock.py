"""Work that one process at a time may do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from ..errors import LoraInitError


@contextlib.contextmanager
def taken(file: Path) -> Iterator[bool]:
    """Take a piece of work for this process by a lock file; yields False where another one has it.

    The system keeps the lock, not the file's presence: it falls with the process, however that ends, and the file may
    stay.

    Raises:
        LoraInitError: the file system has no locks.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock, missing = FileLock(file, timeout=0), f"{file}: the file system has no locks; choose a folder on another one"
    try:
        lock.acquire()
        mine = True
    except Timeout:
        mine = False
    except NotImplementedError as error:  # what older filelocks say
        raise LoraInitError(missing) from error
    try:
        # what newer ones turn to; the file of a process that was killed would hold for ever
        if isinstance(lock, SoftFileLock):
            raise LoraInitError(missing)
        yield mine
    finally:
        lock.release()
