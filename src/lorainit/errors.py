"""The errors a user can cause. Each message names what is wrong, where, and what to do."""

from __future__ import annotations


class LoraInitError(ValueError):
    """A wrong input: an unknown method or option, a model without LoRA, a file that is no adapter, ..."""


class UnsupportedLayerError(LoraInitError):
    """A LoRA layer that the chosen method cannot start; the message names the layer and the reason."""


class NonFiniteError(LoraInitError):
    """A NaN or an infinity in a weight, a statistic or a result; the message names the layer."""


class EndpointError(LoraInitError):
    """An endpoint that is down, refuses the key or does not know the model; what it had answered is kept."""
