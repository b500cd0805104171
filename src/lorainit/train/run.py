"""One run: load, add LoRA, start, train with Transformers' Trainer, evaluate, save plainly, write one JSON."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import parse_flag_from_env
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..errors import LoraInitError, NonFiniteError
from ..machine import provenance
from ..machine.cost import measure
from ..machine.processes import Processes
from ..methods import Method, get_method, import_modules
from ..report import InitReport
from ..saving import checkpoint
from ..start.budget import RankRule
from ..start.initialize import initialize
from ..tasks import DataOptions, Task, fingerprint, get_task
from . import baselines

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    adapter: baselines.Adapter = "lora"
    lora_plus: float | None = None
    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    seed: int = 0
    output: str = "runs/latest"
    resume: bool = False


def train(recipe: Recipe, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Carry out a recipe and return its result, which is also written to ``<output>/result.json``.

    Args:
        recipe: what to do.
        callbacks: more callbacks for the Trainer.

    Raises:
        LoraInitError: anything wrong in the recipe, before a step is taken where it can be known.
        NonFiniteError: the loss became NaN or infinite; the message says at which step.
    """
    task = get_task(recipe.task, **recipe.task_options)
    method = _method(recipe)  # checked before anything is loaded
    baselines.check(recipe.adapter, recipe.method, recipe.lora_plus, recipe.resume)
    output = Path(recipe.output)
    if recipe.resume and not (output.is_dir() and get_last_checkpoint(str(output))):
        raise LoraInitError(f"resume: there is no checkpoint in {output} to continue from")
    arguments = _training_arguments(recipe, output)
    set_seed(recipe.seed)
    rows = task.load_data(recipe.data, recipe.seed)
    model, tokenizer, fresh = load_base(recipe.model, task, recipe.dtype)
    train_set, eval_set = (task.encode(part, tokenizer, recipe.data.max_length) for part in rows)

    steps = baselines.total_steps(arguments, len(train_set))
    model = _placed(_with_adapter(model, task, recipe, fresh, steps), arguments)
    with measure() as start_cost:
        report = None
        if recipe.start is not None:
            report = checkpoint.load(model, recipe.start)
        elif recipe.adapter == "lora":
            report = _start(
                model,  # pyright: ignore[reportArgumentType]
                method,
                recipe,
                _calibration(method, recipe, task, tokenizer, train_set),
                task.collator(tokenizer),
            )

    items: list[float] = []
    own = [baselines.AllocateRanks(model)] if recipe.adapter == "adalora" else []  # pyright: ignore
    trainer = TaskTrainer(
        task,
        tokenizer,
        items=items,
        packing=recipe.data.packing,
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=eval_set,
        callbacks=[_Clock(), *own, *callbacks],
        optimizers=(
            baselines.lora_plus_optimizer(model, arguments, recipe.lora_plus) if recipe.lora_plus else None,
            None,
        ),
    )
    with measure() as training_cost:
        trainer.train(resume_from_checkpoint=recipe.resume or None)
    metrics = _scores(trainer)
    if recipe.adapter == "lora":
        checkpoint.save_pretrained(model, output / "adapter")
    else:
        model.save_pretrained(str(output / ("adapter" if recipe.adapter == "adalora" else "model")))

    result = {
        "method": report.method if report else {"adalora": "adalora", "none": "full"}[recipe.adapter],
        "model": recipe.model,
        "task": task.name,
        "learning_rate": arguments.learning_rate,
        "rank": None if recipe.adapter == "none" else (LORA_DEFAULTS | recipe.lora)["r"],
        "seed": recipe.seed,
        "metrics": metrics,
        "items": _in_row_order(items, trainer),
        "init": report.to_dict() if report else {},
        "curves": _curves(trainer.state.log_history),
        "cost": {"start": dataclasses.asdict(start_cost), "training": dataclasses.asdict(training_cost)},
        "recipe": dataclasses.asdict(recipe),
        "provenance": provenance.collect(
            model=provenance.hash_weights(resolve_model(recipe.model)),
            train_data=fingerprint(rows[0]),
            eval_data=fingerprint(rows[1]),
        ),
    }
    _write_result(output / "result.json", result)
    return result


def start(recipe: Recipe) -> InitReport:
    """Carry out a recipe up to the start and save the started adapter to ``<output>``, ready for training.

    The data are only read if the method needs them. The folder is a plain adapter that PEFT loads; `lorainit.load` and
    the recipe field ``start`` train it from there.

    Raises:
        LoraInitError: anything wrong in the recipe.
    """
    task = get_task(recipe.task, **recipe.task_options)
    method = _method(recipe)
    if recipe.base == "subtract":
        raise LoraInitError("base='subtract' edits the base weights, which an adapter folder cannot hold")
    set_seed(recipe.seed)
    model, tokenizer, fresh = load_base(recipe.model, task, recipe.dtype)
    rows = _calibration(method, recipe, task, tokenizer)
    model = _placed(add_lora(model, task, recipe.lora, fresh), _training_arguments(recipe, Path(recipe.output)))
    report = _start(model, method, recipe, rows, task.collator(tokenizer))
    model.save_pretrained(recipe.output)
    return report


