"""Recognizes models that read a batch in their own way: encoder-decoders, and those that shift the labels."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

_LANGUAGE_MODELS = ("CausalLM", "LMHeadModel", "DoubleHeadsModel", "ForConditionalGeneration")
# decoders of an encoder-decoder on their own, and permuted or masked models: they take labels that are shifted already
_UNSHIFTED_DECODERS = ("Bart", "BigBirdPegasus", "Blenderbot", "Marian", "Mvp", "Pegasus", "PLBart", "ProphetNet")
_UNSHIFTED_DECODERS += ("BlenderbotSmall", "CpmAnt", "MBart", "TrOCR", "Whisper")
_UNSHIFTED = {f"{name}ForCausalLM" for name in _UNSHIFTED_DECODERS}
_UNSHIFTED |= {"FlaubertWithLMHeadModel", "XLMWithLMHeadModel", "XLNetLMHeadModel"}


def is_encoder_decoder(model: nn.Module) -> bool:
    """Say whether a model is an encoder-decoder: the decoder's positions are not the encoder's."""
    return any(_is_encoder_decoder(part) for part in _transformers_models(model))


def shifts_labels(model: nn.Module) -> bool:
    """Say whether labels are shifted inside the model: the logits of a position score the next one."""
    names = [type(part).__name__ for part in _transformers_models(model) if not _is_encoder_decoder(part)]
    return any(name not in _UNSHIFTED and any(part in name for part in _LANGUAGE_MODELS) for name in names)


def _is_encoder_decoder(part: nn.Module) -> bool:
    return bool(getattr(getattr(part, "config", None), "is_encoder_decoder", False))


def _transformers_models(model: nn.Module) -> list[nn.Module]:
    """Return the Transformers models inside wrappers such as PEFT, torch.compile, DDP or a module of the user's.

    Where there is none: the model itself, without PEFT and torch.compile.
    """
    if found := list(_outermost(model)):
        return found
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    return [getattr(base, "_orig_mod", base)]


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)
