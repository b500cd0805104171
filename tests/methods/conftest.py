"""What the tests of the methods share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lorainit import LoraSite, find_sites


@pytest.fixture(scope="session")
def site() -> Callable[..., LoraSite]:
    """Return a maker of one LoRA layer named ``block.proj`` around a given weight."""

    def make(weight: Tensor, rank: int, *, alpha: float | None = None, use_rslora: bool = False) -> LoraSite:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight)
        model = nn.ModuleDict({"block": nn.ModuleDict({"proj": linear})})
        config = LoraConfig(r=rank, lora_alpha=alpha or rank, use_rslora=use_rslora, target_modules=["proj"])
        sites, _ = find_sites(get_peft_model(model, config))
        return sites[0]

    return make


@pytest.fixture
def generator() -> torch.Generator:
    """Return a fresh seeded generator, as a layer gets one."""
    return torch.Generator().manual_seed(0)