def started(recipe: Recipe) -> tuple[PeftModel, PreTrainedTokenizerBase, Dataset, int]:
    """Carry out a recipe up to the start.

    Returns:
        The model, its tokenizer, the encoded training rows, and how many of them, from the first, the start has seen.

    Raises:
        LoraInitError: anything wrong in the recipe.
    """
    task = get_task(recipe.task, **recipe.task_options)
    method = _method(recipe)
    set_seed(recipe.seed)
    model, tokenizer, fresh = load_base(recipe.model, task, recipe.dtype)
    rows = task.encode(task.load_data(recipe.data, recipe.seed)[0], tokenizer, recipe.data.max_length)
    model = _placed(add_lora(model, task, recipe.lora, fresh), _training_arguments(recipe, Path(recipe.output)))
    if recipe.start is not None:
        checkpoint.load(model, recipe.start)
        return model, tokenizer, rows, 0
    seen = _calibration(method, recipe, task, tokenizer, rows)
    _start(model, method, recipe, seen, task.collator(tokenizer))
    own = recipe.calibration.split is None and recipe.calibration.file is None
    return model, tokenizer, rows, len(seen) if seen is not None and own else 0


def _method(recipe: Recipe) -> Method:
    import_modules(recipe.imports)
    return get_method(recipe.method, **recipe.method_options)


def _calibration(
    method: Method, recipe: Recipe, task: Task, tokenizer: PreTrainedTokenizerBase, train_set: Dataset | None = None
) -> Dataset | None:
    """Return the encoded rows that a data-driven start, or the curvature, sees; None where neither is wanted."""
    if not (method.wants_data or recipe.match_lr == "curvature"):
        return None
    wanted = recipe.calibration
    if wanted.split is not None and wanted.file is not None:
        raise LoraInitError("calibration: split and file exclude each other")
    if wanted.split is not None or wanted.file is not None:
        rows = task.load_rows(recipe.data, split=wanted.split, file=wanted.file)
        rows = task.encode(rows, tokenizer, recipe.data.max_length)
    elif train_set is not None:
        rows = train_set
    else:
        rows = task.encode(task.load_data(recipe.data, recipe.seed)[0], tokenizer, recipe.data.max_length)
    return rows.select(range(min(wanted.samples, len(rows))))


def _start(model: PeftModel, method: Method, recipe: Recipe, rows: Dataset | None, collator: Any) -> InitReport:
    """Start the adapter, on the calibration rows if there are any: each process on its own share of them."""
    data = None
    if rows is not None:
        processes = Processes("default")
        rows = rows.select(range(processes.rank, len(rows), processes.size))
        data = DataLoader(rows, batch_size=recipe.calibration.batch_size, collate_fn=collator)  # pyright: ignore
    return initialize(
        model,
        method,
        data=data,
        seed=recipe.seed,
        base=recipe.base,  # pyright: ignore[reportArgumentType]
        match_lr=recipe.match_lr,
        memory_budget=recipe.calibration.memory_budget,
        ranks=recipe.ranks,
    )


def _with_adapter(
    model: PreTrainedModel, task: Task, recipe: Recipe, fresh: list[str], steps: int
) -> PreTrainedModel | PeftModel:
    """Return the model with what the recipe trains."""
    if recipe.adapter == "none":
        return baselines.train_all(model)
    if recipe.adapter == "adalora":
        return baselines.add_adalora(model, {"task_type": task.task_type} | LORA_DEFAULTS | recipe.lora, steps, fresh)
    return add_lora(model, task, recipe.lora, fresh)


def _placed(model: Any, arguments: TrainingArguments) -> Any:
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
    network, tokenizer, _ = load_base(model, chosen, "float32")
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
    trainer = TaskTrainer(
        chosen,
        tokenizer,
        model=network,
        args=arguments,
        eval_dataset=chosen.encode(rows, tokenizer, data.max_length),
    )
    return _scores(trainer)


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


