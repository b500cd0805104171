"""One run of a recipe: load, add LoRA, start, train with Transformers' Trainer, score, save plainly, write one JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import TrainerCallback, set_seed

from ..errors import LoraInitError
from ..machine import provenance
from ..machine.cost import Cost, measure
from ..machine.processes import Processes
from ..report import InitReport
from ..saving import checkpoint
from ..start.initialize import initialize
from ..tasks import fingerprint
from . import baselines
from .model import add_adapter, load_base, resolve_model
from .recipe import LORA_DEFAULTS, Plan, Recipe, check, check_resumable, check_startable
from .trainer import Clock, TaskTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def train(recipe: Recipe, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Carry out a recipe and return its result, which is also written to ``<output>/result.json``.

    Args:
        recipe: what to do.
        callbacks: more callbacks for the Trainer.

    Raises:
        LoraInitError: anything wrong in the recipe, before a step is taken where it can be known.
        NonFiniteError: the loss became NaN or infinite; the message says at which step.
    """
    plan = check(recipe)
    check_resumable(recipe)
    set_seed(recipe.seed)
    raw = plan.task.load_data(recipe.data, recipe.seed)
    base = load_base(recipe.model, plan.task, recipe.dtype)
    train_set, eval_set = (plan.encode(rows, base.processor) for rows in raw)
    model = add_adapter(base, plan, len(train_set))
    with measure() as start_cost:
        report = _start_or_load(model, plan, base.processor, train_set)
    trainer = _trainer(model, plan, base.processor, callbacks, train_dataset=train_set, eval_dataset=eval_set)
    with measure() as training_cost:
        trainer.train(resume_from_checkpoint=recipe.resume or None)
    metrics = trainer.scores()
    _save(model, recipe)
    result = _Finished(plan, raw, report, trainer, metrics, start_cost, training_cost).result()
    _write_result(Path(recipe.output) / "result.json", result)
    return result


def start(recipe: Recipe) -> InitReport:
    """Carry out a recipe up to the start and save the started adapter to ``<output>``, ready for training.

    The data are only read if the method needs them. The folder is a plain adapter that PEFT loads; `lorainit.load` and
    the recipe field ``start`` train it from there.

    Raises:
        LoraInitError: anything wrong in the recipe.
    """
    plan = check(recipe)
    check_startable(recipe)
    if recipe.base == "subtract":
        raise LoraInitError("base='subtract' edits the base weights, which an adapter folder cannot hold")
    set_seed(recipe.seed)
    base = load_base(recipe.model, plan.task, recipe.dtype)
    rows = _calibration_rows(plan, base.processor)
    model = add_adapter(base, plan)
    report = _initialize(model, plan, base.processor, rows)
    model.save_pretrained(recipe.output)
    return report


def started(recipe: Recipe) -> tuple[PeftModel, PreTrainedTokenizerBase, Dataset, int]:
    """Carry out a recipe up to the start.

    Returns:
        The model, its tokenizer, the encoded training rows, and how many of them, from the first, the start has seen.

    Raises:
        LoraInitError: anything wrong in the recipe.
    """
    plan = check(recipe)
    check_startable(recipe)
    set_seed(recipe.seed)
    base = load_base(recipe.model, plan.task, recipe.dtype)
    rows = plan.encode(plan.task.load_data(recipe.data, recipe.seed)[0], base.processor)
    model = add_adapter(base, plan)
    if recipe.start is not None:
        checkpoint.load(model, recipe.start)
        return model, base.processor, rows, 0
    seen = _calibration_rows(plan, base.processor, rows)
    _initialize(model, plan, base.processor, seen)
    of_training = recipe.calibration.split is None and recipe.calibration.file is None
    return model, base.processor, rows, len(seen) if seen is not None and of_training else 0


def _start_or_load(model: Any, plan: Plan, processor: Any, train_set: Dataset) -> InitReport | None:
    """Give the adapter its start, as computed or from a folder; None where what is trained has no start."""
    if plan.recipe.start is not None:
        return checkpoint.load(model, plan.recipe.start)
    if plan.recipe.adapter != "lora":
        return None
    return _initialize(model, plan, processor, _calibration_rows(plan, processor, train_set))


