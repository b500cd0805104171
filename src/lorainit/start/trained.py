"""Tells an adapter that has been trained from a fresh one, and from one that stands where its start has put it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..adapter import offset
from ..adapter.sites import LoraSite, owners
from ..adapter.undo import Undo
from ..errors import LoraInitError
from ..numerics.linalg import product_norm
from ..statistics.fingerprints import tensor_fingerprint

_MARK = "_lorainit_start"  # in the layer's __dict__: {adapter: digest of the factors that its start ended with}


def check_untrained(model: nn.Module, sites: Iterable[LoraSite], adapter_name: str) -> None:
    """Raise if a start would overwrite what an adapter has learned; the state of an optimizer is not seen from here.

    An adapter of PEFT's that starts at random (``init_lora_weights=False``) is told from a trained one only where that
    has left the range of its random numbers.

    Raises:
        LoraInitError: a layer whose factors are neither fresh nor where a start of lorainit has put them.
    """
    random = {
        id(layer): owner.configs[adapter_name].init_lora_weights is False
        for owner in owners(model, adapter_name)
        for _, _, layer in owner.layers
    }
    for site in sites:
        A, B = site.factors()
        if _adds_nothing(site, A, B) or _stands_at_start(site, A, B):
            continue
        if random.get(id(site.layer), True) and _in_random_range(A) and _in_random_range(B):
            continue
        raise LoraInitError(
            f"layer '{site.name}': adapter '{site.adapter}' is not fresh: it has been trained or loaded, and a start "
            "would overwrite that. Add a fresh adapter, or pass overwrite=True"
        )


def remember(sites: Iterable[LoraSite], undo: Undo) -> None:
    """Note on the layers the factors that they were started with."""
    for site in sites:
        noted: Mapping[str, str] = site.layer.__dict__.get(_MARK, {})
        undo.call(functools.partial(setattr, site.layer, _MARK, noted))
        setattr(site.layer, _MARK, {**noted, site.adapter: _digest(*site.factors())})


def _adds_nothing(site: LoraSite, A: Tensor, B: Tensor) -> bool:
    """Say whether BA = 0: because a factor is zero, or to rounding, as PEFT's orthogonal start has it."""
    if not (bool(A.any()) and bool(B.any())):
        return True
    if site.experts > 1:
        return False
    weight = getattr(site.base_layer, "weight", None)
    stored = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.bfloat16
    rounding = 8 * max(torch.finfo(dtype).eps for dtype in (stored, A.dtype, B.dtype))
    return product_norm(A, B) <= rounding * float(A.float().norm()) * float(B.float().norm())


def _stands_at_start(site: LoraSite, A: Tensor, B: Tensor) -> bool:
    """Say whether the factors are those that a start has left, which an offset form holds itself."""
    first, second = site.lora_A, site.lora_B
    if offset.is_attached(first) and offset.is_attached(second):
        pairs = ((A, first.offset), (B, second.offset))
        return all(torch.equal(trained, frozen.flatten(1).to(trained)) for trained, frozen in pairs)
    return site.layer.__dict__.get(_MARK, {}).get(site.adapter) == _digest(A, B)


def _in_random_range(factor: Tensor) -> bool:
    """Say whether a factor may be one that torch's layers begin with: uniform, up to 1/√(inputs)."""
    return float(factor.abs().max()) <= factor.shape[1] ** -0.5 * (1 + torch.finfo(torch.bfloat16).eps)


def _digest(A: Tensor, B: Tensor) -> str:
    return tensor_fingerprint(A) + tensor_fingerprint(B)
