"""Describes one trial: everything that decides its numbers, and the name that follows from it."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
from typing import Any

from ..errors import LoraInitError
from ..grids.result_files import Status
from ..grids.same_recipe import DEFAULTS, fingerprint
from ..tasks import DataOptions
from ..train.diagnose import DiagnosisOptions
from ..train.recipe import LORA_DEFAULTS, TRAIN_DEFAULTS, Recipe
from .search import Point
from .suite import Forgetting, MethodEntry, ModelEntry, Search, Suite, TaskEntry

_QUIET = {"disable_tqdm": True, "log_level": "error"}
_ROOT = "root:"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A model on a task at a rank: one table of the report.

    Attributes:
        suite: the suite that it belongs to.
        model: the model.
        task: the task.
        rank: the rank.
    """

    suite: Suite
    model: ModelEntry
    task: TaskEntry
    rank: int

    @property
    def search(self) -> Search:
        """How learning rates are found."""
        return self.task.search or self.suite.search

    @property
    def final_seeds(self) -> list[int]:
        """The seeds at the best rate."""
        return self.suite.seeds if self.search.final_seeds is None else self.search.final_seeds

    @property
    def comparison_seeds(self) -> list[int]:
        """The seeds of the runs that are compared with those at the tuned rate."""
        return self.final_seeds if self.search.compare_seeds is None else self.search.compare_seeds

    @functools.cached_property
    def name(self) -> str:
        """Readable name with a hash of the settings that all trials of the cell share."""
        shared = self.recipe(MethodEntry("kaiming"), Point(1.0, 0))
        return f"{self.model.label}_{self.task.name}_r{self.rank}_{fingerprint(shared, self.task.forgetting)}"

    def recipe(self, entry: MethodEntry, point: Point) -> Recipe:
        """Return the recipe, as for `lorainit train`, of a method at a point."""
        suite, rank = self.suite, {"r": self.rank, "lora_alpha": 2 * self.rank}
        return Recipe(
            model=self.model.model,
            task=self.task.task,
            method=entry.name,
            method_options=entry.options,
            imports=suite.imports,
            base=entry.base,
            match_lr=point.matched,
            lora=LORA_DEFAULTS | rank | suite.lora | self.model.lora | {"r": self.rank} | entry.lora,
            data=self.task.data,
            calibration=suite.calibration,
            train=_QUIET | suite.train | self.model.train | self.task.train | {"learning_rate": point.rate},
            dtype=self.model.dtype,
            seed=point.seed,
            output="runs/bench",
        )

    @property
    def train(self) -> dict[str, Any]:
        """Return the fields of `transformers.TrainingArguments` that all trials of the cell share."""
        return self.recipe(MethodEntry("kaiming"), Point(1.0, 0)).train

    def evaluations(self) -> tuple[int, int]:
        """Return (steps from one evaluation to the next, steps in all), which ASHA has to know.

        Raises:
            LoraInitError: the suite does not say when trainings are evaluated and end.
        """
        every, steps = self.train.get("eval_steps"), self.train.get("max_steps")
        if self.train.get("eval_strategy") != "steps" or not isinstance(every, int) or not isinstance(steps, int):
            raise LoraInitError(
                "asha needs train.max_steps, train.eval_strategy: steps and train.eval_steps, whole numbers"
            )
        return every, steps


@dataclasses.dataclass(frozen=True)
class Trial:
    """A training run of a cell, or the diagnosis of one of its starts.

    Attributes:
        cell: name of the cell.
        label: name of the method's row.
        point: learning rate, seed, and what kind of run.
        recipe: what is carried out.
        forgetting: held-out text, if any.
        diagnosis: what to find out; None for a training run.
    """

    cell: str
    label: str
    point: Point
    recipe: Recipe
    forgetting: Forgetting | None = None
    diagnosis: DiagnosisOptions | None = None

    @property
    def key(self) -> str:
        """Readable name, relative to the folder of results, ending in a hash of all that decides the numbers."""
        kind = "diagnosis" if self.point.diagnosis else f"lr{self.point.rate:.3g}"
        matched = {False: "", True: "_matched", "curvature": "_bounded"}[self.point.matched]
        kind += matched + "_judged" * self.point.judged
        decisive = fingerprint(self.recipe, self.forgetting, self.diagnosis)
        return f"{self.cell}/{self.label}_{kind}_s{self.point.seed}_{decisive}"

    def tags(self) -> dict[str, Any]:
        """Return which trial of the suite a record is of."""
        return {
            "key": self.key,
            "cell": self.cell,
            "label": self.label,
            **self.point._asdict(),
            "command": command(self.recipe) if not self.point.diagnosis else None,
        }

    def record(self, status: Status) -> dict[str, Any]:
        """Return what every record of the trial says, however it ended."""
        recipe = self.recipe
        return {
            "method": recipe.method,
            "model": recipe.model,
            "task": recipe.task,
            "learning_rate": self.point.rate,
            "rank": recipe.lora["r"],
            "seed": self.point.seed,
            "status": status,
            "trial": self.tags(),
            "metrics": {},
            "recipe": dataclasses.asdict(recipe),
        }


def trial(cell: Cell, entry: MethodEntry, point: Point) -> Trial:
    """Return the trial of a method at a point of its cell."""
    diagnosis = dataclasses.replace(cell.suite.diagnosis or DiagnosisOptions(), reference_lr=1.0)
    return Trial(
        cell=cell.name,
        label=entry.label,
        point=point,
        recipe=cell.recipe(entry, point),
        forgetting=None if point.diagnosis else cell.task.forgetting,
        diagnosis=diagnosis if point.diagnosis else None,
    )


def cells(suite: Suite) -> list[Cell]:
    """Return the cells of a suite."""
    return [Cell(suite, model, task, rank) for model in suite.models for task in model.tasks for rank in suite.ranks]


def located(recipe: Recipe, root: str | None) -> Recipe:
    """Return the recipe with ``root:FOLDER`` replaced by a folder below the root.

    Raises:
        LoraInitError: there is such a path and no root.
    """
    data = located_data(recipe.data, root)
    return dataclasses.replace(recipe, model=_located(recipe.model, root), data=data)


def located_data(data: DataOptions, root: str | None) -> DataOptions:
    """Return the data options with ``root:FOLDER`` replaced.

    Raises:
        LoraInitError: there is such a path and no root.
    """
    return dataclasses.replace(data, path=None if data.path is None else _located(data.path, root))


def _located(path: str, root: str | None) -> str:
    if not path.startswith(_ROOT):
        return path
    if root is None:
        raise LoraInitError(f"'{path}' lies below a root: pass --root FOLDER")
    return f"{root.rstrip('/')}/{path.removeprefix(_ROOT)}"


def command(recipe: Recipe) -> str:
    """Return the ``lorainit train`` command that repeats a recipe."""
    options: list[str] = []
    for field, value in dataclasses.asdict(recipe).items():
        if field in ("output", "resume", "start") or value == DEFAULTS[field]:
            continue
        if not isinstance(value, dict):
            options += [f"--{field}", _argument(value)]
            continue
        usual: dict[str, Any] = {"lora": LORA_DEFAULTS, "train": TRAIN_DEFAULTS}.get(field) or DEFAULTS[field]
        for name, each in value.items():
            if name not in usual or usual[name] != each:
                options += [f"--{field}.{name}", _argument(each)]
    return shlex.join(["lorainit", "train", *options])


def _argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
