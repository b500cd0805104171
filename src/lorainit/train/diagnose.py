"""``lorainit diagnose``: the start of a recipe, on rows of its task."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from ..diagnostics.diagnose import diagnose
from ..diagnostics.diagnosis import Diagnosis
from ..diagnostics.learning_rate import LrAdvice, suggest_lr
from ..errors import LoraInitError
from ..tasks import get_task
from .recipe import Recipe
from .run import started

if TYPE_CHECKING:
    from datasets import Dataset


@dataclasses.dataclass(frozen=True)
class DiagnosisOptions:
    """What to find out.

    Attributes:
        batches: how many batches to use; they begin after the calibration rows of a data-driven start.
        batch_size: rows a batch.
        teacher: ``base``, or a folder with an adapter, to compare activation boundaries with.
        bootstrap: resamples for the intervals.
        curvature: find the top Hessian eigenvalue too.
        reference_lr: the learning rate that suits vanilla LoRA; the one that goes with this start is then told.
    """

    batches: int = 8
    batch_size: int = 16
    teacher: str = "base"
    bootstrap: int = 200
    curvature: bool = False
    reference_lr: float | None = None


def diagnose_recipe(recipe: Recipe, options: DiagnosisOptions) -> tuple[Diagnosis, LrAdvice | None]:
    """Carry out a recipe up to the start and diagnose it.

    Writes ``diagnosis.json``, ``index.html`` and one PNG a figure to the recipe's output folder.

    Raises:
        LoraInitError: anything wrong in the recipe or the options, or too few rows.
    """
    if options.batches < 1 or options.batch_size < 1:
        raise LoraInitError(f"batches and batch_size must be ≥ 1, got {options.batches} and {options.batch_size}")
    model, tokenizer, rows, used = started(recipe)
    unseen: Any = _unseen(rows, used, options)
    collator = get_task(recipe.task, **recipe.task_options).collator(tokenizer)
    data = DataLoader(unseen, batch_size=options.batch_size, collate_fn=collator)
    found = diagnose(
        model,
        data,
        teacher=options.teacher,
        max_batches=None,
        bootstrap=options.bootstrap,
        curvature=options.curvature,
        seed=recipe.seed,
    )
    advice = _advice(model, data, found, options, recipe.seed)
    _write(Path(recipe.output), found, advice, recipe)
    return found, advice


def _unseen(rows: Dataset, used: int, options: DiagnosisOptions) -> Dataset:
    """Return the rows to diagnose on: those after the ones that the start has seen."""
    last = min(used + options.batches * options.batch_size, len(rows))
    if used >= last:
        raise LoraInitError(f"the data have {len(rows)} rows, and the start takes {used} of them: none is left")
    return rows.select(range(used, last))


def _advice(model: Any, data: Any, found: Diagnosis, options: DiagnosisOptions, seed: int) -> LrAdvice | None:
    """Return the learning rate that goes with the start; None unless a reference is given."""
    if options.reference_lr is None:
        return None
    bounding = data if options.curvature else None
    sharpness = found.curvature[0] if found.curvature else None
    return suggest_lr(model, options.reference_lr, data=bounding, max_batches=None, sharpness=sharpness, seed=seed)


def _write(folder: Path, found: Diagnosis, advice: LrAdvice | None, recipe: Recipe) -> None:
    """Write the diagnosis as JSON, as a page and as figures."""
    folder.mkdir(parents=True, exist_ok=True)
    record = found.to_dict() | {"advice": advice.to_dict() if advice else None, "recipe": dataclasses.asdict(recipe)}
    (folder / "diagnosis.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    found.to_html(folder / "index.html")
    for name, figure in found.figures().items():
        figure.savefig(folder / f"{name}.png", dpi=150)
