r"""The offset form: an adapter that starts at A₀, B₀ ≠ 0 and yet leaves the function and the base untouched.

Instead of editing the base weight (W ← W − s·B₀A₀, as PiSSA, OLoRA or LoRAM are usually run), the layer computes

    y = W x + s (B A − B₀ A₀) x,        A₀, B₀ frozen at the start's values.

Gradients and optimizer path are those of the edited base. The difference is evaluated as one ordinary LoRA of rank 2r,

    B A − B₀ A₀ = [B − B₀, B₀] [A; A − A₀],

so it is *exactly* zero at step 0 in every dtype, and small updates are not drowned in the rounding of two large terms.

`OffsetLinear` and its convolutional siblings hold this inside PEFT's own ``lora_A[adapter]`` / ``lora_B[adapter]``:
the parameter named ``weight`` is the rank-r factor that trains, while *reading* ``.weight`` gives the stacked factor.
PEFT's forward, dropout, merge, ``get_delta_weight``, mixed batches, DoRA and every quantized layer type only ever call
or read these two submodules, so each of them sees the plain rank-2r LoRA that the adapter is.

In a state dict the pair appears as A' = [A; A₀], B' = [B, −B₀]: the same product, a plain rank-2r LoRA for the original
base, and exact to the last bit when it is loaded back into an offset adapter.
"""

from __future__ import annotations

from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from ..errors import LoraInitError
from ..machine.sharding import is_partitioned, is_sharded, replicated_like, whole
from .read_only import read_only

NOT_IN_ZERO3 = "DeepSpeed makes its checkpoints of the parameters alone, and the frozen B₀A₀ is none"
_SHARDED = (
    "an adapter in lorainit's offset form that FSDP2 shards has no weight that could be read or loaded outside its "
    "forward pass; load a state dict before fully_shard"
)


