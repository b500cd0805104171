"""Writes a start into an adapter: the factors, and what is done about the base."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import LoraInitError, NonFiniteError, UnsupportedLayerError
from ..machine import sharding
from . import offset
from .factors import Factors
from .sites import LoraSite, config_holders, site_name
from .undo import Undo

Base = Literal["keep", "offset", "subtract"]


def write_start(site: LoraSite, start: Factors, base: Base, undo: Undo) -> bool:
    """Write a start into the adapter and treat the base as asked; return whether an offset or edit was needed.

    The factors are rounded to the adapter's dtype *first*: A₀, B₀ are the stored values, so the offset cancels them to
    the last bit and a subtraction removes what the adapter really adds. Where B₀A₀ = 0 because a factor is zero, there
    is nothing to offset and the adapter stays plain.

    Raises:
        NonFiniteError: the start holds NaN or infinity, possibly only in the adapter's dtype.
        UnsupportedLayerError: A = B = 0 in the adapter's dtype: neither would ever get a gradient.
        LoraInitError: the adapter's bias or DoRA magnitude has been trained.
    """
    pair = (site.lora_A, site.lora_B)
    trained = [offset.trained_factor(module) for module in pair]
    stored = [factor.to(old.device, old.dtype).reshape(old.shape) for factor, old in zip(start, trained, strict=True)]
    largest = [float(factor.abs().max()) for factor in stored]  # one read serves every check; NaN stays NaN
    _check_start(site, *largest)
    undo.remember_adapter(site)
    if _has_magnitude(site):
        undo.remember_tensor(_magnitude(site))
    offset.detach(*pair)
    with torch.no_grad():
        for parameter, factor in zip(trained, stored, strict=True):
            parameter.copy_(sharding.cut_like(factor, parameter))
        held = base != "keep" and 0 not in largest
        if held and base == "subtract":
            _subtract(site, undo)
            _refresh_magnitude(site)
        if held:
            offset.attach(*pair, base_edited=base == "subtract", experts=site.experts)
        if base != "subtract" or not held:
            _refresh_magnitude(site)
    return held


def write_factors(site: LoraSite, factors: Factors) -> None:
    """Write factors into an adapter that has been started, and is remembered, already; an offset stays as it is.

    Raises:
        NonFiniteError: they are not finite in the adapter's dtype.
        UnsupportedLayerError: both are zero there.
    """
    trained = [offset.trained_factor(module) for module in (site.lora_A, site.lora_B)]
    stored = [factor.to(old.device, old.dtype).reshape(old.shape) for factor, old in zip(factors, trained, strict=True)]
    if not all(bool(torch.isfinite(factor).all()) for factor in stored):
        raise NonFiniteError(f"layer '{site.name}': the start is not finite in the adapter's {trained[0].dtype}")
    if not any(bool(factor.any()) for factor in stored):
        raise UnsupportedLayerError(f"layer '{site.name}': the start is dead: A = B = 0 in the adapter's dtype")
    with torch.no_grad():
        for parameter, factor in zip(trained, stored, strict=True):
            parameter.copy_(sharding.cut_like(factor, parameter))
        _refresh_magnitude(site)


def _has_magnitude(site: LoraSite) -> bool:
    return site.adapter in site.layer.lora_magnitude_vector


def _magnitude(site: LoraSite) -> nn.Parameter:
    return site.layer.lora_magnitude_vector[site.adapter].get_parameter("weight")


def _refresh_magnitude(site: LoraSite) -> None:
    """Set DoRA's magnitude to the row norms of W + s·BA, so that at step 0 it changes nothing.

    PEFT does this when it makes an adapter, from the factors of that moment.
    """
    if not _has_magnitude(site):
        return
    norms = _row_norms(site)
    zero = int((norms == 0).sum())
    if zero:
        raise UnsupportedLayerError(
            f"layer '{site.name}': {zero} rows of the weight are zero (those of padding tokens, in a tied output "
            "layer), and DoRA divides by their norm"
        )
    _magnitude(site).copy_(norms)


def _row_norms(site: LoraSite, *, with_update: bool = True) -> Tensor:
    """Return the row norms of W + s·BA, or of W, as PEFT's forward pass computes them, to the last bit."""
    A, B = offset.update_factors(site.lora_A, site.lora_B)
    weight = site.stored_weight()
    if site.kind != "linear":  # as it lies in the layer
        weight = site.base_layer.get_parameter("weight").detach()
    update = (B.flatten(1) @ A.flatten(1)).to(weight.dtype) * with_update
    dora: Any = site.layer.lora_magnitude_vector[site.adapter]
    norms = dora.get_weight_norm(weight, update.reshape(weight.shape) if site.kind == "conv" else update, site.scaling)
    return norms.detach().reshape(_magnitude(site).shape)


