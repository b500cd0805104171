"""What a start is compared with that is no start: LoRA+, AdaLoRA, training all weights.

They are PEFT's own, or plain training; this only puts them where a recipe can ask for them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import LoraInitError


def train_all(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with every weight to be trained."""
    return model.requires_grad_(True)  # pyright: ignore[reportReturnType]


def add_adalora(model: PreTrainedModel, options: dict[str, Any], steps: int, fresh: list[str]) -> PeftModel:
    """Wrap a model with AdaLoRA (Zhang et al. 2023, arXiv:2303.10512).

    Args:
        model: the base.
        options: fields of `peft.AdaLoraConfig`; ``r`` is the mean rank that is left (``target_r``), the initial rank is
            half as much again, and the budget falls between a tenth and two thirds of the steps, unless they say so.
        steps: of the whole training.
        fresh: modules that the checkpoint lacks; they are trained in full.

    Raises:
        LoraInitError: wrong fields.
    """
    fields = dict(options)
    rank = fields.pop("r", 8)
    chosen = {"target_r": rank, "init_r": math.ceil(1.5 * rank), "tinit": steps // 10, "tfinal": steps // 3} | fields
    chosen.setdefault("deltaT", max(1, steps // 100))
    if fresh:
        chosen["modules_to_save"] = sorted({*(chosen.get("modules_to_save") or []), *fresh})
        chosen.setdefault("exclude_modules", fresh)
    try:
        return get_peft_model(model, AdaLoraConfig(total_step=steps, **chosen))  # pyright: ignore[reportReturnType]
    except (TypeError, ValueError) as error:
        raise LoraInitError(f"lora: {error}") from error


@dataclasses.dataclass
class AllocateRanks(TrainerCallback):
    """Has AdaLoRA re-distribute its ranks after each step, while the gradients are still there.

    Attributes:
        model: the AdaLoRA model.
    """

    model: PeftModel

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the importance of the singular values, and mask the least important ones."""
        self.model.base_model.update_and_allocate(state.global_step + 1)  # pyright: ignore[reportCallIssue]


def lora_plus_optimizer(model: nn.Module, arguments: TrainingArguments, ratio: float) -> torch.optim.Optimizer:
    """Return AdamW with ``ratio`` times the learning rate for B (Hayou et al. 2024, arXiv:2402.12354)."""
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(
        model,  # pyright: ignore[reportArgumentType]
        torch.optim.AdamW,
        lr=arguments.learning_rate,
        loraplus_lr_ratio=ratio,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        weight_decay=arguments.weight_decay,
    )


def total_steps(arguments: TrainingArguments, rows: int) -> int:
    """Return how many optimizer steps a training takes."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    batches = math.ceil(rows / arguments.train_batch_size)
    return math.ceil(math.ceil(batches / arguments.gradient_accumulation_steps) * arguments.num_train_epochs)
