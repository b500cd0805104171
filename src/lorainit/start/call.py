"""What `lorainit.initialize` was asked for."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor, nn

from ..adapter.write import Base
from ..errors import LoraInitError
from ..machine import sharding
from ..machine.processes import Processes
from ..methods import Method
from ..methods.auto import Auto, Choice
from ..methods.method import TrainedMethod
from ..statistics.batches import LossFunction
from ..statistics.storage import Storage
from .budget import RankRule, Rule, rank_rule
from .data import as_batches


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of `lorainit.initialize`, checked one by one, and what `Auto` has chosen."""

    model: nn.Module
    asked: Method
    data: Iterable[Any] | None
    adapter_name: str
    seed: int
    base: Literal["auto", "offset", "keep", "subtract"]
    max_batches: int | None
    memory_budget: int | None
    ranks: Rule | RankRule
    micro_batch: int | None
    storage: Storage
    cache: str | os.PathLike[str] | None
    proxy_data: Iterable[Any] | None
    skip: Literal["error", "default"]
    match_lr: bool | Literal["curvature"]
    processes: Processes
    progress: bool
    loss_function: LossFunction | None = None
    overwrite: bool = False
    chosen: Choice | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without the model.

        Raises:
            LoraInitError: a value that is none of the choices, or of another kind than is meant.
        """
        check_model(self.model)
        check_choice("base", self.base, ("auto", *get_args(Base)))
        check_choice("on_unsupported", self.skip, ("error", "default"))
        check_choice("match_lr", self.match_lr, (False, True, "curvature"))
        check_choice("overwrite", self.overwrite, (False, True))
        check_count("max_batches", self.max_batches)
        check_count("micro_batch", self.micro_batch)
        check_batches("proxy_data", self.proxy_data)
        if not (self.cache is None or isinstance(self.cache, (str, os.PathLike))):
            raise LoraInitError(f"cache={self.cache!r} is neither None nor a path")
        if not isinstance(self.asked, Auto):
            _ = self.rule  # an unknown one, or one that is not for this method

    @property
    def method(self) -> Method:
        """The method that computes the start."""
        return self.asked if self.chosen is None else self.chosen.method

    @functools.cached_property
    def rule(self) -> RankRule:
        """How the layers get their ranks."""
        return rank_rule(self.ranks, self.method)

    @property
    def treatment(self) -> Base:
        """What is done about BA."""
        return self._meant if self.base == "auto" else self.base

    @property
    def settles(self) -> bool:
        """Whether what a short training comes to is no longer to show: no-op at step 0 was asked for by name."""
        return isinstance(self.method, TrainedMethod) and self.base in ("offset", "subtract")

    @property
    def written_as(self) -> Base:
        """What is done about BA when the start is written, which a method's short training may then move."""
        return self._meant if self.settles else self.treatment

    @property
    def _meant(self) -> Base:
        """What the method's paper does about BA."""
        return "offset" if self.method.product == "preserve" else "keep"


def choose(call: Call) -> Call:
    """Return the call with the choice of `Auto` made; the fresh adapter is diagnosed only if that can change it."""
    auto = call.asked
    if not isinstance(auto, Auto):
        return call
    call = keep_data(call)
    data = call.data
    features: dict[str, float] = {}
    if data is not None and any(entry.where for entry in auto.table() if entry.helps):
        if sharding.wrapping(call.model) == "fsdp2":
            raise LoraInitError(
                "auto cannot diagnose a model that is sharded by FSDP2; name the method, or pass no data"
            )
        from ..diagnostics.diagnose import diagnose  # needs more than a start does

        most = call.max_batches or 8
        found = diagnose(
            call.model,
            data,
            adapter_name=call.adapter_name,
            max_batches=most,
            bootstrap=0,
            seed=call.seed,
            loss_function=call.loss_function,
        )
        features = {name: value for name, value in found.to_dict().items() if isinstance(value, float)}
    choice = auto.choose(features, with_data=data is not None)
    return dataclasses.replace(call, chosen=choice, match_lr=call.match_lr or choice.match_lr)


