"""One trial: everything that decides its numbers, and the name that follows from it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shlex
from typing import Any

from ..errors import LoraInitError
from ..tasks import DataOptions
from ..train.diagnose import DiagnosisOptions
from ..train.recipe import LORA_DEFAULTS, TRAIN_DEFAULTS, Recipe
from .results import Status
from .search import Point
from .suite import Forgetting, MethodEntry, ModelEntry, Search, Suite, TaskEntry

_QUIET = {"disable_tqdm": True, "log_level": "error"}
_ROOT = "root:"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table: a model on a task at a rank.

    Attributes:
        suite: what it belongs to.
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
        """Readable, with a hash of the settings that all of its trials share: other settings are another cell."""
        shared = _decisive(self.recipe(MethodEntry("kaiming"), Point(1.0, 0)))
        forgetting = dataclasses.asdict(self.task.forgetting) if self.task.forgetting else None
        return f"{self.model.label}_{self.task.name}_r{self.rank}_{_hash([shared, forgetting])}"

    def recipe(self, entry: MethodEntry, point: Point) -> Recipe:
        """Return what `lorainit train` carries out."""
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
        """Return (steps from one evaluation to the next, steps in all), which `asha` has to know.

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
    """A run of the table, or the diagnosis of one of its starts.

    Attributes:
        cell: name of the cell.
        label: the method's row.
        point: rate, seed, and what kind of run.
        recipe: what is carried out.
        forgetting: held-out text, if any.
        diagnosis: what to find out, for the diagnosis of a start.
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
        others = [None if part is None else dataclasses.asdict(part) for part in (self.forgetting, self.diagnosis)]
        kind = "diagnosis" if self.point.diagnosis else f"lr{self.point.rate:.3g}"
        matched = {False: "", True: "_matched", "curvature": "_bounded"}[self.point.matched]
        more = matched + "_judged" * self.point.judged
        return f"{self.cell}/{self.label}_{kind}{more}_s{self.point.seed}_{_hash([_decisive(self.recipe), *others])}"

    def tags(self) -> dict[str, Any]:
        """Return what the record says about its place in the benchmark."""
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
    suite = cell.suite
    return Trial(
        cell=cell.name,
        label=entry.label,
        point=point,
        recipe=cell.recipe(entry, point),
        forgetting=None if point.diagnosis else cell.task.forgetting,
        diagnosis=dataclasses.replace(suite.diagnosis or DiagnosisOptions(), reference_lr=1.0)
        if point.diagnosis
        else None,
    )


def cells(suite: Suite) -> list[Cell]:
    """Return the tables of a suite."""
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
    standard = dataclasses.asdict(Recipe(model="", task=""))
    given = dataclasses.asdict(recipe)
    options: list[str] = []
    for field, value in given.items():
        if field in ("output", "resume", "start") or value == standard[field]:
            continue
        if not isinstance(value, dict):
            options += [f"--{field}", _spelled(value)]
            continue
        usual: dict[str, Any] = {"lora": LORA_DEFAULTS, "train": TRAIN_DEFAULTS}.get(field) or standard[field]
        for name, each in value.items():
            if name not in usual or usual[name] != each:
                options += [f"--{field}.{name}", _spelled(each)]
    return shlex.join(["lorainit", "train", *options])


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _decisive(recipe: Recipe) -> dict[str, Any]:
    """Return the fields that decide the numbers: not where a method's code lies, as little as what the code is."""
    return {name: value for name, value in dataclasses.asdict(recipe).items() if name != "imports"}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:10]
