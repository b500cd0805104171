"""Runs passes of a model over batches: independently, or in all processes in step where it is sharded (FSDP2).

A forward or backward pass of a sharded model is a collective operation: all processes gather its layers as it goes. So
they must run equally many passes, of one kind. Before each pass they exchange whether they have data left; a process
that has none runs a batch again (its own last one, or one of another process) without counting it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import LoraInitError
from ..machine import memory, sharding
from ..machine.processes import Processes
from .batches import to_device

About = TypeVar("About")
Part = tuple[Any, About]  # the batch, and how it is counted


class Passes:
    """Passes of a model that this process holds whole.

    Attributes:
        in_step: whether other processes run the same passes, so that none may be cut short.
    """

    in_step = False

    def each(self, parts: Iterator[Part[About]]) -> Iterator[tuple[Any, About | None]]:
        """Yield the parts with how they are counted; with None a batch that is run without being counted."""
        yield from parts

    def attempt(self, work: Callable[..., Any], *args: Any) -> Any:
        """Do some work inside a pass."""
        return work(*args)

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Return a context for a forward or a backward."""
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        """Raise if the work of a pass has failed."""


class Lockstep(Passes):
    """Passes of a model that is sharded over processes.

    An error in the work inside a pass is kept until the pass is over, and raised where the processes synchronize.
    """

    in_step = True

    def __init__(self, processes: Processes, device: torch.device) -> None:
        self._processes, self._device = processes, device
        self._kept: Exception | None = None

    def each(self, parts: Iterator[Part[About]]) -> Iterator[tuple[Any, About | None]]:
        """Yield the parts; then, while another process has any, a batch with None, which is not counted.

        Raises:
            LoraInitError: another process has failed.
            MemoryError: memory ran out, here or in another process.
        """
        spare: Any = None
        while True:
            part: Part[About] | None = self.attempt(next, parts, None)
            having = [rank for rank, has in enumerate(self._exchange(part is not None)) if has]
            if not having:
                return
            if spare is None and len(having) < self._processes.size:  # the same in all of them: at the first part only
                spare = self._lend(having[0], part)
            if part is not None:
                spare = part[0]
            yield (spare, None) if part is None else part

    def attempt(self, work: Callable[..., Any], *args: Any) -> Any:
        """Do some work inside a pass unless earlier work has failed; keep its error and return None if it fails."""
        if self._kept is None:
            try:
                return work(*args)
            except Exception as error:
                self._kept = error
        return None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run a forward or a backward; the other processes wait in it, so its errors cannot be exchanged.

        Raises:
            LoraInitError: it failed.
        """
        rank, size = self._processes.rank, self._processes.size
        try:
            yield
        except BaseException as error:
            self._processes.leave()
            known = isinstance(error, LoraInitError)
            # an error of ours without a cause occurs in every process alike, such as data without labels
            if not isinstance(error, Exception) or (known and error.__cause__ is None):
                raise
            what = str(error) if known else f"{type(error).__name__}: {error}"
            raise LoraInitError(
                f"process {rank} of {size} failed in a pass of the sharded model: {what}. The others "
                "wait there until this process ends, or for the timeout of the process group"
            ) from error

    def synchronize(self) -> None:
        """Raise if the work of a pass has failed in any process.

        Raises:
            LoraInitError: another process has failed.
            MemoryError: memory ran out, here or in another process.
        """
        self._exchange(None)

    def _exchange(self, value: Any) -> list[Any]:
        kept = self._kept
        if kept is not None and not memory.ran_out(kept):
            raise kept
        answers = self._processes.exchange((value, kept is None))
        if lacking := [rank for rank, (_, fits) in enumerate(answers) if not fits]:
            raise MemoryError(f"memory ran out in process {lacking[0]}") from kept
        return [each for each, _ in answers]

    def _lend(self, lender: int, part: Part[Any] | None) -> Any:
        """Return one process's batch in all processes."""
        lent = part[0] if part is not None and self._processes.rank == lender else None
        return to_device(self._processes.exchange(to_device(lent, torch.device("cpu")))[lender], self._device)


@contextlib.contextmanager
def passes_of(model: nn.Module, processes: Processes) -> Iterator[Passes]:
    """Yield the passes of a model, and leave it as it was."""
    if sharding.wrapping(model) != "fsdp2":
        yield Passes()
        return
    with sharding.running(model):
        yield Lockstep(processes, next(model.parameters()).device)
