"""Finds the teacher whose boundaries are matched: the base, another adapter, an adapter folder, or another model.

All but another model share the student's base: the teacher is then the same network with other adapters active.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..adapter import switches
from ..adapter.sites import site_name
from ..errors import LoraInitError, NonFiniteError
from ..saving.folder import check_plain, config_rank, read_adapter
from .tracing import layers_of


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen network whose boundaries are to be matched.

    Attributes:
        kind: ``"base"``, ``"adapter"``, ``"folder"`` or ``"model"``.
        model: the network to run.
        switched: switches its adapters to the teacher for a while; whoever runs it sets evaluation mode.
        warnings: remarks for the user.
    """

    kind: str
    model: nn.Module
    switched: Callable[[], AbstractContextManager[None]]
    warnings: tuple[str, ...] = ()


def find_teacher(model: nn.Module, teacher: Any, student: str, reached: set[str]) -> Teacher:
    """Return the teacher that ``teacher`` names.

    Args:
        model: the student's model.
        teacher: ``"base"``; the name of an adapter on the model; a folder with a LoRA adapter; or another module.
        student: name of the adapter that is being started.
        reached: the modules that run before the last matched site; the others do not matter.

    Raises:
        LoraInitError: no such adapter or folder, one that does not fit the base, or the student itself.
        NonFiniteError: the adapter or the folder holds NaN or infinity.
    """
    if isinstance(teacher, nn.Module):
        _check_apart(model, teacher)
        return Teacher("model", teacher, contextlib.nullcontext)
    carrying = _layers_by_adapter(model)
    adapters = carrying.keys()
    if teacher == "base":
        if "base" in adapters and student != "base":
            raise LoraInitError(
                "teacher='base' could be the base model or this model's adapter named 'base'; rename the adapter "
                "(save it, and load it under another name)"
            )
        return Teacher("base", model, lambda: switches.adapter(model, None))
    if teacher in adapters:
        if teacher == student:
            raise LoraInitError(f"the teacher '{teacher}' is the adapter that is to be started")
        for name, layer in carrying[teacher].items():
            _check_finite(f"'{teacher}'", name, _factors(layer, teacher))
        warnings = _unseen_warning(f"adapter '{teacher}'", carrying[teacher], reached)
        return Teacher("adapter", model, lambda: switches.adapter(model, str(teacher)), warnings)
    if not Path(teacher).is_dir():
        raise LoraInitError(
            f"teacher {str(teacher)!r} is neither 'base', nor an adapter on this model ({sorted(adapters)}), "
            "nor a folder"
        )
    updates, warnings = _read_updates(model, Path(teacher), reached)
    named = layers_of(model)
    places = [(_base_layer(named[name]), update) for name, update in updates.items()]
    return Teacher("folder", model, lambda: _folder_on_base(model, places), warnings)


