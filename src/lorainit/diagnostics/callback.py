"""Records information loss, boundary agreement, distance and gradient norms while an adapter trains."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapter.offset import trained_factor, update_factors
from ..adapter.sites import LoraSite, find_sites
from ..errors import LoraInitError
from ..numerics.linalg import product_norm, to_double
from .diagnose import diagnose


class DiagnosticsCallback(TrainerCallback):
    """Diagnoses an adapter every so many steps of a `transformers.Trainer`, on the same few batches.

    Each record goes to ``trainer.state.log_history`` under ``lorainit/…`` names, and stays in ``records``:
    ``information_loss`` (relative, so that a growing gradient does not show as a growing loss), ``agreement`` with the
    base, ``loss`` on the batches, ``update_norm`` ‖ΔW‖ relative to ‖W‖ over all layers, ``gradient_norm_A`` and
    ``gradient_norm_B`` of the last training batch (after clipping), and ``overhead``, the diagnoses' share of the time.

    Args:
        data: batches as the model takes them, with labels; a few are enough, they are kept.
        every: steps from one record to the next; the first is made before the first step.
        adapter_name: which adapter.
        max_batches: use at most so many of the batches.

    Raises:
        LoraInitError: no batch, or ``every`` below 1.

    Example:
        >>> callback = DiagnosticsCallback([{"input_ids": None}], every=10)
        >>> callback.records
        []
    """

    def __init__(
        self, data: Iterable[Any], *, every: int = 10, adapter_name: str = "default", max_batches: int | None = 2
    ) -> None:
        self.batches = list(itertools.islice(data, max_batches))
        if not self.batches or every < 1:
            raise LoraInitError(f"a diagnosis needs a batch and every ≥ 1, got {len(self.batches)} and {every}")
        self.every, self.adapter_name = every, adapter_name
        self.records: list[dict[str, float]] = []
        self._norms: dict[str, float] = {}
        self._begin, self._spent = 0.0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Make the first record."""
        self._begin = time.perf_counter()
        self._record(state, model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Read the gradient norms where the next step is one to record."""
        if (state.global_step + 1) % self.every == 0:
            self._norms = _gradient_norms(find_sites(model, self.adapter_name)[0])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Make a record every so many steps."""
        if state.global_step % self.every == 0:
            self._record(state, model)

    @property
    def overhead(self) -> float:
        """Share of the time since training began that the diagnoses took."""
        return self._spent / max(time.perf_counter() - self._begin, 1e-9)

    def _record(self, state: TrainerState, model: nn.Module) -> None:
        begin = time.perf_counter()
        found = diagnose(model, self.batches, adapter_name=self.adapter_name, max_batches=None, bootstrap=0)
        record = {"information_loss": found.information_loss, "loss": found.loss, **self._norms}
        record["update_norm"] = _update_norm(find_sites(model, self.adapter_name)[0])
        if found.agreement is not None:
            record["agreement"] = found.agreement
        self._spent += time.perf_counter() - begin
        record["overhead"] = self.overhead
        self._norms = {}
        self.records.append({"step": state.global_step} | record)
        logged = {f"lorainit/{name}": value for name, value in record.items()}
        state.log_history.append({"step": state.global_step} | logged)


def _gradient_norms(sites: list[LoraSite]) -> dict[str, float]:
    squares = {"A": 0.0, "B": 0.0}
    for site in sites:
        for name, module in (("A", site.lora_A), ("B", site.lora_B)):
            gradient = trained_factor(module).grad
            squares[name] += 0.0 if gradient is None else float(to_double(gradient).square().sum())
    return {f"gradient_norm_{name}": math.sqrt(square) for name, square in squares.items()}


def _update_norm(sites: list[LoraSite]) -> float:
    """Return ‖ΔW‖/‖W‖ over all layers, ΔW the adapter's update without an offset."""
    updates, weights = 0.0, 0.0
    for site in sites:
        a, b = (factor.flatten(1) for factor in update_factors(site.lora_A, site.lora_B))
        updates += (site.scaling * product_norm(a, b)) ** 2
        weights += site.weight_norm**2
    return math.sqrt(updates / weights) if weights > 0 else math.nan
