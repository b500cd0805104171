"""Expert parameters: one adapter on a stack of weights (PEFT's ``target_parameters``), each with factors of its own.

PEFT keeps the factors of E experts in two matrices: A as (E·r)×in, expert by expert, and B as out×(r·E), in which the
expert is the index that runs fastest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from .._typing import Float, Tensor
from ..errors import UnsupportedLayerError
from ..machine import sharding
from ..numerics.linalg import product_norm
from . import offset
from .sites import LoraSite, lora_layers, pattern_name

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True)
class Expert(LoraSite):
    """One expert of a stack, as the methods see it.

    Attributes:
        index: which one.
    """

    index: int = dataclasses.field(kw_only=True)

    @property
    def experts(self) -> int:
        """One."""
        return 1

    @property
    def is_routed(self) -> bool:
        """Whether there are others beside it that a token may be sent to."""
        return self.layer.num_experts > 1  # pyright: ignore[reportAttributeAccessIssue]

    def stored_weight(self) -> Float[Tensor, "out in"]:
        """Return a view of the expert's weight as out×in."""
        return _stack(self.layer)[self.index]

    def factors(self) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        """Return the expert's present trainable factors (A, B), detached views."""
        A, B = (offset.trained_factor(m).detach() for m in (self.lora_A, self.lora_B))
        return A.unflatten(0, (-1, self.rank))[self.index], B.unflatten(1, (self.rank, -1))[..., self.index]


@dataclasses.dataclass(frozen=True)
class Experts(LoraSite):
    """An adapter on a stack of weights. Its ``shape`` and rank are those of one expert."""

    @property
    def members(self) -> Sequence[Expert]:
        """The experts, named ``layer.parameter[index]``."""
        name = pattern_name(self.name, self.layer)
        return [Expert(f"{name}[{i}]", self.layer, self.adapter, "linear", index=i) for i in range(self.experts)]

    def stored_weight(self) -> Float[Tensor, "rows in"]:
        """Return the weights of all experts, one below the other."""
        return _stack(self.layer).flatten(0, 1)

    def update_norm(self) -> float:
        """Return the Frobenius norm of s·BA over all experts."""
        return self.scaling * sum(product_norm(*expert.factors()) ** 2 for expert in self.members) ** 0.5


def find_experts(model: nn.Module, adapter_name: str) -> tuple[list[Experts], dict[str, str]]:
    """Find the expert parameters of an adapter; return those that can be started, and why others cannot, by name.

    Raises:
        UnsupportedLayerError: a parameter on the meta device.
    """
    found: list[Experts] = []
    refused: dict[str, str] = {}
    for name, layer in lora_layers(model, adapter_name):
        if not isinstance(layer, ParamWrapper):
            continue
        parameter = layer.get_param()
        if parameter.device.type == "meta":
            raise UnsupportedLayerError(
                f"layer '{name}' is on the meta device and holds no values; load or materialize the model first"
            )
        if sharding.is_spread(parameter):
            refused[name] = "expert parameters that are spread over processes (FSDP2, ZeRO-3) are not supported"
        elif not offset.can_attach(layer.lora_A[adapter_name]):
            refused[name] = f"factors of type {type(layer.lora_A[adapter_name]).__name__} are not supported"
        elif parameter.dtype not in _DTYPES or type(parameter) is not nn.Parameter:
            refused[name] = f"expert parameters of type {type(parameter).__name__}, {parameter.dtype} are not supported"
        else:
            found.append(Experts(name, layer, adapter_name, "experts"))
    return found, refused


def stack_factors(starts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the factors of several experts as PEFT's two matrices."""
    return torch.cat([A for A, _ in starts]), torch.stack([B for _, B in starts], dim=-1).flatten(1)


def _stack(layer: Any) -> Tensor:
    """Return the parameter that a `ParamWrapper` adapts as (experts, out, in)."""
    parameter = layer.get_param().detach()
    if parameter.dim() == 2:  # noqa: PLR2004 - one weight
        return parameter[None]
    # up to PEFT 0.18 every stack counts as in×out
    return parameter if getattr(layer, "_did_swap_in_out_features", False) else parameter.mT
