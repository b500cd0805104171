"""Writes an adapter in the form that every server reads: one rank, one alpha, no rsLoRA, no patterns."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F

from ..adapter.scaling import tidy
from ..errors import LoraInitError
from .folder import PREFIX

_FACTORS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


def make_uniform(
    tensors: dict[str, Tensor], config: LoraConfig, ranks: dict[str, tuple[int, float]]
) -> tuple[dict[str, Tensor], LoraConfig]:
    """Return the same adapter with one rank and one scaling for all layers.

    Every layer's s·BA stays what it is: B takes s/s₀, s₀ the scaling that most layers have, and A and B are filled up
    with rows and columns of zeros to the highest rank. Where s/s₀ is no power of two, a half-precision B becomes
    float32, so that nothing is rounded away.

    Args:
        tensors: of the adapter, by PEFT's names.
        config: that goes with them.
        ranks: {layer: (rank, scaling)}.

    Raises:
        LoraInitError: a layer whose factors cannot be filled up (a stack of experts, a grouped convolution).
    """
    highest = max(rank for rank, _ in ranks.values())
    (common, _), *_ = Counter(scaling for _, scaling in ranks.values()).most_common(1)
    found = dict(tensors)
    for name, (rank, scaling) in ranks.items():
        pair = next((pair for pair in _FACTORS if f"{PREFIX}{name}.{pair[0]}" in tensors), None)
        a, b = (tensors[f"{PREFIX}{name}.{factor}"] for factor in pair) if pair else (None, None)
        fits = a is not None and b is not None and a.shape[0] == b.shape[1] == rank
        if not fits and (rank, scaling) != (highest, common):
            raise LoraInitError(
                f"layer '{name}' has rank {rank} at s = {scaling:g} where others have {highest} at {common:g}, and its "
                "factors are not one pair that could be filled up with zeros: give all layers one rank and one scaling"
            )
        if fits and pair is not None and a is not None and b is not None:
            found[f"{PREFIX}{name}.{pair[0]}"] = F.pad(a, (0, 0) * (a.dim() - 1) + (0, highest - rank))
            padded = F.pad(b, (0, 0) * (b.dim() - 2) + (0, highest - rank))
            found[f"{PREFIX}{name}.{pair[1]}"] = _scaled(padded, scaling / common)
    plain = copy.deepcopy(config)
    fields = {"r": highest, "lora_alpha": tidy(common * highest), "use_rslora": False}
    plain.__dict__.update(fields, rank_pattern={}, alpha_pattern={})
    return {name: tensor.contiguous() for name, tensor in found.items()}, plain


def _scaled(factor: Tensor, ratio: float) -> Tensor:
    """Return a factor times a number, in its dtype where that is exact."""
    exact = torch.tensor(ratio, dtype=torch.float64).frexp().mantissa.abs() == 0.5  # noqa: PLR2004 - a power of two
    if bool(exact) or factor.dtype.itemsize >= torch.float32.itemsize:
        return factor * ratio
    return factor.float() * ratio