class OffsetFactor(nn.Module):
    """One factor of an adapter in offset form, mixed into the torch layer; `attach` makes it, `detach` removes it.

    Attributes:
        offset: the frozen factor (A₀ or B₀), a non-persistent buffer.
        stack_axis: 0 for ``lora_A``, 1 for ``lora_B``: the axis that holds the rank.
        experts: of how many weights the factor holds a part of its own (see `lorainit.adapter.experts`).
        base_edited: the base weight already holds −s·B₀A₀ (``base="subtract"``), so the forward uses the trained
            factor alone; only what is saved differs.
    """

    offset: Tensor
    stack_axis: int
    experts: int
    base_edited: bool

    @property
    def trained(self) -> nn.Parameter:
        """The rank-r factor that the optimizer updates."""
        return cast(nn.Parameter, self._parameters["weight"])

    @property
    def weight(self) -> Tensor:
        """The factor of the update that the layer applies: rank 2r, or the trained one where the base is edited."""
        applied = self.applied_factor()
        if is_sharded(applied):
            raise LoraInitError(_SHARDED)
        return applied if self.base_edited else read_only(applied)

    def applied_factor(self) -> Tensor:
        """Return what `weight` shows, for the forward pass.

        Raises:
            LoraInitError: DeepSpeed ZeRO-3 has come to partition the trained factor.
        """
        if is_partitioned(self.trained):
            raise LoraInitError(
                "an adapter in lorainit's offset form cannot run under DeepSpeed ZeRO-3: "
                f"{NOT_IN_ZERO3}; start it with base='keep', or use ZeRO-2 or FSDP2"
            )
        return self.trained if self.base_edited else self.update_factor()

    def update_factor(self) -> Tensor:
        """Return [A; A − A₀] or [B − B₀, B₀]: the pair's product is BA − B₀A₀, relative to the original base."""
        trained = self.trained
        offset = replicated_like(self.offset.to(trained.dtype), trained)
        change = trained - offset
        return self._stacked(trained, change) if self.stack_axis == 0 else self._stacked(change, offset)

    def _stacked(self, first: Tensor, second: Tensor) -> Tensor:
        """Return two factors as one of twice the rank, whose halves `_halves` gives back."""
        if self.stack_axis == 0 and self.experts > 1:  # expert by expert; in B the expert runs fastest
            parts = [factor.unflatten(0, (self.experts, -1)) for factor in (first, second)]
            return torch.cat(parts, dim=1).flatten(0, 1)
        return torch.cat((first, second), dim=self.stack_axis)

    def _halves(self, stacked: Tensor) -> tuple[Tensor, Tensor]:
        if self.stack_axis == 0 and self.experts > 1:
            first, second = stacked.unflatten(0, (self.experts, -1)).chunk(2, dim=1)
            return first.flatten(0, 1), second.flatten(0, 1)
        first, second = stacked.chunk(2, dim=self.stack_axis)
        return first, second

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        trained = destination[prefix + "weight"]
        offset = replicated_like(self.offset.to(trained.device, trained.dtype), trained)
        destination[prefix + "weight"] = self._stacked(trained, offset if self.stack_axis == 0 else -offset)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        if is_sharded(self.trained):
            raise LoraInitError(_SHARDED)
        if key in state_dict:
            stored, rank = state_dict[key], self.trained.shape[self.stack_axis]
            if stored.shape[self.stack_axis] != 2 * rank:
                error_msgs.append(
                    f"{key}: this adapter runs in lorainit's offset form (rank {rank}, saved as rank {2 * rank}), but "
                    f"the file holds rank {stored.shape[self.stack_axis]}; load it into a model whose adapter was not "
                    "started by lorainit, or start this one with the method that the file was trained with"
                )
                state_dict.pop(key)
                return
            trained, offset = self._halves(stored)
            offset = offset if self.stack_axis == 0 else -offset
            if self.base_edited and not torch.equal(offset.to(self.offset), self.offset):
                error_msgs.append(
                    f"{key}: the base of this model was edited for another start (base='subtract') than the one in the "
                    "file; reload the base model and start it with the same method, options and seed"
                )
                state_dict.pop(key)
                return
            with torch.no_grad():
                self.offset.copy_(offset)
            state_dict[key] = trained.contiguous()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class OffsetLinear(OffsetFactor, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """`torch.nn.Linear` factor of an adapter in offset form."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the factor of the update."""
        return nn.functional.linear(input, self.applied_factor(), self.bias)


class OffsetConv1d(OffsetFactor, nn.Conv1d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """`torch.nn.Conv1d` factor of an adapter in offset form."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the factor of the update."""
        return self._conv_forward(input, self.applied_factor(), self.bias)


class OffsetConv2d(OffsetFactor, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """`torch.nn.Conv2d` factor of an adapter in offset form."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the factor of the update."""
        return self._conv_forward(input, self.applied_factor(), self.bias)


class OffsetConv3d(OffsetFactor, nn.Conv3d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """`torch.nn.Conv3d` factor of an adapter in offset form."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the factor of the update."""
        return self._conv_forward(input, self.applied_factor(), self.bias)


_OFFSET_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: OffsetLinear,
    nn.Conv1d: OffsetConv1d,
    nn.Conv2d: OffsetConv2d,
    nn.Conv3d: OffsetConv3d,
}
_PLAIN_CLASS = {offset: plain for plain, offset in _OFFSET_CLASS.items()}
_ATTRIBUTES = ("stack_axis", "base_edited", "experts")  # of a module in offset form, beside the buffer


def can_attach(module: nn.Module) -> bool:
    """Say whether ``module`` is a factor that the offset form knows how to hold."""
    return type(module) in _OFFSET_CLASS or isinstance(module, OffsetFactor)


def is_attached(module: nn.Module) -> TypeGuard[OffsetFactor]:
    """Say whether ``module`` is a factor in offset form."""
    return isinstance(module, OffsetFactor)


def trained_factor(module: nn.Module) -> nn.Parameter:
    """Return the parameter of a ``lora_A``/``lora_B`` module that trains, offset form or not."""
    return cast(nn.Parameter, module._parameters["weight"])


def attach(lora_A: nn.Module, lora_B: nn.Module, *, base_edited: bool = False, experts: int = 1) -> None:
    """Turn a pair of plain factors into the offset form, frozen at their present values (A₀ := A, B₀ := B).

    The modules and their parameters stay the same objects, so an optimizer that already holds them keeps working.
    """
    for axis, module in enumerate((lora_A, lora_B)):
        if type(module) not in _OFFSET_CLASS:
            raise LoraInitError(f"the offset form cannot hold a factor of type {type(module).__name__}")
        module.register_buffer("offset", whole(trained_factor(module).detach()).clone(), persistent=False)
        factor = cast(OffsetFactor, module)
        factor.stack_axis, factor.base_edited, factor.experts = axis, base_edited, experts
        module.__class__ = _OFFSET_CLASS[type(module)]  # last: the class needs the rest, and Ctrl-C may come between


def detach(lora_A: nn.Module, lora_B: nn.Module) -> None:
    """Turn a pair in offset form back into plain factors that hold the trained values; a plain pair is left alone.

    A pair that Ctrl-C has left half way between the two becomes plain as well.
    """
    for module in (lora_A, lora_B):
        if isinstance(module, OffsetFactor):
            cast(nn.Module, module).__class__ = _PLAIN_CLASS[type(module)]  # first: the class needs the rest
        if can_attach(module):
            module._buffers.pop("offset", None)
            module._non_persistent_buffers_set.discard("offset")
            for name in _ATTRIBUTES:
                module.__dict__.pop(name, None)


def update_factors(lora_A: nn.Module, lora_B: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the factors (A', B') of the adapter's update of the *original* base: rank 2r for an offset pair."""
    a, b = (m.update_factor() if isinstance(m, OffsetFactor) else trained_factor(m) for m in (lora_A, lora_B))
    return a.detach(), b.detach()


def saved_update_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return `update_factors` of an offset pair from what its state dict holds, A' = [A; A₀] and B' = [B, −B₀]."""
    (A, A0), (B, minus_B0) = a.chunk(2, dim=0), b.chunk(2, dim=1)
    return torch.cat((A, A - A0), dim=0), torch.cat((B + minus_B0, -minus_B0), dim=1)
