"""Describes a suite: methods × models × tasks × learning rates × ranks × seeds, read from a YAML file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from ..errors import LoraInitError
from ..grids.parsing import parse
from ..tasks import DataOptions
from ..train.diagnose import DiagnosisOptions
from ..train.recipe import Calibration

VANILLA = "kaiming"


@dataclasses.dataclass(frozen=True)
class MethodEntry:
    """A row of the table.

    Attributes:
        label: name of the row.
        method: name of the method; default: the label.
        options: the method's options.
        base: what to do about BA ≠ 0, as in `lorainit.initialize`.
        lora: fields of `peft.LoraConfig` that are part of the method (``use_rslora: true``).
        center: where its best learning rate is expected, in powers of 2 relative to vanilla's; a wrong guess only costs
            trials.
    """

    label: str
    method: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    base: str = "auto"
    lora: dict[str, Any] = dataclasses.field(default_factory=dict)
    center: int = 0

    @property
    def name(self) -> str:
        """Name of the method."""
        return self.method or self.label


# Added to every suite: without them a comparison shows that something changed, not what helped.
CONTROLS = (
    MethodEntry(VANILLA),
    MethodEntry("rslora", method=VANILLA, lora={"use_rslora": True}, center=-1),
    MethodEntry("init-ab"),
    MethodEntry("random", center=-2),
)


@dataclasses.dataclass(frozen=True)
class Forgetting:
    """Held-out text like that of the pre-training, whose loss is measured before and after.

    Attributes:
        task: a task with a causal language model.
        data: which rows, of the evaluation split.
    """

    task: str = "text"
    data: DataOptions = dataclasses.field(default_factory=DataOptions)


@dataclasses.dataclass(frozen=True)
class Search:
    """How each method's learning rate is found: all methods share the points unit·2^k.

    Attributes:
        schedule: ``bracket`` (three rates ``stride`` apart with the first seed, widened while the best is at an edge,
            refined around it), ``grid`` (every exponent with every seed, widened likewise) or ``asha`` (every exponent
            with the first seed, where Ray Tune's ASHA stops the worse ones early).
        unit: the rate at exponent 0.
        exponents: of ``grid`` and ``asha``, relative to where the method's best is expected.
        stride: of ``bracket``: exponents between its first rates.
        widest: how many exponents the search may go away from where the best is expected.
        grace: of ``asha``: evaluations before a trial may be stopped; fewer than a whole training has.
        reduction: of ``asha``: one trial in this many goes on, at least 2.
        finalists: how many rates, the best of the search, run with every final seed; the best mean is the tuned rate.
        final_seeds: of the finalists; default: the suite's.
        compare_seeds: seeds of the runs that the suite's ``compare`` adds: some of the final seeds, with whose runs
            they are paired; default: all of them.
    """

    schedule: Literal["bracket", "grid", "asha"] = "bracket"
    unit: float = 1e-3
    exponents: list[int] = dataclasses.field(default_factory=lambda: [-4, -2, 0, 2, 4])
    stride: int = 2
    widest: int = 8
    grace: int = 1
    reduction: float = 3.0
    finalists: int = 2
    final_seeds: list[int] | None = None
    compare_seeds: list[int] | None = None


@dataclasses.dataclass(frozen=True)
class TaskEntry:
    """A task that a model is adapted to.

    Attributes:
        task: its name.
        label: name of its table; default: the task's name.
        data: which rows; a path ``root:FOLDER`` lies below the root that the command names.
        train: fields of `transformers.TrainingArguments` that differ from the suite's.
        center: where vanilla's best rate is expected, in powers of 2 times the search's unit.
        metric: the metric to show beside the loss; default: the first that the task has.
        forgetting: held-out text, to measure what is forgotten.
        search: how its learning rates are found; default: as the suite says.
    """

    task: str
    label: str | None = None
    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    center: int = 0
    metric: str | None = None
    forgetting: Forgetting | None = None
    search: Search | None = None

    @property
    def name(self) -> str:
        """Name of its table."""
        return self.label or self.task


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """A base model and the tasks it is adapted to.

    Attributes:
        label: its name.
        model: hub name, folder, ``package:NAME/FOLDER``, or ``root:FOLDER``.
        tasks: the tasks.
        dtype: of the base weights.
        lora: fields of `peft.LoraConfig` that differ from the suite's.
        train: fields of `transformers.TrainingArguments` that differ from the suite's.
    """

    label: str
    model: str
    tasks: list[TaskEntry]
    dtype: str = "float32"
    lora: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one trial may use; as many trials run at once as the machines have room for.

    Attributes:
        cpus: cores a trial.
        gpus: accelerators a trial; a fraction lets trials share one.
        memory_gb: memory a trial, as Ray reserves it; default: not reserved.
        workers: how many trials may run at a time; default: as many as there is room for.
        attempts: how often a trial is tried if its worker dies (killed, out of memory).
    """

    cpus: float = 1
    gpus: float = 0
    memory_gb: float | None = None
    workers: int | None = None
    attempts: int = 3


Comparison = Literal["vanilla", "suggested", "matched", "bounded"]


@dataclasses.dataclass(frozen=True)
class Suite:
    """A benchmark.

    Attributes:
        name: its name.
        methods: names, or entries with options; the controls (vanilla, rsLoRA, Init[AB], magnitude-matched random) are
            added where they are missing.
        models: the models, each with its tasks.
        ranks: the ranks.
        seeds: the seeds; the first one searches.
        search: how learning rates are found.
        compare: beside its tuned rate, each method runs at ``vanilla``'s tuned rate, at the rate that `suggest_lr`
            derives from it (``suggested``), at it with ``match_lr`` (``matched``), and with ``match_lr="curvature"``
            (``bounded``), which is the same run where the diagnosis says that the curvature does not decide.
        lora: fields of `peft.LoraConfig`; ``lora_alpha`` is 2·rank unless it is given.
        train: fields of `transformers.TrainingArguments`.
        calibration: which rows a data-driven start sees.
        diagnosis: what `diagnose` finds out about each start; null for nothing, and then no ``suggested`` rate.
        resources: of one trial.
        imports: Python modules to import first, as in a recipe.
    """

    name: str
    methods: list[str | MethodEntry]
    models: list[ModelEntry]
    ranks: list[int] = dataclasses.field(default_factory=lambda: [8])
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2])
    search: Search = dataclasses.field(default_factory=Search)
    compare: list[Comparison] = dataclasses.field(default_factory=lambda: ["vanilla", "suggested", "matched"])
    lora: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    diagnosis: DiagnosisOptions | None = dataclasses.field(default_factory=DiagnosisOptions)
    resources: Resources = dataclasses.field(default_factory=Resources)
    imports: str | list[str] = dataclasses.field(default_factory=list)

    def entries(self) -> list[MethodEntry]:
        """Return the rows of the table: the controls first, then the others in the file's order."""
        given = [MethodEntry(entry) if isinstance(entry, str) else entry for entry in self.methods]
        by_label = {entry.label: entry for entry in given}
        controls = [by_label.get(control.label, control) for control in CONTROLS]
        return [*controls, *(entry for entry in given if entry.label not in {c.label for c in CONTROLS})]

    def searches(self) -> dict[str, Search]:
        """Return the options of the search, the suite's and those of its tasks, by their place in the file."""
        tasks = {f"models: {m.label}: tasks: {task.name}: search": task.search for m in self.models for task in m.tasks}
        return {"search": self.search} | {where: search for where, search in tasks.items() if search is not None}


def read(file: str | Path) -> Suite:
    """Read a suite, without checking that its methods, tasks and modules are there.

    Raises:
        LoraInitError: no such file, or it is no suite.
    """
    if not Path(file).is_file():
        raise LoraInitError(f"there is no suite {file}")
    try:
        text = Path(file).read_text()
    except UnicodeDecodeError as error:
        raise LoraInitError(f"suite {file}: {error}") from error
    return parse(Suite, text, f"suite {file}")
