"""The Trainer that batches and scores as a task says, and what is read from it: scores, losses by row, curves."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from ..errors import NonFiniteError
from ..tasks import Task

_CURVES = ("loss", "learning_rate", "grad_norm", "eval_loss", "eval_accuracy", "seconds")
_TIMING = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch")


class TaskTrainer(Trainer):
    """A `Trainer` that batches and scores as a task says, and stops at the first loss that is NaN or infinite.

    Args:
        task: collates, predicts and scores.
        processor: the task's tokenizer or image processor.
        packing: train on a batch's rows side by side in one row.
        options: of `Trainer`.
    """

    def __init__(self, task: Task, processor: Any, *, packing: bool = False, **options: Any) -> None:
        self.task, self.processor = task, processor
        self._losses: list[float] = []  # of each row at the last evaluation, if the rows have classes
        collator = (task.packed_collator if packing else task.collator)(processor)
        # without a metric of the task's own the loss is the metric, and no logits are kept
        metrics = None if type(task).metrics is Task.metrics else self._score
        super().__init__(data_collator=collator, compute_metrics=metrics, **options)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loss; name the step, and the input that is not finite, if it is not a number."""
        found = super().compute_loss(model, inputs, *args, **kwargs)
        loss = found[0] if isinstance(found, tuple) else found
        if not torch.isfinite(loss).all():
            broken = [
                k for k, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point() and not v.isfinite().all()
            ]
            cause = f"the batch's {broken} hold NaN or infinity" if broken else "the inputs are finite: lower the rate?"
            raise NonFiniteError(f"step {self.state.global_step}: the loss is {loss.item()}; {cause}")
        return found

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Return a batch's loss with the task's own predictions and labels, where it has any."""
        prepared = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            unwrapped = self.accelerator.unwrap_model(model)
            predicted = None if prediction_loss_only else self.task.predict(unwrapped, self.processor, prepared)
        if predicted is None:
            return super().prediction_step(model, prepared, prediction_loss_only, ignore_keys)
        loss, _, _ = super().prediction_step(model, prepared, True, ignore_keys)
        return loss, *predicted

    def scores(self) -> dict[str, float]:
        """Evaluate and return loss and metrics, without the Trainer's own timing."""
        found = {k.removeprefix("eval_"): v for k, v in self.evaluate().items()}
        return {k: v for k, v in found.items() if k not in _TIMING}

    def losses_by_row(self) -> list[float]:
        """Return the loss of each row at the last evaluation, in the order of the rows; none if they have no classes.

        The Trainer may group rows by length; runs with other seeds group otherwise, and comparisons pair the same row.
        None either where other processes have evaluated some of them.
        """
        batches: Any = self.get_eval_dataloader().batch_sampler
        order = [row for batch in batches for row in batch]
        if sorted(order) != list(range(len(self._losses))):
            return []
        return [loss for _, loss in sorted(zip(order, self._losses, strict=True))]

    def curves(self) -> dict[str, list[list[float]]]:
        """Return {quantity: [[step, value], ...]} from the log."""
        found: dict[str, list[list[float]]] = {}
        for entry in self.state.log_history:
            for key, value in entry.items():
                if key in _CURVES:
                    found.setdefault(key, []).append([entry["step"], value])
        return found

    def _score(self, prediction: Any) -> dict[str, float]:
        """Return the task's metrics and keep the loss of each row."""
        logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
        if logits.ndim == 2 and labels.ndim == 1 and not labels.is_floating_point():
            losses = torch.nn.functional.cross_entropy(logits.float(), labels.long(), reduction="none")
            self._losses = [round(loss, 4) for loss in losses.tolist()]
        return self.task.metrics(prediction.predictions, prediction.label_ids)


class Clock(TrainerCallback):
    """Notes in the Trainer's log how many seconds of training each entry comes after."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to count."""
        self._begin = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the time."""
        if state.log_history:
            state.log_history[-1]["seconds"] = time.perf_counter() - self._begin
