"""Reference values from the methods' published code (``../shared/golden``), and the metrics their tolerances mean."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

SHARED = Path(__file__).resolve().parents[2] / "shared"
ABSENT = f"needs the reference values and data in {SHARED}, which are not part of the repository"


@dataclasses.dataclass(frozen=True)
class Case:
    """One stored case: its tensors by short name, its hyper-parameters, and what may deviate by how much."""

    file: str
    name: str
    options: dict[str, Any]
    derived: dict[str, Any]
    tolerances: dict[str, float]

    @property
    def tensors(self) -> dict[str, Tensor]:
        prefix = f"{self.name}."
        return {k.removeprefix(prefix): v for k, v in _tensors(self.file).items() if k.startswith(prefix)}


def cases(file: str, prefix: str = "") -> list[Any]:
    """Return the cases of a file whose name starts with ``prefix`` as parameters; one skipped where it is absent."""
    path = SHARED / "golden" / f"{file}.json"
    if not path.is_file():
        return [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=ABSENT))]
    spec = json.loads(path.read_text())
    params = []
    for name, case in spec["cases"].items():
        low = "bfloat16" in {tensor["dtype"] for tensor in case["tensors"].values()}
        tolerances = spec["tolerances_bf16_cases" if low else "tolerances"]
        if name.startswith(prefix):
            found = Case(file, name, case["hyper_parameters"], case.get("derived", {}), tolerances)
            params.append(pytest.param(found, id=name))
    return params


@functools.cache
def _tensors(file: str) -> dict[str, Tensor]:
    return safetensors.torch.load_file(SHARED / "golden" / f"{file}.safetensors")


def entries(x: Tensor, golden: Tensor) -> float:
    """Return the largest deviation of an entry, relative to the largest entry."""
    return float((x.double() - golden.double()).abs().max() / golden.double().abs().max())


def product(A: Tensor, B: Tensor, golden_A: Tensor, golden_B: Tensor) -> float:
    """Return the relative Frobenius distance of two products."""
    expected = golden_B.double() @ golden_A.double()
    return float((B.double() @ A.double() - expected).norm() / expected.norm())


def vectors(x: Tensor, golden: Tensor) -> float:
    """Return the relative distance of the worst row, each with its better sign."""
    x, golden = x.double(), golden.double()
    gaps = [(sign * x - golden).norm(dim=1) for sign in (1, -1)]
    return float((gaps[0].minimum(gaps[1]) / golden.norm(dim=1)).max())


def function(base_weight: Tensor, A: Tensor, B: Tensor, scaling: float, weight: Tensor) -> float:
    """Return how far base + s·BA is from the original weight, relative to its largest entry."""
    return entries(base_weight.double() + scaling * B.double() @ A.double(), weight)


def subspace(x: Tensor, golden: Tensor) -> float:
    """Return the spectral norm of the difference of the projectors onto two row spaces."""
    frames = [torch.linalg.qr(rows.double().mT).Q for rows in (x, golden)]
    return float(torch.linalg.matrix_norm(frames[0] @ frames[0].mT - frames[1] @ frames[1].mT, 2))
