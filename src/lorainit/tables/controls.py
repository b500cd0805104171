"""Defines the controls for a start that was trained beforehand: its gain could be the teacher's, or due to its size."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from ..adapter.factors import Factors
from ..adapter.sites import LoraSite
from ..errors import LoraInitError
from ..methods import kaiming
from ..methods.method import Method, MethodInfo
from ..numerics.linalg import product_norm
from ..saving.folder import PREFIX, read_adapter


@dataclasses.dataclass(frozen=True)
class Continue(Method):
    """Starts with the factors of a trained adapter; heads are fresh, as in every other run.

    Attributes:
        folder: of the adapter, which has the same rank.
    """

    folder: str = ""

    info: ClassVar = MethodInfo(name="continue", summary="a trained adapter", paper="control", product="step")

    def start(self, site: LoraSite, generator: torch.Generator) -> Factors:
        """Return the folder's factors of this layer.

        Raises:
            LoraInitError: the folder has no such layer.
        """
        tensors = read_adapter(self.folder)[1]
        try:
            return Factors(*(tensors[f"{PREFIX}{site.name}.lora_{factor}.weight"] for factor in "AB"))
        except KeyError as error:
            raise LoraInitError(f"{self.folder} has no tensor {error} to continue from") from error


@dataclasses.dataclass(frozen=True)
class RandomB(Method):
    """Starts with Kaiming's A and a normal B that is scaled so that ‖sBA‖ = size·‖W‖.

    Attributes:
        sizes: {layer: size}, such as the drift in a report of ABM-LoRA.
    """

    sizes: dict[str, float] = dataclasses.field(default_factory=dict)

    info: ClassVar = MethodInfo(name="random-b", summary="random B", paper="control", product="step")

    def start(self, site: LoraSite, generator: torch.Generator) -> Factors:
        """Return A and the scaled B; a size of zero gives B = 0."""
        A, _ = kaiming.factors(site.out_features, site.in_features, site.rank, generator=generator)
        B = torch.randn(site.out_features, site.rank, generator=generator)
        return Factors(A, B * (self.sizes[site.name] * site.weight_norm / (site.scaling * product_norm(A, B))))


CONTROLS: dict[str, type[Method]] = {"continue": Continue, "random-b": RandomB}
