"""Scores a base model, with or without a saved adapter, on a task."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import TrainingArguments

from ..saving import checkpoint
from ..tasks import DataOptions, get_task
from .model import load_base
from .trainer import TaskTrainer


def evaluate(
    model: str,
    task: str,
    adapter: str | None = None,
    data: DataOptions | None = None,
    batch_size: int = 64,
    task_options: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Score a base model, or a base model with a saved adapter, on a task's evaluation split.

    Args:
        model: hub name, local folder or ``package:NAME/FOLDER`` of the base.
        task: name of the task.
        adapter: adapter folder; it is loaded by PEFT alone.
        data: which rows are used.
        batch_size: rows a batch.
        task_options: fields of the task to change, e.g. ``{scoring: generation}``.

    Returns:
        The task's metrics and the loss.
    """
    chosen, data = get_task(task, **(task_options or {})), data or DataOptions()
    _, rows = chosen.load_data(data, seed=0)
    network, processor, _ = load_base(model, chosen, "float32")
    if adapter is not None:
        checkpoint.read_adapter(adapter)  # one clear line for a folder that is no adapter
        network = PeftModel.from_pretrained(network, adapter)
    arguments = TrainingArguments(
        output_dir="runs/evaluate",
        per_device_eval_batch_size=batch_size,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
    )
    encoded = chosen.encode(rows, processor, data.max_length)
    return TaskTrainer(chosen, processor, model=network, args=arguments, eval_dataset=encoded).scores()
