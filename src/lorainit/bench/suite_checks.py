"""Checks a suite before a trial runs, so that no mistake in it makes every trial fail."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig
from transformers import TrainingArguments

from ..errors import LoraInitError
from ..methods import get_method, import_modules
from ..tasks import Task, get_task
from ..train.model import resolve_model
from .search import Point
from .suite import Search, Suite, TaskEntry, read
from .trial import cells, located, located_data

# Results lie in folders named after models, tasks and methods.
_LABEL = r"[^/\\.][^/\\]*"
# A suite sets these elsewhere, or must not set them.
_NOT_TRAIN = {"output_dir", "seed", "learning_rate", "resume_from_checkpoint"}
_TRAIN = {field.name for field in dataclasses.fields(TrainingArguments) if field.init} - _NOT_TRAIN
_LORA = {field.name for field in dataclasses.fields(LoraConfig) if field.init} - {"task_type"}


def load(file: str | Path) -> Suite:
    """Read a suite and check all of it that needs no other file.

    Raises:
        LoraInitError: no such file; an unknown field, method, task, module or metric; an empty grid; a label or a seed
            given twice; seeds or numbers that contradict each other.
    """
    suite = read(file)
    with _within(f"suite {file}"):
        check(suite)
    return suite


def check(suite: Suite) -> None:
    """Check a suite, but not its folders and hub names.

    Raises:
        LoraInitError: what is wrong, and where.
    """
    import_modules(suite.imports)
    _check_lists(suite)
    _check_numbers(suite)
    for where, search in suite.searches().items():
        with _within(where):
            _check_search(search, suite.seeds)
    _check_fields(suite)
    for entry in suite.entries():
        with _within(f"methods: {entry.label}"):
            get_method(entry.name, **entry.options)
    for where, task in _tasks(suite):
        with _within(where):
            _check_task(task)
    _check_asha(suite)


def check_folders(suite: Suite, root: str | None) -> None:
    """Check that the folders that a suite names are on this machine.

    ``owner/name`` may be a model of the hub, and is only checked when it is loaded. Any other model is a folder, or
    ``package:NAME/FOLDER``.

    Args:
        suite: the suite.
        root: folder that paths ``root:FOLDER`` lie below.

    Raises:
        LoraInitError: there is no such folder or package, or a path below a root and no root.
    """
    for cell in cells(suite):
        with _within(f"models: {cell.model.label}"):
            recipe = located(cell.recipe(suite.entries()[0], Point(1.0, 0)), root)
            name = resolve_model(recipe.model)
            if recipe.model != cell.model.model or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
                _check_folder(name)
            with _within(f"tasks: {cell.task.name}"):
                _check_folder(recipe.data.path)
                if cell.task.forgetting is not None:
                    _check_folder(located_data(cell.task.forgetting.data, root).path)


def _check_folder(path: str | None) -> None:
    if path is not None and not Path(path).is_dir():
        raise LoraInitError(f"there is no folder {path}")


def _tasks(suite: Suite) -> Iterator[tuple[str, TaskEntry]]:
    """Yield the tasks, each with its place in the file."""
    for model in suite.models:
        for task in model.tasks:
            yield f"models: {model.label}: tasks: {task.name}", task


def _check_lists(suite: Suite) -> None:
    """Raise on a list that is empty, that has an entry twice, or whose labels cannot be names of folders."""
    lists = _nonempty_lists(suite)
    for where, values in lists.items():
        if not values:
            raise LoraInitError(f"{where} is empty: there is nothing to run")
    # these may be empty: only the controls run, and nothing is compared
    lists["methods"] = [entry if isinstance(entry, str) else entry.label for entry in suite.methods]
    lists |= {f"{where}.compare_seeds": search.compare_seeds or [] for where, search in suite.searches().items()}
    for where, values in lists.items():
        _check_labels(where, values)
        twice = sorted({str(value) for value in values if values.count(value) > 1})
        if twice:
            advice = "; give entries a label of their own" if isinstance(values[0], str) else ""
            raise LoraInitError(f"{where}: {', '.join(twice)} stands there twice{advice}")


def _nonempty_lists(suite: Suite) -> dict[str, list[Any]]:
    """Return the lists that must not be empty, by their place in the file."""
    lists: dict[str, list[Any]] = {
        "models": [model.label for model in suite.models],
        "ranks": suite.ranks,
        "seeds": suite.seeds,
    }
    lists |= {f"models: {m.label}: tasks": [task.name for task in m.tasks] for m in suite.models}
    for where, search in suite.searches().items():
        if search.schedule != "bracket":
            lists[f"{where}.exponents"] = search.exponents
        if search.final_seeds is not None:
            lists[f"{where}.final_seeds"] = search.final_seeds
    return lists


def _check_labels(where: str, values: list[Any]) -> None:
    """Raise on a label that cannot be the name of a folder."""
    wrong = [value for value in values if isinstance(value, str) and not re.fullmatch(_LABEL, value)]
    if wrong:
        raise LoraInitError(
            f"{where}: label '{wrong[0]}' cannot be a folder's name; give it one without / and \\ that begins with "
            "no dot"
        )


def _check_numbers(suite: Suite) -> None:
    """Raise on numbers out of range, and on comparisons without the diagnosis that they need."""
    resources = suite.resources
    if min(suite.ranks) < 1:
        raise LoraInitError(f"ranks: {min(suite.ranks)} is below 1")
    if "suggested" in suite.compare and suite.diagnosis is None:
        raise LoraInitError("compare: 'suggested' needs the diagnosis, which is switched off")
    if "bounded" in suite.compare and not (suite.diagnosis and suite.diagnosis.curvature):
        raise LoraInitError("compare: 'bounded' needs the diagnosis with curvature: true")
    if resources.attempts < 1 or (resources.workers is not None and resources.workers < 1):
        raise LoraInitError("resources: attempts and workers must be at least 1")


def _check_search(search: Search, seeds: list[int]) -> None:
    """Raise on numbers out of range, and on seeds of comparisons that have no partner."""
    if not (search.unit > 0 and math.isfinite(search.unit)):
        raise LoraInitError(f"unit: {search.unit:g} is no positive number")
    for name, least in {"stride": 1, "widest": 1, "finalists": 1, "grace": 1, "reduction": 2}.items():
        if not getattr(search, name) >= least:
            raise LoraInitError(f"{name}: {getattr(search, name):g} is below {least}")
    final = seeds if search.final_seeds is None else search.final_seeds
    alone = sorted(set(search.compare_seeds or []) - set(final))
    if alone:
        raise LoraInitError(
            f"compare_seeds: {alone} are not among the seeds at the tuned rate, {final}: runs are paired by seed, and "
            "these have no partner"
        )


def _check_asha(suite: Suite) -> None:
    """Raise where ASHA does not know when trainings are evaluated, or could not stop any."""
    for cell in cells(suite):
        if cell.search.schedule == "asha":
            with _within(f"models: {cell.model.label}: tasks: {cell.task.name}"):
                every, steps = cell.evaluations()
                if cell.search.grace * every >= steps:
                    raise LoraInitError(
                        f"search.grace: {cell.search.grace} × {every} steps are no less than max_steps, {steps}: asha "
                        "could stop no trial"
                    )


def _check_fields(suite: Suite) -> None:
    """Raise on fields that the libraries do not know, or that a suite sets elsewhere."""
    given = {"train": suite.train}
    given |= {f"models: {model.label}: train": model.train for model in suite.models}
    given |= {f"{where}: train": task.train for where, task in _tasks(suite)}
    for where, fields in given.items():
        _check_names(where, fields, _TRAIN, "transformers.TrainingArguments")
    given = {"lora": suite.lora}
    given |= {f"models: {model.label}: lora": model.lora for model in suite.models}
    for where, fields in given.items():
        if "r" in fields:
            raise LoraInitError(f"{where}: a suite's ranks stand in `ranks`, not in r")
    given |= {f"methods: {entry.label}: lora": entry.lora for entry in suite.entries()}
    for where, fields in given.items():
        _check_names(where, fields, _LORA, "peft.LoraConfig")


def _check_names(where: str, fields: dict[str, Any], known: set[str], owner: str) -> None:
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean '{near[0]}'?" if near else ""
            raise LoraInitError(f"{where}: '{name}' is no field of {owner} that can be set here{meant}")


def _check_task(entry: TaskEntry) -> None:
    """Raise on an unknown task or metric, and where forgetting cannot be measured."""
    task = get_task(entry.task)
    if entry.metric is not None and entry.metric not in (known := _metrics(task)):
        choice = f"its metrics: {known}" if known else "it has none beside the loss; leave metric out"
        raise LoraInitError(f"task '{task.name}' has no metric '{entry.metric}'; {choice}")
    if entry.forgetting is not None:
        kinds = {task.task_type, get_task(entry.forgetting.task).task_type}
        if kinds != {"CAUSAL_LM"}:
            raise LoraInitError("forgetting is measured on a causal language model only")


def _metrics(task: Task) -> list[str]:
    """Return the names of a task's metrics: those that it computes for two made-up rows."""
    outputs = min(getattr(task, "num_labels", 2), 2)
    return list(task.metrics(np.eye(2, outputs), np.array([0, 1])))


@contextlib.contextmanager
def _within(where: str) -> Iterator[None]:
    """Add the place in the file to an error."""
    try:
        yield
    except LoraInitError as error:
        raise LoraInitError(f"{where}: {error}") from error
