"""Carries out jobs in worker processes on Ray: as many at a time as the machines have room for.

A worker is an actor: a process that imports torch and transformers once, keeps its accelerator, and does one job after
the other. What Ray has for this was tried (2.60):

- Tune, with a `Searcher` and `reuse_actors=True`, keeps processes too. But its driver holds every trial that has ended
  (52 KB each, before any result) and writes all of them to its experiment state again and again (11 KB each). Here
  the search needs one line of sums for each, and the results are JSON files already.
- Tasks get a new process each when they use an accelerator. With `max_calls=0` the processes stay, but Ray may give one
  another accelerator later, which a process that has used CUDA does not follow.
- An actor's call that Ray may retry (`max_task_retries=2`) failed 4 s after the actor's machine was taken away, while
  another worker was free. Here the job goes back and to any worker that is free.

Each trial loads its base again: 0.2 s of the 6 s of the shortest.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from ..errors import LoraInitError
from .suite import Resources

Job = TypeVar("Job")
Job_co = TypeVar("Job_co", covariant=True)
MAX_STARTUP_FAILURES = 8  # workers in a row that may die before they have answered once
MAX_STARTUP_SECONDS = 600.0  # without any worker, before the cluster is called too small


class Queue(Protocol[Job_co]):
    """Where jobs come from."""

    def next(self) -> Job_co | None:
        """Return a job, or None if there is none before another one has ended."""
        ...


@dataclasses.dataclass
class _Worker(Generic[Job]):
    """A worker and its job; no job while it starts or waits for one."""

    actor: Any
    job: Job | None = None


class _Actor:
    """The process of a worker."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work

    def ready(self) -> None:
        """Answer once the process has started."""

    def carry_out(self, job: Any) -> Any:
        """Do a job."""
        return self._work(job)


def run_jobs(
    queue: Queue[Job],
    work: Callable[[Job], Any],
    on_end: Callable[[Job, Any], None],
    on_lost: Callable[[Job, str], None],
    resources: Resources,
) -> None:
    """Carry out jobs until the queue has none and none is running.

    Args:
        queue: gives the jobs.
        work: does one, in a worker; what it needs travels there once.
        on_end: takes a job and what came of it.
        on_lost: takes a job whose worker died every time, and why.
        resources: of a job.

    Raises:
        LoraInitError: no machine of the cluster has those resources, or no worker starts on them.
    """
    pool = _Pool(queue, work, resources)
    for _ in range(pool.capacity):
        pool.start_worker()
    while pool.hand_out():
        for worker, job, result, error in pool.wait():
            if error is None:
                pool.free(worker, job)
                if job is not None:
                    on_end(job, result)
            elif job is not None and not pool.repeat(job):
                on_lost(job, f"its worker died {resources.attempts} times: {error}")
    pool.close()


class _Pool(Generic[Job]):
    """The workers, what each does, and the jobs whose worker has died."""

    def __init__(self, queue: Queue[Job], work: Callable[[Job], Any], resources: Resources) -> None:
        self._queue, self._resources = queue, resources
        self._work = ray.put(work)
        self._spawn: Any = ray.remote(_Actor).options(**_options(resources)).remote
        self._running: dict[Any, _Worker[Job]] = {}  # by what Ray answers them with
        self._idle: list[_Worker[Job]] = []
        self._to_repeat: list[Job] = []
        self._deaths: dict[int, int] = {}  # of workers, by the id of a job that is running or to be repeated
        self._startup_failures = 0
        self._last_answer = time.monotonic()
        self.capacity = _capacity(resources)

    def start_worker(self) -> None:
        """Start a worker; it gets a job once it has answered, as the cluster may have no room for it now."""
        worker: _Worker[Job] = _Worker(self._spawn(self._work))
        self._running[worker.actor.ready.remote()] = worker

    def hand_out(self) -> bool:
        """Give every idle worker a job; return whether there is anything to wait for."""
        while self._idle and (job := self._to_repeat.pop() if self._to_repeat else self._queue.next()) is not None:
            worker = self._idle.pop()
            worker.job = job
            self._running[worker.actor.carry_out.remote(job)] = worker
        # where a worker is idle the queue had no job for it: only the end of a running one could bring more
        return not self._idle or any(worker.job is not None for worker in self._running.values())

    def wait(self) -> Iterator[tuple[_Worker[Job], Job | None, Any, str | None]]:
        """Yield a worker that has answered or died: (worker, its job, the result, why it died).

        Raises:
            LoraInitError: workers die before they have answered once, or none ever starts.
        """
        ended, _ = ray.wait(list(self._running), num_returns=1, timeout=5.0)
        if not ended:
            self._check_start()
            return
        worker = self._running.pop(ended[0])
        job, worker.job = worker.job, None
        try:
            result = ray.get(ended[0])
        except RayTaskError:  # the work itself is wrong
            raise
        except RayError as error:  # the worker was killed, out of memory, or its machine is gone
            reason = " ".join(str(error).split())
            self._startup_failures += job is None
            if self._startup_failures > MAX_STARTUP_FAILURES:
                raise LoraInitError(f"workers do not start: {reason}") from error
            self.start_worker()
            yield worker, job, None, reason
        else:
            yield worker, job, result, None

    def free(self, worker: _Worker[Job], job: Job | None) -> None:
        """Take back a worker that has started, or has done its job."""
        self._deaths.pop(id(job), None)
        self._last_answer, self._startup_failures = time.monotonic(), 0
        self._idle.append(worker)

    def repeat(self, job: Job) -> bool:
        """Put back a job whose worker has died; return False where that has happened too often."""
        deaths = self._deaths.pop(id(job), 0) + 1
        if deaths >= self._resources.attempts:
            return False
        self._deaths[id(job)] = deaths
        self._to_repeat.append(job)
        return True

    def close(self) -> None:
        """End the workers."""
        for worker in (*self._idle, *self._running.values()):
            ray.kill(worker.actor)

    def _check_start(self) -> None:
        """Raise where no worker has started for too long."""
        starting = not self._idle and all(worker.job is None for worker in self._running.values())
        if starting and time.monotonic() - self._last_answer > MAX_STARTUP_SECONDS:
            raise LoraInitError(
                f"no machine of the cluster gave a worker {_described(self._resources)} in {MAX_STARTUP_SECONDS:.0f} s"
            )


def _options(resources: Resources) -> dict[str, Any]:
    """Return a worker's resources as Ray takes them."""
    options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
    if resources.memory_gb is not None:
        options["memory"] = int(resources.memory_gb * 2**30)
    return options


def _capacity(resources: Resources) -> int:
    """Return how many jobs fit on the machines that the cluster has now.

    Raises:
        LoraInitError: none fits.
    """
    wanted = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": (resources.memory_gb or 0) * 2**30}
    count = 0
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            fits = [int(has.get(kind, 0) // amount) for kind, amount in wanted.items() if amount > 0]
            count += min(fits, default=os.cpu_count() or 1)
    if count == 0:
        raise LoraInitError(f"resources: no machine of the cluster has {_described(resources)} for a trial")
    return min(count, resources.workers or count)


def _described(resources: Resources) -> str:
    memory = f", {resources.memory_gb:g} GB" if resources.memory_gb is not None else ""
    return f"{resources.cpus:g} CPUs, {resources.gpus:g} GPUs{memory}"
