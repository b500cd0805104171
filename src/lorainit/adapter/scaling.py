r"""The same start at another scale: A·c, B·c, s/c².

s·BA and the subspaces of A and B stay as they are, and Adam's trajectory of s·BA at the learning rate c·η is the one
that the original start has at η (LoRAM, arXiv:2507.06558, Prop. 1 with a = b = c): every gradient is divided by c,
which Adam's step, η·m/√v, does not notice, so that A and B, c times as large, move c times as far.
`initialize(..., match_lr=True)` takes c = 1/ρ from `lorainit.numerics.update_size.rate_ratio`, layer by layer: the
rate that suits vanilla LoRA then suits this start.

It is exact for ε → 0, without weight decay (AdamW's λ at the rate c·η decays c times as fast) and without clipping by
the global norm (which weighs layers by their gradients, and those are divided by c). For SGD it would take c²·η.

The scaling lives in three places that have to agree: the layer (``scaling``, ``lora_alpha``) and the config's
``alpha_pattern``, from which every later loading rebuilds it.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..errors import LoraInitError
from ..numerics.linalg import to_double
from ..numerics.update_size import rate_ratio
from . import offset
from .sites import LoraSite, Owner, lora_layers, owners, pattern_name
from .undo import Undo

_MARK = "_user_scalings"  # in the config's __dict__, no field: PEFT neither saves nor compares it


@dataclasses.dataclass(frozen=True)
class Scalings:
    """What the user gave an adapter.

    Attributes:
        by_layer: s by layer: by its path in the whole model; in a config, by the name that it is saved with.
        alpha_pattern: of the config; None while it holds nothing else.
    """

    by_layer: dict[str, float]
    alpha_pattern: dict[str, Any] | None = None


def begin(model: nn.Module, adapter_name: str, undo: Undo, *, needed: bool) -> Scalings | None:
    """Give every layer the scaling that its user gave it, which an earlier start may have changed.

    From here on ``undo`` knows the adapter's config and scalings, whatever becomes of them.

    Returns:
        Those scalings; None where the model holds no config to save others in.

    Raises:
        LoraInitError: the scalings are going to be changed (``needed``), and there is no such config.
    """
    layers, found = lora_layers(model, adapter_name), owners(model, adapter_name)
    if needed:
        _check_can_match(model, adapter_name, layers, found)
    if not found:
        return None
    undo.remember_config(model, adapter_name)  # `mark_started` puts another in its place
    for _, layer in layers:
        _remember(layer, adapter_name, undo)
    for owner in found:
        before: Scalings | None = owner.configs[adapter_name].__dict__.get(_MARK)
        if before is not None:
            _replace_config(owner, adapter_name, before.alpha_pattern, None)
            for name, _, layer in owner.layers:
                _set(layer, adapter_name, before.by_layer[name])
    return Scalings({name: layer.scaling[adapter_name] for name, layer in layers})


def _check_can_match(
    model: nn.Module, adapter_name: str, layers: list[tuple[str, LoraLayer]], found: list[Owner]
) -> None:
    """Raise if the scaling of a layer cannot be changed for good."""
    held = {id(layer) for owner in found for _, _, layer in owner.layers}
    if any(id(layer) not in held for _, layer in layers):
        raise LoraInitError(
            f"match_lr changes the scaling of each layer, and {type(model).__name__} holds no LoraConfig for "
            f"adapter '{adapter_name}' to save it in; pass the PeftModel, or the model that has add_adapter"
        )
    if any(getattr(owner.configs[adapter_name], "lora_bias", False) for owner in found):
        raise LoraInitError("match_lr does not go with lora_bias=True: the bias would train at another rate")


def match(site: LoraSite) -> float | None:
    """Re-express a started layer at ρ·η and return ρ; None where it cannot train, which is refused elsewhere."""
    try:
        ratio = rate_ratio(*site.factors(), site.scaling)
    except ValueError:
        return None
    express(site, ratio, site.scaling * ratio**2)
    return ratio


def express(site: LoraSite, ratio: float, scaling: float) -> None:
    """Re-express a layer as A/ρ, B/ρ and ``scaling``, which is ρ²s, computed as it is again at a later loading.

    An offset is divided with the factors: B A − B₀A₀ at step 0 stays the exact zero that it was.
    """
    if ratio == 1:
        return
    _set(site.layer, site.adapter, scaling)
    with torch.no_grad():
        for module in (site.lora_A, site.lora_B):
            factors = [offset.trained_factor(module), *([module.offset] if offset.is_attached(module) else [])]
            for factor in factors:
                factor.copy_((to_double(factor) / ratio).to(factor))


def scale(site: LoraSite, ratio: float) -> None:
    """Multiply the scaling of a layer by ρ²: its factors are to be divided by ρ."""
    _set(site.layer, site.adapter, site.scaling * ratio**2)


def finish(model: nn.Module, adapter_name: str, user: Scalings | None) -> None:
    """Write the layers' alphas into (copies of) the configs, and remember what the user gave."""
    if user is None:
        return
    for owner in owners(model, adapter_name):
        changed = {
            "^" + re.escape(pattern_name(name, layer)): layer.lora_alpha[adapter_name]
            for name, path, layer in owner.layers
            if layer.scaling[adapter_name] != user.by_layer[path]
        }
        if changed:
            given = {name: user.by_layer[path] for name, path, _ in owner.layers}
            pattern = dict(owner.configs[adapter_name].alpha_pattern or {})
            # PEFT takes the first pattern that fits
            ours = changed | {k: v for k, v in pattern.items() if k not in changed}
            _replace_config(owner, adapter_name, ours, Scalings(given, pattern))


def user_scaling(model: nn.Module, site: LoraSite) -> float:
    """Return the scaling that the user gave a layer, whatever a start has made of it."""
    for owner in owners(model, site.adapter):
        user: Scalings | None = owner.configs[site.adapter].__dict__.get(_MARK)
        for name, _, layer in owner.layers if user is not None else ():
            if layer is site.layer and user is not None:
                return float(user.by_layer[name])
    return site.scaling


def _set(layer: LoraLayer, adapter_name: str, scaling: float) -> None:
    """Set the scaling of a layer, and alpha with it (α = s·r, or s·√r under rsLoRA)."""
    if scaling != layer.scaling[adapter_name]:
        layer.lora_alpha[adapter_name] = tidy(layer.lora_alpha[adapter_name] * scaling / layer.scaling[adapter_name])
        layer.scaling[adapter_name] = scaling


def _remember(layer: LoraLayer, adapter_name: str, undo: Undo) -> None:
    """Note the scaling and the alpha of a layer."""
    scaling, alpha = layer.scaling[adapter_name], layer.lora_alpha[adapter_name]

    def put_back() -> None:
        layer.scaling[adapter_name], layer.lora_alpha[adapter_name] = scaling, alpha

    undo.call(put_back)


def _replace_config(
    owner: Owner, adapter_name: str, alpha_pattern: dict[str, Any] | None, mark: Scalings | None
) -> None:
    """Put a changed copy in the config's place: the user may have given the same config to other models."""
    new = copy.copy(owner.configs[adapter_name])
    new.alpha_pattern = dict(alpha_pattern or {})
    new.__dict__.pop(_MARK, None)
    if mark is not None:
        new.__dict__[_MARK] = mark
    owner.configs[adapter_name] = new


def tidy(alpha: float) -> int | float:
    """Return alpha as the integer it should be where only rounding keeps it from one."""
    return round(alpha) if abs(alpha - round(alpha)) <= 1e-9 * max(1.0, abs(alpha)) else alpha