def load_base(name: str, task: Task, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """Load a base model with the task's head, and its tokenizer.

    Returns:
        The model, its tokenizer or image processor, and the names of the modules that the checkpoint lacks, or has for
        other classes: they are freshly initialized.

    Raises:
        LoraInitError: an unknown dtype, or nothing loadable at that name.
    """
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise LoraInitError(f"dtype '{dtype}' is not one of float32, bfloat16, float16")
    path = resolve_model(name)
    try:
        model, info = task.load_model(path, dtype=getattr(torch, dtype), output_loading_info=True)
        # of a mismatch the key comes with both shapes
        keys = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        return model, task.load_processor(path), sorted({key.rpartition(".")[0] for key in keys})
    except (OSError, ValueError) as error:
        raise LoraInitError(f"model '{name}' cannot be loaded: {str(error).splitlines()[0]}") from error


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


class FiniteTrainer(Trainer):
    """A `Trainer` that stops at the first loss that is NaN or infinite, instead of training on."""

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


class _Clock(TrainerCallback):
    """Notes in the Trainer's log how many seconds of training each entry comes after."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to count."""
        self._begin = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the time."""
        if state.log_history:
            state.log_history[-1]["seconds"] = time.perf_counter() - self._begin


class TaskTrainer(FiniteTrainer):
    """A trainer that batches and scores as a task says."""

    def __init__(
        self, task: Task, tokenizer: Any, *, items: list[float] | None = None, packing: bool = False, **options: Any
    ) -> None:
        self.task, self.tokenizer = task, tokenizer
        collator = (task.packed_collator if packing else task.collator)(tokenizer)
        super().__init__(data_collator=collator, compute_metrics=_metrics(task, items), **options)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Return a batch's loss with the task's own predictions and labels, where it has any."""
        prepared = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            unwrapped = self.accelerator.unwrap_model(model)
            predicted = None if prediction_loss_only else self.task.predict(unwrapped, self.tokenizer, prepared)
        if predicted is None:
            return super().prediction_step(model, prepared, prediction_loss_only, ignore_keys)
        loss, _, _ = super().prediction_step(model, prepared, True, ignore_keys)
        return loss, *predicted


def _write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, one line a top-level key: long lists stay readable in a diff."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in result.items())
    path.write_text(f"{{\n{lines}\n}}\n")


def _training_arguments(recipe: Recipe, output: Path) -> TrainingArguments:
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
        return TrainingArguments(output_dir=str(output), seed=recipe.seed, **fields)
    except (TypeError, ValueError) as error:
        raise LoraInitError(f"train: {error}") from error


def _scores(trainer: Trainer) -> dict[str, float]:
    """Evaluate and return loss and metrics, without the Trainer's own timing."""
    timing = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch")
    scores = {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items()}
    return {k: v for k, v in scores.items() if k not in timing}


def _metrics(task: Task, items: list[float] | None = None) -> Any:
    """Return Trainer's metric function, or None where the loss is the metric (then no logits are kept).

    Args:
        task: the task.
        items: is filled with the loss of each row at the last evaluation, if the rows have classes.
    """
    if type(task).metrics is Task.metrics:
        return None

    def score(prediction: Any) -> dict[str, float]:
        logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
        if items is not None and logits.ndim == 2 and labels.ndim == 1 and not labels.is_floating_point():
            losses = torch.nn.functional.cross_entropy(logits.float(), labels.long(), reduction="none")
            items[:] = [round(loss, 4) for loss in losses.tolist()]
        return task.metrics(prediction.predictions, prediction.label_ids)

    return score


def _in_row_order(items: list[float], trainer: Trainer) -> list[float]:
    """Return the losses in the order of the rows; the Trainer may have grouped them by length. None if they are spread.

    Runs with other seeds group otherwise, and comparisons pair the same row.
    """
    batches: Any = trainer.get_eval_dataloader().batch_sampler
    order = [row for batch in batches for row in batch]
    if sorted(order) != list(range(len(items))):  # other processes have had the rest
        return []
    return [loss for _, loss in sorted(zip(order, items, strict=True))]


def _curves(history: list[dict[str, float]]) -> dict[str, list[list[float]]]:
    """Return {quantity: [[step, value], ...]} from the Trainer's log."""
    curves: dict[str, list[list[float]]] = {}
    for entry in history:
        for key, value in entry.items():
            if key in ("loss", "learning_rate", "grad_norm", "eval_loss", "eval_accuracy", "seconds"):
                curves.setdefault(key, []).append([entry["step"], value])
    return curves


def merge_folder(source: str, output: str, model: str | None = None) -> None:
    """Merge a saved adapter into its base and save the plain model with its tokenizer.

    Args:
        source: adapter folder.
        output: folder to write.
        model: the base; default: the one that the adapter names.

    Raises:
        LoraInitError: no base is known, its head does not fit, or the task type has no model class here.
    """
    config, tensors = checkpoint.read_adapter(source)
    base_name = model or config.base_model_name_or_path
    if not base_name:
        raise LoraInitError(f"{source} does not name its base model; pass --model")
    heads = [t for k, t in tensors.items() if k.endswith(("classifier.weight", "score.weight"))]
    # an adapter without a type but with a head is one for images
    kinds = {"SEQ_CLS": "sst2", "CAUSAL_LM": "text", "SEQ_2_SEQ_LM": "sst2-t5", None: "cifar100" if heads else "text"}
    if config.task_type not in kinds:
        raise LoraInitError(f"{source}: merging adapters of task type {config.task_type} is not supported")
    task = get_task(kinds[config.task_type])
    if heads:
        task = dataclasses.replace(task, num_labels=heads[0].shape[0])
    network, tokenizer, _ = load_base(base_name, task, "float32")
    merged: Any = checkpoint.merge(PeftModel.from_pretrained(network, source))
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