def _check_start(site: LoraSite, largest_A: float, largest_B: float) -> None:
    """Raise unless the factors, as the adapter would hold them, can train and are all that the adapter adds.

    Args:
        site: the layer.
        largest_A: the largest magnitude in A.
        largest_B: the largest magnitude in B.
    """
    dtype = offset.trained_factor(site.lora_A).dtype
    if not (math.isfinite(largest_A) and math.isfinite(largest_B)):
        raise NonFiniteError(f"layer '{site.name}': the start is not finite in the adapter's {dtype}")
    if largest_A == largest_B == 0:
        raise UnsupportedLayerError(
            f"layer '{site.name}': the start is dead: A = B = 0 in the adapter's {dtype} would never train; "
            "is the weight zero?"
        )
    bias = getattr(site.lora_B, "bias", None)
    if bias is not None and bool(bias.any()):
        raise LoraInitError(f"layer '{site.name}': lora_B has a trained bias; start from a fresh adapter")
    if _has_magnitude(site):
        magnitude = _magnitude(site).detach()
        untrained = [_row_norms(site, with_update=with_update) for with_update in (True, False)]
        # PEFT computed it in the base's precision
        rounding = 8 * max(torch.finfo(t.dtype).eps for t in (*untrained, magnitude))
        if not any(torch.allclose(magnitude.to(norms), norms, rtol=rounding, atol=0) for norms in untrained):
            raise LoraInitError(
                f"layer '{site.name}': DoRA has a trained magnitude (not the norm of the base weight and the update); "
                "start from a fresh adapter"
            )


def check_can_subtract(model: nn.Module, sites: list[LoraSite]) -> None:
    """Raise if a base weight cannot be edited without side effects: quantized, shared, or saved with the adapter."""
    of_tokens = [table for part in (model, *(m for _, m, _ in config_holders(model))) for table in _embeddings(part)]
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    for site in sites:
        if site.kind == "experts":
            raise UnsupportedLayerError(
                f"layer '{site.name}': base='subtract' does not edit expert parameters; use base='offset'"
            )
        weight = getattr(site.base_layer, "weight", None)
        if not (isinstance(weight, Tensor) and weight.dtype.is_floating_point and type(weight) is nn.Parameter):
            raise UnsupportedLayerError(
                f"layer '{site.name}': base='subtract' cannot edit a {type(site.base_layer).__name__}; "
                "use base='offset'"
            )
        if type(site.layer.lora_variant.get(site.adapter)).__name__.startswith("ALora"):
            raise UnsupportedLayerError(
                f"layer '{site.name}': base='subtract' changes what the layer does to every token, an "
                "ALoraLinearVariant only to those after its invocation; use base='offset'"
            )
        own = f"{site.name}.base_layer.weight"
        others = [name for name in holders.get(id(weight), []) if site_name(name) != own]
        if others:
            raise UnsupportedLayerError(
                f"layer '{site.name}': base='subtract' would also edit {', '.join(others)}, which shares its weight; "
                "use base='offset'"
            )
        if any(site.layer is table for table in of_tokens):
            raise UnsupportedLayerError(
                f"layer '{site.name}': PEFT writes the weight of an adapted output layer into every checkpoint, where "
                "one that base='subtract' has edited would pass for the original; use base='offset'"
            )


def _embeddings(model: nn.Module) -> Iterator[nn.Module | None]:
    """Yield the embeddings that Transformers' models give; of something else than text there are none."""
    for get in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(NotImplementedError):
            yield getattr(model, get, lambda: None)()


def _subtract(site: LoraSite, undo: Undo) -> None:
    """Edit the base, W ← W − s·B₀A₀, from the stored factors in at least float32."""
    parameter = site.base_layer.get_parameter("weight")
    undo.remember_tensor(parameter)
    weight = site.weight()
    A, B = (factor.to(weight.dtype) for factor in site.factors())
    residual = torch.addmm(weight, B, A, alpha=-site.scaling)
    parameter.copy_(residual.T if site.kind == "conv1d" else residual.reshape(parameter.shape))
