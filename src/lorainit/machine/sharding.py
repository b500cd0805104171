"""Tensors that are spread over processes (FSDP2, ZeRO-3): put together to be computed with, cut to be written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

_LATER = "start the adapter before the model is sharded, and load or broadcast it then"


def is_sharded(tensor: object) -> bool:
    """Say whether something is a `torch.distributed.tensor.DTensor`."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def is_partitioned(tensor: object) -> bool:
    """Say whether something is a parameter that DeepSpeed ZeRO-3 partitions: an empty tensor, until it is gathered."""
    return hasattr(tensor, "ds_id")


def is_spread(tensor: object) -> bool:
    """Say whether the processes hold a parameter together, in either way."""
    return is_sharded(tensor) or is_partitioned(tensor)


def holders(parameter: Any) -> int:
    """Return how many processes hold a parameter that is spread over them."""
    if is_partitioned(parameter):
        return torch.distributed.get_world_size(parameter.ds_process_group)
    return parameter.device_mesh.size()


def gathered(parameter: Tensor) -> Tensor:
    """Return all of a parameter that is spread over processes; each of them must ask for it."""
    if not is_partitioned(parameter):
        return whole(parameter.detach())
    import deepspeed  # pyright: ignore[reportMissingImports]

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def local(tensor: Tensor) -> Tensor:
    """Return what of a tensor lies in this process."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; where it is sharded every process must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def cut_like(value: Tensor, reference: Tensor) -> Tensor:
    """Return a value that every process has whole as the reference is: in the same shards, or as it is."""
    if not is_sharded(reference):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = reference.device_mesh, reference.placements  # pyright: ignore[reportAttributeAccessIssue]
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def replicated_like(value: Tensor, reference: Tensor) -> Tensor:
    """Return a value that every process has whole so that it can be combined with the reference: sharded, or not."""
    if not is_sharded(reference):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = reference.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def settle(model: nn.Module) -> None:
    """Have FSDP2 do what it does at its first pass, and the parameters of the model in shards.

    At that pass it reads the parameters, which an offset adapter no longer shows, and looks which of them are trained:
    in a pass for a start none is. After a pass it leaves the parameters of its root put together.
    """
    for module in _roots(model):
        module._get_fsdp_state()._lazy_init()
    _reshard(model)


@contextlib.contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Run passes of a model that FSDP2 shards, in which nothing is trained; it is sharded again when they are over."""
    settle(model)
    try:
        yield
    except BaseException:
        for module in _roots(model):
            with contextlib.suppress(AttributeError, RuntimeError):  # torch < 2.13; a connection that is lost
                module.reset_iter_state()
        raise
    finally:
        _reshard(model)


def wrapping(model: nn.Module) -> Literal["fsdp1", "fsdp2"] | None:
    """Return by which form of FSDP the parameters of a model, or some of them, are sharded."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return "fsdp1"
    return "fsdp2" if _fsdp2_modules(model) else None


def obstacle(weight: object, base_layer: nn.Module, wrapped: Literal["fsdp1", "fsdp2"] | None) -> str | None:
    """Return why a base weight cannot be read in this process, and what to do; None: it can.

    Args:
        weight: the base layer's parameter.
        base_layer: the layer.
        wrapped: see `wrapping`.
    """
    if not isinstance(weight, Tensor):
        return None
    found: str | None = None
    if wrapped == "fsdp1":
        found = f"is sharded by FSDP1 (FullyShardedDataParallel); use FSDP2 (fully_shard), or {_LATER}"
    elif is_sharded(weight):
        placements: Any = weight.placements  # pyright: ignore[reportAttributeAccessIssue]
        if wrapped != "fsdp2" or sum(not p.is_replicate() for p in placements) > 1:
            found = f"holds a weight that is split by tensor parallelism (a DTensor that is not FSDP2's); {_LATER}"
    elif weight.device.type == "meta" and getattr(getattr(base_layer, "_hf_hook", None), "offload", False):
        found = "holds a weight that is offloaded (device_map to CPU or disk); load the model without offload"
    elif weight.device.type == "meta":
        found = "is on the meta device and holds no values; load or materialize the model first"
    return found


def _reshard(model: nn.Module) -> None:
    for module in _fsdp2_modules(model):
        module.reshard()


def _fsdp2_modules(model: nn.Module) -> list[Any]:
    if not torch.distributed.is_available():
        return []
    from torch.distributed import fsdp

    kind = getattr(fsdp, "FSDPModule", None)  # torch ≥ 2.6
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def _roots(model: nn.Module) -> list[Any]:
    """Return the modules that `fully_shard` was applied to which lie in no other such module."""
    inner: set[nn.Module] = set()
    roots: list[Any] = []
    for module in _fsdp2_modules(model):  # parents come before their children
        if module not in inner:
            roots.append(module)
            inner.update(module.modules())
    return roots
