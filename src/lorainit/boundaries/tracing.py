"""Traces one forward pass: which modules feed a pointwise activation, and in which order modules run."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..adapter.sites import site_name

# by the function's name: the same for torch.relu, Tensor.relu, F.relu and their in-place forms
_ACTIVATIONS = frozenset(
    "relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish sigmoid logsigmoid hardsigmoid hardswish hardtanh "
    "tanh softplus softsign threshold log_sigmoid".split()
)
# elementwise or reshaping: the result still belongs to the one module that fed it. Slices are left out: half of a fused
# projection is no site
_TRANSPARENT = frozenset(
    "mul add sub div pow neg square rsub true_divide multiply subtract divide view reshape permute transpose "
    "contiguous to float half bfloat16 double type_as clone detach dropout flatten unflatten squeeze unsqueeze "
    "movedim".split()
)


@dataclasses.dataclass
class Trace:
    """The result of tracing one forward pass.

    Attributes:
        calls: names of the modules that have weights of their own (layers), in the order in which they returned.
        feeding: those of them whose output, and nothing else, goes into a pointwise activation.
        starts: every module as its forward began: (number of `calls` before it, name).
    """

    calls: list[str] = dataclasses.field(default_factory=list)
    feeding: set[str] = dataclasses.field(default_factory=set)
    starts: list[tuple[int, str]] = dataclasses.field(default_factory=list)


class _Lineage(TorchFunctionMode):
    """Follows each layer's output through entry-by-entry operations until it meets an activation."""

    def __init__(self) -> None:
        super().__init__()
        self._origin: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self.feeding: set[str] = set()

    def record(self, tensor: Tensor, name: str) -> None:
        self._origin[id(tensor)] = (weakref.ref(tensor), name)

    def origin(self, tensor: Any) -> str | None:
        reference, name = self._origin.get(id(tensor), (None, None))
        return name if reference is not None and reference() is tensor else None

    def activated(self, inputs: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and (name := self.origin(inputs[0])):
            self.feeding.add(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if name in _ACTIVATIONS:
            self.activated(args or tuple(kwargs.values()))
            return func(*args, **kwargs)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        origins = {self.origin(t) for t in tensors if t.dim() > 0}
        result = func(*args, **kwargs)
        if name in _TRANSPARENT and len(origins) == 1 and isinstance(result, Tensor):
            (found,) = origins
            if found is not None:
                self.record(result, found)
        return result


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return {name in the base model: module} of all modules except those inside a LoRA layer."""
    found: dict[str, nn.Module] = {}
    inside = None  # children come right after their parent, so one prefix is enough
    for path, module in model.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        if isinstance(module, LoraLayer):
            inside = path + "."
        found[site_name(path)] = module  # pyright: ignore[reportArgumentType]
    return found


def has_weight_matrix(module: nn.Module) -> bool:
    """Say whether a module is a layer: it (or the layer inside a LoRA layer) holds a weight matrix, no embedding."""
    if isinstance(module, LoraLayer):
        module = module.get_base_layer()
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() > 1 and not isinstance(module, nn.Embedding)


def _is_activation(module: nn.Module) -> bool:
    # torch keeps its attention in the same file
    known = type(module).__module__ in ("torch.nn.modules.activation", "transformers.activations")
    return known and not isinstance(module, nn.MultiheadAttention)


def trace(model: nn.Module, run: Callable[[], object]) -> Trace:
    """Watch ``run()``, one forward pass of ``model``, and return what feeds activations and in which order layers ran.

    An activation is one of torch's pointwise functions, or a module from ``torch.nn`` or ``transformers.activations``;
    a function composed of other pointwise ones (GELU's tanh form, x·σ(1.7x)) counts through the last of them.
    """
    found, lineage = Trace(), _Lineage()
    with ExitStack() as hooks:
        for name, module in layers_of(model).items():
            for handle in _watch(name, module, found, lineage):
                hooks.callback(handle.remove)
        with lineage, torch.no_grad():
            run()
    found.feeding = lineage.feeding
    return found


def _watch(name: str, module: nn.Module, found: Trace, lineage: _Lineage) -> Iterator[Any]:
    """Attach the hooks of one module and yield their handles."""

    def on_start(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.starts.append((len(found.calls), name))
        if _is_activation(module):
            lineage.activated(inputs)

    def on_return(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            found.calls.append(name)
            lineage.record(output, name)

    yield module.register_forward_pre_hook(on_start)
    if has_weight_matrix(module):
        yield module.register_forward_hook(on_return)
