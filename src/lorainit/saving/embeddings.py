"""The base weights in an adapter's state dict: PEFT adds that of an adapted embedding or output layer.

They are no part of an adapter, unless the vocabulary was resized since the base was loaded: the stored base lacks the
new rows then.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from ..adapter.sites import site_name
from .folder import PREFIX

_BASE_WEIGHT = ".base_layer.weight"


def adapter_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapter's tensors under the keys of an adapter file, whatever wraps the model.

    PEFT adds the base weight of an adapted embedding or output layer, which is no part of an adapter.
    """
    return {PREFIX + site_name(k): v for k, v in tensors.items() if not k.endswith(_BASE_WEIGHT)}


def base_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the base weights that PEFT adds, under the keys of an adapter file, but for quantized ones."""
    return {
        PREFIX + site_name(k): v for k, v in tensors.items() if k.endswith(_BASE_WEIGHT) and v.dtype.is_floating_point
    }


def is_same_to_rounding(a: Tensor, b: Tensor) -> bool:
    """Say whether two weights are one, in two precisions perhaps."""
    return a.shape == b.shape and (torch.equal(a.to(b), b) or torch.equal(b.to(a), a))


def resized_weights(tensors: dict[str, Tensor], source: str | None) -> dict[str, Tensor]:
    """Return the base weights that PEFT adds, of a vocabulary that is not the stored base's: it lacks their rows."""
    weights = base_weights(tensors)
    vocabulary = _stored_vocabulary(source) if weights else None
    return {key: weight for key, weight in weights.items() if vocabulary not in (None, weight.shape[0])}


def resized_embeddings(model: nn.Module, tensors: dict[str, Tensor], source: str | None) -> dict[str, Tensor]:
    """Return `resized_weights` and, where there are any, the other embedding: PEFT adds only the adapted one."""
    weights = resized_weights(tensors, source)
    if not weights:
        return {}
    embeddings = [getattr(model, get)() for get in ("get_input_embeddings", "get_output_embeddings")]
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.Linear)) and module in embeddings:
            weights[f"{PREFIX}{site_name(name)}.weight"] = module.weight
    return weights


def _stored_vocabulary(source: str | None) -> int | None:
    """Return how many tokens a base knows by its stored config; None where it has none."""
    if source is None:
        return None
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"the config of '{source}' cannot be read, so the weight of the adapted embedding is not saved with the "
            f"adapter, as if its vocabulary had not been resized: {error}",
            stacklevel=2,
        )
        return None
    return getattr(config.get_text_config(decoder=True), "vocab_size", None)
