"""Passes of a model over batches: freely, or all processes in step where its layers are spread over them (FSDP2).

A pass of a sharded model is a collective: its layers are put together as it goes, by all processes. So they run as many
passes, of one kind: before each they say whether they have a part of their data left, and one that has none runs what
it has run before, or got from another, without counting it.
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
Part = tuple[Any, About]  # what the model takes, and what is to be known to count it


class Passes:
    """The passes of a model that is all here.

    Attributes:
        in_step: whether other processes run the same passes, which then must be whole.
    """

    in_step = False

    def each(self, parts: Iterator[Part[About]]) -> Iterator[tuple[Any, About | None]]:
        """Yield the parts, each with what is to be known to count it; with None one that is only to be run."""
        yield from parts

    def attempt(self, work: Callable[..., Any], *args: Any) -> Any:
        """Do what comes up within a pass."""
        return work(*args)

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Return a context for a forward or a backward."""
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        """Go on only if nothing went wrong, here or elsewhere."""


class Lockstep(Passes):
    """The passes of a model that is spread over processes.

    An error that `attempt` meets is kept until the pass is over and is raised where the processes meet.
    """

    in_step = True

    def __init__(self, processes: Processes, device: torch.device) -> None:
        self._processes, self._device = processes, device
        self._kept: Exception | None = None

    def each(self, parts: Iterator[Part[About]]) -> Iterator[tuple[Any, About | None]]:
        """Yield the parts; then, while another process has any, one that is only to be run.

        Raises:
            LoraInitError: another process has failed.
            MemoryError: memory ran out, here or in another process.
        """
        spare: Any = None
        while True:
            part: Part[About] | None = self.attempt(next, parts, None)
            having = [rank for rank, has in enumerate(self._told(part is not None)) if has]
            if not having:
                return
            if spare is None and len(having) < self._processes.size:  # the same in all of them: at the first part only
                spare = self._lent(having[0], part)
            if part is not None:
                spare = part[0]
            yield (spare, None) if part is None else part

    def attempt(self, work: Callable[..., Any], *args: Any) -> Any:
        """Do what comes up within a pass, unless something has gone wrong before; return None if it does now."""
        if self._kept is None:
            try:
                return work(*args)
            except Exception as error:
                self._kept = error
        return None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run a forward or a backward, in which the others wait for this process and can be told of nothing.

        Raises:
            LoraInitError: it failed.
        """
        rank, size = self._processes.rank, self._processes.size
        try:
            yield
        except BaseException as error:
            self._processes.leave()
            known = isinstance(error, LoraInitError)
            # what is known without a cause is wrong in every process alike, such as data without labels
            if not isinstance(error, Exception) or (known and error.__cause__ is None):
                raise
            what = str(error) if known else f"{type(error).__name__}: {error}"
            raise LoraInitError(
                f"process {rank} of {size} failed in a pass of the sharded model: {what}. The others "
                "wait there until this process ends, or for the timeout of the process group"
            ) from error

    def synchronize(self) -> None:
        """Go on only if nothing went wrong, in any process.

        Raises:
            LoraInitError: another process has failed.
            MemoryError: memory ran out, here or in another process.
        """
        self._told(None)

    def _told(self, value: Any) -> list[Any]:
        kept = self._kept
        if kept is not None and not memory.ran_out(kept):
            raise kept
        told = self._processes.exchange((value, kept is None))
        if lacking := [rank for rank, (_, fits) in enumerate(told) if not fits]:
            raise MemoryError(f"memory ran out in process {lacking[0]}") from kept
        return [each for each, _ in told]

    def _lent(self, lender: int, part: Part[Any] | None) -> Any:
        """Return the batch of a process's part, in all processes."""
        lent = part[0] if part is not None and self._processes.rank == lender else None
        return to_device(self._processes.exchange(to_device(lent, torch.device("cpu")))[lender], self._device)


@contextlib.contextmanager
def passes_of(model: nn.Module, processes: Processes) -> Iterator[Passes]:
    """Yield the passes of a model, which is as before when they are over."""
    if sharding.wrapping(model) != "fsdp2":
        yield Passes()
        return
    with sharding.running(model):
        yield Lockstep(processes, next(model.parameters()).device)
