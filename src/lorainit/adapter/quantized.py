"""Quantized base layers: what their weight is in floating point, and how to run them so that gradients flow.

Known are bitsandbytes (4 and 8 bit), torchao and HQQ: PEFT can dequantize these. For the other kinds that PEFT adapts
(GPTQ, AWQ, AQLM, EETQ, ...) it has no way from the layer to a weight.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Iterator
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

_BITSANDBYTES = ("Params4bit", "Int8Params")


def is_quantized(module: nn.Module) -> bool:
    """Say whether a layer holds a quantized weight that `dequantized` can read."""
    if hasattr(module, "W_q"):  # HQQ
        return True
    weight = getattr(module, "weight", None)
    return type(weight).__name__ in _BITSANDBYTES or type(weight).__module__.startswith("torchao.")


def misread_by_peft(module: nn.Module) -> bool:
    """Say whether PEFT's own ``dequantize_module_weight``, which DoRA calls in every forward pass, goes wrong here."""
    weight = getattr(module, "weight", None)
    return type(weight).__name__ in _BITSANDBYTES and isinstance(weight, Tensor) and weight.device.type == "cpu"


def dequantized(module: nn.Module) -> Tensor:
    """Return the weight of a quantized layer, out×in in floating point; the layer is not touched.

    PEFT's ``dequantize_module_weight`` puts a new parameter into a bitsandbytes layer on the CPU, without the scales of
    an 8-bit one (which then cannot run), and misreads 4-bit weights that inference has repacked: so not that one.

    Raises:
        ValueError: the layer has not been quantized yet, or its kind of weight cannot be dequantized.
    """
    layer: Any = module
    if hasattr(layer, "W_q"):
        return layer.dequantize().detach()
    weight = layer.weight
    kind = type(weight).__name__
    if kind not in _BITSANDBYTES:
        try:
            return weight.dequantize().detach()
        except NotImplementedError as error:
            raise ValueError(f"weights of type {kind} cannot be dequantized") from error
    if kind == "Params4bit":
        if weight.quant_state is None:
            raise ValueError("its 4-bit weight has not been quantized yet; move the model to its device first")
        return _dequantized_4bit(weight)
    if weight.dtype != torch.int8:  # has_fp16_weights, or not moved to a device yet
        return weight.detach()
    scales = layer.state.SCB if layer.state.SCB is not None else weight.SCB
    if scales is None:
        raise ValueError("its 8-bit weight has lost its scales (PEFT's dequantize_module_weight does that on the CPU)")
    return dequantize_bnb_weight(weight, state=types.SimpleNamespace(SCB=scales)).detach()


@contextlib.contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Keep 4-bit weights of bitsandbytes in their usual layout; put them back as they were.

    On a CPU with AVX512-BF16 a layer in eval mode repacks its weight in place at the first inference. From then on no
    gradient passes through it, and ``state_dict()`` quantizes its scales anew, in place, with other values.
    """
    # PEFT's wrappers show the weight of what they wrap; older versions of bitsandbytes do not repack
    layers: list[Any] = [m for m in model.modules() if "support_avx512bf16_for_cpu" in vars(m)]
    weights = [layer.weight for layer in layers]
    before = [(m, w, w.data, w.quant_state, m.support_avx512bf16_for_cpu) for m, w in zip(layers, weights, strict=True)]
    try:
        for layer in layers:
            layer.support_avx512bf16_for_cpu = False
            if _is_packed(layer.weight):
                layer.weight.data, layer.weight.quant_state = _in_usual_layout(layer.weight)
        yield
    finally:
        for layer, weight, data, state, packs in before:  # a merge has given the layer another weight
            weight.data, weight.quant_state = data, state
            layer.support_avx512bf16_for_cpu = packs


def _is_packed(weight: Any) -> bool:
    return bool(getattr(weight.quant_state, "packing_format_for_cpu", False))


def _in_usual_layout(weight: Any) -> tuple[Tensor, Any]:
    """Return data and state in the usual layout, the scales with the bfloat16 that packing has rounded them to."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(weight.quant_state)
    state.original_nested = False  # so that the scales are not quantized a second time, with other values
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)  # writes to the state
    state.absmax = state.absmax.T.reshape(-1).float()
    return data, state


def _dequantized_4bit(weight: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    data, state = _in_usual_layout(weight) if _is_packed(weight) else (weight.data, weight.quant_state)
    return dequantize_4bit(data, state).detach()
