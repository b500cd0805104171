"""The two factors of one adapter."""

from __future__ import annotations

from typing import NamedTuple

from .._typing import Float, Tensor


class Factors(NamedTuple):
    """The start of one adapter, in PEFT's orientation: the layer adds ``scaling * B @ A @ x``."""

    A: Float[Tensor, "r in"]
    B: Float[Tensor, "out r"]
