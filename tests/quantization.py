"""A tiny LLaMA and its quantized versions, for the tests of quantized bases."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cases import Case, _token_labels, _tokens, llama, seeded

# two quantization blocks a row, rows in blocks of 32: what bitsandbytes repacks on a CPU with AVX512-BF16
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_key_value_heads": 2}
TARGETS = ("q_proj", "gate_proj", "up_proj")
FULL = Case("full", lambda: llama(**SIZES), TARGETS, _tokens, _token_labels)
KINDS = ("nf4", "nf4-double", "int8", "torchao-int8", "torchao-int4")
each_kind = pytest.mark.parametrize("kind", KINDS)


def _config(kind: str) -> Any:
    import transformers

    if kind.startswith("nf4"):
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": kind == "nf4-double"}
        return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options)
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    from torchao import quantization as ao

    weights = {
        "torchao-int8": ao.Int8WeightOnlyConfig(),
        "torchao-int4": ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
    }
    return transformers.TorchAoConfig(quant_type=weights[kind])


def save_full(folder: Path) -> Path:
    """Write the unquantized model."""
    FULL.base().save_pretrained(folder)
    return folder


def quantized_base(kind: str, folder: Path) -> nn.Module:
    """Load the model of `save_full`, quantized."""
    import transformers

    if kind.startswith("torchao"):
        pytest.importorskip("torchao")
    else:
        pytest.importorskip("bitsandbytes")
    with warnings.catch_warnings(), seeded():
        warnings.simplefilter("ignore")
        options: dict[str, Any] = {"quantization_config": _config(kind), "device_map": "cpu", "dtype": torch.float32}
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
