"""What a recipe says: its fields, their defaults, and the checks that need no model."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..errors import LoraInitError
from ..methods import Method, get_method, import_modules
from ..start.budget import RankRule
from ..tasks import DataOptions, Task, get_task

if TYPE_CHECKING:
    from datasets import Dataset

Adapter = Literal["lora", "adalora", "none"]

LORA_DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
TRAIN_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.0,
    "logging_steps": 10,
    "logging_first_step": True,
    "logging_nan_inf_filter": False,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
    "remove_unused_columns": False,  # `encode` leaves none; images are made from a column that the model lacks
}
# transformers 5 reads a fraction in warmup_steps; before, it was warmup_ratio
TRAIN_DEFAULTS["warmup_ratio" if hasattr(TrainingArguments, "warmup_ratio") else "warmup_steps"] = 0.03


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Which rows a data-driven start sees: the first of a set, unshuffled.

    Attributes:
        split: name of the split to take; default: the rows that are trained on.
        file: parquet file to take instead, in the task's columns; for a method without gradients it needs no labels.
        samples: number of rows.
        batch_size: rows a batch; it does not change the start.
        memory_budget: memory that the statistics may take at a time, e.g. ``4GiB``; default: all at once.
    """

    split: str | None = None
    file: str | None = None
    samples: int = 256
    batch_size: int = 8
    memory_budget: str | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides a run.

    Attributes:
        model: hub name, local folder, or ``package:NAME/FOLDER`` for weights that a Python package carries.
        task: name of the task (see `lorainit.tasks`).
        task_options: fields of the task to change, e.g. ``{scoring: generation}``.
        method: how the adapter starts.
        method_options: the method's options, e.g. ``{exact: true}``.
        imports: Python modules to import first: those that register methods (`lorainit.register`); the current folder
            is searched too.
        base: what to do about BA ≠ 0, as in `lorainit.initialize`.
        ranks: how the layers get their ranks, as in `lorainit.initialize`.
        match_lr: re-scale the start so that vanilla LoRA's learning rate suits it, as in `lorainit.initialize`.
        start: folder made by ``lorainit init`` to take the start from, instead of computing it.
        lora: fields of `peft.LoraConfig` (default r 8, lora_alpha 16, all linear layers).
        adapter: what is trained: ``"lora"``, ``"adalora"`` (``lora`` then holds fields of `peft.AdaLoraConfig`), or
            ``"none"``, which is all weights of the model.
        lora_plus: learning rate of B relative to A's (LoRA+); default: the same.
        data: which rows are used.
        calibration: which rows a data-driven start sees.
        train: fields of `transformers.TrainingArguments`.
        dtype: of the base weights.
        seed: of the head, the data order, dropout and the start.
        output: folder for ``result.json``, the adapter and the Trainer's checkpoints.
        resume: continue from the last Trainer checkpoint in ``output``.
    """

    model: str
    task: str
    task_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    method: str = "kaiming"
    method_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    imports: str | list[str] = dataclasses.field(default_factory=list)
    base: str = "auto"
    ranks: RankRule = dataclasses.field(default_factory=lambda: RankRule("fixed"))
    match_lr: bool | Literal["curvature"] = False
    start: str | None = None
    lora: dict[str, Any] = dataclasses.field(default_factory=dict)
    adapter: Adapter = "lora"
    lora_plus: float | None = None
    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    seed: int = 0
    output: str = "runs/latest"
    resume: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked recipe, with what its names stand for.

    Attributes:
        recipe: what was checked.
        task: of ``recipe.task``.
        method: of ``recipe.method``.
        arguments: of ``recipe.train``.
    """

    recipe: Recipe
    task: Task
    method: Method
    arguments: TrainingArguments

    def encode(self, rows: Dataset, processor: Any) -> Dataset:
        """Turn the task's rows into model inputs."""
        return self.task.encode(rows, processor, self.recipe.data.max_length)


def check(recipe: Recipe) -> Plan:
    """Check a recipe before anything is loaded, and look up what its names stand for.

    Raises:
        LoraInitError: an unknown name or option, or fields that do not go together.
    """
    task = get_task(recipe.task, **recipe.task_options)
    import_modules(recipe.imports)
    method = get_method(recipe.method, **recipe.method_options)
    _check_adapter(recipe)
    _check_calibration(recipe.calibration)
    return Plan(recipe, task, method, _training_arguments(recipe))


def check_resumable(recipe: Recipe) -> None:
    """Raise LoraInitError if a recipe is to be resumed and its output folder holds no checkpoint."""
    output = Path(recipe.output)
    if recipe.resume and not (output.is_dir() and get_last_checkpoint(str(output))):
        raise LoraInitError(f"resume: there is no checkpoint in {output} to continue from")


def check_startable(recipe: Recipe) -> None:
    """Raise LoraInitError if what a recipe trains has no LoRA to start."""
    if recipe.adapter != "lora":
        raise LoraInitError(f"adapter='{recipe.adapter}' has no start: only a LoRA has one")


def _check_adapter(recipe: Recipe) -> None:
    adapter, ratio = recipe.adapter, recipe.lora_plus
    if adapter not in get_args(Adapter):
        raise LoraInitError(f"adapter='{adapter}' is not one of {list(get_args(Adapter))}")
    if adapter != "lora" and recipe.method != "kaiming":
        raise LoraInitError(f"adapter='{adapter}' has no LoRA that method '{recipe.method}' could start")
    if adapter != "lora" and recipe.resume:
        raise LoraInitError(f"adapter='{adapter}' cannot be resumed: its checkpoints do not hold all of its state")
    if ratio is not None and adapter != "lora":
        raise LoraInitError(f"lora_plus gives B of a LoRA a rate of its own; adapter='{adapter}' has none")
    if ratio is not None and not (0 < ratio < math.inf):
        raise LoraInitError(f"lora_plus must be positive, got {ratio}")


def _check_calibration(calibration: Calibration) -> None:
    if calibration.split is not None and calibration.file is not None:
        raise LoraInitError("calibration: split and file exclude each other")


def _training_arguments(recipe: Recipe) -> TrainingArguments:
    fields: dict[str, Any] = TRAIN_DEFAULTS | recipe.train
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise LoraInitError(f"train: {unknown} are no fields of transformers.TrainingArguments")
    if fields.get("resume_from_checkpoint"):  # the Trainer does not read it: the training would begin anew
        raise LoraInitError("train: resume_from_checkpoint: a recipe says `resume: true`, at the command line --resume")
    if fields.get("bf16") and not torch.accelerator.is_available():
        fields.setdefault("use_cpu", True)  # without it Transformers takes mixed precision for a GPU's alone
    try:
        return TrainingArguments(output_dir=str(Path(recipe.output)), seed=recipe.seed, **fields)
    except (TypeError, ValueError) as error:
        raise LoraInitError(f"train: {error}") from error
