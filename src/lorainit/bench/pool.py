"""Jobs on Ray: as many at a time as the machines have room for, none lost when a worker dies.

Plain actors instead of Tune: Tune keeps the state of every trial that is queued, starts a process for most of them
(importing torch and transformers takes longer than a short trial), and its experiment folder would be a second truth
beside the results. Here a worker process carries out one job after the other, and the driver holds only those in
flight. Loading the base again for each trial is left as it is: 0.2 of the 6 seconds of the shortest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import urlsplit

import ray
from ray.exceptions import RayError, RayTaskError

from ..errors import LoraInitError
from .suite import Resources

Job = TypeVar("Job")
Job_co = TypeVar("Job_co", covariant=True)
_STILLBORN = 8  # workers in a row that die before they have done anything
_PATIENCE = 600.0  # seconds without a worker before the cluster is called too small
_KNOCK = 5.0  # seconds within which a cluster's port has to open
_CLIENT_PORT = 10001  # Ray's, where a ray:// address names none


class Source(Protocol[Job_co]):
    """Where jobs come from."""

    def next(self) -> Job_co | None:
        """Return a job, or None if there is none before another one has ended."""
        ...


@dataclasses.dataclass
class _Worker(Generic[Job]):
    """An actor and what it does; no job while it starts or idles."""

    actor: Any
    job: Job | None = None


class _Actor:
    """A process that carries out jobs."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work

    def ready(self) -> None:
        """Answer once the process has started."""

    def carry_out(self, job: Any) -> Any:
        """Do a job."""
        return self._work(job)


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster; without an address, run one on this machine for as long as the block lasts.

    A program that has started Ray already keeps its own.

    Raises:
        LoraInitError: there is no cluster at that address.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        store = 256 * 2**20  # records are small
        quiet |= {"address": "local", "include_dashboard": False, "object_store_memory": store}
    else:
        _knock(address)
        quiet |= {"address": address}
    try:
        ray.init(**quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        what = "Ray does not start on this machine" if address is None else f"no Ray cluster at '{address}'"
        raise LoraInitError(f"{what}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise at once where nothing listens at an address; Ray itself would wait for minutes.

    What names no port is left to Ray, which refuses a bare host at once, and at ``auto`` looks on this machine.
    """
    # Ray takes this variable for `auto`
    found = os.environ.get("RAY_ADDRESS") or address if address == "auto" else address
    told = f"'{address}'" if found == address else f"'{found}' (RAY_ADDRESS)"
    scheme, _, place = found.rpartition("://")
    try:
        parts = urlsplit(f"//{place}")
        port = parts.port or (_CLIENT_PORT if scheme == "ray" else None)
    except ValueError as error:
        raise LoraInitError(f"{told} is no address of a Ray cluster, HOST:PORT or ray://HOST:PORT: {error}") from error
    if port is not None:
        try:
            socket.create_connection((parts.hostname or "", port), timeout=_KNOCK).close()
        except (OSError, UnicodeError) as error:  # the latter for a host that is no name
            raise LoraInitError(f"no Ray cluster at {told}: nothing answers at port {port}: {error}") from error


def run(
    source: Source[Job],
    work: Callable[[Job], Any],
    on_end: Callable[[Job, Any], None],
    on_lost: Callable[[Job, str], None],
    resources: Resources,
) -> None:
    """Carry out jobs until the source has none and none is running.

    Args:
        source: gives the jobs.
        work: does one, in a worker process; what it needs travels there once.
        on_end: takes a job and what came of it.
        on_lost: takes a job whose worker died every time, and why.
        resources: of a job.

    Raises:
        LoraInitError: no machine of the cluster has those resources, or no worker starts on them.
    """
    pool = _Pool(source, work, resources)
    for _ in range(pool.room):
        pool.start_worker()
    while pool.hand_out():
        for worker, job, result, error in pool.wait():
            if error is None:
                pool.free(worker, job)
                if job is not None:
                    on_end(job, result)
            elif job is not None and pool.give_up(job):
                on_lost(job, f"its worker died {resources.attempts} times: {error}")
    pool.close()


class _Pool(Generic[Job]):
    """Workers, what each does, and the jobs whose worker has died."""

    def __init__(self, source: Source[Job], work: Callable[[Job], Any], resources: Resources) -> None:
        self._source, self._resources = source, resources
        self._work = ray.put(work)
        self._spawn: Any = ray.remote(_Actor).options(**_options(resources)).remote
        self._running: dict[Any, _Worker[Job]] = {}
        self._idle: list[_Worker[Job]] = []
        self._lost: list[Job] = []
        self._deaths: dict[int, int] = {}  # by id of a job that is running or lost
        self._stillborn = 0
        self._alive = time.monotonic()
        self.room = _room(resources)

    def start_worker(self) -> None:
        """Start a worker; it gets a job once it has answered, as the cluster may have no room for it now."""
        worker: _Worker[Job] = _Worker(self._spawn(self._work))
        self._running[worker.actor.ready.remote()] = worker

    def hand_out(self) -> bool:
        """Give every idle worker a job; return whether there is anything to wait for."""
        while self._idle and (job := self._lost.pop() if self._lost else self._source.next()) is not None:
            worker = self._idle.pop()
            worker.job = job
            self._running[worker.actor.carry_out.remote(job)] = worker
        # an idle worker that found nothing: only a job in flight could unlock more
        return not self._idle or any(worker.job is not None for worker in self._running.values())

    def wait(self) -> Iterator[tuple[_Worker[Job], Job | None, Any, str | None]]:
        """Yield a worker that has answered or died: (worker, its job, the result, why it died).

        Raises:
            LoraInitError: workers die before they have done anything, or none ever starts.
        """
        ended, _ = ray.wait(list(self._running), num_returns=1, timeout=5.0)
        if not ended:
            self._check_patience()
            return
        worker = self._running.pop(ended[0])
        job, worker.job = worker.job, None
        try:
            result = ray.get(ended[0])
        except RayTaskError:  # the work itself is wrong
            raise
        except RayError as error:  # the worker was killed, out of memory, or its machine is gone
            said = " ".join(str(error).split())
            self._stillborn += job is None
            if self._stillborn > _STILLBORN:
                raise LoraInitError(f"workers do not start: {said}") from error
            self.start_worker()
            yield worker, job, None, said
        else:
            yield worker, job, result, None

    def free(self, worker: _Worker[Job], job: Job | None) -> None:
        """Take back a worker that has answered, by doing its job if it had one."""
        self._deaths.pop(id(job), None)
        self._alive, self._stillborn = time.monotonic(), 0
        self._idle.append(worker)

    def give_up(self, job: Job) -> bool:
        """Put a job back whose worker has died; return whether that has happened too often instead."""
        deaths = self._deaths.pop(id(job), 0) + 1
        if deaths >= self._resources.attempts:
            return True
        self._deaths[id(job)] = deaths
        self._lost.append(job)
        return False

    def close(self) -> None:
        """End the workers."""
        for worker in (*self._idle, *self._running.values()):
            ray.kill(worker.actor)

    def _check_patience(self) -> None:
        waiting = not self._idle and all(worker.job is None for worker in self._running.values())
        if waiting and time.monotonic() - self._alive > _PATIENCE:
            told = _told(self._resources)
            raise LoraInitError(f"no machine of the cluster gave a worker {told} in {_PATIENCE:.0f} s")


def _options(resources: Resources) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
    if resources.memory_gb is not None:
        options["memory"] = int(resources.memory_gb * 2**30)
    return options


def _room(resources: Resources) -> int:
    """Return how many jobs fit on the machines that the cluster has now.

    Raises:
        LoraInitError: none fits.
    """
    wanted = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": (resources.memory_gb or 0) * 2**30}
    room = 0
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            fits = [int(has.get(kind, 0) // amount) for kind, amount in wanted.items() if amount > 0]
            room += min(fits, default=os.cpu_count() or 1)
    if room == 0:
        raise LoraInitError(f"resources: no machine of the cluster has {_told(resources)} for a trial")
    return min(room, resources.workers or room)


def _told(resources: Resources) -> str:
    memory = f", {resources.memory_gb:g} GB" if resources.memory_gb is not None else ""
    return f"{resources.cpus:g} CPUs, {resources.gpus:g} GPUs{memory}"
