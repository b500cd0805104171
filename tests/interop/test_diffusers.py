"""Diffusers: the adapters of a UNet and of a diffusion transformer."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict

import cases
import lorainit

pytest.importorskip("diffusers")


def unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def dit():
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        pos_embed_max_size=8,
    )


def unet_batch():
    return {
        "sample": torch.randn(2, 3, 8, 8),
        "timestep": torch.tensor([1, 5]),
        "encoder_hidden_states": torch.randn(2, 4, 12),
    }


def dit_batch():
    return {
        "hidden_states": torch.randn(2, 3, 8, 8),
        "timestep": torch.tensor([1, 5]),
        "encoder_hidden_states": torch.randn(2, 4, 12),
        "pooled_projections": torch.randn(2, 6),
    }


MODELS = {
    # attention, and convolutions as SD's LoRA has them
    "unet": (unet, unet_batch, ["to_q", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "proj_in"]),
    "dit": (dit, dit_batch, ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "pos_embed.proj"]),
}
METHODS = ["loram", "pissa", "eva", "cntlora", "corda", "init-ab", "lora-ga"]


def made(name):
    make, batch, targets = MODELS[name]
    with cases.seeded():
        model, data = make().eval(), batch()
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    return model, data


@torch.no_grad()
def output(model, data):
    return model(**data).sample


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_add_adapter_is_started_and_what_is_saved_is_plain(name, method):
    model, data = made(name)
    before = output(model, data)
    base = cases.base_tensors(model)
    if method == "lora-ga":
        with pytest.raises(lorainit.LoraInitError, match="needs gradients, hence a loss"):
            cases.start(model, method, data=[data])
        return
    report = cases.start(model, method, data=[data])
    assert {row.kind for row in report.layers} == {"linear", "conv"}
    cases.assert_same_tensors(cases.base_tensors(model), base)
    after = output(model, data)
    if lorainit.get_method(method).product == "step":
        assert not torch.equal(after, before)
    else:
        assert torch.equal(after, before)
    with torch.no_grad():
        for site in lorainit.find_sites(model)[0]:
            lorainit.offset.trained_factor(site.lora_B).add_(0.05)
    trained = output(model, data)
    state = get_peft_model_state_dict(model)  # what Diffusers' save_lora_adapter writes
    assert all(".lora_A." in key or ".lora_B." in key for key in state)
    fresh, _ = made(name)
    config = model.peft_config["default"].to_dict()
    fresh.delete_adapters(["default"])
    fresh.add_adapter(LoraConfig(**{k: v for k, v in config.items() if k in ("r", "lora_alpha", "target_modules")}))
    outcome = set_peft_model_state_dict(fresh, state)
    assert outcome.unexpected_keys == []
    assert cases.relative_difference(output(fresh, data), trained) < 1e-5
    model.disable_adapters()
    assert torch.equal(output(model, data), before)


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_saves_and_loads_a_started_adapter(name, tmp_path):
    model, data = made(name)
    cases.start(model, "pissa")
    with torch.no_grad():
        for site in lorainit.find_sites(model)[0]:
            lorainit.offset.trained_factor(site.lora_B).add_(0.05)
    trained = output(model, data)
    model.save_lora_adapter(tmp_path)
    make, _, _ = MODELS[name]
    with cases.seeded():
        fresh = make().eval()
    fresh.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert cases.relative_difference(output(fresh, data), trained) < 1e-5
