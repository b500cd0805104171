"""Starts the adapters inside a Trainer, from its own data and loss, before its first step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapter.offset import trained_factor
from ..adapter.sites import find_sites
from ..errors import LoraInitError
from ..machine.processes import unwrapped
from ..methods import Method, get_method
from ..report import InitReport
from ..saving import checkpoint
from ..saving.folder import PROVENANCE_NAME
from .initialize import initialize


class StartCallback(TrainerCallback):
    """Starts the adapters of a `transformers.Trainer`, or of a trainer built on it, when its training begins.

    The batches and the loss are the trainer's own: its data set, collator and ``compute_loss``. The start is the same
    as `lorainit.initialize` gives with ``data=trainer``. Its scalars go to the trainer's log under ``lorainit/…``, its
    table to TensorBoard where that is in use; ``report`` holds it. A run that is resumed from a checkpoint goes on with
    the adapter of the checkpoint, and nothing is started again. Pass the callback to the trainer when that is made
    (``callbacks=[...]``): added later, it cannot resume.

    Args:
        method: a name (see `lorainit.available`) or a method object.
        options: of `lorainit.initialize`: ``max_batches``, ``base``, ``match_lr``, ``seed``, ... ``data`` too, where it
            is not to be the trainer's. ``ranks`` stay fixed: the optimizer exists by then.

    Raises:
        LoraInitError: an unknown method or option, or another rule for ``ranks``.

    Example:
        >>> StartCallback("pissa", match_lr=True).report is None
        True
    """

    def __init__(self, method: str | Method, **options: Any) -> None:
        self.method = get_method(method)
        if options.get("ranks", "fixed") != "fixed":
            raise LoraInitError("StartCallback keeps ranks='fixed': the optimizer is made before the adapters start")
        self.options: dict[str, Any] = {"progress": False} | options
        self.report: InitReport | None = None
        self._trainer: Any = None
        self._resumed = False

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take over the loading of checkpoints, which hold the adapter in the form that was started."""
        self._trainer = trainer = _calling_trainer(self)
        load = trainer._load_from_checkpoint

        def load_started(folder: str, model: Any = None) -> None:
            self._resumed = True
            if Path(folder, PROVENANCE_NAME).is_file():  # PEFT would miss the form that it was started in
                name = self.options.get("adapter_name", "default")
                self.report = checkpoint.load(unwrapped(trainer.model), folder, adapter_name=name)
            else:
                load(folder, model)

        trainer._load_from_checkpoint = load_started

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Start the adapters, unless training goes on from a checkpoint."""
        if self._resumed or state.global_step > 0:
            return
        trainer = self._trainer or _calling_trainer(self)
        model = unwrapped(model)
        options: dict[str, Any] = ({"data": trainer} if self.method.wants_data else {}) | self.options
        self.report = initialize(model, self.method, **options)
        _check_trained(model, self.report, optimizer)
        self._tell(trainer, self.report)

    def _tell(self, trainer: Any, report: InitReport) -> None:
        """Write the report to the trainer's log, and as a table where a logger takes text."""
        sizes = [row.relative_size for row in report.layers if row.relative_size is not None]
        told = {"layers": len(report.layers), "seconds": report.seconds}
        if sizes:
            told["relative_size"] = sum(sizes) / len(sizes)
        trainer.log({f"lorainit/{name}": float(value) for name, value in told.items()})
        for callback in trainer.callback_handler.callbacks:
            writer = getattr(callback, "tb_writer", None)
            if writer is not None:
                writer.add_text("lorainit/start", f"```\n{report}\n```")


def _calling_trainer(callback: TrainerCallback) -> Any:
    """Return the trainer that runs the callback: Transformers hands it everything but itself."""
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and callback in found.callback_handler.callbacks:
            return found
        frame = frame.f_back
    raise LoraInitError("StartCallback runs inside a Trainer only; elsewhere call lorainit.initialize")


def _check_trained(model: Any, report: InitReport, optimizer: Any) -> None:
    """Raise unless the optimizer trains the factors that were started."""
    if optimizer is None:
        return
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for site in find_sites(model, report.adapter_name)[0]:
        if not {id(trained_factor(module)) for module in (site.lora_A, site.lora_B)} <= trained:
            raise LoraInitError(
                f"layer '{site.name}': the trainer's optimizer was made for other parameters than the adapter's; give "
                "the trainer the model with its adapter, or peft_config, when it is made"
            )
