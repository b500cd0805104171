"""How a model reads a batch: as one sequence or as an encoder's and a decoder's, and whether it shifts the labels."""

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
    """Say whether a model is an encoder-decoder, whose decoder reads other positions than its encoder."""
    return any(_is_encoder_decoder(written) for written in _as_written(model))


def shifts_labels(model: nn.Module) -> bool:
    """Say whether labels are shifted inside the model: the logits of a position score the next one."""
    names = [type(written).__name__ for written in _as_written(model) if not _is_encoder_decoder(written)]
    return any(name not in _UNSHIFTED and any(part in name for part in _LANGUAGE_MODELS) for name in names)


def _is_encoder_decoder(written: nn.Module) -> bool:
    return bool(getattr(getattr(written, "config", None), "is_encoder_decoder", False))


def _as_written(model: nn.Module) -> list[nn.Module]:
    """Return the Transformers models that PEFT, torch.compile, DDP or a module of one's own wraps, as they are.

    Where there is none it is the model itself, out of PEFT and torch.compile.
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
