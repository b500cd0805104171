"""Finds the inputs of each expert in a stack: the products with its weight among all that a model computes.

Experts whose weights are stacked in one parameter are no modules, so they cannot be hooked. But a product with an
expert's weight has a view of that parameter as an operand, and the view's address tells which expert it belongs to. All
other operations on a stack either return a view of it again, or cannot be followed and are refused.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from ..adapter.experts import Expert
from ..errors import UnsupportedLayerError

OnCall = Callable[[Expert, Tensor, Tensor], Tensor | None]

# products of rows with a matrix, and the name of its argument; `F.linear` takes it as out×in, the others as in×out
_PRODUCTS: dict[Any, str] = {
    F.linear: "weight",
    torch.matmul: "other",
    Tensor.matmul: "other",
    Tensor.__matmul__: "other",
    torch.mm: "mat2",
    Tensor.mm: "mat2",
}


@contextlib.contextmanager
def observing(experts: Sequence[Expert], on_call: OnCall) -> Iterator[None]:
    """Call back at every product with an expert's weight in the module that holds it, recomputed ones included.

    Args:
        experts: all experts of some stacks.
        on_call: takes the expert, its input and its output; returns a replacement for the output, or None.

    Raises, where the model runs:
        UnsupportedLayerError: it computes with a stack in another way.
    """
    products = _Products(experts, on_call)
    modules = list({id(expert.base_layer): expert.base_layer for expert in experts}.values())
    before = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = products.reporting(module.forward)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


class _Products(TorchFunctionMode):
    """A context in which products with experts' weights are reported."""

    def __init__(self, experts: Sequence[Expert], on_call: OnCall) -> None:
        super().__init__()
        self._on_call, self._running = on_call, False
        self._experts = {_address(expert.stored_weight().mT): expert for expert in experts}
        if len(self._experts) < len(experts):
            named = {expert.name for expert in self._experts.values()}
            shared = next(expert.name for expert in experts if expert.name not in named)
            raise UnsupportedLayerError(
                f"layer '{shared}': another layer has the same weight in memory, so what each of them sees cannot be "
                "told apart; leave one of them out of target_parameters"
            )
        stacks = {id(expert.layer): expert.layer for expert in self._experts.values()}
        parameters = [(stack.get_param().detach(), stack) for stack in stacks.values()]  # pyright: ignore
        self._ranges = sorted((p.data_ptr(), p.data_ptr() + p.nbytes, id(stack)) for p, stack in parameters)
        self._dtypes = {p.dtype for p, _ in parameters}

    def reporting(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that the products among its operations are reported."""

        def reported(*args: Any, **kwargs: Any) -> Any:
            if self._running:  # a module of experts inside another one
                return compute(*args, **kwargs)
            self._running = True
            try:
                with self:
                    return compute(*args, **kwargs)
            finally:
                self._running = False

        return reported

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and report it if it is a product with an expert's weight."""
        result = func(*args, **(kwargs or {}))
        stack = next((found for t in _tensors((args, kwargs)) if (found := self._stack_of(t)) is not None), None)
        if stack is None:
            return result
        rows, weight = _operands(func, args, kwargs or {})
        expert = None if weight is None else self._experts.get(_address(weight))
        if expert is not None and rows is not None and self._stack_of(rows) is None:
            replaced = self._on_call(expert, rows, result)
            return result if replaced is None else replaced
        if any(self._stack_of(t) != stack for t in _tensors(result)):
            name = next(expert.name for expert in self._experts.values() if id(expert.layer) == stack).rsplit("[", 1)[0]
            raise UnsupportedLayerError(
                f"layer '{name}': the model computes {resolve_name(func) or func} with its experts in a way that does "
                "not tell what each expert sees; leave it out of target_parameters, or take a start without data"
            )
        return result

    def _stack_of(self, tensor: Tensor) -> int | None:
        """Return the id of the layer whose parameter a tensor lies in, if any."""
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype not in self._dtypes:
            return None
        at = tensor.data_ptr()
        index = bisect_right(self._ranges, at, key=lambda each: each[0]) - 1
        return self._ranges[index][2] if index >= 0 and at < self._ranges[index][1] else None


@contextlib.contextmanager
def eager_experts(experts: Iterable[Expert]) -> Iterator[None]:
    """Let Transformers run experts one after the other instead of as one fused product."""
    configs = {id(c): c for e in experts if hasattr(c := getattr(e.base_layer, "config", None), _IMPLEMENTATION)}
    before = {key: getattr(config, _IMPLEMENTATION) for key, config in configs.items()}
    try:
        for config in configs.values():
            setattr(config, _IMPLEMENTATION, {"": "eager"})  # of this config, not of those inside it
        yield
    finally:
        for key, config in configs.items():
            setattr(config, _IMPLEMENTATION, {"": before[key]})


_IMPLEMENTATION = "_experts_implementation"


def _address(matrix: Tensor) -> tuple[Any, ...]:
    """Return address, shape and strides, which identify a matrix in memory."""
    return matrix.data_ptr(), matrix.shape, matrix.stride()


def _operands(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Return the rows and the matrix as in×out, if this is a product of rows with a matrix."""
    name = _PRODUCTS.get(func)
    if name is None or "out" in kwargs:
        return None, None
    given = dict(zip(("input", name), args, strict=False)) | kwargs
    rows, weight = given.get("input"), given.get(name)
    if not (isinstance(rows, Tensor) and isinstance(weight, Tensor)):
        return None, None
    return rows, weight.mT if func is F.linear and weight.dim() > 1 else weight


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
