"""The model that is trained: its base, what is added to it, and the device that it is on."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import parse_flag_from_env
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainingArguments

from ..errors import LoraInitError
from ..tasks import Task
from . import baselines
from .recipe import LORA_DEFAULTS, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Base(NamedTuple):
    """A base model as it was loaded.

    Attributes:
        model: with the task's head.
        processor: its tokenizer or image processor.
        fresh: names of the modules that the checkpoint lacks, or has for other classes: they are freshly initialized.
    """

    model: PreTrainedModel
    processor: Any
    fresh: list[str]


def resolve_model(name: str) -> str:
    """Return a name or folder that `from_pretrained` takes; ``package:NAME/FOLDER`` becomes the package's folder.

    Raises:
        LoraInitError: the package is not installed, or has no such folder.
    """
    if not name.startswith("package:"):
        return name
    package, _, folder = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LoraInitError(f"model '{name}': the Python package '{package}' is not installed")
    path = Path(spec.submodule_search_locations[0]) / folder
    if not path.is_dir():
        raise LoraInitError(f"model '{name}': the package has no folder '{folder}'")
    return str(path)


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Name the model if Transformers cannot load it in this block.

    Raises:
        LoraInitError: nothing loadable at that name.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise LoraInitError(f"model '{name}' cannot be loaded: {str(error).splitlines()[0]}") from error


def load_base(name: str, task: Task, dtype: str) -> Base:
    """Load a base model with the task's head, and its tokenizer or image processor.

    Raises:
        LoraInitError: an unknown dtype, or nothing loadable at that name.
    """
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise LoraInitError(f"dtype '{dtype}' is not one of float32, bfloat16, float16")
    path = resolve_model(name)
    with loading(name):
        model, info = task.load_model(path, dtype=getattr(torch, dtype), output_loading_info=True)
        # of a mismatch the key comes with both shapes
        keys = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        return Base(model, task.load_processor(path), sorted({key.rpartition(".")[0] for key in keys}))


def add_lora(model: PreTrainedModel, task: Task, options: dict[str, Any], fresh: list[str]) -> PeftModel:
    """Wrap a model with a fresh LoRA adapter.

    Args:
        model: the base.
        task: decides PEFT's task type.
        options: fields of `peft.LoraConfig`.
        fresh: modules that the base's checkpoint lacks (a head, a pooler). They are trained in full and saved with the
            adapter instead of carrying LoRA: on a fresh base they would be other random numbers.

    Raises:
        LoraInitError: an unknown or wrong field of `peft.LoraConfig`, or target modules that match nothing.
    """
    chosen = LORA_DEFAULTS | options
    try:
        config = LoraConfig(task_type=task.task_type, **chosen)
        if fresh:
            config.modules_to_save = sorted({*(config.modules_to_save or []), *fresh})
            config.exclude_modules = config.exclude_modules or fresh
        return get_peft_model(model, config)  # pyright: ignore[reportReturnType]
    except (TypeError, ValueError) as error:
        raise LoraInitError(f"lora: target_modules={chosen['target_modules']!r}: {error}") from error


def add_adapter(base: Base, plan: Plan, rows: int = 0) -> Any:
    """Return the base with what the recipe trains, on the device that it is trained on.

    Args:
        base: the base.
        plan: the checked recipe.
        rows: how many are trained on; only AdaLoRA plans by it.

    Raises:
        LoraInitError: wrong fields of the adapter's config.
    """
    recipe, task = plan.recipe, plan.task
    if recipe.adapter == "none":
        model = baselines.train_all(base.model)
    elif recipe.adapter == "adalora":
        options = {"task_type": task.task_type} | LORA_DEFAULTS | recipe.lora
        steps = baselines.total_steps(plan.arguments, rows)
        model = baselines.add_adalora(base.model, options, steps, base.fresh)
    else:
        model = add_lora(base.model, task, recipe.lora, base.fresh)
    return place(model, plan.arguments)


def place(model: Any, arguments: TrainingArguments) -> Any:
    """Return the model on the device that it is trained on, so that the start is computed there too.

    The Trainer moves it only after the start. Left where they are: a model that was placed at loading (quantized,
    ``device_map``), and one that FSDP or DeepSpeed will place, which may not fit on one device.
    """
    marks = ("hf_device_map", "is_quantized", "is_distributed_loading_by_transformers")
    at_loading = any(getattr(model, mark, None) for mark in marks)
    by_launcher = any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))
    if at_loading or arguments.fsdp or arguments.deepspeed or by_launcher:
        return model
    return model.to(arguments.device)
