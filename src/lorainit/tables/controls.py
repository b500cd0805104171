"""Starts that tell what a start trained beforehand is worth: a gain could be the teacher's, or mere size."""

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
    """The factors of a trained adapter, to be trained on; heads are fresh, as everywhere.

    Attributes:
        folder: where the adapter lies; of the same rank.
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
    """Kaiming's A, and a normal B scaled so that ‖sBA‖ = size·‖W‖.

    Attributes:
        sizes: {layer: size}, such as the drift that a report of ABM-LoRA tells.
    """

    sizes: dict[str, float] = dataclasses.field(default_factory=dict)

    info: ClassVar = MethodInfo(name="random-b", summary="random B", paper="control", product="step")

    def start(self, site: LoraSite, generator: torch.Generator) -> Factors:
        """Return A and the scaled B; a size of zero gives B = 0."""
        A, _ = kaiming.factors(site.out_features, site.in_features, site.rank, generator=generator)
        B = torch.randn(site.out_features, site.rank, generator=generator)
        return Factors(A, B * (self.sizes[site.name] * site.weight_norm / (site.scaling * product_norm(A, B))))


CONTROLS: dict[str, type[Method]] = {"continue": Continue, "random-b": RandomB}
