r"""The same start at another scale: A·c, B·c, s/c².

s·BA and the subspaces of A and B stay as they are, and Adam's trajectory of s·BA at the learning rate c·η is the one
that the original start has at η (LoRAM, arXiv:2507.06558, Prop. 1 with a = b = c): every gradient is divided by c,
which Adam's step, η·m/√v, does not notice, so that A and B, c times as large, move c times as far.
`initialize(..., match_lr=True)` takes c = 1/ρ from `lorainit.diagnostics.magnitude.rate_ratio`, layer by layer: the
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

from peft import LoraConfig
from torch import nn

from .apply import Undo
from .errors import LoraInitError
from .sites import LoraSite, lora_layers, pattern_name

_MARK = "_user_scalings"  # in the config's __dict__, no field: PEFT neither saves nor compares it


@dataclasses.dataclass(frozen=True)
class Scalings:
    """The scalings that the user gave an adapter.

    Attributes:
        alpha_pattern: of the config.
        alphas: ``lora_alpha`` by layer name.
        scalings: s by layer name.
    """

    alpha_pattern: dict[str, Any]
    alphas: dict[str, float]
    scalings: dict[str, float]


def begin(model: nn.Module, adapter_name: str, undo: Undo, *, needed: bool) -> Scalings | None:
    """Give every layer the scaling that its user gave it, which an earlier start may have changed.

    Returns:
        Those scalings; None where the model holds no config to save others in.

    Raises:
        LoraInitError: the scalings are going to be changed (``needed``), and there is no such config.
    """
    config = _config(model, adapter_name)
    if config is None:
        if needed:
            raise LoraInitError(
                f"match_lr changes the scaling of each layer, and {type(model).__name__} holds no LoraConfig for "
                f"adapter '{adapter_name}' to save it in; pass the PeftModel, or the model that has add_adapter"
            )
        return None
    layers = lora_layers(model, adapter_name)
    if needed and getattr(config, "lora_bias", False):
        raise LoraInitError("match_lr does not go with lora_bias=True: the bias would train at another rate")
    user = config.__dict__.get(_MARK) or Scalings(
        dict(config.alpha_pattern or {}),
        {name: layer.lora_alpha[adapter_name] for name, layer in layers},
        {name: layer.scaling[adapter_name] for name, layer in layers},
    )
    for name, layer in layers:
        undo.remember_scaling(layer, adapter_name)
        layer.scaling[adapter_name], layer.lora_alpha[adapter_name] = user.scalings[name], user.alphas[name]
    return user


def scale(site: LoraSite, ratio: float) -> None:
    """Multiply the scaling of a layer by ρ²: its factors are to be divided by ρ."""
    site.layer.scaling[site.adapter] *= ratio**2
    site.layer.lora_alpha[site.adapter] *= ratio**2


def finish(model: nn.Module, adapter_name: str, user: Scalings | None) -> None:
    """Write the layers' alphas into (a copy of) the config, and remember the user's."""
    config = _config(model, adapter_name)
    if user is None or config is None:
        return
    changed = {
        "^" + re.escape(pattern_name(name, layer)): layer.lora_alpha[adapter_name]
        for name, layer in lora_layers(model, adapter_name)
        if layer.lora_alpha[adapter_name] != user.alphas[name]
    }
    if not changed and _MARK not in config.__dict__:
        return
    config = copy.copy(config)  # the user may have given the same one to other models
    # PEFT takes the first pattern that fits
    config.alpha_pattern = changed | {k: v for k, v in user.alpha_pattern.items() if k not in changed}
    config.__dict__.pop(_MARK, None)
    if changed:
        config.__dict__[_MARK] = user
    model.peft_config[adapter_name] = config  # pyright: ignore[reportIndexIssue, reportArgumentType]


def user_scaling(model: nn.Module, site: LoraSite) -> float:
    """Return the scaling that the user gave a layer, whatever a start has made of it."""
    config = _config(model, site.adapter)
    user = config.__dict__.get(_MARK) if config is not None else None
    return float(user.scalings[site.name]) if user else site.scaling


def _config(model: nn.Module, adapter_name: str) -> LoraConfig | None:
    configs = getattr(model, "peft_config", None)
    config = configs.get(adapter_name) if isinstance(configs, dict) else None
    return config if isinstance(config, LoraConfig) else None
