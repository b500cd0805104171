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
from ..statistics.storage import Storage
from .budget import RankRule, Rule, rank_rule


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
    chosen: Choice | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without the model.

        Raises:
            LoraInitError: a value that is none of the choices.
        """
        check_choice("base", self.base, ("auto", *get_args(Base)))
        check_choice("on_unsupported", self.skip, ("error", "default"))
        check_choice("match_lr", self.match_lr, (False, True, "curvature"))

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
        if self.base != "auto":
            return self.base
        return "offset" if self.method.product == "preserve" else "keep"


def choose(call: Call) -> Call:
    """Return the call with the choice of `Auto` made; the fresh adapter is diagnosed only if that can change it."""
    auto = call.asked
    if isinstance(call.data, Iterator) and (isinstance(auto, Auto) or call.match_lr == "curvature"):
        # it is read before or after the start too
        call = dataclasses.replace(call, data=list(itertools.islice(call.data, call.max_batches)))
    if not isinstance(auto, Auto):
        return call
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
            call.model, data, adapter_name=call.adapter_name, max_batches=most, bootstrap=0, seed=call.seed
        )
        features = {name: value for name, value in found.to_dict().items() if isinstance(value, float)}
    choice = auto.choose(features, with_data=data is not None)
    return dataclasses.replace(call, chosen=choice, match_lr=call.match_lr or choice.match_lr)


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