def _calibration_rows(plan: Plan, processor: Any, train_set: Dataset | None = None) -> Dataset | None:
    """Return the encoded rows that a data-driven start, or the curvature, sees; None where neither is wanted.

    Args:
        plan: the checked recipe.
        processor: tokenizer or image processor.
        train_set: the encoded training rows, if they have been loaded.
    """
    recipe, wanted = plan.recipe, plan.recipe.calibration
    if not (plan.method.wants_data or recipe.match_lr == "curvature"):
        return None
    if wanted.split is not None or wanted.file is not None:
        rows = plan.encode(plan.task.load_rows(recipe.data, split=wanted.split, file=wanted.file), processor)
    elif train_set is not None:
        rows = train_set
    else:
        rows = plan.encode(plan.task.load_data(recipe.data, recipe.seed)[0], processor)
    return rows.select(range(min(wanted.samples, len(rows))))


def _initialize(model: PeftModel, plan: Plan, processor: Any, rows: Dataset | None) -> InitReport:
    """Start the adapter, on the calibration rows if there are any: each process on its own share of them."""
    recipe, data = plan.recipe, None
    if rows is not None:
        processes = Processes("default")
        share: Any = rows.select(range(processes.rank, len(rows), processes.size))
        data = DataLoader(share, batch_size=recipe.calibration.batch_size, collate_fn=plan.task.collator(processor))
    return initialize(
        model,
        plan.method,
        data=data,
        seed=recipe.seed,
        base=recipe.base,  # pyright: ignore[reportArgumentType]
        match_lr=recipe.match_lr,
        memory_budget=recipe.calibration.memory_budget,
        ranks=recipe.ranks,
    )


def _trainer(
    model: Any, plan: Plan, processor: Any, callbacks: Sequence[TrainerCallback], **datasets: Dataset
) -> TaskTrainer:
    """Return the trainer, with the callback and the optimizer that the recipe's baseline needs."""
    recipe, ratio = plan.recipe, plan.recipe.lora_plus
    return TaskTrainer(
        plan.task,
        processor,
        packing=recipe.data.packing,
        model=model,
        args=plan.arguments,
        callbacks=[Clock(), *([baselines.AllocateRanks(model)] if recipe.adapter == "adalora" else []), *callbacks],
        optimizers=(baselines.lora_plus_optimizer(model, plan.arguments, ratio) if ratio else None, None),
        **datasets,
    )


def _save(model: Any, recipe: Recipe) -> None:
    """Save what was trained below ``<output>``: a plain LoRA, PEFT's AdaLoRA, or the whole model."""
    output = Path(recipe.output)
    if recipe.adapter == "lora":
        checkpoint.save_pretrained(model, output / "adapter")
    else:
        model.save_pretrained(str(output / ("adapter" if recipe.adapter == "adalora" else "model")))


@dataclasses.dataclass(frozen=True)
class _Finished:
    """A run that is over: all that its result tells of."""

    plan: Plan
    raw: tuple[Dataset, Dataset]
    report: InitReport | None
    trainer: TaskTrainer
    metrics: dict[str, float]
    start_cost: Cost
    training_cost: Cost

    def result(self) -> dict[str, Any]:
        """Return the result as plain JSON types."""
        recipe, report = self.plan.recipe, self.report
        return {
            "method": report.method if report else {"adalora": "adalora", "none": "full"}[recipe.adapter],
            "model": recipe.model,
            "task": self.plan.task.name,
            "learning_rate": self.plan.arguments.learning_rate,
            "rank": None if recipe.adapter == "none" else (LORA_DEFAULTS | recipe.lora)["r"],
            "seed": recipe.seed,
            "metrics": self.metrics,
            "items": self.trainer.losses_by_row(),
            "init": report.to_dict() if report else {},
            "curves": self.trainer.curves(),
            "cost": {"start": dataclasses.asdict(self.start_cost), "training": dataclasses.asdict(self.training_cost)},
            "recipe": dataclasses.asdict(recipe),
            "provenance": provenance.collect(
                model=provenance.hash_weights(resolve_model(recipe.model)),
                train_data=fingerprint(self.raw[0]),
                eval_data=fingerprint(self.raw[1]),
            ),
        }


def _write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, one line a top-level key: long lists stay readable in a diff."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in result.items())
    path.write_text(f"{{\n{lines}\n}}\n")
