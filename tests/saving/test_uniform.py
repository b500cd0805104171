"""The uniform form gives the trained model's outputs under every reader's rules: PEFT's, vLLM's, llama.cpp's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

import cases
import lorainit
from cases import LLAMA
from lorainit import LoraInitError, find_sites
from lorainit.report import LayerReport
from lorainit.saving.serving import remarks

METHODS = [info.name for info in lorainit.available() if not {"weights"} & set(info.needs) and info.name != "auto"]
FORMS = {
    "plain": ({}, {}),
    "rslora": ({"use_rslora": True}, {}),
    "match_lr": ({}, {"match_lr": True}),
    "budget": ({}, {"ranks": "budget"}),
    "patterns": ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}, {}),
}


def trained(method: str, config: dict[str, Any], options: dict[str, Any]) -> PeftModel:
    """Start an adapter and move it, as a training does."""
    model = LLAMA.adapted(**config)
    started = lorainit.HRP(steps=2) if method == "hrp" else lorainit.ABMLoRA(steps=2) if method == "abm" else method
    data = LLAMA.batches() if next(i for i in lorainit.available() if i.name == method).needs_data else None
    cases.start(model, started, data=data, **options)
    with torch.no_grad(), cases.seeded(7):
        for site in find_sites(model)[0]:
            for module in (site.lora_A, site.lora_B):
                factor = lorainit.offset.trained_factor(module)
                factor.add_(0.05 * torch.randn_like(factor))
    return model.eval()


def served(folder: Path, rule: str) -> Any:
    """Return the base with the adapter added by a server's rule, from nothing but the folder."""
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), None
    tensors = load_file(folder / "adapter_model.safetensors")
    base = LLAMA.base()
    for key, b in tensors.items():
        if not key.endswith("lora_B.weight"):
            continue
        a = tensors[key.replace("lora_B", "lora_A")]
        # vLLM goes by the config's rank, llama.cpp by the tensor's own
        rank = config["r"] if rule == "vLLM" else a.shape[0]
        weight = base.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")).weight
        weight.data += config["lora_alpha"] / rank * (b @ a)
    return base.eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_every_reader_gets_the_trained_model(method, form, tmp_path) -> None:
    config, options = FORMS[form]
    info = next(i for i in lorainit.available() if i.name == method)
    if form == "budget" and not info.variable_ranks:
        pytest.skip(f"{method} has no variable ranks")
    model = trained(method, config, options)
    expected = cases.logits(model, LLAMA.batch())
    lorainit.save_pretrained(model, tmp_path / "ours", uniform=True)
    model.save_pretrained(str(tmp_path / "peft"))
    lorainit.export(tmp_path / "peft", tmp_path / "exported", uniform=True)
    for name in ("ours", "exported"):
        folder = tmp_path / name
        written = json.loads((folder / "adapter_config.json").read_text())
        assert written["rank_pattern"] == written["alpha_pattern"] == {} and not written["use_rslora"]
        read = {
            "PEFT": PeftModel.from_pretrained(LLAMA.base(), str(folder)).eval(),
            **{rule: served(folder, rule) for rule in ("vLLM", "llama.cpp")},
        }
        for reader in read.values():
            torch.testing.assert_close(cases.logits(reader, LLAMA.batch()), expected, rtol=1e-4, atol=1e-4)


def test_a_scaling_that_half_precision_cannot_take_makes_b_float32(tmp_path) -> None:
    model = LLAMA.adapted(torch.bfloat16, autocast=False, alpha_pattern={"q_proj": 3, "v_proj": 12})
    cases.start(model, "pissa")
    lorainit.save_pretrained(model, tmp_path, uniform=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {key.split(".")[-3]: tensor.dtype for key, tensor in tensors.items() if "lora_B" in key}
    # s is 3/4, 3 and 3/2 times a power of two of the common one: only exact ratios stay in bfloat16
    assert kinds == {"q_proj": torch.bfloat16, "v_proj": torch.bfloat16, "down_proj": torch.bfloat16}
    model = LLAMA.adapted(torch.bfloat16, autocast=False, alpha_pattern={"q_proj": 5})
    cases.start(model, "pissa")
    lorainit.save_pretrained(model, tmp_path, uniform=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.split(".")[-3] for key, t in tensors.items() if t.dtype == torch.float32} == {"q_proj"}


def test_factors_that_cannot_be_filled_up_are_named(tmp_path) -> None:
    model = cases.with_experts(cases.mixtral(), r=4, rank_pattern={".*experts.*": 2})
    with pytest.raises(LoraInitError, match="could be filled up with zeros"):
        lorainit.save_pretrained(model, tmp_path, uniform=True)


ROW: dict[str, Any] = {"name": "x", "kind": "linear", "shape": (16, 16), "base": "none", "seconds": 0.0}
SAID = {
    "one rank and scaling": ([(4, 2.0), (4, 2.0)], {}, ""),
    "another scaling": ([(4, 2.0), (4, 1.0)], {}, "llama.cpp lora_alpha over each layer's own rank: save_pretrained"),
    "another rank, one alpha": ([(4, 2.0), (8, 1.0)], {}, "vLLM takes one rank and one scaling for all: save_pret"),
    "rslora": ([(4, 2.0)], {"use_rslora": True}, "llama.cpp does not know rsLoRA"),
    "dora": ([(4, 2.0)], {"use_dora": True}, "serve no adapter with DoRA"),
    "modules to save": ([(4, 2.0)], {"modules_to_save": ["lm_head"]}, "serve no adapter with modules_to_save"),
}


@pytest.mark.parametrize("pairs, config, said", SAID.values(), ids=SAID)
def test_what_servers_make_of_it_is_said_at_the_start(pairs, config, said) -> None:
    rows = [LayerReport(**ROW, relative_size=0.0, rank=rank, scaling=scaling) for rank, scaling in pairs]
    found = remarks(rows, LoraConfig(r=4, target_modules=["x"], **config))
    assert (found == ()) if not said else any(said in remark for remark in found)
