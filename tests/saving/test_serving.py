"""What servers ask of an adapter: the remarks at the start, and the files against the servers' rules."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import cases
import lorainit
from cases import GPT2, LLAMA, TIED
from lorainit.report import LayerReport
from lorainit.saving.serving import remarks


def row(rank, base="offset", scaling=1.0):
    return LayerReport("x", "linear", (4096, 4096), rank, scaling, base, 1.0, 0.0)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row(8)], None),
        ([row(8), row(8)], None),
        ([row(16)], "rank 32: vLLM needs max_lora_rank=32"),
        ([row(12)], "rank 24: vLLM needs max_lora_rank=32"),
        ([row(64, "subtract")], "rank 128: vLLM needs max_lora_rank=128"),
        ([row(200)], "rank 400: vLLM needs max_lora_rank=512"),
        ([row(300)], "rank 600: vLLM serves at most 512"),
        ([row(64, "none")], None),
        ([row(64, "keep")], None),
        ([row(8), row(0, "none")], None),
        ([row(8), row(8, "none")], "layers differ in rank or scaling .rank 8 at s = 1, rank 16 at s = 1"),
        ([row(8, scaling=2.0), row(8)], "layers differ .*one rank and one scaling for all"),
    ],
)
def test_remarks(rows, expected):
    found = remarks(rows)
    assert len(found) == (expected is not None)
    assert expected is None or re.search(expected, found[0])


def test_they_stand_in_the_report():
    report = cases.start(LLAMA.adapted(r=12, target_modules=["q_proj"]), "pissa")
    assert "max_lora_rank=32" in str(report)
    assert cases.start(LLAMA.adapted(r=8), "pissa").warnings == ()


@pytest.mark.parametrize("case", [LLAMA, GPT2, TIED], ids=lambda case: case.name)
@pytest.mark.parametrize("method", ["kaiming", "pissa", "corda", "lora-one"])
def test_a_saved_adapter_is_what_vllm_and_llama_cpp_read(method, case, tmp_path):
    """As vLLM's PEFTHelper and llama.cpp's convert_lora_to_gguf.py read it: one r, one alpha, pairs of A and B."""
    model = case.adapted()
    cases.start(model, method, data=case.batches())
    cases.train(model, case.batches())
    lorainit.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None and not config["use_dora"] and config["bias"] == "none"
    assert config["init_lora_weights"] is True
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    base = dict(case.base().named_modules())
    for key, A in tensors.items():
        name = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", key)
        assert name, key
        if name[2] == "B":
            continue
        B = tensors[key.replace("lora_A", "lora_B")]
        assert A.shape[0] == B.shape[1] == config["r"]
        layer = model.get_submodule(f"base_model.model.{name[1]}")
        delta = (config["lora_alpha"] / config["r"]) * B.float() @ A.float()  # the scaling that both compute
        expected = layer.get_delta_weight("default").float()
        torch.testing.assert_close(delta.T if case is GPT2 else delta, expected, rtol=1e-4, atol=1e-5)
        assert name[1] in base