def with_batches(call: Call, **options: Any) -> Call:
    """Return the call with batches of its data, whatever form they have; as it is if nothing reads them.

    Args:
        call: the call.
        options: ``processing``, ``collate_fn`` and ``batch_size`` of `lorainit.start.data.as_batches`.
    """
    if call.data is None or not (call.asked.wants_data or call.match_lr == "curvature"):
        return call
    read = as_batches(call.data, gradients=_needs_loss(call), **options)
    return dataclasses.replace(call, data=read.data, loss_function=call.loss_function or read.loss_function)


def _needs_loss(call: Call) -> bool:
    """Say whether the loss of batches is needed: for gradients, to train by, or for its curvature."""
    method = call.asked
    if call.match_lr == "curvature" or isinstance(method, Auto):
        return True
    if isinstance(method, TrainedMethod):
        return "backward" in method.info.needs
    return method.request is not None and method.request.needs_gradients


def keep_data(call: Call) -> Call:
    """Return the call with data that can be read more than once: before the start, or after it, too."""
    if not isinstance(call.data, Iterator):
        return call
    return dataclasses.replace(call, data=list(itertools.islice(call.data, call.max_batches)))


def check_model(model: Any) -> None:
    """Raise unless a model is a module."""
    if not isinstance(model, nn.Module):
        raise LoraInitError(
            f"model must be a torch module with PEFT's LoRA layers, got {model!r}"
            if model is None or isinstance(model, str)
            else f"model must be a torch module with PEFT's LoRA layers, got a {type(model).__name__}"
        )


def check_count(name: str, value: Any) -> None:
    """Raise unless a number is a positive integer, or None."""
    if value is None:
        return
    if isinstance(value, bool):
        raise LoraInitError(f"{name} must be an integer, got {value!r}")
    if as_integer(name, value) < 1:
        raise LoraInitError(f"{name} must be ≥ 1 or None, got {value!r}")


def check_batches(name: str, data: Any) -> None:
    """Raise on what is known to be no batches, without reading any: one batch, or a dataset of rows."""
    if data is None:
        return
    if isinstance(data, (Tensor, Mapping, str, bytes)):
        what = f"a tensor of shape {tuple(data.shape)}" if isinstance(data, Tensor) else f"a {type(data).__name__}"
        raise LoraInitError(f"{name} must be batches as the model takes them, got {what}; of a single batch: [batch]")
    by_index = hasattr(data, "__getitem__") and not hasattr(data, "__iter__")
    if by_index or (hasattr(data, "column_names") and hasattr(data, "__len__")):
        raise LoraInitError(
            f"{name} is a dataset of rows ({type(data).__name__}): pass torch.utils.data.DataLoader(dataset, "
            "batch_size=8, collate_fn=...), which makes batches as the model takes them"
        )
    if not isinstance(data, Iterable):
        raise LoraInitError(f"{name} must be an iterable of batches, got {data!r}")


def as_integer(name: str, value: Any) -> int:
    """Return an integer of any kind, such as NumPy's, as Python's."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise LoraInitError(f"{name} must be an integer, got {value!r}") from error


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise unless a value is one of the choices."""
    if value not in choices:
        raise LoraInitError(f"{name}={value!r} is not one of {list(choices)}")


def options_of(method: Method) -> dict[str, Any]:
    """Return a method's options as JSON types."""
    return {f.name: as_json(getattr(method, f.name)) for f in dataclasses.fields(method)}


def as_json(option: Any) -> Any:
    """Return an option as a JSON type: a nested method's name and options; the class of a module or a state dict."""
    if isinstance(option, Method):
        return {"method": option.info.name, **options_of(option)}
    if isinstance(option, os.PathLike):
        return os.fspath(option)
    if isinstance(option, np.generic):
        return option.item()
    tensors = isinstance(option, Mapping) and any(isinstance(value, Tensor) for value in option.values())
    return type(option).__name__ if tensors or isinstance(option, nn.Module) else option
