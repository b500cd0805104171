"""Switches a model's adapters, mode, gradients, checkpointing and randomness for a while, and puts them back.

Each is a context manager that restores what it found, also after an exception or Ctrl-C.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

Noted = list[tuple[Any, str, Any]]  # object, name of an attribute, value


def _note(objects: Iterable[Any], *names: str) -> Noted:
    return [(each, name, getattr(each, name)) for each in objects for name in names if hasattr(each, name)]


def _put_back(noted: Noted) -> None:
    for each, name, value in noted:
        if getattr(each, name) is not value:
            setattr(each, name, value)


@contextlib.contextmanager
def _restored(objects: Iterable[Any], *names: str) -> Iterator[None]:
    """Restore these attributes after the block."""
    noted = _note(objects, *names)
    try:
        yield
    finally:
        _put_back(noted)


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Note training mode, active adapters and required gradients; return a function that puts them back."""
    noted = _note(model.modules(), "training", "_disable_adapters", "_active_adapter")
    return functools.partial(_put_back, noted + _note(model.parameters(), "requires_grad"))


@contextlib.contextmanager
def evaluation(model: nn.Module, name: str | None = None, parameters: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Run in evaluation mode, with one adapter alone (None: the base), and gradients of these parameters alone."""
    with adapter(model, name), mode(model, training=False), gradients_of(model, parameters):
        yield


@contextlib.contextmanager
def adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Run with one adapter alone, or with none: the base model."""
    switched: list[Any] = [m for m in model.modules() if hasattr(m, "_disable_adapters")]
    with _restored(switched, "_disable_adapters", "_active_adapter"):
        for module in switched:
            module._disable_adapters = name is None
            if name is not None and hasattr(module, "_active_adapter"):
                module._active_adapter = [name]
        yield


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Run in training or in evaluation mode."""
    modules = list(model.modules())
    with _restored(modules, "training"):
        for module in modules:  # not model.train(): that visits every module of every module, three times a step
            if module.training != training:
                module.training = training
        yield


@contextlib.contextmanager
def gradients_of(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let these parameters alone require gradients; flags and present gradients of all others come back."""
    every, wanted = list(model.parameters()), {id(parameter) for parameter in parameters}
    with _restored(every, "requires_grad", "grad"):
        for parameter in every:
            if parameter.requires_grad != (id(parameter) in wanted):
                parameter.requires_grad_(id(parameter) in wanted)
        for parameter in parameters:
            parameter.grad = None
        yield


@contextlib.contextmanager
def values_of(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Train copies of the parameters' values, in at least float32; the values come back in their own memory."""
    with _restored(parameters, "data"):
        for parameter in parameters:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            parameter.data = parameter.data.to(wide, copy=True)
        yield


def checkpointed(model: nn.Module) -> list[Any]:
    """Return the modules whose gradient checkpointing is switched on."""
    return [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]


@contextlib.contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """Let gradient checkpointing, where it is on, work in evaluation mode too.

    Transformers only checkpoints a block whose own ``training`` flag is set, and many blocks ask the same flag whether
    to drop something out: so the flag is set until the block computes, and is then what it was. Other modules (stacks
    that drop whole layers, older code that checkpoints its parts itself) keep their flag: what they compute comes
    before the memory that they save. The re-entrant variant runs blocks without gradients, and no loss could be taken
    inside them.
    """
    modules = checkpointed(model)
    before = [(m, m.training, m.__dict__.get("_gradient_checkpointing_func")) for m in modules]
    try:
        for module, flag, function in before:
            if function is not None:
                module._gradient_checkpointing_func = functools.partial(_checkpoint, module, flag)
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True
        yield
    finally:
        for module, flag, function in before:
            module.training = flag
            if function is not None:
                module._gradient_checkpointing_func = function


def _checkpoint(module: Any, training: bool, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Checkpoint a module's computation, which runs with ``training`` as its own flag, recomputation included."""

    def computed(*inputs: Any, **named: Any) -> Any:
        found, module.training = module.training, training
        try:
            return function(*inputs, **named)
        finally:
            module.training = found

    options["use_reentrant"] = False
    return checkpoint(computed, *args, **options)


@contextlib.contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators for a while; what they held before comes back."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


@contextlib.contextmanager
def precision(device: torch.device, autocast: torch.dtype | None) -> Iterator[None]:
    """Run in the parameters' own precision, or under autocast in ``autocast``; the caller's autocast is set aside."""
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        yield
