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
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import ray
from ray.exceptions import RayActorError

from ..errors import LoraInitError
from .suite import Resources

Job = TypeVar("Job")
Job_co = TypeVar("Job_co", covariant=True)
_PATIENCE = 600.0  # seconds without a worker before the cluster is called too small


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
def cluster(address: str | None, resources: Resources) -> Iterator[None]:
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
        quiet |= {"address": address}
    try:
        ray.init(**quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise LoraInitError(f"no Ray cluster at '{address}': {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


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
        LoraInitError: no machine of the cluster has those resources.
    """
    options = _options(resources)
    shared = ray.put(work)
    spawn = ray.remote(_Actor).options(**options).remote
    running: dict[Any, _Worker[Job]] = {}
    idle: list[_Worker[Job]] = []
    lost: list[tuple[Job, int]] = []  # to be done again, with how often it was tried
    attempts: dict[int, int] = {}  # by id of the job in flight
    alive = time.monotonic()

    def take() -> Job | None:
        if lost:
            job, tries = lost.pop()
            attempts[id(job)] = tries
            return job
        return source.next()

    def start() -> None:
        worker: _Worker[Job] = _Worker(spawn(shared))
        running[worker.actor.ready.remote()] = worker

    workers = _room(resources)
    for _ in range(workers):
        start()
    while True:
        while idle and (job := take()) is not None:
            worker = idle.pop()
            worker.job = job
            running[worker.actor.carry_out.remote(job)] = worker
        if not lost and idle and all(worker.job is None for worker in running.values()):
            break  # nothing is left, nothing in flight can unlock more
        ended, _ = ray.wait(list(running), num_returns=1, timeout=5.0)
        if not ended:
            if not idle and all(w.job is None for w in running.values()) and time.monotonic() - alive > _PATIENCE:
                raise LoraInitError(f"no machine of the cluster gave a worker {_told(resources)} in {_PATIENCE:.0f} s")
            continue
        worker = running.pop(ended[0])
        job, worker.job = worker.job, None
        try:
            result = ray.get(ended[0])
        except RayActorError as error:  # killed, out of memory, or its machine is gone
            if job is not None:
                tries = attempts.pop(id(job), 1)
                if tries >= resources.attempts:
                    on_lost(job, f"its worker died {tries} times: {str(error).splitlines()[0]}")
                else:
                    lost.append((job, tries + 1))
            start()
            continue
        alive = time.monotonic()
        idle.append(worker)
        if job is not None:
            attempts.pop(id(job), None)
            on_end(job, result)
    for worker in (*idle, *running.values()):
        ray.kill(worker.actor)


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
