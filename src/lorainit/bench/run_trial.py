"""Carries out one trial in a worker and returns its record, also when it fails."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
import os
import tempfile
import traceback
from typing import TYPE_CHECKING, Any

from ..errors import NonFiniteError
from ..machine import provenance
from ..train.diagnose import diagnose_recipe
from ..train.evaluate import evaluate
from ..train.run import train
from .suite import Forgetting
from .trial import Trial, located, located_data

if TYPE_CHECKING:
    from .asha import Stopper


def carry_out(trial: Trial, root: str | None, stopper: Stopper | None = None) -> dict[str, Any]:
    """Carry out a trial and return its record: the result of `lorainit train`, or the error in its place.

    Args:
        trial: the trial.
        root: the folder that ``root:FOLDER`` lies below.
        stopper: may stop the training early.
    """
    record = trial.record("done")
    try:
        with tempfile.TemporaryDirectory() as scratch, _silence():
            found = (
                _diagnosed(trial, root, scratch) if trial.point.diagnosis else _trained(trial, root, scratch, stopper)
            )
        record |= found
    except NonFiniteError as error:
        record |= {"status": "diverged", "error": str(error)}
    except Exception as error:  # its row says what went wrong; the other trials go on
        message = f"{type(error).__name__}: {error}"
        record |= {"status": "failed", "error": message, "traceback": traceback.format_exc(limit=-8)}
    return record if "provenance" in record else record | {"provenance": provenance.collect()}


def _trained(trial: Trial, root: str | None, scratch: str, stopper: Stopper | None) -> dict[str, Any]:
    """Train, and measure what was forgotten."""
    recipe = dataclasses.replace(located(trial.recipe, root), output=scratch)
    callback = stopper.callback(trial) if stopper is not None else None
    result = train(recipe, callbacks=[callback] if callback is not None else [])
    # the rows of the layers are in the diagnosis of the start
    result["init"] = {key: value for key, value in result["init"].items() if key != "layers"}
    if trial.forgetting is not None:
        result["forgetting"] = _forgotten(trial.forgetting, recipe.model, f"{scratch}/adapter", root)
    if callback is not None and callback.stopped:
        result["status"] = "stopped"
    return {key: value for key, value in result.items() if key not in ("model", "recipe")}


def _forgotten(held: Forgetting, model: str, adapter: str, root: str | None) -> dict[str, float]:
    """Return the loss on held-out text of the base and of what was trained from it."""
    data = located_data(held.data, root)
    return {
        "before": _base_loss(model, held.task, data),
        "after": evaluate(model, held.task, adapter=adapter, data=data)["loss"],
    }


@functools.cache
def _base_loss(model: str, task: str, data: Any) -> float:
    return evaluate(model, task, data=data)["loss"]


def _diagnosed(trial: Trial, root: str | None, scratch: str) -> dict[str, Any]:
    """Diagnose the start; find the learning rate that `suggest_lr` gives it, relative to vanilla's."""
    assert trial.diagnosis is not None
    found, advice = diagnose_recipe(dataclasses.replace(located(trial.recipe, root), output=scratch), trial.diagnosis)
    assert advice is not None
    lora = trial.recipe.lora
    # `suggest_lr` compares with vanilla at the layer's own scaling; Adam's first update is proportional to it
    scaling = lora["lora_alpha"] / (math.sqrt(lora["r"]) if lora.get("use_rslora") else lora["r"])
    ratio = advice.learning_rate * lora["lora_alpha"] / lora["r"] / scaling
    kept = ("learning_rate", "magnitude_lr", "curvature_lr", "reasons")
    fields = {name: value for name, value in advice.to_dict().items() if name in kept}
    return {"ratio": ratio, "diagnosis": found.to_dict(), "advice": fields}


@contextlib.contextmanager
def _silence() -> Any:
    """Keep the libraries' output off the console: Ray would collect it from every machine."""
    from datasets import disable_progress_bars

    disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