def _check_apart(model: nn.Module, teacher: nn.Module) -> None:
    """Raise if two modules share LoRA layers: the teacher would then run with the student's adapter.

    Raises:
        LoraInitError: they share a LoRA layer, as a model from `peft.get_peft_model` and the base it was made of do.
    """
    own = {id(module): name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    shared = next((own[id(module)] for module in teacher.modules() if id(module) in own), None)
    if shared is not None:
        raise LoraInitError(
            f"the teacher {type(teacher).__name__} is the model that is being started: both hold the LoRA layer "
            f"'{site_name(shared)}', for PEFT adapts a base in place; use teacher='base', an adapter's name, or pass "
            "another copy of the model"
        )


def _layers_by_adapter(model: nn.Module) -> dict[str, dict[str, LoraLayer]]:
    """Return {adapter: {name: layer that it adapts}}."""
    found: dict[str, dict[str, LoraLayer]] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for adapter in (*module.lora_A, *module.lora_embedding_A):
                found.setdefault(adapter, {})[site_name(path)] = module
    return found


def _factors(layer: LoraLayer, adapter: str) -> Iterator[Tensor]:
    """Yield an adapter's A and B in a layer, those of an embedding included."""
    for pairs in (layer.lora_A, layer.lora_B):
        if adapter in pairs:
            yield from pairs[adapter].parameters()
    for tables in (layer.lora_embedding_A, layer.lora_embedding_B):
        if adapter in tables:
            yield tables[adapter]


def _check_finite(teacher: str, name: str, factors: Iterable[Tensor]) -> None:
    """Raise if a factor of a teacher is not finite, which attention may hide from the outputs.

    Raises:
        NonFiniteError: a factor holds NaN or infinity.
    """
    if not all(bool(torch.isfinite(factor).all()) for factor in factors):
        raise NonFiniteError(f"teacher {teacher}: its update of layer '{name}' holds NaN or infinity")


def _unseen_warning(teacher: str, layers: Iterable[str], reached: set[str]) -> tuple[str, ...]:
    """Return a warning where none of a teacher's layers runs before the last matched site: it equals the base there."""
    layers = list(layers)
    if not reached.isdisjoint(layers):
        return ()
    return (
        f"teacher {teacher} adapts no layer that runs before the last matched site (its first is '{layers[0]}'): what "
        "it teaches is what the base computes",
    )


@contextlib.contextmanager
def _folder_on_base(model: nn.Module, places: list[tuple[nn.Module, _Update]]) -> Iterator[None]:
    """Add a folder's low-rank updates to the outputs of the base layers."""
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(switches.adapter(model, None))
        for base, update in places:
            hooks.callback(base.register_forward_hook(update.added).remove)
        yield


@dataclasses.dataclass
class _Update:
    """One layer of an adapter folder: s·B(Ax), added to what the base layer returns."""

    A: Tensor
    B: Tensor
    scaling: float

    def added(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].to(self.A.dtype)
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[self.A.dim()]
            low = convolve(x, self.A, None, module.stride, module.padding)  # pyright: ignore[reportArgumentType, reportCallIssue]
            change = convolve(low, self.B)
        else:
            change = F.linear(F.linear(x, self.A), self.B)
        return output + (self.scaling * change).to(output.dtype)


def _base_layer(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _read_updates(model: nn.Module, path: Path, reached: set[str]) -> tuple[dict[str, _Update], tuple[str, ...]]:
    """Return {layer name: update} of an adapter folder, for this model; without layers that are not reached.

    Raises:
        LoraInitError: the folder is for another base, or holds more than low-rank updates.
        NonFiniteError: it holds NaN or infinity.
    """
    config, tensors = read_adapter(path)
    check_plain(config, f"teacher {path}")
    tensors = {site_name(key): tensor for key, tensor in tensors.items()}
    stems = dict.fromkeys(key.rpartition(".lora_")[0] for key in tensors if ".lora_" in key)
    if not stems:
        raise LoraInitError(f"teacher {path} holds no LoRA layer")
    rest = [key for key in tensors if ".lora_A." not in key and ".lora_B." not in key]
    odd = [key for key in rest if ".lora_" in key or key.rpartition(".")[0] in reached]
    if odd:
        raise LoraInitError(
            f"teacher {path} holds {odd[0]}, which is no low-rank update; load it as an adapter "
            "(model.load_adapter(folder, 'teacher')) and pass teacher='teacher'"
        )
    named = layers_of(model)
    updates: dict[str, _Update] = {}
    for name in stems:
        if name not in named:
            raise LoraInitError(f"teacher {path} is for another base: this model has no module '{name}'")
        base = _base_layer(named[name])
        a, b = (tensors.get(f"{name}.lora_{factor}.weight") for factor in "AB")
        expected = _weight_shape(base)
        if a is None or b is None or expected is None or (b.shape[0], *a.shape[1:]) != expected:
            found = None if a is None or b is None else (b.shape[0], *a.shape[1:])
            raise LoraInitError(
                f"teacher {path} is for another base: layer '{name}' has an update of shape {found}, the weight here "
                f"is {expected}"
            )
        reference = next(base.parameters())
        dtype = torch.promote_types(a.dtype, torch.float32 if reference.dtype != torch.float64 else torch.float64)
        place = {"device": reference.device, "dtype": dtype}
        _check_finite(str(path), name, (a, b))
        if name in reached:
            updates[name] = _Update(a.to(**place), b.to(**place), config_rank(config, name)[1])
    named_otherwise = _name_warning(model, config.base_model_name_or_path, path)
    return updates, (*named_otherwise, *_unseen_warning(str(path), stems, reached))


def _weight_shape(base: nn.Module) -> tuple[int, ...] | None:
    """Return the shape of a layer's update, out first, as (out, in, *kernel)."""
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return (base.out_channels, base.in_channels, *base.kernel_size)
    if isinstance(base, Conv1D):
        return (int(base.weight.shape[1]), int(base.weight.shape[0]))
    sizes = getattr(base, "out_features", None), getattr(base, "in_features", None)
    return None if None in sizes else sizes  # pyright: ignore[reportReturnType]


def _name_warning(model: nn.Module, trained_on: str | None, path: Path) -> tuple[str, ...]:
    here = getattr(getattr(model, "config", None), "_name_or_path", None)
    names = [Path(name).name for name in (trained_on, here) if name]
    if len(set(names)) > 1:
        return (f"teacher {path} was trained on '{trained_on}', this base calls itself '{here}'; all shapes fit",)
    return ()
