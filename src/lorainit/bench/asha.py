"""Stops the worse learning rates early: Ray Tune's ASHA decides, and a Trainer callback asks it.

Of Tune only the decision is used; `workers` says why not its loop.
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


class _TuneTrial(NamedTuple):
    """What the scheduler reads of a trial."""

    trial_id: str


class Schedulers:
    """One ASHA scheduler for each method in each cell: rates compete with each other, methods do not.

    Args:
        search: the options.
    """

    def __init__(self, search: Search) -> None:
        self._search = search
        self._by_group: dict[str, ASHAScheduler] = {}
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
        scheduler = self._by_group.setdefault(group, self._scheduler(every, steps))
        trial: Any = _TuneTrial(key)
        if key not in self._added:
            self._added.add(key)
            scheduler.on_trial_add(None, trial)  # pyright: ignore[reportArgumentType]
        result = {"step": step, "loss": loss}
        return scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP  # pyright: ignore

    def _scheduler(self, every: int, steps: int) -> ASHAScheduler:
        return ASHAScheduler(
            time_attr="step",
            metric="loss",
            mode="min",
            max_t=steps,
            grace_period=min(self._search.grace * every, steps),
            reduction_factor=self._search.reduction,
            stop_last_trials=False,
        )


@dataclasses.dataclass(frozen=True)
class Stopper:
    """A handle on the `Schedulers` of a cell, which a worker takes along.

    Attributes:
        schedulers: the Ray actor that holds them.
        every: steps from one evaluation to the next.
        steps: training steps in all.
    """

    schedulers: Any
    every: int
    steps: int

    def callback(self, trial: Trial) -> _StopCallback:
        """Return the callback for a trial."""
        return _StopCallback(self, f"{trial.cell}/{trial.label}", trial.key)


class _StopCallback(TrainerCallback):
    """Reports every evaluation, and ends the training if ASHA says so."""

    def __init__(self, stopper: Stopper, group: str, key: str) -> None:
        self.stopped = False
        self._stopper, self._group, self._key = stopper, group, key

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Report an evaluation and, if ASHA says so, end the training."""
        stopper = self._stopper
        if state.global_step >= stopper.steps:
            return
        evaluation = (self._group, self._key, state.global_step, metrics["eval_loss"], stopper.every, stopper.steps)
        if ray.get(stopper.schedulers.report.remote(*evaluation)):
            self.stopped = control.should_training_stop = True


def stoppers(cells: list[Cell], results: Results) -> dict[str, Stopper]:
    """Return the stopper of each cell, by its name; they know the evaluations of an earlier call.

    Raises:
        LoraInitError: the suite does not say when trainings are evaluated and end.
    """
    remote: Any = ray.remote(num_cpus=0)(Schedulers)
    found = {cell.name: Stopper(remote.remote(cell.search), *cell.evaluations()) for cell in cells}
    for key in results.summaries:
        if "_judged_" in key:
            record = results.read(key)
            tags = record["trial"]
            stopper = found.get(tags["cell"])
            if stopper is None:  # of another suite, or of a cell with another schedule
                continue
            for step, loss in record.get("curves", {}).get("eval_loss", []):
                evaluation = (f"{tags['cell']}/{tags['label']}", key, step, loss, stopper.every, stopper.steps)
                ray.get(stopper.schedulers.report.remote(*evaluation))
    return found
