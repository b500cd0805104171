"""A tensor that is computed from others, so that writing to it would be lost: an error instead."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraInitError

_GET_DATA = Tensor.data.__get__  # pyright: ignore[reportAttributeAccessIssue]
_SET_DATA = Tensor.data.__set__  # pyright: ignore[reportAttributeAccessIssue]
_SET_REQUIRES_GRAD = Tensor.requires_grad.__set__  # pyright: ignore[reportAttributeAccessIssue]


class ReadOnlyTensor(Tensor):
    """A view of a tensor that raises `LoraInitError` when it is written to; what is computed from it is plain.

    PEFT's ``reset_lora_parameters`` and ``hotswap_adapter``, and ``lora_A[adapter].weight.data.copy_`` by hand, write
    to the weight of a factor. In the offset form that is a computed tensor: they would do nothing, without a word.
    """

    _itself: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run a function on the plain tensor, unless it writes to this one."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func == _GET_DATA:
                return read_only(func(*args, **kwargs))
            if func == _SET_DATA:
                # PEFT's get_delta_weight writes back what it has read
                new = args[1]
                if new.shape != args[0].shape or not torch.equal(new.to(args[0]), args[0]):
                    raise _refusal()
                return None
            written = kwargs.get("tensor", args[0] if args else None)
            writes = func == _SET_REQUIRES_GRAD or _writes(getattr(func, "__name__", ""))
            if (writes and isinstance(written, ReadOnlyTensor)) or _among(kwargs.get("out")):
                raise _refusal()
            return func(*args, **kwargs)


def read_only(tensor: Tensor) -> Tensor:
    """Return a view of a computed tensor that cannot be written to; the tensor itself while a graph is compiled."""
    if torch.compiler.is_compiling():
        return tensor
    guarded = tensor.as_subclass(ReadOnlyTensor)
    guarded._itself = weakref.ref(guarded)  # torch.utils.swap_tensors, which asks nobody, refuses what is referred to
    return guarded


def _writes(name: str) -> bool:
    """Say whether a function of this name writes to its first argument."""
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__", "__index__"))


def _among(out: Any) -> bool:
    """Say whether what a function was given as ``out=`` is, or holds, a tensor that cannot be written to."""
    return any(isinstance(tensor, ReadOnlyTensor) for tensor in (out if isinstance(out, (tuple, list)) else (out,)))


def _refusal() -> LoraInitError:
    return LoraInitError(
        "this adapter runs in lorainit's offset form: its weight is computed from the trained factor and the frozen "
        "start, so what is written to it, its flags included, would be lost. Start it anew with lorainit.initialize, "
        "load a checkpoint (load_state_dict, load_adapter), write to lorainit.offset.trained_factor(module), or, to "
        "swap adapters while serving, load what lorainit.save_pretrained has written into a plain adapter"
    )
