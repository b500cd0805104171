"""Stopping the worse rates early: Ray Tune's ASHA decides, a Trainer callback reports to it.

Tune's own loop would start a process a trial and keep every trial's state in the driver; only its decision is used.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from transformers import TrainerCallback

from .suite import Search

if TYPE_CHECKING:
    from .results import Results
    from .trial import Cell, Trial


class _Named(NamedTuple):
    """What the scheduler reads of a trial."""

    trial_id: str


class Rungs:
    """One ASHA scheduler for each method in each cell: rates compete with each other, methods do not.

    Args:
        search: the options.
    """

    def __init__(self, search: Search) -> None:
        self._search = search
        self._schedulers: dict[str, ASHAScheduler] = {}
        self._added: set[str] = set()

    def report(self, group: str, key: str, step: int, loss: float, every: int, steps: int) -> bool:
        """Take in an evaluation and return whether the trial is to stop.

        Args:
            group: the method in its cell.
            key: the trial.
            step: training steps so far.
            loss: evaluation loss.
            every: steps from one evaluation to the next.
            steps: training steps in all.
        """
        scheduler = self._schedulers.setdefault(
            group,
            ASHAScheduler(
                time_attr="step",
                metric="loss",
                mode="min",
                max_t=steps,
                grace_period=min(self._search.grace * every, steps),
                reduction_factor=self._search.reduction,
                stop_last_trials=False,
            ),
        )
        named: Any = _Named(key)
        if key not in self._added:
            self._added.add(key)
            scheduler.on_trial_add(None, named)  # pyright: ignore[reportArgumentType]
        told = {"step": step, "loss": loss}
        return scheduler.on_trial_result(None, named, told) == TrialScheduler.STOP  # pyright: ignore


@dataclasses.dataclass(frozen=True)
class Judge:
    """A handle on the `Rungs` that every worker can take along.

    Attributes:
        rungs: the Ray actor that holds them.
        every: steps from one evaluation to the next.
        steps: training steps in all.
    """

    rungs: Any
    every: int
    steps: int

    def callback(self, trial: Trial) -> _Reporter:
        """Return the callback that reports a trial."""
        return _Reporter(self, f"{trial.cell}/{trial.label}", trial.key)


class _Reporter(TrainerCallback):
    """Reports every evaluation and ends the training when told to."""

    def __init__(self, judge: Judge, group: str, key: str) -> None:
        self.stopped = False
        self._judge, self._group, self._key = judge, group, key

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Report and, if told so, end the training."""
        judge = self._judge
        if state.global_step >= judge.steps:
            return
        told = (self._group, self._key, state.global_step, metrics["eval_loss"], judge.every, judge.steps)
        if ray.get(judge.rungs.report.remote(*told)):
            self.stopped = control.should_training_stop = True


def judges(tables: list[Cell], results: Results) -> dict[str, Judge]:
    """Return the judge of each cell, which knows the evaluations that an earlier call has seen.

    Raises:
        LoraInitError: the suite does not say when trainings are evaluated and end.
    """
    remote: Any = ray.remote(num_cpus=0)(Rungs)
    found = {cell.name: Judge(remote.remote(cell.search), *cell.evaluations()) for cell in tables}
    for key in results.summaries:
        if "_judged_" in key:
            record = results.read(key)
            tags = record["trial"]
            judge = found.get(tags["cell"])
            if judge is None:  # of another suite, or of a cell with another schedule
                continue
            for step, loss in record.get("curves", {}).get("eval_loss", []):
                told = (f"{tags['cell']}/{tags['label']}", key, step, loss, judge.every, judge.steps)
                ray.get(judge.rungs.report.remote(*told))
    return found
