"""The processes that start one model together: each feeds its share of the data, sums add up, solves are shared out.

All of them run the same steps and meet at a few points. Every meeting begins with an exchange in which a process that
has failed says so, and one that fails between two meetings goes to the next only to say that. So an error in one of
them is an error in all, and nobody waits for a process that will not come.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..errors import LoraInitError, NonFiniteError, UnsupportedLayerError

Group = Any  # torch.distributed.ProcessGroup, which a torch built without distributed does not have

_BUCKET = 32 * 2**20  # bytes that are sent at a time: many small sums together, a large one in pieces
_ERRORS = {error.__name__: error for error in (LoraInitError, UnsupportedLayerError, NonFiniteError)}


class _Failure(NamedTuple):
    """What a process says of the error that ended its work."""

    kind: str
    message: str


class Processes:
    """The processes of a group, or this one alone.

    Attributes:
        rank: the number of this process in the group.
        size: how many there are.
    """

    def __init__(self, group: Group | Literal["default"] | None = None) -> None:
        """Take the processes of a group: a group, the ``"default"`` one if there is any, or None for this one alone.

        Raises:
            LoraInitError: no group, or one that this process is not in.
        """
        self._group: Group = None
        self.rank, self.size = 0, 1
        self._over = False  # this process or another one has failed: there are no further meetings
        running = distributed.is_available() and distributed.is_initialized()
        if group == "default" and not running and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            warnings.warn(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but torch.distributed is not initialized: this process starts "
                "its model alone, from its own data. Initialize it first (torch.distributed.init_process_group, "
                "accelerate.Accelerator() or transformers.TrainingArguments)",
                stacklevel=3,
            )
        if group is None or (group == "default" and not running):
            return
        if isinstance(group, str) and group != "default":
            raise LoraInitError(f"process_group={group!r} is neither 'default', None nor a process group")
        self._group = distributed.group.WORLD if group == "default" else group
        self.rank, self.size = distributed.get_rank(self._group), distributed.get_world_size(self._group)
        if self.rank < 0:
            raise LoraInitError("this process is not in the process_group that it was given")

    def exchange(self, value: Any) -> list[Any]:
        """Return the value of every process, by rank.

        Raises:
            LoraInitError: another process has failed, with the kind of its error; or it is gone.
        """
        return self._meet(None, value) if self.size > 1 else [value]

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Raise in all processes, before any of them leaves the block, if it raises in one."""
        try:
            yield
            self.exchange(None)
        except BaseException as error:
            if self.size > 1 and not self._over:
                with contextlib.suppress(LoraInitError):  # what the others say does not matter any more
                    self._meet(_Failure(type(error).__name__, str(error)), None)
            raise

    def leave(self) -> None:
        """Tell and hear nothing more: this process has failed where the others cannot be met."""
        self._over = True

    def agree(self, values: Mapping[str, Any]) -> None:
        """Raise unless every process has got the same values; the message names the first that differs."""
        first, *others = self.exchange(values)
        for rank, theirs in enumerate(others, start=1):
            if differing := [name for name in first if theirs.get(name) != first[name]]:
                name = differing[0]
                raise LoraInitError(
                    f"the processes differ in {name}: process 0 has {first[name]!r}, process {rank} "
                    f"{theirs.get(name)!r}; all of them must call initialize alike"
                )
            if extra := [name for name in theirs if name not in first]:
                raise LoraInitError(f"the processes differ: process {rank} has {extra[0]}, process 0 has not")

    def add_up(self, sums: Iterable[Tensor]) -> None:
        """Replace every tensor by its sum over the processes, in its own dtype, small ones together."""
        if self.size == 1:
            return
        pieces: dict[torch.dtype, list[Tensor]] = {}
        for tensor in sums:
            flat = tensor if tensor.dim() else tensor[None]
            rows = max(1, _BUCKET // max(1, flat[0].numel() * flat.element_size())) if len(flat) else 1
            pieces.setdefault(tensor.dtype, []).extend(flat.split(rows))
        for bucket in (b for same in pieces.values() for b in _buckets(same)):
            buffer = torch.cat([piece.reshape(-1).to(self._device(piece)) for piece in bucket])
            self._call(distributed.all_reduce, buffer)
            for piece, total in zip(bucket, buffer.split([p.numel() for p in bucket]), strict=True):
                piece.copy_(total.view_as(piece))

    def share(self, amount: int | None) -> int | None:
        """Return what of an amount falls to this process; None: no limit."""
        return amount if amount is None else amount // self.size + (self.rank < amount % self.size)

    def pool(self, found: Mapping[str, tuple[Any, Sequence[Tensor]]]) -> dict[str, tuple[Any, list[Tensor]]]:
        """Return what all processes have found, each thing under its name: an object, and tensors (in CPU memory)."""
        mine = {name: (about, [(t.shape, t.dtype) for t in tensors]) for name, (about, tensors) in found.items()}
        pooled: dict[str, tuple[Any, list[Tensor]]] = {}
        for source, theirs in enumerate(self.exchange(mine)):
            sent: dict[torch.dtype, list[Tensor]] = {}
            for name, (about, shapes) in theirs.items():
                own = [tensor.detach().cpu() for tensor in found[name][1]] if source == self.rank else None
                pooled[name] = about, own or [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
                for tensor in pooled[name][1]:
                    sent.setdefault(tensor.dtype, []).append(tensor)
            for tensors in sent.values():
                buffer = torch.cat([tensor.reshape(-1).to(self._device(tensor)) for tensor in tensors])
                self._call(distributed.broadcast, buffer, src=distributed.get_global_rank(self._group, source))
                if source != self.rank:
                    for tensor, received in zip(tensors, buffer.split([t.numel() for t in tensors]), strict=True):
                        tensor.copy_(received.view_as(tensor))
        return pooled

    def _meet(self, failure: _Failure | None, value: Any) -> list[Any]:
        told: list[Any] = [None] * self.size
        self._call(distributed.all_gather_object, told, (failure, value))
        failures = [(rank, failed) for rank, (failed, _) in enumerate(told) if failed is not None]
        if failures:
            self._over = True
            rank, (kind, message) = failures[0]
            known = _ERRORS.get(kind)
            raise (known or LoraInitError)(f"process {rank} failed: {message if known else f'{kind}: {message}'}")
        return [value for _, value in told]

    def _call(self, collective: Any, *args: Any, **kwargs: Any) -> None:
        try:
            collective(*args, group=self._group, **kwargs)
        except RuntimeError as error:  # a process is gone, or the connection to it
            self._over = True
            raise LoraInitError(f"process {self.rank} of {self.size} has lost the others: {error}") from error

    def _device(self, tensor: Tensor) -> torch.device:
        """Return where a tensor can be sent from: where it lies, unless the group's backend cannot reach it there."""
        reached = [entry.split(":")[0] for entry in distributed.get_backend_config(self._group).split(",")]
        return tensor.device if tensor.device.type in reached else torch.device(reached[-1])


ALONE = Processes()


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module that is copied to several devices or processes: its own forward says all there is to know."""
    return model.module if isinstance(model, (DataParallel, DistributedDataParallel)) else model


def shared_out(costs: Mapping[str, float], size: int) -> list[list[str]]:
    """Return what each of so many processes has to do: the costliest first, each to the one with the least so far."""
    shares: list[list[str]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for name in sorted(costs, key=lambda each: -costs[each]):  # stable, so that all processes find the same
        chosen = loads.index(min(loads))
        shares[chosen].append(name)
        loads[chosen] += costs[name]
    return shares


def _buckets(pieces: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    held = 0
    for piece in pieces:
        size = piece.numel() * piece.element_size()
        if bucket and held + size > _BUCKET:
            yield bucket
            bucket, held = [], 0
        bucket.append(piece)
        held += size
    if bucket:
        yield bucket
