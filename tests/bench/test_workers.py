"""Workers and plan without trainings: what ten thousand queued trials cost the driver, and workers that die."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import time
import tracemalloc
from pathlib import Path

import pytest
import ray

from lorainit import LoraInitError
from lorainit.bench.plan import Plan, settled
from lorainit.bench.results import Results
from lorainit.bench.suite import Resources, Search
from lorainit.bench.trial import Trial
from lorainit.bench.workers import run_jobs
from tiny_suite import SMALL

MANY = dataclasses.replace(
    SMALL, search=Search("grid", exponents=list(range(-12, 13)), widest=12), seeds=list(range(100))
)  # 4 rows × 25 rates × 100 seeds = 10,000 trials


def record_of(trial: Trial) -> dict:
    """A record as large as a real one, with a loss that has its minimum at exponent 3."""
    loss = abs(trial.point.rate / 8e-3 - 1) + 1e-3 * trial.point.seed
    curve = [[float(step), loss] for step in range(400)]
    return {"status": "done", "trial": trial.tags(), "metrics": {"loss": loss}, "curves": {"loss": curve}}


@dataclasses.dataclass
class Line:
    """Jobs from a list."""

    jobs: list

    def next(self):
        return self.jobs.pop(0) if self.jobs else None


def work_off(plan: Plan, results: Results, at_most: int) -> int:
    count = 0
    while count < at_most and (trial := plan.next()) is not None:
        plan.ended(trial.key, results.write(trial.key, record_of(trial)))
        count += 1
    return count


def held() -> int:
    """Bytes in use; circles that the collector has not come to yet are not."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize("seeds", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_thousands_of_queued_trials_keep_memory_flat_and_are_taken_up_in_seconds(tmp_path, monkeypatch, seeds) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the disk's time is not the driver's
    many = dataclasses.replace(MANY, seeds=list(range(seeds)))
    count = 100 * seeds
    results = Results(tmp_path)
    plan = Plan(many, results)
    tracemalloc.start()
    assert work_off(plan, results, 100) == 100
    early = held()
    assert work_off(plan, results, 200) == 200
    grown = held() - early
    tracemalloc.stop()
    assert grown / 200 < 1500  # bytes a trial: its key and its sums, not its record of 10 KB
    assert work_off(plan, results, 10**6) == count - 300
    results.close()

    begin = time.perf_counter()
    again = Results(tmp_path)
    assert len(again.summaries) == count
    assert Plan(many, again).next() is None
    assert time.perf_counter() - begin < 20
    for key in list(again.summaries)[:3]:
        again.path(key).unlink()
    third = Results(tmp_path)
    assert work_off(Plan(many, third), third, 10**6) == 3
    groups = [group for group, _ in settled(many, third)]
    assert [group.best() for group in groups] == [3] * 4


@pytest.fixture(scope="module")
def machine():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def run(jobs: list, work, attempts: int = 3) -> tuple[dict, dict]:
    done: dict = {}
    lost: dict = {}
    run_jobs(Line(jobs), work, done.__setitem__, lost.__setitem__, Resources(cpus=1, attempts=attempts))
    return done, lost


@pytest.mark.slow
def test_a_job_whose_worker_dies_is_done_again_and_given_up_after_some_attempts(machine, tmp_path) -> None:
    folder = str(tmp_path)

    def work(job: int) -> int:
        mark = Path(folder) / str(job)
        if job == 3 or (job == 1 and not mark.exists()):
            mark.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return job * job

    done, lost = run([0, 1, 2, 3, 4], work)
    assert done == {0: 0, 1: 1, 2: 4, 4: 16}
    assert list(lost) == [3]
    assert "died 3 times" in lost[3]


def test_no_more_jobs_are_taken_than_there_are_workers(machine) -> None:
    taken, ended = [], []

    class Counting:
        def next(self):
            if len(taken) == 40:
                return None
            taken.append(len(taken))
            assert len(taken) - len(ended) <= 2
            return taken[-1]

    run_jobs(Counting(), lambda job: job, lambda job, _: ended.append(job), lambda *_: None, Resources(cpus=1))
    assert sorted(ended) == list(range(40))


@pytest.mark.slow
def test_an_error_of_the_work_itself_is_an_error_here(machine) -> None:
    def work(job: int) -> int:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run([0], work)


class Stillborn:
    """Cannot be unpickled: a worker that does not know the package."""

    def __reduce__(self):
        return (os._exit, (1,))


@pytest.mark.slow
def test_workers_that_never_start_are_an_error_and_no_endless_loop(machine) -> None:
    with pytest.raises(LoraInitError, match="workers do not start"):
        run([0], Stillborn())
